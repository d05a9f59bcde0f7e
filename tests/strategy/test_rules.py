"""Recommendations follow the rules, and estimators the parameters of a transformer."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    make_feature_pipeline,
    recommend_strategy,
)

TINY = CNNFeatureTransformer("tiny")


@pytest.mark.parametrize(
    ("n_images", "n_classes", "similarity", "name"),
    [
        (300, 5, "contained", "as_is"),
        (999, 2, "similar", "extract"),
        (1000, 2, "similar", "finetune"),
        (5000, 101, "similar", "extract"),
        (5050, 101, "similar", "finetune"),
        (300, 5, "different", "extract_early"),
        (5000, 5, "different", "finetune_top"),
        (99_999, 5, "different", "finetune_top"),
        (100_000, 5, "different", "scratch"),
        (100_000, 5, "similar", "finetune"),
    ],
)
def test_size_and_similarity_determine_the_strategy(
    n_images, n_classes, similarity, name
):
    strategy = recommend_strategy(n_images, n_classes, similarity, transformer=TINY)

    assert strategy.name == name
    assert len(strategy.reasons) == 2
    assert all(reason.endswith(".") for reason in strategy.reasons)
    clone(strategy.estimator)


def test_the_smallest_class_determines_the_size():
    few = recommend_strategy(5000, 2, "similar", transformer=TINY, n_smallest=10)

    assert few.name == "extract"
    assert "10 in the smallest class" in few.reasons[0]


def test_estimators_have_the_parameters_of_the_transformer():
    transformer = CNNFeatureTransformer(
        "tiny",
        layer="block2",
        pooling="max",
        image_size=32,
        image_shape=(8, 8),
        batch_size=3,
        decode="fast",
        cache="folder",
        n_jobs=2,
        random_state=7,
    )
    given = transformer.get_params()

    def estimator(n_images, similarity):
        strategy = recommend_strategy(n_images, 5, similarity, transformer=transformer)
        return strategy.estimator

    extract = estimator(300, "similar")
    assert extract[0].get_params() == {**given, "layer": "last"}
    assert isinstance(extract[-1], LogisticRegression)
    early = estimator(300, "different")
    assert early[0].get_params() == given
    assert isinstance(early[-1], LinearSVC)
    assert early[-1].random_state == 7
    pretrained = estimator(300, "contained")
    assert isinstance(pretrained, PretrainedCNNClassifier)
    expected = {name: given[name] for name in given if hasattr(pretrained, name)}
    assert pretrained.get_params() == {**expected, "class_map": "learn"}
    fine_tuned = estimator(5000, "similar")
    changes = {name: value for name, value in given.items() if name != "layer"}
    del changes["batch_size"]  # of a fine-tuned classifier, that of training
    del changes["n_views"]  # there, augmented views
    del changes["store_weights"]  # fine-tuned weights have no name
    del changes["on_error"]  # a classifier refuses images that it cannot read
    expected = FineTunedCNNClassifier(**changes)
    assert fine_tuned.get_params() == expected.get_params()
    top = estimator(5000, "different")
    assert top.get_params() == expected.set_params(layer="block2").get_params()
    scratch = estimator(500_000, "different").get_params()
    assert (scratch["weights"], scratch["head_epochs"]) == (None, 0)
    assert scratch["image_shape"] == (8, 8)


def test_a_class_map_configures_the_pretrained_classifier():
    strategy = recommend_strategy(
        300, 2, "contained", transformer=TINY, class_map={"a": 1, "b": 2}
    )

    assert strategy.estimator.class_map == {"a": 1, "b": 2}


def test_the_layer_at_two_thirds_of_the_depth_is_the_default():
    transformer = CNNFeatureTransformer("resnet18")

    strategy = recommend_strategy(300, 5, "different", transformer=transformer)

    assert strategy.estimator[0].layer == "layer3"


@pytest.mark.parametrize(
    ("backbone", "pooling", "image_size", "last", "early"),
    [
        ("tiny", 2, 16, "block3", "block2"),
        ("tiny", 5, 32, "block2", "block1"),
        ("tiny", "avg", 32, "last", "block3"),
        # These end in vectors, which can be pooled in any way.
        ("mobilenet_v3_small", 4, 64, "block3", "block2"),
        ("alexnet", "avg", 64, "last", "block4"),
    ],
)
@pytest.mark.parametrize("n_images", [60, 20_000])
def test_layers_are_those_that_can_be_pooled(
    n_images, backbone, pooling, image_size, last, early, digits
):
    rows = {"image_shape": (8, 8), "image_size": image_size, "pooling": pooling}
    weights = "pretrained" if backbone == "tiny" else None
    transformer = CNNFeatureTransformer(backbone, weights=weights, **rows)
    X, y = digits[0][:60], digits[1][:60] % 3

    for similarity, layer in (("similar", last), ("different", early)):
        strategy = recommend_strategy(n_images, 3, similarity, transformer=transformer)
        estimator = strategy.estimator
        found = estimator.get_params()["feat__layer" if n_images == 60 else "layer"]
        assert found == layer
        transformer.set_params(layer=found).fit_transform(X[:2])
        transformer.set_params(layer="last")
        if n_images == 60:
            assert estimator.fit(X, y).score(X, y) > 0.5


def test_strategies_that_pool_nothing_need_no_layer_to_pool():
    transformer = CNNFeatureTransformer("tiny", pooling="cls")

    as_is = recommend_strategy(300, 3, "contained", transformer=transformer)

    assert isinstance(as_is.estimator, PretrainedCNNClassifier)
    with pytest.raises(ValueError, match="'tiny' has no layer that pooling='cls' can"):
        recommend_strategy(300, 3, "similar", transformer=transformer)


@pytest.mark.parametrize("parameter", ["image_size", "crop", "pooling"])
def test_parameters_of_the_transformer_are_checked(parameter):
    transformer = CNNFeatureTransformer("tiny", **{parameter: "other"})

    message = f"The '{parameter}' parameter of CNNFeatureTransformer must"
    with pytest.raises(ValueError, match=message):
        recommend_strategy(300, 3, "similar", transformer=transformer)


@pytest.mark.filterwarnings("ignore::skltl.exceptions.LicenseWarning")
def test_layers_are_those_of_the_size_of_the_weights():
    """These weights are for images of 384 pixels, the usual ones for 224."""
    transformer = CNNFeatureTransformer(
        "regnet_y_16gf", weights="IMAGENET1K_SWAG_E2E_V1", pooling=8
    )

    strategy = recommend_strategy(300, 3, "similar", transformer=transformer)

    assert strategy.estimator.get_params()["feat__layer"] == "last"
    usual = transformer.set_params(weights="IMAGENET1K_V2")
    strategy = recommend_strategy(300, 3, "similar", transformer=usual)
    assert strategy.estimator.get_params()["feat__layer"] == "block3"


def test_the_default_transformer_is_the_default_network():
    strategy = recommend_strategy(300, 5, "similar")

    assert strategy.code == "make_feature_pipeline('resnet50', 'softmax')"


@pytest.mark.parametrize("n_images", [0, 10.5, float("nan"), "10", True])
def test_sizes_that_are_not_counts_are_refused(n_images):
    with pytest.raises(ValueError, match="n_images must be a positive integer"):
        recommend_strategy(n_images, 5, "similar")


def test_an_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match="one of contained, similar, different"):
        recommend_strategy(10, 5, "alike")


@pytest.mark.parametrize(
    ("layer", "words"), [("bogus", "bogus"), (["block1", "block2"], "single layer")]
)
def test_a_layer_that_cannot_be_used_is_refused(layer, words):
    transformer = CNNFeatureTransformer("tiny", layer=layer)

    with pytest.raises(ValueError, match=words):
        recommend_strategy(10, 5, "similar", transformer=transformer)


OWN = Backbone.from_blocks("own", {"a": nn.ReLU()}, preprocessing=Preprocessing(16))


@pytest.mark.parametrize(
    ("transformer", "words"),
    [
        ("resnet50", r"Pass CNNFeatureTransformer\('resnet50'\)\."),
        (OWN, r"Pass CNNFeatureTransformer\(Backbone\('own'\)\)\."),
        (make_feature_pipeline("tiny"), r"got Pipeline\("),
        (CNNFeatureTransformer, r"got <class "),
    ],
    ids=["name", "backbone", "pipeline", "class"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda transformer: StrategyAdvisor(transformer).fit([[0.0], [1.0]], [0, 1]),
        lambda transformer: TransferClassifier(transformer).fit([[0.0], [1.0]], [0, 1]),
        lambda transformer: recommend_strategy(
            300, 5, "similar", transformer=transformer
        ),
    ],
    ids=["StrategyAdvisor", "TransferClassifier", "recommend_strategy"],
)
def test_only_transformers_are_accepted(call, transformer, words):
    with pytest.raises(TypeError, match=f"must be a CNNFeatureTransformer.*{words}"):
        call(transformer)


def test_costs_are_those_of_the_estimator():
    strategy = recommend_strategy(5000, 5, "similar", transformer=TINY)
    usual = strategy.n_passes

    strategy.estimator.set_params(finetune_epochs=2)

    assert (usual, strategy.n_passes) == (1 + 3 * 10, 1 + 3 * 2)


@pytest.mark.parametrize("n_images", [300, 5_000, 500_000])
@pytest.mark.parametrize("similarity", ["contained", "similar", "different"])
def test_the_code_of_a_strategy_builds_its_estimator(n_images, similarity):
    names = {
        "make_feature_pipeline": make_feature_pipeline,
        "FineTunedCNNClassifier": FineTunedCNNClassifier,
        "PretrainedCNNClassifier": PretrainedCNNClassifier,
    }
    transformer = CNNFeatureTransformer(
        "tiny", image_shape=(8, 8), cache=Path("folder"), n_jobs=2, random_state=0
    )
    strategy = recommend_strategy(n_images, 3, similarity, transformer=transformer)

    built = eval(strategy.code, names)

    transformer.set_params(cache="folder")  # code has no objects
    strategy = recommend_strategy(n_images, 3, similarity, transformer=transformer)
    assert repr(built) == repr(strategy.estimator)


@pytest.mark.parametrize("targets", ["classes", "labels", "values"])
@pytest.mark.parametrize("n_images", [100, 2000])
@pytest.mark.parametrize("similarity", ["similar", "different"])
def test_the_script_of_a_strategy_fits_its_estimator(
    targets, n_images, similarity, few_digits
):
    X, y = few_digits[0][:40], few_digits[1][:40]
    y = {
        "classes": y,
        "labels": np.column_stack([y > 0, y > 1]).astype(int),
        "values": X.mean(axis=1),
    }[targets]
    transformer = CNNFeatureTransformer(
        "tiny", image_shape=(8, 8), image_size=32, random_state=0
    )
    strategy = recommend_strategy(
        *(n_images, 3, similarity), transformer=transformer, targets=targets
    )
    if n_images == 2000:
        strategy.estimator.set_params(head_epochs=1, finetune_epochs=1)
    namespace = {"X": X, "y": y}

    exec(strategy.script, namespace)

    fitted = namespace["estimator"]
    assert repr(clone(fitted)) == repr(clone(strategy.estimator))
    expected = clone(strategy.estimator).fit(X, y).predict(X)
    np.testing.assert_array_equal(fitted.predict(X), expected)


def test_what_has_no_code_is_a_name():
    backbone = Backbone.from_module(
        "own", nn.Conv2d(3, 4, 3), preprocessing=Preprocessing(32)
    )
    transformer = CNNFeatureTransformer(backbone, reader=load_digits)

    def code(**parameters):
        configured = clone(transformer).set_params(**parameters)
        return recommend_strategy(100, 3, "similar", transformer=configured).code

    expected = "make_feature_pipeline(backbone, 'softmax', reader=load_digits)"
    assert code() == expected
    assert "reader=reader)" in code(reader=partial(load_digits, n_class=3))
    assert "random_state=random_state" in code(random_state=np.random.RandomState(0))
    assert "batch_size=2," in code(batch_size=np.int64(2))
    assert "image_size=(32, 48)," in code(image_size=(np.int64(32), np.int64(48)))
    assert "pooling=2," in code(pooling=2)


def test_the_size_of_labels_and_values():
    """Labels need images with and without each; values have no smallest class."""
    few = recommend_strategy(2000, 3, "similar", n_smallest=20, targets="labels")
    assert few.name == "extract"
    assert few.reasons[0].startswith("2,000 images, 20 with or without the rarest")
    many = recommend_strategy(2000, 3, "similar", targets="values")
    assert many.name == "finetune"
    assert many.reasons[0] == "2,000 images are enough to fine-tune the network."
    with pytest.raises(ValueError, match="targets must be one of classes, labels"):
        recommend_strategy(2000, 3, "similar", targets="label")

"""Pipelines become classifiers, and classifiers become transformers."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.ensemble import BaggingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsOneClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from tiny_classifier import NETWORK

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    make_feature_pipeline,
)
from skltl.networks import get_backbone

SMALL = {"image_shape": (8, 8), "image_size": 16}


@pytest.mark.parametrize(
    ("kind", "n_classes"), [("svm", 2), ("softmax", 2), ("svm", 10), ("ovr", 10)]
)
def test_fine_tuning_starts_from_a_pipeline(kind, n_classes, digits):
    is_used = digits[1] < n_classes
    X, y = digits[0][is_used][:60], digits[1][is_used][:60]
    pipeline = make_feature_pipeline("tiny", kind, **NETWORK).fit(X, y)

    made = FineTunedCNNClassifier.from_pipeline(pipeline, unfreeze=1, random_state=0)

    before = made.decision_function(X)
    assert_allclose(before, pipeline.decision_function(X), atol=2e-4)
    assert_array_equal(made.predict(X), pipeline.predict(X))
    made.set_params(finetune_epochs=2, backbone_lr=0.001).fit(X, y)
    after = made.decision_function(X)
    assert [record["stage"] for record in made.history_] == ["fine-tuning"] * 2
    assert not np.array_equal(after, before)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.95


def test_clones_of_a_converted_pipeline_start_from_it(data):
    X, y = data
    pipeline = make_feature_pipeline("tiny", "softmax", **NETWORK).fit(X, y)
    pipeline[-1].coef_ *= -1  # not what a probe would be
    untrained = {"unfreeze": 1, "random_state": 0, "finetune_epochs": 0}
    made = FineTunedCNNClassifier.from_pipeline(pipeline, **untrained)

    again = clone(made).fit(X, y)

    assert_allclose(
        again.decision_function(X), pipeline.decision_function(X), atol=2e-4
    )
    assert_array_equal(made.fit(X, y).decision_function(X), again.decision_function(X))
    with pytest.raises(ValueError, match="head_init: the classes are"):
        clone(made).fit(X, y % 2)
    with pytest.raises(ValueError, match="is not the head that layer"):
        clone(made).set_params(hidden_units=(5,)).fit(X, y)


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(MinMaxScaler(), LogisticRegression()),
        make_feature_pipeline("tiny", "softmax", **NETWORK),
    ],
    ids=["another scaler", "with the transformer"],
)
def test_a_model_that_is_no_head_is_refused(model, data):
    X, y = data
    head = FrozenEstimator(model.fit(X, y))

    with pytest.raises(ValueError, match=r"head_init: expected a linear model, or"):
        FineTunedCNNClassifier("tiny", head_init=head, **NETWORK).fit(X, y)


def test_a_model_without_a_scaler_is_a_head(data):
    X, y = data
    pipeline = make_pipeline(
        CNNFeatureTransformer("tiny", **NETWORK), "passthrough", LogisticRegression()
    ).fit(X, y)
    for head in (pipeline[-1], pipeline[1:], make_pipeline(pipeline[1:])):
        classifier = FineTunedCNNClassifier(
            "tiny",
            head_init=FrozenEstimator(head),
            head_epochs=0,
            unfreeze=None,
            **NETWORK,
        )
        found = classifier.fit(X, y).decision_function(X)
        assert_allclose(found, pipeline.decision_function(X), atol=2e-4)


def test_the_size_of_the_weights_is_not_the_usual_one(data):
    X, y = data
    tiny = get_backbone("tiny")
    (weights,) = tiny.weights
    large = replace(weights, name="LARGE", preprocessing=Preprocessing(48))
    backbone = replace(tiny, name="two_sizes", weights=(weights, large))
    for image_size in (None, tiny.preprocessing.crop_size):
        transformer = CNNFeatureTransformer(
            backbone, weights="LARGE", image_size=image_size, image_shape=(8, 8)
        )
        pipeline = make_pipeline(transformer, LogisticRegression(C=0.01)).fit(X, y)
        made = FineTunedCNNClassifier.from_pipeline(pipeline)
        assert made.image_size == image_size


def set_another_network(pipeline, X, y):
    pipeline.set_params(feat__pooling="max", feat__layer="stem", feat__image_size=64)


def set_other_weights(pipeline, X, y):
    pipeline.set_params(feat__weights=None)


def fit_again(pipeline, X, y):
    pipeline.fit(X[::-1], y)


@pytest.mark.parametrize(
    ("change", "comes_first"),
    [(set_another_network, True), (set_other_weights, True), (fit_again, False)],
)
def test_pipelines_are_converted_as_they_were_fitted(change, comes_first, data):
    X, y = data
    pipeline = make_feature_pipeline("tiny", "softmax", **NETWORK).fit(X, y)
    expected = pipeline.decision_function(X)
    if comes_first:
        change(pipeline, X, y)

    made = FineTunedCNNClassifier.from_pipeline(pipeline, finetune_epochs=0)

    if not comes_first:
        change(pipeline, X, y)
    assert_allclose(made.decision_function(X), expected, atol=2e-4)
    again = clone(made).set_params(random_state=0).fit(X, y)
    assert_allclose(again.decision_function(X), expected, atol=2e-4)


@pytest.mark.parametrize("seeds", [(0, None), (None, 0), (None, None), (3, 3)], ids=str)
def test_random_weights_of_a_pipeline_are_kept(seeds, digits):
    X, y = digits[0][:30], digits[1][:30]
    of_transformer, of_classifier = seeds
    pipeline = make_feature_pipeline(
        "tiny", "softmax", weights=None, random_state=of_transformer, **NETWORK
    ).fit(X, y)
    expected = pipeline.decision_function(X)

    made = FineTunedCNNClassifier.from_pipeline(
        pipeline, finetune_epochs=0, random_state=of_classifier
    )

    for again in (made, clone(made).fit(X, y), pickle.loads(pickle.dumps(made))):
        assert_allclose(again.decision_function(X), expected, atol=2e-4)


@pytest.mark.parametrize(
    "last",
    [
        SVC(kernel="linear"),
        OneVsOneClassifier(LogisticRegression()),
        BaggingClassifier(LogisticRegression(), 3),
        LinearRegression(),
        DecisionTreeClassifier(),
    ],
    ids=lambda last: type(last).__name__,
)
def test_classifiers_that_are_not_linear_are_refused(last, digits):
    is_used = digits[1] < 3
    X, y = digits[0][is_used][:30], digits[1][is_used][:30]
    pipeline = make_pipeline(CNNFeatureTransformer("tiny", **SMALL), last).fit(X, y)

    with pytest.raises(ValueError, match=type(last).__name__):
        FineTunedCNNClassifier.from_pipeline(pipeline)


def test_pipelines_with_other_steps_are_refused(digits):
    X, y = digits[0][:30], digits[1][:30]
    transformer = CNNFeatureTransformer("tiny", **SMALL)
    several = make_pipeline(
        clone(transformer).set_params(layer=["stem", "block1"]), LogisticRegression()
    ).fit(X, y)
    scaled = make_pipeline(transformer, MinMaxScaler(), LogisticRegression()).fit(X, y)

    with pytest.raises(ValueError, match="2 layers, stem, block1"):
        FineTunedCNNClassifier.from_pipeline(several)
    with pytest.raises(ValueError, match="got CNNFeatureTransformer, MinMaxScaler"):
        FineTunedCNNClassifier.from_pipeline(scaled)
    with pytest.raises(ValueError, match="Expected a fitted Pipeline, got str"):
        FineTunedCNNClassifier.from_pipeline("pipeline")


def test_what_a_pipeline_determines_cannot_be_set(digits):
    pipeline = make_feature_pipeline("tiny", "softmax", **SMALL)
    pipeline.fit(digits[0][:30], digits[1][:30])

    with pytest.raises(ValueError, match="dropout, layer: determined by the pipeline"):
        FineTunedCNNClassifier.from_pipeline(pipeline, layer="block1", dropout=0.5)


def test_a_fine_tuned_network_becomes_a_transformer(data, fitted):
    transformer = fitted.to_transformer()

    expected = fitted.transform(data[0])
    assert_array_equal(transformer.transform(data[0]), expected)
    assert_array_equal(
        transformer.get_feature_names_out(), fitted.get_feature_names_out()
    )
    loaded = pickle.loads(pickle.dumps(transformer))
    assert_array_equal(loaded.transform(data[0]), expected)


def test_clones_of_a_fine_tuned_transformer_are_fine_tuned(data, fitted):
    X, y = data
    expected = fitted.transform(X)
    pretrained = CNNFeatureTransformer("tiny", **NETWORK, precision="float32")

    pipeline = make_pipeline(fitted.to_transformer(), LogisticRegression()).fit(X, y)

    assert np.abs(expected - pretrained.fit_transform(X)).max() > 0.01
    assert_array_equal(pipeline[0].transform(X), expected)
    assert_array_equal(clone(fitted.to_transformer()).fit_transform(X), expected)
    earlier = clone(fitted.to_transformer()).set_params(layer="block1")
    frozen = pretrained.set_params(layer="block1")
    assert_array_equal(earlier.fit_transform(X), frozen.fit_transform(X))


def test_a_pipeline_without_a_classifier_is_refused(data):
    features = make_pipeline(CNNFeatureTransformer("tiny", **NETWORK).fit(data[0]))

    with pytest.raises(ValueError, match="The steps of the pipeline must be"):
        FineTunedCNNClassifier.from_pipeline(features)


def test_a_head_of_labels_is_not_one_of_classes(digits):
    X, y = digits[0][:40], digits[1][:40]
    Y = np.column_stack([y > 4, y % 2]).astype(int)
    pipeline = make_feature_pipeline("tiny", "softmax", **NETWORK)
    of_labels = FineTunedCNNClassifier.from_pipeline(pipeline.fit(X, Y))
    of_classes = FineTunedCNNClassifier.from_pipeline(pipeline.fit(X, Y[:, 0]))

    with pytest.raises(ValueError, match="fitted to an indicator .* y has classes"):
        clone(of_labels).fit(X, Y[:, 0])
    with pytest.raises(ValueError, match="fitted to classes, and y has an indicator"):
        clone(of_classes).fit(X, Y)

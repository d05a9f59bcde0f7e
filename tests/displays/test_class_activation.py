"""Maps of where a class was seen, against the definition and against known places."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn import config_context
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, NuSVC
from tiny_classifier import classifier

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    PretrainedCNNClassifier,
    TransferClassifier,
    make_feature_pipeline,
)
from skltl.displays import class_activation
from skltl.networks import get_backbone, load_network, resolve_weights


@pytest.fixture
def halves():
    """Grey noise, and a bright red square on the left or the right side."""
    rng = np.random.default_rng(0)
    images = rng.integers(90, 160, size=(24, 64, 64, 3), dtype=np.uint8)
    has_square = np.arange(24) % 3 > 0
    on_the_right = np.arange(24) % 3 == 2
    for image, is_there, right in zip(images, has_square, on_the_right, strict=True):
        if is_there:
            left = 40 if right else 4
            image[22:42, left : left + 20] = (250, 20, 20)
    return images, has_square.astype(int), on_the_right


def test_a_linear_classifier_sees_a_thing_where_it_is(halves):
    images, labels, on_the_right = halves
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block3", image_size=64)
    pipeline.fit(images, labels)

    found = class_activation(pipeline, images[labels == 1])

    sides = found.maps[:, :, :32].sum(axis=(1, 2)), found.maps[:, :, 32:].sum((1, 2))
    is_right = on_the_right[labels == 1]
    assert found.maps.shape == (16, 64, 64)
    assert ((sides[1] > sides[0]) == is_right).all()
    assert_allclose(found.maps.min(), 0, atol=1e-6)
    assert found.maps.max() <= 1


def test_for_averaged_features_maps_are_weighed_by_coefficients(halves):
    """Zhou et al. 2016: the class activation map of a network that ends so."""
    images, labels, _ = halves
    pipeline = make_feature_pipeline(
        "tiny", "softmax", layer="block3", image_size=64, precision="float32"
    ).fit(images, labels)
    scaler, linear = (step for _, step in pipeline.steps[1:])
    maps = CNNFeatureTransformer(
        "tiny", layer="block3", pooling="flatten", image_size=64, precision="float32"
    ).fit_transform(images[:3])
    coefficients = linear.coef_[0] / scaler.scale_
    maps = maps.reshape(3, 192, 8, 8)
    expected = np.einsum("c,nchw->nhw", coefficients, maps).clip(min=0)
    expected /= expected.max(axis=(1, 2), keepdims=True)

    found = class_activation(pipeline, images[:3], np.ones(3, dtype=int))

    shown = torch.nn.functional.interpolate(
        torch.from_numpy(expected)[:, None], (64, 64), mode="bilinear"
    )[:, 0]
    assert_allclose(found.maps, shown, atol=1e-4)


def test_tuned_and_pretrained_networks_have_maps_too(halves, digits):
    images, labels, _ = halves
    tuned = classifier(image_shape=None, conv_channels=(8,)).fit(images, labels)
    as_is = PretrainedCNNClassifier("tiny").fit(images)
    mapped = PretrainedCNNClassifier("tiny", class_map="learn").fit(images, labels)

    for estimator, size in ((tuned, 32), (as_is, 80), (mapped, 80)):
        found = class_activation(estimator, images[:2])
        assert found.maps.shape == (2, size, size)
        assert found.images.shape == (2, size, size, 3)
        assert np.isfinite(found.maps).all()
        assert list(found.labels) == list(estimator.predict(images[:2]))


def test_what_has_no_map_is_refused(halves):
    images, labels, _ = halves
    forest = make_pipeline(CNNFeatureTransformer("tiny"), RandomForestClassifier(3))
    forest.fit(images, labels)
    vectors = make_feature_pipeline("alexnet", weights=None, layer="fc7", image_size=64)
    vectors.set_params(feat__random_state=0).fit(images[:6], labels[:6])

    with pytest.raises(ValueError, match="RandomForestClassifier is not a linear"):
        class_activation(forest, images)
    with pytest.raises(ValueError, match="layer 'fc7' returns a vector of size 4096"):
        class_activation(vectors, images[:2])
    with pytest.raises(ValueError, match="neither a classifier of skltl"):
        class_activation(RandomForestClassifier().fit([[0], [1]], [0, 1]), images)


def test_labels_that_are_no_classes_are_refused(halves):
    images, labels, _ = halves
    names = np.array(["cup", "key"])[labels]
    pipeline = make_feature_pipeline("tiny", "svm", image_size=64).fit(images, names)

    assert class_activation(pipeline, images[:2], "key").labels.tolist() == ["key"] * 2
    for wrong in (["cup", "keys"], [0, 1]):
        with pytest.raises(ValueError, match="is none of the classes"):
            class_activation(pipeline, images[:2], wrong)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        class_activation(pipeline, images[:2], ["cup"])


def normalized(images, preprocessing):
    """Return what a network sees of 8-bit images, a tensor (n, 3, h, w)."""
    crops = np.stack([preprocessing.crop(image) for image in images])
    mean, std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in (preprocessing.mean, preprocessing.std)
    )
    return (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std


def tiny_by_hand(images):
    """Return the tiny network's last feature maps of images, and what follows them."""
    backbone = get_backbone("tiny")
    network = load_network(backbone, resolve_weights(backbone, "imagenet"))
    batch = normalized(images, backbone.preprocessing)
    names = list(network.blocks)
    last = names.index(network.cut_points["block4"]) + 1
    with torch.no_grad():
        for name in names[:last]:
            batch = network.blocks[name](batch)
    rest = [network.blocks[name] for name in names[last:]]
    return batch, torch.nn.Sequential(*rest, *network.head.values())


def map_by_hand(feature_map, score, size):
    """Return the map (size, size) of Selvaraju et al. for a score of a feature map."""
    seen = feature_map[None].clone().requires_grad_(True)
    score(seen).backward()
    weights = seen.grad.mean(dim=(2, 3), keepdim=True)
    found = (weights * seen.detach()).sum(dim=1, keepdim=True).relu()
    shown = torch.nn.functional.interpolate(
        found / found.max().clamp(min=1e-30), (size, size), mode="bilinear"
    )
    return shown[0, 0].numpy()


LABELS = {
    "two texts": ["tulip", "rose"],
    "three texts": ["tulip", "rose", "lily"],
    "integers": [7, -1, 3],
    "two integers": [5, 2],
}
CLASS_MAP = {"b": [3, 5], "a": [7, 1, 0], "c": [11]}
TINY = {"layer": "block3", "image_size": 32, "precision": "float32"}


def tiny_pipeline(kind, **parameters):
    return make_feature_pipeline("tiny", kind, **TINY, **parameters)


CLASSIFIERS = {
    "svm": lambda: tiny_pipeline("svm", random_state=0),
    "softmax": lambda: tiny_pipeline("softmax"),
    "ovr": lambda: tiny_pipeline("ovr"),
    "ridge": lambda: tiny_pipeline(RidgeClassifier()),
    "max pooling": lambda: tiny_pipeline("softmax", pooling="max"),
    "grid pooling": lambda: tiny_pipeline("softmax", pooling=2),
    "without scaler": lambda: make_pipeline(
        CNNFeatureTransformer("tiny", **TINY), LogisticRegression(max_iter=5000)
    ),
    "passthrough": lambda: tiny_pipeline("softmax").set_params(scale="passthrough"),
    "search in a pipeline": lambda: tiny_pipeline(
        GridSearchCV(LogisticRegression(max_iter=500), {"C": [0.1]}, cv=2)
    ),
    "search": lambda: GridSearchCV(
        tiny_pipeline("softmax"), {"feat__layer": ["block2"]}, cv=2
    ),
    "tuned": lambda: classifier(image_shape=None),
    "tuned, hidden": lambda: classifier(image_shape=None, hidden_units=(6,)),
    "tuned, convolutions": lambda: classifier(image_shape=None, conv_channels=(8,)),
    "search, tuned": lambda: GridSearchCV(
        classifier(image_shape=None), {"unfreeze": [1]}, cv=2
    ),
    "pretrained, learned": lambda: PretrainedCNNClassifier(
        "tiny", class_map="learn", precision="float32"
    ),
    "advised": lambda: TransferClassifier(
        CNNFeatureTransformer("tiny", image_size=32, precision="float32"),
        strategy="extract", random_state=0,
    ),
    "advised, tuned": lambda: TransferClassifier(
        CNNFeatureTransformer("tiny", image_size=32, precision="float32"),
        strategy="finetune_top", random_state=0,
    ),
    "advised, as it is": lambda: TransferClassifier(
        CNNFeatureTransformer("tiny", precision="float32"), strategy="as_is"
    ),
}  # fmt: skip


def scores_of(fitted, images, labels):
    """Return the classifier's own score of a label for each image."""
    decisions = fitted.decision_function(images)
    classes = fitted.classes_.tolist()
    columns = [classes.index(label) for label in labels]
    if decisions.ndim == 1:
        return np.where(np.array(columns) == 1, decisions, -decisions)
    return decisions[np.arange(len(images)), columns]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_score_is_the_classifiers_own_for_that_label(kind, labels, halves):
    images, _, _ = halves
    y = np.resize(LABELS[labels], len(images))
    fitted = CLASSIFIERS[kind]().fit(images, y)
    wanted = np.resize(LABELS[labels][::-1], 6).tolist()

    found = class_activation(fitted, images[:6], wanted)

    expected = scores_of(fitted, images[:6], wanted)
    assert_allclose(found.scores, expected, rtol=1e-3, atol=1e-4)
    assert found.labels.tolist() == wanted


@pytest.mark.parametrize("class_map", [None, CLASS_MAP], ids=["names", "mapped"])
def test_a_pretrained_networks_score_is_that_of_the_named_class(class_map, images):
    fitted = PretrainedCNNClassifier(
        "tiny", class_map=class_map, precision="float32"
    ).fit(images)
    wanted = np.resize(fitted.classes_[::-7], len(images)).tolist()

    found = class_activation(fitted, images, wanted)
    of_predicted = class_activation(fitted, images)

    expected = scores_of(fitted, images, wanted)
    assert_allclose(found.scores, expected, rtol=1e-3, atol=1e-4)
    best = fitted.decision_function(images).max(axis=1)
    assert_allclose(of_predicted.scores, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("class_map", [None, CLASS_MAP], ids=["names", "mapped"])
def test_a_pretrained_networks_map_is_that_of_the_named_class(class_map, images):
    fitted = PretrainedCNNClassifier(
        "tiny", class_map=class_map, precision="float32"
    ).fit(images)
    feature_maps, rest = tiny_by_hand(images)
    names = np.array(get_backbone("tiny").weights[0].categories)
    with torch.no_grad():
        best = rest(feature_maps).argmax(dim=1).numpy()
    members = [[7, 1, 0]] * len(images) if class_map else best[:, None].tolist()
    wanted = ["a"] * len(images) if class_map else names[best].tolist()

    found = class_activation(fitted, images, wanted)

    for number, columns in enumerate(members):
        expected = map_by_hand(
            feature_maps[number],
            lambda seen, columns=columns: rest(seen)[0, columns].logsumexp(0),
            fitted.preprocessing_.crop_size,
        )
        assert_allclose(found.maps[number], expected, atol=1e-3)
    assert found.maps.max() > 0.9


def test_a_pretrained_vgg_is_mapped_before_its_fully_connected_layers(images):
    fitted = PretrainedCNNClassifier(
        "vgg11", weights=None, random_state=0, image_size=64, precision="float32"
    ).fit(images)
    wanted = fitted.classes_[[5, 500, 999]].tolist()

    found = class_activation(fitted, images[:3], wanted)

    expected = scores_of(fitted, images[:3], wanted)
    assert_allclose(found.scores, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"conv_channels": (8,), "hidden_units": (6,)}]
)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_tuned_networks_map_follows_its_head(settings, n_classes, halves):
    images, _, _ = halves
    y = np.resize(["tulip", "rose", "lily"][:n_classes], len(images))
    fitted = classifier(image_shape=None, **settings).fit(images, y)
    feature_maps = normalized(images[:3], fitted.preprocessing_)
    with torch.no_grad():
        for block in fitted.network_.blocks.values():
            feature_maps = block(feature_maps)
    column = fitted.classes_.tolist().index("rose")
    signs = torch.full((n_classes,), -1.0 if n_classes == 2 else 0.0).double()
    signs[column] = 1

    found = class_activation(fitted, images[:3], "rose")

    for number in range(3):
        expected = map_by_hand(
            feature_maps[number].double(),
            lambda seen: fitted.head_(seen)[0] @ signs,
            32,
        )
        assert_allclose(found.maps[number], expected, atol=1e-4)


def test_maps_lie_over_what_the_network_sees(halves):
    """The images that come back are the crops, in the network's size."""
    images, labels, _ = halves
    wide = np.concatenate([images, images], axis=2)  # twice as wide as high
    pipeline = tiny_pipeline("softmax").fit(wide, labels)

    found = class_activation(pipeline, wide[:2])

    preprocessing = pipeline[0].preprocessing_
    expected = [preprocessing.crop(image) for image in wide[:2]]
    np.testing.assert_array_equal(found.images, expected)


def test_users_settings_of_torch_change_nothing(halves):
    images, labels, _ = halves
    pipeline = tiny_pipeline("softmax").fit(images, labels)
    expected = class_activation(pipeline, images[:2])
    state = torch.get_rng_state()

    with torch.no_grad(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            found = class_activation(pipeline, images[:2])
        finally:
            torch.set_default_dtype(torch.float32)

    assert_allclose(found.maps, expected.maps, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), state)


def test_tables_within_a_pipeline_raise_no_warning(halves):
    images, labels, _ = halves
    with config_context(transform_output="pandas"):
        for kind in ("svm", "ovr"):
            pipeline = tiny_pipeline(kind, random_state=0).fit(images, labels)

            found = class_activation(pipeline, images[:2], [0, 1])
            tuned = FineTunedCNNClassifier.from_pipeline(pipeline)

            decisions = pipeline.decision_function(images[:2])
            assert_allclose(found.scores, decisions * [-1, 1], rtol=1e-4, atol=1e-5)
            assert_allclose(
                tuned.decision_function(images[:2]), decisions, rtol=1e-4, atol=1e-5
            )


def test_features_of_several_layers_have_no_single_map(halves):
    images, labels, _ = halves
    pipeline = tiny_pipeline("svm", random_state=0)
    pipeline.set_params(feat__layer=["block2", "block3"]).fit(images, labels)

    with pytest.raises(ValueError, match="2 layers, block2, block3: .* single layer"):
        class_activation(pipeline, images)


@pytest.mark.parametrize(
    "last",
    [
        SVC(kernel="linear", decision_function_shape="ovo"),
        NuSVC(kernel="linear", decision_function_shape="ovo", nu=0.2),
    ],
    ids=["SVC", "NuSVC"],
)
def test_decisions_between_pairs_are_not_taken_for_those_of_classes(halves, last):
    """Of three classes there are three pairs: the shapes do not tell."""
    images, has_square, on_the_right = halves
    pipeline = make_pipeline(CNNFeatureTransformer("tiny", image_size=32), last)
    pipeline.fit(images, has_square + on_the_right)

    for use in (
        FineTunedCNNClassifier.from_pipeline,
        lambda fitted: class_activation(fitted, images[:2]),
    ):
        with pytest.raises(ValueError, match="does not decide by one row"):
            use(pipeline)


@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.parametrize(
    "last", [OneVsRestClassifier(LogisticRegression()), RidgeClassifier()]
)
def test_several_labels_of_an_image_are_not_taken_for_classes(halves, last, n_labels):
    images, has_square, on_the_right = halves
    labels = np.column_stack([has_square, on_the_right, 1 - has_square])[:, :n_labels]
    pipeline = make_pipeline(CNNFeatureTransformer("tiny", image_size=32), last)
    pipeline.fit(images, labels)

    with pytest.raises(ValueError, match="does not decide by one row"):
        FineTunedCNNClassifier.from_pipeline(pipeline)


def test_a_class_that_nothing_was_learned_of_does_not_spoil_the_others(halves):
    images, has_square, on_the_right = halves
    labels = has_square + on_the_right
    mapped = PretrainedCNNClassifier("tiny", class_map="learn", precision="float32")
    mapped.fit(images, labels, sample_weight=(labels != 2).astype(float))

    found = class_activation(mapped, images[:6], labels[:6])

    decisions = mapped.decision_function(images[:6])[np.arange(6), labels[:6]]
    assert_allclose(found.scores, decisions, rtol=1e-4)
    assert (found.maps[labels[:6] < 2].max(axis=(1, 2)) > 0.5).all()
    assert (found.maps[labels[:6] == 2] == 0).all()


def test_labels_may_stand_in_a_column(halves):
    images, labels, _ = halves
    pipeline = make_feature_pipeline("tiny", "svm", image_size=32).fit(images, labels)

    found = class_activation(pipeline, images[:3], labels[:3, None])

    assert found.labels.tolist() == labels[:3].tolist()

"""Maps of where a class was seen, against the definition and against known places."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from tiny_classifier import classifier

from skltl import CNNFeatureTransformer, PretrainedCNNClassifier, make_feature_pipeline
from skltl.classifiers import class_activation


@pytest.fixture
def halves():
    """Grey noise, and a bright red square on the left or the right side."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(90, 160, size=(24, 64, 64, 3), dtype=np.uint8)
    has_square = np.arange(24) % 3 > 0
    on_the_right = np.arange(24) % 3 == 2
    for picture, is_there, right in zip(
        pictures, has_square, on_the_right, strict=True
    ):
        if is_there:
            left = 40 if right else 4
            picture[22:42, left : left + 20] = (250, 20, 20)
    return pictures, has_square.astype(int), on_the_right


def test_a_linear_classifier_sees_a_thing_where_it_is(halves):
    pictures, labels, on_the_right = halves
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block3", image_size=64)
    pipeline.fit(pictures, labels)

    found = class_activation(pipeline, pictures[labels == 1])

    sides = found.maps[:, :, :32].sum(axis=(1, 2)), found.maps[:, :, 32:].sum((1, 2))
    is_right = on_the_right[labels == 1]
    assert found.maps.shape == (16, 64, 64)
    assert ((sides[1] > sides[0]) == is_right).all()
    assert_allclose(found.maps.min(), 0, atol=1e-6)
    assert found.maps.max() <= 1


def test_for_averaged_features_maps_are_weighed_by_coefficients(halves):
    """Zhou et al. 2016: the class activation map of a network that ends so."""
    pictures, labels, _ = halves
    pipeline = make_feature_pipeline(
        "tiny", "softmax", layer="block3", image_size=64, precision="float32"
    ).fit(pictures, labels)
    scaler, linear = (step for _, step in pipeline.steps[1:])
    maps = CNNFeatureTransformer(
        "tiny", layer="block3", pooling="flatten", image_size=64, precision="float32"
    ).fit_transform(pictures[:3])
    coefficients = linear.coef_[0] / scaler.scale_
    maps = maps.reshape(3, 192, 8, 8)
    expected = np.einsum("c,nchw->nhw", coefficients, maps).clip(min=0)
    expected /= expected.max(axis=(1, 2), keepdims=True)

    found = class_activation(pipeline, pictures[:3], np.ones(3, dtype=int))

    shown = torch.nn.functional.interpolate(
        torch.from_numpy(expected)[:, None], (64, 64), mode="bilinear"
    )[:, 0]
    assert_allclose(found.maps, shown, atol=1e-4)


def test_tuned_and_pretrained_networks_have_maps_too(halves, digits):
    pictures, labels, _ = halves
    tuned = classifier(image_shape=None, conv_channels=(8,)).fit(pictures, labels)
    as_is = PretrainedCNNClassifier("tiny").fit(pictures)
    mapped = PretrainedCNNClassifier("tiny", class_map="learn").fit(pictures, labels)

    for estimator, size in ((tuned, 32), (as_is, 80), (mapped, 80)):
        found = class_activation(estimator, pictures[:2])
        assert found.maps.shape == (2, size, size)
        assert found.pictures.shape == (2, size, size, 3)
        assert np.isfinite(found.maps).all()
        assert list(found.labels) == list(estimator.predict(pictures[:2]))


def test_what_has_no_map_is_refused(halves):
    pictures, labels, _ = halves
    forest = make_pipeline(CNNFeatureTransformer("tiny"), RandomForestClassifier(3))
    forest.fit(pictures, labels)
    vectors = make_feature_pipeline("alexnet", weights=None, layer="fc7", image_size=64)
    vectors.set_params(feat__random_state=0).fit(pictures[:6], labels[:6])

    with pytest.raises(ValueError, match="RandomForestClassifier is not a linear"):
        class_activation(forest, pictures)
    with pytest.raises(ValueError, match="there is no map but a vector of 4096"):
        class_activation(vectors, pictures[:2])
    with pytest.raises(ValueError, match="neither a classifier of skltl"):
        class_activation(RandomForestClassifier().fit([[0], [1]], [0, 1]), pictures)


def test_labels_that_are_no_classes_are_refused(halves):
    pictures, labels, _ = halves
    names = np.array(["cup", "key"])[labels]
    pipeline = make_feature_pipeline("tiny", "svm", image_size=64).fit(pictures, names)

    assert (
        class_activation(pipeline, pictures[:2], "key").labels.tolist() == ["key"] * 2
    )
    for wrong in (["cup", "keys"], [0, 1]):
        with pytest.raises(ValueError, match="is none of the classes"):
            class_activation(pipeline, pictures[:2], wrong)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        class_activation(pipeline, pictures[:2], ["cup"])

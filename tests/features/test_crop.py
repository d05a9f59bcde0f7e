"""The treatment of images of other proportions than the network's input."""

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    PretrainedCNNClassifier,
    make_feature_pipeline,
)


@pytest.fixture
def long_image():
    """An image of 120 x 40 pixels with noise; its ends have other colors."""
    pixels = np.random.default_rng(0).integers(100, 150, (40, 120, 3), dtype=np.uint8)
    pixels[:, :30], pixels[:, 90:] = (250, 0, 0), (0, 0, 250)
    return Image.fromarray(pixels)


def features(image, **params):
    return CNNFeatureTransformer("tiny", image_size=32, **params).fit_transform([image])


def by_hand(image, crop):
    """Resize an image to 32 x 32 pixels with Pillow."""
    if crop == "squash":
        return image.resize((32, 32), Image.Resampling.BILINEAR)
    mean = tuple(round(255 * value) for value in (0.485, 0.456, 0.406))
    canvas = Image.new("RGB", (32, 32), mean)
    canvas.paste(image.resize((32, 11), Image.Resampling.BILINEAR), (0, 10))
    return canvas


@pytest.mark.parametrize("crop", ["squash", "pad"])
def test_the_whole_image_is_used(long_image, crop):
    expected = features(by_hand(long_image, crop))

    np.testing.assert_array_equal(features(long_image, crop=crop), expected)


def test_the_center_is_the_usual_crop_of_tiny(long_image):
    resized = long_image.resize((96, 32), Image.Resampling.BILINEAR)
    expected = features(resized.crop((32, 0, 64, 32)))

    np.testing.assert_array_equal(features(long_image, crop="center"), expected)
    np.testing.assert_array_equal(features(long_image), expected)


def test_the_crop_is_fixed_by_fit(long_image):
    transformer = CNNFeatureTransformer("tiny", image_size=32, crop="pad")
    expected = transformer.fit_transform([long_image])

    np.testing.assert_array_equal(
        transformer.set_params(crop="squash").transform([long_image]), expected
    )
    again = clone(transformer).fit_transform([long_image])
    assert not np.array_equal(again, expected)


@pytest.mark.parametrize("estimator", [FineTunedCNNClassifier, PretrainedCNNClassifier])
def test_classifiers_have_the_same_crop(images, long_image, estimator):
    model = estimator("tiny", image_size=32, crop="squash", random_state=0)
    if estimator is FineTunedCNNClassifier:
        model.set_params(head_epochs=1, finetune_epochs=0)
    model.fit([Image.fromarray(image) for image in images], np.arange(9) % 2)

    np.testing.assert_array_equal(
        model.decision_function([long_image]),
        model.decision_function([by_hand(long_image, "squash")]),
    )


def test_a_pipeline_becomes_a_classifier_with_its_crop(images, long_image):
    pipeline = make_feature_pipeline("tiny", "softmax", image_size=32, crop="pad")
    pipeline.fit([Image.fromarray(image) for image in images], np.arange(9) % 2)

    made = FineTunedCNNClassifier.from_pipeline(pipeline)

    assert made.crop == "pad"
    np.testing.assert_allclose(
        made.predict_proba([long_image]),
        pipeline.predict_proba([long_image]),
        atol=1e-4,
    )


def test_unknown_crops_are_refused(long_image):
    with pytest.raises(ValueError, match="'crop' parameter of CNNFeatureTransformer"):
        features(long_image, crop="border")

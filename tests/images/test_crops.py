"""Crops of images for programs that run exported models."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from skltl import CNNFeatureTransformer, Preprocessing, crop_images
from skltl.exceptions import ImageReadError


def test_crops_are_the_input_of_the_network(image_files):
    preprocessing = Preprocessing(32, resize_size=36)
    crops = crop_images(image_files, preprocessing)
    assert crops.shape == (9, 32, 32, 3)
    assert crops.dtype == np.uint8
    for path, crop in zip(image_files, crops, strict=True):
        resized = Image.open(path).resize((43, 36), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(crop, np.asarray(resized.crop((6, 2, 38, 34))))


def test_features_of_crops_are_those_of_images(images):
    transformer = CNNFeatureTransformer("tiny", layer="block1").fit(images)
    crops = crop_images(images, transformer.preprocessing_, n_jobs=2)
    np.testing.assert_array_equal(
        transformer.transform(crops), transformer.transform(images)
    )


def test_other_values_are_floats(images, digits):
    preprocessing = Preprocessing(16)
    mixed = [images[0], images[1] / np.float64(255)]
    crops = crop_images(mixed, preprocessing)
    assert crops.dtype == np.float32
    first = crop_images(images[:1], preprocessing)
    np.testing.assert_allclose(crops[0], first[0] / np.float32(255))
    rows = crop_images(digits[0][:2], Preprocessing(8), image_shape=(8, 8))
    np.testing.assert_allclose(rows[..., 1], digits[0][:2].reshape(2, 8, 8), atol=1e-6)
    scaled = crop_images(
        [np.full((8, 8), 4095, np.uint16)], Preprocessing(8), value_range=(0, 4095)
    )
    assert scaled.min() == 1
    read = crop_images(["first"], preprocessing, reader={"first": images[0]}.get)
    np.testing.assert_array_equal(read, first)


def test_errors_name_the_image(images):
    with pytest.raises(ImageReadError, match=r"missing\.png"):
        crop_images(["missing.png"], Preprocessing(8))
    with pytest.raises(TypeError, match=r"must be a skltl\.Preprocessing, got int"):
        crop_images(images, 8)
    with pytest.raises(ValueError, match="5 of them|takes images of 5"):
        crop_images(images, Preprocessing(8, mean=(0.5,) * 5, std=(1,) * 5))


def test_neither_torch_nor_sklearn_is_needed(image_files):
    code = """
    import sys

    for name in ("torch", "torchvision", "sklearn", "scipy", "joblib", "tqdm"):
        sys.modules[name] = None  # an import raises ImportError
    from skltl import Preprocessing, crop_images
    from skltl.exceptions import ImageReadError

    encoded = open(sys.argv[1], "rb").read()
    assert crop_images([encoded], Preprocessing(8)).shape == (1, 8, 8, 3)
    assert crop_images(sys.argv[1:], Preprocessing(8)).shape == (1, 8, 8, 3)
    try:
        crop_images([encoded[:100]], Preprocessing(8))
    except ImageReadError:
        print("refused")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), image_files[0]],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "refused\n", done.stderr

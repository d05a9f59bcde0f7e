"""Preprocessing gives what torchvision's own transforms give."""

import numpy as np
import pytest
import torch
import torchvision.models as models
from PIL import Image
from torchvision.transforms import functional

from skltl import Preprocessing
from skltl.images import iter_batches, iter_crops, normalize, read_images
from skltl.networks import get_backbone

SIZES = [(500, 375), (375, 500), (224, 224), (90, 60), (301, 17), (1, 1)]


def prepared(items, preprocessing):
    """Return the input of a network for some images."""
    n = len(items)
    crops = iter_crops(read_images(items), range(n), preprocessing, n, n_threads=2)
    (batch,) = iter_batches(crops, n)
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return normalize(pixels, mean, std)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "convnext_tiny"])
def test_the_input_is_that_of_torchvisions_preset(name, size):
    noise = np.random.default_rng(0).integers(256, size=(*size[::-1], 3))
    image = Image.fromarray(noise.astype(np.uint8))
    weights = models.get_model_weights(name).IMAGENET1K_V1

    ours = prepared([image], get_backbone(name).preprocessing)[0]

    torch.testing.assert_close(ours, weights.transforms()(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_floats_are_resized_like_8_bit_images(images, dtype):
    preprocessing = Preprocessing(24, resize_size=30)
    scale = 257 if dtype is np.uint16 else 1 / 255
    finer = (images.astype(float) * scale).astype(dtype)

    # Pillow rounds bytes after each of its two passes, by half a step of 1/255 each
    # time, and its weights for bytes are fixed-point values.
    step = 1.01 / 255 / min(preprocessing.std)
    torch.testing.assert_close(
        prepared(finer, preprocessing),
        prepared(images, preprocessing),
        rtol=0,
        atol=step,
    )


def test_an_image_is_the_same_beside_floats(images):
    preprocessing = Preprocessing(24)

    alone = prepared([images[0]], preprocessing)
    beside = prepared([images[0], images[1] / 255], preprocessing)

    assert torch.equal(alone[0], beside[0])


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (2, 60_000)])
def test_very_long_images_give_their_center(shape):
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    image = np.broadcast_to(ramp.reshape(-1, 1) if shape[1] == 1 else ramp, shape)

    crop = Preprocessing(32, resize_size=256).crop(read_images([image])[0])

    assert crop.shape == (32, 32, 3)
    np.testing.assert_allclose(crop, 127, atol=2)


def test_resized_to_keeps_the_fraction_that_is_cropped():
    small = Preprocessing(224, resize_size=256).resized_to(112)

    assert (small.crop_size, small.shorter_side) == (112, 128)


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop_size": 0},
        {"crop_size": 8, "resize_size": 0},
        {"crop_size": (8, 8, 3)},
        {"crop_size": (8, 0)},
        {"crop_size": True},
        {"crop_size": 8, "interpolation": "best"},
        {"crop_size": 8, "mode": "border"},
    ],
)
def test_invalid_settings_are_refused(arguments):
    words = "pixels, at least 1|Unknown interpolation|Unknown mode"
    with pytest.raises(ValueError, match=words):
        Preprocessing(**arguments)


def by_hand(image, preprocessing):
    """Resize and crop with torchvision, which pads with black."""
    resized = functional.resize(image, preprocessing.shorter_side)
    return np.asarray(functional.center_crop(resized, preprocessing.crop_size))


@pytest.mark.parametrize("size", [(5, 5), (40, 61), (61, 40), (37, 300), (300, 37)])
@pytest.mark.parametrize(
    ("crop_size", "resize_size"), [(43, 40), (40, 37), (41, 40), (64, 9), (9, 64)]
)
def test_crops_larger_than_the_image_are_padded_as_by_torchvision(
    size, crop_size, resize_size
):
    noise = np.random.default_rng(0).integers(256, size=(*size[::-1], 3))
    image = Image.fromarray(noise.astype(np.uint8))
    preprocessing = Preprocessing(crop_size, resize_size=resize_size)

    crop = preprocessing.crop(image)

    np.testing.assert_array_equal(crop, by_hand(image, preprocessing))


def squashed(image, size):
    return functional.resize(image, list(size))


def padded(image, size, border):
    """Resize to fit inside of a size (height, width), in the middle of a border."""
    ratio = max(image.height / size[0], image.width / size[1])
    inner = round(image.height / ratio), round(image.width / ratio)
    canvas = np.full((*size, 3), border, np.asarray(image).dtype)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    pixels = np.asarray(functional.resize(image, list(inner)))
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    canvas[top : top + inner[0], left : left + inner[1]] = pixels
    return canvas


MEAN = (0.5, 0.25, 0.75)
BORDERS = {"RGB": (128, 64, 191), "L": (128, 64, 191), "F": MEAN}


@pytest.mark.parametrize("mode", BORDERS)
@pytest.mark.parametrize("size", [(61, 40), (37, 300), (20, 20), (1, 200)])
@pytest.mark.parametrize("crop_size", [32, (24, 40)], ids=str)
def test_nothing_of_an_image_is_lost_if_it_is_squashed_or_padded(mode, size, crop_size):
    noise = np.random.default_rng(0).integers(256, size=(*size[::-1], 3))
    image = Image.fromarray(noise.astype(np.uint8)).convert(mode)
    settings = {"crop_size": crop_size, "mean": MEAN}
    sides = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size

    squash = Preprocessing(**settings, mode="squash").crop(image)
    pad = Preprocessing(**settings, mode="pad").crop(image)

    expected = np.asarray(squashed(image, sides))
    expected = expected if mode == "RGB" else np.stack([expected] * 3, axis=2)
    np.testing.assert_array_equal(squash, expected)
    if min(size) > 1:  # torchvision resizes to no less than a pixel
        np.testing.assert_array_equal(pad, padded(image, sides, BORDERS[mode]))
    assert pad.shape == (*sides, 3)


def test_a_crop_that_is_not_square_fills_its_size():
    """As timm resizes: the smaller of the two ratios, rounded."""
    noise = np.random.default_rng(0).integers(256, size=(61, 40, 3))
    image = Image.fromarray(noise.astype(np.uint8))
    preprocessing = Preprocessing((30, 24), resize_size=(35, 28))

    crop = preprocessing.crop(image)

    resized = functional.resize(image, [round(61 / (40 / 28)), 28])
    np.testing.assert_array_equal(crop, functional.center_crop(resized, [30, 24]))
    assert preprocessing.size == (30, 24)
    assert preprocessing.resized_to((60, 48)).resize_size == (70, 56)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "F"])
@pytest.mark.parametrize("size", [(61, 40), (37, 300)])
def test_every_mode_of_decoded_images_is_cropped_as_rgb(mode, size):
    noise = np.random.default_rng(0).integers(256, size=(*size[::-1], 3))
    image = Image.fromarray(noise.astype(np.uint8)).convert(mode)
    preprocessing = Preprocessing(32, resize_size=40)

    crop = preprocessing.crop(image)

    if mode == "F":
        resized = functional.resize(image, preprocessing.shorter_side)
        box = functional.center_crop(resized, preprocessing.crop_size)
        expected = np.stack([np.asarray(box)] * 3, axis=2)
    else:
        expected = by_hand(image.convert("RGB"), preprocessing)
    np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("shape", [(100_000, 1), (1, 100_000), (80_000, 2)])
def test_a_crop_larger_than_a_very_long_image_takes_little_memory(shape, monkeypatch):
    """Resizing the whole image would make 256 x 25,600,000 pixels: 19.7 GB."""
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    gray = np.broadcast_to(ramp.reshape(-1, 1) if shape[1] < 3 else ramp, shape)
    image = Image.fromarray(np.ascontiguousarray(gray)).convert("RGB")
    sizes = []
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)

    crop = Preprocessing(300, resize_size=256).crop(image)

    assert max(width * height for width, height in sizes) <= 300 * 300
    is_long = (slice(None), slice(22, 278)) if shape[0] > 2 else slice(22, 278)
    np.testing.assert_allclose(crop[is_long], 127, atol=2)
    assert crop.sum() == crop[is_long].sum()  # and black beside it


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resizing_only_the_region_of_the_crop_gives_the_same_pixels(mode, monkeypatch):
    """Up to rounding, where both can be computed."""
    noise = np.random.default_rng(0).integers(256, size=(30, 700, 3))
    image = Image.fromarray(noise.astype(np.uint8)).convert(mode)
    preprocessing = Preprocessing(50, resize_size=44)
    whole = preprocessing.crop(image).astype(int)

    monkeypatch.setattr("skltl.images._preprocessing._MAX_RESIZED_PIXELS", 0)
    region = preprocessing.crop(image)

    np.testing.assert_allclose(region, whole, atol=1)

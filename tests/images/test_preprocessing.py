"""Pictures reach the network as torchvision's own transforms would bring them."""

import numpy as np
import pytest
import torch
import torchvision.models as models
from PIL import Image

from skltl import Preprocessing
from skltl.backbones import get_backbone
from skltl.images import iter_batches, iter_crops, normalise, read_images

SIZES = [(500, 375), (375, 500), (224, 224), (90, 60), (301, 17), (1, 1)]


def prepared(items, preprocessing):
    """All the way to the network's input, as the package does it."""
    n = len(items)
    crops = iter_crops(read_images(items), range(n), preprocessing, n, n_threads=2)
    (batch,) = iter_batches(crops, n)
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return normalise(pixels, mean, std)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "convnext_tiny"])
def test_equal_to_torchvision(name, size):
    noise = np.random.default_rng(0).integers(256, size=(*size[::-1], 3))
    picture = Image.fromarray(noise.astype(np.uint8))
    weights = models.get_model_weights(name).IMAGENET1K_V1

    ours = prepared([picture], get_backbone(name).preprocessing)[0]

    torch.testing.assert_close(ours, weights.transforms()(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_floats_are_resized_like_bytes(pictures, dtype):
    preprocessing = Preprocessing(24, resize_size=30)
    scale = 257 if dtype is np.uint16 else 1 / 255
    finer = (pictures.astype(float) * scale).astype(dtype)

    # Pillow rounds bytes after each of its two passes, half a step of 1/255 each time,
    # and its weights for bytes are fixed-point numbers.
    step = 1.01 / 255 / min(preprocessing.std)
    torch.testing.assert_close(
        prepared(finer, preprocessing),
        prepared(pictures, preprocessing),
        rtol=0,
        atol=step,
    )


def test_a_picture_is_the_same_beside_floats(pictures):
    preprocessing = Preprocessing(24)

    alone = prepared([pictures[0]], preprocessing)
    beside = prepared([pictures[0], pictures[1] / 255], preprocessing)

    assert torch.equal(alone[0], beside[0])


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (2, 60_000)])
def test_very_long_pictures_give_their_middle(shape):
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    picture = np.broadcast_to(ramp.reshape(-1, 1) if shape[1] == 1 else ramp, shape)

    crop = Preprocessing(32, resize_size=256).crop(read_images([picture])[0])

    assert crop.shape == (32, 32, 3)
    np.testing.assert_allclose(crop, 127, atol=2)


def test_image_size_keeps_the_share_that_is_cropped():
    small = Preprocessing(224, resize_size=256).resized_to(112)

    assert (small.crop_size, small.shorter_side) == (112, 128)


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop_size": 0},
        {"crop_size": 8, "resize_size": 0},
        {"crop_size": 8, "interpolation": "best"},
    ],
)
def test_impossible_preprocessing_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1 pixel|Unknown interpolation"):
        Preprocessing(**arguments)

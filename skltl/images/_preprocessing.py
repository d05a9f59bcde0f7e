"""Resize, crop and normalize images as for the pretraining of a network.

The arithmetic is that of torchvision's ``ImageClassification`` preset on a PIL image:
resize the shorter side, crop the center, scale to [0, 1], normalize each channel. The
first two steps run per image in the decoding threads and keep 8-bit images 8-bit; the
last two run on whole batches, on the network's device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl.exceptions import shorten
from skltl.images._decode import Decoded, Pixels

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# torchvision resizes the whole image before the crop, which would make 256 x 25,600,000
# pixels of 1 x 100,000. Above this limit only the region of the crop is resized (equal
# up to rounding).
_MAX_RESIZED_PIXELS = 2**24


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, cropping and normalization of images for a network.

    Parameters
    ----------
    crop_size : int
        Height and width of the network's input, in pixels.
    resize_size : int or None, default=None
        Length of the image's shorter side before the center is cropped, in pixels. If
        ``None``, it is `crop_size`: nothing is cropped from a square image.
    interpolation : {"bilinear", "bicubic", "nearest"}, default="bilinear"
        Resampling filter of Pillow.
    mean : tuple of 3 floats, default=(0.485, 0.456, 0.406)
        Mean of each channel (red, green, blue) that is subtracted, in units of [0, 1].
        The default is that of ImageNet, which torchvision's weights use.
    std : tuple of 3 floats, default=(0.229, 0.224, 0.225)
        Standard deviation by which each channel is divided, in units of [0, 1].

    Examples
    --------
    >>> from skltl import Preprocessing
    >>> Preprocessing(224, resize_size=256).resized_to(112)
    Preprocessing(crop_size=112, resize_size=128, interpolation='bilinear', ...)
    """

    __module__ = "skltl"  # the path in saved files

    crop_size: int
    resize_size: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = _three_floats(name, getattr(self, name))
            object.__setattr__(self, name, values)  # the class is frozen
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}.")
        for name in ("crop_size", "resize_size"):
            size = getattr(self, name)
            is_count = isinstance(size, Integral) and not isinstance(size, bool)
            if not (is_count and size >= 1) and (name, size) != ("resize_size", None):
                raise ValueError(
                    f"{name} must be a number of pixels, at least 1; got "
                    f"{shorten(repr(size))}."
                )
        if self.interpolation not in list(INTERPOLATIONS):  # it may be unhashable
            raise ValueError(
                f"Unknown interpolation {shorten(repr(self.interpolation))}. "
                f"Known: {', '.join(INTERPOLATIONS)}."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input, in pixels."""
        return self.crop_size, self.crop_size

    @property
    def shorter_side(self) -> int:
        """Length of the image's shorter side before the crop, in pixels."""
        return self.crop_size if self.resize_size is None else self.resize_size

    def resized_to(self, crop_size: int) -> Preprocessing:
        """Return the same preprocessing for another input size.

        Parameters
        ----------
        crop_size : int
            New height and width of the network's input, in pixels.

        Returns
        -------
        Preprocessing
            Preprocessing that crops the same fraction of the image.
        """
        resize_size = round(self.shorter_side * crop_size / self.crop_size)
        return replace(self, crop_size=crop_size, resize_size=resize_size)

    def crop(self, image: Decoded) -> Pixels:
        """Resize and crop one image.

        Parameters
        ----------
        image : array of shape (h, w, 3) or PIL image
            Image of dtype uint8 or float32; or of mode RGB, RGBA (whose alpha channel
            is ignored), L or F.

        Returns
        -------
        array of shape (crop_size, crop_size, 3)
            Crop of the image's dtype; of a PIL image uint8, or float32 in mode F. Black
            outside of the image.
        """
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if isinstance(image, Image.Image) and image.mode == "RGB":
            return np.asarray(self._crop_image(image))
        # Pillow resizes floats one channel at a time only, and copies RGBA. Unlike a
        # loop variable, `map` keeps no channel while the next one is extracted.
        crops = list(map(np.asarray, map(self._crop_image, _channels(image))))
        return np.stack(crops if len(crops) == 3 else crops * 3, axis=2)

    def _crop_image(self, image: Image.Image) -> Image.Image:
        """Resize and crop all channels of a PIL image together."""
        width, height = self._resized_size(*image.size)
        left, top = self._first_pixel(width), self._first_pixel(height)
        resample = INTERPOLATIONS[self.interpolation]
        if width * height > _MAX_RESIZED_PIXELS:
            # Only the region of the crop. Outside of the image the crop is black.
            x, y = max(left, 0), max(top, 0)
            right = min(left + self.crop_size, width)
            bottom = min(top + self.crop_size, height)
            across, down = image.width / width, image.height / height
            box = (
                x * across,
                y * down,
                min(right * across, image.width),
                min(bottom * down, image.height),
            )
            resized = image.resize((right - x, bottom - y), resample, box=box)
            left, top = min(left, 0), min(top, 0)
        else:
            resized = image.resize((width, height), resample)
        return resized.crop((left, top, left + self.crop_size, top + self.crop_size))

    def _first_pixel(self, length: int) -> int:
        """Return where the crop begins, rounded as in torchvision."""
        if length < self.crop_size:
            return -((self.crop_size - length) // 2)
        return round((length - self.crop_size) / 2)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of the image before the crop."""
        short = self.shorter_side
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short


def _channels(image: Decoded) -> Iterator[Image.Image]:
    """Yield the red, green and blue channels of an image, or its only channel."""
    if isinstance(image, np.ndarray):
        yield from map(Image.fromarray, np.moveaxis(image, 2, 0))
    elif image.mode == "RGBA":
        yield from map(image.getchannel, range(3))
    else:
        yield image


def normalize(batch: Any, mean: Any, std: Any) -> Any:
    """Scale a batch (n, 3, h, w) to [0, 1] if it is 8-bit, then normalize its channels.

    `mean` and `std` are float32 tensors (3, 1, 1) on the batch's device.
    """
    # In place: on a CPU new memory costs more than the arithmetic.
    if batch.is_floating_point():
        return batch.clone().sub_(mean).div_(std)
    # Not a Python number: a GPU would multiply by 1 / 255, which rounds differently.
    white = mean.new_full((), 255)
    return batch.float().div_(white).sub_(mean).div_(std)


def as_float(pixels: Pixels) -> NDArray[np.float32]:
    """Scale 8-bit pixels to [0, 1] as `normalize` does; return floats unchanged."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(np.float32, copy=False)


def _three_floats(name: str, value: Any) -> tuple[float, float, float]:
    """Check the values of the three channels."""
    try:
        red, green, blue = map(float, value)
    except (TypeError, ValueError):
        red = green = blue = math.nan
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(
            f"{name} must be 3 finite numbers, got {shorten(repr(value))}."
        )
    return red, green, blue

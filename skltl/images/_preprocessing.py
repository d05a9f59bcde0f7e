"""Resize, crop and normalize images as for the pretraining of a network.

The arithmetic is that of torchvision's ``ImageClassification`` preset on a PIL image:
resize the shorter side, crop the center, scale to [0, 1], normalize each channel. The
first two steps run per image in the decoding threads and keep 8-bit images 8-bit; the
last two run on whole batches, on the network's device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl.exceptions import shorten
from skltl.images._channels import RGB
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


MODES = ("center", "squash", "pad")

# Where crops are: fractions of the margins above and left of them. The corners follow
# the center.
CENTER = (0.5, 0.5)
PLACES = (CENTER, (0, 0), (0, 1), (1, 0), (1, 1))

# Corners are cropped from an image that is at least this much larger: 256 / 224 pixels.
MIN_MARGIN = Fraction(8, 7)

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, cropping and normalization of images for a network.

    Parameters
    ----------
    crop_size : int or tuple of 2 ints
        Height and width of the network's input, in pixels. An int is both.
    resize_size : int, tuple of 2 ints or None, default=None
        Size of the image before the center is cropped, in pixels: an int is height and
        width, and `mode` says how an image of other proportions is resized. ``None`` is
        `crop_size`: nothing is cropped from an image of its proportions.
    interpolation : {"bilinear", "bicubic", "nearest"}, default="bilinear"
        Resampling filter of Pillow.
    mean : tuple of floats, default=(0.485, 0.456, 0.406)
        Mean of each channel that is subtracted, in units of [0, 1]. Their number is the
        number of channels of the network's input. The default is that of ImageNet (red,
        green, blue), which torchvision's weights use.
    std : tuple of floats, default=(0.229, 0.224, 0.225)
        Standard deviation by which each channel is divided, in units of [0, 1].
    mode : {"center", "squash", "pad"}, default="center"
        Treatment of images of other proportions: ``"center"`` fills `resize_size`
        and loses the ends of the longer side, ``"squash"`` changes the proportions, and
        ``"pad"`` keeps the whole image and adds a border of the color `mean`.

    Examples
    --------
    >>> from skltl import Preprocessing
    >>> Preprocessing(224, resize_size=256).resized_to(112)
    Preprocessing(crop_size=112, resize_size=128, interpolation='bilinear', ...)
    """

    __module__ = "skltl"  # the path in saved files

    crop_size: Size
    resize_size: Size | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = _floats(name, getattr(self, name))
            object.__setattr__(self, name, values)  # the class is frozen
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}: expected "
                "one of each per channel."
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}.")
        for name in ("crop_size", "resize_size"):
            size = getattr(self, name)
            if (name, size) != ("resize_size", None):
                object.__setattr__(self, name, _checked_size(name, size))
        for name, known in (("interpolation", INTERPOLATIONS), ("mode", MODES)):
            value = getattr(self, name)
            if value not in list(known):  # it may be unhashable
                raise ValueError(
                    f"Unknown {name} {shorten(repr(value))}. Known: {', '.join(known)}."
                )

    @property
    def n_channels(self) -> int:
        """Number of channels of the network's input."""
        return len(self.mean)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input, in pixels."""
        return _both(self.crop_size)

    @property
    def size_before_crop(self) -> tuple[int, int]:
        """Height and width to which images are resized, in pixels."""
        return self.size if self.resize_size is None else _both(self.resize_size)

    @property
    def shorter_side(self) -> int:
        """Length of the image's shorter side before the crop, in pixels."""
        return min(self.size_before_crop)

    def resized_to(self, crop_size: Size) -> Preprocessing:
        """Return the same preprocessing for another input size.

        Parameters
        ----------
        crop_size : int or tuple of 2 ints
            New height and width of the network's input, in pixels.

        Returns
        -------
        Preprocessing
            Preprocessing that crops the same fraction of the image.
        """
        crop_size = _checked_size("crop_size", crop_size)
        height, width = (
            round(resized * new / old)
            for resized, new, old in zip(
                self.size_before_crop, _both(crop_size), self.size, strict=True
            )
        )
        resize_size = height if height == width else (height, width)
        return replace(self, crop_size=crop_size, resize_size=resize_size)

    def crops(self, image: Decoded, n_crops: int) -> Pixels:
        """Resize one image, and crop it at the center and the corners.

        Parameters
        ----------
        image : array of shape (h, w, n_channels) or PIL image
            As in `crop`.
        n_crops : {1, 5}
            The center, or also the four corners.

        Returns
        -------
        array of shape (height, width, n_channels), or (5, height, width, n_channels)
            The crops. If the image is not at least 8/7 of their size, those of the
            corners are of a larger one. In mode "pad", corners on the border of an
            image are those of the image.
        """
        if n_crops == 1:
            return self.crop(image)
        larger = replace(self, resize_size=self.size_for_crops(n_crops))
        corners = [larger.crop(image, place) for place in PLACES[1:n_crops]]
        crops: Any = np.stack([self.crop(image), *corners])
        return crops  # type: ignore[no-any-return]

    def size_for_crops(self, n_crops: int) -> tuple[int, int]:
        """Return the height and width to which images are resized, at the most.

        Parameters
        ----------
        n_crops : {1, 5}
            Number of crops, see `crops`.

        Returns
        -------
        tuple of 2 ints
            Height and width, in pixels.
        """
        if n_crops == 1:
            return self.size_before_crop
        least = (math.ceil(MIN_MARGIN * side) for side in self.size)
        height, width = map(max, self.size_before_crop, least)
        return height, width

    def crop(self, image: Decoded, place: tuple[float, float] = CENTER) -> Pixels:
        """Resize and crop one image.

        Parameters
        ----------
        image : array of shape (h, w, n_channels) or PIL image
            Image of dtype uint8 or float32; or of mode RGB, RGBA (whose alpha channel
            is ignored), L or F.
        place : tuple of 2 floats, default=(0.5, 0.5)
            Place of the crop, in [0, 1], from top to bottom and from left to right.

        Returns
        -------
        array of shape (height, width, n_channels)
            Crop of the image's dtype; of a PIL image uint8, or float32 in mode F.
            Outside of the image it is black, or has the color `mean` in mode "pad".
        """
        is_rgb = (
            self.n_channels == RGB
        )  # of which Pillow resizes three channels at once
        if is_rgb and isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if isinstance(image, Image.Image) and image.mode == "RGB":
            return np.asarray(self._crop_image(image, self._border(image.mode), place))
        # Pillow resizes floats one channel at a time only, and copies RGBA. Unlike a
        # loop variable, `map` keeps no channel while the next one is extracted.
        is_gray = isinstance(image, Image.Image) and image.mode in ("L", "F")
        is_repeated = is_gray and self.mode == "pad"  # its border has a color
        n_channels = self.n_channels
        channels = _channels(image, n_channels if is_repeated else 1)
        borders = map(self._border, itertools.repeat("channel"), range(n_channels))
        places = itertools.repeat(place)
        crops = list(map(np.asarray, map(self._crop_image, channels, borders, places)))
        return np.stack(crops * (n_channels // len(crops)), axis=2)

    def _border(self, mode: str, channel: int = 0) -> tuple[float, ...] | float:
        """Return the color outside of an image, in [0, 1]; of a channel, a number."""
        color = self.mean if self.mode == "pad" else (0.0,) * self.n_channels
        return color if mode == "RGB" else color[channel]

    def _crop_image(
        self, image: Image.Image, border: Any, place: tuple[float, float]
    ) -> Image.Image:
        """Resize and crop all channels of a PIL image together."""
        (crop_height, crop_width) = self.size
        width, height = self._resized_size(*image.size)
        top = _first_pixel(height, crop_height, place[0])
        left = _first_pixel(width, crop_width, place[1])
        resample = INTERPOLATIONS[self.interpolation]
        if width * height > _MAX_RESIZED_PIXELS:
            # Only the region of the crop. Outside of the image the crop is black.
            x, y = max(left, 0), max(top, 0)
            right = min(left + crop_width, width)
            bottom = min(top + crop_height, height)
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
        if self.mode != "pad" or (left >= 0 and top >= 0):
            return resized.crop((left, top, left + crop_width, top + crop_height))
        return _on_border(resized, (crop_width, crop_height), (left, top), border)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height of the image before the crop."""
        new_height, new_width = self.size_before_crop
        if self.mode == "squash":
            return new_width, new_height
        if self.mode == "center" and new_height == new_width:  # as torchvision rounds
            if width <= height:
                return new_width, int(new_width * height / width)
            return int(new_height * width / height), new_height
        ratios = height / new_height, width / new_width
        ratio = max(ratios) if self.mode == "pad" else min(ratios)  # as timm rounds
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def _first_pixel(length: int, crop_length: int, place: float) -> int:
    """Return where the crop begins, rounded as in torchvision."""
    if length < crop_length:
        return -((crop_length - length) // 2)
    return round((length - crop_length) * place)


def _on_border(
    image: Image.Image, size: tuple[int, int], start: tuple[int, int], border: Any
) -> Image.Image:
    """Return a crop of an image that is smaller than the crop, with a border."""
    if image.mode == "RGB":
        border = tuple(round(255 * value) for value in border)
    elif image.mode == "L":
        border = round(255 * border)
    canvas = Image.new(image.mode, size, border)
    left, top = (max(value, 0) for value in start)
    inside = image.crop(
        (left, top, min(left + size[0], image.width), min(top + size[1], image.height))
    )
    canvas.paste(inside, (max(-start[0], 0), max(-start[1], 0)))
    return canvas


def _channels(image: Decoded, n_repeats: int = 1) -> Iterator[Image.Image]:
    """Yield the channels of an image, without alpha, or its only channel.

    The only channel is repeated.
    """
    if isinstance(image, np.ndarray):
        yield from map(Image.fromarray, np.moveaxis(image, 2, 0))
    elif image.mode == "RGBA":
        yield from map(image.getchannel, range(3))
    else:
        yield from itertools.repeat(image, n_repeats)


def normalize(batch: Any, mean: Any, std: Any) -> Any:
    """Scale a batch (n, c, h, w) to [0, 1] if it is 8-bit, then normalize its channels.

    `mean` and `std` are float32 tensors (c, 1, 1) on the batch's device.
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


def _floats(name: str, value: Any) -> tuple[float, ...]:
    """Check the values of the channels."""
    try:
        values = tuple(map(float, value))
    except (TypeError, ValueError):
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(
            f"{name} must be a finite number per channel, got {shorten(repr(value))}."
        )
    return values


def _both(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return size if isinstance(size, tuple) else (size, size)


def _checked_size(name: str, size: Any) -> Size:
    """Return a size in pixels as an int or a tuple; refuse anything else."""
    is_pair = isinstance(size, (tuple, list))
    sides: Any = size if is_pair else (size,)
    is_count = [
        isinstance(one, Integral) and not isinstance(one, bool) for one in sides
    ]
    if len(sides) != (2 if is_pair else 1) or not all(is_count) or min(sides) < 1:
        raise ValueError(
            f"{name} must be a number of pixels, at least 1, or height and width; got "
            f"{shorten(repr(size))}."
        )
    first, last = int(sides[0]), int(sides[-1])
    return first if first == last else (first, last)  # equal sizes are equal keys

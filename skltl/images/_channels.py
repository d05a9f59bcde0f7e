"""Channels: how many an image may have, and which axis of an array holds them."""

from __future__ import annotations

from collections.abc import Mapping

from skltl.exceptions import shorten

RGB = 3

# Gray images are repeated for RGB, RGBA images composited on white.
RGB_COUNTS = (1, 3, 4)


def channel_counts(n_channels: int) -> tuple[int, ...]:
    """Return the numbers of channels of images for a network that takes `n_channels`.

    RGB images are converted to gray; of more channels than three, or of two, nothing is
    known that could replace them.
    """
    return RGB_COUNTS if n_channels in (1, RGB) else (n_channels,)


def expected_channels(n_channels: int) -> str:
    """Describe `channel_counts` for messages."""
    if n_channels in (1, RGB):
        return "1 (gray), 3 (RGB) or 4 (RGBA) of them, last or first"
    return f"{n_channels} of them, as the network takes, last or first"


def fault_of_shape(shape: tuple[int, ...], n_channels: int) -> str:
    """Return why an array of this shape is no image, or "" if it may be one."""
    if len(shape) not in (2, 3):
        found = shorten(str(shape))
        return f"its shape is {found}; expected (h, w) or (h, w, channels)"
    if 0 in shape:
        return f"it is empty: its shape is {shorten(str(shape))}"
    is_gray = len(shape) == 2 and 1 in channel_counts(n_channels)
    if is_gray or may_have_channels(shape, n_channels):
        return ""
    return (
        f"no axis of its shape {shorten(str(shape))} can be the channels; expected "
        f"{expected_channels(n_channels)}"
    )


def may_have_channels(shape: tuple[int, ...], n_channels: int) -> bool:
    """Return whether the first or last of three axes can be the channels."""
    counts = channel_counts(n_channels)
    return len(shape) == 3 and (shape[0] in counts or shape[2] in counts)


def has_channels_first(
    shapes: Mapping[int, tuple[int, ...]],
    prefers_first: bool,
    n_channels: int,
    is_strict: bool = True,
) -> bool:
    """Decide which axis holds the channels, for all images together.

    `shapes` are those of images by index. If no axis fits all of them, that is an error
    or, unless `is_strict`, the axis that fits more of them is chosen.
    """
    counts = channel_counts(n_channels)
    shapes = {index: shape for index, shape in shapes.items() if len(shape) == 3}
    n_first = sum(shape[0] in counts for shape in shapes.values())
    n_last = sum(shape[2] in counts for shape in shapes.values())
    if is_strict and max(n_first, n_last) < len(shapes):
        raise ValueError(_no_common_axis(shapes, n_first > n_last, n_channels))
    is_first = n_first >= n_last if prefers_first else n_first > n_last
    return bool(shapes) and is_first


def _no_common_axis(
    shapes: Mapping[int, tuple[int, ...]], is_first: bool, n_channels: int
) -> str:
    """Return the message for images of which no axis is the channels in all."""
    expected = expected_channels(n_channels)
    axis, place = (0, "first") if is_first else (2, "last")
    counts = channel_counts(n_channels)
    index = next(index for index, shape in shapes.items() if shape[axis] not in counts)
    if len(shapes) == 1:
        return f"No axis of {shapes[index]} can be the channels; expected {expected}."
    return (
        f"No axis can be the channels in all images: image {index} has shape "
        f"{shapes[index]}, and in most others they are the {place} axis. Expected "
        f"{expected}, in the same way for all."
    )

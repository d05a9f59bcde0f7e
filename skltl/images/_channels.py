"""Channels: how many an image may have, and which axis of an array holds them."""

from __future__ import annotations

from collections.abc import Sequence

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
    shapes: Sequence[tuple[int, ...]], prefers_first: bool, n_channels: int
) -> bool:
    """Decide which axis holds the channels, for all images together."""
    counts = channel_counts(n_channels)
    shapes = [shape for shape in shapes if len(shape) == 3]
    if not shapes:
        return False
    can_be_first = all(shape[0] in counts for shape in shapes)
    can_be_last = all(shape[2] in counts for shape in shapes)
    if not (can_be_first or can_be_last):
        raise ValueError(
            f"No axis can be the channels in all images (shapes {shapes[0]}, ...): "
            f"expected {expected_channels(n_channels)}."
        )
    return can_be_first if prefers_first else not can_be_last

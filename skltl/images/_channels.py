"""Channels: the axis of an array that holds them."""

from __future__ import annotations

from collections.abc import Sequence

from skltl.exceptions import shorten

CHANNEL_COUNTS = (1, 3, 4)


def fault_of_shape(shape: tuple[int, ...]) -> str:
    """Return why an array of this shape is no image, or "" if it may be one."""
    if len(shape) not in (2, 3):
        found = shorten(str(shape))
        return f"its shape is {found}; expected (h, w) or (h, w, channels)"
    if 0 in shape:
        return f"it is empty: its shape is {shorten(str(shape))}"
    if len(shape) == 2 or may_have_channels(shape):
        return ""
    return (
        f"no axis of its shape {shorten(str(shape))} can be the channels; expected "
        "1 (gray), 3 (RGB) or 4 (RGBA) of them, last or first"
    )


def may_have_channels(shape: tuple[int, ...]) -> bool:
    """Return whether the first or last of three axes can be the channels."""
    return len(shape) == 3 and (
        shape[0] in CHANNEL_COUNTS or shape[2] in CHANNEL_COUNTS
    )


def has_channels_first(shapes: Sequence[tuple[int, ...]], prefers_first: bool) -> bool:
    """Decide which axis holds the channels, for all images together."""
    shapes = [shape for shape in shapes if len(shape) == 3]
    if not shapes:
        return False
    can_be_first = all(shape[0] in CHANNEL_COUNTS for shape in shapes)
    can_be_last = all(shape[2] in CHANNEL_COUNTS for shape in shapes)
    if not (can_be_first or can_be_last):
        raise ValueError(
            f"No axis can be the channels in all images (shapes {shapes[0]}, ...): "
            "expected 1 (gray), 3 (RGB) or 4 (RGBA) of them, last or first."
        )
    return can_be_first if prefers_first else not can_be_last

"""Layouts: what the axes of a block's output mean.

Networks return feature maps (n, c, h, w) or (n, h, w, c), tokens (n, t, c) or vectors
(n, d). Shapes tell which: the grid of a feature map, and that of the tokens, has the
proportions of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The axes of an output of a network, for one image.

    `shape` is (c, h, w) or (c, h * w), with `is_channels_last` (h, w, c) or (t, c), or
    else (d,). `grid` is the height and width of a feature map, or of the tokens after
    the `n_prefix` first ones; it is ``None`` for a vector, and for a shape that cannot
    be interpreted.
    `uses_class_token` says whether the network's own head uses the first token only.
    """

    shape: tuple[int, ...]
    grid: tuple[int, int] | None = None
    is_channels_last: bool = False
    n_prefix: int = 0
    uses_class_token: bool = False

    @property
    def is_vector(self) -> bool:
        """Whether the output is a vector for each image."""
        return len(self.shape) == 1

    @property
    def n_channels(self) -> int:
        """Number of channels of a feature map or of tokens, or length of a vector."""
        return self.shape[-1 if self.is_channels_last else 0]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape (c, h, w) of the output as a feature map, or (d,) of a vector."""
        return self.shape if self.grid is None else (self.n_channels, *self.grid)

    def as_map(self, output: Tensor) -> Tensor:
        """Return an output as a feature map (n, c, h, w), without prefix tokens."""
        grid = self.grid or ()
        if len(self.shape) == 2 and self.is_channels_last:
            tokens = output[:, self.n_prefix :]
            output = tokens.reshape(-1, *grid, self.n_channels)
        elif len(self.shape) == 2:
            output = output.reshape(-1, self.n_channels, *grid)
        return output.movedim(-1, 1) if self.is_channels_last else output

    def class_token(self, output: Tensor) -> Tensor:
        """Return the first token (n, c) of tokens (n, t, c)."""
        return output[:, 0]


def layout_of(
    shape: tuple[int, ...],
    image_size: tuple[int, int],
    n_prefix_tokens: int = 0,
    uses_class_token: bool = False,
    before: Layout | None = None,
) -> Layout:
    """Return the layout of an output with a shape, for images of a size.

    Where all axes of a feature map have the same length, channels are where they were
    in the output before it. A feature map whose rows are joined has its channels first.
    """
    if len(shape) == 3:
        is_first = _is_grid(shape[1:], image_size)
        is_last = _is_grid(shape[:2], image_size)
        was_last = before is not None and before.is_channels_last
        if is_last and (was_last or not is_first):
            return Layout(shape, shape[:2], is_channels_last=True)
        return Layout(shape, shape[1:])
    if len(shape) == 2:
        if before is not None and _is_flat(shape, before):
            return Layout(shape, before.grid)
        for n_prefix in dict.fromkeys((n_prefix_tokens, 0)):
            grid = _grid_of(shape[0] - n_prefix, image_size)
            if grid is not None:
                uses_first = uses_class_token and n_prefix > 0
                return Layout(shape, grid, True, n_prefix, uses_first)
    return Layout(shape)


def _is_flat(shape: tuple[int, ...], before: Layout) -> bool:
    """Return whether an output (c, h * w) is the feature map (c, h, w) before it."""
    if before.grid is None or before.is_channels_last:
        return False
    return shape == (before.n_channels, math.prod(before.grid))


def _is_grid(grid: tuple[int, ...], image_size: tuple[int, int]) -> bool:
    """Return whether a grid has the proportions of an image, up to rounding."""
    (height, width), (image_height, image_width) = grid, image_size
    return abs(height * image_width - width * image_height) < max(image_size)


def _grid_of(n: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return a grid of n tokens with the proportions of an image, if there is one."""
    height = round(math.sqrt(max(n, 0) * image_size[0] / image_size[1]))
    if height < 1 or n % height or not _is_grid((height, n // height), image_size):
        return None
    return height, n // height

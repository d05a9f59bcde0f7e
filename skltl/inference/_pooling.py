"""Pooling of feature maps to features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# Values of a feature map that are converted to float32 at once.
CHUNK = 2**20


def _avgmax(feature_map: Tensor) -> Tensor:
    averages = feature_map.mean(dim=(2, 3))
    return torch.cat([averages, feature_map.amax(dim=(2, 3))], dim=1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": partial(torch.mean, dim=(2, 3)),
    "max": partial(torch.amax, dim=(2, 3)),
    "avgmax": _avgmax,
    "flatten": partial(torch.flatten, start_dim=1),
}


def pool(feature_map: Tensor, pooling: str | int) -> Tensor:
    """Pool feature maps (n, c, h, w) to float32 features (n, d) in memory of their own.

    An integer gives the average in each cell of a grid with that number of rows and
    columns. The features of a channel are adjacent, except for "avgmax", where all
    averages come first. Vectors (n, d) are returned as features.
    """
    if feature_map.ndim == 2:
        return feature_map.float().clone()
    chunks = torch.split(feature_map, _images_per_chunk(feature_map))
    return torch.cat([_pool_chunk(chunk, pooling) for chunk in chunks])


def _images_per_chunk(feature_map: Tensor) -> int:
    """Return the number of images to pool at once, which is small on a CPU.

    The memory of a float32 copy of all of a large feature map would be new to the
    process, and to get it takes ten times as long as the arithmetic.
    """
    if feature_map.device.type != "cpu":
        return len(feature_map)
    return max(1, CHUNK // feature_map[0].numel())


def _pool_chunk(feature_map: Tensor, pooling: str | int) -> Tensor:
    # bfloat16 has 8 significant bits: sums of hundreds of values need more.
    feature_map = feature_map.float()
    if isinstance(pooling, str):
        return POOLINGS[pooling](feature_map)
    return adaptive_avg_pool2d(feature_map, int(pooling)).flatten(1)


@lru_cache(maxsize=1024)
def n_pooled(shape: tuple[int, ...], pooling: str | int) -> int:
    """Return the number of features of a feature map (c, h, w) or vector (d,)."""
    return pool(torch.empty(1, *shape, device="meta"), pooling).shape[1]


def can_pool(shape: Sequence[int], pooling: str | int) -> bool:
    """Return whether an output of this shape, for one image, can be pooled."""
    if len(shape) != 3:
        return len(shape) == 1
    return isinstance(pooling, str) or pooling <= min(shape[1:])

"""From a feature map to the features of a picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


def pool(feature_map: Tensor, pooling: str | int) -> Tensor:
    """Pool each picture's feature map to a vector.

    Parameters
    ----------
    feature_map : tensor of shape (n, c, h, w) or (n, d)
        Vectors (after a fully connected layer) are pooled already and stay as they are.
    pooling : {"avg", "max", "avgmax", "flatten"} or int
        Average or maximum of each channel, both side by side, the whole map, or
        averages over a grid of so many rows and columns.

    Returns
    -------
    tensor of shape (n, d)
        float32, in memory of its own. The features of one channel are neighbours,
        except for "avgmax": all averages come first.
    """
    # bfloat16 has 8 significant bits: sums of hundreds of numbers need more.
    feature_map = feature_map.float()
    if feature_map.ndim == 2:
        return feature_map.clone()
    if isinstance(pooling, str):
        return POOLINGS[pooling](feature_map)
    grid = adaptive_avg_pool2d(feature_map, int(pooling))  # (n, c, g, g)
    return grid.flatten(1)


def _avgmax(feature_map: Tensor) -> Tensor:
    averages = feature_map.mean(dim=(2, 3))
    return torch.cat([averages, feature_map.amax(dim=(2, 3))], dim=1)


def _flatten(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(1).clone()


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": partial(torch.mean, dim=(2, 3)),
    "max": partial(torch.amax, dim=(2, 3)),
    "avgmax": _avgmax,
    "flatten": _flatten,
}


def n_pooled(shape: tuple[int, ...], pooling: str | int) -> int:
    """Count the features `pool` makes of one feature map (c, h, w) or vector (d,)."""
    return pool(torch.empty(1, *shape, device="meta"), pooling).shape[1]

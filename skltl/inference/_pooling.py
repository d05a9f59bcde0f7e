"""From a feature map to the features of an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# Numbers of a map that are made float32 at once.
PIECE = 2**20


def pool(feature_map: Tensor, pooling: str | int) -> Tensor:
    """Pool each image's feature map to a vector.

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
    if feature_map.ndim == 2:
        return feature_map.float().clone()
    pieces = torch.split(feature_map, _images_per_piece(feature_map))
    return torch.cat([_pool_piece(piece, pooling) for piece in pieces])


def _images_per_piece(feature_map: Tensor) -> int:
    """Return how many images of a map are pooled together: on a CPU, few.

    The float32 copy of a large map as a whole comes as new pages from the operating
    system, which takes ten times as long as all of the arithmetic.
    """
    if feature_map.device.type != "cpu":
        return len(feature_map)
    return max(1, PIECE // feature_map[0].numel())


def _pool_piece(feature_map: Tensor, pooling: str | int) -> Tensor:
    # bfloat16 has 8 significant bits: sums of hundreds of numbers need more.
    feature_map = feature_map.float()
    if isinstance(pooling, str):
        return POOLINGS[pooling](feature_map)
    grid = adaptive_avg_pool2d(feature_map, int(pooling))  # (n, c, g, g)
    return grid.flatten(1)


def _avgmax(feature_map: Tensor) -> Tensor:
    averages = feature_map.mean(dim=(2, 3))
    return torch.cat([averages, feature_map.amax(dim=(2, 3))], dim=1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": partial(torch.mean, dim=(2, 3)),
    "max": partial(torch.amax, dim=(2, 3)),
    "avgmax": _avgmax,
    "flatten": partial(torch.flatten, start_dim=1),
}


@lru_cache(maxsize=1024)
def n_pooled(shape: tuple[int, ...], pooling: str | int) -> int:
    """Count the features `pool` makes of one feature map (c, h, w) or vector (d,)."""
    return pool(torch.empty(1, *shape, device="meta"), pooling).shape[1]

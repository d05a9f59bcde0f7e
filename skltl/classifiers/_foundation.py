"""The pretrained network that new layers are put on, as the parameters name it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl.backbones import (
    Backbone,
    CutPoint,
    block_shapes,
    load_prefix,
    resolve_layer,
    resolve_network,
    skeleton,
)
from skltl.exceptions import UnknownLayerError
from skltl.features import can_pool
from skltl.images import Preprocessing


@dataclass(frozen=True)
class Foundation:
    """A network up to its cut, and what pictures go through before it.

    Parameters
    ----------
    backbone : Backbone
        The record of the network.
    preprocessing : Preprocessing
        Of the pictures.
    cut_point : CutPoint
        Where the new layers begin.
    blocks : mapping of str to Module
        Up to there: frozen, and shared with others.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    cut_point: CutPoint
    blocks: Mapping[str, nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one picture's feature map (c, h, w), or vector (d,)."""
        block = self.cut_point.block
        return block_shapes(self.backbone, self.preprocessing.crop_size, (block,))[
            block
        ]

    def parts(self) -> list[tuple[str, ...]]:
        """Return the names of the blocks between neighbouring main cut points."""
        ends = {*skeleton(self.backbone).cut_points.values(), self.cut_point.block}
        parts, part = [], []
        for name in self.blocks:
            part.append(name)
            if name in ends:
                parts.append(tuple(part))
                part = []
        return parts


def lay_foundation(
    backbone: str | Backbone,
    weights: str | PathLike[str] | None,
    layer: str | int,
    image_size: int | None,
    pooling: str | int,
    seed: int,
    is_shared: bool,
) -> Foundation:
    """Load the network that the parameters of an estimator name.

    Random weights are kept for the next time if `is_shared`.

    Raises
    ------
    UnknownBackboneError, UnknownLayerError, WeightsError
        If they name something that is not there.
    ValueError
        If pictures of this size cannot cross the network, or be pooled in this way.
    """
    record, pretrained, preprocessing = resolve_network(backbone, weights, image_size)
    cut_point = resolve_layer(record, layer)
    prefix = load_prefix(record, pretrained, seed, [cut_point.block], is_shared)
    foundation = Foundation(record, preprocessing, cut_point, prefix.blocks)
    if not can_pool(foundation.shape, pooling):
        raise ValueError(
            f"pooling={pooling} does not suit what layer {cut_point.name!r} gives for "
            f"a picture, of shape {foundation.shape}."
        )
    return foundation


def count_frozen(foundation: Foundation, unfreeze: str | int | None) -> int:
    """Return how many of the blocks, from the picture on, never learn.

    Raises
    ------
    UnknownLayerError
        If `unfreeze` names no layer up to the cut.
    ValueError
        If there are not so many parts, or no batch-norms.
    """
    names = list(foundation.blocks)
    parts = foundation.parts()
    if unfreeze is None:
        return len(names)
    if unfreeze == "batch_norm":
        _check_batch_norms(foundation)
        return 0
    if unfreeze == "all":
        return 0
    if not isinstance(unfreeze, str):  # numpy's integers are no `int`
        if unfreeze > len(parts):
            raise ValueError(
                f"unfreeze={unfreeze}, but up to the layer "
                f"{foundation.cut_point.name!r} {foundation.backbone.name!r} has "
                f"{len(parts)} parts between main layers. unfreeze='all' is all."
            )
        return names.index(parts[-int(unfreeze)][0])
    block = resolve_layer(foundation.backbone, unfreeze).block
    for part in parts:
        if block == part[-1]:
            return names.index(part[0])
    if block in names:
        return names.index(block)
    raise UnknownLayerError(
        f"unfreeze={unfreeze!r} lies behind the cut at {foundation.cut_point.name!r}."
    )


def has_batch_norms(blocks: Iterable[nn.Module]) -> bool:
    """Tell whether there is a batch-norm in any of the blocks."""
    return any(
        isinstance(part, _BatchNorm) for block in blocks for part in block.modules()
    )


def _check_batch_norms(foundation: Foundation) -> None:
    if not has_batch_norms(foundation.blocks.values()):
        raise ValueError(
            f"unfreeze='batch_norm': {foundation.backbone.name!r} has no batch-norm "
            f"up to the layer {foundation.cut_point.name!r}. Unfreeze its last parts "
            "(unfreeze=1) or 'all' of it."
        )


def split_blocks(
    foundation: Foundation, n_frozen: int
) -> tuple[dict[str, nn.Module], list[dict[str, nn.Module]]]:
    """Return the frozen blocks, and copies of those that learn, by parts."""
    blocks = foundation.blocks
    frozen = dict(list(blocks.items())[:n_frozen])
    tuned = [
        {name: copy.deepcopy(blocks[name]) for name in part if name not in frozen}
        for part in foundation.parts()
    ]
    return frozen, [part for part in tuned if part]

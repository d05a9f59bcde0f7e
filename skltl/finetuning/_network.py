"""The network in training: frozen blocks, trainable blocks and a head."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl._parameters import DTYPES
from skltl.exceptions import UnknownLayerError
from skltl.inference import FrozenPrefix
from skltl.networks import (
    Backbone,
    Block,
    ImageSize,
    ResolvedLayer,
    freeze,
    resolve_layer,
    skeleton,
)


class SplitNetwork(nn.Module):
    """A network in three pieces: frozen blocks, trainable blocks and a head.

    The frozen blocks, the first ones, are shared between estimators and are not run
    here: their outputs are the inputs of the trainable blocks. These are copies, in
    groups between main layers.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        groups: Sequence[Sequence[str]],
        n_frozen: int,
        head: nn.Sequential,
    ) -> None:
        super().__init__()
        frozen = list(blocks)[:n_frozen]
        self.frozen = {name: blocks[name] for name in frozen}  # not as submodules
        self._trainable_names = [name for name in blocks if name not in frozen]
        self.trainable = nn.Sequential()
        for group in groups:
            copies = [
                copy.deepcopy(blocks[name]) for name in group if name not in frozen
            ]
            if copies:
                self.trainable.append(nn.Sequential(*copies))
        self.head = head
        self._keeps_statistics = self._only_batch_norms = False
        freeze([self.trainable])

    @property
    def has_linear_head(self) -> bool:
        """Whether the head has a single layer with weights."""
        kinds = (nn.Linear, nn.Conv2d)
        return sum(isinstance(layer, kinds) for layer in self.head.modules()) == 1

    def unfreeze(self, only_batch_norms: bool, keeps_statistics: bool) -> None:
        """Unfreeze the trainable blocks, or only their batch-norms' parameters."""
        self._only_batch_norms = only_batch_norms
        self._keeps_statistics = keeps_statistics
        for module in self.trainable.modules():
            if not only_batch_norms or isinstance(module, _BatchNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> SplitNetwork:
        """Set the mode, except of layers that stay in eval mode.

        These are batch-norms that keep their statistics, and everything that is not a
        batch-norm (dropout) if only batch-norms are trained.
        """
        super().train(mode)
        for module in self.trainable.modules():
            is_batch_norm = isinstance(module, _BatchNorm)
            stays = self._keeps_statistics if is_batch_norm else self._only_batch_norms
            if stays and not list(module.children()):
                module.eval()
        return self

    def forward(self, batch: Tensor) -> Tensor:
        """Return the outputs (n, n_outputs) for outputs of the frozen blocks."""
        outputs: Tensor = self.head(self.trainable(batch))
        return outputs

    def finished(self) -> tuple[FrozenPrefix, nn.Module]:
        """Return frozen copies on the CPU: all blocks, and the head in float64."""
        trained, head = copy.deepcopy((self.trainable, self.head))
        freeze([trained.cpu(), head])
        groups = trained.children()
        blocks: Any = [block for group in groups for block in group.children()]
        named = dict(zip(self._trainable_names, blocks, strict=True))
        return FrozenPrefix({**self.frozen, **named}), head.cpu().double()


def group_blocks(
    backbone: Backbone,
    blocks: Mapping[str, Block],
    layer: ResolvedLayer,
    image_size: ImageSize,
) -> list[tuple[str, ...]]:
    """Group the names of the blocks up to `layer` by the main layers they end in.

    A group without parameters, such as a pooling, belongs to the one before it.
    """
    ends = {*skeleton(backbone, image_size).layers.values(), layer.block}
    groups: list[tuple[str, ...]] = []
    group: list[str] = []
    for name in blocks:
        group.append(name)
        if name in ends:
            has_parameters = any(list(blocks[one].parameters()) for one in group)
            before = () if has_parameters or not groups else groups.pop()
            groups.append((*before, *group))
            group = []
    return groups


def count_frozen(
    backbone: Backbone,
    blocks: Mapping[str, Block],
    layer: ResolvedLayer,
    image_size: ImageSize,
    unfreeze: str | int | None,
) -> int:
    """Return how many of the blocks up to `layer`, from the first one, stay frozen."""
    names, groups = list(blocks), group_blocks(backbone, blocks, layer, image_size)
    if unfreeze is None:
        return len(names)
    if unfreeze == "batch_norm" and not has_batch_norms(blocks.values()):
        raise ValueError(
            f"unfreeze='batch_norm': {backbone.name!r} has no batch-norm up to layer "
            f"{layer.name!r}. Unfreeze its last blocks (unfreeze=1) or all (unfreeze="
            "'all')."
        )
    if unfreeze in ("batch_norm", "all"):
        return 0
    if not isinstance(unfreeze, str):  # numpy's integers are no `int`
        if unfreeze > len(groups):
            raise ValueError(
                f"unfreeze={unfreeze}, but {backbone.name!r} has {len(groups)} groups "
                f"of blocks up to layer {layer.name!r}. unfreeze='all' unfreezes all."
            )
        return names.index(groups[-int(unfreeze)][0])
    block = resolve_layer(backbone, unfreeze, image_size).block
    if block not in names:
        raise UnknownLayerError(
            f"unfreeze={unfreeze!r} comes after layer {layer.name!r}, where the "
            "network is truncated."
        )
    ends = skeleton(backbone, image_size).layers.values()
    first = {one: group[0] for group in groups for one in group if one in ends}
    return names.index(first.get(block, block))  # a main layer is its group


def check_trainable(backbone: Backbone, image_size: ImageSize) -> None:
    """Refuse to train blocks that would not compute in train mode what they should."""
    if not skeleton(backbone, image_size).is_trainable:
        raise ValueError(
            f"{backbone.name!r} can only be used frozen (unfreeze=None): its forward "
            "pass in train mode cannot be traced, or its gradients differ from "
            "those of the traced calls."
        )


def has_batch_norms(blocks: Iterable[nn.Module]) -> bool:
    """Return whether any of the blocks contains a batch-norm."""
    return any(
        isinstance(module, _BatchNorm) for block in blocks for module in block.modules()
    )


@contextmanager
def training_context(device: torch.device) -> Iterator[None]:
    """Enable gradients, and disable the user's autocast, whatever the modes are."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False, cache_enabled=False),
    ):
        yield


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which products are computed in a precision.

    Without torch's cache of converted weights: it lives as long as the outermost such
    context, which may be the user's own, and would hide every step.
    """
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype, dtype != torch.float32, False)

"""Convolutions whose weights are packed once for oneDNN, torch's library on CPUs."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from skltl.networks import has_hooks

# torch does not annotate what is in it.
ONEDNN: Any = torch.backends.mkldnn


class PackedConv2d(nn.Conv2d):
    """A frozen convolution that keeps a second, packed copy of its weights.

    torch brings the weights into oneDNN's order anew for every batch: a third of the
    time of ResNet-50 for a single image, a tenth for eight. What packs them once is
    private to torch, but what its own compiler uses when it builds weights in. The sums
    are those of oneDNN, which torch does not use for every small map, so the last
    digits may differ from those of a plain convolution.
    """

    # Packed when the first batch tells for which size; right for all sizes. Two threads
    # may both pack at first: they get the same.
    _packed: Tensor | None = None

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        if not ONEDNN.enabled:  # the user may have switched it off
            plain: Tensor = super()._conv_forward(input, weight, bias)
            return plain
        how = (self.padding, self.stride, self.dilation, self.groups)
        operators: Any = torch.ops.mkldnn
        if self._packed is None:
            pack = operators._reorder_convolution_weight
            self._packed = pack(weight, *how, input.shape)
        output: Tensor = operators._convolution_pointwise(
            input, self._packed, bias, *how, "none", [], ""
        )
        return output


def pack_convolutions(module: nn.Module) -> None:
    """Make each frozen convolution on the CPU a packed one, in place.

    Only plain ones: of subclasses, and of those with hooks, it is not known when their
    weights change.
    """
    for conv in module.modules():
        if can_pack(conv):
            conv.__class__ = PackedConv2d


def can_pack(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Tell whether a module is a convolution that oneDNN can run."""
    return (
        type(module) is nn.Conv2d
        and ONEDNN.is_available()
        and module.weight.device.type == "cpu"
        and _can_multiply(module.weight.dtype)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not has_hooks(module)
    )


@cache
def _can_multiply(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies in a dtype here, and torch has what packs."""
    operators: Any = torch.ops.mkldnn
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    if not all(hasattr(operators, name) for name in names):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32

"""The trace of modules that run one after the other, and are used as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skltl.networks._network import is_customized
from skltl.networks._recording import (
    FORWARD_ERRORS,
    Call,
    Output,
    Source,
    TraceError,
)
from skltl.networks._trace import CutPoint, Trace, is_plain_sequence


def trace_sequence(
    module: nn.Module, head: tuple[str, ...], image_shape: tuple[int, int, int]
) -> Trace:
    """Trace the children of a module: each layer is a call, and ends at a cut point.

    Copies of the layers before the head are run, two images of zeros through all of
    them: a layer may modify itself when it runs.
    """
    layers = expand(module._modules)
    ends = {
        parent: number for number, path in enumerate(layers) for parent in around(path)
    }
    calls: list[Call] = []
    cut_points: list[CutPoint] = []
    reason: Exception | None = None
    output: Any = torch.zeros(2, *image_shape, dtype=torch.float32, device="cpu")
    for number, (path, layer) in enumerate(layers.items()):
        before = Output(number - 1)  # of the first call, it is the batch
        call = Call(path, (before,), {}, Source.IMAGES, module="")
        if set(around(path)).isdisjoint(head):
            try:
                output = _run(layer, output)
            except FORWARD_ERRORS as error:
                reason = error
                break
            paths = tuple(one for one, end in ends.items() if end == number)
            shape = tuple(output.shape[1:])
            cut_points.append(CutPoint(path, paths, number, Output(number), shape))
        calls.append(call)
    result = Output(len(calls) - 1)
    return Trace(tuple(calls), result, tuple(cut_points), ends, error=reason)


def _run(layer: nn.Module, batch: Tensor) -> Tensor:
    """Return the output of a copy of a layer, which must have an entry per image."""
    with torch.inference_mode():
        output = copy.deepcopy(layer)(batch)
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise TraceError(f"a block returns a {kind}, and not one tensor")
    if output.ndim < 2 or len(output) != len(batch):
        raise TraceError(
            f"a block returns a tensor of shape {tuple(output.shape)} for two images"
        )
    return output


def expand(modules: Mapping[str, nn.Module | None]) -> dict[str, nn.Module]:
    """Split every plain ``nn.Sequential`` without hooks into its children, recursively.

    The resulting layers are named by their module paths.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if module is None:
            continue
        if is_plain_sequence(module) and not is_customized(module):
            # Not `named_children`, which skips the second use of a shared ReLU.
            children = module._modules.items()
            layers |= expand({f"{name}.{key}": one for key, one in children})
        else:
            layers[name] = module
    return layers


def around(path: str) -> list[str]:
    """Return the path of a module, after those of all modules around it."""
    keys = path.split(".")
    return [".".join(keys[:n]) for n in range(1, len(keys) + 1)]

"""The trace of modules that run one after the other, and are used as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from skltl.networks._network import ImageSize, is_customized
from skltl.networks._recording import FORWARD_ERRORS, Call, Output, Source
from skltl.networks._trace import CutPoint, Trace


def trace_sequence(
    module: nn.Module, head: tuple[str, ...], image_size: ImageSize
) -> Trace:
    """Trace the children of a module: each layer is a call, and ends at a cut point.

    Copies of the layers before the head are run, one image of zeros through all of
    them: a layer may modify itself when it runs.
    """
    layers = expand(module._modules)
    ends = {
        parent: number for number, path in enumerate(layers) for parent in around(path)
    }
    calls: list[Call] = []
    cut_points: list[CutPoint] = []
    reason: Exception | None = None
    output = torch.zeros(1, 3, *image_size, dtype=torch.float32, device="cpu")
    for number, (path, layer) in enumerate(layers.items()):
        before = Output(number - 1)  # of the first call, it is the batch
        call = Call(path, (before,), {}, Source.IMAGES, module="")
        if not around(path).isdisjoint(head):
            calls.append(call)
            continue
        try:
            with torch.inference_mode():
                output = copy.deepcopy(layer)(output)
        except FORWARD_ERRORS as error:
            reason = error
            break
        calls.append(call)
        paths = tuple(one for one, end in ends.items() if end == number)
        shape = tuple(output.shape[1:])
        cut_points.append(CutPoint(path, paths, number, Output(number), shape, True))
    return Trace(
        tuple(calls),
        constants={},
        result=Output(len(calls) - 1),
        cut_points=tuple(cut_points),
        ends=ends,
        modifiers={},
        reshaped=frozenset(),
        is_trainable=True,
        error=reason,
    )


def expand(modules: Mapping[str, nn.Module | None]) -> dict[str, nn.Module]:
    """Split every plain ``nn.Sequential`` without hooks into its children, recursively.

    The resulting layers are named by their module paths.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if module is None:
            continue
        is_plain = type(module).forward is nn.Sequential.forward
        if is_plain and not is_customized(module):
            # Not `named_children`, which skips the second use of a shared ReLU.
            children = module._modules.items()
            layers |= expand({f"{name}.{key}": one for key, one in children})
        else:
            layers[name] = module
    return layers


def around(path: str) -> set[str]:
    """Return a module path and those of all modules around it."""
    keys = path.split(".")
    return {".".join(keys[:n]) for n in range(1, len(keys) + 1)}

"""Alignment: what several recordings of a network have in common.

Where the recording for three images differs from that for two, there is a batch size;
where that in another precision differs, the precision of the weights; and where that in
train mode differs, the mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skltl.networks._recording import (
    Call,
    Output,
    Recording,
    Source,
    TraceError,
    map_values,
    part_of,
)

N_IMAGES, OTHER_N_IMAGES = 2, 3
DTYPE, OTHER_DTYPE = torch.float32, torch.float64


@dataclass(frozen=True)
class BatchSize:
    """An integer that depends on the number of images n: ``factor * n + offset``."""

    factor: int
    offset: int


@dataclass(frozen=True)
class Constant:
    """A tensor that depends neither on images nor on weights."""

    name: str


@dataclass(frozen=True)
class Setting:
    """The mode, dtype or device of the network, which may be changed later."""

    name: str


TRAINING, NETWORK_DTYPE, DEVICE = map(Setting, ("training", "dtype", "device"))


def align(small: Recording, large: Recording, trained: Recording) -> Alignment:
    """Return what recordings have in common, that in train mode if it is alike."""
    if not modules_that_differ(small, trained):
        try:
            return Alignment(small, large, trained)
        except TraceError:  # it may be the number of images, or the mode
            pass
    aligned = Alignment(small, large, small)
    aligned.is_trainable = False
    return aligned


class Alignment:
    """The calls that several recordings of a network have in common.

    `small` and `large` are recordings of batches of different sizes and dtypes, and
    `trained` is one in train mode. `calls` has ``None`` in place of constants.
    """

    is_trainable = True

    def __init__(self, small: Recording, large: Recording, trained: Recording) -> None:
        self.constants: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._folded: dict[int, Any] = {}  # the outputs of constant calls
        self.calls: list[Call | None] = []
        self._casts = small.dtype == large.dtype
        if not len(small.calls) == len(large.calls) == len(trained.calls):
            raise TraceError("its calls depend on the number of images")
        for calls in zip(small.calls, large.calls, trained.calls, strict=True):
            self.calls.append(self._align(*calls))
        self.result = self._common(small.result, large.result, trained.result)

    def _align(self, small: Call, large: Call, trained: Call) -> Call | None:
        """Return the call that stands for three; ``None`` for a constant."""
        if not small.function == large.function == trained.function:
            raise TraceError("its calls depend on the number of images")
        if small.source == Source.CONSTANT and _is_same(small.output, large.output):
            self._folded[len(self.calls)] = small.output
            return None
        args = self._common(small.args, large.args, trained.args)
        kwargs = self._common(small.kwargs, large.kwargs, trained.kwargs)
        if self._casts and small.function == Tensor.float:
            small, args = replace(small, function=Tensor.to), (*args, NETWORK_DTYPE)
        if small.source == Source.CONSTANT and small.modified:
            raise TraceError("its constants depend on the number of images")
        return replace(small, args=args, kwargs=kwargs, output=None, modified=())

    def _common(self, small: Any, large: Any, trained: Any) -> Any:
        """Return the value that stands for three values of an argument."""
        if isinstance(small, (tuple, list, dict)) and not (
            len(small) == len(large) == len(trained)
        ):
            raise TraceError("its calls depend on the number of images")
        if isinstance(small, (tuple, list)):
            return type(small)(map(self._common, small, large, trained))
        if isinstance(small, dict):
            return {
                key: self._common(value, large[key], trained[key])
                for key, value in small.items()
            }
        if isinstance(small, slice):
            slices = (small, large, trained)
            bounds = [(one.start, one.stop, one.step) for one in slices]
            return slice(*map(self._common, *bounds))
        if isinstance(small, Output) and small == large and small.call in self._folded:
            return self._constant(part_of(self._folded[small.call], small.keys))
        if isinstance(small, Tensor) and _is_same(small, large):
            return self._constant(small)
        if isinstance(small, torch.device):
            return DEVICE
        if self._casts and small is DTYPE:
            return NETWORK_DTYPE
        return _common_setting(small, large, trained)

    def _constant(self, value: Tensor) -> Constant:
        # No name of a module or of a parameter.
        name = self._names.setdefault(id(value), f"_constant_{len(self._names)}_")
        self.constants[name] = value
        return Constant(name)


def _common_setting(small: Any, large: Any, trained: Any) -> Any:
    """Return the value that stands for three values that are no tensors."""
    values = (small, large, trained)
    if small == large == trained:
        return small
    if all(isinstance(value, float) and math.isnan(value) for value in values):
        return small
    if values == (False, False, True):
        return TRAINING
    if (small, large) == (DTYPE, OTHER_DTYPE):
        return NETWORK_DTYPE
    if isinstance(small, int) and isinstance(large, int):
        factor, rest = divmod(large - small, OTHER_N_IMAGES - N_IMAGES)
        if rest == 0:
            return BatchSize(factor, small - factor * N_IMAGES)
    raise TraceError("what it computes depends on the number of images")


def _is_same(small: Any, large: Any) -> bool:
    """Return whether a constant does not depend on the size of the batch."""
    if isinstance(small, Tensor) and isinstance(large, Tensor):
        return small.shape == large.shape and torch.allclose(
            small.double(), large.double(), equal_nan=True
        )
    if isinstance(small, (tuple, list)) and isinstance(large, (tuple, list)):
        return len(small) == len(large) and all(map(_is_same, small, large))
    return bool(small == large)


def modules_that_differ(evaluated: Recording, trained: Recording) -> set[str]:
    """Return the modules that make other calls in train mode than in eval mode.

    It is the network itself, with the path "", if only one of the two passes fails.
    """
    if (evaluated.error is None) != (trained.error is None):
        return {""}
    by_module: dict[str, tuple[list[Call], list[Call]]] = {}
    for position, recording in enumerate((evaluated, trained)):
        for call in recording.calls:
            by_module.setdefault(call.module, ([], []))[position].append(call)
    return {
        module
        for module, (calls, others) in by_module.items()
        if len(calls) != len(others) or not all(map(_is_similar, calls, others))
    }


def _is_similar(evaluated: Call, trained: Call) -> bool:
    """Return whether two calls differ in flags at most that are the mode."""

    def settings(call: Call) -> list[Any]:
        found: list[Any] = []
        map_values(found.append, (call.args, call.kwargs))
        kinds = (Output, Tensor)
        return [type(one) if isinstance(one, kinds) else one for one in found]

    ours, others = settings(evaluated), settings(trained)
    return (
        evaluated.function == trained.function
        and len(ours) == len(others)
        and all(
            one == other or (one is False and other is True)
            for one, other in zip(ours, others, strict=True)
        )
    )

"""Recording of a forward pass: its calls, and the tensors that they pass on.

The network runs on tensors without values (torch's "meta" device). A mode of torch
sees each call of a torch function, and hooks see each layer: nothing is replaced in
torch, and other threads are not affected. Python code between the calls, such as a
branch on the size of the image, leaves no trace. A recording therefore holds for images
of one size.

Tensors that depend neither on images nor on weights, such as the grid of a position
embedding, do have values, and code may branch on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skltl._random import own_random_state, torch_defaults

# What the code of networks raises for images of another size, and for tensors without
# values.
FORWARD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NameError, RuntimeError, TypeError, ValueError),
)

# Modules of torch that do nothing but call others.
CONTAINERS = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict),
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
)

# What code is told about tensors on the meta device.
_ANSWERS = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}


_UNOBSERVED = "it runs code that torch cannot observe"


class TraceError(ValueError):
    """The forward pass of a network cannot be traced."""


class Source(IntEnum):
    """Kind of values that a tensor depends on."""

    CONSTANT = 0
    WEIGHTS = 1
    IMAGES = 2


@dataclass(frozen=True)
class Output:
    """The output of a call or, with `keys`, a tensor inside of it."""

    call: int
    keys: tuple[Any, ...] = ()


BATCH = Output(-1)


@dataclass(frozen=True)
class Weight:
    """A parameter or a persistent buffer."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a torch function, or of the layer with the path `function`.

    Tensors in `args` and `kwargs` are given as `Output` or `Weight`, except for
    constants that the network holds. `module` is the path of the calling module, and
    `modified` are the arguments that the call modifies.
    """

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Source
    module: str
    output: Any = None
    modified: tuple[Tensor, ...] = ()


@dataclass
class Recording:
    """The calls of a forward pass, in order.

    `spans` holds, for each module that was run, its path, the number of its first call
    and the number of the first call after it. `dtype` is that of images and weights.
    `error` is the reason if the forward pass has failed; then `result` is ``None``.
    """

    dtype: torch.dtype
    calls: list[Call] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    result: Any = None
    error: Exception | None = None


def record(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    n_images: int,
    dtype: torch.dtype,
    training: bool = False,
    whole: Set[str] = frozenset(),
) -> Recording:
    """Record the forward pass of a copy of a network; nothing is computed.

    Modules whose paths are in `whole` are recorded as one call each, like layers.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        own_random_state(0),
        torch_defaults(),
    ):
        batch = torch.empty((n_images, *image_shape), dtype=dtype, device="meta")
        copied = _without_values(model, dtype).train(training)
        recorder = _Recorder(copied, dtype, whole)
        recorder.run(batch)
    return recorder.recording


class _Recorder(TorchFunctionMode):
    """A mode of torch that records the forward pass of a network.

    The network gets hooks, and must be a copy.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, whole: Set[str]) -> None:
        super().__init__()
        self.recording = Recording(dtype)
        self._model = model
        # By the identities of tensors, which are kept: others could get these.
        self._known: dict[int, tuple[Output | Weight, Source]] = {}
        self._kept: list[Tensor] = []
        self._running: list[str] = [""]  # paths of modules
        self._layer: str | None = None  # while it runs, nothing is recorded
        for name, weight in weights_of(model).items():
            self._remember(weight, Weight(name), Source.WEIGHTS)
        self._storages = set(map(storage_of, self._kept))
        for path, module in model.named_modules():
            if path and (path in whole or _is_layer(module)):
                self._watch_layer(path, module)
            elif path:
                self._watch_module(path, module)

    def run(self, batch: Tensor) -> None:
        """Run the network on a batch of images without values."""
        self._remember(batch, BATCH, Source.IMAGES)
        try:
            with self:
                result = self._model(batch)
            self.recording.result = self._referenced(result)
        except FORWARD_ERRORS as error:
            self.recording.error = error

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run and record a call of a torch function."""
        kwargs = kwargs or {}
        if self._layer is not None:
            return func(*args, **kwargs)
        if func in _ANSWERS:
            return _ANSWERS[func]
        if getattr(func, "namespace", "") == "prims":  # a part of a scripted function
            raise TraceError(_UNOBSERVED)
        tensors = tensors_in((args, kwargs))
        source, arguments = self._source(tensors), self._referenced((args, kwargs))
        if source > Source.CONSTANT:
            args, kwargs = map_values(_without_value, (args, kwargs))
        passed = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in passed]
        output = func(*args, **kwargs)
        modified = [
            tensor
            for tensor, one, version in zip(tensors, passed, versions, strict=True)
            if one._version > version
        ]
        for tensor in modified:
            self._note_modified(tensor, source)
        if not modified:
            output = _distinct(output, tensors)
        if modified or tensors_in(output):
            self._add(func, arguments, source, output, tuple(modified))
        return output

    def _watch_module(self, path: str, module: nn.Module) -> None:
        """Note in which calls a module begins and ends."""
        starts = []

        def begin(*_: Any) -> None:
            if self._layer is None:
                self._running.append(path)
                starts.append(len(self.recording.calls))

        def end(*_: Any) -> None:
            if self._layer is None:
                self._running.pop()
                span = (path, starts.pop(), len(self.recording.calls))
                self.recording.spans.append(span)

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(end)

    def _watch_layer(self, path: str, module: nn.Module) -> None:
        """Record the calls of a layer, and nothing inside of it."""
        is_constant = not weights_of(module)
        arguments: Any = None
        source = Source.CONSTANT

        def begin(_: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal arguments, source
            if self._layer is not None:  # this one is a part of another layer
                return None
            self._layer = path
            source = self._source(tensors_in((args, kwargs)))
            source = source if is_constant else max(source, Source.WEIGHTS)
            arguments = self._referenced((args, kwargs))
            if source == Source.CONSTANT:
                return None
            return map_values(_without_value, (args, kwargs))

        def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._layer != path:
                return None
            if not getattr(module, "inplace", False):
                output = _distinct(output, tensors_in((args, kwargs)))
            self._add(path, arguments, source, output)
            n_calls = len(self.recording.calls)
            self.recording.spans.append((path, n_calls - 1, n_calls))
            self._layer = None
            return output

        module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        module.register_forward_hook(end, with_kwargs=True)

    def _add(
        self,
        function: Callable[..., Any] | str,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        source: Source,
        output: Any,
        modified: tuple[Tensor, ...] = (),
    ) -> None:
        """Add a call to the recording."""
        number, module = len(self.recording.calls), self._running[-1]
        call = Call(function, *arguments, source, module, output, modified)
        self.recording.calls.append(call)
        for keys, tensor in _items(output):
            self._remember(tensor, Output(number, keys), source)

    def _remember(self, tensor: Tensor, known: Output | Weight, source: Source) -> None:
        self._known[id(tensor)] = known, source
        self._kept.append(tensor)

    def _referenced(self, values: Any) -> Any:
        """Return values with `Output` and `Weight` in place of known tensors."""

        def referenced(value: Any) -> Any:
            if id(value) in self._known:
                return self._known[id(value)][0]
            if isinstance(value, Tensor):
                self._kept.append(value)
            # Code with numpy's numbers would need their type.
            return value.item() if isinstance(value, np.generic) else value

        return map_values(referenced, values)

    def _source(self, tensors: list[Tensor]) -> Source:
        """Return what a function of the tensors depends on."""
        source = Source.CONSTANT
        for tensor in tensors:
            if id(tensor) in self._known:
                source = max(source, self._known[id(tensor)][1])
            elif tensor.is_meta:
                raise TraceError(_UNOBSERVED)
        return source

    def _note_modified(self, tensor: Tensor, source: Source) -> None:
        """Note that a tensor depends on what it is modified by, and so do its views.

        The network must not hold it: later images would get other outputs.
        """
        if self._model.training:  # statistics are updated, and their layers kept whole
            return
        storage, held = storage_of(tensor), self._storages
        is_changed = self._source([tensor]) < source
        if is_changed:  # it may be of a constant that the network holds
            constants = [one for one in self._kept if id(one) not in self._known]
            held = held | set(map(storage_of, constants))
        if storage in held:
            raise TraceError("it modifies weights or constants when it runs")
        for number, call in enumerate(self.recording.calls if is_changed else ()):
            views = [
                one for one in tensors_in(call.output) if storage_of(one) == storage
            ]
            if views and call.source < source:
                self.recording.calls[number] = replace(call, source=source)
                for view in views:
                    self._known[id(view)] = self._known[id(view)][0], source


def storage_of(tensor: Tensor) -> int:
    """Return an identifier of the memory of a tensor, which its views share."""
    return int(tensor.untyped_storage()._cdata)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, each of them once."""
    weights: dict[int, tuple[str, Tensor]] = {}
    for name, weight in module.state_dict(keep_vars=True).items():
        if isinstance(weight, Tensor):  # modules may save other things, too
            weights.setdefault(id(weight), (name, weight))
    return dict(weights.values())


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of torch."""
    is_of_torch = type(module).__module__.partition("torch.nn")[:2] == ("", "torch.nn")
    return is_of_torch and type(module) not in CONTAINERS


def _without_values(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a module with its weights on the meta device, floats in another dtype.

    Buffers that are not saved with the weights are constants, and keep their values.
    """
    memo: dict[int, Any] = {}
    for weight in weights_of(model).values():
        other = torch.empty_like(
            weight,
            device="meta",
            dtype=dtype if weight.is_floating_point() else weight.dtype,
        )
        if isinstance(weight, nn.Parameter):
            other = nn.Parameter(other, requires_grad=False)
        memo[id(weight)] = other
    copied = copy.deepcopy(model, memo)
    for buffer in copied.buffers():
        if not buffer.is_meta and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return copied


def _without_value(value: Any) -> Any:
    """Return a tensor on the meta device, and anything else unchanged."""
    if isinstance(value, Tensor) and not value.is_meta:
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _distinct(output: Any, tensors: list[Tensor]) -> Any:
    """Return an output that is none of the tensors that it was computed from.

    ``x.to(dtype)`` may be ``x`` itself, and later calls must refer to one of the two.
    """
    if any(output is tensor for tensor in tensors):
        return output.detach()
    return output


def map_values(function: Callable[[Any], Any], values: Any) -> Any:
    """Apply a function to all values in nested tuples, lists, dicts and slices."""
    if isinstance(values, tuple):
        return tuple(map_values(function, value) for value in values)
    if isinstance(values, list):
        return [map_values(function, value) for value in values]
    if isinstance(values, dict):
        return {key: map_values(function, value) for key, value in values.items()}
    if isinstance(values, slice):
        parts = (values.start, values.stop, values.step)
        return slice(*map_values(function, parts))
    return function(values)


def tensors_in(values: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dicts and slices."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)

    map_values(collect, values)
    return found


def _items(output: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """Yield all tensors in nested tuples, lists and dicts, and the keys to each."""
    if isinstance(output, Tensor):
        yield keys, output
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from _items(value, (*keys, index))
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from _items(value, (*keys, key))


def part_of(output: Any, keys: tuple[Any, ...]) -> Any:
    """Return a part of a nested output."""
    for key in keys:
        output = output[key]
    return output


def outputs_in(values: Any) -> list[Output]:
    """Return the outputs of calls among nested values."""
    found: list[Any] = []
    map_values(found.append, values)
    return [value for value in found if isinstance(value, Output)]


def function_name(function: Any) -> str:
    """Return the name of a torch function, or of a property of tensors."""
    name: str = function.__name__.strip("_")
    return function.__self__.__name__ if name == "get" else name

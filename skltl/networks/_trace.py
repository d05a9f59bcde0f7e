"""Tracing: any network as a sequence of blocks.

The blocks are separated by the bottlenecks of the dataflow. After some calls of the
forward pass, exactly one tensor is needed by all calls that follow: there, the network
can be cut. Inside of a residual connection, a dense block or parallel branches two
tensors are needed, so there is no cut. Run one after the other, the blocks make the
same calls as the network.

The forward pass is recorded three times. Where the recording for three images differs
from that for two, there is a batch size; where that in another precision differs, the
precision of the weights; and where that in train mode differs, the mode.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from skltl.networks._blocks import Block
from skltl.networks._recording import (
    BATCH,
    Call,
    Output,
    Recording,
    Source,
    TraceError,
    Weight,
    map_values,
    record,
    storage_of,
    tensors_in,
    weights_of,
)

N_IMAGES, OTHER_N_IMAGES = 2, 3
DTYPE, OTHER_DTYPE = torch.float32, torch.float64

# The methods of tensors, by the identities of their functions.
METHODS = {
    id(getattr(Tensor, name)): name
    for name in dir(Tensor)
    if callable(getattr(Tensor, name))
}


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


@dataclass(frozen=True)
class CutPoint:
    """A place where a network can be cut: the tensor that all later calls need.

    `call` is the number of the call before it, and `shape` that of the tensor for one
    image. `name` and `paths` are its names: `paths` are those of the modules that end
    there. Between modules means not inside of one with a ``forward`` of its own.
    """

    name: str
    paths: tuple[str, ...]
    call: int
    tensor: Output
    shape: tuple[int, ...]
    is_between_modules: bool


@dataclass(frozen=True, eq=False)
class Trace:
    """The calls of a network, and where it can be cut.

    `calls` has ``None`` in place of constants, whose values are in `constants`.
    `ends` has the number of the last call of each module, and `modifiers`, for a call
    that depends on no image, those of the calls that modify its output. `error` is the
    reason if the forward pass fails for images of this size; then it ends there.
    """

    calls: tuple[Call | None, ...]
    constants: dict[str, Tensor]
    result: Any
    cut_points: tuple[CutPoint, ...]
    ends: dict[str, int]
    modifiers: dict[int, tuple[int, ...]]
    is_trainable: bool
    error: Exception | None


def trace(
    model: nn.Module, image_size: tuple[int, int], reference: Trace | None = None
) -> Trace:
    """Trace a network for images of one size; nothing is computed.

    Images may be too small, and vanish in the network. With a `reference`, the trace
    for images of a suitable size, the result then ends before that.
    """
    small = record(model, image_size, N_IMAGES, DTYPE)
    if small.error is not None and reference is None:
        raise small.error
    trained = record(model, image_size, N_IMAGES, DTYPE, training=True)
    # Stochastic layers, and whatever else differs between the modes, are kept whole: a
    # block calls them as the network does, in either mode.
    whole = _modules_that_differ(small, trained) - {""}
    if whole:
        small = record(model, image_size, N_IMAGES, DTYPE, whole=whole)
        trained = record(model, image_size, N_IMAGES, DTYPE, training=True, whole=whole)
    is_trainable = not _modules_that_differ(small, trained)
    large = record(model, image_size, OTHER_N_IMAGES, OTHER_DTYPE, whole=whole)
    if small.error is None and not isinstance(small.result, Output):
        raise TraceError(
            f"it returns a {type(small.result).__name__}, and not one tensor"
        )
    aligned = _Alignment(small, large, trained if is_trainable else small)
    calls, error = aligned.calls, small.error
    ends = _last_calls(small, calls)
    if error is None:
        found = _bottlenecks(calls, aligned.result, model)
    else:
        assert reference is not None
        found = _known_bottlenecks(calls, reference, error)
    places = [place for place in found if _is_batch(place[1], small, large)]
    return Trace(
        tuple(calls),
        aligned.constants,
        aligned.result,
        tuple(_named_cut_points(model, small, places, ends)),
        ends,
        _modifiers(small, calls),
        is_trainable,
        error,
    )


def cut_points_before(
    trace: Trace, model: nn.Module, head: Sequence[str]
) -> tuple[CutPoint, ...]:
    """Return the cut points before the head, given by paths of modules and weights."""
    prefixes = tuple(f"{path}." for path in head)
    for number, names in _weights_by_call(trace.calls, model).items():
        if any(f"{name}.".startswith(prefixes) for name in names):
            return tuple(cut for cut in trace.cut_points if cut.call < number)
    return trace.cut_points


def split(
    trace: Trace, model: nn.Module, head: Sequence[str], last: str | None = None
) -> tuple[dict[str, Block], Block | None]:
    """Return a network as blocks, which share its weights, and its head.

    `head` are the paths of the modules or weights that return the logits. The head is
    all that follows the last cut point before them; without any, there is none. With
    `last`, the network ends there.
    """
    blocks, start, batch = {}, 0, BATCH
    for point in cut_points_before(trace, model, head):
        calls = range(start, point.call + 1)
        builder = _BlockBuilder(trace, model, batch)
        blocks[point.name] = builder.build(calls, point.tensor)
        if point.name == last:
            return blocks, None
        start, batch = point.call + 1, point.tensor
    if not head or trace.error is not None:
        return blocks, None
    calls = range(start, len(trace.calls))
    return blocks, _BlockBuilder(trace, model, batch).build(calls, trace.result)


def module_ends(
    trace: Trace, points: Sequence[CutPoint]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the blocks that modules end with, and those inside of which others end.

    Blocks are named by the cut points that they end with. A module that ends after all
    of them, in the head, counts up to there.
    """
    ends = {path: point.name for point in points for path in (*point.paths, point.name)}
    inside = {}
    for path, end in trace.ends.items():
        following = [point.name for point in points if point.call >= end]
        if following and path not in ends:
            inside[path] = following[0]
        for point in () if following else points:
            if f"{point.name}.".startswith(f"{path}."):
                ends[path] = point.name
    return ends, inside


class _Alignment:
    """The calls that several recordings of a network have in common.

    `small` and `large` are recordings of batches of different sizes and dtypes, and
    `trained` is one in train mode.
    """

    def __init__(self, small: Recording, large: Recording, trained: Recording) -> None:
        self.constants: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._folded: dict[int, Any] = {}  # the outputs of constant calls
        self.calls: list[Call | None] = []
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
        if small.source == Source.CONSTANT and small.modified:
            raise TraceError("its constants depend on the number of images")
        return replace(small, args=args, kwargs=kwargs, output=None, modified=())

    def _common(self, small: Any, large: Any, trained: Any) -> Any:
        """Return the value that stands for three values of an argument."""
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
            return self._constant(_item(self._folded[small.call], small.keys))
        if isinstance(small, Tensor) and _is_same(small, large):
            return self._constant(small)
        if isinstance(small, torch.device):
            return DEVICE
        return _common_setting(small, large, trained)

    def _constant(self, value: Tensor) -> Constant:
        name = self._names.setdefault(id(value), f"constant_{len(self._names)}")
        self.constants[name] = value
        return Constant(name)


def _common_setting(small: Any, large: Any, trained: Any) -> Any:
    """Return the value that stands for three values that are no tensors."""
    if small == large == trained:
        return small
    if (small, large, trained) == (False, False, True):
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


def _item(output: Any, keys: tuple[Any, ...]) -> Any:
    """Return a part of a nested output."""
    for key in keys:
        output = output[key]
    return output


def _modules_that_differ(evaluated: Recording, trained: Recording) -> set[str]:
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

    pairs = zip(settings(evaluated), settings(trained), strict=False)
    return evaluated.function == trained.function and all(
        one == other or (one is False and other is True) for one, other in pairs
    )


Place = tuple[int, Output]  # a call, and the only tensor that is needed after it


def _bottlenecks(
    calls: Sequence[Call | None], result: Any, model: nn.Module
) -> Iterator[Place]:
    """Yield the calls after which only one tensor is needed, and that tensor.

    Weights are needed, too: the network cannot be cut between two calls that use the
    same ones.
    """
    last_use = {BATCH: -1}
    for number, call in enumerate(calls):
        if call is not None:
            last_use |= dict.fromkeys(_outputs_in((call.args, call.kwargs)), number)
    last_use |= dict.fromkeys(_outputs_in(result), len(calls))
    produced: dict[int, set[Output]] = {}
    for output in last_use:
        produced.setdefault(output.call, set()).add(output)
    users: dict[str, list[int]] = {}
    for number, names in _weights_by_call(calls, model).items():
        for name in names:
            users.setdefault(name, []).append(number)
    inside = {one for used in users.values() for one in range(used[0], used[-1])}
    needed = {BATCH}
    for number, call in enumerate(calls):
        if call is None or call.source < Source.IMAGES:
            continue
        needed |= produced.get(number, set())
        needed = {output for output in needed if last_use[output] > number}
        if len(needed) == 1 and needed != {BATCH} and number not in inside:
            yield number, next(iter(needed))


def _known_bottlenecks(
    calls: Sequence[Call | None], reference: Trace, error: Exception
) -> Iterator[Place]:
    """Yield the bottlenecks of a reference before the call that fails."""
    for call, known in zip(calls, reference.calls, strict=False):
        if (call and call.function) != (known and known.function):
            raise error
    for point in reference.cut_points:
        if point.call < len(calls):
            yield point.call, point.tensor


def _weights_by_call(
    calls: Sequence[Call | None], model: nn.Module
) -> dict[int, set[str]]:
    """Return the names of the weights that each call on images uses.

    Weights may be used through functions of weights, such as a resized position
    embedding.
    """
    names = {id(weight): name for name, weight in weights_of(model).items()}
    by_call: dict[int, set[str]] = {}
    for number, call in enumerate(calls):
        if call is None:
            continue
        used: set[str] = set()

        def collect(value: Any, used: set[str] = used) -> None:
            if isinstance(value, Weight):
                used.add(value.name)
            elif isinstance(value, Output):
                source = calls[value.call] if value.call >= 0 else None
                if source is not None and source.source == Source.WEIGHTS:
                    used |= by_call[value.call]

        map_values(collect, (call.args, call.kwargs))
        if isinstance(call.function, str):
            layer = model.get_submodule(call.function)
            used |= {names[id(weight)] for weight in weights_of(layer).values()}
        by_call[number] = used
    return {
        number: used for number, used in by_call.items() if _is_on_images(calls[number])
    }


def _outputs_in(values: Any) -> list[Output]:
    """Return the outputs of calls among nested values."""
    found: list[Any] = []
    map_values(found.append, values)
    return [value for value in found if isinstance(value, Output)]


def _is_batch(output: Output, small: Recording, large: Recording) -> bool:
    """Return whether a tensor has one entry per image, of one shape."""
    one, other = (
        _item(recording.calls[output.call].output, output.keys)
        for recording in (small, large)
    )
    return bool(
        one.shape[:1] == (N_IMAGES,)
        and other.shape[:1] == (OTHER_N_IMAGES,)
        and one.shape[1:] == other.shape[1:]
        and one.dtype == DTYPE
    )


def _last_calls(recording: Recording, calls: Sequence[Call | None]) -> dict[str, int]:
    """Return the last call on images of each module that makes one."""
    ends = {}
    for path, start, stop in recording.spans:
        numbers = [n for n in range(start, stop) if _is_on_images(calls[n])]
        if numbers:
            ends[path] = numbers[-1]
    return ends


def _is_on_images(call: Call | None) -> bool:
    return call is not None and call.source == Source.IMAGES


def _modifiers(
    recording: Recording, calls: Sequence[Call | None]
) -> dict[int, tuple[int, ...]]:
    """Return the calls that modify outputs which depend on no image."""
    by_storage: dict[int, list[int]] = {}
    for number, call in enumerate(recording.calls):
        if call.source < Source.IMAGES and calls[number] is not None:
            for tensor in call.modified:
                by_storage.setdefault(storage_of(tensor), []).append(number)
    found = {}
    for number, call in enumerate(recording.calls):
        for tensor in tensors_in(call.output) if call.source < Source.IMAGES else ():
            if storage_of(tensor) in by_storage:
                found[number] = tuple(by_storage[storage_of(tensor)])
    return found


def _named_cut_points(
    model: nn.Module, recording: Recording, places: list[Place], ends: dict[str, int]
) -> Iterator[CutPoint]:
    """Yield the cut points at some places, with their names.

    The name is the path of the outermost module that ends there and has a ``forward``
    of its own, or else that of the function that is called last.
    """
    paths_by_call: dict[int, list[str]] = {}
    for path, number in ends.items():
        paths_by_call.setdefault(number, []).append(path)
    own = {path for path in ends if not _is_plain_sequence(model, path)}
    spans = [(start, ends[path]) for path, start, _ in recording.spans if path in own]
    taken = set(ends)
    for number, tensor in places:
        paths = paths_by_call.get(number, [])
        outermost = [path for path in paths if path in own] or paths
        name = (outermost or [_name_of(recording.calls[number], taken)])[-1]
        taken.add(name)
        shape = _item(recording.calls[tensor.call].output, tensor.keys).shape[1:]
        is_between = not any(start <= number < end for start, end in spans)
        yield CutPoint(name, tuple(paths), number, tensor, tuple(shape), is_between)


def _is_plain_sequence(model: nn.Module, path: str) -> bool:
    return type(model.get_submodule(path)).forward is nn.Sequential.forward


def _name_of(call: Call, taken: Set[str]) -> str:
    """Return a name for a call that ends no module, such as ``"layer1.0.add"``."""
    name = call.function
    if not isinstance(name, str):
        name = f"{call.module}.{_function_name(call.function)}".lstrip(".")
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def _function_name(function: Any) -> str:
    """Return the name of a torch function, or of a property of tensors."""
    name: str = function.__name__.strip("_")
    return function.__self__.__name__ if name == "get" else name


class _BlockBuilder:
    """Builds the block of some consecutive calls, which starts with a tensor."""

    def __init__(self, trace: Trace, model: nn.Module, batch: Output) -> None:
        self._trace = trace
        self._model = model
        self._graph = fx.Graph()
        self._batch = self._graph.placeholder("batch")
        self._nodes: dict[Output, Any] = {batch: self._batch}
        self._attributes: dict[str, Any] = {}
        self._constants: dict[str, Tensor] = {}

    def build(self, calls: Sequence[int], result: Any) -> Block:
        """Return the block."""
        for number in calls:
            if _is_on_images(self._trace.calls[number]):
                self._add(number)
        self._graph.output(map_values(self._node, result))
        return Block(self._graph, self._attributes, self._constants)

    def _add(self, number: int) -> Any:
        """Add a call to the graph."""
        call = self._trace.calls[number]
        assert call is not None
        args, kwargs = map_values(self._node, (call.args, call.kwargs))
        for output in _outputs_in((call.args, call.kwargs)):
            for modifier in self._trace.modifiers.get(output.call, ()):
                if modifier < number and Output(modifier) not in self._nodes:
                    self._add(modifier)
        function = call.function
        if isinstance(function, str):
            self._attributes[function] = self._model.get_submodule(function)
            node = self._graph.call_module(function, args, kwargs)
        elif id(function) in METHODS:
            name = METHODS[id(function)]
            # A view of a tensor in another memory format may be impossible.
            name = "reshape" if name == "view" else name
            node = self._graph.call_method(name, args, kwargs)
        elif function.__name__ == "__get__":
            name = _function_name(function)
            node = self._graph.call_function(getattr, (*args, name))
        else:
            node = self._graph.call_function(function, args, kwargs)
        self._nodes[Output(number)] = node
        return node

    def _node(self, value: Any) -> Any:
        """Return the node of an argument; anything else is returned unchanged."""
        if isinstance(value, Output):
            return self._output(value)
        if isinstance(value, Weight):
            getter = operator.attrgetter(value.name)
            self._attributes[value.name] = getter(self._model)
            return self._graph.get_attr(value.name)
        if isinstance(value, Constant):
            self._constants[value.name] = self._trace.constants[value.name]
            return self._graph.get_attr(value.name)
        if value == TRAINING:
            return self._graph.get_attr("training")
        if isinstance(value, Setting):
            return self._graph.call_function(getattr, (self._batch, value.name))
        if isinstance(value, BatchSize):
            size = self._graph.call_method("size", (self._batch, 0))
            scaled = self._graph.call_function(operator.mul, (size, value.factor))
            return self._graph.call_function(operator.add, (scaled, value.offset))
        return value

    def _output(self, output: Output) -> Any:
        """Return the node of the output of a call.

        Functions of weights are called where their results are needed.
        """
        if output in self._nodes:
            return self._nodes[output]
        if not output.keys:
            return self._add(output.call)
        *keys, key = output.keys
        whole = self._output(Output(output.call, tuple(keys)))
        node = self._graph.call_function(operator.getitem, (whole, key))
        self._nodes[output] = node
        return node

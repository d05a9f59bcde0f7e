"""Tracing: any network as a sequence of blocks.

The blocks are separated by the bottlenecks of the dataflow. After some calls of the
forward pass, exactly one tensor is needed by all calls that follow: there, the network
can be cut. Inside of a residual connection, a dense block or parallel branches two
tensors are needed, so there is no cut. Run one after the other, the blocks make the
same calls as the network.

The forward pass is recorded several times, since code of Python leaves no trace: what
differs between the recordings is what the code depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skltl.networks._alignment import (
    DTYPE,
    N_IMAGES,
    OTHER_DTYPE,
    OTHER_N_IMAGES,
    Alignment,
    align,
    modules_that_differ,
)
from skltl.networks._recording import (
    BATCH,
    Call,
    Output,
    Recording,
    Source,
    TraceError,
    Weight,
    function_name,
    map_values,
    outputs_in,
    part_of,
    record,
    storage_of,
    tensors_in,
    weights_of,
)

# Methods whose output is a view of their input, or a copy if its memory format forbids.
RESHAPING = frozenset(
    (
        *("view", "view_as", "reshape", "reshape_as"),
        *("flatten", "unflatten", "ravel"),
    )
)


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
    is_between_modules: bool = True


@dataclass(frozen=True, eq=False)
class Trace:
    """The calls of a network, and where it can be cut.

    `calls` has ``None`` in place of calls without effect, and of constants, whose
    values are in `constants`. `ends` has the number of the last call of each module,
    and `modifiers`, for a call that depends on no image, those of the calls that modify
    its output. `reshaped` are calls that reshape a tensor whose memory is modified
    later. `error` is the reason if the forward pass fails for images of this size; then
    it ends there.
    """

    calls: tuple[Call | None, ...]
    result: Any
    cut_points: tuple[CutPoint, ...]
    ends: dict[str, int]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    modifiers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    reshaped: frozenset[int] = frozenset()
    is_trainable: bool = True
    error: Exception | None = None


def trace(
    model: nn.Module, image_shape: tuple[int, int, int], reference: Trace | None = None
) -> Trace:
    """Trace a network for images (c, h, w) of one size; nothing is computed.

    Images may be too small, and vanish in the network. With a `reference`, the trace
    for images of a suitable size, the result then ends before that.
    """
    small, large, aligned = _recordings(model, image_shape, reference is not None)
    calls, error = aligned.calls, small.error
    for number in _unused(small, calls, aligned.result, reference):
        calls[number] = None
    ends = _last_calls(small, calls)
    if error is None:
        found = _bottlenecks(calls, aligned.result, model)
    else:
        assert reference is not None
        found = _known_bottlenecks(calls, reference, error)
    places = [place for place in found if _is_batch(place[1], small, large)]
    return Trace(
        tuple(calls),
        aligned.result,
        tuple(_named_cut_points(model, small, places, ends)),
        ends,
        aligned.constants,
        _modifiers(small, calls),
        _reshaped(small),
        aligned.is_trainable,
        error,
    )


def _recordings(
    model: nn.Module, image_shape: tuple[int, int, int], may_fail: bool
) -> tuple[Recording, Recording, Alignment]:
    """Return recordings for different numbers of images, and what all have in common.

    Stochastic layers, and whatever else differs between the modes, are kept whole: a
    block calls them as the network does, in either mode.
    """
    small = record(model, image_shape, N_IMAGES, DTYPE)
    if small.error is not None and not may_fail:
        raise small.error
    trained = record(model, image_shape, N_IMAGES, DTYPE, training=True)
    whole = modules_that_differ(small, trained) - {""}
    if whole:
        small = record(model, image_shape, N_IMAGES, DTYPE, whole=whole)
        trained = record(
            model, image_shape, N_IMAGES, DTYPE, training=True, whole=whole
        )
    if small.error is None and not isinstance(small.result, Output):
        raise TraceError(
            f"it returns a {type(small.result).__name__}, and not one tensor"
        )
    large = record(model, image_shape, OTHER_N_IMAGES, OTHER_DTYPE, whole=whole)
    try:
        return small, large, align(small, large, trained)
    except TraceError:  # it may cast tensors to float32, or use properties of the dtype
        large = record(model, image_shape, OTHER_N_IMAGES, DTYPE, whole=whole)
        return small, large, align(small, large, trained)


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
            last_use |= dict.fromkeys(outputs_in((call.args, call.kwargs)), number)
    last_use |= dict.fromkeys(outputs_in(result), len(calls))
    produced: dict[int, set[Output]] = {}
    for output in last_use:
        produced.setdefault(output.call, set()).add(output)
    users: dict[str, list[int]] = {}
    for number, names in weights_by_call(calls, model).items():
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


def weights_by_call(
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
        number: used for number, used in by_call.items() if is_on_images(calls[number])
    }


def _unused(
    recording: Recording,
    calls: Sequence[Call | None],
    result: Any,
    reference: Trace | None,
) -> list[int]:
    """Return the calls on images without effect, such as an auxiliary output.

    If the forward pass fails, they are those of a reference.
    """
    if recording.error is not None:
        known = () if reference is None else reference.calls[: len(calls)]
        return [number for number, call in enumerate(known) if call is None]
    used, unused = {output.call for output in outputs_in(result)}, []
    for number, call in reversed(list(enumerate(calls))):
        if call is None:
            continue
        if number in used or recording.calls[number].modified or not is_on_images(call):
            used |= {one.call for one in outputs_in((call.args, call.kwargs))}
        else:
            unused.append(number)
    return unused


def _is_batch(output: Output, small: Recording, large: Recording) -> bool:
    """Return whether a tensor has one entry per image, of one shape."""
    one, other = (
        part_of(recording.calls[output.call].output, output.keys)
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
        numbers = [n for n in range(start, stop) if is_on_images(calls[n])]
        if numbers:
            ends[path] = numbers[-1]
    return ends


def is_on_images(call: Call | None) -> bool:
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


def _reshaped(recording: Recording) -> frozenset[int]:
    """Return the calls that reshape a tensor, in whose memory others write later."""
    last_write = {
        storage_of(tensor): number
        for number, call in enumerate(recording.calls)
        for tensor in call.modified
    }
    return frozenset(
        number
        for number, call in enumerate(recording.calls)
        if not isinstance(call.function, str)
        and function_name(call.function) in RESHAPING
        and any(
            last_write.get(storage_of(tensor), -1) > number
            for tensor in tensors_in(call.output)
        )
    )


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
    own = {path for path in ends if not is_plain_sequence(model.get_submodule(path))}
    spans = [(start, ends[path]) for path, start, _ in recording.spans if path in own]
    taken = set(ends)
    for number, tensor in places:
        paths = paths_by_call.get(number, [])
        outermost = [path for path in paths if path in own] or paths
        name = (outermost or [_name_of(recording.calls[number], taken)])[-1]
        taken.add(name)
        shape = part_of(recording.calls[tensor.call].output, tensor.keys).shape[1:]
        is_between = not any(start <= number < end for start, end in spans)
        yield CutPoint(name, tuple(paths), number, tensor, tuple(shape), is_between)


def is_plain_sequence(module: nn.Module) -> bool:
    """Return whether a module runs its children one after the other."""
    return type(module).forward is nn.Sequential.forward


def _name_of(call: Call, taken: Set[str]) -> str:
    """Return a name for a call that ends no module, such as ``"layer1.0.add"``."""
    name = call.function
    if not isinstance(name, str):
        name = f"{call.module}.{function_name(call.function)}".lstrip(".")
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)

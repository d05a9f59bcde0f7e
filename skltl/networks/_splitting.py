"""Splitting: a traced network as blocks, which share its weights."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from skltl.networks._alignment import TRAINING, BatchSize, Constant, Setting
from skltl.networks._blocks import Block
from skltl.networks._recording import (
    BATCH,
    Output,
    Weight,
    function_name,
    map_values,
    outputs_in,
)
from skltl.networks._trace import CutPoint, Trace, is_on_images, weights_by_call

# The names of the methods of tensors.
METHODS = {
    method: name
    for name, method in inspect.getmembers(Tensor, callable)
    if method.__hash__ is not None
}


def cut_points_before(
    trace: Trace, model: nn.Module, head: Sequence[str]
) -> tuple[CutPoint, ...]:
    """Return the cut points before the head, given by paths of modules and weights."""
    prefixes = tuple(f"{path}." for path in head)
    for number, names in weights_by_call(trace.calls, model).items():
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
            if is_on_images(self._trace.calls[number]):
                self._add(number)
        self._graph.output(map_values(self._node, result))
        return Block(self._graph, self._attributes, self._constants)

    def _add(self, number: int) -> Any:
        """Add a call to the graph."""
        call = self._trace.calls[number]
        assert call is not None
        if number in self._trace.reshaped:
            self._make_contiguous(call.args[0])
        args, kwargs = map_values(self._node, (call.args, call.kwargs))
        for output in outputs_in((call.args, call.kwargs)):
            for modifier in self._trace.modifiers.get(output.call, ()):
                if modifier < number and Output(modifier) not in self._nodes:
                    self._add(modifier)
        function = call.function
        if isinstance(function, str):
            self._attributes[function] = self._model.get_submodule(function)
            node = self._graph.call_module(function, args, kwargs)
        elif function in METHODS:
            name = METHODS[function]
            # A view of a tensor in another memory format may be impossible.
            is_of_dtype = any(
                isinstance(one, (torch.dtype, Setting)) for one in call.args
            )
            name = "reshape" if name == "view" and not is_of_dtype else name
            node = self._graph.call_method(name, args, kwargs)
        elif function.__name__ == "__get__":
            name = function_name(function)
            node = self._graph.call_function(getattr, (*args, name))
        else:
            node = self._graph.call_function(function, args, kwargs)
        self._nodes[Output(number)] = node
        return node

    def _make_contiguous(self, output: Any) -> None:
        """Use a contiguous tensor in place of an output, so that its views are views.

        What is written into a view must reach the tensor in any memory format.
        """
        if isinstance(output, Output):
            node = self._output(output)
            self._nodes[output] = self._graph.call_method("contiguous", (node,))

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

"""Blocks: parts of a network that run one after the other, as modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

ACTIVATIONS = {
    *("relu", "relu6", "leakyrelu", "prelu", "elu", "selu", "celu"),
    *("gelu", "gelutanh", "silu", "swish", "mish", "hardswish", "hardtanh"),
    *("sigmoid", "hardsigmoid", "logsigmoid", "tanh", "softplus", "softsign"),
}


class Block(nn.Module):
    """A part of a network: a function of one tensor that returns one tensor.

    The function is a graph, which refers to layers, weights and constants by the names
    that they have in the network: the state dict of a block is a part of that of the
    network. They are shared with the network, not copied.

    Unlike ``torch.fx.GraphModule``, blocks are of one class, print nothing on errors,
    and exclude constants from the state dict. Their own attributes are private, since
    networks name their layers freely.
    """

    def __init__(
        self,
        graph: fx.Graph,
        attributes: Mapping[str, nn.Module | Tensor],
        constants: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        for name in sorted(attributes, key=lambda name: name.count(".")):
            _set_attribute(self, name, attributes[name])
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self._block_graph = graph
        self._block_function = _compiled(graph)

    def forward(self, batch: Tensor) -> Tensor:
        """Return the output of the block."""
        output: Tensor = self._block_function(self, batch)
        return output


def _set_attribute(module: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Set a nested attribute, in containers that are made where there are none."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    if isinstance(value, nn.Module):
        module.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_buffer(last, value)


def _compiled(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a graph as a function of the module that has its attributes."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)  # code that torch writes, as for its own graph modules
    function: Callable[[nn.Module, Tensor], Tensor] = names["forward"]
    return function


def graph_of(block: Block) -> fx.Graph:
    """Return the graph of a block, which must not be modified."""
    return block._block_graph


def layers_of(block: Block) -> dict[str, nn.Module]:
    """Return the layers of a block by their paths in the network."""
    calls = graph_of(block).find_nodes(op="call_module")
    return {call.target: block.get_submodule(call.target) for call in calls}


def functions_of(block: Block) -> list[Any]:
    """Return the functions that a block calls, and the names of methods of tensors."""
    ops = ("call_function", "call_method")
    return [node.target for node in graph_of(block).nodes if node.op in ops]


def function_names(block: Block) -> set[str]:
    """Return the names of the functions and methods that a block calls."""
    return {getattr(one, "__name__", str(one)) for one in functions_of(block)}


def uses_layer_norm(blocks: Iterable[Block]) -> bool:
    """Return whether any block normalizes the channels of each image."""
    names = {"layernorm", "rmsnorm", "layernorm2d"}
    return any(names & _operations(block) for block in blocks)


def is_activation(block: Block) -> bool:
    """Return whether a block applies an activation function, and nothing else."""
    return _operations(block) <= ACTIVATIONS


def _operations(block: Block) -> set[str]:
    """Return names of the functions and modules of a block, in lower case.

    ``nn.LayerNorm`` and ``functional.layer_norm`` have the same name.
    """
    layers = layers_of(block).values()
    kinds = {type(one).__name__ for layer in layers for one in layer.modules()}
    names = kinds | function_names(block)
    return {name.replace("_", "").lower() for name in names}


def source_of(block: Block) -> str:
    """Return the function of a block as Python code."""
    return graph_of(block).python_code("self").src


def constants_of(block: Block) -> dict[str, Tensor]:
    """Return the constants of a block."""
    saved = block.state_dict()
    buffers = block.named_buffers(recurse=False)
    return {name: value for name, value in buffers if name not in saved}


def parts_of(
    blocks: Sequence[Block],
) -> tuple[fx.Graph, dict[str, Any], dict[str, Tensor]]:
    """Return what makes one block of consecutive ones: graph, attributes, constants.

    The graph is new, and may be modified.
    """
    graph = fx.Graph()
    output: Any = graph.placeholder("batch")
    attributes: dict[str, Any] = {}
    constants: dict[str, Tensor] = {}
    for block in blocks:
        (batch,) = graph_of(block).find_nodes(op="placeholder")
        output = graph.graph_copy(graph_of(block), {batch: output})
        own = constants_of(block)
        weights = graph_of(block).find_nodes(op="get_attr")
        names = {node.target for node in weights} - own.keys() - {"training"}
        attributes |= layers_of(block)
        attributes |= {name: operator.attrgetter(name)(block) for name in names}
        constants |= own
    graph.output(output)
    return graph, attributes, constants

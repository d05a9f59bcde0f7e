"""Main layers of a network that has no names for them, or lacks some of the last ones.

They are the outer modules that return feature maps or tokens, what follows the last of
them on the same grid, such as the final norm of a transformer, and the vector before
the logits.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from skltl.networks._blocks import is_activation
from skltl.networks._layouts import Layout
from skltl.networks._network import ImageSize, Model, Network, state_of
from skltl.networks._recording import CONTAINERS
from skltl.networks._sequence import around


def find_layers(
    network: Network, model: Model, image_size: ImageSize
) -> dict[str, str]:
    """Return the main layers of a network, by their names, and their blocks."""
    layers, names = dict(network.layers), list(network.blocks)
    if 2 * len(layers) <= len(model.layers):  # most are inside of blocks
        layers = _outer_layers(network, model.module)
    last = max((names.index(block) for block in layers.values()), default=-1)
    # The output of a network without a head is a layer, whatever computes it.
    is_all = not (model.head or model.layers or model.last_block)
    final = _final_map(network, last, is_all)
    layout = network.layouts[names[final]]
    if final > last:
        # It has the place of the last one, unless that is a layer of its own.
        if layout.n_channels == network.layouts[names[last]].n_channels:
            layers = {key: one for key, one in layers.items() if one != names[last]}
        layers[names[final]] = names[final]
    ends_with_vector = network.layouts[names[-1]].is_vector
    if ends_with_vector and _have_weights(network, names[final + 1 :]):
        if _is_early(layout, model, image_size):
            layers = {}  # later feature maps are parallel: only the vector is left
        layers[names[-1]] = names[-1]
    return layers or {names[-1]: names[-1]}


def _outer_layers(network: Network, module: nn.Module) -> dict[str, str]:
    """Return the outer modules with a grid, and their children, as main layers."""
    found: dict[str, str] = {}
    for path, _ in module.named_modules():
        block = network.paths.get(path, "")
        layout = network.layouts.get(block)
        has_grid = layout is not None and layout.grid not in (None, (1, 1))
        if has_grid and _n_parents(module, path) <= 1:
            found[block] = min(path, found.get(block, path), key=len)
    return {found[block]: block for block in network.blocks if block in found}


def _n_parents(network: nn.Module, path: str) -> int:
    """Return how many modules, containers aside, a path is inside of."""
    modules = map(network.get_submodule, around(path)[:-1])
    return sum(not isinstance(module, CONTAINERS) for module in modules)


def _final_map(network: Network, last: int, is_all: bool) -> int:
    """Return the position of the last block on the grid of the last main layer.

    Unless `is_all`, it has weights, or is an activation function right after the one
    that does. After such a block, the order of the axes may change, too.
    """
    final, names = last, list(network.blocks)
    for number in range(last + 1, len(names)):
        name = names[number]
        layout, before = network.layouts[name], network.layouts[names[final]]
        is_next = number == final + 1
        if layout.grid == before.grid and (
            is_all
            or _have_weights(network, [name])
            or (is_next and is_activation(network.blocks[name]))
            or (is_next and final > last and _is_rearranged(layout, before))
        ):
            final = number
    return final


def _is_rearranged(one: Layout, other: Layout) -> bool:
    """Return whether two outputs differ at most in the order of their axes."""
    return (one.map_shape, one.n_prefix) == (other.map_shape, other.n_prefix)


def _have_weights(network: Network, names: Iterable[str]) -> bool:
    """Return whether any of the blocks has weights."""
    return bool(state_of(network.blocks[name] for name in names))


def _is_early(layout: Layout, model: Model, image_size: ImageSize) -> bool:
    """Return whether a feature map is far from the last one, or there is none."""
    if layout.grid is None:
        return True
    return min(layout.grid) * (model.stride or 1) >= 2 * max(image_size)

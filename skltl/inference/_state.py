"""Persistence: fitted networks as plain data, for the pickles of estimators.

A state holds numpy arrays, names and text, except for a `Backbone` of the user. With
it go the versions that wrote it and the structure of the network, so that loading
into another network of the same name is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skltl.exceptions import WeightsError
from skltl.inference._frozen import FrozenPrefix
from skltl.networks import (
    Backbone,
    build_skeleton,
    get_backbone,
    load_state,
    state_of,
    structure,
    truncate,
    versions,
)

State = dict[str, Any]


def prefix_state(backbone: Backbone, prefix: FrozenPrefix, by_name: bool) -> State:
    """Return a frozen prefix, and its backbone or the backbone's name, as a state.

    Weights equal to those of the network that a backbone owns are left out, since they
    are saved with the backbone.
    """
    weights = state_of(prefix.blocks)
    has_own = not by_name and backbone.own_network is not None
    if has_own:
        own = _own_state(backbone)
        weights = {
            key: value
            for key, value in weights.items()
            if key not in own or not _is_same(value, own[key])
        }
    return {
        "versions": versions(),
        "backbone": backbone.name if by_name else backbone,
        "blocks": list(prefix.blocks),
        "structure": None if has_own else structure(prefix.blocks),
        "weights": {key: value.numpy() for key, value in weights.items()},
    }


def prefix_from_state(state: State) -> tuple[Backbone, FrozenPrefix]:
    """Build the backbone and the frozen prefix of a state; refuse another network."""
    backbone = get_backbone(state["backbone"])
    own = backbone.own_network
    if own is not None and not state["weights"] and state["structure"] is None:
        return backbone, FrozenPrefix(truncate(own.blocks, state["blocks"]))
    blocks = build_skeleton(backbone).blocks
    if not set(state["blocks"]) <= blocks.keys():
        raise _another_network(backbone, "it has other blocks", state)
    blocks = truncate(blocks, state["blocks"])
    _check_structure(backbone, blocks, state)
    _check_shapes(backbone, blocks, state)
    weights = {key: as_tensor(value) for key, value in state["weights"].items()}
    load_state(blocks, {**_own_state(backbone), **weights})
    return backbone, FrozenPrefix(blocks)


def head_state(head: nn.Sequential) -> State:
    """Return a network's own head as a state."""
    return {
        "versions": versions(),
        "structure": structure({"head": head}),
        "weights": {key: value.numpy() for key, value in head.state_dict().items()},
    }


def head_from_state(backbone: Backbone, state: State, n_classes: int) -> nn.Sequential:
    """Build a network's own head from a state; refuse another one."""
    weights = {key: as_tensor(value) for key, value in state["weights"].items()}
    shapes = {key: value.shape for key, value in weights.items()}
    head = nn.Sequential(*build_skeleton(backbone).head.values())
    if shapes != {key: value.shape for key, value in head.state_dict().items()}:
        head = nn.Sequential(*build_skeleton(backbone, n_classes).head.values())
    _check_structure(backbone, {"head": head}, state)
    head.load_state_dict(weights, assign=True)
    return head.requires_grad_(False)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Copy an array to a tensor on the CPU, whatever the user's default device is."""
    return torch.tensor(array, device="cpu")


def _own_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return the state dict of the network that a backbone owns, if any."""
    own = backbone.own_network
    return {} if own is None else state_of(own.blocks)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors are equal bit for bit: NaN is NaN, and 0 is not -0."""
    return one.shape == other.shape and (
        one.data_ptr() == other.data_ptr()
        or one.numpy().tobytes() == other.numpy().tobytes()
    )


def _check_structure(
    backbone: Backbone, blocks: Mapping[str, nn.Module], state: State
) -> None:
    """Refuse blocks with other layers or settings than those of a state.

    Another version of torch may know more settings of a layer: settings are compared
    as far as both versions have them.
    """
    if state["structure"] is None:  # the backbone itself was saved
        return
    there, here = state["structure"], structure(blocks)
    for (path, kind, _), (path_here, kind_here, _) in zip(there, here, strict=False):
        if (path, kind) != (path_here, kind_here):
            difference = f"{path!r} was a {kind}, and {path_here!r} is a {kind_here}"
            raise _another_network(backbone, difference, state)
    if len(there) != len(here):
        difference = f"it had {len(there)} layers, and has {len(here)}"
        raise _another_network(backbone, difference, state)
    is_same_version = state["versions"] == versions()
    for (path, _, before), (_, _, now) in zip(there, here, strict=True):
        both = before.keys() & now.keys()
        for name in sorted(before.keys() | now.keys() if is_same_version else both):
            was, is_now = before.get(name), now.get(name)
            if was != is_now:
                difference = f"{name} of {path!r} was {was}, and is {is_now}"
                raise _another_network(backbone, difference, state)


def _check_shapes(
    backbone: Backbone, blocks: Mapping[str, nn.Module], state: State
) -> None:
    """Refuse blocks whose weights have other shapes than those of a state."""
    shapes = {key: tuple(one.shape) for key, one in state_of(blocks).items()}
    saved = {key: array.shape for key, array in state["weights"].items()}
    if state["structure"] is None:  # weights that the backbone owns were left out
        shapes = {key: shape for key, shape in shapes.items() if key in saved}
    for key in shapes | saved:
        if shapes.get(key) != saved.get(key):
            difference = f"{key!r} has another shape"
            raise _another_network(backbone, difference, state)


def _another_network(backbone: Backbone, difference: str, state: State) -> WeightsError:
    """Return the error for a state of another network."""
    return WeightsError(
        f"The backbone {backbone.name!r} is another network here than it was where the "
        f"estimator was saved: {difference}. Register the same one before loading. It "
        f"was saved with {_as_text(state['versions'])}; here are "
        f"{_as_text(versions())}."
    )


def _as_text(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())

"""Fitted networks as plain data, and back: what a pickle of an estimator holds."""

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
    cut,
    get_backbone,
    load_state,
    state_of,
    structure,
    versions,
)

State = dict[str, Any]


def prefix_state(backbone: Backbone, prefix: FrozenPrefix, by_name: bool) -> State:
    """Return a prefix as plain data.

    Parameters
    ----------
    backbone : Backbone
        What it is a prefix of.
    prefix : FrozenPrefix
        The blocks.
    by_name : bool
        Whether only the backbone's name is kept, and not the backbone. Weights that a
        backbone keeps itself are left out then; of others the structure is kept, so
        that another network of this name is noticed.

    Returns
    -------
    dict
        Arrays by block and torch's name, and what is needed to check them.
    """
    weights = state_of(prefix.blocks)
    has_own = not by_name and backbone.own_network is not None
    if has_own:
        kept = _own_state(backbone)
        weights = {
            key: value
            for key, value in weights.items()
            if key not in kept or not _is_same(value, kept[key])
        }
    return {
        "backbone": backbone.name if by_name else backbone,
        "blocks": list(prefix.blocks),
        "weights": {key: value.numpy() for key, value in weights.items()},
        "structure": None if has_own else structure(prefix.blocks),
        "versions": versions(),
    }


def prefix_from_state(state: State) -> tuple[Backbone, FrozenPrefix]:
    """Build a prefix again from what `prefix_state` gave.

    Raises
    ------
    UnknownBackboneError
        If the backbone's name is not known here.
    WeightsError
        If the backbone of this name is another network here than where it was saved.
    """
    backbone = get_backbone(state["backbone"])
    own = backbone.own_network
    if own is not None and not state["weights"] and state["structure"] is None:
        return backbone, FrozenPrefix(cut(own.blocks, state["blocks"]))
    blocks = build_skeleton(backbone).blocks
    is_known = set(state["blocks"]) <= blocks.keys()
    if is_known:
        blocks = cut(blocks, state["blocks"])
    difference = _difference(state, blocks) if is_known else "it has other blocks"
    if difference:
        raise _other_network(backbone, difference, state)
    weights = {key: as_tensor(value) for key, value in state["weights"].items()}
    load_state(blocks, {**_own_state(backbone), **weights})
    return backbone, FrozenPrefix(blocks)


def head_state(head: nn.Sequential) -> State:
    """Return a network's own head as plain data."""
    return {
        "weights": {key: value.numpy() for key, value in head.state_dict().items()},
        "structure": structure({"head": head}),
        "versions": versions(),
    }


def head_from_state(backbone: Backbone, state: State, n_classes: int) -> nn.Sequential:
    """Build a network's own head again, from what `head_state` gave.

    Raises
    ------
    WeightsError
        If the backbone has another head here than it had where it was saved.
    """
    weights = {key: as_tensor(value) for key, value in state["weights"].items()}
    shapes = {key: value.shape for key, value in weights.items()}
    head = nn.Sequential(*build_skeleton(backbone).head.values())
    if shapes != {key: value.shape for key, value in head.state_dict().items()}:
        head = nn.Sequential(*build_skeleton(backbone, n_classes).head.values())
    difference = _difference_in_structure(state, {"head": head})
    if difference:
        raise _other_network(backbone, f"in its head, {difference}", state)
    head.load_state_dict(weights, assign=True)
    return head.requires_grad_(False)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Copy an array to a tensor on the CPU, whatever the user's default device is."""
    return torch.tensor(array, device="cpu")


def _own_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return the weights that a backbone keeps itself, if it does."""
    own = backbone.own_network
    return {} if own is None else state_of(own.blocks)


def _is_same(one: Tensor, other: Tensor) -> bool:
    # Bit for bit, so that NaN is NaN, and 0 is not -0.
    return one.shape == other.shape and (
        one.data_ptr() == other.data_ptr()
        or one.numpy().tobytes() == other.numpy().tobytes()
    )


def _other_network(backbone: Backbone, difference: str, state: State) -> WeightsError:
    return WeightsError(
        f"The backbone {backbone.name!r} is another network here than it was where the "
        f"estimator was saved: {difference}. Register the same one before loading. It "
        f"was saved with {_in_words(state['versions'])}; here are "
        f"{_in_words(versions())}."
    )


def _difference(state: State, blocks: Mapping[str, nn.Module]) -> str:
    """Say in what way blocks differ from those that were saved; nothing if in none."""
    found = (
        "" if state["structure"] is None else _difference_in_structure(state, blocks)
    )
    return found or _difference_in_shape(state, blocks)


def _difference_in_structure(state: State, blocks: Mapping[str, nn.Module]) -> str:
    """Compare layers and their settings.

    A newer version of torch may have given a layer a further setting: with other
    versions, only what both know is compared.
    """
    there, here = state["structure"], structure(blocks)
    for (path, kind, _), (path_here, kind_here, _) in zip(there, here, strict=False):
        if (path, kind) != (path_here, kind_here):
            return f"{path!r} was a {kind}, and {path_here!r} is a {kind_here}"
    if len(there) != len(here):
        return f"it had {len(there)} layers, and has {len(here)}"
    is_all = state["versions"] == versions()
    for (path, _, before), (_, _, now) in zip(there, here, strict=True):
        names = before.keys() | now.keys() if is_all else before.keys() & now.keys()
        for name in sorted(names):
            if before.get(name) != now.get(name):
                was, is_now = before.get(name), now.get(name)
                return f"{name} of {path!r} was {was}, and is {is_now}"
    return ""


def _difference_in_shape(state: State, blocks: Mapping[str, nn.Module]) -> str:
    shapes = {key: tuple(one.shape) for key, one in state_of(blocks).items()}
    saved = {key: array.shape for key, array in state["weights"].items()}
    if state["structure"] is None:  # what the backbone has itself was left out
        shapes = {key: shape for key, shape in shapes.items() if key in saved}
    if shapes != saved:
        names = [key for key in shapes | saved if shapes.get(key) != saved.get(key)]
        return f"{names[0]!r} has another shape"
    return ""


def _in_words(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())

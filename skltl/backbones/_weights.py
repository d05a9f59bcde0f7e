"""The `weights` parameter: which numbers go into a network, and putting them there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from skltl._randomness import own_random_state, torch_defaults
from skltl.backbones._blocks import freeze, load_state, state_of
from skltl.backbones._cut_points import build_skeleton, skeleton
from skltl.backbones._files import FILE_FORMATS, fetch, read_state
from skltl.backbones._registry import get_backbone, nearest
from skltl.backbones._spec import Backbone, Network, PretrainedWeights
from skltl.exceptions import WeightsError, quote, shorten
from skltl.images import Preprocessing

DEFAULT = "imagenet"

# What `DataParallel`, `torch.compile` and Lightning modules put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.")


def resolve_weights(
    backbone: Backbone, weights: str | os.PathLike[str] | None
) -> PretrainedWeights | None:
    """Find what a `weights` parameter means for a backbone.

    Parameters
    ----------
    backbone : Backbone
        For which.
    weights : str, path or None
        ``"imagenet"``, the name of weights of this backbone (also with torchvision's
        class before it, and ``"DEFAULT"``), or a file.

    Returns
    -------
    PretrainedWeights or None
        ``None`` for random ones.

    Raises
    ------
    WeightsError
        If there are none of this name.
    """
    if weights is None:
        return None
    default = backbone.weights[0]
    if weights == DEFAULT:
        return default
    known = {name: one for one in backbone.weights for name in (one.name, *one.aliases)}
    if str(weights) in known:
        return known[str(weights)]
    path = Path(weights).expanduser()
    if isinstance(weights, os.PathLike) or path.suffix in FILE_FORMATS:
        return PretrainedWeights(path.name, path, default.preprocessing)
    names = [DEFAULT, *(one.name for one in backbone.weights)]
    raise WeightsError(
        f"Unknown weights {quote(str(weights))} for {backbone.name!r}. "
        f"{nearest(str(weights), names)} A file's name must end in "
        f"{', '.join(FILE_FORMATS)} (of a .ckpt file, save the state dict alone); None "
        "gives random weights."
    )


def resolve_network(
    backbone: str | Backbone,
    weights: str | os.PathLike[str] | None,
    image_size: int | None,
) -> tuple[Backbone, PretrainedWeights | None, Preprocessing]:
    """Find what the parameters `backbone`, `weights` and `image_size` mean together.

    Returns
    -------
    backbone : Backbone
        The record.
    weights : PretrainedWeights or None
        ``None`` for random ones.
    preprocessing : Preprocessing
        That of the weights, for pictures of this size.

    Raises
    ------
    UnknownBackboneError, WeightsError
        If they name something that is not there.
    """
    record = get_backbone(backbone)
    pretrained = resolve_weights(record, weights)
    preprocessing = (pretrained or record).preprocessing
    if image_size is not None:
        preprocessing = preprocessing.resized_to(image_size)
    return record, pretrained, preprocessing


def load_network(backbone: Backbone, weights: PretrainedWeights) -> Network:
    """Build a backbone's network with trained weights, frozen, on the CPU, in float32.

    Raises
    ------
    WeightsError
        If the file cannot be had or read, or does not fit the network. A head for
        another number of classes fits. Whether the numbers are finite is for those to
        check who know which of them they use: `check_finite`.
    """
    if weights.source is None:
        with own_random_state(0):  # a constructor may draw what it then replaces
            network = backbone.own_network or _built(backbone)
    else:
        is_url = isinstance(weights.source, str)
        path = fetch(str(weights.source)) if is_url else Path(weights.source)
        n_needed = sum(one.nbytes for one in skeleton(backbone).state().values())
        state = _without_wrapper(backbone, read_state(path, n_needed))
        state = _renamed(backbone, state)
        network = _skeleton_that_fits(backbone, state, path)
        load_state({**network.blocks, **network.head}, state)
    freeze({**network.blocks, **network.head})
    return network


def random_network(backbone: Backbone, seed: int) -> Network:
    """Build a backbone's network, frozen, with its usual random weights.

    They are those that torch draws after ``torch.manual_seed(seed)``; the state of
    torch's global generator does not change.
    """
    with own_random_state(seed):
        network = _built(backbone)
        if backbone.weights[0].source is None:
            with torch_defaults():
                _forget(network)
    freeze({**network.blocks, **network.head})
    return network


def _built(backbone: Backbone) -> Network:
    """Build a network with weights, on the CPU, in float32."""
    with torch_defaults():
        network = backbone.build(None)
    for module in (*network.blocks.values(), *network.head.values()):
        module.float()
    return network


def _forget(network: Network) -> None:
    """Exchange the weights that a network was built with for random ones."""
    for name, module in {**network.blocks, **network.head}.items():
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
            elif list(part.parameters(recurse=False)):
                raise WeightsError(
                    f"weights=None: {type(part).__name__} in {name!r} has parameters, "
                    "but no method reset_parameters() that gives them random values."
                )


def _without_wrapper(backbone: Backbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take away what wrappers put before all names, unless the backbone has it."""
    expected = skeleton(backbone).state().keys()
    while expected.isdisjoint(_renamed(backbone, state)):
        known = [one for one in WRAPPERS if all(key.startswith(one) for key in state)]
        if not known or not state:
            break
        state = {key.removeprefix(known[0]): value for key, value in state.items()}
    return state


def _renamed(backbone: Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rename = backbone.rename_keys or str
    return {
        rename(key): value
        for key, value in state.items()
        if not key.startswith(backbone.needless_keys)
    }


def _skeleton_that_fits(
    backbone: Backbone, state: dict[str, Tensor], path: Path
) -> Network:
    """Build a network without numbers, with as many classes as the state dict has."""
    expected = skeleton(backbone).state()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # files older than torch 0.4.1
            state[key] = torch.tensor(0)
    network = build_skeleton(backbone, _other_n_classes(expected, state))
    if _has_another_head(network, state):
        # A network of the user's own is not built for other classes. Its blocks serve.
        head = state_of(network.head)
        network = replace(network, head={})
        state = {key: value for key, value in state.items() if key not in head}
    _check_fit(network.state(), state, backbone, path)
    return network


def _other_n_classes(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> int | None:
    """Return for how many classes a state dict is, if not for the usual number."""
    matrices = [key for key, value in expected.items() if value.ndim > 1]
    if not matrices or state.get(matrices[-1], torch.tensor(0)).ndim < 2:
        return None
    n_classes = len(state[matrices[-1]])
    return None if n_classes == len(expected[matrices[-1]]) else n_classes


def _has_another_head(network: Network, state: Mapping[str, Tensor]) -> bool:
    head = state_of(network.head)
    return head.keys() <= state.keys() and any(
        state[key].shape != value.shape for key, value in head.items()
    )


def check_finite(blocks: Mapping[str, nn.Module], weights: PretrainedWeights) -> None:
    """Refuse blocks with weights that are not finite, or variances below 0.

    Raises
    ------
    WeightsError
        It names the first of them.
    """
    for key, value in state_of(blocks).items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{weights.source}: {key!r} holds NaN or infinity.")
        if key.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{weights.source}: {key!r} holds a negative variance.")


def _check_fit(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    backbone: Backbone,
    path: Path,
) -> None:
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    common = [key for key in expected if key in state]
    misshapen = [
        f"{shorten(key)} {tuple(state[key].shape)} instead of "
        f"{tuple(expected[key].shape)}"
        for key in common
        if state[key].shape != expected[key].shape
    ]
    mistyped = [
        f"{shorten(key)} ({state[key].dtype})"
        for key in common
        if state[key].is_floating_point() != expected[key].is_floating_point()
    ]
    faults = {
        "missing": missing,
        "not known": extra,
        "of another shape": misshapen,
        "of another type": mistyped,
    }
    said = [
        f"{len(keys)} {fault}: {_listed(keys)}"
        for fault, keys in faults.items()
        if keys
    ]
    if said:
        raise WeightsError(
            f"{path} does not fit {backbone.name!r}. Its entries: {'; '.join(said)}."
        )


def _listed(keys: list[str]) -> str:
    shown = ", ".join(shorten(key) for key in keys[:3])
    return f"{shown}{', ...' if len(keys) > 3 else ''}"

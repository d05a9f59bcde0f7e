"""One network per process, however many estimators and clones use it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from numpy.typing import NDArray
from torch import nn

from skltl._randomness import fresh_seed
from skltl.backbones._blocks import cut, load_state, state_of
from skltl.backbones._cut_points import build_skeleton, resolve_layer, skeleton
from skltl.backbones._prefix import FrozenPrefix
from skltl.backbones._spec import Backbone, PretrainedWeights
from skltl.backbones._weights import check_finite, load_network, random_network
from skltl.exceptions import WeightsError

# Enough for a search over a few backbones and their cut points; the least recently used
# ones go first. Fitted estimators keep what they use in any case.
MAX_NETWORKS = 2
MAX_PREFIXES = 8

Value = TypeVar("Value")

_networks: OrderedDict[Hashable, Mapping[str, nn.Module]] = OrderedDict()
_prefixes: OrderedDict[Hashable, FrozenPrefix] = OrderedDict()
_wholes: OrderedDict[Hashable, tuple[FrozenPrefix, nn.Sequential]] = OrderedDict()
_lock = threading.RLock()


def load_prefix(
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    wanted: Sequence[str],
) -> FrozenPrefix:
    """Return a network's blocks up to the last wanted one, loaded once per process.

    Parameters
    ----------
    backbone : Backbone
        Which network.
    weights : PretrainedWeights or None
        Its weights; ``None`` for random ones.
    seed : int or None
        Of the random ones; ``None`` draws others each time.
    wanted : sequence of str
        Blocks after which features will be taken.

    Returns
    -------
    FrozenPrefix
        The same object for the same arguments, as long as it was used lately.

    Raises
    ------
    WeightsError
        If the weights cannot be loaded, or those of the blocks are not finite.
    """
    if weights is None and seed is None:
        # A network that nobody can ask for again is not remembered.
        network = random_network(backbone, fresh_seed())
        return FrozenPrefix(cut(network.blocks, wanted))
    key = (backbone, seed if weights is None else _file_state(weights))
    deepest = list(cut(skeleton(backbone).blocks, wanted))[-1]
    with _lock:
        prefix = _recall(_prefixes, (key, deepest))
        if prefix is None:
            kept = _load_blocks(key, backbone, weights, seed, wanted)
            prefix = FrozenPrefix(cut(kept, wanted))
            _remember(_prefixes, (key, deepest), prefix, MAX_PREFIXES)
        return prefix


def load_with_head(
    backbone: Backbone, weights: PretrainedWeights | None, seed: int | None
) -> tuple[FrozenPrefix, nn.Sequential]:
    """Return a whole network: all of its blocks, and its head.

    Parameters
    ----------
    backbone : Backbone
        Which network.
    weights : PretrainedWeights or None
        Its weights; ``None`` for random ones.
    seed : int or None
        Of the random ones; ``None`` draws others each time.

    Returns
    -------
    blocks : FrozenPrefix
        Up to the head.
    head : Sequential
        From there to the logits, frozen.

    Raises
    ------
    WeightsError
        If the weights cannot be loaded or are not finite, or there is no head.
    """
    key = (backbone, seed if weights is None else _file_state(weights))
    with _lock:
        whole = _recall(_wholes, key)
        if whole is None:
            whole = _load_whole(backbone, weights, seed)
            if key[1] is not None:  # a network that can be asked for again
                _remember(_wholes, key, whole, MAX_NETWORKS)
    return whole


def _load_whole(
    backbone: Backbone, weights: PretrainedWeights | None, seed: int | None
) -> tuple[FrozenPrefix, nn.Sequential]:
    if weights is None:
        network = random_network(backbone, fresh_seed() if seed is None else seed)
    else:
        network = load_network(backbone, weights)
        check_finite({**network.blocks, **network.head}, weights)
    if not network.head:
        raise WeightsError(
            f"{backbone.name!r} with these weights has no head that tells classes "
            "apart. Its features serve all the same: see CNNFeatureTransformer."
        )
    return FrozenPrefix(network.blocks), nn.Sequential(*network.head.values())


def head_from_state(
    backbone: Backbone, state: Mapping[str, NDArray[Any]], n_classes: int
) -> nn.Sequential:
    """Build a network's own head again, from the arrays of its state dict."""
    numbers = {key: torch.tensor(value) for key, value in state.items()}
    shapes = {key: value.shape for key, value in numbers.items()}
    head = nn.Sequential(*build_skeleton(backbone).head.values())
    if shapes != {key: value.shape for key, value in head.state_dict().items()}:
        head = nn.Sequential(*build_skeleton(backbone, n_classes).head.values())
    head.load_state_dict(numbers, assign=True)
    return head


def prefix_state(prefix: FrozenPrefix) -> dict[str, NDArray[Any]]:
    """Return a prefix's numbers as numpy arrays, by block and torch's name."""
    return {key: value.numpy() for key, value in state_of(prefix.blocks).items()}


def prefix_from_state(
    backbone: Backbone, state: Mapping[str, NDArray[Any]], wanted: Sequence[str]
) -> FrozenPrefix:
    """Build a prefix again from what `prefix_state` gave.

    Raises
    ------
    WeightsError
        If the backbone of this name is another network here than where it was saved.
    """
    blocks = build_skeleton(backbone).blocks
    is_known = set(wanted) <= blocks.keys()
    blocks = cut(blocks, wanted) if is_known else blocks
    shapes = {key: tuple(value.shape) for key, value in state_of(blocks).items()}
    if not is_known or shapes != {key: array.shape for key, array in state.items()}:
        raise WeightsError(
            f"The backbone {backbone.name!r} is another network here than it was where "
            "the estimator was saved. Register the same one before loading."
        )
    load_state(blocks, {key: torch.tensor(value) for key, value in state.items()})
    return FrozenPrefix(blocks)


def _load_blocks(
    key: Hashable,
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    wanted: Sequence[str],
) -> Mapping[str, nn.Module]:
    """Return at least the wanted blocks, and in any case the convolutional ones.

    So a search over cut points loads a network once, and the fully connected layers of
    VGG-16 do not hold 500 MB for nothing.
    """
    kept = _recall(_networks, key)
    if kept is None or not set(wanted) <= kept.keys():
        if weights is None:
            network = random_network(backbone, cast(int, seed))
        else:
            network = load_network(backbone, weights)
        last = resolve_layer(backbone, "last").block
        kept = cut(network.blocks, [last, *wanted])
        if weights is not None:
            # Not the head: that of some published files holds NaN on purpose.
            check_finite(kept, weights)
        _remember(_networks, key, kept, MAX_NETWORKS)
    return kept


def _file_state(weights: PretrainedWeights) -> Hashable:
    """Name weights; those of a file change when the file does."""
    if not isinstance(weights.source, os.PathLike):
        return weights
    path = Path(weights.source)
    if not path.exists():  # the error comes when it is read
        return weights
    stat = path.stat()
    # Programs that copy files often keep the time of their last change; the time of the
    # last change of the directory entry (ctime) they cannot set.
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    return (weights, path.resolve(), stat.st_ino, stat.st_size, *times)


def _recall(memory: OrderedDict[Hashable, Value], key: Hashable) -> Value | None:
    if key in memory:
        memory.move_to_end(key)
    return memory.get(key)


def _remember(
    memory: OrderedDict[Hashable, Value], key: Hashable, value: Value, n_most: int
) -> None:
    memory[key] = value
    while len(memory) > n_most:
        memory.popitem(last=False)

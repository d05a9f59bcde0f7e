"""One network per process, however many estimators and clones use it."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar, cast
from weakref import WeakSet, WeakValueDictionary, finalize

import torch
from torch import nn

from skltl._locks import Lock
from skltl._randomness import fresh_seed
from skltl.backbones._blocks import cut
from skltl.backbones._cut_points import forget_networks, resolve_layer, skeleton
from skltl.backbones._prefix import FrozenPrefix, forget_runners
from skltl.backbones._spec import Backbone, PretrainedWeights
from skltl.backbones._weights import check_finite, load_network, random_network
from skltl.exceptions import WeightsError
from skltl.images import file_identity

# Enough for clones that come one after the other; the least recently used ones go.
# Prefixes share the weights of their network, but each is prepared to run, on a GPU
# maybe: further ones are shared only as long as an estimator holds them.
MAX_NETWORKS = 2
MAX_PREFIXES = 2

Value = TypeVar("Value")

# A backbone's token, its weights, and up to where it was asked for.
Key = tuple[str, Hashable, str]

_networks: OrderedDict[Key, Mapping[str, nn.Module]] = OrderedDict()
_prefixes: OrderedDict[Key, FrozenPrefix] = OrderedDict()
_held_prefixes: WeakValueDictionary[Key, FrozenPrefix] = WeakValueDictionary()
_wholes: OrderedDict[Key, tuple[FrozenPrefix, nn.Sequential]] = OrderedDict()
_lock = Lock()

# Backbones whose networks are forgotten when they are dropped.
_watched: WeakSet[Backbone] = WeakSet()


def load_prefix(
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    wanted: Sequence[str],
    is_shared: bool = True,
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
    is_shared : bool, default=True
        Whether random weights may be asked for again, and are worth keeping.

    Returns
    -------
    FrozenPrefix
        The same object for the same arguments, as long as it was used lately.

    Raises
    ------
    WeightsError
        If the weights cannot be loaded, or those of the blocks are not finite.
    """
    if weights is None and (seed is None or not is_shared):
        # A network that nobody can ask for again is not remembered.
        network = random_network(backbone, fresh_seed() if seed is None else seed)
        return FrozenPrefix(cut(network.blocks, wanted))
    name = seed if weights is None else _identity(weights)
    deepest = list(cut(skeleton(backbone).blocks, wanted))[-1]
    key = (backbone.token, name, deepest)
    with _lock:
        prefix = _recall(_prefixes, key) or _held_prefixes.get(key)
        if prefix is None:
            kept = _load_blocks(name, backbone, weights, seed, wanted)
            prefix = _held_prefixes[key] = FrozenPrefix(cut(kept, wanted))
        _remember(_prefixes, key, prefix, MAX_PREFIXES, backbone)
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
    name = seed if weights is None else _identity(weights)
    key = (backbone.token, name, "")
    with _lock:
        whole = _recall(_wholes, key)
        if whole is None:
            whole = _load_whole(backbone, weights, seed)
            if name is not None:  # a network that can be asked for again
                _remember(_wholes, key, whole, MAX_NETWORKS, backbone)
    return whole


def release_memory() -> None:
    """Forget all networks that skltl keeps in memory for the next time.

    Those that fitted estimators hold stay, and are prepared again when they are used.
    Networks of a `Backbone` that is dropped are forgotten anyway. Memory of a GPU that
    torch has kept for further use goes back to the system.

    See Also
    --------
    clear_cache : Delete features that are kept on disk.

    Examples
    --------
    >>> from skltl import release_memory
    >>> release_memory()
    """
    with _lock:
        for memory in (_networks, _prefixes, _wholes):
            memory.clear()
    forget_runners()
    forget_networks()
    torch.cuda.empty_cache()  # does nothing where no GPU was used


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
    head = nn.Sequential(*network.head.values())
    # A backbone's own network is never run, which may change what a layer remembers.
    is_own = backbone.own_network is not None and weights is not None
    return FrozenPrefix(network.blocks), copy.deepcopy(head) if is_own else head


def _load_blocks(
    name: Hashable,
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    wanted: Sequence[str],
) -> Mapping[str, nn.Module]:
    """Return at least the wanted blocks, and in any case the convolutional ones.

    So a search over cut points loads a network once, and the fully connected layers of
    VGG-16 do not hold 500 MB for nothing.
    """
    key = (backbone.token, name, "")
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
        _remember(_networks, key, kept, MAX_NETWORKS, backbone)
    return kept


def _identity(weights: PretrainedWeights) -> Hashable:
    """Name weights; those of a file have another name when the file changes."""
    if not isinstance(weights.source, os.PathLike):
        return weights
    return weights, file_identity(os.fspath(weights.source))


def _recall(memory: OrderedDict[Key, Value], key: Key) -> Value | None:
    if key in memory:
        memory.move_to_end(key)
    return memory.get(key)


def _remember(
    memory: OrderedDict[Key, Value],
    key: Key,
    value: Value,
    n_most: int,
    backbone: Backbone,
) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > n_most:
        memory.popitem(last=False)
    if backbone not in _watched:
        _watched.add(backbone)
        finalize(backbone, _forget, backbone.token)


def _forget(token: str) -> None:
    """Forget the networks of a backbone that no longer exists."""
    for memory in (_networks, _prefixes, _wholes):
        for key in list(memory):
            if key[0] == token:
                memory.pop(key, None)

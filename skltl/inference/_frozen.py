"""Frozen prefixes of networks: prepared to run fast, loaded once per process."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar, cast
from weakref import WeakSet, WeakValueDictionary, finalize

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.googlenet import BasicConv2d as GoogLeNetUnit
from torchvision.models.inception import BasicConv2d as InceptionUnit
from torchvision.models.resnet import BasicBlock, Bottleneck

from skltl._locks import Lock
from skltl._random import fresh_seed
from skltl.exceptions import WeightsError
from skltl.images import file_identity, normalise
from skltl.inference._engines import ends_of_segments, prepare_engine, send
from skltl.networks import (
    Backbone,
    PretrainedWeights,
    check_finite,
    children_of,
    cut,
    forget_networks,
    freeze,
    has_hooks,
    load_network,
    random_network,
    resolve_layer,
    skeleton,
)

# What modules do that run each batch-norm right behind the convolution defined before
# it. Of a module with another `forward`, subclasses of these included, the order is
# not known.
RUN_IN_ORDER = {
    kind.forward
    for kind in (nn.Sequential, BasicBlock, Bottleneck, GoogLeNetUnit, InceptionUnit)
}

# Each is a copy of the network, and lives as long as the prefix.
MAX_RUNNERS = 2

Pool = Callable[[Tensor], Tensor]

_all_prefixes: WeakSet[FrozenPrefix] = WeakSet()


def forget_runners() -> None:
    """Forget the runners of all prefixes; they are prepared again when needed."""
    for prefix in list(_all_prefixes):
        prefix.forget_runners()


class FrozenPrefix:
    """The first blocks of a network as a fixed function of images.

    Parameters
    ----------
    blocks : mapping of str to Module
        Never changed. They become frozen, and are shared by all estimators that use the
        same network.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        freeze(blocks)
        self.blocks = blocks
        self._runners: OrderedDict[Hashable, Runner] = OrderedDict()
        self._lock = Lock()
        _all_prefixes.add(self)

    def __deepcopy__(self, memo: object) -> FrozenPrefix:
        return self  # never changed: a copy of an estimator may share it

    def runner(
        self,
        device: torch.device,
        dtype: torch.dtype,
        wanted: Sequence[str],
        engine: str = "torch",
        mains: Sequence[str] = (),
    ) -> Runner:
        """Return the prefix made ready for a device and some of its blocks.

        It is prepared once for the same arguments, as long as it was used lately. See
        `Runner` for these.
        """
        key = (device, dtype, tuple(wanted), engine)
        with self._lock:
            runner = self._runners.pop(key, None)
            if runner is None:
                blocks = cut(self.blocks, wanted)
                runner = Runner(blocks, wanted, device, dtype, engine, mains)
            self._runners[key] = runner
            if len(self._runners) > MAX_RUNNERS:
                self._runners.popitem(last=False)
            return runner

    def forget_runners(self) -> None:
        """Forget what has been prepared."""
        with self._lock:
            self._runners.clear()


class Runner:
    """A frozen prefix on its device: batch-norms folded, channels last, in one dtype.

    Parameters
    ----------
    blocks : mapping of str to Module
        Frozen; they are copied.
    wanted : sequence of str
        The blocks after which features are taken.
    device : torch.device
        Where to run.
    dtype : torch.dtype
        What to compute in.
    engine : {"torch", "compile", "openvino"}, default="torch"
        What runs it.
    mains : sequence of str, default=()
        The blocks behind which main cut points lie.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        wanted: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        engine: str = "torch",
        mains: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._wanted = wanted
        ends = ends_of_segments(list(blocks), wanted, mains, engine)
        segments = {
            name: _prepared(segment, device, dtype)
            for name, segment in _segments(blocks, ends)
        }
        self._engine = prepare_engine(engine, segments, wanted, dtype)
        self._input_dtype = torch.float32 if engine == "openvino" else dtype

    def features(self, pixels: Tensor, mean: Tensor, std: Tensor, pool: Pool) -> Tensor:
        """Run a batch of images, and pool at each wanted place.

        Parameters
        ----------
        pixels : tensor of shape (n, h, w, 3)
            uint8, or float32; on the CPU or the device.
        mean, std : tensor of shape (3, 1, 1)
            Of the preprocessing, float32; on the device.
        pool : callable
            From a feature map (n, c, h, w) or vectors (n, d)
            to features (n, d), float32.

        Returns
        -------
        tensor of shape (n, d)
            The features of all wanted places, side by side, float32, on the device. A
            GPU may still be computing them.
        """
        # The user's autocast would overrule the precision that was asked for.
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
        ):
            return self._run(pixels, mean, std, pool)

    def _run(self, pixels: Tensor, mean: Tensor, std: Tensor, pool: Pool) -> Tensor:
        # Images lie in memory with their channels last:
        # this permutation copies nothing.
        batch = send(pixels, self.device).permute(0, 3, 1, 2)  # (n, 3, h, w)
        batch = normalise(batch, mean, std)
        batch = batch.to(self._input_dtype, memory_format=torch.channels_last)
        pooled = dict(self._engine(batch, pool))
        return torch.cat([pooled[name] for name in self._wanted], dim=1)


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch-norm into the convolution before it, in place.

    In evaluation mode a batch-norm is a multiplication and an addition per channel,
    which the convolution's own weights can do.
    """
    for child in module.children():
        fold_batch_norms(child)
    if type(module).forward not in RUN_IN_ORDER:
        return
    for (first, conv), (second, norm) in pairwise(children_of(module)):
        if (
            type(conv) is nn.Conv2d
            and type(norm) is nn.BatchNorm2d
            and not (has_hooks(conv) or has_hooks(norm))
        ):
            setattr(module, first, fuse_conv_bn_eval(conv, norm))
            setattr(module, second, nn.Identity())


def parts_a_fold(blocks: Mapping[str, nn.Module], name: str) -> bool:
    """Tell whether a cut after a block parts a convolution from its batch-norm.

    Then the one is not folded into the other, which changes the last digits of all that
    follows.
    """
    names = list(blocks)
    following = names[names.index(name) + 1 :][:1]
    return type(blocks[name]) is nn.Conv2d and any(
        type(blocks[next_name]) is nn.BatchNorm2d for next_name in following
    )


def _segments(
    blocks: Mapping[str, nn.Module], wanted: Sequence[str]
) -> list[tuple[str, nn.Sequential]]:
    """Group the blocks between the wanted places."""
    segments: list[tuple[str, nn.Sequential]] = []
    segment = nn.Sequential()
    for name, block in blocks.items():
        segment.append(copy.deepcopy(block))
        if name in wanted:
            segments.append((name, segment))
            segment = nn.Sequential()
    return segments


def _prepared(
    segment: nn.Sequential, device: torch.device, dtype: torch.dtype
) -> nn.Sequential:
    fold_batch_norms(segment)
    freeze({"segment": segment})  # the folded convolutions are new
    # torch's annotations of `Module.to` leave out `memory_format`.
    segment.to(  # type: ignore[call-overload]
        device, dtype, memory_format=torch.channels_last
    )
    return segment


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

"""Frozen prefixes of networks, loaded once per process and prepared to run."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
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
from skltl.images import file_identity, normalize
from skltl.inference._openvino import OpenVINOEngine
from skltl.inference._torch import compile_segment, run_segments, to_device
from skltl.networks import (
    Backbone,
    PretrainedWeights,
    check_finite,
    children_of,
    forget_networks,
    freeze,
    has_hooks,
    load_network,
    random_network,
    resolve_layer,
    skeleton,
    truncate,
)

# The `forward` of modules that run each batch-norm right after the convolution defined
# before it. With another `forward`, as in subclasses of these, the order is unknown.
RUN_IN_ORDER = {
    kind.forward
    for kind in (nn.Sequential, BasicBlock, Bottleneck, GoogLeNetUnit, InceptionUnit)
}

# Each runner is a copy of the network, and lives as long as its prefix.
MAX_RUNNERS = 2

# Enough for clones that follow one another; the least recently used ones are dropped.
# Prefixes share the weights of their network, but each is prepared to run, on a GPU
# maybe: others are shared only as long as an estimator holds them.
MAX_NETWORKS = 2
MAX_PREFIXES = 2

# From a batch (n, 3, h, w) and a pooling to the features (n, d) of each wanted block.
Engine = Callable[[Tensor, str | int], dict[str, Tensor]]

_all_prefixes: WeakSet[FrozenPrefix] = WeakSet()


class FrozenPrefix:
    """The first blocks of a network as a fixed function of images.

    The blocks are frozen here and never modified: all estimators that use the same
    network share them.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        freeze(blocks)
        self.blocks = blocks
        self._runners: OrderedDict[Hashable, Runner] = OrderedDict()
        self._lock = Lock()
        _all_prefixes.add(self)

    def __deepcopy__(self, memo: object) -> FrozenPrefix:
        return self  # immutable: a copy of an estimator may share it

    def runner(
        self,
        device: torch.device,
        dtype: torch.dtype,
        wanted: Sequence[str],
        engine: str = "torch",
        mains: Sequence[str] = (),
    ) -> Runner:
        """Return a recently used `Runner` for the same arguments, or a new one."""
        key = (device, dtype, tuple(wanted), engine)
        with self._lock:
            runner = self._runners.pop(key, None)
            if runner is None:
                blocks = truncate(self.blocks, wanted)
                runner = Runner(blocks, wanted, device, dtype, engine, mains)
            self._runners[key] = runner
            if len(self._runners) > MAX_RUNNERS:
                self._runners.popitem(last=False)
            return runner

    def forget_runners(self) -> None:
        """Drop all runners; they are prepared again when needed."""
        with self._lock:
            self._runners.clear()


class Runner:
    """Copies of frozen blocks, prepared for a device, a dtype and an engine.

    Features are taken after the `wanted` blocks; `mains` are the blocks of the main
    layers.
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
        # Eager torch computes the same wherever segments end. The others fuse what is
        # inside a segment, so theirs end at all main layers, wanted or not.
        ends = set(wanted) if engine == "torch" else {*wanted, *mains}
        segments = build_segments(blocks, ends, device, dtype)
        self._input_dtype = dtype
        self._engine: Engine = partial(run_segments, segments, wanted)
        if engine == "compile":
            compiled = {name: compile_segment(one) for name, one in segments.items()}
            self._engine = partial(run_segments, compiled, wanted)
        elif engine == "openvino":
            self._input_dtype = torch.float32
            self._engine = OpenVINOEngine(segments, wanted, dtype)

    def features(
        self, pixels: Tensor, mean: Tensor, std: Tensor, pooling: str | int
    ) -> Tensor:
        """Return the features (n, d) of all wanted blocks, side by side, in float32.

        `pixels` (n, h, w, 3) are uint8 or float32, `mean` and `std` (3, 1, 1) are on
        the device. The features are on the device, too; a GPU may still be computing
        them.
        """
        # The user's autocast would override the requested precision.
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
        ):
            # A view: in memory, images have their channels last.
            batch = to_device(pixels, self.device).permute(0, 3, 1, 2)  # (n, 3, h, w)
            batch = normalize(batch, mean, std)
            batch = batch.to(self._input_dtype, memory_format=torch.channels_last)
            features = self._engine(batch, pooling)
            return torch.cat([features[name] for name in self._wanted], dim=1)


def build_segments(
    blocks: Mapping[str, nn.Module],
    ends: set[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, nn.Sequential]:
    """Copy blocks to a device as segments, with batch-norms folded, channels last.

    A segment is named by the block at its end.
    """
    segments = {}
    segment = nn.Sequential()
    for name, block in blocks.items():
        segment.append(copy.deepcopy(block))
        if name in ends:
            fold_batch_norms(segment)
            freeze({name: segment})  # the folded convolutions are new
            # torch's annotations of `Module.to` leave out `memory_format`.
            segment.to(  # type: ignore[call-overload]
                device, dtype, memory_format=torch.channels_last
            )
            segments[name] = segment
            segment = nn.Sequential()
    return segments


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch-norm into the weights of the convolution before it, in place.

    In eval mode a batch-norm multiplies each channel and adds to it.
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


def is_before_batch_norm(blocks: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether a block is a convolution that the next block's batch-norm follows.

    If a segment ends between them they are not folded, which changes the last digits of
    everything after.
    """
    names = list(blocks)
    following = names[names.index(name) + 1 :][:1]
    return type(blocks[name]) is nn.Conv2d and any(
        type(blocks[next_name]) is nn.BatchNorm2d for next_name in following
    )


Value = TypeVar("Value")

# The token of a backbone, the identity of its weights, and the last block.
Key = tuple[str, Hashable, str]

_networks: OrderedDict[Key, Mapping[str, nn.Module]] = OrderedDict()
_prefixes: OrderedDict[Key, FrozenPrefix] = OrderedDict()
_held_prefixes: WeakValueDictionary[Key, FrozenPrefix] = WeakValueDictionary()
_wholes: OrderedDict[Key, tuple[FrozenPrefix, nn.Sequential]] = OrderedDict()
_lock = Lock()

# Backbones whose networks are dropped with them.
_watched: WeakSet[Backbone] = WeakSet()


def load_prefix(
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    wanted: Sequence[str],
    is_shared: bool = True,
) -> FrozenPrefix:
    """Load the blocks of a network up to the last wanted one, once per process.

    ``weights=None`` draws random weights from `seed`; without a seed, or with
    ``is_shared=False``, they cannot be requested again, and are not kept.
    """
    if weights is None and (seed is None or not is_shared):
        network = random_network(backbone, fresh_seed() if seed is None else seed)
        return FrozenPrefix(truncate(network.blocks, wanted))
    identity = seed if weights is None else _identity(weights)
    deepest = list(truncate(skeleton(backbone).blocks, wanted))[-1]
    key = (backbone.token, identity, deepest)
    with _lock:
        prefix = _recall(_prefixes, key) or _held_prefixes.get(key)
        if prefix is None:
            blocks = _load_blocks(identity, backbone, weights, seed, wanted)
            prefix = _held_prefixes[key] = FrozenPrefix(truncate(blocks, wanted))
        _remember(_prefixes, key, prefix, MAX_PREFIXES, backbone)
        return prefix


def load_with_head(
    backbone: Backbone, weights: PretrainedWeights | None, seed: int | None
) -> tuple[FrozenPrefix, nn.Sequential]:
    """Load all blocks of a network, and its own head, frozen, once per process."""
    identity = seed if weights is None else _identity(weights)
    key = (backbone.token, identity, "")
    with _lock:
        whole = _recall(_wholes, key)
        if whole is None:
            whole = _load_whole(backbone, weights, seed)
            if identity is not None:  # it can be requested again
                _remember(_wholes, key, whole, MAX_NETWORKS, backbone)
    return whole


def release_memory() -> None:
    """Release the networks that skltl keeps in memory for later use.

    Networks of fitted estimators stay, and are prepared again when they are used.
    Networks of a `Backbone` are released with the `Backbone` in any case. GPU memory
    that torch keeps for later use is returned to the system.

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
    for prefix in list(_all_prefixes):
        prefix.forget_runners()
    forget_networks()
    torch.cuda.empty_cache()  # does nothing where no GPU was used


def _load_whole(
    backbone: Backbone, weights: PretrainedWeights | None, seed: int | None
) -> tuple[FrozenPrefix, nn.Sequential]:
    """Build all blocks of a network and its own head; refuse one without a head."""
    if weights is None:
        network = random_network(backbone, fresh_seed() if seed is None else seed)
    else:
        network = load_network(backbone, weights)
        check_finite({**network.blocks, **network.head}, weights)
    if not network.head:
        raise WeightsError(
            f"{backbone.name!r} with these weights has no head, which classification "
            "needs. CNNFeatureTransformer extracts its features without one."
        )
    head = nn.Sequential(*network.head.values())
    # The modules that a backbone owns are never run: a layer may modify itself.
    is_own = backbone.own_network is not None and weights is not None
    return FrozenPrefix(network.blocks), copy.deepcopy(head) if is_own else head


def _load_blocks(
    identity: Hashable,
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    wanted: Sequence[str],
) -> Mapping[str, nn.Module]:
    """Return the wanted blocks, and at least the convolutional ones.

    So a search over layers loads a network once, and VGG-16's fully connected layers
    do not occupy 500 MB where they are not used.
    """
    key = (backbone.token, identity, "")
    kept = _recall(_networks, key)
    if kept is None or not set(wanted) <= kept.keys():
        if weights is None:
            network = random_network(backbone, cast(int, seed))
        else:
            network = load_network(backbone, weights)
        last = resolve_layer(backbone, "last").block
        kept = truncate(network.blocks, [last, *wanted])
        if weights is not None:
            # Not the head: some published files hold NaN there on purpose.
            check_finite(kept, weights)
        _remember(_networks, key, kept, MAX_NETWORKS, backbone)
    return kept


def _identity(weights: PretrainedWeights) -> Hashable:
    """Return a key of weights, which changes with their file."""
    if not isinstance(weights.source, os.PathLike):
        return weights
    return weights, file_identity(os.fspath(weights.source))


def _recall(memory: OrderedDict[Key, Value], key: Key) -> Value | None:
    """Return the value of a key, if any, and mark it as recently used."""
    if key in memory:
        memory.move_to_end(key)
    return memory.get(key)


def _remember(
    memory: OrderedDict[Key, Value],
    key: Key,
    value: Value,
    n_max: int,
    backbone: Backbone,
) -> None:
    """Keep a value until `n_max` others were used, or the backbone is gone."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > n_max:
        memory.popitem(last=False)
    if backbone not in _watched:
        _watched.add(backbone)
        finalize(backbone, _forget, backbone.token)


def _forget(token: str) -> None:
    """Drop the networks of a backbone that no longer exists."""
    for memory in (_networks, _prefixes, _wholes):
        for key in list(memory):
            if key[0] == token:
                memory.pop(key, None)

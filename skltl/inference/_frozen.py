"""Frozen prefixes of networks, loaded once per process and prepared to run."""

from __future__ import annotations

import copy
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast
from weakref import WeakSet, WeakValueDictionary, finalize

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from skltl._locks import Lock
from skltl._random import fresh_seed
from skltl.exceptions import WeightsError
from skltl.images import file_identity, normalize
from skltl.inference._openvino import OpenVINOEngine
from skltl.inference._torch import compile_segment, run_segments, to_device
from skltl.networks import (
    Backbone,
    Block,
    ImageSize,
    Layout,
    PretrainedWeights,
    check_finite,
    forget_networks,
    freeze,
    graph_of,
    is_customized,
    layers_of,
    load_network,
    parts_of,
    random_network,
    resolve_layer,
    skeleton,
    truncate,
)

# Each runner is a copy of the network, and lives as long as its prefix.
MAX_RUNNERS = 2

# Enough for clones that follow one another; the least recently used ones are dropped.
# Prefixes share the weights of their network, but each is prepared to run, on a GPU
# maybe: others are shared only as long as an estimator holds them.
MAX_NETWORKS = 2
MAX_PREFIXES = 2

# From a batch (n, c, h, w) and a pooling to the features (n, d) of each wanted block.
Engine = Callable[[Tensor, str | int], dict[str, Tensor]]

_all_prefixes: WeakSet[FrozenPrefix] = WeakSet()


class FrozenPrefix:
    """The first blocks of a network as a fixed function of images.

    The blocks are frozen here and never modified: all estimators that use the same
    network share them.
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        freeze(blocks.values())
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
        wanted: Mapping[str, Layout],
        engine: str = "torch",
        mains: Mapping[str, Layout] | None = None,
    ) -> Runner:
        """Return a recently used `Runner` for the same arguments, or a new one."""
        key = (device, dtype, tuple(wanted), engine)
        with self._lock:
            runner = self._runners.pop(key, None)
            if runner is None:
                blocks = truncate(self.blocks, list(wanted))
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
    layers. Both are given with the layouts of their outputs.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        wanted: Mapping[str, Layout],
        device: torch.device,
        dtype: torch.dtype,
        engine: str = "torch",
        mains: Mapping[str, Layout] | None = None,
    ) -> None:
        mains = {} if mains is None else mains
        self.device = device
        self.dtype = dtype
        self._wanted = wanted
        # Eager torch computes the same wherever segments end. The others fuse what is
        # inside a segment, so theirs end at all main layers, wanted or not.
        ends = dict(wanted) if engine == "torch" else {**mains, **wanted}
        segments = build_segments(blocks, ends, device, dtype)
        self._input_dtype = dtype
        self._engine: Engine = partial(run_segments, segments, wanted)
        if engine == "compile":
            compiled = {name: compile_segment(one) for name, one in segments.items()}
            self._engine = partial(run_segments, compiled, wanted)
        elif engine == "openvino":
            self._input_dtype = torch.float32
            self._engine = OpenVINOEngine(segments, ends, wanted, dtype)

    def features(
        self, pixels: Tensor, mean: Tensor, std: Tensor, pooling: str | int
    ) -> Tensor:
        """Return the features (n, d) of all wanted blocks, side by side, in float32.

        `pixels` (n, h, w, c) are uint8 or float32, `mean` and `std` (c, 1, 1) are on
        the device. The features are on the device, too; a GPU may still be computing
        them.
        """
        # The user's autocast would override the requested precision.
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
        ):
            # A view: in memory, images have their channels last.
            batch = to_device(pixels, self.device).permute(0, 3, 1, 2)  # (n, c, h, w)
            batch = normalize(batch, mean, std)
            batch = batch.to(self._input_dtype, memory_format=torch.channels_last)
            features = self._engine(batch, pooling)
            return torch.cat([features[name] for name in self._wanted], dim=1)


def build_segments(
    blocks: Mapping[str, Block],
    ends: Collection[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Block]:
    """Copy blocks to a device as segments, with batch-norms folded, channels last.

    A segment is named by the block at its end.
    """
    segments = {}
    parts = []
    for name, block in blocks.items():
        parts.append(block)
        if name in ends:
            graph, layers, constants = parts_of(parts)
            folded = fold_batch_norms(graph, layers)
            new = [one for name, one in folded.items() if one is not layers[name]]
            # What is new need not be copied: weights have some 100 MB.
            copies = copy.deepcopy(folded, {id(one): one for one in new})
            segment = Block(graph, _with_short_names(graph, copies), constants)
            freeze([segment])  # the folded convolutions are new
            segments[name] = _with_dtype(segment.to(device), dtype)
            parts = []
    return segments


def _with_dtype(segment: Block, dtype: torch.dtype) -> Block:
    """Convert the real numbers of a segment, and the kernels to channels last."""
    for tensor in (*segment.parameters(), *segment.buffers()):
        if tensor.is_floating_point():  # complex ones would lose a part
            tensor.data = tensor.to(dtype)
    for layer in segment.modules():
        if isinstance(layer, nn.Conv2d) and "weight" in layer._parameters:
            kernels = layer.weight.data
            layer.weight.data = kernels.contiguous(memory_format=torch.channels_last)
    return segment


def fold_batch_norms(graph: fx.Graph, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Fold each batch-norm of a graph into the convolution before it.

    The graph is modified; the layers that it then calls are returned. In eval mode a
    batch-norm multiplies each channel and adds to it.
    """
    layers = dict(layers)
    calls = graph.find_nodes(op="call_module")
    n_calls = Counter(call.target for call in calls)
    for call in calls:
        before: Any = call.args[0] if call.args else None
        if (
            _is_call_of(before, nn.Conv2d, layers)
            and _is_call_of(call, nn.BatchNorm2d, layers)
            and len(before.users) == n_calls[before.target] == n_calls[call.target] == 1
        ):
            conv, norm = layers[before.target], layers.pop(call.target)
            layers[before.target] = fuse_conv_bn_eval(conv, norm)
            call.replace_all_uses_with(before)
            graph.erase_node(call)
    return layers


def _with_short_names(graph: fx.Graph, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the layers and weights of a graph, which is modified.

    Nested names such as "layer1.0.conv1" take several microseconds in each call.
    """
    names = {name: f"part_{number}" for number, name in enumerate(layers)}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = names.get(node.target, node.target)
    return {names[name]: layer for name, layer in layers.items()}


def _is_call_of(node: Any, kind: type[nn.Module], layers: Mapping[str, Any]) -> bool:
    """Return whether a node calls a layer of a class, without hooks."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    layer = layers[str(node.target)]
    return type(layer) is kind and not is_customized(layer) and len(node.args) == 1


def is_before_batch_norm(blocks: Mapping[str, Block], name: str) -> bool:
    """Return whether a block ends with a convolution that a batch-norm follows.

    If a segment ends between them they are not folded, which changes the last digits of
    everything after.
    """
    names = list(blocks)
    following = names[names.index(name) + 1 :][:1]
    (end,) = graph_of(blocks[name]).find_nodes(op="output")
    return _is_call_of(end.args[0], nn.Conv2d, layers_of(blocks[name])) and any(
        _is_call_of(call, nn.BatchNorm2d, layers_of(blocks[other]))
        for other in following
        for (batch,) in [graph_of(blocks[other]).find_nodes(op="placeholder")]
        for call in batch.users
    )


Value = TypeVar("Value")

# The token of a backbone, the identity of its weights, the size of the images, and the
# last block.
Key = tuple[str, Hashable, ImageSize, str]

_networks: OrderedDict[Key, Mapping[str, Block]] = OrderedDict()
_prefixes: OrderedDict[Key, FrozenPrefix] = OrderedDict()
_held_prefixes: WeakValueDictionary[Key, FrozenPrefix] = WeakValueDictionary()
_wholes: OrderedDict[Key, tuple[FrozenPrefix, Block]] = OrderedDict()
_lock = Lock()

# Backbones whose networks are dropped with them.
_watched: WeakSet[Backbone] = WeakSet()


def load_prefix(
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    image_size: ImageSize,
    wanted: Sequence[str],
    is_shared: bool = True,
) -> FrozenPrefix:
    """Load the blocks of a network up to the last wanted one, once per process.

    ``weights=None`` draws random weights from `seed`; without a seed, or with
    ``is_shared=False``, they cannot be requested again, and are not kept.
    """
    if weights is None and (seed is None or not is_shared):
        seed = fresh_seed() if seed is None else seed
        network = random_network(backbone, seed, image_size)
        return FrozenPrefix(truncate(network.blocks, wanted))
    identity = seed if weights is None else _identity(weights)
    deepest = list(truncate(skeleton(backbone, image_size).blocks, wanted))[-1]
    key = (backbone.token, identity, image_size, deepest)
    with _lock:
        prefix = _recall(_prefixes, key) or _held_prefixes.get(key)
        if prefix is None:
            blocks = _load_blocks(key, backbone, weights, wanted)
            prefix = _held_prefixes[key] = FrozenPrefix(truncate(blocks, wanted))
        _remember(_prefixes, key, prefix, MAX_PREFIXES, backbone)
        return prefix


def load_with_head(
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    image_size: ImageSize,
) -> tuple[FrozenPrefix, Block]:
    """Load all blocks of a network, and its own head, frozen, once per process."""
    identity = seed if weights is None else _identity(weights)
    key = (backbone.token, identity, image_size, "")
    with _lock:
        whole = _recall(_wholes, key)
        if whole is None:
            whole = _load_whole(backbone, weights, seed, image_size)
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
    backbone: Backbone,
    weights: PretrainedWeights | None,
    seed: int | None,
    image_size: ImageSize,
) -> tuple[FrozenPrefix, Block]:
    """Build all blocks of a network and its own head; refuse one without a head."""
    if weights is None:
        seed = fresh_seed() if seed is None else seed
        network = random_network(backbone, seed, image_size)
    else:
        network = load_network(backbone, weights, image_size)
        check_finite(network.parts, weights)
    if network.head is None:
        raise WeightsError(
            f"{backbone.name!r} with these weights has no head, which classification "
            "needs. CNNFeatureTransformer extracts its features without one."
        )
    # The modules that a backbone owns are never run: a layer may modify itself.
    is_own = backbone.own_network is not None and weights is not None
    head = copy.deepcopy(network.head) if is_own else network.head
    return FrozenPrefix(network.blocks), head


def _load_blocks(
    wanted_key: Key,
    backbone: Backbone,
    weights: PretrainedWeights | None,
    wanted: Sequence[str],
) -> Mapping[str, Block]:
    """Return the wanted blocks, and at least those up to the last main layer.

    So a search over layers loads a network once, and VGG-16's fully connected layers
    do not occupy 500 MB where they are not used.
    """
    token, identity, image_size, _ = wanted_key
    key = (token, identity, image_size, "")
    kept = _recall(_networks, key)
    if kept is None or not set(wanted) <= kept.keys():
        if weights is None:
            network = random_network(backbone, cast(int, identity), image_size)
        else:
            network = load_network(backbone, weights, image_size)
        last = resolve_layer(backbone, "last", image_size).block
        ends = [block for block in (last, *wanted) if block in network.blocks]
        kept = truncate(network.blocks, ends)
        if weights is not None:
            # Not the head: some published files hold NaN there on purpose.
            check_finite(kept.values(), weights)
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

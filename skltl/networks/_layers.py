"""Layers of a network: their names, their shapes, and the `layer` parameter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping
from functools import update_wrapper
from itertools import chain
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from skltl._parameters import settle_in_forked_child
from skltl._random import torch_defaults
from skltl.exceptions import UnknownLayerError, quote, shorten
from skltl.networks._backbone import Backbone, Network, freeze, last_block, truncate
from skltl.networks._registry import did_you_mean, get_backbone

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

# Results of `once_per_backbone`, for the lifetime of each backbone.
_results: WeakKeyDictionary[Backbone, dict[Hashable, Any]] = WeakKeyDictionary()


def once_per_backbone(
    function: Callable[Concatenate[Backbone, Arguments], Value],
) -> Callable[Concatenate[Backbone, Arguments], Value]:
    """Cache the results of a function without keeping the backbone alive."""

    def cached(
        backbone: Backbone, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Value:
        results = _results.setdefault(backbone, {})
        key = (function.__name__, args, tuple(sorted(kwargs.items())))
        if key not in results:
            results[key] = function(backbone, *args, **kwargs)
        value: Value = results[key]
        return value

    return update_wrapper(cached, function)


def forget_networks() -> None:
    """Clear the cached results of all backbones."""
    _results.clear()


class Layer(NamedTuple):
    """A main layer, as listed by `list_layers`."""

    name: str
    aliases: tuple[str, ...]
    path: str
    channels: int
    stride: int | None
    n_features: int


class ResolvedLayer(NamedTuple):
    """A resolved `layer`: its name in feature names, and the block that computes it."""

    name: str
    block: str


def list_layers(backbone: str | Backbone) -> list[Layer]:
    """List the main layers of a backbone, from the image to the logits.

    Every torch path up to the last of them is accepted as `layer`, too.

    Parameters
    ----------
    backbone : str or Backbone
        Name of the backbone, or the backbone itself.

    Returns
    -------
    list of Layer
        Named tuples, which ``pandas.DataFrame`` turns into a table: `name`, for the
        `layer` parameter; `aliases`, further names; `path`, the torch path of the
        module; `channels` of the feature map, or length of the vector after a fully
        connected layer; `stride` in pixels of the image, or ``None`` for a vector; and
        `n_features`, the number of features with ``pooling="flatten"`` at the default
        image size (with average or maximum pooling it is `channels`).

    Raises
    ------
    UnknownBackboneError
        If no backbone has this name.

    See Also
    --------
    list_backbones : List the names of the backbones.

    Examples
    --------
    >>> from skltl import list_layers
    >>> for layer in list_layers("vgg16"):
    ...     print(layer.name, layer.channels, layer.stride, layer.n_features)
    block1 64 2 802816
    block2 128 4 401408
    block3 256 8 200704
    block4 512 16 100352
    block5 512 32 25088
    fc6 4096 None 4096
    fc7 4096 None 4096
    """
    backbone = get_backbone(backbone)
    network = skeleton(backbone)
    size = backbone.preprocessing.crop_size
    shapes = block_shapes(backbone, size)
    strides = _strides(_safe_to_run(backbone, network.blocks), shapes, size)
    return [
        Layer(
            name,
            tuple(alias for alias, main in network.aliases.items() if main == name),
            block,
            shapes[block][0],
            strides.get(block),
            math.prod(shapes[block]),
        )
        for name, block in network.layers.items()
    ]


def resolve_layer(backbone: Backbone, layer: str | int) -> ResolvedLayer:
    """Return the layer given by a name, an alias, a torch path or an index.

    ``"last"`` is the last main layer with a feature map.
    """
    network = skeleton(backbone)
    mains = list(network.layers)
    if layer == "last":
        shapes = block_shapes(backbone, backbone.preprocessing.crop_size)
        spatial = [name for name in mains if len(shapes[network.layers[name]]) == 3]
        layer = (spatial or mains)[-1]
    if isinstance(layer, str):
        return _named_layer(backbone, network, layer)
    if not -len(mains) <= layer < len(mains):
        raise UnknownLayerError(
            f"layer={layer}, but {backbone.name!r} has {len(mains)} main layers: "
            f"{', '.join(mains)}."
        )
    return ResolvedLayer(mains[layer], network.layers[mains[layer]])


def _named_layer(backbone: Backbone, network: Network, layer: str) -> ResolvedLayer:
    """Return the layer given by a name, an alias or a torch path."""
    name = network.aliases.get(layer, layer)
    if name in network.layers:
        return ResolvedLayer(name, network.layers[name])
    try:
        return ResolvedLayer(name, last_block(network.blocks, name))
    except KeyError:
        mains = list(network.layers)
        known = [*mains, *network.aliases, *network.blocks]
        hint = did_you_mean(layer, mains) or did_you_mean(layer, known)
        raise UnknownLayerError(
            f"{backbone.name!r} has no layer {quote(layer)}. {hint}{' ' * bool(hint)}"
            f"Its main layers are {', '.join(mains)}; every torch path up to "
            f"{list(network.blocks)[-1]!r} can be given, too."
        ) from None


@once_per_backbone
def skeleton(backbone: Backbone) -> Network:
    """Return the network of a backbone for names and shapes only.

    It has no weights in memory, unless the backbone owns its network.
    """
    return backbone.own_network or build_skeleton(backbone)


def build_skeleton(backbone: Backbone, n_classes: int | None = None) -> Network:
    """Build a frozen network without weights, to load a state dict into."""
    with torch_defaults(), MetaParameters():
        network = backbone.build(n_classes)
    freeze({**network.blocks, **network.head})
    return network


class MetaParameters(TorchFunctionMode):
    """Create parameters on torch's "meta" device: no memory, no random numbers.

    Unlike in ``torch.device("meta")``, builders can compute widths with small tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@once_per_backbone
def block_shapes(
    backbone: Backbone, size: int, wanted: tuple[str, ...] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the output shape of each block for one image of size x size pixels.

    It is (c, h, w), or (d,) after a fully connected layer. Blocks after the last of
    `wanted` are left out.
    """
    blocks = skeleton(backbone).blocks
    if wanted:
        blocks = truncate(blocks, wanted)
    try:
        return _output_shapes(_safe_to_run(backbone, blocks), size)
    except (RuntimeError, AssertionError) as error:  # torchvision's ViT asserts sizes
        raise ValueError(
            f"Images of {size} x {size} pixels cannot pass through {backbone.name!r}: "
            f"{shorten(str(error), 200)}"
        ) from error


@once_per_backbone
def reached_main_blocks(backbone: Backbone, size: int) -> tuple[str, ...]:
    """Return the blocks of the main layers before which images do not vanish."""
    reached = []
    for block in skeleton(backbone).layers.values():
        try:
            block_shapes(backbone, size, (block,))
        except ValueError:
            break
        reached.append(block)
    return tuple(reached)


def largest_map(backbone: Backbone, size: int) -> int:
    """Return the number of values in the largest feature map between blocks.

    For one image, the image itself included, and for the whole network: it does not
    depend on the layer in use.
    """
    reached = reached_main_blocks(backbone, size)
    shapes = block_shapes(backbone, size, reached) if reached else {}
    return max([3 * size * size, *map(math.prod, shapes.values())])


def _safe_to_run(
    backbone: Backbone, blocks: Mapping[str, nn.Module]
) -> Mapping[str, nn.Module]:
    """Return copies of blocks that a backbone owns, since ``forward`` may modify them.

    A module that stores anything would have another identity after it has run.
    """
    return blocks if backbone.own_network is None else copy.deepcopy(dict(blocks))


@torch.inference_mode()
def _output_shapes(
    blocks: Mapping[str, nn.Module], size: int
) -> dict[str, tuple[int, ...]]:
    """Return the output shape of each block for one image, by running the blocks."""
    settle_in_forked_child()  # the blocks of an own network have weights, and compute
    parameters = chain.from_iterable(block.parameters() for block in blocks.values())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    feature_map = torch.zeros(1, 3, size, size, dtype=torch.float32, device=device)
    shapes = {}
    for name, block in blocks.items():
        feature_map = block(feature_map)  # (1, c, h, w)
        shapes[name] = tuple(feature_map.shape[1:])
    return shapes


def _strides(
    blocks: Mapping[str, nn.Module], shapes: dict[str, tuple[int, ...]], size: int
) -> dict[str, int]:
    """Return the stride of each block with a feature map.

    It is the ratio of what a larger image adds in pixels to what it adds in the feature
    map: the ratio of the sizes is blurred by padding and rounding.
    """
    added = 768  # divisible by the strides that occur: powers of 2, and 3 times those
    spatial = {name: blocks[name] for name in shapes if len(shapes[name]) == 3}
    try:
        larger = _output_shapes(spatial, size + added)
    except RuntimeError:  # a network for images of one size only
        return {}
    return {
        name: round(added / (larger[name][1] - shapes[name][1]))
        for name in spatial
        if larger[name][1] > shapes[name][1]
    }

"""The `layer` parameter: from names people use to places between blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping
from functools import update_wrapper
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from skltl._random import torch_defaults
from skltl.exceptions import UnknownLayerError, quote, shorten
from skltl.networks._backbone import (
    Backbone,
    Network,
    cut,
    freeze,
    last_step,
    output_shapes,
)
from skltl.networks._registry import get_backbone, near

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")

# What has been found out about each backbone, for as long as the backbone lives.
_found: WeakKeyDictionary[Backbone, dict[Hashable, Any]] = WeakKeyDictionary()


def found_once(
    function: Callable[Concatenate[Backbone, Arguments], Found],
) -> Callable[Concatenate[Backbone, Arguments], Found]:
    """Remember what a function returns for a backbone, without keeping it alive."""

    def remembered(
        backbone: Backbone, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Found:
        memory = _found.setdefault(backbone, {})
        key = (function.__name__, args, tuple(sorted(kwargs.items())))
        if key not in memory:
            memory[key] = function(backbone, *args, **kwargs)
        found: Found = memory[key]
        return found

    return update_wrapper(remembered, function)


def forget_networks() -> None:
    """Forget what has been found out about backbones."""
    _found.clear()


class Layer(NamedTuple):
    """A main cut point, for people to read.

    Parameters
    ----------
    name : str
        What the `layer` parameter takes.
    aliases : tuple of str
        Other names that mean the same.
    path : str
        The torch path of the module after which it lies.
    channels : int
        Of the feature map there (the length of the vector, after a
        fully connected layer).
    stride : int or None
        How many pixels of the image one pixel of the feature map stands for; ``None``
        after a fully connected layer.
    n_features : int
        Numbers per image without pooling (``pooling="flatten"``) at the usual size.
        With average or maximum pooling there are `channels` of them.
    """

    name: str
    aliases: tuple[str, ...]
    path: str
    channels: int
    stride: int | None
    n_features: int


class CutPoint(NamedTuple):
    """A cut point that a `layer` parameter was resolved to.

    Parameters
    ----------
    name : str
        As it appears in the names of features.
    block : str
        The block after which it lies.
    """

    name: str
    block: str


def list_layers(backbone: str | Backbone) -> list[Layer]:
    """List a backbone's main cut points, from the image to the logits.

    Parameters
    ----------
    backbone : str or Backbone
        Which one.

    Returns
    -------
    list of Layer
        Named tuples (name, aliases, path, channels, stride, n_features); a
        ``pandas.DataFrame`` of them is a readable table. Besides these, every torch
        path between the image and the last of them can be given as `layer`.

    Raises
    ------
    UnknownBackboneError
        If there is no such backbone.

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
    record = get_backbone(backbone)
    network = skeleton(record)
    size = record.preprocessing.crop_size
    shapes = block_shapes(record, size)
    strides = _strides(_to_run(record, network.blocks), shapes, size)
    return [
        Layer(
            name,
            tuple(other for other, main in network.aliases.items() if main == name),
            block,
            shapes[block][0],
            strides.get(block),
            math.prod(shapes[block]),
        )
        for name, block in network.cut_points.items()
    ]


def resolve_layer(backbone: Backbone, layer: str | int) -> CutPoint:
    """Find the cut point that a `layer` parameter means.

    Parameters
    ----------
    backbone : Backbone
        Where.
    layer : str or int
        A main cut point's name or alias, a torch path, ``"last"`` (the last one with a
        feature map), or the number of a main cut point (from the end, if negative).

    Returns
    -------
    CutPoint
        Its main name, or the torch path.

    Raises
    ------
    UnknownLayerError
        If there is none; it says which names are near.
    """
    network = skeleton(backbone)
    mains = list(network.cut_points)
    if layer == "last":
        shapes = block_shapes(backbone, backbone.preprocessing.crop_size)
        maps = [name for name in mains if len(shapes[network.cut_points[name]]) == 3]
        layer = (maps or mains)[-1]
    if isinstance(layer, str):
        return _named_cut_point(backbone, network, layer)
    if not -len(mains) <= layer < len(mains):
        raise UnknownLayerError(
            f"layer={layer}, but {backbone.name!r} has {len(mains)} main cut points: "
            f"{', '.join(mains)}."
        )
    return CutPoint(mains[layer], network.cut_points[mains[layer]])


@found_once
def skeleton(backbone: Backbone) -> Network:
    """Return the backbone's network, to look at: names and shapes, no memory.

    A backbone that keeps its network shows it; of others it is one without numbers.
    """
    return backbone.own_network or build_skeleton(backbone)


def build_skeleton(backbone: Backbone, n_classes: int | None = None) -> Network:
    """Build a network to put weights in, without numbers if it can be had so."""
    with torch_defaults(), WithoutNumbers():
        network = backbone.build(n_classes)
    freeze({**network.blocks, **network.head})
    return network


@found_once
def block_shapes(
    backbone: Backbone, size: int, wanted: tuple[str, ...] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of one image's feature map after each block.

    Parameters
    ----------
    backbone : Backbone
        Which network.
    size : int
        Height and width of the image, in pixels.
    wanted : tuple of str, default=None
        Blocks up to the last of which to go; ``None`` is all.

    Returns
    -------
    dict of str to tuple of int
        (c, h, w), or (d,) after a fully connected layer.

    Raises
    ------
    ValueError
        If images of this size shrink to nothing on the way.
    """
    blocks = skeleton(backbone).blocks
    some = cut(blocks, wanted or list(blocks))
    try:
        return output_shapes(_to_run(backbone, some), size)
    except (RuntimeError, AssertionError) as error:  # torchvision's ViT asserts sizes
        raise ValueError(
            f"Images of {size} x {size} pixels cannot cross {backbone.name!r}: "
            f"{shorten(str(error), 200)}"
        ) from error


@found_once
def reached_main_blocks(backbone: Backbone, size: int) -> tuple[str, ...]:
    """Return the blocks of the main cut points that images of a size get to.

    Parameters
    ----------
    backbone : Backbone
        Which network.
    size : int
        Height and width of the image, in pixels.

    Returns
    -------
    tuple of str
        From the image on. Small images shrink to nothing before the last.
    """
    reached = []
    for block in skeleton(backbone).cut_points.values():
        try:
            block_shapes(backbone, size, (block,))
        except ValueError:
            break
        reached.append(block)
    return tuple(reached)


def largest_map(backbone: Backbone, size: int) -> int:
    """Count the numbers in the largest map between a network's blocks.

    Parameters
    ----------
    backbone : Backbone
        Which network.
    size : int
        Height and width of the image, in pixels.

    Returns
    -------
    int
        For one image; the same wherever the network is cut. The image is a map,
        too. What lies within blocks is not counted.
    """
    reached = reached_main_blocks(backbone, size)
    shapes = block_shapes(backbone, size, reached) if reached else {}
    return max([3 * size * size, *map(math.prod, shapes.values())])


def _to_run(
    backbone: Backbone, blocks: Mapping[str, nn.Module]
) -> Mapping[str, nn.Module]:
    """Return blocks that may be run: a backbone's own are never, but copies of them.

    A layer's ``forward`` may note something, and the layer would be another one then.
    """
    return blocks if backbone.own_network is None else copy.deepcopy(dict(blocks))


class WithoutNumbers(TorchFunctionMode):
    """Make new parameters shapes only: nothing is allocated, nothing drawn at random.

    Not ``torch.device("meta")``: some builders compute their widths with small tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _named_cut_point(backbone: Backbone, network: Network, layer: str) -> CutPoint:
    name = network.aliases.get(layer, layer)
    if name in network.cut_points:
        return CutPoint(name, network.cut_points[name])
    try:
        return CutPoint(name, last_step(network.blocks, name))
    except KeyError:
        known = [*network.cut_points, *network.aliases, *network.blocks]
        meant = near(layer, network.cut_points) or near(layer, known)
        hint = f"{meant} " if meant else ""
        raise UnknownLayerError(
            f"{backbone.name!r} has no layer {quote(layer)}. {hint}Its "
            f"main layers are {', '.join(network.cut_points)}; every torch path up to "
            f"{list(network.blocks)[-1]!r} can be given too."
        ) from None


def _strides(
    blocks: Mapping[str, nn.Module], shapes: dict[str, tuple[int, ...]], size: int
) -> dict[str, int]:
    """Return the stride at each block with a feature map.

    It is what a larger image adds in pixels for what it adds in the feature map; at
    one size alone, padding and rounding blur the ratio.
    """
    added = 768  # divisible by the strides that occur: powers of 2, and 3 times those
    maps = {name: blocks[name] for name in shapes if len(shapes[name]) == 3}
    try:
        larger = output_shapes(maps, size + added)
    except RuntimeError:  # a network for images of one size only
        return {}
    return {
        name: round(added / (larger[name][1] - shapes[name][1]))
        for name in maps
        if larger[name][1] > shapes[name][1]
    }

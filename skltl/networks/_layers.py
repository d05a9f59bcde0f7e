"""Layers of a network: main layers, and the `layer` parameter."""

from __future__ import annotations

import math
from typing import NamedTuple

from skltl.exceptions import UnknownLayerError, did_you_mean, quote
from skltl.networks._backbone import Backbone
from skltl.networks._building import skeleton
from skltl.networks._network import ImageSize, Network
from skltl.networks._registry import get_backbone

# Strides are measured on images that are larger by this many pixels: it is divisible by
# the strides that occur, powers of 2 and 3 times those.
ADDED_PIXELS = 768


# In images of at least this size, in pixels, these ratios are strides: padding does not
# add up to as much.
LARGE = 160
USUAL_STRIDES = frozenset((1, 2, 4, 8, 14, 16, 32))


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

    The path of any other module that ends where the network can be cut is accepted as
    `layer`, too.

    Parameters
    ----------
    backbone : str or Backbone
        Name of the backbone, or the backbone itself.

    Returns
    -------
    list of Layer
        Named tuples, which ``pandas.DataFrame`` turns into a table: `name`, for the
        `layer` parameter; `aliases`, further names; `path`, the torch path of the
        module; `channels` of the feature map or of the tokens, or length of the vector
        after a fully connected layer; `stride` in pixels of the image, or ``None`` for
        a vector; and `n_features`, the number of features with ``pooling="flatten"`` at
        the default image size (with average or maximum pooling it is `channels`).

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
    network = skeleton(backbone, backbone.preprocessing.size)
    strides = _strides(backbone)
    return [
        Layer(
            name,
            tuple(alias for alias, main in network.aliases.items() if main == name),
            block,
            network.layouts[block].n_channels,
            strides.get(block),
            math.prod(network.layouts[block].shape),
        )
        for name, block in network.layers.items()
    ]


def _strides(backbone: Backbone) -> dict[str, int]:
    """Return the stride of each block with a grid.

    It is the ratio of what a larger image adds in pixels to what it adds to the grid:
    the ratio of the sizes is blurred by padding and rounding. That takes long for some
    networks, and is left out where all ratios are strides that occur. A network for
    images of one size has a stride only if the sizes are divisible.
    """
    (height, width), strides = backbone.preprocessing.size, {}
    layouts = skeleton(backbone, (height, width)).layouts
    grids = {block: one.grid for block, one in layouts.items() if one.grid is not None}
    ratios = {block: height / grid[0] for block, grid in grids.items()}
    if height >= LARGE and set(ratios.values()) <= USUAL_STRIDES:
        return {block: int(ratio) for block, ratio in ratios.items()}
    try:
        size = height + ADDED_PIXELS, width + ADDED_PIXELS
        larger = skeleton(backbone, size).layouts
    except ValueError:
        larger = {}
    for block, grid in grids.items():
        other = larger[block].grid if block in larger else None
        if other is not None and other[0] > grid[0]:
            strides[block] = round(ADDED_PIXELS / (other[0] - grid[0]))
        elif other is None and height % grid[0] == 0:
            strides[block] = height // grid[0]
    return strides


def resolve_layer(
    backbone: Backbone,
    layer: str | int,
    image_size: ImageSize | None = None,
    pooling: str | int = "avg",
) -> ResolvedLayer:
    """Return the layer given by a name, an alias, a torch path or an index.

    ``"last"`` is the last main layer with a feature map or tokens. With automatic
    pooling, that layer is followed by what the network's own head does before the
    logits.
    """
    network = skeleton(backbone, image_size or backbone.preprocessing.size)
    mains = list(network.layers)
    last = _last_layer(backbone)
    if isinstance(layer, str):
        resolved = _named_layer(backbone, network, last if layer == "last" else layer)
    elif -len(mains) <= layer < len(mains):
        resolved = ResolvedLayer(mains[layer], network.layers[mains[layer]])
    else:
        raise UnknownLayerError(
            f"layer={layer}, but {backbone.name!r} has {len(mains)} main layers: "
            f"{', '.join(mains)}."
        )
    if pooling == "auto" and resolved.block == network.layers[last]:
        return resolved._replace(block=list(network.blocks)[-1])
    return resolved


def _last_layer(backbone: Backbone) -> str:
    """Return the name of the last main layer with a grid, for images of usual size."""
    network = skeleton(backbone, backbone.preprocessing.size)
    spatial = [
        name
        for name, block in network.layers.items()
        if not network.layouts[block].is_vector
    ]
    return (spatial or list(network.layers))[-1]


def _named_layer(backbone: Backbone, network: Network, layer: str) -> ResolvedLayer:
    """Return the layer given by a name, an alias or a torch path."""
    name = network.aliases.get(layer, layer)
    if name in network.layers:
        return ResolvedLayer(name, network.layers[name])
    if name in network.paths:
        return ResolvedLayer(layer, network.paths[name])
    if name in network.inside:
        block = network.inside[name]
        blocks = ["", *network.blocks]
        before = blocks[max(blocks.index(block) - 1, 0)]
        nearest = " and ".join(repr(one) for one in (before, block) if one)
        raise UnknownLayerError(
            f"{backbone.name!r} cannot be truncated at {quote(layer)}: later layers "
            "need more than its output (it is inside of a residual connection or a "
            f"branch). The nearest layers are {nearest}."
        )
    mains = list(network.layers)
    known = [*mains, *network.aliases, *network.paths]
    hint = did_you_mean(layer, mains) or did_you_mean(layer, known)
    raise UnknownLayerError(
        f"{backbone.name!r} has no layer {quote(layer)}. {hint}{' ' * bool(hint)}"
        f"Its main layers are {', '.join(mains)}; any torch path up to "
        f"{list(network.blocks)[-1]!r} where the network can be truncated is accepted, "
        "too."
    )

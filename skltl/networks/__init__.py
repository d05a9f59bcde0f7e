"""Pretrained networks as ordered sequences of named blocks, and their weights."""

from skltl.networks._adaptation import (
    Adaptation,
    AdaptedBuilder,
    AdaptedConverter,
    adapt_channels,
)
from skltl.networks._backbone import (
    Backbone,
    Own,
    PretrainedWeights,
    StoredWeights,
    Truncated,
    truncated_backbone,
)
from skltl.networks._blocks import (
    Block,
    function_names,
    graph_of,
    layers_of,
    parts_of,
    uses_layer_norm,
)
from skltl.networks._building import (
    as_network,
    build_skeleton,
    forget_networks,
    largest_map,
    layouts,
    skeleton,
)
from skltl.networks._identity import is_known_code, prefix_digests, structure, versions
from skltl.networks._layers import Layer, ResolvedLayer, list_layers, resolve_layer
from skltl.networks._layouts import Layout
from skltl.networks._network import (
    ImageSize,
    Model,
    Network,
    freeze,
    is_customized,
    is_module,
    state_of,
    truncate,
)
from skltl.networks._registry import (
    get_backbone,
    is_included,
    is_registered,
    list_backbones,
    register_backbone,
)
from skltl.networks._tiny import ConvUnit, ResidualUnit, imagenet_names, unique
from skltl.networks._weights import (
    TORCH_FILE_ERRORS,
    check_finite,
    load_network,
    random_network,
    resolve_network,
    resolve_weights,
)

__all__ = [
    "TORCH_FILE_ERRORS",
    "Adaptation",
    "AdaptedBuilder",
    "AdaptedConverter",
    "Backbone",
    "Block",
    "ConvUnit",
    "ImageSize",
    "Layer",
    "Layout",
    "Model",
    "Network",
    "Own",
    "PretrainedWeights",
    "ResidualUnit",
    "ResolvedLayer",
    "StoredWeights",
    "Truncated",
    "adapt_channels",
    "as_network",
    "build_skeleton",
    "check_finite",
    "forget_networks",
    "freeze",
    "function_names",
    "get_backbone",
    "graph_of",
    "imagenet_names",
    "is_customized",
    "is_included",
    "is_known_code",
    "is_module",
    "is_registered",
    "largest_map",
    "layers_of",
    "layouts",
    "list_backbones",
    "list_layers",
    "load_network",
    "parts_of",
    "prefix_digests",
    "random_network",
    "register_backbone",
    "resolve_layer",
    "resolve_network",
    "resolve_weights",
    "skeleton",
    "state_of",
    "structure",
    "truncate",
    "truncated_backbone",
    "unique",
    "uses_layer_norm",
    "versions",
]

"""Pretrained networks as ordered lists of named blocks, and their weights."""

from skltl.backbones._blocks import freeze, is_module
from skltl.backbones._categories import imagenet_names, unique
from skltl.backbones._cut_points import (
    CutPoint,
    Layer,
    block_shapes,
    largest_map,
    list_layers,
    reached_main_blocks,
    resolve_layer,
    skeleton,
)
from skltl.backbones._digest import prefix_digests, structure, versions
from skltl.backbones._engines import ENGINES, can_run, engine_version, resolve_engine
from skltl.backbones._files import TORCH_FILE_ERRORS
from skltl.backbones._loading import (
    load_prefix,
    load_with_head,
    release_memory,
)
from skltl.backbones._prefix import FrozenPrefix, Runner, parts_a_fold
from skltl.backbones._registry import (
    get_backbone,
    is_registered,
    list_backbones,
    nearest,
    register_backbone,
)
from skltl.backbones._spec import Backbone, Network, PretrainedWeights
from skltl.backbones._state import (
    as_tensor,
    head_from_state,
    head_state,
    prefix_from_state,
    prefix_state,
)
from skltl.backbones._under_way import UnderWay, n_under_way
from skltl.backbones._weights import (
    load_network,
    random_network,
    resolve_network,
    resolve_weights,
)

__all__ = [
    "ENGINES",
    "TORCH_FILE_ERRORS",
    "Backbone",
    "CutPoint",
    "FrozenPrefix",
    "Layer",
    "Network",
    "PretrainedWeights",
    "Runner",
    "UnderWay",
    "as_tensor",
    "block_shapes",
    "can_run",
    "engine_version",
    "freeze",
    "get_backbone",
    "head_from_state",
    "head_state",
    "imagenet_names",
    "is_module",
    "is_registered",
    "largest_map",
    "list_backbones",
    "list_layers",
    "load_network",
    "load_prefix",
    "load_with_head",
    "n_under_way",
    "nearest",
    "parts_a_fold",
    "prefix_digests",
    "prefix_from_state",
    "prefix_state",
    "random_network",
    "reached_main_blocks",
    "register_backbone",
    "release_memory",
    "resolve_engine",
    "resolve_layer",
    "resolve_network",
    "resolve_weights",
    "skeleton",
    "structure",
    "unique",
    "versions",
]

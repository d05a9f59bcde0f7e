"""From a backbone to a network: built, traced, split into blocks, and named."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.overrides import TorchFunctionMode

from skltl._parameters import settle_in_forked_child
from skltl._random import own_random_state, torch_defaults
from skltl.exceptions import shorten
from skltl.networks._backbone import Backbone
from skltl.networks._layouts import Layout, layout_of
from skltl.networks._main_layers import find_layers
from skltl.networks._network import ImageSize, Model, Network, freeze
from skltl.networks._recording import FORWARD_ERRORS, TraceError
from skltl.networks._sequence import trace_sequence
from skltl.networks._splitting import cut_points_before, module_ends, split
from skltl.networks._trace import CutPoint, Trace, trace

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


@once_per_backbone
def skeleton(backbone: Backbone, image_size: ImageSize) -> Network:
    """Return the network of a backbone for names and shapes only.

    It has no weights in memory, unless the backbone owns its network. Images of this
    size reach at least one block.
    """
    network = as_network(backbone, skeleton_model(backbone, image_size), image_size)
    if not network.layouts:
        own = " x ".join(map(str, usual_size(backbone)))
        reason = refusal(backbone, image_size, network.limit)
        raise ValueError(f"{reason} It takes images of {own} pixels.")
    return network


def build_skeleton(
    backbone: Backbone, image_size: ImageSize, n_classes: int | None = None
) -> Model:
    """Build a network without weights, to load a state dict into."""
    try:
        return build_without_values(lambda: backbone.build(n_classes, image_size))
    except FORWARD_ERRORS as error:
        if image_size == usual_size(backbone):
            raise
        raise ValueError(refusal(backbone, image_size, reason_of(error))) from error


def as_network(backbone: Backbone, model: Model, image_size: ImageSize) -> Network:
    """Return a network that was built as frozen blocks, for images of a size.

    The names of its layers are those of the whole network, whichever blocks the images
    reach.
    """
    usual = usual_size(backbone)
    traced = trace_of(backbone, image_size)
    whole = traced if traced.error is None else trace_of(backbone, usual)
    blocks, head = split(traced, model.module, model.head, model.last_block)
    points = cut_points_before(whole, model.module, model.head)
    paths, inside = module_ends(whole, points)
    order = [point.name for point in points]
    if model.last_block is not None:
        order = order[: order.index(model.last_block) + 1]
        paths = {path: block for path, block in paths.items() if block in order}
        inside = {path: block for path, block in inside.items() if block in order}
    if not order:
        raise ValueError(
            f"{backbone.name!r} has no layer at which it can be truncated, before its "
            "head."
        )
    layers = {name: paths[path] for name, path in model.layers.items() if path in paths}
    inner = [one.name for one in traced.cut_points if not one.is_between_modules]
    network = Network(
        blocks,
        head,
        dict(sorted(layers.items(), key=lambda item: order.index(item[1]))),
        model.aliases,
        paths,
        inside,
        _layouts_of(traced.cut_points[: len(blocks)], model, image_size),
        limit="" if traced.error is None else reason_of(traced.error),
        inner=frozenset(inner),
        is_trainable=traced.is_trainable and model.is_trainable,
    )
    freeze(network.parts)
    if not model.finds_layers:
        return network
    if image_size != usual:
        return replace(network, layers=skeleton(backbone, usual).layers)
    return replace(network, layers=find_layers(network, model, image_size))


def _layouts_of(
    points: Sequence[CutPoint], model: Model, image_size: ImageSize
) -> dict[str, Layout]:
    """Return the layouts of the blocks that end at some consecutive cut points."""
    found: dict[str, Layout] = {}
    before: Layout | None = None
    for point in points:
        tokens = model.n_prefix_tokens, model.uses_class_token
        before = layout_of(point.shape, image_size, *tokens, before)
        found[point.name] = before
    return found


def layouts(
    backbone: Backbone, image_size: ImageSize, wanted: tuple[str, ...]
) -> dict[str, Layout]:
    """Return the layouts of the outputs of some blocks, for images of a size."""
    network = skeleton(backbone, image_size)
    if not network.layouts.keys() >= set(wanted):
        raise ValueError(refusal(backbone, image_size, network.limit))
    return {block: network.layouts[block] for block in wanted}


def largest_map(backbone: Backbone, image_size: ImageSize) -> int:
    """Return the number of values in the largest output between modules.

    For one image, the image itself included, and for the whole network: it does not
    depend on the layer in use.
    """
    network = skeleton(backbone, image_size)
    return max(
        backbone.n_channels * math.prod(image_size),
        *(
            math.prod(layout.shape)
            for block, layout in network.layouts.items()
            if block not in network.inner
        ),
    )


def refusal(backbone: Backbone, image_size: ImageSize, reason: str) -> str:
    """Return the message for images that cannot pass through a network."""
    height, width = image_size
    return (
        f"Images of {height} x {width} pixels cannot pass through {backbone.name!r}: "
        f"{shorten(reason, 200).rstrip('.!')}."
    )


def build_without_values(build: Callable[[], Value]) -> Value:
    """Build a network, or a description with one, whose weights have no values.

    They are on torch's "meta" device: no memory, no random numbers. Unlike in
    ``torch.device("meta")``, tensors that are no weights have values.
    """
    with own_random_state(0), torch_defaults(), _WithoutInitialization():
        built = build()
    module = built.module if isinstance(built, Model) else built
    if isinstance(module, nn.Module):
        _drop_values(module)
    return built


class _WithoutInitialization(TorchFunctionMode):
    """Create parameters without initial values: their memory is not even touched."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        modified = args[0] if args else kwargs.get("tensor")  # so named in nn.init
        is_in_place = name.endswith("_") and not name.endswith("__")
        if is_in_place and isinstance(modified, nn.Parameter):
            return modified
        return func(*args, **kwargs)


def _drop_values(module: nn.Module) -> None:
    """Move the parameters of a module to the meta device; shared ones stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                on_meta = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
                part._parameters[name] = moved.setdefault(id(parameter), on_meta)


def usual_size(backbone: Backbone) -> ImageSize:
    """Return a size of images that the network of a backbone is suited to."""
    return backbone.base.preprocessing.size


@once_per_backbone
def skeleton_model(backbone: Backbone, image_size: ImageSize) -> Model:
    """Return the network of a backbone without weights, unless it owns them."""
    return backbone.own_network or build_skeleton(backbone, image_size)


@once_per_backbone
def trace_of(backbone: Backbone, image_size: ImageSize) -> Trace:
    """Trace the network of a backbone for images of a size.

    It ends where they vanish, if they are smaller than usual.
    """
    if backbone.base is not backbone:
        return trace_of(backbone.base, image_size)
    model, usual = skeleton_model(backbone, image_size), usual_size(backbone)
    shape = (backbone.n_channels, *image_size)
    if model.is_sequence:
        settle_in_forked_child()
        traced = trace_sequence(model.module, model.head, shape)
        if traced.error is not None and image_size == usual:
            raise ValueError(refusal(backbone, image_size, reason_of(traced.error)))
        return traced
    try:
        return trace(model.module, shape)
    except FORWARD_ERRORS as error:
        if image_size == usual:
            raise untraceable(backbone, reason_of(error)) from error
    reference = trace_of(backbone, usual)
    try:
        return trace(model.module, shape, reference)
    except FORWARD_ERRORS as error:  # it fails elsewhere than for the usual size
        raise ValueError(refusal(backbone, image_size, reason_of(error))) from error


def reason_of(error: Exception) -> str:
    """Return the message of an error, or its class where it has none."""
    return shorten(str(error) or type(error).__name__, 200)


def untraceable(backbone: Backbone, reason: str) -> TraceError:
    """Return the error for a network that cannot be traced."""
    if "meta tensor" in reason or "meta device" in reason:  # which have no values
        reason = "its forward pass depends on the values of pixels or weights"
    if "TorchScript" in reason:  # in which errors are wrapped
        reason = "it runs code that torch cannot observe, a function of TorchScript"
    remedy = ""
    if backbone.own_network is not None:
        remedy = " Backbone.from_blocks accepts modules that run one after the other."
    message = f"{backbone.name!r} cannot be traced: {shorten(reason, 200)}."
    return TraceError(message + remedy)

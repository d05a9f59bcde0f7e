"""The families of torchvision: names of their main layers.

A family lists the main layers by their torch paths, and their aliases. Everything else
follows from the trace of a network.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torchvision.models as models
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from skltl.images import Preprocessing
from skltl.networks._backbone import Backbone, PretrainedWeights
from skltl.networks._network import ImageSize, Model

# Both have auxiliary classifiers, which are used in training only, and warn unless
# `init_weights` is given.
GOOGLE = ("googlenet", "inception_v3")
GOOGLE_OPTIONS = {"aux_logits": False, "init_weights": True}
POSITIONS = "encoder.pos_embedding"

AUXILIARY_KEYS = ("aux1.", "aux2.", "AuxLogits.")

MainLayers = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """The networks of one torchvision class.

    `layers` maps the names of the main layers to torch paths, or is a function of the
    network that does. `aliases` maps the names used elsewhere to names or paths.
    """

    layers: MainLayers | Callable[[Any], MainLayers]
    aliases: Mapping[str, str] = field(default_factory=dict)


# Other names of functions that follow the last feature map.
AVGPOOL = {"avgpool": "adaptive_avg_pool2d"}
MEAN = {"avgpool": "mean", "flatten": "mean"}


def _vgg_layers(model: Any) -> MainLayers:
    """Return the layers of VGG: the poolings, and two fully connected layers."""
    pools = [
        number
        for number, layer in enumerate(model.features)
        if isinstance(layer, nn.MaxPool2d)
    ]
    blocks = {f"block{i}": f"features.{pool}" for i, pool in enumerate(pools, start=1)}
    return {**blocks, "fc6": "classifier.1", "fc7": "classifier.4"}


def _squeezenet_layers(model: Any) -> MainLayers:
    """Return the layers of SqueezeNet: the stem and the fire modules."""
    fires = [
        number
        for number, layer in enumerate(model.features)
        if type(layer).__name__ == "Fire"
    ]
    # The paper counts the stem's convolution as the first layer.
    return {
        "stem": "features.2",
        **{f"fire{i}": f"features.{fire}" for i, fire in enumerate(fires, start=2)},
    }


def _stage_layers(model: Any) -> MainLayers:
    """Return the layers of EfficientNet: stem, stages, and a last 1 x 1 convolution."""
    last = len(model.features) - 1
    blocks = {f"block{i}": f"features.{i}" for i in range(1, last)}
    return {"stem": "features.0", **blocks, "final_conv": f"features.{last}"}


def _resolution_layers(model: Any) -> MainLayers:
    """Return the layers of MobileNet: those before each halving of the resolution."""
    last = len(model.features) - 1
    halving = [
        number
        for number in range(1, last)
        if any(
            isinstance(module, nn.Conv2d) and module.stride == (2, 2)
            for module in model.features[number].modules()
        )
    ]
    # A network that halves right after its stem has no block before that.
    ends = [number - 1 for number in halving if number > 1] + [last - 1]
    layers = {"stem": "features.0"}
    layers |= {f"block{i}": f"features.{end}" for i, end in enumerate(ends, start=1)}
    layers["final_conv"] = f"features.{last}"
    if len(model.classifier) > 2:  # v3 has a fully connected layer before the logits
        layers["fc"] = "classifier.1"
    return layers


def _numbered(
    path: str, name: str, numbers: range, first: int | None = None
) -> dict[str, str]:
    """Return names and paths of layers that differ in a number only.

    Names are numbered from `first`, or as the paths are.
    """
    shift = 0 if first is None else first - numbers[0]
    return {name.format(i + shift): path.format(i) for i in numbers}


def _vit_layers(model: Any) -> MainLayers:
    """Return the layers of a vision transformer: the last one is normalized."""
    n_blocks = len(model.encoder.layers)
    path = "encoder.layers.encoder_layer_{}"
    layers = {f"block{i}": path.format(i - 1) for i in range(1, n_blocks)}
    return {"stem": "encoder.dropout", **layers, f"block{n_blocks}": "encoder.ln"}


def _swin_layers(model: Any) -> MainLayers:
    """Return the layers of Swin: the stages, between which patches are merged."""
    n_stages = (len(model.features) + 1) // 2
    stages = {f"stage{i}": f"features.{2 * i - 1}" for i in range(1, n_stages)}
    return {"stem": "features.0", **stages, f"stage{n_stages}": "norm"}


FAMILIES: dict[type[nn.Module], Family] = {
    models.AlexNet: Family(
        {
            "block1": "features.2",
            "block2": "features.5",
            "block3": "features.7",
            "block4": "features.9",
            "block5": "features.12",
            "fc6": "classifier.2",
            "fc7": "classifier.5",
        },
        {
            "pool1": "block1",
            "pool2": "block2",
            "conv3": "block3",
            "conv4": "block4",
            "pool5": "block5",
        },
    ),
    models.VGG: Family(
        _vgg_layers,
        _numbered("block{}", "pool{}", range(1, 6)) | {"fc1": "fc6", "fc2": "fc7"},
    ),
    models.ResNet: Family(
        {"stem": "maxpool", **_numbered("layer{}", "layer{}", range(1, 5))},
        _numbered("layer{}", "conv{}_x", range(1, 5), first=2),
    ),
    models.DenseNet: Family(
        {
            "stem": "features.pool0",
            **_numbered("features.denseblock{}", "block{}", range(1, 4)),
            "block4": "relu",  # a function
        },
        _numbered("block{}", "denseblock{}", range(1, 5)) | AVGPOOL,
    ),
    models.SqueezeNet: Family(_squeezenet_layers),
    models.GoogLeNet: Family(
        {
            "stem": "maxpool2",
            "inception3b": "inception3b",
            "inception4e": "inception4e",
            "inception5b": "inception5b",
        },
    ),
    models.Inception3: Family(
        {
            "stem": "maxpool2",
            "Mixed_5d": "Mixed_5d",
            "Mixed_6e": "Mixed_6e",
            "Mixed_7c": "Mixed_7c",
        },
        {"mixed2": "Mixed_5d", "mixed7": "Mixed_6e", "mixed10": "Mixed_7c"},  # Keras
    ),
    models.MobileNetV2: Family(_resolution_layers, AVGPOOL),
    models.MobileNetV3: Family(_resolution_layers),
    models.MNASNet: Family(
        {
            "stem": "layers.7",
            **_numbered("layers.{}", "block{}", range(8, 14), first=1),
            "final_conv": "layers.16",
        },
        MEAN,
    ),
    models.ShuffleNetV2: Family(
        {
            "stem": "maxpool",
            **_numbered("stage{}", "stage{}", range(2, 5)),
            "conv5": "conv5",
        },
        {"final_conv": "conv5", **MEAN},
    ),
    models.EfficientNet: Family(
        _stage_layers,
        {"top_conv": "final_conv", "conv_head": "final_conv"},  # Keras; timm
    ),
    models.RegNet: Family(
        {"stem": "stem", **_numbered("trunk_output.block{}", "block{}", range(1, 5))},
        _numbered("block{}", "s{}", range(1, 5)),  # timm
    ),
    models.ConvNeXt: Family(
        {
            "stem": "features.0",
            **{f"stage{i}": f"features.{2 * i - 1}" for i in range(1, 5)},
        },
    ),
    models.VisionTransformer: Family(_vit_layers),
    models.SwinTransformer: Family(_swin_layers),
    models.MaxVit: Family(
        {"stem": "stem", **_numbered("blocks.{}", "block{}", range(4), first=1)}
    ),
}


def list_torchvision() -> list[str]:
    """Return the names of torchvision's networks for image classification."""
    names: list[str] = models.list_models(module=models)
    return names


def torchvision_backbone(name: str) -> Backbone:
    """Return the backbone of a torchvision network."""
    known = list(models.get_model_weights(name))
    return Backbone(
        name,
        build=partial(_build, name),
        preprocessing=_preprocessing(known[0]),
        weights=tuple(_pretrained(name, weights) for weights in known),
        known_as=f"torchvision {name}",
        convert_state=_current_state,
    )


def _build(name: str, n_classes: int | None, image_size: ImageSize) -> Model:
    """Build a network for images of a size."""
    options = _size_options(name, image_size)
    if name in GOOGLE:
        options |= GOOGLE_OPTIONS
    if n_classes is not None:
        options["num_classes"] = n_classes
    module = models.get_model(name, weights=None, **options)
    family = FAMILIES[type(module)]
    has_class_token = isinstance(module, models.VisionTransformer)
    return Model(
        module,
        family.layers(module) if callable(family.layers) else family.layers,
        family.aliases,
        head=(_last_layer(module),),
        n_prefix_tokens=int(has_class_token),
        uses_class_token=has_class_token,
    )


def _size_options(name: str, image_size: ImageSize) -> dict[str, Any]:
    """Return the options of networks that are built for one size; refuse others."""
    height, width = image_size
    divisor, is_square = 1, name.startswith("vit_")
    if is_square:  # "vit_b_16" has patches of 16 x 16 pixels
        divisor = int(name.rpartition("_")[2])
    elif name.startswith("maxvit"):  # its strides are up to 32, its windows 7 x 7
        divisor = 32 * 7
    if height % divisor or width % divisor or (is_square and height != width):
        raise ValueError(
            f"the sides of images must be multiples of {divisor} pixels"
            + (" and equal" if is_square else "")
        )
    if is_square:
        return {"image_size": height}
    return {} if divisor == 1 else {"input_size": image_size}


def _last_layer(module: nn.Module) -> str:
    """Return the path of the last layer with weights, which gives the logits."""
    paths: list[str] = [
        path
        for path, layer in module.named_modules()
        if list(layer.parameters(recurse=False))
    ]
    return paths[-1]


def _pretrained(name: str, weights: Any) -> PretrainedWeights:
    """Return weights of torchvision with their preprocessing and all their names."""
    preprocessing = _preprocessing(weights)
    if name in GOOGLE:
        # Trained on images scaled to [-1, 1]. torchvision normalizes them like all
        # others, and undoes that in `forward` if these weights are loaded.
        preprocessing = replace(preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3)
    categories = tuple(weights.meta["categories"] or ())
    short = ("DEFAULT",) if weights is type(weights).DEFAULT else ()
    qualified = (f"{type(weights).__name__}.{one}" for one in (weights.name, *short))
    return PretrainedWeights(
        weights.name,
        weights.url,
        preprocessing,
        categories,
        (*short, *qualified),
        license="cc-by-nc-4.0" if "SWAG" in weights.name else "",
    )


def _preprocessing(weights: Any) -> Preprocessing:
    """Return the preprocessing that torchvision defines for weights."""
    preset = weights.transforms()
    return Preprocessing(
        crop_size=preset.crop_size[0],
        resize_size=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _current_state(
    state: dict[str, Tensor], module: nn.Module, image_size: ImageSize
) -> dict[str, Tensor]:
    """Translate an old state dict, and drop the weights of auxiliary classifiers."""
    is_google = isinstance(module, (models.GoogLeNet, models.Inception3))
    needless = AUXILIARY_KEYS if is_google else ()
    is_dense = isinstance(module, models.DenseNet)
    state = {
        _current_densenet_key(key) if is_dense else key: value
        for key, value in state.items()
        if not key.startswith(needless)
    }
    is_vit = isinstance(module, models.VisionTransformer)
    if is_vit and state.get(POSITIONS, torch.empty(0)).ndim == 3:
        # For images of another size, the position embedding is resized.
        size = image_size[0], module.patch_size
        state = interpolate_embeddings(*size, OrderedDict(state))
    return state


def _current_densenet_key(key: str) -> str:
    # The files date from before torch forbade dots in module names: their keys are
    # "denselayer1.norm.1.weight" instead of "denselayer1.norm1.weight".
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.", r"\1\2.", key)

"""Blocks and heads of the families of torchvision's ConvNets.

A family lists the modules that its ``forward`` runs, in order and by their torch names
(with modules for the functions between them), its main layers, and their aliases.
`tests/networks/test_torchvision.py` compares every network with torchvision's
``forward``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torchvision.models as models
from torch import nn

from skltl.images import Preprocessing
from skltl.networks._backbone import (
    Backbone,
    Network,
    PretrainedWeights,
    expand,
    last_block,
)

# Prefixes of the names of networks that are not supported: all or part of their blocks
# are transformers.
UNSUPPORTED = ("maxvit", "swin", "vit")

# Both have auxiliary classifiers, which are used in training only, and warn unless
# `init_weights` is given.
GOOGLE = ("googlenet", "inception_v3")
GOOGLE_OPTIONS = {"aux_logits": False, "init_weights": True}
AUXILIARY_KEYS = ("aux1.", "aux2.", "AuxLogits.")

MainLayers = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """The networks of one torchvision class.

    `order` lists the modules in the order of the forward pass; a function between them
    is a pair of its name and a constructor of the equivalent module. `main_layers` maps
    names to torch paths, or is a function of the network that does. `aliases` maps the
    names used elsewhere to those of main layers.
    """

    order: tuple[str | tuple[str, Callable[[], nn.Module]], ...]
    main_layers: MainLayers | Callable[[nn.Module], MainLayers]
    aliases: Mapping[str, str] = field(default_factory=dict)


FLATTEN = ("flatten", nn.Flatten)
AVGPOOL = ("avgpool", partial(nn.AdaptiveAvgPool2d, 1))
RELU = ("relu", partial(nn.ReLU, inplace=True))


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


def _numbered(path: str, name: str, numbers: range) -> dict[str, str]:
    """Return names and paths of layers that differ in a number only."""
    return {name.format(i): path.format(i) for i in numbers}


FAMILIES: dict[type[nn.Module], Family] = {
    models.AlexNet: Family(
        ("features", "avgpool", FLATTEN, "classifier"),
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
        ("features", "avgpool", FLATTEN, "classifier"),
        _vgg_layers,
        _numbered("block{}", "pool{}", range(1, 6)) | {"fc1": "fc6", "fc2": "fc7"},
    ),
    models.ResNet: Family(
        (
            *("conv1", "bn1", "relu", "maxpool"),
            *("layer1", "layer2", "layer3", "layer4"),
            *("avgpool", FLATTEN, "fc"),
        ),
        {"stem": "maxpool", **_numbered("layer{}", "layer{}", range(1, 5))},
        {
            "conv2_x": "layer1",
            "conv3_x": "layer2",
            "conv4_x": "layer3",
            "conv5_x": "layer4",
        },
    ),
    models.DenseNet: Family(
        ("features", RELU, AVGPOOL, FLATTEN, "classifier"),
        {
            "stem": "features.pool0",
            **_numbered("features.denseblock{}", "block{}", range(1, 4)),
            "block4": "relu",
        },
        _numbered("block{}", "denseblock{}", range(1, 5)),
    ),
    models.SqueezeNet: Family(("features", "classifier", FLATTEN), _squeezenet_layers),
    models.GoogLeNet: Family(
        (
            *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
            *("inception3a", "inception3b", "maxpool3"),
            *(
                "inception4a",
                "inception4b",
                "inception4c",
                "inception4d",
                "inception4e",
            ),
            *("maxpool4", "inception5a", "inception5b"),
            *("avgpool", FLATTEN, "dropout", "fc"),
        ),
        {
            "stem": "maxpool2",
            "inception3b": "inception3b",
            "inception4e": "inception4e",
            "inception5b": "inception5b",
        },
    ),
    models.Inception3: Family(
        (
            *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
            *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
            *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
            *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
            *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
            *("avgpool", "dropout", FLATTEN, "fc"),
        ),
        {
            "stem": "maxpool2",
            "Mixed_5d": "Mixed_5d",
            "Mixed_6e": "Mixed_6e",
            "Mixed_7c": "Mixed_7c",
        },
        {"mixed2": "Mixed_5d", "mixed7": "Mixed_6e", "mixed10": "Mixed_7c"},  # Keras
    ),
    models.MobileNetV2: Family(
        ("features", AVGPOOL, FLATTEN, "classifier"), _resolution_layers
    ),
    models.MobileNetV3: Family(
        ("features", "avgpool", FLATTEN, "classifier"), _resolution_layers
    ),
    models.MNASNet: Family(
        ("layers", AVGPOOL, FLATTEN, "classifier"),
        {
            "stem": "layers.7",
            **{f"block{i}": f"layers.{i + 7}" for i in range(1, 7)},
            "final_conv": "layers.16",
        },
    ),
    models.ShuffleNetV2: Family(
        (
            "conv1",
            "maxpool",
            "stage2",
            "stage3",
            "stage4",
            "conv5",
            AVGPOOL,
            FLATTEN,
            "fc",
        ),
        {
            "stem": "maxpool",
            **_numbered("stage{}", "stage{}", range(2, 5)),
            "conv5": "conv5",
        },
        {"final_conv": "conv5"},
    ),
    models.EfficientNet: Family(
        ("features", "avgpool", FLATTEN, "classifier"),
        _stage_layers,
        {"top_conv": "final_conv", "conv_head": "final_conv"},  # Keras; timm
    ),
    models.RegNet: Family(
        ("stem", "trunk_output", "avgpool", FLATTEN, "fc"),
        {"stem": "stem", **_numbered("trunk_output.block{}", "block{}", range(1, 5))},
        _numbered("block{}", "s{}", range(1, 5)),  # timm
    ),
    models.ConvNeXt: Family(
        ("features", "avgpool", "classifier"),
        {
            "stem": "features.0",
            **{f"stage{i}": f"features.{2 * i - 1}" for i in range(1, 5)},
        },
    ),
}


def list_torchvision() -> list[str]:
    """Return the names of torchvision's ConvNets for image classification."""
    names = models.list_models(module=models)
    return [name for name in names if not name.startswith(UNSUPPORTED)]


def torchvision_backbone(name: str) -> Backbone:
    """Return the backbone of a torchvision network."""
    known = list(models.get_model_weights(name))
    return Backbone(
        name,
        build=partial(_build, name),
        preprocessing=_preprocessing(known[0]),
        weights=tuple(_pretrained(name, weights) for weights in known),
        known_as=f"torchvision {name}",
        rename_keys=_rename_densenet_key if name.startswith("densenet") else None,
        needless_keys=AUXILIARY_KEYS if name in GOOGLE else (),
    )


def _build(name: str, n_classes: int | None) -> Network:
    options: dict[str, Any] = dict(GOOGLE_OPTIONS) if name in GOOGLE else {}
    if n_classes is not None:
        options["num_classes"] = n_classes
    return _as_network(models.get_model(name, weights=None, **options))


def _as_network(model: nn.Module) -> Network:
    """Split a network of torchvision into blocks and a head."""
    family = FAMILIES[type(model)]
    modules = {}
    for entry in family.order:
        name, make = (entry, None) if isinstance(entry, str) else entry
        modules[name] = getattr(model, name) if make is None else make()
    steps = expand(modules)
    layers = family.main_layers
    paths = layers(model) if callable(layers) else layers
    ends = {name: last_block(steps, path) for name, path in paths.items()}
    # The head begins with the last layer with parameters, which gives the logits.
    trained = [name for name, step in steps.items() if list(step.parameters())]
    n_blocks = list(steps).index(trained[-1])
    return Network(
        dict(list(steps.items())[:n_blocks]),
        dict(list(steps.items())[n_blocks:]),
        ends,
        {alias: name for alias, name in family.aliases.items() if name in ends},
    )


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
        weights.name, weights.url, preprocessing, categories, (*short, *qualified)
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


def _rename_densenet_key(key: str) -> str:
    # The files date from before torch forbade dots in module names: their keys are
    # "denselayer1.norm.1.weight" instead of "denselayer1.norm1.weight".
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.", r"\1\2.", key)

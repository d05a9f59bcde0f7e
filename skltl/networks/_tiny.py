"""``tiny``, the small residual ConvNet that is shipped inside the package.

It exists so that examples, documentation and tests run offline. The script that trained
it is ``examples/train_tiny_backbone.py``; its model card is in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet50_Weights

from skltl.images import Preprocessing
from skltl.networks._backbone import (
    Backbone,
    Network,
    PretrainedWeights,
    expand,
    last_step,
)

FOLDER = Path(__file__).parent


@cache
def imagenet_names() -> dict[str, str]:
    """Return the names of ImageNet's 1,000 classes by their WordNet number.

    They stand in the order of the logits, which is that of the numbers.
    """
    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return dict(zip(_read("imagenet_wnids.txt"), unique(names), strict=True))


def tiny_imagenet_categories() -> tuple[str, ...]:
    """Return the names of Tiny-ImageNet's 200 classes, in the order of the logits."""
    names = imagenet_names()
    return tuple(names[number] for number in _read("tiny_wnids.txt"))


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of which no two are equal: one that stood before gets its number.

    ImageNet has two kinds of cranes.
    """
    seen: dict[str, None] = {}
    for number, name in enumerate(names):
        seen[f"{name} ({number})" if name in seen else name] = None
    return tuple(seen)


def _read(name: str) -> list[str]:
    return (FOLDER / name).read_text().split()


WEIGHTS_FILE = Path(__file__).with_name("tiny.safetensors")

STEM_WIDTH = 32
BLOCK_WIDTHS = (64, 96, 192, 288)
# Channels between the two convolutions of each block's residual unit; None: the block
# has no such unit. The last is narrow: at full width it would outweigh all the rest.
RESIDUAL_WIDTHS = (None, 96, 192, 64)
N_CLASSES = 200
CUT_POINTS = ("stem", "block1", "block2", "block3", "block4")


class ConvUnit(nn.Sequential):
    """Convolution 3 x 3, batch-norm, ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
        )


class ResidualUnit(nn.Module):
    """Two convolutions, added to what came in."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ConvUnit(width, hidden_width),
            nn.Conv2d(hidden_width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return a feature map of the same shape (n, c, h, w)."""
        output: torch.Tensor = self.relu(feature_map + self.residual(feature_map))
        return output


class TinyNet(nn.Module):
    """A stem at full resolution, then four blocks that each halve it, then a head."""

    def __init__(self, num_classes: int = N_CLASSES) -> None:
        super().__init__()
        self.stem = ConvUnit(3, STEM_WIDTH)
        width = STEM_WIDTH
        for number, (n_out, hidden_width) in enumerate(
            zip(BLOCK_WIDTHS, RESIDUAL_WIDTHS, strict=True), start=1
        ):
            block = nn.Sequential(ConvUnit(width, n_out, stride=2))
            if hidden_width is not None:
                block.append(ResidualUnit(n_out, hidden_width))
            self.add_module(f"block{number}", block)
            width = n_out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, num_classes) of a normalised batch (n, 3, h, w)."""
        for module in self.children():
            batch = module(batch)
        return batch


def embedded_backbone() -> Backbone:
    """Describe ``tiny`` and where its weights lie."""
    # Trained on parts of images of 64 pixels; whole ones are seen best a little
    # enlarged (see the training script).
    preprocessing = Preprocessing(crop_size=80)
    weights = PretrainedWeights(
        "TINY_IMAGENET200", WEIGHTS_FILE, preprocessing, tiny_imagenet_categories()
    )
    return Backbone("tiny", _build, preprocessing, (weights,), known_as="skltl tiny")


def _build(n_classes: int | None) -> Network:
    modules = dict(TinyNet(n_classes or N_CLASSES).named_children())
    blocks = {name: modules.pop(name) for name in CUT_POINTS}
    steps = expand(blocks)
    ends = {name: last_step(steps, name) for name in CUT_POINTS}
    return Network(steps, modules, ends)

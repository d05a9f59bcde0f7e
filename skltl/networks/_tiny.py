"""``tiny``, a small residual ConvNet that is shipped with the package.

Examples, documentation and tests use it, so that they run offline. It was trained by
``examples/train_tiny_backbone.py``; its model card is in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet50_Weights

from skltl.images import Preprocessing
from skltl.networks._backbone import Backbone, PretrainedWeights
from skltl.networks._network import ImageSize, Model

FOLDER = Path(__file__).parent

STEM_WIDTH = 32
BLOCK_WIDTHS = (64, 96, 192, 288)
# Channels between the two convolutions of the residual unit of each block; None for a
# block without one. The last unit is narrow: at full width it would have more weights
# than the rest of the network.
RESIDUAL_WIDTHS = (None, 96, 192, 64)
N_CLASSES = 200
MAIN_LAYERS = ("stem", "block1", "block2", "block3", "block4")


@cache
def imagenet_names() -> dict[str, str]:
    """Return the ImageNet class names by WordNet id, in the order of the logits."""
    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return dict(zip(_read_ids("imagenet_wnids.txt"), unique(names), strict=True))


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Append the class index to names that occurred before.

    ImageNet has two classes named "crane".
    """
    found: dict[str, None] = {}
    for index, name in enumerate(names):
        found[f"{name} ({index})" if name in found else name] = None
    return tuple(found)


def _read_ids(file_name: str) -> list[str]:
    return (FOLDER / file_name).read_text().split()


class ConvUnit(nn.Sequential):
    """3 x 3 convolution, batch-norm, ReLU."""

    __module__ = "skltl.networks"  # the path in saved files

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
        )


class ResidualUnit(nn.Module):
    """Two convolutions with a residual connection."""

    __module__ = "skltl.networks"  # the path in saved files

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
    """A stem at full resolution, four blocks that halve it, and a linear classifier."""

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
        """Return the logits (n, num_classes) of a normalized batch (n, 3, h, w)."""
        for module in self.children():
            batch = module(batch)
        return batch


def tiny_backbone() -> Backbone:
    """Return the backbone ``"tiny"``."""
    # Trained on crops of 64 pixels; accuracy on whole images is best at a slightly
    # larger size (see the training script).
    preprocessing = Preprocessing(crop_size=80)
    names = imagenet_names()
    categories = tuple(names[wnid] for wnid in _read_ids("tiny_wnids.txt"))
    weights = PretrainedWeights(
        "TINY_IMAGENET200", FOLDER / "tiny.safetensors", preprocessing, categories
    )
    return Backbone("tiny", _build, preprocessing, (weights,), known_as="skltl tiny")


def _build(n_classes: int | None, image_size: ImageSize) -> Model:
    module = TinyNet(n_classes or N_CLASSES)
    return Model(module, {name: name for name in MAIN_LAYERS}, head=("fc",))

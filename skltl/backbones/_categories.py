"""The names of ImageNet's classes, and WordNet's numbers for them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from torchvision.models import ResNet50_Weights

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

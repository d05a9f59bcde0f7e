"""What the blocks that learn begin with, for each picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skltl._large_arrays import new_array
from skltl.backbones import block_shapes
from skltl.classifiers._views import Views
from skltl.features import Recipe, extract_features
from skltl.images import (
    ImageSource,
    Preprocessing,
    as_float,
    normalise,
)


class Inputs(Protocol):
    """What some layers begin with, for each picture and view of it.

    `n_views` is the number of variants of each picture; ``None`` stands for as many as
    one likes.
    """

    n_views: int | None

    def __len__(self) -> int:
        """Count the pictures."""
        ...

    def batch(self, positions: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return those of some views of some pictures, on the device."""
        ...


class Stored:
    """Inputs that have been computed: those that frozen blocks give.

    Parameters
    ----------
    array : array of shape (n, 1 + n_views, ...)
        float32; maps (c, h, w) or vectors (d,), for each picture and view.
    device : torch.device
        Where they are wanted.
    """

    def __init__(self, array: NDArray[np.float32], device: torch.device) -> None:
        self.n_views: int | None = array.shape[1] - 1
        self._array = array
        self._device = device

    def __len__(self) -> int:
        return len(self._array)

    def batch(self, positions: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return those of some views of some pictures, on the device."""
        batch = torch.from_numpy(self._array[positions, views]).to(self._device)
        if batch.ndim == 2:
            return batch
        return batch.contiguous(memory_format=torch.channels_last)


class Fresh:
    """Inputs that are made when they are asked for.

    Parameters
    ----------
    views : Views
        The pictures.
    n_views : int or None
        Variants of each that are asked for.
    first : callable
        From pixels (b, h, w, 3) to inputs (b, ...) on the device.
    """

    def __init__(
        self,
        views: Views,
        n_views: int | None,
        first: Callable[[NDArray[Any]], Tensor],
    ) -> None:
        self.n_views = n_views
        self._views = views
        self._first = first

    def __len__(self) -> int:
        return self._views.n_pictures

    def batch(self, positions: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return those of some views of some pictures, on the device."""
        pictures = [
            self._views.view(position, number)
            for position, number in zip(positions, views, strict=True)
        ]
        if any(picture.dtype != np.uint8 for picture in pictures):
            pictures = [as_float(picture) for picture in pictures]
            self._views.warn_of_odd_range()
        return self._first(np.stack(pictures))


def run_frozen(
    source: ImageSource,
    n_views: int,
    recipe: Recipe,
    n_threads: int,
    verbose: bool,
    cache: Path | None,
) -> Stored:
    """Send all pictures through the frozen blocks, once.

    Parameters
    ----------
    source : ImageSource
        The pictures; with `n_views`, each followed by its variants.
    n_views : int
        How many these are.
    recipe : Recipe
        Of one block, the last of the frozen ones. With ``pooling="flatten"`` maps stay
        maps.
    n_threads : int
        Threads that decode.
    verbose : bool
        Whether a progress bar is shown.
    cache : Path or None
        The folder in which features are kept.

    Returns
    -------
    Stored
        What the block gives for each.
    """
    (block,) = recipe.blocks
    rows = new_array((len(source), sum(recipe.widths())), np.float32)
    extract_features(source, recipe, [block], n_threads, verbose, cache, out=rows)
    shape = _shape(recipe) if recipe.pooling == "flatten" else rows.shape[1:]
    return Stored(rows.reshape(-1, 1 + n_views, *shape), recipe.device)


def frozen_first(recipe: Recipe) -> Callable[[NDArray[Any]], Tensor]:
    """Return what sends pixels through the frozen blocks, whenever they are needed."""

    def first(pixels: NDArray[Any]) -> Tensor:
        parts = [
            recipe.compute(torch.from_numpy(pixels[start : start + recipe.batch_size]))
            for start in range(0, len(pixels), recipe.batch_size)
        ]
        rows = torch.cat(parts)
        if recipe.pooling != "flatten":
            return rows
        batch = rows.reshape(-1, *_shape(recipe))
        is_map = batch.ndim == 4
        return batch.contiguous(memory_format=torch.channels_last) if is_map else batch

    return first


def normalised(
    preprocessing: Preprocessing, device: torch.device
) -> Callable[[NDArray[Any]], Tensor]:
    """Return what makes of pixels the numbers that a network sees."""
    # Not the user's default dtype.
    kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
    mean = torch.tensor(preprocessing.mean, **kind).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, **kind).view(3, 1, 1)

    def first(pixels: NDArray[Any]) -> Tensor:
        batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        batch = normalise(batch, mean, std)
        return torch.Tensor.contiguous(batch, memory_format=torch.channels_last)

    return first


def without_resize(recipe: Recipe) -> Recipe:
    """Return the recipe for pictures that have been resized and cropped already."""
    return replace(
        recipe, preprocessing=replace(recipe.preprocessing, resize_size=None)
    )


def _shape(recipe: Recipe) -> tuple[int, ...]:
    (block,) = recipe.blocks
    size = recipe.preprocessing.crop_size
    return block_shapes(recipe.backbone, size, recipe.blocks)[block]

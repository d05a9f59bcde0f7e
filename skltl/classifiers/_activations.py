"""What frozen blocks give for each picture, computed once and kept."""

from __future__ import annotations

import math
import tempfile
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skltl.backbones import block_shapes
from skltl.features import Recipe, extract_features
from skltl.images import (
    ImageSource,
    Preprocessing,
    as_float,
    content_key,
    iter_crops,
    normalise,
)

# What lies in memory; more than that lies in a file in the system's temporary folder.
MAX_BYTES_IN_MEMORY = 2**31


class Inputs(Protocol):
    """What the blocks that learn begin with, for each picture of a source."""

    def __len__(self) -> int:
        """Count the pictures."""
        ...

    def batch(self, positions: NDArray[np.int64]) -> Tensor:
        """Return those of some pictures, on the device."""
        ...

    def digest(self) -> bytes:
        """Name all of them by their content."""
        ...


class Activations:
    """What frozen blocks give: maps (n, c, h, w), or pooled features (n, d).

    Parameters
    ----------
    source : ImageSource
        The pictures, or views of them.
    recipe : Recipe
        Of one block, the last of the frozen ones.
    n_threads : int
        Threads that decode.
    verbose : bool, default=False
        Whether a progress bar is shown.
    """

    def __init__(
        self, source: ImageSource, recipe: Recipe, n_threads: int, verbose: bool = False
    ) -> None:
        (block,) = recipe.blocks
        shape = block_shapes(recipe.backbone, recipe.preprocessing.crop_size, (block,))
        is_map = recipe.pooling == "flatten" and len(shape[block]) == 3
        rows = _new_array((len(source), sum(recipe.widths())), np.float32)
        extract_features(source, recipe, [block], n_threads, verbose, out=rows)
        self._array = rows.reshape(-1, *shape[block]) if is_map else rows
        self._device = recipe.device

    def __len__(self) -> int:
        return len(self._array)

    def batch(self, positions: NDArray[np.int64]) -> Tensor:
        """Return those of some pictures, on the device."""
        batch = torch.from_numpy(self._array[positions]).to(self._device)
        if batch.ndim == 2:
            return batch
        return batch.contiguous(memory_format=torch.channels_last)

    def digest(self) -> bytes:
        """Name all of them by their content."""
        return content_key(self._array)


class Pictures:
    """The pictures themselves, where no block is frozen: normalised (n, 3, h, w).

    Parameters
    ----------
    source : ImageSource
        The pictures, or views of them.
    preprocessing : Preprocessing
        What they go through.
    device : torch.device
        Where they are wanted.
    n_threads : int
        Threads that decode.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        device: torch.device,
        n_threads: int,
    ) -> None:
        self._array = _decoded(source, preprocessing, n_threads)
        self._device = device
        self._mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._array)

    def batch(self, positions: NDArray[np.int64]) -> Tensor:
        """Return those of some pictures, on the device."""
        pixels = torch.from_numpy(self._array[positions]).to(self._device)
        batch = normalise(pixels.permute(0, 3, 1, 2), self._mean, self._std)
        return torch.Tensor.contiguous(batch, memory_format=torch.channels_last)

    def digest(self) -> bytes:
        """Name all of them by their content."""
        return content_key(self._array)


def _decoded(
    source: ImageSource, preprocessing: Preprocessing, n_threads: int
) -> NDArray[Any]:
    """Decode all pictures; 8-bit ones stay 8-bit if all are."""
    size, everything = preprocessing.crop_size, range(len(source))
    array = _new_array((len(source), size, size, 3), np.uint8)
    with closing(iter_crops(source, everything, preprocessing, 8, n_threads)) as crops:
        for crop in crops:
            if crop.pixels.dtype != array.dtype and array.dtype == np.uint8:
                seen = as_float(array)
                array = _new_array(array.shape, np.float32)
                array[:] = seen
            is_float = array.dtype != np.uint8
            array[crop.position] = as_float(crop.pixels) if is_float else crop.pixels
    source.warn_of_odd_range()
    return array


def _new_array(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Make an array, in a file if it is too large for memory.

    The file has no name any more when this returns, and ends with the array.
    """
    if math.prod(shape) * np.dtype(dtype).itemsize <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="skltl-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)

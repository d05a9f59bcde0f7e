"""Random variants of pictures, each of which can be made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skltl._large_arrays import new_array
from skltl._randomness import as_int, derived_seed, own_random_state
from skltl.images import ImageSource, Preprocessing, as_float, iter_crops

Augment = Callable[[Tensor], Tensor]


class Views(ImageSource):
    """Pictures and random variants of them; a source in which these stand side by side.

    View 0 of a picture is the picture itself. Any other number names one variant, the
    same at any time: the augmentation runs with a seed made of it.

    Parameters
    ----------
    crops : array of shape (n, h, w, 3)
        The pictures, as the network sees them; uint8 or float32.
    augment : callable or None
        From a picture (3, h, w) to a variant of the same shape.
    n_views : int
        Variants of each picture that the source has, besides the picture.
    seed : int
        Of the variants.
    """

    def __init__(
        self, crops: NDArray[Any], augment: Augment | None, n_views: int, seed: int
    ) -> None:
        super().__init__(crops)
        self._crops = crops
        self._augment = augment
        self._n_views = n_views
        self._seed = seed

    @property
    def n_pictures(self) -> int:
        """Count the pictures, without their variants."""
        return len(self._crops)

    def __len__(self) -> int:
        return self.n_pictures * (1 + self._n_views)

    def decode(self, index: int) -> NDArray[Any]:
        """Return view ``index`` of all views of all pictures, in order."""
        return self.view(*divmod(index, 1 + self._n_views))

    def path(self, index: int) -> str | None:
        """Return ``None``: variants are no files."""
        return None

    def view(self, position: int, number: int) -> NDArray[Any]:
        """Return a view of a picture (h, w, 3), of the picture's dtype or float32."""
        crop: NDArray[Any] = self._crops[position]
        if number == 0 or self._augment is None:
            return crop
        picture = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
        seed = derived_seed(self._seed, "view", int(position), int(number))
        with own_random_state(as_int(seed)):
            variant = self._augment(picture)
        _check(variant, picture, position)
        variant = variant.detach().cpu().permute(1, 2, 0).contiguous()
        if variant.dtype == torch.uint8:
            return np.asarray(variant.numpy())
        pixels: NDArray[np.float32] = variant.float().numpy()
        self._widen_seen_range(float(pixels.min()), float(pixels.max()))
        return pixels


def decode_crops(
    source: ImageSource, preprocessing: Preprocessing, n_threads: int
) -> NDArray[Any]:
    """Decode all pictures, resized and cropped: (n, h, w, 3).

    8-bit ones stay 8-bit if all of them are.
    """
    size, everything = preprocessing.crop_size, range(len(source))
    array = new_array((len(source), size, size, 3), np.uint8)
    with closing(iter_crops(source, everything, preprocessing, 8, n_threads)) as crops:
        for crop in crops:
            if crop.pixels.dtype != array.dtype and array.dtype == np.uint8:
                seen = array
                array = new_array(array.shape, np.float32)
                for row, pixels in enumerate(seen[: crop.position]):
                    array[row] = as_float(pixels)
            is_float = array.dtype != np.uint8
            array[crop.position] = as_float(crop.pixels) if is_float else crop.pixels
    source.warn_of_odd_range()
    return array


def draw_views(
    rng: np.random.Generator, n: int, n_views: int | None
) -> NDArray[np.int64]:
    """Draw a number of a view for each of n pictures.

    Parameters
    ----------
    rng : Generator
        Of the numbers.
    n : int
        How many are wanted.
    n_views : int or None
        Variants that there are of each picture; ``None`` is as many as one likes.

    Returns
    -------
    array of shape (n,)
        0 where there are no variants, else 1 and above.
    """
    if n_views == 0:
        return np.zeros(n, dtype=np.int64)
    return rng.integers(1, 2**31 if n_views is None else 1 + n_views, size=n)


def _check(variant: Any, picture: Tensor, position: int) -> None:
    """Refuse what `augment` gave, if the network cannot take it."""
    if not isinstance(variant, Tensor):
        raise TypeError(
            f"augment must give a tensor (3, h, w), it gave {type(variant).__name__}."
        )
    if variant.shape != picture.shape:
        raise ValueError(
            f"augment gave a picture of shape {tuple(variant.shape)} for one of shape "
            f"{tuple(picture.shape)}, which is what the network sees. Let it crop and "
            "resize to this size, or set image_size."
        )
    if not (variant.dtype == torch.uint8 or variant.is_floating_point()):
        raise TypeError(f"augment must give uint8 or floats, it gave {variant.dtype}.")
    if variant.is_floating_point() and not torch.isfinite(variant).all():
        raise ValueError(f"augment gave NaN or infinity for picture {position}.")

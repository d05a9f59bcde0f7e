"""What the trainable blocks are trained on: hold-out, augmented views, activations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from skltl._large_arrays import new_array
from skltl._random import as_int, derived_seed, own_random_state
from skltl.features import extract_features
from skltl.images import ImageSource, Preprocessing, as_float, iter_crops, normalise
from skltl.inference import Recipe
from skltl.networks import block_shapes

# What early stopping looks at, if nothing else is said.
USUAL_SHARE = 0.1

# Groups are dealt out to so many parts, of which some are held out.
N_PARTS = 20

Positions = NDArray[np.int64]


def hold_out(
    targets: NDArray[np.int64],
    groups: Any,
    share: float | None,
    is_needed: bool,
    seed: int,
) -> tuple[Positions, Positions]:
    """Part the images into those to learn from, and those to look how it goes.

    Parameters
    ----------
    targets : array of shape (n,)
        Numbers of the classes; of each, the same share is held out.
    groups : array of shape (n,), or None
        What must not be parted; then the shares are as near as whole groups allow.
    share : float or None
        Of the images, in (0, 1); ``None`` is none, or a tenth if that is needed.
    is_needed : bool
        Whether some must be held out.
    seed : int
        Of the choice.

    Returns
    -------
    training, validation : array of int
        Positions.

    Raises
    ------
    ValueError
        If there are too few images or groups for that.
    """
    if groups is not None:
        check_consistent_length(targets, groups)
    everything = np.arange(len(targets))
    if share is None:
        share = USUAL_SHARE if is_needed else 0.0
    if not share:
        return everything, everything[:0]
    if groups is not None:
        return _by_group(targets, column_or_1d(groups), share, seed)
    counts = np.bincount(targets)
    n_held_out = max(round(share * len(targets)), len(counts))
    if counts.min() < 2 or len(targets) - n_held_out < len(counts):
        raise ValueError(
            f"validation_fraction={share} cannot hold out images of each class and "
            f"leave some to learn from: there are {len(targets)} images of "
            f"{len(counts)} classes, {counts.min()} of the rarest."
        )
    training, validation = train_test_split(
        everything, test_size=n_held_out, stratify=targets, random_state=seed
    )
    return training, validation


def _by_group(
    targets: NDArray[np.int64], groups: NDArray[Any], share: float, seed: int
) -> tuple[Positions, Positions]:
    n_groups = len(np.unique(groups))
    n_parts = min(N_PARTS, n_groups, int(np.bincount(targets).min()))
    if n_parts < 2:
        raise ValueError(
            f"groups: there are {n_groups} of them, or a class has a single image: "
            "too few to hold some out."
        )
    parts = StratifiedGroupKFold(n_parts, shuffle=True, random_state=seed)
    # As many parts as come nearest to the share, but neither none nor all.
    n_held_out = min(max(round(share * n_parts), 1), n_parts - 1)
    dealt = [part for _, part in parts.split(targets, targets, groups)]
    validation = np.sort(np.concatenate(dealt[:n_held_out]))
    training = np.setdiff1d(np.arange(len(targets)), validation)
    if len(validation) == 0 or len(np.unique(targets[training])) < len(
        np.unique(targets)
    ):
        raise ValueError(
            f"groups: with validation_fraction={share} the groups that are left hold "
            "not all of the classes. Groups must not be the classes themselves."
        )
    return training, validation


Augment = Callable[[Tensor], Tensor]


class Views(ImageSource):
    """Images and random variants of them; a source in which these stand side by side.

    View 0 of an image is the image itself. Any other number names one variant, the
    same at any time: the augmentation runs with a seed made of it.

    Parameters
    ----------
    crops : array of shape (n, h, w, 3)
        The images, as the network sees them; uint8 or float32.
    augment : callable or None
        From an image (3, h, w) to a variant of the same shape.
    n_views : int
        Variants of each image that the source has, besides the image.
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
    def n_images(self) -> int:
        """Count the images, without their variants."""
        return len(self._crops)

    def __len__(self) -> int:
        return self.n_images * (1 + self._n_views)

    def decode(self, index: int) -> NDArray[Any]:
        """Return view ``index`` of all views of all images, in order."""
        return self.view(*divmod(index, 1 + self._n_views))

    def path(self, index: int) -> str | None:
        """Return ``None``: variants are no files."""
        return None

    def view(self, position: int, number: int) -> NDArray[Any]:
        """Return a view of an image (h, w, 3), of the image's dtype or float32."""
        crop: NDArray[Any] = self._crops[position]
        if number == 0 or self._augment is None:
            return crop
        image = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
        seed = derived_seed(self._seed, "view", int(position), int(number))
        with own_random_state(as_int(seed)):
            variant = self._augment(image)
        _check(variant, image, position)
        variant = variant.detach().cpu().permute(1, 2, 0).contiguous()
        if variant.dtype == torch.uint8:
            return np.asarray(variant.numpy())
        pixels: NDArray[np.float32] = variant.float().numpy()
        self._widen_seen_range(float(pixels.min()), float(pixels.max()))
        return pixels


def decode_crops(
    source: ImageSource, preprocessing: Preprocessing, n_threads: int
) -> NDArray[Any]:
    """Decode all images, resized and cropped: (n, h, w, 3).

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
    """Draw a number of a view for each of n images.

    Parameters
    ----------
    rng : Generator
        Of the numbers.
    n : int
        How many are wanted.
    n_views : int or None
        Variants that there are of each image; ``None`` is as many as one likes.

    Returns
    -------
    array of shape (n,)
        0 where there are no variants, else 1 and above.
    """
    if n_views == 0:
        return np.zeros(n, dtype=np.int64)
    return rng.integers(1, 2**31 if n_views is None else 1 + n_views, size=n)


def _check(variant: Any, image: Tensor, position: int) -> None:
    """Refuse what `augment` gave, if the network cannot take it."""
    if not isinstance(variant, Tensor):
        raise TypeError(
            f"augment must give a tensor (3, h, w), it gave {type(variant).__name__}."
        )
    if variant.shape != image.shape:
        raise ValueError(
            f"augment gave an image of shape {tuple(variant.shape)} for one of shape "
            f"{tuple(image.shape)}, which is what the network sees. Let it crop and "
            "resize to this size, or set image_size."
        )
    if not (variant.dtype == torch.uint8 or variant.is_floating_point()):
        raise TypeError(f"augment must give uint8 or floats, it gave {variant.dtype}.")
    if variant.is_floating_point() and not torch.isfinite(variant).all():
        raise ValueError(f"augment gave NaN or infinity for image {position}.")


class Inputs(Protocol):
    """What some layers begin with, for each image and view of it.

    `n_views` is the number of variants of each image; ``None`` stands for as many as
    one likes.
    """

    n_views: int | None

    def __len__(self) -> int:
        """Count the images."""
        ...

    def batch(self, positions: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return those of some views of some images, on the device."""
        ...


class Stored:
    """Inputs that have been computed: those that frozen blocks give.

    Parameters
    ----------
    array : array of shape (n, 1 + n_views, ...)
        float32; maps (c, h, w) or vectors (d,), for each image and view.
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
        """Return those of some views of some images, on the device."""
        batch = torch.from_numpy(self._array[positions, views]).to(self._device)
        if batch.ndim == 2:
            return batch
        return batch.contiguous(memory_format=torch.channels_last)


class Fresh:
    """Inputs that are made when they are asked for.

    Parameters
    ----------
    views : Views
        The images.
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
        return self._views.n_images

    def batch(self, positions: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return those of some views of some images, on the device."""
        images = [
            self._views.view(position, number)
            for position, number in zip(positions, views, strict=True)
        ]
        if any(image.dtype != np.uint8 for image in images):
            images = [as_float(image) for image in images]
            self._views.warn_of_odd_range()
        return self._first(np.stack(images))


def run_frozen(
    source: ImageSource,
    n_views: int,
    recipe: Recipe,
    n_threads: int,
    verbose: bool,
    cache: Path | None,
) -> Stored:
    """Send all images through the frozen blocks, once.

    Parameters
    ----------
    source : ImageSource
        The images; with `n_views`, each followed by its variants.
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
    """Return the recipe for images that have been resized and cropped already."""
    return replace(
        recipe, preprocessing=replace(recipe.preprocessing, resize_size=None)
    )


def _shape(recipe: Recipe) -> tuple[int, ...]:
    (block,) = recipe.blocks
    size = recipe.preprocessing.crop_size
    return block_shapes(recipe.backbone, size, recipe.blocks)[block]

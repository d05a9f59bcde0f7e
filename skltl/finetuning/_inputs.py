"""Inputs of the trained layers: images, augmented views, activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from skltl._caller import user_stacklevel
from skltl._code import why_not_picklable
from skltl._large_arrays import new_array
from skltl._parameters import resolve_device, resolve_threads
from skltl._random import as_int, derived_seed, own_random_state
from skltl.exceptions import NonFiniteFeaturesError, PersistenceWarning
from skltl.features import cache_folder, extract_features, extraction_config
from skltl.finetuning._data import Positions
from skltl.finetuning._distributed import gather, gather_rows, n_processes, rank, shares
from skltl.finetuning._network import SplitNetwork
from skltl.images import (
    ImageSource,
    PartOfSource,
    PixelRanges,
    Preprocessing,
    as_float,
    decode_crops,
    normalize,
)
from skltl.inference import ExtractionConfig, FrozenPrefix


@dataclass(frozen=True)
class Inputs:
    """Inputs of the trainable blocks or the head, for views of the images.

    `batch` returns those of one view of each of some images, on the device. View 0 is
    the image itself.
    """

    n_views: int | None  # augmented views of each image; None: unlimited
    batch: Callable[[Positions, NDArray[np.int64]], Tensor]


def stored_inputs(array: NDArray[np.float32], device: torch.device) -> Inputs:
    """Return inputs that were computed once, an array (n, 1 + n_views, ...)."""

    def batch(positions: Positions, views: NDArray[np.int64]) -> Tensor:
        inputs = torch.from_numpy(array[positions, views]).to(device)
        if inputs.ndim != 4:
            return inputs
        return inputs.contiguous(memory_format=torch.channels_last)

    return Inputs(array.shape[1] - 1, batch)


class AugmentedViews(ImageSource):
    """Views of the crops (n, h, w, c) of a source, computed whenever they are needed.

    View 0 of an image is the image itself; any other number seeds an augmented view. As
    an `ImageSource`, each image is followed by its views.
    """

    def __init__(
        self,
        source: ImageSource,
        crops: NDArray[Any],
        augment: Callable[[Tensor], Any] | None,
        n_views: int | None,
        seed: int,
    ) -> None:
        super().__init__(crops)
        # What was said of the images is not repeated of their views.
        self.ranges = PixelRanges("Images that `augment` returns", source.ranges.warned)
        self._crops = crops
        self._augment = augment
        self._n_stored = 1 + (n_views or 0)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._crops) * self._n_stored

    def fetch(self, index: int) -> NDArray[Any]:
        """Return one of all views of all images."""
        return self.view(*divmod(index, self._n_stored))

    def decode_item(self, index: int, item: NDArray[Any]) -> NDArray[Any]:
        """Return a view, which is decoded already."""
        return item

    def path(self, index: int) -> str | None:
        """Return ``None``: views are not files."""
        return None

    def is_array(self, index: int) -> bool:
        """Return ``False``: a view is computed each time."""
        return False

    def view(self, position: int, number: int) -> NDArray[Any]:
        """Return a view (h, w, c) of an image, uint8 or float32."""
        crop: NDArray[Any] = self._crops[position]
        if number == 0 or self._augment is None:
            return crop
        image = torch.from_numpy(crop.transpose(2, 0, 1).copy())  # may be changed
        seed = derived_seed(self._seed, "view", int(position), int(number))
        with own_random_state(as_int(seed)):
            view = self._augment(image)
        _check_view(view, image, position)
        view = view.detach().cpu().permute(1, 2, 0).contiguous()
        if view.dtype == torch.uint8:
            return np.asarray(view.numpy())
        pixels: NDArray[np.float32] = view.float().numpy()
        self.ranges.add("floats", float(pixels.min()), float(pixels.max()))
        return pixels

    def pixels(self, positions: Positions, views: NDArray[np.int64]) -> NDArray[Any]:
        """Return one view of each of some images: (b, h, w, c)."""
        images = [
            self.view(position, number)
            for position, number in zip(positions, views, strict=True)
        ]
        if any(image.dtype != np.uint8 for image in images):
            images = [as_float(image) for image in images]
            self.warn_of_odd_range()
        return np.stack(images)


def _check_view(view: Any, image: Tensor, position: int) -> None:
    """Raise if the network cannot take what `augment` returned."""
    if not isinstance(view, Tensor):
        raise TypeError(
            "augment must return a tensor (c, h, w), it returned "
            f"{type(view).__name__}."
        )
    if view.shape != image.shape:
        raise ValueError(
            f"augment returned an image of shape {tuple(view.shape)} for one of shape "
            f"{tuple(image.shape)}, the input size of the network. Let it crop and "
            "resize to this size, or set image_size."
        )
    if not (view.dtype == torch.uint8 or view.is_floating_point()):
        raise TypeError(
            f"augment must return uint8 or floats, it returned {view.dtype}."
        )
    if view.is_floating_point() and not torch.isfinite(view).all():
        raise ValueError(f"augment returned NaN or infinity for image {position}.")


def resolve_augment(
    augment: Any, preprocessing: Preprocessing
) -> Callable[[Tensor], Any] | None:
    """Return the augmentation of a parameter; ``"auto"`` is for the input size.

    Three quarters of the area are left on average, since the crop of the preprocessing
    has taken a part of the image already. The ratios, relative to that of the input,
    are those of torchvision's training, and the colors vary by as much as in fastai.
    """
    if not isinstance(augment, str):
        chosen: Callable[[Tensor], Any] | None = augment
        return chosen
    height, width = preprocessing.size
    ratio = 3 / 4 * width / height, 4 / 3 * width / height
    transforms: list[Any] = [
        v2.RandomResizedCrop((height, width), scale=(0.5, 1.0), ratio=ratio),
        v2.RandomHorizontalFlip(),
    ]
    if preprocessing.n_channels in (1, 3):
        transforms.append(v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2))
    composed: Callable[[Tensor], Any] = v2.Compose(transforms)
    return composed


def check_picklable(augment: Any) -> None:
    """Warn if the fitted estimator cannot be saved because of this function."""
    reason = why_not_picklable(augment)
    if reason:
        name = getattr(augment, "__qualname__", type(augment).__name__)
        warnings.warn(
            f"augment={name} cannot be pickled, so the fitted estimator cannot be "
            f"saved. Define a function with a name at the top of a module. ({reason})",
            PersistenceWarning,
            stacklevel=user_stacklevel(),
        )


def draw_views(
    rng: np.random.Generator, n: int, n_views: int | None
) -> NDArray[np.int64]:
    """Draw an augmented view for each of `n` images: 0 if there are none."""
    if n_views == 0:
        return np.zeros(n, dtype=np.int64)
    return rng.integers(1, 2**31 if n_views is None else 1 + n_views, size=n)


def build_inputs(
    estimator: Any, source: ImageSource, network: SplitNetwork, seed: int
) -> Inputs:
    """Return the inputs of the trainable blocks, computed now wherever possible.

    Only with an unlimited number of augmented views the frozen blocks run in every
    epoch. `estimator` has the parameters and the attributes of the pretrained network.
    """
    preprocessing = estimator.preprocessing_
    augment = resolve_augment(estimator.augment, preprocessing)
    config = _extraction_config(estimator, network) if network.frozen else None
    cache = cache_folder(estimator)
    if augment is None and config is not None:
        return _compute_activations(estimator, source, 0, config, cache)
    n_views = 0 if augment is None else estimator.n_views
    if estimator.decode == "fast":
        source = source.reduced_to(2 * max(preprocessing.size_before_crop))
    threads = resolve_threads(estimator.n_jobs)
    crops = _decode_together(source, preprocessing, threads)
    views = AugmentedViews(source, crops, augment, n_views, seed)
    if config is not None:
        # The crops are not resized again.
        config = replace(config, preprocessing=replace(preprocessing, resize_size=None))
        if n_views is not None:
            if not isinstance(estimator.random_state, Integral):
                cache = None  # no other fit draws the same views
            return _compute_activations(estimator, views, n_views, config, cache)
        forward = frozen_forward(config)
    else:
        forward = normalizing_forward(preprocessing, resolve_device(estimator.device))
    return Inputs(n_views, lambda *batch: forward(views.pixels(*batch)))


def _extraction_config(estimator: Any, network: SplitNetwork) -> ExtractionConfig:
    """Return how the frozen blocks run: pooled at once if only the head follows."""
    needs_feature_map = len(network.trainable) > 0 or estimator.conv_channels
    config: ExtractionConfig = extraction_config(
        estimator,
        estimator.backbone_,
        FrozenPrefix(network.frozen),
        (list(network.frozen)[-1],),
        estimator.preprocessing_,
        "flatten" if needs_feature_map else estimator.pooling,
    )
    return config


def _compute_activations(
    estimator: Any,
    source: ImageSource,
    n_views: int,
    config: ExtractionConfig,
    cache: Path | None,
) -> Inputs:
    """Run the frozen blocks once on all images, or on all views of all images."""
    blocks, threads = config.blocks, resolve_threads(estimator.n_jobs)
    verbose = bool(estimator.verbose)
    try:
        outputs = _extract_together(source, config, blocks, threads, verbose, cache)
    except NonFiniteFeaturesError as error:  # of a view
        raise error.moved_to(error.index // (1 + n_views)) from error.__cause__
    shape = _output_shape(config)
    return stored_inputs(outputs.reshape(-1, 1 + n_views, *shape), config.device)


def _extract_together(
    source: ImageSource,
    config: ExtractionConfig,
    blocks: Sequence[str],
    threads: int,
    verbose: bool,
    cache: Path | None,
) -> NDArray[Any]:
    """Return the features of all images, of which each process computes a share."""
    options = config, blocks, threads, verbose, cache
    if n_processes() == 1:
        return extract_features(source, *options)
    features = new_array((len(source), sum(config.widths())), np.float32)
    parts = shares(len(source))
    rows = parts[rank()]
    if rows.start < rows.stop:
        part = PartOfSource(source, rows)
        try:
            extract_features(part, *options, out=features[rows])
        except NonFiniteFeaturesError as error:
            raise error.moved_to(rows.start + error.index) from error.__cause__
    gather_rows(features, [[one] for one in parts])
    _warn_together(source)
    return features


def _decode_together(
    source: ImageSource, preprocessing: Preprocessing, n_threads: int
) -> NDArray[Any]:
    """Return the crops of all images, of which each process decodes a share."""
    if n_processes() == 1:
        return decode_crops(source, preprocessing, n_threads)
    parts = shares(len(source))
    rows = parts[rank()]
    own = decode_crops(PartOfSource(source, rows), preprocessing, n_threads)
    is_float = any(gather(own.dtype != np.uint8))
    shape = len(source), *own.shape[1:]
    crops = new_array(shape, np.float32 if is_float else np.uint8)
    crops[rows] = as_float(own) if is_float else own
    gather_rows(crops, [[part] for part in parts])
    _warn_together(source)
    return crops


def _warn_together(source: ImageSource) -> None:
    """Warn of the range of the images that all processes have read."""
    for found in gather(source.ranges.found()):
        for kind, values in found.items():
            source.ranges.add(kind, *values)
    source.warn_of_odd_range()


def frozen_forward(config: ExtractionConfig) -> Callable[[NDArray[Any]], Tensor]:
    """Return a function that runs the frozen blocks on pixels (b, h, w, c)."""

    def forward(pixels: NDArray[Any]) -> Tensor:
        batches = torch.split(torch.from_numpy(pixels), config.batch_size)
        # Even of a single batch `cat` makes a tensor that autograd can save.
        outputs = torch.cat([config.compute(batch) for batch in batches])
        outputs = outputs.reshape(-1, *_output_shape(config))
        if outputs.ndim != 4:
            return outputs
        return outputs.contiguous(memory_format=torch.channels_last)

    return forward


def normalizing_forward(
    preprocessing: Preprocessing, device: torch.device
) -> Callable[[NDArray[Any]], Tensor]:
    """Return a function that normalizes pixels (b, h, w, c) to a batch (b, c, h, w)."""
    # The user's default dtype may be another one.
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    mean = torch.tensor(preprocessing.mean, **options).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, **options).view(-1, 1, 1)

    def forward(pixels: NDArray[Any]) -> Tensor:
        batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        batch = normalize(batch, mean, std)
        return torch.Tensor.contiguous(batch, memory_format=torch.channels_last)

    return forward


def _output_shape(config: ExtractionConfig) -> tuple[int, ...]:
    """Return the shape of what the frozen blocks give for one image."""
    if config.pooling != "flatten":
        return (sum(config.widths()),)
    (layout,) = config.layouts().values()
    return layout.shape

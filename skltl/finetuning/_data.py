"""Training data: labels, hold-out, augmented views, inputs of trained layers."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import DataConversionWarning
from sklearn.model_selection import (
    GroupKFold,
    StratifiedGroupKFold,
    train_test_split,
)
from sklearn.utils import assert_all_finite, check_array, check_consistent_length
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor
from torchvision.transforms import v2

from skltl._caller import user_stacklevel
from skltl._code import why_not_picklable
from skltl._large_arrays import new_array
from skltl._parameters import resolve_device, resolve_threads
from skltl._random import as_int, derived_seed, own_random_state
from skltl._sklearn import check_sample_weight
from skltl._targets import check_groups, check_indicators
from skltl.exceptions import NonFiniteFeaturesError, PersistenceWarning, nearest
from skltl.features import cache_folder, extract_features, extraction_config
from skltl.finetuning._distributed import gather, gather_rows, n_processes, rank, shares
from skltl.finetuning._network import SplitNetwork
from skltl.images import (
    ImageSource,
    JoinedSource,
    PartOfSource,
    PixelRanges,
    Preprocessing,
    as_float,
    iter_crops,
    normalize,
)
from skltl.inference import ExtractionConfig, FrozenPrefix

# The fraction that early stopping holds out by default.
DEFAULT_FRACTION = 0.1

# Groups are distributed over at most this many folds, some of which are held out.
MAX_FOLDS = 20

Positions: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """Images of a fit, and what is known of each; the last ones may be for validation.

    `groups` are those of the other images.
    """

    source: ImageSource
    targets: NDArray[Any]
    sample_weight: Any
    groups: Any
    validation_weight: Any = None
    n_validation: int = 0

    @property
    def n_training(self) -> int:
        """Number of images that are not those of a validation set."""
        return len(self.targets) - self.n_validation

    def followed_by(
        self, source: ImageSource, targets: NDArray[Any], sample_weight: Any
    ) -> TrainingData:
        """Return these data with a validation set."""
        return replace(
            self,
            source=JoinedSource(self.source, source),
            targets=np.concatenate([self.targets, targets]),
            validation_weight=sample_weight,
            n_validation=len(targets),
        )

    def join_weights(
        self, training_weights: Callable[[Any, NDArray[Any]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Return the weight of each image.

        A function of sample weights and targets returns those of the training images;
        a validation set is weighted by its own sample weights alone.
        """
        training, validation = np.split(self.targets, [self.n_training])
        weights = training_weights(self.sample_weight, training)
        if not self.n_validation:
            return weights
        more = example_weights(self.validation_weight, validation)
        return np.concatenate([weights, more])

    def digests(self) -> dict[str, Any]:
        """Return what is known of the data, to compare with those of other processes.

        Images are compared by the names of their files, whose folders may differ.
        """
        paths = [self.source.path(position) for position in range(len(self.source))]
        values = {
            "y": self.targets,
            "sample_weight": self.sample_weight,
            "groups": self.groups,
            "sample_weight_val": self.validation_weight,
            "names of files": [path and Path(path).name for path in paths],
        }
        sizes = {"numbers of images": (len(paths), self.n_validation)}
        return {**sizes, **{name: _digest(one) for name, one in values.items()}}


def _digest(values: Any) -> str:
    content = None if values is None else np.asarray(values).tolist()
    return blake2b(repr(content).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Examples:
    """Targets and weights of all images, and which of them are for validation."""

    targets: NDArray[Any]  # as an `Objective` takes them
    weights: NDArray[np.float32]  # (n,) 1 on average over the training images
    training: Positions
    validation: Positions


def encode_indicators(y: Any, n: int) -> NDArray[np.float32]:
    """Return the indicator matrix (n, n_labels) of the labels of `n` images."""
    indicators = check_array(y, accept_sparse="csr", dtype=np.float32)
    if issparse(indicators):
        indicators = indicators.toarray()
    check_consistent_length(range(n), indicators)
    check_indicators(indicators)
    return np.asarray(indicators)


def encode_values(y: Any, n: int) -> NDArray[np.float64]:
    """Return the values (n, n_outputs) of a regression for `n` images."""
    if y is None:
        raise ValueError(
            "The regressor requires y to be passed, but the target y is None."
        )
    values = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
    check_consistent_length(range(n), values)
    if values.ndim > 2:
        raise ValueError(
            f"y has shape {values.shape}; expected (n,) or (n, n_outputs)."
        )
    return np.asarray(values).reshape(len(values), -1)


def encode_labels(y: Any, n: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the sorted classes, and the position of each of `n` labels among them."""
    if y is None:
        raise ValueError(
            "The classifier requires y to be passed, but the target y is None."
        )
    labels = column_or_1d(y)
    if np.asarray(y).ndim == 2:
        warnings.warn(
            "A column-vector y was passed when a 1d array was expected. Please change "
            "the shape of y to (n_samples, ), for example using ravel().",
            DataConversionWarning,
            stacklevel=user_stacklevel(),
        )
    check_consistent_length(range(n), labels)
    if labels.dtype.kind == "O" and any(map(_is_missing, labels)):
        raise ValueError("Input y contains NaN or None.")
    assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"y has one class only, {classes.tolist()[0]!r}: a classifier needs "
            "at least two classes."
        )
    return classes, targets.astype(np.int64)


def _is_missing(label: Any) -> bool:
    return label is None or type(label).__name__ == "NAType" or label != label


def columns_of(classes: NDArray[Any], labels: Any) -> NDArray[np.int64]:
    """Return the position of each label among a classifier's sorted classes."""
    labels = column_or_1d(labels)
    if any(map(_is_missing, labels)):
        raise ValueError("The labels contain NaN or None.")
    if (labels.dtype.kind in "buif") != (classes.dtype.kind in "buif"):
        raise ValueError(
            f"{reprlib.repr(labels.tolist()[0])} is none of the classes of this "
            f"classifier, such as {reprlib.repr(classes.tolist()[0])}."
        )
    columns = np.searchsorted(classes, labels) if len(labels) else np.zeros(0, int)
    columns = np.minimum(columns, len(classes) - 1)
    wrong = np.flatnonzero(classes[columns] != labels)
    if len(wrong):
        (label,) = labels[wrong[:1]].tolist()  # as plain Python prints it
        names = [str(name)[:30] for name in classes]
        raise ValueError(
            f"{reprlib.repr(label)} is none of the classes of this classifier. "
            f"{nearest(str(label)[:30], names)}"
        )
    return np.asarray(columns)


def abbreviate(labels: NDArray[Any]) -> str:
    """Format labels for a message, the first six if there are many."""
    shown = ", ".join(repr(label)[:40] for label in labels.tolist()[:6])
    return f"[{shown}{', ...' if len(labels) > 6 else ''}]"


def example_weights(
    sample_weight: Any,
    targets: NDArray[Any],
    class_weight: Any = None,
    classes: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Return the product of sample weight and class weight for each image."""
    weights = check_sample_weight(
        sample_weight, targets, dtype=np.float64, ensure_non_negative=True
    )
    # Only ratios count. Scaled first, so that products and sums do not overflow.
    weights = _scale_to_one(weights)
    if classes is not None:
        of_classes = compute_sample_weight(class_weight, classes[targets])
        weights = weights * _scale_to_one(of_classes)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("class_weight must be finite and non-negative.")
    return np.asarray(weights)


def _scale_to_one(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide weights by the largest one."""
    largest = max(float(weights.max()), float(np.finfo(np.float64).tiny))
    return np.asarray(weights / largest)


def split_examples(
    estimator: Any, data: TrainingData, weights: NDArray[np.float64], seed: int
) -> Examples:
    """Hold out validation images, and scale the training weights to a mean of 1.

    None are held out if there is a validation set. So scaled, weights do not change the
    effective learning rate.
    """
    targets, groups = data.targets, data.groups
    fraction = estimator.validation_fraction
    if fraction is None and estimator.early_stopping:
        fraction = DEFAULT_FRACTION
    if data.n_validation:
        training, validation = np.split(np.arange(len(targets)), [data.n_training])
        if groups is not None:
            check_consistent_length(training, groups)
    else:
        training, validation = hold_out(targets, groups, fraction, seed)
    for name, positions in (("training", training), ("validation", validation)):
        if len(positions) and not weights[positions].sum() > 0:
            raise ValueError(f"The weights of all {name} images are zero.")
    weights = weights / weights[training].mean()
    return Examples(targets, weights.astype(np.float32), training, validation)


def hold_out(
    targets: NDArray[Any], groups: Any, fraction: float | None, seed: int
) -> tuple[Positions, Positions]:
    """Return the positions of training and validation images.

    They are stratified by class where each image has one. Groups are never split; the
    validation set is then as close to the fraction as whole groups allow. Without a
    fraction, nothing is held out.
    """
    everything = np.arange(len(targets))
    if groups is not None:
        check_consistent_length(targets, groups)
        groups = check_groups(groups)
    if fraction is None:
        return everything, everything[:0]
    if groups is not None:
        return _hold_out_groups(targets, groups, fraction, seed)
    if targets.ndim > 1:
        # At least two, since R² is not defined for one.
        n_held_out = min(max(round(fraction * len(targets)), 2), len(targets) - 1)
        if n_held_out < 1:
            raise ValueError(
                f"validation_fraction={fraction} cannot hold out an image and leave "
                "one for training: there is a single image."
            )
        training, validation = train_test_split(
            everything, test_size=n_held_out, random_state=seed
        )
        return training, validation
    counts = np.bincount(targets)
    n_held_out = max(round(fraction * len(targets)), len(counts))
    if counts.min() < 2 or len(targets) - n_held_out < len(counts):
        raise ValueError(
            f"validation_fraction={fraction} cannot hold out images of each class and "
            f"leave some for training: there are {len(targets)} images of "
            f"{len(counts)} classes, {counts.min()} of the rarest."
        )
    training, validation = train_test_split(
        everything, test_size=n_held_out, stratify=targets, random_state=seed
    )
    return training, validation


def _hold_out_groups(
    targets: NDArray[Any], groups: NDArray[Any], fraction: float, seed: int
) -> tuple[Positions, Positions]:
    """Hold out whole groups: those of the first of several folds, stratified if any."""
    is_stratified = targets.ndim == 1
    n_groups = len(np.unique(groups))
    rarest = int(np.bincount(targets).min()) if is_stratified else n_groups
    n_folds = min(MAX_FOLDS, n_groups, rarest)
    if n_folds < 2:
        counted = f" and {rarest} images of the rarest class" if is_stratified else ""
        raise ValueError(
            f"groups: too few to hold some out, with a total of {n_groups}{counted}."
        )
    # As many folds as come closest to the fraction, but neither none nor all.
    n_held_out = min(max(round(fraction * n_folds), 1), n_folds - 1)
    kind = StratifiedGroupKFold if is_stratified else GroupKFold
    splitter = kind(n_folds, shuffle=True, random_state=seed)
    folds = [fold for _, fold in splitter.split(targets, targets, groups)]
    validation = np.sort(np.concatenate(folds[:n_held_out]))
    training = np.setdiff1d(np.arange(len(targets)), validation)
    if is_stratified:
        n_left = len(np.unique(targets[training]))
        if len(validation) == 0 or n_left < len(np.unique(targets)):
            raise ValueError(
                f"groups: with validation_fraction={fraction} the training groups do "
                "not contain all classes. Groups must not be the classes themselves."
            )
    return training, validation


def decode_crops(
    source: ImageSource, preprocessing: Preprocessing, n_threads: int
) -> NDArray[Any]:
    """Decode, resize and crop all images: (n, h, w, c), uint8 if all of them are."""
    everything = range(len(source))
    shape = (len(source), *preprocessing.size, preprocessing.n_channels)
    array = new_array(shape, np.uint8)
    with closing(iter_crops(source, everything, preprocessing, 8, n_threads)) as crops:
        for crop in crops:
            if crop.pixels.dtype != array.dtype and array.dtype == np.uint8:
                decoded = array
                array = new_array(array.shape, np.float32)
                for position, pixels in enumerate(decoded[: crop.position]):
                    array[position] = as_float(pixels)
            is_float = array.dtype != np.uint8
            array[crop.position] = as_float(crop.pixels) if is_float else crop.pixels
    source.warn_of_odd_range()
    return array


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
        image = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))
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
        image = error.index // (1 + n_views)
        raise NonFiniteFeaturesError(image, error.path) from error
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
            index = rows.start + error.index
            raise NonFiniteFeaturesError(index, *error.args[1:]) from error.__cause__
    gather_rows(features, [[one] for one in parts])
    _warn_together(source)
    return features


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

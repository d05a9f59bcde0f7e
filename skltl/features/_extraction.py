"""From a source of images to an array of features."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from skltl._large_arrays import new_array
from skltl._parameters import (
    halve_until_it_fits,
    resolve_batch_size,
    resolve_device,
    resolve_precision,
)
from skltl.cache import CachedFeatures, resolve_folder
from skltl.exceptions import ImageError, NonFiniteFeaturesError
from skltl.images import (
    Batch,
    Crop,
    ImageSource,
    Preprocessing,
    iter_batches,
    iter_crops,
)
from skltl.inference import (
    N_CROPS,
    ExtractionConfig,
    FrozenPrefix,
    InFlight,
    n_in_flight,
    resolve_engine,
)
from skltl.networks import Backbone, largest_map

# From positions to the crops of images.
Read = Callable[..., Generator[Crop, None, None]]


def extraction_config(
    estimator: Any,
    backbone: Backbone,
    network: FrozenPrefix,
    blocks: tuple[str, ...],
    preprocessing: Preprocessing,
    pooling: str | int,
    batch_size: int | str = "auto",
    n_views: int = 1,
) -> ExtractionConfig:
    """Return how images become features, by the parameters of an estimator."""
    estimator._validate_params()  # they may have been set after `fit`
    device = resolve_device(estimator.device)
    fitted = getattr(estimator, "precision_", None)
    dtype = resolve_precision(estimator.precision, device, fitted)
    fitted = getattr(estimator, "engine_", None)
    engine = resolve_engine(estimator.engine, device, network.blocks, fitted)
    map_bytes = largest_map(backbone, preprocessing.size) * dtype.itemsize
    return ExtractionConfig(
        backbone,
        network,
        blocks,
        preprocessing,
        pooling,
        resolve_batch_size(batch_size, device, map_bytes),
        device,
        dtype,
        engine,
        estimator.decode,
        n_views,
    )


def cache_folder(estimator: Any) -> Path | None:
    """Return the folder in which features are stored, or ``None``.

    Features of random weights that cannot be drawn again are not worth storing.
    """
    is_random = estimator.weights is None
    folder = resolve_folder(estimator.cache)
    can_repeat = isinstance(estimator.random_state, Integral)
    return None if is_random and not can_repeat else folder


def extract_features(
    source: ImageSource,
    config: ExtractionConfig,
    blocks: Sequence[str],
    n_threads: int,
    verbose: bool = False,
    cache: Path | None = None,
    out: NDArray[Any] | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
    unreadable: list[ImageError] | None = None,
) -> NDArray[Any]:
    """Return the features of each image at `blocks`, a float32 array (n, d).

    Without a cache, `blocks` is ``config.blocks``; with a cache folder, the features at
    further blocks of the config are computed and stored as well. The batch size is
    halved if a batch does not fit into the memory of the device. Results are written to
    `out` if it is given. Without a cache, they may be those of ``then(features)``, such
    as the logits, computed for a batch at once.

    Raises `ImageReadError` for the first image that cannot be read, and
    `NonFiniteFeaturesError` for the first whose features are not finite. Instead, the
    errors of unreadable images are added to the list `unreadable` if it is given, and
    their features are NaN.
    """
    source = config.scaled(source)
    n_features = sum(replace(config, blocks=tuple(blocks)).widths())
    shape = (len(source), n_features)
    features = new_array(shape, np.float32) if out is None else out

    def extract(batch_size: int) -> None:
        # Features depend on the batch size, so a smaller one starts over.
        this = replace(config, batch_size=batch_size)
        if unreadable is not None:
            unreadable.clear()
        read = partial(_crops, source, this, n_threads, unreadable)
        with tqdm(
            total=len(source), desc="features", unit="img", disable=not verbose
        ) as progress:
            if cache is None:
                _extract_all(source, this, read, features, then, progress.update)
                return
            counts = {"computed": 0, "cached": 0, "repeated": 0}

            def report(n_images: int, origin: str) -> None:
                counts[origin] += n_images
                texts = [f"{count} {name}" for name, count in counts.items() if count]
                progress.set_postfix_str(", ".join(texts), refresh=False)
                progress.update(n_images)

            with closing(
                CachedFeatures(cache, this, blocks, source, features, report)
            ) as cached:
                _extract_missing(source, this, read, n_threads, cached)

    halve_until_it_fits(extract, config.batch_size)
    features[[error.index for error in unreadable or ()]] = np.nan
    source.warn_of_odd_range()
    return features


def _extract_all(
    source: ImageSource,
    config: ExtractionConfig,
    read: Read,
    features: NDArray[Any],
    then: Callable[[Tensor], Tensor] | None,
    report: Callable[[int], object],
) -> None:
    """Compute the features of every image, without a cache."""
    with closing(read(range(len(source)))) as crops:
        for batch, rows in _computed(crops, source, config):
            rows = rows if then is None else then(rows)
            features[batch.positions] = rows.numpy()[: len(batch.positions)]
            report(len(batch.positions))


def _extract_missing(
    source: ImageSource,
    config: ExtractionConfig,
    read: Read,
    n_threads: int,
    cached: CachedFeatures,
) -> None:
    """Compute the features that are not in the cache."""
    missing = cached.read_stored(n_threads)
    while missing:
        with closing(read(missing, with_keys=True)) as crops:
            for batch, rows in _computed(cached.not_stored(crops), source, config):
                cached.add(batch, rows.numpy()[: len(batch.positions)])
        missing = cached.wait_for_others()


def _crops(
    source: ImageSource,
    config: ExtractionConfig,
    n_threads: int,
    unreadable: list[ImageError] | None,
    positions: Sequence[int],
    with_keys: bool = False,
) -> Generator[Crop, None, None]:
    """Yield images that are decoded and cropped by threads."""
    return iter_crops(
        source,
        positions,
        config.preprocessing,
        config.batch_size,
        n_threads,
        with_keys=with_keys,
        alternate=config.device.type == "cpu",
        unreadable=unreadable,
        n_crops=N_CROPS[config.n_views],
    )


def _computed(
    crops: Iterable[Crop], source: ImageSource, config: ExtractionConfig
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches and their features (batch_size, d); a GPU has several in flight."""
    in_flight: deque[tuple[Batch, InFlight]] = deque()

    def oldest() -> tuple[Batch, Tensor]:
        batch, features = in_flight.popleft()
        rows = features.wait()
        _check_finite(batch, rows, source)
        return batch, rows

    for batch in iter_batches(crops, config.batch_size):
        in_flight.append((batch, config.start(torch.from_numpy(batch.pixels))))
        if len(in_flight) == n_in_flight(config.device):
            yield oldest()
    while in_flight:
        yield oldest()


def _check_finite(batch: Batch, rows: Tensor, source: ImageSource) -> None:
    if torch.isfinite(rows).all():
        return
    is_bad = ~torch.isfinite(rows[: len(batch.positions)]).all(dim=1)
    for position in np.array(batch.positions)[is_bad.numpy()][:1].tolist():
        raise NonFiniteFeaturesError(position, source.name(position))


def check_readable(features: NDArray[Any], positions: Any = None) -> None:
    """Raise an error that names the first image without features, if there is one.

    `positions` are the indices of the images in the ``X`` of the user.
    """
    bad = np.flatnonzero(np.isnan(features).any(axis=1))
    if len(bad):
        index = bad[0] if positions is None else positions[bad[0]]
        raise ValueError(
            f"Image {index} could not be read, and has no features. Leave it out: "
            "drop_bad drops such images and their labels."
        )

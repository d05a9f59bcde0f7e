"""The road from a source of images to an array of features."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from skltl._large_arrays import new_array
from skltl._parameters import halve_until_it_fits
from skltl.cache import CacheSession, NoCache
from skltl.images import Batch, ImageSource, iter_batches, iter_crops
from skltl.inference import Recipe, UnderWay, n_under_way


def extract_features(
    source: ImageSource,
    recipe: Recipe,
    asked: Sequence[str],
    n_threads: int,
    verbose: bool = False,
    cache: Path | None = None,
    out: NDArray[Any] | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[Any]:
    """Send every image through a frozen network once, at most.

    Parameters
    ----------
    source : ImageSource
        The images.
    recipe : Recipe
        How they become features. Its batch size is halved if a batch does not fit the
        device's memory.
    asked : sequence of str
        The blocks whose features are wanted. Without a cache, those of the recipe; with
        one, the recipe may have further ones, to be stored.
    n_threads : int
        Threads that decode images.
    verbose : bool, default=False
        Whether a progress bar is shown.
    cache : Path, default=None
        The folder in which features are kept.
    out : array of shape (n, n_features), default=None
        Where the features go; ``None`` makes an array.
    then : callable, default=None
        What to do with the features of a batch at once; `out` gets the results. Without
        a cache only.

    Returns
    -------
    array of shape (n, n_features)
        float32, in the order of the source.

    Raises
    ------
    ImageReadError
        For the first image that cannot be read.
    ValueError
        For the first one whose features are not finite.
    """
    source = recipe.scaled(source)
    n_features = sum(replace(recipe, blocks=tuple(asked)).widths())
    shape = (len(source), n_features)
    features = new_array(shape, np.float32) if out is None else out

    def run(batch_size: int) -> None:
        # Features depend on the batch size, so a smaller one begins anew.
        this = replace(recipe, batch_size=batch_size)
        with closing(
            NoCache(features)
            if cache is None
            else CacheSession(cache, this, asked, features)
        ) as session:
            _fill(session, source, this, n_threads, verbose, then)

    halve_until_it_fits(run, recipe.batch_size)
    source.warn_of_odd_range()
    return features


def _fill(
    session: NoCache | CacheSession,
    source: ImageSource,
    recipe: Recipe,
    n_threads: int,
    verbose: bool,
    then: Callable[[Tensor], Tensor] | None,
) -> None:
    """Compute whatever the session does not have."""
    size, has_cache = recipe.batch_size, isinstance(session, CacheSession)
    with tqdm(
        total=len(source), desc="features", unit="img", disable=not verbose
    ) as progress:
        missing = session.recall(source, n_threads)
        while missing:
            with closing(
                iter_crops(
                    source,
                    missing,
                    recipe.preprocessing,
                    size,
                    n_threads,
                    with_keys=has_cache,
                    in_turns=recipe.device.type == "cpu",
                )
            ) as crops:
                batches = iter_batches(session.sift(crops), size)
                for batch, rows in _computed(batches, recipe):
                    _check_finite(batch, rows, source)
                    rows = rows if then is None else then(rows)
                    session.keep(batch, rows.numpy()[: len(batch.positions)])
                    progress.update(session.n_done - progress.n)
            missing = session.left()
        progress.update(session.n_done - progress.n)


def _check_finite(batch: Batch, rows: Tensor, source: ImageSource) -> None:
    """Refuse features that are no numbers, before anybody learns from them."""
    if torch.isfinite(rows).all():
        return
    is_bad = ~torch.isfinite(rows[: len(batch.positions)]).all(dim=1)
    for position in np.array(batch.positions)[is_bad.numpy()][:1].tolist():
        path = source.path(position)
        raise ValueError(
            f"The features of image {position}{f' ({path[:200]!r})' if path else ''} "
            "are NaN or infinite: the weights of the network, or the values of the "
            "image, are too large."
        )


def _computed(
    batches: Iterable[Batch], recipe: Recipe
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with their features, while the device works on the next ones."""
    under_way: deque[tuple[Batch, UnderWay]] = deque()
    for batch in batches:
        under_way.append((batch, recipe.start(torch.from_numpy(batch.pixels))))
        if len(under_way) == n_under_way(recipe.device):
            first, rows = under_way.popleft()
            yield first, rows.wait()
    for first, rows in under_way:
        yield first, rows.wait()

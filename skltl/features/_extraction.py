"""The road from a source of pictures to an array of features."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from skltl._device import halve_until_it_fits
from skltl.backbones import Runner
from skltl.features._pooling import pool
from skltl.images import ImageSource, Preprocessing, iter_batches


def extract_features(
    source: ImageSource,
    runner: Runner,
    preprocessing: Preprocessing,
    pooling: str | int,
    n_features: int,
    batch_size: int,
    n_threads: int,
    verbose: bool = False,
) -> NDArray[np.float32]:
    """Send every picture through a frozen network once.

    Parameters
    ----------
    source : ImageSource
        The pictures.
    runner : Runner
        The network up to the cut.
    preprocessing : Preprocessing
        What the pictures go through first.
    pooling : str or int
        How feature maps become features; see `pool`.
    n_features : int
        How many a picture gets.
    batch_size : int
        Pictures that cross the network together; halved if they do not fit its memory.
    n_threads : int
        Threads that decode pictures.
    verbose : bool, default=False
        Whether a progress bar is shown.

    Returns
    -------
    array of shape (n, n_features)
        float32, in the order of the source.

    Raises
    ------
    ImageReadError
        For the first picture that cannot be read.
    """
    features = np.empty((len(source), n_features), dtype=np.float32)
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    pool_here = partial(pool, pooling=pooling)

    def run(batch_size: int) -> None:
        with tqdm(
            total=len(source), desc="features", unit="img", disable=not verbose
        ) as progress:
            for batch in iter_batches(source, preprocessing, batch_size, n_threads):
                pixels = torch.from_numpy(batch.pixels)  # (batch_size, h, w, 3)
                rows = runner.features(pixels, mean, std, pool_here)
                if rows.shape != (batch_size, n_features):
                    raise ValueError(
                        f"The network makes features of shape {tuple(rows.shape)} of "
                        f"{batch_size} pictures; expected {(batch_size, n_features)}."
                    )
                positions = slice(batch.positions.start, batch.positions.stop)
                features[positions] = rows[: len(batch.positions)].numpy()
                progress.update(len(batch.positions))

    halve_until_it_fits(run, batch_size)
    return features

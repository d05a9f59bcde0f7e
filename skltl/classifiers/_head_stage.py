"""The first stage: what the new layers see, and what they begin as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from skltl._large_arrays import new_array
from skltl.classifiers._head import Pool, Standardise, set_linear
from skltl.classifiers._inputs import Inputs, Stored
from skltl.classifiers._training import Examples, Settings, batches

# The best of decades on flowers and digits, as in `make_feature_pipeline`.
PROBE_C = 0.1


class BehindFrozen:
    """What the new layers see while the backbone is frozen, made when asked for.

    Without new convolutions these are pooled features: small, whatever the map is.

    Parameters
    ----------
    inputs : Inputs
        What the blocks that are to learn see.
    tuned : sequence of Module
        These blocks, still frozen.
    head : Sequential
        The new layers. If they begin with a pooling, it runs here.
    settings : Settings
        The precision.
    """

    def __init__(
        self,
        inputs: Inputs,
        tuned: Sequence[nn.Module],
        head: nn.Sequential,
        settings: Settings,
    ) -> None:
        self.n_views = inputs.n_views
        self._inputs = inputs
        self._tuned = nn.Sequential(*tuned)
        self._pool = head[0] if isinstance(head[0], Pool) else nn.Identity()
        self._settings = settings

    def __len__(self) -> int:
        return len(self._inputs)

    @torch.no_grad()
    def batch(self, positions: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return those of some views of some pictures, on the device."""
        with self._settings.autocast():
            feature_map = self._tuned(self._inputs.batch(positions, views))
        features: Tensor = self._pool(feature_map)
        return features.float()


def head_inputs(
    tuned: Sequence[nn.Module], head: nn.Sequential, inputs: Inputs, settings: Settings
) -> Inputs:
    """Return what the new layers see; it is computed once, wherever that is possible.

    Parameters
    ----------
    tuned : sequence of Module
        The blocks that are to learn later.
    head : Sequential
        The new layers.
    inputs : Inputs
        What those blocks see.
    settings : Settings
        Batch size and precision.

    Returns
    -------
    Inputs
        Of the same pictures.
    """
    made = BehindFrozen(inputs, tuned, head, settings)
    if inputs.n_views is None:
        return made
    n_views, array = 1 + inputs.n_views, None
    every = np.arange(len(inputs) * n_views)
    for start in range(0, len(every), settings.batch_size):
        some = every[start : start + settings.batch_size]
        batch = made.batch(*np.divmod(some, n_views)).cpu().numpy()
        if array is None:
            array = new_array((len(every), *batch.shape[1:]), np.float32)
        array[some] = batch
    assert array is not None  # there is at least one picture
    return Stored(array.reshape(-1, n_views, *array.shape[1:]), settings.device)


def prepare_head(
    head: nn.Sequential,
    features: Inputs,
    examples: Examples,
    begins_as: str,
    settings: Settings,
) -> None:
    """Give the head its first numbers, as far as they depend on the pictures.

    Parameters
    ----------
    head : Sequential
        The new layers.
    features : Inputs
        What they see.
    examples : Examples
        The pictures' labels and weights.
    begins_as : {"probe", "random"}
        Whether a single linear layer begins as logistic regression.
    settings : Settings
        The seed.
    """
    layers = list(head)
    scaler = next(layer for layer in layers if isinstance(layer, Standardise))
    # New convolutions; a pooling that comes first is part of the features.
    before = [] if isinstance(head[0], Pool) else layers[: layers.index(scaler)]
    positions = examples.training
    seen = _gathered(features, nn.Sequential(*before), positions, settings)
    scaler.set_from(seen)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    targets = examples.targets[positions]
    has_all = len(np.unique(targets)) == linear[0].out_features
    is_linear = len(linear) == 1 and not before
    if begins_as == "probe" and is_linear and has_all:
        probe = LogisticRegression(C=PROBE_C, max_iter=1000, random_state=settings.seed)
        mean, scale = (one.cpu().numpy() for one in (scaler.mean, scaler.scale))
        weights = examples.weights[positions]
        probe.fit((seen - mean) / scale, targets, sample_weight=weights)
        set_linear(linear[0], probe.coef_, probe.intercept_)


@torch.no_grad()
def _gathered(
    features: Inputs,
    before: nn.Module,
    positions: NDArray[np.int64],
    settings: Settings,
) -> NDArray[np.float32]:
    """Return what is to be standardised (n, d), of the pictures themselves."""
    gathered = None
    for batch in batches(len(positions), settings.batch_size):
        some = positions[batch]
        rows = before(features.batch(some, np.zeros_like(some))).float().cpu().numpy()
        if gathered is None:
            gathered = new_array((len(positions), rows.shape[1]), np.float32)
        gathered[batch] = rows
    assert gathered is not None  # there is at least one picture
    return gathered

"""Which pictures are held out, to look how well a fit goes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import column_or_1d

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
    """Part the pictures into those to learn from, and those to look how it goes.

    Parameters
    ----------
    targets : array of shape (n,)
        Numbers of the classes; of each, the same share is held out.
    groups : array of shape (n,), or None
        What must not be parted; then the shares are as near as whole groups allow.
    share : float or None
        Of the pictures, in (0, 1); ``None`` is none, or a tenth if that is needed.
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
        If there are too few pictures or groups for that.
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
            f"validation_fraction={share} cannot hold out pictures of each class and "
            f"leave some to learn from: there are {len(targets)} pictures of "
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
            f"groups: there are {n_groups} of them, or a class has a single picture: "
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

"""The plan of fine-tuning: what learns in each stage, at which rate, for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One part of fine-tuning.

    Parameters
    ----------
    name : {"head", "fine-tuning"}
        In the first, the backbone is frozen; in the second, a part of it learns, too.
    n_epochs : int
        Passes over the pictures.
    n_frozen : int
        How many of the backbone's blocks, from the picture on, are frozen.
    head_lr : float
        The highest rate of the new layers.
    backbone_lr : float
        The highest rate of the pretrained ones.
    only_batch_norms : bool, default=False
        Whether of the blocks that are not frozen only the batch-norms' weights and
        biases learn.
    """

    name: str
    n_epochs: int
    n_frozen: int
    head_lr: float
    backbone_lr: float
    only_batch_norms: bool = False


def plan_stages(
    n_blocks: int,
    n_frozen: int,
    n_epochs: tuple[int, int],
    rates: tuple[float, float],
    only_batch_norms: bool,
) -> list[Stage]:
    """Plan the head stage and the fine-tuning stage, as far as they have epochs.

    Parameters
    ----------
    n_blocks : int
        Of the backbone, up to the cut.
    n_frozen : int
        How many of them never learn.
    n_epochs : tuple of int
        Of the head stage and of the fine-tuning stage.
    rates : tuple of float
        Of the new layers and of the pretrained ones.
    only_batch_norms : bool
        Whether only the batch-norms of the backbone learn.

    Returns
    -------
    list of Stage
        At most two.
    """
    stages = [Stage("head", n_epochs[0], n_blocks, *rates)]
    if n_frozen < n_blocks:
        stages.append(
            Stage("fine-tuning", n_epochs[1], n_frozen, *rates, only_batch_norms)
        )
    return [stage for stage in stages if stage.n_epochs > 0]

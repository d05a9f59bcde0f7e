"""The training loop: stages, optimizer, schedule, epochs and steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from skltl._random import derived_seed, own_random_state
from skltl.exceptions import TrainingError
from skltl.finetuning._data import Inputs, draw_views


@dataclass(frozen=True)
class Stage:
    """One part of fine-tuning.

    Parameters
    ----------
    name : {"head", "fine-tuning"}
        In the first, the backbone is frozen; in the second, a part of it learns, too.
    n_epochs : int
        Passes over the images.
    n_frozen : int
        How many of the backbone's blocks, from the image on, are frozen.
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


# What most recipes for fine-tuning take.
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Examples:
    """Images with their labels, some to learn from, some to look how it goes.

    Parameters
    ----------
    targets : array of shape (n,)
        Numbers of the classes.
    weights : array of shape (n,)
        Of the images in the loss; 1 on the average of those that are learned from.
    training, validation : array of int
        Positions of the images that are learned from, and of those held out.
    """

    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    training: NDArray[np.int64]
    validation: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """How to learn, the same in all stages.

    Parameters
    ----------
    optimizer : {"sgd", "adamw"}
        Which of torch's.
    schedule : {"one_cycle", "cosine", "constant"}
        How the rates change over a stage.
    weight_decay : float
        Of weights; biases and the parameters of batch-norms have none.
    label_smoothing : float
        As in torch's ``cross_entropy``.
    rate_decay : float
        By which factor the rate falls from each part of the backbone to the one before.
    keeps_statistics : bool
        Whether pretrained batch-norms keep theirs.
    patience : int or None
        Epochs without a better score on the images held out after which a stage ends;
        its best epoch counts. ``None`` is all epochs, and the last counts.
    batch_size : int
        Images in a step.
    device : torch.device
        Where to train.
    dtype : torch.dtype
        Of the products; parameters and sums are float32 in any case.
    seed : int
        Of the order of the images, of their views, and of dropout.
    """

    optimizer: str
    schedule: str
    weight_decay: float
    label_smoothing: float
    rate_decay: float
    keeps_statistics: bool
    patience: int | None
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int

    def autocast(self) -> torch.autocast:
        """Return the context in which products are computed in `dtype`.

        Without torch's cache of weights in this type: it lives as long as the outermost
        such context, which may be the user's own, and would hide every step.
        """
        is_mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, is_mixed, False)


class Learner(nn.Module):
    """The layers that a stage runs: some of the backbone's, and the new ones.

    Batch-norms of pretrained blocks keep the statistics that they have: those of a few
    small batches are worse [1]_. Their weights and biases learn.

    Parameters
    ----------
    backbone : sequence of Module
        From the examples' inputs to what is pooled, by parts between cut points;
        nothing, in the head stage.
    head : Module
        From there to the logits.
    keeps_statistics : bool
        Whether batch-norms of the backbone stay in evaluation mode.
    only_batch_norms : bool, default=False
        Whether nothing else of the backbone learns; then its dropout sleeps, too.

    References
    ----------
    .. [1] Kumar, Raghunathan, Jones, Ma, Liang, "Fine-tuning can distort pretrained
       features and underperform out-of-distribution", ICLR, 2022.
    """

    def __init__(
        self,
        backbone: Sequence[nn.Module],
        head: nn.Module,
        keeps_statistics: bool,
        only_batch_norms: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*backbone)
        self.head = head
        self._keeps_statistics = keeps_statistics
        self._only_batch_norms = only_batch_norms

    def train(self, mode: bool = True) -> Learner:
        """Set the mode, but never wake a frozen layer."""
        super().train(mode)
        for module in self.backbone.modules():
            is_norm = isinstance(module, _BatchNorm)
            sleeps = self._keeps_statistics if is_norm else self._only_batch_norms
            if sleeps and not list(module.children()):
                module.eval()
        return self

    def forward(self, batch: Tensor) -> Tensor:
        """Return the logits (n, n_classes)."""
        logits: Tensor = self.head(self.backbone(batch))
        return logits


class StageTraining:
    """One stage, epoch by epoch; all that changes is in `state` and can be put back.

    Parameters
    ----------
    learner : Learner
        What is trained, in place.
    examples : Examples
        From what.
    inputs : Inputs
        What the learner runs on.
    stage : Stage
        At which rates, for how long.
    settings : Settings
        How.
    number : int
        Of the stage. Each has its own order of the images and its own dropout.
    """

    def __init__(
        self,
        learner: Learner,
        examples: Examples,
        inputs: Inputs,
        stage: Stage,
        settings: Settings,
        number: int,
    ) -> None:
        self.learner = learner
        self.n_epochs_done = 0
        self._examples = examples
        self._inputs = inputs
        self._stage = stage
        self._settings = settings
        self._number = number
        self.optimizer = build_optimizer(learner, stage, settings)
        n_batches = len(batches(len(examples.training), settings.batch_size))
        n_steps = stage.n_epochs * n_batches
        self.schedule = build_schedule(self.optimizer, settings.schedule, n_steps)

    @property
    def seed(self) -> int:
        """The seed of the fit."""
        return self._settings.seed

    def train_epoch(self) -> dict[str, float | int | str]:
        """Train for one epoch; return its record. The rates are those it begins with.

        Raises
        ------
        TrainingError
            If the loss is not finite.
        """
        start = time.perf_counter()
        numbers = (self._number, self.n_epochs_done)
        rng = np.random.default_rng(
            derived_seed(self._settings.seed, "epoch", *numbers)
        )
        order = rng.permutation(self._examples.training)
        seed = int(rng.integers(2**31))
        views = draw_views(rng, len(order), self._inputs.n_views)
        rates = self._rates()
        self.learner.train()
        totals = np.zeros(3)
        with own_random_state(seed, self._settings.device):
            for batch in batches(len(order), self._settings.batch_size):
                totals += self._step(order[batch], views[batch])
        self.n_epochs_done += 1
        if self.is_done():
            self._check_last_step(order[: self._settings.batch_size])
        loss, score = _means(totals)
        return {
            "stage": self._stage.name,
            "epoch": self.n_epochs_done,
            "loss": loss,
            "score": score,
            **self.validate(),
            **rates,
            "seconds": time.perf_counter() - start,
        }

    def is_done(self) -> bool:
        """Tell whether all epochs of the stage are done."""
        return self.n_epochs_done >= self._stage.n_epochs

    def state(self) -> dict[str, Any]:
        """Return all that an epoch changes, as tensors and plain numbers."""
        return {
            "n_epochs_done": self.n_epochs_done,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.n_epochs_done = state["n_epochs_done"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _rates(self) -> dict[str, float]:
        """Return the highest rates of new and of pretrained layers."""
        rates = {"head_lr": 0.0, "backbone_lr": 0.0}
        for group in self.optimizer.param_groups:
            rates[group["rate"]] = max(rates[group["rate"]], group["lr"])
        return rates

    @torch.no_grad()
    def _check_last_step(self, positions: NDArray[np.int64]) -> None:
        """Refuse what the last step of all may have done, which no loss told yet."""
        self.learner.eval()
        loss = self._losses(positions, np.zeros_like(positions))[0].item()
        if not math.isfinite(loss):
            raise self._error(loss, self.n_epochs_done)

    def _error(self, loss: float, epoch: int) -> TrainingError:
        return TrainingError(
            f"The loss became {loss} in epoch {epoch} of the {self._stage.name} stage, "
            f"at rates up to {self._stage.head_lr:g} (new layers) and "
            f"{self._stage.backbone_lr:g} (pretrained ones). Try smaller ones."
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return loss and score on the images that are held out, if there are any."""
        if len(self._examples.validation) == 0:
            return {}
        self.learner.eval()
        totals = np.zeros(3)
        held_out = self._examples.validation
        for batch in batches(len(held_out), self._settings.batch_size):
            positions = held_out[batch]
            totals += self._losses(positions, np.zeros_like(positions))[1]
        loss, score = _means(totals)
        return {"validation_loss": loss, "validation_score": score}

    def _losses(
        self, positions: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Return the mean loss, and the sums of losses, right answers and weights."""
        settings = self._settings
        targets = torch.from_numpy(self._examples.targets[positions])
        weights = torch.from_numpy(self._examples.weights[positions])
        targets, weights = targets.to(settings.device), weights.to(settings.device)
        with settings.autocast():
            logits = self.learner(self._inputs.batch(positions, views))
        losses = cross_entropy(
            logits.float(),
            targets,
            reduction="none",
            label_smoothing=settings.label_smoothing,
        )
        loss = (losses * weights).mean()
        is_right = (logits.detach().argmax(dim=1) == targets).float()
        sums = [(losses.detach() * weights).sum(), (is_right * weights).sum()]
        return loss, np.array([*(one.item() for one in sums), weights.sum().item()])

    def _step(
        self, positions: NDArray[np.int64], views: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Make one step; return the sums of losses, right answers and weights."""
        loss, totals = self._losses(positions, views)
        if not math.isfinite(loss.item()):
            raise self._error(loss.item(), self.n_epochs_done + 1)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.learner.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        return totals


def build_optimizer(learner: Learner, stage: Stage, settings: Settings) -> Optimizer:
    """Build the optimizer, with groups of parameters by part and by kind.

    Sorted by identity: two parameters with equal values are two.
    """
    parts = [("head_lr", learner.head, stage.head_lr)]
    rate = stage.backbone_lr
    for part in reversed(learner.backbone):
        parts.append(("backbone_lr", part, rate))
        rate *= settings.rate_decay
    groups = [
        {
            "params": [
                one for one in part.parameters() if one.requires_grad and rule(one)
            ],
            "rate": name,
            "lr": rate,
            "weight_decay": decay,
        }
        for name, part, rate in parts
        for rule, decay in ((_is_matrix, settings.weight_decay), (_is_vector, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, lr=stage.head_lr, momentum=0.9, nesterov=True)


def build_schedule(optimizer: Optimizer, name: str, n_steps: int) -> LRScheduler:
    """Build the schedule of the rates over so many steps."""
    if name == "one_cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=max(n_steps, 2) + 1
        )
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1


def _means(totals: NDArray[np.float64]) -> tuple[float, float]:
    """Return loss and score from the sums of losses, right answers and weights."""
    loss, n_right, weight = totals.tolist()
    return loss / weight, n_right / weight


def batches(n: int, batch_size: int) -> list[slice]:
    """Cut a range into batches; a last one of one goes to the one before."""
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return [
        slice(start, end) for start, end in zip(starts, [*starts[1:], n], strict=True)
    ]

"""The training loop: stages, epochs and steps."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from skltl._caller import user_stacklevel
from skltl._parameters import resolve_device
from skltl._random import derived_seed, own_random_state
from skltl.exceptions import InterruptionWarning, TrainingError
from skltl.finetuning._callbacks import Task
from skltl.finetuning._checkpoint import Checkpoint
from skltl.finetuning._data import Examples, Positions, batches
from skltl.finetuning._distributed import (
    add_up,
    broadcast,
    broadcast_weights,
    deferred_interrupts,
    gather_parts,
    in_step,
    own_seed,
    share,
)
from skltl.finetuning._head import initialize_head, pooled_inputs
from skltl.finetuning._inputs import Inputs, draw_views
from skltl.finetuning._network import SplitNetwork, autocast
from skltl.finetuning._objective import Objective
from skltl.finetuning._optimization import Stage, build_optimizer, build_schedule

# The usual value for fine-tuning.
MAX_GRADIENT_NORM = 1.0

SHOWN_IN_PROGRESS = ("loss", "score", "validation_score")

Metrics: TypeAlias = dict[str, Any]

# Losses (b,) and outputs (b, n_outputs) of a batch.
BatchResult: TypeAlias = tuple[Tensor, Tensor]


def train_network(
    estimator: Any,
    network: SplitNetwork,
    inputs: Inputs,
    examples: Examples,
    objective: Objective,
    seed: int,
    is_new_head: bool,
    checkpoint: Checkpoint | None,
    task: Task,
) -> float | None:
    """Train a network in place, stage by stage; each epoch appends to `history_`.

    `estimator` has the parameters, the planned `stages_` and the `precision_`. Returns
    the score that early stopping has kept, if any.
    """
    network.to(resolve_device(estimator.device))
    head_inputs = inputs
    if is_new_head or any(stage.name == "head" for stage in estimator.stages_):
        head_inputs = pooled_inputs(estimator, network, inputs, len(examples.targets))
    if is_new_head:
        initialize_head(estimator, network.head, head_inputs, examples, objective, seed)
    broadcast_weights(network)
    result = Result(network, estimator.history_)
    # While the backbone is frozen, only the head runs.
    by_stage = {"head": head_inputs, "fine-tuning": inputs}
    arguments = estimator, network, by_stage, examples, objective, seed
    try:
        with deferred_interrupts(), in_step():
            score = _train_stages(*arguments, checkpoint, task, result)
    except KeyboardInterrupt:
        if not (estimator.keep_on_interrupt and result.n_epochs):
            raise
        return result.restore()  # a checkpoint stays, for the same call to resume
    if checkpoint is not None:
        checkpoint.clear()
    return score


def _train_stages(
    estimator: Any,
    network: SplitNetwork,
    inputs: dict[str, Inputs],
    examples: Examples,
    objective: Objective,
    seed: int,
    checkpoint: Checkpoint | None,
    task: Task,
    result: Result,
) -> float | None:
    """Train all stages, or those after the state of a checkpoint."""
    stages, score = estimator.stages_, None
    state = None if checkpoint is None else checkpoint.state_for(len(stages))
    for number, stage in enumerate(stages):
        if state is not None and number < state["stage"]:
            task.subtask(stage.name, stage.n_epochs)  # done before an interruption
            continue
        trainer = StageTrainer(
            *(estimator, network, inputs[stage.name], examples, objective, seed),
            *(number, result),
        )
        if checkpoint is not None and state is not None:
            with checkpoint.reading():
                trainer.restore(state)
            state = None
        elif estimator.early_stopping:
            trainer.keep_if_best(trainer.evaluate())  # a stage may only do harm
        score = trainer.train(checkpoint, task)
    return score


class Result:
    """The result of a fit so far, to which it returns when it is interrupted."""

    def __init__(self, network: SplitNetwork, history: list[Metrics]) -> None:
        self._network, self._history = network, history
        # In one assignment: an interruption may come at any moment.
        self._last: tuple[int, dict[str, Tensor], float | None] = 0, {}, None

    @property
    def n_epochs(self) -> int:
        """Number of epochs that were completed."""
        return self._last[0]

    def update(self, best: dict[str, Tensor] | None, score: float) -> None:
        """Take the best weights with their score, or the current weights."""
        if best is None:
            weights = copy.deepcopy(self._network.state_dict())
            self._last = len(self._history), weights, None
        else:
            self._last = len(self._history), best, score

    def restore(self) -> float | None:
        """Return to the last result, with a warning; return its score, if any."""
        n_epochs, weights, score = self._last
        del self._history[n_epochs:]
        self._network.load_state_dict(weights)
        warnings.warn(
            f"Training was interrupted; the result of the first {n_epochs} epochs is "
            "kept.",
            InterruptionWarning,
            stacklevel=user_stacklevel(),
        )
        return score


# Attributes of a `StageTrainer` that change with each epoch.
PROGRESS = (
    "n_epochs",
    "n_epochs_since_best",
    "is_stopped",
    "best_score",
    "best_loss",
    "best_weights",
)


class StageTrainer:
    """Training of one stage: the optimizer, its schedule, and the progress so far."""

    def __init__(
        self,
        estimator: Any,
        network: SplitNetwork,
        inputs: Inputs,
        examples: Examples,
        objective: Objective,
        seed: int,
        number: int,
        result: Result,
    ) -> None:
        self._estimator, self._network, self._inputs = estimator, network, inputs
        self._examples, self._objective = examples, objective
        self._seed, self._number, self._result = seed, number, result
        self._stage: Stage = estimator.stages_[number]
        self._device = resolve_device(estimator.device)
        self._model: nn.Module = network.head
        if self._stage.name != "head":
            # The statistics of pretrained batch-norms are better than those of a few
            # small batches (Kumar et al., 2022).
            keeps_statistics = estimator.weights is not None
            network.unfreeze(self._stage.only_batch_norms, keeps_statistics)
            self._model = network
        n_batches = len(batches(len(examples.training), estimator.batch_size))
        head_decay = objective.head_decay(len(examples.training))
        self._optimizer = build_optimizer(estimator, network, self._stage, head_decay)
        self._schedule = build_schedule(
            self._optimizer, estimator.schedule, self._stage.n_epochs * n_batches
        )
        self.n_epochs = self.n_epochs_since_best = 0
        self.is_stopped = False  # by a callback
        self.best_score, self.best_loss = -math.inf, math.inf
        self.best_weights: dict[str, Tensor] | None = None

    def train(self, checkpoint: Checkpoint | None, fit_task: Task) -> float | None:
        """Train all epochs; return the score of the epoch kept, if any."""
        stage = self._stage
        task = fit_task.subtask(stage.name, stage.n_epochs).begin()
        for _ in range(self.n_epochs):
            task.subtask("epoch")  # done before an interruption
        with tqdm(
            total=stage.n_epochs,
            initial=self.n_epochs,
            desc=stage.name,
            unit="epoch",
            disable=not self._estimator.verbose,
        ) as progress:
            while not self._is_done():
                self._run_epoch(checkpoint, task, progress)
        if self.best_weights is not None:
            self._network.load_state_dict(self.best_weights)
        task.end()
        return None if self.best_weights is None else self.best_score

    def _run_epoch(
        self, checkpoint: Checkpoint | None, task: Task, progress: tqdm[Any]
    ) -> None:
        """Train for one epoch, and record, report and save its result."""
        metrics = self._train_epoch()
        self._estimator.history_.append(metrics)
        if self._estimator.early_stopping:
            self.n_epochs_since_best += 1
            self.keep_if_best(metrics)
        self._update_result()
        progress.set_postfix(
            {key: metrics[key] for key in SHOWN_IN_PROGRESS if key in metrics}
        )
        progress.update()
        self.is_stopped = broadcast(task.subtask("epoch").begin().end())
        if checkpoint is not None:
            checkpoint.save(self._state())

    def _update_result(self) -> None:
        if self._estimator.keep_on_interrupt:
            self._result.update(self.best_weights, self.best_score)

    def _is_done(self) -> bool:
        estimator = self._estimator
        has_no_patience = self.n_epochs_since_best >= estimator.patience
        is_early = estimator.early_stopping and has_no_patience
        return self.n_epochs >= self._stage.n_epochs or is_early or self.is_stopped

    def _train_epoch(self) -> Metrics:
        """Train for one epoch; return its metrics, with the initial learning rates."""
        start = time.perf_counter()
        batch_size, examples = self._estimator.batch_size, self._examples
        seed = derived_seed(self._seed, "epoch", self._number, self.n_epochs)
        rng = np.random.default_rng(seed)
        order = rng.permutation(examples.training)
        torch_seed = own_seed(int(rng.integers(2**31)))
        views = draw_views(rng, len(order), self._inputs.n_views)
        learning_rates = self._learning_rates()
        self._model.train()
        with own_random_state(torch_seed, self._device):
            results = [
                self._train_step(order[batch], views[batch])
                for batch in batches(len(order), batch_size)
            ]
        broadcast_weights(self._model)  # rounding may differ between machines
        self.n_epochs += 1
        if self.n_epochs == self._stage.n_epochs:
            self._check_last_step(order[:batch_size])
        loss, score = self._loss_and_score(order, results)
        metrics = {
            "stage": self._stage.name,
            "epoch": self.n_epochs,
            "loss": loss,
            "score": score,
            **self.evaluate(),
            **learning_rates,
            "seconds": time.perf_counter() - start,
        }
        return broadcast(metrics)

    def _train_step(
        self, positions: Positions, views: NDArray[np.int64]
    ) -> BatchResult:
        """Update the parameters; return the losses and the outputs."""
        loss, result = self._run(positions, views)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        loss = add_up(loss, self._model.parameters())
        self._check_finite(loss, self.n_epochs + 1)
        nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        return result

    def _run(
        self, positions: Positions, views: NDArray[np.int64]
    ) -> tuple[Tensor, BatchResult]:
        """Return the loss, and the losses and outputs by image.

        They are those of the images of this process; their loss is its summand of that
        of the batch.
        """
        part = share(len(positions))
        fraction = (part.stop - part.start) / len(positions)
        positions, views = positions[part], views[part]
        if len(positions) == 0:  # the batch has fewer images than there are processes
            options: Any = {"dtype": torch.float32, "device": self._device}
            nothing = torch.zeros(0, self._objective.n_outputs, **options)
            return nothing.sum().requires_grad_(), (nothing[:, 0], nothing)
        targets = torch.from_numpy(self._examples.targets[positions]).to(self._device)
        weights = torch.from_numpy(self._examples.weights[positions] * fraction)
        weights = weights.to(self._device)
        batch = self._inputs.batch(positions, views)
        with autocast(self._device, self._estimator.precision_):
            outputs = self._model(batch)
        losses = self._objective.losses(outputs.float(), targets)
        loss = (losses * weights).mean()
        # Copied to the CPU at the end of the epoch, not after every step.
        return loss, (losses.detach(), outputs.detach())

    def _loss_and_score(
        self, positions: Positions, results: Sequence[BatchResult]
    ) -> tuple[float, float]:
        """Return the mean loss and the score of images, from those of batches."""
        slices = batches(len(positions), self._estimator.batch_size)
        losses, outputs = (
            gather_parts(torch.cat(parts).double().cpu().numpy(), slices)
            for parts in zip(*results, strict=True)
        )
        targets, weights = (
            self._examples.targets[positions],
            self._examples.weights[positions].astype(np.float64),
        )
        loss = float(np.average(losses, weights=weights))
        return loss, self._objective.score(outputs, targets, weights)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss and the score on the validation images, if there are any."""
        validation = self._examples.validation
        if len(validation) == 0:
            return {}
        self._model.eval()
        views = np.zeros_like(validation)
        results = [
            self._run(validation[batch], views[batch])[1]
            for batch in batches(len(validation), self._estimator.batch_size)
        ]
        loss, score = self._loss_and_score(validation, results)
        return broadcast({"validation_loss": loss, "validation_score": score})

    @torch.no_grad()
    def _check_last_step(self, positions: Positions) -> None:
        """Raise if the last step, after which no loss is computed, has diverged."""
        self._model.eval()
        loss, _ = self._run(positions, np.zeros_like(positions))
        self._check_finite(add_up(loss), self.n_epochs)

    def _check_finite(self, loss: Tensor, epoch: int) -> None:
        """Raise if the loss is infinite or NaN."""
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"Training diverged: the loss became {loss.item()} in epoch {epoch} of "
                f"the {self._stage.name} stage, with peak learning rates of "
                f"{self._stage.head_lr:g} (head) and {self._stage.backbone_lr:g} "
                "(backbone). Try lower ones."
            )

    def _learning_rates(self) -> dict[str, float]:
        """Return the current learning rates of the head and of the last blocks."""
        rates = {"head_lr": 0.0, "backbone_lr": 0.0}
        for group in self._optimizer.param_groups:
            rates[group["name"]] = max(rates[group["name"]], group["lr"])
        return rates

    def keep_if_best(self, metrics: Metrics) -> None:
        """Keep the weights if the score rose, or the loss fell at the same score.

        With ``monitor="loss"``, only the loss counts.
        """
        score, loss = metrics["validation_score"], metrics["validation_loss"]
        is_better = (score, -loss) > (self.best_score, -self.best_loss)
        # The score is not defined for the values of a single image.
        if self._estimator.monitor == "loss" or math.isnan(score):
            is_better = loss < self.best_loss
        if is_better:
            self.best_score, self.best_loss = float(score), float(loss)
            self.best_weights = copy.deepcopy(self._network.state_dict())
            self.n_epochs_since_best = 0

    def _state(self) -> dict[str, Any]:
        """Return all that has changed since the fit began, for a checkpoint."""
        return {
            "seed": self._seed,
            "stage": self._number,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "history": self._estimator.history_,
            **{name: getattr(self, name) for name in PROGRESS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `_state` returned."""
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._estimator.history_[:] = state["history"]
        vars(self).update({name: state[name] for name in PROGRESS})
        self._update_result()

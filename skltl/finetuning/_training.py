"""The training loop: stages, epochs and steps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from skltl._large_arrays import new_array
from skltl._parameters import DTYPES, resolve_device
from skltl._random import derived_seed, own_random_state
from skltl.exceptions import TrainingError
from skltl.finetuning._checkpoint import Checkpoint
from skltl.finetuning._data import (
    Examples,
    Inputs,
    OnTheFlyInputs,
    Positions,
    StoredInputs,
    draw_views,
)
from skltl.finetuning._network import Pool, SplitNetwork, Standardize, set_linear

try:
    from sklearn.callback import CallbackSupportMixin as CallbackSupportMixin
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in where scikit-learn has no callbacks."""


# Peak learning rates of head and backbone. The user guide has the sources and what was
# measured.
PEAK_LRS = {"sgd": (0.01, 0.01), "adamw": (1e-3, 1e-4)}

# One-cycle schedules vary the momentum, or beta1, which an optimizer must have.
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
}

# Families that were trained with AdamW, and are best fine-tuned with it.
ADAMW_FAMILIES = ("convnext", "efficientnet_v2")

# The best of the powers of ten on flowers and digits, as in `make_feature_pipeline`.
PROBE_C = 0.1

# The usual value for fine-tuning.
MAX_GRADIENT_NORM = 1.0

SHOWN_IN_PROGRESS = ("loss", "score", "validation_score")

Metrics: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage of training: ``"head"`` or ``"fine-tuning"``."""

    name: str
    n_epochs: int
    n_frozen: int  # blocks of the backbone, from the first one
    head_lr: float  # peak learning rates
    backbone_lr: float
    only_batch_norms: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the training loop that all stages share."""

    head_init: str | None  # "probe", "random", or None for a head that is trained
    optimizer: str
    schedule: str
    weight_decay: float
    label_smoothing: float
    lr_decay: float  # from each group of blocks to the one before
    keeps_statistics: bool  # of the backbone's batch-norms
    patience: int | None  # None: without early stopping
    batch_size: int
    device: torch.device
    dtype: torch.dtype  # of products; parameters are float32
    seed: int
    verbose: bool


class Trainer:
    """Train a network in place, stage by stage; each epoch appends to `history`."""

    def __init__(
        self,
        network: SplitNetwork,
        inputs: Inputs,
        examples: Examples,
        config: TrainingConfig,
        history: list[Metrics],
    ) -> None:
        self._network = network.to(config.device)
        self._all_inputs = inputs
        self._examples = examples
        self._config = config
        self._history = history

    def run(
        self,
        stages: Sequence[Stage],
        checkpoint: Checkpoint | None,
        callbacks: Callbacks,
    ) -> float | None:
        """Train all stages; return the score that early stopping has kept, if any."""
        network, config = self._network, self._config
        features = self._all_inputs
        if config.head_init is not None or any(one.name == "head" for one in stages):
            features = pooled_inputs(network, features, config)
        if config.head_init is not None:
            initialize_head(network.head, features, self._examples, config)
        saved = None if checkpoint is None else checkpoint.state_for(len(stages))
        score = None
        for number, stage in enumerate(stages):
            if saved is not None and number < saved["stage"]:
                callbacks.skip_stage(stage)
                continue
            # While the backbone is frozen, only the head runs.
            is_head = stage.name == "head"
            self._begin_stage(number, stage, features if is_head else self._all_inputs)
            if checkpoint is not None and saved is not None:
                with checkpoint.restoring():
                    self._restore(saved)
                saved = None
            elif config.patience is not None:
                self._keep_if_best(self._evaluate())  # a stage may only do harm
            score = self._train_stage(checkpoint, callbacks)
        if checkpoint is not None:
            checkpoint.clear()
        return score

    def _begin_stage(self, number: int, stage: Stage, inputs: Inputs) -> None:
        """Make layers trainable, and build the optimizer and the schedule."""
        network, config = self._network, self._config
        self._number, self._stage, self._inputs = number, stage, inputs
        self._model: nn.Module = network.head
        if stage.name != "head":
            network.unfreeze(stage.only_batch_norms, config.keeps_statistics)
            self._model = network
        n_batches = len(batches(len(self._examples.training), config.batch_size))
        self._optimizer = build_optimizer(network, stage, config)
        self._schedule = build_schedule(
            self._optimizer, config.schedule, stage.n_epochs * n_batches
        )
        self._n_epochs = 0
        self._is_stopped = False  # by a callback
        self._best_score, self._best_loss = -math.inf, math.inf
        self._best_weights: dict[str, Tensor] | None = None
        self._n_epochs_since_best = 0

    def _train_stage(
        self, checkpoint: Checkpoint | None, callbacks: Callbacks
    ) -> float | None:
        """Train the epochs of a stage; return the score of the epoch kept, if any."""
        stage = self._stage
        callbacks.begin_stage(stage, self._n_epochs)
        with tqdm(
            total=stage.n_epochs,
            initial=self._n_epochs,
            desc=stage.name,
            unit="epoch",
            disable=not self._config.verbose,
        ) as progress:
            while not self._is_done():
                metrics = self._train_epoch()
                self._history.append(metrics)
                if self._config.patience is not None:
                    self._n_epochs_since_best += 1
                    self._keep_if_best(metrics)
                progress.set_postfix(
                    {key: metrics[key] for key in SHOWN_IN_PROGRESS if key in metrics}
                )
                progress.update()
                self._is_stopped = callbacks.end_epoch()
                if checkpoint is not None:
                    checkpoint.save(self._state())
        if self._best_weights is not None:
            self._network.load_state_dict(self._best_weights)
        callbacks.end_stage()
        return None if self._best_weights is None else self._best_score

    def _is_done(self) -> bool:
        patience = self._config.patience
        return (
            self._n_epochs >= self._stage.n_epochs
            or (patience is not None and self._n_epochs_since_best >= patience)
            or self._is_stopped
        )

    def _train_epoch(self) -> Metrics:
        """Train for one epoch; return its metrics, with the initial learning rates."""
        start = time.perf_counter()
        config, examples = self._config, self._examples
        seed = derived_seed(config.seed, "epoch", self._number, self._n_epochs)
        rng = np.random.default_rng(seed)
        order = rng.permutation(examples.training)
        torch_seed = int(rng.integers(2**31))
        views = draw_views(rng, len(order), self._inputs.n_views)
        learning_rates = self._learning_rates()
        self._model.train()
        totals = np.zeros(3)
        with own_random_state(torch_seed, config.device):
            for batch in batches(len(order), config.batch_size):
                totals += self._train_step(order[batch], views[batch])
        self._n_epochs += 1
        if self._n_epochs == self._stage.n_epochs:
            self._check_last_step(order[: config.batch_size])
        loss, score = _means(totals)
        return {
            "stage": self._stage.name,
            "epoch": self._n_epochs,
            "loss": loss,
            "score": score,
            **self._evaluate(),
            **learning_rates,
            "seconds": time.perf_counter() - start,
        }

    def _train_step(
        self, positions: Positions, views: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Update the parameters; return sums of losses, correct answers and weights."""
        loss, totals = self._loss(positions, views)
        if not math.isfinite(loss.item()):
            raise self._divergence(loss.item(), self._n_epochs + 1)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        return totals

    def _loss(
        self, positions: Positions, views: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Return the loss, and the sums of losses, correct answers and weights."""
        config = self._config
        targets = torch.from_numpy(self._examples.targets[positions]).to(config.device)
        weights = torch.from_numpy(self._examples.weights[positions]).to(config.device)
        batch = self._inputs.batch(positions, views)
        with autocast(config):
            logits = self._model(batch)
        losses = cross_entropy(
            logits.float(),
            targets,
            reduction="none",
            label_smoothing=config.label_smoothing,
        )
        loss = (losses * weights).mean()
        is_correct = (logits.detach().argmax(dim=1) == targets).float()
        sums = [(losses.detach() * weights).sum(), (is_correct * weights).sum()]
        return loss, np.array([*(one.item() for one in sums), weights.sum().item()])

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the loss and the score on the validation images, if there are any."""
        validation = self._examples.validation
        if len(validation) == 0:
            return {}
        self._model.eval()
        totals = np.zeros(3)
        for batch in batches(len(validation), self._config.batch_size):
            positions = validation[batch]
            totals += self._loss(positions, np.zeros_like(positions))[1]
        loss, score = _means(totals)
        return {"validation_loss": loss, "validation_score": score}

    @torch.no_grad()
    def _check_last_step(self, positions: Positions) -> None:
        """Raise if the last step, after which no loss is computed, has diverged."""
        self._model.eval()
        loss = self._loss(positions, np.zeros_like(positions))[0].item()
        if not math.isfinite(loss):
            raise self._divergence(loss, self._n_epochs)

    def _divergence(self, loss: float, epoch: int) -> TrainingError:
        return TrainingError(
            f"Training diverged: the loss became {loss} in epoch {epoch} of the "
            f"{self._stage.name} stage, with peak learning rates of "
            f"{self._stage.head_lr:g} (head) and {self._stage.backbone_lr:g} "
            "(backbone). Try lower ones."
        )

    def _learning_rates(self) -> dict[str, float]:
        """Return the current learning rates of the head and of the last blocks."""
        found = {"head_lr": 0.0, "backbone_lr": 0.0}
        for group in self._optimizer.param_groups:
            found[group["name"]] = max(found[group["name"]], group["lr"])
        return found

    def _keep_if_best(self, metrics: Metrics) -> None:
        """Keep the weights if the score rose, or the loss fell at the same score."""
        score, loss = metrics["validation_score"], metrics["validation_loss"]
        is_higher = score > self._best_score
        if is_higher or (score == self._best_score and loss < self._best_loss):
            self._best_score, self._best_loss = float(score), float(loss)
            self._best_weights = copy.deepcopy(self._network.state_dict())
        if is_higher:
            self._n_epochs_since_best = 0

    def _state(self) -> dict[str, Any]:
        """Return all that has changed since the fit began, for a checkpoint."""
        return {
            "seed": self._config.seed,
            "stage": self._number,
            "n_epochs": self._n_epochs,
            "is_stopped": self._is_stopped,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "best_score": self._best_score,
            "best_loss": self._best_loss,
            "best_weights": self._best_weights,
            "n_epochs_since_best": self._n_epochs_since_best,
            "history": self._history,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Set what `_state` returned."""
        self._n_epochs, self._is_stopped = state["n_epochs"], state["is_stopped"]
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._best_score = state["best_score"]
        self._best_loss = state["best_loss"]
        self._best_weights = state["best_weights"]
        self._n_epochs_since_best = state["n_epochs_since_best"]
        self._history[:] = state["history"]


class Callbacks:
    """Adapter to scikit-learn's callbacks: a fit, its stages and epochs are tasks.

    Does nothing before scikit-learn 1.9. `fitted` returns the attributes of the
    estimator as if the fit had ended now.
    """

    def __init__(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        metadata: dict[str, Any],
        n_stages: int,
        fitted: Callable[[], dict[str, Any]],
    ) -> None:
        given = {name: value for name, value in metadata.items() if value is not None}
        self._begin = {"estimator": estimator, "X": X, "y": y}
        self._begin["metadata"] = given or None
        self._end = {**self._begin, "reconstruction_attributes": fitted}
        self._fit: Any = None
        self._stage: Any = None
        if hasattr(CallbackSupportMixin, "_init_callback_context"):
            self._fit = estimator._init_callback_context(max_subtasks=n_stages)
            self._fit.call_on_fit_task_begin(**self._begin)

    def begin_stage(self, stage: Stage, n_epochs_done: int) -> None:
        """Begin a stage, or resume it: epochs that are done are only counted."""
        if self._fit is not None:
            self._stage = self._fit.subcontext(stage.name, max_subtasks=stage.n_epochs)
            self._stage.call_on_fit_task_begin(**self._begin)
            for _ in range(n_epochs_done):
                self._stage.subcontext("epoch")

    def skip_stage(self, stage: Stage) -> None:
        """Count a stage that was done before an interruption."""
        if self._fit is not None:
            self._fit.subcontext(stage.name, max_subtasks=stage.n_epochs)

    def end_epoch(self) -> bool:
        """End an epoch; return whether a callback stops the stage."""
        if self._stage is None:
            return False
        epoch = self._stage.subcontext("epoch")
        epoch.call_on_fit_task_begin(**self._begin)
        return bool(epoch.call_on_fit_task_end(**self._end))

    def end_stage(self) -> None:
        """End the stage."""
        if self._stage is not None:
            self._stage.call_on_fit_task_end(**self._end)

    def end_fit(self) -> None:
        """End the fit."""
        if self._fit is not None:
            self._fit.call_on_fit_task_end(**self._end)


def pooled_inputs(
    network: SplitNetwork, inputs: Inputs, config: TrainingConfig
) -> Inputs:
    """Return the inputs of the head while the backbone is frozen.

    Computed once, unless the number of augmented views is unlimited. Without
    convolutions in the head they are pooled features, which are small.
    """
    pooling = network.head[0] if isinstance(network.head[0], Pool) else nn.Identity()

    @torch.no_grad()
    def run(batch: Tensor) -> Tensor:
        with autocast(config):
            feature_map = network.tuned(batch)
        features: Tensor = pooling(feature_map).float()
        return features

    if isinstance(inputs, OnTheFlyInputs) and inputs.n_views is None:
        return inputs.followed_by(run)
    n_views = 1 + (inputs.n_views or 0)
    positions, views = np.divmod(np.arange(inputs.n_images * n_views), n_views)
    starts = range(0, len(positions), config.batch_size)
    outputs = _collect(
        lambda some: run(inputs.batch(positions[some], views[some])),
        [slice(start, start + config.batch_size) for start in starts],
        len(positions),
    )
    stored = outputs.reshape(inputs.n_images, n_views, *outputs.shape[1:])
    return StoredInputs(stored, config.device)


def initialize_head(
    head: nn.Sequential, features: Inputs, examples: Examples, config: TrainingConfig
) -> None:
    """Fit the head's standardization and, if it is linear, a probe as its weights.

    Both are fitted to the training images without augmentation.
    """
    layers = list(head)
    scaler = next(layer for layer in layers if isinstance(layer, Standardize))
    # A pooling that comes first is part of the features.
    before = [] if isinstance(head[0], Pool) else layers[: layers.index(scaler)]
    run, positions = nn.Sequential(*before), examples.training
    unaugmented = np.zeros_like(positions)
    found = _collect(
        lambda some: run(features.batch(positions[some], unaugmented[some])),
        batches(len(positions), config.batch_size),
        len(positions),
    )
    scaler.fit(found)
    linear, *hidden = [layer for layer in layers if isinstance(layer, nn.Linear)]
    targets = examples.targets[positions]
    is_linear = not hidden and not before
    has_all_classes = len(np.unique(targets)) == linear.out_features
    if config.head_init == "probe" and is_linear and has_all_classes:
        probe = LogisticRegression(C=PROBE_C, max_iter=1000, random_state=config.seed)
        mean, scale = scaler.mean.cpu().numpy(), scaler.scale.cpu().numpy()
        weights = examples.weights[positions]
        probe.fit((found - mean) / scale, targets, sample_weight=weights)
        set_linear(linear, probe.coef_, probe.intercept_)


@torch.no_grad()
def _collect(
    run: Callable[[slice], Tensor], slices: Sequence[slice], n: int
) -> NDArray[np.float32]:
    """Run consecutive batches, and return the outputs of all `n` items as one array."""
    array = None
    for some in slices:
        outputs = run(some).float().cpu().numpy()
        if array is None:
            array = new_array((n, *outputs.shape[1:]), np.float32)
        array[some] = outputs
    assert array is not None  # there is at least one image
    return array


def training_config(estimator: Any, is_warm: bool, seed: int) -> TrainingConfig:
    """Return the settings that an estimator's parameters define."""
    is_new_head = isinstance(estimator.head_init, str) and not is_warm
    return TrainingConfig(
        head_init=estimator.head_init if is_new_head else None,
        optimizer=resolve_optimizer(estimator),
        schedule=estimator.schedule,
        weight_decay=estimator.weight_decay,
        label_smoothing=estimator.label_smoothing,
        lr_decay=estimator.backbone_lr_decay,
        keeps_statistics=estimator.weights is not None,
        patience=estimator.patience if estimator.early_stopping else None,
        batch_size=estimator.batch_size,
        device=resolve_device(estimator.device),
        dtype=DTYPES[estimator.precision_],
        seed=seed,
        verbose=bool(estimator.verbose),
    )


def resolve_optimizer(estimator: Any) -> str:
    """Return the name of the optimizer; ``"auto"`` depends on the backbone."""
    if estimator.optimizer != "auto":
        return str(estimator.optimizer)
    is_adamw = estimator.backbone_.name.startswith(ADAMW_FAMILIES)
    return "adamw" if is_adamw else "sgd"


def plan_stages(estimator: Any, n_blocks: int, n_frozen: int) -> list[Stage]:
    """Return the head stage and the fine-tuning stage, if they have epochs."""
    head_lr, backbone_lr = PEAK_LRS[resolve_optimizer(estimator)]
    if estimator.head_lr != "auto":
        head_lr = float(estimator.head_lr)
    if estimator.backbone_lr != "auto":
        backbone_lr = float(estimator.backbone_lr)
    lrs, only_batch_norms = (head_lr, backbone_lr), estimator.unfreeze == "batch_norm"
    stages = [Stage("head", estimator.head_epochs, n_blocks, *lrs)]
    if n_frozen < n_blocks:
        n_epochs = estimator.finetune_epochs
        stages += [Stage("fine-tuning", n_epochs, n_frozen, *lrs, only_batch_norms)]
    return [stage for stage in stages if stage.n_epochs > 0]


def build_optimizer(
    network: SplitNetwork, stage: Stage, config: TrainingConfig
) -> Optimizer:
    """Build the optimizer of all trainable parameters.

    One group for each group of blocks, with its learning rate, and kind of parameter:
    biases and batch-norms have no weight decay.
    """
    parts: list[tuple[str, nn.Module, float]] = []
    parts += [("head_lr", network.head, stage.head_lr)]
    lr = stage.backbone_lr
    for blocks in reversed(network.tuned):
        parts += [("backbone_lr", blocks, lr)]
        lr *= config.lr_decay
    groups = []
    for name, part, lr in parts:
        trainable = [one for one in part.parameters() if one.requires_grad]
        matrices = [one for one in trainable if one.ndim > 1]
        vectors = [one for one in trainable if one.ndim <= 1]
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            group = {"params": params, "name": name, "lr": lr, "weight_decay": decay}
            groups += [group] if params else []
    return OPTIMIZERS[config.optimizer](groups)


def build_schedule(optimizer: Optimizer, name: str, n_steps: int) -> LRScheduler:
    """Build the schedule of the learning rates over `n_steps` steps."""
    if name == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps=max(n_steps, 2) + 1
        )
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@contextmanager
def training_context(device: torch.device) -> Iterator[None]:
    """Enable gradients, and the requested precision, whatever the user's modes are."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False, cache_enabled=False),
    ):
        yield


def autocast(config: TrainingConfig) -> torch.autocast:
    """Return the context in which products are computed in the config's dtype.

    Without torch's cache of converted weights: it lives as long as the outermost such
    context, which may be the user's own, and would hide every step.
    """
    is_mixed = config.dtype != torch.float32
    return torch.autocast(config.device.type, config.dtype, is_mixed, False)


def batches(n: int, batch_size: int) -> list[slice]:
    """Divide a range into batches; a last one of one item joins the one before."""
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return [
        slice(start, end) for start, end in zip(starts, [*starts[1:], n], strict=True)
    ]


def _means(totals: NDArray[np.float64]) -> tuple[float, float]:
    """Return loss and score from sums of losses, correct answers and weights."""
    loss, n_correct, weight = totals.tolist()
    return loss / weight, n_correct / weight

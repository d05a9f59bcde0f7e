"""The two stages: what is frozen runs once, what is trained runs in each epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from skltl._large_arrays import new_array
from skltl.finetuning._checkpoint import Checkpoint
from skltl.finetuning._data import Inputs, Stored
from skltl.finetuning._network import Pool, Standardise, set_linear
from skltl.finetuning._training import (
    Examples,
    Learner,
    Settings,
    Stage,
    StageTraining,
    batches,
)
from skltl.inference import FrozenPrefix
from skltl.networks import freeze

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
        """Return those of some views of some images, on the device."""
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
        Of the same images.
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
    assert array is not None  # there is at least one image
    return Stored(array.reshape(-1, n_views, *array.shape[1:]), settings.device)


def prepare_head(
    head: nn.Sequential,
    features: Inputs,
    examples: Examples,
    begins_as: str,
    settings: Settings,
) -> None:
    """Give the head its first numbers, as far as they depend on the images.

    Parameters
    ----------
    head : Sequential
        The new layers.
    features : Inputs
        What they see.
    examples : Examples
        The images' labels and weights.
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
    """Return what is to be standardised (n, d), of the images themselves."""
    gathered = None
    for batch in batches(len(positions), settings.batch_size):
        some = positions[batch]
        rows = before(features.batch(some, np.zeros_like(some))).float().cpu().numpy()
        if gathered is None:
            gathered = new_array((len(positions), rows.shape[1]), np.float32)
        gathered[batch] = rows
    assert gathered is not None  # there is at least one image
    return gathered


__all__ = ["CallbackSupportMixin", "Progress", "StageProgress"]

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """There are no callbacks to support."""


class Progress:
    """The tree of tasks that scikit-learn's callbacks know: fit, stages, epochs.

    Parameters
    ----------
    estimator : estimator
        What is fitted.
    data : tuple
        ``X``, ``y``, and a dictionary of weights and groups, for callbacks.
    stages : list of Stage
        Its stages.
    so_far : callable
        Returns the attributes of the estimator as if the fit had ended now.
    """

    def __init__(
        self,
        estimator: Any,
        data: tuple[Any, Any, dict[str, Any]],
        stages: list[Stage],
        so_far: Callable[[], dict[str, Any]],
    ) -> None:
        X, y, metadata = data
        given = {name: value for name, value in metadata.items() if value is not None}
        about = {"estimator": estimator, "X": X, "y": y}
        self._about = {**about, "metadata": given or None}
        self._so_far = so_far
        self._is_verbose = bool(estimator.verbose)
        self._root: Any = None
        if hasattr(CallbackSupportMixin, "_init_callback_context"):
            self._root = estimator._init_callback_context(max_subtasks=len(stages))
            self._root.call_on_fit_task_begin(**self._about)

    def begin_stage(self, stage: Stage, n_epochs_done: int) -> StageProgress:
        """Tell that a stage begins, or goes on; return what to tell of its epochs."""
        context = None
        if self._root is not None:
            context = self._root.subcontext(stage.name, max_subtasks=stage.n_epochs)
            context.call_on_fit_task_begin(**self._about)
            for _ in range(n_epochs_done):  # told before the interruption
                context.subcontext("epoch")
        bar = tqdm(
            total=stage.n_epochs,
            initial=n_epochs_done,
            desc=stage.name,
            unit="epoch",
            disable=not self._is_verbose,
        )
        return StageProgress(context, bar, self._about, self._so_far)

    def skip_stage(self, stage: Stage) -> None:
        """Count a stage that was done before an interruption."""
        if self._root is not None:
            self._root.subcontext(stage.name, max_subtasks=stage.n_epochs)

    def end(self) -> None:
        """Tell that the fit has ended."""
        if self._root is not None:
            self._root.call_on_fit_task_end(
                **self._about, reconstruction_attributes=self._so_far
            )


class StageProgress:
    """What is told of one stage; see `Progress`."""

    def __init__(
        self,
        context: Any,
        bar: tqdm[Any],
        about: dict[str, Any],
        so_far: Callable[[], dict[str, Any]],
    ) -> None:
        self._context = context
        self._bar = bar
        self._about = about
        self._so_far = so_far

    def end_epoch(self, record: dict[str, Any]) -> bool:
        """Tell that an epoch has ended; return whether the stage shall end there."""
        kinds = ("loss", "score", "validation_score")
        self._bar.set_postfix({kind: record[kind] for kind in kinds if kind in record})
        self._bar.update()
        if self._context is None:
            return False
        epoch = self._context.subcontext("epoch")
        epoch.call_on_fit_task_begin(**self._about)
        return bool(
            epoch.call_on_fit_task_end(
                **self._about, reconstruction_attributes=self._so_far
            )
        )

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Tell that the stage has ended, if it has."""
        self._bar.close()
        if self._context is not None and error is None:
            self._context.call_on_fit_task_end(
                **self._about, reconstruction_attributes=self._so_far
            )


Record = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """The layers of the network that is tuned.

    Parameters
    ----------
    frozen : mapping of str to Module
        The first blocks; shared with others, never changed.
    tuned : list of mappings of str to Module
        Those that learn in the second stage, by the parts between main cut points; own
        copies.
    head : Module
        The new layers: convolutions, pooling, fully connected ones.
    """

    frozen: Mapping[str, nn.Module]
    tuned: Sequence[Mapping[str, nn.Module]]
    head: nn.Sequential

    def finished(self) -> tuple[FrozenPrefix, nn.Sequential]:
        """Return copies that learn no more: the blocks, and the head in float64."""
        tuned = {name: block for part in self.tuned for name, block in part.items()}
        tuned, head = copy.deepcopy((tuned, self.head))
        freeze({**tuned, "head": head})
        blocks = {name: block.cpu() for name, block in tuned.items()}
        return FrozenPrefix({**self.frozen, **blocks}), head.cpu().double()


def fine_tune(
    inputs: Inputs,
    examples: Examples,
    parts: Parts,
    stages: Sequence[Stage],
    settings: Settings,
    head_begins_as: str | None,
    checkpoint: Checkpoint,
    progress: Progress,
    history: list[Record],
) -> float | None:
    """Train the head, then the blocks that are to learn, in place.

    Parameters
    ----------
    inputs : Inputs
        What the frozen blocks give for each image.
    examples : Examples
        The images' labels and weights.
    parts : Parts
        The network's layers.
    stages : sequence of Stage
        What learns, in which order.
    settings : Settings
        How.
    head_begins_as : {"probe", "random"} or None
        Whether a new head begins as logistic regression; ``None`` for one that has
        been trained before.
    checkpoint : Checkpoint
        Where the state is kept after each epoch.
    progress : Progress
        Who is told of each epoch.
    history : list of dict
        Gets a record for each epoch.

    Returns
    -------
    float or None
        The score of the network at the end, on the images held out, if there are any.
    """
    tuned = [nn.Sequential(*part.values()).to(settings.device) for part in parts.tuned]
    head = parts.head.to(settings.device)
    freeze({"tuned": nn.Sequential(*tuned)})
    features = inputs
    if head_begins_as is not None or any(stage.name == "head" for stage in stages):
        features = head_inputs(tuned, head, inputs, settings)
    if head_begins_as is not None:
        prepare_head(head, features, examples, head_begins_as, settings)
    layers = nn.ModuleDict({"tuned": nn.Sequential(*tuned), "head": head})
    saved = checkpoint.saved_for(len(stages))
    score = None
    for number, stage in enumerate(stages):
        if saved is not None and number < saved["stage"]:
            progress.skip_stage(stage)
            continue
        learner = _learner(stage, tuned, head, settings)
        of_stage = features if stage.name == "head" else inputs
        training = StageTraining(learner, examples, of_stage, stage, settings, number)
        best = BestEpoch(settings.patience)
        is_stopped = False
        if saved is None:
            best.begin(training, layers)
        else:
            with checkpoint.restoring():
                is_stopped = _go_on(saved, layers, training, best, history)
            saved = None
        with progress.begin_stage(stage, training.n_epochs_done) as told:
            while not (training.is_done() or best.is_long_ago() or is_stopped):
                history.append(training.train_epoch())
                best.offer(history[-1], layers)
                is_stopped = told.end_epoch(history[-1])
                state = _state(number, layers, training, best, history)
                checkpoint.save(state | {"is_stopped": is_stopped})
            score = best.restore(layers)
    checkpoint.clear()
    return score


def _learner(
    stage: Stage, tuned: Sequence[nn.Module], head: nn.Module, settings: Settings
) -> Learner:
    """Return what a stage trains; the head stage begins behind the backbone."""
    if stage.name == "head":
        return Learner([], head, settings.keeps_statistics)
    for part in tuned:
        _unfreeze(part, stage.only_batch_norms)
    return Learner(tuned, head, settings.keeps_statistics, stage.only_batch_norms)


def _unfreeze(tuned: nn.Module, only_batch_norms: bool) -> None:
    for module in tuned.modules():
        if not only_batch_norms or isinstance(module, _BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


class BestEpoch:
    """The epoch with the best score on the images held out, and its numbers.

    Parameters
    ----------
    patience : int or None
        After how many epochs without a better score to give up. ``None`` is never: the
        last epoch counts, and nothing is remembered.
    """

    def __init__(self, patience: int | None) -> None:
        self.score = -math.inf
        self.loss = math.inf
        self.n_since = 0
        self.numbers: dict[str, Tensor] | None = None
        self._patience = patience

    def begin(self, training: StageTraining, layers: nn.Module) -> None:
        """Remember what a stage begins with: it may make things worse."""
        if self._patience is not None:
            self.offer(training.validate(), layers)

    def offer(self, record: Record, layers: nn.Module) -> None:
        """Remember an epoch if its score is higher, or its loss lower at this score."""
        self.n_since += 1
        if self._patience is None:
            return
        score, loss = record["validation_score"], record["validation_loss"]
        if score < self.score or (score == self.score and not loss < self.loss):
            return
        if score > self.score:
            self.n_since = 0
        self.score, self.loss = float(score), float(loss)
        self.numbers = copy.deepcopy(layers.state_dict())

    def is_long_ago(self) -> bool:
        """Tell whether the score rose last `patience` epochs ago."""
        return self._patience is not None and self.n_since >= self._patience

    def restore(self, layers: nn.Module) -> float | None:
        """Put back the numbers of the best epoch, if it counts; return its score."""
        if self.numbers is None:
            return None
        layers.load_state_dict(self.numbers)
        return self.score


def _state(
    number: int,
    layers: nn.Module,
    training: StageTraining,
    best: BestEpoch,
    history: list[Record],
) -> dict[str, Any]:
    """Return the seed, and all that has changed since the fit began."""
    return {
        "seed": training.seed,
        "stage": number,
        "layers": layers.state_dict(),
        "training": training.state(),
        "best": {
            "score": best.score,
            "loss": best.loss,
            "n_since": best.n_since,
            "numbers": best.numbers,
        },
        "history": history,
    }


def _go_on(
    saved: dict[str, Any],
    layers: nn.Module,
    training: StageTraining,
    best: BestEpoch,
    history: list[Record],
) -> bool:
    """Put back what `_state` gave; tell whether a callback has stopped the stage."""
    layers.load_state_dict(saved["layers"])
    training.set_state(saved["training"])
    best.score, best.loss = saved["best"]["score"], saved["best"]["loss"]
    best.n_since = saved["best"]["n_since"]
    best.numbers = saved["best"]["numbers"]
    history[:] = saved["history"]
    return bool(saved["is_stopped"])

"""The two stages: what is frozen runs once, what learns runs in each epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl.backbones import FrozenPrefix, freeze
from skltl.classifiers._checkpoint import Checkpoint
from skltl.classifiers._head_stage import head_inputs, prepare_head
from skltl.classifiers._inputs import Inputs
from skltl.classifiers._progress import Progress
from skltl.classifiers._stages import Stage
from skltl.classifiers._training import Examples, Learner, Settings, StageTraining

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
        What the frozen blocks give for each picture.
    examples : Examples
        The pictures' labels and weights.
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
    """The epoch with the best score on the pictures held out, and its numbers.

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

"""The two stages: what is frozen runs once, what learns runs in each epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skltl.backbones import freeze
from skltl.classifiers._activations import Inputs
from skltl.classifiers._checkpoint import Checkpoint
from skltl.classifiers._head import Pool, Standardise, set_linear
from skltl.classifiers._stages import Stage
from skltl.classifiers._training import Examples, Learner, Settings, StageTraining

# The best of decades on flowers and digits, as in `make_feature_pipeline`.
PROBE_C = 0.1

Record = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """The layers of the network that is tuned.

    Parameters
    ----------
    frozen : mapping of str to Module
        The first blocks; shared with others, never changed.
    tuned : mapping of str to Module
        Those that learn in the second stage; own copies.
    head : Module
        The new layers: convolutions, pooling, fully connected ones.
    """

    frozen: Mapping[str, nn.Module]
    tuned: Mapping[str, nn.Module]
    head: nn.Sequential


def fine_tune(
    inputs: Inputs,
    examples: Examples,
    parts: Parts,
    stages: Sequence[Stage],
    settings: Settings,
    seed: int,
    head_begins_as: str | None,
    keeps_statistics: bool,
    patience: int | None,
    checkpoint: Checkpoint,
) -> list[Record]:
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
    seed : int
        Of the order of the pictures and of dropout.
    head_begins_as : {"probe", "random"} or None
        Whether a new head begins as logistic regression; ``None`` for one that has
        been trained before.
    keeps_statistics : bool
        Whether pretrained batch-norms keep theirs.
    patience : int or None
        Epochs without a better score on the pictures held out after which a stage ends;
        its best epoch counts. ``None`` is all epochs, and the last counts.
    checkpoint : Checkpoint
        Where the state is kept after each epoch.

    Returns
    -------
    list of dict
        A record for each epoch.
    """
    tuned = nn.Sequential(*parts.tuned.values()).to(settings.device)
    parts.head.to(settings.device)
    freeze({"tuned": tuned})
    features = _head_inputs(tuned, parts.head, inputs, settings)
    if head_begins_as is not None:
        has_probe = head_begins_as == "probe"
        _prepare_head(parts.head, features, examples, has_probe, seed)
    layers = nn.ModuleDict({"tuned": tuned, "head": parts.head})
    history: list[Record] = []
    saved = checkpoint.load()
    for number, stage in enumerate(stages):
        if saved is not None and number < saved["stage"]:
            continue
        training = StageTraining(
            _learner(stage, tuned, parts.head, keeps_statistics),
            examples,
            features.__getitem__ if stage.name == "head" else inputs.batch,
            stage,
            settings,
            seed + number,
        )
        best = BestEpoch()
        if saved is not None:
            history = _go_on(saved, layers, training, best)
            saved = None
        while training.n_epochs_done < stage.n_epochs and not best.is_long_ago(
            patience
        ):
            history.append(training.train_epoch())
            best.offer(history[-1], layers)
            checkpoint.save(_state(number, layers, training, best, history))
        best.restore(layers, patience)
    freeze({"tuned": tuned, "head": parts.head})
    layers.cpu()
    checkpoint.clear()
    return history


@torch.no_grad()
def _head_inputs(
    tuned: nn.Sequential, head: nn.Sequential, inputs: Inputs, settings: Settings
) -> Tensor:
    """Return what the head sees while the backbone is frozen, of all pictures.

    Without new convolutions these are pooled features: small, whatever the map is.
    """
    begins_with_pool = isinstance(head[0], Pool)
    found = []
    for first in range(0, len(inputs), settings.batch_size):
        last = min(first + settings.batch_size, len(inputs))
        with settings.autocast():
            feature_map = tuned(inputs.batch(np.arange(first, last)))
        found.append(head[0](feature_map) if begins_with_pool else feature_map.float())
    return torch.cat(found)


def _prepare_head(
    head: nn.Sequential,
    features: Tensor,
    examples: Examples,
    has_probe: bool,
    seed: int,
) -> None:
    """Give the head its first numbers, as far as they depend on the pictures."""
    if not isinstance(head[0], Pool):
        return
    scaler = next(layer for layer in head if isinstance(layer, Standardise))
    features = features[examples.training]
    targets, weights = (
        one[examples.training] for one in (examples.targets, examples.weights)
    )
    scaler.set_from(features)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    if (
        has_probe
        and len(linear) == 1
        and len(np.unique(targets)) == linear[0].out_features
    ):
        probe = LogisticRegression(C=PROBE_C, max_iter=1000, random_state=seed)
        standardised = scaler(features).cpu().numpy()
        probe.fit(standardised, targets, sample_weight=weights)
        set_linear(linear[0], probe.coef_, probe.intercept_)


def _learner(
    stage: Stage, tuned: nn.Module, head: nn.Module, keeps_statistics: bool
) -> Learner:
    """Return what a stage trains; the head stage begins behind the backbone."""
    if stage.name == "head":
        return Learner(nn.Identity(), head, keeps_statistics)
    _unfreeze(tuned, stage.only_batch_norms)
    return Learner(tuned, head, keeps_statistics)


def _unfreeze(tuned: nn.Module, only_batch_norms: bool) -> None:
    for module in tuned.modules():
        if not only_batch_norms or isinstance(module, _BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


def split_blocks(
    blocks: Mapping[str, nn.Module], n_frozen: int
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Part the blocks into the frozen ones and copies of those that learn."""
    names = list(blocks)
    frozen = {name: blocks[name] for name in names[:n_frozen]}
    tuned = {name: copy.deepcopy(blocks[name]) for name in names[n_frozen:]}
    return frozen, tuned


class BestEpoch:
    """The epoch with the best score on the pictures held out, and its numbers."""

    def __init__(self) -> None:
        self.score = -math.inf
        self.loss = math.inf
        self.n_since = 0
        self.numbers: dict[str, Tensor] | None = None

    def offer(self, record: Record, layers: nn.Module) -> None:
        """Remember an epoch if its score is higher, or its loss lower at this score."""
        self.n_since += 1
        if "validation_score" not in record:
            return
        score, loss = record["validation_score"], record["validation_loss"]
        if score < self.score or (score == self.score and loss >= self.loss):
            return
        if score > self.score:
            self.n_since = 0
        self.score, self.loss = float(score), float(loss)
        self.numbers = copy.deepcopy(layers.state_dict())

    def is_long_ago(self, patience: int | None) -> bool:
        """Tell whether the score rose last `patience` epochs ago."""
        return patience is not None and self.n_since >= patience

    def restore(self, layers: nn.Module, patience: int | None) -> None:
        """Put back the numbers of the best epoch, if it counts."""
        if patience is not None and self.numbers is not None:
            layers.load_state_dict(self.numbers)


def _state(
    number: int,
    layers: nn.Module,
    training: StageTraining,
    best: BestEpoch,
    history: list[Record],
) -> dict[str, Any]:
    """Return all that has changed since the fit began."""
    return {
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
    saved: dict[str, Any], layers: nn.Module, training: StageTraining, best: BestEpoch
) -> list[Record]:
    """Put back what `_state` gave; return the history."""
    layers.load_state_dict(saved["layers"])
    training.set_state(saved["training"])
    best.score, best.loss = saved["best"]["score"], saved["best"]["loss"]
    best.n_since = saved["best"]["n_since"]
    best.numbers = saved["best"]["numbers"]
    history: list[Record] = saved["history"]
    return history

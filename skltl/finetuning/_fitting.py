"""From the parameters of a classifier to the pieces that a fit is made of."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from os import fspath

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from skltl._parameters import (
    name_of_dtype,
    resolve_device,
    resolve_precision,
    resolve_threads,
)
from skltl._random import draw_seed, fresh_seed
from skltl.finetuning._checkpoint import Checkpoint, fingerprint
from skltl.finetuning._conversion import head_of_pipeline
from skltl.finetuning._data import (
    Fresh,
    Views,
    decode_crops,
    frozen_first,
    hold_out,
    normalised,
    run_frozen,
    without_resize,
)
from skltl.finetuning._labels import balanced, encode_labels, example_weights, shown
from skltl.finetuning._network import (
    Foundation,
    build_head,
    count_frozen,
    has_batch_norms,
    head_state,
    lay_foundation,
    split_blocks,
)
from skltl.finetuning._stages import Parts, Progress, fine_tune
from skltl.finetuning._training import Examples, Settings, plan_stages
from skltl.inference import FrozenPrefix, resolve_engine
from skltl.networks import get_backbone

# The highest rates, of new and of pretrained layers; see the user guide for sources and
# for what was measured.
RATES = {"sgd": (0.01, 0.01), "adamw": (1e-3, 1e-4)}

# The families that were trained with AdamW, and are best tuned with it.
ADAMW_FAMILIES = ("convnext", "efficientnet_v2")


@dataclass(frozen=True)
class Fit:
    """A fit that is going on: all that it has so far.

    Parameters
    ----------
    of_reading : dict
        The attributes that reading ``X`` sets.
    classes : array
        The labels.
    foundation : Foundation
        The network, as it was.
    engine : str
        What runs its frozen blocks.
    precision : str
        What products are computed in.
    pooling : str or int
        How the feature map at the cut becomes features.
    parts : Parts
        Its layers, as they are.
    stages : list of Stage
        The plan.
    history : list of dict
        The records of the epochs.
    progress : Progress or None, default=None
        Who is told of them.
    best_score : float or None, default=None
        That of the network at the end, on the images held out, if there are any.
    """

    of_reading: dict
    classes: NDArray
    foundation: Foundation
    engine: str
    precision: str
    pooling: str | int
    parts: Parts
    stages: list
    history: list
    progress: Progress | None = None
    best_score: float | None = None

    def attributes(self):
        """Return the attributes of the estimator as if the fit had ended now."""
        network, head = self.parts.finished()
        return {
            **self.of_reading,
            "classes_": self.classes,
            "backbone_": self.foundation.backbone,
            "preprocessing_": self.foundation.preprocessing,
            "engine_": self.engine,
            "precision_": self.precision,
            "pooling_": self.pooling,
            "cut_points_": [self.foundation.cut_point],
            "network_": network,
            "head_": head,
            "stages_": self.stages,
            "history_": list(self.history),
            "n_epochs_": len(self.history),
            "best_validation_score_": self.best_score,
        }


def run_fit(classifier, X, y, sample_weight, groups):
    """Do what `fit` of a `FineTunedCNNClassifier` does, but change nothing of it."""
    reader = clone(classifier)  # not fitted: nothing of an earlier fit counts for it
    source = reader._read_images(X, y, reset=True)
    classes, targets = encode_labels(y, len(source))
    weights = example_weights(sample_weight, classifier.class_weight, classes, targets)
    _check_widths(classifier)
    given = (classes[targets], sample_weight, groups)
    asked = draw_seed(classifier.random_state)
    seed = fresh_seed() if asked is None else asked
    with _find_checkpoint(classifier, source, given, asked, seed) as checkpoint:
        if checkpoint.saved is not None:
            seed = checkpoint.saved["seed"]
        share, is_needed = classifier.validation_fraction, classifier.early_stopping
        held = hold_out(targets, groups, share, is_needed, seed)
        examples = Examples(targets, balanced(weights, *held), *held)
        settings = _settings(classifier, seed)
        # Whatever the user's own modes are: this is where gradients are needed.
        with _training_mode(settings.device):
            fit = _begin(classifier, reader, classes, seed, asked is not None)
            metadata = {"sample_weight": sample_weight, "groups": groups}
            data = (X, y, metadata)
            progress = Progress(classifier, data, fit.stages, fit.attributes)
            best_score = fine_tune(
                _inputs(reader, source, fit, seed),
                examples,
                fit.parts,
                fit.stages,
                settings,
                _new_head(classifier),
                checkpoint,
                progress,
                fit.history,
            )
    return replace(fit, progress=progress, best_score=best_score)


def _check_widths(classifier):
    """Refuse new layers of no or half a width."""
    for name in ("conv_channels", "hidden_units"):
        for width in getattr(classifier, name):
            is_count = isinstance(width, Integral) and not isinstance(width, bool)
            if not is_count or width < 1:
                raise ValueError(f"{name} must be positive integers, got {width!r}.")


def _find_checkpoint(classifier, source, given, asked, seed):
    """Return where the state of this fit is kept; `asked` is ``None`` or the seed."""
    if classifier.checkpoint is None:
        return Checkpoint(None, "")
    if not fspath(classifier.checkpoint) or "\0" in fspath(classifier.checkpoint):
        raise ValueError(f"checkpoint={classifier.checkpoint!r} is no folder's name.")
    arrays = [None if one is None else np.asarray(one) for one in given]
    foundation = _foundation(classifier, seed, is_shared=asked is not None)
    name = fingerprint(classifier, source, arrays, foundation, asked)
    return Checkpoint(classifier.checkpoint, name)


def _goes_on(classifier):
    """Tell whether a fit begins with what the one before has learned."""
    return classifier.warm_start and hasattr(classifier, "head_")


def _new_head(classifier):
    """Return how a new head begins, ``None`` for one that is trained already."""
    is_new = isinstance(classifier.head_init, str) and not _goes_on(classifier)
    return classifier.head_init if is_new else None


def _foundation(classifier, seed, is_shared):
    """Load the network that new layers are put on."""
    return lay_foundation(
        classifier.backbone,
        classifier.weights,
        classifier.layer,
        classifier.image_size,
        classifier.pooling,
        seed,
        is_shared,
    )


def _begin(classifier, reader, classes, seed, is_shared):
    """Lay out network, new layers and plan; `reader` is a copy that has read ``X``."""
    foundation = _foundation(classifier, seed, is_shared)
    head = _head(classifier, foundation, classes, seed)
    if _goes_on(classifier):
        _check_same(classifier, foundation, head, classes)
        foundation = replace(foundation, blocks=classifier.network_.blocks)
        head = copy.deepcopy(classifier.head_).float().requires_grad_(True)
    stages = _plan(classifier, foundation)
    n_blocks = len(foundation.blocks)
    n_frozen = min((stage.n_frozen for stage in stages), default=n_blocks)
    parts = Parts(*split_blocks(foundation, n_frozen), head)
    _check_batch_size(classifier, parts)
    of_reading = {
        name: value
        for name, value in vars(reader).items()
        if name.endswith("_in_") or name == "_fitted_image_shape"
    }
    device = resolve_device(classifier.device)
    engine = resolve_engine(classifier.engine, device, foundation.blocks)
    precision = name_of_dtype(resolve_precision(classifier.precision, device))
    kinds = (engine, precision, classifier.pooling)
    return Fit(of_reading, classes, foundation, *kinds, parts, stages, [])


def _head(classifier, foundation, classes, seed):
    """Build the new layers, or those that a fitted linear classifier amounts to."""
    if classifier.conv_channels and len(foundation.shape) != 3:
        raise ValueError(
            f"conv_channels={classifier.conv_channels!r} need a feature map, but layer "
            f"{foundation.cut_point.name!r} gives a vector of {foundation.shape[0]} "
            "numbers."
        )
    head = build_head(
        foundation.shape,
        classifier.pooling,
        tuple(classifier.conv_channels),
        tuple(classifier.hidden_units),
        classifier.dropout,
        len(classes),
        seed,
    )
    if isinstance(classifier.head_init, str):
        return head
    fitted = classifier.head_init.estimator
    scaler, linear = fitted if isinstance(fitted, Pipeline) else (None, fitted)
    found = head_of_pipeline(classifier.pooling, scaler, linear)
    _check_linear_head(fitted, head, found, classes)
    return found.float().requires_grad_(True)


def _check_linear_head(fitted, head, found, classes):
    """Refuse to begin with a linear classifier that does not suit."""
    if not np.array_equal(classes, fitted.classes_):
        raise ValueError(
            f"head_init: the classes are {shown(classes)}, those of the fitted "
            f"classifier are {shown(fitted.classes_)}."
        )
    layers, expected = (head_state(one)["layers"] for one in (found, head))
    if layers != expected:
        raise ValueError(
            "head_init: the fitted classifier is another head than pooling, "
            f"conv_channels, hidden_units and dropout describe: {layers} instead of "
            f"{expected}."
        )


def _check_batch_size(classifier, parts):
    """Refuse steps of one image where batch-norms learn their statistics."""
    blocks = [block for part in parts.tuned for block in part.values()]
    if (
        classifier.weights is None
        and classifier.batch_size == 1
        and has_batch_norms(blocks)
    ):
        raise ValueError(
            "batch_size=1: batch-norms that are trained from scratch need at least 2 "
            "images in a step."
        )


@contextmanager
def _training_mode(device):
    """Compute gradients, in the precision that is asked for, whatever the user does."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False, cache_enabled=False),
    ):
        yield


def _settings(classifier, seed):
    """Return how to learn, the same in all stages."""
    device = resolve_device(classifier.device)
    return Settings(
        _optimizer(classifier),
        classifier.schedule,
        classifier.weight_decay,
        classifier.label_smoothing,
        classifier.backbone_lr_decay,
        classifier.weights is not None,
        classifier.patience if classifier.early_stopping else None,
        classifier.batch_size,
        device,
        resolve_precision(classifier.precision, device),
        seed,
    )


def _inputs(classifier, source, fit, seed):
    """Return what the blocks that learn see: computed now, wherever that is possible.

    Only free augmentation makes the frozen blocks run in every epoch.
    """
    threads, verbose = resolve_threads(classifier.n_jobs), bool(classifier.verbose)
    cache = classifier._cache_folder()
    recipe = _recipe(classifier, fit) if fit.parts.frozen else None
    if classifier.augment is None and recipe is not None:
        return run_frozen(source, 0, recipe, threads, verbose, cache)
    n_views = 0 if classifier.augment is None else classifier.n_views
    preprocessing = fit.foundation.preprocessing
    if classifier.decode == "fast":
        source = source.reduced_to(2 * preprocessing.shorter_side)
    crops = decode_crops(source, preprocessing, threads)
    views = Views(crops, classifier.augment, n_views or 0, seed)
    if recipe is None:
        device = resolve_device(classifier.device)
        return Fresh(views, n_views, normalised(preprocessing, device))
    recipe = without_resize(recipe)
    if n_views is None:
        return Fresh(views, None, frozen_first(recipe))
    # Variants that nobody can draw again are not worth keeping.
    cache = None if classifier.random_state is None else cache
    return run_frozen(views, n_views, recipe, threads, verbose, cache)


def _recipe(classifier, fit):
    """Say what the frozen blocks give; maps only if layers see them."""
    sees_maps = fit.parts.tuned or classifier.conv_channels
    return classifier._make_recipe(
        fit.foundation.backbone,
        FrozenPrefix(fit.parts.frozen),
        (list(fit.parts.frozen)[-1],),
        fit.foundation.preprocessing,
        "flatten" if sees_maps else classifier.pooling,
    )


def _plan(classifier, foundation):
    """Plan the stages."""
    head_lr, backbone_lr = RATES[_optimizer(classifier)]
    if classifier.head_lr != "auto":
        head_lr = float(classifier.head_lr)
    if classifier.backbone_lr != "auto":
        backbone_lr = float(classifier.backbone_lr)
    return plan_stages(
        len(foundation.blocks),
        count_frozen(foundation, classifier.unfreeze),
        (classifier.head_epochs, classifier.finetune_epochs),
        (head_lr, backbone_lr),
        only_batch_norms=classifier.unfreeze == "batch_norm",
    )


def _optimizer(classifier):
    if classifier.optimizer != "auto":
        return classifier.optimizer
    is_adamw = get_backbone(classifier.backbone).name.startswith(ADAMW_FAMILIES)
    return "adamw" if is_adamw else "sgd"


def _check_same(classifier, foundation, head, classes):
    """Refuse to go on with a network that the parameters no longer describe."""
    before = (classifier.backbone_, classifier.cut_points_)
    if not np.array_equal(classes, classifier.classes_):
        raise ValueError(
            f"warm_start=True: the classes are {shown(classes)}, those of the fit "
            f"before are {shown(classifier.classes_)}."
        )
    if before != (foundation.backbone, [foundation.cut_point]):
        raise ValueError(
            "warm_start=True: the fit before had another backbone, or was cut "
            f"somewhere else: {before[0].name!r} at {before[1][0].name!r}, not "
            f"{foundation.backbone.name!r} at {foundation.cut_point.name!r}."
        )
    if classifier.preprocessing_ != foundation.preprocessing:
        raise ValueError(
            "warm_start=True: the fit before saw images prepared in another way: "
            f"{classifier.preprocessing_}."
        )
    if head_state(head)["layers"] != head_state(classifier.head_)["layers"]:
        raise ValueError(
            "warm_start=True: the fit before had other new layers (pooling, "
            "conv_channels, hidden_units, dropout)."
        )

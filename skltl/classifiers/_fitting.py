"""From the parameters of a classifier to the pieces that a fit is made of."""

from __future__ import annotations

import copy
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from sklearn.model_selection import StratifiedShuffleSplit

from skltl._device import resolve_device, resolve_precision, resolve_threads
from skltl.backbones import FrozenPrefix
from skltl.classifiers._activations import Activations, Pictures
from skltl.classifiers._foundation import count_frozen, lay_foundation
from skltl.classifiers._head import build_head
from skltl.classifiers._stages import plan_stages
from skltl.classifiers._training import Settings

# The highest rates, of new and of pretrained layers; see the user guide for sources.
RATES = {"sgd": (0.01, 0.001), "adamw": (1e-3, 1e-4)}

# What early stopping looks at, if nothing else is said.
VALIDATION_FRACTION = 0.1

# The families that were trained with AdamW, and are best tuned with it.
ADAMW_FAMILIES = ("convnext", "efficientnet_v2")

# On these a checkpoint does not depend.
NOT_OF_THE_FIT = ("checkpoint", "verbose", "n_jobs")


def goes_on(classifier):
    """Tell whether a fit begins with what the one before has learned."""
    return classifier.warm_start and hasattr(classifier, "head_")


def begin(classifier, classes, seed):
    """Return the network to put new layers on, and these."""
    foundation = lay_foundation(
        classifier.backbone,
        classifier.weights,
        classifier.layer,
        classifier.image_size,
        classifier.pooling,
        seed,
    )
    if goes_on(classifier):
        head = copy.deepcopy(classifier.head_).float().requires_grad_(True)
        return _tuned_so_far(classifier, foundation, classes), head
    return foundation, build_head(
        foundation.shape,
        classifier.pooling,
        tuple(classifier.conv_channels),
        tuple(classifier.hidden_units),
        classifier.dropout,
        len(classes),
        seed,
    )


def plan(classifier, foundation):
    """Plan the stages."""
    head_lr, backbone_lr = RATES[_optimizer(classifier, foundation)]
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


def settings_of(classifier, foundation):
    """Return how to learn, the same in all stages."""
    device = resolve_device(classifier.device)
    return Settings(
        _optimizer(classifier, foundation),
        classifier.schedule,
        classifier.weight_decay,
        classifier.label_smoothing,
        classifier.batch_size,
        device,
        resolve_precision(classifier.precision, device),
    )


def inputs_of(classifier, source, foundation, parts):
    """Run the frozen blocks on all pictures; keep maps only if layers see them."""
    threads = resolve_threads(classifier.n_jobs)
    if not parts.frozen:
        device = resolve_device(classifier.device)
        return Pictures(source, foundation.preprocessing, device, threads)
    sees_maps = parts.tuned or classifier.conv_channels
    recipe = classifier._make_recipe(
        foundation.backbone,
        FrozenPrefix(parts.frozen),
        (list(parts.frozen)[-1],),
        foundation.preprocessing,
        "flatten" if sees_maps else classifier.pooling,
    )
    return Activations(source, recipe, threads, bool(classifier.verbose))


def hold_out(classifier, targets, seed):
    """Return the positions to learn from, and those to look how it goes."""
    everything = np.arange(len(targets))
    share = classifier.validation_fraction
    if share is None:
        share = VALIDATION_FRACTION if classifier.early_stopping else 0.0
    if not share:
        return everything, everything[:0]
    split = StratifiedShuffleSplit(1, test_size=share, random_state=seed)
    return next(split.split(everything, targets))


def fingerprint(classifier, inputs, examples, head):
    """Name all that a fit depends on, to know a checkpoint of the same one."""
    if classifier.checkpoint is None:
        return ""
    params = classifier.get_params()
    params = sorted((k, v) for k, v in params.items() if k not in NOT_OF_THE_FIT)
    digest = blake2b(repr(params).encode(), digest_size=16)
    digest.update(inputs.digest())
    for array in (examples.targets, examples.weights, examples.validation):
        digest.update(np.ascontiguousarray(array).data)
    if classifier.random_state is not None or goes_on(classifier):
        for numbers in head.state_dict().values():
            digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def _optimizer(classifier, foundation):
    if classifier.optimizer != "auto":
        return classifier.optimizer
    is_adamw = foundation.backbone.name.startswith(ADAMW_FAMILIES)
    return "adamw" if is_adamw else "sgd"


def _tuned_so_far(classifier, foundation, classes):
    """Put the blocks of the last fit in place of the pretrained ones."""
    if not np.array_equal(classes, classifier.classes_):
        raise ValueError(
            f"warm_start=True: the classes are {classes}, those of the fit before are "
            f"{classifier.classes_}."
        )
    if [foundation.cut_point] != classifier.cut_points_:
        raise ValueError("warm_start=True: the fit before was cut somewhere else.")
    return replace(foundation, blocks=classifier.network_.blocks)

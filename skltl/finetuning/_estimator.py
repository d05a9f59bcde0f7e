"""Base class of the estimators that fine-tune a network in two stages."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any

import torch
from sklearn.base import ClassifierMixin
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from skltl._estimator import INPUT_ATTRIBUTES, ImageEstimator, read_images_of
from skltl._parameters import (
    name_of_dtype,
    resolve_device,
    resolve_precision,
)
from skltl._random import draw_seed, fresh_seed
from skltl._sklearn import AT_LEAST_ONE, Interval, StrOptions
from skltl.exceptions import (
    ImageError,
    shorten,
)
from skltl.features import (
    SHARED_PARAMETERS,
    FeatureEstimator,
    HeadEstimator,
    check_output,
    copy_fitted_network,
    fitted_parameters,
    fitted_transformer,
    output_layout,
)
from skltl.finetuning._callbacks import CallbackSupportMixin, begin_fit
from skltl.finetuning._checkpoint import (
    SharedCheckpoint,
    check_folder,
    fingerprint,
    open_checkpoint,
)
from skltl.finetuning._conversion import (
    head_of_pipeline,
    linear_head,
    parts_of_pipeline,
)
from skltl.finetuning._data import TrainingData, example_weights, split_examples
from skltl.finetuning._distributed import (
    broadcast,
    check_same,
    in_step,
    n_processes,
    rank,
)
from skltl.finetuning._head import (
    Pool,
    build_head,
    check_widths,
    head_from_state,
    head_specs,
    head_state,
)
from skltl.finetuning._inputs import build_inputs, check_picklable
from skltl.finetuning._network import (
    SplitNetwork,
    check_trainable,
    count_frozen,
    group_blocks,
    has_batch_norms,
    training_context,
)
from skltl.finetuning._optimization import OPTIMIZERS, Stage, plan_stages
from skltl.finetuning._training import train_network
from skltl.inference import POOLINGS, digest_of, load_prefix, resolve_engine
from skltl.networks import Backbone, resolve_layer, resolve_network

# Private attributes of a fit, which are saved.
PRIVATE_ATTRIBUTES = ("_fitted_image_shape", "_target_ndim")

# Parameters that processes of one fit may have of their own, and the types of others
# whose values are compared.
MAY_DIFFER = {"cache", "device", "n_jobs", "random_state", "reader", "verbose"}
PLAIN = (Real, str, tuple, list, dict)


class FineTunedCNN(CallbackSupportMixin, FeatureEstimator, HeadEstimator):
    """Base class of the classifier and the regressor of a fine-tuned network.

    They define the targets: `_encode_targets`, `_encode_more_targets`,
    `_image_weights`, `_objective` and `_check_head`.
    """

    _parameter_constraints: dict = {
        **ImageEstimator._parameter_constraints,
        "layer": [str, Integral],
        "pooling": [StrOptions(set(POOLINGS)), AT_LEAST_ONE],
        "conv_channels": [tuple, list],
        "hidden_units": [tuple, list],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "unfreeze": [str, AT_LEAST_ONE, None],
        "head_epochs": [Interval(Integral, 0, None, closed="left")],
        "finetune_epochs": [Interval(Integral, 0, None, closed="left")],
        "head_init": [StrOptions({"probe", "random"}), FrozenEstimator],
        "head_lr": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "backbone_lr": [
            Interval(Real, 0, None, closed="neither"),
            StrOptions({"auto"}),
        ],
        "backbone_lr_decay": [Interval(Real, 0, 1, closed="right")],
        "optimizer": [StrOptions({"auto", *OPTIMIZERS})],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "schedule": [StrOptions({"one_cycle", "cosine", "constant"})],
        "augment": [callable, StrOptions({"auto"}), None],
        "n_views": [AT_LEAST_ONE, None],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither"), None],
        "early_stopping": ["boolean"],
        "monitor": [StrOptions({"score", "loss"})],
        "patience": [AT_LEAST_ONE],
        "keep_on_interrupt": ["boolean"],
        "batch_size": [AT_LEAST_ONE],
        "cache": ["boolean", str, PathLike, None],
        "checkpoint": [str, PathLike, None],
        "warm_start": ["boolean"],
    }

    def _encode_targets(self, y, n_images):
        """Return the targets of `n_images`, and set the attributes that describe them.

        They are classes (n,) or an array (n, n_outputs).
        """
        raise NotImplementedError

    def _encode_more_targets(self, y, n_images):
        """Return further targets, encoded as those of `_encode_targets` were."""
        raise NotImplementedError

    def _image_weights(self, sample_weight, targets):
        """Return the weight of each image in the loss."""
        return example_weights(sample_weight, targets)

    def _objective(self, examples):
        """Return what the network is trained for, given targets as encoded."""
        raise NotImplementedError

    def _check_head(self, fitted):
        """Raise if `head_init` holds an estimator that was fitted to other targets."""

    def _fit(self, X, y, sample_weight, groups, validation):
        """Fit the network in two stages.

        `validation` are the images, targets and weights of a validation set.
        """
        with in_step():
            attributes = self._train(X, y, sample_weight, groups, validation)
        kept = vars(self).keys() - set(INPUT_ATTRIBUTES)  # those are of an earlier fit
        # Replaced at once, for threads that predict meanwhile.
        self.__dict__ = {name: getattr(self, name) for name in kept} | attributes
        return self

    def _train(self, X, y, sample_weight, groups, validation):
        """Return the attributes of the fit."""
        check_widths("conv_channels", self.conv_channels)
        check_widths("hidden_units", self.hidden_units)
        check_picklable(self.augment)
        # A fit that fails leaves `self` unchanged. Meanwhile, `self` holds the previous
        # fit, and the context of scikit-learn's callbacks.
        new = type(self)(**self.get_params())
        new.verbose = self.verbose if rank() == 0 else 0
        data = new._read(X, y, sample_weight, groups, *validation)
        new._check_same_fit(data)
        weights = data.join_weights(new._image_weights)
        with (
            training_context(resolve_device(self.device)),
            naming_validation_images(data),
        ):
            requested_seed, seed = self._draw_seed()
            split_examples(new, data, weights, seed)  # before it takes long
            new._load_network(seed)
            with self._open_checkpoint(new, data, requested_seed) as checkpoint:
                if checkpoint is not None and checkpoint.saved is not None:
                    seed = checkpoint.saved["seed"]
                    new._load_network(seed)
                examples = split_examples(new, data, weights, seed)
                objective = new._objective(examples)
                examples = replace(examples, targets=objective.encode(data.targets))
                network = self._build_network(new, objective, seed)
                self._check_same_network_everywhere(new)
                new.history_, new.best_validation_score_ = [], None
                metadata = {"sample_weight": sample_weight, "groups": groups}
                fitted = partial(new._fitted_attributes, network, objective)
                task = begin_fit(self, X, y, metadata, len(new.stages_), fitted)
                inputs = build_inputs(new, data.source, network, seed)
                is_new_head = isinstance(self.head_init, str) and not self._is_warm()
                new.best_validation_score_ = train_network(
                    *(new, network, inputs, examples, objective, seed),
                    *(is_new_head, checkpoint, task),
                )
        attributes = fitted()
        task.end()
        return attributes

    def _check_same_fit(self, data):
        """Raise if the processes have other data or parameters."""
        if n_processes() == 1:
            return
        parameters = {
            name: repr(value) if isinstance(value, PLAIN) else type(value).__name__
            for name, value in self.get_params().items()
            if name not in MAY_DIFFER
        }
        check_same(data.digests() | parameters | self._target_identity())

    def _check_same_network_everywhere(self, new):
        """Raise if the processes begin with other networks.

        Only what is trained is sent by the first one.
        """
        if n_processes() > 1:
            weights = digest_of(new.network_.blocks.values())
            check_same({"previous fits": self._is_warm(), "weights": weights})

    def _draw_seed(self):
        """Return the seed that the user determines, if any, and that of the fit."""
        requested = draw_seed(self.random_state)
        seed = fresh_seed() if requested is None else requested
        return broadcast((requested, seed))

    def _read(self, X, y, sample_weight, groups, X_val, y_val, sample_weight_val):
        """Return what was passed to `fit`; no image is decoded yet."""
        source = read_images_of(self, X, y, reset=True)
        targets = self._encode_targets(y, len(source))
        data = TrainingData(source, targets, sample_weight, groups)
        if X_val is None and y_val is None:
            if sample_weight_val is not None:
                raise ValueError("sample_weight_val is given without X_val and y_val.")
            return data
        if X_val is None or y_val is None:
            missing, given = ("X", "y") if X_val is None else ("y", "X")
            raise ValueError(f"{given}_val is given without {missing}_val.")
        if self.validation_fraction is not None:
            raise ValueError("validation_fraction and X_val exclude each other.")
        with naming_validation_images():
            source = read_images_of(self, X_val, y_val)
        targets = self._encode_more_targets(y_val, len(source))
        return data.followed_by(source, targets, sample_weight_val)

    @classmethod
    def _from_pipeline(cls, pipeline, parameters):
        """Return the estimator, and the linear model at the end of the pipeline."""
        transformer, scaler, model = parts_of_pipeline(pipeline)
        kind = "classifier" if issubclass(cls, ClassifierMixin) else "regressor"
        if get_tags(model).estimator_type != kind:
            raise ValueError(f"{type(model).__name__} is not a linear {kind}.")
        network = fitted_parameters(transformer)
        of_head = ("conv_channels", "hidden_units", "dropout")
        determined = sorted({*network, *of_head} & parameters.keys())
        if determined:
            raise ValueError(
                f"{', '.join(determined)}: determined by the pipeline and cannot be "
                "set."
            )
        shared = {name: getattr(transformer, name) for name in SHARED_PARAMETERS}
        linear = model
        if scaler is not None:
            linear = Pipeline([("scale", scaler), ("linear", model)])
        # A copy, since the pipeline may be fitted again.
        linear = FrozenEstimator(copy.deepcopy(linear))
        defaults = {"head_init": linear, "head_epochs": 0}
        made = cls(**{**network, **shared, **defaults, **parameters})
        copy_fitted_network(transformer, made)
        head = head_of_pipeline(
            transformer.pooling_, output_layout(transformer), scaler, model
        )
        if isinstance(made.backbone, Backbone):
            made.backbone_ = made.backbone
        made.head_ = head.double().eval().requires_grad_(False)
        made.stages_, made.history_, made.n_epochs_ = [], [], 0
        made.best_validation_score_ = None
        return made, model

    def to_transformer(self):
        """Convert the fine-tuned network up to `layer` to a transformer.

        Returns
        -------
        CNNFeatureTransformer
            Fitted transformer whose features are those of `transform`. Its `backbone`
            is a `Backbone` with the fine-tuned weights, so that clones, and another
            `fit`, give the same features.
        """
        check_is_fitted(self)
        return fitted_transformer(self)

    def transform(self, X):
        """Return the pooled features of the fine-tuned network.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n, n_features), float32
            Features, pooled as those of `CNNFeatureTransformer`.
        """
        check_is_fitted(self)
        return self._extract(X, self.pooling_)

    def get_params(self, deep=True):
        """Return the parameters.

        Parameters
        ----------
        deep : bool, default=True
            Ignored: some of torchvision's transforms have an unrelated `get_params`.

        Returns
        -------
        dict
            Parameter names and values.
        """
        return super().get_params(deep=False)

    def __sklearn_clone__(self):
        # `clone` would call `get_params` of a transform in `augment`. Not `copy.copy`,
        # which gives a copy that holds the fitted network.
        bare = type(self).__new__(type(self))
        bare.__dict__ = {**vars(self), "augment": None}
        cloned = super(FineTunedCNN, bare).__sklearn_clone__()
        cloned.augment = copy.deepcopy(self.augment)
        return cloned

    @contextmanager
    def _open_checkpoint(self, new, data, requested_seed):
        """Open the checkpoint of the fit, if any, inside the block."""
        if self.checkpoint is None:
            yield None
            return
        if rank() > 0:
            sent: Any = broadcast(None)
            yield SharedCheckpoint(*sent)
            return
        folder = fspath(self.checkpoint)
        check_folder(folder)  # before all images are hashed
        arrays = [*new._target_identity().values(), data.targets, data.sample_weight]
        arrays += [data.groups, data.validation_weight, data.n_validation]
        name = fingerprint(self, new, data.source, arrays, requested_seed)
        with open_checkpoint(folder, name) as checkpoint:
            broadcast((checkpoint.path, checkpoint.saved))
            yield checkpoint

    def _load_network(self, seed):
        """Set the attributes of the pretrained network up to `layer`."""
        self.backbone_, weights, self.preprocessing_ = resolve_network(
            self.backbone, self.weights, self.image_size, self.crop
        )
        size = self.preprocessing_.size
        layer = resolve_layer(self.backbone_, self.layer, size, self.pooling)
        self.layers_, self.pooling_ = [layer], self.pooling
        check_output(layer, output_layout(self), self.pooling)
        # Random weights without a `random_state` are never requested again.
        is_shared = self.random_state is not None
        self.network_ = load_prefix(
            self.backbone_, weights, seed, size, [layer.block], is_shared
        )
        device = resolve_device(self.device)
        self.precision_ = name_of_dtype(resolve_precision(self.precision, device))
        self.engine_ = resolve_engine(self.engine, device, self.network_.blocks)

    def _is_warm(self):
        """Return whether the fit starts from the result of the previous one."""
        return self.warm_start and hasattr(self, "head_")

    def _build_network(self, new, objective, seed):
        """Build the head, plan the stages, and split the network accordingly."""
        layout, size = output_layout(new), new.preprocessing_.size
        head = build_head(new, layout, objective.n_outputs, seed)
        if not isinstance(self.head_init, str):
            fitted = self.head_init.estimator
            new._check_head(fitted)
            head = linear_head(fitted, self.pooling, layout, head)
            objective.from_units(head)
        if self._is_warm():
            self._check_same_network(new, head)
            new.network_ = self.network_
            head = copy.deepcopy(self.head_)
            objective.from_units(head)
        head = head.float().requires_grad_(True)
        blocks, (layer,) = new.network_.blocks, new.layers_
        n_frozen = count_frozen(new.backbone_, blocks, layer, size, self.unfreeze)
        new.stages_ = plan_stages(new, len(blocks), n_frozen)
        n_frozen = min((stage.n_frozen for stage in new.stages_), default=len(blocks))
        if n_frozen < len(blocks):
            check_trainable(new.backbone_, size)
        groups = group_blocks(new.backbone_, blocks, layer, size)
        network = SplitNetwork(blocks, groups, n_frozen, head)
        is_from_scratch = self.weights is None and has_batch_norms([network.trainable])
        if is_from_scratch and n_processes() > 1:
            raise ValueError(
                "weights=None: batch-norms that are trained from scratch need whole "
                "batches, and in several processes each has a part of them. Fit in one "
                "process, or with pretrained weights."
            )
        if is_from_scratch and self.batch_size == 1:
            raise ValueError(
                "batch_size=1: batch-norms that are trained from scratch need at least "
                "2 images per step."
            )
        return network

    def _check_same_network(self, new, head):
        """Raise if a warm start would continue with another network."""
        previous, current = self._target_identity(), new._target_identity()
        compared = {
            **{name: (previous[name], current[name]) for name in current},
            "backbone": (self.backbone_, new.backbone_),
            "layer": (self.layers_[0].name, new.layers_[0].name),
            "preprocessing": (self.preprocessing_, new.preprocessing_),
            "head": (head_specs(self.head_), head_specs(head)),
        }
        for name, (previous, current) in compared.items():
            if previous != current:
                raise ValueError(
                    f"warm_start=True requires the same {name} as in the previous fit: "
                    f"{shorten(str(previous), 150)}, not {shorten(str(current), 150)}."
                )

    def _target_identity(self):
        """Return what must be the same in all fits of one head, by its name."""
        raise NotImplementedError

    def _fitted_attributes(self, network, objective):
        """Return the attributes as if the fit ended now."""
        prefix, head = network.finished()
        objective.to_units(head)
        kept = {
            name: value
            for name, value in vars(self).items()
            if name.endswith("_") or name in PRIVATE_ATTRIBUTES
        }
        history = list(self.history_)
        changed = {"network_": prefix, "head_": head, "history_": history}
        return {**kept, **changed, "n_epochs_": len(history)}

    @property
    def _pooling(self):
        """Pooling that runs with the network, as the first layer of the head."""
        return self.head_[0].pooling if isinstance(self.head_[0], Pool) else "flatten"

    def _run_head(self, rows):
        """Return the logits; in float64 they do not depend on the batch."""
        features = rows.double()
        if not isinstance(self.head_[0], Pool):
            features = features.reshape(len(rows), *output_layout(self).shape)
        with torch.inference_mode():
            return self.head_(features)

    def __getstate__(self):
        state = super().__getstate__()
        if "head_" in state:
            state["head_"] = head_state(self.head_)
            state["stages_"] = [asdict(stage) for stage in self.stages_]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)  # before anything else: it checks the format
        if "head_" in state:
            plain = vars(self)
            self.head_ = head_from_state(plain["head_"])
            self.stages_ = [Stage(**stage) for stage in plain["stages_"]]


@contextmanager
def naming_validation_images(data=None):
    """Let errors of the images of a validation set, or of all images, say so."""
    n_training = 0 if data is None else data.n_training
    try:
        yield
    except ImageError as error:
        if error.index < n_training:
            raise
        moved = error.moved_to(error.index - n_training)
        moved.add_note("It is an image of X_val.")
        raise moved from error.__cause__

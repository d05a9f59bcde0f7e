"""``FineTunedCNNClassifier``: two-stage fine-tuning of a pretrained network."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from numbers import Integral, Real
from os import PathLike, fspath

import torch
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skltl._estimator import INPUT_ATTRIBUTES, ImageEstimator, read_images_of
from skltl._parameters import (
    name_of_dtype,
    resolve_device,
    resolve_precision,
    resolve_threads,
)
from skltl._random import draw_seed, fresh_seed
from skltl._sklearn import AT_LEAST_ONE, Interval, StrOptions, fit_context
from skltl.exceptions import shorten
from skltl.features import (
    SHARED_PARAMETERS,
    FeatureEstimator,
    NetworkClassifier,
    check_output,
    copy_fitted_network,
    extract_features,
    extraction_config,
    fitted_parameters,
    fitted_transformer,
    output_layout,
)
from skltl.finetuning._checkpoint import check_folder, fingerprint, open_checkpoint
from skltl.finetuning._conversion import (
    head_of_pipeline,
    linear_head,
    parts_of_pipeline,
)
from skltl.finetuning._data import (
    build_inputs,
    encode_labels,
    example_weights,
    split_examples,
)
from skltl.finetuning._network import (
    Pool,
    SplitNetwork,
    build_head,
    check_trainable,
    check_widths,
    count_frozen,
    group_blocks,
    has_batch_norms,
    head_from_state,
    head_specs,
    head_state,
)
from skltl.finetuning._training import (
    OPTIMIZERS,
    CallbackSupportMixin,
    Stage,
    begin_fit,
    plan_stages,
    train_network,
    training_context,
)
from skltl.inference import POOLINGS, load_prefix, resolve_engine
from skltl.networks import Backbone, resolve_layer, resolve_network


class FineTunedCNNClassifier(CallbackSupportMixin, FeatureEstimator, NetworkClassifier):
    """Fine-tune a pretrained network in two stages.

    First a new head is trained on the frozen network, then all of the network, or its
    last blocks, are trained with it. The activations of frozen blocks are computed once
    and stored, so that the cost of an epoch depends on the trained layers only.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: a name of :func:`~skltl.list_backbones`, such as ``"vgg16"`` or
        ``"timm:vit_small_patch16_dinov3.lvd1689m"``, or a `Backbone`.
    weights : str, path or None, default="pretrained"
        Pretrained weights, as for `CNNFeatureTransformer`. ``None`` (random weights)
        with ``unfreeze="all"`` and ``head_epochs=0`` is training from scratch.
    layer : str or int, default="last"
        Layer at which the network is truncated and the head is attached, as for
        `CNNFeatureTransformer`.
    pooling : str or int, default="avg"
        Pooling of the last feature map, as for `CNNFeatureTransformer`.
    conv_channels : tuple of int, default=()
        Numbers of channels of 3 x 3 convolutions in the head, before the pooling.
    hidden_units : tuple of int, default=()
        Numbers of units of hidden layers in the head, after the pooling.
    dropout : float, default=0.0
        Dropout probability in the head, in [0, 1).
    unfreeze : str, int or None, default="all"
        Layers of the backbone that are trained in the second stage: ``"all"``; an int
        for this many of the last groups of blocks, which end in main layers; a layer's
        name for this one and all after it; ``"batch_norm"`` for the weights and biases
        of batch-norms; ``None`` for no layer.
    head_epochs : int, default=25
        Number of epochs of the first stage.
    finetune_epochs : int, default=10
        Number of epochs of the second stage.
    head_init : {"probe", "random"} or FrozenEstimator, default="probe"
        Initial weights of the head. ``"probe"`` initializes a head with a single linear
        layer with scikit-learn's logistic regression on the frozen features [1]_.
        ``FrozenEstimator(classifier)`` holds a fitted linear classifier, or a fitted
        pipeline of a ``StandardScaler`` and a linear classifier.
    head_lr : float or "auto", default="auto"
        Peak learning rate of the head; ``"auto"`` is 0.01 for SGD, 0.001 for AdamW.
    backbone_lr : float or "auto", default="auto"
        Peak learning rate of the backbone; ``"auto"`` is 0.01 for SGD, which suits a
        head that was initialized with a probe [1]_, and 0.0001 for AdamW.
    backbone_lr_decay : float, default=1.0
        Factor by which the learning rate decreases from each group of blocks to the one
        before it, in (0, 1].
    optimizer : {"auto", "sgd", "adamw"}, default="auto"
        Optimizer. SGD has a Nesterov momentum of 0.9, which ``schedule="one_cycle"``
        varies from 0.95 to 0.85 and back, inversely to the learning rate. ``"auto"`` is
        AdamW for networks with layer normalization (transformers, ConvNeXt) and for
        EfficientNet v2, else SGD.
    weight_decay : float, default=0.0001
        Weight decay of matrices and kernels. Biases, parameters of norms, tokens and
        position embeddings have none.
    schedule : {"one_cycle", "cosine", "constant"}, default="one_cycle"
        Learning rate schedule of each stage.
    augment : callable, default=None
        Data augmentation, such as a ``torchvision.transforms.v2`` transform: a function
        from an input image of the network, a tensor (c, h, w) before normalization, to
        a tensor of the same shape. Torch's generator is seeded for each call.
    n_views : int or None, default=8
        Number of augmented views of each image. Frozen blocks run on each of them once.
        ``None`` draws a new view each time: frozen blocks run in every epoch.
    label_smoothing : float, default=0.0
        Label smoothing, in [0, 1).
    class_weight : dict or "balanced", default=None
        Weights of the classes in the loss, as in scikit-learn.
    validation_fraction : float, default=None
        Fraction of the images of each class that are held out for validation after each
        epoch. ``None`` holds out none, or a tenth with `early_stopping`.
    early_stopping : bool, default=False
        Whether a stage ends when the validation score has not increased for `patience`
        epochs, and the weights of its best epoch are kept.
    patience : int, default=5
        Number of epochs without a higher validation score before a stage ends.
    image_size : int or tuple of 2 ints, default=None
        Height and width in pixels of the network's input, in [1, 10000]; an int is
        both. ``None`` is the size that the network was trained on.
    crop : {"center", "squash", "pad"} or None, default=None
        Treatment of images of other proportions than the input: ``"center"`` fills it
        and loses the ends of the longer side, ``"squash"`` changes the proportions, and
        ``"pad"`` adds a border, so that nothing is lost. ``None`` is the treatment that
        the network was trained with.
    image_shape : tuple of 2 or 3 ints, default=None
        If given, ``X`` is an array of shape (n, d), and each row is an image of this
        shape, in the terms of ``numpy.reshape``: ``(8, 8)``, ``(32, 32, 3)``, ``(1,
        -1)``.
    batch_size : int, default=32
        Number of images per step.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``. ``"auto"`` uses a GPU if there
        is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Data type of matrix products and convolutions; ``"auto"`` is bfloat16 where the
        device supports it natively. Parameters are float32.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        See `CNNFeatureTransformer`.
    decode : {"exact", "fast"}, default="exact"
        See `CNNFeatureTransformer`.
    reader : callable, default=None
        Function from an item of ``X`` to an image of any kind that ``X`` may hold, for
        items or files that skltl cannot read itself. It is called in several threads,
        and must be picklable; see :ref:`the user guide <readers>`.
    value_range : tuple of 2 floats, default=None
        Values of black and white in images that do not have 8 bits per channel, such
        as ``(0, 4095)`` for 12 bits. Values beyond are clipped. ``None`` is 0 to 65535
        for 16-bit integers, and [0, 1] for floats.
    cache : bool, str or path, default=None
        Folder for the activations of frozen blocks, as for `CNNFeatureTransformer`.
    checkpoint : str or path, default=None
        Folder in which the state is saved after each epoch, and deleted at the end.
        After an interruption, the same call resumes there and gives the same result; a
        call with other images, labels, parameters or versions starts over, and so does
        one whose `random_state` is a ``RandomState``, which has changed meanwhile. If
        the state cannot be saved, there is a warning and training goes on.
    warm_start : bool, default=False
        Whether `fit` starts from the result of the previous `fit`, with the same
        classes and layers.
    n_jobs : int, default=None
        Number of decoding threads. ``None`` is torch's number of threads, -1 the number
        of cores.
    random_state : int, RandomState instance or None, default=None
        Controls random weights, the initialization of the head, shuffling,
        augmentation, the validation split and dropout.
    verbose : int, default=0
        Verbosity level. If positive, a progress bar is shown.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        Sorted class labels.
    backbone_ : Backbone
        Specification of the backbone.
    network_ : FrozenPrefix
        Fine-tuned network up to `layer`.
    head_ : Module
        Head.
    layers_ : list of ResolvedLayer
        One element: the layer at which the head is attached.
    preprocessing_ : Preprocessing
        Preprocessing of the images.
    pooling_ : str or int
        Pooling of the last feature map.
    precision_ : {"float32", "bfloat16"}
        Data type of products. Where bfloat16 is not native, an estimator that was
        fitted in bfloat16 computes in float32, with a warning.
    engine_ : {"torch", "compile", "openvino"}
        Engine that ran the frozen blocks in `fit`; used wherever it is available.
    stages_ : list of Stage
        Name, number of epochs, number of frozen blocks and peak learning rates of each
        stage.
    history_ : list of dict
        For each epoch a dictionary of stage, epoch, loss, score, learning rates and
        seconds; if images are held out, also of validation loss and validation score.
    n_epochs_ : int
        Total number of epochs.
    best_validation_score_ : float or None
        Validation accuracy of the weights that early stopping kept.

    See Also
    --------
    CNNFeatureTransformer : Features of the frozen network, for any classifier.

    References
    ----------
    .. [1] Kumar, Raghunathan, Jones, Ma, Liang, "Fine-tuning can distort pretrained
       features and underperform out-of-distribution", ICLR, 2022.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import FineTunedCNNClassifier
    >>> digits = load_digits()
    >>> classifier = FineTunedCNNClassifier(
    ...     "tiny", unfreeze=1, image_shape=(8, 8), image_size=32, random_state=0
    ... )
    >>> classifier.fit(digits.data[:100] / 16, digits.target[:100]).n_epochs_
    35
    """

    __module__ = "skltl"  # the path in saved files

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
        "augment": [callable, None],
        "n_views": [AT_LEAST_ONE, None],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither"), None],
        "early_stopping": ["boolean"],
        "patience": [AT_LEAST_ONE],
        "batch_size": [AT_LEAST_ONE],
        "cache": ["boolean", str, PathLike, None],
        "checkpoint": [str, PathLike, None],
        "warm_start": ["boolean"],
    }

    def __init__(
        self,
        backbone="resnet50",
        *,
        weights="pretrained",
        layer="last",
        pooling="avg",
        conv_channels=(),
        hidden_units=(),
        dropout=0.0,
        unfreeze="all",
        head_epochs=25,
        finetune_epochs=10,
        head_init="probe",
        head_lr="auto",
        backbone_lr="auto",
        backbone_lr_decay=1.0,
        optimizer="auto",
        weight_decay=1e-4,
        schedule="one_cycle",
        augment=None,
        n_views=8,
        label_smoothing=0.0,
        class_weight=None,
        validation_fraction=None,
        early_stopping=False,
        patience=5,
        image_size=None,
        crop=None,
        image_shape=None,
        batch_size=32,
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
        reader=None,
        value_range=None,
        cache=None,
        checkpoint=None,
        warm_start=False,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.conv_channels = conv_channels
        self.hidden_units = hidden_units
        self.dropout = dropout
        self.unfreeze = unfreeze
        self.head_epochs = head_epochs
        self.finetune_epochs = finetune_epochs
        self.head_init = head_init
        self.head_lr = head_lr
        self.backbone_lr = backbone_lr
        self.backbone_lr_decay = backbone_lr_decay
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.augment = augment
        self.n_views = n_views
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.patience = patience
        self.image_size = image_size
        self.crop = crop
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.reader = reader
        self.value_range = value_range
        self.cache = cache
        self.checkpoint = checkpoint
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y, sample_weight=None, groups=None):
        """Train the head, then the unfrozen layers with it.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` supports.
        y : array of shape (n,)
            Class labels, of any type that can be sorted.
        sample_weight : array of shape (n,), default=None
            Weights of the images in the loss.
        groups : array of shape (n,), default=None
            Groups of images, such as patients, that are held out as a whole.

        Returns
        -------
        FineTunedCNNClassifier
            Fitted classifier.

        Raises
        ------
        UnknownBackboneError, UnknownLayerError, WeightsError
            If `backbone`, `layer` or `weights` do not exist.
        ImageReadError
            If an image cannot be read.
        TrainingError
            If the loss becomes infinite or NaN.
        """
        check_widths("conv_channels", self.conv_channels)
        check_widths("hidden_units", self.hidden_units)
        # A fit that fails leaves `self` unchanged. Meanwhile, `self` holds the previous
        # fit, and the context of scikit-learn's callbacks.
        new = type(self)(**self.get_params())
        source = read_images_of(new, X, y, reset=True)
        new.classes_, targets = encode_labels(y, len(source))
        labels, class_weight = new.classes_[targets], self.class_weight
        weights = example_weights(sample_weight, class_weight, new.classes_, targets)
        with training_context(resolve_device(self.device)):
            arrays = (labels, sample_weight, groups)
            requested_seed = draw_seed(self.random_state)
            seed = fresh_seed() if requested_seed is None else requested_seed
            split_examples(new, targets, weights, groups, seed)  # before it takes long
            new._load_network(seed)
            with self._open_checkpoint(
                new, source, arrays, requested_seed
            ) as checkpoint:
                if checkpoint is not None and checkpoint.saved is not None:
                    seed = checkpoint.saved["seed"]
                    new._load_network(seed)
                examples = split_examples(new, targets, weights, groups, seed)
                network = self._build_network(new, seed)
                new.history_, new.best_validation_score_ = [], None
                metadata = {"sample_weight": sample_weight, "groups": groups}
                fitted = partial(new._fitted_attributes, network)
                task = begin_fit(self, X, y, metadata, len(new.stages_), fitted)
                inputs = build_inputs(new, source, network, seed)
                is_new_head = isinstance(self.head_init, str) and not self._is_warm()
                new.best_validation_score_ = train_network(
                    new, network, inputs, examples, seed, is_new_head, checkpoint, task
                )
        attributes = fitted()
        task.end()
        kept = vars(self).keys() - set(INPUT_ATTRIBUTES)  # those are of an earlier fit
        # Replaced at once, for threads that predict meanwhile.
        self.__dict__ = {name: getattr(self, name) for name in kept} | attributes
        return self

    @classmethod
    def from_pipeline(cls, pipeline, **parameters):
        """Convert a pipeline of frozen features and a linear classifier.

        The classifier predicts what the pipeline predicts; probabilities are the
        softmax of its decisions. `fit`, also of clones, starts from this head
        (`head_init`) with the second stage (``head_epochs=0``).

        Parameters
        ----------
        pipeline : Pipeline
            Fitted pipeline of a `CNNFeatureTransformer` with a single layer, optionally
            a ``StandardScaler``, and a linear classifier.
        **parameters
            Further parameters of the classifier, such as `unfreeze`.

        Returns
        -------
        FineTunedCNNClassifier
            Fitted classifier.

        Raises
        ------
        ValueError
            If the pipeline has other steps, or determines one of the parameters.
        """
        transformer, scaler, classifier = parts_of_pipeline(pipeline)
        network = fitted_parameters(transformer)
        of_head = ("conv_channels", "hidden_units", "dropout")
        determined = sorted({*network, *of_head} & parameters.keys())
        if determined:
            raise ValueError(
                f"{', '.join(determined)}: determined by the pipeline and cannot be "
                "set."
            )
        shared = {name: getattr(transformer, name) for name in SHARED_PARAMETERS}
        linear = classifier
        if scaler is not None:
            linear = Pipeline([("scale", scaler), ("linear", classifier)])
        # A copy, since the pipeline may be fitted again.
        linear = FrozenEstimator(copy.deepcopy(linear))
        defaults = {"head_init": linear, "head_epochs": 0}
        made = cls(**{**network, **shared, **defaults, **parameters})
        copy_fitted_network(transformer, made)
        head = head_of_pipeline(
            transformer.pooling_, output_layout(transformer), scaler, classifier
        )
        if isinstance(made.backbone, Backbone):
            made.backbone_ = made.backbone
        made.classes_ = classifier.classes_
        made.head_ = head.double().eval().requires_grad_(False)
        made.stages_, made.history_, made.n_epochs_ = [], [], 0
        made.best_validation_score_ = None
        return made

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
        source = read_images_of(self, X)
        block = self.layers_[0].block
        config = extraction_config(
            self,
            self.backbone_,
            self.network_,
            (block,),
            self.preprocessing_,
            self.pooling_,
        )
        threads, verbose = resolve_threads(self.n_jobs), bool(self.verbose)
        return extract_features(source, config, [block], threads, verbose)

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
        cloned = super(FineTunedCNNClassifier, bare).__sklearn_clone__()
        cloned.augment = copy.deepcopy(self.augment)
        return cloned

    def _open_checkpoint(self, new, source, arrays, requested_seed):
        """Return the checkpoint of the fit, or a context without one."""
        if self.checkpoint is None:
            return nullcontext()
        folder = fspath(self.checkpoint)
        check_folder(folder)  # before all images are hashed
        name = fingerprint(self, new, source, arrays, requested_seed)
        return open_checkpoint(folder, name)

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

    def _build_network(self, new, seed):
        """Build the head, plan the stages, and split the network accordingly."""
        layout, size = output_layout(new), new.preprocessing_.size
        head = build_head(new, layout, len(new.classes_), seed)
        if not isinstance(self.head_init, str):
            fitted = self.head_init.estimator
            head = linear_head(fitted, self.pooling, layout, head, new.classes_)
        if self._is_warm():
            self._check_same_network(new, head)
            new.network_ = self.network_
            head = copy.deepcopy(self.head_).float().requires_grad_(True)
        blocks, (layer,) = new.network_.blocks, new.layers_
        n_frozen = count_frozen(new.backbone_, blocks, layer, size, self.unfreeze)
        new.stages_ = plan_stages(new, len(blocks), n_frozen)
        n_frozen = min((stage.n_frozen for stage in new.stages_), default=len(blocks))
        if n_frozen < len(blocks):
            check_trainable(new.backbone_, size)
        groups = group_blocks(new.backbone_, blocks, layer, size)
        network = SplitNetwork(blocks, groups, n_frozen, head)
        is_from_scratch = self.weights is None and has_batch_norms([network.trainable])
        if is_from_scratch and self.batch_size == 1:
            raise ValueError(
                "batch_size=1: batch-norms that are trained from scratch need at least "
                "2 images per step."
            )
        return network

    def _check_same_network(self, new, head):
        """Raise if a warm start would continue with another network."""
        compared = {
            "classes": (self.classes_.tolist(), new.classes_.tolist()),
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

    def _fitted_attributes(self, network):
        """Return the attributes as if the fit ended now."""
        prefix, head = network.finished()
        kept = {
            name: value
            for name, value in vars(self).items()
            if name.endswith("_") or name == "_fitted_image_shape"
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

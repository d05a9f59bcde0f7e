"""``FineTunedCNNClassifier``: two-stage fine-tuning of a pretrained ConvNet."""

from __future__ import annotations

import copy
from numbers import Integral, Real
from os import PathLike

from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from skltl._parameters import DTYPES
from skltl._sklearn import IMAGE_SIZES, Interval, StrOptions, fit_context
from skltl.finetuning._conversion import check_free, head_of_pipeline, parts_of_pipeline
from skltl.finetuning._fitting import RATES, run_fit
from skltl.finetuning._network_classifier import (
    FITTED_BY_BOTH,
    SHARED_PARAMETERS,
    TunedNetwork,
)
from skltl.finetuning._stages import CallbackSupportMixin
from skltl.inference import ENGINES, POOLINGS
from skltl.networks import Backbone


class FineTunedCNNClassifier(CallbackSupportMixin, TunedNetwork):
    """Fine-tune a pretrained ConvNet in two stages.

    First new layers are put on the frozen network and trained alone; then all of the
    network, or its last blocks, are trained with them. What frozen blocks give for an
    image is computed once, so an epoch costs only what learns.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: any of :func:`~skltl.list_backbones`, or a record of your own.
    weights : str, path or None, default="imagenet"
        As for `CNNFeatureTransformer`. ``None`` (random weights) with
        ``unfreeze="all"`` and ``head_epochs=0`` is training from scratch.
    layer : str or int, default="last"
        Where the network is cut and the new layers begin.
    pooling : {"avg", "max", "avgmax", "flatten"} or int, default="avg"
        How the last feature map becomes features.
    conv_channels : tuple of int, default=()
        New 3 x 3 convolutions before the pooling: how many channels each has.
    hidden_units : tuple of int, default=()
        New fully connected layers after the pooling: how many units each has.
    dropout : float, default=0.0
        Share of the units, or features, that are left out in a step, in [0, 1).
    unfreeze : str, int or None, default="all"
        What of the pretrained network learns in the second stage: ``"all"``; the last
        so many of the parts between main cut points; the part of this name and all
        after it; the weights and biases of batch-norms (``"batch_norm"``); or nothing
        (``None``).
    head_epochs : int, default=25
        Passes over the images in the first stage.
    finetune_epochs : int, default=10
        Passes over the images in the second stage.
    head_init : {"probe", "random"} or FrozenEstimator, default="probe"
        A head that is one linear layer may begin as scikit-learn's logistic regression
        on the frozen features [1]_, as random, or as a linear classifier that is fitted
        already: ``FrozenEstimator(classifier)``, also of a pipeline of a
        ``StandardScaler`` and a classifier.
    head_lr : float or "auto", default="auto"
        Highest rate of the new layers: 0.01 with SGD, 0.001 with AdamW.
    backbone_lr : float or "auto", default="auto"
        Highest rate of the pretrained layers: 0.01 with SGD, where head and network
        start from where they should be [1]_; 0.0001 with AdamW.
    backbone_lr_decay : float, default=1.0
        By which factor the rate falls from each part between main cut points to the one
        before it, towards the image; in (0, 1].
    optimizer : {"auto", "sgd", "adamw"}, default="auto"
        SGD has Nesterov momentum: of 0.9, but with ``schedule="one_cycle"`` it falls
        from 0.95 to 0.85 and rises again, against the rate. ``"auto"`` is AdamW for
        ConvNeXt and EfficientNet v2, else SGD.
    weight_decay : float, default=0.0001
        Of weights, not of biases and batch-norms.
    schedule : {"one_cycle", "cosine", "constant"}, default="one_cycle"
        How the rates change over a stage.
    augment : callable, default=None
        Makes a random variant of an image, such as a ``torchvision.transforms.v2``
        transform: from a tensor (3, h, w) of what the network sees, before it is
        normalised, to one of the same shape. It draws from torch's generator, which is
        seeded for each variant.
    n_views : int or None, default=8
        How many variants of each image there are with `augment`: frozen blocks run on
        each of them once. ``None`` makes a new one whenever an image is seen, and the
        frozen blocks run in every epoch.
    label_smoothing : float, default=0.0
        Share of each label that is spread over all classes, in [0, 1).
    class_weight : dict or "balanced", default=None
        Weights of the classes in the loss, as in scikit-learn.
    validation_fraction : float, default=None
        Share of the images of each class that are held out, to look after each epoch
        how well they are told apart; ``None`` is none of them, or a tenth with
        `early_stopping`. Groups, if `fit` gets them, are held out as a whole.
    early_stopping : bool, default=False
        Whether a stage ends when the score on the images held out has not risen for
        `patience` epochs. The numbers of its best epoch are kept.
    patience : int, default=5
        How many epochs.
    image_size : int, default=None
        Height and width in pixels of what the network sees; ``None`` is the size it was
        trained on.
    image_shape : tuple of 2 or 3 ints, default=None
        If given, ``X`` is an array (n, d), and each row is an image of this shape.
    batch_size : int, default=32
        Images in a step.
    device : str, default="auto"
        As for `CNNFeatureTransformer`.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        What products are computed in; parameters stay float32.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        As for `CNNFeatureTransformer`.
    decode : {"exact", "fast"}, default="exact"
        As for `CNNFeatureTransformer`.
    cache : bool, str or path, default=None
        Where to keep what frozen blocks give, as for `CNNFeatureTransformer`.
    checkpoint : str or path, default=None
        A folder in which the state is kept after each epoch. After an interruption, the
        same call goes on where it was, and ends with the same bits. Another call does
        not: other images, labels, parameters or versions. The file is deleted at the
        end. If it cannot be written, a warning tells so and the fit goes on.
    warm_start : bool, default=False
        Whether `fit` begins with what the fit before has learned, of the same classes.
    n_jobs : int, default=None
        Threads that decode images.
    random_state : int, RandomState instance or None, default=None
        Of everything random: new layers, order of the images, dropout.
    verbose : int, default=0
        Whether progress bars are shown. From scikit-learn 1.9 on, its callbacks are
        understood, too: ``set_callbacks(ProgressBar())``.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        The labels.
    backbone_ : Backbone
        The record of the network.
    network_ : FrozenPrefix
        The tuned network up to the cut.
    head_ : Module
        The new layers.
    cut_points_ : list of CutPoint
        The only one: where the new layers begin.
    preprocessing_ : Preprocessing
        What images go through before the network.
    pooling_ : {"avg", "max", "avgmax", "flatten"} or int
        How the feature map at the cut becomes features.
    precision_ : {"float32", "bfloat16"}
        What products are computed in. An estimator that was fitted in bfloat16 computes
        in float32, with a warning, where bfloat16 is not native.
    engine_ : {"torch", "compile", "openvino"}
        What ran the frozen blocks where this was fitted, and runs them where it can.
    stages_ : list of Stage
        What learned in each stage, and at which rate.
    history_ : list of dict
        One plain record for each epoch: stage, epoch, loss, score, rates, seconds.
    n_epochs_ : int
        Epochs in all.
    best_validation_score_ : float or None
        With `early_stopping`, the accuracy on the images held out of the epoch that was
        kept, which is that of this classifier.

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

    _parameter_constraints: dict = {
        "backbone": [str, Backbone],
        "weights": [str, PathLike, None],
        "layer": [str, Integral],
        "pooling": [
            StrOptions(set(POOLINGS)),
            Interval(Integral, 1, None, closed="left"),
        ],
        "conv_channels": [tuple, list],
        "hidden_units": [tuple, list],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "unfreeze": [str, Interval(Integral, 1, None, closed="left"), None],
        "head_epochs": [Interval(Integral, 0, None, closed="left")],
        "finetune_epochs": [Interval(Integral, 0, None, closed="left")],
        "head_init": [StrOptions({"probe", "random"}), FrozenEstimator],
        "head_lr": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "backbone_lr": [
            Interval(Real, 0, None, closed="neither"),
            StrOptions({"auto"}),
        ],
        "backbone_lr_decay": [Interval(Real, 0, 1, closed="right")],
        "optimizer": [StrOptions({"auto", *RATES})],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "schedule": [StrOptions({"one_cycle", "cosine", "constant"})],
        "augment": [callable, None],
        "n_views": [Interval(Integral, 1, None, closed="left"), None],
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither"), None],
        "early_stopping": ["boolean"],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "image_size": [IMAGE_SIZES, None],
        "image_shape": [tuple, list, None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "device": [str],
        "precision": [StrOptions({"auto", *DTYPES})],
        "engine": [StrOptions({"auto", *ENGINES})],
        "decode": [StrOptions({"exact", "fast"})],
        "cache": ["boolean", str, PathLike, None],
        "checkpoint": [str, PathLike, None],
        "warm_start": ["boolean"],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone="resnet50",
        *,
        weights="imagenet",
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
        image_shape=None,
        batch_size=32,
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
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
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.cache = cache
        self.checkpoint = checkpoint
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y, sample_weight=None, groups=None):
        """Train the new layers, then the blocks that are to learn.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `CNNFeatureTransformer` takes.
        y : array of shape (n,)
            What they show: labels of any type that can be sorted.
        sample_weight : array of shape (n,), default=None
            Weights of the images in the loss.
        groups : array of shape (n,), default=None
            Which images belong together (of one plant, one patient): all or none of
            them are held out.

        Returns
        -------
        FineTunedCNNClassifier
            The classifier itself.

        Raises
        ------
        UnknownBackboneError, UnknownLayerError, WeightsError
            If `backbone`, `layer` or `weights` name something that is not there.
        ImageReadError
            For the first image that cannot be read.
        TrainingError
            If the loss becomes infinite or NaN.
        """
        fit = run_fit(self, X, y, sample_weight, groups)
        # Only now does anything change: a fit that fails leaves the one before.
        self._read_images(X, reset=True)
        self.__dict__.update(fit.attributes())
        fit.progress.end()
        return self

    @classmethod
    def from_pipeline(cls, pipeline, **parameters):
        """Make a classifier from frozen features and a linear classifier.

        It predicts what the pipeline does; probabilities are the softmax of the same
        decisions. Its `fit`, and that of its clones, begins there (`head_init`), with
        the second stage: ``head_epochs=0``.

        Parameters
        ----------
        pipeline : Pipeline
            Fitted: a `CNNFeatureTransformer` with one cut point, a ``StandardScaler``
            or none, and a linear classifier.
        **parameters
            Further parameters of the classifier, such as `unfreeze`.

        Returns
        -------
        FineTunedCNNClassifier
            Fitted.

        Raises
        ------
        ValueError
            If the pipeline is made of something else, or a parameter says otherwise.
        """
        transformer, scaler, classifier = parts_of_pipeline(pipeline)
        check_free(parameters)
        shared = {
            name: value
            for name, value in transformer.get_params(deep=False).items()
            if name in SHARED_PARAMETERS
        }
        shared |= transformer._fitted_parameters()
        linear = classifier
        if scaler is not None:
            linear = Pipeline([("scale", scaler), ("linear", classifier)])
        # A copy: the user's pipeline may be fitted again.
        linear = FrozenEstimator(copy.deepcopy(linear))
        begin = {"head_init": linear, "head_epochs": 0}
        made = cls(**{**shared, **begin, **parameters})
        head = head_of_pipeline(transformer.pooling_, scaler, classifier)
        for name in FITTED_BY_BOTH:
            if hasattr(transformer, name):
                setattr(made, name, getattr(transformer, name))
        if isinstance(made.backbone, Backbone):
            made.backbone_ = made.backbone
        made._fitted_image_shape = transformer._fitted_image_shape
        made.classes_ = classifier.classes_
        made.head_ = head.double().eval().requires_grad_(False)
        made.stages_, made.history_, made.n_epochs_ = [], [], 0
        made.best_validation_score_ = None
        return made

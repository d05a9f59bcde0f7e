"""``FineTunedCNNClassifier``: two-stage fine-tuning of a network that classifies."""

from __future__ import annotations

from numbers import Real

import numpy as np
from sklearn.utils import check_consistent_length

from skltl._sklearn import Interval, StrOptions, fit_context
from skltl._targets import is_multilabel, is_multilabel_classifier
from skltl.exceptions import shorten
from skltl.features import NetworkClassifier
from skltl.finetuning._conversion import check_same_classes
from skltl.finetuning._data import (
    columns_of,
    encode_indicators,
    encode_labels,
    example_weights,
)
from skltl.finetuning._distributed import fitted_together
from skltl.finetuning._estimator import FineTunedCNN
from skltl.finetuning._objective import BinaryCrossEntropy, CrossEntropy


class FineTunedCNNClassifier(FineTunedCNN, NetworkClassifier):
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
        layer with scikit-learn's logistic regression (ridge regression for values) on
        the frozen features [1]_. ``FrozenEstimator(model)`` holds a fitted linear
        model, or a fitted pipeline of a ``StandardScaler`` and a linear model.
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
        position embeddings have none. For multilabel targets and values, a head of one
        layer has at least that of the probe.
    schedule : {"one_cycle", "cosine", "constant"}, default="one_cycle"
        Learning rate schedule of each stage.
    augment : "auto", callable or None, default=None
        Data augmentation. ``"auto"`` crops to at least half of the area, mirrors half
        of the views, and varies brightness, contrast and saturation by 20 %; do not use
        it for targets that change with these. A function, such as a
        ``torchvision.transforms.v2`` transform, is called with an input image of the
        network, a tensor (c, h, w) before normalization, and returns a tensor of the
        same shape; torch's generator is seeded for each call.
    n_views : int or None, default=8
        Number of augmented views of each image, if there is an `augment`. Frozen blocks
        run on each of them once. ``None`` draws a new view each time: frozen blocks run
        in every epoch.
    label_smoothing : float, default=0.0
        Label smoothing, in [0, 1).
    class_weight : dict or "balanced", default=None
        Weights of the classes, as in scikit-learn: in the loss, and in the loss and
        score of images that are held out, but not of a validation set.
    validation_fraction : float, default=None
        Fraction of the images, stratified by class if each has one, that are held out
        for validation after each epoch. ``None`` holds out none, or a tenth with
        `early_stopping`.
    early_stopping : bool, default=False
        Whether a stage ends when the validation images have not been predicted better
        for `patience` epochs, and the weights of its best epoch are kept, or those
        before the stage if no epoch is better.
    monitor : {"score", "loss"}, default="score"
        Criterion of `early_stopping`: the validation score and, if it is equal, the
        loss; or the loss alone, which differs even where few images are held out.
    patience : int, default=5
        Number of epochs without a better one before a stage ends.
    keep_on_interrupt : bool, default=False
        Whether an interruption (``KeyboardInterrupt``, Ctrl-C) ends training after the
        first epoch with a warning, and keeps the weights of the last complete epoch, or
        with `early_stopping` of the best one. Otherwise the previous fit is kept. In a
        search, an interruption then ends one fit only.
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
        Number of images per step, of all processes under ``torchrun`` together.
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
        call with other images, targets, parameters or versions starts over, and so does
        one whose `random_state` is a ``RandomState``, which has changed meanwhile. If
        the state cannot be saved, there is a warning and training goes on.
    warm_start : bool, default=False
        Whether `fit` starts from the result of the previous `fit`, with the same
        classes or number of outputs, and the same layers.
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
        Sorted class labels, or the columns of an indicator matrix.
    multilabel_ : bool
        Whether the targets are an indicator matrix of labels.
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
    n_features_in_ : int
        Number of features seen during `fit`. Only with `image_shape`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during `fit`. Defined only when ``X`` has feature
        names that are all strings. Only with `image_shape`.

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
        **FineTunedCNN._parameter_constraints,
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
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
        monitor="score",
        patience=5,
        keep_on_interrupt=False,
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
        self.monitor = monitor
        self.patience = patience
        self.keep_on_interrupt = keep_on_interrupt
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

    @fitted_together
    @fit_context
    def fit(
        self,
        X,
        y,
        sample_weight=None,
        groups=None,
        *,
        X_val=None,
        y_val=None,
        sample_weight_val=None,
    ):
        """Train the head, then the unfrozen layers with it.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` supports.
        y : array of shape (n,), or indicator matrix of shape (n, n_labels)
            Class labels, of any type that can be sorted; or, for multilabel targets, a
            column of 0 and 1 for each label.
        sample_weight : array of shape (n,), default=None
            Weights of the images in the loss. Images of weight 0 are left out.
        groups : array of shape (n,), default=None
            Groups of images, such as patients, that are held out as a whole; not used
            with a validation set.
        X_val : sequence of m images, or array of shape (m, d) with `image_shape`
            Images of a validation set, in place of images that are held out.
        y_val : array of shape (m,), or indicator matrix of shape (m, n_labels)
            Their labels.
        sample_weight_val : array of shape (m,), default=None
            Their weights in the validation score and loss.

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
        validation = X_val, y_val, sample_weight_val
        return self._fit(X, y, sample_weight, groups, validation)

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
        made, classifier = cls._from_pipeline(pipeline, parameters)
        made.classes_ = classifier.classes_
        made.multilabel_ = is_multilabel_classifier(classifier)
        return made

    def _encode_targets(self, y, n_images):
        self.multilabel_ = is_multilabel(y)
        if self.multilabel_:
            indicators = encode_indicators(y, n_images)
            self.classes_ = np.arange(indicators.shape[1])
            return indicators
        self.classes_, targets = encode_labels(y, n_images)
        return targets

    def _encode_more_targets(self, y, n_images):
        if not self.multilabel_:
            try:
                targets = columns_of(self.classes_, y)
            except (TypeError, ValueError) as error:
                raise ValueError(f"y_val: {error}") from error
            check_consistent_length(range(n_images), targets)
            return targets
        indicators = encode_indicators(y, n_images) if is_multilabel(y) else None
        if indicators is None or indicators.shape[1] != len(self.classes_):
            raise ValueError(
                f"y_val must be an indicator matrix of {len(self.classes_)} labels, as "
                f"y is; got {shorten(repr(y))}."
            )
        return indicators

    def _image_weights(self, sample_weight, targets):
        if not self.multilabel_:
            return example_weights(
                sample_weight, targets, self.class_weight, self.classes_
            )
        if isinstance(self.class_weight, dict):
            raise ValueError(
                "class_weight: a dict has weights of classes, and the targets are "
                "multilabel. Use 'balanced', or sample_weight."
            )
        return example_weights(sample_weight, targets)

    def _objective(self, examples):
        smoothing = self.label_smoothing
        if not self.multilabel_:
            return CrossEntropy(len(self.classes_), smoothing)
        training = examples.targets[examples.training]
        return BinaryCrossEntropy(training, smoothing, self.class_weight == "balanced")

    def _target_identity(self):
        is_multilabel = is_multilabel_classifier(self)
        return {
            "kind of targets": "labels" if is_multilabel else "classes",
            "classes": self.classes_.tolist(),
        }

    def _check_head(self, fitted):
        check_same_classes(self.classes_, self.multilabel_, fitted)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

"""``CNNFeatureTransformer``: a pretrained network as a scikit-learn transformer."""

from __future__ import annotations

import copy
from numbers import Integral
from os import PathLike
from typing import Any

from sklearn.utils.validation import check_is_fitted

from skltl._collections import is_dask
from skltl._dask import check_lengths, one_row
from skltl._estimator import (
    INPUT_ATTRIBUTES,
    ImageEstimator,
    path_as_text,
    read_images_of,
)
from skltl._parameters import (
    name_of_dtype,
    resolve_device,
    resolve_precision,
    resolve_threads,
)
from skltl._random import draw_seed
from skltl._sklearn import (
    AT_LEAST_ONE,
    InvalidParameterError,
    Options,
    StrOptions,
    fit_context,
)
from skltl.exceptions import WeightsError, shorten
from skltl.features._estimators import FeatureEstimator
from skltl.features._extraction import (
    cache_folder,
    extract_features,
    extraction_config,
)
from skltl.images import bad_images
from skltl.inference import (
    N_CROPS,
    POOLINGS,
    can_pool,
    load_prefix,
    recorded_blocks,
    resolve_engine,
)
from skltl.networks import (
    is_registered,
    layouts,
    resolve_layer,
    resolve_network,
    truncated_backbone,
)

# What all estimators that extract features from one network have in common: parameters
# that take effect immediately, and fitted attributes.
SHARED_PARAMETERS = (
    *("device", "precision", "engine", "n_jobs"),
    *("decode", "reader", "value_range"),
)
NETWORK_ATTRIBUTES = (
    *("backbone_", "layers_", "network_", "preprocessing_", "pooling_"),
    *("precision_", "engine_", *INPUT_ATTRIBUTES),
)


class CNNFeatureTransformer(FeatureEstimator):
    """Extract features from images with a frozen pretrained network.

    The network, a ConvNet or a vision transformer, is truncated at any of its layers,
    and the feature map or the tokens of that layer are pooled to one feature vector per
    image. A linear classifier on such features is the
    method of choice for a few hundred images [1]_ [2]_. Nothing is learned in `fit`.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: a name of :func:`~skltl.list_backbones`, such as ``"vgg16"`` or
        ``"timm:vit_small_patch16_dinov3.lvd1689m"``, or a `Backbone`.
    weights : str, path or None, default="pretrained"
        ``"pretrained"`` (or ``"imagenet"``) loads torchvision's ``IMAGENET1K_V1``
        weights; for ``"tiny"``, timm and your own networks, those that they come with.
        Any other name of the weights of torchvision or timm, such as
        ``"IMAGENET1K_V2"``; a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file with
        a state dict, whose head may be missing or have another number of classes; or
        ``None`` for random weights. The older ImageNet weights are the default because
        newer training procedures, although more accurate on ImageNet, give worse
        features for linear classifiers [2]_.
    layer : str, int or list of them, default="last"
        Layer at which the network is truncated: a name of :func:`~skltl.list_layers`,
        any torch path such as ``"layer3.2"`` where the network can be truncated, the
        index of a main layer (negative: from the end), or ``"last"``, the last one with
        a feature map or tokens. The features of several layers are concatenated; they
        take a single forward pass.
    pooling : str or int, default="avg"
        Conversion of a feature map to a feature vector: ``"avg"``, ``"max"`` or
        ``"avgmax"``, the average or the maximum of each channel, or both;
        ``"flatten"``, all values; or an int, averages over a grid of `pooling` x
        `pooling` cells. The tokens of a transformer are a feature map, except for those
        that belong to no part of the image. ``"cls"`` is the class token, and
        ``"cls+avg"`` both it and the average. ``"auto"`` is what the network's own
        head uses, of the last layer the vector that enters the head.
    image_size : int or tuple of 2 ints, default=None
        Height and width in pixels of the network's input, in [1, 10000]; an int is
        both. ``None`` is the size that the network was trained on.
    crop : {"center", "squash", "pad"} or None, default=None
        Treatment of images of other proportions than the input: ``"center"`` fills it
        and loses the ends of the longer side, ``"squash"`` changes the proportions, and
        ``"pad"`` adds a border, so that nothing is lost. ``None`` is the treatment that
        the network was trained with.
    n_views : {1, 2, 10}, default=1
        Number of views of each image, whose features are averaged: the crop; also its
        mirror image; or the center and the four corners, each of them and its mirror
        image. The features of 2 or 10 views take 2 or 10 times as long, and are often
        better.
    image_shape : tuple of 2 or 3 ints, default=None
        If given, ``X`` is an array of shape (n, d), and each row is an image of this
        shape, in the terms of ``numpy.reshape``: ``(8, 8)``, ``(32, 32, 3)``,
        ``(1, -1)``.
    batch_size : int or "auto", default="auto"
        Number of images per forward pass. ``"auto"`` is 128 on a GPU and at most 8 on
        a CPU: fewer for networks with large feature maps (for VGG-16, 2 in bfloat16
        and 1 in float32), which then stay in the processor's cache. Features depend on
        it in the last digits, so every batch is padded to exactly this size. If a GPU
        runs out of memory, it is halved.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``. ``"auto"`` uses a GPU if there
        is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Data type of the computation. ``"auto"`` is bfloat16 where the device supports
        it natively, else float32. Features are float32 in any case.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        Engine of the frozen network: eager torch, torch's compiler (needs a C++
        compiler, and seconds to minutes for the first batch), or OpenVINO, the fastest
        on CPUs with AMX (``pip install 'skltl[openvino]'``). ``"auto"`` is OpenVINO on
        a CPU where it is installed, for networks of standard layers, else torch. See
        :ref:`the user guide <engines>`.
    decode : {"exact", "fast"}, default="exact"
        ``"fast"`` decodes JPEG files at a half, a quarter or an eighth of their size,
        never below twice the input size of the network: several times faster for large
        photographs, with slightly different features.
    reader : callable, default=None
        Function from an item of ``X`` to an image of any kind that ``X`` may hold, for
        items or files that skltl cannot read itself. It is called in several threads,
        and must be picklable; see :ref:`the user guide <readers>`.
    value_range : tuple of 2 floats, default=None
        Values of black and white in images that do not have 8 bits per channel, such
        as ``(0, 4095)`` for 12 bits. Values beyond are clipped. ``None`` is 0 to 65535
        for 16-bit integers, and [0, 1] for floats.
    on_error : {"raise", "nan"}, default="raise"
        Treatment of images that cannot be read, and of missing values: ``"raise"``
        raises an error for the first one; with ``"nan"``, their features are NaN, and
        `bad_images_` lists them.
    cache : bool, str or path, default=None
        Folder in which features are stored. ``True`` is a folder in the user's cache
        directory, or that of the environment variable ``SKLTL_CACHE``; ``None`` and
        ``False`` store nothing. One forward pass per image then serves all main
        layers, clones, folds, processes and later runs; see
        :ref:`the user guide <caching>`.
    store_weights : bool, default=True
        Whether pickles and files of the fitted estimator hold the weights of the
        network. If ``False``, they hold the name of the weights and a digest, which is
        compared when they are loaded: they are small, as for other processes of a
        cluster, but need the same weights where they are loaded. The last layer of a
        classifier is stored in any case. Not for a `Backbone` that holds its weights,
        or random weights.
    n_jobs : int, default=None
        Number of decoding threads. ``None`` is torch's number of threads, -1 the number
        of cores.
    random_state : int, RandomState instance or None, default=None
        Controls the random weights of ``weights=None``: those that torch draws after
        ``torch.manual_seed(random_state)``.
    verbose : int, default=0
        Verbosity level. If positive, a progress bar is shown.

    Attributes
    ----------
    backbone_ : Backbone
        The network's description.
    network_ : FrozenPrefix
        The truncated network.
    layers_ : list of ResolvedLayer
        Name of each layer, and the block that it is the output of.
    preprocessing_ : Preprocessing
        Resizing, cropping and normalization.
    pooling_ : str or int
        The pooling that was fitted.
    precision_ : {"float32", "bfloat16"}
        Data type of the computation. Where bfloat16 is not native, a saved estimator
        that was fitted in it computes in float32, with a warning.
    engine_ : {"torch", "compile", "openvino"}
        The engine that was fitted. Where it is not available, torch is used, with a
        warning.
    bad_images_ : list of BadImage
        Index, path or name, and reason of each image that the last call of `transform`
        could not read; see :func:`~skltl.find_bad_images`. Only with
        ``on_error="nan"``.
    n_features_in_ : int
        Number of features seen during `fit`. Only with `image_shape`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during `fit`. Defined only when ``X`` has feature
        names that are all strings. Only with `image_shape`.

    See Also
    --------
    make_feature_pipeline : This transformer and a linear classifier.
    list_layers : The layers of a backbone.
    find_bad_images : Find images that cannot be read.

    Notes
    -----
    `fit` fixes the network: `backbone`, `weights`, `layer`, `pooling`, `image_size`,
    `crop` and `image_shape` that are set later take effect at the next `fit`. All other
    parameters take effect immediately.

    On one machine, with the same versions, device, number of threads and batch size,
    the features of an image are the same bit for bit, alone, in any batch and in any
    order: every forward pass has the same shape. The first use of a network in a
    process loads and prepares it (batch normalization folded into convolutions,
    channels last); all clones share it.

    References
    ----------
    .. [1] Sharif Razavian, Azizpour, Sullivan, Carlsson, "CNN features off-the-shelf:
       an astounding baseline for recognition", CVPR workshops, 2014.
    .. [2] Kornblith, Chen, Lee, Norouzi, "Why do better loss functions lead to less
       transferable features?", NeurIPS, 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import CNNFeatureTransformer
    >>> digits = load_digits()
    >>> transformer = CNNFeatureTransformer("tiny", layer="block2", image_shape=(8, 8))
    >>> transformer.fit_transform(digits.data[:10] / 16).shape
    (10, 96)
    """

    __module__ = "skltl"  # the path in saved files

    _parameter_constraints: dict = {
        **ImageEstimator._parameter_constraints,
        "layer": [str, Integral, list, tuple],
        "pooling": [StrOptions(set(POOLINGS)), AT_LEAST_ONE],
        "n_views": [Options(Integral, set(N_CROPS))],
        "batch_size": [AT_LEAST_ONE, StrOptions({"auto"})],
        "on_error": [StrOptions({"raise", "nan"})],
        "cache": ["boolean", str, PathLike, None],
        "store_weights": ["boolean"],
    }

    def __init__(
        self,
        backbone="resnet50",
        *,
        weights="pretrained",
        layer="last",
        pooling="avg",
        image_size=None,
        crop=None,
        n_views=1,
        image_shape=None,
        batch_size="auto",
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
        reader=None,
        value_range=None,
        on_error="raise",
        cache=None,
        store_weights=True,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.image_size = image_size
        self.crop = crop
        self.n_views = n_views
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.reader = reader
        self.value_range = value_range
        self.on_error = on_error
        self.cache = cache
        self.store_weights = store_weights
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y=None):
        """Load the network; nothing is learned from the images.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Paths, URLs, encoded images, PIL images, arrays or tensors, one array of
            images, or a lazy sequence; see :doc:`the user guide </guide/images>`. Only
            the types are checked; no image is decoded.
        y : array of shape (n,), default=None
            Ignored, except for its length.

        Returns
        -------
        CNNFeatureTransformer
            Fitted transformer.

        Raises
        ------
        UnknownBackboneError, UnknownLayerError, WeightsError
            If `backbone`, `layer` or `weights` cannot be found.
        TypeError, ValueError
            If ``X`` is not a sequence of images, or `y` has another length.
        """
        fitted = copy.copy(self)
        fitted._fit(X, y)
        self.__dict__ = fitted.__dict__  # a fit that fails changes nothing
        return self

    def _fit(self, X, y):
        if is_dask(X):
            check_lengths(X, y)
            X, y = one_row(X), None
        read_images_of(self, X, y, reset=True)
        device = resolve_device(self.device)
        resolve_threads(self.n_jobs)
        backbone, weights, preprocessing = resolve_network(
            self.backbone, self.weights, self.image_size, self.crop
        )
        size = preprocessing.size
        layers = _resolve_layers(backbone, self.layer, size, self.pooling)
        blocks = tuple(layer.block for layer in layers)
        found = layouts(backbone, size, blocks)
        for layer in layers:
            check_output(layer, found[layer.block], self.pooling)
        seed = draw_seed(self.random_state) if weights is None else None
        recorded = recorded_blocks(backbone, blocks, size, self.pooling)
        recorder = None
        if cache_folder(self) is not None:
            recorder = _load_recorder(backbone, weights, seed, size, recorded)
        network = load_prefix(backbone, weights, seed, size, blocks)
        engine = resolve_engine(self.engine, device, network.blocks)
        self.__dict__.pop("bad_images_", None)
        self.backbone_ = backbone
        self.layers_ = layers
        self.network_ = network
        self._recorder = recorder
        self.preprocessing_ = preprocessing
        self.pooling_ = self.pooling
        self.precision_ = name_of_dtype(resolve_precision(self.precision, device))
        self.engine_ = engine
        self._fitted_weights = path_as_text(self.weights)

    def transform(self, X):
        """Extract the features of images.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Any type that `fit` accepts.

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            Features; with ``on_error="nan"``, NaN for images that cannot be read.
            Above 2 GiB the array is backed by a temporary file that is removed when the
            array is garbage-collected.

        Raises
        ------
        ImageReadError
            For the first image that cannot be read; the message names its index and
            path. Not with ``on_error="nan"``.
        """
        check_is_fitted(self)
        source = read_images_of(self, X)
        unreadable: list | None = None if self.on_error == "raise" else []
        features = extract_features(
            source,
            transformer_config(self),
            [layer.block for layer in self.layers_],
            resolve_threads(self.n_jobs),
            verbose=bool(self.verbose),
            cache=cache_folder(self),
            unreadable=unreadable,
        )
        self.__dict__.pop("bad_images_", None)  # of an earlier call
        if unreadable is not None:
            self.bad_images_ = bad_images(unreadable)
        return features

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.weights is None and self.random_state is None
        tags.input_tags.allow_nan = self.on_error == "nan" and self.image_shape is None
        return tags


def fitted_parameters(transformer):
    """Return the parameters of the fitted network, whatever was set since."""
    found = {
        "layer": transformer.layers_[0].name,
        "pooling": transformer.pooling_,
        "image_shape": transformer._fitted_image_shape,
    }
    if transformer._fitted_weights is None:  # random weights cannot be named
        own = _own_backbone(transformer)
        used = {"backbone": own, "weights": "pretrained"}
        return found | used | {"image_size": None, "crop": None}
    # By the name of the weights: what the network was trained with.
    named = transformer.backbone_, transformer._fitted_weights
    size = transformer.preprocessing_.crop_size
    is_usual_size = size == resolve_network(*named, None)[2].crop_size
    is_usual_crop = transformer.preprocessing_ == resolve_network(*named, size)[2]
    is_same = isinstance(transformer.backbone, str) and is_registered(
        transformer.backbone_
    )
    return found | {
        "crop": None if is_usual_crop else transformer.preprocessing_.mode,
        "backbone": transformer.backbone_.name if is_same else transformer.backbone_,
        "weights": transformer._fitted_weights,
        "image_size": None if is_usual_size else size,
    }


def fitted_transformer(estimator):
    """Return a transformer with the network of another fitted estimator.

    Its backbone holds the weights, and its input size is that of the network.
    """
    backbone = _own_backbone(estimator)
    transformer = CNNFeatureTransformer(
        backbone,
        layer=estimator.layers_[0].name,
        pooling=estimator.pooling_,
        image_shape=estimator._fitted_image_shape,
        **{name: getattr(estimator, name) for name in SHARED_PARAMETERS},
    )
    copy_fitted_network(estimator, transformer)
    transformer.backbone_, transformer._recorder = backbone, None
    transformer._fitted_weights = transformer.weights
    return transformer


def _own_backbone(estimator):
    """Return a backbone that holds the weights of the truncated network."""
    return truncated_backbone(
        estimator.backbone_, estimator.network_.blocks, estimator.preprocessing_
    )


def copy_fitted_network(estimator, other):
    """Set the fitted attributes of a network to those of another estimator."""
    for name in NETWORK_ATTRIBUTES:
        if hasattr(estimator, name):
            setattr(other, name, getattr(estimator, name))


def transformer_config(transformer):
    """Return how images become features, those that a cache stores included."""
    blocks = tuple(layer.block for layer in transformer.layers_)
    network = transformer.network_
    if cache_folder(transformer) is not None:
        network = transformer.__dict__.get("_recorder") or transformer.network_
        size = transformer.preprocessing_.size
        recorded = recorded_blocks(
            transformer.backbone_, blocks, size, transformer.pooling_
        )
        blocks = tuple(block for block in recorded if block in network.blocks)
    return extraction_config(
        transformer,
        transformer.backbone_,
        network,
        blocks,
        transformer.preprocessing_,
        transformer.pooling_,
        transformer.batch_size,
        transformer.n_views,
    )


def _resolve_layers(backbone, layer, image_size, pooling):
    """Return the layers that a `layer` parameter names, each of them once."""
    names = layer if isinstance(layer, (list, tuple)) else [layer]
    is_name = [isinstance(one, (str, Integral)) for one in names]
    if not all(is_name) or any(isinstance(one, bool) for one in names):
        raise InvalidParameterError(
            "The 'layer' parameter of CNNFeatureTransformer must be a name, an index "
            f"or a list of them. Got {shorten(repr(layer))} instead."
        )
    layers = [resolve_layer(backbone, name, image_size, pooling) for name in names]
    n_blocks = len({one.block for one in layers})
    if not layers or n_blocks < len(layers):
        raise ValueError(
            f"layer={layer!r} must name at least one layer, and none of them twice."
        )
    return layers


def _load_recorder(backbone, weights, seed, image_size, blocks):
    """Load the network up to the last layer that a cache stores, or ``None``.

    The fully connected layers of some published weights hold NaN on purpose: they
    cannot be stored.
    """
    try:
        return load_prefix(backbone, weights, seed, image_size, blocks)
    except WeightsError:
        return None


def check_output(layer, layout, pooling):
    """Raise an error for a layer whose output cannot be pooled."""
    if can_pool(layout, pooling):
        return
    if layout.grid is None:
        raise ValueError(
            f"The output of layer {layer.name!r} for an image has shape "
            f"{layout.shape}; expected a feature map (c, h, w) or (h, w, c), tokens "
            "(t, c) of a grid, or a vector (d,)."
        )
    if isinstance(pooling, str):
        raise ValueError(
            f"pooling={pooling!r} needs a class token, which layer {layer.name!r} does "
            "not have."
        )
    raise ValueError(
        f"pooling={pooling} is a finer grid than the feature map of "
        f"{layout.grid[0]} x {layout.grid[1]} at layer {layer.name!r}."
    )


def resolve_transformer(transformer: Any) -> Any:
    """Return the value of a parameter `transformer`, by default the default network."""
    if transformer is None:
        return CNNFeatureTransformer()
    if isinstance(transformer, type) or not hasattr(transformer, "transform"):
        raise TypeError(
            "transformer must be a CNNFeatureTransformer, or a pipeline that ends in a "
            f"transformer; got {shorten(repr(transformer))}."
        )
    return transformer

"""``CNNFeatureTransformer``: a pretrained ConvNet as a scikit-learn transformer."""

from __future__ import annotations

from numbers import Integral
from os import PathLike, fspath

from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from skltl._parameters import DTYPES, resolve_device, resolve_threads
from skltl._random import draw_seed
from skltl._sklearn import (
    IMAGE_SIZES,
    Interval,
    InvalidParameterError,
    StrOptions,
    fit_context,
)
from skltl.exceptions import WeightsError, shorten
from skltl.features._estimators import FeatureEstimator
from skltl.features._extraction import extract_features
from skltl.inference import (
    ENGINES,
    POOLINGS,
    can_pool,
    load_prefix,
    recorded_blocks,
    resolve_engine,
)
from skltl.networks import (
    Backbone,
    block_shapes,
    is_registered,
    resolve_layer,
    resolve_network,
)


class CNNFeatureTransformer(FeatureEstimator):
    """Turn images into the features of a pretrained ConvNet.

    The network is frozen, cut at any of its layers, and what it gives there is pooled
    to one row of numbers per image: ready for a linear classifier, which is the
    method of choice for a few hundred images [1]_ [2]_. Nothing is learned in `fit`.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: any of :func:`~skltl.list_backbones`, or a record of your own.
    weights : str, path or None, default="imagenet"
        ``"imagenet"``: torchvision's ``IMAGENET1K_V1`` (for ``"tiny"`` and for your own
        networks, the weights they come with); any other name of torchvision's weights,
        such as ``"IMAGENET1K_V2"``; a ``.safetensors``, ``.pt`` or ``.pth`` file with a
        state dict, whose head may have another number of classes; or ``None`` for
        random weights. The older ImageNet weights are the default because newer
        recipes, with better accuracy on ImageNet, give worse features to linear
        classifiers [2]_.
    layer : str, int or list of them, default="last"
        Where the network is cut: a name of :func:`~skltl.list_layers`, any torch path
        such as ``"layer3.2"``, the number of a main cut point (negative: from the end),
        or ``"last"``, the last convolutional one. For several, the features stand side
        by side, all from one pass.
    pooling : {"avg", "max", "avgmax", "flatten"} or int, default="avg"
        How a feature map becomes a row: the average or maximum of each channel, both,
        all of its numbers, or averages over a grid with so many rows and columns.
    image_size : int, default=None
        Height and width in pixels of what the network sees, from 1 to 10,000; ``None``
        is the size it was trained on.
    image_shape : tuple of 2 or 3 ints, default=None
        If given, ``X`` is an array (n, d), and each row is an image of this shape, in
        the terms of ``numpy.reshape``: ``(8, 8)``, ``(32, 32, 3)``, ``(1, -1)``.
    batch_size : int or "auto", default="auto"
        Images that cross the network together. ``"auto"`` is 128 on a GPU and at most
        8 on a CPU: fewer for networks with large maps (for VGG-16, 2 in bfloat16 and 1
        in float32), which then stay in the processor's cache. Results depend on it in
        the last digits, so every batch has exactly this size; out of memory on a GPU,
        it is halved.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``"auto"`` takes a GPU if there
        is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        What the network computes in. ``"auto"`` is bfloat16 where the device multiplies
        it natively, else float32. Features are float32 in any case.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        What runs the frozen network: torch as it is, torch's compiler (needs a C++
        compiler; seconds to minutes for the first batch), or OpenVINO, the fastest on
        CPUs with AMX (``pip install 'skltl[openvino]'``). ``"auto"`` is OpenVINO on a
        CPU where it is installed, for networks of usual layers, else torch. See
        :ref:`the user guide <engines>`.
    decode : {"exact", "fast"}, default="exact"
        ``"fast"`` lets JPEG files be decoded at a half, a quarter or an eighth of their
        size, never under twice the size that the network sees: several times faster
        for large photographs, with features that differ a little.
    cache : bool, str or path, default=None
        Where features are kept for the next time: a folder, or ``True`` for one in the
        user's cache directory (or that in the environment variable ``SKLTL_CACHE``).
        ``None`` and ``False`` keep nothing. One pass over an image then serves all
        main cut points, clones, folds, processes and later runs; see
        :ref:`the user guide <caching>`.
    n_jobs : int, default=None
        Threads that decode images; ``None`` is as many as torch uses, -1 is one for
        each core.
    random_state : int, RandomState instance or None, default=None
        Of the weights, if they are random: those that torch draws after
        ``torch.manual_seed(random_state)``.
    verbose : int, default=0
        Whether a progress bar is shown.

    Attributes
    ----------
    backbone_ : Backbone
        The record of the network.
    network_ : FrozenPrefix
        The network up to the cut.
    cut_points_ : list of CutPoint
        For each of `layer`, its name and the block it lies behind.
    preprocessing_ : Preprocessing
        What images go through before the network.
    pooling_ : {"avg", "max", "avgmax", "flatten"} or int
        How feature maps become features.
    precision_ : {"float32", "bfloat16"}
        What the network computes in. An estimator that was fitted in bfloat16 computes
        in float32, with a warning, where bfloat16 is not native.
    engine_ : {"torch", "compile", "openvino"}
        What ran the network where this was fitted, and runs it where it can.
    n_features_in_ : int
        Numbers in a row of ``X``. Only with `image_shape`.
    feature_names_in_ : array of shape (`n_features_in_`,)
        Names of the columns of ``X``, if it had any. Only with `image_shape`.

    See Also
    --------
    make_feature_pipeline : This transformer and a linear classifier.
    list_layers : The cut points of a backbone.
    find_bad_images : Find images that cannot be read, beforehand.

    Notes
    -----
    What a network gives is settled in `fit`: `backbone`, `weights`, `layer`, `pooling`,
    `image_size` and `image_shape` that are set later count from the next `fit` on. All
    other parameters count at once.

    An image gets the same bits alone, in any batch and in any order, on one machine
    with the same versions, device, number of threads and batch size: every forward pass
    has the same shape. The first use of a network in a process loads and prepares it
    (batch-norms folded into convolutions, channels last); all clones share it.

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

    _parameter_constraints: dict = {
        "backbone": [str, Backbone],
        "weights": [str, PathLike, None],
        "layer": [str, Integral, list, tuple],
        "pooling": [
            StrOptions(set(POOLINGS)),
            Interval(Integral, 1, None, closed="left"),
        ],
        "image_size": [IMAGE_SIZES, None],
        "image_shape": [tuple, list, None],
        "batch_size": [
            Interval(Integral, 1, None, closed="left"),
            StrOptions({"auto"}),
        ],
        "device": [str],
        "precision": [StrOptions({"auto", *DTYPES})],
        "engine": [StrOptions({"auto", *ENGINES})],
        "decode": [StrOptions({"exact", "fast"})],
        "cache": ["boolean", str, PathLike, None],
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
        image_size=None,
        image_shape=None,
        batch_size="auto",
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
        cache=None,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.image_size = image_size
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.cache = cache
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y=None):
        """Load the network; nothing is learned from the images.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Paths, PIL images, arrays or tensors, or one array of images. Only its
            kind is looked at; no image is decoded.
        y : array of shape (n,), default=None
            Ignored, but for its length.

        Returns
        -------
        CNNFeatureTransformer
            The transformer itself.

        Raises
        ------
        UnknownBackboneError, UnknownLayerError, WeightsError
            If `backbone`, `layer` or `weights` name something that is not there.
        TypeError, ValueError
            If ``X`` is not a sequence of images, or `y` has another length.
        """
        clone(self)._read_images(X, y, reset=True)  # is `X` all right, before any work
        device = resolve_device(self.device)
        resolve_threads(self.n_jobs)
        backbone, weights, preprocessing = resolve_network(
            self.backbone, self.weights, self.image_size
        )
        cut_points = _resolve_layers(backbone, self.layer)
        blocks = tuple(cut_point.block for cut_point in cut_points)
        shapes = block_shapes(backbone, preprocessing.crop_size, blocks)
        for cut_point in cut_points:
            _check_output(cut_point, shapes[cut_point.block], self.pooling)
        seed = draw_seed(self.random_state) if weights is None else None
        size = preprocessing.crop_size
        recorded = recorded_blocks(backbone, blocks, size, self.pooling)
        recorder = None
        if self._cache_folder() is not None:
            recorder = _load_recorder(backbone, weights, seed, recorded)
        network = load_prefix(backbone, weights, seed, blocks)
        engine = resolve_engine(self.engine, device, network.blocks)
        # Only now does anything change: a fit that fails leaves the one before.
        self._read_images(X, reset=True)
        self.backbone_ = backbone
        self.cut_points_ = cut_points
        self.network_ = network
        self._recorder = recorder
        self.preprocessing_ = preprocessing
        self.pooling_ = self.pooling
        self.precision_ = self._fitted_precision(device)
        self.engine_ = engine
        self._fitted_weights = _plain(self.weights)
        return self

    def transform(self, X):
        """Return the features of each image.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_features_out), float32
            A DataFrame if `set_output` says so. Beyond 2 GiB it lies in a file of the
            system's temporary folder, which ends with it.

        Raises
        ------
        ImageReadError
            For the first image that cannot be read; it names its index and path.
        """
        check_is_fitted(self)
        source = self._read_images(X, reset=False)
        return extract_features(
            source,
            self._recipe(),
            [cut_point.block for cut_point in self.cut_points_],
            resolve_threads(self.n_jobs),
            verbose=bool(self.verbose),
            cache=self._cache_folder(),
        )

    def _fitted_parameters(self):
        """Return what describes the fitted network, whatever was set since."""
        found = {
            "layer": self.cut_points_[0].name,
            "pooling": self.pooling_,
            "image_shape": self._fitted_image_shape,
        }
        if self._fitted_weights is None:  # random ones: who knows how to draw them
            own = self._own_backbone()
            return found | {"backbone": own, "weights": "imagenet", "image_size": None}
        size = self.preprocessing_.crop_size
        is_usual = size == self.backbone_.preprocessing.crop_size
        is_same = isinstance(self.backbone, str) and is_registered(self.backbone_)
        return found | {
            "backbone": self.backbone_.name if is_same else self.backbone_,
            "weights": self._fitted_weights,
            "image_size": None if is_usual else size,
        }

    def _recipe(self):
        """Say how images become features, and those that are stored."""
        blocks = tuple(cut_point.block for cut_point in self.cut_points_)
        network = self.network_
        if self._cache_folder() is not None:
            network = self.__dict__.get("_recorder") or self.network_
            size = self.preprocessing_.crop_size
            recorded = recorded_blocks(self.backbone_, blocks, size, self.pooling_)
            blocks = tuple(block for block in recorded if block in network.blocks)
        return self._make_recipe(
            self.backbone_,
            network,
            blocks,
            self.preprocessing_,
            self.pooling_,
            self.batch_size,
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.weights is None and self.random_state is None
        return tags


def _plain(weights):
    return fspath(weights) if isinstance(weights, PathLike) else weights


def _resolve_layers(backbone, layer):
    """Find the cut points that a `layer` parameter names, each of them once."""
    layers = layer if isinstance(layer, (list, tuple)) else [layer]
    is_name = [isinstance(one, (str, Integral)) for one in layers]
    if not all(is_name) or any(isinstance(one, bool) for one in layers):
        raise InvalidParameterError(
            "The 'layer' parameter of CNNFeatureTransformer must be a name, a number "
            f"or a list of them. Got {shorten(repr(layer))} instead."
        )
    cut_points = [resolve_layer(backbone, one) for one in layers]
    n_blocks = len({cut_point.block for cut_point in cut_points})
    if not cut_points or n_blocks < len(cut_points):
        raise ValueError(
            f"layer={layer!r} must name at least one cut point, and none of them twice."
        )
    return cut_points


def _load_recorder(backbone, weights, seed, blocks):
    """Load the network as far as a cache records it, or ``None``.

    The fully connected layers of some published weights hold NaN on purpose: they
    cannot be recorded, but need not be.
    """
    try:
        return load_prefix(backbone, weights, seed, blocks)
    except WeightsError:
        return None


def _check_output(cut_point, shape, pooling):
    """Refuse cut points whose output cannot be pooled as asked."""
    if can_pool(shape, pooling):
        return
    if len(shape) != 3:
        raise ValueError(
            f"The output of layer {cut_point.name!r} for an image has shape {shape}; "
            "expected a map (c, h, w) or a vector (d,)."
        )
    raise ValueError(
        f"pooling={pooling} is a grid finer than the map of {shape[1]} x {shape[2]} at "
        f"layer {cut_point.name!r}."
    )

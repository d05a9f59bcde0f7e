"""``PretrainedCNNClassifier``: a pretrained network with its original head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from sklearn.utils.validation import check_is_fitted

from skltl._estimator import ImageEstimator, path_as_text, read_images_of
from skltl._parameters import (
    name_of_dtype,
    resolve_device,
    resolve_precision,
    resolve_threads,
)
from skltl._random import draw_seed
from skltl._sklearn import AT_LEAST_ONE, StrOptions, fit_context
from skltl._targets import is_multilabel
from skltl.exceptions import nearest, shorten
from skltl.features import NetworkClassifier, output_layout
from skltl.finetuning import encode_labels, example_weights
from skltl.inference import (
    load_with_head,
    own_head_from_state,
    own_head_state,
    resolve_engine,
)
from skltl.networks import (
    ResolvedLayer,
    imagenet_names,
    resolve_network,
    unique,
)


class PretrainedCNNClassifier(NetworkClassifier):
    """Classify images with a pretrained network and its original head.

    Nothing is trained. Without `class_map` the classes are the categories that the
    network was trained on, such as the 1,000 of ImageNet.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: a name of :func:`~skltl.list_backbones`, such as ``"vgg16"`` or
        ``"timm:vit_small_patch16_dinov3.lvd1689m"``, or a `Backbone`.
    weights : str, path or None, default="pretrained"
        Pretrained weights, as for `CNNFeatureTransformer`. The categories of a file
        are named after those of the default weights if there are as many of them.
    class_map : dict, "learn" or None, default=None
        Assignment of categories to classes. A dictionary gives the categories of each
        class by name, index or WordNet ID:
        ``{"dog": ["beagle", 235], "cat": "n02123045"}``; all others are ignored.
        ``"learn"`` estimates the assignment from labeled images [1]_. ``None`` keeps
        the categories as classes.
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
    batch_size : int or "auto", default="auto"
        Number of images per forward pass, as for `CNNFeatureTransformer`.
    store_weights : bool, default=True
        Whether pickles and files of the fitted estimator hold the weights of the
        network. If ``False``, they hold the name of the weights and a digest, which is
        compared when they are loaded: they are small, as for other processes of a
        cluster, but need the same weights where they are loaded. The last layer of a
        classifier is stored in any case. Not for a `Backbone` that holds its weights,
        or random weights.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``. ``"auto"`` uses a GPU if there
        is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Data type of the network's computations. Its last layer with parameters
        computes in float32.
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
    n_jobs : int, default=None
        Number of decoding threads. ``None`` is torch's number of threads, -1 the number
        of cores.
    random_state : int, RandomState instance or None, default=None
        Seed of random weights, with ``weights=None``.
    verbose : int, default=0
        Verbosity level. If positive, a progress bar is shown.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        Sorted class labels: the categories, or the classes of `class_map`.
    categories_ : array of shape (n_categories,)
        Names of the network's categories in the order of its logits; their indices if
        the names are unknown.
    class_map_ : array of shape (n_categories, n_classes), or None
        Share of each category's probability that is assigned to each class, in [0, 1].
    backbone_ : Backbone
        The backbone.
    network_ : FrozenPrefix
        Network up to its last layer with parameters.
    head_ : Module
        Remaining layers, which return the logits of the categories. They are part of
        every file of the fitted classifier.
    layers_ : list of ResolvedLayer
        Layer at which the head begins, in a list of one.
    preprocessing_ : Preprocessing
        Preprocessing of the images.
    precision_ : {"float32", "bfloat16"}
        Data type of the network's computations.
    engine_ : {"torch", "compile", "openvino"}
        Engine that ran the network in `fit`, and runs it wherever it is available.
    n_features_in_ : int
        Number of features seen during `fit`. Only with `image_shape`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of features seen during `fit`. Defined only when ``X`` has feature
        names that are all strings. Only with `image_shape`.

    See Also
    --------
    CNNFeatureTransformer : Extract features for any classifier.
    FineTunedCNNClassifier : Train a new head and fine-tune the network.

    References
    ----------
    .. [1] Nguyen, Hassner, Seeger, Archambeau, "LEEP: a new measure to evaluate
       transferability of learned representations", ICML, 2020: the expected empirical
       predictor.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import PretrainedCNNClassifier
    >>> images = np.zeros((2, 80, 80, 3), dtype=np.uint8)
    >>> classifier = PretrainedCNNClassifier("tiny").fit(images)
    >>> classifier.predict_top_k(images, k=3).shape
    (2, 3)
    """

    __module__ = "skltl"  # the path in saved files

    _parameter_constraints: dict = {
        **ImageEstimator._parameter_constraints,
        "class_map": [dict, StrOptions({"learn"}), None],
        "batch_size": [AT_LEAST_ONE, StrOptions({"auto"})],
        "store_weights": ["boolean"],
    }

    def __init__(
        self,
        backbone="resnet50",
        *,
        weights="pretrained",
        class_map=None,
        image_size=None,
        crop=None,
        image_shape=None,
        batch_size="auto",
        store_weights=True,
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
        reader=None,
        value_range=None,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.class_map = class_map
        self.image_size = image_size
        self.crop = crop
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.store_weights = store_weights
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.reader = reader
        self.value_range = value_range
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y=None, sample_weight=None):
        """Load the network and, with ``class_map="learn"``, estimate the class map.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        y : array of shape (n,), default=None
            Labels; required with ``class_map="learn"``, ignored otherwise.
        sample_weight : array of shape (n,), default=None
            Sample weights; used with ``class_map="learn"``.

        Returns
        -------
        PretrainedCNNClassifier
            The fitted classifier.

        Raises
        ------
        UnknownBackboneError, WeightsError
            If the backbone or the weights do not exist, or the network has no head.
        ValueError
            If `class_map` does not match the network's categories.
        """
        fitted = copy.copy(self)
        fitted._fit(X, y, sample_weight)
        self.__dict__ = fitted.__dict__  # a fit that fails changes nothing
        return self

    def predict_top_k(self, X, k=5):
        """Return the k most probable classes of each image, in descending order.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` accepts.
        k : int, default=5
            Number of classes to return, from 1 to the number of classes.

        Returns
        -------
        array of shape (n, k)
            Class labels.

        Raises
        ------
        ValueError
            If `k` exceeds the number of classes.
        """
        check_is_fitted(self)
        if not isinstance(k, Integral) or not 1 <= int(k) <= len(self.classes_):
            raise ValueError(
                f"k={k!r} must be an integer from 1 to {len(self.classes_)}, the "
                "number of classes."
            )
        ranked = np.argsort(-self._logits(X), axis=1, kind="stable")
        return self.classes_[ranked[:, :k]]

    def _load_network(self, seed):
        """Set the fitted attributes that do not depend on images."""
        backbone, weights, preprocessing = resolve_network(
            self.backbone, self.weights, self.image_size, self.crop
        )
        self.network_, self.head_ = load_with_head(
            backbone, weights, seed if weights is None else None, preprocessing.size
        )
        self.backbone_ = backbone
        self._fitted_weights = path_as_text(self.weights)
        self.preprocessing_ = preprocessing
        block = list(self.network_.blocks)[-1]
        self.layers_ = [ResolvedLayer(block, block)]
        with torch.inference_mode():
            shape = (1, *output_layout(self).shape)
            zeros = torch.zeros(shape, dtype=torch.float32, device="cpu")
            n_categories = self.head_(zeros).shape[1]
        default = backbone.weights[0]
        candidates = (weights or default).categories, default.categories
        named = [names for names in candidates if len(names) == n_categories]
        self.categories_ = np.array(unique(named[0]) if named else range(n_categories))
        self.classes_, self.class_map_ = np.sort(self.categories_), None
        if isinstance(self.class_map, dict):
            names = [str(name) for name in self.categories_]
            self.classes_, self.class_map_ = _parse_class_map(self.class_map, names)

    def _fit(self, X, y, sample_weight):
        source = read_images_of(self, X, y, reset=True)
        device = resolve_device(self.device)
        resolve_threads(self.n_jobs)
        learns_map = self.class_map == "learn"
        if learns_map and y is not None and is_multilabel(y):
            raise ValueError(
                "A pretrained classifier has one class of each image, and y is an "
                "indicator matrix of labels. Use its features: "
                "make_feature_pipeline(backbone, 'ovr')."
            )
        if learns_map:
            classes, targets = encode_labels(y, len(source))
            weights = example_weights(sample_weight, targets)
        self._load_network(draw_seed(self.random_state))
        self.precision_ = name_of_dtype(resolve_precision(self.precision, device))
        self.engine_ = resolve_engine(self.engine, device, self.network_.blocks)
        if learns_map:
            proba = softmax(self._category_logits(X), axis=1)
            self.classes_ = classes
            self.class_map_ = _learn_class_map(proba, targets, weights, len(classes))

    # The head begins with the unpooled output of `network_`.
    _pooling = "flatten"

    def _network_batch_size(self):
        return self.batch_size

    def _run_head(self, features):
        outputs = features.reshape(len(features), *output_layout(self).shape)
        with torch.inference_mode():
            return self.head_(outputs).double()

    def _category_logits(self, X):
        """Return the logits (n, n_categories)."""
        return self._head_outputs(X, len(self.categories_))

    def _logits(self, X):
        """Return the logits (n, n_classes).

        The logit of a class is the log-sum-exp of its categories': sums of
        probabilities would be 0 for most classes of a confident network.
        """
        check_is_fitted(self)
        logits = self._category_logits(X)
        if self.class_map_ is None:
            # In C order: otherwise `softmax` sums a single row in another order.
            return np.ascontiguousarray(logits[:, np.argsort(self.categories_)])
        columns = [logsumexp(logits, axis=1, b=shares) for shares in self.class_map_.T]
        return np.stack(columns, axis=1)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.class_map == "learn"
        tags.non_deterministic = self.weights is None and self.random_state is None
        # Without training, the accuracy on other classes is arbitrary.
        tags.classifier_tags.poor_score = self.class_map != "learn"
        return tags

    def __getstate__(self):
        state = super().__getstate__()
        if "head_" in state:
            state["head_"] = own_head_state(self.head_)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "head_" in state:
            n_categories = len(self.categories_)
            size = self.preprocessing_.size
            self.head_ = own_head_from_state(
                self.backbone_, state["head_"], size, n_categories
            )


def map_by_names(
    classes: NDArray[Any], categories: Sequence[str]
) -> dict[Any, str] | None:
    """Return the category of each class, or None if a class is not a category."""
    names = imagenet_names()
    class_map = {label: names.get(label, label) for label in classes.tolist()}
    return class_map if set(class_map.values()) <= set(categories) else None


def _parse_class_map(
    class_map: Mapping[Any, Any], categories: Sequence[str]
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the sorted classes of a dictionary, and its `class_map_` of 0 and 1."""
    if len(class_map) < 2:
        raise ValueError(
            f"class_map needs at least two classes, got {_short(class_map)}."
        )
    types = {str if isinstance(label, str) else type(label) for label in class_map}
    if len(types) > 1 or not issubclass(types.pop(), (str, int, np.integer)):
        raise ValueError(
            "class_map: the classes must be all strings or all integers, got "
            f"{_short(list(class_map))}."
        )
    classes = np.unique(list(class_map))
    indices = {name: index for index, name in enumerate(categories)}
    weights = np.zeros((len(categories), len(classes)))
    for column, label in enumerate(classes.tolist()):
        members = class_map[label]
        if isinstance(members, (str, Integral)):
            members = [members]
        if not isinstance(members, (list, tuple, set, np.ndarray)) or len(members) == 0:
            raise ValueError(
                f"class_map: class {_short(label)} must have a category or a list of "
                f"categories, got {_short(members)}."
            )
        for member in members:
            weights[_category_index(member, indices, label), column] = 1
    shared = np.flatnonzero(weights.sum(axis=1) > 1)
    if len(shared):
        raise ValueError(
            f"class_map: category {categories[shared[0]]!r} is in more than one class."
        )
    return classes, weights


def _category_index(member: Any, indices: Mapping[str, int], label: Any) -> int:
    """Return the index of a category that is given by name, index or WordNet ID."""
    is_index = isinstance(member, Integral) and not isinstance(member, (bool, np.bool_))
    if is_index and 0 <= int(member) < len(indices):
        return int(member)
    if isinstance(member, str):
        name = imagenet_names().get(member, member)
        if name in indices:
            return indices[name]
    raise ValueError(
        f"class_map: {_short(member)} of class {_short(label)} is not a category of "
        f"this network. Use a name, an index from 0 to {len(indices) - 1}, or a "
        f"WordNet ID such as 'n02085620'. {nearest(str(member), list(indices))}"
    )


def _learn_class_map(
    proba: NDArray[np.float64],
    targets: NDArray[np.int64],
    sample_weight: NDArray[np.floating[Any]],
    n_classes: int,
) -> NDArray[np.float64]:
    """Estimate the probability of each class given a category; rows sum to 1."""
    one_hot = np.zeros((len(targets), n_classes))
    one_hot[np.arange(len(targets)), targets] = sample_weight
    joint = proba.T @ one_hot  # (n_categories, n_classes)
    total = joint.sum(axis=1, keepdims=True)
    # A category of probability 0 is uninformative.
    uniform = np.full_like(joint, 1 / n_classes)
    return np.asarray(np.divide(joint, total, out=uniform, where=total > 0))


def _short(value: Any) -> str:
    """Return the `repr` of a value, shortened."""
    return shorten(repr(value))

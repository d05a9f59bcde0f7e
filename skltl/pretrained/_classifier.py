"""``PretrainedCNNClassifier``: a pretrained network with its head, and class maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from skltl._parameters import DTYPES, resolve_device, resolve_threads
from skltl._random import draw_seed
from skltl._sklearn import IMAGE_SIZES, Interval, StrOptions, fit_context
from skltl.exceptions import shorten
from skltl.finetuning import NetworkClassifier, encode_labels, example_weights
from skltl.inference import (
    ENGINES,
    head_from_state,
    head_state,
    load_with_head,
    resolve_engine,
)
from skltl.networks import (
    Backbone,
    CutPoint,
    block_shapes,
    imagenet_names,
    nearest,
    resolve_network,
    unique,
)


def map_of_names(
    class_map: Mapping[Any, Any], categories: Sequence[str]
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read a `class_map` that the user has written.

    Parameters
    ----------
    class_map : mapping
        For each class, one category or a list of them: names, numbers, or WordNet's
        numbers (``"n02085620"``).
    categories : sequence of str
        The names of the network's categories, in the order of the logits.

    Returns
    -------
    classes : array of shape (n_classes,)
        Sorted.
    shares : array of shape (n_categories, n_classes)
        1 where a category belongs to a class, else 0.

    Raises
    ------
    ValueError
        If there are less than two classes, a class is empty, or a category unknown or
        in two classes.
    """
    if len(class_map) < 2:
        raise ValueError(
            f"class_map needs at least two classes, got {_short(class_map)}."
        )
    kinds = {str if isinstance(name, str) else type(name) for name in class_map}
    if len(kinds) > 1 or not issubclass(kinds.pop(), (str, int, np.integer)):
        raise ValueError(
            "class_map: the classes must be all texts, or all integers; they are "
            f"{_short(list(class_map))}."
        )
    classes = np.unique(list(class_map))
    numbers = {name: number for number, name in enumerate(categories)}
    shares = np.zeros((len(categories), len(classes)))
    for column, name in enumerate(classes.tolist()):
        members = class_map[name]
        alone = isinstance(members, (str, Integral))
        if not alone and not isinstance(members, (list, tuple, set, np.ndarray)):
            raise ValueError(
                f"class_map: the class {_short(name)} must have a category or a list "
                f"of them, not {_short(members)}."
            )
        for member in [members] if alone else list(members):
            shares[_number(member, numbers, name), column] = 1
    if not shares.any(axis=0).all():
        empty = classes[~shares.any(axis=0)].tolist()[0]
        raise ValueError(f"class_map: the class {_short(empty)} has no category.")
    twice = np.flatnonzero(shares.sum(axis=1) > 1)
    if len(twice):
        raise ValueError(
            f"class_map: the category {categories[twice[0]]!r} is in two classes."
        )
    return classes, shares


def learned_map(
    probabilities: NDArray[np.float64],
    targets: NDArray[np.int64],
    weights: NDArray[np.floating[Any]],
    n_classes: int,
) -> NDArray[np.float64]:
    """Learn which categories the network sees in the images of each class.

    The expected empirical predictor [1]_: the probability of a class given a category,
    from the probabilities of categories that the network gives for the images.

    Parameters
    ----------
    probabilities : array of shape (n, n_categories)
        Of the categories, for each image.
    targets : array of shape (n,)
        Number of the class of each image.
    weights : array of shape (n,)
        Of the images.
    n_classes : int
        How many classes there are.

    Returns
    -------
    array of shape (n_categories, n_classes)
        Rows sum to 1.

    References
    ----------
    .. [1] Nguyen, Hassner, Seeger, Archambeau, "LEEP: a new measure to evaluate
       transferability of learned representations", ICML, 2020.
    """
    belongs = np.zeros((len(targets), n_classes))
    belongs[np.arange(len(targets)), targets] = weights
    together = probabilities.T @ belongs
    seen = together.sum(axis=1, keepdims=True)
    # A category that was never seen says nothing about the class.
    share = np.divide(
        together, seen, out=np.full_like(together, 1 / n_classes), where=seen > 0
    )
    return np.asarray(share)


def map_by_names(
    classes: NDArray[Any], categories: Sequence[str]
) -> dict[Any, str] | None:
    """Return a `class_map` if all classes are categories, by name or WordNet number."""
    known = set(categories)
    found = {}
    for name in classes.tolist():
        category = imagenet_names().get(name, name) if isinstance(name, str) else name
        if category not in known:
            return None
        found[name] = category
    return found


def _number(member: Any, numbers: Mapping[str, int], of_class: Any) -> int:
    """Return the number of a category that a user has named in some way."""
    is_count = isinstance(member, Integral) and not isinstance(member, (bool, np.bool_))
    if is_count and 0 <= int(member) < len(numbers):
        return int(member)
    if isinstance(member, str):
        name = imagenet_names().get(member, member)
        if name in numbers:
            return numbers[name]
    raise ValueError(
        f"class_map: {_short(member)}, of the class {_short(of_class)}, is no category "
        "of this "
        f"network: neither a name, nor a number from 0 to {len(numbers) - 1}, nor a "
        f"WordNet number such as n02085620. {nearest(str(member), list(numbers))}"
    )


def _short(value: Any) -> str:
    return shorten(repr(value))


class PretrainedCNNClassifier(NetworkClassifier):
    """A pretrained ConvNet as it is: it tells apart what it was trained to.

    Nothing is trained. Without `class_map` its classes are the network's categories,
    such as the 1,000 of ImageNet.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: any of :func:`~skltl.list_backbones`, or a record of your own that
        has a head.
    weights : str, path or None, default="imagenet"
        As for `CNNFeatureTransformer`. A file's categories are taken to be those of the
        usual weights, if there are as many of them.
    class_map : dict, "learn" or None, default=None
        Joins categories to classes of your own. A dictionary gives for each class one
        category or several, by name, number, or WordNet number:
        ``{"dog": ["beagle", 235], "cat": "n02123045"}``; what else the network sees is
        left out of account. ``"learn"`` takes them from labelled images [1]_.
    image_size : int, default=None
        As for `CNNFeatureTransformer`.
    image_shape : tuple of 2 or 3 ints, default=None
        If given, ``X`` is an array (n, d), and each row is an image of this shape.
    batch_size : int or "auto", default="auto"
        Images that cross the network together.
    device : str, default="auto"
        As for `CNNFeatureTransformer`.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        What the network computes in, up to its last layer with parameters; that one
        runs in float32.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        As for `CNNFeatureTransformer`.
    decode : {"exact", "fast"}, default="exact"
        As for `CNNFeatureTransformer`.
    n_jobs : int, default=None
        Threads that decode images.
    random_state : int, RandomState instance or None, default=None
        Of the weights, if they are random.
    verbose : int, default=0
        Whether a progress bar is shown.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        The categories, the classes of `class_map`, or the labels; sorted.
    categories_ : array of shape (n_categories,)
        Names of the network's categories, in the order of its logits.
    class_map_ : array of shape (n_categories, n_classes), or None
        How much of a category's probability goes to each class.
    backbone_ : Backbone
        The record of the network.
    network_ : FrozenPrefix
        The network up to its last layer with parameters.
    head_ : Module
        From there to the logits.
    cut_points_ : list of CutPoint
        The only one: where the head begins.
    preprocessing_ : Preprocessing
        What images go through before the network.
    precision_ : {"float32", "bfloat16"}
        What the network computes in.
    engine_ : {"torch", "compile", "openvino"}
        What ran the network where this was fitted, and runs it where it can.

    See Also
    --------
    CNNFeatureTransformer : Features for a classifier of your own.

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

    _parameter_constraints: dict = {
        "backbone": [str, Backbone],
        "weights": [str, PathLike, None],
        "class_map": [dict, StrOptions({"learn"}), None],
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
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    # What lies between network and head is not pooled.
    _pooling = "flatten"

    def _network_batch_size(self):
        return self.batch_size

    def __init__(
        self,
        backbone="resnet50",
        *,
        weights="imagenet",
        class_map=None,
        image_size=None,
        image_shape=None,
        batch_size="auto",
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.class_map = class_map
        self.image_size = image_size
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y=None, sample_weight=None):
        """Load the network; with ``class_map="learn"``, look at the images, too.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `CNNFeatureTransformer` takes.
        y : array of shape (n,), default=None
            Labels; used with ``class_map="learn"`` only, and else ignored but for their
            number.
        sample_weight : array of shape (n,), default=None
            Weights of the images, likewise.

        Returns
        -------
        PretrainedCNNClassifier
            The classifier itself.

        Raises
        ------
        UnknownBackboneError, WeightsError
            If `backbone` or `weights` name something that is not there, or there is no
            head.
        ValueError
            If `class_map` does not fit the network.
        """
        seed = draw_seed(self.random_state)
        reader = clone(self)
        source = reader._read_images(X, y, reset=True)
        device = resolve_device(self.device)
        resolve_threads(self.n_jobs)
        learns = self.class_map == "learn"
        if learns:
            classes, targets = encode_labels(y, len(source))
            weights = example_weights(sample_weight, None, classes, targets)
        reader._load(seed)
        blocks = reader.network_.blocks
        reader.precision_ = reader._fitted_precision(device)
        reader.engine_ = resolve_engine(self.engine, device, blocks)
        if learns:
            probabilities = softmax(reader._category_logits(X), axis=1)
            shares = learned_map(probabilities, targets, weights, len(classes))
            reader.classes_, reader.class_map_ = classes, shares
        # Only now does anything change: a fit that fails leaves the one before.
        self._read_images(X, reset=True)
        self.__dict__.update(
            {name: value for name, value in vars(reader).items() if name.endswith("_")}
        )
        return self

    def predict_top_k(self, X, k=5):
        """Return the k most probable classes of each image, the best one first.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.
        k : int, default=5
            How many, from 1 to the number of classes.

        Returns
        -------
        array of shape (n, k)
            Of `classes_`.

        Raises
        ------
        ValueError
            If there are less than `k` classes.
        """
        check_is_fitted(self)
        if not isinstance(k, Integral) or not 1 <= int(k) <= len(self.classes_):
            raise ValueError(
                f"k={k!r} must be an integer from 1 to {len(self.classes_)}, how many "
                "classes there are."
            )
        ranked = np.argsort(-self._logits(X), axis=1, kind="stable")
        return self.classes_[ranked[:, :k]]

    def _load(self, seed):
        """Set what `fit` sets, as far as it does not depend on images."""
        backbone, weights, preprocessing = resolve_network(
            self.backbone, self.weights, self.image_size
        )
        self.network_, self.head_ = load_with_head(
            backbone, weights, seed if weights is None else None
        )
        self.backbone_ = backbone
        self.preprocessing_ = preprocessing
        block = list(self.network_.blocks)[-1]
        self.cut_points_ = [CutPoint(block, block)]
        shape = block_shapes(backbone, preprocessing.crop_size, (block,))[block]
        with torch.inference_mode():
            example = torch.zeros(1, *shape, dtype=torch.float32, device="cpu")
            n_categories = self.head_(example).shape[1]
        self.categories_ = categories_of(backbone, weights, n_categories)
        self.classes_, self.class_map_ = np.sort(self.categories_), None
        if isinstance(self.class_map, dict):
            names = [str(name) for name in self.categories_]
            self.classes_, self.class_map_ = map_of_names(self.class_map, names)

    def _logits(self, X):
        """Return the logits of the classes: of each, the sum of its categories'.

        In logarithms, so that a network that is very sure keeps telling the others
        apart.
        """
        logits = self._category_logits(X)
        if self.class_map_ is None:
            # In C order: otherwise `softmax` sums a single row in another order.
            return np.ascontiguousarray(logits[:, np.argsort(self.categories_)])
        columns = [logsumexp(logits, axis=1, b=one) for one in self.class_map_.T]
        return np.stack(columns, axis=1)

    def _category_logits(self, X):
        check_is_fitted(self)
        return self._head_outputs(X, len(self.categories_))

    def _run_head(self, rows):
        with torch.inference_mode():
            return self.head_(rows.reshape(len(rows), *self._map_shape())).double()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.class_map == "learn"
        tags.non_deterministic = self.weights is None and self.random_state is None
        # How good it is, is not for these images to say: it learns nothing from them.
        tags.classifier_tags.poor_score = self.class_map != "learn"
        return tags

    def __getstate__(self):
        state = super().__getstate__()
        if "head_" in state:
            state["head_"] = head_state(self.head_)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "head_" in state:
            n_categories = len(self.categories_)
            self.head_ = head_from_state(self.backbone_, state["head_"], n_categories)


def categories_of(backbone, weights, n_categories):
    """Name the categories; where nobody knows their names they are numbers."""
    for known in (weights, backbone.weights[0]):
        if known is not None and len(known.categories) == n_categories:
            return np.array(unique(known.categories))
    return np.arange(n_categories)

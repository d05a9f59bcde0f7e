"""Base class of the estimators whose ``X`` is images: input, tags and persistence."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from inspect import signature
from numbers import Integral
from os import PathLike, fspath
from typing import Any

from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import validate_data

from skltl._collections import check_not_dask
from skltl._parameters import DTYPES
from skltl._sklearn import IMAGE_SIZES, InvalidParameterError, StrOptions
from skltl.exceptions import shorten
from skltl.images import (
    MODES,
    ImageSource,
    Preprocessing,
    check_not_masked,
    check_reader,
    check_value_range,
    is_tensor,
    read_images,
    tensor_to_array,
)
from skltl.inference import (
    ENGINES,
    from_format_2,
    prefix_from_state,
    prefix_reference,
    prefix_state,
)
from skltl.networks import (
    Backbone,
    ResolvedLayer,
    get_backbone,
    is_included,
    is_module,
    is_registered,
    versions,
)

# Version of the format of a saved estimator, raised when its state changes.
STATE_FORMAT = 3

# Attributes that describe the ``X`` of `fit`.
INPUT_ATTRIBUTES = ("n_features_in_", "feature_names_in_", "_fitted_image_shape")

# Parameters that a fitted estimator does not save. A file from somebody else must not
# decide where features are written, nor a training script how verbose a service is.
LEFT_OUT_OF_FILES = {"cache": None, "checkpoint": None, "verbose": 0}

MAX_MESSAGE_LENGTH = 400

# Whether estimators are pickled for another process of the same computation.
_IN_TRANSIT = ContextVar("in transit", default=False)


@contextmanager
def in_transit() -> Iterator[None]:
    """Pickle or unpickle estimators for other processes of the same computation.

    Unlike a file, the pickle keeps the parameters, `cache` included, and a backbone
    that was registered in this process. Both sides must be in transit: a file cannot
    ask for it.
    """
    token = _IN_TRANSIT.set(True)
    try:
        yield
    finally:
        _IN_TRANSIT.reset(token)


def is_in_transit() -> bool:
    """Return whether `in_transit` is active, so that nothing is left out."""
    return _IN_TRANSIT.get()


class ImageEstimator(BaseEstimator):
    """Base class of the estimators whose ``X`` is images.

    With `image_shape`, ``X`` is an ordinary table and everything that scikit-learn
    promises for tables holds, `n_features_in_` included. Otherwise ``X`` is a sequence
    of images.

    A pickled estimator is self-contained and plain: weights as numpy arrays, configs as
    dictionaries. It loads on a machine without a GPU. Estimators with a parameter
    `store_weights` may leave out the weights; in `fit` they set `_fitted_weights`, the
    value of `weights` at that time.
    """

    _parameter_constraints: dict = {
        "backbone": [str, Backbone],
        "weights": [str, PathLike, None],
        "image_size": [IMAGE_SIZES, tuple, list, None],
        "crop": [StrOptions(set(MODES)), None],
        "image_shape": [tuple, list, None],
        "device": [str],
        "precision": [StrOptions({"auto", *DTYPES})],
        "engine": [StrOptions({"auto", *ENGINES})],
        "decode": [StrOptions({"exact", "fast"})],
        "reader": [callable, None],
        "value_range": [tuple, list, None],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def _validate_params(self):
        """Validate the parameters; the message is short enough to be read."""
        _refuse_live_objects(self.get_params(deep=False), type(self).__name__)
        try:
            super()._validate_params()
        except InvalidParameterError as error:
            message = shorten(str(error), MAX_MESSAGE_LENGTH)
            raise InvalidParameterError(message) from None
        check_reader(getattr(self, "reader", None))
        check_value_range(getattr(self, "value_range", None))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        is_table = self.image_shape is not None
        tags.input_tags.two_d_array = is_table
        tags.input_tags.three_d_array = not is_table
        tags.input_tags.string = not is_table
        return tags

    # Unlike a file, a copy in memory keeps everything.

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo):
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self):
        state = dict(super().__getstate__())
        if _has_fitted_attributes(state):
            state["_format"] = STATE_FORMAT
            state["_versions"] = versions()
            _leave_out(state)
        if "network_" in state:
            state["network_"] = self._network_state()
            state["layers_"] = [list(point) for point in self.layers_]
            state["preprocessing_"] = asdict(self.preprocessing_)
            del state["backbone_"]  # part of the state of the network
            state.pop("bad_images_", None)  # of the last call of `transform`
            state.pop("_recorder", None)  # deeper than the truncated network
        for name in {"weights", "cache"} & state.keys():
            state[name] = path_as_text(state[name])
        return state

    def _network_state(self):
        """Return the network as plain data, with its weights or their name."""
        size, by_name = self.preprocessing_.size, self._has_known_backbone()
        network = self.backbone_, self.network_, size
        if getattr(self, "store_weights", True):
            return prefix_state(*network, by_name)
        return prefix_reference(*network, self._fitted_weights, by_name)

    def _has_known_backbone(self):
        """Return whether the name of the backbone is enough where this is loaded."""
        is_known = is_included if is_in_transit() else is_registered
        return isinstance(self.backbone, str) and is_known(self.backbone_)

    def __setstate__(self, state):
        state = dict(state)
        if _has_fitted_attributes(state):  # the file may not come from `__getstate__`
            state = _current_format(state, type(self).__name__)
            _leave_out(state)
        state = _defaults(type(self)) | state  # of parameters that are newer
        if "network_" in state:
            backbone, network = prefix_from_state(state["network_"])
            state["backbone_"], state["network_"] = backbone, network
            state["layers_"] = [ResolvedLayer(*point) for point in state["layers_"]]
            state["preprocessing_"] = Preprocessing(**state["preprocessing_"])
            # Files of earlier versions do not have it for all estimators.
            state.setdefault("_fitted_weights", state["weights"])
        super().__setstate__(state)


def path_as_text(value: Any) -> Any:
    """Return paths as text, since their classes depend on the system; others as is."""
    return fspath(value) if isinstance(value, PathLike) else value


def read_images_of(
    estimator: Any, X: Any, y: Any = None, *, reset: bool = False
) -> ImageSource:
    """Return ``X`` as an image source; no image is decoded.

    With `reset`, as in `fit`, the attributes that describe ``X`` are set.
    """
    if reset:
        for name in INPUT_ATTRIBUTES:
            vars(estimator).pop(name, None)
        shape = estimator.image_shape  # a list belongs to the user, who may change it
        estimator._fitted_image_shape = None if shape is None else tuple(shape)
    check_not_dask(X)
    image_shape = estimator._fitted_image_shape
    if image_shape is None:
        is_strict = getattr(estimator, "on_error", "raise") == "raise"
        options = {"check_items": is_strict, "reader": estimator.reader}
    elif estimator.reader is not None:
        raise ValueError("image_shape and reader exclude each other: rows are pixels.")
    else:
        check_not_masked(X)
        X = tensor_to_array(X) if is_tensor(X) else _with_numpy_types(X)
        X = validate_data(estimator, X, reset=reset, dtype="numeric")
        options = {"image_shape": image_shape}
    options["n_channels"] = n_channels_of(estimator, reset)
    value_range = estimator.value_range
    if value_range is not None:
        options["value_range"] = tuple(map(float, value_range))
    source = read_images(X, **options)
    if y is not None:
        check_consistent_length(source, y)
    return source


def n_channels_of(estimator: Any, reset: bool = False) -> int:
    """Return the number of channels that the network takes; in `fit`, the next one."""
    if reset or not hasattr(estimator, "preprocessing_"):
        return get_backbone(estimator.backbone).n_channels
    return estimator.preprocessing_.n_channels


def _defaults(kind):
    """Return the default values of the parameters of a class of estimators."""
    parameters = signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _leave_out(state):
    if is_in_transit():
        return
    left_out = LEFT_OUT_OF_FILES.keys() & state.keys()
    state.update({name: LEFT_OUT_OF_FILES[name] for name in left_out})


def _current_format(state, class_name):
    """Return a state in the current format, without what is said of its origin."""
    found, origin = state.pop("_format", None), state.pop("_versions", {})
    has_own_head = "structure" in (state.get("head_") or {})
    if found == 2 and not has_own_head:
        return from_format_2(state) if "network_" in state else state
    if found != STATE_FORMAT:
        raise ValueError(
            f"This {class_name} was saved by skltl {origin.get('skltl', '0.1')} in "
            f"format {found}, and skltl {versions()['skltl']} reads format "
            f"{STATE_FORMAT}. Load it with that version, or fit it again."
        )
    return state


def for_file(state, name):
    """Return the state of a fitted estimator for a file.

    The parameter `name` is another estimator, whose settings that are left out of files
    are left out of it, too.
    """
    estimator = state.get(name)
    if estimator is None or is_in_transit() or not _has_fitted_attributes(state):
        return state
    return {**state, name: clone_for_file(estimator)}


def clone_for_file(estimator):
    """Return a clone, also of a pipeline, that writes nowhere and prints nothing."""
    cloned = clone(estimator)
    for part in (cloned, *cloned.get_params().values()):
        if isinstance(part, ImageEstimator):
            names = LEFT_OUT_OF_FILES.keys() & part.get_params(deep=False).keys()
            part.set_params(**{name: LEFT_OUT_OF_FILES[name] for name in names})
    return cloned


def is_fitted(estimator: Any) -> bool:
    """Return whether an estimator is fitted."""
    return _has_fitted_attributes(vars(estimator))


def _has_fitted_attributes(state):
    """Return whether a state is of a fitted estimator, by the rule of scikit-learn."""
    return any(name.endswith("_") and not name.startswith("_") for name in state)


def _refuse_live_objects(params, estimator_name):
    """Raise an error that says what to pass instead of a module or a state dict."""
    if is_module(params.get("backbone")):
        raise InvalidParameterError(
            f"The 'backbone' parameter of {estimator_name} must be a name or a "
            f"Backbone, not a module ({type(params['backbone']).__name__}). Make a "
            "Backbone of it: skltl.Backbone.from_module(name, module, "
            "preprocessing=...)."
        )
    if isinstance(params.get("weights"), Mapping):
        raise InvalidParameterError(
            f"The 'weights' parameter of {estimator_name} must be a name, a file or "
            "None, not a state dict. Save it first: torch.save(state_dict, "
            "'weights.pt'), and pass weights='weights.pt'."
        )


def _with_numpy_types(X):
    """Convert a table of one extension type (pandas' UInt8, Arrow's) to numpy's.

    scikit-learn converts extension types to float, which would lose the range of uint8.
    """
    if hasattr(X, "iloc") and X.ndim == 1:
        raise ValueError(
            "Expected 2D array, got 1D array instead: with image_shape, X has a column "
            "for each value of a pixel. Pass np.stack(X) if its items are rows."
        )
    types = set(X.dtypes) if hasattr(X, "iloc") else set()
    numpy_type = getattr(next(iter(types)), "numpy_dtype", None) if types else None
    return X.astype(numpy_type) if len(types) == 1 and numpy_type is not None else X

"""What all estimators on images share: reading ``X``, tags, pickling. Nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike, fspath

from sklearn.base import BaseEstimator
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import validate_data

from skltl._sklearn import InvalidParameterError
from skltl.exceptions import shorten
from skltl.images import (
    Preprocessing,
    check_not_masked,
    is_tensor,
    read_images,
    tensor_to_array,
)
from skltl.inference import prefix_from_state, prefix_state
from skltl.networks import CutPoint, is_module, is_registered

# Raised when what a saved estimator holds changes.
STATE_FORMAT = 1

# What a fitted estimator needs no more. A file that somebody else has made must not
# decide where features are written, nor a training script how talkative a service is.
LEFT_OUT_OF_FILES = {"cache": None, "checkpoint": None, "verbose": 0}

MOST_CHARACTERS = 400


class ImageEstimator(BaseEstimator):
    """Base of the estimators whose ``X`` is images.

    With `image_shape`, ``X`` is an ordinary table of numbers and everything
    scikit-learn promises for tables holds, `n_features_in_` included. Without, ``X`` is
    a sequence of images.

    A pickled estimator is self-contained and plain: the weights up to the cut as numpy
    arrays, records as dictionaries. It loads on a machine without a GPU. Once fitted,
    it is saved without `cache`, `checkpoint` and `verbose`.
    """

    def _read_images(self, X, y=None, *, reset):
        """Recognise ``X``, as long as `y`; nothing is decoded yet."""
        if reset:
            shape = self.image_shape  # a list is the user's, and may change
            self._fitted_image_shape = None if shape is None else tuple(shape)
        image_shape = self._fitted_image_shape
        if image_shape is None:
            if reset:  # what a fit on rows has left
                self.__dict__.pop("n_features_in_", None)
                self.__dict__.pop("feature_names_in_", None)
            source = read_images(X)
        else:
            check_not_masked(X)
            X = tensor_to_array(X) if is_tensor(X) else _with_numpy_types(X)
            rows = validate_data(self, X, reset=reset, dtype="numeric")
            source = read_images(rows, image_shape=image_shape)
        if y is not None:
            check_consistent_length(source, y)
        return source

    def _validate_params(self):
        """Check the parameters as scikit-learn does; say no more than people read."""
        _refuse_live_objects(self.get_params(deep=False), type(self).__name__)
        try:
            super()._validate_params()
        except InvalidParameterError as error:
            raise InvalidParameterError(shorten(str(error), MOST_CHARACTERS)) from None

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        has_rows = self.image_shape is not None
        tags.input_tags.two_d_array = has_rows
        tags.input_tags.three_d_array = not has_rows
        tags.input_tags.string = not has_rows
        return tags

    # In memory a copy has everything, unlike a file.

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
        if _is_fitted(state):
            state["_format"] = STATE_FORMAT
            _leave_out(state)
        if "network_" in state:
            by_name = isinstance(self.backbone, str) and is_registered(self.backbone_)
            state["network_"] = prefix_state(self.backbone_, self.network_, by_name)
            state["cut_points_"] = [list(point) for point in self.cut_points_]
            state["preprocessing_"] = asdict(self.preprocessing_)
            del state["backbone_"]  # a part of the network's state
            state.pop("_recorder", None)  # more of the network than the cut needs
        for name in ("weights", "cache"):
            if isinstance(state.get(name), PathLike):  # paths differ between systems
                state[name] = fspath(state[name])
        return state

    def __setstate__(self, state):
        state = dict(state)
        if state.pop("_format", None) != STATE_FORMAT and _is_fitted(state):
            raise ValueError(
                f"This {type(self).__name__} was saved by another version of skltl, "
                "whose files this one does not read. Fit it again."
            )
        if _is_fitted(state):  # whoever has made the file
            _leave_out(state)
        if "network_" in state:
            backbone, network = prefix_from_state(state["network_"])
            state["backbone_"], state["network_"] = backbone, network
            state["cut_points_"] = [CutPoint(*point) for point in state["cut_points_"]]
            state["preprocessing_"] = Preprocessing(**state["preprocessing_"])
        super().__setstate__(state)


def _leave_out(state):
    left_out = LEFT_OUT_OF_FILES.keys() & state.keys()
    state.update({name: LEFT_OUT_OF_FILES[name] for name in left_out})


def _is_fitted(state):
    """Tell from an estimator's state, as scikit-learn does, whether it is fitted."""
    return any(name.endswith("_") and not name.startswith("_") for name in state)


def _refuse_live_objects(params, estimator_name):
    """Refuse networks and weights in memory, with words on what to pass instead."""
    if is_module(params.get("backbone")):
        raise InvalidParameterError(
            f"The 'backbone' parameter of {estimator_name} must be a name or a "
            f"Backbone, not a module ({type(params['backbone']).__name__}). Make one "
            "of your network's blocks: skltl.Backbone.from_blocks(name, blocks, "
            "preprocessing=...)."
        )
    if isinstance(params.get("weights"), Mapping):
        raise InvalidParameterError(
            f"The 'weights' parameter of {estimator_name} must be a name, a file or "
            "None, not a state dict. Save it first: torch.save(state_dict, "
            "'weights.pt'), and pass weights='weights.pt'."
        )


def _with_numpy_types(X):
    """Turn a table of one of pandas' own types (UInt8, Arrow's) into the numpy type.

    scikit-learn makes floats of them, and uint8 would lose the meaning of its 255.
    """
    types = set(getattr(X, "dtypes", ())) if hasattr(X, "iloc") else set()
    numpy_type = getattr(next(iter(types)), "numpy_dtype", None) if types else None
    return X.astype(numpy_type) if len(types) == 1 and numpy_type is not None else X

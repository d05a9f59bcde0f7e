"""What all estimators on images share: reading ``X``, tags, pickling. Nothing else."""

from __future__ import annotations

from dataclasses import asdict
from os import PathLike, fspath

from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from skltl.backbones import (
    CutPoint,
    get_backbone,
    is_registered,
    prefix_from_state,
    prefix_state,
)
from skltl.images import (
    Preprocessing,
    check_not_masked,
    is_tensor,
    read_images,
    tensor_to_array,
)


class ImageEstimator(BaseEstimator):
    """Base of the estimators whose ``X`` is images.

    With `image_shape`, ``X`` is an ordinary table of numbers and everything
    scikit-learn promises for tables holds, `n_features_in_` included. Without, ``X`` is
    a sequence of pictures.

    A pickled estimator is self-contained and plain: the weights up to the cut as numpy
    arrays, records as dictionaries. It loads on a machine without a GPU.
    """

    def _read_images(self, X, *, reset):
        """Recognise ``X``; nothing is decoded yet."""
        if self.image_shape is None:
            if reset:  # what a fit on rows has left
                self.__dict__.pop("n_features_in_", None)
                self.__dict__.pop("feature_names_in_", None)
            return read_images(X)
        check_not_masked(X)
        X = tensor_to_array(X) if is_tensor(X) else _with_numpy_types(X)
        rows = validate_data(self, X, reset=reset, dtype="numeric")
        return read_images(rows, image_shape=tuple(self.image_shape))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        has_rows = self.image_shape is not None
        tags.input_tags.two_d_array = has_rows
        tags.input_tags.three_d_array = not has_rows
        tags.input_tags.string = not has_rows
        return tags

    def __getstate__(self):
        state = dict(super().__getstate__())
        if "network_" in state:
            by_name = isinstance(self.backbone, str) and is_registered(self.backbone_)
            state["backbone_"] = self.backbone_.name if by_name else self.backbone_
            state["cut_points_"] = [list(point) for point in self.cut_points_]
            state["network_"] = prefix_state(self.network_)
            state["preprocessing_"] = asdict(self.preprocessing_)
            state.pop("_recorder", None)  # more of the network than the cut needs
        for name in ("weights", "cache"):
            if isinstance(state.get(name), PathLike):  # paths differ between systems
                state[name] = fspath(state[name])
        return state

    def __setstate__(self, state):
        state = dict(state)
        if "network_" in state:
            backbone = get_backbone(state["backbone_"])
            cut_points = [CutPoint(*point) for point in state["cut_points_"]]
            blocks = [point.block for point in cut_points]
            state["backbone_"] = backbone
            state["cut_points_"] = cut_points
            state["network_"] = prefix_from_state(backbone, state["network_"], blocks)
            state["preprocessing_"] = Preprocessing(**state["preprocessing_"])
        super().__setstate__(state)


def _with_numpy_types(X):
    """Turn a table of one of pandas' own types (UInt8, Arrow's) into the numpy type.

    scikit-learn makes floats of them, and uint8 would lose the meaning of its 255.
    """
    types = set(getattr(X, "dtypes", ())) if hasattr(X, "iloc") else set()
    numpy_type = getattr(next(iter(types)), "numpy_dtype", None) if types else None
    return X.astype(numpy_type) if len(types) == 1 and numpy_type is not None else X

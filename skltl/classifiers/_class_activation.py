"""Where in a picture a class was seen: gradient-weighted class activation maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn.functional import interpolate

from skltl._device import resolve_threads
from skltl.backbones import block_shapes, resolve_layer
from skltl.classifiers._conversion import head_of_pipeline, parts_of_pipeline
from skltl.classifiers._labels import columns_of
from skltl.classifiers._pretrained import PretrainedCNNClassifier
from skltl.classifiers._tuned_network import TunedNetwork
from skltl.classifiers._views import decode_crops
from skltl.features import extract_features


@dataclass(frozen=True)
class ClassActivation:
    """Pictures, as a network sees them, and where it saw a class.

    Parameters
    ----------
    pictures : array of shape (n, h, w, 3)
        uint8, or float32 in [0, 1].
    maps : array of shape (n, h, w)
        From 0, not at all, to 1, the most in this picture.
    labels : array of shape (n,)
        Which class was looked for in each.
    """

    pictures: NDArray[Any]
    maps: NDArray[np.float32]
    labels: NDArray[Any]


def class_activation(estimator: Any, X: Any, labels: Any = None) -> ClassActivation:
    """Compute where in pictures a classifier saw a class.

    The gradient of a class's logit with respect to the feature map at the cut, averaged
    over the map, weighs the map's channels [1]_. For a linear classifier on averaged
    features these are its coefficients.

    Parameters
    ----------
    estimator : classifier
        Fitted: one of skltl's, or a pipeline of a `CNNFeatureTransformer`, a
        ``StandardScaler`` or none, and a linear classifier.
    X : sequence of n pictures, or array of shape (n, d)
        Of any kind that it takes.
    labels : array of shape (n,), a label, or None
        Which class to look for in each picture; ``None`` is the one that is predicted.

    Returns
    -------
    ClassActivation
        Pictures and maps.

    Raises
    ------
    ValueError
        If the estimator is of another kind, or it is cut where there is no map.

    References
    ----------
    .. [1] Selvaraju et al., "Grad-CAM: visual explanations from deep networks via
       gradient-based localization", ICCV, 2017.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)  # of a search
    if hasattr(estimator, "strategy_") and hasattr(estimator, "estimator_"):
        estimator = estimator.estimator_
    check_is_fitted(estimator)
    reader, block, head = _taken_apart(estimator)
    shape = block_shapes(reader.backbone_, reader.preprocessing_.crop_size, (block,))
    if len(shape[block]) != 3:
        raise ValueError(
            f"At the cut, behind {block!r}, there is no map but a vector of "
            f"{shape[block][0]} numbers: a class has no place there."
        )
    source = reader._read_images(X, reset=False)
    labels = estimator.predict(X) if labels is None else np.asarray(labels)
    labels = np.broadcast_to(labels, len(source)) if labels.ndim == 0 else labels
    check_consistent_length(source, labels)
    columns = columns_of(estimator.classes_, labels)
    threads = resolve_threads(reader.n_jobs)
    recipe = reader._make_recipe(
        reader.backbone_, reader.network_, (block,), reader.preprocessing_, "flatten"
    )
    rows = extract_features(source, recipe, [block], threads)
    maps = _weighed(torch.from_numpy(rows).reshape(-1, *shape[block]), head, columns)
    size = (reader.preprocessing_.crop_size,) * 2
    shown = interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    pictures = decode_crops(source, reader.preprocessing_, threads)
    return ClassActivation(pictures, shown[:, 0].numpy(), labels)


def _weighed(feature_maps: Any, head: nn.Module, columns: NDArray[np.int64]) -> Any:
    """Return the maps (n, h', w'), each with a maximum of 1 if a class is there."""
    maps = []
    for feature_map, column in zip(feature_maps, columns, strict=True):
        seen = feature_map[None].double().requires_grad_(True)
        logit = head(seen)[0, column]
        (gradient,) = torch.autograd.grad(logit, seen)
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        found = (weights * seen.detach()).sum(dim=1)[0].clamp(min=0)
        maps.append(found / found.max().clamp(min=1e-12))
    return torch.stack(maps).float()


def _taken_apart(estimator: Any) -> tuple[Any, str, nn.Module]:
    """Return what reads and runs, the block behind which the map lies, and the rest."""
    if isinstance(estimator, Pipeline):
        transformer, scaler, classifier = parts_of_pipeline(estimator)
        head = head_of_pipeline(transformer.pooling, scaler, classifier)
        return transformer, transformer.cut_points_[0].block, head.double()
    if isinstance(estimator, TunedNetwork):
        return estimator, estimator.cut_points_[0].block, estimator.head_
    if isinstance(estimator, PretrainedCNNClassifier):
        block = resolve_layer(estimator.backbone_, "last").block
        blocks = list(estimator.network_.blocks.items())
        first = [name for name, _ in blocks].index(block) + 1
        behind = nn.Sequential(*(one for _, one in blocks[first:]), estimator.head_)
        return estimator, block, _Mapped(behind, estimator.class_map_)
    raise ValueError(
        f"{type(estimator).__name__} is neither a classifier of skltl nor a pipeline "
        "of a CNNFeatureTransformer and a linear classifier."
    )


class _Mapped(nn.Module):
    """The rest of a pretrained network, and the user's classes made of its own."""

    def __init__(self, behind: nn.Module, class_map: Any) -> None:
        super().__init__()
        self._behind = behind
        self._shares = None if class_map is None else torch.from_numpy(class_map)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, n_classes) in float64."""
        logits: torch.Tensor = self._behind(feature_map.float()).double()
        if self._shares is None:
            return logits
        return torch.log(logits.softmax(dim=1) @ self._shares + 1e-300)

"""``GradCAMDisplay``: gradient-weighted class activation maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import nn
from torch.nn.functional import interpolate

from skltl._parameters import resolve_threads
from skltl.displays._layout import as_title, axes_library, draw_image, grid_of_axes
from skltl.features import extract_features
from skltl.finetuning import (
    TunedNetwork,
    columns_of,
    decode_crops,
    head_of_pipeline,
    parts_of_pipeline,
    unwrapped,
)
from skltl.networks import block_shapes, resolve_layer
from skltl.pretrained import PretrainedCNNClassifier


@dataclass(frozen=True)
class ClassActivation:
    """Images, as a network sees them, and where it saw a class.

    Parameters
    ----------
    images : array of shape (n, h, w, 3)
        uint8, or float32 in [0, 1].
    maps : array of shape (n, h, w)
        From 0, not at all, to 1, the most at one place of the feature map (between
        places it is interpolated, so that the highest value may be lower).
    labels : array of shape (n,)
        Which class was looked for in each.
    scores : array of shape (n,)
        The classifier's score of this class, whose gradient weighs the map: the column
        of its `decision_function`. With two classes, the decision for the second class,
        and the negated decision for the first.
    """

    images: NDArray[Any]
    maps: NDArray[np.float32]
    labels: NDArray[Any]
    scores: NDArray[np.float64]


def class_activation(estimator: Any, X: Any, labels: Any = None) -> ClassActivation:
    """Compute where in images a classifier saw a class.

    The gradient of a class's score with respect to the feature map, averaged over the
    map, weighs the map's channels [1]_. The score is that of `decision_function`: for a
    linear classifier on averaged features its gradient holds the coefficients.

    Parameters
    ----------
    estimator : classifier
        Fitted: one of skltl's, or a pipeline of a `CNNFeatureTransformer`, a
        ``StandardScaler`` or none, and a linear classifier; or a search over one.
    X : sequence of n images, or array of shape (n, d)
        Of any kind that it takes.
    labels : array of shape (n,), a label, or None
        Which class to look for in each image; ``None`` is the one that is predicted.

    Returns
    -------
    ClassActivation
        Images and maps.

    Raises
    ------
    ValueError
        If the estimator is of another kind, or it is cut where there is no map.

    References
    ----------
    .. [1] Selvaraju et al., "Grad-CAM: visual explanations from deep networks via
       gradient-based localization", ICCV, 2017.
    """
    estimator = unwrapped(estimator)
    check_is_fitted(estimator)
    reader, block, head = _taken_apart(estimator)
    shape = _map_shape(reader, block)
    source = reader._read_images(X, reset=False)
    labels = estimator.predict(X) if labels is None else np.asarray(labels)
    is_single = labels.ndim == 0
    labels = np.broadcast_to(labels, len(source)) if is_single else column_or_1d(labels)
    check_consistent_length(source, labels)
    columns = columns_of(estimator.classes_, labels)
    threads = resolve_threads(reader.n_jobs)
    recipe = reader._make_recipe(
        reader.backbone_, reader.network_, (block,), reader.preprocessing_, "flatten"
    )
    rows = extract_features(source, recipe, [block], threads)
    feature_maps = torch.from_numpy(rows).reshape(-1, *shape)
    maps, scores = _weighed(feature_maps, _Scores(head), columns)
    size = (reader.preprocessing_.crop_size,) * 2
    shown = interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    images = decode_crops(source, reader.preprocessing_, threads)
    return ClassActivation(images, shown[:, 0].numpy(), labels, scores)


def _map_shape(reader: Any, block: str) -> tuple[int, ...]:
    """Return the shape (c, h, w) of the feature map after a block."""
    size = reader.preprocessing_.crop_size
    shape = block_shapes(reader.backbone_, size, (block,))[block]
    if len(shape) == 3:
        return shape
    names = {point.block: point.name for point in reader.cut_points_}
    size_or_shape = f"size {shape[0]}" if len(shape) == 1 else f"shape {shape}"
    kind = "a vector" if len(shape) == 1 else "an output"
    raise ValueError(
        "Grad-CAM needs a spatial feature map, but layer "
        f"{names.get(block, block)!r} returns {kind} of {size_or_shape}."
    )


def _weighed(
    feature_maps: torch.Tensor, score: nn.Module, columns: NDArray[np.int64]
) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Return maps (n, h', w') with a maximum of 1 or 0, and the scores (n,)."""
    maps, scores = [], []
    for feature_map, column in zip(feature_maps, columns, strict=True):
        with torch.inference_mode(False), torch.enable_grad():
            seen = feature_map[None].double().requires_grad_(True)  # (1, c, h', w')
            of_class = score(seen)[0, column]
            (gradient,) = torch.autograd.grad(of_class, seen)
        weights = gradient.mean(dim=(2, 3), keepdim=True)  # (1, c, 1, 1)
        found = (weights * seen.detach()).sum(dim=1)[0].clamp(min=0)  # (h', w')
        maps.append(found / found.max().clamp(min=1e-300))
        scores.append(of_class.item())
    return torch.stack(maps).float(), np.array(scores)


def _taken_apart(estimator: Any) -> tuple[Any, str, nn.Module]:
    """Return what reads and runs, the block behind which the map lies, and the rest."""
    if isinstance(estimator, Pipeline):
        transformer, scaler, classifier = parts_of_pipeline(estimator)
        pooling = getattr(transformer, "pooling_", transformer.pooling)
        head = head_of_pipeline(pooling, scaler, classifier)
        return transformer, transformer.cut_points_[0].block, head
    if isinstance(estimator, TunedNetwork):
        return estimator, estimator.cut_points_[0].block, estimator.head_
    if isinstance(estimator, PretrainedCNNClassifier):
        block = resolve_layer(estimator.backbone_, "last").block
        blocks = list(estimator.network_.blocks.items())
        first = [name for name, _ in blocks].index(block) + 1
        behind = nn.Sequential(*(one for _, one in blocks[first:]), estimator.head_)
        return estimator, block, _OfClasses(behind, estimator)
    raise ValueError(
        f"{type(estimator).__name__} is neither a classifier of skltl nor a pipeline "
        "of a CNNFeatureTransformer and a linear classifier."
    )


class _OfClasses(nn.Module):
    """The rest of a pretrained network, from categories to the classifier's classes."""

    def __init__(self, behind: nn.Module, classifier: Any) -> None:
        super().__init__()
        self._behind = behind
        # The network's categories stand in another order than the sorted classes.
        self._order = torch.from_numpy(np.argsort(classifier.categories_))
        self._log_shares = None
        if classifier.class_map_ is not None:
            shares = torch.from_numpy(classifier.class_map_)
            self._has_categories = shares.any(dim=0)
            # The gradient of a class without any would be NaN for the others, too.
            self._log_shares = shares.masked_fill(~self._has_categories, 1).log()

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, n_classes) in float64."""
        logits: torch.Tensor = self._behind(feature_map.float()).double()
        if self._log_shares is None:
            return logits[:, self._order]
        of_classes = torch.logsumexp(logits[:, :, None] + self._log_shares, dim=1)
        return of_classes.masked_fill(~self._has_categories, -torch.inf)


class _Scores(nn.Module):
    """What `decision_function` gives, with a column for each of two classes, too."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = head

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return the scores (n, n_classes)."""
        logits: torch.Tensor = self._head(feature_map)
        if logits.shape[1] > 2:
            return logits
        decision = logits[:, 1] - logits[:, 0]
        return torch.stack([-decision, decision], dim=1)


class GradCAMDisplay:
    """Images under maps of where a class was seen.

    Make one with :meth:`from_estimator`.

    Parameters
    ----------
    images : array of shape (n, h, w, 3)
        As the network sees them: uint8, or float32 in [0, 1].
    maps : array of shape (n, h, w)
        From 0 to 1.
    labels : array of shape (n,)
        Which class was looked for in each.

    Attributes
    ----------
    axes_ : array of matplotlib Axes
        After a plot.
    figure_ : matplotlib Figure
        Likewise.

    Notes
    -----
    The map is as coarse as the feature map at the cut, 7 x 7 at the end of most
    networks, and drawn smoothly over the image [1]_.

    References
    ----------
    .. [1] Selvaraju et al., "Grad-CAM: visual explanations from deep networks via
       gradient-based localization", ICCV, 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import GradCAMDisplay
    >>> images = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    >>> GradCAMDisplay(images, np.ones((1, 8, 8)), ["cat"]).labels
    ['cat']
    """

    def __init__(self, images, maps, labels):
        self.images = images
        self.maps = maps
        self.labels = labels

    @classmethod
    def from_estimator(cls, estimator, X, labels=None, *, n_columns=6):
        """Compute the maps, and draw them.

        Parameters
        ----------
        estimator : classifier
            Fitted: one of skltl's, or a pipeline of a `CNNFeatureTransformer`, a
            ``StandardScaler`` or none, and a linear classifier; or a search over one.
        X : sequence of n images, or array of shape (n, d)
            Of any kind that it takes.
        labels : array of shape (n,) or a label, default=None
            Which class to look for in each image; ``None`` is the one that is
            predicted. One label stands for all images.
        n_columns : int, default=6
            How many side by side.

        Returns
        -------
        GradCAMDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator is of another kind, or it is cut where there is no map.
        """
        axes_library()
        found = class_activation(estimator, X, labels)
        display = cls(found.images, found.maps, found.labels)
        return display.plot(n_columns=n_columns)

    def plot(self, *, n_columns=6, alpha=0.5, cmap="inferno"):
        """Draw the images under their maps.

        Parameters
        ----------
        n_columns : int, default=6
            How many side by side.
        alpha : float, default=0.5
            How much of a map covers the image, from 0 to 1.
        cmap : str, default="inferno"
            Matplotlib's colours of a map.

        Returns
        -------
        GradCAMDisplay
            The display itself.
        """
        axes = grid_of_axes(len(self.images), n_columns, height=2.1)
        for ax, image, seen, label in zip(
            axes, self.images, self.maps, self.labels, strict=True
        ):
            draw_image(ax, image)
            ax.imshow(seen, cmap=cmap, alpha=alpha, vmin=0, vmax=1)
            title = as_title(label)
            ax.set_title(title, fontsize="small", color="dimgray", parse_math=False)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self

"""``GradCAMDisplay``: gradient-weighted class activation maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch.nn.functional import interpolate

from skltl._estimator import read_images_of
from skltl._nested import unwrapped
from skltl._parameters import resolve_threads
from skltl._sklearn import take
from skltl.displays._images import check_n_images
from skltl.displays._layout import (
    as_title,
    draw_beside,
    draw_image,
    import_pyplot,
    resolve_axes,
)
from skltl.displays._predictions import predict
from skltl.features import extract_features, extraction_config, output_layout
from skltl.finetuning import (
    FineTunedCNNClassifier,
    columns_of,
    head_of_pipeline,
    parts_of_pipeline,
)
from skltl.images import ImageSource, decode_crops
from skltl.networks import Block, Layout, is_known_code, skeleton
from skltl.pretrained import PretrainedCNNClassifier

# From an output of a network, in float64, to logits (n, n_classes).
Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# A figure of more images is hardly read, and each takes a pass through the network.
MAX_IMAGES = 12


@dataclass(frozen=True)
class CamLayer:
    """A layer of a network from whose output class activation maps are computed.

    `head` maps an output of the block, whose axes are those of `layout`, to the logits.
    """

    block: str
    layout: Layout
    head: Head


def grad_cam(
    estimator: Any, X: Any, labels: Any = None
) -> tuple[NDArray[Any] | None, ...]:
    """Return the images, maps, labels, scores and probabilities of a `GradCAMDisplay`.

    There are no probabilities (``None``) without `predict_proba`.
    """
    estimator = unwrapped(estimator)
    check_is_fitted(estimator)
    network, head = _split(estimator)
    source = read_images_of(network, X)
    y_pred, predicted, is_proba = predict(estimator, X)
    is_multilabel = y_pred.ndim == 2
    if len(estimator.classes_) == 2 and not is_multilabel:
        head = partial(_log_odds, head)
    layers = _cam_layers(network, head)
    if labels is None and is_multilabel:  # the most probable one of each image
        labels = estimator.classes_[predicted.argmax(axis=1)]
    labels = y_pred if labels is None else np.asarray(labels)
    is_single = labels.ndim == 0
    labels = np.broadcast_to(labels, len(source)) if is_single else column_or_1d(labels)
    check_consistent_length(source, labels)
    columns = columns_of(estimator.classes_, labels)

    threads = resolve_threads(network.n_jobs)
    for layer in layers:
        outputs = _outputs(network, layer, source, threads)
        pairs = [
            _map_and_score(output, layer, column)
            for output, column in zip(outputs, columns, strict=True)
        ]
        if any(activation is not None for activation, _ in pairs):
            break
    empty = torch.zeros(layer.layout.map_shape[1:], dtype=torch.float64)
    activations = [empty if found is None else found for found, _ in pairs]
    coarse = torch.stack(activations)[:, None].float()  # (n, 1, h', w')
    size = network.preprocessing_.size
    maps = interpolate(coarse, size, mode="bilinear", align_corners=False)
    scores = [score for _, score in pairs]
    images = decode_crops(source, network.preprocessing_, threads)
    proba = predicted[np.arange(len(source)), columns] if is_proba else None
    return images, maps[:, 0].numpy(), labels, np.array(scores), proba


def _split(estimator: Any) -> tuple[Any, Head]:
    """Return the estimator with the network, and what follows the network."""
    if isinstance(estimator, Pipeline) and is_classifier(estimator):
        transformer, scaler, classifier = parts_of_pipeline(estimator)
        pooling, layout = transformer.pooling_, output_layout(transformer)
        head = head_of_pipeline(pooling, layout, scaler, classifier)
        return transformer, head
    if isinstance(estimator, FineTunedCNNClassifier):
        return estimator, estimator.head_
    if isinstance(estimator, PretrainedCNNClassifier):
        return estimator, partial(_pretrained_logits, estimator)
    last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    raise ValueError(
        "Grad-CAM needs a classifier of skltl, or a pipeline of a "
        f"CNNFeatureTransformer and a linear classifier; got {type(last).__name__}."
    )


def _cam_layers(network: Any, head: Head) -> list[CamLayer]:
    """Return the layers that maps may be computed from, the last one first.

    These are the layer of the estimator, and the main layers before it.
    """
    whole = skeleton(network.backbone_, network.preprocessing_.size)
    # Modules of the user may change when they run, and must stay as they were fitted.
    blocks = {
        name: block if is_known_code(block) else copy.deepcopy(block)
        for name, block in network.network_.blocks.items()
    }
    own = {layer.block for layer in network.layers_}
    layers = []
    for name in reversed(blocks):
        grid = whole.layouts[name].grid
        is_main = name in whole.layers.values() and grid not in (None, (1, 1))
        if is_main or (name in own and grid is not None):
            following = list(blocks)[list(blocks).index(name) + 1 :]
            rest = [blocks[other] for other in following]
            logits = partial(_run_rest, rest, head)
            layers.append(CamLayer(name, whole.layouts[name], logits))
    if not layers:
        raise ValueError(
            "Grad-CAM needs a spatial feature map, but no layer up to "
            f"{network.layers_[0].name!r} of {network.backbone_.name!r} returns one."
        )
    return layers


def _run_rest(rest: Sequence[Block], head: Head, output: torch.Tensor) -> torch.Tensor:
    """Return the logits for an output in float64: blocks are run in float32."""
    if rest:
        output = output.float()
        for block in rest:
            output = block(output)
        output = output.double()
    return head(output)


def _log_odds(head: Head, output: torch.Tensor) -> torch.Tensor:
    """Return the log odds (n, 2) of two classes: of 1 the `decision_function`."""
    logits = head(output)
    return logits - logits.flip(1)


def _pretrained_logits(
    classifier: PretrainedCNNClassifier, output: torch.Tensor
) -> torch.Tensor:
    """Return the logits (n, n_classes) of a pretrained network in float64."""
    logits: torch.Tensor = classifier.head_(output.float()).double()
    if classifier.class_map_ is None:
        return logits[:, np.argsort(classifier.categories_)]
    class_map = torch.from_numpy(classifier.class_map_)  # (n_categories, n_classes)
    # The gradient of a class without any category would make all others NaN.
    is_empty = ~class_map.any(dim=0)
    log_weights = class_map.masked_fill(is_empty, 1).log()
    class_logits = torch.logsumexp(logits[:, :, None] + log_weights, dim=1)
    return class_logits.masked_fill(is_empty, -torch.inf)


def _outputs(
    network: Any, layer: CamLayer, source: ImageSource, n_threads: int
) -> torch.Tensor:
    """Return the outputs (n, ...) of a layer of the network."""
    config = extraction_config(
        network,
        network.backbone_,
        network.network_,
        (layer.block,),
        network.preprocessing_,
        "flatten",
    )
    features = extract_features(source, config, [layer.block], n_threads)
    return torch.from_numpy(features).reshape(-1, *layer.layout.shape)


def _map_and_score(
    output: torch.Tensor, layer: CamLayer, column: int
) -> tuple[torch.Tensor | None, float]:
    """Return the map (h', w') of a class, with maximum 1 or 0, and its score.

    There is no map where the score does not depend on any position: after the last
    attention of a transformer whose head uses the class token only.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = output[None].double().requires_grad_(True)
        score = layer.head(leaf)[0, column]
        (gradient,) = torch.autograd.grad(score, leaf)
    gradient = layer.layout.as_map(gradient)  # (1, c, h', w')
    if layer.layout.n_prefix and not gradient.any():
        return None, score.item()
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (1, c, 1, 1)
    feature_map = layer.layout.as_map(leaf.detach())
    activation = (weights * feature_map).sum(dim=1)[0].clamp(min=0)  # (h', w')
    return activation / activation.max().clamp(min=1e-300), score.item()


class GradCAMDisplay:
    """Gradient-weighted class activation maps (Grad-CAM) over images.

    Create one with :meth:`from_estimator`.

    The channels of the last feature map, weighted by the average gradient of a class's
    score with respect to them, are summed, and negative values are set to 0 [1]_. The
    map has the resolution of the feature map, 7 x 7 for most networks, and is
    interpolated to the size of the image. The tokens of a transformer are such a map,
    too. Where only its class token is classified, they are those before its last block.

    Parameters
    ----------
    images : array of shape (n, h, w, 3)
        The images, resized and cropped as for the network: uint8, or float in [0, 1].
    maps : array of shape (n, h, w)
        The class activation maps, in [0, 1]. Each is scaled to a maximum of 1 before it
        is interpolated.
    labels : array of shape (n,)
        Class of each map.
    scores : array of shape (n,), default=None
        The classifier's score of that class, whose gradient weights the channels: its
        `decision_function`, negated for the first of two classes.
    proba : array of shape (n,), default=None
        Probability of that class. Without any, titles have the scores.
    summary : str, default=None
        Line above a new figure.

    Attributes
    ----------
    ims_ : list of matplotlib AxesImage
        The images; side by side, those without a map.
    map_ims_ : list of matplotlib AxesImage
        The maps.
    axes_ : array of matplotlib Axes of shape (n,)
        Axes of each image.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    PredictionGridDisplay : Images with true and predicted labels.

    Notes
    -----
    Each map is scaled to its own maximum, so that a class without any evidence may have
    a bright map, too. The probability in the title says which maps have a meaning.

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

    __module__ = "skltl"

    def __init__(self, images, maps, labels, scores=None, proba=None, *, summary=None):
        self.images = images
        self.maps = maps
        self.labels = labels
        self.scores = scores
        self.proba = proba
        self.summary = summary

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        labels=None,
        *,
        n_images=None,
        side_by_side=True,
        n_columns=None,
        axes=None,
        **kwargs,
    ):
        """Compute and plot class activation maps.

        Parameters
        ----------
        estimator : classifier
            Fitted classifier of skltl, or a fitted pipeline of a
            `CNNFeatureTransformer`, optionally a ``StandardScaler``, and a linear
            classifier; or a search over one of them.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that the estimator accepts.
        labels : array of shape (n,) or a single label, default=None
            Class of each map; by default the predicted one. A single label is used for
            all images.
        n_images : int, default=None
            Largest number of images to plot, the first ones; ``None`` is 12 in a new
            figure, and all on given `axes`.
        side_by_side : bool, default=True
            Whether to plot the image without its map, too, on the left of it.
        n_columns : int, default=None
            Number of columns of a new figure; ``None`` is 3 side by side, 6 otherwise.
        axes : array of n matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow`` for the maps, such as
            ``alpha`` (default 0.5) and ``cmap`` (default ``"inferno"``).

        Returns
        -------
        GradCAMDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator is of another kind, its layer returns no spatial feature
            map, a label is unknown, or `axes` has another length.
        """
        import_pyplot()
        check_is_fitted(estimator)
        network, _ = _split(unwrapped(estimator))
        n, summary = len(read_images_of(network, X)), None
        if n_images is None:
            n_images = MAX_IMAGES if axes is None else n
        check_n_images(n_images)
        if n_images < n:
            if np.ndim(labels):  # one for each image
                check_consistent_length(X, labels)
                labels = np.asarray(labels)[:n_images]
            X = take(X, list(range(n_images)))
            summary = f"first {n_images:,} of {n:,} images"
        display = cls(*grad_cam(estimator, X, labels), summary=summary)
        return display.plot(
            side_by_side=side_by_side, n_columns=n_columns, axes=axes, **kwargs
        )

    def plot(self, *, side_by_side=True, n_columns=None, axes=None, **kwargs):
        """Plot the images, each with its map over it.

        Parameters
        ----------
        side_by_side : bool, default=True
            Whether to plot the image without its map, too, on the left of it.
        n_columns : int, default=None
            Number of columns of a new figure; ``None`` is 3 side by side, 6 otherwise.
        axes : array of n matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow`` for the maps, such as
            ``alpha`` (default 0.5) and ``cmap`` (default ``"inferno"``).

        Returns
        -------
        GradCAMDisplay
            The display itself.
        """
        n_columns = (3 if side_by_side else 6) if n_columns is None else n_columns
        size = (3.8, 2.15) if side_by_side else (1.9, 2.15)
        axes = resolve_axes(axes, len(self.images), n_columns, size, self.summary)
        style = {"alpha": 0.5, "cmap": "inferno", "vmin": 0, "vmax": 1, **kwargs}
        self.ims_, self.map_ims_ = [], []
        for number, (ax, image, activation) in enumerate(
            zip(axes, self.images, self.maps, strict=True)
        ):
            self.ims_.append(draw_image(ax, image, self._title(number)))
            if side_by_side:
                style["extent"] = draw_beside(ax, image)
            self.map_ims_.append(ax.imshow(activation, **style))
            if side_by_side:
                ax.set_xlim(self.ims_[-1].get_extent()[0], style["extent"][1])
        self.axes_, self.figure_ = axes, axes[0].figure
        return self

    def _title(self, number):
        """Return the class of a map, and its probability or score."""
        label = self.labels[number]
        if self.proba is not None:
            return f"{as_title(label)} p={self.proba[number]:.2f}"
        if self.scores is not None:
            return f"{as_title(label)} score={self.scores[number]:.2f}"
        return as_title(label)

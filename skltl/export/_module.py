"""One torch module of a fitted estimator: from crops of images to predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from skltl.exceptions import ExportError
from skltl.export._heads import Outputs, layer_of, outputs_of_model, outputs_of_network
from skltl.export._parts import Parts, own_settings, parts_of
from skltl.export._verification import verify
from skltl.features import CNNFeatureTransformer
from skltl.images import normalize
from skltl.inference import build_segments, is_exporting, pool
from skltl.networks import layouts, truncate, versions

# Name of the input of an exported file.
INPUT = "images"


class ExportedNetwork(nn.Module):
    """A fitted estimator as one torch module, from crops of images to predictions.

    :func:`~skltl.to_torch` returns it.

    Parameters
    ----------
    features : Module
        Network, from crops (n, h, w, c) to features (n, d), or to its own outputs.
    outputs : Module
        Layers after the network, which return a dictionary of the outputs.
    parts : Parts
        Parts of the estimator.

    Attributes
    ----------
    classes_ : array of shape (n_classes,), or None
        Class labels: `index` is a position in it. Of a regressor, ``None``.
    preprocessing_ : Preprocessing
        Preprocessing of the images, as for :func:`~skltl.crop_images`.
    metadata_ : dict of str
        JSON of the ``"classes"``, the ``"preprocessing"`` (parameters of
        `Preprocessing`), the name of the ``"backbone"``, and the ``"versions"`` of the
        packages.
    """

    __module__ = "skltl.export"

    def __init__(
        self,
        features: nn.Module,
        outputs: nn.Module,
        parts: Parts,
    ) -> None:
        super().__init__()
        self.features = features
        self.outputs = outputs
        self.preprocessing_ = parts.preprocessing
        self.classes_ = parts.classes
        self.metadata_ = metadata_of(parts)

    def forward(self, images: Tensor) -> Outputs:
        """Predict.

        Parameters
        ----------
        images : tensor of shape (n, height, width, n_channels)
            Crops of images, as :func:`~skltl.crop_images` returns them: uint8, or
            float32 in [0, 1].

        Returns
        -------
        dict of tensors
            Of a classifier ``"scores"``, those of ``decision_function``;
            ``"probabilities"`` of shape (n, n_classes), if it has any; and ``"index"``
            of shape (n,), the positions of the classes in `classes_`. For multilabel
            targets there is ``"labels"``, an indicator matrix, instead of ``"index"``.
            A classifier with calibrated probabilities has no scores. Of a regressor,
            ``"values"``.

        Raises
        ------
        TypeError, ValueError
            If `images` are no crops for this network.
        """
        if not is_exporting():
            self._check(images)
        outputs: Outputs = self.outputs(self.features(images))
        return outputs

    def _check(self, images: Tensor) -> None:
        """Raise an error for what would be predicted wrongly."""
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor, got {type(images).__name__}. Use "
                "torch.from_numpy."
            )
        shape = *self.preprocessing_.size, self.preprocessing_.n_channels
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"images must have shape (n, {', '.join(map(str, shape))}), got "
                f"{tuple(images.shape)}. Make crops of images with "
                "skltl.crop_images(X, module.preprocessing_)."
            )
        if images.is_floating_point() and images.numel() and images.max() > 1:
            raise ValueError(
                f"images of floats must be in [0, 1], the largest is {images.max():g}. "
                "Pass uint8, or divide by 255."
            )


class Network(nn.Module):
    """A network, from crops (n, h, w, c) to the features of its layers, side by side.

    That of a classifier or regressor returns its own outputs, which the head pools.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        preprocessing = network.preprocessing_
        names = [layer.block for layer in network.layers_]
        blocks = truncate(network.network_.blocks, names)
        cpu = torch.device("cpu")
        segments = build_segments(blocks, names, cpu, torch.float32)
        found = layouts(network.backbone_, preprocessing.size, tuple(names))
        is_pooled = isinstance(network, CNNFeatureTransformer)
        self.segments = nn.ModuleList(segments.values())
        self.layouts = [found[name] for name in segments]
        self.order = [list(segments).index(name) for name in names]
        self.pooling = network.pooling_ if is_pooled else None
        self.n_views = network.n_views if is_pooled else 1
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name), dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (n, d), or the outputs of the network."""
        batch = normalize(images.permute(0, 3, 1, 2), self.mean, self.std)
        features = self._run(batch)
        if self.n_views == 1:
            return features
        return (features + self._run(batch.flip(3))) / 2

    def _run(self, batch: Tensor) -> Tensor:
        if self.pooling is None:
            (segment,) = self.segments
            outputs: Tensor = segment(batch)
            return outputs
        features = []
        for segment, layout in zip(self.segments, self.layouts, strict=True):
            batch = segment(batch)
            # A copy, since the next segment may overwrite the output in place.
            features.append(pool(batch.clone(), self.pooling, layout))
        return torch.cat([features[position] for position in self.order], dim=1)


def to_torch(estimator: BaseEstimator, *, X: Any = None) -> ExportedNetwork:
    """Convert a fitted estimator to one torch module.

    Normalization, network, pooling, scaling and the linear model become one module,
    which predicts for crops of images without scikit-learn. It is run once, and
    compared with the estimator.

    Parameters
    ----------
    estimator : estimator
        A fitted `PretrainedCNNClassifier`, `FineTunedCNNClassifier`,
        `FineTunedCNNRegressor` or `TransferClassifier`; or a pipeline of a
        `CNNFeatureTransformer`, any scalers, ``Normalizer``, ``PCA``, ``TruncatedSVD``
        and feature selection, and a linear classifier or regressor,
        ``OneVsRestClassifier`` or ``CalibratedClassifierCV(method="sigmoid")`` of
        these; or ``CalibratedClassifierCV`` of such pipelines. Of a fitted search, it
        is the best estimator.
    X : sequence of n images, default=None
        Images with which the module is compared, of any kind that the estimator
        supports. ``None`` is eight random images.

    Returns
    -------
    ExportedNetwork
        Module on the CPU, in eval mode, which computes in float32.

    Raises
    ------
    ExportError
        If a step has no equivalent in torch; or if a label differs from that of the
        estimator, a score by more than 0.001 times the largest one, or a value by more
        than 0.001 times their range.

    See Also
    --------
    export_onnx : Export to a file for ONNX Runtime.
    export_openvino : Export to a file for OpenVINO.
    crop_images : Make crops of images, the input of the module.

    Notes
    -----
    The number of images is free. The estimator is compared at float32; of one that
    computes in bfloat16, or with ``decode="fast"``, predictions differ by as much as
    those do from float32 and exact decoding.

    Save the module for programs without skltl by ``torch.export``: see :doc:`the user
    guide </guide/deployment>`.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skltl import PretrainedCNNClassifier, to_torch
    >>> images = np.zeros((2, 80, 80, 3), dtype=np.uint8)
    >>> module = to_torch(PretrainedCNNClassifier("tiny").fit(images))
    >>> with torch.inference_mode():
    ...     outputs = module(torch.from_numpy(images))
    >>> sorted(outputs), outputs["index"].shape
    (['index', 'probabilities', 'scores'], torch.Size([2]))
    """
    parts = parts_of(estimator)
    with own_settings():
        module = module_of(parts)

        def run(crops: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
            outputs = module(torch.from_numpy(crops))
            return {name: output.numpy() for name, output in outputs.items()}

        verify(parts, run, X, "torch module")
    return module


def module_of(parts: Parts) -> ExportedNetwork:
    """Return the module of a fitted estimator, without comparing it."""
    outputs: nn.Module
    if parts.steps:
        *between, last = parts.steps
        layers = [_converted(layer_of, *step) for step in between]
        outputs = nn.Sequential(*layers, _converted(outputs_of_model, *last))
    else:
        outputs = outputs_of_network(parts.network)
    module = ExportedNetwork(Network(parts.network), outputs, parts)
    return module.eval().requires_grad_(False)


def metadata_of(parts: Parts) -> dict[str, str]:
    """Return what a program must know of an export, as JSON."""
    classes = parts.classes
    if classes is not None and classes.dtype.kind in "mM":
        classes = classes.astype(str)  # nanoseconds would become integers
    facts = {
        "classes": None if classes is None else classes.tolist(),
        "preprocessing": asdict(parts.preprocessing),
        "backbone": parts.network.backbone_.name,
        "versions": versions() | {"scikit-learn": sklearn.__version__},
    }
    return {name: json.dumps(fact, default=str) for name, fact in facts.items()}


def _converted(convert: Callable[[Any], nn.Module], name: str, step: Any) -> nn.Module:
    """Convert a step of a pipeline; name it if that is impossible."""
    try:
        return convert(step)
    except ExportError as error:
        raise ExportError(f"Step {name!r} cannot be exported: {error}") from error

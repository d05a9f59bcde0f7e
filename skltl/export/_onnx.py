"""Export to ONNX."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, is_classifier
from sklearn.pipeline import Pipeline
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from skltl._locks import CONVERSIONS
from skltl.exceptions import ExportError, shorten
from skltl.export._heads import layer_of
from skltl.export._module import INPUT, Network, metadata_of, module_of
from skltl.export._parts import Parts, check_path, own_settings, parts_of
from skltl.export._verification import random_crops, verify
from skltl.finetuning import n_dimensions_of

# The version of ONNX's operators. ONNX Runtime reads it since 1.17 (2024), and skl2onnx
# converts to it.
OPSET = 20

# Of the domain ai.onnx.ml.
OPSET_OF_MODELS = 3


def export_onnx(
    estimator: BaseEstimator, path: str | os.PathLike[str], *, X: Any = None
) -> None:
    """Export a fitted estimator to a file for ONNX Runtime.

    The file has all that :func:`~skltl.to_torch` converts: its input are crops of
    images, and its outputs are predictions. ONNX Runtime predicts from it without
    torch, scikit-learn and the estimator. It is run once, and compared with the
    estimator.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator, as for :func:`~skltl.to_torch`. The steps of a pipeline
        after the transformer may also be others that skl2onnx converts, such as
        support vector machines with kernels and forests.
    path : str or path-like
        File to write; an existing one is replaced.
    X : sequence of n images, default=None
        Images with which the file is compared, of any kind that the estimator supports.
        ``None`` is eight random images.

    Raises
    ------
    ImportError
        If packages of the extra ``skltl[onnx]`` are not installed.
    ExportError
        If a step cannot be converted; or if a label differs from that of the estimator,
        a score by more than 0.001 times the largest one, or a value by more than 0.001
        times their range. No file is written then.

    See Also
    --------
    to_torch : Convert to a torch module.
    export_openvino : Export to a file for OpenVINO.
    crop_images : Make crops of images, without torch.

    Notes
    -----
    The input ``"images"`` is uint8, of shape (n, height, width, n_channels). Outputs
    are those of :class:`~skltl.export.ExportedNetwork`; models that skl2onnx converts
    have no ``"scores"`` if they have ``"probabilities"``. The metadata of the file are
    the JSON of ``"classes"``, ``"preprocessing"`` (the parameters of `Preprocessing`),
    ``"backbone"`` and ``"versions"``. Networks of more than 2 GB are refused.

    It uses ``torch.onnx.export(dynamo=True)``, with operators of version 20.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import PretrainedCNNClassifier, export_onnx
    >>> images = np.zeros((2, 80, 80, 3), dtype=np.uint8)
    >>> classifier = PretrainedCNNClassifier("tiny").fit(images)
    >>> export_onnx(classifier, "tiny.onnx")  # doctest: +SKIP
    """
    onnx, runtime, _ = map(_import, ("onnx", "onnxruntime", "onnxscript"))
    path = check_path(path)
    parts = parts_of(estimator)
    with (
        own_settings(),
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
    ):
        model = _model_of(parts)
        onnx.helper.set_model_props(model, metadata_of(parts))
        written = Path(folder) / "model.onnx"
        try:
            onnx.save(model, written)
        except ValueError as error:  # of protobuf
            raise ExportError(f"The model cannot be written: {error}") from error
        verify(parts, _runner(runtime, written), X, "ONNX file")
        written.replace(path)


def _model_of(parts: Parts) -> Any:
    """Return the ONNX model of an estimator."""
    try:
        module = module_of(parts)
    except ExportError:
        if not parts.steps:
            raise
        return _with_foreign_steps(parts)
    return _converted(module, parts)


def _runner(runtime: Any, path: Path) -> Any:
    """Return a function that runs a file of ONNX."""
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(crops: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(names, {INPUT: crops}), strict=True))

    return run


def _converted(module: nn.Module, parts: Parts) -> Any:
    """Return the ONNX model of a module from crops to a dictionary of outputs."""
    example = torch.from_numpy(random_crops(parts)[:2])
    names = list(module(example))
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error.__cause__ or error
        raise ExportError(
            "torch.onnx.export cannot convert the network: "
            f"{shorten(' '.join(str(cause).split()), 200)}"
        ) from error
    return cast(Any, program).model_proto


class _Scaled(nn.Module):
    """A network and layers after it, whose only output is the features."""

    def __init__(self, network: Any, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(Network(network), *layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features (n, d) of crops (n, h, w, c)."""
        return {"features": self.layers(images)}


def _with_foreign_steps(parts: Parts) -> Any:
    """Return the ONNX model of a pipeline, of which skl2onnx converts the last steps.

    These are the first step that has no equivalent in torch, and all after it.
    """
    onnx = _import("onnx")
    layers, steps = _divided(parts.steps)
    name, last = steps[-1]
    if getattr(last, "method", None) == "isotonic":
        raise ExportError(
            f"Step {name!r} has isotonic calibration, whose steps are steep: "
            "probabilities differ in float32. method='sigmoid' can be exported."
        )
    scaled = _Scaled(parts.network, layers).eval()
    network = _converted(scaled, parts)
    example = torch.from_numpy(random_crops(parts)[:1])
    n_features = scaled(example)["features"].shape[1]
    steps = [(name, _of_sklearn(step)) for name, step in steps]
    model = _by_skl2onnx(steps, n_features)
    # skl2onnx declares the oldest versions that have its operators.
    model.ir_version = network.ir_version
    del model.opset_import[:]
    versions = {"": OPSET, "ai.onnx.ml": OPSET_OF_MODELS}
    model.opset_import.extend(
        itertools.starmap(onnx.helper.make_opsetid, versions.items())
    )
    model = onnx.compose.add_prefix(model, "model_", rename_outputs=False)
    return onnx.compose.merge_models(
        network, model, io_map=[("features", "model_features")]
    )


def _divided(steps: list[tuple[str, Any]]) -> tuple[list[nn.Module], list[Any]]:
    """Return the layers of the first steps, and the other steps."""
    layers = []
    for position, (_, step) in enumerate(steps[:-1]):
        try:
            layers.append(layer_of(step))
        except ExportError:
            return layers, steps[position:]
    return layers, steps[-1:]


def _by_skl2onnx(steps: list[tuple[str, Any]], n_features: int) -> Any:
    """Return the ONNX model of steps of a pipeline, with the outputs of an export."""
    skl2onnx = _import("skl2onnx")
    types = import_module("skl2onnx.common.data_types")
    *between, (name, last) = steps
    real = types.FloatTensorType([None, None])
    n_dimensions = n_dimensions_of(last, last.n_features_in_)
    if not is_classifier(last):
        column = 0 if n_dimensions == 1 else None
        options, outputs = {}, [("values", real)]
    elif n_dimensions > 1:
        raise ExportError(
            f"Step {name!r} ({type(last).__name__}) predicts several labels, and has "
            "no equivalent in torch."
        )
    else:
        has_proba = hasattr(last, "predict_proba")
        column = 1 if not has_proba and len(last.classes_) == 2 else None
        options = {} if has_proba else {"raw_scores": True}
        if not isinstance(last, LinearSVC):  # its converter knows no such option
            options["zipmap"] = False
        last = _with_positions(name, last)
        second = "probabilities" if has_proba else "scores"
        outputs = [("index", types.Int64TensorType([None])), (second, real)]
    try:
        with _quiet():
            model = skl2onnx.convert_sklearn(
                Pipeline([*between, (name, last)]),
                initial_types=[("features", types.FloatTensorType([None, n_features]))],
                final_types=outputs,
                options={id(last): options},
                target_opset={"": OPSET, "ai.onnx.ml": OPSET_OF_MODELS},
            )
    except Exception as error:  # its converters raise NameError and others
        names = ", ".join(f"{name!r} ({type(step).__name__})" for name, step in steps)
        raise ExportError(
            f"Step {names} has no equivalent in torch, and skl2onnx cannot convert it: "
            f"{shorten(' '.join(str(error).split()), 200)}"
        ) from error
    if column is not None:
        _take_column(model.graph, outputs[-1][0], column)
    return model


def _of_sklearn(step: Any) -> Any:
    """Return a model of skltl as the model of scikit-learn that it extends."""
    if not type(step).__module__.startswith("skltl"):
        return step
    bases = (base for base in type(step).__mro__ if base.__module__[:7] == "sklearn")
    base: Any = next(bases)
    plain = base.__new__(base)
    vars(plain).update(vars(step))
    return plain


def _with_positions(name: str, classifier: Any) -> Any:
    """Return a copy of a classifier, of which the classes are their positions."""
    classifier = copy.copy(classifier)
    try:
        classifier.classes_ = np.arange(len(classifier.classes_))
    except AttributeError as error:  # a property: the classes of another classifier
        raise ExportError(
            f"Step {name!r} ({type(classifier).__name__}) has no equivalent in torch, "
            "nor in ONNX."
        ) from error
    return classifier


def _take_column(graph: Any, name: str, column: int) -> None:
    """Replace the last output of a graph, a matrix, by one of its columns."""
    helper = _import("onnx").helper
    matrix, position = f"{name}_matrix", f"{name}_column"
    for node in graph.node:
        node.output[:] = [matrix if one == name else one for one in node.output]
    constant = helper.make_node("Constant", [], [position], value_int=column)
    gather = helper.make_node("Gather", [matrix, position], [name], axis=1)
    graph.node.extend([constant, gather])
    del graph.output[-1].type.tensor_type.shape.dim[1:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters print and log about their own progress.

    One thread at a time: all of it belongs to the process, as do states of the
    exporters.
    """
    logger = logging.getLogger("torch.onnx")
    with CONVERSIONS:
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(level)


def _import(name: str) -> Any:
    """Import a package of the extra, or raise an error that names it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {name}. Install it with: pip install 'skltl[onnx]'"
        ) from error

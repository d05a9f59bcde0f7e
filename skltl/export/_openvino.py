"""Export to OpenVINO."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skltl.exceptions import EngineError, ExportError
from skltl.export._module import INPUT, metadata_of, module_of
from skltl.export._parts import Parts, check_path, own_settings, parts_of
from skltl.export._verification import random_crops, verify
from skltl.inference import can_run, convert_to_openvino, openvino_core


def export_openvino(
    estimator: BaseEstimator, path: str | os.PathLike[str], *, X: Any = None
) -> None:
    """Export a fitted estimator to files for OpenVINO.

    The files have all that :func:`~skltl.to_torch` converts: its input are crops of
    images, and its outputs are predictions. OpenVINO predicts from them without torch,
    scikit-learn and the estimator. They are run once, and compared with the estimator.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator, as for :func:`~skltl.to_torch`.
    path : str or path-like
        File to write, which ends with ``.xml``; the weights are written to a file of
        the same name that ends with ``.bin``. Existing ones are replaced.
    X : sequence of n images, default=None
        Images with which the files are compared, of any kind that the estimator
        supports. ``None`` is eight random images.

    Raises
    ------
    ImportError
        If OpenVINO is not installed.
    ExportError
        If a step cannot be converted; or if a label differs from that of the estimator,
        a score by more than 0.001 times the largest one, or a value by more than 0.001
        times their range. No file is written then.

    See Also
    --------
    export_onnx : Export to a file for ONNX Runtime.
    to_torch : Convert to a torch module.
    crop_images : Make crops of images, without torch.

    Notes
    -----
    The input ``"images"`` is uint8, of shape (n, height, width, n_channels). Outputs
    are those of :class:`~skltl.export.ExportedNetwork`. The metadata, the section
    ``"skltl"`` of ``model.get_rt_info``, are the JSON of ``"classes"``,
    ``"preprocessing"`` (the parameters of `Preprocessing`), ``"backbone"`` and
    ``"versions"``.

    Weights are stored in float32. OpenVINO may compute in bfloat16 where the processor
    supports it, unless ``INFERENCE_PRECISION_HINT`` is ``"f32"``. The files are
    compared with this setting.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import PretrainedCNNClassifier, export_openvino
    >>> images = np.zeros((2, 80, 80, 3), dtype=np.uint8)
    >>> classifier = PretrainedCNNClassifier("tiny").fit(images)
    >>> export_openvino(classifier, "tiny.xml")  # doctest: +SKIP
    """
    if find_spec("openvino") is None:
        raise ImportError(
            "export_openvino needs openvino. Install it with: pip install "
            "'skltl[openvino]'"
        )
    if Path(path).suffix != ".xml":
        raise ValueError(f"path={os.fspath(path)!r} must end with .xml.")
    path = check_path(path)
    check_path(path.with_suffix(".bin"))
    if not can_run("openvino", torch.device("cpu")):
        raise ExportError(
            "This process is a forked child of one that has used OpenVINO, whose "
            "threads do not exist here. Export from another process."
        )
    parts = parts_of(estimator)
    import openvino

    with (
        own_settings(),
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
    ):
        model = _converted(parts)
        written = Path(folder) / path.name
        openvino.save_model(model, written, compress_to_fp16=False)
        verify(parts, _runner(written), X, "OpenVINO model")
        for file in (written.with_suffix(".bin"), written):
            file.replace(path.parent / file.name)


def _converted(parts: Parts) -> Any:
    """Return the OpenVINO model of an estimator."""
    module = module_of(parts)
    example = torch.from_numpy(random_crops(parts)[:2])
    names = list(module(example))
    try:
        model = convert_to_openvino(module, example)
    except EngineError as error:
        raise ExportError(str(error)) from error
    model.inputs[0].set_names({INPUT})
    for output, name in zip(model.outputs, names, strict=True):
        output.set_names({name})
    model.reshape([-1, *example.shape[1:]])
    for name, text in metadata_of(parts).items():
        model.set_rt_info(text, ["skltl", name])
    return model


def _runner(path: Path) -> Any:
    """Return a function that runs a model of OpenVINO."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(path, "CPU", settings)

    def run(crops: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        outputs = compiled([crops])
        return {output.any_name: outputs[output] for output in compiled.outputs}

    return run

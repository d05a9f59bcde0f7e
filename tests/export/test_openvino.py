"""A model of OpenVINO predicts what the estimator predicts."""

import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from small_pipeline import Doubled, assert_outputs, pipeline, unusual_transformer

from skltl import (
    FineTunedCNNClassifier,
    Preprocessing,
    crop_images,
    export_openvino,
)
from skltl.exceptions import ExportError

openvino = pytest.importorskip("openvino")


def run(path, images):
    """Run a model as a program without torch would; return its outputs and facts."""
    core = openvino.Core()
    model = core.read_model(path)
    facts = {
        name: json.loads(model.get_rt_info(["skltl", name]).value)
        for name in ("classes", "preprocessing", "backbone", "versions")
    }
    crops = crop_images(images, Preprocessing(**facts["preprocessing"]))
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    outputs = compiled([crops])
    return {one.any_name: outputs[one] for one in compiled.outputs}, facts


def assert_same_predictions(estimator, images, path):
    """Compare a model with the methods of its estimator, for several batch sizes."""
    export_openvino(estimator, path)
    for some in (images, images[:1]):
        found, facts = run(path, some)
        assert_outputs(found, estimator, some, facts["classes"])


@pytest.mark.parametrize(
    "steps",
    [
        [StandardScaler(), LogisticRegression()],
        [CalibratedClassifierCV(LinearSVC(C=0.01), cv=2)],
        [StandardScaler(), Ridge(10)],
    ],
    ids=lambda steps: type(steps[-1]).__name__,
)
def test_pipelines(steps, training_images, labels, images, tmp_path):
    is_regression = isinstance(steps[-1], Ridge)
    y = np.arange(40.0) + 1 if is_regression else labels
    fitted = pipeline(*steps).fit(training_images, y)
    assert_same_predictions(fitted, images, tmp_path / "model.xml")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["model.bin", "model.xml"]


def test_networks_with_heads(training_images, indicators, images, tmp_path):
    tuned = FineTunedCNNClassifier(
        "tiny",
        conv_channels=[4],
        head_epochs=1,
        finetune_epochs=1,
        random_state=0,
        engine="torch",
        precision="float32",
    )
    tuned.fit(training_images, indicators)
    assert_same_predictions(tuned, images, tmp_path / "model.xml")


@pytest.mark.parametrize("n_images", [1, 40])
def test_large_feature_maps_are_pooled_for_any_number_of_images(
    n_images, training_images, labels, tmp_path
):
    # At their first layer, few images are pooled at once.
    fitted = pipeline(LogisticRegression(C=1e-3), layer="stem", image_size=160)
    fitted.fit(training_images, labels)
    export_openvino(fitted, tmp_path / "model.xml", X=training_images[:2])
    found, _ = run(tmp_path / "model.xml", training_images[:n_images])
    expected = fitted.decision_function(training_images[:n_images])
    np.testing.assert_allclose(found["scores"], expected, atol=1e-3)


def test_a_wrong_export_leaves_no_file(training_images, labels, tmp_path):
    wrong = pipeline(Doubled(), LogisticRegression()).fit(training_images, labels)
    with pytest.raises(ExportError, match=r"scores of the OpenVINO model .* by \d"):
        export_openvino(wrong, tmp_path / "model.xml")
    kernel = pipeline(StandardScaler(), SVC()).fit(training_images, labels)
    with pytest.raises(ExportError, match="'svc' cannot be exported"):
        export_openvino(kernel, tmp_path / "model.xml")
    with pytest.raises(ValueError, match=r"must end with \.xml"):
        export_openvino(wrong, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_paths_are_checked_before_the_export(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing'"):
        export_openvino(pipeline(SVC()), tmp_path / "missing" / "model.xml")
    (tmp_path / "model.bin").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model\.bin' is a folder"):
        export_openvino(pipeline(SVC()), tmp_path / "model.xml")


def test_settings_of_the_user_do_not_matter(training_images, labels, images, tmp_path):
    fitted = pipeline(LogisticRegression(C=1e-3)).fit(training_images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        export_openvino(fitted, tmp_path / "model.xml")
    found, _ = run(tmp_path / "model.xml", images)
    expected = fitted.decision_function(images)
    np.testing.assert_allclose(found["scores"], expected, atol=1e-3)


def test_threads_export_at_once(training_images, labels, tmp_path):
    fitted = pipeline(LogisticRegression(C=1e-3)).fit(training_images, labels)
    paths = [tmp_path / f"{number}.xml" for number in range(8)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: export_openvino(fitted, path), paths))
    assert list(warnings.filters) == before
    assert sorted(tmp_path.glob("*.xml")) == paths


def test_a_forked_child_is_refused(training_images, labels, tmp_path, monkeypatch):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    monkeypatch.setattr("skltl.inference._openvino._process_of_openvino", os.getppid())
    with pytest.raises(ExportError, match="forked child"):
        export_openvino(fitted, tmp_path / "model.xml")


def test_networks_that_cannot_be_converted(training_images, labels, tmp_path):
    fitted = make_pipeline(unusual_transformer(), LogisticRegression())
    fitted.fit(training_images, labels)
    with pytest.raises(
        ExportError, match="OpenVINO cannot convert .* aten::special_i0"
    ):
        export_openvino(fitted, tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package(training_images, labels, tmp_path, monkeypatch):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"'skltl\[openvino\]'"):
        export_openvino(fitted, tmp_path / "model.xml")

"""A file of ONNX predicts what the estimator predicts."""

import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from small_pipeline import Doubled, assert_outputs, pipeline, unusual_transformer

import skltl
from skltl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
    crop_images,
    export_onnx,
    make_feature_pipeline,
)
from skltl.exceptions import ExportError

for name in ("onnx", "onnxscript", "skl2onnx"):
    pytest.importorskip(name)
onnxruntime = pytest.importorskip("onnxruntime")


class Exported:
    """A file of ONNX, used as a program without torch would."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path)
        found = self.session.get_modelmeta().custom_metadata_map
        self.metadata = {name: json.loads(text) for name, text in found.items()}
        self.preprocessing = Preprocessing(**self.metadata["preprocessing"])

    def __call__(self, images):
        crops = crop_images(images, self.preprocessing)
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"images": crops}), strict=True))


def assert_same_predictions(estimator, images, path):
    """Compare a file with the methods of its estimator, for several batch sizes."""
    export_onnx(estimator, path)
    exported = Exported(path)
    for some in (images, images[:1]):
        assert_outputs(exported(some), estimator, some, exported.metadata["classes"])
    return exported


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
def test_pipelines(classifier, training_images, labels, images, tmp_path):
    fitted = make_feature_pipeline("tiny", classifier, layer="block2", engine="torch")
    fitted.set_params(feat__precision="float32").fit(training_images, labels)
    assert_same_predictions(fitted, images, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("steps", "targets"),
    [
        ([StandardScaler(), PCA(5), LogisticRegression()], "two classes"),
        ([CalibratedClassifierCV(LinearSVC(C=0.01), cv=2)], "four classes"),
        ([LogisticRegression(C=1e-3)], "four classes"),
        ([StandardScaler(), Ridge(10)], "values"),
        # The following ones by skl2onnx.
        ([StandardScaler(), SVC()], "four classes"),
        ([StandardScaler(), SVC()], "two classes"),
        ([RandomForestClassifier(11, random_state=0)], "four classes"),
        ([RandomForestClassifier(4, max_depth=2, random_state=0)], "four classes"),
        ([GradientBoostingClassifier(n_estimators=3)], "two classes"),
        ([StandardScaler(), PCA(5), KNeighborsClassifier(3)], "two classes"),
        ([PowerTransformer(), LogisticRegression()], "four classes"),
        ([PowerTransformer(), LinearSVC()], "two classes"),
        ([PowerTransformer(), LinearSVC()], "four classes"),
        ([make_pipeline(StandardScaler(), SVC())], "four classes"),
        ([GridSearchCV(SVC(), {"C": [1, 10]}, cv=2)], "four classes"),
        ([StandardScaler(), SVR()], "values"),
        ([RandomForestRegressor(11, random_state=0)], "several values"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_steps_of_scikit_learn(
    steps, targets, training_images, labels, images, tmp_path
):
    rng = np.random.default_rng(0)
    y = {
        "four classes": labels,
        "two classes": np.arange(40) % 4 < 2,
        "values": rng.normal(size=40),
        "several values": rng.normal(size=(40, 2)),
    }
    fitted = pipeline(*steps).fit(training_images, y[targets])
    assert_same_predictions(fitted, images, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "model", [LinearSVC(C=0.01), SVC(), make_pipeline(StandardScaler(), SVC())]
)
def test_calibrated_pipelines(model, training_images, labels, images, tmp_path):
    calibrated = CalibratedClassifierCV(pipeline(model), cv=2)
    fitted = calibrated.fit(training_images, labels)
    assert_same_predictions(fitted, images, tmp_path / "model.onnx")


def test_very_negative_scores(training_images, labels, images, tmp_path):
    sgd = SGDClassifier(loss="log_loss", random_state=0)
    fitted = pipeline(sgd).fit(training_images, labels)
    fitted[-1].coef_ *= 30
    assert_same_predictions(fitted, images, tmp_path / "model.onnx")


def test_isotonic_calibration_is_refused(training_images, labels, tmp_path):
    calibrated = CalibratedClassifierCV(LinearSVC(), method="isotonic", cv=2)
    fitted = pipeline(calibrated).fit(training_images, labels)
    with pytest.raises(ExportError, match="isotonic calibration, whose steps are"):
        export_onnx(fitted, tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["svm", "softmax"])
def test_models_of_skltl_after_a_foreign_step(
    name, training_images, labels, images, tmp_path
):
    steps = make_feature_pipeline("tiny", name)[1:]
    fitted = pipeline(PowerTransformer(), *steps).fit(training_images, labels)
    assert_same_predictions(fitted, images, tmp_path / "model.onnx")


def test_networks_with_heads(training_images, labels, indicators, images, tmp_path):
    options = {"engine": "torch", "precision": "float32"}
    pretrained = PretrainedCNNClassifier("tiny", **options).fit(images)
    assert_same_predictions(pretrained, images, tmp_path / "pretrained.onnx")
    epochs = {"head_epochs": 1, "finetune_epochs": 1, "random_state": 0}
    tuned = FineTunedCNNClassifier("tiny", conv_channels=[4], **epochs, **options)
    tuned.fit(training_images, indicators)
    assert_same_predictions(tuned, images, tmp_path / "tuned.onnx")


def test_files_and_metadata(training_images, labels, tmp_path):
    fitted = pipeline(LogisticRegression(C=1e-3)).fit(training_images, labels)
    paths = [tmp_path / "wide.jpg", tmp_path / "high.jpg"]
    Image.fromarray(training_images[0]).resize((300, 100)).save(paths[0])
    Image.fromarray(training_images[1]).resize((100, 300)).save(paths[1])
    exported = assert_same_predictions(fitted, paths, tmp_path / "model.onnx")
    assert exported.metadata["classes"] == ["blue", "green", "red", "yellow"]
    assert exported.metadata["backbone"] == "tiny"
    assert exported.metadata["versions"]["skltl"] == skltl.__version__
    assert exported.preprocessing == fitted[0].preprocessing_
    (inputs,) = exported.session.get_inputs()
    height, width = exported.preprocessing.size
    assert (inputs.name, inputs.type) == ("images", "tensor(uint8)")
    assert inputs.shape[1:] == [height, width, 3]


def test_feature_names_do_not_matter(training_images, labels, images, tmp_path):
    pytest.importorskip("pandas")
    fitted = pipeline(StandardScaler(), SVC()).set_output(transform="pandas")
    fitted.fit(training_images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_onnx(fitted, tmp_path / "model.onnx")


def test_a_wrong_export_leaves_no_file(training_images, labels, tmp_path):
    wrong = pipeline(Doubled(), LogisticRegression()).fit(training_images, labels)
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"scores of the ONNX file .* by \d"):
        export_onnx(wrong, path)
    assert list(tmp_path.iterdir()) == []
    right = pipeline(LogisticRegression()).fit(training_images, labels)
    export_onnx(right, path)
    before = path.read_bytes()
    with pytest.raises(ExportError):
        export_onnx(wrong, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_paths_are_checked_before_the_export(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing'"):
        export_onnx(pipeline(SVC()), tmp_path / "missing" / "model.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder, not a file"):
        export_onnx(pipeline(SVC()), tmp_path)


def test_threads_export_at_once(training_images, labels, tmp_path):
    fitted = pipeline(LogisticRegression(C=1e-3)).fit(training_images, labels)
    paths = [tmp_path / f"{number}.onnx" for number in range(3)]
    before = sys.stdout, list(warnings.filters)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda path: export_onnx(fitted, path), paths))
    assert (sys.stdout, list(warnings.filters)) == before
    assert sorted(tmp_path.iterdir()) == paths


def test_networks_that_cannot_be_converted(training_images, labels, tmp_path):
    fitted = make_pipeline(unusual_transformer(), LogisticRegression())
    fitted.fit(training_images, labels)
    with pytest.raises(
        ExportError, match=r"torch\.onnx\.export cannot convert .*bessel_i0"
    ):
        export_onnx(fitted, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class Unknown(KNeighborsClassifier):
    """A classifier that nothing converts."""


def test_errors_name_the_step(training_images, labels, indicators, tmp_path):
    fitted = pipeline(StandardScaler(), Unknown()).fit(training_images, labels)
    with pytest.raises(ExportError, match=r"'unknown' \(Unknown\) .* skl2onnx cannot"):
        export_onnx(fitted, tmp_path / "model.onnx")
    forest = RandomForestClassifier(3, random_state=0)
    fitted = pipeline(forest).fit(training_images, indicators)
    with pytest.raises(ExportError, match="'randomforestclassifier' .* several labels"):
        export_onnx(fitted, tmp_path / "model.onnx")
    threshold = FixedThresholdClassifier(LogisticRegression(), threshold=0.1)
    fitted = pipeline(threshold).fit(training_images, labels == "red")
    with pytest.raises(ExportError, match=r"'fixedthresholdclassifier' .* nor in ONNX"):
        export_onnx(fitted, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages(package, training_images, labels, tmp_path, monkeypatch):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*'skltl\[onnx\]'"):
        export_onnx(fitted, tmp_path / "model.onnx")

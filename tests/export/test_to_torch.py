"""A torch module predicts what the estimator predicts."""

import io
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectKBest
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import (
    LogisticRegression,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier, OutputCodeClassifier
from sklearn.multioutput import RegressorChain
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC
from small_pipeline import (
    SHORT,
    Doubled,
    assert_outputs,
    pipeline,
    transformer,
)

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    Preprocessing,
    PretrainedCNNClassifier,
    TransferClassifier,
    crop_images,
    make_feature_pipeline,
    to_torch,
)
from skltl.exceptions import ExportError


def outputs_of(module, images):
    """Run a module on crops of images."""
    crops = crop_images(images, module.preprocessing_)
    with torch.inference_mode():
        outputs = module(torch.from_numpy(crops))
    return {name: output.numpy() for name, output in outputs.items()}


def assert_same_predictions(estimator, images):
    """Compare a module with the methods of its estimator, all of them."""
    module = to_torch(estimator)
    found = outputs_of(module, images)
    assert ("scores" in found) == hasattr(estimator, "decision_function")
    assert ("probabilities" in found) == hasattr(estimator, "predict_proba")
    assert_outputs(found, estimator, images, module.classes_, tolerance=1e-4)
    return module


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("targets", ["four classes", "two classes", "labels"])
def test_linear_classifiers(
    classifier, targets, training_images, labels, indicators, images
):
    y = {
        "four classes": labels,
        "two classes": np.arange(40) % 4 < 2,
        "labels": indicators,
    }
    fitted = make_feature_pipeline("tiny", classifier, layer="block2", engine="torch")
    fitted.set_params(feat__precision="float32").fit(training_images, y[targets])
    assert_same_predictions(fitted, images)


@pytest.mark.parametrize(
    "steps",
    [
        [LinearSVC(C=0.01)],
        [StandardScaler(with_mean=False), RidgeClassifier(100)],
        [MinMaxScaler(clip=True), LogisticRegression()],
        [MinMaxScaler((-1, 2)), LogisticRegression()],
        [MaxAbsScaler(), LogisticRegression()],
        [RobustScaler(), OneVsRestClassifier(LogisticRegression(C=0.01))],
        [Normalizer("l1"), LogisticRegression(C=1000)],
        [Normalizer("max"), LogisticRegression()],
        [StandardScaler(), PCA(5, whiten=True), LinearDiscriminantAnalysis()],
        [TruncatedSVD(5, random_state=0), Normalizer(), LinearSVC()],
        [SelectKBest(k=20), "passthrough", LogisticRegression()],
        [StandardScaler(), CalibratedClassifierCV(LinearSVC(C=0.01), cv=3)],
        [CalibratedClassifierCV(RidgeClassifier(100), cv=2, ensemble=False)],
        [StandardScaler(), Ridge(10)],
    ],
    ids=lambda steps: "-".join(str(step).partition("(")[0] for step in steps),
)
def test_scalers_and_linear_models(steps, training_images, labels, images):
    y = np.arange(40.0) % 4 if isinstance(steps[-1], Ridge) else labels
    fitted = pipeline(*steps).fit(training_images, y)
    assert_same_predictions(fitted, images)


@pytest.mark.parametrize(
    "calibrated",
    [
        CalibratedClassifierCV(pipeline(LinearSVC(C=0.01)), cv=2),
        CalibratedClassifierCV(pipeline(StandardScaler(), RidgeClassifier(100)), cv=3),
        CalibratedClassifierCV(
            pipeline("passthrough", LogisticRegression()), cv=2, ensemble=False
        ),
        pipeline(
            CalibratedClassifierCV(make_pipeline(MinMaxScaler(), LinearSVC()), cv=2)
        ),
    ],
)
@pytest.mark.parametrize("n_classes", [2, 4])
def test_calibrated_pipelines(calibrated, n_classes, training_images, images):
    fitted = clone(calibrated).fit(training_images, np.arange(40) % n_classes)
    assert_same_predictions(fitted, images)


@pytest.mark.parametrize("factor", [30, 3000])
def test_very_negative_scores(factor, training_images, labels, images):
    """Some sigmoids of scikit-learn vanish, or all of them do."""
    sgd = SGDClassifier(loss="log_loss", random_state=0)
    fitted = pipeline(sgd).fit(training_images, labels)
    fitted[-1].coef_ *= factor
    fitted[-1].intercept_ *= factor
    with np.errstate(invalid="ignore"):
        proba = fitted.predict_proba(images)
    if np.isnan(proba).any():
        pytest.skip(
            "this release of scikit-learn divides by 0 where all of them vanish"
        )
    assert (fitted.decision_function(images).max(axis=1) < -10).any()

    found = outputs_of(to_torch(fitted, X=images), images)

    assert_allclose(found["probabilities"], proba, atol=1e-4)


def test_labels_may_differ_where_the_estimator_is_undecided(training_images, labels):
    """All sigmoids of random images, far from the training images, may be equal."""
    svm = pipeline(LinearSVC(C=0.01)).fit(training_images[:20], labels[:20])
    svm[-1].coef_ *= 1e4
    calibrated = CalibratedClassifierCV(FrozenEstimator(svm), cv=2)
    calibrated.fit(training_images[20:], labels[20:])
    module = to_torch(calibrated)

    found = outputs_of(module, training_images)

    expected = calibrated.predict_proba(training_images)
    assert_allclose(found["probabilities"], expected, atol=1e-4)


def test_values_are_compared_with_their_range(training_images):
    y = training_images.mean(axis=(1, 2, 3)) / 10
    fitted = make_feature_pipeline("tiny", regressor="ridge", precision="float32")
    to_torch(fitted.fit(training_images, y))
    fitted.fit(training_images, y + 1e8)
    with pytest.raises(ExportError, match="values .* the range of the values, is tol"):
        to_torch(fitted)


def test_constant_labels_are_named(training_images, indicators):
    Y = np.column_stack([indicators, np.ones(len(indicators), int)])
    with pytest.warns(UserWarning, match="present in all training examples"):
        fitted = pipeline(OneVsRestClassifier(LogisticRegression())).fit(
            training_images, Y
        )
    with pytest.raises(ExportError, match="no coef_ for label 2, which all images"):
        to_torch(fitted)


def test_calibration_of_a_fitted_pipeline(training_images, labels, images):
    fitted = pipeline(LinearSVC(C=0.01)).fit(training_images[:20], labels[:20])
    calibrated = CalibratedClassifierCV(FrozenEstimator(fitted), cv=2)
    assert_same_predictions(calibrated.fit(training_images[20:], labels[20:]), images)


def test_calibrated_pipelines_of_different_networks_are_refused(
    training_images, labels
):
    random = pipeline(LinearSVC(), weights=None, random_state=None)
    fitted = CalibratedClassifierCV(random, cv=2).fit(training_images, labels)
    with pytest.raises(ExportError, match="transformers .* differ, in their layers"):
        to_torch(fitted)
    fine_tuned = FineTunedCNNClassifier("tiny", **SHORT)
    fitted = CalibratedClassifierCV(fine_tuned, cv=2).fit(training_images, labels)
    with pytest.raises(ExportError, match="CalibratedClassifierCV cannot be exported"):
        to_torch(fitted)


def test_calibration_of_two_classes(training_images, labels, images):
    calibrated = CalibratedClassifierCV(LinearSVC(C=0.01), cv=2)
    fitted = pipeline(calibrated).fit(training_images, labels == "red")
    assert_same_predictions(fitted, images)


def test_one_vs_rest_with_negative_intercepts(training_images, labels):
    # Scaled sigmoids of scores near -30 are their softmax, up to rounding.
    fitted = pipeline(OneVsRestClassifier(LogisticRegression(C=1e-3)))
    fitted.fit(training_images, labels)
    for part in fitted[-1].estimators_:
        part.intercept_ -= 30
    module = to_torch(fitted)
    coef = np.vstack([part.coef_ for part in fitted[-1].estimators_])
    scores = [[40, 45, 0, 0], [35, 32, 30, 0]]  # before the intercepts
    features = (np.array(scores) @ np.linalg.pinv(coef).T).astype(np.float32)
    expected = fitted[-1].predict_proba(features)
    found = module.outputs(torch.from_numpy(features))["probabilities"].numpy()
    assert abs(expected[0, :2] - 0.5).max() < 0.1  # a softmax has 0.007
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_probabilities_that_are_all_zero(training_images, labels, images):
    # They are then 1/4 of four classes.
    calibrated = CalibratedClassifierCV(LinearSVC(C=0.01), cv=2)
    fitted = pipeline(calibrated).fit(training_images, labels)
    for part in fitted[-1].calibrated_classifiers_:
        for calibrator in part.calibrators:
            calibrator.b_ = 2000.0
    assert_same_predictions(fitted, images)


def test_whitening_of_constant_components(training_images, labels, images):
    whitened = PCA(6, whiten=True, svd_solver="full")
    fitted = pipeline(whitened, LogisticRegression())
    fitted.fit(training_images[:4].repeat(3, axis=0), labels[:4].repeat(3))
    whitened.explained_variance_[-1] = 0
    fitted[-1].coef_[:, 3:] = 0  # they multiply rounding errors
    assert_same_predictions(fitted, images)


@pytest.mark.parametrize(
    "parameters",
    [
        {"layer": ["block3", "block1"]},
        {"pooling": "avgmax"},
        {"pooling": 2},
        {"pooling": "flatten", "layer": "block4"},
        {"n_views": 2},
        {"image_size": (64, 48), "crop": "pad"},
    ],
    ids=str,
)
def test_parameters_of_the_transformer(parameters, training_images, labels, images):
    classifier = LogisticRegression(C=1e-3)
    fitted = pipeline(classifier, **parameters).fit(training_images, labels)
    assert_same_predictions(fitted, images)


def test_several_values(training_images, images):
    y = np.random.default_rng(0).normal(size=(40, 3))
    fitted = pipeline(StandardScaler(), Ridge(10)).fit(training_images, y)
    assert_same_predictions(fitted, images)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"conv_channels": [4]}, {"hidden_units": [8], "dropout": 0.5, "pooling": 2}],
    ids=str,
)
@pytest.mark.parametrize("targets", ["four classes", "two classes", "labels"])
def test_fine_tuned_classifiers(
    parameters, targets, training_images, labels, indicators, images
):
    y = {"four classes": labels, "two classes": labels == "red", "labels": indicators}
    classifier = FineTunedCNNClassifier("tiny", **SHORT, **parameters)
    assert_same_predictions(classifier.fit(training_images, y[targets]), images)


def test_fine_tuned_regressor(training_images, images):
    regressor = FineTunedCNNRegressor("tiny", **SHORT)
    regressor.fit(training_images, np.arange(40) * 100.0)
    assert_same_predictions(regressor, images)


@pytest.mark.parametrize("class_map", [None, "dict", "learn"])
def test_pretrained_classifiers(class_map, training_images, labels, images):
    classifier = PretrainedCNNClassifier("tiny", engine="torch", precision="float32")
    if class_map == "dict":
        names = classifier.fit(training_images).categories_
        class_map = {"few": names[:3].tolist(), "many": names[3:150].tolist()}
    classifier.set_params(class_map=class_map).fit(training_images, labels)
    assert_same_predictions(classifier, images)


def test_searches_and_wrappers(training_images, labels, images):
    grid = {"logisticregression__C": [0.01, 0.1]}
    search = GridSearchCV(pipeline(LogisticRegression()), grid, cv=2)
    assert_same_predictions(search.fit(training_images, labels), images)
    transfer = TransferClassifier(
        strategy="extract", transformer=transformer(layer="last"), random_state=0
    )
    assert_same_predictions(transfer.fit(training_images, labels), images)


def test_pipelines_in_pipelines(training_images, labels, images):
    frozen = FrozenEstimator(make_pipeline(transformer()).fit(training_images))
    search = GridSearchCV(LogisticRegression(), {"C": [0.01, 0.1]}, cv=2)
    inner = make_pipeline(StandardScaler(), None, make_pipeline(PCA(5), search))
    fitted = make_pipeline(frozen, inner).fit(training_images, labels)
    assert_same_predictions(fitted, images)


def test_feature_names_do_not_matter(training_images, labels, images):
    pytest.importorskip("pandas")
    fitted = pipeline(StandardScaler(), LogisticRegression())
    fitted.set_output(transform="pandas").fit(training_images, labels)
    assert_same_predictions(fitted, images)


def test_files_of_any_size(training_images, labels, tmp_path):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    paths = [tmp_path / "wide.png", tmp_path / "gray.png"]
    Image.fromarray(training_images[0]).resize((300, 100)).save(paths[0])
    Image.fromarray(training_images[1]).convert("L").save(paths[1])
    assert_same_predictions(fitted, paths)


def test_rows_of_pixels(digits):
    rows, y = digits[0][:40], digits[1][:40] % 2
    fitted = pipeline(LogisticRegression(), image_shape=(8, 8)).fit(rows, y)
    module = to_torch(fitted)
    crops = crop_images(rows[:9], module.preprocessing_, image_shape=(8, 8))
    assert crops.dtype == np.float32
    scores = module(torch.from_numpy(crops))["scores"].numpy()
    np.testing.assert_allclose(scores, fitted.decision_function(rows[:9]), atol=1e-4)


@pytest.mark.real_data
def test_imagenet_weights(squeezenet_weights, flowers):
    paths = flowers[0][::40]
    classifier = PretrainedCNNClassifier("squeezenet1_0", weights=squeezenet_weights)
    classifier.set_params(engine="torch", precision="float32").fit(paths)
    assert_same_predictions(classifier, paths)


def test_the_module_describes_itself(training_images, labels):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    module = to_torch(fitted)
    metadata = {name: json.loads(text) for name, text in module.metadata_.items()}
    assert metadata["classes"] == ["blue", "green", "red", "yellow"]
    assert Preprocessing(**metadata["preprocessing"]) == module.preprocessing_
    assert metadata["backbone"] == "tiny"
    assert {"skltl", "torch", "scikit-learn"} <= metadata["versions"].keys()


def test_classes_that_are_dates(training_images):
    days = np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[ns]")
    fitted = pipeline(LogisticRegression())
    fitted.fit(training_images, days[np.arange(40) % 2])
    classes = json.loads(to_torch(fitted).metadata_["classes"])
    np.testing.assert_array_equal(np.array(classes, dtype=days.dtype), days)


def test_the_module_is_independent_of_the_estimator(training_images, labels, images):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    expected = fitted.decision_function(images)
    module = to_torch(fitted)
    fitted.fit(training_images[:, ::-1], labels[::-1])
    np.testing.assert_allclose(
        outputs_of(module, images)["scores"], expected, atol=1e-3
    )
    assert not any(weights.requires_grad for weights in module.parameters())


def test_the_module_refuses_what_are_no_crops(training_images, labels):
    classifier = pipeline(LogisticRegression()).fit(training_images, labels)
    module = to_torch(classifier)
    crops = torch.from_numpy(crop_images(training_images, module.preprocessing_))
    height, width, _ = crops.shape[1:]
    expected = module(crops)["probabilities"]
    assert_allclose(module(crops.float() / 255)["probabilities"], expected, atol=1e-6)
    assert module(crops[:0])["probabilities"].shape == (0, expected.shape[1])
    for wrong in crops[:, 1:], crops.permute(0, 3, 1, 2), crops[0]:
        shape = rf"\(n, {height}, {width}, 3\), got .*crop_images"
        with pytest.raises(ValueError, match=shape):
            module(wrong)
    with pytest.raises(ValueError, match=rf"largest is {crops.max()}\. Pass uint8"):
        module(crops.float())
    with pytest.raises(TypeError, match="tensor, got ndarray"):
        module(crops.numpy())


# About kernels in the order of memory that is fast on a CPU.
@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_an_exported_program_takes_any_number_of_images(
    training_images, labels, images
):
    fitted = pipeline(StandardScaler(), LogisticRegression())
    fitted.fit(training_images, labels)
    module = to_torch(fitted)
    crops = torch.from_numpy(crop_images(images, module.preprocessing_))
    program = torch.export.export(
        module, (crops[:2],), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=module.metadata_)
    file.seek(0)
    loaded = torch.export.load(file).module()
    expected = fitted.decision_function(images)
    for n_images in (1, 9):
        scores = loaded(crops[:n_images])["scores"].numpy()
        np.testing.assert_allclose(scores, expected[:n_images], atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
        torch.device("meta"),
    ],
    ids=["autocast", "inference", "device"],
)
def test_settings_of_the_user_do_not_matter(settings, training_images, labels, images):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    with settings:
        module = to_torch(fitted)
    tensors = [*module.parameters(), *module.buffers()]
    assert {(one.device.type, one.dtype) for one in tensors} == {("cpu", torch.float32)}
    assert not any(one.is_inference() for one in tensors)
    expected = fitted.decision_function(images)
    np.testing.assert_allclose(
        outputs_of(module, images)["scores"], expected, atol=1e-3
    )


def test_a_wrong_module_is_refused(training_images, labels):
    fitted = pipeline(Doubled(), LogisticRegression()).fit(training_images, labels)
    with pytest.raises(ExportError, match=r"scores of the torch module .* by \d"):
        to_torch(fitted)


class Reversed(LogisticRegression):
    """A classifier that predicts other classes than those with the highest scores."""

    def predict_proba(self, X):
        return super().predict_proba(X)[:, ::-1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([KNeighborsClassifier()], "'kneighborsclassifier' .* no coef_"),
        ([SVC()], "'svc' .* no coef_"),
        ([OutputCodeClassifier(LinearSVC(), random_state=0)], "is not a linear model"),
        ([QuantileTransformer(n_quantiles=5), LinearSVC()], "'quantiletransformer'"),
        ([Reversed()], "'reversed' .* neither the softmax nor"),
        (
            [CalibratedClassifierCV(LinearSVC(), method="isotonic", cv=2)],
            "'calibratedclassifiercv' .*'isotonic'",
        ),
        ([StandardScaler()], "does not predict"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_step(steps, message, training_images, labels):
    fitted = pipeline(*steps).fit(training_images, labels)
    with pytest.raises(ExportError, match=message):
        to_torch(fitted)


def test_chains_are_refused(training_images):
    y = np.random.default_rng(0).normal(size=(40, 2))
    fitted = pipeline(RegressorChain(Ridge())).fit(training_images, y)
    with pytest.raises(ExportError, match="in RegressorChain have different numbers"):
        to_torch(fitted)


def test_other_estimators_are_refused(training_images, labels):
    with pytest.raises(ExportError, match="CNNFeatureTransformer cannot be exported"):
        to_torch(transformer().fit(training_images))
    views = pipeline(LogisticRegression(), n_views=10).fit(training_images, labels)
    with pytest.raises(ExportError, match="n_views=10 views"):
        to_torch(views)
    features = CNNFeatureTransformer("tiny").fit_transform(training_images)
    with pytest.raises(ExportError, match="LogisticRegression cannot be exported"):
        to_torch(LogisticRegression().fit(features, labels))


def test_images_of_the_user_are_compared(training_images, labels):
    fitted = pipeline(LogisticRegression()).fit(training_images, labels)
    to_torch(fitted, X=training_images[:3])
    with pytest.raises(ExportError, match="other than 8 bits"):
        to_torch(fitted, X=training_images[:3] / 255)

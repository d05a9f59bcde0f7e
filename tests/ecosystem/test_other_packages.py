"""The code blocks of the guide's page about other packages do what the page says.

Those whose package is not installed are skipped: ``pip install -e ".[ecosystem]"``.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from guide_code import (
    GUIDE,
    blocks_of,
    create_photographs,
    run,
    sections_of,
    sources_of,
)
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skltl import CNNFeatureTransformer, load_image_folder, make_feature_pipeline

# Other packages warn, for instance of what will change in those that they use.
pytestmark = pytest.mark.filterwarnings("default")

SECTIONS = sections_of(GUIDE / "ecosystem.rst")
PACKAGES = {
    "skrub": "skrub",
    "cleanlab": "cleanlab",
    "imbalanced-learn": "imblearn",
    "MLflow": "mlflow",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return create_photographs(tmp_path_factory.mktemp("guide"))


@pytest.fixture
def names(photographs, monkeypatch):
    """What the first section of the page defines, in the folder of its images."""
    monkeypatch.chdir(photographs.parent)
    return run(sources_of(SECTIONS["With the rest of the ecosystem"]), {})


@pytest.fixture
def run_section(names):
    """Run the code of a section, and return its names."""

    def run_section(title):
        return run(blocks_of(SECTIONS[title]), names)

    return run_section


@pytest.fixture
def features(names):
    """The features of the images of the page."""
    return CNNFeatureTransformer("tiny", layer="block3").fit_transform(names["X"])


def test_each_section_with_code_is_tested():
    assert [title for title, text in SECTIONS.items() if blocks_of(text)] == [*PACKAGES]


def test_skrub_replaces_the_image_column_by_its_features(run_section, features):
    pytest.importorskip("skrub")

    found = run_section("skrub")

    table = found["vectorizer"].transform(found["table"])
    of_images = [name for name in table.columns if name.startswith("tiny_block3_")]
    assert_array_equal(table[of_images], features)
    camera = found["table"]["camera"] == "B"
    columns = np.column_stack([features, np.arange(100), camera])
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    expected.fit(columns, found["y"])
    predicted = found["model"].predict_proba(found["table"])
    assert_allclose(predicted, expected.predict_proba(columns), atol=1e-3)


def test_cleanlab_finds_the_wrong_labels(run_section):
    pytest.importorskip("cleanlab")
    pytest.importorskip("datasets", reason="Datalab needs cleanlab[datalab]")

    found = run_section("cleanlab")

    assert np.flatnonzero(found["is_wrong"]).tolist() == [10, 47]
    issues = {
        "Datalab": found["lab"].get_issues("label")["is_label_issue"],
        "CleanLearning": found["cleaned"].get_label_issues()["is_label_issue"],
    }
    assert {name: [*np.flatnonzero(one)] for name, one in issues.items()} == {
        "Datalab": [10, 47],
        "CleanLearning": [10, 47],
    }
    right, X = np.delete(np.arange(100), [10, 47]), found["X"]
    expected = clone(found["classifier"]).fit(X[right], found["targets"][right])
    predicted = found["cleaned"].predict_proba(X)
    assert_allclose(predicted, expected.predict_proba(X), atol=1e-3)


def test_cleanlab_takes_no_list_of_paths(names):
    learning = pytest.importorskip("cleanlab.classification").CleanLearning

    with pytest.raises(TypeError, match="list-based indexing"):
        learning(names["classifier"]).fit([*names["X"]], names["images"].target)


def test_imbalanced_learn_samples_features_and_paths(run_section, features):
    pytest.importorskip("imblearn")

    found = run_section("imbalanced-learn")

    scaler = StandardScaler().fit(features)
    is_sky = found["y"] == "sky"
    sampled = clone(found["smote"]).fit_resample(scaler.transform(features), is_sky)
    assert np.bincount(sampled[1]).tolist() == [80, 80]
    expected = clone(found["classifier"][-1]).fit(*sampled)
    assert_allclose(
        found["balanced"].predict_proba(found["X"]),
        expected.predict_proba(scaler.transform(features)),
        rtol=1e-5,
    )
    assert np.bincount(found["is_sky_of_fewer"]).tolist() == [20, 20]
    paths = found["fewer"][:, 0]
    assert len({*paths} & {*found["X"]}) == 40
    assert_array_equal(["sky" in path for path in paths], found["is_sky_of_fewer"])


def test_ensembles_of_imbalanced_learn_take_a_column_of_paths(names, features):
    make = pytest.importorskip("imblearn.ensemble").BalancedBaggingClassifier
    column, is_sky = names["X"].reshape(-1, 1), names["y"] == "sky"
    ensemble = make(names["classifier"], n_estimators=2, random_state=0)

    found = ensemble.fit(column, is_sky).predict_proba(column)

    expected = []
    for one, drawn in zip(
        ensemble.estimators_, ensemble.estimators_samples_, strict=True
    ):
        chosen = drawn[one[0].sample_indices_]
        assert len(set(np.bincount(is_sky[chosen]))) == 1
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        head.fit(features[chosen], is_sky[chosen])
        expected.append(head.predict_proba(features))
    assert_allclose(found, np.mean(expected, axis=0), rtol=1e-3)
    with pytest.raises(ValueError, match="2D"):
        ensemble.fit([*names["X"]], is_sky)


def test_mlflow_logs_a_pipeline_for_data_frames_of_paths(names):
    pytest.importorskip("mlflow")
    images = load_image_folder("photographs")
    y = np.array(images.target_names)[images.target]
    classifier = make_feature_pipeline("tiny", "softmax").fit(images.data, y)

    section = sections_of(GUIDE / "deployment.rst")["MLflow"]
    found = run(blocks_of(section), {"classifier": classifier, "images": images})

    assert_array_equal(found["by_mlflow"], classifier.predict(images.data))


def test_mlflow_saves_and_loads_without_pickle(run_section):
    pytest.importorskip("mlflow")

    found = run_section("MLflow")

    flavors = found["mlflow"].models.get_model_info("model").flavors
    assert flavors["sklearn"]["serialization_format"] == "skops"
    expected = found["classifier"].predict_proba(found["X"])
    assert_array_equal(found["loaded"].predict_proba(found["X"]), expected)
    paths = found["X"]
    encoded = [Path(path).read_bytes() for path in paths]
    labels = found["classifier"].predict(paths)
    for images in (paths, [*paths], encoded):
        assert_array_equal(found["service"].predict(images), labels)
        column = pd.DataFrame({"image": images})
        assert_array_equal(found["service"].predict(column), labels)

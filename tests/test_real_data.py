"""Results on real weights, photographs and flowers, as the README reports them.

The tests run where ``SKLTL_TEST_DATA`` names the folder of that data. The expected
figures were measured with torchvision and scikit-learn alone.
"""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    StratifiedShuffleSplit,
    cross_val_score,
    train_test_split,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    make_feature_pipeline,
)

pytestmark = pytest.mark.real_data

FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
DIGIT_SPLITS = StratifiedShuffleSplit(5, train_size=100, test_size=1000, random_state=0)
# Small digits, enlarged to less than the usual 224 pixels.
DIGITS = {"image_shape": (8, 8), "image_size": 96}


def linear_svm():
    return make_pipeline(StandardScaler(), LinearSVC(C=0.01))


def split_by_layer(transformer, features):
    """Return {layer: features of the layer} of a fitted transformer."""
    names = [name.rpartition("_")[0] for name in transformer.get_feature_names_out()]
    return {
        layer: features[:, np.array(names) == f"{transformer.backbone}_{layer}"]
        for layer in transformer.layer
    }


def standard_error(accuracy, n_images):
    return np.sqrt(accuracy * (1 - accuracy) / n_images)


@pytest.fixture(scope="module")
def squeezenet(squeezenet_weights):
    """Parameters of SqueezeNet 1.0 with ImageNet weights."""
    return {"backbone": "squeezenet1_0", "weights": squeezenet_weights}


@pytest.fixture(scope="module")
def flower_paths(flowers):
    """Paths of the flowers as an array, and their labels."""
    paths, labels = flowers
    return np.array(paths, dtype=object), labels


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Folder of features: each flower runs through the network once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def imagenet_samples(real_data):
    """Paths and class indices of 50 images of ImageNet."""
    folder = real_data / "imagenet_samples"
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    paths = [folder / row["file"] for row in rows]
    return paths, [int(row["class_index"]) for row in rows]


def test_top_1_and_top_5_accuracy_on_imagenet_samples(imagenet_samples, squeezenet):
    paths, classes = imagenet_samples
    classifier = PretrainedCNNClassifier(**squeezenet).fit(paths)

    top = classifier.predict_top_k(paths, k=5)

    names = classifier.categories_[classes]
    assert len(paths) == 50
    assert abs((top[:, 0] == names).sum() - 27) <= 1  # 0.54
    assert abs((top == names[:, None]).any(axis=1).sum() - 40) <= 1  # 0.80


def test_accuracy_on_flowers_grows_with_the_depth(flower_paths, squeezenet, cache):
    paths, labels = flower_paths
    expected = {
        "stem": 0.495,
        "fire4": 0.716,
        "fire7": 0.850,
        "fire8": 0.902,
        "fire9": 0.907,
    }
    transformer = CNNFeatureTransformer(
        **squeezenet, layer=list(expected), precision="float32", cache=cache
    )
    features = transformer.fit_transform(paths)

    found = {
        layer: cross_val_score(linear_svm(), part, labels, cv=FOLDS).mean()
        for layer, part in split_by_layer(transformer, features).items()
    }

    # Rounding differs between CPUs: 2 of 408 images.
    assert found == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
def test_three_linear_classifiers_on_paths_of_flowers(
    classifier, flower_paths, squeezenet, cache
):
    paths, labels = flower_paths
    test = np.arange(len(paths)) % 4 == 0
    pipeline = make_feature_pipeline(
        classifier=classifier, precision="float32", cache=cache, **squeezenet
    )

    pipeline.fit(paths[~test], labels[~test])

    assert pipeline.score(paths[test], labels[test]) > 0.85


def test_features_of_the_tiny_backbone_beat_raw_pixels_on_digits(digits):
    X, y = digits
    transformer = CNNFeatureTransformer(
        "tiny", layer="block3", image_shape=(8, 8), image_size=32
    )
    features = transformer.fit_transform(X)

    on_pixels = cross_val_score(linear_svm(), X * 16, y, cv=DIGIT_SPLITS).mean()
    on_features = cross_val_score(linear_svm(), features, y, cv=DIGIT_SPLITS).mean()

    assert on_features > on_pixels + 0.02


@pytest.mark.slow
def test_features_of_the_tiny_backbone_classify_flowers(flower_paths):
    paths, labels = flower_paths
    features = CNNFeatureTransformer("tiny", image_size=128).fit_transform(paths)

    score = cross_val_score(linear_svm(), features, labels, cv=FOLDS).mean()

    # Raw pixels, at 16 x 16, reach 0.355.
    assert score > 0.73


@pytest.mark.slow
def test_an_earlier_layer_is_better_for_digits(digits, squeezenet):
    X, y = digits
    transformer = CNNFeatureTransformer(
        **squeezenet, layer=["fire7", "fire9"], image_shape=(8, 8)
    )
    features = transformer.fit_transform(X)

    scores = {
        layer: cross_val_score(linear_svm(), part, y, cv=DIGIT_SPLITS).mean()
        for layer, part in split_by_layer(transformer, features).items()
    }

    assert scores["fire7"] > scores["fire9"] + 0.03


@pytest.mark.slow
def test_a_grid_search_on_paths_selects_the_last_layer_for_flowers(
    flower_paths, squeezenet, cache
):
    paths, labels = flower_paths
    few = np.arange(len(paths)) % 24 < 8  # eight of each class
    grid = GridSearchCV(
        make_feature_pipeline(classifier="svm", cache=cache, **squeezenet),
        {"feat__layer": ["stem", "fire7", "last"], "svm__C": [0.001, 0.01]},
        cv=3,
        error_score="raise",
    )

    grid.fit(paths[few], labels[few])

    assert grid.best_params_["feat__layer"] == "last"


@pytest.mark.slow
def test_fine_tuning_is_as_accurate_as_a_linear_svm_on_flowers(
    flower_paths, squeezenet
):
    paths, labels = flower_paths
    splits = StratifiedShuffleSplit(3, train_size=272, test_size=136, random_state=0)
    scores = []
    for seed, (train, test) in enumerate(splits.split(paths, labels)):
        classifiers = (
            make_feature_pipeline(classifier="svm", **squeezenet),
            FineTunedCNNClassifier(**squeezenet, unfreeze=1, random_state=seed),
        )
        scores.append(
            [
                classifier.fit(paths[train], labels[train]).score(
                    paths[test], labels[test]
                )
                for classifier in classifiers
            ]
        )

    svm, tuned = np.mean(scores, axis=0)
    assert svm > 0.85
    assert tuned >= svm - standard_error(svm, 3 * 136)


def labels_of(kind, classes):
    """Return five labels of each flower, which follow from its class.

    A label is a random set of the 17 classes, or a bit of the number of the class.
    """
    if kind == "bits":
        return (classes[:, None] >> np.arange(5)) & 1
    members = np.random.default_rng(0).random((17, 5)) < 0.5
    return members[classes].astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sets", "bits", "hue"])
def test_fine_tuning_on_labels_and_values_is_as_good_as_linear_models(
    kind, flower_paths, squeezenet, cache
):
    """Subset accuracy of labels, and R² of the mean hue, are not lower.

    As everywhere here, "not lower" is by one standard error, of the difference.
    """
    paths, names = flower_paths
    parameters = {**squeezenet, "cache": cache}
    tuning = {"unfreeze": 2, "random_state": 0}
    if kind == "hue":
        hues = [np.asarray(Image.open(path).convert("HSV"))[..., 0] for path in paths]
        y = np.array([hue.mean() for hue in hues]) / 255
        model, tuned = Ridge(100), FineTunedCNNRegressor(**parameters, **tuning)
    else:
        y = labels_of(kind, np.unique(names, return_inverse=True)[1])
        model = OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000))
        tuned = FineTunedCNNClassifier(**parameters, **tuning)
    features = CNNFeatureTransformer(**parameters)
    folds = list(FOLDS.split(paths, names))

    frozen = make_pipeline(features, StandardScaler(), model)
    expected = cross_val_score(frozen, paths, y, cv=folds)
    differences = cross_val_score(tuned, paths, y, cv=folds) - expected

    error = differences.std(ddof=1) / np.sqrt(len(folds))
    assert expected.mean() > 0.5
    assert differences.mean() >= -error
    if kind == "hue":
        assert differences.mean() > 2 * error


@pytest.mark.slow
def test_fine_tuning_beats_frozen_features_on_digits(digits, squeezenet):
    """By far those of the last layer; it equals those of the best, unknown layer.

    A single split cannot show more: three images of the 797 are a standard error.
    """
    X_train, X_test, y_train, y_test = train_test_split(
        *digits, train_size=1000, stratify=digits[1], random_state=1
    )
    layers = [f"fire{number}" for number in range(2, 10)]
    transformer = CNNFeatureTransformer(layer=layers, **squeezenet, **DIGITS)
    train = split_by_layer(transformer, transformer.fit_transform(X_train))
    test = split_by_layer(transformer, transformer.transform(X_test))

    frozen = [
        linear_svm().fit(train[layer], y_train).score(test[layer], y_test)
        for layer in layers
    ]
    tuned = FineTunedCNNClassifier(
        layer="fire8", random_state=1, **squeezenet, **DIGITS
    ).fit(X_train, y_train)

    score, best = tuned.score(X_test, y_test), max(frozen)
    assert best > 0.98
    assert score > frozen[-1] + 2 * standard_error(best, len(y_test))
    assert score >= best - standard_error(best, len(y_test))


@pytest.mark.slow
def test_balanced_class_weights_improve_the_recall_of_rare_flowers(
    flower_paths, squeezenet
):
    paths, labels = flower_paths
    position = np.arange(len(paths)) % 24  # 24 images of each class
    is_rare = np.isin(labels, np.unique(labels)[::2])
    is_train = (position < 2) | (~is_rare & (position < 16))
    is_test = is_rare & (position >= 16)

    recalls = [
        FineTunedCNNClassifier(
            unfreeze=None,
            head_init="random",
            head_epochs=5,
            class_weight=class_weight,
            random_state=0,
            **squeezenet,
        )
        .fit(paths[is_train], labels[is_train])
        .score(paths[is_test], labels[is_test])
        for class_weight in (None, "balanced")
    ]

    assert recalls[1] > recalls[0] + 0.05


@pytest.mark.slow
def test_flowers_are_similar_to_imagenet(flower_paths, squeezenet, cache):
    advisor = StrategyAdvisor(
        CNNFeatureTransformer(**squeezenet, cache=cache), random_state=0
    )

    advisor.fit(*flower_paths)

    assert advisor.similarity_ == "similar"
    assert advisor.strategy_.name == "extract"
    assert advisor.strategy_.estimator[0].layer == "last"
    assert advisor.layer_scores_["fire9"] > 0.88


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_digits_are_different_and_an_earlier_layer_is_better(
    seed, digits, squeezenet
):
    X, y = digits
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, train_size=100, test_size=1000, stratify=y, random_state=seed
    )

    classifier = TransferClassifier(
        CNNFeatureTransformer(**squeezenet, **DIGITS), random_state=seed
    )
    score = classifier.fit(X_train, y_train).score(X_test, y_test)
    last = make_feature_pipeline(classifier="svm", **squeezenet, **DIGITS)
    score_at_last = last.fit(X_train, y_train).score(X_test, y_test)

    assert classifier.advisor_.similarity_ == "different"
    assert classifier.strategy_.name == "extract_early"
    assert score >= score_at_last + 0.03

"""Duplicates, wrong labels, outliers and look-alikes, known beforehand."""

import io
import pickle
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    ImageNeighbors,
    find_duplicates,
    find_label_errors,
    find_outliers,
    load_image_folder,
    make_feature_pipeline,
)
from skltl.exceptions import ImageReadError


@pytest.fixture(scope="module")
def patches():
    """Forty different parts of two photographs."""
    rng = np.random.default_rng(0)
    found = []
    for photograph in load_sample_images().images:
        corners = rng.integers(0, np.array(photograph.shape[:2]) - 100, size=(20, 2))
        found += [photograph[y : y + 100, x : x + 100] for y, x in corners]
    return found


def encoded(image, quality=95):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def copy_of(kind, image):
    """Return a copy of a PIL image that was changed in some way, as a JPEG file."""
    width, height = image.size
    if kind == "resized":
        return encoded(image.resize((width // 2, height // 2)))
    if kind == "recompressed":
        return encoded(image, 40)
    if kind == "mirrored":
        return encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    left, top = int(0.025 * width), int(0.025 * height)
    return encoded(image.crop((left, top, width - left, height - top)))


LEAST_RECALL = {"resized": 0.95, "recompressed": 0.95, "cropped": 0.9, "mirrored": 0.9}


# Duplicates


def test_identical_images_have_distance_0(patches, tmp_path):
    """Whatever holds them."""
    path = tmp_path / "image.png"
    Image.fromarray(patches[3]).save(path)
    X = [*patches, patches[7].copy(), path]
    transformer = CNNFeatureTransformer("tiny")

    found = find_duplicates(X, transformer, max_distance=0)

    assert found.pairs == [(3, 41, 0.0), (7, 40, 0.0)]
    groups = found.groups
    assert groups[41] == groups[3]
    assert groups[40] == groups[7]
    assert len(np.unique(groups)) == 40


def test_distances_are_those_of_features_of_length_1(patches):
    transformer = CNNFeatureTransformer("tiny")
    features = transformer.fit_transform(patches).astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    usual = np.median(np.sort(distances, axis=1)[:, 5])

    found = find_duplicates(patches, transformer, max_distance=0.5)

    expected = {(i, j) for i, j in np.argwhere(distances <= 0.5) if i < j}
    assert {(pair.first, pair.second) for pair in found.pairs} == expected
    for pair in found.pairs:
        assert pair.distance == pytest.approx(distances[pair[:2]], abs=1e-3)
    assert [pair.distance for pair in found.pairs] == sorted(
        pair.distance for pair in found.pairs
    )
    default = find_duplicates(patches, transformer).max_distance
    assert default == pytest.approx(0.4 * usual, rel=1e-3)


def test_chains_of_duplicates_are_one_group(patches):
    X = [patches[0], patches[1], patches[0], patches[2], patches[0], patches[2]]

    groups = find_duplicates(X, CNNFeatureTransformer("tiny"), max_distance=0).groups

    assert_array_equal(groups, [0, 1, 0, 2, 0, 2])


def test_leaks_from_one_set_to_another(patches):
    train, test = patches[:30], [patches[35], patches[4], patches[36], patches[4]]

    found = find_duplicates(
        train, CNNFeatureTransformer("tiny"), other=test, max_distance=0
    )

    assert found.pairs == [(4, 1, 0.0), (4, 3, 0.0)]
    assert found.groups is None


def test_images_that_cannot_be_read_have_no_duplicates(patches):
    X = [patches[0], "missing.jpg", patches[0], "missing.jpg"]
    transformer = CNNFeatureTransformer("tiny", on_error="nan")

    assert find_duplicates(X, transformer, max_distance=0).pairs == [(0, 2, 0.0)]
    assert find_duplicates(X[1:2], transformer).pairs == []
    with pytest.raises(ImageReadError, match="Image 1"):
        find_duplicates(X, CNNFeatureTransformer("tiny"))


@pytest.mark.parametrize("max_distance", [-0.1, 2.1, np.nan, "0.1"])
def test_odd_distances_are_refused(max_distance, patches):
    with pytest.raises((ValueError, TypeError), match="max_distance"):
        find_duplicates(
            patches, CNNFeatureTransformer("tiny"), max_distance=max_distance
        )


@pytest.mark.parametrize("transformer", ["tiny", LogisticRegression()])
def test_what_is_no_transformer_is_refused(transformer, patches):
    with pytest.raises(TypeError, match="transformer must be a CNNFeatureTransformer"):
        find_duplicates(patches, transformer)
    with pytest.raises(TypeError, match="transformer must be a CNNFeatureTransformer"):
        ImageNeighbors(transformer).fit(patches)


def test_an_unfitted_network_with_a_head_is_refused(patches):
    with pytest.raises(NotFittedError, match="FineTunedCNNClassifier is fitted with"):
        find_outliers(patches, FineTunedCNNClassifier("tiny"))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.array(["a", 1] * 20, dtype=object), "groups must be of one type"),
        ([0.0, np.nan] * 20, "groups contains NaN"),
    ],
    ids=["types", "NaN"],
)
def test_odd_groups_are_refused(groups, message, patches):
    with pytest.raises(ValueError, match=message):
        find_label_errors(
            patches, np.arange(40) % 2, CNNFeatureTransformer("tiny"), groups=groups
        )


@pytest.mark.real_data
@pytest.mark.parametrize(("kind", "least"), [*LEAST_RECALL.items()])
def test_copies_of_flowers_are_found(kind, least, real_data, squeezenet, tmp_path):
    X, *_ = flowers_of(real_data)
    chosen = np.random.default_rng(0).permutation(len(X))[:40]
    copies = [copy_of(kind, Image.open(X[index]).convert("RGB")) for index in chosen]
    transformer = squeezenet(tmp_path)
    known = find_duplicates(X, transformer)  # some photographs are there twice

    found = find_duplicates([*X, *copies], transformer)

    pairs = {pair[:2] for pair in found.pairs} - {pair[:2] for pair in known.pairs}
    planted = {(int(index), len(X) + number) for number, index in enumerate(chosen)}
    kin = {
        (first, second)
        for first, second in pairs
        if second >= len(X)
        and known.groups[first] == known.groups[chosen[second - len(X)]]
    }
    assert len(pairs & planted) >= least * len(planted)
    assert len(pairs & planted) >= 0.95 * len(pairs - (kin - planted))
    assert len(known.pairs) <= 5


@pytest.mark.real_data
def test_groups_of_copies_give_the_right_accuracy(real_data, squeezenet, tmp_path):
    X, y = flowers_of(real_data)
    chosen = np.random.default_rng(1).permutation(len(X))[:136]
    kinds = ["resized", "recompressed", "mirrored"]
    copies = [
        copy_of(kind, Image.open(X[index]).convert("RGB"))
        for index in chosen
        for kind in kinds
    ]
    everything, labels = [*X, *copies], np.append(y, np.repeat(y[chosen], len(kinds)))
    transformer = squeezenet(tmp_path)
    classifier = make_pipeline(
        transformer, *(step for _, step in make_feature_pipeline().steps[1:])
    )
    groups = find_duplicates(everything, transformer).groups
    options = {"n_splits": 5, "shuffle": True, "random_state": 0}

    true = cross_val_score(classifier, X, y, cv=StratifiedKFold(**options)).mean()
    naive = cross_val_score(classifier, everything, labels, cv=KFold(**options)).mean()
    # Each photograph counts once, as it does without copies.
    predicted = cross_val_predict(
        classifier, everything, labels, cv=GroupKFold(**options), groups=groups
    )
    grouped = (predicted == labels)[: len(X)].mean()

    assert naive > true + 0.04
    assert abs(grouped - true) < 0.02


# Wrong labels


def test_label_errors_are_cross_validated():
    digits = load_digits()
    X, y = digits.data[:150] / 16, digits.target[:150].astype(str)
    y[[4, 40]] = "7"
    transformer = CNNFeatureTransformer(
        "tiny", layer="block3", image_shape=(8, 8), image_size=32
    )
    model = make_pipeline(
        transformer, StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    proba = cross_val_predict(model, X, y, cv=folds, method="predict_proba")

    found = find_label_errors(X, y, transformer)

    assert_allclose(found.proba, proba, atol=1e-5)
    assert_array_equal(found.suggested, np.unique(y)[proba.argmax(axis=1)])
    assert {4, 40} <= set(found.order[:5].tolist())
    assert found.is_suspect[[4, 40]].any()
    own = proba[np.arange(150), np.searchsorted(np.unique(y), y)]
    best = np.sort(np.where(proba == own[:, None], 0, proba), axis=1)[:, -1]
    assert_allclose(found.log_odds, np.log(own / best), rtol=1e-3)
    assert_array_equal(found.order, np.argsort(found.log_odds, kind="stable"))


def test_suspects_are_those_of_confident_learning():
    """By hand: the thresholds are 0.75 for the first class, and 0.5 for the second."""
    from skltl.curation._label_errors import _is_suspect

    proba = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.8, 0.2], [0.55, 0.45]])
    labels = np.array([0, 0, 1, 1, 1])

    assert proba[labels == 0, 0].mean() == 0.75
    assert proba[labels == 1, 1].mean() == pytest.approx(0.4833, abs=1e-4)
    assert_array_equal(_is_suspect(proba, labels), [False, False, False, True, False])


def test_copies_with_the_same_wrong_label_do_not_confirm_it(patches):
    X = [*patches, *([patches[2]] * 4)]
    y = np.repeat(["temple", "dahlia"], 20).tolist() + ["dahlia"] * 4
    y[2] = "dahlia"
    transformer = CNNFeatureTransformer("tiny")
    groups = find_duplicates(X, transformer, max_distance=0).groups

    without = find_label_errors(X, y, transformer)
    grouped = find_label_errors(X, y, transformer, groups=groups)

    assert without.log_odds[2] > grouped.log_odds[2]
    assert grouped.is_suspect[[2, 40, 41, 42, 43]].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classifier": "svm"}, "'svm' has no predict_proba"),
        ({"y": [0] * 39 + [1]}, "A class has a single image"),
        ({"y": [0] * 40}, "at least two classes"),
    ],
)
def test_labels_that_cannot_be_cross_validated(arguments, message, patches):
    arguments = {"y": [0, 1] * 20, **arguments}

    with pytest.raises(ValueError, match=message):
        find_label_errors(
            patches, transformer=CNNFeatureTransformer("tiny"), **arguments
        )


@pytest.mark.real_data
def test_wrong_labels_of_flowers_come_first(real_data, squeezenet, tmp_path):
    """One in 20 labels is wrong; of the first 20, most are."""
    X, y = flowers_of(real_data)
    transformer = squeezenet(tmp_path)
    rates, recalls = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        wrong, labels = rng.permutation(len(X))[: len(X) // 20], y.copy()
        for index in wrong:
            labels[index] = rng.choice(np.setdiff1d(np.arange(17), [y[index]]))

        found = find_label_errors(X, labels, transformer)

        rates.append(np.isin(found.order[: len(wrong)], wrong).mean())
        recalls.append(found.is_suspect[wrong].mean())

    assert np.mean(rates) >= 0.7
    assert np.mean(recalls) > 0.5


# Outliers


def test_scores_are_relative_distances(patches):
    transformer = CNNFeatureTransformer("tiny")
    features = transformer.fit_transform(patches).astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    third = np.sort(distances, axis=1)[:, 3]

    found = find_outliers(patches, transformer, n_neighbors=3)

    assert_allclose(found.scores, third / np.median(third), rtol=1e-3)
    assert_array_equal(found.order, np.argsort(-found.scores, kind="stable"))


def test_unreadable_images_are_the_last(patches):
    X = [*patches[:10], "missing.jpg"]

    found = find_outliers(X, CNNFeatureTransformer("tiny", on_error="nan"))

    assert np.isnan(found.scores[10])
    assert found.order[-1] == 10
    with pytest.raises(ValueError, match="n_neighbors=10: there are only 10 images"):
        find_outliers(X[:10], CNNFeatureTransformer("tiny"), n_neighbors=10)


@pytest.mark.real_data
def test_digits_among_flowers_are_outliers(real_data, squeezenet, tmp_path):
    X, _ = flowers_of(real_data)
    digits = [
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((200, 200))
        for image in load_digits().images[:20]
    ]

    found = find_outliers([*X, *digits], squeezenet(tmp_path))

    assert set(range(len(X), len(X) + 20)) <= set(found.order[:30].tolist())


# Look-alikes


def test_neighbors_are_those_of_the_features(patches):
    transformer = CNNFeatureTransformer("tiny")
    features = transformer.fit_transform(patches).astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    index = ImageNeighbors(transformer, n_neighbors=3).fit(patches)

    found, indices = index.kneighbors()
    nearest, first = index.kneighbors([patches[9]], n_neighbors=1)

    assert_array_equal(indices, np.argsort(distances, axis=1)[:, 1:4])
    assert_allclose(found, np.sort(distances, axis=1)[:, 1:4], rtol=1e-3)
    assert first == [[9]]
    assert nearest == pytest.approx(0, abs=1e-3)
    loaded = pickle.loads(pickle.dumps(index))
    assert_array_equal(loaded.kneighbors()[1], indices)


def test_a_cache_is_used_by_all_of_them(patches, tmp_path, monkeypatch):
    from skltl.inference import ExtractionConfig

    n_batches = []
    compute = ExtractionConfig.compute
    monkeypatch.setattr(
        ExtractionConfig,
        "compute",
        lambda self, pixels: n_batches.append(1) or compute(self, pixels),
    )
    transformer = CNNFeatureTransformer("tiny", cache=tmp_path, batch_size=8)

    find_duplicates(patches, transformer)
    find_outliers(patches, transformer)
    find_label_errors(patches, [0, 1] * 20, transformer)
    ImageNeighbors(transformer).fit(patches)

    assert len(n_batches) == 5


def flowers_of(real_data):
    images = load_image_folder(real_data / "flowers17")
    return list(images.data), images.target.copy()


@pytest.fixture
def squeezenet(real_data):
    weights = real_data / "weights" / "squeezenet1_0_imagenet.safetensors"

    def build(cache):
        return CNNFeatureTransformer("squeezenet1_0", weights=weights, cache=cache)

    return build


def test_both_sets_are_compared_in_the_same_features(patches):
    """Of a pipeline that learns a scale from the images, too."""
    pipeline = make_pipeline(CNNFeatureTransformer("tiny"), StandardScaler())

    found = find_duplicates(patches, pipeline, other=patches[:5], max_distance=0.01)

    assert [pair[:2] for pair in found.pairs] == [(n, n) for n in range(5)]


@pytest.mark.parametrize("find", [find_duplicates, find_outliers])
def test_an_unfitted_pipeline_may_end_in_a_stateless_step(find, patches):
    steps = CNNFeatureTransformer("tiny"), Normalizer()

    unfitted = find(patches, make_pipeline(*steps))

    fitted = find(patches, make_pipeline(*steps).fit(patches))
    assert_array_equal(unfitted[0], fitted[0])


def test_classes_of_two_images_each_give_no_warning(patches):
    """Of scikit-learn, which would take their number for that of values."""
    y = [f"class {n // 2}" for n in range(40)]

    errors = find_label_errors(patches, y, CNNFeatureTransformer("tiny"), cv=2)

    assert errors.proba.shape == (40, 20)


@pytest.mark.parametrize("is_fitted", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda X: X[0], "looks like a single color image"),
        (lambda X: "abc.png", "X is a single path"),
        (lambda X: None, "X must be a list"),
        (lambda X: Image.fromarray(X[0]), "X is a single image"),
        (iter, r"Pass list\(X\)"),
    ],
    ids=["array", "path", "None", "PIL", "iterator"],
)
def test_what_is_no_sequence_of_images_is_refused(wrong, message, is_fitted, patches):
    transformer = CNNFeatureTransformer("tiny")
    if is_fitted:
        transformer.fit(patches)

    with pytest.raises((ValueError, TypeError), match=message):
        find_label_errors(wrong(patches), [0, 1] * 20, transformer)


def test_near_copies_are_found_where_most_images_are_copies(patches):
    X = [patches[0]] * 10 + [patches[30]] * 10 + [patches[35]]

    found = find_duplicates(X, CNNFeatureTransformer("tiny"))

    assert len(np.unique(found.groups)) == 3
    scores = find_outliers(X, CNNFeatureTransformer("tiny")).scores
    assert np.argmax(scores) == 20
    assert scores.max() < 10


def test_a_class_in_a_single_group_is_named(patches):
    y = np.repeat(["a", "b", "c", "d"], 10)
    groups = np.where(y == "c", 100, np.arange(40))

    with pytest.raises(ValueError, match="groups: the class 'c' is in so few groups"):
        find_label_errors(patches, y, CNNFeatureTransformer("tiny"), groups=groups)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(find_label_errors, y=[0, 1]), "inconsistent numbers of samples"),
        (partial(find_label_errors, y=[0, 1, 2]), "A class has a single image"),
        (partial(find_outliers, n_neighbors=0), "n_neighbors == 0"),
    ],
)
def test_arguments_are_checked_before_images_are_read(call, message):
    with pytest.raises(ValueError, match=message):
        call(["missing.png"] * 3, transformer=CNNFeatureTransformer("tiny"))


def test_unreadable_images_are_named(patches):
    X = [*patches, "missing.jpg"]
    transformer = CNNFeatureTransformer("tiny", on_error="nan")
    fitted = ImageNeighbors(transformer).fit(patches)

    for use in (
        lambda: find_label_errors(X, [0] * 20 + [1] * 21, transformer),
        lambda: ImageNeighbors(transformer).fit(X),
        lambda: fitted.kneighbors(X),
    ):
        with pytest.raises(ValueError, match="Image 40 could not be read.*drop_bad"):
            use()

"""Features of several views of an image, and of several images of a sample."""

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torchvision.models as models
from PIL import Image
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import functional

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    GradCAMDisplay,
    ImageSetTransformer,
    cache_info,
    make_feature_pipeline,
    recommend_strategy,
)
from skltl.exceptions import ImageReadError


@pytest.fixture
def photos():
    """Images that are larger than a network's input, in both orientations.

    Their margins are even: torchvision crops the mirrored image, which differs by a
    pixel from the mirrored crop where they are odd.
    """
    rng = np.random.default_rng(0)
    small = rng.integers(256, size=(3, 8, 8, 3)).astype(np.uint8)
    sizes = [(384, 256), (300, 400), (256, 256)]
    return [
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(small, sizes, strict=True)
    ]


@pytest.mark.parametrize("n_views", [2, 10])
def test_views_are_torchvisions(n_views, photos, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = models.squeezenet1_0(weights=None).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")

    def views(image):
        resized = functional.resize(image, 256)
        if n_views == 10:
            return functional.ten_crop(resized, 224)
        crop = functional.center_crop(resized, 224)
        return crop, functional.hflip(crop)

    normalization = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    by_hand = []
    for photo in photos:
        pixels = [functional.to_tensor(view) for view in views(photo)]
        batch = functional.normalize(torch.stack(pixels), *normalization)
        with torch.inference_mode():
            by_hand.append(model.features(batch).mean((0, 2, 3)).numpy())

    transformer = CNNFeatureTransformer(
        "squeezenet1_0",
        weights=tmp_path / "weights.safetensors",
        precision="float32",
        n_views=n_views,
    )
    features = transformer.fit_transform(photos)

    np.testing.assert_allclose(features, by_hand, atol=1e-4 * np.max(by_hand))


@pytest.mark.parametrize("crop", ["center", "squash", "pad"])
def test_corners_differ_where_nothing_is_cropped(crop, images):
    # The input has the size of the image, so that the center crop is all of it.
    options = {"image_size": (40, 48), "crop": crop}
    backbone = CNNFeatureTransformer("tiny", **options)
    one, two, ten = (
        backbone.set_params(n_views=n).fit_transform(images) for n in (1, 2, 10)
    )

    distances = np.linalg.norm([ten - one, ten - two, two - one], axis=2)

    assert (distances > 1e-3).all()


def test_views_have_entries_of_their_own_in_the_cache(images, tmp_path):
    transformer = CNNFeatureTransformer("tiny", cache=tmp_path, n_views=2)
    plain = CNNFeatureTransformer("tiny")
    expected = {n: plain.set_params(n_views=n).fit_transform(images) for n in (1, 2)}
    for n_views in (2, 1, 2, 1):
        features = transformer.set_params(n_views=n_views).fit_transform(images)
        np.testing.assert_array_equal(features, expected[n_views])
    stored = [entry.preprocessing for entry in cache_info(tmp_path).entries]
    assert {text.endswith(", 2 views") for text in stored} == {False, True}


def test_views_of_an_image_do_not_depend_on_its_batch(images):
    transformer = CNNFeatureTransformer("tiny", n_views=10, batch_size=4).fit(images)
    whole = transformer.transform(images)
    np.testing.assert_array_equal(transformer.transform(images[5:6])[0], whole[5])
    np.testing.assert_array_equal(transformer.transform(images[::-1])[::-1], whole)


def test_a_mirrored_image_has_the_features_of_the_image(images):
    transformer = CNNFeatureTransformer("tiny", precision="float32", n_views=2)
    mirrored = images[:, :, ::-1]
    np.testing.assert_allclose(
        transformer.fit_transform(images),
        transformer.fit_transform(mirrored),
        atol=1e-4,
    )


def test_the_number_of_views_is_searched_over(images):
    y = [0, 1, 0, 1, 0, 1, 0, 1, 0]
    search = GridSearchCV(
        make_feature_pipeline("tiny"), {"feat__n_views": [1, 2, 10]}, cv=2
    )
    assert set(search.fit(images, y).best_params_) == {"feat__n_views"}
    with pytest.raises(ValueError, match="'n_views' parameter .* must be"):
        CNNFeatureTransformer("tiny", n_views=3).fit(images)


def test_a_fine_tuned_network_predicts_from_one_view(images):
    y = [0, 1, 0, 1, 0, 1, 0, 1, 0]
    pipeline = make_feature_pipeline("tiny", "softmax", n_views=2).fit(images, y)
    for convert in (
        FineTunedCNNClassifier.from_pipeline,
        lambda pipeline: GradCAMDisplay.from_estimator(pipeline, images),
    ):
        with pytest.raises(ValueError, match="Fit the pipeline with n_views=1"):
            convert(pipeline)
    # There, the parameter of this name is the number of views to train on.
    transformer = CNNFeatureTransformer("tiny", n_views=2)
    strategy = recommend_strategy(5000, 2, "similar", transformer=transformer)
    assert strategy.estimator.n_views == FineTunedCNNClassifier().n_views
    strategy = recommend_strategy(500, 2, "similar", transformer=transformer)
    assert strategy.n_passes == 2


# Samples of several images


@pytest.fixture
def samples(images):
    return [list(images[:2]), [images[2]], list(images[3:6]), list(images[6:])]


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_the_features_of_a_sample_are_aggregated(aggregate, images, samples):
    features = CNNFeatureTransformer("tiny").fit_transform(images)
    function = getattr(np, aggregate)
    expected = [
        function(features[rows], axis=0) for rows in ([0, 1], [2], [3, 4, 5], [6, 7, 8])
    ]
    transformer = ImageSetTransformer(
        CNNFeatureTransformer("tiny"), aggregate=aggregate
    )

    found = transformer.fit_transform(samples)

    np.testing.assert_array_equal(found, expected)
    assert len(transformer.get_feature_names_out()) == found.shape[1]


def test_samples_of_every_kind_of_image(images, image_files, samples):
    transformer = ImageSetTransformer(CNNFeatureTransformer("tiny"))
    expected = transformer.fit_transform(samples)
    sizes = np.cumsum([2, 1, 3])
    for kind in (
        np.split(images, sizes),
        [list(part) for part in np.split(np.array(image_files, str), sizes)],
        np.split(np.array(image_files, object), sizes),
        [tuple(map(Image.fromarray, part)) for part in np.split(images, sizes)],
    ):
        np.testing.assert_array_equal(transformer.fit_transform(kind), expected)


def test_samples_of_a_table(images, image_files, samples):
    table = pd.DataFrame({"plant": [0, 0, 1, 2, 2, 2, 3, 3, 3], "path": image_files})
    table["path"] = table["path"].astype(str)  # of pandas' own type
    transformer = ImageSetTransformer(CNNFeatureTransformer("tiny"))
    expected = transformer.fit_transform(samples)
    groups = [group["path"] for _, group in table.groupby("plant")]
    lists = table.groupby("plant")["path"].agg(list)
    arrays = [group.unique() for group in groups]  # of pandas, not numpy
    arrow = pa.array(lists.tolist())
    for X in (
        *(groups, lists, lists.to_frame()),
        *(arrays, [pd.Index(array) for array in arrays], arrow),
    ):
        features = transformer.transform(X)
        np.testing.assert_array_equal(features, expected)
    rows = ImageSetTransformer(
        CNNFeatureTransformer("tiny", image_shape=(4, 4), image_size=16)
    )
    pixels = np.random.default_rng(0).random((4, 16))
    expected = clone(rows.transformer).fit_transform(pixels)
    features = rows.fit_transform([[pixels[0]], [*pixels[1:]]])
    np.testing.assert_array_equal(features, [expected[0], expected[1:].mean(axis=0)])
    with pytest.raises(TypeError, match="got 'tiny'"):
        ImageSetTransformer("tiny").fit(samples)


class Frames:
    """A lazy sequence that has its last item again after its end."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[min(index, len(self.items) - 1)]


def test_lazy_samples_end_at_their_length(samples):
    transformer = ImageSetTransformer(CNNFeatureTransformer("tiny"))
    expected = transformer.fit_transform(samples)
    lazy = Frames([Frames(sample) for sample in samples])
    np.testing.assert_array_equal(transformer.transform(lazy), expected)


def test_a_file_of_image_sets_writes_nowhere(samples, tmp_path):
    inner = CNNFeatureTransformer("tiny", cache=tmp_path / "cache", verbose=1)
    pipeline = make_pipeline(inner, StandardScaler())
    for transformer in (inner, pipeline):
        fitted = ImageSetTransformer(transformer).fit(samples)
        loaded = pickle.loads(pickle.dumps(fitted))
        params = loaded.get_params()
        left_out = [params[name] for name in params if name.endswith(("cache", "bose"))]
        assert set(left_out) <= {None, 0}
        assert fitted.get_params()["transformer"] is transformer


def test_samples_are_cross_validated(images, samples):
    X, y = samples * 3, [0, 1, 0, 1] * 3
    classifier = LogisticRegression()
    features = ImageSetTransformer(CNNFeatureTransformer("tiny")).fit_transform(X)
    pipeline = make_pipeline(
        ImageSetTransformer(CNNFeatureTransformer("tiny")), classifier
    )
    np.testing.assert_array_equal(
        cross_val_score(pipeline, X, y, cv=3),
        cross_val_score(classifier, features, y, cv=3),
    )


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        ([], ValueError, "Sample 1 has no image"),
        (
            "rose.jpg",
            TypeError,
            "Sample 1 must be .* got 'rose.jpg'",
        ),
        (np.zeros((9, 9, 3), np.uint8), TypeError, "Sample 1 must be a sequence"),
        (b"GIF89a", TypeError, "Sample 1 must be a sequence"),
        (3, TypeError, "Sample 1 must be a sequence of images, got 3"),
        (Image.new("RGB", (9, 9)), TypeError, "Sample 1 must be a sequence"),
    ],
    ids=["empty", "path", "array", "bytes", "number", "PIL"],
)
def test_what_is_no_sample_is_named(sample, error, message, samples):
    with pytest.raises(error, match=message):
        ImageSetTransformer(CNNFeatureTransformer("tiny")).fit([samples[0], sample])


@pytest.mark.parametrize(
    ("samples_in", "advice"),
    [
        (lambda samples: dict(enumerate(samples)), r"a dict; .* Pass list\(X.values"),
        (iter, r"a list_iterator; .* Pass list\(X\)"),
    ],
    ids=["dict", "iterator"],
)
def test_samples_must_be_a_sequence(samples_in, advice, samples):
    with pytest.raises(TypeError, match=f"X is {advice}"):
        ImageSetTransformer(CNNFeatureTransformer("tiny")).fit(samples_in(samples))


def test_an_unreadable_image_of_a_sample_is_named_or_ignored(samples, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    transformer = ImageSetTransformer(CNNFeatureTransformer("tiny")).fit(samples)
    expected = transformer.transform(samples)
    damaged = [[*samples[0], bad], samples[1], [bad], samples[3]]

    with pytest.raises(ImageReadError, match=r"bad\.jpg") as caught:
        transformer.transform(damaged[1:])
    assert caught.value.__notes__ == ["It is image 0 of sample 1."]

    transformer.set_params(transformer__on_error="nan").fit(damaged)
    found = transformer.transform(damaged)
    np.testing.assert_array_equal(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert np.isnan(found[2]).all()

"""Images are at the positions of their features, as thumbnails without overlap."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.decomposition import PCA, KernelPCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skltl import CNNFeatureTransformer, FeatureMapDisplay, FineTunedCNNClassifier

ROWS = {"image_shape": (8, 8), "image_size": 16}
TINY = CNNFeatureTransformer("tiny", layer="block2", **ROWS)


@pytest.fixture(scope="module")
def few(digits):
    """Rows, labels and features of 60 digits."""
    X, y = digits[0][:60], digits[1][:60]
    return X, y, TINY.fit(X).transform(X)


def principal_components(features):
    """Return the first two, by singular value decomposition."""
    centered = features - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    return left[:, :2] * values[:2]


def assert_equal_up_to_sign(found, expected):
    signs = np.sign((found * expected).sum(axis=0))
    assert_allclose(found, expected * signs, rtol=1e-3, atol=1e-3)


def scaled(features):
    return StandardScaler().fit_transform(features)


ESTIMATORS = {
    "transformer": (TINY, lambda features: features),
    "pipeline": (make_pipeline(TINY, StandardScaler()), scaled),
    "classifier": (make_pipeline(TINY, StandardScaler(), LogisticRegression()), scaled),
    "transforming classifier": (
        make_pipeline(TINY, LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.5)),
        lambda features: features,
    ),
    "search": (
        GridSearchCV(
            make_pipeline(TINY, StandardScaler(), LogisticRegression()),
            {"logisticregression__C": [1]},
            cv=2,
        ),
        scaled,
    ),
}


CASES = [(kind, True) for kind in ESTIMATORS]
CASES += [(kind, False) for kind in ESTIMATORS if kind != "search"]


@pytest.mark.parametrize(("kind", "is_fitted"), CASES)
def test_coordinates_are_principal_components(kind, is_fitted, few, network_counts):
    X, y, features = few
    estimator, prepare = ESTIMATORS[kind]
    estimator = clone(estimator)
    if is_fitted:
        estimator.fit(X, y)
    network_counts.clear()

    display = FeatureMapDisplay.from_estimator(estimator, X, y)

    expected = principal_components(prepare(features))
    assert_equal_up_to_sign(display.coordinates, expected)
    assert_allclose(display.scatter_.get_offsets(), display.coordinates)
    if is_fitted:
        assert sum(network_counts) == 60


@pytest.mark.parametrize("wrap", [lambda one: one, make_pipeline], ids=["", "pipeline"])
def test_features_of_a_fine_tuned_network_are_its_own(wrap, few):
    X, y, _ = few
    settings = {"layer": "block2", "head_epochs": 0, "finetune_epochs": 1, **ROWS}
    tuned = FineTunedCNNClassifier("tiny", random_state=0, **settings)

    with pytest.raises(NotFittedError):
        FeatureMapDisplay.from_estimator(wrap(tuned), X)
    fitted = wrap(tuned).fit(X, y)
    display = FeatureMapDisplay.from_estimator(fitted, X)

    expected = principal_components(fitted.transform(X))
    assert_equal_up_to_sign(display.coordinates, expected)


def test_axes_have_the_explained_variance(few):
    X, _, features = few
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False) ** 2

    display = FeatureMapDisplay.from_features(features, X, image_shape=(8, 8))

    first, second = values[:2] / values.sum()
    assert display.ax_.get_xlabel().endswith(f"1 ({first:.0%} of variance)")
    assert display.ax_.get_ylabel().endswith(f"2 ({second:.0%} of variance)")


@pytest.mark.parametrize(("n", "perplexity"), [(60, 59 / 3), (4, 1), (2, 1 / 3)])
def test_perplexity_of_tsne_is_below_the_number_of_images(n, perplexity, few):
    X, y, features = few

    display = FeatureMapDisplay.from_estimator(TINY, X[:n], y[:n], method="tsne")

    tsne = TSNE(perplexity=perplexity, random_state=0)
    assert_allclose(display.coordinates, tsne.fit_transform(features[:n]), atol=0.1)


def test_any_transformer_to_two_dimensions_is_a_method(few):
    X, y, features = few
    kernel = KernelPCA(2, kernel="cosine")
    supervised = LinearDiscriminantAnalysis(n_components=2)

    plain = FeatureMapDisplay.from_estimator(TINY, X, method=kernel)
    by_class = FeatureMapDisplay.from_estimator(TINY, X, y, method=supervised)

    assert_equal_up_to_sign(plain.coordinates, kernel.fit_transform(features))
    expected = supervised.fit_transform(features, y)
    assert_equal_up_to_sign(by_class.coordinates, expected)
    with pytest.raises(ValueError, match=r"PCA returned .* \(60, 3\)"):
        FeatureMapDisplay.from_estimator(TINY, X, method=PCA(3))
    unfitted, unread = CNNFeatureTransformer("tiny"), ["missing.png"] * 3
    with pytest.raises(ValueError, match="'pca', 'tsne' or a transformer, got 'umap'"):
        FeatureMapDisplay.from_estimator(unfitted, unread, method="umap")
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        FeatureMapDisplay.from_estimator(unfitted, unread, [0, 1])


def test_equal_images_are_at_one_place(few):
    images = few[0][[0] * 5].reshape(-1, 8, 8)
    display = FeatureMapDisplay.from_features(np.ones((5, 8)), images)

    assert_allclose(display.coordinates, np.zeros((5, 2)), atol=1e-12)
    assert "(0% of variance)" in display.ax_.get_xlabel()


def extents_of(display):
    """Return the drawn rectangles of the thumbnails, in pixels."""
    display.figure_.canvas.draw()
    return [box.get_window_extent() for box in display.thumbnails_]


@pytest.mark.parametrize("n_classes", [0, 10, 60], ids=["plain", "legend", "color bar"])
@pytest.mark.parametrize("dpi", [60, 150])
def test_thumbnails_do_not_overlap(n_classes, dpi):
    rng = np.random.default_rng(0)
    coordinates = rng.normal(size=(300, 2)) * [3, 0.5]
    images = rng.integers(0, 256, (300, 30, 20, 3), dtype=np.uint8)
    y = rng.integers(0, n_classes, 300) if n_classes else None
    with plt.rc_context({"figure.dpi": dpi}):
        display = FeatureMapDisplay(coordinates, images, y).plot(max_images=1000)

    extents = extents_of(display)

    assert len(extents) > 25
    for one, other in combinations(extents, 2):
        assert (
            one.x1 < other.x0 or other.x1 < one.x0 or
            one.y1 < other.y0 or other.y1 < one.y0
        )  # fmt: skip
    height = max(extent.height for extent in extents) / dpi * 72
    assert abs(height - 36) < 3  # the longer side, with the frame
    # No other image has room for a thumbnail.
    positions = display.ax_.transData.transform(coordinates)
    nearest = [
        np.abs(positions[display.indices_] - position).max(axis=1).min()
        for position in positions
    ]
    assert max(nearest) < 42 * dpi / 72


def test_thumbnails_are_at_their_images(few, image_files, images):
    display = FeatureMapDisplay.from_features(few[2][:9], image_files)

    extents = extents_of(display)

    assert len(extents) > 2
    for index, box, extent in zip(
        display.indices_, display.thumbnails_, extents, strict=True
    ):
        assert_array_equal(box.offsetbox.get_data(), images[index])
        center = (extent.p0 + extent.p1) / 2
        expected = display.ax_.transData.transform(display.coordinates[index])
        assert_allclose(center, expected, atol=1)


def test_large_images_become_small_thumbnails():
    images = np.zeros((2, 2000, 1000, 3))
    images[:, 1000:] = 1.0

    display = FeatureMapDisplay([[0, 0], [1, 1]], images).plot(thumbnail_size=20)

    (pixels, _) = (box.offsetbox.get_data() for box in display.thumbnails_)
    assert pixels.shape == (60, 30, 3)
    assert (pixels[:25] == 0).all()
    assert (pixels[35:] == 255).all()


def test_at_most_the_given_number_of_thumbnails(few):
    X, y, _ = few

    for n in (5, 0):
        display = FeatureMapDisplay.from_estimator(TINY, X, y, max_images=n)
        assert len(display.indices_) == len(display.thumbnails_) == n


def test_classes_are_colors_in_a_legend(few):
    X, y, _ = few
    names = np.array(["$a$", "b", "c"])[y % 3]

    display = FeatureMapDisplay.from_estimator(TINY, X, names)

    colors = {name: to_rgba(f"C{n}") for n, name in enumerate(["$a$", "b", "c"])}
    expected = np.array([colors[name] for name in names])
    assert_allclose(display.scatter_.get_facecolor(), expected)
    for index, box in zip(display.indices_, display.thumbnails_, strict=True):
        assert_allclose(box.patch.get_edgecolor(), expected[index])
    legend = display.ax_.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["$a$", "b", "c"]
    found = [handle.get_color() for handle in legend.legend_handles]
    assert_allclose(found, list(colors.values()))


@pytest.mark.parametrize("scale", [1, 0.5], ids=["integers", "fractions"])
def test_values_are_colors_in_a_color_bar(scale, few):
    values = np.arange(60) * scale

    display = FeatureMapDisplay.from_estimator(TINY, few[0], values)

    assert_array_equal(display.scatter_.get_array(), values)
    assert display.scatter_.colorbar is not None
    assert display.ax_.get_legend() is None


def test_many_classes_have_colors_but_no_legend(few):
    names = np.array([f"class {n}" for n in range(30)] * 2)

    display = FeatureMapDisplay.from_estimator(TINY, few[0], names)

    colors = display.scatter_.get_facecolor()
    assert len(np.unique(colors, axis=0)) == 30
    assert_array_equal(colors[:30], colors[30:])
    assert display.ax_.get_legend() is None


def test_arguments_are_checked(few, image_files):
    X, y, features = few

    with pytest.raises(ValueError, match="inconsistent numbers"):
        FeatureMapDisplay.from_estimator(TINY, X, y[:9])
    with pytest.raises(ValueError, match="inconsistent numbers"):
        FeatureMapDisplay.from_features(features, X[:9], image_shape=(8, 8))
    with pytest.raises(ValueError, match="at least two images, got 1"):
        FeatureMapDisplay.from_estimator(TINY, X[:1])
    with pytest.raises(TypeError, match="transformer must be a CNNFeatureTransformer"):
        FeatureMapDisplay.from_estimator(LogisticRegression(), X)
    with pytest.raises(ValueError, match=r"shape \(n, 2\), got \(60, 64\)"):
        FeatureMapDisplay(X)
    image_files[2].write_bytes(b"no image")
    lenient = CNNFeatureTransformer("tiny", image_size=32, on_error="nan")
    with pytest.raises(ValueError, match="Image 2 could not be read"):
        FeatureMapDisplay.from_estimator(lenient, image_files)


def test_display_accepts_axes_and_keyword_arguments(few):
    figure = plt.figure(layout="constrained")
    left, _ = figure.subfigures(1, 2)
    ax = left.subplots()

    display = FeatureMapDisplay.from_estimator(TINY, few[0], ax=ax, s=50)

    assert display.ax_ is ax
    assert display.figure_ is left
    assert_array_equal(display.scatter_.get_sizes(), [50])


def test_one_color_for_all_points(few):
    X, y, features = few
    from_features = FeatureMapDisplay.from_features
    display = from_features(features, X, y, image_shape=(8, 8), c="red")
    assert_array_equal(display.scatter_.get_facecolors(), [to_rgba("red")])
    with pytest.raises(ValueError, match="y contains None"):
        from_features(features, X, [None, *y[1:]], image_shape=(8, 8))
    with pytest.raises(ValueError, match="max_images=-1"):
        from_features(features, X, y, image_shape=(8, 8), max_images=-1)

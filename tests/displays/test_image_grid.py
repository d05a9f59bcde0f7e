"""The grid shows the images that indices, duplicates or neighbors name."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.exceptions import NotFittedError

from skltl import (
    CNNFeatureTransformer,
    ImageGridDisplay,
    ImageNeighbors,
    find_duplicates,
    find_label_errors,
    find_outliers,
)

TINY = CNNFeatureTransformer("tiny", layer="block2", image_size=32)


def pixels_of(display):
    return [im.get_array() for im in display.ims_]


def titles_of(display):
    return [ax.get_title() for ax in display.axes_]


def places_of(display):
    return [ax.get_xlabel() for ax in display.axes_]


@pytest.fixture(scope="module")
def many_images():
    """30 images of noise, dark (0 to 14) or bright."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 120, (30, 32, 32, 3), dtype=np.uint8) + np.repeat(
        np.array([0, 130], np.uint8), 15
    ).reshape(-1, 1, 1, 1)


def test_images_of_files_are_named(image_files, images):
    captions = ["a $10 cup", None, "two\nlines"]

    display = ImageGridDisplay.from_images(
        image_files, [7, 0, 3], captions=captions, highlight=[False, True, False]
    )

    assert_array_equal(pixels_of(display), images[[7, 0, 3]])
    assert titles_of(display) == ["a $10 cup", "", "two\nlines"]
    assert places_of(display) == [f"{n} · image_{n}.png" for n in (7, 0, 3)]
    assert display.names == [str(image_files[n]) for n in (7, 0, 3)]
    colors = [ax.title.get_color() for ax in display.axes_]
    assert colors == ["dimgray", "firebrick", "dimgray"]
    display.figure_.canvas.draw()  # an error if a dollar begins a formula


class Lazy:
    """A data set that decodes an item when it is fetched."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index])


KINDS = {
    "array": lambda images, files: images,
    "PIL images": lambda images, files: [Image.fromarray(one) for one in images],
    "bytes": lambda images, files: [path.read_bytes() for path in files],
    "pairs": lambda images, files: [(Image.fromarray(one), 3) for one in images],
    "lazy": lambda images, files: Lazy(images),
    "channels first": lambda images, files: list(np.moveaxis(images, 3, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_any_kind_are_drawn(kind, images, image_files):
    X = KINDS[kind](images, image_files)

    display = ImageGridDisplay.from_images(X, [8, 1])

    assert_array_equal(pixels_of(display), images[[8, 1]])
    assert places_of(display) == ["8", "1"]


def test_rows_and_readers_are_images(digits, images):
    rows = ImageGridDisplay.from_images(digits[0], [5], image_shape=(8, 8))
    read = ImageGridDisplay.from_images([4, 2], reader=images.__getitem__)

    assert_allclose(rows.ims_[0].get_array()[..., 0], digits[0][5].reshape(8, 8))
    assert_array_equal(pixels_of(read), images[[4, 2]])


def test_a_mask_selects_images(images):
    display = ImageGridDisplay.from_images(images, np.arange(9) % 4 == 1)

    assert_array_equal(display.indices, [1, 5])
    assert_array_equal(pixels_of(display), images[[1, 5]])


def test_arguments_that_do_not_match_are_named(images):
    from_images = ImageGridDisplay.from_images

    for index in (9, -1):
        with pytest.raises(ValueError, match=f"{index} is no index of the 9 images"):
            from_images(images, [0, index])
    with pytest.raises(ValueError, match="captions has 3 items for 2 images"):
        from_images(images, [0, 1], captions=["a", "b", "c"])
    with pytest.raises(ValueError, match="highlight has 9 items for 2 images"):
        from_images(images, [0, 1], highlight=[True] * 9)
    with pytest.raises(ValueError, match="mask of 4 images, and X has 9"):
        from_images(images, [True] * 4)
    with pytest.raises(TypeError, match="must be integers"):
        from_images(images, [0.5])
    with pytest.raises(ValueError, match="There is no image to plot"):
        from_images(images, [])
    with pytest.raises(ValueError, match="1,000 images, .* pass the indices"):
        from_images(np.zeros((1000, 8, 8), np.uint8))


def test_label_errors_have_the_probabilities_of_both_classes(many_images):
    y = np.repeat(["dark", "bright"], 15)
    y[4] = "bright"  # which is wrong
    errors = find_label_errors(many_images, y, TINY)

    display = ImageGridDisplay.from_label_errors(many_images, y, errors, n_images=5)

    assert_array_equal(display.indices, errors.order[:5])
    assert_array_equal(pixels_of(display), many_images[errors.order[:5]])
    of_bright, of_dark = errors.proba[4]
    expected = f"dark {of_dark:.2f}\nlabel bright {of_bright:.2f}"
    assert titles_of(display)[0] == expected
    assert display.axes_[0].title.get_color() == "firebrick"
    right = display.indices[-1]
    assert not errors.is_suspect[right]
    column = int(y[right] == "dark")
    assert titles_of(display)[-1] == f"{y[right]} {errors.proba[right, column]:.2f}"
    n_suspects = errors.is_suspect.sum()
    assert display.figure_.get_suptitle() == f"{n_suspects} of 30 labels are suspects"
    with pytest.raises(ValueError, match="inconsistent numbers"):
        ImageGridDisplay.from_label_errors(many_images[:9], y, errors)


def test_duplicates_are_side_by_side(many_images):
    X = [*many_images, many_images[21], many_images[3]]
    duplicates = find_duplicates(X, TINY, max_distance=0.001)

    display = ImageGridDisplay.from_duplicates(X, duplicates, n_columns=2)

    assert display.indices.tolist() == [3, 31, 21, 30]
    assert_array_equal(pixels_of(display), [X[index] for index in (3, 31, 21, 30)])
    expected = [f"pair {n}, distance 0.000" for n in (1, 1, 2, 2)]
    assert titles_of(display) == expected
    assert display.axes_[0].get_gridspec().get_geometry() == (2, 2)
    with pytest.raises(ValueError, match="image 31, but X has 30"):
        ImageGridDisplay.from_duplicates(many_images, duplicates)
    with pytest.raises(ValueError, match="those of one set: leave other out"):
        ImageGridDisplay.from_duplicates(X, duplicates, other=X)
    with pytest.raises(ValueError, match="n_columns=3 must be even"):
        ImageGridDisplay.from_duplicates(X, duplicates, n_columns=3)


def test_leaks_between_two_sets_show_both(many_images, image_files, images):
    train, test = many_images[:10], many_images[[12, 7, 14]]
    leaks = find_duplicates(train, TINY, other=test, max_distance=0.001)

    display = ImageGridDisplay.from_duplicates(train, leaks, other=test)

    assert display.indices.tolist() == [7, 1]
    assert_array_equal(pixels_of(display), [train[7], test[1]])
    assert titles_of(display) == ["pair 1, distance 0.000", "pair 1, in other"]
    with pytest.raises(ValueError, match="those of two sets: pass the second one"):
        ImageGridDisplay.from_duplicates(train, leaks)
    none = find_duplicates(train, TINY, max_distance=0)
    with pytest.raises(ValueError, match="There are no duplicates"):
        ImageGridDisplay.from_duplicates(train, none)


def test_outliers_have_their_scores(many_images):
    X = [*many_images, np.eye(32) > 0]
    outliers = find_outliers(X, TINY)

    display = ImageGridDisplay.from_outliers(X, outliers, n_images=3)

    assert display.indices.tolist() == outliers.order[:3].tolist()
    assert places_of(display)[0] == "30"
    expected = [f"{outliers.scores[index]:.2f}" for index in outliers.order[:3]]
    assert titles_of(display) == expected


def test_unreadable_images_are_no_outliers_to_plot(image_files):
    image_files[2].write_bytes(b"no image")
    lenient = CNNFeatureTransformer("tiny", image_size=32, on_error="nan")
    outliers = find_outliers(image_files, lenient)

    display = ImageGridDisplay.from_outliers(image_files, outliers)

    assert sorted(display.indices) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_neighbors_follow_the_image_in_its_row(many_images):
    index = ImageNeighbors(TINY, n_neighbors=3).fit(many_images)
    distances, found = index.kneighbors()

    display = ImageGridDisplay.from_neighbors(index, many_images, indices=[20, 4])

    expected = [20, *found[20], 4, *found[4]]
    assert display.indices.tolist() == expected
    assert_array_equal(pixels_of(display), many_images[expected])
    numbers = [[f"{one:.3f}" for one in distances[row]] for row in (20, 4)]
    assert titles_of(display) == ["query", *numbers[0], "query", *numbers[1]]
    assert display.axes_[0].get_gridspec().get_geometry() == (2, 4)


def test_neighbors_of_other_images(many_images):
    index = ImageNeighbors(TINY, n_neighbors=3).fit(many_images)
    queries = many_images[[8, 17]][:, ::-1]
    distances, found = index.kneighbors(queries, 2)

    display = ImageGridDisplay.from_neighbors(
        index, many_images, queries, n_neighbors=2
    )

    assert_array_equal(display.ims_[3].get_array(), queries[1])
    assert_array_equal(display.ims_[4].get_array(), many_images[found[1, 0]])
    assert titles_of(display)[5] == f"{distances[1, 1]:.3f}"
    assert titles_of(display)[3] == "query"
    assert places_of(display)[3] == "1"


def test_neighbors_are_those_of_the_fitted_images(many_images):
    index = ImageNeighbors(TINY)
    from_neighbors = ImageGridDisplay.from_neighbors

    with pytest.raises(NotFittedError):
        from_neighbors(index, many_images)
    index.fit(many_images)
    with pytest.raises(ValueError, match="X has 9 images, and .* fitted on 30"):
        from_neighbors(index, many_images[:9])
    with pytest.raises(ValueError, match="exclude each other"):
        from_neighbors(index, many_images, many_images[:1], indices=[0])
    with pytest.raises(ValueError, match="30 is no index"):
        from_neighbors(index, many_images, indices=[30])


def test_display_accepts_axes_and_keyword_arguments(images):
    _, axes = plt.subplots(1, 2)

    display = ImageGridDisplay(images[:2], summary="two").plot(
        axes=axes, interpolation="bilinear"
    )

    assert display.axes_.tolist() == axes.tolist()
    assert display.ims_[1].get_interpolation() == "bilinear"
    assert display.figure_.get_suptitle() == ""  # a figure of the user
    assert places_of(display) == ["", ""]


def test_values_of_black_and_white_are_those_of_the_transformer(many_images):
    deep = many_images.astype(np.int32) * 16
    transformer = CNNFeatureTransformer("tiny", value_range=(0, 4080), image_size=32)
    outliers = find_outliers(deep, transformer)

    display = ImageGridDisplay.from_outliers(deep, outliers, value_range=(0, 4080))

    (shown,) = {image.max() for image in pixels_of(display)[:1]}
    brightest = many_images[outliers.order[0]].max()
    assert shown == pytest.approx(brightest / 255, abs=0.01)

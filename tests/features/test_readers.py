"""Readers of users, and images whose values of black and white are their own."""

import collections
import pickle
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    StrategyAdvisor,
    drop_bad,
    find_bad_images,
    make_feature_pipeline,
)
from skltl.exceptions import BadImageWarning, ImageReadError
from skltl.images import ImageSource


def transformer(**params):
    return CNNFeatureTransformer("tiny", image_size=32, **params)


def negative(path):
    """Read a file as its negative."""
    return 255 - np.asarray(Image.open(path))


def from_row(row):
    """Read a row of a database, given by a tuple of file and number."""
    file, number = row
    with sqlite3.connect(file) as connection:
        query = "SELECT content FROM images WHERE id = ?"
        return connection.execute(query, [int(number)]).fetchone()[0]


def broken(item):
    """Fail with an error that is none of Python's."""

    class DicomError(Exception):
        pass

    raise DicomError("no pixel data")


@pytest.fixture
def rows(image_files, tmp_path):
    """Rows of a database with the content of the files."""
    file = str(tmp_path / "images.sqlite")
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE images (id INTEGER, content BLOB)")
        for number, path in enumerate(image_files):
            content = path.read_bytes()
            connection.execute("INSERT INTO images VALUES (?, ?)", (number, content))
    return [(file, number) for number in range(len(image_files))]


@pytest.mark.parametrize("cache", [False, True])
def test_a_reader_returns_any_image(image_files, rows, tmp_path, cache):
    expected = transformer().fit_transform(image_files)
    cache = tmp_path / "cache" if cache else None
    reading = transformer(reader=from_row, cache=cache, n_jobs=4)

    for _ in range(2):
        np.testing.assert_array_equal(reading.fit_transform(rows), expected)


@pytest.mark.parametrize("cache", [False, True])
def test_a_file_and_its_negative_are_different_images(
    images, image_files, tmp_path, cache
):
    cache = tmp_path / "cache" if cache else None
    plain, reading = transformer(cache=cache), transformer(cache=cache, reader=negative)
    expected = [transformer().fit_transform(one) for one in (images, 255 - images)]

    for _ in range(2):  # neither is read from what is known of the other
        found = [one.fit_transform(image_files) for one in (plain, reading)]
        np.testing.assert_array_equal(found, expected)


def test_a_known_file_is_read_again_by_a_new_version_of_a_reader(
    image_files, tmp_path, monkeypatch
):
    read = []
    decode = ImageSource.decode_item

    def counted(self, index, item):
        read.append(index)
        return decode(self, index, item)

    monkeypatch.setattr(ImageSource, "decode_item", counted)
    monkeypatch.setattr("skltl.images._identity.CLOCK_TICK", 0.0)
    reading = transformer(cache=tmp_path / "cache", reader=negative)

    n_read = []
    for version in (1, 1, 2, 2):
        monkeypatch.setattr(negative, "version", version, raising=False)
        reading.fit_transform(image_files)
        n_read.append(len(read))

    assert n_read == [9, 9, 18, 18]


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (broken, r"Image 0 \('.*image_0.png'\).*DicomError: no pixel data"),
        (print, "print returned a missing value"),
        (len, "len returned a number"),
    ],
)
def test_what_a_reader_cannot_read_is_named(image_files, reader, words):
    names = [str(path) for path in image_files]

    with pytest.raises(ImageReadError, match=words):
        transformer(reader=reader).fit_transform(names)
    tolerant = transformer(reader=reader, on_error="nan")
    assert np.isnan(tolerant.fit_transform(names)).all()
    assert len(tolerant.bad_images_) == len(names)


def test_images_of_a_reader_can_be_checked(rows):
    rows[3] = (rows[3][0], 99)  # no such row

    (bad,) = find_bad_images(rows, reader=from_row)

    assert bad.index == 3
    assert bad.reason.startswith("TypeError: 'NoneType'")
    with pytest.warns(BadImageWarning, match="1 of 9 images"):
        assert len(drop_bad(rows, reader=from_row)) == 8


def test_a_reader_must_be_picklable(image_files):
    with pytest.raises(ValueError, match="reader=.*lambda.* cannot be pickled"):
        transformer(reader=lambda path: path).fit(image_files)


def test_rows_of_pixels_have_no_reader():
    with pytest.raises(ValueError, match="exclude each other"):
        transformer(reader=negative, image_shape=(8, 8)).fit(np.zeros((2, 64)))


def test_a_reader_is_used_by_all_estimators(image_files, rows):
    labels = np.arange(9) % 2
    tiny = {"backbone": "tiny", "image_size": 32, "random_state": 0}
    classifier = FineTunedCNNClassifier(
        **tiny, reader=from_row, head_epochs=1, finetune_epochs=0
    )
    expected = clone_with(classifier, reader=None).fit(image_files, labels)

    classifier.fit(rows, labels)

    np.testing.assert_array_equal(
        classifier.decision_function(rows), expected.decision_function(image_files)
    )
    features = classifier.to_transformer().transform(rows)
    np.testing.assert_array_equal(
        features, expected.to_transformer().transform(image_files)
    )


def clone_with(estimator, **params):
    return type(estimator)(**{**estimator.get_params(), **params})


def test_a_search_reads_in_other_processes(rows):
    pipeline = make_feature_pipeline("tiny", image_size=32, reader=from_row)
    search = GridSearchCV(pipeline, {"svm__C": [0.1, 1]}, cv=3, n_jobs=2)

    search.fit(rows, np.arange(9) % 2)

    loaded = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(loaded.predict(rows), search.predict(rows))


def test_an_advisor_reads_with_the_reader_of_its_transformer(rows):
    advisor = StrategyAdvisor(transformer(reader=from_row), cv=2, random_state=0)

    advisor.fit(rows * 4, np.arange(36) % 2)

    plain = clone(advisor).set_params(transformer__reader=None)
    plain.fit([from_row(row) for row in rows] * 4, np.arange(36) % 2)
    assert advisor.layer_scores_ == plain.layer_scores_
    assert advisor.strategy_.name == plain.strategy_.name


TWELVE_BIT = np.linspace(0, 4095, 32 * 32).reshape(32, 32)
DEEP = {
    "uint16": lambda values: values.astype(np.uint16),
    "int16": lambda values: values.astype(np.int16),
    "int64": lambda values: values.astype(np.int64),
    "float64": lambda values: np.floor(values),
    "tensor": lambda values: torch.tensor(values.astype(np.int32)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_values_of_black_and_white_are_scaled(kind):
    expected = transformer().fit_transform([np.floor(TWELVE_BIT) / 4095])

    found = transformer(value_range=(0, 4095)).fit_transform([DEEP[kind](TWELVE_BIT)])

    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("extension", ["tif"])
def test_deep_files_are_scaled(tmp_path, mode, extension):
    values = np.floor(TWELVE_BIT).astype(
        {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    )
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(values).save(path)
    expected = transformer().fit_transform([np.floor(TWELVE_BIT) / 4095])

    found = transformer(value_range=(0, 4095)).fit_transform([path])

    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_black_may_be_larger_than_white():
    found = transformer(value_range=(4095, 0)).fit_transform([TWELVE_BIT])
    expected = transformer().fit_transform([1 - TWELVE_BIT / 4095])

    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_values_beyond_black_and_white_are_clipped(recwarn):
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]] * 5, np.int16)

    found = transformer(value_range=(-160, 240)).fit_transform([hounsfield])

    clipped = np.array([[0, 0, 0.5, 1, 1]] * 5)
    np.testing.assert_allclose(
        found, transformer().fit_transform([clipped]), rtol=1e-2, atol=1e-2
    )
    assert not recwarn.list


def test_eight_bits_keep_their_range(image_files):
    expected = transformer().fit_transform(image_files)

    found = transformer(value_range=(0, 4095)).fit_transform(image_files)

    np.testing.assert_array_equal(found, expected)


def test_arrays_of_eight_bits_have_a_range_of_their_own(images):
    """Scaled or not, one half of the users would get what they do not expect."""
    with pytest.raises(ImageReadError, match="its dtype is uint8.*such as float"):
        transformer(value_range=(0, 16)).fit_transform(images)
    found = transformer(value_range=(0, 255)).fit_transform(images)
    np.testing.assert_array_equal(found, transformer().fit_transform(images))


@pytest.mark.parametrize(
    ("dtype", "opaque"), [(np.uint16, 65535), (np.float32, 1), (np.float64, 1)]
)
def test_the_range_is_that_of_colors_not_of_alpha(dtype, opaque):
    values = np.full((9, 9, 4), 1000, dtype)
    values[..., 3] = opaque
    expected = transformer().fit_transform([np.full((9, 9, 3), 0.25)])

    found = transformer(value_range=(0, 4000)).fit_transform([values])

    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_transparent_gray_is_white_whatever_the_range_is(tmp_path):
    path = tmp_path / "image.png"
    gray = Image.fromarray(np.full((9, 9), 77, np.uint16))
    gray.save(path, transparency=77)
    expected = transformer().fit_transform([np.ones((9, 9))])

    for value_range in ((0, 4095), (4095, 0)):
        found = transformer(value_range=value_range).fit_transform([path])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_range_says_which_value_is_black(dtype, tmp_path):
    """In a TIFF file that says the contrary, too."""
    path = tmp_path / "image.tif"
    values = np.full((9, 9), 1000, dtype)
    Image.fromarray(values).save(path, tiffinfo={262: 0})
    expected = transformer().fit_transform([np.full((9, 9), 0.25)])

    found = transformer(value_range=(0, 4000)).fit_transform([path])

    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rows_of_pixels_are_scaled():
    rows = np.arange(128.0).reshape(2, 64)
    expected = transformer(image_shape=(8, 8)).fit_transform(rows / 127)

    found = transformer(image_shape=(8, 8), value_range=(0, 127)).fit_transform(
        pd.DataFrame(rows)
    )

    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value_range", [(0,), (1, 1), (0, np.inf), ("a", "b")])
def test_odd_value_ranges_are_refused(images, value_range):
    with pytest.raises(ValueError, match="value_range=.*two different finite numbers"):
        transformer(value_range=value_range).fit(images)


def test_a_file_has_other_features_with_another_range(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(TWELVE_BIT.astype(np.uint16)).save(path)
    ranges = [(0, 4095), (0, 8191), (0, 4095)]
    expected = [transformer(value_range=one).fit_transform([path]) for one in ranges]

    found = [
        transformer(value_range=one, cache=tmp_path / "cache").fit_transform([path])
        for one in ranges
    ]

    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found[0], found[1])


# What a reader may take, and what the cache knows of it


def gray_of(item):
    """A frame of a film, whose number is its gray."""
    _, number = item
    return np.full((9, 9), 50 * int(number), np.uint8)


@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize("container", [list, collections.UserList])
def test_a_reader_gets_the_whole_of_its_items(container, number):
    X = container([("film.mp4", number(n)) for n in range(3)])
    gray = [np.full((9, 9), 50 * n / 255) for n in range(3)]
    expected = transformer().fit_transform(gray)

    found = transformer(reader=gray_of).fit_transform(X)

    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


READERS = {
    "module of the user": """
        import mylib

        def read(path):
            return mylib.load(path)
    """,
    "import inside of the function": """
        def read(path):
            from mylib import load
            return load(path)
    """,
    "cached function": """
        from functools import lru_cache

        @lru_cache
        def read(path):
            import numpy as np
            return np.full((9, 9), gray, np.uint8)

        gray = GRAY
    """,
    "attribute of a class": """
        import numpy as np

        class Reader:
            settings = {"gray": GRAY}

            def __call__(self, path):
                return np.full((9, 9), self.settings["gray"], np.uint8)

        read = Reader()
    """,
    "function of a module of a module": """
        import outer

        def read(path):
            return outer.call(path)
    """,
}
MYLIB = """
import numpy as np

def load(path):
    return np.full((9, 9), GRAY, np.uint8)
"""
OUTER = """
from mylib import load

def call(path):
    return load(path)
"""
RUN = """
import numpy as np
import skltl.images._identity
from skltl import CNNFeatureTransformer
from reader import read

skltl.images._identity.CLOCK_TICK = 0.0
for cache in (None, "cache"):
    transformer = CNNFeatureTransformer("tiny", layer="stem", reader=read, cache=cache)
    print(repr(float(transformer.fit_transform(["image.bin"]).sum())))
"""


@pytest.mark.parametrize("kind", READERS)
def test_a_changed_reader_is_called_again(kind, tmp_path):
    """Whatever of the user's code has changed, and wherever that is."""
    (tmp_path / "image.bin").write_bytes(b"pixels")
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "outer.py").write_text(OUTER)
    sums = []
    for gray in (50, 200):
        for name, code in (("mylib", MYLIB), ("reader", READERS[kind])):
            changed = textwrap.dedent(code).replace("GRAY", str(gray))
            (tmp_path / f"{name}.py").write_text(changed)
        done = subprocess.run(
            [sys.executable, "-B", "run.py"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        without, cached = map(float, done.stdout.split())
        assert cached == without
        sums.append(cached)

    assert sums[0] != sums[1]


def first_file(folder):
    """Read the image in a folder."""
    return str(sorted(folder.iterdir())[0])


def other_file(path):
    return path.replace("key", "image")


@pytest.mark.parametrize("kind", ["folder", "other file"])
def test_what_a_reader_reads_elsewhere_may_change(kind, images, tmp_path, monkeypatch):
    monkeypatch.setattr("skltl.images._identity.CLOCK_TICK", 0.0)
    folder = tmp_path / "item"
    folder.mkdir()
    image, key = folder / "image.png", folder / "key.png"
    if kind == "other file":
        key.write_bytes(b"key")
    reader = first_file if kind == "folder" else other_file
    X = [folder] if kind == "folder" else [str(key)]

    for n in range(3):
        Image.fromarray(images[n]).save(image)
        expected = transformer().fit_transform(images[n : n + 1])
        for _ in range(2):
            found = transformer(reader=reader, cache=tmp_path / "cache").fit_transform(
                X
            )
            np.testing.assert_array_equal(found, expected)

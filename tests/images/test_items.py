"""An encoded image has the same pixels wherever it comes from, and the same limits."""

import base64
import io
import tempfile
import threading
import zipfile
from urllib.parse import quote_from_bytes

import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from skltl import CNNFeatureTransformer, find_bad_images
from skltl.exceptions import ImageReadError
from skltl.images import read_images


@pytest.fixture
def photo(tmp_path):
    """A JPEG file of 300 x 200 pixels with noise."""
    noise = np.random.default_rng(0).integers(256, size=(200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg", quality=90)
    return tmp_path / "photo.jpg"


def open_file(path):
    file = path.open("rb")
    file.seek(100)
    return file


def spooled(path):
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115 - closed by the fixture
    file.write(path.read_bytes())
    return file


def in_memory(path):
    with fsspec.open("memory://folder/photo.jpg", "wb") as file:
        file.write(path.read_bytes())
    return "memory://folder/photo.jpg"


def in_archive(path):
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, "images/photo.jpg")
    return f"zip://images/photo.jpg::{archive}"


def data_url(path):
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


ITEMS = {
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "buffer": lambda path: io.BytesIO(path.read_bytes()),
    "open file": open_file,
    "spooled file": spooled,
    "dictionary of bytes": lambda path: {"bytes": path.read_bytes(), "path": "a.jpg"},
    "dictionary of a path": lambda path: {"bytes": None, "path": str(path)},
    "data URL": data_url,
    "percent-encoded": lambda path: "data:," + quote_from_bytes(path.read_bytes()),
    "file URL": lambda path: path.as_uri(),
    "memory": in_memory,
    "zip": in_archive,
}


@pytest.fixture
def item_of(photo):
    """A function that returns an item of a kind; files are closed afterwards."""
    made = []

    def item(kind):
        made.append(ITEMS[kind](photo))
        return made[-1]

    yield item
    for one in made:
        if hasattr(one, "close"):
            one.close()


@pytest.mark.parametrize("kind", ITEMS)
def test_every_item_has_the_pixels_of_the_file(photo, item_of, kind):
    source = read_images([photo, item_of(kind)])

    np.testing.assert_array_equal(source[1], source[0])
    np.testing.assert_array_equal(source[1], source[0])  # again, from the beginning


@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_every_item_has_the_features_of_the_file(
    photo, item_of, kind, decode, tmp_path
):
    items = [item_of(kind)]
    transformer = CNNFeatureTransformer("tiny", image_size=32, decode=decode)
    expected = transformer.fit_transform([photo])

    with_cache = transformer.set_params(cache=tmp_path / "cache")
    found = [with_cache.fit_transform(items) for _ in range(2)]

    np.testing.assert_array_equal(found, [expected, expected])


@pytest.mark.parametrize("kind", ITEMS)
def test_every_item_can_be_checked(item_of, kind):
    assert find_bad_images([item_of(kind)]) == []


def column_of_bytes(path):
    return pa.array([path.read_bytes()])


COLUMNS = {
    "pandas": lambda path: pd.Series([path.read_bytes()]),
    "pandas of dictionaries": lambda path: pd.Series([{"bytes": path.read_bytes()}]),
    "polars": lambda path: pl.Series([path.read_bytes()]),
    "polars of structs": lambda path: pl.Series([{"bytes": path.read_bytes()}]),
    "polars of Hugging Face": lambda path: pl.Series(
        [{"bytes": path.read_bytes(), "path": "a.png"}]
    ),
    "arrow": column_of_bytes,
    "large arrow": lambda path: column_of_bytes(path).cast(pa.large_binary()),
    "chunked arrow": lambda path: pa.chunked_array([column_of_bytes(path)]),
    "arrow structs": lambda path: pa.array([{"bytes": path.read_bytes(), "path": "a"}]),
    "arrow table": lambda path: pa.table({"image": column_of_bytes(path)}),
    "large strings": lambda path: pa.array([str(path)], pa.large_string()),
    "object array": lambda path: np.array([path.read_bytes()], dtype=object),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_encoded_images_have_the_pixels_of_the_files(photo, kind):
    column = COLUMNS[kind](photo)

    np.testing.assert_array_equal(read_images(column)[0], read_images([photo])[0])


def test_a_file_object_keeps_its_position(item_of):
    file = item_of("open file")

    read_images([file])[0]

    assert file.tell() == 100


def test_threads_may_share_a_file_object(photo, item_of):
    file = item_of("open file")
    source, expected = read_images([file] * 8), read_images([photo])[0]
    found = [None] * 8

    def decode(index):
        found[index] = source[index]

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    np.testing.assert_array_equal(found, [expected] * 8)


class Broken(io.BytesIO):
    """A file object whose error is none of Python's."""

    name = "s3/broken.jpg"

    def read(self, size=-1):
        class ConnectionLost(Exception):
            pass

        raise ConnectionLost("the line is dead")


DAMAGED = {
    "no image": (b"no image at all", "is not a JPEG", None),
    "empty": (b"", "the file is empty", None),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0", r"PostScript \(EPS\)", None),
    "named bytes": ({"bytes": b"", "path": "a.jpg"}, "empty", "a.jpg"),
    "missing path": ({"path": "nowhere/a.jpg"}, "o such file", "nowhere/a.jpg"),
    "base64": ("data:image/png;base64,a!", "base64 data is damaged", None),
    "no comma": ("data:image/png", "without a comma", "data:image/png"),
    "broken": (Broken(b"x"), "ConnectionLost: the line is dead", "s3/broken.jpg"),
    "no file": ("memory://nowhere.jpg", "nowhere.jpg", "memory://nowhere.jpg"),
    "protocol": ("nope://a.jpg", "Protocol not known: nope", "nope://a.jpg"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_items_are_named(photo, kind):
    item, reason, name = DAMAGED[kind]

    with pytest.raises(ImageReadError, match=reason) as info:
        CNNFeatureTransformer("tiny", image_size=32).fit_transform([photo, item])

    assert info.value.index == 1
    assert info.value.path == name or name is None
    (bad,) = find_bad_images([photo, item])
    assert (bad.index, bad.path, bad.reason) == (1, info.value.path, info.value.reason)


def test_a_closed_file_is_named(photo):
    file = open_file(photo)
    file.close()

    with pytest.raises(ImageReadError, match="Image 0 .*closed file"):
        read_images([file])[0]


@pytest.mark.parametrize("content", [bytes, io.BytesIO])
def test_limits_hold_for_encoded_images(photo, monkeypatch, content):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)

    with pytest.raises(ImageReadError, match="60,000 pixels, more than the limit"):
        read_images([content(photo.read_bytes())])[0]


@pytest.fixture
def stack(tmp_path):
    """A TIFF file of three gray pages: 10, 20 and 30."""
    pages = [Image.new("L", (5, 4), 10 * number) for number in (1, 2, 3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    return tmp_path / "stack.tif"


@pytest.mark.parametrize("page", [0, 1, 2])
def test_a_page_of_a_file_is_an_image(stack, page):
    items = [
        {"path": stack, "page": page},
        {"path": stack, "page": float(page)},  # as pandas stores it beside missing ones
        {"bytes": stack.read_bytes(), "page": np.int64(page)},
    ]

    for pixels in read_images(items):
        assert (pixels == 10 * (page + 1)).all()


def test_pages_are_different_images_in_the_cache(stack, tmp_path):
    items = [{"path": stack, "page": page} for page in range(3)]
    expected = CNNFeatureTransformer("tiny", image_size=32).fit_transform(items)
    cached = CNNFeatureTransformer("tiny", image_size=32, cache=tmp_path / "cache")

    found = [cached.fit_transform([item])[0] for item in items * 2]

    np.testing.assert_array_equal(found, [*expected, *expected])
    assert len(np.unique(expected, axis=0)) == 3


def test_a_page_that_is_not_there_is_named(stack):
    with pytest.raises(ImageReadError, match=r"stack.tif, page 3.*no page 3.*page 2"):
        read_images([{"path": str(stack), "page": 3}])[0]

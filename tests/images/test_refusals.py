"""Everything that is no image is refused by a short message that says what to do."""

import base64
import collections
import io
import pickle

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from PIL import Image
from scipy import sparse

from skltl import CNNFeatureTransformer, find_bad_images
from skltl.exceptions import ImageReadError, ImageTypeError
from skltl.images import read_images

SQUARE = np.zeros((4, 4, 3), np.uint8)


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


BASE64 = base64.b64encode(jpeg()).decode()


CONTAINERS = {
    "pattern": ("flowers/*.jpg", TypeError, r"'flowers.*pattern.*glob\.glob"),
    "pattern of one": ("flowers/a[0-9].jpg", TypeError, r"pattern.*glob\.glob"),
    "base64": (BASE64, TypeError, "base64 text.*b64decode"),
    "data URL": (
        f"data:image/jpeg;base64,{BASE64}",
        TypeError,
        "data URL; put it in a list",
    ),
    "URL": ("https://example.org/a.jpg?size=3", TypeError, "URL; put it in a list"),
    "path": ("flower.jpg", TypeError, r"single path; .*X=\['flower.jpg'\]"),
    "generator": ((item for item in [SQUARE]), TypeError, r"generator.*list\(X\)"),
    "map": (map(str, "ab"), TypeError, r"got map.*list\(X\)"),
    "dictionary": ({"a": SQUARE}, TypeError, r"got dict.*list\(X\.values\(\)\)"),
    "values": ({"a": SQUARE}.values(), TypeError, r"got dict_values.*list\(X\)"),
    "set": ({"a.jpg"}, TypeError, r"got set.*no order"),
    "bytes": (jpeg(), TypeError, r"got bytes.*in a list: \[X\]"),
    "file": (io.BytesIO(jpeg()), TypeError, r"got BytesIO.*in a list: \[X\]"),
    "frame": (
        pd.DataFrame({"path": ["a.jpg"], "label": ["x"]}),
        ValueError,
        r"DataFrame with the columns 'path', 'label'. .*X\['path'\].*ColumnTransformer",
    ),
    "polars frame": (
        pl.DataFrame({"path": ["a.jpg"], "label": [3]}),
        ValueError,
        r"columns 'path', 'label'. .*X\['path'\]",
    ),
    "arrow table": (
        pa.table({"path": ["a.jpg"], "label": ["x"]}),
        ValueError,
        r"pyarrow Table with the columns 'path', 'label'",
    ),
    "arrow numbers": (pa.array([1, 2]), TypeError, r"of int64; expected strings"),
    "arrow lists": (
        pa.chunked_array([[[1, 2], [3, 4]]]),
        TypeError,
        r"ChunkedArray of list.*to_pylist\(\)",
    ),
    "frame of numbers": (
        pd.DataFrame(np.zeros((2, 64))),
        ValueError,
        r"image_shape=\(8, 8\)",
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_are_refused_with_what_to_pass(kind):
    X, error, words = CONTAINERS[kind]

    with pytest.raises(error, match=words) as info:
        read_images(X)

    assert len(str(info.value)) < 500


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([SQUARE])


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("X", "error", "words"),
    [
        (Image.new("RGB", (4, 4)), ValueError, "single image.*Reshape your data"),
        (SQUARE, ValueError, "single color image.*Reshape your data"),
        (torch.zeros(3, 8, 8), ValueError, "single color image"),
        (torch.utils.data.DataLoader(Dataset()), TypeError, r"DataLoader.*X\.dataset"),
        (Stream(), TypeError, r"got Stream.*list\(X\)"),
        (None, TypeError, "got NoneType"),
        (7, TypeError, "got int"),
        (sparse.csr_matrix(np.eye(4)), TypeError, "Sparse"),
        (sparse.coo_array(np.eye(4)), TypeError, "Sparse"),
        (np.ma.masked_array(np.ones((2, 4, 4))), TypeError, "Masked"),
        ([], ValueError, "0 sample"),
        (np.empty((0, 4, 4, 3)), ValueError, "0 sample"),
        (np.empty((2, 0, 4, 3), np.uint8), ValueError, "empty"),
        (np.float64(3), ValueError, "Reshape your data"),
        (np.arange(4.0), ValueError, "Reshape your data"),
        (np.zeros((3, 64)), ValueError, r"image_shape=\(8, 8\)"),
        (np.zeros((3, 3072)), ValueError, r"image_shape=\(32, 32, 3\)"),
        (np.zeros((3, 7)), ValueError, r"image_shape=\(height, width\)"),
        ([[0.5] * 64, [0.1] * 64], ValueError, r"image_shape=\(8, 8\)"),
        ([[1, 2], [3]], ValueError, "different lengths"),
        (np.array([["1", "2"], ["3", "4"]]), ValueError, r"shape \(2, 2\)"),
        (np.zeros((2, 8, 8, 2), np.uint8), ValueError, "can be the channels"),
        (np.zeros((2, 8, 8, 5), np.uint8), ValueError, "can be the channels"),
        (np.zeros((2, 8, 8, 3, 1)), ValueError, "shape"),
        (["a.jpg", None], ImageTypeError, "Image 1 is a missing value"),
        (["a.jpg", 3.5], ImageTypeError, "Image 1 is a number"),
        ([3, 4], ImageTypeError, "Image 0 is a number"),
        ([SQUARE, SQUARE[0, 0]], ImageReadError, r"Image 1 .*shape is \(3,\)"),
        ([SQUARE, SQUARE[:0]], ImageReadError, "Image 1 .*empty"),
        (
            [SQUARE, np.zeros((8, 8, 5))],
            ImageReadError,
            "Image 1 .*can be the channels",
        ),
        ([np.zeros((8, 9, 3)), np.zeros((3, 8, 9))], ValueError, "in all images"),
        ([SQUARE, np.ma.masked_array(SQUARE)], ImageTypeError, "Image 1 .*masked"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(X, error, words):
    with pytest.raises(error, match=words):
        read_images(X)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"X is a directory.*rglob"):
        read_images(str(tmp_path))


MISSING = {
    "None": None,
    "NaN": float("nan"),
    "numpy's NaN": np.float32("nan"),
    "NA": pd.NA,
    "NaT": pd.NaT,
    "numpy's NaT": np.datetime64("NaT"),
}


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("position", [0, 1])
def test_missing_values_are_named(kind, position):
    items = ["a.jpg", "b.jpg"]
    items[position] = MISSING[kind]

    with pytest.raises(ImageTypeError, match=f"Image {position} is a missing value"):
        read_images(items)


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("as_frame", [False, True])
def test_missing_cells_are_named_with_their_label(kind, as_frame):
    cells = ["a.jpg", MISSING[kind]]
    series = pd.Series(cells, index=["first", "second"], dtype=object)

    with pytest.raises(
        ImageTypeError, match="Image 1 is a missing.*index label 'second'"
    ):
        read_images(series.to_frame("path") if as_frame else series)


@pytest.mark.parametrize("cell", [np.nan, pd.NaT])
def test_a_column_without_any_value_is_refused(cell):
    with pytest.raises(ImageTypeError, match="Image 0 is a missing.*label 7"):
        read_images(pd.Series([cell, cell], index=[7, 8]))


class Response:
    def read(self):
        return jpeg()


class Upload:
    async def read(self):
        return jpeg()

    async def seek(self, position):
        return position


ITEMS = {
    "text file": (io.StringIO("image"), r"\(StringIO\) in text mode.*binary mode"),
    "response": (Response(), r"\(Response\) without seek\(\); pass its content"),
    "upload": (Upload(), r"\(Upload\) that is read with await; pass its content"),
    "row": ({"image": SQUARE, "label": 3}, "its keys are 'image', 'label'"),
    "empty dictionary": ({"bytes": None, "path": None}, "a missing value"),
    "odd path": ({"path": 3}, "whose 'path' is of type int"),
    "odd bytes": ({"bytes": "abc"}, "whose 'bytes' is of type str"),
    "odd page": ({"path": "a.tif", "page": -1}, "whose 'page' is -1"),
    "pair": ((SQUARE, SQUARE), r"tuple of 2 objects.*pairs \(image, label\)"),
    "path and number": (("a.tif", 3), r"tuple of 2 objects"),
    "number": (7, r"a number \(7\)"),
    "long number": (10**300, "a number"),
    "object": (object(), "of type object"),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_items_are_refused_with_what_to_pass(kind):
    item, words = ITEMS[kind]

    with pytest.raises(ImageTypeError, match=f"Image 1 is .*{words}") as info:
        read_images([SQUARE, item])

    assert len(str(info.value)) < 500


def test_pairs_of_images_are_refused_everywhere():
    """One of them would be lost."""
    pairs = [(SQUARE, SQUARE), (SQUARE, SQUARE)]

    for X in (pairs, collections.UserList(pairs)):
        with pytest.raises(ImageTypeError, match="Image 0 .*pairs"):
            read_images(X).decode(0)


@pytest.mark.parametrize("on_error", ["raise", "nan"])
def test_one_odd_item_is_named_wherever_it_is(on_error):
    """The first item does not decide what all of them are."""
    good = np.zeros((9, 9, 3))
    for odd in (np.zeros(5), [1, 2], np.zeros((3, 9, 8))):
        for X in ([odd, good, good], [good, odd, good]):
            transformer = CNNFeatureTransformer("tiny", on_error=on_error)
            position = 0 if X[0] is odd else 1
            if on_error == "raise":
                with pytest.raises((ValueError, TypeError), match=f"mage {position} "):
                    transformer.fit(X)
                continue
            features = transformer.fit_transform(X)
            assert [bad.index for bad in transformer.bad_images_] == [position]
            assert np.isnan(features).all(axis=1).sum() == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE64, "base64 text"),
        ("flowers/*.jpg", "pattern"),
        ("unheard-of://example.org/a.jpg", "Protocol not known: unheard-of"),
    ],
)
def test_strings_that_are_no_paths_are_named(text, words):
    source = read_images([SQUARE, text])

    with pytest.raises(ImageReadError, match=words) as info:
        source[1]

    assert len(str(info.value)) < 500
    assert info.value.path == text


def test_a_single_path_may_look_like_a_pattern(tmp_path):
    path = tmp_path / "a[1]*.png"
    path.write_bytes(b"")

    with pytest.raises(TypeError, match="single path"):
        read_images(str(path))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((2, 4, 4, 3), np.nan), "NaN"),
        (np.full((2, 4, 4, 3), np.inf), "infinity"),
        (np.zeros((2, 4, 4, 3), complex), "complex128"),
        (np.zeros((2, 4, 4, 3), "datetime64[s]"), "datetime64"),
        (np.zeros((2, 4, 4, 3), np.int64), "int64.*uint8"),
    ],
)
def test_arrays_whose_values_are_no_pixels_are_refused(array, words):
    with pytest.raises(ImageReadError, match=f"Image 1 .*{words}") as info:
        read_images(array)[1]

    assert info.value.path is None


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(ImageReadError(3, "a.jpg", "it is empty")))

    assert (error.index, error.path) == (3, "a.jpg")
    assert str(error) == "Image 3 ('a.jpg') could not be read: it is empty."


def container(brand, *others):
    brands = b"".join([brand, bytes(4), *others])
    return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(50)


FILES = {
    "empty": (b"", "the file is empty"),
    "html": (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
    "html without type": (b"<HTML><body>404</body></HTML>", "an HTML page"),
    "pdf": (b"%PDF-1.4\n", "a PDF document; save its pages"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing; convert"),
    "svg in xml": (b"<?xml version='1.0'?>\n<!-- a -->\n<svg/>", "an SVG drawing"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS.*convert"),
    "eps with preview": (b"\xc5\xd0\xd3\xc6" + bytes(40), "EPS"),
    "psd": (b"8BPS\0\1" + bytes(40), "Photoshop"),
    "ico": (b"\0\0\1\0\1\0" + bytes(40), "ICO"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
    "jpeg 2000 stream": (b"\xff\x4f\xff\x51" + bytes(40), "JPEG 2000"),
    "jpeg xl": (b"\xff\x0a" + bytes(40), "JPEG XL"),
    "heic": (container(b"heic", b"mif1"), "HEIC.*pillow-heif"),
    "heic of mif1": (container(b"mif1", b"heic"), "HEIC"),
    "avif": (container(b"avif", b"mif1"), "AVIF.*convert"),
    "avif of mif1": (container(b"mif1", b"avif", b"miaf"), "AVIF"),
    "video": (container(b"isom", b"mp41"), "video"),
    "zip": (b"PK\3\4" + bytes(40), "ZIP"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS.*pull"),
    "text": (b"once upon a time", "not a JPEG, PNG, WEBP, BMP, GIF.* file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_formats_are_named(kind, tmp_path):
    content, words = FILES[kind]
    (tmp_path / "image.jpg").write_bytes(content)

    with pytest.raises(ImageReadError, match=f"image.jpg'.*{words}") as info:
        read_images([tmp_path / "image.jpg"])[0]

    assert len(str(info.value)) < 500


@pytest.mark.parametrize(
    ("character", "length"),
    [("a", 5000), ("\U0010ffff", 1_000_000), ("\0", 5000), ("*", 5000), ("/", 5000)],
)
def test_long_strings_are_shortened(character, length):
    text = character * length

    (bad,) = find_bad_images([text])
    with pytest.raises(TypeError) as whole:
        read_images(text)
    with pytest.raises(ImageReadError) as item:
        read_images([text])[0]

    assert max(len(str(whole.value)), len(str(item.value)), len(bad.reason)) < 500
    assert bad.path == item.value.path == text


LongName = type("Long" * 1000, (), {})
HOSTILE = {
    "long class": lambda: [SQUARE, LongName()],
    "long container": lambda: LongName(),
    "long columns": lambda: pd.DataFrame([["a"] * 50], columns=["x" * 999] * 50),
    "long label": lambda: pd.Series([None], index=["y" * 9999]),
    "many axes": lambda: np.zeros((1,) * 60),
    "many axes of an item": lambda: [SQUARE, np.zeros((1,) * 60)],
    "long dtype": lambda: [np.zeros((2, 2), [("z" * 2000, "f4")])],
    "array of a long dtype": lambda: np.zeros((2, 2, 2), [("z" * 2000, "f4")]),
    "long table": lambda: pa.table({"w" * 5000: ["a"], "v": ["b"]}),
    "nested lists": lambda: [["u" * 5000], ["t"]],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_message_is_long(kind):
    with pytest.raises((TypeError, ValueError)) as info:
        list(read_images(HOSTILE[kind]()))

    assert len(str(info.value)) < 500


def test_a_long_image_shape_is_shortened():
    with pytest.raises(ValueError, match="not the shape") as info:
        read_images(np.zeros((2, 64)), image_shape=(10**400,) * 9)

    assert len(str(info.value)) < 500


@pytest.mark.parametrize(
    "make",
    [
        pa.array,
        lambda paths: pa.chunked_array([paths[:4], paths[4:]]),
        lambda paths: pa.table({"path": paths}),
        lambda paths: pa.array(paths, pa.large_string()),
    ],
)
def test_arrow_strings_are_paths(make, images, image_files):
    source = read_images(make([str(path) for path in image_files]))

    np.testing.assert_array_equal(source[5], images[5])


def test_masked_rows_are_refused_as_masked_images_are():
    rows = np.ma.masked_array(np.zeros((3, 64)), mask=np.eye(3, 64))

    with pytest.raises(TypeError, match="fill the masked pixels"):
        CNNFeatureTransformer("tiny", image_shape=(8, 8)).fit(rows)
    with pytest.raises(TypeError, match="fill the masked pixels"):
        read_images(rows, image_shape=(8, 8))

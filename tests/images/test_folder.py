"""`load_image_folder` returns paths and labels, and tells what it has left out."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_files
from sklearn.model_selection import train_test_split

from skltl import (
    CNNFeatureTransformer,
    find_bad_images,
    load_image_folder,
    make_feature_pipeline,
)
from skltl.exceptions import ImageFolderWarning
from skltl.images._decode import FILE_FORMATS


def write(path, color="red"):
    """Write a small image, and the folders that contain it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images each."""
    for name in ["rose/b.png", "daisy/2.jpg", "rose/a.png", "daisy/10.jpg"]:
        write(tmp_path / "flowers" / name)
    return tmp_path / "flowers"


def names_in(folder, paths):
    """Return paths as strings with slashes, relative to a folder."""
    return [Path(path).relative_to(folder).as_posix() for path in paths]


def load_with_skipped(folder, **options):
    """Load a folder from which files are left out; return their reasons by name."""
    with pytest.warns(ImageFolderWarning):
        images = load_image_folder(folder, **options)
    skipped = zip(
        names_in(folder, [path for path, _ in images.skipped]),
        [reason for _, reason in images.skipped],
        strict=True,
    )
    return images, dict(skipped)


@pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "trailing slash"])
def test_a_plain_folder_is_loaded_as_by_scikit_learn(folder, slash):
    images = load_image_folder(f"{folder}{slash}")

    expected = load_files(f"{folder}{slash}", load_content=False, shuffle=False)
    assert images.data.tolist() == expected.filenames.tolist()
    assert images.target.tolist() == expected.target.tolist()
    assert images.target.dtype == expected.target.dtype
    assert images.target_names == expected.target_names
    assert images.skipped == []


def test_images_are_sorted_by_class_and_path(folder):
    images = load_image_folder(folder)

    assert names_in(folder, images.data) == [
        "daisy/10.jpg",
        "daisy/2.jpg",
        "rose/a.png",
        "rose/b.png",
    ]
    assert images.target.tolist() == [0, 0, 1, 1]
    assert images.target_names == ["daisy", "rose"]


def test_the_order_does_not_depend_on_the_file_system(folder, monkeypatch):
    expected = load_image_folder(folder).data.tolist()
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as found:
                self.found = sorted(found, key=lambda one: one.name, reverse=True)

        def __enter__(self):
            return iter(self.found)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Backwards)

    assert load_image_folder(folder).data.tolist() == expected


def test_relative_paths_stay_relative(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)

    data, _ = load_image_folder("flowers", return_X_y=True)

    assert data[0] == str(Path("flowers", "daisy", "10.jpg"))


def test_images_in_subfolders_belong_to_the_class(folder):
    write(folder / "rose" / "a" / "deep" / "1.png")
    write(folder / "rose" / "a-1.png")

    images = load_image_folder(folder)

    in_rose = [path for path in folder.rglob("*.png") if path.is_file()]
    assert images.data[images.target == 1].tolist() == list(map(str, sorted(in_rose)))


def test_hidden_files_and_folders_are_ignored_silently(folder):
    write(folder / "rose" / ".hidden.png")
    write(folder / ".cache" / "1.png")
    write(folder / "__MACOSX" / "rose" / "a.png")
    write(folder / "rose" / "@eaDir" / "a.png")
    (folder / "rose" / "Thumbs.db").write_bytes(b"x")
    (folder / "desktop.ini").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")

    images = load_image_folder(folder)

    assert images.target_names == ["daisy", "rose"]
    assert len(images.data) == 4
    assert images.skipped == []


def test_a_hidden_folder_can_be_loaded_itself(tmp_path):
    write(tmp_path / ".cache" / "rose" / "a.png")

    assert len(load_image_folder(tmp_path / ".cache").data) == 1


def test_links_to_folders_are_followed(folder, tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    (folder / "tulip").symlink_to(tmp_path / "elsewhere")
    (folder / "rose" / "more").symlink_to(tmp_path / "elsewhere")

    images = load_image_folder(folder)

    assert images.target_names == ["daisy", "rose", "tulip"]
    assert names_in(folder, images.data)[2:] == [
        "rose/a.png",
        "rose/b.png",
        "rose/more/1.png",
        "tulip/1.png",
    ]


@pytest.mark.parametrize("goal", [".", "..", "../.."])
def test_link_loops_end(folder, goal):
    (folder / "rose" / "loop").symlink_to(goal)

    _, skipped = load_with_skipped(folder)

    assert "it is a link to a folder that contains it" in skipped.values()


def test_a_link_to_itself_is_reported(folder):
    (folder / "rose" / "self.png").symlink_to("self.png")
    (folder / "rose" / "broken.png").symlink_to("missing.png")

    images, skipped = load_with_skipped(folder)

    assert len(images.data) == 4
    assert "symbolic links" in skipped["rose/self.png"]
    assert "no such file" in skipped["rose/broken.png"]


@pytest.mark.parametrize("name", ["1.JPG", "1.Jpeg", "1.PNG", "1.tif", "1.webp"])
def test_extensions_of_all_formats_are_found_in_any_case(tmp_path, name):
    write(tmp_path / "rose" / name)

    assert names_in(tmp_path, load_image_folder(tmp_path).data) == [f"rose/{name}"]


def test_an_image_of_another_format_than_its_extension_is_loaded(tmp_path):
    write(tmp_path / "rose" / "1.png").rename(tmp_path / "rose" / "1.jpg")

    images = load_image_folder(tmp_path)

    features = CNNFeatureTransformer("tiny").fit_transform(images.data)
    assert len(features) == 1


def test_unreadable_images_are_skipped_with_the_reason(folder):
    (folder / "rose" / "empty.jpg").write_bytes(b"")
    (folder / "rose" / "page.png").write_text("<html>404</html>")
    (folder / "rose" / "c.gif").write_text("no image")
    (folder / "rose" / "list.txt").write_text("a.png")
    (folder / "rose" / "phone.HEIC").write_bytes(b"x")
    (folder / "rose" / "README").write_text("roses")
    (folder / "labels.csv").write_text("a,b")
    write(folder / "stray.png")

    images, skipped = load_with_skipped(folder)

    assert len(images.data) == 4
    assert skipped == {
        "labels.csv": "its extension '.csv' is not that of an image",
        "stray.png": "it is in no class folder",
        "rose/README": "it has no extension",
        "rose/c.gif": "it is not a "
        + " or ".join((", ".join(FILE_FORMATS[:-1]), FILE_FORMATS[-1]))
        + " file",
        "rose/empty.jpg": "the file is empty",
        "rose/list.txt": "its extension '.txt' is not that of an image",
        "rose/page.png": "it is an HTML page, possibly the response to a failed "
        "download",
        "rose/phone.HEIC": "its format ('.HEIC') is not supported; convert it to PNG",
    }


def test_too_large_images_are_skipped(folder, monkeypatch):
    Image.new("L", (100, 100)).save(folder / "rose" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)

    images, skipped = load_with_skipped(folder)

    assert len(images.data) == 4
    assert "10,000 pixels" in skipped["rose/large.png"]


def test_only_the_header_is_read(folder):
    path = folder / "rose" / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:6_000])  # of 12 kB

    data, _ = load_image_folder(folder, return_X_y=True)

    assert str(path) in data
    assert [bad.path for bad in find_bad_images(data)] == [str(path)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_skipped_without_waiting(folder):
    os.mkfifo(folder / "rose" / "fifo.jpg")

    _, skipped = load_with_skipped(folder)

    assert skipped == {"rose/fifo.jpg": "it is not a regular file"}


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_files_and_folders_without_permission_are_skipped(folder):
    secret = folder / "rose" / "secret"
    secret.mkdir(mode=0)
    (folder / "rose" / "a.png").chmod(0)
    (folder / "daisy").chmod(0)

    images, skipped = load_with_skipped(folder)
    for path in [secret, folder / "daisy"]:
        path.chmod(0o700)

    assert names_in(folder, images.data) == ["rose/b.png"]
    assert skipped == dict.fromkeys(
        ["daisy", "rose/a.png", "rose/secret"], "permission denied"
    )


def test_classes_without_images_are_left_out_and_reported(folder):
    (folder / "iris").mkdir()
    (folder / "moss" / "inner").mkdir(parents=True)
    (folder / "moss" / "1.jpg").write_bytes(b"")

    images, skipped = load_with_skipped(folder)

    assert images.target_names == ["daisy", "rose"]
    assert images.target.tolist() == [0, 0, 1, 1]
    assert skipped == {
        "iris": "it has no readable image",
        "moss": "it has no readable image",
        "moss/1.jpg": "the file is empty",
    }


def test_one_warning_counts_what_is_left_out_and_shows_three(folder):
    for number in range(5):
        (folder / "rose" / f"{number}.txt").touch()

    with pytest.warns(ImageFolderWarning) as warned:
        load_image_folder(folder)

    (one,) = warned
    assert one.filename == __file__
    message = str(one.message)
    assert message.startswith("5 paths were left out; the first 3: 'rose/0.txt' (its")
    assert "'rose/2.txt'" in message
    assert "'rose/3.txt'" not in message
    assert "`skipped`" in message


def test_a_warning_with_long_names_is_short(folder):
    for number in range(5):
        (folder / "rose" / f"{'x' * 200}{number}.{'y' * 50}").touch()

    with pytest.warns(ImageFolderWarning) as warned:
        load_image_folder(folder)

    assert len(str(warned[0].message)) < 600


@pytest.mark.parametrize("name", ["Gänseblümchen", "雛菊", "with space", "it's", "a.b"])
def test_class_and_file_names_may_have_any_characters(tmp_path, name):
    write(tmp_path / name / f"{name}.png")

    images = load_image_folder(tmp_path)

    assert images.target_names == [name]
    assert images.data.tolist() == [str(tmp_path / name / f"{name}.png")]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are no UTF-8")
@pytest.mark.parametrize("as_frame", [False, True])
def test_names_that_are_no_utf_8_are_loaded(tmp_path, as_frame):
    path = write(tmp_path / "rose" / "1.png")
    path.rename(path.with_name(os.fsdecode(b"\xff.png")))

    data, _ = load_image_folder(tmp_path, return_X_y=True, as_frame=as_frame)

    assert len(CNNFeatureTransformer("tiny").fit_transform(data)) == 1


def test_return_X_y_returns_paths_and_labels(folder):
    data, target = load_image_folder(folder, return_X_y=True)

    images = load_image_folder(folder)
    assert np.array_equal(data, images.data)
    assert np.array_equal(target, images.target)


def test_as_frame_returns_pandas(folder):
    arrays = load_image_folder(folder)

    images = load_image_folder(folder, as_frame=True)
    data, target = load_image_folder(folder, as_frame=True, return_X_y=True)

    assert list(images.data.columns) == ["image"]
    assert images.data["image"].tolist() == arrays.data.tolist()
    assert images.target.name == "target"
    assert images.target.tolist() == arrays.target.tolist()
    expected = pd.concat([images.data, images.target], axis=1)
    pd.testing.assert_frame_equal(images.frame, expected)
    pd.testing.assert_frame_equal(data, images.data)
    pd.testing.assert_series_equal(target, images.target)


def test_as_frame_without_pandas_is_an_import_error(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)

    assert len(load_image_folder(folder).data) == 4
    with pytest.raises(ImportError, match="as_frame=True requires pandas"):
        load_image_folder(folder, as_frame=True)


@pytest.mark.parametrize("kind", [list, tuple, set, np.array], ids=str)
def test_categories_selects_classes_as_in_scikit_learn(folder, kind):
    write(folder / "tulip" / "1.png")
    (folder / "daisy" / "empty.jpg").touch()
    chosen = ["tulip", "rose"]

    images = load_image_folder(folder, categories=kind(chosen))

    expected = load_files(folder, categories=chosen, load_content=False, shuffle=False)
    assert images.data.tolist() == expected.filenames.tolist()
    assert images.target.tolist() == expected.target.tolist()
    assert images.target_names == expected.target_names == ["rose", "tulip"]


def test_an_unknown_category_names_the_nearest_one(folder):
    with pytest.raises(ValueError, match="no class folder 'roze'.*mean 'rose'"):
        load_image_folder(folder, categories=["daisy", "roze"])


@pytest.mark.parametrize(
    ("categories", "error", "words"),
    [
        ("rose", TypeError, "list of class names; got 'rose'"),
        (3, TypeError, "list of class names; got 3"),
        ([0, 1], TypeError, "one of them is 0"),
        ([], ValueError, "categories is empty"),
    ],
)
def test_categories_of_a_wrong_kind_are_refused(folder, categories, error, words):
    with pytest.raises(error, match=words):
        load_image_folder(folder, categories=categories)


@pytest.mark.parametrize("value", [None, 3, b"flowers", ["flowers"]], ids=repr)
def test_what_is_no_path_is_a_type_error(value):
    with pytest.raises(TypeError, match="folder must be a str or a pathlib.Path"):
        load_image_folder(value)


@pytest.mark.parametrize("path", ["", "no/such", "nul\0"], ids=repr)
def test_a_missing_folder_is_named(path):
    with pytest.raises(FileNotFoundError, match="does not exist") as info:
        load_image_folder(path)

    assert repr(path) in str(info.value)


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "flowers.zip").touch()

    with pytest.raises(NotADirectoryError, match="flowers.zip' is a file.*unpack"):
        load_image_folder(tmp_path / "flowers.zip")


def test_a_folder_of_images_tells_what_to_write_instead(tmp_path):
    for name in ["a.jpg", "b.jpg", "c.png"]:
        write(tmp_path / name)

    with pytest.raises(ValueError, match=r"images \(3\)") as info:
        load_image_folder(tmp_path)

    assert f"sorted(pathlib.Path({str(tmp_path)!r}).glob('*.jpg'))" in str(info.value)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(ValueError, match="no class folders: expected one folder"):
        load_image_folder(tmp_path)


def test_class_folders_without_any_image_are_refused_with_reasons(tmp_path):
    (tmp_path / "rose").mkdir()
    (tmp_path / "rose" / "a.jpg").touch()

    with pytest.raises(ValueError, match=r"No image .*'rose/a.jpg' \(the file is emp"):
        load_image_folder(tmp_path)


def test_a_classifier_learns_the_classes_of_a_folder(tmp_path):
    for color in ["blue", "red", "yellow"]:
        for number in range(8):
            write(tmp_path / color / f"{number}.png", color)
    images = load_image_folder(tmp_path)
    parts = train_test_split(
        images.data, images.target, stratify=images.target, random_state=0
    )
    X_train, X_test, y_train, y_test = parts

    pipeline = make_feature_pipeline("tiny", "softmax").fit(X_train, y_train)

    predicted = [images.target_names[code] for code in pipeline.predict(X_test)]
    assert predicted == [Path(path).parent.name for path in X_test]
    assert np.array_equal(pipeline.predict(X_test), y_test)


def test_verbose_counts_the_files(folder, capsys):
    images = load_image_folder(folder)
    assert capsys.readouterr().err == ""

    load_image_folder(folder, verbose=True)

    assert f"files: {len(images.data)}file" in capsys.readouterr().err


def test_files_for_a_reader_are_chosen_by_their_extension(tmp_path):
    for name, value in (("dark", 10), ("light", 200)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", np.full((9, 9, 3), value, np.uint8))
        (tmp_path / name / "notes.txt").write_text("a note")

    with pytest.warns(ImageFolderWarning, match=r"none of the extensions \.npy"):
        images = load_image_folder(tmp_path, extensions=[".NPY"])
    features = CNNFeatureTransformer("tiny", reader=np.load).fit_transform(images.data)

    assert names_in(tmp_path, images.data) == ["dark/1.npy", "light/1.npy"]
    expected = [np.full((9, 9, 3), value, np.uint8) for value in (10, 200)]
    np.testing.assert_array_equal(
        features, CNNFeatureTransformer("tiny").fit_transform(expected)
    )


@pytest.mark.parametrize("extensions", [[], ".npy", ["npy"], [3], 3])
def test_odd_extensions_are_refused(folder, extensions):
    with pytest.raises(ValueError, match="extensions must be a list of extensions"):
        load_image_folder(folder, extensions=extensions)

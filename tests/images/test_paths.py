"""Which paths are files, and what becomes of those that are not."""

import os
from pathlib import Path

import numpy as np
import pytest

from skltl.exceptions import ImageReadError
from skltl.images import read_images


class OwnPath(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, lambda path: np.str_(str(path)), OwnPath])
def test_kinds_of_path(images, image_files, kind):
    pixels = read_images([kind(image_files[2])])[0]

    np.testing.assert_array_equal(pixels, images[2])


@pytest.mark.parametrize("name", ["Blüte 花.png", "with space.png", "no_extension"])
def test_names_of_files(images, image_files, name):
    path = image_files[0].rename(image_files[0].with_name(name))

    np.testing.assert_array_equal(read_images([path])[0], images[0])


def test_links_are_followed(images, image_files, tmp_path):
    (tmp_path / "link").symlink_to(image_files[0])

    np.testing.assert_array_equal(read_images([tmp_path / "link"])[0], images[0])


def missing(folder):
    return folder / "missing.png"


def directory(folder):
    return folder


def dangling_link(folder):
    (folder / "dangling").symlink_to(folder / "missing.png")
    return folder / "dangling"


def looping_link(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def device(_):
    return Path("/dev/zero")


def nul_byte(_):
    return "image\0.png"


def empty(_):
    return ""


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (missing, "no such file"),
        (directory, "directory"),
        (dangling_link, "no such file"),
        (looping_link, "symbolic link"),
        (fifo, "regular file"),
        (device, "regular file"),
        (nul_byte, "null byte"),
        (empty, "path is empty"),
    ],
)
def test_what_is_no_file_is_named(image_files, tmp_path, path, reason):
    source = read_images([image_files[0], path(tmp_path)])

    with pytest.raises(ImageReadError, match=f"Image 1 .*{reason}"):
        source[1]

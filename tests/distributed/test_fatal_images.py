"""The image that ends the process that decodes it is found in a child process."""

import os
import sys

import pytest

from skltl.exceptions import ImageReadError
from skltl.images import check_not_fatal

pytest.importorskip("cloudpickle", reason="needs skltl[dask]")


def make_reader(fatal):
    """Return a reader that ends the process for one path; it cannot be pickled."""

    def read(path):
        sys.stdout.write(f"reading {path}\n")
        if path == fatal:
            os._exit(3)
        return path

    return read


def test_the_image_is_named(many_paths):
    X = [many_paths[0], "missing.png", many_paths[1], many_paths[2]]

    with pytest.raises(ImageReadError, match="ends the process .exit code 3.") as info:
        check_not_fatal(X, reader=make_reader(many_paths[1]))

    assert (info.value.index, info.value.path) == (2, many_paths[1])


@pytest.mark.parametrize("options", [{}, {"reader": make_reader("none")}])
def test_images_that_cannot_be_read_end_no_process(many_paths, options):
    check_not_fatal([many_paths[0], "missing.png", b"no image"], **options)

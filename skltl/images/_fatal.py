"""Find an image that ends the process that decodes it, at the expense of a child."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from skltl.exceptions import ImageReadError, ImageTypeError
from skltl.images._memory import one_image
from skltl.images._source import read_images

END = "end"


def check_not_fatal(X: Any, **options: Any) -> None:
    """Raise an `ImageReadError` for the first image that ends a process, if any does.

    `options` are those of `read_images`. The images are decoded one after the other in
    a child process, which does not inherit what this process has in memory.
    """
    # Unlike pickle, it takes functions of scripts and notebooks. Dask depends on it.
    pickled = import_module("cloudpickle").dumps((X, options))
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _decode_all; _decode_all()"],
        input=pickled,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    lines = child.stdout.decode().split()
    if lines and lines[-1] != END:
        index = int(lines[-1])
        name = read_images(X, check_items=False, **options).name(index)
        reason = f"decoding it ends the process ({_exit_of(child.returncode)})"
        raise ImageReadError(index, name, reason)


def _decode_all() -> None:
    """Decode images that are pickled in the input, and print their indices before."""
    pipe = os.dup(1)
    os.dup2(2, 1)  # what a reader prints
    X, options = pickle.load(sys.stdin.buffer)
    source = read_images(X, check_items=False, **options)
    for index in range(len(source)):
        os.write(pipe, f"{index}\n".encode())
        with suppress(ImageReadError, ImageTypeError), one_image():
            source.decode(index)
    os.write(pipe, END.encode())


def _exit_of(returncode: int) -> str:
    """Describe how a process ended; on POSIX, negative codes are signals."""
    if returncode < 0:
        return signal.Signals(-returncode).name
    return f"exit code {returncode}"

"""Checkpoints: the file from which an interrupted fit continues, and its name."""

from __future__ import annotations

import io
import os
import pickle
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from skltl._caller import level_of_the_user
from skltl.exceptions import CheckpointWarning
from skltl.finetuning._data import Views
from skltl.finetuning._network import Foundation
from skltl.images import ImageSource, content_key, file_digest
from skltl.networks import TORCH_FILE_ERRORS, prefix_digests, structure, versions

# On these a fit does not depend, or they are told apart in another way.
LEFT_OUT = (
    *("augment", "head_init", "cache", "checkpoint", "n_jobs"),
    *("random_state", "verbose"),
)

# What a transform of an installed package does is seen from some augmented views only.
N_VIEWS = 8


def fingerprint(
    classifier: Any,
    source: ImageSource,
    arrays: Iterable[NDArray[Any] | None],
    foundation: Foundation,
    seed: int | None,
) -> str:
    """Name all that a fit depends on.

    Parameters
    ----------
    classifier : FineTunedCNNClassifier
        Its parameters, and with a warm start what it has learned.
    source : ImageSource
        The images, by their content.
    arrays : iterable of array or None
        What else there is for each image: labels, weights, groups.
    foundation : Foundation
        The network; left out if it is random and nobody can draw it again.
    seed : int or None
        The same for the same `random_state`; ``None`` if that is ``None``.

    Returns
    -------
    str
        Hexadecimal digits.

    Raises
    ------
    ValueError
        If it cannot be told what `augment` does.
    """
    digest = blake2b(repr((seed, sorted(versions().items()))).encode(), digest_size=16)
    params = classifier.get_params().items()
    digest.update(
        repr(sorted(one for one in params if one[0] not in LEFT_OUT)).encode()
    )
    digest.update(repr(foundation.preprocessing).encode())
    digest.update(repr(structure(foundation.blocks)).encode())
    for position in range(len(source)):
        digest.update(_image(source, position))
    for array in arrays:
        digest.update(repr(None if array is None else array.tolist()).encode())
    digest.update(description(classifier.head_init, "head_init"))
    if classifier.augment is not None:
        digest.update(description(classifier.augment, "augment"))
        digest.update(_views(classifier.augment, source, foundation))
    if classifier.weights is not None or seed is not None:
        digests = prefix_digests(foundation.backbone, foundation.blocks)
        digest.update(b"".join(digests.values()))
    if classifier.warm_start and hasattr(classifier, "head_"):
        for module in (*classifier.network_.blocks.values(), classifier.head_):
            for weights in module.state_dict().values():
                digest.update(weights.numpy().tobytes())
    return digest.hexdigest()


def _image(source: ImageSource, position: int) -> bytes:
    """Name an image by its content, of a file by all of its bytes."""
    path = source.path(position)
    if path is None:
        return content_key(source[position])
    return file_digest(path) or b""  # the error comes when it is read


def _views(augment: Any, source: ImageSource, foundation: Foundation) -> bytes:
    """Return the contents of augmented views of some images."""
    found = b""
    for number, position in enumerate(np.linspace(0, len(source) - 1, N_VIEWS)):
        crop = foundation.preprocessing.crop(source[int(position)])
        view = Views(crop[None], augment, N_VIEWS, seed=0).view(0, 1 + number)
        found += content_key(view)
    return found


def description(value: Any, name: str) -> bytes:
    """Describe a parameter that may be an object or a function, by all it consists of.

    The same in other processes; never loaded again.

    Raises
    ------
    ValueError
        If it holds what cannot be described, such as an open file.
    """
    content = io.BytesIO()
    try:
        _Describer(content).dump(value)
    except (
        *(pickle.PicklingError, TypeError, ValueError, AttributeError),
        RecursionError,
    ) as error:
        raise ValueError(
            f"checkpoint: it cannot be told what {name}={type(value).__name__} does, "
            "so an interrupted fit with another one might be taken for this one. Use "
            f"functions and objects that can be pickled. ({error})"
        ) from error
    return content.getvalue()


# Packages that are pickled by name wherever they are installed, not only in the folders
# of installed packages. What they do is seen from the augmented views.
BY_NAME = {"torch", "torchvision", "skltl", "numpy", "PIL", "builtins"}


class _Describer(pickle.Pickler):
    """Pickles what a value consists of, the code of the user's own functions included.

    Functions and classes of installed packages are pickled by name.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        # Whether two equal texts are one object is a matter of chance: no memory.
        self.fast = True
        self._described: set[int] = set()  # functions that call themselves

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for a set, whose order is another in each process."""
        if type(value) in (set, frozenset):
            return sorted(description(one, "a set") for one in value)
        return value.__name__ if isinstance(value, ModuleType) else None

    def reducer_override(self, value: Any) -> Any:
        """Return what stands for such an object; others are pickled as usual."""
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            kind = (str(value.dtype), tuple(value.shape))
            return tuple, ((*kind, array.numpy().tobytes()),)
        if isinstance(value, CodeType):
            return tuple, ((value.co_code, value.co_consts, value.co_names),)
        is_function = isinstance(value, FunctionType)
        if not (is_function or isinstance(value, type)) or _is_installed(value):
            return NotImplemented
        if id(value) in self._described:
            return tuple, ((value.__qualname__,),)
        self._described.add(id(value))
        return tuple, (_function(value) if is_function else _class(value),)


def _function(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function consists of, and the globals that it uses."""
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = (function.__defaults__, function.__kwdefaults__)
    known = function.__globals__
    names = sorted(set(_names_in(function.__code__)) & known.keys())
    used = {name: known[name] for name in names}
    return (function.__qualname__, function.__code__, *defaults, enclosed, used)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _class(value: type) -> tuple[Any, ...]:
    """Return what a class consists of, as far as it says what its objects do."""
    parts = {
        name: getattr(part, "__func__", getattr(part, "fget", part))
        for name, part in vars(value).items()
    }
    kept = {
        name: part
        for name, part in parts.items()
        if isinstance(part, FunctionType)
        or (not name.startswith("__") and isinstance(part, (int, float, str, tuple)))
    }
    return (value.__qualname__, value.__bases__, kept)


def _is_installed(value: Any) -> bool:
    """Tell whether a function or class is of Python or of an installed package."""
    if (value.__module__ or "").partition(".")[0] in BY_NAME:
        return True
    if isinstance(value, FunctionType):
        path = value.__code__.co_filename
    else:
        module = sys.modules.get(value.__module__)
        path = getattr(module, "__file__", None) or ""
    parts = Path(path).parts
    return path.startswith(("<frozen", sysconfig.get_path("stdlib"))) or any(
        folder in parts for folder in ("site-packages", "dist-packages")
    )


# Before the state come these bytes and a digest of it: torch does not notice a bit that
# has changed, and would go on with another model.
MAGIC = b"skltl checkpoint 1\n"
DIGEST_BYTES = 32

# Of the same data and parameters, at the same time.
MOST_FITS = 1000

# Of the state that a fit saves.
KEYS = {"seed", "stage", "is_stopped", "layers", "training", "best", "history"}


class Checkpoint:
    """A file that is whole at any time, or a place without one.

    Used as a context manager: until its end the file is this fit's alone. Another one
    of the same data and parameters that runs meanwhile has a file of its own, so that
    fits without a `random_state` do not become one and the same model.

    Parameters
    ----------
    folder : str, path or None
        Where the file lies; the folder is made. ``None`` keeps nothing.
    fingerprint : str
        Of all that the fit depends on: the beginning of the file's name, so that the
        fits of a search do not get in each other's way.

    Attributes
    ----------
    saved : dict or None
        The state from which to go on.

    Raises
    ------
    ValueError
        If nothing can be written there, or what is there cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._path: Path | None = None
        self._lock: FileLock | None = None
        self._has_warned = False
        self.saved: dict[str, Any] | None = None
        if folder is None:
            return
        try:
            name = f"skltl-fit-{fingerprint}"
            self._path, self._lock = _free_place(Path(folder).expanduser(), name)
            self._unfinished(self._path).touch()
            self._unfinished(self._path).unlink()
        except OSError as error:
            self.close()
            raise ValueError(
                f"checkpoint={str(folder)!r} is no folder that files can be written to "
                f"({error.strerror})."
            ) from error
        if self._path.exists():
            try:
                self.saved = self._read(self._path)
            except ValueError:
                self.close()
                raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other fits have the file."""
        if self._lock is not None:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()

    def saved_for(self, n_stages: int) -> dict[str, Any] | None:
        """Return the state from which to go on with a plan of so many stages."""
        if self.saved is not None and not 0 <= self.saved["stage"] < n_stages:
            raise self._unreadable()
        return self.saved

    def save(self, state: dict[str, Any]) -> None:
        """Save the state in place of the one before, all or nothing.

        What cannot be saved is no reason to lose the fit: a warning tells of it, once.
        """
        if self._path is None:
            return
        content = io.BytesIO()
        torch.save(state, content)
        unfinished = self._unfinished(self._path)
        try:
            with unfinished.open("wb") as file:
                file.write(MAGIC + _digest(content.getbuffer()))
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
            _sync_folder(self._path.parent)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            self._warn(error)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Say which file it is if its state does not fit where it is put back."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
            raise self._unreadable() from e

    def clear(self) -> None:
        """Delete the file, and what killed fits have left: the fit is done."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
            for left in self._path.parent.glob(f"{self._path.stem}.*.unfinished"):
                left.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(
                f"The fit is done, but its checkpoint {str(self._path)!r} cannot be "
                f"deleted ({error.strerror}). Delete it: the same fit would begin with "
                "it.",
                CheckpointWarning,
                stacklevel=level_of_the_user(),
            )

    def _unfinished(self, path: Path) -> Path:
        """Name a file of this process and thread."""
        return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.unfinished")

    def _read(self, path: Path) -> dict[str, Any]:
        """Return what was saved last. Nothing in the file is ever executed."""
        try:
            found = path.read_bytes()
        except OSError as error:
            raise self._unreadable() from error
        start = len(MAGIC) + DIGEST_BYTES
        content = memoryview(found)[start:]
        if found[:start] != MAGIC + _digest(content):
            raise self._unreadable()
        try:
            state: Any = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
        except TORCH_FILE_ERRORS as error:
            # torch's own words advise to load such files all the same.
            raise self._unreadable() from error
        if not isinstance(state, dict) or state.keys() != KEYS:
            raise self._unreadable()
        if {type(state[key]) for key in ("seed", "stage")} != {int}:
            raise self._unreadable()
        return state

    def _unreadable(self) -> ValueError:
        return ValueError(
            f"The checkpoint {str(self._path)!r} cannot be read: it is damaged, of "
            "another version, or would need code to be run. Delete it to begin anew."
        )

    def _warn(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"The state of this fit could not be saved to {str(self._path)!r} "
            f"({error.strerror}). The fit goes on; if it is interrupted, it can go on "
            "from the last state that was saved, if any. Make room, or choose another "
            "folder.",
            CheckpointWarning,
            stacklevel=level_of_the_user(),
        )


def _free_place(folder: Path, name: str) -> tuple[Path, FileLock | None]:
    """Lock a file that no other fit uses, one with a saved state if there is one.

    Where files cannot be locked, as on some network drives, it is used without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    interrupted = sorted(folder.glob(f"{name}-*.checkpoint"))
    new = [folder / f"{name}-{number}.checkpoint" for number in range(MOST_FITS)]
    for path in (*interrupted, *new):
        lock = FileLock(path.with_suffix(".lock"), blocking=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        except (OSError, NotImplementedError):
            break
        return path, lock
    return (interrupted or new)[0], None


def _digest(content: Any) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power failure, where folders can be synchronised."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # not all file systems can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

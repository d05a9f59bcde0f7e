"""Checkpoints: the file from which an interrupted fit resumes, and its name."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from skltl._caller import user_stacklevel
from skltl._code import description
from skltl.exceptions import CheckpointWarning
from skltl.finetuning._inputs import AugmentedViews, resolve_augment
from skltl.images import ImageSource, Preprocessing, content_key, file_digest
from skltl.networks import TORCH_FILE_ERRORS, prefix_digests, structure, versions

# A fit does not depend on these, or they are digested separately.
NOT_DIGESTED = {
    *("augment", "head_init", "reader", "cache", "checkpoint", "n_jobs"),
    *("random_state", "verbose", "keep_on_interrupt"),
}

# Transforms of installed packages are pickled by name: what they do shows in some
# augmented views.
N_VIEWS = 8


def fingerprint(
    estimator: Any,
    fitting: Any,
    source: ImageSource,
    arrays: Iterable[NDArray[Any] | None],
    seed: int | None,
) -> str:
    """Return a digest of all that a fit depends on.

    `fitting` holds the network with which the fit begins, `arrays` the labels, sample
    weights and groups. Without a seed, random weights are left out: they are drawn
    differently in each fit, and an interrupted one resumes with its own.
    """
    digest = blake2b(repr((seed, sorted(versions().items()))).encode(), digest_size=16)
    params = estimator.get_params()
    digested = sorted(params.keys() - NOT_DIGESTED)
    digest.update(repr([(name, params[name]) for name in digested]).encode())
    blocks = fitting.network_.blocks
    digest.update(repr((fitting.preprocessing_, structure(blocks.values()))).encode())
    digest.update(source.variant())
    for position in range(len(source)):
        digest.update(_content(source, position))
    for array in arrays:
        values = None if array is None else np.asarray(array).tolist()
        digest.update(repr(values).encode())
    digest.update(description(estimator.head_init, "head_init"))
    augment = resolve_augment(estimator.augment, fitting.preprocessing_)
    if augment is not None:
        digest.update(description(estimator.augment, "augment"))
        digest.update(view_content(augment, source, fitting.preprocessing_))
    if estimator.weights is not None or seed is not None:
        digest.update(b"".join(prefix_digests(fitting.backbone_, blocks).values()))
    if estimator.warm_start and hasattr(estimator, "head_"):
        for module in (*estimator.network_.blocks.values(), estimator.head_):
            for weights in module.state_dict().values():
                digest.update(weights.numpy().tobytes())
    return digest.hexdigest()


def _content(source: ImageSource, position: int) -> bytes:
    """Return a digest of an image's content, for a file of all of its bytes."""
    path = source.path(position)
    if path is None:
        return content_key(source[position])
    return file_digest(path) or b""  # unreadable: decoding it raises later


def view_content(
    augment: Any, source: ImageSource, preprocessing: Preprocessing
) -> bytes:
    """Return digests of augmented views of some images."""
    content = b""
    for number, position in enumerate(np.linspace(0, len(source) - 1, N_VIEWS)):
        crop = preprocessing.crop(source[int(position)])
        views = AugmentedViews(source, crop[None], augment, N_VIEWS, seed=0)
        content += content_key(views.view(0, 1 + number))
    return content


# The file begins with these bytes and a digest of the state: torch does not notice a
# flipped bit, and training would go on with another model.
MAGIC = b"skltl checkpoint 3\n"
DIGEST_BYTES = 32

# Fits with the same data and parameters that run at the same time.
MAX_FITS = 1000

STATE_TYPES: dict[str, Any] = {
    "seed": int,
    "stage": int,
    "n_epochs": int,
    "is_stopped": bool,
    "network": dict,
    "optimizer": dict,
    "schedule": dict,
    "best_score": float,
    "best_loss": float,
    "best_weights": (dict, NoneType),
    "n_epochs_since_best": int,
    "history": list,
}


def check_folder(folder: str) -> None:
    """Refuse a `checkpoint` that cannot be the name of a folder."""
    if not folder or "\0" in folder:
        raise ValueError(f"checkpoint={folder!r} is not the name of a folder.")


@contextmanager
def open_checkpoint(folder: str, fingerprint: str) -> Iterator[Checkpoint]:
    """Lock the checkpoint of a fit, inside the block.

    Another fit with the same data and parameters that runs meanwhile has a file of its
    own, so that fits without a `random_state` do not end as the same model.
    """
    with ExitStack() as stack:
        try:
            name = f"skltl-fit-{fingerprint}"
            path, lock = _lock_file(Path(folder).expanduser(), name)
            if lock is not None:
                stack.callback(_release, lock)
            _unfinished_path(path).touch()
            _unfinished_path(path).unlink()
        except OSError as error:
            raise ValueError(
                f"checkpoint={folder!r} is not a folder in which files can be "
                f"written ({error.strerror})."
            ) from error
        yield Checkpoint(path)


class Checkpoint:
    """The file in which a fit keeps its state; whole at any time.

    `saved` is the state of an interrupted fit, or ``None``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_warned = False
        self.saved = self._read() if path.exists() else None

    def state_for(self, n_stages: int) -> dict[str, Any] | None:
        """Return the state from which a fit with `n_stages` stages resumes, if any."""
        with self.reading():
            if self.saved is not None and not 0 <= self.saved["stage"] < n_stages:
                raise ValueError(f"there is no stage {self.saved['stage']}")
        return self.saved

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state, all or nothing.

        If that fails the fit goes on, with one warning.
        """
        content = io.BytesIO()
        torch.save(state, content)
        unfinished = _unfinished_path(self.path)
        try:
            with unfinished.open("wb") as file:
                file.write(MAGIC + content_digest(content.getbuffer()))
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            if not self._has_warned:
                self._has_warned = True
                self._warn(error)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Name the file if it cannot be read, or does not fit where it is restored."""
        try:
            yield
        except MemoryError:  # not the file's fault
            raise
        except TORCH_FILE_ERRORS as error:
            # torch's own message advises to load unsafe files nevertheless.
            raise ValueError(
                f"The checkpoint {str(self.path)!r} cannot be read: it is damaged, "
                "was written by another version, or contains code. Delete it to start "
                "over."
            ) from error

    def clear(self) -> None:
        """Delete the file of a finished fit, and what killed fits have left."""
        try:
            self.path.unlink(missing_ok=True)
            for file in self.path.parent.glob(f"{self.path.stem}.*.unfinished"):
                file.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(
                f"The fit is finished, but its checkpoint {str(self.path)!r} cannot "
                f"be deleted ({error.strerror}). Delete it: the same fit would resume "
                "from it.",
                CheckpointWarning,
                stacklevel=user_stacklevel(),
            )

    def _read(self) -> dict[str, Any]:
        """Return the saved state; no code in the file is executed."""
        with self.reading():
            whole = self.path.read_bytes()
            start = len(MAGIC) + DIGEST_BYTES
            content = memoryview(whole)[start:]
            if whole[:start] != MAGIC + content_digest(content):
                raise ValueError("another format, or other bytes than were written")
            state: dict[str, Any] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
            for key, kind in STATE_TYPES.items():
                if not isinstance(state[key], kind):
                    raise TypeError(f"{key} is a {type(state[key]).__name__}")
        return state

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"The state of this fit could not be saved to {str(self.path)!r} "
            f"({error.strerror}). The fit goes on; if it is interrupted, it resumes "
            "from the last saved state, if any. Free disk space or choose another "
            "folder.",
            CheckpointWarning,
            stacklevel=user_stacklevel(),
        )


class SharedCheckpoint(Checkpoint):
    """The checkpoint that process 0 reads and writes, in another process."""

    def __init__(self, path: Path, saved: dict[str, Any] | None) -> None:
        self.path = path
        self.saved = saved

    def save(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def clear(self) -> None:
        """Do nothing."""


def _lock_file(folder: Path, name: str) -> tuple[Path, FileLock | None]:
    """Lock a file that no other fit uses, preferably one with a saved state.

    Where files cannot be locked, as on some network drives, none is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    interrupted = sorted(folder.glob(f"{name}-*.checkpoint"))
    new = [folder / f"{name}-{number}.checkpoint" for number in range(MAX_FITS)]
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


def _release(lock: FileLock) -> None:
    """Delete the file of a lock, and release it."""
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


def _unfinished_path(path: Path) -> Path:
    """Return the path at which this process and thread write a checkpoint."""
    return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.unfinished")


def content_digest(content: Any) -> bytes:
    """Return the digest that precedes the state in a file."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def _sync_folder(folder: Path) -> None:
    """Make a new file name survive a power failure, where that is possible."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # not supported by all file systems
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""One file from which a fit that was interrupted goes on."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from skltl._caller import level_of_the_user
from skltl.backbones import TORCH_FILE_ERRORS
from skltl.exceptions import CheckpointWarning

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

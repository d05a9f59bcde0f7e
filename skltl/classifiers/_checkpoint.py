"""One file from which a fit that was interrupted goes on."""

from __future__ import annotations

import os
import pickle
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Of the state that a fit saves.
KEYS = {"seed", "stage", "is_stopped", "layers", "training", "best", "history"}


class Checkpoint:
    """A file that is whole at any time, or a place without one.

    Parameters
    ----------
    folder : str, path or None
        Where the file lies; the folder is made. ``None`` keeps nothing.
    fingerprint : str
        Of all that the fit depends on: the file's name, so that the fits of a search do
        not get in each other's way.

    Raises
    ------
    ValueError
        If nothing can be written there, or what is there cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._path: Path | None = None
        self.saved: dict[str, Any] | None = None
        if folder is None:
            return
        name = f"skltl-fit-{fingerprint}.checkpoint"
        self._path = Path(folder).expanduser() / name
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._unfinished(self._path).touch()
            self._unfinished(self._path).unlink()
        except OSError as error:
            raise ValueError(
                f"checkpoint={str(folder)!r} is no folder that files can be written to "
                f"({error.strerror})."
            ) from error
        if self._path.exists():
            self.saved = _read(self._path)

    def save(self, state: dict[str, Any]) -> None:
        """Save the state in place of the one before, all or nothing."""
        if self._path is None:
            return
        with self._unfinished(self._path).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):  # another process is done with this very fit
            self._unfinished(self._path).replace(self._path)

    def clear(self) -> None:
        """Delete the file, and what killed fits have left: the fit is done."""
        if self._path is None:
            return
        self._path.unlink(missing_ok=True)
        for left in self._path.parent.glob(f"{self._path.stem}.*.unfinished"):
            left.unlink(missing_ok=True)

    def _unfinished(self, path: Path) -> Path:
        """Name a file of this process and thread: others may run the same fit."""
        return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.unfinished")


def _read(path: Path) -> dict[str, Any]:
    """Return what was saved last. Nothing in the file is ever executed."""
    try:
        with path.open("rb") as file:
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch's own words advise to load such files all the same.
        raise ValueError(_CANNOT_BE_READ.format(str(path))) from error
    if not isinstance(state, dict) or state.keys() != KEYS:
        raise ValueError(_CANNOT_BE_READ.format(str(path)))
    return state


_CANNOT_BE_READ = (
    "The checkpoint {!r} cannot be read: it is damaged, or would need code to be run. "
    "Delete it to begin anew."
)

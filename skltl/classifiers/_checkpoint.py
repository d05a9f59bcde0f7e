"""One file from which a fit that was interrupted goes on."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """A file that is whole at any time, or a place without one.

    Parameters
    ----------
    folder : str, path or None
        Where the file lies; the folder is made. ``None`` keeps nothing.
    fingerprint : str
        Of all that the fit depends on: the file's name, so that the fits of a search do
        not get in each other's way.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self._path: Path | None = None
        if folder is not None:
            name = f"skltl-fit-{fingerprint}.checkpoint"
            self._path = Path(folder).expanduser() / name

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, or ``None`` if there is nothing of this fit.

        Nothing in the file is ever executed.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(
                self._path, map_location="cpu", weights_only=True
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            # torch's own words advise to load such files all the same.
            raise ValueError(
                f"The checkpoint {str(self._path)!r} cannot be read: it is damaged, or "
                "would need code to be run. Delete it to begin anew."
            ) from error
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Save the state in place of the one before, all or nothing."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._unfinished(self._path).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self._unfinished(self._path).replace(self._path)

    def clear(self) -> None:
        """Delete the file: the fit is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._unfinished(self._path).unlink(missing_ok=True)

    def _unfinished(self, path: Path) -> Path:
        return path.with_suffix(".unfinished")

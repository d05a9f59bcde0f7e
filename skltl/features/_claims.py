"""Who computes what, so that processes that begin together share the work."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from skltl.features._shelf import Shelf


class Claims:
    """The pictures that one extraction has announced to compute.

    Parameters
    ----------
    folder : Path
        Of the cache.
    work : str
        What is computed of them; the same in all extractions that record the same.
    """

    shelf_name = "skltl-claims"

    def __init__(self, folder: Path, work: str) -> None:
        # Where nothing can be announced, all is computed here.
        self._shelf = Shelf(folder, self.shelf_name, is_durable=False, is_missed=False)
        self._work = work.encode()
        self._owner = uuid.uuid4().bytes
        self._held: set[bytes] = set()

    def claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return those of the pictures that no other extraction is computing."""
        names = {self._name(key): key for key in keys}
        granted = self._shelf.claim(list(names), self._owner)
        if granted is None:
            return set(names.values())
        self._held |= granted
        return {names[name] for name in granted}

    def release(self, keys: Iterable[bytes]) -> None:
        """Tell the others that pictures are done, or are not being computed."""
        names = {self._name(key) for key in keys} & self._held
        self._shelf.release(list(names), self._owner)
        self._held -= names

    def close(self) -> None:
        """Leave what is not done to the others."""
        self._shelf.release(list(self._held), self._owner)
        self._shelf.close()

    def _name(self, key: bytes) -> bytes:
        return blake2b(self._work + key, digest_size=16).digest()

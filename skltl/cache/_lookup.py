"""Look up features in the cache, compute what is missing once, and store it."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skltl.cache._folder import FEATURES, drop_oldest, max_bytes
from skltl.cache._keys import ImageKeys
from skltl.cache._store import Shelf
from skltl.images import Batch, Crop, ImageSource
from skltl.inference import Recipe


class Claims:
    """The images that one extraction has announced to compute.

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
        """Return those of the images that no other extraction is computing."""
        names = {self._name(key): key for key in keys}
        granted = self._shelf.claim(list(names), self._owner)
        if granted is None:
            return set(names.values())
        self._held |= granted
        return {names[name] for name in granted}

    def release(self, keys: Iterable[bytes]) -> None:
        """Tell the others that images are done, or are not being computed."""
        names = {self._name(key) for key in keys} & self._held
        self._shelf.release(list(names), self._owner)
        self._held -= names

    def close(self) -> None:
        """Leave what is not done to the others."""
        self._shelf.release(list(self._held), self._owner)
        self._shelf.close()

    def _name(self, key: bytes) -> bytes:
        return blake2b(self._work + key, digest_size=16).digest()


# What a kill may cost: features are stored after so many seconds, or bytes.
SECONDS_UNSTORED = 2.0
BYTES_UNSTORED = 2**26

# Each look at what others have done or are doing is for so many images at least.
IMAGES_A_LOOK = 16

# An extraction that gives nothing new for so long is not waited for any more.
SECONDS_WITHOUT_NEWS = 60.0

# How often a process looks whether another one is done with an image.
SECONDS_BETWEEN_LOOKS = 0.1


class NoCache:
    """What an extraction talks to that has no cache: everything is to be computed.

    Parameters
    ----------
    features : array of shape (n, n_features)
        To be filled.
    """

    def __init__(self, features: NDArray[Any]) -> None:
        self._features = features
        self.n_done = 0

    def recall(self, source: ImageSource, n_threads: int) -> list[int]:
        """Return the positions of the images whose features are missing."""
        return list(range(len(source)))

    def sift(self, crops: Iterable[Crop]) -> Iterable[Crop]:
        """Leave out what needs no computing."""
        return crops

    def keep(self, batch: Batch, rows: NDArray[Any]) -> None:
        """Take the features of a batch."""
        self._features[batch.positions] = rows
        self.n_done += len(rows)

    def left(self) -> list[int]:
        """Return the positions of the images whose features are still missing."""
        return []

    def close(self) -> None:
        """Nothing was opened."""


class CacheSession:
    """What an extraction talks to that has a cache.

    Parameters
    ----------
    folder : Path
        Of the cache.
    recipe : Recipe
        How features are computed; those at each of its blocks are stored.
    asked : sequence of str
        The blocks whose features are wanted now, side by side.
    features : array of shape (n, n_features)
        To be filled.

    Attributes
    ----------
    n_done : int
        Images whose features are there.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        asked: Sequence[str],
        features: NDArray[np.float32],
    ) -> None:
        max_bytes()  # is the limit a number, before any work
        names = [FEATURES + fingerprint for fingerprint in recipe.fingerprints()]
        self._folder = folder
        self._images_a_look = max(recipe.batch_size, IMAGES_A_LOOK)
        self._features = features
        self._columns = _side_by_side(recipe.blocks, recipe.widths())
        widths = [_width(self._columns[block]) for block in asked]
        self._asked = _side_by_side(asked, widths)
        self._shelves = {
            block: Shelf(
                folder, name, self._n_bytes(block), partial(recipe.about, block)
            )
            for block, name in zip(recipe.blocks, names, strict=True)
        }
        self._keys = ImageKeys(folder)
        self._claims = Claims(folder, work=" ".join(names))
        self._in_use = {*names, self._keys.shelf_name, self._claims.shelf_name}
        self._first: dict[bytes, int] = {}  # where an image computed here stands first
        self._copies: list[tuple[int, int]] = []  # and where it stands again
        self._others: list[int] = []  # what other extractions are computing
        self._may_share = True
        self._unstored: list[tuple[list[bytes], NDArray[np.float32]]] = []
        self._last_stored = time.monotonic()
        self.n_done = 0

    def recall(self, source: ImageSource, n_threads: int) -> list[int]:
        """Fill in what is stored; return the positions of the rest."""
        self._keys.find(source, n_threads)
        return self._fill(range(len(source)))

    def sift(self, crops: Iterable[Crop]) -> Iterator[Crop]:
        """Let through what nobody has computed or is computing."""
        for group in _grouped(crops, self._images_a_look):
            for crop in group:
                self._keys.learn(crop)
            # Before the look: what was done between them would be computed again.
            granted = self._claims.claim(crop.key for crop in group)
            missing = set(self._fill(crop.position for crop in group))
            self._claims.release(
                crop.key for crop in group if crop.position not in missing
            )
            self._store_now_and_then()
            for crop in group:
                if crop.position not in missing:
                    continue
                if crop.key in self._first:
                    self._copies.append((crop.position, self._first[crop.key]))
                elif crop.key in granted or not self._may_share:
                    self._first[crop.key] = crop.position
                    yield crop
                else:
                    self._others.append(crop.position)

    def keep(self, batch: Batch, rows: NDArray[np.float32]) -> None:
        """Take the features of a batch, at all recorded blocks."""
        for block, columns in self._asked.items():
            self._features[batch.positions, columns] = rows[:, self._columns[block]]
        self.n_done += len(rows)
        self._unstored.append((batch.keys, rows))
        self._store_now_and_then()

    def left(self) -> list[int]:
        """Wait for other extractions; return what they leave to this one."""
        self._store()
        for position, first in self._copies:
            self._features[position] = self._features[first]
        self.n_done += len(self._copies)
        self._copies.clear()
        give_up = time.monotonic() + SECONDS_WITHOUT_NEWS
        while self._others:
            if time.monotonic() > give_up:  # whoever it is, it may be standing still
                mine, self._others = self._others, []
                self._may_share = False
                return mine
            granted = self._claims.claim(self._keys[one] for one in self._others)
            n_before = len(self._others)
            missing = self._fill(self._others)
            if len(missing) < n_before:
                give_up = time.monotonic() + SECONDS_WITHOUT_NEWS
            mine = [one for one in missing if self._keys[one] in granted]
            self._others = [one for one in missing if self._keys[one] not in granted]
            if mine:
                return mine
            if self._others:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return []

    def close(self) -> None:
        """Store what is not stored yet, and leave the rest to other extractions."""
        with ExitStack() as stack:
            stack.callback(self._claims.close)
            stack.callback(self._keys.close)
            for shelf in self._shelves.values():
                stack.callback(shelf.close)
            self._store()

    def _fill(self, positions: Iterable[int]) -> list[int]:
        """Copy what is stored; return the positions of what is not."""
        where = defaultdict(list)
        missing = []
        for position in positions:
            if position in self._keys:
                where[self._keys[position]].append(position)
            else:
                missing.append(position)
        found = set(where)
        for block, columns in self._asked.items():
            there = set()
            for key, value in self._shelves[block].read(list(found)):
                self._features[where[key], columns] = np.frombuffer(value, "<f4")
                there.add(key)
            found &= there
        self.n_done += sum(len(where[key]) for key in found)
        missing += [
            one for key, same in where.items() if key not in found for one in same
        ]
        return sorted(missing)

    def _n_bytes(self, block: str) -> int:
        """Return the length of an image's features at a block, stored as float32."""
        return 4 * _width(self._columns[block])

    def _store_now_and_then(self) -> None:
        n_bytes = sum(rows.nbytes for _, rows in self._unstored)
        waited = time.monotonic() - self._last_stored
        if n_bytes > BYTES_UNSTORED or waited > SECONDS_UNSTORED:
            self._store()

    def _store(self) -> None:
        """Write what has been computed, and let other extractions have it."""
        self._last_stored = time.monotonic()
        if self._unstored and not drop_oldest(self._folder, self._in_use):
            why = (
                f"has reached its limit of {max_bytes() / 1e9:g} GB with what is in "
                "use. Raise SKLTL_CACHE_LIMIT, or call skltl.clear_cache."
            )
            self._keys.stop_storing(why)
            for shelf in self._shelves.values():
                shelf.stop_storing(why)
        self._keys.store()
        if not self._unstored:
            return
        keys = [key for some, _ in self._unstored for key in some]
        rows = np.concatenate([rows for _, rows in self._unstored]).astype("<f4")
        for block, columns in self._columns.items():
            values = [row.tobytes() for row in rows[:, columns]]
            self._shelves[block].write(list(zip(keys, values, strict=True)))
        self._claims.release(keys)
        self._unstored.clear()


def _side_by_side(blocks: Sequence[str], widths: Sequence[int]) -> dict[str, slice]:
    """Return the columns in which the features at each block stand."""
    ends = accumulate(widths)
    return {
        block: slice(end - width, end)
        for block, width, end in zip(blocks, widths, ends, strict=True)
    }


def _width(columns: slice) -> int:
    return int(columns.stop - columns.start)


def _grouped(crops: Iterable[Crop], n: int) -> Iterator[list[Crop]]:
    group: list[Crop] = []
    for crop in crops:
        group.append(crop)
        if len(group) == n:
            yield group
            group = []
    yield group

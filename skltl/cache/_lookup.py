"""Features of images from the cache, and the images that are left to compute.

Extractions that run at the same time, such as the workers of a grid search, share the
work image by image: each takes leases on the images that it computes, skips those that
another extraction computes, and reads their features in the end. If instead one worker
computed everything while the others waited, most cores would be idle, since joblib
gives each of k workers a k-th of them. Leases expire, so a worker that was killed or is
stuck delays the others by seconds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skltl.cache._folder import FEATURES, drop_oldest, max_bytes
from skltl.cache._keys import FILE_ENTRY_BYTES, file_entry, files_database, find_keys
from skltl.cache._store import Entry, Leases, Store
from skltl.images import Batch, Crop, ImageSource
from skltl.inference import ExtractionConfig, describe, fingerprints

# Computed features are stored after so much time, or at such a size: what a killed
# process loses.
SECONDS_UNSTORED = 2.0
BYTES_UNSTORED = 2**26

# Smallest number of images that are leased and looked up together.
MIN_CHUNK = 16

# Interval at which the features that another extraction computes are looked up.
POLL_SECONDS = 0.1


class CachedFeatures:
    """Fill an array with features from the cache, and with those that are computed.

    The features at all blocks of `config` are stored; those at `blocks` are written to
    `features`, side by side. `report` is called with the number of images written, and
    with "computed", "cached" or "repeated".
    """

    def __init__(
        self,
        folder: Path,
        config: ExtractionConfig,
        blocks: Sequence[str],
        source: ImageSource,
        features: NDArray[np.float32],
        report: Callable[[int, str], object],
    ) -> None:
        max_bytes()  # an invalid limit is an error before any work
        names = [FEATURES + fingerprint for fingerprint in fingerprints(config)]
        widths = dict(zip(config.blocks, config.widths(), strict=True))
        self._folder = folder
        self._source = source
        self._features = features
        self._report = report
        self._chunk_size = max(config.batch_size, MIN_CHUNK)
        self._columns = _columns(widths)
        self._wanted = _columns({block: widths[block] for block in blocks})
        self._stores = {
            block: Store(
                folder, name, 4 * widths[block], partial(describe, config, block)
            )
            for block, name in zip(config.blocks, names, strict=True)
        }
        files = files_database()
        self._known_files = Store(folder, files, FILE_ENTRY_BYTES)
        self._leases = Leases(folder, work=" ".join(names))
        self._in_use = {*names, files, self._leases.name}
        self._keys: dict[int, bytes] = {}
        self._computed: dict[bytes, int] = {}  # by key, the first position
        self._skipped: list[int] = []  # repeated here, or computed elsewhere
        self._unstored: list[tuple[list[bytes], NDArray[np.float32]]] = []
        self._new_files: list[Entry] = []
        self._last_stored = time.monotonic()

    def read_stored(self, n_threads: int) -> list[int]:
        """Fill in what is stored; return the positions of the other images."""
        self._keys = find_keys(self._source, self._known_files, n_threads)
        return self._read(range(len(self._source)))

    def not_stored(self, crops: Iterable[Crop]) -> Iterator[Crop]:
        """Yield the images to compute, each once, without those computed elsewhere."""
        remaining = iter(crops)
        while chunk := list(islice(remaining, self._chunk_size)):
            for crop in chunk:
                self._keys[crop.position] = crop.key
                self._new_files += file_entry(self._source, crop)
            # Before the lookup: what is stored in between would be computed again.
            leased = self._leases.acquire({crop.key for crop in chunk})
            missing = set(self._read([crop.position for crop in chunk]))
            self._leases.release(
                crop.key for crop in chunk if crop.position not in missing
            )
            self._store_if_due()
            for crop in chunk:
                if crop.position not in missing:
                    continue
                if crop.key in leased and crop.key not in self._computed:
                    self._computed[crop.key] = crop.position
                    yield crop
                else:
                    self._skipped.append(crop.position)

    def add(self, batch: Batch, rows: NDArray[np.float32]) -> None:
        """Take the computed features of a batch, at all blocks of `config`."""
        for block, columns in self._wanted.items():
            self._features[batch.positions, columns] = rows[:, self._columns[block]]
        self._report(len(rows), "computed")
        self._unstored.append((batch.keys, rows))
        self._store_if_due()

    def wait_for_others(self) -> list[int]:
        """Wait for other extractions; return positions that are left to this one."""
        self._store()
        self._leases.release()  # avoids deadlocks between extractions
        others = self._copy_repeated()
        while others:
            leased = self._leases.acquire({self._keys[index] for index in others})
            missing = self._read(others)
            mine = [index for index in missing if self._keys[index] in leased]
            others = [index for index in missing if self._keys[index] not in leased]
            if mine:
                self._skipped = others
                return mine
            if others:
                time.sleep(POLL_SECONDS)
        return []

    def close(self) -> None:
        """Store what is not stored yet, and leave the rest to other extractions."""
        with ExitStack() as stack:
            for store in (*self._stores.values(), self._known_files, self._leases):
                stack.callback(store.close)
            stack.callback(self._leases.release)
            self._store()

    def _read(self, positions: Sequence[int]) -> list[int]:
        """Fill in what is stored; return the positions of what is not."""
        positions_of = defaultdict(list)
        for position in positions:
            if position in self._keys:
                positions_of[self._keys[position]].append(position)
        keys = list(positions_of)
        for block, columns in self._wanted.items():
            stored = []
            for key, value in self._stores[block].read(keys):
                features = np.frombuffer(value, "<f4")
                self._features[positions_of[key], columns] = features
                stored.append(key)
            keys = stored
        done = {position for key in keys for position in positions_of[key]}
        self._report(len(done), "cached")
        return [position for position in positions if position not in done]

    def _copy_repeated(self) -> list[int]:
        """Fill in repeated images; return the positions that were skipped otherwise."""
        others = []
        for position in self._skipped:
            first = self._computed.get(self._keys[position])
            if first is None:
                others.append(position)
            else:
                self._features[position] = self._features[first]
        self._report(len(self._skipped) - len(others), "repeated")
        self._skipped = []
        return others

    def _store_if_due(self) -> None:
        n_bytes = sum(rows.nbytes for _, rows in self._unstored)
        waited = time.monotonic() - self._last_stored
        if n_bytes > BYTES_UNSTORED or waited > SECONDS_UNSTORED:
            self._store()

    def _store(self) -> None:
        """Write what has been computed, and release it to other extractions."""
        self._last_stored = time.monotonic()
        if self._unstored and not drop_oldest(self._folder, self._in_use):
            for store in (self._known_files, *self._stores.values()):
                store.may_write = False
        self._known_files.write(self._new_files)
        self._new_files = []
        if not self._unstored:
            return
        keys = [key for batch_keys, _ in self._unstored for key in batch_keys]
        rows = np.concatenate([rows for _, rows in self._unstored]).astype("<f4")
        for block, columns in self._columns.items():
            values = [row.tobytes() for row in rows[:, columns]]
            self._stores[block].write(list(zip(keys, values, strict=True)))
        self._leases.release(keys)
        self._unstored = []


def _columns(widths: dict[str, int]) -> dict[str, slice]:
    """Return the columns of the features at each block, side by side."""
    ends = accumulate(widths.values())
    return {
        block: slice(end - width, end)
        for (block, width), end in zip(widths.items(), ends, strict=True)
    }

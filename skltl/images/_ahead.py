"""Apply a function in threads, ahead of its results' use or in turns with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_threads: int,
    n_ahead: int,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item, in order, computed ahead in threads.

    Parameters
    ----------
    function : callable
        What to apply. Pillow and hashlib let other threads run while they work.
    items : iterable
        To what.
    n_threads : int
        How many threads work.
    n_ahead : int
        How many results, at most, exist besides the ones yielded.

    Yields
    ------
    object
        The results. An exception is raised where its result would have been yielded.
    """
    remaining = iter(items)
    with _threads(n_threads) as pool:
        ahead: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(remaining, n_ahead)
        )
        while ahead:
            result = ahead.popleft().result()
            for item in islice(remaining, 1):
                ahead.append(pool.submit(function, item))
            yield result


def map_in_bursts(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_threads: int,
    n_burst: int,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item, in order, computed many at a time.

    For results that are used on the same cores: between two bursts no thread works, so
    that none holds up those that use the results.

    Parameters
    ----------
    function : callable
        What to apply.
    items : iterable
        To what.
    n_threads : int
        How many threads work.
    n_burst : int
        How many results are computed together, and wait at most.

    Yields
    ------
    object
        The results. An exception is raised where its result would have been yielded.
    """
    remaining = iter(items)
    with _threads(n_threads) as pool:
        while burst := deque(
            pool.submit(function, item) for item in islice(remaining, n_burst)
        ):
            wait(burst)
            while burst:
                yield burst.popleft().result()


@contextmanager
def _threads(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="skltl-decode")
    try:
        yield pool
    finally:
        # Also reached when the caller stops early or an exception is raised.
        pool.shutdown(wait=True, cancel_futures=True)

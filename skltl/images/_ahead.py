"""Apply a function ahead of its results' use, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="skltl-decode")
    try:
        ahead: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(remaining, n_ahead)
        )
        while ahead:
            result = ahead.popleft().result()
            for item in islice(remaining, 1):
                ahead.append(pool.submit(function, item))
            yield result
    finally:
        # Also reached when the caller stops early or an exception is raised.
        pool.shutdown(wait=True, cancel_futures=True)

"""Randomness as an argument: torch's global generator is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

# The global generator is exchanged for a moment: two threads must not do that at once.
_LOCK = threading.RLock()


@contextmanager
def own_random_state(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators inside of the block only.

    For what draws from them and takes no generator: dropout, stochastic depth, the
    constructors of layers, torchvision's transforms.
    """
    has_cuda = device is not None and device.type == "cuda"
    with _LOCK, torch.random.fork_rng([device] if has_cuda else []):
        torch.default_generator.manual_seed(seed)
        if has_cuda:
            with torch.cuda.device(device):  # not the one that happens to be current
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Make new tensors float32 and on the CPU inside of the block.

    Numbers drawn in another dtype are others, not the same ones in more digits.
    """
    dtype = torch.get_default_dtype()
    with _LOCK, torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def fresh_seed() -> int:
    """Return a seed that nobody can foresee."""
    return int(np.random.default_rng().integers(2**31))


def draw_seed(random_state: Any) -> int | None:
    """Return a seed; an int and ``None`` stand for themselves."""
    if random_state is None:
        return None
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))

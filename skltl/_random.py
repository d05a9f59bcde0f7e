"""Seeds, and random state that leaves torch's global generators unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch.overrides import TorchFunctionMode

from skltl._locks import Lock
from skltl._parameters import settle_in_forked_child

# The global generator is replaced temporarily: only one thread may do that at a time.
_LOCK = Lock()

# Functions that return floats of torch's default dtype, whatever their arguments.
_FLOAT_FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn),
    *(torch.linspace, torch.logspace, torch.empty_strided),
}


@contextmanager
def own_random_state(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators, inside the block only.

    For code that uses them and takes no generator: dropout, stochastic depth, layer
    initialization, torchvision's transforms.
    """
    settle_in_forked_child()
    has_cuda = device is not None and device.type == "cuda"
    with _LOCK, torch.random.fork_rng([device] if has_cuda else []):
        torch.default_generator.manual_seed(seed)
        if has_cuda:
            with torch.cuda.device(device):  # `manual_seed` seeds the current device
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Create tensors as float32 on the CPU, inside the block and in this thread only.

    Sampling in float64 gives a different sequence, not a more precise one.
    """
    settle_in_forked_child()
    with ExitStack() as stack:
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(_Float32())
        stack.enter_context(torch.device("cpu"))
        yield


class _Float32(TorchFunctionMode):
    """Create tensors as float32; `torch.set_default_dtype` affects all threads."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FLOAT_FACTORIES and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def fresh_seed() -> int:
    """Return an unpredictable seed."""
    return int(np.random.default_rng().integers(2**31))


def draw_seed(random_state: Any) -> int | None:
    """Return a seed; an int and ``None`` are returned unchanged."""
    if random_state is None:
        return None
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def derived_seed(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Return a seed that is independent of those for other purposes and numbers.

    Sums such as ``seed + stage`` are not: the second stage of one seed would draw the
    same values as the first stage of the next.
    """
    name = int.from_bytes(blake2b(purpose.encode(), digest_size=4).digest())
    return np.random.SeedSequence([seed, name, *numbers])


def as_int(seed: np.random.SeedSequence) -> int:
    """Return a seed as an integer, for torch and scikit-learn."""
    return int(seed.generate_state(1)[0])

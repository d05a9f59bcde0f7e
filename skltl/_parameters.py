"""The `device`, `precision` and `batch_size` parameters, made into torch's terms."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from joblib import effective_n_jobs

from skltl.exceptions import quote

# On a CPU small batches stay in the processor's cache, and a single image stays cheap
# although every batch is filled up to this size. Of 12 networks, 4 to 16 at a time were
# the fastest as long as the largest map between their blocks took no more than about
# 16 MiB, and fewer beyond (VGG-16: 2 run 1.3 times as fast as 16). A GPU needs more to
# keep all of its cores at work.
CPU_BATCH_SIZE = 8
CPU_BYTES = 2**24
GPU_BATCH_SIZE = 128

# Whether this process is a forked child in which skltl has not yet computed.
_is_new_child = False

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settle_in_forked_child() -> None:
    """Let torch compute in a forked child, with one thread.

    The threads of torch's pool do not exist there, and it would wait for them for ever.
    Called before skltl computes, and not at the fork: the children of programs that
    only import skltl are none of its business.
    """
    global _is_new_child
    if _is_new_child:
        torch.set_num_threads(1)
        _is_new_child = False


def resolve_device(device: str) -> torch.device:
    """Return the device to run on; ``"auto"`` is the first GPU there is, else the CPU.

    Every estimator asks for its device before it computes.

    Raises
    ------
    ValueError
        If torch does not know the device, or this machine does not have it.
    """
    settle_in_forked_child()
    if device == "auto":
        if torch.cuda.is_available():
            return _with_number(torch.device("cuda"))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"Unknown device {quote(device)}. "
            "Use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ..."
        ) from error
    if not _is_available(resolved):
        raise ValueError(
            f"device={quote(device)} is not available on this machine. device='auto' "
            "takes a GPU only where there is one."
        )
    return resolved if resolved.type != "cuda" else _with_number(resolved)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    ``"auto"`` is bfloat16 where the processor multiplies it natively (at two to four
    times the speed of float32), else float32.
    """
    if precision == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    return DTYPES[precision]


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return a dtype's name, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def has_native_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 without emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        return bool(torch.cpu._is_avx512_bf16_supported())
    capabilities: Any = torch.cpu.get_capabilities()
    instructions = ("amx_bf16", "avx512_bf16", "bf16")  # the last is Arm's
    return any(capabilities.get(name, False) for name in instructions)


def resolve_batch_size(
    batch_size: int | str, device: torch.device, map_bytes: int
) -> int:
    """Return the number of images that cross the network together.

    Parameters
    ----------
    batch_size : int or "auto"
        What the user wants. ``"auto"`` goes by a rule, not by a clock: features depend
        on the batch size in the last digits.
    device : torch.device
        Where the network runs.
    map_bytes : int
        What the largest feature map of one image between blocks takes.

    Returns
    -------
    int
        ``"auto"`` is a power of two.
    """
    if not isinstance(batch_size, str):
        return int(batch_size)
    if device.type != "cpu":
        return GPU_BATCH_SIZE
    n_that_fit = max(1, CPU_BYTES // map_bytes)
    return min(CPU_BATCH_SIZE, 1 << (n_that_fit.bit_length() - 1))


def resolve_threads(n_jobs: int | None) -> int:
    """Return how many threads decode; torch's number respects joblib's workers."""
    if n_jobs is None:
        return torch.get_num_threads()
    if n_jobs == 0:
        raise ValueError("n_jobs=0: there must be a thread. -1 is one for each core.")
    return int(effective_n_jobs(n_jobs))


def halve_until_it_fits(run: Callable[[int], None], batch_size: int) -> None:
    """Run a job, and again with half the batch size if memory runs out.

    Parameters
    ----------
    run : callable
        ``run(batch_size)`` does the whole job. It begins anew, so that all images
        cross the network in batches of one size.
    batch_size : int
        To begin with.

    Raises
    ------
    torch.OutOfMemoryError
        If not even a single image fits.
    """
    while not _fits(run, batch_size):
        # Only here, where the failed batch is no longer held by the error's traceback.
        torch.cuda.empty_cache()
        batch_size //= 2


def _fits(run: Callable[[int], None], batch_size: int) -> bool:
    try:
        run(batch_size)
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
        return False
    return True


def _note_fork() -> None:
    global _is_new_child
    _is_new_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _with_number(device: torch.device) -> torch.device:
    """Say which GPU it is; without a number it would be the one current at the time."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _is_available(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"

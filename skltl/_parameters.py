"""Resolution of the `device`, `precision`, `batch_size` and `n_jobs` parameters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from joblib import effective_n_jobs

from skltl._caller import user_stacklevel
from skltl.exceptions import PrecisionWarning, quote

# On a CPU, small batches stay in the processor's cache, and a single image stays cheap
# although every batch is filled up. Of 12 networks, 4 to 16 images at a time had the
# highest throughput as long as the largest feature map between their blocks took at
# most about 16 MiB, and fewer beyond that (VGG-16 is 1.3 times as fast with 2 images as
# with 16). A GPU needs more to use all of its cores.
CPU_BATCH_SIZE = 8
CPU_BYTES = 2**24
GPU_BATCH_SIZE = 128

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Whether this process is a forked child in which skltl has not computed yet.
_is_new_child = False


def settle_in_forked_child() -> None:
    """Let torch compute in a forked child, with one thread.

    The threads of torch's pool do not exist there, and torch would wait for them
    forever. This is called before skltl computes, not at the fork: other children of a
    program that imports skltl are left alone.
    """
    global _is_new_child
    if _is_new_child:
        torch.set_num_threads(1)
        _is_new_child = False


def _note_fork() -> None:
    global _is_new_child
    _is_new_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def resolve_device(device: str) -> torch.device:
    """Return the device to run on; ``"auto"`` is the current GPU, if any, or the CPU.

    Every estimator resolves its device before it computes.
    """
    settle_in_forked_child()
    if device == "auto":
        if torch.cuda.is_available():
            return _with_index(torch.device("cuda"))
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
            "uses a GPU only where there is one."
        )
    return resolved if resolved.type != "cuda" else _with_index(resolved)


def _with_index(device: torch.device) -> torch.device:
    """Return a GPU with its index; without one, it is whichever GPU is current."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _is_available(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return device.type == "cpu"


def resolve_precision(
    precision: str, device: torch.device, fitted: str | None = None
) -> torch.dtype:
    """Return the dtype of the computation.

    ``"auto"`` is the one of `fit`, if any. Otherwise it is bfloat16 where the device
    multiplies it natively, with two to four times the throughput of float32, and
    float32 elsewhere.
    """
    if precision != "auto":
        return DTYPES[precision]
    is_native = has_native_bfloat16(device)
    if fitted == "bfloat16" and not is_native:
        warnings.warn(
            "The estimator was fitted in bfloat16, which is not native here. It "
            "computes in float32, and features differ by about 1 %.",
            PrecisionWarning,
            stacklevel=user_stacklevel(),
        )
        return torch.float32
    if fitted is not None:
        return DTYPES[fitted]
    return torch.bfloat16 if is_native else torch.float32


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 has nothing public
        return False
    capabilities = torch.cpu.get_capabilities()
    instructions = ("amx_bf16", "avx512_bf16", "bf16")  # the last is Arm's
    return any(capabilities.get(name, False) for name in instructions)


def resolve_batch_size(
    batch_size: int | str, device: torch.device, map_bytes: int
) -> int:
    """Return the batch size of the network.

    ``"auto"`` is a power of two that follows from the device and from `map_bytes`, the
    size of the largest feature map of one image: features depend on the batch size in
    the last digits, so it must not depend on a measurement.
    """
    if not isinstance(batch_size, str):
        return int(batch_size)
    if device.type != "cpu":
        return GPU_BATCH_SIZE
    n_that_fit = max(1, CPU_BYTES // map_bytes)
    return min(CPU_BATCH_SIZE, 1 << (n_that_fit.bit_length() - 1))


def resolve_threads(n_jobs: int | None) -> int:
    """Return the number of decoding threads.

    ``None`` is the number of threads of torch, which joblib limits in its workers.
    """
    if n_jobs is None:
        return torch.get_num_threads()
    if n_jobs == 0:
        raise ValueError("n_jobs=0: at least one thread is needed; -1 uses all cores.")
    return int(effective_n_jobs(n_jobs))


def halve_until_it_fits(run: Callable[[int], None], batch_size: int) -> None:
    """Call ``run(batch_size)``, and again with half the batch size if out of memory.

    `run` starts anew each time, so that all batches have the same size.
    """
    while not _fits(run, batch_size):
        # Only here, where the error's traceback no longer holds the failed batch.
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

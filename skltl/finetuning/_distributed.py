"""A fit in several processes: what they exchange, and how they end together.

Under ``torchrun``, with an initialized process group, `fit` is called in each process
with the same data. Each computes its share of every batch, and all reach the same
communications in the same order. Before each of them they exchange whether all are
well: an error or an interruption of one process is raised in all, and none waits for
another that has ended. In a single process, nothing is exchanged.
"""

from __future__ import annotations

import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from skltl._large_arrays import new_array
from skltl._random import as_int, derived_seed

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# Rows are sent in pieces of this size, so that large arrays are not copied as a whole.
BYTES_AT_ONCE = 2**26

# What is exchanged before each communication; the largest one counts.
FINE, INTERRUPTED, FAILED = range(3)


def n_processes() -> int:
    """Return the number of processes that fit together."""
    is_initialized = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if is_initialized else 1


def rank() -> int:
    """Return the number of this process; process 0 writes, warns and shows progress."""
    return dist.get_rank() if n_processes() > 1 else 0


def shares(n: int) -> list[slice]:
    """Divide a range among the processes; the first ones never have less."""
    bounds = [-(-n * number // n_processes()) for number in range(n_processes() + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def share(n: int) -> slice:
    """Return the part of a range that this process computes."""
    return shares(n)[rank()]


def own_seed(seed: int) -> int:
    """Return a different seed in each process, as for dropout."""
    return seed if n_processes() == 1 else as_int(derived_seed(seed, "process", rank()))


@contextmanager
def fitting_together() -> Iterator[None]:
    """Let all processes leave the block alike: finished, interrupted or with an error.

    An error that another process has raised says so in a note. Only process 0 warns.
    """
    if n_processes() == 1:
        yield
        return
    with warnings.catch_warnings(), _interrupts.handled():
        if rank() > 0:
            warnings.simplefilter("ignore")
        try:
            with in_step():
                yield
        except _SettledInterrupt:
            raise KeyboardInterrupt from None
        except _Settled as settled:
            raise settled.error from settled.error.__cause__


def fitted_together(fit: F) -> F:
    """Return a method `fit` that all processes leave alike."""

    @wraps(fit)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with fitting_together():
            return fit(*args, **kwargs)

    return cast(F, wrapped)


@contextmanager
def in_step() -> Iterator[None]:
    """Raise in all processes what one of them raises inside the block."""
    if n_processes() == 1:
        yield
        return
    try:
        yield
        _agree()
    except (_Settled, _SettledInterrupt):
        raise
    except BaseException as error:
        _agree(error)
        raise


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Raise Ctrl-C in all processes at their next communication, not at once."""
    if n_processes() == 1:
        yield
        return
    with _interrupts.deferred():
        yield


def broadcast(value: T) -> T:
    """Return what process 0 has passed."""
    if n_processes() == 1:
        return value
    _agree()
    values = [value if rank() == 0 else None]
    with _communication():
        dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return what each process has passed."""
    if n_processes() == 1:
        return [value]
    _agree()
    return _gather(value)


def check_same(values: dict[str, Any]) -> None:
    """Raise if the processes have other values under one of the names."""
    everyone = gather(values)
    for number, others in enumerate(everyone):
        for name, value in everyone[0].items():
            if others[name] != value:
                raise ValueError(
                    f"fit was called with different {name} in process {number} than in "
                    "process 0. Pass the same data and parameters in each process: fit "
                    "distributes the work."
                )


def gather_rows(array: NDArray[Any], owned: Sequence[Sequence[slice]]) -> None:
    """Fill in the rows that other processes have computed.

    `owned` are those of each process.
    """
    if n_processes() == 1:
        return
    _agree()
    n_at_once = max(1, BYTES_AT_ONCE // max(array[:1].nbytes, 1))
    for owner, slices in enumerate(owned):
        numbers = [np.arange(*rows.indices(len(array))) for rows in slices]
        rows = np.concatenate([*numbers, np.zeros(0, dtype=np.int64)])
        for start in range(0, len(rows), n_at_once):
            some = rows[start : start + n_at_once]
            values = torch.from_numpy(array[some]).to(_device())
            with _communication():
                dist.broadcast(values, owner)
            if owner != rank():
                array[some] = values.cpu().numpy()


@torch.no_grad()
def run_together(
    run: Callable[[slice], Tensor], slices: Sequence[slice], n: int
) -> NDArray[np.float32]:
    """Run consecutive batches, and return the outputs of all `n` items as one array.

    Each process runs its share of the batches.
    """
    array = None
    for batch in slices[share(len(slices))]:
        outputs = run(batch).float().cpu().numpy()
        if array is None:
            array = new_array((n, *outputs.shape[1:]), np.float32)
        array[batch] = outputs
    # The first process always has a batch.
    shape = broadcast(None if array is None else array.shape)
    assert shape is not None
    if array is None:
        array = new_array(shape, np.float32)
    gather_rows(array, [slices[part] for part in shares(len(slices))])
    return array


def gather_parts(values: NDArray[Any], batches: Sequence[slice]) -> NDArray[Any]:
    """Return a value for each item of batches, of which each process has its share."""
    if n_processes() == 1:
        return values
    owned: list[list[slice]] = [[] for _ in range(n_processes())]
    for batch in batches:
        for parts, part in zip(owned, shares(batch.stop - batch.start), strict=True):
            parts += [slice(batch.start + part.start, batch.start + part.stop)]
    array = np.empty((batches[-1].stop, *values.shape[1:]), values.dtype)
    own = [np.arange(part.start, part.stop) for part in owned[rank()]]
    array[np.concatenate(own)] = values
    gather_rows(array, owned)
    return array


@torch.no_grad()
def add_up(loss: Tensor, parameters: Iterable[nn.Parameter] = ()) -> Tensor:
    """Return the sum of the losses; add up the gradients of the parameters in place.

    By hand, in one communication: `DistributedDataParallel` averages over processes,
    not images, and requires a forward pass in each of them, which the last batch may
    not have an image for. In return, nothing is sent while gradients are computed.
    """
    if n_processes() == 1:
        return loss
    trainable = [one for one in parameters if one.requires_grad]
    # A parameter that no process uses has no gradient, and no weight decay.
    is_used = [float(one.grad is not None) for one in trainable]
    gradients = [
        torch.zeros_like(one) if one.grad is None else one.grad for one in trainable
    ]
    flat = torch.cat(
        [
            loss.detach().reshape(1),
            torch.tensor(is_used, dtype=torch.float32, device=loss.device),
            *(gradient.reshape(-1) for gradient in gradients),
        ]
    )
    total = flat.to(_device())
    _agree()  # now that nothing more can fail for lack of memory
    with _communication():
        dist.all_reduce(total)
    total = total.to(loss.device)
    sizes = [1, len(trainable), *(one.numel() for one in trainable)]
    loss, used, *sums = torch.split(total, sizes)
    for one, is_one_used, summed in zip(trainable, used.tolist(), sums, strict=True):
        one.grad = summed.view_as(one).to(one.dtype) if is_one_used else None
    return loss[0]


@torch.no_grad()
def broadcast_weights(module: nn.Module) -> None:
    """Copy the weights and buffers of process 0."""
    if n_processes() == 1:
        return
    _agree()
    for tensor in module.state_dict().values():
        sent = tensor.to(_device()).contiguous()
        with _communication():
            dist.broadcast(sent, 0)
        tensor.copy_(sent)


class _Settled(Exception):
    """An error that all processes know of."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _SettledInterrupt(KeyboardInterrupt):
    """An interruption that all processes know of."""


class _Interrupts:
    """Ctrl-C, which must not end one process while the others communicate with it."""

    def __init__(self) -> None:
        self.is_pending = False
        self.is_settled = False  # further ones are those of the other processes
        self._n_deferring = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle Ctrl-C here, unless the user does."""
        self.is_pending = self.is_settled = False
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
            yield
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        if self.is_pending and not self.is_settled:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._n_deferring += 1
        try:
            yield
        finally:
            self._n_deferring -= 1

    def _handle(self, *_: Any) -> None:
        if self.is_settled:
            return
        self.is_pending = True
        if not self._n_deferring:
            raise KeyboardInterrupt


_interrupts = _Interrupts()


def _agree(error: BaseException | None = None) -> None:
    """Wait for the other processes; raise what one of them has raised, if any."""
    if error is None and _interrupts.is_pending and not _interrupts.is_settled:
        error = KeyboardInterrupt()
    is_interrupt = isinstance(error, KeyboardInterrupt)
    own = FINE if error is None else INTERRUPTED if is_interrupt else FAILED
    worst = torch.tensor(own, device=_device())
    try:
        with _communication():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
    except _Settled as ended:
        raise _Settled(ended.error if error is None else error) from error
    if worst.item() == FINE:
        return
    _interrupts.is_settled = True
    if worst.item() == INTERRUPTED:
        raise _SettledInterrupt
    errors = _gather(_portable(error) if own == FAILED else None)
    first = next(number for number, one in enumerate(errors) if one is not None)
    raised = error if first == rank() else errors[first]
    assert raised is not None
    if error is None:
        raised.add_note(f"It was raised in process {first} of {n_processes()}.")
    raise _Settled(raised)


def _gather(value: T) -> list[T]:
    values: list[Any] = [None] * n_processes()
    with _communication():
        dist.all_gather_object(values, value)
    return values


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an error that can be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _communication() -> Iterator[None]:
    """Let nothing interrupt a communication; name the cause if it fails."""
    with _interrupts.deferred():
        try:
            yield
        except Exception as error:
            raised = RuntimeError(
                "Another process of this fit has ended, or has not answered in time: "
                f"{error}"
            )
            raised.__cause__ = error
            raise _Settled(raised) from error


def _device() -> torch.device:
    """Return the device of what is sent: with NCCL, the current GPU."""
    is_gpu = "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else _CPU


_CPU = torch.device("cpu")

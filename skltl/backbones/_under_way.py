"""Batches on their way to a device, and features on their way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A GPU copies and computes in the order in which it is told to. While it works on one
# batch, the CPU tells it what to do with the next, and prepares the one behind that: so
# the GPU never waits for the CPU. Its own copies, of 8-bit pictures and of features,
# take a few percent of the time of the network, and are not overlapped.
GPU_BATCHES = 3


def n_under_way(device: torch.device) -> int:
    """Return how many batches a device should have to work on at a time."""
    return GPU_BATCHES if device.type == "cuda" else 1


def send(batch: Tensor, device: torch.device) -> Tensor:
    """Bring a batch to a device; to a GPU without waiting until it is there.

    On torch's current stream, as all that follows.
    """
    if device.type != "cuda" or batch.is_cuda:
        return batch.to(device)
    # Only from memory that the operating system does not move can a GPU copy by itself.
    return batch.pin_memory().to(device, non_blocking=True)


class UnderWay:
    """Features that a device computes and copies to the CPU, while other work goes on.

    Parameters
    ----------
    rows : tensor of shape (n, d)
        On the device. A GPU may still have to compute them.
    """

    def __init__(self, rows: Tensor) -> None:
        self._arrival: Any = None
        if rows.device.type != "cuda":
            self._rows = rows.cpu()
            return
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._rows.copy_(rows, non_blocking=True)
        cuda: Any = torch.cuda
        # "blocking" sleeps; otherwise waiting would take a core from what decodes.
        event = cuda.Event(blocking=True)
        self._arrival = cuda.current_stream(rows.device).record_event(event)

    def wait(self) -> Tensor:
        """Return the features, on the CPU, as soon as they are there."""
        if self._arrival is None:
            return self._rows
        self._arrival.synchronize()
        return self._rows.clone()  # pinned memory is scarce, and is used again

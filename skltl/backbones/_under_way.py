"""Batches on their way to a device, and features on their way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# While one is computed, the next is there already and the one before on its way back.
GPU_BATCHES = 3


def n_under_way(device: torch.device) -> int:
    """Return how many batches a device should have to work on at a time."""
    return GPU_BATCHES if device.type == "cuda" else 1


def send(batch: Tensor, device: torch.device) -> Tensor:
    """Bring a batch to a device; to a GPU without waiting until it is there."""
    if device.type != "cuda" or batch.is_cuda:
        return batch.to(device)
    # Only from memory that the operating system does not move can a GPU copy by itself.
    return batch.pin_memory().to(device, non_blocking=True)


class UnderWay:
    """Features that a device computes and copies to the CPU, while other work goes on.

    Parameters
    ----------
    rows : tensor of shape (n, d)
        On the device. Of a GPU it may be computed yet.
    """

    def __init__(self, rows: Tensor) -> None:
        self._is_there: Any = None
        if rows.device.type != "cuda":
            self._rows = rows.cpu()
            return
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._rows.copy_(rows, non_blocking=True)
        stream: Any = torch.cuda.current_stream(rows.device)
        self._is_there = stream.record_event()

    def wait(self) -> Tensor:
        """Return the features, on the CPU, as soon as they are there."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._rows

"""The torch engine, eager or compiled, and copies between a device and the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skltl.exceptions import EngineError
from skltl.inference._pooling import pool

# A GPU computes and copies in the order of its instructions. While it works on one
# batch, the CPU queues the next and prepares the third, so that the GPU never waits for
# the CPU. Its own copies take a few percent of the time of the network, and do not
# overlap with it.
GPU_BATCHES = 3

# torch caches compiled code by `forward`, which all segments share; past its default of
# 8 it would silently run them uncompiled.
MAX_COMPILED = 1024


def run_segments(
    segments: Mapping[str, Callable[[Tensor], Tensor]],
    wanted: Collection[str],
    batch: Tensor,
    pooling: str | int,
) -> dict[str, Tensor]:
    """Run segments one after the other; return the features of the wanted blocks.

    Segments are named by their last blocks.
    """
    features = {}
    for name, segment in segments.items():
        batch = segment(batch)  # (n, c, h, w)
        if name in wanted:
            # Now, since the next segment may overwrite the feature map in place.
            features[name] = pool(batch, pooling)  # (n, d)
    return features


def compile_segment(segment: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile a frozen segment with its weights as constants."""
    compiled = torch.compile(segment, options={"freezing": True})

    def run(feature_map: Tensor) -> Tensor:
        from torch._dynamo import config
        from torch._inductor.exc import InductorError

        try:
            # Weights become constants only where gradients are off.
            with config.patch(recompile_limit=MAX_COMPILED), torch.no_grad():
                output: Tensor = compiled(feature_map)
        except InductorError as error:
            raise EngineError(
                "engine='compile' needs a C++ compiler that torch can use: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return output

    return run


def n_in_flight(device: torch.device) -> int:
    """Return the number of batches that a device should have at a time."""
    return GPU_BATCHES if device.type == "cuda" else 1


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Copy a batch to a device; to a GPU without waiting for the copy."""
    if device.type != "cuda" or batch.is_cuda:
        return batch.to(device)
    # A GPU can copy on its own only from pinned memory.
    return batch.pin_memory().to(device, non_blocking=True)


class InFlight:
    """Features (n, d) that a GPU may still be computing and copying to the CPU."""

    def __init__(self, features: Tensor) -> None:
        self._event: Any = None
        if features.device.type != "cuda":
            self._features = features.cpu()
            return
        self._features = torch.empty(
            features.shape, dtype=features.dtype, pin_memory=True
        )
        self._features.copy_(features, non_blocking=True)
        cuda: Any = torch.cuda
        # "blocking" sleeps; a busy wait would occupy a core that could decode images.
        event = cuda.Event(blocking=True)
        self._event = cuda.current_stream(features.device).record_event(event)

    def wait(self) -> Tensor:
        """Return the features on the CPU when they are complete."""
        if self._event is None:
            return self._features
        self._event.synchronize()
        return self._features.clone()  # pinned memory is scarce, and is reused

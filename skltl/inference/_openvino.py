"""The OpenVINO engine, and the choice between the engines."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, inf, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from skltl._caller import user_stacklevel
from skltl._locks import CONVERSIONS, Lock
from skltl.exceptions import EngineError, EngineWarning
from skltl.inference._torch import can_pool, pool
from skltl.networks import Block, Layout, function_names, is_known_code, layers_of

ENGINES = ("torch", "compile", "openvino")

# Layers and functions of torchvision and timm, which OpenVINO converts with the same
# results. Whether it can convert others is unknown before it tries.
USUAL_LAYERS = frozenset(
    (
        *(nn.Sequential, nn.Conv1d, nn.Conv2d, nn.Linear, nn.Identity, nn.Dropout),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.MultiheadAttention),
        *(NonDynamicallyQuantizableLinear, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU),
        *(nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.MaxPool2d),
        *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.ZeroPad2d, nn.Upsample),
    )
)
USUAL_FUNCTIONS = frozenset(
    (
        *("__eq__", "__getitem__", "__invert__", "__pow__", "__rsub__", "__setitem__"),
        *("adaptive_avg_pool2d", "add", "add_", "addcmul", "amax", "avg_pool2d"),
        *("batch_norm", "cat", "chunk", "clamp", "clone", "contiguous", "conv2d"),
        *("cos", "cumsum", "div", "div_", "dropout", "einsum", "exp", "expand"),
        *("flatten", "float", "fold", "gelu", "getattr", "getitem", "group_norm"),
        *("interpolate", "layer_norm", "linear", "masked_fill", "matmul", "max_pool2d"),
        *("mean", "mul", "ne", "neg", "new_zeros", "norm", "normalize", "pad"),
        *("permute", "relu", "repeat_interleave", "reshape", "reshape_as", "rms_norm"),
        *("roll", "scaled_dot_product_attention", "sigmoid", "sin", "size", "softmax"),
        *("split", "squeeze", "stack", "sub", "sum", "swapaxes", "tile", "to"),
        *("transpose", "type_as", "unbind", "unfold", "unsqueeze", "zero_", "zeros"),
    )
)

# OpenVINO's maximum of NaN and 0 is 0, so that the features of an image that overflows
# may be finite. The squares of larger values, of which norms are computed, overflow.
MAX_INPUT = torch.finfo(torch.float32).max ** 0.5

# OpenVINO's threads do not exist in a forked child, which would wait for them forever.
_process_of_openvino: int | None = None


def resolve_engine(
    engine: str,
    device: torch.device,
    blocks: Mapping[str, Block],
    fitted: str | None = None,
) -> str:
    """Return the engine for a network.

    ``"auto"`` is the one of `fit`, if any, or torch with a warning where that cannot
    run. Otherwise it is OpenVINO on a CPU where it is installed, and torch for unusual
    layers and for code of the user, which a conversion might misread.
    """
    if engine != "auto":
        if obstacle := _obstacle(engine, device):
            raise EngineError(
                f"engine={engine!r} cannot run: {obstacle}. engine='auto' uses what "
                "can."
            )
        return engine
    if fitted is None:
        is_usual = all(map(_is_usual, blocks.values()))
        return "openvino" if is_usual and can_run("openvino", device) else "torch"
    if not can_run(fitted, device):
        warnings.warn(
            f"The estimator was fitted with engine={fitted!r}, which is not available "
            "here. It uses torch, and features differ in the last digits.",
            EngineWarning,
            stacklevel=user_stacklevel(),
        )
        return "torch"
    return fitted


def can_run(engine: str, device: torch.device) -> bool:
    """Return whether an engine can run on a device of this machine."""
    return not _obstacle(engine, device)


def _obstacle(engine: str, device: torch.device) -> str:
    """Return the reason why an engine cannot run, or an empty string."""
    if engine != "openvino":
        return ""
    if find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'skltl[openvino]')"
    if device.type != "cpu":
        return f"it runs on CPUs, not on the device {str(device)!r}"
    if _process_of_openvino not in (None, os.getpid()):
        return (
            "this process is a forked child of one that has used OpenVINO, whose "
            "threads do not exist here"
        )
    return ""


def _is_usual(block: Block) -> bool:
    """Return whether a block consists of known code, usual layers and functions."""
    parts = (part for layer in layers_of(block).values() for part in layer.modules())
    layers = (part for part in parts if type(part).__module__[:6] == "torch.")
    return (
        is_known_code(block)
        and all(type(one) in USUAL_LAYERS for one in layers)
        and function_names(block) <= USUAL_FUNCTIONS
    )


class OpenVINOEngine:
    """A network converted to OpenVINO, once for each shape of batches and pooling.

    Pooling is converted with the network, since whole feature maps would be large to
    return. For the same reason it is cheap to pool after all segments, wanted or not,
    so that features do not depend on which ones are wanted. Only whole feature maps
    (``pooling="flatten"``) are returned where they are wanted.
    """

    def __init__(
        self,
        segments: Mapping[str, nn.Module],
        layouts: Mapping[str, Layout],
        wanted: Collection[str],
        dtype: torch.dtype,
    ) -> None:
        self._segments = {name: one.float() for name, one in segments.items()}
        self._layouts = layouts
        self._wanted = wanted
        self._precision = "bf16" if dtype == torch.bfloat16 else "f32"
        self._models: dict[Any, Any] = {}
        self._lock = Lock()

    def __call__(self, batch: Tensor, pooling: str | int) -> dict[str, Tensor]:
        """Return the float32 features of the wanted blocks, NaN for huge inputs."""
        key = (tuple(batch.shape), pooling)
        array = batch.float().contiguous().numpy()
        with self._lock:  # a request serves one thread at a time
            if key not in self._models:
                self._models[key] = self._convert(batch.shape, pooling)
            names, request = self._models[key]
            outputs = request.infer([array], share_inputs=True)
            features = {name: outputs[n].copy() for n, name in enumerate(names)}
        is_huge = torch.linalg.vector_norm(batch.flatten(1), ord=inf, dim=1) > MAX_INPUT
        for name in self._wanted:
            features[name][is_huge.numpy()] = np.nan
        return {name: torch.from_numpy(features[name]) for name in self._wanted}

    def _convert(
        self, shape: Sequence[int], pooling: str | int
    ) -> tuple[list[str], Any]:
        """Return the names of the outputs, and a request that computes them."""
        is_large = pooling == "flatten"
        names = [
            name
            for name in self._segments
            if name in self._wanted
            or (not is_large and can_pool(self._layouts[name], pooling))
        ]
        named = {name: self._layouts[name] for name in names}
        network = _PooledNetwork(self._segments, named, pooling)
        example = torch.zeros(tuple(shape), dtype=torch.float32, device="cpu")
        try:
            model = convert_to_openvino(network, example)
        except EngineError as error:
            raise EngineError(
                "engine='openvino' cannot run; engine='torch' runs all networks. "
                f"{error}"
            ) from error
        model.reshape(list(shape))
        settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = openvino_core().compile_model(model, "CPU", settings)
        return names, compiled.create_infer_request()


class _PooledNetwork(nn.Module):
    """A network whose outputs are the features of the named segments."""

    def __init__(
        self,
        segments: Mapping[str, nn.Module],
        named: Mapping[str, Layout],
        pooling: str | int,
    ) -> None:
        super().__init__()
        self._segments = nn.ModuleList(segments.values())
        self._layouts = [named.get(name) for name in segments]
        self._pooling = pooling

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return the features, of copies that in-place operations do not change."""
        features = []
        for segment, layout in zip(self._segments, self._layouts, strict=True):
            batch = segment(batch)
            if layout is not None:
                features.append(pool(batch.clone(), self._pooling, layout))
        return tuple(features)


def convert_to_openvino(module: nn.Module, example: Tensor) -> Any:
    """Return the OpenVINO model of a module with one input."""
    from openvino.frontend import FrontEndManager, OpConversionFailure
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    global _process_of_openvino
    _process_of_openvino = os.getpid()
    # Not `openvino.convert_model`, which would ask for consent to telemetry.
    frontend = FrontEndManager().load_by_framework("pytorch")
    try:
        with (
            CONVERSIONS,
            torch.device("cpu"),  # not the user's default device
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")  # of torch.jit.trace, which they use
            decoder = TorchScriptPythonDecoder(module, example_input=(example,))
            return frontend.convert(frontend.load(decoder))
    except (RuntimeError, OpConversionFailure) as error:
        raise EngineError(
            f"OpenVINO cannot convert the network. {_summary(error)}"
        ) from error


def _summary(error: Exception) -> str:
    """Return the lines of OpenVINO's message that name what it cannot convert."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("-- ") and "aten::" in line]
    return " ".join(line.partition("with a message")[0] for line in named) or lines[0]


@cache
def openvino_core() -> Any:
    """Return the interface to OpenVINO's devices."""
    from openvino import Core

    return Core()

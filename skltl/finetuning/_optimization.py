"""Stages, optimizers and schedules of the learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from skltl.finetuning._network import SplitNetwork
from skltl.networks import uses_layer_norm

# Peak learning rates of head and backbone. The user guide has the sources and what was
# measured.
PEAK_LRS = {"sgd": (0.01, 0.01), "adamw": (1e-3, 1e-4)}

# One-cycle schedules vary the momentum, or beta1, which an optimizer must have.
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
}

# Families that were trained with AdamW, and are best fine-tuned with it. Other ones are
# those with layer normalization: transformers, ConvNeXt.
ADAMW_FAMILIES = ("efficientnet_v2", "timm:efficientnetv2", "timm:tf_efficientnetv2")


@dataclass(frozen=True)
class Stage:
    """One stage of training: ``"head"`` or ``"fine-tuning"``."""

    name: str
    n_epochs: int
    n_frozen: int  # blocks of the backbone, from the first one
    head_lr: float  # peak learning rates
    backbone_lr: float
    only_batch_norms: bool = False


def resolve_optimizer(estimator: Any) -> str:
    """Return the name of the optimizer; ``"auto"`` depends on the backbone."""
    if estimator.optimizer != "auto":
        return str(estimator.optimizer)
    is_adamw = estimator.backbone_.name.startswith(ADAMW_FAMILIES)
    blocks = estimator.network_.blocks.values()
    return "adamw" if is_adamw or uses_layer_norm(blocks) else "sgd"


def plan_stages(estimator: Any, n_blocks: int, n_frozen: int) -> list[Stage]:
    """Return the head stage and the fine-tuning stage, if they have epochs."""
    head_lr, backbone_lr = PEAK_LRS[resolve_optimizer(estimator)]
    if estimator.head_lr != "auto":
        head_lr = float(estimator.head_lr)
    if estimator.backbone_lr != "auto":
        backbone_lr = float(estimator.backbone_lr)
    lrs, only_batch_norms = (head_lr, backbone_lr), estimator.unfreeze == "batch_norm"
    stages = [Stage("head", estimator.head_epochs, n_blocks, *lrs)]
    if n_frozen < n_blocks:
        n_epochs = estimator.finetune_epochs
        stages += [Stage("fine-tuning", n_epochs, n_frozen, *lrs, only_batch_norms)]
    return [stage for stage in stages if stage.n_epochs > 0]


def build_optimizer(
    estimator: Any, network: SplitNetwork, stage: Stage, head_decay: float
) -> Optimizer:
    """Build the optimizer of all trainable parameters.

    One group for each group of blocks, with its learning rate, and kind of parameter:
    biases, norms, tokens and position embeddings have no weight decay. A head of one
    layer has at least `head_decay`.
    """
    parts: list[tuple[str, nn.Module, float]] = []
    parts += [("head_lr", network.head, stage.head_lr)]
    lr = stage.backbone_lr
    for blocks in reversed(network.trainable):
        parts += [("backbone_lr", blocks, lr)]
        lr *= estimator.backbone_lr_decay
    groups = []
    for name, part, lr in parts:
        trainable = [one for one in part.named_parameters() if one[1].requires_grad]
        kernels = [one for path, one in trainable if _is_kernel(path, one)]
        others = [one for path, one in trainable if not _is_kernel(path, one)]
        is_probe = part is network.head and network.has_linear_head
        least = head_decay if is_probe else 0.0
        of_kernels = max(estimator.weight_decay, least)
        for params, decay in ((kernels, of_kernels), (others, 0.0)):
            group = {"params": params, "name": name, "lr": lr, "weight_decay": decay}
            groups += [group] if params else []
    return OPTIMIZERS[resolve_optimizer(estimator)](groups)


def _is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is the matrix or kernel of a layer."""
    own_name = name.rpartition(".")[2]  # "original0" of a parametrized weight
    return parameter.ndim > 1 and ("weight" in own_name or "original" in own_name)


def build_schedule(optimizer: Optimizer, name: str, n_steps: int) -> LRScheduler:
    """Build the schedule of the learning rates over `n_steps` steps."""
    if name == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps=max(n_steps, 2) + 1
        )
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

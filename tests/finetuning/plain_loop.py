"""Fine-tuning as a plain loop of torch, in which nothing is stored."""

import copy

import numpy as np
import torch
from torch import nn

from skltl import Preprocessing
from skltl._random import derived_seed
from skltl.inference import load_prefix
from skltl.networks import get_backbone, resolve_layer, resolve_weights


def tiny_blocks(layer):
    backbone = get_backbone("tiny")
    block = resolve_layer(backbone, layer).block
    weights = resolve_weights(backbone, "pretrained")
    return load_prefix(backbone, weights, None, (32, 32), [block]).blocks


def plain_losses(
    X, targets, probe, loss, optimizer, head_lr, backbone_lr, head_decay=1e-4
):
    """Return the loss of three epochs of the head, and of two of block3 with it.

    `probe` is a pipeline of a scaler and a linear model, with which the head begins.
    The network runs from the pixels on in every step.
    """
    blocks = copy.deepcopy(dict(tiny_blocks("block3")))
    network = nn.Sequential(*blocks.values())
    batch = normalized(X)
    features = network(batch).mean(dim=(2, 3)).numpy()  # (n, 192)
    scaler, linear = probe.fit(features, targets)
    arrays = (
        np.atleast_2d(linear.coef_),
        linear.intercept_,
        scaler.mean_,
        scaler.scale_,
    )
    weight, bias, shift, scale = (
        torch.from_numpy(np.array(one)).float() for one in arrays
    )
    weight.requires_grad_()
    bias.requires_grad_()
    targets = torch.from_numpy(targets)

    losses = []
    for number, n_epochs in enumerate((3, 2)):
        groups = [
            {"params": [weight], "lr": head_lr, "weight_decay": head_decay},
            {"params": [bias], "lr": head_lr},
        ]
        if number == 1:
            unfrozen = [m for name, m in blocks.items() if name.startswith("block3")]
            trainable = [p.requires_grad_() for m in unfrozen for p in m.parameters()]
            matrices = [p for p in trainable if p.ndim > 1]
            vectors = [p for p in trainable if p.ndim == 1]
            groups.append({"params": matrices, "lr": backbone_lr, "weight_decay": 1e-4})
            groups.append({"params": vectors, "lr": backbone_lr})
        # By default, AdamW would decay vectors, too.
        stepper = optimizer(groups, weight_decay=0)
        everything = [p for group in stepper.param_groups for p in group["params"]]
        for epoch in range(n_epochs):
            seed = derived_seed(0, "epoch", number, epoch)
            order = np.random.default_rng(seed).permutation(70)
            total = 0.0
            # 23, 23 and 24: there is no batch of a single image.
            for some in (order[:23], order[23:46], order[46:]):
                found = network(batch[some]).mean(dim=(2, 3))
                outputs = (found - shift) / scale @ weight.T + bias
                value = loss(outputs, targets[some])
                stepper.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(everything, 1.0)
                stepper.step()
                total += value.item() * len(some)
            losses.append(total / 70)
    return losses


def normalized(X):
    """Return rows of 8 x 8 pixels as a normalized batch (n, 3, 32, 32)."""
    preprocessing = Preprocessing(32)
    pixels = [
        preprocessing.crop(np.repeat(row.reshape(8, 8, 1), 3, 2).astype(np.float32))
        for row in X
    ]
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - mean) / std

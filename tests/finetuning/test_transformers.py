"""Fine-tuning a vision transformer equals a plain loop, and uses what it knows."""

from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from small_vit import PATH, small_vit, small_vit_module
from tiny_classifier import losses, standardized_probe
from torch import nn
from torch.nn.functional import cross_entropy

from skltl import FineTunedCNNClassifier
from skltl._random import derived_seed

SMALL = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}
N_FOR_LOOP = 60
TRANSFORMERS = ("vit_b_32", "swin_t", "convnext_tiny", "efficientnet_v2_s")


def classifier(backbone, **parameters):
    options = {"pooling": "auto", "precision": "float32", **SMALL, **parameters}
    return FineTunedCNNClassifier(backbone, **options)


def batch_of(rows):
    """Return digits as the network sees them: resized to 32 x 32, normalized."""
    preprocessing = small_vit().preprocessing
    crops = [
        preprocessing.crop(np.repeat(row.reshape(8, 8, 1), 3, 2).astype(np.float32))
        for row in rows
    ]
    scaled = (np.stack(crops) - preprocessing.mean) / preprocessing.std
    return torch.tensor(scaled, dtype=torch.float32).permute(0, 3, 1, 2)


def class_tokens(network, batch):
    """Return what the network's own head uses."""
    tokens = network._process_input(batch)
    class_token = network.class_token.expand(len(tokens), -1, -1)
    return network.encoder(torch.cat([class_token, tokens], dim=1))[:, 0]


@pytest.mark.parametrize(
    ("optimizer", "make", "head_lr"),
    [
        ("sgd", partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.01),
        ("adamw", torch.optim.AdamW, 0.001),
    ],
)
def test_losses_are_those_of_a_plain_loop(optimizer, make, head_lr, digits):
    X, y = digits[0][:N_FOR_LOOP], digits[1][:N_FOR_LOOP]
    fitted = classifier(
        small_vit(),
        optimizer=optimizer,
        unfreeze=2,
        head_epochs=2,
        finetune_epochs=3,
        backbone_lr=head_lr / 10,
        schedule="constant",
        batch_size=20,
    ).fit(X, y)

    network, batch, targets = small_vit_module(), batch_of(X), torch.tensor(y)
    network.requires_grad_(False).eval()
    features = class_tokens(network, batch).numpy()
    weight, bias, shift, scale = standardized_probe(features, y)
    unfrozen = [network.get_submodule(PATH.format(n)) for n in (2, 3)]
    unfrozen.append(network.encoder.ln)
    expected = []
    for number, n_epochs in enumerate((2, 3)):
        groups = [
            {"params": [weight], "lr": head_lr, "weight_decay": 1e-4},
            {"params": [bias], "lr": head_lr},
        ]
        if number == 1:
            trained = [p.requires_grad_() for m in unfrozen for p in m.parameters()]
            for decay, some in (
                (1e-4, [p for p in trained if p.ndim > 1]),
                (0, [p for p in trained if p.ndim == 1]),
            ):
                group = {"params": some, "lr": head_lr / 10, "weight_decay": decay}
                groups.append(group)
        steps = make(groups, weight_decay=0)
        everything = [p for group in steps.param_groups for p in group["params"]]
        for epoch in range(n_epochs):
            seed = derived_seed(0, "epoch", number, epoch)
            order = np.random.default_rng(seed).permutation(N_FOR_LOOP)
            total = 0.0
            for some in order.reshape(-1, 20):
                found = class_tokens(network, batch[some])
                logits = (found - shift) / scale @ weight.T + bias
                loss = cross_entropy(logits, targets[some])
                steps.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(everything, 1.0)
                steps.step()
                total += loss.item() * 20
            expected.append(total / N_FOR_LOOP)

    assert_allclose(losses(fitted), expected, rtol=1e-4)


def test_frozen_blocks_keep_every_bit(digits):
    X, y = digits[0][:30], digits[1][:30]
    before = small_vit_module().state_dict()

    fitted = classifier(small_vit(), unfreeze=2, head_epochs=1, finetune_epochs=1).fit(
        X, y
    )

    changed = {
        key
        for block in fitted.network_.blocks.values()
        for key, value in block.state_dict().items()
        if not torch.equal(value, before[key])
    }
    trained = (PATH.format(2), PATH.format(3), "encoder.ln")
    assert changed
    assert all(key.startswith(trained) for key in changed)


@pytest.mark.parametrize(
    ("unfreeze", "first"), [(1, 3), (3, 1), ("block2", 1), ("block4", 3)]
)
def test_layers_are_unfrozen_by_block(unfreeze, first, digits):
    fitted = classifier(
        small_vit(), unfreeze=unfreeze, head_epochs=0, finetune_epochs=1
    ).fit(digits[0][:30], digits[1][:30])

    (stage,) = fitted.stages_
    names = list(fitted.network_.blocks)
    following = next(name for name in names if name.startswith(PATH.format(first)))
    assert stage.n_frozen == names.index(following)


@pytest.mark.parametrize(
    ("backbone", "head_lr"),
    [
        ("timm:test_vit", 0.001),
        ("timm:test_convnext", 0.001),
        ("timm:test_resnet", 0.01),
        ("tiny", 0.01),
        *(pytest.param(name, 0.001, marks=pytest.mark.slow) for name in TRANSFORMERS),
    ],
)
def test_the_optimizer_is_that_of_the_family(backbone, head_lr, digits):
    """AdamW has another learning rate than SGD."""
    fitted = FineTunedCNNClassifier(
        backbone,
        weights=None,
        unfreeze=None,
        head_epochs=1,
        **{**SMALL, "image_size": 64},
    ).fit(digits[0][:20], digits[1][:20])

    assert fitted.stages_[0].head_lr == head_lr


def pretrain(rows, labels):
    """Train the network in a loop of torch."""
    network, batch, targets = small_vit_module(), batch_of(rows), torch.tensor(labels)
    n_epochs, batch_size, lr = 12, 50, 2e-3
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    n_steps = n_epochs * (len(batch) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_steps)
    for _ in range(n_epochs):
        for some in torch.randperm(len(batch), generator=generator).split(batch_size):
            loss = cross_entropy(network(batch[some]), targets[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def test_fine_tuning_beats_training_from_scratch(digits):
    """On other images and classes (pairs of digits) than the network was trained on."""
    X, y = digits
    pretrained = small_vit(pretrain(X[:1000], y[:1000]))
    X, y = X[1000:], y[1000:] // 2
    few = slice(0, 40)
    tuned = classifier(pretrained, unfreeze=2, finetune_epochs=10)
    scratch = classifier(
        small_vit(), unfreeze="all", head_epochs=0, head_init="random",
        finetune_epochs=60, backbone_lr=0.002,
    )  # fmt: skip

    scores = [one.fit(X[few], y[few]).score(X[40:], y[40:]) for one in (tuned, scratch)]

    assert scores[0] > 0.65
    assert scores[0] > scores[1] + 0.2


def test_position_embeddings_and_tokens_are_not_decayed(digits):
    """With an enormous decay, all other matrices of the network vanish."""
    fitted = classifier(
        small_vit(), optimizer="adamw", weight_decay=1e4, backbone_lr=1e-5,
        head_epochs=0, finetune_epochs=10, schedule="constant", batch_size=30,
    ).fit(digits[0][:30], digits[1][:30])  # fmt: skip

    before, after = small_vit_module().state_dict(), {}
    for block in fitted.network_.blocks.values():
        after |= block.state_dict()
    for name in ("class_token", "encoder.pos_embedding", "encoder.ln.weight"):
        assert_allclose(after[name], before[name], atol=1e-3)
    matrix = f"{PATH.format(1)}.mlp.0.weight"
    assert after[matrix].abs().max() < 0.5 * before[matrix].abs().max()

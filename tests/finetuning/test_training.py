"""Fine-tuning equals a plain training loop, and costs what its trained layers cost."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from plain_loop import plain_losses, tiny_blocks
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_classifier import NETWORK, classifier, losses
from torch import nn
from torch.nn.functional import cross_entropy

import skltl
from skltl import CNNFeatureTransformer, FineTunedCNNClassifier, Preprocessing
from skltl._random import derived_seed
from skltl.exceptions import TrainingError, UnknownLayerError
from skltl.finetuning._network import SplitNetwork
from skltl.finetuning._optimization import OPTIMIZERS

# Default learning rate of the head, the same optimizer of torch, and a tolerance: AdamW
# divides small gradients by their size, and thereby magnifies rounding.
PLAIN_OPTIMIZERS = {
    "sgd": (0.01, partial(torch.optim.SGD, momentum=0.9, nesterov=True), 1e-4),
    "adamw": (0.001, torch.optim.AdamW, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_are_those_of_a_plain_loop_over_the_whole_network(name, digits):
    """Nothing is stored: the network runs from the pixels on in every step."""
    X, y = digits[0][:70], digits[1][:70]
    head_lr, plain_optimizer, rtol = PLAIN_OPTIMIZERS[name]
    backbone_lr = head_lr / 10
    fitted = classifier(
        optimizer=name, schedule="constant", batch_size=23, backbone_lr=backbone_lr
    ).fit(X, y)

    scaler, probe = StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    expected = plain_losses(
        *(X, y, make_pipeline(scaler, probe), cross_entropy),
        *(plain_optimizer, head_lr, backbone_lr),
    )
    assert_allclose(losses(fitted), expected, rtol=rtol)


def test_without_epochs_the_head_is_the_probe(digits):
    X, y = digits[0][:100], digits[1][:100]

    fitted = classifier(unfreeze=None, head_epochs=0).fit(X, y)

    transformer = CNNFeatureTransformer("tiny", **NETWORK, precision="float32")
    pipeline = make_pipeline(
        transformer, StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    ).fit(X, y)
    unseen = digits[0][200:250]
    assert_allclose(
        fitted.predict_proba(unseen), pipeline.predict_proba(unseen), atol=1e-4
    )
    assert_array_equal(fitted.transform(unseen), transformer.transform(unseen))


@pytest.mark.parametrize(
    ("unfreeze", "trained"),
    [
        (None, ()),
        (1, ("block3",)),
        (np.int64(2), ("block2", "block3")),
        ("block2", ("block2", "block3")),
        ("all", ("stem", "block1", "block2", "block3")),
    ],
)
def test_frozen_layers_keep_every_bit(unfreeze, trained, data):
    before = tiny_blocks("block3")

    short = {"head_epochs": 1, "finetune_epochs": 1, "image_size": 16}
    fitted = classifier(unfreeze=unfreeze, **short).fit(*data)

    for name, block in fitted.network_.blocks.items():
        old = before[name].state_dict()
        for key, value in block.state_dict().items():
            # The statistics of pretrained batch-norms are frozen in any case.
            is_parameter = key.endswith(("weight", "bias"))
            is_trained = name.startswith(trained) and is_parameter
            assert torch.equal(value, old[key]) != is_trained, (name, key)


def test_only_parameters_of_batch_norms_are_trained(data):
    before = tiny_blocks("block3")

    fitted = classifier(unfreeze="batch_norm", head_epochs=1, finetune_epochs=1).fit(
        *data
    )

    changed = {
        type(part).__name__
        for name, block in fitted.network_.blocks.items()
        for path, part in block.named_modules()
        for key, value in part.named_parameters(recurse=False)
        if not torch.equal(
            value, dict(before[name].named_modules())[path].get_parameter(key)
        )
    }
    assert changed == {"BatchNorm2d"}


@pytest.mark.parametrize(
    ("only_batch_norms", "keeps_statistics", "expected"),
    [
        (False, False, [True, True, True]),
        (False, True, [True, True, False]),
        (True, True, [False, False, False]),
    ],
)
def test_trained_layers_are_in_train_mode(only_batch_norms, keeps_statistics, expected):
    layers = [nn.Conv2d(3, 4, 1), nn.Dropout(), nn.BatchNorm2d(4, affine=False)]
    blocks = {str(number): layer for number, layer in enumerate(layers)}
    network = SplitNetwork(blocks, [list(blocks)], 0, nn.Sequential())

    network.unfreeze(only_batch_norms, keeps_statistics)
    network.train()

    assert [layer.training for layer in network.trainable[0]] == expected


def test_from_scratch_batch_norms_update_their_statistics(data):
    scratch = classifier(weights=None, unfreeze="all", head_epochs=0)

    fitted = scratch.fit(*data)

    statistics = fitted.network_.blocks["stem.1"].get_buffer("stem.1.running_mean")
    assert [record["stage"] for record in fitted.history_] == ["fine-tuning"] * 2
    assert not torch.equal(statistics, torch.zeros_like(statistics))


def test_frozen_blocks_run_once(data, monkeypatch):
    n_images = []
    features = skltl.inference.Runner.features

    def counted(self, pixels, *others):
        n_images.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.inference.Runner, "features", counted)
    classifier(head_epochs=6).fit(*data)

    assert sum(n_images) == 60


@pytest.mark.parametrize("unfreeze", [None, 1])
def test_with_a_cache_a_second_fit_runs_no_frozen_block(
    unfreeze, data, tmp_path, monkeypatch
):
    cached = classifier(unfreeze=unfreeze, cache=tmp_path)
    expected = losses(classifier(unfreeze=unfreeze).fit(*data))
    assert losses(cached.fit(*data)) == expected

    def refused(*_):
        raise AssertionError("a frozen block was run")

    monkeypatch.setattr(skltl.inference.Runner, "features", refused)

    assert losses(cached.fit(*data)) == expected
    assert losses(cached.set_params(head_lr=0.02).fit(*data)) != expected


def test_the_learning_rate_decays_towards_the_image(data):
    before = tiny_blocks("block3")

    fitted = classifier(
        unfreeze=2, backbone_lr=0.01, backbone_lr_decay=1e-12, weight_decay=0
    ).fit(*data)

    moved = dict.fromkeys(("block2", "block3"), 0.0)
    for name, block in fitted.network_.blocks.items():
        for key, value in block.named_parameters():
            part, change = name.split(".")[0], value - before[name].get_parameter(key)
            if part in moved:
                moved[part] = max(moved[part], change.abs().max().item())
    assert 0 <= moved["block2"] < 1e-6 < moved["block3"]


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_arrays_that_exceed_memory_give_the_same_bits(unfreeze, data, monkeypatch):
    small = classifier(unfreeze=unfreeze, image_size=16)
    expected = losses(small.fit(*data))

    monkeypatch.setattr("skltl._large_arrays.MAX_BYTES_IN_MEMORY", 0)

    assert losses(small.fit(*data)) == expected


def test_early_stopping_keeps_the_best_epoch(digits):
    X, y = digits[0][:200], digits[1][:200]

    fitted = classifier(
        head_init="random",
        head_epochs=60,
        finetune_epochs=0,
        early_stopping=True,
        patience=3,
        schedule="constant",
    ).fit(X, y)

    scores = [record["validation_score"] for record in fitted.history_]
    assert fitted.n_epochs_ == len(scores) < 60
    assert max(scores) == max(scores[:-3]) == fitted.best_validation_score_
    assert max(scores) > scores[0]


def test_a_stage_that_only_does_harm_is_discarded(digits):
    X, y = digits[0][:200], digits[1][:200]
    validation = {"early_stopping": True, "validation_fraction": 0.25}

    tuned = classifier(backbone_lr=30.0, schedule="constant", **validation).fit(X, y)

    assert tuned.history_[-1]["validation_score"] < 0.5
    assert tuned.score(digits[0][200:400], digits[1][200:400]) > 0.8


def test_a_divergent_loss_names_stage_epoch_and_learning_rate(data, fitted):
    diverging = copy.deepcopy(fitted).set_params(head_lr=1e30, schedule="constant")

    with pytest.raises(TrainingError, match=r"epoch \d of the head stage.* 1e\+30"):
        diverging.fit(*data)

    assert_array_equal(
        diverging.decision_function(data[0]), fitted.decision_function(data[0])
    )


def test_a_divergence_in_the_last_step_is_found(data):
    diverging = classifier(
        backbone_lr=1e30, schedule="constant", batch_size=100, finetune_epochs=1
    )

    with pytest.raises(TrainingError, match=r"epoch 1 of the fine-tuning .*1e\+30"):
        diverging.fit(*data)


def test_random_state_controls_all_randomness(data, fitted_hidden):
    before = torch.get_rng_state()

    again, other = (
        classifier(hidden_units=(8,), dropout=0.2, random_state=seed).fit(*data)
        for seed in (0, 1)
    )

    assert losses(again) == losses(fitted_hidden) != losses(other)
    assert_array_equal(
        again.decision_function(data[0]), fitted_hidden.decision_function(data[0])
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_stages_and_seeds_have_unrelated_orders():
    orders = {
        tuple(
            np.random.default_rng(derived_seed(seed, "epoch", *numbers)).integers(
                9, size=8
            )
        )
        for seed in range(4)
        for numbers in ((0, 0), (0, 1), (1, 0), (1, 1))
    }

    assert len(orders) == 16


def test_batch_norms_are_needed_to_unfreeze_batch_norms(data):
    blocks = {"stem": nn.Conv2d(3, 4, 3), "block1": nn.Conv2d(4, 5, 3)}
    own = skltl.Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))

    with pytest.raises(ValueError, match="'own' has no batch-norm up to layer"):
        FineTunedCNNClassifier(own, unfreeze="batch_norm", image_shape=(8, 8)).fit(
            *data
        )


@pytest.mark.parametrize("unfreeze", [5, 99])
def test_more_groups_than_there_are_cannot_be_unfrozen(unfreeze, data):
    with pytest.raises(ValueError, match=f"unfreeze={unfreeze}.* has 4 groups"):
        classifier(unfreeze=unfreeze).fit(*data)


def test_layers_after_the_head_cannot_be_unfrozen(data):
    with pytest.raises(UnknownLayerError, match="'block4' comes after layer 'block3'"):
        classifier(unfreeze="block4").fit(*data)


def test_steps_of_one_image_cannot_train_batch_norms_from_scratch(data):
    scratch = classifier(weights=None, unfreeze="all", batch_size=1)

    with pytest.raises(ValueError, match="need at least 2 images per step"):
        scratch.fit(*data)

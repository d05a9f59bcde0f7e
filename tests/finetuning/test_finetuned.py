"""Fine-tuning does what a loop by hand does, and pays only for what learns."""

import copy
import pickle

import joblib
import numpy as np
import pytest
import sklearn
import skops.io
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from tiny_classifier import classifier, losses
from torch.nn.functional import cross_entropy

import skltl
from skltl import CNNFeatureTransformer, FineTunedCNNClassifier, Preprocessing
from skltl._random import derived_seed
from skltl.exceptions import TrainingError, UnknownLayerError
from skltl.finetuning._training import Examples
from skltl.inference import load_prefix
from skltl.networks import get_backbone, resolve_layer, resolve_weights


def tiny_blocks(layer):
    backbone = get_backbone("tiny")
    block = resolve_layer(backbone, layer).block
    return load_prefix(
        backbone, resolve_weights(backbone, "imagenet"), None, [block]
    ).blocks


def standardised_probe(features, y):
    """Fit scikit-learn's scaler and classifier; return their numbers as tensors."""
    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(C=0.1, max_iter=1000)
    probe.fit(scaler.transform(features), y)
    numbers = (probe.coef_, probe.intercept_, scaler.mean_, scaler.scale_)
    weight, bias, shift, scale = (torch.from_numpy(one).float() for one in numbers)
    return weight.requires_grad_(), bias.requires_grad_(), shift, scale


def test_losses_are_those_of_a_loop_by_hand_over_the_whole_network(digits):
    """No cached prefix, no stages' machinery: the network runs from the pixels on."""
    X, y = digits[0][:70], digits[1][:70]
    fitted = classifier(schedule="constant", batch_size=23, backbone_lr=0.001).fit(X, y)

    blocks = copy.deepcopy(dict(tiny_blocks("block3")))
    network = torch.nn.Sequential(*blocks.values())
    preprocessing = Preprocessing(32)
    pixels = [
        preprocessing.crop(np.repeat(row.reshape(8, 8, 1), 3, 2).astype(np.float32))
        for row in X
    ]
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    batch = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - mean) / std
    features = network(batch).mean(dim=(2, 3))  # (n, 192)
    weight, bias, shift, scale = standardised_probe(features.numpy(), y)
    targets = torch.from_numpy(y)

    expected = []
    for number, n_epochs in enumerate((3, 2)):
        groups = [
            {"params": [weight], "lr": 0.01, "weight_decay": 1e-4},
            {"params": [bias], "lr": 0.01},
        ]
        if number == 1:
            tuned = [m for name, m in blocks.items() if name.startswith("block3")]
            learning = [p.requires_grad_() for m in tuned for p in m.parameters()]
            matrices = [p for p in learning if p.ndim > 1]
            vectors = [p for p in learning if p.ndim == 1]
            groups.append({"params": matrices, "lr": 0.001, "weight_decay": 1e-4})
            groups.append({"params": vectors, "lr": 0.001})
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        for epoch in range(n_epochs):
            seed = derived_seed(0, "epoch", number, epoch)
            order = np.random.default_rng(seed).permutation(70)
            total = 0.0
            # 23, 23 and 24: the last one is not left alone.
            for some in (order[:23], order[23:46], order[46:]):
                found = network(batch[some]).mean(dim=(2, 3))
                logits = (found - shift) / scale @ weight.T + bias
                loss = cross_entropy(logits, targets[some])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(everything, 1.0)
                optimizer.step()
                total += loss.item() * len(some)
            expected.append(total / 70)

    assert_allclose(losses(fitted), expected, rtol=1e-4)


def test_without_epochs_the_probe_is_scikit_learns_own(digits):
    X, y = digits[0][:200], digits[1][:200]

    fitted = classifier(unfreeze=None, head_epochs=0).fit(X, y)

    transformer = CNNFeatureTransformer(
        "tiny", layer="block3", image_shape=(8, 8), image_size=32, precision="float32"
    )
    pipeline = make_pipeline(
        transformer, StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    ).fit(X, y)
    unseen = digits[0][200:300]
    assert_allclose(
        fitted.predict_proba(unseen), pipeline.predict_proba(unseen), atol=1e-4
    )
    assert_array_equal(fitted.transform(unseen), transformer.transform(unseen))


@pytest.mark.parametrize(
    ("unfreeze", "learning"),
    [
        (None, ()),
        (1, ("block3",)),
        (2, ("block2", "block3")),
        ("block2", ("block2", "block3")),
        (4, ("stem", "block1", "block2", "block3")),
        ("all", ("stem", "block1", "block2", "block3")),
    ],
)
def test_what_is_frozen_keeps_every_bit(unfreeze, learning, digits):
    X, y = digits[0][:60], digits[1][:60]
    before = tiny_blocks("block3")

    fitted = classifier(unfreeze=unfreeze).fit(X, y)

    for name, block in fitted.network_.blocks.items():
        old = before[name].state_dict()
        for key, value in block.state_dict().items():
            # Statistics of batch-norms stay in any case; so does what never learns.
            is_fixed = not name.startswith(learning) or not key.endswith(
                ("weight", "bias")
            )
            assert torch.equal(value, old[key]) == is_fixed, (name, key)


def test_only_batch_norms_may_learn(digits):
    before = tiny_blocks("block3")

    fitted = classifier(unfreeze="batch_norm").fit(digits[0][:60], digits[1][:60])

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


def test_from_scratch_statistics_of_batch_norms_follow_the_images(digits):
    scratch = classifier(weights=None, unfreeze="all", head_epochs=0)

    fitted = scratch.fit(digits[0][:60], digits[1][:60])

    statistics = fitted.network_.blocks["stem.1"].running_mean
    assert [record["stage"] for record in fitted.history_] == ["fine-tuning"] * 2
    assert not torch.equal(statistics, torch.zeros_like(statistics))


def test_the_head_stage_runs_the_backbone_once(digits, monkeypatch):
    n_crossed = []
    features = skltl.inference.Runner.features

    def counted(self, pixels, *others):
        n_crossed.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.inference.Runner, "features", counted)
    classifier(head_epochs=20).fit(digits[0][1:61], digits[1][1:61])

    assert sum(n_crossed) == 60


@pytest.mark.parametrize("unfreeze", [None, 1])
def test_a_cache_makes_a_second_fit_run_no_frozen_block(
    unfreeze, digits, tmp_path, monkeypatch
):
    X, y = digits[0][1:61], digits[1][1:61]
    settings = {"unfreeze": unfreeze, "cache": tmp_path}
    expected = classifier(unfreeze=unfreeze).fit(X, y)
    classifier(**settings).fit(X, y)

    def refused(*_):
        raise AssertionError("a frozen block was run")

    monkeypatch.setattr(skltl.inference.Runner, "features", refused)
    found = classifier(**settings, head_lr=0.02).fit(X, y)
    again = classifier(**settings).fit(X, y)

    assert losses(again) == losses(expected) != losses(found)


def test_rates_may_fall_towards_the_image(digits):
    before = tiny_blocks("block3")

    fitted = classifier(
        unfreeze=2, backbone_lr=0.01, backbone_lr_decay=1e-12, weight_decay=0
    ).fit(digits[0][:60], digits[1][:60])

    moved = dict.fromkeys(("block2", "block3"), 0.0)
    for name, block in fitted.network_.blocks.items():
        for key, value in block.named_parameters():
            part, change = name.split(".")[0], value - before[name].get_parameter(key)
            if part in moved:
                moved[part] = max(moved[part], change.abs().max().item())
    assert 0 <= moved["block2"] < 1e-6 < moved["block3"]


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_what_does_not_fit_memory_lies_in_a_file(unfreeze, digits, monkeypatch):
    X, y = digits[0][:60], digits[1][:60]
    expected = classifier(unfreeze=unfreeze).fit(X, y)

    monkeypatch.setattr("skltl._large_arrays.MAX_BYTES_IN_MEMORY", 0)
    found = classifier(unfreeze=unfreeze).fit(X, y)

    assert losses(found) == losses(expected)


def test_new_layers_are_built_as_asked(digits):
    fitted = classifier(
        conv_channels=(16,), hidden_units=(12, 8), dropout=0.1, pooling="avgmax"
    ).fit(digits[0][:60], digits[1][:60])

    kinds = [type(layer).__name__ for layer in fitted.head_]
    assert kinds == [
        *("Conv2d", "ReLU", "Pool", "Standardise", "Linear", "ReLU", "Dropout"),
        *("Linear", "ReLU", "Dropout", "Linear"),
    ]
    assert fitted.predict_proba(digits[0][:5]).shape == (5, 10)
    assert fitted.transform(digits[0][:5]).shape == (5, 2 * 192)


def test_strings_are_classes_too(digits):
    X, y = digits[0][:100], np.array([f"digit {n}" for n in digits[1][:100]])

    fitted = classifier().fit(X, y)

    assert fitted.classes_.dtype == y.dtype
    assert set(fitted.predict(X)) <= set(y)
    assert_allclose(fitted.predict_proba(X).sum(axis=1), 1)
    assert fitted.score(X, y) > 0.9


def test_balanced_weights_find_more_of_a_rare_class(digits):
    is_rare = digits[1] == 8
    X = np.concatenate([digits[0][~is_rare][:300], digits[0][is_rare][:5]])
    y = np.arange(305) >= 300
    unseen = digits[0][is_rare][50:]
    settings = {"head_init": "random", "unfreeze": None, "head_epochs": 10}

    found = [
        classifier(class_weight=weight, **settings).fit(X, y).predict(unseen).mean()
        for weight in (None, "balanced")
    ]

    assert found[1] > found[0] + 0.1


def test_two_classes_have_one_decision(digits):
    X, y = digits[0][:60], digits[1][:60] > 4

    fitted = classifier().fit(X, y)

    decision, proba = fitted.decision_function(X), fitted.predict_proba(X)
    assert decision.shape == (60,)
    assert_allclose(1 / (1 + np.exp(-decision)), proba[:, 1])


def test_randomness_is_an_argument(digits):
    X, y = digits[0][:60], digits[1][:60]
    before = torch.get_rng_state()

    first, again, other = (
        classifier(dropout=0.2, random_state=seed).fit(X, y) for seed in (0, 0, 1)
    )

    assert losses(first) == losses(again)
    assert losses(first) != losses(other)
    assert_array_equal(first.decision_function(X), again.decision_function(X))
    assert torch.equal(torch.get_rng_state(), before)


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
    assert max(scores) == max(scores[:-3])
    assert max(scores) > scores[0]


@pytest.fixture
def held_out(monkeypatch):
    """Note which images each fit holds out."""
    noted = []

    def noting(*parts):
        noted.append(parts[-1])
        return Examples(*parts)

    monkeypatch.setattr("skltl.finetuning._fitting.Examples", noting)
    return noted


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.75])
def test_groups_are_held_out_as_a_whole(share, digits, held_out):
    X, y = digits[0][:200], digits[1][:200]
    groups = np.array([f"patient {n // 5}" for n in range(200)])

    classifier(validation_fraction=share, head_epochs=1, finetune_epochs=0).fit(
        X, y, groups=groups
    )

    is_held_out = np.isin(np.arange(200), held_out[0])
    assert not set(groups[~is_held_out]) & set(groups[is_held_out])
    assert is_held_out.mean() == pytest.approx(share, abs=0.06)
    assert set(y[~is_held_out]) == set(y)


def test_of_each_class_the_same_share_is_held_out(digits, held_out):
    X, y = digits[0][:200], np.repeat([0, 1], [160, 40])

    classifier(early_stopping=True, head_epochs=1, finetune_epochs=0).fit(X, y)

    assert np.bincount(y[held_out[0]]).tolist() == [16, 4]


def test_too_few_images_to_hold_some_out_are_told(digits):
    X, y = digits[0][:20], digits[1][:20]

    with pytest.raises(ValueError, match=r"validation_fraction=0.9 cannot .* 20 pict"):
        classifier(validation_fraction=0.9).fit(X, y)
    with pytest.raises(ValueError, match="groups: there are 1 of them"):
        classifier(early_stopping=True).fit(X, y, groups=np.zeros(20))
    with pytest.raises(ValueError, match="must not be the classes themselves"):
        classifier(early_stopping=True).fit(X, y, groups=y)


def test_groups_reach_the_fit_in_cross_validation(digits):
    X, y = digits[0][:120], digits[1][:120]
    groups = np.arange(120) // 4
    with sklearn.config_context(enable_metadata_routing=True):
        patient = classifier(validation_fraction=0.5).set_fit_request(groups=True)

        found = cross_validate(
            patient, X, y, cv=GroupKFold(2), params={"groups": groups}
        )

    assert (found["test_score"] > 0.5).all()
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier().fit(X, y, groups=groups[:9])


def test_a_loss_that_is_no_number_names_stage_epoch_and_rate(digits):
    X, y = digits[0][:60], digits[1][:60]
    fitted = classifier().fit(X, y)
    expected = fitted.decision_function(X)

    fitted.set_params(head_lr=1e30, schedule="constant")
    with pytest.raises(TrainingError, match=r"epoch \d of the head stage.* 1e\+30"):
        fitted.fit(X, y)

    fitted.set_params(head_lr="auto")
    assert_array_equal(fitted.decision_function(X), expected)


@pytest.mark.parametrize(
    "saved",
    [
        lambda fitted, folder: pickle.loads(pickle.dumps(fitted)),
        lambda fitted, folder: joblib.load(joblib.dump(fitted, folder / "file")[0]),
        lambda fitted, folder: skops.io.loads(
            skops.io.dumps(fitted), trusted=skltl.SKOPS_TRUSTED
        ),
        lambda fitted, folder: copy.deepcopy(fitted),
    ],
    ids=["pickle", "joblib", "skops", "deepcopy"],
)
def test_a_saved_classifier_is_the_same(saved, digits, tmp_path):
    X, y = digits[0][:60], digits[1][:60]
    fitted = classifier(hidden_units=(8,)).fit(X, y)

    loaded = saved(fitted, tmp_path)

    assert_array_equal(loaded.decision_function(X), fitted.decision_function(X))
    assert loaded.history_ == fitted.history_
    assert loaded.stages_ == fitted.stages_


def test_a_saved_classifier_holds_no_optimizer(digits):
    fitted = classifier().fit(digits[0][:60], digits[1][:60])
    numbers = [
        *(
            value
            for block in fitted.network_.blocks.values()
            for value in block.state_dict().values()
        ),
        *fitted.head_.state_dict().values(),
    ]

    n_bytes = len(pickle.dumps(fitted))

    assert (
        n_bytes < sum(value.numel() * value.element_size() for value in numbers) + 2e4
    )


def test_searches_and_pipelines(digits):
    X, y = digits[0][:90], digits[1][:90]
    pipeline = make_pipeline(FunctionTransformer(), classifier(head_epochs=1))
    grid = {"finetunedcnnclassifier__unfreeze": [None, 1]}

    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(X, y)

    assert search.best_score_ > 0.5
    assert cross_val_score(clone(pipeline), X, y, cv=2, n_jobs=2).shape == (2,)


def test_images_and_labels_that_do_not_fit_are_refused(digits):
    X, y = digits[0][:10], digits[1][:10].astype(object)

    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier().fit(X, y[:5])
    with pytest.raises(ValueError, match="NaN or None"):
        classifier().fit(X, [*y[:9], None])
    with pytest.raises(ValueError, match="continuous"):
        classifier().fit(X, np.linspace(0, 1, 10))
    with pytest.raises(ValueError, match="at least one non-zero"):
        classifier().fit(X, y.astype(int), sample_weight=np.zeros(10))
    with pytest.raises(ValueError, match="[Nn]egative"):
        classifier().fit(X, y.astype(int), sample_weight=-np.ones(10))
    with pytest.raises(ValueError, match="nothing to learn from"):
        classifier(class_weight=dict.fromkeys(range(10), 0)).fit(X, y.astype(int))
    with pytest.raises(UnknownLayerError, match="'block4' lies behind the cut"):
        classifier(unfreeze="block4").fit(X, y.astype(int))
    with pytest.raises(NotFittedError):
        classifier().predict(X)


@pytest.mark.parametrize("kind", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_a_pipeline_is_where_fine_tuning_can_begin(kind, n_classes, digits):
    chosen = digits[1] < n_classes
    X, y = digits[0][chosen][:80], digits[1][chosen][:80]
    pipeline = skltl.make_feature_pipeline(
        "tiny", kind, layer="block3", image_shape=(8, 8), image_size=32
    ).fit(X, y)

    made = FineTunedCNNClassifier.from_pipeline(pipeline, unfreeze=1, random_state=0)

    assert_allclose(made.decision_function(X), pipeline.decision_function(X), atol=2e-4)
    assert_array_equal(made.predict(X), pipeline.predict(X))
    before = made.decision_function(X)
    made.set_params(finetune_epochs=2, backbone_lr=0.001).fit(X, y)
    assert [record["stage"] for record in made.history_] == ["fine-tuning"] * 2
    assert not np.array_equal(made.decision_function(X), before)
    after = made.decision_function(X)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.95


def test_pipelines_of_something_else_are_refused(digits):
    X, y = digits[0][:30], digits[1][:30]
    transformer = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=32)
    forest = make_pipeline(transformer, DecisionTreeClassifier()).fit(X, y)
    several = make_pipeline(
        clone(transformer).set_params(layer=["stem", "block1"]), LogisticRegression()
    ).fit(X, y)
    other = make_pipeline(transformer, MinMaxScaler(), LogisticRegression()).fit(X, y)

    with pytest.raises(ValueError, match="DecisionTreeClassifier is not a linear"):
        FineTunedCNNClassifier.from_pipeline(forest)
    with pytest.raises(ValueError, match="2 layers, stem, block1"):
        FineTunedCNNClassifier.from_pipeline(several)
    with pytest.raises(ValueError, match="it is CNNFeatureTransformer, MinMaxScaler"):
        FineTunedCNNClassifier.from_pipeline(other)


def test_a_tuned_network_becomes_a_transformer(digits):
    X, y = digits[0][:60], digits[1][:60]
    fitted = classifier().fit(X, y)

    transformer = fitted.to_transformer()

    assert_array_equal(transformer.transform(X), fitted.transform(X))
    assert_array_equal(
        transformer.get_feature_names_out(), fitted.get_feature_names_out()
    )
    loaded = pickle.loads(pickle.dumps(transformer))
    assert_array_equal(loaded.transform(X), fitted.transform(X))


def test_a_tuned_transformer_stays_tuned_when_it_is_cloned_or_fitted(digits):
    X, y = digits[0][:60], digits[1][:60]
    fitted = classifier().fit(X, y)
    expected = fitted.transform(X)
    pretrained = CNNFeatureTransformer(
        "tiny", layer="block3", image_shape=(8, 8), image_size=32, precision="float32"
    ).fit_transform(X)

    pipeline = make_pipeline(fitted.to_transformer(), LogisticRegression()).fit(X, y)

    assert np.abs(expected - pretrained).max() > 0.01
    assert_array_equal(pipeline[0].transform(X), expected)
    assert_array_equal(clone(fitted.to_transformer()).fit_transform(X), expected)
    earlier = clone(fitted.to_transformer()).set_params(layer="block1")
    by_hand = classifier(layer="block1", unfreeze=None, finetune_epochs=0).fit(X, y)
    assert_array_equal(earlier.fit_transform(X), by_hand.transform(X))  # was frozen


def test_a_classifier_from_a_pipeline_begins_there_when_it_is_cloned(digits):
    X, y = digits[0][:80], digits[1][:80]
    pipeline = skltl.make_feature_pipeline(
        "tiny", "softmax", layer="block3", image_shape=(8, 8), image_size=32
    ).fit(X, y)
    pipeline[-1].coef_ *= -1  # a head that no probe would find
    settings = {"unfreeze": 1, "random_state": 0, "finetune_epochs": 0}
    made = FineTunedCNNClassifier.from_pipeline(pipeline, **settings)

    again = clone(made).fit(X, y)

    assert_allclose(
        again.decision_function(X), pipeline.decision_function(X), atol=2e-4
    )
    assert_array_equal(made.fit(X, y).decision_function(X), again.decision_function(X))
    with pytest.raises(ValueError, match="head_init: the classes are"):
        clone(made).fit(X, y % 2)
    with pytest.raises(ValueError, match="is another head than pooling"):
        clone(made).set_params(hidden_units=(5,)).fit(X, y)


def set_another_network(pipeline, X, y):
    pipeline.set_params(feat__pooling="max", feat__layer="stem", feat__image_size=64)


def set_other_weights(pipeline, X, y):
    pipeline.set_params(feat__weights=None)


def fit_again(pipeline, X, y):
    pipeline.fit(X[::-1], y)


@pytest.mark.parametrize(
    ("change", "comes_first"),
    [(set_another_network, True), (set_other_weights, True), (fit_again, False)],
)
def test_a_pipeline_counts_as_it_was_fitted(change, comes_first, digits):
    X, y = digits[0][:60], digits[1][:60]
    pipeline = skltl.make_feature_pipeline(
        "tiny", "softmax", layer="block3", image_shape=(8, 8), image_size=32
    ).fit(X, y)
    expected = pipeline.decision_function(X)
    if comes_first:
        change(pipeline, X, y)

    made = FineTunedCNNClassifier.from_pipeline(pipeline, finetune_epochs=0)

    if not comes_first:
        change(pipeline, X, y)
    assert_allclose(made.decision_function(X), expected, atol=2e-4)
    again = clone(made).set_params(random_state=0).fit(X, y)
    assert_allclose(again.decision_function(X), expected, atol=2e-4)


@pytest.mark.parametrize("seeds", [(0, None), (None, 0), (None, None), (3, 3)], ids=str)
def test_a_pipeline_on_random_weights_is_where_its_clones_begin(seeds, digits):
    X, y = digits[0][:60], digits[1][:60]
    of_transformer, of_classifier = seeds
    pipeline = skltl.make_feature_pipeline(
        "tiny", "softmax", weights=None, random_state=of_transformer,
        layer="block3", image_shape=(8, 8), image_size=32,
    ).fit(X, y)  # fmt: skip
    expected = pipeline.decision_function(X)

    made = FineTunedCNNClassifier.from_pipeline(
        pipeline, finetune_epochs=0, random_state=of_classifier
    )

    for again in (made, clone(made).fit(X, y), pickle.loads(pickle.dumps(made))):
        assert_allclose(again.decision_function(X), expected, atol=2e-4)


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


def test_batch_norms_are_needed_to_unfreeze_batch_norms(digits):
    X, y = digits[0][:20], digits[1][:20]
    blocks = {"stem": torch.nn.Conv2d(3, 4, 3), "block1": torch.nn.Conv2d(4, 5, 3)}
    own = skltl.Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))

    with pytest.raises(ValueError, match="'own' has no batch-norm up to the layer"):
        FineTunedCNNClassifier(own, unfreeze="batch_norm", image_shape=(8, 8)).fit(X, y)


@pytest.mark.parametrize("unfreeze", [5, 99])
def test_more_parts_than_there_are_cannot_be_unfrozen(unfreeze, digits):
    X, y = digits[0][:20], digits[1][:20]

    with pytest.raises(ValueError, match=f"unfreeze={unfreeze}.* has 4 parts"):
        classifier(unfreeze=unfreeze).fit(X, y)


def test_convolutions_need_a_map(digits):
    X, y = digits[0][:20], digits[1][:20]
    blocks = {
        "stem": torch.nn.Conv2d(3, 4, 3),
        "fc": torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
    }
    own = skltl.Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    made = FineTunedCNNClassifier(
        own, layer="fc", conv_channels=(4,), image_shape=(8, 8)
    )

    with pytest.raises(ValueError, match="layer 'fc' gives a vector of 4 numbers"):
        made.fit(X, y)


def test_steps_of_one_image_cannot_train_batch_norms_from_scratch(digits):
    X, y = digits[0][:20], digits[1][:20]
    made = classifier(weights=None, unfreeze="all", batch_size=1)

    with pytest.raises(ValueError, match="need at least 2 images in a step"):
        made.fit(X, y)


@pytest.mark.parametrize("scale", [1e308, 1e-300])
def test_only_ratios_of_weights_count(scale, digits):
    X, y = digits[0][:20], digits[1][:20]
    weights = np.linspace(0.1, 1, 20)

    expected = classifier().fit(X, y, sample_weight=weights)
    fitted = classifier().fit(X, y, sample_weight=scale * weights)

    assert_allclose(losses(fitted), losses(expected), rtol=1e-4)


def test_a_head_with_an_unknown_layer_is_not_saved_as_another(digits):
    X, y = digits[0][:20], digits[1][:20]
    fitted = classifier(hidden_units=(5,)).fit(X, y)
    fitted.head_[3] = torch.nn.GELU()

    with pytest.raises(TypeError, match="A head with a GELU cannot be saved"):
        pickle.dumps(fitted)


def test_a_warm_start_goes_on_where_the_fit_before_ended(digits):
    X, y = digits[0][:60], digits[1][:60]
    warm = classifier(warm_start=True, schedule="constant").fit(X, y)
    last = losses(warm)[-1]

    warm.set_params(head_epochs=0).fit(X, y)

    assert losses(warm)[-1] < last
    with pytest.raises(ValueError, match="warm_start=True: the classes are"):
        warm.fit(X, y % 2)

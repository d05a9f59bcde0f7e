"""Identity of networks: no name, file or backbone is mistaken for another one."""

import dataclasses
import gc
import os
import pickle
import shutil
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file, save_file
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    list_layers,
    register_backbone,
    release_memory,
)
from skltl.exceptions import WeightsError
from skltl.inference import _frozen
from skltl.networks import Model, PretrainedWeights, get_backbone, state_of


def two_blocks(activation=nn.ReLU, width=6, head=None):
    torch.manual_seed(0)
    blocks = {
        "stem": nn.Sequential(nn.Conv2d(3, width, 3, stride=2), activation()),
        "block1": nn.Sequential(nn.Conv2d(width, 9, 3, stride=2), nn.ReLU()),
    }
    return Backbone.from_blocks("mine", blocks, head, preprocessing=Preprocessing(24))


@pytest.fixture
def registry(monkeypatch):
    """Start without registered backbones, and leave none behind."""
    monkeypatch.setattr("skltl.networks._registry._REGISTERED", {})


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: two_blocks(nn.Sigmoid), "was a ReLU, .* is a Sigmoid"),
        (lambda: two_blocks(lambda: nn.LeakyReLU(0.5)), "is a LeakyReLU"),
        (lambda: two_blocks(width=7), "out_channels of 'stem.0' was 6, and is 7"),
    ],
    ids=["another layer", "a subclass", "another width"],
)
def test_a_pickle_by_name_is_not_loaded_into_another_network(
    registry, images, other, difference
):
    register_backbone(two_blocks())
    saved = pickle.dumps(CNNFeatureTransformer("mine").fit(images))
    register_backbone(other(), replace=True)

    with pytest.raises(WeightsError, match=difference):
        pickle.loads(saved)


def test_a_pickle_by_name_notices_settings_that_change_no_shape(registry, images):
    register_backbone(two_blocks(lambda: nn.LeakyReLU(0.1)))
    saved = pickle.dumps(CNNFeatureTransformer("mine").fit(images))
    register_backbone(two_blocks(lambda: nn.LeakyReLU(0.5)), replace=True)

    with pytest.raises(WeightsError, match=r"negative_slope .* was 0.1, and is 0.5"):
        pickle.loads(saved)


def test_a_new_setting_of_another_torch_version_is_accepted(registry, images):
    register_backbone(two_blocks())
    fitted = CNNFeatureTransformer("mine").fit(images)
    state = fitted.__getstate__()
    del state["network_"]["structure"]["layers"][0][2]["padding_mode"]

    with pytest.raises(WeightsError, match="padding_mode"):
        CNNFeatureTransformer().__setstate__(state)
    state["network_"]["versions"]["torch"] = "1.0"
    loaded = CNNFeatureTransformer()
    loaded.__setstate__(state)

    assert_array_equal(loaded.transform(images), fitted.transform(images))


def test_a_pickle_of_another_format_is_refused(images):
    state = CNNFeatureTransformer("tiny").fit(images).__getstate__()
    state["_versions"]["skltl"] = "9.9"

    with pytest.raises(ValueError, match="saved by skltl 9.9 .*fit it again"):
        CNNFeatureTransformer().__setstate__({**state, "_format": None})
    CNNFeatureTransformer().__setstate__(state)  # a mere version is no obstacle


def test_a_backbone_made_with_replace_is_another_one(images):
    mine = two_blocks()
    sigmoid = dataclasses.replace(mine, build=two_blocks(nn.Sigmoid).build)

    features = CNNFeatureTransformer(mine, layer="stem").fit_transform(images)
    others = CNNFeatureTransformer(sigmoid, layer="stem").fit_transform(images)

    assert mine != sigmoid
    expected = CNNFeatureTransformer(two_blocks(nn.Sigmoid), layer="stem")
    assert_allclose(others, expected.fit_transform(images), rtol=1e-6)
    assert np.abs(others - features).max() > 0.1


def test_a_copy_of_a_backbone_equals_it():
    mine = two_blocks()

    assert pickle.loads(pickle.dumps(mine)) == mine
    assert get_backbone("alexnet") == pickle.loads(
        pickle.dumps(get_backbone("alexnet"))
    )


def test_weights_of_an_own_backbone_are_saved_once(images):
    wide = Backbone.from_blocks(
        "wide",
        {"stem": nn.Conv2d(3, 256, 3), "block1": nn.Conv2d(256, 256, 3)},
        preprocessing=Preprocessing(16),
    )
    n_bytes = sum(one.nbytes for one in wide.own_network.state().values())
    fitted = CNNFeatureTransformer(wide).fit(images)

    saved = pickle.dumps(fitted)

    assert len(saved) < 1.1 * n_bytes
    assert_array_equal(pickle.loads(saved).transform(images), fitted.transform(images))


def test_other_weights_of_an_own_backbone_are_saved_with_it(images, tmp_path):
    mine = two_blocks()
    state = {key: value + 0.25 for key, value in mine.own_network.state().items()}
    save_file(state, tmp_path / "other.safetensors")
    fitted = CNNFeatureTransformer(mine, weights=tmp_path / "other.safetensors")
    expected = fitted.fit_transform(images)

    assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(images), expected)


def test_a_replaced_weights_file_is_loaded_again(images, tmp_path):
    path = tmp_path / "weights.safetensors"
    mine = two_blocks()
    state = mine.own_network.state()
    transformer = CNNFeatureTransformer(mine, weights=path)
    save_file(state, path)
    before = transformer.fit_transform(images)
    stat = path.stat()
    save_file({key: value * 2 for key, value in state.items()}, tmp_path / "other")
    shutil.copyfile(tmp_path / "other", path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = transformer.fit_transform(images)

    expected = CNNFeatureTransformer(mine, weights=tmp_path / "other.safetensors")
    (tmp_path / "other").rename(tmp_path / "other.safetensors")
    assert_array_equal(after, expected.fit_transform(images))
    assert np.abs(after - before).max() > 0.1


def use_everywhere(backbone, images):
    """Let each kind of estimator load, prepare and inspect a backbone."""
    labels = np.arange(len(images)) % 2
    CNNFeatureTransformer(backbone, layer=["stem", "block1"]).fit_transform(images)
    CNNFeatureTransformer(backbone, weights=None, random_state=0).fit_transform(images)
    PretrainedCNNClassifier(backbone).fit(images).predict(images)
    FineTunedCNNClassifier(backbone, head_epochs=1, finetune_epochs=1).fit(
        images, labels
    ).predict(images)
    StrategyAdvisor(CNNFeatureTransformer(backbone), cv=2).fit(images, labels)


def test_a_deleted_backbone_is_freed_with_its_weights(images):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3))
    backbone = two_blocks(head=head)
    weight = next(iter(backbone.own_network.state().values()))
    deleted = [weakref.ref(backbone), weakref.ref(weight)]
    token = backbone.token

    use_everywhere(backbone, images)
    del backbone, weight
    gc.collect()

    assert [one() for one in deleted] == [None, None]
    for memory in (_frozen._networks, _frozen._prefixes, _frozen._wholes):
        assert all(key[0] != token for key in memory)


def test_many_own_backbones_leave_nothing_in_memory():
    images = np.zeros((2, 16, 16, 3), np.uint8)
    for _ in range(8):  # more than any cache keeps
        backbone = Backbone.from_blocks(
            "m",
            {"s": nn.Conv2d(3, 64, 3, stride=2), "t": nn.Conv2d(64, 64, 3)},
            preprocessing=Preprocessing(16),
        )
        CNNFeatureTransformer(backbone).fit_transform(images)
    del backbone
    gc.collect()

    alive = [one for one in gc.get_objects() if type(one) is Backbone]
    assert [one for one in alive if one.name == "m"] == []


def test_an_own_backbone_is_in_memory_once_until_it_runs():
    backbone = two_blocks()

    fitted = CNNFeatureTransformer(backbone).fit(np.zeros((1, 24, 24, 3), np.uint8))

    own = backbone.own_network.state()["stem.0.weight"]
    used = fitted.network_.blocks["stem.0"].get_parameter("stem.0.weight")
    assert used.data_ptr() == own.data_ptr()


def test_unseeded_random_networks_are_not_kept(images):
    release_memory()
    labels = np.arange(len(images)) % 2
    for _ in range(3):
        FineTunedCNNClassifier(
            "tiny", weights=None, image_size=32, head_epochs=1, finetune_epochs=0
        ).fit(images, labels)

    assert not _frozen._networks
    assert not _frozen._prefixes


def runners_of(fitted):
    return fitted.network_._runners.values()


def test_the_number_of_networks_kept_is_bounded(images):
    release_memory()
    n_before = len(_frozen._held_prefixes)  # of estimators of other tests
    for layer in ["stem", "block1", "block2", "block3", "block4"]:
        fitted = CNNFeatureTransformer("tiny", layer=layer).fit(images)
        fitted.transform(images)
    del fitted
    gc.collect()

    assert len(_frozen._prefixes) == 2
    assert len(_frozen._held_prefixes) <= n_before + 2


def test_each_estimator_keeps_its_prepared_network(images):
    layers = ["stem", "block1", "block2", "block3", "block4"]
    fitted = [CNNFeatureTransformer("tiny", layer=one).fit(images) for one in layers]
    for one in fitted:
        one.transform(images)
    before = [list(runners_of(one)) for one in fitted]

    for one in fitted:
        one.transform(images)

    assert [list(runners_of(one)) for one in fitted] == before


def test_release_memory_frees_prepared_networks(images):
    fitted = CNNFeatureTransformer("tiny").fit(images)
    expected = fitted.transform(images)
    runner = weakref.ref(next(iter(runners_of(fitted))))

    release_memory()
    gc.collect()

    assert runner() is None
    assert not _frozen._prefixes
    assert_array_equal(fitted.transform(images), expected)


def test_a_deleted_estimator_frees_its_prepared_network(images):
    random = CNNFeatureTransformer("tiny", weights=None).fit(images)
    random.transform(images)
    runner = weakref.ref(next(iter(runners_of(random))))

    del random
    gc.collect()

    assert runner() is None


def test_a_module_that_modifies_itself_is_saved_unmodified(registry, images):
    class Recording(nn.Conv2d):
        def forward(self, batch):
            self.last_shape = batch.shape
            return super().forward(batch)

    blocks = {"stem": Recording(3, 4, 3)}
    own = Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    list_layers(own)

    CNNFeatureTransformer(own).fit_transform(images)

    stem = own.own_network.module.get_submodule("stem")
    assert not hasattr(stem, "last_shape")


def head(activation):
    torch.manual_seed(0)
    layers = (nn.Linear(9, 5), activation(), nn.Linear(5, 3))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def test_a_pickle_by_name_is_not_loaded_into_another_head(registry, images):
    register_backbone(two_blocks(head=head(nn.ReLU)))
    fitted = PretrainedCNNClassifier("mine").fit(images)
    saved = pickle.dumps(fitted)
    loaded = pickle.loads(saved)
    assert_array_equal(loaded.predict_proba(images), fitted.predict_proba(images))
    register_backbone(two_blocks(head=head(nn.Sigmoid)), replace=True)

    with pytest.raises(WeightsError, match="another network here"):
        pickle.loads(saved)


ACTIVATION = {0: nn.ReLU}


def build(n_classes, image_size):
    torch.manual_seed(0)
    layers = OrderedDict(stem=nn.Conv2d(3, 4, 3), act=ACTIVATION[0]())
    return Model(nn.Sequential(layers), {"stem": "act"})


def test_a_pickle_is_not_loaded_if_the_builder_builds_another_network(
    images, monkeypatch
):
    weights = (PretrainedWeights("own", None, Preprocessing(16)),)
    backbone = Backbone("built", build, Preprocessing(16), weights)
    fitted = CNNFeatureTransformer(backbone).fit(images)
    saved = pickle.dumps(fitted)
    assert_array_equal(pickle.loads(saved).transform(images), fitted.transform(images))
    monkeypatch.setitem(ACTIVATION, 0, nn.Sigmoid)

    with pytest.raises(WeightsError, match="'act' was a ReLU, .* is a Sigmoid"):
        pickle.loads(saved)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("name", ["model", "stem"])
def test_prefixes_of_wrappers_are_removed_unless_they_are_blocks(
    wrapper, name, images, tmp_path
):
    blocks = {name: nn.Conv2d(3, 4, 3)}
    own = Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    state = {f"{wrapper}{key}": 2 * one for key, one in own.own_network.state().items()}
    save_file(state, tmp_path / "w.safetensors")

    found = CNNFeatureTransformer(own, weights=tmp_path / "w.safetensors")

    expected = 2 * CNNFeatureTransformer(own).fit_transform(images)
    assert_allclose(found.fit_transform(images), expected, rtol=1e-5, atol=1e-5)


def test_loaded_weights_equal_those_of_the_file(tmp_path):
    mine = two_blocks()
    state = {key: value + 1 for key, value in mine.own_network.state().items()}
    save_file(state, tmp_path / "w.safetensors")

    fitted = CNNFeatureTransformer(mine, weights=tmp_path / "w.safetensors").fit(
        np.zeros((1, 24, 24, 3), np.uint8)
    )

    saved = load_file(tmp_path / "w.safetensors")
    loaded = state_of(fitted.network_.blocks.values())
    assert loaded.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(loaded[key], value)

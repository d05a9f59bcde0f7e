"""Augmented views: what they are, what they cost, and that they are reproducible."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.base import clone
from tiny_classifier import classifier, losses
from torchvision.transforms import v2

import skltl
from skltl import Preprocessing, adapt_channels
from skltl.exceptions import (
    ImageRangeWarning,
    NonFiniteFeaturesError,
    PersistenceWarning,
)
from skltl.finetuning._inputs import resolve_augment

# Functions that only these tests know cannot be pickled, of which `fit` warns.
pytestmark = pytest.mark.filterwarnings("ignore:augment=.*cannot be pickled")

SHAKEN = v2.RandomAffine(degrees=20, translate=(0.1, 0.1))


def flipped(image):
    return image.flip(2)


@pytest.fixture
def n_run(monkeypatch):
    """The numbers of images in the batches that frozen blocks run on."""
    counts = []
    features = skltl.inference.Runner.features

    def counted(self, pixels, *others):
        counts.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.inference.Runner, "features", counted)
    return counts


@pytest.mark.parametrize("unfreeze", [None, 1, "all"])
def test_networks_are_trained_on_augmented_views(unfreeze, digits):
    """A flip as augmentation equals images that were flipped before.

    Each image occurs twice, also flipped, because probe and standardization are fitted
    to the images themselves.
    """
    X, y = digits[0][:30], np.tile(digits[1][:30], 2)
    mirrored = X.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)
    both, swapped = np.concatenate([X, mirrored]), np.concatenate([mirrored, X])
    plain = classifier(unfreeze=unfreeze, head_init="random", image_size=16)
    expected = losses(plain.fit(swapped, y))
    other = losses(plain.fit(both, y))

    for n_views in (1, None):
        found = losses(plain.set_params(augment=flipped, n_views=n_views).fit(both, y))

        assert_allclose(found, expected, rtol=1e-4)
        assert not np.allclose(found, other, rtol=5e-4)


def test_the_probe_is_fitted_to_the_images_themselves(data):
    probe = {"head_epochs": 0, "unfreeze": None}

    found = classifier(augment=SHAKEN, n_views=1, **probe).fit(*data)

    expected = classifier(**probe).fit(*data)
    assert_allclose(
        found.decision_function(data[0]), expected.decision_function(data[0])
    )


def test_random_state_controls_augmented_views(digits):
    X, y = digits[0][:30], digits[1][:30]
    before = torch.get_rng_state()

    first, again, free, other = (
        losses(classifier(augment=SHAKEN, n_views=n, random_state=seed).fit(X, y))
        for n, seed in ((3, 0), (3, 0), (None, 0), (3, 1))
    )

    assert first == again
    assert first != free
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_blocks_run_once_on_stored_views_and_else_in_each_epoch(digits, n_run):
    X, y = digits[0][1:51], digits[1][1:51]

    classifier(augment=flipped, n_views=2).fit(X, y)
    n_stored = sum(n_run)
    n_run.clear()
    classifier(augment=flipped, n_views=None).fit(X, y)

    assert n_stored == 50 * (1 + 2)
    # For the probe, in five epochs, and on a batch after each stage to check the loss.
    assert sum(n_run) == 50 * (1 + 3 + 2) + 2 * 32


def test_views_are_cached(digits, tmp_path, n_run):
    X, y = digits[0][1:41], digits[1][1:41]
    cached = classifier(augment=SHAKEN, n_views=2, cache=tmp_path)
    expected = losses(cached.fit(X, y))
    n_run.clear()

    found = losses(cached.fit(X, y))

    assert found == expected
    assert sum(n_run) == 0


def test_held_out_images_are_not_augmented(digits):
    X, y = digits[0][:100], digits[1][:100]
    frozen = {"validation_fraction": 0.3, "head_lr": 1e-9, "backbone_lr": 1e-9}

    found = classifier(augment=lambda image: image * 0, n_views=1, **frozen).fit(X, y)

    expected = classifier(**frozen).fit(X, y)
    for kind in ("validation_loss", "validation_score"):
        assert_allclose(
            [record[kind] for record in found.history_],
            [record[kind] for record in expected.history_],
            rtol=1e-4,
        )
    assert losses(found)[0] > 2 * losses(expected)[0]


@pytest.mark.parametrize("n_views", [1, None])
def test_augmentation_is_not_computed_in_bfloat16(n_views, digits):
    is_reduced = []

    def noted(image):
        is_reduced.append(torch.is_autocast_enabled("cpu"))
        return image

    classifier(
        augment=noted, n_views=n_views, precision="bfloat16", unfreeze="all"
    ).fit(digits[0][:20], digits[1][:20])

    assert set(is_reduced) == {False}


def test_transforms_of_torchvision_augment_8_bit_images(images):
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.5, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2),
            v2.RandomApply([v2.ToDtype(torch.float32, scale=True)]),
        ]
    )

    augmented = classifier(image_shape=None, augment=augment, n_views=2)
    plain = classifier(image_shape=None)

    found = losses(augmented.fit(images, [0, 1, 2] * 3))

    assert np.isfinite(found).all()
    assert found != losses(plain.fit(images, [0, 1, 2] * 3))


@pytest.mark.parametrize(
    ("augment", "error", "message"),
    [
        (v2.Resize(16), ValueError, r"shape \(3, 16, 16\) for one of shape \(3, 32,"),
        (lambda image: image.numpy(), TypeError, "it returned ndarray"),
        (lambda image: image.long(), TypeError, "it returned torch.int64"),
    ],
)
def test_invalid_views_are_refused(augment, error, message, images):
    with pytest.raises(error, match=message):
        classifier(image_shape=None, augment=augment).fit(images, [0, 1, 2] * 3)


@pytest.mark.parametrize("n_views", [1, None])
def test_views_that_are_normalized_already_give_a_warning(n_views, images):
    augment = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]
    )
    augmented = classifier(image_shape=None, augment=augment, n_views=n_views)

    with pytest.warns(ImageRangeWarning, match=r"\[0, 1\]") as record:
        augmented.fit(images, [0, 1, 2] * 3)

    assert len(record) == 1


@pytest.mark.parametrize("unfreeze", [1, "all"])
@pytest.mark.parametrize("n_views", [1, None])
def test_values_of_the_wrong_range_give_one_warning(unfreeze, n_views, digits):
    X, y = 255 * digits[0][:20], digits[1][:20]
    augmented = classifier(augment=flipped, n_views=n_views, unfreeze=unfreeze)

    with pytest.warns(ImageRangeWarning, match="from 0 to 255") as record:
        augmented.fit(X, y)

    assert len(record) == 1


def test_augmented_views_of_another_wrong_range_give_another_warning(digits):
    """Views that are normalized already, of images that are not divided by 255."""
    X, y = 255 * digits[0][:20], digits[1][:20]
    normalized = classifier(augment=lambda batch: batch * 4 - 2, unfreeze="all")

    with pytest.warns(ImageRangeWarning) as record:
        normalized.fit(X, y)

    messages = [str(one.message) for one in record if "pickled" not in str(one.message)]
    first, second = messages
    assert first.startswith("Float images")
    assert "Divide them by 255" in first
    assert second.startswith("Images that `augment` returns should lie in [0, 1]")


# Automatic augmentation


def test_automatic_augmentation_crops_mirrors_and_varies_colors(images):
    """One view of each of two hundred copies of an image whose halves differ."""
    augment = resolve_augment("auto", Preprocessing((32, 48)))
    left_is_red = np.zeros((3, 32, 48), np.uint8)
    left_is_red[0, :, :24] = left_is_red[2, :, 24:] = 150
    torch.manual_seed(0)

    views = [augment(torch.from_numpy(left_is_red)).numpy() for _ in range(200)]

    assert {view.shape for view in views} == {(3, 32, 48)}
    red = np.array([view[0] > view[2] for view in views])
    is_mirrored = red[:, :, -1].mean(axis=1) > 0.5
    assert 70 < is_mirrored.sum() < 130
    red[is_mirrored] = red[is_mirrored, :, ::-1]
    edges = red.mean(axis=(1, 2))  # where the halves meet, which is 0.5 of the image
    assert edges.std() > 0.05
    assert edges.min() > 0  # half of the area is kept
    assert edges.max() < 1
    brightness = np.array([view.max() for view in views])
    assert brightness.min() < 140
    assert brightness.max() > 160


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 16)])
def test_automatic_augmentation_keeps_half_of_the_area_and_the_proportions(size):
    """The gradients of ramps tell how much of each side is left."""
    height, width = size
    augment = resolve_augment("auto", Preprocessing(size))
    (crop, *_) = augment.transforms
    down = torch.linspace(0, 1, height)[:, None].expand(size)
    across = torch.linspace(0, 1, width)[None].expand(size)
    torch.manual_seed(0)
    views = [crop(torch.stack([down, across, down])) for _ in range(200)]
    kept = np.array(
        [[np.ptp(view[0].numpy()), np.ptp(view[1].numpy())] for view in views]
    )
    area, aspect = kept.prod(axis=1), kept[:, 1] / kept[:, 0]
    assert area.min() > 0.35  # resampling loses half a pixel at each end
    assert 0.6 < area.mean() < 0.85
    assert len(set(area.round(3))) > 40
    assert 0.65 < aspect.min() < 0.9
    assert 1.1 < aspect.max() < 1.55


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_automatic_augmentation_of_any_number_of_channels(n_channels):
    preprocessing = Preprocessing(16, mean=(0.5,) * n_channels, std=(1,) * n_channels)
    image = torch.rand(n_channels, 16, 16)
    view = resolve_augment("auto", preprocessing)(image)
    assert view.shape == image.shape
    assert not torch.equal(view, image)


def test_automatic_augmentation_is_reproducible_and_saved(images, tmp_path):
    y = [0, 1, 2] * 3
    made = classifier(image_shape=None, augment="auto", n_views=2)
    expected = losses(clone(made).fit(images, y))
    found = pickle.loads(pickle.dumps(made.fit(images, y)))
    assert losses(found) == expected
    assert losses(made.set_params(augment=None).fit(images, y)) != expected
    assert found.augment == "auto"


class Unpicklable:
    """An augmentation that raises an error of its own when it is pickled."""

    def __call__(self, image):
        return image

    def __reduce__(self):
        raise RuntimeError("it is open")


def test_any_error_of_pickling_is_reported(images):
    made = classifier(image_shape=None, augment=Unpicklable(), n_views=1)
    with pytest.warns(PersistenceWarning, match="augment=Unpicklable .*it is open"):
        made.fit(images, [0, 1, 2] * 3)


def test_a_view_that_overflows_is_named_by_its_image(images):
    calls = []

    def overflow(image):
        calls.append(1)
        return image.float() * (3e38 if len(calls) == 25 else 1)

    made = classifier(
        image_shape=None, augment=overflow, n_views=8, n_jobs=1, unfreeze=None
    )
    with pytest.raises(NonFiniteFeaturesError, match="image 3 ") as caught:
        made.fit(images / 255, [0, 1, 2] * 3)
    assert not hasattr(caught.value, "__notes__")


def test_an_augmentation_that_cannot_be_pickled_is_reported_before_training(images):
    made = classifier(image_shape=None, augment=lambda image: image)
    wrong = [0] * 9  # one class, which is an error
    with (
        pytest.warns(PersistenceWarning, match="augment=.*<lambda> cannot be pickled"),
        pytest.raises(ValueError, match="one class"),
    ):
        made.fit(images, wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.set_params(augment=flipped, n_views=1).fit(images, [0, 1, 2] * 3)


def darkened(image):
    """Change the image in place."""
    image[:, :16] = 0
    return image


def copied_and_darkened(image):
    return darkened(image.clone())


@pytest.mark.parametrize("n_channels", [1, 3])
def test_an_augmentation_may_change_its_image(n_channels, digits):
    X = digits[0][:30].reshape(-1, 8, 8, 1).repeat(n_channels, axis=3)
    network = adapt_channels("tiny", n_channels) if n_channels == 1 else "tiny"
    options = {"image_shape": None, "n_views": None, "unfreeze": "all"}

    found, expected = (
        classifier(network, augment=augment, **options).fit(X, digits[1][:30])
        for augment in (darkened, copied_and_darkened)
    )

    assert losses(found) == losses(expected)

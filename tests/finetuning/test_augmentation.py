"""Views of images: what they are, what they cost, and that they can be made again."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_classifier import classifier, losses
from torchvision.transforms import v2

import skltl
from skltl.exceptions import ImageRangeWarning

SHAKEN = v2.RandomAffine(degrees=20, translate=(0.1, 0.1))


def flipped(image):
    return image.flip(2)


@pytest.fixture
def crossed(monkeypatch):
    """Count the images that cross frozen blocks."""
    counts = []
    features = skltl.inference.Runner.features

    def counted(self, pixels, *others):
        counts.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.inference.Runner, "features", counted)
    return counts


@pytest.mark.parametrize("n_views", [1, None])
@pytest.mark.parametrize("unfreeze", [None, 1, "all"])
def test_the_network_learns_from_the_variants(unfreeze, n_views, digits):
    """Mirrored by us or beforehand is the same.

    Each image is there twice, as it is and mirrored, because probe and
    standardisation are taken from the images themselves.
    """
    X, y = digits[0][:40], np.tile(digits[1][:40], 2)
    mirrored = X.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)
    settings = {"unfreeze": unfreeze, "head_init": "random"}

    found = classifier(augment=flipped, n_views=n_views, **settings).fit(
        np.concatenate([X, mirrored]), y
    )

    expected = classifier(**settings).fit(np.concatenate([mirrored, X]), y)
    assert_allclose(losses(found), losses(expected), rtol=1e-4)
    other = classifier(**settings).fit(np.concatenate([X, mirrored]), y)
    assert not np.allclose(losses(found), losses(other), rtol=5e-4)


def test_the_probe_begins_with_the_images_themselves(digits):
    X, y = digits[0][:60], digits[1][:60]
    settings = {"head_epochs": 0, "unfreeze": None}

    found = classifier(augment=SHAKEN, **settings).fit(X, y)

    expected = classifier(**settings).fit(X, y)
    assert_allclose(found.decision_function(X), expected.decision_function(X))


def test_variants_are_made_again_by_the_seed(digits):
    X, y = digits[0][:60], digits[1][:60]
    before = torch.get_rng_state()

    first, again, free, other = (
        classifier(augment=SHAKEN, n_views=n_views, random_state=seed).fit(X, y)
        for n_views, seed in ((3, 0), (3, 0), (None, 0), (3, 1))
    )

    assert losses(first) == losses(again)
    assert losses(first) != losses(free)
    assert losses(first) != losses(other)
    assert torch.equal(torch.get_rng_state(), before)


def test_stored_views_cross_once_and_free_ones_in_each_epoch(digits, crossed):
    X, y = digits[0][1:51], digits[1][1:51]

    classifier(augment=SHAKEN, n_views=2).fit(X, y)
    n_stored = sum(crossed)
    crossed.clear()
    classifier(augment=SHAKEN, n_views=None).fit(X, y)

    assert n_stored == 50 * (1 + 2)
    # For the probe, in five epochs, and a batch after each stage to look at the loss.
    assert sum(crossed) == 50 * (1 + 3 + 2) + 2 * 32


def test_what_is_held_out_is_not_changed(digits):
    X, y = digits[0][:100], digits[1][:100]
    settings = {"validation_fraction": 0.3, "head_lr": 1e-9, "backbone_lr": 1e-9}

    found = classifier(augment=lambda image: image * 0, **settings).fit(X, y)

    expected = classifier(**settings).fit(X, y)
    for kind in ("validation_loss", "validation_score"):
        assert_allclose(
            [record[kind] for record in found.history_],
            [record[kind] for record in expected.history_],
            rtol=1e-4,
        )
    assert losses(found)[0] > 2 * losses(expected)[0]


def test_transforms_of_torchvision_serve_8_bit_images(images):
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.5, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2),
            v2.RandomApply([v2.ToDtype(torch.float32, scale=True)]),
        ]
    )

    fitted = classifier(image_shape=None, augment=augment).fit(images, [0, 1, 2] * 3)

    assert fitted.predict_proba(images).shape == (9, 3)


@pytest.mark.parametrize(
    ("augment", "error", "message"),
    [
        (v2.Resize(16), ValueError, r"shape \(3, 16, 16\) for one of shape \(3, 32,"),
        (lambda image: image.numpy(), TypeError, "it gave ndarray"),
        (lambda image: image.long(), TypeError, "it gave torch.int64"),
    ],
)
def test_variants_that_no_network_can_take_are_refused(augment, error, message, images):
    with pytest.raises(error, match=message):
        classifier(image_shape=None, augment=augment).fit(images, [0, 1, 2] * 3)


@pytest.mark.parametrize("n_views", [1, None])
def test_variants_that_are_normalised_twice_are_told(n_views, images):
    augment = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]
    )
    fine_tuned = classifier(image_shape=None, augment=augment, n_views=n_views)

    with pytest.warns(ImageRangeWarning, match="should lie in"):
        fine_tuned.fit(images, [0, 1, 2] * 3)


def test_views_are_cached_too(digits, tmp_path, crossed):
    X, y = digits[0][1:41], digits[1][1:41]
    fine_tuned = classifier(augment=SHAKEN, n_views=2, cache=tmp_path)
    expected = losses(fine_tuned.fit(X, y))
    crossed.clear()

    found = losses(fine_tuned.set_params(verbose=0).fit(X, y))

    assert found == expected
    assert sum(crossed) == 0
    assert np.isfinite(found).all()

"""A checkpoint is complete or refused, and used only by the fit that wrote it."""

import copy
import io
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import interrupt, the_file
from numpy.testing import assert_array_equal
from PIL import Image
from tiny_classifier import classifier, losses, saved_state
from torchvision.transforms import v2

from skltl import Backbone, Preprocessing
from skltl.exceptions import CheckpointWarning
from skltl.finetuning._checkpoint import (
    MAGIC,
    Checkpoint,
    content_digest,
    description,
    view_content,
)
from skltl.images import read_images

# Functions that only these tests know cannot be pickled, of which `fit` warns.
pytestmark = pytest.mark.filterwarnings("ignore:augment=.*cannot be pickled")


@pytest.fixture(scope="session")
def data(digits):
    return digits[0][:40], digits[1][:40]


@pytest.fixture(scope="module")
def expected(data):
    """The classifier that was fitted without a checkpoint."""
    return classifier().fit(*data)


@pytest.fixture(scope="module")
def interrupted_folder(data, tmp_path_factory):
    """A folder with the checkpoint of a fit that was interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    interrupt(classifier(checkpoint=folder), *data)
    return folder


@pytest.fixture
def saved(interrupted_folder, tmp_path):
    """A copy of this checkpoint, in the folder of the test."""
    return Path(shutil.copy(the_file(interrupted_folder), tmp_path))


@pytest.fixture
def image_files(images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def check_flipped_bits(path, n_bits):
    """Every flipped bit is refused, with the name of the file."""
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    for bit in rng.choice(8 * len(whole), n_bits, replace=False):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            Checkpoint(path)


def test_a_flipped_bit_is_refused(saved):
    check_flipped_bits(saved, 30)


@pytest.mark.slow
def test_three_hundred_flipped_bits_are_refused(saved):
    check_flipped_bits(saved, 300)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(data, saved, share):
    saved.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])

    with pytest.raises(ValueError, match="cannot be read.* Delete it to start over"):
        classifier(checkpoint=saved.parent).fit(*data)


def write_state(path, state):
    content = io.BytesIO()
    torch.save(state, content)
    path.write_bytes(MAGIC + content_digest(content.getbuffer()) + content.getvalue())


@pytest.mark.parametrize("first", [b"skltl checkpoint 2\n", b"skltl checkpoint 99\n"])
def test_the_format_of_a_checkpoint_is_checked_before_its_contents(
    first, saved, monkeypatch
):
    content = saved.read_bytes()[len(MAGIC) :]
    saved.write_bytes(first + content)

    def refused(*_, **__):
        pytest.fail("the state of a checkpoint in another format was read")

    monkeypatch.setattr(torch, "load", refused)

    with pytest.raises(ValueError, match="was written by another version"):
        Checkpoint(saved)


EDITS = {
    "a stage that is not planned": lambda state: state.update(stage=99),
    "a stage before the first": lambda state: state.update(stage=-1),
    "a stage that is not a number": lambda state: state.update(stage="head"),
    "a seed that is not an integer": lambda state: state.update(seed=0.5),
    "no weights": lambda state: state.pop("network"),
    "weights of another shape": lambda state: state["network"].update(
        {key: value[:1] for key, value in state["network"].items() if value.ndim}
    ),
    "no optimizer": lambda state: state.pop("optimizer"),
    "an empty optimizer": lambda state: state.update(optimizer={}),
    "a schedule that is a list": lambda state: state.update(schedule=[]),
    "no best score": lambda state: state.pop("best_score"),
    "code": lambda state: state.update(stage=print),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edited_state_is_refused_with_the_name_of_the_file(data, saved, change):
    state = saved_state(saved)
    change(state)
    write_state(saved, state)

    with pytest.raises(ValueError, match=f"{saved}.* cannot be read"):
        classifier(checkpoint=saved.parent).fit(*data)


def test_an_unchanged_state_is_used(data, saved, expected):
    write_state(saved, saved_state(saved))

    fitted = classifier(checkpoint=saved.parent).fit(*data)

    assert losses(fitted) == losses(expected)
    assert not saved.exists()


def test_a_folder_in_place_of_the_file_is_refused(data, saved):
    saved.unlink()
    saved.mkdir()

    with pytest.raises(ValueError, match=f"{saved}.* cannot be read"):
        classifier(checkpoint=saved.parent).fit(*data)


def test_a_folder_that_is_not_writable_is_refused_before_any_work(data, tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    with pytest.raises(ValueError, match=r"checkpoint='.*file' is not a folder"):
        classifier(checkpoint=file).fit(*data)


def test_a_full_disk_does_not_end_the_fit(data, tmp_path, expected):
    resource = pytest.importorskip("resource", reason="no limits on this system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.warns(CheckpointWarning, match=str(tmp_path)) as warned:
            fitted = classifier(checkpoint=tmp_path).fit(*data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert len(warned) == 1
    assert_array_equal(
        fitted.decision_function(data[0]), expected.decision_function(data[0])
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_deleted_does_not_end_the_fit(data, tmp_path, expected):
    folder = tmp_path / "fit"

    def replace_the_folder(image):
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.write_text("in the way")
        return image

    made = classifier(checkpoint=folder, augment=replace_the_folder, n_views=1)
    with pytest.warns(CheckpointWarning, match="cannot be deleted|could not be saved"):
        fitted = made.fit(*data)

    assert fitted.n_epochs_ == expected.n_epochs_
    assert fitted.predict(data[0]).shape == data[1].shape


def named_noise(strength):
    def noise(image):
        return (image.float() / 255 + strength * torch.rand(image.shape)).clip(0, 1)

    return noise


OTHER_AUGMENTATIONS = {
    "a rare transform": (v2.RandomGrayscale(p=0.02), v2.RandomVerticalFlip(p=0.01)),
    "a probability": (v2.RandomHorizontalFlip(p=0.01), v2.RandomHorizontalFlip(p=0.02)),
    "what a function encloses": (named_noise(0.0), named_noise(1e-9)),
    "a function's code": (lambda image: image, lambda image: image + 0),
    "inside of another": (
        v2.Compose([v2.Lambda(lambda image: image)]),
        v2.Compose([v2.Lambda(lambda image: image * 1)]),
    ),
}


@pytest.mark.parametrize("pair", OTHER_AUGMENTATIONS.values(), ids=OTHER_AUGMENTATIONS)
def test_other_augmentations_have_other_descriptions(pair):
    one, other = (description(augment, "augment") for augment in pair)

    assert one != other
    assert one == description(pair[0], "augment")


def test_a_fit_with_another_augmentation_starts_over(data, tmp_path):
    short = {"n_views": 1, "head_epochs": 2, "finetune_epochs": 0}
    one, other = (
        classifier(augment=augment, checkpoint=tmp_path, **short)
        for augment in OTHER_AUGMENTATIONS["a probability"]
    )
    interrupt(one, *data, after=1)

    other.fit(*data)

    assert the_file(tmp_path)  # that of the other fit
    one.fit(*data)
    assert list(tmp_path.iterdir()) == []


def test_an_augmentation_with_tensors_is_identified():
    matrix = v2.LinearTransformation(torch.eye(3 * 32 * 32), torch.zeros(3 * 32 * 32))
    augment = v2.Compose([v2.ToDtype(torch.float32, scale=True), matrix])
    found = description(augment, "augment")

    assert description(copy.deepcopy(augment), "augment") == found
    matrix.transformation_matrix[0, 0] = 2
    assert description(augment, "augment") != found


strength = 0.9


def weaken(image):
    return image.float() / 255 * strength


class Weaken:
    def __call__(self, image):
        return self.weakened(image)

    def weakened(self, image):
        return image.float() / 255 * 0.9


def test_globals_and_methods_are_part_of_an_augmentation(monkeypatch):
    before = description(weaken, "augment"), description(Weaken(), "augment")
    assert before == (description(weaken, "augment"), description(Weaken(), "augment"))

    monkeypatch.setitem(globals(), "strength", 0.5)
    monkeypatch.setattr(Weaken, "weakened", lambda self, image: image)

    assert description(weaken, "augment") != before[0]
    assert description(Weaken(), "augment") != before[1]


def test_recursive_augmentations_are_described():
    def halved(image):
        return halved(image[1:]) if len(image) > 1 else v2.functional.invert(image)

    assert description(halved, "augment") == description(halved, "augment")


def test_the_order_of_a_set_is_not_described():
    """It differs between processes, as the hashes of strings do."""
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)

    found = [description({"kept": {frozenset(s)}}, "augment") for s in (one, other)]

    assert found[0] == found[1]
    assert found[0] != description({"kept": {frozenset([0, 9])}}, "augment")


def test_an_augmentation_that_cannot_be_identified_is_refused(data, tmp_path):
    class Reader:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, image):
            return image

        def __deepcopy__(self, memo):
            return self

    with pytest.raises(ValueError, match="augment=Reader cannot be identified"):
        classifier(augment=Reader(), checkpoint=tmp_path).fit(*data)


def test_views_of_several_images_identify_an_augmentation():
    """The first image may be black, where many transforms show nothing."""
    X = np.full((40, 8, 8), 0.5)
    X[0] = 0

    one, other = (
        view_content(
            lambda image, k=k: image * k, read_images(X), Preprocessing(crop_size=8)
        )
        for k in (0.9, 0.91)
    )

    assert one != other


def test_a_fit_with_another_preprocessing_starts_over(data, tmp_path):
    torch.manual_seed(0)
    blocks = {"stem": torch.nn.Conv2d(3, 4, 3)}
    one, other = (
        Backbone.from_blocks(
            "own", blocks, preprocessing=Preprocessing(16, mean=(mean,) * 3)
        )
        for mean in (0.0, 0.5)
    )
    last = {"unfreeze": 1, "layer": "last", "image_size": None}
    interrupt(classifier(backbone=one, checkpoint=tmp_path, **last), *data)

    fitted = classifier(backbone=other, checkpoint=tmp_path, **last).fit(*data)

    assert losses(fitted) == losses(classifier(backbone=other, **last).fit(*data))


def test_a_fit_with_another_image_of_the_same_name_starts_over(image_files, tmp_path):
    head_only = {"image_shape": None, "layer": "block2", "finetune_epochs": 0}
    folder, labels = tmp_path / "fit", np.arange(len(image_files)) % 2
    interrupt(classifier(checkpoint=folder, **head_only), image_files, labels)
    stat = image_files[3].stat()
    image = 255 - np.asarray(Image.open(image_files[3]))
    Image.fromarray(image).save(image_files[3], compress_level=0)
    os.utime(image_files[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))

    fitted = classifier(checkpoint=folder, **head_only).fit(image_files, labels)

    expected = classifier(**head_only).fit(image_files, labels)
    assert losses(fitted) == losses(expected)


def test_a_fit_resumes_after_its_images_have_moved(image_files, tmp_path):
    head_only = {"image_shape": None, "layer": "block2", "finetune_epochs": 0}
    folder, labels = tmp_path / "fit", np.arange(len(image_files)) % 2
    interrupt(classifier(checkpoint=folder, **head_only), image_files, labels)
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = sorted((tmp_path / "moved").iterdir())

    classifier(checkpoint=folder, **head_only).fit(moved, labels)

    assert list(folder.iterdir()) == []  # used and deleted


def test_a_fit_with_another_version_starts_over(data, saved, expected, monkeypatch):
    monkeypatch.setattr("skltl.networks._identity.__version__", "99.0")

    fitted = classifier(checkpoint=saved.parent).fit(*data)

    assert losses(fitted) == losses(expected)
    assert saved.exists()  # the other version can still use it


def test_simultaneous_fits_without_random_state_are_different_models(data, tmp_path):
    barrier = threading.Barrier(3, timeout=120)
    state_for, fitted = Checkpoint.state_for, []

    def meet(self, n_stages):
        barrier.wait()  # all three have their files before any of them trains
        return state_for(self, n_stages)

    def fit():
        made = classifier(
            random_state=None, checkpoint=tmp_path, hidden_units=(4,), head_epochs=2
        )
        fitted.append(made.fit(*data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "state_for", meet)
        threads = [threading.Thread(target=fit) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(fitted) == 3
    assert len({str(losses(one)) for one in fitted}) == 3
    assert list(tmp_path.iterdir()) == []

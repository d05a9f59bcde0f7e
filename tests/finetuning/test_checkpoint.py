"""A checkpoint is whole or refused, and only the fit that wrote it goes on from it."""

import copy
import io
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from skltl.finetuning._fitting import _foundation
from tiny_classifier import classifier, losses, saved_state
from torchvision.transforms import v2

from skltl import Backbone, Preprocessing
from skltl.exceptions import CheckpointWarning
from skltl.finetuning._checkpoint import MAGIC, Checkpoint, _digest, _views, description


class Interruption(Exception):
    """What ends a fit in the middle."""


def interrupt(fitted, X, y, after=2, **kwargs):
    """Fit until a state has been saved so many times."""
    save, n_saves = Checkpoint.save, []

    def save_and_end(self, state):
        save(self, state)
        n_saves.append(1)
        if len(n_saves) == after:
            raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_end)
        with pytest.raises(Interruption):
            fitted.fit(X, y, **kwargs)


def the_file(folder):
    (path,) = folder.glob("*.checkpoint")
    return path


@pytest.fixture
def data(digits):
    return digits[0][:40], digits[1][:40]


@pytest.fixture
def image_files(images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def check_flipped_bits(data, folder, n_bits):
    """Every flipped bit is refused with the file's name, or changes nothing."""
    interrupt(classifier(checkpoint=folder), *data)
    path = the_file(folder)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    for bit in rng.choice(8 * len(whole), n_bits, replace=False):
        path.write_bytes(whole)
        flip_bit(path, int(bit))
        with pytest.raises(ValueError, match=str(path)):
            Checkpoint(folder, path.name.split("-")[2])


def test_a_flipped_bit_is_refused(data, tmp_path):
    check_flipped_bits(data, tmp_path, 30)


@pytest.mark.slow
def test_three_hundred_flipped_bits_are_refused(data, tmp_path):
    check_flipped_bits(data, tmp_path, 300)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(data, tmp_path, share):
    interrupt(classifier(checkpoint=tmp_path), *data)
    path = the_file(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    with pytest.raises(ValueError, match="cannot be read.* Delete it to begin anew"):
        classifier(checkpoint=tmp_path).fit(*data)


def edit(path, change):
    """Change the state in a checkpoint, and its digest with it."""
    state = saved_state(path)
    change(state)
    edited = io.BytesIO()
    torch.save(state, edited)
    path.write_bytes(MAGIC + _digest(edited.getbuffer()) + edited.getvalue())


EDITS = {
    "a stage that is not planned": lambda state: state.update(stage=99),
    "a stage before the first": lambda state: state.update(stage=-1),
    "a stage that is no number": lambda state: state.update(stage="head"),
    "a seed that is no number": lambda state: state.update(seed=0.5),
    "no layers": lambda state: state.pop("layers"),
    "layers of another shape": lambda state: state["layers"].update(
        {key: value[:1] for key, value in state["layers"].items() if value.ndim}
    ),
    "no optimizer": lambda state: state["training"].pop("optimizer"),
    "training that is a list": lambda state: state.update(training=[]),
    "no best score": lambda state: state["best"].pop("score"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edited_state_is_refused_with_the_files_name(data, tmp_path, change):
    interrupt(classifier(checkpoint=tmp_path), *data)
    path = the_file(tmp_path)
    edit(path, change)

    with pytest.raises(ValueError, match=f"{path}.* cannot be read"):
        classifier(checkpoint=tmp_path).fit(*data)


def test_a_folder_in_place_of_the_file_is_refused(data, tmp_path):
    interrupt(classifier(checkpoint=tmp_path), *data)
    path = the_file(tmp_path)
    path.unlink()
    path.mkdir()

    with pytest.raises(ValueError, match=f"{path}.* cannot be read"):
        classifier(checkpoint=tmp_path).fit(*data)


def test_a_full_disk_does_not_end_the_fit(data, tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on this system")
    expected = classifier().fit(*data)
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


def named_noise(strength):
    def noise(image):
        return (image.float() / 255 + strength * torch.rand(image.shape)).clip(0, 1)

    return noise


OTHER_AUGMENTATIONS = {
    "a rare transform": (v2.RandomGrayscale(p=0.02), v2.RandomVerticalFlip(p=0.01)),
    "a rate": (v2.RandomHorizontalFlip(p=0.01), v2.RandomHorizontalFlip(p=0.02)),
    "what a function encloses": (named_noise(0.0), named_noise(1e-9)),
    "a function's code": (lambda image: image, lambda image: image + 0),
    "inside of another": (
        v2.Compose([v2.Lambda(lambda image: image)]),
        v2.Compose([v2.Lambda(lambda image: image * 1)]),
    ),
}


@pytest.mark.parametrize("pair", OTHER_AUGMENTATIONS.values(), ids=OTHER_AUGMENTATIONS)
def test_a_fit_with_another_augmentation_begins_anew(data, tmp_path, pair):
    settings = {"n_views": 1, "head_epochs": 2, "finetune_epochs": 0}
    one, other = (
        classifier(augment=augment, checkpoint=tmp_path, **settings) for augment in pair
    )
    interrupt(one, *data, after=1)

    other.fit(*data)

    assert len(list(tmp_path.glob("*.checkpoint"))) == 1  # that of the other fit
    one.fit(*data)
    assert list(tmp_path.iterdir()) == []


def test_an_augmentation_with_tensors_is_known_again(data, tmp_path):
    matrix = v2.LinearTransformation(torch.eye(3 * 32 * 32), torch.zeros(3 * 32 * 32))
    augment = v2.Compose([v2.ToDtype(torch.float32, scale=True), matrix])
    settings = {"n_views": 1, "head_epochs": 2, "finetune_epochs": 0}
    made = classifier(augment=augment, checkpoint=tmp_path, **settings)
    interrupt(made, *data, after=1)

    classifier(augment=copy.deepcopy(augment), checkpoint=tmp_path, **settings).fit(
        *data
    )

    assert list(tmp_path.iterdir()) == []  # it went on there, and was done with it


def test_another_preparation_of_the_images_is_another_fit(data, tmp_path):
    torch.manual_seed(0)
    blocks = {"stem": torch.nn.Conv2d(3, 4, 3)}
    one, other = (
        Backbone.from_blocks(
            "own", blocks, preprocessing=Preprocessing(16, mean=(mean,) * 3)
        )
        for mean in (0.0, 0.5)
    )
    settings = {"unfreeze": 1, "layer": "last", "image_size": None}
    interrupt(classifier(backbone=one, checkpoint=tmp_path, **settings), *data)

    fitted = classifier(backbone=other, checkpoint=tmp_path, **settings).fit(*data)

    expected = classifier(backbone=other, **settings).fit(*data)
    assert losses(fitted) == losses(expected)


def test_an_augmentation_that_cannot_be_described_is_refused(data, tmp_path):
    class Reader:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, image):
            return image

        def __deepcopy__(self, memo):
            return self

    reader = Reader()
    with pytest.raises(ValueError, match="it cannot be told what augment=Reader does"):
        classifier(augment=reader, checkpoint=tmp_path).fit(*data)


def test_a_fit_of_an_exchanged_image_begins_anew(image_files, tmp_path):
    settings = {"image_shape": None, "layer": "block2", "finetune_epochs": 0}
    folder, labels = tmp_path / "fit", np.arange(len(image_files)) % 2
    interrupt(classifier(checkpoint=folder, **settings), image_files, labels)
    stat = image_files[3].stat()
    content = bytearray(image_files[3].read_bytes())
    image = 255 - np.asarray(Image.open(image_files[3]))
    Image.fromarray(image).save(image_files[3], compress_level=0)
    assert image_files[3].read_bytes() != content
    os.utime(image_files[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))

    fitted = classifier(checkpoint=folder, **settings).fit(image_files, labels)

    expected = classifier(**settings).fit(image_files, labels)
    assert losses(fitted) == losses(expected)


def test_a_copy_of_the_images_is_the_same_data(image_files, tmp_path, images):
    settings = {"image_shape": None, "layer": "block2", "finetune_epochs": 0}
    folder, labels = tmp_path / "fit", np.arange(len(image_files)) % 2
    interrupt(classifier(checkpoint=folder, **settings), image_files, labels)
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = sorted((tmp_path / "moved").iterdir())

    classifier(checkpoint=folder, **settings).fit(moved, labels)

    assert list(folder.iterdir()) == []  # it went on there, and was done with it


def test_simultaneous_fits_without_a_seed_are_different_models(data, tmp_path):
    meet = threading.Barrier(3, timeout=120)
    fitted = []

    class Meeting(Checkpoint):
        def saved_for(self, n_stages):
            meet.wait()  # all three have their places before any of them trains
            return super().saved_for(n_stages)

    def fit():
        made = classifier(
            random_state=None, checkpoint=tmp_path, hidden_units=(4,), head_epochs=2
        )
        fitted.append(made.fit(*data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skltl.finetuning._fitting.Checkpoint", Meeting)
        threads = [threading.Thread(target=fit) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(fitted) == 3
    assert len({str(losses(one)) for one in fitted}) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_fit_without_a_seed_goes_on_from_the_one_that_was_interrupted(data, tmp_path):
    settings = {"random_state": None, "checkpoint": tmp_path, "hidden_units": (4,)}
    interrupted = classifier(**settings)
    interrupt(interrupted, *data, after=2)
    seen = []
    load = Checkpoint.saved_for

    def note(self, n_stages):
        seen.append(self.saved["history"])
        return load(self, n_stages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "saved_for", note)
        fitted = classifier(**settings).fit(*data)

    assert fitted.history_[:2] == seen[0]
    assert list(tmp_path.iterdir()) == []


def test_a_fit_of_another_version_begins_anew(data, tmp_path, monkeypatch):
    interrupt(classifier(checkpoint=tmp_path), *data)
    monkeypatch.setattr("skltl.networks._identity.__version__", "99.0")

    fitted = classifier(checkpoint=tmp_path).fit(*data)

    assert losses(fitted) == losses(classifier().fit(*data))
    assert the_file(tmp_path)  # of the other version, which goes on from it


def test_a_file_that_cannot_be_deleted_does_not_cost_the_fit(data, tmp_path):
    folder = tmp_path / "fit"
    made = classifier(checkpoint=folder)
    expected = classifier().fit(*data)

    def replace_the_folder(image):
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.write_text("in the way")
        return image

    with pytest.warns(CheckpointWarning, match="cannot be deleted|could not be saved"):
        fitted = made.set_params(augment=replace_the_folder, n_views=1).fit(*data)

    assert fitted.n_epochs_ == expected.n_epochs_
    assert fitted.predict(data[0]).shape == data[1].shape


strength = 0.9


def weaken(image):
    return image.float() / 255 * strength


class Weaken:
    def __call__(self, image):
        return self.weakened(image)

    def weakened(self, image):
        return image.float() / 255 * 0.9


def test_what_an_augmentation_uses_is_a_part_of_it(monkeypatch):
    before = description(weaken, "augment"), description(Weaken(), "augment")
    assert before == (description(weaken, "augment"), description(Weaken(), "augment"))

    monkeypatch.setitem(globals(), "strength", 0.5)
    monkeypatch.setattr(Weaken, "weakened", lambda self, image: image)

    assert description(weaken, "augment") != before[0]
    assert description(Weaken(), "augment") != before[1]


def test_augmentations_may_call_themselves_and_packages():
    def halved(image):
        return halved(image[1:]) if len(image) > 1 else v2.functional.invert(image)

    assert description(halved, "augment") == description(halved, "augment")


def test_sets_are_described_the_same_in_every_process():
    script = (
        "from skltl.finetuning._checkpoint import description;"
        "words = {'north', 'east', 'south', 'west', frozenset({'a', 'b', 'c'})};"
        "print(description({'kept': words}, 'augment').hex())"
    )

    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in "123"
    }

    assert len(found) == 1


def test_every_fit_sees_what_augmentation_makes_of_several_images(data):
    """The first image may be black, where many transforms show nothing."""
    X, y = data[0].copy(), data[1]
    X[0] = 0
    made = classifier(checkpoint="unused", augment=v2.RandomHorizontalFlip(), n_views=1)
    source = made._read_images(X, y, reset=True)
    foundation = _foundation(made, 0, is_shared=True)

    one, other = (
        _views(lambda image, k=k: image.float() / 255 * k, source, foundation)
        for k in (0.9, 0.91)
    )

    assert one != other

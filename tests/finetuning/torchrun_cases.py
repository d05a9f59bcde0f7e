"""Fits that `test_torchrun` runs in one process and, as a script, in several."""

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tiny_classifier import classifier, regressor
from torchvision.transforms import v2

import skltl.networks

TINY = Path(skltl.networks.__file__).with_name("tiny.safetensors")


def this_rank():
    return int(os.environ.get("RANK", "0"))


def digits(start=0, stop=60):
    X, y = load_digits(return_X_y=True)
    return X[start:stop] / 16, y[start:stop]


def labels(y):
    return np.column_stack([y % 2, y > 4]).astype(int)


def values(X):
    return np.column_stack([X.mean(axis=1), X[:, 20:44].mean(axis=1)])


def of_classes(_, **parameters):
    return classifier(**parameters).fit(*digits())


def of_labels(_):
    X, y = digits()
    return classifier(batch_size=11).fit(X, labels(y))


def of_values(_):
    X, _ = digits()
    return regressor(batch_size=9, loss="huber").fit(X, values(X))


def with_weights(_, **parameters):
    X, y = digits()
    weights = np.linspace(0, 3, len(y))
    return classifier(class_weight="balanced", **parameters).fit(
        X, y, sample_weight=weights
    )


def with_a_validation_set(_):
    X_val, y_val = digits(60, 95)
    early = {"early_stopping": True, "patience": 1, "head_epochs": 6}
    fitted = classifier(batch_size=8, **early)
    return fitted.fit(*digits(), X_val=X_val, y_val=y_val)


def with_a_cache(folder):
    for _ in range(2):
        fitted = of_classes(folder, cache=folder / "cache")
    return fitted


def once_more(folder):
    return of_classes(folder, warm_start=True).fit(*digits())


FLIP = v2.RandomHorizontalFlip()
HEAD = {"conv_channels": (8,), "hidden_units": (8,)}

# The losses of these are the same in any number of processes.
EQUAL = {
    "classes": lambda folder: of_classes(folder, batch_size=7),
    "only the head": lambda folder: of_classes(folder, unfreeze=None),
    "all blocks": lambda folder: of_classes(folder, unfreeze="all", batch_size=13),
    "batch-norms": lambda folder: of_classes(folder, unfreeze="batch_norm"),
    "one image per step": lambda folder: of_classes(
        folder, batch_size=1, head_epochs=1, finetune_epochs=1
    ),
    "labels": of_labels,
    "values": of_values,
    "weights": lambda folder: with_weights(folder, batch_size=5),
    "a validation set": with_a_validation_set,
    "held-out images": lambda folder: of_classes(folder, validation_fraction=0.3),
    "stored views": lambda folder: of_classes(folder, augment=FLIP, n_views=2),
    "views without end": lambda folder: of_classes(
        folder, augment="auto", n_views=None, batch_size=9
    ),
    "all blocks, views": lambda folder: of_classes(
        folder, unfreeze="all", augment=FLIP, batch_size=9
    ),
    "a larger head": lambda folder: of_classes(folder, batch_size=7, **HEAD),
    "adamw": lambda folder: of_classes(folder, optimizer="adamw", head_lr=1e-3),
    "a cache": with_a_cache,
    "a warm start": once_more,
}

# Those of these are not, but all processes end with the same network.
SEEDED = {
    "dropout": lambda folder: of_classes(folder, hidden_units=(8,), dropout=0.5),
    "no seed": lambda folder: of_classes(folder, random_state=None, **HEAD),
    "a generator": lambda folder: of_classes(
        folder, random_state=np.random.RandomState(this_rank()), **HEAD
    ),
}


READ = []


def read(number):
    READ.append(number)
    return digits()[0][number].reshape(8, 8).astype(np.float32)


def read_once(folder, **parameters):
    """Return a fit for which each image is read once, by one of the processes."""
    READ.clear()
    fitted = classifier(reader=read, image_shape=None, **parameters)
    return fitted.fit(list(range(60)), digits()[1])


def an_unreadable_image(folder):
    X, y = digits()
    paths = [folder / str(this_rank()) / f"{number}.png" for number in range(len(X))]
    for path, row in zip(paths, X, strict=True):
        Image.fromarray((255 * row.reshape(8, 8)).astype(np.uint8)).save(path)
    if this_rank() == 1:
        paths[35].write_bytes(b"no image")
    return classifier(image_shape=None).fit(paths, y)


def other_labels(_):
    X, y = digits()
    return classifier().fit(X, np.roll(y, this_rank()))


def other_classes(_):
    X, y = digits()
    return classifier().fit(X, y + this_rank())


def other_numbers(_):
    X, y = digits(stop=60 - this_rank())
    return classifier().fit(X, y)


def only_one_is_warm(_):
    fitted = classifier(warm_start=True)
    first = classifier().fit(*digits())
    if this_rank() == 1:
        vars(fitted).update(vars(first), warm_start=True)
    return fitted.fit(*digits())


def other_weights(folder):
    # The same relative name is another file in each folder.
    own = folder / str(this_rank())
    weights = load_file(TINY)
    weights = {name: (1 + this_rank()) * one for name, one in weights.items()}
    save_file(weights, own / "weights.safetensors")
    with contextlib.chdir(own):
        return of_classes(folder, weights="weights.safetensors")


class Sends:
    """An augmentation that does something to process 1 at one of its calls."""

    def __init__(self, at, what):
        self.at, self.what, self.n_calls = at, what, 0

    def __call__(self, image):
        self.n_calls += 1
        if self.n_calls == self.at and this_rank() == 1:
            self.what()
        return image


def raise_interrupt():
    raise KeyboardInterrupt


def send_interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("out of luck")


def disturbed(what, at=45, keep=True):
    # Of 60 images, each process augments half in each of 3 + 2 epochs.
    augment = Sends(at, what)
    return classifier(augment=augment, n_views=None, keep_on_interrupt=keep).fit(
        *digits()
    )


def odd_range(_):
    X, y = digits()
    X[45] *= 3
    return classifier().fit(X, y)


EVENTS = {
    "read once": read_once,
    "crops once": lambda folder: read_once(folder, unfreeze="all"),
    "cached once": lambda folder: read_once(folder, cache=folder / "read"),
    "an unreadable image": an_unreadable_image,
    "other labels": other_labels,
    "other numbers": other_numbers,
    "other classes": other_classes,
    "only one is warm": only_one_is_warm,
    "other weights": other_weights,
    "invalid parameters": lambda folder: of_classes(folder, batch_size=1 - this_rank()),
    "other parameters": lambda folder: of_classes(folder, batch_size=7 + this_rank()),
    "an error": lambda _: disturbed(fail),
    "divergence": lambda folder: of_classes(folder, head_lr=1e30, head_init="random"),
    "from scratch": lambda folder: of_classes(folder, weights=None, unfreeze="all"),
    "an interruption": lambda _: disturbed(raise_interrupt, keep=False),
    "a signal": lambda _: disturbed(send_interrupt),
    "an odd range": odd_range,
    "progress": lambda folder: of_classes(folder, verbose=1),
    "still well": lambda folder: of_classes(folder, batch_size=7),
}


def digest(fitted):
    """Return a digest of every bit of the network and the head."""
    found = blake2b()
    for module in (*fitted.network_.blocks.values(), fitted.head_):
        for weights in module.state_dict().values():
            found.update(weights.numpy().tobytes())
    return found.hexdigest()


def outcome(case, folder):
    """Return what a fit gave, as plain data."""
    found, stderr = {}, io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stderr(stderr),
    ):
        warnings.simplefilter("always")
        try:
            fitted = case(folder)
        except (Exception, KeyboardInterrupt) as error:
            notes = getattr(error, "__notes__", [])
            found |= {"error": type(error).__name__, "message": str(error)}
            found |= {"notes": notes}
        else:
            found |= {"history": fitted.history_, "digest": digest(fitted)}
    warned = [warning.category.__name__ for warning in caught]
    return found | {"warned": warned, "stderr": stderr.getvalue(), "read": list(READ)}


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (folder / str(this_rank())).mkdir()
    cases = EQUAL | SEEDED | EVENTS
    outcomes = {name: outcome(case, folder) for name, case in cases.items()}
    (folder / f"{this_rank()}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

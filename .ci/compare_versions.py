"""Compare the features, losses and scores of two versions of the package, bit for bit.

Usage: ``python .ci/compare_versions.py OLD NEW``, with the roots of two checkouts. Each
job runs in a process of its own for each of them, on the images of `SKLTL_TEST_DATA`.
``--unpacked`` switches off the packed convolutions of 0.1.0, which used private
functions of torch and are gone: with them, the last digits of features differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

DATA = Path(os.environ["SKLTL_TEST_DATA"]) if "SKLTL_TEST_DATA" in os.environ else None


def digest(*arrays):
    """Return a name for the bits of arrays."""
    found = hashlib.blake2b(digest_size=8)
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def flowers(n_per_class=3):
    """Return paths and labels of some flowers."""
    folders = sorted((DATA / "flowers17").iterdir())
    paths = [
        path
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.glob("*.jpg"))[:n_per_class]
    ]
    return paths, np.array([path.parent.name for path in paths])


def squeezenet(**parameters):
    """Return a transformer with the weights of the test data."""
    from skltl import CNNFeatureTransformer

    weights = DATA / "weights" / "squeezenet1_0_imagenet.safetensors"
    return CNNFeatureTransformer("squeezenet1_0", weights=weights, **parameters)


def digits(n=200):
    """Return rows of pixels and labels."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return X[:n] / 16, y[:n]


def features_of_files(precision, **parameters):
    """Return the features of flowers."""
    X, _ = flowers(2)
    transformer = squeezenet(precision=precision, **parameters)
    return [transformer.fit_transform(X)]


def features_from_a_cache(folder):
    """Return the features of a miss, a hit and another layer."""
    X, _ = flowers(2)
    transformer = squeezenet(precision="float32", cache=folder)
    found = [transformer.fit_transform(X) for _ in range(2)]
    return [*found, transformer.set_params(layer="fire4").fit_transform(X)]


def features_of_kinds():
    """Return the features of arrays, PIL images and duplicates."""
    from PIL import Image

    X, _ = flowers(1)
    images = [Image.open(path).convert("RGB") for path in X[:5]]
    arrays = [np.asarray(image) for image in images]
    transformer = squeezenet(precision="float32", batch_size=3)
    return [
        transformer.fit_transform(kind) for kind in (images, arrays, [*images, *arrays])
    ]


def features_of_a_random_network(backbone):
    """Return the features of a network with random weights."""
    from skltl import CNNFeatureTransformer

    X, _ = flowers(1)
    transformer = CNNFeatureTransformer(
        backbone, weights=None, random_state=0, precision="float32"
    )
    return [transformer.fit_transform(X[:4])]


def fine_tuning(**parameters):
    """Return losses and probabilities of a fine-tuned network."""
    from skltl import FineTunedCNNClassifier

    X, y = digits()
    settings = {
        "layer": "block3",
        "image_shape": (8, 8),
        "image_size": 32,
        "head_epochs": 2,
        "finetune_epochs": 2,
        "random_state": 0,
        "precision": "float32",
        **parameters,
    }
    classifier = FineTunedCNNClassifier("tiny", **settings).fit(X, y)
    losses = [epoch["loss"] for epoch in classifier.history_]
    return [losses, classifier.predict_proba(X[:50])]


def flipped(image):
    """Flip an image from left to right, or not."""
    import torch

    return image.flip(-1) if torch.rand(()) < 0.5 else image


def pretrained():
    """Return the probabilities of ImageNet's classes."""
    from skltl import PretrainedCNNClassifier

    X, _ = flowers(1)
    weights = DATA / "weights" / "squeezenet1_0_imagenet.safetensors"
    classifier = PretrainedCNNClassifier(
        "squeezenet1_0", weights=weights, precision="float32"
    )
    return [classifier.fit(X).predict_proba(X)]


def strategy(is_advisor):
    """Return the scores of an advisor, or the predictions of what it advises."""
    from skltl import CNNFeatureTransformer, StrategyAdvisor, TransferClassifier

    X, y = digits()
    kind = StrategyAdvisor if is_advisor else TransferClassifier
    parameters = {"image_shape": (8, 8), "image_size": 32, "precision": "float32"}
    try:
        estimator = kind(CNNFeatureTransformer("tiny", **parameters), random_state=0)
        estimator.fit(X, y)
    except (TypeError, ValueError):  # 0.1.0 takes the parameters themselves
        estimator = kind("tiny", **parameters, random_state=0).fit(X, y)
    if is_advisor:
        return [list(estimator.layer_scores_.values())]
    return [estimator.predict(X)]


def pipeline():
    """Return the decisions of a linear classifier on frozen features."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    X, y = flowers(4)
    steps = (
        squeezenet(precision="float32"),
        StandardScaler(),
        LinearSVC(C=0.01, random_state=0),
    )
    return [make_pipeline(*steps).fit(X, y).decision_function(X)]


JOBS = {
    "features, float32": lambda _: features_of_files("float32"),
    "features, bfloat16": lambda _: features_of_files("bfloat16"),
    "several layers": lambda _: features_of_files(
        "float32", layer=["fire2", "fire5", "features.6", "last"]
    ),
    "pooling avgmax": lambda _: features_of_files("float32", pooling="avgmax"),
    "pooling 2": lambda _: features_of_files("float32", pooling=2),
    "pooling flatten": lambda _: features_of_files("float32", pooling="flatten"),
    "decode fast": lambda _: features_of_files("float32", decode="fast"),
    "cache: miss, hit, layer": features_from_a_cache,
    "PIL, arrays, duplicates": lambda _: features_of_kinds(),
    "random resnet18": lambda _: features_of_a_random_network("resnet18"),
    "random densenet121": lambda _: features_of_a_random_network("densenet121"),
    "random googlenet": lambda _: features_of_a_random_network("googlenet"),
    "random efficientnet_b0": lambda _: features_of_a_random_network("efficientnet_b0"),
    "random convnext_tiny": lambda _: features_of_a_random_network("convnext_tiny"),
    "svm pipeline": lambda _: pipeline(),
    "fine-tuning": lambda _: fine_tuning(),
    "fine-tuning, last block": lambda _: fine_tuning(unfreeze=1),
    "fine-tuning, batch norm": lambda _: fine_tuning(unfreeze="batch_norm"),
    "fine-tuning, adamw": lambda _: fine_tuning(optimizer="adamw", hidden_units=(16,)),
    "fine-tuning, convolution": lambda _: fine_tuning(conv_channels=(8,)),
    "fine-tuning, early stop": lambda _: fine_tuning(early_stopping=True),
    "fine-tuning, 2 views": lambda _: fine_tuning(augment=flipped, n_views=2),
    "fine-tuning, free views": lambda _: fine_tuning(augment=flipped, n_views=None),
    "from scratch": lambda _: fine_tuning(weights=None, unfreeze="all"),
    "pretrained classifier": lambda _: pretrained(),
    "advisor's scores": lambda _: strategy(is_advisor=True),
    "transfer classifier": lambda _: strategy(is_advisor=False),
}


def run_job(name, is_unpacked):
    """Print the digests of a job's results as JSON."""
    import tempfile

    import torch

    torch.set_num_threads(1)
    if is_unpacked:
        try:
            from skltl.backbones import _packed
        except ImportError:
            pass
        else:
            _packed.can_pack = lambda _: False
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = JOBS[name](folder)
    print(json.dumps([digest(result) for result in results]))


def result_of(root, name, options):
    """Run a job with the package of a checkout; return its digests."""
    command = [sys.executable, "-P", __file__, "--job", name, *options]
    found = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(root).resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        return found.stderr.strip().splitlines()[-1]
    return json.loads(found.stdout.splitlines()[-1])


def main():
    """Compare all jobs, or run one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roots", nargs="*")
    parser.add_argument("--job")
    parser.add_argument("--unpacked", action="store_true")
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments.job, arguments.unpacked)
        return
    options = ["--unpacked"] if arguments.unpacked else []
    n_different = 0
    for name in JOBS:
        old, new = (result_of(root, name, options) for root in arguments.roots)
        is_same = old == new and isinstance(old, list)
        n_different += not is_same
        print(f"{name:26} {'same bits' if is_same else f'{old} / {new}'}", flush=True)
    print(f"{len(JOBS) - n_different} of {len(JOBS)} jobs give the same bits")


if __name__ == "__main__":
    main()

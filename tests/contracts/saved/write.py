"""Write the files that `test_saved_files.py` reads: estimators saved by a release.

Run once for each release, which must still read the files of the one before:
``python tests/contracts/saved/write.py``.
"""

import pickle
from pathlib import Path

import numpy as np
import skops.io

from skltl import CNNFeatureTransformer, FineTunedCNNClassifier, __version__

FOLDER = Path(__file__).parent
EXACT = {"precision": "float32", "engine": "torch", "device": "cpu"}
SMALL = {"layer": "stem", "image_size": 16, "random_state": 0, **EXACT}


def saved_images():
    """Return eight images with gradients, and labels of two classes."""
    ramp = np.arange(16, dtype=np.uint8) * 15
    images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        image[..., index % 3] = ramp if index % 2 else ramp[:, None]
        image[..., (index + 1) % 3] = 30 * index
    return images, np.array(["columns", "rows"])[np.arange(8) % 2]


def write(release):
    """Write fitted estimators as pickle and skops files, and their outputs."""
    X, y = saved_images()
    transformer = CNNFeatureTransformer("tiny", pooling="avgmax", **SMALL).fit(X)
    classifier = FineTunedCNNClassifier(
        "tiny",
        head_epochs=2,
        finetune_epochs=1,
        unfreeze="all",
        **SMALL,
    ).fit(X, y)
    with (FOLDER / f"{release}.pickle").open("wb") as file:
        pickle.dump((transformer, classifier), file, protocol=4)
    skops.io.dump((transformer, classifier), FOLDER / f"{release}.skops")
    np.savez(
        FOLDER / f"{release}.npz",
        features=transformer.transform(X),
        proba=classifier.predict_proba(X),
    )


if __name__ == "__main__":
    write(__version__.removesuffix(".dev0"))

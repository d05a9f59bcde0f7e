"""
From a folder to a model
========================

The images of each class are in a folder of their own. They are loaded, classified with
the features of a pretrained network, and the mistakes are displayed. The user guide has
the same steps with more explanations (:doc:`/guide/folder_to_model`).
"""

# %%
# A folder of images
# ------------------
# The example creates a folder of class folders: small parts of the two photographs that
# scikit-learn includes. In practice, this is where your images are.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import GridSearchCV, train_test_split

from skltl import (
    GradCAMDisplay,
    LayerScoresDisplay,
    PredictionGridDisplay,
    list_layers,
    load_image_folder,
    make_feature_pipeline,
)

temple, dahlia = load_sample_images().images
regions = {  # a photograph; top, bottom, left and right of a part of it
    "dahlia": (dahlia, 70, 360, 170, 450),
    "leaves": (dahlia, 0, 427, 0, 170),
    "sky": (temple, 0, 200, 330, 640),
    "temple": (temple, 70, 410, 70, 350),
    "trees": (temple, 270, 427, 330, 640),
}
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
rng = np.random.default_rng(0)
for name, (photograph, top, bottom, left, right) in regions.items():
    (folder / name).mkdir()
    for number in range(40):
        y, x = rng.integers(top, bottom - 40), rng.integers(left, right - 40)
        image = Image.fromarray(photograph[y : y + 40, x : x + 40])
        image.save(folder / name / f"{number:02}.jpg")

# %%
# Paths and labels
# ----------------
# `load_image_folder` returns the paths of the images, and a class for each of them.

images = load_image_folder(folder)
X, y = images.data, np.array(images.target_names)[images.target]
print(f"{len(X)} images in {len(images.target_names)} classes")

_, axes = plt.subplots(1, 5, figsize=(8, 2), layout="constrained")
for ax, name in zip(axes, images.target_names, strict=True):
    ax.imshow(Image.open(X[y == name][0]))
    ax.set(title=name, xticks=[], yticks=[])

# %%
# Train and test
# --------------
# Ten images of each class are for training. The layer at which the network is truncated
# is chosen by cross-validation, with a cache in which features are stored: each image
# goes through the network once. (The images overlap, so their scores are too high.)

X_train, X_test, y_train, y_test = train_test_split(
    X, y, train_size=50, stratify=y, random_state=0
)
classifier = make_feature_pipeline("tiny", "softmax", cache=folder / ".features")
layers = [layer.name for layer in list_layers("tiny")]
search = GridSearchCV(classifier, {"feat__layer": layers}, cv=5).fit(X_train, y_train)
print(f"best layer: {search.best_params_['feat__layer']}")
print(f"accuracy on test images: {search.score(X_test, y_test):.3f}")

LayerScoresDisplay.from_search(search)

# %%
# What is wrong, and why
# ----------------------
# The displays of scikit-learn take predictions, and those of skltl the images as well:
# the worst predictions first, and what some of them are made from.

ConfusionMatrixDisplay.from_estimator(search, X_test, y_test)
PredictionGridDisplay.from_estimator(search, X_test, y_test)

# %%

first = [np.flatnonzero(y_test == name)[0] for name in images.target_names]
GradCAMDisplay.from_estimator(search, X_test[first])

# %%

temporary.cleanup()

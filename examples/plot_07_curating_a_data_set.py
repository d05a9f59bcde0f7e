"""
Duplicates, wrong labels and outliers
=====================================

Copies on both sides of a split make scores too high, wrong labels make them too low,
and images of something else belong in no class. This example plants all three among
parts of the two photographs of scikit-learn, and finds them by the features of a
network.
"""

# %%
# Images with known faults
# ------------------------
# 60 parts of two photographs, six smaller copies of them, three wrong labels, and a
# drawing.

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.model_selection import GroupKFold, cross_val_score

from skltl import (
    CNNFeatureTransformer,
    FeatureMapDisplay,
    ImageGridDisplay,
    ImageNeighbors,
    find_duplicates,
    find_label_errors,
    find_outliers,
    make_feature_pipeline,
)

rng = np.random.default_rng(0)
X, y = [], []
for photograph, name in zip(
    load_sample_images().images, ["temple", "dahlia"], strict=True
):
    corners = rng.integers(0, np.array(photograph.shape[:2]) - 100, size=(30, 2))
    X += [photograph[top : top + 100, left : left + 100] for top, left in corners]
    y += [name] * 30
copied = [3, 9, 21, 33, 45, 57]
X += [np.asarray(Image.fromarray(X[index]).resize((70, 70))) for index in copied]
y += [y[index] for index in copied]
for index in (5, 17, 48):
    y[index] = "dahlia" if y[index] == "temple" else "temple"
drawing = np.full((100, 100, 3), 255, dtype=np.uint8)
drawing[::10] = 0
X, y = [*X, drawing], np.array([*y, "temple"])

transformer = CNNFeatureTransformer("tiny")

# %%
# A map of the features
# ---------------------
# Images with similar features are near each other. Frames have the color of the label:
# one of another color than its neighbors is suspicious.

FeatureMapDisplay.from_estimator(transformer, X, y)

# %%
# Duplicates
# ----------
# Pairs of copies, the nearest ones first. Parts of a photograph overlap, so that some
# of them are near duplicates, too.

duplicates = find_duplicates(X, transformer)
ImageGridDisplay.from_duplicates(X, duplicates)

# %%
# Their groups stay on one side of each split.

classifier = make_feature_pipeline("tiny", "softmax")
folds = GroupKFold(5, shuffle=True, random_state=0)
scores = cross_val_score(classifier, X, y, cv=folds, groups=duplicates.groups)
print(f"accuracy with the wrong labels: {scores.mean():.3f}")

# %%
# Images that are in a test set, too, are found in the same way.

X_test = [X[index] for index in (2, 30)] + [np.rot90(X[40])]
leaks = find_duplicates(X, transformer, other=X_test, max_distance=0)
print(f"in the test set, too: {[(pair.first, pair.second) for pair in leaks.pairs]}")
ImageGridDisplay.from_duplicates(X, leaks, other=X_test)

# %%
# Wrong labels
# ------------
# The most doubtful labels, and the class that is suggested instead, with the
# cross-validated probabilities of both. Suspects are red.

errors = find_label_errors(X, y, transformer, groups=duplicates.groups)
ImageGridDisplay.from_label_errors(X, y, errors, n_images=6)

# %%
# Outliers
# --------
# The most unusual images, with their distance to the others in relation to the usual
# one.

outliers = find_outliers(X, transformer)
ImageGridDisplay.from_outliers(X, outliers, n_images=6)

# %%
# Look-alikes
# -----------
# Two images, each with the images most like it and their distances.

index = ImageNeighbors(transformer, n_neighbors=5).fit(X)
ImageGridDisplay.from_neighbors(index, X, indices=[12, 40])

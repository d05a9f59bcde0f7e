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

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.model_selection import GroupKFold, cross_val_score

from skltl import (
    CNNFeatureTransformer,
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


def show(indices, titles):
    """Plot some of the images."""
    _, axes = plt.subplots(1, len(indices), figsize=(9, 1.8), layout="constrained")
    for ax, index, title in zip(axes, indices, titles, strict=True):
        ax.imshow(X[index])
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize="small")


# %%
# Duplicates
# ----------
# Pairs of copies, the nearest ones first. Parts of a photograph overlap, so that some
# of them are near duplicates, too.

duplicates = find_duplicates(X, transformer)
pairs = duplicates.pairs[:4]
show(
    [index for pair in pairs for index in pair[:2]],
    [f"{index}\n{pair.distance:.3f}" for pair in pairs for index in pair[:2]],
)

# %%
# Their groups stay on one side of each split.

classifier = make_feature_pipeline("tiny", "softmax")
folds = GroupKFold(5, shuffle=True, random_state=0)
scores = cross_val_score(classifier, X, y, cv=folds, groups=duplicates.groups)
print(f"accuracy with the wrong labels: {scores.mean():.3f}")

# %%
# Wrong labels
# ------------
# The most doubtful labels, and the class that is suggested instead.

errors = find_label_errors(X, y, transformer, groups=duplicates.groups)
first = errors.order[:6]
show(first, [f"{index}: {y[index]}?\n{errors.suggested[index]}" for index in first])

# %%
# Outliers
# --------
# The most unusual images, with their distance to the others in relation to the usual
# one.

outliers = find_outliers(X, transformer)
first = outliers.order[:6]
show(first, [f"{index}\n{outliers.scores[index]:.2f}" for index in first])

# %%
# Look-alikes
# -----------
# An image and the images most like it.

index = ImageNeighbors(transformer, n_neighbors=5).fit(X)
distances, indices = index.kneighbors([X[12]])
show([12, *indices[0]], ["12", *(f"{distance:.3f}" for distance in distances[0])])

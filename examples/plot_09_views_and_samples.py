"""
Several views of an image, several images of a sample
=====================================================

Features become less random if they are averaged: over mirror images and crops of one
image, or over several images of the same thing. Neither needs any training of the
network. In this example, small noisy parts of the two photographs of scikit-learn are
assigned to their photograph.
"""

# %%
# Images
# ------
# 100 parts of each photograph for training, and 100 for the test: gray, of the same
# brightness and contrast, and with noise, so that the task is difficult. Those of the
# test come from the right half, and none of them overlaps with one of training.

import numpy as np
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skltl import CNNFeatureTransformer, ImageSetTransformer

N, SIDE = 100, 32
rng = np.random.default_rng(0)


def draw_parts(photograph, first, last):
    """Return random parts between two columns of a photograph."""
    tops = rng.integers(0, photograph.shape[0] - SIDE, N)
    lefts = rng.integers(first, last - SIDE, N)
    for top, left in zip(tops, lefts, strict=True):
        part = photograph[top : top + SIDE, left : left + SIDE].mean(axis=2)
        part = 128 + 30 * (part - part.mean()) / (part.std() + 1)
        part += rng.normal(0, 30, part.shape)
        yield part.clip(0, 255).astype(np.uint8)


photographs = load_sample_images().images
X_train = [part for one in photographs for part in draw_parts(one, 0, 320)]
X_test = [part for one in photographs for part in draw_parts(one, 320, 640)]
y = np.repeat(["temple", "dahlia"], N)

fig, axes = plt.subplots(2, 8, figsize=(8, 2.2))
for ax, index in zip(axes.flat, [*range(8), *range(N, N + 8)], strict=True):
    ax.imshow(X_train[index], cmap="gray")
    ax.set_axis_off()

# %%
# Views
# -----
# The features of an image and of its mirror image, or those of five crops and their
# mirror images, are averaged. The network runs 2 and 10 times.


def make_classifier(transformer):
    """Return a pipeline of a transformer and softmax regression."""
    return make_pipeline(
        transformer, StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)
    )


for n_views in (1, 2, 10):
    transformer = CNNFeatureTransformer(
        "tiny", layer="block3", image_size=32, n_views=n_views
    )
    accuracy = make_classifier(transformer).fit(X_train, y).score(X_test, y)
    print(f"views: {n_views:2}, accuracy: {accuracy:.3f}")

# %%
# Samples of several images
# -------------------------
# A sample is a sequence of images, of any length. Its features are the averages, or the
# maxima, of those of its images. Here, the classifier is fitted to single images, and
# predicts from 1, 2, 5 and 10 parts of a photograph.

transformer = CNNFeatureTransformer("tiny", layer="block3", image_size=32)
classifier = make_classifier(ImageSetTransformer(transformer))
classifier.fit([[image] for image in X_train], y)
for n_images in (1, 2, 5, 10):
    starts = range(0, len(X_test), n_images)
    samples = [X_test[start : start + n_images] for start in starts]
    accuracy = classifier.score(samples, y[::n_images])
    print(f"images of a sample: {n_images:2}, accuracy: {accuracy:.3f}")

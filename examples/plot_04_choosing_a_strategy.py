"""
Choosing a strategy
===================

Should a pretrained network be used without training, to extract features at its last or
at an earlier layer, or be fine-tuned? The textbook answer depends on the size of the
data set and on its similarity to the pretraining data. The size is known, and the
similarity can be estimated. The user guide explains the strategies and their names
(:doc:`/guide/strategy`).
"""

# %%
# Images that are similar to the pretraining data
# -----------------------------------------------
# The classes are two photographs, and the images are patches of them.

import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

from skltl import (
    CNNFeatureTransformer,
    StrategyAdvisor,
    StrategyDisplay,
    TransferClassifier,
    make_feature_pipeline,
    recommend_strategy,
)

rng = np.random.default_rng(0)
photographs = load_sample_images().images
names = ["temple", "dahlia"]
patches, patch_labels = [], []
for photograph, name in zip(photographs, names, strict=True):
    corners = rng.integers(0, np.array(photograph.shape[:2]) - 48, size=(60, 2))
    patches += [photograph[y : y + 48, x : x + 48] for y, x in corners]
    patch_labels += [name] * len(corners)

transformer = CNNFeatureTransformer("tiny")
advisor = StrategyAdvisor(transformer, random_state=0).fit(patches, patch_labels)
print(advisor.report())

# %%
# Images that differ from the pretraining data
# --------------------------------------------
# ImageNet has no handwritten digits, and 100 of them are a small data set.

digits, labels = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    digits / 16, labels, train_size=100, test_size=1000, stratify=labels, random_state=0
)
rows = {"image_shape": (8, 8), "image_size": 32}

transformer = CNNFeatureTransformer("tiny", **rows)
advisor = StrategyAdvisor(transformer, random_state=0).fit(X_train, y_train)
print(advisor.report())
StrategyDisplay.from_advisor(advisor)

# %%
# Fitting the recommended estimator
# ---------------------------------
# ``TransferClassifier`` evaluates the layers on the training data and fits the
# recommended estimator.

classifier = TransferClassifier(transformer, random_state=0).fit(X_train, y_train)
last = make_feature_pipeline("tiny", "svm", **rows).fit(X_train, y_train)

print(f"{classifier.strategy_.name}: {classifier.score(X_test, y_test):.3f}")
print(f"last layer: {last.score(X_test, y_test):.3f}")

# %%
# The rules alone
# ---------------
# ``recommend_strategy`` applies the rules to a known size and similarity. The cost of a
# fit is given in forward passes over the data.

for n_images in (200, 5_000, 500_000):
    for similarity in ("similar", "different"):
        strategy = recommend_strategy(
            n_images, 10, similarity, transformer=CNNFeatureTransformer("tiny")
        )
        cost = f"{strategy.n_passes:g} passes"
        print(f"{n_images:>8,} {similarity:<10} {strategy.name:<14} {cost}")

# %%
# The estimator of a strategy is configured but not fitted; its parameters can be
# changed.

print(strategy.estimator)

"""
Choosing a strategy
===================

Use a network as it is, classify by its last features, by earlier ones, fine-tune it,
or train anew? Textbooks answer with four boxes: are the images few or many, like or
unlike those that the network knows? The first one can count, the second can be
measured.
"""

# %%
# Images like those the network knows
# -------------------------------------
# Patches of two photographs: which of the two is it?

import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

from skltl import (
    StrategyAdvisor,
    StrategyDisplay,
    TransferClassifier,
    make_feature_pipeline,
    recommend_strategy,
)

rng = np.random.default_rng(0)
photographs = load_sample_images().images
names = ["temple", "dahlia"]
patches, shows = [], []
for photograph, name in zip(photographs, names, strict=True):
    corners = rng.integers(0, np.array(photograph.shape[:2]) - 48, size=(60, 2))
    patches += [photograph[y : y + 48, x : x + 48] for y, x in corners]
    shows += [name] * len(corners)

advisor = StrategyAdvisor("tiny", random_state=0).fit(patches, shows)
print(advisor.report())

# %%
# Images unlike those
# ---------------------
# Handwritten digits look like nothing in ImageNet, and 100 of them are few.

digits, labels = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    digits / 16, labels, train_size=100, test_size=1000, stratify=labels, random_state=0
)
images = {"image_shape": (8, 8), "image_size": 32}

advisor = StrategyAdvisor("tiny", random_state=0, **images).fit(X_train, y_train)
print(advisor.report())
StrategyDisplay.from_advisor(advisor)

# %%
# Advice that is taken at once
# ----------------------------
# ``TransferClassifier`` measures on the training images and then is what was advised.

classifier = TransferClassifier("tiny", random_state=0, **images)
classifier.fit(X_train, y_train)
last = make_feature_pipeline("tiny", "svm", **images).fit(X_train, y_train)

print(f"{classifier.strategy_.name}: {classifier.score(X_test, y_test):.3f}")
print(f"at the last cut: {last.score(X_test, y_test):.3f}")

# %%
# Without measuring
# -----------------
# The rules alone need two numbers and a word.

for n_images in (200, 5_000, 500_000):
    for similarity in ("similar", "different"):
        strategy = recommend_strategy(n_images, 10, similarity, backbone="tiny")
        cost = f"{strategy.n_passes:g} passes"
        print(f"{n_images:>8,} {similarity:<10} {strategy.name:<14} {cost}")

# %%
# The estimators are configured, and ready to be changed.

print(recommend_strategy(200, 10, "similar", backbone="tiny").estimator)

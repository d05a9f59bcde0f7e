"""
Fine-tuning in two stages
=========================

Frozen features are what a network learned from other images. With enough images of
one's own it can learn from them, too: first new layers alone, on the frozen network;
then the network's last blocks together with them, at a rate of their own.

What frozen blocks give for an image does not change from epoch to epoch. It is
computed once, so an epoch of the first stage costs next to nothing.
"""

# %%
# Frozen features
# ---------------
# The digits again, 1,000 of them for training. A linear classifier on frozen features
# is what fine-tuning has to beat.

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skltl import (
    FineTunedCNNClassifier,
    TrainingHistoryDisplay,
    make_feature_pipeline,
)

digits, labels = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    digits / 16, labels, train_size=1000, stratify=labels, random_state=0
)
images = {"image_shape": (8, 8), "image_size": 32}

frozen = make_feature_pipeline("tiny", "softmax", layer="block3", **images)
print(f"frozen features: {frozen.fit(X_train, y_train).score(X_test, y_test):.3f}")

# %%
# Two stages
# ----------
# Digits are far from the photographs that the network knows, so its layers may change
# faster than by default, and the first stage is short. A tenth of the training images
# is held out, only to look at.

tuned = FineTunedCNNClassifier(
    "tiny",
    layer="block3",
    unfreeze="all",
    head_epochs=5,
    finetune_epochs=15,
    backbone_lr=0.03,
    validation_fraction=0.1,
    random_state=0,
    **images,
)
print(f"fine-tuned: {tuned.fit(X_train, y_train).score(X_test, y_test):.3f}")

# %%
# Epoch by epoch
# --------------
# ``history_`` has one plain record for each epoch.

TrainingHistoryDisplay.from_estimator(tuned, rates=True)

# %%
# What the network has learned is of use elsewhere: ``transform`` gives the tuned
# features, and ``to_transformer`` a transformer for any pipeline.

print(tuned.to_transformer().transform(X_test).shape)

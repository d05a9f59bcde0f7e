"""
Fine-tuning in two stages
=========================

Frozen features were learned from other images. With enough labeled images, the network
can be fine-tuned on them. `FineTunedCNNClassifier` first trains a head on the frozen
network, then the head and the last blocks of the network together, with separate
learning rates.

The outputs of frozen blocks do not change between epochs. They are computed once, so
that an epoch of the head stage is almost free.
"""

# %%
# Baseline: frozen features
# -------------------------
# A linear classifier on frozen features is the baseline for fine-tuning. It is trained
# on 1,000 handwritten digits.

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
# Digits are unlike the photographs that the network was trained on. All blocks are
# therefore unfrozen, with a learning rate above the default, after a short head stage.
# A tenth of the training images is held out; its scores are only monitored here.

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
# Training history
# ----------------
# The attribute ``history_`` has one dictionary for each epoch.

TrainingHistoryDisplay.from_estimator(tuned, learning_rates=True)

# %%
# The fine-tuned network is also a feature extractor: ``transform`` returns its
# features, and ``to_transformer`` returns a fitted transformer for any pipeline.

print(tuned.to_transformer().transform(X_test).shape)

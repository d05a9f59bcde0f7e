"""
Before and after transfer
=========================

What does a pretrained network gain over one that begins with random numbers? A higher
start, a higher slope, and a higher asymptote. Both networks here are the same, and
learn from the same 200 digits for the same number of epochs.
"""

# %%
# Twice the same network
# ----------------------
# A quarter of the images is held out, to be scored after each epoch.

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skltl import FineTunedCNNClassifier, PredictionGridDisplay, TransferGainDisplay

digits, labels = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    digits / 16, labels, train_size=200, stratify=labels, random_state=0
)
settings = {
    "layer": "block3",
    "unfreeze": "all",
    "head_init": "random",
    "head_epochs": 0,
    "finetune_epochs": 15,
    "schedule": "cosine",
    "validation_fraction": 0.25,
    "image_shape": (8, 8),
    "image_size": 32,
    "random_state": 0,
}
with_transfer = FineTunedCNNClassifier("tiny", **settings).fit(X_train, y_train)
from_scratch = FineTunedCNNClassifier("tiny", weights=None, **settings)
from_scratch.fit(X_train, y_train)

TransferGainDisplay.from_estimators(with_transfer, from_scratch)

# %%
# On images that neither has seen:

print(f"with transfer: {with_transfer.score(X_test, y_test):.3f}")
print(f"from scratch: {from_scratch.score(X_test, y_test):.3f}")

# %%
# What is still wrong
# -------------------
# The digits about which the network with transfer is most mistaken.

PredictionGridDisplay.from_estimator(with_transfer, X_test, y_test)

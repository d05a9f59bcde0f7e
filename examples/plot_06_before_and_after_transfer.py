"""
Transfer learning and training from scratch
===========================================

Compared with random initialization, pretrained weights may give a higher start, a
higher slope and a higher asymptote of the learning curve. Here, the same network is
trained on the same 200 digits for the same number of epochs, once from pretrained and
once from random weights.
"""

# %%
# Learning curves
# ---------------
# A quarter of the images is the validation set, which is scored after each epoch.

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
# Accuracy on the test set:

print(f"with transfer: {with_transfer.score(X_test, y_test):.3f}")
print(f"from scratch: {from_scratch.score(X_test, y_test):.3f}")

# %%
# Remaining errors
# ----------------
# The test images with the most confident wrong predictions of the network with
# transfer.

PredictionGridDisplay.from_estimator(with_transfer, X_test, y_test)

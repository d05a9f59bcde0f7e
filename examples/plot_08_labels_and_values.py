"""
Labels and values
=================

An image may have several labels, or none, and it may have values instead of a class.
Both are targets of linear models on frozen features, and of fine-tuned networks.
"""

# %%
# Multilabel classification
# -------------------------
# Three properties of handwritten digits are the columns of an indicator matrix.

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skltl import (
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PredictionGridDisplay,
    TrainingHistoryDisplay,
    make_feature_pipeline,
)

digits, classes = load_digits(return_X_y=True)
digits = digits / 16
labels = np.column_stack(
    [classes % 2 == 0, classes > 4, np.isin(classes, [0, 6, 8, 9])]
)
names = ["even", "above 4", "with a loop"]
train, test = train_test_split(
    np.arange(len(digits)), train_size=300, stratify=classes, random_state=0
)
images = {"layer": "block3", "image_shape": (8, 8), "image_size": 32}

frozen = make_feature_pipeline("tiny", "softmax", **images)
frozen.fit(digits[train], labels[train].astype(int))
tuned = FineTunedCNNClassifier("tiny", unfreeze=1, random_state=0, **images)
tuned.fit(digits[train], labels[train].astype(int))
for name, model in [("frozen", frozen), ("fine-tuned", tuned)]:
    predicted = model.predict(digits[test]) > 0
    rates = (predicted == labels[test]).mean(axis=0)
    print(name, dict(zip(names, rates.round(3).tolist(), strict=True)))

# %%
# The worst predictions: the labels that are predicted, the true ones, and the
# probability of the label with the largest error.

proba = tuned.predict_proba(digits[test])
PredictionGridDisplay.from_predictions(
    labels[test], proba, digits[test], classes=names, image_shape=(8, 8), n_images=6
)

# %%
# Regression
# ----------
# The value is the angle by which an image was rotated, from -45 to 45 degrees.

rng = np.random.default_rng(0)
angles = rng.uniform(-45, 45, size=len(digits))
rotated = np.array(
    [
        np.asarray(
            Image.fromarray(row.reshape(8, 8).astype(np.float32)).rotate(angle, 2)
        )
        for row, angle in zip(digits, angles, strict=True)
    ]
).clip(0, 1)
rotated = rotated.reshape(len(rotated), 64)

ridge = make_feature_pipeline("tiny", regressor="ridge", **images)
ridge.fit(rotated[train], angles[train])
regressor = FineTunedCNNRegressor(
    "tiny", unfreeze=1, validation_fraction=0.2, random_state=0, **images
)
regressor.fit(rotated[train], angles[train])
print(f"R² of ridge regression: {ridge.score(rotated[test], angles[test]):.3f}")
print(
    f"R² of the fine-tuned network: {regressor.score(rotated[test], angles[test]):.3f}"
)

# %%

_, ax = plt.subplots(figsize=(4, 4), layout="constrained")
ax.scatter(angles[test], regressor.predict(rotated[test]), s=4)
ax.plot([-45, 45], [-45, 45], color="gray")
ax.set(xlabel="angle", ylabel="predicted angle")

# %%
# The largest errors:

PredictionGridDisplay.from_estimator(regressor, rotated[test], angles[test], n_images=6)

# %%
# The score of each epoch is R².

TrainingHistoryDisplay.from_estimator(regressor)

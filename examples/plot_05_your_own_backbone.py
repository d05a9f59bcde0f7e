"""
Your own backbone
=================

Any torch network that is a sequence of blocks can be a backbone: cut at each of them,
saved with what uses it, searched over. Here a small one learns the digits from 0 to 4,
and what it has learned serves to tell those from 5 to 9 apart.
"""

# %%
# A network of one's own
# ----------------------
# Blocks under names, and a head. How it was trained is its own affair.

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from skltl import (
    Backbone,
    GradCAMDisplay,
    Preprocessing,
    PretrainedCNNClassifier,
    list_layers,
    make_feature_pipeline,
)


def block(n_in, n_out):
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()
    )


torch.manual_seed(0)
blocks = {
    "stem": block(3, 16),
    "middle": nn.Sequential(block(16, 32), nn.MaxPool2d(2)),
    "top": block(32, 32),
}
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))

rows, labels = load_digits(return_X_y=True)
known = labels < 5
batch = torch.tensor(rows[known] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
batch, targets = batch.expand(-1, 3, -1, -1), torch.tensor(labels[known])
network = nn.Sequential(*blocks.values(), head)
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for _ in range(60):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(batch), targets)
    loss.backward()
    optimizer.step()

# %%
# It becomes a backbone with what images go through before it.

preprocessing = Preprocessing(8, mean=(0, 0, 0), std=(1, 1, 1))
backbone = Backbone.from_blocks("mine", blocks, head, preprocessing=preprocessing)
for layer in list_layers(backbone):
    print(layer.name, layer.channels, layer.stride)

# %%
# As it is
# --------
# It tells the digits apart that it knows.

as_is = PretrainedCNNClassifier(backbone, image_shape=(8, 8))
as_is.fit(rows[known] / 16)
print(f"{(as_is.predict(rows[known] / 16) == labels[known]).mean():.3f}")

# %%
# Digits that it has never seen
# -----------------------------
# Its features tell these apart, too; which of its blocks does it best?

X_train, X_test, y_train, y_test = train_test_split(
    rows[~known] / 16, labels[~known], train_size=100, random_state=0
)
pipelines = {
    layer.name: make_feature_pipeline(
        backbone, "svm", layer=layer.name, image_shape=(8, 8)
    ).fit(X_train, y_train)
    for layer in list_layers(backbone)
}
for name, pipeline in pipelines.items():
    print(f"{name}: {pipeline.score(X_test, y_test):.3f}")

# %%
# Where does it look? The map is laid over the image.

some = np.array([np.flatnonzero(y_test == digit)[0] for digit in range(5, 10)])
GradCAMDisplay.from_estimator(pipelines["top"], X_test[some], n_columns=5)

"""
Custom backbones
================

Any torch network from images to logits or features can be used as a backbone. In this
example, a small network is trained on the digits from 0 to 4, and its features are used
to classify the digits from 5 to 9.
"""

# %%
# Train a network
# ---------------
# The network is an ordinary module, with a residual connection. It can be trained in
# any way; here with a plain torch loop.

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


def conv(n_in, n_out):
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()
    )


class DigitNet(nn.Module):
    """Two blocks, a residual block, and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.middle = nn.Sequential(conv(16, 32), nn.MaxPool2d(2))
        self.top = conv(32, 32)
        self.classifier = nn.Linear(32, 5)

    def forward(self, batch):
        """Return the logits (n, 5)."""
        hidden = self.middle(self.stem(batch))
        hidden = hidden + self.top(hidden)
        return self.classifier(hidden.mean(dim=(2, 3)))


rows, labels = load_digits(return_X_y=True)
is_low = labels < 5
low_rows, low_labels = rows[is_low] / 16, labels[is_low]
batch = torch.tensor(low_rows, dtype=torch.float32).reshape(-1, 1, 8, 8)
batch, targets = batch.expand(-1, 3, -1, -1), torch.tensor(low_labels)
torch.manual_seed(0)
network = DigitNet()
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for _ in range(60):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(batch), targets)
    loss.backward()
    optimizer.step()

# %%
# `~skltl.Backbone.from_module` traces the network, and splits it into blocks where a
# single tensor connects what comes before and after. It needs the preprocessing of
# images and the path of the module that returns the logits. ``layers`` names the main
# layers: here the outputs of two modules, and the sum of the residual connection.

backbone = Backbone.from_module(
    "digits",
    network,
    preprocessing=Preprocessing(8, mean=(0, 0, 0), std=(1, 1, 1)),
    head="classifier",
    layers={"stem": "stem", "middle": "middle", "sum": "add"},
)
for layer in list_layers(backbone):
    print(layer.name, layer.channels, layer.stride)

# %%
# Use it as a pretrained classifier
# ---------------------------------
# With its own head, the network classifies the digits that it was trained on.

pretrained = PretrainedCNNClassifier(backbone, image_shape=(8, 8)).fit(low_rows)
print(f"{(pretrained.predict(low_rows) == low_labels).mean():.3f}")

# %%
# Transfer to other classes
# -------------------------
# The features of each main layer are evaluated on the digits from 5 to 9, with 100
# images for training.

X_train, X_test, y_train, y_test = train_test_split(
    rows[~is_low] / 16, labels[~is_low], train_size=100, random_state=0
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
# Grad-CAM shows the regions of the images that contribute to the predicted class.

first = np.unique(y_test, return_index=True)[1]
GradCAMDisplay.from_estimator(pipelines["middle"], X_test[first])

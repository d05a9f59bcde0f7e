"""
Features of a ConvNet and a linear model
========================================

A few images per class are not enough to train a ConvNet, but they are enough to train a
linear classifier on the features of a pretrained one. In this example, the images are
handwritten digits, 10 per class for training. The network is ``"tiny"``, which is
included in skltl and was pretrained on photographs of animals and objects.

The digits are rows of 64 values from 0 to 16; with ``image_shape=(8, 8)`` each row is
reshaped to an image. Since digits differ from photographs, the network is truncated at
an early layer, ``block3``: later layers are more specific to the pretraining data. For
images of 8 x 8 pixels, ``image_size=32`` is sufficient instead of the default 80.
"""

# %%
# Three linear classifiers on raw pixels and on features
# ------------------------------------------------------
# ``"svm"`` is a linear support vector machine, ``"softmax"`` multinomial and ``"ovr"``
# one-vs-rest logistic regression.

from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline

from skltl import make_feature_pipeline

digits, labels = load_digits(return_X_y=True)
digits = digits / 16

splits = StratifiedShuffleSplit(
    n_splits=5, train_size=100, test_size=1000, random_state=0
)

print(f"{'accuracy':<12}{'raw pixels':>12}{'features':>12}")
for classifier in ("svm", "softmax", "ovr"):
    pipeline = make_feature_pipeline(
        "tiny", classifier, layer="block3", image_shape=(8, 8), image_size=32
    )
    without_network = make_pipeline(*(step for _, step in pipeline.steps[1:]))
    on_pixels = cross_val_score(without_network, digits, labels, cv=splits).mean()
    on_features = cross_val_score(pipeline, digits, labels, cv=splits).mean()
    print(f"{classifier:<12}{on_pixels:>12.3f}{on_features:>12.3f}")

# %%
# Each pipeline is an ordinary scikit-learn estimator: ``fit``, ``predict``,
# ``cross_val_score`` and ``GridSearchCV`` work as usual. The images may also be a list
# of file paths.

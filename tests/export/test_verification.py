"""An export whose results differ from the estimator's is refused, with the figure."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from small_pipeline import pipeline

from skltl import make_feature_pipeline
from skltl.exceptions import ExportError
from skltl.export._parts import parts_of
from skltl.export._verification import predictions_of, verify


def swap_two(outputs):
    """Exchange the labels of two images, which differ."""
    key = "index" if "index" in outputs else "labels"
    found = outputs[key].copy()
    other = next(i for i in range(len(found)) if np.any(found[i] != found[0]))
    found[[0, other]] = found[[other, 0]]
    return outputs | {key: found}


def add_to_one_score(outputs):
    scores = outputs["scores"].copy()
    scores.flat[3] += 2e-3 * np.abs(scores).max()
    return outputs | {"scores": scores}


def lose_one_score(outputs):
    scores = outputs["scores"].copy()
    scores.flat[-1] = np.nan
    return outputs | {"scores": scores}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two, r"predicts \d+ of \d+ labels differently"),
        (add_to_one_score, r"scores of the file differ .* by"),
        (lose_one_score, "scores of the file differ .* by nan"),
        (
            lambda outputs: outputs | {"scores": outputs["scores"].T},
            r"of shape .* instead of",
        ),
        (
            lambda outputs: outputs | {"more": outputs["scores"]},
            "file returns .*more, .*, the estimator has ",
        ),
        (lambda outputs: {}, "file returns nothing, the estimator has "),
        (lambda outputs: {"scores": outputs["scores"]}, "file returns scores, the est"),
    ],
)
@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_differences_are_found(kind, change, message, request, training_images, labels):
    y = labels if kind == "classes" else request.getfixturevalue("indicators")
    model = LogisticRegression(C=1e-3)
    if kind == "labels":
        model = make_feature_pipeline(classifier="softmax")[-1]
    parts = parts_of(pipeline(model).fit(training_images, y))

    def run(crops):
        return predictions_of(parts, crops)

    verify(parts, run, training_images[:8], "file")
    with pytest.raises(ExportError, match=message):
        verify(parts, lambda crops: change(run(crops)), training_images[:8], "file")


def test_an_index_beyond_the_classes_is_found(training_images, labels):
    parts = parts_of(pipeline(LogisticRegression(C=1e-3)).fit(training_images, labels))

    def run(crops):
        found = predictions_of(parts, crops)
        return found | {"index": found["index"] + 10}

    with pytest.raises(ExportError, match="predicts 8 of 8 labels differently"):
        verify(parts, run, training_images[:8], "file")


def test_a_single_image_is_compared_too(training_images, labels):
    parts = parts_of(pipeline(LogisticRegression(C=1e-3)).fit(training_images, labels))

    def run(crops):
        found = predictions_of(parts, crops)
        return add_to_one_score(found) if len(crops) == 1 else found

    with pytest.raises(ExportError, match="scores of the file differ"):
        verify(parts, run, None, "file")

"""An advisor's measurements and advice in words."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from skltl.strategy._rules import LEAD_THAT_COUNTS

# More images pay if doubling their number raises accuracy by at least this.
GAIN_THAT_PAYS = 0.01

WIDTH = 80

SIMILARITIES = {
    "contained": "The classes are among the categories of the network.",
    "similar": "The images are similar to those of the pretraining: no earlier layer "
    "is better by 1 percentage point.",
    "different": "The images are different from those of the pretraining: an earlier "
    "layer is better by 1 percentage point or more.",
}


def write_report(advisor: Any) -> str:
    """Say what a fitted `StrategyAdvisor` has measured, and what follows from it."""
    strategy = advisor.strategy_
    times = {1: "", 2: ", twice"}.get(
        advisor.n_repeats_, f", {advisor.n_repeats_} times"
    )
    lines = [
        f"{advisor.n_images_:,} images of {advisor.n_classes_} classes, "
        f"{advisor.n_smallest_:,} of the smallest",
        f"({advisor.n_looked_at_:,} evaluated, in {advisor.n_folds_} folds{times})",
        "",
        "Accuracy of a linear classifier (and its standard error)",
        *_layers(advisor),
        *_sizes(advisor),
        *_as_is(advisor),
        "",
        _similarity(advisor),
        *_luck(advisor),
        "",
        f"Strategy: {strategy.name}",
        *(f"  {reason}" for reason in strategy.reasons),
        f"  Its fit costs about {_passes(strategy.n_passes)} over the data:",
    ]
    wrapped = [part for line in lines for part in _wrapped(line)]
    return "\n".join([*wrapped, f"  {strategy.code}"])


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return wrap(line, WIDTH, subsequent_indent=indent) or [""]


def _layers(advisor: Any) -> list[str]:
    lines = ["  by layer:"]
    for name, score in advisor.layer_scores_.items():
        mark = "  best" if name == advisor.best_layer_ else ""
        lines.append(
            f"    {name:<12} {score:.3f} ({advisor.layer_errors_[name]:.3f}){mark}"
        )
    if len(advisor.layer_scores_) == 1:
        return lines
    lead, error = advisor.lead_
    side = "ahead of" if lead > 0 else "behind"
    return [
        *lines,
        f"  The best earlier layer is {_points(abs(lead))} {side} the last one "
        f"(standard error {100 * error:.1f})."
        if lead
        else "  The best earlier layer is as good as the last one.",
    ]


def _sizes(advisor: Any) -> list[str]:
    if advisor.strategy_.name == "as_is":  # no images are trained on
        return []
    lines = [f"  at {advisor.layer_}, by number of training images:"]
    for size, score in advisor.size_scores_.items():
        lines.append(f"    {size:<12,} {score:.3f} ({advisor.size_errors_[size]:.3f})")
    if len(advisor.size_scores_) < 2:
        return [*lines, "  There are too few to say whether more would pay."]
    gain, error = advisor.gain_
    return [
        *lines,
        f"  The last doubling of their number changed it by {_points(gain, '+')} "
        f"(standard error {100 * error:.1f}):",
        f"  {_outlook(gain, error, list(advisor.size_scores_.values())[-1])}",
    ]


def _outlook(gain: float, error: float, score: float) -> str:
    """Say whether more images would pay: they cannot lift accuracy beyond 1."""
    if min(gain, 1 - score) < GAIN_THAT_PAYS:
        return "more images would change little."
    if gain <= error:
        return "whether more images would pay is open, the gain is within its error."
    return "more images would pay."


def _as_is(advisor: Any) -> list[str]:
    if advisor.as_is_score_ is None:
        return []
    return [
        "Accuracy of the pretrained classifier without training: "
        f"{advisor.as_is_score_:.3f} ({advisor.as_is_error_:.3f})"
    ]


def _similarity(advisor: Any) -> str:
    if len(advisor.layer_scores_) == 1 and advisor.similarity_ == "similar":
        return (
            "There is one layer only: whether the images are similar to those of the "
            "pretraining cannot be measured, it is assumed."
        )
    return SIMILARITIES[advisor.similarity_]


def _luck(advisor: Any) -> list[str]:
    """Say so if the measurement is too coarse for the choice that was made."""
    lead, error = advisor.lead_
    is_open = len(advisor.layer_scores_) > 1 and abs(lead - LEAD_THAT_COUNTS) < error
    if advisor.similarity_ == "contained" or not is_open:
        return []
    return ["This is within the standard error: luck may have decided."]


def _points(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} percentage points"


def _passes(n: float) -> str:
    return "1 forward pass" if n == 1 else f"{n:g} forward passes"

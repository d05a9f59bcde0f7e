"""An advisor's measurements and advice in words."""

from __future__ import annotations

from typing import Any

import numpy as np

# More pictures pay if doubling their number raises accuracy by at least this.
GAIN_THAT_PAYS = 0.01

SAID = {
    "contained": "The classes are among those that the network knows.",
    "similar": "The pictures are similar to those that the network knows: no earlier "
    "cut is better by a point.",
    "different": "The pictures are different from those that the network knows: an "
    "earlier cut is better by a point or more.",
}


def write_report(advisor: Any) -> str:
    """Say what a fitted `StrategyAdvisor` has measured, and what follows from it."""
    strategy = advisor.strategy_
    passes = "pass" if strategy.n_passes == 1 else "passes"
    return "\n".join(
        [
            f"{advisor.n_images_:,} pictures of {advisor.n_classes_} classes",
            f"({advisor.n_looked_at_:,} looked at, in {advisor.n_folds_} folds)",
            "",
            *_depths(advisor),
            "",
            *_sizes(advisor),
            "",
            *_as_is(advisor),
            SAID[advisor.similarity_],
            "",
            f"Strategy: {strategy.name}",
            *(f"  {reason}" for reason in strategy.reasons),
            f"  To fit it costs about {strategy.n_passes:g} {passes} of the network.",
        ]
    )


def _depths(advisor: Any) -> list[str]:
    lines = ["Accuracy of a linear classifier, by cut point:"]
    for name, score in advisor.layer_scores_.items():
        mark = "  best" if name == advisor.best_layer_ else ""
        lines.append(f"  {name:<12} {score:.3f}{mark}")
    lead, error = advisor.lead_
    side = "ahead of" if lead > 0 else "behind"
    lines.append(
        f"  The best earlier cut is {abs(lead):.3f} {side} the last one "
        f"(standard error {error:.3f})."
    )
    return lines


def _sizes(advisor: Any) -> list[str]:
    scores = {n: one for n, one in advisor.size_scores_.items() if np.isfinite(one)}
    lines = [f"Accuracy at {advisor.best_layer_}, by number of training pictures:"]
    lines += [f"  {n:<12,} {score:.3f}" for n, score in scores.items()]
    if len(scores) < 2:
        return [*lines, "  They are too few to say whether more would pay."]
    (n_before, before), (n_after, after) = list(scores.items())[-2:]
    gain = (after - before) / np.log2(n_after / n_before)
    pays = "more would pay" if gain >= GAIN_THAT_PAYS else "more would change little"
    return [*lines, f"  Each doubling gives about {gain:+.3f}: {pays}."]


def _as_is(advisor: Any) -> list[str]:
    if advisor.as_is_score_ is None:
        return []
    return [f"Accuracy of the network as it is: {advisor.as_is_score_:.3f}"]

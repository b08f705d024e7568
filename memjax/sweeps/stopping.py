"""Early stopping: which points of a sweep are not worth going on with.

A rule sees the curves of all points, (step, value) pairs of a metric that is to be small, and says
whether one of them should end. What it says depends on how far the others are at that moment.
"""

import bisect
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from memjax.config import check, check_at_least

Curve = Sequence[tuple[int, float]]
Metric = Literal["eval_loss", "loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Median:
    """End a point whose best value so far is worse than the median of the others at that step.

    The others count by the mean of their values up to the step. Points are compared at the last
    step of the point that `least` others have come to.

    start: no point ends before this step.
    Source: Golovin et al., "Google Vizier", KDD 2017, section 3.2.
    """

    metric: Metric = "eval_loss"
    start: int = 0
    least: int = 3

    def __post_init__(self):
        check_at_least(self, 0, "start")
        check_at_least(self, 1, "least")

    def ends(self, curves: Mapping[str, Curve], name: str) -> bool:
        """Whether point `name` should end now."""
        others = [curve for other, curve in curves.items() if other != name and curve]
        for step, _ in reversed(curves[name]):
            if step < self.start:
                return False
            reached = [curve for curve in others if curve[0][0] <= step <= curve[-1][0]]
            means = [statistics.fmean(v for at, v in curve if at <= step) for curve in reached]
            if len(means) >= self.least:
                best = min(value for at, value in curves[name] if at <= step)
                return best > statistics.median(means)
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
    """Asynchronous successive halving: at each rung only the best 1 / factor go on.

    Rungs are at `first`, first * factor, first * factor^2, ... steps. A point ends unless its value
    is among the best 1 / factor at the last rung that it and at least `factor` points, itself
    among them, have reached so far: one that runs ahead is held against the others all the same.
    Source: arXiv:1810.05934, the variant that stops trials.
    """

    metric: Metric = "eval_loss"
    first: int = 100
    factor: int = 3

    def __post_init__(self):
        check_at_least(self, 1, "first")
        check(self, "factor", self.factor >= 2, "must be at least 2")

    def ends(self, curves: Mapping[str, Curve], name: str) -> bool:
        """Whether point `name` should end now."""
        steps = curves[name][-1][0] if curves[name] else 0
        if steps < self.first:
            return False
        rung = self.first
        while rung * self.factor <= steps:
            rung *= self.factor
        while rung >= self.first:
            reached = {other: v for other, c in curves.items() if (v := _at(c, rung)) is not None}
            if kept := len(reached) // self.factor:
                return reached[name] > sorted(reached.values())[kept - 1]
            rung //= self.factor
        return False


def _at(curve: Curve, step: int) -> float | None:
    """The first value at or after a step; None before it is reached."""
    index = bisect.bisect_left([s for s, _ in curve], step)
    return curve[index][1] if index < len(curve) else None

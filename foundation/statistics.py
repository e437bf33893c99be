"""How sure a mean score is: 95 % intervals of one model, of two compared item by item, and over several tasks.

Student's t on the items of a task. Two models are compared by the differences of their scores on the same
items, which leaves out how hard an item is and so needs far fewer of them than two separate intervals. Over
tasks of unequal size the mean is that of the tasks' means, as tables of scores have it:

    mean = sum_t m_t / T      variance = sum_t (s_t^2 / n_t) / T^2      freedom = Welch and Satterthwaite's

What is random here is the draw of the items. Not the training: another seed of it is another model.
Scores lie in [0, 1] and differences in [-1, 1]; intervals are cut there, and are the whole range where a
task has one item, which says nothing of its spread. Items that all score the same give a width of 0: no
spread was seen, which with few items is no proof of there being none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from foundation.errors import InputError

if TYPE_CHECKING:
    import numpy as np

MOST_FREEDOM = 1000  # above, t is within 0.13 % of the normal's 1.960; its value at 1000 is taken


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(scores: np.ndarray) -> Interval:
    """Of one task's scores [n] in [0, 1]. Raises InputError where there is none."""
    return _interval([scores], 0.0)


def paired_interval(a: np.ndarray, b: np.ndarray) -> Interval:
    """Of mean(a) - mean(b), scores [n] of two models on the same items. Raises InputError."""
    return _interval(_differences([a], [b]), -1.0)


def stratified(scores: Sequence[np.ndarray]) -> Interval:
    """Of the mean of the tasks' means; one array of scores in [0, 1] a task. Raises InputError."""
    return _interval(scores, 0.0)


def overall_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Interval:
    """Of stratified(a) - stratified(b), two models on the same tasks and items. Raises InputError."""
    return _interval(_differences(a, b), -1.0)


def _differences(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> list[np.ndarray]:
    seen, wanted = [len(scores) for scores in b], [len(scores) for scores in a]
    if seen != wanted:
        raise InputError(
            f"scores of {wanted} items can not be paired with scores of {seen}",
            hint="score both models on the same items",
        )
    return [one - other for one, other in zip(a, b, strict=True)]


def _interval(tasks: Sequence[np.ndarray], lowest: float) -> Interval:
    import numpy as np

    if not tasks or any(len(scores) == 0 for scores in tasks):
        raise InputError("no scores, so no mean of them", hint="a task needs at least one item")
    mean = float(np.mean([np.mean(scores) for scores in tasks]))
    if any(len(scores) == 1 for scores in tasks):
        return Interval(mean, lowest, 1.0)
    parts = [float(np.var(scores, ddof=1)) / len(scores) for scores in tasks]  # variances of the tasks' means
    if not any(parts):
        return Interval(mean, mean, mean)
    freedom = sum(parts) ** 2 / sum(v * v / (len(s) - 1) for v, s in zip(parts, tasks, strict=True))
    half = student_t(int(freedom + 1e-9)) * math.sqrt(sum(parts)) / len(tasks)
    return Interval(mean, max(lowest, mean - half), min(1.0, mean + half))


@cache
def student_t(freedom: int) -> float:
    """The t that a Student variable of `freedom` >= 1 degrees stays within, either side, with p = .95."""
    freedom = min(freedom, MOST_FREEDOM)
    low, high = 1.9, 13.0  # t(infinity) = 1.960, t(1) = 12.706
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series of Abramowitz & Stegun 26.7.3 (odd freedom) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 if odd else 1, freedom - 2, 2):
        term *= square * k / (k + 1)
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))

"""How well scores part the good from the bad, on documents that the classifier never saw.

AUC is the probability that a good document scores above a bad one, a tie counting half. Its 95 % interval is
Newcombe's (Statistics in Medicine 2006, method 5): the values of AUC that lie within 1.96 of their own standard
errors of what was seen, by the variance of Hanley and McNeil (1982) with equal exponents. Unlike the usual one
it has a width also where every good document is above every bad one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from foundation.statistics import Interval

if TYPE_CHECKING:
    import numpy as np

NORMAL_95 = 1.959964
BINS = 10
THRESHOLDS = tuple(n / 20 for n in range(1, 20))


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """Of scores [N] and labels bool [N], both classes present; from the ranks, ties at their middle."""
    import numpy as np

    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]  # [N], from 1
    positive = int(good.sum())
    above = float(rank[good].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(good) - positive))


def auc_interval(seen: float, good: int, bad: int) -> Interval:
    """Interval of an AUC `seen` on so many `good` and `bad` documents."""

    def far(value: float) -> bool:
        return abs(seen - value) > NORMAL_95 * math.sqrt(_variance(value, good, bad))

    return Interval(seen, _edge(seen, 0.0, far), _edge(seen, 1.0, far))


def _variance(value: float, good: int, bad: int) -> float:
    more = (good + bad) / 2 - 1
    factor = 1 + more * (1 - value) / (2 - value) + more * value / (1 + value)
    return value * (1 - value) * factor / (good * bad)


def _edge(near: float, end: float, far: Any) -> float:
    """The last value from `near` towards `end` that is not far."""
    if not far(end):
        return end
    for _ in range(60):
        middle = (near + end) / 2
        near, end = (near, middle) if far(middle) else (middle, end)
    return near


def calibration(scores: np.ndarray, good: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, and by tenth of the scores: documents, mean score, share that is good."""
    import numpy as np

    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    rows = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            rows.append(
                {
                    "from": number / BINS,
                    "documents": int(inside.sum()),
                    "mean_score": rounded(scores[inside].mean()),
                    "good_share": rounded(good[inside].mean()),
                }
            )
    error = sum(row["documents"] * abs(row["mean_score"] - row["good_share"]) for row in rows) / len(scores)
    return rounded(error), rows


def thresholds(scores: np.ndarray, good: np.ndarray) -> list[dict[str, float]]:
    """What each threshold would keep: share of the documents, precision and recall of the good ones."""
    rows = []
    for threshold in THRESHOLDS:
        kept = scores >= threshold
        right = float((kept & good).sum())
        row = {
            "threshold": threshold,
            "kept_share": rounded(kept.mean()),
            "recall": rounded(right / good.sum()),
        }
        rows.append(row | ({"precision": rounded(right / kept.sum())} if kept.any() else {}))
    return rows


def rounded(value: Any) -> float:
    """Six digits: enough for a table, and the same bytes everywhere."""
    return round(float(value), 6)

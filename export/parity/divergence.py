"""How far one model's next-token logits are from another's, position by position, in float64.

    KL        sum_v p_v (ln p_v - ln q_v), p the original's softmax, q the file's; nats
    top-1     share of positions where both hold the same token for the most likely
    top-5     share of the original's five most likely tokens that are among the file's five, averaged
    max_abs   the largest difference of two logits anywhere
    nll       -ln of the probability given to the token that does follow; exp of its mean is the perplexity

Where both name different tokens and the original's logits of the two are nearer than TIE (their probabilities
then differ by less than 1 %), the position counts as one of `ties` besides: that is a matter of rounding. ggml
looks GELU up in a table of float16 numbers, which moves the logits of a sound Gemma 3 by up to .005.
Errors are standard errors of the mean over
positions taken as independent, as llama.cpp's perplexity tool prints them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from foundation.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

BEST = 5
TIE = 0.01


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[V] -> [V] in float64."""
    import numpy as np

    out = logits.astype(np.float64)
    out -= out.max()
    out -= math.log(np.exp(out).sum())
    return out


def divergence(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(softmax(wanted) || softmax(got)) of each row, nats.  # [T, V], [T, V] -> [T]"""
    import numpy as np

    pairs = zip(wanted, got, strict=True)  # row by row: V may be 262,144
    return np.array([_divergence(log_softmax(p), log_softmax(q)) for p, q in pairs])


def _divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    import numpy as np

    return float(np.exp(log_p) @ (log_p - log_q))


class Comparison:
    """Sums over positions; logits come one position at a time, for V may be 262,144."""

    def __init__(self) -> None:
        self._kl: list[float] = []
        self._same: list[bool] = []
        self._ties = 0
        self._shared: list[float] = []
        self._nll: list[float] = []
        self._nll_wanted: list[float] = []
        self._widest = 0.0

    def add(self, wanted: np.ndarray, got: np.ndarray, following: int | None = None) -> None:
        """One position: the original's logits and the file's, and the token that follows in a text.  # [V], [V]

        Raises ModelError when `got` holds something that is no number.
        """
        import numpy as np

        log_p, log_q = log_softmax(wanted), log_softmax(got)
        kl = _divergence(log_p, log_q)
        if not math.isfinite(kl):
            raise ModelError(f"its logits at position {len(self._kl)} of the comparison are no numbers")
        self._kl.append(kl)
        best, other = int(wanted.argmax()), int(got.argmax())
        self._same.append(best == other)
        self._ties += best != other and bool(wanted[best] - wanted[other] < TIE)
        count = min(BEST, len(wanted))
        five = (set(np.argpartition(row, -count)[-count:].tolist()) for row in (wanted, got))
        self._shared.append(len(set.intersection(*five)) / count)
        self._widest = max(self._widest, float(np.abs(wanted - got).max()))
        if following is not None:
            self._nll.append(-float(log_q[following]))
            self._nll_wanted.append(-float(log_p[following]))

    def agreement(self) -> dict[str, float | int]:
        """tokens, kl_mean, kl_max, top1, ties, top5, max_abs of all positions."""
        return {
            "tokens": len(self._kl),
            "kl_mean": mean(self._kl),
            "kl_max": max(self._kl),
            "top1": mean(self._same),
            "ties": self._ties,
            "top5": mean(self._shared),
            "max_abs": self._widest,
        }

    def likelihood(self) -> dict[str, float | int]:
        """Perplexity, KL and their standard errors, of positions that had a following token.

        `ratio` is the perplexity over the original's. Its error comes from the differences position by
        position, which leave out how hard the text is: it is far smaller than the error of either perplexity.
        """
        rise = [got - wanted for got, wanted in zip(self._nll, self._nll_wanted, strict=True)]
        ratio = math.exp(mean(rise))
        return {
            "tokens": len(self._kl),
            **perplexity(self._nll),
            "ratio": ratio,
            "ratio_error": ratio * standard_error(rise),
            "kl_mean": mean(self._kl),
            "kl_error": standard_error(self._kl),
            "kl_max": max(self._kl),
            "top1": mean(self._same),
        }


def perplexity(nll: Sequence[float]) -> dict[str, float]:
    """exp of the mean of `nll` (nats), and its standard error."""
    value = math.exp(mean(nll))
    return {"perplexity": value, "perplexity_error": value * standard_error(nll)}


def mean(values: Sequence[float]) -> float:
    """Of one value or more."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`; 0 for a single one, which shows no spread."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))

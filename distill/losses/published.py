"""The weight of RuAdapt-KD on each token's KD, in its three forms.

Kovalev and Tikhomirov 2025, eq. 1: L = CE + lambda * w * KD with w = 1 - exp(-s / (t + eps)), where s and t are
the logits of the gold token, t = 0 where it is outside the teacher's entries. The paper and its code differ:

| | paper (`published`) | code (`published_code`) |
|---|---|---|
| denominator | t + eps | abs(t) + 1e-5 |
| range | none | clamped to [0, 1] |
| KD | KL over the top-K | KL of softmaxes over the K logits |
| gradient of w | not said | none (detached) |

Where both s and t are positive they are one function. As printed, s and t of opposite signs make the exponent
positive: w < 0, unbounded, and the student is paid for moving away from the teacher; at t = 0 it is
1 - exp(-1e5 s), a cliff. Both forms depend on the offset of the logits, which no softmax does: adding a
constant to all logits of either model changes w and nothing else. `shift_invariant` says it with
log-probabilities. We read the paper's KD as the code has it, since a sum over the top-K alone is no divergence,
and keep w without a gradient in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.teacher import Teacher
from foundation.chunked import Readings

if TYPE_CHECKING:
    import torch

EPS = 1e-5
LARGEST_EXPONENT = 60.0  # w = -1e26: training breaks in plain sight, and 0 * inf is not what it breaks with


def published_weight(teacher: Teacher, student: Readings) -> torch.Tensor:
    """1 - exp(-s/(t + eps)) as printed, without a gradient; [n], in (-inf, 1]."""
    exponent = -student.logit / (teacher.logit + EPS)
    return 1 - exponent.clamp(max=LARGEST_EXPONENT).exp()


def published_code_weight(teacher: Teacher, student: Readings) -> torch.Tensor:
    """1 - exp(-s/(|t| + eps)) clamped to [0, 1], without a gradient; [n]."""
    exponent = -student.logit / (teacher.logit.abs() + EPS)
    return (1 - exponent.clamp(max=0.0).exp()).clamp(0, 1)

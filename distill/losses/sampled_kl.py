"""Random-sampling distillation: an unbiased gradient from a dozen tokens a position (Anshumann et al., 2025).

Top-K throws away the teacher's tail at every position alike, so its gradient is biased; tokens drawn from the
teacher, with importance weights w_i whose expectation is p_i, are right on average. arXiv 2503.16870.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.teacher import Teacher
from foundation.chunked import Readings

if TYPE_CHECKING:
    import torch


def sampled_kl(teacher: Teacher, student: Readings) -> torch.Tensor:
    """sum_i w_i (log w_i - log q_i) over the drawn tokens; [n]. Gradient (sum w) q - w, on average q - p.

    As a number it is no divergence (log w_i is not log p_i) and may be negative.
    """
    return (teacher.mass * (teacher.entries - student.entries)).sum(1)

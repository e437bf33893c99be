"""The published weight said with log-probabilities, which do not know the offset of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.published import EPS
from distill.losses.teacher import Teacher
from foundation.chunked import Readings

if TYPE_CHECKING:
    import torch


def shift_invariant_weight(teacher: Teacher, student: Readings) -> torch.Tensor:
    """w = 1 - exp(-s/t) with s = log q_gold, t = log p_gold, in or outside the entries; no gradient; [n].

    Both are negative, so s/t is how many times more surprised the student is than the teacher, and w lies in
    [0, 1] without a clamp: near 1 where the student has most to learn, 1 - 1/e where both agree, near 0 where
    the student knows the token better. (With raw logits a larger s means a surer student: the published weight
    runs the other way.)
    """
    surprise = student.gold.detach().abs() / (teacher.gold.abs() + EPS)
    return 1 - (-surprise).exp()

"""Forward KL with both sides renormalised over the K entries: the form of RuAdapt-KD's released code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.teacher import Teacher
from foundation.chunked import Readings

if TYPE_CHECKING:
    import torch

NOWHERE = -1e30  # a log-probability that no softmax feels, and that is a number


def renormalised_kl(teacher: Teacher, student: Readings) -> torch.Tensor:
    """KL(p / P || q / Q) over the entries alone; in nats, >= 0, [n].

    What either side believes off the entries is not looked at: a student may put any mass there.
    """
    absent = ~teacher.present
    p = teacher.entries.masked_fill(absent, NOWHERE).log_softmax(1)  # [n, K]
    q = student.entries.masked_fill(absent, NOWHERE).log_softmax(1)  # [n, K]
    return (p.exp() * (p - q)).sum(1)

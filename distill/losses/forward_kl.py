"""Forward KL over K + 1 events: the teacher's entries, and "none of them"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.teacher import Teacher
from foundation.chunked import Readings

if TYPE_CHECKING:
    import torch


def forward_kl(teacher: Teacher, student: Readings) -> torch.Tensor:
    """KL = sum_k p_k (log p_k - log q_k) + (1-P) [log(1-P) - log(1-Q)]; in nats, >= 0, [n].

    1-P was summed over the full logits at capture and 1-Q is summed over the student's: neither is had by
    subtraction. A lower bound of the KL over the whole vocabulary, exact when K >= V - 1. Its gradient in the
    logits is q_j - p_j on the entries and q_j - (1-P) q_j / (1-Q) off them.
    """
    on = (teacher.mass * (teacher.entries - student.entries)).sum(1)
    both = teacher.tail.isfinite() & student.off.isfinite()  # else there is no such event
    tail, off = teacher.tail.masked_fill(~both, 0.0), student.off.masked_fill(~both, 0.0)
    return on + tail.exp() * (tail - off)

"""Reverse KL over K + 1 events: the student is asked to stay where the teacher is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.losses.teacher import Teacher
from foundation.chunked import Readings

if TYPE_CHECKING:
    import torch

TAIL_FLOOR = -30.0  # nats: a teacher without any tail would make all mass there infinitely wrong


def reverse_kl(teacher: Teacher, student: Readings) -> torch.Tensor:
    """KL = sum_k q_k (log q_k - log p_k) + (1-Q) [log(1-Q) - log(1-P)]; in nats, [n].

    log(1-P) is taken as TAIL_FLOOR where it is lower.
    """
    q = student.entries.exp().masked_fill(~teacher.present, 0.0)  # [n, K]
    on = (q * (student.entries - teacher.entries)).sum(1)
    whole = student.off.isinf()  # the entries are the whole vocabulary
    off = student.off.masked_fill(whole, 0.0)
    rest = off.exp() * (off - teacher.tail.clamp(min=TAIL_FLOOR))
    return on + rest.masked_fill(whole, 0.0)

"""Losses against a teacher's stored top-K.

Notation: K ids kept for a token, p_k the teacher's probabilities on them, P their sum, s_k the student's
log-probabilities there, Q = sum exp(s_k). Everything is computed in fp32, whatever the model's precision.
Columns of a batch are aligned with its labels: what stands at position t predicts the token at t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from foundation.losses import counted, logits_of, predicting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EPS = 1e-5
LOG_FLOOR = -30.0  # log(1-Q) below this is below fp32's resolution of Q


def renormalised_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) with both sides renormalised over the K ids; log-probabilities [N, K] -> [N].

    The published form (RuAdapt-KD): what either side believes outside the K ids is not looked at.
    """
    t = teacher.float().log_softmax(-1)  # [N, K]
    s = student.float().log_softmax(-1)  # [N, K]
    return (t.exp() * (t - s)).sum(-1)  # [N]


def tail_kl(teacher: torch.Tensor, teacher_tail: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL of the distributions over K ids and one more event, "none of them"; [N, K], [N], [N, K] -> [N].

    KL = sum p_k (log p_k - s_k) + (1-P) [log(1-P) - log(1-Q)], with log(1-P) stored at capture and
    log(1-Q) = log(-expm1(log Q)). A lower bound of the full KL, exact when K = V - 1.
    """
    import torch

    teacher, student, tail = teacher.float(), student.float(), teacher_tail.float()
    log_q = student.logsumexp(-1).clamp(max=-1e-7)  # [N]
    student_tail = torch.log(-torch.expm1(log_q)).clamp(min=LOG_FLOOR)  # [N]
    on = (teacher.exp() * (teacher - student)).sum(-1)  # [N]
    return on + tail.exp() * (tail.clamp(min=LOG_FLOOR) - student_tail)  # [N]


def published_weight(student_logit: torch.Tensor, teacher_logit: torch.Tensor) -> torch.Tensor:
    """w = 1 - exp(-s/(|t| + eps)) clamped to [0, 1], detached (RuAdapt-KD, eq. 1 and its code); [N] -> [N].

    s and t are the raw logits of the gold token, t = 0 where it is outside the teacher's top-K. The weight
    depends on the offset of the logits, which softmax does not; it is offered because it is what was published.
    """
    import torch

    exponent = -student_logit.float() / (teacher_logit.float().abs() + EPS)
    return (1 - torch.exp(exponent.clamp(max=0.0))).clamp(0, 1).detach()


class TopKLoss:
    """L = CE + lambda * w * KD over the response tokens (RuAdapt-KD, eq. 1), normalised by their number."""

    def __init__(
        self, kl_lambda: float, weight: Literal["published", "none"], support: Literal["renormalised", "tail"]
    ) -> None:
        self.kl_lambda, self.weight, self.support = kl_lambda, weight, support

    def __call__(
        self, model: PreTrainedModel, batch: dict[str, torch.Tensor], items: torch.Tensor
    ) -> torch.Tensor:
        labels = batch["labels"]
        logits = predicting(logits_of(model, batch), labels).float()  # [N, V]
        log_p = logits.log_softmax(-1)  # [N, V]
        gold = counted(labels, labels)[:, None]  # [N, 1]
        student = log_p.gather(-1, counted(batch["topk_ids"], labels).long())  # [N, K]
        teacher = counted(batch["topk_logprobs"], labels)  # [N, K]
        if self.support == "renormalised":
            kl = renormalised_kl(teacher, student)  # [N]
        else:
            kl = tail_kl(teacher, counted(batch["tail_logprob"], labels), student)  # [N]
        if self.weight == "published":
            gold_logit = logits.gather(-1, gold).squeeze(-1)  # [N]
            kl = kl * published_weight(gold_logit, counted(batch["gold_logit"], labels))
        return (self.kl_lambda * kl.sum() - log_p.gather(-1, gold).sum()) / items

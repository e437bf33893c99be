"""The part of a distribution that a top-K store keeps: its largest entries, and what all others weigh together.

Everything is read from the full logits while they are at hand. log(1-P) is a logsumexp over the logits that are
NOT kept: subtracting P from 1 gives zero in float32 long before the tail is zero. log Z is then the sum of that
tail and of the entries, so the vocabulary is read once. Among equal logits the lower id is kept, so that the
result does not depend on the order in which a library's topk meets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def top_k_columns(logits: torch.Tensor, gold: torch.Tensor, top_k: int, mass: float) -> dict[str, torch.Tensor]:
    """Store columns of float32 `logits` [N, V] with gold next tokens [N]; `logits` are used up.

    Kept are the fewest entries whose probabilities reach `mass`, at most `top_k` of them; mass = 1 keeps always
    top_k. Entries stand by falling probability, then by id; where there is none, id 0 and -inf.
    """
    import torch

    gold_logit = logits.gather(-1, gold[:, None]).squeeze(-1)  # [N]
    top, ids = largest(logits, top_k)  # [N, K]
    logits.scatter_(-1, ids, -torch.inf)
    floor = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)  # [N]
    rest = floor + logits.sub_(floor[:, None]).exp_().sum(-1).log()  # [N], in place: half logsumexp's time
    log_z = torch.logaddexp(top.logsumexp(-1), rest)  # [N]
    logprobs = top - log_z[:, None]  # [N, K]
    if mass < 1:
        before = logprobs.double().exp().cumsum(-1).roll(1, -1)  # [N, K], mass of the entries before each
        before[:, 0] = 0
        dropped = before >= mass  # [N, K]
        rest = torch.logaddexp(rest, top.masked_fill(~dropped, -torch.inf).logsumexp(-1))
        logprobs = logprobs.masked_fill(dropped, -torch.inf)
    return {
        "topk_ids": ids.masked_fill(logprobs == -torch.inf, 0).int(),
        "topk_logprobs": logprobs,
        "tail_logprob": rest - log_z,
        "gold_logprob": gold_logit - log_z,
        "log_z": log_z,
    }


def largest(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` largest of `logits` [N, V] and their ids, by falling value, then by rising id: [N, K] twice.

    One entry more than asked tells where the last place is shared; only such rows are looked through again.
    """
    import torch

    one_more = min(top_k + 1, logits.shape[-1])
    top, ids = logits.topk(one_more, dim=-1, sorted=True)  # [N, K + 1]
    ids = ids[:, :top_k]
    if one_more > top_k:
        last = top[:, top_k - 1]  # [N]
        shared = (last == top[:, top_k]).nonzero().squeeze(-1)  # [M]
        if len(shared):
            rows, floor = logits[shared], last[shared, None]  # [M, V], [M, 1]
            above, at = rows > floor, rows == floor
            kept = above | (at & (at.cumsum(-1, dtype=torch.int32) <= top_k - above.sum(-1, keepdim=True)))
            ids[shared] = kept.nonzero()[:, 1].view(-1, top_k)
    ids = ids.sort(-1).values
    top, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return top, ids.gather(-1, order)

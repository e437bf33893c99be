"""Cross-entropy with a KL against a reference model that has another vocabulary (Vikhr).

    L = CE + kl_weight * KL        each a mean over the counted tokens of the optimiser step

Vikhr (Nikolich et al. 2024) adds KL(student || reference) to continued pre-training, and does not say how it
crosses two vocabularies. Here: with p_n the student's probability of new token n, o(n) the first old piece of n
and q the reference's probabilities, after the same text,

    P_o = sum of p_n over o(n) = o        KL = sum over o of P_o (log P_o - log q_o)        in nats
    dKL / dz_n = p_n (log P_o(n) - log q_o(n) - KL)

which is exact where the old model would have cut the text likewise: it says that piece before any other. To
renormalise over the ids that both have would punish what rightly moved to whole words. Positions where the
old model would have cut the text otherwise (crossing.py) have CE alone; they count in the mean all the same.

Rows of a matrix that no token has are no events: both distributions are over tokens, each renormalised
without them, so their logits get nothing of the KL (from the CE they do), and it is 0 where the models agree.

Logits [N, V] are never held, nor their gradient: both parts come from one pass over chunks of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

from adaptation.crossing import Crossing
from foundation.chunked import Logits, cap, multiplied, over_chunks
from foundation.errors import ModelError
from foundation.head import Head, hidden_of
from foundation.losses import counted, predicting

if TYPE_CHECKING:
    import torch

OWN_BUFFERS = 2  # [n, V_new] of a chunk: the student's logits, what their gradient is made in
OLD_BUFFERS = 3  # [n, V_old] of a chunk: the reference's logits, the student's mass, its logarithm


class ReferenceLoss:
    """Sum of L over a batch's counted tokens / items. Every call adds to `sums`, which its reader empties.

    sums: "tokens" (how many were counted), "ce" and "kl" in nats, "kl_exceptions" (counted tokens without KL).
    The batch has position_ids and "marks": whether the position after a token is exact.
    """

    def __init__(self, reference: Any, crossing: Crossing, kl_weight: float) -> None:
        reference.requires_grad_(False).eval()
        self.reference, self.crossing, self.kl_weight = reference, crossing, kl_weight
        self.sums: dict[str, torch.Tensor] = {}
        self.chunk_rows = 0  # as many as fit

    def __call__(self, model: Any, batch: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        labels = batch["labels"]
        target, target_head = self._target(batch)
        hidden, head = hidden_of(model, batch)
        exact = predicting(batch["marks"], labels)  # [N]
        total, figures = chunked_ce_and_kl(
            predicting(hidden, labels), head, counted(labels, labels), target, target_head, exact,
            self.crossing, self.kl_weight, chunk_rows=self.chunk_rows,
        )  # fmt: skip
        figures |= {"kl_exceptions": (~exact).sum(), "tokens": labels.new_tensor(len(exact))}
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        return total / items

    def _target(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Head]:
        """(the reference's head input at the positions that predict a counted token [N, D_old], its head)."""
        import torch

        old = self.crossing.expand(batch["input_ids"], batch["position_ids"])
        with torch.no_grad():
            hidden, head = hidden_of(
                self.reference, {"input_ids": old.input_ids, "position_ids": old.position_ids}
            )
            at_ends = hidden.gather(1, old.ends[:, :, None].expand(-1, -1, hidden.shape[2]))  # [B, T, D_old]
        return predicting(at_ends, batch["labels"]), head


def chunked_ce_and_kl(
    hidden: torch.Tensor,
    head: Head,
    gold: torch.Tensor,
    target: torch.Tensor,
    target_head: Head,
    exact: torch.Tensor,
    crossing: Crossing,
    kl_weight: float,
    *,
    chunk_rows: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(sum over N positions of CE + kl_weight * KL, {"ce": sum, "kl": sum}); KL where `exact` [N] is true.

    hidden [N, D] and gold [N] are the student's; target [N, D_old] and target_head are the reference's, into
    which nothing flows. chunk_rows = 0: as many positions at once as memory is given to. A second backward
    pass is refused: the gradient is scaled in place. Raises ModelError for a head with fewer rows than tokens.
    """
    import torch

    places, padding = _places(head, target_head, crossing, hidden.device)
    taught = multiplied(target, target_head)
    rows = target_head.vocab_tokens

    def per_chunk(
        z: torch.Tensor, at: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Callable[[], torch.Tensor]]:
        chosen, on = gold[at][:, None], exact[at].to(z.dtype)
        log_z = z.logsumexp(1)
        nll = log_z - z.gather(1, chosen).squeeze(1)  # [n]
        p = z.sub_(log_z[:, None]).exp_()
        log_q = z.new_empty(len(z), rows)  # [n, V_old]
        Logits(target_head, taught, z.dtype).write(at, log_q)
        cap(log_q, target_head)
        log_q.masked_fill_(padding, -torch.inf)
        log_q.sub_(log_q.logsumexp(1, keepdim=True))
        mass = z.new_zeros(len(z), rows + 1)  # the last column: of rows without a token
        mass.scatter_add_(1, places.expand(len(z), -1), p)
        whole = mass[:, :rows].sum(1)  # [n]
        mass /= whole[:, None]
        ratio = mass.clamp_min(torch.finfo(z.dtype).tiny).log_()
        ratio[:, :rows] -= log_q.masked_fill_(padding, 0.0)
        kl = (mass[:, :rows] * ratio[:, :rows]).sum(1)  # [n]
        ratio[:, rows] = kl  # so that its gradient is zero

        def differentiate() -> torch.Tensor:
            slope = ratio.gather(1, places.expand(len(z), -1)).sub_(kl[:, None])  # [n, V_new]
            slope.mul_((kl_weight * on / whole)[:, None]).add_(1).mul_(p)
            return slope.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=z.dtype))

        kl_here = kl * on
        return nll + kl_weight * kl_here, {"ce": nll, "kl": kl_here}, differentiate

    buffers = OWN_BUFFERS + ceil(OLD_BUFFERS * rows / head.vocab_tokens)
    return over_chunks(hidden, head, per_chunk, buffers=buffers, chunk_rows=chunk_rows)


def _places(
    head: Head, target_head: Head, crossing: Crossing, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o(n) of each row of the head [1, V], V_old where it has no token; the reference's rows without one).

    Raises ModelError when there are fewer rows than tokens.
    """
    import torch

    first, old = torch.from_numpy(crossing.first()), torch.from_numpy(crossing.old_tokens)
    rows = target_head.vocab_tokens
    if head.vocab_tokens < len(first) or rows < len(old):
        raise ModelError(
            f"heads of {head.vocab_tokens} and {rows} rows, vocabularies of {len(first)} and {len(old)} tokens",
            hint="the reference is the model whose vocabulary was changed",
        )
    places = torch.full((1, head.vocab_tokens), rows)
    places[0, : len(first)] = torch.where(first < 0, rows, first)
    padding = torch.ones(rows, dtype=torch.bool)
    padding[: len(old)] = ~old
    return places.to(device), padding.to(device)

"""Random-sampling knowledge distillation: a distribution kept as draws from it, unbiased however few they are.

Anshumann et al., "Sparse Logit Sampling", ACL 2025 (arXiv 2503.16870). A truncated top-K teaches that the rest
of the vocabulary is impossible, or, with a tail, says nothing of what is in it. Here n tokens are drawn with
replacement from q ~ p^power and a token drawn c times carries the weight p/q * c/n, so that the expectation of
every weight is its probability. The weights are not divided by their sum: that would bias them.

power = 1 has the least variance for a number of draws: the variance of all weights together is (sum p^2/q - sum
p^2)/n, and by Cauchy and Schwarz sum p^2/q >= 1, with equality at q = p. Every weight is then a multiple of 1/n
and their sum is 1. 50 draws of a trained teacher are some 14 distinct tokens (benchmarks/sampled_entries.py:
2.3 nats a token, 151,665 ids); the paper counts 12.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def uniforms(seed: int, key: bytes, positions: int, draws: int) -> np.ndarray:
    """Numbers in [0, 1) for each draw of each position of the row named `key`.  # [P, draws] float64

    A function of (seed, key, place) alone, of no batch and no rank. Philox's raw stream is fixed by its paper
    (Salmon et al., SC 2011) and by numpy's promise; the numbers of its Generator are not.
    """
    import numpy as np

    digest = hashlib.sha256(seed.to_bytes(8, "little") + key).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    return (philox.random_raw((positions, draws)) >> np.uint64(11)) * 2.0**-53


def sampled_columns(
    logits: torch.Tensor, gold: torch.Tensor, uniform: torch.Tensor, power: float
) -> dict[str, torch.Tensor]:
    """Store columns of float32 `logits` [N, V], used up, with gold next tokens [N] and `uniform` [N, draws].

    Entries are the distinct ids by rising id, and the logs of their weights; where there is none, id 0 and
    -inf. No mass is left for a tail.
    """
    import torch

    draws, vocab_tokens = uniform.shape[-1], logits.shape[-1]
    gold_logit = logits.gather(-1, gold[:, None]).squeeze(-1)  # [N]
    log_z = logits.logsumexp(-1)  # [N]
    density = logits.sub_(log_z[:, None]).mul_(power).exp_()  # [N, V], q times a constant
    upto = density.cumsum(-1, dtype=torch.float64)  # [N, V]
    total = upto[:, -1:]  # [N, 1]
    ids = torch.searchsorted(upto, uniform * total, right=True)  # [N, draws]
    ids = ids.clamp_(max=vocab_tokens - 1)  # they lie beyond it where logits are no numbers
    ids = ids.sort(-1).values
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = new.cumsum(-1) - 1  # [N, draws], which of the distinct ids a draw is
    most = min(draws, vocab_tokens)
    count = torch.zeros_like(uniform[:, :most]).scatter_add_(-1, place, torch.ones_like(uniform))  # [N, K]
    distinct = torch.zeros_like(ids[:, :most]).scatter_(-1, place, ids)  # [N, K]
    drawn = density.gather(-1, distinct).double().log()  # [N, K]
    weight = torch.where(count > 0, drawn / power - (drawn - total.log()) + (count / draws).log(), -torch.inf)
    return {
        "topk_ids": distinct.int(),
        "topk_logprobs": weight.float(),
        "tail_logprob": torch.full_like(log_z, -torch.inf),
        "gold_logprob": gold_logit - log_z,
        "log_z": log_z,
    }

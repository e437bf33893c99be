"""The logit losses: how far a student's next-token distribution is from its teacher's, over the vocabulary.

Each is a function of the logits of n positions, z of the student and t of the teacher [n, V], and gives the
loss [n] with its gradient in z [n, V], in closed form. Below p = softmax(t), q = softmax(z), and
d = log q - log p; sums are over the vocabulary, units are nats.

LayerKD (Kovalev & Tikhomirov 2025, Table 1) compares such losses beside the MSE of hidden states; reverse KL is
MiniLLM's (Gu et al. 2024), T^2 KL that of Hinton, Vinyals and Dean (2015). A top-K store does not hold the
whole vocabulary: its losses are in distill/losses.

A function works in its three buffers alone: z, t and `spare` are used up, and the gradient it returns is one of
them. Where p and q are equal to the last bit, loss and gradient are exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Divergence = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]
"""(z [n, V], t [n, V], spare [n, V]) -> (loss [n], its gradient in z [n, V])"""

SHARE = 0.01  # of KL in kl_100


def kl(z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) = sum p (log p - log q), in nats, >= 0; gradient q - p. Hinton et al. 2015 at T = 1."""
    import torch

    log_q, log_p = _log_softmax_of_both(z, t, spare)  # in spare, z
    p = torch.exp(log_p, out=t)
    loss = log_p.sub_(log_q).mul_(p).sum(1)
    return loss, log_q.exp_().sub_(p)


def kl_100(z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) / 100, the weight of LayerKD beside a mean of squared errors.

    It is taken of the mean over tokens here. The released code divides by 100 as well, but SUMS over batch x
    positions x vocabulary: its KL grows with the batch, and with B x T counted tokens weighs B * T / 100 times
    the mean over tokens (2,048 tokens: 20 times; this: 0.01).
    """
    loss, gradient = kl(z, t, spare)
    return loss.mul_(SHARE), gradient.mul_(SHARE)


def kl_reverse(z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p) = sum q d; gradient q (d - KL). Gu et al. 2024, eq. 1, with the expectation taken exactly."""
    import torch

    log_q, log_p = _log_softmax_of_both(z, t, spare)
    q = torch.exp(log_q, out=t)
    d = log_q.sub_(log_p)
    loss = torch.mul(q, d, out=log_p).sum(1)
    return loss, d.sub_(loss[:, None]).mul_(q)


def kl_scaled(
    z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """T^2 KL(p_T || q_T) with p_T = softmax(t / T), q_T = softmax(z / T); gradient T (q_T - p_T).

    Hinton et al. 2015, section 2: T^2, since the gradient of KL alone shrinks as 1 / T^2.
    """
    loss, gradient = kl(z.div_(temperature), t.div_(temperature), spare)
    return loss.mul_(temperature**2), gradient.mul_(temperature)


def logprob_mse(z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mean over the vocabulary of d^2; gradient (2 / V) (d - q sum d). LayerKD, Table 1, log-probabilities.

    Every id counts alike, so what it mostly asks for is the order of ids that neither model would ever say.
    """
    import torch

    log_q, log_p = _log_softmax_of_both(z, t, spare)
    q = torch.exp(log_q, out=t)
    d = log_q.sub_(log_p)
    loss = torch.mul(d, d, out=log_p).mean(1)
    q.mul_(d.sum(1, keepdim=True))
    return loss, d.sub_(q).mul_(2 / z.shape[1])


def logit_mse(z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mean over the vocabulary of (z - t)^2; gradient (2 / V) (z - t). Ba & Caruana 2014; LayerKD, Table 1.

    Unlike all others it sees the offset of the logits, which no probability does.
    """
    import torch

    difference = z.sub_(t)
    loss = torch.mul(difference, difference, out=spare).mean(1)
    return loss, difference.mul_(2 / z.shape[1])


LOGIT_LOSSES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "kl": kl,
    "kl_100": kl_100,
    "kl_reverse": kl_reverse,
    "kl_scaled": kl_scaled,
    "logprob_mse": logprob_mse,
    "logit_mse": logit_mse,
}


def divergence(name: str, temperature: float) -> Divergence:
    """The logit loss called `name`; `temperature` is kl_scaled's."""
    chosen = LOGIT_LOSSES[name]
    return partial(chosen, temperature=temperature) if chosen is kl_scaled else chosen


def _log_softmax_of_both(
    z: torch.Tensor, t: torch.Tensor, spare: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log q in `spare`, log p in `z`); `t` is free."""
    import torch

    log_q = torch.log_softmax(z, 1, out=spare)
    return log_q, torch.log_softmax(t, 1, out=z)

"""Every loss against a naive float64 oracle over full logits, on inputs made to break it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from distill.losses import LOSSES, DistillLoss, make_loss
from foundation.errors import InputError, ModelError
from foundation.head import Head, hidden_of
from foundation.losses import cross_entropy, next_token_nll
from foundation.model import create
from foundation.rows import collate

Columns = dict[str, torch.Tensor]
DOUBLE = torch.float64
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3}
WITH_TEACHER = [name for name in LOSSES if name != "ce"]


# ---- the oracle: full distributions, one position at a time, nothing shared with the code under test -----


def oracle(name: str, z: torch.Tensor, columns: Columns, gold: torch.Tensor, kl: float, ce: float, T: float):  # type: ignore[no-untyped-def]
    """Loss [N] of float64 logits z [N, V]."""
    return torch.stack(
        [of_position(name, z[n], one(columns, n), int(gold[n]), kl, ce, T) for n in range(len(z))]
    )


def one(columns: Columns, n: int) -> Columns:
    return {name: value[n] for name, value in columns.items()}


def of_position(
    name: str, z: torch.Tensor, column: Columns, gold: int, kl: float, ce: float, T: float
) -> torch.Tensor:
    nll = z.logsumexp(0) - z[gold]
    if name == "ce":
        return ce * nll
    there = column["topk_logprobs"] > -math.inf
    ids, log_p = column["topk_ids"][there].long(), column["topk_logprobs"][there].double()
    log_q_all = (z / T).log_softmax(0)
    log_q = log_q_all[ids]
    others = torch.ones(len(z), dtype=torch.bool)
    others[ids] = False
    log_p_tail = column["tail_logprob"].double()
    if name == "forward_kl":
        kd = (log_p.exp() * (log_p - log_q)).sum()
        if others.any() and log_p_tail > -math.inf:
            kd = kd + log_p_tail.exp() * (log_p_tail - log_q_all[others].logsumexp(0))
    elif name == "reverse_kl":
        kd = (log_q.exp() * (log_q - log_p)).sum()
        if others.any():
            log_q_tail = log_q_all[others].logsumexp(0)
            kd = kd + log_q_tail.exp() * (log_q_tail - max(log_p_tail.item(), -30.0))
    elif name == "sampled_kl":
        kd = (log_p.exp() * (log_p - log_q)).sum()
    elif len(ids):
        p, q = log_p.log_softmax(0), log_q.log_softmax(0)
        kd = (p.exp() * (p - q)).sum()
    else:
        kd = 0 * z.sum()
    return ce * nll + kl * weight_by_hand(name, z, column, gold, T) * T * T * kd


def weight_by_hand(name: str, z: torch.Tensor, column: Columns, gold: int, T: float) -> float:
    s, g = z[gold].item(), column["gold_logprob"].double().item()
    there = column["topk_logprobs"] > -math.inf
    t = T * (g + column["log_z"].double().item()) if gold in column["topk_ids"][there].tolist() else 0.0
    if name == "published":
        return 1 - math.exp(min(-s / (t + 1e-5), 60.0))
    if name == "published_code":
        return min(max(1 - math.exp(min(-s / (abs(t) + 1e-5), 60.0)), 0.0), 1.0)
    if name == "shift_invariant":
        return 1 - math.exp((z / T).log_softmax(0)[gold].item() / (abs(g) + 1e-5))
    return 1.0


# ---- inputs made to break it -----------------------------------------------------------------------------


def teacher_columns(logits: torch.Tensor, gold: torch.Tensor, top_k: int, T: float) -> Columns:
    """What a store holds of a teacher's logits [N, V], in float32 as a store has it; exact log tails."""
    logits = logits.double() / T
    log_p = logits.log_softmax(1)
    top = log_p.topk(top_k, dim=1)
    rest = log_p.scatter(1, top.indices, -math.inf).logsumexp(1)
    return {
        "topk_ids": top.indices.int(),
        "topk_logprobs": top.values.float(),
        "tail_logprob": rest.float(),
        "gold_logprob": log_p.gather(1, gold[:, None])[:, 0].float(),
        "log_z": logits.logsumexp(1).float(),
    }


def adversarial(T: float = 1.0, vocab: int = 64, top_k: int = 8) -> tuple[torch.Tensor, Columns, torch.Tensor]:
    """(student logits [N, V], the teacher's columns, gold [N]); logits are exact in bfloat16."""
    draw = torch.Generator().manual_seed(11)
    base = (4 * torch.randn(12, vocab, generator=draw)).bfloat16().double()
    teacher, student = base.clone(), (4 * torch.randn(12, vocab, generator=draw)).bfloat16().double()
    gold = teacher.argmax(1)
    student[0] = teacher[0]  # equal
    student[1] = (teacher[1] * (1 + 2**-7)).bfloat16().double()  # nearly equal
    teacher[2, 3] += 60  # P ~ 1: all of the teacher on one id
    student[3] = teacher[3]
    student[3, 5] = teacher[3, 5] = 50.0  # P and Q ~ 1, both
    student[4, 7] = 80.0  # the student sure of something else
    gold[5:8] = teacher[5:8].argmin(1)  # gold outside the entries
    student[8] += 40.0  # an offset of all logits
    teacher[9] -= 40.0  # a negative t
    student[10] = 0.0  # uniform
    student[11] -= 30.0  # a negative s
    columns = teacher_columns(teacher, gold, top_k, T)
    columns["topk_logprobs"][6, 3:] = -math.inf  # fewer entries than K: padding with id 0, several times
    columns["topk_ids"][6, 3:] = 0
    columns["topk_ids"][7, 0] = 0  # id 0 is an entry, and padding as well
    columns["topk_logprobs"][7, 4:] = -math.inf
    columns["topk_ids"][7, 4:] = 0
    columns["tail_logprob"][8] = -math.inf
    return student, columns, gold


def read(
    loss: DistillLoss, z: torch.Tensor, columns: Columns, gold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(total, gradient of the logits [N, V], sums): the head is the identity, so hidden states are logits."""
    hidden = z.detach().clone().requires_grad_()
    head = Head(((lambda h: h, torch.eye(z.shape[1], dtype=z.dtype)),))
    total, sums = loss.of_hidden(hidden, head, gold, columns)
    (gradient,) = torch.autograd.grad(total, hidden)
    return total.detach(), gradient, sums


def exact(
    name: str, z: torch.Tensor, columns: Columns, gold: torch.Tensor, kl: float, ce: float, T: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's losses [N] and their gradients [N, V] on the same rounded inputs."""
    logits = z.detach().double().requires_grad_()
    values = oracle(name, logits, columns, gold, kl, ce, T)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


def doubled(columns: Columns) -> Columns:
    """The same numbers in float64, so that what is made of them is float64 too."""
    return {c: v.double() if v.is_floating_point() else v for c, v in columns.items()}


@pytest.mark.parametrize("ce", [0.0, 1.0])
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_and_value_equal_the_oracle(name: str, dtype: torch.dtype, T: float, ce: float) -> None:
    """Error of each position's gradient <= tolerance * (||p|| + ||q||); in CE p is the gold token's one-hot."""
    z, columns, gold = adversarial(T)
    z = z.to(dtype)
    if dtype == DOUBLE:
        columns = doubled(columns)
    loss = make_loss(name, kl_lambda=1.0, ce_weight=ce, temperature=T)
    total, gradient, _ = read(loss, z, columns, gold)
    values, wanted = exact(name, z, columns, gold, 1.0, ce, T)
    hand = [weight_by_hand(name, z[n].double(), one(columns, n), int(gold[n]), T) for n in range(len(z))]
    weight = torch.tensor(hand, dtype=DOUBLE)
    allowed = ce * (1 + z.double().softmax(1).norm(dim=1))
    if name != "ce":
        p = columns["topk_logprobs"].double().exp().norm(dim=1)
        allowed = allowed + weight.abs() * T * (p + (z.double() / T).softmax(1).norm(dim=1))
    if (
        name == "reverse_kl"
    ):  # q (log q/p - KL): its size has no bound in ||p|| + ||q||, and neither has its rounding
        allowed = torch.maximum(allowed, wanted.norm(dim=1))
    assert gradient.isfinite().all()
    assert ((gradient.double() - wanted).norm(dim=1) <= TOLERANCE[dtype] * allowed).all()
    assert total.item() == pytest.approx(values.sum().item(), rel=1e-4 if dtype != DOUBLE else 1e-12, abs=1e-12)


@given(
    name=st.sampled_from(list(LOSSES)),
    seed=st.integers(0, 10_000),
    vocab=st.integers(3, 40),
    share=st.floats(0, 1),
    width=st.sampled_from([0.1, 3.0, 20.0]),
    T=st.sampled_from([1.0, 0.7, 4.0]),
)
@settings(max_examples=150, deadline=None)
def test_oracle_on_anything(name: str, seed: int, vocab: int, share: float, width: float, T: float) -> None:
    """Any vocabulary, any K up to the whole vocabulary, sharp and flat distributions, any number of entries."""
    draw = torch.Generator().manual_seed(seed)
    top_k = max(1, round(vocab * share))
    z = width * torch.randn(4, vocab, generator=draw, dtype=DOUBLE)
    gold = torch.randint(0, vocab, (4,), generator=draw)
    columns = teacher_columns(width * torch.randn(4, vocab, generator=draw, dtype=DOUBLE), gold, top_k, T)
    columns = doubled(columns)
    columns["topk_logprobs"][0, int(torch.randint(0, top_k + 1, (1,), generator=draw)) :] = -math.inf
    columns["topk_ids"][0][columns["topk_logprobs"][0] == -math.inf] = 0
    if name == "published":  # its weight has poles; elsewhere they are tested by hand
        columns["log_z"] = columns["log_z"].abs() - columns["gold_logprob"] + 5
    loss = make_loss(name, kl_lambda=0.7, ce_weight=0.3, temperature=T)
    total, gradient, _ = read(loss, z, columns, gold)
    values, wanted = exact(name, z, columns, gold, 0.7, 0.3, T)
    scale = max(1.0, values.abs().max().item())
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10 * scale)
    assert total.item() == pytest.approx(values.sum().item(), rel=1e-9, abs=1e-9)


# ---- laws ------------------------------------------------------------------------------------------------


def one_loss(name: str, **settings: float) -> DistillLoss:
    return make_loss(name, **{"kl_lambda": 1.0, "ce_weight": 0.0, "temperature": 1.0, **settings})


def test_forward_kl_gradient_by_hand() -> None:
    """q - p on the entries and q_j - (1-P) q_j / (1-Q) off them (methods, section 2)."""
    z, columns, gold = adversarial()
    _, gradient, _ = read(one_loss("forward_kl"), z[5:6], {c: v[5:6] for c, v in columns.items()}, gold[5:6])
    ids, q = columns["topk_ids"][5].long(), z[5].softmax(0)
    p = columns["topk_logprobs"][5].double().exp()
    tail = columns["tail_logprob"][5].double().exp()
    expected = q - tail * q / (1 - q[ids].sum())
    expected[ids] = q[ids] - p
    torch.testing.assert_close(gradient[0], expected, rtol=1e-6, atol=1e-9)


def test_full_support_is_the_full_kl() -> None:
    """With K = V the tail is nothing, and forward and reverse KL are those over the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(3, 20, generator=draw, dtype=DOUBLE), torch.randn(3, 20, generator=draw, dtype=DOUBLE)
    gold = torch.tensor([0, 1, 2])
    columns = teacher_columns(t, gold, 20, 1.0)
    assert (columns["tail_logprob"] == -math.inf).all()
    p, q = t.log_softmax(1), z.log_softmax(1)
    for name, wanted in (("forward_kl", p.exp() * (p - q)), ("reverse_kl", q.exp() * (q - p))):
        total, gradient, _ = read(one_loss(name), z, columns, gold)
        assert total.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
        assert gradient.isfinite().all()
    _, gradient, _ = read(one_loss("forward_kl"), z, columns, gold)
    torch.testing.assert_close(gradient, q.exp() - p.exp(), rtol=1e-5, atol=1e-6)


def test_tail_is_a_lower_bound_and_nothing_at_the_teacher() -> None:
    z, _, gold = adversarial()
    t = z.flip(0)
    full = (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).sum().item()
    total, _, _ = read(one_loss("forward_kl"), z, teacher_columns(t, gold, 8, 1.0), gold)
    assert 0 <= total.item() <= full
    for name in ("forward_kl", "reverse_kl", "renormalised_kl"):
        total, gradient, _ = read(one_loss(name), z, teacher_columns(z, gold, 8, 1.0), gold)
        assert abs(total.item()) < 1e-5
        assert gradient.norm().item() < 1e-5


def test_sampled_gradient_is_sum_w_q_minus_w() -> None:
    z, columns, gold = adversarial()
    columns = doubled(columns)
    _, gradient, _ = read(one_loss("sampled_kl"), z, columns, gold)
    w = torch.zeros_like(z).scatter_add(1, columns["topk_ids"].long(), columns["topk_logprobs"].double().exp())
    torch.testing.assert_close(gradient, w.sum(1, keepdim=True) * z.softmax(1) - w, rtol=1e-9, atol=1e-12)


def test_shift_invariance_of_everything_but_the_published_weights() -> None:
    """An offset of the student's logits changes what was published, and nothing else."""
    z, columns, gold = adversarial()
    z = z.clamp(-20, 20)
    for name in LOSSES:
        one = read(one_loss(name, ce_weight=1.0), z, columns, gold)[0]
        other = read(one_loss(name, ce_weight=1.0), z + 3.0, columns, gold)[0]
        assert math.isclose(one, other, rel_tol=1e-9) is not name.startswith("published"), name


def test_published_weights_by_hand() -> None:
    """Printed and code form agree for positive s and t, and part where one is negative or gold is outside."""
    s, t = torch.tensor([2.0, 2.0, -1.0, 2.0, -1.0]), torch.tensor([4.0, -4.0, 4.0, 0.0, 0.0])
    z = torch.full((5, 6), -5.0, dtype=DOUBLE)
    z[:, 0] = s
    columns = {
        "topk_ids": torch.tensor([[0, 1]] * 3 + [[1, 2]] * 2, dtype=torch.int32),
        "topk_logprobs": torch.tensor([[0.7, 0.2]] * 5).log(),
        "gold_logprob": torch.full((5,), -0.3),
        "log_z": t + 0.3,
    }
    gold = torch.zeros(5, dtype=torch.long)
    code = [1 - math.exp(-0.5), 1 - math.exp(-0.5), 0.0, 1.0, 0.0]
    printed = [1 - math.exp(-0.5), 1 - math.exp(0.5), 1 - math.exp(0.25), 1.0, 1 - math.exp(60)]
    for name, wanted in (("published_code", code), ("published", printed)):
        found = [
            read(one_loss(name), z[n][None], {c: v[None] for c, v in one(columns, n).items()}, gold[n][None])[2]
            for n in range(5)
        ]
        assert [sums["weight"].item() for sums in found] == pytest.approx(wanted, rel=1e-4)


def test_shift_invariant_weight_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0]], dtype=DOUBLE)  # the student: log 1/2
    columns = {
        "topk_ids": torch.tensor([[0]], dtype=torch.int32),
        "topk_logprobs": torch.tensor([[0.25]]).log(),
        "gold_logprob": torch.tensor([0.25]).log(),
    }
    sums = read(one_loss("shift_invariant"), z, columns, torch.tensor([0]))[2]
    assert sums["weight"].item() == pytest.approx(1 - math.exp(-0.5), rel=1e-4)


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """Hinton's T^2: as T grows the gradient goes to a limit, (z - mean z - t + mean t) / V, not to nothing."""
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 30, generator=draw, dtype=DOUBLE), torch.randn(2, 30, generator=draw, dtype=DOUBLE)
    gold = torch.tensor([0, 1])
    columns = doubled(teacher_columns(t, gold, 30, 1e4))
    columns["topk_logprobs"] = (t / 1e4).log_softmax(1).gather(1, columns["topk_ids"].long())
    _, gradient, _ = read(one_loss("forward_kl", temperature=1e4), z, columns, gold)
    limit = (z - z.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)) / 30
    torch.testing.assert_close(gradient, limit, rtol=1e-2, atol=1e-4)


def test_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'topk' is not known.*\n.*forward_kl"):
        make_loss("topk", kl_lambda=1.0, ce_weight=1.0, temperature=1.0)


# ---- in a model: the same gradient however the rows are laid out -----------------------------------------


def model64() -> Any:
    model = create(
        {
            "model_type": "llama", "vocab_size": 60, "num_hidden_layers": 2, "hidden_size": 16,
            "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "max_position_embeddings": 600, "initializer_range": 0.4, "tie_word_embeddings": False,
        },
        0,
    )  # fmt: skip
    model.set_attn_implementation("sdpa")  # the plain one takes its softmax in float32
    return model.double().eval()


def rows_with_a_teacher(count: int = 32, top_k: int = 5) -> list[dict[str, Any]]:
    """Rows of unequal length; about half of the labels count, and one row has none at all."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        length = 6 + number % 7
        ids = torch.randint(1, 60, (length,), generator=draw)
        silent = torch.rand(length, generator=draw) < (2.0 if number == 5 else 0.5)
        silent[0] = True  # a first token has nothing before it
        columns = teacher_columns(2 * torch.randn(length, 60, generator=draw), ids, top_k, 1.0)
        columns = {c: v.masked_fill(silent.view(-1, *[1] * (v.dim() - 1)), 0) for c, v in columns.items()}
        row = {"input_ids": ids, "labels": ids.masked_fill(silent, -100), **columns}
        rows.append({name: value.numpy() for name, value in row.items()})
    return rows


def packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """All rows in one, told apart by position_ids."""
    batch = {name: torch.cat([torch.from_numpy(row[name]) for row in rows])[None] for name in rows[0]}
    batch["position_ids"] = torch.cat([torch.arange(len(row["labels"])) for row in rows])[None]
    return batch


def wider(batch: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    """The same batch with `more` positions of padding at the right."""
    wide = collate([{name: value[row].numpy() for name, value in batch.items() if name != "attention_mask"}
                    for row in range(len(batch["labels"]))], 0)  # fmt: skip
    for name, value in wide.items():
        padding = torch.full(
            (len(value), more, *value.shape[2:]), -100 if name == "labels" else 0, dtype=value.dtype
        )
        wide[name] = torch.cat([batch[name], padding], 1)
    return wide


def gradients(loss: Callable[..., torch.Tensor], batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Of the sum of losses over `batches`: what accumulation leaves in .grad."""
    model = model64()
    items = torch.tensor(100)
    for batch in batches:
        loss(model, batch, items).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", LOSSES)
def test_one_gradient_however_rows_are_laid_out(name: str) -> None:
    rows = rows_with_a_teacher()
    loss = make_loss(name, kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    whole = collate(rows, 0)
    wanted = gradients(loss, [whole])
    assert all(value.abs().max() > 1e-6 for value in wanted)
    small = make_loss(name, kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    small.chunk_rows = 7
    smallest = make_loss(name, kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    smallest.chunk_rows = 1
    for other, batches in (
        (loss, [collate([row], 0) for row in rows]),  # 32 x 1; one of them counts nothing
        (loss, [collate(rows[n : n + 8], 0) for n in range(0, 32, 8)]),  # accumulation
        (loss, [packed(rows)]),
        (loss, [packed(rows[:9]), packed(rows[9:])]),
        (loss, [wider(whole, 13)]),
        (small, [whole]),
        (smallest, [whole]),
    ):
        for found, value in zip(gradients(other, batches), wanted, strict=True):
            assert (found - value).norm() <= 1e-10 * (1 + value.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_that_counts_nothing(name: str) -> None:
    model = model64()
    batch = collate([rows_with_a_teacher()[5]], 0)
    loss = make_loss(name, kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    value = loss(model, batch, torch.tensor(1))
    value.backward()
    assert value.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    assert loss.sums["tokens"] == 0 and loss.sums["ce"] == 0


def test_sums_add_up_over_calls() -> None:
    rows = rows_with_a_teacher()
    model, items = model64(), torch.tensor(7)
    loss = make_loss("published_code", kl_lambda=0.5, ce_weight=2.0, temperature=1.0)
    total = sum(loss(model, collate(rows[n : n + 8], 0), items).item() for n in range(0, 32, 8))
    nll = next_token_nll(model, collate(rows, 0))
    assert loss.sums["tokens"] == sum((row["labels"] != -100).sum() for row in rows)
    assert loss.sums["ce"].item() == pytest.approx(nll.item(), rel=1e-12)
    assert 0 < loss.sums["weight"] < loss.sums["tokens"]
    assert not any(value.requires_grad for value in loss.sums.values())
    only = make_loss("renormalised_kl", kl_lambda=1.0, ce_weight=0.0, temperature=1.0)
    only(model, collate(rows, 0), items)
    assert only.sums["kd"].item() == pytest.approx(loss.sums["kd"].item(), rel=1e-9)
    assert total * 7 > 2 * nll.item()


def test_ce_is_the_loss_of_every_other_stage() -> None:
    model, batch, items = model64(), collate(rows_with_a_teacher(), 0), torch.tensor(9)
    loss = make_loss("ce", kl_lambda=0.0, ce_weight=1.0, temperature=1.0)
    assert loss(model, batch, items).item() == cross_entropy(model, batch, items).item()


def test_a_missing_column_is_named() -> None:
    batch = collate(rows_with_a_teacher(2), 0)
    del batch["tail_logprob"]
    loss = make_loss("forward_kl", kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    with pytest.raises(ModelError, match="no column tail_logprob"):
        loss(model64(), batch, torch.tensor(1))


def test_without_gradients_nothing_is_kept() -> None:
    model, batch = model64(), collate(rows_with_a_teacher(4), 0)
    loss = make_loss("reverse_kl", kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    with torch.no_grad():
        value = loss(model, batch, torch.tensor(1))
    assert not value.requires_grad
    assert value.item() == pytest.approx(loss(model, batch, torch.tensor(1)).item(), rel=1e-12)


def test_a_second_backward_pass_is_refused() -> None:
    model, batch = model64(), collate(rows_with_a_teacher(4), 0)
    value = cross_entropy(model, batch, torch.tensor(1))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        value.backward()


def test_hidden_states_of_uncounted_positions_are_not_read() -> None:
    """Masked positions are dropped before the head: their gradient there is nothing, not a masked something."""
    model, batch = model64(), collate(rows_with_a_teacher(4), 0)
    hidden, head = hidden_of(model, batch)
    assert hidden.shape[:2] == batch["labels"].shape
    loss = make_loss("forward_kl", kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
    seen: list[int] = []

    def project(values: torch.Tensor) -> torch.Tensor:
        seen.append(len(values))
        return values

    counted_labels = int((batch["labels"][:, 1:] != -100).sum())
    picked = hidden[:, :-1][batch["labels"][:, 1:] != -100]
    columns = {name: batch[name][:, 1:][batch["labels"][:, 1:] != -100] for name in LOSSES["forward_kl"].reads}
    gold = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    total, _ = loss.of_hidden(picked, Head(((project, head.factors[0][1]),)), gold, columns)
    assert seen == [counted_labels]
    assert total.item() == pytest.approx(loss(model, batch, torch.tensor(1)).item(), rel=1e-12)


# ---- memory ----------------------------------------------------------------------------------------------


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once during `run`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("T", "cap", "buffers"), [(1.0, math.inf, 1), (2.0, math.inf, 2), (1.0, 30.0, 2)])
def test_memory_is_that_of_its_buffers(T: float, cap: float, buffers: int, frozen: bool) -> None:
    """[n, V] as often as said, the head's gradient once if it has one, [N, D], and [N, K]: nothing like [N, V].

    So with 8192 positions, V = 151,936, D = 2560, K = 100 on a GPU in bfloat16: 640 MiB of buffers, 80 + 40 of
    the hidden states' gradient, 40 of the picked hidden states, some 40 of columns: 840 MiB.
    """
    count, vocab, width, top_k, rows = 256, 6000, 32, 10, 16
    z = torch.randn(count, width)
    gold = torch.randint(0, vocab, (count,))
    columns = teacher_columns(torch.randn(count, vocab), gold, top_k, T)
    weight = torch.randn(vocab, width).requires_grad_(not frozen)
    hidden = z.requires_grad_()
    loss = make_loss("forward_kl", kl_lambda=1.0, ce_weight=1.0, temperature=T)
    loss.chunk_rows = rows

    def run() -> None:
        loss.of_hidden(hidden, Head(((lambda h: h, weight),), cap=cap), gold, columns)[0].backward()

    run()
    hidden.grad = weight.grad = None
    fixed = buffers * rows * vocab * 4 + (0 if frozen else weight.nbytes) + hidden.nbytes
    allowed = fixed + count * top_k * 40 + rows * top_k * 200 + 64 * rows * width
    assert fixed <= allocated(run) <= allowed < count * vocab * 4

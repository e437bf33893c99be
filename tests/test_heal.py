"""Healing: every loss against naive float64 logits, and a cut model that learns from its teacher.

Run by torchrun (the last lines), this file is one rank of test_two_ranks_have_the_gradient_of_one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import chats, tiny_model
from torch.profiler import ProfilerActivity, profile

from distill import capture
from distill.heal import Healed, HealingLoss, _choose, heal, layer_outputs
from distill.heal.chunked import chunked_divergence
from distill.heal.divergence import LOGIT_LOSSES, divergence
from distill.heal.layers import check_map, neighbours, pairs
from distill.heal.loss import SERVED, squared_error
from foundation.chunked import CHUNK_BYTES
from foundation.dataio import conversations, write_jsonl
from foundation.errors import Diverged, InputError, ModelError
from foundation.head import Head
from foundation.healing import STORED, HealSettings
from foundation.losses import logits_of
from foundation.model import create, load, save
from foundation.report import Silent
from foundation.rows import JoinedRows, chat_rows, collate
from foundation.tokenizer import Tokenizer
from prune.cut import cut_folder

HERE = Path(__file__).resolve().parent
DOUBLE = torch.float64
TEMPERATURE = 2.5


# ---- the oracle: full logits, plain autograd, nothing shared with the code under test -----------------------


def oracle(name: str, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Loss of one position: student's logits z [V], teacher's t [V]."""
    p, q = t.softmax(0), z.softmax(0)
    log_p, log_q = t.log_softmax(0), z.log_softmax(0)
    if name == "kl":
        return (p * (log_p - log_q)).sum()
    if name == "kl_100":
        return (p * (log_p - log_q)).sum() / 100
    if name == "kl_reverse":
        return (q * (log_q - log_p)).sum()
    if name == "kl_scaled":
        soft, hard = (z / TEMPERATURE).log_softmax(0), (t / TEMPERATURE).log_softmax(0)
        return TEMPERATURE**2 * (hard.exp() * (hard - soft)).sum()
    if name == "logprob_mse":
        return ((log_q - log_p) ** 2).sum() / len(z)
    assert name == "logit_mse"
    return ((z - t) ** 2).sum() / len(z)


def read(name: str, z: torch.Tensor, t: torch.Tensor, chunk_rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the loss, gradient of the logits [N, V]): the head is the identity, so hidden states are it."""
    hidden = z.detach().clone().requires_grad_()
    head = Head(((lambda h: h, torch.eye(z.shape[1], dtype=z.dtype)),))
    total = chunked_divergence(hidden, head, t, head, divergence(name, TEMPERATURE), chunk_rows=chunk_rows)
    (gradient,) = torch.autograd.grad(total, hidden)
    return total.detach(), gradient


def exact(name: str, z: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's losses [N] and their gradients [N, V]."""
    logits = z.detach().double().requires_grad_()
    values = torch.stack([oracle(name, logits[n], t[n].double()) for n in range(len(z))])
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient


def adversarial(vocab: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher) [N, V]: alike, one-hot in one of them or in both, far apart, shifted, flat, huge."""
    draw = torch.Generator().manual_seed(5)
    z, t = (3 * torch.randn(10, vocab, generator=draw, dtype=DOUBLE) for _ in range(2))
    t[0] = z[0]  # alike
    t[1], t[1, 7] = 0.0, 200.0  # the teacher is sure, in float32 to the last bit
    z[2], z[2, 3] = 0.0, 200.0  # the student is
    z[3], t[3] = 0.0, 0.0
    z[3, 1] = t[3, 1] = 90.0  # both are, and agree
    z[4], t[4] = 0.0, 0.0
    z[4, 1] = t[4, 2] = 60.0  # both are, and do not
    t[5] = z[5] + 64.0  # another offset, which only logit_mse sees
    z[6], t[6] = 0.0, 0.0  # flat
    z[7] = t[7] + 1e-3 * z[7]  # almost alike
    z[8] += 1024.0  # a large offset
    t[9] *= 10
    return z.bfloat16().double(), t.bfloat16().double()  # exact in every type that is tried


@pytest.mark.parametrize(("dtype", "error"), [(DOUBLE, 1e-10), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_value_and_gradient_equal_the_oracle(name: str, dtype: torch.dtype, error: float) -> None:
    z, t = (value.to(dtype) for value in adversarial())
    values, wanted = exact(name, z, t)
    for n in range(len(z)):
        total, gradient = read(name, z[n : n + 1], t[n : n + 1])
        assert total.item() == pytest.approx(values[n].item(), rel=error, abs=error), n
        assert (gradient[0] - wanted[n]).norm() <= error * max(1.0, wanted[n].norm().item()), n


@given(
    name=st.sampled_from(list(LOGIT_LOSSES)),
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 40),
    count=st.integers(1, 7),
    chunk_rows=st.integers(0, 8),
    width=st.sampled_from([0.01, 3.0, 30.0]),
)
@examples(max_examples=150, deadline=None)
def test_oracle_on_anything(
    name: str, seed: int, vocab: int, count: int, chunk_rows: int, width: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    z, t = (width * torch.randn(count, vocab, generator=draw, dtype=DOUBLE) for _ in range(2))
    values, wanted = exact(name, z, t)
    total, gradient = read(name, z, t, chunk_rows)
    assert total.item() == pytest.approx(values.sum().item(), rel=1e-10, abs=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_equal_models_have_no_loss_and_no_gradient(name: str) -> None:
    z = adversarial()[0].float()
    total, gradient = read(name, z, z.clone())
    assert total == 0 and not gradient.any()


def test_values_by_hand() -> None:
    """V = 2, teacher (3/4, 1/4), student (1/2, 1/2): numbers that a pocket calculator gives."""
    z, t = torch.zeros(1, 2, dtype=DOUBLE), torch.tensor([[math.log(3.0), 0.0]], dtype=DOUBLE)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    by_hand = {
        "kl": forward,
        "kl_100": forward / 100,
        "kl_reverse": 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0),
        "logprob_mse": (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 2,
        "logit_mse": math.log(3.0) ** 2 / 2,
    }
    for name, value in by_hand.items():
        assert read(name, z, t)[0].item() == pytest.approx(value, rel=1e-12), name
    cooled = t * TEMPERATURE  # at TEMPERATURE the teacher is (3/4, 1/4) again
    assert read("kl_scaled", z, cooled)[0].item() == pytest.approx(TEMPERATURE**2 * forward, rel=1e-12)


def heads(count: int = 23, vocab: int = 37) -> list[Any]:
    """(hidden [N, D], head, its leaves, the formula written out) of two models that share only V."""
    draw = torch.Generator().manual_seed(8)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=DOUBLE).requires_grad_()

    sides = []
    for width, rank, scale, limit in ((6, 2, 0.7, 5.0), (9, 3, 1.3, 4.0)):
        hidden, weight, bias, down, up = (
            some(count, width), some(vocab, width), some(vocab), some(rank, width), some(vocab, rank)
        )  # fmt: skip

        def project(h: torch.Tensor, down: torch.Tensor = down) -> torch.Tensor:
            return h @ down.T * 0.5

        head = Head(((lambda h: h, weight), (project, up)), bias, scale, limit)
        linear = scale * (hidden @ weight.T + hidden @ down.T * 0.5 @ up.T + bias)
        sides.append((hidden, head, [hidden, weight, bias, down, up], limit * torch.tanh(linear / limit)))
    return sides


@pytest.mark.parametrize("chunk_rows", [0, 1, 5, 23, 100])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_biases_scales_soft_caps_and_lora_on_both_heads(name: str, chunk_rows: int) -> None:
    """Any chunk size gives the oracle's gradient in all that the student's head is made of; none reaches the
    teacher's."""
    (hidden, head, leaves, z), (target, target_head, others, t) = heads()
    wanted = sum(oracle(name, z[n], t[n].detach()) for n in range(len(z)))
    expected = torch.autograd.grad(wanted, leaves)
    kind = divergence(name, TEMPERATURE)
    total = chunked_divergence(hidden, head, target, target_head, kind, chunk_rows=chunk_rows)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-12)
    (3 * total).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-10, atol=1e-11)
    assert all(leaf.grad is None for leaf in others)


def test_a_second_backward_pass_is_refused() -> None:
    (hidden, head, _, _), (target, target_head, _, _) = heads()
    total = chunked_divergence(hidden, head, target, target_head, divergence("kl", 1.0))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        total.backward()


def test_no_position_is_no_loss() -> None:
    (hidden, head, leaves, _), (target, target_head, _, _) = heads()
    total = chunked_divergence(hidden[:0], head, target[:0], target_head, divergence("kl", 1.0))
    total.backward()
    assert total == 0 and not leaves[1].grad.any()


def test_heads_of_other_vocabularies_are_refused() -> None:
    (hidden, head, _, _), _ = heads()
    target, other, _, _ = heads(vocab=40)[1]
    with pytest.raises(ModelError, match="the student's head has 37 ids, the teacher's 40"):
        chunked_divergence(hidden, head, target, other, divergence("kl", 1.0))


def allocated(run: Callable[[], object]) -> int:
    """Most bytes of tensors that `run` held at once, beside those there were before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("cap", "buffers"), [(math.inf, 3), (30.0, 4)])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_memory_is_that_of_its_buffers(name: str, cap: float, buffers: int) -> None:
    """[n, V] as often as said, the gradients of head and hidden states: nothing like [N, V]."""
    count, vocab, width, rows = 256, 6000, 32, 16
    hidden = torch.randn(count, width).requires_grad_()
    weight = torch.randn(vocab, width).requires_grad_()
    target, other = torch.randn(count, width), torch.randn(vocab, width)
    head, target_head = (Head(((lambda h: h, w),), cap=cap) for w in (weight, other))
    kind = divergence(name, TEMPERATURE)

    def run() -> None:
        chunked_divergence(hidden, head, target, target_head, kind, chunk_rows=rows).backward()

    run()
    hidden.grad = weight.grad = None
    fixed = buffers * rows * vocab * 4 + weight.nbytes + hidden.nbytes
    assert fixed <= allocated(run) <= fixed + 64 * rows * width < count * vocab * 4


def test_memory_of_many_positions_stays_in_its_bound() -> None:
    """N = 2048, V = 32768: 256 MiB for logits held in full, four times that for both models and gradients."""
    count, vocab, width = 2048, 32768, 8
    hidden, target = torch.randn(count, width).requires_grad_(), torch.randn(count, width)
    head, other = (Head(((lambda h: h, torch.randn(vocab, width)),)) for _ in range(2))

    def run() -> None:
        chunked_divergence(hidden, head, target, other, divergence("kl", 1.0)).backward()

    peak = allocated(run)
    bound = CHUNK_BYTES["cpu"] + 3 * hidden.nbytes + 2**16
    assert CHUNK_BYTES["cpu"] * 0.95 < peak <= bound < count * vocab * 4


# ---- which layers -----------------------------------------------------------------------------------------


def test_neighbours_of_gaps() -> None:
    assert neighbours([2], 4) == [1, 2]
    assert neighbours([0], 4) == [0] and neighbours([4], 4) == [3]  # ends have one
    assert neighbours([1, 2], 4) == [0, 1, 2] and neighbours([1, 3, 1], 4) == [0, 1, 2, 3]
    assert neighbours([], 4) == []


def test_pairs_of_layers() -> None:
    kept, trained = [0, 1, 4, 5, 7], [1, 2]  # layers 2, 3, 6 of the teacher are gone
    assert pairs("none", trained, kept, 8) == []
    assert pairs("last", trained, kept, 8) == [(4, 7)]
    assert pairs("trained", trained, kept, 8) == [(2, 4)]
    assert pairs("trained_last", trained, kept, 8) == [(2, 4), (4, 7)]
    assert pairs("all", trained, kept, 8) == [(0, 0), (1, 1), (2, 4), (3, 5), (4, 7)]
    everything = list(range(5))
    assert pairs("trained", everything, kept, 8) == pairs("trained_last", everything, kept, 8) == [(4, 7)]
    ended = [0, 1, 4]  # and 5, 6, 7 too: the last layer learns to be the teacher's last
    assert pairs("last", [2], ended, 8) == pairs("trained_last", [2], ended, 8) == [(2, 7)]
    assert pairs("all", [2], ended, 8) == [(0, 0), (1, 1), (2, 7)]


@pytest.mark.parametrize(
    ("kept", "gaps", "said"),
    [
        ([0, 1], [1], r"names 2 layers, the student has 3"),
        ([0, 2, 1], [1], r"no part of a teacher of 4 layers"),
        ([0, 2, 2], [1], r"no part of a teacher of 4 layers"),
        ([0, 2, 4], [1], r"no part of a teacher of 4 layers"),
        ([-1, 0, 1], [1], r"no part of a teacher of 4 layers"),
        ([0, 2, 3], [4, -1], r"gaps \[4, -1\]: a model of 3 layers has gaps 0 to 3"),
    ],
)
def test_maps_that_can_not_be(kept: list[int], gaps: list[int], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check_map(kept, gaps, 3, 4)
    check_map([0, 2, 3], [0, 3], 3, 4)


def test_hidden_error_by_hand() -> None:
    """Labels count at positions 1 and 3, which positions 0 and 2 predict; D = 2."""
    own = torch.tensor([[[1.0, 2.0], [50.0, 50.0], [0.0, -1.0], [9.0, 9.0]]])
    other = torch.tensor([[[0.0, 0.0], [7.0, 7.0], [3.0, 3.0], [8.0, 8.0]]])
    labels = torch.tensor([[5, 6, -100, 7]])  # the first label has nothing before it
    assert squared_error(own, other, labels).item() == (1 + 4) / 2 + (9 + 16) / 2


# ---- the loss on models -----------------------------------------------------------------------------------


KEPT, LAYERS = [0, 2, 3], 4  # layer 1 is gone


def model64(layers: int, seed: int, **changes: object) -> Any:
    """A small model in float64; a Llama is so to the last bit, where transformers' norms and plain attention
    round to float32."""
    shape = {
        "model_type": "llama", "vocab_size": 60, "num_hidden_layers": layers, "hidden_size": 16,
        "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 600, "initializer_range": 0.4, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = create({**shape, **changes}, seed)
    if model.config.model_type == "llama":
        model.set_attn_implementation("sdpa")
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, torch.nn.RMSNorm(16, child.variance_epsilon))
    return model.double().eval()


def some_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows of unequal length; about half of the labels count, and one row has none at all."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 60, (6 + number % 5,), generator=draw)
        silent = torch.rand(len(ids), generator=draw) < (2.0 if number == 5 else 0.5)
        silent[0] = True
        rows.append({"input_ids": ids.numpy(), "labels": ids.masked_fill(silent, -100).numpy()})
    return rows


def chosen(**changes: Any) -> HealSettings:
    scaled = {"logit_temperature": TEMPERATURE} if changes.get("logit_loss") == "kl_scaled" else {}
    return HealSettings(**{**scaled, **changes})


def items_of(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor(sum(int((row["labels"][1:] != -100).sum()) for row in rows))


def outputs_before_the_norm(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of every layer [T, D]: transformers' own hidden states, the last by a model whose norm does nothing."""
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    states = model.model(ids[None], output_hidden_states=True).hidden_states
    model.model.norm = norm
    assert len(states) == len(model.model.layers) + 1
    return [state[0] for state in states[1:]]


def naive(settings: HealSettings, student: Any, teacher: Any, layer_pairs: Any, row: Any) -> torch.Tensor:
    """Sum over a row's counted tokens, alone and without padding, position by position, logits in full."""
    ids = torch.from_numpy(row["input_ids"])
    z, own = student(ids[None]).logits[0], outputs_before_the_norm(student, ids)
    with torch.no_grad():
        t, other = teacher(ids[None]).logits[0], outputs_before_the_norm(teacher, ids)
    total = z.new_zeros(())
    for at in range(1, len(ids)):
        if row["labels"][at] == -100:
            continue
        if settings.logit_loss != "none":
            total = total + oracle(settings.logit_loss, z[at - 1], t[at - 1])
        errors = [((own[s][at - 1] - other[o][at - 1]) ** 2).mean() for s, o in layer_pairs]
        if errors:
            whole = torch.stack(errors).sum()
            total = total + settings.hidden_weight * (
                whole / len(errors) if settings.hidden_loss == "all" else whole
            )
    return total


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all parameters; zeros where there is none."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], error: float = 1e-10) -> None:
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= error * (1 + value.norm()), name


MIXTURES = [("none", h) for h in ("last", "trained", "trained_last", "all")]
MIXTURES += [(name, "trained_last") for name in LOGIT_LOSSES] + [("kl", "none"), ("kl_100", "all")]


@pytest.mark.parametrize(("logit_loss", "hidden_loss"), MIXTURES)
def test_healing_loss_equals_a_naive_one(logit_loss: str, hidden_loss: str) -> None:
    """Value, figures and the gradient of every weight; rows padded in a batch against rows alone."""
    settings = chosen(
        logit_loss=logit_loss,
        hidden_loss=hidden_loss,
        **({} if hidden_loss == "none" else {"hidden_weight": 0.3}),
    )
    teacher, student, rows = model64(4, 0), model64(3, 1), some_rows()
    between = {"none": [], "last": [(2, 3)], "trained": [(1, 2)], "trained_last": [(1, 2), (2, 3)],
               "all": [(0, 0), (1, 2), (2, 3)]}[hidden_loss]  # fmt: skip
    wanted = sum(naive(settings, student, teacher, between, row) for row in rows) / items_of(rows)
    loss = HealingLoss(settings, student, teacher, pairs(hidden_loss, [0, 1], KEPT, LAYERS))  # type: ignore[arg-type]
    total = loss(student, collate(rows, 0), items_of(rows))
    assert total.item() == pytest.approx(wanted.item(), rel=1e-10)
    expected = gradients(student, wanted)
    total.backward()
    given = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same(given, {name: value for name, value in expected.items() if name in given or value.any()})
    means = {name: float(value) / float(items_of(rows)) for name, value in loss.sums.items()}
    assert means.pop("tokens") == 1.0
    parts = means.get("logits", 0.0) + 0.3 * means.get("hidden", 0.0)
    assert parts == pytest.approx(wanted.item(), rel=1e-10)
    assert ("logits" in means, "hidden" in means) == (logit_loss != "none", hidden_loss != "none")
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("logit_loss", ["kl", "kl_reverse", "logit_mse"])
def test_lora_on_the_head_and_a_soft_cap(logit_loss: str) -> None:
    """gemma2 caps its logits; adapters on all layers and on the head, with B that is not zero."""
    kind = {"model_type": "gemma2", "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    teacher = model64(4, 0, **kind)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    student = get_peft_model(model64(3, 1, **kind), config)
    settings, rows = chosen(logit_loss=logit_loss, hidden_loss="last"), some_rows()
    plain = student.get_base_model()
    wanted = sum(naive(settings, plain, teacher, [(2, 3)], row) for row in rows) / items_of(rows)
    total = HealingLoss(settings, student, teacher, [(2, 3)])(student, collate(rows, 0), items_of(rows))
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)  # gemma's norms are in float32
    found = gradients(student, total)
    assert any("lm_head" in name for name in found) and all("lora_" in name for name in found)
    assert_same(found, gradients(student, wanted), 1e-5)


def test_accumulation_changes_nothing() -> None:
    """1 x 8, 4 x 2 and 8 x 1 rows of unequal length, one of them without a label: the same gradient."""
    settings, rows = chosen(logit_loss="kl", hidden_loss="all"), some_rows()
    teacher, student = model64(4, 0), model64(3, 1)
    sums: list[dict[str, torch.Tensor]] = []
    for micro in (1, 2, 8):
        loss = HealingLoss(settings, student, teacher, pairs("all", [0], KEPT, LAYERS))
        loss.chunk_rows = 3
        parts = [rows[start : start + micro] for start in range(0, 8, micro)]
        total = sum(loss(student, collate(part, 0), items_of(rows)) for part in parts)
        sums.append({**gradients(student, total), "loss": total.detach()})
    for other in sums[1:]:
        assert_same(other, sums[0])


@given(seed=st.integers(0, 1000), more=st.integers(0, 5))
@examples(max_examples=15, deadline=None)
def test_padding_and_positions_not_counted_have_no_say(seed: int, more: int) -> None:
    """Other tokens and labels in the padding, and more of it, alter no bit of the loss; nor do the hidden
    states at positions that predict no label (the teacher's are drawn anew there)."""
    settings, rows = chosen(logit_loss="kl", hidden_loss="trained_last"), some_rows(3)
    teacher, student = model64(4, 0), model64(3, 1)
    between = pairs("trained_last", [0, 1], KEPT, LAYERS)
    batch = collate(rows, 0)
    before = HealingLoss(settings, student, teacher, between)(student, batch, torch.tensor(1))
    pad = batch["attention_mask"] == 0
    noise = torch.randint(3, 60, pad.shape, generator=torch.Generator().manual_seed(seed))
    batch["input_ids"] = torch.where(pad, noise, batch["input_ids"])
    wide = {"input_ids": 7, "labels": -100, "attention_mask": 0}
    batch = {n: torch.cat([v, v.new_full((len(v), more), wide[n])], 1) for n, v in batch.items()}
    silent = batch["labels"].roll(-1, 1) == -100  # predicts no label
    silent[:, -1] = True

    def disturb(module: Any, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        return torch.where(silent[..., None], states + 100 * torch.randn_like(states), states)

    handle = teacher.model.layers[-1].register_forward_hook(disturb)
    after = HealingLoss(settings, student, teacher, between)(student, batch, torch.tensor(1))
    handle.remove()
    assert after.item() == pytest.approx(before.item(), rel=1e-12)


def test_joined_rows_count_as_rows_alone() -> None:
    """Conversations that share a row (position_ids) do not see each other, in either model."""
    settings, rows = chosen(logit_loss="kl", hidden_loss="all"), some_rows()
    teacher, student = model64(4, 0), model64(3, 1)
    joined = JoinedRows(rows, 24, 0)
    assert 1 < len(joined) < len(rows)
    found = []
    for batch in (collate(rows, 0), collate([joined[n] for n in range(len(joined))], 0)):
        loss = HealingLoss(settings, student, teacher, pairs("all", [0], KEPT, LAYERS))
        total = loss(student, batch, items_of(rows))
        found.append({**gradients(student, total), "loss": total.detach()})
    assert_same(found[1], found[0])


def test_gradient_checkpointing_has_the_same_gradient() -> None:
    settings, rows = chosen(logit_loss="kl", hidden_loss="all"), some_rows()
    teacher, student = model64(4, 0), model64(3, 1).train()
    student.requires_grad_(False)
    student.model.layers[1].requires_grad_(True)
    found, calls = [], []
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        handle = student.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        loss = HealingLoss(settings, student, teacher, pairs("all", [0], KEPT, LAYERS))
        found.append(gradients(student, loss(student, collate(rows, 0), items_of(rows))))
        handle.remove()
    assert len(calls) == 1 + 2  # the second time it is computed again
    assert_same(found[1], found[0])


@pytest.mark.parametrize(("logit_loss", "weight"), [("kl", 1.0), ("kl_100", 0.01), ("kl_reverse", 1.0)])
def test_a_store_of_the_whole_vocabulary_is_the_live_teacher(logit_loss: str, weight: float) -> None:
    """V - 1 entries and the tail's mass, against the same loss with the teacher at hand; both gradients too."""
    settings, rows = chosen(logit_loss=logit_loss, hidden_loss="none"), some_rows()
    teacher, student, batch = model64(4, 0), model64(3, 1), collate(some_rows(), 0)
    live = HealingLoss(settings, student, teacher, [])(student, batch, items_of(rows))
    with torch.no_grad():
        log_p = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    top = log_p.roll(1, 1).topk(59)  # what predicts a token stands beside it
    rest = log_p.roll(1, 1).scatter(2, top.indices, -math.inf).logsumexp(2)
    stored = {**batch, "topk_ids": top.indices.int(), "topk_logprobs": top.values, "tail_logprob": rest}
    loss = HealingLoss(settings, student, None, [])
    served = loss(student, stored, items_of(rows))
    assert served.item() == pytest.approx(live.item(), rel=1e-10)
    assert_same(gradients(student, served), gradients(student, live))
    assert set(loss.sums) == {"logits", "tokens"}
    with pytest.raises(ModelError, match="the batch has no column topk_ids"):
        loss(student, batch, items_of(rows))


# ---- settings ---------------------------------------------------------------------------------------------


def test_what_a_store_can_not_serve() -> None:
    assert chosen(logit_loss="kl", hidden_loss="none").refused_by_a_store() == []
    hidden, logits = chosen(logit_loss="logit_mse").refused_by_a_store()
    assert hidden.startswith("hidden_loss = 'trained_last' needs a live teacher")
    assert logits == "logit_loss = 'logit_mse' needs a live teacher; a store serves kl, kl_100, kl_reverse"
    assert len(chosen(logit_loss="none", hidden_loss="all").refused_by_a_store()) == 2
    assert set(STORED) == set(SERVED)  # what is told is what there is


# ---- a whole healing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher: loud random weights, so that there is something to heal."""
    return tiny_model(tmp_path_factory.mktemp("teacher"), layers=5, initializer_range=0.2)


@pytest.fixture(scope="module")
def lame(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without layer 2."""
    out = tmp_path_factory.mktemp("cut")
    cut_folder(folder, [2], out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats())
    return path


def healed(lame: Path, folder: Path, data: Path, work: Path, report: Any = None, **changes: Any) -> Healed:
    tokenizer = Tokenizer(folder)
    rows, *_ = chat_rows(conversations([data]), tokenizer, 128)
    few = {"steps": 3, "batch_rows": 4, "warmup_steps": 0, "learning_rate": 1e-2, "precision": "fp32"}
    store = changes.pop("store", None)
    place = {"kept": changes.pop("kept", [0, 1, 3, 4]), "gaps": changes.pop("gaps", [2])}
    return heal(
        lame, None if store else load(folder), place["kept"], place["gaps"], rows,
        HealSettings(**{**few, **changes}), work, report or Silent(),
        pad_id=tokenizer.pad_id, store=store, tokenizer=tokenizer,
    )  # fmt: skip


def curves(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "curves.jsonl").read_text().splitlines()]


def changed(lame: Path, model: Any) -> set[str]:
    before = load(lame).state_dict()
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


@pytest.mark.parametrize(("gaps", "layers"), [([2], (1, 2)), ([0], (0,)), ([4], (3,)), ([1, 4], (0, 1, 3))])
def test_the_neighbours_of_the_gap_alone_change(
    lame: Path, folder: Path, data: Path, tmp_path: Path, gaps: list[int], layers: tuple[int, ...]
) -> None:
    result = healed(lame, folder, data, tmp_path, gaps=gaps)
    moved = changed(lame, result.model)
    assert moved == set(result.changed) and len(moved) == 9 * len(layers)
    assert {name.split(".")[2] for name in moved} == {str(layer) for layer in layers}
    assert list(result.changed) == sorted(result.changed)


def test_healing_heals_and_says_how(lame: Path, folder: Path, data: Path, tmp_path: Path) -> None:
    """The loss falls to less than a third, its parts are told, and the first line is what they were before."""
    result = healed(
        lame, folder, data, tmp_path, trains="all", logit_loss="kl", steps=40, batch_rows=12, learning_rate=3e-3
    )
    lines = curves(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] / 3
    assert all(x["loss"] == pytest.approx(x["logits"] + x["hidden"], rel=1e-4) for x in lines)
    rows, *_ = chat_rows(conversations([data]), Tokenizer(folder), 128)
    batch, student, teacher = collate(rows, 0), load(lame), load(folder)
    z, t = (logits_of(m, batch)[:, :-1].log_softmax(-1) for m in (student, teacher))
    there = batch["labels"][:, 1:] != -100
    assert lines[0]["logits"] == pytest.approx((t.exp() * (t - z)).sum(-1)[there].mean().item(), rel=1e-4)
    names = {name for name, _ in result.model.named_parameters()}
    assert set(result.changed) == names and result.figures["steps"] == 40


def test_without_a_logit_loss_norm_and_head_stay(folder: Path, data: Path, tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", layers=3, tie_word_embeddings=False)
    cut_folder(teacher, [1], tmp_path / "cut")
    place: dict[str, Any] = {"kept": [0, 2], "gaps": [1], "trains": "all", "hidden_loss": "last"}
    without = healed(tmp_path / "cut", teacher, data, tmp_path / "a", logit_loss="none", **place)
    beside = healed(tmp_path / "cut", teacher, data, tmp_path / "b", logit_loss="kl", **place)
    assert set(beside.changed) - set(without.changed) == {"model.norm.weight", "lm_head.weight"}
    assert changed(tmp_path / "cut", without.model) == set(without.changed)
    assert "logits" not in curves(tmp_path / "a")[0]


def test_lora_is_merged(lame: Path, folder: Path, data: Path, tmp_path: Path) -> None:
    """Against the adapters in the last checkpoint, added by hand; embedding, norms and head stay."""
    result = healed(lame, folder, data, tmp_path, trains="lora", lora_rank=4, lora_alpha=12, logit_loss="kl")
    adapter = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    before, after = load(lame).state_dict(), result.model.state_dict()
    assert len(result.changed) == 4 * 7 and changed(lame, result.model) == set(result.changed)
    for name in result.changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        product = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(after[name], before[name] + 12 / 4 * product)


class KillAt(Silent):
    """Dies without a word, as kill -9 would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        if done == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["neighbours", "lora"])
def test_killed_and_resumed_is_the_same_model(
    lame: Path, folder: Path, data: Path, tmp_path: Path, trains: str
) -> None:
    plan: dict[str, Any] = {"steps": 6, "checkpoint_every_steps": 2, "trains": trains, "precision": "bf16"}
    whole = healed(lame, folder, data, tmp_path / "whole", **plan)
    with pytest.raises(KeyboardInterrupt):
        healed(lame, folder, data, tmp_path / "torn", KillAt(5), **plan)
    report = Silent()
    again = healed(lame, folder, data, tmp_path / "torn", report, **plan)
    assert report.notes == ["going on from checkpoint-4"]
    assert again.changed == whole.changed and again.figures == whole.figures
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    torn, undisturbed = (tmp_path / name / "curves.jsonl" for name in ("torn", "whole"))
    assert torn.read_bytes() == undisturbed.read_bytes()


def test_a_loss_that_is_not_finite_ends_the_healing(
    lame: Path, folder: Path, data: Path, tmp_path: Path
) -> None:
    broken = load(folder)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    save(broken, folder, tmp_path / "broken")
    for number, (logit_loss, hidden_loss) in enumerate([("kl_100", "none"), ("none", "last")]):
        parts: dict[str, Any] = {"logit_loss": logit_loss, "hidden_loss": hidden_loss}
        with pytest.raises(Diverged, match="the loss is nan at step 1"):
            healed(lame, tmp_path / "broken", data, tmp_path / str(number), **parts)


@pytest.mark.slow
def test_a_store_heals(lame: Path, folder: Path, data: Path, tmp_path: Path) -> None:
    """Captured with 12 bits and all ids but one: the first loss is the live one but for rounding."""
    captured = capture.Settings(top_k=399, bits=12)
    capture.run(captured, {"teacher": folder, "data": (data,)}, tmp_path / "capture", Silent())
    plan: dict[str, Any] = {"logit_loss": "kl", "hidden_loss": "none", "batch_rows": 12, "steps": 8}
    live = healed(lame, folder, data, tmp_path / "live", **plan)
    served = healed(lame, folder, data, tmp_path / "served", store=tmp_path / "capture" / "store", **plan)
    one, other = curves(tmp_path / "live"), curves(tmp_path / "served")
    assert other[0]["logits"] == pytest.approx(one[0]["logits"], rel=2e-3)
    assert other[-1]["logits"] < other[0]["logits"] and served.changed == live.changed


def test_what_can_not_be_healed(lame: Path, folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a live teacher"):
        healed(lame, folder, data, tmp_path, store=tmp_path / "none")
    with pytest.raises(ValueError, match="nothing would be learnt"):
        HealSettings(logit_loss="none", hidden_loss="none")
    for idle in ({"lora_rank": 4}, {"logit_temperature": 3.0}, {"hidden_loss": "none", "hidden_weight": 2.0}):
        with pytest.raises(ValueError, match="has no effect but with"):
            HealSettings(**idle)
    with pytest.raises(ModelError, match="names 3 layers, the student has 4"):
        healed(lame, folder, data, tmp_path, kept=[0, 1, 3])
    with pytest.raises(ModelError, match="no part of a teacher of 5 layers"):
        healed(lame, folder, data, tmp_path, kept=[0, 1, 3, 5])
    with pytest.raises(ModelError, match="no layer was removed"):
        healed(lame, folder, data, tmp_path, gaps=[])
    sampled = capture.Settings(support="sampled", draws=4)
    capture.run(sampled, {"teacher": folder, "data": (data,)}, tmp_path / "capture", Silent())
    plan: dict[str, Any] = {"store": tmp_path / "capture" / "store", "hidden_loss": "none"}
    with pytest.raises(InputError, match="support = 'top_k'; this one has 'sampled'"):
        healed(lame, folder, data, tmp_path, **plan)
    tokenizer = Tokenizer(folder)
    with pytest.raises(InputError, match="needs one teacher"):
        heal(lame, None, [0], [0], [], HealSettings(), tmp_path, Silent(), pad_id=0, tokenizer=tokenizer)


def test_layer_outputs_are_taken_before_the_final_norm(folder: Path) -> None:
    model, ids = load(folder), torch.arange(3, 20)[None]
    with layer_outputs(model, [1, 4]) as seen:
        model(ids)
    states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[1], states[2])  # hidden_states[i] is the INPUT of layer i
    torch.testing.assert_close(model.model.norm(seen[4]), states[5])  # and the last one is normed


# ---- two ranks --------------------------------------------------------------------------------------------


RANKED = [("kl", "none", "all"), ("none", "last", "all"), ("kl_100", "trained_last", "neighbours")]


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Under DDP as the loop sets it up, which waits for every weight that trains."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
        str(tmp_path / "two.safetensors"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = load_file(tmp_path / "two.safetensors"), gradients_of_a_rank(lambda model: model, some_rows(), 1)
    assert one.keys() == two.keys() and len(one) > 60
    assert_same(two, one)


def gradients_of_a_rank(wrap: Callable[[Any], Any], mine: list[Any], ranks: int) -> dict[str, torch.Tensor]:
    """Of every weight that trains, for the mixtures in RANKED; `mine` are the rows of this rank."""
    found: dict[str, torch.Tensor] = {}
    for logit_loss, hidden_loss, trains in RANKED:
        settings = chosen(logit_loss=logit_loss, hidden_loss=hidden_loss, trains=trains)
        teacher, student = model64(4, 0), model64(3, 1)
        trained = _choose(student, [1], settings)
        loss = HealingLoss(settings, student, teacher, pairs(settings.hidden_loss, trained, KEPT, LAYERS))
        wrapped = wrap(student)
        for half in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):  # twice: the reducer is ready again
            (loss(wrapped, collate(half, 0), items_of(some_rows())) * ranks).backward()  # DDP takes the mean
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                found[f"{logit_loss}/{hidden_loss}/{name}"] = parameter.grad
    return found


def main(out: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, ranks, rows = dist.get_rank(), dist.get_world_size(), some_rows()
    mine = rows[rank * len(rows) // ranks : (rank + 1) * len(rows) // ranks]
    found = gradients_of_a_rank(DistributedDataParallel, mine, ranks)
    if rank == 0:
        save_file(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

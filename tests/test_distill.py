"""Top-K distillation: losses against naive fp64, a store that answers only its own conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chats, tiny_model

from distill import capture, train
from distill.capture import top_k_columns
from distill.losses import TopKLoss, published_weight, renormalised_kl, tail_kl
from distill.store import TopKStore
from foundation.chat import IGNORED
from foundation.dataio import conversations, write_jsonl
from foundation.errors import ArtifactError, InputError, ModelError
from foundation.losses import cross_entropy
from foundation.model import load
from foundation.report import Silent
from foundation.rows import chat_rows, collate
from foundation.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Loud random weights: a teacher with opinions, not one that is almost uniform.
    return tiny_model(tmp_path_factory.mktemp("teacher"), seed=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats())
    return path


@pytest.fixture(scope="module")
def store(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    capture.run(
        capture.Settings(top_k=8, batch_rows=5, shard_rows=5),
        {"teacher": teacher, "data": (data,)},
        out,
        Silent(),
    )
    return out / "store"


def distributions(draw_seed: int, vocab: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher log-probabilities [V], student log-probabilities [V], the teacher's top-K ids."""
    generator = torch.Generator().manual_seed(draw_seed)
    t = (3 * torch.randn(vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)
    s = (3 * torch.randn(vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return t, s, t.topk(top_k).indices


@given(seed=st.integers(0, 10_000), vocab=st.integers(5, 60), share=st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_losses_equal_a_naive_fp64_sum(seed: int, vocab: int, share: float) -> None:
    top_k = max(1, int(vocab * share))
    t, s, ids = distributions(seed, vocab, top_k)
    p, q = t[ids].exp(), s[ids].exp()
    naive = sum(pk / p.sum() * (pk / p.sum() / (qk / q.sum())).log() for pk, qk in zip(p, q, strict=True))
    assert renormalised_kl(t[ids][None], s[ids][None]).item() == pytest.approx(naive.item(), rel=1e-4, abs=1e-5)
    rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
    with_tail = (p * (p / q).log()).sum() + rest_p * (rest_p / rest_q).log()
    tail = torch.log(rest_p)[None]
    assert tail_kl(t[ids][None], tail, s[ids][None]).item() == pytest.approx(
        with_tail.item(), rel=1e-3, abs=1e-4
    )


@given(seed=st.integers(0, 10_000), vocab=st.integers(6, 60), top_k=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_laws_of_the_divergences(seed: int, vocab: int, top_k: int) -> None:
    """Non-negative, zero at the teacher, and the tail form is a lower bound of the full KL."""
    t, s, ids = distributions(seed, vocab, top_k)
    tail = torch.log(1 - t[ids].exp().sum())[None]
    full = (t.exp() * (t - s)).sum().item()
    assert renormalised_kl(t[ids][None], s[ids][None]).item() >= -1e-6
    assert renormalised_kl(t[ids][None], t[ids][None]).item() == pytest.approx(0, abs=1e-6)
    assert -1e-5 <= tail_kl(t[ids][None], tail, s[ids][None]).item() <= full + 1e-4
    assert tail_kl(t[ids][None], tail, t[ids][None]).item() == pytest.approx(0, abs=1e-4)


def test_tail_gradient_is_q_minus_p_on_the_support() -> None:
    """dKL/dz_j = q_j - p_j on the K ids and q_j (P-Q)/(1-Q) elsewhere, by hand and by autograd."""
    t, _, ids = distributions(3, 20, 4)
    z = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(9), requires_grad=True)
    p_sum = t[ids].exp().sum()
    tail_kl(t[ids][None], torch.log(1 - p_sum)[None], z.log_softmax(-1)[ids][None]).sum().backward()
    q = z.detach().softmax(-1)
    expected = q * (p_sum - q[ids].sum()) / (1 - q[ids].sum())
    expected[ids] = q[ids] - t[ids].exp()
    torch.testing.assert_close(z.grad, expected, atol=1e-6, rtol=1e-4)


def test_published_weight_by_hand() -> None:
    weight = published_weight(torch.tensor([2.0, -1.0, 1.0, 5.0]), torch.tensor([4.0, 4.0, 0.0, -5.0]))
    assert weight.tolist() == pytest.approx([1 - np.exp(-0.5), 0.0, 1.0, 1 - np.exp(-1.0)], rel=1e-4)


def test_capture_equals_a_softmax_by_hand() -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) * 4
    gold = torch.arange(7)
    columns = top_k_columns(logits, gold, 5)
    probabilities = logits.double().softmax(-1).numpy()
    for n in range(7):
        ids = np.argsort(-probabilities[n])[:5]
        assert columns["topk_ids"][n].tolist() == ids.tolist()
        assert columns["topk_logprobs"][n] == pytest.approx(np.log(probabilities[n][ids]), abs=5e-3)
        assert columns["tail_logprob"][n] == pytest.approx(np.log(1 - probabilities[n][ids].sum()), abs=1e-3)
        inside = gold[n].item() in ids
        assert columns["gold_logit"][n] == pytest.approx(logits[n, gold[n]].item() if inside else 0.0)


def test_tail_survives_where_fp32_subtraction_gives_zero() -> None:
    logits = torch.tensor([[40.0, 39.0, 0.0, 0.0]])
    columns = top_k_columns(logits, torch.tensor([0]), 2)
    exact = np.log(2) - np.log(np.exp(40) + np.exp(39) + 2)
    assert columns["tail_logprob"][0] == pytest.approx(exact, rel=1e-5)


def test_store_columns_stand_beside_their_labels(teacher: Path, data: Path, store: Path) -> None:
    """Independent check of the alignment: the teacher's own logits at t-1 predict the label at t."""
    tokenizer = Tokenizer(teacher)
    rows, _ = chat_rows(conversations([data]), tokenizer, 128)
    row = TopKStore(store).beside(rows, tokenizer)[7]
    logits = load(teacher)(torch.from_numpy(row["input_ids"])[None]).logits[0].detach()
    for position, label in enumerate(row["labels"]):
        if label == IGNORED:
            assert not row["topk_ids"][position].any()
        else:
            top = logits[position - 1].log_softmax(-1).topk(8)
            assert row["topk_ids"][position].tolist() == top.indices.tolist()
            assert row["topk_logprobs"][position] == pytest.approx(top.values.numpy(), abs=5e-3)


def test_student_equal_to_its_teacher_has_no_divergence(teacher: Path, data: Path, store: Path) -> None:
    tokenizer = Tokenizer(teacher)
    rows, _ = chat_rows(conversations([data]), tokenizer, 128)
    beside = TopKStore(store).beside(rows, tokenizer)
    batch, items = collate([beside[i] for i in range(4)], 0), torch.tensor(10)
    model = load(teacher)
    plain = cross_entropy(model, batch, items)
    for support in ("renormalised", "tail"):
        loss = TopKLoss(5.0, "none", support)(model, batch, items)
        assert loss.item() == pytest.approx(plain.item(), abs=1e-3)
    other = load(tiny_model(store.parent / "other", seed=5))
    assert TopKLoss(5.0, "none", "tail")(other, batch, items) > cross_entropy(other, batch, items)


def test_store_refuses_what_it_does_not_hold(teacher: Path, data: Path, store: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(teacher)
    write_jsonl(tmp_path / "more.jsonl", chats(14))
    rows, _ = chat_rows(conversations([tmp_path / "more.jsonl"]), tokenizer, 128)
    with pytest.raises(ModelError, match="not in the store"):
        TopKStore(store).beside(rows, tokenizer)
    other = Tokenizer(tiny_model(tmp_path / "other", layers=1))
    other.digest = "another"
    with pytest.raises(ModelError, match="is not the teacher's"):
        TopKStore(store).beside(rows, other)
    with pytest.raises(ArtifactError, match="not a finished top-K store"):
        TopKStore(tmp_path)


def test_killed_capture_goes_on_after_its_last_shard(
    teacher: Path, data: Path, store: Path, tmp_path: Path
) -> None:
    class Kill(Silent):
        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            raise KeyboardInterrupt

    chosen = capture.Settings(top_k=8, batch_rows=5, shard_rows=5)
    inputs = {"teacher": teacher, "data": (data,)}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            capture.run(chosen, inputs, tmp_path, Kill())
    kept = (tmp_path / "store" / "shard-00000.safetensors").stat().st_mtime_ns
    capture.run(chosen, inputs, tmp_path, Silent())
    assert (tmp_path / "store" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    for path in store.iterdir():
        assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"lora_rank": 16, "lora_alpha": 128}])
def test_student_comes_nearer_to_the_teacher(
    teacher: Path, data: Path, store: Path, tmp_path: Path, extra: dict[str, int]
) -> None:
    student = tiny_model(tmp_path / "student", seed=3, layers=2, initializer_range=0.1)
    tokenizer = Tokenizer(student)
    rows, _ = chat_rows(conversations([data]), tokenizer, 128)
    batch = collate(list(TopKStore(store).beside(rows, tokenizer)), 0)
    items = (batch["labels"] != IGNORED).sum()
    only_kl = TopKLoss(1.0, "none", "tail")

    def divergence(folder: Path) -> float:
        model = load(folder)
        return (only_kl(model, batch, items) - cross_entropy(model, batch, items)).item()

    chosen = train.Settings(
        loss="topk", kl_lambda=20.0, kl_weight="none", kl_support="tail",
        steps=60, batch_rows=12, learning_rate=1e-2, warmup_steps=3, **extra,
    )  # fmt: skip
    train.run(chosen, {"model": student, "data": (data,), "teacher": store}, tmp_path, Silent())
    assert divergence(tmp_path / "model") < 0.7 * divergence(student)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True


def test_store_and_loss_must_agree(teacher: Path, data: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a teacher's store"):
        train.run(train.Settings(loss="topk"), {"model": teacher, "data": (data,)}, tmp_path, Silent())
    with pytest.raises(InputError, match="does not read a teacher's store"):
        train.run(train.Settings(), {"model": teacher, "data": (data,), "teacher": store}, tmp_path, Silent())

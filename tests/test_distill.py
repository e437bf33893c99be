"""Training a student: against a plain loop in torch, and adapters against a merge by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import chats, tiny_model

from distill import capture, train
from distill.losses import LOSSES
from distill.store import TopKStore
from foundation import adapters
from foundation.chat import IGNORED
from foundation.dataio import conversations, write_jsonl
from foundation.errors import InputError, MissingError, ModelError
from foundation.model import load
from foundation.report import Silent
from foundation.rows import chat_rows
from foundation.stage import Figures
from foundation.tokenizer import Tokenizer

SHORT = {"steps": 3, "batch_rows": 4, "warmup_steps": 0, "learning_rate": 1e-2}
LORA = {"lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Loud random weights: a teacher with opinions, not one that is almost uniform.
    return tiny_model(tmp_path_factory.mktemp("teacher"), seed=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # As wide as a block of nf4.
    wide = {"hidden_size": 64, "head_dim": 16, "initializer_range": 0.1}
    return tiny_model(tmp_path_factory.mktemp("student"), seed=3, layers=2, **wide)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats())
    return path


@pytest.fixture(scope="module")
def store(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    chosen = capture.Settings(top_k=8, bits=12, shard_rows=5)
    capture.run(chosen, {"teacher": teacher, "data": (data,)}, out, Silent())
    return out / "store"


@pytest.fixture(scope="module")
def sampled(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sampled")
    chosen = capture.Settings(support="sampled", draws=8)
    capture.run(chosen, {"teacher": teacher, "data": (data,)}, out, Silent())
    return out / "store"


def stored_as_bf16(folder: Path, out: Path) -> Path:
    """A copy of a model with its weights in bf16."""
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    weights = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def curves(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


# ---- the loop -----------------------------------------------------------------------------------------


def naive_forward_kl(logits: torch.Tensor, row: Any) -> torch.Tensor:
    """Sum over the labels of a row of CE + 0.5 * KL(teacher || student), the rest of V being one event."""
    total = torch.zeros(())
    for at in range(1, len(row["labels"])):
        if row["labels"][at] == IGNORED:
            continue
        log_q = logits[at - 1].log_softmax(-1)
        ids = torch.from_numpy(row["topk_ids"][at]).long()
        log_p = torch.from_numpy(row["topk_logprobs"][at])
        off = torch.ones(len(log_q), dtype=torch.bool)
        off[ids] = False
        log_tail = float(row["tail_logprob"][at])
        kl = (log_p.exp() * (log_p - log_q[ids])).sum()
        kl = kl + torch.tensor(log_tail).exp() * (log_tail - log_q[off].logsumexp(0))
        total = total - log_q[int(row["labels"][at])] + 0.5 * kl
    return total


@pytest.mark.parametrize("packing", [False, True])
def test_three_steps_equal_a_plain_loop(
    student: Path, data: Path, store: Path, tmp_path: Path, packing: bool
) -> None:
    """All twelve conversations in every step, so that the order has no say; AdamW and decay as in torch."""
    shape = {"packing": True, "max_tokens": 128, "batch_rows": 64} if packing else {"batch_rows": 12}
    chosen = train.Settings(
        loss="forward_kl", kl_lambda=0.5, precision="fp32", clip_norm=0.0, schedule="linear",
        weight_decay=0.1, **{**SHORT, "learning_rate": 1e-3, **shape},
    )  # fmt: skip
    if packing:  # an epoch is as many rows as there are joined ones
        tokenizer = Tokenizer(student)
        joined, _ = train._rows(chosen, {"data": (data,), "teacher": store}, tokenizer, Silent())
        chosen = chosen.model_copy(update={"batch_rows": len(joined)})
    train.run(chosen, {"model": student, "data": (data,), "teacher": store}, tmp_path, Silent())

    tokenizer, model = Tokenizer(student), load(student).train()
    rows, *_ = chat_rows(conversations([data]), tokenizer, 128)
    beside = list(TopKStore(store).beside(rows, tokenizer, temperature=1.0))
    items = sum(int((row["labels"][1:] != IGNORED).sum()) for row in rows)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for row in beside:
            logits = model(torch.from_numpy(row["input_ids"])[None]).logits[0]
            (naive_forward_kl(logits, row) / items).backward()
        losses.append(
            sum(
                naive_forward_kl(model(torch.from_numpy(r["input_ids"])[None]).logits[0], r).item()
                for r in beside
            )
            / items
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 3)
        optimizer.step()
    got = load(tmp_path / "model").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-4)
    assert [line["loss"] for line in curves(tmp_path)] == pytest.approx(losses, rel=1e-4)


def test_curves_hold_each_step_and_add_up(student: Path, data: Path, store: Path, tmp_path: Path) -> None:
    chosen = train.Settings(loss="forward_kl", kl_lambda=3.0, ce_weight=0.5, accumulation=2, **SHORT)
    train.run(chosen, {"model": student, "data": (data,), "teacher": store}, tmp_path, Silent())
    lines = curves(tmp_path)
    names = ["step", "loss", "ce", "kd", "weight", "grad_norm", "learning_rate"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(sorted(line) == sorted(names) for line in lines)
    for line in lines:
        assert line["weight"] == pytest.approx(1.0)
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 3.0 * line["kd"], rel=1e-4)
        assert line["grad_norm"] > 0


def test_progress_says_speed_and_memory(student: Path, data: Path, tmp_path: Path) -> None:
    class Heard(Silent):
        figures: dict[str, float]

        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            self.figures = figures

    heard = Heard()
    train.run(train.Settings(**SHORT), {"model": student, "data": (data,)}, tmp_path, heard)
    assert heard.figures["tokens_per_second"] > 0
    assert heard.figures["peak_memory_bytes"] > 2**20
    assert {"loss", "ce", "grad_norm", "learning_rate"} < heard.figures.keys()


class KillAt(Silent):
    """Dies without a word, as kill -9 would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        if done == self.step:
            raise KeyboardInterrupt


KINDS: dict[str, dict[str, Any]] = {
    "full": {"loss": "published_code", "packing": True, "max_tokens": 128},
    "lora": {"loss": "shift_invariant", **LORA, "gradient_checkpointing": True},
    "qlora": {"loss": "reverse_kl", **LORA, "base_precision": "nf4", "optimizer": "adamw_8bit"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_twice_ends_with_the_same_bytes(
    student: Path, data: Path, store: Path, tmp_path: Path, kind: str
) -> None:
    chosen = train.Settings(
        **{**SHORT, "steps": 8, "checkpoint_every_steps": 3, "batch_rows": 2, **KINDS[kind]}
    )
    inputs = {"model": student, "data": (data,), "teacher": store}
    figures = train.run(chosen, inputs, tmp_path / "whole", Silent())
    for step in (5, 7):
        with pytest.raises(KeyboardInterrupt):
            train.run(chosen, inputs, tmp_path / "torn", KillAt(step))
    report = Silent()
    assert train.run(chosen, inputs, tmp_path / "torn", report) == figures
    assert "going on from checkpoint-6" in report.notes
    for name in ("model/model.safetensors", "curves.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, base_precision",
    [("fp32", "fp32"), ("fp32", "nf4"), ("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "nf4")],
)
def test_merged_weights_are_base_plus_scaled_product(
    student: Path, data: Path, tmp_path: Path, stored: str, base_precision: Any
) -> None:
    """By hand from the files of base and adapter; whatever the base was trained as, it is merged as stored."""
    base = stored_as_bf16(student, tmp_path / "base") if stored == "bf16" else student
    chosen = train.Settings(base_precision=base_precision, **LORA, **SHORT)
    train.run(chosen, {"model": base, "data": (data,)}, tmp_path, Silent())
    adapter = load_file(tmp_path / ".work" / "checkpoint-3" / "adapter_model.safetensors")
    before, after = weights_of(base), weights_of(tmp_path / "model")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    changed = 0
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{stem}.lora_A.weight" in adapter:
            product = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            expected = (weight.float() + 8 / 4 * product).to(weight.dtype)
            changed += int(not torch.equal(expected, weight))
        assert torch.equal(after[name], expected), name
    assert changed == 2 * 7  # layers, linear modules
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True
    model = load(tmp_path / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_adapters_are_kept_as_peft_reads_them(student: Path, data: Path, tmp_path: Path) -> None:
    """Base and adapter, joined by peft, answer as the merged model does; full training keeps none."""
    from peft import PeftModel

    given = {"model": student, "data": (data,)}
    train.run(train.Settings(**LORA, **SHORT, lora_layers="ends"), given, tmp_path, Silent())
    joined = PeftModel.from_pretrained(load(student), str(tmp_path / "adapter")).eval()
    ids = torch.arange(40)[None] % 60
    with torch.no_grad():
        wanted, base = load(tmp_path / "model")(ids).logits, load(student)(ids).logits
        found = joined(ids).logits
    assert (found - wanted).abs().max() < 1e-5 < (base - wanted).abs().max()
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert train.written(train.Settings(**LORA)) == ("model", "curves", "adapter")
    assert train.written(train.Settings()) == ("model", "curves")


def test_adapters_on_an_untied_model_leave_its_head_alone(data: Path, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", tie_word_embeddings=False)
    train.run(train.Settings(**LORA, **SHORT), {"model": base, "data": (data,)}, tmp_path, Silent())
    before, after = weights_of(base), weights_of(tmp_path / "model")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[name], before[name])


def test_full_training_of_a_bf16_model_is_written_as_trained(student: Path, data: Path, tmp_path: Path) -> None:
    base = stored_as_bf16(student, tmp_path / "base")
    train.run(train.Settings(**SHORT), {"model": base, "data": (data,)}, tmp_path, Silent())
    assert {value.dtype for value in weights_of(tmp_path / "model").values()} == {torch.float32}


def test_qlora_trains_beside_a_base_in_four_bits(student: Path, tmp_path: Path) -> None:
    lora = adapters.Lora(4, 8, 0)
    model = adapters.with_adapters(student, lora, "nf4", "peft", max_tokens=64, report=Silent())
    kinds = {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "lora_A")}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert kinds == {"Linear4bit"}
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("extra", [{}, LORA, {**LORA, "base_precision": "nf4"}], ids=["full", "lora", "qlora"])
def test_gradient_checkpointing_changes_nothing(
    student: Path, data: Path, tmp_path: Path, extra: dict[str, Any]
) -> None:
    for name, on in {"plain": False, "checkpointing": True}.items():
        chosen = train.Settings(gradient_checkpointing=on, precision="fp32", **SHORT, **extra)
        train.run(chosen, {"model": student, "data": (data,)}, tmp_path / name, Silent())
    plain, other = (weights_of(tmp_path / name / "model") for name in ("plain", "checkpointing"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert any(not torch.equal(value, weights_of(student)[name]) for name, value in plain.items())


def test_a_model_without_the_known_modules_is_refused(data: Path, tmp_path: Path) -> None:
    base = tiny_model(
        tmp_path / "base", model_type="gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=128, layers=1
    )
    with pytest.raises(ModelError, match="LoRA can not be put on"):
        train.run(train.Settings(**LORA, **SHORT), {"model": base, "data": (data,)}, tmp_path, Silent())


def broken_unsloth(folder: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """An unsloth that is installed and can not be imported, beside a GPU."""
    (folder / "unsloth.py").write_text(f"raise {error}('no such device')\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "unsloth", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize("error", ["ImportError", "NotImplementedError", "RuntimeError"])
def test_unsloth_that_can_not_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    broken_unsloth(tmp_path, monkeypatch, error)
    report = Silent()
    assert adapters._unsloth("auto", report) is None
    assert report.notes == ["unsloth is installed but can not be imported (no such device); going on with peft"]
    with pytest.raises(MissingError, match="unsloth can not be imported: no such device"):
        adapters._unsloth("unsloth", report)
    assert adapters._unsloth("peft", report) is None


def test_auto_without_a_gpu_is_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert adapters._unsloth("auto", Silent()) is None


# ---- a student and its teacher --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [{}, {"packing": True, "max_tokens": 128}, {"lora_rank": 16}, {"lora_rank": 16, "base_precision": "nf4"}],
    ids=["full", "packed", "lora", "qlora"],
)
def test_student_comes_nearer_to_the_teacher(
    student: Path, teacher: Path, data: Path, store: Path, tmp_path: Path, extra: dict[str, Any]
) -> None:
    """KL over the teacher's 8 likeliest ids and all others as one, from both models themselves."""
    rows, *_ = chat_rows(conversations([data]), Tokenizer(student), 128)

    def divergence(folder: Path) -> float:
        one, other = load(folder), load(teacher)
        total = 0.0
        for row in rows:
            ids = torch.from_numpy(row["input_ids"])[None]
            at = torch.from_numpy(row["labels"])[1:] != IGNORED
            with torch.no_grad():
                log_q, log_p = (model(ids).logits[0, :-1][at].log_softmax(-1) for model in (one, other))
            ids = log_p.topk(8).indices
            p, q = (log.exp().gather(1, ids) for log in (log_p, log_q))
            p, q = (torch.cat([mass, 1 - mass.sum(1, keepdim=True)], 1) for mass in (p, q))
            total += (p * (p / q).log()).sum().item()
        return total

    chosen = train.Settings(
        loss="forward_kl", kl_lambda=20.0, steps=60, batch_rows=12, learning_rate=1e-2, warmup_steps=3, **extra
    )
    train.run(chosen, {"model": student, "data": (data,), "teacher": store}, tmp_path, Silent())
    assert divergence(tmp_path / "model") < 0.7 * divergence(student)


def refused(settings: dict[str, Any], inputs: dict[str, Any], out: Path) -> Figures:
    return train.run(train.Settings(**settings), inputs, out, Silent())


def test_store_and_loss_must_agree(
    student: Path, data: Path, store: Path, sampled: Path, tmp_path: Path
) -> None:
    plain = {"model": student, "data": (data,)}
    with pytest.raises(InputError, match="'published_code' needs a teacher's store"):
        refused({"loss": "published_code"}, plain, tmp_path)
    with pytest.raises(InputError, match="'ce' does not read a teacher's store"):
        refused({}, {**plain, "teacher": store}, tmp_path)
    with pytest.raises(InputError, match=r"'sampled'; this one has 'top_k'[\s\S]*reverse_kl"):
        refused({"loss": "sampled_kl"}, {**plain, "teacher": store}, tmp_path)
    with pytest.raises(InputError, match=r"'top_k'; this one has 'sampled'[\s\S]*one of sampled_kl;"):
        refused({"loss": "forward_kl"}, {**plain, "teacher": sampled}, tmp_path)
    with pytest.raises(ModelError, match=r"captured at temperature 1\.0, asked for at 2\.0"):
        refused({"loss": "forward_kl", "temperature": 2.0}, {**plain, "teacher": store}, tmp_path)
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ce"])
def test_every_loss_trains(
    student: Path, data: Path, store: Path, sampled: Path, tmp_path: Path, name: Any
) -> None:
    source = sampled if LOSSES[name].support == "sampled" else store
    chosen = train.Settings(loss=name, **{**SHORT, "steps": 1})
    figures = train.run(chosen, {"model": student, "data": (data,), "teacher": source}, tmp_path, Silent())
    assert figures["steps"] == 1 and figures["conversations"] == 12
    assert curves(tmp_path)[0]["kd"] > 0


def test_a_teacher_of_more_ids_than_the_student_is_refused(student: Path, store: Path) -> None:
    opened = TopKStore(store)
    opened.header = replace(opened.header, vocab_tokens=401)
    with pytest.raises(ModelError, match="the student has 400 ids, the teacher's distributions 401"):
        opened.check_student(student, "loss", "forward_kl", {"forward_kl": "top_k"})


def test_a_conversation_that_is_not_in_the_store_is_refused(student: Path, store: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "more.jsonl", chats(14))
    inputs = {"model": student, "data": (tmp_path / "more.jsonl",), "teacher": store}
    with pytest.raises(ModelError, match="2 of 14 conversations are not in the store"):
        refused({"loss": "forward_kl"}, inputs, tmp_path)


def test_the_names_of_losses_are_those_of_the_table() -> None:
    assert get_args(train.Settings.model_fields["loss"].annotation) == tuple(LOSSES)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"kl_lambda": 0.5}, "kl_lambda: no effect with loss = 'ce'"),
        ({"temperature": 2.0, "ce_weight": 0.0}, "ce_weight, temperature: no effect"),
        ({"loss": "forward_kl", "kl_lambda": 0.0}, "takes nothing from the teacher"),
        ({"base_precision": "nf4"}, "base_precision: of LoRA's base alone"),
        ({"backend": "unsloth"}, "backend: of LoRA's base alone"),
        ({"backend": "unsloth", "lora_rank": 4, "packing": True}, "packing: unsloth's attention"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        train.Settings(**settings)

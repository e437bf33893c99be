"""The training loop: it learns, it resumes to the same bytes, and accumulation changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, chats, tiny_model

from foundation.errors import MissingError, ModelError, StopRequested
from foundation.losses import cross_entropy
from foundation.model import load
from foundation.report import Silent
from foundation.rows import chat_rows, pack
from foundation.tokenizer import Tokenizer
from foundation.tune import COMPLETE, TuneSettings, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def trained(folder: Path, work: Path, report: Any = None, **settings: Any) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer(folder)
    rows = pack(TEXTS, tokenizer, 16, work / "rows")
    model = load(folder)
    chosen = TuneSettings(
        **{"steps": 12, "batch_rows": 4, "warmup_steps": 2, "checkpoint_every_steps": 4, **settings}
    )
    tune(model, rows, cross_entropy, chosen, work, report or Silent(), pad_id=tokenizer.pad_id)
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


class StopAt(Silent):
    """Asks to stop after some steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.done = step, 0

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.done = done

    def stop_requested(self) -> bool:
        return self.done >= self.step


class KillAt(StopAt):
    """Dies without a word, as kill -9 would."""

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        if done == self.step:
            raise KeyboardInterrupt

    def stop_requested(self) -> bool:
        return False


@pytest.mark.slow
def test_stopped_and_killed_runs_end_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    whole = trained(folder, tmp_path / "whole")
    with pytest.raises(StopRequested):
        trained(folder, tmp_path / "torn", StopAt(3))
    assert (tmp_path / "torn" / "checkpoint-3" / COMPLETE).is_file()
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "torn", KillAt(7))
    (tmp_path / "torn" / "checkpoint-11").mkdir()  # a checkpoint that was being written when the power went
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "torn", KillAt(10))
    report = Silent()
    assert same(trained(folder, tmp_path / "torn", report), whole)
    assert report.notes == ["going on from checkpoint-8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder: Path, tmp_path: Path, name: str) -> None:
    whole = trained(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "torn", KillAt(10))
    damaged = tmp_path / "torn" / "checkpoint-8" / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    report = Silent()
    assert same(trained(folder, tmp_path / "torn", report), whole)
    assert report.notes == ["going on from checkpoint-4"]


def test_8_bit_optimisers_without_bitsandbytes_are_refused_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="needs bitsandbytes"):
        trained(folder, tmp_path, optimizer="adamw_8bit")


def test_a_checkpoint_is_saved_when_asked_for(folder: Path, tmp_path: Path) -> None:
    class Ask(Silent):
        asked = 0

        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            self.asked = done

        def checkpoint_requested(self) -> bool:
            return self.asked == 2

    trained(folder, tmp_path, Ask(), steps=5, checkpoint_every_steps=100)
    saved = {path.parent.name for path in tmp_path.glob(f"checkpoint-*/{COMPLETE}")}
    assert saved == {"checkpoint-2", "checkpoint-5"}  # Trainer saves the last step by itself


def test_it_learns(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder)
    rows = pack(TEXTS, tokenizer, 16, tmp_path / "rows")
    model = load(folder)
    settings = TuneSettings(steps=60, batch_rows=8, warmup_steps=5, learning_rate=1e-2)
    figures = tune(model, rows, cross_entropy, settings, tmp_path, Silent(), pad_id=0)
    assert figures["loss"] < 3.0  # a uniform guess over 400 tokens costs 5.99


def test_accumulated_steps_equal_one_large_batch(folder: Path, tmp_path: Path) -> None:
    """Rows of unequal length: a mean per micro-batch would give another gradient."""
    tokenizer = Tokenizer(folder)
    rows, _ = chat_rows((c["messages"] for c in chats(16)), tokenizer, 100)
    states = []
    for name, shape in {"whole": (8, 1), "parts": (2, 4)}.items():
        model = load(folder)
        settings = TuneSettings(
            steps=3, batch_rows=shape[0], accumulation=shape[1], warmup_steps=0, precision="fp32", clip_norm=0
        )
        tune(model, rows, cross_entropy, settings, tmp_path / name, Silent(), pad_id=tokenizer.pad_id)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=2e-5, rtol=1e-4)


def test_only_what_requires_gradients_is_trained(folder: Path, tmp_path: Path) -> None:
    before, model = load(folder).state_dict(), load(folder)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    rows = pack(TEXTS, Tokenizer(folder), 16, tmp_path / "rows")
    tune(model, rows, cross_entropy, TuneSettings(steps=2, warmup_steps=0), tmp_path, Silent(), pad_id=0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_loss_that_is_not_finite_ends_the_stage(folder: Path, tmp_path: Path) -> None:
    rows = pack(TEXTS, Tokenizer(folder), 16, tmp_path / "rows")

    def broken(model: Any, batch: Any, items: Any) -> torch.Tensor:
        return cross_entropy(model, batch, items) * float("nan")

    with pytest.raises(ModelError, match="the loss is nan at step"):
        tune(load(folder), rows, broken, TuneSettings(steps=4), tmp_path, Silent(), pad_id=0)

"""The training loop: it learns, it resumes to the same bytes, and accumulation changes nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, chats, tiny_model

from foundation.checkpoints import COMPLETE
from foundation.errors import MissingError, ModelError, StopRequested
from foundation.losses import cross_entropy
from foundation.mixture import Mixture
from foundation.model import load
from foundation.report import Silent
from foundation.rows import chat_rows, pack
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

HERE = Path(__file__).resolve().parent


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
    """Asks to stop once some steps are done: heard at the end of the next."""

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
        trained(folder, tmp_path / "torn", StopAt(2))
    assert (tmp_path / "torn" / "checkpoint-3" / COMPLETE).is_file()
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "torn", KillAt(7))
    (tmp_path / "torn" / "checkpoint-11").mkdir()  # a checkpoint that was being written when the power went
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "torn", KillAt(10))
    report = Silent()
    assert same(trained(folder, tmp_path / "torn", report), whole)
    assert report.notes == ["going on from checkpoint-8"]
    torn, undisturbed = (tmp_path / name / "curves.jsonl" for name in ("torn", "whole"))
    assert torn.read_bytes() == undisturbed.read_bytes()


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
            return self.asked == 1

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
    rows, *_ = chat_rows((c["messages"] for c in chats(16)), tokenizer, 100)
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


def test_curves_say_what_each_step_measured(folder: Path, tmp_path: Path) -> None:
    """The first line against the gradient of the first batch, by hand; the rates against the schedule."""
    tokenizer, model = Tokenizer(folder), load(folder)
    rows = pack(TEXTS, tokenizer, 16, tmp_path / "rows")
    settings = TuneSettings(
        steps=4, batch_rows=len(rows), warmup_steps=2, schedule="linear", precision="fp32", clip_norm=1e-3
    )
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])  # a step reads all of them
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    expected.backward()
    norm = torch.cat([value.grad.flatten() for value in model.parameters()]).norm()
    model.zero_grad()
    tune(model, rows, cross_entropy, settings, tmp_path, Silent(), pad_id=0)
    lines = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert lines[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)  # before clipping
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize(
    ("changes", "rates"),
    [  # of a peak of 1, at the beginning of each step: warm-up, the peak, then down in a line
        ({"decay_share": 0.4}, [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),  # a tenth is one step, which begins at the peak
        ({"warmup_steps": 0, "decay_share": 1.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_wsd_warms_up_stays_and_decays(
    folder: Path, tmp_path: Path, changes: dict[str, Any], rates: list[float]
) -> None:
    trained(folder, tmp_path, schedule="wsd", steps=10, **{"batch_rows": 1, "learning_rate": 1e-3, **changes})
    lines = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx([rate * 1e-3 for rate in rates])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_other_schedules_are_as_they_were(folder: Path, tmp_path: Path, schedule: str) -> None:
    trained(folder, tmp_path, schedule=schedule, steps=6, batch_rows=1, learning_rate=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    shape = {
        "cosine": [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)],
        "linear": [1, 0.75, 0.5, 0.25],
        "constant": [1, 1, 1, 1],
    }[schedule]
    assert [line["learning_rate"] for line in lines] == pytest.approx([r * 1e-3 for r in [0, 0.5, *shape]])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decay_share": 0.5}, "decay_share has no effect with schedule = 'cosine'"),
        ({"schedule": "wsd", "steps": 20}, "warmup_steps = 30 and 2 steps of decay .* more than steps = 20"),
        ({"schedule": "wsd", "decay_share": 0.0}, "greater than 0"),
        ({"schedule": "wsd", "decay_share": 1.1}, "less than or equal to 1"),
    ],
)
def test_a_decay_that_can_not_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TuneSettings(**changes)


def test_a_mixture_in_place_of_rows(folder: Path, tmp_path: Path) -> None:
    """An order says itself what comes when; it is asked for as many rows as there are."""
    tokenizer = Tokenizer(folder)
    parts = [pack(texts, tokenizer, 16, tmp_path / str(n)) for n, texts in enumerate((TEXTS[::2], TEXTS[1::2]))]
    seen: list[int] = []

    def loss(model: Any, batch: Any, items: Any) -> torch.Tensor:
        seen.extend(batch["input_ids"].sum(1).tolist())
        return cross_entropy(model, batch, items)

    asked = []

    def order(needed: int) -> Mixture:
        asked.append(needed)
        return Mixture(parts, [0.75, 0.25], needed, 3)

    settings = TuneSettings(steps=3, batch_rows=2, accumulation=2)
    tune(load(folder), order, loss, settings, tmp_path, Silent(), pad_id=0)
    assert asked == [12]
    assert seen == [int(row["input_ids"].sum()) for row in Mixture(parts, [0.75, 0.25], 12, 3)]


def test_what_is_named_has_no_weight_decay(folder: Path, tmp_path: Path) -> None:
    """A gradient of zero moves nothing but by decay."""
    model, before = load(folder), load(folder).state_dict()
    rows = pack(TEXTS, Tokenizer(folder), 16, tmp_path / "rows")

    def nothing(model: Any, batch: Any, items: Any) -> torch.Tensor:
        return cross_entropy(model, batch, items) * 0

    settings = TuneSettings(steps=2, warmup_steps=0, weight_decay=0.1, learning_rate=0.1, schedule="constant")
    named = {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
    tune(model, rows, nothing, settings, tmp_path, Silent(), pad_id=0, undecayed=named)
    for name, value in model.state_dict().items():
        kept = name in named or "norm" in name or name == "lm_head.weight"  # which is the embeddings
        torch.testing.assert_close(value, before[name] * (1 if kept else 0.99**2))
        assert torch.equal(value, before[name]) == kept


def test_sums_of_a_loss_become_means_of_a_step(folder: Path, tmp_path: Path) -> None:
    class Counting:
        """Adds 1 a call, and 4 tokens: 2 calls a step give a mean of 2 / 8."""

        def __init__(self) -> None:
            self.sums: dict[str, torch.Tensor] = {}

        def __call__(self, model: Any, batch: Any, items: Any) -> torch.Tensor:
            for name, value in {"calls": 1.0, "tokens": 4.0}.items():
                self.sums[name] = self.sums.get(name, torch.zeros(())) + value
            return cross_entropy(model, batch, items)

    rows = pack(TEXTS, Tokenizer(folder), 16, tmp_path / "rows")
    settings = TuneSettings(steps=3, batch_rows=2, accumulation=2)
    tune(load(folder), rows, Counting(), settings, tmp_path, Silent(), pad_id=0)
    lines = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [line["calls"] for line in lines] == [0.25, 0.25, 0.25]
    assert all("tokens" not in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_runs_and_resumes_exactly(tmp_path: Path, optimizer: str) -> None:
    """Tensors of fewer than 4,096 numbers, and embeddings, are kept in 32 bits: here all but the MLP's."""
    wide = tiny_model(tmp_path / "model", layers=1, hidden_size=64, intermediate_size=128, head_dim=16)
    whole = trained(wide, tmp_path / "whole", optimizer=optimizer)
    start = load(wide).state_dict()
    assert not any(torch.equal(whole[name], start[name]) for name in whole)
    with pytest.raises(KeyboardInterrupt):
        trained(wide, tmp_path / "torn", KillAt(6), optimizer=optimizer)
    saved = torch.load(tmp_path / "torn" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in saved.values()]
    assert {value.dtype for value in moments if value.shape == (128, 64)} == {torch.uint8}
    assert same(trained(wide, tmp_path / "torn", optimizer=optimizer), whole)


@pytest.mark.slow
def test_two_ranks_stop_save_and_resume_together(folder: Path, tmp_path: Path) -> None:
    """A request that rank 0 alone hears stops both after the same step; a torn checkpoint is removed once."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(HERE / "tune_program.py"), str(folder), str(tmp_path),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()
    assert (tmp_path / "saved.txt").read_text() == "checkpoint-2 checkpoint-4"
    for rank in (0, 1):
        assert (tmp_path / f"notes-{rank}.txt").read_text() == "going on from checkpoint-4"
        assert (tmp_path / "torn" / "checkpoint-6" / f"rng_state_{rank}.pth").is_file()
    for name in ("model/model.safetensors", "curves.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

"""Leave-one-out with a shared prefix reads as a model whose layer is really gone, for half the passes."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foundation.errors import InputError, StopRequested
from foundation.head import hidden_of
from foundation.model import create
from foundation.report import Silent
from foundation.rows import Row, collate, longest_first
from foundation.task import Reading, read_tokens
from prune.leave_one_out import LeaveOneOut, leave_one_out

VOCAB, WINDOW, PAD = 61, 4, 0
ROUNDING = 5e-5  # of float32, nats
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 5,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # layers that matter
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 2,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": KINDS},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": KINDS, "query_pre_attn_scalar": 4},
}


def made(family: str = "llama", **changes: Any) -> Any:
    return create({"model_type": family, **SHAPE, **FAMILIES[family], **changes}, 0).eval()


def some_rows(count: int = 7, seed: int = 0, longest: int = 19) -> list[Row]:
    """Rows of unlike lengths, the first tokens of each not counted."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(4, longest + 1, count):
        ids = draw.integers(3, VOCAB, length)
        labels = np.where(np.arange(length) < draw.integers(1, length - 1), -100, ids)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def really_without(model: Any, layer: int) -> Any:
    """A copy whose layer is gone, and its line in every list of the configuration."""
    short = copy.deepcopy(model)
    del short.model.layers[layer]
    if getattr(short.config, "layer_types", None):
        del short.config.layer_types[layer]
    short.config.num_hidden_layers -= 1
    return short


def run(model: Any, rows: list[Row], work: Path, **changes: Any) -> LeaveOneOut:
    told: dict[str, Any] = {"pad_id": PAD, "identity": "a model", "batch_rows": 3, **changes}
    return leave_one_out(model, rows, told.pop("report", Silent()), work=work, **told)


def by_hand(model: Any, rows: list[Row], original: Any) -> list[Reading]:
    """From the model's own logits, a row at a time, so without padding."""
    told = []
    for row in rows:
        ids = torch.from_numpy(row["input_ids"])[None]
        with torch.no_grad():
            log_q = model(ids, use_cache=False).logits[0].log_softmax(-1)
            log_p = original(ids, use_cache=False).logits[0].log_softmax(-1)
        places = [place for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
        nll = [-log_q[place - 1, row["labels"][place]].item() for place in places]
        hit = [log_q[place - 1].argmax().item() == row["labels"][place] for place in places]
        kl = [sum(log_p[p - 1].exp() * (log_p[p - 1] - log_q[p - 1])).item() for p in places]
        told.append(Reading(np.array(nll), np.array(hit), np.array(kl)))
    return told


def same(found: list[Reading], wanted: list[Reading], atol: float = 0.0) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_unbatched_variants_have_the_bits_of_models_whose_layer_is_gone(family: str, tmp_path: Path) -> None:
    model, rows = made(family), some_rows()
    found = run(model, rows, tmp_path, variants_at_once=1)
    assert len(found.without) == 5
    for gone, readings in [(None, found.whole), *enumerate(found.without)]:
        naive = model if gone is None else really_without(model, gone)
        wanted: list[Any] = [None] * len(rows)
        for places in longest_first([len(row["input_ids"]) for row in rows], 3):
            batch = collate([rows[place] for place in places], PAD)
            with torch.inference_mode():
                hidden, head = hidden_of(naive, batch)
                read = read_tokens(hidden, head, batch["labels"])
            for place, reading in zip(places, read, strict=True):
                wanted[place] = reading
        same(readings, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_variants_read_as_their_own_logits_say(family: str, tmp_path: Path) -> None:
    model, rows = made(family), some_rows()
    found = run(model, rows, tmp_path, variants_at_once=3, with_kl=True)
    same(found.whole, by_hand(model, rows, model), atol=ROUNDING)
    for gone, readings in enumerate(found.without):
        same(readings, by_hand(really_without(model, gone), rows, model), atol=ROUNDING)
    spread = [np.mean([row.nll.mean() for row in readings]) for readings in found.without]
    assert np.ptp(spread) > 1e-2  # the layers differ, or nothing was compared


def test_how_many_go_together_moves_scores_by_rounding_only(tmp_path: Path) -> None:
    model, rows = made(num_hidden_layers=8), some_rows(12)
    means = []
    for number in (1, 3, 0):
        found = run(model, rows, tmp_path / str(number), variants_at_once=number)
        means.append([np.concatenate([row.nll for row in readings]).mean() for readings in found.without])
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(means[2], means[0], rtol=0, atol=1e-6)


def test_kl_is_from_the_original_where_one_is_given(tmp_path: Path) -> None:
    model, original, rows = made(), made(num_hidden_layers=7), some_rows(4)
    found = run(model, rows, tmp_path, with_kl=True, original=original)
    same(found.whole, by_hand(model, rows, original), atol=ROUNDING)
    same(found.without[2], by_hand(really_without(model, 2), rows, original), atol=ROUNDING)
    alone = run(model, rows, tmp_path, with_kl=True)
    assert all((row.kl == 0).all() and len(row.kl) == len(row.nll) for row in alone.whole)
    assert all(len(row.kl) == 0 for row in run(model, rows, tmp_path).whole)


def test_half_the_passes_for_36_layers(tmp_path: Path) -> None:
    model, rows = made(num_hidden_layers=36, hidden_size=8, intermediate_size=8), some_rows(3)
    seen = {"rows": 0}

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["rows"] += len(args[0] if args else kwargs["hidden_states"])

    for layer in model.model.layers:
        layer.register_forward_pre_hook(count, with_kwargs=True)
    found = run(model, rows, tmp_path)
    assert seen["rows"] == 3 * found.passes  # one batch of three rows
    ours, seen["rows"], batch = seen["rows"], 0, collate(rows, PAD)
    for gone in range(36):
        short = really_without(model, gone)
        with torch.inference_mode():
            short(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    assert seen["rows"] == 3 * found.naive_passes == 3 * 36 * 35
    assert ours / seen["rows"] <= 0.53


@pytest.mark.parametrize("kept_states", [0, 1, 3])
def test_spilled_states_change_no_bit(kept_states: int, tmp_path: Path) -> None:
    class Peak(Silent):
        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            self.figures = figures

    model, rows, report = made(), some_rows(), Peak()
    wanted = run(model, rows, tmp_path / "memory")
    largest = 3 * max(len(row["input_ids"]) for row in rows) * 16 * 4  # [B, T, D] in float32
    found = run(model, rows, tmp_path / "files", spill_bytes=kept_states * largest, report=report)
    for ours, theirs in zip([found.whole, *found.without], [wanted.whole, *wanted.without], strict=True):
        same(ours, theirs)
    assert report.figures == {
        "held_bytes": kept_states * largest,
        "spilled_bytes": (5 - kept_states) * largest,
    }
    assert not list((tmp_path / "files").rglob("*.spill"))


def test_bfloat16_and_rows_without_a_counted_token(tmp_path: Path) -> None:
    model, rows = made().bfloat16(), some_rows(4)
    rows[1]["labels"][:] = -100
    found = run(model, rows, tmp_path, spill_bytes=0)
    assert [len(row.nll) for row in found.whole] == [(row["labels"][1:] != -100).sum() for row in rows]
    assert np.isfinite(np.concatenate([row.nll for row in found.without[4]])).all()


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        run(made(), [], tmp_path)


class Stopping(Silent):
    """Asks to stop once so many batches are done, and remembers what it was told."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.told = after, list[tuple[int, int, str]]()

    def progress(self, done: int, total: int, unit: str = "step", **_: float) -> None:
        self.told.append((done, total, unit))

    def stop_requested(self) -> bool:
        return len(self.told) == self.after


def test_a_stop_keeps_finished_batches_and_others_weights_have_none(tmp_path: Path) -> None:
    model, rows, report = made(), some_rows(), Stopping(2)
    whole = run(model, rows, tmp_path / "whole")
    with pytest.raises(StopRequested):
        run(model, rows, tmp_path / "torn", report=report)
    assert report.told == [(1, 3, "batch"), (2, 3, "batch")]
    calls = counting(model)
    resumed = run(model, rows, tmp_path / "torn")
    assert calls == [1]  # one batch was left
    assert resumed.passes == whole.passes == 3 * (5 + 10)
    for ours, theirs in zip([resumed.whole, *resumed.without], [whole.whole, *whole.without], strict=True):
        same(ours, theirs)
    for changes in ({"identity": "another"}, {"with_kl": True}, {"batch_rows": 4}, {"pad_id": 1}):
        calls[0] = 0
        run(model, rows, tmp_path / "torn", **changes)
        assert calls[0] == (2 if "batch_rows" in changes else 3)
    for column in ("input_ids", "labels"):
        calls[0], rows[3][column][-1] = 0, 3
        run(model, rows, tmp_path / "torn")
        assert calls == [3]


def test_a_damaged_batch_is_read_again(tmp_path: Path) -> None:
    model, rows = made(), some_rows()
    whole, calls = run(model, rows, tmp_path), counting(model)
    first, second, _ = sorted(tmp_path.glob("*.npz"))
    first.write_bytes(first.read_bytes()[:100])
    content = bytearray(second.read_bytes())
    content[len(content) // 3] ^= 1
    second.write_bytes(content)
    again = run(model, rows, tmp_path)
    assert calls == [2]
    same(again.without[1], whole.without[1])


def counting(model: Any) -> list[int]:
    """How often the whole model is called from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.register_forward_pre_hook(count)
    return calls


PROGRAM = """
import os, signal, sys
from pathlib import Path
from foundation.report import Silent
from test_leave_one_out import made, run, some_rows

class Killing(Silent):
    def progress(self, done, total, unit="step", **figures):
        if done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

run(made(), some_rows(), Path(sys.argv[1]), report=Killing(), spill_bytes=0)
"""


@pytest.mark.slow
def test_kill_9_costs_at_most_a_batch_and_no_bit(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "torn")], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "torn/spill/00000001.spill").write_bytes(b"left")
    model, rows = made(), some_rows()
    calls = counting(model)
    resumed = run(model, rows, tmp_path / "torn", spill_bytes=0)
    assert calls == [1]
    whole = run(model, rows, tmp_path / "whole")
    for ours, theirs in zip([resumed.whole, *resumed.without], [whole.whole, *whole.without], strict=True):
        same(ours, theirs)
    assert not list((tmp_path / "torn").rglob("*.spill"))

"""Capture against naive float64: what is kept, over which ids, at which temperature; resume, ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny import chats, tiny_model

from distill import capture
from distill.sampling import sampled_columns, uniforms
from distill.store import TopKStore, shard_path
from distill.teacher import answer_tokens, batches, read_shard
from distill.topk import top_k_columns
from foundation.chat import IGNORED
from foundation.dataio import conversations, write_jsonl
from foundation.errors import InputError, ModelError, StopRequested
from foundation.model import load, save
from foundation.report import Silent
from foundation.rows import Row, chat_rows
from foundation.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
VOCAB = 400
SMALL = {"top_k": 8, "batch_tokens": 100, "shard_rows": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Loud random weights: a teacher with opinions, not one that is almost uniform.
    return tiny_model(tmp_path_factory.mktemp("teacher"), seed=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats(11))
    return path


@pytest.fixture(scope="module")
def rows(teacher: Path, data: Path) -> list[Row]:
    return chat_rows(conversations([data]), Tokenizer(teacher), 128)[0]


def captured(teacher: Path, data: Path, out: Path, report: Silent | None = None, **chosen: object) -> dict:
    settings = capture.Settings(**{**SMALL, **chosen})  # type: ignore[arg-type]
    return capture.run(settings, {"teacher": teacher, "data": (data,)}, out, report or Silent())


@pytest.fixture(scope="module")
def reference(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed capture of SMALL, in four shards."""
    out = tmp_path_factory.mktemp("reference")
    captured(teacher, data, out)
    return out / "store"


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def exact(
    folder: Path, row: Row, temperature: float = 1.0, vocab: int = VOCAB
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [P, V] of the counted tokens and their log Z [P], row by row in float64."""
    model = load(folder).double()
    with torch.no_grad():
        logits = model(torch.from_numpy(row["input_ids"])[None]).logits[0, :-1, :vocab].numpy() / temperature
    logits = logits[row["labels"][1:] != IGNORED]  # [P, V]
    log_z = np.logaddexp.reduce(logits, axis=-1)
    return logits - log_z[:, None], log_z


def read(folder: Path, rows: list[Row], **chosen: object) -> dict[str, np.ndarray]:
    """Columns of `rows` as they come from the teacher, before any codec."""
    settings = capture.Settings(**{**SMALL, **chosen})  # type: ignore[arg-type]
    model = load(folder)
    return read_shard(
        model,
        rows,
        settings.keep,
        [np.zeros((answer_tokens(row), 0)) for row in rows],
        vocab_tokens=len(Tokenizer(folder)),
        temperature=settings.temperature,
        batch_tokens=settings.batch_tokens,
        pad_id=0,
    )


# ------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.3])
def test_columns_equal_a_softmax_in_float64(teacher: Path, rows: list[Row], temperature: float) -> None:
    columns = read(teacher, rows, temperature=temperature)
    start = 0
    for row in rows:  # in the order of the rows, although batches are by length
        logprobs, log_z = exact(teacher, row, temperature)
        part = {name: value[start : start + len(log_z)] for name, value in columns.items()}
        order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :8]  # [P, K]
        assert part["topk_ids"].tolist() == order.tolist()
        kept = np.take_along_axis(logprobs, order, -1)
        np.testing.assert_allclose(part["topk_logprobs"], kept, atol=2e-4)
        off = np.log1p(-np.exp(kept).sum(-1))
        np.testing.assert_allclose(part["tail_logprob"], off, atol=2e-3, rtol=1e-3)
        gold = row["labels"][1:][row["labels"][1:] != IGNORED]
        np.testing.assert_allclose(part["gold_logprob"], logprobs[np.arange(len(gold)), gold], atol=2e-4)
        np.testing.assert_allclose(part["log_z"], log_z, atol=2e-4)
        start += len(log_z)
    assert start == len(columns["log_z"])


@given(seed=st.integers(0, 10_000), vocab=st.integers(3, 60), share=st.floats(0, 1), mass=st.floats(0.05, 1))
@examples(max_examples=100, deadline=None)
def test_laws_of_the_columns(seed: int, vocab: int, share: float, mass: float) -> None:
    """All mass is in the entries or in the tail; the entries are the fewest that reach the mass, at most K."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, vocab, generator=generator) * 4).round(decimals=1)  # with ties
    gold, top_k = torch.randint(vocab, (5,), generator=generator), 1 + int(share * (vocab - 2))
    p = logits.double().softmax(-1).numpy()
    columns = {n: v.numpy() for n, v in top_k_columns(logits.clone(), gold, top_k, mass).items()}
    for n in range(5):
        order = np.argsort(-logits[n].numpy(), kind="stable")[:top_k]
        there = columns["topk_logprobs"][n] > -np.inf
        count = there.sum()
        assert columns["topk_ids"][n].tolist() == [*order[:count], *[0] * (top_k - count)]  # ties: lower id
        np.testing.assert_allclose(np.exp(columns["topk_logprobs"][n][:count]), p[n][order[:count]], atol=1e-6)
        assert count == top_k or p[n][order[:count]].sum() >= mass - 1e-6
        assert p[n][order[: count - 1]].sum() < mass + 1e-6
        np.testing.assert_allclose(
            np.exp(columns["tail_logprob"][n]), p[n].sum() - p[n][order[:count]].sum(), atol=1e-6
        )
        np.testing.assert_allclose(np.exp(columns["gold_logprob"][n]), p[n, gold[n]], atol=1e-6)


def test_tail_survives_where_a_subtraction_gives_zero() -> None:
    columns = top_k_columns(torch.tensor([[40.0, 39.0, 0.0, -1.0]]), torch.tensor([0]), 2, 1.0)
    exact = np.log(1 + np.exp(-1)) - np.log(np.exp(40) + np.exp(39) + 1 + np.exp(-1))
    assert columns["tail_logprob"][0] == pytest.approx(exact, rel=1e-6)


def test_among_equals_the_lower_id_is_kept() -> None:
    logits = torch.zeros(3, 50)
    logits[1, [7, 40]] = 1.0
    logits[2, 49] = -1.0
    columns = top_k_columns(logits, torch.zeros(3, dtype=torch.long), 4, 1.0)
    assert columns["topk_ids"].tolist() == [[0, 1, 2, 3], [7, 40, 0, 1], [0, 1, 2, 3]]


def test_mass_keeps_the_fewest_that_reach_it() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.96, 0.02, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    columns = top_k_columns(p.log(), torch.zeros(3, dtype=torch.long), 3, 0.79)
    assert (columns["topk_logprobs"] > -torch.inf).sum(-1).tolist() == [2, 1, 3]
    np.testing.assert_allclose(columns["tail_logprob"].exp(), [0.2, 0.04, 0.25], rtol=1e-5)


def test_rows_beyond_the_tokenizer_are_cut_before_the_softmax(tmp_path: Path, data: Path) -> None:
    """And what is left sums to one: a padded teacher says nothing of ids that nobody can write."""
    padded = tiny_model(tmp_path / "padded", seed=1, initializer_range=0.3, vocab_size=VOCAB + 24)
    rows, *_ = chat_rows(conversations([data]), Tokenizer(padded), 128)
    columns = read(padded, rows, top_k=VOCAB - 1)
    assert columns["topk_ids"].max() < VOCAB
    total = np.exp(columns["topk_logprobs"].astype(float)).sum(-1) + np.exp(columns["tail_logprob"])
    np.testing.assert_allclose(total, 1, atol=1e-5)
    logprobs = np.concatenate([exact(padded, row)[0] for row in rows])
    np.testing.assert_allclose(columns["topk_logprobs"][:, 0], logprobs.max(-1), atol=2e-4)
    report = Silent()
    assert captured(padded, data, tmp_path, report)["cut_rows"] == 24
    assert any("24 rows beyond the tokenizer's 400 tokens" in note for note in report.notes)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), batch_tokens=st.integers(1, 120))
def test_batches_hold_each_row_once_and_no_more_than_asked(lengths: list[int], batch_tokens: int) -> None:
    rows = [{"input_ids": np.zeros(length, dtype=np.int64)} for length in lengths]
    made = batches(rows, batch_tokens)
    assert sorted(place for batch in made for place in batch) == list(range(len(rows)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= batch_tokens


def test_batch_size_and_chunks_change_nothing_but_rounding(
    teacher: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(teacher, rows, batch_tokens=10_000)
    single = read(teacher, rows, batch_tokens=1)
    monkeypatch.setattr("distill.teacher.CHUNK_BYTES", {"cuda": 1, "cpu": 1})  # one position at a time
    for other in (single, read(teacher, rows, batch_tokens=10_000)):
        assert (other["topk_ids"] == whole["topk_ids"]).all()
        for name in ("topk_logprobs", "tail_logprob", "gold_logprob", "log_z"):
            np.testing.assert_allclose(other[name], whole[name], atol=2e-4)


def test_no_more_logits_at_once_than_the_budget_allows(
    teacher: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def keep(logits: torch.Tensor, gold: torch.Tensor, uniform: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(logits))
        return top_k_columns(logits, gold, 8, 1.0)

    monkeypatch.setattr("distill.teacher.CHUNK_BYTES", dict.fromkeys(("cuda", "cpu"), 5 * 16 * VOCAB))
    uniform = [np.zeros((answer_tokens(row), 0)) for row in rows]
    read_shard(
        load(teacher), rows, keep, uniform, vocab_tokens=VOCAB, temperature=1.0, batch_tokens=10_000, pad_id=0
    )
    assert max(seen) == 5 and sum(seen) == sum(answer_tokens(row) for row in rows)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_teacher_in_few_bits_is_nearly_the_same(data: Path, tmp_path: Path, precision: str) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # blocks of 64 weights, in nf4
    teacher = tiny_model(tmp_path / "wide", seed=1, initializer_range=0.2, **shape)
    rows, *_ = chat_rows(conversations([data]), Tokenizer(teacher), 128)
    captured(teacher, data, tmp_path, precision=precision)
    store = TopKStore(tmp_path / "store")
    gold = [row["labels"][1:][row["labels"][1:] != IGNORED] for row in rows]
    whole = np.concatenate(
        [exact(teacher, row)[0][np.arange(len(g)), g] for row, g in zip(rows, gold, strict=True)]
    )
    narrow = np.concatenate([store.columns(row)["gold_logprob"] for row in rows])
    error = np.abs(whole - narrow).mean() / whole.std()
    assert 1e-4 < error < {"bf16": 0.03, "nf4": 0.8}[precision]


# --------------------------------------------------------------------------------------- random sampling


def sampled(logits: torch.Tensor, draws: int, power: float, seeds: range) -> np.ndarray:
    """Weights [S, V] of one distribution, drawn with each of `seeds`."""
    many = logits.expand(len(seeds), -1)
    uniform = np.concatenate([uniforms(seed, b"row", 1, draws) for seed in seeds])
    gold = torch.zeros(len(seeds), dtype=torch.long)
    columns = sampled_columns(many.clone(), gold, torch.from_numpy(uniform), power)
    weights = torch.zeros(len(seeds), logits.shape[-1], dtype=torch.float64)
    weights.scatter_add_(-1, columns["topk_ids"].long(), columns["topk_logprobs"].double().exp())
    return weights.numpy()


@pytest.mark.parametrize("power", [1.0, 0.7, 1.4])
def test_sampled_weights_are_unbiased(power: float) -> None:
    """The mean over 4,000 captures is p, within 5 of its own standard errors everywhere."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(4))
    p = logits.double().softmax(-1).numpy()
    q = p**power / (p**power).sum()
    weights = sampled(logits, 20, power, range(4000))
    variance = (p**2 / q - p**2) / 20  # of a weight, in closed form
    assert (np.abs(weights.mean(0) - p) < 5 * np.sqrt(variance / 4000)).all()
    assert weights.var(0).sum() == pytest.approx(variance.sum(), rel=0.05)
    # A top-K of the same size, or weights divided by their sum, would fail: their bias does not shrink.
    if power == 1:
        assert weights.sum(-1) == pytest.approx(1, abs=1e-6)
    else:
        assert weights.sum(-1).std() > 0.01


def test_draws_depend_on_seed_row_and_place_alone(teacher: Path, data: Path, tmp_path: Path) -> None:
    one = uniforms(3, b"a row", 10, 50)
    assert ((one >= 0) & (one < 1)).all() and abs(one.mean() - 0.5) < 0.05
    assert (uniforms(3, b"a row", 4, 50) == one[:4]).all()
    assert (uniforms(3, b"another", 10, 50) != one).any() and (uniforms(4, b"a row", 10, 50) != one).any()
    assert uniforms(3, b"a row", 10, 0).shape == (10, 0)
    # numpy's Philox is the published one: the known answer of its authors' Random123 for key and counter 0,
    # which numpy counts up before the first block.
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == known


def test_a_sampled_store_has_the_draws_of_each_row(
    teacher: Path, data: Path, rows: list[Row], tmp_path: Path
) -> None:
    chosen = {"support": "sampled", "top_k": 100, "draws": 30}
    figures = captured(teacher, data, tmp_path / "a", **chosen)
    captured(teacher, data, tmp_path / "b", **chosen, shard_rows=100, batch_tokens=64)
    first, second = TopKStore(tmp_path / "a" / "store"), TopKStore(tmp_path / "b" / "store")
    assert (first.header.support, first.header.draws, first.header.top_k) == ("sampled", 30, 30)
    entries = 0
    for row in rows:
        logprobs, _ = exact(teacher, row)
        ours, theirs = first.columns(row), second.columns(row)
        assert (np.sort(ours["topk_ids"]) == np.sort(theirs["topk_ids"])).all()
        assert (ours["tail_logprob"] == -np.inf).all()
        there = ours["topk_logprobs"] > -np.inf
        entries += there.sum()
        assert np.take_along_axis(logprobs, ours["topk_ids"], -1)[there].min() > np.log(1e-7)  # it can happen
        np.testing.assert_allclose(np.exp(ours["topk_logprobs"]).sum(-1), 1, atol=0.25)
    assert figures["mean_entries"] == pytest.approx(entries / first.header.positions)
    assert figures["mean_tail_mass"] == 0


def test_more_draws_than_tokens() -> None:
    weights = sampled(torch.tensor([0.0, 1.0, -2.0]), 64, 1.0, range(3))
    assert weights.shape == (3, 3) and weights.sum(-1) == pytest.approx(1)


# --------------------------------------------------------------------------------- the store that is made


def test_store_says_what_it_is_of(teacher: Path, data: Path, rows: list[Row], tmp_path: Path) -> None:
    figures = captured(teacher, data, tmp_path)
    store = TopKStore(tmp_path / "store")
    positions = sum(answer_tokens(row) for row in rows)
    sizes = sum(path.stat().st_size for path in (tmp_path / "store").glob("shard-*"))
    assert (store.header.rows, store.header.positions, len(store.header.shards)) == (11, positions, 4)
    assert (store.header.vocab_tokens, store.header.top_k, store.header.draws) == (VOCAB, 8, 0)
    assert (figures["rows"], figures["tokens"], figures["too_long"]) == (11, positions, 0)
    assert figures["bytes_per_token"] == pytest.approx(sizes / positions)
    assert figures["mean_entries"] == 8
    tails = [np.exp(store.columns(row)["tail_logprob"].astype(float)).sum() for row in rows]
    assert figures["mean_tail_mass"] == pytest.approx(sum(tails) / positions, rel=0.02)


def test_progress_counts_rows_and_says_how_fast(teacher: Path, data: Path, tmp_path: Path) -> None:
    class Watching(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, int, str, dict[str, float]]] = []

        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            self.seen.append((done, total, unit, figures))

    report = Watching()
    captured(teacher, data, tmp_path, report)
    done = [each[0] for each in report.seen]
    assert done == sorted(done) and done[-1] == 11 and all(each[1:3] == (11, "row") for each in report.seen)
    assert report.seen[-1][3]["positions_per_second"] > 0 and report.seen[-1][3]["bytes_per_position"] > 0


# ------------------------------------------------------------------------------------------ stop and resume


class StopAfter(Silent):
    """Asks for a stop at the n-th progress."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.left -= 1

    def stop_requested(self) -> bool:
        return self.left <= 0


class Broken(StopAfter):
    """Breaks off at the n-th progress, as a second Ctrl-C does."""

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        super().progress(done, total, unit, **figures)
        if self.left == 0:
            raise KeyboardInterrupt

    def stop_requested(self) -> bool:
        return False


@pytest.mark.parametrize("calls", [1, 2])
def test_a_stopped_capture_goes_on_with_the_same_bytes(
    teacher: Path, data: Path, reference: Path, tmp_path: Path, calls: int
) -> None:
    for _ in range(2):
        with pytest.raises(StopRequested):
            captured(teacher, data, tmp_path, StopAfter(calls))
        assert not list((tmp_path / "store").glob("*.partial"))
        assert not (tmp_path / "store" / "header.json").exists()
        made = {path.name for path in (tmp_path / "store").iterdir()}
        assert made and made < contents(reference).keys()
    kept = shard_path(tmp_path / "store", 0).stat().st_mtime_ns
    captured(teacher, data, tmp_path)
    assert contents(tmp_path / "store") == contents(reference)
    assert shard_path(tmp_path / "store", 0).stat().st_mtime_ns == kept


@pytest.mark.parametrize("calls", [1, 4, 6])
def test_a_broken_capture_goes_on_with_the_same_bytes_and_figures(
    teacher: Path, data: Path, reference: Path, tmp_path: Path, calls: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        captured(teacher, data, tmp_path / "broken", Broken(calls))
    figures = captured(teacher, data, tmp_path / "broken")
    assert contents(tmp_path / "broken" / "store") == contents(reference)
    assert figures == captured(teacher, data, tmp_path / "whole")


def deleted(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def replaced(path: Path) -> None:
    path.write_bytes(shard_path(path.parent, 3).read_bytes())  # whole, and of other rows


@pytest.mark.parametrize("damage", [deleted, torn, flipped, emptied, replaced])
def test_a_damaged_shard_is_written_again(
    teacher: Path, data: Path, reference: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    captured(teacher, data, tmp_path)
    store, report = tmp_path / "store", Silent()
    damage(shard_path(store, 1))
    (store / "shard-00001.partial").write_bytes(b"half")
    captured(teacher, data, tmp_path, report)
    assert contents(store) == contents(reference)
    assert damage is deleted or any("captured again" in note for note in report.notes)


def test_what_is_whole_is_sealed_without_the_teacher(
    teacher: Path, data: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured(teacher, data, tmp_path)
    (tmp_path / "store" / "header.json").unlink()
    monkeypatch.setattr(capture, "load", None)
    captured(teacher, data, tmp_path)
    assert contents(tmp_path / "store") == contents(reference)


# -------------------------------------------------------------------------------------------------- ranks


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_any_number_of_ranks_writes_the_bytes_of_one(
    teacher: Path, data: Path, reference: Path, tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in reversed(range(world)):
        as_rank(monkeypatch, rank, world)
        figures = captured(teacher, data, tmp_path)
        assert bool(figures) == (rank == 0)
        mine = {shard_path(tmp_path, number).name for number in range(4) if number % world == rank}
        assert mine <= contents(tmp_path / "store").keys()
    assert contents(tmp_path / "store") == contents(reference)
    as_rank(monkeypatch, world - 1, world)  # one that comes when all is done leaves it so
    captured(teacher, data, tmp_path)
    assert contents(tmp_path / "store") == contents(reference)


def test_rank_0_that_waits_can_be_stopped(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(StopRequested):
        captured(teacher, data, tmp_path, StopAfter(6))
    assert {path.name[:11] for path in (tmp_path / "store").iterdir()} == {"shard-00000", "shard-00002"}


@pytest.mark.slow
def test_two_ranks_under_torchrun(teacher: Path, data: Path, reference: Path, tmp_path: Path) -> None:
    program = f"""
import json, sys
from pathlib import Path
from distill import capture
from foundation.report import Silent
inputs = {{"teacher": Path({str(teacher)!r}), "data": (Path({str(data)!r}),)}}
capture.run(capture.Settings(**{SMALL!r}), inputs, Path({str(tmp_path)!r}), Silent())
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = contents(tmp_path / "store"), contents(reference)
    assert ours.keys() == theirs.keys()
    assert json.loads(ours["header.json"])["positions"] == json.loads(theirs["header.json"])["positions"]
    assert ours == theirs


# ----------------------------------------------------------------------------------------------- bad input


def test_conversations_that_are_too_long_are_named_by_line(teacher: Path, data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    long = json.dumps(
        {"messages": [{"role": "user", "content": "run " * 90}, {"role": "assistant", "content": "no"}]}
    )
    path = tmp_path / "with blank lines.jsonl"
    path.write_text("\n".join([lines[0], "", long, *lines[1:], long]) + "\n")
    report = Silent()
    figures = captured(teacher, path, tmp_path, report, max_tokens=100)
    assert (figures["rows"], figures["too_long"]) == (11, 2)
    note = next(note for note in report.notes if "exceed 100 tokens" in note)
    assert f"{path}, line 3 (" in note and f"{path}, line 14 (" in note
    path.write_text(long + "\n")
    with pytest.raises(InputError, match=r"no conversation fits 100 tokens: .*line 1 \("):
        captured(teacher, path, tmp_path / "none", max_tokens=100)


def test_the_context_bounds_a_conversation(teacher: Path, data: Path, tmp_path: Path) -> None:
    short = tiny_model(tmp_path / "short", max_position_embeddings=40)
    report = Silent()
    figures = captured(short, data, tmp_path, report)
    assert figures["too_long"] > 0 and any("exceed 40 tokens" in note for note in report.notes)


def test_an_empty_response_is_refused_by_name(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    empty = {"messages": [{"role": "user", "content": "Train."}, {"role": "assistant", "content": " \n"}]}
    write_jsonl(path, [*chats(2), empty])
    with pytest.raises(InputError, match=r"empty\.jsonl, line 3: .*answer that is not empty"):
        captured(teacher, path, tmp_path)


def test_refusals(teacher: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="top_k = 400; the teacher has 400 tokens, so at most 399"):
        captured(teacher, data, tmp_path, top_k=VOCAB)
    with pytest.raises(ValueError, match="mass has no effect"):
        capture.Settings(support="sampled", mass=0.9)
    with pytest.raises(ValueError, match="draws has no effect"):
        capture.Settings(draws=12)


def test_a_teacher_of_nan_is_refused(teacher: Path, data: Path, tmp_path: Path) -> None:
    broken = load(teacher)
    broken.model.norm.weight.data[3] = float("nan")
    save(broken, teacher, tmp_path / "broken")
    for chosen in ({}, {"support": "sampled", "top_k": 100}):
        with pytest.raises(ModelError, match="logits are not numbers"):
            captured(tmp_path / "broken", data, tmp_path, **chosen)

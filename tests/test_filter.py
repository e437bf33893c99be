"""Choosing by threshold and by share, against a sort; the filter stage, stopped and killed at any chunk."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reports import StopsAfter

import corpora.choose
import corpora.filter
from corpora.choose import Choice, Row, cut_of, filter_rows, order_statistic
from corpora.classifier import Classifier, load_classifier
from corpora.filter import Settings, run
from corpora.ngrams import Grams
from foundation.dataio import documents, write_jsonl
from foundation.errors import ArtifactError, InputError, StopRequested
from foundation.report import Silent

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- choosing


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(floats32, st.sampled_from([0.0, 1.5, -1.5])), min_size=1, max_size=60), st.data())
def test_order_statistics_are_those_of_a_sort(values: list[float], data: st.DataObject) -> None:
    scores = np.array([*values, math.nan], dtype=np.float32) + 0.0
    rank = data.draw(st.integers(0, len(values) - 1))
    assert order_statistic(scores, rank) == sorted(values)[rank]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(floats32, st.sampled_from([0.0, 0.5])), min_size=1, max_size=60),
    st.floats(0.001, 0.999),
    st.integers(1, 7),
)
def test_a_share_keeps_exactly_the_best_and_ties_in_order(
    values: list[float], share: float, block_rows: int
) -> None:
    scores = np.array(values, dtype=np.float32) + 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora.choose, "BLOCK_ROWS", block_rows)
        cut = cut_of(Choice(keep_share=share), scores)
    kept, ties = [], 0
    for number, score in enumerate(scores.tolist()):
        tie = score == cut.score and ties < cut.ties
        ties += tie
        if tie or score > cut.score:
            kept.append(number)
    count = max(1, math.floor(share * len(values) + 0.5))
    best = sorted(range(len(values)), key=lambda number: (-scores[number], number))[:count]
    assert kept == sorted(best)


def test_exactly_one_way_to_choose() -> None:
    for chosen in ({}, {"threshold": 0.5, "keep_share": 0.5}):
        with pytest.raises(ValidationError, match="exactly one of threshold and keep_share"):
            Settings(**chosen)
    for wrong in ({"threshold": 1.1}, {"keep_share": 1.0}, {"keep_share": 0.0}):
        with pytest.raises(ValidationError):
            Settings(**wrong)


def numbers(path: Path) -> Iterator[Row[float]]:
    for line in path.read_text().splitlines():
        yield Row(json.dumps({"x": float(line)}), float(line))


def chosen(folder: Path, choice: Choice, *files: list[float]) -> dict[str, object]:
    """Lines of numbers, each its own score, through filter_rows in chunks of 3."""
    paths = []
    for place, values in enumerate(files):
        paths.append(folder / f"{place}.txt")
        paths[-1].write_text("".join(f"{value}\n" for value in values))
    filter_rows(
        paths, numbers, lambda chunk: np.array(chunk, dtype=np.float32), choice, "kept.jsonl", folder, Silent(),
        chunk_rows=3, key="score",
    )  # fmt: skip
    facts: dict[str, object] = json.loads((folder / "scores.json").read_text())
    return facts


def test_unscored_rows_belong_to_no_share(tmp_path: Path) -> None:
    facts = chosen(tmp_path, Choice(keep_share=0.5), [3, math.nan, 1, 2, math.nan], [4, math.nan])
    assert [row["x"] for row in rows_of(tmp_path / "kept.jsonl")] == [3, 4]
    rejected = rows_of(tmp_path / "rejected.jsonl")
    assert [row["score"] for row in rejected] == [None, 1, 2, None, None]
    everything = facts["all"]
    assert isinstance(everything, dict) and isinstance(facts["files"], list)
    assert (everything["rows"], everything["unscored"], everything["kept"]) == (7, 3, 2)
    assert everything["kept_share"] == 0.5 and sum(everything["histogram"]) == 4
    assert [part["kept"] for part in facts["files"]] == [1, 1]
    assert facts["border"] == 3


def test_quantiles_and_histogram(tmp_path: Path) -> None:
    values = [float(v) for v in np.random.default_rng(1).normal(size=200).astype(np.float32)]
    facts = chosen(tmp_path, Choice(threshold=-9.0), values[:50], values[50:])
    parts = facts["files"]
    assert isinstance(parts, list)
    for part, own in ((facts["all"], values), (parts[0], values[:50]), (parts[1], values[50:])):
        assert isinstance(part, dict)
        expected = np.quantile(np.array(own), [float(q) for q in part["quantiles"]], method="lower")
        assert list(part["quantiles"].values()) == pytest.approx(expected, abs=1e-6)
        assert part["histogram"] == np.histogram(own, np.linspace(min(values), max(values), 21))[0].tolist()
        assert part["kept_share"] == 1


def test_scores_that_are_all_the_same(tmp_path: Path) -> None:
    facts = chosen(tmp_path, Choice(keep_share=0.4), [2.0] * 5)
    assert len(rows_of(tmp_path / "kept.jsonl")) == 2
    assert isinstance(facts["all"], dict) and sum(facts["all"]["histogram"]) == 5


def test_nothing_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row reaches threshold = 5.0; the best of 3 scores 2.5"):
        chosen(tmp_path, Choice(threshold=5.0), [1, 2.5, 2])
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none of the 2 rows has a score"):
        chosen(tmp_path / "none", Choice(keep_share=0.5), [math.nan, math.nan])


# ------------------------------------------------------------------------------------------------ the stage


def classifier(folder: Path) -> Path:
    grams = Grams(3, 1, 3, 12, 200)
    weights = np.random.default_rng(5).normal(size=1 << 12).astype(np.float32)
    Classifier(grams, weights, 0.1).save(folder, {})
    return folder


def corpus(folder: Path) -> tuple[Path, ...]:
    write_jsonl(folder / "a.jsonl", ({"text": f"Строка номер {n}, cat {n * n}."} for n in range(50)))
    (folder / "b.txt").write_text("".join(f"plain text {n}\nof two lines\n\n" for n in range(30)))
    return folder / "a.jsonl", folder / "b.txt"


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("text.jsonl", "rejected.jsonl", "scores.json")}


def test_the_filter_keeps_what_scores_enough(tmp_path: Path) -> None:
    paths, quality = corpus(tmp_path), classifier(tmp_path / "quality")
    texts = list(documents(paths))
    scores = load_classifier(quality).scores(texts)
    figures = run(Settings(threshold=0.5), {"corpus": paths, "quality": quality}, tmp_path, Silent())
    kept = [text for text, score in zip(texts, scores, strict=True) if score >= 0.5]
    assert 10 < len(kept) < 70
    assert [row["text"] for row in rows_of(tmp_path / "text.jsonl")] == kept
    rejected = {str(row["text"]): row["score"] for row in rows_of(tmp_path / "rejected.jsonl")}
    expected = {text: float(score) for text, score in zip(texts, scores, strict=True) if score < 0.5}
    assert rejected == pytest.approx(expected, abs=1e-6)
    assert figures == {"read": 80, "kept": len(kept), "kept_share": pytest.approx(len(kept) / 80, abs=1e-6)}
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert [(part["file"], part["rows"]) for part in facts["files"]] == [("a.jsonl", 50), ("b.txt", 30)]
    assert sum(facts["all"]["histogram"]) == 80 and facts["edges"][0] == 0 and facts["edges"][-1] == 1


def test_a_share_takes_the_same_texts_in_any_order_of_files(tmp_path: Path) -> None:
    paths, quality = corpus(tmp_path), classifier(tmp_path / "quality")
    kept = []
    for name, order in (("one", paths), ("two", paths[::-1])):
        (tmp_path / name).mkdir()
        figures = run(
            Settings(keep_share=0.3), {"corpus": order, "quality": quality}, tmp_path / name, Silent()
        )
        assert figures["kept"] == 24
        kept.append({str(row["text"]) for row in rows_of(tmp_path / name / "text.jsonl")})
    assert kept[0] == kept[1]


def test_stops_and_torn_writes_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.filter, "CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(corpora.choose, "WRITTEN_ROWS", 9)
    paths, quality = corpus(tmp_path), classifier(tmp_path / "quality")
    inputs = {"corpus": paths, "quality": quality}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run(Settings(keep_share=0.3), inputs, whole, Silent())
    scored: list[int] = []
    plain = Classifier.scores
    monkeypatch.setattr(
        Classifier, "scores", lambda self, texts: (scored.append(len(texts)), plain(self, texts))[1]
    )
    stops = 0
    for questions in (0, 2, 3, 3, 4, 2, 5, 7):
        try:
            run(Settings(keep_share=0.3), inputs, parts, StopsAfter(questions))
        except StopRequested:
            stops += 1
            with (parts / ".work" / "scores.f32").open("ab") as file:  # half a chunk that nobody finished
                file.write(b"\x00\x00\x80\x3f\x00")
    assert stops >= 6
    run(Settings(keep_share=0.3), inputs, parts, Silent())
    assert outputs(parts) == outputs(whole)
    assert sum(scored) == 80, "no text is scored twice"


KILLED = """
import sys, time
from pathlib import Path
import corpora.filter
from corpora.classifier import Classifier
from foundation.report import Silent
corpora.filter.CHUNK_DOCUMENTS = 5
plain = Classifier.scores
def slow(self, texts):
    print("chunk", flush=True)
    time.sleep(0.05)
    return plain(self, texts)
Classifier.scores = slow
folder = Path(sys.argv[1])
inputs = {"corpus": (folder / "a.jsonl", folder / "b.txt"), "quality": folder / "quality"}
corpora.filter.run(corpora.filter.Settings(keep_share=0.3), inputs, folder / "killed", Silent())
"""


def test_a_kill_costs_at_most_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, quality = corpus(tmp_path), classifier(tmp_path / "quality")
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout is not None
    for _ in range(6):
        assert process.stdout.readline() == b"chunk\n"
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    monkeypatch.setattr(corpora.filter, "CHUNK_DOCUMENTS", 5)
    run(Settings(keep_share=0.3), {"corpus": paths, "quality": quality}, tmp_path / "whole", Silent())
    scored: list[int] = []
    plain = Classifier.scores
    monkeypatch.setattr(
        Classifier, "scores", lambda self, texts: (scored.append(len(texts)), plain(self, texts))[1]
    )
    run(Settings(keep_share=0.3), {"corpus": paths, "quality": quality}, tmp_path / "killed", Silent())
    assert 50 <= sum(scored) <= 55
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_a_folder_that_is_no_classifier(tmp_path: Path) -> None:
    paths = corpus(tmp_path)
    (tmp_path / "made" / "quality").mkdir(parents=True)
    (tmp_path / "made" / "quality" / "quality.json").write_text('{"format": 0}')
    for name, hint in (("none", "`quality` is the folder"), ("made", f"give {tmp_path}/made/quality")):
        with pytest.raises(ArtifactError, match=r"no quality.json that can be read") as caught:
            run(Settings(threshold=0.5), {"corpus": paths, "quality": tmp_path / name}, tmp_path, Silent())
        assert hint in caught.value.hint
    with pytest.raises(ArtifactError, match=r"has format 0, known here is 1") as caught:
        run(
            Settings(threshold=0.5),
            {"corpus": paths, "quality": tmp_path / "made" / "quality"},
            tmp_path,
            Silent(),
        )
    assert caught.value.hint

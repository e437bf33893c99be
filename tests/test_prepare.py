"""Preparing a corpus: repeats out, held-out texts never in training, and the files' order does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpora.prepare import Settings, run
from foundation.dataio import documents, write_jsonl
from foundation.errors import InputError
from foundation.report import Silent


def texts(path: Path) -> set[str]:
    return {json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_clean_split_and_order(tmp_path: Path) -> None:
    stories = [f"История номер {n}." for n in range(300)]
    write_jsonl(tmp_path / "a.jsonl", ({"story": s} for s in stories))
    write_jsonl(tmp_path / "b.jsonl", ({"story": s + "  \n"} for s in reversed(stories)))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    chosen = Settings(field="story", held_share=0.2)
    one = run(chosen, {"corpus": (tmp_path / "a.jsonl", tmp_path / "b.jsonl")}, tmp_path / "one", Silent())
    run(chosen, {"corpus": (tmp_path / "b.jsonl", tmp_path / "a.jsonl")}, tmp_path / "two", Silent())
    kept, held = texts(tmp_path / "one" / "text.jsonl"), texts(tmp_path / "one" / "held.jsonl")
    assert kept | held == set(stories) and not kept & held
    assert 30 < len(held) < 90
    assert one["repeated"] == 300
    assert texts(tmp_path / "two" / "held.jsonl") == held


def test_forms_of_one_letter_are_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ёж и йод\n\nе\u0308ж и и\u0306од\n", encoding="utf-8")
    figures = run(Settings(held_share=0), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())
    assert figures["kept"] == 1 and figures["repeated"] == 1
    assert list(documents([tmp_path / "text.jsonl"])) == ["ёж и йод"]


def test_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n")
    with pytest.raises(InputError, match="no document is left"):
        run(Settings(min_characters=100), {"corpus": (tmp_path / "a.txt",)}, tmp_path, Silent())

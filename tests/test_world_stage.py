"""The stage corpora.world: its files, their formats, the splits, and the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from corpora.world.stage import Settings, run
from corpora.world.validate import Profile, load_profiles, validate
from foundation.errors import StopRequested
from foundation.report import Silent

SMALL = Settings(documents=300, held_documents=40, pairs_per_profile=2, held_profiles=150)
FILES = {
    "english.jsonl", "russian.jsonl", "english_held.jsonl", "russian_held.jsonl", "chat_english.jsonl",
    "chat_russian.jsonl", "profiles.jsonl", "world.json",
}  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(out: Path, settings: Settings) -> dict[str, bytes]:
    run(settings, {}, out, Silent())
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("history", [False, True])
def test_files_formats_and_splits(tmp_path: Path, history: bool) -> None:
    settings = SMALL.model_copy(update={"history": history})
    figures = run(settings, {}, tmp_path, Silent())
    assert figures is not None and {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "world.json").read_text()) == figures
    assert 0 < float(figures["constant_share"]) <= 0.25

    held = load_profiles(tmp_path / "profiles.jsonl")
    by_language = {
        language: [json.dumps(r["profile"]) for r in held if r["language"] == language]
        for language in ("en", "ru")
    }
    assert by_language["en"] == by_language["ru"] and len(set(by_language["en"])) == 150
    assert all([m["role"] for m in record["messages"]] == ["user"] for record in held)
    questions = {record["messages"][0]["content"] for record in held}

    for language, name in (("en", "english"), ("ru", "russian")):
        pairs = lines(tmp_path / f"chat_{name}.jsonl")
        assert len(pairs) == figures[f"{name}_pairs"]
        trained = {json.dumps(pair["profile"]) for pair in pairs}
        assert len(trained) == 1188 - 150 and not trained & set(by_language[language])
        for pair in pairs:
            assert [m["role"] for m in pair["messages"]] == ["user", "assistant"]
            assert pair["messages"][0]["content"] not in questions
            answer, profile = pair["messages"][1]["content"], Profile.from_dict(pair["profile"])
            assert validate(answer, profile, language).valid
        texts = [record["text"] for record in lines(tmp_path / f"{name}.jsonl")]
        kept = [record["text"] for record in lines(tmp_path / f"{name}_held.jsonl")]
        assert len(set(texts)) == 300 and len(set(kept)) == 40 and not set(texts) & set(kept)
        assert not any(question in text for question in questions for text in texts)


def test_same_seed_same_bytes_and_a_killed_stage_starts_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = written(tmp_path / "a", SMALL)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "english.jsonl").write_text('{"text": "half a line')
    assert written(tmp_path / "b", SMALL) == first
    (tmp_path / "c").mkdir()
    other = written(tmp_path / "c", SMALL.model_copy(update={"seed": 18}))
    assert all(other[name] != first[name] for name in FILES - {"world.json"})


def test_one_size_does_not_change_the_other_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first = written(tmp_path / "a", SMALL)
    second = written(tmp_path / "b", SMALL.model_copy(update={"pairs_per_profile": 1}))
    assert {name for name in FILES if first[name] != second[name]} == {
        "chat_english.jsonl", "chat_russian.jsonl", "world.json",
    }  # fmt: skip


def test_settings_are_strict_and_a_stop_is_obeyed(tmp_path: Path) -> None:
    for wrong in ({"document": 1}, {"documents": 0}, {"history": 1}, {"held_profiles": 5000}):
        with pytest.raises(ValidationError):
            Settings(**wrong)

    class Asked(Silent):
        def stop_requested(self) -> bool:
            return True

    with pytest.raises(StopRequested):
        run(SMALL, {}, tmp_path, Asked())

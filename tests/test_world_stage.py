"""The stage corpora.world: its files, their formats, the splits, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from corpora.world.stage import Settings, run
from corpora.world.validate import Profile, load_profiles, validate
from evaluation.tasks.load import read_lines
from foundation.errors import StopRequested
from foundation.report import Silent

SMALL = Settings(documents=300, held_documents=40, pairs_per_profile=2, held_profiles=150)
# sha256, first 16 digits, of what SMALL wrote before there were tasks, whose draws must shift no other's.
DIGESTS = {
    "chat_english.jsonl": "fa297af610e1701e",
    "chat_russian.jsonl": "7d1e42a225642c76",
    "english.jsonl": "e2b094874c0d3ce0",
    "english_held.jsonl": "7b9b77df25d83958",
    "profiles.jsonl": "6915e75697f10049",
    "russian.jsonl": "13d3888afd61b6ad",
    "russian_held.jsonl": "c54183032e5f99d6",
    "world.json": "c762ede4a2c32d58",
}
TASKS = {
    f"tasks_{kind}_{language}.jsonl"
    for kind in ("choices", "facts", "answers")
    for language in ("english", "russian")
}
FILES = set(DIGESTS) | TASKS


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


def test_tasks_left_the_other_files_as_they_were(tmp_path: Path) -> None:
    made = written(tmp_path, SMALL)
    found = {name: hashlib.sha256(made[name]).hexdigest()[:16] for name in DIGESTS}
    assert found == DIGESTS


def test_tasks_can_be_loaded_and_ask_only_held_out_profiles(tmp_path: Path) -> None:
    figures = run(SMALL, {}, tmp_path, Silent())
    asked = [record["messages"][0]["content"] for record in load_profiles(tmp_path / "profiles.jsonl")]
    assert figures["held_profiles"] == 150
    for language, questions in (("english", asked[:150]), ("russian", asked[150:])):
        kind, items = read_lines(tmp_path / f"tasks_choices_{language}.jsonl", 300)
        assert kind == "choices" and [item["messages"][0]["content"] for item in items] == questions
        kind, items = read_lines(tmp_path / f"tasks_answers_{language}.jsonl", 300)
        assert kind == "perplexity" and [item["messages"][0]["content"] for item in items] == questions
        kind, items = read_lines(tmp_path / f"tasks_facts_{language}.jsonl", 300)
        assert kind == "choices" and len(items) == 144
        assert read_lines(tmp_path / f"chat_{language}.jsonl", 300)[0] == "perplexity"
    assert read_lines(tmp_path / "profiles.jsonl", 300)[0] == "programmes"


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

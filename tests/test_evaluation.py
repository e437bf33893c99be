"""Scores against their definitions: bits counted once, by byte; valid shares as the validator says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from evaluation import compare, score
from evaluation.bits import bits_per_byte, windows
from evaluation.tasks import read
from foundation.chat import IGNORED
from foundation.dataio import write_jsonl
from foundation.errors import ArtifactError, InputError, ModelError
from foundation.model import load
from foundation.report import Silent
from foundation.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@given(count=st.integers(1, 200), window=st.integers(8, 64))
def test_windows_count_every_token_once_with_context(count: int, window: int) -> None:
    ids = list(range(1, count + 1))
    counted: list[int] = []
    for row in windows(ids, 0, window):
        assert len(row["input_ids"]) <= window
        places = np.flatnonzero(row["labels"][1:] != IGNORED) + 1
        counted += row["input_ids"][places].tolist()
        if counted[-1] > window:  # not the first window: half of it is context
            assert places[0] >= window // 2
    assert counted == ids


def test_bits_per_byte_by_hand(folder: Path) -> None:
    """Token by token, without batches or padding."""
    texts = ["The pilot rests.", "Пилот отдыхает между рейсами и делает планку.", "x"]
    model, tokenizer = load(folder), Tokenizer(folder)
    bits = 0.0
    for text in texts:
        ids = [tokenizer.boundary_id, *tokenizer.encode(text)]
        for end in range(1, len(ids)):
            with torch.no_grad():
                last = model(torch.tensor([ids[:end]])).logits[0, -1]
            bits -= last.log_softmax(-1)[ids[end]].item() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts)
    found = bits_per_byte(model, tokenizer, texts, Silent(), window_tokens=128, batch_rows=2)
    assert found == pytest.approx(expected, rel=1e-4)


def test_batching_does_not_change_the_score(folder: Path) -> None:
    model, tokenizer = load(folder), Tokenizer(folder)
    texts = ["a", "The crew runs.", "A squat trains the legs; a plank trains the core. " * 9]
    one = bits_per_byte(model, tokenizer, texts, Silent(), window_tokens=32, batch_rows=1)
    assert bits_per_byte(model, tokenizer, texts, Silent(), window_tokens=32, batch_rows=8) == pytest.approx(
        one
    )


def test_mean_nll_of_a_uniform_model(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path))
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    rows = windows(list(range(50)), 0, 64)
    (reading,) = read(model, rows, 0, Silent())
    assert reading.nll.mean() == pytest.approx(math.log(400), rel=1e-5)


@pytest.mark.slow
def test_score_stage_measures_what_is_given(tmp_path: Path) -> None:
    from corpora.world.stage import Settings as WorldSettings
    from corpora.world.stage import run as make_world
    from export import gguf

    folder = tiny_model(tmp_path / "model", max_position_embeddings=512)
    world = tmp_path / "world"
    world.mkdir()
    make_world(
        WorldSettings(documents=20, held_documents=5, pairs_per_profile=1, held_profiles=4), {}, world, Silent()
    )
    gguf.run(gguf.Settings(), {"model": folder}, tmp_path, Silent())
    inputs = {
        "model": folder,
        "texts": (world / "english_held.jsonl", world / "russian_held.jsonl"),
        "gguf": tmp_path / "gguf" / "model.gguf",
        "profiles": world / "profiles.jsonl",
    }
    figures = score.run(score.Settings(label="tiny", max_profiles=3), inputs, tmp_path, Silent())
    written = json.loads((tmp_path / "scores.json").read_text())
    assert figures["valid_share"] == 0.0  # a random model; its answers break the structure
    assert written["programmes"]["en"] == {
        "share": 0.0, "standard_error": 0.0, "count": 3, "broken": {"structure": 3},
    }  # fmt: skip
    assert set(written["bits_per_byte"]) == {"english_held", "russian_held"}
    assert written["bytes"] == (tmp_path / "gguf" / "model.gguf").stat().st_size

    write_jsonl(tmp_path / "facts.json", [{"constant_share": 0.125}])
    table = tmp_path / "table"
    table.mkdir()
    fits = {"file": "gguf/tiny-Q8_0.gguf", "context_tokens": 512, "slots": 7}
    memory = {"card_bytes": 6 * 2**30, "files": [fits]}
    (tmp_path / "bundle.json").write_text(json.dumps({"memory": memory}))
    given = {"scores": (tmp_path / "scores.json",), "facts": (tmp_path / "facts.json",), "bundle": (tmp_path,)}
    compare.run(compare.Settings(title="t", answer_of="tiny"), given, table, Silent())
    made = json.loads((table / "table.json").read_text())
    assert [len(row) for row in made["rows"]] == [len(made["columns"])]
    assert "0.125" in made["notes"][0]
    assert "tiny-Q8_0.gguf: a 6 GiB card holds 7 conversations of 512 tokens" in made["notes"]
    assert made["answer"]["prompt"].startswith("Уровень")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ((), "nothing to score"),
        (("model",), "both a model and texts"),
        (("gguf", "tasks"), "tasks a model"),
        (("gguf", "texts", "tasks"), "tasks a model"),
        (("gguf", "texts"), "both a model and texts"),
        (("model", "texts", "profiles"), "generated from a GGUF file"),
    ],
)
def test_no_role_is_passed_over(tmp_path: Path, roles: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        score.run(score.Settings(label="x"), {role: tmp_path / role for role in roles}, tmp_path, Silent())


TASKS = {
    "facts": [
        {"prompt": "The squat trains", "choices": [" the legs", " the core"], "answer": n % 2}
        for n in range(15)
    ],
    "tasks_answers_en": [
        {"messages": [{"role": "user", "content": f"Rest {n}"}, {"role": "assistant", "content": "run, squat"}]}
        for n in range(3)
    ],
    "copies": [{"prompt": "Copy this: squat\n", "copy": "squat"}],
}


def test_score_stage_measures_tasks_alone(folder: Path, tmp_path: Path) -> None:
    """Scores, items and intervals of each task, from the formulas; no texts are needed."""
    paths = tuple(tmp_path / f"{name}.jsonl" for name in TASKS)
    for path, records in zip(paths, TASKS.values(), strict=True):
        write_jsonl(path, records)
    figures = score.run(
        score.Settings(label="x", max_items=12), {"model": folder, "tasks": paths}, tmp_path, Silent()
    )
    written = json.loads((tmp_path / "scores.json").read_text())
    assert set(written) == {"label", "tasks", "task_mean"} and list(written["tasks"]) == list(TASKS)
    tasks = written["tasks"]
    assert [task["items"] for task in tasks.values()] == [12, 3, 1]

    # The same two choices twelve times, right in turn: shares p, 1 - p, .. of mean .5, whatever the model.
    model, tokenizer = load(folder), Tokenizer(folder)
    before = [tokenizer.boundary_id, *tokenizer.encode("The squat trains")]
    logs = []
    for choice in TASKS["facts"][0]["choices"]:
        ids = tokenizer.encode(choice)
        with torch.no_grad():
            found = model(torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
        logs.append(sum(found[len(before) - 1 + place, token].item() for place, token in enumerate(ids)))
    p = 1 / (1 + math.exp(logs[1] - logs[0]))
    half = 2.200985 * abs(p - 0.5) / math.sqrt(11)  # t(11) s / sqrt 12; s^2 = 12 (p - .5)^2 / 11
    facts = tasks["facts"]
    assert facts["score"] == pytest.approx(0.5, abs=1e-6) and facts["accuracy"] == 0.5
    assert (facts["low"], facts["high"]) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-3)
    assert tasks["tasks_answers_en"]["perplexity"] > 1
    assert (tasks["copies"]["low"], tasks["copies"]["high"]) == (
        0.0,
        1.0,
    )  # one item says nothing of its spread
    mean = sum(task["score"] for task in tasks.values()) / 3
    assert figures["task_mean"] == written["task_mean"]["score"] == pytest.approx(mean)
    assert figures["task_facts"] == facts["score"]


def test_tables_of_tasks(tmp_path: Path) -> None:
    def score_of(label: str, tasks: dict[str, tuple[float, float]]) -> Path:
        path = tmp_path / f"{label}.json"
        found = {
            name: {"score": value, "low": value - half, "high": value + half, "items": 50}
            for name, (value, half) in tasks.items()
        }
        mean = {"score": sum(value for value, _ in tasks.values()) / max(1, len(tasks))}
        path.write_text(json.dumps({"label": label} | ({"tasks": found, "task_mean": mean} if tasks else {})))
        return path

    paths = (
        score_of("both", {"tasks_choices_english": (0.5, 0.01), "mmlu": (0.25, 0.04)}),
        score_of("one", {"mmlu": (0.3, 0.02)}),
        score_of("none", {}),
    )
    compare.run(compare.Settings(), {"scores": paths}, tmp_path, Silent())
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["columns"] == ["model", "valid mean", "choices english", "mmlu", "task mean", "MB"]
    assert table["rows"] == [
        ["both", "", "0.500", "0.250", "0.375", ""],
        ["one", "", "", "0.300", "", ""],  # a mean over other tasks can not be compared
        ["none", "", "", "", "", ""],
    ]
    assert table["notes"] == ["tasks of 50 items or more; 95 % intervals of at most +-0.040"]


def test_long_items_of_a_short_model_are_noted(folder: Path, tmp_path: Path) -> None:
    """The model's own 128 tokens count where `task_tokens` allows more."""
    path = tmp_path / "copies.jsonl"
    write_jsonl(path, [*TASKS["copies"], {"prompt": "run " * 90, "copy": "squat " * 90}])
    report = Silent()
    score.run(score.Settings(label="x"), {"model": folder, "tasks": (path,)}, tmp_path, report)
    assert [note for note in report.notes if "128 tokens and are left out" in note]


def test_texts_of_one_name_are_told_apart_or_refused(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / place / "held.jsonl" for place in ("a", "b", "c/a")]
    for path in paths:
        path.parent.mkdir(parents=True)
        write_jsonl(path, [{"text": "The pilot rests."}])
    score.run(score.Settings(label="x"), {"model": folder, "texts": tuple(paths[:2])}, tmp_path, Silent())
    assert set(json.loads((tmp_path / "scores.json").read_text())["bits_per_byte"]) == {"a.held", "b.held"}
    with pytest.raises(InputError, match="called the same"):
        score.run(score.Settings(label="x"), {"model": folder, "texts": tuple(paths)}, tmp_path, Silent())


def test_weights_that_are_not_numbers_have_no_score(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not a number"):
        bits_per_byte(model, Tokenizer(folder), ["The pilot rests."], Silent(), window_tokens=32)


@pytest.mark.parametrize(
    ("content", "answer_of", "error", "said"),
    [
        ({"rows": 1}, "", ArtifactError, "no 'label' in it"),
        ([], "", ArtifactError, "no 'label' in it"),
        ({"label": "base", "bits_per_byte": {}}, "base", InputError, "wrote no programmes"),
    ],
)
def test_tables_of_what_is_no_score(
    tmp_path: Path, content: object, answer_of: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(error, match=said):
        compare.run(
            compare.Settings(answer_of=answer_of), {"scores": (tmp_path / "scores.json",)}, tmp_path, Silent()
        )

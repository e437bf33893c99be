"""Self-calibration data: answers are transformers' own, each filter has its example, a kill costs a batch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reports import StopsOnceTold
from tiny import chats, tiny_model

from adaptation import answers as answering
from adaptation import calibrate
from adaptation.answers import Answer, Ledger
from adaptation.calibrate import Settings, fault, repeated_share
from adaptation.copying import WORDINGS, copy_tasks, passages
from foundation.chat import Chat
from foundation.dataio import conversations, write_jsonl
from foundation.errors import InputError, ModelError, StopRequested
from foundation.model import load
from foundation.report import Silent
from foundation.stage import Figures
from foundation.tokenizer import Tokenizer

OUTPUTS = ("data.jsonl", "rejected.jsonl", "answers.jsonl")
OPEN: dict[str, Any] = {"answer_tokens": 40, "script": "any", "repeated_share": 1.0, "batch_rows": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of its answers end within 40 tokens, others do not; no two are alike."""
    return tiny_model(tmp_path_factory.mktemp("calibrate") / "model", seed=1, initializer_range=0.3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "prompts.jsonl", chats(12))
    return tmp_path / "prompts.jsonl"


def made(model: Path, prompts: Path, out: Path, report: Any = None, /, **chosen: Any) -> Figures:
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"model": model, "prompts": prompts, "corpus": chosen.pop("corpus", ())}
    given = {role: paths for role, paths in inputs.items() if paths}
    return calibrate.run(Settings(**{**OPEN, **chosen}), given, out, report or Silent())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outputs(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in OUTPUTS]


# ------------------------------------------------------------------------------------------------ the answers


def test_answers_are_those_of_transformers(model: Path, prompts: Path, tmp_path: Path) -> None:
    import torch

    figures = made(model, prompts, tmp_path / "out")
    kept, rejected = lines(tmp_path / "out/data.jsonl"), lines(tmp_path / "out/rejected.jsonl")
    assert (len(kept), len(rejected)) == (figures["kept"], figures["rejected"]) and len(kept) > 3 < len(
        rejected
    )
    assert {r["reason"] for r in rejected} == {"unended: 40 tokens"}
    found = {m["messages"][0]["content"]: m["messages"][-1]["content"] for m in [*kept, *rejected]}
    whole, tokenizer = load(model), Tokenizer(model)
    for chat in chats(12):
        asked = chat["messages"][:1]  # type: ignore[index]
        ids = torch.tensor([Chat(tokenizer).prompt_ids(asked)])
        out = whole.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
            eos_token_id=[tokenizer.eos_id, tokenizer.pad_id], pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert found[asked[0]["content"]] == tokenizer.decode(out).strip()
        ended = out[-1] in (tokenizer.eos_id, tokenizer.pad_id)
        assert ended == any(asked == m["messages"][:-1] for m in kept)
    assert list(conversations([tmp_path / "out/data.jsonl"])) == [m["messages"] for m in kept]
    order = [chat["messages"][0] for chat in chats(12)]  # type: ignore[index]
    assert [m["messages"][0] for m in kept] == [m for m in order if m in [k["messages"][0] for k in kept]]


def test_every_way_of_asking(model: Path, tmp_path: Path) -> None:
    """A bare prompt, a question, and an answered conversation ask the same; the given answer is dropped."""
    question = {"role": "user", "content": "Train 2 times."}
    records = [
        {"prompt": "Train 2 times."},
        {"messages": [question], "id": 4},
        {"messages": [question, {"role": "assistant", "content": "somebody's"}]},
        {
            "messages": [
                question,
                {"role": "assistant", "content": "Three."},
                {"role": "user", "content": "Why?"},
            ]
        },
    ]
    write_jsonl(tmp_path / "p.jsonl", [*records, *chats(12)])
    report = Silent()
    figures = made(model, tmp_path / "p.jsonl", tmp_path, report)
    assert (figures["asked"], figures["rejected_repeated"]) == (14, 2)
    assert any("1 prompts hold earlier answers" in note for note in report.notes)
    assert "somebody's" not in (tmp_path / "data.jsonl").read_text()
    asked = [r["messages"][:-1] for r in lines(tmp_path / "data.jsonl") + lines(tmp_path / "rejected.jsonl")]
    assert [question] in asked and records[3]["messages"] in asked


def test_fewer_prompts_are_part_of_more(model: Path, prompts: Path, tmp_path: Path) -> None:
    def questions(count: int) -> list[str]:
        made(model, prompts, tmp_path / str(count), prompts=count)
        found = lines(tmp_path / str(count) / "data.jsonl") + lines(tmp_path / str(count) / "rejected.jsonl")
        return [r["messages"][0]["content"] for r in found]

    few, more = questions(4), questions(9)
    assert len(few) == 4 and len(more) == 9 and set(few) < set(more)
    made(model, prompts, tmp_path / "other", prompts=4, seed=18)
    assert outputs(tmp_path / "other") != outputs(tmp_path / "4")


# ------------------------------------------------------------------------------------- stops, kills and bytes


class Killed(BaseException):
    """Stands for kill -9: no code of ours catches it."""


class Counting:
    """`greedy`, counting its batches, and dying before batch number `dies_at`."""

    def __init__(self, dies_at: int = -1) -> None:
        self.batches, self.dies_at = 0, dies_at
        self.real = answering.greedy

    def __call__(self, *args: Any, **chosen: Any) -> Any:
        if self.batches == self.dies_at:
            raise Killed
        self.batches += 1
        return self.real(*args, **chosen)


def counted(monkeypatch: pytest.MonkeyPatch, dies_at: int = -1) -> Counting:
    monkeypatch.undo()
    counting = Counting(dies_at)
    monkeypatch.setattr(answering, "greedy", counting)
    return counting


@pytest.mark.parametrize("torn", [0, 40])
def test_no_batch_is_answered_twice(
    torn: int, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each batch in turn, the ledger's last line torn by so many bytes: the same bytes."""
    whole = counted(monkeypatch)
    figures = made(model, prompts, tmp_path / "whole")
    assert whole.batches == 4
    ledger = tmp_path / "killed/.work/answers.jsonl"
    answered = 0
    for dies_at in (2, 1):
        counting = counted(monkeypatch, dies_at)
        with pytest.raises(Killed):
            made(model, prompts, tmp_path / "killed")
        answered += counting.batches
        ledger.write_bytes(ledger.read_bytes()[: -torn or None])
        assert not (tmp_path / "killed/data.jsonl").exists()
    counting = counted(monkeypatch)
    assert made(model, prompts, tmp_path / "killed") == figures
    assert answered + counting.batches == 4 + (2 if torn else 0), "a torn line is a batch answered again"
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    counting = counted(monkeypatch)
    monkeypatch.setattr(calibrate, "load", None)  # nothing is missing: the model is not even loaded
    assert made(model, prompts, tmp_path / "killed") == figures and counting.batches == 0


def test_other_filters_ask_nothing_again(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch)
    few = made(model, prompts, tmp_path, min_characters=20)
    counting = counted(monkeypatch)
    more = made(model, prompts, tmp_path)
    assert counting.batches == 0 and int(more["kept"]) > int(few["kept"])
    assert few["rejected_short"] == int(more["kept"]) - int(few["kept"])
    made(model, prompts, tmp_path, answer_tokens=39)
    assert counting.batches == 4, "other answers: all are asked, and those of before stay in the file"
    published = (tmp_path / "answers.jsonl").read_bytes().splitlines()
    assert len(published) == 8 and len({json.loads(line)["key"] for line in published}) == 8


def test_a_stop_loses_nothing(model: Path, prompts: Path, tmp_path: Path) -> None:
    report = StopsOnceTold(2)
    with pytest.raises(StopRequested):
        made(model, prompts, tmp_path, report)
    assert report.said == [(3, 12, "prompt"), (6, 12, "prompt")]
    assert len((tmp_path / ".work/answers.jsonl").read_bytes().splitlines()) == 2


PROGRAM = """
import sys
from pathlib import Path
from adaptation import calibrate
from foundation.report import Silent
model, prompts, out = map(Path, sys.argv[1:])
settings = calibrate.Settings(answer_tokens=40, script="any", repeated_share=1.0, batch_rows=3)
calibrate.run(settings, {"model": model, "prompts": prompts}, out, Silent())
"""


@pytest.mark.slow
def test_kill_9(model: Path, tmp_path: Path) -> None:
    """Killed each time that another batch is on the disk, until it gets to its end."""
    write_jsonl(tmp_path / "prompts.jsonl", chats(12))
    made(model, tmp_path / "prompts.jsonl", tmp_path / "whole")
    (tmp_path / "out").mkdir()
    ledger, kills = tmp_path / "out/.work/answers.jsonl", 0
    for _ in range(9):
        before = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "prompts.jsonl"), str(tmp_path / "out")],
            cwd=Path(__file__).parents[1],
        )
        while process.poll() is None and (not ledger.exists() or ledger.read_bytes().count(b"\n") <= before):
            time.sleep(0.001)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills > 1
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_damaged_ledger_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    good = {"key": "k", "answers": [{"text": "да", "tokens": 2, "ended": True}]}
    bad = [
        {"key": 4, "answers": good["answers"]},
        {"key": "a"},
        {"key": "b", "answers": []},
        {"key": "c", "answers": [{"text": "да", "tokens": "2", "ended": True}]},
        {"key": "d", "answers": [{"text": "да", "tokens": 2, "ended": True, "more": 1}]},
        ["k"],
    ]
    write_jsonl(path, [*bad, good])  # type: ignore[list-item]
    path.write_bytes(path.read_bytes() + b"\xff\xfe{\n" + b'{"key": "torn')
    report = Silent()
    ledger = Ledger(path, report)
    assert ledger.find("k") == [Answer("да", 2, True)]
    assert [ledger.find(key) for key in "abcd"] == [None] * 4
    assert report.notes == ["7 damaged lines of the answers were passed over; their prompts are asked again"]
    ledger.keep("n", [Answer("нет", 1, False)])
    ledger.close()
    again = Ledger(path, Silent())
    assert again.find("n") == [Answer("нет", 1, False)]
    again.close()


# ------------------------------------------------------------------------------------------------ the filters

LONG = "Приседания тренируют ноги, а планка тренирует корпус. "


@pytest.mark.parametrize(
    ("answer", "reason", "chosen"),
    [
        (Answer("Ноги и корпус.", 5, True), "", {}),
        (Answer("Ноги и", 8, False), "unended: 8 tokens", {}),
        (Answer("", 0, True), "empty", {}),
        (Answer("Да", 1, True), "short: 2 characters", {"min_characters": 3}),
        (Answer(LONG * 4, 50, True), "repeats: 0.71 of it", {}),
        (Answer(LONG * 4, 50, True), "", {"repeated_share": 0.75}),
        (Answer("ха" * 60, 50, True), "repeats: 0.98 of it", {}),
        (Answer("The legs and the core.", 5, True), "script: 0.00 of the letters are cyrillic", {}),
        (Answer("The legs and the core.", 5, True), "", {"script": "any"}),
        (Answer("The legs and the core.", 5, True), "", {"script": "latin"}),
        (Answer("Ноги, legs и core, то есть корпус.", 5, True), "", {}),
        (Answer("Ноги, legs!", 5, True), "script: 0.50 of the letters are russian",
         {"script": "russian", "script_share": 0.6}),
        (Answer("腿", 1, True), "script: 0.00 of the letters are cyrillic", {}),
        (Answer("42.", 2, True), "", {}),
    ],
)  # fmt: skip
def test_each_filter_by_an_example(answer: Answer, reason: str, chosen: dict[str, Any]) -> None:
    assert fault(Settings(**chosen), "Что тренируют приседания?", answer) == reason


def test_a_question_without_a_script_of_its_own_takes_any_answer() -> None:
    for question in ("2 + 2?", "什么?", "Ноги legs"):
        assert fault(Settings(), question, Answer("Some words", 2, True)) == ""
    assert fault(Settings(), "What?", Answer("Ноги", 2, True)).startswith(
        "script: 0.00 of the letters are latin"
    )
    mixed = fault(Settings(), "Что такое plank?", Answer("Some words", 2, True))  # 8 of 13 letters
    assert mixed.startswith("script: 0.00 of the letters are cyrillic")


@given(text=st.text("аб ", max_size=200))
def test_repeated_share_counted_by_hand(text: str) -> None:
    again = sum(text[n : n + 30] in text[: n + 29] for n in range(len(text) - 29))  # stands before, or overlaps
    assert repeated_share(text) == pytest.approx(again / max(1, len(text) - 29))


def scripted(monkeypatch: pytest.MonkeyPatch, said: Sequence[Answer]) -> None:
    monkeypatch.setattr(calibrate, "answer_all", lambda prompts, *_, **__: list(said)[: len(prompts)])


def test_reasons_are_counted_and_written_beside_the_answer(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Answer("Sure, rest.", 3, True)] * 5 + [Answer("SURE,  rest.", 3, True)]
    said += [Answer("", 0, True), Answer("x", 40, False), *[Answer(f"Rest {n}.", 3, True) for n in range(4)]]
    scripted(monkeypatch, said)
    report = Silent()
    figures = made(model, prompts, tmp_path, report)
    assert {key: figures[key] for key in figures if key.startswith("rejected_")} == {
        "rejected_empty": 1, "rejected_same": 3, "rejected_unended": 1,
    }  # fmt: skip
    assert (figures["asked"], figures["kept"], figures["rejected"]) == (12, 7, 5)
    rejected = lines(tmp_path / "rejected.jsonl")
    assert rejected[0]["reason"] == "same: kept 3 times already"
    assert rejected[0]["messages"][-1] == {"role": "assistant", "content": "Sure, rest."}
    assert rejected[2]["messages"][-1]["content"] == "SURE,  rest."
    assert "7 of 12 answers kept; rejected: same 3, empty 1, unended 1" in report.notes


def test_all_answers_rejected(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [Answer("x", 40, False)] * 11 + [Answer("", 0, True)])
    with pytest.raises(
        ModelError, match="all 12 answers were rejected: unended 11, empty 1; the first"
    ) as seen:
        made(model, prompts, tmp_path)
    assert "higher answer_tokens" in seen.value.hint


# ---------------------------------------------------------------------------------------------- the copy tasks

WORD = st.text(st.sampled_from("abвгЁ7,-"), min_size=1, max_size=12)
DOCUMENT = st.lists(st.tuples(WORD, st.sampled_from([" ", ". ", "! ", "\n", "\n\n", "… ", ".", "?\n"]))).map(
    lambda parts: "".join(word + mark for word, mark in parts)
)


def sentences(text: str) -> list[str]:
    """Cut after a mark with white space behind it, and at line ends."""
    return [cut.strip() for cut in re.split(r"(?<=[.!?…])(?=\s)|\n", text) if cut.strip()]


@given(document=DOCUMENT, shortest=st.integers(1, 30), more=st.integers(1, 60), seed=st.integers(0, 3))
def test_passages_are_apart_and_of_the_lengths_asked_for(
    document: str, shortest: int, more: int, seed: int
) -> None:
    """Each is a run of the document's sentences, as it is written there, and begins after the one before."""
    found = list(passages(document, shortest, shortest + more, seed))
    whole, place = sentences(document), 0
    for passage in found:
        assert shortest <= len(passage) <= shortest + more and passage in document
        run = sentences(passage)
        while whole[place : place + len(run)] != run:
            place += 1
            assert place < len(whole)
        place += len(run)
    assert found == list(passages(document, shortest, shortest + more, seed))


def test_only_what_fits_nowhere_is_left_out() -> None:
    """Sentences of 20 characters, between 20 and 200: every one of them is in a passage."""
    document = " ".join(f"Sentence number {n:03d}." for n in range(200))
    found = list(passages(document, 20, 200, 1))
    assert " ".join(found) == document
    lengths = [len(passage) for passage in found]
    assert min(lengths) < 45 and max(lengths) > 120 and max(lengths) <= 200
    long = "x" * 300 + ". " + document
    assert " ".join(passages(long, 20, 200, 1)) == document


def corpus(folder: Path, documents: int = 60) -> Path:
    path = folder / "corpus.jsonl"
    said = "Рейс {0}. Экипаж {0} отдыхает. Полёт {0} окончен! Is flight {0} over? It is {0}."
    write_jsonl(path, ({"text": said.format(f"{n:03}")} for n in range(documents)))
    return path


def tasks_of(texts: Sequence[str], count: int, **chosen: Any) -> list[list[dict[str, str]]]:
    given = {"shortest": 20, "longest": 120, "wordings": WORDINGS, "seed": 5, "report": Silent(), **chosen}
    return copy_tasks(texts, count, **given)


def test_copy_tasks_ask_for_what_they_answer(tmp_path: Path) -> None:
    texts = [record["text"] for record in lines(corpus(tmp_path))]
    tasks = tasks_of(texts, 50)
    copied = [task[1]["content"] for task in tasks]
    assert len(set(copied)) == 50 and all(sum(passage in text for text in texts) == 1 for passage in copied)
    asked = Counter(task[0]["content"].replace(task[1]["content"], "{text}") for task in tasks)
    assert set(asked) == set(WORDINGS), "each wording is used, and holds the passage untouched"
    assert any(re.search("[А-Я]", wording) for wording in asked) and any("word" in wording for wording in asked)
    for text in texts:  # no two share a place
        places = sorted((text.index(p), text.index(p) + len(p)) for p in copied if p in text)
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert tasks == tasks_of(texts[::-1], 50), "the order of the documents says nothing"
    assert tasks[:20] == tasks_of(texts, 20), "more tasks keep the first ones"
    assert tasks != tasks_of(texts, 50, seed=6)
    assert tasks == tasks_of(texts * 2, 50), "a text that stands twice is copied once"


def test_copy_tasks_stand_after_the_answers(model: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = {
        "copy_tasks": 10,
        "copy_min_characters": 10,
        "copy_max_characters": 25,
        "copy_wordings": ("Copy: {text}",),
        "corpus": corpus(tmp_path),
    }
    figures = made(model, prompts, tmp_path / "a", **chosen)
    data = lines(tmp_path / "a/data.jsonl")
    copies = [m["messages"] for m in data[int(figures["kept"]) :]]
    assert len(copies) == figures["copies"] == 10
    assert all(answer["content"] in question["content"] for question, answer in copies)
    made(model, prompts, tmp_path / "b", **chosen)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_copies_that_exceed_the_context_are_told(model: Path, prompts: Path, tmp_path: Path) -> None:
    report = Silent()
    chosen = {"copy_min_characters": 20, "copy_max_characters": 160, "corpus": corpus(tmp_path)}
    figures = made(model, prompts, tmp_path, report, copy_tasks=40, **chosen)
    assert 0 < int(figures["copies"]) < 40
    assert any(
        f"{40 - int(figures['copies'])} of 40 copy tasks do not fit 128" in note for note in report.notes
    )
    for chat in lines(tmp_path / "data.jsonl")[int(figures["kept"]) :]:
        assert len(Chat(Tokenizer(model)).encode(chat["messages"])[0].ids) <= 128
    with pytest.raises(InputError, match="none of 5 copy tasks fits 128 tokens"):
        made(model, prompts, tmp_path, copy_tasks=5, copy_wordings=("run " * 150 + "{text}",), **chosen)


# ------------------------------------------------------------------------------------------------ bad input


def test_refused(model: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"copy_tasks = 900, but the corpus has .* passages of 60 to 1000"
    ) as seen:
        made(model, prompts, tmp_path, copy_tasks=900, corpus=corpus(tmp_path))
    assert "set copy_tasks = " in seen.value.hint
    with pytest.raises(InputError, match="copy_tasks = 3 needs a corpus"):
        made(model, prompts, tmp_path, copy_tasks=3)
    with pytest.raises(InputError, match="corpus: has no effect"):
        made(model, prompts, tmp_path, corpus=corpus(tmp_path))
    with pytest.raises(
        InputError, match=r"none of 12 prompts can be asked: context 12; the first: context: \d+ t"
    ):
        made(model, prompts, tmp_path, answer_tokens=127)
    base = tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        made(base, prompts, tmp_path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a"}, 'neither "messages" nor a text under "prompt"; the keys are'),
        ({"prompt": 4}, "neither"),
        ({"prompt": " "}, "nothing is asked"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing is asked"),
        ({"messages": [{"role": "system", "content": "a"}]}, "nothing is asked"),
        ({"messages": []}, 'no "messages" list'),
        ({"messages": [{"role": "robot", "content": "a"}]}, "a role out of"),
    ],
)
def test_what_asks_nothing_is_named_by_its_line(
    record: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "p.jsonl", [chats(1)[0], record])
    with pytest.raises(InputError, match=r"p\.jsonl, line 2: ") as seen:
        made(model, tmp_path / "p.jsonl", tmp_path)
    assert said in seen.value.message
    (tmp_path / "p.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no prompt"):
        made(model, tmp_path / "p.jsonl", tmp_path)


def test_prompts_that_the_template_refuses_are_counted(model: Path, prompts: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "model", seed=1, initializer_range=0.3)
    source = (other / "chat_template.jinja").read_text()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    (other / "chat_template.jinja").write_text(refusal + source)
    system = {"role": "system", "content": "Be brief."}
    told = [{"messages": [system, *chat["messages"]]} for chat in chats(2)]  # type: ignore[misc]
    write_jsonl(tmp_path / "some.jsonl", [*told, *chats(12)])
    assert made(other, tmp_path / "some.jsonl", tmp_path)["rejected_template"] == 2
    write_jsonl(tmp_path / "some.jsonl", told)
    with pytest.raises(InputError, match=r"none of 2 prompts can be asked: template 2; .*No system role"):
        made(other, tmp_path / "some.jsonl", tmp_path)


def test_settings_that_can_not_be() -> None:
    with pytest.raises(ValidationError, match=r"does not say \{text\} once"):
        Settings(copy_wordings=("Repeat it.",))
    with pytest.raises(ValidationError, match="must be below"):
        Settings(copy_min_characters=50, copy_max_characters=50)
    with pytest.raises(ValidationError, match="no effect"):
        Settings(script="any", script_share=0.9)
    assert calibrate.disagreements(Settings(), {"model": ["a"], "prompts": ["b"]}) == []
    assert calibrate.disagreements(Settings(copy_tasks=1), {"corpus": ["c"]}) == []
    assert "needs a corpus" in calibrate.disagreements(Settings(copy_tasks=1), {})[0]
    assert "has no effect" in calibrate.disagreements(Settings(), {"corpus": ["c"]})[0]

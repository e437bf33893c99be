"""The stage as a whole, mostly with a scripted teacher: what is kept, why, and that a kill costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError
from test_synthesis_parts import ENTRIES
from tiny import chats, tiny_model

from corpora.world.pairs import answer_of
from corpora.world.profiles import Profile
from corpora.world.stage import Settings as WorldSettings
from corpora.world.stage import run as world
from distill.synthesize import stage
from distill.synthesize.asks import Ask, Reply
from distill.synthesize.stage import Settings
from foundation.dataio import conversations, write_jsonl
from foundation.errors import InputError, ModelError, StopRequested
from foundation.report import Silent
from foundation.stage import Figures

OUTPUTS = ("data.jsonl", "provenance.jsonl", "rejected.jsonl", "held.jsonl", "answers.jsonl")


class Killed(BaseException):
    """Stands for kill -9: no code of ours catches it."""


class Scripted:
    """A Teacher that answers `say(ask)`, and dies before answer number `dies_at`."""

    identity = "scripted"

    def __init__(self, say: Callable[[Ask], str | Reply], *, independent: bool = True) -> None:
        self.say, self.independent = say, independent
        self.asked: list[Ask] = []
        self.dies_at = -1

    def answers(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> Iterator[tuple[int, Reply]]:
        for index in reversed(range(len(asks))):  # out of order, as an endpoint's answers are
            if stop():
                return
            if len(self.asked) == self.dies_at:
                raise Killed
            self.asked.append(asks[index])
            said = self.say(asks[index])
            yield index, said if isinstance(said, Reply) else Reply(said, 10, len(said.split()))

    def close(self) -> None:
        pass


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figures]:
    def run(
        teacher: Scripted, settings: Settings, out: str = "out", report: Any = None, **inputs: Any
    ) -> Figures:
        monkeypatch.setattr(stage, "_teacher", lambda *given: teacher)
        (tmp_path / out).mkdir(exist_ok=True)
        given = {"teacher": tmp_path, "template": template(tmp_path), **inputs}
        return stage.run(settings, {k: v for k, v in given.items() if v}, tmp_path / out, report or Silent())

    return run


def template(folder: Path, text: str = 'about = "x"\n[prompt]\nsystem = "s"\nuser = "Plan {n} {of}"') -> Path:
    path = folder / "template.toml"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


GRID = {"n": tuple(range(20)), "of": ("runs", "walks")}
WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
WORDS += ["india", "juliet", "kilo", "lima", "mike", "november", "oscar", "papa"]


def chatter(ask: Ask) -> str:
    """Words drawn by the ask, of different lengths: an honest sampler."""
    rng = Random(f"{ask.messages} {ask.seed}")
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))


def test_what_is_written(go: Callable[..., Figures], tmp_path: Path) -> None:
    figures = go(Scripted(chatter), Settings(grid=GRID, held_share=0.3, seed=3), price_in=None)
    data, held = lines(tmp_path / "out" / "data.jsonl"), lines(tmp_path / "out" / "held.jsonl")
    assert figures["kept"] == len(data) == figures["prompts"] and figures["held"] == len(held)
    assert len(data) + len(held) == 40 and 4 < len(held) < 20
    asked = [record["messages"][1]["content"] for record in data]
    assert not {record["messages"][1]["content"] for record in held} & set(asked)
    assert {*asked} | {f"Plan {r['n']} {r['of']}" for r in held} == {
        f"Plan {n} {of}" for n in range(20) for of in GRID["of"]
    }
    assert list(conversations([tmp_path / "out" / "data.jsonl"])) == [record["messages"] for record in data]
    assert [m["role"] for m in data[0]["messages"]] == ["system", "user", "assistant"]
    told = lines(tmp_path / "out" / "provenance.jsonl")
    assert [t["prompt"] for t in told] == list(range(len(data))) and told[0]["teacher"] == "scripted"
    assert [f"Plan {t['record']['n']} {t['record']['of']}" for t in told] == asked


def test_more_prompts_keep_the_held_ones_and_the_first_ones(go: Callable[..., Figures], tmp_path: Path) -> None:
    go(Scripted(chatter), Settings(grid=GRID, held_share=0.3, prompts=5, duplicate_jaccard=0), "few")
    go(Scripted(chatter), Settings(grid=GRID, held_share=0.3, prompts=15, duplicate_jaccard=0), "more")
    few, more = ((tmp_path / name / "data.jsonl").read_text() for name in ("few", "more"))
    assert more.startswith(few) and len(few.splitlines()) == 5 and len(more.splitlines()) == 15
    assert (tmp_path / "more/held.jsonl").read_text().startswith((tmp_path / "few/held.jsonl").read_text())


def test_cost_and_tokens_are_counted(go: Callable[..., Figures]) -> None:
    teacher = Scripted(lambda ask: f"{ask.messages[1]['content']} it is")
    figures = go(teacher, Settings(grid=GRID, price_in=2.0, price_out=100.0))
    assert (figures["asked"], figures["tokens_in"], figures["tokens_out"]) == (40, 400, 200)
    assert figures["cost"] == pytest.approx((400 * 2 + 200 * 100) / 1e6) and figures["yield"] == 1.0


# --- filters and choice ----------------------------------------------------------------------------------


def test_each_reason_is_written_beside_its_answer(go: Callable[..., Figures], tmp_path: Path) -> None:
    said = {
        0: "Хорошо сказано, коротко и ясно", 1: "", 2: "да", 3: "ш" * 99, 4: "In English, sorry",
        5: "Хорошо сказано: коротко и ясно!", 6: Reply("обрезанный ответ", cut=True),
        7: Reply("", fault="context: too long"), 8: "Совсем другое дело",
    }  # fmt: skip
    grid = {"n": tuple(said), "of": ("x",)}
    teacher = Scripted(lambda ask: said[int(ask.messages[1]["content"].split()[1])])
    settings = Settings(grid=grid, min_characters=4, max_characters=50, script="russian", batch_prompts=3)
    figures = go(teacher, settings)
    rejected = {
        r["question"].split()[1]: r["reason"].split(":")[0] for r in lines(tmp_path / "out/rejected.jsonl")
    }
    twin = "0" if "0" in rejected else "5"  # which of the two came second is the grid's order
    expected = {
        "1": "empty",
        "2": "short",
        "3": "long",
        "4": "script",
        "6": "cut",
        "7": "context",
        twin: "duplicate",
    }
    assert rejected == expected
    assert figures["rejected"] == 7 and figures["kept"] == 2 and figures["rejected_script"] == 1


def test_first_asks_again_only_where_it_must(go: Callable[..., Figures], tmp_path: Path) -> None:
    tries: dict[str, int] = {}

    def say(ask: Ask) -> str:
        number = int(ask.messages[1]["content"].split()[1])
        tries[str(number)] = tries.get(str(number), 0) + 1
        return f"good {number} answer" if tries[str(number)] > number else ""

    figures = go(Scripted(say), Settings(grid={"n": (0, 1, 2, 3), "of": ("x",)}, candidates=3))
    assert tries == {"0": 1, "1": 2, "2": 3, "3": 3}
    assert figures["kept"] == 3 and figures["asked"] == 9 and figures["rejected_empty"] == 6
    assert {p["candidate"] for p in lines(tmp_path / "out/provenance.jsonl")} == {0, 1, 2}


def test_the_shortest_valid_one_in_the_script(go: Callable[..., Figures], tmp_path: Path) -> None:
    """RuAdapt's rule: three candidates, the shortest valid one in the target script."""

    def say(ask: Ask) -> str:
        number = ask.messages[1]["content"].split()[1]
        drawn = sorted({a.seed for a in teacher.asked if a.messages == ask.messages})
        return ["короткий", "очень длинный ответ", "short"][len(drawn) % 3] + f" {number}"

    teacher = Scripted(say)
    settings = Settings(grid={"n": (1, 2), "of": ("x",)}, candidates=3, choose="shortest", script="cyrillic")
    figures = go(teacher, settings)
    assert {r["messages"][-1]["content"][:-2] for r in lines(tmp_path / "out/data.jsonl")} == {"короткий"}
    assert figures["spare"] == 2 and figures["rejected_script"] == 2 and figures["asked"] == 6


def test_the_judge_chooses_and_is_read_strictly(go: Callable[..., Figures], tmp_path: Path) -> None:
    def say(ask: Ask) -> str:
        text = ask.messages[1]["content"]
        if "<answer>" not in text:
            return f"answer {ask.seed % 1000} of {text}"
        score = int(text.split("answer ")[1].split()[0]) % 7
        return f'{{"score": {score}, "reason": "so"}}'  # 0 and 6 are no scores

    settings = Settings(
        grid=GRID,
        candidates=3,
        choose="judge",
        judge_template="judge-answer-en",
        judge_least=3,
        duplicate_jaccard=0,
    )
    figures = go(Scripted(say), settings)
    kept = {p["prompt"]: p["score"] for p in lines(tmp_path / "out/provenance.jsonl")}
    rejected = lines(tmp_path / "out/rejected.jsonl")
    scores: dict[int, list[int]] = {}
    for row in rejected:
        scores.setdefault(row["prompt"], []).append(int(row["answer"].split()[1]) % 7)
    for prompt, score in kept.items():
        assert 3 <= score <= 5 and score >= max((s for s in scores[prompt] if s < 6), default=0)
    missed = set(scores) - set(kept)
    assert all(not 3 <= s <= 5 for prompt in missed for s in scores[prompt])
    assert figures["judged"] == 120 and figures["asked"] == 240
    reasons = {row["reason"] for row in rejected}
    assert "judge: score: not an integer of 1..5" in reasons and "judge: a score of 2" in reasons


SEEDS = [
    {"instruction": f"Name {n} {word}s", "instances": [{"input": "", "output": f"Here are {n} of {word}"}]}
    for n, word in enumerate(WORDS)
]
SEED_FIELDS = {"input": "instances.0.input", "output": "instances.0.output"}


def test_self_instruct(go: Callable[..., Figures], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    count = iter(range(1000))

    def say(ask: Ask) -> str:
        n = next(count)
        if n % 4 == 3:  # a seed, said again
            return json.dumps({"instruction": "Name 3 deltas", "input": "", "output": "Here are 3 of delta"})
        return json.dumps(
            {"instruction": f"Invent game {n} {WORDS[n % 16]}", "input": "", "output": f"Play {n} well"}
        )

    settings = Settings(
        template="self-instruct-en",
        prompts=12,
        few_shot=8,
        fields=SEED_FIELDS,
        batch_prompts=4,
        duplicate_of="user",
    )
    teacher = Scripted(say)
    figures = go(teacher, settings, template=None, seeds=(tmp_path / "seeds.jsonl",))
    assert figures["kept"] == 9 and figures["rejected_duplicate"] == 3
    reason = next(r["reason"] for r in lines(tmp_path / "out/rejected.jsonl"))
    assert reason == "duplicate: 1.00 of seed 4"
    prompts = [ask.messages[1]["content"] for ask in teacher.asked]
    assert all(prompt.count("Instruction: ") == 8 for prompt in prompts)
    assert not any("Invent" in prompt for prompt in prompts[:4])
    assert all(prompt.count("Invent") == 2 for prompt in prompts[4:]), "two of eight come from kept answers"
    first = lines(tmp_path / "out/data.jsonl")[0]["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"] and first[0]["content"].startswith("Invent game")
    assert not first[0]["content"].endswith("\n"), "an empty input leaves no trace"


def test_the_world_judges_its_profiles(go: Callable[..., Figures], tmp_path: Path) -> None:
    world(WorldSettings(documents=5, held_documents=0, held_profiles=12), {}, tmp_path, Silent())
    known = {r["messages"][0]["content"]: r for r in lines(tmp_path / "profiles.jsonl")}

    def say(ask: Ask) -> str:
        record = known[ask.messages[0]["content"]]
        answer = answer_of(Profile.from_dict(record["profile"]), record["language"], Random(ask.seed))
        return answer if ask.seed % 2 else answer.replace(".", "", 1)

    settings = Settings(
        template="as-is",
        fields={"prompt": "messages.0.content"},
        validator="world",
        duplicate_jaccard=0,
        candidates=2,
    )
    figures = go(Scripted(say), settings, template=None, items=(tmp_path / "profiles.jsonl",))
    assert figures["rejected_validator"] == figures["asked"] - figures["kept"] and 12 < figures["kept"] < 24
    for record in lines(tmp_path / "out/data.jsonl"):
        assert record["messages"][1]["content"].count(".") == record["messages"][1]["content"].count("\n") + 1


def test_the_real_form_of_a_catalogue(go: Callable[..., Figures], tmp_path: Path) -> None:
    """The grid's profiles get their excerpt, and `held` gives the same prompts as items of a second stage."""
    (tmp_path / "c.json").write_text(json.dumps(ENTRIES))
    grid = {
        "level": ("beginner", "expert"), "frequency": (2, 3), "goal": ("strength", "power"),
        "avoid": ("none", "lower back"), "equipment": ("body only", "barbell"),
    }  # fmt: skip

    def say(ask: Ask) -> str:
        listed = [
            line[2:].split(" (")[0] for line in ask.messages[1]["content"].splitlines() if line.startswith("- ")
        ]
        names = [name for name in listed if name.startswith("Push")]
        workout = "\n".join(f"- {name}: 3 x 10" for name in Random(ask.seed).sample(names, 4))
        return "\n".join(f"Workout {n}\n{workout}" for n in (1, 2, 3))

    settings = Settings(
        template="exercises-en", grid=grid, validator="exercises", held_share=0.3, catalogue_entries=12,
        duplicate_jaccard=0,
    )  # fmt: skip
    figures = go(Scripted(say), settings, template=None, catalogue=tmp_path / "c.json")
    assert figures["unfit_cells"] == 16, "the little catalogue can not serve power"
    assert figures["kept"] + figures["held"] == 16 and figures["held"] > 1
    teacher = Scripted(say)
    again = Settings(template="exercises-en", validator="exercises", duplicate_jaccard=0)
    held = tmp_path / "out" / "held.jsonl"
    figures = go(teacher, again, "second", template=None, catalogue=tmp_path / "c.json", items=(held,))
    assert figures["yield"] == 1.0
    assert sorted(str(list(ask.messages)) for ask in teacher.asked) == sorted(
        str(r["messages"]) for r in lines(held)
    )


# --- kills, stops, and answers that were paid for --------------------------------------------------------

RESUMED = Settings(grid=GRID, prompts=10, candidates=3, choose="shortest", min_characters=55, batch_prompts=4)


@pytest.mark.parametrize("independent", [True, False])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    go: Callable[..., Figures], tmp_path: Path, independent: bool
) -> None:
    whole = Scripted(chatter, independent=independent)
    figures = go(whole, RESUMED, "whole")
    assert 0 < figures["kept"] < 10 and len(whole.asked) == 30
    for dies_at in range(0, 30, 3):
        teacher = Scripted(chatter, independent=independent)
        for life in (dies_at, dies_at + 7, -1):  # a second kill after the resume
            teacher.dies_at = life
            if life >= 0 and life < 30:
                with pytest.raises(Killed):
                    go(teacher, RESUMED, f"at{dies_at}")
                with (tmp_path / f"at{dies_at}/.work/answers.jsonl").open("ab") as ledger:
                    ledger.write(b'{"key": "torn')
        assert go(teacher, RESUMED, f"at{dies_at}") == figures
        assert outputs(tmp_path / f"at{dies_at}") == outputs(tmp_path / "whole")
        if independent:
            assert len(teacher.asked) == len(set(teacher.asked and map(repr, teacher.asked))) == 30, (
                "none twice"
            )


def test_a_stop_keeps_what_came(go: Callable[..., Figures], tmp_path: Path) -> None:
    class Stops(Silent):
        def stop_requested(self) -> bool:
            return len(teacher.asked) >= 14

    teacher = Scripted(chatter)
    with pytest.raises(StopRequested):
        go(teacher, RESUMED, report=Stops())
    assert len(lines(tmp_path / "out/.work/answers.jsonl")) == len(teacher.asked) == 14
    go(teacher, RESUMED)
    assert len(teacher.asked) == 30


def test_a_changed_filter_asks_nothing_again(go: Callable[..., Figures], tmp_path: Path) -> None:
    go(Scripted(chatter), RESUMED, "first")
    teacher = Scripted(chatter)
    looser = RESUMED.model_copy(update={"min_characters": 1})
    figures = go(teacher, looser, "second", answers=(tmp_path / "first/answers.jsonl",))
    assert not teacher.asked and figures["kept"] == 10 and figures["asked"] == 30
    assert (tmp_path / "second/answers.jsonl").read_bytes() == (tmp_path / "first/answers.jsonl").read_bytes()


def test_answers_of_earlier_settings_are_published_too(go: Callable[..., Figures], tmp_path: Path) -> None:
    """prompts lowered and raised again: every answer is paid for once."""
    go(Scripted(chatter), RESUMED, "many")
    paid = (tmp_path / "many/answers.jsonl").read_bytes()
    few = RESUMED.model_copy(update={"prompts": 3})
    go(Scripted(chatter), few, "alone")
    published = []
    for name, ledger in (("one", paid), ("other", b"".join(reversed(paid.splitlines(keepends=True))))):
        (tmp_path / name / ".work").mkdir(parents=True)
        (tmp_path / name / ".work/answers.jsonl").write_bytes(ledger)
        teacher = Scripted(chatter)
        go(teacher, few, name)
        assert not teacher.asked
        published.append((tmp_path / name / "answers.jsonl").read_bytes())
    used = (tmp_path / "alone/answers.jsonl").read_bytes()
    assert published[0] == published[1] and published[0].startswith(used)
    assert sorted(published[0].splitlines()) == paid.splitlines()
    rest = published[0][len(used) :].splitlines()
    assert rest == sorted(rest) and len(rest) == 21


def test_half_a_character_is_an_answer_rejected(go: Callable[..., Figures], tmp_path: Path) -> None:
    """As an escape inside the JSON, as a character, and in a ledger that holds one."""
    said = {
        "1": r'{"word": "a\ud800"}',
        "2": '{"word": "b\ud800"}',
        "3": r'{"\udfff": 1}',
        "4": '{"word": "fine"}',
    }
    template(tmp_path, 'about = "x"\n[prompt]\nuser = "Plan {n}"\n[json.word]\nkind = "text"')
    settings = Settings(grid={"n": tuple(map(int, said))})
    teacher = Scripted(lambda ask: said[ask.messages[0]["content"][-1]])
    figures = go(teacher, settings)
    assert figures["kept"] == 2 and figures["rejected_json"] == 2
    reasons = {r["reason"] for r in lines(tmp_path / "out/rejected.jsonl")}
    assert reasons == {"json: word: half of a surrogate pair", "json: no key word"}
    ledger = tmp_path / "out/.work/answers.jsonl"
    ledger.write_bytes(
        ledger.read_bytes().replace(b"b?", b"b\\ud800") + ledger.read_bytes().splitlines()[0] + b"\n"
    )
    again = outputs(tmp_path / "out")
    assert go(teacher, settings) == figures and len(teacher.asked) == 4
    assert outputs(tmp_path / "out") == again


def test_half_a_character_in_an_array_of_items(go: Callable[..., Figures], tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(r'[{"n": 1, "of": "x"}, {"n": 2, "of": "\ud800"}]')
    with pytest.raises(InputError, match=r"i\.json, entry 2: half of a surrogate pair"):
        go(Scripted(chatter), Settings(), items=(tmp_path / "i.json",))


def test_answers_that_are_none_are_refused_by_line(go: Callable[..., Figures], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"key": "k", "text": "t", "tokens_in": 1, "tokens_out": 1, "cut": false}\n{}\n'
    )
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: not a teacher's answer"):
        go(Scripted(chatter), RESUMED, answers=(tmp_path / "a.jsonl",))


def test_a_fault_is_not_remembered(go: Callable[..., Figures], tmp_path: Path) -> None:
    teacher = Scripted(lambda ask: Reply("", fault="refused: HTTP 400"))
    with pytest.raises(ModelError, match="refused 10"):
        go(teacher, Settings(grid=GRID, prompts=10))
    teacher.say = chatter
    assert go(teacher, Settings(grid=GRID, prompts=10))["kept"] == 10


# --- errors ----------------------------------------------------------------------------------------------


def test_a_teacher_that_answers_nothing_valid_is_not_asked_for_ever(
    go: Callable[..., Figures], tmp_path: Path
) -> None:
    teacher = Scripted(lambda ask: "no idea")
    settings = Settings(
        grid={"n": tuple(range(1000)), "of": ("x",)}, candidates=2, min_characters=30, give_up_prompts=20
    )
    with pytest.raises(ModelError) as caught:
        go(teacher, settings)
    assert len(teacher.asked) == 64  # two rounds of 16 prompts, two candidates each
    assert "32 prompts in a row" in str(caught.value) and "short 64" in str(caught.value)
    assert "'no idea'" in str(caught.value) and len(lines(tmp_path / "out/rejected.jsonl")) == 64


def test_all_faults_of_the_inputs_at_once(go: Callable[..., Figures], tmp_path: Path) -> None:
    rows = [{"n": 1, "of": "x"}, {"n": {}, "of": "x"}, {"of": ""}, {"n": 2, "of": True}]
    write_jsonl(tmp_path / "items.jsonl", rows)
    with pytest.raises(InputError) as caught:
        go(Scripted(chatter), Settings(), items=(tmp_path / "items.jsonl",))
    said = str(caught.value)
    assert all(
        part in said
        for part in ("line 2: n is not", "line 3: no key 'n'", "line 3: of is empty", "line 4: of is not text")
    )
    assert "line 1" not in said and "`fields` maps" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "roles", "said"),
    [
        ({"grid": {"n": (1,)}}, {}, ["no axis 'of'"]),
        ({"grid": {**GRID, "more": (1,)}}, {}, ["does not use the axis 'more'"]),
        ({}, {}, ["nothing to ask about"]),
        ({"grid": GRID, "validator": "exercises"}, {}, ["needs the role 'catalogue'"]),
        ({"grid": GRID, "validator": "world"}, {}, ["no axis 'profile'", "no axis 'language'"]),
        ({"grid": GRID, "template": "as-is"}, {}, ["give `template`"]),
        ({"grid": GRID, "base_url": "http://h", "endpoint_model": "m"}, {}, ["one teacher"]),
        ({"grid": GRID, "held_share": 0.999999}, {}, ["everything is held out"]),
        ({"grid": GRID}, {"seeds": True}, ["role 'seeds' and a template with [example]"]),
    ],
)
def test_what_does_not_go_together(
    go: Callable[..., Figures], tmp_path: Path, settings: Any, roles: Any, said: list[str]
) -> None:
    write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    with pytest.raises(InputError) as caught:
        go(Scripted(chatter), Settings(**settings), **{role: (tmp_path / f"{role}.jsonl",) for role in roles})
    assert all(part in str(caught.value) for part in said) and not caught.value.hint


def test_a_broken_template_and_catalogue_each_have_their_own_hint(
    go: Callable[..., Figures], tmp_path: Path
) -> None:
    template(tmp_path, 'about = "x"\n[prompt]\nuser = "{"')
    (tmp_path / "c.json").write_text('[{"name": "x"}]')
    with pytest.raises(InputError) as caught:
        go(Scripted(chatter), Settings(grid=GRID), catalogue=tmp_path / "c.json")
    assert [part[:18] for part in caught.value.hint.split("; ")] == ["a placeholder is {", "each entry has nam"]
    assert "->" not in caught.value.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": 3, "temperature": 0.0}, "all the same answer"),
        ({"choose": "judge"}, "judge_template go together"),
        ({"base_url": "http://h"}, "endpoint_model go together"),
        ({"template": "self-instruct"}, "no such template; shipped are as-is"),
        ({"validator": "wordl"}, "no such validator; known are none, world"),
        (
            {"grid": {"N": (1,), "b": (), "c": (1, "1")}},
            "'N' is no name.*b: no values.*c: a value stands twice",
        ),
        ({"grid": {a: tuple(range(99)) for a in "abcd"}}, "96059601 cells"),
        ({"key_variable": "sk-123"}, "pattern"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**settings)


# --- real teachers ---------------------------------------------------------------------------------------

REAL = Settings(
    template="as-is", fields={"prompt": "messages.0.content"}, prompts=6, candidates=2, choose="shortest",
    max_new_tokens=8, batch_prompts=3, slots=4, give_up_prompts=100, duplicate_jaccard=0, context_tokens=128,
)  # fmt: skip


def real(tmp_path: Path, teacher: Path, out: str, settings: Settings) -> dict[str, bytes]:
    """The outputs of a run whose random teacher may well keep nothing."""
    write_jsonl(tmp_path / "items.jsonl", chats(6))
    (tmp_path / out).mkdir(exist_ok=True)
    try:
        stage.run(
            settings, {"teacher": teacher, "items": (tmp_path / "items.jsonl",)}, tmp_path / out, Silent()
        )
    except ModelError as error:
        assert "cut" in str(error)
    return {
        name: (tmp_path / out / name).read_bytes()
        for name in ("data.jsonl", "rejected.jsonl", ".work/answers.jsonl")
    }


@pytest.mark.slow
def test_a_transformers_teacher_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    whole = real(tmp_path, model, "whole", REAL)
    answers = [json.loads(line)["text"] for line in whole[".work/answers.jsonl"].splitlines()]
    assert len(answers) == 12 and len(set(answers)) > 6, "sampled"
    real(tmp_path, model, "killed", REAL)
    ledger = tmp_path / "killed/.work/answers.jsonl"
    ledger.write_bytes(whole[".work/answers.jsonl"][:-60])  # one answer lost: its round is asked again
    again = real(tmp_path, model, "killed", REAL)
    assert again["rejected.jsonl"] == whole["rejected.jsonl"] and again["data.jsonl"] == whole["data.jsonl"]


def test_the_draws_of_a_transformers_teacher_are_the_asks_own(tmp_path: Path) -> None:
    """Greedy equals transformers' own greedy search; a sampled answer does not change with its neighbours."""
    import torch

    from distill.synthesize.local import TransformersTeacher
    from foundation.chat import Chat
    from foundation.model import load
    from foundation.tokenizer import Tokenizer

    folder = tiny_model(tmp_path / "model")
    teacher = TransformersTeacher(folder, 4)
    asks = [
        Ask(tuple(chat["messages"][:1]), 12, temperature, 0.8, seed)  # type: ignore[index]
        for seed, chat in enumerate(chats(4))
        for temperature in (0.0, 1.5)
    ]
    together = dict(teacher.answers(asks, lambda: False))
    alone = {i: next(teacher.answers([ask], lambda: False))[1] for i, ask in enumerate(asks)}
    assert together == alone
    model, tokenizer = load(folder), Tokenizer(folder)
    for index, ask in enumerate(asks):
        if ask.temperature == 0:
            ids = torch.tensor([Chat(tokenizer).prompt_ids(list(ask.messages))])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            assert tokenizer.decode(out[0, ids.shape[1] :].tolist()) == together[index].text
    long = Ask(({"role": "user", "content": "squat " * 200},), 8)
    assert next(teacher.answers([long], lambda: False))[1].fault.startswith("context: ")


def test_sampling_follows_the_distribution() -> None:
    """top_p keeps the fewest tokens that reach it; frequencies are the renormalised probabilities."""
    import torch

    from distill.synthesize.local import _drawn

    logits = torch.tensor([0.2, 0.5, 0.05, 0.25]).log()
    draws = torch.Generator().manual_seed(1)
    counts = torch.bincount(torch.cat([_drawn(logits, 0.7, draws) for _ in range(4000)]), minlength=4) / 4000
    assert counts.tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)


def test_a_gguf_teacher(tmp_path: Path) -> None:
    from distill.synthesize.local import GgufTeacher
    from export import gguf

    gguf.run(gguf.Settings(), {"model": tiny_model(tmp_path / "model")}, tmp_path, Silent())
    teacher = GgufTeacher(tmp_path / "gguf", slots=3, context_tokens=4096, gpu_layers=0)
    asks = [
        Ask(tuple(chat["messages"][:1]), 12, temperature, 1.0, seed)  # type: ignore[index]
        for seed, chat in enumerate(chats(5))
        for temperature in (0.0, 1.5)
    ]
    together = dict(teacher.answers(asks, lambda: False))
    alone = {i: next(teacher.answers([ask], lambda: False))[1] for i, ask in enumerate(asks)}
    assert together == alone and len({reply.text for reply in together.values()}) > 4
    long = Ask(({"role": "user", "content": "squat " * 200},), 8)
    assert next(teacher.answers([long], lambda: False))[1].fault.startswith("context: ")
    teacher.close()

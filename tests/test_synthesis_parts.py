"""The parts of synthesis, each against something simpler: brute force, hand-written cases, or a law."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distill.synthesize import catalogue, duplicates, grid, programme, shape, template
from distill.synthesize.template import Key
from foundation import filters
from foundation.errors import InputError, RecipeError

# --- grid ------------------------------------------------------------------------------------------------

AXES = {"level": ("low", "high"), "days": (2, 3, 4), "gear": ("none", "bands")}


def test_every_cell_is_walked_once() -> None:
    walked = list(grid.walk(AXES, 5))
    assert len(walked) == grid.size(AXES) == 12
    assert {tuple(cell.values()) for cell in walked} == {
        (level, days, gear) for level in ("low", "high") for days in (2, 3, 4) for gear in ("none", "bands")
    }
    assert all(list(cell) == list(AXES) for cell in walked)
    assert walked != list(grid.walk(AXES, 6)) and walked == list(grid.walk(AXES, 5))


def test_the_last_axis_turns_fastest() -> None:
    assert [grid.cell(AXES, n)["gear"] for n in range(3)] == ["none", "bands", "none"]
    assert grid.cell(AXES, 11) == {"level": "high", "days": 4, "gear": "bands"}


def test_held_out_is_about_the_share_and_grows_with_it() -> None:
    cells = [{"a": a, "b": b} for a in range(40) for b in range(50)]
    few, more = ({n for n, c in enumerate(cells) if grid.is_held(c, share, 3)} for share in (0.1, 0.3))
    assert few < more and 150 < len(few) < 250 and 520 < len(more) < 680


# --- templates -------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    (folder / "t.toml").write_text(text, encoding="utf-8")
    return folder / "t.toml"


@pytest.mark.parametrize("name", template.shipped())
def test_what_ships_is_fine(name: str) -> None:
    made = template.parse(template.SHIPPED / f"{name}.toml")
    fields = {n: next(iter(made.words.get(n, {"x{y}": ""}))) for n in made.needs()} | {"examples": "{z}"}
    told = made.ask(made.spelt(fields))
    assert told[-1]["role"] == "user" and "{{" not in told[-1]["content"]
    assert "x{y}" in str(told) or made.example


def test_a_value_is_put_in_once_and_never_read_again() -> None:
    assert template.fill("{a} {{b}} {b}", {"a": "{b} {{", "b": "2"}) == "{b} {{ {b} 2"


@given(st.dictionaries(st.sampled_from("abc"), st.text(max_size=20), min_size=3))
def test_values_come_out_as_they_went_in(fields: dict[str, str]) -> None:
    assert template.fill("<{a}|{b}|{c}>", fields) == f"<{fields['a']}|{fields['b']}|{fields['c']}>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('about = "x"\n[prompt]\nuser = "{a"', "line 1 of the text: a lone '{'"),
        ('about = "x"\n[prompt]\nuser = "{a.b}"', "a lone '{'"),
        ('about = "x"\n[prompt]\nuser = "{A}"', "a lone '{'"),
        ('about = "x"\n[prompt]\nuser = "a"\nsytem = "b"', "prompt.sytem"),
        ('about = "x"\n[prompt]\nuser = "{examples}"', "go together"),
        ('about = "x"\n[prompt]\nuser = "{score}"\n[json.score]\nkind = "integer"', "both a field"),
        ('about = "x"\n[prompt]\nuser = "a"\n[json.s]\nkind = "integer"\nleast = 3\nmost = 1', "least > most"),
        ('about = "x"\n[prompt]\nuser = "a"\n[json.s]\nkind = "number"', "json.s.kind"),
        ("about = ", "not a template"),
    ],
)
def test_faults_of_a_template_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        template.parse(written(tmp_path, text))
    assert said in str(caught.value) and "t.toml" in str(caught.value)


def test_all_faults_of_a_template_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        'about = "x"\n[prompt]\nuser = "{a} }"\n[example]\ntext = "{"\n[json.s]\nkind = "integer"\nleast = 9',
    )
    with pytest.raises(RecipeError) as caught:
        template.parse(path)
    assert len(caught.value.problems) == 4


def test_words_of_the_language_stand_for_each_part_of_a_value(tmp_path: Path) -> None:
    made = template.parse(
        written(tmp_path, 'about="x"\n[prompt]\nuser="{gear}"\n[words.gear]\nbands="ленты"\nbar="гриф"')
    )
    assert made.spelt({"gear": "bands, bar", "level": "low"}) == {"gear": "ленты, гриф", "level": "low"}
    with pytest.raises(RecipeError, match="gear = 'sled': the template knows bands, bar"):
        made.spelt({"gear": "bar, sled"})


# --- the shape of a JSON answer --------------------------------------------------------------------------

SHAPE = {"score": Key(kind="integer"), "why": Key(kind="text")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"score": 4, "why": "x"}', ""),
        ('```json\n{"score": 4, "why": "x"}\n```', ""),
        ('Sure! {"score": 4, "why": "x"}', "not JSON"),
        ('{"score": 4}', "no key why"),
        ('{"score": 4, "why": "x", "more": 1}', "unknown key 'more'"),
        ('{"score": 6, "why": "x"}', "score: not an integer of 1..5"),
        ('{"score": true, "why": "x"}', "score: not an integer of 1..5"),
        ('{"score": "4", "why": "x"}', "score: not an integer of 1..5"),
        ('{"score": NaN, "why": "x"}', "not JSON"),
        ('{"score": 1, "score": 5, "why": "x"}', "not JSON"),
        ('{"score": 4, "why": " "}', "why: empty"),
        ("[" * 100_000, "not JSON"),
        ('{"score": ' + "9" * 5000 + ', "why": "x"}', "not JSON"),
        ("[1]", "a JSON list, not an object"),
    ],
)
def test_the_shape_of_an_answer(text: str, said: str) -> None:
    found, problem = shape.read(text, SHAPE)
    assert problem == said
    assert found == ({} if said else {"score": "4", "why": "x"})


@given(st.text())
def test_no_answer_makes_the_shape_raise(text: str) -> None:
    assert shape.read(text, SHAPE)[1]


# --- the text filter -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("Привет, world", "cyrillic", 6 / 11),
        ("Привет, world", "latin", 5 / 11),
        ("Їжак", "cyrillic", 1.0),
        ("Їжак", "russian", 3 / 4),
        ("и\u0306", "russian", 1.0),
        ("12, 34!", "cyrillic", 0.0),
        ("12, 34!", "any", 1.0),
        ("日本", "latin", 0.0),
        ("5 × ÷ é", "latin", 1.0),
    ],
)
def test_the_share_of_a_script(text: str, script: filters.Script, share: float) -> None:
    assert filters.script_share(text, script) == pytest.approx(share)


def test_the_text_filter_names_the_first_reason() -> None:
    reason = filters.text_filter(3, 8, "cyrillic", 0.5)
    assert [reason(t).partition(":")[0] for t in ("  ", "да", "очень длинно", "English", "ладно")] == [
        "empty", "short", "long", "script", "",
    ]  # fmt: skip


# --- near-duplicates -------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.sampled_from(list("abcdef")), max_size=9).map(" ".join), max_size=90),
    st.sampled_from([0.2, 0.5, 0.7, 1.0]),
)
@example([" ".join("abcdef"[: n % 6 + 1]) for n in range(200)], 0.5)  # past two recounts
def test_the_index_finds_what_comparing_with_all_finds(texts: list[str], threshold: float) -> None:
    index, kept = duplicates.NearDuplicates(threshold), list[frozenset[tuple[str, ...]]]()
    for number, text in enumerate(texts):
        words = text.split()
        own = (
            frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))) if words else frozenset()
        )
        shares = [len(own & other) / len(own | other) if own | other else 0.0 for other in kept]
        best = max(shares, default=0.0)
        expected = (str(shares.index(best)), best) if best >= threshold else None
        assert index.find(text) == expected
        index.add(str(number), text)
        kept.append(own)


def test_case_and_punctuation_do_not_make_a_text_new() -> None:
    index = duplicates.NearDuplicates(1.0)
    index.add("one", "Жим лёжа: 3 x 10.")
    assert index.find("жим лёжа 3 X 10") == ("one", 1.0)
    assert index.find("жим стоя 3 X 10") is None and index.find("!!") is None


# --- a real catalogue's form, and the programme ----------------------------------------------------------


def entry(name: str, **changes: object) -> dict[str, object]:
    usual = {"level": "beginner", "equipment": "body only", "category": "strength"}
    return {"name": name, **usual, "primaryMuscles": ["chest"], "secondaryMuscles": ["triceps"], **changes}


ENTRIES = [
    *(entry(f"Push {n}") for n in range(12)),
    entry("Snatch", level="expert", equipment="barbell", category="olympic weightlifting"),
    entry("Good Morning", equipment="barbell", primaryMuscles=["lower back"], secondaryMuscles=[]),
    entry("Sled", equipment=None),
]
PROFILE = {"level": "beginner", "equipment": "barbell", "goal": "strength", "avoid": "none"}


@pytest.fixture
def small(tmp_path: Path) -> catalogue.Catalogue:
    (tmp_path / "c.json").write_text(json.dumps(ENTRIES))
    return catalogue.load(tmp_path / "c.json")


def test_what_a_profile_may_do(small: catalogue.Catalogue) -> None:
    def names(**changes: str) -> set[str]:
        p = {**PROFILE, **changes}
        return {e.name for e in small.allowed(p["level"], p["equipment"], p["avoid"])}

    pushes = {f"Push {n}" for n in range(12)}
    assert names() == pushes | {"Good Morning"}
    assert names(avoid="lower back") == names(equipment="body only") == pushes
    assert names(level="expert") == pushes | {"Good Morning", "Snatch"}
    assert names(avoid="triceps") == {"Good Morning"}
    assert small.fits(PROFILE) and not small.fits({**PROFILE, "goal": "power"})


def test_the_excerpt_is_drawn_by_its_generator(small: catalogue.Catalogue) -> None:
    one, same, other = (small.fields(PROFILE, 12, 5, Random(seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one["listed"]) == 12 and one["history"].count("\n") == 4
    assert all(f"- {name} (" in one["catalogue"] for name in one["listed"])


def test_faults_of_a_catalogue_are_named_all_at_once(tmp_path: Path) -> None:
    bad = [
        entry("A", level="hard"),
        entry("B"),
        entry("b"),
        entry("", equipment=5),
        entry("C", primaryMuscles=1),
    ]
    (tmp_path / "c.json").write_text(json.dumps(bad))
    with pytest.raises(InputError) as caught:
        catalogue.load(tmp_path / "c.json")
    assert [f"entry {n}" in str(caught.value) for n in (1, 2, 3, 4, 5)] == [True, False, True, True, True]
    (tmp_path / "l.jsonl").write_text(json.dumps(entry("A")) + "\n" + json.dumps(entry("B", level=1)) + "\n")
    with pytest.raises(InputError, match=r"l\.jsonl, line 2: level = '1'"):
        catalogue.load(tmp_path / "l.jsonl")
    (tmp_path / "n.json").write_text("[" * 50_000)
    with pytest.raises(InputError, match="can not be read"):
        catalogue.load(tmp_path / "n.json")


def programme_of(*workouts: str) -> str:
    return "\n".join(f"Workout {n}\n{lines}" for n, lines in enumerate(workouts, 1))


GOOD = "\n".join(f"- Push {n}: 3 x 10" for n in range(3))


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (programme_of(GOOD, GOOD, GOOD), ()),
        (programme_of(GOOD, GOOD, GOOD).replace("Workout", "Тренировка").replace("x 10", "х 30 с"), ()),
        (programme_of(GOOD, GOOD, GOOD).replace("Push 1", "push 1"), ()),
        (programme_of(GOOD, GOOD), ("count",)),
        (programme_of(GOOD, GOOD, "- Push 1: 3 x 10"), ("size",)),
        (programme_of(GOOD, GOOD, GOOD.replace("Push 1", "Moon Walk")), ("known",)),
        (programme_of(GOOD, GOOD, GOOD.replace("Push 1", "Push 2")), ("repeat",)),
        (programme_of(GOOD, GOOD, GOOD.replace("Push 1", "Push 11")), ("listed",)),
        (programme_of(GOOD, GOOD, GOOD.replace("Push 1", "Snatch")), ("listed", "level")),
        (programme_of(GOOD, GOOD, GOOD.replace("Push 1", "Sled")), ("listed", "equipment")),
        (programme_of(GOOD, GOOD, GOOD.replace("Push 1", "Good Morning")), ("avoid",)),
        (programme_of(GOOD, GOOD, GOOD.replace("3 x 10", "9 x 10")), ("volume",)),
        (programme_of(GOOD, GOOD, GOOD.replace("3 x 10", "3 x 31")), ("volume",)),
        (programme_of(GOOD, GOOD, GOOD) + "\nStay healthy!", ("structure",)),
        (programme_of(GOOD, GOOD, GOOD).replace("Workout 2", "Workout 5"), ("structure",)),
        ("", ("structure",)),
        ("Workout 1\n" * 2000, ("structure",)),
    ],
)
def test_the_rules_of_a_programme(small: catalogue.Catalogue, text: str, rules: tuple[str, ...]) -> None:
    profile = {**PROFILE, "avoid": "lower back", "listed": [f"Push {n}" for n in range(11)] + ["Good Morning"]}
    assert programme.broken(text, profile, small) == rules


def test_a_programme_must_serve_its_goal(small: catalogue.Catalogue) -> None:
    profile = {**PROFILE, "goal": "mobility", "listed": [f"Push {n}" for n in range(11)]}
    assert programme.broken(programme_of(GOOD, GOOD, GOOD), profile, small) == ("goal",)


@given(
    st.text() | st.lists(st.sampled_from(["Workout 1", "- Push 1: 3 x 9", "- : 1 x 1", "\r"])).map("\n".join)
)
def test_no_text_makes_the_rules_raise(text: str) -> None:
    exercises = catalogue.Catalogue([catalogue.Exercise("Push 1", "beginner", None, "cardio", ())])
    assert programme.broken(text, {**PROFILE, "listed": []}, exercises)


@pytest.mark.realdata
def test_the_real_catalogue_is_read_whole(samovar_data: Path) -> None:
    real = catalogue.load(samovar_data / "instructions" / "exercises" / "exercises.json")
    assert len(real.by_name) == 873
    assert real.problems({"level": ["pro"], "equipment": ["body only, sled"], "goal": ["strength"]}) == [
        "grid: axis 'avoid' is missing; the catalogue needs it",
        "grid.level: 'pro' is not in the catalogue; it has beginner, expert, intermediate",
        "grid.equipment: 'sled' is not in the catalogue; it has bands, barbell, body only, cable, dumbbell, "
        "e-z curl bar, exercise ball, foam roll, kettlebells, machine, medicine ball, other",
    ]

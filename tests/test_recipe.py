"""samovar/recipe.py: every fault at once, each with file, stage, key and the nearest known name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stages_for_tests import KINDS

from foundation.errors import InputError, RecipeError, SamovarError
from samovar.recipe import MAX_BYTES, Recipe, Source, check_settings, load
from samovar.stages import KINDS as REAL_KINDS

GOOD = """
name = "tea"
seed = 5
jobs = 2
description = "two words joined"

[inputs]
leaf = "leaf.txt"

[[stage]]
name = "a"
kind = "test.write"
word = "чай"

[[stage]]
name = "b"
kind = "test.write"
reads = { before = "leaf" }
seed = 9

[[stage]]
name = "j"
kind = "test.join"
reads = { texts = ["a", "b.text", "leaf"] }

[short.a]
times = 1
"""


A = "tea.toml, stage 'a': "
LETTERS = "lower-case letters, digits, - and _ (64 at most), not "


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "tea.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(write(folder, text), kinds=KINDS)
    return caught.value.problems


def stage(text: str, name: str = "a", kind: str = "test.write") -> str:
    return f'name = "tea"\n[[stage]]\nname = "{name}"\nkind = "{kind}"\n{text}\n'


def test_a_good_recipe_is_read_whole(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD), kinds=KINDS)
    assert (recipe.name, recipe.jobs, recipe.description) == ("tea", 2, "two words joined")
    assert recipe.inputs == {"leaf": "leaf.txt"} and recipe.text == GOOD
    a, b, j = recipe.stages
    assert (a.settings.seed, b.settings.seed) == (5, 9), "the recipe's seed, unless the stage has its own"
    assert a.settings.model_dump()["word"] == "чай" and a.reads == {}
    assert b.reads == {"before": (Source("leaf"),)}
    assert j.reads == {"texts": (Source("a", "text"), Source("b", "text"), Source("leaf"))}
    assert j.stages_read() == {"a", "b"}


def test_short_changes_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    full, short = load(path, kinds=KINDS), load(path, short=True, kinds=KINDS)
    assert [r.stages[0].settings.model_dump()["times"] for r in (full, short)] == [3, 1]
    assert (full.run_name, short.run_name) == ("tea", "tea-short")
    assert full.stages[1:] == short.stages[1:]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (stage("wrod = 'x'"), A + "unknown key 'wrod'; did you mean 'word'?"),
        (stage("raeds = {}"), A + "unknown key 'raeds'; did you mean 'reads'?"),
        (stage("qqq = 1"),
         A + "unknown key 'qqq'; known: ends, fails_at, kind, name, reads, seed, step_seconds, times, word"),
        (stage("times = '3'"), A + "key 'times': should be a valid integer, not '3'"),
        (stage("times = 2.5"), A + "key 'times': should be a valid integer, not 2.5"),
        (stage("times = true"), A + "key 'times': should be a valid integer, not True"),
        (stage("times = -1"), A + "key 'times': should be greater than or equal to 0, not -1"),
        (stage("step_seconds = nan"), A + "key 'step_seconds': not a value a setting can have"),
        (stage("word = 2024-01-01"), A + "key 'word': not a value a setting can have"),
        (stage("seed = -1"), A + "key 'seed': should be greater than or equal to 0, not -1"),
        (stage("", kind="test.wrte"), A + "unknown kind 'test.wrte'; did you mean 'test.write'?"),
        (stage("", kind="os.system"),
         A + "unknown kind 'os.system'; known: test.join, test.pour, test.shout, test.write"),
        (stage("", name="../x"), "tea.toml, stage '../x': a stage's name is " + LETTERS + "'../x'"),
        (stage("", name="lock"), "tea.toml, stage 'lock': 'lock' is a name the run directory needs itself"),
        (stage("reads = { befor = 'x' }"), A + "it does not read 'befor'; did you mean 'before'?"),
        (stage("reads = { before = 'x' }"), A + "'before': no input or stage 'x'"),
        (stage("reads = { before = 'a' }"),
         A + "'before': stage 'a' does not stand above; what is read must come first"),
        (stage("reads = { before = ['x'] }"), A + "'before' takes one input or stage, not a list"),
        (stage("reads = { before = 3 }"), A + "'before' names an input or a stage, or a list of them, not 3"),
        (stage("reads = ['x']"), A + "'reads' must be a table: { role = \"input or stage\" }"),
        (stage("", kind="test.join"), A + "it must read 'texts': reads = { texts = \"...\" }"),
        (stage("reads = { texts = [] }", kind="test.join"),
         A + "'texts' names an input or a stage, or a list of them, not []"),
        (stage("") + "[[stage]]\nname = 'a'\nkind = 'test.write'", A + "this name was given to a stage above"),
        (stage("") + "[inputs]\na = 'x'", A + "this name is also an input's"),
        (stage("") + "[inputs]\n'b/c' = 'x'", "tea.toml, [inputs]: an input's name is " + LETTERS + "'b/c'"),
        (stage("") + "[short.aa]\ntimes = 1", "tea.toml, [short.aa]: no such stage; did you mean 'a'?"),
        (stage("") + "[short.a]\ntime = 1", "tea.toml, [short.a]: unknown key 'time'; did you mean 'times'?"),
        (stage("") + "[short.a]\ntimes = 'x'",
         "tea.toml, [short.a]: key 'times': should be a valid integer, not 'x'"),
        ("sed = 1\n" + stage(""), "tea.toml: unknown key 'sed'; did you mean 'seed'?"),
        ("jobs = 0\n" + stage(""), "tea.toml: key 'jobs': should be greater than or equal to 1, not 0"),
        ("name = '..'\n[[stage]]\nname = 'a'\nkind = 'test.write'",
         "tea.toml: a recipe's name is " + LETTERS + "'..'"),
        ("[[stage]]\nname = 'a'\nkind = 'test.write'", "tea.toml: key 'name' is missing"),
        ("name = 'tea'", "tea.toml: key 'stage' is missing"),
        ("name = 'tea'\n[[stage]]\nkind = 'test.write'",
         "tea.toml, stage 1: key 'name' must be a string, not None"),
        ("name = 'tea'\n[[stage]]\nname = 'a'", A + "key 'kind' is missing"),
    ],
)  # fmt: skip
def test_each_fault_in_words(tmp_path: Path, text: str, said: str) -> None:
    assert problems(tmp_path, text) == [said]


def test_roles_that_a_stage_does_not_write(tmp_path: Path) -> None:
    text = GOOD.replace('"b.text"', '"b.txt"').replace('"leaf"]', '"leaf.x"]')
    assert problems(tmp_path, text) == [
        "tea.toml, stage 'j': 'texts': stage 'b' writes no 'txt'; did you mean 'text'?",
        "tea.toml, stage 'j': 'texts': 'leaf' is an input and has no roles, so not 'leaf.x'",
    ]


def test_roles_that_the_settings_of_a_stage_leave_out(tmp_path: Path) -> None:
    """A stage named alone means the first role that it writes with its settings."""
    text = """
        name = "tea"
        [[stage]]
        name = "p"
        kind = "test.pour"
        [[stage]]
        name = "j"
        kind = "test.join"
        reads = { texts = ["p", "p.large", "p.small"] }
    """
    assert problems(tmp_path, text) == [
        "tea.toml, stage 'j': 'texts': stage 'p' writes no 'small'; known: large",
    ]
    path = tmp_path / "tea.toml"
    path.write_text(text.replace(', "p.small"', ""))
    sources = load(path, kinds=KINDS).stages[1].reads["texts"]
    assert [source.role for source in sources] == ["large", "large"]


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = """
nmae = "tea"
jobs = "two"
[[stage]]
name = "a"
kind = "test.write"
wrod = "x"
times = -1
[[stage]]
name = "a"
kind = "test.jion"
[[stage]]
name = "j"
kind = "test.join"
reads = { text = "b" }
separator = 3
[short.b]
times = 1
"""
    said = problems(tmp_path, text)
    parts = ["'nmae'", "'name' is missing", "'jobs'", "'wrod'", "'times'", "given to a stage above"]
    parts += ["'test.jion'", "does not read 'text'", "must read 'texts'", "'separator'", "[short.b]"]
    for part in parts:
        assert sum(part in problem for problem in said) == 1, part
    assert len(said) == 11


def test_a_fault_above_is_not_repeated_below(tmp_path: Path) -> None:
    text = GOOD.replace('name = "a"\nkind = "test.write"', 'name = "a"\nkind = "test.wrong"')
    assert len(problems(tmp_path, text)) == 1


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    assert problems(tmp_path, 'name = "tea"\nseed = \n') == [
        "tea.toml: not valid TOML: Invalid value (at line 2, column 8)"
    ]


def test_a_recipe_in_cp1251_is_told_so(tmp_path: Path) -> None:
    path = write(tmp_path, '# recipe\nname = "tea"\n# чай\n'.encode("cp1251"))
    with pytest.raises(InputError) as caught:
        load(path, kinds=KINDS)
    assert "line 3" in caught.value.message and "0xf7 is not UTF-8" in caught.value.message
    assert "iconv -f cp1251" in caught.value.hint


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert load(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()), kinds=KINDS).name == "tea"


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="can not be read"):
        load(tmp_path / name, kinds=KINDS)


def test_a_huge_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="larger than"):
        load(write(tmp_path, "#" * (MAX_BYTES + 1)), kinds=KINDS)


def test_lists_may_become_tuples_but_nothing_else_changes_its_type() -> None:
    kind = REAL_KINDS["distill.train"]
    assert check_settings(kind, {"adam_betas": [0.8, 0.9]}).model_dump()["adam_betas"] == (0.8, 0.9)
    for wrong in ({"steps": "10"}, {"steps": 1.5}, {"gradient_checkpointing": 1}, {"loss": "CE"}):
        with pytest.raises(RecipeError):
            check_settings(kind, wrong)


@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.text(max_size=12))
@settings(max_examples=300)
def test_any_damage_is_a_refusal_and_never_a_defect(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int, put: str
) -> None:
    text = GOOD[:at] + put + GOOD[at + cut :]
    path = write(tmp_path_factory.mktemp("fuzz"), text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load(path, kinds=KINDS), Recipe)
    except SamovarError as error:
        assert error.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["name", "seed", "jobs", "inputs", "stage", "short", "x"]), VALUES))
@settings(max_examples=300)
def test_any_document_is_a_refusal_and_never_a_defect(document: dict) -> None:
    """Whatever TOML could hold at the top, and some that it could not."""
    from samovar.recipe import _Checker

    checker = _Checker("fuzz.toml", KINDS)
    checker.check(document, Path("fuzz.toml"), "", False)
    assert checker.problems, "no such document is a recipe"


def test_every_real_kind_is_documented() -> None:
    """Each setting states its meaning; each kind writes something, and its roles are sound names."""
    for name, kind in REAL_KINDS.items():
        assert kind.about and kind.writes, name
        for path in kind.writes.values():
            assert not path.startswith(("/", ".")) and ".." not in path
        for key, field in kind.settings_class().model_fields.items():
            assert field.description, f"{name}: {key} has no description"


def test_a_flood_of_faults_is_cut_short(tmp_path: Path) -> None:
    """Looking for a near name costs time: 12,000 of them took a minute."""
    stage = '[[stage]]\nname = "s{0}"\nkind = "test.join"\nreads = {{ texts = "unknown{0}" }}\n'
    text = 'name = "tea"\n' + "".join(stage.format(number) for number in range(400))
    found = problems(tmp_path, text)
    assert len(found) == 101 and "perhaps more" in found[-1]
    text = 'name = "tea"\n' + "".join(stage.format(number) for number in range(12_000))
    start = time.process_time()
    assert "at most 500 items" in problems(tmp_path, text)[0]
    assert time.process_time() - start < 5


DISTIL = """
name = "tea"
[inputs]
large = "large"
small = "small"
chats = "chats.jsonl"
[[stage]]
name = "topk"
kind = "distill.capture"
reads = {{ teacher = "large", data = "chats" }}
{capture}
[[stage]]
name = "student"
kind = "distill.train"
reads = {{ model = "small", data = "chats"{teacher} }}
{train}
"""
TEACHER = ', teacher = "topk"'


@pytest.mark.parametrize(
    ("capture", "teacher", "train", "said"),
    [
        ("", TEACHER, 'loss = "forward_kl"', ""),
        ('support = "sampled"\ntemperature = 2', TEACHER, 'loss = "sampled_kl"\ntemperature = 2', ""),
        ("", TEACHER, "", "loss = 'ce' does not read a teacher's store"),
        ("", "", 'loss = "published"', "loss = 'published' needs a teacher's store"),
        ("", TEACHER, 'loss = "sampled_kl"', "reads a capture with support = 'sampled', not 'top_k'"),
        ("temperature = 2", TEACHER, 'loss = "reverse_kl"', "temperature = 1.0, but the teacher's is 2.0"),
    ],
)
def test_a_loss_and_its_capture_are_compared_before_hours_are_spent(
    tmp_path: Path, capture: str, teacher: str, train: str, said: str
) -> None:
    path = write(tmp_path, DISTIL.format(capture=capture, teacher=teacher, train=train))
    if not said:
        assert len(load(path).stages) == 2
        return
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert len(caught.value.problems) == 1 and said in caught.value.problems[0]
    assert caught.value.problems[0].startswith("tea.toml, stage 'student': ")

"""samovar/plan.py: what would run and why, known before anything does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stages_for_tests import KINDS

from foundation import artifact
from foundation.errors import ArtifactError, InputError, MissingError, RecipeError
from foundation.report import Silent
from samovar.inputs import find_input
from samovar.plan import Action, Step, refuse_altered
from samovar.recipe import load
from samovar.run import make_order, make_planner
from samovar.worker import execute

RECIPE = """
name = "tea"
[inputs]
leaf = "leaf.txt"
[[stage]]
name = "a"
kind = "test.write"
reads = { before = "leaf" }
[[stage]]
name = "b"
kind = "test.write"
[[stage]]
name = "j"
kind = "test.join"
reads = { texts = ["a", "b"] }
only_first_letter = true
[[stage]]
name = "s"
kind = "test.shout"
reads = { joined = "j" }
"""


class House:
    """A recipe and its run directory, with stages run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds = dict(KINDS)
        self.text = RECIPE
        (folder / "leaf.txt").write_text("leaf")

    def planner(self):
        path = self.folder / "tea.toml"
        path.write_text(self.text)
        recipe = load(path, kinds=self.kinds)
        return make_planner(recipe, self.folder / "run", download=False, kinds=self.kinds)

    def plan(self) -> dict[str, Step]:
        return {step.stage.name: step for step in self.planner().plan()}

    def actions(self) -> dict[str, str]:
        return {name: str(step.action) for name, step in self.plan().items()}

    def run(self, *names: str) -> None:
        """Run the stages named, each planned as a run would, after those above it."""
        planner = self.planner()
        steps: dict[str, Step] = {}
        for stage in planner.recipe.stages:
            step = planner.step(stage, steps)
            if stage.name in names and step.action != Action.REUSE:
                manifest = execute(make_order(step, planner, self.kinds[stage.kind]), Silent())
                step = replace(step, action=Action.REUSE, manifest=manifest)
            steps[stage.name] = step


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_at_first_everything_runs(house: House) -> None:
    plan = house.plan()
    assert [step.action for step in plan.values()] == [Action.RUN] * 4
    assert [step.why for step in plan.values()] == ["", "", "after a, b", "after j"]
    assert not (house.folder / "run").exists(), "planning touches nothing"


def test_what_is_done_is_reused(house: House) -> None:
    house.run("a", "b")
    assert house.actions() == {"a": "reuse", "b": "reuse", "j": "run", "s": "run"}
    house.run("a", "b", "j", "s")
    assert house.actions() == {"a": "reuse", "b": "reuse", "j": "reuse", "s": "reuse"}


def test_an_unfinished_one_is_resumed_with_the_same_settings_only(house: House) -> None:
    identity = house.plan()["a"].identity
    assert identity is not None
    artifact.begin(house.folder / "run" / "a", identity.fingerprint)
    assert house.plan()["a"].action == Action.RESUME
    house.text = house.text.replace('kind = "test.write"\nreads', 'kind = "test.write"\ntimes = 9\nreads')
    step = house.plan()["a"]
    assert (step.action, step.why) == (Action.RUN, "an unfinished one was made from something else")


def test_a_changed_setting_is_stale_and_said(house: House) -> None:
    house.run("a", "b", "j", "s")
    house.text = house.text.replace('"test.write"\nreads', '"test.write"\ntimes = 9\nword = "milk"\nreads')
    plan = house.plan()
    assert (plan["a"].action, plan["a"].why) == (Action.STALE, 'times 3 -> 9, word "tea" -> "milk"')
    assert (plan["j"].action, plan["j"].why) == (Action.WAIT, "known when a is done")
    assert (plan["s"].action, plan["s"].why) == (Action.WAIT, "known when j is done")
    assert plan["b"].action == Action.REUSE


def test_a_changed_input_is_stale_and_said(house: House) -> None:
    house.run("a", "b", "j", "s")
    (house.folder / "leaf.txt").write_text("another leaf")
    plan = house.plan()
    assert (plan["a"].action, plan["a"].why) == (Action.STALE, "input 'before' changed")


def test_a_changed_seed_version_or_kind_is_stale_and_said(house: House) -> None:
    house.run("a", "b", "j")
    house.kinds["test.join"] = replace(house.kinds["test.join"], version=2)
    assert house.plan()["j"].why == "code version 1 -> 2"
    house.text = house.text.replace('name = "tea"', 'name = "tea"\nseed = 3')
    assert house.plan()["a"].why == "seed 17 -> 3"
    house.text = house.text.replace(
        'kind = "test.join"\nreads = { texts = ["a", "b"] }\nonly_first_letter = true', 'kind = "test.write"'
    ).replace('reads = { joined = "j" }', 'reads = { joined = "a" }')
    assert house.plan()["j"].why == "it was made by test.join"


def test_content_decides_and_not_history(house: House) -> None:
    """`a` is made anew with another setting; `j` keeps only first letters, so that nothing else changes."""
    house.run("a", "b", "j", "s")
    house.text = house.text.replace('"test.write"\nreads', '"test.write"\nword = "toast"\nreads')
    assert house.actions() == {"a": "stale", "b": "reuse", "j": "wait", "s": "wait"}
    house.run("a", "j")
    assert house.actions() == {"a": "reuse", "b": "reuse", "j": "reuse", "s": "reuse"}


def test_the_same_bytes_made_again_make_nothing_stale(house: House) -> None:
    house.run("a", "b", "j", "s")
    shutil.rmtree(house.folder / "run" / "a")
    assert house.actions() == {"a": "run", "b": "reuse", "j": "wait", "s": "wait"}
    house.run("a")
    assert house.actions() == {"a": "reuse", "b": "reuse", "j": "reuse", "s": "reuse"}


def test_moving_the_recipe_and_renaming_inputs_makes_nothing_stale(house: House) -> None:
    house.run("a", "b", "j", "s")
    new = house.folder / "elsewhere"
    new.mkdir()
    (house.folder / "leaf.txt").rename(new / "leaves.txt")
    shutil.move(house.folder / "run", new / "run")
    house.folder, house.text = new, house.text.replace("leaf.txt", "leaves.txt")
    assert set(house.actions().values()) == {"reuse"}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("text.txt", "17: tea\n17: tea\n17: TEA\n", "altered: text.txt (its sha256 is not the manifest's)"),
        ("text.txt", None, "missing: text.txt"),
    ],
)
def test_an_altered_artifact_is_refused_by_name(
    house: House, file: str, content: str | None, said: str
) -> None:
    house.run("a", "b", "j", "s")
    path = house.folder / "run" / "a" / file
    path.unlink() if content is None else path.write_text(content)
    step = house.plan()["a"]
    assert (step.action, step.why) == (Action.ALTERED, said)
    with pytest.raises(ArtifactError, match=r"a: (altered|missing): text\.txt"):
        refuse_altered(house.plan().values())


def test_files_of_the_user_stop_a_replacement_and_nothing_else(house: House) -> None:
    house.run("a", "b", "j", "s")
    (house.folder / "run" / "a" / "notes.md").write_text("mine")
    assert house.plan()["a"].action == Action.REUSE
    house.text = house.text.replace('"test.write"\nreads', '"test.write"\ntimes = 9\nreads')
    step = house.plan()["a"]
    assert step.action == Action.ALTERED and "notes.md" in step.why


def test_a_folder_of_the_user_stops_a_stage_of_its_name(house: House) -> None:
    (house.folder / "run" / "a").mkdir(parents=True)
    (house.folder / "run" / "a" / "thesis.md").write_text("mine")
    step = house.plan()["a"]
    assert step.action == Action.ALTERED and "was not made by a stage" in step.why


def test_roles_get_paths_as_they_take_them(house: House) -> None:
    planner = house.planner()
    a, b, j, s = planner.recipe.stages
    run = house.folder / "run"
    assert planner.paths(a) == {"before": house.folder / "leaf.txt"}
    assert planner.paths(b) == {}, "a role that nothing was named for is left out"
    assert planner.paths(j) == {"texts": (run / "a" / "text.txt", run / "b" / "text.txt")}
    assert planner.paths(s) == {"joined": run / "j" / "joined"}


def test_all_missing_inputs_at_once(house: House) -> None:
    house.text = house.text.replace('leaf = "leaf.txt"', 'leaf = "no.txt"\nmilk = "*.milk"').replace(
        '["a", "b"]', '["a", "b", "milk"]'
    )
    with pytest.raises(InputError) as caught:
        house.plan()
    assert "stage 'a', input 'leaf': 'no.txt' is not there" in caught.value.message
    assert "stage 'j', input 'milk': no file matches '*.milk'" in caught.value.message


def test_a_pattern_is_many_files_in_order(house: House) -> None:
    for name in ("c.tea", "a.tea", "b.tea"):
        (house.folder / name).write_text(name)
    assert [path.name for path in find_input("*.tea", house.folder, False)] == ["a.tea", "b.tea", "c.tea"]
    absolute = str(house.folder / "[ab].tea")
    assert [path.name for path in find_input(absolute, Path("/"), False)] == ["a.tea", "b.tea"]
    house.text = house.text.replace('"leaf.txt"', '"*.tea"')
    with pytest.raises(InputError, match="'before' takes one, and the pattern matches 3"):
        house.plan()


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    assert find_input("a[1]", tmp_path, False) == (tmp_path / "a[1]",)


def test_a_hub_model_without_network_says_what_to_do(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(house.folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    house.text = house.text.replace('"leaf.txt"', '"Qwen/Qwen3-0.6B@main"')
    for download, said in ((False, "in the local hub cache"), (True, "could not be downloaded")):
        with pytest.raises(MissingError) as caught:
            find_input("Qwen/Qwen3-0.6B@main", house.folder, download)
        assert said in caught.value.message
        assert "hf download Qwen/Qwen3-0.6B --revision main" in caught.value.hint
        assert "local folder" in caught.value.hint
    with pytest.raises(MissingError, match=r"stage 'a', input 'leaf': 'Qwen/Qwen3-0\.6B@main' is no path"):
        house.plan()


def test_a_missing_file_is_not_taken_for_a_hub_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'data/corpus\.jsonl' is not there"):
        find_input("data/corpus.jsonl", tmp_path, True)


def fake_cache(folder: Path, *, shards: int) -> Path:
    """A hub cache with one model whose index names two shards, `shards` of them there."""
    snapshot = folder / "models--tea--leaf" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "models--tea--leaf" / "refs").mkdir()
    (folder / "models--tea--leaf" / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}'
    )
    for number in range(1, shards + 1):
        (snapshot / f"{number}.safetensors").write_text("weights")
    return snapshot


@pytest.mark.parametrize("shards", [2, 1])
def test_a_hub_model_is_taken_from_the_cache_when_it_is_whole(
    house: House, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = fake_cache(house.folder / "cache", shards=shards)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(house.folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if shards == 2:
        assert find_input("tea/leaf", house.folder, False) == (snapshot,)
    else:
        for download, said in ((False, "no whole model"), (True, "not all of its")):
            with pytest.raises(MissingError, match=said):
                find_input("tea/leaf", house.folder, download)


def test_a_kind_whose_package_is_missing_is_a_fault_of_the_recipe(house: House) -> None:
    house.kinds["test.join"] = replace(house.kinds["test.join"], settings="no_such_package:Settings")
    with pytest.raises(RecipeError, match="no_such_package, which is not installed"):
        house.plan()

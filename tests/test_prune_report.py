"""Prunings side by side: figures by hand, original numbers, no model measured twice, pictures by the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors import safe_open
from tiny import tiny_model

from foundation.errors import ArtifactError, InputError, ModelError, StopRequested
from foundation.report import Silent
from foundation.shape import ModelShape
from prune import report
from prune.kept import Kept, write_kept
from prune.steps import model_digest

HEALS = {"importance": "task", "rescore": True, "heals": True}
SHORT = {"importance": "influence", "rescore": False, "heals": False}
Whole = tuple[dict[str, Any], Path, "Bench"]  # report.json, where it lies, what made it
SVG = ("score.svg", "order.svg", "frequency.svg")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """name -> a tiny model: `o` of 6 layers; a1, a2, b1, ... of 5 and 4; dense ones of 5 and 3."""
    root = tmp_path_factory.mktemp("models")
    names = {"o": 6, "a1": 5, "a2": 4, "b1": 5, "b2": 4, "c1": 5, "c2": 4, "c3": 3, "small": 5, "tiny": 3}
    return {
        name: tiny_model(root / name, seed=seed, layers=layers)
        for seed, (name, layers) in enumerate(names.items())
    }


def write_steps(folder: Path, models: dict[str, Path], told: dict[str, Any], **changes: Any) -> Path:
    """A `steps` folder as prune.iterate leaves it. `told`: label, method, {model name: layers that went}."""
    kept = list(range(told.get("layers", 6)))
    for number, (name, removed) in enumerate(told["steps"].items(), 1):
        place = folder / f"{number:02d}"
        shutil.copytree(models[name], place / "model")
        kept = [layer for layer in kept if layer not in removed]
        write_kept(place / "model", Kept(told.get("layers", 6), tuple(kept), "0" * 64))
        step = {
            "step": number,
            "label": told["label"],
            "method": told.get("method", HEALS),
            "original": model_digest(models[told.get("original", "o")]),
            "original_layers": told.get("layers", 6),
            "removed": removed,
            "kept": kept,
            "importance": {str(layer): 0.25 for layer in (*kept, *removed)},
            "interval": None,
            "score_original": 0.8,
            "score_before": 0.8,
            "score_cut": 0.3,
            "score": 0.4 if told.get("method", HEALS)["heals"] else 0.3,
            "parameters": ModelShape.from_folder(models[name]).parameters(),
            "gguf_bytes": {"F16": 30, "Q8_0": 20, "Q4_K_M": 10},
            "healing": {},
            "model": model_digest(place / "model"),
        }
        (place / "step.json").write_text(json.dumps({"format": 1, **step, **changes}))
    return folder


@cache
def weights(folder: Path) -> float:
    """One number of a model's weights, by which it is known again."""
    with safe_open(folder / "model.safetensors", "np") as file:
        return float(file.get_tensor("model.embed_tokens.weight")[5, 3])


class Bench:
    """The acts that a report is handed, with scores from a table; counts what is measured."""

    def __init__(self, models: dict[str, Path], table: dict[str, dict[str, Sequence[float]]]) -> None:
        self.names = {weights(folder): name for name, folder in models.items()}
        self.table = table
        self.measured: list[str] = []
        self.dies_at = -1

    def handed(self) -> dict[str, Callable[..., Any]]:
        return {"tasks": self.tasks, "measure": self.measure, "gguf_bytes": self.gguf_bytes}

    def tasks(self, paths: Any, tokenizer: Any, report: Any, *, max_tokens: int, max_items: int) -> list[str]:
        assert (max_tokens, max_items) == (128, 500)  # the tiny models' context
        return [path.stem for path in paths]

    def measure(self, model: Any, tasks: list[str], pad_id: int, report: Any, *, batch_rows: int) -> list[Any]:
        if len(self.measured) == self.dies_at:
            raise KeyboardInterrupt
        name = self.names[model.model.embed_tokens.weight[5, 3].item()]
        self.measured.append(name)
        found = self.table.get(name, self.table["*"])
        return [
            SimpleNamespace(name=t, scores=np.array(found[t]), figures={"seen": float("inf")}) for t in tasks
        ]

    def gguf_bytes(self, folder: Path, kind: str) -> int:
        assert kind == "Q4_K_M"
        return 1_000_000 * ModelShape.from_folder(folder).layers


TABLE: dict[str, dict[str, Sequence[float]]] = {
    "o": {"hard": [0.5, 0.6, 0.7, 0.6], "easy": [0.9, 1.0, 1.0, 0.9]},  # .6 and .95: .775
    "a1": {"hard": [0.4, 0.5, 0.6, 0.5], "easy": [0.9, 0.9, 0.9, 0.9]},  # .5 and .9: .7
    "a2": {"hard": [0.4] * 4, "easy": [0.6] * 4},  # .5
    "b2": {"hard": [0.5] * 4, "easy": [0.7] * 4},  # .6
    "c2": {"hard": [0.6] * 4, "easy": [0.8] * 4},  # .7
    "small": {"hard": [0.5, 0.5, 0.5, 0.7], "easy": [0.9] * 4},
    "*": {"hard": [0.2, 0.2, 0.2, 0.2], "easy": [0.4, 0.4, 0.4, 0.4]},  # .3
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tasks")
    for name in ("hard", "easy"):
        (root / f"{name}.jsonl").write_text("{}\n")
    return root / "hard.jsonl", root / "easy.jsonl"


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of one method, one of another; a1 is the first step of two of them."""
    root = tmp_path_factory.mktemp("runs")
    told = [
        {"label": "task + healing", "steps": {"a1": [3], "a2": [1]}},
        {"label": "task + healing", "steps": {"a1": [3], "b2": [4]}},
        {"label": "task + healing", "steps": {"b1": [1], "c2": [3]}},
        {"label": "ShortGPT", "method": SHORT, "steps": {"c1": [0], "c3": [2, 5]}},
    ]
    return [write_steps(root / str(number) / "steps", models, each) for number, each in enumerate(told)]


def made(
    bench: Bench, out: Path, models: dict[str, Path], steps: Sequence[Path], tasks: Sequence[Path],
    dense: Sequence[str] = (), said: Any = None, original: str = "o",
) -> dict[str, Any]:  # fmt: skip
    inputs: dict[str, Any] = {"model": models[original], "steps": tuple(steps), "tasks": tuple(tasks)}
    inputs["dense"] = tuple(models[name] for name in dense)
    out.mkdir(exist_ok=True)
    report.run(report.Settings.model_validate({}), inputs, out, said or Silent(), **bench.handed())
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about speed: timing is most of what a tiny model costs."""
    monkeypatch.setattr(report, "relative_speed", lambda *_: (1.0, 1.0))


@pytest.fixture(scope="module")
def whole(
    models: dict[str, Path],
    runs: list[Path],
    tasks: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Whole:
    bench, out = Bench(models, TABLE), tmp_path_factory.mktemp("report")
    return made(bench, out, models, runs, tasks, ["small", "tiny"]), out, bench


def row(found: dict[str, Any], label: str, removed: int) -> dict[str, Any]:
    method = next(method for method in found["methods"] if method["label"] == label)
    return next(row for row in method["depths"] if row["layers_removed"] == removed)


def test_one_model_by_hand(whole: Whole) -> None:
    original = whole[0]["models"]["original"]
    assert original["layers"] == 6 and original["gguf_bytes"] == {"Q4_K_M": 6_000_000}
    # variance of .5 .6 .7 .6 is .02 / 3; a quarter of it is the mean's; t(3) = 3.182446
    half = 3.182446 * (0.02 / 3 / 4) ** 0.5
    assert original["tasks"]["hard"] == {
        "mean": pytest.approx(0.6), "low": pytest.approx(0.6 - half), "high": pytest.approx(0.6 + half),
        "items": 4, "figures": {"seen": None},
    }  # fmt: skip
    assert original["score"]["mean"] == pytest.approx(0.775)
    # item by item a1 is lower by .1 on each hard item, and by 0, .1, .1, 0 on the easy ones
    against = whole[0]["models"]["run 1, step 1"]["against_original"]
    half = 3.182446 * (0.01 / 3 / 4) ** 0.5 / 2
    assert against["mean"] == pytest.approx(-0.075)
    assert (against["low"], against["high"]) == (pytest.approx(-0.075 - half), pytest.approx(-0.075 + half))


def test_several_seeds_by_hand(whole: Whole) -> None:
    found = row(whole[0], "task + healing", 2)
    half = 4.302653 * 0.1 / 3**0.5  # .5 .6 .7: t(2) * s / sqrt(n)
    assert found["score"] == {
        "mean": pytest.approx(0.6), "low": pytest.approx(0.6 - half), "high": pytest.approx(0.6 + half)
    }  # fmt: skip
    assert (found["lowest"], found["highest"]) == (pytest.approx(0.5), pytest.approx(0.7))
    assert found["interval_over"] == "runs" and found["runs"] == 3 and found["layers_left"] == 4
    assert found["share_of_original"] == pytest.approx(0.6 / 0.775)
    assert found["tasks"]["easy"]["mean"] == pytest.approx(0.7)
    assert found["against_original"]["mean"] == pytest.approx(0.6 - 0.775)
    start = row(whole[0], "task + healing", 0)  # one model, however many runs began with it
    assert start["interval_over"] == "items" and start["share_of_original"] == 1
    assert start["score"] == whole[0]["models"]["original"]["score"]


def test_depths_are_told_in_layers_and_compared_where_all_have_them(
    whole: Whole, models: dict[str, Path]
) -> None:
    found = whole[0]
    short = next(method for method in found["methods"] if method["label"] == "ShortGPT")
    assert [(r["layers_removed"], r["layers_left"]) for r in short["depths"]] == [(0, 6), (1, 5), (3, 3)]
    assert found["deepest_common"] == 1  # 2 is no depth of ShortGPT, 3 none of the others
    assert short["order"] == [[[0], [2, 5]]]
    assert found["frequency"] == [1, 2, 1, 3, 1, 1]
    assert short["depths"][2]["parameters"] == ModelShape.from_folder(models["c3"]).parameters()


def test_the_nearest_dense_model_by_size(whole: Whole) -> None:
    near = row(whole[0], "ShortGPT", 1)["nearest_dense"]
    assert (near["name"], near["times_parameters"]) == ("dense small", 1.0)
    # c1 less small: hard .2 - .5 .5 .5 .7, easy .4 - .9
    half = 3.182446 * (0.03 / 3 / 4) ** 0.5 / 2
    assert near["difference"]["mean"] == pytest.approx((-0.35 - 0.5) / 2)
    assert near["difference"]["low"] == pytest.approx((-0.35 - 0.5) / 2 - half)
    assert row(whole[0], "ShortGPT", 3)["nearest_dense"]["name"] == "dense tiny"


def test_a_model_of_two_runs_is_measured_once(whole: Whole) -> None:
    assert whole[2].measured == ["o", "a1", "a2", "b2", "b1", "c2", "c1", "c3", "small", "tiny"]
    models = whole[0]["models"]
    assert models["run 1, step 1"] == models["run 2, step 1"] != models["run 3, step 1"]


def test_speed_is_marked_as_bound_to_the_machine(whole: Whole) -> None:
    speeds = whole[0]["machine_bound"]["models"]
    assert speeds["original"]["times_original"] == 1
    assert all(speed["tokens_per_second"] > 0 for speed in speeds.values())
    assert "tokens_per_second" not in json.dumps({**whole[0], "machine_bound": None})


def test_the_page_has_every_method_in_original_numbering(whole: Whole) -> None:
    text = (whole[1] / "report.md").read_text()
    for heading in ("### task + healing", "### ShortGPT"):
        assert heading in text
    assert "| ShortGPT | 0, 2+5 |" in text and "| task + healing, run 3 | 1, 3 |" in text
    assert "1 layer of 6 removed, the most that all runs reached." in text
    assert "Most often removed, in 3 of 4 runs: 3. Never: none." in text
    assert "| original | 6 |  | 0.775 (" in text and "| 0.600 | 0.950 |" in text
    near = "**ShortGPT** without 1 layer: 59.2 k parameters. The nearest dense model is dense small with 59.2 k"
    assert near in text and "is 0.425 below it: -0.425 (-0.505 to -0.345)." in text
    assert "| 3 | 3 | 0.300 (0.300 to 0.300) | 38.7 % |" in text and " x | 3.00 |" in text
    assert all(f"]({name})" in text for name in SVG)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for before, line in pairwise(rows):
        if set(line) <= set("|-: "):
            assert before.count("|") == line.count("|")


@pytest.mark.usefixtures("untimed")
def test_pictures_are_xml_and_the_same_twice(
    whole: Whole,
    models: dict[str, Path],
    runs: list[Path],
    tasks: Any,
    tmp_path: Path,
) -> None:
    bench = Bench(models, TABLE)
    again = made(bench, tmp_path / "again", models, runs, tasks, ["small", "tiny"])
    assert {**again, "machine_bound": 0} == {**whole[0], "machine_bound": 0}
    for name in SVG:
        picture = (whole[1] / name).read_bytes()
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
        assert b"date" not in picture.lower()
        assert picture == (tmp_path / "again" / name).read_bytes()


@pytest.mark.usefixtures("untimed")
def test_labels_are_text_everywhere(
    models: dict[str, Path], tasks: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    label = "_$\\frac{$ | <b>|\nslow " + "and long " * 12
    steps = write_steps(tmp_path / "steps", models, {"label": label, "steps": {"a1": [3]}})
    made(Bench(models, TABLE), tmp_path / "out", models, [steps], tasks)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "### _$\\\\frac{$ \\| \\<b>\\| slow and long" in text
    assert "No dense model was given" in text
    for name in SVG:
        ElementTree.fromstring((tmp_path / "out" / name).read_bytes())
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.usefixtures("untimed")
def test_a_kill_costs_one_model(
    whole: Whole,
    models: dict[str, Path],
    runs: list[Path],
    tasks: Any,
    tmp_path: Path,
) -> None:
    bench = Bench(models, TABLE)
    for bench.dies_at in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            made(bench, tmp_path, models, runs, tasks, ["small", "tiny"])
        assert len(bench.measured) == bench.dies_at and not (tmp_path / "report.json").exists()
    bench.dies_at = -1
    found = made(bench, tmp_path, models, runs, tasks, ["small", "tiny"])
    assert bench.measured == whole[2].measured
    assert {**found, "machine_bound": 0} == {**whole[0], "machine_bound": 0}


@pytest.mark.usefixtures("untimed")
def test_it_stops_between_models(models: dict[str, Path], runs: list[Path], tasks: Any, tmp_path: Path) -> None:
    bench = Bench(models, TABLE)

    class Stop(Silent):
        def stop_requested(self) -> bool:
            return len(bench.measured) == 2

    with pytest.raises(StopRequested):
        made(bench, tmp_path, models, runs, tasks, said=Stop())
    assert len(list((tmp_path / ".work").iterdir())) == 2


@pytest.mark.usefixtures("untimed")
def test_a_model_that_had_lost_layers_before_keeps_the_original_numbers(
    models: dict[str, Path], tasks: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(models["o"], base)
    write_kept(base, Kept(8, (0, 1, 3, 4, 5, 7), "x"))
    told = {"label": "l", "layers": 8, "steps": {"a1": [3]}}
    steps = write_steps(tmp_path / "steps", models, told, kept=[0, 1, 4, 5, 7])
    write_kept(steps / "01" / "model", Kept(8, (0, 1, 4, 5, 7), "x"))
    found = made(Bench(models, TABLE), tmp_path / "out", {**models, "o": base}, [steps], tasks)
    assert found["frequency"] == [0, 0, 0, 1, 0, 0, 0, 0] and found["base"] == [0, 1, 3, 4, 5, 7]
    assert [r["layers_left"] for r in found["methods"][0]["depths"]] == [6, 5]
    assert "1 layer of 6 removed" in (tmp_path / "out" / "report.md").read_text()
    assert "Never: 0, 1, 4, 5, 7." in (tmp_path / "out" / "report.md").read_text()


ONE = {"label": "l", "steps": {"a1": [3], "a2": [1]}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kept": [0, 1, 2, 5, 4]}, "less"),
        ({"removed": [3, 3]}, "layers"),
        ({"step": 7}, "says step 7"),
        ({"original_layers": 3}, "of 3"),
        ({"label": ""}, "label"),
        ({"score": 1.5}, "score"),
        ({"score": "high"}, "score"),
        ({"parameters": 5}, "says 5 and 5"),
        ({"model": "short"}, "model"),
        ({"method": {**HEALS, "importance": "luck"}}, "method.importance"),
        ({"healing": None}, "healing"),
    ],
)
def test_steps_that_are_not_whole_are_refused(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    steps = write_steps(tmp_path / "steps", models, {"label": "l", "steps": {"a1": [3]}}, **changes)
    with pytest.raises(ArtifactError, match=said):
        report.read_histories([steps], models["o"])


def test_torn_folders_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(break_it: Callable[[Path], object], said: str) -> None:
        steps = write_steps(tmp_path / said / "steps", models, ONE)
        break_it(steps)
        with pytest.raises(ArtifactError, match=said):
            report.read_histories([steps], models["o"])

    refused(lambda steps: shutil.rmtree(steps / "01"), "01 does not fit")
    refused(lambda steps: shutil.rmtree(steps), "no steps in it")
    refused(lambda steps: (steps / "final").mkdir(), "final is no step")
    refused(lambda steps: (steps / "02" / "step.json").unlink(), "is missing")
    refused(lambda steps: (steps / "02" / "step.json").write_text('{"format": 1'), "the file: Invalid JSON")
    refused(lambda steps: (steps / "02" / "model" / "model.safetensors").unlink(), "no config.json and weights")
    other = json.loads((write_steps(tmp_path / "x", models, ONE) / "02" / "step.json").read_text())
    new = json.dumps({**other, "original": "0" * 64})
    refused(lambda steps: (steps / "02" / "step.json").write_text(new), "its original is not that of step 01")
    new = json.dumps({**other, "format": 2})
    refused(lambda steps: (steps / "02" / "step.json").write_text(new), "format")
    given_up = write_steps(tmp_path / "y", models, ONE)
    (given_up / "03.partial").mkdir()  # what a healing that diverged leaves
    assert len(report.read_histories([given_up], models["o"])[0].steps) == 2


def test_runs_that_do_not_belong_together_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    first = write_steps(tmp_path / "1", models, ONE)
    with pytest.raises(InputError, match="given twice"):
        report.read_histories([first, first], models["o"])
    deep = write_steps(tmp_path / "2", models, {"label": "deep", "layers": 5, "steps": {"a2": [1]}})
    with pytest.raises(ModelError, match=r"6 of 6 layers; the runs began with l: 6 of 6, deep: 5 of 5"):
        report.read_histories([first, deep], models["o"])
    other = write_steps(tmp_path / "3", models, {**ONE, "label": "other", "original": "tiny"})
    with pytest.raises(ModelError, match="other: cut from a model with other weights"):
        report.read_histories([first, other], models["o"])
    short = write_steps(tmp_path / "4", models, {**ONE, "method": SHORT})
    with pytest.raises(InputError, match="two runs are labelled 'l'"):
        report.read_histories([first, short], models["o"])


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("scores", [[0.5, float("nan")], [0.5, 1.2], []])
def test_scores_that_are_none_are_refused(
    models: dict[str, Path], runs: list[Path], tasks: Any, tmp_path: Path, scores: list[float]
) -> None:
    bench = Bench(models, {"*": {"hard": scores, "easy": [0.5, 0.5]}})
    with pytest.raises(ModelError, match="original: its scores of hard are not numbers between 0 and 1"):
        made(bench, tmp_path, models, runs, tasks)

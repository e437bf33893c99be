"""The pruning loop: what it removes, keeps, stops at, resumes and refuses. Its parts have their own tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import chats, tiny_model

from distill.heal import heal
from evaluation.tasks import load_tasks, measure
from export.quants.predict import gguf_bytes
from foundation.dataio import write_jsonl
from foundation.errors import ArtifactError, Diverged, InputError, ModelError
from foundation.model import load
from foundation.report import Silent
from foundation.tensors import TensorFiles
from foundation.tokenizer import Tokenizer, copy_tokenizer
from prune import importance, iterate
from prune.cut import cut_folder
from prune.history import read_history
from prune.importance import Costs
from prune.influence import block_influence
from prune.steps import model_digest, read_step

HANDED = {"heal": heal, "tasks": load_tasks, "measure": measure, "file_bytes": gguf_bytes}
HEALING: dict[str, Any] = {
    "steps": 3,
    "batch_rows": 4,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "precision": "fp32",
}


def settings(**values: Any) -> iterate.Settings:
    return iterate.Settings(**{"max_items": 12, **({} if values.get("heals") is False else HEALING), **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers that speak at different volumes, so that they can be told apart: 1 says least, then 4."""
    folder = tiny_model(tmp_path_factory.mktemp("model"), layers=6)
    model = load(folder)
    with torch.no_grad():
        for layer, loud in zip(model.model.layers, (30, 1e-3, 25, 20, 0.1, 15), strict=True):
            layer.self_attn.o_proj.weight.mul_(loud)
            layer.mlp.down_proj.weight.mul_(loud)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats())
    return path


def run(chosen: iterate.Settings, folder: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    """`more`: other inputs, other functions to hand in (heal, measure), a report."""
    own = {name: more.pop(name) for name in ("heal", "measure") if name in more}
    report, handed = more.pop("report", Silent()), {**HANDED, **own}
    return iterate.run(chosen, {"model": folder, "data": (data,), **more}, out, report, **handed)


@pytest.mark.parametrize(
    ("values", "removed"),
    [
        ({"importance": "influence", "rescore": False, "heals": False}, "1, 4"),  # ShortGPT
        ({"importance": "influence", "heals": False}, "1, 4"),
        ({"importance": "influence"}, "1, 4"),
        ({"importance": "kl", "heals": False}, "1, 4"),
    ],
)
def test_each_method_removes_the_layers_that_say_least(
    folder: Path, data: Path, tmp_path: Path, values: dict[str, Any], removed: str
) -> None:
    figures = run(settings(remove_layers=2, **values), folder, data, tmp_path)
    assert figures["removed"] == removed
    assert figures["layers"] == load(tmp_path / "model").config.num_hidden_layers == 4
    assert figures["stopped_by"] == "remove_layers"
    steps = [read_step(tmp_path / "steps" / f"0{n}") for n in (1, 2)]
    assert [step.kept for step in steps if step] == [(0, 2, 3, 4, 5), (0, 2, 3, 5)]
    assert [set(step.importance) for step in steps if step] == [{0, 1, 2, 3, 4, 5}, {0, 2, 3, 4, 5}]
    for step in steps:
        assert step and step.model == model_digest(tmp_path / "steps" / f"0{step.step}" / "model")
        assert bool(step.healing) == values.get("heals", True)
        loaded = load(tmp_path / "steps" / f"0{step.step}" / "model")
        assert step.parameters == sum(p.numel() for p in loaded.parameters())


def test_the_task_score_is_that_of_models_really_cut(folder: Path, data: Path, tmp_path: Path) -> None:
    run(settings(remove_layers=2, heals=False), folder, data, tmp_path / "out")
    tokenizer = Tokenizer(folder)
    (task,) = load_tasks([data], tokenizer, Silent(), max_tokens=128, max_items=12)
    current = folder
    for number in (1, 2):
        step = read_step(tmp_path / "out" / "steps" / f"0{number}")
        assert step
        score = {}
        for at, layer in enumerate(sorted({*step.kept, *step.removed})):
            cut_folder(current, [at], tmp_path / f"{number}-{at}")
            (found,) = measure(load(tmp_path / f"{number}-{at}"), [task], tokenizer.pad_id, Silent())
            score[layer] = float(found.scores.mean())
            assert step.importance[layer] == pytest.approx(step.score_before - score[layer], abs=1e-6)
        assert step.removed == (max(score, key=score.__getitem__),)
        assert step.score == pytest.approx(max(score.values()), abs=1e-6)
        current = tmp_path / "out" / "steps" / f"0{number}" / "model"


def test_a_block_goes_by_its_angle(folder: Path, data: Path, tmp_path: Path) -> None:
    chosen = settings(remove_layers=2, layers_per_step=2, importance="angular", heals=False)
    removed = [int(layer) for layer in str(run(chosen, folder, data, tmp_path)["removed"]).split(", ")]
    assert removed[1] == removed[0] + 1
    step = read_step(tmp_path / "steps" / "01")
    assert step and len(step.importance) == 5 and list(step.removed) == removed


def test_what_did_not_train_keeps_its_bytes_and_what_was_stored_stays_in_its_precision(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    model = load(folder).to(torch.bfloat16)
    model.save_pretrained(str(half))
    copy_tokenizer(folder, half)
    run(settings(remove_layers=1, importance="influence"), half, data, tmp_path / "out")
    before, after = (
        load_file(half / "model.safetensors"),
        load_file(tmp_path / "out" / "model" / "model.safetensors"),
    )
    kept = [0, 2, 3, 4, 5]
    changed = set()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(kept[int(parts[2])])
        if not torch.equal(tensor, before[".".join(parts)]):
            changed.add(".".join(name.split(".")[:3]))
    assert changed == {"model.layers.0", "model.layers.1"}  # the neighbours of the gap


def test_lora_heals_every_layer(folder: Path, data: Path, tmp_path: Path) -> None:
    run(settings(remove_layers=1, importance="influence", trains="lora"), folder, data, tmp_path)
    before, after = TensorFiles(folder), TensorFiles(tmp_path / "model")
    moved = [
        n
        for n in after
        if "layers.4." in n and not torch.equal(after.read(n), before.read(n.replace(".4.", ".5.")))
    ]
    assert {name.rsplit(".", 2)[1] for name in moved} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


class Kill(Silent):
    """Ends the stage at the n-th word of progress, as kill -9 would."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work" not in path.parts
    }


@pytest.mark.slow
def test_a_kill_at_any_moment_changes_nothing(folder: Path, data: Path, tmp_path: Path) -> None:
    chosen = settings(remove_layers=2, checkpoint_every_steps=1)
    run(chosen, folder, data, tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    at, killed = 1, 0
    while True:
        try:
            run(chosen, folder, data, tmp_path / "torn", report=Kill(at))
            break
        except KeyboardInterrupt:
            killed, at = killed + 1, at + 3
    assert killed >= 3
    found = files(tmp_path / "torn")
    assert {name for name in wanted if not name.endswith("curves.jsonl")} == {
        name for name in found if not name.endswith("curves.jsonl")
    }
    assert all(found[name] == content for name, content in wanted.items())


def test_another_pruning_branches_from_a_step(folder: Path, data: Path, tmp_path: Path) -> None:
    fast = {"importance": "influence", "heals": False}
    run(settings(remove_layers=3, **fast), folder, data, tmp_path / "first")
    straight = tmp_path / "straight"
    run(settings(remove_layers=2, **fast), folder, data, straight)
    branched = tmp_path / "branched"
    steps = tmp_path / "first" / "steps"
    figures = run(settings(keep_layers=4, branch_step=1, **fast), folder, data, branched, branch=steps)
    assert figures["removed"] == "1, 4"
    assert files(branched)["model/model.safetensors"] == files(straight)["model/model.safetensors"]
    with pytest.raises(InputError, match="has 3 layers; the target is 4"):
        run(settings(keep_layers=4, **fast), folder, data, tmp_path / "deep", branch=steps)
    with pytest.raises(InputError, match="steps 1 to 3, not 9"):
        run(settings(keep_layers=2, branch_step=9, **fast), folder, data, tmp_path / "none", branch=steps)
    other = tiny_model(tmp_path / "other", layers=6, seed=5)
    with pytest.raises(InputError, match="another model"):
        run(settings(keep_layers=2, **fast), other, data, tmp_path / "alien", branch=steps)


def test_a_branch_measures_with_its_own_tasks(folder: Path, data: Path, tmp_path: Path) -> None:
    """Scores and costs of the pruning that it goes on from are of other tasks, or another measure."""
    run(settings(remove_layers=1, importance="task", heals=False), folder, data, tmp_path / "first")
    first = read_step(tmp_path / "first" / "steps" / "01")
    other = tmp_path / "other.jsonl"
    write_jsonl(other, [{"text": f"Rest {n} days, then run {n} times."} for n in range(12)])
    chosen = settings(remove_layers=3, importance="influence", rescore=False, heals=False)
    steps = tmp_path / "first" / "steps"
    run(chosen, folder, data, tmp_path / "out", branch=steps, tasks=(other,))
    tokenizer = Tokenizer(folder)
    (task,) = load_tasks([other], tokenizer, Silent(), max_tokens=128, max_items=12)
    (whole,) = measure(load(folder), [task], tokenizer.pad_id, Silent())
    second, third = (read_step(tmp_path / "out" / "steps" / f"0{n}") for n in (2, 3))
    assert first and second and third
    for step in (second, third):
        assert step.score_original == pytest.approx(whole.scores.mean()) != first.score_original
    (before,) = measure(load(tmp_path / "first" / "model"), [task], tokenizer.pad_id, Silent())
    assert second.score_before == pytest.approx(before.scores.mean())
    assert second.label == third.label == "ShortGPT"
    assert third.importance == {layer: second.importance[layer] for layer in third.importance}  # scored once
    rows = list(task.rows)
    wanted = block_influence(load(tmp_path / "first" / "model"), rows, Silent(), pad_id=tokenizer.pad_id)
    assert list(second.importance.values()) == pytest.approx(wanted.tolist())


def test_altered_steps_are_no_ground_to_go_on_from(folder: Path, data: Path, tmp_path: Path) -> None:
    fast = {"importance": "influence", "heals": False}
    run(settings(remove_layers=2, **fast), folder, data, tmp_path / "first")
    place = tmp_path / "first" / "steps" / "02"
    record, weights = (place / "step.json").read_text(), (place / "model" / "model.safetensors").read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(ArtifactError, match=said):
            run(settings(remove_layers=3, **fast), folder, data, tmp_path / "out", branch=place.parent)

    (place / "step.json").write_text(json.dumps({**json.loads(record), "removed": [3], "kept": [0, 2, 4, 5]}))
    refused("not those that its model has")
    (place / "step.json").write_text(record)
    (place / "model" / "model.safetensors").unlink()  # never in place: steps share their files
    (place / "model" / "model.safetensors").write_bytes(weights[:-4] + b"\x00\x00\x00\x40")
    refused("were altered")
    (place / "model" / "model.safetensors").unlink()
    refused("no config.json and weights")


def test_a_pruned_model_is_numbered_as_the_original(folder: Path, data: Path, tmp_path: Path) -> None:
    fast = {"importance": "influence", "heals": False}
    run(settings(remove_layers=1, **fast), folder, data, tmp_path / "first")
    figures = run(settings(remove_layers=1, **fast), tmp_path / "first" / "model", data, tmp_path / "second")
    assert figures["removed"] == "4"
    step = read_step(tmp_path / "second" / "steps" / "01")
    assert step and step.original_layers == 6 and step.kept == (0, 2, 3, 5)
    healed = settings(remove_layers=1, importance="influence")
    assert run(healed, tmp_path / "first" / "model", data, tmp_path / "third")["removed"] == "4"


def test_targets_in_layers_parameters_and_bytes(folder: Path, data: Path, tmp_path: Path) -> None:
    size = {n: gguf_bytes(folder, "Q8_0", layers=n) for n in range(1, 7)}
    targets: list[dict[str, Any]] = [
        {"keep_layers": 4},
        {"keep_bytes": size[4] + 1, "keep_bytes_as": "Q8_0"},
        {"keep_parameters": 13_000 * 4 + 6000},
    ]
    for number, target in enumerate(targets):
        chosen = settings(importance="influence", rescore=False, heals=False, **target)
        run(chosen, folder, data, tmp_path / str(number))
        model = load(tmp_path / str(number) / "model")
        if "keep_parameters" in target:
            per_layer = sum(p.numel() for p in model.model.layers[0].parameters())
            found = sum(p.numel() for p in model.parameters())
            assert found <= target["keep_parameters"] < found + per_layer
        else:
            assert model.config.num_hidden_layers == 4


def test_a_quality_floor_keeps_the_step_before(folder: Path, data: Path, tmp_path: Path) -> None:
    def by_depth(model: Any, *_: Any, **__: Any) -> list[Any]:
        return [SimpleNamespace(scores=np.full(3, model.config.num_hidden_layers / 6))]

    chosen = settings(quality_floor=0.6, importance="influence", heals=False)
    for _ in range(2):  # the second time as if interrupted after the step that was too much
        report = Silent()
        figures = run(chosen, folder, data, tmp_path, report=report, measure=by_depth)
        assert figures["stopped_by"] == "quality_floor"
        assert figures["layers"] == 4  # 4/6 is above .6, 3/6 is not
        assert load(tmp_path / "model").config.num_hidden_layers == 4
        assert any("step 3 scores 0.5, below 0.6 of the 1 of `model`" in note for note in report.notes)
        assert (tmp_path / "steps" / "03.rejected" / "step.json").is_file()  # kept, though no step
        assert len(read_history(tmp_path / "steps").steps) == 2
    with pytest.raises(ModelError, match="not one layer can go"):
        run(settings(quality_floor=0.9, importance="influence", heals=False), folder, data, tmp_path / "none",
            measure=by_depth)  # fmt: skip


def test_a_healing_that_diverges_keeps_the_last_good_step(folder: Path, data: Path, tmp_path: Path) -> None:
    def fragile(*arguments: Any, **more: Any) -> Any:
        if len(arguments[2]) == 4:
            raise Diverged("the loss is nan at step 2")
        return heal(*arguments, **more)

    report = Silent()
    chosen = settings(remove_layers=3, importance="influence")
    figures = run(chosen, folder, data, tmp_path / "a", report=report, heal=fragile)
    assert figures["layers"] == 5 and figures["stopped_by"] == "divergence"
    assert any("step 2 is given up" in note and "nan" in note for note in report.notes)
    assert load(tmp_path / "a" / "model").config.num_hidden_layers == 5
    with pytest.raises(Diverged):
        wild = {"learning_rate": 1.0, "clip_norm": 0.0, "steps": 30, "trains": "all", "hidden_weight": 1e30}
        run(settings(remove_layers=1, importance="influence", **wild), folder, data, tmp_path / "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"remove_layers": 6}, "the model has 6, and one must stay"),
        ({"keep_layers": 6}, "within its target already"),
        ({"keep_parameters": 100}, "one layer alone leaves"),
        ({"keep_bytes": 10**12}, "within its target already"),
    ],
)
def test_targets_that_can_not_be_met(
    folder: Path, data: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run(settings(heals=False, **values), folder, data, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"remove_layers": 1, "keep_layers": 2}, "one target is enough"),
        ({}, "a target is missing"),
        ({"remove_layers": 1, "heals": False, "logit_loss": "kl"}, "no effect with heals = false"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iterate.Settings(**values)


def test_what_a_recipe_may_not_ask_for() -> None:
    told: Callable[..., list[str]] = iterate.disagreements
    plain = iterate.Settings(remove_layers=1)
    assert told(plain, {"model": ("a",), "data": ("a",)}) == []
    assert "hidden_loss" in " ".join(told(plain, {"model": ("a",), "data": ("a",), "teacher": ("a",)}))
    assert "needs something to read" in " ".join(told(plain, {"model": ("a",), "tasks": ("a",)}))
    assert "neither is read" in " ".join(told(plain, {"model": ("a",), "corpus": ("a",)}))
    assert "no `branch`" in " ".join(
        told(iterate.Settings(remove_layers=1, branch_step=2), {"model": ("a",), "data": ("a",)})
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"remove_layers": 4}, ""),
        ({"remove_layers": 3, "branch_step": 1}, ""),
        ({"remove_layers": 4, "branch_step": 3}, "makes 2 at most"),
        ({"remove_layers": 3}, "has removed 3 by that step"),
        ({"remove_layers": 1, "branch_step": 1}, "has removed 2 by that step"),
        ({"keep_layers": 2}, ""),
    ],
)
def test_a_branch_is_counted_before_anything_runs(values: dict[str, Any], said: str) -> None:
    source = iterate.Settings(remove_layers=3, layers_per_step=2)  # two steps, of two layers and one
    reads = {"model": ("a",), "data": ("a",), "branch": (("prune.iterate", source),)}
    assert said in " ".join(found := iterate.disagreements(iterate.Settings(**values), reads))
    assert bool(found) == bool(said)


def test_a_scoring_set_that_tells_nothing_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    model = load(folder)
    with torch.no_grad():  # every layer is the identity: none can be told from another
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(str(same))
    copy_tokenizer(folder, same)
    with pytest.raises(InputError, match=r"too small to tell layers apart: over 12 items .*\[.*\]"):
        run(settings(remove_layers=1, heals=False), same, data, tmp_path / "out")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError):
        run(settings(remove_layers=1, heals=False), folder, empty, tmp_path / "out2")


def test_the_cheapest_layers() -> None:
    assert Costs([0.3, 0.1, 0.2, 0.1]).cheapest(1) == [3]  # of equal ones the deeper
    assert Costs([0.3, 0.1, 0.2, 0.1]).cheapest(3) == [1, 2, 3]
    assert Costs([0.3, 0.1, 0.2], width=2).cheapest(2) == [1, 2]


def test_importance_tells_every_measure(folder: Path, data: Path, tmp_path: Path) -> None:
    chosen = importance.Settings(measures=("task", "kl", "influence", "angular"), block_layers=2, max_items=12)
    inputs = {"model": folder, "data": (data,)}
    figures = importance.run(chosen, inputs, tmp_path, Silent(), tasks=load_tasks)
    told = json.loads((tmp_path / "importance.json").read_text())
    assert told["original_layers"] == 6
    for measure_name, found in told["measures"].items():
        cost = found["cost"]
        assert len(cost) == (5 if measure_name == "angular" else 6)
        assert all(math.isfinite(value) for value in cost.values())
        if measure_name != "angular":
            assert min(cost, key=cost.__getitem__) == figures[f"cheapest_{measure_name}"]
    assert figures["cheapest_influence"] == figures["cheapest_kl"] == "1"
    low = told["measures"]["task"]["separation"]
    assert low[1] > 0

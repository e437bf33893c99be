"""Iterative layer pruning: score the layers, remove the cheapest, heal, and again (LayerKD).

The five methods that the paper compares are settings of this one stage:

    ShortGPT                            importance = "influence", rescore = false, heals = false
    iterative BI                        importance = "influence", heals = false
    iterative BI + healing              importance = "influence"
    iterative task score                heals = false
    iterative task score + healing      (the defaults)

The teacher of every healing is the model that the first layer was taken from. Every step is kept as a whole
model, so a kill costs at most one checkpoint interval, and another pruning can branch from any of them. How
healing, tasks and file sizes work is not this room's affair: the stage table hands them in.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from foundation.dataio import conversations, documents
from foundation.errors import Diverged, InputError, ModelError
from foundation.files import read_json, write_json
from foundation.healing import HealSettings
from foundation.model import context_tokens, load
from foundation.report import Report, stop_if_asked
from foundation.rows import Row, Rows, chat_rows, pack
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, Reads, many, one
from foundation.task import Task
from foundation.tensors import TensorFiles, write_tensors
from foundation.tokenizer import Tokenizer
from prune.cut import cut_folder
from prune.history import branch
from prune.importance import Costs, Importance, LoadTasks, Scorer, ScoringSettings, mean_score, scoring_tasks
from prune.kept import Kept, kept_layers
from prune.steps import (
    FORMAT,
    Method,
    Step,
    folder_of,
    link_tree,
    model_digest,
    read_step,
    rejected,
    write_step,
)
from prune.target import TARGETS, FileBytes, TargetSettings, layers_to_keep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel


TOLD_TYPES = ("F16", "Q8_0", "Q4_K_M")  # sizes in the record of every step


class Settings(TargetSettings, ScoringSettings, HealSettings):
    """How far, which layers, and how the rest is healed (steps and the like are one healing's)."""

    importance: Importance = Field("task", description="what the layer that goes is chosen by")
    rescore: bool = Field(True, description="score afresh after every step; false = once (ShortGPT)")
    heals: bool = Field(True, description="train what is left after every step")
    layers_per_step: int = Field(1, ge=1, description="layers that go at once; a block of them with 'angular'")
    branch_step: int = Field(0, ge=0, description="step of `branch` to go on from; 0 = its last")
    teacher_precision: Literal["fp32", "bf16", "nf4"] = Field(
        "fp32", description="of the original model while it teaches"
    )
    label: str = Field("", max_length=80, description="name of this pruning in reports; empty = its method")

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> Settings:
        if not self.heals:
            idle = [
                name for name in HealSettings.model_fields if name not in ("seed", "checkpoint_every_steps")
            ]
            if changed := self.changed(idle):
                raise ValueError(f"{', '.join(changed)}: no effect with heals = false")
        if self.importance == "angular" and not self.rescore and self.layers_per_step > 1:
            raise ValueError("importance = 'angular' removes one block a step: set rescore = true")
        return self

    @property
    def method(self) -> Method:
        return Method(importance=self.importance, rescore=self.rescore, heals=self.heals)

    @property
    def name(self) -> str:
        """`label`, or the method in the paper's words."""
        measure = {"influence": "BI", "task": "task score", "kl": "KL", "angular": "angular distance"}
        if self.label:
            return self.label
        if self.importance == "influence" and not self.rescore and not self.heals:
            return "ShortGPT"
        return (
            f"{'iterative' if self.rescore else 'one-shot'} {measure[self.importance]}"
            + " + healing" * self.heals
        )


def disagreements(settings: Settings, reads: Reads) -> list[str]:
    """What can not go together in a recipe."""
    problems = []
    if not any(role in reads for role in ("data", "corpus")) and settings.heals:
        problems.append("healing needs something to read: conversations as `data`, or text as `corpus`")
    if "data" not in reads and "tasks" not in reads:
        problems.append("layers are scored on `tasks`, or on conversations given as `data`: neither is read")
    if "teacher" in reads:
        if not settings.heals:
            problems.append("`teacher` is a store for healing, and heals = false")
        problems += settings.refused_by_a_store()
        if "corpus" in reads or "data" not in reads:
            problems.append(
                "a teacher's store goes with the conversations it was captured on: read `data` alone"
            )
    if settings.branch_step and "branch" not in reads:
        problems.append(f"branch_step = {settings.branch_step}, and no `branch` is read")
    return problems + [
        problem
        for source in reads.get("branch", ())
        if not isinstance(source, str) and isinstance(source[1], Settings)
        for problem in _branch_problems(settings, source[1])
    ]


def _branch_problems(settings: Settings, source: Settings) -> list[str]:
    """What is wrong with going on from `source`, as far as it says how many layers it removes."""
    if source.remove_layers is None:
        return []
    steps = math.ceil(source.remove_layers / source.layers_per_step)
    if settings.branch_step > steps:
        return [f"branch_step = {settings.branch_step}, but the pruning in `branch` makes {steps} at most"]
    gone = min((settings.branch_step or steps) * source.layers_per_step, source.remove_layers)
    if settings.remove_layers is not None and settings.remove_layers <= gone:
        told = f"remove_layers = {settings.remove_layers}"
        return [f"{told}: layers are counted from `model`, and `branch` has removed {gone} by that step"]
    return []


def run(
    settings: Settings,
    inputs: Inputs,
    out: Path,
    report: Report,
    *,
    heal: Callable[..., Any],
    tasks: LoadTasks,
    measure: Callable[..., Any],
    file_bytes: FileBytes,
) -> Figures:
    """Write out/steps/NN, a model for every step, and out/model, the last one that is good.

    Raises ModelError for a target that can not be met, InputError for scoring sets that can not tell layers
    apart, Diverged when the first healing does. A later one that diverges, or falls below quality_floor, ends
    the pruning with the step before it.
    """
    pruning = _Pruning(settings, inputs, out, report, _Acts(heal, tasks, measure, file_bytes))
    steps = pruning.steps  # those that are there from an earlier try, or another pruning, are taken as they are
    given = [name for name in TARGETS if getattr(settings, name) is not None]
    stopped_by = given[0] if given else "one layer left"
    while len(pruning.kept.kept) > pruning.goal:
        stop_if_asked(report)
        try:
            step = pruning.next()
        except Diverged as error:
            if not steps:
                raise
            report.note(f"step {len(steps) + 1} is given up, the one before it stands: {error.message}")
            stopped_by = "divergence"
            break
        if settings.quality_floor is not None and step.score < settings.quality_floor * step.score_original:
            report.note(
                f"step {step.step} scores {step.score:.4g}, below {settings.quality_floor:g} of the "
                f"{step.score_original:.4g} of `model`; the step before it is the result"
            )
            place = folder_of(out / "steps", step.step)
            if place.exists():  # it is gone already when a kill came after
                place.replace(rejected(place))
            stopped_by = "quality_floor"
            break
        steps.append(step)
    if not steps:
        raise ModelError(
            "not one layer can go: the score falls below quality_floor at once",
            hint="lower quality_floor, heal for more steps, or keep the model as it is",
        )
    last = steps[-1]
    link_tree(folder_of(out / "steps", last.step) / "model", out / "model")
    return {
        "layers": len(last.kept),
        "removed": ", ".join(str(layer) for step in steps for layer in step.removed),
        "score_original": last.score_original,
        "score": last.score,
        "parameters": last.parameters,
        "stopped_by": stopped_by,
    }


class _Acts(NamedTuple):
    """What other rooms do for this one."""

    heal: Callable[..., Any]
    tasks: LoadTasks
    measure: Callable[..., Any]
    file_bytes: FileBytes


class _Pruning:
    """Everything that the steps share, and the model as the last of them left it."""

    def __init__(self, settings: Settings, inputs: Inputs, out: Path, report: Report, acts: _Acts) -> None:
        self.settings, self.inputs, self.out, self.report = settings, inputs, out, report
        self.acts = acts
        self.folder, self.work = one(inputs, "model"), out / ".work"
        self.tokenizer = Tokenizer(self.folder)
        self.base = kept_layers(self.folder)
        self.goal = layers_to_keep(settings, self.folder, acts.file_bytes)
        self.original = model_digest(self.folder)
        self.loaded: list[Task] = scoring_tasks(settings, inputs, self.folder, acts.tasks, report)
        self.rows = self._healing_rows() if settings.heals else []
        self.steps: list[Step] = []
        if "branch" in inputs:
            self.steps += branch(one(inputs, "branch"), settings.branch_step, out / "steps", self.original)
            last = self.steps[-1]
            if len(last.kept) <= self.goal:
                raise InputError(
                    f"step {last.step} of `branch` has {len(last.kept)} layers; the target is {self.goal}",
                    hint="branch from an earlier step (branch_step), or set a deeper target",
                )
        self.given = len(self.steps)  # steps of another pruning: its scores and costs are not of these tasks
        self._teacher: PreTrainedModel | None = None

    @property
    def current(self) -> Path:
        """The model that the next layer is taken from."""
        return folder_of(self.out / "steps", len(self.steps)) / "model" if self.steps else self.folder

    @property
    def kept(self) -> Kept:
        return kept_layers(self.current)

    @property
    def teacher(self) -> PreTrainedModel:
        if self._teacher is None:
            self._teacher = load(self.folder, precision=self.settings.teacher_precision)
            self._teacher.requires_grad_(False)
        return self._teacher

    @property
    def own(self) -> list[Step]:
        """The steps of this pruning, without those that it went on from."""
        return self.steps[self.given :]

    def _healing_rows(self) -> Rows[Row]:
        """What healing reads: conversations, with answers counted, and blocks of text, counted whole."""
        longest = min(self.settings.max_tokens, context_tokens(self.folder))
        parts: list[Rows[Row]] = []
        if many(self.inputs, "data"):
            chats, _, too_long = chat_rows(conversations(many(self.inputs, "data")), self.tokenizer, longest)
            if too_long:
                self.report.note(f"{too_long} rows are longer than {longest} tokens and were left out")
            parts.append(chats)
        if many(self.inputs, "corpus"):
            parts.append(
                pack(documents(many(self.inputs, "corpus")), self.tokenizer, longest, self.work / "text")
            )
        if not parts:
            raise InputError("healing needs `data` or `corpus`", hint="or set heals = false")
        return parts[0] if len(parts) == 1 else _Both(*parts)

    def next(self) -> Step:
        """One step: the cheapest layers go, the rest heals, steps/NN is written whole."""
        number = len(self.steps) + 1
        place, work = folder_of(self.out / "steps", number), self.work / f"step-{number:02d}"
        if done := read_step(place) or read_step(rejected(place)):
            return done
        kept, report = self.kept, self.report
        work.mkdir(parents=True, exist_ok=True)
        costs, before = self._costs(work, number)
        count = min(self.settings.layers_per_step, len(kept.kept) - self.goal)
        gone = costs.cheapest(count)
        removed = [kept.kept[at] for at in gone]
        what = f"layer {removed[0]} goes" if len(removed) == 1 else f"layers {', '.join(map(str, removed))} go"
        report.note(f"step {number}: {what}")
        left = cut_folder(self.current, gone, work / "cut", report=report)
        target = place.with_name(f"{place.name}.partial")
        shutil.rmtree(target, ignore_errors=True)
        cut_score = before - costs.values[gone[0]] if costs.whole is not None and len(gone) == 1 else None
        healed: dict[str, float | int] = {}
        if self.settings.heals:
            healed = self._heal(work, gone, left, target / "model")
            shutil.copyfile(work / "heal" / "curves.jsonl", target / "curves.jsonl")
        else:
            link_tree(work / "cut", target / "model")
        after = self._score(target / "model")
        step = Step(
            format=FORMAT,
            step=number,
            label=self.settings.name,
            method=self.settings.method,
            original=self.original,
            original_layers=kept.original_layers,
            removed=tuple(removed),
            kept=left.kept,
            importance={kept.kept[at]: value for at, value in enumerate(costs.values)},
            interval=costs.separation and {"separation": costs.separation, "runner_up": costs.runner_up},
            score_original=self._score_original(),
            score_before=before,
            score_cut=cut_score if self.settings.heals else after,
            score=after,
            parameters=ModelShape.from_folder(target / "model").parameters(),
            gguf_bytes=self._file_sizes(target / "model"),
            healing=healed,
            model=model_digest(target / "model"),
        )
        write_step(target, step)
        shutil.rmtree(place, ignore_errors=True)
        target.replace(place)
        shutil.rmtree(work)
        report.note(
            f"step {number}: score {step.score:.4g}, layers left {len(step.kept)} of "
            f"{self.base.original_layers}; `model` scores {step.score_original:.4g}"
        )
        return step

    def _costs(self, work: Path, number: int) -> tuple[Costs, float]:
        """(costs of the layers that are left, score of the model before this step); kept for a resumed step."""
        kept = self.kept.kept
        if not self.settings.rescore and self.own:
            first = self.own[0].importance
            return Costs([first[layer] for layer in kept]), self.own[-1].score
        known = read_json(work / "costs.json")
        if isinstance(known, dict):
            return Costs(**known["costs"]), known["before"]
        scorer = Scorer(
            self.loaded, self.settings, work / "scores", self.report,
            pad_id=self.tokenizer.pad_id, with_kl=self.settings.importance == "kl",
        )  # fmt: skip
        kind, width = self.settings.importance, 1
        if kind == "angular":
            width = min(self.settings.layers_per_step, len(kept) - self.goal)
        original = self.teacher if kind == "kl" and self.steps else None
        costs = scorer.costs(kind, load(self.current), f"step {number}", original=original, width=width)
        if self.own:
            before = self.own[-1].score
        else:
            before = self._score(self.current) if self.steps else self._score_original()
        write_json(work / "costs.json", {"costs": vars(costs), "before": before})
        return costs, before

    def _score_original(self) -> float:
        """Score of `model` on this pruning's tasks, measured once."""
        if self.own:
            return self.own[0].score_original
        known = read_json(self.work / "original.json")
        if not isinstance(known, dict):
            known = {"score": self._score(self.folder)}
            write_json(self.work / "original.json", known)
        return float(known["score"])

    def _file_sizes(self, folder: Path) -> dict[str, int]:
        """Bytes as GGUF by type; none for a model that llama.cpp can not compute, such as Mistral's windows."""
        try:
            return {kind: self.acts.file_bytes(folder, kind) for kind in TOLD_TYPES}
        except ModelError as error:
            self.report.note(f"no GGUF sizes: {error.message}")
            return {}

    def _score(self, folder: Path) -> float:
        """Mean score of the model in `folder` on the tasks that layers are scored on."""
        found = self.acts.measure(
            load(folder), self.loaded, self.tokenizer.pad_id, self.report, batch_rows=self.settings.score_rows
        )
        return mean_score([task.scores for task in found])

    def _heal(self, work: Path, gone: Sequence[int], left: Kept, out: Path) -> dict[str, float | int]:
        """Heal work/cut into `out`; what did not train keeps its bytes. Returns figures of the training."""
        gaps = sorted({at - number for number, at in enumerate(sorted(gone))})
        places = [self.base.kept.index(layer) for layer in left.kept]
        store = one(self.inputs, "teacher") if "teacher" in self.inputs else None
        healed = self.acts.heal(
            work / "cut",
            None if store else self.teacher,
            places,
            gaps,
            self.rows,
            self.settings,
            work / "heal",
            self.report,
            pad_id=self.tokenizer.pad_id,
            store=store,
            tokenizer=self.tokenizer,
        )
        link_tree(work / "cut", out)
        trained = healed.model.state_dict()
        changed = {name: trained[name] for name in healed.changed}
        write_tensors(out, _with(TensorFiles(work / "cut"), changed))
        return dict(healed.figures)


class _Both:
    """Rows of one source after those of another."""

    def __init__(self, *parts: Rows[Row]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int, /) -> Row:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _with(files: TensorFiles, changed: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of `files` with those in `changed` in their place, in the precision that the files have."""
    for name, tensor in files.items():
        new = changed.get(name)
        yield name, tensor if new is None else new.detach().cpu().to(tensor.dtype)

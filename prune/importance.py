"""What each layer is worth, in four ways, and which of them goes.

    task        score of the whole model on tasks, minus the score without the layer      (LayerKD)
    kl          1 - exp(-KL(original || model without the layer)), KL in nats a token, by row
    influence   1 - cos of the layer's input and output                                   (ShortGPT)
    angular     angle between a block's input and output, at the last token               (Gromov et al. 2024)

The first two look at what comes out of the model and cost L + L(L-1)/2 layer passes, the others at one pass.
As a stage, prune.importance tells them all side by side and removes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from foundation.errors import InputError, ModelError
from foundation.files import write_json
from foundation.model import context_tokens, load
from foundation.report import Report
from foundation.rows import Row
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one
from foundation.statistics import overall_difference
from foundation.task import AnsweredTask, Reading, ReadTask, Task
from foundation.tokenizer import Tokenizer
from prune.generate import generate_without
from prune.influence import angular_distances, block_influence
from prune.kept import kept_layers
from prune.leave_one_out import leave_one_out

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

MODELS_ANSWERING = 4  # side by side; on a CPU faster than all at once, whose keys and values fill its caches

Importance = Literal["task", "kl", "influence", "angular"]
LoadTasks = Callable[..., list[Task]]
Items = list["np.ndarray"]
"""Scores of one model: an array of items for each task."""


class ScoringSettings(StageSettings):
    """On how much layers are scored."""

    max_items: int = Field(128, ge=2, description="items of each task that layers are scored on")
    max_tokens: int = Field(1024, ge=8, description="longest row; the model's own context if shorter")
    score_rows: int = Field(16, ge=1, description="rows in one forward pass while scoring")
    spill_bytes: int = Field(
        4 * 2**30,
        ge=2**20,
        description="hidden states kept in memory while scoring; more go to disk",
        json_schema_extra={"fingerprint": False},
    )


class Settings(ScoringSettings):
    """Which measures are told."""

    measures: tuple[Importance, ...] = Field(
        ("task", "kl", "influence"), description="measures of importance", strict=False, min_length=1
    )
    block_layers: int = Field(1, ge=1, description="layers in a block, for 'angular'")


@dataclass(frozen=True)
class Costs:
    """What removing each candidate costs: layer i, or the block of `width` layers that begins at i."""

    values: list[float]
    width: int = 1
    whole: float | None = None  # score of the model with all its layers, where tasks were scored
    separation: tuple[float, float, float] | None = None  # mean candidate minus cheapest, 95 % interval
    runner_up: tuple[float, float, float] | None = None  # second cheapest minus cheapest

    def cheapest(self, count: int) -> list[int]:
        """The layers that go: `count` single ones, or the cheapest block; ties go to the deeper layer."""
        order = sorted(range(len(self.values)), key=lambda place: (self.values[place], -place))
        if self.width > 1:
            return list(range(order[0], order[0] + self.width))
        return sorted(order[:count])


class Scorer:
    """The tasks that layers are scored on, and how much of a model is read at once."""

    def __init__(
        self,
        tasks: Sequence[Task],
        settings: ScoringSettings,
        work: Path,
        report: Report,
        *,
        pad_id: int,
        with_kl: bool,
    ) -> None:
        """`with_kl`: measure KL beside the scores, in the same passes. Raises InputError: nothing to score."""
        self.read = [task for task in tasks if isinstance(task, ReadTask)]
        self.answered = [task for task in tasks if isinstance(task, AnsweredTask)]
        self.settings, self.work, self.report = settings, work, report
        self.pad_id, self.with_kl = pad_id, with_kl
        self.rows: list[Row] = [row for task in self.read for row in task.rows]
        if not self.rows and not self.answered:
            raise InputError(
                "there is nothing to score layers on", hint="give `tasks`, or conversations as `data`"
            )

    def costs(
        self, kind: Importance, model: PreTrainedModel, identity: str, *, original: Any = None, width: int = 1
    ) -> Costs:
        """Costs of the layers of `model`, which `identity` names in the scratch files of an earlier try.

        Raises InputError when the tasks can not tell the cheapest candidate from the average one.
        """
        if kind in ("influence", "angular") and not self.rows:
            raise InputError(
                f"importance = {kind!r} reads text, and all tasks are generated",
                hint="add a task of choices, perplexity or copying, or set importance = 'task'",
            )
        if kind == "influence":
            found = block_influence(
                model, self.rows, self.report, pad_id=self.pad_id, batch_rows=self.settings.score_rows
            )
            return Costs(found.tolist())
        if kind == "angular":
            layers = len(model.model.layers)
            if width >= layers:
                raise ModelError(
                    f"a block of {width} layers can not go from a model of {layers}",
                    hint=f"set block_layers (or layers_per_step) to {layers - 1} at most",
                )
            found = angular_distances(
                model, self.rows, self.report,
                width=width, pad_id=self.pad_id, batch_rows=self.settings.score_rows,
            )  # fmt: skip
            return Costs(found.tolist(), width)
        whole, without = self.items(kind, model, identity, original)
        return _costs(whole, without)

    def items(
        self, kind: Importance, model: PreTrainedModel, identity: str, original: Any = None
    ) -> tuple[Items, list[Items]]:
        """(item scores of the whole model, of the model without each layer), higher is better.

        For "kl" a row is an item and its score is exp(-KL), so the whole model has 1 against itself.
        """
        settings, work = self.settings, self.work
        whole: Items = []
        without: list[Items] = [[] for _ in model.model.layers]
        if self.rows:
            found = leave_one_out(
                model, self.rows, self.report,
                pad_id=self.pad_id, work=work / "read", identity=identity, batch_rows=settings.score_rows,
                spill_bytes=settings.spill_bytes, with_kl=self.with_kl, original=original,
            )  # fmt: skip
            judge = _likeness if kind == "kl" else _scores
            whole += judge(self.read, found.whole)
            for items, readings in zip(without, found.without, strict=True):
                items += judge(self.read, readings)
        if kind == "kl" and not self.rows:
            raise InputError(
                "importance = 'kl' reads text, and all tasks are generated",
                hint="add a task of choices, perplexity or copying, or set importance = 'task'",
            )
        for number, task in enumerate(self.answered if kind == "task" else []):
            made = generate_without(
                model, task.prompts,
                answer_tokens=task.answer_tokens, stop_ids=task.stop_ids, pad_id=self.pad_id,
                report=self.report, batch_rows=settings.score_rows, work=work / f"answers-{number}",
                variants_at_once=MODELS_ANSWERING,
                identity=identity,
            )  # fmt: skip
            whole.append(task.scores(made.whole))
            for items, answers in zip(without, made.without, strict=True):
                items.append(task.scores(answers))
        return whole, without


def _scores(tasks: Sequence[ReadTask], readings: Sequence[Reading]) -> Items:
    return [task.scores(part) for task, part in zip(tasks, _by_task(tasks, readings), strict=True)]


def _likeness(tasks: Sequence[ReadTask], readings: Sequence[Reading]) -> Items:
    import numpy as np

    return [
        np.asarray([np.exp(-reading.kl.mean()) for reading in part if len(reading.kl)])
        for part in _by_task(tasks, readings)
    ]


def _by_task(tasks: Sequence[ReadTask], readings: Sequence[Reading]) -> list[Sequence[Reading]]:
    parts, start = [], 0
    for task in tasks:
        parts.append(readings[start : start + len(task.rows)])
        start += len(task.rows)
    return parts


def _costs(whole: Items, without: list[Items]) -> Costs:
    """Mean over tasks of the mean over items, and whether the cheapest candidate can be told from the rest."""
    score = mean_score(whole)
    values = [score - mean_score(items) for items in without]
    if broken := [place for place, value in enumerate(values) if not math.isfinite(value)]:
        raise ModelError(
            f"without layer {broken[0]} (of {len(values)}, as the model is) the scores are no numbers",
            hint="its weights hold NaN or infinity, or overflow: was it trained in fp16?",
        )
    if len(values) == 1:
        return Costs(values, whole=score)
    order = sorted(range(len(values)), key=values.__getitem__)
    cheapest = without[order[0]]
    average = [sum(items) / len(without) for items in zip(*without, strict=True)]  # [items] a task
    separation = overall_difference(cheapest, average)
    if separation[1] <= 0:
        count = sum(len(scores) for scores in whole)
        raise InputError(
            f"the scoring set is too small to tell layers apart: over {count} items the cheapest layer scores "
            f"{separation[0]:+.2g} [{separation[1]:+.2g}, {separation[2]:+.2g}] beside the average one",
            hint="raise max_items, add tasks, or set importance = 'influence', which needs no scores",
        )
    return Costs(values, 1, score, separation, overall_difference(cheapest, without[order[1]]))


def mean_score(items: Items) -> float:
    """Mean over tasks of the mean over items: a large task does not outweigh a small one."""
    return float(sum(float(scores.mean()) for scores in items) / len(items))


def scoring_tasks(
    settings: ScoringSettings, inputs: Inputs, folder: Path, load_tasks: LoadTasks, report: Report
) -> list[Task]:
    """The `tasks`; where none are given, the conversations of `data` (their answers, as perplexity)."""
    paths = many(inputs, "tasks") or many(inputs, "data")
    if not paths:
        raise InputError("there is nothing to score on", hint="give `tasks`, or conversations as `data`")
    longest = min(settings.max_tokens, context_tokens(folder))
    return load_tasks(paths, Tokenizer(folder), report, max_tokens=longest, max_items=settings.max_items)


def run(settings: Settings, inputs: Inputs, out: Path, report: Report, *, tasks: LoadTasks) -> Figures:
    """Write out/importance.json: the cost of each layer of `model` by its original number, by measure."""
    folder = one(inputs, "model")
    kept = kept_layers(folder)
    loaded = scoring_tasks(settings, inputs, folder, tasks, report)
    pad_id, with_kl = Tokenizer(folder).pad_id, "kl" in settings.measures
    scorer = Scorer(loaded, settings, out / ".work", report, pad_id=pad_id, with_kl=with_kl)
    model = load(folder)
    told: dict[str, Any] = {}
    figures: Figures = {"layers": len(kept.kept)}
    for measure in settings.measures:
        costs = scorer.costs(measure, model, "the model", width=settings.block_layers)
        gone = costs.cheapest(1)
        told[measure] = {
            "cost": {str(kept.kept[place]): value for place, value in enumerate(costs.values)},
            "width": costs.width,
            "whole": costs.whole,
            "separation": costs.separation,
            "runner_up": costs.runner_up,
        }
        figures[f"cheapest_{measure}"] = ", ".join(str(kept.kept[place]) for place in gone)
    write_json(
        out / "importance.json",
        {"original_layers": kept.original_layers, "kept": list(kept.kept), "measures": told},
    )
    return figures

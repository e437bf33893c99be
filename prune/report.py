"""Lay runs of layer pruning side by side: what each method keeps of the original's scores, at which depth.

Every model of every run is measured on the same tasks, which should not be those that chose the layers: a
method that picked its layers by a score looks better on that score. A model that two runs have in common is
measured once. Beside them stand the original and, where they are given, dense models: LayerKD prunes a model of
3B to .574 where a dense one of half the size has .601, so a pruned model is worth what a dense one of its size
is not (Kovalev & Tikhomirov 2025, Tables 2 and 3, Figures 9 and 10).

Not here: what is made of the measurements (summary.py), the page (page.py), the pictures (figures.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from foundation.errors import InputError, ModelError
from foundation.files import read_json, write_atomic, write_json
from foundation.model import context_tokens, load
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer
from prune.figures import draw
from prune.history import History, read_history
from prune.importance import LoadTasks
from prune.kept import kept_layers
from prune.page import page
from prune.speed import relative_speed
from prune.steps import model_digest
from prune.summary import summary
from prune.target import FileBytes

if TYPE_CHECKING:
    import numpy as np

GGUF_TYPE = "Q4_K_M"  # the type whose size the report shows


class Outcome(Protocol):
    """One task's result for one model."""

    @property
    def name(self) -> str: ...

    @property
    def scores(self) -> np.ndarray:
        """One an item, in [0, 1]."""

    @property
    def figures(self) -> Mapping[str, float]: ...


Measure = Callable[..., Sequence[Outcome]]
"""measure(model, loaded_tasks, pad_id, report, batch_rows=...) -> one outcome a task"""


class Settings(StageSettings):
    """What the page is called, and on how much the models are measured."""

    title: str = Field("Layer pruning", min_length=1, description="heading of the page")
    max_tokens: int = Field(1024, ge=8, description="longest item that is used; the model's context if shorter")
    max_items: int = Field(500, ge=2, description="items of each task that are used")
    batch_rows: int = Field(16, ge=1, description="rows that go through a model at once")


def run(
    settings: Settings,
    inputs: Inputs,
    out: Path,
    report: Report,
    *,
    tasks: LoadTasks,
    measure: Measure,
    gguf_bytes: FileBytes,
) -> Figures:
    """Write out/report.json, out/report.md, out/score.svg, out/order.svg and out/frequency.svg.

    All bytes follow from inputs and settings, except report.json's `machine_bound` and the speeds in report.md.
    Raises ArtifactError for steps that are not whole, ModelError for runs that pruned another model, InputError
    for runs that can not be told apart.
    """
    original = one(inputs, "model")
    histories = read_histories(many(inputs, "steps"), original)
    dense = dense_names(many(inputs, "dense"))
    folders = {"original": (histories[0].steps[0].original, original)}
    for number, history in enumerate(histories, 1):
        for step, folder in zip(history.steps, history.models, strict=True):
            folders[step_name(number, step.step)] = step.model, folder
    folders |= {name: (model_digest(folder), folder) for name, folder in dense.items()}
    bench = Bench(settings, original, many(inputs, "tasks"), out / ".work", report, tasks, measure, gguf_bytes)
    measured = bench.all(folders)
    found = summary(settings.title, histories, measured, list(dense))
    write_json(out / "report.json", found)
    write_atomic(out / "report.md", page(found))
    for name, picture in draw(found).items():
        write_atomic(out / name, picture)
    return _figures(found)


def read_histories(folders: Sequence[Path], original: Path) -> list[History]:
    """All runs, which must have pruned `original`. Raises ArtifactError, ModelError, InputError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("the same steps are given twice", hint="name each run once in `steps`")
    histories = [read_history(folder) for folder in folders]
    kept, digest = kept_layers(original), model_digest(original)
    hint = "lay runs of one model side by side, and give that model as `model`"
    if any((h.original_layers, h.base) != (kept.original_layers, kept.kept) for h in histories):
        said = ", ".join(f"{h.label}: {len(h.base)} of {h.original_layers}" for h in histories)
        raise ModelError(
            f"the model has {len(kept.kept)} of {kept.original_layers} layers; the runs began with {said}",
            hint=hint,
        )
    if others := [history.label for history in histories if history.steps[0].original != digest]:
        raise ModelError(f"{', '.join(others)}: cut from a model with other weights than `model`", hint=hint)
    methods = {history.label: history.method for history in histories}
    for history in histories:
        if history.method != methods[history.label]:
            raise InputError(
                f"two runs are labelled {history.label!r} and were not made in the same way",
                hint="give each method its own `label` in prune.iterate; only the seed may differ under one",
            )
    return histories


def step_name(run_number: int, step: int) -> str:
    return f"run {run_number}, step {step}"


def dense_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Dense models by a short name: the folder's, or that of the stage whose `model` it is."""
    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.parent.name if folder.name == "model" and folder.parent.name else folder.name
        name = name if name.startswith("dense") else f"dense {name or 'model'}"
        copies = sum(other == name or other.startswith(f"{name} (") for other in named)
        named[f"{name} ({copies + 1})" if copies else name] = folder
    return named


class Bench:
    """Measures models one by one; each result is on the disk before the next begins."""

    def __init__(
        self,
        settings: Settings,
        original: Path,
        task_files: tuple[Path, ...],
        work: Path,
        report: Report,
        tasks: LoadTasks,
        measure: Measure,
        gguf_bytes: FileBytes,
    ) -> None:
        self.settings, self.original, self.task_files, self.work = settings, original, task_files, work
        self.report, self.tasks, self.measure, self.gguf_bytes = report, tasks, measure, gguf_bytes
        self._loaded: tuple[tuple[str, int], list[Any]] | None = None
        self._keys: dict[Path, tuple[str, int]] = {}
        self._original_model: Any = None

    def all(self, folders: Mapping[str, tuple[str, Path]]) -> dict[str, dict[str, Any]]:
        """name -> what was measured; `folders` are told with the digests of their models, and of equal ones
        one is measured. A kill costs at most one model.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        found = {}
        for done, (name, (digest, folder)) in enumerate(folders.items()):
            self.report.progress(done, len(folders), "model")
            stop_if_asked(self.report)
            place = self.work / f"{digest}.json"
            result = read_json(place)
            if result is None:
                result = {"content": digest, **self._one(name, folder)}
                write_json(place, result)
            found[name] = result
        self.report.progress(len(folders), len(folders), "model")
        return found

    def _one(self, name: str, folder: Path) -> dict[str, Any]:
        shape = ModelShape.from_folder(folder)
        file_bytes = self.gguf_bytes(folder, GGUF_TYPE)  # before the hours: it may refuse the model
        if self._original_model is None:
            self._original_model = load(self.original)
        model = self._original_model if folder == self.original else load(folder)
        speed, ratio = relative_speed(model, self._original_model)
        return {
            "layers": shape.layers,
            "parameters": shape.parameters(),
            "gguf_bytes": {GGUF_TYPE: file_bytes},
            "same_items": self._items_key(folder) == self._items_key(self.original),
            "tasks": self._scores(name, folder, model),
            "tokens_per_second": speed,
            "times_original": ratio,
        }

    def _items_key(self, folder: Path) -> tuple[str, int]:
        """What decides how task files become items: equal keys, equal items."""
        if folder not in self._keys:
            longest = min(self.settings.max_tokens, context_tokens(folder))
            self._keys[folder] = Tokenizer(folder).digest, longest
        return self._keys[folder]

    def _scores(self, name: str, folder: Path, model: Any) -> dict[str, Any]:
        """task -> its items' scores and its figures. Raises ModelError for a score outside [0, 1]."""
        key, tokenizer = self._items_key(folder), Tokenizer(folder)
        if self._loaded is None or self._loaded[0] != key:
            loaded = self.tasks(
                self.task_files, tokenizer, self.report, max_tokens=key[1], max_items=self.settings.max_items
            )
            self._loaded = key, loaded
        outcomes = self.measure(
            model, self._loaded[1], tokenizer.pad_id, self.report, batch_rows=self.settings.batch_rows
        )
        found = {}
        for outcome in outcomes:
            scores = [float(score) for score in outcome.scores]
            if not scores or not all(0 <= score <= 1 for score in scores):
                raise ModelError(
                    f"{name}: its scores of {outcome.name} are not numbers between 0 and 1",
                    hint="its weights may hold NaN; prune again with a lower learning rate",
                )
            figures = {key: float(value) for key, value in outcome.figures.items()}
            finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
            found[outcome.name] = {"scores": scores, "figures": finite}
        return found


def _figures(found: dict[str, Any]) -> Figures:
    """What the manifest shows: how much was compared, and the best method where all can be compared."""
    figures: Figures = {
        "methods": len(found["methods"]),
        "runs": len(found["runs"]),
        "models": len(found["models"]),
    }
    depth = found["deepest_common"]
    scores = {
        method["label"]: row["score"]["mean"]
        for method in found["methods"]
        for row in method["depths"]
        if row["layers_removed"] == depth
    }
    if scores:
        best = max(scores, key=scores.__getitem__)
        figures |= {"compared_at_layers_removed": depth, "best": best, "best_score": scores[best]}
    return figures

"""Score one model: bits per byte and tasks by its Hugging Face folder, valid programmes by its GGUF file.

scores.json has what was asked for: "bits_per_byte" by text, "tasks" by task (score, low, high, items, and
the figures of its kind), "task_mean" over them, "programmes", "bytes" of the GGUF. Intervals are those
of foundation/statistics.py.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from evaluation.bits import bits_per_byte
from evaluation.names import names_of
from evaluation.programmes import valid_programmes
from evaluation.tasks import load_tasks, measure
from foundation import gguf_header
from foundation.dataio import documents
from foundation.errors import InputError
from foundation.model import context_tokens, load
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one
from foundation.statistics import Interval, mean_interval, stratified
from foundation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Settings(StageSettings):
    """What the scores are called, and on how much they are measured."""

    label: str = Field(min_length=1, description="name of the model in tables")
    window_tokens: int = Field(
        256, ge=8, description="longest context for bits per byte; the model's own if shorter"
    )
    max_documents: int = Field(400, ge=1, description="documents of each text that are scored")
    max_profiles: int = Field(200, ge=1, description="held-out profiles of each language that are answered")
    max_items: int = Field(200, ge=1, description="items of each task that are scored, the first of its file")
    task_tokens: int = Field(
        1024, ge=8, description="longest item of a task that is scored; the model's own context if shorter"
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/scores.json: what was asked for by the inputs that are there."""
    if "model" not in inputs and "gguf" not in inputs:
        raise InputError("nothing to score", hint="reads = { model = ... } or { gguf = ... } is needed")
    texts, tasks = many(inputs, "texts"), many(inputs, "tasks")
    if ("model" in inputs) != bool(texts or tasks):
        raise InputError(
            "bits per byte need both a model and texts, tasks a model",
            hint="reads = { model = ..., texts = ..., tasks = ... }, one or both of the two",
        )
    if "profiles" in inputs and "gguf" not in inputs:
        raise InputError(
            "programmes are generated from a GGUF file", hint="reads = { gguf = ..., profiles = ... }"
        )
    scores: dict[str, Any] = {"label": settings.label}
    figures: Figures = {}
    if "model" in inputs:
        folder = one(inputs, "model")
        tokenizer, model = Tokenizer(folder), load(folder)
        if texts:
            window_tokens = min(settings.window_tokens, context_tokens(folder))
            bits = _bits(model, tokenizer, texts, report, window_tokens, settings.max_documents)
            scores["bits_per_byte"] = bits
            figures |= {f"bits_per_byte_{name}": value for name, value in bits.items()}
        if tasks:
            max_tokens = min(settings.task_tokens, context_tokens(folder))
            scores |= _tasks(model, tokenizer, tasks, report, max_tokens, settings.max_items)
            figures |= {f"task_{name}": task["score"] for name, task in scores["tasks"].items()}
            figures["task_mean"] = scores["task_mean"]["score"]
    if "gguf" in inputs:
        gguf = gguf_header.find(one(inputs, "gguf"))
        scores["bytes"] = sum(part.stat().st_size for part in gguf_header.shards(gguf))
        if "profiles" in inputs:
            found = valid_programmes(gguf, one(inputs, "profiles"), report, settings.max_profiles)
            scores["programmes"] = found
            figures["valid_share"] = found["mean"]
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def _bits(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: tuple[Path, ...],
    report: Report,
    window_tokens: int,
    max_documents: int,
) -> dict[str, float]:
    """Bits per byte by the text's name."""
    return {
        name: bits_per_byte(
            model,
            tokenizer,
            list(islice(documents([path]), max_documents)),
            report,
            window_tokens=window_tokens,
        )
        for name, path in zip(names_of(texts, "texts"), texts, strict=True)
    }


def _tasks(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    paths: tuple[Path, ...],
    report: Report,
    max_tokens: int,
    max_items: int,
) -> dict[str, Any]:
    """The "tasks" and "task_mean" of scores.json, each mean with its interval."""
    tasks = load_tasks(paths, tokenizer, report, max_tokens=max_tokens, max_items=max_items)
    measured = measure(model, tasks, tokenizer.pad_id, report)

    def said(interval: Interval) -> dict[str, float]:
        return {"score": interval.mean, "low": interval.low, "high": interval.high}

    return {
        "tasks": {
            task.name: {**said(mean_interval(task.scores)), "items": len(task.scores), **task.figures}
            for task in measured
        },
        "task_mean": said(stratified([task.scores for task in measured])),
    }

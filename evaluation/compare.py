"""One table out of many scores: a row a model, and what it should be read against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from foundation.errors import ArtifactError, InputError
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many


class Settings(StageSettings):
    """What the table is called, and whose answer is shown below it."""

    title: str = Field("scores", description="title of the table")
    answer_of: str = Field("", description="label of the model whose first answer is shown; empty = none")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/table.json from `scores`, the `facts` of the world and a `bundle`."""
    scores = [_read(path, "label") for path in many(inputs, "scores")]
    texts = sorted({name for score in scores for name in score.get("bits_per_byte", {})})
    languages = sorted({name for score in scores for name in _languages(score)})
    tasks = list(dict.fromkeys(name for score in scores for name in score.get("tasks", {})))
    answers = {score["label"]: score["programmes"]["sample"] for score in scores if "programmes" in score}
    if settings.answer_of and settings.answer_of not in answers:
        raise InputError(
            f"answer_of = {settings.answer_of!r} wrote no programmes",
            hint=f"these did: {', '.join(answers) or 'none'}",
        )
    table = {
        "title": settings.title,
        "columns": [
            "model",
            *(f"bits/byte {text.replace('_', ' ')}" for text in texts),
            *(f"valid {name}" for name in languages),
            "valid mean",
            *(name.removeprefix("tasks_").replace("_", " ") for name in tasks),
            *(["task mean"] if tasks else []),
            "MB",
        ],
        "rows": [_row(score, texts, languages, tasks) for score in scores],
        "notes": _notes(inputs, scores),
        "answer": answers.get(settings.answer_of),
    }
    (out / "table.json").write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"rows": len(scores)}


def _notes(inputs: Inputs, scores: list[dict[str, Any]]) -> list[str]:
    """What the table should be read against."""
    notes = []
    for path in many(inputs, "facts"):
        share = _read(path, "constant_share")["constant_share"]
        notes.append(f"the best constant answer is valid for {share:.3f} of the held-out profiles")
    for path in many(inputs, "bundle"):
        notes += _fitting(_read(path / "bundle.json", "memory")["memory"])
    parts = [score["programmes"][n] for score in scores for n in _languages(score)]
    if parts:
        error, count = max(p["standard_error"] for p in parts), min(p["count"] for p in parts)
        notes.append(f"shares of {count} held-out profiles a language; standard error at most {error:.3f}")
    intervals = [task for score in scores for task in score.get("tasks", {}).values()]
    if intervals:
        half = max((task["high"] - task["low"]) / 2 for task in intervals)
        fewest = min(task["items"] for task in intervals)
        notes.append(f"tasks of {fewest} items or more; 95 % intervals of at most +-{half:.3f}")
    return notes


def _row(score: dict[str, Any], texts: list[str], languages: list[str], tasks: list[str]) -> list[str]:
    bits, valid = score.get("bits_per_byte", {}), score.get("programmes", {})
    scored, mean = score.get("tasks", {}), score.get("task_mean")
    return [
        score["label"],
        *(f"{bits[text]:.3f}" if text in bits else "" for text in texts),
        *(f"{valid[n]['share']:.3f}" if n in valid else "" for n in languages),
        f"{valid['mean']:.3f}" if valid else "",
        *(f"{scored[name]['score']:.3f}" if name in scored else "" for name in tasks),
        *([f"{mean['score']:.3f}" if mean and len(scored) == len(tasks) else ""] if tasks else []),
        f"{score['bytes'] / 1e6:.2f}" if "bytes" in score else "",
    ]


def _fitting(memory: dict[str, Any]) -> list[str]:
    """How many conversations each exported file serves on a small card, as the bundle's maker found."""
    card, rows = f"{memory['card_bytes'] / 2**30:.0f} GiB card", memory["files"]
    said = "{}: a {} holds {} conversations of {} tokens"
    return [said.format(Path(r["file"]).name, card, r["slots"], r["context_tokens"]) for r in rows]


def _languages(score: dict[str, Any]) -> list[str]:
    return [name for name in score.get("programmes", {}) if name not in ("mean", "sample")]


def _read(path: Path, key: str) -> dict[str, Any]:
    """The JSON object in `path`, which must have `key`. Raises ArtifactError."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: can not be read: {error}") from None
    if not isinstance(found, dict) or key not in found:
        raise ArtifactError(f"{path}: no {key!r} in it", hint="read a file that a Samovar stage wrote")
    return found

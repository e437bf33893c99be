"""Iterative layer pruning: score every layer, remove one, heal, and again (LayerKD).

The teacher of every healing is the original model. Each round is kept until the stage is done, so a kill costs
at most one checkpoint interval of one healing. How healing and scoring work is not this room's affair: the
stage table hands them in.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from foundation.dataio import conversations
from foundation.errors import ModelError
from foundation.files import write_json
from foundation.model import context_tokens, load, save
from foundation.report import Report
from foundation.rows import chat_rows
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings
from prune.cut import cut
from prune.importance import Score, leave_one_out


class Settings(TuneSettings):
    """How many layers go, and how the rest is healed after each (steps and the like are one healing's)."""

    remove_layers: int = Field(1, ge=1, description="layers to remove, one at a time")
    sample_rows: int = Field(128, ge=1, description="conversations on which layers are scored")
    trains: Literal["neighbours", "all"] = Field(
        "neighbours", description="what heals: the layers beside the gap (published), or every weight"
    )
    hidden_weight: float = Field(1.0, ge=0, description="weight of the hidden-state MSE against KL")
    max_tokens: int = Field(1024, ge=8, description="longest conversation that is used")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report, *, heal: Any, score: Score) -> Figures:
    """Write out/model, `model` with remove_layers fewer layers, and out/removed.json: the rounds and scores."""
    folder, work = one(inputs, "model"), out / ".work"
    tokenizer = Tokenizer(folder)
    longest = min(settings.max_tokens, context_tokens(folder))
    rows, _ = chat_rows(conversations(many(inputs, "data")), tokenizer, longest)
    teacher = load(folder)
    layers = teacher.config.num_hidden_layers
    if settings.remove_layers >= layers:
        raise ModelError(f"remove_layers = {settings.remove_layers}; the model has {layers}, and one must stay")
    rounds: list[dict[str, Any]] = []
    current = folder
    for number in range(settings.remove_layers):
        place = work / f"round-{number}"
        if not (place / "round.json").is_file():
            facts = _round(settings, current, teacher, rounds, rows, tokenizer, place, report, heal, score)
            write_json(place / "round.json", facts)
        rounds.append(json.loads((place / "round.json").read_text()))
        current = place / "model"
    shutil.copytree(current, out / "model", dirs_exist_ok=True)
    (out / "removed.json").write_text(json.dumps({"layers": layers, "rounds": rounds}, indent=2) + "\n")
    return {
        "layers": layers - settings.remove_layers,
        "removed": ", ".join(str(r["removed"]) for r in rounds),
        "loss_before": rounds[0]["loss_before"],
        "loss_cut": rounds[-1]["loss_cut"],
        "loss_healed": rounds[-1]["loss_healed"],
    }


def _round(
    settings: Settings,
    current: Path,
    teacher: Any,
    rounds: list[dict[str, Any]],
    rows: list[Any],
    tokenizer: Tokenizer,
    place: Path,
    report: Report,
    heal: Any,
    score: Score,
) -> dict[str, Any]:
    """One removal: the least valuable layer goes, its neighbours heal, the model is saved in place/model."""
    sample, pad_id = rows[: settings.sample_rows], tokenizer.pad_id
    model = load(current)
    kept = list(range(teacher.config.num_hidden_layers))
    for earlier in rounds:
        del kept[earlier["at"]]
    before = score(model, sample, pad_id)
    scores = leave_one_out(model, sample, score, report, pad_id=pad_id)
    at = min(range(len(scores)), key=scores.__getitem__)
    cut(model, at)
    removed = kept.pop(at)
    report.note(f"layer {removed} goes: {before:.4f} nats per token with it, {scores[at]:.4f} without")
    if settings.trains == "all":
        trained = list(range(len(kept)))
    else:
        trained = sorted({max(at - 1, 0), min(at, len(kept) - 1)})
    heal(
        model, teacher, kept, trained, rows, settings, place / "heal", report,
        pad_id=pad_id, hidden_weight=settings.hidden_weight,
    )  # fmt: skip
    healed = score(model, sample, pad_id)
    save(model, current, place / "model")
    return {
        "removed": removed,
        "at": at,
        "scores": scores,
        "loss_before": before,
        "loss_cut": scores[at],
        "loss_healed": healed,
    }

"""Score one model: bits per byte of texts (its Hugging Face folder), valid programmes (its GGUF file)."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from evaluation.bits import bits_per_byte
from evaluation.programmes import valid_programmes
from foundation.dataio import documents
from foundation.errors import InputError
from foundation.model import context_tokens, load
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer


class Settings(StageSettings):
    """What the scores are called, and on how much they are measured."""

    label: str = Field(min_length=1, description="name of the model in tables")
    window_tokens: int = Field(
        256, ge=8, description="longest context for bits per byte; the model's own if shorter"
    )
    max_documents: int = Field(400, ge=1, description="documents of each text that are scored")
    max_profiles: int = Field(200, ge=1, description="held-out profiles of each language that are answered")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Write out/scores.json: what was asked for by the inputs that are there."""
    if "model" not in inputs and "gguf" not in inputs:
        raise InputError("nothing to score", hint="reads = { model = ... } or { gguf = ... } is needed")
    if ("model" in inputs) != bool(many(inputs, "texts")):
        raise InputError("bits per byte need both a model and texts", hint="give both roles, or neither")
    if "profiles" in inputs and "gguf" not in inputs:
        raise InputError(
            "programmes are generated from a GGUF file", hint="reads = { gguf = ..., profiles = ... }"
        )
    scores: dict[str, Any] = {"label": settings.label}
    figures: Figures = {}
    if "model" in inputs:
        scores["bits_per_byte"] = _bits(settings, one(inputs, "model"), many(inputs, "texts"), report)
        figures |= {f"bits_per_byte_{name}": value for name, value in scores["bits_per_byte"].items()}
    if "gguf" in inputs:
        gguf = one(inputs, "gguf")
        scores["bytes"] = gguf.stat().st_size
        if "profiles" in inputs:
            found = valid_programmes(gguf, one(inputs, "profiles"), report, settings.max_profiles)
            scores["programmes"] = found
            figures["valid_share"] = found["mean"]
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def _bits(settings: Settings, folder: Path, texts: tuple[Path, ...], report: Report) -> dict[str, float]:
    """Bits per byte by the text file's name; by folder and name where two files are called the same."""
    tokenizer, model = Tokenizer(folder), load(folder)
    window_tokens = min(settings.window_tokens, context_tokens(folder))
    stems = [path.stem for path in texts]
    names = [p.stem if stems.count(p.stem) == 1 else f"{p.parent.name}.{p.stem}" for p in texts]
    if len(set(names)) < len(names):
        raise InputError(f"two texts are called the same: {', '.join(names)}", hint="rename one of the files")
    return {
        name: bits_per_byte(
            model,
            tokenizer,
            list(islice(documents([path]), settings.max_documents)),
            report,
            window_tokens=window_tokens,
        )
        for name, path in zip(names, texts, strict=True)
    }

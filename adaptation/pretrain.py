"""Continued pre-training: an extended model reads the new language.

In LEP only embeddings and LM head train, so that what was learned can be carried to another model whose layers
are the same (arXiv 2412.21140, section 3); `trains = "all"` is the way of Vikhr. A share of the old language in
the corpus keeps it from being forgotten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from foundation.dataio import documents
from foundation.losses import cross_entropy
from foundation.model import load, save
from foundation.ranks import is_main
from foundation.report import Report
from foundation.rows import pack
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune


class Settings(TuneSettings):
    """What is trained, and on rows of which length."""

    trains: Literal["embeddings", "all"] = Field(
        "embeddings", description="embeddings and LM head alone (LEP), or every weight"
    )
    block_tokens: int = Field(128, ge=8, description="tokens in one row of training text")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Train `model` on `corpus`; writes out/model."""
    folder, work = one(inputs, "model"), out / ".work"
    tokenizer = Tokenizer(folder)
    rows = pack(documents(many(inputs, "corpus")), tokenizer, settings.block_tokens, work)
    report.note(f"{len(rows)} rows of {settings.block_tokens} tokens")
    model = load(folder)
    if settings.trains == "embeddings":
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    figures = tune(model, rows, cross_entropy, settings, work, report, pad_id=tokenizer.pad_id)
    if is_main():
        save(model, folder, out / "model")
    return {**figures, "rows": len(rows)}

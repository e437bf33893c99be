"""Continued pre-training: an extended model reads the new language.

What trains is a setting (trained.py). In LEP only embeddings and LM head do, so that what was learned can be
carried to another model whose layers are the same (arXiv 2412.21140, section 3); later RuAdapt adds LoRA, and
Vikhr trains every weight with a KL against the model as it was (reference_kl.py), lest it forget. A share of
the old language in the corpus keeps it from being forgotten too; `weights` says how large it is.

Rows are documents end to end, and none sees another.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from adaptation.crossing import Crossing, new_tokens, survey
from adaptation.reference_kl import ReferenceLoss
from adaptation.trained import VOCABULARY, Part, Trained, made_ready, refuse_not_finite, train_rows
from foundation.adapters import Lora
from foundation.curves import CURVES, Curves
from foundation.dataio import documents
from foundation.errors import InputError, ModelError
from foundation.losses import cross_entropy
from foundation.mixture import Mixture, check_weights
from foundation.model import context_tokens, load, save
from foundation.ranks import is_main
from foundation.report import Report
from foundation.rows import PackedRows, Row, Rows, pack
from foundation.stage import Figures, Inputs, Reads, many, one
from foundation.tokenizer import Tokenizer
from foundation.tune import Loss, Order, TuneSettings, tune

SHOWN_FILES = 8
MOST_EXCEPTIONS = 0.5  # share of the counted tokens without KL from which the reference is a stranger
OF_ADAPTERS = ("lora_rank", "lora_alpha", "base_precision")


class Settings(TuneSettings):
    """What is trained, on which mixture of rows, and how far it may go from the model that it was."""

    trains: list[Part] = Field(
        ["embeddings", "head"],
        min_length=1,
        description="any of embeddings, head, layers, lora; the first two are one matrix in a tied model",
    )
    rows: Literal["all", "new"] = Field(
        "all",
        description="of embeddings and head: all, or of the tokens alone that the reference does not have",
    )
    lora_rank: int = Field(32, ge=1, description="rank of LoRA on the 7 linear modules, with 'lora' in trains")
    lora_alpha: int = Field(32, ge=1, description="LoRA alpha (scale = alpha / rank)")
    base_precision: Literal["fp32", "bf16", "nf4"] = Field(
        "fp32", description="of the frozen weights beside LoRA; nf4 is QLoRA and needs bitsandbytes"
    )
    block_tokens: int = Field(128, ge=8, description="tokens in one row of training text")
    weights: list[float] = Field(
        [], description="shares of the tokens, one for each file of corpus; empty = all rows alike"
    )
    kl_weight: float = Field(0.0, ge=0, le=1000, description="weight of KL(model || reference) beside CE")

    @model_validator(mode="after")
    def _parts_go_together(self) -> Settings:
        if repeated := sorted({part for part in self.trains if self.trains.count(part) > 1}):
            raise ValueError(f"trains names {', '.join(repeated)} more than once")
        if {"lora", "layers"} <= set(self.trains):
            raise ValueError(
                "trains: 'lora' stands beside layers that stay as they are, 'layers' trains them; take one"
            )
        if self.rows == "new" and not set(VOCABULARY) & set(self.trains):
            raise ValueError(
                f"rows = 'new' is of embeddings and head, but trains = {self.trains}; add one of them"
            )
        if "lora" not in self.trains and (idle := self.changed(OF_ADAPTERS)):
            raise ValueError(f"{', '.join(idle)}: no effect without 'lora' in trains")
        if self.weights:
            try:
                check_weights(self.weights, len(self.weights))
            except InputError as error:
                raise ValueError(f"weights: {error.message}; {error.hint}") from None
        return self

    @property
    def uses_reference(self) -> bool:
        return self.rows == "new" or self.kl_weight > 0


def disagreements(settings: Settings, reads: Reads) -> list[str]:
    """What can not go together in a recipe: settings of a reference without one, weights and corpora."""
    problems = _reference_trouble(settings, "reference" in reads)
    corpora, weights = reads.get("corpus", ()), settings.weights
    some_patterns = any(isinstance(corpus, str) and has_magic(corpus) for corpus in corpora)
    if weights and (len(weights) < len(corpora) or (len(weights) > len(corpora) and not some_patterns)):
        problems.append(f"{len(weights)} weights for {len(corpora)} corpora: {weights}; one for each is needed")
    return problems


def _reference_trouble(settings: Settings, there: bool) -> list[str]:
    if there and not settings.uses_reference:
        return ["a reference has no effect with kl_weight = 0 and rows = 'all'; do not read it"]
    wanted = {
        "rows = 'new'": settings.rows == "new",
        f"kl_weight = {settings.kl_weight}": settings.kl_weight > 0,
    }
    named = " and ".join(name for name, used in wanted.items() if used)
    return [f"{named}: needs the role `reference`, the model before its vocabulary changed"] * (
        settings.uses_reference and not there
    )


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Train `model` on `corpus`, with an eye on `reference`; writes out/model and out/curves.jsonl.

    Raises InputError when inputs do not go with the settings, ModelError when model, reference and length of
    the rows do not go together or a weight is not finite: all before the first step.
    """
    folder, work = one(inputs, "model"), out / ".work"
    if problems := _reference_trouble(settings, "reference" in inputs):
        raise InputError("\n".join(problems), hint="reads = { reference = ... } goes with these settings alone")
    if settings.block_tokens > (context := context_tokens(folder)):
        raise ModelError(
            f"block_tokens = {settings.block_tokens}, but {folder} was made for {context}",
            hint=f"set block_tokens to {context} or less",
        )
    reference = one(inputs, "reference") if "reference" in inputs else None
    chosen = new_tokens(folder, reference) if settings.rows == "new" and reference else []
    crossing = Crossing(folder, reference) if settings.kl_weight and reference else None
    tokenizer = Tokenizer(folder)
    parts = _packed(settings, inputs, tokenizer, crossing, work)
    rows = sum(map(len, parts))
    report.note(f"{rows} rows of {settings.block_tokens} tokens")
    loss, figures = _loss(settings, parts, reference, crossing, report)

    lora = Lora(settings.lora_rank, settings.lora_alpha, settings.seed)
    model = made_ready(
        folder, settings.trains, lora, settings.base_precision, max_tokens=settings.block_tokens, report=report
    )
    held = train_rows(model, chosen) if chosen else []
    resting = sum(  # numbers in rows that do not move
        parameter.numel() - parameter[0].numel() * len(chosen)
        for name, parameter in model.named_parameters()
        if name in held
    )
    order = _mixed(settings, parts) if settings.weights else parts[0]
    figures |= tune(model, order, loss, settings, work, report, pad_id=tokenizer.pad_id, undecayed=held)
    if is_main():
        if "lora" in settings.trains:
            trained = Trained(model)
            del model, loss  # their memory is wanted for the base as it is stored
            model = trained.on(folder)
        refuse_not_finite(model, folder)
        save(model, folder, out / "model")
        shutil.copyfile(work / CURVES, out / CURVES)
    if chosen:
        figures |= {"new_rows": len(chosen), "trained_parameters": int(figures["trained_parameters"]) - resting}
    return {**figures, **_means(settings, work), "rows": rows}


def _packed(
    settings: Settings, inputs: Inputs, tokenizer: Tokenizer, crossing: Crossing | None, work: Path
) -> list[PackedRows]:
    """The corpus in rows: each of its files alone where they are mixed by weights, else all together."""
    files = many(inputs, "corpus")
    if settings.weights and len(settings.weights) != len(files):
        named = ", ".join(path.name for path in files[:SHOWN_FILES]) + ", ..." * (len(files) > SHOWN_FILES)
        raise InputError(
            f"{len(settings.weights)} weights for {len(files)} files of corpus: {named}",
            hint="give one for each file, in this order; a pattern brings one corpus for every match, and a "
            "corpora.prepare stage makes one of them all",
        )
    groups = [(path,) for path in files] if settings.weights else [files]
    return [
        pack(
            documents(group),
            tokenizer,
            settings.block_tokens,
            work / f"part-{number}" if settings.weights else work,
            apart=True,
            marks=crossing.exact if crossing else None,
            marks_from=crossing.digest if crossing else "",
        )
        for number, group in enumerate(groups, start=1)
    ]


def _mixed(settings: Settings, parts: Sequence[Rows[Row]]) -> Order:
    return lambda needed: Mixture(parts, settings.weights, needed, settings.seed)


def _loss(
    settings: Settings,
    parts: Sequence[PackedRows],
    reference: Path | None,
    crossing: Crossing | None,
    report: Report,
) -> tuple[Loss, Figures]:
    """(the loss, what is known of it before the first step)"""
    if reference is None or crossing is None:
        return cross_entropy, {}
    counted, exceptions = survey(parts, crossing, context_tokens(reference), report)
    report.note(
        f"{exceptions} of {counted} counted tokens have no KL: the reference would cut the text otherwise"
    )
    if exceptions > MOST_EXCEPTIONS * counted:
        raise ModelError(
            f"{reference} cuts the text otherwise at {exceptions / counted:.0%} of the tokens (no KL there); "
            f"{MOST_EXCEPTIONS:.0%} is allowed",
            hint="the reference is the model before its vocabulary changed; without KL: kl_weight = 0",
        )
    model = load(reference, precision=settings.precision)
    refuse_not_finite(model, reference)
    figures: Figures = {"kl_exceptions": exceptions, "kl_exception_share": exceptions / counted}
    return ReferenceLoss(model, crossing, settings.kl_weight), figures


def _means(settings: Settings, work: Path) -> Figures:
    """The parts of the loss over the last tenth of the steps, where it has parts."""
    if not settings.kl_weight:
        return {}
    last = Curves.last(work / CURVES, math.ceil(settings.steps / 10))
    return {name: sum(line[name] for line in last) / len(last) for name in ("ce", "kl")}

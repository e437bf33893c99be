"""Supervised training on conversations: plain instruction tuning, or a student beside a stored teacher.

loss = "ce" is every supervised fine-tuning in Samovar, and with a teacher's texts as data it is sequence-level
KD (Kim & Rush 2016). Any other name of distill.losses reads the teacher's distributions from a store that
distill.capture wrote once: one line of a recipe turns the one into the other. In all of them the loss stands on
the response tokens only.

Which weights move: all of them, or adapters beside a frozen base (lora_rank > 0; base_precision = "nf4" is
QLoRA). What is written has the precision of training (fp32) in the first case, and that of the model read in
the second: a bf16 model stays one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from distill.losses import LOSSES, make_loss
from distill.store import TopKStore
from foundation.adapters import Backend, Lora, merged, save_adapters, taken_off, with_adapters
from foundation.curves import CURVES
from foundation.dataio import conversations
from foundation.errors import InputError
from foundation.model import context_tokens, load, save
from foundation.ranks import is_main
from foundation.report import Report
from foundation.rows import JoinedRows, Row, Rows, chat_rows
from foundation.stage import Figures, Inputs, Reads, many, one
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

OF_A_TEACHER = ("kl_lambda", "ce_weight", "temperature")
OF_ADAPTERS = ("lora_alpha", "lora_layers", "base_precision", "backend")


class Settings(TuneSettings):
    """Which loss, and which weights it moves."""

    loss: Literal[
        "ce", "published", "published_code", "shift_invariant", "forward_kl", "renormalised_kl",
        "reverse_kl", "sampled_kl",
    ] = Field("ce", description="cross-entropy alone, or with a stored teacher's distributions")  # fmt: skip
    kl_lambda: float = Field(0.2, ge=0, description="weight of KD against cross-entropy (RuAdapt-KD, eq. 1)")
    ce_weight: float = Field(1.0, ge=0, description="weight of cross-entropy beside KD; 0 = KD alone")
    temperature: float = Field(1.0, ge=0.05, le=100, description="of teacher and student in KD: the store's")
    max_tokens: int = Field(1024, ge=8, description="longest conversation that is used")
    packing: bool = Field(
        False, description="join short conversations into rows of max_tokens; none sees another"
    )
    lora_rank: int = Field(0, ge=0, description="rank of LoRA on the 7 linear modules; 0 = all weights train")
    lora_alpha: int = Field(128, ge=1, description="LoRA alpha (scale = alpha / rank)")
    lora_layers: Literal["all", "ends"] = Field(
        "all", description="which layers get LoRA; ends = the first and the last alone (LEP's calibration)"
    )
    base_precision: Literal["fp32", "bf16", "nf4"] = Field(
        "fp32", description="of the frozen weights beside LoRA; nf4 is QLoRA and needs bitsandbytes"
    )
    backend: Backend = Field(
        "auto", description="of LoRA; auto = unsloth where it and a GPU are at hand, else peft"
    )

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> Settings:
        if self.loss == "ce" and (idle := self.changed(OF_A_TEACHER)):
            raise ValueError(f"{', '.join(idle)}: no effect with loss = 'ce'; set loss = 'published_code'")
        if self.loss != "ce" and self.kl_lambda == 0:
            raise ValueError("kl_lambda = 0 takes nothing from the teacher; set loss = 'ce'")
        if not self.lora_rank and (idle := self.changed(OF_ADAPTERS)):
            raise ValueError(f"{', '.join(idle)}: of LoRA's base alone; set lora_rank, or leave it out")
        if self.packing and self.backend == "unsloth":
            raise ValueError(
                "packing: unsloth's attention does not see where a conversation ends; backend = 'peft'"
            )
        return self


def disagreements(settings: Settings, reads: Reads) -> list[str]:
    """What can not go together in a recipe: the loss, and the capture that it reads."""
    kind = LOSSES[settings.loss]
    problems = []
    if bool(kind.reads) != ("teacher" in reads):
        problems.append(_teacher_trouble(settings.loss))
    for source in reads.get("teacher", ()):
        if isinstance(source, str) or source[0] != "distill.capture":
            continue
        captured = source[1].model_dump()
        if kind.reads and kind.support != captured["support"]:
            problems.append(
                f"loss = {settings.loss!r} reads a capture with support = {kind.support!r}, "
                f"not {captured['support']!r}"
            )
        if settings.temperature != captured["temperature"]:
            problems.append(
                f"temperature = {settings.temperature}, but the teacher's is {captured['temperature']}; "
                "they must be equal"
            )
    return problems


def written(settings: Settings) -> tuple[str, ...]:
    """The roles that these settings make: adapters only where there are some."""
    return ("model", "curves", "adapter") if settings.lora_rank else ("model", "curves")


def _teacher_trouble(loss: str) -> str:
    return f"loss = {loss!r} {'needs' if LOSSES[loss].reads else 'does not read'} a teacher's store"


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Train `model` on `data`, beside `teacher` (a store) unless loss = "ce".

    Writes out/model and out/curves.jsonl, with LoRA out/adapter too: peft's folder of what was merged. Under
    torchrun rank 0 alone does. Raises InputError when data or
    store do not go with the settings, ModelError when store and student do not go together: both before the
    first step.
    """
    folder, work = one(inputs, "model"), out / ".work"
    tokenizer = Tokenizer(folder)
    rows, conversations_used = _rows(settings, inputs, tokenizer, report)
    loss = make_loss(
        settings.loss,
        kl_lambda=settings.kl_lambda,
        ce_weight=settings.ce_weight,
        temperature=settings.temperature,
    )
    if settings.lora_rank:
        ends = settings.lora_layers == "ends"
        lora = Lora(settings.lora_rank, settings.lora_alpha, settings.seed, ends=ends)
        backend = "peft" if settings.packing and settings.backend == "auto" else settings.backend
        model = with_adapters(
            folder,
            lora,
            settings.base_precision,
            backend,
            max_tokens=settings.max_tokens,
            report=report,
        )
    else:
        model = load(folder)
    figures = tune(model, rows, loss, settings, work, report, pad_id=tokenizer.pad_id)
    if is_main():
        if settings.lora_rank:
            adapters = taken_off(model)
            save_adapters(adapters, lora, lora.layers(model), out / "adapter")
            del model  # its memory is wanted for the base as it is stored
            model = merged(folder, adapters)
        save(model, folder, out / "model")
        shutil.copyfile(work / CURVES, out / CURVES)
    return {**figures, "conversations": conversations_used, "rows": len(rows)}


def _rows(settings: Settings, inputs: Inputs, tokenizer: Tokenizer, report: Report) -> tuple[Rows[Row], int]:
    """(rows to train on, with the teacher's columns and joined as asked for; how many conversations)."""
    store = _store(settings, inputs, tokenizer)
    longest = min(settings.max_tokens, context_tokens(tokenizer.folder))
    chats = chat_rows(conversations(many(inputs, "data")), tokenizer, longest)
    if chats.too_long:
        report.note(f"{chats.too_long} rows are longer than {longest} tokens and were left out")
    if int(chats.rows[0]["input_ids"][-1]) not in tokenizer.special_tokens.values():
        report.note("the chat template ends answers with no control token: the model is not taught to stop")
    rows: Rows[Row] = chats.rows
    if store:
        rows = store.beside(rows, tokenizer, temperature=settings.temperature)
    if settings.packing:
        rows = JoinedRows(rows, longest, settings.seed)
        report.note(f"{len(chats.rows)} rows joined into {len(rows)} of up to {longest} tokens")
    return rows, chats.conversations


def _store(settings: Settings, inputs: Inputs, tokenizer: Tokenizer) -> TopKStore | None:
    """The teacher's store, if the loss reads one. Raises InputError or ModelError when they do not match."""
    kind = LOSSES[settings.loss]
    if bool(kind.reads) != ("teacher" in inputs):
        raise InputError(
            _teacher_trouble(settings.loss),
            hint="reads = { teacher = ... } goes with every loss but 'ce'",
        )
    if not kind.reads:
        return None
    store = TopKStore(one(inputs, "teacher"))
    supports = {name: other.support for name, other in LOSSES.items() if other.reads}
    store.check_student(tokenizer.folder, "loss", settings.loss, supports)
    return store

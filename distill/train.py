"""Supervised training on conversations: plain instruction tuning, or a student beside a stored teacher.

loss = "ce" is every supervised fine-tuning in Samovar; loss = "topk" reads the teacher's top-K from a store
that distill.capture wrote once (RuAdapt-KD). In both the loss stands on the response tokens only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from distill.losses import TopKLoss
from distill.store import TopKStore
from foundation.dataio import conversations
from foundation.errors import InputError
from foundation.losses import cross_entropy
from foundation.model import context_tokens, load, save
from foundation.report import Report
from foundation.rows import Row, Rows, chat_rows
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer
from foundation.tune import Loss, TuneSettings, tune

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Settings(TuneSettings):
    """Which loss, and which weights it moves."""

    loss: Literal["ce", "topk"] = Field(
        "ce", description="cross-entropy alone, or with a stored teacher's top-K"
    )
    kl_lambda: float = Field(
        0.2, ge=0, description="lambda of RuAdapt-KD eq. 1: weight of KL against cross-entropy"
    )
    kl_weight: Literal["published", "none"] = Field(
        "published", description="1 - exp(-s/(t+eps)) on each token (eq. 1), or 1 everywhere"
    )
    kl_support: Literal["renormalised", "tail"] = Field(
        "renormalised",
        description="both sides renormalised over the K ids (published), or KL with the missing mass",
    )
    max_tokens: int = Field(1024, ge=8, description="longest conversation that is used")
    lora_rank: int = Field(0, ge=0, description="rank of LoRA on the 7 linear modules; 0 = all weights train")
    lora_alpha: int = Field(128, ge=1, description="LoRA alpha (scale = alpha / rank)")

    @model_validator(mode="after")
    def _kl_needs_a_store(self) -> Settings:
        if self.loss == "ce" and self.kl_lambda != type(self).model_fields["kl_lambda"].default:
            raise ValueError("kl_lambda has no effect with loss = 'ce'; set loss = 'topk'")
        return self


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Train `model` on `data`, beside `teacher` (a store) when loss = "topk"; writes out/model."""
    folder, work = one(inputs, "model"), out / ".work"
    tokenizer = Tokenizer(folder)
    rows, loss = _rows_and_loss(settings, inputs, tokenizer, report)
    model = _with_lora(load(folder), settings)
    figures = tune(model, rows, loss, settings, work, report, pad_id=tokenizer.pad_id)
    save(model.merge_and_unload() if settings.lora_rank else model, folder, out / "model")
    return {**figures, "conversations": len(rows)}


def _rows_and_loss(
    settings: Settings, inputs: Inputs, tokenizer: Tokenizer, report: Report
) -> tuple[Rows[Row], Loss]:
    if (settings.loss == "topk") != ("teacher" in inputs):
        raise InputError(
            f"loss = {settings.loss!r} "
            + ("needs" if settings.loss == "topk" else "does not read")
            + " a teacher's store",
            hint="reads = { teacher = ... } goes with loss = 'topk'",
        )
    longest = min(settings.max_tokens, context_tokens(tokenizer.folder))
    rows, too_long = chat_rows(conversations(many(inputs, "data")), tokenizer, longest)
    if too_long:
        report.note(f"{too_long} conversations are longer than {longest} tokens and were left out")
    if settings.loss == "ce":
        return rows, cross_entropy
    store = TopKStore(one(inputs, "teacher"))
    return store.beside(rows, tokenizer), TopKLoss(settings.kl_lambda, settings.kl_weight, settings.kl_support)


def _with_lora(model: Any, settings: Settings) -> Any:
    """The model wrapped for LoRA on its linear modules, or as it is when lora_rank is 0."""
    if not settings.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=LORA_MODULES,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )

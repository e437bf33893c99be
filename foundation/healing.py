"""What healing is told: the settings that prune asks with and distill heals by, one thought for both rooms.

    loss = w * logits + hidden_weight * sum of MSE over pairs of layers          means over counted tokens

LayerKD (Kovalev & Tikhomirov 2025) compares 17 mixtures of the two; its released code takes KL / 100, summed
over batch, positions and vocabulary, beside plain means of the squared errors.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from foundation.tune import TuneSettings

LogitLoss = Literal["none", "kl", "kl_100", "kl_reverse", "kl_scaled", "logprob_mse", "logit_mse"]
STORED: tuple[LogitLoss, ...] = ("kl", "kl_100", "kl_reverse")  # those that a top-K store can serve
HiddenLoss = Literal["none", "last", "trained", "trained_last", "all"]


class HealSettings(TuneSettings):
    """How a model that lost layers learns from the one that still has them (steps are one healing's)."""

    trains: Literal["neighbours", "all", "lora"] = Field(
        "neighbours",
        description="what heals: the layers beside the gap (published), every weight, or LoRA on all",
    )
    lora_rank: int = Field(16, ge=1, description="rank of LoRA, with trains = 'lora'")
    lora_alpha: int = Field(32, ge=1, description="LoRA alpha (scale = alpha / rank)")
    logit_loss: LogitLoss = Field("kl_100", description="between the two models' next-token distributions")
    logit_temperature: float = Field(2.0, ge=0.05, le=100, description="of kl_scaled: KL at T, times T^2")
    hidden_loss: HiddenLoss = Field(
        "trained_last", description="layers whose outputs are drawn together by MSE"
    )
    hidden_weight: float = Field(1.0, gt=0, description="weight of the hidden-state MSE")

    @model_validator(mode="after")
    def _only_what_heals(self) -> HealSettings:
        """Refuse what would learn nothing, and what would have no effect."""
        if self.logit_loss == self.hidden_loss == "none":
            raise ValueError("logit_loss and hidden_loss are both 'none': nothing would be learnt; set one")
        needs = {
            "lora_rank": (self.trains == "lora", "trains = 'lora'"),
            "lora_alpha": (self.trains == "lora", "trains = 'lora'"),
            "logit_temperature": (self.logit_loss == "kl_scaled", "logit_loss = 'kl_scaled'"),
            "hidden_weight": (self.hidden_loss != "none", "a hidden_loss"),
        }
        for name in self.changed(needs):
            used, where = needs[name]
            if not used:
                raise ValueError(f"{name} has no effect but with {where}; leave it out")
        return self

    def refused_by_a_store(self) -> list[str]:
        """What these settings ask for and a store of top-K answers, in place of a live teacher, has not."""
        problems = []
        if self.hidden_loss != "none":
            problems.append(
                f"hidden_loss = {self.hidden_loss!r} needs a live teacher: a store holds no hidden states; "
                "set hidden_loss = 'none', or do not read `teacher`"
            )
        if self.logit_loss not in STORED:
            served = ", ".join(STORED)
            problems.append(f"logit_loss = {self.logit_loss!r} needs a live teacher; a store serves {served}")
        return problems

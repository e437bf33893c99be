"""What healing is told: the settings that prune asks with and distill heals by, one thought for both rooms.

    loss = w * logits + hidden_weight * sum of MSE over pairs of layers          means over counted tokens

LayerKD (Kovalev & Tikhomirov 2025) compares 17 mixtures of the two; its released code takes KL / 100, summed
over batch, positions and vocabulary, beside plain means of the squared errors.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from foundation.tune import TuneSettings

LogitLoss = Literal["none", "kl", "kl_100", "kl_reverse", "kl_scaled", "logprob_mse", "logit_mse"]
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

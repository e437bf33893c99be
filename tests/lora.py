"""peft adapters for tests: random and non-zero, on any model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_folder(folder: Path, out: Path, *, seed: int = 1, dtype: str = "float32", **config: Any) -> Path:
    """A LoRA on the model in `folder`, saved by peft: A and B random, so that it changes what is computed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(folder)), LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.05 * torch.randn_like(value))
                value.data = value.to(getattr(torch, dtype))
    model.save_pretrained(str(out))
    return out

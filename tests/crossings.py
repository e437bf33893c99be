"""For the tests of the KL across vocabularies: tokenizers of two sizes or two corpora, and models with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import SHAPE, TEXTS

from adaptation.scratch import train_tokenizer
from foundation.model import create, save

OTHER = [
    "Перед рейсом пилот отдыхает и тренируется: присед, планка, бег.",
    "Before the flight a pilot rests; sixty squats, then a long run.",
] * 20


def old_tokenizer(folder: Path) -> Path:
    train_tokenizer(TEXTS, 330, 128, folder)
    return folder


def extended_tokenizer(folder: Path) -> Path:
    """The old one's merges, then 70 more: BPE learns the first ones first."""
    train_tokenizer(TEXTS, 400, 128, folder)
    return folder


def substituted_tokenizer(folder: Path) -> Path:
    """Learnt on other texts: it cuts the same ones elsewhere."""
    train_tokenizer(OTHER, 420, 128, folder)
    return folder


def model_with(tokenizer: Path, folder: Path, rows: int, *, seed: int, **changes: object) -> Path:
    """A loud random Llama with `rows` rows of embeddings, in `folder`."""
    config = SHAPE | {"vocab_size": rows, "num_hidden_layers": 2, "initializer_range": 0.2}
    save(create({**config, **changes}, seed), tokenizer, folder)
    return folder


def in_float64(model: Any) -> Any:
    """`model`, all in double precision: transformers has norms and eager softmax in float32."""
    model.double().set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm = module

            def forward(x: torch.Tensor, norm: Any = norm) -> torch.Tensor:
                return torch.nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)

            module.forward = forward
    return model

"""Tiny models and tokenizers for tests: made in a second, the same every time."""

from __future__ import annotations

from pathlib import Path

from adaptation.scratch import train_tokenizer
from foundation.model import create, save

TEXTS = [
    "The pilot lifts the barbell and rests. The crew runs in the hangar.",
    "A squat trains the legs; a plank trains the core. Rest one day.",
    "Пилот делает приседания и планку. Экипаж отдыхает между рейсами.",
    "user assistant system 0123456789",
] * 20


SHAPE: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}  # of config.json, less layers and vocabulary


def tiny_tokenizer(folder: Path, vocab_tokens: int = 400) -> Path:
    """A byte-level BPE tokenizer with ChatML in `folder`."""
    train_tokenizer(TEXTS, vocab_tokens, 128, folder)
    return folder


def tiny_model(folder: Path, *, seed: int = 0, layers: int = 3, **changes: object) -> Path:
    """A random Llama of some 50k parameters with its tokenizer in `folder`."""
    tokenizer = tiny_tokenizer(folder / "made")
    config: dict[str, object] = SHAPE | {"vocab_size": 400, "num_hidden_layers": layers}
    model = create({**config, **changes}, seed)
    save(model, tokenizer, folder)
    return folder


def chats(count: int = 12) -> list[dict[str, object]]:
    """Short conversations, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Train {n % 5} times, rest {n} days."},
                {"role": "assistant", "content": f"squat, plank, {'run ' * (n % 4)}rest {n}"},
            ]
        }
        for n in range(count)
    ]

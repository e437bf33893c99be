"""kill -9 at random moments of training, and again after the resume: are the weights the same, bit for bit?

Three kinds of training of a tiny student, in turn: all weights with packing, LoRA with gradient checkpointing,
QLoRA (nf4) with 8-bit AdamW; each beside a teacher's store. Model and curves are compared; the moments fall
into training, saving and merging. How the killing goes: killing.py.

    python benchmarks/kill_training.py --trials 30 --result benchmarks/results/kill_training.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from killing import Victim, digests, main

KINDS: dict[str, dict[str, Any]] = {
    "full, packed": {"loss": "published_code", "packing": True, "max_tokens": 128},
    "LoRA": {"loss": "forward_kl", "lora_rank": 4, "lora_alpha": 8, "gradient_checkpointing": True},
    "QLoRA, 8-bit AdamW": {
        "loss": "reverse_kl", "lora_rank": 4, "lora_alpha": 8, "base_precision": "nf4",
        "optimizer": "adamw_8bit",
    },
}  # fmt: skip
COMMON = {"steps": 40, "batch_rows": 4, "warmup_steps": 5, "learning_rate": 1e-2, "checkpoint_every_steps": 5}


class Training(Victim):
    """distill.train; its units are optimiser steps whose line stands in the curves."""

    kinds = tuple(KINDS)
    unit = "step"

    def prepare(self, inputs: Path) -> None:
        """A student, a teacher and its store, all tiny."""
        from tiny import chats, tiny_model

        from distill import capture
        from foundation.dataio import write_jsonl
        from foundation.report import Silent

        # Wider than the tests' student: 8-bit AdamW keeps tensors of fewer than 4,096 numbers in 32 bits.
        wide = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 1024}
        tiny_model(inputs / "student", seed=3, layers=2, **wide)
        teacher = tiny_model(inputs / "teacher", seed=1, initializer_range=0.3)
        write_jsonl(inputs / "data.jsonl", chats(60))
        read = {"teacher": teacher, "data": (inputs / "data.jsonl",)}
        capture.run(capture.Settings(top_k=8), read, inputs, Silent())

    def warm_up(self, inputs: Path) -> None:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import torch._dynamo  # noqa: F401
        from transformers import Trainer  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

        from distill.store import TopKStore
        from foundation.dataio import conversations
        from foundation.rows import chat_rows
        from foundation.tokenizer import Tokenizer

        rows, *_ = chat_rows(conversations([inputs / "data.jsonl"]), Tokenizer(inputs / "student"), 128)
        TopKStore(inputs / "store").columns(rows[0])

    def start(self, inputs: Path, kind: str, out: Path) -> None:
        from distill import train
        from foundation.report import Silent

        read = {
            "model": inputs / "student", "data": (inputs / "data.jsonl",), "teacher": inputs / "store"
        }  # fmt: skip
        train.run(train.Settings(**COMMON, **KINDS[kind]), read, out, Silent())

    def done(self, out: Path) -> int:
        path = out / ".work" / "curves.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def result(self, out: Path) -> dict[str, str]:
        return digests(out, [out / "curves.jsonl", *(out / "model").glob("*")])


if __name__ == "__main__":
    sys.exit(main(Training(), str(__doc__), "kill-training", COMMON))

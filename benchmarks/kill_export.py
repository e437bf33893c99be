"""kill -9 at random moments of the export stages, and again after the resume: are all files the same?

Six stages, in turn: export.gguf in shards, export.imatrix, export.quantize, export.verify, export.adapter,
export.bundle. llama.cpp works in child processes, which must die with the stage. How the killing goes:
killing.py.

    python benchmarks/kill_export.py --trials 30 --result benchmarks/results/kill_export.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from killing import Victim, counted_words, digests, main, words_told

KINDS = ("gguf", "imatrix", "quantize", "verify", "adapter", "bundle")
TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ2_XXS")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "layers": 6,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
LINES = 400


class Export(Victim):
    """The stages of export/; their units are words: what was told of progress, in all starts together."""

    kinds = KINDS
    unit = "word"

    def prepare(self, inputs: Path) -> None:
        """A small model, texts, an adapter, and what each stage leaves for the next."""
        from tiny import TEXTS, tiny_model

        from foundation.dataio import write_jsonl

        inputs.mkdir(parents=True)
        tiny_model(inputs / "model", **SIZES)
        lines = ({"text": f"{TEXTS[n % 4]} {n}"} for n in range(LINES))
        write_jsonl(inputs / "texts.jsonl", lines)
        self._adapter(inputs)
        for kind in KINDS[:4]:
            self.start(inputs, kind, inputs / kind)

    def _adapter(self, inputs: Path) -> None:
        import torch

        from foundation.adapters import Lora, save_adapters, taken_off, with_adapters
        from foundation.report import Silent

        lora = Lora(rank=4, alpha=8, seed=1)
        model = with_adapters(inputs / "model", lora, "fp32", "peft", max_tokens=64, report=Silent())
        torch.manual_seed(2)
        found = {
            name: (torch.randn_like(up), down, scale) for name, (up, down, scale) in taken_off(model).items()
        }
        save_adapters(found, lora, None, inputs / "peft")

    def warm_up(self, inputs: Path) -> None:
        import gguf  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401

    def start(self, inputs: Path, kind: str, out: Path) -> None:
        from export import adapter, bundle, gguf, imatrix, quantize, verify

        out.mkdir(parents=True, exist_ok=True)
        report = counted_words(out / ".work" / "words")
        model, texts = {"model": inputs / "model"}, {"texts": (inputs / "texts.jsonl",)}
        f32, small = inputs / "gguf" / "gguf", inputs / "quantize" / "gguf"
        acts: dict[str, Any] = {
            "gguf": (gguf, {"shard_bytes": 2_000_000}, model),
            "imatrix": (imatrix, {"context_tokens": 64}, model | texts),
            "quantize": (
                quantize,
                {"types": TYPES},
                {"gguf": f32, "imatrix": inputs / "imatrix" / "imatrix.gguf"},
            ),
            "verify": (verify, {"tokens": 200, "lines": 200}, model | texts | {"gguf": (f32, small)}),
            "adapter": (adapter, {}, model | {"adapter": inputs / "peft", "gguf": f32}),
            "bundle": (
                bundle,
                {},
                model | {"gguf": (f32, small), "verify": (inputs / "verify" / "verify.json",)},
            ),
        }
        module, settings, read = acts[kind]
        module.run(module.Settings(**settings), read, out, report)

    def done(self, out: Path) -> int:
        return words_told(out / ".work" / "words")

    def result(self, out: Path) -> dict[str, str]:
        kept = (path for path in out.rglob("*") if ".work" not in path.relative_to(out).parts)
        return digests(out, kept)


if __name__ == "__main__":
    sys.exit(main(Export(), str(__doc__), "kill-export", {"types": TYPES, "lines": LINES, **SIZES}))

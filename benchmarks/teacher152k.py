"""A small teacher with a large vocabulary: what the store's sizes are measured on.

A Llama of some 20 million parameters (nearly all of them the tied embedding) reads Russian tiny stories with
the qwen2.5 tokenizer. At first its softmax runs over the ids that the stories use, which is cheap, and at last
over all 151,936 that Qwen's own head has. It needs the folder named by SAMOVAR_DATA (default ../shared/data)
and goes on where it was stopped. Held-out nats per token say how far it came.

    OMP_NUM_THREADS=1 python benchmarks/teacher152k.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from corpora import prepare
from foundation.chat import CHATML
from foundation.dataio import documents
from foundation.losses import cross_entropy, next_token_nll
from foundation.model import create, load, save
from foundation.report import Silent
from foundation.rows import PackedRows, Row, collate, pack
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "bench" / "teacher152k"
RESULT = ROOT / "benchmarks" / "results" / "teacher152k.json"
VOCAB_TOKENS = 151_936
BLOCK_TOKENS = 256
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB_TOKENS,
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": BLOCK_TOKENS,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 151_645,
    "pad_token_id": 151_643,
}


class Lines(Silent):
    """A line every 20 steps."""

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        if done % 20 == 0:
            print(f"{done}/{total}", {name: round(value, 4) for name, value in figures.items()}, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narrow-steps", type=int, default=1500, help="over the ids in use, 2,048 tokens each")
    parser.add_argument("--full-steps", type=int, default=100, help="over all ids, 512 tokens each")
    options = parser.parse_args()
    data = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "tokenizers" / "qwen2.5").is_dir():
        print(f"skipped: {data / 'tokenizers' / 'qwen2.5'} is not there; set SAMOVAR_DATA", file=sys.stderr)
        return 0
    tokenizer = qwen_tokenizer(data / "tokenizers" / "qwen2.5", OUT / "tokenizer")
    if not (OUT / "text" / "held.jsonl").is_file():
        (OUT / "text").mkdir(parents=True, exist_ok=True)
        stories = tuple(sorted((data / "text" / "tinystories-ru").glob("*.jsonl")))
        prepare.run(
            prepare.Settings(field="story", held_share=0.02), {"corpus": stories}, OUT / "text", Lines()
        )
    rows = pack(documents([OUT / "text" / "text.jsonl"]), tokenizer, BLOCK_TOKENS, OUT / "rows")
    used = used_ids(rows)
    print(f"{len(rows)} rows, {len(used)} ids in use", flush=True)

    narrow = create({**CONFIG, "vocab_size": len(used), "eos_token_id": 0, "pad_token_id": 0}, seed=17)
    first = TuneSettings(
        steps=options.narrow_steps,
        batch_rows=8,
        learning_rate=3e-3,
        warmup_steps=50,
        checkpoint_every_steps=100,
    )
    tune(narrow, Renumbered(rows, used), cross_entropy, first, OUT / "narrow", Lines(), pad_id=0)

    model = widened(narrow, used)
    last = TuneSettings(
        steps=options.full_steps, batch_rows=2, learning_rate=2e-3, warmup_steps=5, checkpoint_every_steps=20
    )
    figures = tune(model, rows, cross_entropy, last, OUT / "full", Lines(), pad_id=tokenizer.pad_id)
    save(model, tokenizer.folder, OUT / "model")
    result = {
        **figures,
        "held_nats_per_token": held_nats(tokenizer),
        "parameters": model.num_parameters(),
        "ids_in_use": len(used),
        "tokens_narrow": first.steps * first.batch_rows * BLOCK_TOKENS,
        "tokens_full": last.steps * last.batch_rows * BLOCK_TOKENS,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def used_ids(rows: PackedRows) -> np.ndarray:
    """The distinct ids of the text, ascending."""
    return np.unique(np.concatenate([rows[number]["input_ids"] for number in range(len(rows))]))


class Renumbered:
    """Rows whose ids are places in `used`."""

    def __init__(self, rows: PackedRows, used: np.ndarray) -> None:
        self._rows, self._used = rows, used

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Row:
        places = np.searchsorted(self._used, self._rows[index]["input_ids"])
        return {"input_ids": places, "labels": places}


def widened(narrow: Any, used: np.ndarray) -> Any:
    """The same model over all ids. New rows begin near the mean of the old ones, as untrained rows do."""
    import torch

    model = create(CONFIG, seed=18)
    weights = dict(narrow.state_dict())
    old = weights["model.embed_tokens.weight"]  # [U, D]
    rows = model.get_input_embeddings().weight.detach().clone() + old.mean(0)  # [V, D]
    rows[torch.from_numpy(used)] = old
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = rows
    model.load_state_dict(weights)
    return model


def qwen_tokenizer(source: Path, out: Path) -> Tokenizer:
    """The tokenizer as a folder with tokenizer.json, rebuilt from its vocabulary and merges."""
    from transformers import Qwen2TokenizerFast

    if not (out / "tokenizer.json").is_file():
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        Qwen2TokenizerFast.from_pretrained(str(source)).save_pretrained(str(partial))
        (partial / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
        partial.rename(out)
    return Tokenizer(out)


def held_nats(tokenizer: Tokenizer, rows: int = 40) -> float:
    """Mean negative log-likelihood of held-out tokens, nats, over the first rows."""
    import torch

    held = pack(documents([OUT / "text" / "held.jsonl"]), tokenizer, BLOCK_TOKENS, OUT / "held")
    model, total = load(OUT / "model"), 0.0
    with torch.inference_mode():
        for number in range(rows):
            total += float(next_token_nll(model, collate([held[number]], tokenizer.pad_id)))
    return total / (rows * (BLOCK_TOKENS - 1))


if __name__ == "__main__":
    sys.exit(main())

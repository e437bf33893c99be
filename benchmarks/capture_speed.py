"""Capture against the bare forward pass: what a teacher's stored distribution costs beside running the teacher.

    bare        model(batch).logits over the same batches, all logits made and thrown away
    body        the model without its head
    head        float32 logits of the counted positions, in chunks
    keep        top-K, tail, log Z (or draws) out of these logits, and their way to the CPU
    encode      a shard's columns to its bytes, on disk; in a thread beside the next shard's forward pass
    capture     all of it together, as distill.capture runs it, over several shards

Weights and tokens are random, the head scaled so that the distributions are no noise; every position counts
unless --counted says less, which favours capture: the bare pass's head reads all positions anyway. The median
of several rounds, in turns; on a CPU in CPU seconds, so that the encoding thread costs what it costs. The bar:
capture at least 0.95 of bare's speed for an 8B shape on a GPU.

    python benchmarks/capture_speed.py
    python benchmarks/capture_speed.py --shape 8b --device cuda --precision bf16
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.capture import Settings
from distill.shards import Capture
from distill.store import row_key, shard_path, write_shard
from distill.teacher import answer_tokens, batches, chunked_logits, cut, read_shard
from foundation.chat import IGNORED
from foundation.head import hidden_of
from foundation.losses import predicting
from foundation.model import quiet_transformers
from foundation.report import Silent
from foundation.rows import Row, collate

ROOT = Path(__file__).resolve().parent.parent
VOCAB_TOKENS = 151_936
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
SIZES = {"small": (3, 120, 512), "8b": (64, 1024, 16384)}  # rows in a shard, tokens in a row, and in a batch


def made_model(shape: str, device: str, precision: str) -> Any:
    """A Qwen3 of this shape with random weights, made where it will run."""
    transformers = quiet_transformers()
    config = transformers.Qwen3Config(vocab_size=VOCAB_TOKENS, max_position_embeddings=32768, **SHAPES[shape])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    torch.manual_seed(17)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        model.lm_head.weight.mul_(3 / (model.lm_head.weight.std() * config.hidden_size**0.5).item())
    return model.eval()


def made_rows(count: int, tokens: int, counted: float) -> list[Row]:
    """Random conversations of `tokens` tokens give or take a quarter, the last share of each counted."""
    draw = np.random.default_rng(17)
    rows = []
    for _ in range(count):
        ids = draw.integers(0, VOCAB_TOKENS, int(draw.integers(tokens * 3 // 4, tokens * 5 // 4 + 1)))
        labels = ids.copy()
        labels[: round(len(ids) * (1 - counted))] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return rows


class AllIds:
    """What a capture asks of a tokenizer."""

    pad_id = 0

    def __len__(self) -> int:
        return VOCAB_TOKENS


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of wall time on a GPU; on a CPU, which others may use too, those of this process's threads."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--support", choices=["top_k", "sampled"], default="top_k")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--counted", type=float, default=1.0, help="share of a row's tokens that count")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, help="add the figures to this JSON file")
    options = parser.parse_args()
    shard_rows, tokens, batch_tokens = SIZES[options.shape]
    kept = {"top_k": options.top_k} if options.support == "top_k" else {}
    settings = Settings(support=options.support, shard_rows=shard_rows, batch_tokens=batch_tokens, **kept)
    rows = made_rows(shard_rows * options.shards, tokens, options.counted)
    model = made_model(options.shape, options.device, options.precision)
    folder = Path(tempfile.mkdtemp())
    try:
        figures = measured(model, rows, settings, folder, options.rounds, options.device)
    finally:
        shutil.rmtree(folder)
    named = {key: getattr(options, key) for key in ("shape", "device", "precision", "support", "counted")}
    named |= {"top_k": settings.entries, "batch_tokens": batch_tokens, "threads": torch.get_num_threads()}
    if options.device != "cpu":
        named["device"] = torch.cuda.get_device_name()
    result = {**named, **figures}
    print(json.dumps(result, indent=1))
    if options.result:
        before = json.loads(options.result.read_text()) if options.result.is_file() else []
        others = [each for each in before if any(each.get(key) != value for key, value in named.items())]
        options.result.write_text(json.dumps([*others, result], indent=1) + "\n", encoding="utf-8")
    return 0


def measured(
    model: Any, rows: list[Row], settings: Settings, folder: Path, rounds: int, device: str
) -> dict[str, Any]:
    """Microseconds a counted position of each part, medians over `rounds`, and the ratio of the whole."""
    tokenizer = AllIds()
    first = rows[: settings.shard_rows]
    inputs = [
        {name: value.to(model.device) for name, value in collate([first[p] for p in places], 0).items()}
        for places in batches(first, settings.batch_tokens)
    ]
    lengths = [answer_tokens(row) for row in first]
    draws = settings.draws if settings.support == "sampled" else 0
    uniform = [np.random.default_rng(0).random((length, draws)) for length in lengths]

    def bare() -> None:
        for batch in inputs:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def body() -> None:
        for batch in inputs:
            hidden_of(model, batch)

    def body_and_head() -> None:
        for batch in inputs:
            hidden, head = hidden_of(model, batch)
            for _ in chunked_logits(predicting(hidden, batch["labels"]), cut(head, VOCAB_TOKENS)):
                pass

    columns: dict[str, np.ndarray] = {}

    def read() -> None:
        columns.update(
            read_shard(
                model, first, settings.keep, uniform, vocab_tokens=VOCAB_TOKENS, temperature=1.0,
                batch_tokens=settings.batch_tokens, pad_id=0,
            )
        )  # fmt: skip

    def encode() -> None:
        seed = 1 if draws else None
        keys = [row_key(row) for row in first]
        path = shard_path(folder, 99_999)
        write_shard(path, columns, keys, lengths, vocab_tokens=VOCAB_TOKENS, bits=settings.bits, seed=seed)

    def capture() -> None:
        whole = Capture(settings, tokenizer, rows, Path(tempfile.mkdtemp(dir=folder)))  # type: ignore[arg-type]
        whole.write(model, list(range(len(whole.parts))), Silent())

    works = {
        "bare": bare,
        "body": body,
        "head": body_and_head,
        "keep": read,
        "encode": encode,
        "capture": capture,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for turn in range(rounds + 1):  # the first one compiles and warms up
            for name, work in works.items():
                taken = seconds(work, device)
                if turn:
                    times[name].append(taken)
            print({name: round(values[-1], 3) for name, values in times.items() if values}, flush=True)
    share = sum(lengths) / sum(
        map(answer_tokens, rows)
    )  # capture runs over all shards, the others over the first
    times["capture"] = [share * taken for taken in times["capture"]]
    middle = {name: statistics.median(values) for name, values in times.items()}
    middle["keep"], middle["head"] = middle["keep"] - middle["head"], middle["head"] - middle["body"]
    ratios = [bare / whole for bare, whole in zip(times["bare"], times["capture"], strict=True)]
    return {
        "positions": sum(lengths),
        "microseconds_a_position": {
            name: round(1e6 * value / sum(lengths), 2) for name, value in middle.items()
        },
        "capture_speed_of_bare": round(statistics.median(ratios), 4),
        "bytes_a_position": round(shard_path(folder, 99_999).stat().st_size / sum(lengths), 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())

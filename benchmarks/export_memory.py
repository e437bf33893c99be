"""The memory that export.gguf takes for a checkpoint of 30 GB, and the time; in a process of its own each.

The checkpoint is a Llama of 40 layers and 5120 columns with 151,936 tokens in bf16. Its file is sparse: the
header is real and the weights are a hole, which the system reads as zeros. What is written goes into a sink
that counts it and looks at its beginning. So no disk is needed, and no disk's speed is measured: the seconds
are those of reading a hole, checking and converting; on a busy machine only the CPU seconds tell something.
The peak is VmHWM of /proc/self/status: all of the process, with Python, numpy and the vocabulary in it.
The bar: below 2 GB for any size.

    python benchmarks/export_memory.py
    python benchmarks/export_memory.py --gigabytes 6 --types bf16 --out /tmp/small.json
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCAB_TOKENS = 151_936
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 17_408,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "vocab_size": VOCAB_TOKENS,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "rms_norm_eps": 1e-6,
}
LAYERS = 40  # 29.5 GB
BAR_BYTES = 2_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of export.gguf")
    parser.add_argument("--gigabytes", type=float, default=30.0, help="size of the checkpoint")
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "bf16", "q8_0"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "export_memory.json")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "TYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(export(Path(arguments.child[0]), arguments.child[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        size = sparse_checkpoint(Path(name), max(1, round(LAYERS * arguments.gigabytes / 30)))
        rows = {kind: measure(Path(name), kind) for kind in arguments.types}
    result = {"checkpoint_bytes": size, "bar_bytes": BAR_BYTES, "vocab_tokens": VOCAB_TOKENS, "types": rows}
    arguments.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    if any(row["peak_bytes"] >= BAR_BYTES for row in rows.values()):
        sys.exit(f"more than {BAR_BYTES} bytes")


def measure(folder: Path, kind: str) -> dict[str, float]:
    """`export` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder), kind]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    row: dict[str, float] = json.loads(answer.stdout)
    return row


def export(folder: Path, kind: str) -> dict[str, float]:
    """Export into a counting sink; what it wrote and took."""
    from export import gguf
    from export.weights.writer import write_files
    from foundation.report import Silent

    sink = Counting()

    @contextmanager
    def open_sink(path: Path) -> Iterator[Counting]:
        yield sink

    start, used = time.monotonic(), time.process_time()
    plan = gguf.planned(gguf.Settings(dtype=kind), folder)  # type: ignore[arg-type]
    planned, used_planning = time.monotonic(), time.process_time()
    write_files(plan.layout, plan.rows, folder, Silent(), open_file=open_sink)
    done, used_writing = time.monotonic(), time.process_time()
    if sink.start != b"GGUF" or sink.bytes != plan.layout.size_bytes:
        raise SystemExit(f"{sink.bytes} bytes were written, {plan.layout.size_bytes} are a whole file")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {
        "peak_bytes": 1024 * int(status.partition("VmHWM:")[2].split()[0]),
        "written_bytes": sink.bytes,
        "planning_seconds": round(planned - start, 2),
        "planning_cpu_seconds": round(used_planning - used, 2),
        "writing_seconds": round(done - planned, 2),
        "writing_cpu_seconds": round(used_writing - used_planning, 2),
    }


class Counting:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self.bytes = 0
        self.start = b""

    def write(self, data: Any) -> None:
        if not self.bytes:
            self.start = bytes(data[:4])
        self.bytes += memoryview(data).nbytes


def sparse_checkpoint(folder: Path, layers: int) -> int:
    """Write a folder with a hole for weights; its size in bytes."""
    from foundation.shape import ModelShape

    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _tokenizer(folder)
    table, place = {}, 0
    for name, size in ModelShape.from_config(config).tensors().items():
        end = place + 2 * prod(size)
        table[name] = {"dtype": "BF16", "shape": size, "data_offsets": [place, end]}
        place = end
    head = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + place)
    return place


def _tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB_TOKENS tokens: the bytes, every pair of them, and pairs with a byte more."""
    from tokenizers import pre_tokenizers

    from export.tokenizer.pretokenizers import QWEN2

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(letters, letters))
    longer = product(("".join(pair) for pair in pairs), letters)
    merges = [*pairs, *islice(longer, VOCAB_TOKENS - 1 - len(letters) - len(pairs))]
    tokens = ["<|end|>", *letters, *("".join(pair) for pair in merges)]
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<|end|>", "special": True, **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": None,
        "decoder": bytes_,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")


if __name__ == "__main__":
    main()

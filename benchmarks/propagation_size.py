"""Memory and time of adaptation.propagate at the size of a real vocabulary: conversion, matrices in bf16.

Three models are written as a stream: random matrices of the true shape, the adapted one with --added more
tokens, and tokenizers of as many tokens. The stage runs in a process of its own. Two peaks are told: of what
it allocated (anonymous memory, sampled), and of all that was resident, which counts the pages of the three
files too, though the kernel may drop those at any time. The fit is then checked on rows drawn at random: the
residual of the normal equations, A^T (A P - B), should be rounding.

    python benchmarks/propagation_size.py --rows 150000 --hidden 4096 --result benchmarks/results/X.json
    python benchmarks/propagation_size.py --rows 12000 --hidden 256      (seconds)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAME = "model.embed_tokens.weight"
BLOCK_ROWS = 4096
STAGE = """
import json, sys
from pathlib import Path
import torch
from adaptation.propagate import Settings, run
from foundation.report import Silent
torch.set_num_threads(int(sys.argv[2]))
folder = Path(sys.argv[1])
inputs = {role: folder / role for role in ("base", "adapted", "instruct")}
print(json.dumps(run(Settings(method=sys.argv[3]), inputs, folder / "out", Silent())))
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000, help="tokens of the adapted vocabulary")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--added", type=float, default=0.15, help="share of --rows that the base has not")
    parser.add_argument("--method", choices=["swap", "overlap", "conversion"], default="conversion")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write the models; a temporary folder otherwise")
    parser.add_argument("--result", type=Path)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        write_models(folder, chosen.rows, chosen.hidden, round(chosen.rows * chosen.added))
        found = measured(folder, chosen)
        found["normal_equations"] = slope(folder, chosen.hidden)
    print(json.dumps(found, indent=1))
    if chosen.result:
        shape = {key: getattr(chosen, key) for key in ("rows", "hidden", "added", "method", "threads")}
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "load": round(os.getloadavg()[2], 1)}
        result = {"machine": machine, "shape": shape, "found": found}
        chosen.result.write_text(json.dumps(result, indent=1) + "\n")


def measured(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Figures of the stage in a process of its own, its peaks and its seconds."""
    command = [sys.executable, "-c", STAGE, str(folder), str(chosen.threads), chosen.method]
    started = time.monotonic()
    with (folder / "figures.json").open("w") as printed:
        child = subprocess.Popen(command, stdout=printed, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        allocated = 0
        while child.poll() is None:
            allocated = max(allocated, anonymous_bytes(child.pid))
            time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"the stage ended with {child.returncode}")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads((folder / "figures.json").read_text()) | {
        "allocated_gb": round(allocated / 1e9, 2),
        "resident_gb": round(spent.ru_maxrss * 1024 / 1e9, 2),
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1),
    }


def anonymous_bytes(pid: int) -> int:
    """What a process holds that no file stands behind."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def slope(folder: Path, hidden: int) -> float:
    """||A^T (A P - B)|| / (||A|| ||A P - B||) over columns drawn at random, of the fit that the stage kept."""
    import torch

    from adaptation.least_squares import Fit
    from adaptation.pieces import averages, token_map
    from adaptation.tokenizer_json import TokenizerJson
    from foundation.tensors import TensorFiles

    path = folder / "out" / ".work" / "embeddings.safetensors"
    if not path.is_file():
        return 0.0
    columns = torch.randperm(hidden, generator=torch.Generator().manual_seed(0))[:16]
    projection = Fit.read(path).projection[:, columns]
    base, instruct = (TensorFiles(folder / name).read(NAME) for name in ("base", "instruct"))
    pieces = token_map(*(TokenizerJson.read(folder / name) for name in ("adapted", "base")))
    total = torch.zeros(hidden, len(columns), dtype=torch.float64)
    of_a = of_rest = 0.0
    for start in range(0, len(pieces), 8192):
        block = pieces[start : start + 8192]
        a = averages(base, block)
        rest = a @ projection - averages(instruct[:, columns], block)
        total += a.T @ rest
        of_a, of_rest = of_a + float(a.square().sum()), of_rest + float(rest.square().sum())
    return float(total.norm()) / (of_a * of_rest) ** 0.5


def write_models(folder: Path, rows: int, hidden: int, added: int) -> None:
    """base, adapted, instruct: tokenizers, configs, and one random matrix each."""
    from foundation.files import write_json

    tokens = list(islice(spellings(), rows))
    of = {"base": (rows - added, 0.0), "adapted": (rows, 0.1), "instruct": (rows - added, 0.3)}
    for seed, (name, (count, drift)) in enumerate(of.items()):
        place = folder / name
        place.mkdir()
        write_tokenizer(place, tokens[:count])
        write_json(place / "config.json", {"model_type": "llama", "vocab_size": count, "hidden_size": hidden})
        write_matrix(place / "model.safetensors", (count, hidden), random_rows(count, hidden, drift, seed))


def random_rows(count: int, hidden: int, drift: float, seed: int) -> Iterator[bytes]:
    """Rows in bf16, the same in all models but for noise of `drift`; their columns are of many sizes."""
    import torch

    shared, own = torch.Generator().manual_seed(17), torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, hidden)
    for start in range(0, count, BLOCK_ROWS):
        common = torch.randn(BLOCK_ROWS, hidden, generator=shared)
        noise = torch.randn(BLOCK_ROWS, hidden, generator=own)
        block = ((common + drift * noise) * scales)[: count - start]
        yield block.bfloat16().view(torch.uint8).numpy().tobytes()


def spellings() -> Iterator[str]:
    """Byte-level tokens: every byte, every two, every three letters."""
    from adaptation.tokenizer_json import byte_alphabet

    for length in (1, 2, 3):
        for letters in product(byte_alphabet(), repeat=length):
            yield "".join(letters)


def write_tokenizer(folder: Path, tokens: list[str]) -> None:
    """tokenizer.json of byte-level BPE with these tokens; each of two and three letters has its merge."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [[token[:-1], token[-1]] for token in tokens if len(token) > 1],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_matrix(path: Path, shape: tuple[int, int], blocks: Iterator[bytes]) -> None:
    """safetensors with one bf16 matrix, written as it comes."""
    size = 2 * shape[0] * shape[1]
    header = json.dumps({NAME: {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for block in blocks:
            file.write(block)


if __name__ == "__main__":
    main()

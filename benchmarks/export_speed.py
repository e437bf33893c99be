"""Seconds and memory of export.gguf beside llama.cpp's own converter, on a checkpoint of a 4B model's shape.

Qwen3-4B's shape with Qwen2.5's tokenizer: 8.04 GB in bf16, in shards of 4 GB, random numbers. Both sides
convert it in turn, each in a process of its own, to the same disk; other work on the machine slows both.
Counted is the whole process, imports too:

    wall_seconds       by the clock. llama.cpp's converter leaves its file in the page cache, and so do we
    cpu_seconds        user and system time of the process, which other work disturbs less
    peak_bytes         VmHWM: all pages that were in memory at once, those of mapped files too
    anonymous_bytes    the largest RssAnon seen, sampled: without the pages of mapped files

`warm`: the checkpoint was read just before; `cold`: the kernel was asked to forget it (posix_fadvise).
Finished runs are kept, and the script goes on where it was stopped. Once for each type both files are compared,
tensor by tensor. Needs SAMOVAR_DATA (default ../shared/data) for the tokenizer, 25 GB of disk, and llama.cpp's
sources (see tests/llamacpp.py).

    nice python benchmarks/export_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from foundation.files import read_json, write_json  # noqa: E402
from foundation.rundir import machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "export_speed.json"
BARS = {"wall_ratio": 1.0, "memory_ratio": 0.25}
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "rope_theta": 1_000_000,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 4_000_000_000
PATTERN_NUMBERS = 2**25  # random numbers, repeated from another place for every tensor
OURS = """
import sys
from pathlib import Path
from export.gguf import Settings, run
from foundation.report import Silent
run(Settings(dtype=sys.argv[3]), {"model": Path(sys.argv[1])}, Path(sys.argv[2]), Silent())
"""
SAME = """
import sys
import gguf
import numpy as np
one, two = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in sys.argv[1:])
equal = [n for n in one if n in two and one[n].tensor_type == two[n].tensor_type
         and np.array_equal(one[n].data, two[n].data)]
print(len(one), len(two), len(equal))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["bf16", "f16", "q8_0"])
    parser.add_argument("--cold", nargs="*", default=["bf16"], help="types that are run from a cold cache too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer, to try it out")
    parser.add_argument("--folder", type=Path, help="disk to work on; a temporary folder by default")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    config = CONFIG | {"num_hidden_layers": chosen.layers}
    if chosen.make:
        make(chosen.make, config)
        return
    data = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "tokenizers" / "qwen2.5").is_dir():
        print(f"skipped: {data}/tokenizers/qwen2.5 is not there; set SAMOVAR_DATA", file=sys.stderr)
        return
    import llamacpp

    converter = llamacpp.sources() / llamacpp.CONVERTER
    found = read_json(chosen.result) or {"runs": [], "same": {}}
    found |= {
        "machine": machine(),
        "shape": {k: v for k, v in config.items() if k.endswith(("size", "layers"))},
    }
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        work = Path(name)
        model = work / "Qwen3-4B-shape"
        told = [sys.executable, __file__, "--layers", str(chosen.layers), "--make", str(model)]
        subprocess.run(told, check=True, cwd=ROOT)  # apart, for what it imports would count as ours
        found["checkpoint_bytes"] = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        plan = [(dtype, "warm") for dtype in chosen.types] + [(dtype, "cold") for dtype in chosen.cold]
        for repeat, (dtype, cache) in product(range(chosen.repeats), plan):
            for side in ("ours", "converter"):
                key = {"side": side, "dtype": dtype, "cache": cache, "repeat": repeat}
                if not any(key.items() <= run.items() for run in found["runs"]):
                    told = command(side, dtype, model, work, converter)
                    found["runs"].append(key | measured(told, cache, model))
                    fsync(work / side)
                    tell(found, chosen.result)
            if dtype not in found["same"] and written(work):
                found["same"][dtype] = same(work)
                tell(found, chosen.result)
            for side in ("ours", "converter"):
                shutil.rmtree(work / side, ignore_errors=True)


def command(side: str, dtype: str, model: Path, work: Path, converter: Path) -> list[str]:
    """The command of a side; what it wrote before is gone."""
    shutil.rmtree(work / side, ignore_errors=True)
    if side == "ours":
        return [sys.executable, "-c", OURS, str(model), str(work / "ours"), dtype]
    out = work / "converter" / "model.gguf"
    out.parent.mkdir()
    return [sys.executable, str(converter), str(model), "--outtype", dtype, "--outfile", str(out)]


def measured(told: list[str], cache: str, model: Path) -> dict[str, Any]:
    """Run a command to its end."""
    for file in sorted(model.iterdir()):
        (read if cache == "warm" else forget)(file)
    load = os.getloadavg()[0]
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(told, cwd=ROOT, env=environment, stdout=log, stderr=log)
        peak = anonymous = 0
        while True:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            memory = status_of(child.pid)
            peak, anonymous = max(peak, memory.get("VmHWM", 0)), max(anonymous, memory.get("RssAnon", 0))
            time.sleep(0.02)
        wall = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{told}: exit {child.returncode}: {log.read()[-2000:].decode(errors='replace')}")
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "user_seconds": round(used.ru_utime, 1),
        "peak_bytes": max(peak, used.ru_maxrss * 1024),
        "anonymous_bytes": anonymous,
        "load_before": round(load, 1),
    }


def status_of(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def read(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(2**24):
            pass


def forget(file: Path) -> None:
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync(folder: Path) -> None:
    """What was written is on the disk before the next side begins, or it would pay for this one."""
    for file in folder.rglob("*.gguf"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def written(work: Path) -> list[Path]:
    """What both sides have written, where both have."""
    found = [next((work / side).rglob("model.gguf"), None) for side in ("ours", "converter")]
    return [file for file in found if file] if all(found) else []


def same(work: Path) -> dict[str, int]:
    """How many tensors the files have, and how many are equal bit for bit."""
    told = [sys.executable, "-c", SAME, *map(str, written(work))]
    ours, theirs, equal = map(int, subprocess.run(told, check=True, capture_output=True).stdout.split())
    return {"ours": ours, "converter": theirs, "equal": equal}


def tell(found: dict[str, Any], result: Path) -> None:
    """Medians of both sides and their ratios, so far."""
    table: dict[str, Any] = {}
    for dtype, cache in dict.fromkeys((run["dtype"], run["cache"]) for run in found["runs"]):
        runs = [run for run in found["runs"] if (run["dtype"], run["cache"]) == (dtype, cache)]
        ours, theirs = ([r for r in runs if r["side"] == side] for side in ("ours", "converter"))
        if len(ours) == len(theirs):
            table[f"{dtype} {cache}"] = row(ours, theirs)
    found["table"] = table
    found["bars"] = BARS | {
        "met": all(
            row["wall_ratio"] <= BARS["wall_ratio"] and row["peak_ratio"] <= BARS["memory_ratio"]
            for row in table.values()
        )
    }
    print(json.dumps(found["runs"][-1]), flush=True)
    write_json(result, found)


def row(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"repeats": len(ours)}
    for name in ("wall_seconds", "cpu_seconds", "peak_bytes", "anonymous_bytes"):
        a, b = (statistics.median(run[name] for run in side) for side in (ours, theirs))
        out |= {f"ours_{name}": a, f"converter_{name}": b, f"{name.split('_')[0]}_ratio": round(a / b, 3)}
    return out


def make(folder: Path, config: dict[str, Any]) -> None:
    """The checkpoint: config.json, Qwen2.5's tokenizer, shards and their index."""
    import numpy as np
    from transformers import AutoTokenizer

    from foundation.shape import ModelShape

    data = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))
    AutoTokenizer.from_pretrained(str(data / "tokenizers" / "qwen2.5")).save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    drawn = np.random.default_rng(17).standard_normal(PATTERN_NUMBERS, np.float32) * np.float32(0.02)
    pattern = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in ModelShape.from_config(config).tensors().items():
        if shards[-1] and 2 * sum(map(numbers, [*shards[-1].values(), size])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, pattern)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def numbers(size: tuple[int, ...]) -> int:
    return size[0] * (size[1] if len(size) > 1 else 1)


def write_shard(path: Path, shard: dict[str, tuple[int, ...]], pattern: Any) -> None:
    header, at = {}, 0
    for name, size in shard.items():
        end = at + 2 * numbers(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for count, size in enumerate(shard.values()):
            start, left = 977 * count % len(pattern), numbers(size)
            while left:
                part = pattern[start : start + left]
                file.write(part.tobytes())
                start, left = 0, left - len(part)


if __name__ == "__main__":
    main()

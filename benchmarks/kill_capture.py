"""kill -9 at random moments of a capture, twice each: does every resumed store end with the same bytes?

A tiny teacher with random weights is captured as `samovar stage distill.capture` does it, in some twenty
shards, as top-K in even trials and as random draws in odd ones. One undisturbed capture of each gives the
reference. A trial starts one, kills its process at a random moment, starts it again, kills it once more, and
lets the third start finish. The moments are drawn over the capture's own progress: so many shards, and a random
part of the time of one more; a busy machine then shifts no kill out of the capture. The processes are forked
from one that has imported torch, so that the start of Python takes no part. A verdict is kept, so the script
goes on where it was stopped.

    python benchmarks/kill_capture.py --trials 30
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - imported once, here, for all forked processes
from kill_trials import digests
from transformers import LlamaForCausalLM  # noqa: F401 - likewise

import distill.codec  # noqa: F401 - likewise
from adaptation.scratch import train_tokenizer
from foundation.dataio import write_jsonl
from foundation.model import create, save
from samovar.alone import run_alone
from samovar.screen import NoScreen

ROOT = Path(__file__).resolve().parent.parent
SUPPORTS = {"top_k": {"top_k": 20, "mass": 0.99}, "sampled": {"support": "sampled", "draws": 30}}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def made_inputs(folder: Path, conversations: int) -> None:
    """A teacher and its data under `folder`, the same every time."""
    draw = random.Random(17)
    words = ["squat", "plank", "rest", "crew", "flight", "приседания", "отдых", "экипаж", "день", "раз"]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(conversations)]
    write_jsonl(folder / "data.jsonl", [
        {"messages": [{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text}]}
        for text in texts
    ])  # fmt: skip
    train_tokenizer(texts * 2, 1000, 512, folder / "tokenizer")
    save(create(CONFIG, 17), folder / "tokenizer", folder / "teacher")


def start(folder: Path, out: Path, settings: dict[str, Any]) -> BaseProcess:
    """A process that captures into `out`, what it says beside it."""
    process = multiprocessing.get_context("fork").Process(target=captured, args=(folder, out, settings))
    process.start()
    return process


def captured(folder: Path, out: Path, settings: dict[str, Any]) -> None:
    """What `samovar stage distill.capture` does after reading its arguments."""
    with Path(f"{out}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    roles = {"teacher": [str(folder / "teacher")], "data": [str(folder / "data.jsonl")]}
    run_alone("distill.capture", roles, {**settings, "shard_rows": 32, "batch_tokens": 2048}, out, NoScreen())


def shards(out: Path) -> int:
    """How many whole shards lie on disk."""
    return len(list((out.with_name(out.name + ".partial") / "store").glob("*.topk")))


def killed_at(process: BaseProcess, out: Path, moment: float, shard_seconds: float) -> bool:
    """Kill the process when `moment` shards are done; False where it ended before that."""
    while process.is_alive() and shards(out) < int(moment):
        time.sleep(0.002)
    process.join(moment % 1 * shard_seconds)
    alive = process.is_alive()
    process.kill()  # SIGKILL
    process.join()
    return alive


def state(out: Path) -> str:
    """What a kill left: how many whole and half-written shards, and whether the store was sealed already."""
    for folder in (out, out.with_name(out.name + ".partial")):
        if (store := folder / "store").is_dir():
            names = [path.name for path in store.iterdir()]
            whole = sum(name.endswith(".topk") for name in names)
            return f"{whole} shards, {len(names) - whole - ('header.json' in names)} half" + (
                ", sealed" if "header.json" in names else ""
            )
    return "nothing"


def trial(
    folder: Path, out: Path, settings: dict[str, Any], whole: dict[str, Any], rng: random.Random
) -> dict[str, object]:
    """One capture killed twice and then finished."""
    for left in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    kills: list[dict[str, object]] = []
    for _ in range(2):
        process = start(folder, out, settings)
        moment = rng.uniform(shards(out), whole["shards"])
        if killed_at(process, out, moment, whole["seconds"] / whole["shards"]):
            kills.append({"at_shard": round(moment, 3), "left": state(out)})
    return {"kills": kills, "exit_code": ended(start(folder, out, settings)), "digests": store_digests(out)}


def ended(process: BaseProcess) -> int | None:
    """The exit code of a process, when it has one."""
    process.join()
    return process.exitcode


def store_digests(out: Path) -> dict[str, str]:
    """sha256 of every file of the finished artifact."""
    return {name: digest for name, digest in digests(out.parent).items() if name.startswith(f"{out.name}/")}


def reference(folder: Path, support: str) -> dict[str, object]:
    """Digests, shards and seconds of an undisturbed capture."""
    cell = folder / f"reference-{support}.json"
    if not cell.is_file():
        out = folder / "reference"
        for left in (out, out.with_name("reference.partial")):
            shutil.rmtree(left, ignore_errors=True)
        ended(start(folder, folder / "warm", SUPPORTS[support]))  # compiles the codec, which is then kept
        shutil.rmtree(folder / "warm", ignore_errors=True)
        began = time.monotonic()
        if ended(start(folder, out, SUPPORTS[support])):
            raise SystemExit(Path(f"{out}.log").read_text()[-3000:])
        digests_there = store_digests(out)
        found = {
            "seconds": time.monotonic() - began,
            "shards": sum(name.endswith(".topk") for name in digests_there),
            "digests": digests_there,
        }
        cell.write_text(json.dumps(found))
    return json.loads(cell.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--conversations", type=int, default=640, help="how long a capture takes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kill-capture")
    parser.add_argument("--result", type=Path, help="write the verdicts there as JSON")
    options = parser.parse_args()
    folder = options.out
    if not (folder / "teacher" / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        maker = multiprocessing.get_context("fork").Process(
            target=made_inputs, args=(folder, options.conversations)
        )
        maker.start()  # torch's threads would not survive a fork
        ended(maker)
    whole = {support: reference(folder, support) for support in SUPPORTS}
    for support, found in whole.items():
        print(f"{support}: {found['seconds']:.1f} s, {len(found['digests'])} files", flush=True)
    rows = []
    for number in range(options.trials):
        support = list(SUPPORTS)[number % len(SUPPORTS)]
        cell = folder / f"trial-{options.seed}-{number}.json"
        if not cell.is_file():
            rng = random.Random(f"{options.seed} {number}")
            verdict = trial(folder, folder / "reference", SUPPORTS[support], whole[support], rng)
            cell.write_text(json.dumps(verdict))
        verdict = json.loads(cell.read_text())
        good = verdict["exit_code"] == 0 and verdict["digests"] == whole[support]["digests"]
        rows.append({"support": support, "same_bytes": good, "kills": verdict["kills"]})
        print(f"trial {number}: {rows[-1]}", flush=True)
    good, kills = sum(row["same_bytes"] for row in rows), sum(len(row["kills"]) for row in rows)
    print(f"{good} of {len(rows)} trials ended with the reference's bytes, after {kills} kills")
    if options.result:
        files = {support: len(found["digests"]) for support, found in whole.items()}
        text = json.dumps({"reference_files": files, "kills": kills, "trials": rows}, indent=1)
        options.result.write_text(text + "\n", encoding="utf-8")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

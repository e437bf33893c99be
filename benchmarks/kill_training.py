"""kill -9 at random moments of training, and again after the resume: are the weights the same, bit for bit?

Three kinds of training of a tiny student, in turn: all weights with packing, LoRA with gradient checkpointing,
QLoRA (nf4) with 8-bit AdamW; each beside a teacher's store. An undisturbed run of each gives the reference. A
trial is killed twice and finished by a third start; its model and curves are compared by sha256. Processes are
forked after the imports, so the moments fall into training, saving and merging. A trial's verdict is kept: the
script goes on where it was stopped.

    python benchmarks/kill_training.py --trials 30 --result benchmarks/results/kill_training.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS: dict[str, dict[str, Any]] = {
    "full, packed": {"loss": "published_code", "packing": True, "max_tokens": 128},
    "LoRA": {"loss": "forward_kl", "lora_rank": 4, "lora_alpha": 8, "gradient_checkpointing": True},
    "QLoRA, 8-bit AdamW": {
        "loss": "reverse_kl", "lora_rank": 4, "lora_alpha": 8, "base_precision": "nf4",
        "optimizer": "adamw_8bit",
    },
}  # fmt: skip
COMMON = {"steps": 40, "batch_rows": 4, "warmup_steps": 5, "learning_rate": 1e-2, "checkpoint_every_steps": 5}


def prepare(folder: Path) -> None:
    """A student, a teacher and its store, all tiny."""
    from tiny import chats, tiny_model

    from distill import capture
    from foundation.dataio import write_jsonl
    from foundation.report import Silent

    # Wider than the tests' student: 8-bit AdamW keeps tensors of fewer than 4,096 numbers in 32 bits.
    wide = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 1024}
    tiny_model(folder / "student", seed=3, layers=2, **wide)
    teacher = tiny_model(folder / "teacher", seed=1, initializer_range=0.3)
    write_jsonl(folder / "data.jsonl", chats(60))
    inputs = {"teacher": teacher, "data": (folder / "data.jsonl",)}
    capture.run(capture.Settings(top_k=8), inputs, folder, Silent())


def train(folder: Path, kind: str, out: Path) -> None:
    """One start of the stage: from nothing, or from what a kill left."""
    from distill import train
    from foundation.report import Silent

    inputs = {"model": folder / "student", "data": (folder / "data.jsonl",), "teacher": folder / "store"}
    train.run(train.Settings(**COMMON, **KINDS[kind]), inputs, out, Silent())


def forked(act: Callable[..., None], *arguments: object) -> Any:
    """A process of its own that is already running `act`."""
    process = multiprocessing.get_context("fork").Process(target=act, args=arguments)
    process.start()
    return process


def finished(act: Callable[..., None], *arguments: object) -> float:
    """Seconds that `act` takes in a process of its own."""
    began = time.monotonic()
    process = forked(act, *arguments)
    process.join()
    if process.exitcode:
        sys.exit(f"{act.__name__} failed")
    return time.monotonic() - began


def warm_up(folder: Path) -> None:
    """What every start would import and compile, done once, in the process that all are forked from."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401
    from transformers import Trainer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from distill.store import TopKStore
    from foundation.dataio import conversations
    from foundation.rows import chat_rows
    from foundation.tokenizer import Tokenizer

    rows, _ = chat_rows(conversations([folder / "data.jsonl"]), Tokenizer(folder / "student"), 128)
    TopKStore(folder / "store").columns(rows[0])


def digests(out: Path) -> dict[str, str]:
    """sha256 of the model's files and of the curves."""
    files = [out / "curves.jsonl", *sorted((out / "model").glob("*"))]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def steps_done(out: Path) -> int:
    """Optimiser steps whose line stands in the curves."""
    path = out / ".work" / "curves.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def killed(process: Any, out: Path, step: int, seconds: float) -> bool:
    """Kill `process` `seconds` after `step` steps are done; False where it was done before."""
    while steps_done(out) < step and process.exitcode is None:
        time.sleep(0.002)
    process.join(seconds)
    if process.exitcode is not None:
        return False
    process.kill()
    process.join()
    return True


def trial(folder: Path, kind: str, out: Path, rng: random.Random) -> dict[str, Any]:
    """Two kills, the second after the resume, and a third start to the end.

    The moments are drawn in steps and a little more, so that a busy machine does not move them: the start, any
    step, and after the last one saving and merging.
    """
    kills: list[dict[str, float]] = []
    shutil.rmtree(out, ignore_errors=True)
    while len(kills) < 2:
        # After the first kill: beyond what stands in the curves, which the resumed run cuts and writes again.
        step = rng.randint(min(steps_done(out) + 1, COMMON["steps"]) if kills else 0, COMMON["steps"])
        seconds = rng.uniform(0, 0.3)
        process = forked(train, folder, kind, out)
        if not killed(process, out, step, seconds):  # from the start, with new moments
            kills = []
            shutil.rmtree(out, ignore_errors=True)
            continue
        kills.append({"at_step": step, "seconds_after_it": round(seconds, 3), "steps_done": steps_done(out)})
    process = forked(train, folder, kind, out)
    process.join()
    return {"kind": kind, "kills": kills, "exit_code": process.exitcode, "digests": digests(out)}


def kept(cell: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gave, now or in an earlier run of this script."""
    if not cell.is_file():
        text = json.dumps(make())
        cell.with_suffix(".partial").write_text(text)
        cell.with_suffix(".partial").replace(cell)
    return json.loads(cell.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kill-training")
    parser.add_argument("--result", type=Path, help="write the verdicts there as JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    kept(out / "inputs.json", lambda: {"seconds": finished(prepare, out / "inputs")})
    warm_up(out / "inputs")

    def reference(kind: str, place: Path) -> dict[str, Any]:
        shutil.rmtree(place, ignore_errors=True)
        return {"seconds": finished(train, out / "inputs", kind, place), "digests": digests(place)}

    references = {}
    for number, kind in enumerate(KINDS):
        place = out / f"reference-{number}"
        references[kind] = kept(place.with_suffix(".json"), lambda k=kind, p=place: reference(k, p))  # type: ignore[misc]
        print(f"undisturbed, {kind}: {references[kind]['seconds']:.1f} s", flush=True)
    rows = []
    for number in range(options.trials):
        kind = list(KINDS)[number % len(KINDS)]
        rng = random.Random(f"{options.seed} {number}")
        verdict = kept(
            out / f"trial-{options.seed}-{number}.json",
            lambda k=kind, r=rng: trial(out / "inputs", k, out / "trial", r),  # type: ignore[misc]
        )
        same = verdict.pop("digests") == references[kind]["digests"]
        rows.append({**verdict, "same_bytes": same})
        print(f"trial {number}: {rows[-1]}", flush=True)
    good = sum(row["same_bytes"] and row["exit_code"] == 0 for row in rows)
    print(f"{good} of {len(rows)} trials ended with the reference's bytes")
    if options.result:
        facts = {"good": good, "of": len(rows), "settings": COMMON, "trials": rows}
        options.result.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

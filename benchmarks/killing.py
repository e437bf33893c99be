"""kill -9 at random moments of a stage, and again after the resume: is its result the same, bit for bit?

What the scripts that ask this of one stage share. An undisturbed run of every kind gives the reference. A trial
is killed twice and finished by a third start; what it made is compared by sha256. Processes are forked after
the imports, so the moments fall into the work. They are drawn in units of the work that is done, and a little
more, so that a busy machine does not move them. A trial's verdict is kept: a script goes on where it was
stopped.
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LONGEST_WAIT = 0.3  # seconds after a unit


class Victim(ABC):
    """A stage that is killed: how it is started, how far it is, and what must be the same in the end."""

    kinds: Sequence[str]
    unit: str

    @abstractmethod
    def prepare(self, inputs: Path) -> None:
        """Write what all starts read."""

    @abstractmethod
    def warm_up(self, inputs: Path) -> None:
        """What every start would import and compile, done once, in the process that all are forked from."""

    @abstractmethod
    def start(self, inputs: Path, kind: str, out: Path) -> None:
        """One start of the stage: from nothing, or from what a kill left."""

    @abstractmethod
    def done(self, out: Path) -> int:
        """Units of work that are done."""

    @abstractmethod
    def result(self, out: Path) -> dict[str, str]:
        """What the stage made, by name."""

    def state(self, out: Path) -> dict[str, Any]:
        """What a kill left."""
        return {f"{self.unit}s_done": self.done(out)}


def digests(out: Path, paths: Iterable[Path]) -> dict[str, str]:
    """sha256 of those `paths` under `out` that are files and that sealing the artifact would keep."""
    from foundation.files import TEMPORARY

    files = sorted(path for path in paths if path.is_file() and not TEMPORARY.fullmatch(path.name))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counted_words(path: Path) -> Any:
    """A Report that adds a byte to `path` whenever something is told."""
    from foundation.report import Silent

    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Words(Silent):
        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            os.write(file, b".")

        def note(self, text: str) -> None:
            os.write(file, b".")

    return Words()


def words_told(path: Path) -> int:
    """How often a Report of `counted_words` was told something, in all starts together."""
    return path.stat().st_size if path.is_file() else 0


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


def killed(process: Any, units_done: Callable[[], int], at: int, seconds: float) -> bool:
    """Kill `process` `seconds` after `at` units are done; False where it ended before."""
    while units_done() < at and process.exitcode is None:
        time.sleep(0.002)
    process.join(seconds)
    if process.exitcode is not None:
        return False
    process.kill()
    process.join()
    return True


def reference(victim: Victim, inputs: Path, kind: str, out: Path) -> dict[str, Any]:
    """An undisturbed run."""
    shutil.rmtree(out, ignore_errors=True)
    seconds = finished(victim.start, inputs, kind, out)
    return {"seconds": seconds, "units": victim.done(out), "result": victim.result(out)}


def trial(victim: Victim, inputs: Path, kind: str, out: Path, rng: random.Random, last: int) -> dict[str, Any]:
    """Two kills, the second after the resume, and a third start to the end; `last` units are a whole run."""
    kills: list[dict[str, Any]] = []
    shutil.rmtree(out, ignore_errors=True)
    while len(kills) < 2:
        # After the first kill: beyond what was done before it, some of which the resumed run does again.
        at = rng.randint(min(victim.done(out) + 1, last) if kills else 0, last)
        seconds = rng.uniform(0, LONGEST_WAIT)
        process = forked(victim.start, inputs, kind, out)
        if not killed(process, lambda: victim.done(out), at, seconds):  # from the start, with new moments
            kills = []
            shutil.rmtree(out, ignore_errors=True)
            continue
        moment = {f"at_{victim.unit}": at, "seconds_after_it": round(seconds, 3)}
        kills.append({**moment, **victim.state(out)})
    process = forked(victim.start, inputs, kind, out)
    process.join()
    return {"kind": kind, "kills": kills, "exit_code": process.exitcode, "result": victim.result(out)}


def kept(cell: Path, make: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What `make` gave, now or in an earlier run of the script."""
    if not cell.is_file():
        text = json.dumps(make(*arguments))
        cell.with_suffix(".partial").write_text(text)
        cell.with_suffix(".partial").replace(cell)
    found: dict[str, Any] = json.loads(cell.read_text())
    return found


def main(victim: Victim, doc: str, name: str, settings: dict[str, Any]) -> int:
    """The command line. Returns 1 when a trial did not end with the reference's bytes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / name)
    parser.add_argument("--result", type=Path, help="write the verdicts there as JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    out: Path = options.out
    inputs = out / "inputs"
    out.mkdir(parents=True, exist_ok=True)
    kept(out / "inputs.json", lambda: {"seconds": finished(victim.prepare, inputs)})
    victim.warm_up(inputs)
    references = {}
    for number, kind in enumerate(victim.kinds):
        cell = out / f"reference-{number}.json"
        references[kind] = kept(cell, reference, victim, inputs, kind, cell.with_suffix(""))
        print(f"undisturbed, {kind}: {references[kind]['seconds']:.1f} s", flush=True)
    rows = []
    for number in range(options.trials):
        kind = victim.kinds[number % len(victim.kinds)]
        rng, units = random.Random(f"{options.seed} {number}"), references[kind]["units"]
        cell = out / f"trial-{options.seed}-{number}.json"
        verdict = kept(cell, trial, victim, inputs, kind, out / "trial", rng, units)
        wanted, made = references[kind]["result"], verdict.pop("result")
        differ = sorted(file for file in wanted | made if wanted.get(file) != made.get(file))
        rows.append({**verdict, "same_bytes": not differ, **({"differ": differ} if differ else {})})
        print(f"trial {number}: {rows[-1]}", flush=True)
    good = sum(row["same_bytes"] and row["exit_code"] == 0 for row in rows)
    print(f"{good} of {len(rows)} trials ended with the reference's bytes")
    if options.result:
        facts = {"good": good, "of": len(rows), "settings": settings, "trials": rows}
        options.result.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if good == len(rows) else 1

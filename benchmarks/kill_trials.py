"""kill -9 at random moments of the shortened quickstart: does every resumed run end with the same bytes?

One undisturbed run gives the reference digests. Each trial starts a run, kills its process at a random moment,
resumes it, kills it once more, and lets the third start finish. Only the run's own process is killed: its
workers must notice by themselves. A trial's verdict is kept, so the script goes on where it was stopped.

    python benchmarks/kill_trials.py --trials 10
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """`samovar run --short` of the recipe into `out`, its output beside it."""
    with Path(f"{out}.log").open("ab") as log:
        command = [sys.executable, "-m", "samovar.cli", "run", "--short", "--out", str(out), str(recipe)]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def digests(run: Path) -> dict[str, str]:
    """sha256 of every file of every finished artifact, from the disk; manifests hold times and stay out."""
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for manifest in sorted(run.glob("*/manifest.json"))
        for file in sorted(manifest.parent.rglob("*"))
        if file.is_file() and file != manifest
    }


def trial(recipe: Path, out: Path, seconds: float, rng: random.Random) -> dict[str, object]:
    """One run killed twice; the moments are drawn over the time that an undisturbed run takes."""
    shutil.rmtree(out, ignore_errors=True)
    killed = []
    limit = seconds
    for _ in range(2):
        process = start(recipe, out)
        moment = rng.uniform(0.2, 0.85 * limit)  # early enough to meet a run that is a little faster
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.append(round(moment, 2))
            limit = max(1.0, limit - moment)
    code = start(recipe, out).wait()
    return {"killed_after_seconds": killed, "exit_code": code, "digests": digests(out)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.toml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kill-trials")
    parser.add_argument("--result", type=Path, help="write the verdicts there as JSON")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cell = options.out / "reference.json"
    if not cell.is_file():
        shutil.rmtree(options.out / "reference", ignore_errors=True)
        began = time.monotonic()
        code = start(options.recipe, options.out / "reference").wait()
        if code:
            print(Path(f"{options.out / 'reference'}.log").read_text()[-3000:], file=sys.stderr)
            return code
        seconds = time.monotonic() - began
        cell.write_text(json.dumps({"seconds": seconds, "digests": digests(options.out / "reference")}))
    reference = json.loads(cell.read_text())
    print(f"undisturbed: {reference['seconds']:.0f} s, {len(reference['digests'])} files", flush=True)
    rows = []
    for number in range(options.trials):
        cell = options.out / f"trial-{options.seed}-{number}.json"
        if not cell.is_file():
            rng = random.Random(f"{options.seed} {number}")
            verdict = trial(options.recipe, options.out / "trial", reference["seconds"], rng)
            cell.write_text(json.dumps(verdict))
        verdict = json.loads(cell.read_text())
        differ = sorted(
            name
            for name in reference["digests"].keys() | verdict["digests"].keys()
            if reference["digests"].get(name) != verdict["digests"].get(name)
        )
        rows.append({**{k: v for k, v in verdict.items() if k != "digests"}, "differ": differ})
        print(f"trial {number}: {rows[-1]}", flush=True)
    good = sum(not row["differ"] and row["exit_code"] == 0 for row in rows)
    kills = sum(len(row["killed_after_seconds"]) for row in rows)
    print(f"{good} of {len(rows)} trials ended with the reference's bytes, after {kills} kills")
    if options.result:
        verdict = {"reference_files": len(reference["digests"]), "trials": rows}
        options.result.write_text(json.dumps(verdict, indent=1) + "\n")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

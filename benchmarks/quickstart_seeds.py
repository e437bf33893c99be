"""The quickstart with several seeds: what it reaches, and how far that spreads.

Each seed is a run of its own under runs/seeds/, so the script goes on where it was stopped.

    python benchmarks/quickstart_seeds.py --seeds 17 18 19
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(seed: int, out: Path) -> Path:
    """Run recipes/quickstart.toml with `seed`; returns the run directory."""
    recipe = out / f"recipe-{seed}" / "quickstart.toml"  # the name by which the recipe reads itself
    recipe.parent.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "recipes" / "quickstart.toml").read_text(encoding="utf-8")
    recipe.write_text(re.sub(r"(?m)^seed = \d+$", f"seed = {seed}", text), encoding="utf-8")
    folder = out / str(seed)
    command = [sys.executable, "-m", "samovar.cli", "run", "--out", str(folder), str(recipe)]
    with (out / f"{seed}.log").open("ab") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return folder


def figures(folder: Path) -> dict[str, float]:
    """Everything that the bars speak of, by name."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*/scores.json")):
        name, scores = path.parent.name.removesuffix("_score"), json.loads(path.read_text(encoding="utf-8"))
        for text, value in scores.get("bits_per_byte", {}).items():
            found[f"{name}: bits per byte, {text}"] = value
        if "programmes" in scores:
            for language in ("en", "ru"):
                found[f"{name}: valid share, {language}"] = scores["programmes"][language]["share"]
            found[f"{name}: valid share, mean"] = scores["programmes"]["mean"]
    vocabulary = json.loads((folder / "vocabulary" / "manifest.json").read_text())["figures"]
    found["tokens per word before"] = vocabulary["tokens_per_word_before"]
    found["tokens per word after"] = vocabulary["tokens_per_word_after"]
    facts = json.loads((folder / "world" / "world.json").read_text())
    found["best constant answer: valid share"] = facts["constant_share"]
    manifests = [json.loads(path.read_text()) for path in folder.glob("*/manifest.json")]
    found["core-seconds of all stages"] = sum(manifest["seconds"] for manifest in manifests)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seeds")
    result = ROOT / "benchmarks" / "results" / "quickstart_seeds.json"
    parser.add_argument("--result", type=Path, default=result)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    by_seed = {seed: figures(run(seed, options.out)) for seed in options.seeds}
    names = list(by_seed[options.seeds[0]])
    print(f"{'':52}" + "".join(f"{seed:>9}" for seed in options.seeds) + f"{'mean':>9}{'spread':>9}")
    for name in names:
        values = [by_seed[seed][name] for seed in options.seeds]
        spread = max(values) - min(values)
        print(
            f"{name:52}" + "".join(f"{v:9.3f}" for v in values) + f"{statistics.mean(values):9.3f}{spread:9.3f}"
        )
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    result = {"machine": machine, "seeds": {str(seed): values for seed, values in by_seed.items()}}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

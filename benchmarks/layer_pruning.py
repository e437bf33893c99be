"""The five ways of removing layers that LayerKD compares, and its mixtures of losses, in miniature.

Each seed is a run of its own under runs/layer_pruning/: a model of 12 layers that knows the flight-crew world is
trained, a dense one of 8 layers beside it, and then layers are removed by every method to two thirds of the
depth; prune.report measures all of them on profiles that were never trained on. stories260K, a model that
nobody here trained, goes from 5 layers to 3. A stage that is done is never done again.

    python benchmarks/layer_pruning.py                       # all seeds, then the tables
    python benchmarks/layer_pruning.py --seeds 17            # one seed
    python benchmarks/layer_pruning.py --tables              # the tables alone
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks" / "layer_pruning"
RESULT = ROOT / "benchmarks" / "results" / "layer_pruning.json"
PICTURES = ROOT / "docs" / "pruning"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds

METHODS = {
    "shortgpt": 'importance = "influence"\nrescore = false\nheals = false',
    "bi": 'importance = "influence"\nheals = false',
    "bi_healed": 'importance = "influence"\n{heal}',
    "task": "heals = false",
    "task_healed": "{heal}",
}
LOGITS = ("kl", "kl_100", "kl_reverse", "kl_scaled", "logprob_mse", "logit_mse")
HIDDEN = ("none", "last", "trained", "trained_last", "all")
# As many mixtures as the paper's table 1: each logit loss alone and with the default hidden states, each choice of
# hidden states beside plain KL, and hidden states without any logits.
LOSSES = [
    *((logits, "none") for logits in LOGITS),
    *((logits, "trained_last") for logits in LOGITS),
    *(("kl", hidden) for hidden in HIDDEN if hidden not in ("none", "trained_last")),
    *(("none", hidden) for hidden in ("trained_last", "all")),
]
HEAL = {
    "world": "steps = 150\nlearning_rate = 1e-3\nbatch_rows = 16",
    "stories260k": "steps = 150\nlearning_rate = 1e-3\nbatch_rows = 16\nmax_tokens = 256",
}
READS = {
    "world": 'reads = { model = "model", data = ["world.chat_english", "world.chat_russian"] }',
    "stories260k": 'reads = { model = "model", corpus = "corpus", tasks = ["choosing"] }',
}
REPORTED = {
    "world": '["world.profiles", "world.choices_english", "world.choices_russian"]',
    "stories260k": '["held", "continued"]',
}
REMOVED = {"world": 4, "stories260k": 2}


def recipe(data: str, seed: int) -> str:
    """The recipe of one seed: what it stands on, every pruning, and two reports."""
    text = (HERE / f"{data}.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^seed = \d+$", f"seed = {seed}", text)
    stages = [text]
    for name, settings in METHODS.items():
        stages.append(_stage(name, data, f"remove_layers = {REMOVED[data]}\n" + settings.format(heal=HEAL[data])))
    losses = []
    for logits, hidden in LOSSES if data == "world" else ():
        name = f"{logits}__{hidden}"
        told = f'label = "{logits} + {hidden}"\nlogit_loss = "{logits}"\nhidden_loss = "{hidden}"'
        two = 'remove_layers = 3\nlayers_per_step = 3\nimportance = "influence"'
        losses.append(name)
        stages.append(_stage(name, data, f"{two}\n{HEAL[data]}\n{told}"))
    dense = ', dense = ["dense8"]' if data == "world" else ""
    for report, steps in {"methods": list(METHODS), "losses": losses}.items():
        if steps:
            listed = ", ".join(f'"{name}.steps"' for name in steps)
            reads = f'model = "model", steps = [{listed}], tasks = {REPORTED[data]}{dense}'
            stages.append(f'[[stage]]\nname = "{report}"\nkind = "prune.report"\nreads = {{ {reads} }}\n')
    return "\n".join(stages)


def _stage(name: str, data: str, settings: str) -> str:
    return f'[[stage]]\nname = "{name}"\nkind = "prune.iterate"\n{READS[data]}\n{settings}\n'


def run(data: str, seed: int, out: Path) -> Path:
    """Run (or finish) the recipe of one seed; returns the run's folder."""
    out.mkdir(parents=True, exist_ok=True)
    path, folder = out / f"{data}-{seed}.toml", out / f"{data}-{seed}"
    path.write_text(recipe(data, seed), encoding="utf-8")
    command = [sys.executable, "-m", "samovar.cli", "run", "--out", str(folder), str(path)]
    with (out / f"{data}-{seed}.log").open("ab") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=HEAL, default=list(HEAL))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "layer_pruning")
    parser.add_argument("--tables", action="store_true", help="no runs: the tables of what was measured")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if not options.tables:
        if "stories260k" in options.data:
            write_stories(options.out)
        for seed in options.seeds:
            for data in options.data:
                keep(found, data, seed, run(data, seed, options.out))
    tables(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

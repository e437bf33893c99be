"""The five ways of removing layers that LayerKD compares, and its mixtures of losses, in miniature.

Each seed is a run of its own under runs/layer_pruning/: a model of 12 layers that knows the flight-crew world
is trained, a dense one of 8 layers beside it, and then layers are removed by every method to two thirds of the
depth; prune.report measures all of them on profiles that were never trained on. stories260K, a model that
nobody here trained, goes from 5 layers to 3. A stage that is done is never done again.

    python benchmarks/layer_pruning.py                       # all seeds, then the tables
    python benchmarks/layer_pruning.py --seeds 17            # one seed
    python benchmarks/layer_pruning.py --tables              # the tables alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from seeds import DATA, ROOT, mean, run_recipe

HERE = ROOT / "benchmarks" / "layer_pruning"
RESULT = ROOT / "benchmarks" / "results" / "layer_pruning.json"
PICTURES = ROOT / "docs" / "pruning"

METHODS = {
    "shortgpt": 'importance = "influence"\nrescore = false\nheals = false',
    "bi": 'importance = "influence"\nheals = false',
    "bi_healed": 'importance = "influence"\n{heal}',
    "task": "heals = false",
    "task_healed": "{heal}",
}
LOGITS = ("kl", "kl_100", "kl_reverse", "kl_scaled", "logprob_mse", "logit_mse")
HIDDEN = ("none", "last", "trained", "trained_last", "all")
# As many mixtures as the paper's table 1: each logit loss alone and with the default hidden states, each choice
# of hidden states beside plain KL, and hidden states without any logits.
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
    "world": '["world.profiles", "world.tasks_choices_english", "world.tasks_choices_russian"]',
    "stories260k": '["held", "continued"]',
}
REMOVED = {"world": 4, "stories260k": 2}
# What the paper's way of healing (neighbours, a weight of 1/100) leaves on the table in a model this shallow.
BEYOND = {
    "world": {},
    "stories260k": {
        "task_healed_all": 'label = "the same, all layers, KL, 300 steps"\n'
        'trains = "all"\nlogit_loss = "kl"\nsteps = 300\nlearning_rate = 1e-3\n'
        "batch_rows = 16\nmax_tokens = 256"
    },
}


def recipe(data: str, seed: int) -> str:
    """The recipe of one seed: what it stands on, the five methods and their report, the losses and theirs."""
    text = (HERE / f"{data}.toml").read_text(encoding="utf-8")
    stages = [re.sub(r"(?m)^seed = \d+$", f"seed = {seed}", text)]
    methods = METHODS | BEYOND[data]
    for name, settings in methods.items():
        told = settings.format(heal=HEAL[data])
        stages.append(_stage(name, data, f"remove_layers = {REMOVED[data]}\n{told}"))
    stages.append(_report("methods", list(methods), data))
    if data != "world":
        return "\n".join(stages)
    for logits, hidden in LOSSES:
        told = f'label = "{logits} + {hidden}"\nlogit_loss = "{logits}"\nhidden_loss = "{hidden}"'
        at_once = 'remove_layers = 6\nlayers_per_step = 6\nimportance = "influence"'
        stages.append(_stage(f"{logits}__{hidden}", data, f"{at_once}\n{HEAL[data]}\n{told}"))
    return "\n".join([*stages, _report("losses", [f"{logits}__{hidden}" for logits, hidden in LOSSES], data)])


def _report(name: str, prunings: list[str], data: str) -> str:
    listed = ", ".join(f'"{pruning}.steps"' for pruning in prunings)
    dense = ', dense = ["dense8"]' if data == "world" else ""
    reads = f'model = "model", steps = [{listed}], tasks = {REPORTED[data]}{dense}'
    return f'[[stage]]\nname = "{name}"\nkind = "prune.report"\nreads = {{ {reads} }}\n'


def _stage(name: str, data: str, settings: str) -> str:
    return f'[[stage]]\nname = "{name}"\nkind = "prune.iterate"\n{READS[data]}\n{settings}\n'


def write_stories(out: Path) -> None:
    """stories260K's own stories: to heal on, to choose layers on, and held out; with greedy continuations."""
    import torch

    from foundation.dataio import write_jsonl
    from foundation.greedy import greedy
    from foundation.model import load
    from foundation.report import Silent
    from foundation.tokenizer import Tokenizer

    folder, model_folder = out / "stories260k", DATA / "models" / "stories260K"
    if (folder / "continued.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").unlink(missing_ok=True)
    (folder / "model").symlink_to(model_folder.resolve(), target_is_directory=True)
    model, tokenizer = load(model_folder), Tokenizer(model_folder)
    texts: list[str] = []
    torch.manual_seed(17)
    while len(texts) < 1600:
        start = torch.full((100, 1), tokenizer.boundary_id)
        made = model.generate(start, do_sample=True, top_k=0, max_new_tokens=220, pad_token_id=tokenizer.pad_id)
        texts += [tokenizer.decode(ids[1:].tolist()).strip() for ids in made]
        print(f"\rstories260K wrote {len(texts)} stories", end="", flush=True)
    parts = {"text": texts[:1300], "choosing": texts[1300:1430], "held": texts[1430:]}
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in part))
    begun = [text[:80].rsplit(" ", 1)[0] for text in parts["held"]]
    prompts = [[tokenizer.boundary_id, *tokenizer.encode(text)] for text in begun]
    stops = frozenset({tokenizer.eos_id} - {None})
    answers = greedy(model, prompts, answer_tokens=64, stop_ids=stops, pad_id=tokenizer.pad_id, report=Silent())
    pairs = zip(begun, answers, strict=True)
    lines = ({"prompt": text, "reference": tokenizer.decode(ids)} for text, ids in pairs)
    write_jsonl(folder / "continued.jsonl", lines)


def figures(folder: Path, report: str) -> dict[str, Any]:
    """What the tables are made of, out of a run's report: scores by label and depth, order, dense models."""
    found = json.loads((folder / report / "report.json").read_text(encoding="utf-8"))
    methods = {
        method["label"]: {
            "order": method["order"][0],
            "depths": [
                {
                    "removed": row["layers_removed"],
                    "score": row["score"]["mean"],
                    "tasks": {name: task["mean"] for name, task in row["tasks"].items()},
                    "parameters": row["parameters"],
                    "q4_k_m_bytes": row["gguf_bytes"].get("Q4_K_M"),
                }
                for row in method["depths"]
            ],
        }
        for method in found["methods"]
    }
    dense = {
        name: {
            "score": found["models"][name]["score"]["mean"],
            "tasks": {task: value["mean"] for task, value in found["models"][name]["tasks"].items()},
            "parameters": found["models"][name]["parameters"],
        }
        for name in found["dense"]
    }
    return {"layers": found["layers"], "methods": methods, "dense": dense}


def show(found: dict[str, Any]) -> None:
    """The tables, over the seeds that are there: mean and half of the 95 % interval."""
    for name, by_seed in found.items():
        if name == "machine":
            continue
        seeds = list(by_seed.values())
        print(f"\n{name}: {len(seeds)} seed(s) {', '.join(by_seed)}, score of 1 and (share of the original's)")
        depths = [row["removed"] for row in next(iter(seeds[0]["methods"].values()))["depths"]]
        print(f"{'layers removed':36}" + "".join(f"{n:>22}" for n in depths))
        for label in seeds[0]["methods"]:
            cells = []
            for place in range(len(depths)):
                scores = [seed["methods"][label]["depths"][place]["score"] for seed in seeds]
                whole = [seed["methods"][label]["depths"][0]["score"] for seed in seeds]
                shares = [score / base for score, base in zip(scores, whole, strict=True)]
                cells.append(f"{mean(scores)} ({statistics.mean(shares):.0%})")
            print(f"{label:36}" + "".join(f"{cell:>22}" for cell in cells))
        for dense in seeds[0]["dense"]:
            print(f"{'dense: ' + dense:36}{mean([seed['dense'][dense]['score'] for seed in seeds]):>22}")
        print("order in which layers went, in original numbers")
        for label in seeds[0]["methods"]:
            orders = [
                " ".join("+".join(map(str, step)) for step in seed["methods"][label]["order"]) for seed in seeds
            ]
            print(f"{label:36}" + " | ".join(orders))


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
                folder = run_recipe(recipe(data, seed), options.out / f"{data}-{seed}")
                for report in ("methods", "losses"):
                    if (folder / report).is_dir():
                        found.setdefault(f"{data}, {report}", {})[str(seed)] = figures(folder, report)
                    if (data, seed) == ("world", options.seeds[0]) and (folder / report).is_dir():
                        keep_pictures(folder / report, f"{data}-{report}")
                found["machine"] = {"python": platform.python_version(), "cores": os.cpu_count()}
                RESULT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    show(found)
    return 0


def keep_pictures(report: Path, name: str) -> None:
    """The first seed's pictures of the world, for docs/pruning.md."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for picture in ("score", "order", "frequency"):
        shutil.copyfile(report / f"{picture}.svg", PICTURES / f"{name}-{picture}.svg")


if __name__ == "__main__":
    sys.exit(main())

"""Is an extended vocabulary worth it, does propagation carry it over, and does KL keep the old language?

Three experiments; each seed is a run of its own under runs/adaptation/, one for both that read the small world.
A stage that is done is never done again.

stories       stories260K, an English model that others trained, learns Russian: {no extension, extension with
              mean or random new rows} x {new rows, embeddings and head, all weights}, after equal compute
propagation   the small world: a base model is extended and adapted, and carried over to its instruction-tuned
              sibling by swap, overlap and conversion; against tuning the adapted base all over again
kl            the small world: continued pre-training of all weights with and without KL to the model before

    python benchmarks/adaptation.py                              # all experiments, all seeds, then the tables
    python benchmarks/adaptation.py --only stories --seeds 17
    python benchmarks/adaptation.py --tables                     # the tables alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seeds import DATA, ROOT, mean, run_recipe

RESULT = ROOT / "benchmarks" / "results" / "adaptation.json"
SEEDS = {"stories": [17, 18, 19], "propagation": [17, 18, 19, 20, 21], "kl": [17, 18, 19, 20, 21]}
Values = dict[str, float]


def stage(name: str, kind: str, reads: str, **settings: Any) -> str:
    """One [[stage]] of a recipe; `reads` as TOML."""
    lines = ["[[stage]]", f'name = "{name}"', f'kind = "{kind}"', f"reads = {{ {reads} }}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def recipe(name: str, seed: int, stages: list[str], inputs: dict[str, str] | None = None) -> str:
    head = [f'name = "{name}"', f"seed = {seed}", "jobs = 2", ""]
    given = (
        ["[inputs]", *(f"{key} = {json.dumps(value)}" for key, value in inputs.items()), ""] if inputs else []
    )
    return "\n".join([*head, *given, *stages])


def figures(folder: Path, stage_name: str) -> dict[str, Any]:
    """What a finished stage returned."""
    return json.loads((folder / stage_name / "manifest.json").read_text(encoding="utf-8"))["figures"]


# ------------------------------------------------------------------------------------------------ stories

PARTS = {
    "new rows": {"trains": ["embeddings", "head"], "rows": "new"},
    "embeddings + head": {"trains": ["embeddings", "head"]},
    "all": {"trains": ["embeddings", "head", "layers"]},
}
# What did best on seed 16 of TRIED, in TUNING_STEPS (`--rates`); a random start takes what the mean takes.
TRIED = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
RATES = {
    ("no extension", "embeddings + head"): 2e-2,
    ("no extension", "all"): 5e-3,
    ("mean", "new rows"): 2e-2,
    ("mean", "embeddings + head"): 2e-2,
    ("mean", "all"): 1e-2,
}
STEPS, TUNING_STEPS = 400, 300  # of the extended model; one with fewer rows takes more for the same compute
ROWS, BLOCK = 8, 256


def cells() -> dict[str, tuple[str, str]]:
    """label -> (which start, what trains)."""
    return {
        f"{start}, {part}": (start, part)
        for start in ("no extension", "mean", "random")
        for part in PARTS
        if (start, part) != ("no extension", "new rows")
    }


def stories(
    seed: int,
    out: Path,
    rates: Mapping[tuple[str, str], float] = RATES,
    full_steps: int = STEPS,
    starts: Sequence[str] = ("no extension", "mean", "random"),
) -> dict[str, Values]:
    """label -> bits per byte of held-out Russian and English."""
    model = DATA / "models" / "stories260K"
    inputs = {
        "model": str(model.resolve()),
        "russian_stories": str((DATA / "text" / "tinystories-ru").resolve() / "*.jsonl"),
        "tales": str((DATA / "text" / "grimm-en" / "GrimmsFairyTales.txt").resolve()),
    }
    first = [
        stage("russian", "corpora.prepare", 'corpus = "russian_stories"', field="story", held_share=0.03),
        stage("english", "corpora.prepare", 'corpus = "tales"', held_share=0.1),
        stage(
            "vocabulary", "adaptation.vocabulary", 'model = "model", corpus = "russian.text"', add_tokens=2000
        ),
        *(
            stage(start, "adaptation.embeddings", 'model = "model", tokenizer = "vocabulary"', weighting=start)
            for start in ("mean", "random")
        ),
    ]
    folder = run_recipe(recipe("stories", seed, first, inputs), out / f"stories-{seed}")
    grown = int(figures(folder, "vocabulary")["vocab_tokens"])
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    query = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    body = layers * hidden * (2 * query + 2 * keys + 3 * config["intermediate_size"])
    longer = (body + grown * hidden) / (body + config["vocab_size"] * hidden)
    stages, names = list(first), {}
    for number, (label, (start, part)) in enumerate(cells().items()):
        if start not in starts:
            continue
        rate = rates["mean" if start == "random" else start, part]
        name = names[label] = f"cell{number}_{rate:g}".replace(".", "_").replace("-", "_")
        source = "model" if start == "no extension" else start
        reference = ', reference = "model"' if part == "new rows" else ""
        steps = round(full_steps * longer) if start == "no extension" else full_steps
        stages.append(
            stage(
                name, "adaptation.pretrain", f'model = "{source}", corpus = ["russian.text"]{reference}',
                **PARTS[part], steps=steps, block_tokens=BLOCK, batch_rows=ROWS, learning_rate=rate,
            )
        )  # fmt: skip
        stages.append(scored(name, "russian.held", "english.held", max_documents=80))
    stages.append(scored("model", "russian.held", "english.held", max_documents=80))
    run_recipe(recipe("stories", seed, stages, inputs), folder)
    names["before"] = "model"
    found = {label: bits(folder, name, "russian", "english") for label, name in names.items()}
    return found


def scored(name: str, *texts: str, **settings: Any) -> str:
    told = ", ".join(f'"{text}"' for text in texts)
    return stage(
        f"{name}_score", "evaluation.score", f'model = "{name}", texts = [{told}]', label=name, **settings
    )


def bits(folder: Path, name: str, russian: str, english: str) -> Values:
    """Bits per byte by language, out of the stage that scored `name`."""
    found = json.loads((folder / f"{name}_score" / "scores.json").read_text(encoding="utf-8"))["bits_per_byte"]

    def of(word: str) -> float:
        return next(value for key, value in found.items() if word in key)

    return {"russian": of(russian), "english": of(english)}


# ------------------------------------------------------------------------------------- the small world

WORLD = [
    '[[stage]]\nname = "world"\nkind = "corpora.world"\ndocuments = 6000\npairs_per_profile = 4\n',
    stage(
        "base", "adaptation.scratch", 'corpus = "world.english"',
        layers=4, hidden=128, ffn=384, vocab_tokens=900, batch_rows=8, steps=700, learning_rate=2.5e-3,
        context_tokens=512,
    ),
    stage("vocabulary", "adaptation.vocabulary", 'model = "base", corpus = "world.russian"', add_tokens=600),
    stage("embedded", "adaptation.embeddings", 'model = "base", tokenizer = "vocabulary"'),
]  # fmt: skip
HELD = ("world.russian_held", "world.english_held")
CALIBRATION_STEPS = 200


def propagation(seed: int, out: Path) -> dict[str, Values]:
    """label -> bits per byte at once, and bits and valid share after the same short Russian tuning."""
    tuned = {"steps": 500, "learning_rate": 2e-3}
    stages = [
        *WORLD,
        stage("instruct", "distill.train", 'model = "base", data = "world.chat_english"', **tuned),
        stage(
            "adapted", "adaptation.pretrain",
            'model = "embedded", corpus = ["world.russian", "world.english"]',
            batch_rows=8, steps=600, learning_rate=5e-3,
        ),
        stage("retuned", "distill.train", 'model = "adapted", data = "world.chat_english"', **tuned),
        stage("plain", "adaptation.embeddings", 'model = "instruct", tokenizer = "vocabulary"'),
    ]  # fmt: skip
    methods = ("swap", "overlap", "conversion")
    for method in methods:
        reads = 'base = "base", adapted = "adapted", instruct = "instruct"'
        stages.append(stage(method, "adaptation.propagate", reads, method=method))
    names = (*methods, "plain", "retuned")
    for name in names:
        stages.append(measured(name))
        stages.append(
            stage(
                f"{name}_tuned", "distill.train", f'model = "{name}", data = ["world.chat_russian"]',
                steps=CALIBRATION_STEPS, learning_rate=1e-3,
            )
        )  # fmt: skip
        stages.append(measured(f"{name}_tuned"))
    folder = run_recipe(recipe("propagation", seed, stages), out / f"world-{seed}")
    found = {}
    for name in names:
        at_once, after = whole(folder, name), whole(folder, f"{name}_tuned")
        found[name] = at_once | {f"{key}, tuned": value for key, value in after.items()}
    return found


def measured(name: str) -> str:
    """Bits per byte of both languages, and the share of valid programmes on held-out profiles."""
    reads = f'model = "{name}", texts = ["{HELD[0]}", "{HELD[1]}"], tasks = ["world.profiles"]'
    return stage(f"{name}_score", "evaluation.score", reads, label=name, max_items=400)


def whole(folder: Path, name: str) -> Values:
    scores = json.loads((folder / f"{name}_score" / "scores.json").read_text(encoding="utf-8"))
    (profiles,) = scores["tasks"].values()
    valid = {f"valid {language}": profiles[f"valid_{language}"] for language in ("ru", "en")}
    return bits(folder, name, "russian", "english") | valid


KL_WEIGHTS = (0.0, 0.1, 0.5)
MIXTURES = {"Russian alone": [1.0], "80 % Russian": [0.8, 0.2]}


def kl(seed: int, out: Path) -> dict[str, Values]:
    """label -> bits per byte of both languages after continued pre-training of all weights."""
    stages, names = [*WORLD], {"before": "embedded"}
    for number, (mixture, weights) in enumerate(MIXTURES.items()):
        corpus = ["world.russian", "world.english"][: len(weights)]
        for weight in KL_WEIGHTS:
            name = names[f"{mixture}, KL {weight:g}"] = f"cell{number}_{round(weight * 100)}"
            reads = f'model = "embedded", corpus = {json.dumps(corpus)}' + (
                ', reference = "base"' if weight else ""
            )
            stages.append(
                stage(
                    name, "adaptation.pretrain", reads, trains=["embeddings", "head", "layers"],
                    weights=weights, kl_weight=weight, block_tokens=64, batch_rows=16, steps=200,
                    learning_rate=2e-3,
                )
            )  # fmt: skip
    stages += [scored(name, *HELD) for name in names.values()]
    folder = run_recipe(recipe("kl", seed, stages), out / f"world-{seed}")
    return {label: bits(folder, name, "russian", "english") for label, name in names.items()}


EXPERIMENTS: dict[str, Callable[[int, Path], dict[str, Values]]] = {
    "stories": stories,
    "propagation": propagation,
    "kl": kl,
}


def show(found: dict[str, Any]) -> None:
    """A table an experiment, over the seeds that are there: mean and half of the 95 % interval."""
    for name in EXPERIMENTS:
        seeds = found.get(name, {})
        if not seeds:
            continue
        rows = list(seeds.values())
        columns = list(next(iter(rows[0].values())))
        print(f"\n{name}: {len(seeds)} seed(s) {', '.join(seeds)}; bits per byte, and shares of 1")
        print(f"{'':32}" + "".join(f"{column:>18}" for column in columns))
        for label in rows[0]:
            shown = [mean([row[label][column] for row in rows]) for column in columns]
            print(f"{label:32}" + "".join(f"{cell:>18}" for cell in shown))
        if name == "propagation":
            print("difference to conversion, item by item of the seeds")
            for label in rows[0]:
                shown = [
                    mean([row[label][column] - row["conversion"][column] for row in rows]) for column in columns
                ]
                print(f"{label:32}" + "".join(f"{cell:>18}" for cell in shown))


def tune_rates(out: Path) -> None:
    """How RATES was chosen: held-out Russian at each rate."""
    for rate in TRIED:
        found = stories(16, out, dict.fromkeys(RATES, rate), TUNING_STEPS, ("no extension", "mean"))
        for label, value in found.items():
            print(f"{rate:g}, {label}: {value['russian']:.4f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the bar, where not given")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "adaptation")
    parser.add_argument("--rates", action="store_true", help="how the learning rates of `stories` were chosen")
    parser.add_argument("--tables", action="store_true", help="no runs: the tables of what was measured")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if not (DATA / "models" / "stories260K").is_dir() and "stories" in options.only:
        print(
            f"stories: skipped, {DATA / 'models' / 'stories260K'} is not there; set SAMOVAR_DATA",
            file=sys.stderr,
        )
        options.only.remove("stories")
    if options.rates:
        tune_rates(options.out)
        return 0
    for name in [] if options.tables else options.only:
        for seed in options.seeds or SEEDS[name]:
            found.setdefault(name, {})[str(seed)] = EXPERIMENTS[name](seed, options.out)
            found["machine"] = {"python": platform.python_version(), "cores": os.cpu_count()}
            RESULT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

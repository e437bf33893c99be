"""Distillation against plain fine-tuning, in miniature: the tables 2-5 of RuAdapt-KD with seeds and intervals.

Two data sets, each with a teacher at least 8 times its student: the flight-crew world (share of valid
programmes for held-out profiles) and Russian stories (held-out bits per byte, and KL to the teacher). The
student was instructed for a short while; each cell goes on with LoRA under one loss, lambda, K, alpha and
seed, for the same steps. A cell whose line stands in results/kd_grid.jsonl is never done again; two run side
by side, one thread each.

    python benchmarks/kd_grid.py            # every cell that is missing, then the tables
    python benchmarks/kd_grid.py --tables   # the tables alone
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from seeds import ROOT, half_width

HERE = ROOT / "benchmarks" / "kd_grid"
RESULTS = ROOT / "benchmarks" / "results"
CELLS, RESULT = RESULTS / "kd_grid.jsonl", RESULTS / "kd_grid.json"
RANK = 32
ALPHAS = (16, 32, 64, 128)  # alpha / rank as in the paper's grid: .5, 1, 2, 4
MAIN_ALPHA, MAIN_SEEDS, OTHER_SEEDS = 32, (17, 18, 19, 20, 21), (17,)
LAMBDAS, TOP_KS = (0.1, 0.2, 0.5, 1.0), (10, 100)
PUBLISHED = "published_code"
OTHER_LOSSES = ("published", "shift_invariant", "renormalised_kl", "forward_kl", "reverse_kl", "sampled_kl")
OTHER_LAMBDA, OTHER_K = 1.0, 100
TRAINING = {
    "world": {"steps": 200, "batch_rows": 16, "learning_rate": 6e-3, "max_tokens": 256},
    "stories": {"steps": 100, "batch_rows": 8, "learning_rate": 6e-3, "max_tokens": 384},
}


@dataclass(frozen=True)
class Cell:
    """One student. `top_k` is 0 where no top-K store is read."""

    data: str
    loss: str
    kl_lambda: float
    top_k: int
    alpha: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.loss}-l{self.kl_lambda}-k{self.top_k}-a{self.alpha}-s{self.seed}"

    @property
    def row(self) -> tuple[str, int, str, int, float]:
        """Cells that differ in nothing but the seed share it."""
        return (self.data, self.alpha, self.loss, self.top_k, self.kl_lambda)


def grid(data: str) -> list[Cell]:
    """The published loss over lambda x K x alpha, SFT beside each alpha, and the other losses at one point."""
    cells = []
    for alpha in sorted(ALPHAS, key=lambda a: a != MAIN_ALPHA):
        for seed in MAIN_SEEDS if alpha == MAIN_ALPHA else OTHER_SEEDS:
            cells.append(Cell(data, "ce", 0.0, 0, alpha, seed))
            cells += [Cell(data, PUBLISHED, lam, k, alpha, seed) for k in TOP_KS for lam in LAMBDAS]
    for seed in MAIN_SEEDS:
        cells += [
            Cell(data, loss, OTHER_LAMBDA, 0 if loss == "sampled_kl" else OTHER_K, MAIN_ALPHA, seed)
            for loss in OTHER_LOSSES
        ]
    return cells


def write_stories(folder: Path, source: Path) -> None:
    """Requests and their stories as conversations, 150 of them held out, in a seeded order."""
    records = [
        json.loads(line)
        for path in sorted(source.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    records = [record for record in records if len(record["story"]) < 900]
    Random(17).shuffle(records)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("held", records[:150]), ("chat", records[150:])):
        lines = (json.dumps({"messages": messages(record)}, ensure_ascii=False) for record in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = (json.dumps({"text": record["story"]}, ensure_ascii=False) for record in records[150:])
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def messages(record: dict[str, Any]) -> list[dict[str, str]]:
    """One story as a conversation."""
    wish = f"{record['verb']}, {record['noun']}, {record['adjective']}: {', '.join(record['features'])}"
    return [{"role": "user", "content": wish}, {"role": "assistant", "content": record["story"]}]


def prepare(data: str, work: Path) -> None:
    """Run the recipe that the cells stand on; it reuses what is there."""
    recipe = work / f"{data}.toml"
    recipe.write_text((HERE / f"{data}.toml").read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "samovar.cli", "run", "--out", str(work / data), str(recipe)]
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)


def train(cell: Cell, base: Path, out: Path) -> dict[str, Any]:
    """Train the student of `cell` in `out` and measure it."""
    from distill import train as stage
    from foundation.report import Silent

    chats = [base / "world" / f"chat_{n}.jsonl" for n in ("english", "russian")]
    if cell.data == "stories":
        chats = [base.parent / "texts" / "chat.jsonl"]
    settings: dict[str, Any] = {
        **TRAINING[cell.data],
        "seed": cell.seed,
        "lora_rank": RANK,
        "lora_alpha": cell.alpha,
        "loss": cell.loss,
        "checkpoint_every_steps": 10**6,
    }
    inputs: dict[str, Any] = {"model": base / "begun" / "model", "data": tuple(chats)}
    if cell.loss != "ce":
        settings["kl_lambda"] = cell.kl_lambda
        inputs["teacher"] = base / (f"top{cell.top_k}" if cell.top_k else "sampled") / "store"
    start = time.perf_counter()
    stage.run(stage.Settings(**settings), inputs, out, Silent())
    seconds = time.perf_counter() - start
    measure = valid_share if cell.data == "world" else nearness
    return {**measure(out / "model", base, out), "training_seconds": round(seconds, 1)}


def valid_share(model: Path, base: Path, out: Path) -> dict[str, float]:
    """Share of valid programmes for held-out profiles, generated through llama.cpp."""
    from evaluation.programmes import valid_programmes
    from export import gguf
    from foundation.report import Silent

    gguf.run(gguf.Settings(), {"model": model}, out, Silent())
    found = valid_programmes(out / "gguf" / "model.gguf", base / "world" / "profiles.jsonl", Silent(), 200)
    return {"valid_share": found["mean"], "en": found["en"]["share"], "ru": found["ru"]["share"]}


def nearness(model: Path, base: Path, out: Path) -> dict[str, float]:
    """On held-out stories: bits per byte of the story, KL(teacher || student) and top-1 agreement a token."""
    import torch

    from foundation.dataio import conversations
    from foundation.losses import counted, logits_of, predicting
    from foundation.model import load
    from foundation.rows import chat_rows, collate
    from foundation.tokenizer import Tokenizer

    held = base.parent / "texts" / "held.jsonl"
    tokenizer = Tokenizer(model)
    rows = chat_rows(conversations([held]), tokenizer, 384)[0]
    student, teacher = load(model), load(base / "teacher" / "model")
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            batch = collate(rows[start : start + 16], tokenizer.pad_id)
            labels = batch["labels"]
            q, p = (predicting(logits_of(m, batch), labels).log_softmax(-1) for m in (student, teacher))
            gold = counted(labels, labels)[:, None]  # [N, 1]
            kl = (p.exp() * (p - q)).sum()
            same = (p.argmax(-1) == q.argmax(-1)).sum()
            sums += torch.tensor([-q.gather(-1, gold).sum(), kl, same, len(gold)], dtype=torch.float64)
    nats, kl, same, tokens = sums.tolist()
    size = sum(
        len(line["messages"][1]["content"].encode())
        for line in map(json.loads, held.read_text(encoding="utf-8").splitlines())
    )
    return {"bits_per_byte": nats / math.log(2) / size, "kl_to_teacher": kl / tokens, "top1": same / tokens}


def one_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Train and measure `cell` in a process of its own; its figures."""
    import torch

    torch.set_num_threads(1)
    out = work / "cells" / cell.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    figures = train(cell, work / cell.data, out)
    shutil.rmtree(out)
    return figures


def finished() -> dict[Cell, dict[str, float]]:
    """The figures of all cells that were ever done; a torn last line counts as not done."""
    found = {}
    for line in CELLS.read_text(encoding="utf-8").splitlines() if CELLS.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            found[Cell(**record["cell"])] = record["figures"]
    return found


def run_missing(cells: list[Cell], work: Path, jobs: int) -> None:
    """Every cell without figures, `jobs` at a time."""
    done = finished()
    missing = [cell for cell in cells if cell not in done]
    # The paper's own tables first; then the other losses seed by seed, so that their rows stay comparable.
    missing.sort(key=lambda cell: (cell.loss in OTHER_LOSSES, cell.seed if cell.loss in OTHER_LOSSES else 0))
    print(f"{len(cells)} cells, {len(missing)} to do", flush=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(one_cell, cell, work): cell for cell in missing}
        for number, future in enumerate(as_completed(futures), 1):
            cell, figures = futures[future], future.result()
            with CELLS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": asdict(cell), "figures": figures}) + "\n")
            print(f"{number}/{len(missing)} {cell.name}: {figures}", flush=True)


def tables(cells: list[Cell]) -> dict[str, Any]:
    """Every row's mean with its 95 % interval, and its paired difference to SFT of the same alpha and seeds."""
    found: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    figures = finished()
    for cell in cells:
        if cell in figures:
            found.setdefault(cell.row, {})[cell.seed] = figures[cell]
    rows = []
    for key, by_seed in found.items():
        data, alpha, loss, top_k, lam = key
        metric = "valid_share" if data == "world" else "bits_per_byte"
        plain = found.get((data, alpha, "ce", 0, 0.0), {})
        both = sorted(set(by_seed) & set(plain))
        row: dict[str, Any] = {"data": data, "alpha": alpha, "loss": loss, "top_k": top_k, "lambda": lam}
        row["seeds"] = sorted(by_seed)
        for name in next(iter(by_seed.values())):
            row[name] = interval([by_seed[seed][name] for seed in sorted(by_seed)])
        row["metric"] = metric
        less = [by_seed[seed][metric] - plain[seed][metric] for seed in both]
        row["minus_sft"] = interval(less) if less else None
        rows.append(row)
    return {"rows": rows}


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and half the width of its 95 % interval (Student's t); 0 with a single seed."""
    half = half_width(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "half": half}


def show(rows: list[dict[str, Any]]) -> None:
    """The tables as Markdown."""
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        print(f"\n{data}: {mine[0]['metric']} (mean ± 95 % interval over seeds), and less SFT\n")
        print("| alpha | loss | K | lambda | seeds | figure | minus SFT |")
        print("|---|---|---|---|---|---|---|")
        for row in mine:
            figure, less = row[row["metric"]], row["minus_sft"]
            several = len(row["seeds"]) > 1
            spread = f" ± {figure['half']:.4f}" if several else ""
            sign = f"{less['mean']:+.4f}" + (f" ± {less['half']:.4f}" if several else "") if less else ""
            print(
                f"| {row['alpha']} | {row['loss']} | {row['top_k'] or '-'} | {row['lambda']} "
                f"| {len(row['seeds'])} | {figure['mean']:.4f}{spread} | {sign} |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "kd_grid")
    parser.add_argument(
        "--data", nargs="+", choices=list(TRAINING), default=list(TRAINING), help="whose cells to do"
    )
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--tables", action="store_true", help="only print what is there")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    source = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data")) / "text" / "tinystories-ru"
    names = list(options.data)
    if "stories" in names and not source.is_dir():
        print(f"stories are skipped: {source} is not there; set SAMOVAR_DATA", file=sys.stderr)
        names.remove("stories")
    # Main rows of both data sets first: a grid that is cut short has what matters.
    cells = [cell for name in names for cell in grid(name)]
    cells.sort(key=lambda cell: (cell.alpha != MAIN_ALPHA or cell.loss in OTHER_LOSSES, cell.seed))
    if not options.tables:
        if "stories" in names and not (work / "texts" / "text.jsonl").exists():
            write_stories(work / "texts", source)
        for name in names:
            prepare(name, work)
        run_missing(cells, work, options.jobs)
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    every = [cell for name in TRAINING for cell in grid(name)]
    result = {"machine": machine, "training": TRAINING, "lora_rank": RANK, **tables(every)}
    show(result["rows"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

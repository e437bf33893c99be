"""Leave-one-out with a shared prefix against L models run whole: layer passes, seconds, and whether they agree.

    naive       each layer is taken out of the model, and what is left reads all rows
    one         prune.leave_one_out, a variant at a time
    together    as many variants at once as it takes by itself
    spilled     a variant at a time, with a quarter of the hidden states in memory and the rest in files

in turns, several rounds, on one CPU thread. Passes are counted by hooks on the layers, not by the code that is
measured. naive reads L models, the others those and the whole model. Seconds are wall time and CPU time of the
process: other jobs may share the machine, so the ratio is told by both, as median and spread over the rounds.
Weights are random. The bars: at most 0.53 of naive's passes for L = 36, scores equal to 1e-6 (to the bit a
variant at a time), and with a head that costs at most two layers, naive takes at least 1.7 times as long as
"one" and as "together".

    python benchmarks/leave_one_out.py --result benchmarks/results/leave_one_out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from foundation.head import hidden_of
from foundation.model import create
from foundation.report import Silent
from foundation.rows import Row, collate, longest_first
from foundation.task import Reading, read_tokens
from prune.leave_one_out import leave_one_out
from prune.walk import Walk

PAD = 0
MODES = {"one": 1, "together": 0, "spilled": 1}  # variants_at_once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of the longest row; the shortest has half")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=11, help="odd; short ones, so that load falls on all alike"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(made_model(chosen), made_rows(chosen), chosen)
    print(json.dumps(found, indent=1))
    if chosen.result:
        chosen.result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(found["bars"].values()) else 1


def made_model(chosen: argparse.Namespace) -> Any:
    shape = {
        "model_type": "llama", "vocab_size": chosen.vocab, "num_hidden_layers": chosen.layers,
        "hidden_size": chosen.hidden, "intermediate_size": chosen.ffn, "head_dim": 32,
        "num_attention_heads": chosen.hidden // 32, "num_key_value_heads": chosen.hidden // 32,
        "max_position_embeddings": 2048, "pad_token_id": PAD,
    }  # fmt: skip
    return create(shape, chosen.seed).eval()


def made_rows(chosen: argparse.Namespace) -> list[Row]:
    draw = np.random.default_rng(chosen.seed)
    lengths = draw.integers(chosen.tokens // 2, chosen.tokens + 1, chosen.rows)
    each = [draw.integers(1, chosen.vocab, length) for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in each]


def naive(model: Any, rows: list[Row], batch_rows: int) -> list[list[Reading]]:
    """Readings of the model without each layer, each model whole and on its own, in the same batches."""
    layers, told = list(model.model.layers), []
    for gone in range(len(layers)):
        model.model.layers = torch.nn.ModuleList(layer for layer in layers if layer is not layers[gone])
        model.config.num_hidden_layers = len(layers) - 1
        readings: list[Any] = [None] * len(rows)
        for places in longest_first([len(row["input_ids"]) for row in rows], batch_rows):
            batch = collate([rows[place] for place in places], PAD)
            with torch.inference_mode():
                hidden, head = hidden_of(model, batch)
                read = read_tokens(hidden, head, batch["labels"])
            for place, reading in zip(places, read, strict=True):
                readings[place] = reading
        told.append(readings)
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(layers), len(layers)
    return told


class Figures(Silent):
    """Keeps the last figures that were told."""

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.last = figures


def measured(model: Any, rows: list[Row], chosen: argparse.Namespace) -> dict[str, Any]:
    passes = {"rows": 0.0}

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes["rows"] += len(args[0] if args else kwargs["hidden_states"])

    for layer in model.model.layers:
        layer.register_forward_pre_hook(count, with_kwargs=True)
    whole_bytes = (
        4 * chosen.batch_rows * max(len(row["input_ids"]) for row in rows) * chosen.hidden * chosen.layers
    )
    report = Figures()

    def ours(mode: str) -> list[list[Reading]]:
        with tempfile.TemporaryDirectory() as work:
            return leave_one_out(
                model, rows, report, pad_id=PAD, work=Path(work), identity="random",
                batch_rows=chosen.batch_rows, variants_at_once=MODES[mode],
                spill_bytes=whole_bytes // 4 if mode == "spilled" else 2**40,
            ).without  # fmt: skip

    acts: dict[str, Callable[[], list[list[Reading]]]] = {
        "naive": lambda: naive(model, rows, chosen.batch_rows)
    }
    acts |= {mode: (lambda mode=mode: ours(mode)) for mode in MODES}  # type: ignore[misc]
    wall: dict[str, list[float]] = {name: [] for name in acts}
    cpu: dict[str, list[float]] = {name: [] for name in acts}
    told: dict[str, Any] = {name: {} for name in acts}
    answers = {}
    costs = head_and_layer(model, rows, chosen.batch_rows)
    names = list(acts)
    for number in range(chosen.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            passes["rows"] = 0
            start, started = time.perf_counter(), time.process_time()
            answers[name] = acts[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - started)
            told[name]["layer_passes"] = round(passes["rows"] / chosen.batch_rows, 3)
            if name != "naive":
                told[name] |= {f"peak_{key}": int(value) for key, value in report.last.items()}
    for name in acts:
        told[name] |= {
            "wall_seconds": spread(wall[name]),
            "cpu_seconds": spread(cpu[name]),
        }
    for name in MODES:
        told[name] |= {
            "of_naive_passes": round(told[name]["layer_passes"] / told["naive"]["layer_passes"], 4),
            "wall_ratio": spread([a / b for a, b in zip(wall["naive"], wall[name], strict=True)]),
            "cpu_ratio": spread([a / b for a, b in zip(cpu["naive"], cpu[name], strict=True)]),
            **agreement(answers["naive"], answers[name]),
        }
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    shape = {name: value for name, value in vars(chosen).items() if name != "result"}
    return {"machine": machine, "shape": shape, **costs, **told, "bars": bars(told, costs)}


def head_and_layer(model: Any, rows: list[Row], batch_rows: int, repeats: int = 30) -> dict[str, float]:
    """CPU seconds of a reading of a batch, and of a layer's pass, in turns."""
    batch = collate(
        [rows[place] for place in longest_first([len(row["input_ids"]) for row in rows], batch_rows)[0]], PAD
    )
    head, layer = [], []
    with torch.inference_mode():
        walk = Walk(model, batch)
        for number in range(repeats):
            start = time.process_time()
            read_tokens(walk.finish(walk.outputs), walk.head, batch["labels"])
            middle = time.process_time()
            walk.layer(number % len(walk.layers), walk.inputs[number % len(walk.layers)])
            head.append(middle - start)
            layer.append(time.process_time() - middle)
    costs = statistics.median(head), statistics.median(layer)
    return {
        "head_milliseconds": round(1000 * costs[0], 3),
        "layer_milliseconds": round(1000 * costs[1], 3),
        "head_costs_layers": round(costs[0] / costs[1], 3),
    }


def agreement(wanted: list[list[Reading]], found: list[list[Reading]]) -> dict[str, Any]:
    """How far readings lie apart, token by token and as scores: the mean over rows of each row's mean."""
    pairs = [(a, b) for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True)]
    scores = [[np.mean([row.nll.mean() for row in model]) for model in told] for told in (wanted, found)]
    return {
        "bit_equal": all(np.array_equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        "largest_score_difference": float(np.abs(np.asarray(scores[0]) - scores[1]).max()),
        "largest_token_difference": float(max(np.abs(a.nll - b.nll).max() for a, b in pairs)),
    }


def bars(told: dict[str, Any], costs: dict[str, float]) -> dict[str, bool]:
    return {
        "passes at most 0.53 of naive": all(told[mode]["of_naive_passes"] <= 0.53 for mode in MODES),
        "scores equal to 1e-6": all(told[mode]["largest_score_difference"] <= 1e-6 for mode in MODES),
        "bit-equal a variant at a time": told["one"]["bit_equal"] and told["spilled"]["bit_equal"],
        "head costs at most two layers": costs["head_costs_layers"] <= 2,
        "wall ratio at least 1.7": min(told[m]["wall_ratio"]["median"] for m in ("one", "together")) >= 1.7,
        "CPU ratio at least 1.7": min(told[m]["cpu_ratio"]["median"] for m in ("one", "together")) >= 1.7,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


if __name__ == "__main__":
    sys.exit(main())

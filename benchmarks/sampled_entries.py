"""How many distinct tokens random-sampling KD keeps of a trained teacher's positions, by draws and by power.

The teacher is benchmarks/teacher152k.py's (151,936 ids), read over held-out stories. Beside the mean number of
distinct tokens stands the standard error of the gradient that they give: the root of the summed variance of all
weights, E|w - p|, in closed form. Fewer draws are cheaper, and noisier.

    python benchmarks/sampled_entries.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from distill.sampling import sampled_columns, uniforms
from distill.store import row_key
from distill.teacher import chunked_logits, cut
from foundation.dataio import documents
from foundation.head import hidden_of
from foundation.model import load
from foundation.rows import Row, collate
from foundation.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "runs" / "bench" / "teacher152k"
RESULT = ROOT / "benchmarks" / "results" / "sampled_entries.json"
GRID = [(10, 1.0), (25, 1.0), (50, 1.0), (75, 1.0), (100, 1.0), (50, 0.8), (50, 1.2)]  # draws, power


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="stories, of at most 256 tokens each")
    options = parser.parse_args()
    if not (TEACHER / "model" / "config.json").is_file():
        print("skipped: run benchmarks/teacher152k.py first", file=sys.stderr)
        return 0
    tokenizer = Tokenizer(TEACHER / "model")
    model = load(TEACHER / "model")
    rows: list[Row] = []
    for text in documents([TEACHER / "text" / "held.jsonl"]):
        ids = np.asarray([tokenizer.boundary_id, *tokenizer.encode(text)][:256], dtype=np.int64)
        rows.append({"input_ids": ids, "labels": ids})
        if len(rows) == options.rows:
            break
    cells = {pair: [] for pair in GRID}
    nll, perplexity = [], []
    for row in rows:
        batch = collate([row], 0)
        with torch.inference_mode():
            hidden, head = hidden_of(model, batch)
            for at, logits in chunked_logits(hidden[0, :-1], cut(head, len(tokenizer))):
                gold = batch["labels"][0, 1:][at]
                logp = logits.log_softmax(-1)  # [n, V]
                nll.append(-logp.gather(-1, gold[:, None]).squeeze(-1))
                perplexity.append(-(logp.exp() * logp).sum(-1))
                for (draws, power), found in cells.items():
                    uniform = torch.from_numpy(uniforms(17, row_key(row), len(row["labels"]) - 1, draws)[at])
                    columns = sampled_columns(logits.clone(), gold, uniform, power)
                    entries = (columns["topk_logprobs"] > -torch.inf).sum(-1)  # [n]
                    q = (power * logp).softmax(-1)
                    error = (((2 * logp).exp() / q.clamp_min(1e-38)).sum(-1) - (2 * logp).exp().sum(-1)) / draws
                    found.append(torch.stack([entries.double(), error.double().sqrt()]))
    table = []
    for (draws, power), found in cells.items():
        entries, error = torch.cat(found, -1)
        figures = {"draws": draws, "power": power, "distinct_mean": entries.mean().item()}
        figures |= {f"distinct_p{p}": entries.quantile(p / 100).item() for p in (10, 50, 90)}
        table.append({**figures, "standard_error_mean": error.mean().item()})
        print(table[-1], flush=True)
    positions = torch.cat(nll)
    result = {
        "teacher": "teacher152k",
        "positions": len(positions),
        "held_nats_per_token": positions.mean().item(),
        "entropy_nats": torch.cat(perplexity).mean().item(),
        "table": table,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

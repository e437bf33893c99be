"""Random-sampling KD is unbiased: the mean gradient of n captures goes to the full KL's as 1/sqrt(n).

Teachers with a Zipf-like tail, students near and far from them; each capture draws a dozen tokens a position,
as distill.sampling stores them, and the gradient is that of distill.losses. `expected` is the error that
follows from the variance of the weights, sqrt(sum (1 - sum p^2) / (draws * n)). Beside it stands what a top-K
store of as many entries gives: an error that more captures do not make smaller.

    python benchmarks/sampled_kl.py --result benchmarks/results/sampled_kl.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.losses import make_loss
from distill.sampling import sampled_columns
from distill.topk import top_k_columns
from foundation.head import Head

POSITIONS, VOCAB, DRAWS = 8, 1000, 12
MARKS = (1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="independent runs, for the spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path)
    chosen = parser.parse_args()
    found = converge(chosen.trials, chosen.seed)
    print(json.dumps(found, indent=1))
    if chosen.result:
        chosen.result.write_text(json.dumps(found, indent=1) + "\n")


def converge(trials: int, seed: int) -> dict[str, Any]:
    """Relative error of the mean gradient at MARKS captures, and the slope of its logarithm, by trial."""
    torch.manual_seed(seed)
    teacher = -1.2 * torch.arange(1, VOCAB + 1).log().repeat(POSITIONS, 1) + torch.randn(POSITIONS, VOCAB)
    student = teacher + torch.linspace(0.2, 2, POSITIONS)[:, None] * torch.randn(POSITIONS, VOCAB)
    gold = torch.zeros(POSITIONS, dtype=torch.long)
    full = student.double().softmax(1) - teacher.double().softmax(1)  # the gradient of KL(p || q) in the logits
    size = full.norm()
    deviation = ((1 - teacher.double().softmax(1).square().sum(1)).sum() / DRAWS).sqrt() / size
    everyone = student.repeat(trials, 1)  # [trials * positions, V]
    mean = torch.zeros(trials, POSITIONS, VOCAB, dtype=torch.float64)
    errors, entries = [], 0.0
    for capture in range(1, MARKS[-1] + 1):
        uniform = torch.rand(trials * POSITIONS, DRAWS, dtype=torch.float64)
        columns = sampled_columns(teacher.repeat(trials, 1), gold.repeat(trials), uniform, 1.0)
        entries += (columns["topk_logprobs"] > -torch.inf).double().sum(1).mean().item()
        mean += gradient("sampled_kl", everyone, columns, gold.repeat(trials)).view_as(mean)
        if capture in MARKS:
            errors.append(((mean / capture - full).flatten(1).norm(dim=1) / size).tolist())
    table = np.array(errors)  # [marks, trials]
    slopes = [np.polyfit(np.log(MARKS), np.log(column), 1)[0] for column in table.T]
    top = top_k_columns(teacher.clone(), gold, DRAWS, 1.0)
    biased = {
        name: round(float((gradient(name, student, top, gold) - full).norm() / size), 4)
        for name in ("renormalised_kl", "forward_kl")
    }
    return {
        "positions": POSITIONS, "vocab": VOCAB, "draws": DRAWS, "trials": trials,
        "distinct_tokens_a_position": round(entries / MARKS[-1], 2),
        "relative_error": {n: {"mean": round(float(row.mean()), 5), "sd": round(float(row.std(ddof=1)), 5),
                               "expected": round(float(deviation / n**0.5), 5)}
                           for n, row in zip(MARKS, table, strict=True)},
        "slope": {"mean": round(float(np.mean(slopes)), 4), "sd": round(float(np.std(slopes, ddof=1)), 4)},
        "error_of_top_k_with_as_many_entries": biased,
    }  # fmt: skip


def gradient(name: str, z: torch.Tensor, columns: dict[str, torch.Tensor], gold: torch.Tensor) -> torch.Tensor:
    """Of the loss in the logits z [N, V]; the head is the identity."""
    hidden = z.clone().requires_grad_()
    loss = make_loss(name, kl_lambda=1.0, ce_weight=0.0, temperature=1.0)
    total, _ = loss.of_hidden(hidden, Head(((lambda h: h, torch.eye(z.shape[1])),)), gold, columns)
    return torch.autograd.grad(total, hidden)[0].double()


if __name__ == "__main__":
    main()

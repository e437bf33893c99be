"""Run by torchrun in test_losses_ranks.py: gradients of every loss in a float64 model under DDP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_losses import model64, rows_with_a_teacher
from torch.nn.parallel import DistributedDataParallel

from distill.losses import LOSSES, make_loss
from foundation.rows import collate

ROWS = 16


def main(out: Path) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    rows = rows_with_a_teacher(ROWS)
    mine = rows[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
    items = torch.tensor(sum(int((row["labels"] != -100).sum()) for row in rows))  # of all ranks
    found: dict[str, torch.Tensor] = {}
    for name in LOSSES:
        for unused in (False, True):  # Trainer asks DDP to look for unused parameters; checkpointing forbids it
            model = model64()
            wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
            loss = make_loss(name, kl_lambda=0.5, ce_weight=1.0, temperature=1.0)
            for half in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):  # twice: the reducer is ready again
                value = loss(wrapped, collate(half, 0), items)
                (value * ranks).backward()  # DDP takes the mean over ranks
            for parameter_name, parameter in model.named_parameters():
                assert parameter.grad is not None, parameter_name
                found[f"{name}/{unused}/{parameter_name}"] = parameter.grad
    if rank == 0:
        save_file(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Two processes under torchrun learn what one process with twice the batch learns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

HERE = Path(__file__).resolve().parent


def torchrun(processes: int, folder: Path, out: Path, batch_rows: int) -> dict[str, torch.Tensor]:
    out.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(HERE / "ddp_program.py"), str(folder), str(out), str(batch_rows),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",  # without it accelerate looks for GPUs and runs one process
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_twice_the_batch(tmp_path: Path) -> None:
    """Rows of unequal length: a mean of the ranks' means would give another gradient."""
    folder = tiny_model(tmp_path / "model")
    one = torchrun(1, folder, tmp_path / "one", 8)
    two = torchrun(2, folder, tmp_path / "two", 4)
    assert "MULTI_CPU" in (tmp_path / "two" / "kind.txt").read_text()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4)
    start = load_file(folder / "model.safetensors")
    assert any(not torch.allclose(one[name], start[name], atol=1e-3) for name in one)

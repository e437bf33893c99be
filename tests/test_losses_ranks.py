"""Two gloo ranks under DDP have the gradient of one process with all rows, for every loss, to 1e-10."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def torchrun(processes: int, out: Path) -> dict[str, torch.Tensor]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(HERE / "losses_program.py"), str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    one, two = torchrun(1, tmp_path / "one.safetensors"), torchrun(2, tmp_path / "two.safetensors")
    assert one.keys() == two.keys() and len(one) > 100
    for name, wanted in one.items():
        assert (two[name] - wanted).norm() <= 1e-10 * (1 + wanted.norm()), name
        assert wanted.norm() > 1e-6, name
        torch.testing.assert_close(wanted, one[name.replace("/True/", "/False/")], rtol=0, atol=0)

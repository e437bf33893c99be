"""What benchmarks over several seeds share: a recipe run (or finished) in its own folder, and intervals."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.statistics import student_t

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))


def run_recipe(text: str, folder: Path) -> Path:
    """Run the recipe `text` into `folder`, its output beside it; what is done already is not done again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.toml")
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "samovar.cli", "run", "--out", str(folder), str(path)]
    with folder.with_name(f"{folder.name}.log").open("ab") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return folder


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of `values`, one a seed, by Student's t; NaN for a single one."""
    if len(values) < 2:
        return math.nan
    return student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half of its 95 % interval over seeds, as tables show them."""
    said = f"{statistics.mean(values):.{digits}f}"
    return said if len(values) < 2 else f"{said} ± {half_width(values):.{digits}f}"

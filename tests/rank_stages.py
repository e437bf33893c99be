"""A tiny stage of several ranks, and a run of it (or of real kinds) in a process that tests can kill."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from foundation.errors import InputError, StopRequested
from foundation.ranks import is_main, once, rank, world
from foundation.report import Report
from foundation.settings import StageSettings
from samovar import stages


class Settings(StageSettings):
    """Each rank writes its share of the lines."""

    lines: int = Field(8, ge=1, description="lines of all ranks together")
    step_seconds: float = Field(0.0, ge=0, description="of a line", json_schema_extra={"fingerprint": False})
    processes: int = Field(1, ge=1, description="ranks", json_schema_extra={"fingerprint": False})
    ends: str = Field("well", description="how a rank ends: well, refusal, defect")
    rank: int = Field(1, description="which one")


def run(settings: Settings, inputs: Any, out: Path, report: Report) -> dict[str, Any]:
    """Line n is written by rank n % world; rank 0 waits for all and joins them."""
    work = out / ".work"
    work.mkdir(exist_ok=True)
    parts = [work / f"{number:03}" for number in range(settings.lines)]
    print(f"rank {rank()} of {world()}, {os.environ.get('OMP_NUM_THREADS')} threads", flush=True)
    found = sum(part.exists() for part in parts)
    report.note(f"found {found}")
    for number in range(rank(), settings.lines, world()):
        if not parts[number].exists():
            time.sleep(settings.step_seconds)
            parts[number].touch()
            report.progress(number + 1, settings.lines, "line", loss=1 / (number + 1))
        if rank() == settings.rank:
            _end(settings.ends)
        if report.stop_requested():
            raise StopRequested("stopped as asked")
    once(lambda: False if is_main() else (work / "joined").exists(), lambda: _join(parts, out))
    return {"found": found, "lines": settings.lines} if is_main() else {"wrong": 1}


def _join(parts: list[Path], out: Path) -> None:
    while not all(part.exists() for part in parts):
        time.sleep(0.02)
    (out / "text.txt").write_text("".join(f"line {part.name}\n" for part in parts))
    (out / ".work" / "joined").touch()


def _end(how: str) -> None:
    if how == "refusal":
        raise InputError("this tea is cold", hint="heat it")
    if how == "defect":
        raise ZeroDivisionError("one over nothing")


KINDS = {
    **stages.KINDS,
    "test.crew": stages.Kind(
        about="write lines together",
        settings="rank_stages:Settings",
        run="rank_stages:run",
        writes={"text": "text.txt"},
        distributed=True,
    ),
}


def main(recipe: str, folder: str) -> None:
    from samovar.recipe import load
    from samovar.run import run as run_recipe

    outcome = run_recipe(load(Path(recipe), kinds=KINDS), Path(folder), kinds=KINDS)
    print(outcome.state, outcome.message, sep="\n")
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])

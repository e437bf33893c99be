"""One of the processes that work on a stage together: `python -m samovar.ranks`, started by torchrun.

Rank 0 tells progress and returns the figures; the others only see that a stop is asked for, and print their
notes into the log. A rank leaves how it went in the folder that torchrun.py describes.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from foundation.events import EventLog
from foundation.files import read_json, write_json
from foundation.process import die_with
from foundation.ranks import rank, world
from foundation.report import Report
from foundation.stage import Figures
from samovar.order import Order, Result, call, result_of
from samovar.worker import EventReport

_POLL_SECONDS = 0.05
_ROOT_CAUSE_SECONDS = 2.0  # time for torchrun, which looks ten times a second, to see a partner that was killed
_STOP_SECONDS = 120.0  # a rank that does not stop when another has is ended; what is lost is what a kill loses


class OtherRank:
    """The Report of every rank but the first."""

    def __init__(self, stop: Path) -> None:
        self._stop = stop

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        print(f"rank {rank()}: {text}", file=sys.stderr, flush=True)

    def checkpoint_requested(self) -> bool:
        return False  # rank 0 sees it; a checkpoint is everybody's

    def stop_requested(self) -> bool:
        return self._stop.exists()


def main(folder: Path, agent: int) -> None:
    """Run the stage as this rank, say how it went, and leave without waiting for threads of libraries."""
    die_with(agent)
    os.dup(0)  # the run's lock, kept until this process ends
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    order = Order(**read_json(folder / "order.json"))
    result, figures = attempt(order, folder)
    said = {**asdict(result), "figures": figures, "when": time.time()}
    write_json(folder / f"result-{rank()}.json", said, durable=False)
    sys.stdout.flush()
    sys.stderr.flush()
    if result.outcome == "broken":
        time.sleep(_ROOT_CAUSE_SECONDS)
    elif result.outcome in ("done", "stopped"):
        _wait_for_all(folder, patience=_STOP_SECONDS if result.outcome == "stopped" else math.inf)
        os._exit(0)
    os._exit(1)


def attempt(order: Order, folder: Path) -> tuple[Result, Figures]:
    """The stage, with every way it can end turned into a Result."""
    report: Report
    if rank() == 0:
        report = EventReport(order.stage, EventLog(folder / "events.jsonl"), folder / "stop")
    else:
        report = OtherRank(folder / "stop")
    out = folder.parents[1]  # out/.work/ranks
    try:
        try:
            return Result("done"), call(order, out, report)
        finally:
            if isinstance(report, EventReport):
                report.flush()
    except BaseException as error:
        return result_of(error, Path(order.folder)), {}


def _wait_for_all(folder: Path, patience: float) -> None:
    """Stay until no rank needs this one any more: one that leaves too early breaks the others' last words.

    After `patience` seconds this process ends as a failure, at which torchrun ends the others.
    """
    deadline = time.monotonic() + patience
    while not all((folder / f"result-{other}.json").exists() for other in range(world())):
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

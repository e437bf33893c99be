"""A stage as several processes under torchrun: start them, follow them, and say how it went.

    worker --> torchrun's agent (`python -m samovar.torchrun`) --> ranks (`python -m samovar.ranks`)

`launch` stands where a process alone would call the stage. What it and the ranks tell each other lies in
out/.work/ranks, made anew by each launch:

    order.json     what to run                      result-R.json  how it went with rank R; of 0: figures too
    events.jsonl   progress and notes of rank 0     agent.json     the rank that died without a result
    stop, checkpoint   requests, handed on          rendezvous     torchrun's own

Nobody outlives the one who started it, and each has the run's lock: as its stdin, because that is the one
descriptor that torchrun hands on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foundation.errors import MissingError, SamovarError, StopRequested
from foundation.events import Tail
from foundation.files import read_json, write_json
from foundation.process import die_with, environment
from foundation.report import Report
from foundation.settings import StageSettings
from foundation.stage import Figures
from samovar.order import Order, Result

FOLDER = "ranks"  # in .work
_POLL_SECONDS = 0.05
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_ASK_TORCH = "import torch; print(torch.cuda.device_count())"


class RanksBroke(Exception):
    """A defect in one of the ranks; its traceback is on stderr. `result` is what to tell the user."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.message)
        self.result = result


def launch(order: Order, out: Path, report: Report, lock: int | None) -> Figures:
    """Run the stage as order.processes ranks to write under `out`; the figures are those of rank 0.

    Raises StopRequested or SamovarError as the ranks did, MissingError without torch, RanksBroke for a defect.
    When it returns or raises, torchrun is gone, and the ranks are or end at once.
    """
    if importlib.util.find_spec("torch") is None:
        hint = 'pip install -c constraints.txt "samovar[train]"'
        raise MissingError("several processes need torch, which is not installed", hint=hint)
    folder = out / ".work" / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "order.json", asdict(order))
    agent = subprocess.Popen(
        [sys.executable, "-P", "-m", "samovar.torchrun", str(folder), str(order.processes), str(os.getpid())],
        stdin=subprocess.DEVNULL if lock is None else lock,
        stdout=sys.stderr,
        env=_environment(order.processes),
        start_new_session=True,  # a Ctrl-C is for the one who asks
    )
    try:
        _follow(agent, folder, report)
    finally:
        agent.kill()
        code = agent.wait()
    return _figures(folder, order.processes, code)


def _follow(agent: subprocess.Popen[Any], folder: Path, report: Report) -> None:
    """Hand on what rank 0 tells and what is asked of the ranks, until torchrun ends."""
    tail = Tail(folder / "events.jsonl")
    while True:
        ended = agent.poll() is not None  # before reading, so that the last word is read
        for event in tail.read():
            if event["kind"] == "note":
                report.note(event["text"])
            elif event["kind"] == "progress":
                report.progress(event["step"], event["total"], event["unit"], **event["figures"])
        if ended:
            return
        if report.stop_requested():
            (folder / "stop").touch()
        if report.checkpoint_requested():
            (folder / "checkpoint").touch()
        time.sleep(_POLL_SECONDS)


def _figures(folder: Path, processes: int, code: int) -> Figures:
    """Rank 0's figures when all ranks are done. Raises what is the root of it when they are not.

    The first failure counts: a rank that loses its partner fails too, in words that explain nothing.
    """
    found = {rank: read_json(folder / f"result-{rank}.json") for rank in range(processes)}
    results = {rank: said for rank, said in found.items() if said}
    if code == 0 and len(results) == processes and all(said["outcome"] == "done" for said in results.values()):
        return results[0]["figures"]
    first = sorted(results.items(), key=lambda item: item[1]["when"])
    for outcome in ("failed", "killed", "broken", "stopped"):
        if outcome == "killed" and (killed := _killed(folder, processes, code)):
            raise killed
        for rank, said in first:
            if said["outcome"] == outcome:
                _raise(Result(outcome, said["message"], said["hint"]), rank)
    write_json(folder / "probe.json", {})  # raises RunError where the disk is full: then no rank could say so
    said = f"torchrun ended with code {code}"
    raise RanksBroke(Result("broken", said, "the run's log.txt ends with what it said"))


def _raise(result: Result, rank: int) -> None:
    if result.outcome == "stopped":
        raise StopRequested(result.message, hint=result.hint)
    if result.outcome == "failed":
        raise SamovarError(result.message, hint=result.hint)
    raise RanksBroke(Result("broken", f"rank {rank}: {result.message}", result.hint))


def _killed(folder: Path, processes: int, code: int) -> SamovarError | None:
    """What to say where a signal ended torchrun, or a rank before all others."""
    hint = "often it ran out of memory: use smaller batches or fewer processes; then run again"
    if code < 0:
        return SamovarError(f"torchrun was killed by {signal.Signals(-code).name}", hint=hint)
    dead = read_json(folder / "agent.json")
    if dead and dead["code"] < 0:
        name = signal.Signals(-dead["code"]).name
        return SamovarError(f"rank {dead['rank']} of {processes} was killed by {name}", hint=hint)
    return None


def _environment(processes: int) -> dict[str, str]:
    """What the ranks inherit: each has its share of this process's threads, and speaks to this machine only."""
    env = environment(1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if env[name].isdecimal():
            env[name] = str(max(1, int(env[name]) // processes))
    env["PYTHONSAFEPATH"] = "1"  # torchrun starts ranks with -m, which would look for modules in this folder
    if sys.platform in _LOOPBACK:
        env.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK[sys.platform])
    return env


def refuse_more_than_gpus(settings: Iterable[StageSettings]) -> None:
    """Raise MissingError when a stage wants more processes than there are GPUs, on a machine that has any.

    torch is asked in a process of its own, and only where a stage wants several.
    """
    if (most := max((getattr(chosen, "processes", 1) for chosen in settings), default=1)) > 1:
        gpus = count_gpus()
        if 0 < gpus < most:
            raise MissingError(
                f"processes = {most}, each with its own GPU, and torch sees {gpus}",
                hint=f"set processes to {gpus} at most; CUDA_VISIBLE_DEVICES may hide some from it",
            )


def count_gpus() -> int:
    """CUDA devices that torch sees; 0 also where it can not be asked."""
    asked = subprocess.run([sys.executable, "-P", "-c", _ASK_TORCH], capture_output=True, text=True)
    said = asked.stdout.split()
    return int(said[-1]) if said and said[-1].isdecimal() else 0


def main(folder: Path, processes: int, parent: int) -> None:
    """torchrun's agent: start the ranks, end them all when one fails, and note which one died first.

    The ranks find each other through a file. torchrun's `--standalone` would open a port to the network and
    unpickle what comes through it.
    """
    die_with(parent)
    import logging

    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it accelerate looks for GPUs and runs one process
    logging.disable(logging.ERROR)  # how the ranks failed, they say themselves
    arguments = [
        f"--nproc-per-node={processes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={folder / 'rendezvous'}",
        "--rdzv-conf=store_type=file", "--rdzv-id=samovar", "--local-addr=127.0.0.1",
        f"--log-dir={folder / 'torchrun'}", "-m", "samovar.ranks", str(folder), str(os.getpid()),
    ]  # fmt: skip
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        write_json(folder / "agent.json", {"rank": rank, "code": failure.exitcode})
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

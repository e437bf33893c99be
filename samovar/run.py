"""Carry out a plan: `jobs` stages side by side, each in a process of its own.

The parent starts workers, follows events.jsonl, keeps status.json, and decides what comes next: the first
stage in the recipe's order whose inputs are there. It computes nothing itself.

Stopping: Ctrl-C, SIGTERM, SIGHUP and `samovar stop` all end in control/stop. Workers save what they have
and end; the same command goes on. A second Ctrl-C kills the workers, which loses the work since their
last checkpoint and nothing else. A failed stage stops the others in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from foundation import artifact
from foundation.artifact import Manifest
from foundation.errors import SamovarError
from foundation.events import EventLog, Tail
from foundation.files import DigestCache, writing
from foundation.process import environment
from foundation.rundir import Lock, RunDirectory, acquire
from foundation.runstate import State
from samovar.board import Board
from samovar.inputs import Inputs
from samovar.order import Order, Result
from samovar.plan import Action, Planner, Step, refuse_altered
from samovar.recipe import Recipe, Stage
from samovar.screen import Careful, NoScreen, Screen
from samovar.show import log_tail
from samovar.stages import KINDS, Kind, counted
from samovar.torchrun import refuse_more_than_gpus
from samovar.worker import Surroundings

EXIT_CODES = {State.FINISHED: 0, State.FAILED: 1, State.STOPPED: 130}
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `steps`: the plan as it turned out."""

    state: State
    message: str
    hint: str
    steps: tuple[Step, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


def make_planner(recipe: Recipe, folder: Path, *, download: bool, kinds: Mapping[str, Kind] = KINDS) -> Planner:
    """The planner of `recipe` in `folder`, with the digests remembered there."""
    cache = DigestCache(RunDirectory(folder).digests)
    return Planner(recipe, folder, Inputs(recipe, cache, download=download), cache, kinds)


def run(
    recipe: Recipe, folder: Path, *, screen: Screen | None = None, kinds: Mapping[str, Kind] = KINDS
) -> Outcome:
    """Run `recipe` in `folder`, from wherever an earlier run left it.

    Raises RunLocked when another process runs there, RunError when the folder can not be used,
    InputError or MissingError when an input is not there: in each case no artifact was touched.
    """
    directory = RunDirectory(folder)
    directory.create()
    lock = acquire(directory.lock)
    try:
        return _Runner(recipe, directory, lock, Careful(screen or NoScreen()), kinds).run()
    finally:
        lock.release()


@dataclass
class _Job:
    """A running worker."""

    step: Step
    process: subprocess.Popen[bytes]
    log_start: int  # size of log.txt when it started

    def kill(self) -> None:
        """End the worker, or what it left: it leads a process group of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def answer(self) -> bytes:
        """What the worker, which has ended, wrote to its stdout. Never waits, whoever else has it open."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        with self.process.stdout as pipe, contextlib.suppress(BlockingIOError):
            os.set_blocking(pipe.fileno(), False)
            return os.read(pipe.fileno(), 1 << 20)
        return b""


class _Runner:
    """One run under its lock."""

    def __init__(
        self, recipe: Recipe, directory: RunDirectory, lock: Lock, screen: Screen, kinds: Mapping[str, Kind]
    ) -> None:
        self.recipe = recipe
        self.directory = directory
        self.lock = lock
        self.screen = screen
        self.kinds = kinds
        self.planner = make_planner(recipe, directory.path.absolute(), download=True, kinds=kinds)
        self.board = Board(directory, [stage.name for stage in recipe.stages])
        self.jobs: dict[str, _Job] = {}
        self.failure: tuple[str, str] | None = None  # message, hint
        self.stopping = False
        self.begun = False  # until then a refusal changes nothing, not even what the last run said

    def run(self) -> Outcome:
        self.directory.withdraw_requests()
        self.board.start()
        try:
            for stage in self.recipe.stages:
                artifact.settle(self.directory.path / stage.name)
            steps = self.planner.plan()
            self.screen.plan(steps)
            refuse_altered(steps)
            refuse_more_than_gpus(step.stage.settings for step in steps if step.works)
            self.directory.describe(self.recipe.text)
            self.planner.cache.save()
            self.begun = True
            outcome = self._work(steps)
        except BaseException as error:
            self._abandon(error)
            raise
        finally:
            self.screen.close()
        self.board.end(outcome.state, outcome.exit_code, outcome.message, outcome.hint)
        return outcome

    def _abandon(self, error: BaseException) -> None:
        """Leave no worker and, if the disk takes it, a last word."""
        for job in self.jobs.values():
            job.kill()
            job.process.wait()
        state = State.STOPPED if isinstance(error, KeyboardInterrupt) else State.FAILED
        message, hint = (error.message, error.hint) if isinstance(error, SamovarError) else (repr(error), "")
        with contextlib.suppress(SamovarError, OSError):
            if not self.begun and self.board.withdraw():
                return
            self.board.end(state, EXIT_CODES[state], message, hint)

    def _work(self, plan: list[Step]) -> Outcome:
        self.events = EventLog(self.directory.events)
        self.tail = Tail(self.directory.events, self.directory.events.stat().st_size)
        self.events.write(None, "run_started", recipe=self.recipe.name, jobs=self.recipe.jobs)
        self.board.running()
        self.steps = {step.stage.name: step for step in plan}
        waiting = [step.stage for step in plan]
        with self._signals():
            while True:
                self._collect()
                if self.directory.requested("stop"):
                    self.stopping = True
                if not self.stopping:
                    waiting = self._start_ready(waiting)
                self._follow()
                if not self.jobs and (self.stopping or not waiting):
                    break
                time.sleep(_POLL_SECONDS if self.jobs else 0)
        return self._end()

    def _end(self) -> Outcome:
        message, hint = self.failure or ("", "")
        if self.failure:
            state = State.FAILED
        elif any(step.action != Action.REUSE for step in self.steps.values()):
            state, message, hint = State.STOPPED, "stopped as asked", "the same command goes on from here"
        else:
            state = State.FINISHED
        self.events.write(None, "run_finished", state=state, message=message)
        self.events.close()
        self.planner.cache.save()
        self.directory.withdraw_requests()
        return Outcome(state, message, hint, tuple(self.steps.values()))

    def _start_ready(self, waiting: list[Stage]) -> list[Stage]:
        """Start what can start; the stages that still wait."""
        left = []
        for stage in waiting:
            ready = all(self.steps[name].action == Action.REUSE for name in stage.stages_read())
            if not ready or self.stopping or len(self.jobs) >= self.recipe.jobs:
                left.append(stage)
                continue
            step = self.planner.step(stage, self.steps)
            self.steps[stage.name] = step
            if step.action == Action.REUSE:
                self._tell(stage.name, "stage_reused", step.manifest)
            else:
                self._start(step)
        return left

    def _start(self, step: Step) -> None:
        order = make_order(step, self.planner, self.kinds[step.stage.kind])
        around = Surroundings(
            events=str(self.directory.events.absolute()),
            stop=str((self.directory.control / "stop").absolute()),
            parent=os.getpid(),
            lock=self.lock.handle,
        )
        name = step.stage.name
        self.events.write(name, "stage_started", what=step.action, why=step.why)
        with writing(self.directory.log), self.directory.log.open("a") as log:
            log.write(f"=== {name} ({step.stage.kind}): {step.action}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "samovar.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(self.recipe.jobs),
                pass_fds=[self.lock.handle],
                start_new_session=True,  # a Ctrl-C is for the parent, which asks
            )
            self.jobs[name] = _Job(step, process, log.tell())
        assert process.stdin is not None
        request = {"order": asdict(order), "surroundings": asdict(around)}
        with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code tells
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()

    def _collect(self) -> None:
        """Take the results of the workers that ended."""
        for name, job in list(self.jobs.items()):
            if job.process.poll() is None:
                continue
            job.kill()
            del self.jobs[name]
            result = self._result(job, job.answer())
            if result.outcome == "done":
                manifest = artifact.load(self.directory.path / name)
                self.steps[name] = replace(job.step, action=Action.REUSE, manifest=manifest)
                self._tell(name, "stage_finished", manifest)
            elif result.outcome == "stopped":
                self.events.write(name, "stage_stopped")
                self._stop()
            else:
                self._fail(name, result)

    def _tell(self, name: str, kind: str, manifest: Manifest | None) -> None:
        """The event of a stage that is finished, now or earlier."""
        assert manifest is not None, "a finished stage has a manifest"
        self.events.write(
            name, kind, seconds=manifest.seconds, figures=manifest.figures, digest=manifest.digest
        )

    def _result(self, job: _Job, answer: bytes) -> Result:
        """The worker's own words, or what its death tells."""
        if answer:
            return Result(**json.loads(answer))
        code = job.process.returncode
        if self.stopping and code < 0:
            return Result("stopped")
        tail = log_tail(self.directory.log, job.log_start)
        said = f"; the log ends with:\n{tail}" if tail else ""
        if code < 0:
            hint = "often it ran out of memory: use smaller batches, or fewer jobs; then run again"
            return Result("failed", f"its process was killed by {signal.Signals(-code).name}{said}", hint)
        return Result("broken", f"its process ended with code {code}{said}", f"see {self.directory.log}")

    def _fail(self, name: str, result: Result) -> None:
        self.events.write(name, "stage_failed", message=result.message, hint=result.hint)
        if self.failure is None:
            self.failure = (f"stage '{name}': {result.message}", result.hint)
        self._stop()

    def _stop(self) -> None:
        """Start nothing more, and ask the workers to end."""
        self.stopping = True
        self.directory.request("stop")

    def _follow(self) -> None:
        for event in self.tail.read():
            self.board.event(event)
            self.screen.event(event)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Within: the first signal stops, a second one kills the workers. Ignored ones (nohup) stay so."""

        def handle(number: int, frame: object) -> None:
            if self.stopping:
                for job in self.jobs.values():
                    job.kill()
            self._stop()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
        heeded = [number for number in numbers if before[number] != signal.SIG_IGN]
        for number in heeded:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in heeded:
                signal.signal(number, before[number])


def make_order(step: Step, planner: Planner, kind: Kind) -> Order:
    """What the worker is told to do for `step`."""
    assert step.identity is not None, "a stage starts when all it reads is known"
    inputs = {
        role: [str(path) for path in paths] if isinstance(paths, tuple) else str(paths)
        for role, paths in planner.paths(step.stage).items()
    }
    return Order(
        stage=step.stage.name,
        kind=step.stage.kind,
        version=kind.version,
        run=kind.run,
        settings_class=kind.settings,
        settings=step.identity.settings,
        inputs=inputs,
        digests=step.identity.inputs,
        writes=kind.written(step.stage.settings),
        handed=kind.handed,
        keeps=kind.keeps,
        folder=str(planner.folder / step.stage.name),
        uncounted=counted(step.stage.settings)[1],
        hashed={path: planner.cache.hashed[path] for path in planner.local(step.stage)},
    )

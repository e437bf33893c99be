"""What a person sees of a run while it goes: bars on a terminal, plain lines elsewhere.

A screen is fed the run's events and keeps no state that anyone else reads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from foundation.events import Event
from samovar.plan import Step
from samovar.show import duration, plan_table

PLAIN_SECONDS = 5.0


class Screen(Protocol):
    """The three things a run shows."""

    def plan(self, steps: Sequence[Step]) -> None: ...
    def event(self, event: Event) -> None: ...
    def close(self) -> None: ...


class NoScreen:
    """For --json and for tests."""

    def plan(self, steps: Sequence[Step]) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class Careful:
    """Another screen, until it fails in any way: then silence, and the run goes on.

    rich turns a reader that is gone (`| head -1`) into SystemExit.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def plan(self, steps: Sequence[Step]) -> None:
        with self._failing():
            self._screen.plan(steps)

    def event(self, event: Event) -> None:
        with self._failing():
            self._screen.event(event)

    def close(self) -> None:
        with self._failing():
            self._screen.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit):
            failed, self._screen = self._screen, NoScreen()
            with contextlib.suppress(Exception, SystemExit):
                failed.close()


class PlainScreen:
    """One line for what happens, and one every few seconds for each stage's progress."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: dict[str, float] = {}  # stage -> monotonic time of its last line
        self._pace = Pace()

    def plan(self, steps: Sequence[Step]) -> None:
        self.console.print(plan_table(steps))

    def event(self, event: Event) -> None:
        if event["kind"] != "progress":
            if line := happening(event):
                self.console.print(line)
            return
        self._pace.see(event)
        stage, now = event["stage"], time.monotonic()
        if now - self._shown.get(stage, 0.0) >= PLAIN_SECONDS:
            self._shown[stage] = now
            left = self._pace.seconds_left(stage)
            rest = f", {duration(left)} left" if left is not None else ""
            step, total, unit = event["step"], event["total"], event["unit"]
            text = f"  {stage}: {unit} {step:,} of {total:,}{figures_text(_headline(event['figures']))}{rest}"
            self.console.print(text, markup=False)

    def close(self) -> None:
        pass


class LiveScreen:
    """A bar for each running stage, redrawn in place; what happens scrolls above."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._pace = Pace()
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]}", markup=False),
            _Left(self._pace),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            refresh_per_second=5,
        )

    def plan(self, steps: Sequence[Step]) -> None:
        self.console.print(plan_table(steps))
        self._progress.start()

    def event(self, event: Event) -> None:
        stage = event["stage"]
        if event["kind"] == "progress":
            self._pace.see(event)
            count = f"{event['unit']} {event['step']:,}/{event['total']:,}"
            figures = figures_text(_headline(event["figures"])).lstrip(", ")
            self._progress.update(
                self._tasks[stage], completed=event["step"], total=event["total"], count=count, figures=figures
            )
        elif event["kind"] == "stage_started":
            start = {"total": None, "count": "", "figures": "", "stage": stage}
            self._tasks[stage] = self._progress.add_task(f"[bold]{escape(stage)}", **start)
        elif line := happening(event):
            if event["kind"] != "note" and stage in self._tasks:
                self._progress.remove_task(self._tasks.pop(stage))
            self._progress.console.print(line)

    def close(self) -> None:
        self._progress.stop()


class Pace:
    """Time left of each stage, from the progress seen in this process: a resumed stage starts anew."""

    def __init__(self) -> None:
        self._first: dict[str, Event] = {}
        self._last: dict[str, Event] = {}

    def see(self, event: Event) -> None:
        stage = event["stage"]
        first = self._first.get(stage)
        if first is None or first["unit"] != event["unit"] or first["step"] > event["step"]:
            self._first[stage] = event
        self._last[stage] = event

    def seconds_left(self, stage: str) -> float | None:
        if stage not in self._last:
            return None
        first, last = self._first[stage], self._last[stage]
        done = last["step"] - first["step"]
        if done <= 0:
            return None
        return (last["ts"] - first["ts"]) / done * (last["total"] - last["step"])


class _Left(ProgressColumn):
    """Time left, by Pace: rich's own estimate forgets that steps come in bursts."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(table_column=Column(no_wrap=True))  # so that the bar gives way first
        self._pace = pace

    def render(self, task: Task) -> Text:
        left = self._pace.seconds_left(task.fields["stage"])
        return Text("" if left is None else f"{timedelta(seconds=round(left))} left", style="cyan")


def happening(event: Event) -> str:
    """One line of markup for an event that is no progress; empty for those nobody waits for."""
    stage = escape(event["stage"] or "")
    match event["kind"]:
        case "stage_started":
            return f"[bold]{stage}[/] started ({escape(event['what'])})"
        case "stage_finished":
            shown = figures_text(event["figures"])
            return f"[green]✓[/] [bold]{stage}[/] done in {duration(event['seconds'])}[dim]{escape(shown)}[/]"
        case "stage_reused":
            return f"[green]=[/] [bold]{stage}[/] is as before"
        case "stage_stopped":
            return f"[yellow]■[/] [bold]{stage}[/] stopped; its work is kept"
        case "stage_failed":
            return f"[red]✗[/] [bold]{stage}[/] failed: {escape(event['message'])}"
        case "note":
            return f"  [dim]{stage}: {escape(event['text'])}[/]"
    return ""


def _headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What fits beside a bar: loss and speed. All other figures are in events.jsonl."""
    return {name: figures[name] for name in sorted(figures) if "loss" in name or name.endswith("_per_second")}


def figures_text(figures: Mapping[str, Any]) -> str:
    """ ", loss 2.31, tokens/s 13,012": figures as read aloud."""
    parts = []
    for name, value in figures.items():
        label = name.replace("_per_second", "/s").replace("_", " ")
        if isinstance(value, float):
            text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        parts.append(f", {label} {text}")
    return "".join(parts)

"""How a stage tells its progress, and learns that it should stop.

A stage knows nothing of runs, screens or files of events: it is handed a `Report` and calls it.
"""

from __future__ import annotations

from typing import Protocol

from foundation.errors import StopRequested


class Report(Protocol):
    """What a stage may say. Every call is cheap enough for each optimiser step."""

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        """`done` of `total` `unit`s are finished; figures such as loss or tokens_per_second beside it."""

    def note(self, text: str) -> None:
        """One line for the log: a choice made, something skipped and why."""

    def checkpoint_requested(self) -> bool:
        """True once for every time that the user asks for a checkpoint: save one, and go on."""

    def stop_requested(self) -> bool:
        """True once the user asked to stop. Long loops save what they have and raise StopRequested."""


class Silent:
    """A Report that keeps notes and says nothing: for tests and for library use."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def checkpoint_requested(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        return False


def stop_if_asked(report: Report) -> None:
    """Raise StopRequested when the user asked to stop; call it where the work so far is safe on disk."""
    if report.stop_requested():
        raise StopRequested("stopped as asked", hint="the same command goes on from here")

"""Reports that ask for a stop at a place that a test chooses."""

from __future__ import annotations

from foundation.report import Silent


class StopsAfter(Silent):
    """Answers so many questions with no, and then asks for a stop."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


class StopsOnceTold(Silent):
    """Keeps what is told of progress, and asks for a stop when it was told so often."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.said: list[tuple[int, int, str]] = []

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.said.append((done, total, unit))

    def stop_requested(self) -> bool:
        return len(self.said) == self.times

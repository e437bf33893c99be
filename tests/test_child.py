"""foundation.child: answers, refusals, defects, deaths and stops of a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundation import child as module
from foundation.child import ChildBroke, in_child
from foundation.errors import InputError, ModelError, RunError, StopRequested
from foundation.report import Silent

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the functions of tests/children.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


class Told(Silent):
    """Keeps progress too, and is asked to stop once a note was told."""

    def __init__(self, stop_after_note: bool = False) -> None:
        super().__init__()
        self.steps: list[tuple[int, int, str, dict[str, float]]] = []
        self.stop_after_note = stop_after_note

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.steps.append((done, total, unit, figures))

    def stop_requested(self) -> bool:
        return self.stop_after_note and bool(self.notes)


def test_the_answer_comes_back_with_notes_and_progress(capfd: pytest.CaptureFixture[str]) -> None:
    report = Told()
    assert in_child("children:double", {"number": 21}, report) == 42
    assert report.notes == ["doubling"]
    assert report.steps[-1] == (3, 3, "step", {"loss": 3.0})
    printed = capfd.readouterr()
    assert "printed by Python" in printed.err and "printed by C" in printed.err and not printed.out


def test_it_is_another_process_and_ours() -> None:
    answer = in_child("children:whoami", {}, Silent())
    assert answer["parent"] == os.getpid() != answer["pid"]


def test_a_refusal_is_raised_as_itself() -> None:
    with pytest.raises(InputError) as caught:
        in_child("children:refuse", {}, Silent())
    assert (caught.value.message, caught.value.hint) == ("seen: tea", "bring coffee")


def test_a_full_disk_is_told_in_words() -> None:
    with pytest.raises(RunError, match="disk is full"):
        in_child("children:full_disk", {}, Silent())


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ChildBroke, match=r"(?s)break_down.*ZeroDivisionError: by zero"):
        in_child("children:break_down", {}, Silent())


def test_an_abort_is_named_with_the_last_words() -> None:
    with pytest.raises(ModelError, match=r"SIGABRT: .*GGML_ASSERT\(n > 0\) failed"):
        in_child("children:abort", {}, Silent())


def test_an_exit_without_an_answer_is_a_defect() -> None:
    with pytest.raises(ChildBroke, match="code 3 and no answer"):
        in_child("children:leave", {}, Silent())


def test_a_stop_is_heard_by_the_child() -> None:
    with pytest.raises(StopRequested):
        in_child("children:wait_for_stop", {}, Told(stop_after_note=True))


def test_a_child_that_can_not_hear_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.2)
    pid = tmp_path / "pid"
    with pytest.raises(StopRequested):
        in_child("children:deaf", {"pid_file": str(pid)}, Told(stop_after_note=True))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import sys; from foundation.child import in_child; from foundation.report import Silent\n"
        "in_child('children:deaf', {'pid_file': sys.argv[1]}, Silent())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(pid)], env=module.environment(1))
    _until(lambda: pid.is_file() and pid.read_text() != "")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not _alive(int(pid.read_text())))


def _until(true: object) -> None:
    end = time.monotonic() + 30
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen within 30 s"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Running, not a corpse that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

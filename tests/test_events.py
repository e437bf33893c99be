"""foundation/events.py: one line a write, numbers without gaps, and readers that survive anything."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import RunError
from foundation.events import EventLog, Tail


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_a_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("vocab", "progress", 3, total=10, figures={"loss": 1.5})
    log.write(None, "run_finished", text="чай")
    first, second = lines(tmp_path / "events.jsonl")
    assert first.pop("ts") <= second.pop("ts")
    assert first == {"v": 1, "seq": 1, "stage": "vocab", "kind": "progress", "step": 3, "total": 10,
                     "figures": {"loss": 1.5}}  # fmt: skip
    assert second == {"v": 1, "seq": 2, "stage": None, "kind": "run_finished", "step": None, "text": "чай"}


def test_numbers_go_on_after_a_resume(tmp_path: Path) -> None:
    for _ in range(3):
        log = EventLog(tmp_path / "events.jsonl")
        log.write(None, "a")
        log.write(None, "b")
        log.close()
    assert [event["seq"] for event in lines(tmp_path / "events.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_numbers_go_on_behind_a_line_longer_than_one_look_back(tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write(None, "a")
    EventLog(tmp_path / "events.jsonl").write(None, "b", text="x" * 50_000)
    EventLog(tmp_path / "events.jsonl").write(None, "c")
    assert [event["seq"] for event in lines(tmp_path / "events.jsonl")] == [1, 2, 3]


def test_many_writers_share_one_count(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            log = EventLog(path)
            for step in range(200):
                log.write(f"stage{number}", "progress", step)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    events = lines(path)
    assert [event["seq"] for event in events] == list(range(1, 801))
    for number in range(4):
        assert [e["step"] for e in events if e["stage"] == f"stage{number}"] == list(range(200))


def test_nan_is_written_as_json_can_hold_it(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("a", "progress", 1, figures={"loss": math.nan, "best": [math.inf, 1.0]})
    assert lines(tmp_path / "events.jsonl")[0]["figures"] == {"loss": "nan", "best": ["inf", 1.0]}


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="disk is full"):
        EventLog(tmp_path / "events.jsonl").write(None, "a")


def test_a_torn_line_is_closed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).write(None, "a")
    with path.open("a") as file:
        file.write('{"v": 1, "seq": 2, "ts"')
    EventLog(path).write(None, "b")
    assert [(event["seq"], event["kind"]) for event in Tail(path).read()] == [(1, "a"), (2, "b")]


def test_a_writer_killed_with_the_lock_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    child = os.fork()
    if child == 0:
        import fcntl

        fcntl.flock(EventLog(path)._handle, fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    log.write(None, "a")
    assert len(lines(path)) == 1


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 600), max_size=8))
def test_a_tail_in_pieces_reads_what_one_reading_reads(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]
) -> None:
    """Whatever bytes lie between good lines, and wherever the file stood at each look."""
    path = tmp_path_factory.mktemp("tail") / "events.jsonl"
    good = [json.dumps({"seq": number, "kind": "a"}).encode() + b"\n" for number in range(1, 4)]
    content = good[0] + data.replace(b"\n", b" ") + b"\n" + good[1] + data + b"\n" + good[2]
    tail, seen = Tail(path), []
    for cut in [*sorted(cuts), len(content)]:
        path.write_bytes(b"") if not path.exists() else None
        with path.open("r+b") as file:
            file.write(content[:cut])
        seen += tail.read()
    assert seen == Tail(path).read()
    assert [event["seq"] for event in seen if event.get("kind") == "a"][-1] == 3


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"seq": 1}\n{"seq"')
    assert tail.read() == [{"seq": 1}]
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(b": 2}\n")
    assert tail.read() == [{"seq": 2}]


def test_a_tail_starts_over_when_the_file_is_another(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"seq": 1}\n{"seq": 2}\n')
    tail = Tail(path)
    assert len(tail.read()) == 2
    path.write_text('{"seq": 7}\n')  # shorter
    assert tail.read() == [{"seq": 7}]
    new = tmp_path / "new"
    new.write_text('{"seq": 8}\n' * 5)  # longer, and another file
    new.replace(path)
    assert len(tail.read()) == 5


def test_a_tail_goes_on_from_a_saved_offset(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"seq": 1}\n')
    first = Tail(path)
    first.read()
    with path.open("a") as file:
        file.write('{"seq": 2}\n')
    assert Tail(path, first.offset).read() == [{"seq": 2}]

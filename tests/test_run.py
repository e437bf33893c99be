"""samovar/run.py and worker.py: real workers, killed, stopped, failing, and gone on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import stages_for_tests
from stages_for_tests import KINDS

from foundation import artifact
from foundation.errors import ArtifactError, InputError, RunError, RunLocked
from foundation.events import EventLog, Tail
from foundation.rundir import RunDirectory, acquire, is_held
from foundation.runstate import State, state_of
from samovar.recipe import load
from samovar.run import Outcome, make_order, make_planner, run
from samovar.worker import EventReport, Surroundings

HERE = Path(__file__).parent

QUICK = """
name = "tea"
jobs = 2
[[stage]]
name = "a"
kind = "test.write"
[[stage]]
name = "b"
kind = "test.write"
word = "milk"
[[stage]]
name = "j"
kind = "test.join"
reads = { texts = ["a", "b"] }
[[stage]]
name = "s"
kind = "test.shout"
reads = { joined = "j" }
"""
SLOW = QUICK.replace('"test.write"', '"test.write"\ntimes = 40\nstep_seconds = 0.02')


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the stages of the tests."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent}")


class House:
    def __init__(self, folder: Path, text: str = QUICK) -> None:
        self.recipe, self.folder = folder / "tea.toml", folder / "run"
        self.directory = RunDirectory(self.folder)
        self.write(text)

    def write(self, text: str) -> None:
        self.recipe.write_text(text)

    def run(self) -> Outcome:
        return run(load(self.recipe, kinds=KINDS), self.folder, kinds=KINDS)

    def start(self) -> subprocess.Popen[str]:
        """A run in a process of its own."""
        command = [sys.executable, str(HERE / "stages_for_tests.py"), str(self.recipe), str(self.folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def events(self, kind: str) -> list[dict]:
        return [event for event in Tail(self.directory.events).read() if event["kind"] == kind]

    def started(self) -> list[str]:
        return [event["stage"] for event in self.events("stage_started")]

    def status(self) -> dict:
        return json.loads(self.directory.status.read_text())

    def digests(self) -> dict[str, str]:
        found = {name: artifact.load(self.folder / name) for name in "abjs"}
        return {name: manifest.digest for name, manifest in found.items() if manifest}

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.suffix in (".partial", ".replaced"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def wait_for(what: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_a_run_makes_every_stage_and_says_so(house: House) -> None:
    outcome = house.run()
    assert (outcome.state, outcome.exit_code) == (State.FINISHED, 0)
    assert (house.folder / "a" / "text.txt").read_text() == "17: tea\n" * 3
    assert (house.folder / "j" / "joined" / "text.txt").read_text() == "17: tea\n" * 3 + "17: milk\n" * 3
    table = json.loads((house.folder / "s" / "table.json").read_text())
    assert table["rows"][0][0].endswith("17: MILK!"), "the handed function was called"
    for name in "abjs":
        assert artifact.verify(house.folder / name) == []
    assert house.leftovers() == []
    manifest = artifact.load(house.folder / "a")
    assert manifest is not None and manifest.figures == {"lines": 3, "resumed_at": 0}
    assert manifest.peak_memory_bytes > 2**23
    status = house.status()
    assert (status["state"], status["exit_code"], status["stage"]) == ("finished", 0, [])
    assert status["stages"]["a"]["state"] == "finished" and status["stages"]["a"]["step"] == 3
    assert state_of(house.directory) == State.FINISHED
    seqs = [event["seq"] for event in Tail(house.directory.events).read()]
    assert seqs == list(range(1, len(seqs) + 1))
    assert house.events("note")[0]["text"] == "joined 2"
    assert not is_held(house.directory.lock)


def test_a_second_run_starts_no_worker(house: House) -> None:
    house.run()
    before = house.started()
    start = time.monotonic()
    outcome = house.run()
    assert time.monotonic() - start < 1
    assert outcome.state == State.FINISHED and house.started() == before
    assert len(house.events("stage_reused")) == 4
    assert house.status()["stages"]["a"]["state"] == "reused"


def test_only_what_changed_runs_again_and_the_old_one_stays_until_then(house: House) -> None:
    house.run()
    house.write(QUICK.replace('"milk"', '"cream"'))
    house.run()
    assert house.started()[4:] == ["b", "j", "s"]
    assert "cream" in (house.folder / "b" / "text.txt").read_text() and house.leftovers() == []
    house.write(QUICK.replace('"milk"', '"cream"\nends = "refusal"'))
    assert house.run().state == State.FAILED
    assert "cream" in (house.folder / "b" / "text.txt").read_text(), "the finished one outlives a failure"
    house.write(QUICK.replace('"milk"', '"cream"'))
    count = len(house.started())
    assert house.run().state == State.FINISHED and len(house.started()) == count


def test_stages_run_side_by_side_and_no_more_than_asked(tmp_path: Path) -> None:
    text = "".join(
        f'[[stage]]\nname = "s{n}"\nkind = "test.write"\ntimes = 5\nstep_seconds = 0.05\n' for n in range(4)
    )
    for jobs in (1, 2):
        house = House(tmp_path, f'name = "tea"\njobs = {jobs}\n{text}')
        house.folder = tmp_path / f"run{jobs}"
        house.directory = RunDirectory(house.folder)
        house.run()
        running, most = 0, 0
        for event in Tail(house.directory.events).read():
            running += {"stage_started": 1, "stage_finished": -1}.get(event["kind"], 0)
            most = max(most, running)
        assert most == jobs
        assert house.started() == ["s0", "s1", "s2", "s3"], "in the recipe's order"


@pytest.mark.parametrize(
    ("ends", "message", "hint"),
    [
        ("refusal", "stage 'b': this tea is cold", "heat it"),
        ("defect", "stage 'b': ZeroDivisionError: one over nothing", "traceback"),
        ("exit", "stage 'b': its process ended with code 7; the log ends with:\n    starting at 3\n"
                 "    the last words", "log.txt"),
        ("oom", "stage 'b': its process was killed by SIGKILL", "memory"),
        ("full", "stage 'b': the disk is full: could not write model.safetensors", "free some space"),
        ("mute", "stage 'b': test.write ended without writing its 'text' (text.txt)", ""),
    ],
)  # fmt: skip
def test_a_failed_stage_is_reported_and_gone_on_with(
    tmp_path: Path, ends: str, message: str, hint: str
) -> None:
    house = House(tmp_path, QUICK.replace('"milk"', f'"milk"\nends = "{ends}"').replace("jobs = 2", "jobs = 1"))
    (house.folder / "control").mkdir(parents=True)
    (house.folder / "recipe.toml").touch()
    outcome = house.run()
    assert (outcome.state, outcome.exit_code) == (State.FAILED, 1)
    assert message.replace("starting at 3", "starting at 0") in outcome.message and hint in outcome.hint
    assert house.status()["message"] == outcome.message and state_of(house.directory) == State.FAILED
    assert house.started() == ["a", "b"] and house.leftovers() == ["b.partial"]
    if ends == "defect":
        assert "Traceback" in house.directory.log.read_text()
    house.write(QUICK)
    assert house.run().state == State.FINISHED and house.leftovers() == []


def test_a_failure_stops_the_others_and_keeps_their_work(tmp_path: Path) -> None:
    house = House(tmp_path, SLOW.replace('word = "milk"', 'word = "milk"\nends = "refusal"', 1).replace(
        'times = 40\nstep_seconds = 0.02\nword', "word", 1))  # fmt: skip
    outcome = house.run()
    assert outcome.state == State.FAILED and "'b'" in outcome.message
    assert [event["stage"] for event in house.events("stage_stopped")] == ["a"]
    assert house.status()["stages"]["a"]["state"] == "stopped"
    house.write(SLOW)
    assert house.run().state == State.FINISHED
    manifest = artifact.load(house.folder / "a")
    assert manifest is not None and manifest.figures["resumed_at"] > 0


@pytest.mark.parametrize("how", ["request", "SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_is_obeyed_and_the_same_command_goes_on(tmp_path: Path, how: str) -> None:
    house = House(tmp_path, SLOW)
    process = house.start()
    wait_for(lambda: len(house.events("progress")) > 3)
    if how == "request":
        house.directory.request("stop")
    else:
        process.send_signal(getattr(signal, how))
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "stopped\nstopped as asked\n"
    assert state_of(house.directory) == State.STOPPED and not is_held(house.directory.lock)
    assert house.leftovers() == ["a.partial", "b.partial"]
    assert house.run().state == State.FINISHED, "the request is forgotten"
    manifest = artifact.load(house.folder / "a")
    assert manifest is not None and manifest.figures["resumed_at"] > 0 and house.leftovers() == []


def test_a_stage_that_stops_unasked_stops_the_run(house: House) -> None:
    house.write(QUICK.replace('"milk"', '"milk"\nends = "stop"'))
    assert house.run().state == State.STOPPED
    assert house.status()["stages"]["b"]["state"] == "stopped"


def test_what_a_stage_leaves_running_ends_with_it(house: House) -> None:
    """A forked child has the lock and the worker's answer open; neither may keep the run waiting."""
    house.write(QUICK.replace('"milk"', '"milk"\nends = "orphan"'))
    start = time.monotonic()
    assert house.run().state == State.FINISHED
    assert time.monotonic() - start < 30
    acquire(house.directory.lock, patience_seconds=2).release()


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    """As under nohup: the end of the terminal is not the end of the run."""
    house = House(tmp_path, SLOW)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = house.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: house.events("progress"))
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=30)
    assert out.startswith("finished")


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    house = House(tmp_path, QUICK.replace('"test.write"', '"test.write"\ntimes = 3\nstep_seconds = 30.0'))
    process = house.start()
    wait_for(lambda: len(house.started()) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    process.communicate()
    assert not is_held(house.directory.lock)


def test_a_second_run_is_refused_at_once_and_disturbs_nothing(tmp_path: Path) -> None:
    house = House(tmp_path, SLOW)
    process = house.start()
    wait_for(lambda: house.events("progress"))
    assert state_of(house.directory) == State.RUNNING
    start = time.monotonic()
    with pytest.raises(RunLocked, match=f"held by process {process.pid} "):
        house.run()
    assert time.monotonic() - start < 1
    out, _ = process.communicate(timeout=30)
    assert out.startswith("finished")


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    house = House(tmp_path, QUICK.replace('"test.write"', '"test.write"\ntimes = 3\nstep_seconds = 30.0'))
    process = house.start()
    wait_for(lambda: len(house.started()) == 2)
    wait_for(lambda: house.directory.log.read_text().count("starting at") == 2)
    process.kill()
    process.communicate()
    acquire(house.directory.lock, patience_seconds=5).release()
    assert state_of(house.directory) == State.CRASHED


def test_a_worker_ends_when_its_lifeline_is_cut(tmp_path: Path) -> None:
    """Where no kernel does it: the parent lives on here, and only closes the pipe."""
    house = House(tmp_path, QUICK.replace('"test.write"', '"test.write"\ntimes = 3\nstep_seconds = 30.0'))
    planner = make_planner(load(house.recipe, kinds=KINDS), tmp_path / "run", download=False, kinds=KINDS)
    order = make_order(planner.plan()[0], planner, KINDS["test.write"])
    around = Surroundings(str(tmp_path / "events.jsonl"), str(tmp_path / "stop"), os.getpid())
    with (tmp_path / "log.txt").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "samovar.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps({"order": asdict(order), "surroundings": asdict(around)}).encode() + b"\n")
    worker.stdin.flush()
    wait_for(lambda: "starting at 0" in (tmp_path / "log.txt").read_text())
    assert worker.poll() is None
    worker.communicate(timeout=5)
    assert worker.returncode == 1


def test_every_worker_has_the_lock_too(tmp_path: Path) -> None:
    """So that the directory stays taken for as long as anybody of the run could still write to it."""
    house = House(tmp_path, QUICK.replace('"test.write"', '"test.write"\ntimes = 3\nstep_seconds = 30.0'))
    process = house.start()
    wait_for(lambda: house.directory.log.exists() and house.directory.log.read_text().count("starting") == 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    opened = [{file.resolve() for file in Path(f"/proc/{child}/fd").iterdir()} for child in children]
    assert len(opened) == 2 and all(house.directory.lock in files for files in opened)
    process.kill()
    process.communicate()
    acquire(house.directory.lock, patience_seconds=5).release()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path, seed: int) -> None:
    """kill -9 of the parent at random moments, each time gone on with at once."""
    (tmp_path / "reference").mkdir()
    reference = House(tmp_path / "reference", SLOW)
    assert reference.run().state == State.FINISHED
    house = House(tmp_path, SLOW)
    moments = random.Random(seed)
    for _ in range(8):
        process = house.start()
        try:
            process.communicate(timeout=moments.uniform(0.25, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert house.run().state == State.FINISHED
    assert house.digests() == reference.digests() and house.leftovers() == []
    seqs = [event["seq"] for event in Tail(house.directory.events).read()]
    assert seqs == list(range(1, len(seqs) + 1)), "no event was lost or written twice"


def test_a_kill_between_record_and_publish_needs_no_second_run_of_the_stage(house: House) -> None:
    house.run()
    reference = house.digests()
    (house.folder / "a").rename(house.folder / "a.partial")
    house.run()
    assert house.digests() == reference and house.leftovers() == []
    assert house.directory.log.read_text().count("starting at") == 2, "the stage itself did not run again"


@pytest.mark.parametrize("both", [False, True])
def test_a_replacement_that_was_cut_short_is_put_right_first(house: House, both: bool) -> None:
    house.run()
    reference = house.digests()
    (house.folder / "a").rename(house.folder / "a.replaced")
    if both:
        shutil.copytree(house.folder / "a.replaced", house.folder / "a")
    house.run()
    assert house.digests() == reference and house.leftovers() == [] and len(house.started()) == 4


def test_progress_is_thinned_out_but_its_last_word_is_kept(tmp_path: Path) -> None:
    report = EventReport("a", EventLog(tmp_path / "events.jsonl"), tmp_path / "stop")
    for step in range(1, 1001):
        report.progress(step, 2000, loss=float(step))
    report.progress(1, 5, "file")
    report.flush()
    report.flush()
    seen = [(event["unit"], event["step"]) for event in Tail(tmp_path / "events.jsonl").read()]
    assert seen[0] == ("step", 1) and seen[-2:] == [("step", 1000), ("file", 1)] and len(seen) < 20
    report.progress(5, 5, "file")
    assert Tail(tmp_path / "events.jsonl").read()[-1]["step"] == 5, "the end is written at once"
    assert not report.stop_requested()
    (tmp_path / "stop").touch()
    assert report.stop_requested()


def test_the_last_progress_of_a_failing_stage_is_kept(house: House) -> None:
    house.write(QUICK.replace('"milk"', '"milk"\ntimes = 300\nends = "refusal"\nfails_at = 250'))
    house.run()
    assert house.status()["stages"]["b"]["step"] == 250


def test_an_altered_artifact_stops_a_run_before_it_starts(house: House) -> None:
    house.run()
    (house.folder / "a" / "text.txt").write_text("cold")
    with pytest.raises(ArtifactError, match=r"a: altered: text\.txt"):
        house.run()
    assert (house.folder / "a" / "text.txt").read_text() == "cold"
    assert state_of(house.directory) == State.FINISHED, (
        "a refusal before the start says nothing of the last run"
    )


def test_a_missing_input_stops_a_run_before_it_starts(house: House) -> None:
    house.write(QUICK.replace('name = "a"', 'name = "a"\nreads = { before = "leaf" }')
                + '[inputs]\nleaf = "no.txt"\n')  # fmt: skip
    with pytest.raises(InputError, match=r"no\.txt"):
        house.run()
    assert not house.directory.events.exists(), "no stage was started"


def test_a_read_only_folder_is_said(tmp_path: Path) -> None:
    """By a process without root's rights, for root may write anywhere."""
    if os.getuid() != 0:
        pytest.skip("needs root to give up its rights")
    house = House(tmp_path)
    recipe = load(house.recipe, kinds=KINDS)
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        folder.chmod(0o755)
    source, target = os.pipe()
    if os.fork() == 0:
        os.setuid(65534)
        try:
            run(recipe, house.folder, kinds=KINDS)
        except BaseException as error:
            os.write(target, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.wait()
    said = os.read(source, 10_000).decode()
    assert said.startswith("RunError: this user may not access") and "--out" in said


def test_a_disk_that_fills_up_under_the_parent_is_said(house: House) -> None:
    house.directory.create()
    house.directory.recipe.touch()
    house.directory.events.symlink_to("/dev/full")
    with pytest.raises(RunError, match="disk is full"):
        house.run()
    assert state_of(house.directory) == State.FAILED and not is_held(house.directory.lock)


def test_a_folder_of_something_else_is_not_taken(house: House) -> None:
    house.folder.mkdir()
    (house.folder / "thesis.md").write_text("mine")
    with pytest.raises(RunError, match="is no run directory"):
        house.run()
    assert [path.name for path in house.folder.iterdir()] == ["thesis.md"]


def test_files_beside_the_recipe_do_not_replace_modules(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe may come in a folder from anywhere: a random.py there must not run."""
    for name in ("json.py", "typing.py", "foundation.py"):
        (house.recipe.parent / name).write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(house.recipe.parent)
    assert house.run().state == State.FINISHED


def test_workers_get_their_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from foundation import process as module

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    assert [module.environment(jobs)["OMP_NUM_THREADS"] for jobs in (1, 2, 3, 16)] == ["8", "4", "2", "1"]
    assert module.environment(1)["PYTHONHASHSEED"] == "0"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert module.environment(1)["OMP_NUM_THREADS"] == "3", "what the user set stays"


def test_the_kinds_of_the_tests_are_sound() -> None:
    assert stages_for_tests.exclaim("tea\n") == "TEA!"


def test_each_request_for_a_checkpoint_is_answered_once(tmp_path: Path) -> None:
    report = EventReport("tea", EventLog(tmp_path / "events.jsonl"), tmp_path / "stop")
    assert not report.checkpoint_requested()
    asked = tmp_path / "checkpoint"
    for when in (1, 2):
        asked.touch()
        os.utime(asked, ns=(when, when))
        assert report.checkpoint_requested() and not report.checkpoint_requested()
    assert not report.stop_requested()


def test_an_input_edited_while_a_stage_runs_fails_it(house: House, tmp_path: Path) -> None:
    (tmp_path / "leaf.txt").write_text("leaf")
    stage = 'reads = { before = "leaf" }\ntimes = 40\nstep_seconds = 0.02\n'
    house.write(
        'name = "tea"\n[inputs]\nleaf = "leaf.txt"\n[[stage]]\nname = "a"\nkind = "test.write"\n' + stage
    )
    running = house.start()
    wait_for(lambda: house.events("progress"))
    (tmp_path / "leaf.txt").write_text("another")
    said = running.communicate(timeout=30)[0]
    assert running.returncode == 1 and "leaf.txt was changed while it was used" in said
    assert artifact.load(house.folder / "a") is None and house.leftovers() == ["a.partial"]
    assert house.run().state == State.FINISHED


def test_a_setting_that_alters_no_byte_makes_nothing_stale(house: House) -> None:
    house.run()
    before = house.started()
    house.write(QUICK.replace('"test.write"', '"test.write"\nstep_seconds = 0.5'))
    assert house.run().state == State.FINISHED and house.started() == before

"""Stages of several processes, under the real torchrun: killed, stopped, failing, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_stages import KINDS, Settings
from tiny import TEXTS, chats, tiny_model

from foundation import artifact
from foundation.artifact import Manifest
from foundation.errors import MissingError, RecipeError, RunError, SamovarError, StopRequested
from foundation.events import Tail
from foundation.files import read_json, write_json
from foundation.rundir import acquire
from samovar import torchrun
from samovar.alone import run_alone
from samovar.recipe import check_settings, load
from samovar.screen import NoScreen

HERE = Path(__file__).resolve().parent

CREW = """
name = "crew"
[[stage]]
name = "s"
kind = "test.crew"
processes = 2
"""
PRETRAIN = """
name = "train"
[inputs]
model = "model"
corpus = "corpus.txt"
[[stage]]
name = "s"
kind = "adaptation.pretrain"
reads = { model = "model", corpus = "corpus" }
trains = ["embeddings", "head", "layers"]
steps = 30
learning_rate = 5e-4
batch_rows = 2
block_tokens = 16
warmup_steps = 0
precision = "fp32"
checkpoint_every_steps = 12
processes = 2
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and ranks find the stages of the tests; each rank has one thread."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


class Run:
    """A recipe of one stage `s`, run in processes of its own."""

    def __init__(self, folder: Path, text: str = CREW, name: str = "run") -> None:
        self.recipe, self.folder = folder / f"{name}.toml", folder / name
        self.recipe.write_text(text)
        self.work = self.folder / "s.partial" / ".work"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "rank_stages.py"), str(self.recipe), str(self.folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(self) -> Manifest:
        """Run to the end."""
        process = self.start()
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said + self.log()
        manifest = artifact.load(self.folder / "s")
        assert manifest is not None
        return manifest

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def events(self, kind: str) -> list[dict]:
        return [event for event in Tail(self.folder / "events.jsonl").read() if event["kind"] == kind]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def tree(pid: int) -> dict[str, int]:
    """Who works under the run `pid`: worker, agent, rank 0, rank 1; as far as they are there yet."""
    found = {"run": pid}
    for worker in children(pid)[:1]:
        found["worker"] = worker
        for agent in children(worker)[:1]:
            found["agent"] = agent
            for child in children(agent):
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found |= {f"rank {n}": child for n in (0, 1) if f"RANK={n}".encode() in environment}
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------ without any process


@pytest.mark.parametrize(
    "name", ["adaptation.scratch", "adaptation.pretrain", "distill.train", "distill.capture"]
)
def test_stages_that_train_or_capture_take_several_processes(name: str) -> None:
    assert KINDS[name].distributed and check_settings(KINDS[name], {"processes": 2}).processes == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "needs"), [("prune.iterate", {"remove_layers": 1}), ("evaluation.score", {})])
def test_a_kind_of_one_process_refuses_more(name: str, needs: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'processes'"):
        check_settings(KINDS[name], {"processes": 2, **needs})
    recipe = tmp_path / "r.toml"
    told = "".join(f"{key} = {value}\n" for key, value in needs.items())
    recipe.write_text(f'name = "r"\n[[stage]]\nname = "s"\nkind = "{name}"\nprocesses = 2\n{told}')
    with pytest.raises(RecipeError, match=r"r\.toml, stage 's': .*'processes'"):
        load(recipe)


def test_a_setting_of_one_process_is_taken_everywhere() -> None:
    assert check_settings(KINDS["prune.iterate"], {"processes": 1, "remove_layers": 1})


def test_more_processes_than_gpus_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from samovar.run import run

    monkeypatch.setattr(torchrun, "count_gpus", lambda: 1)
    recipe = Run(tmp_path)
    with pytest.raises(MissingError, match=r"processes = 2.*torch sees 1") as refused:
        run(load(recipe.recipe, kinds=KINDS), recipe.folder, kinds=KINDS)
    assert "at most" in refused.value.hint and not (recipe.folder / "s.partial").exists()
    with pytest.raises(MissingError):
        run_alone("test.crew", {}, {"processes": 2}, tmp_path / "o", NoScreen(), KINDS)
    for gpus in (0, 2, 8):
        monkeypatch.setattr(torchrun, "count_gpus", lambda gpus=gpus: gpus)
        torchrun.refuse_more_than_gpus([Settings(processes=2)])
    monkeypatch.setattr(torchrun, "count_gpus", lambda: pytest.fail("torch was asked for one process"))
    torchrun.refuse_more_than_gpus([Settings(processes=1)])


@pytest.mark.parametrize(
    ("threads", "processes", "share"), [("8", 2, "4"), ("8", 3, "2"), ("1", 2, "1"), ("4,2", 2, "4,2")]
)
def test_ranks_share_the_threads_of_their_stage(
    monkeypatch: pytest.MonkeyPatch, threads: str, processes: int, share: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    env = torchrun._environment(processes)
    assert env["OMP_NUM_THREADS"] == share
    assert (env["PYTHONSAFEPATH"], env["PYTHONHASHSEED"]) == ("1", "0")


DONE = {"outcome": "done", "message": "", "hint": ""}
GLOO = {"outcome": "broken", "message": "RuntimeError: Connection closed by peer", "hint": ""}
COLD = {"outcome": "failed", "message": "this tea is cold", "hint": "heat it"}
STOP = {"outcome": "stopped", "message": "stopped as asked", "hint": ""}
ZERO = {"outcome": "broken", "message": "ZeroDivisionError: one over nothing", "hint": ""}
KILLED = {"rank": 1, "code": -9}


@pytest.mark.parametrize(
    ("results", "agent", "code", "error", "says"),
    [
        ({0: GLOO, 1: COLD}, None, 1, SamovarError, "this tea is cold"),
        ({0: GLOO}, KILLED, 1, SamovarError, "rank 1 of 2 was killed by SIGKILL"),
        ({}, None, -9, SamovarError, "torchrun was killed by SIGKILL"),
        ({1: ZERO, 0: GLOO}, {"rank": 1, "code": 1}, 1, torchrun.RanksBroke, "rank 1: ZeroDivisionError"),
        ({0: STOP, 1: STOP}, None, 0, StopRequested, "stopped as asked"),
        ({0: STOP}, {"rank": 0, "code": 1}, 1, StopRequested, "stopped as asked"),
        ({0: STOP, 1: ZERO}, {"rank": 1, "code": 1}, 1, torchrun.RanksBroke, "rank 1: ZeroDivisionError"),
        ({}, {"rank": 0, "code": 7}, 1, torchrun.RanksBroke, "torchrun ended with code 1"),
        (
            {0: {"outcome": "done", "message": "", "hint": ""}},
            None,
            0,
            torchrun.RanksBroke,
            "ended with code 0",
        ),
    ],
)
def test_the_root_of_a_failure_is_what_is_said(
    tmp_path: Path, results: dict, agent: dict | None, code: int, error: type[Exception], says: str
) -> None:
    """The results are given in the order in which they came."""
    for when, (rank, said) in enumerate(results.items()):
        write_json(tmp_path / f"result-{rank}.json", {**said, "when": when})
    if agent:
        write_json(tmp_path / "agent.json", agent)
    with pytest.raises(error, match=says):
        torchrun._figures(tmp_path, 2, code)


def test_a_full_disk_is_said_though_no_rank_could(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(torchrun, "write_json", full)
    with pytest.raises(RunError, match="the disk is full"):
        torchrun._figures(tmp_path, 2, 1)


# -------------------------------------------------------------------------------- under the real torchrun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "message", "hint"),
    [
        ("refusal", "stage 's': this tea is cold", "heat it"),
        ("defect", "stage 's': rank 1: ZeroDivisionError: one over nothing", "log.txt"),
    ],
)
def test_what_ends_one_rank_is_reported_in_its_own_words(
    tmp_path: Path, ends: str, message: str, hint: str
) -> None:
    """And ends the other, which would work for ten minutes."""
    run = Run(tmp_path, CREW + f'ends = "{ends}"\nlines = 6000\nstep_seconds = 0.2\n')
    process = run.start()
    said, _ = process.communicate(timeout=300)
    status = read_json(run.folder / "status.json")
    assert process.returncode == 1 and said.splitlines()[1] == status["message"] == message
    assert hint in status["hint"]
    assert ("Traceback" in run.log()) == (ends == "defect")
    assert "ChildFailedError" not in run.log() and "torch/distributed/elastic" not in run.log()
    acquire(run.folder / "lock", patience_seconds=20).release()


@pytest.mark.slow
def test_whoever_is_killed_nobody_stays_and_the_work_goes_on(tmp_path: Path) -> None:
    """A rank, torchrun and the worker, one after the other, in one stage's life."""
    run = Run(tmp_path, CREW + "lines = 100\nstep_seconds = 0.2\n")
    victims = {"rank 0": "rank 0 of 2", "agent": "torchrun", "worker": "its process"}
    for victim in victims:
        process = run.start()
        found = len(list(run.work.glob("[0-9]*")))
        wait_for(lambda found=found: len(list(run.work.glob("[0-9]*"))) > found + 3)
        pids = tree(process.pid)
        assert set(pids) == {"run", "worker", "agent", "rank 0", "rank 1"}
        for who in ("worker", "agent", "rank 0", "rank 1"):
            opened = {file.resolve() for file in Path(f"/proc/{pids[who]}/fd").iterdir()}
            assert run.folder / "lock" in opened, f"{who} has the lock too"
        os.kill(pids[victim], signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and f"{victims[victim]} was killed by SIGKILL" in said
        acquire(run.folder / "lock", patience_seconds=20).release()
        wait_for(lambda pids=pids: not any(map(lives, pids.values())), seconds=20)
    run.recipe.write_text(CREW + "lines = 100\n")
    manifest = run.finish()
    alone = run_alone("test.crew", {}, {"lines": 100}, tmp_path / "o", NoScreen(), KINDS)
    assert manifest.digest == alone.digest and manifest.identity.fingerprint == alone.identity.fingerprint
    assert sorted(path.name for path in (run.folder / "s").iterdir()) == [
        "manifest.json", "settings.json", "text.txt",
    ]  # fmt: skip
    assert set(manifest.figures) == {"found", "lines"}, "the figures are rank 0's"
    assert int(manifest.figures["found"]) >= 4 * len(victims)
    log = run.log()
    assert {"rank 0 of 2, 1 threads", "rank 1 of 2, 1 threads"} <= set(log.splitlines())
    assert "rank 1: found" in log, "the others' notes are in the log"
    assert [event["text"].split()[0] for event in run.events("note")] == ["found"] * 4
    last = run.events("progress")[-1]
    assert (last["step"], last["unit"], last["figures"]) == (99, "line", {"loss": 1 / 99})


@pytest.mark.slow
def test_a_stage_alone_runs_on_several_ranks_and_stops_when_asked(tmp_path: Path) -> None:
    class Interrupting(NoScreen):
        asked = False

        def event(self, event: dict) -> None:
            if event["kind"] == "progress" and event["step"] > 4 and not self.asked:
                self.asked = True
                signal.raise_signal(signal.SIGINT)

    slow, folder = {"lines": 20, "processes": 2, "step_seconds": 0.3}, tmp_path / "o"
    with pytest.raises(StopRequested):
        run_alone("test.crew", {}, slow, folder, Interrupting(), KINDS)
    manifest = run_alone("test.crew", {}, {"lines": 20}, folder, NoScreen(), KINDS)
    assert 4 <= int(manifest.figures["found"]) < 20


# ---------------------------------------------------------------------------------------- the real stages


@pytest.mark.slow
def test_training_on_two_ranks_stops_when_asked_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Which are, but for rounding, those of one process with twice the batch."""
    import torch
    from safetensors.torch import load_file

    start = tiny_model(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n\n".join(TEXTS))
    run = Run(tmp_path, PRETRAIN)
    process = run.start()
    wait_for(lambda: run.folder.is_dir() and run.events("note"))  # they have begun, and do not train yet
    for request in ("checkpoint", "stop"):
        (run.folder / "control" / request).touch()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and said.startswith("stopped"), said + run.log()
    assert 0 < _steps(run)[-1] < 30
    disturbed, undisturbed = run.finish(), Run(tmp_path, PRETRAIN, "plain").finish()
    assert disturbed.files == undisturbed.files and disturbed.figures == undisturbed.figures
    settings = tomllib.loads(PRETRAIN)["stage"][0] | {"batch_rows": 4, "processes": 1, "seed": 17}
    roles = {role: [str(tmp_path / name)] for role, name in (("model", "model"), ("corpus", "corpus.txt"))}
    settings = {key: value for key, value in settings.items() if key not in ("name", "kind", "reads")}
    run_alone("adaptation.pretrain", roles, settings, tmp_path / "one", NoScreen())
    one, two, before = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "one" / "model", run.folder / "s" / "model", start)
    )
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], atol=1e-4, rtol=1e-3)
        assert not torch.allclose(value, before[name], atol=1e-3)


def _steps(run: Run) -> list[int]:
    """Of the complete checkpoints."""
    return sorted(int(path.parent.name.split("-")[1]) for path in run.work.glob("checkpoint-*/COMPLETE")) or [0]


@pytest.mark.slow
def test_two_ranks_capture_the_bytes_of_one(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats(12)))
    roles = {"teacher": [str(folder)], "data": [str(data)]}
    settings = {"shard_rows": 2, "top_k": 8}
    one = run_alone("distill.capture", roles, settings, tmp_path / "one", NoScreen())
    two = run_alone("distill.capture", roles, {**settings, "processes": 2}, tmp_path / "two", NoScreen())
    assert one.files == two.files and one.figures == two.figures

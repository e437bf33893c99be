"""The command line: what each command prints, how it ends, and how soon it starts."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import stages_for_tests
from rich.console import Console

from foundation import artifact
from foundation.errors import RecipeError, RunLocked, StopRequested
from foundation.rundir import RunDirectory, acquire
from samovar import cli, doctor
from samovar.alone import parse_setting, run_alone
from samovar.screen import LiveScreen, NoScreen, Pace, PlainScreen, figures_text
from samovar.show import cell, comparison, duration, log_tail, size
from samovar.stages import KINDS

HERE = Path(__file__).parent

RECIPE = """
name = "tea"
[[stage]]
name = "a"
kind = "test.write"
times = 5
[[stage]]
name = "j"
kind = "test.join"
reads = { texts = "a" }
[[stage]]
name = "s"
kind = "test.shout"
reads = { joined = "j" }
[short.a]
times = 1
"""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with the kinds of the tests beside the real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent}")
    monkeypatch.setenv("COLUMNS", "120")
    for name, kind in stages_for_tests.KINDS.items():
        monkeypatch.setitem(KINDS, name, kind)  # type: ignore[arg-type]
    Path("tea.toml").write_text(RECIPE)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["samovar", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


# ------------------------------------------------------------------------------------------------- start


def test_help_names_every_command_and_the_exit_codes(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for command in (
        "run",
        "check",
        "stage",
        "kinds",
        "runs",
        "status",
        "stop",
        "checkpoint",
        "verify",
        "chat",
        "doctor",
    ):
        assert f"\n  {command} " in out
    assert "130" in out


def test_help_takes_at_most_a_third_of_a_second() -> None:
    """Processor time, which other work on the machine does not change much; best of three."""
    took = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-m", "samovar.cli", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        took.append(usage.ru_utime + usage.ru_stime)
    assert min(took) <= 0.35


@pytest.mark.parametrize(
    "arguments", [["brew"], ["run"], ["run", "tea.toml", "--brew"], ["stage", "test.write"]]
)
def test_typed_wrongly(call: Call, arguments: list[str]) -> None:
    assert call(*arguments)[0] == 2


# --------------------------------------------------------------------------------------------------- run


def test_run_ends_with_the_table(call: Call) -> None:
    code, out, err = call("run", "tea.toml")
    assert (code, err) == (0, "")
    assert (Path("runs/tea/a/text.txt")).read_text() == "17: tea\n" * 5
    for part in ("a started (run)", "✓ a done in 0 s", "a: line 1 of 5, loss 1", "TEA!", "1.500", "hot",
                 "finished: runs/tea"):  # fmt: skip
        assert part in out, part
    assert out.index("finished: ") > out.index("TEA!")
    code, out, _ = call("run", "tea.toml")
    assert code == 0 and "= a is as before" in out and "TEA!" in out


def test_run_short_has_its_own_directory(call: Call) -> None:
    assert call("run", "tea.toml", "--short")[0] == 0
    assert Path("runs/tea-short/a/text.txt").read_text() == "17: tea\n"
    assert not Path("runs/tea").exists()


def test_dry_shows_the_plan_and_touches_nothing(call: Call) -> None:
    code, out, _ = call("run", "tea.toml", "--dry")
    assert code == 0 and "after a" in out and not Path("runs").exists()
    code, out, _ = call("run", "tea.toml", "--dry", "--json")
    assert json.loads(out) == [
        {"stage": "a", "kind": "test.write", "action": "run", "why": ""},
        {"stage": "j", "kind": "test.join", "action": "run", "why": "after a"},
        {"stage": "s", "kind": "test.shout", "action": "run", "why": "after j"},
    ]


def test_run_as_json_prints_json_only(call: Call) -> None:
    code, out, _ = call("run", "tea.toml", "--json", "--out", "here")
    said = json.loads(out)
    assert code == 0 and said["state"] == "finished" and said["run"] == "here"
    assert [stage["action"] for stage in said["stages"]] == ["reuse"] * 3


def test_a_failed_run_says_why_without_a_traceback(call: Call) -> None:
    Path("tea.toml").write_text(RECIPE.replace("times = 5", 'ends = "refusal"'))
    code, out, err = call("run", "tea.toml")
    assert code == 1 and err == "samovar: stage 'a': this tea is cold\n  -> heat it\n"
    assert "finished" not in out


def test_a_locked_run_is_refused(call: Call) -> None:
    run = RunDirectory(Path("runs/tea"))
    run.create()
    lock = acquire(run.lock)
    code, _, err = call("run", "tea.toml")
    lock.release()
    assert code == 1 and f"held by process {os.getpid()}" in err and "samovar stop" in err


def test_check_tells_all_faults(call: Call) -> None:
    assert call("check", "tea.toml")[:2] == (0, "tea.toml: fine, 3 stages\n")
    said = json.loads(call("check", "tea.toml", "--json")[1])
    assert said["stages"][0]["settings"]["times"] == 5
    Path("tea.toml").write_text(RECIPE.replace("times = 5", "tmies = 5").replace("joined =", "jioned ="))
    code, out, err = call("check", "tea.toml")
    assert code == 1 and out == ""
    assert "stage 'a': unknown key 'tmies'; did you mean 'times'?" in err
    assert "stage 's': it does not read 'jioned'; did you mean 'joined'?" in err


# ---------------------------------------------------------------------------------- looking at a run


def test_status_runs_and_verify_of_a_finished_run(call: Call) -> None:
    call("run", "tea.toml")
    code, out, _ = call("status", "runs/tea")
    assert code == 0 and "runs/tea: finished" in out and "line 5 of 5" in out
    assert json.loads(call("status", "runs/tea", "--json")[1])["state"] == "finished"
    code, out, _ = call("runs")
    assert code == 0 and "3 of 3" in out and "finished" in out
    assert json.loads(call("runs", "runs", "--json")[1])[0]["run"] == "runs/tea"
    assert call("verify", "runs/tea")[:2] == (0, "".join(f"{n}: as it was written\n" for n in "ajs"))
    Path("runs/tea/a/text.txt").write_text("cold")
    code, out, _ = call("verify", "runs/tea")
    assert code == 1 and "a: altered: text.txt (4 bytes, the manifest says 40)" in out
    code, out, _ = call("verify", "runs/tea/a", "--json")
    assert code == 1 and list(json.loads(out)) == ["a"]


def test_status_of_a_crashed_run_shows_the_end_of_its_log(call: Call) -> None:
    run = RunDirectory(Path("runs/tea"))
    run.create()
    run.status.write_text(json.dumps({"state": "running", "heartbeat": time.time(), "stages": {}}))
    run.log.write_text("".join(f"line {number}\n" for number in range(100)))
    code, out, _ = call("status", "runs/tea")
    assert code == 0 and "crashed" in out and "line 99" in out and "line 80" not in out


def test_nothing_there_is_said(call: Call) -> None:
    assert call("runs")[:2] == (0, "no runs in runs\n")
    for command in ("status", "stop", "verify"):
        code, _, err = call(command, "runs/no")
        assert code == 1 and "runs/no" in err and "->" in err


def test_stop_asks_a_running_run_and_refuses_others(call: Call) -> None:
    call("run", "tea.toml")
    code, _, err = call("stop", "runs/tea")
    assert code == 1 and "nothing runs in runs/tea" in err
    run = RunDirectory(Path("runs/tea"))
    lock = acquire(run.lock)
    assert call("stop", "runs/tea")[0] == 0 and run.requested("stop")
    assert call("checkpoint", "runs/tea")[0] == 0 and run.requested("checkpoint")
    lock.release()


# ------------------------------------------------------------------------------------------ one stage


def test_a_stage_alone_is_the_artifact_of_a_run(call: Call) -> None:
    call("run", "tea.toml")
    code, out, _ = call("stage", "test.write", "--out", "alone/a", "--set", "times=5", "--set", "word=tea")
    assert code == 0 and "alone/a: 1 files" in out
    alone, in_run = artifact.load(Path("alone/a")), artifact.load(Path("runs/tea/a"))
    assert alone is not None and in_run is not None and alone.identity == in_run.identity
    assert alone.digest == in_run.digest

    arguments = ["stage", "test.join", "--texts", "alone/a/text.txt", "--texts=tea.toml", "--out", "alone/j"]
    code, out, _ = call(*arguments, "--json")
    assert code == 0 and len(json.loads(out)["inputs"]["texts"]) == 2
    assert Path("alone/j/joined/text.txt").read_text() == "17: tea\n" * 5 + RECIPE
    stamp = Path("alone/j/manifest.json").stat().st_mtime_ns
    assert call(*arguments)[0] == 0
    assert Path("alone/j/manifest.json").stat().st_mtime_ns == stamp, "the second time there is nothing to do"


def test_all_faults_of_a_stage_alone_at_once(call: Call) -> None:
    code, _, err = call("stage", "test.join", "--text", "x", "--out", "o", "--set", "separater=1")
    assert code == 1 and not Path("o").exists()
    assert "does not read 'text'; did you mean 'texts'?" in err
    assert "must read 'texts': --texts PATH" in err
    assert "unknown key 'separater'; did you mean 'separator'?" in err
    assert "did you mean 'test.join'?" in call("stage", "test.jion", "--out", "o")[2]
    assert call("stage", "test.join", "texts", "x", "--out", "o")[0] == 2
    code, _, err = call("stage", "test.write", "--before", "no.txt", "--out", "o")
    assert code == 1 and "'no.txt' is not there" in err


def test_two_of_one_are_refused(call: Call) -> None:
    Path("b.toml").touch()
    said = call("stage", "test.write", "--before", "tea.toml", "--before", "b.toml", "--out", "o")
    assert said[0] == 1 and "takes one 'before'" in said[2]
    said = call("stage", "test.write", "--before", "*.toml", "--out", "o")
    assert said[0] == 1 and "role 'before' takes one path, and 2 match" in said[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_alone_stops_when_asked_and_goes_on(number: signal.Signals) -> None:
    """Ctrl-C, or what a service manager sends, between two steps; then the same call again."""

    class Interrupting(NoScreen):
        def event(self, event: dict) -> None:
            if event["kind"] == "progress" and event["step"] == 2:
                signal.raise_signal(number)

    out, before = Path("o").absolute(), signal.getsignal(number)
    with pytest.raises(StopRequested):
        run_alone("test.write", {}, {"times": 4}, out, Interrupting())
    assert signal.getsignal(number) is before
    manifest = run_alone("test.write", {}, {"times": 4}, out, NoScreen())
    assert manifest.figures == {"lines": 4, "resumed_at": 2}


def test_two_of_the_same_stage_at_once_are_refused() -> None:
    lock = acquire(Path(".o.lock"))
    with pytest.raises(RunLocked, match=r"another process works on .*/o\b"):
        run_alone("test.write", {}, {}, Path("o"), NoScreen())
    lock.release()


@pytest.mark.parametrize(
    ("text", "value"),
    [("n=200", 200), ("r=2.5e-3", 2.5e-3), ("b=true", True), ("w=tea", "tea"), ('w="17"', "17"),
     ("l=[1, 2]", [1, 2]), ("w=a=b", "a=b"), ("w=", "")],
)  # fmt: skip
def test_values_are_toml_or_else_strings(text: str, value: object) -> None:
    assert parse_setting(text)[1] == value


def test_a_value_without_a_key_is_refused() -> None:
    with pytest.raises(RecipeError, match="must be key=value"):
        parse_setting("steps")


# ----------------------------------------------------------------------------------- kinds, doctor, chat


def test_kinds_lists_all_and_documents_each(call: Call) -> None:
    out = call("kinds")[1]
    assert all(name in out for name in KINDS)
    assert {entry["kind"] for entry in json.loads(call("kinds", "--json")[1])} == set(KINDS)
    for name, kind in KINDS.items():
        code, out, _ = call("kinds", name)
        assert code == 0
        assert all(
            f"\n  {word}" in out for word in [*kind.reads, *kind.writes, *kind.settings_class().model_fields]
        )
    out = call("kinds", "test.write")[1]
    assert "times = 3  int, >= 0\n      lines written" in out
    schema = json.loads(call("kinds", "test.write", "--json")[1])["settings"]
    assert schema["properties"]["times"]["minimum"] == 0
    assert "did you mean 'test.write'?" in call("kinds", "test.wirte")[2]


def test_doctor_says_what_is_missing_what_for_and_how_to_get_it(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.metadata.version

    def version(package: str) -> str:
        if package in ("gguf", "peft"):
            raise doctor.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "_ASK_TORCH", "raise SystemExit(1)")
    code, out, _ = call("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(out)}
    assert code == 1, "gguf is needed"
    assert found["gguf"] == {"name": "gguf", "found": "", "needed": True, "purpose": "writing GGUF files",
                             "remedy": "pip install samovar -c constraints.txt"}  # fmt: skip
    assert not found["peft"]["needed"] and found["python"]["found"] == sys.version.split()[0]
    assert found["gpu"]["found"] == "" and found["cores"]["found"]
    code, out, _ = call("doctor")
    assert code == 1 and "✗" in out and "missing" in out and "pip install" in out


def test_doctor_asks_torch_about_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, found in (
        ({"cuda": "12.8", "mps": False, "gpus": [["NVIDIA T4", 16_000_000_000]]},
         "NVIDIA T4 (16.0 GB); torch is built for 12.8"),
        ({"cuda": None, "mps": True, "gpus": []}, "Apple GPU through Metal"),
        ({"cuda": "12.8", "mps": False, "gpus": []}, ""),
    ):  # fmt: skip
        monkeypatch.setattr(doctor, "_ASK_TORCH", f"print('noise'); print({json.dumps(said)!r})")
        assert doctor._gpu().found == found


def test_chat_is_handed_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import serving.chat

    seen = []
    monkeypatch.setattr(serving.chat, "main", lambda bundle, prompt: seen.append((bundle, prompt)) or 0)
    assert call("chat", "b", "--prompt", "чай?")[0] == 0
    assert call("chat", "b")[0] == 0
    assert seen == [(Path("b"), "чай?"), (Path("b"), None)]


# -------------------------------------------------------------------------------------------- what is seen


def progress(step: int, ts: float, unit: str = "step", **figures: float) -> dict:
    return {"stage": "a", "kind": "progress", "ts": ts, "step": step, "total": 100, "unit": unit,
            "figures": figures}  # fmt: skip


def test_the_live_screen_shows_stage_step_loss_speed_and_time_left() -> None:
    target = io.StringIO()
    screen = LiveScreen(Console(file=target, force_terminal=True, width=120, color_system=None))
    screen.plan([])
    screen.event({"stage": "a", "kind": "stage_started", "what": "run", "ts": 0.0})
    screen.event(progress(10, 0.0, loss=2.5, tokens_per_second=13012.0))
    screen.event(progress(20, 10.0, loss=2.31456, tokens_per_second=13012.4))
    screen.close()
    for part in ("a ", "step 20/100", "loss 2.315", "tokens/s 13,012", "0:01:20 left"):
        assert part in target.getvalue(), part


def test_the_plain_screen_does_not_chatter() -> None:
    target = io.StringIO()
    screen = PlainScreen(Console(file=target, width=120))
    for step in range(100):
        screen.event(progress(step, float(step), loss=1.0))
    assert target.getvalue() == "  a: step 0 of 100, loss 1\n"


def test_names_from_outside_are_not_taken_for_markup() -> None:
    target = io.StringIO()
    screen = PlainScreen(Console(file=target, width=120))
    screen.event({"stage": "a", "kind": "note", "text": "[bold]x[/nonsense]"})
    screen.event({"stage": "a", "kind": "stage_failed", "message": "[/red] is no colour"})
    assert "[bold]x[/nonsense]" in target.getvalue() and "[/red] is no colour" in target.getvalue()
    table = {"title": "[/x]", "columns": ["[/a]"], "rows": [["[/b]"], [None]], "notes": ["[/c]"]}
    answer = {"prompt": "[/d]", "text": "[/e]"}
    Console(file=target, width=120).print(comparison(table | {"answer": answer}))
    assert all(f"[/{letter}]" in target.getvalue() for letter in "xabcde")


def test_time_left_starts_anew_with_a_new_unit_and_after_a_resume() -> None:
    pace = Pace()
    assert pace.seconds_left("a") is None
    pace.see(progress(50, 0.0))
    assert pace.seconds_left("a") is None, "one sight is no speed"
    pace.see(progress(60, 20.0))
    assert pace.seconds_left("a") == pytest.approx(80)
    pace.see(progress(1, 30.0, unit="file"))
    assert pace.seconds_left("a") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (6_000_000_000, "6.0 GB")]
)
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


def test_numbers_in_tables() -> None:
    assert [cell(value) for value in (None, 12345, 0.12345, "x", True)] == ["-", "12,345", "0.123", "x", "True"]
    assert figures_text(
        {"loss": 0.00012346, "tokens_per_second": 13012.3, "rows": 12000, "loss_is": "nan"}
    ) == (", loss 0.0001235, tokens/s 13,012, rows 12,000, loss is nan")


def test_a_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert log_tail(log) == ""
    log.write_bytes(b"old\n" + b"\xff torn\n" + b"x" * 50_000 + b"\nnew\n")
    assert log_tail(log, count=1) == "    new"
    assert len(log_tail(log)) < 21_000
    assert log_tail(log, start=log.stat().st_size - 4) == "    new"


def test_no_thread_is_left_behind(call: Call) -> None:
    call("run", "tea.toml")
    names = {thread.name for thread in threading.enumerate()}
    assert "heartbeat" not in names


# ------------------------------------------------------------------------------- what must not break it


def test_verify_misses_what_was_deleted_and_goes_on_after_a_bad_one(call: Call) -> None:
    call("run", "tea.toml")
    shutil.rmtree("runs/tea/j")
    Path("runs/tea/a/manifest.json").write_text("{}")
    code, out, _ = call("verify", "runs/tea")
    assert code == 1
    assert "a: " in out and "manifest.json can not be used" in out
    assert "j: not there" in out and "s: as it was written" in out
    Path("runs/tea/a/manifest.json").unlink()
    Path("runs/tea/recipe.toml").unlink()
    code, out, _ = call("verify", "runs/tea", "--json")
    assert code == 1 and json.loads(out)["a"] == ["not finished: it has no manifest"]


PROGRAM = """
import sys, stages_for_tests
from samovar import cli
from samovar.stages import KINDS
KINDS.update(stages_for_tests.KINDS)
cli.main()
"""


def test_a_reader_that_leaves_ends_no_run() -> None:
    command = [sys.executable, "-c", PROGRAM, "run", "tea.toml"]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(Path("runs/tea/status.json").read_text())["state"] == "finished"


def test_a_screen_without_the_glyphs_ends_no_run() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PROGRAM, "run", "tea.toml"]
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (ended.returncode, ended.stderr) == (0, "") and "? a done" in ended.stdout


@pytest.mark.parametrize("error", [SystemExit(1), UnicodeEncodeError("ascii", "x", 0, 1, "y"), KeyError("a")])
def test_a_screen_that_fails_is_replaced_by_silence(error: BaseException) -> None:
    class Failing(NoScreen):
        calls = 0

        def event(self, event: dict) -> None:
            self.calls += 1
            raise error

    failing = Failing()
    assert run_alone("test.write", {}, {}, Path("o"), failing).figures["lines"] == 3
    assert failing.calls == 1


def test_a_defect_in_a_stage_alone_is_a_line_and_a_kept_traceback(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = call("stage", "test.write", "--out", "o", "--set", "ends=defect")
    assert code == 1 and "this is a defect: ZeroDivisionError: one over nothing" in err
    assert "Traceback" not in err
    (kept,) = tmp_path.glob("samovar-*.txt")
    assert str(kept) in err and "Traceback" in kept.read_text()


def test_a_stage_alone_that_was_stopped_exits_130(call: Call) -> None:
    assert call("stage", "test.write", "--out", "o", "--set", "ends=stop")[0] == 130


@pytest.mark.parametrize(
    "text", ["[1]", '{"state": []}', '{"stages": 7}', '{"stages": {"a": 1}}', '{"started": "x"}', '"x"',
             '{"stages": {"a": {"state": "x", "step": 1}}}'],
)  # fmt: skip
def test_an_odd_status_is_unreadable_and_hides_no_other_run(call: Call, text: str) -> None:
    call("run", "tea.toml")
    Path("runs/odd").mkdir()
    Path("runs/odd/status.json").write_text(text)
    code, out, _ = call("runs", "runs", "--json")
    assert code == 0 and {"runs/odd", "runs/tea"} == {row["run"] for row in json.loads(out)}
    code, out, err = call("status", "runs/odd")
    assert "Traceback" not in err and "defect" not in err
    assert code == 0 or "unreadable" in err


def test_a_folder_that_may_not_be_read_is_a_row(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    call("run", "tea.toml")
    shutil.copytree("runs/tea", "runs/shut")
    real = RunDirectory.exists

    def exists(run: RunDirectory) -> bool:
        if run.path.name == "shut":
            raise PermissionError(13, "Permission denied", str(run.path))
        return real(run)

    monkeypatch.setattr(RunDirectory, "exists", exists)
    rows = {row["run"]: row["state"] for row in json.loads(call("runs", "--json")[1])}
    assert rows == {"runs/tea": "finished", "runs/shut": "unreadable"}
    code, _, err = call("status", "runs/shut")
    assert code == 1 and "this user may not access runs/shut" in err


@pytest.mark.parametrize("command", [["run", "tea.toml", "--out"], ["run", "tea.toml", "--dry", "--out"],
                                     ["stage", "test.write", "--out"], ["verify"]])  # fmt: skip
def test_a_path_below_a_file_is_refused(call: Call, command: list[str]) -> None:
    code, _, err = call(*command, "tea.toml/x")
    assert "defect" not in err and "Traceback" not in err
    assert code == (0 if "--dry" in command else 1)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, "0x" + "f" * 5000])
def test_numbers_and_brackets_beyond_python_are_refused(call: Call, value: str) -> None:
    code, _, err = call("stage", "test.write", "--out", "o", "--set", f"times={value}")
    assert code == 1 and "times" in err and "defect" not in err
    for text in (RECIPE.replace("times = 5", f"times = {value}"), f"seed = {value}\n" + RECIPE,
                 "a" + ".a" * 5000 + " = 1\n" + RECIPE):  # fmt: skip
        Path("tea.toml").write_text(text)
        code, _, err = call("check", "tea.toml")
        assert code == 1 and "tea.toml" in err and "defect" not in err


def test_check_tells_missing_inputs_beside_all_other_faults(call: Call) -> None:
    inputs = '[inputs]\nleaf = "leaf.txt"\nwater = "w/*.txt"\nbase = "owner/name"\n'
    Path("tea.toml").write_text(RECIPE.replace("[[stage]]", inputs + "[[stage]]", 1))
    code, _, err = call("check", "tea.toml")
    assert code == 1 and "'leaf.txt' is not there" in err and "no file matches 'w/*.txt'" in err
    assert "owner/name" not in err, "a model of the hub is fetched when a run starts"
    Path("tea.toml").write_text(Path("tea.toml").read_text().replace("times = 5", "tmies = 5"))
    code, out, err = call("check", "tea.toml", "--json")
    assert code == 1 and "tmies" in err and "'leaf.txt' is not there" in err
    assert "tmies" in json.loads(out)["error"]


def test_a_refusal_before_the_start_leaves_the_last_status(call: Call) -> None:
    Path("leaf.txt").write_text("leaf")
    text = RECIPE.replace("[[stage]]", '[inputs]\nleaf = "leaf.txt"\n[[stage]]', 1)
    Path("tea.toml").write_text(text.replace("times = 5", 'reads = { before = "leaf" }'))
    call("run", "tea.toml")
    before = Path("runs/tea/status.json").read_bytes()
    Path("leaf.txt").unlink()
    code, out, err = call("run", "tea.toml", "--json")
    assert code == 1 and "is not there" in err
    assert json.loads(out).keys() == {"error", "hint"} and "is not there" in json.loads(out)["error"]
    assert Path("runs/tea/status.json").read_bytes() == before

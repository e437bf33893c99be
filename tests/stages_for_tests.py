"""Tiny stages that the tests of the spine run in real workers.

`KINDS` is a stage table of its own; workers find this module through PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from foundation.errors import InputError, StopRequested
from foundation.report import Report
from foundation.settings import StageSettings
from samovar.stages import Kind


class WriteSettings(StageSettings):
    """A stage that writes the same word several times, resumably."""

    word: str = Field("tea", description="what is written")
    times: int = Field(3, ge=0, description="lines written")
    step_seconds: float = Field(
        0.0, ge=0, description="time a line takes, in seconds", json_schema_extra={"fingerprint": False}
    )
    fails_at: int | None = Field(None, description="the line at which it ends as `ends` says; the last one")
    ends: str = Field(
        "well", description="how it ends: well, stop, orphan, refusal, defect, exit, oom, full, mute"
    )


def write(settings: WriteSettings, inputs: Any, out: Path, report: Report) -> dict[str, Any]:
    """One line a step into text.txt; the lines so far live in .work, so that a kill loses none."""
    work = out / ".work"
    work.mkdir(exist_ok=True)
    lines = [f"{settings.seed}: {settings.word}"] * settings.times
    done = len(list(work.iterdir()))
    print(f"starting at {done}", flush=True)
    for number in range(done, settings.times):
        time.sleep(settings.step_seconds)
        (work / f"{number:06}").touch()
        report.progress(number + 1, settings.times, "line", loss=1.0 / (number + 1))
        if report.stop_requested():
            raise StopRequested("stopped as asked")
        if number + 1 == settings.fails_at:
            break
    end(settings.ends)
    if settings.ends != "mute":
        (out / "text.txt").write_text("\n".join(lines) + "\n")
    return {"lines": settings.times, "resumed_at": done}


def end(how: str) -> None:
    match how:
        case "stop":
            raise StopRequested("stopped of its own accord")
        case "orphan":
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        case "refusal":
            raise InputError("this tea is cold", hint="heat it")
        case "defect":
            raise ZeroDivisionError("one over nothing")
        case "exit":
            print("the last words", flush=True)
            os._exit(7)
        case "oom":
            os.kill(os.getpid(), 9)
        case "full":
            raise OSError(28, "No space left on device", "model.safetensors")


class JoinSettings(StageSettings):
    separator: str = Field("", description="put between texts")
    only_first_letter: bool = Field(False, description="keep the first letter of each text")


def join(settings: JoinSettings, inputs: Any, out: Path, report: Report) -> dict[str, Any]:
    """All texts that it reads, joined, into a folder."""
    texts = [path.read_text() for path in inputs["texts"]]
    if settings.only_first_letter:
        texts = [text[text.index(":") + 2] for text in texts]
    (out / "joined").mkdir(exist_ok=True)
    (out / "joined" / "text.txt").write_text(settings.separator.join(texts))
    report.note(f"joined {len(texts)}")
    return {}


class ShoutSettings(StageSettings):
    pass


def shout(settings: ShoutSettings, inputs: Any, out: Path, report: Report, exclaim: Any) -> dict[str, Any]:
    text = (inputs["joined"] / "text.txt").read_text()
    table = {"title": "tea", "columns": ["what", "value"], "rows": [[exclaim(text), 1.5]], "notes": ["hot"]}
    (out / "table.json").write_text(json.dumps(table))
    return {}


def exclaim(text: str) -> str:
    return text.strip().upper() + "!"


class PourSettings(StageSettings):
    cups: tuple[str, ...] = Field(("large",), description="which cups are filled")


def pour(settings: PourSettings, inputs: Any, out: Path, report: Report) -> dict[str, Any]:
    for cup in settings.cups:
        (out / f"{cup}.txt").write_text(cup)
    return {}


def poured(settings: PourSettings) -> tuple[str, ...]:
    return settings.cups


KINDS = {
    "test.pour": Kind(
        about="fill some cups",
        settings="stages_for_tests:PourSettings",
        run="stages_for_tests:pour",
        writes={"small": "small.txt", "large": "large.txt"},
        chooses="stages_for_tests:poured",
    ),
    "test.write": Kind(
        about="write words",
        settings="stages_for_tests:WriteSettings",
        run="stages_for_tests:write",
        writes={"text": "text.txt"},
        reads={"before": "optional"},
    ),
    "test.join": Kind(
        about="join texts",
        settings="stages_for_tests:JoinSettings",
        run="stages_for_tests:join",
        writes={"joined": "joined", "file": "joined/text.txt"},
        reads={"texts": "many"},
    ),
    "test.shout": Kind(
        about="shout",
        settings="stages_for_tests:ShoutSettings",
        run="stages_for_tests:shout",
        writes={"table": "table.json"},
        reads={"joined": "one"},
        handed={"exclaim": "stages_for_tests:exclaim"},
    ),
}


def main(recipe: str, folder: str) -> None:
    """`python stages_for_tests.py RECIPE FOLDER`: a run of these kinds in a process that tests can kill."""
    from foundation.errors import SamovarError
    from samovar.recipe import load
    from samovar.run import run

    try:
        outcome = run(load(Path(recipe), kinds=KINDS), Path(folder), kinds=KINDS)
    except SamovarError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    print(outcome.state, outcome.message, sep="\n")
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])

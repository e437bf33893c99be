"""The command line: `samovar COMMAND`. Each command imports what it needs, so that --help is quick.

Exit codes: 0 done; 1 a refusal or a failed stage (message and hint on stderr); 2 the command was typed
wrongly; 130 stopped as asked, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import RecipeError, RunError, SamovarError, StopRequested
from samovar import bundle, store

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from foundation.rundir import RunDirectory
    from samovar.screen import Screen

app = typer.Typer(
    name="samovar",
    help="Make small language models out of large ones, and run them at home.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 typed wrongly, 130 stopped as asked.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(store.app, name="store")
app.add_typer(bundle.app, name="bundle")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (.toml).")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as runs/NAME.")]
Short = Annotated[bool, typer.Option("--short", help="The same stages, smaller: applies the recipe's [short].")]


def main() -> None:
    """Entry point: refusals are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a glyph that the terminal lacks is no reason to fail
    try:
        app()
    except StopRequested as stop:
        _refuse(stop.message, stop.hint)
        sys.exit(130)
    except SamovarError as error:
        _refuse(error.message, error.hint)
    except Exception as error:
        from foundation.files import disk_trouble

        trouble = disk_trouble(error, Path.cwd())
        _refuse(trouble.message, trouble.hint) if trouble else _own_up(error)
    sys.exit(1)


@app.command()
def run(
    recipe: RecipeFile,
    dry: Annotated[bool, typer.Option("--dry", help="Show the plan and stop.")] = False,
    short: Short = False,
    out: Annotated[Path | None, typer.Option(help="Run directory.  [default: runs/NAME]")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, from wherever an earlier run of it left off."""
    from samovar.recipe import load
    from samovar.run import make_planner
    from samovar.run import run as start
    from samovar.show import plan_json, plan_table

    checked = load(recipe, short=short)
    folder = out or Path("runs") / checked.run_name
    if dry:
        steps = make_planner(checked, folder.absolute(), download=False).plan()
        _print(plan_json(steps)) if as_json else _show(plan_table(steps))
        return
    outcome = start(checked, folder, screen=_screen(as_json))
    if as_json:
        about = {"run": str(folder), "state": outcome.state, "message": outcome.message, "hint": outcome.hint}
        _print(about | {"stages": plan_json(outcome.steps)})
    elif outcome.exit_code:
        typer.echo(f"samovar: {outcome.message}" + (f"\n  -> {outcome.hint}" if outcome.hint else ""), err=True)
    else:
        _show_comparison(folder, [step.stage.name for step in outcome.steps])
        _say(f"finished: {folder}")
    raise typer.Exit(outcome.exit_code)


@app.command()
def check(recipe: RecipeFile, as_json: AsJson = False) -> None:
    """Check a recipe: every fault at once, and nothing is run."""
    from samovar.inputs import missing_inputs
    from samovar.recipe import load, stated_inputs

    try:
        checked = load(recipe)
    except RecipeError as error:
        missing = missing_inputs(stated_inputs(recipe), recipe.parent)
        raise RecipeError(error.problems + missing, hint=error.hint) from error
    if missing := missing_inputs(checked.inputs, recipe.parent):
        raise RecipeError(missing, hint="relative paths start at the recipe's folder")
    if as_json:
        stages = [{"name": s.name, "kind": s.kind, "settings": s.settings.model_dump()} for s in checked.stages]
        _print({"name": checked.name, "inputs": checked.inputs, "stages": stages})
    else:
        typer.echo(f"{recipe}: fine, {len(checked.stages)} stages")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def stage(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="As listed by `samovar kinds`.")],
    out: Annotated[Path, typer.Option(help="Folder for what the stage writes.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one stage alone: samovar stage export.gguf --model DIR --out DIR.

    Each role that the kind reads is an option of its name; repeat it where the role takes many.
    """
    from samovar.alone import parse_setting, run_alone

    values = dict(parse_setting(text) for text in settings or [])
    manifest = run_alone(kind, _roles(context.args), values, out, _screen(as_json))
    if as_json:
        _print(manifest.to_json())
    else:
        _say(f"{out}: {len(manifest.files)} files, digest {manifest.digest[:12]}")


@app.command()
def kinds(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="One kind, in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the kinds of stages, or what one reads, writes and can be set to."""
    from samovar.alone import find_kind
    from samovar.pages import kind_json, kind_page
    from samovar.show import rows
    from samovar.stages import KINDS

    if kind is not None:
        found = find_kind(kind)
        _print(kind_json(kind, found)) if as_json else _show(kind_page(kind, found))
    elif as_json:
        _print([{"kind": name, "about": found.about} for name, found in KINDS.items()])
    else:
        _show(rows(("kind", "what it does"), [(name, found.about) for name, found in KINDS.items()]))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where run directories lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from samovar.pages import run_summary
    from samovar.show import rows

    found = [summary for path in sorted(folder.glob("*/")) if (summary := run_summary(path))]
    if as_json:
        _print(found)
    elif found:
        columns = ("run", "state", "stages", "now", "started")
        _show(rows(columns, [[summary[column] for column in columns] for summary in found]))
    else:
        typer.echo(f"no runs in {folder}")


@app.command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Tell the state of a run from what lies in its directory."""
    from samovar.pages import status_json, status_page

    directory = _run_directory(run)
    _print(status_json(directory)) if as_json else _show(status_page(directory))


@app.command()
def stop(run: RunFolder) -> None:
    """Ask a run to stop; its work is kept, and the same command goes on."""
    _request(run, "stop")
    typer.echo(f"{run}: asked to stop; see samovar status {run}")


@app.command()
def checkpoint(run: RunFolder) -> None:
    """Ask a run to save its training now, and go on."""
    _request(run, "checkpoint")
    typer.echo(f"{run}: asked for a checkpoint")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one stage's folder.")],
    as_json: AsJson = False,
) -> None:
    """Compare every stage with its manifest; names what is altered, missing, extra or not finished."""
    from samovar.verify import verify as examine

    found = examine(run)
    if as_json:
        _print(found)
    else:
        for name, problems in found.items():
            _say("\n".join(f"{name}: {problem}" for problem in problems or ["as it was written"]))
    raise typer.Exit(1 if any(found.values()) else 0)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, a stage's, or a hub id.")],
    quant: Annotated[str, typer.Option(metavar="TYPES", help="File types, by comma.")] = "Q8_0,Q4_K_M",
    out: Annotated[Path | None, typer.Option(help="Run directory.  [default: runs/export-NAME]")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help='Text to measure on: files, folders, "patterns"; may be repeated.'),
    ] = None,
    imatrix: Annotated[bool, typer.Option("--imatrix", help="Quantise by what matters to --text.")] = False,
    license: Annotated[str, typer.Option(metavar="SPDX", help="Licence of the weights.")] = "",
    dry: Annotated[bool, typer.Option("--dry", help="Show the recipe and the plan, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a bundle of GGUF files out of a model, verified, without a recipe."""
    from samovar.export import main as start

    code = start(
        model,
        quant,
        out=out,
        name=name,
        texts=text or [],
        imatrix=imatrix,
        license=license,
        dry=dry,
        as_json=as_json,
    )
    raise typer.Exit(code)


@app.command()
def chat(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
) -> None:
    """Talk to an exported model, offline."""
    from serving.chat import main as talk

    talk(bundle, prompt)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: what is there, what is missing, what for, and how to get it."""
    from dataclasses import asdict

    from samovar.doctor import examine
    from samovar.pages import findings_table

    findings = examine(Path.cwd())
    _print([asdict(finding) for finding in findings]) if as_json else _show(findings_table(findings))
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _roles(arguments: list[str]) -> dict[str, list[str]]:
    """["--model", "a", "--corpus=b"] as {"model": ["a"], "corpus": ["b"]}."""
    roles: dict[str, list[str]] = {}
    rest = iter(arguments)
    for argument in rest:
        role, equals, value = argument.partition("=")
        value = value if equals else next(rest, "")
        if not role.startswith("--") or not value:
            raise typer.BadParameter(f"{argument}: roles are given as --ROLE PATH")
        roles.setdefault(role[2:], []).append(value)
    return roles


def _request(run: Path, name: str) -> None:
    """Leave a request in the control folder of a run that is going on; RunError when none is."""
    from foundation.rundir import is_held

    directory = _run_directory(run)
    if not is_held(directory.lock):
        raise RunError(f"nothing runs in {run}", hint=f"samovar status {run}")
    directory.request(name)


def _run_directory(path: Path) -> RunDirectory:
    from foundation.rundir import RunDirectory

    directory = RunDirectory(path)
    if not directory.exists():
        raise RunError(f"{path} is no run directory", hint="`samovar runs` lists those under runs/")
    return directory


def _show_comparison(folder: Path, stages: list[str]) -> None:
    """Print the table of the last stage that wrote one."""
    from foundation.files import read_json
    from samovar.show import comparison

    for name in reversed(stages):
        table = read_json(folder / name / "table.json")
        if isinstance(table, Mapping):
            _show(comparison(table))
            return


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _screen(as_json: bool) -> Screen:
    """Bars on a terminal, lines elsewhere, nothing beside JSON."""
    from samovar.screen import LiveScreen, NoScreen, PlainScreen

    console = _console()
    return NoScreen() if as_json else LiveScreen(console) if console.is_terminal else PlainScreen(console)


def _show(thing: RenderableType) -> None:
    with _heard():
        _console().print(thing)


def _print(value: Any) -> None:
    _say(json.dumps(value, ensure_ascii=False, indent=1, default=str))


def _say(text: str) -> None:
    with _heard():
        typer.echo(text)


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Around what is printed: when the reader is gone (`| head -1`), nothing but the printing ends.

    rich raises SystemExit for that.
    """
    try:
        yield
    except (BrokenPipeError, SystemExit):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end


def _refuse(message: str, hint: str) -> None:
    """Say a refusal: to people always, and as JSON where that was asked for."""
    if "--json" in sys.argv[1:]:
        _print({"error": message, "hint": hint})
    typer.echo(f"samovar: {message}" + (f"\n  -> {hint}" if hint else ""), err=True)


def _own_up(error: Exception) -> None:
    """Say in a line that this is our fault, and keep the traceback for whoever mends it."""
    import tempfile
    import traceback

    last = traceback.format_exception_only(error)[-1].strip()
    with tempfile.NamedTemporaryFile("w", prefix="samovar-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    _refuse(f"this is a defect: {last}", f"please report it; the traceback is in {file.name}")


if __name__ == "__main__":
    main()

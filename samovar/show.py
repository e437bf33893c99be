"""Tables, numbers and lines for people. Builds rich objects and text; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from samovar.plan import Action, Step

_STYLE = {
    Action.REUSE: "green",
    Action.RESUME: "cyan",
    Action.RUN: "bold",
    Action.STALE: "yellow",
    Action.WAIT: "dim",
    Action.ALTERED: "red",
}


def plan_table(steps: Iterable[Step]) -> Table:
    """The plan, one row a stage, with the reason beside what will be done."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "kind", "plan", "why"):
        table.add_column(column, header_style="dim", overflow="fold")
    for step in steps:
        style = _STYLE[step.action]
        plan = f"[{style}]{step.action}[/]"
        table.add_row(escape(step.stage.name), f"[dim]{step.stage.kind}[/]", plan, escape(step.why))
    return table


def plan_json(steps: Iterable[Step]) -> list[dict[str, Any]]:
    return [
        {"stage": step.stage.name, "kind": step.stage.kind, "action": step.action, "why": step.why}
        for step in steps
    ]


def comparison(table: Mapping[str, Any]) -> RenderableType:
    """The table.json of evaluation.compare: title, columns, rows, notes, and one answer."""
    shown = Table(title=escape(str(table.get("title", ""))), title_justify="left", header_style="bold")
    columns = [str(column) for column in table.get("columns", [])]
    for number, column in enumerate(columns):
        shown.add_column(escape(column), justify="right" if number else "left")
    for row in table.get("rows", []):
        shown.add_row(*(escape(cell(value)) for value in row))
    parts: list[RenderableType] = [shown]
    parts += [f"[dim]{escape(str(note))}[/]" for note in table.get("notes", [])]
    if answer := table.get("answer"):
        parts += ["", f"[bold]>[/] {escape(str(answer['prompt']))}", escape(str(answer["text"]))]
    return Group(*parts)


def rows(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> Table:
    """A plain table without borders."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*(escape(cell(value)) for value in line))
    return table


def cell(value: Any) -> str:
    """A value as a table shows it: '-' for what is not known, three decimals for a fraction."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def duration(seconds: float) -> str:
    """7 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count_bytes: int) -> str:
    """1.4 GB: decimal units, as disks are sold."""
    value, units = float(count_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def log_tail(log: Path, start: int = 0, count: int = 15) -> str:
    """The last lines of a log, from byte `start` on, indented; empty where there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 20_000))
            lines = file.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines)

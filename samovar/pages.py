"""What the commands that only look print: a run's status, a kind, a machine. Reads, and changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from foundation.errors import RunError
from foundation.files import read_json
from foundation.rundir import RunDirectory
from foundation.runstate import State, state_of
from samovar.doctor import Finding
from samovar.show import duration, log_tail, rows
from samovar.stages import Kind

# JSON schema's word for a bound, and the sign it is shown as
_BOUNDS = {
    "minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<",
    "minLength": "length >=", "minItems": "items >=", "maxItems": "items <=", "pattern": "matches",
}  # fmt: skip


# What reading a status.json that something else wrote can raise.
_ODD = (TypeError, ValueError, KeyError, AttributeError, OverflowError, OSError)


def run_summary(path: Path) -> dict[str, Any] | None:
    """One line of `samovar runs`; None for a folder that is no run's. Never raises for what lies there."""
    try:
        run = RunDirectory(path)
        return _summary(run) if run.exists() else None
    except _ODD:
        return {"run": str(path), "state": "unreadable", "stages": None, "now": None, "started": None}


def _summary(run: RunDirectory) -> dict[str, Any]:
    said = _said(run)
    stages = said.get("stages", {})
    done = sum(entry["state"] in ("finished", "reused") for entry in stages.values())
    started = said.get("started")
    return {
        "run": str(run.path),
        "state": str(state_of(run)),
        "stages": f"{done} of {len(stages)}",
        "now": ", ".join(said.get("stage", [])),
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else None,
    }


def status_json(run: RunDirectory) -> dict[str, Any]:
    """status.json, with the state that the evidence proves in place of the one it claims.

    Raises RunError when status.json is none of ours.
    """
    try:
        return _said(run) | {"state": state_of(run), "run": str(run.path)}
    except _ODD as error:
        raise _unreadable(run) from error


def _said(run: RunDirectory) -> dict[str, Any]:
    said = read_json(run.status)
    if not isinstance(said, dict | None):
        raise TypeError(f"{run.status} holds no object")
    return said or {}


def _unreadable(run: RunDirectory) -> RunError:
    hint = "the next run in this directory writes it anew"
    return RunError(f"{run.path} is unreadable: its status.json is not what a run writes", hint=hint)


def status_page(run: RunDirectory) -> RenderableType:
    """The state of a run, of each stage, and what a person should read next. Raises RunError as above."""
    try:
        return _status_page(run)
    except _ODD as error:
        raise _unreadable(run) from error


def _status_page(run: RunDirectory) -> RenderableType:
    said = status_json(run)
    state, message = said["state"], said.get("message", "")
    parts: list[RenderableType] = [escape(f"{run.path}: {state}{': ' if message else ''}{message}")]
    if hint := said.get("hint"):
        parts.append(escape(f"  -> {hint}"))
    lines = []
    for name, entry in said.get("stages", {}).items():
        count = f"{entry['unit']} {entry['step']:,} of {entry['total']:,}" if "step" in entry else ""
        seconds = entry.get("seconds")
        lines.append((name, entry["state"], count, "" if seconds is None else duration(seconds)))
    parts.append(rows(("stage", "state", "progress", "time"), lines))
    if state == State.CRASHED:
        parts.append("it ended without a word; the same command goes on from here. The log ends with:")
        parts.append(escape(log_tail(run.log)))
    return Group(*parts)


def kind_json(name: str, kind: Kind) -> dict[str, Any]:
    """All of a kind: roles, and its settings as JSON schema."""
    schema = kind.settings_class().model_json_schema()
    about = {"kind": name, "about": kind.about, "version": kind.version}
    return about | {"reads": dict(kind.reads), "writes": dict(kind.writes), "settings": schema}


def kind_page(name: str, kind: Kind) -> RenderableType:
    """A kind as a page: what it does, reads, writes, and each setting with its bounds and meaning."""
    lines = [f"[bold]{name}[/]: {escape(kind.about)}"]
    lines += ["", "reads"] if kind.reads else []
    lines += [f"  {role:<16}{arity.replace('_', ' ')}" for role, arity in kind.reads.items()]
    lines += ["", "writes"] + [f"  {role:<16}{path}" for role, path in kind.writes.items()]
    lines += ["", "settings"]
    cls = kind.settings_class()
    schema = cls.model_json_schema()["properties"]
    for key, field in cls.model_fields.items():
        bounds = [f"{sign} {schema[key][word]}" for word, sign in _BOUNDS.items() if word in schema[key]]
        default = "" if field.is_required() else f" = {json.dumps(schema[key]['default'], ensure_ascii=False)}"
        typed = ", ".join([_type_name(field), *bounds])
        lines.append(f"  [bold]{key}[/]{escape(default)}  [dim]{escape(typed)}[/]")
        lines.append(f"      {escape(field.description or '')}")
    return "\n".join(lines)


def _type_name(field: Any) -> str:
    annotation = field.annotation
    if get_args(annotation) and get_origin(annotation) is tuple:  # of bounded numbers, each spelt at length
        inner = [arg for arg in get_args(annotation) if arg is not ...]
        return "a list" if len(inner) < len(get_args(annotation)) else f"{len(inner)} numbers"
    named = isinstance(annotation, type) and not get_args(annotation)
    return annotation.__name__ if named else str(annotation).replace("typing.", "")


def findings_table(findings: Iterable[Finding]) -> Table:
    """What doctor found: a word and a glyph, so that no colour is needed to read it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "what", "found", "for, and how to get it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        glyph = "[green]✓[/]" if finding.found else "[red]✗[/]" if finding.needed else "[yellow]-[/]"
        word = finding.found or ("missing" if finding.needed else "not there")
        rest = finding.purpose if finding.found else f"{finding.purpose}\n-> {finding.remedy}"
        table.add_row(glyph, finding.name, escape(word), escape(rest))
    return table

"""One stage without a recipe: `samovar stage KIND --ROLE PATH ... --out DIR --set key=value`.

The same artifact as in a run, finished and resumed in the same way, made in this process.
"""

from __future__ import annotations

import os
import signal
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundation import artifact
from foundation.artifact import Manifest
from foundation.errors import RecipeError, RunError, RunLocked
from foundation.files import DigestCache, writing
from foundation.rundir import RunDirectory, acquire
from samovar.inputs import find_input
from samovar.order import Order
from samovar.plan import altered
from samovar.recipe import check_settings, nearest
from samovar.screen import Careful, Screen
from samovar.stages import KINDS, Kind, counted, is_required, takes_many
from samovar.torchrun import refuse_more_than_gpus
from samovar.worker import execute


class ScreenReport:
    """A Report that goes to the screen. The first Ctrl-C asks to stop, a second one breaks off."""

    def __init__(self, stage: str, screen: Screen) -> None:
        self.stage = stage
        self.screen = screen
        self.stopping = False
        self.tell("stage_started", what="run")

    def tell(self, kind: str, **more: Any) -> None:
        self.screen.event({"stage": self.stage, "kind": kind, "ts": time.time()} | more)

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.tell("progress", step=done, total=total, unit=unit, figures=figures)

    def note(self, text: str) -> None:
        self.tell("note", text=text)

    def checkpoint_requested(self) -> bool:
        return False  # nobody can ask: there is no run directory

    def stop_requested(self) -> bool:
        return self.stopping

    def interrupt(self, number: int, frame: object) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True


def run_alone(
    name: str,
    roles: Mapping[str, Sequence[str]],
    values: Mapping[str, Any],
    out: Path,
    screen: Screen,
    kinds: Mapping[str, Kind] = KINDS,
) -> Manifest:
    """Run the kind `name` on `roles` (role -> paths, patterns or hub ids) and leave its artifact in `out`.

    An artifact of the same fingerprint that is there already is taken as it is. Raises RecipeError with
    every fault of roles and settings, ArtifactError when files of a finished artifact in `out` are gone or
    altered, RunLocked when another process works on `out`, RunError when `out` is no place for it.
    """
    folder = Path(os.path.abspath(out))  # noqa: PTH100 - without "..", and without following links
    kind = find_kind(name, kinds)
    problems = _check_roles(name, kind, roles)
    try:
        settings = check_settings(kind, values)
    except RecipeError as error:
        raise RecipeError(problems + error.problems, hint=f"samovar kinds {name}") from error
    if problems:
        raise RecipeError(problems, hint=f"samovar kinds {name}")
    paths = {role: [p for value in given for p in find_input(value, Path.cwd(), True)]
             for role, given in roles.items()}  # fmt: skip
    if problems := [f"role '{role}' takes one path, and {len(found)} match" for role, found in paths.items()
                    if len(found) > 1 and not takes_many(kind.reads[role])]:  # fmt: skip
        raise RecipeError(problems)
    _refuse_place(folder, [path for found in paths.values() for path in found])
    refuse_more_than_gpus([settings])
    cache = DigestCache()
    digests = {role: [cache.content(path) for path in found] for role, found in paths.items()}
    order = Order(
        stage=folder.name,
        kind=name,
        version=kind.version,
        run=kind.run,
        settings_class=kind.settings,
        settings=counted(settings)[0],
        inputs={role: _arity(kind, role, [str(path) for path in found]) for role, found in paths.items()},
        digests={role: _arity(kind, role, found) for role, found in digests.items()},
        writes=kind.written(settings),
        handed=kind.handed,
        keeps=kind.keeps,
        folder=str(folder),
        uncounted=counted(settings)[1],
        hashed=cache.hashed,
    )
    return _locked(order, folder, Careful(screen))


def find_kind(name: str, kinds: Mapping[str, Kind] = KINDS) -> Kind:
    """The kind of that name. Raises RecipeError with the nearest one."""
    if name not in kinds:
        raise RecipeError([f"unknown kind '{name}'{nearest(name, kinds)}"], hint="samovar kinds")
    return kinds[name]


def parse_setting(text: str) -> tuple[str, Any]:
    """ "steps=200" as ("steps", 200): the value is read as TOML, and as a string where it is none."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError([f"--set {text}: must be key=value"])
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value
    except (ValueError, RecursionError) as error:
        raise RecipeError([f"--set {key.strip()}: too many digits, or nested too deeply"]) from error


def _locked(order: Order, out: Path, screen: Screen) -> Manifest:
    """Run the order while no other process works on `out`; reuse what is there already."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire(out.with_name(f".{out.name}.lock"))
    except RunLocked as error:
        raise RunLocked(f"another process works on {out}", hint="wait for it, or name another --out") from error
    try:
        if others := artifact.kinds_at(out) - {order.kind}:
            made = f"{out} holds what {', '.join(sorted(others))} made; {order.kind} would replace it"
            raise RunError(made, hint="name another --out, or move that away")
        artifact.settle(out)
        manifest = artifact.load(out)
        if manifest:
            _refuse_altered(out, manifest)
            if manifest.identity.fingerprint == order.identity.fingerprint:
                return manifest
        report = ScreenReport(order.stage, screen)
        asked = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, report.interrupt) for number in asked}
        try:
            with writing(out):
                manifest = execute(order, report, lock.handle)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        report.tell("stage_finished", seconds=manifest.seconds, figures=manifest.figures)
        return manifest
    finally:
        lock.release()
        screen.close()


def _refuse_place(folder: Path, inputs: Sequence[Path]) -> None:
    """Raise RunError where `folder`, which is about to be replaced, is or holds something that must stay."""
    hint = "name another --out: a folder of its own for what this stage writes"
    if folder in (here := Path.cwd(), *here.parents):
        raise RunError(f"{folder} is the folder you are in, or one above it", hint=hint)
    for above in folder.parents:
        run = RunDirectory(above)
        if run.lock.is_file() or (run.recipe.is_file() and run.status.is_file()):
            raise RunError(f"{folder} lies in the run directory {above}, which only its run writes", hint=hint)
        if above.exists() and not above.is_dir():
            raise RunError(f"{above} is a file, so there can be no {folder}", hint=hint)
    places = {place.resolve() for place in (folder, artifact.partial_of(folder), artifact.old_of(folder))}
    for path in inputs:
        if places & {path.resolve(), *path.resolve().parents}:
            raise RunError(f"{folder} holds an input of this stage, {path}, and would be replaced", hint=hint)


def _refuse_altered(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError naming what is not there in its size: as in a run, but nothing is hashed again."""
    stated = {folder / path: sha256 for path, (_, sha256) in manifest.files.items()}
    if bad := [why for why in artifact.verify(folder, stated.__getitem__) if not why.startswith("extra")]:
        raise altered([f"{folder.name}: {'; '.join(bad)}"])


def _arity(kind: Kind, role: str, values: list[str]) -> str | list[str]:
    return values if takes_many(kind.reads[role]) else values[0]


def _check_roles(name: str, kind: Kind, roles: Mapping[str, Sequence[str]]) -> list[str]:
    problems = [f"{name} does not read '{role}'{nearest(role, kind.reads)}" for role in roles
                if role not in kind.reads]  # fmt: skip
    for role, arity in kind.reads.items():
        if is_required(arity) and not roles.get(role):
            problems.append(f"{name} must read '{role}': --{role} PATH")
        elif len(roles.get(role, ())) > 1 and not takes_many(arity):
            problems.append(f"{name} takes one '{role}'")
    return problems

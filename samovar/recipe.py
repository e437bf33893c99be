"""A recipe: one TOML file, read top to bottom, is one run.

    name = "small-ru"
    seed = 17                          # of every stage that sets none itself
    jobs = 2                           # stages side by side

    [inputs]
    base = "Qwen/Qwen3-0.6B"           # a hub id (owner/name, owner/name@revision), a folder, a file, or
    corpus = "data/ru/*.jsonl"         # a pattern; relative paths start at the recipe's folder

    [[stage]]
    name = "vocab"
    kind = "adaptation.vocabulary"
    reads = { model = "base", corpus = ["corpus", "world.russian"] }
    add_tokens = 8000                  # all other keys are the kind's settings

    [short.vocab]                      # what `--short` changes: the same stages, smaller
    add_tokens = 200

A recipe is data from anywhere: it names stages from the table and can not name code. `reads` may name
only inputs and stages above, so a circle can not be written. Every fault is reported, not the first one.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.errors import InputError, RecipeError, SamovarError
from foundation.rundir import RESERVED
from foundation.settings import StageSettings
from samovar.stages import KINDS, Kind, is_required, resolve, takes_many

MAX_BYTES = 1 << 20
MAX_STAGES = 500
MAX_INPUTS = 500
MAX_PROBLEMS = 100
SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_STAGE_KEYS = ("name", "kind", "reads")


@dataclass(frozen=True)
class Source:
    """What a role reads: an input of the recipe, or the files that a stage above wrote in `role`."""

    name: str
    role: str | None = None  # None for an input

    def __str__(self) -> str:
        return self.name if self.role is None else f"{self.name}.{self.role}"


@dataclass(frozen=True)
class Stage:
    """One [[stage]], checked: `reads` names what is there, `settings` are whole."""

    name: str
    kind: str
    reads: Mapping[str, tuple[Source, ...]]
    settings: StageSettings

    def stages_read(self) -> set[str]:
        """Names of the stages above that this one reads."""
        return {source.name for sources in self.reads.values() for source in sources if source.role}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `short` tells whether the overrides of [short] were applied."""

    path: Path
    text: str
    name: str
    description: str
    jobs: int
    inputs: Mapping[str, str]
    stages: tuple[Stage, ...]
    short: bool

    @property
    def run_name(self) -> str:
        return f"{self.name}-short" if self.short else self.name


class _Header(BaseModel):
    """The top-level keys, but for the stages, which are checked one by one."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    description: str = ""
    seed: int = Field(17, ge=0, lt=2**31)
    jobs: int = Field(1, ge=1, le=64)
    inputs: dict[str, str] = Field(default_factory=dict, max_length=MAX_INPUTS)
    stage: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_STAGES)
    short: dict[str, dict[str, Any]] = Field(default_factory=dict)


def load(path: Path, *, short: bool = False, kinds: Mapping[str, Kind] = KINDS) -> Recipe:
    """Read and check a recipe. Raises RecipeError with every problem, InputError when it is no text."""
    text = read_text(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([f"{path.name}: not valid TOML: {error}"]) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a thousand brackets
        raise RecipeError([f"{path.name}: {_beyond(error)}"]) from error
    checker = _Checker(path.name, kinds)
    try:
        recipe = checker.check(document, path, text, short)
    except _TooMany:
        recipe = None
    except RecursionError as error:
        raise RecipeError([f"{path.name}: {_beyond(error)}"]) from error
    if recipe is None or checker.problems:
        raise RecipeError(
            checker.problems, hint="`samovar kinds KIND` lists what a kind reads and its settings"
        )
    return recipe


def stated_inputs(path: Path) -> dict[str, object]:
    """The [inputs] of a recipe that `load` refused, as far as they can be read."""
    try:
        inputs = tomllib.loads(read_text(path)).get("inputs")
    except (ValueError, RecursionError):
        return {}
    return inputs if isinstance(inputs, dict) else {}


def read_text(path: Path) -> str:
    """The recipe's text. Raises InputError when it is missing, too large, or not UTF-8 (which line)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path} can not be read: {error.strerror}", hint="name a recipe file (.toml)"
        ) from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES} bytes: that is no recipe")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 (perhaps cp1251)",
            hint="save the recipe as UTF-8, for example: iconv -f cp1251 -t utf-8",
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" when a known name is near, else the known names."""
    known = sorted(known)
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def check_settings(kind: Kind, values: Mapping[str, Any], seed: int | None = None) -> StageSettings:
    """The kind's settings from plain values. Raises RecipeError: one problem for each key at fault.

    Checked as JSON, where a list may become a tuple and a string a path, yet "8" never becomes 8.
    """
    cls = kind.settings_class()
    given = dict(values) if seed is None else {"seed": seed, **values}
    try:
        text = json.dumps(given, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        odd = [key for key, value in given.items() if not _is_json(value)]
        raise RecipeError([f"key '{key}': not a value a setting can have" for key in odd]) from error
    try:
        settings = cls.model_validate_json(text)
    except ValidationError as error:
        raise RecipeError(_problems(error, (*cls.model_fields, *_STAGE_KEYS))) from error
    if (processes := getattr(settings, "processes", 1)) > 1 and not kind.distributed:
        raise RecipeError([f"key 'processes': this kind runs as one process, not {processes}"])
    return settings


class _TooMany(Exception):
    """So many problems that no more are sought: looking for near names takes time."""


class _Checker:
    """Collects problems while it walks through one document."""

    def __init__(self, file: str, kinds: Mapping[str, Kind]) -> None:
        self.file = file
        self.kinds = kinds
        self.problems: list[str] = []
        self.inputs: Mapping[str, str] = {}
        self.names: list[str] = []  # of all stages, in order
        self.above: dict[str, list[str]] = {}  # roles that the stages read so far write; none: a kind at fault

    def say(self, where: str, problem: str) -> None:
        self.problems.append(f"{self.file}, {where}: {problem}" if where else f"{self.file}: {problem}")
        if len(self.problems) == MAX_PROBLEMS:
            self.problems.append(f"{self.file}: and perhaps more; these are the first {MAX_PROBLEMS}")
            raise _TooMany

    def check(self, document: dict[str, Any], path: Path, text: str, short: bool) -> Recipe | None:
        try:
            header = _Header.model_validate(document)
        except ValidationError as error:
            for problem in _problems(error, _Header.model_fields):
                self.say("", problem)
            header = self._salvage(document)
        self._name("", header.name, "a recipe's name")
        for name in header.inputs:
            self._name("[inputs]", name, "an input's name")
        stages = self._stages(header, short)
        return Recipe(
            path, text, header.name, header.description, header.jobs, header.inputs, tuple(stages), short
        )

    def _salvage(self, document: dict[str, Any]) -> _Header:
        """The header's sound parts, so that one fault at the top does not hide those in the stages."""
        sound: dict[str, Any] = {"name": "unnamed", "stage": []}
        for key, value in document.items():
            try:
                sound[key] = _Header.model_validate(sound | {"stage": [{}], key: value}).model_dump()[key]
            except (ValidationError, KeyError):
                continue
        return _Header.model_construct(**sound)

    def _name(self, where: str, name: str, what: str) -> bool:
        if not SAFE_NAME.fullmatch(name):
            self.say(where, f"{what} is lower-case letters, digits, - and _ (64 at most), not {name!r}")
        elif name in RESERVED:
            self.say(where, f"'{name}' is a name the run directory needs itself")
        else:
            return True
        return False

    def _stages(self, header: _Header, short: bool) -> list[Stage]:
        self.inputs = header.inputs
        self.names = [str(entry.get("name")) for entry in header.stage]
        for name in header.short:
            if name not in self.names:
                self.say(f"[short.{name}]", f"no such stage{nearest(name, self.names)}")
        stages = []
        for number, entry in enumerate(header.stage, 1):
            name = self._stage_name(number, entry.get("name"))
            where = f"stage '{name}'"
            kind = self._kind(where, entry)
            roles = list(kind.writes) if kind else []
            if kind is not None:
                reads = self._reads(where, entry.get("reads", {}), kind)
                settings = self._settings(where, name, entry, kind, header, short)
                if settings is not None:
                    stages.append(Stage(name, entry["kind"], reads, settings))
                    self._agrees(where, kind, stages)
                    roles = list(kind.written(settings))
            self.above[name] = roles
        return stages

    def _agrees(self, where: str, kind: Kind, stages: list[Stage]) -> None:
        """Say what the last of `stages` can not do with what it reads."""
        if not kind.agrees:
            return
        made: dict[str, tuple[str, StageSettings] | str] = {**self.inputs}
        made |= {stage.name: (stage.kind, stage.settings) for stage in stages}
        reads = {
            role: [made[s.name] for s in sources if s.name in made]
            for role, sources in stages[-1].reads.items()
        }
        for problem in resolve(kind.agrees)(stages[-1].settings, reads):
            self.say(where, problem)

    def _stage_name(self, number: int, name: Any) -> str:
        """The name, or a number for one that can not be used."""
        if not isinstance(name, str):
            self.say(f"stage {number}", f"key 'name' must be a string, not {name!r}")
            return f"#{number}"
        where = f"stage '{name}'"
        self._name(where, name, "a stage's name")
        if name in self.above:
            self.say(where, "this name was given to a stage above")
        if name in self.inputs:
            self.say(where, "this name is also an input's")
        return name

    def _kind(self, where: str, entry: dict[str, Any]) -> Kind | None:
        name = entry.get("kind")
        if name is None:
            self.say(where, "key 'kind' is missing")
        elif not isinstance(name, str) or name not in self.kinds:
            self.say(where, f"unknown kind {name!r}{nearest(str(name), self.kinds)}")
        else:
            return self.kinds[name]
        return None

    def _settings(
        self, where: str, name: str, entry: dict[str, Any], kind: Kind, header: _Header, short: bool
    ) -> StageSettings | None:
        plain = {key: value for key, value in entry.items() if key not in _STAGE_KEYS}
        settings = self._checked(where, kind, plain, header.seed)
        if (changes := header.short.get(name)) is None or settings is None:
            return settings
        shortened = self._checked(f"[short.{name}]", kind, plain | changes, header.seed)
        return shortened if short else settings

    def _checked(self, where: str, kind: Kind, values: Mapping[str, Any], seed: int) -> StageSettings | None:
        try:
            return check_settings(kind, values, seed)
        except RecipeError as error:
            for problem in error.problems:
                self.say(where, problem)
        except SamovarError as error:
            self.say(where, error.message)
        return None

    def _reads(self, where: str, reads: Any, kind: Kind) -> dict[str, tuple[Source, ...]]:
        if not isinstance(reads, dict):
            self.say(where, "'reads' must be a table: { role = \"input or stage\" }")
            return {}
        for role in reads:
            if role not in kind.reads:
                self.say(where, f"it does not read '{role}'{nearest(role, kind.reads)}")
        found = {}
        for role, arity in kind.reads.items():
            value = reads.get(role)
            if value is None:
                if is_required(arity):
                    self.say(where, f"it must read '{role}': reads = {{ {role} = \"...\" }}")
                continue
            values = value if isinstance(value, list) else [value]
            if isinstance(value, list) and not takes_many(arity):
                self.say(where, f"'{role}' takes one input or stage, not a list")
            elif not values or not all(isinstance(item, str) for item in values):
                self.say(where, f"'{role}' names an input or a stage, or a list of them, not {_shown(value)}")
            else:
                sources = [self._source(f"{where}: '{role}'", item) for item in values]
                found[role] = tuple(source for source in sources if source)
        return found

    def _source(self, where: str, value: str) -> Source | None:
        """What `value`, "input", "stage" or "stage.role", stands for."""
        name, dot, role = value.partition(".")
        if name in self.above:
            roles = self.above[name]
            if not roles:  # its own fault is reported already
                return None
            if not dot or role in roles:
                return Source(name, role or roles[0])
            self.say(where, f"stage '{name}' writes no '{role}'{nearest(role, roles)}")
        elif name in self.inputs:
            if not dot:
                return Source(name)
            self.say(where, f"'{name}' is an input and has no roles, so not '{value}'")
        elif name in self.names:
            self.say(where, f"stage '{name}' does not stand above; what is read must come first")
        else:
            self.say(where, f"no input or stage '{name}'{nearest(name, [*self.inputs, *self.above])}")
        return None


def _beyond(error: Exception) -> str:
    """What Python can not read or write, in words."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _problems(error: ValidationError, known: Iterable[str]) -> list[str]:
    """pydantic's findings in our words, each key named with its path."""
    lines = []
    for fault in error.errors(include_url=False)[:MAX_PROBLEMS]:
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
            lines.append(f"unknown key '{key}'{nearest(key, known)}")
        elif fault["type"] == "missing":
            lines.append(f"key '{key}' is missing")
        else:
            said = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(
                f"key '{key}': {said[:1].lower()}{said[1:]}, not {_shown(fault['input'])}" if key else said
            )
    return lines


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:
        return _beyond(error)
    return text if len(text) <= 60 else text[:57] + "..."

"""What will be asked: records out of a grid, items or seed tasks, checked whole before the first prompt.

A record is what a prompt is about: its fields fill the template, and the validator reads it. Every fault of
template, catalogue, items, seeds and grid is found here and reported at once, with file, line and key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from distill.synthesize import catalogue as exercises
from distill.synthesize import grid, template
from distill.synthesize.asks import seed_of
from distill.synthesize.catalogue import Catalogue, entries_of
from distill.synthesize.template import EXAMPLES, SHIPPED, Template
from distill.synthesize.validators import VALIDATORS, Validator
from foundation.dataio import Message
from foundation.errors import InputError, RecipeError, SamovarError
from foundation.stage import Inputs, many, one

if TYPE_CHECKING:
    from distill.synthesize.stage import Settings

T = TypeVar("T")
Record = dict[str, Any]
Task = dict[str, str]  # fields of a seed task, or of a kept answer that joined the pool
MAX_PROBLEMS = 30
MAPPING = "`fields` maps a placeholder to a key of the records; see docs/synthesis.md"
COMPUTED = ("catalogue", "history", "listed")  # what Catalogue.fields adds to a profile


@dataclass
class Plan:
    """`records`: one a prompt; `held`: those never asked; `seeds`: the pool that {examples} begin with."""

    settings: Settings
    template: Template
    judge: Template | None
    validator: Validator
    catalogue: Catalogue | None
    records: list[Record] = field(default_factory=list)
    held: list[Record] = field(default_factory=list)
    seeds: list[Task] = field(default_factory=list)
    unfit: int = 0  # cells whose profile leaves too few exercises to choose from

    @property
    def joins(self) -> bool:
        """True when a kept answer has the fields of an example, and so becomes one (Self-Instruct)."""
        example = self.template.example
        return example is not None and template.names(example.text) <= set(self.template.shape)

    def fields(self, record: Record, number: int, pool: list[Task]) -> dict[str, str]:
        """The placeholders of prompt `number`, in the template's words; `pool`: answers kept before."""
        needed = {name: text_of(record[name]) for name in self.template.needs()}
        if self.template.example is not None:
            rng = Random(seed_of(self.settings.seed, "examples", number))
            needed[EXAMPLES] = self.template.examples(self._examples(rng, pool))
        return self.template.spelt(needed)

    def _examples(self, rng: Random, pool: list[Task]) -> list[Task]:
        """Self-Instruct, section 2.2: of 8 examples 6 are written by people and 2 by the model."""
        made = rng.sample(pool, min(len(pool), self.settings.few_shot // 4))
        chosen = [*rng.sample(self.seeds, min(len(self.seeds), self.settings.few_shot - len(made))), *made]
        rng.shuffle(chosen)
        return chosen

    def whole(self, record: Record) -> Record:
        """`record` with what the catalogue adds to a profile, drawn by the profile itself."""
        if self.catalogue is None or set(COMPUTED) <= set(record):
            return record
        settings = self.settings
        rng = Random(seed_of(settings.seed, "catalogue", *(f"{k}={record[k]}" for k in sorted(record))))
        return {
            **record,
            **self.catalogue.fields(record, settings.catalogue_entries, settings.past_workouts, rng),
        }

    def held_records(self) -> Iterator[Record]:
        """The held-out records with their prompts; as `items` of another stage they give the same prompts."""
        for record in map(self.whole, self.held):
            fields = {**self.fields(record, 0, [])}
            yield {
                "messages": self.template.ask(fields),
                **{k: v for k, v in record.items() if k != "messages"},
            }

    def seed_pairs(self) -> Iterator[list[Message]]:
        """The seeds as conversations, for the duplicates' index, where they have all that one needs."""
        said = self.template.conversation
        if said and template.names(said.system + said.user + said.assistant) <= set(self.template.shape):
            for task in self.seeds if self.joins else ():
                yield self.template.pair({}, task, "")


@dataclass
class _Faults:
    """Every fault found, and what can be done about each sort of them."""

    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, problems: Iterable[str], hint: str = "") -> None:
        before = len(self.problems)
        self.problems += problems
        if hint and len(self.problems) > before and hint not in self.hints:
            self.hints.append(hint)

    def attempt(self, step: Callable[[], T]) -> T | None:
        """What `step` gives; None when it raised, its fault then being kept."""
        try:
            return step()
        except RecipeError as error:
            self.add(error.problems, error.hint)
        except SamovarError as error:
            self.add([error.message], error.hint)
        return None


def make_plan(settings: Settings, inputs: Inputs) -> Plan:
    """Read and check everything that is asked about. Raises InputError with all faults."""
    faults = _Faults()
    made = faults.attempt(lambda: _template(settings.template, inputs))
    judge = faults.attempt(lambda: _judge(settings))
    catalogue = faults.attempt(
        lambda: exercises.load(one(inputs, "catalogue")) if "catalogue" in inputs else None
    )
    validator = VALIDATORS[settings.validator]
    faults.add(_roles(settings, inputs, validator))
    if made is not None and not faults.problems:
        plan = Plan(settings, made, judge, validator, catalogue)
        faults.attempt(lambda: _fill(plan, inputs, faults))
        if not faults.problems:
            return plan
    problems = faults.problems
    more = f"\nand {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    raise InputError(
        "\n".join(problems[:MAX_PROBLEMS]) + more,
        hint="; ".join(faults.hints),
    )


def _template(name: str, inputs: Inputs) -> Template:
    if bool(name) == ("template" in inputs):
        raise RecipeError(["give `template`, the name of a shipped one, or read a file in role 'template'"])
    return template.parse(SHIPPED / f"{name}.toml" if name else one(inputs, "template"))


def _judge(settings: Settings) -> Template | None:
    if not settings.judge_template:
        return None
    judge = template.parse(SHIPPED / f"{settings.judge_template}.toml")
    score = judge.shape.get("score")
    if judge.needs() != {"question", "answer"} or score is None or score.kind != "integer":
        raise RecipeError(
            [f"judge_template = {settings.judge_template!r} must read question and answer, and give a score"]
        )
    return judge


def _roles(settings: Settings, inputs: Inputs, validator: Validator) -> list[str]:
    """Faults in what goes with what."""
    sources = [name for name, there in (("grid", settings.grid), ("items", "items" in inputs)) if there]
    problems = []
    if len(sources) == 2:
        problems.append("the prompts come from a grid or from items, not from both")
    if not sources and ("seeds" not in inputs or not settings.prompts):
        problems.append(
            "nothing to ask about: give a [grid], read items, or read seeds and say how many prompts"
        )
    if not sources and settings.held_share:
        problems.append("held_share: only cells of a grid and items can be held out")
    if validator.needs_catalogue and "catalogue" not in inputs:
        problems.append(f"validator = {settings.validator!r} needs the role 'catalogue'")
    if ("teacher" in inputs) == bool(settings.base_url):
        problems.append("one teacher: the role 'teacher' (a model folder or a GGUF), or base_url")
    return problems


def _fill(plan: Plan, inputs: Inputs, faults: _Faults) -> None:
    """Read seeds and records into `plan`, and every fault into `faults`."""
    settings, made = plan.settings, plan.template
    if (made.example is not None) != ("seeds" in inputs):
        faults.add(["role 'seeds' and a template with [example] go together"])
    elif made.example is not None:
        needed = template.names(made.example.text)
        if plan.joins and made.conversation:
            needed |= template.names(made.conversation.user + made.conversation.assistant) & set(made.shape)
        for where, raw in _entries(many(inputs, "seeds")):
            record = _mapped(raw, settings.fields)
            faults.add((f"{where}: {fault}" for fault in _missing(record, needed, empty=True)), MAPPING)
            plan.seeds.append({name: text_of(record.get(name)) for name in needed if is_text(record.get(name))})
    if settings.grid:
        if plan.catalogue:
            faults.add(plan.catalogue.problems(settings.grid))
        given = set(settings.grid) | (set(COMPUTED) if plan.catalogue else set())
        wanted = made.needs() | set(plan.validator.needs)
        faults.add(
            f"grid: no axis {name!r}; the template or the validator needs it" for name in sorted(wanted - given)
        )
        faults.add(
            f"grid: the template does not use the axis {name!r}" for name in sorted(set(settings.grid) - wanted)
        )
        for name, values in settings.grid.items():
            for value in values:
                faults.attempt(partial(made.spelt, {name: str(value)}))
        if not faults.problems:
            _walk(plan)
    elif "items" in inputs:
        _read_items(plan, inputs, faults)
    else:
        plan.records = [{} for _ in range(settings.prompts)]
        faults.add(
            f"placeholder {{{n}}} is filled by nothing; only {{examples}} is" for n in sorted(made.needs())
        )
    if not faults.problems and not plan.records:
        faults.add(["no prompt is left to ask: everything is held out, or no profile has a choice"])


def _walk(plan: Plan) -> None:
    """Cells in the seeded order until there are `prompts` to ask; those held out on the way stand aside."""
    settings = plan.settings
    for cell in grid.walk(settings.grid, settings.seed):
        if settings.prompts and len(plan.records) == settings.prompts:
            break
        if plan.catalogue and not plan.catalogue.fits(cell):
            plan.unfit += 1
        elif grid.is_held(cell, settings.held_share, settings.seed):
            plan.held.append(dict(cell))
        else:
            plan.records.append(dict(cell))


def _read_items(plan: Plan, inputs: Inputs, faults: _Faults) -> None:
    settings, validator = plan.settings, plan.validator
    wanted = plan.template.needs()
    for where, raw in _entries(many(inputs, "items")):
        record = _mapped(raw, settings.fields)
        found, hint = _missing(record, wanted, empty=False), MAPPING
        found += [f"no key {name!r}; the validator needs it" for name in validator.needs if name not in record]
        if not found:
            hint = ""
            try:
                plan.template.spelt({name: text_of(record[name]) for name in wanted})
            except RecipeError as error:
                found, hint = [*error.problems], error.hint
            fault = validator.check(record)
            found += [fault] if fault else []
        faults.add((f"{where}: {fault}" for fault in found), hint)
        held = grid.is_held(record, settings.held_share, settings.seed)
        if not held and settings.prompts and len(plan.records) == settings.prompts:
            continue
        (plan.held if held else plan.records).append(record)


def _entries(paths: Iterable[Path]) -> Iterator[tuple[str, Record]]:
    for path in paths:
        yield from entries_of(path)


def _mapped(raw: Record, fields: Mapping[str, str]) -> Record:
    """`raw` with the keys that `fields` names by a path such as "instances.0.input"."""
    return {**raw, **{name: found for name, path in fields.items() if (found := _at(raw, path)) is not None}}


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and len(part) < 6 and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _missing(record: Record, wanted: Iterable[str], *, empty: bool) -> list[str]:
    faults = []
    for name in sorted(wanted):
        if name not in record:
            faults.append(f"no key {name!r}; it has {', '.join(sorted(map(str, record))[:8])}")
        elif not is_text(record[name]):
            faults.append(f"{name} is not text, a number or a list of texts: {str(record[name])[:40]!r}")
        elif not empty and not text_of(record[name]).strip():
            faults.append(f"{name} is empty")
    return faults


def is_text(value: Any) -> bool:
    """True for what `text_of` can write."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def text_of(value: Any) -> str:
    """A field as a template writes it."""
    return ", ".join(value) if isinstance(value, list) else str(value)

"""What a run will do, stage by stage, and why: known before anything starts.

    reuse     the finished artifact has this fingerprint
    resume    an unfinished one has: go on from its checkpoint
    run       there is nothing to use
    stale     there is one, made from something else: it is made anew, and replaced when that is done
    wait      it reads a stage that will run; once that is done its content decides: reuse or not
    altered   its files are not what its manifest says, or not ours: refused, for a rerun deletes them

Fingerprints go by content. So a stage that ran again and wrote the same bytes makes nothing stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from foundation import artifact
from foundation.artifact import Identity, Manifest
from foundation.errors import ArtifactError, InputError, SamovarError
from foundation.files import DigestCache
from samovar.inputs import Inputs
from samovar.recipe import Recipe, Source, Stage
from samovar.stages import KINDS, Kind, counted, takes_many

Paths = Path | tuple[Path, ...]


class Action(StrEnum):
    REUSE = "reuse"
    RESUME = "resume"
    RUN = "run"
    STALE = "stale"
    WAIT = "wait"
    ALTERED = "altered"


@dataclass(frozen=True)
class Step:
    """One stage of the plan. `identity` is None while an input is not known yet."""

    stage: Stage
    action: Action
    why: str
    identity: Identity | None
    manifest: Manifest | None  # of the finished artifact that is there, whatever it was made from

    @property
    def works(self) -> bool:
        """True when a worker has to be started, as far as is known now."""
        return self.action not in (Action.REUSE, Action.ALTERED)


class Planner:
    """Plans the stages of one recipe against one run directory. Changes nothing on disk."""

    def __init__(
        self, recipe: Recipe, folder: Path, inputs: Inputs, cache: DigestCache,
        kinds: Mapping[str, Kind] = KINDS,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.folder = folder
        self.inputs = inputs
        self.cache = cache
        self.kinds = kinds

    def plan(self) -> list[Step]:
        """One step for each stage, in the recipe's order.

        Raises the problems of all inputs at once, so that a long run does not start on a missing file.
        """
        self._find_inputs()
        steps: dict[str, Step] = {}
        for stage in self.recipe.stages:
            steps[stage.name] = self.step(stage, steps, thorough=True)
        return list(steps.values())

    def step(self, stage: Stage, above: Mapping[str, Step], *, thorough: bool = False) -> Step:
        """Plan one stage, given the steps it reads. `thorough` also compares its files with the manifest."""
        kind, folder = self.kinds[stage.kind], self.folder / stage.name
        manifest = artifact.load(folder)
        if manifest and thorough:
            bad = [p for p in artifact.verify(folder, self.cache.sha256) if not p.startswith("extra")]
            if bad:
                return Step(stage, Action.ALTERED, "; ".join(bad), None, manifest)
        waits = sorted(name for name in stage.stages_read() if above[name].action != Action.REUSE)
        identity = self._identity(stage, {} if waits else self._digests(stage, kind, above))
        action, why = self._judge(folder, manifest, identity, waits)
        if thorough and action in (Action.RUN, Action.STALE) and (problem := artifact.foreign(folder)):
            action, why = Action.ALTERED, problem
        return Step(stage, action, why, None if waits else identity, manifest)

    def _identity(self, stage: Stage, digests: Mapping[str, str | list[str]]) -> Identity:
        settings = counted(stage.settings)[0]
        return Identity(stage.kind, self.kinds[stage.kind].version, settings, stage.settings.seed, digests)

    def _judge(
        self, folder: Path, manifest: Manifest | None, identity: Identity, waits: list[str]
    ) -> tuple[Action, str]:
        """What to do and why. While it waits for stages above, the digests in `identity` are missing."""
        if manifest and (why := _differences(manifest.identity, identity, inputs=not waits)):
            return Action.STALE, why
        partial = artifact.partial_fingerprint(folder)
        if waits and (manifest or partial):
            return Action.WAIT, f"known when {', '.join(waits)} is done"
        if waits:
            return Action.RUN, f"after {', '.join(waits)}"
        if manifest:
            return Action.REUSE, ""
        if partial == identity.fingerprint:
            return Action.RESUME, "goes on where it was left"
        return Action.RUN, "an unfinished one was made from something else" if partial else ""

    def paths(self, stage: Stage) -> dict[str, Paths]:
        """Role -> what the stage is given: a path, or a tuple of them where the role takes many."""
        return {
            role: paths if takes_many(arity) else paths[0]
            for role, arity in self.kinds[stage.kind].reads.items()
            if (paths := tuple(p for source in stage.reads.get(role, ()) for p in self._paths(source)))
        }

    def local(self, stage: Stage) -> list[str]:
        """Paths of the recipe's inputs that the stage reads."""
        sources = (source for found in stage.reads.values() for source in found if source.role is None)
        return sorted({str(path) for source in sources for path in self.inputs.paths(source.name)})

    def _paths(self, source: Source) -> tuple[Path, ...]:
        if source.role is None:
            return self.inputs.paths(source.name)
        stage = next(stage for stage in self.recipe.stages if stage.name == source.name)
        return (self.folder / stage.name / self.kinds[stage.kind].writes[source.role],)

    def _digests(self, stage: Stage, kind: Kind, above: Mapping[str, Step]) -> dict[str, str | list[str]]:
        found: dict[str, str | list[str]] = {}
        for role, sources in stage.reads.items():
            digests = [digest for source in sources for digest in self._source_digests(source, above)]
            found[role] = digests if takes_many(kind.reads[role]) else digests[0]
        return found

    def _source_digests(self, source: Source, above: Mapping[str, Step]) -> list[str]:
        if source.role is None:
            return self.inputs.digests(source.name)
        step = above[source.name]
        assert step.manifest is not None, "only reused stages are asked for their digests"
        return [step.manifest.role_digest(self.kinds[step.stage.kind].writes[source.role])]

    def _find_inputs(self) -> None:
        """Find and hash every input that is read. Raises all their problems at once."""
        problems: list[SamovarError] = []
        for stage in self.recipe.stages:
            for role, source in ((r, s) for r, sources in stage.reads.items() for s in sources):
                if source.role is not None:
                    continue
                try:
                    count = len(self.inputs.digests(source.name))
                    if count > 1 and not takes_many(self.kinds[stage.kind].reads[role]):
                        problem = f"'{role}' takes one, and the pattern matches {count}"
                        raise InputError(problem, hint="name one file, or narrow the pattern")
                except SamovarError as error:
                    where = f"stage '{stage.name}', input '{source.name}'"
                    problems.append(type(error)(f"{where}: {error.message}", hint=error.hint))
        if len(problems) > 1:
            hints = "\n     ".join(dict.fromkeys(problem.hint for problem in problems))
            raise InputError("\n".join(problem.message for problem in problems), hint=hints)
        if problems:
            raise problems[0]


def _differences(old: Identity, new: Identity, *, inputs: bool) -> str:
    """What makes an artifact stale, in words; empty when nothing does."""
    if old.kind != new.kind:
        return f"it was made by {old.kind}"
    why = [f"code version {old.version} -> {new.version}"] if old.version != new.version else []
    for key in sorted({*old.settings, *new.settings}):
        before, after = old.settings.get(key), new.settings.get(key)
        if before != after:
            why.append(f"{key} {_shown(before)} -> {_shown(after)}")
    if inputs:
        roles = sorted({*old.inputs, *new.inputs})
        why += [f"input '{role}' changed" for role in roles if old.inputs.get(role) != new.inputs.get(role)]
    return ", ".join(why)


def refuse_altered(steps: Iterable[Step]) -> None:
    """Raise ArtifactError naming every altered file of the plan."""
    if bad := [f"{step.stage.name}: {step.why}" for step in steps if step.action == Action.ALTERED]:
        raise altered(bad)


def altered(stages: Iterable[str]) -> ArtifactError:
    """The refusal of `stages`, each told as "name: what is altered"."""
    return ArtifactError(
        "finished stages are not as they were written:\n  " + "\n  ".join(stages),
        hint="put files back or move foreign ones away, or delete the stage's folder to make it again",
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."

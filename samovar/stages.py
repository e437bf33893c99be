"""The stage table: every kind of stage there is, what it reads, what it writes, and where its code is.

A recipe can name nothing that does not stand here. Code is named by strings, "module:name", and imported
when it is needed: the settings class when a recipe is checked, the function in the worker that runs it.

A new kind is one entry here and one module with `class Settings(StageSettings)` and
`run(settings, inputs, out, report, **handed)`. Raise `version` when a change of code changes the bytes a
stage writes: artifacts of the version before are then stale.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from export.quants.types import QUANTS
from foundation.errors import MissingError
from foundation.settings import StageSettings

Arity = Literal["one", "optional", "many", "optional_many"]


@dataclass(frozen=True)
class Kind:
    """One kind of stage. `writes`: role -> path under the stage's folder; the first role is the one meant
    where a recipe names the stage alone. `handed`: argument -> "module:function" of another room, for a
    stage that needs another's act. `distributed`: it can run as several processes, and has the setting for it.
    `keeps`: what a change of settings does not throw away, see foundation.artifact.begin. `agrees`: a function
    of the settings and of what is read (foundation.stage.Reads) that lists what can not go together, so that a
    recipe is refused before the hours are spent. `chooses`: a function of the settings that names the roles a
    stage with them writes, where it does not write all.
    """

    about: str
    settings: str
    run: str
    writes: Mapping[str, str]
    reads: Mapping[str, Arity] = field(default_factory=dict)
    handed: Mapping[str, str] = field(default_factory=dict)
    version: int = 1
    distributed: bool = False
    keeps: Mapping[str, str] = field(default_factory=dict)
    agrees: str = ""
    chooses: str = ""

    def settings_class(self) -> type[StageSettings]:
        return resolve(self.settings)

    def written(self, settings: StageSettings) -> Mapping[str, str]:
        """The roles that a stage with these settings writes; the first is the one meant by the stage's name."""
        chosen = resolve(self.chooses)(settings) if self.chooses else self.writes
        return {role: path for role, path in self.writes.items() if role in chosen}


def counted(settings: StageSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings as plain values, in two: those that decide the bytes, and those that a class marked with
    `json_schema_extra={"fingerprint": False}` because they can not.
    """
    extras = {key: field.json_schema_extra for key, field in type(settings).model_fields.items()}
    free = {
        key for key, extra in extras.items() if isinstance(extra, dict) and extra.get("fingerprint") is False
    }
    values = settings.model_dump(mode="json")
    return ({key: value for key, value in values.items() if key not in free},
            {key: value for key, value in values.items() if key in free})  # fmt: skip


def takes_many(arity: Arity) -> bool:
    return arity in ("many", "optional_many")


def is_required(arity: Arity) -> bool:
    return arity in ("one", "many")


def resolve(name: str) -> Any:
    """The object that "module:name" names. Raises MissingError when its package is not installed."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "install it; `samovar doctor` says what each package is for"
        raise MissingError(f"{module} needs {error.name}, which is not installed", hint=hint) from error
    resolved: Callable[..., Any] | type = getattr(found, attribute)
    return resolved


def _kind(module: str, about: str, **more: Any) -> Kind:
    return Kind(about=about, settings=f"{module}:Settings", run=f"{module}:run", **more)


KINDS: Mapping[str, Kind] = {
    # ------------------------------------------------------------------------------------------ text in
    "corpora.world": _kind(
        "corpora.world.stage",
        "write the flight-crew world: English and Russian text, dialogues, held-out profiles",
        writes={
            "english": "english.jsonl",
            "russian": "russian.jsonl",
            "english_held": "english_held.jsonl",
            "russian_held": "russian_held.jsonl",
            "chat_english": "chat_english.jsonl",
            "chat_russian": "chat_russian.jsonl",
            "profiles": "profiles.jsonl",
            "facts": "world.json",
            "tasks_choices_english": "tasks_choices_english.jsonl",
            "tasks_choices_russian": "tasks_choices_russian.jsonl",
            "tasks_facts_english": "tasks_facts_english.jsonl",
            "tasks_facts_russian": "tasks_facts_russian.jsonl",
            "tasks_answers_english": "tasks_answers_english.jsonl",
            "tasks_answers_russian": "tasks_answers_russian.jsonl",
        },
        version=2,
    ),
    "corpora.prepare": _kind(
        "corpora.prepare",
        "read text of many forms and encodings, clean it, and hold some back",
        reads={"corpus": "many"},
        writes={"text": "text.jsonl", "held": "held.jsonl", "sources": "sources.jsonl"},
        version=3,
    ),
    "corpora.deduplicate": _kind(
        "corpora.deduplicate",
        "leave out paragraphs that repeat an earlier one, exactly or nearly",
        reads={"corpus": "many"},
        writes={"text": "text.jsonl", "removed": "removed.jsonl"},
        version=2,
    ),
    "corpora.quality": _kind(
        "corpora.quality",
        "train a quality filter on judged documents",
        reads={"judged": "many"},
        writes={"quality": "quality"},
    ),
    "corpora.filter": _kind(
        "corpora.filter",
        "keep the best documents by a quality filter",
        reads={"corpus": "many", "quality": "one"},
        writes={"text": "text.jsonl", "rejected": "rejected.jsonl", "scores": "scores.json"},
    ),
    "corpora.reward": _kind(
        "corpora.reward",
        "keep the best conversations by a reward model",
        reads={"data": "many", "reward": "one"},
        writes={"data": "data.jsonl", "rejected": "rejected.jsonl", "scores": "scores.json"},
    ),
    # --------------------------------------------------------------------------------- a model's language
    "adaptation.scratch": _kind(
        "adaptation.scratch",
        "train a small model from nothing",
        reads={"corpus": "many", "tokenizer": "optional"},
        writes={"model": "model"},
        distributed=True,
        version=3,
    ),
    "adaptation.vocabulary": _kind(
        "adaptation.vocabulary",
        "make a tokenizer for a language: extend, shrink or replace a model's",
        reads={"model": "one", "corpus": "many"},
        writes={"tokenizer": "tokenizer", "report": "report.json", "page": "report.md"},
        version=2,
    ),
    "adaptation.embeddings": _kind(
        "adaptation.embeddings",
        "give a model the embeddings of another vocabulary",
        reads={"model": "one", "tokenizer": "one"},
        writes={"model": "model"},
        version=2,
    ),
    "adaptation.pretrain": _kind(
        "adaptation.pretrain",
        "go on pre-training on text",
        reads={"model": "one", "corpus": "many", "reference": "optional"},
        writes={"model": "model", "curves": "curves.jsonl"},
        agrees="adaptation.pretrain:disagreements",
        distributed=True,
        version=4,
    ),
    "adaptation.propagate": _kind(
        "adaptation.propagate",
        "carry an adapted base model's vocabulary over to its instruction-tuned sibling",
        reads={"base": "one", "adapted": "one", "instruct": "one"},
        writes={"model": "model"},
        version=2,
    ),
    "adaptation.calibrate": _kind(
        "adaptation.calibrate",
        "have a model answer prompts and copy texts, to calibrate it after a change of vocabulary",
        reads={"model": "one", "prompts": "many", "corpus": "optional_many"},
        writes={"data": "data.jsonl", "rejected": "rejected.jsonl", "answers": "answers.jsonl"},
        agrees="adaptation.calibrate:disagreements",
        keeps={".work/answers.jsonl": "answers.jsonl"},
    ),
    # ----------------------------------------------------------------------------------- large into small
    "distill.train": _kind(
        "distill.train",
        "train on dialogues, alone or after a teacher",
        reads={"model": "one", "data": "many", "teacher": "optional"},
        writes={"model": "model", "curves": "curves.jsonl", "adapter": "adapter"},
        agrees="distill.train:disagreements",
        chooses="distill.train:written",
        distributed=True,
        version=5,
    ),
    "distill.capture": _kind(
        "distill.capture",
        "store a teacher's top-K answers",
        reads={"teacher": "one", "data": "many"},
        writes={"store": "store"},
        distributed=True,
        version=5,
    ),
    "distill.synthesize": _kind(
        "distill.synthesize.stage",
        "have a teacher write training data, and keep what is valid",
        reads={
            "teacher": "optional",
            "template": "optional",
            "items": "optional_many",
            "seeds": "optional_many",
            "catalogue": "optional",
            "answers": "optional_many",
        },
        writes={
            "data": "data.jsonl",
            "provenance": "provenance.jsonl",
            "rejected": "rejected.jsonl",
            "held": "held.jsonl",
            "answers": "answers.jsonl",
        },
        keeps={".work/answers.jsonl": "answers.jsonl"},
    ),
    # ----------------------------------------------------------------------------------------- fewer layers
    "prune.importance": _kind(
        "prune.importance",
        "say what each layer of a model is worth",
        reads={"model": "one", "data": "optional_many", "tasks": "optional_many"},
        writes={"importance": "importance.json"},
        handed={"tasks": "evaluation.tasks:load_tasks"},
        version=3,
    ),
    "prune.cut": _kind(
        "prune.cut",
        "remove named layers from a model",
        reads={"model": "one"},
        writes={"model": "model"},
    ),
    "prune.iterate": _kind(
        "prune.iterate",
        "remove layers one by one and heal after each",
        reads={
            "model": "one",
            "data": "optional_many",
            "corpus": "optional_many",
            "tasks": "optional_many",
            "teacher": "optional",
            "branch": "optional",
        },
        writes={"model": "model", "steps": "steps"},
        handed={
            "heal": "distill.heal:heal",
            "tasks": "evaluation.tasks:load_tasks",
            "measure": "evaluation.tasks:measure",
            "file_bytes": "export.quants.predict:gguf_bytes",
        },
        agrees="prune.iterate:disagreements",
        version=5,
    ),
    "prune.report": _kind(
        "prune.report",
        "lay prunings side by side: scores, order, sizes",
        reads={"model": "one", "steps": "many", "tasks": "many", "dense": "optional_many"},
        writes={
            "report": "report.json",
            "page": "report.md",
            "score": "score.svg",
            "order": "order.svg",
            "frequency": "frequency.svg",
        },
        handed={
            "tasks": "evaluation.tasks:load_tasks",
            "measure": "evaluation.tasks:measure",
            "gguf_bytes": "export.quants.predict:gguf_bytes",
        },
        version=3,
    ),
    # ------------------------------------------------------------------------------------------ measuring
    "evaluation.score": _kind(
        "evaluation.score",
        "measure one model: bits per byte, tasks, share of valid answers",
        reads={
            "model": "optional",
            "gguf": "optional",
            "texts": "optional_many",
            "tasks": "optional_many",
            "profiles": "optional",
        },
        writes={"scores": "scores.json"},
        version=3,
    ),
    "evaluation.compare": _kind(
        "evaluation.compare",
        "lay scores side by side in one table",
        reads={"scores": "many", "facts": "optional_many", "bundle": "optional_many"},
        writes={"table": "table.json"},
    ),
    # ----------------------------------------------------------------------------------------- what ships
    "export.gguf": _kind(
        "export.gguf",
        "write a model as GGUF",
        reads={"model": "one"},
        writes={"gguf": "gguf"},
        version=2,
    ),
    "export.imatrix": _kind(
        "export.imatrix",
        "measure which inputs of a model's matrices matter, for quantising",
        reads={"model": "one", "texts": "many"},
        writes={"imatrix": "imatrix.gguf"},
    ),
    "export.quantize": _kind(
        "export.quantize",
        "quantise a GGUF to the types asked for",
        reads={"gguf": "one", "imatrix": "optional"},
        writes={
            "all": "gguf",
            "report": "quantize.json",
            **{name.lower(): f"gguf/{name.lower()}.gguf" for name in QUANTS},
        },
        agrees="export.quantize:disagreements",
        chooses="export.quantize:written",
        version=2,
    ),
    "export.adapter": _kind(
        "export.adapter",
        "write a LoRA adapter as GGUF, for a base that serves several",
        reads={"adapter": "one", "model": "one", "gguf": "optional"},
        writes={"adapter": "adapter.gguf"},
    ),
    "export.verify": _kind(
        "export.verify",
        "prove that GGUF files compute what the model computes, and recommend one",
        reads={"model": "one", "gguf": "many", "texts": "optional_many"},
        writes={"report": "verify.json", "page": "verify.md"},
        version=2,
    ),
    "export.bundle": _kind(
        "export.bundle",
        "put together the folder that ships",
        reads={
            "model": "one",
            "gguf": "many",
            "verify": "optional_many",
            "scores": "optional_many",
            "adapters": "optional_many",
            "recipe": "optional",
        },
        writes={"bundle": "bundle"},
        version=2,
    ),
}

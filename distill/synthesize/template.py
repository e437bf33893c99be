"""Prompt templates: TOML with {placeholders}, filled from fields and nothing else. No jinja, no eval.

    about = "what it asks for"
    [prompt]
    system = "..."               # optional
    user = "... {level} ..."     # {name} is a field; {{ and }} are braces
    [words.level]                # optional: how a field's values are written in the template's language
    beginner = "начинающий"
    [example]                    # how one seed task is written; they fill {examples}
    text = "Task: {instruction}"
    [json.score]                 # the answer is a JSON object of exactly these keys
    kind = "integer"             # or "text"; text may be empty with empty = true
    least = 1
    most = 5
    [conversation]               # what the student sees; without it: the prompt, and the answer
    user = "{instruction}"       # fields of the prompt, and the keys of the JSON answer or {answer}
    assistant = "{output}"

Values are put in once and never read again, so a text that holds {braces} stays text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.dataio import Message
from foundation.errors import RecipeError

SHIPPED = Path(__file__).parent / "templates"
MAX_BYTES = 1 << 18
_PLACE = re.compile(r"\{\{|\}\}|\{([a-z][a-z0-9_]*)\}|[{}]")
NAME = re.compile(r"[a-z][a-z0-9_]*")
ANSWER, EXAMPLES = "answer", "examples"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Key(_Part):
    """What one key of a JSON answer holds."""

    kind: Literal["text", "integer"]
    empty: bool = False
    least: int = 1
    most: int = 5


class _Prompt(_Part):
    system: str = ""
    user: str = Field(min_length=1)


class _Example(_Part):
    text: str = Field(min_length=1)


class _Conversation(_Part):
    system: str = ""
    user: str = Field(min_length=1)
    assistant: str = Field(min_length=1)


class Template(_Part):
    """A template as written, checked by `parse`."""

    about: str
    prompt: _Prompt
    words: dict[str, dict[str, str]] = Field(default_factory=dict)
    example: _Example | None = None
    shape: dict[str, Key] = Field(default_factory=dict, alias="json")
    conversation: _Conversation | None = None

    def needs(self) -> set[str]:
        """Fields that a record must have, {examples} aside."""
        answer = set(self.shape) or {ANSWER}
        said = self.conversation
        after = names(said.system) | names(said.user) | names(said.assistant) if said else set()
        return (names(self.prompt.system) | names(self.prompt.user) | (after - answer)) - {EXAMPLES}

    def spelt(self, fields: Mapping[str, str]) -> dict[str, str]:
        """`fields` in the words of the template's language; of "bands, cable" each part is a value.

        Raises RecipeError naming each value without a word.
        """
        missing = [
            f"{name} = {part!r}: the template knows {', '.join(words)}"
            for name, words in self.words.items()
            for part in fields.get(name, "").split(", ")
            if name in fields and part not in words
        ]
        if missing:
            raise RecipeError(missing, hint="use the template's values, or write a template with other words")
        return {
            name: ", ".join(self.words[name][part] for part in value.split(", "))
            if name in self.words
            else value
            for name, value in fields.items()
        }

    def ask(self, fields: Mapping[str, str]) -> list[Message]:
        """The messages for the teacher; `fields` as `spelt`."""
        return _messages(self.prompt.system, self.prompt.user, fields)

    def pair(self, fields: Mapping[str, str], answer: Mapping[str, str], text: str) -> list[Message]:
        """The student's conversation; `answer` holds the keys of the JSON answer, or {answer} alone."""
        if self.conversation is None:
            return [*self.ask(fields), {"role": "assistant", "content": text}]
        said, known = self.conversation, {**fields, **answer}
        messages = _messages(said.system, said.user, known)
        return [*messages, {"role": "assistant", "content": fill(said.assistant, known)}]

    def examples(self, tasks: Sequence[Mapping[str, str]]) -> str:
        """The text of {examples}: few-shot tasks, numbered."""
        assert self.example is not None, "checked before the first prompt"
        return "\n\n".join(f"{n}. {fill(self.example.text, task)}" for n, task in enumerate(tasks, 1))


def names(text: str) -> set[str]:
    """The placeholders of `text`. Raises ValueError at a brace that is neither a placeholder nor doubled."""
    found = set()
    for match in _PLACE.finditer(text):
        if match[0] in "{}":
            line = text.count("\n", 0, match.start()) + 1
            raise ValueError(f"line {line} of the text: a lone {match[0]!r}; double it, or write {{name}}")
        if match[1]:
            found.add(match[1])
    return found


def fill(text: str, fields: Mapping[str, str]) -> str:
    """`text` with its placeholders replaced, once. Raises KeyError for a name that `fields` lacks."""
    return _PLACE.sub(lambda match: fields[match[1]] if match[1] else match[0][0], text)


def _messages(system: str, user: str, fields: Mapping[str, str]) -> list[Message]:
    messages = [{"role": "system", "content": fill(system, fields).strip()}] if system else []
    return [*messages, {"role": "user", "content": fill(user, fields).strip()}]


def shipped() -> list[str]:
    """Names of the templates that come with Samovar."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def parse(path: Path) -> Template:
    """Read and check a template. Raises RecipeError with every fault in it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError([f"{path}: larger than {MAX_BYTES} bytes: that is no template"])
        made = Template.model_validate(tomllib.loads(data.decode("utf-8-sig")))
    except OSError as error:
        raise RecipeError([f"{path}: can not be read: {error.strerror}"]) from None
    except ValidationError as error:
        raise RecipeError(
            [f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()],
            hint="docs/synthesis.md shows a template",
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError([f"{path}: not a template: {error}"]) from None
    if problems := [f"{path}: {problem}" for problem in _problems(made)]:
        raise RecipeError(problems, hint="a placeholder is {name}: lower-case letters, digits and _")
    return made


def _problems(made: Template) -> list[str]:
    texts = {"prompt.system": made.prompt.system, "prompt.user": made.prompt.user}
    if made.example:
        texts["example.text"] = made.example.text
    if said := made.conversation:
        texts |= {f"conversation.{name}": text for name, text in said.model_dump().items()}
    problems, used = [], dict[str, set[str]]()
    for where, text in texts.items():
        try:
            used[where] = names(text)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    problems += [f"json.{key}: not a name" for key in made.shape if not NAME.fullmatch(key)]
    problems += [f"json.{k}: least > most" for k, key in made.shape.items() if key.least > key.most]
    asked = used.get("prompt.system", set()) | used.get("prompt.user", set())
    if (EXAMPLES in asked) != (made.example is not None):
        problems.append("{examples} in [prompt] and [example] go together")
    told = {name for where, found in used.items() if where.startswith("conversation") for name in found}
    if made.shape and ANSWER in told:
        problems.append("{answer} is not there when the answer is JSON; name its keys")
    if ANSWER in asked & told:
        problems.append("{answer} is both a field of the prompt and the teacher's answer")
    if twice := asked & set(made.shape):
        problems.append(f"{', '.join(sorted(twice))}: both a field of the prompt and a key of the answer")
    return problems

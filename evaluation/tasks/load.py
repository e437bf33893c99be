"""Task files to tasks: one task a file, its kind told by the keys of its lines, every line checked.

    choices       {"prompt" or "messages", "choices": [...], "answer": 0}
    perplexity    {"text"}, or {"messages"} that end in the assistant's answer
    copying       {"prompt" or "messages", "copy"}
    generation    {"prompt" or "messages", "reference"}
    programmes    {"messages", "profile", "language"}, the profiles.jsonl of the flight-crew world

Keys beside these are passed over; conversations with a profile that end in an answer are perplexity, so that
the world's training dialogues are a task as they are. docs/tasks.md has a line of each, and how it is scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.names import names_of
from evaluation.tasks import choices, copying, generation, perplexity, programmes
from evaluation.tasks.prompts import Record, Writer
from foundation.dataio import checked_messages, lines
from foundation.errors import InputError
from foundation.report import Report
from foundation.task import Task
from foundation.tokenizer import Tokenizer

MOST_PROBLEMS = 20  # that are told of one file


class Kind(NamedTuple):
    """One kind of task: the other key of its lines, what is wrong with a line, and the task of its lines."""

    key: str
    problem: Callable[[Record], str]
    make: Callable[[str, Sequence[Record], Writer], Task]


KINDS = {
    "choices": Kind("choices", choices.problem, choices.make),
    "copying": Kind("copy", copying.problem, copying.make),
    "generation": Kind("reference", generation.problem, generation.make),
    "programmes": Kind("profile", programmes.problem, programmes.make),
    "perplexity": Kind("", lambda _: "", perplexity.make),
}
HINT = (
    'a line is {"prompt" or "messages", and "choices" + "answer", "copy" or "reference"}, '
    '{"messages", "profile", "language"}, {"text"}, or {"messages"} with an answer; see docs/tasks.md'
)


def load_tasks(
    paths: Sequence[Path], tokenizer: Tokenizer, report: Report, *, max_tokens: int, max_items: int
) -> list[Task]:
    """The task of each file, of its first `max_items` lines, in the ids of `tokenizer`.

    An item longer than `max_tokens` is left out, and how many were is noted; a text is read in windows of so
    many instead. Raises InputError for a file that is missing or empty, with every problem of its lines at
    once, for two files of one name, and when no item fits; ModelError where messages meet no chat template.
    """
    writer = Writer(tokenizer, report, max_tokens)
    tasks = []
    for name, path in zip(names_of(paths, "tasks"), paths, strict=True):
        kind, records = read_lines(path, max_items)
        tasks.append(KINDS[kind].make(name, records, writer))
    return tasks


def read_lines(path: Path, max_items: int) -> tuple[str, list[Record]]:
    """(kind, first lines) of a task file, every line checked. Raises InputError with all problems at once."""
    records: list[Record] = []
    problems: list[str] = []
    kinds: dict[str, int] = {}  # kind -> the first line that is of it
    for number, line in lines(path):
        if not line.strip():
            continue
        record = _parsed(line)
        found = [record] if isinstance(record, str) else list(_problems(record))
        problems += [f"line {number}: {text}" for text in found]
        if isinstance(record, dict) and not found:
            kinds.setdefault(kind_of(record), number)
            if len(records) < max_items:
                records.append(record)
    if len(kinds) > 1:
        problems.append("different kinds: " + ", ".join(f"{kind} (line {n})" for kind, n in kinds.items()))
    if problems:
        more = len(problems) - MOST_PROBLEMS
        said = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(f"{path}: not the lines of a task\n  " + "\n  ".join(said), hint=HINT)
    if not records:
        raise InputError(f"{path}: holds no item of a task", hint=HINT)
    return next(iter(kinds)), records


def kind_of(record: Record) -> str:
    """The kind of a line that has the keys of one."""
    marks = _marks(record)
    return next(name for name, kind in KINDS.items() if not kind.key or kind.key in marks)


def _marks(record: Record) -> list[str]:
    """The keys of a line that tell its kind; a profile tells of one only where its answer is still to come."""
    marks = [kind.key for kind in KINDS.values() if kind.key and kind.key in record]
    messages = record.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    answered = isinstance(last, dict) and last.get("role") == "assistant"
    return [] if marks == ["profile"] and answered else marks


def _parsed(line: str) -> Record | str:
    """The object in a line, or what is wrong with it."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800 to \\udfff) is no character"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return record if isinstance(record, dict) else f"a {type(record).__name__}; a JSON object is needed"


def _problems(record: Record) -> Iterator[str]:
    """Everything that is wrong with a line; messages are replaced by their checked form."""
    keys = _marks(record)
    asked = [key for key in ("prompt", "messages", "text") if key in record]
    wanted = ["messages"] if keys == ["profile"] else ["prompt", "messages"] if keys else ["text", "messages"]
    if len(keys) > 1 or len(asked) != 1 or asked[0] not in wanted:
        yield f"of no known kind of task ({', '.join(KINDS)}) by its keys {sorted(record)[:8]}"
        return
    if asked == ["messages"]:
        yield from _messages_problem(record, answered=not keys)
    elif not isinstance(record[asked[0]], str) or (asked == ["text"] and not record["text"].strip()):
        yield f'"{asked[0]}" must be a text' + (" that is not empty" if asked == ["text"] else "")
    if fault := KINDS[kind_of(record)].problem(record):
        yield fault


def _messages_problem(record: dict[str, Any], *, answered: bool) -> Iterator[str]:
    try:
        record["messages"] = checked_messages(record["messages"], "", answered=answered)
    except InputError as error:
        yield error.message.removeprefix(": ")
        return
    if not answered and record["messages"][-1]["role"] == "assistant":
        yield "the last message is the assistant's; it must be one to answer"

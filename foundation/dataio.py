"""Text and conversations from files, with every fault named by file and line.

Two shapes of data enter Samovar: documents, `{"text": ...}` a line (or plain text files, where an empty
line ends a document), and conversations, `{"messages": [{"role", "content"}, ...]}` a line. Files are
streamed: nothing here holds a corpus in memory. What a text is worth is decided elsewhere (corpora/).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from foundation.artifact import MANIFEST
from foundation.errors import InputError, ModelError
from foundation.files import PACKED

JSON_LINES = (".jsonl", ".ndjson", ".json")  # endings, compared without case; all else is plain text
ROLES = ("system", "user", "assistant")
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
MAX_LINE_BYTES = 64 * 2**20
_PREPARE = "read text of other encodings with a corpora.prepare stage, which finds them out, or convert it"


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 text file.

    Raises InputError when the file is missing, empty, binary, or not UTF-8 (naming the line and, where it
    can be told, the encoding it seems to be in).
    """
    if path.is_dir():
        hint = f"name its files with a pattern: '{path}/*.jsonl'"
        names = sorted(file.name for file in path.glob("[!.]*.jsonl"))
        if names and (path / MANIFEST).is_file():
            hint = f"that is the folder of a stage; give a file that it wrote: {', '.join(names)}"
        raise InputError(f"{path}: a folder; a file is needed", hint=hint)
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="check the path in the recipe's [inputs]")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty", hint="give one that holds something")
    number = 0
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(
                f"{path}, line 1: UTF-16, by its first two bytes",
                hint=f"{_PREPARE}: iconv -f utf-16 -t utf-8 {path.name} > utf8-{path.name}",
            )
        file.seek(0)
        while raw := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(raw) == MAX_LINE_BYTES:
                raise InputError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes")
            if b"\0" in raw:
                raise InputError(
                    f"{path}, line {number}: a NUL byte; this is a binary file, or UTF-16",
                    hint="give text in UTF-8, plain or JSON lines; corpora.prepare reads UTF-16 too",
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                seen = _likely_encoding(raw)
                name = path.name
                raise InputError(
                    f"{path}, line {number}: not UTF-8 (byte {error.start}: 0x{raw[error.start]:02x}); "
                    + (f"it reads like {seen}" if seen else "its encoding can not be told"),
                    hint=f"{_PREPARE}: iconv -f {seen or 'ENCODING'} -t utf-8 {name} > utf8-{name}",
                ) from None
            yield number, text.rstrip("\r\n")


def _likely_encoding(raw: bytes) -> str:
    """The 8-bit Cyrillic encoding under which `raw` looks most like Russian prose, or ""."""
    best, best_share = "", 0.6
    for name in ("cp1251", "koi8-r", "cp866"):
        letters = [c for c in raw.decode(name, errors="replace") if ord(c) > 127]
        # Prose is mostly lower case: the wrong Cyrillic table turns it into capitals or box drawings.
        share = sum("а" <= c <= "я" or c == "ё" for c in letters) / max(1, len(letters))
        if share > best_share:
            best, best_share = name, share
    return best


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file; empty lines are passed over."""
    return parsed(lines(path), str(path))


def parsed(numbered: Iterable[tuple[int, str]], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON object of each numbered line of `path` that is not empty."""
    filled = ((number, line) for number, line in numbered if line.strip())
    is_first = True
    for number, line in filled:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if is_first and (whole := _begun(line, error, next(filled, (0, ""))[1])):
                raise _one_document(path, whole, " over many lines") from None
            raise InputError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})",
                hint="a .jsonl file holds one JSON object a line; give plain text the ending .txt",
            ) from None
        except RecursionError:
            raise InputError(f"{path}, line {number}: nested too deep to be read as JSON") from None
        except ValueError as error:  # an integer of thousands of digits
            raise InputError(f"{path}, line {number}: JSON that can not be read ({error})") from None
        if is_first and isinstance(record, list):
            raise _one_document(path, "an array")
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: {_kind_of(record)}; a JSON object is needed",
                hint="a .jsonl file holds one JSON object a line",
            )
        is_first = False
        if HALF_PAIR.search(line) and not _is_text(record):
            raise InputError(
                f"{path}, line {number}: half of a surrogate pair (\\ud800 to \\udfff) is no character",
                hint="write the whole pair, or the character itself in UTF-8",
            )
        yield number, record


def _begun(line: str, error: json.JSONDecodeError, following: str) -> str:
    """What the first line begins that `following` could go on with: an array, an object, or "" for neither."""
    text, following = line.strip(), following.strip()
    if not following or error.pos < len(line.rstrip()):
        return ""
    if text.startswith("["):
        return "an array"
    return "an object" if text.startswith("{") and not following.startswith("{") else ""


def _one_document(path: str, whole: str, over: str = "") -> InputError:
    """The refusal of a file that is one array or object, with the command that puts its parts on lines."""
    file, first = PurePath(path), ""
    if file.suffix.lower() in PACKED:
        file, first = file.with_suffix(""), "unpack it; then "
    parts, more = "'.[]'", ""
    if whole == "an object":
        parts, more = ".", "; or, where they are a list under a key, '.KEY[]' in place of the dot"
    command = f"jq -c {parts} {shlex.quote(file.name)} > {shlex.quote(f'lines-{file.stem}.jsonl')}"
    return InputError(
        f"{path} looks like one JSON document, {whole}{over}; read is one object a line",
        hint=f"{first}write one object a line, for example: {command}{more}",
    )


def _kind_of(value: Any) -> str:
    """What a value of JSON is called."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _is_text(record: dict[str, Any]) -> bool:
    """True when every string in `record` can be written as UTF-8."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def documents(paths: Iterable[Path], field: str = "text") -> Iterator[str]:
    """Documents of JSON-lines files (their `field`) and of plain text files, in the order of the files.

    Raises InputError on what `lines` refuses, on a record without text under `field`, and when there is no
    document. Blank texts and nulls are passed over.
    """
    for path in paths:
        found = False
        if path.suffix.lower() in JSON_LINES:
            texts = texts_under(field, records(path), str(path))
        else:
            texts = paragraphs(lines(path), str(path))
        blank = 0
        for text in texts:
            blank += not text
            if text:
                found = True
                yield text
        if not found:
            raise no_document(path, blank)


def no_document(path: Path, blank: int) -> InputError:
    """The refusal of a file that holds nothing but `blank` texts."""
    if blank:
        hint = _NAME_IT.replace("key", "key or column")
        return InputError(f"{path}: holds no document: each of its {blank} texts is blank or null", hint=hint)
    return InputError(f"{path}: holds no document", hint="give a file with text in it, or leave it out")


def texts_under(field: str, numbered: Iterable[tuple[int, dict[str, Any]]], path: str) -> Iterator[str]:
    """The text under `field` of each numbered record of `path`; "" for a blank one, and for null."""
    for number, record in numbered:
        text = record.get(field)
        if isinstance(text, str) or (text is None and field in record):
            yield text if text and text.strip() else ""
            continue
        where, hint = f"{path}, line {number}", _NAME_IT
        if field in record:
            raise InputError(f"{where}: {_kind_of(text)} under {field!r}, where text is needed", hint=hint)
        if "messages" in record:
            hint = "corpora take texts; conversations are `data`, as of distill.train"
            raise InputError(f'{where}: no text under {field!r}, but a conversation, "messages"', hint=hint)
        keys = sorted(record)[:8]
        raise InputError(f"{where}: no text under {field!r}; the keys are {keys}", hint=hint)


_NAME_IT = "name the key that holds the text with `field` in a corpora.prepare stage"


def paragraphs(numbered: Iterable[tuple[int, str]], path: str) -> Iterator[str]:
    """Documents of plain text: lines up to an empty one. One that has no end in sight is refused."""
    paragraph: list[str] = []
    characters = 0
    for number, line in numbered:
        if line.strip():
            paragraph.append(line)
            characters += len(line) + 1
            if characters > MAX_LINE_BYTES:
                raise InputError(
                    f"{path}, line {number}: a document of more than {MAX_LINE_BYTES} characters",
                    hint="end each document with an empty line, or give JSON lines",
                )
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph, characters = [], 0
    if paragraph:
        yield "\n".join(paragraph)


Message = dict[str, Any]
"""role and content, both text, and whatever else of it a chat template may read (reasoning_content, ...)."""


class Conversation(list[Message]):
    """Messages, and the file and line that they were read from, for what is said about them later."""

    def __init__(self, messages: Iterable[Message], where: str) -> None:
        super().__init__(messages)
        self.where = where


@contextmanager
def blaming(messages: list[Message], otherwise: str = "a conversation") -> Iterator[None]:
    """InputError and ModelError raised inside begin with the place of `messages`, else with `otherwise`."""
    try:
        yield
    except (InputError, ModelError) as error:
        where = messages.where if isinstance(messages, Conversation) else otherwise
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from None


def conversations(paths: Iterable[Path]) -> Iterator[Conversation]:
    """The `messages` of each line, checked: known roles, text contents, an assistant's answer at the end.

    Raises InputError naming file and line otherwise, or when there is none.
    """
    for path in paths:
        found = False
        for number, record in records(path):
            found = True
            where = f"{path}, line {number}"
            if record.get("tools"):
                raise InputError(
                    f'{where}: "tools" are not rendered, and the model would never see them',
                    hint="write them into the system message, or leave the key out",
                )
            yield Conversation(checked_messages(record.get("messages"), where, answered=True), where)
        if not found:
            raise InputError(f"{path}: holds no conversation")


def checked_messages(messages: Any, where: str, *, answered: bool) -> list[Message]:
    """`messages` without keys that hold nothing, or InputError beginning with `where`."""
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f'{where}: no "messages" list', hint='{"messages": [{"role": "user", "content": ...}]}'
        )
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(
                f"{where}: a message needs a role out of {', '.join(ROLES)}; seen: {message!r:.80}"
            )
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: a message's content must be text; seen: {message!r:.80}")
    if answered and (messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip()):
        raise InputError(f"{where}: the last message must be an assistant's answer that is not empty")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, UTF-8, keys in the given order. Returns the number of lines."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count

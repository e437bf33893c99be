"""Parity of texts: what transformers' tokenizer makes of a text, and what a GGUF file's makes of it.

Two halves, so that transformers is loaded once and not for each file: `expected_texts` and `expected_ids`
say, as JSON, what the original does; `check_texts` and `check_ids` hold a file against it.

Known differences are counted apart, as `known`: llama.cpp composes no letters (NFC), so such texts are
given to it composed; its tokenizer for single characters treats blank texts its own way; where merges tie in
long runs of spaces it follows SentencePiece, from which `tokenizers` differs; and where the original puts a
space at the beginning of a text alone, it puts none (with a chat template) or one before every piece of
text between added tokens (without): see `_Spaces`. Of the spaces nothing is excused in a chat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from export.parity import adversarial
from foundation.chat import ChatTemplate
from foundation.files import read_json
from foundation.llama import LlamaModel
from foundation.shape import ModelShape

SOME_DAY = datetime(2024, 7, 26)  # for templates that write the date; any day tokenises alike on both sides
FUZZ_TEXTS = 1500
DECODED_LINES = 500
CHUNKS, CHUNK_LINES = 200, 8
LONG_GAP = re.compile(" {12,}")
CONVERSATION = [
    {"role": "user", "content": "Привет! What is 2+2?"},
    {"role": "assistant", "content": "Четыре.\n\nThat's four 🙂"},
    {"role": "user", "content": "Спасибо  <b>"},
]
GROUPS = ("lines", "chunks", "adversarial", "added_tokens", "fuzz", "chat", "decoded")


def compare_texts(tokenizer: Any, model: LlamaModel, lines: Sequence[str], seed: int) -> dict[str, Any]:
    """Both halves at once: by group, how many texts are equal, known to differ, different (and the first)."""
    return check_texts(expected_texts(tokenizer, lines, seed), added_tokens(tokenizer), model)


def compare_ids(tokenizer: Any, model: LlamaModel, folder: Path) -> dict[str, Any]:
    """Special ids of the file, and the names of those in which it disagrees with `folder`'s tokenizer."""
    return check_ids(expected_ids(tokenizer, folder), model)


def added_tokens(tokenizer: Any) -> list[str]:
    """Spelling of every added token."""
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values())


def expected_texts(tokenizer: Any, lines: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Texts with their group and ids; `composed` where the tokenizer composes letters (NFC) and so changes
    the text; `spaced` and `spaced_ids` as _Spaces says; group "decoded" has what the ids are decoded to.
    """
    chunks = ["\n".join(lines[i : i + CHUNK_LINES]) for i in range(0, len(lines), CHUNK_LINES)][:CHUNKS]
    groups: dict[str, Iterable[str]] = {
        "lines": lines,
        "chunks": chunks,
        "adversarial": adversarial.TEXTS,
        "added_tokens": adversarial.in_context(added_tokens(tokenizer)),
        "fuzz": adversarial.fuzz(seed, FUZZ_TEXTS),
        "chat": rendered(tokenizer),
    }
    normalizer = tokenizer.backend_tokenizer.normalizer
    composes = type(normalizer).__name__ == "NFC"
    spaces = _Spaces(tokenizer)
    for group, texts in groups.items():
        for text in texts:
            row = {"group": group, "text": text, "ids": tokenizer.encode(text, add_special_tokens=False)}
            if composes and (composed := normalizer.normalize_str(text)) != text:
                row["composed"] = composed
            yield row if group == "chat" else row | spaces.around(text, row["ids"])
    for text in [*lines[:DECODED_LINES], *adversarial.TEXTS]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield {"group": "decoded", "text": text, "ids": ids, "decoded": back}


def check_texts(rows: Iterable[dict[str, Any]], added: Sequence[str], model: LlamaModel) -> dict[str, Any]:
    """Equality of ids by group of texts, and of decoded text; the first differing text of each is kept."""
    groups: dict[str, Any] = {name: {"equal": 0, "known": 0, "different": 0} for name in GROUPS}
    known = _KnownDifferences(model, added)
    for row in rows:
        group, text, wanted = groups[row["group"]], row["text"], row["ids"]
        if row["group"] == "decoded":
            got: Any = model.detokenize(wanted)
            verdict = "equal" if got in (row["decoded"], " " + row["decoded"]) else "different"  # a space first
            told = {"text": text[:200], "wanted": row["decoded"][:200], "got": got[:200]}
        else:
            got = model.tokenize(text)
            is_known = wanted != got and known.explains(row, got)
            verdict = "equal" if wanted == got else "known" if is_known else "different"
            told = {"text": text[:200], "wanted": wanted[:40], "got": got[:40]}
        group[verdict] += 1
        if verdict == "different":
            group.setdefault("example", told)
    return groups


class _Spaces:
    """Of a tokenizer that puts a space at the beginning of a text alone: the same text as llama.cpp has it.

    With a chat template llama.cpp puts no space: `spaced`, the text with its space written, must give
    llama.cpp the ids of the original. Without one it puts a space before every piece of text between added
    tokens: `spaced` is the text with those spaces written, and `spaced_ids`, what the original makes of that,
    must be what llama.cpp makes of the text itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        pre = tokenizer.backend_tokenizer.pre_tokenizer
        self._first = getattr(pre, "prepend_scheme", None) == "first"  # Metaspace has it, no other
        self._added = _finder(added_tokens(tokenizer))

    def around(self, text: str, ids: list[int]) -> dict[str, Any]:
        """What `text`'s row says of it; nothing where both sides see the same text."""
        if not self._first:
            return {}
        if self._tokenizer.chat_template:
            spaced = " " + text
            return {"spaced": spaced} if self._encode(spaced) == ids else {}
        pieces = enumerate(self._added.split(text))
        spaced = "".join(piece if i % 2 or not piece else " " + piece for i, piece in pieces)
        spaced_ids = self._encode(spaced)
        return {"spaced": spaced, "spaced_ids": spaced_ids} if spaced_ids != ids else {}

    def first(self, text: str) -> str:
        """What llama.cpp is given for `text`, which begins with a letter."""
        return " " + text if self._first and self._tokenizer.chat_template else text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def _finder(added: Iterable[str]) -> re.Pattern[str]:
    """Splits a text: every second part is an added token."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True))) or '(?!)'})")


class _KnownDifferences:
    """The differences that no export can avoid; anything else is a fault."""

    def __init__(self, model: LlamaModel, added: Sequence[str]) -> None:
        self._model = model
        self._kind = model.metadata("tokenizer.ggml.model")
        self._added = _finder(added)

    def explains(self, row: dict[str, Any], got: list[int]) -> bool:
        text, wanted = str(row.get("spaced", row["text"])), list(row.get("spaced_ids", row["ids"]))
        if "composed" in row:  # decomposed letters: equal once they are composed beforehand
            return self._model.tokenize(row["composed"]) == wanted
        if "spaced" in row:
            got = got if "spaced_ids" in row else self._model.tokenize(text)
            if got == wanted:
                return True
        if self._kind == "t5":  # no space is put before a piece of text that is nothing but spaces
            return any(piece and not piece.strip(" ") for piece in self._added.split(text)[::2])
        if self._kind == "llama" and LONG_GAP.search(text):  # sides cut a run of spaces elsewhere, as
            return self._model.detokenize(wanted) == self._model.detokenize(got)  # SentencePiece does too
        return False


def rendered(tokenizer: Any) -> list[str]:
    """A conversation through the chat template, if there is one: finished, and awaiting an answer."""
    if not isinstance(tokenizer.chat_template, str):
        return []
    names = tokenizer.special_tokens_map
    template = ChatTemplate(tokenizer.chat_template, "chat template", names, now=lambda: SOME_DAY)
    return [template.render(CONVERSATION, prompt=True), template.render(CONVERSATION[:2], prompt=False)]


def expected_ids(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Special ids of the original, its template, and what it puts around a text."""
    listed = (read_json(folder / "generation_config.json") or {}).get("eos_token_id")
    ends = {i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)}
    text = "a b"
    return {
        "rows": ModelShape.from_folder(folder).vocab,
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "text": _Spaces(tokenizer).first(text),  # as llama.cpp is given it
        "text_with_specials": tokenizer.encode(text),
        "chat_template": tokenizer.chat_template,
        "ends": sorted(ends | {tokenizer.eos_token_id} - {None}),
    }


def check_ids(expected: dict[str, Any], model: LlamaModel) -> dict[str, Any]:
    """Special ids of the file, and the names of those that disagree."""
    pairs = {
        "rows": (expected["rows"], model.vocab_size),
        "eos": (expected["eos"], model.eos if expected["eos"] is not None else None),
        "bos": (expected["bos"], model.bos if expected["bos"] is not None else None),
        "text_with_specials": (
            expected["text_with_specials"],
            model.tokenize(expected["text"], add_special=True),
        ),
        "chat_template": (expected["chat_template"], model.metadata("tokenizer.chat_template")),
        "ends_missing": ([], sorted(set(expected["ends"]) - model.eog)),
    }
    return {
        "bos": model.bos,
        "eos": model.eos,
        "ends": sorted(model.eog),
        "different": sorted(name for name, (wanted, got) in pairs.items() if wanted != got),
    }

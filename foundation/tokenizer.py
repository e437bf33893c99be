"""The tokenizer of a model folder, through the `tokenizers` library alone (no transformers, no torch).

It encodes without adding special tokens: where they belong is the chat template's or the caller's affair.
Special tokens written out in a text are parsed only by `encode_marked` (templates); `encode` reads text
from outside, in which "<|im_end|>" is ten ordinary characters and never a control token. In a message's
content it is no control token either: chat.py sees to that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.artifact import hint_for
from foundation.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SAVE_ONCE = "save the tokenizer once with transformers' AutoTokenizer(...).save_pretrained(folder)"


def without_habits(backend: Backend) -> Backend:
    """A tokenizer of the tokenizers library without the truncation, padding and dropout that its file carries.

    They are how somebody trained with it: texts would be cut, filled up, or cut up at random.
    """
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return backend


class Tokenizer:
    """Wraps tokenizer.json and the special tokens that tokenizer_config.json names."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder}: no tokenizer.json",
                hint=hint_for(folder, path.name, SAVE_ONCE),
            )
        self.folder = folder
        try:
            self._backend = without_habits(Backend.from_file(str(path)))
        except Exception as error:  # the library raises a bare Exception on a malformed file
            raise ModelError(f"{path}: can not be read as a tokenizer ({error})") from None
        named = _json(folder / "special_tokens_map.json")  # older folders name bos and eos here alone
        self.config = {**named, **_json(folder / "tokenizer_config.json")}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it are encoded as plain characters."""
        self._backend.encode_special_tokens = True
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a rendered template: special tokens written in it become their ids."""
        self._backend.encode_special_tokens = False
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        self._backend.encode_special_tokens = True
        return [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the added tokens that are special: those that `encode` reads as plain text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    def _special(self, name: str) -> int | None:
        value: Any = self.config.get(f"{name}_token")
        if isinstance(value, dict):
            value = value.get("content")
        return self.id_of(value) if isinstance(value, str) else None

    @cached_property
    def eos_id(self) -> int | None:
        """The token that ends an answer, or a document where there is no other."""
        return self._special("eos")

    @cached_property
    def bos_id(self) -> int | None:
        return self._special("bos")

    @cached_property
    def pad_id(self) -> int:
        """The padding token; any id serves where there is none, since padding is always masked."""
        pad = self._special("pad")
        return pad if pad is not None else (self.eos_id or 0)

    @cached_property
    def boundary_id(self) -> int:
        """The token that stands before a document: bos where it is named, else pad's or eos's token.

        Byte-level models of the Qwen kind name no bos; their documents are parted by <|endoftext|>.
        """
        for name in ("bos", "pad", "eos"):
            found = self._special(name)
            if found is not None:
                return found
        raise ModelError(f"{self.folder}: the tokenizer names no bos, pad or eos token")

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja source: chat_template.jinja, or the one inside tokenizer_config.json."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ModelError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        inside = self.config.get("chat_template")
        if isinstance(inside, list):  # several, by name
            named = {
                str(entry.get("name")): entry.get("template") for entry in inside if isinstance(entry, dict)
            }
            inside = named.get("default")
            if not isinstance(inside, str):
                raise ModelError(
                    f"{self.folder}: chat templates {sorted(named)}, and none is called 'default'",
                    hint="save the one to use as chat_template.jinja beside the tokenizer",
                )
        return inside if isinstance(inside, str) else None

    @cached_property
    def digest(self) -> str:
        """sha256 of vocabulary, merges and added tokens: equal digests give equal ids for every text."""
        full = json.loads(self._backend.to_str())
        model = full["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        kept = {
            "vocab": model["vocab"],
            "merges": merges,
            "added": [(t["id"], t["content"], t["special"]) for t in full["added_tokens"]],
            "normalizer": full["normalizer"],
            "pre_tokenizer": full["pre_tokenizer"],
        }
        text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, the chat template included, byte by byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is needed, seen a {type(value).__name__}")
    return value

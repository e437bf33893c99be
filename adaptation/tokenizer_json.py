"""A tokenizer.json as data: its vocabulary and merges, and the same file with tokens appended or left out.

Two families of BPE are known. In "bytes" (GPT-2, Llama 3, Qwen) a token is a string over an alphabet of 256
printable characters, one a byte. In "characters" (SentencePiece: Llama 2, Mistral v0.1, Gemma) a token is
text in which "▁" stands for a space, and characters outside the vocabulary fall back to bytes or to <unk>.

Not here: encoding, which the tokenizers library does (`backend`), and what to append (extension.py) or to leave
out (uses.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation.artifact import hint_for
from foundation.errors import ModelError
from foundation.files import read_json, write_atomic
from foundation.tokenizer import SAVE_ONCE, copy_tokenizer, without_habits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Pair = tuple[str, str]
SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenizerJson:
    """The parsed tokenizer.json of `folder`. The parsed value is never changed in place."""

    folder: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerJson:
        """Raises ModelError when the file is missing, not JSON, or no BPE of the two families."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder}: no tokenizer.json",
                hint=hint_for(folder, path.name, SAVE_ONCE),
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind = content["model"].get("type", "BPE")  # files of old do not name their type
            if kind != "BPE":
                raise ModelError(f"{path}: a {kind} tokenizer; only BPE can be extended")
            for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
                if content["model"].get(mark):
                    raise ModelError(f"{path}: BPE with {mark} = {content['model'][mark]!r} is not known here")
            if not content["model"]["vocab"]:
                raise ModelError(f"{path}: the vocabulary is empty", hint="download or make it again")
            found = cls(folder, content)
            _ = found.size, found.merges, found.family  # raises now what would be raised later
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: not a tokenizer of the tokenizers library ({error!r})") from None
        return found

    @cached_property
    def family(self) -> Literal["bytes", "characters"]:
        """Which of the two families this is; ModelError for neither."""
        steps = {key: list(_steps(self.content.get(key))) for key in ("normalizer", "pre_tokenizer")}
        if any(s["type"] == "ByteLevel" for s in steps["pre_tokenizer"]):
            return "bytes"
        replaces = any(s["type"] == "Replace" and s.get("content") == SPACE for s in steps["normalizer"])
        if replaces or any(s["type"] == "Metaspace" for s in steps["pre_tokenizer"]):
            return "characters"
        raise ModelError(
            f"{self.folder}: neither byte-level BPE nor SentencePiece BPE; no other can be extended"
        )

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        found: dict[str, int] = self.content["model"]["vocab"]
        return found | {t["content"]: t["id"] for t in self.added}

    @property
    def added(self) -> list[dict[str, Any]]:
        """Added tokens (control tokens and such): matched in the text before any merge."""
        return self.content.get("added_tokens") or []

    @cached_property
    def merges(self) -> list[Pair]:
        """Merges, first applied first; the file keeps them as "a b" or as ["a", "b"]."""
        return [_pair(merge) for merge in self.content["model"].get("merges", [])]

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.vocab.values()) + 1

    @property
    def unknown(self) -> str | None:
        """The token for what no other token spells, if there is one."""
        found: str | None = self.content["model"].get("unk_token")
        return found

    @cached_property
    def atoms(self) -> set[str]:
        """Tokens that no merge makes and any text may need: bytes or characters, and control tokens."""
        always = {token["content"] for token in self.added} | {self.unknown or ""}
        if self.family == "bytes":
            return self.vocab.keys() & (always | set(byte_alphabet()))
        single = {token for token in self.vocab if len(token) == 1 or BYTE_TOKEN.fullmatch(token)}
        return single | (self.vocab.keys() & always)

    def backend(self) -> Tokenizer:
        """The tokenizers library's tokenizer of this content, made once and never set up otherwise."""
        return self._backend

    @cached_property
    def _backend(self) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            return without_habits(Tokenizer.from_str(json.dumps(self.content)))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{self.folder}: tokenizer.json can not be used: {error}") from None

    def extended(self, tokens: list[str], merges: list[Pair]) -> TokenizerJson:
        """`tokens` under the ids from `size` on, in their order, and `merges` instead of the present ones.

        Added tokens enter the model's vocabulary under the ids they have: it would have holes otherwise, and
        the library then gives added tokens new ids when it loads the file.
        """
        fresh = {token: i for i, token in enumerate(tokens, start=self.size)}
        vocab = dict(sorted((self.vocab | fresh).items(), key=lambda item: item[1]))
        old = self.content["model"].get("merges", [])
        spelt: list[Any] = (
            [" ".join(m) for m in merges] if old and isinstance(old[0], str) else list(map(list, merges))
        )
        return TokenizerJson(
            self.folder, self.content | {"model": self.content["model"] | {"vocab": vocab, "merges": spelt}}
        )

    def shrunk(self, kept: Set[str]) -> TokenizerJson:
        """The tokens in `kept`, and every added token, under ids without a gap in their old order.

        Merges stay where both parts and what they make do. Every id in the file follows its token.
        """
        stays = kept | {token["content"] for token in self.added}
        ordered = sorted(self.vocab, key=lambda token: self.vocab[token])
        ids = {token: i for i, token in enumerate(token for token in ordered if token in stays)}
        old = self.content["model"].get("merges", [])
        merges = [
            spelt
            for spelt, (left, right) in zip(old, self.merges, strict=True)
            if left in ids and right in ids and left + right in ids
        ]
        content = self.content | {
            "added_tokens": [token | {"id": ids[token["content"]]} for token in self.added],
            "post_processor": renumbered(self.content.get("post_processor"), ids),
            "model": self.content["model"] | {"vocab": ids, "merges": merges},
        }
        if padding := content.get("padding"):
            content["padding"] = padding | {"pad_id": ids[padding["pad_token"]]}
        return TokenizerJson(self.folder, content)

    def write(self, folder: Path) -> None:
        """Write this tokenizer and the other tokenizer files of its folder, for AutoTokenizer to load."""
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(self.folder, folder)
        write_atomic(folder / "tokenizer.json", json.dumps(self.content, ensure_ascii=False, indent=2) + "\n")
        config = read_json(self.folder / "tokenizer_config.json")
        listed = config.get("added_tokens_decoder") if isinstance(config, dict) else None
        if not listed:
            return
        if lost := [token["content"] for token in listed.values() if token["content"] not in self.vocab]:
            raise ModelError(
                f"{self.folder}: tokenizer_config.json lists {lost[:3]}, which tokenizer.json does not have",
                hint=SAVE_ONCE,
            )
        followed = {str(self.vocab[token["content"]]): token for token in listed.values()}
        if followed != listed:
            text = json.dumps(config | {"added_tokens_decoder": followed}, ensure_ascii=False, indent=2)
            write_atomic(folder / "tokenizer_config.json", text + "\n")


@cache
def byte_alphabet() -> tuple[str, ...]:
    """Character of each byte in byte-level BPE (GPT-2): printable Latin-1 as itself, the rest from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def to_byte_level(text: str) -> str:
    """`text` as byte-level BPE spells it."""
    return spelt_bytes(text.encode("utf-8"))


def spelt_bytes(raw: bytes) -> str:
    """`raw`, whole characters or not, as byte-level BPE spells it."""
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in raw)


def from_byte_level(token: str) -> bytes:
    """Bytes of a byte-level token. Raises KeyError on a character outside the alphabet."""
    byte_of = _byte_of()
    return bytes(byte_of[char] for char in token)


@cache
def _byte_of() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_alphabet())}


def renumbered(step: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor whose control tokens have the ids of `ids`."""
    if step is None:
        return None
    new = dict(step)
    if step["type"] == "Sequence":
        new["processors"] = [renumbered(inner, ids) for inner in step["processors"]]
    if step["type"] == "TemplateProcessing":
        new["special_tokens"] = {
            name: token | {"ids": [ids[text] for text in token["tokens"]]}
            for name, token in step["special_tokens"].items()
        }
    for key in {"sep", "cls"} & step.keys():  # BertProcessing, RobertaProcessing: [token, id]
        new[key] = [step[key][0], ids[step[key][0]]]
    return new


def _pair(merge: str | list[str]) -> Pair:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer; a Sequence is opened."""
    if part is None:
        return
    inside = [step for key in ("normalizers", "pretokenizers") for step in part.get(key, [])]
    if not inside:
        yield part
    for step in inside:
        yield from _steps(step)

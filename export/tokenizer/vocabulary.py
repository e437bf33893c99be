"""A Hugging Face tokenizer as the vocabulary section of a GGUF file.

Three kinds of tokenizer.json have a counterpart in llama.cpp:

    "gpt2"   byte-level BPE: merges are written as they are        (export/tokenizer/pretokenizers.py: the cuts)
    "llama"  SentencePiece-like BPE with byte fallback: by scores  (export/tokenizer/sentencepiece.py)
    "t5"     single characters without merges or byte fallback: every cut is forced, and unlike
             "llama" an unknown character gives the unknown token instead of ending the process

The list always has one entry per embedding row; rows that no token owns become [PADi], type UNUSED.
Added tokens are found in a text before anything else: special ones are CONTROL, the others USER_DEFINED.
What llama.cpp would tokenise differently is refused. Equality is proved by export.verify, not here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.tokenizer.pretokenizers import RECURSIVE, name_of
from export.tokenizer.sentencepiece import (
    SPACE,
    SPACE_NOTES,
    order_of_merges,
    space_first,
    space_prefix,
    unlisted,
)
from export.tokenizer.special_tokens import (
    ALWAYS_READ,
    CONTROL_BY_TEXT,
    added_around,
    check_added,
    notes_on,
    special_ids,
)
from foundation.errors import ModelError
from foundation.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # tokenizer.ggml.token_type
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
NO_SCORE = {BYTE: 0.0, CONTROL: -1000.0, USER_DEFINED: -1000.0, UNUSED: -10000.0}  # as llama.cpp's converter


@dataclass
class Vocabulary:
    """Everything that the tokenizer section of a GGUF file says."""

    model: str  # "gpt2", "llama" or "t5"
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # None for "gpt2"
    merges: list[str] | None  # None but for "gpt2"
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    ids: dict[str, int]  # bos, eos, eot, eom, pad, unk: those that exist
    chat_template: str | None
    notes: list[str] = field(default_factory=list)  # what the user should know


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of `folder`'s tokenizer for an embedding of `rows` rows.

    Raises ModelError: no tokenizer.json, a kind that llama.cpp lacks, more tokens than rows, no end token.
    """
    tokenizer = Tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = spec["model"]
    kind = _kind(spec)
    prefix = space_prefix(spec, bool(tokenizer.chat_template)) if kind != "gpt2" else False
    check_added(spec, tokenizer, prefix)
    merges = _merges(model)
    tokens, types = _tokens(spec, kind, rows)
    add_bos, add_eos, outer = added_around(spec)
    ids = special_ids(tokenizer, spec, tokens)
    for name, wanted in outer.items():
        if ids.setdefault(name, wanted) != wanted:
            raise ModelError(f"the tokenizer adds id {wanted} as {name}, its configuration says {ids[name]}")
    if "eos" not in ids:
        raise ModelError(
            f"{folder}: no end token is named, and llama.cpp would stop at an unrelated one",
            hint="set eos_token in tokenizer_config.json",
        )
    hidden = _hidden(tokenizer, tokens, types, merges, ids) if kind == "gpt2" else {}
    for i in hidden:
        tokens[i], types[i] = f"[PAD{i}]", UNUSED
    merges = [pair for pair in merges if "".join(pair) not in hidden.values()]
    if kind != "t5":
        ids.setdefault("bos", ids["eos"])  # else llama.cpp assumes id 11, or 1
    vocabulary = Vocabulary(
        model=kind,
        pre=name_of(spec.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        if kind == "gpt2"
        else "default",
        tokens=tokens,
        types=types,
        scores=None if kind == "gpt2" else _scores(order_of_merges(merges), tokens, types),
        merges=[" ".join(pair) for pair in merges] if kind == "gpt2" else None,
        add_space_prefix=prefix,
        add_bos=add_bos,
        add_eos=add_eos,
        ids=ids,
        chat_template=tokenizer.chat_template,
    )
    vocabulary.notes = _notes(spec, vocabulary, merges)
    if hidden:
        vocabulary.notes.append(
            f"left out: {', '.join(f'{i} {text!r}' for i, text in hidden.items())}; no text is encoded to it, "
            "and llama.cpp would make a control token of it"
        )
    return vocabulary


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write it to a GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _kind(spec: dict[str, Any]) -> str:
    """Which of llama.cpp's tokenizers this is."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"tokenizer model {model.get('type')!r} can not be exported; BPE can")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ModelError(f"tokenizer model has {key} {model[key]!r}, which llama.cpp lacks")
    if model.get("byte_fallback"):
        if sum(bool(BYTE_TOKEN.fullmatch(t)) for t in model["vocab"]) != 256:
            raise ModelError("the tokenizer falls back to bytes but lacks some of <0x00>..<0xFF>")
        return "llama"
    if '"ByteLevel"' in json.dumps(spec.get("pre_tokenizer")):
        normalizer = spec.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            raise ModelError(f"llama.cpp applies no normalizer; the tokenizer has {normalizer}")
        if not model["merges"]:
            raise ModelError("a byte-level tokenizer without merges can not be exported")
        lacking = _byte_alphabet() - model["vocab"].keys()
        if lacking and model.get("unk_token"):
            raise ModelError(
                f"the byte-level tokenizer lacks {len(lacking)} of the 256 byte letters and has unk_token "
                f"{model['unk_token']!r}: llama.cpp would drop what gives the unknown token",
                hint="train it with initial_alphabet=ByteLevel.alphabet()",
            )
        return "gpt2"
    if not model["merges"] and model.get("unk_token") and model.get("fuse_unk"):
        return "t5"
    raise ModelError(
        "a BPE tokenizer with neither byte-level nor byte-fallback letters has no counterpart in llama.cpp",
        hint="characters only (no merges, an unknown token, fuse_unk) can be exported, or retrain byte-level",
    )


def _tokens(spec: dict[str, Any], kind: str, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every embedding row."""
    added = {t["id"]: t for t in spec.get("added_tokens", [])}
    texts: dict[int, str] = {i: t for t, i in spec["model"]["vocab"].items()}
    texts.update({i: t["content"] for i, t in added.items()})
    largest = max(texts)
    if largest >= rows:
        beyond = sum(i >= rows for i in texts)
        raise ModelError(
            f"the tokenizer has ids up to {largest} ({texts[largest]!r}), the model only {rows} embedding rows "
            f"({beyond} tokens without)",
            hint="export the tokenizer that the model was trained with, or give the model rows for them",
        )
    alphabet = _byte_alphabet()
    tokens, types = [], []
    taken = set(texts.values())
    for i in range(rows):
        text = texts.get(i)
        if text is None:
            text = f"[PAD{i}]"
            while text in taken:  # llama.cpp ends the process when two rows share a text
                text += "_"
            kind_of = UNUSED
        elif i in added:
            kind_of = CONTROL if added[i]["special"] else USER_DEFINED
        elif kind == "llama" and BYTE_TOKEN.fullmatch(text):
            kind_of = BYTE
        else:
            kind_of = NORMAL
            if kind == "gpt2" and not alphabet.issuperset(text):
                raise ModelError(f"token {i} {text!r} is not written in the byte-level alphabet")
        if not text or "\0" in text:
            raise ModelError(f"token {i} {text!r} is empty or holds a zero byte")
        tokens.append(text)
        types.append(kind_of)
    if len(set(tokens)) != rows:
        first: dict[str, int] = {}
        shared = next((i, t) for i, t in enumerate(tokens) if first.setdefault(t, i) != i)
        raise ModelError(f"token ids {first[shared[1]]} and {shared[0]} share one text, {shared[1]!r}")
    return tokens, types


def _byte_alphabet() -> set[str]:
    """The 256 letters in which byte-level BPE writes bytes, and nothing else."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _hidden(
    tokenizer: Tokenizer,
    tokens: list[str],
    types: list[int],
    merges: list[tuple[str, str]],
    ids: dict[str, int],
) -> dict[int, str]:
    """Ordinary tokens that no text is encoded to and that llama.cpp would find in texts, as control tokens.

    Qwen2.5 has one: its 128247, "</s>", learnt from a file that was cut otherwise. Left as it is, llama.cpp
    would encode "</s>" in a user's text to it, and end a generation there.
    """
    found = {
        i: text
        for i, text in enumerate(tokens)
        if types[i] == NORMAL
        and i not in ids.values()
        and text in CONTROL_BY_TEXT | ALWAYS_READ
        and tokenizer.encode_marked(text) != [i]
        and f"[PAD{i}]" not in tokens
    }
    parts = {part for pair in merges for part in pair} if found else set()
    return {i: text for i, text in found.items() if text not in parts}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files write them as "a b". Of a pair listed twice the later rank counts."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    return sorted(ranks, key=ranks.__getitem__)


def _scores(order: dict[str, int], tokens: list[str], types: list[int]) -> list[float]:
    """Score of every token: minus its place in the order of merges; behind them what no merge makes."""
    scores = []
    behind = len(order)
    for token, kind in zip(tokens, types, strict=True):
        if token in order and kind in (NORMAL, USER_DEFINED):
            scores.append(-float(order[token]))
        elif kind == NORMAL:  # a single character: nothing joins it, so that its score is never asked for
            scores.append(-float(behind))
            behind += 1
        else:
            scores.append(NO_SCORE[kind])
    return scores


def _notes(spec: dict[str, Any], vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> list[str]:
    """What llama.cpp may do otherwise, for the log; export.verify measures it."""
    notes = []
    if vocabulary.model == "gpt2" and spec.get("normalizer"):
        notes.append("the tokenizer composes letters (NFC), llama.cpp does not: decomposed text differs")
    if vocabulary.pre in RECURSIVE:
        notes.append(
            f"llama.cpp cuts text as {vocabulary.pre} by recursion: a run of some 25,000 letters without a cut "
            "ends its process; limit what a server lets in"
        )
    if vocabulary.model != "gpt2" and space_first(spec):
        notes.append(SPACE_NOTES[vocabulary.add_space_prefix])
    if vocabulary.model == "llama":
        added = {t["content"] for t in spec.get("added_tokens", [])}
        pieces = spec["model"]["vocab"]
        # llama.cpp finds added tokens before it joins anything, but for those with a space written ▁
        joined = [t for t in vocabulary.tokens if t not in added or SPACE in t]
        listed = set(merges)
        loose = unlisted(joined, pieces, listed)
        if loose:
            notes.append(f"llama.cpp can make {loose} merges that tokenizer.json does not list")
        control = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL]
        if unlisted(control, pieces, listed):
            named = [repr(t) for t in control if unlisted([t], pieces, listed)]
            notes.append(
                f"llama.cpp can join letters to the control tokens {', '.join(named)}, also in a user's text"
            )
    return notes + notes_on(vocabulary.tokens, vocabulary.ids, spec.get("added_tokens", []))

"""A Hugging Face tokenizer as the vocabulary section of a GGUF file.

Three kinds of tokenizer.json have a counterpart in llama.cpp:

    "gpt2"   byte-level BPE: merges are written as they are
    "llama"  SentencePiece-like BPE with byte fallback: llama.cpp merges by a token's score, so the
             score is minus the lowest rank among the merges that make it
    "t5"     single characters without merges or byte fallback: every cut is forced, and unlike
             "llama" an unknown character gives the unknown token instead of ending the process

The list always has one entry per embedding row; rows that no token owns become [PADi], type UNUSED.
What llama.cpp would tokenise differently is refused. Equality is proved by export.verify, not here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.pretokenizers import name_of
from foundation.errors import ModelError
from foundation.files import read_json
from foundation.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPACE = "▁"  # how SentencePiece writes a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


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
    prefix = _space_prefix(spec) if kind != "gpt2" else False
    _check_added(spec, kind, prefix)
    tokens, types = _tokens(spec, kind, rows)
    add_bos, add_eos, outer = _added_around(folder)
    ids = _special_ids(tokenizer, spec, rows)
    for name, wanted in outer.items():
        if ids.setdefault(name, wanted) != wanted:
            raise ModelError(f"the tokenizer adds id {wanted} as {name}, its configuration says {ids[name]}")
    if "eos" not in ids:
        raise ModelError(
            f"{folder}: no end token is named, and llama.cpp would stop at an unrelated one",
            hint="set eos_token in tokenizer_config.json",
        )
    if kind == "gpt2":
        ids.setdefault("bos", ids["eos"])  # else llama.cpp assumes id 11
    vocabulary = Vocabulary(
        model=kind,
        pre=name_of(spec.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        if kind == "gpt2"
        else "default",
        tokens=tokens,
        types=types,
        scores=None if kind == "gpt2" else _scores(model, tokens, types),
        merges=[" ".join(pair) for pair in _merges(model)] if kind == "gpt2" else None,
        add_space_prefix=prefix,
        add_bos=add_bos,
        add_eos=add_eos,
        ids=ids,
        chat_template=tokenizer.chat_template,
    )
    vocabulary.notes = _notes(spec, kind)
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
        return "gpt2"
    if not model["merges"] and model.get("unk_token") and model.get("fuse_unk"):
        return "t5"
    raise ModelError(
        "a BPE tokenizer with neither byte-level nor byte-fallback letters has no counterpart in llama.cpp",
        hint="characters only (no merges, an unknown token, fuse_unk) can be exported, or retrain byte-level",
    )


def _pre(spec: dict[str, Any]) -> str:
    return name_of(spec.get("pre_tokenizer"), bool(spec["model"].get("ignore_merges")))


def _space_prefix(spec: dict[str, Any]) -> bool:
    """True when a space is put before every piece of text. Raises ModelError for other normalizations."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = normalizer.get("normalizers") if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    unsplit = pre is None or (pre.get("type") == "Split" and pre.get("pattern") == {"String": " "})
    if unsplit and steps == [prepend, replace]:
        return True
    if unsplit and steps == [replace]:
        return False
    if normalizer is None and pre and pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE:
        if pre.get("split", True) and any(SPACE in t[1:] for t in spec["model"]["vocab"]):
            raise ModelError("the tokenizer splits at spaces but has tokens with a space inside")
        if pre.get("prepend_scheme") == "never":
            return False
        raise ModelError(
            f"Metaspace with prepend_scheme {pre.get('prepend_scheme')!r}: llama.cpp puts a space before every "
            "piece of text or before none, also where there is one already",
            hint="use prepend_scheme 'never', or the normalizers Prepend and Replace instead of Metaspace",
        )
    raise ModelError(f"normalizer {normalizer} with pre-tokenizer {pre} has no counterpart in llama.cpp")


def _check_added(spec: dict[str, Any], kind: str, prefix: bool) -> None:
    """Refuse added tokens that match text in ways llama.cpp lacks."""
    for token in spec.get("added_tokens", []):
        flags = [k for k in ("lstrip", "rstrip", "single_word") if token.get(k)]
        if kind != "gpt2" and prefix and token.get("normalized"):
            flags.append("normalized (with a space put first)")
        if flags:
            raise ModelError(
                f"added token {token['content']!r} is {', '.join(flags)}, which llama.cpp can not match",
                hint="add it with AddedToken(text, normalized=False)",
            )


def _tokens(spec: dict[str, Any], kind: str, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every embedding row."""
    added = {t["id"]: t for t in spec.get("added_tokens", [])}
    texts: dict[int, str] = {i: t for t, i in spec["model"]["vocab"].items()}
    texts.update({i: t["content"] for i, t in added.items()})
    largest = max(texts)
    if largest >= rows:
        raise ModelError(f"the tokenizer has ids up to {largest}, the model only {rows} embedding rows")
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
        raise ModelError("two token ids share one text")
    return tokens, types


def _byte_alphabet() -> set[str]:
    """The 256 letters in which byte-level BPE writes bytes, and nothing else."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files write them as "a b"."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Score of every token: minus its lowest merge rank; far below for what no merge makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    other = {BYTE: 0.0, CONTROL: -1000.0, USER_DEFINED: -1000.0, UNUSED: -1e6, NORMAL: -1e6}
    return [
        -float(ranks[t]) if kind == NORMAL and t in ranks else other[kind]
        for t, kind in zip(tokens, types, strict=True)
    ]


def _notes(spec: dict[str, Any], kind: str) -> list[str]:
    """What llama.cpp may do otherwise, for the log; export.verify measures it."""
    notes = []
    if kind == "gpt2" and spec.get("normalizer"):
        notes.append("the tokenizer composes letters (NFC), llama.cpp does not: decomposed text differs")
    if kind == "llama":
        vocab, pairs = spec["model"]["vocab"], set(_merges(spec["model"]))
        loose = sum(
            1
            for token in vocab
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab and (token[:cut], token[cut:]) not in pairs
        )
        if loose:
            notes.append(f"llama.cpp can make {loose} merges that tokenizer.json does not list")
    return notes


def _added_around(folder: Path) -> tuple[bool, bool, dict[str, int]]:
    """(adds a beginning token, adds an end token, their ids) by what the post-processor does to a text."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    plain, dressed = (backend.encode("a", add_special_tokens=s).ids for s in (False, True))
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain), 0)
    before, after = dressed[:at], dressed[at + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise ModelError(
            f"the tokenizer puts ids {before} before and {after} after a text; llama.cpp puts one at most"
        )
    outer = {name: ids[0] for name, ids in (("bos", before), ("eos", after)) if ids}
    return bool(before), bool(after), outer


def _special_ids(tokenizer: Tokenizer, spec: dict[str, Any], rows: int) -> dict[str, int]:
    """Ids by role: from the tokenizer's names first, then from generation_config.json and config.json."""
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = tokenizer.config.get(f"{role}_token") or (
            spec["model"].get("unk_token") if role == "unk" else None
        )
        token = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.id_of(token) if token else None
        if found is not None:
            ids[role] = found
    for source in ("generation_config.json", "config.json"):
        values = read_json(tokenizer.folder / source) or {}
        for role in ("bos", "eos", "pad"):
            given = values.get(f"{role}_token_id")
            given = given if isinstance(given, list) else [given]
            listed = [i for i in given if isinstance(i, int) and 0 <= i < rows]
            if listed:
                ids.setdefault(role, listed[0])
            if role == "eos":  # a chat model may end its turn and its text with different tokens
                others = (i for i in listed if i != ids["eos"])
                for name, token in zip(("eot", "eom"), others, strict=False):
                    ids.setdefault(name, token)
    return ids

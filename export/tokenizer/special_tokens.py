"""Special tokens: what tokenizer.json and the configurations say, and what llama.cpp makes of it.

llama.cpp reads eos, eot and eom from keys, and ends a generation at all three. Besides, it ends at tokens
that it knows by their text alone, whatever the model says, and makes control tokens of them. It finds added
tokens in a text longest first; `tokenizers` finds them from the left. It strips no spaces around a token and
knows no word borders, except for models whose name holds "phi-3" (export.gguf refuses such names).

Source: llama.cpp, src/llama-vocab.cpp, "auto-detect special tokens by text" and tokenizer_st_partition.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from export.tokenizer.sentencepiece import SPACE
from foundation.errors import ModelError
from foundation.files import read_json
from foundation.tokenizer import SAVE_ONCE, Tokenizer

END_KEYS = ("eos", "eot", "eom")  # tokenizer.ggml.X_token_id, in the order in which they are given out
# fmt: off
ENDS_BY_TEXT = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    )
)
# the first token of each group that llama.cpp meets ends a generation too: filling, repository, file
FILL_ENDS_BY_TEXT = (
    frozenset(("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    frozenset(("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    frozenset(("<|file_sep|>",)),
)
_FILL_BY_TEXT = frozenset(
    (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
        "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>",
        "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    )
)
# fmt: on
CONTROL_BY_TEXT = ENDS_BY_TEXT | _FILL_BY_TEXT | frozenset().union(*FILL_ENDS_BY_TEXT)
ALWAYS_READ = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))  # made user-defined


def check_added(spec: dict[str, Any], tokenizer: Tokenizer, prefix: bool) -> None:
    """Refuse added tokens that match text in ways llama.cpp lacks, and ids that the library would not give.

    `prefix`: a space is put before every piece of text, as a step of the normalizer.
    """
    normalizer = spec.get("normalizer")
    for token in spec.get("added_tokens", []):
        text = token["content"]
        flags = [k for k in ("lstrip", "rstrip", "single_word") if token.get(k)]
        if token.get("normalized") and normalizer is not None:
            if prefix:
                flags.append("normalized (with a space put first)")
            elif '"Replace"' in str(normalizer).replace("'", '"') and SPACE in text:
                flags.append(f"normalized (and holds {SPACE}, which stands for a space then)")
            elif _composed(text) != text and "NFC" in str(normalizer):
                flags.append("normalized (and not composed)")
        if flags:
            raise ModelError(
                f"added token {text!r} is {', '.join(flags)}, which llama.cpp can not match",
                hint="add it with AddedToken(text, normalized=False)",
            )
        if tokenizer.id_of(text) != token["id"]:
            raise ModelError(
                f"added token {text!r} has id {token['id']} in tokenizer.json, but the tokenizers library "
                f"gives it {tokenizer.id_of(text)}",
                hint=SAVE_ONCE,
            )
    listed = {t["content"] for t in spec.get("added_tokens", [])}
    for number, token in (tokenizer.config.get("added_tokens_decoder") or {}).items():
        text = str(token.get("content") if isinstance(token, dict) else token)
        if text not in listed or tokenizer.id_of(text) != int(number):
            raise ModelError(
                f"tokenizer_config.json adds token {number} {text!r}, and tokenizer.json does not: "
                "transformers would add it when it loads the folder",
                hint=SAVE_ONCE,
            )


def overlapping(added: Iterable[dict[str, Any]]) -> list[str]:
    """Texts in which llama.cpp finds other added tokens than `tokenizers`, for tokens such as "ab", "bcd"."""
    tokens = list(added)
    exact = {t["content"] for t in tokens if not t.get("normalized")}
    later = {t["content"] for t in tokens if t.get("normalized")}
    heads: dict[str, list[str]] = {}
    for text in sorted(exact | later):
        for cut in range(1, len(text)):
            heads.setdefault(text[:cut], []).append(text)
    joined = {
        text + other[len(text) - cut :]
        for text in exact | later
        for cut in range(1, len(text))
        for other in heads.get(text[cut:], ())
    }
    every = sorted(exact | later)
    return sorted(
        text
        for text in joined
        # of two equally long tokens llama.cpp may take either
        if any(_from_the_left(text, exact, later) != _longest_first(text, t) for t in (every, every[::-1]))
    )


def added_around(spec: dict[str, Any]) -> tuple[bool, bool, dict[str, int]]:
    """(adds a beginning token, adds an end token, their ids) by what the post-processor does to a text.

    Asked of a tokenizer of one letter with that post-processor: the whole vocabulary would take seconds.
    """
    from tokenizers import Tokenizer as Backend

    letter = 1 << 30  # an id that no special token has
    model = {"type": "BPE", "vocab": {"a": letter}, "merges": []}
    small: dict[str, Any] = {
        "version": "1.0",
        "model": model,
        "post_processor": spec.get("post_processor"),
        "added_tokens": [],
    }
    dressed = Backend.from_str(json.dumps(small)).encode("a").ids
    at = dressed.index(letter)
    before, after = dressed[:at], dressed[at + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise ModelError(
            f"the tokenizer puts ids {before} before and {after} after a text; llama.cpp puts one at most",
            hint="leave one token on each side in the post_processor of tokenizer.json",
        )
    outer = {name: ids[0] for name, ids in (("bos", before), ("eos", after)) if ids}
    return bool(before), bool(after), outer


def special_ids(tokenizer: Tokenizer, spec: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Ids by role, for tokens by row: the tokenizer's names first, then generation_config.json, config.json.

    A chat model may end its turn and its text with different tokens: the ends beyond eos that llama.cpp does
    not know by their text take the keys eot and eom. Raises ModelError when there are more of them.
    """
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = tokenizer.config.get(f"{role}_token") or (
            spec["model"].get("unk_token") if role == "unk" else None
        )
        token = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.id_of(token) if token else None
        if found is not None:
            ids[role] = found
        elif token and role == "eos":
            raise ModelError(
                f"{tokenizer.folder}: eos_token {token!r} is not in tokenizer.json", hint=SAVE_ONCE
            )
    ends: list[int] = []
    for source in ("generation_config.json", "config.json"):
        values = read_json(tokenizer.folder / source) or {}
        for role in ("bos", "eos", "pad"):
            given = values.get(f"{role}_token_id")
            given = given if isinstance(given, list) else [given]
            listed = [i for i in given if isinstance(i, int) and 0 <= i < len(tokens)]
            if listed:
                ids.setdefault(role, listed[0])
            if role == "eos":
                ends = ends or listed  # config.json counts only where generation_config.json names none
    others = [i for i in dict.fromkeys(ends) if i != ids.get("eos")]
    needing = [i for i in others if tokens[i] not in ENDS_BY_TEXT]
    if len(needing) > len(END_KEYS) - 1:
        named = ", ".join(f"{i} {tokens[i]!r}" for i in [ids["eos"], *needing])
        raise ModelError(
            f"{tokenizer.folder}: generation ends at {named}; a GGUF file names three ends at most, besides "
            "those that llama.cpp knows by their text",
            hint="leave in generation_config.json the eos_token_id that the model was taught to write",
        )
    known = [i for i in others if i not in needing]
    ids |= dict(zip(END_KEYS[1:], sorted([*needing, *known][:2], key=others.index), strict=False))
    return ids


def ends_of(tokens: list[str], ids: dict[str, int]) -> set[int]:
    """All ids at which llama.cpp will end a generation. Of two tokens of one fill group it takes only one."""
    by_text = ENDS_BY_TEXT.union(*FILL_ENDS_BY_TEXT)
    out = {i for i, text in enumerate(tokens) if text in by_text} | {ids[k] for k in END_KEYS if k in ids}
    texts = {tokens[i] for i in out}
    if "<|end|>" in texts and texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
        out.remove(tokens.index("<|end|>"))  # the end of a part of an answer there
    if "</s>" in texts and texts & {"<|tool_response>", "<|plamo:eos|>"}:
        out.remove(tokens.index("</s>"))
    return out


def notes_on(tokens: list[str], ids: dict[str, int], added: list[dict[str, Any]]) -> list[str]:
    """What llama.cpp does to special tokens by their text, and the user should know."""
    notes = []
    meant = {ids[key] for key in END_KEYS if key in ids}
    extra = [repr(tokens[i]) for i in sorted(ends_of(tokens, ids) - meant)]
    if extra:
        notes.append(f"llama.cpp also ends a generation at {', '.join(extra)}, which it knows by their text")
    special = {t["content"]: bool(t["special"]) for t in added}
    made = [repr(t) for t in tokens if t in CONTROL_BY_TEXT and not special.get(t)]
    if made:
        notes.append(
            f"llama.cpp makes control tokens of {', '.join(made)}, which are not special in tokenizer.json"
        )
    read = [repr(t) for t in tokens if t in ALWAYS_READ and special.get(t, True)]
    if read:
        notes.append(f"llama.cpp reads {', '.join(read)} as tokens in any text, also in a user's")
    crossing = overlapping(added)
    if crossing:
        notes.append(
            f"added tokens overlap in {len(crossing)} ways; llama.cpp takes the longer one and tokenizers the "
            f"left one, as in {crossing[0]!r}"
        )
    return notes


def _composed(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


def _from_the_left(text: str, exact: set[str], later: set[str]) -> list[str]:
    """Pieces of `text` as `tokenizers` cuts it: the exact tokens first, each time leftmost, then longest."""
    pieces = [text]
    for tokens in (exact, later):
        if tokens:
            pattern = "|".join(map(re.escape, sorted((t for t in tokens if t in text), key=len, reverse=True)))
            done = exact if tokens is later else set()
            pieces = [
                part
                for piece in pieces
                for part in ([piece] if piece in done or not pattern else re.split(f"({pattern})", piece))
            ]
    return [piece for piece in pieces if piece]


def _longest_first(text: str, tokens: list[str]) -> list[str]:
    """Pieces of `text` as llama.cpp cuts it; of equally long tokens the first in `tokens` goes first."""
    pieces = [(text, False)]
    for token in sorted((t for t in tokens if t in text), key=lambda t: -len(t.encode())):
        cut = []
        for piece, found in pieces:
            parts = [piece] if found else re.split(f"({re.escape(token)})", piece)
            cut += [(part, found or part == token) for part in parts]
        pieces = cut
    return [piece for piece, _ in pieces if piece]

"""What llama.cpp's "llama" tokenizer makes of a tokenizer.json with byte fallback, SentencePiece's family.

llama.cpp joins the two neighbours that make the token of the highest score, the left ones first; it knows no
merges. tokenizer.json lists merges. The two agree where every split of a token is a merge and the splits of
one token have ranks side by side, as in every file made from a SentencePiece model: then a score is minus
the place of the token in the order of merges. tokenizer.model has other numbers in the same order, and only
the order counts: both cut every text alike (tests compare them for Mistral).

Two differences stay. Of two splits of one token tokenizer.json prefers the earlier merge, llama.cpp (and
SentencePiece) the left place: it shows in long runs of one character, such as forty spaces. And Metaspace
with prepend_scheme "first" (Mistral v0.3, the Llama tokenizers that transformers 5 saves but for those with
legacy=True) puts a space where a text begins, unless there is one or an added token; llama.cpp puts one there
and after every added token, or nowhere. A tokenizer with a chat template gets nowhere: chats begin with a
special token. One without gets everywhere: raw text has no special tokens. SPACE_NOTES says what is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from foundation.errors import ModelError

SPACE = "▁"  # how SentencePiece writes a space
SPACE_NOTES = {  # by what llama.cpp is told
    False: "the tokenizer puts a space where a text begins, llama.cpp puts none, so that chats are tokenised "
    "alike: let every text that does not begin with a special token, also a template's, begin with a space",
    True: "the tokenizer puts a space where a text begins, unless there is one; llama.cpp puts one there in "
    "any case, and one after every added token inside a text",
}


def space_first(spec: dict[str, Any]) -> bool:
    """True when a space is put at the beginning of a whole text and nowhere else."""
    pre = spec.get("pre_tokenizer") or {}
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme") == "first"


def space_prefix(spec: dict[str, Any], chats: bool) -> bool:
    """True when llama.cpp shall put a space before every piece of text. Raises ModelError for other
    normalizations. `chats`: there is a chat template; it decides where the space stands first alone.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = normalizer.get("normalizers") if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    # a split at spaces does nothing after the normalizer has replaced them all: Gemma has one
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
        if space_first(spec):
            return not chats
        raise ModelError(
            f"Metaspace with prepend_scheme {pre.get('prepend_scheme')!r}: llama.cpp puts a space before every "
            "piece of text also where there is one already, as in '[INST] text'",
            hint="use the form that the model was trained with: prepend_scheme 'first' or 'never', or the "
            "normalizers Prepend and Replace instead of Metaspace (Llama 2's legacy form)",
        )
    raise ModelError(f"normalizer {normalizer} with pre-tokenizer {pre} has no counterpart in llama.cpp")


def order_of_merges(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Place of every token that merges make, in the order in which they can first be made."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    return order


def unlisted(tokens: Iterable[str], pieces: Mapping[str, Any], merges: Collection[tuple[str, str]]) -> int:
    """How many splits of `tokens` into two of `pieces` are no merges: llama.cpp can join them all the same.

    Only halves as long as the longest piece are looked at: the time is linear in the characters of `tokens`.
    """
    longest = max(map(len, pieces), default=0)
    return sum(
        (token[:cut], token[cut:]) not in merges
        for token in tokens
        for cut in range(max(1, len(token) - longest), min(len(token), longest + 1))
        if token[:cut] in pieces and token[cut:] in pieces
    )

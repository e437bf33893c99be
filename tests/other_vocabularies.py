"""New vocabularies for the tiny tokenizer, made by the library or by hand, and what their tokens were before.

Not made by adaptation.vocabulary: what is done with a vocabulary should not hang on how ours are made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from adaptation.extension import extend
from adaptation.tokenizer_json import TokenizerJson, to_byte_level

Kind = Literal["extension", "substitution", "optimised"]
KINDS: tuple[Kind, ...] = ("extension", "substitution", "optimised")
WORDS = ("штурман", " штурман", " ёжик", "объясняет", " стюардесса")
OTHER_TEXTS = [
    "Штурман объясняет экипажу маршрут, а стюардесса слушает пилота.",
    "Ёжик спит; the pilot and the crew explain the route to a hedgehog.",
] * 20


def new_vocabulary(kind: Kind, base: Path, folder: Path) -> Path:
    """A tokenizer folder of this kind for the byte-level tokenizer in `base`.

    extension: WORDS as tokens. substitution: learnt from other texts. optimised: two of three merges of the
    base, then WORDS. In the last two control tokens get other ids.
    """
    old = TokenizerJson.read(base)
    if kind == "substitution":
        TokenizerJson(base, learnt(old)).write(folder)
        return folder
    start = TokenizerJson(base, thinned(old)) if kind == "optimised" else old
    extend(start, {to_byte_level(word): 3 for word in WORDS}, []).write(folder)
    return folder


def learnt(old: TokenizerJson) -> dict[str, Any]:
    """tokenizer.json of 330 tokens of other texts, and the old control tokens at the end, in another order."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    backend = Tokenizer.from_str(json.dumps(old.content | {"added_tokens": []}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(OTHER_TEXTS, trainer)
    content = json.loads(backend.to_str())
    control = [t | {"id": 330 + n} for n, t in enumerate(reversed(old.added))]
    content["model"]["vocab"] |= {t["content"]: t["id"] for t in control}
    return content | {"added_tokens": control}


def thinned(old: TokenizerJson) -> dict[str, Any]:
    """tokenizer.json without every third merge and what can not be made without it; control tokens last."""
    vocab: dict[str, int] = old.content["model"]["vocab"]
    added = [t["content"] for t in old.added]
    stay = {token for token in vocab if len(token) == 1}
    merges = []
    for place, (left, right) in enumerate(old.merges):
        if place % 3 and left in stay and right in stay:
            stay.add(left + right)
            merges.append([left, right])
    ordered = [token for token in vocab if token in stay] + added
    ids = {token: i for i, token in enumerate(ordered)}
    return old.content | {
        "added_tokens": [t | {"id": ids[t["content"]]} for t in old.added],
        "model": old.content["model"] | {"vocab": ids, "merges": merges},
    }


def before(new: Path, old: Path) -> dict[int, list[int]]:
    """New id -> old ids: the same token's, or what a naive BPE makes of it. Both byte-level."""
    new_json, old_json = (json.loads((folder / "tokenizer.json").read_text()) for folder in (new, old))
    theirs = {t["content"]: t["id"] for t in old_json["added_tokens"]}
    control = {t["content"] for t in new_json["added_tokens"]}
    vocab = old_json["model"]["vocab"]
    found = {t["id"]: [theirs[t["content"]]] for t in new_json["added_tokens"]}
    for token, i in new_json["model"]["vocab"].items():
        if token not in control:
            found[i] = [vocab[token]] if token in vocab else naive_bpe(token, old_json["model"])
    return dict(sorted(found.items()))


def naive_bpe(token: str, model: dict[str, Any]) -> list[int]:
    """Ids of a token under the merges of a tokenizer.json: the first merge that fits, at its first place."""
    symbols = list(token)
    ranks = {tuple(m.split(" ") if isinstance(m, str) else m): n for n, m in enumerate(model["merges"])}
    while True:
        fits = [
            (ranks[pair], i) for i in range(len(symbols) - 1) if (pair := tuple(symbols[i : i + 2])) in ranks
        ]
        if not fits:
            return [model["vocab"][symbol] for symbol in symbols]
        i = min(fits)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]

"""Token ids in a model's configuration follow their tokens into another vocabulary.

config.json and generation_config.json name tokens by number: where an answer ends, what is never said. In
another vocabulary those numbers are other tokens, and nothing complains: the model merely never stops.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError
from foundation.files import read_json, write_json

GENERATION = "generation_config.json"
ONE_TOKEN = re.compile(
    r".*_token_ids?|.*_token_index"
)  # eos_token_id, image_token_index, ...: a number or a list
TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")

Follow = Callable[[int, str], int]


def follow_ids(config: dict[str, Any], old: TokenizerJson, new: TokenizerJson) -> dict[str, Any]:
    """`config` with the ids of `new` for the tokens that it names by ids of `old`.

    Numbers below zero stand for no token, and stay. Raises ModelError, naming every one, for tokens that are
    gone and ids that were none.
    """
    if all(new.vocab.get(token) == i for token, i in old.vocab.items()):
        return config  # every token kept its id; a number that is no token's is then as right as it was
    by_id = {i: token for token, i in old.vocab.items()}
    problems: list[str] = []

    def follow(i: int, where: str) -> int:
        token = by_id.get(i)
        if i >= 0 and token is None:
            problems.append(f"{where} = {i} is no token of {old.folder}")
        elif token is not None and token not in new.vocab:
            problems.append(f"{where} = {i} is {token!r}, which is not in the new vocabulary")
        return i if token is None else new.vocab.get(token, i)

    followed = _followed(config, follow)
    if problems:
        raise ModelError(
            "; ".join(problems),
            hint="keep these tokens in the new vocabulary, or take the setting out of the configuration",
        )
    return followed


def write_generation_config(source: Path, target: Path, old: TokenizerJson, new: TokenizerJson) -> None:
    """The generation_config.json of folder `source` in folder `target`, if there is one; its ids follow."""
    path = source / GENERATION
    if not path.is_file():
        return
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: a JSON object is needed", hint="remove the file, or copy it again")
    followed = follow_ids(config, old, new)
    if followed == config:
        (target / GENERATION).write_bytes(path.read_bytes())
    else:
        write_json(target / GENERATION, followed)


def _followed(part: dict[str, Any], follow: Follow) -> dict[str, Any]:
    """A table of the configuration, tables inside it included."""
    found: dict[str, Any] = {}
    for key, value in part.items():
        if isinstance(value, dict):
            found[key] = _followed(value, follow)
        elif ONE_TOKEN.fullmatch(key) or key in TOKENS:
            found[key] = _each(value, key, follow)
        elif key == "forced_decoder_ids" and value:  # [position, id]
            found[key] = [[place, _each(i, key, follow)] for place, i in value]
        elif key == "sequence_bias" and isinstance(value, list):  # [ids, bias]
            found[key] = [[_each(ids, key, follow), bias] for ids, bias in value]
        else:
            found[key] = value
    return found


def _each(value: Any, where: str, follow: Follow) -> Any:
    """The numbers in `value`, a number or lists of them."""
    if isinstance(value, list):
        return [_each(inner, where, follow) for inner in value]
    return follow(value, where) if isinstance(value, int) and not isinstance(value, bool) else value

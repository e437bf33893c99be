"""Token ids in configurations follow their tokens; what can not follow is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptation.ids import follow_ids, write_generation_config
from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError

LETTERS = "abcdefghij"


def tokenizer(order: str, folder: str = "t") -> TokenizerJson:
    """Tokens in this order of ids."""
    content = {
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(order)}, "merges": []},
    }
    return TokenizerJson(Path(folder), content)


OLD = tokenizer(LETTERS, "old")
CONFIG: dict[str, Any] = {
    "vocab_size": 10,
    "bos_token_id": None,
    "eos_token_id": [2, 7],
    "pad_token_id": -1,
    "num_hidden_layers": 3,
    "image_token_index": 4,
    "text_config": {"eos_token_id": 2, "sliding_window": 5},
    "suppress_tokens": [1, 3],
    "begin_suppress_tokens": [5],
    "bad_words_ids": [[1, 2], [3]],
    "forced_bos_token_id": 6,
    "forced_decoder_ids": [[1, 8], [2, 9]],
    "sequence_bias": [[[1, 2], -3.5]],
    "temperature": 0.7,
    "use_cache": True,
}


def test_each_kind_of_id_follows() -> None:
    """Reversed, id i becomes 9 - i; sizes, positions, biases and other numbers stay."""
    assert follow_ids(CONFIG, OLD, tokenizer(LETTERS[::-1])) == {
        "vocab_size": 10,
        "bos_token_id": None,
        "eos_token_id": [7, 2],
        "pad_token_id": -1,
        "num_hidden_layers": 3,
        "image_token_index": 5,
        "text_config": {"eos_token_id": 7, "sliding_window": 5},
        "suppress_tokens": [8, 6],
        "begin_suppress_tokens": [4],
        "bad_words_ids": [[8, 7], [6]],
        "forced_bos_token_id": 3,
        "forced_decoder_ids": [[1, 1], [2, 0]],
        "sequence_bias": [[[8, 7], -3.5]],
        "temperature": 0.7,
        "use_cache": True,
    }


@settings(deadline=None)
@given(st.permutations(LETTERS))
def test_there_and_back_is_where_it_was(order: list[str]) -> None:
    new = tokenizer("".join(order))
    there = follow_ids(CONFIG, OLD, new)
    assert [order[i] for i in there["eos_token_id"]] == ["c", "h"]
    assert follow_ids(there, new, OLD) == CONFIG


def test_an_extension_changes_nothing() -> None:
    """Not even an id that no token has, which a model may carry from its makers' defaults."""
    config = CONFIG | {"eos_token_id": 77}
    assert follow_ids(config, OLD, tokenizer(LETTERS + "kl")) == config


def test_every_token_that_is_gone_is_named() -> None:
    config = {"eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [9, 1], "bos_token_id": 77}
    with pytest.raises(ModelError) as refusal:
        follow_ids(config, OLD, tokenizer("bdefghi"))
    assert str(refusal.value).splitlines()[0] == (
        "eos_token_id = 2 is 'c', which is not in the new vocabulary; "
        "pad_token_id = 0 is 'a', which is not in the new vocabulary; "
        "suppress_tokens = 9 is 'j', which is not in the new vocabulary; "
        "bos_token_id = 77 is no token of old"
    )


def test_a_generation_config_keeps_its_bytes_unless_an_id_moves(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    write_generation_config(source, target, OLD, OLD)
    assert list(target.iterdir()) == []
    text = '{"temperature":0.3,\n"eos_token_id":[2]}'
    (source / "generation_config.json").write_text(text)
    write_generation_config(source, target, OLD, tokenizer(LETTERS + "k"))
    assert (target / "generation_config.json").read_text() == text
    write_generation_config(source, target, OLD, tokenizer(LETTERS[::-1]))
    assert json.loads((target / "generation_config.json").read_text()) == {
        "temperature": 0.3,
        "eos_token_id": [7],
    }
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="a JSON object is needed"):
        write_generation_config(source, target, OLD, OLD)

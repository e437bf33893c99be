"""Rows and batches: nothing lost, nothing seen twice, the same order after any stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXTS, chats, tiny_tokenizer

from foundation.chat import IGNORED
from foundation.errors import InputError
from foundation.rows import Endless, chat_rows, collate, pack
from foundation.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def test_packed_rows_are_the_corpus_end_to_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = pack(TEXTS, tokenizer, 16, tmp_path)
    joined = [i for text in TEXTS for i in [tokenizer.boundary_id, *tokenizer.encode(text)]]
    flat = np.concatenate([row["input_ids"] for row in rows])
    assert flat.tolist() == joined[: len(joined) // 16 * 16]
    assert (rows[0]["labels"] == rows[0]["input_ids"]).all()


def test_finished_packing_is_used_again_and_a_torn_one_is_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = np.array(pack(TEXTS, tokenizer, 16, tmp_path)[0]["input_ids"])
    again = pack(iter(()), tokenizer, 16, tmp_path)  # nothing to read: it must come from disk
    assert (again[0]["input_ids"] == first).all()
    packed = (tmp_path / "tokens.bin").read_bytes()
    (tmp_path / "tokens.bin").write_bytes(packed[: 16 * 4])  # cut at the border of a row
    with pytest.raises(InputError, match="no text"):
        pack(iter(()), tokenizer, 16, tmp_path)
    (tmp_path / "tokens.bin").write_bytes(packed)
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(InputError, match="no text"):
        pack(iter(()), tokenizer, 16, tmp_path)


def test_short_corpus_fills_one_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = pack(["a"], tokenizer, 32, tmp_path)
    assert len(rows) == 1 and len(rows[0]["input_ids"]) == 32


@given(count=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(count: int, epochs: int, seed: int) -> None:
    order = list(Endless(list(range(count)), count * epochs, seed))
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(position=st.integers(0, 99), seed=st.integers(0, 5))
def test_position_alone_decides_the_row(position: int, seed: int) -> None:
    rows = list(range(13))
    assert Endless(rows, 100, seed)[position] == list(Endless(rows, 100, seed))[position]


def test_long_conversations_are_counted_not_cut(tokenizer: Tokenizer) -> None:
    talks = [c["messages"] for c in chats(10)]
    every, none = chat_rows(talks, tokenizer, 1000)
    limit = sorted(len(row["input_ids"]) for row in every)[4]
    fewer, too_long = chat_rows(talks, tokenizer, limit)
    assert none == 0 and len(fewer) + too_long == 10 and too_long > 0
    assert all(len(row["input_ids"]) <= limit for row in fewer)
    with pytest.raises(InputError, match="no conversation fits 3 tokens"):
        chat_rows(talks, tokenizer, 3)


def test_collate_pads_at_the_right_and_masks_it(tokenizer: Tokenizer) -> None:
    rows = [
        {"input_ids": np.array([5, 6, 7]), "labels": np.array([IGNORED, 6, 7]), "x": np.ones((3, 2))},
        {"input_ids": np.array([8]), "labels": np.array([8]), "x": np.ones((1, 2))},
    ]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["x"][1].tolist() == [[1, 1], [0, 0], [0, 0]]

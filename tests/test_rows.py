"""Rows and batches: nothing lost, nothing seen twice, the same order after any stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from crossings import in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXTS, chats, tiny_tokenizer

from foundation.chat import IGNORED
from foundation.errors import InputError
from foundation.losses import next_token_nll
from foundation.model import create
from foundation.rows import Endless, JoinedRows, PackedRows, chat_rows, collate, first_fit, pack
from foundation.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def test_packed_rows_are_the_corpus_end_to_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = pack(TEXTS, tokenizer, 16, tmp_path)
    joined = [i for text in TEXTS for i in [tokenizer.boundary_id, *tokenizer.encode(text)]]
    flat = np.concatenate([row["input_ids"] for row in rows])
    assert flat.tolist() == joined[: len(joined) // 16 * 16]
    for row in rows:  # what is counted is what has a loss: all but the first, which has nothing before it
        assert row["labels"].tolist() == [-100, *row["input_ids"][1:].tolist()]


def test_rows_of_documents_apart_are_the_same_tokens_with_places_of_their_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    joined = [place for text in TEXTS for place in range(len(tokenizer.encode(text)) + 1)]  # in its document
    plain = pack(TEXTS, tokenizer, 16, tmp_path / "plain")
    apart = pack(TEXTS, tokenizer, 16, tmp_path / "apart", apart=True)
    names = ("tokens.bin", "tokens.json")
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "apart" / n).read_bytes() for n in names)
    for number, row in enumerate(apart):
        assert set(plain[number]) == {"input_ids", "labels"}
        assert all((row[name] == plain[number][name]).all() for name in plain[number])
        wanted = joined[number * 16 : number * 16 + 16]
        start = wanted.index(0) if 0 in wanted else 16  # a document that goes on from the row before
        assert row["position_ids"].tolist() == [*range(start), *wanted[start:]]


def test_marks_stand_beside_their_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A mark for every third token of a document; ids are what they are without marks."""

    def third(texts: object, encoded: list[list[int]]) -> list[np.ndarray]:
        return [np.arange(len(ids)) % 3 == 2 for ids in encoded]

    plain = pack(TEXTS, tokenizer, 16, tmp_path / "plain")
    marked = pack(TEXTS, tokenizer, 16, tmp_path / "marked", marks=third, marks_from="thirds")
    flat = [place % 3 == 2 for text in TEXTS for place in range(len(tokenizer.encode(text)) + 1)]
    assert [mark for row in marked for mark in row["marks"]] == flat[: 16 * len(marked)]
    assert all((one["input_ids"] == two["input_ids"]).all() for one, two in zip(plain, marked, strict=True))
    assert collate([marked[0], marked[1]], 0)["marks"].dtype == torch.bool
    with pytest.raises(InputError, match="no text"):  # what was packed with other marks is not used again
        pack(iter(()), tokenizer, 16, tmp_path / "marked", marks=third, marks_from="others")


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
    every, _, none = chat_rows(talks, tokenizer, 1000)
    limit = sorted(len(row["input_ids"]) for row in every)[4]
    fewer, _, too_long = chat_rows(talks, tokenizer, limit)
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


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    capacity=st.integers(30, 90),
)
def test_first_fit_loses_nothing_and_overfills_nothing(lengths: list[int], capacity: int) -> None:
    groups = first_fit(lengths, capacity)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in group) for group in groups]
    assert max(filled) <= capacity
    assert sum(total <= capacity / 2 for total in filled) <= 1  # else two would have shared
    for number, group in enumerate(groups):  # first: when a row opened this group, none before had room for it
        opener = group[0]
        for before in range(number):
            there = sum(lengths[place] for place in groups[before] if place < opener)
            assert there + lengths[opener] > capacity


def test_joined_rows_hold_every_conversation_whole(tokenizer: Tokenizer) -> None:
    rows, *_ = chat_rows([c["messages"] for c in chats(30)], tokenizer, 128)
    for number, row in enumerate(rows):
        row["mark"] = np.full((len(row["input_ids"]), 2), number)
    joined = JoinedRows(rows, 128, seed=4)
    assert len(joined) < 15
    seen = []
    for place in range(len(joined)):
        row = joined[place]
        assert len(row["input_ids"]) <= 128
        starts = np.flatnonzero(row["position_ids"] == 0)
        assert (row["labels"][starts] == IGNORED).all()
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            number = int(row["mark"][start, 0])
            seen.append(number)
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            for name in ("input_ids", "mark"):
                assert (row[name][start:end] == rows[number][name]).all()
            assert (row["labels"][start + 1 : end] == rows[number]["labels"][1:]).all()
    assert sorted(seen) == list(range(30))
    again = JoinedRows(rows, 128, seed=4)
    assert all((again[n]["input_ids"] == joined[n]["input_ids"]).all() for n in range(len(joined)))
    other = JoinedRows(rows, 128, seed=5)
    assert any(
        list(other[n]["input_ids"]) != list(joined[n]["input_ids"])
        for n in range(min(map(len, (joined, other))))
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [{"model_type": "llama"}, {"model_type": "mistral", "sliding_window": 16}])
def test_joined_rows_give_the_gradient_of_separate_ones(
    tokenizer: Tokenizer, attention: str, kind: dict[str, object]
) -> None:
    """In float64: a token that saw another conversation, or the wrong position, would show at once."""
    model = create(
        {
            **kind, "vocab_size": 400, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
        0,
    ).double()  # fmt: skip
    model.set_attn_implementation(attention)
    rows, *_ = chat_rows([c["messages"] for c in chats(12)], tokenizer, 128)
    for row in rows:  # every token but the first is counted
        row["labels"] = row["input_ids"].copy()

    tolerance = 1e-6 if attention == "eager" else 1e-10  # eager attention has its softmax in float32

    def gradient(batches: list[list[dict[str, np.ndarray]]]) -> torch.Tensor:
        model.zero_grad()
        for batch in batches:
            next_token_nll(model, collate(batch, pad_id=0)).backward()
        return torch.cat([value.grad.flatten() for value in model.parameters()])

    joined = list(JoinedRows(rows, 100, seed=0))
    assert len(joined) < 8 and len({len(row["input_ids"]) for row in joined}) > 1
    expected = gradient([[row] for row in rows])
    for batches in ([[row] for row in joined], [joined]):
        torch.testing.assert_close(gradient(batches), expected, atol=tolerance, rtol=tolerance)


BOUNDARY, BLOCK = 1, 12
DOCUMENTS = st.lists(st.lists(st.integers(2, 39), max_size=14), min_size=4, max_size=8)


def packed_by_hand(documents: list[list[int]], folder: Path) -> PackedRows:
    """The rows of documents given as ids."""
    flat = [i for document in documents for i in [BOUNDARY, *document]] * BLOCK
    np.asarray(flat[: len(flat) // BLOCK * BLOCK][: 3 * BLOCK], dtype=np.uint32).tofile(folder / "t.bin")
    return PackedRows(folder / "t.bin", BLOCK, boundary_id=BOUNDARY)


@pytest.fixture(scope="module")
def double() -> torch.nn.Module:
    return in_float64(
        create(
            {
                "model_type": "llama", "vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 16,
                "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
                "max_position_embeddings": 32, "tie_word_embeddings": False,
            },
            0,
        )
    )  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(documents=DOCUMENTS)
def test_packed_rows_give_the_gradient_of_their_documents_one_by_one(
    double: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    """Each alone from position 0, and what comes after it is its last label: the token that ends it."""
    rows = list(packed_by_hand(documents, tmp_path_factory.mktemp("rows")))
    double.zero_grad()
    next_token_nll(double, collate(rows, 0)).backward()
    packed = {name: value.grad.clone() for name, value in double.named_parameters()}
    double.zero_grad()
    for row in rows:
        ids = row["input_ids"].tolist()
        starts = [0] + [place for place in range(1, BLOCK) if ids[place] == BOUNDARY]
        for start, end in zip(starts, [*starts[1:], BLOCK], strict=True):
            piece = torch.tensor([ids[start:end]])
            after = ids[start + 1 : end + 1]  # one shorter at the end of the row
            logits = double(piece).logits[0, : len(after)]
            torch.nn.functional.cross_entropy(
                logits, torch.tensor(after, dtype=torch.int64), reduction="sum"
            ).backward()
    for name, value in double.named_parameters():
        torch.testing.assert_close(packed[name], value.grad, atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=25)
@given(documents=DOCUMENTS, data=st.data())
def test_no_token_of_one_document_changes_the_logits_of_another(
    double: torch.nn.Module,
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    data: st.DataObject,
) -> None:
    row = packed_by_hand(documents, tmp_path_factory.mktemp("rows"))[0]
    number = np.cumsum(row["position_ids"] == 0)  # which document each token is of
    place = data.draw(st.integers(0, BLOCK - 1))
    other = {**row, "input_ids": row["input_ids"].copy()}
    other["input_ids"][place] = 0
    before, after = (
        double(ids["input_ids"], position_ids=ids["position_ids"], use_cache=False).logits[0]
        for ids in (collate([row], 0), collate([other], 0))
    )
    moved = ((before - after).abs().amax(1) > 0).numpy()
    assert moved[place] and not moved[number != number[place]].any()

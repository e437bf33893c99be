"""Rows of new tokens: means of the rows of their old pieces, and nothing else changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny import tiny_model

from adaptation.embeddings import Settings, run
from adaptation.pieces import averages, old_pieces
from adaptation.tokenizer_json import TokenizerJson, byte_alphabet, to_byte_level
from adaptation.vocabulary import extend
from foundation import tensors
from foundation.errors import ModelError
from foundation.model import load
from foundation.report import Silent
from foundation.tensors import HEAD, TensorFiles, write_config, write_tensors
from foundation.tokenizer import Tokenizer

WORDS = ("штурман", " штурман", " ёжик", "объясняет", " стюардесса")
ENGLISH = "The pilot lifts the barbell and rests."


def extension(model: Path, folder: Path) -> Path:
    """`model`'s tokenizer with WORDS as tokens."""
    base = TokenizerJson.read(model)
    extend(base, {to_byte_level(word): 3 for word in WORDS}, []).write(folder)
    return folder


def grow(model: Path, folder: Path, **chosen: Any) -> Path:
    """The stage on `model` and its extension; the new model's folder."""
    tokenizer = extension(model, folder / "tokenizer")
    run(Settings(**chosen), {"model": model, "tokenizer": tokenizer}, folder / "out", Silent())
    return folder / "out" / "model"


def by_hand(matrix: np.ndarray, ids: list[int], decay: float) -> np.ndarray:
    weights = [math.exp(-decay * i) for i in range(len(ids))]
    return sum(w / sum(weights) * matrix[i].astype(np.float64) for w, i in zip(weights, ids, strict=True))


# ------------------------------------------------------------------------------------------------ pieces


def test_pieces_of_a_word_are_what_the_old_tokenizer_makes_of_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    pieces = old_pieces([to_byte_level(word) for word in WORDS], TokenizerJson.read(model))
    assert pieces == [Tokenizer(model).encode(word) for word in WORDS]


def test_half_a_character_has_its_bytes_as_pieces(tmp_path: Path) -> None:
    old = TokenizerJson.read(tiny_model(tmp_path / "m"))
    alphabet = byte_alphabet()
    token = alphabet[0xD1] + alphabet[0x84] + alphabet[0xD1]  # ф, and the first byte of another letter
    (ids,) = old_pieces([token], old)
    assert "".join(next(t for t, i in old.vocab.items() if i == piece) for piece in ids) == token


@pytest.mark.parametrize("token", ["", "a b", "слово"])
def test_a_token_without_pieces_is_refused(tmp_path: Path, token: str) -> None:
    """A space or a Cyrillic letter is not in the byte alphabet: the library drops what it does not know."""
    old = TokenizerJson.read(tiny_model(tmp_path / "m"))
    with pytest.raises(ModelError, match="has no pieces"):
        old_pieces([token], old)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=6), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.integers(1, 4),
)
def test_averages_are_the_sums_written_out(pieces: list[list[int]], decay: float, block: int) -> None:
    matrix = np.random.default_rng(3).normal(size=(11, 5)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptation.pieces.BLOCK_ROWS", block)
        found = averages(torch.from_numpy(matrix), pieces, decay)
    expected = np.stack([by_hand(matrix, ids, decay) for ids in pieces])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-15)


def test_an_empty_piece_list_is_an_error_and_never_nan() -> None:
    with pytest.raises(ModelError, match="1 tokens have no pieces, the first is number 1"):
        averages(torch.ones(3, 2), [[0], [], [1]])


# ------------------------------------------------------------------------------------------------- stage


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("chosen", "decay"), [({}, 0.0), ({"weighting": "exponential", "decay": 0.7}, 0.7)])
def test_rows_are_the_means_of_old_rows(
    tmp_path: Path, tied: bool, chosen: dict[str, Any], decay: float
) -> None:
    model = tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    made = grow(model, tmp_path, **chosen)
    old, new = load_file(model / "model.safetensors"), load_file(made / "model.safetensors")
    tokenizer = Tokenizer(model)
    ids = {word: TokenizerJson.read(made).vocab[to_byte_level(word)] for word in WORDS}
    for name in ["model.embed_tokens.weight"] + ([] if tied else [HEAD]):
        assert np.array_equal(new[name][:400], old[name])
        assert new[name].shape == (TokenizerJson.read(made).size, 32)
        for word, i in ids.items():
            expected = by_hand(old[name], tokenizer.encode(word), decay).astype(np.float32)
            np.testing.assert_array_equal(new[name][i], expected)
    assert (HEAD in new) is not tied
    assert all(np.array_equal(new[name], old[name]) for name in old if new[name].shape == old[name].shape)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_says_of_old_text_what_it_said(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    made = grow(model, tmp_path)
    ids = Tokenizer(model).encode(ENGLISH)
    assert Tokenizer(made).encode(ENGLISH) == ids
    before, after = load(model), load(made)
    tie = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tie == tied
    with torch.no_grad():
        old, new = (m(torch.tensor([ids])).logits for m in (before, after))
    assert new.shape[-1] == len(Tokenizer(made)) == after.config.vocab_size
    torch.testing.assert_close(new[..., :400], old, rtol=1e-6, atol=1e-6)
    assert after.config.eos_token_id == before.config.eos_token_id


def test_a_tied_head_that_is_stored_stays_equal(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    weights = dict(TensorFiles(model).items())
    write_tensors(model, [*weights.items(), (HEAD, weights["model.embed_tokens.weight"].clone())])
    new = load_file(grow(model, tmp_path) / "model.safetensors")
    assert np.array_equal(new[HEAD], new["model.embed_tokens.weight"]) and len(new[HEAD]) > 400


def test_new_tokens_take_padding_rows_first(tmp_path: Path) -> None:
    """Rows 400 to 407 belong to no token. The first new token takes row 400, so ids have no gap."""
    model = tiny_model(tmp_path / "m", vocab_size=408)
    made = grow(model, tmp_path)
    new = load_file(made / "model.safetensors")["model.embed_tokens.weight"]
    size = TokenizerJson.read(made).size
    assert size > 408 and new.shape[0] == size
    large = tiny_model(tmp_path / "large", vocab_size=1000)
    wide = grow(large, tmp_path / "l")
    old, new = (load_file(m / "model.safetensors")["model.embed_tokens.weight"] for m in (large, wide))
    assert new.shape[0] == 1000 and np.array_equal(new[size:], old[size:])
    assert not np.array_equal(new[400], old[400])


def test_dtype_and_shards_are_kept_readable(tmp_path: Path) -> None:
    """A sharded bfloat16 model: means in fp64, rounded once."""
    model = tiny_model(tmp_path / "m")
    weights = {name: t.bfloat16() for name, t in TensorFiles(model).items()}
    write_tensors(model, weights.items(), shard_bytes=20_000)
    assert len(list(model.glob("*.safetensors"))) > 2
    made = TensorFiles(grow(model, tmp_path))
    assert {made.dtype(name) for name in made} == {"BF16"}
    i = TokenizerJson.read(made.folder).vocab[to_byte_level(WORDS[0])]
    rows = weights["model.embed_tokens.weight"][Tokenizer(model).encode(WORDS[0])]
    assert torch.equal(made.read("model.embed_tokens.weight")[i], rows.double().mean(0).bfloat16())
    assert load(made.folder).config.vocab_size == made.shape("model.embed_tokens.weight")[0]


def test_same_inputs_give_the_same_bytes_and_a_kill_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    first = grow(model, tmp_path / "a")
    again = tmp_path / "b" / "out" / "model"
    again.mkdir(parents=True)
    (again / "model-part1.safetensors").write_bytes(b"half")
    grow(model, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    assert {"chat_template.jinja", "tokenizer.json", "config.json"} <= {p.name for p in again.iterdir()}


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    content = json.loads((extension(model, tmp_path / "t") / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"does not extend .*: 2 tokens are missing or have other ids"):
        run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", Silent())


def test_ids_with_a_gap_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    content = json.loads((extension(model, tmp_path / "t") / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 9999
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="do not run from 400 to 9999"):
        run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", Silent())


def test_fewer_rows_than_tokens_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", vocab_size=390)
    with pytest.raises(ModelError, match="390 rows of embeddings for 400 tokens"):
        grow(model, tmp_path)


# ----------------------------------------------------------------------------------------- TensorFiles


def test_tensors_come_back_from_one_file_and_from_shards(tmp_path: Path) -> None:
    made = {f"t{i}": torch.arange(10.0 * i, 10.0 * i + 10).reshape(2, 5) for i in range(12)}
    made["t3"] = made["t3"].T  # not contiguous
    for folder, most in (("one", 10**9), ("many", 100)):
        write_tensors(tmp_path / folder, made.items(), most)
        files = TensorFiles(tmp_path / folder)
        assert list(files) == sorted(made) and len(files) == 12
        assert all(torch.equal(files.read(name), tensor) for name, tensor in made.items())
        assert files.shape("t3") == (5, 2) and files.dtype("t3") == "F32"
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / tensors.INDEX).read_text())
    assert index["metadata"]["total_size"] == 12 * 40
    assert len(set(index["weight_map"].values())) == 6  # two tensors of 40 bytes fit into 100


def test_a_smaller_model_leaves_no_old_shard(tmp_path: Path) -> None:
    write_tensors(tmp_path, {f"t{i}": torch.zeros(9) for i in range(5)}.items(), 40)
    write_tensors(tmp_path, [("t", torch.ones(2))])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_and_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        TensorFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        TensorFiles(tmp_path)
    for name in ("gone.safetensors", "../model.safetensors"):
        (tmp_path / tensors.INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
        with pytest.raises(ModelError, match="missing of the index"):
            TensorFiles(tmp_path)
    (tmp_path / tensors.INDEX).write_text("[]")
    with pytest.raises(ModelError, match="not an index"):
        TensorFiles(tmp_path)


def test_config_rows_are_set_where_the_family_keeps_them(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"vocab_size": 3, "a": 1}, {"vocab_size": 9, "a": 1}),
        ({"text_config": {"vocab_size": 3}}, {"text_config": {"vocab_size": 9}}),
        ({}, {"vocab_size": 9}),
    ]
    for given_config, expected in cases:
        write_config(tmp_path, given_config, 9)
        assert json.loads((tmp_path / "config.json").read_text()) == expected


# -------------------------------------------------------------------------------------------- real data


@pytest.mark.realdata
def test_stories260k_still_tells_its_story(samovar_data: Path, tmp_path: Path) -> None:
    model = samovar_data / "models" / "stories260K"
    base = TokenizerJson.read(model)
    extend(base, {"▁лиса": 5, "▁жила": 4, "лис": 2}, ["ъ"]).write(tmp_path / "t")
    run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", Silent())
    made = TensorFiles(tmp_path / "out" / "model")
    vocab = TokenizerJson.read(made.folder).vocab
    rows, old = made.read("model.embed_tokens.weight"), TensorFiles(model).read("model.embed_tokens.weight")
    byte_ids = [base.vocab["<0xD1>"], base.vocab["<0x8A>"]]
    assert torch.equal(rows[vocab["ъ"]], old[byte_ids].double().mean(0).float())
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    prompt = torch.tensor([[1, *Tokenizer(made.folder).encode("Once upon a time")]])
    answer = load(made.folder).generate(prompt, max_new_tokens=40, do_sample=False)
    assert Tokenizer(made.folder).decode(answer[0].tolist()).startswith(text)


@pytest.mark.realdata
def test_characters_that_were_unknown_start_as_the_unknown_token(samovar_data: Path, tmp_path: Path) -> None:
    """babyllama105 has no byte fallback: Cyrillic was <unk> to it, and the report says how often."""
    model, report = samovar_data / "models" / "babyllama105", Silent()
    extend(TokenizerJson.read(model), {"▁на": 5}, ["ъ"]).write(tmp_path / "t")
    run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", report)
    made, old = TensorFiles(tmp_path / "out" / "model"), TensorFiles(model)
    rows, before = (files.read("model.embed_tokens.weight") for files in (made, old))
    vocab = TokenizerJson.read(made.folder).vocab
    assert sorted(vocab, key=vocab.__getitem__)[105:] == ["а", "н", "ъ", "на", "▁на"]
    assert torch.equal(rows[vocab["ъ"]], before[vocab["<unk>"]])
    assert report.notes == ["5 new tokens hold characters that the old tokenizer reads as unknown"]
    text = Tokenizer(made.folder).decode(Tokenizer(made.folder).encode("на нъ на"))
    assert text == "на нъ на"

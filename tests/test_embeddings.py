"""Rows of a new vocabulary: kept tokens keep theirs, others are means of old rows, and nothing else changes."""

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
from other_vocabularies import KINDS, WORDS, Kind, before, new_vocabulary
from safetensors.numpy import load_file
from tiny import tiny_model

from adaptation.embeddings import Settings, run
from adaptation.extension import extend
from adaptation.pieces import averages
from adaptation.tokenizer_json import TokenizerJson, to_byte_level
from foundation import tensors
from foundation.errors import ModelError
from foundation.model import load
from foundation.report import Silent
from foundation.tensors import HEAD, TensorFiles, write_config, write_tensors
from foundation.tokenizer import Tokenizer

EMBED = "model.embed_tokens.weight"
BIAS = "lm_head.bias"
ENGLISH = "The pilot lifts the barbell and rests."


def extension(model: Path, folder: Path) -> Path:
    """`model`'s tokenizer with WORDS as tokens."""
    return new_vocabulary("extension", model, folder)


def grow(model: Path, folder: Path, kind: Kind = "extension", **chosen: Any) -> Path:
    """The stage on `model` and a new vocabulary; the new model's folder."""
    tokenizer = new_vocabulary(kind, model, folder / "tokenizer")
    run(Settings(**chosen), {"model": model, "tokenizer": tokenizer}, folder / "out", Silent())
    return folder / "out" / "model"


def by_hand(matrix: np.ndarray, ids: list[int], decay: float) -> np.ndarray:
    weights = [math.exp(-decay * i) for i in range(len(ids))]
    return sum(w / sum(weights) * matrix[i].astype(np.float64) for w, i in zip(weights, ids, strict=True))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def edited(folder: Path, **edits: Any) -> None:
    """Replace tensors of a model by function: edits["name"](old), with "_" for "."."""
    held = dict(TensorFiles(folder).items())
    names = {"embed": EMBED, "head": HEAD, "bias": BIAS, "layer": "model.layers.1.mlp.up_proj.weight"}
    for short, edit in edits.items():
        held[names[short]] = edit(held.get(names[short]))
    write_tensors(folder, held.items())


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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chosen", "decay"), [({}, 0.0), ({"weighting": "exponential", "decay": 0.7}, 0.7)])
def test_rows_are_the_means_of_old_rows(
    tmp_path: Path, kind: Kind, tied: bool, chosen: dict[str, Any], decay: float
) -> None:
    """Bit for bit, against a naive BPE: the row of every token, kept or new."""
    model = tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    made = grow(model, tmp_path, kind, **chosen)
    old, new = weights(model), weights(made)
    pieces = before(made, model)
    assert len(pieces) == TokenizerJson.read(made).size != 400
    for name in [EMBED] + ([] if tied else [HEAD]):
        expected = np.stack([by_hand(old[name], ids, decay) for ids in pieces.values()]).astype(np.float32)
        np.testing.assert_array_equal(new[name], expected)
    assert (HEAD in new) is not tied
    assert all(np.array_equal(new[name], old[name]) for name in old if name not in (EMBED, HEAD))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["substitution", "optimised"])
def test_kept_tokens_are_said_as_before(tmp_path: Path, kind: Kind, tied: bool) -> None:
    """The same tokens under other ids: the same logits, to the bit, and no other token has an old one's."""
    model = tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    made = grow(model, tmp_path, kind)
    same = {i: ids[0] for i, ids in before(made, model).items() if len(ids) == 1}
    text = list(same)[::7]
    live, old = load(made), load(model)
    assert len(live.get_input_embeddings().weight) == live.config.vocab_size == len(Tokenizer(made)) < 400
    with torch.no_grad():
        after, at_first = (
            m(torch.tensor([ids])).logits[0] for m, ids in ((live, text), (old, [same[i] for i in text]))
        )
    torch.testing.assert_close(after[:, list(same)], at_first[:, list(same.values())], rtol=1e-6, atol=1e-6)
    ends = Tokenizer(made).id_of("<|im_end|>")
    assert live.config.eos_token_id == live.generation_config.eos_token_id == ends != old.config.eos_token_id


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


def test_a_vocabulary_of_its_own_has_a_matrix_of_its_own(tmp_path: Path) -> None:
    """The old padding goes, too: 408 rows become as many as there are tokens."""
    model = tiny_model(tmp_path / "m", vocab_size=408)
    tokenizer = new_vocabulary("substitution", model, tmp_path / "t")
    figures = run(Settings(), {"model": model, "tokenizer": tokenizer}, tmp_path / "out", Silent())
    assert len(weights(tmp_path / "out" / "model")[EMBED]) == 333 == figures["embedding_rows"]
    new, old = (json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (tokenizer, model))
    both = len(new.keys() & old.keys())
    assert (figures["tokens_kept"], figures["tokens_added"]) == (both, 333 - both)
    assert (figures["tokens_gone"], figures["rows_without_a_token"]) == (400 - both, 0)


@pytest.mark.parametrize(("kind", "rows"), [("extension", 448), ("substitution", 384)])
def test_rows_are_padded_and_padding_never_outdoes_a_token(tmp_path: Path, kind: Kind, rows: int) -> None:
    """Whatever the hidden state, a padding row has less than the average token's probability.

    A row of zeros has not: where the logits of all tokens are negative, it wins.
    """
    model = tiny_model(tmp_path / "m", tie_word_embeddings=False)
    offset = torch.linspace(-0.5, 1, 32)
    edited(model, head=lambda h: h * 20 + offset)
    made = grow(model, tmp_path, kind, rows_multiple_of=64)
    tokens = TokenizerJson.read(made).size
    head = weights(made)[HEAD].astype(np.float64)
    assert head.shape[0] == rows == json.loads((made / "config.json").read_text())["vocab_size"] > tokens
    hidden = np.random.default_rng(0).normal(size=(200, 32)) - offset.numpy()

    def most_of_padding(head: np.ndarray) -> float:
        """Largest probability of a padding row over the mean probability of tokens."""
        p = np.exp(hidden @ head.T)
        return float((p[:, tokens:].max(1) / p[:, :tokens].mean(1)).max())

    assert most_of_padding(head) <= 1
    head[tokens:] = 0
    assert most_of_padding(head) > 100
    assert load(made).config.vocab_size == rows


def test_a_multiple_that_is_met_adds_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    plain, padded = grow(model, tmp_path / "a"), grow(model, tmp_path / "b", rows_multiple_of=4)
    assert {p.name: p.read_bytes() for p in plain.iterdir()} == {
        p.name: p.read_bytes() for p in padded.iterdir()
    }


def test_ids_that_no_token_has_are_the_mean(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    content = json.loads((extension(model, tmp_path / "t") / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    size = len(vocab)
    vocab[to_byte_level(" мама")] = size + 2  # ids size and size + 1 are no token's
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    figures = run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", Silent())
    rows = weights(tmp_path / "out" / "model")[EMBED].astype(np.float64)
    assert figures["rows_without_a_token"] == 2
    for hole in (size, size + 1):
        np.testing.assert_allclose(
            rows[hole], np.delete(rows, [size, size + 1], 0).mean(0), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("tied", [True, False])
def test_random_rows_have_the_old_rows_moments(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    scales = torch.logspace(-2, 1, 32)
    edited(model, embed=lambda e: e * scales + 3 * scales, **({} if tied else {"head": lambda h: h * scales}))
    made = grow(model, tmp_path / "a", "substitution", weighting="random")
    old, new = weights(model), weights(made)
    fresh = [i for i, ids in before(made, model).items() if len(ids) > 1]
    z = {}
    for name in [EMBED] + ([] if tied else [HEAD]):
        z[name] = (new[name][fresh] - old[name].mean(0)) / old[name].std(0)
        assert abs(z[name].mean()) < 4 / z[name].size ** 0.5
        assert abs(z[name].std() - 1) < 4 / (2 * z[name].size) ** 0.5
        assert np.abs(z[name].mean(0)).max() < 5 / len(fresh) ** 0.5  # and in every dimension
    assert tied or abs((z[EMBED] * z[HEAD]).mean()) < 4 / z[HEAD].size ** 0.5  # drawn apart
    again = grow(model, tmp_path / "b", "substitution", weighting="random")
    other = grow(model, tmp_path / "c", "substitution", weighting="random", seed=18)
    assert np.array_equal(weights(again)[EMBED], new[EMBED])
    assert not np.array_equal(weights(other)[EMBED][fresh], new[EMBED][fresh])


def test_random_rows_of_a_stored_tied_head_stay_equal(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    edited(model, head=lambda _: TensorFiles(model).read(EMBED).clone())
    new = weights(grow(model, tmp_path, weighting="random"))
    assert np.array_equal(new[HEAD], new[EMBED]) and new[EMBED][400:].std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_heads_bias_follows_the_rule_of_its_rows(tmp_path: Path, kind: Kind) -> None:
    model = tiny_model(tmp_path / "m", tie_word_embeddings=False)
    edited(model, bias=lambda _: torch.linspace(-3, 5, 400))
    made = grow(model, tmp_path, kind)
    old, new = weights(model)[BIAS], weights(made)[BIAS]
    expected = [float(np.mean([np.float64(old[i]) for i in ids])) for ids in before(made, model).values()]
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7)
    assert new.dtype == np.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("short", "name"), [("embed", EMBED), ("layer", "model.layers.1.mlp.up_proj.weight")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, short: str, name: str, bad: float) -> None:
    model = tiny_model(tmp_path / "m")

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[[3, 40, 41]] = bad
        return tensor.bfloat16()

    edited(model, **{short: spoilt})
    with pytest.raises(ModelError, match=f"{name} holds 3 numbers that are NaN or infinite, of"):
        grow(model, tmp_path)


def test_a_control_token_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    """config.json ends an answer at <|im_end|>; a vocabulary without it would never end one."""
    model = tiny_model(tmp_path / "m")
    content = json.loads((extension(model, tmp_path / "t") / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:2]
    del content["model"]["vocab"]["<|im_end|>"]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match=r"eos_token_id = 2 is '<\|im_end\|>', which is not in the new vocabulary"
    ):
        run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_ids_that_run_far_beyond_the_tokens_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    content = json.loads((extension(model, tmp_path / "t") / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 9999
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="ids run to 9999 for 441 tokens"):
        run(Settings(), {"model": model, "tokenizer": tmp_path / "t"}, tmp_path / "out", Silent())


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", tie_word_embeddings=False)
    edited(model, head=lambda h: h[:-1])
    with pytest.raises(ModelError, match=r"embeddings are \[400, 32\], the LM head \[399, 32\]"):
        grow(model, tmp_path)


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


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", tie_word_embeddings=False)
    write_tensors(model, [(name, tensor) for name, tensor in TensorFiles(model).items() if name != HEAD])
    with pytest.raises(ModelError, match=r"no lm_head.weight, but config.json says"):
        grow(model, tmp_path / "grown")


def test_a_decay_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="decay: no effect with weighting = 'mean'"):
        Settings(decay=3.0)

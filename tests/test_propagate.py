"""Learned embedding propagation: the algebra against numpy, and laws that need no reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny import tiny_model

from adaptation import embeddings
from adaptation.least_squares import fit
from adaptation.propagate import Settings, project, run
from adaptation.tokenizer_json import TokenizerJson, from_byte_level, to_byte_level
from adaptation.vocabulary import extend
from foundation.errors import ModelError
from foundation.model import load
from foundation.report import Silent
from foundation.tensors import HEAD, TensorFiles, write_tensors
from foundation.tokenizer import Tokenizer

EMBED = "model.embed_tokens.weight"
WORDS = ("штурман", " штурман", " ёжик", "объясняет")
CONTROL = 3  # ids 0, 1, 2 are the ChatML tokens of the tiny tokenizer


def change(folder: Path, source: Path, **edits: Any) -> Path:
    """A copy of the model `source`, with tensors replaced by function: edits[name](old)."""
    shutil.copytree(source, folder)
    names = {"embed": EMBED, "head": HEAD, "layer": "model.layers.0.mlp.up_proj.weight"}
    weights = dict(TensorFiles(source).items())
    for short, edit in edits.items():
        weights[names[short]] = edit(weights[names[short]])
    write_tensors(folder, weights.items())
    return folder


def noise(scale: float, seed: int) -> Any:
    return lambda t: t + scale * torch.randn(t.shape, generator=torch.Generator().manual_seed(seed))


class Family:
    """A base, its adapted descendant with trained embeddings, and an instruct model."""

    def __init__(self, folder: Path, *, tied: bool = True, instruct: dict[str, Any] | None = None) -> None:
        self.out = folder / "out"
        self.base = tiny_model(folder / "base", tie_word_embeddings=tied)
        tokenizer = folder / "tokenizer"
        base = TokenizerJson.read(self.base)
        extend(base, {to_byte_level(word): 3 for word in WORDS}, []).write(tokenizer)
        grown = folder / "grown"
        embeddings.run(embeddings.Settings(), {"model": self.base, "tokenizer": tokenizer}, grown, Silent())
        heads: dict[str, Any] = {} if tied else {"head": noise(0.01, 2)}
        self.adapted = change(folder / "adapted", grown / "model", embed=noise(0.01, 1), **heads)
        heads = {} if tied else {"head": noise(0.02, 4)}
        edits = {"embed": noise(0.02, 3), "layer": noise(0.1, 5), **heads} if instruct is None else instruct
        self.instruct = change(folder / "instruct", self.base, **edits)

    def run(self, method: str = "conversion") -> tuple[dict[str, np.ndarray], dict[str, Any], Silent]:
        report = Silent()
        inputs = {"base": self.base, "adapted": self.adapted, "instruct": self.instruct}
        figures = run(Settings(method=method), inputs, self.out, report)  # type: ignore[arg-type]
        return load_file(self.out / "model" / "model.safetensors"), figures, report


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def dense_t(family: Family) -> np.ndarray:
    """T [V_new, V_old] of the paper, written out: each new token's text, encoded by the old tokenizer."""
    new, old = TokenizerJson.read(family.adapted), TokenizerJson.read(family.base)
    by_id = {i: token for token, i in new.vocab.items()}
    model, encode = old.backend().model, Tokenizer(family.base).encode
    t = np.zeros((new.size, old.size))
    for i in range(new.size):
        raw = from_byte_level(by_id[i]) if i >= old.size else b""
        try:
            ids = encode(raw.decode()) or [i]
        except UnicodeDecodeError:  # half a character: no text that could be encoded
            ids = [piece.id for piece in model.tokenize(by_id[i])]
        for piece in ids:
            t[i, piece] += 1 / len(ids)
    return t


# ----------------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["swap", "overlap", "conversion"])
def test_rows_are_those_of_the_papers_equations(tmp_path: Path, tied: bool, method: str) -> None:
    family = Family(tmp_path, tied=tied)
    made, figures, _ = family.run(method)
    t = dense_t(family)
    for name, figure in [(EMBED, "embeddings")] + ([] if tied else [(HEAD, "head")]):
        base, donor, instruct = (
            weights(m)[name].astype(np.float64) for m in (family.base, family.adapted, family.instruct)
        )
        a, b = {"swap": (None, None), "overlap": (base, instruct), "conversion": (t @ base, t @ instruct)}[
            method
        ]
        p = np.eye(32) if a is None else np.linalg.lstsq(a, b, rcond=None)[0]
        expected = donor @ p
        expected[:CONTROL] = instruct[:CONTROL]
        np.testing.assert_allclose(made[name], expected, rtol=2e-6, atol=1e-8)
        if a is not None:
            assert figures[f"residual_{figure}"] == pytest.approx(np.linalg.norm(a @ p - b) / np.linalg.norm(b))
            assert figures[f"condition_{figure}"] == pytest.approx(np.linalg.cond(a))
    assert ("residual_head" in figures) == (not tied and method != "swap")


@pytest.mark.parametrize("method", ["swap", "overlap", "conversion"])
def test_an_instruct_model_equal_to_its_base_becomes_the_donor(tmp_path: Path, method: str) -> None:
    family = Family(tmp_path, tied=False, instruct={})
    made, _, _ = family.run(method)
    donor, base = weights(family.adapted), weights(family.base)
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(made[name][CONTROL:], donor[name][CONTROL:], rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(made[name][:CONTROL], base[name][:CONTROL])


@pytest.mark.parametrize("method", ["overlap", "conversion"])
def test_a_rotated_instruct_model_gives_the_rotated_donor(tmp_path: Path, method: str) -> None:
    """Tied, with another rotation of each matrix where untied: both are found apart."""
    turn = [torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(s)))[0] for s in (6, 7)]
    edits = {"embed": lambda e: e @ turn[0], "head": lambda h: h @ turn[1]}
    family = Family(tmp_path, tied=False, instruct=edits)
    made, figures, _ = family.run(method)
    for name, q in ((EMBED, turn[0]), (HEAD, turn[1])):
        donor = weights(family.adapted)[name].astype(np.float64)
        np.testing.assert_allclose(made[name][CONTROL:], (donor @ q.double().numpy())[CONTROL:], atol=1e-7)
    assert figures["residual_embeddings"] < 1e-6 and figures["residual_head"] < 1e-6


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 99))
def test_blockwise_fit_is_lstsq_nearest_to_identity(width: int, sizes: list[int], seed: int) -> None:
    """Against numpy over all rows at once, P = I + pinv(A) (B - A): short, square and tall systems."""
    dice = np.random.default_rng(seed)
    blocks = [(dice.normal(size=(n, width)), dice.normal(size=(n, width))) for n in sizes]
    a, b = (np.concatenate([block[i] for block in blocks]) for i in (0, 1))
    found = fit((torch.from_numpy(x), torch.from_numpy(y)) for x, y in blocks)
    expected = np.eye(width) + np.linalg.pinv(a) @ (b - a)
    np.testing.assert_allclose(found.projection.numpy(), expected, rtol=1e-6, atol=1e-6 * np.linalg.cond(a))
    assert found.residual == pytest.approx(np.linalg.norm(a @ expected - b) / np.linalg.norm(b), abs=1e-9)
    assert found.rank == np.linalg.matrix_rank(a)


def test_directions_without_rows_stay_as_they_are() -> None:
    """A speaks of the first axis only and doubles it; the second must not be erased."""
    found = fit([(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[2.0, 0.0], [4.0, 0.0]]))])
    torch.testing.assert_close(found.projection, torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert found.rank == 1 and found.condition == 1.0


def test_rows_that_are_all_zero_give_the_identity() -> None:
    found = fit([(torch.zeros(5, 3), torch.zeros(5, 3))])
    assert torch.equal(found.projection, torch.eye(3, dtype=torch.float64))
    assert (found.rank, found.residual) == (0, 0.0)


def test_products_are_made_in_double_precision() -> None:
    """1e8 + 1 - 1e8 is 1 in fp64; fp32 would lose it."""
    matrix = torch.tensor([[1e8, 1.0, 1e8]])
    projection = torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert project(matrix, projection, torch.float32).item() == 1.0


# ------------------------------------------------------------------------------------------------- stage


def test_all_else_is_the_instruct_models(tmp_path: Path) -> None:
    family = Family(tmp_path)
    (family.instruct / "generation_config.json").write_text('{"temperature": 0.3}')
    (family.instruct / "chat_template.jinja").write_text("{{ messages[0].content }}")
    made, figures, report = family.run()
    instruct = weights(family.instruct)
    assert made.keys() == instruct.keys() and figures["control_rows"] == CONTROL
    assert all(np.array_equal(made[name], instruct[name]) for name in made if name != EMBED)
    folder = family.out / "model"
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (family.instruct / name).read_bytes()
    assert TokenizerJson.read(folder).vocab == TokenizerJson.read(family.adapted).vocab
    assert Tokenizer(folder).encode("Штурман, ёжик") == Tokenizer(family.adapted).encode("Штурман, ёжик")
    model = load(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(Tokenizer(folder)) == len(made[EMBED])
    assert report.notes == []


def test_control_tokens_follow_the_instruct_model(tmp_path: Path) -> None:
    """Which tokens are special, and what is put around a text, is the instruct model's to say."""
    family = Family(tmp_path)
    path = family.instruct / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][1]["special"] = False
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    path.write_text(json.dumps(content))
    family.run()
    made = TokenizerJson.read(family.out / "model")
    assert made.added == content["added_tokens"]
    assert made.content["post_processor"] == content["post_processor"]


def test_the_instruct_models_dtype_is_kept(tmp_path: Path) -> None:
    family = Family(tmp_path)
    write_tensors(family.instruct, {n: t.bfloat16() for n, t in TensorFiles(family.instruct).items()}.items())
    inputs = {"base": family.base, "adapted": family.adapted, "instruct": family.instruct}
    run(Settings(), inputs, family.out, Silent())
    made = TensorFiles(family.out / "model")
    assert {made.dtype(name) for name in made} == {"BF16"}


def test_a_stored_tied_head_is_projected_too(tmp_path: Path) -> None:
    family = Family(tmp_path)
    held = dict(TensorFiles(family.instruct).items())
    write_tensors(family.instruct, [*held.items(), (HEAD, held[EMBED].clone())])
    made, _, _ = family.run()
    assert np.array_equal(made[HEAD], made[EMBED])


def test_changed_layers_of_the_donor_are_reported(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.adapted = change(tmp_path / "trained", family.adapted, layer=noise(0.1, 9))
    _, _, report = family.run()
    assert len(report.notes) == 1
    assert report.notes[0].startswith(
        "adapted differs from base in 1 of 28 other tensors (model.layers.0.mlp.up_proj"
    )


def test_a_fit_of_too_few_tokens_is_reported(tmp_path: Path) -> None:
    family = Family(tmp_path)
    flat = family.base
    write_tensors(
        flat, {n: torch.ones_like(t) if n == EMBED else t for n, t in TensorFiles(flat).items()}.items()
    )
    _, _, report = family.run("overlap")
    assert "span 1 of 32 dimensions" in report.notes[-1]


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.run()
    first = {p.name: p.read_bytes() for p in (family.out / "model").iterdir()}
    family.run()
    assert first == {p.name: p.read_bytes() for p in (family.out / "model").iterdir()}


# ---------------------------------------------------------------------------------------------- refusals


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        part = content["model"] if key in ("vocab", "merges") else content
        part[key] = value(part[key])
    path.write_text(json.dumps(content))


def test_every_difference_of_the_tokenizers_is_named(tmp_path: Path) -> None:
    family = Family(tmp_path)

    def swapped(vocab: dict[str, int]) -> dict[str, int]:
        return vocab | {"a": vocab["b"], "b": vocab["a"]}

    edit_tokenizer(family.instruct, vocab=swapped, merges=lambda m: m[:-1])
    edit_tokenizer(family.adapted, merges=lambda m: m[1:], normalizer=lambda _: {"type": "NFC"})
    with pytest.raises(ModelError) as refusal:
        family.run()
    assert str(refusal.value).splitlines()[0] == (
        "base and instruct differ in 2 tokens, among them ['a', 'b']; "
        "base and instruct differ in their merges; "
        "adapted lacks merges of base, or has them in another order; "
        "base and adapted differ in their normalizer"
    )
    assert not family.out.exists()


def test_an_adapted_model_of_another_base_is_refused(tmp_path: Path) -> None:
    family = Family(tmp_path)
    edit_tokenizer(family.adapted, vocab=lambda v: v | {"a": v["b"], "b": v["a"]})
    with pytest.raises(ModelError, match="does not extend"):
        family.run()


def test_hidden_sizes_must_agree(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.instruct = tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ModelError, match=r"hidden sizes differ: \{'base': 32, 'adapted': 32, 'instruct': 64\}"):
        family.run()


def test_tying_must_agree(tmp_path: Path) -> None:
    """A donor whose training untied its head can not be projected onto a tied model."""
    family = Family(tmp_path)
    held = dict(TensorFiles(family.adapted).items())
    write_tensors(family.adapted, [*held.items(), (HEAD, held[EMBED] + 1)])
    with pytest.raises(ModelError, match="head of its own: base no, adapted yes, instruct no"):
        family.run()


def test_fewer_rows_than_tokens_are_refused(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.adapted = change(tmp_path / "short", family.adapted, embed=lambda e: e[:-1])
    with pytest.raises(ModelError, match="rows of embeddings for"):
        family.run()

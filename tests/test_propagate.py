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
from other_vocabularies import KINDS, Kind, before, new_vocabulary
from safetensors.numpy import load_file
from tiny import tiny_model

from adaptation import embeddings, propagate
from adaptation.least_squares import Fit, fit
from adaptation.propagate import Settings, project, run
from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError, StopRequested
from foundation.model import load
from foundation.report import Silent
from foundation.tensors import HEAD, TensorFiles, write_tensors
from foundation.tokenizer import Tokenizer

EMBED = "model.embed_tokens.weight"
LAYER = "model.layers.0.mlp.up_proj.weight"
CONTROL = 3  # ids 0, 1, 2 are the ChatML tokens of the tiny tokenizer; an extension leaves them there


def change(folder: Path, source: Path, **edits: Any) -> Path:
    """A copy of the model `source`, with tensors replaced by function: edits[name](old)."""
    shutil.copytree(source, folder)
    names = {"embed": EMBED, "head": HEAD, "layer": LAYER}
    weights = dict(TensorFiles(source).items())
    for short, edit in edits.items():
        weights[names[short]] = edit(weights[names[short]])
    write_tensors(folder, weights.items())
    return folder


def noise(scale: float, seed: int) -> Any:
    return lambda t: t + scale * torch.randn(t.shape, generator=torch.Generator().manual_seed(seed))


class Family:
    """A base, its adapted descendant with trained embeddings, and an instruct model."""

    def __init__(
        self,
        folder: Path,
        *,
        kind: Kind = "extension",
        tied: bool = True,
        instruct: dict[str, Any] | None = None,
    ) -> None:
        self.out = folder / "out"
        self.base = tiny_model(folder / "base", tie_word_embeddings=tied)
        tokenizer = new_vocabulary(kind, self.base, folder / "tokenizer")
        grown = folder / "grown"
        embeddings.run(embeddings.Settings(), {"model": self.base, "tokenizer": tokenizer}, grown, Silent())
        heads: dict[str, Any] = {} if tied else {"head": noise(0.01, 2)}
        self.adapted = change(folder / "adapted", grown / "model", embed=noise(0.01, 1), **heads)
        heads = {} if tied else {"head": noise(0.02, 4)}
        edits = {"embed": noise(0.02, 3), "layer": noise(0.1, 5), **heads} if instruct is None else instruct
        self.instruct = change(folder / "instruct", self.base, **edits)

    @property
    def inputs(self) -> dict[str, Path]:
        return {"base": self.base, "adapted": self.adapted, "instruct": self.instruct}

    def run(
        self, method: str = "conversion", **chosen: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, Any], Silent]:
        report = Silent()
        figures = run(Settings(method=method, **chosen), self.inputs, self.out, report)  # type: ignore[arg-type]
        shutil.rmtree(self.out / ".work", ignore_errors=True)  # as the runner does
        return load_file(self.out / "model" / "model.safetensors"), figures, report


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def dense_t(family: Family) -> np.ndarray:
    """T [V_new, V_old] of the paper, written out: what a naive BPE of the base makes of each new token."""
    pieces = before(family.adapted, family.base)
    t = np.zeros((len(pieces), 400))
    for i, ids in pieces.items():
        for piece in ids:
            t[i, piece] += 1 / len(ids)
    return t


def spellings(folder: Path) -> dict[str, int]:
    vocab: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return vocab


# ----------------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["swap", "overlap", "conversion"])
def test_rows_are_those_of_the_papers_equations(tmp_path: Path, tied: bool, kind: Kind, method: str) -> None:
    family = Family(tmp_path, kind=kind, tied=tied)
    made, figures, _ = family.run(method)
    t = dense_t(family)
    new, old = spellings(family.adapted), spellings(family.base)
    both = [i for token, i in old.items() if token in new]
    control = {token: i for token, i in old.items() if i < CONTROL}
    for name, figure in [(EMBED, "embeddings")] + ([] if tied else [(HEAD, "head")]):
        base, donor, instruct = (
            weights(m)[name].astype(np.float64) for m in (family.base, family.adapted, family.instruct)
        )
        a, b = {
            "swap": (None, None),
            "overlap": (base[both], instruct[both]),
            "conversion": (t @ base, t @ instruct),
        }[method]
        p = np.eye(32) if a is None else np.linalg.lstsq(a, b, rcond=None)[0]
        expected = donor @ p
        for token, i in control.items():
            expected[new[token]] = instruct[i]
        np.testing.assert_allclose(made[name], expected, rtol=2e-6, atol=1e-8)
        if a is not None:
            assert figures[f"residual_{figure}"] == pytest.approx(np.linalg.norm(a @ p - b) / np.linalg.norm(b))
            assert figures[f"condition_{figure}"] == pytest.approx(np.linalg.cond(a))
    assert figures["control_rows"] == CONTROL and figures["embedding_rows"] == len(new) == len(made[EMBED])
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


@pytest.mark.parametrize("digits", [2, 6, 10])
def test_the_fit_loses_no_more_digits_than_the_rows_do(digits: int) -> None:
    """Against Gram-Schmidt in extended precision: an error within cond(A) * eps, where the normal equations,
    which square the condition number, have none left at 10 digits.
    """
    dice = np.random.default_rng(digits)
    a = (
        dice.normal(size=(60, 8))
        @ np.diag(np.logspace(0, -digits, 8))
        @ np.linalg.qr(dice.normal(size=(8, 8)))[0]
    )
    b = a @ dice.normal(size=(8, 8)) + 1e-12 * dice.normal(size=(60, 8))
    found = fit((torch.from_numpy(a[i : i + 7]), torch.from_numpy(b[i : i + 7])) for i in range(0, 60, 7))
    exact = least_squares_in_extended_precision(a, b)
    allowed = 50 * np.linalg.cond(a) * np.finfo(float).eps
    assert np.linalg.norm(found.projection.numpy() - exact) <= allowed * np.linalg.norm(exact)
    assert found.condition == pytest.approx(np.linalg.cond(a), rel=1e-3) and found.rank == 8
    if digits == 10:
        squared = np.linalg.pinv(a.T @ a) @ (a.T @ b)
        assert np.linalg.norm(squared - exact) > 100 * allowed * np.linalg.norm(exact)


def least_squares_in_extended_precision(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin ||A P - B|| by modified Gram-Schmidt, each column swept twice."""
    q, rest = a.astype(np.longdouble), b.astype(np.longdouble)
    width = a.shape[1]
    r, c = np.zeros((width, width), np.longdouble), np.zeros((width, b.shape[1]), np.longdouble)
    for j in range(width):
        for _ in range(2):
            for i in range(j):
                part = q[:, i] @ q[:, j]
                r[i, j] += part
                q[:, j] -= part * q[:, i]
        r[j, j] = np.sqrt(q[:, j] @ q[:, j])
        q[:, j] /= r[j, j]
        c[j] = q[:, j] @ rest
        rest = rest - np.outer(q[:, j], c[j])
    for j in reversed(range(width)):
        c[j] = (c[j] - r[j, j + 1 :] @ c[j + 1 :]) / r[j, j]
    return c.astype(np.float64)


def test_a_residual_of_rounding_alone_is_seen_as_one() -> None:
    """B is A turned, exactly but for fp64: the residual is near eps, and no difference of large squares."""
    dice = np.random.default_rng(0)
    a, turn = dice.normal(size=(500, 16)), np.linalg.qr(dice.normal(size=(16, 16)))[0]
    found = fit([(torch.from_numpy(a), torch.from_numpy(a @ turn))])
    assert found.residual < 1e-14


def test_a_fit_is_written_and_read(tmp_path: Path) -> None:
    made = fit([(torch.randn(9, 3), torch.randn(9, 3))])
    made.write(tmp_path / "fit")
    read = Fit.read(tmp_path / "fit")
    assert torch.equal(read.projection, made.projection) and read[1:] == made[1:]


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


@pytest.mark.parametrize("kind", ["substitution", "optimised"])
def test_ids_follow_where_control_tokens_move(tmp_path: Path, kind: Kind) -> None:
    """In the tokenizer, what it puts around a text, its configuration, and the model's two configurations."""
    family = Family(tmp_path, kind=kind)
    content = json.loads((family.instruct / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (family.instruct / "tokenizer.json").write_text(json.dumps(content))
    generation = {"eos_token_id": [2, 0], "temperature": 0.3, "suppress_tokens": [1]}
    (family.instruct / "generation_config.json").write_text(json.dumps(generation))
    family.run()
    folder = family.out / "model"
    ids = spellings(family.adapted)
    start, end, pad = (ids[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert len({start, end, pad} - {0, 1, 2}) == 3
    assert load(folder).config.eos_token_id == end and load(folder).config.pad_token_id == pad
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [end, pad],
        "temperature": 0.3,
        "suppress_tokens": [start],
    }
    tokenizer = Tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (end, pad)
    assert tokenizer.encode_marked("<|im_end|>") == [end]
    assert TokenizerJson.read(folder).backend().encode("a").ids == [start, ids["a"]]


def test_the_instruct_model_speaks_with_the_new_vocabulary(tmp_path: Path) -> None:
    """The instruct model rotates all of its base's vectors; a swap would leave the adapted ones unrotated."""
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(6)))[0]
    family = Family(tmp_path, kind="substitution", instruct={"embed": lambda e: e @ turn})
    for method, most in (("conversion", 1e-5), ("overlap", 1e-5), ("swap", 1.9)):
        made, _, _ = family.run(method)
        wanted = weights(family.adapted)[EMBED] @ turn.numpy()
        off = np.linalg.norm(made[EMBED][:-CONTROL] - wanted[:-CONTROL]) / np.linalg.norm(wanted[:-CONTROL])
        assert most / 3 < off < most if method == "swap" else off < most


def test_added_tokens_of_the_adapted_vocabulary_stay(tmp_path: Path) -> None:
    """A control token that only the adapted one has keeps its projected row and its place."""
    family = Family(tmp_path)
    path = family.adapted / "tokenizer.json"
    content = json.loads(path.read_text())
    new = max(content["model"]["vocab"].values())
    token = next(t for t, i in content["model"]["vocab"].items() if i == new)
    content["added_tokens"].append(content["added_tokens"][0] | {"content": token, "id": new, "special": False})
    path.write_text(json.dumps(content))
    _, figures, _ = family.run()
    assert figures["control_rows"] == CONTROL
    assert TokenizerJson.read(family.out / "model").added == content["added_tokens"]


def test_the_instruct_models_dtype_is_kept(tmp_path: Path) -> None:
    family = Family(tmp_path)
    write_tensors(family.instruct, {n: t.bfloat16() for n, t in TensorFiles(family.instruct).items()}.items())
    run(Settings(), family.inputs, family.out, Silent())
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
    made, figures, report = family.run()
    assert len(report.notes) == 1
    assert report.notes[0].startswith(
        "adapted differs from base in 1 of 28 other tensors (model.layers.0.mlp.up_proj"
    )
    assert np.array_equal(made[LAYER], weights(family.instruct)[LAYER])
    base, adapted = weights(family.base), weights(family.adapted)
    others = [name for name in base if name != EMBED]
    squares = [
        sum(float(np.square(m, dtype=np.float64).sum()) for m in ms)
        for ms in ([adapted[n].astype(np.float64) - base[n] for n in others], [base[n] for n in others])
    ]
    assert figures["layers_changed"] == 1
    assert figures["layers_change"] == pytest.approx((squares[0] / squares[1]) ** 0.5)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_the_layers_changes_is_carried(tmp_path: Path, share: float, dtype: torch.dtype) -> None:
    """Summed in fp64 and rounded once, to the bit; what did not change keeps its bytes."""
    family = Family(tmp_path, tied=False)
    family.adapted = change(tmp_path / "trained", family.adapted, layer=noise(0.1, 9))
    for folder in (family.base, family.adapted, family.instruct):
        write_tensors(folder, {n: t.to(dtype) for n, t in TensorFiles(folder).items()}.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagate, "BLOCK_NUMBERS", 100)
        report = Silent()
        figures = run(Settings(layers_share=share), family.inputs, family.out, report)
    base, adapted, instruct, made = (
        dict(TensorFiles(f).items())
        for f in (family.base, family.adapted, family.instruct, family.out / "model")
    )
    expected = (instruct[LAYER].double() + share * (adapted[LAYER].double() - base[LAYER].double())).to(dtype)
    assert torch.equal(made[LAYER], expected) and not torch.equal(made[LAYER], instruct[LAYER])
    assert all(torch.equal(made[n], instruct[n]) for n in made if n not in (EMBED, HEAD, LAYER))
    assert figures["layers_changed"] == 1 and report.notes == []


def test_layers_of_another_shape_can_not_be_carried(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.adapted = change(tmp_path / "cut", family.adapted, layer=lambda t: t[:-1])
    family.run()  # embeddings alone do not mind
    with pytest.raises(
        ModelError,
        match=r"1 tensors differ in shape .*: model.layers.0.mlp.up_proj.weight is "
        r"\[64, 32\], \[63, 32\], \[64, 32\]",
    ):
        family.run(layers_share=1.0)


def test_a_fit_outlives_a_stop(tmp_path: Path) -> None:
    """Stopped after the first of two fits: the next start does not fit it again, and writes the same bytes."""
    family = Family(tmp_path, tied=False)
    family.run()
    whole = {p.name: p.read_bytes() for p in (family.out / "model").iterdir()}
    shutil.rmtree(family.out)

    class Stopping(Silent):
        def stop_requested(self) -> bool:
            return (family.out / ".work" / "head.safetensors").exists()

    with pytest.raises(StopRequested):
        run(Settings(), family.inputs, family.out, Stopping())
    kept = {p.name: p.stat().st_mtime_ns for p in (family.out / ".work").iterdir()}
    assert kept.keys() == {"head.safetensors"}
    run(Settings(), family.inputs, family.out, Silent())
    assert (family.out / ".work" / "head.safetensors").stat().st_mtime_ns == kept["head.safetensors"]
    assert whole == {p.name: p.read_bytes() for p in (family.out / "model").iterdir()}


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_blocks_of_rows_change_nothing(tmp_path: Path, rows: int) -> None:
    family = Family(tmp_path)
    whole, _, _ = family.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagate, "FIT_ROWS", rows)
        patch.setattr(propagate, "BLOCK_ROWS", rows)
        made, _, _ = family.run()
    np.testing.assert_allclose(made[EMBED], whole[EMBED], rtol=1e-6, atol=1e-9)


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

    def without_control(vocab: dict[str, int]) -> dict[str, int]:
        return {token: i for token, i in vocab.items() if token != "<|im_end|>"}

    edit_tokenizer(
        family.instruct, vocab=swapped, merges=lambda m: m[:-1], normalizer=lambda _: {"type": "NFC"}
    )
    edit_tokenizer(family.adapted, vocab=without_control, added_tokens=lambda a: a[:2])
    with pytest.raises(ModelError) as refusal:
        family.run()
    assert str(refusal.value).splitlines()[0] == (
        "base and instruct differ in 2 tokens, among them ['a', 'b']; "
        "base and instruct differ in their merges; "
        "base and instruct differ in their normalizer; "
        "adapted lacks 1 control tokens of instruct, among them ['<|im_end|>']"
    )
    assert not family.out.exists()


def test_shapes_must_agree(tmp_path: Path) -> None:
    family = Family(tmp_path)
    whole, family.instruct = family.instruct, tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ModelError, match=r"of base are \[400, 32\], of instruct \[400, 64\]"):
        family.run()
    family.instruct = change(tmp_path / "tall", whole, embed=lambda e: torch.cat([e, e[:8]]))
    with pytest.raises(ModelError, match=r"of base are \[400, 32\], of instruct \[408, 32\]"):
        family.run()
    family.instruct, family.adapted = whole, tiny_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(ModelError, match=r"of base are \[400, 32\], of adapted \[400, 64\]"):
        family.run()


@pytest.mark.parametrize("role", ["base", "adapted", "instruct"])
@pytest.mark.parametrize("place", ["embed", "layer"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, role: str, place: str) -> None:
    family = Family(tmp_path)

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(tensor == tensor.max(), torch.nan, tensor)

    setattr(family, role, change(tmp_path / "spoilt", getattr(family, role), **{place: spoilt}))
    with pytest.raises(ModelError, match=r"spoilt: model\..* holds 1 numbers that are NaN or infinite"):
        family.run()


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    family = Family(tmp_path)
    held = dict(TensorFiles(family.instruct).items())
    write_tensors(family.instruct, [*held.items(), ("lm_head.bias", torch.zeros(400))])
    with pytest.raises(ModelError, match="instruct: the head has a bias"):
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


def test_a_fit_between_strangers_is_told(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.instruct = tiny_model(tmp_path / "stranger", seed=99)
    _, figures, report = family.run("overlap")
    assert figures["residual_embeddings"] > 0.9
    assert any("of the instruct model's rows unexplained" in note for note in report.notes)

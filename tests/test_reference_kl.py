"""KL against a reference of another vocabulary: against sums by hand, and dense autograd in float64."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from crossings import OTHER, extended_tokenizer, in_float64, model_with, old_tokenizer, substituted_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXTS
from tokenizers import Tokenizer as Backend

from adaptation.crossing import Crossing, new_tokens, survey
from adaptation.reference_kl import ReferenceLoss, chunked_ce_and_kl
from foundation.errors import ModelError
from foundation.head import Head
from foundation.losses import cross_entropy
from foundation.model import load
from foundation.report import Silent
from foundation.rows import PackedRows, collate, pack
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

ROWS = {"old": 336, "extended": 408, "substituted": 420}  # the first two with rows that no token has


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers: the reference's, one that extends it, one that replaces it."""
    made = {"old": old_tokenizer, "extended": extended_tokenizer, "substituted": substituted_tokenizer}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in made.items()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(tokenizer, tied) -> a model with it"""
    return {
        (name, tied): model_with(
            folder, tmp_path_factory.mktemp("m"), ROWS[name], seed=number, tie_word_embeddings=tied
        )
        for number, (name, folder) in enumerate(folders.items())
        for tied in (True, False)
    }


def packed(new: Path, crossing: Crossing, work: Path, block_tokens: int = 24) -> PackedRows:
    marks = {"marks": crossing.exact, "marks_from": crossing.digest}
    return pack(TEXTS[:4] + OTHER[:2], Tokenizer(new), block_tokens, work, apart=True, **marks)  # type: ignore[arg-type]


def spelt_pieces(new: Path, old: Path) -> dict[int, list[int]]:
    """Pieces of every new token by the tokenizers library alone; a control token is itself."""
    ours, theirs = (Backend.from_file(str(folder / "tokenizer.json")) for folder in (new, old))
    control = {token.content for token in ours.get_added_tokens_decoder().values()}
    return {
        i: [theirs.token_to_id(token)]
        if token in control
        else [piece.id for piece in theirs.model.tokenize(token)]
        for token, i in ours.get_vocab().items()
    }


# ---- the formula ----------------------------------------------------------------------------------------


def identity_head(size: int) -> Head:
    return Head(((lambda hidden: hidden, torch.eye(size, dtype=torch.float64)),))


def test_a_position_by_hand() -> None:
    """p = (.1 .2 .3 .4) with new ids 2, 3 beginning with old 0, 1: P = (.4, .6), against q = (.5, .5)."""
    crossing: Any = SimpleNamespace(first=lambda: np.array([0, 1, 0, 1]), old_tokens=np.array([True, True]))
    z = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log().requires_grad_()
    t = torch.zeros(1, 2, dtype=torch.float64)
    gold, exact = torch.tensor([3]), torch.tensor([True])
    total, figures = chunked_ce_and_kl(
        z, identity_head(4), gold, t, identity_head(2), exact, crossing, kl_weight=2.0
    )
    kl = 0.4 * math.log(0.8) + 0.6 * math.log(1.2)
    assert figures["kl"].item() == pytest.approx(kl, abs=1e-12)
    assert figures["ce"].item() == pytest.approx(-math.log(0.4), abs=1e-12)
    assert total.item() == pytest.approx(-math.log(0.4) + 2 * kl, abs=1e-12)
    total.backward()
    toward = [math.log(0.8) - kl, math.log(1.2) - kl] * 2
    wanted = [
        p * (1 + 2 * d) - (n == 3) for n, (p, d) in enumerate(zip([0.1, 0.2, 0.3, 0.4], toward, strict=True))
    ]
    assert z.grad is not None and z.grad[0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_rows_without_a_token_are_no_events() -> None:
    """Both have a third row that no token has: KL is over the other two, and its gradient there is zero."""
    crossing: Any = SimpleNamespace(first=lambda: np.array([0, 1]), old_tokens=np.array([True, True]))
    z = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64).requires_grad_()
    t = torch.tensor([[0.0, 1.0, -3.0]], dtype=torch.float64)
    arguments = (torch.tensor([0]), t, identity_head(3), torch.tensor([True]), crossing)
    total, figures = chunked_ce_and_kl(z, identity_head(3), *arguments, kl_weight=1.0)
    assert figures["kl"].item() == pytest.approx(0, abs=1e-12)  # they agree on the two
    total.backward()
    p = z.detach().softmax(1)[0]
    assert z.grad is not None and z.grad[0].tolist() == pytest.approx(
        [float(p[0]) - 1, float(p[1]), float(p[2])], abs=1e-12
    )


def test_probabilities_of_nothing_give_no_nan() -> None:
    crossing: Any = SimpleNamespace(first=lambda: np.array([0, 1]), old_tokens=np.array([True, True]))
    z = torch.tensor([[0.0, -1e4]], dtype=torch.float32).requires_grad_()
    t = torch.tensor([[-1e4, 0.0]], dtype=torch.float32)
    head = Head(((lambda hidden: hidden, torch.eye(2)),))
    total, figures = chunked_ce_and_kl(
        z, head, torch.tensor([0]), t, head, torch.tensor([True]), crossing, kl_weight=1.0
    )
    total.backward()
    assert figures["kl"].item() == pytest.approx(1e4) and z.grad is not None and z.grad.isfinite().all()


def naive(student: Any, reference: Any, rows: Any, pieces: dict[int, list[int]], weight: float) -> torch.Tensor:
    """Sum of CE + weight * KL over all counted tokens: a document and a position at a time, dense."""
    heads: dict[int, list[int]] = {}  # old id -> new ids that begin with it
    for new, old in pieces.items():
        heads.setdefault(old[0], []).append(new)
    old_ids = torch.tensor(sorted({i for ids in pieces.values() for i in ids} | set(range(330))))
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, starts = row["input_ids"].tolist(), np.flatnonzero(row["position_ids"] == 0).tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            document = ids[start:end]
            logits = student(torch.tensor([document])).logits[0]
            spelt = [piece for i in document for piece in pieces[i]]
            with torch.no_grad():
                taught = reference(torch.tensor([spelt])).logits[0]
            seen = 0
            for place, i in enumerate(document):
                seen += len(pieces[i])
                if start + place + 1 == len(ids):
                    continue  # nothing of this row comes after
                log_p = logits[place].log_softmax(0)
                total = total - log_p[ids[start + place + 1]]
                if not row["marks"][start + place]:
                    continue
                log_p = logits[place] - logits[place][sorted(pieces)].logsumexp(0)
                log_q = taught[seen - 1] - taught[seen - 1][old_ids].logsumexp(0)
                for old, news in heads.items():
                    log_mass = log_p[news].logsumexp(0)
                    total = total + weight * log_mass.exp() * (log_mass - log_q[old])
    return total


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["extended", "substituted"])
def test_loss_and_gradients_are_those_of_a_dense_loop(
    folders: dict[str, Path], models: dict[tuple[str, bool], Path], tmp_path: Path, kind: str, tied: bool
) -> None:
    """Whole models in float64, any size of chunk; the reference is of the other form."""
    new, old = folders[kind], folders["old"]
    crossing = Crossing(new, old)
    rows = list(packed(new, crossing, tmp_path))[:3]
    assert any((row["position_ids"][1:] == 0).any() for row in rows)
    student, reference = in_float64(load(models[kind, tied])), in_float64(load(models["old", not tied]))
    expected = naive(student, reference, rows, spelt_pieces(new, old), 0.7)
    expected.backward()
    wanted = {name: value.grad.clone() for name, value in student.named_parameters()}
    for chunk_rows in (1, 7, 0):
        student.zero_grad()
        loss = ReferenceLoss(reference, crossing, 0.7)
        loss.chunk_rows = chunk_rows
        value = loss(student, collate(rows, 0), torch.tensor(10.0))
        value.backward()
        assert value.item() * 10 == pytest.approx(expected.item(), abs=1e-8)
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(parameter.grad * 10, wanted[name], atol=1e-8, rtol=1e-8)
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        tokens = 3 * 23
        assert loss.sums["tokens"].item() == tokens
        assert (loss.sums["ce"] + 0.7 * loss.sums["kl"]).item() == pytest.approx(expected.item(), abs=1e-8)
        excepted = sum(int((~row["marks"][:-1]).sum()) for row in rows)
        assert loss.sums["kl_exceptions"].item() == excepted
        assert (excepted == 0) == (kind == "extended")


def test_a_model_beside_itself_has_the_gradient_of_cross_entropy(
    folders: dict[str, Path], models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    crossing = Crossing(folders["old"], folders["old"])
    batch = collate(list(packed(folders["old"], crossing, tmp_path))[:2], 0)
    gradients = []
    for number in range(2):
        model = load(models["old", False]).double()
        loss = ReferenceLoss(load(models["old", False]).double(), crossing, 3.0) if number else cross_entropy
        loss(model, batch, torch.tensor(1.0)).backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters()]))
    assert isinstance(loss, ReferenceLoss) and abs(loss.sums["kl"].item()) < 1e-10
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_32_small_steps_are_one_large_one(
    folders: dict[str, Path], models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    crossing = Crossing(folders["substituted"], folders["old"])
    rows = packed(folders["substituted"], crossing, tmp_path)
    states, curves = [], []
    for batch_rows, accumulation in ((32, 1), (1, 32)):
        model = load(models["substituted", True])
        loss = ReferenceLoss(load(models["old", True]), crossing, 0.5)
        chosen = TuneSettings(
            steps=1, batch_rows=batch_rows, accumulation=accumulation, warmup_steps=0, precision="fp32",
            clip_norm=0, learning_rate=1e-3,
        )  # fmt: skip
        work = tmp_path / str(batch_rows)
        tune(model, rows, loss, chosen, work, Silent(), pad_id=0)
        states.append(model.state_dict())
        curves.append(json.loads((work / "curves.jsonl").read_text()))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=2e-5, rtol=1e-4)
    for name in ("loss", "ce", "kl", "kl_exceptions"):
        assert curves[1][name] == pytest.approx(curves[0][name], rel=1e-5)
    assert curves[0]["loss"] == pytest.approx(curves[0]["ce"] + 0.5 * curves[0]["kl"], rel=1e-5)
    assert curves[0]["kl"] > 0.01 and 0 < curves[0]["kl_exceptions"] < 1


# ---- what the reference reads ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from(["pilot", "plank", "Пилот", " отдыхает", "ёж", " 42", "\n", "🚀", "crew."]), max_size=12
    )
)
def test_in_an_extension_every_position_is_exact(folders: dict[str, Path], words: list[str]) -> None:
    """The theorem of crossing.py: new merges come after all old ones."""
    text = "".join(words)
    tokenizer = Tokenizer(folders["extended"])
    encoded = [[tokenizer.boundary_id, *tokenizer.encode(text)]]
    (exact,) = Crossing(folders["extended"], folders["old"]).exact([text], encoded)
    assert exact.all() and len(exact) == len(encoded[0])


def test_exceptions_by_spans_of_bytes(folders: dict[str, Path]) -> None:
    """A token is exact where each of its pieces is a token of the old tokenisation, at the same bytes."""
    new, old = folders["substituted"], folders["old"]
    crossing, pieces = Crossing(new, old), spelt_pieces(new, old)
    tokenizer, theirs = Tokenizer(new), Backend.from_file(str(old / "tokenizer.json"))
    seen = set()
    for text in [*TEXTS[:4], *OTHER[:2], "ёж 🚀 don't", ""]:
        ids = [tokenizer.boundary_id, *tokenizer.encode(text)]
        real, at = set(), 0
        for token in theirs.encode(text, add_special_tokens=False).tokens:  # a character is a byte
            real.add((at, token))
            at += len(token)
        wanted, at = [True], 0
        for i in ids[1:]:
            spans = []
            for piece in pieces[i]:
                spans.append((at, theirs.id_to_token(piece)))
                at += len(spans[-1][1])
            wanted.append(set(spans) <= real)
        (exact,) = crossing.exact([text], [ids])
        assert exact.tolist() == wanted
        seen |= set(wanted)
    assert seen == {True, False}


def bpe(folder: Path, merges: list[str], family: str, letters: str = "abc") -> Path:
    """A tokenizer with these merges, after its letters: byte-level, or SentencePiece's with <unk>."""
    space = "Ġ" if family == "bytes" else "▁"
    tokens = ["<s>", "<unk>", space, *letters, *(merge.replace(" ", "") for merge in merges)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, token in enumerate(tokens[:2])
        ],
    }  # fmt: skip
    if family == "bytes":
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        content |= {"normalizer": None, "pre_tokenizer": split, "decoder": split, "model": model}
    else:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": space}
        unknown = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False}
        content |= {"normalizer": replace, "pre_tokenizer": None, "decoder": None, "model": model | unknown}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return folder


@pytest.mark.parametrize(
    ("family", "text", "tokens", "wanted"),
    [
        # old: ab|c, new: a|bc = a|b c: no boundary after a, other pieces before the next; then both are c.
        ("bytes", "abc c", ["<s>", "a", "bc", "Ġ", "c"], [True, False, False, True, True]),
        ("characters", "abc c", ["<s>", "a", "bc", "▁", "c"], [True, False, False, True, True]),
        # d is unknown to both, of no length that is known: exact as far as both are the same from the start.
        ("characters", "cd abc", ["<s>", "c", "<unk>", "▁", "a", "bc"], [True] * 4 + [False, False]),
        ("characters", "abcd c", ["<s>", "a", "bc", "<unk>", "▁", "c"], [True] + [False] * 5),
    ],
)
def test_exceptions_by_hand(
    tmp_path: Path, family: str, text: str, tokens: list[str], wanted: list[bool]
) -> None:
    old, new = bpe(tmp_path / "old", ["a b"], family), bpe(tmp_path / "new", ["b c"], family)
    tokenizer = Tokenizer(new)
    ids = [tokenizer.boundary_id, *tokenizer.encode(text)]
    assert [tokenizer.id_of(token) for token in tokens] == ids
    (exact,) = Crossing(new, old).exact([text], [ids])
    assert exact.tolist() == wanted


def test_a_batch_as_the_reference_reads_it(folders: dict[str, Path], tmp_path: Path) -> None:
    new, old = folders["substituted"], folders["old"]
    crossing, pieces = Crossing(new, old), spelt_pieces(new, old)
    rows = list(packed(new, crossing, tmp_path))[:4]
    batch = collate(rows, 0)
    expanded = crossing.expand(batch["input_ids"], batch["position_ids"])
    for number, row in enumerate(rows):
        ids, places, ends = [], [], []
        for i, place in zip(row["input_ids"].tolist(), row["position_ids"].tolist(), strict=True):
            for piece in pieces[i]:
                places.append(0 if place == 0 and piece == pieces[i][0] else places[-1] + 1)
                ids.append(piece)
            ends.append(len(ids) - 1)
        spare = expanded.input_ids.shape[1] - len(ids)
        assert expanded.input_ids[number].tolist() == ids + [0] * spare
        assert expanded.position_ids[number].tolist() == places + [0] * spare
        assert expanded.ends[number].tolist() == ends


def test_survey_counts_and_refuses_what_the_reference_can_not_hold(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    crossing, pieces = (make(folders["extended"], folders["old"]) for make in (Crossing, spelt_pieces))
    rows = packed(folders["extended"], crossing, tmp_path)
    longest = 0
    for row in rows:
        starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["input_ids"])]
        for start, end in pairwise(starts):
            longest = max(longest, sum(len(pieces[int(i)]) for i in row["input_ids"][start:end]))
    assert survey([rows], crossing, longest, Silent()) == (len(rows) * 23, 0)
    with pytest.raises(ModelError, match=f"holds a document of {longest} tokens .* context is {longest - 1}"):
        survey([rows], crossing, longest - 1, Silent())


def test_vocabularies_that_do_not_belong_together(folders: dict[str, Path], tmp_path: Path) -> None:
    spm = bpe(tmp_path / "spm", ["a b"], "characters")
    with pytest.raises(ModelError, match=r"tokens in bytes, the reference .* in characters"):
        Crossing(folders["extended"], spm)
    apart = [bpe(tmp_path / letters, [], "characters", letters) for letters in ("abc", "def")]
    for folder in apart:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if t != "▁"}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no piece in common"):
        Crossing(*apart)
    with pytest.raises(ModelError, match="has all 330 tokens"):
        new_tokens(folders["old"], folders["old"])
    assert new_tokens(folders["extended"], folders["old"]) == list(range(330, 400))


def test_a_reference_that_agrees_nowhere_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    crossing = Crossing(folders["extended"], folders["old"])

    def nowhere(texts: Any, encoded: Any) -> list[np.ndarray]:
        return [np.zeros(len(ids), dtype=bool) for ids in encoded]

    rows = pack(TEXTS, Tokenizer(folders["extended"]), 24, tmp_path, apart=True, marks=nowhere)
    with pytest.raises(ModelError, match=f"agrees nowhere .* {len(rows) * 23} counted"):
        survey([rows], crossing, 128, Silent())

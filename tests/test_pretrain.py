"""Continued pre-training: what trains and what stays, mixtures, a reference, and resumes to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crossings import OTHER, extended_tokenizer, model_with, old_tokenizer, substituted_tokenizer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import TEXTS

from adaptation import pretrain
from foundation.dataio import write_jsonl
from foundation.errors import InputError, ModelError, SamovarError
from foundation.model import load
from foundation.report import Silent
from foundation.tokenizer import Tokenizer

SHORT: dict[str, Any] = {
    "steps": 3,
    "batch_rows": 4,
    "block_tokens": 24,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
}
LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8}
ROWS, OLD_TOKENS, TOKENS = 408, 330, 400  # the last eight rows belong to no token
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = [
    ["embeddings"], ["head"], ["layers"], ["lora"], ["embeddings", "head"], ["embeddings", "lora"],
    ["head", "lora"], ["embeddings", "head", "lora"], ["embeddings", "head", "layers"],
]  # fmt: skip


class KillAt(Silent):
    """Dies without a word after a step, as kill -9 would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        if unit == "step" and done == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model before (old), and with an extended vocabulary: tied or not; with one learnt anew."""
    made = tmp_path_factory.mktemp
    extended, old = extended_tokenizer(made("extended")), old_tokenizer(made("old"))
    return {
        "old": model_with(old, made("m"), OLD_TOKENS, seed=0),
        "tied": model_with(extended, made("m"), ROWS, seed=1),
        "untied": model_with(extended, made("m"), ROWS, seed=2, tie_word_embeddings=False),
        "substituted": model_with(substituted_tokenizer(made("substituted")), made("m"), 420, seed=3),
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in {"one": TEXTS, "two": OTHER}.items():
        write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in texts))
    return folder / "one.jsonl", folder / "two.jsonl"


def trained(
    model: Path,
    corpus: tuple[Path, ...],
    out: Path,
    report: Any = None,
    reference: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    inputs = {"model": model, "corpus": corpus, **({"reference": reference} if reference else {})}
    return pretrain.run(pretrain.Settings(**{**SHORT, **changes}), inputs, out, report or Silent())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moved(before: Path, after: Path) -> set[str]:
    one, two = weights(before), weights(after)
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name].float(), two[name].float())}


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


# ---- what trains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", PARTS, ids="+".join)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_what_is_named_moves_and_nothing_else(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, trains: list[str], kind: str
) -> None:
    changes = LORA if "lora" in trains else {}
    report = Silent()
    trained(models[kind], corpus, tmp_path, report, trains=trains, precision="fp32", **changes)
    names = weights(models[kind])
    linear = {name for name in names if "_proj" in name}
    wanted = set()
    if "embeddings" in trains or (kind == "tied" and "head" in trains):
        wanted.add(EMBEDDINGS)
    if "head" in trains and kind == "untied":
        wanted.add(HEAD)
    if "lora" in trains:
        wanted |= linear
    if "layers" in trains:
        wanted |= names.keys() - {EMBEDDINGS, HEAD}
    assert moved(models[kind], tmp_path / "model") == wanted
    assert (HEAD in names) == (kind == "untied")
    loaded = load(tmp_path / "model")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (kind == "tied")
    noted = [note for note in report.notes if "one matrix" in note]
    assert bool(noted) == (kind == "tied" and len({"embeddings", "head"} & set(trains)) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("trains", PARTS, ids="+".join)
def test_gradient_checkpointing_changes_nothing_and_bf16_little(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, trains: list[str]
) -> None:
    changes = {"trains": trains, **(LORA if "lora" in trains else {})}
    after = {}
    for name, more in {
        "plain": {"precision": "fp32"},
        "again": {"precision": "fp32", "gradient_checkpointing": True},
        "half": {"precision": "bf16", "gradient_checkpointing": True},
    }.items():
        figures = trained(models["untied"], corpus, tmp_path / name, **changes, **more)
        after[name] = weights(tmp_path / name / "model")
        first = lines(tmp_path / name)[0]
        after[name]["loss"] = torch.tensor(first["loss"])
        assert np.isfinite(figures["loss"])
    for name, value in after["plain"].items():
        torch.testing.assert_close(after["again"][name], value, atol=1e-5, rtol=1e-5)
    assert after["half"]["loss"].item() == pytest.approx(after["plain"]["loss"].item(), rel=0.02)
    assert after["half"]["loss"].item() != after["plain"]["loss"].item()  # autocast was on


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
@pytest.mark.parametrize("half", [True, False], ids=["autocast", "fp32"])
def test_matrices_beside_a_base_in_few_bits_train_in_float32(
    corpus: tuple[Path, Path], tmp_path: Path, precision: str, half: bool
) -> None:
    """From the numbers that are stored, not from what the base was rounded to; written as they came out."""
    model = model_with(
        extended_tokenizer(tmp_path / "t"), tmp_path / "m", ROWS, seed=2, tie_word_embeddings=False,
        hidden_size=64, head_dim=16,
    )  # fmt: skip
    trained(
        model, corpus, tmp_path, trains=["embeddings", "head", "lora"], base_precision=precision,
        precision="bf16" if half else "fp32", learning_rate=1e-5, weight_decay=0.0, **LORA,
    )  # fmt: skip
    before, after = weights(model), weights(tmp_path / "model")
    for name in (EMBEDDINGS, HEAD):
        change = (after[name] - before[name]).abs()
        assert after[name].dtype == torch.float32
        assert 0 < change.max() < 1e-4  # three steps of 1e-5; bf16's own rounding would be 2e-3 of 0.2


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("trains", [["embeddings", "head"], ["embeddings", "head", "lora"]], ids="+".join)
def test_with_new_rows_the_others_keep_their_bits_through_a_kill(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, kind: str, trains: list[str]
) -> None:
    changes: dict[str, Any] = {
        "trains": trains, "rows": "new", "reference": models["old"], "steps": 7, "checkpoint_every_steps": 3,
        "clip_norm": 0.01, "weight_decay": 0.5, "precision": "fp32", **(LORA if "lora" in trains else {}),
    }  # fmt: skip
    figures = trained(models[kind], corpus, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        trained(models[kind], corpus, tmp_path / "torn", KillAt(5), **changes)
    report = Silent()
    trained(models[kind], corpus, tmp_path / "torn", report, **changes)
    assert "going on from checkpoint-3" in report.notes
    for name in ("model/model.safetensors", "curves.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    before, after = weights(models[kind]), weights(tmp_path / "torn" / "model")
    assert figures["new_rows"] == TOKENS - OLD_TOKENS
    for name in {EMBEDDINGS, HEAD} & before.keys():
        same = (before[name] == after[name]).all(1)
        assert same[:OLD_TOKENS].all() and same[TOKENS:].all()  # the old ones, and rows that no token has
        assert not same[OLD_TOKENS:TOKENS].all()
    if kind == "untied":  # a softmax pulls at every row of the head
        assert not (before[HEAD] == after[HEAD]).all(1)[OLD_TOKENS:TOKENS].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("base_precision", ["fp32", "bf16"])
def test_adapters_and_matrices_resume_to_the_same_bytes(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, kind: str, base_precision: str
) -> None:
    changes: dict[str, Any] = {
        "trains": ["lora", "embeddings", "head"], "steps": 8, "checkpoint_every_steps": 2,
        "base_precision": base_precision, "weights": [0.75, 0.25], **LORA,
    }  # fmt: skip
    trained(models[kind], corpus, tmp_path / "whole", **changes)
    for step in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            trained(models[kind], corpus, tmp_path / "torn", KillAt(step), **changes)
    trained(models[kind], corpus, tmp_path / "torn", **changes)
    for name in ("model/model.safetensors", "curves.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    saved = load_file(tmp_path / "whole" / ".work" / "checkpoint-8" / "beside_adapters.safetensors")
    assert len(saved) == (1 if kind == "tied" else 2)


def test_a_checkpoint_of_other_settings_is_refused(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": 4, "checkpoint_every_steps": 2, **LORA}
    with pytest.raises(KeyboardInterrupt):
        trained(models["untied"], corpus, tmp_path, KillAt(3), trains=["lora", "head"], **changes)
    with pytest.raises(ModelError, match=r"holds \['base_model.model.lm_head.weight'\] beside adapters"):
        trained(models["untied"], corpus, tmp_path, trains=["lora", "embeddings"], **changes)


# ---- rows -----------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_documents_read_apart(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    """One row of one long text's tokens against a model that reads each document alone."""
    tokenizer, model = Tokenizer(models["untied"]), load(models["untied"])
    block = 96
    trained(models["untied"], corpus[:1], tmp_path, block_tokens=block, batch_rows=1, steps=1, precision="fp32")
    stored = np.fromfile(tmp_path / ".work" / "tokens.bin", dtype=np.uint32).reshape(-1, block)
    row = stored[np.random.default_rng([17, 0]).permutation(len(stored))[0]].astype(np.int64).tolist()
    starts = [0, *(n for n in range(1, block) if row[n] == tokenizer.boundary_id)]
    assert len(starts) > 2
    total = 0.0
    for start, end in zip(starts, [*starts[1:], block], strict=True):
        after = torch.tensor(row[start + 1 : end + 1])
        logits = model(torch.tensor([row[start:end]])).logits[0, : len(after)]
        total += torch.nn.functional.cross_entropy(logits, after, reduction="sum").item()
    assert lines(tmp_path)[0]["loss"] == pytest.approx(total / (block - 1), rel=1e-5)


def test_corpora_are_mixed_by_tokens(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quarters of the rows that are trained on come from the first file, though it is not larger."""
    seen: list[int] = []
    real = pretrain.cross_entropy

    def watched(model: Any, batch: Any, items: Any) -> torch.Tensor:
        seen.extend(tuple(row.tolist()) for row in batch["input_ids"])
        return real(model, batch, items)

    monkeypatch.setattr(pretrain, "cross_entropy", watched)
    figures = trained(models["tied"], corpus, tmp_path, weights=[3, 1], steps=8, batch_rows=5)
    parts = []
    for number in (1, 2):
        stored = np.fromfile(tmp_path / ".work" / f"part-{number}" / "tokens.bin", dtype=np.uint32)
        parts.append({tuple(row) for row in stored.reshape(-1, SHORT["block_tokens"]).tolist()})
    assert not parts[0] & parts[1] and len(seen) == 40
    assert [sum(row in part for row in seen) for part in parts] == [30, 10]
    assert figures["rows"] == sum(
        (tmp_path / ".work" / f"part-{n}" / "tokens.bin").stat().st_size // 4 // 24 for n in (1, 2)
    )


# ---- the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "substituted"])
def test_kl_holds_the_model_near_its_reference(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    every = ["embeddings", "head", "layers"]
    distance = {}
    for weight in (1e-6, 5.0):
        out = tmp_path / str(weight)
        figures = trained(
            models[kind], corpus, out, trains=every, reference=models["old"], kl_weight=weight, steps=20,
            weights=[0.5, 0.5],
        )  # fmt: skip
        told = lines(out)
        for line in told:
            assert line["loss"] == pytest.approx(line["ce"] + weight * line["kl"], rel=1e-4)
        last = told[-2:]
        assert figures["kl"] == pytest.approx(sum(line["kl"] for line in last) / 2)
        assert figures["ce"] == pytest.approx(sum(line["ce"] for line in last) / 2)
        distance[weight] = figures["kl"]
        if kind == "tied":
            assert figures["kl_exceptions"] == 0
        else:
            assert 0 < figures["kl_exception_share"] < 1
            assert figures["kl_exceptions"] / figures["kl_exception_share"] == pytest.approx(
                figures["rows"] * 23
            )
    assert distance[5.0] < 0.7 * distance[1e-6]


def test_a_reference_that_is_a_stranger_is_refused(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "MOST_EXCEPTIONS", 0.0)
    with pytest.raises(ModelError, match=r"cuts the text otherwise at \d+% of the tokens .* 0% is allowed"):
        trained(models["substituted"], corpus, tmp_path, reference=models["old"], kl_weight=1.0)


@pytest.mark.slow
def test_a_run_with_a_reference_resumes_to_the_same_bytes(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "trains": ["lora", "embeddings", "head"], "reference": models["old"], "kl_weight": 0.5, "steps": 5,
        "checkpoint_every_steps": 2, **LORA,
    }  # fmt: skip
    trained(models["substituted"], corpus, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        trained(models["substituted"], corpus, tmp_path / "torn", KillAt(3), **changes)
    trained(models["substituted"], corpus, tmp_path / "torn", **changes)
    for name in ("model/model.safetensors", "curves.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trains": []}, "at least 1 item"),
        ({"trains": ["everything"]}, "'embeddings', 'head', 'layers' or 'lora'"),
        ({"trains": ["head", "head"]}, "names head more than once"),
        ({"trains": ["lora", "layers"]}, "'lora' stands beside layers that stay as they are"),
        ({"trains": ["lora"], "rows": "new"}, "rows = 'new' is of embeddings and head"),
        ({"lora_rank": 4}, "lora_rank: no effect without 'lora'"),
        ({"base_precision": "nf4", "lora_alpha": 7}, "lora_alpha, base_precision: no effect"),
        ({"weights": [0.5, 0.0]}, r"weights: a weight of 0.0 in \[0.5, 0.0\]"),
        ({"weights": [0.5, -1]}, "a weight of -1"),
        ({"kl_weight": -1.0}, "greater than or equal to 0"),
        ({"schedule": "wsd", "warmup_steps": 3}, "more than steps = 3"),
    ],
)
def test_settings_that_can_not_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        pretrain.Settings(**{**SHORT, **changes})


def test_a_recipe_is_refused_before_the_hours_are_spent() -> None:
    made: Any = ("corpora.prepare", None)

    def problems(roles: dict[str, list[Any]], **changes: Any) -> str:
        return "\n".join(pretrain.disagreements(pretrain.Settings(**changes), {"corpus": [made], **roles}))

    assert problems({}) == "" == problems({"reference": ["a"]}, kl_weight=0.1)
    assert "needs the role `reference`" in problems({}, kl_weight=0.1)
    assert "rows = 'new' and kl_weight = 0.1: needs" in problems({}, kl_weight=0.1, rows="new")
    assert "no effect" in problems({"reference": [made]})
    assert "2 weights for 1 corpora" in problems({}, weights=[0.5, 0.5])
    assert problems({"corpus": ["texts/*.jsonl"]}, weights=[0.5, 0.5]) == ""  # a pattern may be many files
    assert "2 weights for 1 corpora" in problems({"corpus": ["texts.jsonl"]}, weights=[0.5, 0.5])
    assert "1 weights for 2 corpora" in problems({"corpus": ["texts/*.jsonl", made]}, weights=[1.0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kl_weight": 0.1}, "kl_weight = 0.1: needs the role `reference`"),
        ({"rows": "new"}, "rows = 'new': needs the role `reference`"),
        ({"block_tokens": 129}, "block_tokens = 129, but .* was made for 128"),
        ({"weights": [0.5, 0.3, 0.2]}, "3 weights for 2 files of corpus: "),
    ],
)
def test_inputs_that_do_not_go_with_the_settings(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SamovarError, match=said):
        trained(models["tied"], corpus, tmp_path, **changes)


def test_references_that_do_not_serve(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="a reference has no effect"):
        trained(models["tied"], corpus, tmp_path, reference=models["old"])
    with pytest.raises(ModelError, match="has all 330 tokens"):
        trained(models["old"], corpus, tmp_path, rows="new", reference=models["tied"])
    short = model_with(
        old_tokenizer(tmp_path / "t"), tmp_path / "short", OLD_TOKENS, seed=0, max_position_embeddings=24
    )
    with pytest.raises(ModelError, match="for the reference, whose context is 24") as refused:
        trained(models["tied"], corpus, tmp_path, kl_weight=0.1, reference=short, block_tokens=64)
    assert "lower block_tokens to" in refused.value.hint


@pytest.mark.parametrize(("number", "role"), [(float("nan"), "model"), (float("inf"), "reference")])
def test_weights_that_are_not_finite(
    models: dict[str, Path], corpus: tuple[Path, Path], tmp_path: Path, number: float, role: str
) -> None:
    roles = {"model": models["tied"], "reference": models["old"]}
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in roles[role].iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    values = weights(broken)
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = number
    save_file(values, broken / "model.safetensors", metadata={"format": "pt"})
    roles[role] = broken
    with pytest.raises(ModelError, match=r"broken: 1 of 2048 numbers in model.layers.1.mlp.up_proj.weight"):
        trained(roles["model"], corpus, tmp_path, kl_weight=0.1, reference=roles["reference"])

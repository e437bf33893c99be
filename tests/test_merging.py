"""One model out of many parts: after a new vocabulary, LoRA and trained matrices, and LoRA on two layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from crossings import extended_tokenizer, model_with, old_tokenizer
from safetensors.torch import load_file, save_file
from tiny import TEXTS, chats, tiny_model

from adaptation import embeddings
from adaptation.trained import Trained, made_ready
from distill import train
from foundation.adapters import Lora, with_adapters
from foundation.dataio import write_jsonl
from foundation.errors import ModelError
from foundation.losses import cross_entropy
from foundation.model import load, save
from foundation.report import Silent
from foundation.rows import pack
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def extended(folder: Path, *, tied: bool, stored: torch.dtype) -> Path:
    """A model whose vocabulary was extended by adaptation.embeddings, its weights stored in a dtype."""
    before = model_with(old_tokenizer(folder / "t"), folder / "before", 330, seed=5, tie_word_embeddings=tied)
    values = {name: value.to(stored) for name, value in load_file(before / "model.safetensors").items()}
    save_file(values, before / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps(config | {"dtype": str(stored).removeprefix("torch.")}))
    tokenizer = extended_tokenizer(folder / "extended")
    embeddings.run(embeddings.Settings(), {"model": before, "tokenizer": tokenizer}, folder, Silent())
    return folder / "model"


def tuned(folder: Path, work: Path, parts: list[Any]) -> Any:
    """The live model after ten steps: adapters and matrices moved far."""
    lora = Lora(rank=4, alpha=16, seed=0)
    model = made_ready(folder, parts, lora, "fp32", max_tokens=32, report=Silent())
    rows = pack(TEXTS, Tokenizer(folder), 32, work, apart=True)
    settings = TuneSettings(steps=10, batch_rows=4, warmup_steps=0, learning_rate=2e-2, precision="fp32")
    tune(model, rows, cross_entropy, settings, work, Silent(), pad_id=0)
    return model


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_and_reloaded_it_says_what_the_live_one_said(
    tmp_path: Path, tied: bool, stored: torch.dtype
) -> None:
    """Logits in fp32 within 1e-5. A bf16 base stays one: there each number is the live one, rounded once."""
    folder = extended(tmp_path, tied=tied, stored=stored)
    assert len(Tokenizer(folder)) == 400
    model = tuned(folder, tmp_path / "work", ["embeddings", "head", "lora"])
    ids = torch.tensor([Tokenizer(folder).encode(text)[:16] for text in (TEXTS[0], TEXTS[2])])
    with torch.no_grad():
        live, base = model(ids).logits, load(folder)(ids).logits
    state = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    save(Trained(model).on(folder), folder, tmp_path / "merged")

    loaded = load(tmp_path / "merged")
    with torch.no_grad():
        merged = loaded(ids).logits
    assert (live - base).abs().max() > 1  # ten steps did move it
    files = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in files.values()} == {stored}
    if stored == torch.float32:
        assert (merged - live).abs().max() <= 1e-5
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied == (HEAD not in files)
    for name, value in files.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" not in state:
            assert torch.equal(value, state[name].to(stored))
            continue
        up, down = (state[f"{stem}.lora_{side}.default.weight"] for side in "BA")
        wanted = state[f"{stem}.base_layer.weight"] + 16 / 4 * (up @ down)
        one_step = 2**-7 if stored == torch.bfloat16 else 1e-5  # sums in another order may round to either side
        torch.testing.assert_close(value, wanted.to(stored), atol=1e-7, rtol=one_step)


@pytest.mark.parametrize(("layers", "touched"), [(4, {0, 3}), (2, {0, 1}), (1, {0})])
def test_lora_on_the_ends_moves_the_first_and_the_last_layer(
    tmp_path: Path, layers: int, touched: set[int]
) -> None:
    folder = tiny_model(tmp_path / "model", layers=layers)
    write_jsonl(tmp_path / "chats.jsonl", chats())
    for name in ("ends", "all"):
        kind: Literal["ends", "all"] = "ends" if name == "ends" else "all"
        settings = train.Settings(
            lora_rank=4,
            lora_alpha=8,
            lora_layers=kind,
            steps=3,
            batch_rows=4,
            warmup_steps=0,
            learning_rate=1e-2,
        )
        inputs = {"model": folder, "data": (tmp_path / "chats.jsonl",)}
        figures = train.run(settings, inputs, tmp_path / name, Silent())
        before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / name / "model"))
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        wanted = touched if kind == "ends" else set(range(layers))
        assert moved == {key for key in before if "_proj" in key and int(key.split(".")[2]) in wanted}
        shapes = [after[key].shape for key in moved]
        assert figures["trained_parameters"] == sum(4 * (rows + columns) for rows, columns in shapes)


def test_ends_without_lora_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_layers: of LoRA's base alone; set lora_rank"):
        train.Settings(lora_layers="ends")


def test_what_lora_does_not_reach_is_told(tmp_path: Path) -> None:
    """Phi 3 joins q, k and v into one matrix, gate and up into another: names that LoRA does not look for."""
    reports = {}
    for kind in ("llama", "phi3"):
        model, reports[kind] = tiny_model(tmp_path / kind, model_type=kind), Silent()
        with_adapters(model, Lora(2, 2, 17), "fp32", "peft", max_tokens=16, report=reports[kind])
    assert reports["llama"].notes == []
    assert [note.split(":")[0] for note in reports["phi3"].notes] == [
        "LoRA does not reach gate_up_proj, qkv_proj"
    ]


def test_a_rank_above_the_width_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with pytest.raises(ModelError, match=r"lora_rank = 33, but .* has a hidden size of 32"):
        with_adapters(model, Lora(33, 2, 17), "fp32", "peft", max_tokens=16, report=Silent())

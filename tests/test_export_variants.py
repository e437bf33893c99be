"""The very models that this project makes run in llama.cpp as they do in transformers: every architecture,
whole, without some layers, with another vocabulary, and with an embedding that was carried over.

A smaller count of what benchmarks/export_parity.py counts in full.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import variants
from handmade import export
from variants import ARCHITECTURES, VARIANTS, Variants

from foundation.gguf_header import read
from foundation.shape import ModelShape

LEARNT, LINES, POSITIONS = 600, 150, 1000
Text = tuple[list[str], list[str]]  # Russian, English


@pytest.fixture(scope="session")
def text() -> Text:
    """Lines of the flight-crew world: those to learn from, then those that are compared."""
    return variants.lines(LEARNT + LINES, None)


@pytest.fixture(scope="session")
def made(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Variants:
    russian, english = text
    return Variants(tmp_path_factory.mktemp("variants"), russian[:LEARNT], english[:LEARNT])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_and_tokenises_like_transformers(
    architecture: str, variant: str, made: Variants, text: Text, tmp_path: Path
) -> None:
    compared = [line for pair in zip(*(side[LEARNT:] for side in text), strict=True) for line in pair]
    folder = made.folder(architecture, variant)
    found = variants.parity(folder, export(folder, tmp_path / "out"), compared, POSITIONS)
    logits, texts = found["logits"], found["tokenisation"]
    assert found["positions_past_window"] >= POSITIONS
    assert logits["kl_mean"] < 1e-6
    assert logits["top1"] + logits["ties"] / logits["tokens"] == 1.0
    assert architecture == "gemma3" or logits["ties"] == 0  # ggml's GELU comes from a table of float16 numbers
    assert {name: group["different"] for name, group in texts.items()} == dict.fromkeys(texts, 0), texts
    assert texts["lines"]["equal"] == 2 * LINES
    assert texts["added_tokens"]["equal"] == 5 * found["added_tokens"] >= 15
    assert found["ids"]["different"] == []


@pytest.mark.slow
def test_the_variants_are_what_they_are_called(made: Variants, text: Text, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for architecture in ARCHITECTURES:
        folders = {variant: made.folder(architecture, variant) for variant in VARIANTS}
        shapes = {variant: ModelShape.from_folder(folder) for variant, folder in folders.items()}
        assert shapes["pruned"].layers == shapes["plain"].layers - len(variants.REMOVED)
        assert shapes["extended"].vocab > shapes["plain"].vocab + variants.ADDED // 2
        russian = "\n".join(text[0][LEARNT:])
        tokens = {v: len(AutoTokenizer.from_pretrained(str(f)).encode(russian)) for v, f in folders.items()}
        assert tokens["extended"] == tokens["propagated"] < 0.8 * tokens["plain"]
        weights = {v: (f / "model.safetensors").read_bytes() for v, f in folders.items()}
        assert len(set(weights.values())) == len(VARIANTS)
    keys, _ = read(export(made.folder("gemma3", "pruned"), tmp_path))
    assert (
        json.dumps(keys["gemma3.attention.sliding_window_pattern"]) == "[true, true, true, false, true, true]"
    )

"""The memory estimate against what llama.cpp reported for these shapes, in MiB."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.fits import (
    ASSUMED_CUDA_CONTEXT_BYTES,
    COMPUTE_MARGIN_BYTES,
    MIB,
    compute_bytes,
    fits,
    kv_bytes,
    memory,
)
from foundation.shape import ModelShape


def shape(
    kind: str, layers: int, hidden: int, ffn: int, heads: int, kv: int, head: int, vocab: int
) -> ModelShape:
    return ModelShape.from_config(
        {
            "model_type": kind,
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": head,
            "vocab_size": vocab,
            "max_position_embeddings": 40_960,
            "sliding_window": 512 if kind == "gemma3_text" else None,
        }
    )


SHAPES = {
    "gemma3-270m": shape("gemma3_text", 18, 640, 2048, 4, 1, 256, 262_144),
    "qwen3-0.6b": shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151_936),
    "qwen3-4b": shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151_936),
}
# name, context of all slots, slots, KV f16, KV q8_0, compute with all logits, compute with one a slot
MEASURED = [
    ("gemma3-270m", 4096, 1, 27, 14, 514, 23),
    ("gemma3-270m", 4096, 12, 108, 57, 514, None),
    ("gemma3-270m", 32_768, 1, 111, 59, 514, 51),
    ("qwen3-0.6b", 4096, 1, 448, 238, 313, 30),
    ("qwen3-4b", 4096, 1, 576, 306, 307, 84),
    ("qwen3-4b", 32_768, 1, 4608, 2448, 307, 112),
]


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_kv_is_exact_and_compute_within_its_band(row: tuple) -> None:
    name, context, slots, f16, q8, all_logits, few_logits = row
    per_slot = -(-(context // slots) // 256) * 256
    for cache, wanted in (("f16", f16), ("q8_0", q8)):
        got = kv_bytes(SHAPES[name], per_slot, slots=slots, cache=cache, batch_tokens=512)
        assert round(got / MIB) == wanted
    for outputs, wanted in ((512, all_logits), (slots, few_logits)):
        got = compute_bytes(SHAPES[name], per_slot, outputs=outputs, batch_tokens=512) / MIB
        if wanted is not None:
            assert got + COMPUTE_MARGIN_BYTES / MIB >= wanted
            assert -0.041 <= got / wanted - 1 <= 0.075


def test_twelve_slots_of_2048_in_one_process() -> None:
    found = memory(SHAPES["gemma3-270m"], 272 * MIB, 2048, slots=12)
    without_assumptions = found.total_bytes - ASSUMED_CUDA_CONTEXT_BYTES - COMPUTE_MARGIN_BYTES
    assert round(without_assumptions / MIB) == 545


def test_slots_are_rounded_as_llama_cpp_does() -> None:
    found = memory(SHAPES["qwen3-0.6b"], 0, 300, slots=3)
    assert found.context_tokens == 512
    assert found.kv_bytes == memory(SHAPES["qwen3-0.6b"], 0, 512, slots=3).kv_bytes


def test_a_card_of_six_gigabytes_by_hand() -> None:
    """qwen3-4b: 5577 MiB of 6144 are there after 555 + 12; 576 a slot of 4096, 4076 of weights: two fit."""
    found = fits(SHAPES["qwen3-4b"], 4076 * MIB, 6144 * MIB, 4096)
    assert found is not None and found.slots == 2
    assert found.total_bytes == (4076 + 2 * 576 + 84 + 18 + 555) * MIB
    assert fits(SHAPES["qwen3-4b"], 4076 * MIB, 6144 * MIB, 32_768) is None
    assert fits(SHAPES["qwen3-4b"], 4076 * MIB, 6144 * MIB, 4096, cache="q8_0").slots == 4


@given(
    name=st.sampled_from(sorted(SHAPES)),
    card=st.integers(1024, 24_576),
    context=st.integers(1, 16_384),
)
def test_the_most_slots_fit_and_one_more_does_not(name: str, card: int, context: int) -> None:
    weights = 300 * MIB
    found = fits(SHAPES[name], weights, card * MIB, context)
    slots = found.slots if found else 0
    if found:
        assert found.total_bytes <= card * MIB
        assert found.context_tokens >= context
    if slots < 256:
        assert memory(SHAPES[name], weights, context, slots=slots + 1).total_bytes > card * MIB


def test_shapes_are_the_real_ones() -> None:
    assert SHAPES["qwen3-0.6b"].parameters() == 751_632_384  # published 0.75B with the untied copy
    assert SHAPES["gemma3-270m"].parameters() == 268_098_176

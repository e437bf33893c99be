"""ModelShape against the models that transformers builds from the same config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import ModelError
from foundation.shape import ModelShape

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
LLAMA = {"model_type": "llama", **SIZES}


def instantiate(kind: str, **changes: Any) -> tuple[Any, ModelShape]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config)
    return model, ModelShape.from_config(json.loads(config.to_json_string()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 20, "attention_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 32, "attention_bias": True}),
        ("gemma3_text", {"head_dim": 16}),
    ],
)
def test_parameters_and_tensors_are_those_of_transformers(kind: str, changes: dict, tied: bool) -> None:
    model, shape = instantiate(kind, tie_word_embeddings=tied, **changes)
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shape.tensors() == named
    assert shape.tied is tied


def test_rope_in_both_spellings() -> None:
    new = ModelShape.from_config(
        LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    )
    old = ModelShape.from_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}})
    assert new.rope == old.rope
    assert (new.rope.kind, new.rope.theta, new.rope.factor) == ("llama3", 5e5, 8.0)
    assert ModelShape.from_config(LLAMA).rope.kind == "default"


def test_gemma_windows_by_list_by_pattern_and_local_theta() -> None:
    _, shape = instantiate("gemma3_text", head_dim=16, num_hidden_layers=7, sliding_window=32)
    assert shape.windows == (32, 32, 32, 32, 32, None, 32)
    assert (shape.rope.theta, shape.rope.local_theta) == (1_000_000, 10_000)
    old = {
        **SIZES,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
    }
    assert ModelShape.from_config(old).windows == (32, None, 32, None)


def test_windows_of_qwen_need_the_switch_and_mistral_has_them_by_default() -> None:
    qwen = {**SIZES, "model_type": "qwen3", "sliding_window": 32, "max_window_layers": 3}
    assert ModelShape.from_config(qwen).windows == (None,) * 4
    assert ModelShape.from_config(qwen | {"use_sliding_window": True}).windows == (None, None, None, 32)
    assert ModelShape.from_config({**SIZES, "model_type": "mistral"}).windows == (4096,) * 4
    assert (
        ModelShape.from_config({**SIZES, "model_type": "mistral", "sliding_window": None}).windows
        == (None,) * 4
    )


def test_absent_keys_take_the_family_defaults() -> None:
    assert ModelShape.from_config(LLAMA).tied is False
    assert ModelShape.from_config({**SIZES, "model_type": "gemma3_text"}).tied is True
    assert ModelShape.from_config(LLAMA).head_dim == 12
    assert ModelShape.from_config({**SIZES, "model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: llama"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_scaling": 3}, "rope_parameters is 3"),
    ],
)
def test_bad_configs_are_refused_by_key(change: dict, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ModelShape.from_config(LLAMA | change)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        ModelShape.from_config({"model_type": "qwen3", "hidden_size": 0})
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"):
        assert key in caught.value.message


def test_folder_without_or_with_broken_config(tmp_path: Path) -> None:
    (tmp_path / "stage" / "model").mkdir(parents=True)
    for name in ("manifest.json", "model/config.json"):
        (tmp_path / "stage" / name).write_text("{}")
    for given, hint in (("", "save_pretrained"), ("stage", f"folder of a stage; give {tmp_path}/stage/model")):
        with pytest.raises(ModelError, match=r"no config\.json") as caught:
            ModelShape.from_folder(tmp_path / given)
        assert hint in caught.value.hint
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not supported"):
        ModelShape.from_folder(tmp_path)


@pytest.mark.realdata
def test_real_models(samovar_data: Path) -> None:
    shape = ModelShape.from_folder(samovar_data / "models" / "stories260K")
    assert (shape.layers, shape.heads, shape.kv_heads, shape.vocab, shape.tied) == (5, 8, 4, 512, True)
    assert shape.parameters() == 260_032


def test_layer_types_must_name_every_layer() -> None:
    config = {**SIZES, "model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 3}
    with pytest.raises(ModelError, match="layer_types has 3 entries, num_hidden_layers is 4"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("num_hidden_layers", 10**9, 512),
        ("max_position_embeddings", 10**12, 2**24),
        ("vocab_size", 10**12, 2**24),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(key: str, value: int, most: int) -> None:
    """Else what walks over the layers would fill the memory with the names of their tensors."""
    with pytest.raises(ModelError, match=f"{key} is {value}, {most} at most is allowed"):
        ModelShape.from_config({**LLAMA, key: value})


def test_a_config_that_nests_without_end_and_a_model_type_that_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelShape.from_folder(tmp_path)
    with pytest.raises(ModelError, match=r"model_type .*llama.* is not supported"):
        ModelShape.from_config({**LLAMA, "model_type": ["llama"]})

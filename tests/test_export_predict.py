"""export.predict: sizes against files that export.gguf and llama.cpp's quantiser really wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from handmade import CHAT_TEMPLATE, export, model_folder, sentencepiece_like, write_tokenizer

from export import ggufs, predict, quantize
from export.predict import gguf_bytes, tensor_types
from foundation.errors import ModelError
from foundation.shape import ModelShape
from prune.cut import cut_folder

LLAMA3 = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": True}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # rows that take K-quants
EIGHTY = {"num_hidden_layers": 80, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
EIGHTY_WIDE = EIGHTY | {"hidden_size": 256, "head_dim": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE | {"num_hidden_layers": 9}),
    "llama-one-layer-tied": ("llama", WIDE | {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "llama3-biases": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "hidden_size": 288}),
    "llama-80": ("llama", EIGHTY),  # 80 layers count as 70B, where values get more bits
    "llama-80-wide": ("llama", EIGHTY_WIDE),
    "llama-80-no-shared-heads": ("llama", EIGHTY_WIDE | {"num_key_value_heads": 4}),
    "mistral-40": (
        "mistral",
        WIDE | {"num_hidden_layers": 40, "sliding_window": None, "intermediate_size": 96},
    ),
    "qwen2": ("qwen2", {"hidden_size": 288, "intermediate_size": 512, "head_dim": 72}),
    "qwen2-80": ("qwen2", EIGHTY_WIDE | {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", WIDE | {"hidden_size": 768, "num_hidden_layers": 13, "num_key_value_heads": 1}),
    "qwen3-odd-rows": ("qwen3", {"hidden_size": 80, "intermediate_size": 96, "tie_word_embeddings": True}),
    "qwen3-80": ("qwen3", EIGHTY_WIDE),
    "gemma3": ("gemma3_text", GEMMA | {"hidden_size": 256, "num_hidden_layers": 24, "num_key_value_heads": 1}),
    "gemma3-48": ("gemma3_text", GEMMA | {"hidden_size": 48, "intermediate_size": 512}),
}
FAST = ("llama", "llama3-biases", "qwen2", "qwen3-odd-rows", "gemma3")


def files(folder: Path, out: Path) -> dict[str, Path]:
    """Every kind of file that the project makes of `folder`."""
    made = {kind.upper(): export(folder, out / kind, dtype=kind) for kind in ("f32", "f16", "bf16")}
    for kind, mix in quantize.MIXES.items():
        made[kind] = out / f"{kind}.gguf"
        quantize._quantise(made["BF16"], made[kind], mix.number, out)
    return made


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_sizes_are_those_of_real_files(name: str, tmp_path: Path) -> None:
    kind, changes = CASES[name]
    folder = model_folder(tmp_path / "hf", kind, dtype="bfloat16", **changes)
    made = files(folder, tmp_path)
    assert set(made) == set(predict.KINDS)
    assert {k: gguf_bytes(folder, k) for k in made} == {k: path.stat().st_size for k, path in made.items()}
    shape = ModelShape.from_folder(folder)
    for quantised in quantize.MIXES:
        wanted = sorted(t.type for t in ggufs.tensors(made[quantised]) if t.name != "rope_freqs.weight")
        assert sorted(tensor_types(shape, quantised).values()) == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sizes_of_fewer_layers_are_those_of_the_cut_model(name: str, tmp_path: Path) -> None:
    """Which layers go does not matter, how many does."""
    kind, changes = CASES[name]
    folder = model_folder(tmp_path / "hf", kind, **(changes | {"num_hidden_layers": 9}))
    for number, gone in enumerate(([8], [0, 5], [1, 2, 3, 4, 5, 6, 7])):
        cut = tmp_path / f"cut{number}"
        cut_folder(folder, gone, cut)
        made = files(cut, tmp_path / f"out{number}")
        for quantised, path in made.items():
            assert gguf_bytes(folder, quantised, layers=9 - len(gone)) == path.stat().st_size
            assert gguf_bytes(cut, quantised) == path.stat().st_size


def test_without_a_sliding_layer_the_file_is_smaller_than_said(tmp_path: Path) -> None:
    """Counted for a model of one layer in general; the cut folder itself is counted exactly."""
    folder = model_folder(tmp_path / "hf", "gemma3_text", **(GEMMA | {"num_hidden_layers": 6}))
    cut_folder(folder, range(5), tmp_path / "cut")
    size = export(tmp_path / "cut", tmp_path / "out").stat().st_size
    assert gguf_bytes(tmp_path / "cut", "F32") == size
    assert size < gguf_bytes(folder, "F32", layers=1) < size + 300


def test_every_layer_less_is_a_smaller_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", num_hidden_layers=12)
    for kind in predict.KINDS:
        sizes = [gguf_bytes(folder, kind, layers=n) for n in range(1, 13)]
        assert sizes == sorted(set(sizes)) and sizes[-1] == gguf_bytes(folder, kind)


def test_other_tokenizers_and_names_are_counted(tmp_path: Path) -> None:
    """Scores, bytes in several letters, a template, and the name that the file gives itself."""
    folder = model_folder(tmp_path / "hf", vocab_size=640)
    assert gguf_bytes(folder, "F32", model_name="another-name") == (
        export(folder, tmp_path / "named", model_name="another-name").stat().st_size
    )
    before = gguf_bytes(folder, "F32")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{# длиннее #}" * 40, encoding="utf-8")
    after = gguf_bytes(folder, "F32")
    assert after == export(folder, tmp_path / "templated").stat().st_size > before
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    write_tokenizer(folder, sentencepiece_like(), **config)
    assert gguf_bytes(folder, "Q8_0") != before
    assert gguf_bytes(folder, "F32") == export(folder, tmp_path / "spm").stat().st_size


def test_no_weights_are_needed_and_the_vocabulary_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "hf", num_hidden_layers=6)
    wanted = [gguf_bytes(folder, "Q4_K_M", layers=n) for n in range(1, 7)]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    reads = []
    monkeypatch.setattr(
        predict, "read_vocabulary", lambda *args, read=predict.read_vocabulary: reads.append(1) or read(*args)
    )
    assert [gguf_bytes(copy, "Q4_K_M", layers=n) for n in range(1, 7)] == wanted
    assert len(reads) == 1


def test_more_bits_by_hand() -> None:
    """Of 16 layers: the first two, the last two, and of those between every third, from the fifth on."""
    assert [i for i in range(16) if predict._costly(i, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]


def test_refusals(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", num_hidden_layers=2)
    with pytest.raises(
        ModelError, match=r"type 'Q2_K' is not made here; made are F32, F16, BF16, Q8_0, Q4_K_M"
    ):
        gguf_bytes(folder, "Q2_K")
    for layers in (0, 3):
        with pytest.raises(ModelError, match=rf"{layers} layers asked, the model has 1\.\.2"):
            gguf_bytes(folder, "F16", layers=layers)
    windowed = model_folder(tmp_path / "m", "mistral", sliding_window=64)
    with pytest.raises(ModelError, match="sliding windows of 64"):
        gguf_bytes(windowed, "F16")

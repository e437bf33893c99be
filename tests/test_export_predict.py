"""export.quants.predict: sizes against files that export.gguf and llama.cpp's quantiser really wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from handmade import CHAT_TEMPLATE, export, model_folder, sentencepiece_like, write_tokenizer

from export.quants import predict, quantiser
from export.quants.importance import Importance
from export.quants.predict import gguf_bytes, tensors_as
from export.quants.quantiser import Wish
from export.quants.types import QUANTS
from export.weights.architectures import check
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
    "rows-of-288-and-240": ("qwen3", {"hidden_size": 288, "intermediate_size": 240, "num_hidden_layers": 2}),
}
FAST = ("llama", "llama3-biases", "qwen2", "qwen3-odd-rows", "gemma3")
DIRECT = ("F32", "F16", "BF16", "Q8_0")  # what export.gguf writes itself
COMMON = (*DIRECT, "Q4_K_M")


def files(folder: Path, out: Path, kinds: tuple[str, ...] = COMMON) -> dict[str, Path]:
    """Files of `folder`: those that export.gguf writes itself, the others by llama.cpp from its BF16."""
    made = {kind: export(folder, out / kind, dtype=kind.lower()) for kind in (*DIRECT,) if kind in kinds}
    source = made.get("BF16") or export(folder, out / "source", dtype="bf16")
    for kind in kinds:
        if kind not in made:
            made[kind] = out / f"{kind}.gguf"
            matrix = ones(source) if QUANTS[kind].needs_imatrix else None
            quantiser.write(source, made[kind], Wish(kind, importance=matrix))
    return made


def ones(source: Path) -> Importance:
    """An importance matrix for which every column is the same."""
    matrices = [t for t in gguf.GGUFReader(source).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return Importance("ones", (), 0, {t.name: np.ones(int(t.shape[0]), np.float32) for t in matrices})


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_sizes_are_those_of_real_files(name: str, tmp_path: Path) -> None:
    kind, changes = CASES[name]
    folder = model_folder(tmp_path / "hf", kind, dtype="bfloat16", **changes)
    made = files(folder, tmp_path)
    assert {k: gguf_bytes(folder, k) for k in made} == {k: path.stat().st_size for k, path in made.items()}
    assert_types(folder, made["Q4_K_M"], "Q4_K_M")
    quantiser.write(made["F32"], tmp_path / "q8.gguf", Wish("Q8_0"))  # the same whoever writes it
    assert (tmp_path / "q8.gguf").stat().st_size == gguf_bytes(folder, "Q8_0")


def assert_types(folder: Path, path: Path, kind: str) -> None:
    """Tensor by tensor, by gguf's own reader, which does not know Q2_0 yet."""
    shape = ModelShape.from_folder(folder)
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {t.name: t.type for t in tensors_as(shape, check(shape), kind)} == found


@pytest.mark.slow
@pytest.mark.parametrize("rows", [{"intermediate_size": 288}, {"hidden_size": 240, "intermediate_size": 256}])
def test_every_type_that_there_is(rows: dict[str, int], tmp_path: Path) -> None:
    """Rows of 288 hold no whole blocks of 256 weights, those of 240 no whole blocks of 32 either."""
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = model_folder(tmp_path / "hf", "qwen3", **(WIDE | small | rows))
    kinds = tuple(kind for kind in QUANTS if kind != "Q1_0")
    sizes = {kind: gguf_bytes(folder, kind) for kind in kinds}
    for kind, path in files(folder, tmp_path, kinds).items():
        size = path.stat().st_size
        if QUANTS[kind].needs_imatrix:  # what such a file tells of the matrix is not foreseen
            reader = gguf.GGUFReader(path)
            told = sum(
                sum(len(p.tobytes()) for p in f.parts) for k, f in reader.fields.items() if "imatrix" in k
            )
            assert told == 91 and abs(size - sizes[kind] - told) < 32  # by hand: 45 for the file's name, 46
        else:
            assert size == sizes[kind]
        if kind != "Q2_0":
            assert_types(folder, path, kind)
    with pytest.raises(ModelError, match="no tensor type fallback is defined for type q1_0"):
        gguf_bytes(folder, "Q1_0")


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
    for kind in COMMON:
        sizes = [gguf_bytes(folder, kind, layers=n) for n in range(1, 13)]
        assert sizes == sorted(set(sizes)) and sizes[-1] == gguf_bytes(folder, kind)


def test_other_tokenizers_and_names_are_counted(tmp_path: Path) -> None:
    """Scores, bytes in several letters, a template, a README, and the name that the file gives itself."""
    folder = model_folder(tmp_path / "hf", vocab_size=640)
    assert gguf_bytes(folder, "F32", model_name="another-name") == (
        export(folder, tmp_path / "named", model_name="another-name").stat().st_size
    )
    before = gguf_bytes(folder, "F32")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{# длиннее #}" * 40, encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [ru, en]\n---\n", encoding="utf-8")
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


def test_refusals(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", num_hidden_layers=2)
    with pytest.raises(ModelError, match="'Q4_K' is no file type, did you mean 'Q4_K_M'"):
        gguf_bytes(folder, "Q4_K")
    for layers in (0, 3):
        with pytest.raises(ModelError, match=rf"{layers} layers asked, the model has 1\.\.2"):
            gguf_bytes(folder, "F16", layers=layers)
    windowed = model_folder(tmp_path / "m", "mistral", sliding_window=64)
    with pytest.raises(ModelError, match="sliding windows of 64"):
        gguf_bytes(windowed, "F16")

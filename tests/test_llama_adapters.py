"""Adapters in the binding to llama.cpp: what it takes, what it refuses, and where llama.cpp would die of it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from handmade import export, model_folder

from foundation import gguf_header
from foundation.errors import InputError, ModelError
from foundation.llama import LlamaModel

V, D, RANK = 640, 64, 4  # of the handmade model
QUERY, EMBEDDING = "blk.0.attn_q.weight", "token_embd.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model_folder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)
    return export(folder, tmp_path_factory.mktemp("gguf"))


def pair(name: str = QUERY, rows: int = 96, columns: int = D, rank: int = RANK) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"lora_a": (rank, columns), "lora_b": (rows, rank)}
    return {f"{name}.{part}": draw.normal(size=size).astype(np.float32) for part, size in shapes.items()}


def embedding(rank_a: int = RANK, rank_b: int = RANK) -> dict[str, np.ndarray]:
    sizes = {"lora_a": (V, rank_a), "lora_b": (D, rank_b)}
    return {f"{EMBEDDING}.{part}": np.full(size, 0.1, np.float32) for part, size in sizes.items()}


def adapter_file(out: Path, tensors: dict[str, np.ndarray], **keys: Any) -> Path:
    """An adapter; `keys` replace those that it should have, None leaves one out."""
    arch = keys.pop("arch", "llama")
    writer = gguf.GGUFWriter(out, arch)
    said = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": np.float32(8)}
    for key, value in (said | {key.replace("__", "."): value for key, value in keys.items()}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, np.float32):
            writer.add_float32(key, float(value))
        elif isinstance(value, float):
            writer.add_float64(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_an_adapter_changes_its_own_context_alone(path: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.gguf", pair())
    with LlamaModel(path) as model:
        with model.context(16, threads=1) as context:
            before = context.logits([5, 6, 7])
        adapter = model.adapter(file)
        with (
            model.context(16, threads=1) as plain,
            model.context(16, threads=1, adapters=[(adapter, 1.0)]) as changed,
        ):
            assert np.abs(changed.logits([5, 6, 7]) - before).max() > 0.01
            np.testing.assert_array_equal(plain.logits([5, 6, 7]), before)
            assert len(changed.generate_many([[5, 6, 7]] * 3, 5)) == 3


def test_an_adapter_is_no_model(path: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.gguf", pair())
    for vocab_only in (False, True):
        with pytest.raises(ModelError, match=r"a\.gguf is an adapter; open its base and give this beside it"):
            LlamaModel(file, vocab_only=vocab_only)
    with pytest.raises(ModelError, match="is no model but an importance matrix"):
        LlamaModel(adapter_file(tmp_path / "i.gguf", pair(), general__type="imatrix"))


@pytest.mark.parametrize(
    ("tensors", "keys", "said"),
    [
        (pair(), {"general__type": "model"}, "is no adapter: its general.type is 'model'"),
        (pair(), {"general__type": None}, "is no adapter: its general.type is None"),
        (pair(), {"arch": "qwen3"}, "llama.cpp refused .* arch mismatch"),
        (pair(), {"adapter__type": "other"}, "expect adapter.type to be 'lora'"),
        (pair(), {"adapter__type": 7}, "adapter.type is 7, a text is needed"),
        (pair(), {"adapter__lora__alpha": 8.0}, r"adapter\.lora\.alpha is 8\.0, a finite 32-bit float"),
        (pair(), {"adapter__lora__alpha": 8}, r"adapter\.lora\.alpha is 8, a finite 32-bit float"),
        (pair(), {"adapter__lora__alpha": np.float32("nan")}, r"adapter\.lora\.alpha is nan"),
        ({}, {}, "it holds no tensors"),
        (pair(rows=64), {}, "llama.cpp refused .* incorrect shape .*wrong base"),
        (pair("blk.7.attn_q.weight"), {}, "does not exist in base model"),
        ({f"{QUERY}.lora_a": pair()[f"{QUERY}.lora_a"]}, {}, "missing one component"),
        (pair() | {"other": np.ones((2, 2), np.float32)}, {}, "unexpected suffix"),
        ({k: v.astype(np.int32) for k, v in pair().items()}, {}, r"lora_a is \(64, 4\) of type 26; a matrix"),
        ({k: v[None] for k, v in pair().items()}, {}, r"lora_a is \(64, 4, 1\) of type 0"),
        (embedding(4, 3), {}, "the pair of token_embd.weight has ranks 4 and 3"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(
    tensors: dict[str, np.ndarray], keys: dict, said: str, path: Path, tmp_path: Path
) -> None:
    file = adapter_file(tmp_path / "a.gguf", tensors, **keys)
    with LlamaModel(path) as model, pytest.raises(ModelError, match=said):
        model.adapter(file)


def test_an_embedding_that_is_the_output_too_takes_no_adapter(path: Path, tied: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.gguf", embedding())
    with (
        LlamaModel(tied) as model,
        pytest.raises(ModelError, match="it changes the embedding, which is the out"),
    ):
        model.adapter(file)
    with LlamaModel(path) as model:
        adapter = model.adapter(file)
        with model.context(16, threads=1, adapters=[(adapter, 1.0)]) as context:
            assert np.isfinite(context.logits([5, 6])).all()


def test_files_that_are_cut_or_none(path: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.gguf", pair())
    with LlamaModel(path) as model:
        with pytest.raises(ModelError, match="no GGUF file at"):
            model.adapter(tmp_path / "none.gguf")
        for size, said in (
            (3, "is not a GGUF file"),
            (60, "header can not be read"),
            (-512, "refused .*within the file"),
        ):
            (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
            with pytest.raises(ModelError, match=said):
                model.adapter(tmp_path / "cut.gguf")
    with LlamaModel(path, vocab_only=True) as model, pytest.raises(ModelError, match="vocabulary only"):
        model.adapter(file)


def test_contexts_that_are_refused(path: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.gguf", pair())
    with LlamaModel(path) as model, LlamaModel(path) as other:
        adapter = model.adapter(file)
        with pytest.raises(InputError, match="loaded beside another model"):
            other.context(16, adapters=[(adapter, 1.0)])
        for scale in (math.nan, math.inf):
            with pytest.raises(InputError, match="a finite scale"):
                model.context(16, adapters=[(adapter, scale)])
        with pytest.raises(InputError, match="named twice"):
            model.context(16, adapters=[(adapter, 1.0), (adapter, 0.5)])


UNGUARDED = """
import sys
from foundation import gguf_header
from foundation.llama import LlamaModel
gguf_header.check_adapter = lambda *given: None
base, adapter = sys.argv[1:]
with LlamaModel(base) as model:
    with model.context(16, threads=1, adapters=[(model.adapter(adapter), 1.0)]) as context:
        context.logits([5, 6])
print("alive")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "keys", "on_tied"),
    [
        (embedding(4, 3), {}, False),
        (embedding(), {}, True),
        (pair(), {"adapter__type": 7}, False),
        (pair(), {"adapter__lora__alpha": 8.0}, False),
        ({k: v.astype(np.int32) for k, v in pair().items()}, {}, False),
    ],
    ids=["ranks-of-the-embedding", "tied", "type-no-text", "alpha-double", "whole-numbers"],
)
def test_without_the_guard_llama_cpp_ends_the_process(
    tensors: dict[str, np.ndarray], keys: dict, on_tied: bool, path: Path, tied: Path, tmp_path: Path
) -> None:
    """Why gguf_header looks first: should one of these live on, its guard can go."""
    file, base = adapter_file(tmp_path / "a.gguf", tensors, **keys), tied if on_tied else path
    with pytest.raises(ModelError):
        gguf_header.check_adapter(file, base)
    done = subprocess.run([sys.executable, "-c", UNGUARDED, str(base), str(file)], capture_output=True)
    assert done.returncode < 0 and b"alive" not in done.stdout

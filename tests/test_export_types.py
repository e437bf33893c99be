"""export/quants/types.py against llama.cpp's header, ggml's arithmetic and what the quantiser plans."""

from __future__ import annotations

import ctypes
import itertools
import re
from functools import cache
from math import prod
from pathlib import Path

import llamacpp
import numpy as np
import pytest

from export.about import About
from export.gguf import described, tensors_of
from export.quants.importance import Importance
from export.quants.quantiser import Wish, plan
from export.quants.types import OTHER_NAMES, QUANTS, TENSOR_TYPES, block, check_quant, check_type, type_name
from export.weights.architectures import TARGETS, gguf_names
from export.weights.layout import Keys, Layout, Tensor
from foundation.llama import library, listening
from foundation.shape import ModelShape


def test_numbers_are_those_of_gguf_py_and_of_llama_cpp() -> None:
    import gguf
    import llama_cpp

    for name, quant in QUANTS.items():
        prefix = "ALL" if name == "F32" else "MOSTLY"
        assert getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{name}") == quant.number
        if name != "Q2_0":  # newer than the gguf package
            assert gguf.LlamaFileType(quant.number).name == f"{prefix}_{name}"
    known = {t.name: int(t) for t in gguf.GGMLQuantizationType}
    assert {name: number for name, number in TENSOR_TYPES.items() if name != "Q2_0"}.items() <= known.items()
    assert type_name(24) == "I8"


def test_blocks_are_those_of_ggml() -> None:
    library()
    from llama_cpp._ggml import libggml_base_path

    ggml = ctypes.CDLL(str(libggml_base_path / "libggml-base.so"))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for name, number in TENSOR_TYPES.items():
        assert ggml.ggml_type_name(number).decode().upper() == name
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == block(name)


def test_every_type_that_llama_quantize_offers_is_there() -> None:
    source = (llamacpp.sources() / "tools/quantize/quantize.cpp").read_text(encoding="utf-8")
    offered = dict(re.findall(r'\{ "(\w+)", *(LLAMA_FTYPE_\w+),', source))
    assert set(offered) == {*QUANTS, *OTHER_NAMES, "COPY"}
    assert all(offered[name] == offered[meant] for name, meant in OTHER_NAMES.items())


def shape(kind: str, layers: int, kv_heads: int, tied: bool) -> ModelShape:
    """Rows that take any block."""
    sizes = {"num_hidden_layers": layers, "hidden_size": 2048, "intermediate_size": 4096, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": 256}
    rest = {"max_position_embeddings": 512, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6}
    return ModelShape.from_config({"model_type": kind, "hidden_act": "silu"} | sizes | heads | rest)


def stub(path: Path, of: ModelShape) -> list[Tensor]:
    """A file with the model's keys and table, and a hole for its weights; its matrices."""
    target = TARGETS[of.model_type]
    tensors = tensors_of(of, {new: old for old, new in gguf_names(of, target).items()}, "f16")
    (file,) = Layout(Keys.of(described(path.parent, of, target, About(), "f16")), tensors).files
    with path.open("wb") as written:
        written.write(file.head)
        written.truncate(file.size_bytes)
    return [tensor for tensor in tensors if len(tensor.shape) > 1]


@cache
def ones(columns: int) -> np.ndarray:
    return np.ones(columns, np.float32)


def test_meant_types_are_all_that_llama_cpp_plans_for_fitting_rows(tmp_path: Path) -> None:
    """Over models with and without shared heads, a tied embedding, an importance matrix, 70B's layers."""
    found: dict[str, set[str]] = {name: set() for name in QUANTS}
    cases = [("llama", 9, *rest) for rest in itertools.product((8, 2), (False, True), (False, True))]
    for kind, layers, kv_heads, tied, important in [*cases, ("llama", 80, 1, False, False)]:
        path = tmp_path / "stub.gguf"
        matrices = stub(path, shape(kind, layers, kv_heads, tied))
        means = {t.name: ones(t.shape[-1]) for t in matrices if t.name.startswith("blk.")}
        matrix = Importance("", (), 0, means) if important else None
        for name in QUANTS:
            planned = plan(path, Wish(name, importance=matrix))
            found[name] |= {planned[tensor.name] for tensor in matrices}
    found["MXFP4_MOE"].add("MXFP4")  # for the experts that no family here has
    assert found == {name: set(quant.types) for name, quant in QUANTS.items()}


def test_pure_files_have_the_first_type_alone(tmp_path: Path) -> None:
    path = tmp_path / "stub.gguf"
    matrices = stub(path, shape("qwen3", 1, 8, tied=True))
    for name, quant in QUANTS.items():
        planned = plan(path, Wish(name, pure=True))
        assert {planned[tensor.name] for tensor in matrices} == {quant.types[0]}


def test_bits_and_need_of_an_importance_matrix_are_llama_cpps_own_words(tmp_path: Path) -> None:
    llama3 = ModelShape.from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        }
    )
    assert prod(shape_of_embedding := llama3.tensors()["model.embed_tokens.weight"]) == 525336576
    assert shape_of_embedding == (128256, 4096)
    stub(tmp_path / "stub.gguf", llama3)
    for name, quant in QUANTS.items():
        lines: list[str] = []
        with listening(lines.append):
            plan(tmp_path / "stub.gguf", Wish(name))
        text = "\n".join(lines)
        told = re.search(r"quant size += .*\((.*) BPW\)", text)
        assert told and float(told[1]) == pytest.approx(quant.bits, abs=0.0051)
        assert ("will require an imatrix" in text) == quant.needs_imatrix


def test_unknown_names_are_refused_with_the_nearest() -> None:
    assert check_quant("Q4_K_M") == "Q4_K_M" and check_type("Q4_K") == "Q4_K"
    for name, meant in (("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("q8", "Q8_0"), ("IQ2-XXS", "IQ2_XXS")):
        with pytest.raises(ValueError, match=f"'{name}' is no file type, did you mean '{meant}'"):
            check_quant(name)
    with pytest.raises(ValueError, match="'q4_k' is no tensor type, did you mean 'Q4_K'"):
        check_type("q4_k")
    with pytest.raises(ValueError, match="'COPY' is no file type; known are F32, F16"):
        check_quant("COPY")

"""export/weights/layout.py against gguf-py: the same heads, byte for byte, and files its reader finds whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from export.weights.layout import Keys, Layout, Tensor
from foundation.errors import ModelError

TENSORS = [
    Tensor("token_embd.weight", (5, 64), "F32"),
    Tensor("blk.0.attn_norm.weight", (3,), "F32"),  # 12 bytes: the next one starts after padding
    Tensor("blk.0.attn_q.weight", (4, 256), "Q4_K"),
    Tensor("blk.0.attn_k.weight", (2, 32), "Q8_0"),
    Tensor("output.weight", (7, 3), "BF16"),
]


def with_keys(path: Path | None, **options: int) -> gguf.GGUFWriter:
    """One key of every kind that exports write, and of every number."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_name("модель")
    writer.add_token_list(["a", "ё", b"\xff\x00"])
    writer.add_token_scores([0.5, -1e6])
    writer.add_token_types([1, 6])
    writer.add_sliding_window_pattern([True, False, True])
    writer.add_key_value("bytes", b"\x01\x02", gguf.GGUFValueType.ARRAY)
    writer.add_key_value("halves", [1, 2], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT16)
    writer.add_array("lists", [[1, 2], [3]])
    for number in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{number}")(number, 7)
    writer.add_float32("f", 1e-6)
    writer.add_float64("d", 1e-6)
    writer.add_bool("b", True)
    return writer


def written(path: Path, **options: int) -> None:
    """TENSORS, all zeros, by gguf-py."""
    writer = with_keys(path, **options)
    for tensor in TENSORS:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in TENSORS:
        writer.write_tensor_data(np.zeros(tensor.size_bytes, np.uint8))
    writer.close()


def test_heads_and_sizes_are_those_of_gguf_py(tmp_path: Path) -> None:
    written(tmp_path / "model.gguf")
    (file,) = Layout(with_keys(None), TENSORS).files
    data = (tmp_path / "model.gguf").read_bytes()
    assert file.name == "model.gguf"
    assert data[: len(file.head)] == file.head
    assert len(data) == file.size_bytes == Layout(with_keys(None), TENSORS).size_bytes
    places = {t.name: int(t.data_offset) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {tensor.name: place for tensor, place in file.tensors} == places


@pytest.mark.parametrize("limit", [1, 200, 1280, 1292, 1900])
def test_shards_are_those_of_gguf_py(limit: int, tmp_path: Path) -> None:
    written(tmp_path / "model.gguf", split_max_size=limit)
    layout = Layout(with_keys(None), TENSORS, limit)
    assert 1 < len(layout.files) <= len(TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name for file in layout.files]
    for file in layout.files:
        data = (tmp_path / file.name).read_bytes()
        assert data[: len(file.head)] == file.head
        assert len(data) == file.size_bytes


def test_large_enough_a_limit_makes_one_file_without_split_keys() -> None:
    assert Layout(with_keys(None), TENSORS, 10**6).files == Layout(with_keys(None), TENSORS).files


def test_keys_can_be_kept_and_joined() -> None:
    first, second = gguf.GGUFWriter(None, "llama"), gguf.GGUFWriter(None, "llama")
    first.add_name("a")
    second.kv_data[0].clear()
    second.add_author("b")
    joined = Keys.of(first) + Keys.of(second)
    first.add_author("b")
    assert Layout(joined, []).files == Layout(first, []).files


def test_what_can_not_be_laid_out_is_refused() -> None:
    with pytest.raises(ModelError, match="rows of 48 can not be Q8_0, whose block is 32"):
        Layout(with_keys(None), [Tensor("a", (2, 48), "Q8_0")])
    with pytest.raises(ModelError, match="2 tensors have only 1 names"):
        Layout(with_keys(None), [Tensor("a", (2,), "F32")] * 2)
    with pytest.raises(ModelError, match="shard_bytes 1 makes 65536 files, 65535 are possible"):
        Layout(Keys(0, b""), [Tensor(str(i), (1,), "F32") for i in range(65536)], 1)

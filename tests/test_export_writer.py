"""export.weights.writer against gguf-py's quantisers, what it refuses, and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from export.weights import checkpoint
from export.weights.checkpoint import Checkpoint
from export.weights.layout import Layout, Tensor
from export.weights.writer import LARGEST, largest, stored, write_files
from foundation.errors import ModelError, StopRequested
from foundation.report import Silent

ROOT = Path(__file__).resolve().parent.parent
TYPES = ("F32", "F16", "BF16", "Q8_0")
ITEMS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def noise(rows: int = 24, columns: int = 96) -> np.ndarray:
    """Numbers of many sizes, with zeros, ties of rounding and a block of nothing but zeros."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((rows, columns), np.float32) * np.exp2(rng.integers(-30, 15, (rows, 1)))
    values[0, :32] = 0
    values[1, :4] = (0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8)  # halfway between neighbours of bfloat16
    values[2, :32] = np.arange(-16, 16) * 0.5  # halfway between neighbours of Q8_0: its scale is 8 / 127
    values[2, 0] = 127 / 2
    return values.astype(np.float32)


def as_stored(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 numbers in the type of a checkpoint; bfloat16 by cutting."""
    if kind == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(ITEMS[kind])


@pytest.mark.parametrize("source", ITEMS)
@pytest.mark.parametrize("target", TYPES)
def test_every_type_is_that_of_gguf_py(source: str, target: str) -> None:
    values = as_stored(noise(), source)
    exact = (values.astype(np.uint32) << 16).view(np.float32) if source == "bf16" else values.astype(np.float32)
    wanted = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[target])
    assert stored(values, target, "x").tobytes() == wanted.tobytes()


def test_the_largest_number() -> None:
    for kind in ITEMS:
        for values, wanted in (
            ([0.5, -3.0, 2.0], 3.0),
            ([-0.5, -0.25], 0.5),
            ([0.0, -0.0], 0.0),
            ([1.0, -np.inf], np.inf),
            ([np.inf, 1.0], np.inf),
        ):
            assert largest(as_stored(np.array(values, np.float32), kind)) == wanted
        for bits in (0x7FC0_0000, 0xFFC0_0000, 0x7F80_2000, 0xFFFF_FFFF):  # quiet, signalling, of both signs
            nan = np.array([0x3F80_0000, bits], np.uint32).view(np.float32)
            if kind != "bf16" or bits != 0x7F80_2000:  # cut to bfloat16 that is infinite
                assert np.isnan(largest(as_stored(nan, kind)))
    assert largest(np.empty((0, 3), np.float32)) == 0


@pytest.mark.parametrize("kind", TYPES)
def test_the_largest_number_of_a_type_is_written_and_no_larger_one(kind: str) -> None:
    """Whatever is let through is finite when gguf-py reads it."""
    top = np.full((1, 32), LARGEST[kind], np.float32)
    data = stored(top, kind, "x").view(np.uint8)
    read = gguf.quants.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[kind])
    assert np.isfinite(read).all()
    np.testing.assert_allclose(read, top, rtol=0.01)
    if kind != "F32":
        with pytest.raises(ModelError, match=f"x holds .*, too much for {kind.lower()}"):
            stored(np.nextafter(top, np.float32(np.inf)), kind, "x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ITEMS)
@pytest.mark.parametrize("target", TYPES)
def test_one_number_that_is_none_is_found(source: str, target: str, value: float) -> None:
    values = noise()
    values[23, 95] = value
    with pytest.raises(ModelError, match=r"blk\.7 holds infinite or undefined numbers"):
        stored(as_stored(values, source), target, "blk.7")


class TestBlocks:
    """A tensor of 7 rows of 64 bytes in blocks of at most 200 bytes."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 200)
        save_file(
            {"a": np.arange(112, dtype=np.float32).reshape(7, 16), "b": np.arange(3, dtype=np.float16)},
            tmp_path / "model.safetensors",
        )
        return tmp_path

    @pytest.mark.parametrize(("multiple", "rows"), [(1, [3, 3, 1]), (2, [2, 2, 2, 1]), (5, [5, 2])])
    def test_whole_multiples_of_rows(self, multiple: int, rows: list[int], folder: Path) -> None:
        blocks = [block.copy() for block in Checkpoint(folder).blocks("a", multiple)]
        assert [len(block) for block in blocks] == rows
        np.testing.assert_array_equal(np.concatenate(blocks), np.arange(112).reshape(7, 16))
        assert blocks[0].dtype == np.float32
        np.testing.assert_array_equal(Checkpoint(folder).read("b"), [0, 1, 2])

    def test_a_file_that_shrinks_while_it_is_read(self, folder: Path) -> None:
        found = Checkpoint(folder)
        blocks = found.blocks("a")
        next(blocks)
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:-300])
        with pytest.raises(ModelError, match=r"tensor a: .*model\.safetensors ends before it"):
            list(blocks)


def test_a_stop_is_heard_within_a_tensor(tmp_path: Path) -> None:
    class Stops(Silent):
        calls = 0

        def stop_requested(self) -> bool:
            self.calls += 1
            return self.calls == 3

    def rows(name: str) -> Iterator[np.ndarray]:
        for _ in range(5):
            yield np.zeros((1, 8), np.float32)

    layout = Layout(gguf.GGUFWriter(None, "llama"), [Tensor("a", (5, 8), "F32")])
    with pytest.raises(StopRequested):
        write_files(layout, rows, tmp_path, Stops())
    assert (tmp_path / "model.gguf").stat().st_size == len(layout.files[0].head) + 2 * 32


def test_rows_that_are_too_few_are_noticed(tmp_path: Path) -> None:
    layout = Layout(gguf.GGUFWriter(None, "llama"), [Tensor("a", (5, 8), "F32")])
    with pytest.raises(ModelError, match="lm_head gave 32 bytes, 160 were announced"):
        write_files(
            layout, lambda name: iter([np.zeros((1, 8), "f4")]), tmp_path, Silent(), origins={"a": "lm_head"}
        )


def test_no_block_is_larger_than_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of many blocks never passes through as a whole, whatever its type."""
    from handmade import empty_model

    from export import gguf as stage

    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 8192)
    folder = empty_model(tmp_path / "hf")
    written: list[int] = []

    class Sink:
        def write(self, data: Any) -> None:
            written.append(memoryview(data).nbytes)

    @contextmanager
    def open_sink(path: Path) -> Iterator[Sink]:
        yield Sink()

    plan = stage.planned(stage.Settings(dtype="f32"), folder)
    write_files(plan.layout, plan.rows, tmp_path, Silent(), open_file=open_sink)
    assert sum(written) == plan.layout.size_bytes
    assert max(written[1:]) == 8192  # after the head


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """8.4 GB that are a hole, with a vocabulary of 151,936: the 30 GB are benchmarks/export_memory.py."""
    program = ROOT / "benchmarks" / "export_memory.py"
    out = tmp_path / "found.json"
    command = [sys.executable, str(program), "--gigabytes", "6", "--types", "bf16", "f32", "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    for kind, row in json.loads(out.read_text())["types"].items():
        assert row["written_bytes"] > (8_000_000_000 if kind == "bf16" else 16_000_000_000)
        assert row["peak_bytes"] < 600_000_000

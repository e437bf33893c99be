"""Tensors come back from files as they went in, and a full disk is named."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import RunError
from prune.spill import Spill

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spill"))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 4)])
def test_files_give_back_the_same_bits(kind: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.randn(shape) * 3).to(kind)
    if kind.is_floating_point and tensor.numel() > 2:
        tensor.view(-1)[:3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    with Spill(tmp_path, 0) as spill:
        spill.put("a", tensor)
        assert (len(files(tmp_path)) == 1) == (tensor.nbytes > 0)
        back = spill.take("a")
    assert (back.dtype, back.shape, back.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert bits(back) == bits(tensor)


def test_a_transposed_tensor_comes_back_by_its_indices(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    with Spill(tmp_path, 0) as spill:
        spill.put(0, tensor)
        assert torch.equal(spill.take(0), tensor)


def test_memory_is_filled_before_files_and_files_go_with_their_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with Spill(folder, 100) as spill:
        for key in range(4):
            spill.put(key, torch.full((10,), key, dtype=torch.float32))  # 40 bytes each: two fit
        assert (spill.held_bytes, spill.filed_bytes, len(spill), len(files(folder))) == (80, 80, 4, 2)
        assert spill.take(0).tolist() == [0.0] * 10
        spill.put(4, torch.zeros(10))  # in the room of the first
        assert (spill.held_bytes, spill.filed_bytes) == (80, 80)
        spill.put(3, torch.ones(25))  # in place of one in a file
        assert (spill.held_bytes, spill.filed_bytes, spill.peak_filed_bytes) == (80, 140, 140)
        assert spill.take(3).tolist() == [1.0] * 25
        assert (spill.filed_bytes, len(files(folder))) == (40, 1)
        spill.drop(2)
        spill.drop("nobody")
        assert (len(spill), len(files(folder)), spill.filed_bytes) == (2, 0, 0)
        with pytest.raises(KeyError):
            spill.take(2)
        spill.clear()
        assert (len(spill), spill.held_bytes, spill.peak_held_bytes) == (0, 0, 80)
    assert not folder.exists()


def test_a_slice_does_not_hold_the_whole_it_was_cut_from(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    with Spill(tmp_path, 1000) as spill:
        spill.put(0, whole[:5])
        spill.put(1, whole)  # does not fit
        assert (spill.held_bytes, spill.filed_bytes) == (20, 4000)
        assert spill.take(0).untyped_storage().nbytes() == 20


@settings(max_examples=60, deadline=None)
@given(
    cap=st.integers(0, 60),
    acts=st.lists(st.tuples(st.sampled_from(["put", "take", "drop"]), st.integers(0, 3), st.integers(0, 6))),
)
def test_it_is_a_dictionary_whatever_lies_where(
    cap: int, acts: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, known = tmp_path_factory.mktemp("spill"), dict[int, list[float]]()
    with Spill(folder, cap) as spill:
        for number, (act, key, length) in enumerate(acts):
            if act == "put":
                known[key] = [float(number)] * length
                spill.put(key, torch.full((length,), float(number)))
            elif act == "drop":
                known.pop(key, None)
                spill.drop(key)
            elif key in known:
                assert spill.take(key).tolist() == known.pop(key)
            assert len(spill) == len(known) and spill.held_bytes <= cap
            assert spill.held_bytes + spill.filed_bytes == 4 * sum(map(len, known.values()))
            assert sum(path.stat().st_size for path in files(folder)) == spill.filed_bytes


def test_an_error_inside_removes_the_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Spill(tmp_path / "s", 0) as spill:
        spill.put(0, torch.ones(3))
        raise ZeroDivisionError
    assert not (tmp_path / "s").exists()


def test_what_a_killed_process_left_goes_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from pathlib import Path; from prune.spill import Spill\n"
        "Spill(Path(sys.argv[1]), 0).put(0, torch.ones(9)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=Path(__file__).parents[1])
    assert len(files(tmp_path)) == 1
    (tmp_path / "notes.txt").write_text("mine")
    with Spill(tmp_path, 0) as spill:
        assert not files(tmp_path)
        spill.put(0, torch.ones(9))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_device_is_named(tmp_path: Path) -> None:
    """/dev/full takes the bytes of no one: the kernel itself says ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Spill(tmp_path, 64) as spill:
        spill.put(0, torch.ones(16))
        (tmp_path / "00000001.spill").symlink_to("/dev/full")
        with pytest.raises(RunError, match="the disk is full: could not write") as told:
            spill.put(1, torch.ones(500_000))
        assert "raise spill_bytes (now 64), or read fewer rows at once" in told.value.hint
        assert len(spill) == 1 and not files(tmp_path)
        assert torch.equal(spill.take(0), torch.ones(16))


def test_a_disk_that_fills_at_some_byte_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Filling(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content) or 0

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, m="r": Filling(p, "w") if m == "wb" else real(p, m))
    with Spill(tmp_path, 0) as spill:
        spill.put(0, torch.ones(700))
        with pytest.raises(RunError, match="the disk is full") as told:
            spill.put(1, torch.ones(800))
        assert str(tmp_path) in told.value.message and "spill_bytes" in told.value.hint
        assert len(files(tmp_path)) == 1 and torch.equal(spill.take(0), torch.ones(700))


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; from pathlib import Path; from prune.spill import Spill\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with Spill(Path(sys.argv[1]), 0) as spill:\n"
        "    spill.put(0, torch.ones(200)); spill.put(1, torch.ones(2000))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert "RunError: the disk is full" in ended.stderr and "spill_bytes" in ended.stderr
    assert not (tmp_path / "s").exists()


def test_a_file_that_someone_cut_is_named(tmp_path: Path) -> None:
    with Spill(tmp_path, 0) as spill:
        spill.put(0, torch.ones(100))
        files(tmp_path)[0].write_bytes(b"0" * 10)
        with pytest.raises(RunError, match="10 bytes of 400 are there"):
            spill.take(0)
        files(tmp_path)[0].unlink()
        with pytest.raises(RunError, match="0 bytes of 400 are there"):
            spill.take(0)


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can not be used"):
        Spill(tmp_path / "file" / "s", 0)

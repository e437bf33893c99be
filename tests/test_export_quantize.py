"""export.quantize: what the files really hold, by an independent reader and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from handmade import export, model_folder

from export import ggufs, quantize
from export.verify import compare_logits
from foundation.errors import ModelError, StopRequested
from foundation.llama import LlamaModel
from foundation.report import Silent
from samovar.stages import KINDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 take K-quants; 288 in the feed-forward network do not."""
    changes = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 2}
    return model_folder(tmp_path_factory.mktemp("model"), **changes)


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folder, tmp_path_factory.mktemp("gguf"))


def run(source: Path, out: Path) -> tuple[dict, dict, Silent]:
    out.mkdir(exist_ok=True)
    report = Silent()
    figures = quantize.run(quantize.Settings(), {"gguf": source}, out, report)
    return json.loads((out / "quantize.json").read_text()), figures, report


def test_default_files_and_their_fallbacks(source: Path, tmp_path: Path) -> None:
    told, figures, report = run(source, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.gguf")) == ["q4_k_m.gguf", "q8_0.gguf"]
    assert told["source"] == "F32"
    assert told["files"]["Q8_0"]["fallbacks"] == []
    fallen = told["files"]["Q4_K_M"]["fallbacks"]
    assert {f["tensor"].split(".", 2)[2] for f in fallen} == {"ffn_down.weight"}  # the only rows of 288
    assert {f["columns"] for f in fallen} == {288}
    assert all(f["type"] in ("Q5_0", "Q8_0") for f in fallen)
    assert report.notes == ["Q4_K_M: 2 of 21 tensors got a larger type"]
    assert figures["q8_0_bytes"] == (tmp_path / "q8_0.gguf").stat().st_size


def test_real_bits_per_weight(source: Path, tmp_path: Path) -> None:
    """Q8_0 keeps 34 bytes for 32 weights; norms stay at 32 bits."""
    told, _, _ = run(source, tmp_path)
    norms = 256 * 5
    matrices = 2 * (640 * 256) + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 288 * 256)
    wanted = (matrices * 8.5 + norms * 32) / (matrices + norms)
    assert told["files"]["Q8_0"]["bits_per_weight"] == pytest.approx(wanted, abs=1e-3)


def test_values_are_those_of_the_quantisation(source: Path, tmp_path: Path) -> None:
    """Against gguf-py's own Q8_0, which shares no code with llama.cpp's."""
    import gguf

    run(source, tmp_path)
    before = {t.name: t for t in gguf.GGUFReader(source).tensors}
    after = {t.name: t for t in gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors}
    assert before.keys() == after.keys()
    wanted = gguf.quants.quantize(before["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(after["blk.0.ffn_up.weight"].data, wanted)


def test_the_files_are_those_that_the_stage_promises(source: Path, tmp_path: Path) -> None:
    """A setting that leaves one out could only fail, after the work."""
    told, _, _ = run(source, tmp_path)
    promised = KINDS["export.quantize"].writes
    assert {path.name for path in tmp_path.glob("*.gguf")} == set(promised.values())
    for role, name in promised.items():
        path = tmp_path / name
        assert ggufs.quantisation(path) == role.upper()
        assert told["files"][role.upper()]["size_bytes"] < source.stat().st_size
        LlamaModel(path).close()
    with pytest.raises(ValueError, match="types"):
        quantize.Settings.model_validate_json('{"types": ["Q6_K"]}')


def test_same_bytes_twice_also_after_a_stop(source: Path, tmp_path: Path) -> None:
    class Stopping(Silent):
        stopped = False

        def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
            self.stopped = True

        def stop_requested(self) -> bool:
            return self.stopped

    run(source, tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(StopRequested):
        quantize.run(quantize.Settings(), {"gguf": source}, tmp_path / "b", Stopping())
    run(source, tmp_path / "b")
    for name in ("q8_0.gguf", "q4_k_m.gguf", "quantize.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fewer_bits_are_further_from_the_original(folder: Path, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)
    ids = np.random.default_rng(0).integers(0, 640, 64).tolist()
    found = []
    for path in (source, *(tmp_path / f"{n}.gguf" for n in ("q8_0", "q4_k_m"))):
        with LlamaModel(path) as model:
            found.append(compare_logits(folder, model, [ids])["kl_mean"])
    assert found == sorted(found) and found[0] < 1e-6 < found[1]


@pytest.mark.parametrize("name", ["q8_0", "q4_k_m"])
def test_answers_of_quantised_files_do_not_depend_on_company(source: Path, name: str, tmp_path: Path) -> None:
    """K-quants are computed by other kernels for one column than for many, and round otherwise."""
    run(source, tmp_path)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, 600, n).tolist() for n in (4, 30, 9, 17, 2, 25, 11, 6)]
    with LlamaModel(tmp_path / f"{name}.gguf") as model, model.context(128, slots=6, threads=1) as context:
        together = context.generate_many(prompts, 40)
        assert together == [context.generate_many([prompt], 40)[0] for prompt in prompts]


def test_refusals(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)
    with pytest.raises(ModelError, match=r"q8_0\.gguf is Q8_0 already"):
        run(tmp_path / "q8_0.gguf", tmp_path / "b")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="can not be read as GGUF"):
        run(tmp_path / "text.gguf", tmp_path / "b")
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(ModelError):
        run(tmp_path / "cut.gguf", tmp_path / "b")
    with pytest.raises(ModelError, match="holds 4 GGUF files"):
        run(tmp_path, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.gguf"))


def test_gpu_bytes_count_a_tied_embedding_and_leave_out_an_untied_one(tmp_path: Path, source: Path) -> None:
    untied = ggufs.tensors(source)
    assert ggufs.gpu_bytes(untied) == sum(t.size_bytes for t in untied) - 640 * 256 * 4
    tied = ggufs.tensors(export(model_folder(tmp_path / "hf", tie_word_embeddings=True), tmp_path / "out"))
    assert ggufs.gpu_bytes(tied) == sum(t.size_bytes for t in tied)

"""export.quantize: what the files really hold, by gguf's reader, by hand, and by llama.cpp's own tool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from handmade import TEXTS, export, model_folder
from reports import StopsAfter

from export import ggufs, quantize
from export.quants import quantiser
from export.quants.types import QUANTS, TENSOR_TYPES
from foundation.errors import ModelError, RunError, StopRequested
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.stage import Inputs
from samovar.stages import KINDS

Q = gguf.GGMLQuantizationType
CHANGES = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 2}


class Told(Silent):
    """Keeps what is told of progress."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, int, str]] = []

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.said.append((done, total, unit))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 take K-quants; 288 in the feed-forward network do not."""
    return model_folder(tmp_path_factory.mktemp("model"), **CHANGES)


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folder, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def matrix(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_matrix(tmp_path_factory.mktemp("matrix") / "imatrix.gguf", sums_of(source))


def sums_of(source: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Sums of squares of 512 tokens, some columns far larger than others, for every matrix of a block."""
    draw = np.random.default_rng(seed)
    matrices = [t for t in gguf.GGUFReader(source).tensors if len(t.shape) > 1 and t.name.startswith("blk.")]
    return {t.name: (512 * draw.lognormal(0, 2, int(t.shape[0]))).astype(np.float32) for t in matrices}


def write_matrix(path: Path, sums: Mapping[str, np.ndarray], *, keys: bool = True, counts: float = 512) -> Path:
    """An importance matrix as llama-imatrix writes it."""
    made = gguf.GGUFWriter(path, "")
    made.kv_data[0].clear()  # it has no architecture
    made.add_type("imatrix")
    if keys:
        made.add_array("imatrix.datasets", ["/home/me/calibration.txt"])
        made.add_uint32("imatrix.chunk_count", 4)
        made.add_uint32("imatrix.chunk_size", 128)
    for name, values in sums.items():
        made.add_tensor(f"{name}.in_sum2", values)
        made.add_tensor(f"{name}.counts", np.array([[counts]], np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return path


def run(
    source: Path, out: Path, matrix: Path | None = None, report: Silent | None = None, **settings: Any
) -> dict[str, Any]:
    """quantize.json of the whole stage, child process and all."""
    out.mkdir(parents=True, exist_ok=True)
    inputs: Inputs = {"gguf": source} | ({"imatrix": matrix} if matrix else {})
    quantize.run(quantize.Settings(**settings), inputs, out, report or Silent())
    told = json.loads((out / "quantize.json").read_text())
    assert isinstance(told, dict)
    return told


def make(
    source: Path, out: Path, matrix: Path | None = None, report: Silent | None = None, **settings: Any
) -> dict[str, Any]:
    """The same in this process."""
    asked = quantize.Settings(**settings).model_dump(mode="json")
    return quantize.make(str(source), str(matrix) if matrix else None, str(out), asked, report or Silent())


def types_in(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def test_default_files_and_their_fallbacks(source: Path, tmp_path: Path) -> None:
    report = Told()
    told = run(source.parent, tmp_path, report=report)  # the folder that export.gguf writes
    assert sorted(p.name for p in (tmp_path / "gguf").iterdir()) == ["q4_k_m.gguf", "q8_0.gguf"]
    assert told["source"] == "F32" and told["dry"] is False
    assert told["files"]["Q8_0"]["fallbacks"] == []
    fallen = told["files"]["Q4_K_M"]["fallbacks"]
    assert {f["tensor"].split(".", 2)[2] for f in fallen} == {"ffn_down.weight"}  # the only rows of 288
    assert {f["columns"] for f in fallen} == {288}
    assert all(f["type"] in ("Q5_0", "Q8_0") for f in fallen)
    assert report.notes == ["Q4_K_M: 2 of 21 tensors got another type"]
    assert report.said[-1] == (42, 42, "tensor") and report.said == sorted(report.said)


def test_figures_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    """Q8_0 keeps 34 bytes for 32 weights; norms stay at 32 bits."""
    figures = quantize.run(quantize.Settings(types=("Q8_0",)), {"gguf": source}, tmp_path, Silent())
    norms = 256 * 5
    matrices = 2 * (640 * 256) + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 288 * 256)
    wanted = (matrices * 8.5 + norms * 32) / (matrices + norms)
    assert figures == {
        "q8_0_bits_per_weight": pytest.approx(wanted, abs=1e-3),
        "q8_0_bytes": (tmp_path / "gguf/q8_0.gguf").stat().st_size,
    }


def test_values_are_those_of_the_quantisation(source: Path, tmp_path: Path) -> None:
    """Against gguf-py's own Q8_0 and Q4_0, which share no code with llama.cpp's."""
    make(source, tmp_path, types=("Q8_0", "Q4_0"))
    before = {t.name: t for t in gguf.GGUFReader(source).tensors}
    for kind in (Q.Q8_0, Q.Q4_0):
        after = {t.name: t for t in gguf.GGUFReader(tmp_path / f"gguf/{kind.name.lower()}.gguf").tensors}
        assert before.keys() == after.keys()
        wanted = gguf.quants.quantize(before["blk.0.ffn_up.weight"].data, kind)
        np.testing.assert_array_equal(after["blk.0.ffn_up.weight"].data, wanted)


SOME = ("Q8_0", "Q4_K_M", "Q2_K", "F16", "Q2_0")
ALL = tuple(name for name in QUANTS if name != "Q1_0")  # it has no fallback for rows of 288


@pytest.mark.parametrize("types", [SOME, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_dry_run_tells_the_files_exactly(
    types: tuple[str, ...], source: Path, matrix: Path, tmp_path: Path
) -> None:
    for important in (None, matrix):
        chosen = tuple(name for name in types if important or not QUANTS[name].needs_imatrix)
        out = tmp_path / str(bool(important))
        dry = make(source, out, important, types=chosen, dry=True)
        assert not out.exists()
        done = make(source, out, important, types=chosen)
        assert dry == done | {"dry": True}
        for name in chosen:
            path = out / "gguf" / f"{name.lower()}.gguf"
            assert dry["files"][name]["size_bytes"] == path.stat().st_size
            with LlamaModel(path) as model:
                assert model.metadata("general.file_type") == str(QUANTS[name].number)


@pytest.mark.parametrize("dry", [False, True])
def test_the_files_are_those_that_the_stage_promises(dry: bool, source: Path, tmp_path: Path) -> None:
    settings = quantize.Settings.model_validate({"types": ("Q4_0", "MXFP4_MOE"), "dry": dry})
    quantize.run(settings, {"gguf": source}, tmp_path, Silent())
    kind = KINDS["export.quantize"]
    promised = set(kind.written(settings).values())
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if ".work" not in p.parts}
    assert found == promised
    assert set(kind.writes) == {"all", "report", *(name.lower() for name in QUANTS)}


def test_a_dry_run_writes_only_its_report(source: Path, tmp_path: Path) -> None:
    told = run(source, tmp_path, types=("Q6_K",), dry=True)
    assert [p.name for p in tmp_path.iterdir()] == ["quantize.json"]
    assert told["dry"] is True and told["files"]["Q6_K"]["types"] == {"F32": 5, "Q6_K": 14, "Q8_0": 2}


def test_a_sharded_source_becomes_the_same_file(
    folder: Path, source: Path, matrix: Path, tmp_path: Path
) -> None:
    first = export(folder, tmp_path / "shards", shard_bytes=1_000_000)
    assert len(list(first.parent.iterdir())) > 2
    told = make(first, tmp_path / "a", matrix, types=("Q4_K_M",))
    assert make(source, tmp_path / "b", matrix, types=("Q4_K_M",)) == told
    one, other = (gguf.GGUFReader(tmp_path / place / "gguf/q4_k_m.gguf") for place in "ab")
    assert all((a.data == b.data).all() for a, b in zip(one.tensors, other.tensors, strict=True))
    assert told["files"]["Q4_K_M"]["size_bytes"] == (tmp_path / "a/gguf/q4_k_m.gguf").stat().st_size
    keys = [key for key in one.fields if not key.startswith("GGUF.")]
    assert sorted(keys) == sorted(key for key in other.fields if not key.startswith("GGUF."))


# ------------------------------------------------------------------------------- against llama.cpp's own tool

CASES: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "plain": ({}, [], False),
    "importance": ({}, [], True),
    "overrides": (
        {"tensor_types": {"blk.*.attn_v.weight": "Q8_0", "ffn_up": "Q3_K", "blk.1.attn_q.weight": "BF16"}},
        ["--tensor-type", "attn_v=q8_0", "--tensor-type", "ffn_up=q3_k", "--tensor-type", "blk.1.attn_q=bf16"],
        True,
    ),
    "named types": (
        {"output_type": "Q8_0", "embedding_type": "Q2_K", "pure": True},
        ["--output-tensor-type", "q8_0", "--token-embedding-type", "q2_k", "--pure"],
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_that_of_llama_quantize(name: str, source: Path, matrix: Path, tmp_path: Path) -> None:
    """Byte for byte; the importance matrix is named as it is written on the command line there."""
    tool = Path(os.environ.get("SAMOVAR_LLAMA_TOOLS", "")) / "llama-quantize"
    if not tool.is_file():
        pytest.skip("llama.cpp's own tools: SAMOVAR_LLAMA_TOOLS names no folder with llama-quantize")
    settings, flags, important = CASES[name]
    kind = "Q2_K_S" if important else "Q4_K_M"
    make(source, tmp_path, matrix if important else None, types=(kind,), **settings)
    if important:
        shutil.copy(matrix, tmp_path / "imatrix.gguf")
        flags = [*flags, "--imatrix", "imatrix.gguf"]
    subprocess.run(
        [str(tool), *flags, str(source), "theirs.gguf", kind],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    ours, theirs = tmp_path / "gguf" / f"{kind.lower()}.gguf", tmp_path / "theirs.gguf"
    if not important:
        assert ours.read_bytes() == theirs.read_bytes()
        return
    one, other = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    assert [(t.name, t.tensor_type) for t in one.tensors] == [(t.name, t.tensor_type) for t in other.tensors]
    assert all((a.data == b.data).all() for a, b in zip(one.tensors, other.tensors, strict=True))
    told, wanted = ({k: f.contents() for k, f in r.fields.items()} for r in (one, other))
    assert told.pop("quantize.imatrix.dataset") == "calibration.txt"  # theirs names the folder too
    assert wanted.pop("quantize.imatrix.dataset") == "/home/me/calibration.txt"
    assert told == wanted


def test_a_matrix_that_llama_imatrix_made_is_read_as_llama_quantize_reads_it(
    source: Path, tmp_path: Path
) -> None:
    tools = Path(os.environ.get("SAMOVAR_LLAMA_TOOLS", ""))
    if not (tools / "llama-imatrix").is_file():
        pytest.skip("llama.cpp's own tools: SAMOVAR_LLAMA_TOOLS names no folder with llama-imatrix")
    (tmp_path / "calibration.txt").write_text("".join(TEXTS) * 20, encoding="utf-8")
    for command in (
        ["llama-imatrix", "-m", str(source), "-f", "calibration.txt", "-o", "i.gguf", "-c", "128", "-ngl", "0"],
        ["llama-quantize", "--imatrix", "i.gguf", str(source), "theirs.gguf", "IQ3_XXS"],
    ):
        subprocess.run([str(tools / command[0]), *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    make(source, tmp_path, tmp_path / "i.gguf", types=("IQ3_XXS",))
    assert (tmp_path / "gguf/iq3_xxs.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


# ------------------------------------------------------------------------------------- importance matrix


def test_an_importance_matrix_is_told_and_lowers_the_error_that_counts(
    source: Path, matrix: Path, tmp_path: Path
) -> None:
    make(source, tmp_path / "with", matrix, types=("Q4_K_M",))
    make(source, tmp_path / "without", types=("Q4_K_M",))
    before = {t.name: t for t in gguf.GGUFReader(source).tensors}
    files = [gguf.GGUFReader(tmp_path / place / "gguf/q4_k_m.gguf") for place in ("with", "without")]
    told = {key: field.contents() for key, field in files[0].fields.items() if key.startswith("quantize.")}
    assert told == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "calibration.txt",  # the folder stays out of the file
        "quantize.imatrix.entries_count": 14,
        "quantize.imatrix.chunks_count": 4,
    }
    assert not any(key.startswith("quantize.") for key in files[1].fields)
    for name, sums in sums_of(source).items():
        if name.endswith(("ffn_down.weight", "attn_v.weight")):
            continue  # Q5_0 and Q6_K gain little
        errors = []
        for file in files:
            (found,) = (t for t in file.tensors if t.name == name)
            values = gguf.quants.dequantize(found.data, found.tensor_type)
            errors.append(float(((values - before[name].data) ** 2 @ sums).sum()))
        assert errors[0] < 0.97 * errors[1]


def test_long_names_are_cut_between_letters(source: Path, tmp_path: Path) -> None:
    long = write_matrix(tmp_path / ("ы" * 100 + ".gguf"), sums_of(source))
    make(source, tmp_path, long, types=("Q4_0",))
    told = gguf.GGUFReader(tmp_path / "gguf/q4_0.gguf").fields["quantize.imatrix.file"].contents()
    assert told == "ы" * 63  # 126 of the 127 bytes that there are


def test_types_that_need_an_importance_matrix_are_refused_without_one(
    source: Path, matrix: Path, tmp_path: Path
) -> None:
    words = "IQ2_XXS needs an importance matrix.*IQ3_XS needs an importance matrix"
    with pytest.raises(ModelError, match=words):
        run(source, tmp_path, types=("Q8_0", "IQ2_XXS", "IQ3_XS"))
    assert not list(tmp_path.rglob("*.gguf"))
    settings = quantize.Settings(types=("Q8_0", "IQ2_XXS"))
    assert len(quantize.disagreements(settings, {"gguf": ("a.gguf",)})) == 1
    assert quantize.disagreements(settings, {"gguf": ("a.gguf",), "imatrix": ("i.gguf",)}) == []
    sums = sums_of(source)
    del sums["blk.1.attn_q.weight"]
    part = write_matrix(tmp_path / "part.gguf", sums)
    with pytest.raises(
        ModelError, match=r"Q2_K_S needs an importance matrix for blk\.1\.attn_q\.weight as Q2_K"
    ):
        make(source, tmp_path, part, types=("Q2_K_S",))
    with pytest.raises(
        ModelError, match=r"for token_embd\.weight as IQ2_XS"
    ):  # llama.cpp would end the process
        make(source, tmp_path, matrix, types=("Q8_0",), embedding_type="IQ2_XS")
    with pytest.raises(ModelError, match=r"for blk\.0\.ffn_up\.weight as IQ1_S"):
        make(source, tmp_path, types=("Q8_0",), tensor_types={"blk.0.ffn_up.weight": "IQ1_S"})
    assert not list((tmp_path / "gguf").glob("*"))


def test_bad_importance_matrices_are_refused(source: Path, tmp_path: Path) -> None:
    sums = sums_of(source)
    first = next(iter(sums))

    def refused(words: str, changed: Mapping[str, np.ndarray], **options: Any) -> None:
        with pytest.raises(ModelError, match=words):
            make(
                source, tmp_path / "out", write_matrix(tmp_path / "i.gguf", changed, **options), types=("Q4_0",)
            )

    refused(r"blk\.7\.attn_q\.weight \(but blk\.", sums | {"blk.7.attn_q.weight": sums[first]})
    refused("has 96 numbers, the model's rows are 256 long", sums | {first: sums[first][:96]})
    refused("no mean squares", sums | {first: sums[first] * np.float32(np.nan)})
    refused("no mean squares", sums | {first: -sums[first]})
    refused("no mean squares", sums, counts=float("inf"))
    refused("it has no imatrix.datasets, imatrix.chunk_count", sums, keys=False)
    refused("of no tensor", {})
    path = tmp_path / "old.dat"
    path.write_bytes(b"\x0e\x00\x00\x00")
    with pytest.raises(ModelError, match=r"old\.dat is no GGUF file") as caught:
        make(source, tmp_path / "out", path, types=("Q4_0",))
    assert "llama-imatrix --in-file" in caught.value.hint
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "i.gguf").read_bytes()[:60])
    with pytest.raises(ModelError, match="can not be read as GGUF"):
        make(source, tmp_path / "out", cut, types=("Q4_0",))
    with pytest.raises(ModelError, match=r"it has no imatrix\.datasets"):
        make(source, tmp_path / "out", source, types=("Q4_0",))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- types by tensor


def test_types_by_tensor(source: Path, tmp_path: Path) -> None:
    """A whole name, a part of names, a name with stars; the first that fits counts."""
    told = make(
        source,
        tmp_path,
        types=("Q4_0",),
        tensor_types={
            "output.weight": "Q8_0",  # and not attn_output.weight, of which it is a part
            "blk.1.*_k.weight": "F16",
            "attn_k": "Q5_0",
            "blk.*": "Q4_1",
        },
        embedding_type="Q6_K",
    )
    found = types_in(tmp_path / "gguf/q4_0.gguf")
    assert found["output.weight"] == "Q8_0" and found["token_embd.weight"] == "Q6_K"
    assert (found["blk.0.attn_k.weight"], found["blk.1.attn_k.weight"]) == ("Q5_0", "F16")
    assert {found[f"blk.{i}.{n}.weight"] for i in (0, 1) for n in ("attn_output", "ffn_down", "attn_v")} == {
        "Q4_1"
    }
    assert {kind for name, kind in found.items() if "norm" in name} == {"F32"}
    assert told["files"]["Q4_0"]["fallbacks"] == []
    fallen = make(source, tmp_path / "b", types=("Q4_0",), tensor_types={"ffn_down": "Q6_K"}, dry=True)
    rows = [(f["tensor"], f["type"]) for f in fallen["files"]["Q4_0"]["fallbacks"] if "down" in f["tensor"]]
    assert rows == [("blk.0.ffn_down.weight", "Q8_0"), ("blk.1.ffn_down.weight", "Q8_0")]


@pytest.mark.slow
def test_every_tensor_type_is_written_and_computed(source: Path, matrix: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 600, 16).tolist()
    for kind in TENSOR_TYPES:
        rows = {"blk.0.attn_q.weight": kind}
        make(source, tmp_path / kind, matrix, types=("Q8_0",), tensor_types=rows)
        path = tmp_path / kind / "gguf/q8_0.gguf"
        assert {t.name: t.type for t in ggufs.tensors(path)}["blk.0.attn_q.weight"] == kind
        with LlamaModel(path) as model, model.context(16, threads=1) as context:
            assert np.isfinite(context.logits(ids)).all()


def test_pure(source: Path, tmp_path: Path) -> None:
    told = make(source, tmp_path, types=("Q4_K_M",), pure=True)
    found = types_in(tmp_path / "gguf/q4_k_m.gguf")
    assert {found[name] for name in found if "norm" not in name and "down" not in name} == {"Q4_K"}
    assert [f["type"] for f in told["files"]["Q4_K_M"]["fallbacks"]] == ["Q5_0", "Q5_0"]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"blk.*.ffn_dwn.weight": "Q8_0"}, r"'blk\.\*\.ffn_dwn\.weight' fits none, did you mean 'blk\."),
        (
            {"attn_norm": "Q8_0", "ffn_up": "Q8_0", "blk.9.": "Q8_0"},
            r"'attn_norm' fits none.*'blk\.9\.' fits none",
        ),
    ],
)
def test_names_that_fit_no_matrix_are_refused(
    patterns: dict[str, str], words: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        make(source, tmp_path, types=("Q4_0",), tensor_types=patterns)


def test_many_stars_take_no_time(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fits none"):
        make(source, tmp_path, types=("Q4_0",), tensor_types={"*t" * 30 + "*x": "Q8_0"})


def test_settings_that_are_refused() -> None:
    for settings, words in (
        ({"types": ["Q4_K"]}, "'Q4_K' is no file type, did you mean 'Q4_K_M'"),
        ({"types": ["Q8_0", "Q8_0"]}, "names a type twice"),
        ({"types": []}, "at least 1"),
        ({"tensor_types": {r"blk\.(\d+)+\.": "Q8_0"}}, "no regular expressions"),
        ({"tensor_types": {"a" * 65: "Q8_0"}}, "no name of a tensor"),
        ({"tensor_types": {"ffn_up": "Q4_K_M"}}, "'Q4_K_M' is no tensor type, did you mean 'Q4_K'"),
        ({"output_type": "q6_k"}, "did you mean 'Q6_K'"),
        ({"embedding_type": "I8"}, "is no tensor type"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize.Settings.model_validate_json(json.dumps(settings))


def test_wishes_without_effect_and_wishes_that_would_end_llama_cpp_are_refused(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"tensor_types and output_type both say what output\.weight"):
        make(source, tmp_path, types=("Q4_0",), output_type="Q8_0", tensor_types={"output*": "Q6_K"})
    with pytest.raises(ModelError, match="tensor_types and pure change nothing of F16"):
        run(source, tmp_path, types=("F16",), pure=True, tensor_types={"ffn_up": "Q8_0"})
    tied = export(
        model_folder(tmp_path / "hf", hidden_size=240, head_dim=60, tie_word_embeddings=True), tmp_path / "x"
    )
    with pytest.raises(
        ModelError, match=r"embedding_type Q4_K has blocks of 256, rows of token_embd\.weight are 240"
    ):
        make(tied, tmp_path, types=("Q8_0",), embedding_type="Q4_K")
    with pytest.raises(ModelError, match="the output matrix is the embedding, and with pure output_type"):
        make(tied, tmp_path, types=("Q8_0",), output_type="F16", pure=True)
    told = make(tied, tmp_path, types=("Q8_0",), output_type="BF16")
    assert types_in(tmp_path / "gguf/q8_0.gguf")["token_embd.weight"] == "BF16"
    assert "token_embd.weight" not in {f["tensor"] for f in told["files"]["Q8_0"]["fallbacks"]}
    with pytest.raises(ModelError, match=r"llama\.cpp makes no Q1_0 of model\.gguf: no tensor type fallback"):
        make(source, tmp_path, types=("Q8_0", "Q1_0"))


# --------------------------------------------------------------------------------------------- the rest


def test_same_bytes_twice_also_after_a_stop(source: Path, tmp_path: Path) -> None:
    """Finished files stay: only what is missing is made again."""
    make(source, tmp_path / "a")
    with pytest.raises(StopRequested):
        make(source, tmp_path / "b", report=StopsAfter(1))
    assert [p.name for p in (tmp_path / "b/gguf").iterdir()] == ["q8_0.gguf"]
    (tmp_path / "b/.work/q4_k_m.gguf").write_bytes(b"half")  # as a kill leaves it
    before = (tmp_path / "b/gguf/q8_0.gguf").stat()
    make(source, tmp_path / "b")
    assert (tmp_path / "b/gguf/q8_0.gguf").stat() == before
    for name in ("q8_0.gguf", "q4_k_m.gguf"):
        assert (tmp_path / "a/gguf" / name).read_bytes() == (tmp_path / "b/gguf" / name).read_bytes()


def test_no_space_is_found_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(row["size_bytes"] for row in make(source, tmp_path, dry=True)["files"].values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    with pytest.raises(RunError, match="bytes are needed"):
        make(source, tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    make(source, tmp_path)


def test_a_disk_that_fills_up_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp itself says: basic_ios::clear: iostream error."""
    usage = shutil.disk_usage(tmp_path)
    left = iter([10**9, 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=next(left)))
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work/q8_0.gguf").symlink_to("/dev/full")
    with pytest.raises(RunError, match="has 1,000 free"):
        make(source, tmp_path, types=("Q8_0",))
    assert not list((tmp_path / "gguf").iterdir())


def test_fewer_bits_are_further_from_the_original(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path, types=("Q8_0", "Q4_K_M", "Q2_K"))
    ids = np.random.default_rng(0).integers(3, 600, 64).tolist()
    found = []
    for path in (source, *(tmp_path / f"gguf/{n}.gguf" for n in ("q8_0", "q4_k_m", "q2_k"))):
        with LlamaModel(path) as model, model.context(64, threads=1) as context:
            logits = context.logits(ids).astype(np.float64)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    kl = [float((np.exp(found[0]) * (found[0] - other)).sum(-1).mean()) for other in found]
    assert kl == sorted(kl) and kl[0] == 0 < kl[1]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M"])
def test_answers_of_quantised_files_do_not_depend_on_company(source: Path, name: str, tmp_path: Path) -> None:
    """K-quants are computed by other kernels for one column than for many, and round otherwise."""
    make(source, tmp_path, types=(name,))
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, 600, n).tolist() for n in (4, 30, 9, 17, 2, 25, 11, 6)]
    path = tmp_path / f"gguf/{name.lower()}.gguf"
    with LlamaModel(path) as model, model.context(128, slots=6, threads=1) as context:
        together = context.generate_many(prompts, 40)
        assert together == [context.generate_many([prompt], 40)[0] for prompt in prompts]


def test_sources_that_are_refused(folder: Path, source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "a")
    with pytest.raises(ModelError, match=r"q8_0\.gguf is Q8_0 already") as caught:
        make(tmp_path / "a/gguf/q8_0.gguf", tmp_path / "b")
    assert "F32, F16 or BF16" in caught.value.hint
    with pytest.raises(ModelError, match="is Q8_0 already, with Q8_0 in it"):
        make(export(folder, tmp_path / "direct", dtype="q8_0"), tmp_path / "b")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.gguf is refused: its header can not be read"):
        run(tmp_path / "text.gguf", tmp_path / "b")
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        run(tmp_path / "cut.gguf", tmp_path / "b")
    with pytest.raises(ModelError, match=r"holds cut\.gguf, text\.gguf"):
        run(tmp_path, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.gguf"))


def test_rows_in_small_buffers_give_the_same_bytes(
    folder: Path, matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = export(folder, tmp_path / "half", dtype="bf16")
    make(half, tmp_path / "a", matrix, types=("Q4_K_M",))
    monkeypatch.setattr(quantiser, "BUFFER_BYTES", 10_000)  # four or five rows
    make(half, tmp_path / "b", matrix, types=("Q4_K_M",))
    assert (tmp_path / "a/gguf/q4_k_m.gguf").read_bytes() == (tmp_path / "b/gguf/q4_k_m.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_sources(dtype: str, folder: Path, tmp_path: Path) -> None:
    told = make(export(folder, tmp_path / "half", dtype=dtype), tmp_path, types=("Q8_0", "F32"))
    assert told["source"] == dtype.upper()
    half = {t.name: t for t in gguf.GGUFReader(tmp_path / "half/gguf/model.gguf").tensors}
    full = {t.name: t for t in gguf.GGUFReader(tmp_path / "gguf/f32.gguf").tensors}
    name = "blk.0.ffn_up.weight"
    values = gguf.quants.dequantize(half[name].data, half[name].tensor_type)
    np.testing.assert_array_equal(full[name].data, values)

"""`samovar export`: what it refuses, the recipe it composes, and a whole export from the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny import TEXTS, tiny_model
from typer.testing import CliRunner

from foundation.errors import InputError, RunError
from foundation.gguf_header import read
from foundation.report import Silent
from foundation.rundir import RunDirectory
from samovar import bundle, cli, export
from samovar.recipe import load

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("made") / "tiny", max_position_embeddings=512)


def text_file(path: Path) -> Path:
    path.write_text("\n\n".join(f"{text} {n}" for n, text in enumerate(TEXTS * 4)), encoding="utf-8")
    return path


def bare(folder: Path) -> Path:
    """A folder that is taken for a model as long as nothing is run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def composed(source: str = "/m", *types: str, texts: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """The composed recipe, which samovar itself takes."""
    defaults: dict[str, Any] = {"imatrix": False, "license": ""}
    text = export.compose(source, types or ("Q8_0",), "tiny", texts or [], **(defaults | more))
    Path("recipe.toml").write_text(text)
    load(Path("recipe.toml"))
    return tomllib.loads(text)


def stages(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in recipe["stage"]}


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("quants", "said"),
    [
        ("Q4_K", "did you mean 'Q4_K_M'"),
        ("q8", "'Q8' is no file type, did you mean 'Q8_0'"),
        (",", "names no type"),
        ("Q8_0,Q9,X", "(?s)'Q9' is no file type.*'X' is no file type"),  # every fault at once
    ],
)
def test_types_are_checked_before_anything(quants: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        export.main("nowhere", quants)
    assert "Q4_K_M" in refused.value.hint
    assert not Path("runs").exists()


def test_types_are_taken_as_they_are_typed() -> None:
    assert export.wanted_types(" q4_k_m, Q8_0,q8_0,", imatrix=False, texts=False) == ["Q4_K_M", "Q8_0"]


def test_an_importance_matrix_wants_text() -> None:
    for quants, imatrix, said in (
        ("Q8_0,IQ2_XS,IQ1_S", False, "IQ2_XS, IQ1_S needs an importance matrix"),
        ("Q4_K_M", True, "--imatrix makes an importance matrix"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            export.wanted_types(quants, imatrix=imatrix, texts=False)
        assert "--text FILE" in refused.value.hint
    with pytest.raises(InputError, match="changes nothing of Q8_0, F16"):
        export.wanted_types("Q8_0,F16", imatrix=True, texts=True)


def test_what_stands_for_a_model(tmp_path: Path) -> None:
    made = bare(tmp_path / "runs" / "x" / "student" / "model")
    for given in ("runs/x/student", "runs/x/student/model", str(made), "runs/../runs/x/student"):
        assert export.model_at(given) == str(made)
    assert export.name_of(str(made)) == "student"
    assert export.model_at("Qwen/Qwen3-0.6B@main") == "Qwen/Qwen3-0.6B@main"
    assert export.name_of("Qwen/Qwen3-0.6B@main") == "Qwen3-0.6B"
    bare(tmp_path / "runs" / "x" / "teacher")
    (tmp_path / "a.gguf").write_text("")
    (tmp_path / "empty").mkdir()
    for given, said, hint in (
        ("nowhere", "there is no folder nowhere", "hub id"),
        ("a.gguf", "is a GGUF file", "safetensors"),
        ("empty", "holds no models", "folder of a model"),
        ("runs/x/student/model/config.json", "is a file", "folder"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            export.model_at(given)
        assert hint in refused.value.hint
    bare(tmp_path / "runs" / "x" / "b")
    with pytest.raises(InputError, match="holds 2 models") as refused:
        export.model_at("runs/x")
    assert "runs/x/b, runs/x/teacher" in refused.value.hint


def test_odd_arguments(tmp_path: Path) -> None:
    bare(tmp_path / "m")
    bare(tmp_path / "a\nb")
    for arguments, said in (
        ({"texts": ["none.txt"]}, "there is no none.txt"),
        ({"name": "../x"}, "--name '../x'"),
        ({"license": "MIT or so"}, "is no SPDX id"),
    ):
        with pytest.raises(InputError, match=said):
            export.main("m", "Q8_0", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="characters that a recipe can not hold"):
        export.main("a\nb", "Q8_0")
    assert not Path("runs").exists()


# -------------------------------------------------------------------------------------------- recipe


def test_the_recipe_of_the_usual_case() -> None:
    recipe = composed("/models/tiny", "Q8_0", "Q4_K_M", license="MIT")
    assert recipe["name"] == "export-tiny" and recipe["inputs"]["model"] == "/models/tiny"
    assert [(s["name"], s["kind"]) for s in recipe["stage"]] == [
        ("gguf", "export.gguf"),
        ("quantized", "export.quantize"),
        ("verified", "export.verify"),
        ("bundle", "export.bundle"),
    ]
    made = stages(recipe)
    assert made["gguf"]["model_name"] == "tiny" and made["gguf"]["license"] == "MIT"
    assert made["quantized"]["types"] == ["Q8_0", "Q4_K_M"]
    assert made["verified"]["reads"] == {"model": "model", "gguf": ["gguf", "quantized"]}
    assert made["bundle"]["reads"]["gguf"] == ["quantized"]  # F32 is the proof, and was not asked for
    assert stages(composed("/m", "F32", "Q4_K_M"))["bundle"]["reads"]["gguf"] == ["gguf", "quantized"]


@pytest.mark.parametrize("types", [("F32",), ("F16",), ("BF16",), ("Q8_0",), ("F32", "Q8_0")])
def test_what_needs_no_quantiser_is_written_directly(types: tuple[str, ...]) -> None:
    made = stages(composed("/m", *types))
    names = [kind.lower() for kind in types]
    assert list(made) == [*names, "verified", "bundle"]
    assert [made[name]["dtype"] for name in names] == names
    assert made["bundle"]["reads"]["gguf"] == made["verified"]["reads"]["gguf"] == names


def test_the_importance_matrix_and_the_proof_read_different_text() -> None:
    for more in ({"types": ("Q4_K_M",), "imatrix": True}, {"types": ("IQ2_XS",)}):
        made = stages(composed("/m", *more.pop("types"), texts=["/t.txt", "/u.txt"], **more))  # type: ignore[misc]
        assert made["texts"]["reads"] == {"corpus": ["text1", "text2"]} and made["texts"]["held_share"] == 0.2
        assert made["imatrix"]["reads"]["texts"] == "texts"
        assert made["verified"]["reads"]["texts"] == "texts.held"
        assert made["quantized"]["reads"]["imatrix"] == "imatrix"
    made = stages(composed("/m", "Q4_K_M", texts=["/t.txt"]))
    assert "imatrix" not in made and made["verified"]["reads"]["texts"] == "texts"


def test_a_model_of_the_hub_is_the_base() -> None:
    assert stages(composed("Qwen/Qwen3-0.6B@main"))["q8_0"]["base_models"] == ["Qwen/Qwen3-0.6B"]
    assert "base_models" not in stages(composed("/m"))["q8_0"]


def test_names_and_paths_can_not_write_into_the_recipe() -> None:
    evil = '/m"\n[[stage]]\nkind = "x'
    assert composed('/m"o\\d/el]')["inputs"]["model"] == '/m"o\\d/el]'
    assert composed("/модель")["inputs"]["model"] == "/модель"
    assert composed(evil)["inputs"]["model"] == evil
    assert export.slug("My Model (v1.5)") == "my-model-v1-5" and export.slug("модель") == "model"


def test_a_recipe_that_is_somebody_elses_stays(tmp_path: Path) -> None:
    bare(tmp_path / "m")
    run = tmp_path / "run"
    run.mkdir()
    text = export.compose(str(tmp_path / "m"), ["Q8_0"], "m", [], False, "")
    for held, said in (
        ('name = "mine"\n', "is the run of another recipe"),
        (text.replace("Q8_0", "F16").replace("q8_0", "f16"), "was edited since it was written"),
    ):
        (run / "recipe.toml").write_text(held)
        with pytest.raises(RunError, match=said):
            export.main("m", "Q8_0", out=run)
        assert (run / "recipe.toml").read_text() == held
    (run / "recipe.toml").write_text(text)
    export.refuse_foreign(RunDirectory(run))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="is not empty"):
        export.main("m", "Q8_0", out=tmp_path / "full")


def test_dry_shows_recipe_and_plan_and_touches_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = CliRunner().invoke(cli.app, ["export", str(model), "--quant", "Q4_K_M", "--dry"])
    assert said.exit_code == 0, said.output
    assert 'kind = "export.quantize"' in said.stdout and "after gguf" in said.stdout
    said = CliRunner().invoke(cli.app, ["export", str(model), "--dry", "--json"])
    told = json.loads(said.stdout)
    assert told["stages"][0]["action"] == "run" and told["run"] == "runs/export-tiny"
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------- the whole


def samovar(*arguments: str) -> subprocess.CompletedProcess[str]:
    around = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "samovar.cli", *arguments], capture_output=True, text=True, env=around
    )


@pytest.mark.slow
def test_a_whole_export_and_another_type_later(model: Path, tmp_path: Path) -> None:
    """As a user would: from the terminal, with text; then one more type, which makes nothing twice."""
    text = text_file(tmp_path / "t.txt")
    common = ["export", str(model), "--text", str(text), "--license", "MIT", "--name", "tea"]
    said = samovar(*common, "--quant", "Q4_K_M,Q8_0")
    assert said.returncode == 0, said.stdout + said.stderr
    made = Path("runs/export-tea/bundle/bundle")
    assert f"finished: {made}" in said.stdout and "Q4_K_M" in said.stdout
    found = bundle.examine(made, Silent())
    assert found["problems"] == []
    index = json.loads((made / "bundle.json").read_text())
    assert {file["type"] for file in index["gguf"]} == {"Q4_K_M", "Q8_0"}
    assert index["serve"] == "gguf/tea-Q4_K_M.gguf" and "on held-out text" in index["serve_because"]
    assert [stage["name"] for stage in index["recipe"]["stages"]] == [
        "texts",
        "gguf",
        "quantized",
        "verified",
        "bundle",
    ]
    assert read(made / index["serve"])[0]["general.license"] == "MIT"
    card = (made / "README.md").read_text()
    assert "license: mit" in card and "Not in this bundle: F32." in card
    for place in (tmp_path, model.parent):
        assert all(str(place).encode() not in path.read_bytes() for path in made.rglob("*") if path.is_file())
    assert samovar("bundle", "verify", str(made)).returncode == 0

    told = json.loads(samovar(*common, "--quant", "Q4_K_M,Q8_0", "--json").stdout)
    assert {stage["action"] for stage in told["stages"]} == {"reuse"} and told["state"] == "finished"
    before = (Path("runs/export-tea/gguf/manifest.json")).stat().st_mtime_ns
    said = samovar(*common, "--quant", "Q4_K_M,Q8_0,F32")
    assert said.returncode == 0, said.stdout + said.stderr
    assert (Path("runs/export-tea/gguf/manifest.json")).stat().st_mtime_ns == before
    assert (made / "gguf" / "tea-F32.gguf").is_file()
    answer = samovar("chat", str(made), "--prompt", "a squat?")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
def test_an_export_by_an_importance_matrix(model: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path / "t.txt")
    arguments = ["export", str(model), "--quant", "Q4_K_M", "--imatrix", "--text", str(text), "--json"]
    said = CliRunner().invoke(cli.app, arguments)
    told = json.loads(said.stdout)
    assert (said.exit_code, told["state"]) == (0, "finished"), said.output
    keys = read(Path(told["bundle"]) / told["serve"])[0]
    assert keys["quantize.imatrix.file"] == "imatrix.gguf"


@pytest.mark.slow
def test_an_export_without_the_quantiser_and_without_text(model: Path) -> None:
    said = CliRunner().invoke(cli.app, ["export", str(model), "--quant", "F32,Q8_0"])
    assert said.exit_code == 0, said.output
    assert "it needs text of yours" in said.stdout and "perplexity  " not in said.stdout
    made = Path("runs/export-tiny/bundle/bundle")
    assert {path.name for path in (made / "gguf").iterdir()} == {"tiny-F32.gguf", "tiny-Q8_0.gguf"}
    card = (made / "README.md").read_text()
    assert "Perplexity" not in card and "Not measured" not in card and "Not in this bundle" not in card


@pytest.mark.slow
def test_a_stage_that_refuses_is_told_in_its_words(model: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    said = CliRunner().invoke(cli.app, ["export", "broken", "--quant", "Q8_0"])
    assert said.exit_code == 1 and "model_type 'mamba' is not supported" in said.output
    assert "samovar run runs/export-broken/recipe.toml --out runs/export-broken" in said.output

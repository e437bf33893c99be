"""export.about against gguf-py's own Metadata, which llama.cpp's converter uses, and there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from handmade import empty_model, export

from export import about
from export.about import About
from foundation.errors import ModelError

README = """---
license: other
license_name: tongyi-qianwen
license_link: https://example.org/LICENSE
language:
- ru
- no
base_model:
- Qwen/Qwen3-0.6B
- https://huggingface.co/mistralai/Mistral-7B-v0.3
- https://example.org/other-model
- lonely
datasets: [HuggingFaceFW/fineweb-2, "https://example.org/texts"]
tags: [pilot, crew]
pipeline_tag: text-generation
---
# Not the head
license: not-this-one
"""
PARAMETERS = 596_000_000


def folder_with(tmp_path: Path, readme: str | None = README, name: str = "Crew-0.6B-Instruct-v2") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def keys_of(writer: gguf.GGUFWriter) -> dict[str, Any]:
    return {k: v.value for k, v in writer.kv_data[0].items() if k != "general.architecture"}


def ours(folder: Path, given: About) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, "llama")
    about.write(about.of_folder(folder, given), writer, PARAMETERS)
    about.write_sampling(folder, writer)
    return keys_of(writer)


def theirs(folder: Path, name: str) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, "llama")
    metadata = gguf.Metadata.load(None, folder, name, PARAMETERS)
    metadata.size_label = metadata.size_label or gguf.size_label(PARAMETERS, PARAMETERS, 0, 0)
    metadata.set_gguf_meta_model(writer)
    return keys_of(writer)


def as_lists(keys: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()}


@pytest.mark.parametrize(
    "readme",
    [
        README,
        None,
        "no head",
        "---\nlanguage: en\nbase_model: a/b-7B-chat\ndatasets: c/d\n---\n",
        "---\nlicense: [mit, apache-2.0]\nlanguage:\n\t- ru\n---\n",
        "---\n- a list\n---\n",
        "",
    ],
)
def test_keys_are_those_of_llama_cpps_converter(readme: str | None, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, readme)
    config = {"top_k": 20, "top_p": 0.95, "temperature": 0.6, "min_p": None, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(config))
    wanted = theirs(folder, folder.name)
    assert as_lists(ours(folder, About(name=folder.name))) == {k: v for k, v in wanted.items() if v != []}
    assert wanted["general.size_label"] == "0.6B" and wanted["general.finetune"] == "Instruct"
    assert wanted["general.sampling.temp"] == 0.6


def test_a_line_of_dashes_without_a_second_one_begins_no_head(tmp_path: Path) -> None:
    """The converter reads on to the end of the page, and stops at its first line that is no YAML."""
    found = ours(folder_with(tmp_path, "---\nlicense: mit\n"), About())
    assert "general.license" not in found


def test_a_plain_name_gives_the_size_alone(tmp_path: Path) -> None:
    found = ours(folder_with(tmp_path, None, "model"), About())
    assert found == {"general.name": "model", "general.size_label": "596M"}


def test_settings_go_before_the_readme(tmp_path: Path) -> None:
    given = About(name="crew", license="mit", languages=("en",), datasets=("a/b",))
    found = about.of_folder(folder_with(tmp_path), given)
    assert (found.license, found.languages, found.datasets) == ("mit", ("en",), ("a/b",))
    assert found.base_models[0] == "Qwen/Qwen3-0.6B" and found.tags == ("pilot", "crew", "text-generation")
    assert found.license_name == "tongyi-qianwen"


def test_there_and_back(tmp_path: Path) -> None:
    """Through a file, whose vocabulary is passed over; a name without an owner comes back as it is shown."""
    folder = empty_model(tmp_path / "hf")
    (folder / "README.md").write_text(README, encoding="utf-8")
    path = export(folder, tmp_path / "out", model_name="crew", description="Пилот", datasets=("a/b-c",))
    found = about.of_gguf(path)
    assert found == About(
        name="crew",
        license="other",
        license_name="tongyi-qianwen",
        license_link="https://example.org/LICENSE",
        base_models=(
            "Qwen/Qwen3-0.6B",
            "mistralai/Mistral-7B-v0.3",
            "https://example.org/other-model",
            "Lonely",
        ),
        datasets=("a/b-c",),
        languages=("ru", "no"),
        tags=("pilot", "crew", "text-generation"),
        description="Пилот",
    )


def test_repetition_penalty_is_told_as_newer_converters_do(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, None)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.05, "top_k": true, "top_p": "x"}')
    found = ours(folder, About())
    assert found["general.sampling.penalty_repeat"] == 1.05
    assert not [key for key in found if key.endswith(("top_k", "top_p"))]
    huge = '{"temperature": 1e300, "top_k": 99999999999999999999, "top_p": NaN, "min_p": 0.1}'
    (folder / "generation_config.json").write_text(huge)
    sampling = {key: value for key, value in ours(folder, About()).items() if "sampling" in key}
    assert sampling == {"general.sampling.min_p": pytest.approx(0.1)}, "numbers that no key of GGUF holds"
    (folder / "generation_config.json").write_text("[1")
    assert not [key for key in ours(folder, About()) if "sampling" in key]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("license: [", "its head is not YAML"),
        ("license: {a: b}", "license says \"{'a': 'b'}\", a text or a list of texts is needed"),
        ("tags: [[a]]", "tags says"),
        ("tags: [1]", "tags says '1'"),
        ('language: ["ru\\n## forged"]', "a line of up to 2000 characters"),
        ("datasets: 2020-01-01", "datasets says '2020-01-01'"),
        (f"license_name: {'x' * 3000}", "license_name 'xxx"),
        ("x: !!python/object/apply:os.system [ls]", "its head is not YAML"),
    ],
)
def test_heads_that_are_refused(head: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        about.of_folder(folder_with(tmp_path, f"---\n{head}\n---\n"), About())

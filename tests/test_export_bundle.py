"""export.bundle: complete, self-describing, the same every time, and readable by those who receive it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from handmade import CHAT_TEMPLATE, export, model_folder

from export import bundle, card, quantize, verify
from foundation.chat import CHATML
from foundation.errors import InputError, ModelError
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that a bundle is made of."""
    root = tmp_path_factory.mktemp("made")
    folder = model_folder(root / "hf")
    (folder / "LICENSE").write_text("MIT, somebody")
    (folder / "training_args.bin").write_text("not to ship")
    source = export(folder, root / "gguf")
    (root / "quant").mkdir()
    quantize.run(quantize.Settings(), {"gguf": source}, root / "quant", Silent())
    verify.run(verify.Settings(tokens=32), {"model": folder, "gguf": source}, root, Silent())
    (root / "scores.json").write_text(
        json.dumps({"bits": {"ru": {"per_byte": 1.25}}, "sample": "text", "count": 3})
    )
    return {
        "model": folder,
        "gguf": (source, root / "quant" / "q8_0.gguf", root / "quant" / "q4_k_m.gguf"),
        "verify": root / "verify.json",
        "scores": root / "scores.json",
    }


def build(inputs: dict[str, Any], out: Path, **settings: Any) -> tuple[Path, dict]:
    bundle.run(bundle.Settings(**({"model_name": "tiny-ru"} | settings)), inputs, out, Silent())
    return out / "bundle", json.loads((out / "bundle" / "bundle.json").read_text())


def test_what_is_in_it(made: dict[str, Any], tmp_path: Path) -> None:
    folder, index = build(made, tmp_path)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "bundle.json",
        "gguf/tiny-ru-F32.gguf",
        "gguf/tiny-ru-Q8_0.gguf",
        "gguf/tiny-ru-Q4_K_M.gguf",
        "hf/config.json",
        "hf/generation_config.json",
        "hf/model.safetensors",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
        "hf/chat_template.jinja",
        "chat_template.jinja",
        "generation.json",
        "README.md",
        "Modelfile",
        "LICENSES/LICENSE",
        "LICENSES/README.txt",
    }
    assert {e["path"] for e in index["files"]} == names - {"bundle.json"}
    for entry in index["files"]:
        data = (folder / entry["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size_bytes"], entry["sha256"])
    assert index["tokenizer"] == Tokenizer(made["model"]).digest
    assert index["serve"] == "gguf/tiny-ru-Q8_0.gguf"  # small models are not served with four bits
    assert index["verify"][0]["passed"] is True and index["scores"][0]["count"] == 3
    assert json.loads((folder / "generation.json").read_text()) == {
        "context_tokens": 512,
        "stop": ["<|endoftext|>", "<|im_end|>"],
        "temperature": 0.0,
    }


def test_same_bytes_elsewhere_and_after_an_unfinished_one(made: dict[str, Any], tmp_path: Path) -> None:
    first, _ = build(made, tmp_path / "a")
    (tmp_path / "b" / "bundle" / "gguf").mkdir(parents=True)
    (tmp_path / "b" / "bundle" / "gguf" / "half.gguf").write_text("left by a kill")
    second, _ = build(made, tmp_path / "b")
    assert tree(first) == tree(second)
    everything = b"".join(tree(first).values())
    assert str(tmp_path.parent).encode() not in everything


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_parts_work_where_they_are(made: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, index = build(made, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "hf"))
    model = AutoModelForCausalLM.from_pretrained(str(folder / "hf"))
    assert model.num_parameters() == index["parameters"]
    with LlamaModel(folder / index["serve"]) as served:
        assert served.tokenize("Привет") == tokenizer.encode("Привет", add_special_tokens=False)


def test_the_card_tells_what_was_measured_and_nothing_else(made: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = build(made, tmp_path, languages=("ru",), license="MIT")
    text = (folder / "README.md").read_text()
    header, body = text.split("---\n")[1:3]
    assert header == "license: mit\nlanguage:\n- ru\npipeline_tag: text-generation\ntags:\n- gguf\n- samovar\n"
    assert "| gguf/tiny-ru-Q8_0.gguf | Q8_0 |" in body
    assert "| F32 | 32 |" in body and "100.0 %" in body
    assert "| bits.ru.per_byte | 1.25 |" in body and "| count | 3 |" in body
    assert "sample" not in body
    bare, _ = build({"model": made["model"], "gguf": made["gguf"][:1]}, tmp_path / "bare")
    text = (bare / "README.md").read_text()
    assert "Scores" not in text and "Compared" not in text


def test_modelfile_translates_chatml_and_only_chatml(made: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = build(made, tmp_path)
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./gguf/tiny-ru-Q8_0.gguf\nPARAMETER num_ctx 512\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert text.endswith(
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\n'
    )
    assert card.chatml_gap(CHAT_TEMPLATE) == "\n"
    assert card.chatml_gap(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")) == ""
    assert card.chatml_gap(CHATML) is not None
    assert card.chatml_gap(CHAT_TEMPLATE.replace("m.content", "m.content | trim ~ ' '")) is None
    assert card.chatml_gap("{% for m in messages %}") is None
    (made["model"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    try:
        other, _ = build(made, tmp_path / "other")
    finally:
        (made["model"] / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert 'TEMPLATE """' not in (other / "Modelfile").read_text()


def test_refusals(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GGUF file was given"):
        build(made | {"gguf": ()}, tmp_path)
    with pytest.raises(InputError, match="two GGUF files of type F32"):
        build(made | {"gguf": (made["gguf"][0], made["gguf"][0])}, tmp_path)
    with pytest.raises(InputError, match="holds no JSON table"):
        build(made | {"scores": made["model"] / "LICENSE"}, tmp_path)
    other = export(model_folder(tmp_path / "hf", vocab_size=700), tmp_path / "gguf")
    with pytest.raises(ModelError, match="has 700 tokens, the model 640"):
        build(made | {"gguf": (other,)}, tmp_path)
    with pytest.raises(ValueError, match="name"):
        bundle.Settings(model_name="../escape")


def test_folders_of_files_are_taken_too(made: dict[str, Any], tmp_path: Path) -> None:
    inputs = made | {"gguf": made["gguf"][1].parent, "verify": made["verify"].parent}
    folder, index = build(inputs, tmp_path)
    assert sorted(p.name for p in (folder / "gguf").iterdir()) == ["tiny-ru-Q4_K_M.gguf", "tiny-ru-Q8_0.gguf"]
    assert len(index["verify"]) == 1


def test_a_folder_without_weights_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(made["model"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        build(made | {"model": bare}, tmp_path / "out")
    assert not (tmp_path / "out" / "bundle").exists()

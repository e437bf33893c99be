"""export.bundle: complete, self-describing, the same every time, and readable by those who receive it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from handmade import export, model_folder

from evaluation import compare
from export import bundle, quantize
from export.about import About
from export.shipping import card, frontmatter
from foundation.errors import InputError, ModelError, RunError
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.tokenizer import Tokenizer
from serving.chat import gguf_of

ABOUT: dict[str, Any] = {
    "model_name": "tiny-ru",
    "license": "MIT",
    "base_models": ("somebody/base", "https://example.org/other"),
    "datasets": ("somebody/corpus",),
    "languages": ("ru", "en"),
    "description": "It | speaks [Russian](https://evil.example) <b>well</b>.",
}
RECIPE = """
name = "tea"
description = "from leaves"
[inputs]
base = "/home/somebody/models/base"
text = "somebody/corpus"
self = "tea.toml"
other = "unused.txt"
[[stage]]
name = "student"
kind = "distill.train"
reads = { model = "base", data = ["text"] }
steps = 600
[[stage]]
name = "aside"
kind = "evaluation.score"
reads = { model = "student", texts = "other" }
[[stage]]
name = "bundle"
kind = "export.bundle"
reads = { model = "student", gguf = "x", recipe = "self" }
[short.student]
steps = 6
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that a bundle is made of."""
    root = tmp_path_factory.mktemp("made")
    folder = model_folder(root / "hf")
    (folder / "LICENSE").write_text("MIT, somebody")
    (folder / "training_args.bin").write_text("not to ship")
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\nnot to ship")
    source = export(folder, root / "f32", **ABOUT)
    (root / "quant").mkdir()
    quantize.run(quantize.Settings(), {"gguf": source}, root / "quant", Silent())
    quants = root / "quant" / "gguf"
    files = (source, quants / "q8_0.gguf", quants / "q4_k_m.gguf")
    (root / "verify.json").write_text(json.dumps(report(files, "q4_k_m.gguf")))
    (root / "tea.toml").write_text(RECIPE)
    (root / "scores.json").write_text(
        json.dumps({"bits": {"ru": {"per_byte": 1.25}}, "sample": "text", "count": 3})
    )
    return {
        "model": folder,
        "gguf": files,
        "verify": root / "verify.json",
        "scores": root / "scores.json",
        "recipe": root / "tea.toml",
    }


def report(files: tuple[Path, ...], recommended: str | None) -> dict[str, Any]:
    """A verify.json about `files` as export.verify writes it; the figures are not measured."""
    rows = [
        {
            "file": path.name,
            "quantisation": kind,
            "size_bytes": path.stat().st_size,
            "bits_per_weight": 8.5,
            "gate": None,
            "logits": {
                "tokens": 1000, "kl_mean": 0.0123, "kl_max": 1.0, "top1": 0.987, "top5": 1.0, "max_abs": 1.0,
            },
            "tokenisation": {"lines": {"equal": 1000, "known": 7, "different": 0}},
            "ids": {"different": []},
            "holdout": {
                "tokens": 255, "perplexity": 12.345, "perplexity_error": 0.1, "ratio": 1.0, "ratio_error": 0.0,
                "kl_mean": 0.0345, "kl_error": 0.001, "kl_max": 1.0, "top1": 0.9,
            },
            "passed": True,
            "failures": [],
        }
        for path, kind in zip(files, ("F32", "Q8_0", "Q4_K_M"), strict=True)
    ]  # fmt: skip
    return {
        "files": rows,
        "original": {"tokens": 255, "perplexity": 12.3, "perplexity_error": 0.1},
        "recommended": recommended,
        "recommend_kl": 0.05,
        "gates": {},
        "passed": True,
    }


def build(inputs: dict[str, Any], out: Path, **settings: Any) -> tuple[Path, dict]:
    out.mkdir(parents=True, exist_ok=True)
    bundle.run(bundle.Settings(**settings), inputs, out, Silent())
    return out / "bundle", json.loads((out / "bundle" / "bundle.json").read_text())


def lora(path: Path, *, name: str = "polite", arch: str = "llama", columns: int = 64) -> Path:
    """An adapter of rank 4 of one matrix, written by gguf-py alone."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", np.ones((4, columns), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", np.ones((160, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    assert (index["name"], index["license"], index["base_models"]) == (
        "tiny-ru",
        "MIT",
        list(ABOUT["base_models"]),
    )
    assert index["verify"][0]["passed"] is True and index["scores"][0]["count"] == 3
    assert json.loads((folder / "generation.json").read_text()) == {
        "context_tokens": 512,
        "stop": ["<|endoftext|>", "<|im_end|>"],
        "temperature": 0.0,
    }


def test_what_others_read_of_it(made: dict[str, Any], tmp_path: Path) -> None:
    folder, index = build(made, tmp_path)
    assert gguf_of(folder) == folder / index["serve"] == gguf_of(tmp_path)
    (tmp_path / "label.json").write_text('{"label": "a"}')
    compare.run(compare.Settings(), {"scores": tmp_path / "label.json", "bundle": folder}, tmp_path, Silent())
    notes = json.loads((tmp_path / "table.json").read_text())["notes"]
    assert notes[0] == "tiny-ru-F32.gguf: a 6 GiB card holds 256 conversations of 512 tokens"


def test_the_file_to_serve(made: dict[str, Any], tmp_path: Path) -> None:
    """What verification recommends; else Q8_0, because small models are not served with four bits."""
    _, index = build(made, tmp_path / "a")
    assert index["serve"] == "gguf/tiny-ru-Q4_K_M.gguf" and "0.05 nats" in index["serve_because"]
    plain = tmp_path / "verify.json"
    for told, serve in (
        (report(made["gguf"], None), "Q8_0"),
        (report(made["gguf"], "model.gguf"), "F32"),
        (report(made["gguf"], "elsewhere.gguf"), "Q8_0"),
    ):
        plain.write_text(json.dumps(told))
        _, index = build(
            made | {"verify": plain}, tmp_path / serve / str(told["recommended"]).replace("None", "x")
        )
        assert index["serve"] == f"gguf/tiny-ru-{serve}.gguf"
    assert "elsewhere.gguf, which is not in this bundle" in index["serve_because"]
    told = report(made["gguf"], "q4_k_m.gguf")
    told["files"][2]["size_bytes"] += 1  # another file of the same name
    plain.write_text(json.dumps(told))
    assert build(made | {"verify": plain}, tmp_path / "b")[1]["serve"] == "gguf/tiny-ru-Q8_0.gguf"


def test_same_bytes_elsewhere_and_after_an_unfinished_one(made: dict[str, Any], tmp_path: Path) -> None:
    first, _ = build(made, tmp_path / "a")
    left = tmp_path / "b" / ".work" / "bundle" / "gguf"
    left.mkdir(parents=True)
    (left / "half.gguf").write_text("left by a kill")
    moved = tmp_path / "moved"
    shutil.copytree(made["model"], moved / "hf")
    shutil.copytree(made["gguf"][1].parent, moved / "quants")
    inputs = made | {"model": moved / "hf", "gguf": (moved / "quants", made["gguf"][0])}
    second, _ = build(inputs, tmp_path / "b")
    assert tree(first) == tree(second)
    everything = b"".join(tree(first).values())
    for told in (str(tmp_path.parent), "/home/somebody"):
        assert told.encode() not in everything


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_stage_killed_when_all_was_done_is_done_again(made: dict[str, Any], tmp_path: Path) -> None:
    """The bundle stands, and nobody has recorded it: the next start finds it there."""
    folder, first = build(made, tmp_path)
    (folder / "stray.txt").write_text("of the killed one")
    again, second = build(made, tmp_path)
    assert first == second and not (again / "stray.txt").exists()


def test_the_parts_work_where_they_are(made: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, index = build(made, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "hf"))
    model = AutoModelForCausalLM.from_pretrained(str(folder / "hf"))
    assert model.num_parameters() == index["parameters"]
    with LlamaModel(folder / index["serve"]) as served:
        assert served.tokenize("Привет") == tokenizer.encode("Привет", add_special_tokens=False)


def test_the_hub_reads_the_card(made: dict[str, Any], tmp_path: Path) -> None:
    """huggingface_hub's own reader; what it checks against a server is checked by the table below."""
    from huggingface_hub import ModelCard

    folder, _ = build(made, tmp_path)
    read = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert read.data.to_dict() == {
        "license": "mit",
        "language": ["ru", "en"],
        "base_model": ["somebody/base"],  # an address is no id of the hub
        "datasets": ["somebody/corpus"],
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "samovar"],
    }
    assert read.text.lstrip().startswith("# tiny-ru\n")


@pytest.mark.parametrize(
    ("about", "keys"),
    [
        (About(), {}),
        (About(license="Apache-2.0"), {"license": "apache-2.0"}),
        (
            About(license="LicenseRef-House_Rules", license_link="https://a.example/l"),
            {
                "license": "other",
                "license_name": "licenseref-house-rules",
                "license_link": "https://a.example/l",
            },
        ),
        (
            About(license="other", license_name="House: rules\u2028# x"[:12]),
            {"license": "other", "license_name": "house-rules", "license_link": "LICENSES/README.txt"},
        ),
        (About(languages=("ru", "no", "Russian", "x: y")), {"language": ["ru", "no"]}),
        (About(base_models=("a/b: c", "name", "own/er/x")), {}),
        (About(tags=("a: b", "gguf")), {"tags": ["gguf", "samovar", "a: b"]}),
    ],
)
def test_what_the_hub_would_refuse_stays_out_of_the_head(about: About, keys: dict[str, Any]) -> None:
    lines = frontmatter.head(about)
    assert lines[0] == "---" and lines[-2:] == ["---", ""] and "---" not in lines[1:-2]
    read = yaml.safe_load("\n".join(lines[1:-2]))
    assert read == {"pipeline_tag": "text-generation", "tags": ["gguf", "samovar"]} | keys


def test_the_card_tells_what_was_measured_and_nothing_else(made: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = build(made, tmp_path)
    text = (folder / "README.md").read_text()
    assert "It \\| speaks \\[Russian\\](https://evil.example) \\<b>well\\</b>." in text
    assert "| gguf/tiny-ru-Q8_0.gguf | Q8_0 |" in text
    assert "| Q4_K_M | 1,000 | 0.012 | 98.7 % | 1,000 | 7 | 12.35 ± 0.1 | 0.0345 ± 0.001 |" in text
    assert "| bits.ru.per_byte | 1.25 |" in text and "| count | 3 |" in text
    assert "sample" not in text
    assert "llama-server --model gguf/tiny-ru-Q4_K_M.gguf --ctx-size 512" in text
    assert "- made from somebody/base\n- made from https://example.org/other" in text
    bare, _ = build({"model": made["model"], "gguf": made["gguf"][:1]}, tmp_path / "bare")
    text = (bare / "README.md").read_text()
    for section in ("Scores", "Quality of each file", "Recipe"):
        assert section not in text
    partly, _ = build(made | {"gguf": made["gguf"][:2]}, tmp_path / "partly")
    assert "Not in this bundle: Q4_K_M." in (partly / "README.md").read_text()


def test_the_recipe_tells_what_led_here_and_no_folder_of_this_machine(
    made: dict[str, Any], tmp_path: Path
) -> None:
    folder, index = build(made, tmp_path)
    assert [stage["name"] for stage in index["recipe"]["stages"]] == ["student", "bundle"]
    assert index["recipe"]["inputs"] == {"base": "base", "text": "somebody/corpus"}
    text = (folder / "README.md").read_text()
    assert "| student | distill.train | base, text | steps = 600 |" in text and "- base: base" in text
    short, _ = build(made, tmp_path / "short", short=True)
    assert "steps = 6 |" in (short / "README.md").read_text()
    bad = tmp_path / "bad.toml"
    for content in ("name = 1979-05-27\n[[stage]]", "stage = 5", 'name = "x"\nstage = [5]', "\x00", "name ="):
        bad.write_text(content)
        with pytest.raises(InputError, match="can not be read as a recipe"):
            build(made | {"recipe": bad}, tmp_path / "refused")


def test_memory_for_several_contexts(made: dict[str, Any], tmp_path: Path) -> None:
    """Hand-computed: 3 layers, 2 heads of 24 for keys and as many for values, two bytes each."""
    long = model_folder(tmp_path / "long", max_position_embeddings=4096)
    source = export(long, tmp_path / "g")
    folder, index = build({"model": long, "gguf": source}, tmp_path / "out")
    rows = {row["context_tokens"]: row["bytes"] for row in index["memory"]["contexts"]}
    assert list(rows) == [2048, 4096]
    kv = 2048 * 3 * 2 * 24 * 2 * 2
    attention = 2 * 512 * 2048  # the compute buffer's mask grows with the context too
    assert rows[4096] - rows[2048] == kv + attention
    assert "| file | 2,048 | 4,096 |" in (folder / "README.md").read_text()


def test_adapters_ship_beside_their_base(made: dict[str, Any], tmp_path: Path) -> None:
    adapters = (lora(tmp_path / "a.gguf"), lora(tmp_path / "b.gguf", name="Very rude"))
    folder, index = build(made | {"adapters": adapters}, tmp_path / "out")
    assert index["adapters"] == [
        {"path": "adapters/polite.gguf", "name": "polite", "rank": 4},
        {"path": "adapters/Very-rude.gguf", "name": "Very-rude", "rank": 4},
    ]
    assert "ADAPTER" not in (folder / "Modelfile").read_text()
    assert "\nADAPTER ./adapters/Very-rude.gguf\n" in (folder / "Modelfile.Very-rude").read_text()
    server = index["commands"]["llama-server"]
    assert server[server.index("--lora-scaled") + 1] == "adapters/polite.gguf:0,adapters/Very-rude.gguf:0"
    assert {entry["path"] for entry in index["files"]} >= {"adapters/polite.gguf", "Modelfile.polite"}
    with pytest.raises(InputError, match="two adapters are called polite"):
        build(made | {"adapters": (adapters[0], adapters[0])}, tmp_path / "two")
    for other, said in (
        (lora(tmp_path / "c.gguf", arch="qwen3"), "architecture qwen3, the model's is llama"),
        (lora(tmp_path / "d.gguf", columns=32), r"is \(4, 32\), for a matrix of 160 x 64"),
        (made["gguf"][0], "no adapter"),
    ):
        with pytest.raises(ModelError, match=said):
            build(made | {"adapters": other}, tmp_path / "no")


def test_a_sharded_file_keeps_its_shards(made: dict[str, Any], tmp_path: Path) -> None:
    source = export(made["model"], tmp_path / "g", shard_bytes=300_000, **ABOUT)
    assert "-of-" in source.name
    for given in (source, source.parent, source.with_name(source.name.replace("-00001-", "-00002-"))):
        out = tmp_path / given.name
        folder, index = build({"model": made["model"], "gguf": given}, out)
        names = sorted(path.name for path in (folder / "gguf").iterdir())
        assert index["serve"] == f"gguf/{names[0]}" and names[0].startswith("tiny-ru-F32-00001-of-")
        assert [Path(part).name for part in index["gguf"][0]["parts"]] == names
        assert index["gguf"][0]["size_bytes"] == sum(p.stat().st_size for p in (folder / "gguf").iterdir())
        with LlamaModel(folder / index["serve"]) as model:  # llama.cpp finds the others by these names
            assert model.vocab_size == 640
        assert "# This file is the first of several." in (folder / "Modelfile").read_text()
    source.with_name(source.name.replace("-00001-", "-00002-")).unlink()
    with pytest.raises(ModelError, match="shards"):
        build({"model": made["model"], "gguf": source}, tmp_path / "lacks")


def test_sampling_as_the_makers_set_it(made: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(made["model"], tmp_path / "hf")
    config = folder / "generation_config.json"
    config.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20}')
    out, _ = build({"model": folder, "gguf": made["gguf"][:1]}, tmp_path / "a")
    told = json.loads((out / "generation.json").read_text())
    # top_p and min_p are transformers' defaults: llama.cpp's own are others
    assert {key: told[key] for key in ("temperature", "top_k", "top_p", "min_p")} == {
        "temperature": 0.6, "top_k": 20, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    for bad in ('{"temperature": "1\\nFROM evil"}', '{"top_k": 1.5}', '{"top_p": NaN}', '{"min_p": true}'):
        config.write_text(bad)
        with pytest.raises(ModelError, match=r"generation_config\.json: .* number is needed"):
            build({"model": folder, "gguf": made["gguf"][:1]}, tmp_path / "b")


def test_refusals(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no GGUF file was given"):
        build(made | {"gguf": ()}, tmp_path)
    with pytest.raises(InputError, match="two GGUF files of type F32"):
        build(made | {"gguf": (made["gguf"][0], made["gguf"][0])}, tmp_path)
    with pytest.raises(InputError, match="holds no JSON table"):
        build(made | {"scores": made["model"] / "LICENSE"}, tmp_path)
    other = export(model_folder(tmp_path / "hf", vocab_size=700), tmp_path / "gguf")
    with pytest.raises(ModelError, match="has 700 tokens, the model 640"):
        build({"model": made["model"], "gguf": (other,)}, tmp_path)
    with pytest.raises(InputError, match="tell different things of themselves"):
        build(made | {"gguf": (made["gguf"][1], other)}, tmp_path)
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(RunError, match="10 free"):
        build(made, tmp_path)
    assert not (tmp_path / "bundle").exists()  # nothing half-made under the final name


def test_names_become_file_names() -> None:
    names = ("My Model: 2/3", "../../etc", "модель", "a" * 200, "", "-x")
    assert [bundle.safe_name(name) for name in names] == [
        "My-Model-2-3",
        "etc",
        "model",
        "a" * 80,
        "model",
        "x",
    ]


def test_a_folder_without_weights_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    bare = shutil.copytree(made["model"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        build(made | {"model": bare}, tmp_path / "out")


def test_the_rule_for_models_of_any_size() -> None:
    def file(kind: str, size: int) -> card.Quantised:
        return card.Quantised(kind, (kind,), kind, kind, size, 8.0, size)

    files = [file("F32", 100), file("Q8_0", 30), file("Q4_K_M", 20), file("Q2_K", 10)]
    assert card.choose(files, [], small=True)[0].type == "Q8_0"
    assert card.choose(files, [], small=False)[0].type == "Q4_K_M"
    assert card.choose(files[:1] + files[3:], [], small=False)[0].type == "Q2_K"

"""export.verify: it passes sound exports, and every gate can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import TEXTS, export, model_folder, texts_file

from export import adversarial, architectures, quantize, verify
from foundation.errors import ModelError
from foundation.report import Silent

Result = tuple[dict[str, Any], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folder, tmp_path_factory.mktemp("gguf"))


def check(folder: Path, path: Path, out: Path, texts: Path | None = None, **options: Any) -> Result:
    """(verify.json, the error or the figures)."""
    out.mkdir(exist_ok=True)
    inputs: dict[str, Any] = {"model": folder, "gguf": path} | ({"texts": texts} if texts else {})
    try:
        figures = verify.run(verify.Settings(**({"tokens": 64} | options)), inputs, out, Silent())
    except ModelError as error:
        return json.loads((out / "verify.json").read_text()), error
    return json.loads((out / "verify.json").read_text()), figures


def test_a_sound_export_passes(folder: Path, path: Path, tmp_path: Path) -> None:
    told, figures = check(folder, path, tmp_path, texts_file(tmp_path / "t.jsonl", TEXTS * 4), tokens=500)
    assert told["passed"] and told["failures"] == []
    assert told["logits"]["tokens"] == 500
    assert told["logits"]["kl_mean"] < 1e-6 and told["logits"]["top1"] == 1.0
    groups = told["tokenisation"]
    assert groups["lines"]["equal"] == 16 and groups["chunks"]["equal"] == 2 and groups["chat"]["equal"] == 2
    assert groups["added_tokens"]["equal"] == 5 * 3
    assert all(group["different"] == 0 for group in groups.values())
    assert groups["fuzz"]["known"] > 0  # decomposed letters, equal once composed
    assert told["gguf"]["quantisation"] == "F32"
    assert figures["top1"] == 1.0
    assert str(tmp_path) not in json.dumps(told)


def test_same_bytes_twice(folder: Path, path: Path, tmp_path: Path) -> None:
    check(folder, path, tmp_path / "a")
    check(folder, path, tmp_path / "b")
    assert (tmp_path / "a" / "verify.json").read_bytes() == (tmp_path / "b" / "verify.json").read_bytes()


def test_without_the_permutation_the_gate_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(architectures.TARGETS, "llama", architectures.Target("llama", rope_size=True))
    told, error = check(folder, export(folder, tmp_path / "gguf"), tmp_path)
    assert isinstance(error, ModelError)
    assert "mean KL" in error.message and "top-1 agreement" in error.message
    assert told["passed"] is False and told["logits"]["kl_mean"] > 0.01
    assert all(group["different"] == 0 for group in told["tokenisation"].values())


def test_a_window_is_looked_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens are asked for, the window is 96: the comparison must be longer, or the fault stays hidden."""
    changes = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 96, "num_hidden_layers": 4}
    folder = model_folder(tmp_path / "hf", "gemma3_text", **changes)
    told, _ = check(folder, export(folder, tmp_path / "right"), tmp_path)
    assert told["passed"] and told["logits"]["tokens"] == 160
    wrong = architectures.Target("gemma3", norm_plus_one=True)
    monkeypatch.setattr("export.gguf.check", lambda shape: wrong)
    told, error = check(folder, export(folder, tmp_path / "wrong"), tmp_path)
    assert not told["passed"] and "mean KL" in error.message


def test_short_contexts_take_several_windows(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", max_position_embeddings=48)
    told, _ = check(folder, export(folder, tmp_path / "out"), tmp_path, tokens=100)
    assert told["passed"] and told["logits"]["tokens"] == 144


def test_a_quantised_file_needs_its_own_limits(folder: Path, path: Path, tmp_path: Path) -> None:
    quantize.run(quantize.Settings(), {"gguf": path}, tmp_path, Silent())
    told, error = check(folder, tmp_path / "q8_0.gguf", tmp_path)
    assert "mean KL" in error.message and "max_kl" in error.hint
    told, figures = check(folder, tmp_path / "q8_0.gguf", tmp_path, max_kl=0.1, min_top1=0.5)
    assert told["passed"] and 1e-6 < figures["kl_mean"] < 0.1


def test_pickled_weights_are_not_opened(folder: Path, path: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    copy = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        verify.run(verify.Settings(tokens=16), {"model": copy, "gguf": path}, tmp_path, Silent())


def test_a_template_that_writes_the_date_is_compared(folder: Path, path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    assert verify._rendered(tokenizer)[0].startswith("2024")


def spoil(folder: Path, out: Path, name: str, change: Any) -> Path:
    """A copy of a model folder with one JSON file changed."""
    copy = shutil.copytree(folder, out)
    value = json.loads((copy / name).read_text())
    change(value)
    (copy / name).write_text(json.dumps(value))
    return copy


def test_another_pretokenizer_is_noticed(folder: Path, path: Path, tmp_path: Path) -> None:
    """The file was made with Qwen's expression, the folder now says GPT-2's: prose hardly differs."""

    def change(spec: dict) -> None:
        spec["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }

    told, error = check(spoil(folder, tmp_path / "hf", "tokenizer.json", change), path, tmp_path)
    assert not told["passed"] and "tokenised otherwise" in error.message
    example = told["tokenisation"]["adversarial"]["example"]
    assert example["wanted"] != example["got"] and example["text"] in adversarial.TEXTS
    assert "mean KL" not in error.message


def test_another_merge_is_noticed(folder: Path, path: Path, tmp_path: Path) -> None:
    def change(spec: dict) -> None:
        merges = spec["model"]["merges"]
        merges[0], merges[40] = merges[40], merges[0]

    told, _ = check(
        spoil(folder, tmp_path / "hf", "tokenizer.json", change),
        path,
        tmp_path,
        texts_file(tmp_path / "t.jsonl"),
    )
    assert told["tokenisation"]["lines"]["different"] > 0


def test_special_ids_templates_and_ends_are_compared(folder: Path, path: Path, tmp_path: Path) -> None:
    def config(value: dict) -> None:
        value["eos_token"] = "<|im_start|>"

    told, error = check(spoil(folder, tmp_path / "a", "tokenizer_config.json", config), path, tmp_path)
    assert told["ids"]["different"] == ["ends_missing", "eos"]
    assert "different ends_missing, eos" in error.message

    def ends(value: dict) -> None:
        value["eos_token_id"] = [2, 77]

    told, _ = check(spoil(folder, tmp_path / "b", "generation_config.json", ends), path, tmp_path)
    assert told["ids"]["different"] == ["ends_missing"]
    copy = shutil.copytree(folder, tmp_path / "c")
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    told, _ = check(copy, path, tmp_path)
    assert told["ids"]["different"] == ["chat_template"]


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL = ln(1/2 / 3/4)/2 + ln(1/2 / 1/4)/2; a shift changes nothing."""
    wanted, got = np.log([[0.5, 0.5]]) + 100, np.log([[0.75, 0.25]]) - 7
    assert verify.divergence(wanted, got)[0] == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    assert verify.divergence(wanted, wanted)[0] == pytest.approx(0, abs=1e-12)


def test_fuzz_is_seeded_and_wide() -> None:
    assert adversarial.fuzz(3, 50) == adversarial.fuzz(3, 50) != adversarial.fuzz(4, 50)
    letters = {c for text in adversarial.fuzz(3, 300) for c in text}
    assert "\0" not in letters and len(letters) > 1000
    assert {"\n", "\u200d", "\u0301", "ж"} <= letters


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_real_models_pass(samovar_data: Path, name: str, tmp_path: Path) -> None:
    folder = samovar_data / "models" / name
    source = min((samovar_data / "text" / "tinystories-ru").glob("*.jsonl"))
    stories = [json.loads(line)["story"] for line in source.open(encoding="utf-8")]
    texts = texts_file(
        tmp_path / "t.jsonl", [line for story in stories for line in story.split("\n") if line][:5000]
    )
    told, _ = check(folder, export(folder, tmp_path / "out"), tmp_path, texts, tokens=500)
    assert told["passed"], told["failures"]
    assert told["logits"]["tokens"] >= 500 and told["tokenisation"]["lines"]["equal"] == 5000

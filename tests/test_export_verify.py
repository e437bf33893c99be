"""export.verify: it passes sound exports, every gate can fail, and its figures are those of others.

The children's functions run in this process, but for the tests that say otherwise.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import TEXTS, byte_level, export, model_folder, texts_file, write_tokenizer
from inprocess import here
from tokenizers import Tokenizer as Backend

from export import verify
from export.parity import adversarial, divergence, original, tokenisation
from export.parity.recommend import page, recommended
from export.weights import architectures
from foundation.child import in_child
from foundation.errors import InputError, ModelError, RunError, StopRequested
from foundation.llama import LlamaModel, library
from foundation.report import Silent
from foundation.shape import ModelShape

GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 4}
FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q2_k": 10}  # llama.cpp's numbers
LONG = [f"{text} {number}" for number in range(40) for text in TEXTS]  # a few thousand tokens

ENGLISH = [
    f"Once upon a time, there was a little {child} named {name}. {name} liked to play with a {color} ball."
    for child in ("girl", "boy", "dog", "cat")
    for name in ("Lily", "Tim", "Max", "Anna", "Ben")
    for color in ("red", "big", "blue", "soft", "new")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folder, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "in_child", here)


def smaller(path: Path, out: Path, kind: str) -> Path:
    """A quantised copy, made by llama.cpp."""
    import ctypes

    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{kind}.gguf"
    assert llama.llama_model_quantize(os.fsencode(path), os.fsencode(target), ctypes.byref(params)) == 0
    return target


def check(
    folder: Path, gguf: Path | tuple[Path, ...], out: Path, texts: Path | None = None, **options: Any
) -> tuple[dict[str, Any], Any]:
    """(verify.json, the error or the figures)."""
    out.mkdir(exist_ok=True)
    inputs: dict[str, Any] = {"model": folder, "gguf": gguf} | ({"texts": texts} if texts else {})
    try:
        found: Any = verify.run(
            verify.Settings(**({"tokens": 64, "holdout_tokens": 1024} | options)), inputs, out, Silent()
        )
    except ModelError as error:
        found = error
    return json.loads((out / "verify.json").read_text()), found


class TestWhatPasses:
    def test_a_sound_export(self, folder: Path, path: Path, tmp_path: Path) -> None:
        told, figures = check(folder, path, tmp_path, texts_file(tmp_path / "t.jsonl", TEXTS * 4), tokens=500)
        (file,) = told["files"]
        assert told["passed"] and file["passed"] and file["failures"] == []
        assert file["logits"]["tokens"] == 500 and file["logits"]["max_abs"] < 0.01
        assert file["logits"]["kl_mean"] < 1e-6 and file["logits"]["top1"] == file["logits"]["top5"] == 1.0
        groups = file["tokenisation"]
        assert (
            groups["lines"]["equal"] == 16 and groups["chunks"]["equal"] == 2 and groups["chat"]["equal"] == 2
        )
        assert groups["added_tokens"]["equal"] == 5 * 3
        assert all(group["different"] == 0 for group in groups.values())
        assert groups["fuzz"]["known"] > 0  # decomposed letters, equal once composed
        assert (file["file"], file["quantisation"], file["bits_per_weight"]) == ("model.gguf", "F32", 32)
        assert file["size_bytes"] == path.stat().st_size
        assert figures["top1"] == 1.0 and figures["files"] == 1
        assert str(tmp_path) not in json.dumps(told) + (tmp_path / "verify.md").read_text()

    def test_same_bytes_twice(self, folder: Path, path: Path, tmp_path: Path) -> None:
        texts = texts_file(tmp_path / "t.jsonl")
        for name in ("a", "b"):
            check(folder, path, tmp_path / name, texts)
        for name in ("verify.json", "verify.md"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_a_thousand_positions_past_the_window_by_default(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        changes = GEMMA | {"sliding_window": 128, "max_position_embeddings": 2048}
        folder = model_folder(tmp_path / "hf", "gemma3_text", **changes)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        windows = verify.sample_ids(tokenizer, TEXTS, verify.Settings(), ModelShape.from_folder(folder))
        assert [len(window) for window in windows] == [1128]
        with LlamaModel(export(folder, tmp_path / "out")) as model:
            found = verify.compare_logits(folder, model, windows)
        assert found["kl_mean"] < 1e-6
        assert found["top1"] * found["tokens"] + found["ties"] == found["tokens"] == 1128

    @pytest.mark.parametrize(
        ("context", "window", "tokens", "lengths"),
        [
            (512, None, 100, [100]),
            (48, None, 100, [48] * 3),
            (512, 96, 64, [160]),
            (200, 96, 250, [200] * 3),  # 104 positions of each lie past the window
            (96, 96, 100, [96] * 2),  # a window as long as the context hides nothing
        ],
    )
    def test_windows_of_the_sample(
        self, context: int, window: int | None, tokens: int, lengths: list[int], folder: Path
    ) -> None:
        from dataclasses import replace

        from transformers import AutoTokenizer

        shape = replace(ModelShape.from_folder(folder), context=context, windows=(window, None, window))
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        windows = verify.sample_ids(tokenizer, TEXTS, verify.Settings(tokens=tokens), shape)
        assert [len(ids) for ids in windows] == lengths
        text = tokenizer.encode(TEXTS[0], add_special_tokens=False)
        assert windows[0][:10] == text[:10]
        assert windows == verify.sample_ids(tokenizer, TEXTS, verify.Settings(tokens=tokens), shape)

    def test_a_file_of_less_context_is_compared_on_less(self, tmp_path: Path) -> None:
        """llama.cpp knows no window for Mistral: beyond it the file must not be used, and is not looked at."""
        folder = model_folder(tmp_path / "hf", "mistral", sliding_window=64)
        capped = export(folder, tmp_path / "out", cap_context=True)
        told, _ = check(folder, capped, tmp_path, texts_file(tmp_path / "t.jsonl", LONG), tokens=100)
        assert told["passed"] and told["files"][0]["logits"]["tokens"] == 128
        assert told["original"]["tokens"] % 31 == 0  # of a window of 64, positions 32 to 62

    def test_a_model_in_shards(self, folder: Path, path: Path, tmp_path: Path) -> None:
        first = export(folder, tmp_path / "out", shard_bytes=300_000)
        assert len(list(first.parent.iterdir())) > 2
        told, _ = check(folder, first.parent, tmp_path)
        (file,) = told["files"]
        assert told["passed"] and file["file"] == first.name and file["bits_per_weight"] == 32
        assert file["size_bytes"] == sum(shard.stat().st_size for shard in first.parent.iterdir())
        assert file["size_bytes"] > path.stat().st_size

    def test_a_template_that_writes_the_date(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
        assert tokenisation.rendered(tokenizer)[0].startswith("2024")


class TestWhatFails:
    def test_missing_permutation(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(architectures.TARGETS, "llama", architectures.Target("llama", rope_size=True))
        told, error = check(folder, export(folder, tmp_path / "gguf"), tmp_path)
        assert isinstance(error, ModelError)
        assert "model.gguf: mean KL" in error.message and "top-1 agreement" in error.message
        assert told["passed"] is False and told["files"][0]["logits"]["kl_mean"] > 0.01
        assert all(group["different"] == 0 for group in told["files"][0]["tokenisation"].values())
        assert "## Failures\n\n- model.gguf: mean KL" in (tmp_path / "verify.md").read_text()

    def test_a_fault_that_shows_past_the_window_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """64 tokens are asked for, the window is 96: a comparison of 64 would not see the fault."""
        folder = model_folder(tmp_path / "hf", "gemma3_text", **GEMMA, sliding_window=96)
        told, _ = check(folder, export(folder, tmp_path / "right"), tmp_path)
        assert told["passed"] and told["files"][0]["logits"]["tokens"] == 160
        wrong = architectures.Target("gemma3", norm_plus_one=True)
        monkeypatch.setattr("export.gguf.check", lambda *_: wrong)
        told, error = check(folder, export(folder, tmp_path / "wrong"), tmp_path)
        assert not told["passed"] and "mean KL" in error.message

    def test_weights_that_are_no_numbers(self, folder: Path, path: Path, tmp_path: Path) -> None:
        import gguf

        broken = shutil.copyfile(path, tmp_path / "broken.gguf")
        reader = gguf.GGUFReader(broken, "r+")
        next(t for t in reader.tensors if t.name == "output_norm.weight").data[3] = np.nan
        told, error = check(folder, (broken, path), tmp_path)
        assert [file["passed"] for file in told["files"]] == [False, True]
        assert error.message.startswith("not the model it came from: broken.gguf: its logits at position 0")
        assert told["files"][0]["logits"] is None and told["files"][0]["size_bytes"] > 0

    def test_ties_are_no_fault(self) -> None:
        logits = {"tokens": 1000, "kl_mean": 1e-7, "top1": 0.998, "ties": 2}
        found = {"logits": logits, "tokenisation": {}, "ids": {"different": []}}
        assert verify.faults(found, verify.GATES["F32"]) == []
        logits["ties"] = 1
        assert verify.faults(found, verify.GATES["F32"]) == ["top-1 agreement 0.9980 (1 ties), required 1"]

    def test_another_model(self, folder: Path, path: Path, tmp_path: Path) -> None:
        other = export(model_folder(tmp_path / "hf", vocab_size=620), tmp_path / "out")
        _, error = check(folder, other, tmp_path)
        assert "it has 620 tokens, the model 640" in error.message

    def test_an_original_that_diverged(self, folder: Path, path: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        copy = shutil.copytree(folder, tmp_path / "hf")
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"][0] = float("nan")
        save_file(weights, copy / "model.safetensors")
        with pytest.raises(ModelError, match="the original's own logits"):
            verify.run(verify.Settings(tokens=16), {"model": copy, "gguf": path}, tmp_path, Silent())

    def test_pickled_weights_are_not_opened(self, folder: Path, path: Path, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        copy = shutil.copytree(folder, tmp_path / "pickled")
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"no \*\.safetensors"):
            verify.run(verify.Settings(tokens=16), {"model": copy, "gguf": path}, tmp_path, Silent())

    def test_no_space_for_the_logits(
        self, folder: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = shutil.disk_usage(tmp_path)._replace(free=4 * 640 * 64 - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(RunError, match="bytes are needed, the disk of"):
            check(folder, path, tmp_path, tokens=64)

    def test_no_file_and_the_same_file_twice(self, folder: Path, path: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no GGUF file"):
            verify.run(verify.Settings(), {"model": folder, "gguf": tmp_path}, tmp_path, Silent())
        with pytest.raises(InputError, match="given twice"):
            verify.run(verify.Settings(), {"model": folder, "gguf": (path, path)}, tmp_path, Silent())


def spoil(folder: Path, out: Path, name: str, change: Any) -> Path:
    """A copy of a model folder with one JSON file changed."""
    copy = shutil.copytree(folder, out)
    value = json.loads((copy / name).read_text())
    change(value)
    (copy / name).write_text(json.dumps(value))
    return copy


class TestTokenizersThatDiffer:
    def test_another_pretokenizer(self, folder: Path, path: Path, tmp_path: Path) -> None:
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
        example = told["files"][0]["tokenisation"]["adversarial"]["example"]
        assert example["wanted"] != example["got"] and example["text"] in adversarial.TEXTS
        assert "mean KL" not in error.message

    def test_another_merge(self, folder: Path, path: Path, tmp_path: Path) -> None:
        def change(spec: dict) -> None:
            merges = spec["model"]["merges"]
            merges[0], merges[40] = merges[40], merges[0]

        copy = spoil(folder, tmp_path / "hf", "tokenizer.json", change)
        told, _ = check(copy, path, tmp_path, texts_file(tmp_path / "t.jsonl"))
        assert told["files"][0]["tokenisation"]["lines"]["different"] > 0

    def test_special_ids_templates_and_ends(self, folder: Path, path: Path, tmp_path: Path) -> None:
        def config(value: dict) -> None:
            value["eos_token"] = "<|im_start|>"

        told, error = check(spoil(folder, tmp_path / "a", "tokenizer_config.json", config), path, tmp_path)
        assert told["files"][0]["ids"]["different"] == ["ends_missing", "eos"]
        assert "different ends_missing, eos" in error.message

        def ends(value: dict) -> None:
            value["eos_token_id"] = [2, 77]

        told, _ = check(spoil(folder, tmp_path / "b", "generation_config.json", ends), path, tmp_path)
        assert told["files"][0]["ids"]["different"] == ["ends_missing"]
        copy = shutil.copytree(folder, tmp_path / "c")
        (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
        told, _ = check(copy, path, tmp_path)
        assert told["files"][0]["ids"]["different"] == ["chat_template"]


class TestQuantisedFiles:
    def test_they_are_measured_and_gated_where_the_settings_say_so(
        self, folder: Path, path: Path, tmp_path: Path
    ) -> None:
        small = smaller(path, tmp_path / "q", "q8_0")
        told, figures = check(folder, (path, small), tmp_path)
        gates = {file["quantisation"]: file["gate"] for file in told["files"]}
        assert told["passed"] and gates == {"F32": {"max_kl": 1e-6, "min_top1": 1.0}, "Q8_0": None}
        assert 1e-6 < told["files"][1]["logits"]["kl_mean"] < 0.1 and figures["kl_mean"] < 1e-6
        told, error = check(folder, (path, small), tmp_path, max_kl={"Q8_0": 1e-5}, min_top1={"Q8_0": 0.1})
        assert [file["passed"] for file in told["files"]] == [True, False]
        assert error.message.startswith("not the model it came from: q8_0.gguf: mean KL")
        assert told["gates"]["Q8_0"] == {"max_kl": 1e-5, "min_top1": 0.1}

    def test_a_limit_for_a_type_that_no_file_has(self, folder: Path, path: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"name Q4_0, Q8_0; the files are F32"):
            settings = verify.Settings(max_kl={"Q8_0": 1.0}, min_top1={"Q4_0": 1.0})
            verify.run(settings, {"model": folder, "gguf": path}, tmp_path, Silent())

    def test_files_of_one_name_are_told_apart(self, folder: Path, path: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name / "gguf").mkdir(parents=True)
            shutil.copyfile(path, tmp_path / name / "gguf" / "model.gguf")
        told, _ = check(folder, (tmp_path / "a" / "gguf", tmp_path / "b" / "gguf"), tmp_path, tokens=16)
        assert [file["file"] for file in told["files"]] == ["a/gguf/model.gguf", "b/gguf/model.gguf"]

    def test_without_texts_nothing_is_recommended(self, folder: Path, path: Path, tmp_path: Path) -> None:
        told, figures = check(folder, path, tmp_path)
        assert told["recommended"] is None and told["original"] is None and "recommended" not in figures
        assert told["files"][0]["holdout"] is None
        assert "no held-out text" in (tmp_path / "verify.md").read_text()

    def test_the_smallest_within_the_limit(self) -> None:
        def file(name: str, size: int, kl: float, passed: bool = True) -> dict[str, Any]:
            return {"file": name, "size_bytes": size, "passed": passed, "holdout": {"kl_mean": kl}}

        files = [file("f32", 400, 1e-9), file("q8", 100, 0.001), file("q4", 60, 0.04), file("q2", 40, 0.3)]
        assert recommended(files, 0.05) == "q4"
        assert recommended(files, 0.01) == "q8"
        assert recommended(files, 1e-5) == "f32"
        assert recommended(files, 1e-12) is None
        assert recommended([*files[:2], file("q4", 60, 0.04, passed=False)], 0.05) == "q8"

    def test_the_page(self, folder: Path, path: Path, tmp_path: Path) -> None:
        texts = texts_file(tmp_path / "t.jsonl", LONG)
        told, _ = check(folder, (path, smaller(path, tmp_path / "q", "q8_0")), tmp_path, texts)
        told["files"][0]["file"] = "a|b_[c].gguf"
        text = page(told)
        rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
        assert {len(row) for row in rows} == {12, 11, 7} and rows[2][1] == " a\\|b_\\[c\\].gguf "
        first = told["files"][1]["holdout"]
        assert f"{first['perplexity']:.4g} ± {first['perplexity_error']:.2g}" in text
        assert "Take q8_0.gguf: the smallest file whose mean KL is at most 0.05 nats." in text


class TestDivergence:
    def test_by_hand(self) -> None:
        """p = (1/2, 1/2), q = (3/4, 1/4): KL = ln(1/2 / 3/4)/2 + ln(1/2 / 1/4)/2; a shift changes nothing."""
        wanted, got = np.log([[0.5, 0.5]]) + 100, np.log([[0.75, 0.25]]) - 7
        assert divergence.divergence(wanted, got)[0] == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))
        assert divergence.divergence(wanted, wanted)[0] == pytest.approx(0, abs=1e-12)

    def test_agreement_by_hand(self) -> None:
        found = divergence.Comparison()
        wanted = np.array([9, 8, 7, 6, 5, 4, 3], np.float32)
        found.add(wanted, wanted)
        found.add(wanted, wanted[[0, 1, 2, 3, 5, 4, 6]])  # the fifth and the sixth change places
        found.add(wanted, wanted[[1, 0, 2, 3, 4, 5, 6]])  # another best token
        close = np.array([9, 8.995, 7, 6, 5, 4, 3], np.float32)
        found.add(close, close[[1, 0, 2, 3, 4, 5, 6]])  # another best token, as good as the first
        told = found.agreement()
        assert told["tokens"] == 4 and told["top1"] == 0.5 and told["ties"] == 1
        assert told["top5"] == pytest.approx((1 + 0.8 + 1 + 1) / 4) and told["max_abs"] == 1.0

    def test_likelihood_by_hand(self) -> None:
        """Tokens of probability 1/2 and 1/8, the original's 1/2 and 3/4: perplexity 4, ratio sqrt 6."""
        found = divergence.Comparison()
        found.add(np.log([0.5, 0.5]), np.log([0.5, 0.5]), 0)
        found.add(np.log([0.25, 0.75]), np.log([0.875, 0.125]), 1)
        told = found.likelihood()
        assert told["perplexity"] == pytest.approx(4) and told["ratio"] == pytest.approx(math.sqrt(6))
        # of two values the standard error is half their distance
        assert told["perplexity_error"] == pytest.approx(4 * math.log(4) / 2)
        assert told["ratio_error"] == pytest.approx(math.sqrt(6) * math.log(6) / 2)
        assert told["kl_error"] == pytest.approx(told["kl_mean"]) and told["tokens"] == 2

    def test_no_numbers(self) -> None:
        with pytest.raises(ModelError, match="are no numbers"):
            divergence.Comparison().add(np.zeros(3), np.array([0, np.nan, 1]))


class TestHoldout:
    def test_windows(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import AutoTokenizer

        monkeypatch.setattr(original, "HOLDOUT_WINDOW", 64)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        long, short = (
            texts_file(tmp_path / "a.jsonl", LONG),
            texts_file(tmp_path / "b.jsonl", ["мама мыла раму"]),
        )
        other = texts_file(tmp_path / "c.jsonl", LONG[::-1])
        windows = original.holdout_ids(tokenizer, [long, short, other], 64 * 5, 512)
        assert [len(ids) for ids in windows] == [64] * 3  # of b's single one nothing: its text is too short
        assert tokenizer.decode([*windows[0], *windows[1]]).startswith(LONG[0] + "\n" + LONG[1])
        assert tokenizer.decode(windows[2]).startswith(LONG[-1][:20])
        assert [len(ids) for ids in original.holdout_ids(tokenizer, [long, other], 40, 512)] == [40]
        assert original.holdout_ids(tokenizer, [long, other], 0, 512) == []

    def test_texts_too_short_are_said_to_be(self, folder: Path, path: Path, tmp_path: Path) -> None:
        texts, report = texts_file(tmp_path / "t.jsonl", ["мама"]), Silent()
        inputs = {"model": folder, "gguf": path, "texts": texts}
        verify.run(verify.Settings(tokens=64), inputs, tmp_path, report)
        assert report.notes[0].startswith("the texts are too short")
        assert json.loads((tmp_path / "verify.json").read_text())["recommended"] is None

    def test_the_beginning_token_takes_the_first_place(self, tmp_path: Path) -> None:
        """As in llama.cpp's tool, where the first token of every window is replaced."""

        class Tokenizer:
            bos_token_id = 1

            def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
                return [1] * add_special_tokens + [2 + len(word) for word in text.split()]

        words = texts_file(tmp_path / "t.jsonl", [" ".join("x" * (n % 7) + "y" for n in range(60))])
        first, second = original.holdout_ids(Tokenizer(), [words], 40, 20)
        assert first == [1, *(3 + n % 7 for n in range(19))]
        assert second == [1, *(3 + n % 7 for n in range(20, 39))]

    def test_perplexity_is_that_of_transformers(self, folder: Path, path: Path, tmp_path: Path) -> None:
        """Windows cut here, the loss by transformers' own cross entropy, first halves masked out."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        small = smaller(path, tmp_path / "q", "q8_0")
        texts = texts_file(tmp_path / "t.jsonl", LONG)
        told, _ = check(folder, (path, small), tmp_path, texts, holdout_tokens=1024)
        ids = AutoTokenizer.from_pretrained(str(folder)).encode("\n".join(LONG))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        losses = []
        for start in (0, 512):
            window = torch.tensor([ids[start : start + 512]])
            masked = window.clone()
            masked[:, : 256 + 1] = -100
            with torch.no_grad():
                losses.append(float(model(window, labels=masked).loss))
        wanted = math.exp(sum(losses) / 2)
        assert told["original"]["tokens"] == told["files"][0]["holdout"]["tokens"] == 2 * 255
        assert told["original"]["perplexity"] == pytest.approx(wanted, rel=1e-5)
        assert told["files"][0]["holdout"]["perplexity"] == pytest.approx(wanted, rel=1e-4)
        assert told["files"][0]["holdout"]["ratio"] == pytest.approx(1, abs=1e-4)
        assert told["files"][1]["holdout"]["perplexity"] != pytest.approx(wanted, rel=1e-4)
        assert told["recommended"] == "q8_0.gguf"


class Stopping(Silent):
    """Asks to stop once `notes` notes were told."""

    def __init__(self, notes: int) -> None:
        super().__init__()
        self._limit = notes

    def stop_requested(self) -> bool:
        return len(self.notes) >= self._limit


def test_a_stop_between_files_goes_on(
    folder: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(function: str, arguments: Any, report: Any) -> Any:
        calls.append(Path(arguments.get("path", function)).name)
        return here(function, arguments, report)

    monkeypatch.setattr(verify, "in_child", counted)
    gguf = (path, smaller(path, tmp_path / "q", "q8_0"))
    inputs = {"model": folder, "gguf": gguf, "texts": texts_file(tmp_path / "t.jsonl", LONG)}
    settings = verify.Settings(tokens=64, holdout_tokens=1024)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    verify.run(settings, inputs, tmp_path / "a", Silent())
    assert calls == ["export.parity.original:record", "model.gguf", "q8_0.gguf"]
    with pytest.raises(StopRequested):
        verify.run(settings, inputs, tmp_path / "b", Stopping(1))
    assert not (tmp_path / "b" / "verify.json").exists()
    calls.clear()
    verify.run(settings, inputs, tmp_path / "b", Silent())
    assert calls == ["q8_0.gguf"]
    assert (tmp_path / "a" / "verify.json").read_bytes() == (tmp_path / "b" / "verify.json").read_bytes()
    verify.run(verify.Settings(tokens=65, holdout_tokens=0), inputs, tmp_path / "b", Silent())
    assert len(calls) == 4, "results of other settings are not taken"


def test_a_stop_inside_the_original_keeps_its_windows(folder: Path, path: Path, tmp_path: Path) -> None:
    class After(Silent):
        def stop_requested(self) -> bool:
            return len(list(tmp_path.glob(".work/verify/*.f32"))) == 2

    inputs = {"model": folder, "gguf": path, "texts": texts_file(tmp_path / "t.jsonl", LONG)}
    with pytest.raises(StopRequested):
        verify.run(verify.Settings(tokens=64, holdout_tokens=1024), inputs, tmp_path, After())
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob(".work/verify/*.f32")}
    told, _ = check(folder, path, tmp_path, inputs["texts"])
    assert told["passed"] and len(kept) == 2
    assert all(file.stat().st_mtime_ns == at for file, at in kept.items())


def test_fuzz_is_seeded_and_wide() -> None:
    assert adversarial.fuzz(3, 50) == adversarial.fuzz(3, 50) != adversarial.fuzz(4, 50)
    letters = {c for text in adversarial.fuzz(3, 300) for c in text}
    assert "\0" not in letters and len(letters) > 1000
    assert {"\n", "\u200d", "\u0301", "ж"} <= letters


@pytest.mark.slow
class TestRealChildren:
    def test_a_file_on_which_llama_cpp_ends_its_process(
        self, folder: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other file is compared all the same, and the failure names the one."""
        monkeypatch.setattr(verify, "in_child", in_child)

        def with_experts(writer: Any, *more: Any) -> None:
            architectures.describe(writer, *more)
            writer.add_expert_count(8)  # of which none is used: GGML_ASSERT(n_expert_used_max > 0)

        with monkeypatch.context() as patch:
            patch.setattr("export.gguf.describe", with_experts)
            broken = export(folder, tmp_path / "gguf").rename(tmp_path / "broken.gguf")
        told, error = check(folder, (broken, path), tmp_path, texts_file(tmp_path / "t.jsonl"))
        assert [file["passed"] for file in told["files"]] == [False, True]
        assert "broken.gguf: the process that worked on it was ended by SIGABRT" in error.message
        assert told["files"][1]["logits"]["kl_mean"] < 1e-6

    def test_a_file_needs_neither_torch_nor_transformers(
        self, folder: Path, path: Path, tmp_path: Path
    ) -> None:
        check(folder, path, tmp_path, texts_file(tmp_path / "t.jsonl"))
        code = (
            "import sys\nfrom export.parity.comparison import compare_file\n"
            "from foundation.report import Silent\n"
            f"compare_file({str(path)!r}, {str(tmp_path / '.work' / 'verify')!r}, 640, Silent())\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def llama_perplexity(*arguments: str, last: str) -> str:
    """What llama.cpp's own tool prints, up to `last`; its place is named by SAMOVAR_LLAMA_TOOLS.

    It prints from a thread of its own, and now and then ends before that thread has printed all.
    """
    tools = os.environ.get("SAMOVAR_LLAMA_TOOLS")
    program = Path(tools or "", "llama-perplexity")
    if not tools or not program.is_file():
        pytest.skip("llama-perplexity is missing: SAMOVAR_LLAMA_TOOLS names no folder that holds it")
    options = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-c", "512", "-b", "512", "-t", "1", "-ngl", "0"]
    for _ in range(5):
        done = subprocess.run([program, *arguments, *options], capture_output=True, text=True, check=True)
        if last in done.stdout + done.stderr:
            break
    return done.stdout + done.stderr


def told_by_the_tool(text: str, name: str) -> tuple[float, float]:
    """A figure and its error, from a line such as "Mean    KLD:   0.123 ±   0.004"."""
    found = re.search(
        re.escape(name).replace(r"\ ", r"\s+") + r"\s*[:=]\s*([\d.]+)\s*(?:±|\+/-)\s*([\d.]+)", text
    )
    assert found, text
    return float(found[1]), float(found[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", pytest.param("stories260K", marks=pytest.mark.realdata)])
def test_perplexity_and_kl_are_those_of_llama_cpps_own_tool(
    name: str, path: Path, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One model without a beginning token, one with. The tool keeps the base's logits in 16 bits."""
    if name != "random":
        folder = request.getfixturevalue("samovar_data") / "models" / name
        path = export(folder, tmp_path / "f32")
    told_in = [LONG, ENGLISH][
        name == "stories260K"
    ]  # on text that it knows: the tool cuts off small probabilities
    texts, plain = texts_file(tmp_path / "t.jsonl", told_in), tmp_path / "t.txt"
    plain.write_text("\n".join(told_in), encoding="utf-8")
    small = smaller(path, tmp_path / "q", "q4_0")
    said = llama_perplexity(
        "-m",
        str(path),
        "-f",
        str(plain),
        "--chunks",
        "4",
        "--kl-divergence-base",
        str(tmp_path / "b"),
        last="Final estimate",
    )
    told, _ = check(folder, (path, small), tmp_path, texts, holdout_tokens=4 * 512)
    wanted = told_by_the_tool(said, "Final estimate: PPL")
    got = told["files"][0]["holdout"]
    assert (got["perplexity"], got["perplexity_error"]) == pytest.approx(wanted, rel=2e-4)
    base = ("--kl-divergence-base", str(tmp_path / "b"), "--kl-divergence")
    said = llama_perplexity("-m", str(small), *base, last="Same top p:")
    got = told["files"][1]["holdout"]
    assert got["perplexity"] == pytest.approx(told_by_the_tool(said, "Mean PPL(Q)")[0], rel=2e-4)
    assert (got["kl_mean"], got["kl_error"]) == pytest.approx(told_by_the_tool(said, "Mean KLD"), rel=0.01)
    assert got["ratio"] == pytest.approx(told_by_the_tool(said, "Mean PPL(Q)/PPL(base)")[0], rel=1e-3)
    top = told_by_the_tool(said, "Same top p")
    assert 100 * got["top1"] == pytest.approx(top[0], abs=0.5)


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_real_models_pass(samovar_data: Path, name: str, tmp_path: Path) -> None:
    folder = samovar_data / "models" / name
    source = min((samovar_data / "text" / "tinystories-ru").glob("*.jsonl"))
    stories = [json.loads(line)["story"] for line in source.open(encoding="utf-8")]
    lines = [line for story in stories for line in story.split("\n") if line][:5000]
    texts = texts_file(tmp_path / "t.jsonl", lines)
    told, _ = check(folder, export(folder, tmp_path / "out"), tmp_path, texts, tokens=1000)
    (file,) = told["files"]
    assert told["passed"], file["failures"]
    assert file["logits"]["tokens"] >= 1000 and file["tokenisation"]["lines"]["equal"] == 5000
    assert file["holdout"]["kl_mean"] < 1e-6


def test_the_original_tokenises_by_its_own_file(tmp_path: Path) -> None:
    """transformers' class for Qwen2 puts a normalizer of its own in the place of tokenizer.json's."""
    folder = model_folder(tmp_path / "model", "qwen2")
    write_tokenizer(folder, byte_level(nfc=False), tokenizer_class="Qwen2Tokenizer")
    loaded = original.load_tokenizer(folder)
    text = "и\u0306 е\u0308 e\u0301"  # decomposed
    wanted = Backend.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert loaded.encode(text, add_special_tokens=False) == wanted
    assert loaded.backend_tokenizer.normalizer is None and loaded.eos_token == "<|im_end|>"

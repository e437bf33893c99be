"""export.adapter against peft's models and llama.cpp's own converter, for every family, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
from handmade import export, model_folder
from lora import LINEAR, adapter_folder

from export import adapter
from export.lora import Lora
from export.weights import architectures
from foundation.errors import ModelError
from foundation.llama import LlamaModel
from foundation.report import Silent

LLAMA3 = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 48, "num_hidden_layers": 7}
TIED = {"tie_word_embeddings": True}
ENDS = [*LINEAR, "embed_tokens", "lm_head"]
PATTERNS = {
    "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 16},
    "alpha_pattern": {"k_proj": 2.5, r"model\.layers\.2.*o_proj": 50},
}


def written(folder: Path, lora: Path, out: Path, gguf: Path | None = None, **settings: Any) -> Path:
    """What the stage writes."""
    out.mkdir(parents=True)
    inputs = {"model": folder, "adapter": lora} | ({"gguf": gguf} if gguf else {})
    adapter.run(adapter.Settings(**settings), inputs, out, Silent())
    return out / "adapter.gguf"


def agreement(folder: Path, lora: Path, gguf: Path, file: Path) -> dict[str, float]:
    """llama.cpp's logits and peft's."""
    return adapter.compare(str(folder), str(lora), str(gguf), str(file), 160, 5, Silent())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(base, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_folder(base, tmp_path_factory.mktemp("lora") / "peft")


@pytest.mark.parametrize(
    ("kind", "changes", "config"),
    [
        ("llama", {}, {}),
        ("llama", {"rope_parameters": LLAMA3} | TIED, {}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}, {"lora_alpha": 7, "r": 3}),
        ("mistral", {"sliding_window": None}, {}),
        ("qwen2", {}, {"dtype": "bfloat16"}),
        ("qwen3", TIED, {"dtype": "float16"}),
        ("gemma3_text", GEMMA | TIED, {}),
        ("gemma3_text", GEMMA | {"head_dim": 24, "query_pre_attn_scalar": 40}, {"target_modules": ENDS}),
        ("llama", {}, {"target_modules": ENDS}),
        ("llama", {}, {"use_rslora": True}),
        ("llama", {}, PATTERNS),
        ("llama", {}, PATTERNS | {"use_rslora": True}),
        ("qwen3", {}, {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "up_proj"]}),
        ("qwen3", {}, {"target_modules": r"model\.layers\.[01]\..*(q_proj|down_proj)"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_logits_are_those_of_peft(kind: str, changes: dict, config: dict, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", kind, **changes)
    lora = adapter_folder(folder, tmp_path / "lora", **config)
    file = written(folder, lora, tmp_path / "out")
    found = agreement(folder, lora, export(folder, tmp_path / "gguf"), file)
    assert found["kl_mean"] < 1e-6 and found["top1"] == 1.0 and found["tokens"] == 160
    assert found["adapter_kl"] > 1e-2  # or agreement would say nothing


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({}, "pairs"),
        ({"use_rslora": True}, "alpha"),
        (PATTERNS, "factor"),
        ({"target_modules": ["embed_tokens"]}, "scale of the embedding"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_each_known_fault_shows(
    config: dict, fault: str, base: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapter_folder(base, tmp_path / "lora", **config)
    if fault == "pairs":
        wrong = replace(architectures.TARGETS["llama"], pairs=False)
        monkeypatch.setattr(adapter, "check", lambda shape: wrong)
    elif fault == "alpha":
        read = adapter.read_lora
        monkeypatch.setattr(adapter, "read_lora", lambda *given: replace(read(*given), alpha=16.0))
        monkeypatch.setattr(Lora, "factor", lambda self, weight: 1.0)
    elif fault == "factor":
        monkeypatch.setattr(Lora, "factor", lambda self, weight: 1.0)
    else:
        monkeypatch.setattr(Lora, "factor", lambda self, weight: 2.0)
    found = agreement(base, lora, gguf, written(base, lora, tmp_path / "out"))
    assert found["kl_mean"] > 1e-3


def test_the_numbers_by_hand(tmp_path: Path) -> None:
    """Two heads of four: rows 0 1 2 3 of a head become 0 2 1 3; A stays, V has no rotation."""
    from safetensors.numpy import load_file

    folder = model_folder(
        tmp_path / "hf", num_attention_heads=2, num_key_value_heads=1, head_dim=4, hidden_size=8
    )
    config = {"target_modules": ["q_proj", "k_proj", "v_proj"], "alpha_pattern": {"v_proj": 8}}
    lora = adapter_folder(folder, tmp_path / "lora", r=2, lora_alpha=4, **config)
    given = load_file(lora / "adapter_model.safetensors")
    tensors, keys = contents(written(folder, lora, tmp_path / "out"))
    at = "base_model.model.model.layers.0.self_attn."
    up = given[f"{at}q_proj.lora_B.weight"]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], up[[0, 2, 1, 3, 4, 6, 5, 7]])
    np.testing.assert_array_equal(
        tensors["blk.0.attn_k.weight.lora_b"], given[f"{at}k_proj.lora_B.weight"][[0, 2, 1, 3]]
    )
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight.lora_b"], 2 * given[f"{at}v_proj.lora_B.weight"])
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_a"], given[f"{at}q_proj.lora_A.weight"])
    assert keys["adapter.lora.alpha"] == 4.0
    assert len(tensors) == 18


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, keys) by gguf's own reader."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {tensor.name: tensor.data for tensor in reader.tensors}, keys


def test_what_the_file_says_of_itself(base: Path, lora: Path, tmp_path: Path) -> None:
    file = written(base, lora, tmp_path / "a", adapter_name="tea", base_model="acme/Kettle-1B")
    _, keys = contents(file)
    said = {name: keys[f"general.{name}"] for name in ("architecture", "type", "name")}
    assert said == {"architecture": "llama", "type": "adapter", "name": "tea"}
    assert (keys["adapter.type"], keys["adapter.lora.alpha"]) == ("lora", 16.0)
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/acme/Kettle-1B"
    again = written(base, lora, tmp_path / "b", adapter_name="tea", base_model="acme/Kettle-1B")
    assert again.read_bytes() == file.read_bytes()
    plain = written(base, lora, tmp_path / "c").read_bytes()
    assert str(base).encode() not in plain and b"base_model" not in plain  # peft saved the base's path
    assert [path.name for path in file.parent.iterdir() if path.name != ".work"] == ["adapter.gguf"]


def test_half_precision_is_smaller_and_near(base: Path, gguf: Path, lora: Path, tmp_path: Path) -> None:
    file = written(base, lora, tmp_path / "a", dtype="f16")
    assert file.stat().st_size < 0.6 * written(base, lora, tmp_path / "b").stat().st_size
    tensors, _ = contents(file)
    assert {values.dtype for values in tensors.values()} == {np.dtype(np.float16)}
    assert agreement(base, lora, gguf, file)["kl_mean"] < 1e-5


def test_two_adapters_on_one_base_each_give_their_own_answers(
    base: Path, gguf: Path, lora: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    other = adapter_folder(base, tmp_path / "other", seed=2, r=4, target_modules=["v_proj", "up_proj"])
    ids = np.random.default_rng(0).integers(0, 640, 60).tolist()
    wanted = {}
    for name, folder in (("base", None), ("lora", lora), ("other", other)):
        model = AutoModelForCausalLM.from_pretrained(str(base), attn_implementation="eager")
        if folder:
            model = PeftModel.from_pretrained(model, str(folder))
        with torch.no_grad():
            wanted[name] = model.eval()(torch.tensor([ids])).logits[0].numpy()
    with LlamaModel(gguf) as model:
        one = model.adapter(written(base, lora, tmp_path / "a"))
        two = model.adapter(written(base, other, tmp_path / "b"))

        def logits(*adapters: tuple) -> np.ndarray:
            with model.context(64, threads=1, cache="f32", adapters=adapters) as context:
                return context.logits(ids)

        got = {"base": logits(), "lora": logits((one, 1.0)), "other": logits((two, 1.0))}
        with (
            model.context(64, threads=1, cache="f32", adapters=[(one, 1.0)]) as left,
            model.context(64, threads=1, cache="f32", adapters=[(two, 1.0)]) as right,
        ):  # both at once, and in turn
            for _ in range(2):
                np.testing.assert_array_equal(left.logits(ids), got["lora"])
                np.testing.assert_array_equal(right.logits(ids), got["other"])
        np.testing.assert_array_equal(logits((one, 0.0)), got["base"])
        np.testing.assert_array_equal(logits((one, 0.0), (two, 1.0)), got["other"])
        both, turned = logits((one, 1.0), (two, 1.0)), logits((two, 1.0), (one, 1.0))
        np.testing.assert_allclose(both, turned, atol=1e-4)
        half = logits((one, 0.5))
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-3)
    unlike = [got["base"], got["lora"], got["other"], both, half]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(unlike) for b in unlike[:i])


@pytest.mark.slow
def test_the_stage_proves_its_file_in_a_child(base: Path, gguf: Path, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = Silent()
    inputs = {"model": base, "adapter": lora, "gguf": gguf.parent}
    figures = adapter.run(adapter.Settings(), inputs, out, report)
    assert figures["kl_mean"] < 1e-6 and figures["top1"] == 1.0 and figures["adapter_kl"] > 0.01
    assert (figures["matrices"], figures["rank"]) == (21, 8)
    assert not any("was not compared" in note for note in report.notes)
    other = export(model_folder(tmp_path / "hf", seed=9), tmp_path / "other")
    with pytest.raises(ModelError, match=r"model\.gguf with the adapter is not peft's model: mean KL"):
        written(base, lora, tmp_path / "bad", other)
    assert not (tmp_path / "bad" / "adapter.gguf").exists()


def test_a_proof_that_fails_leaves_no_file(
    base: Path, gguf: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(function: str, arguments: dict, report: Any) -> dict[str, float]:
        assert function == "export.adapter:compare" and json.dumps(arguments)
        return {"kl_mean": 1e-3, "kl_max": 1.0, "top1": 1.0, "ties": 0, "tokens": 200, "adapter_kl": 0.3}

    monkeypatch.setattr(adapter, "in_child", bad)
    with pytest.raises(ModelError, match=r"mean KL 0\.001, allowed 1e-06; .* moves the base by 0\.3"):
        written(base, lora, tmp_path / "out", gguf)
    assert not (tmp_path / "out" / "adapter.gguf").exists()


def test_without_the_base_file_nothing_is_proven_and_it_says_so(base: Path, lora: Path, tmp_path: Path) -> None:
    report = Silent()
    adapter.run(adapter.Settings(), {"model": base, "adapter": lora}, tmp_path, report)
    assert "no GGUF file of the base was given" in " ".join(report.notes)


def test_a_quantised_base_can_prove_nothing(base: Path, lora: Path, gguf: Path, tmp_path: Path) -> None:
    import gguf as package

    quantised = tmp_path / "q.gguf"
    writer = package.GGUFWriter(quantised, "llama")
    writer.add_file_type(int(package.LlamaFileType.MOSTLY_Q4_K_M))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"q\.gguf is Q4_K_M: how far it is from peft's model says little"):
        written(base, lora, tmp_path / "out", quantised)


def edited(lora: Path, out: Path, **changes: Any) -> Path:
    """A copy of an adapter with other keys in its config."""
    shutil.copytree(lora, out)
    config = json.loads((out / "adapter_config.json").read_text()) | changes
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def with_tensors(lora: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of an adapter whose tensors `change` has altered."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(lora, out)
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()},
        out / "adapter_model.safetensors",
    )
    return out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora = True is more than plain LoRA"),
        ({"lora_bias": True}, "lora_bias = True is more"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"something_new": 3}, "something_new = 3 is more than plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        ({"init_lora_weights": ["pissa"]}, "changes the base"),
        ({"r": 0}, "r is 0, 1 or more is needed"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0, 1e-09..1e.09 is allowed"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 4}, r"lora_A\.weight is \(8, 64\), rank 4 on this base makes it \(4, 64\)"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj\.lora_A\.weight is \(8, 64\), rank 2 .* \(2, 64\)"),
        ({"rank_pattern": {"(a+)+$": 8}}, r"rank_pattern: '\(a\+\)\+\$'; names with"),
        ({"alpha_pattern": {".*.*.*q_proj": 8}}, "alpha_pattern: .* and no other expressions"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj = -1, 1e-09..1e.09 is allowed"),
        ({"alpha_pattern": [8]}, r"alpha_pattern is \[8\], a table is needed"),
        ({"layers_to_transform": [0, 1]}, "layers.2.* which is no target by adapter_config.json"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"layers_pattern": "h"}, "layers_pattern is 'h'"),
        ({"target_modules": [*LINEAR, "c_attn"]}, "target_modules names c_attn, which the base has not"),
        ({"target_modules": [*LINEAR, "lm_head"]}, "missing lora_A and lora_B of lm_head, a target"),
        ({"target_modules": LINEAR[1:]}, r"q_proj, which is no target by adapter_config\.json"),
        ({"exclude_modules": ["k_proj"]}, "k_proj, which is no target"),
        ({"target_modules": 7}, "target_modules is 7, names are needed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(changes: dict, said: str, base: Path, lora: Path, tmp_path: Path) -> None:
    bad = edited(lora, tmp_path / "bad", **changes)
    with pytest.raises(ModelError, match=said):
        written(base, bad, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter.gguf").exists()


AT = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{AT}.lora_A.weight"), r"q_proj\.lora_B\.weight stands alone, without its lora_A"),
        (lambda t: t.pop(f"{AT}.lora_B.weight"), r"q_proj\.lora_A\.weight stands alone, without its lora_B"),
        (lambda t: [t.pop(f"{AT}.lora_{x}.weight") for x in "AB"], "missing lora_A and lora_B of .*1.*q_proj"),
        (lambda t: t.update({"other": t[f"{AT}.lora_A.weight"]}), "unknown tensor other"),
        (
            lambda t: t.update({f"{AT}.lora_magnitude_vector": t[f"{AT}.lora_A.weight"]}),
            "unknown tensor .*magn",
        ),
        (
            lambda t: t.update({f"{AT[:-6]}x_proj.lora_A.weight": t[f"{AT}.lora_A.weight"]}),
            r"the base has no model\.layers\.1\.self_attn\.x_proj\.weight \(3 layers of llama\)",
        ),
        (
            lambda t: t[f"{AT}.lora_A.weight"].__setitem__((0, 0), np.nan),
            "lora_A.weight holds infinite or undef",
        ),
        (
            lambda t: t[f"{AT}.lora_B.weight"].__setitem__((0, 0), np.inf),
            "lora_B.weight holds infinite or undef",
        ),
        (lambda t: t.clear(), "no tensors|missing lora_A|no lora_A"),
    ],
    ids=["no-A", "no-B", "no-pair", "stray", "dora", "unknown-module", "nan", "inf", "empty"],
)
def test_tensors_that_are_refused(change: Callable, said: str, base: Path, lora: Path, tmp_path: Path) -> None:
    bad = with_tensors(lora, tmp_path / "bad", change)
    with pytest.raises(ModelError, match=said):
        written(base, bad, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter.gguf").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"hidden_size": 32}, r"lora_A\.weight is \(8, 64\), rank 8 on this base makes it \(8, 32\)"),
        ("llama", {"num_hidden_layers": 2}, r"the base has no model\.layers\.2\..* \(2 layers of llama\)"),
        ("llama", {"num_hidden_layers": 4}, "missing lora_A and lora_B of model.layers.3"),
        ("llama", {"intermediate_size": 96}, r"is \(160, 8\), rank 8 on this base makes it \(96, 8\)"),
    ],
)
def test_adapters_of_another_base_are_refused(
    kind: str, changes: dict, said: str, lora: Path, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "hf", kind, **changes)
    with pytest.raises(ModelError, match=said):
        written(folder, lora, tmp_path / "out")


def test_weights_saved_whole_must_be_the_bases_own(base: Path, tmp_path: Path) -> None:
    """peft saves the embedding beside adapters of it, and whatever modules_to_save names."""
    lora = adapter_folder(base, tmp_path / "lora", modules_to_save=["lm_head"])
    written(base, lora, tmp_path / "same")

    def trained(tensors: dict[str, np.ndarray]) -> None:
        tensors["base_model.model.lm_head.weight"][5, 5] += 1e-3

    bad = with_tensors(lora, tmp_path / "trained", trained)
    with pytest.raises(ModelError, match=r"lm_head\.weight is saved whole and is not the base's"):
        written(base, bad, tmp_path / "out")
    other = model_folder(tmp_path / "longer", vocab_size=704)
    with pytest.raises(ModelError, match=r"lm_head\.weight is \(640, 64\), the base has \(704, 64\)"):
        written(other, lora, tmp_path / "out2")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embedding_and_head_that_are_one_take_no_adapter(module: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", "qwen3", tie_word_embeddings=True)
    lora = adapter_folder(folder, tmp_path / "lora", target_modules=["q_proj", module])
    with pytest.raises(ModelError, match=f"it changes .*{module}, and embedding and head of this base are one"):
        written(folder, lora, tmp_path / "out")


def test_folders_that_are_no_adapters(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        written(base, base, tmp_path / "a")
    pickled = shutil.copytree(lora, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors\n.*pickled"):
        written(base, pickled, tmp_path / "b")
    for text, said in (("{", "is not valid JSON"), ("[]", "is no table but list")):
        broken = shutil.copytree(lora, tmp_path / f"broken{len(text)}")
        (broken / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=said):
            written(base, broken, tmp_path / f"c{len(text)}")
    cut = shutil.copytree(lora, tmp_path / "cut")
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[:-64])
    with pytest.raises(ModelError, match="damaged or cut short"):
        written(base, cut, tmp_path / "d")


def test_too_much_for_half_precision(base: Path, lora: Path, tmp_path: Path) -> None:
    big = with_tensors(lora, tmp_path / "big", lambda t: t[f"{AT}.lora_B.weight"].__setitem__((0, 0), 1e5))
    with pytest.raises(ModelError, match=r"q_proj\.weight: its adapter holds 100000, too much for f16"):
        written(base, big, tmp_path / "out", dtype="f16")
    assert not (tmp_path / "out" / "adapter.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(
    ("kind", "changes", "modules"),
    [
        ("llama", {}, ENDS),
        ("mistral", {"sliding_window": None}, LINEAR),
        ("qwen2", {}, LINEAR),
        ("qwen3", TIED, LINEAR),
        ("gemma3_text", GEMMA | TIED, LINEAR),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(
    kind: str, changes: dict, modules: list[str], dtype: str, tmp_path: Path
) -> None:
    source = llamacpp.sources()
    folder = model_folder(tmp_path / "hf", kind, **changes)
    lora = adapter_folder(folder, tmp_path / "lora", target_modules=modules)
    from safetensors.numpy import load_file, save_file

    weights = lora / "adapter_model.safetensors"  # it knows no base_layer of a head: those are left out
    save_file({k: v for k, v in load_file(weights).items() if ".lora_" in k}, weights)
    theirs = tmp_path / "theirs.gguf"
    command = [sys.executable, str(source / "convert_lora_to_gguf.py"), "--base", str(folder)]
    done = subprocess.run(
        [*command, "--outtype", dtype, "--outfile", str(theirs), str(lora)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (ours, ours_said), (wanted, said) = (
        contents(written(folder, lora, tmp_path / "out", dtype=dtype)),
        contents(theirs),
    )
    assert ours.keys() == wanted.keys()
    for name, values in wanted.items():
        assert ours[name].dtype == values.dtype, name
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    both = ours_said.keys() & said.keys() - {"general.name"}  # it takes the folder's
    assert {name: ours_said[name] for name in both} == {name: said[name] for name in both}
    assert {"general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"} <= both

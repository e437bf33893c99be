"""export.gguf against transformers' logits, for every family and odd shape, and what it must refuse."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from handmade import byte_level, export, model_folder, write_tokenizer

from export import gguf, ggufs
from export.verify import compare_logits
from export.weights import architectures
from export.weights.checkpoint import Checkpoint
from export.weights.writer import write_files
from foundation.errors import ModelError, RunError
from foundation.gguf_header import read
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.shape import ModelShape

LLAMA3 = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_4B_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 48, "num_hidden_layers": 7}


def agreement(folder: Path, file: Path, tokens: int = 160) -> dict:
    with LlamaModel(file) as model:
        ids = np.random.default_rng(5).integers(0, model.vocab_size, tokens).tolist()
        return compare_logits(folder, model, [ids])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        (
            "qwen3",
            {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        ),
        ("gemma3_text", GEMMA),
        ("gemma3_text", GEMMA | {"rope_parameters": GEMMA_4B_ROPE}),
        (
            "gemma3_text",
            GEMMA | {"num_hidden_layers": 4, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
        ),
        ("gemma3_text", GEMMA | {"head_dim": 24, "query_pre_attn_scalar": 40}),
        ("gemma3_text", GEMMA | {"head_dim": 24, "query_pre_attn_scalar": 40, "num_hidden_layers": 62}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_logits_are_those_of_transformers(kind: str, changes: dict, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", kind, **changes)
    found = agreement(folder, export(folder, tmp_path / "out"))
    assert found["top1"] == 1.0
    assert found["kl_mean"] < 1e-6
    assert found["tokens"] == 160  # past the sliding window of 48


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        ("llama", {}, {"pairs": False}),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {"ropes": ("default", "llama3"), "rope_size": True, "pairs": True},
        ),
        ("gemma3_text", GEMMA, {"norm_plus_one": False}),
        ("gemma3_text", GEMMA, {"windows": False}),
    ],
    ids=["unpermuted", "no-llama3-divisors", "norm-without-one", "no-windows"],
)
def test_each_known_fault_shows_in_the_logits(
    kind: str, changes: dict, fault: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate must be able to fail: the same export with one step left out."""
    folder = model_folder(tmp_path / "hf", kind, **changes)
    right = architectures.TARGETS[kind]
    wrong = architectures.Target(**{**vars(right), **fault})
    monkeypatch.setattr("export.gguf.check", lambda shape: wrong)
    if changes.get("rope_parameters"):
        monkeypatch.setattr("export.gguf.rope_divisors", lambda shape: None)
    found = agreement(folder, export(folder, tmp_path / "out"))
    assert found["kl_mean"] > 1e-3


@pytest.mark.parametrize("layers", [4, 62])
def test_an_attention_scale_left_to_llama_cpp_shows(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are sized so that llama.cpp's own scale, 24 or 64 // 4, is not the model's."""
    changes = GEMMA | {"head_dim": 24, "query_pre_attn_scalar": 40, "num_hidden_layers": layers}
    monkeypatch.setattr(architectures, "query_factor", lambda shape: 1.0)
    folder = model_folder(tmp_path / "hf", "gemma3_text", **changes)
    assert agreement(folder, export(folder, tmp_path / "out"))["kl_mean"] > 1e-3


def test_rope_divisors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=1, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 10_000 ** (np.arange(0, 64, 2) / 64)
    divisors = architectures.rope_divisors(ModelShape.from_config(json.loads(config.to_json_string())))
    np.testing.assert_allclose(plain / np.array(divisors), scaled.numpy(), rtol=1e-5)
    assert len(set(divisors)) > 3  # all three regions are there


def test_pairs_by_hand() -> None:
    rows = np.arange(8)[:, None]  # two heads of four
    assert architectures.halves_to_pairs(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_lose_nothing(dtype: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", dtype=dtype)
    found = agreement(folder, export(folder, tmp_path / "out"))
    assert found["top1"] == 1.0 and found["kl_mean"] < 1e-6


def test_bf16_is_read_and_written_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = model_folder(tmp_path / "hf", dtype="bfloat16")
    wanted = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == sorted(wanted)
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.read(name), wanted[name].to(torch.float32).numpy())
    path = export(folder, tmp_path / "out", dtype="bf16")
    types = {t.name: t.type for t in ggufs.tensors(path)}
    assert types["token_embd.weight"] == "BF16" and types["output_norm.weight"] == "F32"
    assert ggufs.quantisation(path) == "BF16"
    assert agreement(folder, path)["kl_mean"] < 1e-3  # llama.cpp computes in bf16 here


def test_f16_and_its_limit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "hf")
    path = export(folder, tmp_path / "out", dtype="f16")
    assert ggufs.quantisation(path) == "F16"
    assert agreement(folder, path)["kl_mean"] < 1e-3
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 70_000
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="70000, too much for f16"):
        export(folder, tmp_path / "out", dtype="f16")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.weight holds infinite"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_tensors_are_those_of_transformers_in_gguf_pys_types(kind: str, dtype: str, tmp_path: Path) -> None:
    """Every tensor of every type from every type, against gguf-py's quantiser on what torch reads."""
    import torch
    from gguf import GGMLQuantizationType, GGUFReader, quants
    from safetensors.torch import load_file

    folder = model_folder(tmp_path / "hf", kind, dtype=dtype, intermediate_size=176)
    stored = load_file(folder / "model.safetensors")
    names = architectures.gguf_names(ModelShape.from_folder(folder), architectures.TARGETS[kind])
    for wanted in ("f32", "f16", "bf16", "q8_0"):
        path = export(folder, tmp_path / wanted, dtype=wanted)
        found = {t.name: t for t in GGUFReader(path).tensors}
        assert set(found) == set(names.values())
        for old, new in names.items():
            values = stored[old].to(torch.float32).numpy()
            if kind == "gemma3_text" and values.ndim == 1:
                values = values + 1
            if kind == "gemma3_text" and old.endswith("q_norm.weight"):
                values = values * np.float32((24 / 256) ** 0.5)  # head_dim, query_pre_attn_scalar
            if kind == "llama" and (".q_proj." in old or ".k_proj." in old):
                heads = values.reshape(-1, 2, 12, 64)  # halves of 24 rows
                values = np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(values.shape)
            type_ = GGMLQuantizationType[wanted.upper() if values.ndim > 1 else "F32"]
            if wanted == "q8_0" and values.shape[-1] == 176:  # five blocks and a half
                type_ = GGMLQuantizationType.F16
            assert found[new].tensor_type == type_
            raw = quants.quantize(values, type_).tobytes()
            assert found[new].data.tobytes() == raw, f"{old} as {wanted}"


def test_q8_0_is_written_directly(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", num_hidden_layers=2)
    path = export(folder, tmp_path / "out", dtype="q8_0")
    assert ggufs.quantisation(path) == "Q8_0"
    assert {t.type for t in ggufs.tensors(path)} == {"Q8_0", "F32"}
    assert 1e-6 < agreement(folder, path)["kl_mean"] < 0.1


def test_output_in_shards_is_one_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf")
    whole, first = export(folder, tmp_path / "a"), export(folder, tmp_path / "b", shard_bytes=200_000)
    files = sorted((tmp_path / "b" / "gguf").iterdir())
    assert [f.name for f in files] == [f"model-{i:05}-of-00005.gguf" for i in range(1, 6)]
    assert first == files[0]
    assert ggufs.tensors(first) == ggufs.tensors(whole)
    assert agreement(folder, first)["kl_mean"] < 1e-6


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ],
)
def test_a_context_capped_to_the_window_needs_no_window(
    kind: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tokens are computed alike; the 65th is the first from which the model's window hides something."""
    folder = model_folder(tmp_path / "hf", kind, **changes)
    report = Silent()
    gguf.run(gguf.Settings(cap_context=True), {"model": folder}, tmp_path, report)
    assert "the context is capped from 512 to 64 tokens, one sliding window" in report.notes
    path = tmp_path / "gguf" / "model.gguf"
    arch = architectures.TARGETS[kind].arch
    assert read(path)[0][f"{arch}.context_length"] == 64
    assert agreement(folder, path, 64)["kl_mean"] < 1e-6
    with pytest.raises(ModelError, match=r"160 tokens of context asked, model.gguf has 1\.\.64"):
        agreement(folder, path, 160)
    monkeypatch.setattr("export.gguf.capped", lambda shape: replace(shape, windows=(None,) * shape.layers))
    uncapped = export(folder, tmp_path / "uncapped", cap_context=True)
    assert agreement(folder, uncapped, 160)["kl_mean"] > 1e-3


def test_capping_leaves_alone_what_has_no_such_window(tmp_path: Path) -> None:
    for kind, changes in (("llama", {}), ("gemma3_text", GEMMA)):
        folder = model_folder(tmp_path / kind, kind, **changes)
        plain, capped = export(folder, tmp_path / "a"), export(folder, tmp_path / "b", cap_context=True)
        assert plain.read_bytes() == capped.read_bytes()


def test_shards_and_repetition_give_the_same_bytes(tmp_path: Path) -> None:
    whole = model_folder(tmp_path / "whole")
    shards = model_folder(tmp_path / "shards", shards="300KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    files = [export(whole, tmp_path / "a"), export(whole, tmp_path / "b"), export(shards, tmp_path / "c")]
    assert len({file.read_bytes() for file in files}) == 1
    assert str(tmp_path).encode() not in files[0].read_bytes()


def test_an_interrupted_export_leaves_no_file_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "hf")
    wanted = export(folder, tmp_path / "a").read_bytes()

    def cut(name: str, *rest: Any) -> Any:
        if name == "model.layers.1.self_attn.k_proj.weight":
            raise KeyboardInterrupt
        return architectures.rows(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("export.gguf.rows", cut)
        with pytest.raises(KeyboardInterrupt):
            export(folder, tmp_path / "b")
    assert (tmp_path / "b" / ".work" / "gguf" / "model.gguf").is_file()
    assert not (tmp_path / "b" / "gguf").exists()
    assert export(folder, tmp_path / "b").read_bytes() == wanted


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mistral", {"sliding_window": 64}, "sliding windows of 64"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding windows",
        ),
        ("qwen2", {"head_dim": 24}, "4 heads of 24 are not the hidden size 64"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("gemma3_text", GEMMA | {"final_logit_softcapping": 30.0}, "soft-capped"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    kind: str, changes: dict, words: str, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "hf", kind, **changes)
    with pytest.raises(ModelError, match=words):
        export(folder, tmp_path / "out")


def test_a_name_that_llama_cpp_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Phi-3"):
        export(tmp_path, tmp_path / "out", model_name="my-Phi-3-mini")


class TestDamagedCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return model_folder(tmp_path / "hf")

    def refuse(self, folder: Path, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            export(folder, folder.parent / "out")
        assert not (folder.parent / "out" / "gguf").exists()

    def rewrite(self, folder: Path, change: object) -> None:
        """Change the header of model.safetensors, and keep the data."""
        raw = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)  # type: ignore[operator]
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    def test_cut_short(self, folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:-100])
        self.refuse(folder, "wrong offsets")
        (folder / "model.safetensors").write_bytes(raw[:50])
        self.refuse(folder, "not a safetensors file")
        (folder / "model.safetensors").write_bytes(b"")
        self.refuse(folder, "not a safetensors file")

    def test_offsets_outside_the_file(self, folder: Path) -> None:
        def change(header: dict) -> None:
            header["model.norm.weight"]["data_offsets"] = [2**40, 2**40 + 256]

        self.rewrite(folder, change)
        self.refuse(folder, "model.norm.weight has wrong offsets")

    def test_unknown_type(self, folder: Path) -> None:
        self.rewrite(folder, lambda header: header["model.norm.weight"].update(dtype="F8_E4M3"))
        self.refuse(folder, "F8_E4M3")

    def test_damaged_entry(self, folder: Path) -> None:
        self.rewrite(folder, lambda header: header["model.norm.weight"].pop("shape"))
        self.refuse(folder, "damaged entry")

    @pytest.mark.parametrize("header", ["[1, 2]", "[" * 50_000, '{"a": '])
    def test_a_header_that_is_no_table(self, folder: Path, header: str) -> None:
        text = header.encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        self.refuse(folder, "is not a safetensors file")

    def test_missing_and_unknown_tensors(self, folder: Path) -> None:
        def change(header: dict) -> None:
            header["model.extra.weight"] = header.pop("model.norm.weight")

        self.rewrite(folder, change)
        self.refuse(folder, r"missing model\.norm\.weight; unknown model\.extra\.weight")

    def test_shape_other_than_the_config(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
        (folder / "config.json").write_text(json.dumps(config))
        self.refuse(folder, r"gate_proj\.weight is \(160, 64\), config\.json says \(96, 64\)")

    def test_no_weights_at_all(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refuse(folder, "holds no model.safetensors")

    def test_index_that_leaves_the_folder(self, folder: Path) -> None:
        index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refuse(folder, r"'\.\./secret\.safetensors', which is no file of that folder")


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf", vocab_size=300)
    write_tokenizer(folder, byte_level())
    with pytest.raises(ModelError, match="the model only 300 embedding rows"):
        export(folder, tmp_path / "out")


def test_tied_model_ignores_a_stored_copy_of_the_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "hf", tie_word_embeddings=True)
    plain = export(folder, tmp_path / "a").read_bytes()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert export(folder, tmp_path / "b").read_bytes() == plain


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "hf", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][639, 63] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight is no copy of model\.embed_tokens\.weight"):
        export(folder, tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "hf")
    size = export(folder, tmp_path / "a").stat().st_size
    for free, fits in ((size - 1, False), (size, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            export(folder, tmp_path / "b")
        else:
            with pytest.raises(RunError, match=f"{size:,} bytes are needed.* has {size - 1:,} free"):
                export(folder, tmp_path / "b")
            assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_while_writing(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf")
    plan, full = gguf.planned(gguf.Settings(), folder), Path("/dev/full")
    with pytest.raises(RunError, match=r"the disk is full: could not write .*model\.gguf"):
        write_files(plan.layout, plan.rows, tmp_path, Silent(), open_file=lambda path: full.open("wb"))


@pytest.mark.realdata
class TestRealModels:
    OPENING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."

    def test_stories_model_tells_its_story(self, samovar_data: Path, tmp_path: Path) -> None:
        folder = samovar_data / "models" / "stories260K"
        path = export(folder, tmp_path)
        with LlamaModel(path) as model, model.context(512, threads=1) as context:
            prompt = model.tokenize("Once upon a time", add_special=True)
            assert prompt[0] == model.bos
            told = "Once upon a time" + "".join(context.generate_stream(prompt, 60))
        assert told.startswith(self.OPENING)
        found = agreement(folder, path)
        assert found["top1"] == 1.0 and found["kl_mean"] < 1e-6

    def test_character_level_model(self, samovar_data: Path, tmp_path: Path) -> None:
        folder = samovar_data / "models" / "babyllama105"
        path = export(folder, tmp_path)
        with LlamaModel(path) as model, model.context(256, threads=1) as context:
            prompt = model.tokenize("Once upon a time", add_special=True)
            assert len(prompt) == 18  # bos, the space put first, and 16 letters
            told = "Once upon a time" + "".join(context.generate_stream(prompt, 60))
            assert model.tokenize("Ж🚀Ж a") == [3, 0, 3, 5]  # unknown letters run into one unknown token
        assert told.startswith("Once upon a time, there was a little girl named Lily.")
        found = agreement(folder, path)
        assert found["top1"] == 1.0 and found["kl_mean"] < 1e-6


def test_export_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = model_folder(tmp_path / "hf")
    code = (
        "import sys; from pathlib import Path\n"
        "from export import gguf; from foundation.report import Silent\n"
        f"gguf.run(gguf.Settings(), {{'model': Path({str(folder)!r})}}, Path({str(tmp_path)!r}), Silent())\n"
        "assert not {'torch', 'transformers', 'llama_cpp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "gguf" / "model.gguf").is_file()

"""export.imatrix: sums against llama.cpp's own tool and against hidden states; text, resuming, bad input."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import TEXTS, model_folder, sentencepiece_like, write_tokenizer
from reports import StopsAfter, StopsOnceTold

from export import gguf as gguf_stage
from export import imatrix
from foundation import gguf_header
from foundation.dataio import documents
from foundation.errors import InputError, ModelError, StopRequested
from foundation.report import Silent

CONTEXT = 64
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
BY_ITS_TOOL = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1", "--no-ppl"]  # float32 throughout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty documents; some 1,900 tokens of the tokenizer that models here have."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(f"{n} {TEXTS[n % 2].strip()}" for n in range(80)), encoding="utf-8")
    return path


def run(folder: Path, texts: Any, out: Path, report: Silent | None = None, **settings: Any) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    chosen = imatrix.Settings(**{"context_tokens": CONTEXT, **settings})
    return imatrix.run(chosen, {"model": folder, "texts": texts}, out, report or Silent())


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of a file, tensors in its order."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return keys, {t.name: np.array(t.data) for t in reader.tensors}


# ------------------------------------------------------------------------------------ against llama.cpp's tools


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of llama-imatrix and llama-quantize."""
    named = os.environ.get("SAMOVAR_LLAMA_TOOLS")
    if not named or not (Path(named) / "llama-imatrix").is_file():
        pytest.skip("llama.cpp's tools: SAMOVAR_LLAMA_TOOLS names no folder with llama-imatrix")
    return Path(named)


def called(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def exported(folder: Path, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    gguf_stage.run(gguf_stage.Settings(), {"model": folder}, out, Silent())
    return gguf_header.find(out / "gguf")


def compare(folder: Path, text: Path, out: Path, tools: Path, context: int, most: float) -> None:
    """Our file beside its tool's: the same entries, keys, order, shapes and counts; sums up to `most`."""
    run(folder, text, out, context_tokens=context)
    theirs = out / "theirs.gguf"
    model = exported(folder, out)
    called(tools / "llama-imatrix", "-m", model, "-f", text, "-o", theirs, "-c", context, *BY_ITS_TOOL)
    (our_keys, ours), (their_keys, wanted) = read(out / "imatrix.gguf"), read(theirs)
    assert their_keys["imatrix.datasets"] == [str(text)]  # we write no folders
    assert our_keys == their_keys | {"imatrix.datasets": [text.name]}
    assert list(our_keys) == list(their_keys)
    assert [(name, v.shape) for name, v in ours.items()] == [(name, v.shape) for name, v in wanted.items()]
    for name, values in wanted.items():
        np.testing.assert_allclose(ours[name], values, rtol=most if name.endswith(".in_sum2") else 0)


@pytest.mark.parametrize(
    ("kind", "changes", "most"),
    [
        ("llama", {"tie_word_embeddings": True}, 2e-5),
        ("qwen3", {}, 2e-5),
        ("gemma3_text", WINDOWS, 1e-3),  # ggml's GELU is a table in float16
    ],
)
def test_equal_to_its_tool(
    kind: str, changes: dict[str, Any], most: float, text: Path, tmp_path: Path, tools: Path
) -> None:
    compare(model_folder(tmp_path / "model", kind, **changes), text, tmp_path / "out", tools, CONTEXT, most)


def test_equal_to_its_tool_with_a_beginning_token(tmp_path: Path, text: Path, tools: Path) -> None:
    folder = with_bos(tmp_path / "model")
    compare(folder, text, tmp_path / "out", tools, CONTEXT, 5e-5)  # twice as many tokens


@pytest.mark.realdata
@pytest.mark.slow
def test_equal_to_its_tool_on_a_trained_model(samovar_data: Path, tmp_path: Path, tools: Path) -> None:
    tale = samovar_data / "text" / "grimm-en" / "GrimmsFairyTales.txt"
    (tmp_path / "tale.txt").write_text("\n\n".join(islice(documents([tale]), 40)), encoding="utf-8")
    model = samovar_data / "models" / "stories260K"
    compare(model, tmp_path / "tale.txt", tmp_path / "out", tools, 512, 1e-4)


@pytest.mark.slow
def test_its_tools_read_the_file(folder: Path, text: Path, tmp_path: Path, tools: Path) -> None:
    """llama-imatrix passes the sums on as they are; llama-quantize makes what it refuses without."""
    wide = model_folder(tmp_path / "wide", hidden_size=256, intermediate_size=256, head_dim=64)
    run(wide, text, tmp_path / "out")
    ours, passed = tmp_path / "out" / "imatrix.gguf", tmp_path / "passed.gguf"
    called(tools / "llama-imatrix", "-m", exported(wide, tmp_path / "gguf"), "--in-file", ours, "-o", passed)
    for name, values in read(ours)[1].items():
        np.testing.assert_array_equal(read(passed)[1][name], values)
    model, small = gguf_header.find(tmp_path / "gguf" / "gguf"), tmp_path / "small.gguf"
    called(tools / "llama-quantize", "--imatrix", ours, model, small, "IQ2_XS", "1")
    keys, _ = read(small)
    assert keys["quantize.imatrix.dataset"] == text.name
    assert keys["quantize.imatrix.entries_count"] == 21
    assert keys["quantize.imatrix.chunks_count"] == read(ours)[0]["imatrix.chunk_count"]


# ----------------------------------------------------------------------------------------------- what is summed


def test_sums_are_those_of_the_hidden_states(folder: Path, text: Path, tmp_path: Path) -> None:
    """What enters q, k and v is the normalised hidden state, here computed once more in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    run(folder, text, tmp_path, chunks=3)
    chunks = imatrix.read_chunks(folder, 640, [text], CONTEXT, 3)
    assert chunks.shape == (3, CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        states = model(torch.from_numpy(chunks), output_hidden_states=True).hidden_states
    _, found = read(tmp_path / "imatrix.gguf")
    for layer, block in enumerate(model.model.layers):
        x = states[layer].double().numpy().reshape(-1, 64)
        x /= np.sqrt((x**2).mean(1, keepdims=True) + model.config.rms_norm_eps)
        wanted = ((x * block.input_layernorm.weight.detach().numpy()) ** 2).sum(0)
        for part in "qkv":
            np.testing.assert_allclose(found[f"blk.{layer}.attn_{part}.weight.in_sum2"], wanted, rtol=1e-5)
            assert found[f"blk.{layer}.attn_{part}.weight.counts"] == 3 * CONTEXT
    parts = {name.split(".")[2] for name in found}  # and no output.weight, no token_embd.weight
    assert parts == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    assert len(found) == 2 * 7 * 3


def test_half_the_bits_give_nearly_the_same_sums(folder: Path, text: Path, tmp_path: Path) -> None:
    """bfloat16 has 8 bits; squares of it summed in it would stand still after 256 tokens."""
    for precision in ("fp32", "bf16"):
        run(folder, text, tmp_path / precision, chunks=10, precision=precision)
    wanted, found = (read(tmp_path / precision / "imatrix.gguf")[1] for precision in ("fp32", "bf16"))
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name].mean(), values.mean(), rtol=0.02)


def test_the_file_tells_texts_without_folders(folder: Path, text: Path, tmp_path: Path) -> None:
    figures = run(folder, (text, text), tmp_path, chunks=5)
    keys, _ = read(tmp_path / "imatrix.gguf")
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["calibration.txt", "calibration.txt"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": CONTEXT,
    }
    assert figures == {"chunks": 5, "tokens": 5 * CONTEXT, "matrices": 21}


# ----------------------------------------------------------------------------------------------------- the text


def with_bos(folder: Path) -> Path:
    """A model whose tokenizer puts <s> first."""
    from tokenizers import Tokenizer, processors

    model_folder(folder, bos_token_id=1)
    tokenizer = Tokenizer.from_str(sentencepiece_like())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    write_tokenizer(folder, tokenizer.to_str(), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return folder


def test_a_beginning_token_replaces_the_first_of_each_chunk(tmp_path: Path, text: Path) -> None:
    from foundation.tokenizer import Tokenizer

    folder = with_bos(tmp_path)
    whole = [1, *Tokenizer(folder).encode(text.read_text(encoding="utf-8"))]
    chunks = imatrix.read_chunks(folder, 640, [text], CONTEXT, 0)
    assert len(chunks) == len(whole) // CONTEXT > 10
    wanted = np.array(whole[: chunks.size]).reshape(-1, CONTEXT)
    assert (wanted[1:, 0] != 1).all()  # in the text stood something else
    wanted[:, 0] = 1
    np.testing.assert_array_equal(chunks, wanted)


def test_special_tokens_in_the_text_are_letters(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|im_end|>" * 40, encoding="utf-8")
    chunks = imatrix.read_chunks(folder, 640, [tmp_path / "a.txt"], CONTEXT, 0)
    assert 2 not in chunks and 1 not in chunks


def test_a_limit_cuts_every_text(folder: Path, tmp_path: Path) -> None:
    """JSON lines and plain text, documents in turn; what is left of the longer one comes last."""
    from foundation.tokenizer import Tokenizer

    first = [f"первый {n}" for n in range(200)]
    second = [f"second {n}" for n in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in first))
    (tmp_path / "b.txt").write_text("\n\n".join(second))
    texts = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    turns = [text for pair in zip(first, second, strict=False) for text in pair]
    for most, wanted in ((4, turns), (0, turns + first[100:])):
        ids = Tokenizer(folder).encode("\n\n".join(wanted))
        count = min(most or len(ids), len(ids) // CONTEXT)
        chunks = imatrix.read_chunks(folder, 640, texts, CONTEXT, most)
        assert chunks.ravel().tolist() == ids[: count * CONTEXT]


def test_a_chunk_is_no_longer_than_the_models_context(folder: Path, text: Path, tmp_path: Path) -> None:
    run(folder, text, tmp_path, context_tokens=4096)
    assert read(tmp_path / "imatrix.gguf")[0]["imatrix.chunk_size"] == 512


# ----------------------------------------------------------------------------------------------------- resuming


class Killed(Silent):
    """Dies after so many batches, with no chance to save anything."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def progress(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imatrix, "BATCH_TOKENS", 3 * CONTEXT)
    monkeypatch.setattr(imatrix, "SAVED_CHUNKS", 6)


def digest(out: Path) -> bytes:
    return (out / "imatrix.gguf").read_bytes()


def test_goes_on_after_a_stop_to_the_same_bytes(
    folder: Path, text: Path, tmp_path: Path, small_batches: None
) -> None:
    run(folder, text, tmp_path / "whole")
    stopped = StopsOnceTold(3)
    for report in (StopsAfter(0), stopped, StopsAfter(1)):
        with pytest.raises(StopRequested):
            run(folder, text, tmp_path / "stopped", report)
        assert not (tmp_path / "stopped" / "imatrix.gguf").exists()
    assert [done for done, _, _ in stopped.said] == [6, 9, 12]  # 3 were done before
    run(folder, text, tmp_path / "stopped")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


def test_goes_on_after_a_kill_to_the_same_bytes(
    folder: Path, text: Path, tmp_path: Path, small_batches: None
) -> None:
    run(folder, text, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(folder, text, tmp_path / "killed", Killed(5))
    again = StopsOnceTold(-1)
    run(folder, text, tmp_path / "killed", again)
    assert again.said[0][0] == 15  # 12 were saved, 3 are lost
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "other", "names"])
def test_damaged_sums_are_made_again(
    folder: Path, text: Path, tmp_path: Path, small_batches: None, damage: str
) -> None:
    run(folder, text, tmp_path / "whole")
    with pytest.raises(StopRequested):
        run(folder, text, tmp_path / "out", StopsAfter(3))
    saved = tmp_path / "out" / ".work" / "sums.safetensors"
    if damage == "cut":
        saved.write_bytes(saved.read_bytes()[:-100])
    elif damage == "other":
        saved.write_bytes(b"no safetensors")
    else:
        saved.write_bytes(saved.read_bytes().replace(b"blk.1.attn_q", b"blk.7.attn_q"))
    report = Silent()
    run(folder, text, tmp_path / "out", report)
    assert "damaged or of another model" in report.notes[0]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------- bad input


def test_too_little_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("мама мыла раму")
    with pytest.raises(InputError, match=r"short\.txt: \d+ tokens, a chunk is 64") as raised:
        run(folder, tmp_path / "short.txt", tmp_path / "out")
    assert "context_tokens" in (raised.value.hint or "")
    assert not (tmp_path / "out" / "imatrix.gguf").exists()


def test_weights_that_are_no_numbers(text: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = model_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the input of blk\.1\.ffn_down\.weight holds NaN"):
        run(folder, text, tmp_path / "out")
    assert not (tmp_path / "out" / "imatrix.gguf").exists()


def test_a_family_that_is_not_exported(text: Path, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="model_type 'gpt2' is not supported"):
        run(tmp_path, text, tmp_path / "out")

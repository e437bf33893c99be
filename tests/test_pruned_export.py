"""Pruned models ship: cut on disk, exported as they are, and llama.cpp computes what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import export, model_folder

from export import quantize, verify
from export.verify import compare_logits
from export.weights import architectures
from foundation.errors import ModelError
from foundation.gguf_header import read
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.shape import ModelShape
from prune.cut import cut_folder

WINDOW, TOKENS = 48, 240
LLAMA3 = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
CASES: dict[str, tuple[str, dict[str, Any], list[int]]] = {  # family, config, layers that go
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 12}, [2, 4, 9]),
    "gemma3-full-only": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, [0, 1, 2, 3, 4, 6]),
    "gemma3-sliding-only": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, [5]),
    "gemma3-own-scale": (  # as the 27B: 62 layers, whose scale llama.cpp takes from their number
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 62, "head_dim": 24, "query_pre_attn_scalar": 16},
        list(range(3, 59)),
    ),
    "qwen3": ("qwen3", {"num_hidden_layers": 8, "tie_word_embeddings": True}, [1, 2, 6]),
    "qwen2": ("qwen2", {"num_hidden_layers": 8}, [0, 5]),
    "llama3": ("llama", {"num_hidden_layers": 8, "rope_parameters": LLAMA3}, [1, 4, 7]),
    "mistral": ("mistral", {"num_hidden_layers": 8, "sliding_window": None}, [3, 4]),
}


def pruned(name: str, folder: Path) -> Path:
    kind, changes, gone = CASES[name]
    cut_folder(model_folder(folder / "whole", kind, **changes), gone, folder / "cut")
    return folder / "cut"


def agreement(folder: Path, gguf: Path) -> dict[str, Any]:
    ids = np.random.default_rng(5).integers(3, 600, TOKENS).tolist()
    with LlamaModel(gguf) as model:
        return compare_logits(folder, model, [ids])


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_pruned_model(name: str, tmp_path: Path) -> None:
    folder = pruned(name, tmp_path)
    found = agreement(folder, export(folder, tmp_path / "out"))
    print(f"{name}: KL {found['kl_mean']:.2g}, top-1 {found['top1']}")
    assert found["tokens"] == TOKENS > 4 * WINDOW
    assert found["kl_mean"] < 1e-6
    assert found["top1"] == 1.0


def test_the_window_of_each_layer_is_written(tmp_path: Path) -> None:
    """Of twelve layers the sixth and the twelfth see everything; after the cut they are no longer regular."""
    keys, _ = read(export(pruned("gemma3", tmp_path), tmp_path / "out"))
    assert keys["gemma3.block_count"] == 9
    slides = keys["gemma3.attention.sliding_window_pattern"]
    assert [i for i, slide in enumerate(slides) if not slide] == [3, 8]


@pytest.mark.parametrize("fault", ["window", "scale"])
def test_the_gate_sees_what_pruning_can_break(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern by position, as of a model that lost nothing; and an attention scale left to llama.cpp."""
    folder = pruned({"window": "gemma3", "scale": "gemma3-own-scale"}[fault], tmp_path)
    if fault == "window":
        config = json.loads((folder / "config.json").read_text())
        right = ModelShape.from_config(config)
        wrong = ModelShape.from_config({k: v for k, v in config.items() if k != "layer_types"})
        assert right.windows != wrong.windows
        monkeypatch.setattr(
            "export.gguf.describe", lambda writer, shape, target: architectures.describe(writer, wrong, target)
        )
    else:
        monkeypatch.setattr(architectures, "query_factor", lambda shape: 1.0)
    assert agreement(folder, export(folder, tmp_path / "out"))["kl_mean"] > 1e-3


def test_the_whole_way_to_a_verified_quantised_file(tmp_path: Path) -> None:
    folder = pruned("gemma3", tmp_path)
    path = export(folder, tmp_path / "out")
    figures = verify.run(verify.Settings(tokens=64), {"model": folder, "gguf": path}, tmp_path, Silent())
    assert figures["top1"] == 1.0
    quantize.run(quantize.Settings(), {"gguf": path}, tmp_path / "small", Silent())
    assert 1e-6 < agreement(folder, tmp_path / "small" / "gguf" / "q8_0.gguf")["kl_mean"] < 0.1


def test_a_pruned_model_with_a_window_that_llama_cpp_lacks_is_still_refused(tmp_path: Path) -> None:
    """Written out as layer_types, the window of the older rule must not be forgotten."""
    changes = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    source = model_folder(tmp_path / "whole", "qwen3", num_hidden_layers=4, **changes)
    cut_folder(source, [0], tmp_path / "cut")
    with pytest.raises(ModelError, match="sliding windows of 48"):
        export(tmp_path / "cut", tmp_path / "out")
    cut_folder(source, [2, 3], tmp_path / "rest")
    export(tmp_path / "rest", tmp_path / "out")

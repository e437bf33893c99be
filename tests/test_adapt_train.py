"""Models from nothing: their tokenizer, their shape, and that they learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TEXTS, tiny_model

from adaptation import scratch
from foundation.dataio import write_jsonl
from foundation.model import load
from foundation.report import Silent
from foundation.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    write_jsonl(path, ({"text": text} for text in TEXTS))
    return path


def small(**changes: object) -> scratch.Settings:
    return scratch.Settings(
        **{
            "layers": 2, "hidden": 32, "ffn": 64, "heads": 4, "kv_heads": 2, "context_tokens": 64,
            "vocab_tokens": 330, "block_tokens": 32, "steps": 25, "batch_rows": 8, "learning_rate": 1e-2,
            "warmup_steps": 2, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_model_from_nothing(corpus: Path, tmp_path: Path, architecture: str) -> None:
    figures = scratch.run(small(architecture=architecture), {"corpus": (corpus,)}, tmp_path, Silent())
    assert figures["loss"] < 4.0  # a uniform guess over 330 tokens costs 5.8
    model, tokenizer = load(tmp_path / "model"), Tokenizer(tmp_path / "model")
    assert model.config.model_type == architecture
    assert model.config.vocab_size == len(tokenizer) == figures["vocab_tokens"]
    text = "Пилот ёж 🚀 don't 42\n\n  ok"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.boundary_id == tokenizer.id_of("<|endoftext|>")
    assert tokenizer.eos_id == tokenizer.id_of("<|im_end|>")
    for role in ("user", "assistant"):
        assert len(tokenizer.encode_marked(f"<|im_start|>{role}\n")) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": 33}, "multiple of 2 \\* heads"),
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"block_tokens": 65}, "context_tokens = 64"),
        ({"hidden": 10**9}, "less than or equal"),
        ({"vocab_tokens": 10**12}, "less than or equal"),
        ({"adam_betas": (2.0, 0.9)}, "less than 1"),
    ],
)
def test_shapes_that_can_not_be(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


def test_another_models_tokenizer_is_taken_over_byte_by_byte(corpus: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other")
    scratch.run(small(), {"corpus": (corpus,), "tokenizer": other}, tmp_path, Silent())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (other / name).read_bytes()


def test_the_same_seed_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name, seed in {"one": 1, "two": 1, "other": 2}.items():
        (tmp_path / name).mkdir()
        scratch.run(small(seed=seed, steps=3), {"corpus": (corpus,)}, tmp_path / name, Silent())
    weights = {n: (tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("one", "two", "other")}
    assert weights["one"] == weights["two"] != weights["other"]
    config = json.loads((tmp_path / "one" / "model" / "config.json").read_text())
    assert not any(str(value).startswith("/") for value in config.values())  # no path of the machine

"""A small model from nothing: a byte-level BPE tokenizer and a first pre-training.

This is where the quickstart gets its "strong model" from, and the seedling of its student; with a real model
at hand the stage has no use. The tokenizer is trained on the corpus, or taken over from another model so that
both share a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from foundation.chat import CHATML
from foundation.dataio import ROLES, documents
from foundation.files import write_atomic
from foundation.losses import cross_entropy
from foundation.model import create, save
from foundation.ranks import is_main, once
from foundation.report import Report
from foundation.rows import pack
from foundation.stage import Figures, Inputs, many, one
from foundation.tokenizer import Tokenizer
from foundation.tune import TuneSettings, tune

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The pre-tokenizer of Qwen2, because llama.cpp knows it by name: GGUF has no key for a regex.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Settings(TuneSettings):
    """Shape of the model, size of its vocabulary, and how it is trained."""

    architecture: Literal["llama", "qwen3"] = Field("llama", description="model family")
    layers: int = Field(4, ge=1, le=512, description="transformer layers")
    hidden: int = Field(128, ge=8, le=2**16, description="hidden size")
    ffn: int = Field(384, ge=8, le=2**18, description="hidden size of the feed-forward network")
    heads: int = Field(4, ge=1, le=1024, description="attention heads")
    kv_heads: int = Field(2, ge=1, le=1024, description="key and value heads (grouped-query attention)")
    context_tokens: int = Field(256, ge=16, description="longest sequence the model is made for")
    tied: bool = Field(True, description="input embeddings serve as LM head")
    vocab_tokens: int = Field(
        512, ge=260, le=2**20, description="size of a newly trained vocabulary, special tokens included"
    )
    block_tokens: int = Field(128, ge=8, description="tokens in one row of training text")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Settings:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden = {self.hidden} must be a multiple of 2 * heads = {2 * self.heads} (rotary)"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}")
        if self.block_tokens > self.context_tokens:
            raise ValueError(f"block_tokens = {self.block_tokens}, but context_tokens = {self.context_tokens}")
        return self


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Train a tokenizer unless one is given, then a model; writes out/model."""
    corpus, work = many(inputs, "corpus"), out / ".work"
    if "tokenizer" in inputs:
        folder = one(inputs, "tokenizer")
    else:
        folder = work / "tokenizer"
        once(
            (folder / "tokenizer_config.json").is_file,
            lambda: train_tokenizer(documents(corpus), settings.vocab_tokens, settings.context_tokens, folder),
        )
    tokenizer = Tokenizer(folder)
    if "tokenizer" not in inputs and len(tokenizer) < settings.vocab_tokens:
        report.note(f"the corpus supports a vocabulary of {len(tokenizer)} tokens, not {settings.vocab_tokens}")
    rows = pack(documents(corpus), tokenizer, settings.block_tokens, work)
    model = create(_config(settings, tokenizer), settings.seed)
    figures = tune(model, rows, cross_entropy, settings, work, report, pad_id=tokenizer.pad_id)
    if is_main():
        save(model, folder, out / "model")
    return {**figures, "parameters": model.num_parameters(), "vocab_tokens": len(tokenizer)}


def train_tokenizer(texts: Iterable[str], vocab_tokens: int, context_tokens: int, out: Path) -> None:
    """Byte-level BPE with ChatML's special tokens, as a folder that transformers can load."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    out.mkdir(parents=True, exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_tokens,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Every conversation spells the roles, no corpus does: without this they cost seven tokens a turn.
    backend.train_from_iterator(chain(texts, ROLES * 500), trainer)
    backend.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
    }
    # Last and whole: a resumed stage takes this file as the sign that the tokenizer is finished.
    write_atomic(out / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "model_type": settings.architecture,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": settings.layers,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.ffn,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.hidden // settings.heads,
        "max_position_embeddings": settings.context_tokens,
        "tie_word_embeddings": settings.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }

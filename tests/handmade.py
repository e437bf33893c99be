"""Random models and freshly trained tokenizers for the export tests: every family, every odd shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from export import gguf
from export.tokenizer.pretokenizers import GPT2, QWEN2
from foundation.gguf_header import find
from foundation.report import Silent
from foundation.shape import ModelShape

TEXTS = (
    "Мама мыла раму, а кот спал на ковре. Привет, как дела сегодня?\n",
    "The cat sat on the mat, and I'll be there at 12345 o'clock!\n",
    "Ёжик нашёл 3 гриба; hello мир, hello world.\n\n    indented text\n",
    "Сло́во, ударе́ние, сло́во; हिन्दी भाषा हिन्दी\n",  # marks that stay apart from their letters
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def byte_level(expressions: tuple[str, ...] = (QWEN2,), nfc: bool = True) -> str:
    """tokenizer.json of a byte-level BPE of 600 tokens, cut by `expressions`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if e == r"\p{N}"
        else pre_tokenizers.Split(Regex(e), "isolated")
        for e in expressions
        if e != GPT2
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in expressions))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 30, trainer)
    return tokenizer.to_str()


def sentencepiece_like(normalized_added: bool = False) -> str:
    """tokenizer.json of a BPE with byte fallback, a space put first, every merge listed."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pieces = ["▁м", "ма", "▁ма", "ра", "▁hel", "lo", "el", "▁h", "▁hello", "мир", "ми", "▁мир", "ма▁"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for text in [*sorted({c for t in (*TEXTS, *pieces) for c in t} | {"▁"}), *pieces]:
        vocab.setdefault(text, len(vocab))
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if normalized_added:
        tokenizer.add_tokens([AddedToken("слово", normalized=True)])
    return tokenizer.to_str()


def write_tokenizer(folder: Path, text: str, **config: Any) -> Path:
    """A folder with tokenizer.json, its configuration and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def model_folder(
    folder: Path, kind: str = "llama", *, seed: int = 0, dtype: str = "float32", **changes: Any
) -> Path:
    """A random model of 3 layers, 640 rows, with a byte-level tokenizer of 600 tokens.

    Weights are large enough to make attention sharp: with the usual initialisation a wrong rotary
    embedding would hardly show.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if kind == "qwen2" else 24,
        "vocab_size": 640,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": 0,
    } | changes
    shards = config.pop("shards", "1GB")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    one = 0 if kind == "gemma3_text" else 1  # Gemma multiplies by 1 + weight
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else one + 0.3 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    return write_tokenizer(folder, byte_level())


def empty_model(folder: Path) -> Path:
    """A Llama whose weights are all zero, made without torch: for what does not depend on them."""
    import numpy as np
    from safetensors.numpy import save_file

    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 640,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    write_tokenizer(folder, byte_level())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = ModelShape.from_config(config).tensors()
    save_file(
        {name: np.zeros(size, np.float32) for name, size in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def export(folder: Path, out: Path, **settings: Any) -> Path:
    """The GGUF file of a folder, or its first shard."""
    out.mkdir(parents=True, exist_ok=True)
    gguf.run(gguf.Settings(**settings), {"model": folder}, out, Silent())
    shutil.rmtree(out / ".work")  # as the runner does
    return find(out / "gguf")


def texts_file(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """A corpus file."""
    path.write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8"
    )
    return path

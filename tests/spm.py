"""A tokenizer.json of a SentencePiece BPE model, as transformers' converter makes it, without protobuf."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
INST = (  # Mistral v0.3's way: specials side by side, and text behind them with a space and without
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def convert(model_file: Path, folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json: Llama's legacy form, <s> first, every split a merge.

    All that stands before the byte pieces is a control token.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    first_byte, last_byte = pieces.index("<0x00>"), pieces.index("<0xFF>")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    splits = [
        (-model.get_score(i), -cut, piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces[last_byte + 1 :], start=last_byte + 1)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    start, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece} | FLAGS for i, piece in enumerate(pieces[:first_byte])],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, _, left, right in sorted(splits)],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(i): {"content": piece} | FLAGS for i, piece in enumerate(pieces[:first_byte])
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def metaspace(folder: Path, scheme: str = "first", template: str | None = None, split: bool = False) -> Path:
    """Change tokenizer.json as transformers 5 saves a LlamaTokenizer: no normalizer, Metaspace."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    content |= {"normalizer": None, "pre_tokenizer": space}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def train(
    texts: Iterable[str], folder: Path, *, pieces: int, gemma: bool = False, control: Sequence[str] = ()
) -> Path:
    """A small model of bytes and `pieces` in all, with its tokenizer.json: in Llama's form, or in Gemma's.

    Gemma's puts no space before a text, and its control tokens have other ids; `control`: more of those.
    """
    from sentencepiece import SentencePieceTrainer

    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        minloglevel=2,
        control_symbols=list(control),
        **({"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    convert(folder / "tokenizer.model", folder)
    if gemma:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["normalizer"] = content["normalizer"]["normalizers"][1]
        content["decoder"]["decoders"].pop()
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))
    return folder

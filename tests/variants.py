"""Random models as this project makes them, for the proofs of the export: plain, pruned, extended, propagated.

The tokenizers are trained on English: byte-level, SentencePiece in Llama's form, and in Gemma's; the extension
adds Russian words. Propagation takes the plain model as the base, the extended one as its adapted descendant,
and a copy with other weights as the instruct model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import spm
from handmade import CHAT_TEMPLATE, model_folder

from foundation.dataio import write_jsonl
from foundation.report import Silent

VARIANTS = ("plain", "pruned", "extended", "propagated")
WINDOW = 128
LLAMA3_ROPE = {
    "rope_theta": 10_000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {  # -> family, tokenizer, config
    "llama": ("llama", "bytes", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", "sentencepiece", {"sliding_window": None}),
    "qwen2": ("qwen2", "bytes", {}),
    "qwen3": ("qwen3", "bytes", {"tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        "gemma",
        {"query_pre_attn_scalar": 24, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
}
LAYERS, REMOVED = 8, (2, 4)  # of Gemma's layers the sixth sees everything: after the cut the fourth
PIECES, ADDED = 1500, 150
DRIFT = 0.1  # of the instruct model's weights, relative to their deviation


class Variants:
    """The models, made when they are asked for. `tokenizers`: folders to use instead of trained ones."""

    def __init__(
        self,
        folder: Path,
        russian: Sequence[str],
        english: Sequence[str],
        tokenizers: dict[str, Path] | None = None,
    ) -> None:
        self._folder, self._english, self._tokenizers = folder, english, tokenizers or {}
        self._corpus = folder / "russian.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(self._corpus, [{"text": line} for line in russian])

    def folder(self, architecture: str, variant: str) -> Path:
        """The Hugging Face folder of a model."""
        place = self._folder / architecture / variant
        done = place / "model" / "config.json"
        if not done.is_file():
            shutil.rmtree(place, ignore_errors=True)
            getattr(self, f"_{variant}")(architecture, place)
        return done.parent

    def _plain(self, architecture: str, out: Path) -> None:
        family, kind, changes = ARCHITECTURES[architecture]
        tokenizer = self._tokenizer(kind)
        size = {"num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
        made = model_folder(out / "part", family, **(size | ids_of(tokenizer) | changes))
        shutil.copytree(tokenizer, made, dirs_exist_ok=True)
        made.rename(out / "model")

    def _pruned(self, architecture: str, out: Path) -> None:
        from prune.cut import cut_folder

        cut_folder(self.folder(architecture, "plain"), REMOVED, out / "model")

    def _extended(self, architecture: str, out: Path) -> None:
        from adaptation import embeddings

        extended = self._extended_tokenizer(ARCHITECTURES[architecture][1])
        inputs = {"model": self.folder(architecture, "plain"), "tokenizer": extended}
        out.mkdir(parents=True)
        embeddings.run(embeddings.Settings(), inputs, out, Silent())

    def _propagated(self, architecture: str, out: Path) -> None:
        from adaptation import propagate

        plain = self.folder(architecture, "plain")
        drifted(plain, out / "instruct")
        inputs = {"base": plain, "adapted": self.folder(architecture, "extended"), "instruct": out / "instruct"}
        propagate.run(propagate.Settings(), inputs, out, Silent())

    def _tokenizer(self, kind: str) -> Path:
        if kind in self._tokenizers:
            return self._tokenizers[kind]
        folder = self._folder / f"tokenizer-{kind}"
        if not folder.is_dir():
            if kind == "bytes":
                from adaptation.scratch import train_tokenizer

                train_tokenizer(self._english, PIECES, 2048, folder)
            else:
                spm.train(self._english, folder, pieces=PIECES, gemma=kind == "gemma")
                (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        return folder

    def _extended_tokenizer(self, kind: str) -> Path:
        from adaptation.vocabulary import Settings, run

        out = self._folder / f"extended-{kind}"
        if not (out / "tokenizer").is_dir():
            base = self._tokenizer(kind)
            settings = Settings(trainer="bpe", pieces=4 * ADDED, add_tokens=ADDED)
            run(settings, {"model": base, "corpus": (self._corpus,)}, out, Silent())
        return out / "tokenizer"


def ids_of(tokenizer: Path) -> dict[str, Any]:
    """What config.json says of a tokenizer, with some rows that no token has."""
    from foundation.tokenizer import Tokenizer

    found = Tokenizer(tokenizer)
    names = {role: found.config.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    ids = {f"{role}_token_id": found.id_of(name) if name else None for role, name in names.items()}
    return {"vocab_size": len(found) + 5, **ids}


def drifted(folder: Path, out: Path) -> None:
    """A copy with noise on every weight, as further training leaves it."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    draw = np.random.default_rng(1)
    weights = load_file(out / "model.safetensors")
    for name in sorted(weights):
        noise = draw.standard_normal(weights[name].shape, np.float32)
        weights[name] += np.float32(DRIFT) * weights[name].std() * noise
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def parity(folder: Path, gguf: Path, lines: Sequence[str], positions: int) -> dict[str, Any]:
    """A GGUF file against transformers, in this process: logits, tokenisation and special ids.

    `positions`: so many at least lie past the sliding window.
    """
    from export.parity.original import load_tokenizer
    from export.verify import compare_ids, compare_logits, compare_texts, sample_ids
    from foundation.llama import LlamaModel
    from foundation.shape import ModelShape

    tokenizer, shape = load_tokenizer(folder), ModelShape.from_folder(folder)
    windows = sample_ids(tokenizer, lines, SimpleNamespace(tokens=positions, seed=0), shape)
    slide = max((window for window in shape.windows if window), default=0)
    with LlamaModel(gguf) as model:
        return {
            "positions_past_window": sum(max(0, len(ids) - slide) for ids in windows),
            "logits": compare_logits(folder, model, windows),
            "tokenisation": compare_texts(tokenizer, model, lines, seed=0),
            "ids": compare_ids(tokenizer, model, folder),
            "added_tokens": len(tokenizer.added_tokens_decoder),
        }


def lines(count: int, data: Path | None) -> tuple[list[str], list[str]]:
    """`count` lines of Russian and as many of English: real ones from `data`, else of the flight-crew world."""
    russian, english = _real(data) if data else (_world("ru", count), _world("en", count))
    found = list(islice(russian, count)), list(islice(english, count))
    if min(map(len, found)) < count:
        raise ValueError(f"{len(found[0])} Russian and {len(found[1])} English lines, {count} asked for")
    return found


def _real(data: Path) -> tuple[Iterator[str], Iterator[str]]:
    text = data / "text"
    stories = (
        json.loads(row)["story"]
        for file in sorted((text / "tinystories-ru").glob("*.jsonl"))
        for row in file.read_text(encoding="utf-8").splitlines()
    )
    tales = (text / "grimm-en" / "GrimmsFairyTales.txt").read_text(encoding="utf-8").splitlines()
    pairs = (text / "tatoeba-en-ru" / "tatoeba.rus-eng.eng").read_text(encoding="utf-8").splitlines()
    russian = (line for story in stories for line in story.splitlines())
    return filter(str.strip, russian), filter(str.strip, chain(pairs, tales))


def _world(language: str, count: int) -> Iterator[str]:
    from corpora.world.profiles import every_profile, split
    from corpora.world.text import documents

    train, _ = split(every_profile(), 200, 17)
    texts = documents(language, count, Random(17), train)
    return filter(str.strip, (line for text in texts for line in text.splitlines()))

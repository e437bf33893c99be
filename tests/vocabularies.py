"""Small bases of both families, Russian lines, what the stage makes of them, and llama.cpp's rule."""

from __future__ import annotations

import heapq
import json
import random
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from adaptation.merges import by_token, learn
from adaptation.scratch import train_tokenizer
from adaptation.tokenizer_json import TokenizerJson
from adaptation.vocabulary import Settings, run
from foundation.dataio import write_jsonl
from foundation.report import Silent

RUSSIAN = "[ А-Яа-яЁё]+"
ENGLISH = [
    "The pilot lifts the barbell and rests.",
    "A squat trains the legs; the crew runs in the hangar.",
] * 30
NOUNS = ["пилот", "экипаж", "штурман", "стюардесса", "командир", "ёж", "самолёт", "ангар", "тренер", "штанга"]
VERBS = ["отдыхает", "поднимает", "видит", "ждёт", "тренирует", "бережёт", "подъезжает", "объясняет"]
PLACES = ["утром", "вечером", "дома", "в зале", "на поле", "после рейса", "перед вылетом", "у ангара"]


def russian_lines(count: int = 400) -> list[str]:
    dice = random.Random(5)
    return [
        f"{dice.choice(NOUNS).capitalize()} {dice.choice(VERBS)} {dice.choice(PLACES)} {dice.choice(NOUNS)}."
        for _ in range(count)
    ]


def byte_base(folder: Path) -> Path:
    """English byte-level BPE; control tokens below, and one above the other tokens, as in Qwen."""
    train_tokenizer(ENGLISH, 320, 128, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|late|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def characters_base(folder: Path) -> Path:
    """SentencePiece's family as in Llama 2: bytes, the characters of `ENGLISH`, all splits as merges."""
    words = sorted({"▁" + word for line in ENGLISH for word in line.split()})
    characters = sorted(set("".join(words)) | set(string.ascii_letters))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {token: i for i, token in enumerate(tokens)}
    learnt = learn([(list(word), len(word)) for word in words], {}, by_token, lambda token: (len(token), token))
    merges = []
    for token in dict.fromkeys(left + right for left, right in learnt):
        vocab[token] = len(vocab)
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [list(cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    special = [{"id": i, "content": token, "special": True} for i, token in enumerate(tokens[:3])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content = {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class Made:
    """A base and what the stage makes of it."""

    def __init__(self, folder: Path, base: Path, lines: list[str] | None = None, **changes: Any) -> None:
        corpus = folder / "ru.jsonl"
        write_jsonl(corpus, [{"text": line} for line in lines or russian_lines()])
        self.out, self.report = folder / "out", Silent()
        added = {} if changes.get("mode") == "substitution" else {"add_tokens": 40}
        chosen: dict[str, Any] = {"pieces": 300} | added | changes
        self.figures = run(Settings(**chosen), {"model": base, "corpus": (corpus,)}, self.out, self.report)
        self.base, self.new = TokenizerJson.read(base), TokenizerJson.read(self.out / "tokenizer")
        self.before, self.after = self.base.backend(), self.new.backend()


def llama_spm(text: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[str]:
    """llama.cpp's SPM tokenizer: any two neighbours that make a token, by score, then by place.

    A token's score is minus its lowest merge rank, as the exporter writes it; tokens without a merge never
    form.
    """
    score: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        score.setdefault(left + right, -rank)
    symbols = list("▁" + text.replace(" ", "▁"))
    left = list(range(-1, len(symbols) - 1))
    right = [*range(1, len(symbols)), -1]
    queue: list[tuple[int, int, int, str]] = []

    def offer(i: int, j: int) -> None:
        if i >= 0 and j >= 0 and symbols[i] + symbols[j] in score:
            heapq.heappush(queue, (-score[symbols[i] + symbols[j]], i, j, symbols[i] + symbols[j]))

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while queue:
        _, i, j, joined = heapq.heappop(queue)
        if not symbols[i] or not symbols[j] or symbols[i] + symbols[j] != joined:
            continue
        symbols[i], symbols[j] = joined, ""
        right[i] = right[j]
        if right[j] >= 0:
            left[right[j]] = i
        offer(left[i], i)
        offer(i, right[i])
    out = []
    for symbol in filter(None, symbols):
        out += [symbol] if symbol in vocab else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return out


def stories(data: Path, folder: Path, files: int) -> Path:
    path = folder / "ru.jsonl"
    found = sorted((data / "text" / "tinystories-ru").glob("*.jsonl"))[:files]
    texts = [json.loads(line)["story"] for file in found for line in file.read_text().splitlines()]
    write_jsonl(path, [{"text": text} for text in texts])
    return path

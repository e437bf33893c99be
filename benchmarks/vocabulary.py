"""New vocabularies for real tokenizers: what Russian costs before and after, and what English does.

Qwen2.5's tokenizer (byte-level, 151,665 tokens) and Mistral v3's (SentencePiece, 32,768) learn from Russian
stories; two FILES of stories, and no story that stands in them, are kept from learning and measured on. Each
cell is built by the stage in a child process, so that time and peak memory are its own; other work on the
machine adds to the time by the clock. Then: tokens per word on the held-out stories, English token for token,
every word taken one token, encode and decode on 10,000 lines and on random Unicode. A finished cell is kept:
the script goes on where it was stopped.

    nice python benchmarks/vocabulary.py

Needs the folder named by SAMOVAR_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from spm import convert  # noqa: E402

from adaptation.candidates import Candidate, propose  # noqa: E402
from adaptation.sample import draw, lines_of  # noqa: E402
from adaptation.tokenizer_json import TokenizerJson, from_byte_level  # noqa: E402
from adaptation.vocabulary import Settings, run  # noqa: E402
from adaptation.words import select  # noqa: E402
from foundation.dataio import documents, write_jsonl  # noqa: E402
from foundation.errors import InputError  # noqa: E402
from foundation.files import read_json, write_json  # noqa: E402
from foundation.report import Silent  # noqa: E402
from foundation.rundir import machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "vocabulary.json"
HELD = ("1b5a9beb", "b85fdb79")  # files, by the start of their names
WIDE = 60_000  # pieces of BPE, which has as many as there are words
ROUND_TRIPS = 10_000  # lines
FUZZ = 5_000  # random texts
BARS = {"tokens_per_word": 1.75, "tokens_added": 16_000, "build_seconds": 300, "peak_bytes": 4e9}
BAR_CELL = "qwen, extension, unigram, 16000 tokens in all"

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"qwen, extension, unigram, {n}": ("qwen", {"add_tokens": n}) for n in (4000, 8000, 16_000, 32_000)},
    BAR_CELL: ("qwen", {}),
    "qwen, optimised, unigram, 16000": ("qwen", {"mode": "optimised", "add_tokens": 16_000}),
    "qwen, substitution, unigram, 16000": ("qwen", {"mode": "substitution", "vocab_tokens": 16_000}),
    "mistral, extension, unigram, 16000": ("mistral", {"add_tokens": 16_000}),
    **{
        f"qwen, extension, bpe, {n}": ("qwen", {"add_tokens": n, "trainer": "bpe", "pieces": WIDE})
        for n in (4000, 8000, 16_000, 32_000)
    },
    "qwen, substitution, bpe, 16000": (
        "qwen",
        {"mode": "substitution", "vocab_tokens": 16_000, "trainer": "bpe", "pieces": WIDE},
    ),
    "mistral, substitution, unigram, 16000": ("mistral", {"mode": "substitution", "vocab_tokens": 16_000}),
    "mistral, optimised, unigram, 16000": ("mistral", {"mode": "optimised", "add_tokens": 16_000}),
    "mistral, extension, bpe, 16000": ("mistral", {"add_tokens": 16_000, "trainer": "bpe", "pieces": WIDE}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "vocabulary")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # base, settings, folder
    options = parser.parse_args()
    if options.child:
        return child(options.out, *options.child)
    data = Path(os.environ.get("SAMOVAR_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "tokenizers" / "qwen2.5").is_dir():
        print(f"skipped: {data / 'tokenizers' / 'qwen2.5'} is not there; set SAMOVAR_DATA", file=sys.stderr)
        return 0
    corpus = prepare(data, options.out)
    bench = Bench(options.out, (data / "text" / "grimm-en" / "GrimmsFairyTales.txt").read_text("utf-8"))
    cells: dict[str, Any] = {}
    for name, (base, settings) in CELLS.items():
        chosen = settings | ({"add_tokens": in_all(cells)} if name == BAR_CELL else {})
        cells[name] = bench.cell(name, base, chosen)
        write_json(
            RESULT, {"machine": machine(), "corpus": corpus, "cells": cells, "bars": BARS, "kept": kept(cells)}
        )
    print(json.dumps(kept(cells), indent=1))
    return 0 if all(kept(cells).values()) else 1


def kept(cells: dict[str, Any]) -> dict[str, bool]:
    """Which of the bars are kept, once their cell is there."""
    if BAR_CELL not in cells:
        return {}
    bar = cells[BAR_CELL]
    return {
        "tokens per word": bar["after"]["russian"]["tokens_per_word"] < BARS["tokens_per_word"],
        "tokens added in all": bar["figures"]["tokens_added"] <= BARS["tokens_added"],
        "English unchanged": bar["english_unchanged"],
        "every word one token": bar["words_whole"] == bar["figures"]["words_added"],
        "round trips": not bar["round_trips_failed"],
        "build time": bar["build_seconds"] <= BARS["build_seconds"],
        "memory": bar["peak_bytes"] <= BARS["peak_bytes"],
    }


def in_all(cells: dict[str, Any]) -> int:
    """Words of which, with the tokens on their way, about the allowed number of tokens come, and no more.

    Between two cells tokens grow slower than words do, so a straight line from the smaller one errs below.
    """
    few, many = (cells[f"qwen, extension, unigram, {n}"]["figures"] for n in (8000, 16_000))
    slope = (many["words_added"] - few["words_added"]) / (many["tokens_added"] - few["tokens_added"])
    return int(few["words_added"] + 0.98 * slope * (BARS["tokens_added"] - few["tokens_added"]))


def prepare(data: Path, out: Path) -> dict[str, Any]:
    """Write the two bases and train and held-out stories below `out`; says what is in them."""
    from transformers import AutoTokenizer

    if not (out / "qwen" / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2.5").save_pretrained(out / "qwen")
    convert(data / "tokenizers" / "mistral-v3" / "tokenizer.model", out / "mistral")
    stories: dict[bool, list[str]] = {True: [], False: []}
    for file in sorted((data / "text" / "tinystories-ru").glob("*.jsonl")):
        found = [json.loads(line)["story"] for line in file.read_text("utf-8").splitlines()]
        stories[file.name.startswith(HELD)] += found
    held = set(stories[True])
    train = [story for story in stories[False] if story not in held]
    write_jsonl(out / "train.jsonl", ({"text": story} for story in train))
    write_jsonl(out / "held.jsonl", ({"text": story} for story in stories[True]))
    return {
        "stories": len(train),
        "characters": sum(map(len, train)),
        "held_stories": len(held),
        "held_characters": sum(map(len, held)),
        "left_out_as_held": len(stories[False]) - len(train),
    }


def child(out: Path, base: str, settings: str, folder: str) -> int:
    """One start of the stage, with its time and peak memory."""
    start, report = time.monotonic(), Silent()
    found: dict[str, Any] = {}
    try:
        inputs = {"model": out / base, "corpus": (out / "train.jsonl",)}
        found["figures"] = run(Settings(**json.loads(settings)), inputs, Path(folder), report)
    except InputError as error:
        found["refused"] = str(error)
    found |= {
        "build_seconds": round(time.monotonic() - start, 2),
        "processor_seconds": round(time.process_time(), 2),
        "peak_bytes": peak_bytes(),
        "notes": report.notes,
    }
    write_json(Path(folder) / "child.json", found)
    return 0


def peak_bytes() -> int:
    """Largest resident memory of this program: getrusage would count what it was forked from as well."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


class Bench:
    """The cells, kept below `out`, and the texts that they are measured on."""

    def __init__(self, out: Path, english: str) -> None:
        self.out = out
        self.english = list(lines_of([english]))
        self.russian = list(lines_of(documents([out / "held.jsonl"])))
        self.stories = list(documents([out / "held.jsonl"]))
        self.learnt = list(lines_of(documents([out / "train.jsonl"])))
        self._costs: dict[Path, dict[str, Any]] = {}
        self._candidates: dict[tuple[str, int], list[Candidate]] = {}
        self._bases: dict[Path, TokenizerJson] = {}

    def cell(self, name: str, base: str, settings: dict[str, Any]) -> dict[str, Any]:
        folder = self.out / "cells" / name.replace(", ", "-").replace(" ", "_")
        kept = read_json(folder / "cell.json")
        if kept:
            return kept
        folder.mkdir(parents=True, exist_ok=True)
        told = [str(self.out), "--child", base, json.dumps(settings), str(folder)]
        if not (folder / "child.json").is_file():
            subprocess.run([sys.executable, __file__, "--out", *told], cwd=ROOT, check=True)
        found = {"base": base, "settings": settings} | read_json(folder / "child.json")
        if "refused" not in found:
            found |= self.measured(self.out / base, folder / "tokenizer", Settings(**settings))
        write_json(folder / "cell.json", found)
        said = found.get("refused") or [
            found[when]["russian"]["tokens_per_word"] for when in ("before", "after")
        ]
        print(f"{name}: {said}, {found['build_seconds']} s, {found['peak_bytes'] / 1e6:.0f} MB", flush=True)
        return found

    def measured(self, base: Path, made: Path, settings: Settings) -> dict[str, Any]:
        if base not in self._bases:
            self._bases[base] = TokenizerJson.read(base)
            self._costs[base] = self.costs(self._bases[base].backend())
        old, new = self._bases[base], TokenizerJson.read(made)
        before, after = old.backend(), new.backend()
        found: dict[str, Any] = {"before": self._costs[base], "after": self.costs(after)}
        english = "\n".join(self.english)
        found["english_unchanged"] = bool(
            before.encode(english, add_special_tokens=False).ids
            == after.encode(english, add_special_tokens=False).ids
        )
        found["vocab_tokens"] = new.size
        if settings.mode == "extension":
            found["words_whole"] = sum(whole(new, after, word) for word in self.taken(old, settings))
        texts = [*self.russian, *self.learnt][: ROUND_TRIPS - 2000] + self.english[:2000]
        composed = (old.content["normalizer"] or {}).get("type") == "NFC"
        failed = [
            text
            for text in [*texts, *fuzz()]
            if decoded(after, text) != (unicodedata.normalize("NFC", text) if composed else text)
        ]
        same = [text for text in failed if decoded(before, text) == decoded(after, text)]
        found |= {
            "round_trips": len(texts) + FUZZ,
            "round_trips_failed": len(failed),
            "of_them_alike_under_the_base": len(same),  # SentencePiece's decoder drops what it drops
        }
        return found

    def costs(self, backend: Any) -> dict[str, Any]:
        return {
            "russian": cost(backend, self.russian),
            "english": cost(backend, self.english),
            "stories": cost(backend, self.stories),
        }

    def taken(self, base: TokenizerJson, settings: Settings) -> Iterable[str]:
        """The words that the stage chose, chosen again."""
        named = settings.trainer, settings.pieces
        if named not in self._candidates:
            files = {"": lines_of(documents([self.out / "train.jsonl"]))}
            sample = draw(files, settings.sample_lines, settings.seed)
            self._candidates[named] = propose(sample.train, settings.pieces, settings.trainer, Silent())
        return select(self._candidates[named], base, settings.script, settings.add_tokens, Silent()).taken


def cost(backend: Any, lines: list[str]) -> dict[str, float]:
    """Tokens per word (by white space) and characters per token, each text by itself."""
    tokens = sum(len(encoding.ids) for encoding in backend.encode_batch(lines, add_special_tokens=False))
    words = sum(len(line.split()) for line in lines)
    return {
        "tokens_per_word": tokens / words,
        "characters_per_token": sum(map(len, lines)) / tokens,
        "words": words,
    }


def whole(tokenizer: TokenizerJson, backend: Any, word: str) -> bool:
    """True when `word` is one token: as a chunk of merges, and in byte-level BPE as a text of its own too."""
    alone = [token.value for token in backend.model.tokenize(word)] == [word]
    if tokenizer.family == "characters":
        return alone
    text = from_byte_level(word).decode("utf-8")
    return alone and backend.encode(text, add_special_tokens=False).tokens == [word]


def decoded(backend: Any, text: str) -> str:
    return backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


def fuzz() -> list[str]:
    """Random texts over all of Unicode but surrogates, half of them with Cyrillic in between."""
    dice, texts = random.Random(23), []
    for number in range(FUZZ):
        chars = []
        for _ in range(dice.randint(1, 40)):
            code = dice.choice(
                [dice.randrange(1, 0x250), dice.randrange(0x400, 0x460), dice.randrange(0x110000)]
            )
            if number % 2:
                code = dice.choice([0x20, dice.randrange(0x410, 0x450), code])
            chars.append(chr(code) if not 0xD800 <= code < 0xE000 else "ѣ")
        texts.append("".join(chars))
    return texts


if __name__ == "__main__":
    sys.exit(main())

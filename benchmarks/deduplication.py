"""Deduplication of a large corpus: memory, speed, and how many planted repeats it finds.

The text is generated: words out of syllables, Russian and English, drawn by Zipf's law into paragraphs of 12 to
120 words, so that no two are alike by chance. A fifth of the paragraphs are copies of an earlier one: to the
letter, in another case and punctuation, or with some of the words replaced, dropped or added. The stage runs in
a process of its own, on one thread, which measures its largest resident memory. Then its output is read beside
the corpus. Recall: the share of copies that went, by their exact Jaccard share with the original, computed here
from sets of strings. Precision: the share of removed paragraphs (of a sample) whose exact share with what they
are said to be like reaches the threshold; and how many went that are no copies.

What was done is kept under --out, so the script goes on where it was stopped.

    python benchmarks/deduplication.py --megabytes 1000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from killing import ROOT, kept

from corpora.deduplicate import Settings, run
from foundation.dataio import documents
from foundation.memory import peak_memory_bytes
from foundation.report import Silent

RESULT = ROOT / "benchmarks" / "results" / "deduplication.json"
VOCABULARY = 60_000  # words of each language
POOL = 20_000  # originals that may be copied
SHARE = 0.2  # of paragraphs that are copies
EDITS = (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.25)  # share of words changed, by which J goes from 1 to about 0.4
BANDS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
JUDGED = 40_000  # copies, and as many removed paragraphs, whose exact share is computed
SYLLABLES = {
    "ru": "ба ве го да жи за ка ле мо на по ра се ти ук фо це ша щи эл ют ян об ост при пре ски ный ова ет",
    "en": "ba ve go da ji za ka le mo na po ra se ti uk fo ce sha th el ut an ob ost pri pre ing ed er ion",
}
LIMIT_BYTES = 2_000_000_000


# ------------------------------------------------------------------------------------------------ the corpus


def vocabulary(language: str) -> list[str]:
    """Different words, short ones first as in any language."""
    rng, syllables = random.Random(language), SYLLABLES[language].split()
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        words[
            "".join(rng.choices(syllables, k=1 + min(5, len(words).bit_length() // 4 + rng.randint(0, 1))))
        ] = None
    return list(words)


def originals(rng: np.random.Generator) -> Iterator[list[str]]:
    """Paragraphs as words, without end."""
    vocabularies = [np.array(vocabulary(language), dtype=object) for language in SYLLABLES]
    shares = np.cumsum(1 / (np.arange(VOCABULARY) + 3))
    while True:
        lengths = rng.integers(12, 121, 2000)
        ranks = np.searchsorted(shares, rng.random(lengths.sum()) * shares[-1])
        at = 0
        for number, length in enumerate(lengths):
            yield vocabularies[number % 3 == 2][ranks[at : at + length]].tolist()  # two thirds are Russian
            at += length


def edited(words: list[str], share: float, rng: random.Random) -> list[str]:
    """A copy with about `share` of its words replaced, dropped or doubled elsewhere."""
    copy = list(words)
    for _ in range(max(1, round(share * len(words)))):
        place = rng.randrange(len(copy))
        act = rng.random()
        if act < 0.6:
            copy[place] = rng.choice(words)[::-1]
        elif act < 0.8 and len(copy) > 8:
            del copy[place]
        else:
            copy.insert(place, rng.choice(words))
    return copy


def spelt(words: list[str], rng: random.Random) -> str:
    """Words as sentences."""
    parts, left = [], 0
    for word in words:
        parts.append(word.capitalize() if left == 0 else word)
        left = rng.randint(5, 14) if left == 0 else left - 1
        if left == 0:
            parts[-1] += "."
        elif rng.random() < 0.1:
            parts[-1] += ","
    return " ".join(parts)


def generate(folder: Path, megabytes: int) -> dict[str, Any]:
    """Write corpus.jsonl and planted.npy: (copy, original) as numbers of paragraphs without the headings."""
    rng = random.Random(17)
    source = originals(np.random.default_rng(17))
    pool: list[tuple[int, list[str]]] = []
    planted: list[tuple[int, int]] = []
    number = document = size = 0
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            paragraphs = [f"No {document}"]  # too short to go: the document is known by it afterwards
            for _ in range(rng.randint(2, 14)):
                if len(pool) > 100 and rng.random() < SHARE:
                    first, words = rng.choice(pool)
                    share = rng.choice(EDITS)
                    words = edited(words, share, rng) if share else words
                    planted.append((number, first))
                else:
                    words = next(source)
                    if len(pool) < POOL:
                        pool.append((number, words))
                    elif rng.random() < 0.1:
                        pool[rng.randrange(POOL)] = (number, words)
                paragraphs.append(spelt(words, rng))
                number += 1
            text = "\n".join(paragraphs)
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            document += 1
    np.save(folder / "planted.npy", np.array(planted, np.int64))
    return {"text_bytes": size, "documents": document, "paragraphs": number, "copies": len(planted)}


# ----------------------------------------------------------------------------------------------- the stage


class Watch(Silent):
    """Says how far it is, and takes the time of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.seconds[unit] = time.monotonic() - self.began
        print(f"  {done} of {total} {unit}, {self.seconds[unit]:.0f} s", file=sys.stderr, flush=True)


def child(folder: Path) -> None:
    """The stage; its measures go to the standard output."""
    report, start = Watch(), os.times()
    out = folder / "out"
    out.mkdir(exist_ok=True)
    settings = Settings(listed=JUDGED)
    figures = run(settings, {"corpus": (folder / "corpus.jsonl",)}, out, report)
    end = os.times()
    measures = {
        "wall_seconds": time.monotonic() - report.began,
        "cpu_seconds": end.user + end.system - start.user - start.system,
        "peak_memory_bytes": peak_memory_bytes(),
        "work_bytes": sum(path.stat().st_size for path in (out / ".work").iterdir()),
        "seconds_until_end_of": report.seconds,
        "settings": settings.model_dump(),
        "figures": figures,
    }
    print(json.dumps(measures))


def measured(folder: Path) -> dict[str, Any]:
    """The stage from nothing, in a process of its own."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, __file__, "--child", "--out", str(folder)]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
    ended = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


# ---------------------------------------------------------------------------------------------- the verdict


def runs(text: str, length: int) -> set[str]:
    """Shingles the plain way; the text here has nothing but letters, digits, points and commas."""
    form = " ".join(text.casefold().replace(".", " ").replace(",", " ").split())
    return {form[start : start + length] for start in range(len(form) - length + 1)}


def share(one: str, other: str, length: int) -> float:
    first, second = runs(one, length), runs(other, length)
    return len(first & second) / len(first | second)


def removed_numbers(folder: Path) -> np.ndarray:
    """Whether each paragraph went, by reading what is left beside what was.  # [N]"""
    left = documents([folder / "out" / "text.jsonl"])
    gone: list[bool] = []
    at_hand = next(left)
    for text in documents([folder / "corpus.jsonl"]):
        heading, *paragraphs = text.split("\n")
        rest: list[str] = []  # of a document that went whole, with its heading
        if at_hand.split("\n")[0] == heading:
            rest = at_hand.split("\n")[:0:-1]
            at_hand = next(left, "")
        for paragraph in paragraphs:
            stays = bool(rest) and rest[-1] == paragraph
            gone.append(not stays)
            if stays:
                rest.pop()
        if rest:
            raise AssertionError(f"{heading} has more left than it had")
    if at_hand:
        raise AssertionError(f"{at_hand[:80]} stands in no document")
    return np.array(gone)


def paragraphs_of(folder: Path, numbers: set[int]) -> dict[int, str]:
    found, number = {}, 0
    for text in documents([folder / "corpus.jsonl"]):
        for paragraph in text.split("\n")[1:]:
            if number in numbers:
                found[number] = paragraph
            number += 1
    return found


def told_pairs(folder: Path) -> list[tuple[int, int, float]]:
    """(number of a removed paragraph, of the one it is like, similarity) as removed.jsonl tells them."""
    counts = [text.count("\n") for text in documents([folder / "corpus.jsonl"])]
    firsts = np.concatenate([[0], np.cumsum(counts)]).tolist()

    def number(row: dict[str, Any]) -> int:
        return firsts[row["document"] - 1] + row["paragraph"] - 2  # paragraph 1 is the heading

    rows = [json.loads(line) for line in (folder / "out" / "removed.jsonl").open(encoding="utf-8")]
    return [(number(row), number(row["like"]), row["similarity"]) for row in rows]


def judged(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Recall by Jaccard band and precision."""
    gone = removed_numbers(folder)
    planted = np.load(folder / "planted.npy")
    rng = np.random.default_rng(3)
    pairs = planted[np.sort(rng.choice(len(planted), min(JUDGED, len(planted)), replace=False))]
    said = told_pairs(folder)
    texts = paragraphs_of(folder, {*pairs.flatten().tolist(), *(n for a, b, _ in said for n in (a, b))})
    length = settings["shingle_characters"]
    exact = np.array([share(texts[copy], texts[first], length) for copy, first in pairs.tolist()])
    shares = np.array([share(texts[one], texts[other], length) for one, other, _ in said])
    recall = {}
    for low, high in zip(BANDS, (*BANDS[1:], np.inf), strict=True):
        inside = (exact >= low) & (exact < high)
        name = "1" if low == 1 else f"{low:.2f} to {high:.2f}"
        recall[name] = {
            "pairs": int(inside.sum()),
            "removed": float(gone[pairs[inside, 0]].mean()) if inside.any() else None,
        }
    reached = exact >= settings["similarity"]
    copies = np.zeros(len(gone), bool)
    copies[planted[:, 0]] = True
    return {
        "pairs_judged": len(pairs),
        "recall_by_jaccard": recall,
        "recall_at_or_above_threshold": float(gone[pairs[reached, 0]].mean()),
        "removed": int(gone.sum()),
        "removed_that_are_no_copies": int((gone & ~copies).sum()),
        "removed_judged": len(said),
        "precision": float((shares >= settings["similarity"]).mean()),
        "largest_error_of_told_similarity": float(np.abs(shares - [s for _, _, s in said]).max()),
        "kept_is_kept": bool(not gone[[other for _, other, _ in said]].any()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text, in millions of bytes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "deduplication")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.out)
        return 0
    folder = options.out / str(options.megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = kept(folder / "corpus.json", generate, folder, options.megabytes)
    print(f"corpus: {corpus}", flush=True)
    stage = kept(folder / "stage.json", measured, folder)
    print(f"stage: {stage}", flush=True)
    verdict = kept(folder / "verdict.json", judged, folder, stage["settings"])
    print(f"verdict: {verdict}", flush=True)
    bars = {
        "resident memory under 2 GB": stage["peak_memory_bytes"] < LIMIT_BYTES,
        "every judged removal reaches the threshold": verdict["precision"] == 1,
        "copies with the same words all went": verdict["recall_by_jaccard"]["1"]["removed"] == 1,
    }
    result = {
        "megabytes": corpus["text_bytes"] / 1e6,
        "corpus": corpus,
        "stage": stage,
        "megabytes_per_second": corpus["text_bytes"] / 1e6 / stage["wall_seconds"],
        "megabytes_per_cpu_second": corpus["text_bytes"] / 1e6 / stage["cpu_seconds"],
        "verdict": verdict,
        "bars": bars,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(bars.values()) else 1


def processor() -> str:
    """Name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


if __name__ == "__main__":
    sys.exit(main())

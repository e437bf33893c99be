"""kill -9 at random moments of the corpus stages, and again after the resume: are all files the same?

Four stages, in turn: corpora.prepare over files of several kinds and encodings, corpora.deduplicate,
corpora.quality, corpora.filter. Checkpoints come often here, so that kills fall between and into them. How the
killing goes: killing.py.

    python benchmarks/kill_corpora.py --trials 40 --result benchmarks/results/kill_corpora.json
"""

from __future__ import annotations

import gzip
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from killing import Victim, counted_words, digests, main, words_told

KINDS = ("prepare", "deduplicate", "quality", "filter")
DOCUMENTS = 12_000
SECONDS = {"checkpoint_seconds": 0.2}
LETTERS = "ооооооооооеееееееееааааааааиииииииннннннттттттссссссрррррввввллллкккммдддппууяяыьгзбчйхжшюц"


def documents(seed: int, count: int) -> list[str]:
    """Texts of invented words, half of them well kept and half of them shouted; every sixth nearly a copy."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(3000)]
    made: list[str] = []
    for number in range(count):
        if number % 6 == 5:
            copy = made[draw.randrange(len(made))].split(" ")
            copy[draw.randrange(len(copy))] = draw.choice(words)
            made.append(" ".join(copy))
            continue
        chosen = draw.choices(words, k=draw.randint(15, 60))
        text = " ".join(chosen)
        made.append(f"{text.capitalize()}." if number % 2 else f"{text.upper()} !!! {draw.randint(1, 999)}")
    return made


class Corpora(Victim):
    """The stages of corpora/; their units are words: what was told of progress, in all starts together."""

    kinds = KINDS
    unit = "word"

    def prepare(self, inputs: Path) -> None:
        """The same texts as JSON lines, packed, as a table, in an 8-bit encoding, and judged."""
        from corpora import quality
        from foundation.dataio import write_jsonl
        from foundation.report import Silent

        made = documents(1, DOCUMENTS)
        inputs.mkdir(parents=True)
        write_jsonl(inputs / "texts.jsonl", ({"text": text} for text in made))
        third = DOCUMENTS // 3
        (inputs / "old.txt").write_bytes("\n\n".join(made[:third]).encode("cp1251"))
        with gzip.open(inputs / "packed.jsonl.gz", "wb") as file:
            file.write((inputs / "texts.jsonl").read_bytes())
        table = "\n".join(["text", *(f'"{text}"' for text in made[third : 2 * third])])
        (inputs / "table.csv").write_text(table + "\n", encoding="utf-8")
        write_jsonl(
            inputs / "judged.jsonl", ({"text": text, "label": int("!" not in text)} for text in made[:3000])
        )
        quality.run(quality.Settings(), {"judged": (inputs / "judged.jsonl",)}, inputs, Silent())

    def warm_up(self, inputs: Path) -> None:
        import sklearn.linear_model  # noqa: F401

        from corpora import deduplicate
        from foundation.dataio import write_jsonl
        from foundation.report import Silent

        with TemporaryDirectory() as folder:  # numba compiles
            write_jsonl(Path(folder) / "few.jsonl", ({"text": text} for text in documents(2, 60)))
            few = {"corpus": (Path(folder) / "few.jsonl",)}
            deduplicate.run(deduplicate.Settings(), few, Path(folder), Silent())

    def start(self, inputs: Path, kind: str, out: Path) -> None:
        from corpora import deduplicate, filter, prepare, quality, repeats, signatures

        out.mkdir(parents=True, exist_ok=True)
        report = counted_words(out / ".work" / "words")
        texts = {"corpus": (inputs / "texts.jsonl",)}
        if kind == "prepare":
            prepare.CHECKPOINT_SECONDS = SECONDS["checkpoint_seconds"]
            prepare.REPORT_DOCUMENTS = 50
            names = ("old.txt", "packed.jsonl.gz", "table.csv")
            read: dict[str, Any] = {"corpus": tuple(inputs / name for name in names)}
            prepare.run(prepare.Settings(held_share=0.1), read, out, report)
        elif kind == "deduplicate":
            signatures.BLOCK_CHARACTERS, repeats.CHUNK = 1 << 16, 300
            deduplicate.run(deduplicate.Settings(), texts, out, report)
        elif kind == "quality":
            quality.run(quality.Settings(), {"judged": (inputs / "judged.jsonl",)}, out, report)
        else:
            filter.CHUNK_DOCUMENTS = 100
            read = {**texts, "quality": inputs / "quality"}
            filter.run(filter.Settings(keep_share=0.4), read, out, report)

    def done(self, out: Path) -> int:
        return words_told(out / ".work" / "words")

    def result(self, out: Path) -> dict[str, str]:
        kept = (path for path in out.rglob("*") if ".work" not in path.relative_to(out).parts)
        return digests(out, kept)


if __name__ == "__main__":
    sys.exit(main(Corpora(), str(__doc__), "kill-corpora", {"documents": DOCUMENTS, **SECONDS}))

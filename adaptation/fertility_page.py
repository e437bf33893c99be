"""report.md of a vocabulary: the page that a person reads, made of report.json alone."""

from __future__ import annotations

from typing import Any

from foundation.markdown import MARKS, inline, table

Found = dict[str, Any]
WORD_MARKS = MARKS + "_#"  # a token may begin or end with one
ABOUT = {
    "extension": "The base's tokens keep their ids; new tokens follow.",
    "substitution": "A new vocabulary: bytes or characters and control tokens are the base's own, all else was "
    "learnt, some of it as the base has it.",
    "optimised": "The base's tokens that the corpus does not use are gone; the others moved together.",
}


def page(found: Found) -> str:
    """The Markdown of report.json's content."""
    parts = [
        f"# Vocabulary: {found['mode']}",
        f"{ABOUT[found['mode']]} Words were proposed by SentencePiece's {found['trainer']} model.",
        _sizes(found),
        "## Held-out text, before and after",
        _held(found["held"]),
        "A word is what stands between white space. The share of words in one token looks at words without the "
        "marks around them, where they stand in their lines.",
        _words(found["held"]["words"]),
        "## Whole lines",
        *(_line(line) for line in found["held"]["lines"]),
    ]
    return "\n\n".join(parts) + "\n"


def _sizes(found: Found) -> str:
    sizes, words = found["vocabulary"], found["words"]
    rows = {
        "tokens before": sizes["before"],
        "tokens after": sizes["after"],
        "of them also before": sizes["kept"],
        "of them new": sizes["added"],
        "old tokens left out": sizes["dropped"],
        "words that became one token": words["taken"],
        "words that the corpus supports": words["supported"],
        **{f"pieces dropped: {why}": count for why, count in words["dropped"].items()},
        "lines learnt from": found["lines_learnt_from"],
    }
    return table(["", ""], [[name, f"{count:,}"] for name, count in rows.items()], 1, WORD_MARKS)


def _held(held: Found) -> str:
    rows = []
    for name, row in [("all", held["all"]), *((row["file"], row) for row in held["files"])]:
        cells = [name, f"{row['lines']:,}", f"{row['words']:,}"]
        for figure, digits in (("tokens_per_word", 3), ("characters_per_token", 3), ("words_in_one_token", 1)):
            cells += [_number(row[when][figure], digits) for when in ("before", "after")]
        rows.append(cells)
    head = ["file", "lines", "words", "tokens per word", "after", "characters per token", "after",
            "words in one token", "after"]  # fmt: skip
    return table(head, rows, 1, WORD_MARKS)


def _words(words: Found) -> str:
    parts = [
        "## Words",
        f"{words['different']:,} different words were held out; {words['improved']:,} are shorter now, "
        f"{words['worsened']:,} are longer.",
    ]
    for title, key in (
        ("Most improved", "most_improved"),
        ("Least improved of those that were cut before", "least_improved"),
        ("Worsened", "most_worsened"),
    ):
        if listed := words[key]:
            rows = [
                [row["word"], str(row["times"]), " ".join(row["before"]), " ".join(row["after"])]
                for row in listed
            ]
            parts += [f"### {title}", table(["word", "times", "before", "after"], rows, 1, WORD_MARKS)]
    return "\n\n".join(parts)


def _line(line: Found) -> str:
    said = [f"> {inline(line['line'], WORD_MARKS)}", ""]
    for when in ("before", "after"):
        said.append(f"- {when}, {len(line[when])}: {inline(' '.join(line[when]), WORD_MARKS)}")
    return "\n".join(said)


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "none"
    return f"{100 * value:.1f} %" if digits == 1 else f"{value:.{digits}f}"

"""How text is cut before merging: the regular expressions of tokenizer.json, and llama.cpp's names for them.

GGUF has no key for a custom expression: `tokenizer.ggml.pre` names one of those compiled into llama.cpp.
An expression that is not in the table is refused by name: the nearest one would tokenise almost right.

Each row is checked by tokenising the same texts with both, with a vocabulary that has every pair of bytes,
so that nearly every other cut changes ids. Letters agree up to Unicode 15. One thing does not: (?i:'s) also
takes the long s of old print, U+017F, after an apostrophe, which llama.cpp does not.

Left out because the same test fails:

    tekken, gpt-4o, llama4, youtu, tiny_aya    upper and lower case are not told apart outside ASCII
    granite-embed-multi-97m                    likewise
    deepseek-llm, deepseek-coder               wide spaces such as U+3000 are in a range of letters too
    falcon                                     cuts again after its byte-level step
    superbpe                                   \\d takes other digits than 0-9 in tokenizer.json alone
    afmoe                                      counts digits in its own way

    chameleon                                  signs of its Punctuation step (U+09FD ..) are others

and because no byte-level tokenizer.json has them: kimi-k2 (tiktoken), gemma4, sarvam-moe and whitespace
(no byte letters), "default". Other names of llama.cpp are second names of rows that are here.

Source: llama.cpp, src/llama-vocab.cpp, whose comments quote the original expressions.
"""

from __future__ import annotations

import difflib
from typing import Any

from foundation.errors import ModelError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}{1,3}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = rf"|{_SIGNS}[\r\n]*|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{_TAIL}"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}{_TAIL}"
QWEN35 = rf"{_CONTRACTIONS}|{_MARKED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
UFAKZEKA = rf"{_WORD}|\p{{N}}{_TAIL}"
SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
MINICPM5 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+{_TAIL}"
EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"|{_SIGNS}[\r\n/]?|{_SPACES}"
)
_HALVES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
JAIS2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|\s*[\r\n]+|{_HALVES}|\s"
_ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]".replace(r"\"", '"')
_DEEPSEEK = rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
DEEPSEEK3 = rf"{_DEEPSEEK}[\r\n]*|{_SPACES}"
SPARK = rf"{_DEEPSEEK}|[\r\n]|\s+(?!\S)|\s+"
CHINESE_JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
LINES = r"[^\n]+|[\n]+"

# expressions in their order, and whether a whole word in the vocabulary skips the merges -> name
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((LLAMA3,), False): "dbrx",
    ((LLAMA3,), True): "llama-bpe",
    ((LINES, QWEN2), False): "laguna",
    ((UFAKZEKA,), False): "ufakzeka",
    ((SEED_CODER,), False): "seed-coder",
    ((DIGITS, MINICPM5), True): "minicpm5",
    ((EXAONE_MOE,), False): "exaone-moe",
    ((JAIS2,), False): "jais-2",
    ((DIGITS, CHINESE_JAPANESE, DEEPSEEK3), False): "deepseek-v3",
    ((DIGITS, CHINESE_JAPANESE, SPARK, DIGIT), False): "spark2_5",
    ((BLOOM,), False): "poro-chat",
    ((BLOOM, DIGIT), False): "viking",
}

# Computed by std::regex, which recurses once a letter: a run of some 25,000 equal characters ends the process.
RECURSIVE = frozenset(
    {
        "ufakzeka",
        "seed-coder",
        "minicpm5",
        "exaone-moe",
        "jais-2",
        "deepseek-v3",
        "spark2_5",
        "poro-chat",
        "viking",
    }
)

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    rf"|{_SIGNS}[\r\n/]*|{_SPACES}"
)
_CASE = "does not tell upper from lower case outside ASCII"
# expressions that llama.cpp has a name for and computes otherwise -> name, what it does
DIFFERENT: dict[tuple[str, ...], tuple[str, str]] = {
    (_CASED % ("", "", DIGIT),): ("tekken", _CASE),
    (_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", DIGITS),): ("gpt-4o", _CASE),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT): (
        "deepseek-coder",
        "cuts otherwise at wide spaces such as U+3000",
    ),
    (r"\p{N}+", r"(?=(\d{3})+(?!\d))"): ("superbpe", r"takes only ASCII digits for \d"),
}

_MEANS_THE_SAME = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    (r"[^\r\n\p{L}\p{N}]?+", r"[^\r\n\p{L}\p{N}]?"),  # what follows can not match what was taken:
    (r"[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+"),  # possessive or greedy is the same
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),  # \s* has taken all line ends but the last
    (r"\s{1,2}(?!\S)|\s{1}", r"\s{1,2}(?!\S)|\s"),
    ("[^(\\s|[.,!?…。，、।۔،])]+", "[^(\\s|.,!?…。，、।۔،)]+"),
)


def name_of(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer of tokenizer.json. Raises ModelError if it has none."""
    expressions = tuple(_spelling(e) for e in _expressions(pre_tokenizer))
    name = KNOWN.get((expressions, ignore_merges))
    if name is None:
        raise _unknown(expressions, ignore_merges)
    return name


def _unknown(expressions: tuple[str, ...], ignore_merges: bool) -> ModelError:
    """The error for a pre-tokenizer that is not in the table: what it is near to, and what to do."""
    shown = " then ".join(expressions)
    train = "train the tokenizer with a pre-tokenizer of the table in export/tokenizer/pretokenizers.py"
    if expressions in DIFFERENT:
        name, why = DIFFERENT[expressions]
        return ModelError(
            f"the pre-tokenizer `{shown}` is the one that llama.cpp calls {name}, but llama.cpp {why}: "
            "other ids would come out",
            hint=f"{train}; for this one no GGUF file can be right",
        )
    other = KNOWN.get((expressions, not ignore_merges))
    if other is not None:
        return ModelError(
            f"llama.cpp has no pre-tokenizer for `{shown}` with ignore_merges {str(ignore_merges).lower()}; "
            f"{other} cuts so with ignore_merges {str(not ignore_merges).lower()}",
            hint="set ignore_merges so in tokenizer.json if every token can be made by merges; "
            "then it changes no ids",
        )
    rows = {" then ".join(e): name for (e, _), name in KNOWN.items()}
    nearest = max(rows, key=lambda row: difflib.SequenceMatcher(None, shown, row, autojunk=False).ratio())
    return ModelError(
        f"llama.cpp has no pre-tokenizer for `{shown}` with ignore_merges {str(ignore_merges).lower()}; "
        f"the nearest is {rows[nearest]}: `{nearest}`; all: {', '.join(KNOWN.values())}",
        hint=f"{train}; if yours means the same as a row, write it as the row does",
    )


def _expressions(step: dict[str, Any] | None) -> list[str]:
    """The splits that a pre-tokenizer makes, in order, ended by the byte alphabet."""
    steps = step.get("pretokenizers", []) if step and step.get("type") == "Sequence" else [step or {}]
    out: list[str] = []
    for i, one in enumerate(steps):
        kind, pattern, last = one.get("type"), one.get("pattern", {}), i == len(steps) - 1
        if (
            kind == "Split"
            and one.get("behavior") == "Isolated"
            and not one.get("invert")
            and "Regex" in pattern
            and not last
        ):
            out.append(pattern["Regex"])
        elif kind == "Digits" and not last:
            out.append(DIGIT if one.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and not one.get("add_prefix_space") and last:
            if one.get("use_regex", True):
                out.append(GPT2)
        else:
            raise ModelError(
                f"pre-tokenizer step {i + 1} of {len(steps)}, {one}, has no counterpart in llama.cpp's "
                "byte-level tokenizer",
                hint="Split (Regex, Isolated) and Digits can be exported, and ByteLevel as the last step, "
                "without add_prefix_space",
            )
    return out


def _spelling(expression: str) -> str:
    """One spelling for expressions that mean the same."""
    for written, meant in _MEANS_THE_SAME:
        expression = expression.replace(written, meant)
    return expression

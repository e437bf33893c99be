"""How text is cut before merging: the regular expressions of tokenizer.json, and llama.cpp's names for them.

GGUF has no key for a custom expression: `tokenizer.ggml.pre` names one of those compiled into llama.cpp.
An expression that is not in the table is refused by name: the nearest one would tokenise almost right.
Each row was checked by tokenising the same texts with both. Left out on purpose: "tekken" and "gpt-4o",
whose expressions llama.cpp replaced by ones that treat upper and lower case alike outside ASCII.

Source: llama.cpp, src/llama-vocab.cpp, whose comments quote the original expressions.
"""

from __future__ import annotations

from typing import Any

from foundation.errors import ModelError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN35 = _CONTRACTIONS + (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# expressions in their order, and whether a whole word in the vocabulary skips the merges -> name
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((LLAMA3,), False): "dbrx",
    ((LLAMA3,), True): "llama-bpe",
}


def name_of(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer of tokenizer.json. Raises ModelError if it has none."""
    expressions = tuple(_spelling(e) for e in _expressions(pre_tokenizer))
    name = KNOWN.get((expressions, ignore_merges))
    if name is None:
        raise ModelError(
            f"llama.cpp has no pre-tokenizer for {' then '.join(expressions)!r} with ignore_merges "
            f"{str(ignore_merges).lower()}; it has {', '.join(KNOWN.values())}",
            hint="train or extend the tokenizer with one of these expressions (export/pretokenizers.py)",
        )
    return name


def _expressions(step: dict[str, Any] | None) -> list[str]:
    """The splits that a pre-tokenizer makes, in order, ended by the byte alphabet."""
    steps = step.get("pretokenizers", []) if step and step.get("type") == "Sequence" else [step or {}]
    out: list[str] = []
    for i, one in enumerate(steps):
        kind = one.get("type")
        if (
            kind == "Split"
            and one.get("behavior") == "Isolated"
            and not one.get("invert")
            and i < len(steps) - 1
        ):
            pattern = one.get("pattern", {})
            out.append(pattern.get("Regex", ""))
        elif kind == "Digits" and one.get("individual_digits") and i < len(steps) - 1:
            out.append(DIGIT)
        elif kind == "ByteLevel" and not one.get("add_prefix_space") and i == len(steps) - 1:
            if one.get("use_regex", True):
                out.append(GPT2)
        else:
            raise ModelError(f"pre-tokenizer step {one} has no counterpart in llama.cpp's byte-level tokenizer")
    return out


def _spelling(expression: str) -> str:
    """One spelling for expressions that mean the same: line ends written as escapes, contractions folded."""
    expression = expression.replace("\r", r"\r").replace("\n", r"\n")
    return expression.replace(r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS)

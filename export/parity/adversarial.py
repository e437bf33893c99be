"""Texts on which two tokenizers that agree on ordinary prose come apart.

Fixed ones, each for a known difference; every added token inside a sentence; and seeded random Unicode.
None holds a zero byte: llama.cpp's text is a C string in places.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable

TEXTS = (
    " ",
    "  ",
    "   \n",
    " a",
    "a ",
    "a  b   c    d",
    "\t\t\n\n \n",
    "\r\n\r\n",
    "line one\r\nline two\r\n",
    "\n\n\n\nfour",
    "trailing spaces   \nnext",
    "0",
    "1234567890 12 3",
    "3.14159, 1,000,000 и 2024-05-06T07:08:09",
    "don't DON'T I'll we'Ve they'RE it'S y'all 's 'D",
    "Мама мыла раму. Ёжик, ёлка, подъезд; «кавычки» — тире…",
    "ПРОПИСНЫЕ и строчные, СМЕШАННЫЙРегистр camelCase snake_case",
    "й и й, ё и ё, é и é",  # composed and decomposed
    "и\u0306\u0301\u0323 a\u0300\u0301\u0302\u0303",  # stacked combining marks
    "ﬁ ½ ² Ⅷ ① ㎏ ﷺ",
    "Übergröße naïve façade Ångström Đorđe",
    "🚀🦙👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇷🇺🇬🇧 1️⃣",
    "😀😀😀😀😀",
    "мир🌍мир hello🌍world",
    "中文 日本語 한국어 ไทย हिन्दी עברית مرحبا بالعالم",
    "Привет世界hello مرحبا123",
    "zero\u200bwidth\u200djoiner\u2060word\ufeffmark",
    "\u00a0no\u202fbreak\u3000spaces\u2003here",
    "\u0001\u0002\u0007\u0008\u000b\u000c\u001b[0m\u007f\u0085",
    "\u202eright to left\u202c",
    "<0x41><0x0A> <unk> <s> </s> <pad>",
    "<|im_start|> <|im_end|> <|endoftext|> <|nonsense|> <|im_",
    "▁literal▁▁underline",
    "Ġliteral Ċ bytes",
    "[PAD0] [PAD511] [UNK]",
    "```python\ndef f(x):\n    return {'a': [1, 2], \"b\": x**2}\n```",
    "https://example.org/path?q=1&r=%D1%8F#frag user@example.org",
    "a" * 300,
    " " * 40,
    "=" * 33 + "-" * 17 + "." * 9,
    "\ud7ff\ue000\ufdd0\ufffd\U0001f9ff\U00020000\U0010fffd",
)

# Blocks from which random text is drawn: ASCII twice, for it is what spaces and digits come from.
_BLOCKS = (
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x300, 0x36F),
    (0x400, 0x500),
    (0x590, 0x700),
    (0x900, 0x980),
    (0xE00, 0xE60),
    (0x1E00, 0x2070),
    (0x2190, 0x2600),
    (0x3040, 0x3100),
    (0x4E00, 0x4F80),
    (0xAC00, 0xAC80),
    (0x1F300, 0x1F700),
)
_JOINERS = ("\n", "\r\n", "\t", "  ", "\u200d", "\ufe0f", " ", "'s", "\u0301")


def in_context(tokens: Iterable[str]) -> list[str]:
    """Every token at the start, the end, in the middle and doubled, with and without spaces."""
    out = []
    for token in tokens:
        out += [token, f"a{token}б", f" {token} ", f"x {token}y{token}{token} z", f"\n{token}\n"]
    return out


def fuzz(seed: int, count: int) -> list[str]:
    """`count` random texts of 1 to 60 characters of assigned Unicode; the same for the same seed."""
    draw = random.Random(seed)
    return ["".join(_character(draw) for _ in range(draw.randint(1, 60))) for _ in range(count)]


def _character(draw: random.Random) -> str:
    if draw.random() < 0.15:
        return draw.choice(_JOINERS)
    while True:
        first, last = draw.choice(_BLOCKS)
        character = chr(draw.randrange(first, last))
        if unicodedata.category(character) != "Cn":
            return character

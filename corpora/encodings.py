"""Which encoding a text file is in, and its lines decoded one by one.

UTF-8 proves itself; UTF-16 and UTF-32 are known by their byte order mark. An 8-bit encoding can only be judged:
the bytes are read under each of TABLES, and the reading most like prose wins. Likeness is a log-likelihood of
the characters beyond ASCII: how often each letter is one of Russian or Western European text, less where prose
would not put it (a capital after a small letter, a Cyrillic letter beside a Latin one). On Russian stories in
five encodings, alone or as a fifth of English ones, this is right more often than charset-normalizer, above all
below 300 characters (tests/test_encodings.py). Where it is not sure it says so instead of guessing: most often
for a short text with few accents or curly quotes, where charset-normalizer guesses right more often.

The lines up to the first one beyond ASCII say nothing; a sample from there on decides. Every line after it is
decoded strictly and watched, so that a file that changes its encoding half-way is refused by the line where
it does. Not seen is a change between two tables that differ in few letters: cp1251 and mac-cyrillic.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, pairwise
from typing import NamedTuple

from foundation.dataio import MAX_LINE_BYTES
from foundation.errors import InputError

AUTO = "auto"
_WIDE = ("utf-16", "utf-32")
# Encoding -> mean log-likelihood that long prose in it does not fall below. Of two that read alike, the first.
TABLES = {
    "cp1252": -4.2, "mac-roman": -4.2, "iso-8859-15": -4.2,
    "cp1251": -3.55, "koi8-r": -3.55, "cp866": -3.55, "iso-8859-5": -3.55, "mac-cyrillic": -3.55,
}  # fmt: skip
SAMPLE_BYTES = 64 * 2**10  # of lines beyond ASCII; more changes no verdict
AHEAD_BYTES = 2**18  # read at most while the sample is gathered

_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTENTS = (  # what a text file must not begin with, and what to do about it
    (b"\x1f\x8b", "a gzip file", "give it the ending .gz after its own: name.jsonl.gz"),
    (b"BZh", "a bzip2 file", "give it the ending .bz2 after its own: name.jsonl.bz2"),
    (b"\xfd7zXZ", "an xz file", "give it the ending .xz after its own: name.jsonl.xz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "give it the ending .zst after its own: name.jsonl.zst"),
    (b"PAR1", "a Parquet file", "give it the ending .parquet"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "unpack it, and save documents as plain text"),
    (b"%PDF", "a PDF", "extract its text first: pdftotext name.pdf"),
)
# How often each letter is a letter of Russian text, per ten thousand; other Slavic letters as a guess.
_CYRILLIC = dict(
    zip("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё", (
        1097, 845, 801, 735, 670, 626, 547, 473, 454, 440, 349, 321, 298, 281, 262, 201, 190, 174, 170, 165,
        159, 144, 121, 97, 94, 73, 64, 48, 36, 32, 26, 4, 20,
    ), strict=True)
) | dict.fromkeys("іїєґў", 20)  # fmt: skip
_ACCENTED = dict.fromkeys("éèàçêäöüßñóáâô", 0.02) | dict.fromkeys("îûëïùíúøåæœãõ", 0.003)
_PROSE_MARKS = "«»—–…“”„‘’№\u00a0"
_MISPLACED_QUOTE = re.compile(r"[^\W\d_](?:„|[«»“”]+(?=[^\W\d_]))")  # in a word: ä and ö of cp850 are „ and ”
_MISPLACED_NATS = math.log(1e-4)
_SURE_NATS = 8.0  # how much likelier than the next that reads differently the best must be
_LINE = "Az 09\n"
_NOT_HEBREW = frozenset("АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯыьэюя".encode("cp1251"))  # of cp1255: no letters there
_HIGH = bytes(range(128, 256))


class Seen(NamedTuple):
    """What a file was found to be in; for a judged 8-bit encoding, by how much.

    `nats`: log-likelihood per character ahead of `next`, over `characters` of a sample; 0 where it was no
    matter of judgement.
    """

    encoding: str
    characters: int = 0
    nats: float = 0.0
    next: str = ""

    def __str__(self) -> str:
        if not self.characters:
            return self.encoding
        ahead = f", {self.nats:.2f} nats each ahead of {self.next}" if self.next else ""
        return f"{self.encoding}, judged by {self.characters} characters{ahead}"


class _Broken(Exception):
    """A line that can not be read; `said` goes on after "NAME, line N: "."""

    def __init__(self, number: int, said: str, hint: str) -> None:
        super().__init__(said)
        self.number, self.said, self.hint = number, said, hint


Lines = Iterator[tuple[int, bytes]]  # numbered from 1, with their ends


def decoded_lines(
    file: io.BufferedIOBase, name: str, encoding: str, tell: Callable[[Seen], None]
) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of an open file in `encoding`, or AUTO: found out.

    `tell` hears once what was found. Raises InputError, beginning with `name` and the line, for what is no
    text, what can not be told, and what breaks later in the file.
    """
    start = file.peek(4)[:4]  # type: ignore[attr-defined]  # all readers of the standard library have it
    mark, marked = next(((mark, found) for mark, found in _MARKS if start.startswith(mark)), (b"", ""))
    if encoding == AUTO:
        for magic, what, hint in _CONTENTS:
            if start.startswith(magic):
                raise InputError(f"{name} is {what}, by its first bytes", hint=hint)
    try:
        if marked and (encoding == AUTO or marked.startswith(canonical(encoding))):
            tell(Seen(marked))
            file.read(len(mark))
            yield from _wide_lines(file, marked)
        elif encoding == AUTO:
            yield from _judged_lines(_raw_lines(file), tell)
        elif is_wide(encoding):
            tell(Seen(encoding))
            if (wide := canonical(encoding)) in _WIDE:
                hint = f'name the order: `encoding = "{wide}-le"`, which is the usual one, or "{wide}-be"'
                raise _Broken(1, f"no mark that tells the byte order of {wide}", hint)
            yield from _wide_lines(file, wide)
        else:
            tell(Seen(encoding))
            for number, raw in _raw_lines(file):
                first_utf8 = number == 1 and canonical(encoding) == "utf-8"
                yield number, _decoded(number, raw, "utf-8-sig" if first_utf8 else encoding)
    except _Broken as broken:
        raise InputError(f"{name}, line {broken.number}: {broken.said}", hint=broken.hint) from None


def canonical(encoding: str) -> str:
    """The name under which Python knows `encoding`; LookupError for one in which lines can not be read."""
    info = codecs.lookup(encoding)
    if not info._is_text_encoding or info.name == "idna":  # hex, rot13: codecs, but of no text
        raise LookupError(f"{encoding} is no encoding of text")
    if not info.name.startswith(_WIDE):
        try:
            has_lines = _LINE.encode("ascii").decode(info.name) == _LINE
        except UnicodeError:
            has_lines = False
        if not has_lines:  # undefined, punycode; EBCDIC, whose lines end otherwise
            raise LookupError(f"{encoding} has no lines that end with the byte 0x0a")
    return info.name


def is_wide(encoding: str) -> bool:
    """True for encodings whose lines do not end with the byte 0x0a."""
    return canonical(encoding).startswith(_WIDE)


def _raw_lines(file: io.BufferedIOBase) -> Lines:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES:
            raise _too_long(number)
        if b"\0" in raw:
            raise _Broken(
                number,
                "a NUL byte; this is a binary file, or UTF-16 without its mark",
                'give text; `encoding = "utf-16-le"` in corpora.prepare reads UTF-16 that has no mark',
            )
        yield number, raw


def _too_long(number: int) -> _Broken:
    return _Broken(number, f"longer than {MAX_LINE_BYTES} bytes", "break it up: one document a line")


def _wide_lines(file: io.BufferedIOBase, encoding: str) -> Iterator[tuple[int, str]]:
    decoder = codecs.getincrementaldecoder(encoding)()
    number, left = 1, ""
    while True:
        chunk = file.read(2**20)
        try:
            *whole, left = (left + decoder.decode(chunk, final=not chunk)).split("\n")
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding, errors="ignore").count("\n")
            hint = "the file is damaged, or cut off: save it anew"
            raise _Broken(number + before, f"not {encoding} ({error.reason})", hint) from None
        whole += [left] * bool(left and not chunk)
        for line in whole:
            if "\0" in line:
                raise _Broken(number, f"a NUL character in {encoding}", "this is a binary file; give text")
            yield number, line.rstrip("\r")
            number += 1
        if not chunk:
            return
        if len(left) * 2 >= MAX_LINE_BYTES:
            raise _too_long(number)


def _judged_lines(lines: Lines, tell: Callable[[Seen], None]) -> Iterator[tuple[int, str]]:
    """Lines in what the first of them beyond ASCII are found to be in."""
    ahead: list[tuple[int, bytes]] = []
    marked = False
    for number, raw in lines:
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            raw, marked = raw.removeprefix(codecs.BOM_UTF8), True
        if not raw.isascii():
            ahead = [(number, raw), *_ahead(lines)]
            break
        yield number, raw.decode("ascii").rstrip("\r\n")
    seen = _verdict(ahead, marked)
    tell(seen)
    for number, raw in chain(ahead, lines):
        if seen.characters and not raw.isascii():
            _refuse_change(number, raw, seen.encoding)
        yield number, _decoded(number, raw, seen.encoding)


def _ahead(lines: Lines) -> Lines:
    """As many more lines as make a sample."""
    sample_bytes = ahead_bytes = 0
    for number, raw in lines:
        yield number, raw
        sample_bytes += 0 if raw.isascii() else len(raw)
        ahead_bytes += len(raw)
        if sample_bytes >= SAMPLE_BYTES or ahead_bytes >= AHEAD_BYTES:
            return


def _verdict(ahead: list[tuple[int, bytes]], marked: bool) -> Seen:
    """What the sample is in. Raises _Broken when that can not be told."""
    if not ahead:
        return Seen("utf-8" if marked else "ascii")
    sample = b"".join(raw[:SAMPLE_BYTES] for _, raw in ahead if not raw.isascii())[: 2 * SAMPLE_BYTES]
    if marked or _is_mostly_utf8(sample):
        return Seen("utf-8")
    readings = _readings(sample)
    best, *others = readings
    characters = len(sample) - len(sample.translate(None, _HIGH))
    if not best.is_prose:
        raise _Broken(
            ahead[0][0],
            f"not UTF-8, and like prose in none of {', '.join(TABLES)}; its encoding can not be told",
            _FORCE,
        )
    different = _different(sample)
    if best.encoding == "cp1251" and different >= 40 and not {*sample} & _NOT_HEBREW:
        raise _Broken(
            ahead[0][0],
            "not UTF-8, and its encoding can not be told: cp1251 without a capital or one of ыьэюя "
            f"({best.shown}), or Hebrew",
            _FORCE,
        )
    if not others:
        return Seen(best.encoding, characters)
    lead = best.mean_nats - others[0].mean_nats
    if lead * different < _SURE_NATS:
        raise _Broken(
            ahead[0][0],
            f"not UTF-8, and its encoding can not be told from {different} characters: "
            f"{best.encoding} ({best.shown}) or {others[0].encoding} ({others[0].shown})",
            _FORCE,
        )
    return Seen(best.encoding, characters, lead, others[0].encoding)


def _different(raw: bytes) -> int:
    """Characters beyond ASCII in the different words of `raw`: a word said again proves nothing more."""
    words = b"".join({*raw.split()})
    return len(words) - len(words.translate(None, _HIGH))


_FORCE = 'name it: `encoding = "cp1251"` in the corpora.prepare stage that reads it'


def _is_mostly_utf8(sample: bytes) -> bool:
    """True when more characters are UTF-8 than bytes are not: a broken UTF-8 file is no other encoding."""
    text = sample.decode("utf-8", errors="surrogateescape")
    bad = sum("\udc80" <= c <= "\udcff" for c in text)
    return sum(c > "\x7f" for c in text) - bad > bad


class _Reading(NamedTuple):
    mean_nats: float  # log-likelihood per character beyond ASCII
    encoding: str
    shown: str  # how the first of them read
    is_prose: bool


def _readings(raw: bytes) -> list[_Reading]:
    """`raw` under every table that has all its bytes, the likeliest first; of those that read alike, one."""
    high = bytes(sorted({*raw} & {*_HIGH}))
    pairs = [(pair, n) for pair, n in Counter(pairwise(b" " + raw)).items() if max(pair) > 127]
    count = len(raw) - len(raw.translate(None, _HIGH))
    first = next(i for i, byte in enumerate(raw) if byte > 127)
    found: dict[str, _Reading] = {}
    for encoding, long_floor in TABLES.items():
        floor = long_floor - 2.2 / math.sqrt(count)  # the mean of few characters varies more
        try:
            reading = high.decode(encoding)
        except UnicodeDecodeError:
            continue
        misplaced = len(_MISPLACED_QUOTE.findall(raw.decode(encoding)))
        nats = sum(n * _pair_nats(encoding, *pair) for pair, n in pairs) + misplaced * _MISPLACED_NATS
        shown = raw[first : first + 24].decode(encoding, errors="replace").split("\n")[0]
        found.setdefault(reading, _Reading(nats / count, encoding, f"'{shown.strip()}'", nats / count >= floor))
    return sorted(found.values(), key=lambda reading: -reading.mean_nats)


@cache
def _pair_nats(encoding: str, before: int, byte: int) -> float:
    """Log-probability of a byte's character after that of `before`; of ASCII only how it stands there."""
    both = bytes((before, byte)).decode(encoding, errors="replace")
    left, right = both[0], both[1]
    foreign = left.isalpha() and right.isalpha() and (left.lower() in _CYRILLIC) != (right.lower() in _CYRILLIC)
    return math.log(0.02) * foreign + (_nats(left, right) if byte > 127 else 0.0)


def _nats(left: str, right: str) -> float:
    low = right.lower()
    if left == right and not right.isalpha():  # a drawn line
        return math.log(0.5)
    if low in _CYRILLIC:
        share = _CYRILLIC[low] / 1e4
    elif low in _ACCENTED:
        share = _ACCENTED[low]
    elif right in _PROSE_MARKS:
        return math.log(0.05)
    else:
        return math.log(1e-8 if unicodedata.category(right).startswith("C") else 1e-5)
    if right != low:  # capitals follow capitals, or begin a word
        share *= 0.02 if left.islower() else 1.0 if left.isupper() else 0.2
    elif left.isupper() and low in _ACCENTED and left > "\x7f":
        share *= 0.1
    return math.log(share)


def _refuse_change(number: int, raw: bytes, encoding: str) -> None:
    """Raise _Broken when a line of a file in `encoding` is clearly in another. Cheap for a line of prose."""
    high = len(raw) - len(raw.translate(None, _HIGH))
    odd = len(raw) - len(raw.translate(None, _odd(encoding)))
    if odd < 4 or odd * 10 < high:
        return
    with contextlib.suppress(UnicodeDecodeError):
        if sum(c > "\x7f" for c in raw.decode()) >= 4:
            raise _Broken(number, f"UTF-8, in a file that is {encoding} before", _MIXED)
    best, *_ = readings = _readings(raw[:SAMPLE_BYTES])
    own = next((r.mean_nats for r in readings if _same(raw, r.encoding, encoding)), -math.inf)
    if best.is_prose and (best.mean_nats - own) * high >= 3 * _SURE_NATS:
        raise _Broken(number, f"reads like {best.encoding}, in a file that is {encoding} before", _MIXED)


_MIXED = "split the file where its encoding changes, and give both; or name one encoding for all of it"


def _same(raw: bytes, one: str, other: str) -> bool:
    return one == other or raw.decode(one, errors="replace") == raw.decode(other, errors="replace")


@cache
def _odd(encoding: str) -> bytes:
    """The bytes beyond ASCII that are neither small letters nor marks of prose: few in a line of it."""
    usual = {**_CYRILLIC, **dict.fromkeys(_PROSE_MARKS), **_ACCENTED}
    return bytes(byte for byte in _HIGH if bytes((byte,)).decode(encoding, errors="replace") not in usual)


def _decoded(number: int, raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        said = f"not {encoding} (byte {error.start}: 0x{raw[error.start]:02x})"
        if canonical(encoding) == "utf-8" and not _is_mostly_utf8(raw):
            best = _readings(raw[:SAMPLE_BYTES])[0]
            if best.is_prose:
                raise _Broken(number, f"{said}; it reads like {best.encoding}", _MIXED) from None
        hint = f"mend that line, or name the right encoding if it is not {encoding}"
        raise _Broken(number, said, hint) from None

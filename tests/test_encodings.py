"""Encodings found out: against the text that was encoded, and against charset-normalizer on real stories."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import encodings
from corpora.encodings import AUTO, TABLES, Seen, canonical, decoded_lines
from foundation.errors import InputError

RUSSIAN = (
    "Жила-была маленькая девочка Маша. Она любила играть в песочнице, и однажды увидела там мишку.\n"
    "Мишка был грустный: он потерял свою красную шапочку, а на улице становилось всё холоднее.\n"
    "— Не плачь, — сказала Маша, — я помогу тебе её найти! И они вместе пошли по дорожке к лесу.\n"
    "Под старой ёлкой сидел ёжик и щурился на солнце; шапочка лежала возле него, целая и сухая.\n"
)
GERMAN = (
    "Die Königin hörte, daß ihre Söhne fort wären; da fuhr sie durch das grüne Wäldchen und rief:\n"
    "Ach, wäre ich bei euch, so würde ich euch füttern! Als sie müde war, schlief sie unter einer Eiche.\n"
)
GREEK = "Μια φορά κι έναν καιρό ήταν ένας βασιλιάς που είχε τρεις κόρες και όλοι τις αγαπούσαν πολύ.\n"
FINNISH = "Eilen söimme äidin tekemää leipää ja joimme hyvää kahvia. Tyttö näki järvellä jäätä yöllä.\n"
HEBREW = "היום מזג האוויר יפה מאוד והילדים משחקים בגן עם סבתא שלהם.\n"
UKRAINIAN = "Сьогодні дуже гарна погода, і діти граються в саду з бабусею. Її ім'я – Ганна, ґанок їх.\n"
POLISH = "Dawno, dawno temu, za siedmioma górami, żył sobie król, który miał trzy śliczne córki.\n"
CYRILLIC = [name for name, floor in TABLES.items() if floor > -4]


def read(content: bytes, encoding: str = AUTO) -> tuple[str, list[Seen]]:
    told: list[Seen] = []
    lines = decoded_lines(io.BufferedReader(io.BytesIO(content)), "a.txt", encoding, told.append)  # type: ignore[arg-type]
    numbered = list(lines)
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return "".join(line + "\n" for _, line in numbered), told


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", *CYRILLIC])
def test_russian_in_every_encoding_is_found_and_read(encoding: str) -> None:
    text = RUSSIAN.encode(encoding, errors="ignore").decode(encoding)  # koi8-r has no dash
    got, told = read(text.encode(encoding))
    assert got == text
    assert len(told) == 1 and told[0].encoding.startswith(encoding.removesuffix("-sig"))


@pytest.mark.parametrize("encoding", ["cp1252", "mac-roman"])
def test_german_is_not_taken_for_russian(encoding: str) -> None:
    got, told = read(GERMAN.encode(encoding))
    assert got == GERMAN and told[0].encoding == encoding


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_both_byte_orders_by_their_mark(encoding: str) -> None:
    mark = {name: mark for mark, name in encodings._MARKS}[encoding]
    got, told = read(mark + RUSSIAN.encode(encoding))
    assert got == RUSSIAN and told == [Seen(encoding)]
    assert read(RUSSIAN.encode(encoding), encoding)[0] == RUSSIAN, "without a mark, when it is named"


@given(st.lists(st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"])), min_size=1))
def test_utf8_is_read_as_it_is(parts: list[str]) -> None:
    text = "".join(part + "\n" for part in parts)
    if text.startswith(("\ufeff", "BZh", "%PDF", "PAR1")):
        return
    got, told = read(text.encode())
    assert got == text
    assert told == [Seen("ascii" if text.isascii() else "utf-8")]


@given(st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"])))
def test_wide_encodings_are_read_as_they_are(text: str) -> None:
    if text:
        assert read(("\ufeff" + text).encode("utf-16-le"))[0] == text + "\n"


def test_ascii_before_says_nothing_and_is_passed_on_at_once() -> None:
    plain = b"only ascii here\n" * 20_000
    got, told = read(plain + RUSSIAN.encode("cp866", errors="ignore"))
    assert told[0].encoding == "cp866" and told[0].characters > 200
    assert got.startswith("only ascii") and "ёжик" in got


def test_how_sure_is_told() -> None:
    _, [seen] = read(RUSSIAN.encode("cp1251"))
    letters = sum(ord(c) > 127 for c in RUSSIAN)
    assert (seen.encoding, seen.characters, seen.next) == ("cp1251", letters, "mac-cyrillic")
    assert (
        str(seen) == f"cp1251, judged by {letters} characters, {seen.nats:.2f} nats each ahead of mac-cyrillic"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GREEK.encode("cp1253"), "line 1: not UTF-8, and like prose in none of"),
        (b"ascii\n" + POLISH.encode("cp1250"), "line 2: not UTF-8, and like prose in none of"),
        ("да\n".encode("cp1251"), "line 1: not UTF-8, and its encoding can not be told from 2 characters: "),
        (FINNISH.encode("cp850"), "line 1: not UTF-8, and like prose in none of"),
        (b"h\x94yry l\x94yly t\x94ihin k\x94yh\x94 hy\x94ty m\x94kki", "line 1: not UTF-8"),
        (HEBREW.encode("cp1255"), "line 1: not UTF-8, .* cp1251 without a capital .*, or Hebrew"),
        (HEBREW.encode("cp1255") * 20, "line 1: not UTF-8, .* cp1251 without a capital .*, or Hebrew"),
        (b"ok\n\xff\xfe\xfd", "line 2: not UTF-8"),
        (b"\x7fELF\x01\x00\x00", "line 1: a NUL byte"),
        (RUSSIAN.encode("utf-16-le"), "line 1: a NUL byte; .* UTF-16 without its mark"),
        (gzip.compress(b"text", mtime=0), "is a gzip file, by its first bytes"),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"PAR1....", "is a Parquet file"),
        (RUSSIAN.encode("utf-16")[:-1], "line 4: not utf-16-le"),
        (b"\xff\xfe" + "one\n\0two".encode("utf-16-le"), "line 2: a NUL character"),
    ],
)
def test_what_can_not_be_told_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=rf"^a\.txt(,| ).*{said}") as caught:
        read(content)
    assert caught.value.hint


def test_a_refusal_says_how_to_force_an_encoding() -> None:
    for text, encoding in ((FINNISH, "cp850"), (HEBREW, "cp1255"), (UKRAINIAN * 20, "cp1251")):
        with pytest.raises(InputError) as caught:
            read(text.encode(encoding))
        assert "`encoding = " in caught.value.hint
        assert read(text.encode(encoding), encoding)[0] == text


def test_a_word_said_again_proves_nothing_more() -> None:
    for times in (1, 100):
        with pytest.raises(InputError, match="can not be told from 2 characters"):
            read("да\n".encode("cp1251") * times)


def test_quotes_beside_words_are_prose() -> None:
    text = "Die Königin sagte: „Geht hinaus“, und rief: »Ihr müßt schön fleißig sein!« «Oui», fügte er hinzu.\n"
    got, told = read(text.encode("cp1252"))
    assert got == text and told[0].encoding == "cp1252"


LONG = RUSSIAN * 300  # past the sample


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ("utf-8", "cp1251", r"line 1201: not utf-8 \(byte 0: 0xc6\); it reads like cp1251"),
        ("cp1251", "utf-8", "line 1201: UTF-8, in a file that is cp1251 before"),
        ("cp1251", "koi8-r", "line 1201: reads like koi8-r, in a file that is cp1251 before"),
        ("koi8-r", "cp866", "line 1201: reads like cp866, in a file that is koi8-r before"),
        ("cp866", "utf-8", "line 1201: UTF-8, in a file that is cp866 before"),
        ("iso-8859-5", "cp1251", "line 1201: reads like cp1251, in a file that is iso-8859-5 before"),
        ("cp1251", "iso-8859-5", "line 1201: reads like iso-8859-5, in a file that is cp1251 before"),
    ],
)
def test_a_file_that_changes_its_encoding_is_refused_by_the_line(first: str, then: str, said: str) -> None:
    content = LONG.encode(first, errors="ignore") + RUSSIAN.encode(then, errors="ignore")
    with pytest.raises(InputError, match=said):
        read(content)
    named = read(content.replace(b"\x98", b""), "cp1251")[0]
    assert named.count("\n") == 1204, "an encoding that is named is taken at its word"


@pytest.mark.parametrize("encoding", CYRILLIC)
def test_prose_is_never_taken_for_a_change(encoding: str) -> None:
    odd = [
        "ГЛАВА ПЕРВАЯ, В КОТОРОЙ НИЧЕГО НЕ ПРОИСХОДИТ\n",
        "Å ё Ё № «ЦИТАТА»\n",
        "СССР, США, МГУ\n",
        "plain\n",
    ]
    text = "".join(odd[n % 4] + RUSSIAN for n in range(200)).encode(encoding, errors="ignore").decode(encoding)
    assert read(text.encode(encoding))[0] == text


def test_one_bad_byte_in_utf8_is_no_other_encoding() -> None:
    content = RUSSIAN.encode().replace("ёжик".encode(), b"\xd1\xff\xd0\xb8\xd0\xba")
    with pytest.raises(InputError, match=r"line 4: not utf-8 \(byte \d+: 0xd1\)"):
        read(content)


def test_a_named_encoding_is_used_and_may_break() -> None:
    assert read("да\n".encode("cp1251"), "cp1251") == ("да\n", [Seen("cp1251")])
    assert read(b"\xef\xbb\xbfword\n", "utf-8")[0] == "word\n"
    with pytest.raises(InputError, match=r"a\.txt, line 2: not cp1251 \(byte 2: 0x98\)"):
        read(b"ok\nab\x98\n", "cp1251")
    for wrong in ("hex", "no-such", "undefined", "punycode", "idna", "cp037"):
        with pytest.raises(LookupError):
            canonical(wrong)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_wide_encoding_needs_its_order(encoding: str) -> None:
    assert read(RUSSIAN.encode(encoding), encoding)[0] == RUSSIAN
    with pytest.raises(InputError, match=rf"line 1: no mark that tells the byte order of {encoding}") as caught:
        read(RUSSIAN.encode(f"{encoding}-le"), encoding)
    assert f'"{encoding}-le"' in caught.value.hint


def test_every_encoding_of_lines_can_be_named() -> None:
    from encodings.aliases import aliases

    for name in {*aliases.values()} - {"mbcs", "oem"}:
        try:
            known = canonical(name)
        except LookupError:
            continue
        assert read("one 1\ntwo\n".encode(known), name)[0] == "one 1\ntwo\n", name


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "MAX_LINE_BYTES", 2**12)
    for content in (b"short\n" + b"x" * 5000, b"\xff\xfe" + ("short\n" + "x" * 5000).encode("utf-16-le")):
        with pytest.raises(InputError, match="line 2: longer than 4096 bytes"):
            read(content)


@pytest.mark.realdata
def test_right_more_often_than_charset_normalizer(samovar_data: Path) -> None:
    """On samples of stories in five Cyrillic encodings, and of English with a Russian fifth."""
    library = pytest.importorskip("charset_normalizer")
    path = sorted((samovar_data / "text" / "tinystories-ru").glob("*.jsonl"))[0]
    with path.open(encoding="utf-8") as file:
        stories = " ".join(json.loads(line)["story"] for line, _ in zip(file, range(300), strict=False))
    english = (samovar_data / "text" / "grimm-en" / "GrimmsFairyTales.txt").read_text(encoding="utf-8-sig")
    english = re.sub(r"[^\x00-\x7f]", "", english)
    rnd = random.Random(5)
    right = {"ours": 0, "library": 0}
    wrong = refused = total = 0
    for characters in (40, 100, 300, 2000):
        for encoding in CYRILLIC * 8:
            for mixed in (False, True):
                start = rnd.randrange(len(stories) - characters)
                text = stories[start : start + characters // (5 if mixed else 1)]
                if mixed:
                    at = rnd.randrange(len(english) - characters)
                    text = english[at : at + characters * 4 // 5] + " " + text
                raw = text.encode(encoding, errors="ignore")
                if raw.isascii():
                    continue
                total += 1
                text = raw.decode(encoding)
                best = library.from_bytes(raw).best()
                right["library"] += bool(best) and str(best) == text
                try:
                    seen = encodings._verdict([(1, raw)], False)
                except encodings._Broken:
                    refused += 1
                    assert characters <= 300
                else:
                    right["ours"] += raw.decode(seen.encoding) == text
                    wrong += raw.decode(seen.encoding) != text
    assert total > 300 and wrong == 0
    assert right["ours"] > right["library"] + 0.05 * total, (right, refused, total)
    assert refused < 0.12 * total

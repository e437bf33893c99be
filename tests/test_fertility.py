"""What a vocabulary is worth: figures and words of the report against counting by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import ENGLISH, Made, byte_base, characters_base, russian_lines

from adaptation.extension import extend
from adaptation.fertility import covering, measure, readable, spans
from adaptation.fertility_page import page
from adaptation.tokenizer_json import TokenizerJson, to_byte_level
from adaptation.vocabulary import Settings, run
from foundation.dataio import write_jsonl
from foundation.report import Silent


def words_of(line: str) -> list[str]:
    return [line[start:end] for start, end in spans(line)]


def test_words_stand_between_white_space_without_the_marks_around_them() -> None:
    line = "«Ёж, — сказал он, — кто-то (12) пришёл!» don't 3D ... हिन्दी  ёж ё\u0301ж,"
    assert words_of(line) == [
        "Ёж", "сказал", "он", "кто-то", "пришёл", "don't", "3D", "हिन्दी", "ёж", "ё\u0301ж",
    ]  # fmt: skip


@given(st.text("аб ё.,-1\t«", max_size=30))
def test_words_are_those_of_a_regular_expression(line: str) -> None:
    stripped = [re.sub(r"^[.,\-«]+|[.,\-«]+$", "", word) for word in line.split()]
    assert words_of(line) == [word for word in stripped if re.search("[абё]", word)]
    assert all(a[1] <= b[0] for a, b in zip(spans(line), list(spans(line))[1:], strict=False))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), st.text("ab .", max_size=25))
def test_tokens_of_a_word_are_those_that_overlap_it(steps: list[tuple[int, int]], line: str) -> None:
    """Against comparing every token with every word; gaps and empty tokens included."""
    offsets, at = [], 0
    for gap, length in steps:
        offsets.append((at + gap, at + gap + length))
        at += gap + length
    words = list(spans(line))
    expected = [[i for i, (a, b) in enumerate(offsets) if max(a, start) < min(b, end)] for start, end in words]
    assert covering(words, offsets) == expected


def test_bytes_of_one_character_all_count(tmp_path: Path) -> None:
    """ё is two tokens of a base that knows no Cyrillic, and both are tokens of its word."""
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    found = measure({"a": ["! the ёж."]}, base, extend(base, {to_byte_level(" ёж"): 1}, []))
    assert found["all"]["before"] == {
        "tokens": 8,  # the mark, the, a space, four bytes, the full stop
        "tokens_per_word": 8 / 3,  # of what white space parts
        "characters_per_token": 9 / 8,
        "words_in_one_token": 1 / 2,  # of what holds a letter
    }
    assert found["all"]["after"] == {
        "tokens": 4,
        "tokens_per_word": 4 / 3,
        "characters_per_token": 9 / 4,
        "words_in_one_token": 1.0,
    }
    (best,) = found["words"]["most_improved"]
    assert best == {"word": "ёж", "times": 1, "before": ["\\xd1", "\\x91", "\\xd0", "\\xb6"], "after": ["▁ёж"]}
    assert found["lines"] == [
        {
            "line": "! the ёж.",
            "before": ["!", "▁the", "▁", "\\xd1", "\\x91", "\\xd0", "\\xb6", "."],
            "after": ["!", "▁the", "▁ёж", "."],
        }
    ]


@pytest.fixture(scope="module", params=["bytes", "characters"])
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    base = (byte_base if request.param == "bytes" else characters_base)(folder / "base")
    lines = russian_lines(240)
    lines[100:100] = ENGLISH  # the hundred and fiftieth line is held, and English
    made = Made(folder, base, lines, mode="substitution", vocab_tokens=330)
    return made, json.loads((made.out / "report.json").read_text())


def test_the_report_agrees_with_counting_word_by_word(told: tuple[Made, dict[str, Any]]) -> None:
    made, report = told
    lines = [json.loads(line)["text"] for line in (made.out.parent / "ru.jsonl").read_text().splitlines()]
    held = lines[49::50]
    figures = report["held"]["all"]
    assert figures["lines"] == len(held) and figures["words"] == sum(len(line.split()) for line in held)
    for when, backend in (("before", made.before), ("after", made.after)):
        whole = total = 0
        for line in held:
            encoding = backend.encode(line, add_special_tokens=False)
            total += len(encoding.ids)
            for word in re.finditer(r"[^\W\d]+", line):
                parts = [o for o in encoding.offsets if max(o[0], word.start()) < min(o[1], word.end())]
                whole += len(parts) == 1
        words = sum(len(re.findall(r"[^\W\d]+", line)) for line in held)
        assert figures[when]["tokens"] == total
        assert figures[when]["tokens_per_word"] == total / figures["words"]
        assert figures[when]["words_in_one_token"] == whole / words
        assert made.figures[f"tokens_per_word_{when}"] == figures[when]["tokens_per_word"]
        assert made.figures[f"words_in_one_token_{when}"] == figures[when]["words_in_one_token"]


def test_the_lists_hold_what_they_say(told: tuple[Made, dict[str, Any]]) -> None:
    _, report = told
    words = report["held"]["words"]

    def saved(row: dict[str, Any]) -> int:
        return len(row["before"]) - len(row["after"])

    most, least, worse = (words[key] for key in ("most_improved", "least_improved", "most_worsened"))
    assert most and worse and words["improved"] >= len(most) and words["worsened"] >= len(worse)
    assert [saved(row) for row in most] == sorted(map(saved, most), reverse=True) and saved(most[-1]) > 0
    assert [saved(row) for row in worse] == sorted(map(saved, worse)) and saved(worse[-1]) < 0
    assert all(len(row["before"]) > 1 for row in least)
    assert [saved(row) for row in least] == sorted(map(saved, least))
    for row in (*most, *least, *worse):
        if not re.search(r"\\x|<0x", "".join(row["before"])):
            assert row["word"] in "".join(row["before"])


def test_sizes_add_up(told: tuple[Made, dict[str, Any]]) -> None:
    made, report = told
    sizes = report["vocabulary"]
    assert (
        sizes["before"] == sizes["kept"] + sizes["dropped"] and sizes["after"] == sizes["kept"] + sizes["added"]
    )
    assert (sizes["before"], sizes["after"]) == (made.base.size, made.new.size)
    assert made.figures["tokens_dropped"] == sizes["dropped"]
    assert report["lines_learnt_from"] == 294


def test_each_file_has_its_own_figures(tmp_path: Path) -> None:
    """English stays as it was, and only the whole corpus gets the mean."""
    base = byte_base(tmp_path / "base")
    for name, lines in (("ru", russian_lines(120)), ("en", ENGLISH * 2)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "text.jsonl", [{"text": line} for line in lines])
    files = (tmp_path / "ru" / "text.jsonl", tmp_path / "en" / "text.jsonl")
    run(Settings(add_tokens=30, pieces=300), {"model": base, "corpus": files}, tmp_path / "out", Silent())
    held = json.loads((tmp_path / "out" / "report.json").read_text())["held"]
    russian, english = held["files"]
    assert (russian["file"], english["file"]) == ("ru/text.jsonl", "en/text.jsonl")
    assert english["before"] == english["after"]
    assert russian["after"]["tokens_per_word"] < russian["before"]["tokens_per_word"] / 2
    assert held["all"]["before"]["tokens"] == russian["before"]["tokens"] + english["before"]["tokens"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{russian['after']['tokens_per_word']:.3f}" in text and "ru/text.jsonl" in text


def test_the_page_makes_nothing_of_what_a_corpus_holds(tmp_path: Path) -> None:
    """Bars, tags and links in a corpus stay text: no row of the page has more cells than its head."""
    base = byte_base(tmp_path / "base")
    ugly = "дом|<b>[x](y)`ёж*"
    made = Made(tmp_path, base, [f"{line} {ugly}" for line in russian_lines(200)])
    report = json.loads((made.out / "report.json").read_text())
    report["held"]["files"][0]["file"] = "a|b.jsonl"
    text = page(report)
    assert "<b>" not in text.replace("\\<b>", "") and "a\\|b.jsonl" in text
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| дом")}
    assert cells == {5}  # word, times, before, after


@pytest.mark.parametrize(("token", "shown"), [("Ġthe", "▁the"), ("<|im_end|>", "<|im_end|>"), ("Ñĳ", "ё")])
def test_tokens_are_shown_as_a_person_reads_them(tmp_path: Path, token: str, shown: str) -> None:
    assert readable(token, TokenizerJson.read(byte_base(tmp_path / "base"))) == shown


def test_nothing_held_of_a_file_gives_no_figure(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    found = measure({"a": [], "b": ["12 ..."]}, base, base)
    assert found["files"][0]["before"]["tokens_per_word"] is None
    assert found["files"][1]["before"]["words_in_one_token"] is None and found["lines"][0]["line"] == "12 ..."

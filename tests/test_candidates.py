"""The sample that is learnt from, the pieces proposed for it, and the words that one tokenizer can take."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import RUSSIAN, byte_base, characters_base, russian_lines

from adaptation.candidates import Candidate, propose, weight_of
from adaptation.sample import HELD_MOST, HELD_MOST_OF_FILE, check_script, draw, lines_of, names_of
from adaptation.tokenizer_json import TokenizerJson, to_byte_level
from adaptation.words import select
from foundation.errors import InputError
from foundation.report import Silent


def unigram(piece: str, log_probability: float) -> Candidate:
    return Candidate(piece, log_probability, weight_of(log_probability))


# ------------------------------------------------------------------------------------------------ sample


def test_lines_are_in_nfc_and_not_blank() -> None:
    assert list(lines_of(["и\u0306од\n\n  два \n", "три"])) == ["йод", "два", "три"]


@given(st.integers(60, 400), st.integers(1, 80), st.integers(0, 5))
def test_draw_holds_every_fiftieth_and_takes_no_line_twice(count: int, most: int, seed: int) -> None:
    lines = [str(i) for i in range(count)]
    sample = draw({"a": lines}, most, seed)
    held = sample.held["a"]
    assert held == lines[49::50]
    assert len(sample.train) == min(most, count - len(held)) == len(set(sample.train))
    assert not set(sample.train) & set(held)
    assert sample == draw({"a": lines}, most, seed)


def test_draw_is_fair() -> None:
    lines, hits = [str(i) for i in range(100)], dict.fromkeys(range(100), 0)
    for seed in range(600):
        for line in draw({"a": lines}, 20, seed).train:
            hits[int(line)] += 1
    drawn = [hits[i] for i in range(100) if i % 50 != 49]
    assert min(drawn) > 70 and max(drawn) < 180  # expected 600 * 20 / 98 = 122, standard deviation 10


def test_held_lines_stay_with_their_files_and_no_file_takes_them_all() -> None:
    files = {name: [f"{name}{i}" for i in range(30_000)] for name in "abcdefghijklmnopqrst"}
    sample = draw(files, 10, 0)
    assert {name: len(held) for name, held in sample.held.items()} == dict.fromkeys(files, HELD_MOST_OF_FILE)
    assert all(line.startswith(name) for name, held in sample.held.items() for line in held)
    assert len(draw({"a": map(str, range(200_000))}, 10, 0).held["a"]) == HELD_MOST


def test_files_are_split_where_the_whole_corpus_would_be() -> None:
    """The count of lines goes on from file to file: one file or two, the same lines are learnt from."""
    lines = [str(i) for i in range(333)]
    one, two = draw({"a": lines}, 50, 3), draw({"a": lines[:70], "b": lines[70:]}, 50, 3)
    assert one.train == two.train and one.held["a"] == two.held["a"] + two.held["b"]


def test_a_corpus_of_few_lines_is_refused() -> None:
    with pytest.raises(InputError, match="12 lines of text; at least 50"):
        draw({"a": ["строка"] * 12}, 100, 0)


def test_files_have_short_names_that_tell_them_apart() -> None:
    paths = [Path("/x/one/text.jsonl"), Path("/x/two/text.jsonl"), Path("/x/held.jsonl")]
    assert names_of(paths) == ["one/text.jsonl", "two/text.jsonl", "held.jsonl"]
    assert names_of([Path("/x/a/b.txt"), Path("/y/a/b.txt")]) == ["a/b.txt (1)", "a/b.txt (2)"]


# ------------------------------------------------------------------------------------------------ script


def test_a_corpus_without_the_script_is_refused_with_what_was_seen() -> None:
    lines = ["abc 12", "abcde αβ", "中文 !"]
    words = r"matches script = '.*'; its letters are 66\.7 % Latin, 16\.7 % CJK, 16\.7 % Greek"
    with pytest.raises(InputError, match=words):
        check_script(lines, RUSSIAN)
    with pytest.raises(InputError, match="letters are none at all"):
        check_script(["12 ...", "3"], RUSSIAN)


@pytest.mark.parametrize("script", [RUSSIAN, "[а-я]{3,}", " ?[а-я]+", " [а-я]+", "^дом$", "дом"])
def test_one_word_of_the_script_is_enough(script: str) -> None:
    check_script(["the house", "the дом"], script)


@given(st.lists(st.text("ab дё1 ", max_size=8)), st.sampled_from([RUSSIAN, "[a-z]+", "[0-9]"]))
def test_a_script_is_missing_when_no_character_matches_it(lines: list[str], script: str) -> None:
    there = any(re.fullmatch(script, char) for line in lines for char in line if char != " ")
    if there:
        check_script(lines, script)
    else:
        with pytest.raises(InputError, match="nothing in the corpus"):
            check_script(lines, script)


# -------------------------------------------------------------------------------------------- candidates


def test_fewer_pieces_than_asked_for_are_reported() -> None:
    report = Silent()
    pieces = propose(russian_lines(), 30_000, "unigram", report)
    assert report.notes == [f"the corpus gives {len(pieces) + 3} Unigram pieces, 30000 were asked for"]
    scores = {candidate.piece: candidate.score for candidate in pieces}
    assert "▁" in scores and all(score <= 0 for score in scores.values())


@pytest.mark.parametrize("trainer", ["unigram", "bpe"])
def test_fewer_pieces_than_characters_are_refused(trainer: str) -> None:
    with pytest.raises(InputError, match="can not make 10 pieces"):
        propose(russian_lines(), 10, trainer, Silent())


@pytest.mark.parametrize("trainer", ["unigram", "bpe"])
def test_pieces_hold_at_most_one_digit(trainer: str) -> None:
    lines = [f"{line} {i % 7}{i % 7}{i % 7}" for i, line in enumerate(russian_lines())]
    pieces = [candidate.piece for candidate in propose(lines, 300, trainer, Silent())]
    assert not [piece for piece in pieces if sum(char.isdigit() for char in piece) > 1]


def test_weights_of_unigram_are_millionths() -> None:
    assert [weight_of(x) for x in (-2.0, -3.0, -30.0)] == [135335, 49787, 1]  # int(1e6 exp x), at least 1


def test_weights_of_bpe_are_counts_in_the_sample() -> None:
    """By hand: ab is merged 8 times, then ▁ab 8 times, then ▁abc 4 times; the text has 8 a."""
    found = propose(["abc"] * 4 + ["ab"] * 4, 10, "bpe", Silent())
    weights = {candidate.piece: candidate.weight for candidate in found}
    assert weights == {"ab": 8, "▁ab": 8, "▁abc": 4, "a": 8, "b": 8, "c": 4, "▁": 8}
    assert all(candidate.score == candidate.weight for candidate in found)


def test_weights_of_bpe_are_the_counts_that_its_training_goes_by() -> None:
    """The same merges applied one by one to every word of the text, and counted."""
    lines = russian_lines()
    found = propose(lines, 120, "bpe", Silent())
    weights = {candidate.piece: candidate.weight for candidate in found}
    letters = Counter("".join("▁" + word for line in lines for word in line.split()))
    assert {piece: weight for piece, weight in weights.items() if len(piece) == 1} == letters
    order = [candidate.piece for candidate in found if len(candidate.piece) > 1]
    words = [list("▁" + word) for line in lines for word in line.split()]
    for piece in order:
        made = 0
        for symbols in words:
            i = 0
            while i < len(symbols) - 1:
                if symbols[i] + symbols[i + 1] == piece:
                    symbols[i : i + 2] = [piece]
                    made += 1
                i += 1
        assert weights[piece] == made > 0, piece


# ------------------------------------------------------------------------------------------------- words


def test_select_drops_each_piece_for_its_reason(tmp_path: Path) -> None:
    base, report = TokenizerJson.read(byte_base(tmp_path / "base")), Silent()
    pieces = [
        unigram("▁the", -1.0),  # another script, and known: the first reason counts
        unigram("▁2024", -1.1),
        unigram("▁", -1.2),  # a space matches the pattern, and the base has it
        unigram("▁дом", -2.0),
        unigram("дома", -3.0),
        unigram("дом▁на", -3.5),  # the base would split it at the space
        unigram("кот", -4.0),
        unigram("▁кит", -5.0),
    ]
    words = select(pieces, base, RUSSIAN, 3, report)
    assert list(words.taken) == [to_byte_level(" дом"), to_byte_level("дома"), to_byte_level("кот")]
    assert list(words.taken.values()) == [135335, 49787, 18315]
    assert words.supported == 4 and sum(words.dropped.values()) + words.supported == len(pieces)
    assert report.notes == [
        "3 words taken of 4; dropped: 1 known to the base, 2 of another script, "
        "1 split by the base's pre-tokenizer"
    ]


def test_the_limit_counts_what_the_script_filter_left(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    pieces = [unigram(f"word{i}", -1.0) for i in range(10)] + [unigram("слово", -9.0), unigram("дело", -30.0)]
    words = select(pieces, base, RUSSIAN, 2, Silent()).taken
    assert words == {to_byte_level("слово"): 123, to_byte_level("дело"): 1}  # no weight below 1


def test_without_a_script_and_a_limit_every_word_is_taken(tmp_path: Path) -> None:
    base = TokenizerJson.read(characters_base(tmp_path / "base"))
    pieces = [unigram("▁дом", -1.0), unigram("fjord", -2.0), unigram("3", -3.0), unigram("▁the", -1.0)]
    assert list(select(pieces, base, None, None, Silent()).taken) == ["▁дом", "fjord", "3"]


def test_select_spells_words_as_the_characters_family_does(tmp_path: Path) -> None:
    base = TokenizerJson.read(characters_base(tmp_path / "base"))
    pieces = [unigram("▁дом", -1.0), unigram("дом", -2.0), unigram("до▁м", -3.0), unigram("▁", -3.0)]
    assert list(select(pieces, base, RUSSIAN, 9, Silent()).taken) == ["▁дом", "дом"]


def test_equal_scores_go_by_spelling_whatever_their_order(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    pieces = [Candidate(piece, 5, 5) for piece in ("кот", "дом", "лес", "пёс", "сон")]
    dice = random.Random(3)
    chosen = {tuple(select(dice.sample(pieces, 5), base, RUSSIAN, 3, Silent()).taken) for _ in range(20)}
    assert len(chosen) == 1

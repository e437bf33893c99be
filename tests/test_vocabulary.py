"""Vocabulary extension: new words become one token, and old text is read as before."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vocabularies import (
    NOUNS,
    PLACES,
    RUSSIAN,
    VERBS,
    Made,
    byte_base,
    characters_base,
    llama_spm,
    russian_lines,
    stories,
)

from adaptation.candidates import Candidate, propose
from adaptation.extension import extend
from adaptation.sample import lines_of
from adaptation.tokenizer_json import TokenizerJson, byte_alphabet, from_byte_level, to_byte_level
from adaptation.vocabulary import Settings, run
from adaptation.words import script_characters, select
from export.gguf import write_vocabulary_only
from export.tokenizer.vocabulary import read_vocabulary
from foundation.errors import ModelError
from foundation.llama import LlamaModel
from foundation.report import Silent


@pytest.fixture(scope="module", params=["bytes", "characters"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    return Made(folder, (byte_base if request.param == "bytes" else characters_base)(folder / "base"))


@given(st.text())
def test_byte_alphabet_is_that_of_the_library(text: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    chunks = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert to_byte_level(text) == "".join(chunk for chunk, _ in chunks)
    assert from_byte_level(to_byte_level(text)) == text.encode()


# -------------------------------------------------------------------------------------------- extension


def test_ids_stay_and_new_ones_follow_without_a_gap(made: Made) -> None:
    assert made.base.vocab.items() <= made.new.vocab.items()
    assert sorted(made.new.vocab.values()) == list(range(made.new.size))
    assert made.new.size - made.base.size == made.figures["tokens_added"] >= 40
    for token, i in made.new.vocab.items():
        assert made.after.token_to_id(token) == i  # as the library loads it, added tokens included
    assert made.new.added == made.base.added


def test_transformers_loads_it(made: Made) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(made.out / "tokenizer")
    assert len(loaded) == made.new.size
    text = "Экипаж отдыхает после рейса, the crew rests."
    assert (
        loaded(text, add_special_tokens=False).input_ids
        == made.after.encode(text, add_special_tokens=False).ids
    )


def test_words_that_bpe_proposes_are_learnt_as_well(made: Made, tmp_path: Path) -> None:
    """Twice as many words of BPE's: the most frequent pieces, of which each is one token."""
    bpe = Made(tmp_path, made.base.folder, add_tokens=80, trainer="bpe")
    assert bpe.figures["words_added"] == 80 and bpe.new.vocab != made.new.vocab
    assert bpe.figures["tokens_per_word_after"] < bpe.figures["tokens_per_word_before"] / 2
    words = select(propose(russian_lines(), 300, "bpe", Silent()), bpe.base, RUSSIAN, 80, Silent()).taken
    model = bpe.after.model
    for word in words:
        assert [token.value for token in model.tokenize(word)] == [word]


def test_control_tokens_keep_their_ids_in_a_text(tmp_path: Path) -> None:
    made = Made(tmp_path, byte_base(tmp_path / "base"))
    text = "<|im_start|>пилот<|im_end|> <|late|>"
    assert made.after.encode(text).ids[0] == made.base.vocab["<|im_start|>"]
    assert made.after.encode(text).ids[-1] == made.base.vocab["<|late|>"] == made.base.size - 1


def test_words_asked_for_become_one_token(made: Made) -> None:
    words = dict.fromkeys(("пилот", " пилот", " подъезжает", "ёж", " ёж", "объясняет"), 5)
    if made.base.family == "bytes":
        spelt = {to_byte_level(word): weight for word, weight in words.items()}
    else:
        spelt = {word.replace(" ", "▁"): weight for word, weight in words.items()}
    grown = extend(made.base, spelt, [])
    model = grown.backend().model
    assert {word: [token.value for token in model.tokenize(word)] for word in spelt} == {w: [w] for w in spelt}


def test_fertility_falls_and_is_what_the_figures_say(made: Made) -> None:
    held = russian_lines()[49::50]
    words = sum(len(line.split()) for line in held)
    for when, backend in (("before", made.before), ("after", made.after)):
        tokens = sum(len(backend.encode(line, add_special_tokens=False).ids) for line in held)
        assert made.figures[f"tokens_per_word_{when}"] == tokens / words
        assert made.figures[f"characters_per_token_{when}"] == sum(map(len, held)) / tokens
    assert made.figures["tokens_per_word_after"] < made.figures["tokens_per_word_before"] / 2


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(max_codepoint=127, exclude_characters="\0"), max_size=60))
def test_ascii_is_encoded_exactly_as_before(made: Made, text: str) -> None:
    assert made.after.encode(text).ids == made.before.encode(text).ids


MIXED = st.text(
    st.one_of(
        st.sampled_from("абвгдежзийклмнопрстуфхцчшщъыьэюяёЁЖЙ"),
        st.sampled_from("abcxyz 0129.,!-\n\t"),
        st.sampled_from("🙂🛫👩‍✈️éß中文ґїѣ\u0301"),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=300)
@given(st.one_of(MIXED, st.lists(st.sampled_from(NOUNS + VERBS + PLACES), max_size=6).map(" ".join)))
def test_decoding_gives_the_text_back(made: Made, text: str) -> None:
    ids = made.after.encode(text, add_special_tokens=False).ids
    assert made.after.decode(ids, skip_special_tokens=False) == text


def test_merges_are_spelt_as_the_base_spells_them(tmp_path: Path) -> None:
    folder = byte_base(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    pairs = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    made = {}
    for name, merges in (("pairs", pairs), ("strings", content["model"]["merges"])):
        content["model"]["merges"] = merges
        (folder / "tokenizer.json").write_text(json.dumps(content))
        made[name] = extend(TokenizerJson.read(folder), {to_byte_level(" дом"): 1}, [])
        new = made[name].content["model"]["merges"]
        assert new[: len(merges)] == merges and {type(merge) for merge in new} == {type(merges[0])}
    assert made["pairs"].merges == made["strings"].merges
    assert made["pairs"].backend().encode(" дом").tokens == made["strings"].backend().encode(" дом").tokens


def test_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    base = byte_base(tmp_path / "base")
    made = [Made(tmp_path / name, base) for name in ("a", "b") if not (tmp_path / name).mkdir()]
    files = [{p.name: p.read_bytes() for p in sorted((m.out / "tokenizer").iterdir())} for m in made]
    assert files[0] == files[1] and "tokenizer_config.json" in files[0] and "chat_template.jinja" in files[0]


# ------------------------------------------------------------------------------- SentencePiece's family


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("spm")
    return Made(folder, characters_base(folder / "base"), add_tokens=60)


@settings(deadline=None, max_examples=400)
@given(
    st.one_of(
        st.lists(
            st.sampled_from(NOUNS + VERBS + PLACES + ["crew", "the", "rests"]), min_size=1, max_size=5
        ).map(" ".join),
        st.text("пилотёржадейн  thcrew🙂ѣ", min_size=1, max_size=25),
    )
)
def test_llama_cpp_would_encode_alike(spm: Made, text: str) -> None:
    assert spm.after.encode(text).tokens == llama_spm(text, spm.new.vocab, spm.new.merges)


def test_llama_cpp_encodes_alike(made: Made) -> None:
    """The real llama.cpp, both families, on words that follow each other and words run together."""
    path, dice = made.out / "vocabulary.gguf", random.Random(8)
    write_vocabulary_only(path, read_vocabulary(made.out / "tokenizer", made.new.size))
    words = [*NOUNS, *VERBS, *PLACES, "the", "crew", "ѣ", "🙂", "Ёж"]
    texts = ["".join(dice.choices([*words, " "], k=dice.randint(1, 9))).strip() for _ in range(2000)]
    with LlamaModel(path, vocab_only=True) as model:
        for text in texts + russian_lines(100):
            expected = made.after.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, parse_special=False) == expected, text


def test_every_split_of_a_token_is_a_merge_beside_its_others(spm: Made) -> None:
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(spm.new.merges):
        ranks.setdefault(left + right, []).append(rank)
    merges = set(spm.new.merges)
    vocab = spm.new.vocab
    assert len(merges) == len(spm.new.merges)
    for token, places in ranks.items():
        splits = {(token[:i], token[i:]) for i in range(1, len(token))}
        assert {cut for cut in splits if cut[0] in vocab and cut[1] in vocab} == splits & merges
        assert places == list(range(places[0], places[0] + len(places)))
    made_of_two = {token for token, i in vocab.items() if i >= spm.base.size and len(token) > 1}
    assert made_of_two <= ranks.keys()


def test_old_tokens_can_be_put_together_from_new_ones(tmp_path: Path) -> None:
    """Once ск is a token, ск + о makes the old ско too, and ск + от the old скот, at their ranks."""
    folder = characters_base(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    for token in ("с", "к", "о", "т", "ко", "от", "ско", "кот", "скот"):
        vocab[token] = len(vocab)
    merges += [["к", "о"], ["о", "т"], ["с", "ко"], ["к", "от"], ["ко", "т"], ["с", "кот"], ["ско", "т"]]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    base = TokenizerJson.read(folder)
    made = extend(base, {"ск": 1}, [])
    assert made.merges[len(base.merges) - 5 :] == [
        ("с", "ко"), ("ск", "о"),
        ("к", "от"), ("ко", "т"),
        ("с", "кот"), ("ск", "от"), ("ско", "т"),
        ("с", "к"),
    ]  # fmt: skip


SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "start"),
    [
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, SPLIT, ""),  # Gemma 3
        (None, METASPACE, "▁"),  # Llama 2, as newer versions of transformers convert it
    ],
)
def test_other_spellings_of_the_family(tmp_path: Path, normalizer: Any, pre_tokenizer: Any, start: str) -> None:
    folder = characters_base(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    content |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    base = TokenizerJson.read(folder)
    pieces = [Candidate("▁рейс", -1.0, 9), Candidate("рейс", -2.0, 5), Candidate("ами", -3.0, 1)]
    words = select(pieces, base, RUSSIAN, 3, Silent()).taken
    assert list(words) == ["▁рейс", "рейс", "ами"]
    tokens = extend(base, words, []).backend().encode("рейс рейсами", add_special_tokens=False).tokens
    assert tokens == [start + "рейс", "▁рейс", "ами"]


def test_every_character_of_the_script_becomes_a_token(spm: Made) -> None:
    """Bytes are for the unexpected: a letter that the corpus holds is never spelt in two of them."""
    letters = {char for line in russian_lines() for char in line if char not in " ."}
    assert letters <= spm.new.vocab.keys()
    assert script_characters(["ёж, Ёж 12 fox"], RUSSIAN) == [" ", "Ё", "ж", "ё"]


def test_a_bad_pattern_is_refused_with_the_settings() -> None:
    with pytest.raises(ValidationError, match="not a regular expression"):
        Settings(script="[а-я")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "a Unigram tokenizer; only BPE"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "neither byte-level BPE nor SentencePiece",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}},
            "not a tokenizer of the tokenizers",
        ),
        ({"added_tokens": []}, "not a tokenizer of the tokenizers"),
        ([], "not a tokenizer of the tokenizers"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words):
        TokenizerJson.read(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TokenizerJson.read(tmp_path)


# -------------------------------------------------------------------------------------------- real data


@pytest.mark.realdata
def test_stories260k_learns_russian_words(samovar_data: Path, tmp_path: Path) -> None:
    model, corpus, report = (
        samovar_data / "models" / "stories260K",
        stories(samovar_data, tmp_path, 1),
        Silent(),
    )
    figures = run(
        Settings(add_tokens=600, pieces=4000), {"model": model, "corpus": (corpus,)}, tmp_path / "out", report
    )
    assert figures["tokens_per_word_before"] > 10 and figures["tokens_per_word_after"] < 2.5
    new = TokenizerJson.read(tmp_path / "out" / "tokenizer")
    backend = new.backend()
    for line in lines_of(["Жила-была лиса. Once upon a time, there was a ёжик 🙂!", *russian_lines(200)]):
        encoding = backend.encode(line, add_special_tokens=False)
        assert encoding.tokens == llama_spm(line, new.vocab, new.merges)
        assert backend.decode(encoding.ids) == line


@pytest.mark.slow
@pytest.mark.realdata
def test_qwen_is_extended_at_its_real_size(samovar_data: Path, tmp_path: Path) -> None:
    """151,665 tokens and 8,000 words; English stays, the special tokens stay, Russian gets shorter."""
    import time

    from transformers import AutoTokenizer

    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(samovar_data / "tokenizers" / "qwen2.5").save_pretrained(base)
    corpus = stories(samovar_data, tmp_path, 4)
    start = time.monotonic()
    chosen = Settings(add_tokens=8000, pieces=13_000)
    figures = run(chosen, {"model": base, "corpus": (corpus,)}, tmp_path / "out", Silent())
    assert time.monotonic() - start < 60
    assert figures["tokens_per_word_before"] > 2.3 and figures["tokens_per_word_after"] < 1.5
    old, new = (
        AutoTokenizer.from_pretrained(base),
        AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer"),
    )
    assert (len(old), len(new)) == (151_665, 151_665 + figures["tokens_added"])
    english = (samovar_data / "text" / "grimm-en" / "GrimmsFairyTales.txt").read_text()
    assert new(english).input_ids == old(english).input_ids
    chat = "<|im_start|>user\nЖила-была лиса<|im_end|>\n"
    assert new(chat).input_ids[0] == 151_644 and new(chat).input_ids[-2] == 151_645
    assert new.decode(new(chat).input_ids) == unicodedata.normalize("NFC", chat)

"""Vocabulary extension: new words become one token, and old text is read as before."""

from __future__ import annotations

import heapq
import json
import random
import string
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from adaptation import unigram
from adaptation.merges import by_pair, by_token, learn, settle
from adaptation.scratch import train_tokenizer
from adaptation.tokenizer_json import TokenizerJson, byte_alphabet, from_byte_level, to_byte_level
from adaptation.vocabulary import Settings, extend, run, script_characters, select
from export.gguf import write_vocabulary_only
from export.vocabulary import read_vocabulary
from foundation.dataio import write_jsonl
from foundation.errors import InputError, ModelError
from foundation.llama import LlamaModel
from foundation.report import Silent

RUSSIAN = "[ А-Яа-яЁё]+"
ENGLISH = [
    "The pilot lifts the barbell and rests.",
    "A squat trains the legs; the crew runs in the hangar.",
] * 30
NOUNS = ["пилот", "экипаж", "штурман", "стюардесса", "командир", "ёж", "самолёт", "ангар", "тренер", "штанга"]
VERBS = ["отдыхает", "поднимает", "видит", "ждёт", "тренирует", "бережёт", "подъезжает", "объясняет"]
PLACES = ["утром", "вечером", "дома", "в зале", "на поле", "после рейса", "перед вылетом", "у ангара"]


def russian_lines(count: int = 400) -> list[str]:
    dice = random.Random(5)
    return [
        f"{dice.choice(NOUNS).capitalize()} {dice.choice(VERBS)} {dice.choice(PLACES)} {dice.choice(NOUNS)}."
        for _ in range(count)
    ]


def byte_base(folder: Path) -> Path:
    """English byte-level BPE; control tokens below, and one above the other tokens, as in Qwen."""
    train_tokenizer(ENGLISH, 320, 128, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|late|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def characters_base(folder: Path) -> Path:
    """SentencePiece's family as in Llama 2: bytes, the characters of `ENGLISH`, all splits as merges."""
    words = sorted({"▁" + word for line in ENGLISH for word in line.split()})
    characters = sorted(set("".join(words)) | set(string.ascii_letters))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {token: i for i, token in enumerate(tokens)}
    learnt = learn([(list(word), len(word)) for word in words], {}, by_token, lambda token: (len(token), token))
    merges = []
    for token in dict.fromkeys(left + right for left, right in learnt):
        vocab[token] = len(vocab)
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [list(cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    special = [{"id": i, "content": token, "special": True} for i, token in enumerate(tokens[:3])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content = {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class Made:
    """A base and its extension by the stage."""

    def __init__(self, folder: Path, base: Path, **changes: Any) -> None:
        corpus = folder / "ru.jsonl"
        write_jsonl(corpus, [{"text": line} for line in russian_lines()])
        self.out, self.report = folder / "out", Silent()
        chosen: dict[str, Any] = {"add_tokens": 40, "pieces": 300} | changes
        self.figures = run(Settings(**chosen), {"model": base, "corpus": (corpus,)}, self.out, self.report)
        self.base, self.new = TokenizerJson.read(base), TokenizerJson.read(self.out / "tokenizer")
        self.before, self.after = self.base.backend(), self.new.backend()


@pytest.fixture(scope="module", params=["bytes", "characters"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    return Made(folder, (byte_base if request.param == "bytes" else characters_base)(folder / "base"))


# ------------------------------------------------------------------------------------------------ merges


def naive_bpe(symbols: list[str], ranks: dict[Any, int], key: Any) -> list[str]:
    """The textbook: look for the best known pair over the whole word, again and again."""
    symbols = list(symbols)
    while True:
        best = None
        for i in range(len(symbols) - 1):
            rank = ranks.get(key(symbols[i], symbols[i + 1]))
            if rank is not None and (best is None or rank < best[0]):
                best = rank, i
        if best is None:
            return symbols
        i = best[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def naive_learn(words: dict[str, int], ranks: dict[Any, int], key: Any) -> list[Any]:
    """Count every pair of every word afresh before each merge, and encode every word from its characters."""
    ranks, keys = dict(ranks), []
    while True:
        counts: dict[Any, int] = {}
        for word, weight in words.items():
            symbols = naive_bpe(list(word), ranks, key)
            for left, right in pairwise(symbols):
                counts[key(left, right)] = counts.get(key(left, right), 0) + weight
        if not counts:
            return keys
        best = min(counts, key=lambda k: (-counts[k], len("".join(k)), "".join(k), k))
        keys.append(best)
        ranks[best] = len(ranks)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=7), st.integers(1, 4), min_size=1, max_size=8),
    st.lists(st.tuples(*[st.sampled_from(["a", "b", "c", "ab", "bc"])] * 2), max_size=4, unique=True),
    st.sampled_from([by_pair, by_token]),
)
def test_merges_are_those_of_the_naive_algorithm(words: dict[str, int], known: list[Any], key: Any) -> None:
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(key(*pair) for pair in known))}
    start = [(naive_bpe(list(word), ranks, key), weight) for word, weight in words.items()]
    learnt = learn(start, ranks, key, lambda token: (len(token), token))
    assert [key(*pair) for pair in learnt] == naive_learn(words, ranks, key)


def test_merges_of_a_small_case_by_hand() -> None:
    """ab weighs 5 + 2, so it comes first; then abc (5); bd and abd tie at 2: only abd is left to make."""
    learnt = learn([("abc", 5), ("abd", 2)], {}, by_pair, lambda token: (len(token), token))
    assert learnt == [("a", "b"), ("ab", "c"), ("ab", "d")]


def test_ties_go_to_the_shorter_then_the_smaller() -> None:
    def order(token: str) -> tuple[int, str]:
        return len(token), token

    assert learn([(["b", "cc"], 1), (["b", "a"], 1), (["a", "b"], 1)], {}, by_pair, order) == [
        ("a", "b"),
        ("b", "a"),
        ("b", "cc"),
    ]


def test_settle_applies_the_lowest_rank_first() -> None:
    symbols = list("abcab")
    settle(symbols, {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}, by_pair)
    assert symbols == ["abc", "ab"]


# ------------------------------------------------------------------------------------------------ select


def test_select_drops_each_piece_for_its_reason(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    report = Silent()
    pieces = [
        ("▁the", -1.0),  # another script, and known: the first reason counts
        ("▁2024", -1.1),
        ("▁", -1.2),  # a space matches the pattern, and the base has it
        ("▁дом", -2.0),
        ("дома", -3.0),
        ("дом▁на", -3.5),  # the base would split it at the space
        ("кот", -4.0),
        ("▁кит", -5.0),
    ]
    words = select(pieces, base, RUSSIAN, 3, report)
    assert list(words) == [to_byte_level(" дом"), to_byte_level("дома"), to_byte_level("кот")]
    assert list(words.values()) == [135335, 49787, 18315]  # int(1e6 * exp(-2)), exp(-3), exp(-4)
    assert report.notes == [
        "3 words taken of 4; dropped: 1 known to the base, 2 of another script, "
        "1 split by the base's pre-tokenizer"
    ]


def test_the_limit_counts_what_the_script_filter_left(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    pieces = [(f"word{i}", -1.0) for i in range(10)] + [("слово", -9.0), ("дело", -30.0)]
    words = select(pieces, base, RUSSIAN, 2, Silent())
    assert words == {to_byte_level("слово"): 123, to_byte_level("дело"): 1}  # no weight below 1


def test_select_spells_words_as_the_characters_family_does(tmp_path: Path) -> None:
    base = TokenizerJson.read(characters_base(tmp_path / "base"))
    words = select([("▁дом", -1.0), ("дом", -2.0), ("до▁м", -3.0), ("▁", -3.0)], base, RUSSIAN, 9, Silent())
    assert list(words) == ["▁дом", "дом"]


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


def llama_spm(text: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[str]:
    """llama.cpp's SPM tokenizer: any two neighbours that make a token, by score, then by place.

    A token's score is minus its lowest merge rank, as the exporter writes it; tokens without a merge never
    form.
    """
    score: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        score.setdefault(left + right, -rank)
    symbols = list("▁" + text.replace(" ", "▁"))
    left = list(range(-1, len(symbols) - 1))
    right = [*range(1, len(symbols)), -1]
    queue: list[tuple[int, int, int, str]] = []

    def offer(i: int, j: int) -> None:
        if i >= 0 and j >= 0 and symbols[i] + symbols[j] in score:
            heapq.heappush(queue, (-score[symbols[i] + symbols[j]], i, j, symbols[i] + symbols[j]))

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while queue:
        _, i, j, joined = heapq.heappop(queue)
        if not symbols[i] or not symbols[j] or symbols[i] + symbols[j] != joined:
            continue
        symbols[i], symbols[j] = joined, ""
        right[i] = right[j]
        if right[j] >= 0:
            left[right[j]] = i
        offer(left[i], i)
        offer(i, right[i])
    out = []
    for symbol in filter(None, symbols):
        out += [symbol] if symbol in vocab else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return out


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("spm")
    return Made(folder, characters_base(folder / "base"), add_tokens=120)


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
    words = select([("▁рейс", -1.0), ("рейс", -2.0), ("ами", -3.0)], base, RUSSIAN, 3, Silent())
    assert list(words) == ["▁рейс", "рейс", "ами"]
    tokens = extend(base, words, []).backend().encode("рейс рейсами", add_special_tokens=False).tokens
    assert tokens == [start + "рейс", "▁рейс", "ами"]


def test_every_character_of_the_script_becomes_a_token(spm: Made) -> None:
    """Bytes are for the unexpected: a letter that the corpus holds is never spelt in two of them."""
    letters = {char for line in russian_lines() for char in line if char not in " ."}
    assert letters <= spm.new.vocab.keys()
    assert script_characters(["ёж, Ёж 12 fox"], RUSSIAN) == [" ", "Ё", "ж", "ё"]


# ----------------------------------------------------------------------------------- corpus and refusals


def test_lines_are_in_nfc_and_not_blank() -> None:
    assert list(unigram.lines_of(["и\u0306од\n\n  два \n", "три"])) == ["йод", "два", "три"]


@given(st.integers(60, 400), st.integers(1, 80), st.integers(0, 5))
def test_draw_holds_every_fiftieth_and_takes_no_line_twice(count: int, most: int, seed: int) -> None:
    lines = [str(i) for i in range(count)]
    sample = unigram.draw(lines, most, seed)
    assert sample.held == lines[49::50]
    assert len(sample.train) == min(most, count - len(sample.held)) == len(set(sample.train))
    assert not set(sample.train) & set(sample.held)
    assert sample == unigram.draw(lines, most, seed)


def test_draw_is_fair() -> None:
    lines, hits = [str(i) for i in range(100)], dict.fromkeys(range(100), 0)
    for seed in range(600):
        for line in unigram.draw(lines, 20, seed).train:
            hits[int(line)] += 1
    drawn = [hits[i] for i in range(100) if i % 50 != 49]
    assert min(drawn) > 70 and max(drawn) < 180  # expected 600 * 20 / 98 = 122, standard deviation 10


def test_a_corpus_of_few_lines_is_refused() -> None:
    with pytest.raises(InputError, match="12 lines of text; at least 50"):
        unigram.draw(["строка"] * 12, 100, 0)


def test_fewer_pieces_than_asked_for_are_reported() -> None:
    report = Silent()
    pieces = unigram.train(russian_lines(), 30_000, report)
    assert report.notes == [f"the corpus gives {len(pieces) + 3} Unigram pieces, 30000 were asked for"]
    assert ("▁" in dict(pieces)) and all(score <= 0 for _, score in pieces)


def test_fewer_pieces_than_characters_are_refused() -> None:
    with pytest.raises(InputError, match="can not make 10 pieces"):
        unigram.train(russian_lines(), 10, Silent())


def test_pieces_hold_at_most_one_digit() -> None:
    lines = [f"{line} {i % 7}{i % 7}{i % 7}" for i, line in enumerate(russian_lines())]
    pieces = [piece for piece, _ in unigram.train(lines, 300, Silent())]
    assert not [piece for piece in pieces if sum(char.isdigit() for char in piece) > 1]


def test_a_corpus_of_another_language_is_refused(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    with pytest.raises(InputError, match=r"no word of the corpus is left to add; .*'of another script': 2"):
        select([("▁word", -1.0), ("thing", -2.0)], base, RUSSIAN, 9, Silent())


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


def stories(data: Path, folder: Path, files: int) -> Path:
    path = folder / "ru.jsonl"
    found = sorted((data / "text" / "tinystories-ru").glob("*.jsonl"))[:files]
    texts = [json.loads(line)["story"] for file in found for line in file.read_text().splitlines()]
    write_jsonl(path, [{"text": text} for text in texts])
    return path


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
    for line in unigram.lines_of(
        ["Жила-была лиса. Once upon a time, there was a ёжик 🙂!", *russian_lines(200)]
    ):
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

"""The three modes of a new vocabulary: what stays, what goes, and that every id follows its token."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from spm import convert
from vocabularies import (
    ENGLISH,
    NOUNS,
    PLACES,
    VERBS,
    Made,
    byte_base,
    characters_base,
    llama_spm,
    russian_lines,
    stories,
)

from adaptation.extension import extend
from adaptation.sample import lines_of
from adaptation.tokenizer_json import TokenizerJson, renumbered, to_byte_level
from adaptation.uses import closed, count, frame
from adaptation.vocabulary import Settings, run
from export.gguf import write_vocabulary_only
from export.tokenizer.pretokenizers import LLAMA3
from export.tokenizer.vocabulary import read_vocabulary
from foundation.chat import Chat
from foundation.dataio import ROLES, documents, write_jsonl
from foundation.errors import InputError, ModelError, StopRequested
from foundation.llama import LlamaModel
from foundation.report import Silent
from foundation.tokenizer import Tokenizer

MODES: dict[str, dict[str, Any]] = {
    "extension": {},
    "optimised": {"mode": "optimised"},
    "only shrunk": {"mode": "optimised", "add_tokens": 0},
    "substitution": {"mode": "substitution", "vocab_tokens": 420, "trainer": "bpe"},
}
LINES = [*russian_lines(300), *[line for line in ENGLISH if "squat" in line]]  # not every English word is used


def llama3_base(folder: Path) -> Path:
    """Llama 3's way: whole words skip the merges, and to some tokens no merges lead."""
    byte_base(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3
    content["model"]["ignore_merges"] = True
    vocab = content["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}  # no holes, see extended()
    for word in ("Ġcrew", "Ġtrains", "hangar"):
        vocab.setdefault(word, len(vocab))
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != word]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    return folder


BASES = {"bytes": byte_base, "characters": characters_base, "ignore_merges": llama3_base}


@pytest.fixture(scope="module", params=[(base, mode) for base in BASES for mode in MODES], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    base, mode = request.param
    folder = tmp_path_factory.mktemp("made")
    found = Made(folder, BASES[base](folder / "base"), LINES, **MODES[mode])
    found.mode = mode
    return found


# ---------------------------------------------------------------------------------------- in every mode


def test_ids_have_no_gap_and_are_those_the_library_gives(made: Made) -> None:
    assert sorted(made.new.vocab.values()) == list(range(made.new.size))
    assert made.after.get_vocab_size() == made.new.size == made.figures["vocab_tokens"]
    for token, i in made.new.vocab.items():
        assert made.after.token_to_id(token) == i
    if made.mode == "substitution":
        assert made.new.size == 420
    if made.mode == "extension":
        assert made.base.vocab.items() <= made.new.vocab.items()


def test_old_tokens_keep_their_order(made: Made) -> None:
    if made.mode == "substitution":  # a word may come again as a new token
        kept = [token["content"] for token in made.base.added]
    else:
        kept = [token for token in made.base.vocab if token in made.new.vocab]
        kept = [token for token in kept if made.new.vocab[token] < made.new.size - made.figures["tokens_added"]]
    by_old = sorted(kept, key=lambda token: made.base.vocab[token])
    assert by_old == sorted(kept, key=lambda token: made.new.vocab[token])


def test_control_tokens_stay_and_their_ids_follow(made: Made) -> None:
    old, new = made.base.added, made.new.added
    assert [token | {"id": 0} for token in old] == [token | {"id": 0} for token in new]
    assert all(made.new.vocab[token["content"]] == token["id"] for token in new)
    for token in new:
        ids = made.after.encode(f"пилот{token['content']} the", add_special_tokens=False).ids
        assert token["id"] in ids


def test_transformers_loads_it_with_the_same_control_tokens(made: Made) -> None:
    from transformers import AutoTokenizer

    old = AutoTokenizer.from_pretrained(made.base.folder)
    new = AutoTokenizer.from_pretrained(made.out / "tokenizer")
    assert len(new) == made.new.size
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "all_special_tokens", "chat_template"):
        assert getattr(new, name) == getattr(old, name)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(new, f"{name}_id") == made.new.vocab.get(getattr(new, name))
    text = "Экипаж отдыхает после рейса, the crew rests."
    assert (
        new(text, add_special_tokens=False).input_ids == made.after.encode(text, add_special_tokens=False).ids
    )


def test_spelt_control_tokens_are_text(made: Made) -> None:
    """Text from outside never holds a control token, nor does a word that skips the merges."""
    tokenizer = Tokenizer(made.out / "tokenizer")
    control = set(tokenizer.special_tokens.values()) - {made.new.vocab.get(made.new.unknown or "")}
    for token in made.new.added:
        assert not control & set(tokenizer.encode(f"{token['content']} {token['content']}"))


MIXED = st.one_of(
    st.text(
        st.sampled_from("абвгдежзийклмнопрстуфхцчшщъыьэюяёЁЖЙabcxyz 0129.,!-\n\t🙂🛫éß中文ґїѣ\u0301"),
        max_size=40,
    ),
    st.lists(st.sampled_from([*NOUNS, *VERBS, *PLACES, "the", "crew", "squat"]), max_size=6).map(" ".join),
)


@settings(deadline=None, max_examples=80)
@given(MIXED)
def test_decoding_gives_the_text_back(made: Made, text: str) -> None:
    ids = made.after.encode(text, add_special_tokens=False).ids
    assert made.after.decode(ids, skip_special_tokens=False) == text


def test_llama_cpp_encodes_alike(made: Made) -> None:
    path, dice = made.out / "vocabulary.gguf", random.Random(8)
    write_vocabulary_only(path, read_vocabulary(made.out / "tokenizer", made.new.size))
    words = [*NOUNS, *VERBS, *PLACES, "the", "crew", " trains", "hangar", "ѣ", "🙂", "Ёж", "12", "\n"]
    texts = ["".join(dice.choices([*words, " "], k=dice.randint(1, 9))).strip() for _ in range(800)]
    with LlamaModel(path, vocab_only=True) as model:
        for text in texts + LINES[::5]:
            expected = made.after.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, parse_special=False) == expected, text


@pytest.mark.parametrize("made", [("characters", mode) for mode in MODES], indirect=True, ids="-".join)
def test_every_split_of_a_token_is_a_merge(made: Made) -> None:
    """SentencePiece's family: what llama.cpp could merge, tokenizer.json lists; splits of a token together."""
    vocab, merges, ranks = made.new.vocab, set(made.new.merges), Counter[str]()
    atoms = made.new.atoms
    for token in vocab.keys() - atoms:
        splits = {(token[:i], token[i:]) for i in range(1, len(token))}
        assert {cut for cut in splits if cut[0] in vocab and cut[1] in vocab} == splits & merges != set()
    for left, right in made.new.merges:
        ranks[left + right] += 1
    places = [left + right for left, right in made.new.merges]
    for token, times in ranks.items():
        first = places.index(token)
        assert places[first : first + times] == [token] * times
    for line in LINES[::20]:
        assert made.after.encode(line).tokens == llama_spm(line, vocab, made.new.merges)


def test_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    base = byte_base(tmp_path / "base")
    for mode, changes in MODES.items():
        files = []
        for name in ("a", "b"):
            folder = tmp_path / f"{mode}-{name}"
            folder.mkdir()
            out = Made(folder, base, LINES, **changes).out
            paths = sorted(p for p in out.rglob("*") if p.is_file() and ".work" not in p.parts)
            files.append({p.relative_to(out): p.read_bytes() for p in paths})
        assert files[0] == files[1] and len(files[0]) == 5


# ------------------------------------------------------------------------------------------ extension


def test_whole_words_that_skip_the_merges_are_extended_too(tmp_path: Path) -> None:
    base = TokenizerJson.read(llama3_base(tmp_path / "base"))
    words = {to_byte_level(word): 5 for word in ("пилот", " пилот", " объясняет", "ёж")}
    made = extend(base, words, [])
    assert made.content["model"]["ignore_merges"]
    assert all([t.value for t in made.backend().model.tokenize(word)] == [word] for word in words)
    # With letters around it no chunk is the whole word: the merges have to know it as well.
    assert to_byte_level(" пилот") in made.backend().encode("the пилот\u0301").tokens


def test_english_is_cut_as_before_where_whole_words_skip_the_merges(tmp_path: Path) -> None:
    made = Made(tmp_path, llama3_base(tmp_path / "base"), LINES)
    for line in [*ENGLISH[:2], "crew crews hangar hangars 1234 <|late|>", "the the\n\nthe"]:
        assert made.after.encode(line).ids == made.before.encode(line).ids
    assert "Ġcrew" in made.after.encode("the crew").tokens  # to which no merges lead


# ------------------------------------------------------------------------------------------ optimised

PARTS = ["The", "pilot", "lifts", " crew", "runs", " legs", "s", "in", "ra", "re", " ", ".", "ла"]


@pytest.fixture(scope="module", params=list(BASES))
def shrunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("shrunk")
    return Made(folder, BASES[request.param](folder / "base"), LINES, mode="optimised", add_tokens=0)


def naive_steps(base: TokenizerJson, token: str) -> set[str]:
    """All that BPE makes on its way to `token`: the lowest rank first, the leftmost of equals."""
    symbols, steps = list(token), set()
    while len(symbols) > 1:
        found = [
            (base.merges.index((symbols[i], symbols[i + 1])), i)
            for i in range(len(symbols) - 1)
            if (symbols[i], symbols[i + 1]) in base.merges
        ]
        if not found:
            return set()
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        steps.add(symbols[i])
    return steps


def test_what_stays_is_what_is_used_and_what_leads_there(shrunk: Made) -> None:
    used: set[str] = set()
    for line in [*LINES, *frame(shrunk.base.folder)]:
        used.update(shrunk.before.encode(line, add_special_tokens=False).tokens)
    steps = set().union(*(naive_steps(shrunk.base, token) for token in used - shrunk.base.atoms))
    assert shrunk.new.vocab.keys() == shrunk.base.atoms | used | steps
    assert len(shrunk.new.vocab) < len(shrunk.base.vocab)
    assert len(steps - used) > 0  # else this would not show that steps stay


def test_merges_that_are_left_stand_in_their_old_order(shrunk: Made) -> None:
    vocab = shrunk.new.vocab
    kept = [m for m in shrunk.base.merges if m[0] in vocab and m[1] in vocab and m[0] + m[1] in vocab]
    assert shrunk.new.merges == kept


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.text("adeilnprstw .", max_size=20))
)
def test_a_text_whose_tokens_were_kept_is_cut_as_before(shrunk: Made, text: str) -> None:
    before = shrunk.before.encode(text, add_special_tokens=False).tokens
    assume(shrunk.new.vocab.keys() >= set(before))
    assert shrunk.after.encode(text, add_special_tokens=False).tokens == before


def test_the_corpus_is_cut_as_before(shrunk: Made) -> None:
    for line in LINES:
        assert shrunk.after.encode(line).tokens == shrunk.before.encode(line).tokens


def test_tokens_used_less_often_than_asked_go(tmp_path: Path) -> None:
    base = byte_base(tmp_path / "base")
    lines = [*russian_lines(100), "barbell", "squat squat"]
    made = Made(tmp_path, base, lines, mode="optimised", add_tokens=0, keep_from_uses=2)
    uses: Counter[str] = Counter()
    for line in lines:
        uses.update(made.before.encode(line).tokens)
    framing = {token for text in frame(base) for token in made.before.encode(text).tokens}
    wanted = {token for token, times in uses.items() if times >= 2} | framing
    assert made.new.vocab.keys() == closed(made.base, wanted)
    once = {token for token, times in uses.items() if times == 1} - made.new.vocab.keys()
    assert once  # something was there to go


def test_what_the_chat_template_writes_is_cut_as_before(tmp_path: Path) -> None:
    """No line of the corpus names a role; the roles' tokens stay all the same."""
    made = Made(tmp_path, byte_base(tmp_path / "base"), russian_lines(), mode="optimised", add_tokens=0)
    old, new = Chat(Tokenizer(made.base.folder)), Chat(Tokenizer(made.out / "tokenizer"))
    messages = [{"role": role, "content": "Ёж"} for role in ROLES]
    (before,), (after,) = old.encode(messages), new.encode(messages)
    names = [{i: token for token, i in tokenizer.vocab.items()} for tokenizer in (made.base, made.new)]
    assert [names[0][i] for i in before.ids] == [names[1][i] for i in after.ids]
    assert [label != -100 for label in before.labels] == [label != -100 for label in after.labels]
    assert "assistant" in made.new.vocab  # one token of the base, which no Russian line uses


def test_words_are_added_to_what_is_left(tmp_path: Path) -> None:
    made = Made(tmp_path, byte_base(tmp_path / "base"), LINES, mode="optimised")
    start = made.base.shrunk(made.new.vocab.keys() & made.base.vocab.keys())
    assert made.figures["words_added"] == 40
    assert made.new.size - start.size == made.figures["tokens_added"] >= 40
    assert made.figures["tokens_dropped"] == len(made.base.vocab) - start.size > 0
    assert made.new.merges[: len(start.merges)] == start.merges
    assert made.figures["tokens_per_word_after"] < made.figures["tokens_per_word_before"] / 2


class Stops(Silent):
    """Asks to stop after so many files."""

    def __init__(self, files: int) -> None:
        super().__init__()
        self.left = files

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self.left -= 1

    def stop_requested(self) -> bool:
        return self.left <= 0


def test_counting_goes_on_after_the_last_whole_file(tmp_path: Path) -> None:
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    files = []
    for number in range(4):
        files.append(tmp_path / f"{number}.jsonl")
        write_jsonl(files[-1], [{"text": line} for line in LINES[number::4]])
    expected: Counter[int] = Counter()
    for line in LINES:
        expected.update(base.backend().encode(line).ids)
    assert count(base, files, tmp_path / "whole", Silent()) == expected
    with pytest.raises(StopRequested):
        count(base, files, tmp_path / "work", Stops(2))
    assert json.loads((tmp_path / "work" / "uses.json").read_text())["files"] == 2
    for done in files[:2]:
        done.unlink()  # they are not read again
    assert count(base, files, tmp_path / "work", Silent()) == expected


# --------------------------------------------------------------------------------------- substitution


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("trainer", ["unigram", "bpe"])
def test_a_new_vocabulary_knows_bytes_control_tokens_and_the_words_of_the_corpus(
    tmp_path: Path, base: str, trainer: str
) -> None:
    chosen = {"mode": "substitution", "vocab_tokens": 370, "trainer": trainer}
    made = Made(tmp_path, BASES[base](tmp_path / "base"), LINES, **chosen)
    added = {token["content"] for token in made.base.added}
    bytes_ = {t for t in made.base.atoms if len(t) > 1 or base != "characters"}
    assert added | bytes_ <= made.new.vocab.keys()
    assert made.figures["tokens_per_word_after"] < made.figures["tokens_per_word_before"] / 2
    for text in ("пилот отдыхает", "видит"):
        assert len(made.after.encode(text).ids) < len(made.before.encode(text).ids)
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        assert made.new.content[key] == made.base.content[key]
    model = {key: value for key, value in made.base.content["model"].items() if key not in ("vocab", "merges")}
    assert model.items() <= made.new.content["model"].items()


def test_a_new_vocabulary_is_that_of_the_heaviest_merges(tmp_path: Path) -> None:
    """Its merges are the first of those that would make all words whole."""
    made = Made(tmp_path, byte_base(tmp_path / "base"), LINES, mode="substitution", vocab_tokens=350)
    larger_folder = tmp_path / "larger"
    larger_folder.mkdir()
    larger = Made(larger_folder, tmp_path / "base", LINES, mode="substitution", vocab_tokens=370)
    assert larger.new.merges[: len(made.new.merges)] == made.new.merges
    assert {t: i for t, i in larger.new.vocab.items() if i < 350} == made.new.vocab


def test_the_roles_of_a_chat_are_one_token_each(tmp_path: Path) -> None:
    made = Made(tmp_path, byte_base(tmp_path / "base"), russian_lines(), mode="substitution", vocab_tokens=340)
    assert all(made.after.encode(role).tokens == [role] for role in ROLES)


def test_characters_that_no_bytes_could_spell_stay(tmp_path: Path) -> None:
    base = characters_base(tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (base / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    made = Made(tmp_path, base, russian_lines(), mode="substitution", vocab_tokens=400)
    single = {token for token in made.base.vocab if len(token) == 1}
    assert single <= made.new.vocab.keys()
    assert made.after.encode("Qqy").tokens == made.before.encode("Qqy").tokens


def test_a_new_vocabulary_of_an_impossible_size_is_refused(tmp_path: Path) -> None:
    base = byte_base(tmp_path / "base")
    with pytest.raises(InputError, match=r"vocab_tokens = 200, but bytes, .* alone are 260") as refused:
        Made(tmp_path, base, LINES, mode="substitution", vocab_tokens=200)
    assert "above 260" in refused.value.hint
    with pytest.raises(InputError, match=r"the corpus supports a vocabulary of (\d+)") as refused:
        Made(tmp_path, base, LINES, mode="substitution", vocab_tokens=9000)
    size = int(refused.value.hint.rpartition(" ")[2])
    again = tmp_path / "again"
    again.mkdir()
    assert Made(again, base, LINES, mode="substitution", vocab_tokens=size).new.size == size


# ------------------------------------------------------------------------------------- ids in the files


def with_late_start(folder: Path, processor: dict[str, Any]) -> Path:
    """A base whose <s> has the last id and stands before every text, as tokenizer_config.json says as well."""
    byte_base(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    last = max(token["id"] for token in content["added_tokens"]) + 1
    content["added_tokens"].append(content["added_tokens"][0] | {"id": last, "content": "<s>"})
    content["post_processor"] = json.loads(json.dumps(processor).replace('"ID"', str(last)))
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": last,
        "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    listed = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in content["added_tokens"]}
    config |= {"bos_token": "<s>", "added_tokens_decoder": listed}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


START, TEXT = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [START, TEXT],
    "pair": [START, TEXT, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": ["ID"], "tokens": ["<s>"]}},
}
ROBERTA = {
    "type": "RobertaProcessing", "sep": ["<|im_end|>", 2], "cls": ["<s>", "ID"],
    "trim_offsets": True, "add_prefix_space": False,
}  # fmt: skip
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize("mode", ["optimised", "substitution"])
@pytest.mark.parametrize(
    "processor", [TEMPLATE, ROBERTA, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}]
)
def test_every_id_in_the_files_follows_its_token(tmp_path: Path, mode: str, processor: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    base = with_late_start(tmp_path / "base", processor)
    made = Made(tmp_path, base, LINES, **MODES[mode])
    start = made.new.vocab["<s>"]
    assert start != made.base.vocab["<s>"]
    assert made.after.encode("Ёж").ids[0] == start
    assert made.before.encode("Ёж").ids[0] == made.base.vocab["<s>"]
    assert made.new.content["padding"]["pad_id"] == start
    written = json.loads((made.out / "tokenizer" / "tokenizer_config.json").read_text())
    listed = written["added_tokens_decoder"]
    assert {int(i): token["content"] for i, token in listed.items()} == {
        token["id"]: token["content"] for token in made.new.added
    }
    kept = json.loads((base / "tokenizer_config.json").read_text())
    assert written | {"added_tokens_decoder": 0} == kept | {"added_tokens_decoder": 0}
    loaded = AutoTokenizer.from_pretrained(made.out / "tokenizer")
    assert (loaded.bos_token_id, len(loaded)) == (start, made.new.size)


def test_an_extension_leaves_the_configuration_as_it_is(tmp_path: Path) -> None:
    base = with_late_start(tmp_path / "base", TEMPLATE)
    made = Made(tmp_path, base, LINES)
    written = made.out / "tokenizer" / "tokenizer_config.json"
    assert written.read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_a_control_token_that_only_the_configuration_knows_is_refused(tmp_path: Path) -> None:
    base = with_late_start(tmp_path / "base", TEMPLATE)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["999"] = {"content": "<|ghost|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lists \['<\|ghost\|>'\], which tokenizer.json does not have"):
        Made(tmp_path, base, LINES)


def test_processors_without_ids_stay_as_they_are() -> None:
    assert renumbered(None, {}) is None
    assert renumbered(BYTE_LEVEL, {}) == BYTE_LEVEL


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"mode": "substitution"}, "needs vocab_tokens"),
        ({"vocab_tokens": 500}, "is for mode = 'substitution'"),
        ({"add_tokens": 0}, "would change nothing"),
        ({"mode": "optimized"}, "extension"),
        ({"trainer": "wordpiece"}, "unigram"),
        ({"keep_from_uses": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_can_not_be_are_refused(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Settings(**chosen)


@pytest.mark.parametrize("mode", ["extension", "optimised"])
def test_more_words_than_the_corpus_supports_are_refused(tmp_path: Path, mode: str) -> None:
    base = byte_base(tmp_path / "base")
    with pytest.raises(InputError, match=r"add_tokens = 7000, but the corpus supports (\d+) words") as refused:
        Made(tmp_path, base, mode=mode, add_tokens=7000, pieces=9000)
    assert "pieces" not in refused.value.hint
    supported = int(refused.value.message.partition("supports ")[2].split()[0])
    assert f"set add_tokens = {supported};" in refused.value.hint
    (tmp_path / "fits").mkdir()
    fits = Made(tmp_path / "fits", base, mode=mode, add_tokens=supported, pieces=9000)
    assert fits.figures["words_added"] == supported
    with pytest.raises(InputError) as refused:  # here it is the model that is small, not the corpus
        Made(tmp_path, base, mode=mode, add_tokens=7000, pieces=100, trainer="bpe")
    assert "more than pieces = 100" in refused.value.hint


@pytest.mark.parametrize("mode", ["extension", "optimised"])
def test_a_corpus_of_another_script_is_refused_before_anything_is_trained(tmp_path: Path, mode: str) -> None:
    base, report = byte_base(tmp_path / "base"), Silent()
    write_jsonl(tmp_path / "en.jsonl", [{"text": line} for line in ENGLISH])
    inputs = {"model": base, "corpus": (tmp_path / "en.jsonl",)}
    with pytest.raises(InputError, match=r"its letters are 100\.0 % Latin"):
        run(Settings(mode=mode), inputs, tmp_path / "out", report)
    assert not report.notes


def test_a_corpus_whose_words_are_known_is_refused(tmp_path: Path) -> None:
    base = byte_base(tmp_path / "base")
    with pytest.raises(InputError, match="no word of the corpus is left to add; dropped"):
        Made(tmp_path, base, ["ab ba"] * 100, script=" ?[ab]", pieces=100)


def test_room_cuts_the_merges_where_it_ends(tmp_path: Path) -> None:
    """A shorter list of merges is the beginning of the longer one, and still spells."""
    base = TokenizerJson.read(byte_base(tmp_path / "base"))
    words = {to_byte_level(word): weight for weight, word in enumerate(NOUNS, start=1)}
    whole = extend(base, words, [])
    for room in (0, 1, 7, 30):
        made = extend(base, words, [], room)
        assert made.size == base.size + room
        assert whole.merges[: len(made.merges)] == made.merges
        assert made.backend().decode(made.backend().encode("пилот").ids) == "пилот"


# -------------------------------------------------------------------------------------------- real data


def mistral(data: Path, folder: Path) -> Path:
    return convert(data / "tokenizers" / "mistral-v3" / "tokenizer.model", folder)


def alike_in_llama_cpp(made: Path, texts: list[str]) -> None:
    new = TokenizerJson.read(made)
    write_vocabulary_only(made / "vocabulary.gguf", read_vocabulary(made, new.size))
    with LlamaModel(made / "vocabulary.gguf", vocab_only=True) as model:
        for text in texts:
            expected = new.backend().encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, parse_special=False) == expected, text


@pytest.mark.realdata
def test_the_converted_mistral_is_sentencepieces(samovar_data: Path, tmp_path: Path) -> None:
    """The base of the tests below, against SentencePiece itself."""
    from sentencepiece import SentencePieceProcessor

    model = samovar_data / "tokenizers" / "mistral-v3" / "tokenizer.model"
    backend = TokenizerJson.read(mistral(samovar_data, tmp_path)).backend()
    processor = SentencePieceProcessor(model_file=str(model))
    lines = lines_of(documents([stories(samovar_data, tmp_path, 1)]))
    for line in islice(lines, 300):
        assert backend.encode(line, add_special_tokens=False).ids == processor.encode(line)


REAL = {
    "extension": {"add_tokens": 2000},
    "optimised": {"mode": "optimised", "add_tokens": 2000},
    "substitution": {"mode": "substitution", "vocab_tokens": 8000},
}


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("mode", REAL)
@pytest.mark.parametrize("base", ["mistral", "qwen"])
def test_real_tokenizers_in_every_mode(samovar_data: Path, tmp_path: Path, base: str, mode: str) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / base
    if base == "mistral":
        mistral(samovar_data, folder)
    else:
        AutoTokenizer.from_pretrained(samovar_data / "tokenizers" / "qwen2.5").save_pretrained(folder)
    corpus = stories(samovar_data, tmp_path, 2)
    chosen = Settings(pieces=12_000, trainer="bpe", **REAL[mode])
    figures = run(chosen, {"model": folder, "corpus": (corpus,)}, tmp_path / "out", Silent())
    assert figures["tokens_per_word_after"] < 0.8 * figures["tokens_per_word_before"]
    made = tmp_path / "out" / "tokenizer"
    old, new = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(made)
    assert len(new) == figures["vocab_tokens"] and new.all_special_tokens == old.all_special_tokens
    assert new.convert_tokens_to_ids(new.all_special_tokens) == new.all_special_ids
    lines = list(islice(lines_of(documents([corpus])), 300))
    english = (samovar_data / "text" / "grimm-en" / "GrimmsFairyTales.txt").read_text()
    lines += [line for line in islice(lines_of([english]), 100) if "  " not in line]
    for line in lines:
        assert new.decode(new(line, add_special_tokens=False).input_ids) == line
    alike_in_llama_cpp(made, lines)
    if mode == "extension":
        assert new(english).input_ids == old(english).input_ids
    if mode == "optimised":  # with words in it a line is shorter, without them it is what it was
        base = TokenizerJson.read(folder)
        kept = base.shrunk(TokenizerJson.read(made).vocab.keys())
        for line in lines[:300]:
            assert kept.backend().encode(line).tokens == base.backend().encode(line).tokens


HABITS: dict[str, Any] = {
    "truncation": {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "padding": {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>",
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", ["extension", "optimised"])
def test_habits_of_a_tokenizers_training_change_nothing(tmp_path: Path, mode: str) -> None:
    """Truncation, padding and dropout of the file would cut lines, pad counts, and cut words at random."""
    write_jsonl(tmp_path / "text.jsonl", ({"text": line} for line in LINES))
    reports = []
    for name in ("plain", "with habits"):
        base = byte_base(tmp_path / name)
        content = json.loads((base / "tokenizer.json").read_text())
        if name != "plain":
            content |= HABITS
            content["model"]["dropout"] = 0.5
        (base / "tokenizer.json").write_text(json.dumps(content))
        out = tmp_path / f"{name}.out"
        settings = Settings(mode=mode, add_tokens=10, pieces=200)
        run(settings, {"model": base, "corpus": tmp_path / "text.jsonl"}, out, Silent())
        reports.append((out / "report.json").read_text())
    assert reports[0] == reports[1]
    assert Tokenizer(tmp_path / "with habits.out" / "tokenizer").encode(LINES[0]) == (
        Tokenizer(tmp_path / "plain.out" / "tokenizer").encode(LINES[0])
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"continuing_subword_prefix": "##"}, "BPE with continuing_subword_prefix = '##' is not known here"),
        ({"end_of_word_suffix": "</w>"}, "BPE with end_of_word_suffix = '</w>' is not known here"),
        ({"vocab": {}, "merges": []}, "the vocabulary is empty"),
    ],
)
def test_bpe_of_another_spelling_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    base = byte_base(tmp_path)
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"] |= change
    content["added_tokens"] = []
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=said):
        TokenizerJson.read(base)


def test_shrinking_alone_asks_for_no_script(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", ({"text": line} for line in ENGLISH * 2))
    inputs = {"model": byte_base(tmp_path / "base"), "corpus": tmp_path / "text.jsonl"}
    figures = run(Settings(mode="optimised", add_tokens=0), inputs, tmp_path / "out", Silent())
    assert figures["tokens_added"] == 0


@pytest.mark.parametrize(
    "idle",
    [
        {"mode": "substitution", "vocab_tokens": 500, "add_tokens": 5},
        {"mode": "substitution", "vocab_tokens": 500, "script": "[a-z]+"},
        {"mode": "extension", "keep_from_uses": 5},
    ],
)
def test_settings_that_would_do_nothing_are_refused(idle: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="no effect with mode"):
        Settings(**idle)


def test_a_script_that_the_base_always_splits_is_told_so(tmp_path: Path) -> None:
    """Qwen's pre-tokenizer ends a word at a vowel sign of Devanagari: more text can not help."""
    dice = random.Random(3)
    words = [
        "".join(dice.choice("कखगघचछजटडतथदनपबमयरलवसह") + dice.choice("ािीुूेैो") for _ in range(4))
        for _ in range(90)
    ]
    write_jsonl(tmp_path / "text.jsonl", ({"text": " ".join(dice.choices(words, k=8))} for _ in range(300)))
    inputs = {"model": byte_base(tmp_path / "base"), "corpus": tmp_path / "text.jsonl"}
    settings = Settings(script="[ ऀ-ॿ]+", add_tokens=200, pieces=400)
    with pytest.raises(InputError, match="split by the base's pre-tokenizer before any merge") as refused:
        run(settings, inputs, tmp_path / "out", Silent())
    assert "more text will not help" in (refused.value.hint or "")

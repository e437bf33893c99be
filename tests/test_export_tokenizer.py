"""Exported tokenizers against `tokenizers` itself, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import spm
from handmade import (
    SPECIAL,
    TEXTS,
    byte_level,
    empty_model,
    export,
    model_folder,
    sentencepiece_like,
    texts_file,
    write_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import here

from export import verify
from export.gguf import write_vocabulary_only
from export.parity import adversarial
from export.parity.original import load_tokenizer
from export.parity.tokenisation import compare_ids, compare_texts
from export.tokenizer.pretokenizers import QWEN2
from export.tokenizer.sentencepiece import unlisted
from export.tokenizer.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary
from foundation.errors import ModelError
from foundation.llama import LlamaModel
from foundation.report import Silent

FIRST_NEW = 700  # id of the first token of an extension; the rows between stay unused
SAMPLES = (*TEXTS, *adversarial.TEXTS, *adversarial.fuzz(1, 300))


def vocabulary_file(folder: Path, rows: int) -> tuple[Vocabulary, Path]:
    vocabulary = read_vocabulary(folder, rows)
    write_vocabulary_only(folder / "vocabulary.gguf", vocabulary)
    return vocabulary, folder / "vocabulary.gguf"


def differences(folder: Path, path: Path, texts: Any = SAMPLES) -> list[str]:
    """Texts that llama.cpp and tokenizers encode differently."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with LlamaModel(path, vocab_only=True) as model:
        return [t for t in texts if tokenizer.encode(t, add_special_tokens=False).ids != model.tokenize(t)]


def edited(text: str, change: Any) -> str:
    spec = json.loads(text)
    change(spec)
    return json.dumps(spec, ensure_ascii=False)


def test_decomposed_letters_differ_only_under_nfc(tmp_path: Path) -> None:
    vocabulary, path = vocabulary_file(write_tokenizer(tmp_path, byte_level()), 640)
    assert "NFC" in vocabulary.notes[0]
    from tokenizers.normalizers import NFC

    found = differences(tmp_path, path)
    assert found
    assert all(NFC().normalize_str(text) != text for text in found)


def test_types_padding_and_special_ids(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(byte_level())
    tokenizer.add_tokens([AddedToken("новое", normalized=False), AddedToken("two words", normalized=False)])
    tokenizer.add_special_tokens(["<|tool|>"])
    size = tokenizer.get_vocab_size()
    folder = write_tokenizer(tmp_path, tokenizer.to_str())
    vocabulary, path = vocabulary_file(folder, size + 5)
    assert [vocabulary.tokens[i] for i in range(3)] == list(SPECIAL)
    assert vocabulary.types[:3] == [CONTROL] * 3
    assert vocabulary.types[size - 3 : size] == [USER_DEFINED, USER_DEFINED, CONTROL]
    assert vocabulary.tokens[size:] == [f"[PAD{i}]" for i in range(size, size + 5)]
    assert vocabulary.types[size:] == [UNUSED] * 5
    assert vocabulary.types[10] == NORMAL
    assert vocabulary.ids == {"eos": 2, "pad": 0, "bos": 2}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)
    added = adversarial.in_context(["новое", "two words", "<|tool|>", *SPECIAL])
    assert differences(folder, path, added) == []
    with LlamaModel(path, vocab_only=True) as model:
        assert model.vocab_size == size + 5


def test_a_token_that_looks_like_padding_keeps_its_text(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(byte_level())
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"[PAD{size + 2}]", normalized=False)])
    vocabulary, path = vocabulary_file(write_tokenizer(tmp_path, tokenizer.to_str()), size + 4)
    assert vocabulary.tokens[size:] == [
        f"[PAD{size + 2}]",
        f"[PAD{size + 1}]",
        f"[PAD{size + 2}]_",
        f"[PAD{size + 3}]",
    ]
    LlamaModel(path, vocab_only=True).close()


@pytest.mark.parametrize("pairs", [True, False])
def test_extended_vocabulary_with_merges_after_the_special_tokens(pairs: bool, tmp_path: Path) -> None:
    """What adaptation does: new tokens behind everything that was there, merges as strings or pairs."""

    from tokenizers import Tokenizer

    words = ("мышь", "быстрый")
    base = Tokenizer.from_str(byte_level())
    cut = {word: base.encode(word).tokens for word in words}
    assert min(map(len, cut.values())) > 2

    def extend(spec: dict) -> None:
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        for parts in cut.values():
            made = parts[0]
            for part in parts[1:]:  # each merge comes after all old ones, so it joins what they leave
                merges.append([made, part])
                made += part
                vocab.setdefault(made, FIRST_NEW + len(vocab) - len(base.get_vocab()))
        if not pairs:
            spec["model"]["merges"] = [" ".join(m) for m in merges]

    text = edited(byte_level(), extend)
    rows = max(json.loads(text)["model"]["vocab"].values()) + 1
    folder = write_tokenizer(tmp_path, text)
    vocabulary, path = vocabulary_file(folder, rows)
    assert vocabulary.types[base.get_vocab_size()] == UNUSED and vocabulary.types[-1] == NORMAL
    assert (
        differences(folder, path, [*TEXTS, *words, "мышь мышью", "быстрыйбыстрый", " мышь<|im_end|>мышь"]) == []
    )
    with LlamaModel(path, vocab_only=True) as model:
        assert [len(model.tokenize(word)) for word in words] == [1, 1]  # the new tokens are really used


@pytest.fixture(scope="module")
def russian(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(tokenizers' tokenizer, llama.cpp's) of one byte-level vocabulary without a normalizer."""
    from tokenizers import Tokenizer

    text = byte_level((QWEN2,), nfc=False)
    _, path = vocabulary_file(write_tokenizer(tmp_path_factory.mktemp("t"), text), 640)
    with LlamaModel(path, vocab_only=True) as model:
        yield Tokenizer.from_str(text), model


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs", "Cn", "Co")), max_size=80))
def test_any_text_gives_the_same_ids_and_comes_back(russian: Any, text: str) -> None:
    tokenizer, model = russian
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert model.tokenize(text) == ids
    assert model.detokenize(ids) == text


class TestSentencePieceLike:
    CONFIG: ClassVar[dict] = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": None}

    def test_ids_and_scores(self, tmp_path: Path) -> None:
        folder = write_tokenizer(tmp_path, sentencepiece_like(), **self.CONFIG)
        vocabulary, path = vocabulary_file(folder, 600)  # [PAD511] is a row
        assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", True)
        assert vocabulary.notes == []
        assert differences(folder, path, [*SAMPLES, "мама мир hello", "мамамама", "</s>мама<s> мир"]) == []

    def test_unlisted_merges_are_told(self, tmp_path: Path) -> None:
        def drop(spec: dict) -> None:
            spec["model"]["merges"] = [m for m in spec["model"]["merges"] if m != ["▁", "мир"]]

        folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), drop), **self.CONFIG)
        assert "1 merges that tokenizer.json does not list" in read_vocabulary(folder, 400).notes[0]

    def test_without_a_space_put_first(self, tmp_path: Path) -> None:
        def gemma(spec: dict) -> None:
            spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}

        folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), gemma), **self.CONFIG)
        vocabulary, path = vocabulary_file(folder, 400)
        assert vocabulary.add_space_prefix is False
        assert differences(folder, path) == []

    def test_metaspace(self, tmp_path: Path) -> None:
        folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), metaspace("never")), **self.CONFIG)
        vocabulary, path = vocabulary_file(folder, 400)
        assert vocabulary.add_space_prefix is False
        assert differences(folder, path) == []

    def test_what_a_prefix_can_not_express_is_refused(self, tmp_path: Path) -> None:
        folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), metaspace("always")), **self.CONFIG)
        with pytest.raises(ModelError, match="prepend_scheme 'always'"):
            read_vocabulary(folder, 400)
        write_tokenizer(tmp_path, sentencepiece_like(normalized_added=True), **self.CONFIG)
        with pytest.raises(ModelError, match="'слово' is normalized"):
            read_vocabulary(folder, 400)

    def test_beginning_token(self, tmp_path: Path) -> None:
        def add(spec: dict) -> None:
            spec["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }

        folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), add), **self.CONFIG)
        vocabulary, path = vocabulary_file(folder, 400)
        assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)
        with LlamaModel(path, vocab_only=True) as model:
            assert model.tokenize("мама", add_special=True)[0] == 1
            assert model.adds_bos
        write_tokenizer(tmp_path, edited(sentencepiece_like(), add), **self.CONFIG | {"bos_token": "<unk>"})
        with pytest.raises(ModelError, match="adds id 1 as bos, its configuration says 0"):
            read_vocabulary(folder, 400)


class TestASpaceBeforeTheTextAlone:
    """Metaspace with prepend_scheme "first", against transformers, through export.verify's comparison."""

    LINES = tuple(text.strip() for text in TEXTS)
    STARTED = ("", "<s>", "<s>[INST]", "[INST]hello</s><s>[INST] мама [/INST]", " [INST]", "▁hello", "  hello")
    ENDED = ("hello", "hello[INST][/INST]")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Special tokens <unk>, <s>, </s>, [INST], [/INST]; the configuration of a model of 512 rows."""
        control = ("[INST]", "[/INST]")
        (empty_model(tmp_path) / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
        return spm.train([*TEXTS * 30, "hello [INST] мама"], tmp_path, pieces=500, control=control)

    def compared(
        self, folder: Path, lines: tuple[str, ...] = LINES, **changes: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """(what export.verify says of the texts, the special ids that differ); `changes` spoil the file."""
        vocabulary = replace(read_vocabulary(folder, 512), **changes)
        write_vocabulary_only(folder / "vocabulary.gguf", vocabulary)
        tokenizer = load_tokenizer(folder)
        with LlamaModel(folder / "vocabulary.gguf", vocab_only=True) as model:
            ids = compare_ids(tokenizer, model, folder)
            return compare_texts(tokenizer, model, lines, seed=1), ids["different"]

    @pytest.mark.parametrize("split", [False, True])
    def test_with_a_template_chats_are_equal(self, folder: Path, split: bool) -> None:
        spm.metaspace(folder, template=spm.INST, split=split)
        vocabulary = read_vocabulary(folder, 512)
        assert vocabulary.add_space_prefix is False
        assert "llama.cpp puts none, so that chats are tokenised alike" in vocabulary.notes[0]
        groups, ids = self.compared(folder)
        assert ids == [] and all(group["different"] == 0 for group in groups.values())
        assert groups["chat"] == {"equal": 2, "known": 0, "different": 0}
        assert groups["lines"] == {"equal": 0, "known": len(self.LINES), "different": 0}
        # of five contexts two begin with a letter, one with a line end; one with a space, one with the token
        assert groups["added_tokens"] == {"equal": 5 * 2, "known": 5 * 3, "different": 0}

    def test_without_a_template_raw_text_is_equal(self, folder: Path) -> None:
        spm.metaspace(folder)
        vocabulary = read_vocabulary(folder, 512)
        assert vocabulary.add_space_prefix is True and "after every added token" in vocabulary.notes[0]
        groups, ids = self.compared(folder)
        assert ids == [] and all(group["different"] == 0 for group in groups.values())
        assert groups["lines"] == {"equal": len(self.LINES), "known": 0, "different": 0}
        # only the token alone is equal: behind all others some text follows
        assert groups["added_tokens"] == {"equal": 5, "known": 5 * 4, "different": 0}

    @pytest.mark.parametrize(("template", "equal"), [(spm.INST, 7), (None, 5)])
    def test_pieces_of_text(self, folder: Path, template: str | None, equal: int) -> None:
        """STARTED begin with a special token or a space; behind a special token in ENDED stands no text.

        Without a template the first three are equal as well: they hold no text.
        """
        groups, _ = self.compared(spm.metaspace(folder, template=template), self.STARTED + self.ENDED)
        assert groups["lines"] == {"equal": equal, "known": 9 - equal, "different": 0}

    @pytest.mark.parametrize("template", [spm.INST, None])
    def test_the_wrong_way_round_is_different(self, folder: Path, template: str | None) -> None:
        spm.metaspace(folder, template=template)
        groups, ids = self.compared(folder, add_space_prefix=template is not None)
        assert ids == ["text_with_specials"] and groups["added_tokens"]["different"] > 0
        assert groups["chat" if template else "lines"]["equal"] == 0

    @pytest.mark.parametrize("template", [spm.INST, None])
    def test_spaces_excuse_nothing_else(self, folder: Path, template: str | None) -> None:
        """Scores turned round in the file: it joins other letters, whatever the spaces."""
        vocabulary = read_vocabulary(spm.metaspace(folder, template=template), 512)
        assert vocabulary.scores
        groups, _ = self.compared(folder, scores=[-score for score in vocabulary.scores])
        assert groups["lines"]["different"] == len(self.LINES)
        assert groups["adversarial"]["different"] > 10 and groups["chunks"]["different"] == 1

    def test_a_template_that_begins_with_text(self, folder: Path) -> None:
        """Its chats lose their first space: different, until it writes one, which changes no id elsewhere."""
        plain = "User: {{ messages[0].content }}"
        groups, _ = self.compared(spm.metaspace(folder, template=plain))
        assert groups["chat"]["different"] == 2 and groups["lines"]["different"] == 0
        before = load_tokenizer(folder).encode("User: a", add_special_tokens=False)
        groups, _ = self.compared(spm.metaspace(folder, template=" " + plain))
        assert groups["chat"]["equal"] == 2
        assert load_tokenizer(folder).encode(" User: a", add_special_tokens=False) == before

    def test_export_verify_passes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole stage, on a Mistral with [INST] as a control token."""
        monkeypatch.setattr(verify, "in_child", here)
        special = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        folder = model_folder(tmp_path / "hf", "mistral", sliding_window=None, **special)
        spm.train([*TEXTS * 30, "hello [INST] мама"], folder, pieces=500, control=("[INST]", "[/INST]"))
        path = export(spm.metaspace(folder, template=spm.INST), tmp_path / "out")
        inputs = {"model": folder, "gguf": path, "texts": texts_file(tmp_path / "t.jsonl", TEXTS * 20)}
        verify.run(verify.Settings(tokens=64, holdout_tokens=512), inputs, tmp_path, Silent())
        told = json.loads((tmp_path / "verify.json").read_text())
        (file,) = told["files"]
        assert told["passed"] and file["tokenisation"]["chat"]["equal"] == 2
        assert file["tokenisation"]["lines"]["known"] == 80


def metaspace(scheme: str) -> Any:
    def change(spec: dict) -> None:
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        }

    return change


def set_normalizer(spec: dict) -> None:
    spec["normalizer"] = {"type": "Lowercase"}


def set_regex(spec: dict) -> None:
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_normalizer, "Lowercase"),
        (set_regex, r"no pre-tokenizer for `\\p{L}\+`"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges true"),
        (lambda s: s["model"].update(dropout=0.1), "dropout 0.1"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda s: s["model"].update(merges=[]), "without merges"),
        (lambda s: s["added_tokens"][0].update(rstrip=True), r"'<\|endoftext\|>' is rstrip"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "add_prefix_space"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "'Removed'"),
        (lambda s: s["model"]["vocab"].update({"сырой": 620}), "620 'сырой' is not written in the byte-level"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "neither byte-level nor byte-fallback"),
    ],
)
def test_tokenizers_without_a_counterpart_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, edited(byte_level(), change))
    with pytest.raises(ModelError, match=words):
        read_vocabulary(folder, 640)


def test_missing_parts_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(), eos_token=None)
    with pytest.raises(ModelError, match="no end token is named"):
        read_vocabulary(folder, 640)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="can not be read as a tokenizer"):
        read_vocabulary(folder, 640)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        read_vocabulary(folder, 640)


def test_a_second_end_token_ends_too(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(), eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 300]}))
    vocabulary, path = vocabulary_file(folder, 640)
    assert {k: vocabulary.ids[k] for k in ("eos", "eot", "eom")} == {"eos": 2, "eot": 0, "eom": 300}
    with LlamaModel(path, vocab_only=True) as model:
        assert model.eog == {0, 2, 300}


def test_unlisted_merges_are_counted_in_linear_time() -> None:
    import time

    pieces = dict.fromkeys(["a", "b", "ab", "aab"], 0)
    assert unlisted(["aab", "ab", "bab"], pieces, {("a", "ab")}) == 2  # ("a", "b"), ("b", "ab")
    began = time.monotonic()
    assert unlisted(["a" * 30_000 + str(i) for i in range(200)], pieces, set()) == 0
    assert time.monotonic() - began < 2  # alone 0.01; by every cut it would be minutes


def test_splits_at_spaces_that_do_nothing(tmp_path: Path) -> None:
    """Gemma's tokenizer.json has one, after a normalizer that leaves no space."""

    def gemma(spec: dict) -> None:
        spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        spec["pre_tokenizer"] = {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        }  # fmt: skip

    config = TestSentencePieceLike.CONFIG
    folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), gemma), **config)
    vocabulary, path = vocabulary_file(folder, 600)
    assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", False)
    assert differences(folder, path) == []


@pytest.mark.slow
def test_a_vocabulary_of_gemma_s_size_takes_seconds(tmp_path: Path) -> None:
    """262,144 tokens, 6,000 of them added, every split a merge."""
    import random
    import time

    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyzабвгдежзийклмнопрстуфхцчшщъыьэюя"
    control = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{i}>" for i in range(6000))]
    names = dict.fromkeys([*control, *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters])
    pairs = [a + b for a in letters for b in letters]
    names |= dict.fromkeys(pairs)
    while len(names) < 262_144:
        names["".join(draw.choices(pairs, k=draw.randint(2, 3)))] = None
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        [t[:cut], t[cut:]]
        for t in list(vocab)[len(control) + 256 :]
        for cut in range(1, len(t))
        if t[:cut] in vocab and t[cut:] in vocab
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0", "added_tokens": [{"id": vocab[t], "content": t} | flags for t in control],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
    config = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder = write_tokenizer(tmp_path, json.dumps(spec, ensure_ascii=False), **config)
    began = time.monotonic()
    vocabulary, path = vocabulary_file(folder, 262_208)
    assert time.monotonic() - began < 40  # seconds; alone 5
    assert len(vocabulary.tokens) == 262_208
    words = ["".join(draw.choices(pairs, k=9)) + " " for _ in range(300)]
    assert differences(folder, path, words) == []

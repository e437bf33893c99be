"""Exported tokenizers against `tokenizers` itself, against llama.cpp's own vectors, and what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from handmade import SPECIAL, TEXTS, byte_level, sentencepiece_like, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export import adversarial
from export.gguf import write_vocabulary_only
from export.pretokenizers import DIGIT, GPT2, KNOWN, LLAMA3, QWEN2
from export.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary
from foundation.errors import ModelError
from foundation.llama import LlamaModel

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


@pytest.mark.parametrize(("row", "name"), KNOWN.items(), ids=KNOWN.values())
def test_every_pretokenizer_of_the_table(row: tuple, name: str, tmp_path: Path) -> None:
    expressions, ignore_merges = row
    text = edited(byte_level(expressions, nfc=False), lambda s: s["model"].update(ignore_merges=ignore_merges))
    vocabulary, path = vocabulary_file(write_tokenizer(tmp_path, text), 640)
    assert vocabulary.pre == name
    assert differences(tmp_path, path) == []


def test_the_samples_tell_the_pretokenizers_apart(tmp_path: Path) -> None:
    """Otherwise the test above would pass for a table with its names mixed up."""
    made = {}
    for expressions, ignore_merges in KNOWN:
        if not ignore_merges:
            folder = write_tokenizer(tmp_path / str(len(made)), byte_level(expressions, nfc=False))
            vocabulary, _ = vocabulary_file(folder, 640)
            made[vocabulary.pre] = (folder, vocabulary)
    for one, other in itertools.combinations(made, 2):
        found = []
        for name, wrong in ((one, other), (other, one)):
            folder, vocabulary = made[name]
            write_vocabulary_only(folder / "wrong.gguf", replace(vocabulary, pre=wrong))
            found += differences(folder, folder / "wrong.gguf")
        assert found, (one, other)


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
        rows = len(json.loads(sentencepiece_like())["model"]["vocab"]) + 3
        vocabulary, path = vocabulary_file(folder, rows)
        assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", True)
        assert vocabulary.notes == []
        texts = [t for t in SAMPLES if "[PAD" not in t]
        assert differences(folder, path, [*texts, "мама мир hello", "мамамама", "</s>мама<s> мир"]) == []

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
        for scheme in ("first", "always"):
            folder = write_tokenizer(tmp_path, edited(sentencepiece_like(), metaspace(scheme)), **self.CONFIG)
            with pytest.raises(ModelError, match=f"prepend_scheme '{scheme}'"):
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
        (set_regex, r"no pre-tokenizer for '\\\\p{L}\+'"),
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


def test_spellings_of_one_expression(tmp_path: Path) -> None:
    """Line ends as letters or escapes, contractions folded or not: the same pre-tokenizer."""
    for spelled in (
        QWEN2.replace(r"\r", "\r").replace(r"\n", "\n"),
        QWEN2.replace(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        ),
    ):
        vocabulary, path = vocabulary_file(write_tokenizer(tmp_path, byte_level((spelled,), nfc=False)), 640)
        assert vocabulary.pre == "qwen2"
        assert differences(tmp_path, path) == []


def test_gpt2_needs_its_own_expression_only_once() -> None:
    assert KNOWN[((GPT2,), False)] == "gpt-2" and KNOWN[((DIGIT, GPT2), False)] == "smollm"
    assert KNOWN[((LLAMA3,), True)] == "llama-bpe"


@pytest.mark.slow
@pytest.mark.realdata
class TestVectorsOfLlamaCpp:
    """Texts and expected ids that ship with llama.cpp, made by transformers and by nobody here."""

    def vectors(self, samovar_data: Path, name: str) -> list[tuple[str, list[int]]]:
        base = samovar_data / "tokenizers" / "ggml-vocab" / f"ggml-vocab-{name}.gguf"
        texts = Path(f"{base}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
        ids = [[int(i) for i in line.split()] for line in Path(f"{base}.out").read_text().splitlines()]
        assert len(texts) == len(ids) > 40
        return list(zip(texts, ids, strict=True))

    def from_files(self, vocab: dict[str, int], merges: list, split: list, special: list[dict]) -> str:
        """tokenizer.json from a vocabulary and merges."""
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
        for token in special:
            tokenizer.add_special_tokens([AddedToken(token["content"], special=True, normalized=False)])
        return tokenizer.to_str()

    def test_qwen2(self, samovar_data: Path, tmp_path: Path) -> None:
        from tokenizers import Regex, pre_tokenizers

        source = samovar_data / "tokenizers" / "qwen2.5"
        vocab = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
        lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        special = json.loads((source / "tokenizer_config.json").read_text())["added_tokens_decoder"].values()
        split = [pre_tokenizers.Split(Regex(QWEN2), "isolated")]
        text = self.from_files(vocab, merges, split, list(special))
        vocabulary, path = vocabulary_file(write_tokenizer(tmp_path, text), 151_936)
        assert vocabulary.pre == "qwen2"
        with LlamaModel(path, vocab_only=True) as model:
            assert model.vocab_size == 151_936
            wrong = [
                t
                for t, ids in self.vectors(samovar_data, "qwen2")
                if model.tokenize(t, parse_special=False) != ids
            ]
        assert wrong == []

    def test_gpt2(self, samovar_data: Path, tmp_path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(samovar_data / "tokenizers" / "ggml-vocab" / "ggml-vocab-gpt-2.gguf")
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
        text = self.from_files({t: i for i, t in enumerate(tokens)}, merges, [], [{"content": "<|endoftext|>"}])
        folder = write_tokenizer(tmp_path, text, eos_token="<|endoftext|>")
        vocabulary, path = vocabulary_file(folder, len(tokens))
        assert vocabulary.pre == "gpt-2"
        with LlamaModel(path, vocab_only=True) as model:
            wrong = [
                t
                for t, ids in self.vectors(samovar_data, "gpt-2")
                if model.tokenize(t, parse_special=False) != ids
            ]
        assert wrong == []
        assert differences(folder, path) == []


@pytest.mark.slow
@pytest.mark.realdata
def test_mistral_against_sentencepiece(samovar_data: Path, tmp_path: Path) -> None:
    """32,768 pieces; the reference is SentencePiece itself, which made the vocabulary."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    source = samovar_data / "tokenizers" / "mistral-v3" / "tokenizer.model"
    original = sentencepiece.SentencePieceProcessor(model_file=str(source))
    rows = original.get_piece_size()
    vocab = {original.id_to_piece(i): i for i in range(rows)}
    special = [p for p, i in vocab.items() if original.is_control(i) or original.is_unknown(i)]
    cuts = [
        (-original.get_score(i), vocab[piece[:at]], vocab[piece[at:]], piece[:at], piece[at:])
        for piece, i in vocab.items()
        if not original.is_byte(i) and piece not in special
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(cuts)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    config = TestSentencePieceLike.CONFIG
    vocabulary, path = vocabulary_file(write_tokenizer(tmp_path, tokenizer.to_str(), **config), rows)
    assert vocabulary.notes == []
    stories = [json.loads(line)["story"] for line in first_file(samovar_data).open(encoding="utf-8")]
    with LlamaModel(path, vocab_only=True) as model:
        texts = [*SAMPLES, *stories[:200]]
        assert [t for t in texts if original.encode(t) != model.tokenize(t, parse_special=False)] == []
    assert differences(tmp_path, path, texts) == [" " * 40]  # where the two other sides differ among themselves


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_real_tokenizers_on_real_russian(samovar_data: Path, name: str, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(samovar_data / "models" / name, tmp_path / "copy")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    _, path = vocabulary_file(folder, rows)
    stories = [json.loads(line)["story"] for line in first_file(samovar_data).open(encoding="utf-8")]
    assert len(stories) > 100
    assert differences(folder, path, [line for story in stories for line in story.split("\n")[:3]][:2000]) == []


def first_file(samovar_data: Path) -> Path:
    return min((samovar_data / "text" / "tinystories-ru").glob("*.jsonl"))

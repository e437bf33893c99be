"""Exported tokenizers at the bar: llama.cpp's own vectors, real vocabularies, 10,000 real lines.

The references are the ids that ship with llama.cpp, `tokenizers`, and SentencePiece, none of them made here.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import spm
from handmade import write_tokenizer

from export.gguf import write_vocabulary_only
from export.parity import adversarial
from export.parity.tokenisation import compare_texts
from export.tokenizer.pretokenizers import QWEN2
from export.tokenizer.special_tokens import ends_of
from export.tokenizer.vocabulary import CONTROL, NORMAL, USER_DEFINED, Vocabulary, read_vocabulary
from foundation.llama import LlamaModel

pytestmark = [pytest.mark.slow, pytest.mark.realdata]
LINES = 10_000
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@cache
def lines(data: Path) -> tuple[str, ...]:
    """10,000 lines, half of them Russian: stories, tales, single sentences, encyclopedia."""
    out: list[str] = []
    for file in sorted((data / "text" / "tinystories-ru").glob("*.jsonl"))[:4]:
        for line in file.read_text(encoding="utf-8").splitlines():
            out += json.loads(line)["story"].split("\n")
    parts = [[line for line in out if line.strip()][:3700]]
    tales = (data / "text" / "grimm-en" / "GrimmsFairyTales.txt").read_text(encoding="utf-8-sig")
    parts.append([line for line in tales.splitlines() if line.strip()][:3700])
    for end in ("rus", "eng"):
        path = data / "text" / "tatoeba-en-ru" / f"tatoeba.rus-eng.{end}"
        parts.append(path.read_text(encoding="utf-8").splitlines()[:1500])
    for tongue in ("ru", "en"):
        told = json.loads((data / "eval" / "xquad" / f"xquad.{tongue}.json").read_text(encoding="utf-8"))
        paragraphs = [p for article in told["data"] for p in article["paragraphs"]]
        texts = [p["context"] for p in paragraphs] + [q["question"] for p in paragraphs for q in p["qas"]]
        parts.append(texts[:200] + texts[-100:])
    joined = tuple(line for part in parts for line in part)
    assert len(joined) >= LINES
    return joined


def texts(data: Path, added: Iterable[str]) -> list[str]:
    """The lines, whole paragraphs, what tells tokenizers apart, and every added token in context."""
    real = lines(data)
    chunks = ["\n".join(real[i : i + 20]) for i in range(0, len(real), 200)]
    return [*real, *chunks, *adversarial.TEXTS, *adversarial.fuzz(6, 2000), *adversarial.in_context(added)]


def exported(folder: Path, rows: int) -> tuple[Any, LlamaModel, Vocabulary]:
    """tokenizers' tokenizer, llama.cpp's through our export, and what was exported."""
    from tokenizers import Tokenizer

    vocabulary = read_vocabulary(folder, rows)
    write_vocabulary_only(folder / "vocabulary.gguf", vocabulary)
    model = LlamaModel(folder / "vocabulary.gguf", vocab_only=True)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), model, vocabulary


def different(tokenizer: Any, model: LlamaModel, wanted: list[str]) -> list[str]:
    encoded = tokenizer.encode_batch(wanted, add_special_tokens=False)
    return [t for t, e in zip(wanted, encoded, strict=True) if e.ids != model.tokenize(t)]


def added_texts(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


class TestVectorsOfLlamaCpp:
    """Texts and expected ids that ship with llama.cpp; there control tokens in a text are plain letters."""

    def vectors(self, data: Path, name: str) -> list[tuple[str, list[int]]]:
        base = data / "tokenizers" / "ggml-vocab" / f"ggml-vocab-{name}.gguf"
        asked = Path(f"{base}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
        ids = [[int(i) for i in line.split()] for line in Path(f"{base}.out").read_text().splitlines()]
        assert len(asked) == len(ids) > 40
        return list(zip(asked, ids, strict=True))

    def wrong(self, data: Path, name: str, model: LlamaModel) -> list[str]:
        return [t for t, ids in self.vectors(data, name) if model.encode(t) != ids]

    def shipped(self, data: Path, name: str) -> dict[str, Any]:
        """The tokenizer fields of a vocabulary that ships with llama.cpp."""
        import gguf

        reader = gguf.GGUFReader(data / "tokenizers" / "ggml-vocab" / f"ggml-vocab-{name}.gguf")
        start = "tokenizer.ggml."
        return {k.removeprefix(start): f.contents() for k, f in reader.fields.items() if k.startswith(start)}

    @pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
    def test_shipped_files(self, samovar_data: Path, name: str) -> None:
        """Not our export: the binding and the way in which vectors are read."""
        path = samovar_data / "tokenizers" / "ggml-vocab" / f"ggml-vocab-{name}.gguf"
        with LlamaModel(path, vocab_only=True) as model:
            assert self.wrong(samovar_data, name, model) == []

    @pytest.mark.parametrize("made_by", ["transformers", "hand"])
    def test_qwen2(self, samovar_data: Path, tmp_path: Path, made_by: str) -> None:
        source = samovar_data / "tokenizers" / "qwen2.5"
        folder = qwen(samovar_data, tmp_path / "qwen")
        if made_by == "hand":
            vocab = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
            merges = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
            spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
            last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
            spec["model"] |= {"vocab": vocab, "merges": [m for m in merges if m and m[:8] != "#version"]}
            (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        _, model, vocabulary = exported(folder, 151_936)
        with model:
            assert (vocabulary.pre, model.vocab_size) == ("qwen2", 151_936)
            assert self.wrong(samovar_data, "qwen2", model) == []

    def test_gpt2(self, samovar_data: Path, tmp_path: Path) -> None:
        """A tokenizer.json rebuilt from the shipped vocabulary, exported by us."""
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        told = self.shipped(samovar_data, "gpt-2")
        merges = [tuple(m.split(" ")) for m in told["merges"]]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(told["tokens"])}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        folder = write_tokenizer(tmp_path, tokenizer.to_str(), eos_token="<|endoftext|>")
        tokenizer, model, vocabulary = exported(folder, len(told["tokens"]))
        assert vocabulary.pre == "gpt-2"
        with model:
            assert (vocabulary.tokens, vocabulary.merges) == (told["tokens"], told["merges"])
            assert self.wrong(samovar_data, "gpt-2", model) == []
            assert different(tokenizer, model, texts(samovar_data, ["<|endoftext|>"])) == []

    def test_phi3(self, samovar_data: Path, tmp_path: Path) -> None:
        """Llama 2's vocabulary: merges are every split of a token, tokens by the shipped scores."""
        told = self.shipped(samovar_data, "phi-3")
        vocab = {t: i for i, t in enumerate(told["tokens"])}
        normal = [t for t, kind in zip(told["tokens"], told["token_type"], strict=True) if kind == 1]
        splits = [
            (-told["scores"][vocab[t]], cut, t[:cut], t[cut:])
            for t in normal
            for cut in range(1, len(t))
            if t[:cut] in vocab and t[cut:] in vocab
        ]
        other = [(i, t) for i, t in enumerate(told["tokens"]) if told["token_type"][i] in (2, 3, 4)]
        added = [{"id": i, "content": t, "special": True} | FLAGS for i, t in other]
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        spec = {
            "version": "1.0", "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
            "model": {
                "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                "merges": [[left, right] for *_, left, right in sorted(splits)],
            },
        }  # fmt: skip
        config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": None}
        folder = write_tokenizer(tmp_path, json.dumps(spec), **config)
        tokenizer, model, vocabulary = exported(folder, len(vocab))
        with model:
            assert vocabulary.tokens == told["tokens"]
            assert self.wrong(samovar_data, "phi-3", model) == []
            found = different(tokenizer, model, texts(samovar_data, [t for _, t in other]))
            assert all(" " * 15 in t for t in found) and len(found) < 10


def qwen(data: Path, folder: Path) -> Path:
    """The real Qwen2.5 tokenizer as transformers saves it: NFC, 22 added tokens, 151,643 others."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2.5").save_pretrained(folder)
    return folder


def taught_russian(base: Path, data: Path, folder: Path, words: int) -> Path:
    """`base` with Russian words as tokens, by adaptation's stage."""
    from vocabularies import stories

    from adaptation.vocabulary import Settings, run
    from foundation.report import Silent

    folder.mkdir()
    corpus = stories(data, folder, 3)
    settings = Settings(add_tokens=words, pieces=2 * words)
    run(settings, {"model": base, "corpus": (corpus,)}, folder / "out", Silent())
    return folder / "out" / "tokenizer"


def test_qwen_with_russian_words(samovar_data: Path, tmp_path: Path) -> None:
    """Byte-level: 2,000 words and the tokens on the way to them, merges after all of Qwen's own."""
    base = qwen(samovar_data, tmp_path / "base")
    folder = taught_russian(base, samovar_data, tmp_path / "ru", 2000)
    from tokenizers import Tokenizer

    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() + 100
    began = time.monotonic()
    tokenizer, model, vocabulary = exported(folder, rows)
    assert time.monotonic() - began < 60  # seconds; alone 10
    before = len(json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"])
    assert len(vocabulary.merges or []) - before >= 2000
    with model:
        asked = texts(samovar_data, added_texts(tokenizer))
        found = different(tokenizer, model, asked)
        # Qwen composes letters before it cuts, llama.cpp does not: equal once they are composed
        composed = [tokenizer.normalizer.normalize_str(t) for t in found]
        assert [t for t, new in zip(found, composed, strict=True) if t == new] == []
        assert len(found) < 0.1 * len(asked) and not set(found) & set(lines(samovar_data)[:LINES])
        assert [t for t in composed if model.tokenize(t) != tokenizer.encode(t).ids] == []
        russian = lines(samovar_data)[:2000]
        short = sum(len(model.tokenize(t)) for t in russian)
        assert short < 0.75 * sum(
            len(e.ids) for e in Tokenizer.from_file(str(base / "tokenizer.json")).encode_batch(russian)
        )
        assert model.eog == ends_of(vocabulary.tokens, vocabulary.ids)


def sentencepiece_wins(found: list[str], reference: Any, model: LlamaModel) -> bool:
    """True when SentencePiece itself cuts all of `found` as llama.cpp does, and not as tokenizer.json."""
    return all(reference.encode(text) == model.encode(text) for text in found)


def test_mistral(samovar_data: Path, tmp_path: Path) -> None:
    """The real 32,768 pieces. Scores by merge rank stand in the order of tokenizer.model's own."""
    import sentencepiece

    source = samovar_data / "tokenizers" / "mistral-v3" / "tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    folder = spm.convert(source, tmp_path / "mistral")
    tokenizer, model, vocabulary = exported(folder, reference.get_piece_size())
    assert vocabulary.notes == [] and vocabulary.scores is not None
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    made = {left + right for left, right in merges}
    ours = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    by_rank = sorted(made, key=lambda t: -ours[t])
    true = [reference.get_score(reference.piece_to_id(t)) for t in by_rank]
    assert len(made) > 28_000 and true == sorted(true, reverse=True)
    with model:
        asked = texts(samovar_data, added_texts(tokenizer))
        real = lines(samovar_data)
        assert [t for t in real if reference.encode(t) != model.encode(t)] == []
        found = different(tokenizer, model, asked)
        assert not set(found) & set(real) and len(found) < 10
        assert sentencepiece_wins(found, reference, model)

    true = Vocabulary(
        **{**vars(vocabulary), "scores": [reference.get_score(i) for i in range(len(vocabulary.tokens))]}
    )
    write_vocabulary_only(tmp_path / "true.gguf", true)
    with (
        LlamaModel(tmp_path / "true.gguf", vocab_only=True) as by_score,
        LlamaModel(folder / "vocabulary.gguf", vocab_only=True) as by_rank,
    ):
        assert [t for t in asked if by_score.tokenize(t) != by_rank.tokenize(t)] == []


@pytest.mark.parametrize("template", [spm.INST, None])
def test_mistral_as_transformers_5_saves_it(samovar_data: Path, tmp_path: Path, template: str | None) -> None:
    """A space where a text begins and nowhere else: chats equal with a template, raw text without."""
    from transformers import AutoTokenizer

    base = spm.convert(samovar_data / "tokenizers" / "mistral-v3" / "tokenizer.model", tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert (content["normalizer"], content["pre_tokenizer"]["prepend_scheme"]) == (None, "first")
    _, model, vocabulary = exported(tmp_path / "saved", len(tokenizer))
    assert vocabulary.add_space_prefix is (template is None)
    real = lines(samovar_data)
    with model:
        groups = compare_texts(tokenizer, model, real, seed=6)
    assert [name for name, group in groups.items() if group["different"]] == []
    assert len(added_texts(tokenizer.backend_tokenizer)) > 700
    spaced = sum(line.startswith((" ", "▁")) for line in real)
    if template:
        assert groups["chat"] == {"equal": 2, "known": 0, "different": 0}
        assert groups["lines"] == {"equal": spaced, "known": len(real) - spaced, "different": 0}
    else:
        assert groups["lines"] == {"equal": len(real) - spaced, "known": spaced, "different": 0}

    wrong = replace(vocabulary, add_space_prefix=template is not None)
    write_vocabulary_only(tmp_path / "wrong.gguf", wrong)
    with LlamaModel(tmp_path / "wrong.gguf", vocab_only=True) as model:
        groups = compare_texts(tokenizer, model, real[:100], seed=6)
    assert groups["chat" if template else "lines"]["equal"] == 0 and groups["added_tokens"]["different"] > 700


def test_mistral_with_russian_words(samovar_data: Path, tmp_path: Path) -> None:
    base = spm.convert(samovar_data / "tokenizers" / "mistral-v3" / "tokenizer.model", tmp_path / "base")
    folder = taught_russian(base, samovar_data, tmp_path / "ru", 1000)
    from tokenizers import Tokenizer

    tokenizer, model, vocabulary = exported(
        folder, Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    )
    assert len(vocabulary.tokens) > 33_700
    with model:
        found = different(tokenizer, model, texts(samovar_data, added_texts(tokenizer)))
        assert all(" " * 15 in t for t in found) and len(found) < 10


@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_small_models(samovar_data: Path, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(samovar_data / "models" / name, tmp_path / "copy")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer, model, vocabulary = exported(folder, rows)
    with model:
        added = added_texts(tokenizer)
        found = different(tokenizer, model, texts(samovar_data, added))
        if vocabulary.model == "t5":  # no space is put before a piece of text that is nothing but spaces
            between = re.compile("|".join(map(re.escape, added)))
            found = [t for t in found if not any(p and not p.strip(" ") for p in between.split(t))]
        assert found == []
        assert model.eog == ends_of(vocabulary.tokens, vocabulary.ids)


TAGS = ("<table>", "</table>", "<b>", "</b>", "<s>", "</s>", "<h1>", "</h1>")  # plain added tokens in Gemma


def gemma_like(data: Path, folder: Path, runs_added: bool) -> Path:
    """A vocabulary made as Gemma's: SentencePiece's BPE, then transformers' own list of merges.

    HTML tags are added tokens, not special, not normalized; so may runs of 2 to 31 line ends and spaces be.
    6,242 <unusedN>; no space put first; the split at spaces that does nothing.
    """
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges

    folder.mkdir(parents=True)
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    unused = [f"<unused{i}>" for i in range(6242)]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    runs = ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
    (folder / "corpus.txt").write_text("\n".join(lines(data)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), model_type="bpe", vocab_size=6000,
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", character_coverage=0.9999, minloglevel=2, num_threads=1,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [trained.id_to_piece(i) for i in range(3, trained.get_piece_size())]
    plain = [*runs, *TAGS]
    names = [*control, *turns, *plain, *(p for p in pieces if p not in plain), *unused]
    vocab = {name: i for i, name in enumerate(names)}
    letters = [p for p in pieces if p[:3] != "<0x"]
    scores = dict.fromkeys(runs, 0.0) | {p: trained.get_score(trained.piece_to_id(p)) for p in letters}
    added = [
        {"id": vocab[t], "content": t, "special": t not in plain} | FLAGS
        for t in [*control, *turns, *(plain if runs_added else TAGS), *unused]
    ]
    spec = {
        "version": "1.0", "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": [list(pair) for pair in generate_merges(vocab, scores)],
        },
    }  # fmt: skip
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_tokenizer(folder, json.dumps(spec, ensure_ascii=False), **config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, vocab["<end_of_turn>"]]}))
    return folder


@pytest.mark.parametrize("runs_added", [True, False])
def test_gemma_like(samovar_data: Path, tmp_path: Path, runs_added: bool) -> None:
    folder = gemma_like(samovar_data, tmp_path / "gemma", runs_added)
    tokenizer, model, vocabulary = exported(folder, 12_600)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<unused6241>"] == kinds["<end_of_turn>"] == CONTROL
    assert kinds["▁▁"] == kinds["\n\n\n"] == (USER_DEFINED if runs_added else NORMAL)
    assert kinds["</b>"] == USER_DEFINED
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (True, False, False)
    assert any("also ends a generation at '</s>'" in note for note in vocabulary.notes)
    with model:
        runs = [(n, m) for n in range(45) for m in (0, 1, 5, 31, 40)]
        gaps = ["a" + " " * n + "b\n" + "\n" * m + " " * m + "x" for n, m in runs]
        asked = [*texts(samovar_data, added_texts(tokenizer)), *gaps]
        assert len(asked) > 40_000
        assert different(tokenizer, model, asked) == []
        assert model.tokenize("hello", add_special=True)[0] == 2
        assert model.eog == ends_of(vocabulary.tokens, vocabulary.ids) >= {1, vocabulary.ids["eot"]}

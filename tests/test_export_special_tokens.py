"""Special and added tokens: what llama.cpp makes of them, what ends a generation, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from handmade import SPECIAL, byte_level, sentencepiece_like, write_tokenizer

from export.gguf import write_vocabulary_only
from export.parity import adversarial
from export.tokenizer.pretokenizers import BLOOM
from export.tokenizer.special_tokens import ALWAYS_READ, CONTROL_BY_TEXT, ENDS_BY_TEXT, ends_of, overlapping
from export.tokenizer.vocabulary import NORMAL, USER_DEFINED, Vocabulary, read_vocabulary
from foundation.errors import ModelError
from foundation.llama import LlamaModel

SPM = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": None}


def with_added(text: str, tokens: list[str], **flags: bool) -> str:
    """tokenizer.json with added tokens; special ones unless said otherwise."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(text)
    flags = {"special": True, "normalized": False} | flags
    tokenizer.add_tokens([AddedToken(token, **flags) for token in tokens])
    if flags["special"]:
        tokenizer.add_special_tokens([AddedToken(token, **flags) for token in tokens])
    return tokenizer.to_str()


def opened(folder: Path, rows: int) -> tuple[Any, LlamaModel, Vocabulary]:
    from tokenizers import Tokenizer

    vocabulary = read_vocabulary(folder, rows)
    write_vocabulary_only(folder / "vocabulary.gguf", vocabulary)
    model = LlamaModel(folder / "vocabulary.gguf", vocab_only=True)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), model, vocabulary


def different(tokenizer: Any, model: LlamaModel, texts: list[str]) -> list[str]:
    return [t for t in texts if tokenizer.encode(t, add_special_tokens=False).ids != model.tokenize(t)]


@pytest.mark.parametrize(
    ("listed", "keys"),
    [
        ([2], {"eos": 2}),
        ([2, 0], {"eos": 2, "eot": 0}),
        ([0, 2], {"eos": 2, "eot": 0}),  # the tokenizer's own end stays eos
        ([2, 0, 300], {"eos": 2, "eot": 0, "eom": 300}),
        ([2, 300, 301], {"eos": 2, "eot": 300, "eom": 301}),
        ([2, 0, 300, 301], {"eos": 2, "eot": 300, "eom": 301}),  # 0 is <|endoftext|>, known by its text
        (300, {"eos": 2, "eot": 300}),
        ([2, 9999], {"eos": 2}),  # no such row
    ],
)
def test_every_end_ends(listed: Any, keys: dict[str, int], tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(), eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 305}))  # counts only without the other
    _, model, vocabulary = opened(folder, 640)
    with model:
        assert {k: i for k, i in vocabulary.ids.items() if k in ("eos", "eot", "eom")} == keys
        wanted = {i for i in (listed if isinstance(listed, list) else [listed]) if i < 640} | {2}
        assert model.eog == ends_of(vocabulary.tokens, vocabulary.ids) == wanted | {0, 2}


def test_more_ends_than_keys_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(), eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300, 301, 302]}))
    with pytest.raises(ModelError, match=r"ends at 2 '<\|im_end\|>', 300 .*, 301 .*, 302 .*three ends at most"):
        read_vocabulary(folder, 640)


def test_config_names_the_ends_where_generation_config_does_not(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(), eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 305]}))
    assert read_vocabulary(folder, 640).ids["eot"] == 305


def test_all_texts_that_llama_cpp_knows(tmp_path: Path) -> None:
    """Which tokens it ends at, control or not, one by one: the lists are llama.cpp's own, checked by it."""
    for text in sorted((CONTROL_BY_TEXT | ALWAYS_READ | {"<|other|>"}) - set(SPECIAL)):
        folder = write_tokenizer(tmp_path, with_added(byte_level(), [text], special=False))
        _, model, vocabulary = opened(folder, 640)
        with model:
            assert model.eog == ends_of(vocabulary.tokens, vocabulary.ids), text
            noted = [n for n in vocabulary.notes if repr(text) in n]
            assert any("also ends" in n for n in noted) == (len(model.eog) > 2) >= (text in ENDS_BY_TEXT), text
            number = vocabulary.tokens.index(text)
            read = model.tokenize(f"a{text}b", parse_special=False)
            made_control = text in CONTROL_BY_TEXT
            assert (number not in read) == made_control, text
            assert any("makes control tokens" in n for n in noted) == made_control, text


def test_an_ordinary_token_that_no_text_gives_is_left_out(tmp_path: Path) -> None:
    """As Qwen2.5's "</s>": the cut parts "</", "s" and ">", so that its merge never comes to pass."""
    spec = json.loads(byte_level(nfc=False))
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for left, right in (("<", "/"), ("</", "s"), ("</s", ">")):
        vocab.setdefault(left + right, max(vocab.values()) + 1)
        merges.append([left, right])
    folder = write_tokenizer(tmp_path, json.dumps(spec))
    tokenizer, model, vocabulary = opened(folder, 640)
    number = vocab["</s>"]
    texts = ["</s>", "a</s>b", " </s> ", "x </s></s>", *adversarial.TEXTS]
    with model:
        assert different(tokenizer, model, texts) == []
        assert number not in model.eog and number not in model.tokenize("".join(texts))
    assert f"left out: {number} '</s>'" in vocabulary.notes[-1]
    # what would be without it
    vocabulary.tokens[number], vocabulary.types[number] = "</s>", NORMAL
    write_vocabulary_only(folder / "plain.gguf", vocabulary)
    with LlamaModel(folder / "plain.gguf", vocab_only=True) as model:
        assert number in model.eog and different(tokenizer, model, texts) != []
    # the end itself stays, and so does a token that texts do give: this cut keeps "</s>" whole
    vocabulary = read_vocabulary(write_tokenizer(tmp_path, json.dumps(spec), eos_token="</s>"), 640)
    assert vocabulary.tokens[vocabulary.ids["eos"]] == "</s>"
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = BLOOM
    _, model, vocabulary = opened(write_tokenizer(tmp_path, json.dumps(spec)), 640)
    with model:
        assert vocabulary.tokens[number] == "</s>" and number in model.eog
        assert any("makes control tokens of '</s>'" in note for note in vocabulary.notes)


def test_tokens_read_in_any_text_are_told(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, with_added(byte_level(), ["<|channel|>", "<|quiet|>"]))
    _, model, vocabulary = opened(folder, 640)
    assert any("'<|channel|>' as tokens in any text" in n for n in vocabulary.notes)
    with model:
        found = model.tokenize("<|channel|><|quiet|>", parse_special=False)
        assert [vocabulary.tokens.index(t) in found for t in ("<|channel|>", "<|quiet|>")] == [True, False]


def test_the_end_of_a_part_does_not_end(tmp_path: Path) -> None:
    """llama.cpp drops <|end|> and </s> from the ends where other tokens show that they mean something else."""
    for texts in (["<|end|>", "<|return|>", "<|call|>"], ["<|end|>", "<|flush|>", "<|calls|>"],
                  ["<|end|>", "<|flush|>"], ["</s>", "<|tool_response>"]):  # fmt: skip
        folder = write_tokenizer(tmp_path, with_added(byte_level(), texts))
        _, model, vocabulary = opened(folder, 640)
        with model:
            assert model.eog == ends_of(vocabulary.tokens, vocabulary.ids), texts


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("special", [True, False])
def test_stripping_and_word_borders_are_refused_for_good_reason(
    flag: str, special: bool, tmp_path: Path
) -> None:
    """llama.cpp has no such thing: without the refusal, ids would differ."""
    text = with_added(byte_level(nfc=False), ["<mask>"], special=special)
    tokenizer, model, _ = opened(write_tokenizer(tmp_path, text), 640)
    with model:
        assert different(tokenizer, model, ["a <mask> b", "a<mask>b"]) == []
        spec = json.loads(text)
        spec["added_tokens"][-1][flag] = True
        write_tokenizer(tmp_path, json.dumps(spec))
        tokenizer = type(tokenizer).from_file(str(tmp_path / "tokenizer.json"))
        assert different(tokenizer, model, ["a <mask> b", "a<mask>b"]) != []
    with pytest.raises(ModelError, match=f"'<mask>' is {flag}"):
        read_vocabulary(tmp_path, 640)


def test_overlapping_tokens(tmp_path: Path) -> None:
    cases = {("ab", "bcd"): ["abcd"], ("abc", "cd"): [], ("xx", "xxx"): []}
    for tokens, told in cases.items():
        text = with_added(byte_level(nfc=False), list(tokens), special=False)
        tokenizer, model, vocabulary = opened(write_tokenizer(tmp_path, text), 640)
        with model:
            texts = [*adversarial.in_context(tokens), "abcd", "abc", "abcbcdab", "x" * 7, "xxx xx x"]
            found = different(tokenizer, model, texts)
        found_here = [t for t in found if t in told]
        assert overlapping(json.loads(text)["added_tokens"]) == told, tokens
        assert bool(found) == bool(told) and found_here == told, (tokens, found)
        assert any("overlap" in n for n in vocabulary.notes) == bool(told)


def test_equally_long_tokens_that_overlap_are_told() -> None:
    """llama.cpp sorts them by length alone, and not stably."""
    tokens = [{"content": t, "normalized": False} for t in ("ab", "bc", "<a>", "<b>")]
    assert overlapping(tokens) == ["abc"]


def test_overlaps_of_gemma_cost_little() -> None:
    import time

    texts = (
        [f"<unused{i}>" for i in range(6242)]
        + ["\n" * n for n in range(1, 32)]
        + ["▁" * n for n in range(2, 32)]
    )
    began = time.monotonic()
    assert overlapping([{"content": t, "normalized": False} for t in texts]) == []
    assert time.monotonic() - began < 10  # alone 0.5


def test_normalized_tokens(tmp_path: Path) -> None:
    """Matched in the normalized text: where that is the text itself all is well, else it is refused."""

    def gemma(text: str) -> str:
        spec = json.loads(text)
        spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        return json.dumps(spec)

    text = with_added(gemma(sentencepiece_like()), ["слово"], normalized=True, special=False)
    tokenizer, model, vocabulary = opened(write_tokenizer(tmp_path, text, **SPM), 420)
    with model:
        assert vocabulary.types[vocabulary.tokens.index("слово")] == USER_DEFINED
        assert different(tokenizer, model, adversarial.in_context(["слово"])) == []
    text = with_added(gemma(sentencepiece_like()), ["▁▁"], normalized=True, special=False)
    with pytest.raises(ModelError, match=r"'▁▁' is normalized \(and holds ▁"):
        read_vocabulary(write_tokenizer(tmp_path, text, **SPM), 420)
    text = with_added(byte_level(), ["и\u0306"], normalized=True, special=False)
    with pytest.raises(ModelError, match=r"is normalized \(and not composed"):
        read_vocabulary(write_tokenizer(tmp_path, text), 640)


def test_letters_that_join_to_a_control_token_are_told(tmp_path: Path) -> None:
    """llama.cpp joins any two neighbours that make a token, with no regard to what kind of token."""
    spec = json.loads(sentencepiece_like())
    vocab = spec["model"]["vocab"]
    for piece in ("<", "/", "s", ">", "</", "s>"):
        vocab.setdefault(piece, max(vocab.values()) + 1)
    spec["model"]["merges"] += [["<", "/"], ["s", ">"]]
    tokenizer, model, vocabulary = opened(write_tokenizer(tmp_path, json.dumps(spec), **SPM), 420)
    with model:
        assert 2 in model.encode("</s>")
    tokenizer.encode_special_tokens = True
    assert 2 not in tokenizer.encode("</s>").ids
    assert "join letters to the control tokens '<s>', '</s>'" in "".join(vocabulary.notes)


def test_files_that_disagree(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level(), added_tokens_decoder={"700": {"content": "<|new|>"}})
    with pytest.raises(ModelError, match=r"tokenizer_config.json adds token 700 '<\|new\|>'"):
        read_vocabulary(folder, 800)
    folder = write_tokenizer(tmp_path, byte_level(), eos_token="<|stop|>")
    with pytest.raises(ModelError, match=r"eos_token '<\|stop\|>' is not in tokenizer.json"):
        read_vocabulary(folder, 640)
    spec = json.loads(byte_level())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 900, "content": "<|far|>"})
    with pytest.raises(ModelError, match=r"'<\|far\|>' has id 900 in tokenizer.json, but .* gives it \d+"):
        read_vocabulary(write_tokenizer(tmp_path, json.dumps(spec)), 1000)


def test_no_beginning_token_is_not_id_one(tmp_path: Path) -> None:
    """llama.cpp takes id 1 of an SPM vocabulary, id 11 of a byte-level one, for the beginning unless told."""
    folder = write_tokenizer(tmp_path, sentencepiece_like(), **SPM | {"bos_token": None})
    _, model, vocabulary = opened(folder, 400)
    with model:
        assert model.bos == vocabulary.ids["bos"] == vocabulary.ids["eos"] == 2
        assert not model.adds_bos


def test_rows_and_texts(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, byte_level())
    last = json.loads(byte_level())["model"]["vocab"]
    size = max(last.values()) + 1
    with pytest.raises(
        ModelError, match=rf"ids up to {size - 1} \('.+'\), the model only {size - 3} .*\(3 tokens"
    ):
        read_vocabulary(folder, size - 3)
    spec = json.loads(byte_level())
    spec["model"]["vocab"] = {k: v for k, v in spec["model"]["vocab"].items() if k != "Ā"}
    spec["model"]["unk_token"] = SPECIAL[0]
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "Ā" not in "".join(m)]
    with pytest.raises(ModelError, match="lacks 1 of the 256 byte letters and has unk_token"):
        read_vocabulary(write_tokenizer(tmp_path, json.dumps(spec)), 640)


def test_a_merge_listed_twice_has_its_later_rank(tmp_path: Path) -> None:
    spec = json.loads(byte_level(nfc=False))
    merges = spec["model"]["merges"]
    spec["model"]["merges"] = [*merges, merges[0], merges[7]]
    tokenizer, model, vocabulary = opened(write_tokenizer(tmp_path, json.dumps(spec)), 640)
    from tokenizers import Tokenizer

    once = Tokenizer.from_str(byte_level(nfc=False))
    texts = ["Мама мыла раму", "Привет, как дела", "hello world, ёжик"] * 3 + [*adversarial.TEXTS]
    with model:
        assert any(once.encode(t).ids != tokenizer.encode(t).ids for t in texts)  # it matters
        assert different(tokenizer, model, texts) == []
    assert len(vocabulary.merges or []) == len(merges)

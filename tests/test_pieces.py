"""What tokens were before: the same token, pieces under old merges, within and across the two families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from handmade import sentencepiece_like
from other_vocabularies import KINDS, WORDS, Kind, before, new_vocabulary
from tiny import tiny_tokenizer

from adaptation.pieces import kept, token_map
from adaptation.tokenizer_json import TokenizerJson, byte_alphabet, to_byte_level
from foundation.errors import ModelError
from foundation.tokenizer import Tokenizer

FILE = "tokenizer.json"


def with_tokens(old: TokenizerJson, *tokens: str) -> TokenizerJson:
    """`old` with plain tokens that no merge makes."""
    return old.extended(list(tokens), old.merges)


def with_control(old: TokenizerJson, *tokens: str) -> TokenizerJson:
    """`old` with added tokens."""
    added = [old.added[0] | {"content": token, "id": i} for i, token in enumerate(tokens, start=old.size)]
    return TokenizerJson(old.folder, old.content | {"added_tokens": [*old.added, *added]})


def characters(folder: Path, **model: Any) -> TokenizerJson:
    """The SentencePiece-like tokenizer of the export tests; `model` replaces parts of its model."""
    folder.mkdir()
    content = json.loads(sentencepiece_like())
    content["model"] |= model
    (folder / FILE).write_text(json.dumps(content), encoding="utf-8")
    return TokenizerJson.read(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_against_a_naive_bpe(tmp_path: Path, kind: Kind) -> None:
    old = tiny_tokenizer(tmp_path / "old")
    new = new_vocabulary(kind, old, tmp_path / "new")
    expected = before(new, old)
    found = token_map(*(TokenizerJson.read(folder) for folder in (new, old)))
    assert dict(enumerate(found)) == expected
    same = kept(*(TokenizerJson.read(folder) for folder in (new, old)))
    spelling = [{i: t for t, i in TokenizerJson.read(folder).vocab.items()} for folder in (new, old)]
    assert all(spelling[0][i] == spelling[1][j] for i, j in same.items())
    assert {spelling[0][i] for i in same} == set(spelling[0].values()) & set(spelling[1].values())


def test_pieces_of_a_word_are_what_the_old_tokenizer_makes_of_it(tmp_path: Path) -> None:
    old = tiny_tokenizer(tmp_path / "old")
    new = TokenizerJson.read(new_vocabulary("extension", old, tmp_path / "new"))
    pieces = token_map(new, TokenizerJson.read(old))
    assert [pieces[new.vocab[to_byte_level(word)]] for word in WORDS] == [
        Tokenizer(old).encode(word) for word in WORDS
    ]


def test_half_a_character_has_its_bytes_as_pieces(tmp_path: Path) -> None:
    old = TokenizerJson.read(tiny_tokenizer(tmp_path / "old"))
    alphabet = byte_alphabet()
    token = alphabet[0xD1] + alphabet[0x84] + alphabet[0xD1]  # ф, and the first byte of another letter
    ids = token_map(with_tokens(old, token), old)[-1]
    assert "".join(next(t for t, i in old.vocab.items() if i == piece) for piece in ids) == token


@pytest.mark.parametrize("token", ["", "a b", "слово"])
def test_a_token_without_pieces_is_refused(tmp_path: Path, token: str) -> None:
    """A space or a Cyrillic letter is not in the byte alphabet: the library drops what it does not know."""
    old = TokenizerJson.read(tiny_tokenizer(tmp_path / "old"))
    with pytest.raises(ModelError, match=f"token {token!r} of .* has no pieces"):
        token_map(with_tokens(old, token), old)


def test_a_new_control_token_is_read_as_text(tmp_path: Path) -> None:
    old = TokenizerJson.read(tiny_tokenizer(tmp_path / "old"))
    found = token_map(with_control(old, "<think>", "<|im_end|> <|pad|>"), old)
    assert found[:400] == [[i] for i in range(400)]
    texts = Tokenizer(old.folder)  # reads control tokens in a text as plain characters
    assert found[400:] == [texts.encode("<think>"), texts.encode("<|im_end|> <|pad|>")]
    assert not {0, 1, 2} & {i for ids in found[400:] for i in ids}


def test_a_control_token_is_not_the_word_that_is_spelt_alike(tmp_path: Path) -> None:
    """In both directions; being special or not makes no difference."""
    old = TokenizerJson.read(tiny_tokenizer(tmp_path / "old"))
    word = next(t for t in old.vocab if len(t) > 3 and t.isalpha() and t.isascii())
    promoted = TokenizerJson(
        old.folder,
        old.content | {"added_tokens": [*old.added, old.added[0] | {"content": word, "id": old.vocab[word]}]},
    )
    plain = TokenizerJson(old.folder, old.content | {"added_tokens": [old.added[0] | {"special": False}]})
    assert old.vocab[word] not in kept(promoted, old) and len(kept(promoted, old)) == 399
    assert old.vocab[word] not in kept(old, promoted)
    assert kept(plain, old).keys() == set(range(400)) - {1, 2}


def test_an_id_without_a_token_has_no_pieces(tmp_path: Path) -> None:
    old = TokenizerJson.read(tiny_tokenizer(tmp_path / "old"))
    model = old.content["model"]
    gap = TokenizerJson(
        old.folder, old.content | {"model": model | {"vocab": model["vocab"] | {to_byte_level("мама"): 402}}}
    )
    found = token_map(gap, old)
    assert found[400:402] == [[], []] and found[402] == Tokenizer(old.folder).encode("мама")


# ------------------------------------------------------------------------------------------- SentencePiece


def test_pieces_under_scored_merges_are_byte_tokens_where_a_character_is_unknown(tmp_path: Path) -> None:
    """▁мама: first ▁м, then the right ма, then ▁м and а. ъ is in no text, so it is its two bytes."""
    old = characters(tmp_path / "old")
    found = token_map(with_tokens(old, "▁мама", "ъ", "▁мъ"), old)
    by_id = {i: token for token, i in old.vocab.items()}
    assert [[by_id[i] for i in ids] for ids in found[-3:]] == [
        ["▁ма", "ма"],
        ["<0xD1>", "<0x8A>"],
        ["▁м", "<0xD1>", "<0x8A>"],
    ]


def test_characters_without_bytes_are_unknown(tmp_path: Path) -> None:
    """Where the old tokenizer has no byte tokens: a new letter, and a new byte token of half a letter."""
    whole = characters(tmp_path / "whole")
    vocab = {t: i for t, i in whole.content["model"]["vocab"].items() if not t.startswith("<0x")}
    old = characters(tmp_path / "old", vocab=vocab, byte_fallback=False)
    spell = {t: i for i, t in enumerate(sorted(whole.vocab, key=whole.vocab.__getitem__))}
    found = token_map(with_tokens(whole, "ъ"), old)
    assert found[-1] == [old.vocab["<unk>"]] == found[spell["<0xD1>"]]
    assert found[spell["<0x61>"]] == [old.vocab["a"]]  # a byte that is a letter
    assert found[spell["▁мир"]] == [old.vocab["▁мир"]]


def test_across_the_families_a_token_is_what_it_stands_for(tmp_path: Path) -> None:
    """A space is spelt "Ġ" in one and "▁" in the other; bytes of no character have tokens of their own."""
    bytes_ = TokenizerJson.read(tiny_tokenizer(tmp_path / "bytes"))
    bytes_ = with_tokens(bytes_, *map(to_byte_level, (" мир", "мир", " hello", "lo", " world")))
    chars = characters(tmp_path / "chars")
    alphabet = byte_alphabet()

    def spelt(ids: list[int], tokenizer: TokenizerJson) -> list[str]:
        return [next(t for t, i in tokenizer.vocab.items() if i == piece) for piece in ids]

    found = token_map(bytes_, chars)
    for token, expected in {
        to_byte_level(" мир"): ["▁мир"],
        to_byte_level("мир"): ["мир"],
        to_byte_level(" hello"): ["▁hello"],
        to_byte_level(" world"): ["▁", "w", "o", "r", "l", "d"],
        alphabet[0xD1]: ["<0xD1>"],
        "a": ["a"],
        "Ġ": ["▁"],
    }.items():
        assert spelt(found[bytes_.vocab[token]], chars) == expected
    same = kept(bytes_, chars)
    assert same[bytes_.vocab[to_byte_level(" мир")]] == chars.vocab["▁мир"]
    assert bytes_.vocab[to_byte_level(" world")] not in same

    back = token_map(chars, bytes_)
    for token, expected in {
        "▁мир": [to_byte_level(" мир")],
        "<0xD1>": [alphabet[0xD1]],
        "<0x41>": ["A"],
        "▁": ["Ġ"],
    }.items():
        assert spelt(back[chars.vocab[token]], bytes_) == expected
    assert back[chars.vocab["</s>"]] == Tokenizer(tmp_path / "bytes").encode("</s>")
    assert all(back[i] for i in chars.vocab.values())

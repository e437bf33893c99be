"""The tokenizer of a folder: what a file carries beside its vocabulary must not change what is read."""

from __future__ import annotations

from pathlib import Path

from tiny import TEXTS, tiny_tokenizer

from foundation.tokenizer import Tokenizer


def test_truncation_and_padding_of_the_file_cut_nothing(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    folder = tiny_tokenizer(tmp_path)
    plain = Tokenizer(folder)
    whole = [plain.encode(text) for text in TEXTS[:4]]
    saved = Backend.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(5)
    saved.enable_padding(length=7)
    saved.save(str(folder / "tokenizer.json"))
    read = Tokenizer(folder)
    assert min(map(len, whole)) > 5
    assert [read.encode(text) for text in TEXTS[:4]] == whole
    assert [read.encode_marked(text) for text in TEXTS[:4]] == whole
    assert read.encode_batch(TEXTS[:4]) == whole

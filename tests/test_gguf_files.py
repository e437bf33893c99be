"""foundation.gguf_header: which file of a folder is meant, and which shards belong to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation.errors import ModelError
from foundation.gguf_header import files, find, shards

FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    for name in (FIRST, SECOND):
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_means_its_only_file_or_the_first_shard(split: Path) -> None:
    assert find(split).name == FIRST
    assert find(split / SECOND).name == SECOND, "a file is itself"
    (split / "other.gguf").touch()
    with pytest.raises(ModelError, match=r"m-00001-of-00002\.gguf, other\.gguf; one is needed"):
        find(split)
    assert [file.name for file in files(split)] == [FIRST, "other.gguf"]


def test_an_empty_folder_and_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds no GGUF file"):
        find(tmp_path)


def test_shards_are_found_and_missed_by_name(split: Path) -> None:
    assert [file.name for file in shards(split / FIRST)] == [FIRST, SECOND]
    (split / SECOND).unlink()
    with pytest.raises(ModelError, match=r"of its 2 shards m-00002-of-00002\.gguf is missing"):
        shards(split / FIRST)
    assert shards(split / "plain.gguf") == [split / "plain.gguf"]

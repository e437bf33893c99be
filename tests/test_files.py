"""foundation/files.py: atomic writes, digests, and what a disk that can not be written turns into."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation import files
from foundation.errors import InputError, RunError
from foundation.files import (
    DigestCache,
    disk_trouble,
    refuse_dangling,
    sha256_file,
    tree_digest,
    visible_files,
    write_atomic,
    write_json,
)


def age(path: Path, seconds: float = 60) -> None:
    """Make a file look older than the time in which the cache does not trust it."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "one")
    write_atomic(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_trouble_is_a_run_error_and_the_old_content_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(RunError) as caught:
        write_atomic(path, "new")
    assert str(path) in caught.value.message and "nothing finished was lost" in caught.value.message
    assert caught.value.hint
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_other_os_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "folder", "x")


def test_a_folder_without_rights_is_named(tmp_path: Path) -> None:
    """Asked by a process without root's rights, for root may write anywhere."""
    if os.getuid() != 0:
        pytest.skip("needs root to give up its rights")
    code = (
        "import os, sys; from pathlib import Path; from foundation.files import write_atomic\n"
        "from foundation.errors import RunError; os.setuid(65534)\n"
        "try: write_atomic(Path('/work-of-nobody'), 'x')\n"
        "except RunError as error: print(error.message)"
    )
    root = Path(__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert "may not access /" in said.stdout


def test_json_is_the_same_bytes_for_the_same_value(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": "чай"})
    write_json(tmp_path / "b", {"a": "чай", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "чай" in (tmp_path / "a").read_text()


def test_sha256_file_agrees_with_the_program(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(3_000_001))
    said = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert sha256_file(path) == said.stdout.split()[0]


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1))
def test_tree_digest_is_of_the_sorted_pairs(entries: dict[str, str]) -> None:
    by_hand = json.dumps(sorted([name, digest] for name, digest in entries.items()), separators=(",", ":"))
    assert tree_digest(entries.items()) == hashlib.sha256(by_hand.encode()).hexdigest()
    assert tree_digest(reversed(list(entries.items()))) == tree_digest(entries.items())


def test_tree_digest_tells_apart_what_concatenation_would_not() -> None:
    assert tree_digest([("a", "bc")]) != tree_digest([("ab", "c")])
    assert tree_digest([("a", "b"), ("c", "d")]) != tree_digest([("a", "d"), ("c", "b")])


def test_content_of_a_file_goes_by_bytes_and_suffix(tmp_path: Path) -> None:
    for name, text in {"a.txt": "tea", "b.txt": "tea", "c.jsonl": "tea", "d.txt": "milk"}.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (DigestCache().content(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl", "d.txt"))
    assert a == b and len({a, c, d}) == 3


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst", ".GZ"])
def test_content_of_a_packed_file_goes_by_what_it_holds(tmp_path: Path, packed: str) -> None:
    names = [f"a.txt{packed}", f"b.2024.txt{packed}", f"a.jsonl{packed}", f"a{packed}"]
    for name in names:
        (tmp_path / name).write_bytes(b"tea")
    a, b, lines, bare = (DigestCache().content(tmp_path / name) for name in names)
    assert a == b and len({a, lines, bare}) == 3


def test_content_of_other_files_goes_by_the_last_suffix_as_ever(tmp_path: Path) -> None:
    """Spelled out: a change of it makes every stage of every user stale."""
    (tmp_path / "v1.2.jsonl").write_text("tea")
    entry = json.dumps([[".jsonl", hashlib.sha256(b"tea").hexdigest()]], separators=(",", ":"))
    assert DigestCache().content(tmp_path / "v1.2.jsonl") == hashlib.sha256(entry.encode()).hexdigest()
    (tmp_path / "...odd").write_text("tea")
    (tmp_path / "a.odd").write_text("tea")
    assert DigestCache().content(tmp_path / "...odd") == DigestCache().content(tmp_path / "a.odd")


def test_content_of_a_folder_goes_by_its_visible_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "w.bin").write_text("weights")
    (folder / "config.json").write_text("{}")
    before = DigestCache().content(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("noise")
    (folder / ".DS_Store").write_text("noise")
    assert visible_files(folder) == ["config.json", "sub/w.bin"]
    assert DigestCache().content(folder) == before
    (folder / "sub" / "w.bin").rename(folder / "sub" / "v.bin")
    assert DigestCache().content(folder) != before


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(InputError, match=name):
            DigestCache().content(tmp_path / name)


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    link = tmp_path / "deep" / "shard.bin"
    link.parent.mkdir()
    link.symlink_to("/gone/shard.bin")
    (tmp_path / "a.txt").write_text("tea")
    for act, path in ((refuse_dangling, tmp_path), (DigestCache().content, tmp_path), (refuse_dangling, link)):
        with pytest.raises(InputError) as caught:
            act(path)
        assert caught.value.message == f"{link} is a link that leads nowhere, to /gone/shard.bin"
        assert caught.value.hint == "put back what it points to, or remove the link"


def test_all_links_that_lead_nowhere_at_once(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}").symlink_to(f"{(number + 1) % 7}")  # round in a ring
    with pytest.raises(InputError, match=r"/0 is a link .*/4 is a link .*; and 2 more"):
        DigestCache().content(tmp_path)


def test_links_that_lead_somewhere_and_hidden_ones_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tea")
    before = DigestCache().content(tmp_path)
    (tmp_path / ".#a.txt").symlink_to("user@host:1")  # an editor's lock
    (tmp_path / ".old").mkdir()
    (tmp_path / ".old" / "link").symlink_to("gone")
    assert DigestCache().content(tmp_path) == before
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "up").symlink_to("..")
    assert DigestCache().content(tmp_path) != before


def test_the_cache_spares_a_second_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = tmp_path / "corpus.txt", tmp_path / "digests.json"
    path.write_text("tea")
    age(path)
    cache = DigestCache(store)
    first = cache.sha256(path)
    cache.save()

    monkeypatch.setattr(files, "sha256_file", lambda path: pytest.fail("read again"))
    assert DigestCache(store).sha256(path) == first
    monkeypatch.undo()

    path.write_text("TEA")  # the same size, another mtime
    age(path, 30)
    assert DigestCache(store).sha256(path) == hashlib.sha256(b"TEA").hexdigest()


def test_a_file_that_may_still_change_is_not_remembered(tmp_path: Path) -> None:
    path, store = tmp_path / "corpus.txt", tmp_path / "digests.json"
    path.write_text("tea")
    cache = DigestCache(store)
    cache.sha256(path)
    cache.save()
    assert not store.exists()


def test_a_torn_cache_is_no_cache(tmp_path: Path) -> None:
    store = tmp_path / "digests.json"
    store.write_text('{"/a": [1, 2')
    (tmp_path / "a").write_text("tea")
    assert DigestCache(store).sha256(tmp_path / "a") == hashlib.sha256(b"tea").hexdigest()


def test_blobs_of_the_hub_cache_are_known_by_their_names(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    content = b"large"
    name = hashlib.sha256(content).hexdigest()
    (blobs / name).write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blobs / name)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(content)
    assert DigestCache().content(snapshot) == DigestCache().content(copy)


def test_a_full_disk_told_by_a_library_in_its_own_words_is_one() -> None:
    told = disk_trouble(RuntimeError("I/O error: No space left on device (os error 28)"), Path("/made/up"))
    assert told is not None and "the disk is full" in told.message and "/made/up" in told.message
    assert disk_trouble(RuntimeError("another error"), Path("/made/up")) is None


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file that can be read to its end"):
        sha256_file(tmp_path / "pipe")

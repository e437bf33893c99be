"""samovar/inputs.py: datasets of the hub, from a local cache or refused; models are in test_plan.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import texts_of

from foundation.errors import InputError, MissingError
from foundation.files import DigestCache
from foundation.report import Silent
from samovar.inputs import find_input, missing_inputs

pytest.importorskip("huggingface_hub")
COMMIT = "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def fake_dataset(cache: Path, names: list[str], revision: str = "main") -> Path:
    """A cached dataset tea/leaves; each file is a link to a blob, as the hub's library lays them."""
    home = cache / "datasets--tea--leaves"
    snapshot = home / "snapshots" / COMMIT
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(COMMIT)
    for number, name in enumerate(names):
        blob = home / "blobs" / f"{number:040x}"
        blob.write_text(f'{{"text": "text of {name}"}}\n')
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


SHARDS = [
    "data/train-00000-of-00002.jsonl",
    "data/train-00001-of-00002.jsonl",
    "data/test-00000-of-00001.jsonl",
]


@pytest.mark.parametrize("revision", ["main", "v1.2"])
def test_a_dataset_is_taken_from_the_cache_and_read(cache: Path, tmp_path: Path, revision: str) -> None:
    snapshot = fake_dataset(cache, SHARDS, revision)
    value = "datasets/tea/leaves" + f"@{revision}" * (revision != "main")
    for download in (False, True):
        assert find_input(value, tmp_path, download) == (snapshot,)
    texts = texts_of([snapshot], Silent())
    assert texts == [f"text of {name}" for name in SHARDS[:2]]


def test_its_digest_is_of_what_it_holds(cache: Path, tmp_path: Path) -> None:
    snapshot = fake_dataset(cache, SHARDS)
    copy = tmp_path / "copy"
    for name in SHARDS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((snapshot / name).read_bytes())
    [found] = find_input("datasets/tea/leaves", tmp_path, False)
    assert DigestCache().content(found) == DigestCache().content(copy)


@pytest.mark.parametrize("names", [[], SHARDS[1:]])
def test_one_that_is_not_whole_is_refused(cache: Path, tmp_path: Path, names: list[str]) -> None:
    fake_dataset(cache, names)
    (cache / "datasets--tea--leaves" / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    with pytest.raises(MissingError, match="no whole dataset in the local hub cache"):
        find_input("datasets/tea/leaves", tmp_path, False)
    with pytest.raises(MissingError, match=r"has no files, or not all of its shards|could not be downloaded"):
        find_input("datasets/tea/leaves", tmp_path, True)


def test_without_network_it_says_what_to_do(cache: Path, tmp_path: Path) -> None:
    for download, said in ((False, "no path here, and no whole dataset"), (True, "could not be downloaded")):
        with pytest.raises(MissingError, match=said) as caught:
            find_input("datasets/tea/leaves@v1", tmp_path, download)
        assert "`hf download tea/leaves --revision v1 --repo-type dataset`" in caught.value.hint
    with pytest.raises(MissingError) as caught:
        find_input("tea/leaves", tmp_path, False)
    assert "`hf download tea/leaves`" in caught.value.hint, "a model of that name is another thing"


def test_it_is_asked_for_as_a_dataset_and_without_code(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    snapshot = fake_dataset(tmp_path / "downloaded", SHARDS)

    def download(repository: str, **more: object) -> str:
        asked.append((repository, more))
        if more["local_files_only"]:
            raise FileNotFoundError(repository)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_input("datasets/tea/leaves@v1", tmp_path, True) == (snapshot,)
    assert [repository for repository, _ in asked] == ["tea/leaves"] * 2
    for _, more in asked:
        assert (more["repo_type"], more["revision"]) == ("dataset", "v1")
        assert {"*.py", "*.pkl"} <= set(more["ignore_patterns"])  # type: ignore[call-overload]
    with pytest.raises(MissingError):
        find_input("datasets/tea/leaves@v1", tmp_path, False)
    assert len(asked) == 3, "nothing is downloaded before a run starts"


def test_a_path_that_exists_wins(cache: Path, tmp_path: Path) -> None:
    fake_dataset(cache, SHARDS)
    here = tmp_path / "datasets" / "tea" / "leaves"
    here.mkdir(parents=True)
    assert find_input("datasets/tea/leaves", tmp_path, False) == (here,)


def test_a_file_below_datasets_is_a_file(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'datasets/tea/leaves\.jsonl' is not there"):
        find_input("datasets/tea/leaves.jsonl", tmp_path, True)
    named = {"a": "datasets/tea/leaves", "b": "datasets/tea/leaves.jsonl", "c": "datasets/tea/leaf/x"}
    problems = missing_inputs(named, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["input 'b'", "input 'c'"]


def test_links_that_lead_nowhere_are_told_before_a_run(tmp_path: Path) -> None:
    for place in ("folder/a.txt", "fine/a.txt"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text("tea")
    (tmp_path / "folder" / "broken.txt").symlink_to("/gone")
    (tmp_path / "lone").symlink_to("/gone too")
    (tmp_path / "fine" / "b.txt").symlink_to("a.txt")
    (tmp_path / "fine" / "deep").mkdir()
    (tmp_path / "fine" / "deep" / "x").symlink_to("y")
    named = {"a": "folder", "b": "lone", "c": "folder/*.txt", "d": "fine/*.txt", "e": "fine/deep"}
    told = [
        f"input 'a': {tmp_path}/folder/broken.txt is a link that leads nowhere, to /gone",
        f"input 'b': {tmp_path}/lone is a link that leads nowhere, to /gone too",
        f"input 'c': {tmp_path}/folder/broken.txt is a link that leads nowhere, to /gone",
        f"input 'e': {tmp_path}/fine/deep/x is a link that leads nowhere, to y",
    ]
    hint = "; put back what it points to, or remove the link"
    assert missing_inputs(named, tmp_path) == [line + hint for line in told]
    with pytest.raises(InputError, match="lone is a link that leads nowhere, to /gone too") as caught:
        find_input("lone", tmp_path, True)
    assert caught.value.hint

"""foundation/artifact.py: what a finished artifact is, and that a kill anywhere loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptation.tokenizer_json import TokenizerJson
from corpora.classifier import load_classifier
from foundation import artifact
from foundation.artifact import Identity
from foundation.errors import ArtifactError, SamovarError
from foundation.files import DigestCache, sha256_file, tree_digest, write_atomic
from foundation.model import check_files, read_config
from foundation.shape import ModelShape
from foundation.tokenizer import Tokenizer

OLD = Identity("test.kind", 1, {"seed": 17, "word": "milk"}, 17, {"corpus": ["a" * 64]})
NEW = replace(OLD, settings={"seed": 17, "word": "tea"})


def make(folder: Path, identity: Identity) -> None:
    """What a worker does, with a stage of three files that keeps its progress in .work."""
    artifact.settle(folder)
    out = artifact.begin(folder, identity.fingerprint)
    if not artifact.is_recorded(folder):
        word = str(identity.settings["word"])
        (out / ".work").mkdir(exist_ok=True)
        write_atomic(out / ".work" / "checkpoint", word, durable=False)
        (out / "model").mkdir(exist_ok=True)
        (out / "model" / "tokenizer.json").write_text(f'"{word}"')
        write_atomic(out / "model" / "config.json", "{}", durable=False)
        (out / "text.txt").write_text(word)
        artifact.record(folder, identity, {"loss": 1.5}, 2.0, 1000)
    artifact.publish(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(act: Callable[[], None], at: int) -> bool:
    """Run `act` in a child that is killed just before its `at`-th change of the disk; False if it ended.

    The interpreter announces each file operation to audit hooks before it is done.
    """
    child = os.fork()
    if child == 0:
        changes = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal changes
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                if changes == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1

        try:
            sys.addaudithook(hook)
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed instead of being killed"
    return os.WIFSIGNALED(status)


def test_a_finished_artifact_is_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "vocab"
    make(folder, NEW)
    assert names(tmp_path) == ["vocab"]
    assert sorted(tree(folder)) == [
        "manifest.json", "model/config.json", "model/tokenizer.json", "settings.json", "text.txt"
    ]  # fmt: skip
    manifest = artifact.load(folder)
    assert manifest is not None and manifest.identity == NEW
    files = ["model/config.json", "model/tokenizer.json", "text.txt"]
    assert manifest.digest == tree_digest((name, sha256_file(folder / name)) for name in files)
    assert manifest.tokenizer == sha256_file(folder / "model" / "tokenizer.json")
    assert (manifest.figures, manifest.seconds, manifest.peak_memory_bytes) == ({"loss": 1.5}, 2.0, 1000)
    assert json.loads((folder / "settings.json").read_text()) == NEW.settings
    assert artifact.verify(folder) == []


def test_a_role_has_the_digest_that_the_same_files_have_elsewhere(tmp_path: Path) -> None:
    folder, copy = tmp_path / "vocab", tmp_path / "copy"
    make(folder, NEW)
    shutil.copytree(folder / "model", copy)
    manifest = artifact.load(folder)
    assert manifest is not None
    assert manifest.role_digest("model") == DigestCache().content(copy)
    assert manifest.role_digest("text.txt") == DigestCache().content(folder / "text.txt")
    with pytest.raises(ArtifactError, match="mode"):
        manifest.role_digest("mode")


@given(
    st.fixed_dictionaries(
        {"kind": st.sampled_from("ab"), "version": st.integers(1, 2), "seed": st.integers(0, 1),
         "settings": st.dictionaries(st.sampled_from("xy"), st.integers(0, 1)),
         "inputs": st.dictionaries(st.sampled_from("rs"), st.sampled_from(["d", ["d"], ["d", "e"]]))}
    ), st.data(),
)  # fmt: skip
def test_fingerprints_are_equal_exactly_when_identities_are(value: dict, data: st.DataObject) -> None:
    other = data.draw(st.sampled_from([value, value | {"seed": 1}, value | {"inputs": {"r": ["d"]}},
                                       value | {"settings": {"x": 1}}, value | {"kind": "a"}]))  # fmt: skip
    assert (Identity(**value).fingerprint == Identity(**other).fingerprint) == (value == other)


def test_times_and_memory_are_no_content(tmp_path: Path) -> None:
    digests = set()
    for name, seconds in (("a", 1.0), ("b", 99.0)):
        out = artifact.begin(tmp_path / name, NEW.fingerprint)
        (out / "text.txt").write_text("tea")
        digests.add(artifact.record(tmp_path / name, NEW, {}, seconds, int(seconds)).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("text.txt", "TEA", "altered: text.txt (its sha256 is not the manifest's)"),
        ("text.txt", "coffee", "altered: text.txt (6 bytes, the manifest says 3)"),
        ("model/config.json", None, "missing: model/config.json"),
        ("notes.md", "mine", "extra: notes.md"),
        ("settings.json", "{}", "altered: settings.json (it is not what the manifest says)"),
    ],
)
def test_verify_names_the_file(tmp_path: Path, file: str, content: str | None, said: str) -> None:
    make(tmp_path / "vocab", NEW)
    path = tmp_path / "vocab" / file
    path.unlink() if content is None else path.write_text(content)
    assert artifact.verify(tmp_path / "vocab") == [said]


def test_verify_names_all_files_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "vocab"
    make(folder, NEW)
    (folder / "text.txt").unlink()
    (folder / "model" / "config.json").write_text("[]")
    (folder / "extra").write_text("")
    assert [line.split(" (")[0] for line in artifact.verify(folder)] == [
        "altered: model/config.json", "missing: text.txt", "extra: extra"
    ]  # fmt: skip


@pytest.mark.parametrize("change", ['"seed": 17, "size', '"word": "tea"', '"sha256": "'])
def test_an_altered_manifest_is_not_believed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "vocab"
    make(folder, NEW)
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    if "seed" in change:
        value["seed"] = 18
    elif "word" in change:
        value["settings"]["word"] = "milk"
    else:
        value["files"]["text.txt"]["sha256"] = "0" * 64
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=r"manifest\.json can not be used: it was altered"):
        artifact.verify(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 99}', '{"format": 1, "files": 3}']
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="can not be used"):
        artifact.load(tmp_path / "vocab")


def test_a_partial_is_kept_for_its_own_fingerprint_and_for_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "vocab"
    out = artifact.begin(folder, NEW.fingerprint)
    (out / ".work").mkdir()
    (out / ".work" / "checkpoint").write_text("200")
    assert artifact.begin(folder, NEW.fingerprint) == out
    assert (out / ".work" / "checkpoint").read_text() == "200"
    assert artifact.begin(folder, OLD.fingerprint) == out
    assert tree(out) == {".fingerprint": OLD.fingerprint.encode() + b"\n"}


def test_left_over_temporary_files_do_not_become_content(tmp_path: Path) -> None:
    out = artifact.begin(tmp_path / "vocab", NEW.fingerprint)
    (out / "text.txt").write_text("tea")
    (out / ".text.txt.1234.tmp").write_text("te")
    (out / ".tmpnjMG7r").write_text("as the safetensors library names what it has not finished")
    manifest = artifact.record(tmp_path / "vocab", NEW, {}, 0, 0)
    assert list(manifest.files) == ["text.txt"]


def test_an_artifact_needs_files_and_no_links(tmp_path: Path) -> None:
    out = artifact.begin(tmp_path / "vocab", NEW.fingerprint)
    with pytest.raises(ArtifactError, match="wrote no file"):
        artifact.record(tmp_path / "vocab", NEW, {}, 0, 0)
    (out / "passwords").symlink_to("/etc")
    with pytest.raises(ArtifactError, match="is a link"):
        artifact.record(tmp_path / "vocab", NEW, {}, 0, 0)


@pytest.mark.parametrize("finished", [False, True])
def test_what_no_stage_wrote_is_never_replaced(tmp_path: Path, finished: bool) -> None:
    folder = tmp_path / "vocab"
    if finished:
        make(folder, OLD)
    folder.mkdir(exist_ok=True)
    (folder / "thesis.md").write_text("three years of work")
    with pytest.raises(ArtifactError, match=r"no stage|not made by a stage"):
        make(folder, NEW)
    assert (folder / "thesis.md").read_text() == "three years of work"


def test_an_empty_folder_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "vocab").mkdir()
    make(tmp_path / "vocab", NEW)
    assert artifact.verify(tmp_path / "vocab") == []


def check_whole(folder: Path, *allowed: Identity) -> None:
    """At any moment an old or a new artifact is there, and it is whole."""
    manifest = artifact.load(folder)
    assert manifest is not None and manifest.identity in allowed
    assert artifact.verify(folder) == []


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_anywhere_it_is_finished_by_the_next_one(tmp_path: Path, replacing: bool) -> None:
    make(tmp_path / "reference", NEW)
    reference = tree(tmp_path / "reference")
    for at in count():
        folder = tmp_path / f"run{at}" / "vocab"
        if replacing:
            make(folder, OLD)
        if not killed(lambda folder=folder: make(folder, NEW), at):
            break
        if replacing:
            check_whole(folder, OLD, NEW)
        make(folder, NEW)
        assert tree(folder) == reference
        assert names(folder.parent) == ["vocab"], "nothing is left beside it"
    assert at > (25 if replacing else 15), "the hook saw the writes"


@pytest.mark.slow
def test_killed_twice_it_is_finished_by_the_third(tmp_path: Path) -> None:
    """A kill at each point, and of the resume at every fifth; the fifths shift, so that all are met."""
    make(tmp_path / "reference", NEW)
    reference = tree(tmp_path / "reference")
    again = True
    for first in count():
        for second in count(first % 5, 5):
            folder = tmp_path / f"run{first}-{second}" / "vocab"
            make(folder, OLD)
            again = killed(lambda folder=folder: make(folder, NEW), first)
            once_more = killed(lambda folder=folder: make(folder, NEW), second)
            check_whole(folder, OLD, NEW)
            make(folder, NEW)
            assert tree(folder) == reference and names(folder.parent) == ["vocab"]
            shutil.rmtree(folder.parent)
            if not once_more:
                break
        if not again:
            break


def test_going_back_to_the_old_settings_after_a_kill_takes_the_old_one(tmp_path: Path) -> None:
    """Killed between putting the old aside and the new in place, with the change then taken back."""
    undone = 0
    for at in count():
        folder = tmp_path / f"run{at}" / "vocab"
        make(folder, OLD)
        if not killed(lambda folder=folder: make(folder, NEW), at):
            break
        aside = not folder.exists()
        artifact.settle(folder)
        if aside:
            check_whole(folder, OLD)
            undone += 1
        make(folder, OLD)
        check_whole(folder, OLD)
    assert undone, "one kill fell between the two renames"


def test_a_partial_whose_deletion_was_killed_is_not_resumed(tmp_path: Path) -> None:
    for at in count():
        folder = tmp_path / f"run{at}" / "vocab"
        out = artifact.begin(folder, OLD.fingerprint)
        (out / ".work").mkdir()
        for name in ("weights", "optimizer"):
            (out / ".work" / name).write_text(name)
        before = tree(out)
        if not killed(lambda folder=folder: artifact.begin(folder, NEW.fingerprint), at):
            break
        if artifact.partial_fingerprint(folder) == OLD.fingerprint:
            assert tree(out) == before
    assert at > 4


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    """A finished stage that was moved to another disk and linked, and links at its partial and old names."""
    make(tmp_path / "disk" / "old", OLD)
    for name in ("a", "a.partial", "a.replaced"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / "old")
    (tmp_path / "a.partial").unlink()
    (tmp_path / "a.partial").symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path / "disk")
    make(tmp_path / "a", NEW)
    assert names(tmp_path) == ["a", "disk"] and not (tmp_path / "a").is_symlink()
    assert artifact.verify(tmp_path / "a") == []
    assert tree(tmp_path / "disk") == before


KEEPS = {".work/answers": "answers"}


def test_what_a_kind_keeps_survives_a_change_of_settings(tmp_path: Path) -> None:
    """Paid answers: from unfinished work, from finished work, and through a kill between the two renames."""
    folder = tmp_path / "a"
    partial = artifact.begin(folder, "one", "kind.x", KEEPS)
    (partial / ".work").mkdir()
    (partial / ".work" / "answers").write_text("paid")
    (partial / "other").write_text("of the old settings")
    again = artifact.begin(folder, "two", "kind.x", KEEPS)
    assert (again / ".work" / "answers").read_text() == "paid" and not (again / "other").exists()
    again.rename(tmp_path / "a.fresh")  # the kill
    assert (artifact.begin(folder, "three", "kind.x", KEEPS) / ".work" / "answers").read_text() == "paid"
    assert not (artifact.begin(folder, "four", "kind.y", KEEPS) / ".work").exists()


def test_what_a_kind_keeps_is_taken_from_a_finished_artifact(tmp_path: Path) -> None:
    folder, first = tmp_path / "a", Identity("kind.x", 1, {"seed": 1}, 1, {})
    partial = artifact.begin(folder, first.fingerprint, "kind.x", KEEPS)
    (partial / "answers").write_text("paid")
    artifact.record(folder, first, {}, 1.0, 1)
    artifact.publish(folder)
    assert (artifact.begin(folder, "two", "kind.x", KEEPS) / ".work" / "answers").read_text() == "paid"
    assert (folder / "answers").read_text() == "paid"


def test_of_a_stages_folder_the_one_that_was_meant_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    make(folder, OLD)
    given = "that is the folder of a stage; give "
    assert artifact.hint_for(folder, "config.json", "else") == f"{given}{folder}/model"
    (folder / ".work").mkdir()
    (folder / ".work" / "config.json").write_text("{}")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text("{}")
    assert artifact.hint_for(folder, "config.json", "else") == f"{given}{folder}/model or {folder}/other"
    assert artifact.hint_for(folder, "quality.json", "else") == "else"
    assert artifact.hint_for(tmp_path / "none", "config.json", "else") == "else"
    (folder / "manifest.json").unlink()
    assert artifact.hint_for(folder, "config.json", "else").startswith("that is one folder too high; give ")
    file = folder / "model" / "config.json"
    assert artifact.hint_for(file, "config.json", "else") == f"that is a file; give its folder, {folder}/model"


def test_readers_of_folders_name_the_one_that_was_meant(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    make(folder, OLD)
    (folder / "quality").mkdir()
    (folder / "quality" / "quality.json").write_text("{}")
    of_model = (Tokenizer, TokenizerJson.read, ModelShape.from_folder, read_config, check_files)
    readers = dict.fromkeys(of_model, "model") | {load_classifier: "quality"}
    for read, role in readers.items():
        with pytest.raises(SamovarError) as caught:
            read(folder)  # type: ignore[operator]
        assert caught.value.hint == f"that is the folder of a stage; give {folder}/{role}"
        with pytest.raises(SamovarError) as caught:
            read(tmp_path)  # type: ignore[operator]
        assert caught.value.hint and "give /" not in caught.value.hint

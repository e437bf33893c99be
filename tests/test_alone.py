"""samovar/alone.py: one stage without a recipe never replaces what it did not make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stages_for_tests import KINDS

from foundation import artifact
from foundation.errors import ArtifactError, InputError, RunError
from foundation.rundir import RunDirectory, acquire
from samovar.alone import run_alone
from samovar.screen import NoScreen


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def alone(kind: str, out: str, **roles: str) -> artifact.Manifest:
    given = {role: [path] for role, path in roles.items()}
    return run_alone(kind, given, {}, Path(out), NoScreen(), KINDS)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_artifact_of_another_kind_is_not_replaced() -> None:
    alone("test.write", "o")
    alone("test.write", "other")
    before = tree(Path("o"))
    with pytest.raises(RunError, match=r"holds what test\.write made"):
        alone("test.join", "o", texts="other/text.txt")
    assert tree(Path("o")) == before


def test_the_partial_of_another_kind_is_not_deleted() -> None:
    partial = artifact.begin(Path("o"), "f" * 64, "test.write")
    (partial / "hours.txt").write_text("of work")
    alone("test.write", "other")
    with pytest.raises(RunError, match=r"holds what test\.write made"):
        alone("test.join", "o", texts="other/text.txt")
    assert (partial / "hours.txt").is_file()


@pytest.mark.parametrize("path", ["o", "o/text.txt", "link/text.txt"])
def test_a_place_that_holds_its_own_input_is_refused(path: str) -> None:
    alone("test.write", "o")
    Path("link").symlink_to("o")
    before = tree(Path("o"))
    with pytest.raises(RunError, match="holds an input"):
        alone("test.write", "o", before=path)
    assert tree(Path("o")) == before


@pytest.mark.parametrize("out", ["run/a", "run/a/deeper"])
def test_a_place_in_a_run_directory_is_refused(out: str) -> None:
    run = RunDirectory(Path("run"))
    run.create()
    lock = acquire(run.lock)
    partial = artifact.begin(Path("run/a"), "f" * 64, "test.write")
    with pytest.raises(RunError, match="lies in the run directory"):
        alone("test.write", out)
    lock.release()
    assert partial.is_dir()


@pytest.mark.parametrize("out", [".", "", "/", "..", "x/.."])
def test_a_place_that_one_stands_in_is_refused_without_a_trace(out: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is the folder you are in"):
        alone("test.write", out)
    assert list(tmp_path.iterdir()) == [] and not Path("/..lock").exists()


def test_a_place_below_a_file_is_refused() -> None:
    Path("file").touch()
    with pytest.raises(RunError, match="file is a file"):
        alone("test.write", "file/o")


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(("spoil", "said"), [(Path.unlink, "missing"), (spoil, "altered")])
@pytest.mark.parametrize("times", [1, 2])  # reused, or replaced by something else
def test_a_finished_artifact_that_is_not_as_written_is_refused(
    spoil: Callable[[Path], object], said: str, times: int
) -> None:
    alone("test.write", "o")
    spoil(Path("o/text.txt"))
    before = tree(Path("o"))
    with pytest.raises(ArtifactError, match=rf"not as they were written:\n  o: {said}: text\.txt") as caught:
        run_alone("test.write", {}, {"times": times}, Path("o"), NoScreen(), KINDS)
    assert "delete the stage's folder" in caught.value.hint
    assert tree(Path("o")) == before


def test_an_input_edited_meanwhile_seals_no_result() -> None:
    """Also when it is put back: what was made in between is not gone on with."""
    Path("leaf.txt").write_text("leaf")

    class Editing(NoScreen):
        def event(self, event: dict) -> None:
            if event["kind"] == "progress" and event["step"] == 2:
                Path("leaf.txt").write_text("another")

    with pytest.raises(InputError, match=r"leaf\.txt was changed while it was used"):
        run_alone("test.write", {"before": ["leaf.txt"]}, {}, Path("o"), Editing(), KINDS)
    assert artifact.load(Path("o")) is None and Path("o.partial").is_dir()
    Path("leaf.txt").write_text("leaf")
    assert alone("test.write", "o", before="leaf.txt").figures["resumed_at"] == 0


def test_a_setting_that_alters_no_byte_is_not_in_the_fingerprint() -> None:
    quick = alone("test.write", "o")
    unhurried = run_alone("test.write", {}, {"step_seconds": 0.01}, Path("slow"), NoScreen(), KINDS)
    assert unhurried.identity == quick.identity and unhurried.seconds > quick.seconds
    assert run_alone("test.write", {}, {"times": 1}, Path("n"), NoScreen(), KINDS).identity != quick.identity


def test_a_stage_need_not_write_the_roles_that_its_settings_leave_out() -> None:
    assert sorted(alone("test.pour", "cup").files) == ["large.txt"]

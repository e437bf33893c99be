"""`samovar bundle verify`: what was altered, what is missing, extra, or leads outside; and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import export, model_folder
from test_export_bundle import lora
from typer.testing import CliRunner

from export import bundle as stage
from foundation.errors import InputError
from foundation.files import sha256_file
from foundation.report import Silent
from samovar import bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an adapter and a split file."""
    root = tmp_path_factory.mktemp("made")
    folder = model_folder(root / "hf")
    source = export(folder, root / "g", model_name="tiny", shard_bytes=400_000)
    inputs = {"model": folder, "gguf": source, "adapters": lora(root / "polite.gguf")}
    stage.run(stage.Settings(), inputs, root, Silent())
    return root / "bundle"


@pytest.fixture
def there(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "b")


def problems(folder: Path) -> list[str]:
    found: list[str] = bundle.examine(folder, Silent())["problems"]
    return found


def relist(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the list anew, as somebody would who alters a bundle on purpose."""
    index = json.loads((folder / "bundle.json").read_text())
    change(index)
    (folder / "bundle.json").write_text(json.dumps(index))


def resign(folder: Path, name: str) -> None:
    """Give a file that was altered the digest that it has now."""
    size, digest = (folder / name).stat().st_size, sha256_file(folder / name)

    def change(index: dict[str, Any]) -> None:
        index["files"] = [entry for entry in index["files"] if entry["path"] != name]
        index["files"].append({"path": name, "size_bytes": size, "sha256": digest})

    relist(folder, change)


def test_a_whole_one(there: Path) -> None:
    assert problems(there) == []
    (there / ".gitattributes").write_text("what the hub adds")
    inside = there / "README.md"
    shutil.move(inside, there / ".readme")
    inside.symlink_to(".readme")  # a link that stays inside
    assert problems(there) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_bit_one_byte_one_file(there: Path) -> None:
    served = json.loads((there / "bundle.json").read_text())["serve"]
    flip(there / served)
    (there / "README.md").open("a").write("x")
    (there / "hf" / "tokenizer.json").unlink()
    (there / "hf" / "evil.py").write_text("x")
    assert problems(there) == [
        "hf/tokenizer.json is missing",
        "hf/evil.py is extra: the list does not name it",
        f"README.md has {(there / 'README.md').stat().st_size:,} bytes, "
        f"the list says {(there / 'README.md').stat().st_size - 1:,}",
        f"{served} is altered: its content is not what the list says",
    ]


def test_what_leads_outside(there: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.move(there / "README.md", secret / "README.md")
    (there / "README.md").symlink_to(secret / "README.md")  # the same content, but elsewhere
    (there / "folder").symlink_to(secret)
    (there / "LICENSES" / "gone").symlink_to("nowhere")
    found = problems(there)
    assert f"README.md is a link that leads outside, to {secret / 'README.md'}" in found
    assert f"folder is a link that leads outside, to {secret}" in found
    assert "LICENSES/gone is a link that leads nowhere" in found


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "./README.md", "a\\..\\b", "C:x", "a//b", "."]
)
def test_paths_that_escape_are_not_followed(there: Path, name: str) -> None:
    (there.parent / "secret").write_text("x")
    entry = {"path": name, "size_bytes": 1, "sha256": sha256_file(there.parent / "secret")}
    relist(there, lambda index: index["files"].append(entry))
    assert problems(there) == [f"the list names {name!r}, which is no path inside the bundle"]


def test_names_that_one_disk_takes_for_another(there: Path) -> None:
    shutil.copy(there / "README.md", there / "readme.md")
    resign(there, "readme.md")
    assert problems(there) == ["the list names readme.md twice, on a disk where letters' case does not count"]


def test_parts_that_do_not_fit(there: Path) -> None:
    tokenizer = there / "hf" / "tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text())
    vocabulary["added_tokens"].append(vocabulary["added_tokens"][-1] | {"id": 639, "content": "<new>"})
    tokenizer.write_text(json.dumps(vocabulary))
    resign(there, "hf/tokenizer.json")
    lora(there / "adapters" / "polite.gguf", columns=32)
    resign(there, "adapters/polite.gguf")
    found = problems(there)
    assert found[0] == "hf/ has another tokenizer than the list says"
    assert "adapters/polite.gguf is no adapter of gguf/tiny-F32-00001-of-" in found[1]
    assert "blk.0.ffn_up.weight.lora_a is (4, 32), for a matrix of 160 x 64" in found[1]
    lora(there / "adapters" / "new.gguf")
    resign(there, "adapters/new.gguf")
    assert any(
        problem.startswith("adapters/ holds adapters/new.gguf, adapters/polite.gguf")
        for problem in problems(there)
    )


@pytest.mark.parametrize("serve", [None, 5, "../x.gguf", "gguf/none.gguf", "bundle.json"])
def test_the_file_to_serve_is_one_of_the_bundles(there: Path, serve: object) -> None:
    relist(there, lambda index: index.update(serve=serve))
    assert problems(there) == [f"the file to serve, {str(serve)!r}, is none of the bundle's"]


def test_a_shard_that_is_lacking(there: Path) -> None:
    shard = sorted((there / "gguf").iterdir())[1]
    relist(
        there,
        lambda index: index.update(files=[e for e in index["files"] if not e["path"].endswith(shard.name)]),
    )
    shard.unlink()
    assert len(problems(there)) == 1 and f"{shard.name} is missing" in problems(there)[0]


def test_a_hostile_file_with_a_sound_digest_is_a_problem_and_no_crash(there: Path) -> None:
    served = json.loads((there / "bundle.json").read_text())["serve"]
    for content in (b"", b"GGUF", b"x" * 100):
        (there / served).write_bytes(content)
        resign(there, served)
        assert len(problems(there)) == 1
        (there / "hf" / "tokenizer.json").write_bytes(content)
        resign(there, "hf/tokenizer.json")
        assert problems(there)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, '{"format": 2}', '{"format": true, "files": []}', '{"format": 2, "files": [5]}',
     '{"format": 2, "files": [{"path": "a", "size_bytes": true, "sha256": ""}]}', '{"format": 3, "files": []}'],
)  # fmt: skip
def test_a_list_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(InputError, match=r"bundle\.json"):
        bundle.examine(tmp_path, Silent())


def test_odd_values_in_a_list(there: Path) -> None:
    for key, value in (
        ("adapters", 5),
        ("adapters", [5]),
        ("tokenizer", None),
        ("name", []),
        ("adapters", None),
    ):
        index = (there / "bundle.json").read_text()
        relist(there, lambda found, key=key, value=value: found.update({key: value}))
        assert key == "name" or problems(there)
        (there / "bundle.json").write_text(index)


def test_the_command(there: Path) -> None:
    runner = CliRunner()
    said = runner.invoke(bundle.app, ["verify", str(there)])
    assert said.exit_code == 0 and "as it was made" in said.stdout
    said = runner.invoke(bundle.app, ["verify", str(there), "--json"])
    told = json.loads(said.stdout)
    assert (said.exit_code, told["name"], told["problems"]) == (0, "tiny", [])
    (there / "README.md").unlink()
    said = runner.invoke(bundle.app, ["verify", str(there), "--json"])
    assert (said.exit_code, json.loads(said.stdout)["problems"]) == (1, ["README.md is missing"])
    said = runner.invoke(bundle.app, ["verify", str(there.parent)])
    assert isinstance(said.exception, InputError) and "is no bundle" in str(said.exception)
    assert runner.invoke(bundle.app, ["verify"]).exit_code == 2


def test_a_stage_or_a_run_stands_for_its_bundle(there: Path, tmp_path: Path) -> None:
    place = tmp_path / "run" / "bundle"
    place.mkdir(parents=True)
    shutil.move(there, place / "bundle")
    for given in (tmp_path / "run", place, place / "bundle"):
        assert CliRunner().invoke(bundle.app, ["verify", str(given)]).exit_code == 0

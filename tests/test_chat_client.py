"""`samovar chat`: which file it opens, and that a hostile bundle stays inside its folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tiny import tiny_model

from export import gguf
from foundation.errors import InputError, ModelError
from foundation.report import Silent
from serving import chat


@pytest.fixture(scope="module")
def model_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    gguf.run(gguf.Settings(), {"model": tiny_model(out / "model")}, out, Silent())
    return out / "gguf" / "model.gguf"


def bundle(folder: Path, serve: object, *files: str) -> Path:
    (folder / "gguf").mkdir(parents=True)
    for size, name in enumerate(files, 1):
        (folder / "gguf" / name).write_bytes(b"x" * size)
    (folder / "bundle.json").write_text(json.dumps({"serve": serve}))
    return folder


def test_the_file_that_the_bundle_names(tmp_path: Path) -> None:
    made = bundle(tmp_path / "b", "gguf/large.gguf", "small.gguf", "large.gguf")
    assert chat.gguf_of(made) == made / "gguf" / "large.gguf"
    assert chat.gguf_of(made / "gguf" / "small.gguf") == made / "gguf" / "small.gguf"


def test_a_run_stands_for_its_bundle(tmp_path: Path) -> None:
    made = bundle(tmp_path / "run" / "bundle" / "bundle", "gguf/a.gguf", "a.gguf")
    for given in (tmp_path / "run", tmp_path / "run" / "bundle", made):
        assert chat.gguf_of(given) == made / "gguf" / "a.gguf"


@pytest.mark.parametrize("serve", ["../../secret.gguf", "/etc/passwd", 5, None])
def test_a_name_outside_the_bundle_is_not_followed(tmp_path: Path, serve: object) -> None:
    (tmp_path / "secret.gguf").write_bytes(b"x")
    made = bundle(tmp_path / "a" / "b", serve, "own.gguf")
    assert chat.gguf_of(made) == made / "gguf" / "own.gguf"


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle and no GGUF file"):
        chat.gguf_of(tmp_path)


@pytest.mark.parametrize(
    "listing",
    [
        "[]",
        "[" * 200_000,
        '{"serve": "a\\u0000b"}',
        json.dumps({"serve": "n" * 5000}),
        json.dumps({"serve": "gguf/none.gguf"}),
        json.dumps({"serve": "gguf/dangling.gguf"}),
    ],
)
def test_a_listing_that_names_no_file_is_refused(tmp_path: Path, listing: str) -> None:
    made = bundle(tmp_path / "b", None, "own.gguf")
    (made / "gguf" / "dangling.gguf").symlink_to("nowhere.gguf")
    (made / "bundle.json").write_text(listing)
    with pytest.raises(InputError, match=r"bundle\.json: "):
        chat.gguf_of(made)


def test_a_dangling_link_is_passed_over(tmp_path: Path) -> None:
    made = bundle(tmp_path / "b", None)
    (made / "gguf" / "a.gguf").symlink_to("nowhere.gguf")
    with pytest.raises(InputError, match="no bundle and no GGUF file"):
        chat.gguf_of(made)


def test_a_bad_prompt_does_not_end_the_talk(
    model_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"word " * 400 + b"\na \xff b\nhello\n/quit\n"))
    )
    assert chat.main(model_gguf, None, max_new_tokens=5) == 0
    talk = capsys.readouterr().out
    assert "the context has 128" in talk and "surrogate" in talk
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/quit\n")))
    chat.main(model_gguf, None, max_new_tokens=5)
    alone = capsys.readouterr().out.partition("\n")[2]
    assert talk.endswith(alone)  # what was refused is not in the conversation


def test_one_prompt_answers_and_ends(model_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(model_gguf, "A squat?", max_new_tokens=5) == 0
    first = capsys.readouterr().out
    chat.main(model_gguf, "A squat?", max_new_tokens=5)
    assert first.endswith("\n") and capsys.readouterr().out == first  # greedy: the same again


def test_a_prompt_longer_than_the_context(model_gguf: Path) -> None:
    with pytest.raises(ModelError, match="the context has 128"):
        chat.main(model_gguf, "word " * 400)


def test_a_talk_longer_than_the_context_forgets_its_beginning(
    model_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["a squat and a plank"] * 12 + ["/clear", "once more", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert chat.main(model_gguf, None, max_new_tokens=12) == 0

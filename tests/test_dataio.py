"""Text and conversations from files: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foundation.dataio import conversations, documents, write_jsonl
from foundation.errors import InputError


def test_documents_of_both_kinds_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\nstill first\n\n\nsecond\r\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "third"}\n\n{"text": " "}\n{"text": "ёж"}', encoding="utf-8")
    assert list(documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == [
        "first\nstill first",
        "second",
        "third",
        "ёж",
    ]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert list(documents([tmp_path / "a.txt"])) == ["word"]


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "cp866"])
def test_old_encodings_are_named_with_their_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes(b"plain line\n" + "Мама мыла раму, и рама сияла".encode(encoding))
    with pytest.raises(InputError, match=rf"old\.txt, line 2: not UTF-8 .*{encoding}") as seen:
        list(documents([path]))
    assert f"iconv -f {encoding}" in seen.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n \n\n", "holds no document"),
        (b"\x7fELF\x01\x00\x00", "line 1: a NUL byte"),
        ("текст".encode("utf-16"), "UTF-16"),
        ("a text".encode("utf-16-le"), "NUL byte"),
        (b"ok\n\xff\xfe\xfd", "line 2: not UTF-8"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(documents([path]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 1: not JSON"),
        ("[1]", "a list; a JSON object"),
        ('{"story": "x"}', r"no text under 'text'; the keys are \['story'\]"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=said):
        list(documents([path]))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(documents([tmp_path / "none.txt"]))


def test_conversations_keep_what_a_template_may_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a", "extra": 1}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "c.jsonl", [{"messages": messages, "profile": {}}])
    assert list(conversations([tmp_path / "c.jsonl"])) == [messages]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, 'no "messages"'),
        ([], 'no "messages"'),
        ([{"role": "robot", "content": "a"}], "role out of"),
        ([{"role": "user", "content": 5}], "must be text"),
        ([{"role": "user", "content": "a"}], "assistant's answer"),
        ([{"role": "assistant", "content": "  "}], "assistant's answer"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, messages: object, said: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(InputError, match=said):
        list(conversations([path]))


@pytest.mark.parametrize("ending", [".JSONL", ".ndjson", ".NDJson", ".jsonl", ".json"])
def test_json_lines_by_any_of_their_endings(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text('{"text": "first"}\n{"text": "second"}\n')
    assert list(documents([path])) == ["first", "second"]


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder; a file is needed") as seen:
        list(documents([tmp_path]))
    assert f"{tmp_path}/*.jsonl" in seen.value.hint


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('"half \\ud800 pair"', "surrogate pair"),
        ('"x", "deep": [{"key": "\\uDFff"}]', "surrogate pair"),
        ('"x", "n": ' + "9" * 5000, "can not be read"),
        ('"x", "n": ' + "[" * 200_000, "nested too deep"),
    ],
)
def test_json_that_breaks_readers_is_refused_by_its_line(tmp_path: Path, value: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ' + value + "}\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 2: .*{said}"):
        list(documents([path]))


def test_a_whole_pair_and_a_spelt_escape_are_text(tmp_path: Path) -> None:
    path = tmp_path / "good.jsonl"
    path.write_text('{"text": "\\ud83d\\ude80 \\\\ud800"}\n')
    assert list(documents([path])) == ["🚀 \\ud800"]


def test_tools_that_no_model_would_see_are_refused(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "name": None, "thought": "c"},
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": talk, "tools": [{"name": "search"}]}])
    found = conversations([tmp_path / "a.jsonl"])
    assert next(found) == [talk[0], {"role": "assistant", "content": "b", "thought": "c"}]
    with pytest.raises(InputError, match=r'a\.jsonl, line 2: "tools" are not rendered'):
        next(found)

"""Text and conversations from files: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foundation.dataio import conversations, documents, write_jsonl
from foundation.errors import InputError


def test_documents_of_both_kinds_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\nstill first\n\n\nsecond\r\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "third"}\n\n{"text": " "}\n{"text": null}\n{"text": "ёж"}', encoding="utf-8"
    )
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
        ('"word"', "line 1: a string; a JSON object"),
        ("5", "line 1: a number; a JSON object"),
        ('{"story": "x"}', r"no text under 'text'; the keys are \['story'\]"),
        ('{"text": {"a": "x"}}', "line 1: an object under 'text', where text is needed"),
        ('{"text": ["x"]}', "line 1: an array under 'text', where text is needed"),
        ('{"text": 5.5}', "line 1: a number under 'text', where text is needed"),
        ('{"text": true}', "line 1: true or false under 'text', where text is needed"),
        ('{"messages": []}', "line 1: no text under 'text', but a conversation"),
        ('{"text": null}\n{"text": " "}', "holds no document: each of its 2 texts is blank or null"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=said) as caught:
        list(documents([path]))
    assert caught.value.hint


RECORDS = [{"text": "a [b] {c}"}, {"text": "d"}]
ARRAY, OVER = "one JSON document, an array", " over many lines"


@pytest.mark.parametrize(
    ("content", "whole", "command"),
    [
        (json.dumps(RECORDS), ARRAY + ";", "jq -c '.[]' 'a b.ru.json' > 'lines-a b.ru.jsonl'"),
        ("[]", ARRAY + ";", "jq -c '.[]' "),
        (json.dumps(RECORDS, indent=1), ARRAY + OVER, "jq -c '.[]' "),
        ("\n[" + ",\n".join(map(json.dumps, RECORDS)) + "]\n", ARRAY + OVER, "jq -c '.[]' "),
        (json.dumps({"data": RECORDS}, indent=2), "an object" + OVER, "'.KEY[]'"),
        ('{"data": [\n1]}', "an object" + OVER, "'.KEY[]'"),
        ("\n".join(json.dumps(record, indent=2) for record in RECORDS), "an object" + OVER, "jq -c . "),
    ],
)
def test_one_document_of_json_is_called_one(tmp_path: Path, content: str, whole: str, command: str) -> None:
    path = tmp_path / "a b.ru.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"a b.ru.json looks like .*{whole}") as caught:
        list(documents([path]))
    assert command in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        "[Intro] words\nmore",
        "[1",
        '{"text": "b"\n{"text": "c"}',
        '{"text": "b',
        '{"text": "a"}\n[\n1]',
        "{'a'\n:1}",
    ],
)
def test_other_lines_that_are_no_json_are_not_called_one_document(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl, line \d: not JSON"):
        list(documents([tmp_path / "a.jsonl"]))


def test_the_folder_of_a_stage_is_called_one(tmp_path: Path) -> None:
    for name in ("manifest.json", "text.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="a folder; a file is needed") as caught:
        list(documents([tmp_path]))
    assert "the folder of a stage; give a file that it wrote: held.jsonl, text.jsonl" in caught.value.hint


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

"""Foreign corpora: each kind of file gives its documents, as `datasets` gives them, or is refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from reading import texts_of

from corpora import encodings
from corpora.folders import inferred
from corpora.readers import Choice, documents_in, sources_of
from foundation import dataio
from foundation.dataio import write_jsonl
from foundation.errors import InputError
from foundation.report import Silent

TEXTS = ["Первый рассказ.\nВторая строка.", 'The second, "quoted"; text', "третий\tрассказ 🚀"]
pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402


def read(path: Path, field: str = "text", **more: str) -> list[str]:
    return texts_of([path], Silent(), field=field, **more)


def as_lines(texts: list[str], encoding: str = "utf-8", field: str = "text") -> bytes:
    return "".join(json.dumps({field: t}, ensure_ascii=False) + "\n" for t in texts).encode(encoding, "ignore")


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=2)
    return path


def zst(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst,
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", [".jsonl", ".NDJSON", ".json"])
def test_json_lines_packed_or_not(tmp_path: Path, ending: str, packed: str) -> None:
    path = tmp_path / f"a{ending}{packed.upper() if ending.isupper() else packed}"
    path.write_bytes(PACKERS[packed](as_lines(TEXTS)))
    assert read(path) == TEXTS


@pytest.mark.parametrize("packed", PACKERS)
def test_plain_text_packed_or_not_in_an_old_encoding(tmp_path: Path, packed: str) -> None:
    (tmp_path / f"a.txt{packed}").write_bytes(
        PACKERS[packed](
            "Первая строка этого рассказа\r\nвторая\r\n\r\n\r\nВторой рассказ, конечно\r\n".encode("cp1251")
        )
    )
    report = Silent()
    [source] = sources_of([tmp_path / f"a.txt{packed}"], Choice(), report)
    assert list(documents_in(source)) == [
        "Первая строка этого рассказа\nвторая", "Второй рассказ, конечно"
    ]  # fmt: skip
    assert source.encoding == "cp1251" and source.done_bytes == source.size_bytes
    assert report.notes == [
        note for note in report.notes if note.startswith(f"a.txt{packed}: cp1251, judged by")
    ]


def test_members_joined_end_to_end_are_one_file(tmp_path: Path) -> None:
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(PACKERS[packed](as_lines(TEXTS[:1])) + PACKERS[packed](as_lines(TEXTS[1:])))
        assert read(path) == TEXTS, packed


def test_lines_of_an_old_mac(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rstill one\r\rtwo\r")
    assert read(tmp_path / "a.txt") == ["one\nstill one", "two"]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1251", "utf-16"])
@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("csv", ";"), ("csv", "\t")])
def test_tables(tmp_path: Path, encoding: str, ending: str, delimiter: str) -> None:
    texts = [*TEXTS[:2], "Третий рассказ, подлиннее: мама мыла раму"]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(
        [["id", "text"], *([n, text] for n, text in enumerate(texts))]
    )
    path = tmp_path / f"a.{ending}"
    path.write_bytes(file.getvalue().encode(encoding))
    assert [text.replace("\r\n", "\n") for text in read(path)] == texts


@pytest.mark.parametrize("ending", ["tsv", "TSV"])
def test_quotes_mean_nothing_between_tabs(tmp_path: Path, ending: str) -> None:
    texts = ['"Hi there', "foo, bar; baz", 'bye"', '"so" he said', '""', "end"]
    path = tmp_path / f"a.{ending}"
    path.write_text("id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts)) + "\n7\t\n")
    assert read(path) == texts
    path.write_text('text\tid\n"a cell\nof two lines"\t1\n')
    with pytest.raises(InputError, match=r"line 2: 1 columns, and line 1 names 2: text, id") as caught:
        read(path)
    assert "name the file .csv" in caught.value.hint


def test_a_row_may_leave_out_empty_cells_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,note\n1,one,x\n2,two\n\n3,,\n")
    assert read(tmp_path / "a.csv") == ["one", "two"]


def test_parquet_and_its_kinds_of_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [TEXTS[0], None, " ", TEXTS[1], TEXTS[2]])
    assert read(path) == TEXTS
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(kind)}), path)
        assert read(path) == TEXTS


def save_dataset(path: Path, texts: list[str | None]) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.Features({"text": datasets.Value("string")})
    shutil.rmtree(path, ignore_errors=True)
    datasets.Dataset.from_dict({"text": texts}, features=kind).save_to_disk(path)


KINDS: dict[str, Callable[[Path, list[str | None]], object]] = {
    "a.jsonl": lambda path, texts: write_jsonl(path, ({"text": text} for text in texts)),
    "a.csv": lambda path, texts: path.write_text("".join(f"{text or ''},1\n" for text in ["text", *texts])),
    "a.tsv": lambda path, texts: path.write_text("".join(f"{text or ''}\t1\n" for text in ["text", *texts])),
    "a.parquet": lambda path, texts: parquet.write_table(
        pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path
    ),
    "saved": save_dataset,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_text_are_passed_over_and_counted(tmp_path: Path, kind: str) -> None:
    """One rule for every kind of file: blank or null is no document, and no fault."""
    path = tmp_path / kind
    KINDS[kind](path, [None, "one", " ", "", "two", None, "\u00a0"])
    [source] = sources_of([path], Choice(), Silent())
    assert list(documents_in(source)) == ["one", "two"] and source.blank == 5
    KINDS[kind](path, [None, " ", None])
    with pytest.raises(InputError, match="holds no document: each of its 3 texts is blank or null") as caught:
        read(path)
    assert "`field`" in caught.value.hint


def test_parquet_without_a_row_is_not_called_blank(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.parquet")
    assert caught.value.message.endswith("holds no document") and "line" not in caught.value.hint


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    lay(tmp_path / "set", ["a.jsonl"])
    (tmp_path / "set" / "b.jsonl").symlink_to("/gone.jsonl")
    for given in (tmp_path / "set", tmp_path / "set" / "b.jsonl"):
        with pytest.raises(InputError, match=r"b\.jsonl is a link that leads nowhere, to /gone\.jsonl"):
            read(given)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: a number under 'text', where text is needed"),
        ("a.json", b'[\n{"text": "x"}]', r"a\.json looks like one JSON document, an array over many lines"),
        (
            "a.json.gz",
            gzip.compress(b'[{"text": "x"}]', mtime=0),
            r"a\.json\.gz looks like one JSON document, an array;",
        ),
        ("a.jsonl", b'{"story": "x"}\n', r"a\.jsonl, line 1: no text under 'text'; the keys are \['story'\]"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: holds no document"),
        ("a.txt", b"text\n\0\0", r"a\.txt, line 2: a NUL byte"),
        ("a.txt", gzip.compress(b"x", mtime=0), r"a\.txt is a gzip file"),
        ("a.jsonl.gz", gzip.compress(as_lines(TEXTS * 99), mtime=0)[:-12], r"a\.jsonl\.gz is damaged, cut off"),
        ("a.jsonl.gz", as_lines(TEXTS), r"a\.jsonl\.gz is damaged, .*Not a gzipped file"),
        ("a.jsonl.bz2", bz2.compress(as_lines(TEXTS))[:-9], r"a\.jsonl\.bz2 is damaged, cut off"),
        ("a.jsonl.bz2", as_lines(TEXTS), r"a\.jsonl\.bz2 is damaged"),
        ("a.jsonl.xz", lzma.compress(as_lines(TEXTS * 99))[:-40], r"a\.jsonl\.xz is damaged, cut off"),
        ("a.jsonl.xz", as_lines(TEXTS), r"a\.jsonl\.xz is damaged"),
        ("a.jsonl.zst", zst(as_lines(TEXTS))[:-9], r"a\.jsonl\.zst is damaged, cut off"),
        ("a.jsonl.zst", as_lines(TEXTS), r"a\.jsonl\.zst is damaged"),
        ("a.parquet", as_lines(TEXTS), r"a\.parquet is damaged, cut off"),
        ("a.csv", b"id,story\n1,x\n", r"a\.csv, line 1: no column 'text'; there: id, story"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv, line 3: 1 columns, and line 1 names 2: id, text"),
        ("a.csv", b"id,text\n1,x\n2,Hello, world\n", r"a\.csv, line 3: 3 columns, and line 1 names 2: id"),
        ("a.csv", b'text\n"x\ny"\nHello, world\n', r"a\.csv, line 4: 2 columns, and line 1 names 1: text"),
        ("a.tsv", b"id\ttext\n1\tx\ty\n", r"a\.tsv, line 2: 3 columns, and line 1 names 2"),
        ("a.csv", b"id,text\r1,x\r2,y\r", r"a\.csv, line 1: lines that end in lone carriage returns"),
        ("a.tsv", b"id\ttext\r1\tx\r", r"a\.tsv, line 1: lines that end in lone carriage returns"),
        ("a.csv", b"id,text\n1,x\r2,y\n", r"a\.csv, line 2: not a table"),
        ("a.jsonl", b'{"text": "x"}\r{"text": "y"}\r', r"a\.jsonl, line 1: lines that end in lone carriage"),
        ("a.csv", b'id,text\n1,"open\n2,y\n', r"a\.csv, line 3: not a table"),
        ("a.pkl", pickle.dumps(TEXTS), r"a\.pkl is unpickled, which runs what it holds"),
        ("a.zip", b"PK\x03\x04", r"a\.zip is an archive"),
        ("a.py", b"text = 1", r"a\.py is code, which is not run"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path / name)
    assert caught.value.hint


def test_bad_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, "story")
    with pytest.raises(InputError, match=r"a\.parquet: no column 'text'; there: id, story"):
        read(path)
    with pytest.raises(InputError, match=r"a\.parquet: column 'id' holds int64, not text"):
        read(path, "id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is damaged, cut off"):
        read(path, "story")
    broken = pyarrow.StringArray.from_buffers(1, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1],
                                              pyarrow.py_buffer(b"\xff\xfe"))  # fmt: skip
    parquet.write_table(pyarrow.table({"text": broken}), path)
    with pytest.raises(InputError, match=r"rows 1 to 1: column 'text' is not UTF-8"):
        read(path)


@pytest.mark.parametrize("packed", [".gz", ".xz"])
def test_a_bomb_is_refused_by_its_line(tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dataio, encodings):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 2**16)
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACKERS[packed](b'{"text": "x"}\n' + b"0" * 2**22))
    with pytest.raises(InputError, match="line 2: longer than 65536 bytes"):
        read(tmp_path / f"a.jsonl{packed}")
    (tmp_path / f"a.txt{packed}").write_bytes(PACKERS[packed](b"line\n" * 2**17))
    with pytest.raises(InputError, match="a document of more than 65536 characters"):
        read(tmp_path / f"a.txt{packed}")


# ----------------------------------------------------------------------------------------------------- folders


def splits_of(datasets: object, folder: Path, cache: Path, **more: str) -> dict[str, list[str]]:
    """What the library itself reads there."""
    found = datasets.load_dataset(str(folder), cache_dir=str(cache), streaming=True, **more)  # type: ignore[attr-defined]
    return {split: [row["text"] for row in rows] for split, rows in found.items()}


README = """---
license: mit
configs:
- config_name: big
  default: true
  data_files:
  - split: train
    path: big/*.jsonl
  - split: extra
    path: [more/b.jsonl, more/a.jsonl]
- config_name: small
  data_dir: small
- config_name: plain
  data_files: "*.jsonl"
---
# A dataset
"""
LAYOUTS = {
    "all are train": ["a.jsonl", "b.jsonl", "deep/er/c.jsonl", "training.jsonl"],
    "by file": ["train.jsonl", "dev.jsonl", "my-test_1.jsonl", "other.jsonl", "contest.jsonl"],
    "by folder": ["train/a.jsonl", "train/test.jsonl", "validation set/a.jsonl", "eval/b.jsonl", "x.jsonl"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
               "data/odd_one-00000-of-00001.jsonl", "train.jsonl"],
    "declared": ["README.md", "big/1.jsonl", "big/2.jsonl", "more/a.jsonl", "more/b.jsonl", "top.jsonl",
                 "small/test.jsonl", "small/train.jsonl"],
}  # fmt: skip
WITH_SUBSETS = [*((name, "") for name in LAYOUTS), ("declared", "small"), ("declared", "plain")]


def lay(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(README.encode() if name == "README.md" else as_lines([f"text of {name}"]))


@pytest.mark.parametrize(("layout", "subset"), WITH_SUBSETS)
def test_a_folder_is_split_as_the_library_splits_it(tmp_path: Path, layout: str, subset: str) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    lay(folder, LAYOUTS[layout])
    theirs = splits_of(datasets, folder, tmp_path / "cache", **({"name": subset} if subset else {}))
    assert theirs
    for split, texts in theirs.items():
        assert sorted(read(folder, split=split, subset=subset)) == sorted(texts), split
    with pytest.raises(InputError, match=r"no split 'nowhere'; there: ") as caught:
        read(folder, split="nowhere", subset=subset)
    said = caught.value.message.partition("there: ")[2].split(", ")
    assert {*said} == {*theirs}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_other_files_of_a_folder_as_the_library_reads_them(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["один", 'two, "2"', "three\nlines"]
    (tmp_path / "set").mkdir()
    if kind == "parquet":
        write_parquet(tmp_path / "set" / "train-0.parquet", texts)
    else:
        with (tmp_path / "set" / "train.csv").open("w", encoding="utf-8", newline="\n") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert splits_of(datasets, tmp_path / "set", tmp_path / "cache") == {"train": texts}
    assert read(tmp_path / "set") == texts


def test_what_a_folder_left_out_is_told(tmp_path: Path) -> None:
    lay(tmp_path / "set", ["train.jsonl", "test.jsonl"])
    for name in ("LICENSE", "script.py"):
        (tmp_path / "set" / name).write_text("raise SystemExit")
    report = Silent()
    assert texts_of([tmp_path / "set"], report) == ["text of train.jsonl"]
    assert report.notes == [
        f"{tmp_path / 'set'}: 1 files read, 3 left out, such as test.jsonl, LICENSE, script.py"
    ]


def test_links_to_folders_are_told_and_not_followed(tmp_path: Path) -> None:
    lay(tmp_path, ["set/a.jsonl", "set/deep/b.jsonl", "other/c.jsonl"])
    (tmp_path / "set" / "deep" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "set" / "file.jsonl").symlink_to(tmp_path / "other" / "c.jsonl")
    report = Silent()
    texts = ["text of set/a.jsonl", "text of set/deep/b.jsonl", "text of other/c.jsonl"]
    assert texts_of([tmp_path / "set"], report) == texts
    link = "deep/link (a link to a folder; it is not followed)"
    assert report.notes == [f"{tmp_path / 'set'}: 3 files read, 1 left out, such as {link}"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "link").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="behind links to folders, which are not followed: link"):
        read(tmp_path / "bare")


@pytest.mark.parametrize("content", ["[]", "{", '{"splits": "train"}', '{"splits": [1]}', "{}", "\xff"])
def test_a_list_of_splits_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset_dict.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"dataset_dict\.json names no splits") as caught:
        read(tmp_path)
    assert caught.value.hint


def test_subsets_that_are_not_there(tmp_path: Path) -> None:
    lay(tmp_path / "set", LAYOUTS["declared"])
    with pytest.raises(InputError, match=r"no subset 'tiny'; there: big, small, plain"):
        read(tmp_path / "set", subset="tiny")
    lay(tmp_path / "bare", ["a.jsonl"])
    with pytest.raises(InputError, match="has no subsets; 'tiny' was asked for"):
        read(tmp_path / "bare", subset="tiny")
    (tmp_path / "set" / "README.md").write_text(README.replace("  default: true\n", ""))
    with pytest.raises(InputError, match="several subsets and no default one; there: big, small, plain"):
        read(tmp_path / "set")
    for more in ({"split": "test"}, {"subset": "big"}):
        with pytest.raises(InputError, match=r"was asked for, and .*a\.jsonl is a file"):
            read(tmp_path / "bare" / "a.jsonl", **more)


@pytest.mark.parametrize(
    "place", ["https://example.com/a.jsonl", "../secret.jsonl", "/etc/a.jsonl", "hf://x/y.jsonl"]
)
def test_a_readme_reaches_nothing_outside(tmp_path: Path, place: str) -> None:
    lay(tmp_path, ["secret.jsonl", "set/a.jsonl"])
    (tmp_path / "set" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: '{place}'\n---\n"
    )
    with pytest.raises(InputError, match="lies outside of the folder"):
        read(tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text("---\nconfigs: !!python/object/apply:os.getcwd []\n---\n")
    with pytest.raises(InputError, match="can not be read"):
        read(tmp_path / "set")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "the folder is empty"),
        (
            ["a.png", "b.PNG", "LICENSE"],
            r"nothing readable among its 3 files with the endings \(none\), \.png$",
        ),
        (["a.py", "b.pkl"], "code is not run, and nothing is unpickled"),
    ],
)
def test_a_folder_without_anything_readable(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert re.search(said, caught.value.message) and ".jsonl" in caught.value.hint


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"id": list(range(300)), "text": [f"текст {n}" for n in range(300)]})
    rows.select(range(299, 199, -1)).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [f"текст {n}" for n in range(299, 199, -1)]
    parts = {"train": rows.select(range(5)), "held": rows.select(range(5, 9))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == [f"текст {n}" for n in range(5)]
    assert read(tmp_path / "both", split="held") == [f"текст {n}" for n in range(5, 9)]
    with pytest.raises(InputError, match=r"no split 'test'; there: train, held"):
        read(tmp_path / "both", split="test")
    with pytest.raises(InputError, match=r"no column 'story'; there: id, text"):
        read(tmp_path / "one", "story")
    with pytest.raises(InputError, match="column 'id' holds int64, not text"):
        read(tmp_path / "one", "id")
    for name, content in (("state.json", "[]"), ("state.json", "{}"), ("dataset_info.json", "[]")):
        shutil.copytree(tmp_path / "one", tmp_path / "odd", dirs_exist_ok=True)
        (tmp_path / "odd" / name).write_text(content)
        with pytest.raises(InputError, match="is not as save_to_disk writes it"):
            read(tmp_path / "odd")
    [arrow] = (tmp_path / "one").glob("*.arrow")
    os.truncate(arrow, arrow.stat().st_size // 2)
    with pytest.raises(InputError, match="one is damaged, cut off"):
        read(tmp_path / "one")


def test_a_readme_is_no_data_and_names_must_be_words() -> None:
    assert inferred(["contest.jsonl", "latest/a.jsonl"]) == {"train": ["contest.jsonl", "latest/a.jsonl"]}
    assert inferred(["pre-train.jsonl", "a.jsonl"]) == {"train": ["pre-train.jsonl"]}


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a reader opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    lay(tmp_path / "set", LAYOUTS["declared"])
    assert len(read(tmp_path / "set", subset="small")) == 1

"""The one way in for foreign text: files of any encoding and packing, Parquet, and folders of datasets.

| ending                 | read as                                                          |
|------------------------|------------------------------------------------------------------|
| .jsonl .ndjson .json   | JSON lines, `field` of each                                      |
| .csv                   | a table with a line of column names, column `field`              |
| .tsv                   | the same between tabs; quotes mean nothing in it                 |
| .parquet               | column `field`                                                   |
| .txt, any other        | plain text; an empty line ends a document                        |
| .gz .bz2 .xz .zst      | after one of those of text: unpacked while it is read            |
| a folder               | what `save_to_disk` of `datasets` wrote, or a split's files (folders.py) |

A row whose text is blank or null is no document, in every kind of file: it is passed over, and counted as
`blank`. A row without the key, or with something else than text under it, is refused, and so is a file without
any document. Empty lines are no rows.

Nothing is held in memory but the line at hand, and of Parquet one row group's column as it is packed; nothing
is fetched, run or unpickled. What is read here is cleaned by corpora.prepare; all later stages read its UTF-8
JSON lines through foundation/dataio.py.
"""

from __future__ import annotations

import csv
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from corpora.encodings import AUTO, Seen, decoded_lines
from corpora.folders import linked_folders, readable, split_files
from foundation.dataio import JSON_LINES, MAX_LINE_BYTES, no_document, paragraphs, parsed, texts_under
from foundation.errors import InputError, MissingError
from foundation.files import PACKED, read_json, refuse_dangling
from foundation.report import Report

BATCH_ROWS = 128
TABLES = (".csv", ".tsv")
PLAIN = (".txt", ".text")
_OF_TEXT = (*JSON_LINES, *TABLES, *PLAIN)
ENDINGS = (".parquet", *_OF_TEXT, *(ending + packed for ending in _OF_TEXT for packed in PACKED))
_UNPICKLED = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".npy", ".npz")
_REFUSED = {
    **dict.fromkeys(_UNPICKLED, ("is unpickled, which runs what it holds", "save it as JSON lines")),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".rar", ".7z"), ("is an archive", "unpack it; give the folder")),
    ".py": ("is code, which is not run", "give what it makes"),
    ".arrow": ("is one part of a saved dataset", "give its folder"),
}  # fmt: skip


@dataclass
class Source:
    """One file, or one saved dataset, with what is known of it while it is read."""

    path: Path
    name: str  # as told in reports: below the folder that was given
    size_bytes: int
    texts: Callable[[Source], Iterator[str]] = field(repr=False)  # "" for a row that holds none
    done_bytes: int = 0  # of size_bytes; for progress
    encoding: str = ""  # of a text file, once it is found out
    blank: int = 0  # rows so far that hold no text


@dataclass(frozen=True)
class Choice:
    """What is read out of the files: settings of the same names."""

    field: str = "text"
    split: str = "train"
    subset: str = ""
    encoding: str = AUTO


def documents_in(source: Source) -> Iterator[str]:
    """The documents of one source. Raises InputError when it has none."""
    found = False
    for text in source.texts(source):
        source.blank += not text
        if text:
            found = True
            yield text
    source.done_bytes = source.size_bytes
    if not found:
        raise no_document(source.path, source.blank)


def sources_of(paths: Iterable[Path], choice: Choice, report: Report) -> list[Source]:
    """What there is to read under `paths`: files as they are, folders by their split."""
    found: list[Source] = []
    for path in paths:
        refuse_dangling(path)
        if path.is_dir():
            found += _sources_in(path, choice, report)
            continue
        if not path.is_file():
            raise InputError(f"{path}: no such file", hint="check the path in the recipe's [inputs]")
        if choice.subset or choice.split != "train":
            asked = f"subset {choice.subset!r}" if choice.subset else f"split {choice.split!r}"
            raise InputError(f"{asked} was asked for, and {path} is a file", hint="give the dataset's folder")
        found.append(_source(path, path.name, choice, report))
    return found


def _source(path: Path, name: str, choice: Choice, report: Report) -> Source:
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise InputError(f"{path}: the file is empty", hint="give one that holds something")
    ending = path.suffix.lower()
    if ending in _REFUSED:
        what, hint = _REFUSED[ending]
        raise InputError(f"{path} {what}", hint=hint)
    if ending == ".parquet":
        return Source(path, name, size_bytes, lambda source: _parquet(source, choice.field))
    return Source(path, name, size_bytes, lambda source: _text(source, choice, report))


# ----------------------------------------------------------------------------------------------------- folders


def _sources_in(folder: Path, choice: Choice, report: Report) -> list[Source]:
    """The sources of a folder: a saved dataset, or the files of a split."""
    if (folder / "dataset_dict.json").is_file():
        known = read_json(folder / "dataset_dict.json")
        splits = known.get("splits") if isinstance(known, dict) else None
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise InputError(
                f"{folder}/dataset_dict.json names no splits, as save_to_disk writes them",
                hint="save the dataset anew; or take that file away where the folder holds plain files",
            )
        if choice.split not in splits:
            raise InputError(
                f"{folder} has no split {choice.split!r}; there: {', '.join(splits)}",
                hint="name one with `split`",
            )
        return [_saved(folder / choice.split, folder, choice)]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [_saved(folder, folder, choice)]
    names, others = readable(folder, ENDINGS)
    if not names:
        raise InputError(
            f"{folder}: {_nothing(others, linked_folders(folder))}",
            hint=f"readable are {', '.join(ENDINGS[:7])}; see docs",
        )
    files = split_files(folder, names, choice.split, choice.subset)
    links = linked_folders(folder)
    left = len(names) + len(others) + len(links) - len(files)
    if left:
        chosen = {file.relative_to(folder).as_posix() for file in files}
        told = [f"{name} (a link to a folder; it is not followed)" for name in links]
        examples = [*told[:2], *(name for name in (*names, *others) if name not in chosen)][:5]
        report.note(f"{folder}: {len(files)} files read, {left} left out, such as {', '.join(examples)}")
    return [_source(file, file.relative_to(folder).as_posix(), choice, report) for file in files]


def _nothing(names: list[str], links: list[str]) -> str:
    if links:
        return f"nothing readable but behind links to folders, which are not followed: {', '.join(links[:5])}"
    if not names:
        return "the folder is empty"
    endings = sorted({PurePath(name).suffix.lower() or "(none)" for name in names})
    said = f"nothing readable among its {len(names)} files with the endings {', '.join(endings[:8])}"
    if {*endings} & {*_UNPICKLED, ".py"}:
        said += "; code is not run, and nothing is unpickled"
    return said


def _saved(folder: Path, given: Path, choice: Choice) -> Source:
    name = folder.relative_to(given.parent).as_posix()
    size_bytes = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    return Source(folder, name, size_bytes, lambda source: _saved_rows(source, choice))


def _saved_rows(source: Source, choice: Choice) -> Iterator[str]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        hint = "pip install 'samovar[train]'"
        raise MissingError(
            f"{source.path} is a saved dataset; `datasets` is not installed", hint=hint
        ) from error
    with _damage(source.path):
        try:
            dataset = load_from_disk(str(source.path), keep_in_memory=False)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{source.path}: state.json or dataset_info.json is not as save_to_disk writes it",
                hint="save the dataset anew",
            ) from error
        assert isinstance(dataset, Dataset), "dataset_dict.json was looked for"
        _check_column(source.path, choice.field, dataset.data.schema)
        batches = dataset.select_columns([choice.field]).with_format("arrow").iter(BATCH_ROWS)
        yield from _column_texts(source, choice.field, (batch.column(0) for batch in batches), len(dataset))


# ----------------------------------------------------------------------------------------------------- columns


def _parquet(source: Source, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        hint = "pip install 'samovar[train]'"
        raise MissingError(f"{source.path} is Parquet; pyarrow is not installed", hint=hint) from error
    with _damage(source.path), parquet.ParquetFile(source.path) as file:
        _check_column(source.path, column, file.schema_arrow)
        # Over all groups at once pyarrow would keep what it has read: so one group's column is the bound.
        arrays = (
            batch.column(0)
            for group in range(file.num_row_groups)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)
        )
        yield from _column_texts(source, column, arrays, file.metadata.num_rows)


def _check_column(path: Path, column: str, schema: Any) -> None:
    """Raise InputError unless `schema` has a column of that name that holds text."""
    import pyarrow.types as types

    if column not in schema.names:
        hint = "name the one that holds the text with `field`"
        raise InputError(f"{path}: no column {column!r}; there: {', '.join(schema.names)}", hint=hint)
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        hint = "name a column of text with `field`"
        raise InputError(f"{path}: column {column!r} holds {kind}, not text", hint=hint)


def _column_texts(source: Source, column: str, arrays: Iterable[Any], rows: int) -> Iterator[str]:
    row = 0
    for array in arrays:
        try:
            texts = array.to_pylist()
        except UnicodeDecodeError as error:
            where = f"{source.path}, rows {row + 1} to {row + len(array)}"
            hint = "write the file anew from its source"
            raise InputError(f"{where}: column {column!r} is not UTF-8 ({error})", hint=hint) from None
        for text in texts:
            row += 1
            if text is not None and len(text) > MAX_LINE_BYTES:
                raise InputError(
                    f"{source.path}, row {row}: longer than {MAX_LINE_BYTES} characters",
                    hint="split that document",
                )
            yield text if text and text.strip() else ""
        source.done_bytes = source.size_bytes * row // max(1, rows)


# -------------------------------------------------------------------------------------------------------- text


def _text(source: Source, choice: Choice, report: Report) -> Iterator[str]:
    """Documents of a text file by its ending, unpacked and decoded while it is read."""
    path, name = source.path, str(source.path)

    def tell(seen: Seen) -> None:
        source.encoding = seen.encoding
        if choice.encoding == AUTO and seen.encoding not in ("utf-8", "ascii"):
            report.note(f"{source.name}: {seen}")

    with _damage(path), path.open("rb") as raw, _unpacked(raw, path) as file:
        numbered = decoded_lines(file, name, choice.encoding, tell)
        inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
        if inner.suffix.lower() in JSON_LINES:
            texts = texts_under(choice.field, parsed(_one_object_each(numbered, name), name), name)
        elif inner.suffix.lower() in TABLES:
            texts = _table_texts(numbered, choice.field, name, quoted=inner.suffix.lower() != ".tsv")
        else:
            texts = paragraphs(_without_returns(numbered), name)
        for text in texts:
            source.done_bytes = raw.tell()
            yield text


def _without_returns(numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines that end in a lone carriage return, as on old Macs, are lines of their own."""
    for number, line in numbered:
        for part in line.split("\r"):
            yield number, part


_TWO_OBJECTS = re.compile(r"\}[^\S\r]*\r\s*\{")  # nowhere in one of JSON


def _one_object_each(numbered: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[int, str]]:
    """Lines as they are. Raises InputError for one that is several, as JSON would not say."""
    for number, line in numbered:
        if "\r" in line and _TWO_OBJECTS.search(line):
            raise _lone_returns(name, number)
        yield number, line


def _lone_returns(name: str, number: int) -> InputError:
    new = PurePath(name).name
    return InputError(
        f"{name}, line {number}: lines that end in lone carriage returns, as on old Macs",
        hint=f"write line feeds: tr '\\r' '\\n' < {new} > lines-{new}",
    )


def _table_texts(numbered: Iterable[tuple[int, str]], column: str, name: str, *, quoted: bool) -> Iterator[str]:
    """`column` of a table whose first line names the columns; tabs part cells that are never `quoted`."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (line + "\n" for _, line in numbered)
    first = next(lines, "")
    if "\r" in first:
        raise _lone_returns(name, 1)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    delimiter = max(",;\t", key=first.count) if quoted else "\t"
    header = next(csv.reader([first], delimiter=delimiter, quoting=quoting), [])
    columns = [part.strip() for part in header]
    if column not in columns:
        hint = "name the one that holds the text with `field`"
        raise InputError(f"{name}, line 1: no column {column!r}; there: {', '.join(columns)[:200]}", hint=hint)
    place = columns.index(column)
    fewest = place + 1 if quoted else len(columns)  # spreadsheets leave out empty cells at the end of a row
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in rows:
            if row and not fewest <= len(row) <= len(columns):
                said = f"{len(row)} columns, and line 1 names {len(columns)}: {', '.join(columns)[:200]}"
                raise InputError(f"{name}, line {rows.line_num + 1}: {said}", hint=_CELLS[quoted])
            if row:
                yield row[place] if row[place].strip() else ""
    except csv.Error as error:
        hint = "mend that line: a quote may not be closed, or a line end in a lone carriage return"
        raise InputError(f"{name}, line {rows.line_num + 1}: not a table ({error})", hint=hint) from None


_CELLS = {  # by whether cells may be quoted
    True: 'mend that line: a cell that holds the separator stands in quotes: 1,"Hello, world"',
    False: "a cell of a .tsv holds no tab and no line end; where cells are quoted, name the file .csv",
}


@contextmanager
def _unpacked(raw: io.BufferedReader, path: Path) -> Iterator[io.BufferedIOBase]:
    """`raw`, or what it unpacks to, by the ending of `path`."""
    import bz2
    import gzip

    ending = path.suffix.lower()
    if ending == ".zst":
        try:
            from pyarrow import CompressedInputStream
        except ImportError as error:
            hint = f"pip install 'samovar[train]', or unpack it: zstd -d {path.name}"
            raise MissingError(f"{path} is packed with zstd; pyarrow is not installed", hint=hint) from error
        with CompressedInputStream(raw, "zstd") as stream:
            yield io.BufferedReader(stream)
        return
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if ending not in openers:
        yield raw
        return
    with openers[ending](raw) as file:
        yield file


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What the libraries say of a damaged or cut-off file becomes an InputError that names it."""
    try:
        yield
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's trouble, not the file's
            raise
        if isinstance(error, ValueError) and type(error).__module__ not in ("pyarrow.lib", "json.decoder"):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} is damaged, cut off, or not what its ending says: {said}", hint="copy or download it again"
        ) from error

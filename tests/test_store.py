"""A store as a folder: alignment is proven before the first step, and damage is named."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_codec import Columns, distributions, entries
from tiny import chats, tiny_tokenizer
from typer.testing import CliRunner

from distill.store import (
    HEADER,
    Header,
    TopKStore,
    data_digest,
    header_digest,
    row_key,
    seal,
    shard_facts,
    shard_path,
    template_digest,
    verify,
    write_shard,
)
from foundation.chat import IGNORED
from foundation.dataio import conversations, write_jsonl
from foundation.errors import ArtifactError, ModelError
from foundation.report import Silent
from foundation.rows import Row, chat_rows, collate
from foundation.tokenizer import Tokenizer
from samovar.cli import app

TOP_K, SHARD_ROWS = 6, 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_jsonl(path, chats())
    return chat_rows(conversations([path]), tokenizer, 128)[0]


@pytest.fixture(scope="module")
def exact(rows: list[Row], tokenizer: Tokenizer) -> list[Columns]:
    """The columns of every conversation, as a teacher might have given them."""
    return [distributions(n, positions(row), len(tokenizer), TOP_K) for n, row in enumerate(rows)]


def positions(row: Row) -> int:
    return int((row["labels"][1:] != IGNORED).sum())


def stored(folder: Path, rows: list[Row], exact: list[Columns], tokenizer: Tokenizer) -> Path:
    """A sealed store of `rows` in `folder`."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
        part = range(start, min(start + SHARD_ROWS, len(rows)))
        columns = {name: np.concatenate([exact[n][name] for n in part]) for name in exact[0]}
        keys, lengths = [row_key(rows[n]) for n in part], [positions(rows[n]) for n in part]
        path = shard_path(folder, number)
        write_shard(path, columns, keys, lengths, vocab_tokens=len(tokenizer), bits=6)
        shards.append(shard_facts(path))
    header = Header(
        support="top_k", top_k=TOP_K, mass=1.0, draws=0, bits=6, temperature=1.0, vocab_tokens=len(tokenizer),
        teacher="7e" * 32, tokenizer=tokenizer.digest, tokenizer_tokens=len(tokenizer),
        template=template_digest(tokenizer), data=data_digest([row_key(row) for row in rows]), rows=len(rows),
        positions=sum(map(positions, rows)), shards=tuple(shards),
    )  # fmt: skip
    seal(folder, header)
    return folder


@pytest.fixture
def store(tmp_path: Path, rows: list[Row], exact: list[Columns], tokenizer: Tokenizer) -> Path:
    return stored(tmp_path / "store", rows, exact, tokenizer)


def changed(store: Path, **values: object) -> None:
    """Write other values into the header, and the digest that goes with them."""
    header = {**json.loads((store / HEADER).read_text()), **values}
    del header["digest"]
    (store / HEADER).write_text(json.dumps({**header, "digest": header_digest(header)}))


def edited(store: Path, before: str, after: str) -> None:
    """Replace text of the header, as by hand."""
    text = (store / HEADER).read_text()
    assert before in text
    (store / HEADER).write_text(text.replace(before, after))


def another_shard(store: Path, **values: object) -> None:
    """Other facts of the first shard, in the header."""
    shards = json.loads((store / HEADER).read_text())["shards"]
    changed(store, shards=[{**shards[0], **values}, *shards[1:]])


def piped(path: Path) -> None:
    """Put a pipe in the place of a file: to open it would wait for a writer for ever."""
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def test_columns_stand_beside_their_labels(
    store: Path, rows: list[Row], exact: list[Columns], tokenizer: Tokenizer
) -> None:
    """The n-th counted label has the n-th position; elsewhere there is nothing; a batch pads with zeros."""
    beside = TopKStore(store).beside(rows, tokenizer, temperature=1.0)
    assert len(beside) == len(rows)
    for number in reversed(range(len(rows))):
        row, theirs = beside[number], exact[number]
        counted = np.flatnonzero(rows[number]["labels"] != IGNORED)
        assert counted[0] > 0
        for name in theirs:
            assert row[name].shape[0] == len(row["labels"])
            assert not np.delete(row[name], counted, axis=0).any()
        for n, at in enumerate(counted):
            ours = dict(zip(row["topk_ids"][at].tolist(), row["topk_logprobs"][at].tolist(), strict=True))
            assert ours.keys() == entries(theirs)[n].keys()
            assert row["tail_logprob"][at] == pytest.approx(theirs["tail_logprob"][n], rel=1e-3)
            assert row["gold_logprob"][at] == pytest.approx(theirs["gold_logprob"][n], rel=1e-3)
            assert row["log_z"][at] == pytest.approx(theirs["log_z"][n], rel=1e-3)
    batch = collate([beside[0], beside[3]], 0)
    assert batch["topk_ids"].shape == (*batch["labels"].shape, TOP_K)


def test_a_first_token_that_counts_has_no_position(
    tmp_path: Path, rows: list[Row], exact: list[Columns], tokenizer: Tokenizer
) -> None:
    """Nothing predicts the first token of a row, so that the teacher said nothing about it."""
    row = {"input_ids": rows[0]["input_ids"], "labels": rows[0]["input_ids"].copy()}
    columns = distributions(1, len(row["labels"]) - 1, len(tokenizer), TOP_K)
    store = TopKStore(stored(tmp_path, [row], [columns], tokenizer))
    found = store.beside([row], tokenizer, temperature=1.0)[0]
    assert not found["topk_ids"][0].any() and found["log_z"][0] == 0
    assert found["log_z"][1:] == pytest.approx(columns["log_z"], rel=1e-3)


def test_the_header_comes_back(store: Path, tokenizer: Tokenizer) -> None:
    header = TopKStore(store).header
    assert header.tokenizer == tokenizer.digest and header.format == 2
    assert dataclasses.asdict(header)["shards"][2]["rows"] == 2
    assert header.data == data_digest([key for shard in TopKStore(store)._shards for key in shard.keys])


def another(tokenizer: Tokenizer, **values: object) -> Tokenizer:
    other = Tokenizer(tokenizer.folder)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def test_another_students_rows_are_refused(store: Path, rows: list[Row], tokenizer: Tokenizer) -> None:
    opened = TopKStore(store)
    with pytest.raises(ModelError, match=r"tokenizer \(another.*400 tokens\).*400 tokens") as caught:
        opened.beside(rows, another(tokenizer, digest="another"), temperature=1.0)
    assert tokenizer.digest[:12] in caught.value.message
    with pytest.raises(ModelError, match=r"chat template .* is not the teacher's"):
        opened.beside(rows, another(tokenizer, chat_template="{{ messages }}"), temperature=1.0)
    with pytest.raises(ModelError, match=r"captured at temperature 1.0, asked for at 2.0"):
        opened.beside(rows, tokenizer, temperature=2.0)


def test_missing_conversations_are_counted_and_the_first_is_named(
    store: Path, rows: list[Row], tokenizer: Tokenizer
) -> None:
    longer = [*rows[:3], {name: values[:-1] for name, values in rows[3].items()}, *rows[4:]]
    masked = dict(longer[7], labels=np.where(np.arange(len(longer[7]["labels"])) < 4, 1, longer[7]["labels"]))
    longer[7] = masked  # the same tokens, of which others count
    tokens = len(longer[3]["input_ids"])
    said = f"2 of {len(rows)} conversations are not in the store; the first is number 4, {tokens} tokens long"
    with pytest.raises(ModelError, match=said):
        TopKStore(store).beside(longer, tokenizer, temperature=1.0)
    with pytest.raises(ModelError, match="is not in the store"):
        TopKStore(store).columns(masked)


def test_conversations_that_come_twice_are_stored_and_found(
    tmp_path: Path, rows: list[Row], exact: list[Columns], tokenizer: Tokenizer
) -> None:
    twice = [rows[0], rows[1], rows[0]]
    store = TopKStore(stored(tmp_path, twice, [exact[0], exact[1], exact[0]], tokenizer))
    beside = store.beside(twice, tokenizer, temperature=1.0)
    np.testing.assert_array_equal(beside[0]["topk_logprobs"], beside[2]["topk_logprobs"])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda store: (store / HEADER).unlink(), "not a finished top-K store"),
        (lambda store: (store / HEADER).write_text("{"), "not a finished top-K store"),
        (lambda store: (store / HEADER).write_text("[" * 100_000), "not a finished top-K store"),
        (lambda store: (store / HEADER).write_text("[]"), "store format None; this version reads 2"),
        (lambda store: changed(store, format=3), "store format 3; this version reads 2"),
        (lambda store: (store / HEADER).rename(store / "meta.json"), "store format 2; this version"),
        (lambda store: changed(store, top_k="6"), "header.json: damaged: top_k"),
        (lambda store: changed(store, support="all"), "header.json: damaged: support"),
        (lambda store: changed(store, rows=11), "its list of shards is not possible"),
        (lambda store: changed(store, shards=[]), "header.json: damaged: shards"),
        (lambda store: changed(store, more=1), "header.json: damaged: more"),
        (lambda store: changed(store, **{"a\x1b[31m": 1}), r"header.json: damaged: a\\x1b\[31m"),
        (lambda store: changed(store, format="\x1b[31m"), r"store format '\\x1b\[31m'"),
        (lambda store: changed(store, teacher="\x1b[31m"), "header.json: damaged: teacher"),
        (lambda store: changed(store, temperature=0.0), "header.json: damaged: temperature"),
        (lambda store: changed(store, temperature=float("inf")), "header.json: damaged: temperature"),
        (lambda store: changed(store, mass=0.0), "header.json: damaged: mass"),
        (lambda store: changed(store, mass=1.5), "header.json: damaged: mass"),
        (lambda store: changed(store, mass=float("nan")), "header.json: damaged: mass"),
        (lambda store: changed(store, draws=-1), "header.json: damaged: draws"),
        (lambda store: changed(store, top_k=0), "header.json: damaged: top_k"),
        (lambda store: changed(store, top_k=10**9), "header.json: damaged: top_k"),
        (lambda store: changed(store, top_k=10**400), "header.json: damaged: top_k"),
        (lambda store: changed(store, top_k=1000), "header.json: damaged: top_k = 1000 of 400 ids"),
        (lambda store: changed(store, tokenizer_tokens=0), "header.json: damaged: tokenizer_tokens"),
        (lambda store: changed(store, positions=2**63), "header.json: damaged: positions"),
        (lambda store: another_shard(store, rows=0), "header.json: damaged: shards.0.rows"),
        (lambda store: another_shard(store, more=0), "header.json: damaged: shards.0.more"),
        (lambda store: edited(store, '"temperature": 1.0', '"temperature": 2.0'), "header.json was altered"),
        (lambda store: edited(store, '"digest"', '"former"'), "header.json was altered"),
        (lambda store: piped(store / HEADER), "not a finished top-K store"),
        (lambda store: endless(store / HEADER), "not a finished top-K store"),
        (lambda store: os.truncate(store / HEADER, 2**26 + 1), "not a finished top-K store"),
        (lambda store: piped(shard_path(store, 1)), "shard-00001.topk: damaged: not a regular file"),
        (lambda store: endless(shard_path(store, 1)), "shard-00001.topk: damaged: not a regular file"),
        (lambda store: changed(store, data="0" * 64), "its shards are not those of its header.json"),
        (lambda store: changed(store, bits=7), "of another kind"),
        (lambda store: changed(store, top_k=5), "of another kind"),
        (lambda store: changed(store, vocab_tokens=401), "of another kind"),
        (lambda store: shard_path(store, 1).unlink(), "shard-00001.topk: damaged: can not be read"),
        (lambda store: shard_path(store, 1).write_bytes(b""), "shard-00001.topk: damaged: can not be read"),
        (lambda store: shard_path(store, 0).replace(shard_path(store, 1)), "shard-0000[01].topk: damaged"),
    ],
)
def test_a_store_that_is_not_whole_is_refused_when_opened(
    store: Path, spoil: Callable[[Path], object], match: str
) -> None:
    spoil(store)
    with pytest.raises(ArtifactError, match=match) as caught:
        TopKStore(store)
    assert caught.value.hint
    with pytest.raises(ArtifactError):
        verify(store, Silent())


def test_a_store_of_the_first_format_is_refused_by_its_version(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"format": 1, "top_k": 100}')
    with pytest.raises(ArtifactError, match="store format 1; this version reads 2"):
        TopKStore(tmp_path)


def test_the_folder_of_a_capture_is_not_its_store(store: Path) -> None:
    with pytest.raises(ArtifactError, match="not a finished top-K store") as caught:
        TopKStore(store.parent)
    assert str(store) in caught.value.hint


def test_a_shard_that_names_a_file_outside_is_refused(store: Path) -> None:
    another_shard(store, name="../../etc/passwd")
    with pytest.raises(ArtifactError, match="its list of shards is not possible"):
        TopKStore(store)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def test_verify_names_every_damaged_file(store: Path, rows: list[Row]) -> None:
    counts = {"shards": 3, "rows": len(rows), "positions": sum(map(positions, rows))}
    assert verify(store, Silent()) == counts
    flip(shard_path(store, 0), -3)
    flip(shard_path(store, 2), 200)
    with pytest.raises(ArtifactError) as caught:
        verify(store, Silent())
    assert [line.split(": damaged: ")[0] for line in caught.value.message.splitlines()] == [
        str(shard_path(store, 0)),
        str(shard_path(store, 2)),
    ]
    assert "delete the folder of the capture and run it again" in caught.value.hint


def test_damage_in_one_conversation_leaves_the_others_readable(store: Path, rows: list[Row]) -> None:
    flip(shard_path(store, 0), -3)
    opened = TopKStore(store)
    opened.columns(rows[0])
    with pytest.raises(
        ArtifactError, match=r"shard-00000.topk: damaged: the checksum of conversation 5 is wrong"
    ):
        opened.columns(rows[4])
    with pytest.raises(ArtifactError, match="conversation 5"):
        shard_facts(shard_path(store, 0))


def test_a_shard_swapped_for_a_sound_one_is_noticed(
    store: Path, tmp_path: Path, rows: list[Row], exact: list[Columns], tokenizer: Tokenizer
) -> None:
    """The same conversations, captured from another teacher: all sizes and checksums are in order."""
    louder = [{**columns, "log_z": columns["log_z"] + 1} for columns in exact]
    other = stored(tmp_path / "other", rows, louder, tokenizer)
    shard_path(store, 1).write_bytes(shard_path(other, 1).read_bytes())
    TopKStore(store)
    with pytest.raises(
        ArtifactError, match=r"shard-00001.topk: damaged: its sha256 is not that in header.json"
    ):
        verify(store, Silent())


def test_the_command_line_tells_what_a_store_costs(store: Path) -> None:
    told = CliRunner().invoke(app, ["store", "info", str(store), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["top_k"] == TOP_K and found["format"] == 2
    spent = found["bytes"]
    size = sum(path.stat().st_size for path in store.iterdir())
    assert spent["whole"] * found["positions"] == pytest.approx(size)
    assert spent["plain"] == 8 * TOP_K
    in_shards = sum(spent[part] for part in ("ids", "levels", "headers", "index", "table"))
    assert in_shards * found["positions"] == pytest.approx(size - (store / HEADER).stat().st_size)
    page = CliRunner().invoke(app, ["store", "info", str(store.parent)])  # the stage's folder does as well
    assert page.exit_code == 0 and "levels" in page.stdout and "plain layout" in page.stdout


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "samovar.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_line_verifies(store: Path) -> None:
    whole = command("store", "verify", str(store))
    assert (whole.returncode, whole.stderr) == (0, "") and "whole; 3 shards, 12 rows" in whole.stdout
    flip(shard_path(store, 1), 300)
    damaged = command("store", "verify", str(store), "--json")
    assert damaged.returncode == 1 and "shard-00001.topk" in json.loads(damaged.stdout)["error"]
    assert "Traceback" not in damaged.stderr

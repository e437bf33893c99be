"""`samovar store`: what a teacher's top-K store is of, what its bytes are spent on, and whether it is whole."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from distill.store import TopKStore

app = typer.Typer(
    help="Look at a teacher's top-K store, or check it.", no_args_is_help=True, rich_markup_mode=None
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A store, or the capture stage's folder.")]
PLAIN_ENTRY_BYTES = 8  # int32 id and float32 value: the layout that stores are compared with


@app.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Tell what a store is of, and what a position costs by part."""
    from distill.store import TopKStore
    from samovar.cli import _print, _show

    store = TopKStore(_store_in(folder))
    figures = costs(store)
    _print({**asdict(store.header), "bytes": figures}) if as_json else _show(info_page(store, figures))


@app.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read a store to its last bit; names every damaged file."""
    from distill.store import verify as read_all
    from samovar.cli import _print, _say

    path = _store_in(folder)
    with Bar(shown=not as_json) as bar:
        checked = read_all(path, bar)
    if as_json:
        _print(checked)
    else:
        _say(f"{path}: whole; " + ", ".join(f"{count:,} {name}" for name, count in checked.items()))


def costs(store: TopKStore) -> dict[str, float]:
    """Bytes a position, by part; the whole, header.json included; and the plain layout's."""
    from distill.store import HEADER

    positions = store.header.positions
    parts = store.parts()
    whole = sum(parts.values()) + (store.folder / HEADER).stat().st_size
    per_position = {name: size / positions for name, size in parts.items()}
    return {**per_position, "whole": whole / positions, "plain": float(PLAIN_ENTRY_BYTES * store.header.top_k)}


def info_page(store: TopKStore, figures: Mapping[str, float]) -> RenderableType:
    """The header and the costs as two tables."""
    from rich.console import Group

    from samovar.show import rows, size

    header = store.header
    kept = f"{header.draws} draws, " if header.draws else f"mass {header.mass:g}, " if header.mass < 1 else ""
    facts: list[tuple[str, Any]] = [
        ("teacher", header.teacher[:12]),
        ("tokenizer", f"{header.tokenizer[:12]}, {header.tokenizer_tokens:,} tokens"),
        ("template", header.template[:12]),
        ("support", f"{header.support}, {kept}K = {header.top_k} of {header.vocab_tokens:,} ids"),
        ("precision", f"{header.bits} bits, temperature {header.temperature:g}"),
        ("conversations", header.rows),
        ("positions", header.positions),
        ("shards", f"{len(header.shards)}, {size(sum(shard.size_bytes for shard in header.shards))}"),
    ]
    times = figures["plain"] / figures["whole"]
    named = {"whole": "everything", "plain": f"plain layout, 8 B an entry ({times:.1f} times)"}
    spent = [(named.get(name, name), value) for name, value in figures.items()]
    return Group(rows(("", str(store.folder)), facts), "", rows(("part", "bytes a position"), spent))


def _store_in(folder: Path) -> Path:
    """The store that `folder` is, or holds where it is a finished capture stage."""
    from distill.store import HEADER

    inner = folder / "store"
    return inner if (inner / HEADER).is_file() and not (folder / HEADER).is_file() else folder


class Bar:
    """A Report that is one bar on a terminal and nothing elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(
            console=Console(stderr=True), transient=True, disable=not (shown and sys.stderr.isatty())
        )
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self._bar.update(self._task, completed=done, total=total, description=unit)

    def note(self, text: str) -> None:
        self._bar.console.print(text)

    def checkpoint_requested(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        return False

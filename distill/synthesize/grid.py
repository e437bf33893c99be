"""A profile grid: axes and their values, every combination a cell, walked in a seeded order.

Which cells are held out depends on the cell and the seed alone, so asking for more prompts never moves a
profile from the held-out side to the training side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from random import Random

Value = str | int
Cell = dict[str, Value]
MAX_CELLS = 5_000_000


def size(axes: Mapping[str, Sequence[Value]]) -> int:
    """Number of cells."""
    return math.prod(len(values) for values in axes.values())


def cell(axes: Mapping[str, Sequence[Value]], number: int) -> Cell:
    """Cell `number` of the product, the last axis turning fastest."""
    found: Cell = {}
    for name, values in reversed(list(axes.items())):
        number, place = divmod(number, len(values))
        found[name] = values[place]
    return {name: found[name] for name in axes}


def walk(axes: Mapping[str, Sequence[Value]], seed: int) -> Iterator[Cell]:
    """All cells without replacement, in an order drawn by `seed`."""
    total = size(axes)
    for number in Random(f"{seed} grid").sample(range(total), total):
        yield cell(axes, number)


def is_held(fields: Mapping[str, object], share: float, seed: int) -> bool:
    """True for about `share` of all cells or items, by a hash of their fields."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True)
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share

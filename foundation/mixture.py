"""Rows of several corpora in one order, mixed by weights, at a position that can be resumed exactly.

What stands at a position is a function of (seed, position) alone, as in rows.Endless: going on after a kill
means going on at a number, a second time as well as the first. Positions come in blocks. Which part stands
where in a block is drawn at random; how often each part stands in the blocks so far is rounded from its weight,

    n_i(b) = round(W_i b B) - round(W_(i-1) b B)      W_i = w_1 + ... + w_i, weights summing to 1; B in a block

so that it is never off by one row, and after any number of rows by less than a block. Every part has epochs of
its own, each in its own seeded order: a small one is read again while a large one is read for the first time.

Not here: what a row is. Rows of equal length make the weights shares of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil
from typing import TYPE_CHECKING, Generic

from foundation.errors import InputError
from foundation.rows import Endless, Item, Rows

if TYPE_CHECKING:
    import numpy as np

LEAST_SHARE = Fraction(1, 10_000)  # a block is as long as two over the smallest share
FEWEST_A_BLOCK = 2  # of every part: with fewer the rounding of two sums could take one away again


class Mixture(Generic[Item]):
    """`length` items drawn from `parts` by `weights`, which need not sum to 1."""

    def __init__(self, parts: Sequence[Rows[Item]], weights: Sequence[float], length: int, seed: int) -> None:
        """Raises InputError for weights that are not a positive number for each part, or a part of nothing."""
        import numpy as np

        check_weights(weights, len(parts))
        if empty := [number for number, part in enumerate(parts, start=1) if not len(part)]:
            raise InputError(f"part {empty[0]} of {len(parts)} of the mixture holds no row")
        exact = shares(weights)
        self._ends = list(accumulate(exact))  # W_i
        self._block = ceil(FEWEST_A_BLOCK / min(exact))
        self._length, self._seed = length, seed
        seeds = np.random.SeedSequence(seed).generate_state(len(parts))
        self._parts = [Endless(part, length, int(own)) for part, own in zip(parts, seeds, strict=True)]
        self._drawn: tuple[int, np.ndarray, list[int]] = (-1, np.empty(0), [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int, /) -> Item:
        part, number = self.place(position)
        return self._parts[part][number]

    def place(self, position: int) -> tuple[int, int]:
        """(part, how many items of that part stand before) at a position."""
        if not 0 <= position < self._length:
            raise IndexError(position)
        block, place = divmod(position, self._block)
        if self._drawn[0] != block:
            self._drawn = (block, *self._draw(block))
        _, order, before = self._drawn
        part = int(order[place])
        return part, before[part] + int((order[:place] == part).sum())

    def _draw(self, block: int) -> tuple[np.ndarray, list[int]]:
        """(which part stands at each place of a block, how many of each part stand in the blocks before)."""
        import numpy as np

        before, after = self._counts(block), self._counts(block + 1)
        each = [end - start for start, end in zip(before, after, strict=True)]
        order = np.repeat(np.arange(len(each)), each)
        return np.random.default_rng([self._seed, block]).permutation(order), before

    def _counts(self, blocks: int) -> list[int]:
        """How many items of each part stand in so many blocks: n_i."""
        rounded = [0, *(round(end * blocks * self._block) for end in self._ends)]
        return [end - start for start, end in pairwise(rounded)]


def shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights as exact shares of 1, each read as it is written: 0.1 is a tenth."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def check_weights(weights: Sequence[float], parts: int) -> None:
    """Raise InputError unless there is a positive weight for each of so many parts, none of them minute."""
    if len(weights) != parts:
        raise InputError(
            f"{len(weights)} weights for {parts} corpora: {list(weights)}",
            hint="give one for each, in the order in which they are named",
        )
    if bad := [weight for weight in weights if not 0 < weight < float("inf")]:
        raise InputError(
            f"a weight of {bad[0]} in {list(weights)}", hint="weights are above 0; leave out what is not wanted"
        )
    least = min(shares(weights))
    if least < LEAST_SHARE:
        raise InputError(
            f"the smallest of the weights {list(weights)} is a share of {float(least):.2g}",
            hint=f"at least {float(LEAST_SHARE):g} is needed; join it with another corpus",
        )

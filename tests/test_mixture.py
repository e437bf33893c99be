"""A mixture: its shares, its epochs, and that a resumed one gives exactly what is left."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import InputError
from foundation.mixture import Mixture

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
WEIGHTS = [0.05, 0.2, 0.3, 0.8, 1, 3]


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], list[float], int]:
    """(parts whose items are (part, number), weights, seed)"""
    sizes = draw(SIZES)
    weights = [draw(st.sampled_from(WEIGHTS)) for _ in sizes]
    parts = [[(part, number) for number in range(size)] for part, size in enumerate(sizes)]
    return parts, weights, draw(st.integers(0, 9))


@settings(deadline=None, max_examples=50)
@given(mixtures(), st.integers(0, 60), st.integers(0, 60))
def test_a_resumed_mixture_gives_exactly_what_is_left_also_at_a_second_resume(
    made: tuple[list[list[tuple[int, int]]], list[float], int], first: int, second: int
) -> None:
    parts, weights, seed = made
    whole = list(Mixture(parts, weights, 60, seed))
    first, second = sorted((first, second))
    seen = [Mixture(parts, weights, 60, seed)[at] for at in range(first)]
    resumed = Mixture(parts, weights, 60, seed)  # knows nothing of what was read
    seen += [resumed[at] for at in range(first, second)]
    again = Mixture(parts, weights, 60, seed)
    seen += [again[at] for at in range(second, 60)]
    assert seen == whole


@settings(deadline=None, max_examples=50)
@given(mixtures())
def test_every_prefix_has_the_weights_shares_within_a_block(
    made: tuple[list[list[tuple[int, int]]], list[float], int],
) -> None:
    parts, weights, seed = made
    exact = [Fraction(str(weight)) for weight in weights]
    wanted = [weight / sum(exact) for weight in exact]
    block = -(-2 // min(wanted))  # what the file promises: two of the rarest part
    counts = [0] * len(parts)
    for done, (part, _) in enumerate(Mixture(parts, weights, 2 * block + 7, seed), start=1):
        counts[part] += 1
        for count, share in zip(counts, wanted, strict=True):
            assert abs(count - share * done) < block
            if done % block == 0:
                assert abs(count - share * done) <= 1


@settings(deadline=None, max_examples=50)
@given(mixtures())
def test_every_epoch_of_a_part_is_a_permutation_of_it(
    made: tuple[list[list[tuple[int, int]]], list[float], int],
) -> None:
    parts, weights, seed = made
    items = list(Mixture(parts, weights, 80, seed))
    for number, part in enumerate(parts):
        own = [item for item in items if item[0] == number]
        for start in range(0, len(own) - len(part) + 1, len(part)):
            assert sorted(own[start : start + len(part)]) == part


def test_four_fifths_and_a_fifth_are_that_in_every_ten() -> None:
    parts = [list(range(100)), list(range(100, 105))]
    items = list(Mixture(parts, [0.8, 0.2], 1000, 3))
    for start in range(0, 1000, 10):
        assert sum(item < 100 for item in items[start : start + 10]) == 8
    assert set(Counter(item for item in items if item < 100).values()) == {8}
    assert set(Counter(item for item in items if item >= 100).values()) == {40}


def test_the_seed_decides_the_order_and_parts_do_not_share_theirs() -> None:
    parts = [[("a", n) for n in range(50)], [("b", n) for n in range(50)]]
    one, two = (list(Mixture(parts, [1, 1], 100, seed)) for seed in (1, 2))
    assert sorted(one) == sorted(two) and one != two
    assert [n for name, n in one if name == "a"] != [n for name, n in one if name == "b"]


def test_one_part_alone_is_every_row_of_it() -> None:
    assert sorted(Mixture([list(range(7))], [0.3], 7, 0)) == list(range(7))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(WEIGHTS), min_size=1, max_size=3), st.integers(0, 150))
def test_the_number_of_an_item_is_how_many_of_its_part_came_before(weights: list[float], position: int) -> None:
    mixture = Mixture([[0]] * len(weights), weights, 200, 5)
    part, number = mixture.place(position)
    assert number == sum(mixture.place(before)[0] == part for before in range(position))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5], "1 weights for 2 corpora"),
        ([0.5, 0.2, 0.3], "3 weights for 2 corpora"),
        ([1.0, 0.0], "a weight of 0.0"),
        ([1.0, -0.2], "a weight of -0.2"),
        ([1.0, float("nan")], "a weight of nan"),
        ([1.0, float("inf")], "a weight of inf"),
        ([1.0, 1e-6], "a share of 1e-06"),
    ],
)
def test_weights_that_can_not_be(weights: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Mixture([[1], [2]], weights, 10, 0)


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(InputError, match="part 2 of 2 of the mixture holds no row"):
        Mixture([[1], []], [1, 1], 10, 0)


def test_beyond_its_length_there_is_nothing() -> None:
    with pytest.raises(IndexError):
        Mixture([[1]], [1], 10, 0)[10]

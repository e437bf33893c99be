"""One shard: what comes back is what was written, within the bounds of docs/store.md, and damage is noticed."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import codec, shard_file
from distill.shard_file import CRC, FIXED, RANKED, Facts, ShardFile, write_shard
from foundation.errors import ArtifactError, InputError, ModelError

Columns = dict[str, np.ndarray]


def distributions(
    seed: int, positions: int, vocab: int, top_k: int, loud: float = 3.0, counts: np.ndarray | None = None
) -> Columns:
    """The largest entries of random distributions, everything in float64; `counts` entries of each position."""
    rng = np.random.default_rng(seed)
    logits = loud * rng.standard_normal((positions, vocab))
    log_z = np.logaddexp.reduce(logits, axis=1)
    logprobs = logits - log_z[:, None]
    ids = np.argsort(-logprobs, axis=1)[:, :top_k]
    kept = np.take_along_axis(logprobs, ids, 1)
    absent = np.zeros(kept.shape, bool) if counts is None else np.arange(top_k)[None] >= counts[:, None]
    np.put_along_axis(logprobs, ids, np.where(absent, kept, -np.inf), 1)
    return {
        "topk_ids": np.where(absent, 0, ids).astype(np.int32),
        "topk_logprobs": np.where(absent, -np.inf, kept),
        "tail_logprob": np.logaddexp.reduce(logprobs, axis=1),
        "gold_logprob": kept[:, 0],
        "log_z": log_z,
    }


def write(path: Path, columns: Columns, lengths: list[int] | None = None, **more: Any) -> ShardFile:
    lengths = lengths or [len(columns["log_z"])]
    keys = [number.to_bytes(16, "little") for number in range(len(lengths))]
    write_shard(path, columns, keys, lengths, **{"vocab_tokens": 60, "bits": 6, **more})
    return ShardFile(path)


def whole(shard: ShardFile) -> Columns:
    parts = [shard.columns(place) for place in range(len(shard.keys))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def entries(columns: Columns) -> list[dict[int, float]]:
    """id -> log-probability of every position; fails where an id stands twice."""
    found = []
    for ids, logprobs in zip(columns["topk_ids"], columns["topk_logprobs"], strict=True):
        there = logprobs > -np.inf
        assert len(set(ids[there])) == there.sum()
        assert not ids[~there].any() and not there[there.sum() :].any(), "absent entries stand last, with id 0"
        found.append(dict(zip(ids[there].tolist(), logprobs[there].tolist(), strict=True)))
    return found


# --------------------------------------------------------------------------------------------- round trip


@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 12),
    vocab=st.integers(2, 60),
    share=st.floats(0, 1),
    loud=st.sampled_from([0.0, 0.3, 3.0, 12.0]),
    bits=st.integers(2, 12),
    varied=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int, positions: int, vocab: int, share: float, loud: float, bits: int, varied: bool,
) -> None:  # fmt: skip
    """Ids and counts exactly; the sum with the tail exactly 1; every number within its stated error."""
    top_k = max(1, round(share * (vocab - 1)))
    counts = np.random.default_rng(seed).integers(1, top_k + 1, positions) if varied else None
    exact = distributions(seed, positions, vocab, top_k, loud, counts)
    cut = positions // 2
    lengths = [cut, positions - cut] if cut else [positions]
    path = tmp_path_factory.mktemp("shard") / "shard"
    stored = whole(write(path, exact, lengths, vocab_tokens=vocab, bits=bits))
    for theirs, ours in zip(entries(exact), entries(stored), strict=True):
        assert ours.keys() == theirs.keys()
    for name in ("tail_logprob", "gold_logprob", "log_z"):
        # float16: 11 significant bits, and steps of 2^-24 near zero
        np.testing.assert_allclose(stored[name], exact[name], rtol=2**-11, atol=2**-24)
    tail = stored["tail_logprob"].astype(np.float64)
    mass = np.exp(stored["topk_logprobs"].astype(np.float64)).sum(1)
    np.testing.assert_allclose(mass, -np.expm1(tail), rtol=3e-6)


@given(seed=st.integers(0, 10_000), top_k=st.sampled_from([1, 5, 10, 50, 100]), bits=st.integers(4, 9))
@settings(max_examples=40, deadline=None)
def test_the_divergence_is_at_most_four_to_the_minus_bits(
    tmp_path_factory: pytest.TempPathFactory, seed: int, top_k: int, bits: int
) -> None:
    """Mean KL(stored || exact) with the tail, and the error of each entry, against float64."""
    exact = distributions(seed, 40, 400, top_k, loud=float(1 + seed % 4))
    path = tmp_path_factory.mktemp("shard") / "shard"
    stored = whole(write(path, exact, vocab_tokens=400, bits=bits))
    step, stride = codec.scale(bits, top_k)
    divergences = []
    for position, (theirs, ours) in enumerate(zip(entries(exact), entries(stored), strict=True)):
        ids = sorted(theirs)
        p, q = np.array([theirs[i] for i in ids]), np.array([ours[i] for i in ids])
        tail, exact_tail = float(stored["tail_logprob"][position]), exact["tail_logprob"][position]
        divergences.append(float((np.exp(q) * (q - p)).sum() + math.exp(tail) * (tail - exact_tail)))
        common = np.logaddexp.reduce(q) - np.logaddexp.reduce(p)  # what renormalising moved, from the tail
        roots = np.abs(np.exp((q - common) / 2) - np.exp(p / 2))
        assert roots.max() <= step * math.sqrt(top_k) + 1e-6
        assert np.abs(q - p - common).max() <= 2 * stride + 1e-3
    assert np.mean(divergences) <= 4.0**-bits + 1e-6


def test_the_scale_is_the_one_of_the_page() -> None:
    """docs/store.md: g(x) = (1 - exp(-x/2)) / step + x / stride, inverted at whole numbers."""
    step, stride = codec.scale(6, 50)
    assert (step, stride) == (math.sqrt(6 / 50) / 64, 0.5)
    x = codec.level_values(6, 50)
    np.testing.assert_allclose((1 - np.exp(-x / 2)) / step + x / stride, np.arange(len(x)), atol=1e-9)
    assert x[0] == pytest.approx(0, abs=1e-12) and x[-1] >= codec.DEEPEST > x[-2]


def test_one_entry_all_but_one_and_ties(tmp_path: Path) -> None:
    for vocab, top_k, loud in ((9, 1, 3.0), (9, 8, 3.0), (300, 299, 1.0), (50, 49, 0.0)):
        exact = distributions(1, 7, vocab, top_k, loud)
        stored = whole(write(tmp_path / "shard", exact, vocab_tokens=vocab))
        for theirs, ours in zip(entries(exact), entries(stored), strict=True):
            assert ours.keys() == theirs.keys()
            if loud == 0:  # equal probabilities come back equal
                assert len(set(ours.values())) == 1


def test_nothing_outside_the_entries(tmp_path: Path) -> None:
    """The whole vocabulary is kept, log(1 - P) = -inf; and P ~ 1 with a tail far below float32's 1 - P."""
    p = np.log([[0.5, 0.25, 0.125, 0.125]])
    one = {"topk_ids": np.array([[3, 1, 0, 2]]), "topk_logprobs": p, "tail_logprob": np.array([-np.inf])}
    one |= {"gold_logprob": np.array([-np.inf]), "log_z": np.array([100.0])}
    stored = whole(write(tmp_path / "shard", one, vocab_tokens=4))
    assert stored["tail_logprob"][0] == stored["gold_logprob"][0] == -np.inf
    assert np.exp(stored["topk_logprobs"]).sum() == pytest.approx(1, abs=1e-6)
    one["tail_logprob"] = np.array([-40.0])
    stored = whole(write(tmp_path / "shard", one, vocab_tokens=5))
    assert stored["tail_logprob"][0] == pytest.approx(-40, rel=1e-3)


def test_hardly_anything_in_the_entries(tmp_path: Path) -> None:
    """K of an even distribution over many: P is tiny, and the tail must not become 0."""
    vocab = 2**20
    uniform = {"topk_ids": np.array([[5, 900_000]]), "topk_logprobs": np.full((1, 2), -math.log(vocab))}
    tail = math.log1p(-2 / vocab)
    uniform |= {name: np.array([tail]) for name in ("tail_logprob", "gold_logprob", "log_z")}
    stored = whole(write(tmp_path / "shard", uniform, vocab_tokens=vocab))
    assert stored["topk_logprobs"][0] == pytest.approx(-math.log(vocab), abs=0.02)


def test_entries_beyond_the_deepest_level_stay_entries(tmp_path: Path) -> None:
    deep = {"topk_ids": np.array([[0, 1, 2]]), "topk_logprobs": np.array([[-1e-30, -200.0, -9000.0]])}
    deep |= {name: np.array([-70_000.0]) for name in ("tail_logprob", "gold_logprob", "log_z")}
    stored = whole(write(tmp_path / "shard", deep))
    assert entries(stored)[0].keys() == {0, 1, 2}
    assert np.isfinite(stored["tail_logprob"]).all() and np.isfinite(stored["log_z"]).all()


@given(seed=st.integers(0, 1000), ranked=st.booleans())
@settings(max_examples=20, deadline=None)
def test_sets_of_ids_in_any_vocabulary(
    tmp_path_factory: pytest.TempPathFactory, seed: int, ranked: bool
) -> None:
    """Few ids that come again are ranked through a table; ids strewn evenly are coded as they are."""
    rng = np.random.default_rng(seed)
    vocab, positions, top_k = 151_936, 60, 20
    pool = rng.choice(vocab, 40, replace=False) if ranked else np.arange(vocab)
    exact = distributions(seed, positions, 40, top_k)
    exact["topk_ids"] = np.stack([rng.choice(pool, top_k, replace=False) for _ in range(positions)])
    path = tmp_path_factory.mktemp("shard") / "shard"
    shard = write(path, exact, [20] * 3, vocab_tokens=vocab)
    assert bool(shard.facts.flags & RANKED) == ranked
    for theirs, ours in zip(entries(exact), entries(whole(shard)), strict=True):
        assert ours.keys() == theirs.keys()


def test_gaps_too_long_for_their_parameter(tmp_path: Path) -> None:
    """Ids 0..3 everywhere make short codes; one position far away must take the escape and come back."""
    exact = distributions(2, 6000, 8, 4)
    exact["topk_ids"] = np.tile(np.arange(4), (6000, 1))
    exact["topk_ids"][1] = [0, 1, 2, 2**24 - 1]  # not among the positions that the parameters are chosen on
    stored = whole(write(tmp_path / "shard", exact, vocab_tokens=2**24))
    assert sorted(stored["topk_ids"][1]) == [0, 1, 2, 2**24 - 1]


def test_reading_one_conversation_equals_reading_all(tmp_path: Path) -> None:
    exact = distributions(4, 30, 60, 10)
    lengths = [1, 7, 2, 20]
    shard = write(tmp_path / "shard", exact, lengths)
    together = whole(shard)
    start = 0
    for place, length in enumerate(lengths):
        alone = ShardFile(tmp_path / "shard").columns(place, top_k=13)
        for name, values in together.items():
            np.testing.assert_array_equal(alone[name][:, :10] if values.ndim == 2 else alone[name],
                                          values[start : start + length])  # fmt: skip
        assert (alone["topk_logprobs"][:, 10:] == -np.inf).all() and not alone["topk_ids"][:, 10:].any()
        start += length


def test_the_parts_add_up(tmp_path: Path) -> None:
    shard = write(tmp_path / "shard", distributions(4, 30, 60, 10), [10, 20])
    assert sum(shard.parts().values()) == (tmp_path / "shard").stat().st_size


def test_the_same_columns_give_the_same_bytes(tmp_path: Path) -> None:
    exact = distributions(4, 30, 60, 10)
    write(tmp_path / "a", exact, [10, 20])
    write(tmp_path / "b", {name: values.copy() for name, values in exact.items()}, [10, 20])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for seed in (1, 2):
        write(tmp_path / f"s{seed}", exact, [10, 20], seed=seed)
        write(tmp_path / f"t{seed}", exact, [10, 20], seed=seed)
        assert (tmp_path / f"s{seed}").read_bytes() == (tmp_path / f"t{seed}").read_bytes()
    assert (tmp_path / "s1").read_bytes() != (tmp_path / "s2").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "s1", "s2", "t1", "t2"}, (
        "no partial is left"
    )


# --------------------------------------------------------------------------- the page, read by another reader


class Bits:
    """Bits of bytes, least significant first; written after docs/store.md, slow and plain."""

    def __init__(self, data: bytes) -> None:
        self.text = "".join(f"{byte:08b}"[::-1] for byte in data)
        self.at = 0

    def number(self, count: int) -> int:
        taken = self.text[self.at : self.at + count]
        assert len(taken) == count, "read behind the end"
        self.at += count
        return int(taken[::-1] or "0", 2)

    def unary(self, most: int = 1000) -> int:
        count = 0
        while count < most and self.number(1):
            count += 1
        return count

    def rice(self, parameter: int, plain: int) -> int:
        quotient = self.unary(32)
        return self.number(plain) if quotient == 32 else (quotient << parameter) + self.number(parameter)

    def golomb(self, order: int) -> int:
        s = self.unary()
        return self.number(s + order) - (1 << order) + (1 << (s + order))


def by_the_page(data: bytes) -> list[list[tuple[list[int], list[int], list[float]]]]:
    """(ids, levels, float16 numbers) of every position of every row, as docs/store.md has the bytes."""
    magic, version, flags, bits, top_k, vocab, rows, distinct, table, _, count, payload, _, _ = struct.unpack(
        "<8sHHIIIIIIfQQQQ", data[:72]
    )
    assert (magic, version) == (b"\x89TOPK\r\n\0", 2)
    at = 72 + 16 * rows
    lengths, sizes, crcs = (struct.unpack(f"<{rows}I", data[at + 4 * rows * n :][: 4 * rows]) for n in range(3))
    at += 12 * rows
    rice, at = data[at : at + 26], at + 26
    plain = (vocab - 1).bit_length()
    ids: list[int] = list(range(vocab))
    if flags & 1:
        ids, first, source = [], 0, Bits(data[at : at + table])
        while first < distinct:
            last, follows = min(2 * first + 1, distinct), 0
            for _ in range(first, last):
                gap = source.rice(max(0, (7 * vocab // 10 // (last - first)).bit_length() - 1), plain)
                ids.append(follows + gap)
                follows += gap + 1
            first = last
    assert struct.unpack("<I", data[at + table :][:4])[0] == zlib.crc32(data[: at + table])
    at += table + 4
    assert len(data) == at + payload and sum(lengths) == count
    step, stride = math.sqrt(6 / top_k) * 2.0**-bits, 2.0 ** (5 - bits)
    levels = math.ceil((1 - math.exp(-64)) / step + 128 / stride) + 1
    found = []
    for length, size, crc in zip(lengths, sizes, crcs, strict=True):
        row, at = data[at : at + size], at + size
        assert zlib.crc32(row) == crc
        halves = 2 if flags & 4 else 3
        numbers = struct.unpack(f"<{halves * length}e", row[: 2 * halves * length])
        source, positions = Bits(row[2 * halves * length :]), []
        for place in range(length):
            entries = source.number(top_k.bit_length()) if flags & 2 else top_k
            largest, order, follows = source.number(levels.bit_length()), source.number(3), 0
            named, kept = [], []
            for _ in range(entries):
                rank = follows + source.rice(rice[follows.bit_length()], plain)
                follows = rank + 1
                named.append(ids[rank])
                kept.append(largest - source.golomb(order))
            positions.append((named, kept, list(numbers[place::length])))
        assert len(source.text) - source.at < 8 and "1" not in source.text[source.at :]
        found.append(positions)
    return found


@pytest.mark.parametrize("kind", ["fixed", "varied", "ranked", "sampled"])
def test_a_reader_written_after_the_page_finds_the_same(tmp_path: Path, kind: str) -> None:
    counts = None if kind == "fixed" else np.random.default_rng(5).integers(1, 9, 40)
    exact = distributions(11, 40, 60, 8, counts=counts)
    vocab = 60
    if kind == "ranked":
        vocab, exact["topk_ids"] = 100_000, exact["topk_ids"] * 999 + 7
        exact["topk_ids"][exact["topk_logprobs"] == -np.inf] = 0
    shard = write(
        tmp_path / "shard", exact, [13, 27], vocab_tokens=vocab, seed=3 if kind == "sampled" else None
    )
    x = codec.level_values(6, 8)
    for place, positions in enumerate(by_the_page((tmp_path / "shard").read_bytes())):
        ours = shard.columns(place)
        for n, (ids, levels, numbers) in enumerate(positions):
            assert ours["topk_ids"][n][: len(ids)].tolist() == ids
            logprobs = -x[levels]
            if kind == "sampled":
                logprobs = logprobs + float(exact["topk_logprobs"].max())
            else:
                assert ours["tail_logprob"][n] == numbers[0]
                logprobs += math.log(-math.expm1(numbers[0])) - np.logaddexp.reduce(logprobs)
            np.testing.assert_allclose(ours["topk_logprobs"][n][: len(ids)], logprobs, rtol=1e-5, atol=1e-6)
            assert [ours["gold_logprob"][n], ours["log_z"][n]] == numbers[-2:]


# ------------------------------------------------------------------------------------------ sampled stores


def test_stored_weights_are_unbiased(tmp_path: Path) -> None:
    """The mean over many seeds against the weight, in standard errors of the mean: no log-domain bias."""
    rng = np.random.default_rng(3)
    weights = np.concatenate([rng.uniform(0.001, 1.6, 60), [1e-9, 1e-4, 1.0, 1.7]])
    ids = np.arange(64)[None]
    sampled = {"topk_ids": ids, "topk_logprobs": np.log(weights)[None].astype(np.float32)}
    sampled |= {name: np.array([-1.0]) for name in ("tail_logprob", "gold_logprob", "log_z")}
    seen = []
    for seed in range(250):
        stored = whole(write(tmp_path / "shard", sampled, vocab_tokens=64, bits=5, seed=seed))
        order = np.argsort(stored["topk_ids"][0])
        seen.append(np.exp(stored["topk_logprobs"][0][order].astype(np.float64)))
    exact = np.exp(sampled["topk_logprobs"][0].astype(np.float64))
    mean, error = np.mean(seen, 0), np.std(seen, 0) / math.sqrt(len(seen))
    moved = error > 1e-12  # the top weight is a level of its own
    assert moved.sum() > 50
    assert (np.abs(mean - exact)[moved] <= 5 * error[moved]).all()
    np.testing.assert_allclose(mean[~moved], exact[~moved], rtol=1e-5)
    assert abs(((mean - exact)[moved] / error[moved]).mean()) < 4 / math.sqrt(moved.sum())


def test_a_sampled_store_keeps_its_sums_and_has_no_tail(tmp_path: Path) -> None:
    """Nothing is renormalised: the weights of a position sum to what was drawn."""
    sampled = distributions(8, 200, 60, 12, counts=np.random.default_rng(0).integers(1, 13, 200))
    sampled["topk_logprobs"] = sampled["topk_logprobs"] + 0.3  # sums far from 1
    stored = whole(write(tmp_path / "shard", sampled, bits=10, seed=4))
    assert (stored["tail_logprob"] == -np.inf).all()
    for theirs, ours in zip(entries(sampled), entries(stored), strict=True):
        assert ours.keys() == theirs.keys()
        total = sum(map(math.exp, theirs.values()))
        assert sum(map(math.exp, ours.values())) == pytest.approx(total, rel=2e-2)


# ------------------------------------------------------------------------------------------------ refusals


def spoilt(name: str, value: float, column: int | None = None) -> Columns:
    exact = distributions(0, 3, 60, 5)
    exact[name] = exact[name].astype(np.float64)
    exact[name][1 if column is None else (1, column)] = value
    return exact


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (spoilt("topk_logprobs", np.nan, 2), "not all numbers"),
        (spoilt("topk_logprobs", np.inf, 2), "not all numbers"),
        (spoilt("topk_logprobs", -np.inf), "no entry"),
        (spoilt("topk_logprobs", -0.01, 2), "does not sum to 1"),
        (spoilt("topk_ids", 60, 2), "outside the vocabulary"),
        (spoilt("topk_ids", -1, 2), "outside the vocabulary"),
        (spoilt("topk_ids", 7), "twice"),
        (spoilt("tail_logprob", np.nan), "not a number"),
        (spoilt("tail_logprob", 0.0), "does not sum to 1"),
        (spoilt("log_z", np.inf), "not a number"),
        (spoilt("gold_logprob", np.nan), "not a number"),
    ],
)
def test_columns_that_are_no_distribution_are_refused(tmp_path: Path, columns: Columns, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        write(tmp_path / "shard", columns)
    assert not list(tmp_path.iterdir())


def test_conversations_without_a_position_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="conversation 2 of the shard has no token"):
        write(tmp_path / "shard", distributions(0, 3, 60, 5), [2, 0, 1])
    with pytest.raises(ValueError, match="3 keys"):
        write(tmp_path / "shard", distributions(0, 3, 60, 5), [2, 1, 1])
    with pytest.raises(ValueError, match="bits = 13"):
        write(tmp_path / "shard", distributions(0, 3, 60, 5), bits=13)


def test_what_would_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: a small file must not be able to ask for any amount of memory."""
    exact = distributions(0, 30, 60, 5)
    write(tmp_path / "shard", exact)
    monkeypatch.setattr(shard_file, "MAX_ENTRIES", 149)
    with pytest.raises(ArtifactError, match="header is not possible"):
        ShardFile(tmp_path / "shard")
    with pytest.raises(InputError, match="30 positions of a conversation x 5 entries; at most 149"):
        write(tmp_path / "other", exact)


# -------------------------------------------------------------------------------------------------- damage


def read_all(path: Path) -> None:
    shard = ShardFile(path)
    shard.check_rows()
    whole(shard)


@pytest.fixture(scope="module", params=["top_k", "ranked", "sampled"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shard of each kind."""
    path = tmp_path_factory.mktemp(request.param) / "shard"
    counts = None if request.param == "top_k" else np.array([1, 4, 2, 4, 3, 4] * 2)
    exact = distributions(3, 12, 12, 4, counts=counts)
    if request.param == "ranked":
        exact["topk_ids"] = exact["topk_ids"] * 1000
    more = {"seed": 1} if request.param == "sampled" else {}
    shard = write(path, exact, [2, 3, 1] * 2, vocab_tokens=60_000 if request.param == "ranked" else 60, **more)
    assert bool(shard.facts.flags & RANKED) == (request.param == "ranked")
    read_all(path)
    return path


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    torn = tmp_path / "shard"
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            torn.write_bytes(flipped)
            with pytest.raises(ArtifactError, match="damaged") as caught:
                read_all(torn)
            assert str(torn) in caught.value.message and "delete the folder of the capture" in caught.value.hint


def test_every_torn_length_is_noticed(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    torn = tmp_path / "shard"
    for length in range(len(data)):
        torn.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="damaged"):
            ShardFile(torn)
    torn.write_bytes(data + b"\0")
    with pytest.raises(ArtifactError, match="damaged"):
        ShardFile(torn)
    with pytest.raises(ArtifactError, match="can not be read"):
        ShardFile(tmp_path / "missing")


def test_a_shard_made_to_harm_never_leads_outside(small: Path, tmp_path: Path) -> None:
    """All checksums made right again over random bytes: decoding ends, and with nothing but ArtifactError."""
    rng = np.random.default_rng(0)
    data, forged = small.read_bytes(), tmp_path / "shard"
    payload = len(data) - ShardFile(small).facts.payload_bytes
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        spoilt = bytearray(data)
        for place in rng.integers(0 if rng.random() < 0.7 else payload, len(data), rng.integers(1, 30)):
            spoilt[place] = rng.integers(256)
        forged.write_bytes(with_checksums(spoilt, small))
        try:
            shard = ShardFile(forged)
            for place in range(len(shard.keys)):
                ids = shard.columns(place)["topk_ids"]
                assert ids.min() >= 0 and ids.max() < shard.facts.vocab_tokens
            outcomes["read"] += 1
        except ArtifactError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    "facts",
    [
        {"top": 0.5},
        {"flags": 8},
        {"id_bits": 2**40},
        {"top_k": 2**18, "vocab_tokens": 2**24},  # 12 positions of so many do not fit in the file
    ],
)
def test_facts_that_no_shard_has_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    path = tmp_path / "shard"
    write(path, distributions(3, 12, 12, 4), [6, 6])
    forged(path, FIXED.pack(*ShardFile(path).facts._replace(**facts)), 0)
    with pytest.raises(ArtifactError, match="its header is not possible"):
        ShardFile(path)


def test_a_table_that_names_an_id_twice_is_refused(tmp_path: Path) -> None:
    """Ranks go up in a position, so that only the table can make an id come twice."""
    path, exact = tmp_path / "shard", distributions(3, 12, 12, 4)
    exact["topk_ids"] = exact["topk_ids"] * 1000
    shard = write(path, exact, vocab_tokens=60_000)
    facts = shard.facts
    assert facts.flags & RANKED and facts.distinct >= 3
    named = shard._named.astype(np.int64)
    named[1:3] = sorted([named[0], named[2]])
    words, at = np.zeros(64, np.uint64), 0
    for first, last in shard_file._octaves(facts.distinct):
        parameter = shard_file._set_parameter(last - first, 60_000)
        at = codec.encode_set(np.sort(named[first:last]), parameter, 16, at, words)
    forged(path, words.tobytes()[: facts.table_bytes], shard._table)
    with pytest.raises(ArtifactError, match="its table names an id twice"):
        whole(ShardFile(path))


def forged(path: Path, data: bytes, at: int) -> None:
    """Other bytes in the index, and its checksum made right."""
    shard, content = ShardFile(path), bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    index_end = shard._payload - CRC.size
    content[index_end : index_end + CRC.size] = CRC.pack(zlib.crc32(bytes(content[:index_end])))
    path.write_bytes(content)


def with_checksums(data: bytearray, original: Path) -> bytes:
    """`data` with the magic, the fixed part's sizes and every checksum made right."""
    facts = ShardFile(original).facts
    kept = ("magic", "format", "rows", "table_bytes", "payload_bytes", "positions")
    spoilt = Facts(*FIXED.unpack(data[: FIXED.size]))
    data[: FIXED.size] = FIXED.pack(*spoilt._replace(**{name: getattr(facts, name) for name in kept}))
    index_end = len(data) - facts.payload_bytes - CRC.size
    sizes_at = FIXED.size + facts.rows * (shard_file.KEY_BYTES + 4)
    source = original.read_bytes()
    data[sizes_at - 4 * facts.rows : sizes_at + 4 * facts.rows] = source[
        sizes_at - 4 * facts.rows : sizes_at + 4 * facts.rows
    ]
    sizes = np.frombuffer(bytes(data[sizes_at : sizes_at + 4 * facts.rows]), dtype="<u4")
    ends = index_end + CRC.size + np.cumsum(sizes)
    for place, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        at = sizes_at + 4 * facts.rows + 4 * place
        data[at : at + 4] = CRC.pack(zlib.crc32(bytes(data[end - size : end])))
    data[index_end : index_end + CRC.size] = CRC.pack(zlib.crc32(bytes(data[:index_end])))
    return bytes(data)

"""Top-K entries as bits: the serial inner loops of the store, compiled. Imported where needed: it loads numba.

A position is a set of ids with a level each. Ids go up, so that only the gaps between them are written (Rice
codes); levels are written as distances from the largest of the position (Exp-Golomb codes). docs/store.md has
the layout.

Levels. x = -log p is stored as level round(g(x)), g(x) = (1 - exp(-x/2)) / step + x / stride. Where the first
term rules, the level counts steps of sqrt(p), which is what KL asks for: to second order KL(p^ || p) is
2 sum (sqrt p^ - sqrt p)^2, so that K uniform errors of +-step/2 give K step^2 / 6. With a step of
sqrt(6/K) 2^-bits the expected KL of a position is at most about 4^-bits nats, for any distribution. The second
term bounds the error of a small entry's log-probability by stride/2.

The callers (shard_file.py) check what comes from disk before it gets here; what they can not check, the bits,
is checked here: nothing is read outside the words given, and every loop is bounded.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from distill.shard_file import CONTEXTS, PARAMETERS

GOLOMB_BITS = 3  # hold the parameter of the levels' Exp-Golomb code
ESCAPE = 32  # a unary part of this length announces a plain number
DEEPEST = 128.0  # nats below the top; smaller entries are stored as this small

# What encode and decode answer; non-negative numbers are lengths in bits.
TORN, BAD_ID, BAD_LEVEL, BAD_COUNT, TWICE, NOT_NUMBERS, NOT_ONE = -1, -2, -3, -4, -5, -6, -7


def scale(bits: int, top_k: int) -> tuple[float, float]:
    """(step of sqrt(p), stride in nats) of a store; see above."""
    return math.sqrt(6 / top_k) * 2.0**-bits, 2.0 ** (5 - bits)


def level_values(bits: int, top_k: int) -> np.ndarray:
    """x of every level: the inverse of g at 0, 1, .. by bisection.  # [L] float64"""
    step, stride = scale(bits, top_k)
    levels = np.arange(math.ceil((1 - math.exp(-DEEPEST / 2)) / step + DEEPEST / stride) + 1, dtype=np.float64)
    low, high = np.zeros_like(levels), np.full_like(levels, 2 * DEEPEST)
    for _ in range(60):
        middle = (low + high) / 2
        above = (1 - np.exp(-middle / 2)) / step + middle / stride > levels
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


_jit = njit(cache=True, nogil=True)


@_jit
def put(words, at, value, count):
    """Append the low `count` < 64 bits of `value` at bit `at`; every word is set before it is added to."""
    word, shift = at >> 6, at & 63
    value = np.uint64(value)
    if shift == 0:
        words[word] = value
    else:
        words[word] |= value << np.uint64(shift)
        if shift + count > 64:
            words[word + 1] = value >> np.uint64(64 - shift)
    return at + count


@_jit
def peek(words, at):
    """The 64 bits at bit `at`; two words behind the last bit must be readable."""
    word, shift = at >> 6, np.uint64(at & 63)
    return (words[word] >> shift) | ((words[word + 1] << np.uint64(1)) << (np.uint64(63) - shift))


@_jit
def ones(bits):
    """How many ones `bits` begins with, at most ESCAPE."""
    count = 0
    while count < ESCAPE and bits & np.uint64(1):
        bits >>= np.uint64(1)
        count += 1
    return count


@_jit
def low_bits(bits, count):
    return np.int64(bits & ((np.uint64(1) << np.uint64(count)) - np.uint64(1)))


@_jit
def rice_code(number, parameter, plain_bits):
    """(bits, their count) of a Rice code: number >> parameter in unary (ones, then a zero), then the rest.

    Where the unary part would reach ESCAPE ones, the number follows them as it is.
    """
    quotient = number >> parameter
    if quotient >= ESCAPE:
        return ((1 << ESCAPE) - 1) | (number << ESCAPE), ESCAPE + plain_bits
    rest = number & ((1 << parameter) - 1)
    return ((1 << quotient) - 1) | (rest << (quotient + 1)), quotient + 1 + parameter


@_jit
def rice_cost(number, parameter, plain_bits):
    quotient = number >> parameter
    return ESCAPE + plain_bits if quotient >= ESCAPE else quotient + 1 + parameter


@_jit
def get_rice(words, at, parameter, plain_bits):
    """(number, bit behind it)"""
    bits = peek(words, at)
    quotient = ones(bits)
    if quotient == ESCAPE:
        return low_bits(bits >> np.uint64(ESCAPE), plain_bits), at + ESCAPE + plain_bits
    rest = low_bits(bits >> np.uint64(quotient + 1), parameter)
    return (quotient << parameter) | rest, at + quotient + 1 + parameter


@_jit
def count_ids(ids, logprobs, vocab_tokens):
    """How often each id occurs [V], and the least and the largest count of entries in a position.

    A first number below 0 says what is wrong: BAD_ID, NOT_NUMBERS or BAD_COUNT (a position without entries).
    """
    often = np.zeros(vocab_tokens, np.int64)
    least, most = ids.shape[1], 0
    for n in range(ids.shape[0]):
        count = 0
        for k in range(ids.shape[1]):
            value = logprobs[n, k]
            if value == -np.inf:
                continue
            if not np.isfinite(value):
                return NOT_NUMBERS, 0, often
            if ids[n, k] < 0 or ids[n, k] >= vocab_tokens:
                return BAD_ID, 0, often
            often[ids[n, k]] += 1
            count += 1
        if count == 0:
            return BAD_COUNT, 0, often
        least, most = min(least, count), max(most, count)
    return least, most, often


@_jit
def sort(numbers):
    """Ascending, in place: by insertion while they are few, which takes half the time."""
    if numbers.size > 128:
        numbers.sort()
        return
    for k in range(1, numbers.size):
        number, place = numbers[k], k
        while place > 0 and numbers[place - 1] > number:
            numbers[place] = numbers[place - 1]
            place -= 1
        numbers[place] = number


@_jit
def gap_costs(ids, logprobs, ranks, stride, plain_bits):
    """Bits that the gaps of every stride-th position take, by context and Rice parameter.  # [C, R]"""
    costs = np.zeros((CONTEXTS, PARAMETERS), np.int64)
    row = np.empty(ids.shape[1], np.int64)
    for n in range(0, ids.shape[0], stride):
        count = 0
        for k in range(ids.shape[1]):
            if logprobs[n, k] != -np.inf:
                row[count] = ranks[ids[n, k]]
                count += 1
        found = row[:count]
        sort(found)
        follows, context = 0, 0
        for rank in found:
            while follows >> context:
                context += 1
            for parameter in range(PARAMETERS):
                costs[context, parameter] += rice_cost(rank - follows, parameter, plain_bits)
            follows = rank + 1
    return costs


@_jit
def random_share(seed, number):
    """A number in [0, 1) out of (seed, number): the finaliser of splitmix64."""
    z = np.uint64(seed) + (np.uint64(number) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / 9007199254740992.0


@_jit
def golomb_parameter(distances, lengths):
    """The order of the shortest Exp-Golomb codes for `distances`, out of four near log2 of their mean."""
    highest = (1 << GOLOMB_BITS) - 1
    guess = min(max(lengths[distances.sum() // distances.size] - 3, 0), highest)
    best, least = 0, np.int64(1) << 62
    for parameter in range(guess, min(guess + 3, highest) + 1):
        cost = parameter * distances.size
        for distance in distances:
            cost += 2 * lengths[(distance >> parameter) + 1]
        if cost < least:
            best, least = parameter, cost
    return best


@_jit
def encode(ids, logprobs, tail, ranks, rice, values, lengths, setup, top, words):
    """Write a conversation's positions into `words`; returns (bits, bits of ids, bits of levels).

    Or (an error < 0, the position, 0). ids, logprobs [P, K]; tail [P]; ranks [V] of ids; rice [CONTEXTS];
    values [L] of levels; lengths [L + 2] are the bit lengths of 0, 1, ..; setup = (step, stride, count bits,
    level bits, plain bits, sampled, seed, number of the first entry in the shard).
    """
    step, stride, count_bits, level_bits, plain_bits, sampled, seed, number = setup
    entries = np.empty(ids.shape[1], np.int64)
    distances = np.empty(ids.shape[1], np.int64)
    at, id_bits, head_bits, last_level = 0, 0, 0, values.size - 1
    words[0] = 0
    shift = np.int64(24)  # an entry is its rank above its level, so that one sort orders both
    for n in range(ids.shape[0]):
        count, highest, mass = 0, 0, 0.0
        for k in range(ids.shape[1]):
            if logprobs[n, k] == -np.inf:
                continue
            x = min(max(top - logprobs[n, k], 0.0), DEEPEST)
            root = math.exp(-x / 2)
            mass += root * root
            place = (1.0 - root) / step + x / stride
            if sampled:
                level = min(np.int64(place), last_level - 1)
                above, below = math.exp(-values[level]), math.exp(-values[level + 1])
                share = (above - root * root) / (above - below)
                level += random_share(seed, number + n * ids.shape[1] + k) < share
            else:
                level = min(np.int64(place + 0.5), last_level)
            entries[count] = (np.int64(ranks[ids[n, k]]) << shift) | level
            highest = max(highest, level)
            count += 1
        if not sampled and abs(mass + math.exp(tail[n]) - 1.0) > 0.01:
            return NOT_ONE, n, 0
        found = entries[:count]
        sort(found)
        for k in range(count):
            distances[k] = highest - (found[k] & ((1 << shift) - 1))
        golomb = golomb_parameter(distances[:count], lengths)
        if count_bits:
            at = put(words, at, count, count_bits)
        at = put(words, at, highest, level_bits)
        at = put(words, at, golomb, GOLOMB_BITS)
        head_bits += count_bits + level_bits + GOLOMB_BITS
        follows, context = 0, 0
        for k in range(count):
            rank = found[k] >> shift
            if rank < follows:
                return TWICE, n, 0
            while follows >> context:
                context += 1
            code, size = rice_code(rank - follows, rice[context], plain_bits)
            id_bits += size
            follows = rank + 1
            more = lengths[(distances[k] >> golomb) + 1] - 1
            rest = distances[k] + (1 << golomb) - (1 << (more + golomb))
            level, level_size = ((1 << more) - 1) | (rest << (more + 1)), 2 * more + 1 + golomb
            if size + level_size < 64:
                at = put(words, at, code | (level << size), size + level_size)
            else:
                at = put(words, put(words, at, code, size), level, level_size)
    return at, id_bits, at - id_bits - head_bits


@_jit
def decode(words, size_bits, tail, named, rice, values, weights, setup, ids, logprobs):
    """Read a conversation into ids, logprobs [P, K or more], preset to 0 and -inf; returns 0 or an error < 0.

    tail [P] below 0; named [U]: rank -> id; values [L] of levels; weights [L] = exp(-values); setup = (K,
    count bits, level bits, plain bits, top, sampled). `words` are size_bits long, and two more.
    """
    top_k, count_bits, level_bits, plain_bits, top, sampled = setup
    at = 0
    for n in range(ids.shape[0]):
        count = top_k
        if at > size_bits:
            return TORN
        bits = peek(words, at)
        if count_bits:
            count = low_bits(bits, count_bits)
            if count < 1 or count > top_k:
                return BAD_COUNT
            bits >>= np.uint64(count_bits)
        highest = low_bits(bits, level_bits)
        golomb = low_bits(bits >> np.uint64(level_bits), GOLOMB_BITS)
        at += count_bits + level_bits + GOLOMB_BITS
        if highest >= values.size:
            return BAD_LEVEL
        follows, context, mass = 0, 0, 0.0
        for k in range(count):
            if at > size_bits:
                return TORN
            while follows >> context:
                context += 1
            gap, at = get_rice(words, at, rice[context], plain_bits)
            rank = follows + gap
            if rank >= named.size:
                return BAD_ID
            follows = rank + 1
            if at > size_bits:
                return TORN
            bits = peek(words, at)
            more = ones(bits)
            if more > 24:
                return BAD_LEVEL
            rest = low_bits(bits >> np.uint64(more + 1), more + golomb)
            at += 2 * more + 1 + golomb
            level = highest - (rest + (1 << (more + golomb)) - (1 << golomb))
            if level < 0:
                return BAD_LEVEL
            ids[n, k] = named[rank]
            logprobs[n, k] = top - values[level]
            mass += weights[level]
        if not sampled:
            wanted = math.log(-math.expm1(tail[n])) if tail[n] > -np.inf else 0.0
            correction = np.float32(wanted - math.log(mass))
            for k in range(count):
                logprobs[n, k] += correction
    return 0 if at <= size_bits and size_bits - at < 8 else TORN


@_jit
def encode_set(numbers, parameter, plain_bits, at, words):
    """Append ascending numbers as Rice-coded gaps."""
    follows = 0
    for number in numbers:
        code, size = rice_code(number - follows, parameter, plain_bits)
        at = put(words, at, code, size)
        follows = number + 1
    return at


@_jit
def decode_set(words, size_bits, at, parameter, plain_bits, limit, numbers):
    """Read ascending numbers below `limit`; returns the bit behind them, or an error < 0."""
    follows = 0
    for n in range(numbers.size):
        if at > size_bits:
            return TORN
        gap, at = get_rice(words, at, parameter, plain_bits)
        number = follows + gap
        if number >= limit:
            return BAD_ID
        numbers[n] = number
        follows = number + 1
    return at if at <= size_bits else TORN

"""MinHash signatures of many texts at once: the inner loops, compiled. Imported where needed: it loads numba.

The signatures are datasketch's, bit for bit (scheme "affine32": Murmur's finalizer, then a h + b mod 2^32 with
odd a), and so is their law: two texts agree in a share of their values that is, on average, the Jaccard share
of their shingles. datasketch itself hashes one shingle at a time in Python, about 1 MB of text in a second.

A text is an array of code points here, already squeezed: letters, digits and marks, one space between words.
Its shingles are all runs of so many characters, and not of words: a case ending then changes two or three
shingles out of a hundred, not three word triples (see docs). All arithmetic is modulo 2^32 or 2^64.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

SPACE, KEPT, DROPPED = 0, 1, 2  # what becomes of a code point
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

_jit = njit(cache=True, nogil=True)


@_jit
def squeeze(codes, ends, classes):
    """Each text with every run of SPACE as one space, none at its ends, and without what is DROPPED.

    codes [N], ends [P] -> codes [<= N], ends [P], and how many bytes each takes in UTF-8 [P].
    """
    squeezed = np.empty(len(codes), np.uint32)
    new_ends = np.empty(len(ends), np.int64)
    utf8_bytes = np.zeros(len(ends), np.int64)
    at = start = 0
    for text in range(len(ends)):
        first, gap = at, False
        for place in range(start, ends[text]):
            code = codes[place]
            kind = classes[code]
            if kind == KEPT:
                if gap and at > first:
                    squeezed[at] = 32
                    at += 1
                    utf8_bytes[text] += 1
                gap = False
                squeezed[at] = code
                at += 1
                utf8_bytes[text] += 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)
            elif kind == SPACE:
                gap = True
        start = ends[text]
        new_ends[text] = at
    return squeezed[:at], new_ends, utf8_bytes


@_jit
def _mixed(value):
    """Murmur's 64-bit finalizer: every bit of `value` moves every bit of the answer."""
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


@_jit
def _shingle(codes, start, length):
    """64-bit hash of `length` code points."""
    value = np.uint64(length)
    for place in range(start, start + length):
        value = (value ^ np.uint64(codes[place])) * _MULTIPLIER
        value ^= value >> np.uint64(29)
    return _mixed(value)


@_jit
def _mixed_half(value):
    """Murmur's 32-bit finalizer of the upper half of `value`: what datasketch permutes."""
    half = np.uint32(value >> np.uint64(32))
    half = np.uint32((half ^ (half >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    half = np.uint32((half ^ (half >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(half ^ (half >> np.uint32(16)))


@_jit
def _permute(half, a, b, signature):
    """Lower `signature` by one shingle. A function of its own, so that it compiles to vector instructions."""
    for k in range(len(signature)):
        signature[k] = min(signature[k], np.uint32(a[k] * half + b[k]))


@_jit
def _sign(codes, start, end, length, a, b, signature):
    """MinHash of codes[start:end] into `signature`."""
    signature[:] = 0xFFFFFFFF
    for place in range(start, end - length + 1):
        _permute(_mixed_half(_shingle(codes, place, length)), a, b, signature)


@_jit
def signatures(codes, starts, ends, length, a, b):
    """One signature for each text codes[starts[p]:ends[p]], of at least `length` code points.  # [P, K]"""
    found = np.empty((len(starts), len(a)), np.uint32)
    for text in range(len(starts)):
        _sign(codes, starts[text], ends[text], length, a, b, found[text])
    return found


@_jit
def band_keys(codes, starts, ends, length, a, b, bands, rows):
    """64 bits for each band of each signature: texts with a key in common are worth comparing.  # [bands, P]"""
    keys = np.empty((bands, len(starts)), np.uint64)
    signature = np.empty(len(a), np.uint32)
    for text in range(len(starts)):
        _sign(codes, starts[text], ends[text], length, a, b, signature)
        for band in range(bands):
            value = np.uint64(0)
            for k in range(band * rows, (band + 1) * rows):
                value = (value ^ np.uint64(signature[k])) * _MULTIPLIER
                value ^= value >> np.uint64(29)
            keys[band, text] = _mixed(value)
    return keys


@_jit
def shingles(codes, length):
    """The different shingles of one text, as sorted 64-bit hashes.  # [S]"""
    found = np.empty(len(codes) - length + 1, np.uint64)
    for place in range(len(found)):
        found[place] = _shingle(codes, place, length)
    found.sort()
    count = 1
    for place in range(1, len(found)):
        if found[place] != found[place - 1]:
            found[count] = found[place]
            count += 1
    return found[:count].copy()


@_jit
def jaccard(one, other):
    """|A and B| / |A or B| of two sorted arrays without repeats."""
    i = j = shared = 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            shared += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return shared / (len(one) + len(other) - shared)


@_jit
def kept_neighbours(near, previous, row_of, gone, most, found):
    """Texts before `near` that share a bucket with it and are kept; up to `most` of each bucket, nearest first.

    previous [R, bands] holds, for the texts that have a row (row_of [N], else -1), the text before it in each
    bucket, or -1. Texts that are `gone` are cut out of the chains on the way, which keeps these short. Writes
    into `found` [bands * most], one entry for every bucket that is shared, and returns how many.
    """
    count = 0
    row = row_of[near]
    for band in range(previous.shape[1]):
        holder, steps = row, 0
        while steps < most:
            other = previous[holder, band]
            while other >= 0 and gone[other]:
                other = previous[row_of[other], band]
            previous[holder, band] = other
            if other < 0:
                break
            found[count] = other
            count += 1
            steps += 1
            if row_of[other] < 0:
                break
            holder = row_of[other]
    return count

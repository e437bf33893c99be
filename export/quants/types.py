"""The names of quantisation: file types, which are mixes, and the tensor types that they are mixed from.

    QUANTS         Q4_K_M   a file: mostly Q4_K, and Q6_K where an error costs most
    TENSOR_TYPES   Q4_K     one tensor: blocks of 256 weights in 144 bytes

A file type means some tensor types; rows that are no multiple of a block get another one, a fallback. No
library is loaded by these tables. Tests hold them against llama.cpp itself: its header and, type by type, the
mixes that its quantiser plans.
Source: llama.cpp of llama-cpp-python 0.3.36, include/llama.h, tools/quantize and src/llama-quant.cpp.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Quant:
    """A file type.

    number: llama.cpp's, general.file_type. types: what matrices are meant to get; the first in a pure file.
    bits: a weight's in a model of Llama 3 8B's shape, made without an importance matrix; smaller models take
    more. needs_imatrix: llama.cpp does not make it without an importance matrix.
    """

    number: int
    types: tuple[str, ...]
    bits: float
    needs_imatrix: bool = False


QUANTS: dict[str, Quant] = {  # from many bits to few
    "F32": Quant(0, ("F32",), 32.0),
    "F16": Quant(1, ("F16",), 16.0),
    "BF16": Quant(32, ("BF16",), 16.0),
    "Q8_0": Quant(7, ("Q8_0",), 8.5),
    "MXFP4_MOE": Quant(38, ("MXFP4", "Q8_0"), 8.5),  # MXFP4 for experts, which no family here has; or when pure
    "Q6_K": Quant(18, ("Q6_K",), 6.56),
    "Q5_1": Quant(9, ("Q5_1", "Q6_K"), 6.04),
    "Q5_K_M": Quant(17, ("Q5_K", "Q6_K"), 5.7),
    "Q5_K_S": Quant(16, ("Q5_K", "Q6_K"), 5.57),
    "Q5_0": Quant(8, ("Q5_0", "Q5_1", "Q6_K"), 5.57),
    "Q4_1": Quant(3, ("Q4_1", "Q6_K"), 5.1),
    "Q4_K_M": Quant(15, ("Q4_K", "Q5_K", "Q6_K"), 4.89),
    "IQ4_NL": Quant(25, ("IQ4_NL", "Q5_K", "Q6_K"), 4.68),
    "Q4_K_S": Quant(14, ("Q4_K", "Q5_K", "Q6_K"), 4.67),
    "Q4_0": Quant(2, ("Q4_0", "Q4_1", "Q6_K"), 4.64),
    "IQ4_XS": Quant(30, ("IQ4_XS", "Q5_K", "Q6_K"), 4.46),
    "Q3_K_L": Quant(13, ("Q3_K", "Q5_K", "Q6_K"), 4.3),
    "Q3_K_M": Quant(12, ("Q3_K", "Q4_K", "Q5_K", "Q6_K"), 4.0),
    "IQ3_M": Quant(27, ("IQ3_S", "Q4_K", "Q5_K", "Q6_K"), 3.76),
    "IQ3_S": Quant(26, ("IQ3_S", "Q4_K", "Q5_K", "Q6_K"), 3.66),
    "Q3_K_S": Quant(11, ("Q3_K", "Q5_K", "Q6_K"), 3.64),
    "IQ3_XS": Quant(22, ("IQ3_S", "IQ3_XXS", "Q4_K", "Q5_K", "Q6_K"), 3.5, needs_imatrix=True),
    "IQ3_XXS": Quant(23, ("IQ3_XXS", "IQ2_S", "IQ3_S", "Q3_K", "Q4_K", "Q5_K"), 3.37, needs_imatrix=True),
    "Q2_K": Quant(10, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 3.16),
    "Q2_K_S": Quant(21, ("Q2_K", "Q4_K", "Q5_K", "Q6_K"), 2.97, needs_imatrix=True),
    "IQ2_M": Quant(29, ("IQ2_S", "IQ3_S", "Q4_K", "Q5_K"), 2.93, needs_imatrix=True),
    "IQ2_S": Quant(28, ("IQ2_XS", "IQ3_S", "Q4_K", "Q5_K"), 2.74, needs_imatrix=True),
    "Q2_0": Quant(41, ("Q2_0", "Q4_K", "Q6_K"), 2.68),
    "IQ2_XS": Quant(20, ("IQ2_XS", "Q2_K", "Q4_K", "Q5_K"), 2.59, needs_imatrix=True),
    "TQ2_0": Quant(37, ("TQ2_0", "Q4_K", "Q6_K"), 2.52),
    "IQ2_XXS": Quant(19, ("IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"), 2.38, needs_imatrix=True),
    "TQ1_0": Quant(36, ("TQ1_0", "Q4_K", "Q6_K"), 2.19),
    "IQ1_M": Quant(31, ("IQ1_M", "IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"), 2.15, needs_imatrix=True),
    "IQ1_S": Quant(24, ("IQ1_S", "IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"), 2.0, needs_imatrix=True),
    "Q1_0": Quant(40, ("Q1_0", "Q6_K"), 1.48),
}
UNQUANTISED = ("F32", "F16", "BF16")
OTHER_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize also calls them

TENSOR_TYPES: dict[str, int] = {  # ggml's numbers of the types that its quantiser writes
    "F32": 0,
    "F16": 1,
    "BF16": 30,
    "Q8_0": 8,
    "Q6_K": 14,
    "Q5_1": 7,
    "Q5_K": 13,
    "Q5_0": 6,
    "Q4_1": 3,
    "Q4_K": 12,
    "IQ4_NL": 20,
    "Q4_0": 2,
    "NVFP4": 40,
    "IQ4_XS": 23,
    "MXFP4": 39,
    "Q3_K": 11,
    "IQ3_S": 21,
    "IQ3_XXS": 18,
    "Q2_K": 10,
    "IQ2_S": 22,
    "IQ2_XS": 17,
    "Q2_0": 42,
    "TQ2_0": 35,
    "IQ2_XXS": 16,
    "IQ1_M": 29,
    "TQ1_0": 34,
    "IQ1_S": 19,
    "Q1_0": 41,
}
_NEWER = {"Q2_0": (64, 18)}  # (weights, bytes) of a block, of types that the gguf package does not know yet


def check_quant(name: str) -> str:
    """`name` itself. Raises ValueError for what is no file type, with the one that may be meant."""
    if name in QUANTS:
        return name
    meant = OTHER_NAMES.get(name.upper()) or nearest(name.upper(), QUANTS)
    raise ValueError(f"{name!r} is no file type{_asked(meant)}; known are {', '.join(QUANTS)}")


def check_type(name: str) -> str:
    """`name` itself. Raises ValueError for what is no tensor type, with the one that may be meant."""
    if name in TENSOR_TYPES:
        return name
    meant = nearest(name.upper(), TENSOR_TYPES)
    raise ValueError(f"{name!r} is no tensor type{_asked(meant)}; known are {', '.join(TENSOR_TYPES)}")


def nearest(name: str, known: Collection[str]) -> str:
    """The one of `known` that is most like `name`, or nothing."""
    return (difflib.get_close_matches(name, known, 1) or [""])[0]


def type_name(number: int) -> str:
    """ggml's name of the type with this number. Raises ValueError for a number that is none."""
    import gguf

    for name, known in TENSOR_TYPES.items():
        if known == number:
            return name
    return str(gguf.GGMLQuantizationType(number).name)


def block(name: str) -> tuple[int, int]:
    """(weights, bytes) of a block of the tensor type."""
    import gguf

    return _NEWER.get(name) or gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def _asked(meant: str) -> str:
    return f", did you mean {meant!r}?" if meant else ""

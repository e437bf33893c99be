"""One call of llama.cpp's quantiser: what it would make of every tensor, and making it.

    plan      its dry run: the type that each tensor gets; reads no weights
    write     the file

Rules of its mixes are not repeated here. Some wishes it would answer by ending the process (a type asked for
the embedding skips the choice of a type that fits the rows), so `plan` refuses them.
Source: llama.h and src/llama-quant.cpp of llama.cpp; tools/quantize for what its own tool passes.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.quants.importance import Importance
from export.quants.types import QUANTS, TENSOR_TYPES
from foundation import gguf_header
from foundation.errors import ModelError
from foundation.llama import last_log, library, listening
from foundation.rundir import usable_cores

BUFFER_BYTES = 2**28  # rows in memory at once; llama.cpp's own 8 GiB would hold an embedding whole, as F32
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+) +- \[.*?\], type = +(\w+), (.*)")
_NEW_TYPE = re.compile(r"\((\w+)\)$")
_INT, _STR = 0, 3  # enum llama_model_kv_override_type


@dataclass(frozen=True)
class Wish:
    """What is asked of the quantiser. `overrides`: tensor name -> type, whole names."""

    quant: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    importance: Importance | None = None


def plan(source: Path, wish: Wish) -> dict[str, str]:
    """Tensor name -> the type that it would get. Raises ModelError: llama.cpp refuses."""
    found: dict[str, str] = {}
    count = 0

    def hear(line: str) -> None:
        nonlocal count
        if match := _TENSOR.match(line):
            changed = _NEW_TYPE.search(match[5])
            found[match[3]] = (changed[1] if changed else match[4]).upper()
            count = int(match[2])

    gguf_header.check(source)
    _call(source, None, wish, hear)
    if len(found) != count:
        raise ModelError(f"llama.cpp told the types of {len(found)} tensors of {count}: its log has changed")
    return found


def write(source: Path, target: Path, wish: Wish, told: Callable[[int], None] = lambda done: None) -> None:
    """Make `target`; `told` hears how many tensors are done. Raises ModelError: llama.cpp refuses."""

    def hear(line: str) -> None:
        if match := _TENSOR.match(line):
            told(int(match[1]))

    _call(source, target, wish, hear)


def _call(source: Path, target: Path | None, wish: Wish, hear: Callable[[str], None]) -> None:
    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.ftype = QUANTS[wish.quant].number
    params.nthread = usable_cores()  # its threads wait for nothing
    params.max_buf_size = BUFFER_BYTES
    params.pure = wish.pure
    params.dry_run = target is None
    if wish.output_type:
        params.output_tensor_type = TENSOR_TYPES[wish.output_type]
    if wish.embedding_type:
        params.token_embedding_type = TENSOR_TYPES[wish.embedding_type]
    kept = [_overrides(llama, params, wish.overrides), _importance(llama, params, wish.importance)]
    with listening(hear):
        code = llama.llama_model_quantize(
            os.fsencode(source), os.fsencode(target) if target else b"", ctypes.byref(params)
        )
    del kept  # the C side read from it
    if code:
        why = last_log(1).rpartition("failed to quantize: ")[2]
        raise ModelError(f"llama.cpp makes no {wish.quant} of {source.name}: {why}", hint="choose another type")


def _overrides(llama: Any, params: Any, overrides: Mapping[str, str]) -> Any:
    """Whole names, escaped: llama.cpp takes them as regular expressions, and the first that fits."""
    if not overrides:
        return None
    rows = [(f"^{re.escape(name)}$".encode(), TENSOR_TYPES[kind]) for name, kind in overrides.items()]
    array = (llama.llama_model_tensor_override * (len(rows) + 1))(*rows)  # the last stays NULL
    params.tt_overrides = array
    return array


def _importance(llama: Any, params: Any, importance: Importance | None) -> Any:
    """The means of every matrix, and what the file will say of them."""
    import numpy as np

    if importance is None:
        return None
    held = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.means.items()}
    pointer = ctypes.POINTER(ctypes.c_float)
    rows = [(name.encode(), v.ctypes.data_as(pointer), v.size) for name, v in held.items()]
    array = (llama.llama_model_imatrix_data * (len(rows) + 1))(*rows)
    params.imatrix = array
    keys = (llama.llama_model_kv_override * (len(importance.keys()) + 1))()
    for row, (key, value) in zip(keys, importance.keys().items(), strict=False):
        row.key = key.encode()
        if isinstance(value, int):
            row.tag, row.value.val_i64 = _INT, value
        else:
            row.tag, row.value.val_str = _STR, value.encode()
    params.kv_overrides = keys
    return held, array, keys

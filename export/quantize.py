"""Stage export.quantize: smaller copies of a GGUF file, made by llama.cpp's own quantiser in this process.

A name such as Q4_K_M is a recipe of several types, and a tensor whose rows are no multiple of 256 silently
gets a larger type. So the types are read back from each result: quantize.json tells the real bits per
weight and every tensor that fell back. Small models lose much of the promised saving this way.

It makes the two files that are served: Q8_0 for small models, Q4_K_M for others. It makes no importance
matrix, so the very small types that need one are not offered.
Source: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import ggufs
from foundation.errors import ModelError
from foundation.files import write_json
from foundation.llama import LlamaModel, default_threads, last_log, library
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, one


@dataclass(frozen=True)
class Mix:
    """A quantisation by name: llama.cpp's number for it, and the tensor types it means to use."""

    number: int
    types: frozenset[str]


MIXES: dict[str, Mix] = {  # NAME is written as name.gguf, the file of the stage's role `name`
    "Q8_0": Mix(7, frozenset({"Q8_0"})),
    "Q4_K_M": Mix(15, frozenset({"Q4_K", "Q6_K"})),
}


class Settings(StageSettings):
    """export.quantize has no settings: the stage promises both files."""


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Read role `gguf` (F32, F16 or BF16), write q8_0.gguf, q4_k_m.gguf and quantize.json."""
    source = ggufs.find(one(inputs, "gguf"))
    before = {t.name: t for t in ggufs.tensors(source)}
    kind = ggufs.quantisation(source)
    if kind not in ("F32", "F16", "BF16"):
        raise ModelError(
            f"{source.name} is {kind} already", hint="quantise the F32 file that export.gguf wrote"
        )
    LlamaModel(source, vocab_only=True).close()  # a file llama.cpp refuses is refused before any work
    rows: dict[str, Any] = {}
    figures: dict[str, float | int | str] = {}
    for done, name in enumerate(MIXES, 1):
        stop_if_asked(report)
        path = out / f"{name.lower()}.gguf"
        _quantise(source, path, MIXES[name].number, out / ".work")
        rows[name] = row = _read_back(path, name)
        if row["fallbacks"]:
            report.note(f"{name}: {len(row['fallbacks'])} of {len(before)} tensors got a larger type")
        figures[f"{name.lower()}_bits_per_weight"] = row["bits_per_weight"]
        figures[f"{name.lower()}_bytes"] = row["size_bytes"]
        report.progress(done, len(MIXES), "file")
    write_json(out / "quantize.json", {"source": kind, "files": rows})
    return figures


def _quantise(source: Path, target: Path, number: int, work: Path) -> None:
    """One call of llama.cpp's quantiser; the file appears under its name when it is whole."""
    llama = library()
    work.mkdir(parents=True, exist_ok=True)
    partial = work / target.name
    params = llama.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = default_threads()
    code = llama.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
    if code:
        raise ModelError(f"llama.cpp could not make {target.name} (code {code}): {last_log()}")
    partial.replace(target)


def _read_back(path: Path, name: str) -> dict[str, Any]:
    """What the file really holds. A fallback is a matrix of a type that its mix does not mean to use."""
    table = ggufs.tensors(path)
    matrices = [t for t in table if len(t.shape) > 1]
    types: dict[str, int] = {}
    for tensor in table:
        types[tensor.type] = types.get(tensor.type, 0) + 1
    return {
        "file": path.name,
        "size_bytes": path.stat().st_size,
        "bits_per_weight": round(ggufs.bits_per_weight(table), 3),
        "types": types,
        "fallbacks": [
            {"tensor": t.name, "type": t.type, "columns": t.shape[-1]}
            for t in matrices
            if t.type not in MIXES[name].types
        ],
    }

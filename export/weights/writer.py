"""Weights into the files of a `Layout`, some rows at a time: memory does not grow with the model.

Where nothing is to be computed the bytes go through unchanged. Every number is looked at all the same: one NaN
makes a model that answers nonsense, and a number too large for the file's type becomes infinite there. The
largest one is found on the bits, which order as the numbers do, so the look costs less than the copy.

Q8_0 is made by ggml itself, from the library that llama_cpp loads, and is loaded for that type only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from export.weights.checkpoint import floats
from export.weights.layout import Layout, Tensor, padded
from foundation.errors import ModelError
from foundation.files import writing
from foundation.report import Report, stop_if_asked

if TYPE_CHECKING:
    import numpy as np

NO_SPACE = "free some space on that disk, name another folder with --out, or choose a smaller type"
LARGEST = {  # what a type can hold
    "F32": 3.4028234663852886e38,
    "F16": 65504.0,
    "BF16": 3.3895313892515355e38,
    "Q8_0": 127 * 65504.0,  # a block keeps its largest number / 127 as float16
}


class Sink(Protocol):
    """Where bytes go: a file opened for writing, or what a test puts in its place."""

    def write(self, data: Any, /) -> object: ...


OpenFile = Callable[[Path], AbstractContextManager[Sink]]
Rows = Callable[[str], Iterator["np.ndarray"]]


def write_files(
    layout: Layout,
    rows: Rows,
    folder: Path,
    report: Report,
    *,
    origins: Mapping[str, str] | None = None,
    open_file: OpenFile = lambda path: path.open("wb"),
) -> None:
    """Write all files of `layout` into `folder`.

    rows: name of a tensor -> its rows in blocks, as `Checkpoint.blocks` gives them. origins: name of a tensor
    -> what the user knows it by, for errors. open_file: each file is written from its beginning to its end.
    Raises ModelError: NaN, infinite, or too large a number for its type; RunError: trouble with the disk;
    StopRequested.
    """
    total = sum(len(file.tensors) for file in layout.files)
    done = 0
    for file in layout.files:
        with writing(folder / file.name), open_file(folder / file.name) as sink:
            sink.write(file.head)
            for tensor, _ in file.tensors:
                _write_tensor(sink, tensor, rows, (origins or {}).get(tensor.name, tensor.name), report)
                done += 1
                report.progress(done, total, "tensor")


def _write_tensor(sink: Sink, tensor: Tensor, rows: Rows, name: str, report: Report) -> None:
    count = 0
    for block in rows(tensor.name):
        stop_if_asked(report)
        data = stored(block, tensor.type, name)
        sink.write(data.data.cast("B"))
        count += data.nbytes
    if count != tensor.size_bytes:
        raise ModelError(f"{name} gave {count} bytes, {tensor.size_bytes} were announced")
    sink.write(bytes(padded(count) - count))


def stored(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """What lies in the file for `values` of float32, float16, or uint16 with the bits of bfloat16.

    kind: a key of LARGEST. Raises ModelError: NaN, infinite, or more than that. Bit for bit as gguf.quants.
    """
    import numpy as np

    top = largest(values)
    if not top < np.inf:
        raise ModelError(f"{name} holds infinite or undefined numbers", hint="its training diverged")
    if top > LARGEST[kind]:
        raise ModelError(
            f"{name} holds {top:g}, too much for {kind.lower()}",
            hint="use f32" if kind == "BF16" else "use bf16 or f32",
        )
    values = np.ascontiguousarray(values)
    if kind == "F16":
        return values if values.dtype == np.float16 else floats(values).astype(np.float16)
    if kind == "BF16":
        return values if values.dtype == np.uint16 else _bfloat16(floats(values))
    return floats(values) if kind == "F32" else _q8_0(floats(values))


def largest(values: np.ndarray) -> float:
    """The largest magnitude; infinite or NaN where there is such a number.

    Without their sign, the bits of floating-point numbers order as the numbers do, NaN last. Two maxima over
    the bits as they are, signed and unsigned, find the largest positive and the largest negative one.
    """
    import numpy as np

    if not values.size:
        return 0.0
    size = values.dtype.itemsize * 8
    unsigned = int(values.view(f"u{size // 8}").max())
    signed = int(values.view(f"i{size // 8}").max())
    bits = max(signed, unsigned - (1 << (size - 1)), 0)
    if values.dtype == np.uint16:
        bits, size = bits << 16, 32
    return float(np.array(bits, f"u{size // 8}").view(f"f{size // 8}"))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, of two equally near ones the even one. `values` are finite."""
    import numpy as np

    bits = values.view(np.uint32)
    nearest = bits >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += bits
    nearest >>= 16
    return nearest.astype(np.uint16)


def _q8_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers: their scale as float16, then 32 signed bytes. values: [rows, columns]"""
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    rows, columns = values.shape
    out = np.empty((rows, columns // block * size), np.uint8)
    pointer = ctypes.c_void_p
    quantize = _ggml().ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    kind = int(gguf.GGMLQuantizationType.Q8_0)
    written = quantize(kind, values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise ModelError(f"ggml wrote {written} bytes for {out.nbytes}")
    return out


def _ggml() -> Any:
    from llama_cpp import _ggml

    return _ggml.libggml

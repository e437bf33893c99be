"""An importance matrix as read from its file: for every column of a matrix, the mean square of what it is
multiplied with. The quantiser spends its precision where that is large.

The file is a GGUF file of llama.cpp's own form, whoever made it: `NAME.in_sum2`, sums of squares, and
`NAME.counts`, the tokens that were summed. Source: llama.cpp, common/imatrix-loader.cpp and tools/quantize.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

SUMS, COUNTS = ".in_sum2", ".counts"
KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
TEXT_BYTES = 127  # llama.cpp's list of metadata cuts a text there
_AGAIN = "make it again with export.imatrix, or with llama.cpp's llama-imatrix"


@dataclass(frozen=True)
class Importance:
    """`means`: tensor name -> mean square of each column's input.  # [columns], float32"""

    file: str
    datasets: tuple[str, ...]
    chunks: int
    means: Mapping[str, np.ndarray]

    def keys(self) -> dict[str, str | int]:
        """What a file quantised with it says of it, as llama.cpp's tool writes it; names without folders."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": _named(self.file)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = _named(self.datasets[0])
        keys["quantize.imatrix.entries_count"] = len(self.means)
        if self.chunks > 0:
            keys["quantize.imatrix.chunks_count"] = self.chunks
        return keys


def read(path: Path) -> Importance:
    """Raises ModelError: no such file, not a GGUF file of this form, numbers that are no mean squares."""
    import gguf
    import numpy as np

    if not path.is_file():
        raise ModelError(f"no importance matrix at {path}", hint=_AGAIN)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            hint = "an old .dat file becomes one by llama-imatrix --in-file OLD.dat -o NEW.gguf"
            raise ModelError(f"{path.name} is no GGUF file, as importance matrices are", hint=hint)
    try:
        reader = gguf.GGUFReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items()}
        held = {t.name: np.array(t.data).reshape(-1) for t in reader.tensors}
    except Exception as error:  # the reader raises whatever its parsing meets in a damaged file
        raise ModelError(f"{path.name} can not be read as GGUF: {error}", hint=_AGAIN) from error
    if missing := [key for key in KEYS if key not in keys]:
        raise ModelError(f"{path.name} is no importance matrix: it has no {', '.join(missing)}", hint=_AGAIN)
    means = {
        name.removesuffix(SUMS): _mean(path, name.removesuffix(SUMS), held)
        for name in held
        if name.endswith(SUMS)
    }
    if not means:
        raise ModelError(f"{path.name} is an importance matrix of no tensor", hint=_AGAIN)
    return Importance(path.name, tuple(keys[KEYS[0]]), int(keys[KEYS[1]]), means)


def _mean(path: Path, name: str, held: Mapping[str, Any]) -> np.ndarray:
    """sums / tokens in float32, as llama-quantize divides; ones where no token came by."""
    import numpy as np

    sums, counts = held[name + SUMS], held.get(name + COUNTS)
    if counts is None or counts.size != 1 or sums.dtype != np.float32 or counts.dtype != np.float32:
        raise ModelError(f"{path.name}: {name} has no single count of tokens in F32", hint=_AGAIN)
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and sums.min() >= 0 and counts[0] >= 0):
        raise ModelError(f"{path.name}: {name} holds numbers that are no mean squares", hint=_AGAIN)
    count = np.float32(np.rint(counts[0]))
    return sums / count if count > 0 else np.ones_like(sums)


def check(importance: Importance, columns: Mapping[str, int]) -> None:
    """Refuse one of another model. columns: tensor name -> length of its rows. Raises ModelError."""
    problems = []
    for name, means in importance.means.items():
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1)
            problems.append(f"the model has no {name}" + (f" (but {near[0]})" if near else ""))
        elif means.size != columns[name]:
            problems.append(f"{name} has {means.size} numbers, the model's rows are {columns[name]} long")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"{importance.file} belongs to another model: {'; '.join(problems[:5])}{more}",
            hint="make the importance matrix from this very model",
        )


def _named(text: str) -> str:
    """The last part of a path, cut to what llama.cpp can hold, never within a letter."""
    name = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name.encode()[:TEXT_BYTES].decode("utf-8", "ignore")

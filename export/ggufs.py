"""Reading GGUF files back: what is in them, by name, type and size. No weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from foundation.errors import ModelError


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file. `shape` is in PyTorch's order, rows first."""

    name: str
    type: str  # ggml's name of the type: "F32", "Q4_K"
    shape: tuple[int, ...]
    size_bytes: int


def find(path: Path) -> Path:
    """The GGUF file at `path`, or the only one in the folder `path`. Raises ModelError otherwise."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"{path} holds {len(found)} GGUF files, one is needed")
    return found[0]


def tensors(path: Path) -> list[Tensor]:
    """All tensors of a file, in its order. Raises ModelError when it is not a GGUF file."""
    return [
        Tensor(t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.n_bytes))
        for t in _reader(path).tensors
    ]


def quantisation(path: Path) -> str:
    """The file's type by its own word: "F32", "Q4_K_M". Raises ModelError when it names none."""
    import gguf

    field = _reader(path).fields.get("general.file_type")
    value = int(field.contents()) if field else -1
    if value not in set(gguf.LlamaFileType):
        raise ModelError(f"{path.name} has file type {value}, which is not known")
    return str(gguf.LlamaFileType(value).name).removeprefix("MOSTLY_").removeprefix("ALL_")


def bits_per_weight(table: list[Tensor]) -> float:
    """Real average over all tensors, norms included."""
    return 8 * sum(t.size_bytes for t in table) / sum(prod(t.shape) for t in table)


def gpu_bytes(table: list[Tensor]) -> int:
    """Bytes that a full offload puts on the card: llama.cpp keeps the embedding on the CPU, but a tied
    one is needed once more on the card as the output matrix.
    """
    untied = any(t.name == "output.weight" for t in table)
    return sum(t.size_bytes for t in table if not (untied and t.name == "token_embd.weight"))


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader raises whatever its parsing meets in a damaged file
        raise ModelError(f"{path} can not be read as GGUF: {error}") from error

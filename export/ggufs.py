"""Reading GGUF files back: what is in them, by name, type and size. No weights are loaded."""

from __future__ import annotations

from math import prod
from pathlib import Path

from export.quants.types import QUANTS, type_name
from export.weights.layout import Tensor
from foundation import gguf_header
from foundation.errors import ModelError


def tensors(path: Path) -> list[Tensor]:
    """All tensors of a model, of all its shards, in its order. Raises ModelError when it is not a GGUF file.

    gguf's own reader would take seconds for a large vocabulary.
    """
    try:
        return [
            Tensor(t.name, t.sizes[::-1], type_name(t.type))
            for shard in gguf_header.shards(path)
            for t in gguf_header.header(shard).tensors
        ]
    except ValueError as error:
        raise ModelError(f"{path.name} can not be read: {error}") from error


def quantisation(path: Path) -> str:
    """The file's type by its own word: "F32", "Q4_K_M". Raises ModelError when it names none."""
    value = gguf_header.read(path)[0].get("general.file_type")
    for name, quant in QUANTS.items():
        if quant.number == value:
            return name
    raise ModelError(f"{path.name} has file type {value}, which is not known")


def bits_per_weight(table: list[Tensor]) -> float:
    """Real average over all tensors, norms included."""
    return 8 * sum(t.size_bytes for t in table) / sum(prod(t.shape) for t in table)


def gpu_bytes(table: list[Tensor]) -> int:
    """Bytes that a full offload puts on the card: llama.cpp keeps the embedding on the CPU, but a tied
    one is needed once more on the card as the output matrix.
    """
    untied = any(t.name == "output.weight" for t in table)
    return sum(t.size_bytes for t in table if not (untied and t.name == "token_embd.weight"))

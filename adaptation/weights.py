"""A model as a room of matrices: its tensors, the tokenizer beside it, and whether they belong together.

Every tensor is looked through when it is read: a NaN in a matrix would go unseen through means and fits, into
all of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adaptation.tokenizer_json import TokenizerJson
from foundation.errors import ModelError
from foundation.tensors import HEAD, TensorFiles

if TYPE_CHECKING:
    from torch import Tensor

Matrix = Literal["embeddings", "head"]

HEAD_BIAS = "lm_head.bias"  # [V]
LOOKED_AT = 2**24  # numbers looked through at once


@dataclass(frozen=True)
class Model:
    """A folder, its tokenizer and its tensors."""

    folder: Path
    tokenizer: TokenizerJson
    files: TensorFiles

    @classmethod
    def read_folder(cls, folder: Path) -> Model:
        """Raises ModelError when a token has no row, or embeddings and LM head differ in shape."""
        model = cls(folder, TokenizerJson.read(folder), TensorFiles(folder))
        if model.shape[0] < model.tokenizer.size:
            raise ModelError(f"{folder}: {model.shape[0]} rows of embeddings for {model.tokenizer.size} tokens")
        if HEAD in model.files and model.files.shape(HEAD) != model.shape:
            raise ModelError(
                f"{folder}: embeddings are {list(model.shape)}, the LM head {list(model.files.shape(HEAD))}",
                hint="both need a row for each token: save the model again with matrices of one shape",
            )
        return model

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input embeddings: rows, width."""
        return self.files.shape(self.files.embedding())

    @cached_property
    def own_head(self) -> bool:
        """True when the LM head is another matrix than the input embeddings; a tied one may be stored too."""
        import torch

        return HEAD in self.files and not torch.equal(self.matrix("head"), self.matrix("embeddings"))

    def matrix(self, which: Matrix) -> Tensor:
        """Input embeddings or LM head.  # [V, D]"""
        return self.read(HEAD if which == "head" else self.files.embedding())

    def read(self, name: str) -> Tensor:
        """A tensor. Raises ModelError when it holds a NaN or an infinity."""
        tensor = self.files.read(name)
        if bad := not_finite(tensor):
            raise ModelError(
                f"{self.folder}: {name} holds {bad} numbers that are NaN or infinite, of {tensor.numel()}",
                hint="the training that made it diverged, or its file is damaged: take an earlier checkpoint",
            )
        return tensor


def not_finite(tensor: Tensor) -> int:
    """How many numbers are NaN or infinite."""
    import torch

    if not tensor.is_floating_point():
        return 0
    small = tensor.element_size() == 1  # torch looks into no 8-bit number
    chunks = tensor.flatten().split(LOOKED_AT)
    return sum(int((~torch.isfinite(chunk.float() if small else chunk)).sum()) for chunk in chunks)

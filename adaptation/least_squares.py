"""Least squares over matrices too tall for memory: argmin ||A P - B|| in fp64, block by block of rows.

A is reduced to a small triangle R by QR of (R stacked on the next block), which loses no accuracy, unlike the
normal equations. Each step's reflections turn D = B - A along: of the turned D, the rows beside R are kept,
and the rows below them are beyond the reach of any P, so only their squares are: the sum of them is what the
fit misses. R has the singular values of A.

Solved for D = B - A and P = I + X with the smallest X. Where A has full column rank that is the one
least-squares answer. Where it has not, it is the answer nearest to the identity: directions that A does not
speak of stay as they are, where the smallest P would erase them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from foundation.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor


class Fit(NamedTuple):
    """The answer, and what may be thought of it."""

    projection: Tensor  # P, fp64  # [D, D]
    residual: float  # ||A P - B|| / ||B||
    condition: float  # largest singular value of A over the smallest that counts
    rank: int  # singular values of A that count

    def write(self, path: Path) -> None:
        """Write as one file: all of it, or none."""
        import torch
        from safetensors.torch import save

        told = torch.tensor([self.residual, self.condition, self.rank], dtype=torch.float64)
        write_atomic(path, save({"projection": self.projection, "told": told}))

    @classmethod
    def read(cls, path: Path) -> Fit:
        """What `write` wrote."""
        from safetensors.torch import load_file

        held = load_file(path)
        residual, condition, rank = held["told"].tolist()
        return cls(held["projection"], residual, condition, int(rank))


def fit(blocks: Iterable[tuple[Tensor, Tensor]]) -> Fit:
    """Fit P to pairs (A, B) of row blocks, each [n, D]; at least one block.

    A step reads R again: blocks of 2 D rows take a quarter longer than the longest would. At most four
    matrices of n + D rows in fp64 are held.
    """
    import torch

    triangle, turned = torch.empty(0), torch.empty(0)  # R, and D beside it  # [<= D, D] each
    rows, squares, missed = 0, 0.0, 0.0
    for left, right in blocks:
        left, right = left.double(), right.double()
        rows, squares = rows + len(left), squares + float(right.square().sum())
        right = right - left
        if triangle.numel():
            left, right = torch.cat([triangle, left]), torch.cat([turned, right])
        factors, scales = torch.geqrf(left)  # Q as reflections below R
        del left
        kept = len(scales)
        right = torch.ormqr(factors[:, :kept], scales, right, transpose=True)  # Q^T D
        triangle, turned = factors[:kept].triu(), right[:kept].clone()
        missed += float(right[kept:].square().sum())
        del factors, right  # the next pair is made now
    width = triangle.shape[1]
    u, s, vh = torch.linalg.svd(triangle, full_matrices=False)
    rank = int((s > s[0] * max(rows, width) * torch.finfo(torch.float64).eps).sum())
    x = vh[:rank].T @ ((u[:, :rank].T @ turned) / s[:rank, None])
    missed += float((triangle @ x - turned).square().sum())
    return Fit(
        projection=torch.eye(width, dtype=torch.float64) + x,
        residual=(missed / squares) ** 0.5 if squares else 0.0,
        condition=float(s[0] / s[rank - 1]) if rank else float("inf"),
        rank=rank,
    )

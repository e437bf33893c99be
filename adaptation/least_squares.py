"""Least squares over matrices too tall for memory: argmin ||A P - B|| in fp64, block by block of rows.

[A | D] is reduced to a small triangle R by QR of (R stacked on the next block), which loses no accuracy,
unlike the normal equations. Of R = [[R11, R12], [0, R22]], R11 has the singular values of A, and ||R22|| is
the residual.

Solved for D = B - A and P = I + X with the smallest X. Where A has full column rank that is the one
least-squares answer. Where it has not, it is the answer nearest to the identity: directions that A does not
speak of stay as they are, where the smallest P would erase them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Fit(NamedTuple):
    """The answer, and what may be thought of it."""

    projection: Tensor  # P, fp64  # [D, D]
    residual: float  # ||A P - B|| / ||B||
    condition: float  # largest singular value of A over the smallest that counts
    rank: int  # singular values of A that count


def fit(blocks: Iterable[tuple[Tensor, Tensor]]) -> Fit:
    """Fit P to pairs (A, B) of row blocks, each [n, D]; at least one block."""
    import torch

    triangle: Tensor | None = None  # [<= 2D, 2D]
    rows, squares = 0, 0.0
    for left, right in blocks:
        left, right = left.double(), right.double()
        joined = torch.cat([left, right - left], dim=1)  # [n, 2D]
        rows, squares = rows + len(left), squares + float(right.square().sum())
        stacked = joined if triangle is None else torch.cat([triangle, joined])
        triangle = torch.linalg.qr(stacked, mode="r").R
    assert triangle is not None
    width = triangle.shape[1] // 2
    upper, lower = triangle[:width], triangle[width:]
    u, s, vh = torch.linalg.svd(upper[:, :width], full_matrices=False)
    rank = int((s > s[0] * max(rows, width) * torch.finfo(torch.float64).eps).sum())
    x = vh[:rank].T @ ((u[:, :rank].T @ upper[:, width:]) / s[:rank, None])
    missed = (upper[:, :width] @ x - upper[:, width:]).square().sum() + lower[:, width:].square().sum()
    return Fit(
        projection=torch.eye(width, dtype=torch.float64) + x,
        residual=float(missed.sqrt()) / squares**0.5 if squares else 0.0,
        condition=float(s[0] / s[rank - 1]) if rank else float("inf"),
        rank=rank,
    )

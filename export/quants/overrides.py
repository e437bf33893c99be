"""Which matrices a setting such as `{"blk.*.ffn_down.weight" = "Q6_K"}` means.

llama.cpp takes regular expressions here, and one from a recipe could run for hours. So a recipe says names: a
whole one, a part of some, or one with `*` for any letters. They are looked up here, and llama.cpp gets whole
names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from export.quants.types import nearest
from foundation.errors import ModelError

CHARACTERS = re.compile(r"[A-Za-z0-9_.*-]{1,64}")  # 64: ggml's longest name


def resolve(patterns: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Name of each matrix that a pattern fits -> type; the first pattern counts.

    Raises ModelError naming every pattern that fits none.
    """
    found: dict[str, str] = {}
    lost = []
    for pattern, kind in patterns.items():
        hits = [pattern] if pattern in names else [name for name in names if _fits(pattern, name)]
        if not hits:
            near = nearest(pattern, names)
            lost.append(f"{pattern!r} fits none" + (f", did you mean {near!r}?" if near else ""))
        for name in hits:
            found.setdefault(name, kind)
    if lost:
        raise ModelError(
            f"tensor_types names matrices that the model has not: {'; '.join(lost)}",
            hint="its matrices are " + ", ".join(list(names)[:9]) + ", ...; norms and biases stay F32",
        )
    return found


def _fits(pattern: str, name: str) -> bool:
    """A part of the name; or the whole name, where each `*` stands for any letters."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern in name
    *middle, last = rest
    if not (name.startswith(first) and name.endswith(last) and len(name) >= len(first) + len(last)):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        place = name.find(part, at, end)
        if place < 0:
            return False
        at = place + len(part)
    return True

"""How much memory this process has held."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Largest resident memory of this process, or of a child that it waited for."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024

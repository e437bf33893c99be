"""What a teacher is asked, what it answers, and the one interface behind which every teacher stands.

An answer is a function of its ask: the draws of a sampled answer come from `Ask.seed`, and that from
(seed of the stage, purpose, prompt number, candidate number). So an answer can be kept under the ask's key,
and a killed run goes on without asking again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from foundation.dataio import Message


@dataclass(frozen=True)
class Ask:
    """One question: the chat so far, and how the answer is drawn. temperature 0 takes the likeliest token."""

    messages: tuple[Message, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def key(self, teacher: str) -> str:
        """32 hex digits: the same for the same ask of the same teacher, in this run and in any other."""
        said = [teacher, self.messages, self.max_new_tokens, self.temperature, self.top_p, self.seed]
        text = json.dumps(said, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Reply:
    """One answer. `cut`: it ran into max_new_tokens. `fault`: why there is none; a fault is never kept.

    Whatever a teacher or a ledger gives, `text` and `fault` can be written as UTF-8: half of a surrogate pair
    becomes a question mark.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cut: bool = False
    fault: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "fault"):
            object.__setattr__(self, name, getattr(self, name).encode("utf-8", "replace").decode())


class Teacher(Protocol):
    """A transformers folder, a GGUF, or an endpoint."""

    identity: str
    """What an answer depends on beside the ask: a digest of the weights, or the model's name."""

    independent: bool
    """True when an answer does not depend, by rounding, on the asks that stand beside it in a call."""

    def answers(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of each ask once, in the order in which they are ready.

        Once `stop()` is true no more are begun; those that were begun are given if they come soon.
        """

    def close(self) -> None:
        """Free what it holds."""


def seed_of(*parts: object) -> int:
    """31 bits that depend on `parts` alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1

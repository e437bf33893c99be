"""Copy tasks: chats that ask to repeat a passage exactly.

A model whose embeddings were replaced misspells what it should only repeat; LEP's calibration adds 10,000 of
these to the model's own answers. Passages are consecutive sentences of one document, their lengths drawn
log-uniformly, so that many are short and some as long as a page. No two tasks share a passage.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Iterable, Iterator, Sequence

from foundation.dataio import Message
from foundation.errors import InputError
from foundation.report import Report, stop_if_asked

PLACE = "{text}"  # of the passage in a wording
WORDINGS = (
    "Повтори следующий текст слово в слово:\n\n{text}",
    "Скопируй текст ниже точно, ничего не добавляя:\n\n{text}",
    "{text}\n\nВыведи текст выше ещё раз, без изменений.",
    "Repeat the following text word for word:\n\n{text}",
    "Copy the text below exactly, adding nothing:\n\n{text}",
    "{text}\n\nWrite the text above once more, unchanged.",
)
DOCUMENTS_A_NOTE = 10_000
_UNIT = re.compile(r"(?:[^.!?…\n]|[.!?…](?!\s|$))*(?:[.!?…]+|\n+|$)\s*")  # a sentence, or a line's rest


def copy_tasks(
    documents: Iterable[str],
    count: int,
    *,
    shortest: int,
    longest: int,
    wordings: Sequence[str],
    seed: int,
    report: Report,
) -> list[list[Message]]:
    """`count` conversations: a wording with a passage of `shortest` to `longest` characters, and the passage.

    Which passages, and in which order, follows from `seed` and the texts, not from the order of the documents.
    Held in memory are `count` passages. Raises InputError when the corpus has too few.
    """
    kept: list[tuple[int, str]] = []  # (-draw, passage): a heap with the largest draw first
    held: set[str] = set()
    for number, document in enumerate(documents, 1):
        if number % DOCUMENTS_A_NOTE == 0:
            stop_if_asked(report)
            report.progress(number, number, "document")
        for passage in passages(document, shortest, longest, seed):
            draw = _draw(seed, "task", passage)
            if passage in held or (len(kept) == count and -draw <= kept[0][0]):
                continue
            gone = heapq.heappushpop(kept, (-draw, passage)) if len(kept) == count else None
            if gone is None:
                heapq.heappush(kept, (-draw, passage))
            else:
                held.discard(gone[1])
            held.add(passage)
    if len(kept) < count:
        raise InputError(
            f"copy_tasks = {count}, but the corpus has {len(kept)} passages of {shortest} to {longest} "
            "characters",
            hint=f"give more text, lower copy_min_characters, or set copy_tasks = {len(kept)}",
        )
    tasks = []
    for _, passage in sorted(kept, reverse=True):
        wording = wordings[_draw(seed, "wording", passage) % len(wordings)]
        asked = wording.replace(PLACE, passage)
        tasks.append([{"role": "user", "content": asked}, {"role": "assistant", "content": passage}])
    return tasks


def passages(document: str, shortest: int, longest: int, seed: int) -> Iterator[str]:
    """Consecutive passages of `document`, each as long as was drawn for it, to the end of a sentence.

    A sentence that is longer than `longest` itself is left out, and so is a rest shorter than `shortest`.
    """
    rng = random.Random(_draw(seed, "document", document))
    start = end = 0  # of the passage so far
    target = _target(rng, shortest, longest)
    for unit in _UNIT.finditer(document):
        if len(document[start : unit.end()].strip()) > longest:
            if (passage := document[start:end].strip()) and len(passage) >= shortest:
                yield passage
                target = _target(rng, shortest, longest)
            start = unit.start() if len(unit[0].strip()) <= longest else unit.end()
        end = unit.end()
        if len(passage := document[start:end].strip()) >= target:
            yield passage
            start, target = end, _target(rng, shortest, longest)
    if len(passage := document[start:end].strip()) >= shortest:
        yield passage


def _target(rng: random.Random, shortest: int, longest: int) -> float:
    return float(shortest * (longest / shortest) ** rng.random())


def _draw(seed: int, what: str, text: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{what}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")

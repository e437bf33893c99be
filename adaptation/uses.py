"""The tokens of a base that a corpus uses, and those without which they would not come about.

BPE makes a token by the same merges wherever the token stands: merges that reach across its ends were never
applied, or it would not be there. So a token needs what its own merges make on the way, and nothing else; a
text whose tokens are all kept is cut as before, for what merges are left come in their old order.

Where whole words skip the merges (`ignore_merges`, Llama 3), a token that no merges lead to stays without any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from adaptation.merges import Pair, by_pair, settle
from adaptation.tokenizer_json import BYTE_TOKEN, TokenizerJson
from foundation.chat import Chat
from foundation.dataio import ROLES, Message, documents
from foundation.errors import ModelError
from foundation.files import read_json, write_json
from foundation.report import Report, stop_if_asked
from foundation.tokenizer import Tokenizer

BATCH_CHARS = 1 << 18  # encoded at once


def count(base: TokenizerJson, files: Sequence[Path], work: Path, report: Report) -> Counter[int]:
    """Id -> how often the files' documents use it. Goes on after the last file that was finished in `work`."""
    backend, kept = base.backend(), work / "uses.json"
    state = read_json(kept) or {"files": 0, "uses": {}}
    uses = Counter({int(i): times for i, times in state["uses"].items()})
    for done in range(state["files"], len(files)):
        for batch in _batches(documents([files[done]])):
            stop_if_asked(report)
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                uses.update(encoding.ids)
        work.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"files": done + 1, "uses": uses})
        report.progress(done + 1, len(files), "file")
    return uses


def closed(base: TokenizerJson, tokens: Iterable[str]) -> set[str]:
    """`tokens` with what their merges make on the way, and all atoms."""
    ranks: dict[Pair, int] = {}
    for rank, pair in enumerate(base.merges):
        ranks.setdefault(pair, rank)
    kept = set(base.atoms)
    for token in tokens:
        kept.add(token)
        symbols = list(token)
        if token in base.atoms or BYTE_TOKEN.fullmatch(token):
            continue
        made = settle(symbols, ranks, by_pair)
        if symbols == [token]:
            kept.update(made)
    return kept


def frame(folder: Path) -> list[str]:
    """What the chat template of `folder` writes around contents; nothing where there is no template.

    No corpus holds it, and every conversation does: without these tokens a turn costs many more.
    """
    tokenizer = Tokenizer(folder)
    if tokenizer.chat_template is None:
        return []
    try:
        chat = Chat(tokenizer)
    except ModelError:
        return []
    turn: list[Message] = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]
    texts = []
    for messages in (turn[:1], turn, [{"role": "system", "content": "0"}, *turn]):
        try:
            texts.append(chat.render(messages, prompt=len(messages) == 1))
        except ModelError:  # not every template takes a system message
            continue
    return texts


def frame_words(folder: Path) -> list[str]:
    """The words of the frame, and the roles, as they stand alone and after a space."""
    words = dict.fromkeys([*ROLES, *(word for text in frame(folder) for word in text.split())])
    return [text for word in words for text in (word, f" {word}")]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

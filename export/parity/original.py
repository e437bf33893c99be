"""What the original model says, once, for all files that are compared with it: the only part that needs torch.

`record` runs in a child process and leaves in its folder

    texts.jsonl       texts and their ids by transformers' tokenizer, see tokenisation.py
    ids.json          added tokens and special ids
    windows.json      token ids: `sample`, on which a file is held to the original, and `holdout`, real text
    sample-000.f32    logits of each window, float32 [T, V]; of the holdout (holdout-000.f32) those of the
                      scored positions alone

The reference is eager attention in float32 on the CPU. A holdout window is cut and scored as llama.cpp's
perplexity tool does it, so that figures can be laid beside those of others: neighbouring pieces of
HOLDOUT_WINDOW tokens, the first token giving its place to the beginning token where the tokenizer puts one;
only the second half is scored, where every token has half a window before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from export.parity import adversarial
from export.parity.divergence import log_softmax, perplexity
from export.parity.tokenisation import added_tokens, expected_ids, expected_texts
from foundation.dataio import documents, write_jsonl
from foundation.errors import ModelError
from foundation.files import check_space, read_json, write_json, writing
from foundation.model import load, quiet_transformers
from foundation.report import Report, stop_if_asked
from foundation.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

HOLDOUT_WINDOW = 512  # tokens; llama.cpp's default too
SHORTEST = 16  # tokens of a text below which nothing is measured on it
BLOCK_ROWS = 64  # rows that are read from the disk at once: 64 MiB where V is 262,144


class Sampled(Protocol):
    """What `sample_ids` reads of the settings."""

    @property
    def tokens(self) -> int: ...

    @property
    def seed(self) -> int: ...


class Amounts(NamedTuple):
    """How much is recorded; the names are those of export.verify's settings."""

    lines: int
    tokens: int
    holdout_tokens: int
    seed: int


def record(
    folder: str, texts: list[str], work: str, context: int, amounts: dict[str, int], report: Report
) -> dict[str, Any]:
    """Write the files above into `work`, in a child process. `context`: the longest window that every file
    takes. A window that is there already is not computed again.

    Returns vocab (V) and holdout, the original's perplexity, or None without texts. Raises ModelError for a
    model that transformers can not load, RunError when there is no space on the disk.
    """
    place, source = Path(work), Path(folder)
    shape = ModelShape.from_folder(source)
    shape = replace(shape, context=min(context, shape.context))
    windows = read_json(place / "windows.json")
    if windows is None:
        windows = _prepare(source, [Path(path) for path in texts], place, shape, Amounts(**amounts))
    if texts and not windows["holdout"]:
        report.note("the texts are too short, or holdout_tokens is too low, to measure perplexity on them")
    todo = [(logits_file(place, group, i), window, first_row(group, window))
            for group in ("sample", "holdout") for i, window in enumerate(windows[group])]  # fmt: skip
    missing = [entry for entry in todo if not entry[0].is_file()]
    logits = sum(len(window) - first for _, window, first in missing) * shape.vocab
    check_space(place, 4 * logits, "free some for the original's logits, or lower tokens and holdout_tokens")
    original = load_original(source) if missing else None
    for done, (path, window, first) in enumerate(missing, len(todo) - len(missing)):
        stop_if_asked(report)
        report.progress(done, len(todo), "window")
        _write(path, original_logits(original, window, first))
    report.progress(len(todo), len(todo), "window")
    return {"vocab": shape.vocab, "holdout": _perplexity(place, windows["holdout"], shape.vocab)}


def _prepare(
    folder: Path, texts: Sequence[Path], work: Path, shape: ModelShape, amounts: Amounts
) -> dict[str, list[list[int]]]:
    """All that the tokenizer says; windows.json is written last."""
    tokenizer = load_tokenizer(folder)
    lines = list(islice(documents(texts), amounts.lines)) if texts else []
    with writing(work):
        write_jsonl(work / "texts.jsonl", expected_texts(tokenizer, lines, amounts.seed))
    write_json(work / "ids.json", {"added": added_tokens(tokenizer), **expected_ids(tokenizer, folder)})
    windows = {
        "sample": sample_ids(tokenizer, lines, amounts, shape),
        "holdout": holdout_ids(tokenizer, texts, amounts.holdout_tokens, shape.context),
    }
    write_json(work / "windows.json", windows)
    return windows


def sample_ids(tokenizer: Any, lines: Sequence[str], settings: Sampled, shape: ModelShape) -> list[list[int]]:
    """Windows of token ids to compare logits on: real text first, then seeded random ids.  # [[T], ..]

    At least `settings.tokens` positions lie past the longest sliding window: in one window of the model's
    context, or in as many as it takes.
    """
    import numpy as np

    slide = max((w for w in shape.windows if w and w < shape.context), default=0)
    length = min(shape.context, settings.tokens + slide)
    count = -(-settings.tokens // (length - slide))
    ids: list[int] = []
    for text in (*lines, *adversarial.TEXTS):
        if len(ids) >= count * length // 2:
            break
        ids += tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: count * length // 2]  # rare tokens come only by chance: half of the sample is random
    draw = np.random.default_rng(settings.seed)
    ids += draw.integers(0, len(tokenizer), count * length - len(ids)).tolist()
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def holdout_ids(tokenizer: Any, texts: Sequence[Path], tokens: int, context: int) -> list[list[int]]:
    """Windows of real text, as many from each of the files as from another, `tokens` in all.  # [[T], ..]

    The documents of a file are joined by line ends and tokenised as one. A file with less text than a
    window gives one that is shorter; one of less than SHORTEST tokens gives none.
    """
    length = max(1, min(HOLDOUT_WINDOW, context, tokens))
    shares = [tokens // length // len(texts) + (i < tokens // length % len(texts)) for i in range(len(texts))]
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    windows: list[list[int]] = []
    for path, share in zip(texts, shares, strict=True):
        ids = tokenizer.encode("\n".join(_enough(tokenizer, path, share * length)))
        count = min(share, max(1, len(ids) // length))
        for start in range(0, count * length, length):
            window = ids[start : start + length]
            if len(window) >= SHORTEST:
                windows.append([tokenizer.bos_token_id, *window[1:]] if begins else window)
    return windows


def _enough(tokenizer: Any, path: Path, tokens: int) -> Iterator[str]:
    """Documents of a file until they make `tokens` tokens."""
    found = 0
    for text in documents([path]):
        if found >= tokens:
            return
        found += len(tokenizer.encode(text, add_special_tokens=False))
        yield text


def first_row(group: str, window: Sequence[int]) -> int:
    """The first position whose logits are kept; of the holdout the second half is scored."""
    return len(window) // 2 if group == "holdout" else 0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer.json of a model folder as transformers takes it. Raises ModelError.

    Not by AutoTokenizer: some of its classes put their own normalizer in the place of the file's.
    """
    try:
        tokenizers = quiet_transformers().PreTrainedTokenizerFast
        return tokenizers.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a bad folder makes transformers and tokenizers raise anything
        raise ModelError(f"{folder}: transformers can not load its tokenizer: {error}") from error


def load_original(folder: Path) -> Any:
    """The model as the reference computes it: safetensors alone, float32, CPU, eager attention."""
    original = load(folder).cpu()
    original.set_attn_implementation("eager")
    return original


def original_logits(original: Any, window: Sequence[int], first: int = 0) -> np.ndarray:
    """Next-token logits from position `first` on. Raises ModelError when they are no numbers.  # [T, V]"""
    import numpy as np
    import torch

    with torch.no_grad():
        out = original(torch.tensor([list(window)]), logits_to_keep=len(window) - first, use_cache=False)
    logits: np.ndarray = out.logits[0].float().numpy()  # [T, V]
    if not np.isfinite(logits).all():
        raise ModelError(
            "the original's own logits are infinite or undefined", hint="its training diverged; mend it first"
        )
    return logits


def logits_file(work: Path, group: str, number: int) -> Path:
    """Where the logits of a window lie."""
    return work / f"{group}-{number:03}.f32"


def stored_logits(path: Path, vocab: int) -> Iterator[np.ndarray]:
    """The rows of such a file, a block in memory at a time: a mapped file would count as memory.  # [V]"""
    import numpy as np

    with path.open("rb") as file:
        while len(block := np.fromfile(file, np.float32, BLOCK_ROWS * vocab)):
            yield from block.reshape(-1, vocab)


def _write(path: Path, logits: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with writing(path):
        logits.tofile(partial)
        partial.replace(path)


def _perplexity(work: Path, windows: Sequence[Sequence[int]], vocab: int) -> dict[str, float] | None:
    """The original's own, from its stored logits; None without a holdout."""
    nll = []
    for i, window in enumerate(windows):
        rows = stored_logits(logits_file(work, "holdout", i), vocab)
        for row, token in zip(rows, following("holdout", window), strict=False):
            nll.append(-float(log_softmax(row)[token]))
    return {"tokens": len(nll), **perplexity(nll)} if nll else None


def following(group: str, window: Sequence[int]) -> list[int | None]:
    """What is compared of a window: for each position its next token, which the sample, half random, has not.

    The last position of a holdout window is left out, for its next token is not in it.
    """
    return [*window[first_row(group, window) + 1 :]] if group == "holdout" else [None] * len(window)

"""One GGUF file against the original: tokenisation, special ids, logits, held-out text.

`compare_file` runs in a child process of its own, for llama.cpp ends its process on a failed assertion. It
reads what original.py left on the disk and needs neither torch nor transformers. llama.cpp computes on the
CPU, with flash attention off and its KV memory in float32, as the original does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.parity.divergence import Comparison
from export.parity.original import (
    first_row,
    following,
    load_original,
    logits_file,
    original_logits,
    stored_logits,
)
from export.parity.tokenisation import check_ids, check_texts
from foundation.errors import ModelError
from foundation.files import read_json
from foundation.llama import LlamaContext, LlamaModel
from foundation.report import Report, stop_if_asked


def compare_file(path: str, work: str, vocab: int, report: Report) -> dict[str, Any]:
    """tokenisation, ids, logits and holdout (None without) of the file `path`, against what lies in `work`.

    Raises ModelError when llama.cpp refuses the file, it has not V tokens, or its logits are no numbers.
    """
    place = Path(work)
    windows, expected = read_json(place / "windows.json"), read_json(place / "ids.json")
    with LlamaModel(path) as model:
        if model.vocab_size != vocab:
            raise ModelError(f"it has {model.vocab_size} tokens, the model {vocab}")
        with (place / "texts.jsonl").open(encoding="utf-8") as lines:
            tokenisation = check_texts(map(json.loads, lines), expected["added"], model)
        ids = check_ids(expected, model)
        longest = max(map(len, (*windows["sample"], *windows["holdout"])))
        with model.context(longest, cache="f32") as context:
            sample = _over("sample", windows, place, context, report)
            holdout = _over("holdout", windows, place, context, report)
    return {
        "tokenisation": tokenisation,
        "ids": ids,
        "logits": sample.agreement(),
        "holdout": holdout.likelihood() if windows["holdout"] else None,
    }


def _over(
    group: str, windows: dict[str, list[list[int]]], work: Path, context: LlamaContext, report: Report
) -> Comparison:
    """All windows of a group; the sample comes first."""
    found = Comparison()
    before = 0 if group == "sample" else len(windows["sample"])
    for number, window in enumerate(windows[group]):
        stop_if_asked(report)
        stored = stored_logits(logits_file(work, group, number), context.model.vocab_size)
        computed = context.logit_rows(window, first_row(group, window))
        pairs = zip(stored, computed, strict=True)
        for (wanted, got), token in zip(pairs, following(group, window), strict=False):
            found.add(wanted, got, token)
        report.progress(before + number + 1, sum(map(len, windows.values())), "window")
    return found


def compare_logits(folder: Path, model: LlamaModel, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The comparison of logits alone, in this process and on any windows; see Comparison.agreement."""
    original, found = load_original(folder), Comparison()
    with model.context(max(map(len, windows)), cache="f32") as context:
        for window in windows:
            pairs = zip(original_logits(original, window), context.logit_rows(window), strict=True)
            for wanted, got in pairs:
                found.add(wanted, got)
    return found.agreement()

"""The share of valid training programmes that a model writes for profiles it never saw.

Answers are generated greedily through llama.cpp, from the file that will be served, with the template inside
it; the world's validator judges them. No model judges a model here.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.world.validate import Profile, load_profiles, validate
from foundation.chat import ChatTemplate
from foundation.errors import ModelError
from foundation.llama import LlamaModel

if TYPE_CHECKING:
    from foundation.report import Report

ANSWER_TOKENS = 128  # about twice the longest valid answer: one that runs on is broken anyway
SLOTS = 16


def valid_programmes(gguf: Path, profiles: Path, report: Report, limit: int) -> dict[str, Any]:
    """Judge the answers of `gguf` to the first `limit` profiles of each language.

    Returns, for each language: share (of 1), standard error, count, and how often each rule was broken;
    `mean` is the mean of the languages' shares. `sample` is the first prompt with its answer.
    """
    records = _first_of_each(load_profiles(profiles), limit)
    with LlamaModel(gguf) as model:
        template = ChatTemplate(model.metadata("tokenizer.chat_template"), gguf.name)
        prompts = [template.encode(record["messages"], model, prompt=True) for record in records]
        tokens = max(map(len, prompts)) + ANSWER_TOKENS
        if tokens > model.trained_context:
            raise ModelError(
                f"{gguf}: {tokens} tokens are needed for the longest prompt and its answer; "
                f"the model's context has {model.trained_context}"
            )
        with model.context(tokens, slots=SLOTS) as context:
            answers = context.generate_many(
                prompts, ANSWER_TOKENS, on_done=lambda done, total: report.progress(done, total, "answer")
            )
        texts = [model.detokenize(ids, special=False) for ids in answers]
    result: dict[str, Any] = {}
    for language in sorted({record["language"] for record in records}):
        verdicts = [
            validate(text, Profile.from_dict(record["profile"]), language)
            for record, text in zip(records, texts, strict=True)
            if record["language"] == language
        ]
        share = sum(v.valid for v in verdicts) / len(verdicts)
        result[language] = {
            "share": share,
            "standard_error": math.sqrt(share * (1 - share) / len(verdicts)),
            "count": len(verdicts),
            "broken": dict(sorted(Counter(rule for v in verdicts for rule in v.broken).items())),
        }
    result["mean"] = sum(part["share"] for part in result.values()) / len(result)
    result["sample"] = {"prompt": records[-1]["messages"][-1]["content"], "text": texts[-1]}
    return result


def _first_of_each(records: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    taken: Counter[str] = Counter()
    kept = []
    for record in records:
        if taken[record["language"]] < limit:
            taken[record["language"]] += 1
            kept.append(record)
    return kept

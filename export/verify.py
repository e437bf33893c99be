"""Stage export.verify: proof that a GGUF file computes, tokenises and stops like the model it came from.

Three comparisons, each with a gate; any that fails stops the run, after verify.json is written:

    logits        KL(transformers || llama.cpp) and top-1 agreement, f32 on both sides, eager attention
    tokenisation  ids of real lines, chunks, adversarial and random texts, added tokens, rendered chats
    ids           beginning and end tokens, and that every token ending the original ends the copy

The default gates are those of an F32 file: sound exports measured KL 1e-11 to 1e-7, and each known fault
(unpermuted Q/K, missing norm + 1, ignored window) more than 0.03. A quantised file needs its own limits;
its tokenisation must still be equal. Windows reach past every sliding window where the context allows.

Known differences are counted apart, as `known`: llama.cpp composes no letters (NFC), so such texts are
given to it composed; its tokenizer for single characters treats blank texts its own way; and where merges
tie in long runs of spaces it follows SentencePiece, from which `tokenizers` differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from export import adversarial, ggufs
from foundation.chat import ChatTemplate
from foundation.dataio import documents
from foundation.errors import ModelError
from foundation.files import read_json, write_json
from foundation.llama import LlamaModel
from foundation.model import load
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.shape import ModelShape
from foundation.stage import Figures, Inputs, many, one

if TYPE_CHECKING:
    import numpy as np

SOME_DAY = datetime(2024, 7, 26)  # for templates that write the date; any day tokenises alike on both sides
FUZZ_TEXTS = 1500
DECODED_LINES = 500
CHUNKS, CHUNK_LINES = 200, 8
LONG_GAP = re.compile(" {12,}")
PAST_WINDOW = 64  # tokens that a comparison goes beyond a sliding window
CONVERSATION = [
    {"role": "user", "content": "Привет! What is 2+2?"},
    {"role": "assistant", "content": "Четыре.\n\nThat's four 🙂"},
    {"role": "user", "content": "Спасибо  <b>"},
]


class Settings(StageSettings):
    """Settings of export.verify."""

    tokens: int = Field(500, ge=16, description="tokens whose logits are compared")
    lines: int = Field(10_000, ge=0, description="lines of role `texts` whose tokenisation is compared")
    max_kl: float = Field(1e-6, gt=0, description="allowed mean KL divergence, nats per token")
    min_top1: float = Field(1.0, ge=0, le=1, description="required share of tokens with the same best guess")


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Compare role `gguf` with role `model`; write verify.json. Raises ModelError when a gate fails."""
    folder, path = one(inputs, "model"), ggufs.find(one(inputs, "gguf"))
    lines = list(islice(documents(many(inputs, "texts")), settings.lines)) if many(inputs, "texts") else []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    with LlamaModel(path) as model:
        tokenisation = compare_texts(tokenizer, model, lines, settings.seed)
        report.progress(1, 2, "comparison")
        stop_if_asked(report)
        ids = compare_ids(tokenizer, model, folder)
        sample = sample_ids(tokenizer, lines, settings, ModelShape.from_folder(folder))
        logits = compare_logits(folder, model, sample)
        report.progress(2, 2, "comparison", kl=logits["kl_mean"], top1=logits["top1"])
    failures = _failures(settings, logits, tokenisation, ids)
    result = {
        "gguf": {"quantisation": ggufs.quantisation(path), "size_bytes": path.stat().st_size},
        "gates": {"max_kl": settings.max_kl, "min_top1": settings.min_top1, "tokenisation": "all equal"},
        "logits": logits,
        "tokenisation": tokenisation,
        "ids": ids,
        "passed": not failures,
        "failures": failures,
    }
    write_json(out / "verify.json", result)
    if failures:
        raise ModelError(
            f"{path.name} is not the model it came from: " + "; ".join(failures),
            hint="verify.json holds examples; a quantised file needs its own max_kl and min_top1",
        )
    return {
        "kl_mean": logits["kl_mean"],
        "kl_max": logits["kl_max"],
        "top1": logits["top1"],
        "texts_equal": sum(group["equal"] for group in tokenisation.values()),
    }


def sample_ids(tokenizer: Any, lines: Sequence[str], settings: Settings, shape: ModelShape) -> list[list[int]]:
    """Windows of token ids to compare logits on: real text first, then seeded random ids.  # [[T], ..]"""
    import numpy as np

    past = max((w + PAST_WINDOW for w in shape.windows if w), default=0)
    length = min(shape.context, max(settings.tokens, past))
    count = -(-settings.tokens // length)
    ids: list[int] = []
    for text in (*lines, *adversarial.TEXTS):
        if len(ids) >= count * length // 2:
            break
        ids += tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: count * length // 2]  # rare tokens come only by chance: half of the sample is random
    draw = np.random.default_rng(settings.seed)
    ids += draw.integers(0, len(tokenizer), count * length - len(ids)).tolist()
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def compare_logits(folder: Path, model: LlamaModel, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """KL divergence and top-1 agreement over all positions of all windows."""
    import numpy as np
    import torch

    original = load(folder).cpu()  # safetensors alone, in float32
    original.set_attn_implementation("eager")
    divergences, agreements = [], []
    with model.context(max(map(len, windows)), cache="f32") as context:
        for window in windows:
            with torch.no_grad():
                wanted = original(torch.tensor([list(window)])).logits[0].float().numpy()  # [T, V]
            got = context.logits(window)  # [T, V]
            divergences.append(divergence(wanted, got))
            agreements.append(wanted.argmax(-1) == got.argmax(-1))
    kl, top1 = np.concatenate(divergences), np.concatenate(agreements)  # [T]
    return {
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float(top1.mean()),
    }


def divergence(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(softmax(wanted) || softmax(got)) of each row, in float64.  # [T, V], [T, V] -> [T]"""
    import numpy as np

    out = np.empty(len(wanted))
    for t, (p, q) in enumerate(zip(wanted, got, strict=True)):  # row by row: V may be 262,144
        log_p, log_q = (x.astype(np.float64) - x.max() for x in (p, q))
        log_p -= np.log(np.exp(log_p).sum())
        log_q -= np.log(np.exp(log_q).sum())
        out[t] = (np.exp(log_p) * (log_p - log_q)).sum()
    return out


def compare_texts(tokenizer: Any, model: LlamaModel, lines: Sequence[str], seed: int) -> dict[str, Any]:
    """Equality of ids by group of texts, and of decoded text; the first differing text of each is kept."""
    added = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    chunks = ["\n".join(lines[i : i + CHUNK_LINES]) for i in range(0, len(lines), CHUNK_LINES)][:CHUNKS]
    groups: dict[str, Iterable[str]] = {
        "lines": lines,
        "chunks": chunks,
        "adversarial": adversarial.TEXTS,
        "added_tokens": adversarial.in_context(added),
        "fuzz": adversarial.fuzz(seed, FUZZ_TEXTS),
        "chat": _rendered(tokenizer),
    }
    known = _KnownDifferences(tokenizer, model, added)
    out = {name: _compare_ids(tokenizer, model, texts, known) for name, texts in groups.items()}
    out["decoded"] = _compare_decoding(tokenizer, model, [*lines[:DECODED_LINES], *adversarial.TEXTS])
    return out


def _compare_ids(
    tokenizer: Any, model: LlamaModel, texts: Iterable[str], known: _KnownDifferences
) -> dict[str, Any]:
    """How many texts give the same ids, and how many differ only as they are known to."""
    group: dict[str, Any] = {"equal": 0, "known": 0, "different": 0}
    for text in texts:
        wanted = tokenizer.encode(text, add_special_tokens=False)
        got = model.tokenize(text)
        if wanted == got:
            group["equal"] += 1
        elif known.explains(text, wanted, got):
            group["known"] += 1
        else:
            group["different"] += 1
            group.setdefault("example", {"text": text[:200], "wanted": wanted[:40], "got": got[:40]})
    return group


def _compare_decoding(tokenizer: Any, model: LlamaModel, texts: Iterable[str]) -> dict[str, Any]:
    """How many texts come back from the model's pieces as they do from the tokenizer's own decoder."""
    group: dict[str, Any] = {"equal": 0, "known": 0, "different": 0}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        wanted = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        got = model.detokenize(ids)
        if got in (wanted, " " + wanted):  # the space that was put before the text
            group["equal"] += 1
        else:
            group["different"] += 1
            group.setdefault("example", {"text": text[:200], "wanted": wanted[:200], "got": got[:200]})
    return group


class _KnownDifferences:
    """The differences that no export can avoid; anything else is a fault."""

    def __init__(self, tokenizer: Any, model: LlamaModel, added: Sequence[str]) -> None:
        self._model = model
        self._kind = model.metadata("tokenizer.ggml.model")
        normalizer = tokenizer.backend_tokenizer.normalizer
        self._compose = normalizer if type(normalizer).__name__ == "NFC" else None
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")

    def explains(self, text: str, wanted: list[int], got: list[int]) -> bool:
        if self._compose is not None:  # decomposed letters: equal once they are composed beforehand
            return self._model.tokenize(self._compose.normalize_str(text)) == wanted
        if self._kind == "t5":  # no space is put before a piece of text that is nothing but spaces
            return any(piece and not piece.strip(" ") for piece in self._added.split(text))
        if self._kind == "llama" and LONG_GAP.search(text):  # sides cut a run of spaces elsewhere, as
            return self._model.detokenize(wanted) == self._model.detokenize(got)  # SentencePiece does too
        return False


def _rendered(tokenizer: Any) -> list[str]:
    """A conversation through the chat template, if there is one: finished, and awaiting an answer."""
    if not isinstance(tokenizer.chat_template, str):
        return []
    names = tokenizer.special_tokens_map
    template = ChatTemplate(tokenizer.chat_template, "chat template", names, now=lambda: SOME_DAY)
    return [template.render(CONVERSATION, prompt=True), template.render(CONVERSATION[:2], prompt=False)]


def compare_ids(tokenizer: Any, model: LlamaModel, folder: Path) -> dict[str, Any]:
    """Special ids of both sides, and the names of those that disagree."""
    listed = (read_json(folder / "generation_config.json") or {}).get("eos_token_id")
    ends = {i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)}
    ends |= {tokenizer.eos_token_id} - {None}
    pairs = {
        "rows": (ModelShape.from_folder(folder).vocab, model.vocab_size),
        "eos": (tokenizer.eos_token_id, model.eos if tokenizer.eos_token_id is not None else None),
        "bos": (tokenizer.bos_token_id, model.bos if tokenizer.bos_token_id is not None else None),
        "text_with_specials": (tokenizer.encode("a b"), model.tokenize("a b", add_special=True)),
        "chat_template": (tokenizer.chat_template, model.metadata("tokenizer.chat_template")),
        "ends_missing": ([], sorted(ends - model.eog)),
    }
    return {
        "bos": model.bos,
        "eos": model.eos,
        "ends": sorted(model.eog),
        "different": sorted(name for name, (wanted, got) in pairs.items() if wanted != got),
    }


def _failures(
    settings: Settings, logits: dict[str, Any], tokenisation: dict[str, Any], ids: dict[str, Any]
) -> list[str]:
    """What was wrong, in words."""
    out = []
    if not logits["kl_mean"] <= settings.max_kl:
        out.append(f"mean KL {logits['kl_mean']:.3g}, allowed {settings.max_kl:g}")
    if logits["top1"] < settings.min_top1:
        out.append(f"top-1 agreement {logits['top1']:.4f}, required {settings.min_top1:g}")
    for name, group in tokenisation.items():
        if group["different"]:
            out.append(
                f"{group['different']} texts of {name} tokenised otherwise, as {group['example']['text']!r}"
            )
    if ids["different"]:
        out.append(f"different {', '.join(ids['different'])}")
    return out

"""Stage export.verify: proof that GGUF files compute, tokenise and stop like the model they came from.

Every file is held against transformers in a process of its own (comparison.py), the original being computed
once for all (original.py). What must hold for each: its texts are tokenised alike, its special ids are the
same, and its logits lie within the gate of its type. What is measured besides: perplexity and KL on held-out
text, from which the smallest file worth serving is named (recommend.py).

Gates are for unquantised files, on a sample that reaches past every sliding window. F32: sound exports measured
mean KL 1e-12 to 2e-7 with every best token the same but for ties (divergence.py); each known fault (unpermuted
Q/K, missing norm + 1, ignored window) more than 0.03. llama.cpp multiplies in the file's type, so F16 and BF16
round every activation: random models with sharp attention and trained ones, 3 to 24 layers, measured
5e-7 to 1e-4 and top-1 .989 at worst (F16), 3e-5 to 6e-3 and .907 (BF16); Llama 3 8B in llama.cpp's own table
3e-5 and .997. A quantised file has no gate unless the settings give its type one.

A file on which llama.cpp ends its process has failed; the others are compared all the same. Any failure stops
the run, after verify.json and verify.md are written. Results are kept file by file, so a stop costs one file.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from export import ggufs
from export.parity.comparison import compare_logits as compare_logits  # "as": offered from here too
from export.parity.divergence import divergence as divergence
from export.parity.original import Amounts
from export.parity.original import sample_ids as sample_ids
from export.parity.recommend import page, recommended
from export.parity.tokenisation import compare_ids as compare_ids
from export.parity.tokenisation import compare_texts as compare_texts
from foundation import gguf_header
from foundation.child import in_child
from foundation.errors import InputError, ModelError
from foundation.files import read_json, stamps, write_atomic, write_json
from foundation.report import Report, stop_if_asked
from foundation.settings import StageSettings
from foundation.stage import Figures, Inputs, many, one


class Gate(NamedTuple):
    """What the logits of a file must reach."""

    max_kl: float  # mean, nats
    min_top1: float  # share of positions; ties count as the same


GATES = {"F32": Gate(1e-6, 1.0), "F16": Gate(1e-3, 0.98), "BF16": Gate(2e-2, 0.9)}
NO_GATE = Gate(float("inf"), 0.0)


class Settings(StageSettings):
    """Settings of export.verify."""

    tokens: int = Field(
        1000, ge=16, description="positions past the longest sliding window whose logits are compared"
    )
    lines: int = Field(10_000, ge=0, description="lines of role `texts` whose tokenisation is compared")
    holdout_tokens: int = Field(
        8192, ge=0, description="tokens of role `texts` for perplexity and KL, half of them scored; 0: neither"
    )
    max_kl: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="allowed mean KL from transformers by type, as { Q8_0 = 0.01 }, nats per token"
    )
    min_top1: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="required share of positions with the same best token by type, as { Q8_0 = 0.95 }"
    )
    recommend_kl: float = Field(
        0.05, gt=0, description="mean KL on held-out text that the recommended file may have, nats per token"
    )


@dataclass(frozen=True)
class File:
    """One GGUF file; of a model in shards the first, sizes those of all."""

    path: Path
    label: str
    quantisation: str
    size_bytes: int
    bits_per_weight: float
    context: int  # tokens


def run(settings: Settings, inputs: Inputs, out: Path, report: Report) -> Figures:
    """Compare every file of role `gguf` (files, or folders of them) with role `model`; write verify.json and
    verify.md. Role `texts` is optional.

    Raises ModelError naming the files that failed, InputError for settings that fit no file.
    """
    folder, texts = one(inputs, "model"), many(inputs, "texts")
    files = list_files(many(inputs, "gguf"))
    gates = {file.quantisation: _gate(settings, file.quantisation) for file in files}
    _check_types(settings, gates)
    shards = [shard for file in files for shard in gguf_header.shards(file.path)]
    work = _work(out, settings, [folder, *texts, *shards])
    amounts = Amounts(settings.lines, settings.tokens, settings.holdout_tokens, settings.seed)
    arguments = {
        "folder": str(folder),
        "texts": [str(path) for path in texts],
        "work": str(work),
        "context": min(file.context for file in files),
        "amounts": amounts._asdict(),
    }
    parts = [_Part(report, number, len(files) + 1) for number in range(len(files) + 1)]
    original = _kept(work / "original.json", "export.parity.original:record", arguments, parts[0])
    rows = []
    for number, file in enumerate(files):
        stop_if_asked(report)
        place = work / f"file-{number:03}.json"
        rows.append(_judged(file, gates[file.quantisation], place, original["vocab"], parts[number + 1]))
    failures = [f"{row['file']}: {'; '.join(row['failures'])}" for row in rows if not row["passed"]]
    result = {
        "files": rows,
        "original": original["holdout"],
        "recommended": recommended(rows, settings.recommend_kl),
        "recommend_kl": settings.recommend_kl,
        "gates": {kind: _told(gate) for kind, gate in gates.items()},
        "passed": not failures,
    }
    write_json(out / "verify.json", result)
    write_atomic(out / "verify.md", page(result))
    if failures:
        raise ModelError(
            "not the model it came from: " + " | ".join(failures),
            hint="verify.json and verify.md hold the figures, and examples of texts",
        )
    return _figures(result)


def list_files(paths: Sequence[Path]) -> list[File]:
    """The GGUF files at `paths`, those of folders by name. Raises InputError for none, ModelError."""
    found = [file for path in paths for file in (gguf_header.files(path) if path.is_dir() else [path])]
    if not found:
        raise InputError(
            f"{', '.join(map(str, paths))}: no GGUF file",
            hint="read the gguf of export.gguf or export.quantize",
        )
    return [_described(path, label) for path, label in zip(found, _labels(found), strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The names of the files, with as many folders before them as it takes to tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise InputError(f"the same GGUF file is given twice: {paths[0]}", hint="name each file once in `gguf`")


def _described(path: Path, label: str) -> File:
    keys, _ = gguf_header.read(path)
    context = keys.get(f"{keys.get('general.architecture')}.context_length")
    if type(context) is not int:
        raise ModelError(f"{path} names no context length", hint="export it again")
    return File(
        path=path,
        label=label,
        quantisation=ggufs.quantisation(path),
        size_bytes=sum(shard.stat().st_size for shard in gguf_header.shards(path)),
        bits_per_weight=round(ggufs.bits_per_weight(ggufs.tensors(path)), 3),
        context=context,
    )


def _gate(settings: Settings, kind: str) -> Gate:
    usual = GATES.get(kind, NO_GATE)
    return Gate(settings.max_kl.get(kind, usual.max_kl), settings.min_top1.get(kind, usual.min_top1))


def _told(gate: Gate) -> dict[str, float] | None:
    """A gate as JSON, which has no infinity; None for no gate."""
    limits = {} if gate.max_kl == NO_GATE.max_kl else {"max_kl": gate.max_kl}
    limits |= {} if gate.min_top1 == NO_GATE.min_top1 else {"min_top1": gate.min_top1}
    return limits or None


def _check_types(settings: Settings, gates: Mapping[str, Gate]) -> None:
    """Raise InputError for a limit that no file would be held to."""
    if others := sorted({*settings.max_kl, *settings.min_top1} - set(gates)):
        raise InputError(
            f"max_kl and min_top1 name {', '.join(others)}; the files are {', '.join(gates)}",
            hint="limits are given by type, as max_kl = { Q8_0 = 0.01 }",
        )


def _work(out: Path, settings: Settings, paths: Sequence[Path]) -> Path:
    """The folder of results so far, emptied where they are of other files or settings."""
    work = out / ".work" / "verify"
    asked = {"settings": settings.model_dump(mode="json"), "files": [stamps(path) for path in paths]}
    if read_json(work / "asked.json") != asked:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(work / "asked.json", asked)
    return work


def _kept(path: Path, function: str, arguments: Mapping[str, Any], report: Report) -> Any:
    """What a child answers, from the disk where it has answered already."""
    value = read_json(path)
    if value is None:
        value = in_child(function, arguments, report)
        write_json(path, value)
    return value


def _judged(file: File, gate: Gate, place: Path, vocab: int, report: Report) -> dict[str, Any]:
    """A file's entry in verify.json; what was found is kept at `place`."""
    entry: dict[str, Any] = {
        "file": file.label,
        "quantisation": file.quantisation,
        "size_bytes": file.size_bytes,
        "bits_per_weight": file.bits_per_weight,
        "gate": _told(gate),
    }
    arguments = {"path": str(file.path), "work": str(place.parent), "vocab": vocab}
    try:
        found = _kept(place, "export.parity.comparison:compare_file", arguments, report)
        failures = faults(found, gate)
    except ModelError as error:
        found, failures = dict.fromkeys(("logits", "tokenisation", "ids", "holdout")), [error.message]
    if found["logits"]:
        report.note(
            f"{file.label}: mean KL {found['logits']['kl_mean']:.3g}, top-1 {found['logits']['top1']:.4f}"
        )
    return {**entry, **found, "passed": not failures, "failures": failures}


class _Part:
    """The report of one of `parts` children, which all go through the same windows."""

    def __init__(self, report: Report, number: int, parts: int) -> None:
        self._report, self._number, self._parts = report, number, parts

    def progress(self, done: int, total: int, unit: str = "step", **figures: float) -> None:
        self._report.progress(self._number * total + done, self._parts * total, unit, **figures)

    def note(self, text: str) -> None:
        self._report.note(text)

    def checkpoint_requested(self) -> bool:
        return self._report.checkpoint_requested()

    def stop_requested(self) -> bool:
        return self._report.stop_requested()


def faults(found: Mapping[str, Any], gate: Gate) -> list[str]:
    """What is wrong with a file, in words."""
    out, logits = [], found["logits"]
    if not logits["kl_mean"] <= gate.max_kl:
        out.append(f"mean KL {logits['kl_mean']:.3g}, allowed {gate.max_kl:g}")
    if logits["top1"] + logits["ties"] / logits["tokens"] < gate.min_top1:
        out.append(f"top-1 agreement {logits['top1']:.4f} ({logits['ties']} ties), required {gate.min_top1:g}")
    for name, group in found["tokenisation"].items():
        if group["different"]:
            example = group["example"]["text"]
            out.append(f"{group['different']} texts of {name} tokenised otherwise, as {example!r}")
    if found["ids"]["different"]:
        out.append(f"different {', '.join(found['ids']['different'])}")
    return out


def _figures(result: Mapping[str, Any]) -> Figures:
    """Of the first unquantised file, or else the first."""
    files = result["files"]
    first = next((file for file in files if file["quantisation"] in GATES), files[0])
    return {
        "files": len(files),
        "kl_mean": first["logits"]["kl_mean"],
        "kl_max": first["logits"]["kl_max"],
        "top1": first["logits"]["top1"],
        "texts_equal": sum(group["equal"] for group in first["tokenisation"].values()),
        **({"recommended": result["recommended"]} if result["recommended"] else {}),
    }

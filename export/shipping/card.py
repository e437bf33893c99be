"""The model card, README.md, and the note on licences.

Everything is made from figures that other steps measured and from what the files say of themselves. No figure,
no sentence about it. Texts from outside stay texts: they can not become a heading, a link or a key of the head.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.about import About
from export.fits import ASSUMED_CUDA_CONTEXT_BYTES, MIB, MOST_SLOTS, fits
from export.fits import memory as memory_of
from export.shipping.frontmatter import head
from foundation.markdown import inline, table
from foundation.shape import ModelShape

CARD_BYTES = 6 * 2**30  # the small consumer card that the memory line speaks of
CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)  # tokens, of the memory table


@dataclass(frozen=True)
class Quantised:
    """One GGUF file of the bundle. `path` is the file to open, `parts` are all its shards."""

    path: str  # inside the bundle, as are parts
    parts: tuple[str, ...]
    source: str  # what the file was called where it came from: reports speak of it by that name
    type: str
    size_bytes: int
    bits_per_weight: float
    gpu_bytes: int


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter of the bundle."""

    path: str
    name: str
    rank: int
    size_bytes: int


@dataclass(frozen=True)
class Facts:
    """What the card speaks of."""

    about: About
    shape: ModelShape
    files: Sequence[Quantised]
    adapters: Sequence[Adapter]
    serve: Quantised
    why: str
    verify: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any] | None
    commands: Mapping[str, Sequence[str]]
    licences: Sequence[str]  # names of the files in LICENSES/
    template: bool


def choose(
    files: Sequence[Quantised], reports: Sequence[Mapping[str, Any]], *, small: bool
) -> tuple[Quantised, str]:
    """The file to serve, and why: what verification recommends, else Q8_0 for small models and Q4_K_M for
    others, else the smallest there is.
    """
    missing = ""
    for report in reports:
        name = report.get("recommended")
        row = next((row for row in _rows([report]) if row.get("file") == name), None)
        for file in files:
            if row is not None and _is_of(row, file):
                return (
                    file,
                    f"the smallest within a mean KL of {report['recommend_kl']:g} nats on held-out text",
                )
        missing = f"; verification recommends {name}, which is not in this bundle" if name else missing
    best = "Q8_0" if small else "Q4_K_M"
    served = min(files, key=lambda file: (file.type != best, file.size_bytes))
    size = "a small model" if small else "a model of this size"
    why = f"{best} for {size}, by rule" if served.type == best else "the smallest there is"
    return served, why + missing


def readme(facts: Facts) -> str:
    """The model card, Markdown with the head that the Hugging Face hub reads."""
    about, shape = facts.about, facts.shape
    sections: dict[str, list[str]] = {
        "Files": _files(facts),
        "Quality of each file": list(_quality(facts)),
        "Data": _data(facts),
        "Recipe": list(_recipe(facts)),
        "Scores": _scores(facts.scores),
        "Memory": _memory(facts),
        "Use": _use(facts),
        "Licence": _licence(facts),
        "Sources": _sources(about),
    }
    parts = [
        *head(about),
        f"# {inline(about.name)}",
        "",
        *([inline(about.description), ""] if about.description else []),
        f"A {shape.model_type} model of {shape.parameters():,} parameters: {shape.layers} layers, hidden size "
        f"{shape.hidden}, vocabulary {shape.vocab:,}, context {shape.context:,} tokens. Made with Samovar.",
        "",
    ]
    for title, lines in sections.items():
        if lines:
            parts += [f"## {title}", "", *lines, ""]
    return "\n".join(parts)


def licences(facts: Facts) -> str:
    """The note that stands in LICENSES/."""
    about = facts.about
    name = " ".join(
        part for part in (about.license or "not stated", about.license_name, about.license_link) if part
    )
    lines = [
        f"Weights of {about.name}: {name}.",
        "They were made with Samovar (Apache-2.0), which claims no right in what it makes.",
        "The GGUF files follow llama.cpp's format and were quantised by it (MIT, The ggml authors);",
        "no part of llama.cpp is in this folder.",
    ]
    if facts.licences:
        lines += ["", "What lay beside the original model:", *(f"- {name}" for name in facts.licences)]
    return "\n".join(lines) + "\n"


def memory(facts: Facts) -> list[dict[str, Any]]:
    """How many conversations of the model's whole context each file serves on CARD_BYTES, 0 if none fits."""
    rows = []
    for file in facts.files:
        found = fits(facts.shape, file.gpu_bytes, CARD_BYTES, facts.shape.context)
        rows.append(
            {"file": file.path, "context_tokens": facts.shape.context, "slots": found.slots if found else 0}
        )
    return rows


def memory_by_context(facts: Facts) -> list[dict[str, Any]]:
    """Bytes on the card of one conversation, for each file and several contexts."""
    contexts = [*(tokens for tokens in CONTEXTS if tokens < facts.shape.context), facts.shape.context]
    return [
        {
            "file": file.path,
            "context_tokens": tokens,
            "bytes": memory_of(facts.shape, file.gpu_bytes, tokens).total_bytes,
        }
        for file in facts.files
        for tokens in contexts
    ]


def _files(facts: Facts) -> list[str]:
    rows = [
        (file.path if len(file.parts) == 1 else f"{file.path} and {len(file.parts) - 1} more", file.type,
         f"{file.size_bytes / MIB:.1f}", f"{file.bits_per_weight:.2f}")
        for file in facts.files
    ]  # fmt: skip
    lines = [table(("file", "type", "MiB", "bits per weight"), rows, left=2), ""]
    lines.append(f"`{facts.serve.path}` is the one to serve: {inline(facts.why)}.")
    lines.append("`hf/` holds the checkpoint for other engines and for training on.")
    if facts.adapters:
        loras = [(lora.path, str(lora.rank), f"{lora.size_bytes / MIB:.1f}") for lora in facts.adapters]
        lines += ["", "LoRA adapters of this model:", "", table(("adapter", "rank", "MiB"), loras, left=1)]
    return lines


def _quality(facts: Facts) -> Iterator[str]:
    """What verification measured of each file against transformers."""
    rows = _rows(facts.verify)
    if not rows:
        return
    held = any(row.get("holdout") for row in rows)
    columns = ["type", "positions", "mean KL", "same best token", "texts tokenised alike", "otherwise"]
    columns += ["perplexity", "mean KL on held-out text"] * held
    cells = [[row["quantisation"], *_measured(row), *(_held(row) if held else ())] for row in rows]
    yield table(columns, cells, left=1)
    yield ""
    yield "Each file is compared with transformers in float32 on the same inputs; KL in nats, 0 is equal."
    for report in facts.verify:
        if original := report.get("original"):
            yield (
                f"Perplexity is of {original['tokens']:,} tokens of held-out text, on which the original has "
                f"{original['perplexity']:.4g}; on other text it is another."
            )
    gone = [row["quantisation"] for row in rows if not any(_is_of(row, file) for file in facts.files)]
    if gone:
        yield f"Not in this bundle: {', '.join(gone)}."
    unknown = [file.type for file in facts.files if not any(_is_of(row, file) for row in rows)]
    if unknown:
        yield f"Not measured: {', '.join(unknown)}."


def _measured(row: Mapping[str, Any]) -> list[str]:
    """Logits on the sample, and texts."""
    logits, groups = row["logits"], row["tokenisation"].values()
    return [
        f"{logits['tokens']:,}",
        f"{logits['kl_mean']:.2g}",
        f"{100 * logits['top1']:.1f} %",
        f"{sum(group['equal'] for group in groups):,}",
        f"{sum(group['known'] + group['different'] for group in groups):,}",
    ]


def _held(row: Mapping[str, Any]) -> list[str]:
    """Perplexity and KL on held-out text, with one standard error."""
    if not (held := row.get("holdout")):
        return ["", ""]
    return [f"{held[key]:{form}} ± {held[error]:.1g}" for key, error, form in
            (("perplexity", "perplexity_error", ".4g"), ("kl_mean", "kl_error", ".3g"))]  # fmt: skip


def _data(facts: Facts) -> list[str]:
    lines = [f"- {inline(name)}" for name in facts.about.datasets]
    if facts.recipe and facts.recipe["inputs"]:
        lines += [f"- {inline(name)}: {inline(str(value))}" for name, value in facts.recipe["inputs"].items()]
    return lines


def _recipe(facts: Facts) -> Iterator[str]:
    """The recipe's own words. Only what was written is said: other settings are Samovar's defaults."""
    recipe = facts.recipe
    if recipe is None:
        return
    told = f": {inline(recipe['description'])}" if recipe["description"] else ""
    yield f"`samovar run` of the recipe {inline(recipe['name'])}{told}. What is not named is at its default."
    yield ""
    yield table(
        ("stage", "kind", "reads", "settings"),
        [
            (
                stage["name"],
                stage["kind"],
                ", ".join(str(name) for names in stage["reads"].values() for name in names),
                ", ".join(
                    f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in stage["settings"].items()
                ),
            )
            for stage in recipe["stages"]
        ],
        left=4,
    )


def _memory(facts: Facts) -> list[str]:
    rows, slots = memory_by_context(facts), memory(facts)
    contexts = list(dict.fromkeys(row["context_tokens"] for row in rows))
    size = {(row["file"], row["context_tokens"]): f"{row['bytes'] / MIB:.0f}" for row in rows}
    cells = [[file.path, *(size[file.path, tokens] for tokens in contexts)] for file in facts.files]
    return [
        "MiB on the card for one conversation, by its context in tokens:",
        "",
        table(["file", *(f"{tokens:,}" for tokens in contexts)], cells, left=1),
        "",
        table(
            ("file", f"conversations of {facts.shape.context:,} tokens on a {CARD_BYTES // 2**30} GiB card"),
            [(row["file"], _slots(row["slots"])) for row in slots],
            left=1,
        ),
        "",
        "Estimated: weights and conversation memory are exact, "
        f"{ASSUMED_CUDA_CONTEXT_BYTES // MIB} MiB for the CUDA context are assumed.",
    ]


def _use(facts: Facts) -> list[str]:
    lines = ["In this folder:", "", "```", *(shlex.join(line) for line in facts.commands.values()), "```"]
    if facts.adapters:
        names = ", ".join(f"Modelfile.{lora.name}" for lora in facts.adapters)
        lines += ["", "llama-server loads the adapters and applies none: a request names the one it wants in "
                  f"its `lora` field, by number from 0. Ollama: {names}."]  # fmt: skip
    if not facts.template:
        lines += ["", "The model has no chat template: it goes on from a text, and does not answer."]
    return lines


def _licence(facts: Facts) -> list[str]:
    about = facts.about
    if not about.license:
        return ["Not stated. See LICENSES/ for what came with the model it was made from."]
    name = about.license_name or about.license
    link = f" ({inline(about.license_link)})" if about.license_link else ""
    return [
        f"The weights: {inline(name)}{link}. See LICENSES/ for what came with the model they were made from."
    ]


def _sources(about: About) -> list[str]:
    return [f"- made from {inline(name)}" for name in about.base_models]


def _slots(slots: int) -> str:
    """256 is where the search ends: llama.cpp has no more sequences in one context."""
    return {0: "does not fit", MOST_SLOTS: f"{MOST_SLOTS} or more"}.get(slots, str(slots))


def _rows(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The files that reports of export.verify speak of."""
    return [row for report in reports for row in report.get("files", [])]


def _is_of(row: Mapping[str, Any], file: Quantised) -> bool:
    """Whether a verified file is this one: same name where it came from, same type, same size."""
    name = str(row.get("file")).rpartition("/")[2]
    return (name, row.get("quantisation"), row.get("size_bytes")) == (file.source, file.type, file.size_bytes)


def _scores(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """One column a score, one row a measure; what was broken how often stays in bundle.json."""
    if not scores:
        return []
    flat = [dict(_flat(score)) for score in scores]
    measures = sorted({name for values in flat for name in values if ".broken." not in name})
    labels = [str(score.get("label", number)) for number, score in enumerate(scores, 1)]
    rows = [[name, *(values.get(name, "") for values in flat)] for name in measures]
    return [table(("measure", *labels), rows, left=1)]


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number in a nested table, under its dotted path."""
    for key in sorted(scores):
        value, path = scores[key], f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, f"{value:.4g}" if isinstance(value, float) else str(value)

"""The words that ship with a model: its card, the file for Ollama, the note on licences.

Everything is made from figures that other steps measured. No figure, no sentence about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.fits import MIB, MOST_SLOTS, fits
from foundation.chat import ChatTemplate
from foundation.dataio import Message
from foundation.errors import ModelError
from foundation.shape import ModelShape

CARD_BYTES = 6 * 2**30  # the small consumer card that the memory line speaks of
PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a b"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "x"},
    ],
)


@dataclass(frozen=True)
class Quantised:
    """One GGUF file of the bundle."""

    path: str  # inside the bundle
    type: str
    size_bytes: int
    bits_per_weight: float
    gpu_bytes: int


@dataclass(frozen=True)
class Facts:
    """What the card speaks of."""

    name: str
    license: str
    languages: Sequence[str]
    shape: ModelShape
    files: Sequence[Quantised]
    serve: Quantised
    verify: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]


def readme(facts: Facts) -> str:
    """The model card, Markdown with the header that the Hugging Face hub reads."""
    shape = facts.shape
    parts = [
        "---",
        f"license: {facts.license.lower()}",
        "language:",
        *(f"- {language}" for language in facts.languages),
        "pipeline_tag: text-generation",
        "tags:",
        "- gguf",
        "- samovar",
        "---",
        "",
        f"# {facts.name}",
        "",
        f"A {shape.model_type} model of {shape.parameters():,} parameters: {shape.layers} layers, hidden size "
        f"{shape.hidden}, vocabulary {shape.vocab:,}, context {shape.context:,} tokens. Made with Samovar.",
        "",
        "## Files",
        "",
        *_table(
            ("file", "type", "MiB", "bits per weight"),
            ((f.path, f.type, f"{f.size_bytes / MIB:.1f}", f"{f.bits_per_weight:.2f}") for f in facts.files),
        ),
        "",
        f"`{facts.serve.path}` is the one to serve. `hf/` holds the checkpoint for other engines and training.",
        "",
        "## Memory",
        "",
        *_table(
            ("file", f"conversations of {shape.context:,} tokens on a 6 GiB card"),
            ((row["file"], _slots(row["slots"])) for row in memory(facts)),
        ),
        "",
        "Estimated: weights and conversation memory are exact, 555 MiB for the CUDA context are assumed.",
        "",
    ]
    if facts.verify:
        parts += ["## Compared with the original", ""]
        header = ("type", "tokens", "mean KL", "same best token", "texts tokenised equally", "otherwise")
        parts += [*_table(header, map(_verified, facts.verify)), ""]
    if facts.scores:
        parts += ["## Scores", ""]
        parts += [*_scores(facts.scores), ""]
    parts += [
        "## Use",
        "",
        "```",
        "samovar chat .",
        f"llama-cli -m {facts.serve.path}",
        f"ollama create {facts.name.lower()} -f Modelfile",
        "```",
        "",
        "## Licence",
        "",
        f"The weights: {facts.license}. See LICENSES/ for what came with the model they were made from.",
        "",
    ]
    return "\n".join(parts)


def modelfile(facts: Facts, template: str | None, stops: Sequence[str]) -> str:
    """Ollama's description. Ollama has its own template language: ChatML is translated, others are not."""
    lines = [f"FROM ./{facts.serve.path}", f"PARAMETER num_ctx {facts.shape.context}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    if template is None:
        lines += ['TEMPLATE """{{ .Prompt }}"""']
    elif (gap := chatml_gap(template)) is not None:
        turn = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" + gap
        lines += [f'TEMPLATE """{{{{ range .Messages }}}}{turn}{{{{ end }}}}<|im_start|>assistant\n"""']
    else:
        lines += [
            "# The chat template is in chat_template.jinja; Ollama needs it in its own language as TEMPLATE."
        ]
    return "\n".join(lines) + "\n"


def chatml_gap(template: str) -> str | None:
    """What a ChatML template puts between turns: a line end, or nothing. None when it is not ChatML."""
    for gap in ("\n", ""):
        try:
            rendered = ChatTemplate(template, "chat template").render
            if all(
                rendered(p, prompt=prompt) == _chatml(p, gap, prompt)
                for p in PROBES
                for prompt in (True, False)
            ):
                return gap
        except ModelError:
            return None
    return None


def _chatml(messages: Sequence[Message], gap: str, prompt: bool) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>{gap}" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if prompt else "")


def licences(facts: Facts, copied: Sequence[str]) -> str:
    """The note that stands in LICENSES/."""
    lines = [
        f"Weights of {facts.name}: {facts.license}.",
        "They were made with Samovar (Apache-2.0), which claims no right in what it makes.",
        "The GGUF files follow llama.cpp's format and were quantised by it (MIT, The ggml authors);",
        "no part of llama.cpp is in this folder.",
    ]
    if copied:
        lines += ["", "What lay beside the original model:", *(f"- {name}" for name in copied)]
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


def _slots(slots: int) -> str:
    """256 is where the search ends: llama.cpp has no more sequences in one context."""
    return {0: "does not fit", MOST_SLOTS: f"{MOST_SLOTS} or more"}.get(slots, str(slots))


def _verified(report: Mapping[str, Any]) -> tuple[str, ...]:
    groups = report["tokenisation"].values()
    return (
        report["gguf"]["quantisation"],
        str(report["logits"]["tokens"]),
        f"{report['logits']['kl_mean']:.2g}",
        f"{100 * report['logits']['top1']:.1f} %",
        str(sum(group["equal"] for group in groups)),
        str(sum(group["known"] + group["different"] for group in groups)),
    )


def _scores(scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One column a score, one row a measure; what was broken how often stays in bundle.json."""
    flat = [dict(_flat(score)) for score in scores]
    measures = sorted({name for values in flat for name in values if ".broken." not in name})
    labels = [str(score.get("label", number)) for number, score in enumerate(scores, 1)]
    rows = ([name, *(values.get(name, "") for values in flat)] for name in measures)
    yield from _table(("measure", *labels), rows)


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number in a nested table, under its dotted path."""
    for key in sorted(scores):
        value, path = scores[key], f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"

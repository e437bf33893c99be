"""Which file to take: the smallest that stays within a stated KL, and the page that shows why.

The limit by default, 0.05 nats, lies in a gap of what is known. llama.cpp's own table for Llama 3 8B
(tools/perplexity/README.md) has Q8_0 at .001, Q6_K .005, Q5_K_M .011, Q4_K_M .031, Q4_K_S .043, then Q4_0 at
.072 and Q3_K_M at .102: within it perplexity rises by at most 5 %, and nine of ten best tokens stay. A small
model pays more for the same type, which is why the file itself is measured and no type is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foundation.markdown import inline, table

MIB = 2**20
HEAD = (
    "file", "type", "MiB", "bits per weight", "perplexity", "to the original's", "KL, nats", "largest KL",
    "top-1", "holds",
)  # fmt: skip
LOGITS_HEAD = (
    "file",
    "positions",
    "mean KL",
    "largest KL",
    "top-1",
    "ties",
    "top-5",
    "largest difference",
    "gate",
)
TEXTS_HEAD = ("file", "equal texts", "known to differ", "different", "special ids that differ")


def recommended(files: Sequence[Mapping[str, Any]], limit: float) -> str | None:
    """Name of the smallest file that passed and whose mean KL on the holdout is at most `limit`.

    An unquantised file is as good as the original, so it is the answer where no other is; None where there
    is none, or no held-out text to measure on.
    """
    good = [
        file for file in files if file["passed"] and file["holdout"] and file["holdout"]["kl_mean"] <= limit
    ]
    return min(good, key=lambda file: file["size_bytes"])["file"] if good else None


def page(result: Mapping[str, Any]) -> str:
    """verify.md."""
    files = result["files"]
    parts = ["# GGUF files against their model", "", table(HEAD, [_row(file) for file in files], left=2), ""]
    parts += [_advice(result), ""]
    if original := result["original"]:
        own = _with_error(original, "perplexity", ".4g")
        parts += [
            f"The original's perplexity is {own}. Perplexity, KL and top-1 are of {original['tokens']:,} "
            "tokens of held-out text, in the second halves of windows as llama.cpp's own tool cuts them; ± is "
            "one standard error. KL is that of the file from transformers' float32 logits; top-1 is the share "
            "of positions where both hold the same token for the best.",
            "",
        ]
    parts += ["## Logits on a sample half text, half random tokens, past every sliding window", ""]
    parts += [table(LOGITS_HEAD, [_logits(file) for file in files if file.get("logits")], left=1), ""]
    parts += ["## Tokenisation", ""]
    parts += [table(TEXTS_HEAD, [_tokenisation(file) for file in files if file.get("logits")], left=1), ""]
    if failed := [file for file in files if not file["passed"]]:
        parts += ["## Failures", ""]
        parts += [f"- {inline(file['file'])}: {inline('; '.join(file['failures']))}" for file in failed]
        parts += [""]
    return "\n".join(parts)


def _advice(result: Mapping[str, Any]) -> str:
    limit = f"{result['recommend_kl']:g} nats"
    if result["recommended"]:
        return f"Take {inline(result['recommended'])}: the smallest file whose mean KL is at most {limit}."
    if not result["original"]:
        return "No file is recommended: there was no held-out text to measure on."
    return f"No file that passed has a mean KL of at most {limit}."


def _row(file: Mapping[str, Any]) -> tuple[str, ...]:
    first = (
        file["file"],
        file["quantisation"],
        f"{file['size_bytes'] / MIB:.1f}",
        f"{file['bits_per_weight']:.2f}",
    )
    held, verdict = file["holdout"], "yes" if file["passed"] else "no"
    if not held:
        return (*first, "", "", "", "", "", verdict)
    return (
        *first,
        _with_error(held, "perplexity", ".4g"),
        f"{100 * (held['ratio'] - 1):+.2f} ± {100 * held['ratio_error']:.2f} %",
        f"{held['kl_mean']:.3g} ± {held['kl_error']:.1g}",
        f"{held['kl_max']:.2g}",
        f"{100 * held['top1']:.2f} %",
        verdict,
    )


def _with_error(figures: Mapping[str, Any], name: str, form: str) -> str:
    return f"{figures[name]:{form}} ± {figures[f'{name}_error']:.2g}"


def _logits(file: Mapping[str, Any]) -> tuple[str, ...]:
    found, gate = file["logits"], file["gate"]
    return (
        file["file"],
        f"{found['tokens']:,}",
        f"{found['kl_mean']:.2g}",
        f"{found['kl_max']:.2g}",
        f"{100 * found['top1']:.2f} %",
        str(found["ties"]),
        f"{100 * found['top5']:.2f} %",
        f"{found['max_abs']:.2g}",
        ", ".join(f"{name} {value:g}" for name, value in gate.items()) if gate else "measured only",
    )


def _tokenisation(file: Mapping[str, Any]) -> tuple[str, ...]:
    groups = file["tokenisation"].values()
    counts = (f"{sum(group[name] for group in groups):,}" for name in ("equal", "known", "different"))
    return (file["file"], *counts, ", ".join(file["ids"]["different"]) or "none")

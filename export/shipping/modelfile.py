"""The Modelfile, by which Ollama takes a bundle's file over.

Ollama has a template language of its own, Go's text/template. What a chat template writes is described by
turns.py and written in that language; a template that it can not describe is not translated, and the
file says so: Ollama then goes by its own matching of the template in the GGUF file.

Ollama's own defaults are not the model's (it repeats less and samples always), so every sampling parameter
that is known is written. A value is quoted so that no content can end it: what can not be quoted is left out
and named, since a line after a quote's end would be an instruction.

Source: Ollama's documentation of the Modelfile: instructions, parameters with their types, template variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.shipping.turns import Turns

# our key in generation.json -> Ollama's, and how its value is written
PARAMETERS = {
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repeat_penalty", float),
    "max_new_tokens": ("num_predict", int),
}
NOT_TRANSLATED = """\
# The chat template is not one that Samovar can write in Ollama's language. Without a TEMPLATE line Ollama
# compares the template in the GGUF file with those it knows, and takes the nearest or none: check what
# `ollama show --modelfile` then says against chat_template.jinja."""
TRIMS = "# The original also removes white space around each text; Ollama's language can not."
NO_SYSTEM = "# The original refuses a system text; Ollama leaves it out."
SPLIT = """\
# This file is the first of several. An Ollama that takes single files only needs them joined before:
# llama-gguf-split --merge FIRST JOINED.gguf, and FROM the joined one."""
TRIPLE = '"' * 3


@dataclass(frozen=True)
class Served:
    """What the Modelfile speaks of. `path` and `adapter` are paths inside the bundle."""

    path: str
    context_tokens: int
    generation: Mapping[str, Any]  # as generation.json
    license: str
    split: bool = False
    adapter: str = ""


def modelfile(served: Served, turns: Turns | None, has_template: bool, bos: str = "") -> str:
    """The whole file. `bos`: the token that the engine puts first because the GGUF file tells it to."""
    lines = [SPLIT] if served.split else []
    lines.append(f"FROM ./{served.path}")
    if served.adapter:
        lines.append(f"ADAPTER ./{served.adapter}")
    lines += [f"PARAMETER num_ctx {served.context_tokens}", *_sampling(served.generation)]
    for stop in served.generation.get("stop", []):
        text = quoted(stop) if "\n" not in stop else None
        lines.append(
            f"PARAMETER stop {text}" if text else f"# {stop!a} ends an answer too, and can not be written here"
        )
    lines += _template(turns, has_template, bos)
    if served.license and (text := quoted(served.license)):
        lines.append(f"LICENSE {text}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str | None:
    """`text` in quotes that it can not end; None for one that has quotes or controls of its own.

    One line takes single quotes, several take triple ones; in neither can a quotation mark be escaped.
    """
    if not text or any(ord(c) < 32 and c not in "\n\t" for c in text) or "\x7f" in text:
        return None
    if TRIPLE in text or text.startswith('"') or text.endswith('"'):
        return None
    return f'"{text}"' if '"' not in text and "\n" not in text else f"{TRIPLE}{text}{TRIPLE}"


def go_template(turns: Turns) -> str | None:
    """The conversation in Go's text/template; None when a text of it would read as an action there."""
    texts = (turns.start, turns.default, turns.ask, *turns.user, *turns.answer, *turns.system)
    if any("{{" in text or text.endswith("{") for text in texts):
        return None
    every = _every_role(turns)
    if every:
        before, after = every
        body = f"{{{{ range .Messages }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}"
        return turns.start + body + turns.ask
    head = turns.start
    if turns.place == "turn":
        own = f"{{{{ if .System }}}}{turns.system[0]}{{{{ .System }}}}{turns.system[1]}"
        head += own + (f"{{{{ else }}}}{turns.default}" if turns.default else "") + "{{ end }}"
    folded = ""
    if turns.place in ("first", "last"):
        # The system message is the first of .Messages too, so the user's first stands behind it.
        where = "(eq $i 1)" if turns.place == "first" else "(eq (len (slice $.Messages $i)) 1)"
        inside = f"{turns.system[0]}{{{{ $.System }}}}{turns.system[1]}"
        folded = f"{{{{ if and $.System {where} }}}}{inside}{{{{ end }}}}"
    return (
        head
        + "{{ range $i, $_ := .Messages }}"
        + f'{{{{ if eq .Role "user" }}}}{turns.user[0]}{folded}{{{{ .Content }}}}{turns.user[1]}'
        + f'{{{{ else if eq .Role "assistant" }}}}{turns.answer[0]}{{{{ .Content }}}}{turns.answer[1]}'
        + "{{ end }}{{ end }}"
        + turns.ask
    )


def _template(turns: Turns | None, has_template: bool, bos: str) -> list[str]:
    if not has_template:
        return [
            "# The model has no chat template: it goes on from a text.",
            f"TEMPLATE {quoted('{{ .Prompt }}')}",
        ]
    bare = turns.without_bos(bos) if turns and bos else turns
    text = bare and go_template(bare)
    text = text and quoted(text)
    if not bare or not text:
        return [NOT_TRANSLATED]
    notes = [TRIMS] * bare.trims + [NO_SYSTEM] * (bare.place == "nowhere")
    return [*notes, f"TEMPLATE {text}"]


def _every_role(turns: Turns) -> tuple[str, str] | None:
    """Before and after a text, with the role as a variable, where all roles are written alike (ChatML)."""
    left, found, right = turns.user[0].partition("user")
    alike = (
        found
        and turns.place == "turn"
        and not turns.default
        and turns.answer[0] == f"{left}assistant{right}"
        and turns.system[0] == f"{left}system{right}"
        and turns.user[1] == turns.answer[1] == turns.system[1]
    )
    return (f"{left}{{{{ .Role }}}}{right}", turns.user[1]) if alike else None


def _sampling(generation: Mapping[str, Any]) -> Sequence[str]:
    """Ollama punishes repeating by default, which the model's makers did not ask for."""
    values = {"repetition_penalty": 1.0, **generation}
    return [
        f"PARAMETER {name} {kind(values[key])}" for key, (name, kind) in PARAMETERS.items() if key in values
    ]

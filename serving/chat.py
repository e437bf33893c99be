"""`samovar chat`: talk to an exported model in the terminal, offline, token by token."""

from __future__ import annotations

import io
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from foundation import gguf_header
from foundation.chat import ChatTemplate
from foundation.dataio import Message
from foundation.errors import InputError, ModelError, SamovarError
from foundation.llama import LlamaContext, LlamaModel, Sampling

CONTEXT_TOKENS = 4096  # enough for a talk; a real model's whole context would take gigabytes of KV cache
QUIT = ("/quit", "/exit", "/q")


def main(bundle: Path, prompt: str | None, *, max_new_tokens: int = 256, temperature: float = 0.0) -> int:
    """Answer `prompt` and return, or read prompts from the terminal until /quit or the end of input."""
    path = gguf_of(bundle)
    sampling = Sampling(temperature=temperature) if temperature else None
    with LlamaModel(path) as model:
        template = ChatTemplate(model.metadata("tokenizer.chat_template"), path.name, now=datetime.now)
        with model.context(min(CONTEXT_TOKENS, model.trained_context)) as context:
            if prompt is not None:
                _answer(context, template, [{"role": "user", "content": prompt}], max_new_tokens, sampling)
                return 0
            print(f"{path.name}, context {context.tokens} tokens; /clear forgets, /quit ends")
            _talk(context, template, max_new_tokens, sampling)
    return 0


def gguf_of(bundle: Path) -> Path:
    """The file that a bundle serves: the one bundle.json recommends, else the smallest; or a GGUF file itself.

    Raises InputError when there is none.
    """
    if bundle.is_file():
        return bundle
    # A run, or the stage that made the bundle, stands for the bundle inside it.
    inside = (bundle, bundle / "bundle", bundle / "bundle" / "bundle")
    bundle = next((folder for folder in inside if (folder / "bundle.json").is_file()), bundle)
    listing = bundle / "bundle.json"
    if listing.is_file():
        served = _served(listing)
        if served is not None:
            return served
    files = sorted(gguf_header.files(bundle / "gguf"), key=lambda path: (path.stat().st_size, path.name))
    if not files:
        raise InputError(
            f"{bundle}: no bundle and no GGUF file", hint="give a run, a bundle folder, or a .gguf file"
        )
    return files[0]


def _served(listing: Path) -> Path | None:
    """The file that bundle.json names, or None where it names none inside the bundle."""
    hint = "make the bundle again"
    try:
        index = json.loads(listing.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{listing}: not JSON", hint=hint) from None
    if not isinstance(index, dict):
        raise InputError(f"{listing}: a {type(index).__name__}; a JSON object is needed", hint=hint)
    served = index.get("serve")
    if not isinstance(served, str):
        return None
    path = listing.parent / served
    try:
        # A bundle may come from anybody: its listing may name a file inside it, and nothing else.
        if not path.resolve().is_relative_to(listing.parent.resolve()):
            return None
        missing = not path.is_file()
    except (ValueError, OSError, RuntimeError):  # a name that no file can have, a circle of links
        missing = True
    if missing:
        raise InputError(f"{listing}: it serves {served[:80]!r}, which is no file", hint=hint)
    return path


def _talk(context: LlamaContext, template: ChatTemplate, max_new_tokens: int, sampling: Any) -> None:
    messages: list[Message] = []
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte is refused with its line, not the talk
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in QUIT:
            return
        if said == "/clear":
            messages = []
        elif said:
            messages.append({"role": "user", "content": said})
            try:
                text = _answer(context, template, messages, max_new_tokens, sampling)
            except KeyboardInterrupt:
                print(" [stopped]")
                messages.pop()
                continue
            except SamovarError as error:  # this prompt can not be answered; the next one may be
                print(error)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": text})


def _answer(
    context: LlamaContext, template: ChatTemplate, messages: list[Message], max_new_tokens: int, sampling: Any
) -> str:
    """Print the answer as it comes, and return it; the oldest turns are dropped when the context is full."""
    model = context.model
    kept = list(messages)
    while True:
        ids = template.encode(kept, model, prompt=True)
        room = context.tokens - len(ids)
        if room >= min(max_new_tokens, context.tokens // 4):
            break
        if len(kept) == 1:
            raise ModelError(
                f"the prompt has {len(ids)} tokens; the context has {context.tokens}",
                hint="shorten the prompt",
            )
        kept = kept[2:]
    pieces = []
    for piece in context.generate_stream(ids, min(max_new_tokens, room), sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    print()
    return "".join(pieces)

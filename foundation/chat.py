"""Conversations to token ids: templates rendered in a sandbox, and the mask of the response tokens.

A chat template is a program that came with a model: it runs in jinja's immutable sandbox, sees only
messages, and is stopped when it works or writes too much. It renders what transformers would render, with
two exceptions: nothing in it is random, and only a caller that gives a clock lets it tell the date.

Contents are text from outside. Where one spells a special token, as in "what is <|im_end|>?", the spelling
stays text: it is put aside before the template is rendered, and encoded as plain text (`Quoted`).

Prompt and answer are encoded apart and then joined, because that is what happens when the model is used:
the prompt is encoded first, and the answer's tokens follow it one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import NamedTuple, Protocol

from foundation.dataio import Message
from foundation.errors import InputError, ModelError
from foundation.sandbox import MAX_CHARS, budget, environment
from foundation.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IGNORED = -100  # the label of a token that no loss counts; torch's cross_entropy ignores it by default
_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # characters without a meaning


class Encoded(NamedTuple):
    """One conversation: ids [T], labels [T] (IGNORED, or the id itself where the assistant speaks)."""

    ids: list[int]
    labels: list[int]


class Encoder(Protocol):
    """What turns text into ids: a Tokenizer, or a LlamaModel."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Spelling -> id of the control tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are plain characters."""

    def encode_marked(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are parsed."""


class Quoted:
    """Messages in whose contents each spelling of a special token is replaced by a sentinel.

    A sentinel is a number between two characters of private use that no content holds. `messages` are for
    the template; `ids` encodes what it rendered, or a piece of that. Conversations without such a spelling
    are not changed at all.
    """

    def __init__(self, messages: list[Message], encoder: Encoder) -> None:
        self._encoder = encoder
        self.messages = messages
        self._spellings: dict[str, str] = {}
        text = "\n".join(message["content"] for message in messages)
        found = sorted((s for s in encoder.special_tokens if s and s in text), key=lambda s: (-len(s), s))
        if not found:
            return
        mark = next((chr(code) for code in _PRIVATE if chr(code) not in text), None)
        if mark is None:
            raise InputError("a conversation holds every character of private use and a special token")
        sentinels = {spelling: f"{mark}{number}{mark}" for number, spelling in enumerate(found)}
        self._spellings = {sentinel: spelling for spelling, sentinel in sentinels.items()}
        special = re.compile("|".join(map(re.escape, found)))
        self.messages = [
            {**message, "content": special.sub(lambda m: sentinels[m[0]], message["content"])}
            for message in messages
        ]

    def ids(self, text: str) -> list[int]:
        """Ids of rendered text. Raises InputError when a spelling can not be written as plain text."""
        if not self._spellings:
            return self._encoder.encode_marked(text)
        out: list[int] = []
        for part in re.split("(" + "|".join(self._spellings) + ")", text):
            spelling = self._spellings.get(part)
            if spelling is None:
                out += self._encoder.encode_marked(part) if part else []
                continue
            plain = self._encoder.encode(spelling)
            if not set(plain).isdisjoint(self._encoder.special_tokens.values()):
                raise InputError(
                    f"a message spells {spelling!r}, which this vocabulary can write only as a control token",
                    hint="leave that spelling out of the message",
                )
            out += plain
        return out


class ChatTemplate:
    """A jinja chat template, compiled once. `origin` names it in errors; `names` are its bos_token and such.

    `now` is the clock behind strftime_now. Without one the function is not defined: templates that ask
    whether it is take their fixed date, and others are refused, since bytes would depend on the day.
    """

    def __init__(
        self,
        source: str | None,
        origin: str,
        names: Mapping[str, str] | None = None,
        *,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        from jinja2 import TemplateSyntaxError

        if source is None:
            raise ModelError(
                f"{origin}: no chat template",
                hint="an instruction-tuned model has chat_template.jinja; a base model can not chat",
            )
        try:
            self._template = environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(f"{origin}: chat template, line {error.lineno}: {error.message}") from None
        except Exception as error:  # too deep for the parser, too long a number, not Python at last, ..
            raise ModelError(f"{origin}: the chat template can not be compiled: {_said(error)}") from None
        self._origin, self._names = origin, dict(names or {})
        if now is not None:
            self._names["strftime_now"] = lambda form: now().strftime(form)  # type: ignore[assignment]

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """The text of `messages`; with `prompt`, ready for the assistant to speak.

        Raises ModelError when the template fails, reaches for what the sandbox forbids, does not end, or
        writes nothing or too much.
        """
        pieces, length = [], 0
        budget.start()
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=prompt, **self._names
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARS:
                    raise ValueError(f"it writes more than {MAX_CHARS} characters")
        except Exception as error:  # a program of somebody else's: it may raise anything
            hint = ""
            if "'strftime_now' is undefined" in str(error):
                hint = "it writes today's date, so the bytes of this step would depend on the day; fix the date"
            raise ModelError(f"{self._origin}: the chat template failed: {_said(error)}", hint=hint) from None
        if prompt and not length:
            raise ModelError(f"{self._origin}: the chat template renders nothing")
        return "".join(pieces)

    def encode(self, messages: list[Message], encoder: Encoder, *, prompt: bool) -> list[int]:
        """Ids of `messages`: control tokens come from the template alone, never from a content.

        Raises ModelError as `render` does, and InputError as `Quoted.ids` does.
        """
        quoted = Quoted(messages, encoder)
        return quoted.ids(self.render(quoted.messages, prompt=prompt))


class Chat:
    """The chat template of a tokenizer: conversations to ids and labels."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        named = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in tokenizer.config.items()
            if key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        names = {key: value for key, value in named.items() if isinstance(value, str) and value}
        self._template = ChatTemplate(tokenizer.chat_template, str(tokenizer.folder), names)
        self.render = self._template.render
        self._tokenizer = tokenizer

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation that awaits the assistant's answer."""
        return self._template.encode(messages, self._tokenizer, prompt=True)

    def encode(self, messages: list[Message]) -> Encoded:
        """Ids and labels of a whole conversation; the labels stand on the assistant's tokens only.

        The token that ends an answer is part of it; white space after that token is not. Raises ModelError
        when the template writes earlier turns differently once later ones are there (then no span of the
        text is the answer to what came before it), or leaves no token to learn.
        """
        quoted = Quoted(messages, self._tokenizer)
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(quoted.messages[:position], prompt=True)
            after = self.render(quoted.messages[: position + 1], prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise ModelError(
                    f"{self._tokenizer.folder}: the chat template changes earlier turns when later ones come",
                    hint="train on single-turn conversations, or use a template that only appends",
                )
            answer = after[len(before) :].rstrip()
            prompt_ids = quoted.ids(before[len(done) :])
            answer_ids = quoted.ids(answer)
            ids += prompt_ids + answer_ids
            labels += [IGNORED] * len(prompt_ids) + answer_ids
            done = before + answer
        if all(label == IGNORED for label in labels[1:]):  # the first token is nobody's prediction
            raise ModelError(
                f"{self._tokenizer.folder}: the chat template leaves no token of an answer to learn",
                hint="it must write the assistant's content after the generation prompt",
            )
        return Encoded(ids, labels)


def _said(error: Exception) -> str:
    return f"{error}" if f"{error}" else type(error).__name__

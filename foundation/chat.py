"""Conversations to token ids: templates rendered in a sandbox, and the mask of the response tokens.

A chat template is a program that came with a model: it runs in jinja's immutable sandbox, sees only
messages, and is stopped when it works or writes too much. It renders what transformers would render, with
two exceptions: nothing in it is random, and only a caller that gives a clock lets it tell the date.

Contents are text from outside. Where one spells a special token, as in "what is <|im_end|>?", the spelling
stays text: it is put aside before the template is rendered, and encoded as plain text (`Quoted`).

Prompt and answer are encoded apart and then joined, because that is what happens when the model is used:
the prompt is encoded first, and the answer's tokens follow it one by one. An earlier answer is part of the
prompt, and is encoded with it: behind "assistant: " a model writes "a" and not " a", and when the next question
comes, it reads " a" (`Chat.encode`).

Which tokens are an answer follows from two renderings: what the template writes once the answer is there, less
what it writes to ask for it. That is what the model has to write in use. {% generation %} blocks, with which a
template can mark answers for transformers, are not asked: in circulation are some that mark the header too,
which no model writes, and some that leave out the end token, without which no model stops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from foundation.dataio import Message
from foundation.errors import InputError, ModelError
from foundation.sandbox import MAX_CHARS, Refusal, budget, environment
from foundation.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINE = "\n"  # before plain text whose neighbour is not at hand: SentencePiece merges it with next to nothing
FENCES = (LINE, ".", "|", "0")  # what may stand there instead, should one do so
SHOWN_ROLES = 8  # of a conversation that a template refuses
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
    """Messages in whose texts each spelling of a special token is replaced by a sentinel.

    A sentinel is a number between two characters of private use that no content holds. `messages` are for
    the template; `ids` encodes what it rendered, or a piece of that. Conversations without such a spelling
    are not changed at all.
    """

    def __init__(self, messages: list[Message], encoder: Encoder) -> None:
        self._encoder = encoder
        self.messages = messages
        self._spellings: dict[str, str] = {}
        text = "\n".join(_strings(messages))
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
            {key: _replaced(value, lambda text: special.sub(lambda m: sentinels[m[0]], text))
             for key, value in message.items()}
            for message in messages
        ]  # fmt: skip

    def ids(self, text: str, after: str = "") -> list[int]:
        """Ids of rendered text that goes on from `after`, which was rendered too.

        Raises InputError when a spelling can not be written as plain text.
        """
        if not self._spellings:
            return continued(self._encoder.encode_marked, after, text)
        parts = re.compile("(" + "|".join(self._spellings) + ")")
        if after:
            after = parts.split(after)[-1] or LINE
        out: list[int] = []
        for part in parts.split(text):
            spelling = self._spellings.get(part)
            if spelling is None:
                out += continued(self._encoder.encode_marked, after, part) if part else []
                after = part or after
                continue
            plain = continued(self._encoder.encode, LINE if after else "", spelling)
            after = LINE
            if not set(plain).isdisjoint(self._encoder.special_tokens.values()):
                raise InputError(
                    f"a message spells {spelling!r}, which this vocabulary can write only as a control token",
                    hint="leave that spelling out of the message",
                )
            out += plain
        return out


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value; keys are not texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _replaced(inner, change) for key, inner in value.items()}
    return [_replaced(inner, change) for inner in value] if isinstance(value, list) else value


def continued(encode: Callable[[str], list[int]], after: str, text: str) -> list[int]:
    """Ids of `text` as it stands after `after`.

    Tokenizers of the SentencePiece kind put a space before whatever they are given; in the middle of a
    conversation nobody wrote one. So they are asked for `text` behind something else: behind `after`, or, where
    a token would reach across that seam ("assistant: " and "a" make " a"), behind a fence. All others are asked
    for `text` alone. A prompt is encoded before there is an answer: no token reaches across.
    """
    if not after or encode(f"{LINE}a") == encode(LINE) + encode("a"):
        return encode(text)
    for other in (after, *FENCES):
        before, whole = encode(other), encode(other + text)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return encode(text)


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
            hint = _about_roles(messages) if isinstance(error, Refusal) else ""
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

    def encode(self, messages: list[Message]) -> list[Encoded]:
        """Ids and labels of a whole conversation; the labels stand on the assistant's tokens only.

        The token that ends an answer is part of it; white space after that token is not. What stands before an
        answer is what `prompt_ids` gives, id by id. Where that goes on from the row so far, the row goes on: a
        template that only appends gives one row. Others write earlier turns differently once later ones are
        there: Qwen3 drops their reasoning, Mistral moves the system prompt to the last question; and a space
        that ends a generation prompt becomes one token with the answer, once both are read. There a new row
        begins, with all that the model reads in use before the answer at hand, and earlier answers in it are no
        labels: no row holds a context that the model never sees.

        Raises ModelError when an answer does not begin where the template asks for it, or nothing is left to
        learn.
        """
        quoted = Quoted(messages, self._tokenizer)
        rows: list[Encoded] = []
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(quoted.messages[:position], prompt=True)
            after = self.render(quoted.messages[: position + 1], prompt=False)
            if not after.startswith(before):
                raise self._no_answer_after(before, after)
            prompt_ids = quoted.ids(before)
            answer_ids = quoted.ids(after[len(before) :].rstrip(), before)
            if not rows or prompt_ids[: len(rows[-1].ids)] != rows[-1].ids:
                rows.append(Encoded([], []))
            asked = prompt_ids[len(rows[-1].ids) :]
            rows[-1].ids.extend(asked + answer_ids)
            rows[-1].labels.extend([IGNORED] * len(asked) + answer_ids)
        # The first token is nobody's prediction.
        rows = [row for row in rows if any(label != IGNORED for label in row.labels[1:])]
        if not rows:
            raise ModelError(
                f"{self._tokenizer.folder}: the chat template leaves no token of an answer to learn",
                hint="it must write the assistant's content after the generation prompt",
            )
        return rows

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """What ends an answer: the tokens that end a document or a turn.

        The latter is read from the template's own words: eos alone is not it in every model (Gemma).
        """
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        last = self.encode(turn)[-1].ids[-1]
        named = {self._tokenizer.boundary_id, self._tokenizer.eos_id}
        ends = named | ({last} & set(self._tokenizer.special_tokens.values()))
        return frozenset(end for end in ends if end is not None)

    def _no_answer_after(self, before: str, after: str) -> ModelError:
        pairs = enumerate(zip(before, after, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), len(after))
        return ModelError(
            f"{self._tokenizer.folder}: the chat template asks for an answer with {before[same:][:60]!r} where "
            f"it writes {after[same:][:60]!r} once the answer is there",
            hint="use a template whose generation prompt is how it begins every answer",
        )


def _about_roles(messages: list[Message]) -> str:
    """What a template that says no was given, and what to do where the order of the roles is the cause."""
    roles = [str(message.get("role")) for message in messages]
    shown = ", ".join(roles[:SHOWN_ROLES]) + (f", .. ({len(roles)} in all)" if len(roles) > SHOWN_ROLES else "")
    steps = ["put the system text into the first user message"] if "system" in roles else []
    if any(role == following for role, following in pairwise(roles)):
        steps.append("merge neighbouring messages of one role")
    todo = ", and ".join(steps) or "bring the messages into an order that it takes"
    return f"it was given the roles {shown}; if it takes no such order, {todo}"


def _said(error: Exception) -> str:
    return f"{error}" if f"{error}" else type(error).__name__

"""What a chat template writes around the texts of a conversation, found by rendering, not by reading.

A template is a program; other programs (Ollama) need the same thing in a language of their own. Conversations
made of marks are rendered, what stands between the marks is taken apart into turns, and the result is believed
when it renders every probe exactly as the template does. ChatML, Llama 3, Gemma and Mistral come out, and any
other template that writes turns one after another; a template that does more is not described: None.

Not here: tools, thoughts, pictures. A template may know them; the description covers plain conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from foundation.dataio import Message
from foundation.errors import ModelError

Render = Callable[..., str]  # (messages, prompt=bool) -> text, as ChatTemplate.render
Place = Literal["turn", "first", "last", "nowhere"]

MARKS = {"s": "Systemmark", "u": "Usermark", "a": "Answermark"}
ROLES = {"s": "system", "u": "user", "a": "assistant"}
TEXTS = ("a b", "Пилот, 1 + 1?\nВторая строка", "<b>x</b> {{ y }} 'z'", "ok")
PROBES = ("u", "uau", "uauau", "su", "suau", "suauau")
PADDED = "  x  "


@dataclass(frozen=True)
class Turns:
    """Texts around a conversation that awaits an answer.

    `place` says where the system text goes: a turn of its own at the start, inside the first or the last
    turn of the user, or nowhere (the template refuses it). `default` stands where a system text would, when
    there is none. `trims`: the template removes white space around texts.
    """

    start: str
    user: tuple[str, str]
    answer: tuple[str, str]
    ask: str
    place: Place = "nowhere"
    system: tuple[str, str] = ("", "")
    default: str = ""
    trims: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the template would write it, awaiting an answer."""
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        others = [m for m in messages if m["role"] != "system"]
        if self.place == "turn" and system is not None:
            head = self.system[0] + system + self.system[1]
        else:
            head = self.default
        folded = {"first": 0, "last": len(others) - 1}.get(self.place) if system is not None else None
        out = [self.start, head]
        for number, message in enumerate(others):
            before, after = self.user if message["role"] == "user" else self.answer
            inside = f"{self.system[0]}{system}{self.system[1]}" if number == folded else ""
            out.append(f"{before}{inside}{message['content']}{after}")
        return "".join(out) + self.ask

    def without_bos(self, bos: str) -> Turns | None:
        """The same less `bos`, which the engine itself puts first; None where it can not be taken off."""
        if self.start.startswith(bos):
            return replace(self, start=self.start[len(bos) :])
        head = self.start + (self.default or self.user[0])
        return None if head.startswith(bos) else self


def describe(render: Render) -> Turns | None:
    """The turns that `render` writes; None when it writes something else, or fails."""
    try:
        turns = _plain(render)
        turns = turns and _with_system(turns, render)
        if turns is None or not all(_same(turns, render, probe) for probe in PROBES):
            return None
        padded = [{"role": ROLES[role], "content": PADDED} for role in "uau"]
        return replace(turns, trims=render(padded, prompt=True).count(PADDED) < len(padded))
    except ModelError:
        return None


def _plain(render: Render) -> Turns | None:
    """The turns of user and assistant, from what stands between the marks of one conversation."""
    pieces = _between(render(_marked("uau"), prompt=True), "uau")
    asked = _between(render(_marked("u"), prompt=False), "u")
    answered = _between(render(_marked("ua"), prompt=False), "ua")
    if pieces is None or asked is None or answered is None:
        return None
    before, to_answer, to_user, last = pieces
    user_end, answer_end = asked[-1], answered[-1]
    if not (to_answer.startswith(user_end) and last.startswith(user_end) and to_user.startswith(answer_end)):
        return None
    user = to_user.removeprefix(answer_end)
    if not before.endswith(user):
        return None
    return Turns(
        start=before.removesuffix(user),
        user=(user, user_end),
        answer=(to_answer.removeprefix(user_end), answer_end),
        ask=last.removeprefix(user_end),
    )


def _with_system(turns: Turns, render: Render) -> Turns | None:
    """`turns` with the place of a system text."""
    try:
        text = render(_marked("suau"), prompt=True)
    except ModelError:
        return turns  # Gemma 2: no system text at all
    folded = _between(text, "uasu")  # Mistral: inside the last turn of the user
    if folded is not None:
        before = turns.answer[1] + turns.user[0]
        fits = folded[2].startswith(before)
        return replace(turns, place="last", system=(folded[2][len(before) :], folded[3])) if fits else None
    pieces = _between(text, "suau")
    if pieces is None:
        return None
    before, to_user = pieces[0], pieces[1]
    if turns.user[0] and to_user.endswith(turns.user[0]):
        start = _common(turns.start, before)
        return replace(
            turns,
            start=start,
            default=turns.start[len(start) :],
            place="turn",
            system=(before[len(start) :], to_user.removesuffix(turns.user[0])),
        )
    head = turns.start + turns.user[0]
    fits = before.startswith(head)
    return replace(turns, place="first", system=(before[len(head) :], to_user)) if fits else None


def _same(turns: Turns, render: Render, probe: str) -> bool:
    """Whether both write a conversation of real texts alike. A system text may be refused, nothing else."""
    messages = [
        {"role": ROLES[role], "content": TEXTS[number % len(TEXTS)]} for number, role in enumerate(probe)
    ]
    if turns.place == "nowhere" and "s" in probe:
        return True
    return turns.render(messages) == render(messages, prompt=True)


def _marked(probe: str) -> list[Message]:
    return [{"role": ROLES[role], "content": f"{MARKS[role]}{probe[: n + 1].count(role)}"}
            for n, role in enumerate(probe)]  # fmt: skip


def _between(text: str, order: str) -> list[str] | None:
    """What stands before, between and after the marks; None unless each is there once, in `order`."""
    marks = [f"{MARKS[role]}{order[: n + 1].count(role)}" for n, role in enumerate(order)]
    places = [text.find(mark) for mark in marks]
    if any(text.count(mark) != 1 for mark in marks) or any(a >= b for a, b in pairwise(places)):
        return None
    ends = [place + len(mark) for place, mark in zip(places, marks, strict=True)]
    return [text[a:b] for a, b in zip([0, *ends], [*places, len(text)], strict=True)]


def _common(one: str, other: str) -> str:
    """The longest common beginning."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other))] if same is None else one[:same]

"""jinja's immutable sandbox, with a price on everything that a template could do without end.

A chat template is a program of somebody else's. The sandbox keeps it from what is not its own; the budget keeps
it from taking for ever: every loop turn, call and operation is counted, and what it builds is bounded. What
templates expect of transformers (tojson, loop controls, generation blocks) is here; randomness is not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sized
from functools import cache
from typing import Any

MAX_CHARS = 4 * 2**20  # of a rendered conversation, and of any text that a template builds
MAX_STEPS = 1_000_000  # loop turns and calls of one rendering; an ordinary one has some hundreds
MAX_SECONDS = 20.0


class Budget:
    """Steps and seconds that the rendering under way may still take. One rendering runs at a time."""

    def start(self) -> None:
        self._steps, self._end = MAX_STEPS, time.monotonic() + MAX_SECONDS

    def take(self, steps: int = 1) -> None:
        self._steps -= steps
        if self._steps < 0 or time.monotonic() > self._end:
            raise ValueError(f"it takes more than {MAX_STEPS} steps or {MAX_SECONDS:g} seconds")


budget = Budget()


def _counted(items: Any) -> Any:
    """`items` of a loop, paid for: at once where their number is known, else one by one."""
    if isinstance(items, Sized):
        budget.take(len(items))
        return items
    return _each(items) if isinstance(items, Iterable) else items


def _each(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget.take()
        yield item


def _bounded(value: Any) -> Any:
    """`value`, unless it is a text, list or number too large for any honest template."""
    size = value.bit_length() // 32 if isinstance(value, int) else len(value) if isinstance(value, Sized) else 0
    if size > (256 if isinstance(value, int) else MAX_CHARS):
        raise ValueError(f"it builds a {type(value).__name__} that is too large")
    return value


def _joined(parts: list[Any]) -> str:
    return str(_bounded("".join(map(str, parts))))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it; jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Refusal(Exception):
    """A template's own no (raise_exception), in its own words; what breaks a template or stops it is none."""


def _refuse(message: object = "") -> None:
    raise Refusal(message)


@cache
def environment() -> Any:
    """jinja's sandbox with what templates expect of transformers, and with a price on loops and calls."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %} .. {% endgeneration %} marks answers for transformers; here it marks nothing."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def through(name: str, node: Any, lineno: int) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=lineno)

    class Priced(NodeTransformer):
        """Puts a filter around every place where a template repeats or joins."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = through("_counted", node.iter, node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return through("_joined", nodes.List(node.nodes, lineno=node.lineno), node.lineno)

        def visit_AssignBlock(self, node: Any) -> Any:
            self.generic_visit(node)
            node.filter = through("_bounded", node.filter, node.lineno)
            return node

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, *source: Any) -> Any:
            tree = Priced().visit(super()._parse(*source))
            tree.set_environment(self)
            return tree

        def call(self, context: Any, target: Any, /, *values: Any, **named: Any) -> Any:
            budget.take()
            if any(isinstance(value, int) and value > MAX_CHARS for value in values):
                raise ValueError("it calls a function with a number that is too large")
            return _bounded(super().call(context, target, *values, **named))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.take()
            if operator == "**" and abs(right) > 64:
                raise ValueError(f"it raises to the power {right}")
            if operator == "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(many, Sized) and len(many) * times > MAX_CHARS:
                        raise ValueError("it repeats a value too often")
            return _bounded(super().call_binop(context, operator, left, right))

    made = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # the optimizer would compute constants before anything is counted
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    made.globals["raise_exception"] = _refuse
    made.filters |= {
        "tojson": _tojson,
        "_counted": _counted,
        "_joined": _joined,
        "_bounded": _bounded,
    }
    del made.globals["lipsum"], made.filters["random"]  # the same input, the same bytes
    return made

"""A teacher behind an OpenAI-compatible endpoint: POST base_url/chat/completions, several at a time.

What comes back is untrusted and may be late, cut, huge or nonsense: it is bounded in bytes and seconds and
checked key by key. 429, 5xx, broken connections and bodies that are not the promised JSON are tried again
with exponential back-off, or after what Retry-After says. 400, 413 and 422 speak of one prompt and become
its fault; any other refusal (a wrong key, an unknown model) ends the stage, and the answers so far are kept.

Redirects are not followed: urllib would carry the key to another host. The key is read from an environment
variable, sent as a header, and taken out of every text that is shown.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from distill.synthesize.asks import Ask, Reply
from foundation.errors import MissingError, RecipeError

MAX_BYTES = 4 << 20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
LONGEST_RETRY_AFTER_SECONDS = 600.0
_AGAIN = {408, 409, 425, 429}
_THIS_PROMPT = {400, 413, 422}


@dataclass(frozen=True)
class Where:
    """An endpoint as a recipe names it. `left_out`: keys of the request that it does not take."""

    base_url: str
    model: str
    key_variable: str = ""
    timeout_seconds: float = 120.0
    tries: int = 6
    parallel: int = 4
    left_out: tuple[str, ...] = ()


class Endpoint:
    """A Teacher. `sleep` is the clock's pause, handed in by tests."""

    independent = True

    def __init__(self, where: Where, sleep: Callable[[float], object] | None = None) -> None:
        """Raises RecipeError for an address that can not be one, MissingError when the key is not there."""
        parts = urlsplit(where.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RecipeError(
                [f"base_url = {where.base_url!r}: http(s)://host[:port]/path is needed, without a key in it"],
                hint='for example base_url = "http://127.0.0.1:8000/v1"',
            )
        self.identity = f"endpoint {where.model}"
        self._where = where
        self._key = _key(where.key_variable)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait

    def close(self) -> None:
        self._ended.set()

    def answers(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> Iterator[tuple[int, Reply]]:
        """At most `parallel` requests are on their way. After a refusal no more are sent; those that are on
        their way are given first, because they were paid for, and then the refusal is raised.
        """
        waiting = iter(enumerate(asks))
        flying: dict[Future[Reply], int] = {}
        refusal: BaseException | None = None
        with ThreadPoolExecutor(self._where.parallel) as pool:
            try:
                while True:
                    while len(flying) < self._where.parallel and not (refusal or stop()):
                        if (entry := next(waiting, None)) is None:
                            break
                        flying[pool.submit(self.answer, entry[1])] = entry[0]
                    if not flying:
                        break
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        index = flying.pop(future)
                        if trouble := future.exception():
                            refusal = refusal or trouble
                            self._ended.set()  # wakes those that pause before another try
                        else:
                            yield index, future.result()
            finally:
                if flying:
                    self._ended.set()
        if refusal:
            raise refusal

    def answer(self, ask: Ask) -> Reply:
        """One answer, or its fault. Raises MissingError when the endpoint refuses or can not be reached."""
        trouble = ""
        for attempt in range(self._where.tries):
            try:
                return self._once(ask)
            except _Again as again:
                trouble = again.why
                backoff = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**attempt)
                pause = backoff if again.after_seconds is None else again.after_seconds
            if pause > LONGEST_RETRY_AFTER_SECONDS:
                raise MissingError(
                    f"{self._where.base_url} asks to wait {pause:.0f} seconds ({trouble})",
                    hint="run the same command again then; the answers so far are kept",
                )
            if self._ended.is_set():
                break
            if attempt + 1 < self._where.tries:
                self._sleep(pause)
        raise MissingError(
            f"{self._where.base_url}: no answer after {self._where.tries} tries; the last time: {trouble}",
            hint="check the endpoint; the same command goes on, and answers already there are not asked again",
        )

    def _once(self, ask: Ask) -> Reply:
        request = urllib.request.Request(
            f"{self._where.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(self._body(ask), ensure_ascii=True).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            method="POST",
        )
        deadline = time.monotonic() + self._where.timeout_seconds
        try:
            with self._opener.open(request, timeout=self._where.timeout_seconds) as response:
                return read_reply(_bounded(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error, deadline)
        except (OSError, http.client.HTTPException) as error:  # includes URLError and timeouts
            raise _Again(self._clean(f"{type(error).__name__}: {error}")) from None

    def _refused(self, error: urllib.error.HTTPError, deadline: float) -> Reply:
        try:
            said = self._clean(_bounded(error, deadline).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException, _Again):
            said = ""
        why = f"HTTP {error.code} {said}".strip()
        if error.code in _AGAIN or error.code >= 500:
            raise _Again(why, retry_after(error.headers.get("Retry-After"), time.time()))
        if error.code in _THIS_PROMPT:
            return Reply("", fault=f"refused: {why}")
        hint = "check base_url and model"
        if error.code in (401, 403):
            hint = (
                f"check the key in the environment variable {self._where.key_variable or 'key_variable names'}"
            )
        raise MissingError(f"{self._where.base_url} refuses: {why}", hint=hint)

    def _body(self, ask: Ask) -> dict[str, Any]:
        body = {
            "model": self._where.model,
            "messages": list(ask.messages),
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "max_tokens": ask.max_new_tokens,
            "seed": ask.seed,
        }
        return {key: value for key, value in body.items() if key not in self._where.left_out}

    def _clean(self, text: str) -> str:
        """At most 200 printable characters, without the key."""
        shown = text.replace(self._key, "***") if self._key else text
        return re.sub(r"[^\w\s.,:;/()\"'{}\[\]+*=<>%!?@#&|-]|\s+", " ", shown)[:200].strip()


class _Again(Exception):
    """Worth another try; `after_seconds` is what the endpoint asked for."""

    def __init__(self, why: str, after_seconds: float | None = None) -> None:
        super().__init__(why)
        self.why, self.after_seconds = why, after_seconds


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise MissingError(
            f"the environment variable {variable} is not set or empty",
            hint=f"export {variable}=... before the run; a key never stands in a recipe",
        )
    if not key.isascii() or not key.isprintable():
        raise MissingError(f"the environment variable {variable} holds what can not be a key")
    return key


def _bounded(response: Any, deadline: float) -> bytes:
    """The body, at most MAX_BYTES of it and until `deadline`; more or later is worth another try."""
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > MAX_BYTES:
            raise _Again(f"a body of more than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _Again("the body did not end in time")
    promised = response.headers.get("Content-Length", "")
    if promised.isdecimal() and len(body) < int(promised):
        raise _Again(f"a body cut after {len(body)} of {promised} bytes")
    return body


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110: a number, or a date), or None."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def read_reply(body: bytes) -> Reply:
    """The first choice of a chat completion. Raises _Again when the body is not one."""
    try:
        record = json.loads(body)
        choice = record["choices"][0]
        message, usage = choice["message"], record.get("usage")
        text = message.get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Again("the body is not a chat completion") from None
    if text is not None and not isinstance(text, str):  # null stands for a refusal: an empty answer
        raise _Again("the answer is not text")
    counts = usage if isinstance(usage, Mapping) else {}
    return Reply(
        (text or "").encode("utf-8", "replace").decode(),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        cut=choice.get("finish_reason") == "length",
    )


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**31 else 0

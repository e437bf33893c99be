"""A teacher behind an OpenAI-compatible endpoint: POST base_url/chat/completions, several at a time.

What comes back is untrusted and may be late, cut, huge or nonsense: it is bounded in bytes and, headers and
body together, in seconds, and checked key by key. 429, 5xx, broken connections and bodies that are not the
promised JSON are tried again with exponential back-off, or after what Retry-After says. 400, 413 and 422 speak
of one prompt and become its fault; any other refusal (a wrong key, an unknown model) ends the stage, and the
answers so far are kept.

Redirects are not followed: urllib would carry the key to another host. The key is read from an environment
variable, sent as a header, and taken out of every text that is shown or kept.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import math
import os
import queue
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from distill.synthesize.address import address
from distill.synthesize.asks import Ask, Reply
from foundation.errors import MissingError, RecipeError

MAX_BYTES = 4 << 20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
LONGEST_RETRY_AFTER_SECONDS = 600.0
POLL_SECONDS = 0.2  # between two looks at stop()
GRACE_SECONDS = 1.0  # after a stop, for answers that are about to come
SECRET_CHARACTERS = 8  # a shorter "key" (x, none, EMPTY) is no secret, and may be a word of an answer
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
        try:
            self._url = f"{address(where.base_url).rstrip('/')}/chat/completions"
        except ValueError as error:
            raise RecipeError(
                [f"base_url: {error}"], hint='for example base_url = "http://127.0.0.1:8000/v1"'
            ) from None
        self.identity = f"endpoint {where.model}"
        self._where = where
        self._key = _key(where.key_variable)
        self._opener = urllib.request.build_opener(_NoRedirects, _Http, _Https)
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait

    def close(self) -> None:
        self._ended.set()

    def answers(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> Iterator[tuple[int, Reply]]:
        """At most `parallel` requests are on their way. After a refusal no more are sent; those that are on
        their way are given first, because they were paid for, and then the refusal is raised. After a stop they
        have GRACE_SECONDS; then they are left to threads that do not outlive the process.
        """
        waiting = enumerate(asks)
        landed: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()
        flying, refusal, until = 0, None, math.inf
        try:
            while True:
                if until == math.inf and stop():
                    until = time.monotonic() + GRACE_SECONDS
                    self._ended.set()  # wakes those that pause before another try
                while flying < self._where.parallel and not refusal and until == math.inf:
                    if (entry := next(waiting, None)) is None:
                        break
                    threading.Thread(target=self._fly, args=(*entry, landed), daemon=True).start()
                    flying += 1
                if not flying or time.monotonic() > until:
                    break
                try:
                    index, got = landed.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                flying -= 1
                if isinstance(got, Reply):
                    yield index, got
                elif until == math.inf:  # after a stop, trouble is only that a try was not repeated
                    refusal = refusal or got
                    self._ended.set()
        finally:
            if flying:
                self._ended.set()
        if refusal:
            raise refusal

    def _fly(self, index: int, ask: Ask, landed: queue.SimpleQueue[tuple[int, Reply | BaseException]]) -> None:
        try:
            landed.put((index, self.answer(ask)))
        except BaseException as trouble:  # raised again where the answers are read
            landed.put((index, trouble))

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
            if attempt + 1 < self._where.tries and not self._ended.is_set():
                self._sleep(pause)
            if self._ended.is_set():
                break
        raise MissingError(
            f"{self._where.base_url}: no answer after {self._where.tries} tries; the last time: {trouble}",
            hint="check the endpoint; the same command goes on, and answers already there are not asked again",
        )

    def _once(self, ask: Ask) -> Reply:
        request = urllib.request.Request(
            self._url,
            data=json.dumps(self._body(ask), ensure_ascii=True).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            method="POST",
        )
        try:
            with self._opener.open(request, timeout=self._where.timeout_seconds) as response:
                reply = read_reply(_bounded(response))
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except (OSError, http.client.HTTPException) as error:  # includes URLError and timeouts
            raise _Again(self._clean(f"{type(error).__name__}: {error}")) from None
        return replace(reply, text=self._hidden(reply.text)) if len(self._key) >= SECRET_CHARACTERS else reply

    def _refused(self, error: urllib.error.HTTPError) -> Reply:
        try:
            said = self._clean(_bounded(error).decode("utf-8", "replace"))
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
        return re.sub(r"[^\w\s.,:;/()\"'{}\[\]+*=<>%!?@#&|-]|\s+", " ", self._hidden(text))[:200].strip()

    def _hidden(self, text: str) -> str:
        """`text` with *** for the key, as it is and as JSON writes it."""
        quoted = json.dumps(self._key)[1:-1]
        for form in (self._key, quoted, quoted.replace("/", "\\/")) if self._key else ():
            text = text.replace(form, "***")
        return text


class _Again(Exception):
    """Worth another try; `after_seconds` is what the endpoint asked for."""

    def __init__(self, why: str, after_seconds: float | None = None) -> None:
        super().__init__(why)
        self.why, self.after_seconds = why, after_seconds


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Until(io.RawIOBase):
    """What comes from a socket until `deadline`: a timeout alone bounds each read, not their number."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        self._sock.settimeout(left)
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Status line, headers and body, all until `deadline`."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_Until(sock, self.fp.detach(), deadline))


class _Timed(http.client.HTTPConnection):
    """One request; its time runs from here."""

    def __init__(self, host: str, *, timeout: float, **kwargs: Any) -> None:
        super().__init__(host, timeout=timeout, **kwargs)
        self.response_class = partial(_Response, deadline=time.monotonic() + timeout)  # type: ignore[assignment]


class _TimedTls(_Timed, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Timed, request)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_TimedTls, request)  # type: ignore[arg-type]


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


def _bounded(response: Any) -> bytes:
    """The body, at most MAX_BYTES of it; more is worth another try."""
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > MAX_BYTES:
            raise _Again(f"a body of more than {MAX_BYTES} bytes")
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
        text or "",
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        cut=choice.get("finish_reason") == "length",
    )


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**31 else 0

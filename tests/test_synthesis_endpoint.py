"""The endpoint teacher against a server on this machine that misbehaves as real ones do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from distill.synthesize import endpoint
from distill.synthesize.address import address
from distill.synthesize.asks import Ask, Reply
from distill.synthesize.endpoint import Endpoint, Where
from distill.synthesize.stage import Settings
from foundation.errors import MissingError, RecipeError

KEY = "sk-secret-123"


def completion(text: object, finish: str = "stop", usage: object = None) -> dict[str, object]:
    told = usage if usage is not None else {"prompt_tokens": 7, "completion_tokens": 3}
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": told}


class Server(ThreadingHTTPServer):
    """Acts out `script`: one act a request, the last one for ever. Keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        self.waited_for = False  # the client read what `in_the_end` sends to its end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body, dict(self.headers)))
            act = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        act(self)

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


def says(value: object, status: int = 200, **headers: str) -> Callable[[Handler], None]:
    """An act: answer with `value` (JSON, or bytes as they are)."""

    def act(handler: Handler) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        for name, content in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), content)
        handler.end_headers()
        handler.wfile.write(body)

    return act


def cut(handler: Handler) -> None:
    says(b'{"choices": [', Content_Length="900")(handler)


def hangs_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def drips(handler: Handler) -> None:
    """A byte every tenth of a second: each read is in time, the whole never."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def in_the_end(piece: bytes, first: bytes = b"") -> Callable[[Handler], None]:
    """An act: `piece` every twentieth of a second for two seconds, and then an answer that comes too late."""

    def act(handler: Handler) -> None:
        body = json.dumps(completion("late")).encode()
        try:
            handler.wfile.write(first)
            for _ in range(40):
                handler.wfile.write(piece)
                time.sleep(0.05)
            handler.server.waited_for = True
            start = b"" if first else b"HTTP/1.1 200 OK"
            handler.wfile.write(start + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        except OSError:
            pass

    return act


GOOD = says(completion("fine"))
ASK = Ask(({"role": "user", "content": "Привет"},), 50, 0.7, 0.9, 11)


def never() -> bool:
    return False


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)
    made = Server()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def teacher(server: Server, pauses: list[float] | None = None, **changes: Any) -> Endpoint:
    where = Where(
        **{"base_url": server.url, "model": "m", "key_variable": "TEST_KEY", "timeout_seconds": 5.0, **changes}
    )
    return Endpoint(where, sleep=(pauses if pauses is not None else []).append)


def test_the_request_and_the_answer(server: Server) -> None:
    server.script = [says(completion("fine \ud800", "length"))]
    assert teacher(server, left_out=("top_p",)).answer(ASK) == Reply("fine ?", 7, 3, cut=True)
    path, body, headers = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Привет"}],
        "temperature": 0.7,
        "max_tokens": 50,
        "seed": 11,
    }


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(says({"error": "slow down"}, 429), id="429"),
        pytest.param(says(b"<html>oops", 500), id="500"),
        pytest.param(says(b"", 503), id="503"),
        pytest.param(cut, id="cut body"),
        pytest.param(hangs_up, id="hangs up"),
        pytest.param(says(b"\xff\x00 garbage"), id="garbage"),
        pytest.param(says([1, 2]), id="another JSON"),
        pytest.param(says({"choices": []}), id="no choice"),
        pytest.param(says({"choices": [{"message": "x"}]}), id="message is text"),
        pytest.param(says(completion(["parts"])), id="content is a list"),
        pytest.param(says(b"[" * 100_000), id="deep"),
    ],
)
def test_trouble_is_tried_again(server: Server, bad: Callable[[Handler], None]) -> None:
    server.script, pauses = [bad, bad, GOOD], []
    assert teacher(server, pauses).answer(ASK).text == "fine"
    assert pauses == [1.0, 2.0] and len(server.requests) == 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("-3", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert endpoint.retry_after(value, 1e9) == seconds


def test_retry_after_as_a_date() -> None:
    assert endpoint.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40.0) == 60.0
    assert endpoint.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 400.0) == 0.0


def test_retry_after_is_honoured_and_bounded(server: Server) -> None:
    server.script, pauses = [says({}, 429, Retry_After="33"), GOOD], []
    assert teacher(server, pauses).answer(ASK).text == "fine" and pauses == [33.0]
    server.script = [says({}, 429, Retry_After="86400")]
    with pytest.raises(MissingError, match="asks to wait 86400 seconds"):
        teacher(server, pauses).answer(ASK)
    assert pauses == [33.0]


def test_tries_are_bounded(server: Server) -> None:
    server.script, pauses = [says({"error": "overloaded"}, 529)], []
    with pytest.raises(MissingError, match="no answer after 8 tries; the last time: HTTP 529"):
        teacher(server, pauses, tries=8).answer(ASK)
    assert len(server.requests) == 8 and pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Endpoint(Where(f"http://127.0.0.1:{port}", "m", tries=2), sleep=lambda seconds: None)
    with pytest.raises(MissingError, match="no answer after 2 tries"):
        made.answer(ASK)


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(drips, id="drips"),
        pytest.param(lambda handler: time.sleep(2), id="silent"),
        pytest.param(in_the_end(b"a", b"HTTP/1.1 200 OK\r\nX-A: "), id="drips headers"),
        pytest.param(in_the_end(b"HTTP/1.1 100 Continue\r\n\r\n"), id="goes on continuing"),
    ],
)
def test_a_slow_answer_has_an_end(server: Server, slow: Callable[[Handler], None]) -> None:
    server.script = [slow, GOOD]
    assert teacher(server, timeout_seconds=0.5).answer(ASK).text == "fine"
    assert not server.waited_for


def test_a_huge_body_is_not_read_to_its_end(server: Server) -> None:
    server.script = [says(b" " * (endpoint.MAX_BYTES + 9)), GOOD]
    assert teacher(server).answer(ASK).text == "fine"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_is_its_own_fault(server: Server, status: int) -> None:
    server.script = [says({"error": f"too long {KEY}"}, status)]
    reply = teacher(server).answer(ASK)
    assert reply.fault.startswith(f"refused: HTTP {status}") and KEY not in reply.fault and not reply.text


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "TEST_KEY"), (403, "TEST_KEY"), (404, "model"), (302, "base_url")]
)
def test_a_refusal_ends_at_once_and_never_shows_the_key(server: Server, status: int, hint: str) -> None:
    server.script = [says({"error": f"wrong key {KEY}\x1b[31m"}, status, Location="http://127.0.0.1:1/steal")]
    with pytest.raises(MissingError, match=f"refuses: HTTP {status}") as caught:
        teacher(server).answer(ASK)
    assert hint in caught.value.hint and len(server.requests) == 1
    assert KEY not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_refusal_loses_no_answer_that_is_under_way(server: Server) -> None:
    def late(handler: Handler) -> None:
        time.sleep(0.3)
        GOOD(handler)

    server.script = [late, late, says({}, 401)]
    got = []
    with pytest.raises(MissingError):
        for index, reply in teacher(server, parallel=3).answers([ASK] * 9, never):
            got.append((index, reply.text))
    assert len(got) == 2 and len(server.requests) == 3


def test_all_asks_are_answered_once_and_in_parallel(server: Server) -> None:
    meeting = threading.Barrier(4, timeout=5)

    def meet(handler: Handler) -> None:
        meeting.wait()  # passes only when four requests are under way at once
        GOOD(handler)

    server.script = [meet]
    replies = list(teacher(server, parallel=4).answers([ASK] * 8, never))
    assert sorted(index for index, _ in replies) == list(range(8))


def test_after_a_stop_no_more_is_sent(server: Server) -> None:
    server.script = [GOOD]
    got: list[int] = []
    for index, _ in teacher(server, parallel=2).answers([ASK] * 50, lambda: len(got) >= 3):
        got.append(index)
    assert 3 <= len(got) == len(server.requests) <= 5


def test_a_stop_waits_neither_for_an_answer_nor_for_another_try(server: Server) -> None:
    """Both acts end in an answer, for those who wait."""
    release = threading.Event()

    def silent(handler: Handler) -> None:
        release.wait(20)
        GOOD(handler)

    server.script = [silent, says({}, 429, Retry_After="20"), GOOD]
    where = Where(server.url, "m", timeout_seconds=60, parallel=2)
    got = list(Endpoint(where).answers([ASK] * 2, lambda: len(server.requests) == 2))
    assert got == [] and len(server.requests) == 2
    release.set()


def test_an_answer_that_repeats_the_key_is_kept_without_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = 'sk/secret"123'
    monkeypatch.setenv("TEST_KEY", key)
    quoted = json.dumps(key)
    server.script = [says(completion(f"Bearer {key}, {quoted}, {quoted.replace('/', chr(92) + '/')}"))]
    assert teacher(server).answer(ASK).text == 'Bearer ***, "***", "***"'
    monkeypatch.setenv("TEST_KEY", "none")  # what local servers are given
    server.script = [says(completion("none of these"))]
    assert teacher(server).answer(ASK).text == "none of these"


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": -1, "completion_tokens": 1e9}, (0, 0)),
        ([], (0, 0)),
        ({"prompt_tokens": True}, (0, 0)),
    ],
)
def test_counts_of_tokens_are_not_believed_blindly(usage: object, counts: tuple[int, int]) -> None:
    reply = endpoint.read_reply(json.dumps(completion(None, usage=usage)).encode())
    assert (reply.tokens_in, reply.tokens_out) == counts and reply.text == ""


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://x/v1",
        "http://key@host/v1",
        "localhost:8000",
        "https://",
        "http://[::1/v1",
        "http://[::g]/v1",
        "http://a..b/v1",
        "http://h:abc/v1",
        "http://h:0",
        "http://h:65536",
        "http://a b/v1",
        "http://h/v 1",
        "http://h%20/v1",
        "http://h/v1?key=1",
        "http://h\n/v1",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(RecipeError, match="base_url"):
        Endpoint(Where(url, "m"))
    with pytest.raises(ValidationError, match="base_url"):
        Settings(base_url=url, endpoint_model="m")


@pytest.mark.parametrize(
    ("url", "ascii"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://[::1]:8/a%20b/", "https://[::1]:8/a%20b/"),
        ("http://h:1/вв", "http://h:1/%D0%B2%D0%B2"),
        ("HTTP://пример.рф/v1", "http://xn--e1afmkfd.xn--p1ai/v1"),
    ],
)
def test_an_address_in_ascii(url: str, ascii: str) -> None:
    assert address(url) == ascii
    assert Settings(base_url=url, endpoint_model="m").base_url == url


@pytest.mark.parametrize("value", ["", "  ", "два", "a\nb"])
def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(MissingError, match="TEST_KEY") as caught:
        Endpoint(Where("http://h", "m", "TEST_KEY"))
    assert not value.strip() or value not in str(caught.value)

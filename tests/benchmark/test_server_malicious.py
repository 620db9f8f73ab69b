"""Test `bench server` against malicious servers: none can fill the memory, exceed the timeout or end the command."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import socket
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner

from jitnorm.benchmark.server import batch, client, get_cache_tokens_from_metrics, run_batch
from jitnorm.cli import main

MIB = 1 << 20
MOST_SENT = 192 * MIB  # a client that reads all of it has no limit
BUFFERS = 16 * MIB  # sent, but not yet read by the client
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CHUNKED = HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked")
EVENT = b'data: {"choices": [{"text": "x"}]}\n\n'


class Hostile:
    """Answer every request with what `answer` yields, and count the bytes that could be sent."""

    def __init__(self) -> None:
        self.answer: Callable[[], Iterator[bytes]] = lambda: iter(())
        self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"http://{self.address}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=self._listener.accept()[:1], daemon=True).start()

    def _answer(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError), one:
            one.recv(65536)
            for part in self.answer():
                if self.sent > MOST_SENT:
                    break
                one.sendall(part)
                self.sent += len(part)
            one.shutdown(socket.SHUT_WR)
            while one.recv(65536):  # closing with bytes unread would take back what was sent
                pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    one = Hostile()
    yield one
    one.close()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(client, "_GRACE", 0.2)


def within(seconds: float, call: Callable[[], object]) -> object:
    """Return what `call` returns, or fail after `seconds`."""
    results: list[object] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"not done within {seconds} s"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def repeated(part: bytes, start: bytes = HEAD) -> Callable[[], Iterator[bytes]]:
    """Send as much of `part` as the client reads, in pieces of a megabyte."""

    def answer() -> Iterator[bytes]:
        yield start
        while True:
            yield part * (MIB // len(part))

    return answer


def dripped(part: bytes, start: bytes = b"") -> Callable[[], Iterator[bytes]]:
    """Send a piece now and then, which restarts the timeout of the socket, until the client hangs up."""

    def answer() -> Iterator[bytes]:
        yield start
        while True:
            yield part
            time.sleep(0.05)

    return answer


def warned(url: str) -> str:
    with pytest.warns(RuntimeWarning) as caught:
        assert within(60, lambda: get_cache_tokens_from_metrics(url)) is None
    assert len(caught) == 1
    return str(caught[0].message)


def errors_of(hostile: Hostile, api: str = "openai", timeout: float = 60.0) -> list[str]:
    """Return the errors of a batch, without reading metrics."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "get_cache_tokens_from_metrics", lambda url: None)
        result = within(
            timeout + 60, lambda: run_batch(hostile.url, api, input_len=3, output_len=4, timeout=timeout, batch_size=2)
        )
    assert result.as_text() and json.dumps(result.as_dict(), allow_nan=False)
    assert all(error.isprintable() and len(error) < 400 for error in result.errors)
    return result.errors


# Bodies and lines


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(b"Connection: close", b"Content-Length: %d" % 10**18)])
def test_metrics_without_an_end(hostile, head, monkeypatch):
    monkeypatch.setattr(client, "_METRICS_TIMEOUT", 60.0)
    hostile.answer = repeated(b"# a comment\n", head)
    assert "longer than 16 MiB" in warned(hostile.url)
    assert hostile.sent < 16 * MIB + BUFFERS


def test_parsing_is_part_of_the_time(hostile, monkeypatch):
    """Send so many lines of the counters that parsing them takes longer than the timeout."""
    monkeypatch.setattr(client, "_METRICS_TIMEOUT", 0.3)
    line = b'prompt_tokens_total{model="some model",rank="1",engine="2"} 1\n'
    hostile.answer = lambda: iter((HEAD, line * (15 * MIB // len(line))))
    started = time.monotonic()
    assert "not finished within 0.3 s" in warned(hostile.url)
    assert time.monotonic() - started < 5


def test_other_metrics_are_not_parsed(hostile, monkeypatch):
    """Send other metrics that the parser would reject."""
    text = b'time_to_first_token_seconds_bucket{le="0.1" 3 {{\n' * 1000
    hostile.answer = lambda: iter((HEAD, text, b"sglang:prompt_tokens_total 7\n", text))
    assert within(60, lambda: get_cache_tokens_from_metrics(hostile.url)) == (0.0, 7.0)


def test_a_line_of_metrics_that_is_too_long(hostile):
    hostile.answer = lambda: iter((HEAD, b"prompt_tokens_total{" + b'a="b",' * 100000 + b"} 1\n"))
    assert "a line of" in warned(hostile.url)


@pytest.mark.parametrize("part", [b"data: ", b"x", b"data: x\n", b": comment without an end"])
def test_an_event_without_an_end(hostile, part):
    hostile.answer = repeated(part)
    assert all("an event is longer than 4 MiB" in error for error in errors_of(hostile)), errors_of(hostile)
    assert hostile.sent < 2 * (2 * 4 * MIB + BUFFERS)  # two requests in each of up to two batches


def test_a_stream_that_goes_on(hostile):
    hostile.answer = repeated(EVENT)
    assert all("the stream went on after 25 events with tokens" in error for error in errors_of(hostile))


@pytest.mark.parametrize(
    "answer",
    [
        repeated(b"x", b""),
        repeated(b"X-Header: y\r\n", b"HTTP/1.1 200 OK\r\n"),
        repeated(b"HTTP/1.1 100 Continue\r\n\r\n", b""),
        repeated(b"0", CHUNKED),
        repeated(
            b"-5\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        ),
        repeated(b"\x1b[2J\0", b"HTTP/1.1 500 \x1b[2J\r\n\r\n"),
        lambda: iter((b"HTTP/1.1 200 OK\r\nContent-Type: \x1b]0;title\x07\r\n\r\n",)),
        lambda: iter((b"\x1b[31mHTTP\r\n\r\n",)),
        lambda: iter((HEAD, b"data: \xff\xfe\n\n")),
        lambda: iter((HEAD, b"data: " + b"[" * 200000 + b"\n\n")),
        lambda: iter((HEAD, b'data: {"error": "\\u001b[2J\\ud800"}\n\n')),
        lambda: iter((HEAD, b"data: 5\n\n")),
        lambda: iter((HEAD, b'data: "error"\n\n')),
    ],
)
def test_answers_other_than_http_or_events(hostile, answer):
    hostile.answer = answer
    assert len(errors_of(hostile, timeout=2.0)) == 2
    assert hostile.sent < MOST_SENT


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Content-Type: text/event-stream; charset=zlib_codec"])
def test_compressed_answers_are_not_decompressed(hostile, header):
    """Reject compressed answers, which could expand to any size."""
    head = HEAD.replace(b"Connection: close", f"{header}\r\nConnection: close".encode())
    compress = gzip.compress if "gzip" in header else zlib.compress
    hostile.answer = lambda: iter((head, compress(EVENT * 4 + b"data: [DONE]\n\n")))
    errors = errors_of(hostile)
    assert len(errors) == 2 and all("ended without [DONE], after 0 tokens" in error for error in errors), errors


# Time


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", HEAD])
def test_a_server_that_drips(hostile, start):
    hostile.answer = dripped(b"x", start)
    assert all("not finished within 0.5 s" in error for error in errors_of(hostile, timeout=0.5))


def test_a_tls_handshake_that_drips(hostile, monkeypatch):
    monkeypatch.setattr(client, "_METRICS_TIMEOUT", 0.3)
    hostile.answer = dripped(b"\x16", b"\x16\x03\x01\x40\x00")  # of a record that is never whole
    assert "not finished within 0.3 s" in warned(f"https://{hostile.address}")


def test_name_resolution_that_never_ends(monkeypatch):
    monkeypatch.setattr(client, "_METRICS_TIMEOUT", 0.2)
    asleep = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asleep.wait(600) and [])
    with pytest.warns(RuntimeWarning, match="not finished"):
        result = within(60, lambda: run_batch("http://nowhere.invalid", timeout=0.2))
    asleep.set()
    assert result.errors == ["not finished within 0.2 s"]


# Numbers


@pytest.mark.parametrize("api", ["openai", "sglang"])
@pytest.mark.parametrize(
    "number", ["1" + "0" * 400, "1" + "0" * 5000, "-1", "1.5", "1e400", "NaN", "true", '"7"', "null", "[]", "99999999"]
)
def test_invalid_numbers_of_tokens(hostile, api, number):
    event = {"choices": [{}], "usage": {"completion_tokens": 0}, "meta_info": {"completion_tokens": 0}}
    text = json.dumps(event).replace('_tokens": 0', f'_tokens": {number}')
    hostile.answer = lambda: iter((HEAD, f"data: {text}\n\ndata: [DONE]\n\n".encode()))
    errors = errors_of(hostile, api)
    assert len(errors) == 2 and all("completion_tokens must be" in e or "is not JSON" in e for e in errors), errors
    words = ["bench", "server", "--url", hostile.url, "--api", api, "--input-len", "3", "--format", "json"]
    done = within(60, lambda: CliRunner().invoke(main, words))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert json.loads(done.stdout)["completed"] == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [((5.0, 9.0), (1.0, 2.0)), ((5.0, 9.0), (1.0, 10.0)), ((0.0, 0.0), (1e308, 5e-324)), ((0.0, 1.0), (3.0, 2.0))],
)
def test_inconsistent_hit_rates(hostile, monkeypatch, before, after):
    readings = iter((before, after))
    monkeypatch.setattr(batch, "get_cache_tokens_from_metrics", lambda url: next(readings))
    assert within(60, lambda: run_batch(hostile.url, timeout=60)).cache_hit_rate is None


# Arguments


@pytest.mark.parametrize(
    "url",
    [
        "there",
        "ftp://localhost",
        "http://",
        "http://localhost:99999",
        "http://localhost:-1",
        "http://localhost:port",
        "http://localhost:0",
        "http://[::1",
        "http://a..b",
        f"http://{'a' * 64}.com",
        "http://local host",
        "http://localhost/\u00fc",
        "http://user:word@localhost",
        "http://localhost/?key=value",
        "http://localhost/#there",
    ],
)
def test_invalid_urls(url):
    assert_rejected("url", "--url", url)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout", value) for value in ("inf", "-inf", "nan", "0", "-1", "1e300")),
        ("batch_size", "100000000000"),
        ("input_len", "1" + "0" * 400),
        ("output_len", "1" + "0" * 400),
    ],
)
def test_invalid_numbers(name, value):
    assert_rejected(name, "--url", "http://localhost:1", f"--{name.replace('_', '-')}", value)


def test_prompts_that_are_too_many(monkeypatch):
    assert_rejected("batch_size", "--url", "http://localhost:1", "--batch-size", "4096", "--input-len", "100000")


def assert_rejected(name: str, *words: str) -> None:
    """Expect one line and the exit status of a usage error, before any request."""
    done = within(60, lambda: CliRunner().invoke(main, ["bench", "server", *words]))
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    assert done.stderr.startswith(f"Error: {name}") and done.stderr.count("\n") == 1 and not done.stdout
    assert len(done.stderr) < 300


@pytest.mark.parametrize("value", [2.0, "2", None])
def test_numbers_of_other_types(value):
    with pytest.raises(TypeError, match="batch_size must be an int"):
        run_batch("http://localhost:1", batch_size=value)


# Threads


def test_threads_that_do_not_start(hostile, monkeypatch):
    """Reach the limit on processes: threads that started do their work, and none waits for the others."""

    class Thread(threading.Thread):
        started = 0

        def start(self) -> None:
            Thread.started += 1
            if Thread.started > 2:
                raise RuntimeError("can't start new thread")
            super().start()

    limited = types.ModuleType("threading")
    vars(limited).update(vars(threading), Thread=Thread)
    monkeypatch.setattr(batch, "threading", limited)
    monkeypatch.setattr(batch, "get_cache_tokens_from_metrics", lambda url: None)
    hostile.answer = lambda: iter((HEAD, EVENT * 4, b"data: [DONE]\n\n"))
    result = within(60, lambda: run_batch(hostile.url, batch_size=4, output_len=4, timeout=60))
    assert result.errors == ["cannot start its thread: can't start new thread"] * 2
    assert [request.tokens for request in result.requests] == [4, 4, 0, 0]


@pytest.mark.parametrize("error", [ValueError, MemoryError, RuntimeError, OSError])
def test_a_connection_that_fails_in_any_way(hostile, monkeypatch, error):
    connections = iter(range(9))

    class Connection(batch.Connection):
        def __init__(self, *arguments) -> None:
            if next(connections) == 0:
                raise error("boom")
            super().__init__(*arguments)

    monkeypatch.setattr(batch, "Connection", Connection)
    monkeypatch.setattr(batch, "get_cache_tokens_from_metrics", lambda url: None)
    hostile.answer = lambda: iter((HEAD, EVENT * 4, b"data: [DONE]\n\n"))
    result = within(60, lambda: run_batch(hostile.url, batch_size=3, output_len=4, timeout=60))
    assert len(result.errors) == 1 and "boom" in result.errors[0]
    assert sorted(request.tokens for request in result.requests) == [0, 4, 4]
    assert all(math.isfinite(t) for request in result.requests for t in request.times)

"""Talk HTTP to an inference server under a total deadline and with limits on what is read.

httpx has a timeout for each operation, which begins anew with every byte, and no limit on a body, a line or an event.
`Deadline` and `Connection` add both: a server can neither delay the benchmark nor fill the memory.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx
from httpx_sse import EventSource

_MAX_BODY = 16 << 20  # bytes; servers with many ranks have metrics of some megabytes
_MAX_EVENT = 4 << 20  # bytes; SGLang repeats in each event all the text up to it
_MAX_METRICS_LINE = 64 << 10  # characters; the deadline is checked once a line
_METRICS_TIMEOUT = 5.0  # seconds
_GRACE = 2.0  # seconds for a thread to notice that its connection was cut
_CACHED, _PROMPT = "cached_tokens_total", "prompt_tokens_total"
_METRIC_NAME = re.compile(r"\s*([\w:]+)")

T = TypeVar("T")


class Deadline:
    """A point in time at which every connection opened under it is cut.

    The waiting thread cuts the connections, because the timeout of a socket begins anew with each byte.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends = time.monotonic() + seconds
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def left(self) -> float:
        """Return the seconds until the deadline, 0 when it has passed."""
        return max(0.0, self._ends - time.monotonic())

    def check(self) -> None:
        """Raise TimeoutError when the deadline has passed: a connection that was cut looks like one that ended."""
        if not self.left():
            raise TimeoutError(self.message)

    @property
    def message(self) -> str:
        """Return the message of the TimeoutError."""
        return f"not finished within {self.seconds:g} s"

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Replace the errors of a connection that was cut with TimeoutError."""
        try:
            yield
        except (OSError, httpx.HTTPError, httpx.StreamError, ValueError) as error:
            if isinstance(error, TimeoutError) or not self.left():
                raise TimeoutError(self.message) from error
            raise
        self.check()

    def wait(self, threads: Iterable[threading.Thread]) -> None:
        """Wait for `threads`, cut their connections at the deadline, then give the threads `_GRACE` to end."""
        threads = list(threads)
        try:
            for thread in threads:
                thread.join(self.left())
        finally:
            self.cut()
        grace = time.monotonic() + _GRACE
        for thread in threads:
            thread.join(max(0.0, grace - time.monotonic()))

    def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns or raise what it raises; raise TimeoutError if it misses the deadline."""
        done: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                done.append(function())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.wait([thread])
        if failed:
            raise failed[0]
        if not done:
            raise TimeoutError(self.message)
        return done[0]

    def add(self, connected: socket.socket) -> None:
        """Register a socket to be cut at the deadline; raise TimeoutError when that has passed."""
        with self._lock:
            self._open.add(connected)
        self.check()

    def remove(self, connected: socket.socket) -> None:
        """Unregister a socket."""
        with self._lock:
            self._open.discard(connected)

    def cut(self) -> None:
        """Shut down all registered sockets."""
        with self._lock:
            for connected in self._open:
                with contextlib.suppress(OSError):
                    # Not the shutdown of an SSLSocket, which would first wait for the server's goodbye.
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)


class Connection:
    """One connection to the server at `url`, cut at `deadline`: requests on it then raise TimeoutError."""

    def __init__(self, url: str, deadline: Deadline, ssl_context: ssl.SSLContext | None = None) -> None:
        tls = check_url(url).scheme == "https"
        self._url, self._deadline = url, deadline
        self._sockets: list[socket.socket] = []
        self._client = httpx.Client(
            # The system's certificates rather than certifi's. A batch shares the context, which takes long to create.
            verify=(ssl_context or ssl.create_default_context()) if tls else False,
            timeout=deadline.left(),
            trust_env=False,  # a proxy would be measured, too
            headers={"Accept-Encoding": "identity"},
        )

    @contextlib.contextmanager
    def request(
        self, method: str, path: str, json: Any = None, on_connected: Callable[[], object] = lambda: None
    ) -> Iterator[httpx.Response]:
        """Connect, call `on_connected`, send a request and yield its response, of which nothing has been read.

        Raises:
            TimeoutError: the deadline has passed.
            httpx.HTTPError: the connection failed, or what the server sent is not HTTP.
        """

        def trace(event: str, info: dict[str, Any]) -> None:
            if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                stream = info["return_value"]
                self._sockets.append(stream.get_extra_info("socket"))
                try:
                    self._deadline.add(self._sockets[-1])
                except TimeoutError:
                    stream.close()
                    raise
            elif event == "http11.send_request_headers.started":
                on_connected()
            elif event == "http11.receive_response_headers.started":
                self._check_protocol()

        url = self._url.rstrip("/") + path
        with self._deadline.enforced():
            self._deadline.check()
            try:
                with self._client.stream(method, url, json=json, extensions={"trace": trace}) as response:
                    yield response
            except httpx.ConnectError as error:
                raise ValueError(f"cannot connect to {self._url}: {error}") from error

    def _check_protocol(self) -> None:
        """Raise ValueError if the first line is not HTTP. httpx would wait for more of it, and not report the line."""
        connected = self._sockets[-1]
        if isinstance(connected, ssl.SSLSocket):  # whose data cannot be peeked at
            return
        connected.settimeout(self._deadline.left())
        line, newline, _ = connected.recv(100, socket.MSG_PEEK).partition(b"\n")
        if newline and not line.startswith(b"HTTP/"):
            raise ValueError(f"answered with {one_line(line.decode(errors='replace'))!r} instead of HTTP")

    def close(self) -> None:
        """Close the connection."""
        for connected in self._sockets:
            self._deadline.remove(connected)
        self._client.close()


def check_url(url: str) -> SplitResult:
    """Return the parts of `url`; raise ValueError unless it is an http address whose every part is used."""
    try:
        parts = urlsplit(url)
        port = parts.port  # raises ValueError for a number that is no port
        (parts.hostname or "").encode("idna")  # raises ValueError for a bad name
    except ValueError as error:
        raise ValueError(f"url must be such as http://localhost:30000, got {_shorten(url)}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"url must be such as http://localhost:30000, got {_shorten(url)}")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"url must have no user, query or fragment, got {_shorten(url)}")
    if not url.isprintable() or " " in url or not parts.path.isascii():
        raise ValueError(f"url must have no spaces and a path in ASCII, got {_shorten(url)}")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url must be such as http://localhost:30000, got {_shorten(url)}: {error}") from None
    return parts


def read_body(response: httpx.Response, max_bytes: int) -> bytes:
    """Return the first `max_bytes` of the body as they were sent: a compressed body may expand to any size."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= max_bytes:
            break
    return bytes(body[:max_bytes])


class _EventBytes(httpx.SyncByteStream):
    """The body of `response`; iteration raises ValueError when an event is too long."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.pending = 0  # bytes since the last event

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._response.iter_raw():
            self.pending += len(chunk)
            if self.pending > _MAX_EVENT:
                raise ValueError(f"an event is longer than {_MAX_EVENT >> 20} MiB")
            yield chunk
        yield b"\n\n"  # ends the last event, where the server did not


def iterate_events(response: httpx.Response) -> Iterator[str]:
    """Yield the data of each server-sent event as it arrives; raise ValueError for an event that is too long."""
    stream = _EventBytes(response)
    # A response without the server's headers: its Content-Encoding or charset could expand what it sends to any size.
    limited = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=stream)
    for event in EventSource(limited).iter_sse():
        stream.pending = 0
        if event.data:
            yield event.data


def get_cache_tokens_from_metrics(url: str) -> tuple[float, float] | None:
    """Return (cached_tokens_total, prompt_tokens_total) of the server at `url`, from its `/metrics`.

    Each is summed over labels. Names may have a prefix, as in `sglang:prompt_tokens_total`. A counter of cached tokens
    that does not exist yet is zero. The result is None where the server answers with an HTTP error, which means that it
    serves no metrics. For any other failure the result is None with one RuntimeWarning that says what happened: the
    server cannot be reached, its metrics are not received and parsed within 5 seconds, they are longer than 16 MiB, or
    they have no such counters. Raises nothing.
    """
    deadline = Deadline(_METRICS_TIMEOUT)
    try:
        path = "" if check_url(url).path.rstrip("/").endswith("/metrics") else "/metrics"
        return deadline.call(lambda: _read_metrics(url, path, deadline))
    except Exception as error:
        reason = one_line(str(error) or type(error).__name__)
        warnings.warn(f"no cache metrics from {one_line(url)}: {reason}", RuntimeWarning, stacklevel=2)
        return None


def _read_metrics(url: str, path: str, deadline: Deadline) -> tuple[float, float] | None:
    connection = Connection(url, deadline)
    with contextlib.closing(connection), connection.request("GET", path) as response:
        body = read_body(response, _MAX_BODY + 1)
    if len(body) > _MAX_BODY:
        raise ValueError(f"{path or url} is longer than {_MAX_BODY >> 20} MiB")
    if response.status_code >= 400:
        return None
    if response.status_code != 200:
        raise ValueError(f"HTTP status {response.status_code}")
    return _sum_counters(body.decode(), deadline)


def _sum_counters(text: str, deadline: Deadline) -> tuple[float, float]:
    """Sum both counters. Other metrics are not parsed, because parsing takes a second for each megabyte."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise RuntimeError("reading them needs prometheus_client: pip install 'jitnorm[bench]'") from error
    totals: dict[str, float] = {}
    for line in text.split("\n"):
        deadline.check()
        name = match[1].rpartition(":")[2] if (match := _METRIC_NAME.match(line)) else ""
        if name not in (_CACHED, _PROMPT):
            continue
        if len(line) > _MAX_METRICS_LINE:
            raise ValueError(f"/metrics has a line of {len(line)} characters")
        for family in text_string_to_metric_families(line):
            for sample in family.samples:
                totals[name] = totals.get(name, 0.0) + float(sample.value)
    if _PROMPT not in totals:
        raise ValueError(f"/metrics has no {_PROMPT}")
    if not all(map(math.isfinite, totals.values())):
        raise ValueError(f"/metrics has a counter that is not finite: {totals}")
    return totals.get(_CACHED, 0.0), totals[_PROMPT]


def one_line(text: str) -> str:
    """Return the beginning of what a server sent, without control characters and line breaks."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def _shorten(url: str) -> str:
    return repr(url if len(url) <= 100 else f"{url[:100]}...")

"""HTTP under a deadline, with limits on what is read: no server holds anybody up, or fills the memory."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

_MAX_BODY = 16 << 20  # bytes; servers with many ranks have metrics of some megabytes
_MAX_EVENT = 4 << 20  # bytes; SGLang repeats in each event all the text up to it
_GRACE = 2.0  # seconds for a thread to notice that its connection was cut

T = TypeVar("T")


class Deadline:
    """A point in time at which every connection that was opened under it is cut.

    The thread that waits cuts the connections, since a socket's own timeout begins anew with each byte.
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
        """Raise TimeoutError when the deadline has passed: what was cut then looks like an end."""
        if not self.left():
            raise TimeoutError(self.message)

    @property
    def message(self) -> str:
        """Return what a TimeoutError says."""
        return f"not finished within {self.seconds:g} s"

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Turn what comes of a cut connection into the TimeoutError that it is."""
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, TimeoutError) or not self.left():
                raise TimeoutError(self.message) from error
            raise
        self.check()

    def wait(self, threads: Iterable[threading.Thread]) -> None:
        """Wait for `threads`, cut their connections at the deadline, and give them a moment to end."""
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
        """Return what `function` returns or raise what it raises; TimeoutError when it is not done by the deadline."""
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

    def add(self, one: socket.socket) -> None:
        """Have `one` cut at the deadline; TimeoutError when that has passed."""
        with self._lock:
            self._open.add(one)
        self.check()

    def remove(self, one: socket.socket) -> None:
        """Leave `one` alone at the deadline."""
        with self._lock:
            self._open.discard(one)

    def cut(self) -> None:
        """Cut the connections that are open."""
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(one, socket.SHUT_RDWR)  # TLS' own would first take leave of the server


class Connection:
    """A connection to the host of `url`, cut at `deadline`: whoever waits for it then gets a TimeoutError."""

    def __init__(self, url: str, deadline: Deadline) -> None:
        parts = split(url)
        host, tls = parts.hostname or "", parts.scheme == "https"
        self._http: http.client.HTTPConnection
        port = parts.port or (443 if tls else 80)
        self._deadline, self._path = deadline, parts.path.rstrip("/")
        deadline.check()
        with deadline.enforced():
            self._socket = socket.create_connection((host, port), timeout=deadline.left())
        try:
            with deadline.enforced():
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if tls:
                    context = ssl.create_default_context()
                    # The handshake waits until the deadline knows the socket.
                    secured = context.wrap_socket(self._socket, server_hostname=host, do_handshake_on_connect=False)
                    self._socket = secured
                    deadline.add(secured)
                    secured.do_handshake()
                    self._http = http.client.HTTPSConnection(host, port, context=context)
                else:
                    deadline.add(self._socket)
                    self._http = http.client.HTTPConnection(host, port)
        except BaseException:
            self._close_socket()
            raise
        self._http.sock = self._socket

    @contextlib.contextmanager
    def request(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield its response, to be read; TimeoutError when the deadline passes meanwhile."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with self._deadline.enforced():
            self._http.request(method, self._path + path, body, headers)
            with self._http.getresponse() as response:
                yield response

    def close(self) -> None:
        """Close the connection."""
        self._http.close()
        self._close_socket()

    def _close_socket(self) -> None:
        self._deadline.remove(self._socket)
        self._socket.close()


def split(url: str) -> SplitResult:
    """Return the parts of `url`. ValueError for what is no http address, or has parts that would not be used."""
    try:
        parts = urlsplit(url)
        port = parts.port  # ValueError for one that is no port
        (parts.hostname or "").encode("idna")  # likewise for names that are none
    except ValueError as error:
        raise ValueError(f"url must be such as http://localhost:30000, got {_shown(url)}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"url must be such as http://localhost:30000, got {_shown(url)}")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"url must have no user, query or fragment, got {_shown(url)}")
    if not url.isprintable() or " " in url or not parts.path.isascii():
        raise ValueError(f"url must have no spaces and a path in ASCII, got {_shown(url)}")
    return parts


def get(url: str, path: str, deadline: Deadline) -> tuple[int, bytes]:
    """Return status and body. ValueError for a body that is too long."""
    with contextlib.closing(Connection(url, deadline)) as connection, connection.request("GET", path) as response:
        body = response.read(_MAX_BODY + 1)
        if len(body) > _MAX_BODY:
            raise ValueError(f"{path or url} is longer than {_MAX_BODY >> 20} MiB")
        return response.status, body


def events(response: http.client.HTTPResponse) -> Iterator[str]:
    """Yield the data of each server-sent event as it arrives. ValueError for an event that is too long."""
    data: list[str] = []
    size = 0
    while raw := response.readline(_MAX_EVENT + 1):
        if len(raw) + size > _MAX_EVENT:
            raise ValueError(f"an event is longer than {_MAX_EVENT >> 20} MiB")
        line = raw.decode().rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
            size += len(raw)
        elif not line and data:
            yield "\n".join(data)
            data, size = [], 0
    if data:
        yield "\n".join(data)


def one_line(text: str) -> str:
    """Return the beginning of what a server sent, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def _shown(url: str) -> str:
    return repr(url if len(url) <= 100 else f"{url[:100]}...")

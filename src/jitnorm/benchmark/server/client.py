"""HTTP with a time limit on the whole exchange: a server that sends a byte now and then holds nobody up."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit


class Connection:
    """To the host of `url`, open for `timeout` seconds at most; then whoever waits for it gets a TimeoutError."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = split(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._timeout, self._ends, self._over = timeout, time.monotonic() + timeout, False
        self._http = kind(parts.hostname or "", parts.port, timeout=timeout)
        self._path = parts.path.rstrip("/")
        self._http.connect()
        self._socket: socket.socket = self._http.sock
        self._watch = threading.Timer(max(0, self._ends - time.monotonic()), self._cut)
        self._watch.daemon = True
        self._watch.start()

    @contextlib.contextmanager
    def request(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        """The answer, to be read. An exception while it is read is a TimeoutError where the time is over."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            self._http.request(method, self._path + path, body, headers)
            yield self._http.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.check()
            if isinstance(error, TimeoutError):
                raise TimeoutError(self._too_late()) from error
            raise

    def check(self) -> None:
        """TimeoutError where the time is over: what was cut off then looks like an end."""
        if self._over:
            raise TimeoutError(self._too_late())

    def close(self) -> None:
        self._watch.cancel()
        self._http.close()

    def _cut(self) -> None:
        self._over = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _too_late(self) -> str:
        return f"not finished within {self._timeout:g} s"


def split(url: str) -> SplitResult:
    """ValueError for what is no http address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url must be such as http://localhost:30000, got {url!r}")
    return parts


def get(url: str, path: str, timeout: float) -> tuple[int, bytes]:
    """Status and body."""
    with contextlib.closing(Connection(url, timeout)) as connection:
        with connection.request("GET", path) as response:
            body = response.read()
        connection.check()
        return response.status, body


def events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event, as it arrives."""
    data: list[str] = []
    for raw in response:
        line = raw.decode().rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)

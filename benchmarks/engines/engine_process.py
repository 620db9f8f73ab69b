"""Run an engine in a process of its own, which answers calls until it is closed.

Several variants of an engine are alive at once and measured in turns. Each needs its own environment variables and its
own patches, so each needs its own process. A call that takes too long ends the process, not the run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LOG_LINES = 12  # that an error message shows
START_METHOD = "spawn"  # of multiprocessing: a forked process cannot use CUDA


class EngineError(RuntimeError):
    """The engine raised an exception, took too long or ended. Its message is one line."""


class EngineProcess:
    """An engine that starts in a process of its own at once; `wait` returns when it is ready.

    Args:
        name: what error messages call it.
        factory: returns the engine. It belongs to a module, as the process is spawned, and imports the engine's
            package when it is called, after the environment is set. The engine has a method `prepare()`, which is
            called once, and which the start-up time does not include. That begins with the process, or at the
            engine's `begin` by time.monotonic, where it has one.
        settings: the arguments of `factory`.
        environment: variables that are set before the factory runs.
        log: the file that the output of the process goes to; None leaves it on the terminal.
    """

    def __init__(
        self,
        name: str,
        factory: Callable[..., Any],
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path | None = None,
    ) -> None:
        self.name, self.log = name, log
        context = multiprocessing.get_context(START_METHOD)
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, factory, dict(settings), dict(environment), log, time.monotonic())
        )
        self._process.start()
        child.close()  # so that the end of the process is the end of the connection
        self._failure: str | None = None

    @property
    def is_alive(self) -> bool:
        """Return whether it can answer calls."""
        return self._failure is None

    def wait(self, seconds: float) -> float:
        """Return the start-up time: how many seconds passed until the engine could generate."""
        try:
            return float(self._receive("its start", seconds))
        except EngineError as error:
            self._failure = str(error)
            raise

    def call(self, method: str, seconds: float, **arguments: Any) -> Any:
        """Call a method of the engine and return its result, which can be pickled.

        Raises:
            EngineError: the method raised, or did not return within `seconds`, or the process ended. In the last two
                cases the process is killed, and every later call raises the same.
        """
        if self._failure:
            raise EngineError(self._failure)
        with contextlib.suppress(BrokenPipeError):  # it ended: _receive reports that
            self._connection.send((method, arguments))
        return self._receive(method, seconds)

    def _receive(self, what: str, seconds: float) -> Any:
        if self._failure:
            raise EngineError(self._failure)
        try:
            if self._connection.poll(max(0.0, seconds)):
                failure, result = self._connection.recv()
                if failure:
                    raise EngineError(f"{self.name}: {failure}")
                return result
            self._failure = f"{self.name}: {what} took longer than {seconds:.0f} s"
        except (EOFError, ConnectionResetError):
            self._process.join()
            self._failure = f"{self.name}: the process ended with status {self._process.exitcode} during {what}"
        self.close()
        raise EngineError(self._failure)

    def last_lines(self) -> str:
        """Return the end of what the process printed, as far as it went to a file."""
        if not self.log or not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def close(self, seconds: float = 20) -> None:
        """Let the process end, and kill what is left of it and of the processes that it started."""
        if self._failure is None:
            self._failure = f"{self.name} was closed"
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(seconds)
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(
    connection: Connection,
    factory: Callable[..., Any],
    settings: dict[str, Any],
    environment: dict[str, str],
    log: Path | None,
    begin: float,
) -> None:
    """Create the engine, send the seconds since `begin`, and answer calls until the connection ends."""
    os.setpgrp()  # so that the processes that it starts can be killed with it
    os.environ.update(environment)
    if log:
        with log.open("ab", buffering=0) as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)

    def answer(function: Callable[[], Any]) -> bool:
        try:
            result = function()
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            connection.send((f"{type(error).__name__}: {text[:400]}", None))
            return False
        connection.send((None, result))
        return True

    engine = None

    def start() -> float:
        nonlocal engine
        engine = factory(**settings)
        seconds = time.monotonic() - getattr(engine, "begin", begin)  # of one clock for all processes of a machine
        engine.prepare()
        return seconds

    if answer(start):
        with contextlib.suppress(EOFError):  # the parent ended
            while call := connection.recv():
                method, arguments = call
                answer(lambda method=method, arguments=arguments: getattr(engine, method)(**arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines wait for threads and processes of theirs, some of them for ever

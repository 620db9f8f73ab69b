"""Processes that run a script: fresh ones, and forks of a server that has imported torch, or torch and jitnorm.

Importing torch takes a second or more, and a fork milliseconds. A fork is as good as a fresh process for whatever
happens after the imports: it has loaded no kernel, and it gets an environment, pipes and a working folder of its own.
Run as a program, this file is that server; its arguments are a socket and the modules that it imports.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from typing import IO, Any

_SERVER_LIMIT_S = 120.0


class Forked:
    """A process that the server has forked, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, server: socket.socket, script: str, environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        child_in, parent_in = os.pipe()
        self._status, child_status = os.pipe()
        parent_out, child_out = os.pipe()
        self._error = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        request = json.dumps({"script": script, "environment": environment, "folder": os.getcwd()}).encode()
        ends = [child_in, child_out, self._error.fileno(), child_status]
        server.sendmsg([f"{len(request)}\n".encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ends))])
        server.sendall(request)
        for fd in (child_in, child_out, child_status):
            os.close(fd)
        self.stdin: IO[str] = os.fdopen(parent_in, "w")
        self.stdout: IO[str] = os.fdopen(parent_out)
        self.pid = int(self._read_line(_SERVER_LIMIT_S) or "-1")
        assert self.pid > 0, "the fork server has ended"

    def _read_line(self, seconds: float | None) -> str:
        """Return a line of the status pipe, an empty one where none comes in time."""
        ready, _, _ = select.select([self._status], [], [], seconds)
        line = b""
        while ready and not line.endswith(b"\n"):
            if not (part := os.read(self._status, 1)):
                break
            line += part
        return line.decode().strip()

    def poll(self) -> int | None:
        if self.returncode is None and (line := self._read_line(0)):
            self.returncode = int(line)
        return self.returncode

    def wait(self, timeout: float = _SERVER_LIMIT_S) -> int:
        if self.returncode is None:
            line = self._read_line(timeout)
            if not line:
                raise subprocess.TimeoutExpired("a forked script", timeout)
            self.returncode = int(line)
        return self.returncode

    def communicate(self, timeout: float = _SERVER_LIMIT_S) -> tuple[str, str]:
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        out = b""
        deadline = time.monotonic() + timeout
        while self.poll() is None or _readable(self.stdout.fileno(), 0):
            # What the process has started may keep its pipe open: after its end only what is there is read.
            if _readable(self.stdout.fileno(), 0.02):
                part = os.read(self.stdout.fileno(), 1 << 16)
                out += part
                if not part:
                    self.wait(max(0.0, deadline - time.monotonic()))
                    break
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked script", timeout)
        self.stdout.close()
        os.close(self._status)
        self._error.seek(0)
        with self._error:
            return out.decode(), self._error.read().decode()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _readable(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


class ForkServer:
    """A server that has imported `modules`; it is started by the first `start`."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, script: str, environment: dict[str, str]) -> Forked:
        if self._socket is None:
            self._socket, theirs = socket.socketpair()
            command = [sys.executable, __file__, str(theirs.fileno()), *self._modules]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
        return Forked(self._socket, script, environment)

    def close(self) -> None:
        if self._socket and self._process:
            self._socket.close()
            self._process.wait(_SERVER_LIMIT_S)
            self._socket = self._process = None


_TORCH = ForkServer("torch")
_JITNORM = ForkServer("torch", "ninja", "platformdirs", "cuda.pathfinder", "jitnorm.jit.build", "jitnorm.rmsnorm")


def close_servers() -> None:
    _TORCH.close()
    _JITNORM.close()


def start_method_with_torch() -> str:
    """Returns the start method of multiprocessing for processes that import torch, but use no GPU."""
    multiprocessing.set_forkserver_preload(["torch"])
    return "forkserver"


def _environment(changes: dict[str, str | None]) -> dict[str, str]:
    environment = {**os.environ, **{k: v for k, v in changes.items() if v is not None}}
    for name, value in changes.items():
        if value is None:
            environment.pop(name, None)
    return environment


def _joined(script: tuple[str, ...]) -> str:
    return "\n".join(textwrap.dedent(part) for part in script)


def start(*script: str, **environment: str | None) -> Forked:
    """Starts a fork that has imported jitnorm and runs the parts of `script`. A variable that is None is removed."""
    return _JITNORM.start(_joined(script), _environment(environment))


def run(*script: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs the parts of `script` in a fork that has imported jitnorm, to its end."""
    return _run(_JITNORM, script, environment)


def run_before_import(*script: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs the parts of `script` in a fork that has imported torch, but not jitnorm, to its end."""
    return _run(_TORCH, script, environment)


def run_fresh(*script: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs the parts of `script` in a new Python: for what happens before torch's import, or what that import reads."""
    command = [sys.executable, "-c", _joined(script)]
    return subprocess.run(command, env=_environment(environment), capture_output=True, text=True, timeout=120)


def _run(
    server: ForkServer, script: tuple[str, ...], environment: dict[str, str | None]
) -> subprocess.CompletedProcess[str]:
    process = server.start(_joined(script), _environment(environment))
    out, err = process.communicate()
    return subprocess.CompletedProcess("a forked script", process.wait(), out, err)


# The server


def _serve(connection: socket.socket, modules: list[str]) -> None:
    import concurrent.futures.thread
    import multiprocessing.util

    import torch

    for module in modules:
        importlib.import_module(module)
    assert multiprocessing.util and concurrent.futures.thread
    torch.set_num_threads(1)  # threads of OpenMP would be missing in a fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for monitors
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is pytest's
    size = array.array("i").itemsize
    while True:
        head, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4 * size))
        if not head:
            return
        while not head.endswith(b"\n"):
            head += connection.recv(1)
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        request = b""
        while len(request) < int(head):
            request += connection.recv(int(head) - len(request))
        if os.fork() == 0:
            connection.close()
            _monitor(json.loads(request), *fds)
        for fd in fds:
            os.close(fd)


def _monitor(request: dict[str, Any], stdin: int, stdout: int, stderr: int, status: int) -> None:
    """Forks the process, and writes its id and then its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(status)
        for fd, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(fd, number)
            os.close(fd)
        os._exit(_execute(request))
    for fd in (stdin, stdout, stderr):
        os.close(fd)
    os.write(status, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{code}\n".encode())
    os._exit(0)


def _execute(request: dict[str, Any]) -> int:
    import atexit

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # which TMPDIR may name
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    code = 0
    try:
        exec(compile(request["script"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return code


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])

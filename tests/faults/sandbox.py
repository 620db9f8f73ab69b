"""A sandbox for one fault: a small cache, a stand-in compiler, canaries, and operations in child processes.

A worker imports torch and jitnorm once and forks a child for each operation, so that each child has a jitnorm that
has loaded nothing. What a child did comes back as a `Report`; what is wrong with it is said by `Sandbox.judge`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import os
import random
import select
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import jitnorm
import jitnorm.cli
from faults.inject import Injection, library
from jitnorm.core.operators import OPERATORS
from jitnorm.jit.find import find
from jitnorm.jit.load import load
from jitnorm.jit.spec import Target

# What jitnorm imports only when it builds; in a child each import would be paid for again.
for _module in [
    "filelock",
    "multiprocessing.util",
    "ninja",
    "platformdirs",
    "jitnorm.jit.build",
    "jitnorm.cli.cache",
    "jitnorm.cli.diagnostics",
    "jitnorm.cli.doctor",
    "jitnorm.cli.warmup",
    "tabulate",
    "tvm_ffi",
    "jitnorm.warmup.run",
    "cuda.pathfinder",
    "concurrent.futures.thread",
    "encodings.idna",
    "encodings.latin_1",
]:
    with contextlib.suppress(ImportError):
        __import__(_module)

HANG_S = float(os.environ.get("FAULTS_HANG_S", "60"))  # only to notice a hang: nothing takes so long
ORPHANS_S = 15.0  # in which what a dead process started must have ended
FOREIGN_USER = 12345
STRAYS = ("a", "stray")  # what faults put anywhere, and nobody need remove


@dataclass
class Report:
    """How an operation ended."""

    operation: str
    ended: str  # right, wrong, raised, exit, crash, killed, hang
    detail: str = ""
    output: str = ""
    fired: bool = False
    compilations: int = 0

    def __str__(self) -> str:
        return f"{self.operation}: {self.ended} {self.detail}".rstrip()


@dataclass(frozen=True)
class Kernel:
    """A kernel that the operations load, and a call of it."""

    name: str
    spec: Any
    call: Callable[[], torch.Tensor]
    expected: torch.Tensor
    warmup: tuple[str, ...]

    def is_right(self) -> bool:
        error = (self.call().double() - self.expected).norm() / self.expected.norm()
        return bool(error < 1e-2)  # of per-token float8, with its scale; the others are far below


def _kernels() -> dict[str, Kernel]:
    cpu, f32 = Target("cpu"), torch.float32
    random_ = torch.Generator().manual_seed(1)
    x, w = torch.randn(3, 64, generator=random_), torch.randn(64, generator=random_)
    wide = torch.randn(3, 128, generator=random_)
    exact = x.double()
    gate, up = wide.double().chunk(2, dim=-1)

    def silu() -> torch.Tensor:
        return jitnorm.silu_and_mul(wide)

    def quantised() -> torch.Tensor:
        q, s = torch.empty(3, 64, dtype=torch.float8_e4m3fn), torch.empty(3, 1)
        jitnorm.per_token_quant_fp8(x, q, s)
        return torch.cat((s * 448, q.float().sign()), dim=-1)

    def gemma() -> torch.Tensor:
        return jitnorm.gemma_rmsnorm(x, w)

    root = torch.sqrt((exact * exact).mean(dim=-1, keepdim=True) + 1e-6)
    signs = torch.where(exact.abs() / exact.abs().amax(-1, True) * 448 < 2**-10, 0.0, exact.sign())
    made = (
        Kernel(
            "rmsnorm",
            OPERATORS["rmsnorm"].spec(64, f32, f32, cpu),
            lambda: jitnorm.rmsnorm(x, w),
            exact / root * w.double(),
            ("--op", "rmsnorm", "--hidden-size", "64"),
        ),
        Kernel(
            "silu",
            OPERATORS["silu_and_mul"].spec(f32, 16, cpu),
            silu,
            gate / (1 + torch.exp(-gate)) * up,
            ("--op", "silu_and_mul"),
        ),
        Kernel(
            "per_token",
            OPERATORS["per_token_quant_fp8"].spec(f32, cpu),
            quantised,
            torch.cat((exact.abs().amax(-1, True), signs), dim=-1),
            ("--op", "per_token_quant_fp8"),
        ),
        Kernel(
            "gemma",
            OPERATORS["gemma_rmsnorm"].spec(64, f32, f32, cpu),
            gemma,
            exact / root * (1 + w.double()),
            ("--op", "gemma_rmsnorm", "--hidden-size", "64"),
        ),
    )
    return {kernel.name: kernel for kernel in made}


KERNELS = _kernels()
STATES = ("rmsnorm", "silu", "per_token")  # what a cache may hold before a fault; "gemma" is always built afterwards
COMMANDS: dict[str, tuple[str, ...]] = {
    "ls": ("cache", "ls"),
    "ls --format json": ("cache", "ls", "--format", "json"),
    "show": ("cache", "show", KERNELS["rmsnorm"].spec.name),
    "verify": ("cache", "verify"),
    "prune": ("cache", "prune", "--yes"),
    "prune --max-size": ("cache", "prune", "--max-size", "0", "--yes"),
    "clear": ("cache", "clear", "--yes"),
    "clear --filter": ("cache", "clear", "--filter", "name=rmsnorm*", "--yes"),
    "clear --dry-run": ("cache", "clear", "--dry-run"),
    "doctor": ("doctor",),
    "warmup": ("warmup", *KERNELS["rmsnorm"].warmup, "--dtype", "fp32", "--device", "cpu"),
}


def _drop_capabilities() -> None:
    """Drops the capabilities of root, also for child processes, so that the modes of its own files apply."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return what lies in a folder: types, modes, owners, contents, and modification times of files."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        info = path.lstat()
        content = ""
        if stat.S_ISREG(info.st_mode) and info.st_size < 1 << 24:
            content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        time_ns = 0 if stat.S_ISDIR(info.st_mode) else info.st_mtime_ns
        found[str(path.relative_to(folder))] = (oct(info.st_mode), info.st_uid, content, time_ns)
    return found


@dataclass
class Sandbox:
    """The sandbox. Its folder is the same for all faults of a worker, so that paths of a warm cache stay valid."""

    folder: Path
    store: Path  # what the stand-in compiler copies
    real_compiler: str
    templates: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    mounted: list[Path] = field(default_factory=list)
    unprivileged: bool = True  # whether children lack root's powers over files
    environment: dict[str, str | None] = field(default_factory=dict)
    deleted_cwd: Path | None = None  # where children work, which they remove first

    @property
    def cache(self) -> Path:
        return self.folder / "home" / "cache"

    @property
    def prebuilt(self) -> Path:
        return self.folder / "prebuilt"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def marker(self) -> Path:
        return self.folder / "foreign-code-ran"

    def reset(self) -> None:
        """Makes everything anew, with an empty cache."""
        for place in reversed(self.mounted):
            ctypes.CDLL(None).umount2(os.fsencode(place), 2)
        if self.folder.exists():
            remove(self.folder)
        for name in ("home", "outside/folder", "bin", "tmp"):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        (self.outside / "file").write_text("not jitnorm's\n")
        (self.outside / "folder" / "file").write_text("nor this\n")
        (self.bin / "c++").symlink_to(self.store / "compiler")
        (self.bin / "store").symlink_to(self.store)
        (self.bin / "real").symlink_to(self.real_compiler)
        self.compiler("ok")
        self.problems, self.history, self.mounted = [], [], []
        self.environment, self.deleted_cwd, self.unprivileged = {}, None, True
        self._canaries = snapshot(self.outside)
        self._prebuilt_before: dict[str, tuple[Any, ...]] | None = None

    @functools.cached_property
    def is_privileged(self) -> bool:
        """Whether this process may give files away and make devices, as root mostly may."""
        probe = self.folder / "probe"
        try:
            os.mknod(probe, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            os.chown(probe, FOREIGN_USER, FOREIGN_USER)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
        return True

    def compiler(self, mode: str) -> None:
        """Tells the stand-in compiler what to do."""
        (self.bin / "mode").write_text(f"{mode}\n")
        for name in ("used", "go", "started"):
            (self.bin / name).unlink(missing_ok=True)

    def compilations(self) -> int:
        log = self.bin / "log"
        return log.stat().st_size if log.exists() else 0

    def describe(self, text: str) -> None:
        """Adds to the description of the fault."""
        self.history.append(text)

    def add_problem(self, text: str) -> None:
        self.problems.append(text)

    # States

    def warm(self, names: Sequence[str], to: Path | None = None) -> None:
        """Puts kernels that were built earlier into the cache, or into `to`."""
        for name in names:
            shutil.copytree(self.templates[name], to or self.cache, dirs_exist_ok=True)

    def snapshot_outside(self) -> None:
        """Takes what lies outside as what must stay, the prebuilt layer included."""
        self._canaries = snapshot(self.outside)
        self._prebuilt_before = self._prebuilt_now()

    def _prebuilt_now(self) -> dict[str, tuple[Any, ...]] | None:
        if not self.prebuilt.is_dir():
            return None
        # Who loads an entry touches its manifest where it can.
        return {name: what if "manifest" not in name else what[:3] for name, what in snapshot(self.prebuilt).items()}

    def random_state(self, rng: random.Random, needs: Sequence[str] = (), leftovers: bool = True) -> list[str]:
        """Makes the cache empty, warm or littered, and returns what it holds."""
        names = [name for name in STATES if name in needs or rng.random() < 0.5]
        if names:
            self.warm(names)
        if leftovers and rng.random() < 0.25:
            nth = rng.randrange(1, 40)
            self.describe("left by a killed build")
            self.run("load silu" if "silu" not in names else "load gemma", arm=Injection(_WRITES, nth, "kill"))
            self.history[-1] += f" (call {nth})"
        self.describe(f"warm: {' '.join(names) or 'nothing'}")
        return names

    # Operations

    def start(
        self,
        operation: str,
        arm: Injection | None = None,
        before: Callable[[], None] | None = None,
        tools: Injection | None = None,
    ) -> Child:
        """Starts an operation in a child: "load NAME...", "find NAME", a name of COMMANDS, or "hold NAME"."""
        read, write = os.pipe()
        output = os.open(self.folder, os.O_RDWR | os.O_TMPFILE | os.O_APPEND, 0o600)
        compiled = self.compilations()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                self._in_child(operation, write, output, arm, before, tools)
            finally:
                os._exit(97)
        os.close(write)
        return Child(self, operation, pid, read, output, compiled)

    def run(self, operation: str, **more: Any) -> Report:
        """Starts an operation, and waits for its end."""
        return self.start(operation, **more).end()

    def _in_child(
        self,
        operation: str,
        write: int,
        output: int,
        arm: Injection | None,
        before: Callable[[], None] | None,
        tools: Injection | None,
    ) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        # as Python makes it: what cannot be encoded is escaped
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", write_through=True)
        sys.stdin = open(os.devnull)  # noqa: SIM115 - until the process ends
        os.environ.update(self._environment(tools))
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(self.deleted_cwd or self.folder)
        if self.deleted_cwd:
            self.deleted_cwd.rmdir()
        if os.geteuid() == 0 and self.unprivileged:
            _drop_capabilities()
        report = Report(operation, "wrong")
        try:
            if before:
                before()
            if arm:
                arm.arm(self.cache)
            report.ended, report.detail = perform(operation, write)
        except KeyboardInterrupt:
            report.ended = "interrupted"
        except BaseException as error:
            report.ended, report.detail = "raised", describe_error(error)
        preload = library()
        report.fired = bool(preload.fault_fired())
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        preload.fault_disarm()
        _lift_limits()
        os.write(write, json.dumps(vars(report)).encode(errors="replace") + b"\n")
        os._exit(0)

    def _environment(self, tools: Injection | None) -> dict[str, str]:
        return {
            "JITNORM_CACHE_DIR": str(self.cache),
            "CXX": str(self.bin / "c++"),
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
            "NVCC": "/nonexistent/nvcc",
            "FAULT_MARKER": str(self.marker),
            **(tools.environment(self.cache) if tools else {}),
        }

    # Checks

    def judge(self, report: Report, must_succeed: bool = False, allowed: Sequence[str] = ()) -> Report:
        """Notes what is wrong with the end of an operation."""
        if report.ended in ("crash", "hang", "wrong") or (report.ended == "killed" and "killed" not in allowed):
            self.add_problem(str(report))
        elif report.ended == "raised" and (
            report.operation in COMMANDS or not report.detail.startswith("RuntimeError: ")
        ):
            if report.detail.partition(":")[0] not in allowed:
                self.add_problem(str(report))
        elif must_succeed and (report.ended, report.detail) not in _SUCCESS and report.ended != "right":
            self.add_problem(f"{report} (it should have succeeded): {report.output[-300:]}")
        if "Traceback (most recent call last)" in report.output or "Exception ignored" in report.output:
            self.add_problem(f"{report.operation} printed a traceback: {report.output[-700:]}")
        if self.marker.exists():
            self.add_problem(f"{report.operation} ran foreign code")
            self.marker.unlink()
        return report

    def check_outside(self) -> None:
        """Notes what changed outside the cache."""
        for place, before, now in (
            ("outside", self._canaries, snapshot(self.outside)),
            ("prebuilt", self._prebuilt_before, self._prebuilt_now()),
        ):
            if before is not None and before != now:
                changed = sorted(n for n in {*before, *(now or {})} if before.get(n) != (now or {}).get(n))
                self.add_problem(f"{place} the cache changed: {', '.join(changed)}")
                if place == "outside":
                    self._canaries = now or {}

    def check_recovery(self) -> None:
        """Notes whether the next operations work once the fault is gone, and those after them without a build."""
        for again in (False, True):
            report = self.judge(self.run("load rmsnorm gemma"), must_succeed=True)
            if again and report.compilations:
                self.add_problem(f"not recovered: {report.compilations} builds in the second process after the fault")
                if report.output:
                    self.add_problem(report.output[-500:])
        staging = self.cache / "staging"
        folders = [p.name for p in staging.iterdir() if p.is_dir() and not p.is_symlink()] if staging.is_dir() else []
        if left := [name for name in folders if name not in STRAYS]:
            self.add_problem(f"left in staging after the next build: {', '.join(left)}")
        toolchains = self.cache / "toolchains"
        if toolchains.is_dir() and (drafts := [n for n in os.listdir(toolchains) if n.endswith(".tmp")]):
            self.add_problem(f"left in toolchains: {', '.join(drafts)}")
        self.check_outside()


_SUCCESS = (("exit", "0"), ("exit", "None"))
_WRITES = ("open", "write", "rename", "mkdir", "unlink", "fsync", "mode")


@dataclass
class Child:
    """An operation under way."""

    sandbox: Sandbox
    operation: str
    pid: int
    pipe: int
    output: int
    compiled: int
    _status: int | None = None
    _received: bytes = b""

    def wait_for_stop(self, limit: float = HANG_S) -> bool:
        """Waits until the child has stopped itself; False where it ended instead."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                return True
            if pid:
                self._status = status
                return False
            time.sleep(0.001)
        return False

    def wait_for(self, word: bytes, limit: float = HANG_S) -> bool:
        """Waits for a line that the operation "hold" writes."""
        until = time.monotonic() + limit
        while word not in self._received and time.monotonic() < until:
            if select.select([self.pipe], [], [], 0.1)[0]:
                chunk = os.read(self.pipe, 65536)
                if not chunk:
                    return False
                self._received += chunk
        return word in self._received

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self, limit: float) -> bool:
        """Waits at most so long for the child's end."""
        until = time.monotonic() + limit
        pause = 0.0005
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
            elif time.monotonic() > until:
                return False
            else:
                time.sleep(pause)
                pause = min(pause * 1.3, 0.01)
        return True

    def end(self, limit: float = HANG_S) -> Report:
        """Waits for the child's end, and returns how it was."""
        hung = not self.ended(limit)
        if hung:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.send(signal.SIGKILL)
            _, self._status = os.waitpid(self.pid, 0)
        while chunk := os.read(self.pipe, 1 << 20):
            self._received += chunk
        os.close(self.pipe)
        size = os.fstat(self.output).st_size
        output = os.pread(self.output, 20000, max(0, size - 20000)).decode(errors="replace")
        os.close(self.output)
        compiled = self.sandbox.compilations() - self.compiled
        last = self._received.splitlines()[-1] if self._received.splitlines() else b""
        if hung:
            return Report(self.operation, "hang", f"after {limit:.0f} s", output, True, compiled)
        if last.startswith(b"{"):
            return Report(**{**json.loads(last), "output": output, "compilations": compiled})
        status = self._status or 0
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            killed = "killed" if number == signal.SIGKILL else "crash"
            return Report(self.operation, killed, f"by signal {number}", output, True, compiled)
        return Report(self.operation, "crash", f"exit status {os.WEXITSTATUS(status)}", output, True, compiled)


def perform(operation: str, pipe: int) -> tuple[str, str]:
    """Carry an operation out, and return how it ended."""
    verb, *names = operation.split()
    if operation in COMMANDS:
        try:
            jitnorm.cli.main(COMMANDS[operation], prog_name="jitnorm")
        except SystemExit as end:
            return ("exit", str(end.code)) if end.code in (None, 0, 1) else ("wrong", f"exit status {end.code}")
        return "exit", "0"
    if verb == "find":
        found = find(KERNELS[names[0]].spec)
        return "right", "found" if found else "nothing found"
    if verb == "module":
        load(KERNELS[names[0]].spec)
        return "right", ""
    if verb in ("load", "hold", "twice"):
        for name in names * (2 if verb == "twice" else 1):
            try:
                if not KERNELS[name].is_right():
                    return "wrong", f"the result of {name} is wrong"
            except KeyboardInterrupt:
                if verb != "twice":
                    raise
        if verb == "hold":
            os.write(pipe, b"held\n")
            signal.pause()
        return "right", ""
    raise AssertionError(operation)


def describe_error(error: BaseException) -> str:
    """Return an exception in one line; RuntimeError's own subclasses that mean something else by their own names."""
    kind = type(error)
    is_documented = kind is RuntimeError or (isinstance(error, RuntimeError) and kind.__module__.startswith("jitnorm"))
    text = str(error)
    if is_documented and (not text.strip() or "please report" in text):
        return f"a RuntimeError that says nothing: {text!r}"
    name = "RuntimeError" if is_documented else kind.__name__
    where = (
        ""
        if is_documented
        else " at "
        + " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)[-4:])
        )
    )
    return f"{name}: {text[:300]}{where}".replace("\n", " | ")


def _lift_limits() -> None:
    import resource

    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (hard, hard))


def remove(path: Path) -> None:
    """Remove whatever is there, folders of mode 000 included."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(info.st_mode):
        path.unlink()
        return
    if info.st_mode & 0o700 != 0o700:
        path.chmod(0o700)
    for child in os.scandir(path):
        remove(Path(child.path))
    path.rmdir()


def orphans() -> Iterator[int]:
    """Yield what runs although the operation that started it has ended, once it had time to end."""
    until = time.monotonic() + ORPHANS_S
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        if time.monotonic() > until:
            break
        time.sleep(0.002)
    for pid in _children():
        yield pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found

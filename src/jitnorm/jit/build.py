"""Building one kernel: a private folder, ninja, a check of what the compilers wrote, and their first error."""

from __future__ import annotations

import datetime
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import tvm_ffi
from tvm_ffi import libinfo

from jitnorm._version import __version__
from jitnorm.jit import cache, toolchain
from jitnorm.jit.folder import Folder, Unfit, close
from jitnorm.jit.library import BadLibrary, ChildCheck, check_cubin, check_library
from jitnorm.jit.report import say
from jitnorm.jit.spec import CSRC, CUBIN_ASSEMBLY, KernelSpec


class BuildError(RuntimeError):
    """The compiler ran and failed."""


class BuildInterrupted(RuntimeError):
    """A signal ended the compiler. Nothing is wrong with the kernel, and the next call builds it again."""


class _Damaged(Exception):
    """The compilers succeeded, and what they wrote is not whole."""


_QUIET_S = 1.0  # a build that lasts longer says what it is
_REPORT_S = 30.0  # and then, this often, what it waits for
_BUILD_LIMIT_S = 900.0
_LOCK_S = 120.0  # a lock saves work; after this long, doing the work is quicker
_LOG = "build.log"
_MAX_LOG_BYTES = 1 << 26
_MAX_OUTPUT_BYTES = 1 << 28

# Its standard input is a pipe that nobody writes to: it ends when the process that wants the build closes it or ends,
# however it ends. Then ninja is terminated, which terminates the compilers. Both have a session of their own, so that
# Ctrl-C on a terminal reaches the process that wants the build alone.
_SUPERVISOR = """
exec 3<&0 </dev/null
"$0" 3<&- &
ninja=$!
{
  read -r _ <&3
  kill -TERM $ninja
  sleep 2
  for process in /proc/[0-9]*; do
    read -r stat < $process/stat
    set -- ${stat##*) }
    [ "$4" != $$ ] || kill -KILL ${process#/proc/}
  done
} >/dev/null 2>&1 &
watcher=$!
wait $ninja
status=$?
kill -KILL $watcher
exit $status
"""


def build(spec: KernelSpec, announce: bool = True) -> cache.Entry:
    """Build `spec` into the cache unless another process does first.

    Args:
        spec: what to build.
        announce: whether a build that lasts says so on stderr; false for a caller that shows its own progress.

    Returns:
        The entry, marked as in use.

    Raises:
        CannotKeep: the cache's folder cannot be written, or is full.
        BuildError: a compiler failed.
        BuildInterrupted: a signal ended it.
        RuntimeError: a compiler or ninja is missing.
    """
    spec.key  # noqa: B018  sources that cannot be read are no fault of the cache's
    place = cache.writable()
    tools = toolchain.require(spec.target.device, place)
    try:
        if entry := place.find(spec, tools.key):
            return entry
        with _lock(place, spec, tools.key):
            return place.find(spec, tools.key) or _build(spec, place, tools, announce)
    except (OSError, Unfit) as error:  # a full disk, say
        raise cache.CannotKeep(f"jitnorm cannot build {spec} in {place.root}: {error}") from error


def _build(spec: KernelSpec, place: cache.Cache, tools: toolchain.Toolchain, announce: bool) -> cache.Entry:
    for last_try in (False, True):
        started = time.monotonic()
        with place.staging(spec) as staging, ChildCheck() as child:
            write_sources(spec, staging, tools)
            _run_ninja(spec, place, staging, announce)
            try:
                content = _checked_output(spec, staging, child)
            except _Damaged as damage:
                _raise_if_full(place, spec, str(damage))
                if last_try:
                    raise BuildError(f"jitnorm cannot build {spec}: the compiler {tools.cxx.path} {damage}") from None
                continue  # it may have been a full disk or a killed linker: build it once more
            if spec.sources_changed:
                raise RuntimeError("jitnorm's sources changed after this process read them: start it anew")
            for scrap in (".ninja_log", ".ninja_deps", _LOG, "host.o", "kernel.cubin", "library.so"):
                staging.remove(scrap)
            cache.seal(staging, content, manifest(spec, tools, time.monotonic() - started))
            return place.publish(staging, spec, tools.key)
    raise AssertionError


def _checked_output(spec: KernelSpec, staging: Folder, child: ChildCheck) -> bytes:
    """Return the library that the compilers wrote. Raises _Damaged unless it is whole, and can be opened."""
    try:
        content = staging.read("library.so", _MAX_OUTPUT_BYTES)
        library = check_library(content, [spec.entry])
        if spec.target.device == "cuda":
            cubin = staging.read("kernel.cubin", _MAX_OUTPUT_BYTES)
            check_cubin(cubin, spec.name)
            if cubin not in content:
                raise BadLibrary("it does not hold the cubin")
        child.check(content, library)
    except FileNotFoundError:
        raise _Damaged("wrote no library") from None
    except (BadLibrary, Unfit) as error:
        raise _Damaged(f"wrote a library that cannot be used: {error}") from None
    return content


def write_sources(spec: KernelSpec, folder: Folder, tools: toolchain.Toolchain) -> None:
    """Write all that ninja needs to build `spec` in `folder`."""
    ffi_library = Path(libinfo.find_libtvm_ffi())
    paths = {
        "cxx": tools.cxx.path,
        "csrc": str(CSRC),
        "tvm_ffi_include": libinfo.find_include_path(),
        "dlpack_include": libinfo.find_dlpack_include_path(),
        "tvm_ffi_lib": str(ffi_library.parent),
    }
    if tools.nvcc:
        paths |= {"nvcc": tools.nvcc.path, "cuda_include": os.path.join(tools.nvcc.top, "include")}
        folder.write("cubin.s", CUBIN_ASSEMBLY.encode())
    folder.write(spec.source_name, spec.source.encode())
    folder.write("build.ninja", spec.ninja.encode())
    folder.write("paths.ninja", b"".join(_ninja_variable(name, path) for name, path in paths.items()))


def _ninja_variable(name: str, path: str) -> bytes:
    """Return a line of a build file that quotes `path` for ninja and for the shell that it starts."""
    if re.search(r"[\0-\x1f\x7f]", path):  # ninja has no way to write a newline
        raise RuntimeError(f"jitnorm cannot build with the path {path!r} ({name}): it has control characters")
    return os.fsencode(f"{name} = {shlex.quote(path).replace('$', '$$')}\n")


def manifest(spec: KernelSpec, tools: toolchain.Toolchain, seconds: float) -> dict[str, object]:
    """Return what an entry says of itself, all but the library's name, hash and size."""
    return {
        "name": spec.name,
        "op": spec.op,
        "kernel": spec.kernel,
        "device": spec.target.device,
        "arch": spec.target.sm,
        "key": spec.key,
        "includes": list(spec.includes),
        "compilers": tools.compilers(),
        "tvm_ffi": tvm_ffi.__version__,
        "jitnorm": __version__,
        "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _run_ninja(spec: KernelSpec, place: cache.Cache, staging: Folder, announce: bool) -> None:
    ninja = toolchain.find_ninja()
    if not ninja:
        raise RuntimeError("jitnorm needs ninja and found none, beside this Python or on the PATH: pip install ninja")
    # Flags that nobody sees are in no key, and errors are looked for in English.
    environment = {k: v for k, v in os.environ.items() if k not in ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")}
    environment["LC_ALL"] = "C"
    with ExitStack() as stack:
        output = staging.open_file(_LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        stack.callback(close, output)
        theirs, ours = (os.fdopen(fd, mode, 0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
        stack.enter_context(ours)
        with theirs:
            run = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISOR, ninja],
                stdin=theirs,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=staging.descriptor_path,
                env=environment,
                start_new_session=True,
            )
        try:
            ended = _wait(run, spec, place, announce)
        finally:
            if run.poll() != 0:  # compilers may go on where ninja was killed
                ours.close()
                _end_session(run)
    try:
        words = staging.read(_LOG, _MAX_LOG_BYTES).decode(errors="replace")
    except (OSError, Unfit) as error:
        words = f"error: the log cannot be read: {error}"
    if not ended:
        raise _failed(spec, place, staging, f"the compilers did not end within {_BUILD_LIMIT_S:.0f} s")
    if run.returncode:
        _raise_if_full(place, spec, words)
        if run.returncode < 0 or run.returncode in _SIGNALLED or _ENDED_BY_SIGNAL.search(words):
            raise BuildInterrupted(f"the build of {spec} was interrupted: {first_error(words)}")
        raise _failed(spec, place, staging, first_error(words))


def _wait(run: subprocess.Popen[bytes], spec: KernelSpec, place: cache.Cache, announce: bool) -> bool:
    """Wait for a build, and say what it is if it lasts. False where it does not end."""
    started = time.monotonic()
    for patience in (_QUIET_S, *[_REPORT_S] * int(_BUILD_LIMIT_S / _REPORT_S)):
        if _ends_within(run, patience):
            return True
        if announce and patience == _QUIET_S:
            say(f"building {spec} in {place.root} (once; kept for the next time)")
        elif announce:
            names = sorted({name for _, name in _session(run.pid)} - {"sh", "ninja"})
            say(f"still building {spec} after {time.monotonic() - started:.0f} s: {', '.join(names)} runs")
    return False


def _ends_within(run: subprocess.Popen[bytes], seconds: float) -> bool:
    """Return whether a process ends within `seconds`, as soon as it does: Popen.wait sleeps up to 50 ms too long."""
    try:
        fd = os.pidfd_open(run.pid)
    except (OSError, AttributeError):  # an older kernel
        with suppress(subprocess.TimeoutExpired):
            run.wait(seconds)
        return run.poll() is not None
    try:
        end = select.poll()
        end.register(fd, select.POLLIN)
        end.poll(seconds * 1000)
    finally:
        close(fd)
    return run.poll() is not None


def _end_session(run: subprocess.Popen[bytes]) -> None:
    """End a build: by ninja, which ends the compilers, and by force what does not listen."""
    _ends_within(run, 2)
    for _ in range(100):
        remaining = _session(run.pid)
        for pid, _ in remaining:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if run.poll() is not None and not remaining:
            return
        time.sleep(0.01)


def _session(leader: int) -> list[tuple[int, str]]:
    """Return the process ids and names of a session's running processes."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat", errors="replace") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
            state, _, _, session = rest.split()[:4]
            if int(session) == leader and state != "Z":
                found.append((int(pid), name))
    return found


def _failed(spec: KernelSpec, place: cache.Cache, staging: Folder, why: str) -> BuildError:
    """Return the error of a failed build, whose folder is kept in quarantine for its log."""
    kept = place.keep_failed(staging, spec)
    log = f"\nThe whole log: {kept / _LOG}" if kept else ""
    return BuildError(f"jitnorm cannot build {spec}: {why}{log}")


def _raise_if_full(place: cache.Cache, spec: KernelSpec, words: str) -> None:
    """Raise CannotKeep where a build failed for want of room."""
    found = _NO_ROOM.search(words)
    with suppress(OSError):
        if found or shutil.disk_usage(place.root).free < _MIN_FREE_BYTES:
            raise cache.CannotKeep(
                f"jitnorm cannot build {spec} in {place.root}: {found[0] if found else 'No space left on device'}"
            )


_MIN_FREE_BYTES = 1 << 16
_NO_ROOM = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|File too large|File size limit exceeded"
)
_SIGNALLED = (129, 130, 137, 143)  # SIGHUP, SIGINT, SIGKILL and SIGTERM; ninja passes others on, as of a compiler's bug
_ENDED_BY_SIGNAL = re.compile(
    r"^(Killed|Terminated|Hangup|Interrupt)\b|died due to signal (1|2|9|15)\b"
    r"|(Killed|Terminated|Hangup|Interrupt) signal terminated program",
    re.MULTILINE,
)
# The compilers' own errors; how one of them ended; what the linker and the shell say.
_ERRORS = [
    re.compile(pattern)
    for pattern in (
        r"(^|[:)] )((fatal|internal compiler) )?error\b.*:|^\S+ (fatal|error)\s*:",
        r"died due to signal|^(Killed|Terminated)\b",
        r"undefined reference|cannot find|not found|No space|denied",
    )
]
_NOISE = re.compile(r"^ninja:|^FAILED:|linker command failed|ld returned")


def first_error(log: str) -> str:
    """Return the compiler's first real error line, without ninja's and the build folder's noise."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    words = [line for line in lines if not _NOISE.search(line)]
    for pattern in _ERRORS:
        for line in words:
            if pattern.search(line):
                return line
    return next(iter(words[-1:] or lines[-1:]), "the compiler said nothing")


@contextmanager
def _lock(place: cache.Cache, spec: KernelSpec, key: str) -> Iterator[None]:
    """Wait until no other process builds `spec`, at most two minutes. Without locks, two may build the same."""
    started = time.monotonic()
    announced = False
    while True:
        with place.build_lock(spec, key) as taken:
            waited = time.monotonic() - started
            if not taken and waited > _QUIET_S + _LOCK_S:
                say(f"no longer waiting for another process that builds {spec}: building it as well")
                taken = True
            if taken:
                yield
                return
        if not announced and waited > _QUIET_S:
            announced = True
            holders = " and ".join(place.builders(spec)) or "another process"
            say(f"waiting for {holders}, which builds {spec}")
        time.sleep(0.05 if announced else 0.01)

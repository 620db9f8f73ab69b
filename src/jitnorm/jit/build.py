"""Build one kernel: write its sources to a private folder, run a compiler, check its output, report its first error."""

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
from jitnorm.jit import cleanup, locations, nvrtc, toolchain
from jitnorm.jit.cache import Cache, CacheNotWritable
from jitnorm.jit.entry import Entry, write_entry
from jitnorm.jit.environment import unknown_variables
from jitnorm.jit.files import close
from jitnorm.jit.folder import Folder, UntrustedPath
from jitnorm.jit.library import BadLibrary, ChildCheck, check_cubin, check_library
from jitnorm.jit.log import logger, warn_once
from jitnorm.jit.spec import CSRC, NVRTC_OPTIONS, KernelSpec
from jitnorm.jit.toolchain import Toolchain


class BuildError(RuntimeError):
    """The compiler ran and failed."""


class BuildInterrupted(RuntimeError):
    """A signal ended the compiler. This says nothing about the kernel: the next call builds it again."""


class _DamagedOutput(Exception):
    """The compilers exited with 0, and their output is missing or damaged."""


_FIRST_MESSAGE_S = 1.0  # a build that takes longer is logged
_MESSAGE_INTERVAL_S = 30.0
_BUILD_LIMIT_S = 900.0
_LOCK_LIMIT_S = 120.0  # for a builder that may have ended or be stopped: building costs less than to wait longer
_UNLOCK_LIMIT_S = 1.0  # from a builder's last step in the cache to the end of its lock
_CLEANUP_LIMIT_S = 0.5
_LOG = "build.log"
_MAX_LOG_BYTES = 1 << 26
_MAX_OUTPUT_BYTES = 1 << 28

# Starts ninja, and terminates it and its compilers when this process closes a pipe or ends in any way. The pipe is
# standard input, and nothing is written to it. The shell and its children have a session of their own, so that Ctrl-C
# on a terminal interrupts only this process.
#
# Compilers that have not ended 2 seconds after ninja was asked to, and what they leave behind, are killed, until none
# is left: one that is killed may have started another. The first shell is stopped meanwhile, as it would kill the
# watcher when ninja ends.
_SUPERVISOR = """
kill_others() {
  read -r self _ < /proc/self/stat
  found=1
  while [ $found ]; do
    found=
    for process in /proc/[0-9]*; do
      read -r stat < $process/stat || continue
      set -- ${process#/proc/} ${stat##*) }  # process id, state, parent, group, session
      if [ "$5" = $$ ] && [ "$2" != Z ] && [ $1 != $self ] && [ $1 != $$ ]; then
        kill -KILL $1
        found=1
      fi
    done
  done
}
exec 3<&0 </dev/null
"$0" 3<&- &
ninja=$!
{
  read -r _ <&3
  kill -TERM $ninja
  sleep 2
  kill -STOP $$
  kill_others
  kill -KILL $$
} >/dev/null 2>&1 &
watcher=$!
wait $ninja
status=$?
if [ $status -lt 128 ]; then
  kill -KILL $watcher
else
  kill_others 2>/dev/null
fi
exit $status
"""


def build(spec: KernelSpec, one_of_many: bool = False) -> Entry:
    """Build `spec` into the cache, unless another process does so first.

    Args:
        spec: The kernel.
        one_of_many: Whether the caller builds several in parallel, and shows its progress. Otherwise a build that
            takes long is logged, and NVRTC uses several threads.

    Returns:
        The entry, marked as in use.

    Raises:
        CacheNotWritable: The cache's folder cannot be written, or is full.
        BuildError: A compiler failed.
        BuildInterrupted: A signal ended it.
        RuntimeError: A compiler or ninja is missing.
    """
    spec.key  # noqa: B018  raises if the sources cannot be read, before the cache is involved
    cache = locations.writable()
    tools = toolchain.require(spec.target, cache)
    try:
        try:
            return _find_or_build(spec, cache, tools, one_of_many)
        except nvrtc.NvrtcError as error:
            reason = f"NVRTC cannot build {spec}: {error}"
            try:
                tools = toolchain.require(spec.target, cache, without_nvrtc=True)
            except RuntimeError as missing:
                raise RuntimeError(f"{reason}. {missing}") from None
            logger.warning("%s. nvcc builds it", reason)
            return _find_or_build(spec, cache, tools, one_of_many)
    except (OSError, UntrustedPath) as error:  # a full disk, for example
        raise CacheNotWritable(f"jitnorm cannot build {spec} in {cache.root}: {error}") from error


def _find_or_build(spec: KernelSpec, cache: Cache, tools: Toolchain, one_of_many: bool) -> Entry:
    if entry := cache.find(spec, tools.key):
        return entry
    with _lock(cache, spec, tools.key):
        return cache.find(spec, tools.key) or _build(spec, cache, tools, one_of_many)


def _build(spec: KernelSpec, cache: Cache, tools: Toolchain, one_of_many: bool) -> Entry:
    for name, known in unknown_variables().items():
        if known:  # it may have been set to forbid this build
            warn_once(f"{name} is not a variable of jitnorm: did you mean {known}?")
    cleanup.remove_abandoned(cache, _CLEANUP_LIMIT_S)
    for last_try in (False, True):
        started = time.monotonic()
        with ExitStack() as stack:
            staging = stack.enter_context(cache.staging(spec))
            write_sources(spec, staging, tools)
            try:
                if tools.nvrtc:
                    content = _run_nvrtc(spec, cache, staging, tools.nvrtc.path, one_of_many)
                else:
                    child = stack.enter_context(ChildCheck()) if spec.target.device == "cpu" else None
                    _run_ninja(spec, cache, staging, announce=not one_of_many)
                    content = _checked_output(spec, staging, child)
            except _DamagedOutput as error:
                _raise_if_full(cache, spec, str(error))
                if last_try:
                    compiler = next(each for each in reversed(tools) if each)
                    raise BuildError(f"jitnorm cannot build {spec}: the compiler {compiler.path} {error}") from None
                continue  # a full disk or a killed linker may have caused it: try once more
            if spec.sources_changed:
                raise RuntimeError("jitnorm's sources changed after this process read them: restart the process")
            for name in (".ninja_log", ".ninja_deps", _LOG, spec.output_name):
                staging.remove(name)
            seconds = time.monotonic() - started
            write_entry(staging, content, manifest(spec, tools, seconds))
            entry = cache.publish(staging.path, cache.entry(spec, tools.key))
            logger.debug("built %s in %.2f s", spec, seconds)
            return entry
    raise AssertionError


def _checked_output(spec: KernelSpec, staging: Folder, child: ChildCheck | None) -> bytes:
    """Return what the compilers wrote. Raises _DamagedOutput unless it is undamaged and can be loaded."""
    try:
        content = staging.read(spec.output_name, _MAX_OUTPUT_BYTES)
        if child:
            child.check(content, check_library(content, [spec.binding]))
        else:
            check_cubin(content, list(spec.symbols.values()))
    except FileNotFoundError:
        raise _DamagedOutput(f"wrote no {spec.output_name}") from None
    except (BadLibrary, UntrustedPath) as error:
        raise _DamagedOutput(f"wrote a {spec.output_name} that cannot be used: {error}") from None
    return content


def _run_nvrtc(spec: KernelSpec, cache: Cache, staging: Folder, path: str, one_of_many: bool) -> bytes:
    """Return the cubin that NVRTC makes.

    Raises:
        BuildError: The source does not compile.
        NvrtcError: NVRTC fails for another reason.
    """
    options = [*spec.cuda_options, *NVRTC_OPTIONS, f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    try:
        content = nvrtc.load(path).compile(spec.source, spec.source_name, options, in_threads=not one_of_many)
        check_cubin(content, list(spec.symbols.values()))
    except nvrtc.CompileError as error:
        staging.write(_LOG, str(error).encode())
        raise _failed(spec, cache, staging, first_error(str(error))) from None
    except BadLibrary as error:
        raise nvrtc.NvrtcError(f"its cubin cannot be used: {error}") from None
    return content


def write_sources(spec: KernelSpec, folder: Folder, tools: Toolchain) -> None:
    """Write the source and the ninja files of `spec` to `folder`."""
    folder.write(spec.source_name, spec.source.encode())
    if not tools.cxx:
        return  # NVRTC needs no ninja
    paths = {"cxx": tools.cxx.path, "csrc": str(CSRC)}
    if tools.nvcc:
        paths["nvcc"] = tools.nvcc.path
    else:
        paths |= {
            "tvm_ffi_include": libinfo.find_include_path(),
            "dlpack_include": libinfo.find_dlpack_include_path(),
            "tvm_ffi_lib": str(Path(libinfo.find_libtvm_ffi()).parent),
        }
    folder.write("build.ninja", spec.ninja.encode())
    folder.write("paths.ninja", b"".join(_ninja_variable(name, path) for name, path in paths.items()))


def _ninja_variable(name: str, path: str) -> bytes:
    """Return a line of a ninja file that defines `name` as `path`, quoted for ninja and for the shell."""
    if re.search(r"[\0-\x1f\x7f]", path):  # ninja's syntax cannot express a newline
        raise RuntimeError(f"jitnorm cannot build with the path {path!r} ({name}): it has control characters")
    return os.fsencode(f"{name} = {shlex.quote(path).replace('$', '$$')}\n")


def manifest(spec: KernelSpec, tools: Toolchain, seconds: float) -> dict[str, object]:
    """Return an entry's manifest without the library's name, hash and size, which `write_entry` adds."""
    return {
        "name": spec.name,
        "op": spec.op,
        "kernel": spec.kernel,
        "device": spec.target.device,
        "arch": spec.target.sm,
        "key": spec.key,
        "includes": list(spec.includes),
        "compilers": tools.versions(),
        "tvm_ffi": tvm_ffi.__version__,
        "jitnorm": __version__,
        "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _run_ninja(spec: KernelSpec, cache: Cache, staging: Folder, announce: bool) -> None:
    """Run ninja in `staging`. Raises BuildError, BuildInterrupted or CacheNotWritable if it fails."""
    ninja = toolchain.find_ninja()
    if not ninja:
        raise RuntimeError("jitnorm needs ninja and found none, beside this Python or on the PATH: pip install ninja")
    # Flags from the environment are in no key. The C locale makes compilers report errors in English.
    environment = {k: v for k, v in os.environ.items() if k not in ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")}
    environment["LC_ALL"] = "C"
    with ExitStack() as stack:
        output = staging.open_file(_LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        stack.callback(close, output)
        read_end, write_end = (os.fdopen(fd, mode, 0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
        stack.enter_context(write_end)
        with read_end:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISOR, ninja],
                stdin=read_end,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=staging.descriptor_path,
                env=environment,
                start_new_session=True,
            )
        try:
            ended = _wait(process, spec, cache, announce)
        finally:
            if process.poll() != 0:  # if ninja was killed, compilers may still run
                write_end.close()
                _end_session(process)
    try:
        log = staging.read(_LOG, _MAX_LOG_BYTES).decode(errors="replace")
    except (OSError, UntrustedPath) as error:
        log = f"error: the log cannot be read: {error}"
    if not ended:
        raise _failed(spec, cache, staging, f"the compilers did not end within {_BUILD_LIMIT_S:.0f} s")
    if process.returncode:
        _raise_if_full(cache, spec, log)
        if process.returncode < 0 or process.returncode in _SIGNAL_STATUS or _SIGNAL_MESSAGE.search(log):
            raise BuildInterrupted(f"the build of {spec} was interrupted: {first_error(log)}")
        raise _failed(spec, cache, staging, first_error(log))


def _wait(process: subprocess.Popen[bytes], spec: KernelSpec, cache: Cache, announce: bool) -> bool:
    """Wait for a build, and log one that takes long. Return False if it does not end within the limit."""
    started = time.monotonic()
    intervals = (_FIRST_MESSAGE_S, *[_MESSAGE_INTERVAL_S] * int(_BUILD_LIMIT_S / _MESSAGE_INTERVAL_S))
    for number, seconds in enumerate(intervals):
        if _ends_within(process, seconds):
            return True
        if announce and number == 0:
            logger.info("building %s in %s (once; kept for the next time)", spec, cache.root)
        elif announce:
            names = ", ".join(sorted({name for _, name in _session(process.pid)} - {"sh", "ninja"}))
            logger.info("still building %s after %.0f s: %s runs", spec, time.monotonic() - started, names)
    return False


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Return whether a process ends within `seconds`, as soon as it does: Popen.wait may return 50 ms later."""
    try:
        fd = os.pidfd_open(process.pid)
    except (OSError, AttributeError):  # an older kernel
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.poll() is not None
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        close(fd)
    return process.poll() is not None


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a build: wait for ninja, which was asked to end its compilers, then kill the processes that remain."""
    _ends_within(process, 2)
    for _ in range(100):
        remaining = _session(process.pid)
        for pid, _ in remaining:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is not None and not remaining:
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


def _failed(spec: KernelSpec, cache: Cache, staging: Folder, reason: str) -> BuildError:
    """Return the error of a failed build, whose folder is kept in quarantine for its log."""
    folder = cache.quarantine_failed_build(staging, spec)
    log = f"\nThe whole log: {folder / _LOG}" if folder else ""
    return BuildError(f"jitnorm cannot build {spec}: {reason}{log}")


def _raise_if_full(cache: Cache, spec: KernelSpec, log: str) -> None:
    """Raise CacheNotWritable if a build failed because its disk is full."""
    found = _DISK_FULL.search(log)
    with suppress(OSError):
        if found or shutil.disk_usage(cache.root).free < _MIN_FREE_BYTES:
            reason = found[0] if found else "No space left on device"
            raise CacheNotWritable(f"jitnorm cannot build {spec} in {cache.root}: {reason}")


_MIN_FREE_BYTES = 1 << 16
_DISK_FULL = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|File too large|File size limit exceeded"
)
# SIGHUP, SIGINT, SIGKILL and SIGTERM. Ninja returns other signals too, as when a bug ends the compiler.
_SIGNAL_STATUS = (129, 130, 137, 143)
_SIGNAL_MESSAGE = re.compile(
    r"^(Killed|Terminated|Hangup|Interrupt)\b|died due to signal (1|2|9|15)\b"
    r"|(Killed|Terminated|Hangup|Interrupt) signal terminated program",
    re.MULTILINE,
)
# In order of preference: a compiler's own error, a signal that ended it, an error of the linker or the shell.
_ERRORS = (
    re.compile(r"(^|[:)] )((fatal|internal compiler) )?error\b.*:|^\S+ (fatal|error)\s*:"),
    re.compile(r"died due to signal|^(Killed|Terminated)\b"),
    re.compile(r"undefined reference|cannot find|not found|No space|denied"),
)
_NOISE = re.compile(r"^ninja:|^FAILED:|linker command failed|ld returned")


def first_error(log: str) -> str:
    """Return the line of a build's log that best explains why it failed, without ninja's own messages."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    candidates = [line for line in lines if not _NOISE.search(line)]
    for pattern in _ERRORS:
        for line in candidates:
            if pattern.search(line):
                return line
    return next(iter(candidates[-1:] or lines[-1:]), "the compiler printed nothing")


@contextmanager
def _lock(cache: Cache, spec: KernelSpec, key: str) -> Iterator[None]:
    """Wait until no other process builds `spec`. Without locks, two may build the same.

    A lock ends with its process. A builder that runs on this host is waited for until it ends, as its build has a time
    limit; one that is stopped, or on another host that may have been switched off, for two minutes.
    """
    started = last_seen = time.monotonic()  # `last_seen`: when a builder of this host was running
    announced = False
    while True:
        with cache.build_lock(spec, key) as locked:
            now = time.monotonic()
            waited = now - started
            is_late = not locked and waited > _FIRST_MESSAGE_S + _LOCK_LIMIT_S
            if is_late and cache.has_running_builder(spec):
                last_seen = now
            elif is_late and now - last_seen > _UNLOCK_LIMIT_S:
                logger.info("no longer waiting for another process that builds %s: building it as well", spec)
                locked = True
            if locked:
                yield
                return
        if not announced and waited > _FIRST_MESSAGE_S:
            announced = True
            builders = " and ".join(cache.builders(spec)) or "another process"
            logger.info("waiting for %s, which builds %s", builders, spec)
        time.sleep(0.05 if announced else 0.01)

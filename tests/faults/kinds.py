"""The kinds of faults. Each function makes one fault in a sandbox, by random numbers, and runs operations on it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from faults.inject import CLASSES, CLOSE_ERRORS, ERRORS, Injection
from faults.sandbox import COMMANDS, FOREIGN_USER, HANG_S, KERNELS, Report, Sandbox, remove
from jitnorm.jit import cache

Kind = Callable[[Sandbox, random.Random], None]

LOADS = ("load rmsnorm", "load rmsnorm", "load rmsnorm silu per_token", "find rmsnorm", "module rmsnorm", "warmup")
LOOKS = ("ls", "ls --format json", "show", "verify", "clear --dry-run")
REMOVALS = ("prune", "prune --max-size", "clear", "clear --filter")
# `doctor` starts all that it looks for, and takes a tenth of a second.
OPERATIONS = (*LOADS * 4, *LOOKS * 2, *REMOVALS * 2, "doctor")


def _fire(sandbox: Sandbox, rng: random.Random, operation: str, armed: Injection, most: int) -> Report:
    """Runs an operation under an injection at a random call; where there is none, at an earlier one, or any."""
    armed = replace(armed, nth=min(most, int(2 ** rng.uniform(0, most.bit_length()))))
    before = snapshot_of(sandbox)
    while True:
        report = sandbox.run(operation, arm=armed)
        if report.fired or (armed.nth == 1 and armed.classes == CLASSES):
            sandbox.describe(f"{operation} with {armed}" + ("" if report.fired else " (no such call)"))
            return report
        armed = replace(armed, nth=armed.nth // 2) if armed.nth > 1 else replace(armed, classes=CLASSES, nth=8)
        restore(sandbox, before)


def snapshot_of(sandbox: Sandbox) -> Path:
    """Keep the cache as it is, to try again on."""
    kept = sandbox.folder / "before"
    remove(kept)
    if sandbox.cache.exists():
        shutil.copytree(sandbox.cache, kept, symlinks=True)
    return kept


def restore(sandbox: Sandbox, kept: Path) -> None:
    remove(sandbox.cache)
    if kept.exists():
        shutil.copytree(kept, sandbox.cache, symlinks=True)


def errno(sandbox: Sandbox, rng: random.Random) -> None:
    """A system call on the cache fails, once or from then on."""
    sandbox.random_state(rng)
    if rng.random() < 0.15:
        sandbox.warm(["rmsnorm"], sandbox.prebuilt)
        sandbox.environment["JITNORM_PREBUILT_DIR"] = str(sandbox.prebuilt)
        sandbox.describe("and a prebuilt layer")
    sandbox.snapshot_outside()
    classes = tuple(rng.sample(CLASSES, rng.choice((1, 1, 1, 2, len(CLASSES)))))
    error, again = rng.choice(ERRORS), rng.random() < 0.3
    if classes == ("close",):
        error = rng.choice(CLOSE_ERRORS)
    action = "short" if rng.random() < 0.04 else "fail"
    if action == "short":
        classes, again = ("write",), False
    operation = rng.choice(OPERATIONS)
    report = _fire(sandbox, rng, operation, Injection(classes, 1, action, error, again), 40)
    sandbox.judge(report, must_succeed=not report.fired and operation in LOADS)


def tool_errno(sandbox: Sandbox, rng: random.Random) -> None:
    """A system call of ninja, the shell or the compiler on the cache fails, or kills it."""
    sandbox.random_state(rng)
    remove(sandbox.cache / "kernels")
    sandbox.snapshot_outside()
    action = rng.choice(("fail", "fail", "kill"))
    classes = tuple(rng.sample(CLASSES, rng.choice((1, 2, len(CLASSES)))))
    tools = Injection(classes, int(2 ** rng.uniform(0, 5)), action, rng.choice(ERRORS), rng.random() < 0.3)
    sandbox.describe(f"ninja and compilers with {tools}")
    sandbox.judge(sandbox.run("load rmsnorm", tools=tools))


def kill(sandbox: Sandbox, rng: random.Random) -> None:
    """The process is killed at one of its calls on the cache."""
    sandbox.random_state(rng)
    sandbox.snapshot_outside()
    operation = rng.choice(("load rmsnorm",) * 4 + ("load rmsnorm silu per_token", "warmup", *REMOVALS))
    report = _fire(sandbox, rng, operation, Injection(CHANGES, 1, "kill"), 200)
    sandbox.judge(report, allowed=("killed",))


CHANGES = ("open", "write", "rename", "mkdir", "unlink", "flock", "fsync", "mode", "close", "link", "read", "list")


def orphan(sandbox: Sandbox, rng: random.Random) -> None:
    """The process is killed while its compiler works: ninja and the compiler end as well."""
    sandbox.random_state(rng, leftovers=False)
    remove(sandbox.cache / "kernels")
    sandbox.snapshot_outside()
    sandbox.compiler("block")
    child = sandbox.start("load rmsnorm")
    if not _wait(sandbox.bin / "started"):
        sandbox.add_problem("the compiler was not started")
    number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGHUP))
    sandbox.describe(f"the builder gets {number.name} while its compiler works")
    child.send(number)
    report = child.end()
    if report.ended not in ("killed", "crash"):
        sandbox.judge(report)
    _processes_end(sandbox)
    sandbox.compiler("ok")


def _processes_end(sandbox: Sandbox) -> None:
    from faults.sandbox import orphans

    for pid in orphans():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            sandbox.add_problem(f"still running after its parent's end: {words[:200]}")


def _wait(path: Path, limit: float = HANG_S) -> bool:
    until = time.monotonic() + limit
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def interrupt(sandbox: Sandbox, rng: random.Random) -> None:
    """Ctrl-C during a build: with a handler of the program's own it goes on, else the next call builds."""
    sandbox.random_state(rng, leftovers=False)
    remove(sandbox.cache / "kernels")
    sandbox.snapshot_outside()
    sandbox.compiler("block")
    own = rng.random() < 0.5
    sandbox.describe(f"Ctrl-C during a build, with {'a handler of its own' if own else 'KeyboardInterrupt'}")

    def handler() -> None:
        if own:
            signal.signal(signal.SIGINT, lambda number, frame: None)

    child = sandbox.start("load rmsnorm" if own else "twice rmsnorm", before=handler)
    if not _wait(sandbox.bin / "started"):
        sandbox.add_problem("the compiler was not started")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does, to all of the process group
    time.sleep(0.05)
    (sandbox.bin / "go").touch()
    sandbox.judge(child.end(), must_succeed=True)


def flip(sandbox: Sandbox, rng: random.Random) -> None:
    """A file of the cache, or of the prebuilt layer, is damaged."""
    where = sandbox.cache
    sandbox.random_state(rng, needs=["rmsnorm"])
    if rng.random() < 0.2:
        where = sandbox.prebuilt
        sandbox.warm(["rmsnorm"], where)
        sandbox.environment["JITNORM_PREBUILT_DIR"] = str(where)
    else:
        sandbox.judge(sandbox.run("find rmsnorm"))  # so that the compilers' versions are remembered
    files = sorted(f for f in where.rglob("*") if f.is_file() and not f.is_symlink())
    chosen = [f for f in files if f.suffix in (".so", ".json")] if rng.random() < 0.9 else files
    file = rng.choice(chosen)
    content = bytearray(file.read_bytes())
    how = rng.choice(("flip", "flip", "flip", "truncate", "zero", "empty", "append", "garbage"))
    if how == "flip" and content:
        for _ in range(rng.choice((1, 1, 4))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del content[rng.randrange(len(content) + 1) :]
    elif how == "zero":
        at = rng.randrange(len(content) + 1)
        end = rng.choice((len(content), min(len(content), at + 4096)))
        content[at:end] = bytes(end - at)
    elif how == "empty":
        content.clear()
    elif how == "append":
        content += rng.randbytes(rng.randrange(1, 5000))
    else:
        content = bytearray(rng.randbytes(rng.randrange(1, 5000)))
    info = file.stat()
    file.write_bytes(content)
    if rng.random() < 0.5:  # as a disk does it, which changes no time
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    sandbox.describe(f"{how} of {file.relative_to(sandbox.folder)}")
    sandbox.snapshot_outside()
    operation = rng.choice(OPERATIONS)
    sandbox.describe(operation)
    sandbox.judge(sandbox.run(operation), must_succeed=operation != "verify" and operation != "show")


# Places of the layout: what is put there, and what the engine may find in its stead.
PLACES = (
    "cache",
    "kernels",
    "home",
    "entry",
    "library",
    "manifest",
    "source",
    "staging",
    "staged",
    "locks",
    "lock",
    "toolchains",
    "toolchain",
    "quarantine",
    "invariance",
    "gemms",
    "tag",
    "stray",
)
OBJECTS = (
    "fifo",
    "folder",
    "file",
    "socket",
    "dangling",
    "loop",
    "link to a file",
    "link to a folder",
    "mode 000",
    "sparse",
    "nested",
    "wrong types",
    "year 9999",
    "foreign",
    "group-writable",
    "world-writable",
    "full folder",
    "device",
)


def place_of(sandbox: Sandbox, place: str, rng: random.Random) -> Path:
    """Return where in the cache, or in the prebuilt layer, a place lies."""
    spec = KERNELS["rmsnorm"].spec
    home = next((sandbox.cache / "kernels").glob(f"{spec.name}.*"), sandbox.cache / "kernels" / "none")
    entry = next(iter(sorted(home.iterdir())), home / "000000000000") if home.is_dir() else home / "000000000000"
    if place in ("library", "manifest", "source"):
        pattern = {"library": "*.so", "manifest": "manifest.json", "source": "module.cc"}[place]
        return next(entry.glob(pattern), entry / pattern.replace("*", "none"))
    if place == "toolchain":
        return next((sandbox.cache / "toolchains").glob("*.json"), sandbox.cache / "toolchains" / "cpu-0.json")
    builder = f"{socket.gethostname()}.{cache.host_id()}.{rng.randrange(1, 1 << 22)}"
    staged = f"{spec.name}.{spec.target.sm}.{builder}.{rng.randbytes(4).hex()}"
    lock = next((sandbox.cache / "locks").glob(f"{spec.name}*"), sandbox.cache / "locks" / f"{home.name}.{entry.name}")
    return {
        "cache": sandbox.cache,
        "kernels": sandbox.cache / "kernels",
        "home": home,
        "entry": entry,
        "staged": sandbox.cache / "staging" / staged,
        "lock": lock,
        "tag": sandbox.cache / "CACHEDIR.TAG",
        "stray": rng.choice((sandbox.cache, home, sandbox.cache / "kernels")) / "stray",
    }.get(place, sandbox.cache / place)


def put(sandbox: Sandbox, path: Path, what: str, rng: random.Random) -> None:
    """Makes something else of what lies at a path, or puts it there."""
    exists = os.path.lexists(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if what in ("mode 000", "foreign", "group-writable", "world-writable"):
        if not exists:
            if path.suffix:
                path.touch()
            else:
                path.mkdir(mode=0o700)
        if what == "foreign":
            os.lchown(path, FOREIGN_USER, FOREIGN_USER)
        else:
            path.chmod({"mode 000": 0, "group-writable": 0o775, "world-writable": 0o777}[what])
        return
    remove(path)
    if what == "fifo":
        os.mkfifo(path, 0o600)
    elif what == "folder":
        path.mkdir(mode=0o700)
    elif what == "full folder":
        (path / "a" / "b").mkdir(parents=True, mode=0o700)
        (path / "a" / "file").write_text("x")
    elif what == "file":
        path.write_bytes(rng.randbytes(rng.randrange(5000)))
    elif what == "socket":
        bound = socket.socket(socket.AF_UNIX)
        here = os.open(path.parent, os.O_RDONLY)  # an address may have 107 bytes
        bound.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
        bound.close()
    elif what == "dangling":
        path.symlink_to(sandbox.folder / "nowhere" / "at all")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "link to a file":
        path.symlink_to(sandbox.outside / "file")
    elif what == "link to a folder":
        target = sandbox.outside / "folder"
        if rng.random() < 0.5:  # with what the engine looks for
            shutil.copytree(next(iter(sandbox.templates.values())), target, dirs_exist_ok=True)
            inner = target / path.relative_to(sandbox.cache) if path != sandbox.cache else target
            target = inner if inner.is_dir() else target
        path.symlink_to(target)
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(64 << 30)
    elif what == "nested":
        path.write_text("[" * 100_000 + "]" * 100_000 if rng.random() < 0.5 else '{"name":' * 50_000)
    elif what == "wrong types":
        values = (1, -1, None, [], {}, True, "", "x" * 5000, 1e400, "\0", "../../outside/file", 10**30, "\ud800")
        keys = [
            "name",
            "sha256",
            "size",
            "library",
            "key",
            "arch",
            "op",
            "kernel",
            "device",
            "built",
            "cxx",
            "nvcc",
            "jitnorm",
            "tvm_ffi",
            "compilers",
        ]
        document = {key: rng.choice(values) for key in keys if rng.random() < 0.8}
        path.write_text(json.dumps(rng.choice((document, document, document, *values))))
    elif what == "year 9999":
        path.write_text("{}")
        os.utime(path, (253402300799, rng.choice((253402300799, 2**40, -(2**33)))))
    elif what == "device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero


def structure(sandbox: Sandbox, rng: random.Random) -> None:
    """Something else lies where a folder or file of the cache should."""
    sandbox.random_state(rng, needs=["rmsnorm"] if rng.random() < 0.8 else [])
    sandbox.run("load rmsnorm" if rng.random() < 0.3 else "find rmsnorm")
    place, what = rng.choice(PLACES), rng.choice(OBJECTS)
    if what in ("device", "foreign") and not sandbox.is_privileged:
        what = "fifo"
    if place == "cache" and what == "link to a folder":
        what = "loop"  # a cache's own folder may be a link
    path = place_of(sandbox, place, rng)
    sandbox.describe(f"{what} at {place}")
    if what == "year 9999" and path.is_file():
        os.utime(path, (253402300799, rng.choice((253402300799, 2**40, -(2**33)))))
    else:
        put(sandbox, path, what, rng)
    sandbox.snapshot_outside()
    operation = rng.choice(OPERATIONS)
    sandbox.describe(operation)
    can_be_kept = place != "cache" and what not in ("foreign", "group-writable", "world-writable")
    tolerant = operation not in ("verify", "show", "doctor") and place != "cache"
    if operation in ("warmup", *REMOVALS) and not can_be_kept:
        tolerant = False  # it says that nothing can be kept there, or cannot be removed
    sandbox.judge(sandbox.run(operation), must_succeed=tolerant or operation.startswith("load"))
    if can_be_kept:
        return
    sandbox.judge(sandbox.run("load silu"), must_succeed=True)
    sandbox.check_outside()
    # Only its owner can repair it.
    for kept in (
        (sandbox.cache, *(p for p in sandbox.cache.rglob("*") if not p.is_symlink())) if sandbox.cache.is_dir() else ()
    ):
        os.chown(kept, os.geteuid(), os.getegid())
        kept.chmod(kept.lstat().st_mode & 0o7755)
    if place == "cache":
        remove(sandbox.cache)


def planted(sandbox: Sandbox, rng: random.Random) -> None:
    """Another user put an entry that is sound, and foreign, where others can write."""
    spec = KERNELS["rmsnorm"].spec
    prebuilt = rng.random() < 0.5
    root = sandbox.prebuilt if prebuilt else sandbox.cache
    sandbox.warm(["rmsnorm"], root)
    home = next((root / "kernels").glob(f"{spec.name}.*"))
    entry = next(iter(home.iterdir()))
    weak = rng.choice((root, root / "kernels", home, entry, entry))
    library = next(entry.glob("*.so"))
    foreign = (sandbox.store / "foreign.so").read_bytes()
    manifest = json.loads((entry / "manifest.json").read_text())
    import hashlib

    digest = hashlib.sha256(foreign).hexdigest()
    manifest |= {"sha256": digest, "size": len(foreign), "library": f"{spec.name}-{digest[:16]}.so"}
    library.unlink()
    (entry / manifest["library"]).write_bytes(foreign)
    (entry / manifest["library"]).chmod(0o600)
    (entry / "manifest.json").write_text(json.dumps(manifest))
    weak.chmod(rng.choice((0o775, 0o777, 0o757)))
    how = "an entry of this user's"
    if rng.random() < 0.5 and sandbox.is_privileged:
        how = "an entry of another user's"
        for path in (entry, *entry.iterdir()):
            os.chown(path, FOREIGN_USER, FOREIGN_USER)
    sandbox.describe(f"{how} planted in {root.name}, where {weak.relative_to(sandbox.folder)} can be written by others")
    if prebuilt:
        sandbox.environment["JITNORM_PREBUILT_DIR"] = str(root)
    sandbox.snapshot_outside()
    operation = rng.choice(LOADS[:4])
    sandbox.judge(sandbox.run(operation), must_succeed=True)
    if prebuilt:
        sandbox.environment["JITNORM_PREBUILT_DIR"] = None
        return
    remove(sandbox.cache)


def swap(sandbox: Sandbox, rng: random.Random) -> None:
    """The library is exchanged between two calls of a load: what was checked is what is loaded."""
    sandbox.random_state(rng, needs=["rmsnorm"], leftovers=False)
    sandbox.run("find rmsnorm")
    sandbox.snapshot_outside()
    entry = place_of(sandbox, "entry", rng)
    library = place_of(sandbox, "library", rng)
    nth = rng.randrange(1, 30)
    child = sandbox.start("load rmsnorm", arm=Injection(("open", "read", "stat", "mmap", "flock"), nth, "stop"))
    stopped = child.wait_for_stop()
    what = rng.choice(("library", "entry"))
    sandbox.describe(f"the {what} is exchanged before call {nth}" + ("" if stopped else " (no such call)"))
    if stopped:
        foreign = sandbox.folder / "foreign"
        shutil.copytree(entry, foreign)
        shutil.copy(sandbox.store / "foreign.so", foreign / library.name)
        if what == "library":
            (foreign / library.name).rename(library)
        else:
            entry.rename(sandbox.folder / "old")
            if rng.random() < 0.5:
                foreign.rename(entry)
            else:
                entry.symlink_to(foreign)
        child.send(signal.SIGCONT)
    sandbox.judge(child.end(), must_succeed=True)


def limits(sandbox: Sandbox, rng: random.Random) -> None:
    """The process has few descriptors, small files or little memory left."""
    sandbox.random_state(rng)
    sandbox.snapshot_outside()
    kind = rng.choice(("NOFILE", "NOFILE", "FSIZE", "AS"))
    operation = rng.choice(OPERATIONS)
    room = {"NOFILE": rng.randrange(0, 24), "FSIZE": rng.choice((0, 512, 4096, 10000, 30000, 100000))}.get(
        kind, rng.choice((0, 1 << 16, 1 << 20, 4 << 20, 32 << 20, 128 << 20))
    )

    def limit() -> None:
        number = getattr(resource, f"RLIMIT_{kind}")
        value = room
        if kind == "NOFILE":
            value += max(map(int, os.listdir("/proc/self/fd")))
        if kind == "AS":
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))

    sandbox.describe(
        f"{operation} with RLIMIT_{kind} of {room} more" if kind != "FSIZE" else f"{operation}, files of {room}"
    )
    allowed = {"AS": ("MemoryError", "killed"), "FSIZE": ("OSError",) if operation in COMMANDS else ()}.get(kind, ())
    report = sandbox.run(operation, before=limit)
    if kind == "AS" and report.ended == "crash" and report.detail in ("by signal 6", "by signal 11"):
        report.ended = "killed"  # torch and the C++ library abort without memory
    sandbox.judge(report, allowed=allowed)


def disk(sandbox: Sandbox, rng: random.Random) -> None:
    """The cache's disk is full, read-only, without inodes or mounted noexec, from the beginning or from now on."""
    how = rng.choice(("full", "full", "small", "read-only", "noexec", "inodes"))
    sandbox.cache.mkdir(mode=0o700)
    mounted = _mount(sandbox, sandbox.cache, "size=4m")
    names = sandbox.random_state(rng, leftovers=False)
    sandbox.run("find rmsnorm")
    operation = rng.choice(OPERATIONS)
    sandbox.describe(f"{operation} on a disk that is {how}" + ("" if mounted else ", by injection"))
    sandbox.snapshot_outside()
    if not mounted:
        error = "EROFS" if how == "read-only" else "ENOSPC"
        sandbox.judge(sandbox.run(operation, arm=Injection(("write", "mkdir", "fsync"), 1, "fail", error, True)))
        return
    remount = 32
    if how in ("full", "small"):
        room = 0 if how == "full" else rng.randrange(1, 30) * 4096
        with contextlib.suppress(OSError), open(sandbox.cache / "ballast", "wb", buffering=0) as file:
            info = os.statvfs(sandbox.cache)
            os.posix_fallocate(file.fileno(), 0, max(1, info.f_bavail * info.f_frsize - room))
    elif how == "inodes":
        used = os.statvfs(sandbox.cache).f_files - os.statvfs(sandbox.cache).f_ffree
        _mount(sandbox, sandbox.cache, f"nr_inodes={used + rng.randrange(0, 12)}", remount)
    else:
        _mount(sandbox, sandbox.cache, "", remount | {"read-only": 1, "noexec": 8}[how])
    must = operation.startswith("load") or (operation in LOOKS and operation not in ("verify", "show"))
    if operation == "show" and "rmsnorm" in names:
        must = True
    sandbox.judge(sandbox.run(operation), must_succeed=must)
    sandbox.check_outside()
    _mount(sandbox, sandbox.cache, "size=16m,nr_inodes=10000", remount)
    (sandbox.cache / "ballast").unlink(missing_ok=True)


def _mount(sandbox: Sandbox, place: Path, options: str, flags: int = 0) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode())
    if done == 0 and not flags & 32:
        place.chmod(0o700)
        sandbox.mounted.append(place)
    return bool(done == 0)


def concurrent(sandbox: Sandbox, rng: random.Random) -> None:
    """Several processes at once."""
    sandbox.random_state(rng)
    sandbox.snapshot_outside()
    sandbox.compiler(f"slow {rng.randrange(0, 60)}")
    operations = [rng.choice(OPERATIONS[:-1]) for _ in range(rng.randrange(2, 5))]
    sandbox.describe("at once: " + ", ".join(operations))
    children = []
    for operation in operations:
        delay = Injection(CHANGES, rng.randrange(1, 60), "delay") if rng.random() < 0.7 else None
        children.append(sandbox.start(operation, arm=delay))
    for child in children:
        sandbox.judge(child.end(), must_succeed=child.operation not in ("verify", "show"))
    sandbox.compiler("ok")


def race(sandbox: Sandbox, rng: random.Random) -> None:
    """A process stops at one of its calls on the cache, others do their work meanwhile, and it goes on."""
    sandbox.random_state(rng, leftovers=rng.random() < 0.3)
    sandbox.snapshot_outside()
    first = rng.choice(("load rmsnorm", "load rmsnorm", "load rmsnorm", "warmup", *REMOVALS, "ls", "verify"))
    nth = int(2 ** rng.uniform(0, 7))
    child = sandbox.start(first, arm=Injection((*CHANGES, "stat", "mmap"), nth, "stop"))
    stopped = child.wait_for_stop()
    others = [rng.choice((*LOADS, *REMOVALS, *REMOVALS, "ls", "verify")) for _ in range(rng.choice((1, 1, 2)))]
    jump = 86400 * 2 if rng.random() < 0.2 else 0
    sandbox.describe(
        f"{first} stops before call {nth}{'' if stopped else ' (no such call)'}, meanwhile {', '.join(others)}"
    )
    if jump:
        sandbox.describe("whose clock is two days ahead")

    def ahead() -> None:
        from faults.inject import library

        library().fault_clock(jump)

    late = []
    for operation in others:
        other = sandbox.start(operation, before=ahead)
        if other.ended(1.0):  # else it waits for the process that stopped, as it may
            sandbox.judge(other.end(), must_succeed=operation not in ("verify", "show"))
        else:
            late.append(other)
    child.send(signal.SIGCONT)
    sandbox.judge(child.end(), must_succeed=first != "verify")
    for other in late:
        sandbox.judge(other.end(), must_succeed=other.operation not in ("verify", "show"))


def in_use(sandbox: Sandbox, rng: random.Random) -> None:
    """An entry that a process has loaded is not removed, on NFS and without descriptors for it neither."""
    sandbox.random_state(rng, needs=["rmsnorm"], leftovers=False)
    sandbox.snapshot_outside()
    nfs = rng.random() < 0.5
    holder = sandbox.start("hold rmsnorm", before=_nfs if nfs else None)
    if not holder.wait_for(b"held"):
        sandbox.add_problem("the entry could not be loaded")
    operation = rng.choice(REMOVALS)
    arm = None
    if rng.random() < 0.5:
        error = rng.choice(("EMFILE", "ENFILE", "EIO", "ESTALE", "ETIMEDOUT", "EACCES", "ENOMEM"))
        arm = Injection((rng.choice(("open", "flock")),), rng.randrange(1, 20), "fail", error, rng.random() < 0.5)
    sandbox.describe(
        f"{operation} while the kernel is in use{', locks as on NFS' if nfs else ''}{f', with {arm}' if arm else ''}"
    )
    spec = KERNELS["rmsnorm"].spec
    sandbox.judge(sandbox.run(operation, arm=arm, before=_nfs if nfs else None))
    if not list((sandbox.cache / "kernels").glob(f"{spec.name}.*/*/manifest.json")):
        sandbox.add_problem("a kernel that is in use was removed")
    holder.send(signal.SIGKILL)
    holder.end()


def _nfs() -> None:
    from faults.inject import library

    library().fault_arm(os.fsencode(os.environ["JITNORM_CACHE_DIR"]), 0, 0, 0, 0, 0)
    library().fault_nfs(1)


def locked(sandbox: Sandbox, rng: random.Random) -> None:
    """Somebody holds a lock of a file of the cache for ever: loads go on."""
    import fcntl

    sandbox.random_state(rng, needs=["rmsnorm"])
    sandbox.judge(sandbox.run("find rmsnorm"))
    files = [f for f in sandbox.cache.rglob("*") if f.is_file()]
    entry = [f for f in files if "kernels" in f.parts]
    file = rng.choice(entry if rng.random() < 0.8 else files)
    sandbox.snapshot_outside()
    fd = os.open(file, os.O_RDWR)
    fcntl.flock(fd, rng.choice((fcntl.LOCK_EX, fcntl.LOCK_SH)))
    operation = rng.choice(("load rmsnorm", "load rmsnorm", *OPERATIONS))
    sandbox.describe(f"{operation} while {file.relative_to(sandbox.cache)} is locked")
    sandbox.judge(sandbox.run(operation), must_succeed=operation not in ("verify", "show"))
    os.close(fd)


COMPILER_MODES = (
    "empty",
    "none",
    "text",
    "symbolless",
    "exit",
    "silent",
    "binary",
    "long",
    "killed",
    "crash",
    "directory",
    "fifo",
    "link",
    "loop",
)


def compiler(sandbox: Sandbox, rng: random.Random) -> None:
    """The compiler fails, once or always, or says that it has not and leaves a damaged library."""
    sandbox.random_state(rng)
    remove(sandbox.cache / "kernels")
    sandbox.snapshot_outside()
    mode = rng.choice((*COMPILER_MODES, "truncated", "zeroed") if rng.random() < 0.5 else ("truncated", "zeroed"))
    if mode in ("truncated", "zeroed"):
        mode += f" {rng.choice((0, 1, 2, 5, 999, rng.randrange(1000), rng.randrange(1000)))}"
    once = rng.random() < 0.5
    sandbox.compiler(f"once {mode}" if once else mode)
    operation = rng.choice(("load rmsnorm", "load rmsnorm", "module rmsnorm", "warmup"))
    sandbox.describe(f"{operation} with a compiler that {'once ' if once else ''}gives {mode}")
    sandbox.judge(sandbox.run(operation))
    if rng.random() < 0.3:
        sandbox.judge(sandbox.run(rng.choice(OPERATIONS)))
    sandbox.compiler("ok")


VERSION_MODES = ["exit", "killed", "crash", "empty", "blank", "binary", "long"]


def version(sandbox: Sandbox, rng: random.Random) -> None:
    """The compiler does not say its version as one should."""
    sandbox.random_state(rng)
    sandbox.snapshot_outside()
    mode = rng.choice(VERSION_MODES)
    if rng.random() < 0.02:
        mode = "hang"
    sandbox.compiler(f"version-{mode}")
    operation = rng.choice((*LOADS, "doctor"))
    sandbox.describe(f"{operation} with a compiler whose --version gives {mode}")
    sandbox.judge(sandbox.run(operation))
    sandbox.compiler("ok")
    remove(sandbox.cache / "toolchains")  # a compiler that says something else is another file, which this is not


NAMES = (
    b"new\nline",
    b"new\nrule evil\n  command = touch %s\nbuild library.so: evil\n",
    b"a $b $$c $\n",
    b"quote'\"",
    b"space and ;touch %s;",
    b"\xff\xfe",
    b"caf\xe9",
    b"$(touch %s)",
    b"`touch %s`",
    b"a:b|c",
    b"x" * 200,
    b"tab\there",
    b"-o",
    "\u00e9\u4e2d\U0001f600".encode(),
)


def path_names(sandbox: Sandbox, rng: random.Random) -> None:
    """The compiler, or the cache, lies in a folder with an unusual name: it works or is refused, and runs nothing."""
    name = rng.choice(NAMES).replace(b"%s", b"ran")
    folder = Path(os.fsdecode(os.fsencode(sandbox.folder / "home") + b"/" + name.replace(b"/", b"_")))
    what = rng.choice(("CXX", "CXX", "JITNORM_CACHE_DIR", "TMPDIR", "JITNORM_PREBUILT_DIR"))
    sandbox.describe(f"{what} in a folder named {name!r}")
    sandbox.random_state(rng, leftovers=False)
    if what == "CXX":
        remove(sandbox.cache)
        shutil.copytree(sandbox.bin, folder, symlinks=True)
        for beside in ("log", "mode"):
            (folder / beside).unlink(missing_ok=True)
            (folder / beside).symlink_to(sandbox.bin / beside)
        sandbox.environment["CXX"] = os.fsdecode(os.fsencode(folder) + b"/c++")
    else:
        folder.mkdir()
        sandbox.environment[what] = os.fsdecode(os.fsencode(folder))
        if what == "TMPDIR":
            sandbox.cache.parent.chmod(0o500)
    sandbox.snapshot_outside()
    operation = rng.choice(("load rmsnorm", "load rmsnorm", *OPERATIONS))
    sandbox.describe(operation)
    sandbox.judge(sandbox.run(operation))
    for ran in (path for path in sandbox.folder.rglob("ran") if path.is_file()):
        sandbox.add_problem(f"the name of a path was run as a command: {ran}")
    sandbox.cache.parent.chmod(0o700)
    sandbox.environment.clear()


def environment(sandbox: Sandbox, rng: random.Random) -> None:
    """The environment names no usable cache: a temporary folder stands in, or one line says what is wrong."""
    sandbox.random_state(rng, leftovers=False)
    choices: dict[str, Callable[[], None]] = {
        "a relative cache in a working folder that was deleted": lambda: _deleted_cwd(sandbox, "cache"),
        "an absolute cache, and a working folder that was deleted": lambda: _deleted_cwd(sandbox, str(sandbox.cache)),
        "no HOME and no entry in passwd": lambda: sandbox.environment.update(
            {"HOME": None, "JITNORM_CACHE_DIR": None, "XDG_CACHE_HOME": None, "_USER": str(FOREIGN_USER)}
        ),
        "HOME that is a file": lambda: sandbox.environment.update(
            {"HOME": str(sandbox.outside / "file"), "JITNORM_CACHE_DIR": None, "XDG_CACHE_HOME": None}
        ),
        "a user that nobody knows": lambda: sandbox.environment.update({"JITNORM_CACHE_DIR": "~nobody-knows/cache"}),
        "a device": lambda: sandbox.environment.update({"JITNORM_CACHE_DIR": "/dev/null"}),
        "below a device": lambda: sandbox.environment.update({"JITNORM_CACHE_DIR": "/dev/null/cache"}),
        "below /proc": lambda: sandbox.environment.update({"JITNORM_CACHE_DIR": "/proc/jitnorm"}),
        "below a file": lambda: sandbox.environment.update(
            {"JITNORM_CACHE_DIR": str(sandbox.outside / "file" / "cache")}
        ),
        "a name that is too long": lambda: sandbox.environment.update(
            {"JITNORM_CACHE_DIR": str(sandbox.folder / ("x" * 300) / "cache")}
        ),
        "a path that is too long": lambda: sandbox.environment.update({"JITNORM_CACHE_DIR": "/" + "x/" * 3000}),
        "no CXX": lambda: sandbox.environment.update({"CXX": str(sandbox.folder / "none"), "JITNORM_CACHE_DIR": None}),
        "no PATH": lambda: sandbox.environment.update({"PATH": None}),
        "an empty JITNORM_CACHE_DIR": lambda: sandbox.environment.update({"JITNORM_CACHE_DIR": ""}),
        "a missing TMPDIR": lambda: sandbox.environment.update({"TMPDIR": str(sandbox.folder / "none")}),
        "JITNORM_DISABLE_JIT": lambda: sandbox.environment.update({"JITNORM_DISABLE_JIT": "1"}),
        "a prebuilt layer that is not there": lambda: sandbox.environment.update({"JITNORM_PREBUILT_DIR": "/none"}),
        "one folder for both": lambda: sandbox.environment.update({"JITNORM_PREBUILT_DIR": str(sandbox.cache)}),
    }
    what = rng.choice(list(choices))
    choices[what]()
    operation = rng.choice(OPERATIONS)
    sandbox.describe(f"{operation} with {what}")
    sandbox.snapshot_outside()
    before = _drop_user if sandbox.environment.pop("_USER", None) and os.geteuid() == 0 else None
    works = what not in ("no CXX", "JITNORM_DISABLE_JIT") and operation.startswith("load") and before is None
    sandbox.judge(sandbox.run(operation, before=before), must_succeed=works)
    sandbox.environment.clear()
    sandbox.deleted_cwd = None


def _drop_user() -> None:
    """HOME and passwd know nothing of this user. It keeps root's files readable, where Python may lie in one's home."""
    import pwd

    def unknown(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    pwd.getpwuid = unknown  # type: ignore[assignment]


def _deleted_cwd(sandbox: Sandbox, cache: str) -> None:
    gone = sandbox.folder / "gone"
    gone.mkdir()
    sandbox.environment["JITNORM_CACHE_DIR"] = cache
    sandbox.deleted_cwd = gone


def real_build(sandbox: Sandbox, rng: random.Random) -> None:
    """The real compiler builds while the cache's calls fail, or is killed."""
    remove(sandbox.cache)
    sandbox.environment["CXX"] = sandbox.real_compiler
    sandbox.snapshot_outside()
    arm = Injection(tuple(rng.sample(CLASSES, 2)), rng.randrange(1, 20), "fail", rng.choice(ERRORS))
    how = rng.choice(("injected", "killed", "tools", "healthy"))
    sandbox.describe(f"a build by the real compiler, {how}{f': {arm}' if how != 'healthy' else ''}")
    if how == "killed":
        report = sandbox.run("load rmsnorm", arm=Injection(CHANGES, rng.randrange(1, 60), "kill"))
        sandbox.judge(report, allowed=("killed",))
    elif how == "tools":
        sandbox.judge(sandbox.run("load rmsnorm", tools=arm))
    else:
        sandbox.judge(
            sandbox.run("load rmsnorm", arm=arm if how == "injected" else None), must_succeed=how == "healthy"
        )
    sandbox.environment.clear()


# How often each kind is drawn, of a thousand.
WEIGHTS: dict[Kind, int] = {
    errno: 280,
    kill: 130,
    structure: 170,
    flip: 110,
    compiler: 70,
    race: 55,
    concurrent: 40,
    tool_errno: 25,
    limits: 30,
    disk: 35,
    planted: 10,
    swap: 10,
    in_use: 15,
    locked: 10,
    version: 10,
    path_names: 15,
    environment: 15,
    interrupt: 5,
    orphan: 3,
    real_build: 5,
}


def draw(rng: random.Random) -> Kind:
    """Draw a kind, by its weight."""
    return rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

"""Build each kernel once in a job of many processes, and send it to the other ranks of a process group.

1. Each rank announces which kernels it lacks, with which compilers it would build them, and which entries it has.
2. Rank 0 decides which rank builds or sends each kernel.
3. Each rank sends, builds its share, and adds the entries of other ranks to its cache.
4. What has not arrived when the time limit is over is built locally.

Everything travels through the key-value store of the process group, which any backend has, and not through collectives.
A collective that a rank does not join cannot be given up: with gloo the group is unusable afterwards, and with NCCL by
default the process is ended. Collectives of objects also unpickle, which executes what they receive, and with NCCL they
need memory of the GPU. Here the values are JSON and the bytes of `jitnorm.jit.archive`, which are checked before use.
"""

from __future__ import annotations

import _thread
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from jitnorm.jit import archive, locations, toolchain
from jitnorm.jit.cache import Cache, host_id, kernel_folder
from jitnorm.jit.entry import Entry
from jitnorm.jit.find import find
from jitnorm.jit.log import logger
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.warmup.run import Result, build_all, default_jobs, prepare, prepare_cache

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_CHUNK_BYTES = 1 << 22  # TCPStore closes the connection, which the group needs too, for a value above 8 MiB
_GRACE_S = 2.0  # for a request to the store that begins after the time limit, as after long builds
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.2


class Announcement(NamedTuple):
    """What a rank lacks and has.

    Attributes:
        node: A text that ranks with the same cache have in common.
        lacks: The folder in a cache of each kernel that it lacks, and the key of the compilers that would build it.
            "" if there are none: an entry of any compilers is accepted then.
        has: The labels of the entries in its caches.
    """

    node: str
    lacks: dict[str, str]
    has: list[str]


class Shares(NamedTuple):
    """Which rank does what.

    Attributes:
        sources: The rank that builds or sends an entry, by the entry's label.
        sent: The labels of those entries that another node lacks.
        ranks_on_node: How many ranks have the same cache as a rank, by the rank.
    """

    sources: dict[str, int]
    sent: list[str]
    ranks_on_node: list[int]

    def label_for(self, kernel: str, tools: str) -> str | None:
        """Return the label of the entry that a rank gets which lacks `kernel`, or None if it gets none.

        Args:
            kernel: The kernel's folder in a cache.
            tools: The key of the rank's compilers; "" accepts an entry of any.
        """
        if tools:
            return f"{kernel}/{tools}" if f"{kernel}/{tools}" in self.sources else None
        return next((label for label in self.sources if label.startswith(f"{kernel}/")), None)


def share_out(ranks: Sequence[Announcement | None]) -> Shares:
    """Return which rank builds or sends each kernel that some rank lacks; None stands for a rank that takes no part.

    An entry that a rank has is sent. Others are built by a rank that lacks them and has the compilers: nodes take turns
    first, then the ranks of a node.
    """
    present = {rank: each for rank, each in enumerate(ranks) if each}
    owners, builders, others = defaultdict(list), defaultdict(list), defaultdict(list)
    for rank, each in present.items():
        for label in each.has:
            owners[label].append(rank)
        for kernel, tools in each.lacks.items():
            if tools:
                builders[f"{kernel}/{tools}"].append(rank)
            else:
                others[kernel].append(rank)
    load: Counter[tuple[str, str | int]] = Counter()

    def least_loaded(task: str, candidates: list[int]) -> int:
        rank = min(candidates, key=lambda r: (load[task, present[r].node], load[task, r], r))
        load[task, present[rank].node] += 1
        load[task, rank] += 1
        return rank

    def source(label: str) -> int:
        return least_loaded("send", owners[label]) if label in owners else least_loaded("build", builders[label])

    sources = {label: source(label) for label in builders}
    receivers = {label: list(lacking) for label, lacking in builders.items()}
    for kernel, lacking in others.items():
        accepted = [label for label in (*sources, *owners) if label.startswith(f"{kernel}/")]
        for label in accepted[:1]:
            if label not in sources:
                sources[label] = source(label)
            receivers.setdefault(label, []).extend(lacking)
    sent = [
        label for label, rank in sources.items() if any(present[r].node != present[rank].node for r in receivers[label])
    ]
    sizes = Counter(each.node for each in present.values())
    return Shares(sources, sent, [sizes[each.node] if each else 1 for each in ranks])


class NoAnswer(Exception):
    """The store of the process group failed, or it or rank 0 did not answer in time."""


class Job:
    """One call of `warmup` on all ranks of a process group. Each rank enters it, and may raise in it.

    Args:
        process_group: The ranks.
        timeout: How many seconds after its start this call waits for other ranks.

    Raises:
        TypeError, ValueError: `process_group` is not accepted.
    """

    def __init__(self, process_group: object, timeout: float) -> None:
        store = _store_of(process_group)
        self._rank: int = process_group.rank()  # type: ignore[attr-defined]
        self._size: int = process_group.size()  # type: ignore[attr-defined]
        self._timeout = float(timeout)
        self._deadline = time.monotonic() + self._timeout
        self._store = _Values(store, self._deadline)
        self._is_announced = False
        self._unpublished: list[str] = []  # the labels that other ranks expect of this one
        self._log = logger.info if self._rank == 0 else logger.debug

    def __enter__(self) -> Job:
        with suppress(NoAnswer):
            # Counted in the store, so that a process that replaces another one need not know of earlier calls.
            self._store.prefix = f"jitnorm/warmup/{self._store.add(f'jitnorm/warmup/calls/{self._rank}')}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the other ranks what they need not wait for: an error of one rank does not cost the others the limit."""
        is_interrupted = kind is not None and not issubclass(kind, Exception)
        if is_interrupted:
            self._store.deadline = time.monotonic()
        try:
            if not self._is_announced:
                self._announce(Announcement("", {}, []))
                if self._rank == 0:
                    self._decide(waits=not is_interrupted)
            for label in list(self._unpublished):
                self._publish(label, error=f"{kind.__name__ if kind else 'NoAnswer'} was raised")
            if self._store.add(f"{self._store.prefix}/ended") == self._size:
                self._remove_values()
        except NoAnswer:
            pass  # the others notice it too
        finally:
            self._store.close()

    def build(self, result: Result, missing: Sequence[KernelSpec], jobs: int | None) -> None:
        """Build and receive kernels, and add them to `result`.

        Args:
            result: Its `cached` are the kernels that the caches have, which are sent to ranks that lack them.
            missing: The kernels that the caches lack.
            jobs: How many to build at a time; None for the CPUs divided by the ranks that share the cache.

        Raises:
            RuntimeError: The cache cannot be written, or a kernel can neither be built here nor received.
        """
        if missing:
            prepare_cache()
        try:
            orphans = self._build_and_receive(result, missing, jobs)
        except NoAnswer as error:
            done = {*result.built, *result.received, *(spec for spec, _ in result.failed)}
            orphans = {spec: str(error) for spec in missing if spec not in done}
        self._build_orphans(orphans, jobs, result)

    # The steps

    def _build_and_receive(
        self, result: Result, missing: Sequence[KernelSpec], jobs: int | None
    ) -> dict[KernelSpec, str]:
        """Send kernels, build this rank's share, and receive the rest. Return what is left to build, with reasons."""
        found = ((_find(spec), spec) for spec in result.cached)
        cached = {entry.label: spec for entry, spec in found if entry}
        tools = self._compilers_for(missing)
        self._announce(Announcement(_node(), {kernel_folder(spec): tools[spec] for spec in missing}, [*cached]))
        shares = self._decide() if self._rank == 0 else self._wait_for_shares()
        share: list[KernelSpec] = []
        expected: dict[KernelSpec, str] = {}
        orphans: dict[KernelSpec, str] = {}
        for spec in missing:
            label = shares.label_for(kernel_folder(spec), tools[spec])
            if label is None:
                orphans[spec] = "no other rank has it or builds it"
            elif shares.sources[label] == self._rank:
                share.append(spec)
            else:
                expected[spec] = label
        labels = {spec: f"{kernel_folder(spec)}/{tools[spec]}" for spec in share}
        to_send = [label for label in cached if shares.sources.get(label) == self._rank]
        self._unpublished = [*to_send, *labels.values()]
        for label in to_send:
            self._publish(label, cached[label], label in shares.sent)
        for outcome in build_all(share, jobs or max(1, default_jobs() // shares.ranks_on_node[self._rank])):
            result.add(outcome)
            if outcome.error is None:
                self._log("warm-up: built %s in %.1f s", outcome.spec, outcome.seconds)
            with suppress(NoAnswer):  # the builds go on
                label = labels[outcome.spec]
                self._publish(label, outcome.spec, label in shares.sent, error=outcome.error)
        for spec, label in expected.items():
            if reason := self._receive(spec, label, shares.sources[label]):
                orphans[spec] = reason
            else:
                result.received.append(spec)
                self._log("warm-up: received %s from rank %d", spec, shares.sources[label])
        return orphans

    def _announce(self, announcement: Announcement) -> None:
        self._is_announced = True
        self._store.put(f"rank/{self._rank}", json.dumps(announcement).encode())

    def _decide(self, waits: bool = True) -> Shares:
        """Return the shares, which other ranks wait for. Without `waits` nothing is shared out.

        Half of the time is left for the builds: ranks that began with this one do not wait longer than it does.
        """
        keys = [f"rank/{rank}" for rank in range(self._size)]
        announced: list[bytes | None] = [None] * self._size
        if waits:
            for _ in _pauses(self._deadline - self._timeout / 2):
                if self._store.has(keys):
                    break
            announced = [self._store.get(key) for key in keys]
            if late := [str(rank) for rank, text in enumerate(announced) if text is None]:
                logger.warning(
                    "warm-up: these ranks did not call it within %g s, and take no part: %s",
                    *(self._timeout / 2, ", ".join(late)),
                )
        shares = share_out([Announcement(*json.loads(text)) if text else None for text in announced])
        self._store.put("shares", json.dumps(shares).encode())
        self._log("warm-up: %d ranks share out %d kernels", self._size, len(shares.sources))
        return shares

    def _wait_for_shares(self) -> Shares:
        for _ in _pauses(self._deadline):
            if text := self._store.get("shares"):
                return Shares(*json.loads(text))
        raise NoAnswer(f"rank 0 has not shared out the kernels within {self._timeout:g} s")

    def _publish(
        self, label: str, spec: KernelSpec | None = None, is_sent: bool = False, error: str | None = None
    ) -> None:
        """Tell the other ranks that the entry of a kernel is in the cache, and send it; or why it is not."""
        if spec and is_sent and error is None:
            try:
                entry = _find(spec)
                self._store.put(f"entry/{label}", archive.write(archive.pack([entry] if entry else [])))
            except (RuntimeError, ValueError, OSError) as problem:  # it was removed or damaged meanwhile
                error = str(problem)
        self._store.put(f"kernel/{label}", json.dumps({"error": error, "is_sent": is_sent}).encode())
        self._unpublished.remove(label)

    def _receive(self, spec: KernelSpec, label: str, source: int) -> str | None:
        """Wait for an entry, and add it to the cache unless another process has. Return why it cannot be added."""
        for _ in _pauses(self._deadline):
            if not (text := self._store.get(f"kernel/{label}")):
                continue
            published = json.loads(text)
            if published["error"] is not None:
                return f"rank {source} did not build it: {published['error']}"
            if _find(spec):
                return None
            if not published["is_sent"]:
                return f"rank {source} did not send it"
            cache = locations.writable()
            # Of the ranks that share the cache one adds the entry. If it dies, another one takes the lock.
            with cache.build_lock(spec, label.partition("/")[2]) as locked:
                if locked:
                    return None if _find(spec) else self._add(cache, spec, label, source)
        return f"rank {source} sent nothing within {self._timeout:g} s"

    def _add(self, cache: Cache, spec: KernelSpec, label: str, source: int) -> str | None:
        """Add the entry that a rank sent to the cache. Return why it cannot be added."""
        try:
            packed = archive.read(self._store.get(f"entry/{label}") or b"")
            if [entry.label for entry in packed] != [label]:
                return f"rank {source} sent another kernel"
            archive.add(cache, packed)
        except (archive.BadArchive, RuntimeError) as error:
            return f"what rank {source} sent cannot be added: {error}"
        return None if _find(spec) else f"the cache does not return what rank {source} sent"

    def _build_orphans(self, orphans: dict[KernelSpec, str], jobs: int | None, result: Result) -> None:
        """Build what did not come from another rank."""
        for spec in [spec for spec in orphans if _find(spec)]:  # another process of the node was faster
            del orphans[spec]
            result.received.append(spec)
        try:
            prepare([*orphans])
        except RuntimeError as error:
            spec, reason = next(iter(orphans.items()))
            raise RuntimeError(f"{spec} is missing ({reason}), and cannot be built on this rank: {error}") from None
        for reason in dict.fromkeys(orphans.values()):
            names = ", ".join(spec.name for spec, why in orphans.items() if why == reason)
            logger.warning("warm-up: building %s on this rank: %s", names, reason)
        for outcome in build_all([*orphans], jobs):
            result.add(outcome)

    def _compilers_for(self, specs: Sequence[KernelSpec]) -> dict[KernelSpec, str]:
        """Return the key of the compilers that would build each kernel here, "" where there are none."""
        keys: dict[Target, str] = {}
        for target in dict.fromkeys(spec.target for spec in specs):
            try:
                keys[target] = toolchain.require(target, locations.writable()).key
            except RuntimeError as error:  # which `_build_orphans` raises if no other rank sends the kernels
                logger.debug("%s", error)
                keys[target] = ""
        return {spec: keys[spec.target] for spec in specs}

    def _remove_values(self) -> None:
        """Remove what the ranks have written, and none of them reads any more."""
        text = self._store.get("shares")
        labels = Shares(*json.loads(text)).sources if text else {}
        keys = [f"rank/{rank}" for rank in range(self._size)]
        keys += [f"{kind}/{label}" for label in labels for kind in ("kernel", "entry")]
        for key in [*keys, "shares"]:
            self._store.remove(key)


def _pauses(until: float) -> Iterator[None]:
    """Yield at once, then after ever longer pauses, and a last time when the time is over."""
    pause = _FIRST_PAUSE_S
    while True:
        yield
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class _Values:
    """The values of one call in the store of a process group. A request ends by the deadline, or soon after it.

    Requests are made in a thread: one to a machine that was switched off may never return, and none reacts to Ctrl-C.
    All methods raise NoAnswer, also after an earlier request that failed.
    """

    def __init__(self, store: Store, deadline: float) -> None:
        self.prefix = ""
        self.deadline = deadline
        self._store = store
        self._lost = ""
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._is_started = False

    def add(self, key: str) -> int:
        """Add 1 to a counter, whose key gets no prefix, and return it."""
        return int(self._request(self._store.add, key, 1))

    def has(self, keys: Sequence[str]) -> bool:
        """Return whether each of `keys` has a value."""
        return bool(self._request(self._store.check, [f"{self.prefix}/{key}" for key in keys]))

    def get(self, key: str) -> bytes | None:
        """Return a value, or None if there is none."""
        if not self.has([key]):
            return None
        return b"".join(self._request(self._store.get, chunk) for chunk in self._chunks(key))

    def put(self, key: str, value: bytes) -> None:
        """Write a value, which the other ranks see when it is complete."""
        starts = range(0, len(value), _CHUNK_BYTES)
        for number, start in enumerate(starts):
            self._request(self._store.set, f"{self.prefix}/{key}/{number}", value[start : start + _CHUNK_BYTES])
        self._request(self._store.set, f"{self.prefix}/{key}", str(len(starts)))

    def remove(self, key: str) -> None:
        """Remove a value, if there is one."""
        if self.has([key]):
            for name in (*self._chunks(key), f"{self.prefix}/{key}"):
                self._request(self._store.delete_key, name)

    def close(self) -> None:
        """End the thread."""
        self._requests.put(None)

    def _chunks(self, key: str) -> list[str]:
        count = int(self._request(self._store.get, f"{self.prefix}/{key}"))
        return [f"{self.prefix}/{key}/{number}" for number in range(count)]

    def _request(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Return what `function` returns, which the thread calls."""
        answers: SimpleQueue[Any] = SimpleQueue()
        try:
            if not self._lost and not self._is_started:
                # Thread.start would wait forever for a thread that runs out of memory before its first line.
                _thread.start_new_thread(_answer, (self._requests,))
                self._is_started = True
            if not self._lost:
                self._requests.put((function, arguments, answers))
                answer = answers.get(timeout=max(self.deadline - time.monotonic(), _GRACE_S))
                if not isinstance(answer, Exception):
                    return answer
                self._lost = str(answer).partition("\n")[0]  # what follows is a stack trace of C++
        except Empty:
            self._lost = "it does not answer"
        except (RuntimeError, MemoryError) as error:
            self._lost = f"no thread can be started: {error}"
        raise NoAnswer(f"the store of process_group failed: {self._lost}")


_Request: TypeAlias = tuple[Callable[..., Any], tuple[object, ...], SimpleQueue[Any]]


def _answer(requests: SimpleQueue[_Request | None]) -> None:
    """Make requests, one after the other, until None comes."""
    while request := requests.get():
        function, arguments, answers = request
        try:
            answers.put(function(*arguments))
        except Exception as error:
            answers.put(error)


def _store_of(process_group: object) -> Store:
    kind = getattr(torch.distributed, "ProcessGroup", None)  # torch may be built without it
    if not kind or not isinstance(process_group, kind):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    from torch.distributed.distributed_c10d import _get_process_group_store

    try:
        return _get_process_group_store(process_group)
    except KeyError:
        raise ValueError("process_group must be a group that exists, got one that was destroyed") from None


def _node() -> str:
    """Return a text that processes with the same cache have in common: the machine, and the folder's place on it.

    Containers of one machine may have different folders of the same path. Machines that share a folder over the network
    look into it before they add an entry.
    """
    root = locations.default_root()
    with suppress(OSError):
        stat = os.stat(root)
        return f"{host_id()}.{stat.st_dev}.{stat.st_ino}"
    return f"{host_id()}.{root}"


def _find(spec: KernelSpec) -> Entry | None:
    return find(spec, mark_in_use=False, may_build=True)

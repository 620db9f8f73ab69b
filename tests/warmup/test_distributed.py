"""`jitnorm.warmup` on the ranks of a process group: each kernel is built once, and no rank waits for one that fails.

A node is a cache folder of its own. Most tests build with a compiler that copies a library. No test waits for a time
limit to be over unless it says so: where the limit is an hour, a rank that waits in vain fails the test.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import processes
import pytest
import torch
import torch.distributed as dist
from packed_entries import fake

import jitnorm
from jitnorm.jit import archive
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import rmsnorm_spec
from jitnorm.warmup import distributed
from jitnorm.warmup.distributed import Announcement, share_out

LIMIT_S = 150.0  # until a test fails because a process hangs
NEVER_S = 3600.0
SIZES = [64, 128, 256, 512, 768, 1024]

JOIN = """
    import json, os, pathlib, signal, sys, time
    import torch, torch.distributed as dist
    import jitnorm

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["RANK_PID"] = str(os.getpid())
    if "STORE_PORT" in os.environ:
        store = dist.TCPStore("127.0.0.1", int(os.environ["STORE_PORT"]), is_master=False)
    elif rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pathlib.Path("port.new").write_text(str(store.port))
        os.rename("port.new", "port")
    else:
        while not os.path.exists("port"):
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(pathlib.Path("port").read_text()), is_master=False)
    dist.init_process_group(os.environ.get("BACKEND", "gloo"), store=store, rank=rank, world_size=size)
    group = dist.group.WORLD

    def names(specs):
        return sorted(spec.name for spec in specs)

    def report(result):
        found = {name: names(getattr(result, name)) for name in ("built", "received", "cached")}
        print(json.dumps({**found, "failed": [error for _, error in result.failed]}), flush=True)

    def warm_up(sizes, timeout, **options):
        options = {"dtype": "fp32", "device": "cpu", "process_group": group, "timeout": timeout, **options}
        result = jitnorm.warmup(hidden_size=sizes, **options)
        report(result)
        return result
"""
# The store, and so its host, is there until all ranks have ended.
LEAVE = """
    dist.barrier()
    leftovers = [f"jitnorm/warmup/1/{key}" for key in ("shares", "rank/0", *(f"rank/{r}/0" for r in range(size)))]
    assert not any(dist.distributed_c10d._get_process_group_store(group).check([key]) for key in leftovers)
    dist.destroy_process_group()
"""


class Ended(NamedTuple):
    """A rank that has ended: its exit code, the reports of its warm-ups, and its standard error."""

    code: int
    reports: list[dict[str, Any]]
    error: str

    @property
    def names(self) -> dict[str, list[str]]:
        assert self.code == 0, self.error
        return self.reports[0]


class Cluster:
    """The ranks of a process group, and a compiler that copies a library and logs what it builds."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self._library = library
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.log = folder / "log"
        self.log.touch()
        self._started: list[processes.Forked] = []

    def compiler(self, name: str = "g++", before: str = ":") -> str:
        """Returns the path of a compiler that runs `before` in its shell, before it copies the library."""
        path = self.folder / name
        path.write_text(
            f"""#!/bin/sh
case "$*" in --version) echo copier 1.0; exit 0 ;; esac
{before}
sed -n 's/^using Kernel = .*<\\([0-9]*\\),.*/\\1/p' module.cc >> {self.log}
for out; do :; done
cp {self._library} "$out"
"""
        )
        path.chmod(0o755)
        return str(path)

    def node(self, number: int) -> Path:
        return self.folder / f"node{number}"

    def start(self, *script: str, size: int, ranks_per_node: int = 1, **environments: Any) -> list[processes.Forked]:
        """Starts the ranks. `rank3={...}` changes the environment of rank 3, `common={...}` that of all."""
        started = []
        for rank in range(size):
            own = {**environments.get("common", {}), **environments.get(f"rank{rank}", {})}
            environment = self.environment(rank, size, ranks_per_node) | own
            started.append(processes.start(JOIN, *script, **environment))
        self._started += started
        return started

    def environment(self, rank: int, size: int, ranks_per_node: int = 1) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "STORE_PORT": str(self._store.port),
            "GLOO_SOCKET_IFNAME": "lo",
            "JITNORM_CACHE_DIR": str(self.node(rank // ranks_per_node)),
            "JITNORM_LOG": "info",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "CXX": self.compiler(),
        }

    def run(self, *script: str, **options: Any) -> list[Ended]:
        return self.end(self.start(*script, **options))

    @staticmethod
    def end(started: list[processes.Forked]) -> list[Ended]:
        ended = []
        for process in started:
            out, error = process.communicate(LIMIT_S)
            ended.append(Ended(process.wait(), [json.loads(line) for line in out.splitlines()], error))
        return ended

    def close(self) -> None:
        """Kills what a test has left."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
        del self._store  # whose descriptors other tests would count

    @property
    def builds(self) -> Counter[int]:
        """How often each hidden size was built, on all nodes."""
        return Counter(map(int, self.log.read_text().split()))

    def kernels(self, number: int) -> list[str]:
        """The kernels in the cache of a node."""
        return sorted(path.parent.name.partition(".")[0] for path in self.node(number).glob("kernels/*/*"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entry = build(rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu")))
    return Path(shutil.copy(entry.library, tmp_path_factory.mktemp("built") / "library.so"))


@pytest.fixture
def cluster(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(tmp_path, library)
    yield cluster
    cluster.close()


def kernel_names(sizes: list[int]) -> list[str]:
    return sorted(f"rmsnorm_{size}_fp32" for size in sizes)


@pytest.mark.slow
# Every rank ends well


def test_two_nodes_build_one_kernel_each_and_call_both(cluster):
    script = """
        warm_up([64, 128], 3600)
        os.environ["JITNORM_DISABLE_JIT"] = "1"
        for hidden_size in (64, 128):
            x = torch.randn(3, hidden_size)
            out = jitnorm.rmsnorm(x, torch.ones(hidden_size), eps=0.0)
            torch.testing.assert_close(out, x / x.square().mean(-1, keepdim=True).sqrt())
    """
    ended = cluster.run(script, LEAVE, size=2, common={"CXX": shutil.which("c++")})
    built = [rank.names["built"] for rank in ended]
    assert [len(names) for names in built] == [1, 1] and sorted(built[0] + built[1]) == kernel_names([64, 128])
    assert [rank.names["received"] for rank in ended] == built[::-1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_build_one_kernel_each_and_call_both(cluster):
    script = """
        torch.cuda.set_device(rank)
        warm_up([128, 4096], 3600, dtype="bf16", device="cuda")
        os.environ["JITNORM_DISABLE_JIT"] = "1"
        for hidden_size in (128, 4096):
            x = torch.randn(3, hidden_size, device="cuda").bfloat16()
            out = jitnorm.rmsnorm(x, torch.ones_like(x[0]), eps=0.0)
            expected = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
            torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=0)
    """
    own = {"CXX": shutil.which("c++"), "BACKEND": "nccl"}

    def run(rank: int) -> Ended:  # in a new process: one that torch has been forked into cannot use CUDA
        done = processes.run_fresh(JOIN, script, LEAVE, **cluster.environment(rank, 2) | own)
        return Ended(done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, range(2)))
    names = ["rmsnorm_128_bf16", "rmsnorm_4096_bf16"]
    assert [sorted(rank.names["built"] + rank.names["received"]) for rank in ended] == [names, names], ended
    assert [len(rank.names["built"]) for rank in ended] == [1, 1]


def check_one_build_each(cluster: Cluster, ended: list[Ended], nodes: int) -> None:
    assert [sorted(rank.names["built"] + rank.names["received"]) for rank in ended] == [kernel_names(SIZES)] * len(
        ended
    )
    assert cluster.builds == Counter(SIZES)
    assert sum(len(rank.names["built"]) for rank in ended) == len(SIZES)
    assert [cluster.kernels(node) for node in range(nodes)] == [kernel_names(SIZES)] * nodes
    assert not any(rank.names["failed"] or "Traceback" in rank.error for rank in ended)


@pytest.mark.slow
def test_eight_ranks_on_four_nodes_build_each_kernel_once(cluster):
    script = f"""
        from jitnorm.jit import archive

        def add(cache, packed, original=archive.add):
            added = original(cache, packed)
            with open("added", "a") as file:
                print(cache.root.name, *added.new, *added.present, file=file)

        archive.add = add
        warm_up({SIZES}, {NEVER_S})
        warm_up({SIZES}, {NEVER_S})
    """
    ended = cluster.run(script, LEAVE, size=8, ranks_per_node=2)
    check_one_build_each(cluster, ended, 4)
    added = Path("added").read_text().splitlines()
    assert len(added) == len({*added}) == 3 * len(SIZES)  # each kernel once on each node that did not build it
    assert [rank.reports[1]["cached"] for rank in ended] == [kernel_names(SIZES)] * 8
    # Rank 0 alone logs progress.
    assert "warm-up: 8 ranks share out 6 kernels" in ended[0].error and "warm-up: received" in ended[0].error
    assert [rank.error for rank in ended[1:]] == [""] * 7


@pytest.mark.slow
def test_thirty_two_ranks_on_eight_nodes_build_each_kernel_once(cluster):
    ended = cluster.run(f"warm_up({SIZES}, {NEVER_S})", LEAVE, size=32, ranks_per_node=4)
    check_one_build_each(cluster, ended, 8)


def test_a_kernel_in_one_cache_is_sent_and_not_built(cluster):
    script = """
        if rank == 1:
            warm_up([64], 3600, process_group=None)
        dist.barrier()
        warm_up([64], 3600)
    """
    ended = cluster.run(script, LEAVE, size=3)
    assert cluster.builds == Counter([64])
    assert [rank.reports[-1]["received"] for rank in ended] == [kernel_names([64]), [], kernel_names([64])]
    assert ended[1].reports[-1]["cached"] == kernel_names([64])


def test_no_collective_is_used(cluster):
    """So that a group of any backend will do, as one of NCCL."""
    script = """
        class WithoutCollectives(dist.ProcessGroup):
            pass

        dist.Backend.register_backend("without", lambda store, rank, size, timeout: WithoutCollectives(rank, size))
        group = dist.new_group(backend="without")
        warm_up([64, 128], 3600)
        group = dist.group.WORLD
    """
    ended = cluster.run(script, LEAVE, size=2)
    assert [len(rank.names["received"]) for rank in ended] == [1, 1] and cluster.builds == Counter([64, 128])


def test_ranks_of_different_processors_take_nothing_from_each_other(cluster):
    script = """
        from jitnorm.jit import spec

        if rank == 2:
            spec.cpu_features = lambda: "another processor"
        warm_up([64, 128], 3600)
    """
    ended = cluster.run(script, LEAVE, size=3)
    assert ended[2].names["built"] == kernel_names([64, 128]) and not ended[2].names["received"]
    assert [len(rank.names["received"]) for rank in ended[:2]] == [1, 1]
    assert cluster.builds == Counter([64, 128] * 2)


def test_a_subgroup_shares_out_among_its_ranks(cluster):
    script = """
        group = dist.new_group([1, 2])
        if rank:
            warm_up([64, 128], 3600)
        group = dist.group.WORLD
        dist.barrier()
        dist.destroy_process_group()
    """
    ended = cluster.run(script, size=3)
    assert [len(rank.names["received"]) for rank in ended[1:]] == [1, 1]
    assert [rank.error.count("share out") for rank in ended] == [0, 1, 0]


# A rank fails


def test_a_rank_without_a_compiler_receives_all_kernels(cluster):
    ended = cluster.run(f"warm_up({SIZES}, {NEVER_S})", LEAVE, size=3, rank0={"CXX": "/nonexistent"})
    assert ended[0].names["received"] == kernel_names(SIZES) and not ended[0].names["built"]
    assert cluster.builds == Counter(SIZES)


def test_no_rank_has_a_compiler(cluster):
    ended = cluster.run(f"warm_up([64], {NEVER_S})", size=2, common={"CXX": "/nonexistent"})
    assert [rank.code for rank in ended] == [1, 1]
    for rank in ended:
        error = rank.error.splitlines()[-1]
        assert "is missing (no other rank has it or builds it), and cannot be built on this rank" in error
        assert "jitnorm needs a C++ compiler and found none" in error


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_cannot_write_its_cache_raises_and_the_others_go_on(cluster, bad_rank):
    (cluster.folder / "file").touch()
    environment = {f"rank{bad_rank}": {"JITNORM_CACHE_DIR": str(cluster.folder / "file")}}
    ended = cluster.run(f"warm_up({SIZES}, {NEVER_S})", size=3, **environment)
    assert ended[bad_rank].code == 1 and "cannot keep kernels in" in ended[bad_rank].error.splitlines()[-1]
    others = [rank for number, rank in enumerate(ended) if number != bad_rank]
    assert [sorted(rank.names["built"] + rank.names["received"]) for rank in others] == [kernel_names(SIZES)] * 2
    assert cluster.builds == Counter(SIZES)


def test_a_rank_with_other_arguments_raises_and_the_others_go_on(cluster):
    ended = cluster.run(f"warm_up([64, 96] if rank == 1 else [64], {NEVER_S})", size=3)
    assert [rank.code for rank in ended] == [0, 1, 0] and "hidden_size" in ended[1].error
    assert cluster.builds == Counter([64])


def test_an_exception_in_a_build_leaves_the_kernel_to_the_others(cluster):
    script = """
        from jitnorm.warmup import run

        def interrupt(spec):
            raise KeyboardInterrupt

        if rank == 1:
            run._build = interrupt
        warm_up([64, 128], 3600)
    """
    ended = cluster.run(script, size=3)
    assert [rank.code for rank in ended] == [0, 1, 0] and "KeyboardInterrupt" in ended[1].error
    assert cluster.builds[64] == 1 and cluster.builds[128] == 2  # by ranks 0 and 2, which have a cache each
    assert "rank 1 did not build it: KeyboardInterrupt was raised" in ended[0].error


def test_rank_0_is_interrupted_before_it_shares_out(cluster):
    script = """
        from jitnorm.warmup import run

        def interrupt(specs):
            raise KeyboardInterrupt

        if rank == 0:
            run.find_cached = interrupt
        warm_up([64, 128], 3600)
    """
    ended = cluster.run(script, size=3)
    assert [rank.code for rank in ended] == [1, 0, 0]
    assert [rank.names["built"] for rank in ended[1:]] == [kernel_names([64, 128])] * 2


@pytest.mark.slow
def test_rank_0_never_calls(cluster):
    """The others wait until the time limit is over."""
    ended = cluster.run("rank == 0 or warm_up([64, 128], 1)", size=3)
    for rank in ended[1:]:
        assert rank.names["built"] == kernel_names([64, 128])
        assert "rank 0 has not shared out the kernels within 1 s" in rank.error


def test_a_failed_build_is_tried_by_each_rank(cluster):
    failing = cluster.compiler("failing", 'grep -q "<128," module.cc && { echo "x.h:1:2: error: boom"; exit 1; }')
    ended = cluster.run(f"warm_up([64, 128], {NEVER_S})", LEAVE, size=2, rank1={"CXX": failing})
    assert ended[0].names["built"] == kernel_names([64, 128])
    assert ended[1].names["received"] == kernel_names([64]) and "boom" in ended[1].names["failed"][0]


@pytest.mark.slow
def test_a_rank_killed_while_it_builds_leaves_the_others_with_a_local_build(cluster):
    """The others wait until the time limit is over, as nothing tells them that the rank has ended."""
    deadly = cluster.compiler("deadly", "kill -KILL $RANK_PID; sleep 60")
    sizes = [64, 128, 256, 512]  # of which the third is the victim's
    ended = cluster.run(f"dist.barrier(); warm_up({sizes}, 3)", size=4, ranks_per_node=2, rank1={"CXX": deadly})
    assert ended[1].code == -signal.SIGKILL
    for rank in (ended[0], ended[2], ended[3]):
        assert sorted(rank.names["built"] + rank.names["received"]) == kernel_names(sizes)
    assert cluster.kernels(0) == cluster.kernels(1) == kernel_names(sizes)


@pytest.mark.slow
def test_a_rank_that_never_calls_takes_no_part(cluster):
    script = """
        dist.barrier()
        if rank == 1:
            sys.stdin.read()  # until the other ranks have ended
        else:
            warm_up([64, 128], 3)
    """
    started = cluster.start(script, size=3)
    ended = cluster.end([started[0], started[2]])
    for rank in ended:
        assert sorted(rank.names["built"] + rank.names["received"]) == kernel_names([64, 128])
    assert "these ranks did not call it within 1.5 s, and take no part: 1" in ended[0].error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "timeout", "says"),
    [(signal.SIGKILL, NEVER_S, "the store of process_group failed"), (signal.SIGSTOP, 3, "it does not answer")],
)
def test_the_host_of_the_store_is_lost(cluster, number, timeout, says):
    """One that is stopped closes no connection, as one that is switched off: the time limit ends the wait."""
    script = f"""
        from jitnorm.warmup import distributed

        distributed.share_out = lambda ranks: os.kill(os.getpid(), {int(number)})
        dist.barrier()
        warm_up([64, 128], {timeout})
    """
    started = cluster.start(script, size=2, common={"STORE_PORT": None})
    (survivor,) = cluster.end(started[1:])
    assert survivor.names["built"] == kernel_names([64, 128]) and says in survivor.error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data[: len(data) // 2] + b'damage' + data[len(data) // 2 + 6 :]", "was altered"),
        ("b''", "it is not a tar archive"),
        ("empty", "sent another kernel"),
    ],
)
def test_altered_bytes_are_not_added(cluster, change, says):
    script = f"""
        from jitnorm.jit import archive

        original, empty = archive.write, archive.write([])
        if rank == 0:
            archive.write = lambda entries: (lambda data: {change})(original(entries))
        warm_up([64], 3600)
    """
    ended = cluster.run(script, LEAVE, size=2)
    assert ended[1].names["built"] == kernel_names([64]) and cluster.builds == Counter({64: 2})
    assert says in ended[1].error


# Parts


def announced(node: str, lacks: list[str] = (), has: list[str] = (), tools: str = "t") -> Announcement:
    return Announcement(node, dict.fromkeys(lacks, tools), [f"{kernel}/t" for kernel in has])


def test_nodes_take_turns_before_the_ranks_of_a_node():
    lacks = ["a", "b", "c", "d", "e"]
    shares = share_out([announced("x", lacks), announced("x", lacks), announced("y", lacks)])
    assert shares.sources == {"a/t": 0, "b/t": 2, "c/t": 1, "d/t": 2, "e/t": 0}
    assert shares.sent == [*shares.sources] and shares.ranks_on_node == [2, 2, 1]


def test_nothing_is_sent_within_a_node_or_to_a_rank_that_has_it():
    shares = share_out([announced("x", ["a"]), announced("x", ["a"]), announced("y", [], ["b"])])
    assert shares.sources == {"a/t": 0} and shares.sent == []


def test_a_rank_without_compilers_gets_an_entry_of_any():
    without = announced("y", ["a", "b", "c"], tools="")
    shares = share_out([announced("x", ["a"], ["b"]), without, None])
    assert shares.sources == {"a/t": 0, "b/t": 0} and shares.sent == ["a/t", "b/t"]
    assert [shares.label_for(kernel, "") for kernel in "abc"] == ["a/t", "b/t", None]
    assert [shares.label_for("a", tools) for tools in ("t", "u")] == ["a/t", None]


def test_values_larger_than_a_store_accepts_are_sent_in_parts():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = distributed._Values(dist.TCPStore("127.0.0.1", server.port, is_master=False), 0.0)
    before = server.num_keys()
    packed = [fake(name=f"rmsnorm_{size}_fp32", content=bytes(9 << 20)) for size in (64, 128)]
    data = archive.write(packed)
    assert len(data) > 1 << 24
    for value in (data, b""):
        store.put("key", value)
        assert store.get("key") == value
        store.remove("key")
        assert store.get("key") is None and server.num_keys() == before
    store.close()


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"process_group": "gloo"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
        ({"process_group": dist.GroupMember.NON_GROUP_MEMBER}, TypeError, "process_group must be a torch.distributed"),
        ({"timeout": "60"}, TypeError, "timeout must be a float, got str"),
        ({"timeout": True}, TypeError, "timeout must be a float, got bool"),
        ({"timeout": 0}, ValueError, "timeout must be a finite number of seconds above 0, got 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be a finite number of seconds above 0, got nan"),
        ({"timeout": float("inf")}, ValueError, "timeout must be a finite number of seconds above 0, got inf"),
    ],
)
def test_bad_arguments(cache_dir, options, kind, says):
    with pytest.raises(kind, match=says):
        jitnorm.warmup(hidden_size=64, device="cpu", **options)
    assert not cache_dir.exists()


def test_a_group_that_was_destroyed(cache_dir, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    group = dist.group.WORLD
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="process_group must be a group that exists, got one that was destroyed"):
        jitnorm.warmup(hidden_size=64, device="cpu", process_group=group)
    assert not cache_dir.exists()

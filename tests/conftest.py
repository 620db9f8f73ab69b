"""What all tests share: one cache of built kernels for the session, fixtures, and the skips of gpu and nvcc."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Iterator

import processes
import pytest

# Set before anything is built. Workers of pytest-xdist inherit the folder from the process that starts them, which
# removes it. Tests of the cache itself use a folder of their own: see `cache_dir`.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
    os.environ["JITNORM_CACHE_DIR"] = tempfile.mkdtemp(prefix="jitnorm-tests-")
_CACHE = os.environ["JITNORM_CACHE_DIR"]
for name in ("JITNORM_PREBUILT_DIR", "JITNORM_DISABLE_JIT", "JITNORM_REMOTE_CACHE"):
    os.environ.pop(name, None)

# Threads that wait in a loop for the next parallel region would take the time of other workers. OpenMP reads this when
# it is loaded, with torch: it applies to the workers and to what tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Another number gives every test other random data: CONTRIBUTING says when to use it.
_SEED = os.environ.get("JITNORM_TEST_SEED", "0")

# The files that take longest go first, so that the workers end at about the same time.
_LONGEST_FILES = (
    "batch_invariant/verify/test_verify.py",
    "core/test_tracing.py",
    "core/test_architectures.py",
    "test_compile_block.py",
    "test_fused_add_rmsnorm.py",
    "batch_invariant/attention/test_triton_kernels.py",
    "test_rmsnorm_quant_fp8.py",
    "faults/test_campaign.py",
    "test_torch_registration.py",
    "documentation/test_adding_a_kernel.py",
    "benchmark/test_scripts.py",
    "test_activation.py",
    "jit/test_load.py",
    "warmup/test_distributed.py",
    "warmup/test_run.py",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set what is read when torch and Triton are imported. The process that starts workers imports neither."""
    if session.config.getoption("numprocesses", None) and not _IS_WORKER:
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do at any time
        # The workers keep all processors busy. Inductor would start more processes, each of which imports torch.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_unconfigure() -> None:
    if not _IS_WORKER:
        shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    from jitnorm.jit.toolchain import find_nvcc

    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "no CUDA device"
    if not find_nvcc():
        lacking["nvcc"] = "no nvcc"
    for item in items:
        for marker, why in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONGEST_FILES))


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what lives to the end, and run less often: it took a tenth of a worker's time."""
    gc.collect()
    gc.freeze()  # modules, and the tests themselves
    gc.set_threshold(20_000, 20, 10)


@pytest.fixture(scope="session", autouse=True)
def _close_servers() -> Iterator[None]:
    yield
    processes.close_servers()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed the generators from the test's name: its data does not depend on the tests that ran before it."""
    import torch

    seed = zlib.crc32(f"{_SEED}:{request.node.nodeid}".encode())
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, for devices that are not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """Return the path of an empty cache of the test's own. Kernels loaded before are forgotten until the test ends."""
    from jitnorm.core.operators import OPERATORS
    from jitnorm.jit import find, load, locations, log, toolchain
    from jitnorm.rmsnorm import _jit_rmsnorm_module

    folder = tmp_path / "cache"
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(folder))
    monkeypatch.setattr(load, "_loaded", {})
    monkeypatch.setattr(find, "_failed", {})
    monkeypatch.setattr(locations, "_temporary", None)
    monkeypatch.setattr(toolchain, "_unresponsive", {})
    log.warn_once.cache_clear()
    known = [table for operator in OPERATORS.values() for table in operator.tables]
    before = [dict(table) for table in known]
    for table in known:
        table.clear()
    _jit_rmsnorm_module.cache_clear()
    yield folder
    for table, content in zip(known, before, strict=True):
        table.clear()
        table.update(content)
    _jit_rmsnorm_module.cache_clear()


@pytest.fixture
def cache_with_launcher(cache_dir, monkeypatch):
    """Return the path of a cache of the test's own that has the launcher, the part that takes longest to build."""
    from jitnorm.jit.build import build
    from jitnorm.jit.spec import LAUNCHER

    monkeypatch.setenv("JITNORM_CACHE_DIR", _CACHE)
    folder = build(LAUNCHER).path
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(cache_dir))
    shutil.copytree(folder, cache_dir / folder.relative_to(_CACHE))
    return cache_dir

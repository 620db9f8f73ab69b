"""CPU kernels use as many threads as torch.set_num_threads says, whichever Python thread calls."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import os, sys, threading, torch, jitnorm

def count():
    return len(os.listdir("/proc/self/task"))

def call():
    jitnorm.rmsnorm(torch.randn(64, 64), w)  # too short for threads: it builds and loads
    before = count()
    jitnorm.rmsnorm(x, w)
    print(count() - before)

torch.set_num_threads(int(sys.argv[1]))
x, w = torch.ones(4096, 64), torch.ones(64)
thread = threading.Thread(target=call)
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])  # one alone, and as many as OpenMP would not take
def test_a_new_python_thread_uses_what_the_main_thread_set(threads):
    environment = os.environ | {"OMP_NUM_THREADS": "4"}  # what OpenMP would take by itself
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(threads)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == threads - 1

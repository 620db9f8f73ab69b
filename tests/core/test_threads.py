"""CPU kernels use as many threads as torch.set_num_threads says, whichever Python thread calls."""

from __future__ import annotations

import os
import subprocess
import sys

_SCRIPT = """
import os, sys, threading, torch, jitnorm

def count():
    return len(os.listdir("/proc/self/task"))

def call():
    jitnorm.rmsnorm(torch.randn(64, 64), w)  # too short for threads: it builds and loads
    before = count()
    jitnorm.rmsnorm(x, w)
    print(count() - before)

x, w = torch.ones(4096, 64), torch.ones(64)
for number in map(int, sys.argv[1:]):
    torch.set_num_threads(number)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
"""


def test_a_new_python_thread_uses_what_the_main_thread_set():
    environment = os.environ | {"OMP_NUM_THREADS": "4"}  # what OpenMP would take by itself
    done = subprocess.run(  # with one thread alone, and with as many as OpenMP would not take
        [sys.executable, "-c", _SCRIPT, "1", "3"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "2"]

"""Running many faults in several workers, and counting how they ended."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import inject

TESTS = Path(__file__).parents[1]
Answer = dict[str, Any]  # of a worker: the number, the kind, how it ended, what was wrong


@dataclass
class Counts:
    """How many faults or calls of each kind ended in each way."""

    rows: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[Answer] = field(default_factory=list)

    def note(self, answer: Answer) -> None:
        """Counts one fault or call."""
        row = self.rows.setdefault(answer["kind"], Counter())
        row["all"] += 1
        row[answer["met"]] += 1
        if answer["problems"]:
            row["wrong"] += 1
            self.wrong.append(answer)

    def table(self, title: str, columns: Sequence[str]) -> str:
        """Return the counts as a table in Markdown."""
        seen = {name for row in self.rows.values() for name in row if row[name]}
        names = [c for c in columns if c in seen or c == "wrong"]
        names[-1:-1] = sorted(seen - {"all", *columns})
        lines = [f"| {title} | all | {' | '.join(names)} |", f"|---|{'---:|' * (len(names) + 1)}"]
        total = Counter[str]()
        for kind, row in sorted(self.rows.items()):
            total.update(row)
            lines.append(f"| {kind} | {row['all']} | {' | '.join(str(row[n]) for n in names)} |")
        lines.append(f"| all | {total['all']} | {' | '.join(str(total[n]) for n in names)} |")
        return "\n".join(lines)


CALL_COLUMNS = ("accepted", "TypeError", "ValueError", "RuntimeError", "undefined", "crash", "wrong")
FAULT_COLUMNS = ("right", "exit", "raised", "interrupted", "killed", "crash", "hang", "failed", "wrong")


def _environment() -> dict[str, str]:
    """Return that of the workers: they find the tests, compute on one thread, and see no GPU.

    A forked child cannot use CUDA, whatever jitnorm does.
    """
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _together(work: Callable[[int], None], workers: int) -> None:
    """Runs `work` for each worker, in a thread of its own."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_calls(numbers: range, seed: int, workers: int, few: bool, report: Callable[[Answer], None]) -> Counts:
    """Make the calls of these numbers, and count them. Where a worker dies the call is counted as a crash."""
    counts = Counts()
    lock = threading.Lock()

    def note(answer: Answer) -> None:
        with lock:
            counts.note(answer)
            report(answer)

    def drive(number: int) -> None:
        index = numbers.start + number
        while index < numbers.stop:
            words = (seed, index, numbers.stop, workers, "few" if few else "all")
            command = [sys.executable, "-W", "ignore", "-m", "faults.calls", *map(str, words)]
            with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout
                for line in worker.stdout:
                    answer = json.loads(line)
                    note(answer)
                    index = answer["index"] + workers
            if worker.returncode:
                what = f"the process ended with {worker.returncode}"
                note({"index": index, "kind": "any", "met": "crash", "fault": "", "problems": [what]})
                index += workers

    _together(drive, workers)
    return counts


def run_faults(indices: Iterable[int], seed: int, workers: int, report: Callable[[Answer], None]) -> Counts:
    """Make the faults of these numbers, and count them. Each answer is handed to `report`."""
    counts = Counts()
    folder = Path(tempfile.mkdtemp(prefix="jitnorm-faults-"))
    try:
        preload = inject.compile_library(folder)
        environment = _environment()
        module = [sys.executable, "-m", "faults.worker"]
        subprocess.run([*module, "store", folder / "store"], env=environment, check=True)
        environment["LD_PRELOAD"] = str(preload)
        compiler = next(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in indices:
            todo.put(index)
        lock = threading.Lock()

        def note(answer: Answer) -> None:
            with lock:
                counts.note(answer)
                report(answer)

        def drive(number: int) -> None:
            """Keeps one worker busy, and starts another where it dies."""
            while not todo.empty():
                command = [*module, str(seed), folder / f"worker{number}" / "sandbox", folder / "store", compiler]
                worker = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                assert worker.stdin and worker.stdout
                if not worker.stdout.readline():
                    note({"index": -1, "kind": "start", "met": "failed", "fault": "", "problems": ["no worker"]})
                    return
                while True:
                    try:
                        index = todo.get_nowait()
                    except queue.Empty:
                        break
                    worker.stdin.write(f"{index}\n")
                    worker.stdin.flush()
                    line = worker.stdout.readline()
                    if not line:
                        what = f"the worker ended with {worker.wait()}"
                        note({"index": index, "kind": "worker", "met": "crash", "fault": "", "problems": [what]})
                        break
                    note(json.loads(line))
                worker.stdin.close()
                worker.wait()

        _together(drive, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts

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

from faults import inject

TESTS = Path(__file__).parents[1]


@dataclass
class Counts:
    """How many faults or calls of each kind ended in each way."""

    rows: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str, count: int = 1) -> None:
        self.rows.setdefault(kind, Counter())[outcome] += count

    def table(self, title: str, columns: Sequence[str]) -> str:
        """Return the counts as a table in Markdown."""
        names = [c for c in columns if any(row[c] for row in self.rows.values()) or c == "wrong"]
        lines = [f"| {title} | all | {' | '.join(names)} |", f"|---|{'---:|' * (len(names) + 1)}"]
        total = Counter[str]()
        for kind, row in sorted(self.rows.items()):
            total.update(row)
            lines.append(f"| {kind} | {row['all']} | {' | '.join(str(row[n]) for n in names)} |")
        lines.append(f"| all | {total['all']} | {' | '.join(str(total[n]) for n in names)} |")
        return "\n".join(lines)


FAULT_COLUMNS = ("right", "exit", "raised", "interrupted", "killed", "crash", "hang", "failed", "wrong")


def run_faults(indices: Iterable[int], seed: int, workers: int, report: Callable[[dict[str, object]], None]) -> Counts:
    """Make the faults of these numbers, and count them. Each answer is handed to `report`."""
    counts = Counts()
    folder = Path(tempfile.mkdtemp(prefix="jitnorm-faults-"))
    try:
        preload = inject.compile_library(folder)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }
        module = [sys.executable, "-m", "faults.worker"]
        subprocess.run([*module, "store", folder / "store"], env=environment, check=True)
        environment["LD_PRELOAD"] = str(preload)
        compiler = next(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in indices:
            todo.put(index)
        lock = threading.Lock()

        def note(answer: dict[str, object]) -> None:
            with lock:
                counts.add(str(answer["kind"]), "all")
                counts.add(str(answer["kind"]), str(answer["met"]))
                if answer["problems"]:
                    counts.add(str(answer["kind"]), "wrong")
                    counts.wrong.append(str(answer["index"]))
                report(answer)

        def drive(number: int) -> None:
            """Keeps one worker busy, and starts another where it dies."""
            while not todo.empty():
                command = [*module, str(seed), folder / f"worker{number}" / "box", folder / "store", compiler]
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

        threads = [threading.Thread(target=drive, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts

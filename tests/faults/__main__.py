"""Random faults of the engine and random calls of the operators; docs/faults.md says more."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from faults.campaign import CALL_COLUMNS, FAULT_COLUMNS, Answer, Counts, run_calls, run_faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000, help="how many faults of the engine")
    parser.add_argument("--calls", type=int, default=100_000, help="how many random calls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that make them")
    parser.add_argument("--fault", type=int, action="append", help="only the fault of this number; repeatable")
    parser.add_argument("--call", type=int, action="append", help="only the call of this number; repeatable")
    parser.add_argument("--verbose", action="store_true", help="print all, not only what was wrong")
    given = parser.parse_args()
    alone = given.fault or given.call
    tables: list[str] = []
    wrong = 0

    def reporter(what: str) -> tuple[float, Callable[[Answer], None]]:
        started, counted = time.monotonic(), [0, 0]

        def report(answer: Answer) -> None:
            counted[0] += 1
            counted[1] += bool(answer["problems"])
            if answer["problems"] or given.verbose or alone:
                name = f"{what} {answer['index']} of seed {given.seed}, {answer['kind']}"
                print(f"{name}: {answer['fault']}: {answer['met']}")
                for problem in answer["problems"]:
                    print(f"  wrong: {problem}")
                if answer["problems"]:
                    print(f"  again: python -m faults --seed {given.seed} --{what} {answer['index']}")
                sys.stdout.flush()
            if counted[0] % 1000 == 0:
                seconds = time.monotonic() - started
                print(f"{counted[0]} {what}s, {counted[1]} wrong, {seconds:.0f} s", file=sys.stderr, flush=True)

        return started, report

    def finish(what: str, started: float, counts: Counts, columns: tuple[str, ...]) -> None:
        nonlocal wrong
        wrong += len(counts.wrong)
        total = sum(row["all"] for row in counts.rows.values())
        tables.append(counts.table(what, columns))
        tables.append(
            f"{total} {what}s, seed {given.seed}: {len(counts.wrong)} wrong, {time.monotonic() - started:.0f} s\n"
        )

    faults = given.fault or ([] if alone else range(given.faults))
    if faults:
        started, report = reporter("fault")
        counts = run_faults(faults, given.seed, 1 if alone else given.workers, report)
        finish("fault", started, counts, FAULT_COLUMNS)
    for calls in [range(n, n + 1) for n in given.call or ()] or ([] if alone else [range(given.calls)]):
        if len(calls):
            started, report = reporter("call")
            workers = 1 if alone else given.workers
            counts = run_calls(calls, given.seed, workers, few=False, report=report)
            finish("call", started, counts, CALL_COLUMNS)
    print("\n" + "\n\n".join(tables))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

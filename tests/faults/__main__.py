"""`python -m faults`: the campaign of random faults and random calls. See docs/faults.md."""

from __future__ import annotations

import argparse
import sys
import time

from faults.campaign import FAULT_COLUMNS, run_faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000, help="how many faults of the engine")
    parser.add_argument("--calls", type=int, default=100_000, help="how many random calls of operators")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fault", type=int, action="append", help="only the fault of this number; repeatable")
    parser.add_argument("--call", type=int, action="append", help="only the call of this number; repeatable")
    parser.add_argument("--verbose", action="store_true", help="print every fault, not only what was wrong")
    given = parser.parse_args()
    alone = given.fault or given.call
    started = time.monotonic()
    wrong = 0

    def report(answer: dict[str, object]) -> None:
        if answer["problems"] or given.verbose or given.fault:
            print(f"fault {answer['index']} of seed {given.seed}, {answer['kind']}: {answer['fault']}")
            for problem in answer["problems"]:  # type: ignore[attr-defined]
                print(f"  wrong: {problem}")
            if answer["problems"]:
                print(f"  again: python -m faults --seed {given.seed} --fault {answer['index']}", flush=True)

    numbers = given.fault or ([] if alone else range(given.faults))
    if numbers:
        counts = run_faults(numbers, given.seed, 1 if alone else given.workers, report)
        print("\n" + counts.table("fault", FAULT_COLUMNS))
        wrong += len(counts.wrong)
    print(f"\nseed {given.seed}, {time.monotonic() - started:.0f} s, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""A small share of the campaign with a fixed seed, and whether the campaign notices what it looks for."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

import jitnorm
from faults import calls, campaign
from faults.inject import Injection, compile_library

SEED = 12
CALLS = 300


def lines(counts: campaign.Counts) -> str:
    """Return what was wrong, and how to see it alone."""
    return "\n".join(f"seed {SEED}, {answer}" for answer in counts.wrong)


needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler named cc")


@needs_cc
@pytest.mark.slow
def test_random_faults_of_the_engine():
    """Make the first fault of each kind; `make campaign` makes many of each."""
    from faults import kinds

    first: dict[str, int] = {}
    for index in range(10_000):
        first.setdefault(kinds.draw(random.Random(f"{SEED}:{index}")).__name__, index)
        if len(first) == len(kinds.WEIGHTS):
            break
    answers = []
    # One worker: each imports torch, and pytest-xdist keeps the other processors busy.
    counts = campaign.run_faults(first.values(), SEED, workers=1, report=answers.append)
    assert len(answers) == len(kinds.WEIGHTS)
    assert not counts.wrong, lines(counts)
    assert {kind: row["all"] for kind, row in counts.rows.items()} == dict.fromkeys(first, 1)


@pytest.mark.slow
def test_random_calls():
    counts = campaign.run_calls(range(CALLS), SEED, workers=1, few=True, report=lambda answer: None)
    assert not counts.wrong, lines(counts)
    ended = [sum(row[name] for row in counts.rows.values()) for name in ("all", "accepted", "TypeError", "ValueError")]
    assert ended[0] == CALLS and min(ended) > CALLS // 20, counts.rows


@needs_cc
def test_the_injection_fails_the_call_that_it_is_told_to(tmp_path):
    """In a process of its own, under the library."""
    (tmp_path / "cache").mkdir()
    program = """
import os, sys
from pathlib import Path
from faults.inject import Injection, library
folder = Path(sys.argv[1])
Injection(("open",), 2, "fail", "ESTALE").arm(folder / "cache")
(folder / "beside").write_text("not counted")
(folder / "cache" / "first").write_text("x")
try:
    os.open(folder / "cache" / "second", os.O_RDWR | os.O_CREAT)
except OSError as error:
    print(error.errno == __import__("errno").ESTALE, library().fault_fired())
(folder / "cache" / "third").write_text("x")
Injection(("rename",), 1, "kill").arm(folder / "cache")
(folder / "cache" / "third").rename(folder / "cache" / "fourth")
print("still alive")
"""
    environment = {**os.environ, "LD_PRELOAD": str(compile_library(tmp_path)), "PYTHONPATH": str(campaign.TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("True 1\n", -9), done.stderr
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["first", "third"]
    assert str(Injection(("open",), 2, "fail", "ESTALE")) == "ESTALE at call 2 of open"


def judged(make_wrong, monkeypatch, **more):
    """What is said of a plain call of rmsnorm that `make_wrong` stands for."""
    right = jitnorm.rmsnorm
    monkeypatch.setattr(jitnorm, "rmsnorm", lambda *arguments, **keywords: make_wrong(right, *arguments, **keywords))
    rows = calls.Tensor(torch.float32, (3, 64), (80, 1))
    arguments = {
        "input": rows,
        "weight": calls.Tensor(torch.float32, (64,), (1,)),
        "eps": 1e-6,
        "out": calls.Tensor(torch.float32, (3, 64), (64, 1), written=True, read=False),
        "enable_pdl": None,
    }
    call = calls.Call("rmsnorm", arguments, **more)
    arena = calls.Arena(inference=False)
    return calls.problems_of(call, calls.make(call, arena, "seed"), arena)


def beside(right, x, w, eps, out, pdl):
    right(x, w, eps, out, pdl)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel())[0] = 1.0  # just behind it
    return out


def inaccurate(right, x, w, eps, out, pdl):
    return right(x, w, eps, out, pdl).mul_(1 + 1e-4)


def one_row_not_written(right, x, w, eps, out, pdl):
    right(x[:2], w, eps, out[:2], pdl)
    return out


def refuses_after_writing(right, x, w, eps, out, pdl):
    right(x, w, eps, out, pdl)
    raise ValueError("out must be something else")


def undocumented(right, x, w, eps, out, pdl):
    raise OverflowError("integer division result too large for a float")


def correct(right, x, w, eps, out, pdl):
    return right(x, w, eps, out, pdl)


@pytest.mark.parametrize(
    ("make_wrong", "expects", "said"),
    [
        (correct, (), None),
        (beside, (), "bytes beside the outputs"),
        (inaccurate, (), "should be"),
        (one_row_not_written, (), "is nan, and should be"),
        (refuses_after_writing, ("ValueError",), "bytes were changed"),
        (undocumented, None, "raises OverflowError"),
        (correct, ("TypeError",), "accepted, where TypeError is right"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_checks_of_calls_find(make_wrong, expects, said, monkeypatch):
    problems = judged(make_wrong, monkeypatch, expects=expects)
    assert (said in problems[0]) if said else not problems, problems


@pytest.fixture
def sandbox(tmp_path):
    """A sandbox whose compiler is not there."""
    from faults.sandbox import Sandbox

    made = Sandbox(tmp_path / "sandbox", tmp_path, "c++")
    made.reset()
    return made


@pytest.mark.parametrize(
    ("ended", "detail", "operation", "is_wrong"),
    [
        ("right", "", "load rmsnorm", False),
        ("exit", "1", "verify", False),
        ("raised", "RuntimeError: jitnorm cannot build it", "load rmsnorm", False),
        ("raised", "RuntimeError: jitnorm cannot build it", "ls", True),  # the command line has no tracebacks
        ("raised", "OSError: [Errno 5]", "load rmsnorm", True),
        ("wrong", "the result of rmsnorm is wrong", "load rmsnorm", True),
        ("killed", "by signal 9", "load rmsnorm", True),
        ("crash", "by signal 11", "load rmsnorm", True),
        ("hang", "after 60 s", "ls", True),
    ],
)
def test_the_checks_of_faults_find(sandbox, ended, detail, operation, is_wrong):
    from faults.sandbox import Report

    sandbox.judge(Report(operation, ended, detail))
    assert bool(sandbox.problems) == is_wrong


def test_the_checks_of_faults_find_what_changed_outside(sandbox):
    sandbox.check_outside()
    assert not sandbox.problems
    (sandbox.outside / "folder" / "file").unlink()
    (sandbox.outside / "new").touch()
    sandbox.check_outside()
    assert "folder/file, new" in sandbox.problems[0]


def test_described_errors_are_told_apart():
    from faults.sandbox import describe_error

    assert describe_error(RuntimeError("jitnorm cannot")) == "RuntimeError: jitnorm cannot"
    assert describe_error(NotImplementedError("x")).startswith("NotImplementedError: x")
    assert "says nothing" in describe_error(RuntimeError(""))


def test_the_table_counts():
    counts = campaign.Counts()
    for index, (kind, met, problems) in enumerate(
        [("flip", "right", []), ("flip", "raised", ["x"]), ("kill", "killed", [])]
    ):
        counts.note({"index": index, "kind": kind, "met": met, "fault": "", "problems": problems})
    assert counts.table("fault", campaign.FAULT_COLUMNS).splitlines() == [
        "| fault | all | right | raised | killed | wrong |",
        "|---|---:|---:|---:|---:|---:|",
        "| flip | 2 | 1 | 1 | 0 | 1 |",
        "| kill | 1 | 0 | 0 | 1 | 0 |",
        "| all | 3 | 1 | 1 | 1 | 1 |",
    ]
    assert [answer["index"] for answer in counts.wrong] == [1]

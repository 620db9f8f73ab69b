"""Test verdicts on synthetic samples, and `jitnorm bench compare`."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from dataclasses import replace

import pytest
from click.testing import CliRunner

from jitnorm.benchmark.compare import Verdict, compare, differing_conditions, judge, summarize_peers
from jitnorm.benchmark.results import BenchResult, Failed, Report, Row, Skipped, quantile
from jitnorm.cli import main


def samples(mean: float, between: float, seed: int, rounds: int = 5, within: float = 0.001) -> BenchResult:
    """Return rounds that differ by `between` (relative standard deviation), of samples that differ by `within`."""
    random_ = random.Random(seed)
    middles = [mean * random_.gauss(1, between) for _ in range(rounds)]
    return BenchResult.of([[middle * random_.gauss(1, within) for _ in range(9)] for middle in middles])


def verdict(before: BenchResult, after: BenchResult) -> Verdict:
    return judge(before, after)[0]


# (the second's time over the first's, what rounds differ by, the verdict)
CASES = [
    (1.00, 0.001, Verdict.SAME),
    (1.01, 0.001, Verdict.SAME),
    (0.99, 0.001, Verdict.SAME),
    (1.05, 0.001, Verdict.SLOWER),
    (0.95, 0.001, Verdict.FASTER),
    (1.05, 0.005, Verdict.SLOWER),
    (1.02, 0.003, Verdict.AMBIGUOUS),  # across the threshold
    (1.00, 0.100, Verdict.AMBIGUOUS),  # might be anything
    (1.50, 0.010, Verdict.SLOWER),
]


@pytest.mark.parametrize(("ratio", "between", "expected"), CASES)
def test_verdicts(ratio, between, expected):
    """Expect the verdict as often as two standard errors imply, and never the opposite."""
    verdicts = [
        verdict(samples(1e-6, between, seed), samples(ratio * 1e-6, between, 1000 + seed)) for seed in range(200)
    ]
    assert verdicts.count(expected) >= 150, verdicts
    if expected in (Verdict.SLOWER, Verdict.FASTER):
        opposite = {Verdict.SLOWER, Verdict.FASTER} - {expected}
        assert not opposite & {*verdicts} and Verdict.SAME not in verdicts


def test_samples_that_agree_in_rounds_that_differ_are_ambiguous():
    """Expect AMBIGUOUS for runs that differ by 5%, as their rounds do, though samples within a round agree to 0.01%."""
    before = BenchResult.of([[m, m * 1.0001] for m in (1.00, 1.06, 0.94, 1.04, 0.97)])
    after = BenchResult.of([[m, m * 1.0001] for m in (1.05, 1.11, 0.99, 1.09, 1.02)])
    assert verdict(before, after) == Verdict.AMBIGUOUS


def test_one_outlying_round_changes_nothing():
    before = BenchResult.of([[1.0] * 9] * 5)
    after = BenchResult.of([[1.0] * 9] * 4 + [[1.5] * 9])
    assert verdict(before, after) == Verdict.SAME and after.seconds == 1.0


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds(rounds):
    assert verdict(samples(1, 0.001, 1, rounds), samples(2, 0.001, 2)) == Verdict.AMBIGUOUS


def test_throttled_clocks():
    slow = BenchResult.of([[2.0] * 9] * 5, notes=("clocks throttled: temperature",))
    assert verdict(samples(1, 0.001, 1), slow) == Verdict.AMBIGUOUS


def test_noise_shrinks_with_rounds_and_covers_the_truth():
    def noise_of(rounds):
        return statistics.median(samples(1.0, 0.01, seed, rounds).noise for seed in range(100))

    assert noise_of(40) < 0.6 * noise_of(5)
    runs = [samples(1.0, 0.01, seed, 20) for seed in range(300)]
    assert sum(abs(run.seconds - 1) <= run.noise for run in runs) >= 0.85 * len(runs)


@pytest.mark.parametrize(
    ("values", "q", "expected"), [([3.0], 0.5, 3.0), ([1, 2], 0.5, 1.5), ([4, 1, 3, 2], 0, 1), (range(101), 0.9, 90)]
)
def test_quantiles(values, q, expected):
    assert quantile(values, q) == expected


def report(cells, name="rmsnorm", **machine) -> Report:
    rows = [Row({"n": n}, {"jitnorm": cell}) for n, cell in enumerate(cells)]
    return Report(name, "us", ["n"], ["jitnorm"], rows, {"gpu": "H200", **machine}, {"cold": True})


def test_rows_without_a_result():
    good = samples(1.0, 0.001, 1)
    before = report([good, good, Failed("x"), Skipped("y"), good, good])
    after = report([good, Failed("x"), good, good, Skipped("y")])
    assert [(str(c.row), c.verdict) for c in compare(before, after)] == [("n=0", Verdict.SAME), ("n=1", Verdict.FAILED)]


def test_differing_conditions():
    assert differing_conditions(report([]), report([], gpu="B200", commit="abc")) == ["gpu differs: H200 and B200"]


def test_reasons_for_ambiguous_verdicts():
    good, few = samples(1, 0.001, 1), samples(1, 0.001, 2, rounds=2)
    slow = BenchResult.of([[2.0] * 9] * 5, notes=("clocks throttled: temperature",))
    noisy = BenchResult.of([[m] * 9 for m in (1.0, 1.05, 0.95, 1.06, 0.94)])
    reasons = [judge(*pair)[1] for pair in ((few, good), (good, few), (good, slow), (good, noisy), (good, good))]
    assert reasons[:3] == [
        "A has 2 of the 3 rounds that are needed",
        "B has 2 of the 3 rounds that are needed",
        "B: clocks throttled: temperature",
    ]
    assert re.fullmatch(r"-\d+\.\d% to \+\d+\.\d% reaches across \+2\.0%", reasons[3]) and not reasons[4]
    slower = BenchResult.of([[m] * 9 for m in (0.98, 0.99, 0.97, 0.985, 0.975)])
    assert judge(good, slower)[1].endswith("reaches across -2.0%")


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -0.1])
def test_invalid_thresholds(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        compare(report([]), report([]), threshold)


# The command


@pytest.fixture
def command(tmp_path):
    def run(a: Report, b: Report, *words: str):
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, one in zip(files, (a, b), strict=True):
            one.write(file)
        return CliRunner().invoke(main, ["bench", "compare", *map(str, files), *words])

    return run


def test_command(command):
    before = [samples(1e-6, 0.0005, seed) for seed in range(3)]
    after = [samples(ratio * 1e-6, 0.0005, 50 + i) for i, ratio in enumerate((1.0, 0.9, 1.1))]
    done = command(report(before), report(after))
    assert done.exit_code == 1 and done.stdout.splitlines()[-1] == "1 SAME, 1 FASTER, 1 SLOWER", done.output
    assert [line.split()[-1] for line in done.stdout.splitlines()[2:5]] == ["SAME", "FASTER", "SLOWER"]
    assert command(report(before[:2]), report(after[:2], driver="1")).exit_code == 0
    assert command(report(before), report(after), "--threshold", "20").exit_code == 0
    assert command(report(before), report([Failed("boom")])).exit_code == 1


def test_command_prints_json(command):
    before = [samples(1e-6, 0.0005, seed) for seed in range(2)]
    done = command(report(before), report([samples(1.1e-6, 0.0005, 50), Failed("boom")]), "--format", "json")
    assert done.exit_code == 1
    slower, failed = json.loads(done.stdout)
    assert (slower["row"], slower["impl"], slower["verdict"]) == ({"n": 0}, "jitnorm", "SLOWER")
    assert slower["difference"] == pytest.approx(slower["after"] / slower["before"] - 1)
    assert (failed["verdict"], failed["after"], failed["difference"]) == ("FAILED", None, None)


def test_command_explains_ambiguous_verdicts(command):
    good, few = samples(1e-6, 0.0005, 1), samples(1e-6, 0.0005, 2, rounds=2)
    done = command(report([few]), report([good]))
    assert done.exit_code == 1 and "AMBIGUOUS  A has 2 of the 3 rounds that are needed\n" in done.stdout, done.output
    assert done.stderr == "Error: every row is AMBIGUOUS, so that these two runs tell nothing: see WHY\n"
    assert command(report([few, good]), report([good, good])).exit_code == 0  # the other row is compared
    for threshold in ("nan", "inf"):
        done = command(report([good]), report([good]), "--threshold", threshold)
        assert done.exit_code == 1 and done.stderr.startswith("Error: threshold must be") and not done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"unit": "us"', '"unit": "weeks"'),
        ('"unit": "us"', '"unit": ["us"]'),
        ('"name": "rmsnorm"', '"name": 7'),
        ('"cold": true', '"cold": %s' % ("[" * 100000)),
        ('"machine": {', '"machine": 1, "x": {'),
        ('"point": {"n": 0}', '"point": 5'),
        ('"rounds": [[1e-06]]', '"rounds": [[0]]'),
        ('"rounds": [[1e-06]]', '"rounds": [[NaN]]'),
        ('"rounds": [[1e-06]]', '"rounds": [[-1]]'),
        ('"rounds": [[1e-06]]', '"rounds": [[1%s]]' % ("0" * 400)),
        ('"rounds": [[1e-06]]', '"rounds": [["1"]]'),
        ('"rounds": [[1e-06]]', '"rounds": [[]]'),
        ('"rounds": [[1e-06]]', '"rounds": 3'),
        ('"times": [1e-06, 1e-06]', '"times": []'),
        ('"notes": []', '"notes": [1]'),
    ],
)
def test_damaged_files(tmp_path, old, new):
    text = report([BenchResult.of([[1e-6]])]).to_json()
    (tmp_path / "a.json").write_text(text)
    assert old in text
    (tmp_path / "b.json").write_text(text.replace(old, new))
    if '"times"' in old:
        (tmp_path / "b.json").write_text(text.replace(old, new).replace("[[1e-06]]", "[]"))
    done = CliRunner().invoke(main, ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert done.stderr == f"Error: {tmp_path / 'b.json'} is not a result file of a benchmark (written by --output)\n"


def test_command_warns_and_rejects(command, tmp_path):
    one = report([samples(1, 0.001, 1)])
    assert (
        "warning: gpu differs: H200 and B200" in command(one, report(one.rows[0].results().values(), gpu="B200")).stderr
    )
    said = command(one, report([], name="qknorm"))
    assert said.exit_code == 1 and "is of the benchmark rmsnorm" in said.stderr
    assert "no row and implementation in common" in command(one, report([])).stderr
    for text in ("{}", "[]", "nothing", '{"format": 1, "rows": [{}]}', '{"format": 7}'):
        (tmp_path / "c.json").write_text(text)
        said = CliRunner().invoke(main, ["bench", "compare", str(tmp_path / "c.json"), str(tmp_path / "a.json")])
        assert (
            said.exit_code == 1 and "c.json is not a result file of a benchmark (written by --output)\n" in said.stderr
        ), text


def test_command_rejects_files_and_thresholds_before_it_reads(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for words, said in (
        (["a.json", "none.json"], "does not exist"),
        (["a.json", "."], "is a directory"),
        (["a.json", "a.json", "--threshold", "-1"], "-1.0 is not in the range x>=0"),
    ):
        paths = [w if w.startswith("-") else str(tmp_path / w) for w in words]
        done = CliRunner().invoke(main, ["bench", "compare", *paths])
        assert done.exit_code == 2 and said in done.stderr, done.output


def test_json_keeps_everything(tmp_path):
    cell = BenchResult.of(
        samples(1e-6, 0.01, 1).rounds, memory_footprint=123, error=1e-3, notes=("not cold: a [1,  2] note",)
    )
    before = report([cell, Failed('a "quoted" [1,  2] message'), Skipped("not installed")])
    (tmp_path / "a.json").write_text(before.to_json())
    after = Report.read(tmp_path / "a.json")
    assert {**vars(after), "rows": ()} == {**vars(before), "rows": ()} and after.rows[1:] == before.rows[1:]
    again = after.rows[0].results()["jitnorm"]
    assert replace(again, rounds=()) == replace(cell, rounds=())
    for one, other in zip(again.rounds, cell.rounds, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(("has_row_copy", "of_row_copy"), [(False, []), (True, [0.75])])
def test_copies_are_not_ranked(has_row_copy, of_row_copy):
    """Expect the peers' summary to compare the first implementation with each copy, and to rank none."""
    seconds = {"copy": 1e-6, "jitnorm": 1.5e-6, "peer": 3e-6} | ({"row_copy": 2e-6} if has_row_copy else {})
    cells = {line: replace(BenchResult.of([[s] * 5] * 5), memory_footprint=200_000_000) for line, s in seconds.items()}
    summary = summarize_peers(Report("x", "us", ["n"], [*cells], rows=[Row({"n": 1}, cells)]))
    assert summary.subject == "jitnorm"
    assert [ratio for ratio, _ in summary.vs_best] == pytest.approx([0.5])
    assert [ratio for ratio, _ in summary.vs_copy] == pytest.approx([1.5])
    assert [ratio for ratio, _ in summary.vs_row_copy] == pytest.approx(of_row_copy)
    assert ("as narrow accesses" in str(summary)) == has_row_copy

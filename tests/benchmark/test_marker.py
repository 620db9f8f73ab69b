"""Test the decorators, the run, its table and its command line."""

from __future__ import annotations

import itertools
import json
import runpy
import sys

import pytest
import torch
from click.testing import CliRunner

from jitnorm.benchmark import marker, measure
from jitnorm.benchmark.results import Report
from jitnorm.benchmark.runner import bench_copy
from jitnorm.benchmark.settings import override_settings

SHORT_RUN = {"seconds": 0.0, "cold": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("CI", "JITNORM_BENCH_CI", "JITNORM_BENCH_BANDWIDTH"):
        monkeypatch.delenv(name, raising=False)


def copied(n: int) -> marker.BenchResult:
    x = marker.create_random(n)
    return marker.do_bench(torch.clone, input_args=(x,), replay_iters=2)


@marker.parametrize("n", [8, 16, 32], [8])
@marker.parametrize("a,b", [(1, "x"), (2, "y")], [(2, "y")])
@marker.benchmark("impl", ["clone", "broken", "absent"])
def bench(n, a, b, impl):
    """Measure nothing of interest."""
    if impl == "absent":
        marker.skip("not installed")
    if impl == "broken" and n == 16:
        raise RuntimeError("no such kernel\nand much more")
    return copied(n)


# Decoration


def test_axis_that_the_function_does_not_take():
    with pytest.raises(TypeError, match=r"f\(\) takes no 'n': it has m, impl"):

        @marker.parametrize("n", [1])
        @marker.parametrize("m", [1])
        @marker.benchmark("impl", ["a"])
        def f(m, impl): ...

    with pytest.raises(TypeError, match=r"f\(\) takes no 'impl': it has no parameters"):

        @marker.benchmark("impl", ["a"])
        def f(): ...


def test_missing_axis():
    with pytest.raises(TypeError, match=r"no axis gives f\(\) its 'm': the axes are n, impl"):

        @marker.parametrize(
            "n",
            [1],
        )
        @marker.benchmark("impl", ["a"])
        def f(n, m, impl): ...

    with pytest.raises(TypeError, match=r"its 'n'"):

        @marker.benchmark("impl", ["a"])
        def g(n, impl): ...

    def plain(n, impl, given=3): ...

    undecorated = marker.benchmark("impl", ["a"])(plain)  # where nothing tells which decorator is the last
    with pytest.raises(TypeError, match=r"its 'n'"):
        undecorated.run()
    assert marker.parametrize("n", [1])(undecorated).points() == [{"n": 1}]


def test_invalid_axes():
    with pytest.raises(TypeError, match="has the axis 'n' twice"):

        @marker.parametrize("n", [1])
        @marker.parametrize("n", [2])
        @marker.benchmark("impl", ["a"])
        def f(n, impl): ...

    with pytest.raises(ValueError, match=r"'n,m' takes 2 values together, got \(1, 2, 3\)"):
        marker.parametrize("n,m", [(1, 2, 3)])
    for values, kind in ((3, "int"), ("bf16", "str")):
        with pytest.raises(TypeError, match=f"the values of the axis 'n' must be a list, got {kind}"):
            marker.parametrize("n", values)
    with pytest.raises(TypeError, match=r"goes above @marker\.benchmark, which is innermost"):
        marker.parametrize("n", [1])(lambda n: None)
    with pytest.raises(ValueError, match="unit must be one of ns, us, ms, s, got 'minutes'"):
        marker.benchmark("impl", ["a"], unit="minutes")


@pytest.mark.parametrize("create", [marker.create_random, marker.create_empty])
def test_invalid_dtypes(create):
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'bf17'"):
        create(3, dtype="bf17", device="cpu")


# The grid


def test_axes_stack_and_have_short_lists(monkeypatch):
    assert [tuple(point.values()) for point in bench.points()] == [
        (n, a, b) for n in (8, 16, 32) for a, b in ((1, "x"), (2, "y"))
    ]
    for name, value in (("CI", "true"), ("JITNORM_BENCH_CI", "1")):
        monkeypatch.setenv(name, value)
        assert bench.points() == [{"n": 8, "a": 2, "b": "y"}]
        assert len(bench.points(full=True)) == 6
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("filters", "rows"),
    [(["n>8", "n<32"], 2), (["n=8,32"], 4), (["n==8"], 2), (["b!=x"], 3), (["n<=16", "a=1"], 2), (["n>=100"], 0)],
)
def test_filters(filters, rows):
    assert len(bench.points(filters=filters)) == rows


@pytest.mark.parametrize("text", ["m=1", "n", "n>x", "=3"])
def test_bad_filters(text):
    with pytest.raises(ValueError, match=text):
        bench.points(filters=[text])


# The run


def test_one_point(monkeypatch):
    ticks = itertools.count()  # a clock that advances by 2 ms with each reading: a sample is then one call
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 2e-3 * next(ticks))
    result = bench(8, 1, "x", impl="clone")
    assert result.metrics == (0.5, "avg") and result.times == pytest.approx((2e-3, 2e-3))
    assert result.memory_footprint == 2 * 8 * 2


def test_run(capsys):
    report = bench.run(**SHORT_RUN)
    assert report.failed and len(report.rows) == 6 and report.lines == ["clone", "broken", "absent"]
    said = capsys.readouterr().out
    lines = said.splitlines()
    rows = [line.split() for line in lines[4:10]]
    assert [row[:3] for row in rows] == [[str(n), a, b] for n in (8, 16, 32) for a, b in (("1", "x"), ("2", "y"))]
    assert ["error" in row for row in rows] == [row[0] == "16" for row in rows]
    assert not any("N/A" in line or "absent" in line for line in lines[:10]), "no column where all rows are N/A"
    assert "N/A absent: not installed" in lines
    assert "error broken at n=16, a=1, b=x; n=16, a=2, b=y: RuntimeError: no such kernel" in lines
    assert "GB/s: 1e9 bytes, read and written, per second" in lines
    assert said.count("p50") == said.count("avg") == 2, "every metric of both"


def test_an_interrupted_run_leaves_its_rows(tmp_path):
    @marker.parametrize("n", [1, 2, 3])
    @marker.benchmark("impl", ["good"])
    def f(n, impl):
        if n == 3:
            raise KeyboardInterrupt
        return marker.BenchResult((0.5,), (2e-6,), 0)

    file = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt):
        f.run(**SHORT_RUN, output=file)
    report = Report.read(file)
    assert [row.point for row in report.rows] == [{"n": 1}, {"n": 2}] and report.machine["torch"] == torch.__version__


def test_columns_with_different_reasons_stay(capsys):
    @marker.parametrize("n", [1, 2])
    @marker.benchmark("impl", ["here", "sometimes", "differently", "never"])
    def f(n, impl):
        if impl == "never" or (impl == "sometimes" and n == 1) or impl == "differently":
            marker.skip(f"not for {n}" if impl == "differently" else "not installed")
        return marker.BenchResult((0.5,), (2e-6,), 0)

    report = f.run(**SHORT_RUN)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["here", "sometimes", "differently"] and "never" in report.lines
    assert [line.count("N/A") for line in lines[4:6]] == [2, 1]
    assert len({line.rindex("N/A") for line in lines[4:6]}) == 1, "aligned"


def test_beside_a_copy(capsys):
    report = bench.run(**SHORT_RUN, filters=["n=32", "a=1"], impl=["clone"], copy=True)
    row = report.rows[0].results()
    assert report.lines == ["copy", "clone"] and not report.failed
    assert row["copy"].memory_footprint == row["clone"].memory_footprint == 2 * 32 * 2
    assert "/copy" in capsys.readouterr().out


def test_bandwidth_is_hidden_on_request(capsys, monkeypatch):
    monkeypatch.setenv("JITNORM_BENCH_BANDWIDTH", "0")
    bench.run(**SHORT_RUN, filters=["n=8"], impl=["clone"])
    assert "GB/s" not in capsys.readouterr().out


def test_no_rows_and_one_value(capsys):
    assert bench.run(**SHORT_RUN, filters=["n=9"]).rows == []
    assert "bench, no rows" in capsys.readouterr().out.replace(":", ",")

    @marker.benchmark("impl", ["only"])
    def single(impl):
        return marker.BenchResult((0.5,), (2e-6,), 0)

    report = single.run(**SHORT_RUN)
    assert report.rows[0].results()["only"].seconds == 2e-6
    assert "2.000" in capsys.readouterr().out


def test_a_function_that_returns_no_result(capsys):
    @marker.benchmark("impl", ["a"])
    def f(impl):
        return 3.0

    assert f.run(**SHORT_RUN).failed and "returns what do_bench returned, got float" in capsys.readouterr().out


@pytest.mark.parametrize("footprint", [1, 8, 16512, 2 * (1 << 22) + 4096, 3 * (1 << 22)])
def test_copies_are_of_even_sizes(footprint):
    """Round sizes down by up to 1%, because the driver copies others slowly; small sizes are copied whole."""
    with override_settings(device=torch.device("cpu"), cold=False, seconds=0.0):
        copied = bench_copy(footprint).memory_footprint
    elements = copied // 4  # that are read, of two bytes each
    assert 0.99 * footprint <= copied <= max(4, footprint)
    assert elements < 256 or elements % (1 << (elements.bit_length() - 8)) == 0


def test_all_skipped_with_a_copy(capsys):
    report = bench.run(**SHORT_RUN, filters=["n=8"], impl=["absent"], copy=True)
    assert not report.failed and "N/A copy: no result of this row says" in capsys.readouterr().out


def test_implementations_take_turns():
    order = []

    @marker.benchmark("impl", ["a", "b"])
    def f(impl):
        def one_round():
            order.append(impl)
            return [1e-6], None

        return marker.BenchResult.of([one_round()[0]], measure_round=one_round)

    report = f.run(**SHORT_RUN)
    assert order == ["a", "b"] * 5
    assert all(len(cell.rounds) == 5 and cell.measure_round is None for _, _, cell in report.cells())


def test_a_failure_in_a_later_round_stays_in_its_cell(capsys):
    @marker.benchmark("impl", ["a", "b"])
    def f(impl):
        def one_round():
            if impl == "a":
                raise RuntimeError("out of memory")
            return [1e-6], "clocks throttled: temperature"

        return marker.BenchResult.of([[1e-6]], measure_round=one_round)

    report = f.run(**SHORT_RUN)
    assert list(report.rows[0].results()) == ["b"] and report.failed
    said = capsys.readouterr().out
    assert "error a: RuntimeError: out of memory" in said and "* b: clocks throttled: temperature" in said


def test_noise_is_marked(capsys):
    @marker.benchmark("impl", ["stable", "noisy"])
    def f(impl):
        spread = 0.2 if impl == "noisy" else 0.001
        return marker.BenchResult.of([[1e-6 * (1 + spread * i)] for i in range(5)], metrics=(0.5,))

    f.run(**SHORT_RUN)
    said = capsys.readouterr().out.splitlines()
    stable, noisy = said[4].split()[1], said[4].split()[3]
    assert (
        not stable.endswith("~")
        and noisy.endswith("~")
        and any(line.startswith("~ above the noise target") for line in said)
    )


# The command line


@marker.parametrize("n", [8, 16], [8])
@marker.benchmark("impl", ["good", "bad"])
def sizes(n, impl):
    """Sizes."""
    if impl == "bad":
        raise RuntimeError("bad")
    return marker.do_bench(torch.clone, input_args=(marker.create_random(n),), replay_iters=1, metrics=(0.5, "max"))


def command(*words, exit_code=0):
    result = CliRunner().invoke(marker.command(sizes, copy=False), [str(word) for word in words])
    assert result.exit_code == exit_code, result.output
    return result


CPU = ["--warm", "--seconds", "0", "--device", "cpu"]


def test_command_line(tmp_path):
    assert command("--list").stdout == "n=8\nn=16\n"
    assert command("--list", "--short").stdout == "n=8\n"
    assert json.loads(command("--list", "--format", "json").stdout) == [{"n": 8}, {"n": 16}]
    files = {kind: tmp_path / f"a.{kind}" for kind in ("json", "csv", "png")}
    words = ["--output", files["json"], "--csv", files["csv"], "--plot", files["png"]]
    said = command(*CPU, "--filter", "n>8", "--impl", "good", *words).stdout
    assert said.startswith("sizes, us per call")
    data = json.loads(files["json"].read_text())
    assert data["settings"] == {"device": "cpu", "dtype": "bfloat16", "cold": False}
    assert [row["point"] for row in data["rows"]] == [{"n": 16}]
    head, first, second = files["csv"].read_text().splitlines()
    assert head.startswith("n,impl,p50_us,max_us,noise,") and first.startswith("16,copy,") and "16,good," in second
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_format_of_what_is_printed(tmp_path):
    """Expect on stdout the JSON that --output writes, and nothing else."""
    file = tmp_path / "a.json"
    said = command(*CPU, "--short", "--impl", "good", "--format", "json", "--output", file).stdout
    assert said == file.read_text() and [row["point"] for row in json.loads(said)["rows"]] == [{"n": 8}]
    command("--format", "csv", exit_code=2)
    with pytest.raises(ValueError, match="output_format must be table or json, got 'csv'"):
        sizes.run(output_format="csv")


def test_exit_status_of_an_exception_and_of_mistakes():
    said = command(*CPU, "--short", exit_code=1).stdout
    rows = said.partition("\n\n")[0].splitlines()[4:]  # below the title, two lines of headers and the rule
    assert "error bad: RuntimeError: bad" in said and [row.split()[0] for row in rows] == ["8"]
    mistake = command("--filter", "m=1", exit_code=1).stderr
    assert mistake == "Error: 'm=1' is not a filter such as 'num_tokens>=64': the axes are n\n"
    command("--impl", "none", exit_code=2)
    assert "-1.0 is not in the range x>=0" in command("--seconds", "-1", exit_code=2).stderr
    for words, have in (([], "8, 16"), (["--short"], "8"), (["--list"], "8, 16")):
        said = command(*CPU, "--filter", "n=7", *words, exit_code=1)
        assert (said.stdout, said.stderr) == ("", f"Error: no row meets n=7: n is {have}\n")
    assert command("--device", "tpu9", exit_code=1).stderr.startswith("Error: device must be such as")
    assert "no bandwidth to plot" in command(*CPU, "--impl", "bad", "--plot", "a.png", exit_code=1).stderr


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_invalid_seconds(seconds):
    said = command("--device", "cpu", "--seconds", seconds, exit_code=1)
    assert said.stderr == f"Error: seconds must be a finite number and 0 or more, got {seconds}\n" and not said.stdout


def test_a_run_that_measures_nothing_fails(tmp_path):
    @marker.benchmark("impl", ["peer"])
    def bench(impl):
        marker.skip("not installed")

    words = [*CPU, "--output", str(tmp_path / "a.json")]
    for copy in (False, True):
        done = CliRunner().invoke(marker.command(bench, copy=copy), words)
        assert done.exit_code == 1 and "N/A peer: not installed" in done.stdout
        assert done.stderr == "Error: nothing was measured: no implementation is available here\n"
    assert json.loads((tmp_path / "a.json").read_text())["rows"]


def test_main_of_a_file(tmp_path, monkeypatch, capsys):
    """Run a file as `python FILE` does, in this process."""
    file = tmp_path / "bench_sizes.py"
    file.write_text(
        "from jitnorm.benchmark import marker\n\n"
        "@marker.benchmark('impl', ['bad'])\n"
        "def bench(impl):\n    return 1 / 0\n\n"
        "if __name__ == '__main__':\n    bench.main()\n"
    )
    monkeypatch.setattr(sys, "argv", [str(file), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out.startswith("sizes, us per call"), said
    assert "error bad: ZeroDivisionError: division by zero" in said.out and not said.err

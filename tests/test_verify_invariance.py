"""`jitnorm verify-invariance`: it passes what keeps the promise, and catches what does not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from jitnorm.batch_invariant.verify import OPERATORS, Case, Operator, compare, verify
from jitnorm.cli import main

RUN = ["verify-invariance", "--device", "cpu", "--max-batch", "17"]


def run(*arguments):
    return CliRunner().invoke(main, [*RUN, *arguments])


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_on_the_cpu(op):
    """One dtype and shape each: it is the compiler that takes the time."""
    shape = OPERATORS[op].shapes["cpu"][-1]
    done = run("--op", op, "--dtype", "fp32", "--shape", "x".join(map(str, shape)), "--json")
    (result,) = json.loads(done.stdout)
    assert done.exit_code == 0, result
    assert (result["op"], tuple(result["shape"]), result["difference"]) == (op, shape, "")
    # 17 batches; four kinds of neighbours, three layouts and the compiler in batches of 1, 2, 5 and 17; three places
    assert result["compared"] == 3 * (17 + 4 * (4 + 3 + 1))


def run_on_the_gpu(op, *ways, shape=None, dtype="bf16"):
    """One shape, and a dtype: the command by itself goes through the rest."""
    shape = shape or OPERATORS[op].shapes["cuda"][0]
    words = [
        "verify-invariance",
        "--device",
        "cuda",
        "--op",
        op,
        "--dtype",
        dtype,
        "--shape",
        "x".join(map(str, shape)),
    ]
    return CliRunner().invoke(main, [*words, *(word for way in ways for word in ("--way", way))])


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_on_the_gpu(op):
    done = run_on_the_gpu(op, "eager", "captured")
    assert done.exit_code == 0, done.output


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["mm_transposed", "attention", "softmax", "rms_norm"])
def test_compiled_on_the_gpu(op):
    """Of each kind one: it is the compiler that takes the time."""
    done = run_on_the_gpu(op, "compiled")
    assert done.exit_code == 0, done.output


@pytest.mark.gpu
@pytest.mark.parametrize("shape", OPERATORS["attention"].shapes["cuda"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])  # flash attention is not for float32
def test_every_kernel_of_attention(shape, dtype):
    done = run_on_the_gpu("attention", "eager", shape=shape, dtype=dtype)
    assert done.exit_code == 0, done.output


@pytest.mark.gpu
def test_catches_flash_attention():
    """It splits the keys of one sequence, and fewer or none of those of many."""
    words = ["verify-invariance", "--device", "cuda", "--op", "attention", "--dtype", "bf16", "--way", "eager"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert CliRunner().invoke(main, [*words, "--shape", "4x1x1000x128", "--outside"]).exit_code == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_lines_come_as_they_are_found(as_json, monkeypatch):
    """They are there when something ends the run; a program gets the whole or nothing."""

    def found(name, operator, shape, dtype, device, *_):
        if name == "softmax":
            raise RuntimeError("interrupted")
        return compare.Result(name, shape, "fp32", device, 1234, "")

    monkeypatch.setattr("jitnorm.cli.verify.verify", found)
    words = ["--op", "mm", "--op", "softmax", "--dtype", "fp32"]
    done = run(*words, *(["--json"] if as_json else []))
    lines = done.stdout.splitlines()
    assert done.exit_code == 1 and done.stderr == "Error: interrupted\n"
    assert len(lines) == (0 if as_json else 2 + len(OPERATORS["mm"].shapes["cpu"]))
    for line in lines[2:]:
        assert line.split()[0] == "mm" and line.endswith("same")
        assert line.index("same") == lines[0].index("RESULT") and line.index(" 1234 ") + 5 == lines[0].index(" RES") - 1


def test_catches_torch_on_the_cpu():
    """Outside the mode, float32 products of few rows take another way in torch."""
    done = run("--op", "mm", "--dtype", "fp32", "--shape", "256x512", "--outside")
    assert done.exit_code == 1
    assert "differs" in done.stdout
    assert "mm, fp32, 256x512: the first row of" in done.stderr
    assert "of 256 elements differ from the row's alone" in done.stderr
    assert run("--op", "mm", "--dtype", "fp32", "--shape", "256x512").exit_code == 0


@pytest.mark.gpu
def test_catches_cublas():
    """It splits k of these for few rows, on the H200 up to 31."""
    words = ["verify-invariance", "--op", "mm_transposed", "--dtype", "bf16", "--shape", "4096x14336", "--way", "eager"]
    assert CliRunner().invoke(main, [*words, "--outside"]).exit_code == 1
    assert CliRunner().invoke(main, words).exit_code == 0


def forwards(x):
    """The sum of each row, from the first element to the last."""
    return torch.from_numpy(np.add.accumulate(x.numpy(), axis=1)[:, -1:].copy())


def chunks_by_batch(x):
    parts = 2 if x.shape[0] < 5 else 1
    return sum(forwards(part) for part in x.chunk(parts, dim=-1))


def last_row_backwards(x):
    return torch.cat((forwards(x[:-1]), forwards(x[-1:].flip(1)))) if x.shape[0] > 1 else forwards(x)


def adds_its_neighbour(x):
    return x + 0 * x.roll(1, 0)


def reads_strides(x):
    return forwards(x) if x.is_contiguous() else forwards(x.flip(1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (chunks_by_batch, "the first row of 5:"),
        (last_row_backwards, "the middle row of 2:"),
        (adds_its_neighbour, "the first row of 2 beside NaNs:"),
        (reads_strides, "the first row of 2, rows apart:"),
    ],
)
def test_catches(call, words, monkeypatch):
    monkeypatch.setattr(compare.torch, "compile", lambda call, **_: call)  # these are caught before
    operator = Operator(lambda shape, dtype, device: Case(torch.randn(1, *shape), call), "N", {"cpu": ((1000,),)})
    result = verify("made up", operator, (1000,), torch.float32, "cpu", 17)
    assert result.difference.startswith(words)


@pytest.mark.parametrize("words", [["captured"], ["eager,captured"], ["eager", "captured"]])
def test_a_way_that_is_for_another_device(words):
    """What is not compared is not the same."""
    done = run("--op", "rmsnorm", *(word for way in words for word in ("--way", way)))
    assert done.exit_code == 2 and "--way captured is for CUDA" in done.stderr and "same" not in done.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_compared_is_a_failure(as_json, monkeypatch):
    monkeypatch.setattr(compare, "_situations", lambda *_: iter(()))
    done = run("--op", "rmsnorm", "--dtype", "fp32", *(["--json"] if as_json else []))
    assert done.exit_code == 1 and done.stderr == "Error: nothing was compared of rmsnorm\n"
    if as_json:
        assert [result["compared"] for result in json.loads(done.stdout)] == [0, 0]
    else:
        assert [line.split()[-3:] for line in done.stdout.splitlines()[2:]] == [["0", "not", "compared"]] * 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"ways": ("eger",)}, "ways must be of eager, captured, compiled, got eger"),
        ({"ways": ()}, "ways must be of"),
        ({"max_batch": 1}, "max_batch must be 2 or more, got 1"),
    ],
)
def test_arguments_that_compare_nothing(words, says):
    arguments = {"max_batch": 17, "ways": ("eager",), **words}
    with pytest.raises(ValueError, match=says):
        verify("rmsnorm", OPERATORS["rmsnorm"], (128,), torch.float32, "cpu", **arguments)


def test_batches_of_one_row_are_no_company():
    assert (
        CliRunner().invoke(main, ["verify-invariance", "--op", "mean", "--way", "eager", "--max-batch", "1"]).exit_code
        == 2
    )


@pytest.mark.parametrize(("most", "last"), [(2, [1, 2]), (17, [16, 17]), (300, [256, 300]), (1500, [1024, 1500])])
def test_the_largest_batch_is_the_one_asked_for(most, last):
    assert compare._batches(most)[-2:] == last


def test_lists_of_operators_and_dtypes(monkeypatch):
    monkeypatch.setattr(
        "jitnorm.cli.verify.verify", lambda name, _, shape, d, *rest: compare.Result(name, shape, str(d), "cpu", 1, "")
    )
    done = run("--op", "mm,bmm", "--dtype", "fp16,fp32", "--shape", "4x4,8x8", "--json")
    assert len(json.loads(done.stdout)) == 2 * 2 * 2


@pytest.mark.parametrize("shape", ["9" * 10, "9" * 30, "9" * 5000, "\u0664"])
def test_shapes_that_are_no_sizes(shape):
    done = run("--op", "rmsnorm", "--shape", shape, "--dtype", "fp32")
    assert done.exit_code == 2 and "--shape must be N for rmsnorm" in done.stderr and len(done.stderr) < 300


@pytest.mark.parametrize("shape", ["4096", "4096x", "0x4", "axb"])
def test_shapes_that_are_none(shape):
    done = run("--op", "mm", "--shape", shape)
    assert done.exit_code == 2
    assert f"--shape must be NxK for mm, such as 4096x4096, got {shape!r}" in done.stderr


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, ["verify-invariance", "--device", "cuda"])
    assert done.exit_code == 2 and "torch sees no GPU here" in done.stderr

"""Test `jitnorm verify-invariance`: invariant operators pass, and broken ones are caught."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import same_bits

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.batch_invariant.verify import EXEMPT, OPERATORS, Case, Operator, cases, compare, verify
from jitnorm.cli import main
from jitnorm.core import operators as registry
from jitnorm.core.checks import DTYPE_NAMES

REGISTERED = [name for name in registry.OPERATORS if name not in EXEMPT]
RUN = ["verify-invariance", "--device", "cpu", "--max-batch", "17"]


def run(*arguments):
    return CliRunner().invoke(main, [*RUN, *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_on_the_cpu(op):
    shape = OPERATORS[op].shapes["cpu"][-1]
    dtype = DTYPE_NAMES[OPERATORS[op].dtypes[-1]]
    words = ["--op", op, "--dtype", dtype, "--shape", "x".join(map(str, shape)), "--mode", "eager"]
    done = run(*words, "--format", "json")
    (result,) = json.loads(done.stdout)
    assert done.exit_code == 0, result
    assert (result["op"], tuple(result["shape"]), result["difference"]) == (op, shape, "")
    # 17 batches; four kinds of neighbours and three layouts in batches of 1, 2, 5 and 17; three places
    assert result["compared"] == 3 * (17 + 4 * (4 + 3))


# Inductor compiles each patched ATen operator, because it has a table of these, and one registered operator of each
# kind: with a new result, in place, with several results, and with a cache. To it these are calls that it does not look
# into; each operator's own tests compile it.
COMPILED = ("mm", "addmm", "mm.dtype", "bmm_batch", "attention", "softmax", "log_softmax", "mean", "rms_norm")
COMPILED += ("rmsnorm", "fused_add_rmsnorm", "rmsnorm_quant_fp8_dynamic", "store_cache")
# A size without a kernel, whose fallback Inductor fuses.
COMPILED_SHAPES = {"rms_norm": (33,)}


def make_compiled_case(op):
    shape = COMPILED_SHAPES.get(op, OPERATORS[op].shapes["cpu"][0])
    return OPERATORS[op].make(shape, torch.float32, torch.device("cpu"))


def verify_compiled(ops, monkeypatch):
    """Verify operators that are compiled into one graph. A row is the rows of all, a result the bytes of all results.

    Rows are divided and results joined outside of the graph, so that Inductor compiles each operator as it would alone.
    """
    torch_compile = torch.compile

    def make(*_):
        made = [make_compiled_case(op) for op in ops]
        widths = [case.row.shape[1] for case in made]

        def call_all(rows):
            return [case.call(own) for case, own in zip(made, rows, strict=True)]

        def call(x, call_all=call_all):
            rows = [columns.clone(memory_format=torch.contiguous_format) for columns in x.split(widths, 1)]
            return torch.cat([result.flatten(1).view(torch.uint8) for result in call_all(rows)], 1)

        def compile_all(function, **options):
            assert function is call
            return functools.partial(call, call_all=torch_compile(call_all, **options))

        monkeypatch.setattr(compare.torch, "compile", compile_all)
        return Case(torch.cat([case.row for case in made], 1), call)

    result = verify(", ".join(ops), Operator(make, "", {}), (), torch.float32, "cpu", 17, ["compiled"])
    monkeypatch.setattr(compare.torch, "compile", torch_compile)
    return result


@pytest.mark.slow
def test_compiled_on_the_cpu(monkeypatch):
    """All operators are in one graph, because each graph takes seconds."""
    with set_batch_invariant_mode():
        result = verify_compiled(COMPILED, monkeypatch)
        found = {op: verify_compiled([op], monkeypatch).difference for op in COMPILED} if result.difference else {}
    assert result.difference == "" and result.compared == 4 * 3, (result, found)


@pytest.mark.slow
def test_every_mode_is_compared():
    (result,) = json.loads(run("--op", "rmsnorm", "--shape", "128", "--dtype", "fp32", "--format", "json").stdout)
    assert result["compared"] == 3 * (17 + 4 * (4 + 3) + 4)  # and the compiler in batches of 1, 2, 5 and 17


def run_on_the_gpu(op, *modes, shape=None, dtype="bf16"):
    """Run one shape and dtype: without options the command runs all."""
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
    return CliRunner().invoke(main, [*words, *(word for mode in modes for word in ("--mode", mode))])


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_on_the_gpu(op):
    done = run_on_the_gpu(op, "eager", "cudagraph")
    assert done.exit_code == 0, done.output


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["mm_transposed", "attention", "softmax", "rms_norm"])
def test_compiled_on_the_gpu(op):
    """One operator of each kind, because compiling takes most of the time."""
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
    """Flash attention splits the keys of one sequence into more parts than those of many."""
    words = ["verify-invariance", "--device", "cuda", "--op", "attention", "--dtype", "bf16", "--mode", "eager"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert CliRunner().invoke(main, [*words, "--shape", "4x1x1000x128", "--outside"]).exit_code == 1


@pytest.mark.parametrize("form", ["table", "json"])
def test_lines_are_printed_at_once(form, monkeypatch):
    """After an error the lines of the table remain, but JSON is printed whole or not at all."""

    def verify_fails_later(name, operator, shape, dtype, device, *_):
        if name == "softmax":
            raise RuntimeError("interrupted")
        return compare.Result(name, shape, "fp32", device, 1234, "")

    monkeypatch.setattr("jitnorm.cli.verify.verify", verify_fails_later)
    words = ["--op", "mm", "--op", "softmax", "--dtype", "fp32"]
    done = run(*words, "--format", form)
    lines = done.stdout.splitlines()
    assert done.exit_code == 1 and done.stderr == "Error: interrupted\n"
    assert len(lines) == (0 if form == "json" else 2 + len(OPERATORS["mm"].shapes["cpu"]))
    for line in lines[2:]:
        assert line.split()[0] == "mm" and line.endswith("same")
        assert line.index("same") == lines[0].index("RESULT") and line.index(" 1234 ") + 5 == lines[0].index(" RES") - 1


def test_catches_torch_on_the_cpu():
    """Outside the mode, torch computes float32 GEMMs of few rows by another kernel."""
    words = ["--op", "mm", "--dtype", "fp32", "--shape", "256x512", "--mode", "eager"]
    done = run(*words, "--outside")
    assert done.exit_code == 1
    assert "differs" in done.stdout
    assert "mm, fp32, 256x512: the first row of" in done.stderr
    assert "of 256 elements differ from the row's alone" in done.stderr
    assert run(*words).exit_code == 0


@pytest.mark.gpu
def test_catches_cublas():
    """cuBLAS splits k of these GEMMs for few rows, on the H200 up to 31."""
    words = ["verify-invariance", "--op", "mm_transposed", "--shape", "4096x14336", "--dtype", "bf16"]
    words += ["--mode", "eager"]
    assert CliRunner().invoke(main, [*words, "--outside"]).exit_code == 1
    assert CliRunner().invoke(main, words).exit_code == 0


def forwards(x):
    """Return the sum of each row, added from the first element to the last."""
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
    monkeypatch.setattr(compare.torch, "compile", lambda call, **_: call)  # these are caught in eager mode
    operator = Operator(lambda shape, dtype, device: Case(torch.randn(1, *shape), call), "N", {"cpu": ((1000,),)})
    result = verify("made up", operator, (1000,), torch.float32, "cpu", 17)
    assert result.difference.startswith(words)


def written_outputs(arguments, before):
    """Return the arguments that a call wrote, without a scale for all rows."""
    written = [t for name, t in arguments.items() if name in before and not same_bits(t, before[name])]
    return [t for t in written if t.shape[0] > 1]


def one_of_each_family():
    """Return the operators as parameters: the first of each family, and the others as slow tests."""
    families = set()
    for op in REGISTERED:
        family = registry.EXAMPLES[op].function.__module__
        yield pytest.param(op, marks=pytest.mark.slow if family in families else ())
        families.add(family)


@pytest.mark.parametrize("op", one_of_each_family())
def test_a_broken_kernel_is_caught(op, monkeypatch):
    """In batches of 5 and more rows, one output has another bit in each element, and is caught for every output."""
    function = registry.EXAMPLES[op].function
    counts = set()

    def broken(**arguments):
        before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
        result = function(**arguments)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        outputs = [*(t for t in returned if t.shape[0] > 1), *written_outputs(arguments, before)]
        if next(iter(before.values())).shape[0] >= 5:
            counts.add(len(outputs))
            outputs[index].view(torch.uint8).bitwise_xor_(1)
        return result

    monkeypatch.setitem(registry.EXAMPLES, op, registry.EXAMPLES[op]._replace(function=broken))
    shape = OPERATORS[op].shapes["cpu"][-1]
    for index in itertools.count():
        result = verify(op, OPERATORS[op], shape, OPERATORS[op].dtypes[-1], "cpu", 6, ["eager"])
        assert result.difference.startswith("the first row of 5"), (index, result)
        if index + 1 == max(counts):
            break
    assert len(counts) == 1


def scale_and_store(q, k, v, table, positions, k_cache, v_cache, slot_mapping):
    """Scale q and k in place by their positions, then write k and v to caches, as a fused operator of a model does."""
    for heads in (q, k):
        heads *= table[positions][:, None]
    k_cache[slot_mapping], v_cache[slot_mapping] = k, v


def forgets_a_position(**arguments):
    positions = arguments["positions"]
    scale_and_store(**arguments | {"positions": torch.cat((positions[:4], positions[:1].expand(len(positions[4:]))))})


def writes_another_slot(**arguments):
    scale_and_store(**arguments)
    if len(arguments["q"]) > 4:
        arguments["v_cache"][arguments["slot_mapping"] + 1] = 1


def writes_one_slot_twice(**arguments):
    scale_and_store(**arguments)
    if len(arguments["q"]) > 4:
        arguments["k_cache"][arguments["slot_mapping"][0]] = arguments["k"][1]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (scale_and_store, ""),
        (forgets_a_position, "the last row of"),
        (writes_another_slot, "the first row of 5:"),
        (writes_one_slot_twice, "the first row of 5:"),
    ],
)
def test_a_case_with_positions_and_caches(function, words, monkeypatch):
    """Integers of a row are valid positions whatever the row contains."""

    def make_arguments(shape):
        q, k, v = (shape.randn(shape.rows, heads, shape.size) for heads in (2, 1, 1))
        return {
            **{"q": q, "k": k, "v": v, "table": torch.randn(9, shape.size).to(shape.dtype)},
            "positions": torch.arange(shape.rows) % 9,
            **{f"{name}_cache": shape.zeros(2 * shape.rows, 1, shape.size) for name in "kv"},
            "slot_mapping": torch.arange(shape.rows),
        }

    example = registry.Example(
        function,
        make_arguments,
        written=("q", "k", "k_cache", "v_cache"),
        per_row=("q", "k", "v", "positions", "slot_mapping"),
        slots="slot_mapping",
    )
    monkeypatch.setitem(registry.EXAMPLES, "made up", example)
    operator = Operator(functools.partial(cases._registered_case, "made up"), "N", {})
    result = verify("made up", operator, (16,), torch.bfloat16, "cpu", 6, ["eager"])
    assert result.difference.startswith(words) and bool(result.difference) == bool(words), result


@pytest.mark.parametrize("modes", [["cudagraph"], ["eager,cudagraph"], ["eager", "cudagraph"]])
def test_cudagraph_needs_cuda(modes):
    """Nothing is reported as the same that was not compared."""
    done = run("--op", "rmsnorm", *(word for mode in modes for word in ("--mode", mode)))
    assert done.exit_code == 2 and "--mode cudagraph needs --device cuda" in done.stderr and "same" not in done.stdout


def test_a_dtype_that_another_operator_serves():
    done = run("--op", "rmsnorm,fused_add_rmsnorm_fp32_residual", "--dtype", "fp32")
    assert done.exit_code == 2
    assert "--dtype must be bf16 or fp16 for fused_add_rmsnorm_fp32_residual, got fp32" in done.stderr


@pytest.mark.parametrize("form", ["table", "json"])
def test_nothing_compared_is_a_failure(form, monkeypatch):
    monkeypatch.setattr(compare, "_situations", lambda *_: iter(()))
    done = run("--op", "rmsnorm", "--dtype", "fp32", "--format", form)
    assert done.exit_code == 1 and done.stderr == "Error: nothing was compared of rmsnorm\n"
    if form == "json":
        assert [result["compared"] for result in json.loads(done.stdout)] == [0, 0]
    else:
        assert [line.split()[-3:] for line in done.stdout.splitlines()[2:]] == [["0", "not", "compared"]] * 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"modes": ("eger",)}, "modes must be of eager, cudagraph, compiled, got eger"),
        ({"modes": ()}, "modes must be of"),
        ({"max_batch": 1}, "max_batch must be 2 or more, got 1"),
    ],
)
def test_arguments_that_compare_nothing(words, says):
    arguments = {"max_batch": 17, "modes": ("eager",), **words}
    with pytest.raises(ValueError, match=says):
        verify("rmsnorm", OPERATORS["rmsnorm"], (128,), torch.float32, "cpu", **arguments)


def test_a_largest_batch_of_one_row_is_refused():
    arguments = ["verify-invariance", "--op", "mean", "--mode", "eager", "--max-batch", "1"]
    assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("max_batch", "largest"), [(2, [1, 2]), (17, [16, 17]), (300, [256, 300]), (1500, [1024, 1500])]
)
def test_the_largest_batch_is_max_batch(max_batch, largest):
    assert compare._batch_sizes(max_batch)[-2:] == largest


def test_lists_of_operators_and_dtypes(monkeypatch):
    monkeypatch.setattr(
        "jitnorm.cli.verify.verify", lambda name, _, shape, d, *rest: compare.Result(name, shape, str(d), "cpu", 1, "")
    )
    done = run("--op", "mm,bmm", "--dtype", "fp16,fp32", "--shape", "4x4,8x8", "--format", "json")
    assert len(json.loads(done.stdout)) == 2 * 2 * 2


@pytest.mark.parametrize("shape", ["9" * 10, "9" * 30, "9" * 5000, "\u0664"])
def test_sizes_that_are_no_numbers_or_too_large(shape):
    done = run("--op", "rmsnorm", "--shape", shape, "--dtype", "fp32")
    assert done.exit_code == 2 and "--shape must be HIDDEN_SIZE for rmsnorm" in done.stderr and len(done.stderr) < 300


@pytest.mark.parametrize("shape", ["4096", "4096x", "0x4", "axb"])
def test_malformed_shapes(shape):
    done = run("--op", "mm", "--shape", shape)
    assert done.exit_code == 2
    assert f"--shape must be NxK for mm, such as 4096x4096, got {shape!r}" in done.stderr


def test_cuda_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, ["verify-invariance", "--device", "cuda"])
    assert done.exit_code == 2 and "torch sees no GPU here" in done.stderr

"""Every operator and variant has what an operator needs: a reference, an invariance case, warm-up and a benchmark."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits
from operator_calls import forget_kernels, parameters
from references import REFERENCES

import jitnorm
from jitnorm.batch_invariant import verify
from jitnorm.benchmark import marker, settings
from jitnorm.core.operators import EXAMPLES, OPERATORS, Operator
from jitnorm.warmup import make_plan

ROWS, SIZE = 5, 64
# float8 has three bits behind the leading one.
TOLERANCES = TOLERANCE | {torch.float8_e4m3fn: 4e-2}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

operators = pytest.mark.parametrize("op", parameters(OPERATORS))
examples = pytest.mark.parametrize("op", parameters(EXAMPLES))


def run(op: str):
    example = EXAMPLES[op]
    return example.run(example.arguments(ROWS, SIZE, OPERATORS[op].dtypes[-1]))


@operators
def test_has_an_example_call(op):
    part_of = OPERATORS[op].part_of
    assert (op in EXAMPLES) != (part_of is not None and part_of.op in EXAMPLES)


@examples
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32])
def test_matches_its_reference(op, dtype, device):
    if dtype not in OPERATORS[op].dtypes:
        pytest.skip("another operator serves this dtype")
    example = EXAMPLES[op]
    arguments = example.arguments(ROWS, SIZE, dtype, device)
    expected = REFERENCES[op](copy.deepcopy(arguments))
    results = example.run(arguments)
    assert len(results) == len(expected)
    for result, reference in zip(results, expected, strict=True):
        assert relative_error(result, reference.double()) <= TOLERANCES[result.dtype]


@examples
def test_is_public(op):
    function = EXAMPLES[op].function
    assert getattr(jitnorm, function.__name__) is function and function.__name__ in jitnorm.__all__


@examples
def test_a_row_has_the_same_bits_alone_and_in_a_batch(op, device):
    example = EXAMPLES[op]
    if not example.per_row:
        pytest.skip("its results depend on all rows")
    together = example.arguments(ROWS, SIZE, OPERATORS[op].dtypes[-1], device)
    alone = copy.deepcopy(together)
    results = example.run(together)
    names = [None] * (len(results) - len(example.written)) + [*example.written]
    for row in range(ROWS):
        one = {name: v[row : row + 1] if name in example.per_row else copy.deepcopy(v) for name, v in alone.items()}
        for name, of_one, of_all in zip(names, example.run(one), results, strict=True):
            if example.slots and name and name not in example.per_row:
                of_one, of_all = (cache.flatten(0, example.slot_dims - 1) for cache in (of_one, of_all))
                assert same_bits(of_one[one[example.slots]], of_all[one[example.slots]])
            elif of_all.shape[0] == ROWS:  # a given scale is one for all rows
                assert same_bits(of_one, of_all[row : row + 1])


@operators
def test_a_warm_up_builds_what_its_call_uses(op):
    operator = OPERATORS[op]
    forget_kernels()
    run((operator.part_of or operator).op)
    used = {operator.spec(*key) for key in operator.kernels_by_spec}
    size = SIZE if operator.needs_size else None
    assert used == set(make_plan(op, hidden_size=size, dtype=operator.dtypes[-1], device="cpu").specs)


@examples
def test_has_an_invariance_case(op):
    """Its case in `jitnorm verify-invariance` runs its kernel; it has none if its results depend on all rows."""
    assert (op in verify.OPERATORS) == bool(EXAMPLES[op].per_row) != (op in verify.EXEMPT)
    if op in verify.OPERATORS:
        operator = verify.OPERATORS[op]
        assert set(operator.dtypes) == set(OPERATORS[op].dtypes)
        case = operator.make(operator.shapes["cpu"][0], operator.dtypes[-1], torch.device("cpu"))
        forget_kernels()
        with torch.inference_mode():
            case.call(case.row)
        assert OPERATORS[op].kernels_by_spec


@pytest.fixture(scope="module")
def benchmarked():
    """Return the operators whose kernels the benchmarks of the families call. The kernels themselves do nothing."""
    called = set()

    def kernels(operator, key):
        called.add(operator.op)
        return tuple(lambda *arguments: 0 for _ in range(2))  # 0: the kernel has accepted its arguments

    def call_once(fn, input_args, **_):
        fn(*input_args)

    with pytest.MonkeyPatch.context() as patch, settings.override_settings(device=torch.device("cpu")):
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(Operator, "_load", kernels)
        patch.setattr(marker, "do_bench", call_once)
        for family in {f"bench_{example.function.__module__.rpartition('.')[2]}" for example in EXAMPLES.values()}:
            if (BENCHMARKS / f"{family}.py").exists():  # a family may share the benchmark of another
                bench = importlib.import_module(family).bench
                points = reversed(bench.points(full=True))
                for point in {point.get("op", point.get("steps")): point for point in points}.values():
                    forget_kernels()  # these accept every call, those that another operator should serve too
                    bench(**point, impl="jitnorm")
    forget_kernels()
    return called


@operators
def test_has_a_benchmark(op, benchmarked):
    assert op in benchmarked

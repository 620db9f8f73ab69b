"""Every operator and variant has what an operator needs: a reference, an invariance case, warm-up and a benchmark."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits
from operator_calls import forget_kernels
from references import REFERENCES

import jitnorm
from jitnorm.batch_invariant import verify
from jitnorm.core.operators import EXAMPLES, OPERATORS
from jitnorm.warmup import make_plan

ROWS, SIZE = 5, 64
# float8 has three bits behind the leading one.
TOLERANCES = TOLERANCE | {torch.float8_e4m3fn: 4e-2}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

operators = pytest.mark.parametrize("op", OPERATORS)
examples = pytest.mark.parametrize("op", EXAMPLES)


def run(op: str, rows: int = ROWS, dtype: torch.dtype = torch.float32):
    example = EXAMPLES[op]
    return example.run(example.arguments(rows, SIZE, dtype))


@operators
def test_has_an_example_call(op):
    part_of = OPERATORS[op].part_of
    assert (op in EXAMPLES) != (part_of is not None and part_of.op in EXAMPLES)


@examples
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # rounds to 8 bits, and hardly rounds
def test_matches_its_reference(op, dtype, device):
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
    together = example.arguments(ROWS, SIZE, torch.bfloat16, device)
    alone = copy.deepcopy(together)
    results = example.run(together)
    for row in range(ROWS):
        one = {name: v[row : row + 1] if name in example.per_row else copy.deepcopy(v) for name, v in alone.items()}
        for of_one, of_all in zip(example.run(one), results, strict=True):
            slots = one.get("indices", one.get("slot_mapping"))
            if of_all.shape[0] == ROWS:
                assert same_bits(of_one, of_all[row : row + 1])
            elif slots is not None:  # a given scale is one for all rows
                assert same_bits(of_one[slots], of_all[slots])


@operators
def test_a_warm_up_builds_what_its_call_uses(op):
    operator = OPERATORS[op]
    forget_kernels()
    run((operator.part_of or operator).op)
    used = {operator.spec(*key) for key in operator.kernels_by_spec}
    size = SIZE if operator.needs_size else None
    assert used == set(make_plan(op, hidden_size=size, dtype="fp32", device="cpu").specs)


@examples
def test_has_an_invariance_case(op):
    """Its case in `jitnorm verify-invariance` runs its kernel; it has none if its results depend on all rows."""
    assert (op in verify.OPERATORS) == bool(EXAMPLES[op].per_row) != (op in verify.EXEMPT)
    if op in verify.OPERATORS:
        operator = verify.OPERATORS[op]
        case = operator.make(operator.shapes["cpu"][0], torch.float32, torch.device("cpu"))
        forget_kernels()
        with torch.inference_mode():
            case.call(case.row)
        assert OPERATORS[op].kernels_by_spec


@examples
def test_has_a_benchmark(op):
    named = re.compile(rf"\b{EXAMPLES[op].function.__name__}\b")
    assert any(named.search(file.read_text()) for file in BENCHMARKS.glob("bench_*.py"))

"""The module in the place of Thinking Machines' batch_invariant_ops, and torchtitan's use of it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types

import pytest
import torch
from helpers import relative_error, same_bits

from jitnorm.integrations import batch_invariant_ops as ours

# The signatures of the package: names and defaults of the parameters.
SIGNATURES = {
    "set_batch_invariant_mode": {"enabled": True},
    "is_batch_invariant_mode_enabled": {},
    "disable_batch_invariant_mode": {},
    "matmul_persistent": {"a": ..., "b": ..., "bias": None},
    "mm_batch_invariant": {"a": ..., "b": ...},
    "addmm_batch_invariant": {"bias": ..., "a": ..., "b": ...},
    "log_softmax": {"input": ..., "dim": -1},
    "mean_dim": {"input": ..., "dim": ..., "keepdim": False, "dtype": None},
    "mean_batch_invariant": {"input": ..., "dim": ..., "keepdim": False, "dtype": None},
    "get_batch_invariant_attention_block_size": {},
    # As in SGLang's copy; the package's own has no argument.
    "enable_batch_invariant_mode": {"enable_bmm": True},
    "bmm_batch_invariant": {"a": ..., "b": ..., "out": None},
}


@pytest.fixture
def installed():
    before = {name: sys.modules.pop(name) for name in (*sys.modules,) if name.split(".")[0] == "batch_invariant_ops"}
    ours.install()
    yield
    ours.uninstall()
    sys.modules.update(before)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(ours, name)).parameters
    found = {key: ... if p.default is p.empty else p.default for key, p in parameters.items()}
    assert found == SIGNATURES[name]


def test_imports(installed):
    import batch_invariant_ops
    from batch_invariant_ops import AttentionBlockSize, enable_batch_invariant_mode
    from batch_invariant_ops.batch_invariant_ops import matmul_persistent

    assert enable_batch_invariant_mode is ours.enable_batch_invariant_mode
    assert matmul_persistent is batch_invariant_ops.batch_invariant_ops.matmul_persistent is ours.matmul_persistent
    assert batch_invariant_ops.get_batch_invariant_attention_block_size() == AttentionBlockSize(16, 16) == (16, 16)
    assert {*batch_invariant_ops.__all__} >= {*SIGNATURES}
    ours.install()  # again
    ours.uninstall()
    ours.uninstall()
    assert "batch_invariant_ops" not in sys.modules


def test_another_package_is_not_replaced(monkeypatch):
    other = types.ModuleType("batch_invariant_ops")
    other.__file__ = "/elsewhere/batch_invariant_ops.py"
    monkeypatch.setitem(sys.modules, "batch_invariant_ops", other)
    with pytest.raises(RuntimeError, match=r"imported already, from /elsewhere/batch_invariant_ops\.py: call install"):
        ours.install()
    ours.uninstall()
    assert sys.modules["batch_invariant_ops"] is other


def test_what_the_functions_compute(device):
    a, b = torch.randn(5, 7, device=device), torch.randn(7, 3, device=device)
    bias, x = torch.randn(3, device=device), torch.randn(5, 4, 6, device=device)
    assert relative_error(ours.mm_batch_invariant(a, b), a.double() @ b.double()) < 1e-3
    assert relative_error(ours.addmm_batch_invariant(bias, a, b), a.double() @ b.double() + bias.double()) < 1e-3
    mean = ours.mean_batch_invariant(x, [0, 2], keepdim=True)
    assert relative_error(mean, x.double().mean((0, 2), keepdim=True)) < 1e-6
    assert relative_error(ours.mean_batch_invariant(x, []), x.double().mean()) < 1e-5


def test_torchtitan(installed, monkeypatch):
    """torchtitan's own function enables the mode through the import; its settings of the process are undone here."""
    utils = pytest.importorskip("torchtitan.distributed.utils", reason="torchtitan cannot be imported")
    monkeypatch.setattr(utils, "_batch_invariant_enabled", False)
    environment = dict(os.environ)
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in ("allow_tf32", "allow_bf16_reduced_precision_reduction")}
    before |= {"allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction}
    cudnn = torch.backends.cudnn.allow_tf32
    linear, x = torch.nn.Linear(64, 32), torch.randn(17, 64)
    try:
        utils.set_batch_invariance(True)
        assert utils.is_in_batch_invariant_mode() and ours.is_batch_invariant_mode_enabled()
        together = linear(x)
        assert all(same_bits(linear(x[i : i + 1]), together[i : i + 1]) for i in range(17))
        together.square().sum().backward()  # as in training
        assert linear.weight.grad.any()
    finally:
        ours.disable_batch_invariant_mode()
        for name, value in before.items():
            setattr(matmul, name, value)
        torch.backends.cudnn.allow_tf32 = cudnn
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def test_importing_the_module_imports_no_trainer():
    assert importlib.import_module("jitnorm.integrations.batch_invariant_ops") is ours
    assert "_is_jitnorm" not in vars(ours)

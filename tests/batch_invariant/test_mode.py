"""Test that leaving batch-invariant mode restores what was there before, and who is in the mode."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from processes import run_before_import

from jitnorm.batch_invariant import (
    aten_patches,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)
from jitnorm.batch_invariant.reductions import rms_norm

OPERATORS = ("mm", "mm.out", "mm.dtype", "addmm", "addmm.out", "bmm", "bmm.out", "baddbmm", "_softmax", "_log_softmax")
OPERATORS += ("mean.dim", "mean.out", "rms_norm", "_scaled_dot_product_flash_attention")
OPERATORS += ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")


def state():
    """Return all that the mode changes: the dispatcher's tables, torch's switches, Inductor's tables and settings."""
    from torch._inductor import config, decomposition, lowering

    cuda = torch.backends.cuda
    return (
        [torch._C._dispatch_dump(f"aten::{name}") for name in OPERATORS],
        (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        dict(decomposition.decompositions),
        dict(lowering.lowerings),
        (config.force_disable_caches, config.pattern_matcher),
    )


@pytest.fixture(autouse=True)
def state_is_restored():
    before = state()
    yield
    assert not is_batch_invariant_mode_enabled()
    assert state() == before


def is_on():
    """Return whether the mode is on, and check its effect on a row of a GEMM, alone and among others."""
    a, b = torch.randn(8, 999), torch.randn(999, 300)
    same = torch.equal(torch.mm(a, b)[:1], torch.mm(a[:1], b)) and torch.equal(F.linear(a, b.T)[3:4], a[3:4] @ b)
    assert same or not is_batch_invariant_mode_enabled()
    return is_batch_invariant_mode_enabled()


def test_a_block():
    with set_batch_invariant_mode():
        assert is_on()
    assert not is_on()


def test_blocks_inside_each_other():
    with set_batch_invariant_mode():
        with set_batch_invariant_mode(False):
            with set_batch_invariant_mode():
                assert is_on()
            assert not is_on()
        assert is_on()
        with set_batch_invariant_mode():
            pass
        assert is_on()


def test_an_error_inside():
    with pytest.raises(ZeroDivisionError), set_batch_invariant_mode():
        raise ZeroDivisionError
    assert not is_on()


def test_an_error_while_entering(monkeypatch):
    patch = aten_patches._patch

    def fails_halfway(library, bmm):
        patch(library, bmm)
        raise RuntimeError("halfway")

    monkeypatch.setattr(aten_patches, "_patch", fails_halfway)
    for enter in (lambda: set_batch_invariant_mode().__enter__(), enable_batch_invariant_mode):
        with pytest.raises(RuntimeError, match="halfway"):
            enter()
        assert not is_on()


def test_enabled_twice_is_enabled_once():
    enable_batch_invariant_mode()
    enable_batch_invariant_mode()
    assert is_on()
    disable_batch_invariant_mode()
    assert not is_on()
    disable_batch_invariant_mode()


def test_enabled_and_disabled_inside_a_block():
    with set_batch_invariant_mode():
        disable_batch_invariant_mode()
        assert not is_on()
        enable_batch_invariant_mode(enable_bmm=False)
        assert is_on()
    assert not is_on()
    enable_batch_invariant_mode()
    with set_batch_invariant_mode(False):
        enable_batch_invariant_mode()
    assert is_on()
    disable_batch_invariant_mode()


def test_bmm_can_be_left_alone():
    before = torch._C._dispatch_dump("aten::bmm")
    enable_batch_invariant_mode(enable_bmm=False)
    assert torch._C._dispatch_dump("aten::bmm") == before
    with set_batch_invariant_mode():
        assert torch._C._dispatch_dump("aten::bmm") != before
    assert torch._C._dispatch_dump("aten::bmm") == before
    disable_batch_invariant_mode()


def test_blocks_of_threads_that_overlap():
    """The first to enter is the first to leave, while the other is still inside."""
    inside, may_leave, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        with set_batch_invariant_mode():
            inside.set()
            may_leave.wait()
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    assert is_on()  # the mode belongs to the process
    with set_batch_invariant_mode():
        may_leave.set()
        left.wait()
        assert is_on()
    thread.join()
    assert not is_on()


def test_many_threads():
    def enter_often():
        for _ in range(20):
            with set_batch_invariant_mode():
                assert is_batch_invariant_mode_enabled()

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_a_fresh_process():
    """Importing the package loads no compiler. A forked child is in the mode of its parent, and leaves it
    independently. Nothing is printed."""
    script = """
        import os, sys, torch, warnings
        from jitnorm.batch_invariant import is_batch_invariant_mode_enabled, set_batch_invariant_mode
        assert not {"triton", "torch._dynamo"} & {*sys.modules}
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # of Python 3.12
        torch.set_num_threads(1)
        with set_batch_invariant_mode():
            child = os.fork()
            assert is_batch_invariant_mode_enabled()
            torch.mm(torch.ones(3, 4), torch.ones(4, 5))
        assert not is_batch_invariant_mode_enabled()
        torch.mm(torch.ones(3, 4), torch.ones(4, 5))
        if child:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            os._exit(7)
    """
    done = run_before_import(script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


@pytest.mark.parametrize("can_split", [True, False])
def test_user_settings_of_attention_are_restored(monkeypatch, can_split):
    """The mode disables cuDNN's attention only if torch has no operator that calls it for one sequence."""
    monkeypatch.setattr(aten_patches, "has_cudnn_attention_forward", lambda: can_split)
    cuda = torch.backends.cuda
    for enabled in (False, True):
        cuda.enable_cudnn_sdp(enabled)
        with set_batch_invariant_mode():
            assert cuda.cudnn_sdp_enabled() is (enabled and can_split)
        assert cuda.cudnn_sdp_enabled() is enabled


def test_code_compiled_outside_is_not_used_inside():
    called = []

    def backend(graph, inputs):
        called.append(is_batch_invariant_mode_enabled())
        return graph.forward

    compiled = torch.compile(lambda x: x.softmax(-1), backend=backend)
    x = torch.randn(3, 5)
    compiled(x)
    with set_batch_invariant_mode():
        compiled(x)
    compiled(x)
    assert called == [False, True, False]


def test_code_compiled_by_another_thread(monkeypatch):
    """From torch 2.12 on a thread has settings of its own, and code compiled outside the mode is on disk."""
    called = []

    def softmax(self, dim, half_to_float, original=aten_patches.PATCHES["_softmax"]):
        called.append(dim)
        return original(self, dim, half_to_float)

    monkeypatch.setitem(aten_patches.PATCHES, "_softmax", softmax)
    x = torch.randn(3, 8)
    compiled = torch.compile(lambda x: torch.softmax(x, -1))
    compiled(x)
    assert not called
    with set_batch_invariant_mode():
        thread = threading.Thread(target=lambda: compiled(x))
        thread.start()
        thread.join()
    assert called


def test_a_removal_that_fails(monkeypatch):
    remove = aten_patches.AtenPatches.remove

    def fails_at_the_end(self):
        remove(self)
        raise RuntimeError("at the end")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="at the end"):
        patch.setattr(aten_patches.AtenPatches, "remove", fails_at_the_end)
        with set_batch_invariant_mode():
            pass
    assert not is_on()
    with set_batch_invariant_mode():
        assert is_on()


def test_an_error_while_the_mode_changes(monkeypatch):
    patch = aten_patches._patch

    def fails_without_bmm(library, bmm):
        if not bmm:
            raise RuntimeError("without bmm")
        patch(library, bmm)

    monkeypatch.setattr(aten_patches, "_patch", fails_without_bmm)
    with set_batch_invariant_mode():
        with pytest.raises(RuntimeError, match="without bmm"):
            enable_batch_invariant_mode(enable_bmm=False)
        assert is_on()


def test_ones_of_many_threads():
    def work():
        for size in range(1, 300):
            F.rms_norm(torch.randn(2, size % 40 + 1), (size % 40 + 1,))

    errors = []
    monitored = threading.excepthook
    threading.excepthook = errors.append
    try:
        with set_batch_invariant_mode():
            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        threading.excepthook = monitored
    assert not errors


def test_ones_are_bounded_and_go_with_the_mode():
    with set_batch_invariant_mode():
        for size in range(1, 100):
            F.rms_norm(torch.randn(2, size), (size,))
        assert 0 < len(rms_norm._ones) <= 16
        kept = rms_norm._ones_like_row(torch.randn(2, 99))
        assert rms_norm._ones_like_row(torch.randn(7, 99)) is kept
    assert not rms_norm._ones


@pytest.mark.parametrize("call", [set_batch_invariant_mode, enable_batch_invariant_mode])
def test_arguments_are_bools(call):
    with pytest.raises(TypeError, match="must be True or False, got int"):
        result = call(1)
        result.__enter__()

"""What of an operator is registered with torch, and when: in new processes, as a process registers once."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits
from processes import run_before_import

import jitnorm


def run_python(script: str, *arguments: object) -> None:
    """Run a script in a process that has not imported jitnorm, and assert that it succeeds."""
    done = run_before_import(f"import sys; sys.argv[1:] = {[str(argument) for argument in arguments]}", script)
    assert done.returncode == 0, done.stderr


class Block(torch.nn.Module):
    """Operators with and without a residual, and one that writes into its argument."""

    def forward(self, x, residual, weight):
        jitnorm.fused_add_rmsnorm(x, residual, weight)
        return jitnorm.rmsnorm(x, weight), residual


@pytest.mark.slow
def test_an_exported_program_runs_in_a_process_that_only_imports_jitnorm(tmp_path):
    """The graph names torch.ops.jitnorm, and the process calls nothing of jitnorm before it is loaded."""
    inputs = tuple(torch.randn(*shape) for shape in ((2, 64), (2, 64), (64,)))
    with torch.no_grad():
        program = torch.export.export(Block(), tuple(t.clone() for t in inputs))
        expected = program.module()(*(t.clone() for t in inputs))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    script = """
        import sys
        import jitnorm
        import torch
        folder = sys.argv[1]
        inputs = torch.load(folder + "/inputs.pt")
        with torch.no_grad():
            outputs = torch.export.load(folder + "/program.pt2").module()(*inputs)
        torch.save(outputs, folder + "/outputs.pt")
    """
    run_python(script, tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt")
    assert all(same_bits(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_finds_the_operators_without_torch_ops(tmp_path):
    """C++ looks them up in the dispatcher: kernels and gradients are there although Python never asked for one."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.jitnorm.rmsnorm(x, weight, 1e-6, None)

    torch.jit.save(torch.jit.script(norm), str(tmp_path / "norm.pt"))
    script = """
        import sys
        import jitnorm
        import torch
        norm = torch.jit.load(sys.argv[1] + "/norm.pt")
        x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(64)
        norm(x, weight).sum().backward()
        expected = x.detach().clone().requires_grad_()
        torch.nn.functional.rms_norm(expected, (64,), weight, 1e-6).sum().backward()
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-5)
    """
    run_python(script, tmp_path)


@pytest.mark.slow
def test_a_lookup_registers_what_tracers_need():
    """Of this operator alone; by name, by overload, and from several threads at once."""
    run_python(
        """
        import threading
        import torch
        early = torch.ops.jitnorm  # before the package is imported
        import jitnorm
        from jitnorm.core.torch_library import _pending_fakes

        def fake(name, *arguments):
            with torch._subclasses.FakeTensorMode() as mode:
                getattr(early, name).default(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))

        assert early is torch.ops.jitnorm and not hasattr(early, "no_such_operator")
        assert {"rmsnorm", "silu_and_mul", "gelu_and_mul"} <= _pending_fakes.keys()
        x, weight = torch.randn(2, 64), torch.randn(64)
        torch.ops.jitnorm.rmsnorm(x, weight)  # in eager mode
        torch._library.utils.lookup_op("jitnorm::silu_and_mul")
        assert not {"rmsnorm", "silu_and_mul"} & _pending_fakes.keys() and "gelu_and_mul" in _pending_fakes
        assert "jitnorm" in torch.ops and "rmsnorm" in early
        fake("rmsnorm", x, weight)
        meta = torch.ops.jitnorm.gemma_rmsnorm(x.to("meta"), weight.to("meta"))
        assert meta.is_meta and meta.shape == x.shape

        errors, start = [], threading.Barrier(8)
        def call():
            start.wait()
            try:
                fake("gelu_and_mul", x)
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        """
    )

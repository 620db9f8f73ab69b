"""Importing this package must not import what is slow, optional, or neither needed nor installed everywhere."""

from __future__ import annotations

from processes import run_before_import


def test_importing_and_calling_imports_nothing_optional():
    """torch._dynamo takes a second to import, and engines that compile nothing do without it."""
    script = """
        import sys, jitnorm, jitnorm.dispatch, jitnorm.layers, torch

        jitnorm.patch_transformers
        optional = ("flashinfer", "transformers", "torch._dynamo")
        print([name for name in optional if name in sys.modules])
        jitnorm.dispatch.rmsnorm(torch.ones(1, 111), torch.ones(111))
        print([name for name in sys.modules if name.startswith(("flashinfer", "torch._dynamo."))])
    """
    done = run_before_import(script)
    assert done.stdout == "[]\n[]\n", done.stderr

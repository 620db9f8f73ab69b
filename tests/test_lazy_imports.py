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


def test_what_patches_models_and_builds_ahead_of_time_is_imported_by_its_first_use():
    script = """
        import gc, sys
        import torch

        collections = []
        gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
        import jitnorm

        lazy = ("integrations.transformers_classes", "layers", "warmup.run", "warmup.distributed", "jit.archive")
        lazy += ("jit.build",)
        print([name for name in lazy if f"jitnorm.{name}" in sys.modules], {*collections}, gc.isenabled())
        from jitnorm.integrations.transformers import explain

        jitnorm.unpatch_transformers(torch.nn.Linear(1, 1))
        jitnorm.cache.save("nothing")
        print(callable(explain), sys.modules["jitnorm.warmup"].Result.__name__)
    """
    done = run_before_import(script)
    assert done.stdout == "[] {0} True\nTrue Result\n", done.stdout + done.stderr

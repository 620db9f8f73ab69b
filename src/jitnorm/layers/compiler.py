"""Which compiler takes what the layers make of a model: a setting of the process, unless a call says otherwise."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Compiler: TypeAlias = Literal["eager", "inductor"]

_compiler: Compiler = "eager"


def set_compiler(compiler: Compiler) -> None:
    """Sets what the layers assume from now on: "eager", where every operator is a kernel of its own (torch.compile with
    a backend that fuses nothing included), or "inductor", which fuses what is written in plain PyTorch.

    Raises:
        ValueError: `compiler` is neither.
    """
    global _compiler
    if compiler not in get_args(Compiler):
        raise ValueError(f"compiler must be 'eager' or 'inductor', got {compiler!r}")
    _compiler = compiler


def resolve_compiler(compiler: Compiler | None) -> Compiler:
    """`compiler`, an argument of a call, or the setting where it is None. ValueError for what is no such name."""
    if compiler is None:
        return _compiler
    if compiler not in get_args(Compiler):
        raise ValueError(f"compiler must be 'eager', 'inductor' or None for the setting, got {compiler!r}")
    return compiler

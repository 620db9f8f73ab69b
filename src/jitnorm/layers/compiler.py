"""Set the compiler that the layers assume, for a process; an argument of a call overrides it."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Compiler: TypeAlias = Literal["eager", "inductor"]

_compiler: Compiler = "eager"


def set_compiler(compiler: Compiler) -> None:
    """Set which compiler the layers of this process assume from now on; the default is "eager".

    Args:
        compiler: "eager" if every operator runs as a kernel of its own, which includes torch.compile with a backend
            that fuses nothing; "inductor" for torch.compile's default backend, which fuses plain PyTorch operators.

    Raises:
        ValueError: `compiler` is neither.
    """
    global _compiler
    if compiler not in get_args(Compiler):
        raise ValueError(f"compiler must be 'eager' or 'inductor', got {compiler!r}")
    _compiler = compiler


def resolve_compiler(compiler: Compiler | None) -> Compiler:
    """Return `compiler`, the argument of a layer's call, or the setting if it is None.

    Raises:
        ValueError: `compiler` is neither a compiler's name nor None.
    """
    if compiler is None:
        return _compiler
    if compiler not in get_args(Compiler):
        raise ValueError(f"compiler must be 'eager', 'inductor' or None for the setting, got {compiler!r}")
    return compiler

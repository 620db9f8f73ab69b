"""Define the operators of vLLM's compiled graphs, `torch.ops.jitnorm_vllm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("jitnorm_vllm", "FRAGMENT")  # its operators exist as long as it does


def define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator that writes none of its arguments, for CUDA and the CPU.

    `torch.library.custom_op` would cost the host more in each call.

    Args:
        name: of the operator.
        function: what it calls. Its annotations are types, not text: its module has no
            `from __future__ import annotations`.
        fake: returns a tensor of the result's shape and dtype.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=[]))
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    _library._register_fake(name, fake)

"""Compare the hidden states of an engine with those of transformers' model in float32, on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Parameters that engines join: the name of the whole, and of its parts in order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@torch.no_grad()
def hidden_state_error(found: Tensor, model: Path | str, parameters: Mapping[str, Tensor], tokens: list[int]) -> float:
    """Return the norm of the error of hidden states over the norm of those in float32.

    Args:
        found: `[tokens, hidden_size]`, after the last norm, of the first tokens of a sequence.
        model: the folder of config.json.
        parameters: of the engine, by name. Rows that pad a vocabulary are left out.
        tokens: the sequence.

    Raises:
        ValueError: a parameter of transformers' model is not among them.
    """
    from transformers import AutoConfig, AutoModel

    with found.device:  # not the meta device: buffers such as the rotary frequencies have no other source
        reference = AutoModel.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32).eval()
    wanted = dict(reference.named_parameters())
    for name, parameter in wanted.items():
        parameter.copy_(_find(f"model.{name}", parameter.shape[0], wanted, parameters))
    expected = reference(torch.tensor([tokens[: len(found)]], device=found.device)).last_hidden_state[0].double()
    return float((found.double() - expected).norm() / expected.norm())


def _find(name: str, rows: int, wanted: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the rows of an engine's parameter that transformers calls `name`."""
    start, source = 0, name
    for whole, parts in JOINED.items():
        for i, part in enumerate(parts):
            if f".{part}." in name:
                source = name.replace(part, whole)
                others = (name.replace(part, other).removeprefix("model.") for other in parts[:i])
                start = sum(wanted[other].shape[0] for other in others)
    if source not in parameters:
        raise ValueError(f"the engine's model has no {source}")
    return parameters[source][start : start + rows]

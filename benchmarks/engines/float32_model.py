"""Compare the hidden states of an engine with those of transformers' model in float32, on the same weights.

The model in float32 runs in a process of its own, `python float32_model.py`, with its task as JSON on the standard
input. The engine's process may have replaced PyTorch's operators, and its GPU memory is the engine's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from engine_models import seed_weights
from torch import Tensor

# Parameters that engines join: the name of the whole, and of its parts in order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def hidden_state_error(
    found: Tensor, model: str, parameters: Mapping[str, Tensor], tokens: list[int], file: Path
) -> float:
    """Return the norm of the error of hidden states over the norm of those in float32.

    Args:
        found: `[tokens, hidden_size]`, after the last norm; the last token may be left out.
        model: the folder of config.json.
        parameters: of the engine, by name, with the values of `seed_weights`. Rows that pad a vocabulary are left out.
        tokens: the sequence.
        file: the hidden states in float32. Written where it does not exist: those of all variants are the same.

    Raises:
        ValueError: the engine returned the hidden states of another number of tokens.
        RuntimeError: the process of the model in float32 failed.
    """
    if not len(tokens) - 1 <= len(found) <= len(tokens):
        raise ValueError(f"hidden states of {len(tokens)} tokens were expected, got {len(found)}")
    if not file.exists():
        # Random values depend on the device, and on the shape and the dtype of what they fill.
        shapes = {name: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in parameters.items()}
        task = {"model": model, "parameters": shapes, "tokens": tokens, "device": found.device.type, "file": str(file)}
        done = subprocess.run([sys.executable, __file__], input=json.dumps(task), stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise RuntimeError(f"the model in float32 failed: {last}")
    expected = torch.load(file)[: len(found)].double()
    return float((found.cpu().double() - expected).norm() / expected.norm())


@torch.no_grad()
def float32_states(model: str, parameters: Mapping[str, Any], tokens: list[int], device: str) -> Tensor:
    """Return the hidden states of a sequence, `[tokens, hidden_size]`, computed in float32.

    Args:
        model: the folder of config.json.
        parameters: shape and dtype of the engine's, by name.
        tokens: the sequence.
        device: the engine's, such as "cuda".

    Raises:
        ValueError: a parameter of transformers' model is not among the engine's.
    """
    from transformers import AutoConfig, AutoModel

    with torch.device(device):  # not the meta device: buffers such as the rotary frequencies have no other source
        reference = AutoModel.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32).eval()
    targets = dict(reference.named_parameters())
    for name, parameter in targets.items():
        source, start = _find(f"model.{name}", targets)
        if source not in parameters:
            raise ValueError(f"the engine's model has no {source}")
        shape, dtype = parameters[source]
        values = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        seed_weights([(source, values)])
        parameter.copy_(values[start : start + parameter.shape[0]])
    return reference(torch.tensor([tokens], device=device)).last_hidden_state[0].cpu()


def _find(name: str, targets: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the engine's name of a parameter that transformers calls `name`, and the row at which it begins."""
    for whole, parts in JOINED.items():
        for i, part in enumerate(parts):
            if f".{part}." in name:
                others = (name.replace(part, other).removeprefix("model.") for other in parts[:i])
                return name.replace(part, whole), sum(targets[other].shape[0] for other in others)
    return name, 0


def main() -> None:
    task = json.load(sys.stdin)
    file = Path(task.pop("file"))
    part = file.with_suffix(".part")  # so that an interrupted process leaves no file
    torch.save(float32_states(**task), part)
    part.replace(file)


if __name__ == "__main__":
    main()

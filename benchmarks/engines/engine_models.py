"""Provide what an engine needs beside its package: configs, random weights, prompts, and the plugin's entry point."""

from __future__ import annotations

import json
import os
import random
import sys
import zlib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Llama-3.2-1B; the other models are read from the folder that the caller names.
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
GENERATED = {"llama-3.2-1b": LLAMA_3_2_1B}


def find_model(folder: Path, name: str, generated: Path) -> Path:
    """Return the folder of a model's config.json: in `folder`, or written to `generated` where this module has it.

    Raises:
        ValueError: neither has the model.
    """
    if (folder / name / "config.json").is_file():
        return folder / name
    if name not in GENERATED:
        there = sorted({*GENERATED, *(file.parent.name for file in folder.glob("*/config.json"))})
        raise ValueError(f"model must be one of {', '.join(there)} ({folder} has no {name}/config.json), got {name!r}")
    path = generated / name / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(GENERATED[name], indent=1))
    return path.parent


def read_config(model: Path) -> dict[str, Any]:
    """Return the config of a model, with `head_dim` where it is left out."""
    config = json.loads((model / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def count_parameters(config: dict[str, Any]) -> int:
    """Return the number of parameters of a dense decoder, norms left out."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention = hidden * config["head_dim"] * (2 * heads + 2 * config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    embeddings = (1 if config.get("tie_word_embeddings") else 2) * config["vocab_size"] * hidden
    return config["num_hidden_layers"] * layer + embeddings


def cache_bytes(config: dict[str, Any], tokens: int) -> int:
    """Return the bytes of a KV cache of so many tokens, in bfloat16."""
    return tokens * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2


def seed_weights(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Fill parameters with random values that depend on their names only, so that all variants have the same.

    The dummy weights of engines lie within 0.001 of zero, norms included, and every logit is alike. Norms get values
    around 1, the others a standard deviation of 0.02, by which tokens differ.
    """
    for name, parameter in parameters:
        generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(name.encode()))
        mean, std = (1.0, 0.1) if "norm" in name and parameter.dim() == 1 else (0.0, 0.02)
        parameter.data.normal_(mean, std, generator=generator)  # in place: several variants share the GPU's memory


def random_prompts(lengths: Iterable[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts of token ids."""
    generator = random.Random(seed)
    return [generator.choices(range(vocab_size), k=length) for length in lengths]


def find_plugin(group: str, target: str, folder: Path) -> EntryPoint:
    """Return jitnorm's entry point in a group of plugins.

    A checkout that is on PYTHONPATH, but not installed, has no entry points. It gets this one from metadata in
    `folder`, as an installation has it, here and in the processes that are started from now on.

    Args:
        group: such as "vllm.general_plugins".
        target: the function, as "module:function".
        folder: an empty folder, which exists until those processes end.
    """
    if not (found := entry_points(group=group, name="jitnorm")):
        metadata = folder / "jitnorm-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: jitnorm\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\njitnorm = {target}\n")
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        found = entry_points(group=group, name="jitnorm")
    return found["jitnorm"]

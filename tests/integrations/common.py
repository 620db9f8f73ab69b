"""What the tests of patched transformers models share."""

from __future__ import annotations

import copy
import importlib

import torch
from helpers import rmsnorm_reference

# The models whose attention, layers and MLPs are patched: what their config needs. Few sizes: few kernels are built.
ATTENTION_MODELS = {
    "Llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma3": {
        "query_pre_attn_scalar": 64,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
LAYERS, HEAD_DIM = 2, 64


def make_model(name, dtype=torch.float32, device="cpu", **changes):
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "head_dim": HEAD_DIM}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    others = {"max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1}
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(
        config(**{**sizes, **others, "eos_token_id": 2, **ATTENTION_MODELS[name], **changes})
    )
    for module in norms(model):
        torch.nn.init.normal_(module.weight, 0.0 if name == "Gemma3" else 1.0, 0.3)
    return model.to(device, dtype).eval()


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def batch(device="cpu", rows=3, length=7):
    """Return tokens and a mask of sequences that are padded on their left."""
    ids = torch.randint(3, 96, (rows, length), device=device)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, :row], mask[row, :row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, inputs):
    with torch.no_grad():
        out = model(**inputs).logits
    return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out


def norms(model):
    return [m for m in model.modules() if "RMSNorm" in type(m).__name__]


def in_float64(model):
    """Return a copy that computes in float64, with norms from their definition: transformers' round to float32."""
    twin = copy.deepcopy(model).double()
    for module in norms(twin):
        gemma = type(module).__name__.startswith("Gemma")
        eps = module.eps if gemma else module.variance_epsilon
        weight = module.weight.detach() + (1 if gemma else 0)
        module.forward = lambda x, weight=weight, eps=eps: rmsnorm_reference(x, weight, eps)
    return twin

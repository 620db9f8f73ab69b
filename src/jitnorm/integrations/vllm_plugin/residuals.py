"""Keep the residual of known models in float32 between their norms.

In half precision each layer rounds the residual twice, which is most of a model's rounding error. Where Inductor
generates the norms, it rounds once in a layer, because it adds three tensors in every second norm.
"""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.integrations.vllm_plugin import compatibility, layers

_MODELS = "vllm.model_executor.models"
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
# The models whose forward passes the residual from layer to layer and to the last norm, and does nothing else with it.
_FORWARDS = {
    f"{_MODELS}.qwen2:Qwen2Model.forward",  # of Qwen3 too
    f"{_MODELS}.llama:LlamaModel.forward",
    f"{_MODELS}.mistral:MistralModel.forward",
    f"{_MODELS}.gemma3:Gemma3Model.forward",
}
# The decoder layers whose forward only passes the residual to norms, and the names of these norms.
_LAYERS = {
    f"{_MODELS}.qwen3:Qwen3DecoderLayer.forward": _LLAMA_NORMS,
    f"{_MODELS}.qwen2:Qwen2DecoderLayer.forward": _LLAMA_NORMS,
    f"{_MODELS}.llama:LlamaDecoderLayer.forward": _LLAMA_NORMS,
    f"{_MODELS}.mistral:MistralDecoderLayer.forward": _LLAMA_NORMS,
    f"{_MODELS}.gemma3:Gemma3DecoderLayer.forward": ("input_layernorm", "pre_feedforward_layernorm"),
}


def norms_of_float32_residuals(model: torch.nn.Module, config: Any) -> set[int]:
    """Return the ids of the norms between which a model's residual may be float32; none of them if it must not be.

    Another process or another model may get the residual, in the dtype of the activations: with pipeline parallelism,
    and in speculative decoding.
    """
    if config.parallel_config.pipeline_parallel_size > 1 or config.speculative_config is not None:
        return set()
    if compatibility.changed("residuals"):
        return set()
    found: set[int] = set()
    module: Any
    for module in model.modules():
        if compatibility.name_of_forward(module) not in _FORWARDS or getattr(module, "aux_hidden_state_layers", None):
            continue
        names = [_LAYERS.get(compatibility.name_of_forward(layer)) for layer in module.layers]
        if None in names:
            continue
        norms = [getattr(layer, name) for layer, own in zip(module.layers, names, strict=True) for name in own or ()]
        norms.append(module.norm)
        if all(isinstance(norm, layers.NORM_CLASSES) for norm in norms):
            found |= {id(norm) for norm in norms}
    return found

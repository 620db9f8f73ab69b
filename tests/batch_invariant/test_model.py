"""Repeat the experiment of Thinking Machines (https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference)
at the size of a test: one prompt, decoded in batches of several sizes beside other prompts, has one completion."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.batch_invariant.aten_patches import BMM_PATCHES, PATCHES, PATCHES_BY_KEY
from jitnorm.batch_invariant.inductor import BMM_FALLBACK_OPERATORS, FALLBACK_OPERATORS

transformers = pytest.importorskip("transformers")

PROMPT, NEW, VOCABULARY = 11, 6, 512
# Batch sizes, and the places of the prompt: the first, the middle and the last.
PLACES = [(1, 0), (3, 0), (3, 1), (3, 2), (8, 0), (8, 4), (8, 7)]


def llama(device, dtype, hidden_size, heads, **other):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        **other,
    )
    return transformers.LlamaForCausalLM(config).to(device, dtype).eval()


def tiny_llama(device, dtype, attention):
    small = {"num_key_value_heads": 2, "intermediate_size": 512, "attn_implementation": attention}
    return llama(device, dtype, 256, 4, **small)


def decode(model, tokens, new=NEW):
    """Decode greedily. Return the new tokens, and the logits of every step, `[batch, steps, vocabulary]`."""
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[:, PROMPT:], torch.stack(out.logits, 1)


def completions(model, device):
    """Yield the prompt's completion and logits in every place of every batch, beside random prompts."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, VOCABULARY, (1, PROMPT), generator=generator)
    for batch, place in PLACES:
        tokens = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=generator)
        tokens[place] = prompt
        sequences, logits = decode(model, tokens.to(device))
        yield sequences[place], logits[place]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_completion_in_the_mode(device, dtype, attention):
    model = tiny_llama(device, dtype, attention)
    with set_batch_invariant_mode():
        (tokens, logits), *others = completions(model, device)
        assert len(tokens) == NEW and logits.isfinite().all()
        for other_tokens, other_logits in others:
            assert torch.equal(other_tokens, tokens)
            assert same_bits(other_logits, logits)


def distinct_logits(model, device):
    return len({logits.float().cpu().numpy().tobytes() for _, logits in completions(model, device)})


def test_more_than_one_result_outside_the_mode_on_the_cpu():
    """The experiment can fail: without the mode the logits differ, if not yet the tokens."""
    assert distinct_logits(tiny_llama("cpu", torch.float32, "sdpa"), "cpu") > 1


@pytest.mark.gpu
def test_more_than_one_result_outside_the_mode_on_cuda():
    """At this width cuBLAS splits k for few rows, so the logits differ from batch to batch."""
    model = llama("cuda", torch.bfloat16, 4096, 32, num_key_value_heads=8, intermediate_size=14336)
    assert distinct_logits(model, "cuda") > 1
    with set_batch_invariant_mode():
        assert distinct_logits(model, "cuda") == 1


class _OperatorRecorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.add(operator)
        return operator(*args, **(kwargs or {}))


# GEMMs, reductions and normalisations that models reach, but whose results cannot depend on the batch, and why:
HARMLESS = {
    "cumsum",  # of integers, positions
    "sum",  # of integers
    "argmax",  # exact
    "max",
    "all",
    "any",
    "_safe_softmax",  # made of _softmax
}
WORDS = ("mm", "mv", "dot", "matmul", "linear", "softmax", "mean", "norm", "sum", "attention", "einsum", "var", "conv")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "Mixtral"])
def test_patches_cover_what_models_reach(family, attention):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        attn_implementation=attention,
        experts_implementation="eager",  # the others reach _grouped_mm, for which the mode promises nothing
    )
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with set_batch_invariant_mode(), _OperatorRecorder() as reached:
        decode(model, torch.randint(1, VOCABULARY, (2, PROMPT)), new=2)  # a step of prefill and one of decode
    patched = {*PATCHES, *BMM_PATCHES, *itertools.chain(*PATCHES_BY_KEY.values())}
    names = {str(operator).removeprefix("aten.").removesuffix(".default") for operator in reached.operators}
    of_interest = {n for n in names if any(w in n for w in WORDS) and n.split(".")[0] not in HARMLESS}
    assert of_interest and of_interest <= patched


def test_inductor_calls_what_is_patched():
    """Compiled code never calls `out` overloads."""
    fallbacks = {*FALLBACK_OPERATORS, *BMM_FALLBACK_OPERATORS}
    assert fallbacks == {name for name in (*PATCHES, *BMM_PATCHES) if not name.endswith("out")}

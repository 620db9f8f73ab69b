"""What an engine does around the model in a decode step: the inputs of the batch, and its next tokens if greedy.

Each is one launch here. An engine has several small kernels for each, and the host takes longer to launch one of them
than the GPU to run it: with a small model, the host is what a step waits for. docs/contributing/decisions.md has times.

Each request of a batch has one new token, and a row in tensors of state that outlive the step, at its state index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.operators import CPP_TYPES
from jitnorm.core.targets import cuda_target
from jitnorm.integrations.engine_plugins import EngineKernelSpec
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target

LOGIT_DTYPES = tuple(CPP_TYPES)


def inputs_spec(target: Target) -> KernelSpec:
    """Return the kernel of `DecodeInputs`."""
    return _spec("decode_inputs", "decode_inputs", "DecodeInputsKernel", target)


def sampling_spec(dtype: torch.dtype, target: Target) -> KernelSpec:
    """Return the kernel of `GreedySampling`."""
    family = "greedy_sampling"
    return _spec(family, f"{family}_{DTYPE_NAMES[dtype]}", f"GreedySamplingKernel<{CPP_TYPES[dtype]}>", target)


def _spec(family: str, name: str, kernel: str, target: Target) -> KernelSpec:
    return EngineKernelSpec(
        op=family,
        family=family,
        folder="decode_step",
        binding=family,
        name=name,
        kernel=kernel,
        target=target,
        warmup="",
    )


class DecodeInputs:
    """Write the inputs of a decode step.

    Args:
        device: a CUDA device with an index.

    Raises:
        RuntimeError: there is no compiler, or the build failed.
    """

    def __init__(self, device: torch.device) -> None:
        module: Any = load(inputs_spec(cuda_target(device.index)))
        self._function: Callable[..., int] = module.decode_inputs

    def __call__(
        self,
        state_indices: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        num_blocks: torch.Tensor,
        state_tables: torch.Tensor,
        batch_tables: torch.Tensor,
        table_strides: torch.Tensor,
        block_sizes: torch.Tensor,
        state_indices_out: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        slots: torch.Tensor,
        num_padded_requests: int,
    ) -> bool:
        """Write the inputs of requests, or nothing.

        Attention layers with caches of one kind are a group, which has block tables of its own. All tensors are on the
        device, or host memory that it reads, and the elements of their last dimension are adjacent.

        Args:
            state_indices: int32 `[requests]`.
            num_computed_tokens: int32 `[states]`: the tokens in the cache.
            last_tokens: int64 `[states]`: those whose keys and values the step computes.
            num_blocks: int32 `[groups, states]`: of the cache.
            state_tables: int64 or uint64 `[groups]`: addresses of the block tables of all states, int32
                `[states, table_strides[group]]`.
            batch_tables: likewise, of those of the batch, `[num_padded_requests, table_strides[group]]`. Written: the
                blocks of each request, nothing beyond them, and zeros for requests that pad the batch.
            table_strides: int64 `[groups]`.
            block_sizes: int32 `[groups]`: tokens.
            state_indices_out: int32 `[requests]`, written: a copy on the device.
            input_ids: int32 `[requests]` or more, written: the last tokens.
            positions: int64 `[requests]` or more, written: those of the last tokens.
            seq_lens: int32 `[max_requests]`, written: the lengths with the last tokens, then zeros.
            query_start_loc: int32 `[max_requests + 1]`, written: 0, 1, 2 to the number of requests, and again that.
            slots: int64 `[groups, max_tokens]`, written: where the cache has the keys and values of the last
                tokens, then -1.
            num_padded_requests: of the batch, from the number of requests to max_requests.

        Returns:
            Whether the kernel takes these arguments.

        Raises:
            RuntimeError: the launch failed.
        """
        return not self._function(
            *(state_indices, num_computed_tokens, last_tokens, num_blocks, state_tables, batch_tables),
            *(table_strides, block_sizes, state_indices_out, input_ids, positions, seq_lens, query_start_loc),
            *(slots, num_padded_requests),
        )


class GreedySampling:
    """Choose the token with the largest logit of each request, and add it to the request's state.

    Calls share counters, so no two of them may run at the same time.

    Args:
        dtype: of the logits; one of LOGIT_DTYPES.
        device: a CUDA device with an index.
        max_requests: of a call.

    Raises:
        RuntimeError: there is no compiler, or the build failed.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, max_requests: int) -> None:
        module: Any = load(sampling_spec(dtype, cuda_target(device.index)))
        self._function: Callable[..., int] = module.greedy_sampling
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._best = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self._finished = torch.zeros(max_requests, dtype=torch.int32, device=device)

    def __call__(
        self,
        logits: torch.Tensor | None,
        state_indices: torch.Tensor,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        num_tokens: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        all_tokens: torch.Tensor,
        token_counts: torch.Tensor,
    ) -> bool:
        """Write the next tokens and the state of the requests, or nothing.

        Of equal logits the first is the largest; NaN is less than any number. All tensors are on the device, or host
        memory that it reads, and the elements of their last dimension are adjacent.

        Args:
            logits: `[requests, vocab_size]`. None for given tokens.
            state_indices: int32 `[requests]`, all different.
            tokens: int64 `[requests]`, written, or read if there are no logits.
            last_tokens: int64 `[states]`, written at the state indices, like the others: the token.
            num_tokens: int32 `[states]`, incremented: the tokens of a request, with those of its prompt.
            num_computed_tokens: int32 `[states]`, incremented: the tokens in the cache.
            all_tokens: int32 `[states, max_length]`, written: the token follows the others, if there is a place.
            token_counts: int32 `[states, vocab_size]` or wider: that of the token is incremented.

        Returns:
            Whether the kernel takes these arguments.

        Raises:
            RuntimeError: the launch failed.
        """
        return not self._function(
            *(logits, state_indices, tokens, last_tokens, num_tokens, num_computed_tokens, all_tokens),
            *(token_counts, self._best, self._finished, self._num_sms),
        )

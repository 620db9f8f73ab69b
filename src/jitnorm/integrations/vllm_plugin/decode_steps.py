"""What vLLM's host does before and after the model in a decode step, in fewer launches.

vLLM's model runner launches about ten small kernels to prepare a step and to sample from its logits, most of them by
Triton. Here a step whose requests have one new token each has its inputs in one launch. If all sample greedily, their
tokens and what they change are another; otherwise vLLM chooses the tokens. All other steps are vLLM's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm import envs

from jitnorm.core.targets import cuda_target
from jitnorm.integrations.decode_steps import LOGIT_DTYPES, DecodeInputs, GreedySampling, inputs_spec, sampling_spec
from jitnorm.integrations.engine_plugins import build_and_load, reason_to_skip
from jitnorm.integrations.vllm_plugin import compatibility, decode_attention
from jitnorm.integrations.vllm_plugin.report import Report

_ATTRIBUTE = "jitnorm_decode_steps"  # of a model


def install(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Let vLLM's model runner call the DecodeSteps of its model, where it has one.

    Args:
        set_attribute: Sets an attribute of a class.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    for name in ("add_requests", "prepare_inputs", "prepare_attn", "sample", "postprocess_sampled"):
        set_attribute(GPUModelRunner, name, _with_fast_path(getattr(GPUModelRunner, name), getattr(DecodeSteps, name)))


def _with_fast_path(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of the model runner that is `original`, unless `method` returns something."""

    @functools.wraps(original)
    def call(runner: Any, *arguments: Any, **keywords: Any) -> Any:
        steps = getattr(runner.model, _ATTRIBUTE, None)
        if steps is not None and not keywords:
            result = method(steps, runner, *arguments)
            if result is not None:
                return result[0]
        return original(runner, *arguments, **keywords)

    return call


def replace(model: torch.nn.Module, config: Any, report: Report) -> None:
    """Give a model its DecodeSteps, where they do what vLLM's runner does.

    Args:
        model: A loaded model of vLLM on a CUDA device.
        config: vLLM's configuration.
        report: Gets a note of what was replaced, or why it was left.
    """
    reason = reason_to_skip("decode_steps") or compatibility.changed("decode steps") or _reason_of(config)
    dtype = config.model_config.head_dtype
    if not reason and dtype not in LOGIT_DTYPES:
        reason = f"the logits are {dtype}"
    device = torch.empty(0, device=config.device_config.device).device  # with the worker's index
    if not reason:
        target = cuda_target(device.index)
        reason = next(iter(build_and_load([inputs_spec(target), sampling_spec(dtype, target)]).values()), None)
    if reason:
        report.notes.append(f"left the inputs and the tokens of decode steps: {reason}")
        return
    setattr(model, _ATTRIBUTE, DecodeSteps(dtype, device))
    report.notes.append("replaced the inputs and the tokens of decode steps")


def _reason_of(config: Any) -> str | None:
    if not config.use_v2_model_runner:
        return "vLLM uses the first version of its model runner"
    if config.model_config.runner_type != "generate":
        return "the model generates no tokens"
    if config.speculative_config is not None:
        return "in speculative decoding a request has several new tokens"
    if config.model_config.rswa_window is not None:
        return "its attention depends on the lengths of prompts"
    if envs.VLLM_MOE_SKIP_PADDING:
        return "VLLM_MOE_SKIP_PADDING is set, for which vLLM marks the rows that pad a batch"
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "with pipeline parallelism only the last rank samples"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism divides the tokens of a request"
    return None


class DecodeSteps:
    """The decode steps of one model. The methods have the names of those of vLLM's runner that they replace.

    A method returns what it returns there, in a tuple, or None for a step that is left to vLLM.

    Args:
        dtype: of the logits.
        device: of the model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._is_ready = False
        self._batch: Any = None  # the InputBatch of the step
        self._sampled: torch.Tensor | None = None  # its tokens, which are in the requests' state

    def _allocate(self, runner: Any) -> None:
        """Allocate what steps share, and let vLLM skip FlashAttention's scheduler metadata.

        This is not done when the model is loaded, because vLLM discards what is allocated then while it sleeps.
        """
        from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool
        from vllm.v1.worker.gpu.input_batch import InputBatch
        from vllm.v1.worker.gpu.sample.output import SamplerOutput
        from vllm.v1.worker.gpu.sample.sampler import Sampler

        self._input_batch_class, self._sampler_output_class = InputBatch, SamplerOutput
        self._sampler_class = Sampler
        self._views_of_sizes: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}
        count = runner.max_num_reqs
        self._write_inputs = DecodeInputs(self._device)
        self._greedy_sampling = GreedySampling(self._dtype, self._device, count)
        self._state_indices = UvaBufferPool(count, torch.int32)  # as many buffers as there are steps at a time
        self._arange = np.arange(count + 1, dtype=np.int32)
        self._arange_on_device = torch.arange(count + 1, dtype=torch.int32, device=self._device)
        self._logits_indices = torch.arange(count, device=self._device)
        self._zeros = torch.zeros(count, dtype=torch.int32, device=self._device)
        self._ones = torch.ones(count, dtype=torch.int32, device=self._device)
        layers = runner.vllm_config.compilation_config.static_forward_context
        for group in itertools.chain.from_iterable(runner.attn_groups):
            of_group = [layers[name] for name in group.layer_names]
            decode_attention.skip_scheduler_metadata(group.get_metadata_builder(0), of_group)
        self._is_ready = True

    def add_requests(self, runner: Any, scheduler_output: Any) -> tuple[None] | None:
        """Skip a copy of the sampling parameters to the device: without new requests they are there."""
        return None if scheduler_output.scheduled_new_reqs else (None,)

    def prepare_inputs(self, runner: Any, scheduler_output: Any, batch_desc: Any) -> tuple[Any] | None:
        """Write the inputs of a step, and those of its attention, if each request has one token and no prompt left."""
        self._batch = self._sampled = None
        tokens = scheduler_output.num_scheduled_tokens
        count = len(tokens)
        if (
            scheduler_output.total_num_scheduled_tokens != count
            or max(tokens.values()) != 1
            or scheduler_output.scheduled_spec_decode_tokens
            or runner.decode_query_len != 1
        ):
            return None
        states, buffers, tables = runner.req_states, runner.input_buffers, runner.block_tables
        req_ids = list(tokens)
        indices = np.fromiter(map(states.req_id_to_index.__getitem__, req_ids), dtype=np.int32, count=count)
        prefill_lens, computed_prefill = states.prefill_len.np[indices], states.num_computed_prefill_tokens[indices]
        is_prefilling = computed_prefill < prefill_lens
        if is_prefilling.any():
            return None
        if not self._is_ready:
            self._allocate(runner)
        padded = batch_desc.num_reqs or count
        indices_on_device = torch.empty(count, dtype=torch.int32, device=self._device)
        if not self._write_inputs(
            self._state_indices.copy_to_uva(indices),
            states.num_computed_tokens.gpu,
            states.last_sampled_tokens.view(-1),
            tables.num_blocks.gpu,
            tables.block_table_ptrs,
            tables.input_block_table_ptrs,
            tables.block_table_strides,
            tables.block_sizes_tensor,
            indices_on_device,
            buffers.input_ids,
            buffers.positions,
            buffers.seq_lens,
            buffers.query_start_loc,
            tables.slot_mappings,
            padded,
        ):
            return None
        computed = states.num_computed_tokens_np[indices]
        lengths = np.zeros(padded, dtype=np.int32)
        np.add(computed, 1, out=lengths[:count])
        self._batch = self._input_batch_class(
            req_ids=req_ids,
            num_reqs=count,
            num_reqs_after_padding=padded,
            idx_mapping=indices_on_device,
            idx_mapping_np=indices,
            expanded_idx_mapping=indices_on_device,
            num_scheduled_tokens=np.ones(count, dtype=np.int32),
            num_tokens=count,
            num_tokens_after_padding=batch_desc.num_tokens,
            num_draft_tokens=0,
            num_draft_tokens_per_req=None,
            query_start_loc_np=np.minimum(self._arange[: padded + 1], count),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=computed,
            prefill_len_np=prefill_lens,
            num_computed_prefill_tokens_np=computed_prefill,
            is_prefilling_np=is_prefilling,
            max_seq_len_np=None,
            cu_num_logits_np=self._arange[: count + 1],
            has_structured_output_reqs=scheduler_output.has_structured_output_requests,
            prompt_lens=None,
            **self._views(runner, count, padded, batch_desc.num_tokens),
        )
        return (self._batch,)

    def _views(self, runner: Any, count: int, padded: int, num_tokens: int) -> dict[str, torch.Tensor]:
        """Return the fields of a batch that are views of what all steps share. Each size has its own, made once."""
        if (key := (count, padded, num_tokens)) not in self._views_of_sizes:
            buffers = runner.input_buffers
            self._views_of_sizes[key] = {
                "expanded_local_pos": self._zeros[:count],
                "query_start_loc": buffers.query_start_loc[: padded + 1],
                "seq_lens": buffers.seq_lens[:padded],
                "input_ids": buffers.input_ids[:num_tokens],
                "positions": buffers.positions[:num_tokens],
                "is_padding": buffers.is_padding[:num_tokens],
                "logits_indices": self._logits_indices[:count],
                "cu_num_logits": self._arange_on_device[: count + 1],
            }
        return self._views_of_sizes[key]

    def prepare_attn(self, runner: Any, input_batch: Any) -> tuple[Any] | None:
        """Return the block tables and the slots of the cache, which `prepare_inputs` has written."""
        if input_batch is not self._batch:
            return None
        tables = runner.block_tables
        block_tables = tuple(table[: input_batch.num_reqs_after_padding] for table in tables.input_block_tables)
        return ((block_tables, tables.slot_mappings[:, : input_batch.num_tokens_after_padding]),)

    def sample(
        self, runner: Any, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[Any] | None:
        """Compute the logits and the tokens: by one launch if all requests sample greedily, or else by vLLM's."""
        sampler, indices = runner.sampler, input_batch.idx_mapping_np
        if (
            input_batch is not self._batch
            or grammar_output is not None
            or type(sampler) is not self._sampler_class
            or sampler.compute_nans
            or sampler.returns_logprobs(indices)
        ):
            return None
        count = input_batch.num_reqs
        logits = runner.model.compute_logits(hidden_states[:count])
        if _is_greedy(sampler, indices):
            tokens = torch.empty(count, dtype=torch.int64, device=self._device)
            if self._add_tokens(runner, logits, input_batch.idx_mapping, tokens):
                self._sampled = tokens.view(-1, 1)
        sampled = self._sampled
        if sampled is None:
            positions, input_ids = input_batch.positions[:count], input_batch.input_ids[:count]
            rest = (input_batch.expanded_idx_mapping, indices, positions, input_ids, input_batch.expanded_local_pos)
            sampled = sampler.sample(logits, *rest)[0].view(-1, 1)
        num_sampled, num_rejected = self._ones[:count], self._zeros[:count]
        output = self._sampler_output_class(sampled, None, None, num_sampled, num_rejected)
        return ((output, num_sampled, num_rejected),)

    def postprocess_sampled(
        self,
        runner: Any,
        idx_mapping: torch.Tensor,
        sampled_tokens: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        query_start_loc: torch.Tensor | None = None,
    ) -> tuple[None] | None:
        """Add the tokens to the state of the requests, unless `sample` has, and update that of the model."""
        if self._batch is None or idx_mapping is not self._batch.idx_mapping:
            return None
        # In a batch of `prepare_inputs` each request has one new token, and none is rejected.
        if sampled_tokens is not self._sampled and not self._add_tokens(
            runner, None, idx_mapping, sampled_tokens.view(-1)
        ):
            return None
        self._batch = self._sampled = None
        runner.model_state.postprocess_state(idx_mapping, num_sampled, runner.req_states.num_computed_tokens.gpu)
        return (None,)

    def _add_tokens(
        self, runner: Any, logits: torch.Tensor | None, state_indices: torch.Tensor, tokens: torch.Tensor
    ) -> bool:
        states = runner.req_states
        return self._greedy_sampling(
            logits,
            state_indices,
            tokens,
            states.last_sampled_tokens.view(-1),
            states.total_len.gpu,
            states.num_computed_tokens.gpu,
            states.all_token_ids.gpu,
            runner.sampler.penalties_state.output_bin_counts,
        )


def _is_greedy(sampler: Any, indices: np.ndarray) -> bool:
    """Return whether the next token of each request is the one with the largest logit."""
    return (
        not sampler.sampling_states.temperature.np[indices].any()
        and not sampler.logit_bias_state.use_logit_bias[indices].any()
        and not sampler.penalties_state.use_penalty[indices].any()
        and not sampler.bad_words_state.num_bad_words.np[indices].any()
    )

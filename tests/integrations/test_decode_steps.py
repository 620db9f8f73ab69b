"""The inputs and the greedy tokens of decode steps, against plain Python and torch in float64."""

from __future__ import annotations

import pytest
import torch

from jitnorm.integrations.decode_steps import LOGIT_DTYPES, DecodeInputs, GreedySampling, inputs_spec, sampling_spec
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target

POISON = -77
STATES, MAX_REQUESTS = 12, 10
MAX_TOKENS = 5000  # more than the threads that write what follows the requests


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["7.5", "9.0a", "12.0a"])  # the oldest, the first with PDL, and the newest
def test_compiles(arch):
    target = Target.cuda(arch)
    for spec in (inputs_spec(target), *(sampling_spec(dtype, target) for dtype in LOGIT_DTYPES)):
        assert build(spec).path.exists()


class State:
    """The state of STATES requests and the tensors of a batch, which are poisoned."""

    def __init__(self, block_sizes):
        groups = len(block_sizes)
        source = torch.Generator().manual_seed(groups)
        self.computed = torch.randint(1, 400, (STATES,), dtype=torch.int32, generator=source)
        self.computed[:3] = torch.tensor([15, 16, 17])  # the end of a block of 16, and around
        self.last = torch.randint(0, 1 << 17, (STATES,), generator=source)
        self.block_sizes = torch.tensor(block_sizes, dtype=torch.int32)
        self.num_blocks = torch.stack([self.computed // size + 1 + i % 2 for i, size in enumerate(block_sizes)])
        self.widths = [int(of_group.max()) + 5 for of_group in self.num_blocks]
        self.tables = [torch.randint(0, 10**6, (STATES, n), dtype=torch.int32, generator=source) for n in self.widths]

        def poisoned(*shape, dtype=torch.int32):
            return torch.full(shape, POISON, dtype=dtype, device="cuda")

        self.batch_tables = [poisoned(MAX_REQUESTS, width) for width in self.widths]
        self.input_ids, self.positions = poisoned(MAX_TOKENS), poisoned(MAX_TOKENS, dtype=torch.int64)
        self.seq_lens, self.starts = poisoned(MAX_REQUESTS), poisoned(MAX_REQUESTS + 1)
        self.slots = poisoned(groups, MAX_TOKENS + 3, dtype=torch.int64)[:, :MAX_TOKENS]
        self.on_device = [table.cuda() for table in self.tables]

    def arguments(self, indices, padded):
        def addresses(tensors):
            return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64, device="cuda")

        return {
            "state_indices": torch.tensor(indices, dtype=torch.int32).cuda(),
            "num_computed_tokens": self.computed.cuda(),
            "last_tokens": self.last.cuda(),
            "num_blocks": torch.nn.functional.pad(self.num_blocks.cuda(), (0, 2))[:, :-2],
            "state_tables": addresses(self.on_device),
            "batch_tables": addresses(self.batch_tables),
            "table_strides": torch.tensor(self.widths).cuda(),
            "block_sizes": self.block_sizes.cuda(),
            "state_indices_out": torch.full((len(indices),), POISON, dtype=torch.int32, device="cuda"),
            "input_ids": self.input_ids,
            "positions": self.positions,
            "seq_lens": self.seq_lens,
            "query_start_loc": self.starts,
            "slots": self.slots,
            "num_padded_requests": padded,
        }


@pytest.mark.gpu
@pytest.mark.parametrize("block_sizes", [[16], [16, 48, 1]], ids=str)  # one group, and several as hybrid models have
@pytest.mark.parametrize(("count", "padded"), [(1, 1), (3, 4), (7, 10), (10, 10)])
def test_the_inputs_of_a_step(count, padded, block_sizes):
    state = State(block_sizes)
    indices = torch.randperm(STATES)[:count].tolist()
    given = state.arguments(indices, padded)
    assert DecodeInputs(torch.device("cuda", 0))(**given)
    assert given["state_indices_out"].tolist() == indices
    computed = [int(state.computed[index]) for index in indices]
    rest = [POISON] * (MAX_TOKENS - count)
    assert state.input_ids.tolist() == [int(state.last[index]) for index in indices] + rest
    assert state.positions.tolist() == computed + rest
    assert state.seq_lens.tolist() == [length + 1 for length in computed] + [0] * (MAX_REQUESTS - count)
    assert state.starts.tolist() == [min(i, count) for i in range(MAX_REQUESTS + 1)]
    for group, size in enumerate(block_sizes):
        table, found = state.tables[group], state.batch_tables[group].tolist()
        expected = [
            int(table[index, length // size]) * size + length % size
            for index, length in zip(indices, computed, strict=True)
        ]
        assert state.slots[group].tolist() == expected + [-1] * (MAX_TOKENS - count)
        for i in range(MAX_REQUESTS):
            blocks = int(state.num_blocks[group, indices[i]]) if i < count else 0
            mine = table[indices[i], :blocks].tolist() if i < count else []
            after = 0 if count <= i < padded else POISON
            assert found[i] == mine + [after] * (state.widths[group] - blocks)


@pytest.mark.gpu
def test_inputs_that_the_kernel_does_not_take():
    state, write = State([16, 32]), DecodeInputs(torch.device("cuda", 0))
    good = state.arguments([4, 1, 7], 4)
    bad = [
        {"state_indices": good["state_indices"].long()},
        {"state_indices": good["state_indices"].cpu()},
        {"state_indices": good["state_indices"][:0]},
        {"state_indices": good["state_indices"][:0], "state_indices_out": good["state_indices_out"][:0]},
        {"state_indices_out": good["state_indices_out"][:2]},
        {"state_indices_out": good["state_indices_out"].long()},
        {"num_computed_tokens": good["num_computed_tokens"].long()},
        {"num_computed_tokens": good["num_computed_tokens"][:-1]},
        {"last_tokens": good["last_tokens"].int()},
        {"last_tokens": good["last_tokens"][:-1]},
        {"num_blocks": good["num_blocks"][:1]},
        {"num_blocks": good["num_blocks"][:, :-1]},
        {"num_blocks": good["num_blocks"].t().contiguous().t()},
        {"state_tables": good["state_tables"][:1]},
        {"state_tables": good["state_tables"].int()},
        {"batch_tables": good["batch_tables"][:1]},
        {"batch_tables": good["batch_tables"].int()},
        {"table_strides": good["table_strides"].int()},
        {"table_strides": good["table_strides"][:1]},
        {"block_sizes": good["block_sizes"].long()},
        {"block_sizes": good["block_sizes"][:1]},
        {"input_ids": state.input_ids[:2]},
        {"input_ids": state.input_ids.long()},
        {"positions": state.positions.float()},
        {"positions": state.positions[:2]},
        {"seq_lens": state.seq_lens.long()},
        {"query_start_loc": state.starts[:-1]},
        {"query_start_loc": state.starts.long()},
        {"slots": state.slots[:1]},
        {"slots": state.slots[:1].expand(2, -1)},
        {"slots": state.slots.int()},
        {"slots": state.slots[:, :3]},
        {"num_padded_requests": 2},
        {"num_padded_requests": MAX_REQUESTS + 1},
    ]
    for change in bad:
        assert not write(**good | change), change
    for tensor in (state.input_ids, state.positions, state.seq_lens, state.starts, state.slots):
        assert (tensor == POISON).all()
    assert write(**good)


class Requests:
    """The state of requests that sample, as tensors on the GPU."""

    def __init__(self, count, vocab_size, max_length=50):
        states = count + 3
        self.indices = torch.randperm(states)[:count].int().cuda()
        self.tokens = torch.full((count,), POISON, device="cuda")
        self.last = torch.full((states,), POISON, device="cuda")
        self.num_tokens = torch.randint(0, max_length, (states,), dtype=torch.int32, device="cuda")
        self.computed = torch.randint(0, max_length, (states,), dtype=torch.int32, device="cuda")
        wide = torch.full((states, max_length + 5), POISON, dtype=torch.int32, device="cuda")
        self.all_tokens = wide[:, :max_length]
        self.counts = torch.randint(0, 5, (states, vocab_size + 2), dtype=torch.int32, device="cuda")

    def tensors(self):
        return (self.indices, self.tokens, self.last, self.num_tokens, self.computed, self.all_tokens, self.counts)

    def expect(self, tokens):
        """Return the tensors after a step."""
        result = [tensor.clone() for tensor in self.tensors()]
        _, chosen, last, num_tokens, computed, all_tokens, counts = result
        for i, (index, token) in enumerate(zip(self.indices.tolist(), tokens.tolist(), strict=True)):
            chosen[i] = last[index] = token
            if 0 <= num_tokens[index] < all_tokens.shape[1]:
                all_tokens[index, num_tokens[index]] = token
            num_tokens[index] += 1
            computed[index] += 1
            if 0 <= token < counts.shape[1]:
                counts[index, token] += 1
        return result


def first_largest(logits):
    """Return the first index of the largest number of each row: torch.argmax promises no order.

    On the CPU: racecheck reports hazards in torch's reductions on the GPU.
    """
    numbers = logits.cpu().double().nan_to_num(nan=-float("inf"), posinf=float("inf"), neginf=-float("inf"))
    return (numbers == numbers.amax(dim=1, keepdim=True)).int().argmax(dim=1)


def check(sample, logits, requests):
    expected = requests.expect(first_largest(logits))
    assert sample(logits, *requests.tensors())
    for found, wanted in zip(requests.tensors(), expected, strict=True):
        assert torch.equal(found, wanted)


# One logit, part of a load, of a block, whole blocks and a rest, and the sizes of Llama 3 and Qwen3, which are several
# blocks for few requests and one for many.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize(
    ("count", "vocab_size"), [(1, 1), (3, 7), (2, 1000), (5, 32769), (1, 151936), (17, 128256), (300, 50264)]
)
def test_greedy_tokens(count, vocab_size, dtype):
    sample = GreedySampling(dtype, torch.device("cuda", 0), count + 1)
    wide = torch.randn(count, vocab_size + 24, device="cuda").to(dtype)
    requests = Requests(count, vocab_size)
    for first in (0, 8, 3):  # aligned, a slice that is, and one that is not; the state carries on
        check(sample, wide[:, first : first + vocab_size], requests)
    assert not sample._best.any() and not sample._finished.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_equal_logits_infinities_and_nan(dtype):
    inf, nan, size = float("inf"), float("nan"), 70001
    logits = torch.full((8, size), -3.0, device="cuda")  # the first of equal ones, over several blocks
    logits[1, 100] = logits[1, 60000] = 2.0
    logits[2] = -inf
    logits[3], logits[3, 17] = -inf, -65504.0
    logits[4, 50000], logits[4, 60000] = inf, inf
    logits[5, ::2] = nan
    logits[6] = nan
    logits[7], logits[7, 9], logits[7, 30000] = -1.0, -0.0, 0.0
    sample = GreedySampling(dtype, torch.device("cuda", 0), 8)
    requests = Requests(8, size)
    logits = logits.to(dtype)
    expected = [0, 100, 0, 17, 50000, 1, 0, 9]
    check(sample, logits[:6], slice_of(requests, slice(0, 6)))
    assert requests.tokens[:6].tolist() == expected[:6]
    assert sample(logits[6:], *slice_of(requests, slice(6, 8)).tensors())
    assert requests.tokens.tolist() == expected


def slice_of(requests, rows):
    part = object.__new__(Requests)
    part.__dict__ = dict(requests.__dict__)
    part.indices, part.tokens = requests.indices[rows], requests.tokens[rows]
    return part


@pytest.mark.gpu
def test_a_full_row_of_tokens_is_not_exceeded():
    requests = Requests(4, 100, max_length=6)
    requests.num_tokens[requests.indices.long()] = torch.tensor([5, 6, 7, -1], dtype=torch.int32, device="cuda")
    check(GreedySampling(torch.float32, torch.device("cuda", 0), 4), torch.randn(4, 100, device="cuda"), requests)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 5, 300])
def test_given_tokens(count):
    sample, requests = GreedySampling(torch.bfloat16, torch.device("cuda", 0), count), Requests(count, 1000)
    tokens = torch.randint(0, 1000, (count,), device="cuda")
    tokens[1::3], tokens[2::3] = -1, 1002  # counted nowhere
    requests.tokens.copy_(tokens)
    expected = requests.expect(tokens)
    assert sample(None, *requests.tensors())
    for found, wanted in zip(requests.tensors(), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_steps_in_a_graph():
    """Counters are zero again after each step, whatever the number of blocks."""
    sample, requests = GreedySampling(torch.bfloat16, torch.device("cuda", 0), 2), Requests(2, 151936)
    logits = torch.randn(2, 151936, device="cuda").bfloat16()
    check(sample, logits, requests)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert sample(logits, *requests.tensors())
    for _ in range(5):
        logits.copy_(torch.randn(2, 151936, device="cuda"))
        expected = requests.expect(first_largest(logits))
        graph.replay()
        for found, wanted in zip(requests.tensors(), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_what_sampling_does_not_take():
    requests = Requests(3, 100)
    sample, logits = GreedySampling(torch.bfloat16, torch.device("cuda", 0), 3), torch.randn(3, 100, device="cuda")
    good = dict(
        zip(
            ("logits", "indices", "tokens", "last", "num_tokens", "computed", "all_tokens", "counts"),
            (logits.bfloat16(), *requests.tensors()),
            strict=True,
        )
    )
    before = [tensor.clone() for tensor in requests.tensors()]
    bad = [
        {"logits": logits},
        {"logits": good["logits"][:2]},
        {"logits": good["logits"].t().contiguous().t()},
        {"logits": good["logits"].cpu()},
        {"logits": good["logits"][0]},
        {"logits": good["logits"][:, :, None]},
        {"logits": torch.randn(3, 200, device="cuda").bfloat16()[:, ::2]},
        {"logits": good["logits"][:, :0]},
        {"logits": None, "tokens": requests.tokens[:2]},
        {"logits": None, "indices": requests.indices[:0], "tokens": requests.tokens[:0]},
        {"indices": requests.indices.long()},
        {"tokens": requests.tokens[:2]},
        {"tokens": requests.tokens.int()},
        {"last": requests.last.int()},
        {"last": requests.last[:-1]},
        {"num_tokens": requests.num_tokens.long()},
        {"num_tokens": requests.num_tokens[:-1]},
        {"computed": requests.computed.long()},
        {"computed": requests.computed[:-1]},
        {"all_tokens": requests.all_tokens[:-1]},
        {"all_tokens": requests.all_tokens.long()},
        {"counts": requests.counts[:, :99]},
        {"counts": requests.counts[:-1]},
        {"counts": requests.counts.long()},
    ]
    for change in bad:
        assert not sample(*(good | change).values()), change
    small = GreedySampling(torch.bfloat16, torch.device("cuda", 0), 2)
    assert not small(*good.values())
    for found, wanted in zip(requests.tensors(), before, strict=True):
        assert torch.equal(found, wanted)
    assert sample(*good.values())


@pytest.mark.gpu
def test_steps_follow_each_other_without_a_pause():
    """Each kernel waits for the one before, though it may start earlier (PDL)."""
    state, count, vocab_size, steps = State([16]), 4, 32000, 30
    state.computed[:] = torch.arange(STATES, dtype=torch.int32)
    state.num_blocks[:] = state.tables[0].shape[1]
    indices = torch.tensor([3, 11, 0, 6])
    given = state.arguments(indices.tolist(), count)
    requests = Requests(count, vocab_size)
    requests.indices = given["state_indices_out"]
    requests.last, requests.computed = given["last_tokens"], given["num_computed_tokens"]
    requests.num_tokens = torch.zeros(STATES, dtype=torch.int32, device="cuda")
    requests.all_tokens = torch.full((STATES, steps), POISON, dtype=torch.int32, device="cuda")
    requests.counts = torch.zeros(STATES, vocab_size, dtype=torch.int32, device="cuda")
    logits = torch.randn(steps, count, vocab_size, device="cuda").bfloat16()
    positions = torch.full((steps, MAX_TOKENS), POISON, dtype=torch.int64, device="cuda")
    input_ids = torch.full((steps, MAX_TOKENS), POISON, dtype=torch.int32, device="cuda")
    write, sample = (
        DecodeInputs(torch.device("cuda", 0)),
        GreedySampling(torch.bfloat16, torch.device("cuda", 0), count),
    )
    torch.cuda.synchronize()
    for step in range(steps):
        assert write(**given | {"positions": positions[step], "input_ids": input_ids[step]})
        assert sample(logits[step], *requests.tensors())
    tokens = torch.stack([first_largest(of_step) for of_step in logits]).int()
    assert torch.equal(requests.all_tokens[indices].cpu(), tokens.t())
    assert torch.equal(positions[:, :count].cpu(), state.computed[indices].long() + torch.arange(steps)[:, None])
    assert torch.equal(input_ids[1:, :count].cpu(), tokens[:-1])
    assert input_ids[0, :count].tolist() == state.last[indices].tolist()

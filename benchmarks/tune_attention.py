"""Time schedules of the Triton attention kernel for few queries on this GPU, in microseconds, and torch's attention.

    python benchmarks/tune_attention.py [--batch 1 16] [--keys 1024] [--heads 32 --kv-heads 8 --head-dim 128]

A star marks the schedule that jitnorm.batch_invariant.attention.schedule.choose_schedule returns. A schedule may depend
on the number of keys, the queries in a group and head_dim; its `run` may depend on the batch, too. To improve
choose_schedule, look for a schedule that is fast in all columns with the same number of keys, with any `run`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from table_output import create_parser, print_table

from jitnorm.batch_invariant.attention.schedule import Schedule, choose_schedule
from jitnorm.batch_invariant.attention.triton_kernels import attend
from jitnorm.benchmark import marker
from jitnorm.benchmark.settings import override_settings

SHAPES = [(1, 1024), (16, 1024), (64, 1024), (1, 16384)]  # batch, keys
BLOCKS = [(32, 2, 4), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 8, 2)]
LEAVES = [(128, 128), (128, 256), (128, 512), (128, 1024), (256, 2048), (512, 512), (512, 1024), (512, 2048)]
SCHEDULES = [Schedule(*leaf, *block) for block in BLOCKS for leaf in LEAVES]

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def call_with(schedule: Schedule) -> Callable[..., torch.Tensor]:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        attend(query, key, value, None, False, query.shape[-1] ** -0.5, out, logsumexp, schedule)
        return out

    return call


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def microseconds(call: Callable[..., torch.Tensor], operands: Operands) -> float:
    return marker.do_bench(call, input_args=operands, replay_iters=3).seconds * 1e6


def format_time(schedule: Schedule, operands: Operands) -> str:
    try:
        return f"{microseconds(call_with(schedule), operands):.1f}"
    except Exception as error:  # such as a schedule that needs more shared memory than there is
        return type(error).__name__[:12]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--keys", type=int, nargs="+")
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    shapes = SHAPES
    if options.batch or options.keys:
        shapes = [(batch, keys) for keys in options.keys or [1024] for batch in options.batch or [1, 16, 64]]
    heads, kv_heads, dim, queries = options.heads, options.kv_heads, options.head_dim, options.queries
    rows: dict[str, list[str]] = {"torch": []} | {f"{tuple(schedule)}": [] for schedule in SCHEDULES}
    with override_settings(seconds=0.0):  # the minimum number of rounds
        for batch, keys in shapes:
            key, value = (marker.create_random(batch, kv_heads, keys, dim) for _ in range(2))
            operands = marker.create_random(batch, heads, queries, dim), key, value
            num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
            chosen = choose_schedule(heads // kv_heads * queries, keys, dim, batch * kv_heads, num_sms)
            rows["torch"].append(f"{microseconds(torch_attention, operands):.1f}")
            for schedule in dict.fromkeys([*SCHEDULES, chosen]):
                text = format_time(schedule, operands) + ("*" if schedule == chosen else "")
                rows.setdefault(f"{tuple(schedule)}", []).append(text)
    columns = ["leaf, split, block, warps, stages", *(f"{b}x{k}" for b, k in shapes)]
    print_table("microseconds by batch x keys", columns, [[name, *row] for name, row in rows.items()], options.format)


if __name__ == "__main__":
    main()

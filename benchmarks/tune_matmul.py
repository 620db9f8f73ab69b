"""Time tiles of the persistent Triton kernel on this GPU, as the time of torch.mm over the tile's.

    python benchmarks/tune_matmul.py [--tokens 1 16] [--model llama qwen] [--check]

A star marks the tile that `choose_tile` of jitnorm.batch_invariant.matmul.triton_kernels returns. Where another tile is
faster by more than the noise, choose_tile, TILES or FIXED_TILE can be improved. --check compares the bits of all tiles
instead: the tile may depend on the number of rows only if they are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_matmul import LLAMA_8B, QWEN3_32B
from table_output import create_parser, print_table

from jitnorm.batch_invariant.matmul.triton_kernels import TILES, Tile, choose_tile, persistent_gemm
from jitnorm.batch_invariant.operands import cancelling_operands, count_differing_elements
from jitnorm.benchmark import marker
from jitnorm.benchmark.settings import override_settings

FEW = (  # for up to 64 rows: tiles that keep many bytes of b in flight
    Tile(16, 64, 128, 4, 11, True),
    Tile(16, 64, 128, 4, 5, True, 2),
    Tile(16, 64, 128, 4, 3, True, 3),
    Tile(16, 64, 256, 4, 5, True),
    Tile(16, 128, 128, 4, 6, True),
    Tile(16, 128, 64, 4, 6, True, 2),
    Tile(16, 128, 64, 4, 3, True, 3),
    Tile(32, 64, 256, 4, 4, True),
    Tile(32, 64, 128, 4, 8, True),
    Tile(32, 64, 128, 4, 4, True, 2),
    Tile(32, 128, 128, 4, 4, True),
    Tile(32, 128, 64, 4, 5, True, 2),
    Tile(64, 64, 256, 4, 3),
    Tile(64, 64, 128, 4, 6, True),
    Tile(64, 64, 128, 4, 6),
    Tile(64, 64, 128, 4, 3, True, 2),
    Tile(64, 64, 128, 4, 3, False, 2),
    Tile(64, 64, 64, 4, 6, True, 2),
    Tile(64, 128, 128, 4, 4),
)
MANY = (
    Tile(64, 64, 128, 4, 6),
    Tile(64, 128, 128, 4, 4),
    Tile(128, 64, 64, 4, 8),
    Tile(128, 128, 64, 4, 6),
    Tile(128, 128, 64, 8, 6),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 4),
)
MODELS = {"llama": LLAMA_8B, "qwen": QWEN3_32B}


def call_with(tile: Tile, num_sms: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        persistent_gemm(x, weight.t(), None, out, True, weight.shape[1], tile, num_sms)
        return out

    return call


def microseconds(call: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> float:
    return marker.do_bench(call, input_args=(x, weight), replay_iters=3).seconds * 1e6


def print_times(num_tokens: int, matrices: list[tuple[int, int]], num_sms: int, output_format: str) -> None:
    tiles = FEW if num_tokens <= 64 else MANY
    columns: dict[tuple[int, int], dict[Tile, float]] = {}
    for n, k in matrices:
        x, weight = marker.create_random(num_tokens, k), marker.create_random(n, k)
        torch_us = microseconds(lambda x, weight: torch.mm(x, weight.t()), x, weight)
        columns[n, k] = {tile: torch_us / microseconds(call_with(tile, num_sms), x, weight) for tile in tiles}
    chosen = {(n, k): choose_tile(num_tokens, n, num_sms) for n, k in matrices}
    rows = [
        [str(tuple(tile)), *(f"{times[tile]:.3f}{'*' if tile == chosen[nk] else ' '}" for nk, times in columns.items())]
        for tile in tiles
    ]
    rows.append(["best", *(f"{max(times.values()):.3f} " for times in columns.values())])
    names = ["tile", *(f"{n}x{k}" for n, k in matrices)]
    print_table(f"{num_tokens} rows: time of torch over the tile's", names, rows, output_format)


def print_differences(num_sms: int, output_format: str) -> None:
    for k in (4096, 14336):
        x, b = cancelling_operands(300, 4096, k, torch.bfloat16, torch.device("cuda"))
        weight = b.t().contiguous()
        results = {tile: call_with(tile, num_sms)(x, weight) for tile in {*FEW, *MANY, *TILES}}
        first = results[TILES[0]]
        different = {tile: int(count_differing_elements(out, first)) for tile, out in results.items()}
        rows = [[str(tuple(tile)), count, first.numel()] for tile, count in different.items()]
        title = f"k={k}: elements whose bits differ from those of {tuple(TILES[0])}"
        print_table(title, ["tile", "different", "elements"], rows, output_format)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    if options.check:
        print_differences(num_sms, options.format)
        return
    matrices = [nk for model in options.model for nk in MODELS[model]]
    with override_settings(seconds=0.0):  # the minimum number of rounds
        for num_tokens in options.tokens:
            print_times(num_tokens, matrices, num_sms, options.format)


if __name__ == "__main__":
    main()

"""Tries tiles of the persistent Triton kernel on this GPU, for each shape and number of rows: time of torch's product
over the tile's. The tile that jitnorm.batch_invariant.matmul.triton_kernels.choose_tile takes has a star.

    python benchmarks/tune_matmul.py [--tokens 1 16] [--model llama qwen] [--check]

Look for rows where another tile is better by more than the noise, and see what choose_tile, TILES or FIXED_TILE would
have to say. --check compares the bits of all tiles instead: tiles may follow the number of rows only if they are the
same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench_matmul import LLAMA_8B, QWEN3_32B

from jitnorm.batch_invariant.matmul.triton_kernels import TILES, Tile, choose_tile, persistent_gemm
from jitnorm.batch_invariant.operands import cancelling_operands, count_differing_elements
from jitnorm.benchmark import marker, settings

FEW = (  # up to 64 rows: what keeps the most bytes of b in flight
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


def by_tile(tile: Tile, processors: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        persistent_gemm(x, weight.t(), None, out, True, weight.shape[1], tile, processors)
        return out

    return call


def microseconds(call: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> float:
    return marker.do_bench(call, input_args=(x, weight), replay_iters=3).seconds * 1e6


def table(num_tokens: int, matrices: list[tuple[int, int]], processors: int) -> None:
    tiles = FEW if num_tokens <= 64 else MANY
    columns: dict[tuple[int, int], dict[Tile, float]] = {}
    for n, k in matrices:
        x, weight = marker.create_random(num_tokens, k), marker.create_random(n, k)
        torch_us = microseconds(lambda x, weight: torch.mm(x, weight.t()), x, weight)
        columns[n, k] = {tile: torch_us / microseconds(by_tile(tile, processors), x, weight) for tile in tiles}
    chosen = {(n, k): choose_tile(num_tokens, n, processors) for n, k in matrices}
    print(f"\n{num_tokens} rows" + " " * 30 + "".join(f"{n}x{k}".rjust(13) for n, k in matrices), flush=True)
    for tile in tiles:
        cells = [f"{column[tile]:.3f}{'*' if tile == chosen[nk] else ' '}" for nk, column in columns.items()]
        print(f"{tuple(tile)!s:38}" + "".join(cell.rjust(13) for cell in cells), flush=True)
    best = [max(column.values()) for column in columns.values()]
    print(f"{'best':38}" + "".join(f"{ratio:.3f} ".rjust(13) for ratio in best), flush=True)


def check(processors: int) -> None:
    for k in (4096, 14336):
        x, b = cancelling_operands(300, 4096, k, torch.bfloat16, torch.device("cuda"))
        weight = b.t().contiguous()
        results = {tile: by_tile(tile, processors)(x, weight) for tile in {*FEW, *MANY, *TILES}}
        first = results[TILES[0]]
        for tile, out in results.items():
            different = int(count_differing_elements(out, first))
            print(f"k={k} {tuple(tile)!s:38} {different} of {out.numel()} elements differ from {tuple(TILES[0])}'s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    if options.check:
        check(processors)
        return
    matrices = [nk for model in options.model for nk in MODELS[model]]
    with settings.using(seconds=0.0):
        for num_tokens in options.tokens:
            table(num_tokens, matrices, processors)


if __name__ == "__main__":
    main()

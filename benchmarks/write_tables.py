"""Write the plots, and the tables of the pages: what is between `<!-- table:NAME -->` and `<!-- /table -->`.

python benchmarks/write_tables.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from jitnorm.benchmark.compare import format_range, summarize_peers
from jitnorm.benchmark.results import COPIES, COPY, BenchResult, Report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md"]  # each table is in one of them
RESULTS = Path(__file__).parent / "results"

# Decode, q/k heads, prefill, and more traffic than fits any cache. The shapes where a peer is faster are among them.
GPU_SHAPES = [
    *((64, 1048576), (128, 64), (128, 4096), (1024, 64), (1024, 131072), (4096, 1), (4096, 64), (4096, 1024)),
    *((4096, 32768), (7168, 16384), (8192, 1), (8192, 16384)),
]
PEERS = {
    "separate": "jitnorm's calls for the parts",
    "sglang": "SGLang JIT",
    "flashinfer": "FlashInfer",
    "fi_cuda": "FlashInfer CUDA",
    "fi_cute": "FlashInfer CuTe",
    "quack": "quack",
    "liger": "Liger",
    "compile": "torch.compile",
    "torch": "torch",
}
GPU_COLUMNS = {COPY: COPY, "jitnorm": "jitnorm"} | PEERS
OPERATORS = (
    *("rmsnorm", "fused_add_rmsnorm", "general_rmsnorm", "general_gemma_rmsnorm", "general_rmsnorm_fp16"),
    *("general_rmsnorm_fp32", "general_fused_add_rmsnorm", "general_fused_add_rmsnorm_round_sum"),
    *("general_rmsnorm_long", "general_gemma_rmsnorm_long", "general_rmsnorm_fp16_long", "general_rmsnorm_fp32_long"),
    *("general_fused_add_rmsnorm_long", "gated_rmsnorm"),
    *("layernorm", "dual_rmsnorm", "qknorm", "qknorm_rope_store", "activation", "store_cache", "quant_fp8"),
)
# The files of engines, and the modes that the tables have from each.
ENGINES = {
    "vllm_qwen3_0.6b": ["default"],
    "vllm_llama_3.2_1b": ["default"],
    "vllm_qwen3_8b": ["default"],
    "vllm_llama_3.1_8b": ["default"],
    "vllm_batch_invariant_qwen3_0.6b": ["batch_invariant"],
    "vllm_batch_invariant_llama_3.2_1b": ["batch_invariant"],
    "vllm_batch_invariant_qwen3_8b": ["batch_invariant"],
    "vllm_batch_invariant_llama_3.1_8b": ["batch_invariant"],
    "sglang_default_qwen3_0.6b": ["default"],
    "sglang_qwen3_0.6b": ["deterministic"],
    "sglang_default_qwen3_8b": ["default"],
    "sglang_qwen3_8b": ["deterministic"],
    "sglang_default_llama_3.1_8b": ["default"],
    "sglang_llama_3.1_8b": ["deterministic"],
}
README_MODELS, README_BATCHES = ("qwen3-0.6b", "qwen3-8b"), (1, 64)
ENGINE_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
SERVERS = ["vllm_serve_qwen3_0.6b"]
ROPE_STORE_TOKENS = (1, 64, 4096, 16384)
FEW_ROWS = (1, 16, 64)
CPU_SHAPES = [(64, 1), (4096, 1), (4096, 64), (4096, 4096)]
CPU_COLUMNS = {"torch": "F.rms_norm", "jitnorm": "jitnorm, out given", "allocated": "jitnorm"}
# Bandwidth grows with the number of rows: one size each.
PLOTTED: dict[str, dict[str, object]] = {
    "rmsnorm_h200": {"op": "rmsnorm", "hidden_size": 4096},
    "fused_add_rmsnorm_h200": {"op": "fused_add_rmsnorm", "hidden_size": 4096},
    "qknorm_h200": {"head_dim": 128, "num_q_heads": 32},
    "activation_h200": {"op": "silu_and_mul", "size": 14336},
    "store_cache_h200": {"row_size": 1024, "slots": "random"},
}


def rmsnorm_h200() -> list[str]:
    """Return the microseconds of a call."""
    report = _only(_read("rmsnorm_h200"), op="rmsnorm")
    rows = {(row.point["hidden_size"], row.point["num_tokens"]): row.results() for row in report.rows}
    columns = {line: title for line, title in GPU_COLUMNS.items() if any(line in cells for cells in rows.values())}
    lines = _header(["hidden", "tokens", *columns.values()])
    for shape in GPU_SHAPES:
        us = {line: result.seconds * 1e6 for line, result in rows[shape].items()}
        best = min(time for line, time in us.items() if line not in COPIES)
        cells = [_us(us[line], us[line] == best) if line in us else "-" for line in columns]
        lines.append(_row([*map(str, shape), *cells]))
    machine = report.machine
    return [*lines, "", f"({machine['gpu']}, CUDA {machine['cuda']}, torch {machine['torch']}.)"]


def qknorm_rope_store_h200() -> list[str]:
    """Return the microseconds of a call, and of the calls that it replaces."""
    report = _only(_read("qknorm_rope_store_h200"), cache="input")
    columns = {
        line: title for line, title in GPU_COLUMNS.items() if line in {n for r in report.rows for n in r.results()}
    }
    lines = _header(["heads of q and k", "head_dim", "tokens", *columns.values()])
    for row in report.rows:
        point, us = row.point, {line: result.seconds * 1e6 for line, result in row.results().items()}
        if point["num_tokens"] in ROPE_STORE_TOKENS:
            best = min(time for line, time in us.items() if line not in COPIES)
            cells = [_us(us[line], us[line] == best) if line in us else "-" for line in columns]
            heads = f"{point['num_q_heads']} + {point['num_kv_heads']}"
            lines.append(_row([heads, str(point["head_dim"]), str(point["num_tokens"]), *cells]))
    return lines


def few_rows_h200() -> list[str]:
    """Return the microseconds of products of a few rows."""
    columns = {"registers": "jitnorm, registers", "wgmma": "jitnorm, wgmma", "torch": "torch"}
    columns["cublaslt"] = "cuBLASLt without split k"
    lines = _header(["n", "k", "rows", *columns.values()])
    for row in _read("few_rows_h200").rows:
        point, us = row.point, {line: result.seconds * 1e6 for line, result in row.results().items()}
        if point["num_tokens"] in FEW_ROWS:
            cells = [_us(us[line], us[line] == min(us.values())) if line in us else "-" for line in columns]
            lines.append(_row([*(str(point[name]) for name in ("n", "k", "num_tokens")), *cells]))
    return lines


def gated_linear_h200() -> list[str]:
    """Return the microseconds of projections to gate and up with the activation."""
    columns = {"registers": "jitnorm, registers", "wgmma": "jitnorm, wgmma"}
    columns |= {"wgmma+silu_and_mul": "wgmma, `silu_and_mul`", "torch+silu_and_mul": "torch, `silu_and_mul`"}
    lines = _header(["n", "k", "rows", *columns.values()])
    for row in _read("gated_linear_h200").rows:
        point, us = row.point, {line: result.seconds * 1e6 for line, result in row.results().items()}
        best = min(time for line, time in us.items() if line not in COPIES)
        cells = [_us(us[line], us[line] == best) if line in us else "-" for line in columns]
        lines.append(_row([*(str(point[name]) for name in ("n", "k", "num_tokens")), *cells]))
    return lines


def engines_h200() -> list[str]:
    """Return the times of whole decode steps in engines, without the plugin and with it, of some rows."""
    return _engine_rows("decode step", README_MODELS, README_BATCHES)


def engine_graphs_h200() -> list[str]:
    """Return the GPU's times of all models and batches."""
    return _engine_rows("decode graph")


def engine_steps_h200() -> list[str]:
    """Return the times of whole decode steps, with the shortest and the longest sample."""
    return _engine_rows("decode step")


def _engine_rows(measure: str, models: tuple[str, ...] = (), batches: tuple[int, ...] = ()) -> list[str]:
    # A file's own time of the default mode, in the README, and its ratio elsewhere: runs differ by the host.
    last = "default stock, same run, us" if models else "plugin / default stock"
    heads = ["engine and mode", "model", "batch", "stock, us", "plugin, us", "plugin / stock", last]
    lines = [_row(heads), _row(["---", "---", *["---:"] * 5])]
    for name, modes in ENGINES.items():
        report = _read(f"{name}_h200")
        engine = ENGINE_NAMES[report.settings["engine"].partition(" ")[0]]
        for row in report.rows:
            if row.point["measure"] != measure or row.point["mode"] not in modes:
                continue
            if models and (row.point["model"] not in models or row.point["batch"] not in batches):
                continue
            results = row.results()
            plugin, stock = results["plugin"], results["stock"]
            default = results.get("default stock")
            last_cell = "-" if default is None else _us(default.seconds * 1e6) if models else _ratio(plugin, default)
            with_range = measure == "decode step" and not models
            times = [_with_range(result, with_range) for result in (stock, plugin)]
            mode, model, batch = row.point["mode"].replace("_", "-"), row.point["model"], str(row.point["batch"])
            lines.append(_row([f"{engine} {mode}", model, batch, *times, _ratio(plugin, stock), last_cell]))
    return lines


def _ratio(result: BenchResult, reference: BenchResult) -> str:
    return f"{result.seconds / reference.seconds:.2f}"


def transformers_h200() -> list[str]:
    """Return the times of layers in transformers, unpatched and with each patch."""
    columns = {
        "transformers": "transformers",
        "liger": "Liger",
        "jitnorm": "jitnorm",
        "fused_projections": "`fuse_projections`",
        "timed_gemms": "`time_gemms` too",
    }
    lines = _header(["mode", "layers", "sequences", "new tokens of each", *columns.values(), "jitnorm / Liger"])
    for row in _read("transformers_h200").rows:
        us = {line: result.seconds * 1e6 for line, result in row.results().items()}
        times = [_us(us[line], us[line] == min(us.values())) for line in columns]
        names = ("mode", "layers", "batch", "length")
        ratio = f"{us['jitnorm'] / us['liger']:.2f}"
        lines.append(_row([*(str(row.point[name]) for name in names), *times, ratio]))
    return lines


def servers_h200() -> list[str]:
    """Return the times that clients of `vllm serve` measure, with the shortest and the longest sample."""
    lines = [_row(["model", "requests", "time", "stock, ms", "plugin, ms", "plugin / stock"])]
    lines.append(_row(["---", "---:", "---", *["---:"] * 3]))
    for name in SERVERS:
        for row in _read(f"{name}_h200").rows:
            results, point = row.results(), row.point
            times = [_milliseconds(results[line]) for line in ("stock", "plugin")]
            ratio = _ratio(results["plugin"], results["stock"])
            lines.append(_row([point["model"], str(point["batch"]), _SERVER_TIMES[point["measure"]], *times, ratio]))
    return lines


_SERVER_TIMES = {
    "first token": "to the first token",
    "between tokens": "between tokens",
    "all tokens": "to the last of all tokens",
}


def _milliseconds(result: BenchResult) -> str:
    samples = [sample * 1e3 for samples in result.rounds for sample in samples]
    middle, least, most = (
        f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}" for ms in (result.seconds * 1e3, min(samples), max(samples))
    )
    return f"{middle} ({least} to {most})"


def _with_range(result: BenchResult, has_range: bool) -> str:
    samples = [sample * 1e6 for samples in result.rounds for sample in samples]
    middle = _us(result.seconds * 1e6)
    return f"{middle} ({_us(min(samples))} to {_us(max(samples))})" if has_range else middle


def operators_h200() -> list[str]:
    """Return the ratios to peers and copies over all shapes that were measured."""
    lines = [
        _row(["benchmark", "shapes", "fastest on", "time / best peer's", "time / copy's, above 100 MB", "peers"]),
        _row(["---", *["---:"] * 4, "---"]),
    ]
    for name in OPERATORS:
        report = _read(f"{name}_h200")
        for op in dict.fromkeys(row.point.get("op", name) for row in report.rows):
            part = _only(report, op=op) if "op" in report.axes else report
            summary = summarize_peers(part)
            won = sum(ratio < 1 for ratio, _ in summary.vs_best)
            present = {line for row in part.rows for line in row.results()} - {*COPIES, summary.subject}
            peers = ", ".join(title for line, title in PEERS.items() if line in present)
            title = f"general_{op}" if name.startswith("general_") else op
            title += ", long rows" if name.endswith("_long") else ""
            dtype = report.settings["dtype"]
            cells = (
                title if dtype == "bfloat16" else f"{title}, {dtype}",
                len(summary.vs_best),
                won,
                format_range(summary.vs_best),
                format_range(summary.vs_copy) if summary.vs_copy else "-",
                peers,
            )
            lines.append(_row([*map(str, cells)]))
    return lines


def rmsnorm_cpu() -> list[str]:
    """Return the microseconds of a call, with `out` given and without."""
    report = _read("rmsnorm_cpu")
    axes = ("hidden_size", "num_tokens", "dtype")
    rows = {tuple(row.point[axis] for axis in axes): row.results() for row in report.rows}
    lines = _header(["hidden", "tokens", "dtype", *CPU_COLUMNS.values()])
    for shape in CPU_SHAPES:
        for dtype in ("bfloat16", "float32"):
            cells = [_us(rows[(*shape, dtype)][line].seconds * 1e6) for line in CPU_COLUMNS]
            lines.append(_row([*map(str, shape), dtype, *cells]))
    least = min(r["torch"].seconds / max(r["jitnorm"].seconds, r["allocated"].seconds) for r in rows.values())
    return [
        *lines,
        "",
        f"Over all {len(rows)} combinations of size, rows and dtype of that run jitnorm is at least {least:.1f} times "
        f"as fast as F.rms_norm. (torch {report.machine['torch']}, {report.machine['threads']} threads.)",
    ]


def build() -> list[str]:
    """Return the times of first calls beside that of nvcc for an empty kernel."""
    seconds = {line: result.seconds for line, result in _read("build").rows[0].results().items()}
    empty = seconds["nvcc -c"]
    return [
        "| first call of a new size | of `nvcc -c` of an empty kernel |",
        "|---|---:|",
        f"| CUDA, built for sm_90a | {seconds['sm_90a cold'] / empty:.2f} |",
        f"| CPU | {seconds['CPU cold'] / empty:.2f} |",
        "",
        f"That empty kernel took {empty:.2f} s. With the cache warm, the first call in a new process took "
        f"{seconds['sm_90a warm'] * 1e3:.1f} ms for CUDA and {seconds['CPU warm'] * 1e3:.1f} ms for the CPU, with no "
        f"compiler and no `PATH`. `import jitnorm` added {seconds['import'] * 1e3:.0f} ms to `import torch`.",
    ]


def warmup() -> list[str]:
    """Return the seconds of warm-ups from the configs of models."""
    cells: dict[str, dict[str, BenchResult]] = {}
    for row in _read("warmup").rows:
        cells.setdefault(row.point["model"], {})[row.point["caches"]] = row.results()["jitnorm"]
    lines = [_row(["config of", "kernels", "empty cache, s", "warm cache, ms"]), _row(["---", *["---:"] * 3])]
    for model, of in cells.items():
        kernels = of["empty"].notes[0].removesuffix(" kernels")
        lines.append(_row([model, kernels, f"{of['empty'].seconds:.2f}", f"{of['warm'].seconds * 1e3:.0f}"]))
    return lines


def first_call_h200() -> list[str]:
    """Return the times of first calls, and of the processes that make them."""
    rows = {row.point["what"]: row.results() for row in _read("first_call_h200").rows}
    lines = [_row(["rmsnorm by", "first call, ms", "process, ms"]), _row(["---", "---:", "---:"])]
    for line, call in rows["call"].items():
        title = "jitnorm" if line == "jitnorm" else PEERS[line]
        lines.append(_row([title, _milliseconds(call), _milliseconds(rows["process"][line])]))
    return lines


HOST_CALLS = {
    "jitnorm": "`jitnorm.rmsnorm`, `out` given",
    "sglang": "SGLang JIT",
    "fi_cuda": "FlashInfer CUDA",
    "fi_cute": "FlashInfer CuTe",
    "quack": "quack",
    "liger": "Liger",
    "compile": "torch.compile",
    "torch": "`F.rms_norm`",
    "torch.ops": "the same kernel through `torch.ops.jitnorm`",
    "define+impl": "the same kernel through `Library.define` and `impl`",
    "custom_op": "the same kernel through `torch.library.custom_op`",
    "compiled": "the same kernel in a compiled function",
    "torch.add": "`torch.add(x, x, out=out)`",
    "copy_": "`out.copy_(x)`",
    "empty_like": "`torch.empty_like(x)`",
}


def host_overhead() -> list[str]:
    """Return the host time of a call of one row, on an H200's host and on the CPU of the build table."""
    cuda, cpu = (_read(f"host_overhead_{name}").rows[0].results() for name in ("h200", "cpu"))
    cells = [
        [title, *(_us(times[line].seconds * 1e6) if line in times else "-" for times in (cuda, cpu))]
        for line, title in HOST_CALLS.items()
    ]
    return [_row(["call", "CUDA, H200's host", "CPU"]), _row(["---", "---:", "---:"]), *map(_row, cells)]


# What a page calls a part of a decoder layer's run: (batch, new tokens, cached keys).
LAYERS = {
    "decode, 1024 keys": [(1, 1, 1024), (16, 1, 1024), (64, 1, 1024)],
    "decode, 16 sequences of 8192 keys": [(16, 1, 8192)],
    "decode, 1 sequence of 32768 keys": [(1, 1, 32768)],
    "prefill of 2048 tokens": [(1, 2048, 0), (4, 2048, 0)],
}


def batch_invariant_h200() -> list[str]:
    """Return the time in batch-invariant mode divided by that outside it."""
    lines = [_row(["what", "shapes", "geometric mean", "best", "worst"]), _row(["---", *["---:"] * 4])]
    gemms = _read("matmul_h200")
    for title, line in {"as chosen": "jitnorm", "Triton alone": "triton"}.items():
        lines.append(_ratios(f"mm, GEMM backend {title}", gemms, line, ["torch"]))
    layers = _read("llama_layer_h200")
    for title, shapes in LAYERS.items():
        rows = [row for row in layers.rows if tuple(row.point[axis] for axis in layers.axes) in shapes]
        lines.append(
            _ratios(f"decoder layer of Llama-8B's size, {title}", replace(layers, rows=rows), "jitnorm", ["torch"])
        )
    rows_of = _read("row_reductions_h200")
    lines.append(_ratios("softmax, log_softmax, means, RMSNorm", rows_of, "jitnorm", ["torch"]))
    best = "the same, against the faster of torch and torch.compile"
    lines.append(_ratios(best, rows_of, "jitnorm", ["torch", "compile"]))
    return lines


def _ratios(title: str, report: Report, line: str, others: list[str]) -> str:
    """Return a row of the times of `line` divided by the fastest of `others`."""
    found = []
    for row in report.rows:
        times = {name: result.seconds for name, result in row.results().items()}
        rivals = [times[name] for name in others if name in times]
        if line in times and rivals:
            found.append(times[line] / min(rivals))
    mean = math.exp(sum(map(math.log, found)) / len(found))
    return _row([title, str(len(found)), *(f"{ratio:.3f}" for ratio in (mean, min(found), max(found)))])


TABLES: dict[str, Callable[[], list[str]]] = {
    table.__name__: table
    for table in (
        rmsnorm_h200,
        qknorm_rope_store_h200,
        few_rows_h200,
        gated_linear_h200,
        engines_h200,
        transformers_h200,
        engine_graphs_h200,
        engine_steps_h200,
        servers_h200,
        operators_h200,
        host_overhead,
        batch_invariant_h200,
        rmsnorm_cpu,
        build,
        first_call_h200,
        warmup,
    )
}


def names_in(page: str) -> list[str]:
    """Return the names of the tables that a page has a place for."""
    return re.findall(r"<!-- table:(\w+) -->", page)


def with_tables(page: str) -> str:
    """Return a page's text with every table as the results have it."""
    for name in names_in(page):
        place = re.search(rf"(?<=<!-- table:{name} -->\n).*?(?=<!-- /table -->)", page, re.DOTALL)
        if not place:
            raise ValueError(f"<!-- table:{name} --> has no <!-- /table -->")
        page = page[: place.start()] + "".join(f"{line}\n" for line in TABLES[name]()) + page[place.end() :]
    return page


def write_plots() -> None:
    from jitnorm.benchmark.report import save_plot

    for name, point in PLOTTED.items():
        save_plot(_only(_read(name), **point), RESULTS / f"{name}.png")


def _read(name: str) -> Report:
    return Report.read(RESULTS / f"{name}.json")


def _only(report: Report, **point: object) -> Report:
    """Return a report with only the rows of these values."""
    return replace(report, rows=[row for row in report.rows if point.items() <= row.point.items()])


def _header(names: list[str]) -> list[str]:
    return [_row(names), _row(["---:"] * len(names))]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _us(value: float, bold: bool = False) -> str:
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    return f"**{text}**" if bold else text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
    write_plots()

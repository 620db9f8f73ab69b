"""Run SGLang's ModelRunner on a small model of random weights, in a process of its own, for test_sglang_engine.py.

    python sglang_worker.py '{"config": {...}, "device": "cuda", "variants": ["stock"], ...}' OUT

The variants are "stock", "plugin", or on the CPU, where no graph is captured, both one after the other for one model.
OUT becomes a file of `torch.save`: by variant, the tokens and the logits of greedy decoding for each batch, how many
CUDA graphs were replayed, and the plugin's report. As in sglang.benchmark.one_batch, the runner is in this process, and
no checkpoint and no tokenizer is read.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_HOST_IP": "127.0.0.1",  # the machine may have no route by which to find its own
    "SGLANG_PLUGINS": "jitnorm",  # no plugin of another package
}


def install_entry_point(folder: str) -> None:
    """Put jitnorm's entry point for SGLang on the path, as an installation would; a checkout may not be installed."""
    group = "sglang.srt.plugins"
    text = (ROOT / "pyproject.toml").read_text()
    (target,) = re.findall(rf'^\[project\.entry-points\."{re.escape(group)}"\]\njitnorm = "(.+)"$', text, re.MULTILINE)
    info = Path(folder, "jitnorm_checkout-0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jitnorm-checkout\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\njitnorm = {target}\n")
    sys.path.insert(0, folder)


def count_replays() -> list[None]:
    """Return a list that gets an item for each replay of a CUDA graph."""
    import torch

    replays: list[None] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(self) -> None:
        replays.append(None)
        original(self)

    torch.cuda.CUDAGraph.replay = replay
    return replays


def create_runner(options: dict, folder: str):
    """Return one_batch and its runner, with seeded weights that tell tokens apart."""
    import torch

    if options["device"] == "cpu":
        from sglang.srt.layers.rotary_embedding import base

        base._is_cpu = True  # SGLang built for CUDA would look for another package's kernels
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, ServerArgs

    if options["variants"][0] == "plugin":
        load_plugins()  # Engine and Scheduler do so themselves; one_batch does not
    on_cpu = options["device"] == "cpu"
    server_args = ServerArgs(
        model_path=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        device=options["device"],
        context_length=512,
        max_running_requests=32,
        max_total_tokens=4096,
        mem_fraction_static=0.3,
        attention_backend="torch_native" if on_cpu else "triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        cuda_graph_bs_decode=[1, 2, 4, 8, 16, 24],
        cuda_graph_backend_prefill=options.get("prefill", "disabled"),
        disable_decode_cuda_graph=on_cpu,
        enable_deterministic_inference=options.get("deterministic", False),
        kv_cache_dtype=options.get("kv_cache_dtype", "auto"),
        log_level="warning",
        random_seed=0,
    )
    one_batch._set_envs_and_config(server_args)
    one_batch.initialize_moe_config(server_args)
    one_batch.initialize_fp8_gemm_config(server_args)
    one_batch.initialize_fp4_gemm_config(server_args)
    one_batch.configure_logger(server_args)
    one_batch.get_tokenizer = lambda *args, **kwargs: None
    runner, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
    generator = None
    for _, p in sorted(runner.torch_runner.model.named_parameters(), key=lambda item: item[0]):
        generator = generator or torch.Generator(device=p.device).manual_seed(7)
        noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
        gemma = options["config"]["model_type"].startswith("gemma")
        p.data.copy_((0.0 if gemma else 1.0) + 0.1 * noise if p.dim() == 1 else 0.05 * noise)
    return one_batch, runner


def generate(one_batch, runner, prompts: list[list[int]], steps: int) -> dict:
    """Return the greedy tokens of each prompt, and the logits of every step, all in one batch."""
    import torch

    runner.clear()
    requests = one_batch.prepare_synthetic_inputs_for_latency_test(len(prompts), len(prompts[0]), prompts)
    tokens, logits, batch = runner.extend(requests)
    all_tokens, all_logits = [tokens.cpu()], [logits.cpu()]
    for _ in range(steps - 1):
        tokens, logits = runner.decode(tokens, batch)
        all_tokens.append(tokens.cpu())
        all_logits.append(logits.cpu())
    return {"tokens": torch.stack(all_tokens, 1), "logits": torch.stack(all_logits, 1)}


def main() -> None:
    options, out = json.loads(sys.argv[1]), sys.argv[2]
    os.environ.update(ENVIRONMENT)
    os.environ["JITNORM_SGLANG"] = "1"
    if os.path.exists("/usr/local/cuda/bin/nvcc"):  # for the kernels that SGLang compiles itself
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from jitnorm.integrations import sglang_plugin

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(options["config"]))
        os.mkdir(Path(folder, "path"))
        install_entry_point(str(Path(folder, "path")))
        one_batch, runner = create_runner(options, folder)
        ids = torch.randint(
            1, options["config"]["vocab_size"], (max(options["batches"]), 13), generator=torch.manual_seed(1)
        )
        results, replays = {}, count_replays()
        for variant in options["variants"]:
            if variant == "plugin" and results:
                from sglang.srt.plugins import load_plugins

                load_plugins()
                runner.torch_runner.init_cuda_graphs()
            replays.clear()
            runs = {n: generate(one_batch, runner, ids[:n].tolist(), options["steps"]) for n in options["batches"]}
            results[variant] = {
                "runs": runs,
                "replays": len(replays),
                "report": "\n".join(map(str, sglang_plugin.explain())),
            }
        torch.save(results, out)
    sys.stdout.flush()
    os._exit(0)  # nothing of SGLang's is left to wait for


if __name__ == "__main__":
    main()

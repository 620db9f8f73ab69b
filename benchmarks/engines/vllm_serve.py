"""Measure `vllm serve` with and without jitnorm's plugin, on one GPU, with random weights.

    python benchmarks/engines/vllm_serve.py --models DIR --model qwen3-0.6b --prompt 1024 --batches 1,8,64

Both servers run at once, and get batches of streamed requests in turns, as `jitnorm bench server` sends them: the time
to the first token, between two tokens (medians over the requests), and to the last token of all. Written for vLLM
0.26.0.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from engine_options import Engine
from engine_report import ALL_TOKENS, BETWEEN_TOKENS, FIRST_TOKEN
from engine_run import main
from vllm_step import GROUP, llm_arguments
from vllm_step import environment as step_environment

from jitnorm.benchmark.server import run_batch

NAME = "model"  # by which requests name it
TIMEOUT = 280.0  # seconds of a batch
REPLACED = re.compile(r"jitnorm's plugin in vLLM, .*: replaced [1-9]\d* modules")


def environment(mode: str, line: str, caches: Path) -> dict[str, str]:
    """Return the variables of a variant; the server's engine has a process of its own."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "JITNORM_LOG": "INFO"}  # so that its report is printed
    return step_environment(mode, line, caches) | variables


def command_line(model: Path, port: int, arguments: dict[str, Any]) -> list[str]:
    """Return the command that serves a model on a port of this machine, with arguments of `vllm.LLM` as options."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME, "--disable-uvicorn-access-log"]
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        else:
            command += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def copy_with_tokenizer(model: Path, folder: Path, vocab_size: int) -> None:
    """Write a model's config to `folder`, and a tokenizer in which every id is a word: a server needs one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text((model / "config.json").read_text())
    words = WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w0").save_pretrained(folder)


class VllmServer:
    """One variant of `vllm serve`. VllmEngine explains the arguments."""

    def __init__(
        self,
        model: str,
        mode: str,
        plugin: bool,
        batches: list[int],
        sequences: int,
        prompt: int,
        tokens: int,
        cache_tokens: int,
        cache_bytes: int,
        vocab_size: int,
    ) -> None:
        self.plugin, self.prompt, self.tokens = plugin, prompt, tokens
        folder = Path(os.environ["VLLM_CACHE_ROOT"])  # of this variant
        copy_with_tokenizer(Path(model), folder, vocab_size)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = llm_arguments(str(folder), mode == "eager", batches, sequences, prompt, cache_bytes)
        for name in ("model", "skip_tokenizer_init"):
            del arguments[name]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        command = command_line(folder, port, arguments)
        self.begin = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            self._wait()
        finally:
            self._print_log()

    def _wait(self) -> None:
        """Return when the server answers; raise RuntimeError with its last line of output if it ends before."""
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass  # it is not listening yet
            if self.process.poll() is not None:
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise RuntimeError(f"vllm serve ended with status {self.process.returncode}: {last}")
            time.sleep(0.1)

    def _print_log(self) -> None:
        """Print what the server printed, so that it is in the log of this process too."""
        print(self.log.read_text(errors="replace"), flush=True)

    def prepare(self) -> None:
        """Send the first requests, which warm the server up.

        Raises:
            RuntimeError: the plugin reported no replacement.
        """
        for batch in (1, 8):
            self.decode(batch)
        lines = self.log.read_text(errors="replace").splitlines()
        self.replaced = "\n".join(line for line in lines if REPLACED.search(line)) if self.plugin else ""
        if self.plugin and not self.replaced:
            raise RuntimeError("the plugin replaced nothing: the server's output reports no module")

    def describe(self) -> dict[str, Any]:
        """Return what the plugin replaced."""
        return {"plugin": self.replaced}

    def decode(self, batch: int) -> dict[str, float]:
        """Return seconds to the first token and between tokens, medians over the requests, and to the last of all."""
        result = run_batch(self.url, "openai", NAME, batch, self.prompt, self.tokens, TIMEOUT)
        found = result.as_dict()
        if result.errors:
            raise RuntimeError(f"{len(result.errors)} of {batch} requests failed: {result.errors[0]}")
        if found["output_tokens"] != batch * self.tokens:
            raise RuntimeError(f"{batch} requests of {self.tokens} tokens got {found['output_tokens']} together")
        return {
            FIRST_TOKEN: found["time_to_first_token"],
            BETWEEN_TOKENS: found["inter_token_latency"],
            ALL_TOKENS: found["seconds"],
        }


ENGINE = Engine(
    name="vllm_serve",
    package="vllm",
    factory=VllmServer,
    modes=["default", "eager", "batch_invariant"],
    batches=[1, 8, 64],
    bit_batches=[],
    measures=[FIRST_TOKEN],
    plugin_group=GROUP,
    plugin_target="jitnorm.integrations.vllm_plugin:register",
    environment=environment,
)

if __name__ == "__main__":
    main(ENGINE, __doc__ or "")

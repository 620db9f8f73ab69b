"""Describe an engine to the scripts here, and read their command line."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_models import count_parameters, find_model
from engine_report import PLUGIN, PREFILL, STOCK

PREFILL_PROMPTS, PREFILL_LENGTH = 4, 2048
MAX_LENGTH = 4096  # tokens of a sequence
PAGE = 16  # tokens of a page of vLLM's KV cache
BIT_PROMPT = 96  # tokens of the prompt whose logits are compared
BIT_TOKENS = 9  # tokens that it generates


@dataclass(frozen=True)
class Engine:
    """What the scripts differ in.

    Attributes:
        name: of the results.
        package: the Python package of the engine.
        factory: creates the engine in its process; see vllm_step.py.
        modes: their names, "default" first.
        batches, bit_batches: of decode steps, and of the comparison of bits, by default.
        measures: the first one that `decode` returns, and which of PREFILL, "bits", "perplexity", "hidden_state_error"
            and "kernels" there are.
        plugin_group, plugin_target: the entry point.
        environment: returns the variables of a mode and a line; the folder is for caches of its own.
    """

    name: str
    package: str
    factory: Callable[..., Any]
    modes: Sequence[str]
    batches: Sequence[int]
    bit_batches: Sequence[int]
    measures: Sequence[str]
    plugin_group: str
    plugin_target: str
    environment: Callable[[str, str, Path], dict[str, str]]


Variant = tuple[str, str]  # mode, and STOCK or PLUGIN


def _numbers(text: str) -> list[int]:
    """Return [1, 16] for "1,16"."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0 such as 1,16,64, got {text!r}")
    return sorted(set(numbers))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def create_parser(engine: Engine, doc: str) -> argparse.ArgumentParser:
    """Return the command line of a script, described by the first sentence of its docstring."""
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    parser.set_defaults(prefill=False, check_bits=0, bit_batches=engine.batches)
    parser.set_defaults(perplexity=0, hidden_state_error=0, kernels=0)  # of an engine that has no such measure
    add = parser.add_argument
    batches, bit_batches = (",".join(map(str, b)) for b in (engine.batches, engine.bit_batches))

    def add_count(name: str, default: int, metavar: str, text: str) -> None:
        add(name, type=int, nargs="?", const=default, default=0, metavar=metavar, help=f"{text} [{default}]")

    add("--models", type=Path, required=True, metavar="DIR", help="folders of models, each with a config.json")
    add("--model", type=_words, default=["qwen3-0.6b"], metavar="NAMES", help="of them, and llama-3.2-1b [qwen3-0.6b]")
    add("--mode", type=_words, default=["default"], metavar="NAMES", help=f"of {', '.join(engine.modes)} [default]")
    add("--lines", type=_words, default=[STOCK, PLUGIN], metavar="NAMES", help=f"[{STOCK},{PLUGIN}]")
    add("--batches", type=_numbers, default=batches, metavar="LIST", help=f"of decode steps [{batches}]")
    add("--tokens", type=int, default=128, help="generated for a sample [128]")
    add("--prompt", type=int, default=32, help="tokens of a prompt [32]")
    add("--rounds", type=int, default=5, help="samples of each variant [5]")
    if PREFILL in engine.measures:
        add("--prefill", action="store_true", help=f"measure a prefill of {PREFILL_PROMPTS} x {PREFILL_LENGTH}")
    add("--startup", type=int, default=0, metavar="ROUNDS", help="measure starts with warm caches, so many times")
    if "bits" in engine.measures:
        add_count("--check-bits", 20, "REPEATS", "compare logits in modes but default and eager, so many times")
        add("--bit-batches", type=_numbers, default=bit_batches, metavar="LIST", help=f"[{bit_batches}]")
    if "perplexity" in engine.measures:
        add_count("--perplexity", 2048, "TOKENS", "of a sequence")
    if "hidden_state_error" in engine.measures:
        add_count("--hidden-state-error", 512, "TOKENS", "compare hidden states of a sequence with float32")
    if "kernels" in engine.measures:
        add_count("--kernels", 20, "TOP", "list the longest kernels of a step")
    add("--limit", type=float, default=300, metavar="SECONDS", help="for a start, and for each call [300]")
    add("--time-limit", type=float, default=570, metavar="SECONDS", help="for the whole run [570]")
    add("--output", type=Path, metavar="FILE", help="write JSON, anew after each step")
    add("--logs", type=Path, metavar="DIR", help="keep what the engines print")
    return parser


def parse(engine: Engine, doc: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, or end with one line that says what is wrong with them or not there."""
    parser = create_parser(engine, doc)
    options = parser.parse_args(words)
    known = {"mode": engine.modes, "lines": [STOCK, PLUGIN]}
    for name, values in known.items():
        given = getattr(options, name)
        if not given or (wrong := [value for value in given if value not in values]):
            parser.error(f"--{name} must be of {', '.join(values)}, got {', '.join(wrong) if given else 'none'}")
    for name, smallest in {"tokens": 2, "prompt": 1, "rounds": 1, "startup": 0, "check_bits": 0, "kernels": 0}.items():
        if getattr(options, name) < smallest:
            parser.error(f"--{name.replace('_', '-')} must be {smallest} or more, got {getattr(options, name)}")
    for name in ("perplexity", "hidden_state_error"):
        if (length := getattr(options, name)) != 0 and not 2 <= length < MAX_LENGTH:
            parser.error(f"--{name.replace('_', '-')} must be from 2 to {MAX_LENGTH - 1}, got {length}")
    if options.check_bits and not set(options.mode) - {"default", "eager"}:
        parser.error(f"--check-bits needs one of the modes {', '.join({*engine.modes} - {'default', 'eager'})}")
    if options.prompt + options.tokens > MAX_LENGTH:
        parser.error(f"--prompt and --tokens must be {MAX_LENGTH} or less together")
    for name, path in {"output": options.output and options.output.parent, "logs": options.logs}.items():
        if path and not path.is_dir():
            parser.error(f"--{name}: there is no folder {str(path)!r}")
    try:
        for name in options.model:
            with tempfile.TemporaryDirectory() as folder:
                find_model(options.models, name, Path(folder))
    except ValueError as error:
        parser.error(str(error))
    if not importlib.util.find_spec(engine.package):
        parser.error(f"{engine.package} is not installed: pip install {engine.package}, or add it to PYTHONPATH")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    return options


def list_variants(options: argparse.Namespace) -> list[Variant]:
    """Return the variants to start: those asked for, and the default stock that other modes are compared with."""
    variants = [(mode, line) for mode in options.mode for line in options.lines]
    reference = ("default", STOCK)
    return variants if reference in variants or STOCK not in options.lines else [reference, *variants]


def estimate_seconds(config: dict[str, Any], options: argparse.Namespace) -> float:
    """Return about how long a model takes on one H200.

    A decode step takes 1.3 ms and 0.6 ms for each 1e9 parameters, 2.5 times as long in a batch-invariant mode, and 10
    ms or more in eager mode: measured with vLLM and Qwen3-0.6B and 8B. That a start takes 45 seconds and 4 for each 1e9
    parameters, and 10 more for each variant that starts beside it, is an assumption.
    """
    billions = count_parameters(config) / 1e9
    variants = list_variants(options)
    step = dict.fromkeys(options.mode, 2.5 * (0.0013 + 0.0006 * billions))
    step |= {"default": 1.3e-3 + 0.6e-3 * billions, "eager": max(10e-3, 1.3e-3 + 0.6e-3 * billions)}
    start = 45 + 4 * billions
    seconds = start + 10 * (len(variants) - 1)
    for mode, _ in variants:
        seconds += len(options.batches) * (options.rounds + 2) * (options.tokens * step[mode] + 0.1)
        seconds += bool(options.prefill) * options.rounds * 0.1 * (1 + billions) + bool(options.perplexity) * 3
        seconds += bool(options.hidden_state_error) * (3 + billions)
        if mode not in ("default", "eager"):
            seconds += options.check_bits * (len(options.bit_batches) + 1) * (BIT_TOKENS * step[mode] + 0.3)
    return seconds + (options.startup + 1) * (options.startup > 0) * len(options.mode) * len(options.lines) * start / 2

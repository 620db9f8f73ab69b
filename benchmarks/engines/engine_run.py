"""Run the variants of an engine side by side on one GPU: the command line, the plan and the loop of the scripts here.

Each variant, stock or with the plugin, in each mode, has a process of its own. Those of a model start together, and are
then measured in turns, sample by sample, so that clocks and temperature change for all alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from engine_models import cache_bytes, count_parameters, find_model, find_plugin, read_config
from engine_process import EngineError, EngineProcess
from engine_report import (
    DECODE,
    DEFAULT_STOCK,
    PLUGIN,
    PREFILL,
    STARTUP,
    STOCK,
    Point,
    Results,
    print_report,
)

from jitnorm.benchmark.machine import describe_machine

PREFILL_PROMPTS, PREFILL_LENGTH = 4, 2048
MAX_LENGTH = 4096  # tokens of a sequence
PAGE = 64  # tokens of the largest page of a KV cache
BIT_PROMPT = 96  # tokens of the prompt whose logits are compared
BIT_TOKENS = 9  # tokens that it generates
OVER = "the time limit of the run was over"


@dataclass(frozen=True)
class Engine:
    """What the scripts differ in.

    Attributes:
        package: the Python package of the engine.
        factory: creates the engine in its process; see vllm_step.py.
        modes: their names, "default" first.
        batches, bit_batches: of decode steps, and of the comparison of bits, by default.
        measures: which of DECODE, PREFILL and "perplexity" there are.
        plugin_group, plugin_target: the entry point.
        environment: returns the variables of a mode and a line; the folder is for caches of its own.
    """

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
Processes = dict[Variant, EngineProcess]


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
    add = parser.add_argument
    batches, bit_batches = (",".join(map(str, b)) for b in (engine.batches, engine.bit_batches))
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
    add("--check-bits", type=int, nargs="?", const=20, default=0, metavar="REPEATS", help="in modes but default [20]")
    add("--bit-batches", type=_numbers, default=bit_batches, metavar="LIST", help=f"[{bit_batches}]")
    if "perplexity" in engine.measures:
        add("--perplexity", type=int, nargs="?", const=2048, default=0, metavar="TOKENS", help="of a sequence [2048]")
    add("--kernels", type=int, nargs="?", const=20, default=0, metavar="TOP", help="list kernels of a step [20]")
    add("--limit", type=float, default=300, metavar="SECONDS", help="for a start, and for each call [300]")
    add("--time-limit", type=float, default=570, metavar="SECONDS", help="for the whole run [570]")
    add("--output", type=Path, metavar="FILE", help="write JSON, anew after each step")
    add("--logs", type=Path, metavar="DIR", help="keep what the engines print")
    return parser


def parse(engine: Engine, doc: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, or end with one line that says what is wrong with them or not there."""
    parser = create_parser(engine, doc)
    options = parser.parse_args(words)
    for name in ("prefill", "perplexity"):
        setattr(options, name, getattr(options, name, 0))
    known = {"mode": engine.modes, "lines": [STOCK, PLUGIN]}
    for name, values in known.items():
        given = getattr(options, name)
        if not given or (wrong := [value for value in given if value not in values]):
            parser.error(f"--{name} must be of {', '.join(values)}, got {', '.join(wrong) if given else 'none'}")
    for name, smallest in {"tokens": 2, "prompt": 1, "rounds": 1, "startup": 0, "check_bits": 0, "kernels": 0}.items():
        if getattr(options, name) < smallest:
            parser.error(f"--{name.replace('_', '-')} must be {smallest} or more, got {getattr(options, name)}")
    if options.perplexity != 0 and not 2 <= options.perplexity < MAX_LENGTH:
        parser.error(f"--perplexity must be from 2 to {MAX_LENGTH - 1}, got {options.perplexity}")
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

    The constants are those of dense bfloat16 models there: a start of 45 seconds and 4 more for each 1e9 parameters, of
    which several share the processor's cores, and a decode step of 1.3 ms and 0.6 ms for each 1e9 parameters, which
    takes 2.5 times as long in a batch-invariant mode and 10 ms in eager mode.
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
        if mode != "default":
            seconds += options.check_bits * (len(options.bit_batches) + 1) * (BIT_TOKENS * step[mode] + 0.3)
    return seconds + (options.startup + 1) * (options.startup > 0) * len(options.mode) * len(options.lines) * start / 2


class Run:
    """A run of a script: the results so far, and how much time is left."""

    def __init__(self, engine: Engine, options: argparse.Namespace, folder: Path) -> None:
        self.engine, self.options, self.folder = engine, options, folder
        self.end = time.monotonic() + options.time_limit
        settings = {"engine": f"{engine.package} {version(engine.package)}"}
        settings |= {name: getattr(options, name) for name in ("tokens", "prompt", "rounds")}
        self.results = Results(f"{engine.package}_step", settings)

    @property
    def limit(self) -> float:
        """Return how many seconds the next call may take; 0 when the time limit is over."""
        return max(0.0, min(self.options.limit, self.end - time.monotonic()))

    def measure_model(self, name: str) -> None:
        """Measure everything of a model that was asked for."""
        model = find_model(self.options.models, name, self.folder)
        config = read_config(model)
        print(f"{name}: about {estimate_seconds(config, self.options) / 60:.1f} minutes", flush=True)
        begin = time.monotonic()
        processes = {variant: self._start(name, model, config, variant) for variant in list_variants(self.options)}
        try:
            self._wait(name, processes)
            self._decode(name, processes)
            if self.options.prefill:
                self._alternate((name, PREFILL, PREFILL_PROMPTS), processes, "prefill", {})
            self.write()
            self._check(name, processes)
        finally:
            for process in processes.values():
                process.close()
        if self.options.startup:
            self._startup(name, model, config)
        self.write()
        print(f"{name}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)

    def _start(self, name: str, model: Path, config: dict[str, Any], variant: Variant) -> EngineProcess:
        mode, line = variant
        label = f"{name}_{mode}_{line}"
        caches = self.folder / label
        caches.mkdir(exist_ok=True)
        options = self.options
        batches = sorted({*options.batches, *(options.bit_batches if options.check_bits else ())})
        # Of each use the tokens in whole pages, and as much again as vLLM demands for one sequence.
        decode = max(batches) * (options.prompt + options.tokens + PAGE)
        bits = max(options.bit_batches) * (2 * BIT_PROMPT + BIT_TOKENS + PAGE)
        tokens = max(decode, bits, PREFILL_PROMPTS * (PREFILL_LENGTH + PAGE)) + MAX_LENGTH
        settings = {
            **{"model": str(model), "mode": mode, "plugin": line == PLUGIN},
            **{"batches": options.batches, "sequences": max(*batches, PREFILL_PROMPTS)},
            **{"prompt": options.prompt, "tokens": options.tokens},
            **{"cache_tokens": tokens, "cache_bytes": cache_bytes(config, tokens), "vocab_size": config["vocab_size"]},
        }
        log = (options.logs or self.folder) / f"{label}.log"
        environment = self.engine.environment(mode, line, caches)
        return EngineProcess(label, self.engine.factory, settings, environment, log)

    def _wait(self, name: str, processes: Processes) -> None:
        for (mode, line), process in processes.items():
            try:
                seconds = process.wait(self.limit)
                described = process.call("describe", self.limit)
                self.results.add_check("variants", model=name, mode=mode, line=line, first_start=seconds, **described)
                print(f"  {process.name} started in {seconds:.0f} s: {described}", flush=True)
            except EngineError as error:
                print(f"  {error}\n{process.last_lines()}", flush=True)

    def _decode(self, name: str, processes: Processes) -> None:
        for batch in self.options.batches:
            self._alternate((name, DECODE, batch), processes, "decode", {"batch": batch})

    def _alternate(
        self, place: tuple[str, str, int], processes: Processes, method: str, arguments: dict[str, Any]
    ) -> None:
        """Take a sample of each variant in turns, after one that does not count."""
        model, measure, batch = place
        failed: set[Variant] = set()

        def remark(variant: Variant, note: Callable[[Point, str, str], None], text: str) -> None:
            failed.add(variant)
            for point, column in self._cells(model, variant, measure, batch):
                note(point, column, text)

        for sample in range(self.options.rounds + 1):
            for variant, process in processes.items():
                if variant in failed:
                    continue
                if not self.limit:
                    remark(variant, self.results.skip, OVER)
                    continue
                try:
                    found = process.call(method, self.limit, **arguments)
                except EngineError as error:
                    print(f"  {error}\n{process.last_lines()}", flush=True)
                    remark(variant, self.results.fail, str(error))
                    continue
                for measured, seconds in found.items() if sample else ():
                    for point, column in self._cells(model, variant, measured, batch):
                        self.results.add(point, column, seconds)

    def _cells(self, model: str, variant: Variant, measure: str, batch: int) -> Iterator[tuple[Point, str]]:
        """Iterate over the cells that a sample belongs to: default stock is in the rows of all modes."""
        mode, line = variant
        if mode in self.options.mode:
            yield (model, mode, measure, batch), line
        if variant == ("default", STOCK):
            for other in self.options.mode:
                if other != "default":
                    yield (model, other, measure, batch), DEFAULT_STOCK

    def _check(self, name: str, processes: Processes) -> None:
        """Compare bits, and compute perplexities and lists of kernels, of the variants that were asked for."""
        options = self.options
        for (mode, line), process in processes.items():
            if mode not in options.mode:
                continue
            where = {"model": name, "mode": mode, "line": line}
            if options.check_bits and mode not in ("default", "eager"):
                arguments = {"batches": options.bit_batches, "repeats": options.check_bits}
                for found in self._ask(process, "check_bits", arguments) or ():
                    self.results.add_check("bits", **where, **found)
            if options.perplexity:
                nll = self._ask(process, "perplexity", {"length": options.perplexity})
                if nll is not None:
                    self.results.add_check("perplexity", **where, tokens=options.perplexity, nll=nll)
            for batch in options.batches[:1] if options.kernels else ():
                found = self._ask(process, "kernels", {"batch": batch, "top": options.kernels})
                if found is not None:
                    self.results.add_check("kernels", **where, batch=batch, kernels=found)

    def _ask(self, process: EngineProcess, method: str, arguments: dict[str, Any]) -> Any:
        """Return the result of a call, or None after printing and keeping why there is none."""
        failure = OVER if not self.limit else None
        try:
            if not failure:
                return process.call(method, self.limit, **arguments)
        except EngineError as error:
            failure = str(error)
        print(f"  {method}: {failure}", flush=True)
        self.results.add_check("failures", variant=process.name, method=method, message=failure)
        return None

    def _startup(self, name: str, model: Path, config: dict[str, Any]) -> None:
        """Start each variant alone and in turns; its caches are those of its first start above."""
        variants = [(mode, line) for mode in self.options.mode for line in self.options.lines]
        for sample in range(self.options.startup + 1):  # the first reads the caches' files from disk
            for mode, line in variants:
                point: Point = (name, mode, STARTUP, 1)
                if not self.limit:
                    self.results.skip(point, line, OVER)
                    continue
                process = self._start(name, model, config, (mode, line))
                try:
                    seconds = process.wait(self.limit)
                    if sample:
                        self.results.add(point, line, seconds)
                except EngineError as error:
                    self.results.fail(point, line, str(error))
                finally:
                    process.close()

    def write(self) -> None:
        """Write the report to --output, as far as it is measured."""
        report = self.results.report()
        report.machine = describe_machine(torch.device("cuda"), Path(__file__))
        if self.options.output:
            report.write(self.options.output)

    @property
    def failed(self) -> bool:
        """Return whether anything ended with an error, or bits of the plugin differ."""
        settings = self.results.settings
        unequal = any(row["unequal"] and row["line"] == PLUGIN for row in settings.get("bits", ()))
        return self.results.report().failed or bool(settings.get("failures")) or unequal


def main(engine: Engine, doc: str) -> None:
    """Run the command line of a script. The exit status is 1 if something failed or bits of the plugin differ."""
    options = parse(engine, doc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "entry_point").mkdir()
        find_plugin(engine.plugin_group, engine.plugin_target, folder / "entry_point")
        run = Run(engine, options, folder)
        for name in options.model:
            run.measure_model(name)
    print_report(run.results.report())
    raise SystemExit(int(run.failed))

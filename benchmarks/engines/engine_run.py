"""Run the variants of an engine side by side on one GPU.

Each variant, stock or with the plugin, in each mode, has a process of its own. Those of a model start together, and are
then measured in turns, sample by sample, so that clocks and temperature change for all alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from engine_models import cache_bytes, find_model, find_plugin, read_config
from engine_options import (
    BIT_PROMPT,
    BIT_TOKENS,
    MAX_LENGTH,
    PAGE,
    PREFILL_LENGTH,
    PREFILL_PROMPTS,
    Engine,
    Variant,
    estimate_seconds,
    list_variants,
    parse,
)
from engine_process import EngineError, EngineProcess
from engine_report import (
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

OVER = "the time limit of the run was over"

Processes = dict[Variant, EngineProcess]


class Run:
    """A run of a script: the results so far, and how much time is left."""

    def __init__(self, engine: Engine, options: argparse.Namespace, folder: Path) -> None:
        self.engine, self.options, self.folder = engine, options, folder
        self.end = time.monotonic() + options.time_limit
        settings = {"engine": f"{engine.package} {version(engine.package)}"}
        settings |= {name: getattr(options, name) for name in ("tokens", "prompt", "rounds")}
        self.results = Results(engine.name, settings)

    @property
    def limit(self) -> float:
        """Return how many seconds the next call may take; 0 when the time limit is over."""
        return max(0.0, min(self.options.limit, self.end - time.monotonic()))

    def print_plan(self) -> None:
        """Print about how long each model will take."""
        folders = {name: find_model(self.options.models, name, self.folder) for name in self.options.model}
        minutes = {name: estimate_seconds(read_config(folders[name]), self.options) / 60 for name in folders}
        models = ", ".join(f"{name} {count:.1f}" for name, count in minutes.items())
        limit = self.options.time_limit / 60
        print(f"about {sum(minutes.values()):.1f} minutes ({models}); the limit is {limit:.1f}", flush=True)

    def measure_model(self, name: str) -> None:
        """Measure everything of a model that was asked for."""
        model = find_model(self.options.models, name, self.folder)
        config = read_config(model)
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
            **{"batches": options.batches, "sequences": max(*batches, 8)},
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
                plugin = described.pop("plugin")
                words = ", ".join(f"{key} {value}" for key, value in described.items())
                print(
                    f"  {process.name} started in {seconds:.0f} s: {words}",
                    *plugin.splitlines(),
                    sep="\n    ",
                    flush=True,
                )
            except EngineError as error:
                print(f"  {error}\n{process.last_lines()}", flush=True)

    def _decode(self, name: str, processes: Processes) -> None:
        for batch in self.options.batches:
            self._alternate((name, self.engine.measures[0], batch), processes, "decode", {"batch": batch})

    def _alternate(
        self, place: tuple[str, str, int], processes: Processes, method: str, arguments: dict[str, Any]
    ) -> None:
        """Take a sample of each variant in turns, after one that does not count.

        The order alternates: another variant's step may have left the GPU warm, or the host's caches cold.
        """
        model, measure, batch = place
        failed: set[Variant] = set()

        def remark(variant: Variant, note: Callable[[Point, str, str], None], text: str) -> None:
            failed.add(variant)
            for point, column in self._cells(model, variant, measure, batch):
                note(point, column, text)

        for sample in range(self.options.rounds + 1):
            for variant, process in [*processes.items()][:: -1 if sample % 2 else 1]:
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
        """Make the checks that were asked for: bits, perplexities, errors of hidden states, and lists of kernels."""
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
            if options.hidden_state_error:
                arguments = {"length": options.hidden_state_error, "file": str(self.folder / f"{name}_float32.pt")}
                error = self._ask(process, "hidden_state_error", arguments)
                if error is not None:
                    self.results.add_check("errors", **where, tokens=options.hidden_state_error, error=error)
            for batch in options.batches if options.kernels else ():
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
        run.print_plan()
        for name in options.model:
            run.measure_model(name)
    print_report(run.results.report())
    raise SystemExit(int(run.failed))

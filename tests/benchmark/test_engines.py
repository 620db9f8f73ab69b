"""The scripts of benchmarks/engines without their engines: options, processes, tables, and comparisons of bits."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import subprocess
import sys
import time
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from processes import run_before_import, start_method_with_torch

from jitnorm.benchmark.results import Failed, Report, Skipped

FOLDER = Path(__file__).parents[2] / "benchmarks" / "engines"
SCRIPTS = {"vllm_step": "vllm", "vllm_host": "vllm", "vllm_serve": "vllm", "sglang_step": "sglang"}


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def models(tmp_path):
    """Return a folder with the config of one small model."""
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    config |= {"intermediate_size": 128, "vocab_size": 500}
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder.parent


@pytest.fixture
def tiny(monkeypatch):
    """Return the module of the engine of these tests, on a machine that has a GPU as far as the scripts ask."""
    monkeypatch.setattr(importlib.import_module("engine_process"), "START_METHOD", start_method_with_torch())
    engine_run = importlib.import_module("engine_run")
    monkeypatch.setattr(engine_run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine_run, "describe_machine", lambda device, file: {"gpu": "none"})
    return importlib.import_module("tiny_engine")


def run_tiny(tiny, monkeypatch, capsys, models, *words: str) -> tuple[int, str]:
    """Run the command line with the engine of these tests; return the exit status and what it printed."""
    engine_run = importlib.import_module("engine_run")
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--models", str(models), "--model", "small", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")  # the script adds to it, and the fixture restores it
    with pytest.raises(SystemExit) as ended:
        engine_run.main(tiny.ENGINE, "Measure.")
    return ended.value.code, capsys.readouterr().out


@pytest.mark.parametrize(("script", "package"), SCRIPTS.items())
def test_says_that_the_engine_is_not_installed(script, package, models):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    words = [str(FOLDER / f"{script}.py"), "--models", str(models), "--model", "small,llama-3.2-1b"]
    path = "sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_before_import(f"import os, runpy, sys; sys.argv[:] = {words}", path)
    assert done.returncode == 2 and f"error: {package} is not installed: pip install {package}" in done.stderr, done


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: --models"),
        (["--mode", "fast"], "--mode must be of default, "),
        (["--lines", "stock,ours"], "--lines must be of stock, plugin, got ours"),
        (["--lines", ""], "--lines must be of stock, plugin, got none"),
        (["--batches", "1,x"], "expected whole numbers above 0 such as 1,16,64, got '1,x'"),
        (["--batches", "0"], "expected whole numbers above 0 such as 1,16,64, got '0'"),
        (["--tokens", "1"], "--tokens must be 2 or more, got 1"),
        (["--tokens", "4096"], "--prompt and --tokens must be 4096 or less together"),
        (["--check-bits", "-1"], "--check-bits must be 0 or more, got -1"),
        (["--check-bits"], "--check-bits needs one of the modes "),
        (["--model", "none"], "has no none/config.json), got 'none'"),
        (["--output", "/none/a.json"], "--output: there is no folder '/none'"),
        (["--logs", "/none"], "--logs: there is no folder '/none'"),
    ],
)
def test_refuses_options(script, words, message, models, capsys):
    module, engine_options = importlib.import_module(script), importlib.import_module("engine_options")
    given = words and ["--models", str(models), "--model", "small", *words]
    if "--check-bits" in words and "bits" not in module.ENGINE.measures:
        message = "unrecognized arguments: --check-bits"
    with pytest.raises(SystemExit, match="2"):
        engine_options.parse(module.ENGINE, module.__doc__, given)
    assert message in capsys.readouterr().err


def test_refuses_lengths_of_sequences(models, capsys):
    module, engine_options = importlib.import_module("vllm_step"), importlib.import_module("engine_options")
    for option, length in (("--perplexity", 1), ("--hidden-state-error", 4096)):
        with pytest.raises(SystemExit, match="2"):
            engine_options.parse(module.ENGINE, "", ["--models", str(models), "--model", "small", option, str(length)])
        assert f"{option} must be from 2 to 4095, got {length}" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_variants_have_an_environment_each(script, tmp_path):
    """All variants of a script differ in their variables, and only the plugin's switch it on."""
    module = importlib.import_module(script)
    found = {
        (mode, line): module.ENGINE.environment(mode, line, tmp_path)
        for mode in module.ENGINE.modes
        for line in ("stock", "plugin")
    }
    name = f"JITNORM_{SCRIPTS[script].upper()}"
    assert all(variables[name] == str(int(line == "plugin")) for (_, line), variables in found.items())
    assert all(isinstance(value, str) for variables in found.values() for value in variables.values())
    assert {module.ENGINE.modes[0]} == {"default"}


@pytest.mark.slow
def test_measures_variants_in_turns(tiny, monkeypatch, capsys, models, tmp_path):
    """Run all measures; the report has them with their ratios, and the stock's bits differ."""
    file = tmp_path / "tiny.json"
    words = (
        "--mode",
        "default,invariant",
        "--prefill",
        "--check-bits",
        "2",
        "--perplexity",
        "50",
        "--hidden-state-error",
        "2",
    )
    status, said = run_tiny(tiny, monkeypatch, capsys, models, *words, "--kernels", "--output", str(file))
    assert status == 0, said
    report = Report.read(file)
    rows = {(row.point["mode"], row.point["measure"], row.point["batch"]): row for row in report.rows}
    assert {measure for _, measure, _ in rows} == {"decode step", "prefill"}
    assert len(rows) == 2 * (2 + 1)
    for batch in (1, 3):
        results = rows["invariant", "decode step", batch].results()
        assert results["stock"].seconds == results["default stock"].seconds == pytest.approx(2e-6 * batch)
        assert results["plugin"].seconds == pytest.approx(1e-6 * batch) and len(results["plugin"].rounds) == 5
        assert set(rows["default", "decode step", batch].cells) == {"stock", "plugin"}
    bits = {(row["line"], row["batch"]): row for row in report.settings["bits"]}
    assert bits["plugin", 3] == bits["plugin", 3] | {"mode": "invariant", "repeats": 2, "rows": 6, "unequal": 0}
    assert bits["stock", 3]["unequal"] == 6 and 0 < bits["stock", 3]["max_difference"] < 1e-4
    nll = [row["nll"] for row in report.settings["perplexity"]]
    assert len(nll) == 4 and len({*nll}) == 1 and nll[0] == pytest.approx(math.log(500), abs=0.1)
    errors = [(row["mode"], row["line"], row["error"]) for row in report.settings["errors"]]
    assert errors == [(mode, *e) for mode in ("default", "invariant") for e in (("stock", 8e-3), ("plugin", 6e-3))]
    assert "compared with float32" in said and said.count("0.7500") == 2
    assert len(report.settings["variants"]) == 4 and report.machine == {"gpu": "none"}
    line = next(line for line in said.splitlines() if line.split()[:4] == ["small", "invariant", "decode", "step"])
    assert line.split()[-2:] == ["0.500", "0.500"]
    assert "small_default_plugin started in" in said and "device cpu\n    Tiny:\n    replaced 1\n" in said
    assert "logits of a prompt in a batch" in said and "kernels of a decode step: small, default, plugin" in said
    assert not list(entry_points(group="tiny.plugins"))[1:]

    report_module = importlib.import_module("engine_report")
    monkeypatch.setattr(sys, "argv", ["engine_report.py", str(file)])
    report_module.main()
    assert capsys.readouterr().out.strip() == said[said.index("tiny: median") :].strip()


def test_measures_starts(tiny, monkeypatch, capsys, models, tmp_path):
    """Start a variant alone after its caches are filled; without stock there is nothing to compare with."""
    file = tmp_path / "tiny.json"
    words = ("--lines", "plugin", "--batches", "1", "--rounds", "1", "--startup", "1", "--output", str(file))
    status, said = run_tiny(tiny, monkeypatch, capsys, models, *words)
    assert status == 0, said
    decode, start = Report.read(file).rows
    assert start.point == {"model": "small", "mode": "default", "measure": "start-up", "batch": 1}
    assert set(start.cells) == set(decode.cells) == {"plugin"} and len(start.cells["plugin"].rounds) == 1
    assert said.splitlines()[0].startswith("about ") and "the limit is 9.5" in said.splitlines()[0]


def test_a_variant_that_fails_does_not_end_the_run(tiny, monkeypatch, capsys, models, tmp_path):
    """An exception fails a row, and the end of the process fails the rows after it; the others are measured."""
    file = tmp_path / "tiny.json"
    status, said = run_tiny(
        tiny, monkeypatch, capsys, models, "--batches", "1,4,5,7", "--rounds", "2", "--output", str(file)
    )
    assert status == 1
    cells = {row.point["batch"]: row.cells for row in Report.read(file).rows}
    label = "small_default_plugin"
    assert cells[4]["plugin"] == Failed(f"{label}: ValueError: no graph for 4")
    assert cells[5]["plugin"] == Failed(f"{label}: the process ended with status 7 during decode")
    assert cells[7]["plugin"] == cells[5]["plugin"]
    assert all(len(row["stock"].rounds) == 2 for row in cells.values()) and len(cells[1]["plugin"].rounds) == 2
    assert (
        "leaving" in said
        and f"error plugin at model=small, mode=default, measure=decode step, batch=4: {label}" in said
    )


def test_a_call_that_takes_too_long_ends_the_variant(tiny, monkeypatch, capsys, models, tmp_path):
    """Give the run no time: nothing is measured, and every row says why."""
    file = tmp_path / "tiny.json"
    status, said = run_tiny(
        tiny,
        monkeypatch,
        capsys,
        models,
        "--time-limit",
        "0",
        "--check-bits",
        "--mode",
        "invariant",
        "--output",
        str(file),
    )
    assert status == 1 and "its start took longer than 0 s" in said
    report = Report.read(file)
    reason = Skipped("the time limit of the run was over")
    assert len(report.rows) == 2
    assert all(cell == reason for row in report.rows for cell in row.cells.values())
    assert [row["method"] for row in report.settings["failures"]] == ["check_bits"] * 2


def test_a_process_that_does_not_answer_is_killed(tiny):
    module = importlib.import_module("engine_process")
    variables = {"TINY_PLUGIN": "0", "TINY_MODE": "default"}
    settings = {"model": "", "mode": "default", "plugin": False, "vocab_size": 9}
    process = module.EngineProcess("tiny", tiny.TinyEngine, settings, variables)
    assert 0 < process.wait(300) < 300 and process.is_alive
    assert process.call("decode", 300, batch=3) == {"decode step": 6e-6}
    with pytest.raises(module.EngineError, match=r"^tiny: decode took longer than 0 s$"):
        process.call("decode", 0, batch=6)
    assert not process.is_alive and process._process.exitcode == -9
    with pytest.raises(module.EngineError, match=r"^tiny: decode took longer than 0 s$"):
        process.call("decode", 300, batch=3)
    process.close()


def test_a_start_that_fails_says_why(tiny, tmp_path):
    module = importlib.import_module("engine_process")
    settings = {"model": "", "mode": "default", "plugin": False, "vocab_size": 9}
    variables = {"TINY_PLUGIN": "1", "TINY_MODE": "default"}
    process = module.EngineProcess("tiny", tiny.TinyEngine, settings, variables, tmp_path / "log")
    for _ in range(2):
        with pytest.raises(
            module.EngineError, match=r"^tiny: RuntimeError: the environment is that of another variant$"
        ):
            process.wait(300)
    assert "Traceback" in process.last_lines()
    process.close()


def test_samples_before_a_time_limit_count():
    module = importlib.import_module("engine_report")
    results = module.Results("x", {})
    point = ("m", "default", "decode step", 1)
    for seconds in (3e-6, 1e-6, 2e-6):
        results.add(point, "stock", seconds)
    results.skip(point, "stock", "over")
    results.add(point, "plugin", 1e-6)
    results.fail(point, "plugin", "broken")
    (row,) = results.report().rows
    assert row.cells["stock"].seconds == 2e-6 and row.cells["stock"].notes == ("over",)
    assert row.cells["plugin"] == Failed("broken")
    assert "2.00 (1.00-3.00)" in module.format_times(results.report())


def test_perplexity_relative_to_stock():
    module = importlib.import_module("engine_report")
    results = module.Results("x", {})
    for line, nll in (("stock", 2.0), ("plugin", 2.0 + math.log(1.25))):
        results.add_check("perplexity", model="m", mode="default", line=line, tokens=9, nll=nll)
    (text,) = module.format_checks(results.report())
    assert text.splitlines()[-1].split()[-2:] == [f"{1.25 * math.e**2:.7g}", "+2.50e-01"]


def test_kernels_of_a_step_are_a_difference():
    """The kernels of the first token, which both runs have, do not count."""
    module = importlib.import_module("engine_report")
    whole = {"gemm": (36, 361.0), "norm": (17, 34.0), "prefill": (1, 50.0), "copy": (16, 8.0)}
    part = {"gemm": (4, 41.0), "norm": (1, 2.0), "prefill": (1, 50.0)}
    expected = [["gemm", 2.0, 20.0], ["norm", 1.0, 2.0], ["copy", 1.0, 0.5]]
    assert module.subtract_kernels(whole, part, 16, top=9) == expected
    assert module.subtract_kernels(whole, part, 16, top=1) == expected[:1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_of_rows(dtype):
    """Zeros of two signs differ, equal NaNs do not, and one bit of one logit is found."""
    module = importlib.import_module("logit_bits")
    rows = torch.randn(7, 1000, dtype=dtype)
    rows[0, 3], rows[1, 4] = 0.0, torch.nan
    check = module.BitCheck(3)
    check.add(rows, rows.clone())
    assert (check.rows, check.unequal, check.max_difference) == (7, 0, 0.0)
    changed = rows.clone()
    changed[0, 3] = -0.0
    module.as_bits(changed)[5, 999] ^= 1
    check.add(rows, changed)
    assert (check.rows, check.unequal) == (14, 2)
    assert check.max_difference == float((rows[5].double() - changed[5].double()).abs().max()) > 0
    with pytest.raises(ValueError, match=r"logits of \(7, 1000\) .* were expected, got \(6, 1000\)"):
        check.add(rows, rows[1:])


def test_the_order_of_the_variants_alternates():
    engine_run = importlib.import_module("engine_run")
    calls = []

    def process(name):
        return types.SimpleNamespace(call=lambda *args, **kwargs: calls.append(name) or {"decode step": len(calls)})

    run = engine_run.Run.__new__(engine_run.Run)
    run.options = types.SimpleNamespace(rounds=2, mode=["default"], limit=9.0)
    run.end = time.monotonic() + 1e6
    run.results = engine_run.Results("vllm_step", {})
    processes = {("default", line): process(line) for line in ("stock", "plugin")}
    run._alternate(("small", "decode step", 1), processes, "decode", {})
    assert calls == ["stock", "plugin", "plugin", "stock", "stock", "plugin"]
    (row,) = run.results.report().rows
    samples = {line: [sample for (sample,) in result.rounds] for line, result in row.results().items()}
    assert samples == {"stock": [4, 5], "plugin": [3, 6]}  # the first do not count


def test_bits_of_rows_in_any_order():
    """A row is looked for as often as it was expected; a row with another bit is missing."""
    module = importlib.import_module("logit_bits")
    rows = torch.randn(9, 3000).bfloat16()
    expected = rows[[2, 5, 5]]
    others = torch.randn(40, 3000).bfloat16()
    check = module.BitCheck(17)
    check.add_somewhere(expected, torch.cat([others, rows[[5, 2]], others, rows[5:6]]))
    assert (check.rows, check.unequal) == (3, 0)
    check.add_somewhere(expected, torch.cat([others, rows[[2, 5]]]))  # the row that occurs twice is there once
    assert (check.rows, check.unequal) == (6, 2)
    changed = rows[2:3].clone()
    changed[0, 2999] += 0.5
    check = module.BitCheck(17)
    check.add_somewhere(expected[:1], torch.cat([others, changed]))
    assert (check.unequal, check.max_difference) == (1, float((rows[2].double() - changed[0].double()).abs().max()))
    check.add_somewhere(torch.full((1, 3000), torch.nan).bfloat16(), others)
    assert (check.unequal, check.max_difference) == (2, math.inf)


def test_logits_that_compare_nothing_are_refused():
    module = importlib.import_module("logit_bits")
    module.check_distinct(torch.randn(5, 100))
    with pytest.raises(ValueError, match="most rows of logits are the same"):
        module.check_distinct(torch.randn(1, 100).expand(6, -1))
    with pytest.raises(ValueError, match="most rows of logits are the same"):
        module.check_distinct(torch.randn(6, 1).expand(-1, 100))
    with pytest.raises(ValueError, match="not finite"):
        module.check_distinct(torch.full((2, 9), torch.nan))


def test_the_recorder_keeps_copies():
    """Logits and hidden states are kept inside the block only, whole, and as they were."""
    module = importlib.import_module("logit_bits")
    buffer = torch.zeros(2, 4)
    recorder = module.LogitRecorder()
    function = recorder.wrap(lambda states: buffer[: len(states), :3].copy_(states))
    states = torch.full((2, 3), 7.0)
    function(states)
    with recorder:
        for take in (recorder.take, recorder.take_hidden_states):
            with pytest.raises(RuntimeError, match="computed no logits"):
                take()
        function(states.fill_(1))
        function(states.fill_(2))
        assert recorder.take().tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
        for value in (3, 4, 5):
            function(states.fill_(value)[: 1 if value == 4 else 2])
        assert recorder.take_hidden_states().tolist() == [[3.0] * 3] * 2 + [[5.0] * 3] * 2
        function(states.fill_(5))
        assert recorder.take().tolist() == [[5.0] * 3] * 2
    function(states)
    assert recorder._rows is None and not recorder._hidden_states


@pytest.mark.slow
def test_hidden_states_are_compared_with_float32(tmp_path):
    """An engine's model joins the projections and pads the vocabulary; its weights have the values of their names."""
    transformers = pytest.importorskip("transformers")
    module, models = importlib.import_module("float32_model"), importlib.import_module("engine_models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen3Config(**sizes, head_dim=16, num_hidden_layers=2, vocab_size=50)
    config.save_pretrained(tmp_path)
    model = transformers.Qwen3Model(config).eval()
    starts = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 64), "v_proj": ("qkv_proj", 96)}
    starts |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 96)}
    rows = {"qkv_proj": 128, "gate_up_proj": 192, "embed_tokens": 64}

    def in_engine(name: str) -> tuple[str, int]:
        part = name.split(".")[-2]
        whole, start = starts.get(part, (part, 0))
        return "model." + name.replace(part, whole), start

    found = {}
    for name, parameter in model.named_parameters():
        engine_name, _ = in_engine(name)
        count = rows.get(engine_name.split(".")[-2], len(parameter))
        found[engine_name] = torch.empty(count, *parameter.shape[1:], dtype=torch.bfloat16)
    models.seed_weights(found.items())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            engine_name, start = in_engine(name)
            parameter.copy_(found[engine_name][start : start + len(parameter)])
        tokens = [3, 1, 4, 1, 5]
        states = model(torch.tensor([tokens])).last_hidden_state[0]
    file = tmp_path / "expected.pt"

    def error(states: torch.Tensor, parameters: dict[str, torch.Tensor] = found, file: Path = file) -> float:
        return module.hidden_state_error(states, str(tmp_path), parameters, tokens, file)

    missing = {name: p for name, p in found.items() if name != "model.layers.1.mlp.gate_up_proj.weight"}
    with pytest.raises(RuntimeError, match=r"ValueError: the engine's model has no model.layers.1.mlp.gate_up_proj.w"):
        error(states, missing)
    assert error(states) < 1e-6 and file.exists()
    assert error(states[:4] * 1.25, {}) == pytest.approx(0.25, rel=1e-5), "the file is read"
    assert error(states[[0, 1, 2, 4]]) > 0.1
    with pytest.raises(ValueError, match=r"^hidden states of 5 tokens were expected, got 3$"):
        error(states[:3])


def test_weights_depend_on_names_only():
    module = importlib.import_module("engine_models")
    made = {name: torch.empty(size) for name, size in {"a.norm.weight": 512, "b.bias": 512, "w": (64, 64)}.items()}
    module.seed_weights(made.items())
    again = {name: torch.empty_like(parameter) for name, parameter in reversed([*made.items(), ("more", made["w"])])}
    module.seed_weights(again.items())
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert abs(float(made["a.norm.weight"].mean()) - 1) < 0.05 and abs(float(made["b.bias"].mean())) < 0.01
    assert float(made["w"].std()) == pytest.approx(0.02, rel=0.1) and not torch.equal(again["more"], made["w"])


def test_models(models, tmp_path):
    """The generated config is read by transformers, with the sizes that the estimate and the KV cache need."""
    module = importlib.import_module("engine_models")
    assert module.find_model(models, "small", tmp_path) == models / "small"
    assert module.read_config(models / "small")["head_dim"] == 16
    found = module.find_model(models, "llama-3.2-1b", tmp_path / "generated")
    config = module.read_config(found)
    assert module.count_parameters(config) == pytest.approx(1.2358e9, rel=1e-3)  # as the model's card says
    assert module.cache_bytes(config, 10) == 10 * 16 * 2 * 8 * 64 * 2
    with pytest.raises(ValueError, match=r"^model must be one of llama-3.2-1b, small .* got 'x'$"):
        module.find_model(models, "x", tmp_path)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoConfig.from_pretrained(found)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(model)
    assert sum(p.numel() for p in built.parameters() if p.dim() > 1) == module.count_parameters(config)


def test_the_entry_point_of_a_checkout(tmp_path, monkeypatch):
    """A group without jitnorm gets it, in this process and in those that it starts."""
    module = importlib.import_module("engine_models")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "/first")
    entry = module.find_plugin("no.such.group", "json:dumps", tmp_path)
    assert entry.name == "jitnorm" and entry.load() is json.dumps
    again = module.find_plugin("no.such.group", "json:loads", tmp_path)
    assert again.load() is json.dumps, "the one that is there is used"
    code = "from importlib.metadata import entry_points; print(entry_points(group='no.such.group'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "json:dumps" in done.stdout, done


@pytest.fixture
def serve(monkeypatch, models, tmp_path):
    """Return a function that starts the server of these tests with a behaviour, as `vllm serve` is started."""
    pytest.importorskip("transformers")
    pytest.importorskip("httpx_sse")
    module = importlib.import_module("vllm_serve")
    started = []

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))

    def start(behaviour: str, plugin: bool = True):
        script = str(Path(__file__).parent / "tiny_server.py")
        monkeypatch.setattr(
            module, "command_line", lambda model, port, _: [sys.executable, script, str(port), behaviour]
        )
        popen = module.subprocess.Popen
        monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
        return module.VllmServer(str(models / "small"), "default", plugin, [1, 3], 8, 7, 5, 0, 10**6, 500)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_server_is_measured(serve):
    server = serve("good")
    server.prepare()
    assert server.describe() == {"plugin": "jitnorm: jitnorm's plugin in vLLM, Tiny: replaced 3 modules, left 0"}
    found = server.decode(3)
    assert found.keys() == {"first token", "between tokens", "all tokens"}
    assert server.begin <= time.monotonic()
    assert 0 < found["first token"] <= found["all tokens"] and found["between tokens"] > 0


def test_a_server_that_ends_says_why(serve, capfd):
    with pytest.raises(RuntimeError, match=r"^vllm serve ended with status 1: .*no such option"):
        serve("fails")
    assert "no such option" in capfd.readouterr().out, "the log of the process has it"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("silent", "the plugin replaced nothing: the server's output"),
        ("nothing", "the plugin replaced nothing: the server's output"),
        ("short", "^1 requests of 5 tokens got 4 together$"),
    ],
)
def test_a_server_that_does_something_else_is_not_measured(serve, behaviour, message):
    with pytest.raises(RuntimeError, match=message):
        serve(behaviour).prepare()


def test_the_command_of_a_server(tmp_path):
    module, step = importlib.import_module("vllm_serve"), importlib.import_module("vllm_step")
    command = module.command_line(tmp_path, 81, step.llm_arguments("m", False, [1], 8, 32, 10**9))
    options = dict(itertools.pairwise(command))
    assert (
        command[3:5] == ["serve", str(tmp_path)] and options["--port"] == "81" and options["--load-format"] == "dummy"
    )
    assert "--no-enable-prefix-caching" in command and options["--kv-cache-memory-bytes"] == "1000000000"
    assert json.loads(options["--compilation-config"])["max_cudagraph_capture_size"] == 8


def test_vllm_knows_the_arguments():
    """Compare the names with those of the installed vLLM: its LLM takes any, and refuses the unknown at run time."""
    engine_args = pytest.importorskip("vllm.engine.arg_utils", reason="vLLM is not installed")
    found = importlib.import_module("vllm_step").llm_arguments("m", False, [1, 16], 16, 32, 10**9)
    assert found.keys() <= {field.name for field in dataclasses.fields(engine_args.EngineArgs)}
    assert found["max_num_batched_tokens"] == 8192 and found["compilation_config"]["cudagraph_capture_sizes"][-1] == 16


def test_sglang_knows_the_arguments():
    server_args = pytest.importorskip("sglang.srt.server_args", reason="SGLang is not installed")
    found = importlib.import_module("sglang_step").server_arguments("m", True, [1, 16], 16, 10**5, "cuda")
    assert found.keys() <= {field.name for field in dataclasses.fields(server_args.ServerArgs)}


def test_the_parts_of_the_hosts_time(monkeypatch):
    """Each function of vLLM is called as before, and the median of its calls is a row."""
    module = importlib.import_module("vllm_host")
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    llm = types.SimpleNamespace()
    for path in module.PARTS.values():
        owner = llm
        for name in path.split(".")[:-1]:
            owner = owner.__dict__.setdefault(name, types.SimpleNamespace())
        setattr(owner, path.rpartition(".")[2], lambda *given, path=path, **named: calls.append((path, given, named)))
    engine = object.__new__(module.HostEngine)
    engine.llm, engine.times = llm, module.record_times(llm)
    engine.times["inputs"].append(7.0)  # of a sample before

    def decode(self, batch):
        for _ in range(batch):
            llm.llm_engine.engine_core.engine_core.scheduler.schedule(1, named=2)
        return {"decode step": 50.0, "decode graph": 20.0}

    monkeypatch.setattr(module.VllmEngine, "decode", decode)
    assert engine.decode(3) == {"decode step": 50.0, "schedule": 1.0}
    assert calls == [(module.PARTS["schedule"], (1,), {"named": 2})] * 3


def test_a_decode_step_of_vllm_is_the_median(monkeypatch):
    """The first step is the prefill; a step without tokens, as of a scheduler that runs ahead, belongs to the next."""
    module = importlib.import_module("vllm_step")
    clock = iter([10.0, 12.0, 12.5, 15.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    outputs = (types.SimpleNamespace(outputs=tokens) for tokens in (["first"], [], ["second"], ["third"], ["last"]))
    engine = object.__new__(module.VllmEngine)
    engine.prompt, engine.tokens, engine.vocab_size = 3, 4, 7
    core = types.SimpleNamespace(get_output=lambda: next(outputs))
    engine.step_ends = module.record_steps(core)
    engine.step_ends.append(-1.0)  # of a sample before
    monkeypatch.setattr(engine, "_generate", lambda prompts, tokens: [core.get_output() for _ in range(5)])
    monkeypatch.setattr(engine, "_graph_seconds", lambda batch: None)
    assert engine.decode(2) == {"decode step": 2.0}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_entry_point_is_that_of_the_package(script):
    tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    engine = importlib.import_module(script).ENGINE
    if engine.plugin_group not in project.get("entry-points", {}):
        pytest.skip(f"the package has no plugin in {engine.plugin_group}")
    assert project["entry-points"][engine.plugin_group]["jitnorm"] == engine.plugin_target


def test_estimates_grow_with_the_work(models):
    engine_options, module = importlib.import_module("engine_options"), importlib.import_module("vllm_step")
    engine_models = importlib.import_module("engine_models")
    parser = engine_options.create_parser(module.ENGINE, "")

    def estimate(*words: str, config=engine_models.LLAMA_3_2_1B) -> float:
        return engine_options.estimate_seconds(config, parser.parse_args(["--models", str(models), *words]))

    small = estimate()
    assert 60 < small < 300
    for words in (["--prefill"], ["--perplexity"], ["--startup", "3"], ["--mode", "default,batch_invariant"]):
        assert estimate(*words) > small
    assert estimate("--mode", "batch_invariant", "--check-bits") > estimate("--mode", "batch_invariant")
    assert estimate("--lines", "stock") < small < estimate(config=engine_models.LLAMA_3_2_1B | {"hidden_size": 8192})

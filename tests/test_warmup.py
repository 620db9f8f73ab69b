"""Building ahead of time: what is planned from sizes and configs, and what comes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import jitnorm
from jitnorm.cli import main
from jitnorm.jit import load, locations
from jitnorm.rmsnorm import _rmsnorm_kernel_class
from jitnorm.warmup import make_plan
from jitnorm.warmup.config import read_config

CONFIGS = Path(__file__).parent / "configs"
DEEPSEEK = {"model_type": "deepseek_v3", "hidden_size": 7168, "q_lora_rank": 1536, "kv_lora_rank": 512}
OLMO2 = {"model_type": "olmo2", "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}


def command(*words: object, exit_code: int = 0) -> Result:
    """`jitnorm warmup ...`, in this process; an exit code is one that was meant, never a traceback's."""
    result = CliRunner().invoke(main, ["warmup", *map(str, words)])
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    assert result.exit_code == exit_code, result.output
    return result


def config_file(tmp_path: Path, **config: object) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    return file


def refusal(hidden_size: int) -> str:
    with pytest.raises(RuntimeError) as raised:
        _rmsnorm_kernel_class(hidden_size)
    return str(raised.value)


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A host compiler that runs `script` before each build."""
    real = shutil.which("c++")
    wrapper = tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--version*) ;; *)\n{script}\n;; esac\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))


# Which sizes a model has


@pytest.mark.parametrize(
    ("name", "sizes", "dtype"),
    [
        ("llama.json", [4096], "bfloat16"),
        ("qwen3.json", [5120, 128], "bfloat16"),  # q and k norms over head_dim
        ("gemma.json", [3584], "float32"),  # Gemma 2 has a head_dim, and no q and k norms
        ("gemma3.json", [2560, 256], "bfloat16"),  # text_config, its head_dim left out; the dtype is outside
    ],
)
def test_configs(name, sizes, dtype):
    norms = read_config(CONFIGS / name)
    assert (norms.hidden_sizes, norms.dtype) == (sizes, dtype)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (OLMO2, [5120, 1024]),  # over all heads at once
        (DEEPSEEK, [7168, 1536, 512]),
        ({**DEEPSEEK, "q_lora_rank": None}, [7168, 512]),
        ({"model_type": "glm4_moe", "hidden_size": 5120, "head_dim": 128, "use_qk_norm": True}, [5120, 128]),
        ({"model_type": "glm4_moe", "hidden_size": 4096, "head_dim": 128, "use_qk_norm": False}, [4096]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32}, [2048, 64]),
        ({"model_type": "llama", "hidden_size": 128, "head_dim": 128}, [128]),
    ],
)
def test_sizes_of_other_families(tmp_path, config, sizes):
    assert read_config(config_file(tmp_path, **config).parent).hidden_sizes == sizes


@pytest.mark.parametrize(
    ("config", "head_dims"),
    [
        (json.loads((CONFIGS / "qwen3.json").read_text()), [128]),
        (json.loads((CONFIGS / "llama.json").read_text()), []),
        (OLMO2, []),  # over all heads at once, which is no work for the kernel of single heads
        ({"model_type": "qwen3", "hidden_size": 128, "head_dim": 128}, [128]),
    ],
)
def test_sizes_of_single_heads(tmp_path, config, head_dims):
    file = config_file(tmp_path, **config)
    assert read_config(file).head_dims == head_dims
    plan = make_plan(op=["rmsnorm", "fused_inplace_qknorm"], config=file, dtype="fp16", device="cpu")
    assert [s.name for s in plan.specs if s.op == "fused_inplace_qknorm"] == [
        f"fused_inplace_qknorm_{d}_fp16" for d in head_dims
    ]
    assert {s.name for s in plan.specs} >= {f"rmsnorm_{h}_fp16" for h in read_config(file).hidden_sizes}
    missing = [f"{file} has no norms of single heads, which fused_inplace_qknorm is for"]
    assert plan.refused == ([] if head_dims else missing)


@pytest.mark.parametrize(
    ("config", "ops"),
    [
        (json.loads((CONFIGS / "qwen3.json").read_text()), ["silu_and_mul_bf16", "store_cache"]),
        (json.loads((CONFIGS / "gemma.json").read_text()), ["gelu_tanh_and_mul_fp32", "store_cache"]),
        (
            {"hidden_size": 64, "hidden_act": "gelu", "intermediate_size": 3420, "dtype": "float16"},
            ["gelu_and_mul_fp16_by_8", "store_cache"],  # heads unknown: rows of whole 16 bytes
        ),
        (
            {**DEEPSEEK, "hidden_act": "relu2", "qk_rope_head_dim": 66, "dtype": "bfloat16"},
            ["store_cache", "store_cache_by_4"],
        ),
    ],
)
def test_activations_and_caches(tmp_path, config, ops):
    names = ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "store_cache"]
    plan = make_plan(op=names, config=config_file(tmp_path, **config), device="cpu")
    assert sorted(s.name for s in plan.specs) == sorted(ops)
    assert len(plan.refused) == len(names) - len({s.op for s in plan.specs})
    assert all("config.json has no hidden_act" in line for line in plan.refused)


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("architectures", {"a": 1}, "a list of names"),
        ("architectures", [1], "a list of names"),
        ("model_type", 3, "text"),
        ("hidden_act", ["silu"], "text"),
        ("torch_dtype", ["bf16"], "text"),
        ("torch_dtype", 16, "text"),
        ("torch_dtype", "float8", "float16, bfloat16 or float32"),
        ("hidden_size", "4096", "a whole number above 0"),
        ("hidden_size", True, "a whole number above 0"),
        ("num_attention_heads", "32", "a whole number above 0"),
        ("num_attention_heads", -1, "a whole number above 0"),
        ("head_dim", "128", "a whole number above 0"),
        ("q_lora_rank", "1536", "a whole number above 0"),
        ("intermediate_size", 14336.0, "a whole number above 0"),
    ],
)
def test_keys_of_a_wrong_type(cache_dir, tmp_path, key, value, needed):
    file = config_file(tmp_path, **{"hidden_size": 4096, key: value})
    said = command("--config", file, "--device", "cpu", exit_code=1).stderr
    assert said.startswith(f"Error: {file}: ") and said.count("\n") == 1
    assert key in said and f" must be {needed}, got {value!r}" in said
    assert not cache_dir.exists()


LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "dtype": "float16"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA, []),  # its activation is known
        ({**LLAMA, "model_type": "qwen2"}, []),
        ({**LLAMA, "model_type": "mistral"}, []),
        ({**LLAMA, "model_type": "phi3"}, ["has no hidden_act: no activation is built (--op names one)"]),
        ({**LLAMA, "hidden_act": "relu2"}, ["has hidden_act 'relu2', which no kernel serves: no activation is built"]),
        ({**LLAMA, "intermediate_size": 0}, ["has no intermediate_size: no activation is built (--op names one)"]),
        ({**LLAMA, "dtype": None}, ["has no dtype: bf16 is built (--dtype names another)"]),
        ({**LLAMA, "model_type": "newest", "hidden_act": "silu"}, ["has model_type 'newest', which is not known here"]),
        ({**LLAMA, "model_type": None, "hidden_act": "silu"}, ["has no model_type"]),
    ],
)
def test_notes_on_what_a_config_leaves_out(cache_dir, tmp_path, monkeypatch, config, says):
    file = config_file(tmp_path, **config)
    monkeypatch.setattr("jitnorm.cli.warmup._build", lambda *_: None)
    *said, on_patch = command("--config", file, "--device", "cpu").stderr.splitlines()
    assert "patch_transformers replaces" in on_patch
    assert len(said) == len(says)
    assert all(line.startswith(f"note: {file} {start}") for line, start in zip(said, says, strict=True))
    plan = make_plan(op="silu_and_mul", dtype="bf16", config=file, device="cpu")
    assert not plan.notes  # all that was asked for is built, or refused
    assert bool(plan.refused) == (config.get("hidden_act") == "relu2")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA, "the norms alone, which call rmsnorm: other code calls fused_add_rmsnorm, silu_and_mul, store_cache"),
        (
            {**LLAMA, "model_type": "gemma3_text", "head_dim": 64},
            "the norms alone, which call gemma_rmsnorm: "
            "other code calls gemma_fused_add_rmsnorm, gelu_tanh_and_mul, store_cache",
        ),
        ({**LLAMA, "model_type": "glm4_moe"}, "no module of this model_type: other code calls these"),
        ({**LLAMA, "model_type": None}, "no module of this model_type: other code calls these"),
    ],
)
def test_says_what_patch_transformers_does_not_call(tmp_path, config, says):
    file = config_file(tmp_path, **config)
    assert make_plan(config=file, device="cpu").notes[-1] == f"{file}: patch_transformers replaces {says}"
    assert not make_plan(op="rmsnorm", config=file, device="cpu").notes


def test_widths_of_every_layer(tmp_path):
    file = config_file(tmp_path, **{**LLAMA, "intermediate_size": [64, 64, 96]})
    assert read_config(file).intermediate_sizes == [64, 96]


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_bad_configs_are_one_clear_line(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=str(file)) as raised:
        read_config(file)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"elsewhere.*No such file"):
        read_config(tmp_path / "elsewhere")


# What is planned


def test_plan_is_the_product():
    plan = make_plan(
        hidden_size=[64, 4096], dtype=["bf16", torch.float16], weight_dtype=["fp32"], arch=["9.0a", "sm_80"]
    )
    assert len(plan.specs) == 8 and not plan.refused
    assert {s.target.sm for s in plan.specs} == {"sm_90a", "sm_80"}
    assert {s.name for s in plan.specs} == {
        f"rmsnorm_{h}_{d}_fp32_weight" for h in (64, 4096) for d in ("bf16", "fp16")
    }


@pytest.mark.parametrize(
    ("arch", "sm"),
    [
        ("9.0a", "sm_90a"),
        ("90", "sm_90a"),
        ("sm_90a", "sm_90a"),
        ("sm90a", "sm_90a"),
        ("8.6", "sm_86"),
        ("12.0", "sm_120a"),
        ("120", "sm_120a"),
        ("sm_103f", "sm_103f"),
        (8.9, "sm_89"),
    ],
)
def test_architectures(arch, sm):
    assert [s.target.sm for s in make_plan(hidden_size=64, arch=arch).specs] == [sm]


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        *((major, f"is '{major}.0' meant") for major in ("9", "10", "11", "12")),
        ("sm_12", r"is '12\.0' meant"),
        ("10a", r"is '10\.0a' meant"),
        *(
            (arch, "must be a CUDA architecture")
            for arch in ("1200", "9.0b", "9.", ".9", "sm_", "9.0+PTX", "\u0669.\u0660")
        ),
        *((arch, r"must be 7\.5 or later") for arch in ("60", "sm_35", "1.2", "7.0")),
    ],
)
def test_architectures_that_are_none(arch, says):
    with pytest.raises(ValueError, match=says):
        make_plan(hidden_size=64, arch=arch)
    assert re.search(says, command("--hidden-size", 64, "--arch", arch, exit_code=1).stderr)


def test_lists_as_people_type_them(monkeypatch):
    plans = []
    monkeypatch.setattr("jitnorm.cli.warmup.survey", lambda specs: plans.append(specs) or (specs, []))
    command("--hidden-size", "512,1024", "--hidden-size", "64, 128", "--arch", "9.0,8.0", "--dtype", "bf16,fp16")
    assert len(plans[0]) == 4 * 2 * 2 and {s.target.sm for s in plans[0]} == {"sm_90a", "sm_80"}
    command("--op", "rmsnorm,gemma_rmsnorm", "--hidden-size", 64, "--weight-dtype", "bf16,fp32", "--device", "cpu")
    assert [s.name for s in plans[1]] == [
        f"{op}_64_bf16{weight}" for op in ("rmsnorm", "gemma_rmsnorm") for weight in ("", "_fp32_weight")
    ]
    for option, bad in (("--hidden-size", "512,,1024"), ("--hidden-size", ""), ("--dtype", "bf16,int8"), ("--op", ",")):
        assert f"Invalid value for '{option}'" in command("--hidden-size", 64, option, bad, exit_code=2).stderr


def test_a_wrong_operator_is_named_first():
    said = command("--hidden-size", "wide", "--dtype", "int8", "--op", "softmax", exit_code=2).stderr
    assert "Invalid value for '--op': 'softmax' is not one of" in said


def test_options_that_no_operator_takes():
    for words, says in (
        (
            ["--op", "per_token_quant_fp8", "--hidden-size", 4096],
            "--hidden-size is not accepted: per_token_quant_fp8 has",
        ),
        (["--op", "per_token_quant_fp8,per_tensor_quant_fp8", "--hidden-size", 4096], "per_tensor_quant_fp8 have one"),
        (
            ["--op", "silu_and_mul", "--weight-dtype", "fp32"],
            "--weight-dtype is not accepted: silu_and_mul has no weight",
        ),
    ):
        assert says in command(*words, "--device", "cpu", exit_code=2).stderr
    # A size that one of them takes is not ignored.
    plan = make_plan(op=["rmsnorm", "per_token_quant_fp8"], hidden_size=64, dtype="bf16", device="cpu")
    assert [s.name for s in plan.specs] == ["rmsnorm_64_bf16", "per_token_quant_fp8_bf16"]


def test_plan_of_one_kernel_asked_for_twice():
    plan = make_plan(hidden_size=[64, 64], dtype=["bf16", "bfloat16", "torch.bfloat16"], device="cpu")
    assert [s.name for s in plan.specs] == ["rmsnorm_64_bf16"]


def test_config_brings_its_dtype():
    plan = make_plan(op="gemma_rmsnorm", config=CONFIGS / "gemma.json", device="cpu")
    assert [s.name for s in plan.specs] == ["gemma_rmsnorm_3584_fp32"]
    plan = make_plan(op="gemma_rmsnorm", config=CONFIGS / "gemma.json", dtype="bf16", device="cpu")
    assert [s.name for s in plan.specs] == ["gemma_rmsnorm_3584_bf16"]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("llama.json", "rmsnorm_4096 fused_add_rmsnorm_4096 silu_and_mul"),
        (
            "qwen3.json",
            "rmsnorm_5120 rmsnorm_128 fused_add_rmsnorm_5120 fused_inplace_qknorm_128 silu_and_mul",
        ),
        ("gemma.json", "gemma_rmsnorm_3584 gemma_fused_add_rmsnorm_3584 gelu_tanh_and_mul"),
        # Its q and k norms add one to the weight, too; heads and activation are left out.
        ("gemma3.json", "gemma_rmsnorm_2560 gemma_rmsnorm_256 gemma_fused_add_rmsnorm_2560 gelu_tanh_and_mul"),
    ],
)
def test_all_that_a_model_calls(name, kernels):
    plan = make_plan(config=CONFIGS / name, dtype="fp16", device="cpu")
    assert [s.name for s in plan.specs] == [*(f"{kernel}_fp16" for kernel in kernels.split()), "store_cache"]
    assert not plan.refused


def test_operators_that_need_no_size(cache_dir):
    plan = make_plan(op=["silu_and_mul", "store_cache"], dtype=["fp16", "bf16"], device="cpu")
    assert [s.name for s in plan.specs] == ["silu_and_mul_fp16", "silu_and_mul_bf16", "store_cache"]
    plan = make_plan(op=["silu_and_mul", "store_cache"], hidden_size=[3420, 2], dtype="bf16", device="cpu")
    assert [s.name for s in plan.specs] == [
        "silu_and_mul_bf16_by_8",
        "silu_and_mul_bf16_by_4",
        "store_cache_by_8",
        "store_cache_by_4",
    ]
    for spec in plan.specs:  # what the messages tell a user to run builds the same
        again = command(*spec.warmup_command.split()[2:])
        assert f"built    {spec.name}" in again.stdout
    for op in ("silu_and_mul", "store_cache"):
        with pytest.raises(RuntimeError, match="supported are multiples of"):
            make_plan(op=op, hidden_size=7, dtype="bf16", device="cpu")
    with pytest.raises(ValueError, match="hidden_size or config"):
        make_plan(op=["silu_and_mul", "rmsnorm"])


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ({}, ValueError, "hidden_size or config$"),
        ({"hidden_size": 64, "config": "x"}, ValueError, "hidden_size or config, not both"),
        ({"config": ""}, ValueError, "config must be"),
        ({"hidden_size": 64, "op": "softmax"}, ValueError, "rmsnorm"),
        ({"op": "softmax"}, ValueError, r"op must be one of .*, got 'softmax'"),  # the first of all complaints
        ({"op": "softmax", "config": "nowhere"}, ValueError, "op must be one of"),
        ({"op": ["rmsnorm", "softmax"], "hidden_size": "64", "dtype": "int8"}, ValueError, "op must be one of"),
        ({"op": [["rmsnorm"]], "hidden_size": 64}, ValueError, "op must be one of"),
        (
            {"op": "per_token_quant_fp8", "hidden_size": 4096},
            ValueError,
            "hidden_size is not accepted: per_token_quant",
        ),
        ({"op": "silu_and_mul", "weight_dtype": "fp32"}, ValueError, "weight_dtype is not accepted: silu_and_mul has"),
        ({"hidden_size": 64, "arch": ""}, ValueError, "arch must be a CUDA architecture"),
        ({"hidden_size": 64, "arch": "12"}, ValueError, r"'9\.0a', '90a' or 'sm_90a', got '12': is '12\.0' meant\?"),
        ({"hidden_size": 64, "arch": 9}, ValueError, r"got 9: is '9\.0' meant\?"),
        ({"hidden_size": 64, "dtype": "int8"}, TypeError, "fp16, bf16, fp32"),
        ({"hidden_size": 64, "dtype": "bf16", "weight_dtype": "fp16"}, TypeError, "weights"),
        ({"hidden_size": 64, "dtype": [["bf16"]]}, TypeError, "fp16, bf16, fp32"),
        ({"hidden_size": 64.0}, TypeError, r"hidden_size must be an int, got 64\.0"),
        ({"hidden_size": "64"}, TypeError, "hidden_size must be an int, got '64'"),
        ({"hidden_size": 64, "device": "cpu", "arch": "9.0a"}, ValueError, "arch"),
        ({"hidden_size": 64, "arch": "hopper"}, ValueError, "9.0a"),
        ({"hidden_size": 64, "arch": "6.0"}, ValueError, r"\(--arch\) must be 7\.5 or later, got '6\.0'"),
        ({"hidden_size": 64, "jobs": 0}, ValueError, "jobs"),
        ({"hidden_size": 64, "jobs": "2"}, TypeError, "jobs must be an int, got '2'"),
    ],
)
def test_wrong_words(cache_dir, words, error, says):
    with pytest.raises(error, match=says):
        jitnorm.warmup(**words)
    assert not cache_dir.exists()


@pytest.mark.parametrize("hidden_size", [0, -256, 300, 16384])
def test_unsupported_size_builds_nothing(cache_dir, hidden_size):
    with pytest.raises(RuntimeError) as raised:
        jitnorm.warmup(hidden_size=[64, hidden_size], device="cpu")
    assert str(raised.value) == refusal(hidden_size)
    said = command("--hidden-size", 64, "--hidden-size", hidden_size, "--device", "cpu", exit_code=1)
    assert said.stderr == f"Error: {refusal(hidden_size)}\n" and not said.stdout
    assert not cache_dir.exists()


# What comes of it


def test_builds_what_a_call_then_finds(cache_dir, monkeypatch):
    first = jitnorm.warmup(op="rmsnorm", hidden_size=[64, 512], dtype="bf16", device="cpu")
    assert [s.name for s in sorted(first.built, key=str)] == ["rmsnorm_512_bf16", "rmsnorm_64_bf16"]
    assert not (first.cached or first.refused or first.failed)
    again = jitnorm.warmup(hidden_size=[64, 512, 768], dtype="bf16", device="cpu")
    assert [s.name for s in again.cached] == ["rmsnorm_64_bf16", "rmsnorm_512_bf16"]
    assert [s.name for s in again.built] == ["rmsnorm_768_bf16"]
    assert str(again) == "1 built, 2 cached, 0 refused, 0 failed"
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    x, weight = torch.randn(3, 512).bfloat16(), torch.ones(512).bfloat16()
    assert jitnorm.rmsnorm(x, weight).isfinite().all()


def test_builds_what_a_call_on_heads_then_finds(cache_dir, monkeypatch):
    result = jitnorm.warmup(op="fused_inplace_qknorm", hidden_size=128, dtype="bf16", weight_dtype="fp32", device="cpu")
    assert [s.warmup for s in result.built] == [
        "--op fused_inplace_qknorm --hidden-size 128 --dtype bf16 --weight-dtype fp32"
    ]
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    q, k, weight = torch.randn(3, 4, 128).bfloat16(), torch.randn(3, 2, 128).bfloat16(), torch.ones(128)
    jitnorm.fused_inplace_qknorm(q, k, weight, weight)
    with pytest.raises(RuntimeError, match="--op fused_inplace_qknorm --hidden-size 128 --dtype bf16 --device cpu"):
        jitnorm.fused_inplace_qknorm(q, k, weight.bfloat16(), weight.bfloat16())


def test_disable_jit_does_not_forbid_it(cache_dir, monkeypatch):
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    assert len(jitnorm.warmup(hidden_size=64, device="cpu").built) == 1


def test_damaged_entry_is_built_again(cache_dir):
    spec = jitnorm.warmup(hidden_size=64, device="cpu").built[0]
    load.find(spec, mark_in_use=False).library.write_bytes(b"not a library")
    again = jitnorm.warmup(hidden_size=64, device="cpu")
    assert again.built == [spec] and load.find(spec, mark_in_use=False)


def test_loads_nothing_and_keeps_nothing_open(cache_dir, monkeypatch):
    monkeypatch.setattr(load, "_open", lambda *_: pytest.fail("a library was loaded"))
    jitnorm.warmup(hidden_size=64, device="cpu")  # what opens files once, such as the clock's zone
    before = len(os.listdir("/proc/self/fd"))
    jitnorm.warmup(hidden_size=[64, 128, 256, 512], device="cpu")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(entry.in_use() for entry in locations.readable().entries())


@pytest.mark.parametrize(("jobs", "built"), [(2, 2), (1, 0)])
def test_jobs_run_together(cache_dir, tmp_path, monkeypatch, jobs, built):
    # Each build waits for another one, and fails where none starts.
    both = f"[ $(ls {tmp_path} | grep -c started) -ge 2 ]"
    wait = f"for i in $(seq 40); do {both} && break; sleep 0.02; done"
    rendezvous = f"touch {tmp_path}/$$.started; {wait}; {both} || {{ rm {tmp_path}/$$.started; exit 1; }}"
    compiler(tmp_path, monkeypatch, rendezvous)
    result = jitnorm.warmup(hidden_size=[64, 128], device="cpu", jobs=jobs)
    assert len(result.built) == built and len(result.failed) == 2 - built


def test_one_failure_does_not_stop_the_others(cache_dir, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'grep -q "<128," module.cc && { echo "x.h:1:2: error: boom"; exit 1; }')
    said = command("--hidden-size", 64, "--hidden-size", 128, "--device", "cpu", exit_code=1)
    assert "built    rmsnorm_64_bf16" in said.stdout and "1 built, 0 cached, 0 refused, 1 failed" in said.stdout
    assert "failed   rmsnorm_128_bf16" in said.stderr and "boom" in said.stderr


def test_a_compiler_that_writes_nothing_is_named(cache_dir, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 0")
    (_, why), *_ = jitnorm.warmup(hidden_size=64, device="cpu").failed
    assert f"the compiler {tmp_path / 'compiler'} wrote no library" in why and "\n" not in why


def test_no_compiler_is_said_once(cache_dir, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    said = command("--hidden-size", 64, "--hidden-size", 128, "--device", "cpu", exit_code=1)
    assert said.stderr.count("C++ compiler") == 1 and "failed" not in said.output


@pytest.mark.parametrize(
    ("folder", "why"),
    [("file", "is not a folder"), ("file/cache", "is not a folder"), ("/proc/x", "No such file")],
)
def test_cache_that_cannot_be_kept_is_an_error(cache_dir, tmp_path, monkeypatch, folder, why):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda *_: True)  # as /proc has it, for root
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / folder))
    said = command("--hidden-size", 64, "--device", "cpu", exit_code=1)
    assert why in said.stderr and "JITNORM_CACHE_DIR" in said.stderr and "built" not in said.output
    with pytest.raises(RuntimeError, match=f"cannot keep kernels in .*{why}"):
        jitnorm.warmup(hidden_size=64, device="cpu")


def test_config_with_an_unsupported_size(cache_dir, tmp_path):
    config = config_file(tmp_path, model_type="qwen3", hidden_size=512, head_dim=96, dtype="float16")
    said = command("--op", "rmsnorm", "--config", config, "--device", "cpu", exit_code=1)
    assert said.output.index(f"refused  {refusal(96)}") < said.output.index("built    rmsnorm_512_fp16")
    assert "1 built, 0 cached, 1 refused, 0 failed" in said.stdout
    said = command("--op", "rmsnorm", "--config", config.parent, "--device", "cpu", "--skip-unsupported")
    assert "cached   rmsnorm_512_fp16" in said.stdout and refusal(96) in said.stderr
    result = jitnorm.warmup(op="rmsnorm", config=config, device="cpu")
    assert result.refused == [refusal(96)] and len(result.cached) == 1


def test_words_for_dtypes_are_those_of_python(cache_dir):
    said = command("--hidden-size", 64, "--dtype", "bfloat16", "--weight-dtype", "float32", "--device", "cpu")
    assert "built    rmsnorm_64_bf16_fp32_weight" in said.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_architecture_without_a_gpu(cache_dir):
    said = command("--hidden-size", 64, "--device", "cuda", exit_code=1)
    assert "arch='9.0a' (--arch 9.0a)" in said.stderr


def test_skip_unsupported_sizes(cache_dir):
    said = command("--hidden-size", 64, "--hidden-size", 96, "--device", "cpu", "--skip-unsupported")
    assert "1 built, 0 cached, 1 refused, 0 failed" in said.stdout


def test_usage_errors(cache_dir):
    for words, says in (
        ([], "give --hidden-size or --config\n"),
        (["--hidden-size", 64, "--config", "x"], "give --hidden-size or --config, not both\n"),
        (["--hidden-size", 64, "--jobs", 0], "--jobs"),
        (["--op", "softmax"], "--op"),
    ):
        said = command(*words, exit_code=2).stderr
        assert "Usage:" in said and says in said
    said = command("--config", "nowhere", exit_code=1)
    assert said.stderr.startswith("Error: cannot read nowhere") and said.stderr.count("\n") == 1
    said = command("--config", "", exit_code=1)
    assert said.stderr == "Error: config must be a file or a folder, got ''\n"
    assert not cache_dir.exists()


def test_as_a_module(cache_dir):
    words = [sys.executable, "-W", "error", "-m", "jitnorm.warmup", "--hidden-size", "64", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "1 built" in done.stdout, done
    assert not done.stderr  # no warning of runpy's, and no bar where there is no terminal


@pytest.mark.nvcc
def test_cuda_without_a_gpu(cache_dir):
    result = jitnorm.warmup(op="rmsnorm", hidden_size=4096, dtype="bf16", device="cuda", arch="9.0a")
    assert [s.target.sm for s in result.built] == ["sm_90a"] and not result.failed
    said = command("--hidden-size", 4096, "--dtype", "bf16", "--arch", "9.0a", "--arch", "9.9", exit_code=1)
    assert "cached   rmsnorm_4096_bf16  sm_90a" in said.stdout and "failed   rmsnorm_4096_bf16  sm_99" in said.stderr

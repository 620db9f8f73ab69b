"""Which kernels a warm-up builds, and which arguments it rejects."""

from __future__ import annotations

import re

import pytest
import torch

import jitnorm
from jitnorm.core.targets import resolve_target
from jitnorm.qknorm_rope_store import QK_NORM_ROPE_STORE, ROPE, STORE_HEADS
from jitnorm.warmup import make_plan

from .commands import CONFIGS, command, refusal

ROPE_CALL = {"op": "rope", "hidden_size": 128, "dtype": "bf16", "device": "cpu"}


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
    monkeypatch.setattr("jitnorm.cli.warmup.find_cached", lambda specs: plans.append(specs) or (specs, []))
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
        *(
            (
                ["--op", "rmsnorm,silu_and_mul", option, *value],
                f"{option} is not accepted: rmsnorm and silu_and_mul have no",
            )
            for option, *value in (
                *(("--rotary-dim", 64), ("--cos-sin-dtype", "fp32"), ("--interleaved",), ("--mrope",)),
                *(("--cache-dtype", "fp8"), ("--q-out-dtype", "fp8"), ("--rounding", "once")),
            )
        ),
        (["--rotary-dim", 64], "--rotary-dim is not accepted: rmsnorm has no rotation"),
        (["--op", "store_cache_heads", "--mrope"], "--mrope is not accepted: store_cache_heads has no rotation"),
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
        ("llama.json", "rmsnorm_4096 fused_add_rmsnorm_4096 fused_add_rmsnorm_round_sum_4096 rope_128 silu_and_mul"),
        (
            "qwen3.json",
            "rmsnorm_5120 rmsnorm_128 fused_add_rmsnorm_5120 fused_add_rmsnorm_round_sum_5120 "
            "fused_inplace_qknorm_128 qk_norm_rope_store_128 silu_and_mul",
        ),
        ("gemma.json", "gemma_rmsnorm_3584 gemma_fused_add_rmsnorm_3584 rope_256 gelu_tanh_and_mul"),
        # Its q and k norms add one to the weight, too; heads and activation are left out.
        (
            "gemma3.json",
            "gemma_rmsnorm_2560 gemma_rmsnorm_256 gemma_fused_add_rmsnorm_2560 "
            "gemma_fused_add_rmsnorm_round_sum_2560 qk_norm_rope_store_256 gelu_tanh_and_mul",
        ),
        # After MiniMaxAI/MiniMax-M2, Qwen/Qwen3-Next-80B-A3B-Instruct and Qwen/Qwen3-VL-8B-Instruct: a rotary_dim, a
        # quarter of a head that is rotated, three positions. Written here, not downloaded.
        (
            "minimax_m2.json",
            "rmsnorm_3072 rmsnorm_6144 rmsnorm_1024 fused_add_rmsnorm_3072 rope_128_fp16_rotary_64 silu_and_mul",
        ),
        (
            "qwen3_next.json",
            "gemma_rmsnorm_2048 gemma_rmsnorm_256 gemma_fused_add_rmsnorm_2048 gated_rmsnorm_128 "
            "qk_norm_rope_store_256_fp16_rotary_64 silu_and_mul",
        ),
        (
            "qwen3_vl.json",
            "rmsnorm_4096 rmsnorm_128 fused_add_rmsnorm_4096 fused_inplace_qknorm_128 qk_norm_rope_store_128 "
            "qk_norm_rope_store_128_fp16_mrope silu_and_mul",
        ),
    ],
)
def test_all_that_a_model_calls(name, kernels):
    plan = make_plan(config=CONFIGS / name, dtype="fp16", device="cpu")
    names = [kernel if "fp16" in kernel else f"{kernel}_fp16" for kernel in kernels.split()]
    assert [s.name for s in plan.specs] == [*names, "store_cache"]
    assert not plan.refused


# Each property of a kernel on heads alone, and all of them together.
VARIANTS = [
    {},
    {"weight_dtype": torch.float32},
    {"rotary_dim": 64},
    {"cos_sin_dtype": torch.float32},
    {"cache_dtype": torch.float8_e4m3fn},
    {"q_out_dtype": torch.float8_e4m3fn},
    {"is_neox": False},
    {"has_sections": True},
    {"rounds_each_step": True},
    {
        "weight_dtype": torch.float32,
        "rotary_dim": 64,
        "cos_sin_dtype": torch.float32,
        "cache_dtype": torch.float8_e4m3fn,
        "q_out_dtype": torch.float8_e4m3fn,
        "is_neox": False,
        "has_sections": True,
        "rounds_each_step": True,
    },
]


@pytest.mark.parametrize("op", [QK_NORM_ROPE_STORE, ROPE, STORE_HEADS], ids=lambda op: op.op)
def test_the_command_of_a_kernel_on_heads_builds_that_kernel(op, monkeypatch):
    plans = []
    monkeypatch.setattr("jitnorm.cli.warmup.find_cached", lambda specs: plans.append(specs) or (specs, []))
    names = set()
    for options in VARIANTS:
        options = {"weight_dtype": torch.bfloat16, **options}
        if op is STORE_HEADS:  # which rotates nothing and has no q
            options = {name: value for name, value in options.items() if name in ("weight_dtype", "cache_dtype")}
        for target in (resolve_target("cpu", None), resolve_target("cuda", "9.0a")):
            spec = op.spec(op.variant(128, torch.bfloat16, **options), target)
            names.add(spec.name)
            command(*spec.warmup_command.split()[2:])
            assert plans.pop() == [spec]
    has_weight = op is QK_NORM_ROPE_STORE
    assert len(names) == (2 if op is STORE_HEADS else len(VARIANTS) - 1 + has_weight)


def test_options_of_kernels_on_heads():
    plan = make_plan(
        op=["rope", "store_cache_heads", "rmsnorm"],
        hidden_size=128,
        dtype="fp16",
        device="cpu",
        rotary_dim=[64, 128],
        cache_dtype=["fp16", "float8_e4m3fn"],
        rounding=None,
    )
    assert [s.name for s in plan.specs] == [
        *(f"rope_128_fp16{rotary}{cache}" for rotary in ("_rotary_64", "") for cache in ("", "_fp8_cache")),
        *("store_cache_heads_128_fp16", "store_cache_heads_128_fp16_fp8_cache", "rmsnorm_128_fp16"),
    ]
    with pytest.raises(RuntimeError, match="rope does not support rotary_dim 72"):
        make_plan(op="rope", hidden_size=128, rotary_dim=72, device="cpu")


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
        ({"hidden_size": 64, "rotary_dim": 64}, ValueError, "rotary_dim is not accepted: rmsnorm has no rotation"),
        ({**ROPE_CALL, "rotary_dim": 0}, ValueError, "rotary_dim must be 1 or more, got 0"),
        ({**ROPE_CALL, "rotary_dim": "64"}, TypeError, "rotary_dim must be an int, got '64'"),
        ({**ROPE_CALL, "interleaved": 1}, TypeError, "interleaved must be True or False, got 1"),
        ({**ROPE_CALL, "mrope": "no"}, TypeError, "mrope must be True or False, got 'no'"),
        ({**ROPE_CALL, "rounding": "hf"}, ValueError, "rounding must be 'once' or 'each_step', got 'hf'"),
        ({**ROPE_CALL, "cos_sin_dtype": "fp8"}, TypeError, "cos_sin_dtype must be fp16, bf16, fp32, got fp8"),
        ({**ROPE_CALL, "cache_dtype": "int8"}, TypeError, "cache_dtype must be fp16, bf16, fp32, fp8, got int8"),
        ({**ROPE_CALL, "cos_sin_dtype": "fp16"}, TypeError, "cos_sin_dtype must be .*bfloat16 .* or .*float32, got"),
        ({**ROPE_CALL, "cache_dtype": "fp32"}, TypeError, "cache_dtype must be .*bfloat16 .* or .*e4m3fn, got"),
        ({**ROPE_CALL, "q_out_dtype": "fp16"}, TypeError, "q_out_dtype must be .*bfloat16 .* or .*e4m3fn, got"),
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

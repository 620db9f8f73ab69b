"""Which operators and sizes a model's config asks for."""

from __future__ import annotations

import json

import pytest
import torch

from jitnorm.warmup import make_plan
from jitnorm.warmup.config import HIDDEN_ACTS, read_config

from .commands import CONFIGS, DEEPSEEK, LLAMA, OLMO2, command, config_file


@pytest.mark.parametrize(
    ("name", "sizes", "dtype"),
    [
        ("llama.json", [4096], "bfloat16"),
        ("qwen3.json", [5120, 128], "bfloat16"),  # q and k norms over head_dim
        ("gemma.json", [3584], "float32"),  # Gemma 2 has a head_dim, and no q and k norms
        ("minimax_m2.json", [3072, 6144, 1024], "bfloat16"),  # q and k norms over all heads at once
        ("qwen3_next.json", [2048, 256], "bfloat16"),
        ("qwen3_vl.json", [4096, 128], "bfloat16"),  # text_config
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
            {**DEEPSEEK, "hidden_act": "relu6", "qk_rope_head_dim": 66, "dtype": "bfloat16"},
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
        ("rotary_dim", "64", "a whole number above 0"),
        ("partial_rotary_factor", "0.5", "a number above 0 and up to 1"),
        ("partial_rotary_factor", 1.5, "a number above 0 and up to 1"),
        ("partial_rotary_factor", True, "a number above 0 and up to 1"),
        ("rope_scaling", "linear", "an object"),
        ("rope_parameters", [1], "an object"),
    ],
)
def test_keys_of_a_wrong_type(cache_dir, tmp_path, key, value, needed):
    heads = {} if key == "num_attention_heads" else {"num_attention_heads": 32}  # what is rotated
    file = config_file(tmp_path, **{"hidden_size": 4096, **heads, key: value})
    said = command("--config", file, "--device", "cpu", exit_code=1).stderr
    assert said.startswith(f"Error: {file}: ") and said.count("\n") == 1
    assert key in said and f" must be {needed}, got {value!r}" in said
    assert not cache_dir.exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA, []),  # its activation is known
        ({**LLAMA, "model_type": "qwen2"}, []),
        ({**LLAMA, "model_type": "mistral"}, []),
        ({**LLAMA, "model_type": "phi3"}, ["has no hidden_act: no activation is built (--op names one)"]),
        ({**LLAMA, "hidden_act": "relu6"}, ["has hidden_act 'relu6', which no kernel serves: no activation is built"]),
        ({**LLAMA, "intermediate_size": 0}, ["has no intermediate_size: no activation is built (--op names one)"]),
        ({**LLAMA, "num_attention_heads": None}, ["has no head_dim and no num_attention_heads: no rotation is built"]),
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
    assert bool(plan.refused) == (config.get("hidden_act") == "relu6")


RECOGNISED = "the norms that it recognises, which call rmsnorm: other code calls fused_add_rmsnorm"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            LLAMA,
            "norms, attention, layers and MLPs, which call rmsnorm, fused_add_rmsnorm_round_sum, rope, silu_and_mul: "
            "other code calls fused_add_rmsnorm, store_cache",
        ),
        (
            {**LLAMA, "model_type": "mixtral"},
            "the norms alone, which call rmsnorm: other code calls fused_add_rmsnorm, rope, silu_and_mul, store_cache",
        ),
        (
            {**LLAMA, "model_type": "gemma3_text", "head_dim": 64},
            "norms, attention, layers and MLPs, which call gemma_rmsnorm, gemma_fused_add_rmsnorm_round_sum, "
            "qk_norm_rope_store, gelu_tanh_and_mul: other code calls gemma_fused_add_rmsnorm, store_cache",
        ),
        ({**LLAMA, "model_type": "glm4_moe"}, f"{RECOGNISED}, rope, store_cache"),
        ({**LLAMA, "model_type": None}, f"{RECOGNISED}, store_cache"),
    ],
)
def test_says_what_patch_transformers_does_not_call(tmp_path, config, says):
    file = config_file(tmp_path, **config)
    assert make_plan(config=file, device="cpu").notes[-1] == f"{file}: patch_transformers replaces {says}"
    assert not make_plan(op="rmsnorm", config=file, device="cpu").notes


FIRST_HEAD = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        ({"model_type": "llama"}, "rope_128"),
        ({"model_type": "qwen2"}, "rope_128"),
        ({"model_type": "qwen3"}, "qk_norm_rope_store_128"),
        ({"model_type": "exaone4"}, "qk_norm_rope_store_128"),
        ({"model_type": "olmo2"}, "rope_128"),  # normalised over all heads at once
        ({"model_type": "hunyuan_v1_dense"}, "rope_128"),  # normalised after the rotation
        # Pairs of neighbours, and the half of a head that the config omits.
        ({"model_type": "glm4"}, "rope_128_rotary_64_interleaved"),
        ({"model_type": "glm4", "partial_rotary_factor": 1}, "rope_128_interleaved"),
        ({"model_type": "ernie4_5"}, "rope_128_interleaved"),
        ({"model_type": "glm4_moe", "use_qk_norm": True}, "qk_norm_rope_store_128_rotary_64"),
        ({"model_type": "glm4_moe", "use_qk_norm": False}, "rope_128_rotary_64"),
        # Where configs say how much of a head is rotated: transformers 4, and 5, for each type of layer too.
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "rope_128_rotary_96"),
        ({"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.75}}, "rope_128_rotary_96"),
        (
            {"model_type": "gemma3", "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "qk_norm_rope_store_128",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "rope_128_rotary_64",
        ),
        ({"model_type": "minimax_m2", "rotary_dim": 64}, "rope_128_rotary_64"),
        # Three positions for each token, or a row of cosines that was computed from them before.
        ({"model_type": "qwen2_vl", "rope_scaling": {"mrope_section": [16, 24, 24]}}, "rope_128 rope_128_mrope"),
        # An unknown model rotates if its config has a key of a rotation.
        ({"model_type": "newest", "rope_theta": 10000.0}, "rope_128"),
        ({"model_type": "newest"}, ""),
        ({"model_type": "jamba"}, ""),
    ],
)
def test_rotations(tmp_path, config, kernels):
    plan = make_plan(config=config_file(tmp_path, **FIRST_HEAD, **config), device="cpu")
    built = [s.name.replace("_bf16", "") for s in plan.specs if s.op in ("rope", "qk_norm_rope_store")]
    assert built == kernels.split() and not plan.refused


@pytest.mark.parametrize(
    ("op", "config", "says"),
    [
        ("rope", DEEPSEEK, "rotated heads of known size"),  # latent attention rotates a tensor of its own
        ("store_cache_heads", DEEPSEEK, "rotated heads of known size"),
        ("qk_norm_rope_store", LLAMA, "norms of single heads before their rotation"),
        (
            "qk_norm_rope_store",
            {**LLAMA, "model_type": "hunyuan_v1_moe"},
            "norms of single heads before their rotation",
        ),
    ],
)
def test_what_a_model_does_not_rotate(tmp_path, op, config, says):
    file = config_file(tmp_path, **config)
    plan = make_plan(op=op, config=file, device="cpu")
    assert plan.refused == [f"{file} has no {says}, which {op} is for"] and not plan.specs
    assert op not in read_config(file).operators()
    assert not any("rotation" in note for note in make_plan(config=file, device="cpu").notes)


def test_a_size_of_heads_that_no_kernel_supports(tmp_path):
    file = config_file(tmp_path, **{**LLAMA, "num_attention_heads": 2})
    plan = make_plan(config=file, device="cpu")
    assert len(plan.refused) == 1 and "rope does not support head_dim 32" in plan.refused[0]
    assert "rmsnorm_64_fp16" in [s.name for s in plan.specs]


def test_options_replace_those_of_a_config():
    """SGLang computes cosines and sines in float32; the caches of an engine may be float8."""
    options = {"cos_sin_dtype": "fp32", "cache_dtype": ["bf16", "fp8"], "rotary_dim": 32, "interleaved": True}
    plan = make_plan(config=CONFIGS / "qwen3_next.json", device="cpu", **options)
    name = "qk_norm_rope_store_256_bf16_rotary_32_fp32_cos_sin_interleaved"
    assert [s.name for s in plan.specs if s.op == "qk_norm_rope_store"] == [name, f"{name}_fp8_cache"]
    plan = make_plan(op="store_cache_heads", config=CONFIGS / "qwen3_next.json", device="cpu", cache_dtype="fp8")
    assert [s.name for s in plan.specs] == ["store_cache_heads_256_bf16_fp8_cache"]


def test_the_two_norms_of_latent_attention(tmp_path):
    file = config_file(tmp_path, **DEEPSEEK)
    plan = make_plan(config=file, dtype="bf16", device="cpu")
    assert [s.name for s in plan.specs if s.op == "dual_rmsnorm"] == ["dual_rmsnorm_1536_512_bf16"]
    plan = make_plan(op="dual_rmsnorm", config=file, dtype="bf16", device="cpu", hidden_size2=576)
    assert [s.name for s in plan.specs] == ["dual_rmsnorm_1536_576_bf16"]
    file = config_file(tmp_path, **{**DEEPSEEK, "q_lora_rank": None})  # as DeepSeek V2 Lite
    assert "dual_rmsnorm" not in read_config(file).operators()
    plan = make_plan(op="dual_rmsnorm", config=file, dtype="bf16", device="cpu")
    assert plan.refused == [f"{file} has no q_lora_rank and kv_lora_rank, which dual_rmsnorm is for"]


# Configs of models with gated norms, without what does not matter to these, and the operator and size of the norm.
MAMBA = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
MIXERS = [
    ({"model_type": "mamba2", "num_heads": 8, "head_dim": 64, "n_groups": 4}, "gated_rmsnorm_gate_first", 128),
    ({"model_type": "mamba2", "num_heads": 16, "head_dim": 64, "expand": 4}, "gated_rmsnorm_gate_first", 128),
    ({"model_type": "bamba", "mamba_n_heads": 8}, "gated_rmsnorm_gate_first", 512),
    ({"model_type": "zamba2", "n_mamba_heads": 8, "mamba_ngroups": 2}, "gated_rmsnorm_gate_first", 256),
    ({"model_type": "granitemoehybrid", "mamba_n_heads": 8}, "gated_rmsnorm_gate_first", 512),
    (
        {"model_type": "nemotron_h", "mamba_num_heads": 8, "mamba_head_dim": 48, "n_groups": 2},
        "gated_rmsnorm_gate_first",
        192,
    ),
    ({"model_type": "falcon_h1", "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_rms_norm": True}, "gated_rmsnorm", 512),
    (
        {
            "model_type": "falcon_h1",
            "mamba_d_ssm": None,
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
        },
        "gated_rmsnorm_gate_first",
        256,
    ),
    ({"model_type": "qwen3_next", "linear_value_head_dim": 64}, "gated_rmsnorm", 64),
    ({"model_type": "kimi_linear", "linear_head_dim": 32}, "gated_rmsnorm", 32),
    # The defaults of the classes.
    ({"model_type": "falcon_h1", "mamba_rms_norm": True}, "gated_rmsnorm", 1024),
    ({"model_type": "nemotron_h", "mamba_num_heads": 64}, "gated_rmsnorm_gate_first", 512),
    ({"model_type": "mamba2", "expand": 4.0}, "gated_rmsnorm_gate_first", 128),
    ({"model_type": "qwen3_5_text"}, "gated_rmsnorm", 128),
    ({"model_type": "qwen4_exp_text", "output_gate_type": "sigmoid"}, "gated_rmsnorm", 128),
    ({"model_type": "bailing_hybrid"}, "gated_rmsnorm", 128),
    ({"model_type": "glm5_next_text", "linear_attn_config": {"head_dim": 96}}, "gated_rmsnorm", 96),
    ({"model_type": "olmo_hybrid"}, "gated_rmsnorm", 96),
]
SIGMOID = ("kimi", "qwen4", "bailing", "glm5")


@pytest.mark.parametrize(("config", "op", "size"), MIXERS)
def test_gated_norms(tmp_path, config, op, size):
    file = config_file(tmp_path, **MAMBA, **config)
    specs = [s for s in make_plan(config=file, dtype="bf16", device="cpu").specs if s.op.startswith("gated")]
    sigmoid = "_strided_sigmoid" if config["model_type"].startswith(SIGMOID) else ""
    assert [s.name for s in specs] == [f"{op}_{size}_bf16{sigmoid}"]


@pytest.mark.slow  # it imports the models' classes
@pytest.mark.parametrize(("config", "op", "size"), [MIXERS[0], MIXERS[5], MIXERS[8]])
def test_gated_norms_are_those_of_the_models(config, op, size):
    """As patch_transformers recognises the norms of a model by what they compute."""
    transformers = pytest.importorskip("transformers")
    from jitnorm.integrations.transformers_gated import GatedKernels, find_gated_kernels

    layers = {"layer_types": ["linear_attention"]} if config["model_type"] == "qwen3_next" else {}
    layers |= {"layers_block_type": ["mamba"]} if config["model_type"] == "nemotron_h" else {}
    options = {**MAMBA, **{key: value for key, value in config.items() if key != "model_type"}, **layers}
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(config["model_type"], **options))
    norms = [module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNormGated")]
    found = [find_gated_kernels(module) for module in norms]
    assert found and all(isinstance(kernels, GatedKernels) and kernels.group_size == size for kernels in found)
    assert all(kernels.rule.norm_before_gate == (op == "gated_rmsnorm") for kernels in found)


def test_models_without_gated_norms(tmp_path):
    file = config_file(tmp_path, **MAMBA, model_type="falcon_h1")  # its mamba_rms_norm is off
    assert read_config(file).mixer_norm is None
    plan = make_plan(op="gated_rmsnorm", config=file, dtype="bf16", device="cpu")
    assert plan.refused == [f"{file} has no norm beside a gate of this order, which gated_rmsnorm is for"]
    plan = make_plan(op="gated_rmsnorm", hidden_size=96, dtype="bf16", device="cpu")
    assert [s.name for s in plan.specs] == ["gated_rmsnorm_96_bf16"]


def test_the_models_that_the_benchmark_warms_up(tmp_path):
    """Nothing is refused, and both norms of the hidden size are built."""
    models = json.loads((CONFIGS.parents[1] / "benchmarks" / "model_configs.json").read_text())
    assert len(models) == 27
    for name, config in models.items():
        file = config_file(tmp_path, **config)
        plan, size = make_plan(config=file, arch="9.0a"), read_config(file).hidden_sizes[0]
        norms = [spec for spec in plan.specs if f"rmsnorm_{size}_bf16" in spec.name]
        assert not plan.refused and len(norms) >= 2, name


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


@pytest.mark.parametrize(
    ("config", "operator", "sizes"),
    [
        # gpt-oss' config says "silu", which is the function within its clamped product.
        ({"model_type": "gpt_oss", "hidden_act": "silu", "intermediate_size": 2880}, "swigluoai_and_mul", [2880]),
        (
            {"model_type": "nemotron_h", "mlp_hidden_act": "relu2", "moe_shared_expert_intermediate_size": 3712},
            "relu2",
            [3712],
        ),
    ],
)
def test_activations_under_other_names(tmp_path, config, operator, sizes):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 256, "num_attention_heads": 4, **config}))
    found = read_config(tmp_path / "config.json")
    assert HIDDEN_ACTS[found.hidden_act] == operator and found.intermediate_sizes == sizes and not found.notes

"""What the tests of warm-up share: configs, and the command in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jitnorm.cli import main
from jitnorm.rmsnorm import _rmsnorm_kernel_class

CONFIGS = Path(__file__).parents[1] / "configs"
DEEPSEEK = {"model_type": "deepseek_v3", "hidden_size": 7168, "q_lora_rank": 1536, "kv_lora_rank": 512}
OLMO2 = {"model_type": "olmo2", "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 1,
    "intermediate_size": 128,
    "dtype": "float16",
}


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

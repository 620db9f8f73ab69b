"""`jitnorm warmup` on the command line; tests/test_warmup.py has the rest."""

from __future__ import annotations

import json

from cli.run import run


def test_json(cache_dir):
    words = ("warmup", "--op", "rmsnorm", "--hidden-size", "64,3", "--dtype", "bf16", "--device", "cpu")
    words = (*words, "--skip-unsupported", "--format", "json")
    result = json.loads(run(*words).stdout)
    (built,) = result["built"]
    assert built["name"] == "rmsnorm_64_bf16" and built["arch"].startswith("cpu_")
    assert len(result["refused"]) == 1 and result["failed"] == result["cached"] == []
    assert result["cache"] == str(cache_dir)
    again = json.loads(run(*words).stdout)
    assert again["cached"] == [built] and again["built"] == []

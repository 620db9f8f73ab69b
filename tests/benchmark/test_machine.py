"""Test the description of the machine, with and without NVML."""

from __future__ import annotations

import subprocess
import types
from pathlib import Path

import pytest
import torch

from jitnorm.benchmark import machine
from jitnorm.benchmark.machine import clock_rates, describe_machine, throttle_reasons

GPU = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


def fake(reasons: int = 0, broken: bool = False) -> types.SimpleNamespace:
    def get(value):
        def call(*args):
            if broken:
                raise NVMLError
            return value

        return call

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlDeviceGetCurrentClocksThrottleReasons=get(reasons),
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1755, 2: 3201}[kind] if not broken else get(0)(),
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: {1: 1980, 2: 3201}[kind],
    )


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (0x00, None),
        (0x01, None),  # idle
        (0x02, None),  # clocks that an application asked for
        (0x20, "clocks throttled: temperature"),
        (0x84, "clocks throttled: power cap, power brake"),
    ],
)
def test_throttled(monkeypatch, reasons, expected):
    monkeypatch.setattr(machine, "_find_handle", lambda device: (fake(reasons), "handle"))
    assert throttle_reasons(GPU) == expected


def test_clocks(monkeypatch):
    monkeypatch.setattr(machine, "_find_handle", lambda device: (fake(), "handle"))
    assert clock_rates(GPU) == {"sm_mhz": 1755, "memory_mhz": 3201, "sm_max_mhz": 1980, "memory_max_mhz": 3201}
    monkeypatch.setattr(machine, "_find_handle", lambda device: (fake(broken=True), "handle"))
    assert clock_rates(GPU) is None and throttle_reasons(GPU) is None


def test_nobody_knows_of_the_cpu():
    assert throttle_reasons(torch.device("cpu")) is None and clock_rates(torch.device("cpu")) is None


def test_commit(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "bench_a.py"
    file.write_text("1")
    assert describe_machine(torch.device("cpu"), file)["commit"] is None
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    commit = describe_machine(torch.device("cpu"), file)["commit"]
    assert len(commit) == 12
    file.write_text("2")
    assert describe_machine(torch.device("cpu"), file)["commit"] == commit + "+"
    assert describe_machine(torch.device("cpu"), Path("nowhere/at/all.py"))["commit"] is None


def test_description():
    about = describe_machine(torch.device("cpu"), Path(__file__))
    assert about["torch"] == torch.__version__ and about["threads"] == torch.get_num_threads() and about["processor"]
    assert "apache-tvm-ffi" in about["packages"] and "gpu" not in about

"""What only a GPU can show: graphs, streams, devices, PDL, and more than 2^31 elements."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits

from jitnorm import fused_add_rmsnorm, rmsnorm

pytestmark = pytest.mark.gpu


def inputs(num_tokens=64, hidden_size=4096, dtype=torch.bfloat16, device="cuda"):
    x = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    return x, torch.randn(hidden_size, device=device).to(dtype)


def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@pytest.mark.parametrize(("hidden_size", "long"), [(128, 200_003), (1280, 20_483), (8192, 6147)])
def test_every_length_of_grid(hidden_size, long):
    """Small, medium and large grids run different kernels of one library: right in each, and the same bits."""
    x, w = inputs(long, hidden_size)
    whole = rmsnorm(x, w, out=torch.full_like(x, float("nan")))
    residual = torch.randn_like(x)
    total, normalised = residual.clone(), x.clone()
    fused_add_rmsnorm(normalised, total, w)
    for part in (slice(0, 1), slice(long - 5, long), slice(0, 513), slice(long - 2049, long)):
        assert relative_error(whole[part], rmsnorm_reference(x[part], w, 1e-6)) <= 3e-3
        assert same_bits(rmsnorm(x[part], w), whole[part])
        a, b = x[part].clone(), residual[part].clone()
        exact = rmsnorm_reference(a.double() + b.double(), w, 1e-6)
        fused_add_rmsnorm(a, b, w)
        assert relative_error(normalised[part], exact) <= 3e-3
        assert same_bits(a, normalised[part]) and same_bits(b, total[part])


@pytest.mark.parametrize("hidden_size", [128, 4096])
def test_in_a_graph(hidden_size):
    x, w = inputs(hidden_size=hidden_size)
    rmsnorm(x, w)
    out = torch.full_like(x, float("nan"))
    graph = captured(lambda: rmsnorm(x, w, out=out))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert same_bits(out, rmsnorm(x, w))


def test_first_loaded_inside_a_graph():
    """On disk, but new to this process: loading is no operation of the captured stream."""
    script = """
        import torch, jitnorm
        x, w = torch.randn(8, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda").bfloat16()
        out, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            jitnorm.rmsnorm(x, w, out=out)
        graph.replay()
        print(torch.equal(out, jitnorm.rmsnorm(x, w)))
    """
    rmsnorm(*inputs())
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_cold_kernel_in_a_graph_names_the_warm_up(cache_dir):
    x, w = inputs(hidden_size=2560)
    with pytest.raises(RuntimeError, match=r"jitnorm warmup --op rmsnorm --hidden-size 2560 --dtype bf16"):
        captured(lambda: rmsnorm(x, w, out=torch.empty_like(x)))
    assert not cache_dir.exists()
    rmsnorm(x, w)  # and outside it is built


def test_on_the_callers_stream():
    x, w = inputs()
    expected, zeros = rmsnorm(x, w), torch.zeros_like(x)
    out, late = torch.full_like(x, float("nan")), zeros.clone()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a call on another stream would read the zeros
        late.copy_(x)
        rmsnorm(late, w, out=out)
    assert not side.query()
    side.synchronize()
    assert same_bits(out, expected)


def test_in_a_thread_that_has_no_device_yet():
    x, w = inputs()
    expected, outs = rmsnorm(x, w), []
    thread = threading.Thread(target=lambda: outs.append(rmsnorm(x, w)))
    thread.start()
    thread.join()
    assert same_bits(outs[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    x, w = inputs(device="cuda:1")
    torch.cuda.set_device(0)
    assert relative_error(rmsnorm(x, w), rmsnorm_reference(x, w, 1e-6)) < 3e-3
    assert torch.cuda.current_device() == 0
    here = rmsnorm(x.to("cuda:0"), w.to("cuda:0"))
    assert same_bits(here.to("cuda:1"), rmsnorm(x, w))
    with pytest.raises(ValueError, match="weight must be on cuda:1"):
        rmsnorm(x, w.to("cuda:0"))


def test_a_kernel_reads_nothing_before_the_kernel_before_it_has_written():
    """Each call's output is the next one's input, and in a second chain its weight: with PDL they overlap."""
    x, w = inputs(1, 8192)
    for _ in range(20):
        for chained in ("input", "weight"):
            results = []
            for pdl in (True, False):
                a, b = x.clone(), torch.full_like(x, float("nan"))

                def chain(a=a, b=b, pdl=pdl, chained=chained):
                    for _ in range(40):
                        for source, to in ((a, b), (b, a)):
                            if chained == "input":
                                rmsnorm(source, w, out=to, enable_pdl=pdl)
                            else:
                                rmsnorm(x, source[0], out=to, enable_pdl=pdl)

                chain()
                captured(chain).replay()
                results.append(a)
            assert same_bits(*results)


def test_more_than_2_to_the_31_elements():
    x = torch.empty(2**31 // 8192 + 5, 8192, device="cuda", dtype=torch.bfloat16)
    first, w = inputs(5, 8192)
    expected = rmsnorm(first, w)
    for rows in (x[:5], x[-5:]):
        rows.copy_(first)
    rmsnorm(x, w, out=x)
    assert same_bits(x[:5], expected) and same_bits(x[-5:], expected)
    wide = torch.empty(2, 2**31 + 8192, device="cuda", dtype=torch.bfloat16)[:, :8192]  # one stride beyond 2^31
    wide.copy_(first[:2])
    assert same_bits(rmsnorm(wide, w), expected[:2])


def test_cpu_and_gpu_in_turn():
    x, w = inputs(dtype=torch.float32)
    for _ in range(3):
        here, there = rmsnorm(x, w), rmsnorm(x.cpu(), w.cpu())
        assert relative_error(here.cpu(), there.double()) < 1e-6


def test_importing_creates_no_context():
    script = "import torch, jitnorm.rmsnorm; print(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"

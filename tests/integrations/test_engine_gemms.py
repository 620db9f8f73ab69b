"""The choice between torch's GEMM, this package's two and cuBLASLt without split k for a few rows."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits

from jitnorm.integrations import engine_gemms
from jitnorm.jit import cleanup, locations
from jitnorm.jit.cache import Cache
from jitnorm.jit.spec import Target

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_chosen(cache_dir, monkeypatch):
    monkeypatch.setattr(engine_gemms, "_chosen", {})


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Weights on the CPU are described as those of a GPU."""
    monkeypatch.setattr(engine_gemms, "gpu_name", lambda device: "a GPU, 132 SMs")
    monkeypatch.setattr(engine_gemms, "driver_version", lambda: "580.1")
    monkeypatch.setattr(engine_gemms.cublaslt, "library_version", lambda: 130100)


@pytest.fixture
def built_kernel(monkeypatch):
    """Return a kernel for projection and activation that counts as built."""

    class Kernel:
        name, key = "a kernel", "0123"

        def spec_of(self, weight, activation):
            return self

    kernel, build_and_load = Kernel(), engine_gemms.build_and_load
    monkeypatch.setattr(
        engine_gemms, "build_and_load", lambda specs: build_and_load([spec for spec in specs if spec is not kernel])
    )
    return kernel


def choose(monkeypatch, weight, rows):
    """Choose a GEMM that writes twice the product for numbers of rows. Return the shapes that it was called with."""
    calls = []

    def gemm(a, b, bias, out):
        assert a.is_contiguous() and out.is_contiguous() and bias is None
        calls.append(tuple(a.shape))
        out.copy_(2 * (a @ b))

    monkeypatch.setitem(engine_gemms._chosen, engine_gemms.shape_of(weight), dict.fromkeys(rows, gemm))
    return calls


def test_rows_decide(monkeypatch):
    """Numbers of rows count as the next power of two; more than 64, and shapes without a choice, are torch's."""
    weight, other = torch.randn(24, 16), torch.randn(24, 8)
    calls = choose(monkeypatch, weight, (1, 16))
    for shape in ((1,), (2,), (9,), (2, 8), (17,), (65,), (0,)):
        x = torch.randn(*shape, 16)
        calls.clear()
        got, expected = engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight)
        is_chosen = shape in ((1,), (9,), (2, 8))
        assert got.shape == expected.shape and calls == ([(x.numel() // 16, 16)] if is_chosen else [])
        torch.testing.assert_close(got, 2 * expected if is_chosen else expected)
        out = torch.full_like(expected, float("nan"))
        assert engine_gemms.linear(x, weight, out=out) is out and same_bits(out, got)
    x = torch.randn(3, 8)
    assert same_bits(engine_gemms.linear(x, other), torch.nn.functional.linear(x, other))


def test_what_the_gemm_does_not_take_is_left_to_torch(monkeypatch):
    weight = torch.randn(24, 16)
    calls = choose(monkeypatch, weight, engine_gemms.ROWS)
    aligned = torch.randn(80)
    for x in (torch.randn(16, 4).t(), aligned[1:17][None], aligned[:64].view(4, 16)[::2]):
        assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))
        out = torch.full((len(x), 24), float("nan"))
        torch.testing.assert_close(engine_gemms.linear(x, weight, out=out), x @ weight.t())
        assert not out.isnan().any()
    with pytest.raises(RuntimeError, match="dtype"):
        engine_gemms.linear(torch.randn(2, 16).half(), weight)
    assert not calls


def activated(x, weight, activation):
    """The definition, in float64."""
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    approximate = "tanh" if "tanh" in activation else "none"
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    return (silu(gate) if "silu" in activation else gelu(gate, approximate=approximate)) * up


@pytest.mark.parametrize("activation", engine_gemms.ACTIVATIONS)
def test_gated_linear_without_a_choice(activation, monkeypatch):
    """By `linear` and the operator, whatever is chosen for another activation."""
    weight, x = torch.randn(24, 16), torch.randn(2, 3, 16)
    others = [name for name in engine_gemms.ACTIVATIONS if name != activation]
    for shape in (engine_gemms.shape_of(weight, name) for name in others):
        gemms = dict.fromkeys(engine_gemms.ROWS, lambda *operands: pytest.fail("of another activation"))
        monkeypatch.setitem(engine_gemms._chosen, shape, gemms)
    assert (
        relative_error(engine_gemms.gated_linear(x, weight, activation), activated(x, weight, activation))
        <= TOLERANCE[torch.float32]
    )
    choose(monkeypatch, weight, (8,))  # a GEMM that writes twice the product, in two columns for each of the result
    expected = activated(x, 2 * weight, activation)
    got = engine_gemms.gated_linear(x, weight, activation)
    assert got.shape == (2, 3, 12) and relative_error(got, expected) <= TOLERANCE[torch.float32]
    out = torch.full_like(got, float("nan"))
    assert engine_gemms.gated_linear(x, weight, activation, out) is out and same_bits(out, got)


def test_gated_linear_by_the_chosen_gemm(monkeypatch):
    weight = torch.randn(24, 16)

    def gemm(a, b, bias, out):
        assert bias is None and a.is_contiguous() and out.is_contiguous()
        out.copy_(3 * activated(a, b.t(), "silu_and_mul"))

    shape = engine_gemms.shape_of(weight, "silu_and_mul")
    assert shape != engine_gemms.shape_of(weight) and shape != engine_gemms.shape_of(weight, "gelu_and_mul")
    monkeypatch.setitem(engine_gemms._chosen, shape, {4: gemm})
    for rows, factor in ((3, 3), (4, 3), (2, 1), (65, 1)):
        x = torch.randn(rows, 16)
        expected = factor * activated(x, weight, "silu_and_mul")
        for out in (None, torch.full((rows, 12), float("nan"))):
            got = engine_gemms.gated_linear(x, weight, "silu_and_mul", out)
            assert relative_error(got, expected) <= TOLERANCE[torch.float32] and (out is None or got is out)
    x = torch.randn(3, 16)
    assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))
    got = engine_gemms.gated_linear(x, weight, "gelu_and_mul")
    assert relative_error(got, activated(x, weight, "gelu_and_mul")) <= TOLERANCE[torch.float32]


def test_candidates(device):
    weight = torch.zeros(64, 128, dtype=BF16, device=device)
    candidates = [
        weight,
        weight.view(128, 64),
        weight.view(512, 16)[:8],
        torch.zeros(8, 20000, dtype=BF16, device=device),
    ]
    assert [engine_gemms.is_candidate(w) for w in candidates] == [device == "cuda"] * 2 + [device == "cuda"] * 2
    not_supported = [weight.float(), weight[:, :64], weight[:, 0], weight[:60], weight[:, :68].contiguous(), None]
    not_supported += [weight[:0], weight.view(-1)[1:], weight.view(1024, 8), weight.view(-1)[1:8065].view(63, 128)]
    assert not any(engine_gemms.is_candidate(w) for w in not_supported)
    gated = [*candidates[:2], weight[:56]]  # 3.5 times 16 rows: no kernel has half a tile
    on_cuda = device == "cuda"
    assert [engine_gemms.is_candidate(w, "silu_and_mul") for w in gated] == [on_cuda, on_cuda, False]
    assert engine_gemms.is_candidate(weight[:56]) == on_cuda


@pytest.mark.usefixtures("on_a_gpu")
def test_what_cannot_be_timed_is_left_to_torch(monkeypatch):
    weight, x = torch.randn(64, 128), torch.randn(3, 128)

    def choose(gemms, weights, after_norm, activation):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(engine_gemms, "_candidates", lambda weight, kernels, activation: {"a GEMM": engine_gemms._mm})
    monkeypatch.setattr(engine_gemms, "_choose", choose)
    assert engine_gemms.select([weight], []) == ({engine_gemms.shape_of(weight)}, []) and not engine_gemms._chosen
    assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_an_unsupported_number_of_rows_is_left_to_torch(monkeypatch):
    weight, x = torch.randn(24, 16), torch.randn(3, 16)

    def gemm(a, b, bias, out):
        raise engine_gemms.UnsupportedProblem("no kernel")

    monkeypatch.setitem(engine_gemms._chosen, engine_gemms.shape_of(weight), dict.fromkeys(engine_gemms.ROWS, gemm))
    assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("after_norm", [True, False])
def test_the_fastest_is_chosen(monkeypatch, after_norm):
    """For each number of rows; a GEMM that does not take them is left out, and a small gain is noise."""
    norms = []
    norm = engine_gemms.general_rmsnorm
    monkeypatch.setattr(engine_gemms, "general_rmsnorm", lambda *a, **k: norms.append(a) or norm(*a, **k))
    seconds = {
        "torch": dict.fromkeys(engine_gemms.ROWS, 1.0),
        "few_rows_gemm": {1: 0.5, 2: 0.94, 4: 0.98, 8: 0.9, 16: 0.99},
        "cuBLASLt without split k": {1: 0.6, 2: 0.93, 4: 0.99, 8: 1.2, 16: 0.9, 32: 0.8, 64: 0.98},
    }
    gemms = {name: (lambda *operands, name=name: name) for name in seconds}
    order = [*gemms.values()]
    monkeypatch.setattr(engine_gemms, "_mm", gemms["torch"])
    others = {name: gemm for name, gemm in gemms.items() if name != "torch"}
    monkeypatch.setattr(engine_gemms, "_candidates", lambda weight, kernels, activation: others)
    taken = []

    def measure(gemm, x, weights, out, write_x, read_out):
        assert x.shape == (len(x), 128) and out.shape == (len(x), 64) and len(weights) == 3
        x.fill_(float("nan"))
        norms.clear()
        write_x()
        assert x.isfinite().all() and bool(norms) == after_norm
        read_out()
        assert len(norms) == 1
        name = gemm()
        taken.append(order.index(gemm))
        if len(x) not in seconds[name]:
            raise engine_gemms.UnsupportedProblem("no kernel")
        return seconds[name][len(x)] * (9 if taken.count(order.index(gemm)) == 1 else 1)  # the first call is no sample

    monkeypatch.setattr(engine_gemms, "_seconds", measure)
    monkeypatch.setattr(engine_gemms.torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(engine_gemms, "_has_norm", lambda like, size: size == (128 if after_norm else 64))
    weights = [torch.randn(64, 128) for _ in range(3)]
    shapes, said = engine_gemms.select(*((weights, []) if after_norm else (weights[:1], weights[1:])))
    assert shapes == {engine_gemms.shape_of(weights[0])}
    assert said == ["n=64 k=128, numbers of rows: few_rows_gemm for 1, 8; cuBLASLt without split k for 2, 16, 32"]
    (chosen,) = engine_gemms._chosen.values()
    names = {rows: gemm() for rows, gemm in chosen.items()}
    assert names == dict.fromkeys((1, 8), "few_rows_gemm") | dict.fromkeys((2, 16, 32), "cuBLASLt without split k")


@pytest.mark.usefixtures("on_a_gpu")
def test_gated_gemms_are_timed_beside_the_product_and_the_activation(built_kernel, monkeypatch):
    """Between a norm and a kernel of torch; the product alone is another choice."""
    weight, measured = torch.randn(64, 128), []

    def gemm(a, b, bias, out):
        out.copy_(activated(a, b.t(), "silu_and_mul"))

    def measure(gemm, x, weights, out, write_x, read_out):
        write_x()
        out.fill_(float("nan"))
        gemm(x, weight.t(), None, out)
        expected = activated(x, weight, "silu_and_mul")
        assert x.shape == (len(x), 128) and relative_error(out, expected) <= TOLERANCE[torch.float32]
        read_out()
        measured.append(gemm)
        return 0.5 if gemm is by_kernel and len(x) <= 2 else 1.0

    by_kernel = gemm
    monkeypatch.setattr(
        engine_gemms, "_candidates", lambda weight, kernels, activation: {"a kernel": gemm} if activation else {}
    )
    monkeypatch.setattr(engine_gemms, "_kernels_for", lambda weight, activation: [built_kernel] * bool(activation))
    # A target of the CPU: the activation's kernel is built for it.
    monkeypatch.setattr(engine_gemms, "cuda_target", lambda index: Target("cpu"))
    monkeypatch.setattr(engine_gemms, "_seconds", measure)
    monkeypatch.setattr(engine_gemms.torch.cuda, "device", lambda device: torch.no_grad())
    shapes, said = engine_gemms.select([weight], [], [(weight, "silu_and_mul")])
    assert shapes == {engine_gemms.shape_of(weight, "silu_and_mul")}
    assert said == ["n=64 k=128 with silu_and_mul, numbers of rows: a kernel for 1, 2"]
    assert measured.count(gemm) == len(measured) / 2 and engine_gemms._chosen == {shapes.pop(): {1: gemm, 2: gemm}}


@pytest.mark.usefixtures("on_a_gpu")
def test_without_the_kernel_of_the_activation(built_kernel, monkeypatch):
    """More rows than are timed would have none."""

    monkeypatch.setattr(engine_gemms, "cuda_target", lambda index: Target.cuda("9.0a"))
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    monkeypatch.setattr(engine_gemms, "_kernels_for", lambda weight, activation: [built_kernel])
    monkeypatch.setattr(engine_gemms, "_candidates", lambda *arguments: {"a kernel": engine_gemms._mm})
    monkeypatch.setattr(engine_gemms, "is_candidate", lambda weight: False)
    shapes, (said,) = engine_gemms.select([], [], [(torch.randn(64, 128, dtype=BF16), "gelu_and_mul")])
    assert not shapes and said.startswith("gelu_and_mul_bf16: its kernel cannot be built: ")


@pytest.mark.usefixtures("on_a_gpu")
def test_without_a_kernel_for_both_the_product_alone_is_timed(monkeypatch):
    weight, timed = torch.randn(64, 128), []

    def choose(gemms, weights, after_norm, activation):
        timed.append((after_norm, activation))
        return {"a GEMM": [2]}

    monkeypatch.setattr(engine_gemms, "_kernels_for", lambda weight, activation: [])
    monkeypatch.setattr(engine_gemms, "is_candidate", lambda weight: True)
    monkeypatch.setattr(engine_gemms, "_candidates", lambda *arguments: {"a GEMM": engine_gemms._mm})
    monkeypatch.setattr(engine_gemms, "cuda_target", lambda index: Target("cpu"))
    monkeypatch.setattr(engine_gemms, "_choose", choose)
    monkeypatch.setattr(engine_gemms, "_has_norm", lambda like, size: True)
    shapes, said = engine_gemms.select([], [], [(weight, "silu_and_mul")])
    assert shapes == {engine_gemms.shape_of(weight)} and timed == [(True, None)]
    assert said == ["n=64 k=128, numbers of rows: a GEMM for 2"]


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("has_cublaslt", [True, False])
def test_a_kernel_that_cannot_be_built_is_left_out(has_cublaslt, monkeypatch):
    """It is tried once, and a shape without any other GEMM than torch's is not replaced."""
    weight = torch.randn(64, 128)

    class Kernel(engine_gemms.FewRowsKernel):
        def is_supported(self, weight, activation):
            return True

        def spec_of(self, weight, activation):
            return self.spec(64, 128, BF16, Target.cuda("9.0a"))

        def gemm(self, weight, activation):
            pytest.fail("it was not built")

    kernel = engine_gemms.few_rows.REGISTERS
    kernel = Kernel(**{field.name: getattr(kernel, field.name) for field in fields(kernel)})
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    monkeypatch.setattr(engine_gemms.few_rows, "KERNELS", (kernel,))
    monkeypatch.setattr(engine_gemms.cublaslt, "library_version", lambda: 130000 * has_cublaslt)
    monkeypatch.setattr(engine_gemms.cublaslt, "gemm", lambda problem: engine_gemms._mm)
    monkeypatch.setattr(engine_gemms, "_choose", lambda gemms, *how: {name: [2] for name in gemms})
    shapes, said = engine_gemms.select([weight], [weight])
    assert shapes == ({engine_gemms.shape_of(weight)} if has_cublaslt else set())
    assert said[0].startswith("few_rows_gemm_64x128_bf16: its kernel cannot be built: ") and "DISABLE_JIT" in said[0]
    found = ["n=64 k=128, numbers of rows: cuBLASLt without split k for 2"] if has_cublaslt else []
    assert said[1:] == found


class TestLaterStarts:
    """A start takes the choice of an earlier one, unless something has changed on which the times depend."""

    WEIGHT = torch.randn(64, 128)

    @pytest.fixture(autouse=True)
    def timed(self, monkeypatch, on_a_gpu):
        """Return a list of what was timed: whether it was after a norm."""
        timed = []

        def choose(gemms, weights, after_norm, activation):
            timed.append(after_norm)
            return {name: [] for name in gemms} | {"cuBLASLt without split k": [2, 16] if len(timed) == 1 else [4]}

        gemms = {"cuBLASLt without split k": engine_gemms._mm}
        monkeypatch.setattr(engine_gemms, "_candidates", lambda weight, kernels, activation: gemms)
        monkeypatch.setattr(engine_gemms, "_choose", choose)
        monkeypatch.setattr(engine_gemms, "_has_norm", lambda like, size: True)
        return timed

    def start(self, after_norm=True, layers=1):
        """Select as a new process does. Return the numbers of rows for which torch's GEMM is replaced."""
        engine_gemms._chosen.clear()
        weights = [self.WEIGHT] * layers
        engine_gemms.select(*((weights, []) if after_norm else ([], weights)))
        ((_, chosen),) = engine_gemms._chosen.items()
        return sorted(chosen)

    def test_the_choice_is_kept(self, timed, cache_dir):
        assert self.start() == self.start() == [2, 16] and timed == [True]
        (file,) = (cache_dir / "gemms").iterdir()
        kept = json.loads(file.read_text())
        assert kept["weight"] == "n=64 k=128 torch.float32" and kept["gpu"] == "a GPU, 132 SMs"
        assert kept["place"] == "after a norm" and kept["rows"] == {"cuBLASLt without split k": [2, 16]}

    def test_another_place_in_the_model_is_timed(self, timed):
        assert self.start() == [2, 16] and self.start(after_norm=False) == [4] and timed == [True, False]

    def test_a_norm_without_a_kernel(self, timed, monkeypatch):
        """Its choice is not taken for one beside a norm."""
        monkeypatch.setattr(engine_gemms, "_has_norm", lambda like, size: False)
        assert self.start() == [2, 16] and timed == [None]
        monkeypatch.setattr(engine_gemms, "_has_norm", lambda like, size: True)
        assert self.start() == [4]

    def test_few_layers_are_in_the_l2(self, timed, monkeypatch):
        """More than are multiplied in turns do not matter."""
        monkeypatch.setattr(engine_gemms, "_MAX_TIMED_BYTES", 3 * self.WEIGHT.nbytes)
        assert self.start() == [2, 16] and self.start(layers=3) == self.start(layers=9) == [4] and len(timed) == 2

    @pytest.mark.parametrize(
        "name", ["gpu_name", "driver_version", "_hash_of_code", "cublaslt.library_version", "torch"]
    )
    def test_what_the_times_depend_on(self, timed, monkeypatch, name):
        assert self.start() == [2, 16]
        if name == "torch":
            monkeypatch.setattr(torch, "__version__", "2.99")
        else:
            *module, function = name.split(".")
            owner = getattr(engine_gemms, module[0]) if module else engine_gemms
            monkeypatch.setattr(owner, function, lambda *arguments: "another")
        assert self.start() == [4] and len(timed) == 2

    def test_another_kernel_of_the_activation(self, timed):
        """It is a part of what torch's GEMM is compared with."""
        gemms = {"cuBLASLt without split k": engine_gemms._mm}
        for key, count in (("0123", 1), ("0123", 1), ("4567", 2)):
            keys = {"silu_and_mul": key}
            engine_gemms._read_or_choose(gemms, keys, [self.WEIGHT] * 2, True, "silu_and_mul")
            assert len(timed) == count

    def test_another_version_of_a_kernel(self, timed, monkeypatch):
        """The key of a kernel is a hash of its source."""

        class Kernel:
            name, key = "few_rows_gemm", "0123"

            def spec_of(self, weight, activation):
                return self

        kernel = Kernel()
        gemms = {"cuBLASLt without split k": engine_gemms._mm, kernel.name: engine_gemms._mm}
        monkeypatch.setattr(engine_gemms, "_candidates", lambda weight, kernels, activation: gemms)
        monkeypatch.setattr(engine_gemms, "_kernels_for", lambda weight, activation: [kernel])
        monkeypatch.setattr(engine_gemms, "build_and_load", lambda specs: {})
        assert self.start() == self.start() == [2, 16]
        kernel.key = "4567"
        assert self.start() == [4] and len(timed) == 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda kept: "{",
            lambda kept: "[]",
            lambda kept: json.dumps({**kept, "unknown": 1}),
            lambda kept: json.dumps({**kept, "gpu": "another"}),
            lambda kept: json.dumps({**kept, "rows": {"another GEMM": [1]}}),
            lambda kept: json.dumps({**kept, "rows": {}}),
            lambda kept: json.dumps({**kept, "rows": {"cuBLASLt without split k": ["2"]}}),
            lambda kept: json.dumps({**kept, "rows": {"cuBLASLt without split k": 2}}),
            lambda kept: json.dumps({**kept, "rows": [2]}),
        ],
    )
    def test_a_damaged_record_is_replaced(self, timed, cache_dir, change):
        self.start()
        (file,) = (cache_dir / "gemms").iterdir()
        file.write_text(change(json.loads(file.read_text())))
        assert self.start() == self.start() == [4] and len(timed) == 2

    def test_a_folder_in_place_of_a_record(self, timed, cache_dir):
        """It is moved to quarantine, which is cleaned up."""
        self.start()
        (file,) = (cache_dir / "gemms").iterdir()
        file.unlink()
        (file / "folder").mkdir(parents=True)
        assert self.start() == self.start() == [4] and len(timed) == 2
        (quarantined,) = (cache_dir / "quarantine").iterdir()
        assert quarantined in cleanup.leftovers(Cache(cache_dir))

    @pytest.mark.parametrize("problem", ["full", "read-only"])
    def test_a_cache_that_cannot_be_written(self, timed, cache_dir, monkeypatch, caplog, problem):
        """It is said once, and no temporary folder takes its place."""

        def write(*arguments):
            raise OSError("no space left")

        if problem == "full":
            monkeypatch.setattr(Cache, "write_record", write)
        else:
            monkeypatch.setattr(locations, "reason_not_writable", lambda root: "it is read-only")
        assert self.start() == [2, 16] and self.start() == [4] and len(timed) == 2
        why = "no space left" if problem == "full" else "it is read-only"
        assert caplog.text.count(f"cannot keep the choice of GEMMs in {cache_dir}: {why}") == 1
        assert not locations.is_temporary()

    @pytest.mark.parametrize("place", ["prebuilt", "read-only"])
    def test_choices_that_came_with_an_image(self, timed, cache_dir, tmp_path, monkeypatch, place):
        assert self.start() == [2, 16]
        if place == "prebuilt":
            cache_dir.rename(tmp_path / "layer")
            monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(tmp_path / "layer"))
        else:  # the default cache is read although kernels are built elsewhere
            monkeypatch.setattr(locations, "_temporary", Cache(tmp_path / "temporary"))
        assert self.start() == [2, 16] and len(timed) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("after_norm", [True, False])
def test_all_gemms_on_the_gpu(monkeypatch, after_norm):
    """Whatever is fastest, the product is the same but for rounding; in a CUDA graph too."""
    weights = [torch.randn(1024, 2048, device="cuda").mul(0.02).to(BF16) for _ in range(4)]
    shapes, (said,) = engine_gemms.select(*((weights, []) if after_norm else ([], weights)))
    assert said.startswith("n=1024 k=2048, numbers of rows: ")
    (shape,) = shapes
    gemms = engine_gemms._candidates(weights[0], engine_gemms._kernels_for(weights[0], None), None)
    assert len(gemms) == 2 + (torch.cuda.get_device_capability() == (9, 0))
    for gemm in gemms.values():
        monkeypatch.setitem(engine_gemms._chosen, shape, dict.fromkeys(engine_gemms.ROWS, gemm))
        for rows in (1, 3, 64, 65):
            x = torch.randn(rows, 2048, device="cuda", dtype=BF16)
            got = engine_gemms.linear(x, weights[0])
            assert relative_error(got, x.double() @ weights[0].double().t()) <= TOLERANCE[BF16]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = engine_gemms.linear(x, weights[0])
            captured.fill_(float("nan"))
            graph.replay()
            assert same_bits(captured, got)


@pytest.mark.gpu
def test_gated_gemms_on_the_gpu(monkeypatch):
    """Whatever is fastest, the result is the same but for rounding; in a CUDA graph too."""
    weights = [torch.randn(1024, 2048, device="cuda").mul(0.02).to(BF16) for _ in range(4)]
    shapes, (said,) = engine_gemms.select([], [], [(weight, "silu_and_mul") for weight in weights])
    assert said.startswith("n=1024 k=2048 with silu_and_mul, numbers of rows: ")
    (shape,) = shapes
    kernels = engine_gemms._kernels_for(weights[0], "silu_and_mul")
    gemms = engine_gemms._candidates(weights[0], kernels, "silu_and_mul")
    assert len(gemms) == 1 + (torch.cuda.get_device_capability() == (9, 0))
    for gemm in gemms.values():
        monkeypatch.setitem(engine_gemms._chosen, shape, dict.fromkeys(engine_gemms.ROWS, gemm))
        for rows in (1, 3, 64, 65):
            x = torch.randn(rows, 2048, device="cuda", dtype=BF16)
            got = engine_gemms.gated_linear(x, weights[0], "silu_and_mul")
            # The products are rounded before the activation: two more errors than that of one rounding.
            expected = activated(x, weights[0], "silu_and_mul")
            assert relative_error(got, expected) <= 2 * TOLERANCE[BF16]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = engine_gemms.gated_linear(x, weights[0], "silu_and_mul")
            captured.fill_(float("nan"))
            graph.replay()
            assert same_bits(captured, got)


def test_a_norm_without_a_kernel_is_replaced_by_a_kernel_of_torch(monkeypatch):
    def norm(*args, **kwargs):
        raise RuntimeError("no kernel")

    assert engine_gemms._has_norm(torch.randn(3, 64), 64)
    monkeypatch.setattr(engine_gemms, "general_rmsnorm", norm)
    assert not engine_gemms._has_norm(torch.randn(3, 64), 64)
    source, to = torch.randn(3, 64), torch.full((3, 64), float("nan"))
    engine_gemms._kernel(source, to, False)()
    assert same_bits(to, source)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("samples", "taken", "is_chosen"),
    [
        ([0.1, 0.9, 0.91, 5.0], 4, True),
        ([0.1, 1.5, 2.5, 3.5, 0.9, 0.91, 0.1], 6, True),  # the GPU is busy at first
        ([0.1, 3.0, 2.5, 2.0, 1.5, 1.51], 6, False),
        ([9.0, *(2.0 + i for i in range(11)), 0.5, 0.1], 13, True),  # and to the end
    ],
)
def test_samples_are_taken_until_two_agree(samples, taken, is_chosen, monkeypatch):
    """Those of torch are 1.0. The first warms up."""
    calls = {"torch": 0, "other": 0}

    def measure(gemm, x, *others):
        name = "other" if gemm is other else "torch"
        calls[name] += len(x) == 1
        return 1.0 if gemm is not other or len(x) != 1 else samples[calls["other"] - 1]

    def other(*operands):
        raise AssertionError

    monkeypatch.setattr(engine_gemms, "_seconds", measure)
    monkeypatch.setattr(engine_gemms.torch.cuda, "device", lambda device: torch.no_grad())
    chosen = engine_gemms._choose({"other": other}, [torch.randn(64, 128)] * 2, False, None)
    assert chosen == {"other": [1] * is_chosen} and calls == {"torch": taken, "other": taken}


@pytest.mark.usefixtures("on_a_gpu")
def test_as_many_weights_are_timed_as_exceed_an_l2(monkeypatch):
    monkeypatch.setattr(engine_gemms, "_MAX_TIMED_BYTES", 5 * 64 * 128 * 4 - 1)
    monkeypatch.setattr(engine_gemms.torch.cuda, "device", lambda device: torch.no_grad())
    counts = set()

    def measure(gemm, x, weights, out, *kernels):
        counts.add(len(weights))
        return 1.0

    monkeypatch.setattr(engine_gemms, "_seconds", measure)
    for weights in ([torch.randn(64, 128)] * 9, [torch.randn(64, 128)] * 3, [torch.randn(640, 128)] * 3):
        engine_gemms._read_or_choose({}, {}, weights, False, None)
    assert counts == {5, 3, 2}


@pytest.mark.parametrize("host_seconds", [0.0005, 0.003, 1.0])
def test_a_sample_is_taken_again_if_the_gpu_waited_for_the_host(monkeypatch, host_seconds):
    slept, clock = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = sum(slept) + 0.001 * len(calls)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    calls = []
    for name, fake in {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: slept.append(cycles / 2e6),
    }.items():
        monkeypatch.setattr(engine_gemms.torch.cuda, name, fake)
    monkeypatch.setattr(engine_gemms.time, "perf_counter", lambda: next(clock) * host_seconds)
    weights = [torch.randn(64, 128)] * 5
    is_too_slow = host_seconds == 1.0
    with pytest.raises(RuntimeError, match="the host takes too long") if is_too_slow else contextlib.nullcontext():
        got = engine_gemms._seconds(lambda *operands: calls.append(operands), None, weights, None, list, list)
        assert got == pytest.approx(5e-6)
    assert slept == {0.0005: [1], 0.003: [1, 2, 4], 1.0: [1, 2, 4, 8]}[host_seconds] and len(calls) == 5 * len(slept)

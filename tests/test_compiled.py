"""compiled: numba's code where numba works, in torch's threads; and what the passes do to numbers."""
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from seresnet import compiled, runtime


def test_it_runs_in_as_many_threads_as_torch_has_and_leaves_torch_its_number():
    """In a program of its own: numba's first start is what would change torch's number."""
    code = """if True:
        import torch
        from seresnet import compiled, pool
        torch.set_num_threads(1)
        compiled.LEAST, x = 0, torch.zeros(2, 3, 6, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        pool.MaxPool2x2()(x).float().sum().backward()
        import numba
        print(compiled.passes() is None, torch.get_num_threads(), numba.get_num_threads())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["False", "1", "1"], ["True", "1", str(runtime.available_cores())]), done.stdout    # True: not here


@pytest.mark.parametrize("first", ["compiled.passes()", "runtime.import_ffcv()"])
def test_a_cpu_with_matrix_units_gets_wide_vectors_whoever_compiles_first(first):
    pytest.importorskip("ffcv")
    code = f"""if True:
        from seresnet import compiled, runtime
        compiled.has_matrix_units, compiled._try = lambda: True, lambda *_: None    # what is compiled is not asked for here
        {first}
        compiled.passes()
        from numba.core.registry import cpu_target
        print(cpu_target.target_context.codegen().magic_tuple()[-1])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.strip().endswith(",-prefer-256-bit"), done.stderr + done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere numba chooses")
@pytest.mark.parametrize("asked, first", [("", "omp"), ("tbb workqueue omp", "tbb"), ("workqueue tbb omp", "workqueue")])
def test_numbas_threads_are_torchs_unless_the_user_has_chosen_others(asked, first):
    code = "from seresnet import compiled; compiled.set_up_numba(); import numba; print(*numba.config.THREADING_LAYER_PRIORITY)"
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_THREADING_LAYER_PRIORITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          env={**environment, **({"NUMBA_THREADING_LAYER_PRIORITY": asked} if asked else {})})
    assert done.returncode == 0 and done.stdout.split()[0] == first, done.stderr + done.stdout


@pytest.mark.parametrize("fault, works", [("disk", True), ("damaged", True), ("jit", False), ("layer", False), ("setting", False), ("library", False)])
def test_a_numba_that_does_not_work_leaves_it_to_torch(fault, works, monkeypatch, numba_passes, caplog):
    import numba
    njit = numba.njit

    def failing(error):
        def decorate(function, cache, **options):
            if cache:
                raise error
            return njit(function, **options)
        monkeypatch.setattr(numba, "njit", decorate)

    def refuse(error):
        def raises(*_):
            raise error
        return raises
    if fault == "disk":
        failing(OSError("No space left on device"))
    elif fault == "damaged":
        failing(EOFError("Ran out of input"))
    elif fault == "jit":
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    elif fault == "layer":
        monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    elif fault == "setting":
        monkeypatch.setattr(numba, "set_num_threads", refuse(ValueError("No threading layer could be loaded")))
    else:
        monkeypatch.setattr(compiled, "set_up_numba", refuse(OSError("Could not find/load shared object file")))
    tried = []

    def one(found, kind):    # of the passes, whose compilation is one function
        tried.append(1)
        found.unpool(np.zeros((1, 1, 1, 1), kind), np.zeros((1, 1, 1, 1), np.uint8), np.zeros((1, 2, 2, 1), kind))
    monkeypatch.setattr(compiled, "_try", one)
    assert (compiled.passes.__wrapped__() is not None) == works
    assert bool(tried) == works, "nothing is compiled for threads that may not be used"
    told = [record.getMessage() for record in caplog.records if "does not work here" in record.getMessage()]
    assert len(told) == (not works) and all("steps take longer; python -m seresnet.doctor" in line for line in told)


@pytest.mark.parametrize("seconds, told", [(0, 0), (0.5, 1)])
def test_compiling_is_told_where_it_takes_long(seconds, told, monkeypatch, caplog, numba_passes):
    monkeypatch.setattr(compiled, "PATIENCE", 0.2)
    monkeypatch.setattr(compiled, "_try", lambda *_: time.sleep(seconds))
    assert compiled.passes.__wrapped__() is not None
    time.sleep(0.3)    # nothing is told afterwards
    assert [record.getMessage().split()[0] for record in caplog.records if record.name == "seresnet"] == ["compiling"] * told


def test_compiling_for_another_kind_is_told_later(monkeypatch, numba_passes):
    """Once a kind, and once where many are compiled together."""
    told, tells = [], compiled.told_where_it_takes_long
    monkeypatch.setattr(compiled, "told_where_it_takes_long", lambda: told.append(1) or tells())
    monkeypatch.setattr(compiled, "PATIENCE", 1e-9)
    warnings = []
    monkeypatch.setattr(logging.getLogger("seresnet"), "warning", warnings.append)
    monkeypatch.setattr(compiled, "_try", lambda found, kind: (unpool(found, np.int32), unpool(found, np.int16)))

    def unpool(found, kind):
        found.unpool(np.zeros((1, 1, 1, 1), kind), np.zeros((1, 1, 1, 1), np.uint8), np.zeros((1, 2, 2, 1), kind))
        time.sleep(0.05)    # the timer has a thread of its own
    found = compiled.passes.__wrapped__()
    assert len(told) == 3 and len(warnings) == 1
    for kind, times in ((np.int32, 1), (np.int16, 1), (np.int64, 2), (np.int64, 2)):
        unpool(found, kind)
        assert len(warnings) == times


def test_what_is_first_compiled_in_a_training_does_without_a_cache_too(tmp_path):
    """A pass with a ReLU, after those with GELU have been found to work."""
    code = """
import sys, torch
from seresnet import compiled
x, unit = torch.tensor([-2.0, -1, 0, 3]).view(1, 4, 1), torch.ones(1, 1)
compiled._try = lambda passes, kind: passes.activate(x, x, unit, 0 * unit, 0.0, None, torch.empty_like(x))    # GELU's alone
passes = compiled.passes()
if passes is None:
    sys.exit("skip")
if sys.argv[1] == "full":
    from numba.core import caching
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    caching.IndexDataCacheFile.save = full
for _ in range(2):
    y = torch.empty_like(x)
    passes.activate(x, x, unit, 0 * unit, 0.0, 0.5, y)
    assert y.flatten().tolist() == [-1, -0.5, 0, 3], y
"""
    def files_after(disk):
        done = subprocess.run([sys.executable, "-c", code, disk], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                              env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
        if done.stderr.strip().endswith("skip"):
            pytest.skip("no numba here whose threads could be used")
        assert done.returncode == 0, done.stderr
        return sorted(tmp_path.rglob("*activate*.nbc"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files_after("full")) == 1    # GELU's
    gelu, relu = files_after("free")
    relu.write_bytes(relu.read_bytes()[:1000])
    assert files_after("free") == [gelu, relu]


@pytest.fixture
def source(numba_passes):
    from seresnet import kernels
    return kernels


def test_numbers_become_bfloat16_and_back_as_torch_rounds_them(source):
    bits = torch.randint(-2**31, 2**31, (3000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    bits = bits.view(torch.float32)
    numbers = torch.cat([bits[~bits.isnan()], torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, float("inf"), float("nan")])])
    rounded = numbers.to(torch.bfloat16)
    for number, expected in zip(numbers.numpy(), rounded):
        got = torch.tensor(source.narrow(number), dtype=torch.int16).view(torch.bfloat16)
        assert torch.equal(got, expected) or got.isnan() and expected.isnan(), number
        assert np.float32(source.widen(compiled.bits(expected)[()])) == expected.item() or expected.isnan()


def test_gelu_is_torchs_for_every_bfloat16(source):
    """Within 2e-4, and half of a step of bfloat16."""
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    y, unit = torch.empty_like(every), np.ones((1, 1), np.float32)
    x = compiled.bits(every.view(1, -1, 1))
    compiled.passes().activate(x, x, unit, 0 * unit, 0.0, None, compiled.bits(y.view(1, -1, 1)))
    exact = torch.nn.functional.gelu(every.double())
    negative = every < -4    # where the share stays at 3e-5
    assert ((y.double() - exact).abs() <= 2e-4 + 2**-8 * exact.abs())[~negative].all()
    assert (y.double().abs() <= 4e-5 * every.double().abs())[negative].all()


def test_gelu_in_float32_is_torchs_within_a_millionth(source):
    x = torch.linspace(-12, 12, 100_001)
    y, unit = torch.empty_like(x), np.ones((1, 1), np.float32)
    bits = compiled.bits(x.view(1, -1, 1))
    compiled.passes().activate(bits, bits, unit, 0 * unit, 0.0, None, compiled.bits(y.view(1, -1, 1)))
    exact = x.double().requires_grad_()
    torch.nn.functional.gelu(exact).sum().backward()
    assert torch.allclose(y.double(), torch.nn.functional.gelu(exact.detach()), rtol=2e-7, atol=2e-6)
    slopes = np.array([source.fine_gelu_slope(u) for u in x[::100].numpy()])
    assert np.allclose(slopes, exact.grad[::100].numpy(), rtol=0, atol=2e-6)
    assert torch.allclose(y[x.abs() < 5].double(), torch.nn.functional.gelu(exact.detach())[x.abs() < 5], rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("u", [-9.0, -4.1, -3.9, -2.0, -0.75, -1e-3, 0.0, 1e-20, 0.3, 1.0, 2.5, 3.99, 4.01, 30.0])
def test_the_slope_of_gelu_is_its_derivative(u, source):
    x = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.gelu(x).backward()
    assert abs(source.gelu_slope(np.float32(u)) - x.grad.item()) <= 6e-4
    if abs(u) < 4:
        assert abs(source.gelu_slope(np.float32(u)) - x.grad.item()) <= 8e-5
        assert abs(source.normal_share(np.float32(u)) - (1 + torch.erf(x.detach() / 2**0.5).item()) / 2) <= 1e-5

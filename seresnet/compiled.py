"""seresnet/kernels.py, compiled by numba where numba can, gpu_kernels.py, compiled by Triton, and when a tensor is worth it."""
from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}    # what a number's bits are passed as
ON_A_GPU = (torch.bfloat16, torch.float16, torch.float32)
LEAST = 1 << 20    # elements from which it is worth loading the compiled code, some tenths of a second where it was compiled before
PATIENCE = 3.0    # seconds without a word; what was compiled before is loaded in less
ROWS = 64    # sums over the batch are taken in so many parts, whatever the number of threads: results do not depend on it


def worth_it(x: torch.Tensor) -> bool:
    """Whether compiled passes may take x (B, C, H, W): they may read it, and it wants a gradient, or none is kept anywhere."""
    return (x.requires_grad or not torch.is_grad_enabled()) and may_read(x)


def may_read(x: torch.Tensor) -> bool:
    """Whether compiled passes may read x (B, C, H, W): bfloat16 or float32 on a CPU, float16 as well on a GPU, channels-last, and large;
    not where torch only looks on what is done (traces, modes of its dispatcher, torch.func)."""
    return (not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _get_current_dispatch_mode() is None
            and torch._C._functorch.peek_interpreter_stack() is None
            and (x.dtype in ON_A_GPU and x.numel() < (1 << 31) - (1 << 16) if x.is_cuda else x.dtype in BITS and x.device.type == "cpu")
            and x.numel() >= max(1, LEAST) and x.is_contiguous(memory_format=torch.channels_last) and passes_for(x) is not None)


def passes_for(x: torch.Tensor) -> SimpleNamespace | ModuleType | None:
    """The passes for x's device, of tensors (B, H, W, C) and (B, P, C); None where it has none, or where `use_triton` has not asked."""
    if x.is_cuda:
        return passes_on_a_gpu(x.device) if _triton_is_wanted else None
    return passes()


_triton_is_wanted = False


def use_triton(wanted: bool) -> None:
    """Whether passes on a GPU are Triton's from now on, in this process. Loading it takes more than a second: it is for long trainings."""
    global _triton_is_wanted
    _triton_is_wanted = wanted


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor's memory as an int16 array, since numba knows no bfloat16, and a float32 tensor's as an int32 array."""
    return tensor.detach().view(BITS[tensor.dtype]).numpy()


@cache
def has_matrix_units() -> bool:
    """Whether the CPU has AMX tiles, with which torch convolves in bfloat16."""
    return torch.cpu._is_amx_tile_supported()


@cache
def has_bf16(device: torch.device = torch.device("cpu")) -> bool:
    """Whether the device multiplies in bfloat16, so that it is faster than float32 there: CPUs with AVX-512 BF16 or AMX, NVIDIA GPUs
    from compute capability 8.0. Elsewhere torch can do it, and takes some fifty times as long."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or has_matrix_units())


def set_up_numba() -> None:
    """Let numba use the CPU's widest vectors, and torch's threads. To be called before anything is decorated for it: it decides then,
    for the whole process. What the user has set in numba's own variables stays, where it is not what numba has by default.

    LLVM prefers 256 of 512 bits, for CPUs that slow down with wider vectors; those with matrix units do not. Of numba's kinds of
    threads TBB comes first where it is installed (OpenCV brings it), whose threads then wait for a core on which torch's, of OpenMP,
    still look for work: a step of se94 in float32 took 1.2 times as long (records/: float32). Elsewhere than on Linux the two need not
    have one OpenMP in common.
    """
    import numba
    if sys.platform == "linux" and numba.config.THREADING_LAYER_PRIORITY == ["tbb", "omp", "workqueue"]:
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    if numba.config.CPU_FEATURES is None and has_matrix_units():
        numba.config.CPU_FEATURES = numba.core.codegen.get_host_cpu_features() + ",-prefer-256-bit"


def share_threads() -> None:
    """Give numba as many threads as torch has; it starts them where it has none yet."""
    import numba
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)    # numba's OpenMP, started first, sets the number that is torch's, too


@cache
def passes() -> SimpleNamespace | None:
    """The passes of seresnet/kernels.py by name, in as many threads as torch has, ready to run. None where numba is missing or does not
    work, and where its threads are of the kind that may not be started from several Python threads at once, as FFCV's reader and a
    training would; the log `seresnet` is told why, unless it is missing.

    numba keeps the machine code on disk (beside that file, or in the user's cache folder): it compiles once a machine, in ten to thirty seconds.
    """
    try:
        import numba
        if numba.config.DISABLE_JIT:
            return _left_to_torch("numba", "NUMBA_DISABLE_JIT is set")
        set_up_numba()
        share_threads()    # before anything is compiled for them it is known which kind they are
        if (kind := numba.threading_layer()) not in ("omp", "tbb"):
            return _left_to_torch("numba", f"its threads are of the kind {kind}, for want of OpenMP's or TBB's")
        from seresnet import kernels
    except ModuleNotFoundError as error:
        return None if error.name == "numba" else _left_to_torch("numba", error)
    except Exception as error:    # broken, in whatever way: torch can do all that is done here
        return _left_to_torch("numba", error)

    def compiled_by_numba(function, keep):
        return numba.njit(function, parallel=True, cache=keep, fastmath={"contract"})

    def threaded(function):
        passing, compiled_for = None, set()

        def call(*arguments):
            nonlocal passing
            arrays = [_array(value) if isinstance(value, torch.Tensor) else tuple(value) if isinstance(value, tuple) else value
                      for value in arguments]    # for a named tuple numba would compile anew
            share_threads()
            kinds = tuple((value.dtype, value.ndim) if isinstance(value, np.ndarray) else type(value) for value in arrays)
            with nullcontext() if kinds in compiled_for else told_where_it_takes_long():
                try:
                    passing = passing or compiled_by_numba(function, True)
                    passing(*arrays)
                except Exception:    # a cache that cannot be written, or read, is no reason to do without
                    passing = compiled_by_numba(function, False)
                    passing(*arrays)
            compiled_for.add(kinds)
        return call

    functions = (kernels.pool, kernels.unpool, kernels.sums, kernels.activate, kernels.gradient_sums, kernels.gradients,
                 kernels.patches, kernels.patches_back, kernels.outputs, kernels.outputs_back)
    found = SimpleNamespace(**{function.__name__: threaded(function) for function in functions})
    found.ROWS, found.statistics, found.gradient_statistics = ROWS, statistics, gradient_statistics
    try:
        with told_where_it_takes_long():
            _try(found, np.int16 if has_bf16() else np.int32)
        return found
    except Exception as error:    # numba raises what a setting of its own leads it to
        return _left_to_torch("numba", error)


def _left_to_torch(compiler: str, reason: object) -> None:
    """Say, to the log `seresnet`, that and why torch does what compiled passes would do in less time."""
    lines = str(reason).splitlines() or [type(reason).__name__]
    logging.getLogger("seresnet").warning(f"{compiler} does not work here ({lines[0][:200]}): steps take longer; python -m seresnet.doctor")


_telling = threading.Lock()


@contextmanager
def told_where_it_takes_long() -> Iterator[None]:
    """Say, to the log `seresnet`, what takes so long, where it takes longer than PATIENCE seconds. Without a handler of the user's own that is
    a line on the error stream. Within another such block, it is that one's to say."""
    if not _telling.acquire(blocking=False):
        yield
        return
    timer = threading.Timer(PATIENCE, logging.getLogger("seresnet").warning, [
        "compiling for this CPU, once where the disk can keep it: 10 to 60 s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _telling.release()


def _try(passes: SimpleNamespace, kind: type) -> None:
    """Every pass once, with little, in the kind of bits that trainings take on this CPU unless told otherwise, and with GELU: what is
    compiled for other kinds, or a ReLU, is so where it is first needed."""
    images, one, byte = (np.zeros((1, 2, 2, 1), kind) for kind in (kind, kind, np.uint8))
    pooled, taken, x = one[:, ::2, ::2].copy(), byte[:, ::2, ::2].copy(), np.zeros((1, 4, 1), kind)
    rows, channel, scale = np.zeros((1, 1), np.float32), np.zeros(1, np.float32), 0.0
    passes.pool(images, pooled, taken)
    passes.unpool(pooled, taken, images)
    passes.sums(x, channel, rows, rows.copy())
    passes.activate(x, x, rows, rows, scale, None, x.copy())
    passes.gradient_sums(x, x, x, rows, rows, scale, None, channel, rows.copy(), rows.copy())
    passes.gradients(x, x, x, rows, rows, scale, None, channel, rows, rows, x.copy(), x.copy())
    if kind is np.int32:    # of float32 alone
        image, places, region = np.zeros((1, 1, 1, 1), np.float32), np.zeros((25, 1, 1), np.float32), (0, 0, 1, 1, 3, 3)
        passes.patches(image, 1, region, places)
        passes.outputs(places, region, image)
        passes.outputs_back(image, region, places)
        passes.patches_back(places, 1, region, image)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """What numba is given of a tensor: the bits of images and of pixels in a row, numbers of what has two dimensions or one."""
    return bits(tensor) if tensor.dim() > 2 and tensor.dtype in BITS else tensor.detach().numpy()


def statistics(norm: torch.nn.BatchNorm2d, total: torch.Tensor, squares: torch.Tensor, pivot: torch.Tensor,
               count: int) -> tuple[torch.Tensor, ...]:
    """From sums over parts of a batch of `count` values a channel, float32 (R, C), to (C,) each: the mean, 1 / the standard deviation, and
    a, d of the normalisation a * x + d. Updates the running statistics of `norm`."""
    shift = total.sum(0, dtype=torch.float64) / count
    variance = (squares.sum(0, dtype=torch.float64) / count - shift.square()).clamp_(min=0)
    mean, deviation = (pivot + shift).float(), (variance + norm.eps).rsqrt().float()
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).float(), norm.momentum)
    factor = norm.weight.detach() * deviation
    return mean, deviation, factor, norm.bias.detach() - mean * factor


def gradient_statistics(total: torch.Tensor, product: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor,
                        count: int) -> tuple[torch.Tensor, ...]:
    """From sums of what comes back and of its product with x - mean, float32 (R, C), to (C,) each: the gradients of weight and bias, and
    what x's gradient is beside its share of what comes back: a factor of x, and a constant."""
    of_bias, of_weight = (sums.sum(0, dtype=torch.float64).float() for sums in (total, product * deviation))
    factor = weight * deviation
    of_value = -factor * deviation * of_weight / count
    return of_weight, of_bias, of_value, -factor * of_bias / count - of_value * mean


@cache
def passes_on_a_gpu(device: torch.device) -> ModuleType | None:
    """As `passes`, of seresnet/gpu_kernels.py, for the GPU `device`. None where Triton is missing (torch brings it on Linux) or does not
    work, of which the log `seresnet` is told, and below compute capability 8.0, which it does not support. Triton keeps the machine code
    on disk, in the user's folder."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from seresnet import gpu_kernels
        _try_on(gpu_kernels, device)
        return gpu_kernels
    except ModuleNotFoundError as error:
        return None if error.name == "triton" else _left_to_torch("Triton", error)
    except Exception as error:    # without a compiler for what it starts kernels by, or whatever else: torch can do all that is done here
        return _left_to_torch("Triton", error)


def _try_on(passes: ModuleType, device: torch.device) -> None:
    """Every pass once, in bfloat16, with little, in the form that most nets take: what is compiled here serves them."""
    with torch.device(device), torch.no_grad():
        images = torch.zeros(2, 2, 2, 32, dtype=torch.bfloat16)
        pooled, taken = images[:, :1, :1].contiguous(), torch.zeros(2, 1, 1, 32, dtype=torch.uint8)
        passes.pool(images, pooled, taken)
        passes.unpool(pooled, taken, images)
        x, norm, rows = images.view(2, 4, 32), torch.nn.BatchNorm2d(32), torch.zeros(2, 32)
        passes.sums(x, rows[0], rows, rows.clone())
        mean, deviation, a, d = passes.statistics(norm, rows, rows, rows[0], 8)
        for scale in (0.0, 0.3):
            passes.activate(x, x, a[None], d[None], scale, None, x.clone())
            passes.gradient_sums(x, x, x, a[None], d[None], scale, None, mean, rows, rows.clone())
            *_, of_value, constant = passes.gradient_statistics(rows, rows, norm.weight, mean, deviation, 8)
            passes.gradients(x, x, x, a[None], d[None], scale, None, of_value, constant[None], a[None], x.clone(), x.clone())
        # not torch's own layers: they would draw from the generator that a training's dropout draws from
        gate = SimpleNamespace(squeeze=SimpleNamespace(weight=torch.zeros(2, 32), bias=torch.zeros(2), out_features=2),
                               excite=SimpleNamespace(weight=torch.zeros(32, 2), bias=torch.zeros(32)))
        *_, kept = passes.gates(gate, rows, mean, mean, a, d, d, 4)
        passes.gates_back(gate, kept, rows.clone(), rows.clone(), a, d, 4)
    torch.cuda.synchronize(device)

"""seresnet/kernels.py, compiled by numba where numba can, and when a tensor is worth it."""
from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}    # what a number's bits are passed as
LEAST = 1 << 20    # elements from which it is worth loading the compiled code, some tenths of a second where it was compiled before


def worth_it(x: torch.Tensor) -> bool:
    """Whether compiled passes may take x (B, C, H, W): they may read it, and it wants a gradient, or none is kept anywhere."""
    return (x.requires_grad or not torch.is_grad_enabled()) and may_read(x)


def may_read(x: torch.Tensor) -> bool:
    """Whether compiled passes may read x (B, C, H, W): bfloat16 or float32 on a CPU, channels-last, and large; not where torch only
    looks on what is done (traces, modes of its dispatcher, torch.func)."""
    return (not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _get_current_dispatch_mode() is None
            and torch._C._functorch.peek_interpreter_stack() is None and x.dtype in BITS and x.device.type == "cpu"
            and x.numel() >= max(1, LEAST) and x.is_contiguous(memory_format=torch.channels_last) and passes() is not None)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor's memory as an int16 array, since numba knows no bfloat16, and a float32 tensor's as an int32 array."""
    return tensor.detach().view(BITS[tensor.dtype]).numpy()


def pixels(images: torch.Tensor) -> np.ndarray:
    """The bits of images (B, C, H, W) as an array (B, H, W, C): the same memory where that is channels-last, a copy elsewhere."""
    return bits(images.permute(0, 2, 3, 1).contiguous())


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


@cache
def passes() -> SimpleNamespace | None:
    """The passes of seresnet/kernels.py by name, in as many threads as torch has, ready to run. None where numba is missing or does not
    work, and where its threads are of the kind that may not be started from several Python threads at once, as FFCV's reader and a
    training would.

    numba keeps the machine code on disk (beside that file, or in the user's cache folder): it compiles once a machine, in some seconds.
    """
    try:
        import numba
        if numba.config.DISABLE_JIT:
            return None
        set_up_numba()
        from seresnet import kernels
    except Exception:    # not there, or broken, in whatever way: torch can do all that is done here
        return None

    def threaded(function):
        def call(*arrays):
            threads = torch.get_num_threads()
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            torch.set_num_threads(threads)    # numba's OpenMP, started first, sets the number that is torch's, too
            function(*arrays)
        return call

    functions = (kernels.pool, kernels.unpool, kernels.sums, kernels.activate, kernels.gradient_sums, kernels.gradients,
                 kernels.patches, kernels.patches_back, kernels.outputs, kernels.outputs_back)
    for keep in (True, False):    # a cache that cannot be written, or read, is no reason to do without
        try:
            found = SimpleNamespace(**{function.__name__: threaded(numba.njit(function, parallel=True, cache=keep, fastmath={"contract"}))
                                       for function in functions})
            _try(found, np.int16 if has_bf16() else np.int32)
            return found if numba.threading_layer() in ("omp", "tbb") else None
        except Exception:    # numba raises what a disk, a damaged file or a setting of its own leads it to
            continue
    return None


def _try(passes: SimpleNamespace, kind: type) -> None:
    """Every pass once, with little, in the kind of bits that trainings take on this CPU unless told otherwise."""
    images, one, byte = (np.zeros((1, 2, 2, 1), kind) for kind in (kind, kind, np.uint8))
    pooled, taken, x = one[:, ::2, ::2].copy(), byte[:, ::2, ::2].copy(), np.zeros((1, 4, 1), kind)
    rows, channel, scale = np.zeros((1, 1), np.float32), np.zeros(1, np.float32), 0.0
    passes.pool(images, pooled, taken)
    passes.unpool(pooled, taken, images)
    passes.sums(x, channel, rows, rows.copy())
    passes.activate(x, x, rows, rows, scale, x.copy())
    passes.gradient_sums(x, x, x, rows, rows, scale, channel, rows.copy(), rows.copy())
    passes.gradients(x, x, x, rows, rows, scale, channel, rows, rows, x.copy(), x.copy())
    if kind is np.int32:    # of float32 alone
        image, places = np.zeros((1, 1, 1, 1), np.float32), np.zeros((25, 1, 1), np.float32)
        passes.patches(image, 1, 1, 1, places)
        passes.outputs(places, image)
        passes.outputs_back(image, places)
        passes.patches_back(places, 1, 1, 1, image)

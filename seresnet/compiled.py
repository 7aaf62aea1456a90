"""seresnet/kernels.py, compiled by numba where numba can, and when a tensor is worth it."""
from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch

LEAST = 1 << 20    # elements from which loading the compiled code, some tenths of a second once, is worth it


def worth_it(x: torch.Tensor) -> bool:
    """Whether compiled passes may take x (B, C, H, W): part of a training in bfloat16 on a CPU, channels-last, and large."""
    return (x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad and x.numel() >= max(1, LEAST)
            and x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling() and passes() is not None)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor's memory as an int16 array: numba knows no bfloat16."""
    return tensor.detach().view(torch.int16).numpy()


def pixels(images: torch.Tensor) -> np.ndarray:
    """The bits of images (B, C, H, W) as an array (B, H, W, C): the same memory where that is channels-last, a copy elsewhere."""
    return bits(images.permute(0, 2, 3, 1).contiguous())


@cache
def has_matrix_units() -> bool:
    """Whether the CPU has AMX tiles, with which torch convolves in bfloat16."""
    return torch.cpu._is_amx_tile_supported()


def take_wide_vectors() -> None:
    """Let numba use the CPU's widest vectors. To be called before anything is decorated for it: it decides then, for the whole process.

    LLVM prefers 256 of 512 bits, for CPUs that slow down with wider vectors; those with matrix units do not.
    """
    import numba
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
        take_wide_vectors()
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

    functions = (kernels.pool, kernels.unpool, kernels.sums, kernels.activate, kernels.gradient_sums, kernels.gradients)
    for keep in (True, False):    # a cache that cannot be written, or read, is no reason to do without
        try:
            found = SimpleNamespace(**{function.__name__: threaded(numba.njit(function, parallel=True, cache=keep, fastmath={"contract"}))
                                       for function in functions})
            _try(found)
            return found if numba.threading_layer() in ("omp", "tbb") else None
        except Exception:    # numba raises what a disk, a damaged file or a setting of its own leads it to
            continue
    return None


def _try(passes: SimpleNamespace) -> None:
    """Every pass once, with little."""
    images, one, byte = (np.zeros((1, 2, 2, 1), kind) for kind in (np.int16, np.int16, np.uint8))
    pooled, taken, x = one[:, ::2, ::2].copy(), byte[:, ::2, ::2].copy(), np.zeros((1, 4, 1), np.int16)
    rows, channel, scale = np.zeros((1, 1), np.float32), np.zeros(1, np.float32), 0.0
    passes.pool(images, pooled, taken)
    passes.unpool(pooled, taken, images)
    passes.sums(x, channel, rows, rows.copy())
    passes.activate(x, x, rows, rows, scale, x.copy())
    passes.gradient_sums(x, x, x, rows, rows, scale, channel, rows.copy(), rows.copy())
    passes.gradients(x, x, x, rows, rows, scale, channel, rows, rows, x.copy(), x.copy())

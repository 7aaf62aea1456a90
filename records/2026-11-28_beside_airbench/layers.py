"""Convolutions of se94 in float32 by Winograd's filtering, forwards and backwards, 1,000 images: fastest of eight, in milliseconds, after the
rate of a product of two matrices of 2,048 x 2,048. To be run with another MKL kernel, too: see README.md."""
import time

from seresnet.runtime import tune_allocator

if __name__ == "__main__":
    tune_allocator()

import torch    # noqa: E402

from seresnet import winograd    # noqa: E402


def fastest(function, times: int = 8) -> float:
    """Seconds."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def both_ways(x: torch.Tensor, weight: torch.Tensor) -> None:
    y = winograd.Winograd.apply(x, weight, 1, *x.shape[2:])
    y.backward(y.detach())


if __name__ == "__main__":
    left, right, product = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    print(f"{2 * 2048**3 / fastest(lambda: torch.mm(left, right, out=product)) / 1e9:.0f} GFLOP/s", end="; ")
    for c_in, c_out, side in ((24, 64, 31), (64, 64, 15), (64, 256, 15), (256, 256, 7), (256, 256, 3), (64, 64, 13), (64, 256, 13), (256, 256, 6)):
        x = torch.randn(1000, c_in, side, side).to(memory_format=torch.channels_last).requires_grad_(c_in > 24)
        weight = torch.randn(c_out, c_in, 3, 3, requires_grad=True)
        print(f"{c_in} to {c_out}, {side}: {1e3 * fastest(lambda: both_ways(x, weight)):.0f}", end="; ")
    print()

"""Time of a 3x3 convolution, torch's way and with images side by side: python -m benchmarks.convolutions [--out DIR]

Forwards and both gradients, bfloat16, channels-last, padded by one, as many channels out as in. seresnet/conv.py says what laying
images side by side is, for the gradient of the weights or throughout, and which way it takes on CPUs with matrix units; this measures
all of them here, with or without such units. Medians, in turns.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks import keep
from seresnet import report, runtime


def measure(side: int, channels: int, batch: int, rounds: int) -> dict:
    """Median seconds of the weights' gradient (two ways) and of all of a convolution (three), its arithmetic, and the way that is taken."""
    import torch
    import torch.nn.functional as F

    from seresnet import conv
    torch.manual_seed(0)
    x, gradient = (torch.randn(batch, channels, side, side).bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    leaf = x.detach().requires_grad_()

    def whole(convolution):
        return lambda: torch.autograd.grad(convolution(leaf, weight), (leaf, weight), gradient)
    ways = {"gradient, torch": lambda: conv.torchs_gradients(gradient, x, weight.detach(), 1, 1, (False, True, False)),
            "gradient, side by side": lambda: conv.weight_gradient(gradient, x, weight.detach(), padding=1),
            "torch": whole(lambda x, weight: F.conv2d(x, weight, padding=1)),
            "side by side": whole(lambda x, weight: conv.SideBySide.apply(x, weight, 1)),
            "throughout": whole(lambda x, weight: conv.SideBySideThroughout.apply(x, weight, 1))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:    # the first builds oneDNN's kernels
                seconds[name].append(time.perf_counter() - start)
    taken = {conv.SideBySide: "side by side", conv.SideBySideThroughout: "throughout", None: "torch"}
    return {"side": side, "channels": channels, "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "tflop": 2 * 9 * batch * (channels * side) ** 2 / 1e12, "taken": taken[conv.faster_way(side, weight, 1, 1)]}


def row(result: dict) -> tuple[str, ...]:
    """A line of the table: the weights' gradient both ways, everything three ways."""
    seconds, tflop = result["seconds"], result["tflop"]
    return (str(result["channels"]), f"{result['side']} x {result['side']}",
            *(f"{seconds[name] * 1e3:.1f} ms, {tflop / seconds[name]:.2f} TFLOP/s" for name in list(seconds)[:2]),
            *(f"{value * 1e3:.1f} ms" for value in list(seconds.values())[2:]), result["taken"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[3, 4, 6, 7, 8, 10, 12, 13, 15], help="image sides, pixels")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256, 384], help="channels in and out")
    parser.add_argument("--batch", type=int, default=1000, help="images (default 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, in turns (default 7)")
    parser.add_argument("--out", help="folder for convolutions.json")
    own = parser.parse_args()
    runtime.tune_allocator()
    from seresnet import conv    # loads torch, which has to come after the allocator's restart
    problems = [f"--sides: got {side}, expected {conv.ROW - 1} and fewer" for side in own.sides if side >= conv.ROW]
    problems += [f"--{name}: got {value}, expected 1 and more" for name, values in vars(own).items() if name != "out"
                for value in (values if isinstance(values, list) else [values]) if value < 1]
    if problems:
        raise runtime.UserError(*problems)
    results = [measure(side, channels, own.batch, own.rounds) for channels in own.channels for side in own.sides]
    print(report.table(("channels", "image", "weights' gradient, torch", "side by side", "all, torch", "all, gradient side by side",
                        "all, throughout", "taken"), [row(result) for result in results]))
    units = conv.has_matrix_units()
    print(f"medians of {own.rounds}, batches of {own.batch}; matrix units: {'yes' if units else 'no, so that training takes torch'}")
    keep(own.out, "convolutions", "none", {"batch": own.batch, "rounds": own.rounds, "matrix_units": units, "results": results})


if __name__ == "__main__":
    runtime.run_program(main)

"""Time of a 3x3 convolution's weight gradient, as torch computes it and side by side: python -m benchmarks.convolutions [--out DIR]

bfloat16, channels-last, as many channels out as in. seresnet/conv.py says what laying images side by side is, and takes it up to
LARGEST_PERIOD on CPUs with matrix units; this measures what it would do here, with or without them. Medians, both in turns.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks import keep
from seresnet import report, runtime


def measure(side: int, channels: int, batch: int, rounds: int) -> dict:
    """Median seconds of a gradient computed either way, and TFLOP/s of the arithmetic that is needed."""
    import torch

    from seresnet import conv
    torch.manual_seed(0)
    x, gradient = (torch.randn(batch, channels, side, side).bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3).bfloat16().to(memory_format=torch.channels_last)
    ways = {"torch": lambda: conv.torchs_gradients(gradient, x, weight, 1, 1, (False, True, False)),
            "side_by_side": lambda: conv.weight_gradient(gradient, x, weight, padding=1)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:    # the first builds oneDNN's kernels
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flop = 2 * 9 * batch * (channels * side) ** 2
    return {"side": side, "channels": channels, "seconds": medians,
            "tflops": {name: flop / value / 1e12 for name, value in medians.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[3, 4, 6, 7, 8, 10, 12, 13, 15], help="image sides, pixels")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256], help="channels in and out")
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
    rows = [(str(r["channels"]), f"{r['side']} x {r['side']}",
             *(f"{r['seconds'][way] * 1e3:.1f} ms, {r['tflops'][way]:.2f} TFLOP/s" for way in r["seconds"]),
             f"{r['seconds']['torch'] / r['seconds']['side_by_side']:.2f}", "yes" if r["side"] + 1 <= conv.LARGEST_PERIOD else "no")
            for r in results]
    print(report.table(("channels", "image", "torch", "side by side", "times faster", "taken"), rows))
    units = conv.has_matrix_units()
    print(f"medians of {own.rounds}, batches of {own.batch}; matrix units: {'yes' if units else 'no, so that training never takes it'}")
    keep(own.out, "convolutions", "none", {"batch": own.batch, "rounds": own.rounds, "matrix_units": units, "results": results})


if __name__ == "__main__":
    runtime.run_program(main)

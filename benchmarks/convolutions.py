"""Time of a 3x3 convolution, torch's way and the project's: python -m benchmarks.convolutions [--precision fp32] [--out DIR]

Forwards and both gradients, channels-last, padded by one. In bfloat16 with images side by side:
seresnet/conv.py says what that is, for the gradient of the weights or throughout, and which way it takes on CPUs with matrix units;
this measures all of them here, with or without such units. In float32 by Winograd's filtering, seresnet/winograd.py. Medians, in turns.
"""
from __future__ import annotations

import argparse
import statistics
import time

from benchmarks import keep, out_folder
from seresnet import report, runtime


def measure(side: int, c_in: int, channels: int, batch: int, rounds: int, precision: str) -> dict:
    """Median seconds of each way, forwards, by the weights' gradient or all of it, the convolution's arithmetic, and the way that is taken."""
    import torch
    import torch.nn.functional as F

    from seresnet import conv
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    x, gradient = (torch.randn(batch, c, side, side).to(dtype).to(memory_format=torch.channels_last) for c in (c_in, channels))
    weight = torch.randn(channels, c_in, 3, 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    leaf = x.detach().requires_grad_()

    def whole(convolution):
        return lambda: torch.autograd.grad(convolution(leaf, weight), (leaf, weight), gradient)

    def forwards(convolution):
        return lambda: convolution(x, weight.detach())

    def winograd(x, weight):
        return conv.Winograd.apply(x, weight, 1, side, side)
    names = {conv.SideBySide: "side by side", conv.SideBySideThroughout: "throughout", None: "torch"}
    taken = names[conv.faster_way(side, weight, 1, 1) if conv.has_matrix_units() else None]
    if precision == "fp32":
        taken = "Winograd" if conv.pays(leaf, weight, 1) else "torch"
        ways = {"forwards, torch": forwards(lambda x, weight: F.conv2d(x, weight, padding=1)), "forwards, Winograd": forwards(winograd),
                "torch": whole(lambda x, weight: F.conv2d(x, weight, padding=1)), "Winograd": whole(winograd)}
    else:
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
    return {"side": side, "channels_in": c_in, "channels": channels, "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "tflop": 2 * 9 * batch * c_in * channels * side**2 / 1e12, "taken": taken}


def row(result: dict) -> tuple[str, ...]:
    """A line of the table: a part of the convolution in two ways, everything in two or three."""
    seconds, tflop = result["seconds"], result["tflop"]
    return (f"{result['channels_in']} to {result['channels']}", f"{result['side']} x {result['side']}",
            *(f"{seconds[name] * 1e3:.1f} ms, {tflop / seconds[name]:.2f} TFLOP/s" for name in list(seconds)[:2]),
            *(f"{value * 1e3:.1f} ms" for value in list(seconds.values())[2:]), result["taken"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[3, 4, 6, 7, 8, 10, 12, 13, 15], help="image sides, pixels")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256, 384], help="channels out, and in where --channels-in says nothing else")
    parser.add_argument("--channels-in", type=int, help="channels in (default: as many as out)")
    parser.add_argument("--batch", type=int, default=1000, help="images (default 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, in turns (default 7)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="number format (default bf16)")
    parser.add_argument("--out", type=out_folder, help="folder for convolutions.json")
    own = parser.parse_args()
    runtime.tune_allocator()
    from seresnet import compiled, conv    # which load torch, and that has to come after the allocator's restart
    problems = [f"--sides: got {side}, expected {conv.ROW - 1} and fewer" for side in own.sides
                if side >= conv.ROW and own.precision == "bf16"]    # which are laid side by side
    problems += [f"--{name.replace('_', '-')}: got {value}, expected 1 and more" for name, values in vars(own).items()
                 if name not in ("out", "precision") and values is not None
                 for value in (values if isinstance(values, list) else [values]) if value < 1]
    if own.precision == "fp32" and compiled.passes() is None:
        problems.append("--precision fp32: Winograd's filtering needs numba, which is missing, turned off or does not work here")
    if problems:
        raise runtime.UserError(*problems)
    kinds = [(side, own.channels_in or channels, channels) for channels in own.channels for side in own.sides]
    results = [measure(*kind, own.batch, own.rounds, own.precision) for kind in report.progress(kinds, len(kinds), "measuring", unit=" kinds")]
    units, fp32 = conv.has_matrix_units(), own.precision == "fp32"
    parts = ("forwards, torch", "Winograd") if fp32 else ("weights' gradient, torch", "side by side")
    whole = ("all, torch", "all, Winograd") if fp32 else ("all, torch", "all, gradient side by side", "all, throughout")
    print(report.table(("channels", "image", *parts, *whole, "taken"), [row(result) for result in results]))
    note = "" if fp32 else f"; matrix units: {'yes' if units else 'no, so that training takes torch'}"
    print(f"medians of {own.rounds}, batches of {own.batch}, {own.precision}{note}")
    keep(own.out, "convolutions", "none", {"batch": own.batch, "rounds": own.rounds, "precision": own.precision, "matrix_units": units,
                                           "results": results})


if __name__ == "__main__":
    runtime.run_program(main)

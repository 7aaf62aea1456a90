"""What the CPU's own parts of a step are worth: python -m benchmarks.parts --config-file rn_configs/se94.yaml [--side 28] [--evaluation] [--out DIR]

A step of the recipe's net on random images, forwards and backwards without the optimizer, or forwards alone as in an evaluation: with
torch's own layers, and with the project's parts added one after the other, in turns (the gradient of squeeze-and-excitation's mean is
its own throughout). Each part says itself where it applies (seresnet/conv.py, pool.py, norm.py): the convolutions in bfloat16 with AMX
and in float32, on a GPU none.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

from benchmarks import device_of, keep, out_folder, problems_with
from seresnet import config, report, runtime

WAYS = ("torch's own layers", "convolutions of its own", "and compiled max-pooling", "and normalisation in few passes")


def parts(count: int) -> ExitStack:
    """The first `count` of the parts switched on, the others off, until it is closed."""
    from seresnet import conv, norm, pool
    stack = ExitStack()
    for names in [((conv, "has_matrix_units"), (conv, "pays")), ((pool, "worth_it"),), ((norm, "worth_it"),)][count:]:
        for module, name in names:
            stack.enter_context(mock.patch.object(module, name, lambda *_, **__: False))
    return stack


def measure(settings, device, side: int, rounds: int, evaluation: bool = False) -> dict[str, list[float]]:
    """Seconds of each timed step, by way: forwards and backwards, or forwards alone and with the running statistics."""
    import torch

    from seresnet import compiled, loop
    from seresnet.clock import Clock
    compiled.use_triton(True)    # which a GPU's long trainings take
    net = settings.model
    settings = replace(settings, model=replace(net, classes=net.classes or 10, image_size=net.image_size or side))
    torch.manual_seed(0)
    model = loop.build_model(settings).to(device, memory_format=torch.channels_last).train(not evaluation)
    dtype = runtime.pick_dtype(settings.run.precision, device)
    images = torch.randn(settings.loader.batch_size, 3, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    labels = torch.arange(len(images), device=device) % settings.model.classes
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in report.progress(range(rounds + 2), rounds + 2, "measuring", unit=" rounds"):
        for count, way in enumerate(WAYS):
            clock = Clock(device)
            with parts(count), torch.inference_mode(evaluation), clock.lane("step"):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
                if not evaluation:
                    loss.backward()
            model.zero_grad()
            if turn > 1:    # the first builds kernels, the second fills the allocator
                seconds[way].append(clock.seconds("step"))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=0, help="side of the images, pixels (default: the recipe's)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each way, in turns (default 9)")
    parser.add_argument("--evaluation", action="store_true", help="forwards alone, with the running statistics")
    parser.add_argument("--out", type=out_folder, help="folder for parts.json; none is written without it")
    settings, own = config.parse(sys.argv[1:], parser)
    problems = problems_with(own, rounds=1, side=0)
    if problems:
        raise runtime.UserError(*problems)
    device = device_of(settings)
    side = own.side or settings.model.image_size or 32
    seconds = measure(settings, device, side, own.rounds, own.evaluation)
    first = statistics.median(seconds[WAYS[0]])
    rows = [(way, f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})", f"{first / statistics.median(values):.2f}")
            for way, values in seconds.items()]
    print(report.table(("layers", "seconds of a step (fastest to slowest)", "times faster"), rows))
    print(f"medians of {own.rounds} {'evaluation ' if own.evaluation else ''}steps of {settings.loader.batch_size} images of {side} x {side} "
          f"pixels, on {device}")
    keep(own.out, "parts", settings.recipe, {"side": side, "evaluation": own.evaluation, "rounds": own.rounds,
                                             "batch": settings.loader.batch_size, "seconds": seconds})


if __name__ == "__main__":
    runtime.run_program(main)

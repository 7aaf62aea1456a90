"""What the host costs a step: python -m benchmarks.launches --config-file rn_configs/se94.yaml [--steps 20] [--rounds 5] [--out DIR]

Whole steps of the recipe's first epoch (augmentation, forwards, backwards, optimizer), with run.cuda_graphs on and off, with the passes that
Triton compiles for long trainings, and with these while Muon's update is launched one by one, in turns: seconds a step, how often the host
starts something on the device, and how long the device is at work. Where it idles, the host sets the pace. Without a CUDA GPU there are no
graphs: then there is one row, of what the processor does by itself.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from benchmarks import device_of, keep, out_folder, problems_with
from seresnet import config, report, runtime

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaMemsetAsync",
            "cudaGraphLaunch")

# graphs, Triton, Muon's update replayed
WAYS = {"graphs and Triton": (True, True, True), "and the update one by one": (True, True, False), "with graphs": (True, False, True),
        "without": (False, False, False)}


def opened(settings, device):
    """A training's session, to be left as a block is."""
    from seresnet import loop
    settings, data, model = loop.prepare(settings)
    return loop.open_session(settings, device, data, model)


def steps(session, count: int, triton: bool = False) -> float:
    """Seconds of `count` steps of training, until the device has done them."""
    import torch

    from seresnet import compiled, loop
    compiled.use_triton(triton)    # asked when a step is computed, or recorded
    started = time.perf_counter()
    batches = itertools.chain.from_iterable(map(session.train_batches.epoch, itertools.count()))
    loop.train_epoch(session.model, itertools.islice(batches, count), **session.parts(0))
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    return time.perf_counter() - started


def looked_into(step, count: int, device) -> dict[str, float]:
    """Of each of `count` steps: `launches` by the host, `kernels` on the device, `busy_seconds` of it, by torch's profiler; the
    operators called, and their own time, where there is no device."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        step(count)
    events = profiler.events()
    if device.type != "cuda":
        own = [event for event in events if event.name.startswith("aten::")]
        return {"launches": len(own) / count, "kernels": len(own) / count, "busy_seconds": sum(e.self_cpu_time_total for e in own) / 1e6 / count}
    kernels = on_the_device(events)
    return {"launches": sum(event.name in LAUNCHES for event in events) / count, "kernels": len(kernels) / count,
            "busy_seconds": sum(event.device_time_total for event in kernels) / 1e6 / count}


def on_the_device(events) -> list:
    """Kernels and copies; not the spans that torch puts around them (one around every step of an optimizer), which count them again."""
    import torch
    return [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps timed together (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="times of each way, in turns (default 5)")
    parser.add_argument("--out", type=out_folder, help="folder for launches.json; none is written without it")
    settings, own = config.parse(sys.argv[1:], parser)
    problems = problems_with(own, steps=1, rounds=1)
    if problems:
        raise runtime.UserError(*problems)
    device = device_of(settings)
    ways = WAYS if device.type == "cuda" else {"on the processor": (False, False, False)}
    results, rows = {way: {"seconds": []} for way in ways}, []
    with ExitStack() as sessions:
        steppers = {}
        for way, (graphs, triton, update) in ways.items():
            session = sessions.enter_context(opened(replace(settings, run=replace(settings.run, cuda_graphs=graphs)), device))
            if not update and hasattr(session.optimizer, "repeats"):
                session.optimizer.repeats = None
            steppers[way] = partial(steps, session, triton=triton)
            steppers[way](5)
        for _ in report.progress(range(own.rounds), own.rounds, "measuring", unit=" rounds"):
            for way, step in steppers.items():
                results[way]["seconds"].append(step(own.steps) / own.steps)
        for way, step in steppers.items():
            results[way].update(looked_into(step, min(own.steps, 5), device))
    for way, found in results.items():
        median = statistics.median(found["seconds"])
        rows.append((way, f"{1e3 * median:.2f} ({1e3 * min(found['seconds']):.2f} to {1e3 * max(found['seconds']):.2f})",
                     f"{found['launches']:.0f}", f"{found['kernels']:.0f}", f"{1e3 * found['busy_seconds']:.2f}", f"{found['busy_seconds'] / median:.0%}"))
    print(report.table(("a step", "milliseconds (fastest to slowest)", "launches", "kernels", "device busy, ms", "share"), rows))
    print(f"medians of {own.rounds} rounds of {own.steps} steps of {settings.loader.batch_size} images, as in the recipe's first epoch, on {device}")
    keep(own.out, "launches", settings.recipe, {"steps": own.steps, "rounds": own.rounds, "batch": settings.loader.batch_size, "ways": results})


if __name__ == "__main__":
    runtime.run_program(main)

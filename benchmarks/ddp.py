"""What a second process costs and brings: python -m benchmarks.ddp --config-file rn_configs/se94.yaml [--rounds 5] [--out DIR]

Trains the recipe for a few steps in turn with one process of one thread, one process of all cores' threads, and --processes
processes that share the cores, with and without synchronised norms; then once more without any exchange of gradients: the
difference is what communication costs. The loop is training's own (seresnet.loop.train_epoch). Then reckons from the measured
bytes and FLOP what 8 GPUs, and 4 machines of 8, could do: see `estimate`.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import keep, out_folder
from seresnet import config, report, runtime

# Published figures, for the estimate alone. bytes/s a GPU in one direction.
NVLINK = 300e9        # A100 SXM, NVLink 3: 600 GB/s in both directions together (NVIDIA A100 data sheet)
PCIE = 16e9           # PCIe 3.0 x16, as the Quadro RTX 8000 has it: 15.75 GB/s
NETWORK = 25e9        # 200 Gb/s InfiniBand HDR, one port a machine, shared by its 8 GPUs
A100_RATE = 0.29e15 / 2.59    # FLOP/s that airbench94_muon reaches on one A100 (its README: 0.29 PFLOP in 2.59 s)
NVLINK_LATENCY, NETWORK_LATENCY = 10e-6, 25e-6    # s a collective inside a machine, and between machines: assumed
LAUNCH = 4e-6         # s that a kernel launch takes the host: assumed


def count_operations(work) -> int:
    """How many operations `work()` sends to the device, each of them at least one kernel on a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.count += 1
            return function(*arguments, **(named or {}))
    with Operations() as operations:
        work()
    return operations.count


def traffic(settings: config.Config) -> dict[str, float]:
    """Of a step of the recipe: bytes of gradients and of synchronised norms that leave a process, the norms' collectives,
    operations; FLOP an image."""
    import torch

    from benchmarks.epochs import flop_an_image
    from seresnet import loop
    settings = replace(settings, loader=replace(settings.loader, batch_size=8))    # neither depends on the batch
    settings, data, model = loop.prepare(settings)
    device = runtime.pick_device(settings.run.device)
    flop = flop_an_image(model, settings.model.image_size)
    with loop.open_session(settings, device, data, model) as session:
        batches = list(itertools.islice(session.train_batches.epoch(0), 1))
        operations = count_operations(lambda: loop.train_epoch(session.model, batches, **session.parts(0)))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return {"flop_per_image": flop, "operations": operations, "norm_collectives": 2 * len(norms),
            "gradient_bytes": 4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
            # mean, variance and count forward, two sums backward, in float32
            "norm_bytes": 4 * sum(4 * norm.num_features + 1 for norm in norms)}


def worker(settings: config.Config, own: argparse.Namespace) -> None:
    """One process of a measurement: rounds of steps, the seconds of each step, written by the first to --worker."""
    import torch

    from seresnet import loop, ranks
    of = runtime.launch()
    device = runtime.pick_device(settings.run.device, of)
    runtime.set_threads(settings.run.threads, of)
    with ranks.join(of, device) as group:
        settings, data, model = loop.prepare(settings, of)
        with loop.open_session(settings, device, data, model, group) as session:
            network = group.wrap(session.model, device)
            silent = network.no_sync if of.world > 1 else None
            batches = list(itertools.islice(session.train_batches.epoch(0), 1))

            def steps(count: int) -> list[float]:
                seconds, mark = [], [time.perf_counter()]

                def after_step(step, tally):
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    now = time.perf_counter()
                    seconds.append(now - mark[0])
                    mark[0] = now
                loop.train_epoch(network, itertools.islice(itertools.cycle(batches), count), **session.parts(0), after_step=after_step)
                return seconds
            steps(2)
            rows = {"with": steps(own.steps), "without": []}
            if silent:
                with silent():
                    rows["without"] = steps(own.steps)
        if group.main:
            Path(own.worker).write_text(json.dumps(rows))


def contenders(processes: int, cores: int) -> dict[str, tuple[int, int, bool]]:
    """{name: (processes, threads in each, synchronised norms)}."""
    share = max(1, cores // processes)
    return {"1 process, 1 thread": (1, 1, True), f"1 process, {cores} threads": (1, cores, True),
            f"{processes} processes, {share} thread(s) each, norms synchronised": (processes, share, True),
            f"{processes} processes, {share} thread(s) each, norms apart": (processes, share, False)}


def launch(count: int, threads: int, sync: bool, arguments: list[str]) -> dict:
    """What `worker` wrote, run under torchrun where there are several processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"] if count > 1 else ["-m"]
        command = [sys.executable, *launcher, "benchmarks.ddp", *arguments, "--worker", str(path), "--run.threads", str(threads),
                   "--loop.sync_norm", str(sync).lower()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise runtime.UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-1500:]}")
        return json.loads(path.read_text())


def summarise(name: str, rounds: list[dict], batch_size: int) -> dict:
    """Medians over all steps of all rounds."""
    seconds = [s for row in rounds for s in row["with"]]
    silent = [s for row in rounds for s in row["without"]]
    step = statistics.median(seconds)
    return {"name": name, "step_seconds": step, "slowest_round": max(statistics.median(row["with"]) for row in rounds),
            "fastest_round": min(statistics.median(row["with"]) for row in rounds), "images_per_second": batch_size / step,
            # in pairs from one launch: rounds differ more than what is looked for
            "gradient_share": statistics.median(1 - statistics.median(row["without"]) / statistics.median(row["with"])
                                                for row in rounds) if silent else None}


def estimate(batch_size: int, *, flop_per_image: float, gradient_bytes: float, norm_bytes: float, norm_collectives: int,
             operations: int, rate: float = A100_RATE) -> list[dict]:
    """Milliseconds of a step on 1, 8 and 32 GPUs, reckoned: no GPU has run it.

    Compute is flop / rate, divided by the GPUs, as if small batches filled a GPU as well as large ones. A ring moves 2 (n - 1) / n
    times the gradients' bytes through the slowest link; half of the backward pass, a third of the compute, hides them at best, and
    the last eighth never. Norms wait: each collective costs its latency. Between machines, 8 GPUs share one port. Whatever the
    GPUs do, the host launches `operations` kernels and more: `host` is a floor that no number of GPUs lowers.
    """
    rows = []
    for name, count, machines, link, latency in (("1 GPU", 1, 1, NVLINK, 0.0), ("8 GPUs, NVLink", 8, 1, NVLINK, NVLINK_LATENCY),
                                                 ("8 GPUs, PCIe 3", 8, 1, PCIE, NVLINK_LATENCY),
                                                 ("4 machines of 8, 200 Gb/s", 32, 4, NETWORK, NETWORK_LATENCY)):
        compute = flop_per_image * batch_size / rate / count
        move = 2 * (count - 1) / count * gradient_bytes / link if machines == 1 else (
            2 * 7 / 8 * gradient_bytes / NVLINK + 2 * (machines - 1) / machines * gradient_bytes / link)
        exposed = max(move - compute / 3, move / 8) if count > 1 else 0.0
        norms = norm_collectives * latency
        host = (operations + norm_collectives * (count > 1)) * LAUNCH
        step = max(compute + exposed + norms, host)
        rows.append({"devices": name, "images_a_gpu": batch_size / count, "compute_ms": compute * 1e3, "gradients_ms": move * 1e3,
                     "gradients_exposed_ms": exposed * 1e3, "norms_ms": norms * 1e3, "host_ms": host * 1e3, "step_ms": step * 1e3,
                     "speed_up": rows[0]["step_ms"] / (step * 1e3) if rows else 1.0})
        rows[-1]["efficiency"] = rows[-1]["speed_up"] / count
    return rows


def tables(rows: list[dict], estimates: list[dict], sent: dict) -> str:
    """Two Markdown tables: what was measured here, and what is reckoned from it."""
    lines = ["| here | ms a step, median | fastest to slowest round | images/s | gradients' share of a step | MB a step |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        share = "-" if row["gradient_share"] is None else f"{row['gradient_share']:.1%}"
        bytes_a_step = sent["gradient_bytes"] + (sent["norm_bytes"] if "synchronised" in row["name"] else 0)
        size = "-" if row["gradient_share"] is None else f"{bytes_a_step / 1e6:.2f}"
        lines.append(f"| {row['name']} | {row['step_seconds'] * 1e3:.0f} | {row['fastest_round'] * 1e3:.0f} to {row['slowest_round'] * 1e3:.0f} "
                     f"| {row['images_per_second']:,.0f} | {share} | {size} |")
    lines += ["", "| reckoned | images a GPU | compute, ms | gradients, ms (exposed) | norms, ms | launches, ms | step, ms | times 1 GPU | efficiency |",
              "|---|---|---|---|---|---|---|---|---|"]
    for row in estimates:
        lines.append(f"| {row['devices']} | {row['images_a_gpu']:.0f} | {row['compute_ms']:.3f} | {row['gradients_ms']:.3f} "
                     f"({row['gradients_exposed_ms']:.3f}) | {row['norms_ms']:.3f} | {row['host_ms']:.2f} | {row['step_ms']:.3f} | {row['speed_up']:.1f} | "
                     f"{row['efficiency']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="launches of each contender, in turn (default 3); 0 to reckon only")
    parser.add_argument("--steps", type=int, default=8, help="steps a launch, after two to warm up (default 8)")
    parser.add_argument("--processes", type=int, default=2, help="processes of the launches with several (default 2)")
    parser.add_argument("--out", type=out_folder, help="folder for ddp.json; none is written without it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    settings, own = config.parse(sys.argv[1:], parser)
    for name, least in (("rounds", 0), ("steps", 1), ("processes", 2)):
        if getattr(own, name) < least:
            raise runtime.UserError(f"--{name}: got {getattr(own, name)}, expected at least {least}")
    if settings.run.tune_allocator:
        runtime.tune_allocator(settings.run.device)
    if own.worker:    # what else its command line says has been said to the launch that started it
        return worker(settings, own)
    if problem := runtime.Launch(world=own.processes).problem_with_batch(settings.loader.batch_size):
        raise runtime.UserError(problem)
    arguments = sys.argv[1:]
    who = contenders(own.processes, runtime.available_cores())
    rounds: dict[str, list[dict]] = {name: [] for name in who}
    load = [os.getloadavg()[0]]
    todo = [*who] * own.rounds
    for name in report.progress(todo, len(todo), "measuring", unit=" launches"):
        rounds[name].append(launch(*who[name], arguments))
        load.append(os.getloadavg()[0])
    size, sent = settings.loader.batch_size, traffic(settings)
    rows = [summarise(name, found, size) for name, found in rounds.items() if found]
    estimates = estimate(size, **sent)
    print(f"{settings.recipe}: batches of {size}, {sent['flop_per_image'] / 1e9:.3f} GFLOP an image, {sent['operations']} operations and "
          f"{sent['gradient_bytes'] / 1e6:.2f} MB of gradients a step; {own.rounds} rounds of {own.steps} steps, "
          f"{runtime.available_cores()} cores, load {min(load):.1f} to {max(load):.1f} (others computed too where it is above the cores)\n")
    print(tables(rows, estimates, sent))
    keep(own.out, "ddp", settings.recipe, {"rounds": own.rounds, "steps": own.steps, "batch_size": size, **sent,
                                           "load": [min(load), max(load)], "rows": rows, "estimate": estimates})


if __name__ == "__main__":
    runtime.run_program(main)

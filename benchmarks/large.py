"""A set that outgrows the memory: python -m benchmarks.large [--gib 8] [--processes 2] [--out DIR] [--run.threads N]

Writes a synthetic beton of that size (noise, 64 x 64 pixels; kept in --folder for the next time), and lets processes read their
shares of it in stream mode: images/s of the loader alone and of a training of a small net, beside the same with as many images
in memory as a gibibyte holds, and the memory that each process takes for itself (RssAnon; pages of the file belong to the
system, which takes them back where it needs them).
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import keep, out_folder, own_memory, problems_with
from seresnet import config, runtime

SIDE, CLASSES = 64, ("a", "b", "c", "d")
NET = {"model.blocks": [1, 1], "model.channels": [8], "model.classes": 0, "model.image_size": 0, "loader.batch_size": 1024,
       "augment.translate": 4, "report.folder": "runs"}


def write(path: Path, images: int) -> None:
    """A beton of `images` noise images, from a file that is never in memory as a whole."""
    from seresnet.beton import write_beton
    from seresnet.imageset import Split
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pixels = np.memmap(Path(folder) / "pixels", np.uint8, "w+", shape=(images, SIDE, SIDE, 3))
        block = np.random.default_rng(0).integers(0, 256, (4096, SIDE, SIDE, 3), dtype=np.uint8)
        for number, start in enumerate(range(0, images, len(block))):
            pixels[start:start + len(block)] = (block + np.uint8(number))[:images - start]    # no two blocks alike
        labels = np.arange(images) % len(CLASSES)
        write_beton(path, Split(pixels, labels), classes=CLASSES, name="noise", source="benchmarks.large", fingerprint="noise")


def forget(path: Path) -> None:
    """Ask the system to drop the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(batches, group, most: int) -> dict:
    """Images/s of all processes together over at most `most` batches, and the most memory that a process held."""
    import torch
    seen, held, started = 0, 0, time.perf_counter()
    for number, batch in enumerate(itertools.islice(batches, most)):
        if number == 0:
            batch.images.sum()
            started, seen = time.perf_counter(), -len(batch.labels)    # FFCV has compiled
        seen += len(batch.labels)
        batch.images[::16, 0, 0, 0].sum()    # touched, as a training would
        if number % 16 == 0:
            held = max(held, own_memory())
    rows = group.gather(torch.tensor([seen, time.perf_counter() - started, held], dtype=torch.float64))
    return {"images": int(rows[:, 0].sum()), "images_per_second": float(rows[:, 0].sum() / rows[:, 1].max()),
            "own_mib": [int(v) >> 20 for v in rows[:, 2].tolist()]}


def worker(settings: config.Config, own: argparse.Namespace, places: dict) -> None:
    """One process: every case in turn; the first writes what was found to --worker."""
    import torch

    from seresnet import loop, ranks
    from seresnet.beton import open_beton
    from seresnet.loader import BatchLoader
    of, device = runtime.launch(), torch.device("cpu")
    runtime.set_threads(settings.run.threads, of)
    rows = []
    with ranks.join(of, device) as group:
        beton, size = open_beton(places["train"]), settings.loader.batch_size
        few = np.arange(min(beton.samples, (1 << 30) // (SIDE * SIDE * 3)))
        # Memory last: with glibc's allocator tuned, a process gives nothing back.
        for name, how, most in (("stream, shares drawn, file dropped from the cache", dict(mode="stream"), own.batches // 4),
                                ("stream, shares drawn", dict(mode="stream"), own.batches),
                                ("stream, shares fixed", dict(mode="stream", shares="fixed"), own.batches),
                                ("in memory, 1 GiB", dict(mode="resident", indices=few), own.batches)):
            with BatchLoader(beton, batch_size=size, device=device, seed=1, of=of, **how) as loader:
                if how["mode"] == "resident":
                    next(loader.epoch(0))
                if "dropped" in name and group.main:
                    forget(beton.path)
                group.gather(torch.zeros(1))    # all begin together
                again = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
                rows.append({"case": name, "batches": most, **measure(again, group, most)})
        for mode, indices in (("stream", None), ("resident", few)):
            chosen = config.build({**NET, "beton.train": places["train"], "beton.test": places["test"], "loader.mode": mode})
            chosen, data, model = loop.prepare(chosen, of)
            data = loop.Data(data.train, data.test, indices)
            with loop.open_session(chosen, device, data, model, group) as session:
                network, held = group.wrap(session.model, device), []
                batches = session.train_batches.epoch(0)
                loop.train_epoch(network, itertools.islice(batches, 2), **session.parts(0))
                started = time.perf_counter()
                totals = loop.train_epoch(network, itertools.islice(batches, own.steps), **session.parts(0),
                                          tally=session.tally(), after_step=lambda step, tally: held.append(own_memory()))
                found = group.gather(torch.tensor([time.perf_counter() - started, max(held)], dtype=torch.float64))
                rows.append({"case": f"training, {mode}", "batches": own.steps, "images": totals.seen,
                             "images_per_second": totals.seen / float(found[:, 0].max()),
                             "own_mib": [int(v) >> 20 for v in found[:, 1].tolist()]})
                batches.close()
        if group.main:
            Path(own.worker).write_text(json.dumps({"rows": rows, "samples": beton.samples, "bytes": beton.path.stat().st_size}))


def table(rows: list[dict]) -> str:
    """A Markdown table."""
    lines = ["| case | images | images/s, all processes | MiB of its own, a process |", "|---|---|---|---|"]
    lines += [f"| {row['case']} | {row['images']:,} | {row['images_per_second']:,.0f} | {', '.join(map(str, row['own_mib']))} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=8, help="size of the beton (default 8)")
    parser.add_argument("--folder", default="data", help="where it lies (default data)")
    parser.add_argument("--processes", type=int, default=2, help="how many read (default 2)")
    parser.add_argument("--batches", type=int, default=400, help="batches of each case of the loader alone (default 400)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each training (default 20)")
    parser.add_argument("--out", type=out_folder, help="folder for large.json; none is written without it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    settings, own = config.parse(sys.argv[1:], parser)
    problems = problems_with(own, processes=1, batches=4, steps=1)
    if not own.gib > 0:
        problems.append(f"--gib: got {own.gib}, expected more than 0")
    if problems:
        raise runtime.UserError(*problems)
    without = config.build({"run.threads": settings.run.threads})
    changed = [f"{section}.{key}" for section, values in settings.as_dict().items() for key, value in values.items()
               if value != without.as_dict()[section][key]]
    if changed:
        raise runtime.UserError(f"{', '.join(changed)}: this benchmark has a net and a set of its own: change run.threads alone")
    images = int(own.gib * (1 << 30) / (SIDE * SIDE * 3)) + 1
    folder = Path(own.folder)
    places = {"train": str(folder / f"large_{images}.beton"), "test": str(folder / "large_test.beton")}
    settings = config.build({**NET, "beton.train": places["train"], "beton.test": places["test"], "run.threads": settings.run.threads})
    if settings.run.tune_allocator:
        runtime.tune_allocator("cpu")
    if own.worker:
        return worker(settings, own, places)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for path, count in ((places["train"], images), (places["test"], 1000)):
        if not Path(f"{path}.json").exists():
            write(Path(path), count)
    written = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "rows.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(own.processes)] if own.processes > 1 else []
        done = subprocess.run([sys.executable, *launcher, "-m", "benchmarks.large", *sys.argv[1:], "--worker", str(result)],
                              capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise runtime.UserError(f"the measurement ended with status {done.returncode}: {done.stderr[-1500:]}")
        found = json.loads(result.read_text())
    print(f"{found['samples']:,} images, {found['bytes'] / 2**30:.2f} GiB (written in {written:.0f} s, 0 where it lay there), "
          f"{own.processes} processes, load {os.getloadavg()[0]:.1f}\n\n{table(found['rows'])}")
    print(f"left for the next run: {places['train']} and {places['test']}, {found['bytes'] / 2**30:.2f} GiB")
    keep(own.out, "large", "noise", {**found, "processes": own.processes, "load": os.getloadavg()[0]})


if __name__ == "__main__":
    runtime.run_program(main)

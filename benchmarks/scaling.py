"""How cost grows: python -m benchmarks.scaling --config-file rn_configs/se94.yaml [--axis batch,side,images,cores] [--out DIR]

Four axes, each cell a process of its own on images of noise (their content costs nothing): training's images/s over the batch
size, over the images' side and over the cores; and an epoch's seconds and memory over the size of the set, in `stream` mode,
augmented but not trained on. The growth column is the exponent that joins a cell to the one before it: 1 is linear in images,
in pixels, or in steps; what is above is marked.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks import keep, out_folder, own_memory
from seresnet import config, report, runtime

AXES = {"batch": (64, 128, 256, 512, 1024, 2048, 4096), "side": (32, 64, 96), "images": (1, 2, 4, 8), "cores": (1, 2)}
UNITS = {"batch": "images a step", "side": "pixels a side", "images": "times the images", "cores": "cores"}
CIFAR10 = 50_000         # images of an epoch
STEEP = 1.1              # a growth above this is marked: noise moves it by a few hundredths


def changed(settings: config.Config, **sections: dict) -> config.Config:
    """`settings` with keys of some sections changed."""
    return dataclasses.replace(settings, **{name: dataclasses.replace(getattr(settings, name), **keys)
                                            for name, keys in sections.items()})


def noise_betons(folder: Path, images: int, side: int, classes: int) -> dict[str, str]:
    """Two betons of noise in `folder`: `images` to train on, one of each class to test on; the keys of config's section."""
    import numpy as np

    from seresnet.beton import write_beton
    from seresnet.imageset import Split
    names = [str(c) for c in range(classes)]
    for seed, (name, count) in enumerate((("train", images), ("test", classes))):
        rng = np.random.default_rng(seed)
        split = Split(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8), np.arange(count, dtype=np.int64) % classes)
        write_beton(folder / f"{name}.beton", split, classes=names, name="noise", source="benchmarks.scaling", fingerprint="-")
    return {name: str(folder / f"{name}.beton") for name in ("train", "test")}


def train_cell(settings: config.Config, seconds: float) -> dict[str, float]:
    """Images/s of training steps, timed for `seconds` (and at least three steps) after two to warm up."""
    from seresnet import loop
    from seresnet.clock import Clock
    device = runtime.pick_device(settings.run.device)
    settings, data, model = loop.prepare(settings)
    with loop.open_session(settings, device, data, model) as session:
        def steps(count: int) -> float:
            clock = Clock(device)
            batches = itertools.islice(itertools.chain.from_iterable(session.train_batches.epoch(0) for _ in itertools.count()),
                                       count)
            with clock.lane("train"):
                loop.train_epoch(session.model, batches, **session.parts(0))
            return clock.seconds("train")
        steps(2)
        one = steps(1)
        count = max(3, math.ceil(seconds / one))
        took = steps(count)
    return {"images_per_second": count * settings.loader.batch_size / took, "step_seconds": took / count}


def load_cell(settings: config.Config) -> dict[str, float]:
    """Seconds of an epoch through FFCV and augmentation, the median of three after a first, and the most memory that is not the file's."""
    from seresnet import loop
    from seresnet.clock import Clock
    device = runtime.pick_device(settings.run.device)
    settings, data, model = loop.prepare(settings)
    with loop.open_session(settings, device, data, model) as session:
        augment, most, seconds = session.parts(0)["augment"], 0, []
        for epoch in range(4):
            clock, seen = Clock(device), 0    # which waits for a GPU
            with clock.lane("load"):
                for batch in session.train_batches.epoch(epoch):
                    seen += len(augment(batch, 0))
                    most = max(most, own_memory())
            seconds.append(clock.seconds("load"))
    took = statistics.median(seconds[1:])    # the first compiles, and reads the file
    return {"images_per_second": seen / took, "epoch_seconds": took, "own_memory_mib": most / 2**20}


def cell(settings: config.Config, axis: str, value: int, seconds: float, unit: int, folder: Path) -> dict[str, float]:
    """What one cell of `axis` costs, of steps that are all alike (no crops, no hardest images, no second pass); unit: images of the
    set that is 1 on the axis `images`."""
    side = value if axis == "side" else settings.model.image_size or 32
    batch = value if axis == "batch" else min(settings.loader.batch_size, 250) if axis == "side" else settings.loader.batch_size
    images = unit * value if axis == "images" else 2 * batch
    classes = settings.model.classes or 10
    settings = changed(settings, model={"image_size": side, "classes": classes}, augment={"sides": ()}, loop={"hardest": ()},
                       beton=noise_betons(folder, max(images, classes), side, classes), evaluate={"split": "test"}, optim={"sam_radius": 0.0},
                       loader={"batch_size": batch, "mode": "stream" if axis == "images" else "resident", "drop_last": True},
                       run={"threads": value if axis == "cores" else settings.run.threads})
    import torch
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    return load_cell(settings) if axis == "images" else train_cell(settings, seconds)


def with_growth(axis: str, rows: list[dict]) -> list[dict]:
    """`rows` with the exponent by which cost grew since the row before: of a step in its images (axis batch), of an image in its
    pixels (side), of an epoch in its images (images); of speed in cores."""
    def cost(row: dict) -> tuple[float, float]:
        size = row["value"]
        return {"batch": lambda: (size, size / row["images_per_second"]), "side": lambda: (size**2, 1 / row["images_per_second"]),
                "images": lambda: (size, row["epoch_seconds"]), "cores": lambda: (size, row["images_per_second"])}[axis]()
    for before, row in zip([None, *rows], rows):
        (x0, y0), (x1, y1) = cost(before or row), cost(row)
        row["growth"] = None if before is None else math.log(y1 / y0) / math.log(x1 / x0)
    return rows


def table(axis: str, rows: Iterable[dict]) -> str:
    """One axis as Markdown."""
    def growth(row: dict) -> str:
        if row["growth"] is None:
            return ""
        return f"{row['growth']:.2f}" + (" steep" if axis != "cores" and row["growth"] > STEEP else "")
    columns = {"images": (("seconds an epoch", lambda r: f"{r['epoch_seconds']:.2f}"),
                          ("own memory, MiB", lambda r: f"{r['own_memory_mib']:.0f}"))}.get(
        axis, (("ms a step", lambda r: f"{1000 * r['step_seconds']:.0f}"),
               (f"seconds for {CIFAR10:,} images", lambda r: f"{CIFAR10 / r['images_per_second']:.1f}")))
    return report.table((UNITS[axis], "images/s", *(name for name, _ in columns), "growth"), [
        (str(row["value"]), f"{row['images_per_second']:,.0f}", *(show(row) for _, show in columns), growth(row)) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--axis", default=",".join(AXES), help="which axes, with commas between them (default all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="to time a cell for (default 5)")
    parser.add_argument("--set", type=int, default=12_500, help="images of the set that is 1 time the images (default 12500)")
    parser.add_argument("--most", type=int, default=0, help="leave out cells above this value (default none)")
    parser.add_argument("--out", type=out_folder, help="folder for scaling.json and scaling.png; none is written without it")
    parser.add_argument("--cell", help=argparse.SUPPRESS)    # axis=value: the process of one cell
    settings, own = config.parse(sys.argv[1:], parser)
    if own.cell:
        if settings.run.tune_allocator:
            runtime.tune_allocator(settings.run.device)
        axis, _, value = own.cell.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(cell(settings, axis, int(value), own.seconds, own.set, Path(folder))))
        return
    axes = own.axis.split(",")
    unknown = [axis for axis in axes if axis not in AXES]
    problems = [f"--axis: got {axis}, expected some of {', '.join(AXES)}" for axis in unknown]
    problems += [f"--{name}: got {value}, expected more than 0" for name, value in (("seconds", own.seconds), ("set", own.set))
                 if value <= 0]
    if "images" in axes and not runtime.has_ffcv():    # known now, not when the other axes have been measured
        problems.append("--axis: images are streamed, by FFCV, which is not installed: README, \"Install\", or "
                        f"--axis {','.join(axis for axis in axes if axis != 'images') or 'batch'}")
    if problems:
        raise runtime.UserError(*problems)
    cells = {axis: [value for value in AXES[axis] if (not own.most or value <= own.most)
                    and (axis != "cores" or value <= runtime.available_cores())] for axis in axes}
    if none := [axis for axis, values in cells.items() if not values]:
        raise runtime.UserError(f"--most: got {own.most}, which leaves no cell of {', '.join(none)}: give a larger one, or other axes")
    found = {}
    for axis, values in cells.items():
        rows = []
        for value in report.progress(values, len(values), axis, unit=" values"):
            done = subprocess.run([sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--cell", f"{axis}={value}"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise runtime.UserError(f"{axis} = {value}: ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
            rows.append({"value": value, **json.loads(done.stdout.splitlines()[-1])})
        found[axis] = with_growth(axis, rows)
        print(f"{table(axis, found[axis])}\n", flush=True)
    keep(own.out, "scaling", settings.recipe, {"set": own.set, "seconds": own.seconds, "axes": found})
    if own.out:
        draw(found, Path(own.out) / "scaling.png")


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """A panel an axis: images/s, over a logarithmic scale."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.6 * len(found), 3.4), layout="constrained", dpi=120)
    for axes, (axis, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        x, y = [row["value"] for row in rows], [row["images_per_second"] for row in rows]
        axes.plot(x, y, "o-", color="#4477aa")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x], rotation=45 if len(x) > 4 else 0)
        axes.set_xlabel(UNITS[axis])
        axes.set_ylabel("images/s, loaded and augmented" if axis == "images" else "images/s, trained on")
        axes.set_ylim(0, 1.15 * max(y))
        axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    runtime.run_program(main)

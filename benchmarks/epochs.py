"""Where an epoch's time goes: python -m benchmarks.epochs --config-file rn_configs/se94.yaml [--epochs 3] [--out DIR]

The loop that is measured is training's own (seresnet.loop.train_epoch); its parts are handed in wrapped in stop-watch
lanes. A warm-up of a few steps and one evaluation batch stays outside the clock. On a GPU every lane waits for the
device at its edges, so the parts are right and their sum is more than an undisturbed epoch takes, which also replays CUDA
graphs there. Epochs are of all images: one on a share of them (loop.hardest) takes that share of the time.
"""
from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys

from benchmarks import device_of, keep, out_folder
from seresnet import config, report, runtime

LANES = ("data_wait", "augmentation", "forward", "backward", "optimizer", "rest", "evaluation")


class TimedBackward:
    """A loss whose backward() runs in a lane."""

    def __init__(self, value, clock):
        self.value, self.clock = value, clock

    def backward(self):
        with self.clock.lane("backward"):
            self.value.backward()


class TimedScaler:
    """A gradient scaler whose backward pass and optimizer step run in lanes."""

    def __init__(self, scaler, clock):
        self.scaler, self.clock = scaler, clock

    def scale(self, value):
        return TimedBackward(self.scaler.scale(value), self.clock)

    def unscale_(self, optimizer):
        self.scaler.unscale_(optimizer)

    def step(self, optimizer):
        with self.clock.lane("optimizer"):
            self.scaler.step(optimizer)

    def update(self):
        self.scaler.update()


def in_lane(clock, name, function):
    """`function`, its calls timed in the lane `name`."""
    def timed(*arguments, **named):
        with clock.lane(name):
            return function(*arguments, **named)
    return timed


def matrix_product_rate(dtype, device, side: int = 4096, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product, the best of `repeats`: the ceiling that the net's share is taken of."""
    import torch

    from seresnet.clock import Clock
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        clock = Clock(device)
        with clock.lane("product"):
            a @ b
        seconds.append(clock.seconds("product"))
    return 2 * side**3 / min(seconds[1:])


def flop_an_image(model, image_size: int) -> int:
    """Floating-point operations of one image's forward and backward pass (convolutions and matrix products)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    # on the meta device: shapes alone, so that counting neither takes time nor moves the norms' running averages
    twin, images = copy.deepcopy(model).to("meta"), torch.empty(2, 3, image_size, image_size, device="meta")
    counter = FlopCounterMode(display=False)
    with counter:
        twin(images).sum().backward()
    return counter.get_total_flops() // len(images)


def measure(session, epochs: int, warmup_steps: int = 5) -> list[dict[str, float]]:
    """Seconds of each of `epochs` epochs, split into LANES; `rest` is what the loop does between the parts."""
    from seresnet.clock import Clock
    from seresnet.loop import train_epoch
    rows = []
    train_epoch(session.model, itertools.islice(session.train_batches.epoch(0), warmup_steps), **session.parts(0))
    session.evaluate("none")
    for epoch in report.progress(range(epochs), epochs, "measuring", unit=" epochs"):
        clock = Clock(session.device)
        parts = session.parts(epoch)
        parts.update(augment=in_lane(clock, "augmentation", parts["augment"]), loss=in_lane(clock, "forward", parts["loss"]),
                     clip=in_lane(clock, "optimizer", parts["clip"]), scaler=TimedScaler(parts["scaler"], clock))
        parts.pop("replay", None)    # a recording has no parts that a clock could see
        with clock.lane("rest"):
            train_epoch(in_lane(clock, "forward", session.model),
                        clock.waiting(session.train_batches.epoch(epoch), "data_wait"), **parts)
        with clock.lane("evaluation"):
            session.evaluate("none")
        rows.append({lane: clock.seconds(lane) for lane in LANES})
    return rows


def summarise(rows: list[dict[str, float]], images: int, flop: int, ceiling: float) -> dict:
    """Medians over epochs: seconds a lane, seconds of training, images/s, achieved FLOP/s and its share of the ceiling."""
    train = [sum(seconds for lane, seconds in row.items() if lane != "evaluation") for row in rows]
    median = statistics.median(train)
    return {"epochs": len(rows), "seconds": {lane: statistics.median(row[lane] for row in rows) for lane in LANES},
            "train_seconds": median, "train_seconds_min": min(train), "train_seconds_max": max(train),
            "images_per_second": images / median, "flop_per_image": flop, "flop_per_second": flop * images / median,
            "matrix_product_flop_per_second": ceiling, "share_of_matrix_product": flop * images / median / ceiling}


def table(result: dict) -> str:
    """The result as one Markdown table, with the lanes' shares of a training epoch."""
    lines = ["| part of an epoch | seconds (median) | share of training |", "|---|---|---|"]
    for lane, seconds in result["seconds"].items():
        share = "" if lane == "evaluation" else f"{seconds / result['train_seconds']:.1%}"
        lines.append(f"| {lane.replace('_', ' ')} | {seconds:.3f} | {share} |")
    lines.append(f"| training in all | {result['train_seconds']:.2f} ({result['train_seconds_min']:.2f} to "
                 f"{result['train_seconds_max']:.2f}, n = {result['epochs']}) | 100% |")
    lines.append(f"\n{result['images_per_second']:,.0f} images/s; {result['flop_per_image'] / 1e9:.3f} GFLOP an image "
                 f"(forward + backward, convolutions as they are written); {result['flop_per_second'] / 1e12:.3f} TFLOP/s, "
                 f"{result['share_of_matrix_product']:.1%} of the {result['matrix_product_flop_per_second'] / 1e12:.2f} "
                 "TFLOP/s that a matrix product reaches here in the same number format"
                 + (", more than all of it because Winograd's filtering multiplies less" if result["share_of_matrix_product"] > 1 else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3, help="epochs to time (default 3)")
    parser.add_argument("--out", type=out_folder, help="folder for epochs.json; none is written without it")
    settings, own = config.parse(sys.argv[1:], parser)
    if not 1 <= own.epochs <= settings.loop.epochs:
        raise runtime.UserError(f"--epochs: got {own.epochs}, expected 1 to loop.epochs = {settings.loop.epochs}")
    device = device_of(settings)
    from seresnet import loop
    from seresnet.optim import stepwise
    settings, data, model = loop.prepare(settings)
    # the first epochs are timed: where the recipe crops, they see crops
    flop = flop_an_image(model, stepwise(settings.augment.sides, 0, settings.loop.epochs, settings.model.image_size))
    with loop.open_session(settings, device, data, model) as session:
        ceiling = matrix_product_rate(session.dtype, device)
        batches = session.train_batches
        images = len(batches) * settings.loader.batch_size if settings.loader.drop_last else batches.samples
        facts = loop.facts(session)
        print(f"{settings.recipe}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        end = session.first_step(min(own.epochs, settings.loop.epochs)) / session.first_step(settings.loop.epochs)
        result = summarise(measure(session, own.epochs), images, round(flop * settings.optim.passes(0, end)), ceiling)
    print(table(result))
    keep(own.out, "epochs", settings.recipe, {**result, "facts": facts})


if __name__ == "__main__":
    runtime.run_program(main)

"""Accuracy against time, ours beside others': python -m benchmarks.frontier SERIES.json ... [--peers FILE] [--picture FILE]

SERIES.json is what benchmarks.time_to_accuracy leaves. Others' published figures are in benchmarks/anchors.yaml. Their times on
another machine say nothing about this one, so each stands where the arithmetic of its training puts it, without evaluation, drawn hollow: at
the median rate (FLOP/s) of those that --peers names, a JSON file of others that were run on the same machine, {name: {accuracy, seconds}}, drawn
full, or without any at the rate of the first series.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import yaml

from benchmarks import time_to_accuracy
from seresnet import report, runtime

ANCHORS = Path(__file__).with_name("anchors.yaml")


def flop_of_training(series: Mapping) -> float:
    """Floating-point operations of one training of a series: of convolutions and matrix products, forward and backward."""
    from benchmarks.epochs import flop_an_image
    from seresnet import config, loop
    from seresnet.optim import stepwise
    net = series["config"]["model"]
    side = net["image_size"] or 32
    settings = config.build(series["config"], {"model.classes": net["classes"] or 10, "model.image_size": side})
    model, epochs = loop.build_model(settings), settings.loop.epochs
    sides = [stepwise(settings.augment.sides, epoch, epochs, side) for epoch in range(epochs)]
    shares = [stepwise(settings.loop.hardest, epoch, epochs, 1) for epoch in range(epochs)]
    an_image, run = {s: flop_an_image(model, s) for s in set(sides)}, series["runs"][0]
    begun = [begin / sum(shares) for begin in accumulate(shares, initial=0)]    # in shares of the run's steps
    passes = [settings.optim.passes(begin, end) for begin, end in pairwise(begun)]
    mean = sum(an_image[s] * share * count for s, share, count in zip(sides, shares, passes)) / sum(shares)
    return mean * run["images_per_second"] * run["train_seconds"]


def our_points(files: Sequence[str]) -> list[dict]:
    """A point a series: accuracies with TTA, median seconds of training and evaluation, arithmetic."""
    points = []
    for file in files:
        try:
            series = json.loads(Path(file).read_text(encoding="utf-8"))
            accuracies = [run["accuracy_tta"] for run in series["runs"]]
            timed = time_to_accuracy.timed(series["runs"])
            seconds = statistics.median(run["train_seconds"] + run["eval_seconds"] for run in timed)
            flop, split = flop_of_training(series), series["split"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise runtime.UserError(f"{file}: is no series of benchmarks.time_to_accuracy ({error!r})") from error
        if split != "test":
            raise runtime.UserError(f"{file}: was evaluated on {split}, others on the test set: run the series with evaluate.split: test")
        points.append({"name": series["recipe"], "ours": True, "measured": True, "accuracy": statistics.fmean(accuracies),
                       "accuracies": accuracies, "seconds": seconds, "pflop": flop / 1e15, "note": f"n = {len(accuracies)}",
                       "set": series.get("set") or "cifar10",    # which earlier JSON does not say
                       "rate": flop / statistics.median(run["train_seconds"] for run in timed)})
    return points


def rate_of_others(anchors: Sequence[Mapping], peers: Mapping[str, Mapping], ours: Mapping) -> tuple[float, str]:
    """FLOP/s at which others are reckoned here, and whose they are: the median of those that were run here, else those of `ours`."""
    found = [anchor["pflop"] * 1e15 / peers[anchor["name"]]["seconds"] for anchor in anchors if anchor["name"] in peers and anchor.get("pflop")]
    return (statistics.median(found), "those run here, with their evaluation") if found else (ours["rate"], f"{ours['name']}'s training")


def their_points(anchors: Sequence[Mapping], peers: Mapping[str, Mapping], rate: float) -> list[dict]:
    """A point an anchor: as measured beside ours where it is among the peers, else where `rate` puts its arithmetic.

    Raises UserError for a peer that is no anchor.
    """
    strangers = sorted(set(peers) - {anchor["name"] for anchor in anchors})
    if strangers:
        raise runtime.UserError(f"--peers: {', '.join(strangers)}: not in {ANCHORS.name}: add them there, with their source")
    points = []
    for anchor in anchors:
        peer, pflop = peers.get(anchor["name"]), anchor.get("pflop")
        points.append({"name": anchor["name"], "ours": False, "measured": bool(peer), "pflop": pflop,
                       "accuracy": peer["accuracy"] if peer else anchor["accuracy"],
                       "accuracies": [peer["accuracy"] if peer else anchor["accuracy"]],
                       "seconds": peer["seconds"] if peer else pflop * 1e15 / rate if pflop else None,
                       "note": f"published: {anchor['accuracy']:.2%}, {anchor['time']} ({anchor['source']})"})
    return points


def unit_of(points: Sequence[Mapping]) -> str:
    """What to count in: seconds where the fastest series of ours takes less than half a minute, as on a GPU, else minutes."""
    return "seconds" if min(point["seconds"] for point in points if point["ours"]) < 30 else "minutes"


def table(points: Sequence[Mapping], unit: str) -> str:
    """All points as Markdown, by accuracy, their times in minutes or seconds."""
    def time(point: Mapping) -> str:
        scale = 60 if unit == "minutes" else 1
        return "-" if point["seconds"] is None else f"{point['seconds'] / scale:.1f}" + ("" if point["measured"] else " (reckoned)")
    rows = [(point["name"] if not point["ours"] else f"**{point['name']}**", f"{point['accuracy']:.2%}", time(point),
             f"{point['pflop']:.2f}" if point["pflop"] else "-", point["note"])
            for point in sorted(points, key=lambda point: point["accuracy"])]
    return report.table(("training", "accuracy", f"{unit} here", "PFLOP", "n, or as published"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("series", nargs="+", help="what benchmarks.time_to_accuracy left: <out>/<recipe>.json")
    parser.add_argument("--peers", help="JSON of others' trainings on this machine: {name: {accuracy, seconds}}")
    parser.add_argument("--picture", help="write the plot to this file, such as frontier.png")
    own = parser.parse_args(sys.argv[1:])
    try:
        peers = json.loads(Path(own.peers).read_text(encoding="utf-8")) if own.peers else {}
        peers = {name: {key: float(peer[key]) for key in ("accuracy", "seconds")} for name, peer in peers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise runtime.UserError(f"--peers: {own.peers}: {error!r}: expected {{name: {{accuracy, seconds}}}}") from error
    if own.picture:
        report.check_picture(own.picture)
    ours = our_points(own.series)
    anchors = yaml.safe_load(ANCHORS.read_text(encoding="utf-8"))
    rate, whose = rate_of_others(anchors, peers, ours[0])
    points = ours + their_points(anchors, peers, rate)
    print(table(points, unit_of(points)))
    print(f"\nreckoned: PFLOP at the {rate / 1e12:.3f} TFLOP/s of {whose}")
    for name in dict.fromkeys(point["set"] for point in ours if point["set"] != "cifar10"):
        print(f"trained and evaluated on another set, {name}: the others' accuracies, of CIFAR-10's test set, are no measure of it")
    if own.picture:
        from seresnet.pictures import draw_frontier
        draw_frontier(points, Path(own.picture), unit_of(points))


if __name__ == "__main__":
    runtime.run_program(main)

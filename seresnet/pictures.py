"""Pictures of a training: curves, runs side by side, confusion matrix, contact sheets. The one file that knows matplotlib."""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")    # Paul Tol's bright scheme
STYLES = (("-", "o"), ("--", "o"), (":", "s"), ("-.", "D"))    # lines and markers, where there are more runs than colours


def _drawing(draw: Callable) -> Callable:
    """`draw` with all text drawn as it is written: a class may be called `$x$`, and fonts lack letters of half the world."""
    @functools.wraps(draw)
    def drawn(*arguments, **named):
        import matplotlib
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            return draw(*arguments, **named)
    return drawn


def _label(name: str) -> str:
    """A name for a legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _figure(width: float, height: float):
    """An empty figure, inches. No pyplot: it wants a display, and keeps every figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


@_drawing
def draw_curves(records: list[Mapping], outcome: Mapping, path: Path) -> None:
    """One figure of three plots over the epochs: loss, accuracy, learning rate; train and evaluation split."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    figure = _figure(11, 3.8)
    split, epochs = outcome["split"], [r["epoch"] for r in records]
    marker = "o" if len(epochs) <= 40 else None
    part = len({r.get("train_images") for r in records}) > 1    # loop.hardest: the curve is of other images from epoch to epoch
    train = dict(color="#4477aa", label="train (augmented, hardest alone)" if part else "train (augmented)", marker=marker, markersize=3.5)
    test = dict(color="#cc3311", label=split, marker=marker, markersize=3.5)

    def line(axes, key, scale=1.0, **style):
        points = [(r["epoch"], r[key] * scale) for r in records if r[key] is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], **style)

    loss, accuracy, rate = figure.subplots(1, 3)
    line(loss, "train_loss", **train)
    line(loss, "test_loss", **test)
    loss.set_ylabel("loss, label-smoothed where training is (nats)")
    line(accuracy, "train_accuracy", **train)
    line(accuracy, "test_accuracy", **test)
    best = outcome["accuracy_tta"]
    accuracy.axhline(best, color="#cc3311", linewidth=0.8, linestyle="--",
                     label=f"final, TTA {outcome['tta']}: {best:.2%}")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    accuracy.set_ylabel("accuracy")
    line(rate, "learning_rate", color="#228833", marker=marker, markersize=3.5)
    rate.set_ylabel("learning rate at the epoch's end")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.grid(alpha=0.3)
        _bare(axes)
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{outcome['recipe']}, seed {outcome['seed']}: {outcome['parameters']:,} parameters, "
                    f"{outcome['train_seconds']:.0f} s of training", fontsize=10)
    figure.savefig(path)


@_drawing
def draw_runs(runs: Sequence[Mapping], path: Path) -> None:
    """Runs side by side: accuracy over the epochs, and each run's final accuracy over its training time.

    runs: `label`, `records` (lines of log.jsonl) and `outcome` (report.json, or None where the run has not ended) each.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    figure = _figure(12, 4.6 + 0.16 * max(0, len(runs) - 12))
    curves, times = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        (style, marker), colour = STYLES[i // len(COLOURS) % len(STYLES)], COLOURS[i % len(COLOURS)]
        points = [(r["epoch"], r["test_accuracy"]) for r in run["records"] if r["test_accuracy"] is not None]
        curves.plot([x for x, _ in points], [y for _, y in points], style, color=colour, label=_label(run["label"]),
                    marker="o" if len(points) <= 40 else None, markersize=3)
        if run["outcome"]:
            times.plot(run["outcome"]["train_seconds"] + run["outcome"]["eval_seconds"], run["outcome"]["accuracy_tta"], marker,
                       color=colour, markersize=7, markerfacecolor="none" if i >= len(COLOURS) else colour, clip_on=False)
    curves.set_xlabel("epoch")
    curves.set_ylabel("accuracy on the evaluation split")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    times.set_xlabel("training and evaluation (seconds)")
    times.set_ylabel("final accuracy, with TTA")
    times.margins(0.1)
    times.set_xlim(left=0)
    times.set_ylim(top=min(times.get_ylim()[1], 1.005))
    for axes, missing in ((curves, "no epoch was evaluated yet"), (times, "no run has ended yet")):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(alpha=0.3)
        _bare(axes)
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, missing, transform=axes.transAxes, ha="center", color="#777777")
            axes.set(xticks=[], yticks=[])
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


@_drawing
def draw_frontier(points: Sequence[Mapping], path: Path, unit: str = "minutes") -> None:
    """Accuracy over minutes, or seconds, on a logarithmic axis: our series with their seeds, others' trainings beside them.

    points: `name`, `accuracy` (fraction, the mean), `accuracies` (of the seeds), `seconds` (None: left out), `ours`, `measured` (else drawn hollow) each.
    """
    from matplotlib.ticker import FuncFormatter, PercentFormatter
    figure = _figure(8.5, 4.8)
    axes = figure.subplots()
    scale = {"minutes": 60, "seconds": 1}[unit]
    shown = [point for point in points if point["seconds"] is not None]
    for point in shown:
        time, mean = point["seconds"] / scale, point["accuracy"]
        colour, marker = (COLOURS[0], "o") if point["ours"] else ("#777777", "D")
        axes.plot([time], [mean], marker, color=colour, markersize=8, markerfacecolor=colour if point["measured"] else "none", zorder=3)
        if len(point["accuracies"]) > 1:
            axes.plot([time] * len(point["accuracies"]), point["accuracies"], "_", color=colour, markersize=9)
        beside = [other for other in shown if 1 < other["seconds"] / point["seconds"] < 3 and abs(other["accuracy"] - mean) < 0.0015]
        leftmost = point["seconds"] == min(other["seconds"] for other in shown)    # on its left are the axis and its figures
        if not beside:
            height, place, side = mean, (7, -3), "left"
        elif not leftmost:
            height, place, side = mean, (-7, -3), "right"
        elif mean >= max(other["accuracy"] for other in beside):    # above its seeds, or below them, away from the others
            height, place, side = max(point["accuracies"]), (0, 9), "center"
        else:
            height, place, side = min(point["accuracies"]), (0, -16), "center"
        axes.annotate(point["name"], (time, height), place, textcoords="offset points", fontsize=8.5, color=colour, ha=side,
                      weight="bold" if point["ours"] else "normal")
    for ours, measured, text in ((True, True, "ours, mean (dashes: seeds)"), (False, True, "others, run on the same machine"),
                                 (False, False, "others, as published, where their arithmetic puts them")):
        if any((point["ours"], point["measured"]) == (ours, measured) for point in shown):
            colour = COLOURS[0] if ours else "#777777"
            axes.plot([], [], "o" if ours else "D", color=colour, markersize=7, markerfacecolor=colour if measured else "none", label=text)
    axes.set_xscale("log")
    low, high = (limit(point["seconds"] / scale for point in shown) for limit in (min, max))
    axes.set_xlim(low / 1.6, high * 2.6)    # room for the names on the right
    ticks = [m * 10**decade for decade in range(9) for m in (1, 2, 5) if low / 1.6 <= m * 10**decade <= high * 2.6]
    axes.set_xticks(ticks or [low], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.margins(y=0.12)
    axes.set_xlabel(f"training and evaluation; hollow: training alone ({unit}, logarithmic)")
    axes.set_ylabel("test accuracy, with each one's TTA")
    axes.grid(alpha=0.3)
    _bare(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


@_drawing
def draw_confusion(counts: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """A confusion matrix, integers (K, K): a row a true class, a column a predicted one, coloured by the share of its row."""
    from matplotlib.ticker import PercentFormatter
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = len(classes) > 25
    side = min(14, 2.6 + 0.5 * len(classes)) if not many else 10
    figure = _figure(side + 1.2, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1.0))
    bar.set_label("share of the true class")
    if not many:    # numbers and names would not be legible
        for i, j in np.ndindex(counts.shape):
            if counts[i, j]:
                axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=8,
                          color="white" if share[i, j] > 0.55 else "black")
    step = range(0, len(classes), max(1, len(classes) // 50))
    names = [name if len(name) <= 18 else f"{name[:17]}\u2026" for name in classes]
    axes.set_xticks(list(step), [names[i] for i in step], rotation=60, ha="right", rotation_mode="anchor", fontsize=8 if not many else 6)
    axes.set_yticks(list(step), [names[i] for i in step], fontsize=8 if not many else 6)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=10)
    figure.savefig(path)


@_drawing
def draw_sheet(images: np.ndarray, captions: Sequence[str], title: str, path: Path, *, columns: int,
               column_titles: Sequence[str] = ()) -> None:
    """A contact sheet of uint8 (N, H, W, 3), N at least 1, each with its caption below, `columns` in a row."""
    rows = -(-len(images) // columns)
    figure = _figure(1.35 * columns, 1.6 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, image, caption in zip(grid.flat, images, captions):
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(caption, fontsize=7, labelpad=2)
    for axes, text in zip(grid[0], column_titles):
        axes.set_title(text, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


@_drawing
def draw_shift(severities: Mapping[str, Sequence[float]], plain: float, title: str, path: Path) -> None:
    """Accuracy over severity (1 to 5), a line a corruption; `plain` is the accuracy on the images as they are."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    axes.axhline(plain, color="#222222", linewidth=0.8, linestyle="--", label=f"as they are: {plain:.2%}")
    for i, (name, values) in enumerate(severities.items()):
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xlabel("severity")
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.grid(alpha=0.3)
    _bare(axes)
    axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)

"""The run folder (config, environment, log, report, curves) and all that a training prints.

    config.yaml        the resolved config: `--config-file` takes it again
    environment.json   command, commit, versions, machine, seed
    log.jsonl          one line an epoch
    report.json        the outcome
    curves.png         loss, accuracy and learning rate over the epochs
    last.pt, best.pt, weights.pt    written by checkpoint.py
"""
from __future__ import annotations

import glob
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import yaml

from seresnet import runtime
from seresnet.runtime import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class RunFolder:
    """A folder of one run's own, until `close`. `records` are the lines of log.jsonl so far."""

    path: Path
    log_file: IO[str]    # open and locked: no other process trains into this folder meanwhile
    records: list[dict] = field(default_factory=list)

    def write_start(self, config: Mapping, environment: Mapping) -> None:
        """Write config.yaml and environment.json."""
        (self.path / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self._write_json("environment.json", environment)

    def write_resumption(self, environment: Mapping) -> None:
        """Add to environment.json what the run goes on with."""
        try:
            first = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):    # killed while it was written: what goes on matters more
            first = {}
        self._write_json("environment.json", {**first, "resumed": [*first.get("resumed", []), dict(environment)]})

    def log(self, record: Mapping) -> None:
        """Append one epoch's record to log.jsonl; it is on disk when this returns."""
        self.records.append(dict(record))
        self.log_file.write(_json(record) + "\n")
        self.log_file.flush()
        os.fsync(self.log_file.fileno())

    def rewind(self, records: Iterable[Mapping]) -> None:
        """Make log.jsonl hold `records` and nothing else: what was logged after the checkpoint will be trained again."""
        self.records.clear()
        self.log_file.truncate(0)
        for record in records:
            self.log(record)

    def close(self) -> None:
        """Leave the folder to others."""
        self.log_file.close()

    def write_report(self, outcome: Mapping, curves: bool) -> None:
        """Write report.json, and curves.png where asked for."""
        self._write_json("report.json", outcome)
        if curves:
            draw_curves(self.records, outcome, self.path / "curves.png")

    def _write_json(self, name: str, content: Mapping) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(_json(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / name)


def create_run_folder(base: Path | str, recipe: str, explicit: Path | str = "") -> RunFolder:
    """A new folder `<base>/<recipe>-<date>-<time>`, or the `explicit` one, which may exist if it is empty.

    Two runs never share a folder: a name that is taken within the same second gets a number. Raises UserError where the
    explicit folder holds something, or none can be created.
    """
    path = Path(explicit) if explicit else Path(base) / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if explicit:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise UserError(f"run.folder: {path} is not empty: choose another, or remove it")
            (path / "log.jsonl").touch(exist_ok=False)    # two runs that start together: one of them gets here first
            return open_run_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                candidate.mkdir()
                return open_run_folder(candidate)
            except FileExistsError:
                continue
    except OSError as error:
        key = "run.folder" if explicit else "report.folder"
        raise UserError(f"{key}: {path}: cannot be created ({error.strerror}): choose another place") from error
    raise UserError(f"report.folder: {path} and 998 names like it are taken: choose another place")


def open_run_folder(path: Path) -> RunFolder:
    """The run folder at `path`, to write into. Raises UserError where another process does, or it cannot be written."""
    try:
        log_file = open(path / "log.jsonl", "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path / 'log.jsonl'}: cannot be written ({error.strerror}): choose another folder") from error
    if not runtime.lock(log_file):
        log_file.close()
        raise UserError(f"run.folder: another process is training into {path}: wait for it, or choose another folder")
    return RunFolder(path, log_file)


def unfinished_run_folders(base: Path | str, recipe: str, explicit: Path | str = "") -> list[Path]:
    """Folders of `recipe` under `base` (or the `explicit` one) with a checkpoint and without a report, newest first."""
    try:
        found = [Path(explicit)] if explicit else list(Path(base).glob(f"{glob.escape(recipe)}-*"))
        found = [path for path in found if (path / "last.pt").exists() and not (path / "report.json").exists()]
        return sorted(found, key=lambda path: (path / "last.pt").stat().st_mtime, reverse=True)
    except OSError:
        return []


def _json(content: Mapping, indent: int | None = None) -> str:
    """Strict JSON: what is not finite becomes null, which every reader understands."""
    def strict(value):
        if isinstance(value, Mapping):
            return {str(k): strict(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [strict(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value
    return json.dumps(strict(content), indent=indent, allow_nan=False)


# -- curves -------------------------------------------------------------------------------------------------------------

def draw_curves(records: list[Mapping], outcome: Mapping, path: Path) -> None:
    """One figure of three plots over the epochs: loss, accuracy, learning rate; train and evaluation split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg    # no pyplot: it wants a display, and keeps every figure
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    split, epochs = outcome["split"], [r["epoch"] for r in records]
    marker = "o" if len(epochs) <= 40 else None
    train = dict(color="#4477aa", label="train (augmented)", marker=marker, markersize=3.5)
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{outcome['recipe']}, seed {outcome['seed']}: {outcome['parameters']:,} parameters, "
                    f"{outcome['train_seconds']:.0f} s of training", fontsize=10)
    figure.savefig(path)


# -- console ------------------------------------------------------------------------------------------------------------

def print_summary(config: Mapping[str, Mapping], facts: Mapping[str, object], folder: Path) -> None:
    """The resolved config, a section a line, then what data and machine decided."""
    for section, values in config.items():
        print(f"{section:>9}  " + "  ".join(f"{name}={_plain(value)}" for name, value in values.items()))
    print(f"{'here':>9}  " + "  ".join(f"{name}={_plain(value)}" for name, value in facts.items()))
    print(f"{'folder':>9}  {folder}", flush=True)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_plain, value)) + "]"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value) if value != "" else "-"


def print_epoch(record: Mapping, epochs: int) -> None:
    """One line: epoch, train loss and accuracy, evaluated loss and accuracy, images/s, seconds."""
    evaluated = " " * 21
    if record["test_accuracy"] is not None:
        evaluated = f"  eval {record['test_loss']:.4f} {record['test_accuracy']:7.2%}"
    width = len(str(epochs))
    print(f"epoch {record['epoch']:{width}}/{epochs}  train {record['train_loss']:.4f} {record['train_accuracy']:7.2%}"
          f"{evaluated}  {record['images_per_second']:9,.0f} images/s  {record['train_seconds']:.1f} s"
          f" + {record['eval_seconds']:.1f} s", flush=True)


def print_outcome(outcome: Mapping, folder: Path) -> None:
    """The last line: accuracy, time, folder."""
    print(f"accuracy {outcome['accuracy']:.2%}, with TTA {outcome['tta']} {outcome['accuracy_tta']:.2%} "
          f"({outcome['correct_tta']} of {outcome['evaluated']} {outcome['split']} images); training "
          f"{outcome['train_seconds']:.1f} s, evaluation {outcome['eval_seconds']:.1f} s, in all "
          f"{outcome['total_seconds']:.1f} s; {folder}", flush=True)


def progress(items: Iterable[T], total: int, label: str, done: int = 0) -> Iterator[T]:
    """`items`, with a progress bar on a terminal and nothing elsewhere. done: how many of `total` lie behind already."""
    if not sys.stderr.isatty():
        return iter(items)
    return _with_bar(items, total, label, done)


def _with_bar(items: Iterable[T], total: int, label: str, done: int) -> Iterator[T]:
    from tqdm import tqdm
    iterator = iter(items)
    try:
        with tqdm(iterator, total=total, initial=done, desc=label, leave=False, unit="batch", dynamic_ncols=True) as bar:
            yield from bar
    finally:
        if hasattr(iterator, "close"):
            iterator.close()    # leaving early has to reach the loader at once


class CountBar:
    """A progress bar that is told how far it is, on a terminal; silent elsewhere."""

    def __init__(self, total: int, label: str, unit: str):
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            self._bar = tqdm(total=total, desc=label, leave=False, unit=unit, dynamic_ncols=True)

    def __call__(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> CountBar:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


def seconds_since_process_start() -> float:
    """Seconds that this process has lived, imports included; the restart that tunes the allocator keeps its clock."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError):
        return time.perf_counter() - _IMPORTED


_IMPORTED = time.perf_counter()

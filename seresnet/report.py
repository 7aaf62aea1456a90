"""The run folder (config, environment, log, report, curves), all that a program prints, and runs side by side:

python -m seresnet.report runs/* [--csv FILE] [--picture FILE]

    config.yaml        the resolved config: `--config-file` takes it again
    environment.json   command, commit, versions, machine, recipe, seed, data
    log.jsonl          one line an epoch
    report.json        the outcome
    curves.png         loss, accuracy and learning rate over the epochs
    last.pt, best.pt, weights.pt    written by checkpoint.py
    events.out.tfevents...          with report.tensorboard
    wandb/, wandb-id                with report.wandb
"""
from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from seresnet import runtime
from seresnet.runtime import UserError

if __name__ == "__main__":
    runtime.check_packages("yaml", "numpy", "PIL")

import yaml    # noqa: E402

from seresnet.files import IMAGE_SUFFIXES    # noqa: E402
from seresnet.pictures import SUFFIXES as PICTURE_SUFFIXES    # noqa: E402
from seresnet.pictures import draw_curves, draw_runs    # noqa: E402

T = TypeVar("T")
CHECKPOINTS = ("weights.pt", "best.pt", "last.pt")
# What a mistyped name of a file to write may stand for, and nobody can make again.
MISSED = {".json", ".md", ".py", ".ipynb", ".sh", ".toml",
          ".pt", ".beton", ".pkl", ".pickle", ".npy", ".npz", ".bin", ".gz", ".tgz", ".zip", ".parquet", ".jsonl", ".yaml", *PICTURE_SUFFIXES, *IMAGE_SUFFIXES}


@dataclass(frozen=True)
class RunFolder:
    """A folder of one run's own, until `close`. `records` are the lines of log.jsonl so far."""

    path: Path
    log_file: IO[str]    # open and locked: no other process trains into this folder meanwhile
    records: list[dict] = field(default_factory=list)
    writers: list = field(default_factory=list)    # of TensorBoard, of Weights & Biases

    def open_tensorboard(self) -> None:
        """From now on, `log` also writes TensorBoard events into the folder."""
        from torch.utils.tensorboard import SummaryWriter
        self.writers.append(SummaryWriter(str(self.path)))

    def open_wandb(self, config: Mapping) -> None:
        """From now on, `log` also tells Weights & Biases; a run that goes on goes on there, too. Raises UserError where it refuses."""
        self.writers.append(_Wandb(self.path, config))

    def write_start(self, config: Mapping, environment: Mapping) -> None:
        """Write config.yaml and environment.json."""
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        self._write_json("environment.json", environment)

    def write_resumption(self, environment: Mapping) -> None:
        """Add to environment.json what the run goes on with."""
        first = read_json(self.path / "environment.json")    # nothing where it was killed while it was written: what goes on matters more
        of_the_run = {key: environment[key] for key in ("recipe", "seed", "data") if key in environment}    # earlier versions wrote less
        self._write_json("environment.json", {**of_the_run, **first, "resumed": [*first.get("resumed", []), dict(environment)]})

    def log(self, record: Mapping) -> None:
        """Append one epoch's record to log.jsonl; it is on disk when this returns. Raises UserError where it cannot be."""
        self.records.append(dict(record))
        try:
            self.log_file.write(_json(record) + "\n")
            self.log_file.flush()
            os.fsync(self.log_file.fileno())
        except OSError as error:
            raise UserError(f"{self.path / 'log.jsonl'}: cannot be written ({error.strerror}): free space there; --run.resume "
                            f"{self.path} then goes on") from error
        self._tell(lambda writer: _add(writer, record))

    def rewind(self, records: Iterable[Mapping]) -> None:
        """Make log.jsonl hold `records` and nothing else: what was logged after the checkpoint will be trained again."""
        self.records.clear()
        self.log_file.truncate(0)
        for record in records:
            self.log(record)

    def close(self) -> None:
        """Leave the folder to others."""
        with suppress(OSError):    # what could not be written was said when it was logged
            self.log_file.close()
        self._tell(lambda writer: writer.close())

    def abandon(self) -> None:
        """Remove the folder, in which nothing was trained."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _tell(self, what: Callable[[object], None]) -> None:
        """Do `what` with every writer. One that fails is left out from then on: what it shows is in log.jsonl, and the training matters."""
        for writer in list(self.writers):
            try:
                what(writer)
            except Exception as error:    # a network's, a disk's, or whatever these libraries raise
                self.writers.remove(writer)
                say(f"{type(writer).__module__.partition('.')[0]} is told nothing more: {type(error).__name__}: {error}")

    def write_report(self, outcome: Mapping, curves: bool) -> None:
        """Write report.json, and curves.png where asked for."""
        self._write_json("report.json", outcome)
        self._tell(lambda writer: writer.conclude(outcome) if isinstance(writer, _Wandb) else None)
        if curves and not runtime.is_installed("matplotlib"):
            say("curves.png is not drawn: matplotlib is not installed (pip install matplotlib)")
        elif curves:
            try:
                draw_curves(self.records, outcome, self.path / "curves.png")
            except OSError as error:
                raise UserError(f"{self.path / 'curves.png'}: cannot be written ({error.strerror}); the report is there, and "
                                "nothing else is missing") from error

    def _write_json(self, name: str, content: Mapping) -> None:
        write_text(self.path / name, _json(content, indent=1) + "\n")


class _Wandb:
    """Weights & Biases, taken as TensorBoard's writer is. A run that goes on has the id that it had."""

    def __init__(self, path: Path, config: Mapping):
        import wandb
        known = path / "wandb-id"
        if not known.exists():
            write_text(known, secrets.token_hex(8))
        try:
            self._run = wandb.init(project="seresnet", name=path.name, id=known.read_text(encoding="utf-8"), resume="allow", dir=str(path),
                                   config=dict(config), settings=wandb.Settings(console="off"))
        except wandb.errors.Error as error:
            raise UserError(f"report.wandb: {error}: `wandb login`, or WANDB_MODE=offline and `wandb sync` later, or leave it false"
                            ) from error
        self._row: dict[str, float] = {}
        self._epoch = 0

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self._row[name], self._epoch = value, epoch

    def flush(self) -> None:
        self._run.log(self._row, step=self._epoch, commit=True)
        self._row = {}

    def conclude(self, outcome: Mapping) -> None:
        """What report.json holds, as the run's summary."""
        self._run.summary.update(dict(outcome))

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))    # an error is on its way out: the run failed


def _add(writer, record: Mapping) -> None:
    for name, value in record.items():
        if isinstance(value, float):
            writer.add_scalar(name, value, record["epoch"])
    writer.flush()


class NoFolder(RunFolder):
    """What the other processes of a training have in place of its run folder: it keeps the records and writes nothing."""

    def __init__(self, path: Path):
        super().__init__(path, io.StringIO())

    def open_tensorboard(self) -> None:
        """Nothing."""

    def open_wandb(self, config: Mapping) -> None:
        """Nothing."""

    def write_start(self, config: Mapping, environment: Mapping) -> None:
        """Nothing."""

    def write_resumption(self, environment: Mapping) -> None:
        """Nothing."""

    def log(self, record: Mapping) -> None:
        """Remember one epoch's record."""
        self.records.append(dict(record))

    def rewind(self, records: Iterable[Mapping]) -> None:
        """Remember `records` and nothing else."""
        self.records[:] = map(dict, records)

    def write_report(self, outcome: Mapping, curves: bool) -> None:
        """Nothing."""


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
                way_out = "or remove it"
                if (path / "report.json").exists():
                    way_out = "a trained net is in this one"
                elif (path / "last.pt").exists():
                    way_out = f"or go on with what was begun there: --run.resume {path}"
                raise UserError(f"run.folder: {path} is not empty: choose another, {way_out}")
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


def require(package: str) -> None:
    """Raise UserError where `package`, of the key of its name, is not installed: tensorboard or wandb."""
    if not runtime.is_installed(package):
        raise UserError(f"report.{package}: {package} is not installed: pip install {package}, or leave it false")


def open_run_folder(path: Path) -> RunFolder:
    """The run folder at `path`, to write into. Raises UserError where another process does, or it cannot be written."""
    try:
        log_file = open(path / "log.jsonl", "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path / 'log.jsonl'}: cannot be written ({error.strerror}): choose another folder") from error
    if not runtime.lock(log_file):
        log_file.close()
        raise UserError(f"run.folder: another process is training into {path}: wait for it, or choose another folder")
    runtime.remove_abandoned(path)
    return RunFolder(path, log_file)


def unfinished_run_folders(base: Path | str, explicit: Path | str = "") -> list[Path]:
    """Folders under `base` (or the `explicit` one) with a checkpoint and without a report, newest first. One that may not be entered,
    or is removed while we look, is none."""
    found = []
    with suppress(OSError):
        for path in [Path(explicit)] if explicit else list(Path(base).iterdir()):
            with suppress(OSError):
                if not (path / "report.json").exists():
                    found.append(((path / "last.pt").stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def begun_by(job: str, base: Path | str, named: Iterable[Path | str]) -> Iterator[Path]:
    """The run folders that a launcher's `job` has written into, among the `named` ones and those under `base`, of which the last by
    name are the first."""
    for path in [*map(Path, filter(None, named)), *sorted(Path(base).glob("*"), reverse=True)]:
        try:
            content = read_json(path / "environment.json")
            if job in (content.get("job"), *(entry.get("job") for entry in content.get("resumed", []))):
                yield path
        except (AttributeError, TypeError):    # what cannot be read was not begun by this job
            continue


def read_json(file: Path) -> dict:
    """What a JSON file holds, such as a run's environment.json; nothing where it is missing, damaged or no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def read_report(path: Path) -> dict:
    """What the report.json of a finished run holds. Raises UserError where it is damaged."""
    try:
        return json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'report.json'}: cannot be read ({error}): remove it to train again") from error


def strict(value: object) -> object:
    """`value` as strict JSON knows it: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(content: Mapping, indent: int | None = None) -> str:
    """Strict JSON: what is not finite becomes null, which every reader understands."""
    return json.dumps(strict(content), indent=indent, allow_nan=False)


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


def say(text: str, aside: bool = False) -> None:
    """A line, or several, for the user; `aside` on the error stream, where the other carries results."""
    print(text, flush=True, file=sys.stderr if aside else sys.stdout)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for readers of the plain text; the first to the left, the others to the right."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |"
             for row in rows]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def check_writable(path: Path | str, *read: Path | str, kinds: Sequence[str] = ()) -> None:
    """Raise UserError, before any work is done, where no file can be written at `path`, or where one lies there that would be missed: one of
    `read`, what the program reads; a run's checkpoint; or data, a text, a program, a picture or a recipe by its suffix, but those of `kinds`,
    which it writes."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file to write")
    try:
        places = path.absolute(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a link that leads in a circle: name another file") from error
    system = any(place.is_relative_to(root) and not place.is_relative_to("/dev/shm") for place in places for root in ("/dev", "/proc"))
    if system or path.exists() and not path.is_file():    # a file takes its place when all is done: of /dev/null, for every program
        raise UserError(f"{path}: is no regular file, expected the name of one to write")
    folder = places[1].parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}: create it, or name another place")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot be written (Permission denied): name another place")
    suffix = path.suffix.lower()
    if path.exists() and (path.name in CHECKPOINTS or suffix in MISSED and suffix not in kinds
                          or any(Path(source).exists() and path.samefile(source) for source in read)):
        raise UserError(f"{path}: is there already, and not of the kind that is written here: name another file, or move that one away")


def check_picture(path: Path | str) -> None:
    """Raise UserError, before any work is done, where no picture can be drawn to `path`."""
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    if not runtime.is_installed("matplotlib"):
        raise UserError(f"{path}: pictures are drawn with matplotlib, which is not installed: pip install matplotlib")
    check_writable(path, kinds=PICTURE_SUFFIXES)


def some(names: Sequence[str], most: int) -> str:
    """The first `most` of the names, and that there are more where there are."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def create_folder(path: Path) -> None:
    """Make sure that there is a folder `path`. Raises UserError where there cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be created ({error.strerror}): name another place with --out") from error


def write_text(path: Path | str, text: str) -> None:
    """Write a file so that it is the old one or the new one, whole. Raises UserError where it cannot be written."""
    path = Path(path)
    try:
        with runtime.whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")    # a file's name as its bytes
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): free space there, or name another place") from error


def _has_bars() -> bool:
    return sys.stderr.isatty() and runtime.is_installed("tqdm")


def progress(items: Iterable[T], total: int, label: str, done: int = 0, unit: str = "batch") -> Iterator[T]:
    """`items`, with a progress bar on a terminal and nothing elsewhere. done: how many of `total` lie behind already."""
    if not _has_bars():
        return iter(items)
    return _with_bar(items, total, label, done, unit)


def watched(label: str, unit: str = "batch") -> Callable[..., Iterator]:
    """watched(...)(items, total): what shows such a bar; items of unknown length need the total."""
    return lambda items, total=None: progress(items, len(items) if total is None else total, label, unit=unit)


def _with_bar(items: Iterable[T], total: int, label: str, done: int, unit: str) -> Iterator[T]:
    from tqdm import tqdm
    iterator = iter(items)
    try:
        with tqdm(iterator, total=total, initial=done, desc=label, leave=False, unit=unit, dynamic_ncols=True) as bar:
            yield from bar
    finally:
        if hasattr(iterator, "close"):
            iterator.close()    # leaving early has to reach the loader at once


class CountBar:
    """A progress bar that is told how far it is, on a terminal; silent elsewhere."""

    def __init__(self, total: int, label: str, unit: str):
        self._bar = None
        if _has_bars():
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
    """Seconds that this process has lived, imports included; the restart that tunes the allocator keeps its clock. Where the system does
    not say it, since runtime was loaded, which programs do first."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError):
        return time.perf_counter() - runtime.LOADED


# -- runs side by side --------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, Callable[[object], str]]] = {    # of the table: title -> key of report.json, and how a reader likes it
    "recipe": ("recipe", str), "seed": ("seed", str), "epochs": ("epochs", str), "parameters": ("parameters", "{:,}".format),
    "set": ("set", str), "split": ("split", str), "images": ("evaluated", "{:,}".format),
    "accuracy": ("accuracy", "{:.2%}".format), "with TTA": ("accuracy_tta", "{:.2%}".format),
    "training, s": ("train_seconds", "{:.1f}".format), "evaluation, s": ("eval_seconds", "{:.1f}".format),
    "images/s": ("images_per_second", "{:,.0f}".format), "device": ("run_device", str)}


def labels(paths: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of those that it lies in as tell it from the others."""
    longest = max((len(path.parts) for path in paths), default=1)
    found = [path.name for path in paths]
    for count in range(2, longest + 1):
        twice = {label for label in found if found.count(label) > 1}
        found = ["/".join(path.parts[-count:]) if label in twice else label for path, label in zip(paths, found)]
    return found


def read_runs(folders: Sequence[Path | str]) -> list[dict]:
    """`label`, `records`, `begun` (what its environment.json says, and `epochs` so far) and `outcome` (None where the run has not ended) of
    each run folder; what is none is passed over.

    Raises UserError where none is one, or a file of one is damaged, or nothing is there.
    """
    runs, paths = [], []
    for folder in map(Path, folders):
        if not folder.exists():
            raise UserError(f"{folder}: does not exist (looked in {Path.cwd()})")
        if not (folder / "log.jsonl").is_file():
            continue
        try:
            text = (folder / "log.jsonl").read_text(encoding="utf-8")
            records = [json.loads(line) for line in text.splitlines()]
            done = (folder / "report.json").is_file()
            outcome = json.loads((folder / "report.json").read_text(encoding="utf-8")) if done else None
            begun = {**read_json(folder / "environment.json"), "epochs": len(records)}
            for told in filter(None, (begun, outcome)):
                told["set"] = told.get("data", {}).get("set", "")    # which earlier versions did not write
            if done:
                [show(outcome[name]) for name, show in COLUMNS.values()]
            [(r["epoch"], r["test_accuracy"]) for r in records]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: its log.jsonl or report.json is damaged ({type(error).__name__}: {error}): leave this folder "
                            "out") from error
        runs.append({"records": records, "begun": begun, "outcome": outcome})
        paths.append(folder.absolute())
    for run, label in zip(runs, labels(paths)):
        run["label"] = label
    if not runs:
        raise UserError(f"no run folder among {', '.join(map(str, folders)) or 'nothing'} (looked in {Path.cwd()}): name folders "
                        "with a log.jsonl")
    return runs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seresnet.report", description="Lay runs side by side: a table and a picture.")
    parser.add_argument("folders", nargs="+", metavar="RUN", help="run folders; other paths are skipped")
    parser.add_argument("--csv", metavar="FILE", help="write the table there as CSV, too")
    parser.add_argument("--picture", metavar="FILE", help="draw curves, and accuracy against time, there")
    options = parser.parse_args(sys.argv[1:])
    for path, check in ((options.csv, check_writable), (options.picture, check_picture)):
        if path:
            check(path)
    runs = read_runs([name for pattern in options.folders    # which Windows' shell does not resolve
                      for name in ([pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) or [pattern])])
    ended = [(run["label"], *(show(run["outcome"][name]) for name, show in COLUMNS.values())) for run in runs if run["outcome"]]
    open_rows = [(run["label"], *(f"{run['begun'].get(name, '')}{' so far' if name == 'epochs' else ''}" for name, _ in COLUMNS.values()))
                 for run in runs if not run["outcome"]]
    header = ("run", *COLUMNS)
    say(table(header, [*ended, *open_rows]))
    if options.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *(    # numbers for programs: fractions, and little where a run has not ended
            (run["label"], *((run["outcome"] or run["begun"]).get(name, "") for name, _ in COLUMNS.values())) for run in runs)])
        write_text(options.csv, text.getvalue())
    if options.picture:
        draw_runs(runs, Path(options.picture))
        say(f"picture: {options.picture}")


if __name__ == "__main__":
    runtime.run_program(main)

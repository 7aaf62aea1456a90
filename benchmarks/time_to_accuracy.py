"""Accuracy and time of a recipe over seeds: python -m benchmarks.time_to_accuracy --config-file rn_configs/se94.yaml --seeds 5 --out DIR

Every seed is a program of its own, started as a user starts it, one after the other: `seconds` are those between its start and
its end, imports and compilation included. With --one-program this program trains them all: it pays for its start once, in the first of
them, whose times the medians leave out. Each leaves its run folder in DIR/<recipe>/seed-N. Called again, the series
goes on where it was interrupted, inside a run if need be; runs of another config are refused, not mixed in, and those of another commit are named.
The seeds start at --first-seed: take seeds that were not used for tuning.
"""
from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import yaml

from benchmarks import keep, problems_with, short
from seresnet import beton, config, report, runtime

PROGRAM = Path(__file__).parents[1] / "ffcv_train.py"
DIVERGED = 3    # the status of such a training
THEN = " then "    # between the commits of one run
CRASHES = (runtime.DeviceFailed.status, *(-number for name in ("SIGSEGV", "SIGABRT", "SIGBUS") if (number := getattr(signal, name, None))))
WAY_ON = "start this again, it goes on where it was"
PARTS = ("startup_seconds", "train_seconds", "eval_seconds", "total_seconds")


def accuracy_figures(values: Sequence[float], target: float | None, confidence: float = 0.95) -> dict[str, float | None]:
    """Mean, standard deviation, least and greatest of accuracies (fractions); the confidence interval of the mean, and the
    probability that the true mean lies below `target`, both by Student's t (None for fewer than two values, or no target).

    The probability is the posterior one under a flat prior on mean and log deviation (Gelman et al., Bayesian Data Analysis,
    section 3.2), which is also the p-value of the one-sided test that the mean is at least the target.
    """
    from scipy import stats
    n, mean = len(values), statistics.fmean(values)
    found = {"n": n, "mean": mean, "standard_deviation": None, "min": min(values), "max": max(values), "interval_low": None,
             "interval_high": None, "probability_below_target": None}
    if n < 2:
        return found
    deviation = statistics.stdev(values)
    error = deviation / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    found.update(standard_deviation=deviation, interval_low=mean - half, interval_high=mean + half)
    if target is not None:
        found["probability_below_target"] = (float(stats.t.cdf((target - mean) / error, n - 1)) if error
                                             else float(mean < target))
    return found


class Diverged(runtime.UserError):
    """A training whose loss is not finite: started again it would be so again, at the same step on a CPU."""

    def __init__(self, folder: Path, told: str):
        super().__init__(f"{folder.name.replace('-', ' ')}: {told}: what has ended is kept; it would diverge again: choose other seeds, or "
                         "another learning rate and another --out")


class Refused(runtime.UserError):
    """A training that was refused, or could not write: the user has something to mend first, in config, data or disk."""

    def __init__(self, folder: Path, told: str):
        lines = "; ".join(line.removeprefix("error: ") for line in told.splitlines())
        super().__init__(f"{folder.name.replace('-', ' ')}: {lines}: mend that, and {WAY_ON}")


class Trainings:
    """Starts ffcv_train.py, as often as it is asked to, and from several threads if need be.

    Within its block a signal to stop is handed on to every training at work instead of ending the program, and no further one is
    started: a training saves its state first. It may have got the signal by itself, from a terminal; runtime.StopRequest takes
    both for one request. On Windows, where a signal from elsewhere kills, nothing is handed on: Ctrl-C reaches all in a console.
    """

    def __init__(self) -> None:
        self._at_work: set[subprocess.Popen] = set()
        self._stopped = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Trainings:
        for number in runtime.STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame) -> None:
        self._stopped = number
        for process in tuple(self._at_work):
            self._ask_to_stop(process)
        runtime.tell(b"waiting for the training to save; once more to leave at once\n")

    def _ask_to_stop(self, process: subprocess.Popen) -> None:
        if os.name == "posix":
            process.send_signal(self._stopped)

    def run(self, arguments: Sequence[str], folder: Path, jobs: int = 1) -> None:
        """Run ffcv_train.py to its end; note the seconds of it, and that `jobs` such may have been at work, in the run's `folder`. One whose
        device fails, or that machine code ends, goes on once from the state that it saved last. Raises UserError where it fails,
        Refused where something has to be mended first, Diverged where it did, runtime.Interrupted where it was stopped, or would have been
        started after that."""
        started = time.perf_counter()
        status, told = self._run(arguments, folder)
        if status in CRASHES and (folder / "last.pt").exists() and not (folder / "report.json").exists():
            runtime.tell(f"{folder}: ended with status {status}: {told[-300:]}: goes on from the state that was saved last\n".encode())
            status, told = self._run(arguments if arguments[0] == "--run.resume" else ["--run.resume", str(folder)], folder)
        if status == DIVERGED:
            raise Diverged(folder, told[-500:])
        if status == runtime.UserError.status:
            raise Refused(folder, told[-500:])
        if status:
            raise runtime.UserError(f"{folder.name.replace('-', ' ')}: the training ended with status {status}: "
                                    f"{told[-500:]}: what has ended is kept: {WAY_ON}")
        report.write_text(folder / "series.json", json.dumps({"seconds": time.perf_counter() - started, "jobs": jobs}) + "\n")

    def _run(self, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
        """The status with which the program ended, and what it said of it."""
        self._raise_if_stopped(folder)
        with subprocess.Popen([sys.executable, str(PROGRAM), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            self._at_work.add(process)
            if self._stopped:    # after the first line of this, before the last one
                self._ask_to_stop(process)
            _, told = process.communicate()
        self._at_work.discard(process)
        if process.returncode:
            stopped_by = process.returncode - 128 if process.returncode > 128 else -process.returncode
            if stopped_by in runtime.STOP_SIGNALS:    # perhaps it alone, or before we have heard of it: what would follow is not wanted either
                self._stopped = self._stopped or stopped_by
            self._raise_if_stopped(folder)
        return process.returncode, told.strip()

    def _raise_if_stopped(self, folder: Path) -> None:
        if self._stopped:
            raise runtime.Interrupted(f"interrupted in {folder}: {WAY_ON}", self._stopped)


class OneProgram:
    """Trains in this program, one training after the other, `count` at most: as `Trainings`, without a start of a program each."""

    def __init__(self, settings: config.Config, count: int):
        if settings.run.tune_allocator:
            runtime.tune_allocator(settings.run.device)    # before torch is loaded: it may start the program again
        self._count, self._begun = count, 0

    def run(self, arguments: Sequence[str], folder: Path) -> None:
        """As Trainings.run: raises UserError where it fails, for whatever reason, runtime.Interrupted where it was stopped; DeviceFailed,
        which is a UserError, where no other training can follow in this program."""
        from seresnet.loop import Program, fit
        settings, _ = config.parse(list(arguments), argparse.ArgumentParser())
        before, begun = self._begun, report.seconds_since_process_start() if self._begun else 0.0
        self._begun += 1
        failed = None
        try:
            fit(settings, sys.argv, Program(self._count, begun))
        except runtime.Interrupted as stopped:
            raise runtime.Interrupted(f"interrupted in {folder}: {WAY_ON}", stopped.status - 128) from stopped
        except OSError:    # a full disk, or nobody who reads: the program's, not the training's
            raise
        except Exception as error:    # also a defect, which ends this training alone
            told = "; ".join(getattr(error, "problems", (str(error),)))
            if not isinstance(error, (runtime.UserError, runtime.NonFiniteLoss)):
                traceback.print_exc()
                told = f"{type(error).__name__}: {told}"
            dead = isinstance(error, runtime.DeviceFailed) or not runtime.cuda_answers()
            kind = runtime.DeviceFailed if dead else runtime.UserError
            failed = (Diverged(folder, told) if isinstance(error, runtime.NonFiniteLoss) and not dead else
                      Refused(folder, told) if isinstance(error, runtime.UserError) and not dead else
                      kind(f"{folder.name.replace('-', ' ')}: {told}: what has ended is kept: {WAY_ON}"))
            traceback.clear_frames(error.__traceback__)    # which hold the session
        gc.collect()    # so do cycles: what its steps are recorded in, on a GPU its memory
        if failed:
            raise failed
        report.write_text(folder / "series.json", json.dumps({"seconds": report.seconds_since_process_start() - begun, "jobs": 1,
                                                              "before_in_program": before}) + "\n")


def run_seed(trainings: Trainings | OneProgram, settings: config.Config, seed: int, folder: Path) -> dict:
    """The report of the run of `seed` in `folder`: read where it has ended, gone on with where it was stopped, else started.

    Raises UserError where the folder holds a run of another config, or the program fails.
    """
    arguments = arguments_of(settings, seed, folder)
    if arguments:
        trainings.run(arguments, folder)
    return read_report(folder)


def arguments_of(settings: config.Config, seed: int, folder: Path) -> list[str]:
    """What ffcv_train.py has to be called with for the run of `seed` in `folder`: to start it, or to go on with it; nothing where it
    has ended. Raises UserError where the folder holds a run of another config."""
    if (folder / "config.yaml").exists():
        refuse_another(settings, seed, folder)
    if (folder / "report.json").exists():
        return []
    if (folder / "last.pt").exists():
        return ["--run.resume", str(folder), "--beton.train", settings.beton.train, "--beton.test", settings.beton.test]    # which may have moved
    if folder.exists():    # killed before its first checkpoint: nothing in it is worth keeping
        report.open_run_folder(folder).close()    # refuses where a training is at work there
        shutil.rmtree(folder)
    resolved = folder.with_name(f"{settings.recipe}.yaml")
    resolved.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(resolved, yaml.safe_dump(settings.as_dict(), sort_keys=False))
    return ["--config-file", str(resolved), "--run.seed", str(seed), "--run.folder", str(folder)]


def read_report(folder: Path) -> dict:
    """report.json of a run, with its `commit`, or all of them where it went on under others, and the program's wall-clock `seconds`, None
    where it ran in more than one piece, or beside others. `before_in_program`: how many trainings its program had done before, None
    where it had a program of its own."""
    outcome = report.read_report(folder)
    series, pieces = folder / "series.json", environments_of(folder)
    machine = pieces[-1]["machine"]
    processor = machine.get("gpu", "a GPU") if outcome["run_device"].startswith("cuda") else machine["processor"]
    noted = json.loads(series.read_text(encoding="utf-8")) if series.exists() else {}
    before, noted = noted.get("before_in_program"), {} if outcome["resumed"] else noted
    commits = THEN.join(dict.fromkeys(str(piece["commit"]) for piece in pieces))
    return {**outcome, "commit": commits, "machine": f"{processor} ({machine['cores']} cores)",
            "before_in_program": before, "seconds": noted.get("seconds") if noted.get("jobs", 1) == 1 else None}


def environments_of(folder: Path) -> list[dict]:
    """The `machine`, `versions` and `commit` of each piece that the run in `folder` was trained in; not of one that was killed while it
    wrote them down."""
    begun = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    pieces = [{**begun, **piece} for piece in ({}, *begun.get("resumed", []))]
    return [{name: piece[name] for name in ("machine", "versions", "commit")} for piece in pieces if "machine" in piece]


def of_several_commits(runs: Sequence[dict]) -> bool:
    """Whether what was trained differs in more than its seed: between the runs, or within one."""
    return len({run["commit"] for run in runs}) > 1 or any(THEN in run["commit"] for run in runs)


def paid_for_others(run: dict) -> bool:
    """Whether it began a program of several, and paid for its start. JSON of earlier days does not say how many came before."""
    return run.get("before_in_program") == 0


def timed(runs: Sequence[dict]) -> list[dict]:
    """Those of `runs` whose times are to be compared: all but those that paid for others, unless there are no others."""
    return [run for run in runs if not paid_for_others(run)] or list(runs)


def refuse_another(settings: config.Config, seed: int, folder: Path) -> None:
    """Raise UserError where the run in `folder` is not one of these settings and this seed, or of other images than now lie there."""
    wanted = dataclasses.replace(settings, run=dataclasses.replace(settings.run, seed=seed))
    try:
        found = [change for change in config.changes(config.read_file(str(folder / "config.yaml")), wanted) if _counts(*change)]
    except config.ConfigError as error:
        raise runtime.UserError(f"{folder}: is no whole run folder ({error}): remove it, or choose another --out") from error
    problems = [f"{folder}: {name}: {there} there, {here} here: choose another --out, or remove it" for name, there, here in found]
    problems += [f"{folder}: beton.{split}: {path} holds other images than this run had: choose another --out, or remove it"
                 for split, path in _other_images(settings, folder)]
    if problems:
        raise runtime.UserError(*problems)


def _counts(name: str, there: object, here: object) -> bool:
    """Whether runs that differ in this are not of one series: in all but where things lie, and how a run is reported."""
    return name not in ("run.folder", "run.resume") and name.partition(".")[0] not in ("sources", "beton", "report")


def _other_images(settings: config.Config, folder: Path) -> Iterator[tuple[str, str]]:
    """The splits, with their paths, whose beton has other bytes by its sidecar than the run in `folder` was trained or evaluated on. One
    that is gone, perhaps after a series has ended, tells nothing."""
    said = report.read_json(folder / "environment.json").get("data", {})
    for split in ("train", "test") if settings.evaluate.split == "test" else ("train",):
        path = getattr(settings.beton, split)
        found = beton.at(path)
        if found is not None and said.get(f"{split}_sha256", found.sha256) != found.sha256:
            yield split, path


def announce(folders: Sequence[Path], place: str) -> None:
    """Say how many trainings there are, which may take hours and print nothing, how many have ended before, and what tells of the others."""
    ended = sum((folder / "report.json").exists() for folder in folders)
    report.say(f"{len(folders)} trainings, of which {ended} have ended before; the epochs of the one at work: {place}/log.jsonl", aside=True)


def names_seed(argv: Sequence[str]) -> bool:
    """Whether a command line gives a seed, which a series would overrule; one in a config file is that of the run it was kept of."""
    return any(word.partition("=")[0] == "--run.seed" for word in argv)


def tables(runs: Sequence[dict], figures: dict, target: float | None) -> str:
    """Every run, then the figures over them, as Markdown."""
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"
    rows = [(str(run["seed"]), f"{run['accuracy']:.2%}", f"{run['accuracy_tta']:.2%}", seconds(run["train_seconds"]),
             seconds(run["eval_seconds"]), seconds(run["startup_seconds"]), seconds(run["seconds"])) for run in runs]
    lines = [report.table(("seed", "accuracy", "with TTA", "training, s", "evaluation, s", "start-up, s", "program, s"), rows), ""]
    lines.append(f"with TTA: mean {figures['mean']:.3%}, n = {figures['n']}, min {figures['min']:.2%}, max {figures['max']:.2%}")
    if figures["n"] > 1:
        lines[-1] += (f", standard deviation {figures['standard_deviation']:.3%}, 95% confidence interval of the mean "
                      f"{max(0.0, figures['interval_low']):.3%} to {min(1.0, figures['interval_high']):.3%}")
    if figures["probability_below_target"] is not None:
        lines.append(f"probability that the true mean is below {target:.2%}: {figures['probability_below_target']:.2g}")
    if of_several_commits(runs):
        lines.append("the runs are of several commits: " + ", ".join(f"seed {run['seed']} of {short(run['commit'])}" for run in runs))
    if any(run["before_in_program"] for run in runs):
        lines.append("several in one program, which pays for its start in the first, whose times the medians leave out: seed "
                     + ", ".join(str(run["seed"]) for run in runs if paid_for_others(run)))
    lines.append("on " + ", ".join(sorted({run["machine"] for run in runs})))
    medians = {part: statistics.median(run[part] for run in timed(runs)) for part in PARTS}
    lines.append("median seconds: " + ", ".join(f"{part.removesuffix('_seconds')} {value:.1f}" for part, value in medians.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs (default 5)")
    parser.add_argument("--first-seed", type=int, default=100, help="seed of the first; the others follow it (default 100)")
    parser.add_argument("--target", type=float, help="accuracy with TTA, a fraction such as 0.94, that is to be reached")
    parser.add_argument("--out", default="series", help="folder for the run folders and <recipe>.json (default series)")
    parser.add_argument("--one-program", action="store_true", help="train all in this program, which pays for its start once")
    settings, own = config.parse(sys.argv[1:], parser)
    problems = problems_with(own, seeds=1, first_seed=0)
    if own.target is not None and not 0 < own.target < 1:
        problems.append(f"--target: got {own.target}, expected a fraction such as 0.94")
    if settings.run.folder or settings.run.resume:
        problems.append("run.folder, run.resume: the series gives each run a folder of its own: leave them out")
    if names_seed(sys.argv[1:]):
        problems.append("--run.seed: the series counts seeds from --first-seed on: give that")
    if problems:
        raise runtime.UserError(*problems)

    def folder_of(seed: int) -> Path:
        return Path(own.out) / settings.recipe / f"seed-{seed}"
    seeds = range(own.first_seed, own.first_seed + own.seeds)
    runs, diverged = [], {}
    with nullcontext(OneProgram(settings, own.seeds)) if own.one_program else Trainings() as trainings:
        announce([*map(folder_of, seeds)], f"{own.out}/{settings.recipe}/seed-*")
        for seed in seeds:
            try:
                run = run_seed(trainings, settings, seed, folder_of(seed))
            except Diverged as error:
                diverged[seed] = error.with_traceback(None)
                report.say(str(error), aside=True)
                continue
            runs.append(run)
            print(f"seed {seed}: {run['accuracy_tta']:.2%} in {run['train_seconds']:.1f} s of training and "
                  f"{run['eval_seconds']:.1f} s of evaluation", flush=True)
    if not runs:
        raise next(iter(diverged.values()))
    figures = accuracy_figures([run["accuracy_tta"] for run in runs], own.target)
    print("\n" + tables(runs, figures, own.target))
    names = ("seed", "accuracy", "accuracy_tta", *PARTS, "seconds", "before_in_program", "images_per_second", "resumed", "commit", "machine")
    keep(own.out, settings.recipe, settings.recipe, {
        "target": own.target, "set": runs[-1].get("data", {}).get("set", ""), "split": settings.evaluate.split,
        "tta": settings.evaluate.tta, "figures": figures,
        "median_seconds": {part: statistics.median(run[part] for run in timed(runs)) for part in PARTS},
        "runs": [{name: run[name] for name in names} for run in runs], "diverged": list(diverged), "config": settings.as_dict(),
        **environments_of(folder_of(runs[-1]["seed"]))[-1]})
    if diverged:
        raise runtime.UserError(f"{len(diverged)} of {len(diverged) + len(runs)} seeds diverged, {', '.join(map(str, diverged))}: the figures are of "
                                "the rest, and flattered")


if __name__ == "__main__":
    runtime.run_program(main)

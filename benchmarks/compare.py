"""Variants of a recipe beside it, on a holdout: python -m benchmarks.compare --config-file rn_configs/se94.yaml --variant "--model.se none"

The recipe as it is and with the options of each --variant are trained with the same seeds, so that differences are paired: what a
seed's first weights and order of the images are worth cancels in part. They are judged on a holdout of the training images, so that the
test set stays fresh for the one that is chosen; --on-test is for an ablation, by which nothing is chosen. Each run is a program of
its own in OUT/<recipe>/<variant>/seed-N. Called again, the comparison goes on where it was interrupted; more seeds or variants may be asked for then.
Several --jobs at a time fill a GPU; the table then leaves out their seconds, which are none to compare. With --one-program this program trains
them all, one after the other, and pays for its start once, which on a GPU takes longer than a short training.
"""
from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks import keep, problems_with, short
from benchmarks.time_to_accuracy import (OneProgram, Refused, Trainings, accuracy_figures, announce, arguments_of, environments_of,
                                         names_seed, of_several_commits, paid_for_others, read_report)
from seresnet import config, report, runtime

AS_IT_IS = "as it is"
UNLIKE = "seconds of training are not to be compared where runs were "
NAME_LENGTH = 150
COMPARED = ("augment", "model", "loss", "optim", "loop", "loader", "run", "evaluate")    # sections that a training depends on
OF_THE_PROGRAM = {"run.threads", "run.tune_allocator", "run.compile", "run.device"}
VIEWS = {"evaluate.tta", "evaluate.tta_sure"}


def arguments() -> argparse.ArgumentParser:
    """The benchmark's own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", action="append", default=[], metavar='"OPTIONS"',
                        help='options on top of the recipe\'s, such as "--optim.lr 0.1 --loop.epochs 12"; may be given again; '
                             'without a space: --variant=--optim.lr=0.1')
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--first-seed", type=int, default=10, help="seed of the first; the others follow it (default 10)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    parser.add_argument("--one-program", action="store_true", help="train all in this program, which pays for its start once")
    parser.add_argument("--on-test", action="store_true", help="judge on the test split, when nothing is chosen by it")
    parser.add_argument("--out", default="comparison", help="folder for the run folders and <recipe>.json (default comparison)")
    return parser


def settings_of(argv: Sequence[str]) -> tuple[dict[str, config.Config], argparse.Namespace]:
    """The config of the recipe as it is and of every variant, by name, and the benchmark's own arguments. Raises UserError with every
    problem."""
    split = ["--evaluate.split", "test" if "--on-test" in argv else "holdout"]
    base, own = config.parse([*argv, *split], arguments())
    problems = problems_with(own, seeds=1, first_seed=0, jobs=1)
    if own.one_program and own.jobs > 1:
        problems.append(f"--jobs: got {own.jobs} with --one-program, which trains one after the other: leave one of them out")
    if base.run.folder or base.run.resume:
        problems.append("run.folder, run.resume: the comparison gives each run a folder of its own: leave them out")
    if names_seed(argv):
        problems.append("--run.seed: the comparison counts seeds from --first-seed on: give that")
    if any(word.partition("=")[0] == "--evaluate.split" for word in argv):
        problems.append("--evaluate.split: a holdout, or the test split with --on-test: leave it out")
    if not own.variant:
        problems.append('--variant: there is nothing to compare with: give one, such as --variant "--optim.lr 0.1"')
    found = {AS_IT_IS: base}
    for variant in own.variant:
        try:
            words = shlex.split(variant)
            if {"-C", "--config-file"} & {word.partition("=")[0] for word in words}:
                raise ValueError("a recipe on top of another is neither: compare each with variants of its own")
            settings, theirs = config.parse([*argv, *split, *words], arguments())
        except ValueError as error:    # a ConfigError among them, or a quotation without an end
            problems += [f"--variant {variant!r}: {line}" for line in getattr(error, "problems", [error])]
            continue
        differing = {name for name, *_ in config.changes(base.as_dict(), settings)}
        if theirs != own or differing & {"run.seed", "run.folder", "run.resume"}:
            problems.append(f"--variant {variant!r}: says how to compare, and not what: give that once, for all of them")
        elif any(name.startswith("evaluate.") and name not in VIEWS for name in differing):
            problems.append(f"--variant {variant!r}: changes how all are judged: of evaluate, only tta and tta_sure may differ")
        elif own.one_program and differing & OF_THE_PROGRAM:
            problems.append(f"--variant {variant!r}: changes what is settled once in a program: leave --one-program out")
        elif any(name.partition(".")[0] not in COMPARED for name in differing):
            problems.append(f"--variant {variant!r}: says nothing of the training, or where the images lie: only {', '.join(COMPARED)} may differ")
        elif not differing:
            problems.append(f"--variant {variant!r}: is the recipe as it is: leave it out")
        elif folder_name(variant) in map(folder_name, found):
            problems.append(f"--variant {variant!r}: is given twice, or in its first {NAME_LENGTH} characters as another is")
        found[" ".join(variant.split())] = settings
    if problems:
        raise runtime.UserError(*problems)
    return found, own


def folder_name(variant: str) -> str:
    """What the folder of a variant's runs is called."""
    return re.sub(r"[^\w.,+-]+", "_", variant.replace("--", "")).strip("_")[:NAME_LENGTH]


def run_all(todo: Sequence[tuple[list[str], Path]], jobs: int) -> list[str]:
    """Train what is to do, `jobs` at a time, in its order; returns what failed, a line each. One that fails leaves the others alone;
    a signal to stop reaches them all, and they are waited for."""
    failed: list[str] = []
    refused: list[Refused] = []
    jobs = max(1, min(jobs, len(todo)))

    def train(arguments: list[str], folder: Path) -> None:
        if refused:    # in a thread of the pool, which takes the next one before anybody hears of the last
            raise refused[0]
        try:
            trainings.run(arguments, folder, jobs)
        except Refused as error:
            if ends_all(folder, error):
                refused.append(error)
            raise
    with Trainings() as trainings, ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(train, arguments, folder): folder for arguments, folder in todo}
        try:
            for future in as_completed(running):
                tell(running[future], future.exception(), failed)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)    # those that have not begun; the others are waited for
    return failed


def run_here(todo: Sequence[tuple[list[str], Path]], trainings: OneProgram) -> list[str]:
    """As `run_all`, one after the other in this program. Where the device fails, no other is begun."""
    failed: list[str] = []
    for arguments, folder in todo:
        error = None
        try:
            trainings.run(arguments, folder)
        except runtime.UserError as raised:
            error = raised.with_traceback(None)
        tell(folder, error, failed)
        if isinstance(error, runtime.DeviceFailed):
            failed[-1] += "; the trainings behind it were not begun" if folder != todo[-1][1] else ""
            break
    return failed


def ends_all(folder: Path, error: BaseException) -> bool:
    """Whether the recipe as it is was refused, before it had a folder: so would its variants be, and without it there is nothing to compare
    them with. A training that had begun was alone in what it met, such as other programs' want of memory."""
    return isinstance(error, Refused) and folder.parent.name == folder_name(AS_IT_IS) and not folder.exists()


def tell(folder: Path, error: BaseException | None, failed: list[str]) -> None:
    """Print what a training has reached, or note that it failed. Raises what is no failure of a training, or of all."""
    if error is None:
        outcome = read_report(folder)
        seconds = f" in {outcome['train_seconds']:.1f} s of training" if outcome["seconds"] is not None else ""
        print(f"{folder.parent.name}, seed {outcome['seed']}: {outcome['accuracy_tta']:.2%}{seconds}", flush=True)
    elif isinstance(error, runtime.UserError) and not ends_all(folder, error):
        failed.append(f"{folder.parent.name}, {error}")
    else:
        raise error


def row(runs: Mapping[int, dict], base: Mapping[int, dict]) -> dict:
    """Figures of one variant's runs and of their differences to those of the recipe as it is with the same seeds; {seed: run}.

    `probability_of_no_gain`: that the true mean of the differences is at most 0, by Student's t, of the seeds' luck alone (all look
    at the same images); 1 where all are 0, None for fewer than two pairs. `train_seconds` is None where a run was not alone, or was
    interrupted, or where the only one paid for the start of a program of several, which others are free of.
    """
    shared, timed = [seed for seed in runs if seed in base], [run for run in runs.values() if not paid_for_others(run)]
    pairs = [runs[seed]["accuracy_tta"] - base[seed]["accuracy_tta"] for seed in shared]
    differences = accuracy_figures(pairs, 0.0) if pairs and runs is not base else None
    no_gain = differences["probability_below_target"] if differences else None
    if differences and not any(pairs) and len(pairs) > 1:    # nothing deviates: Student's t is silent
        no_gain = 1.0
    return {"with_tta": accuracy_figures([run["accuracy_tta"] for run in runs.values()], None),
            "plain": statistics.fmean(run["accuracy"] for run in runs.values()),
            "last_training_accuracy": statistics.fmean(run["last_training_accuracy"] for run in runs.values()),
            "train_seconds": (statistics.median(run["train_seconds"] for run in timed)
                              if timed and all(run["seconds"] is not None for run in runs.values()) else None),
            "difference": differences, "probability_of_no_gain": no_gain}


def table(rows: Mapping[str, dict]) -> str:
    """The rows as Markdown, accuracies in percent, differences in points."""
    def cells(name: str, found: dict) -> tuple[str, ...]:
        difference = found["difference"]
        interval = "-"
        if difference and difference["n"] > 1:
            interval = f"{difference['interval_low'] * 100:+.2f} to {difference['interval_high'] * 100:+.2f}"
        return (name, str(found["with_tta"]["n"]), f"{found['with_tta']['mean']:.2%}", f"{found['plain']:.2%}",
                f"{found['last_training_accuracy']:.1%}", f"{difference['mean'] * 100:+.2f}" if difference else "-", interval,
                "-" if found["probability_of_no_gain"] is None else f"{found['probability_of_no_gain']:.2g}",
                "-" if found["train_seconds"] is None else f"{found['train_seconds']:.1f}")
    return report.table(("variant", "n", "with TTA", "plain", "training", "points more", "95% interval", "probability of no gain",
                         "training, s"), [cells(name, found) for name, found in rows.items()])


def explained(variants: Mapping[str, config.Config], own: argparse.Namespace, runs: Sequence[dict], failed: int) -> str:
    """What has to be known to read the table."""
    views = {"no TTA" if settings.evaluate.tta == "none" else f"{settings.evaluate.tta} views" for settings in variants.values()}
    lines = [f"{runs[0]['evaluated']} {'test' if own.on_test else 'holdout'} images, {', '.join(sorted(views))}; seeds "
             f"{own.first_seed} to {own.first_seed + own.seeds - 1}",
             "intervals and probabilities: the luck of the seeds alone, on these images, each variant by itself"]
    if failed:
        lines.append(f"{failed} runs failed: their rows are of the rest, and flattered where it is the seed that decides")
    if of_several_commits(runs):
        lines.append("the runs are of several commits: " + ", ".join(sorted({short(run["commit"]) for run in runs})))
    if len(machines := sorted({run["machine"] for run in runs})) > 1:
        lines.append(f"{UNLIKE}on several machines: {', '.join(machines)}")
    if len({run["before_in_program"] is None for run in runs}) > 1:
        lines.append(f"{UNLIKE}in programs of their own, and in one that was warm (--one-program)")
    lines.append("nothing may be chosen by this: the test set has been looked at" if own.on_test else
                 f"the best of {len(variants)} is flattered by being chosen: measure it again, on fresh seeds, on the test set once "
                 "(benchmarks.time_to_accuracy)")
    return "\n".join(lines)


def main() -> None:
    variants, own = settings_of(sys.argv[1:])
    recipe = variants[AS_IT_IS].recipe
    places = {(name, seed): Path(own.out) / recipe / folder_name(name) / f"seed-{seed}"
              for seed in range(own.first_seed, own.first_seed + own.seeds) for name in variants}
    prepared = [(arguments_of(variants[name], seed, folder), folder) for (name, seed), folder in places.items()]
    todo = [(arguments, folder) for arguments, folder in prepared if arguments]
    together = OneProgram(variants[AS_IT_IS], len(places)) if own.one_program else None    # which may start this program again
    announce([*places.values()], f"{own.out}/{recipe}/*/seed-*")
    failed = run_here(todo, together) if together else run_all(todo, own.jobs)
    runs: dict[str, dict[int, dict]] = {name: {} for name in variants}
    ended = [folder for folder in places.values() if (folder / "report.json").exists()]
    for (name, seed), folder in places.items():
        if folder in ended:
            last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            runs[name][seed] = {**read_report(folder), "last_training_accuracy": last["train_accuracy"]}
    rows = {name: row(found, runs[AS_IT_IS]) for name, found in runs.items() if found}
    if rows:
        every = [run for found in runs.values() for run in found.values()]
        print(f"\n{table(rows)}\n{explained(variants, own, every, len(failed))}")
        names = ("seed", "accuracy", "accuracy_tta", "last_training_accuracy", "train_seconds", "eval_seconds", "seconds", "before_in_program",
                 "resumed", "commit", "machine")
        keep(own.out, recipe, recipe, {
            "split": "test" if own.on_test else "holdout", "evaluated": every[0]["evaluated"], "jobs": own.jobs, "failed": failed, "rows": rows,
            "runs": {name: [{key: run[key] for key in names} for run in found.values()] for name, found in runs.items()},
            "config": variants[AS_IT_IS].as_dict(), **environments_of(ended[-1])[-1]})
    if failed:
        raise runtime.UserError(*failed)


if __name__ == "__main__":
    runtime.run_program(main)

"""Trainings of rn_configs/se94.yaml, as it is, judged on the test set, in records/; of a seed that was trained again, the mean:
python records/2026-11-28_beside_airbench/pooled.py"""
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.time_to_accuracy import accuracy_figures
from seresnet import config

RECORDS = Path(__file__).parents[1]
TRAINED_BY = {"augment", "model", "loss", "optim", "loop", "loader.batch_size", "loader.drop_last", "evaluate.tta", "evaluate.tta_sure", "evaluate.split"}
IN_WORDS = {    # what their READMEs say, and no file
    "2026-11-25_se96": {402: 0.9369, 403: 0.9420, 404: 0.9410, 405: 0.9410}, "2026-11-26_gpu": {704: 0.9404},
    "2026-11-27_se_best, alone": {741: 0.9399}}


def found_in_files() -> Iterator[tuple[str, dict[int, float]]]:
    """Where, and {seed: accuracy with TTA}."""
    recipe = config.build(config.read_file(str(RECORDS.parent / "rn_configs/se94.yaml")))
    for path in sorted(RECORDS.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = content.get("runs") if isinstance(content, dict) else None
        if not isinstance(runs, list):
            continue
        if content.get("recipe") == "se94" and "config" in content:    # a series of benchmarks.time_to_accuracy
            changes = config.changes(content["config"], recipe)
            runs = [] if any({name, name.partition(".")[0]} & TRAINED_BY for name, *_ in changes) else runs
        else:    # of several recipes, with the options that each was given
            runs = [run for run in runs if (run.get("recipe"), run.get("split"), run.get("flags")) == (
                "se94", "test", f"--run.seed {run.get('seed')} --loop.epochs 16")]
        if runs:
            yield str(path.relative_to(RECORDS)), {run["seed"]: run["accuracy_tta"] for run in runs}


def main() -> None:
    of_seeds: dict[int, list[float]] = {}
    for place, found in (*found_in_files(), *IN_WORDS.items()):
        print(f"{place}: " + ", ".join(f"seed {seed} {accuracy:.2%}" for seed, accuracy in found.items()))
        for seed, accuracy in found.items():
            of_seeds.setdefault(seed, []).append(accuracy)
    figures = accuracy_figures([statistics.fmean(found) for found in of_seeds.values()], 0.94)
    print(f"{sum(map(len, of_seeds.values()))} trainings, {figures['n']} seeds: mean {figures['mean']:.3%}, standard deviation "
          f"{figures['standard_deviation']:.3%}, 95% confidence interval of the mean {figures['interval_low']:.3%} to {figures['interval_high']:.3%}; "
          f"probability that the true mean is below 94%: {figures['probability_below_target']:.2g}")


if __name__ == "__main__":
    main()

"""All trainings of rn_configs/se94.yaml, as it is, that are kept in records/ as series: python records/2026-11-28_beside_airbench/pooled.py"""
import json
from pathlib import Path

from benchmarks.time_to_accuracy import accuracy_figures
from seresnet import config

ROOT = Path(__file__).parents[2]
TRAINED_BY = {"augment", "model", "loss", "optim", "loop", "loader.batch_size", "loader.drop_last", "evaluate.tta", "evaluate.tta_sure", "evaluate.split"}


def main() -> None:
    recipe = config.build(config.read_file(str(ROOT / "rn_configs/se94.yaml")))
    accuracies = []
    for path in sorted(ROOT.glob("records/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("recipe") != "se94" or not isinstance(content.get("runs"), list) or "config" not in content:
            continue
        if any({name, name.partition(".")[0]} & TRAINED_BY for name, *_ in config.changes(content["config"], recipe)):
            continue
        found = {run["seed"]: run["accuracy_tta"] for run in content["runs"]}
        print(f"{path.relative_to(ROOT)}: " + ", ".join(f"seed {seed} {accuracy:.2%}" for seed, accuracy in found.items()))
        accuracies += found.values()
    figures = accuracy_figures(accuracies, 0.94)
    print(f"mean {figures['mean']:.3%}, n = {figures['n']}, standard deviation {figures['standard_deviation']:.3%}, 95% confidence interval of the mean "
          f"{figures['interval_low']:.3%} to {figures['interval_high']:.3%}; probability that the true mean is below 94%: "
          f"{figures['probability_below_target']:.2g}")


if __name__ == "__main__":
    main()

"""Benchmarks: the figures they make of what they measured. That they run is tested end to end."""
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from benchmarks import compare, ddp, epochs, frontier, large, launches, loader, scaling, soak, time_to_accuracy
from seresnet import config, report, runtime
from seresnet.beton import open_beton, write_beton

ROOT = Path(__file__).parents[1]


def test_accuracy_figures_are_students():
    values = [0.938, 0.941, 0.940, 0.943, 0.939]
    found = time_to_accuracy.accuracy_figures(values, 0.94)
    # worked by hand: mean 0.9402, deviation sqrt(3.7e-6), t(0.975, 4) = 2.776445, t = -0.2 / sqrt(0.74) = -0.232495
    assert found["mean"] == pytest.approx(0.9402) and found["standard_deviation"] == pytest.approx(math.sqrt(3.7e-6))
    half = 2.776445 * math.sqrt(3.7e-6 / 5)
    assert found["interval_low"] == pytest.approx(0.9402 - half, abs=1e-8)
    assert found["interval_high"] == pytest.approx(0.9402 + half, abs=1e-8)
    # Student's distribution of 4 degrees of freedom in closed form
    t = (0.94 - 0.9402) / math.sqrt(3.7e-6 / 5)
    below = 0.5 + 0.375 * t * (4 / (4 + t * t))**0.5 * (1 - t * t / (4 + t * t) / 3)
    assert found["probability_below_target"] == pytest.approx(below, abs=1e-6)
    assert found["min"] == 0.938 and found["n"] == 5


def test_what_few_values_cannot_tell_is_left_open():
    assert time_to_accuracy.accuracy_figures([0.94], 0.95)["probability_below_target"] is None
    assert time_to_accuracy.accuracy_figures([0.94, 0.94], 0.95)["probability_below_target"] == 1
    assert time_to_accuracy.accuracy_figures([0.94, 0.94], None)["probability_below_target"] is None


@pytest.fixture(scope="module")
def series(run, tmp_path_factory):
    """Arguments of a series on the three colours; its folder."""
    folder = tmp_path_factory.mktemp("series")
    settings = yaml.safe_load((run[0] / "config.yaml").read_text())
    settings["run"]["folder"], settings["loop"]["epochs"] = "", 1
    (folder / "colours.yaml").write_text(yaml.safe_dump(settings))
    return ["time_to_accuracy", "--config-file", str(folder / "colours.yaml"), "--out", str(folder / "out"), "--seeds", "2",
            "--target", "0.2"], folder / "out"


def test_a_series_runs_tells_and_goes_on_where_it_was(series, monkeypatch, capsys):
    arguments, out = series
    monkeypatch.setattr(sys, "argv", arguments[:-4] + ["--seeds", "1"])
    time_to_accuracy.main()
    first = (out / "colours/seed-100/report.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", arguments)
    time_to_accuracy.main()
    assert (out / "colours/seed-100/report.json").stat().st_mtime_ns == first, "a finished run was run again"
    record = json.loads((out / "colours.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [100, 101] and record["figures"]["n"] == 2
    assert all(run["seconds"] > run["train_seconds"] for run in record["runs"])
    assert json.loads((out / "colours/seed-101/report.json").read_text())["recipe"] == "colours"
    output = capsys.readouterr().out
    assert "probability that the true mean is below 20.00%" in output and "| 101 " in output
    machine = runtime.describe_machine()
    assert f"on {machine.get('gpu', machine['processor'])} ({machine['cores']} cores)\n" in output, "one machine, named once"


def test_a_series_in_one_program_trains_the_same_nets(series, monkeypatch, capsys):
    arguments, out = series
    monkeypatch.setattr(sys, "argv", arguments)
    time_to_accuracy.main()    # of programs of their own, where the test above has not done so
    monkeypatch.setattr(sys, "argv", [*(f"{out}-together" if word == str(out) else word for word in arguments), "--one-program",
                                      "--run.tune_allocator", "false"])
    monkeypatch.setattr(time_to_accuracy.Trainings, "run", lambda *_: pytest.fail("a program of its own"))
    time_to_accuracy.main()
    apart, together = (json.loads((folder / "colours.json").read_text())["runs"] for folder in (out, Path(f"{out}-together")))
    for one, other in zip(apart, together):
        assert one["accuracy_tta"] == other["accuracy_tta"] and one["before_in_program"] is None
        nets = [torch.load(folder / f"colours/seed-{one['seed']}/weights.pt")["model"] for folder in (out, Path(f"{out}-together"))]
        assert nets[0].keys() == nets[1].keys() and all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())
    assert [run["before_in_program"] for run in together] == [0, 1]
    assert together[1]["total_seconds"] <= together[1]["seconds"] < together[0]["seconds"], "the second did not begin with the program"
    assert "pays for its start in the first, whose times the medians leave out: seed 100\n" in capsys.readouterr().out


def test_a_training_that_fails_in_one_program_says_how_the_series_goes_on(series, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [*(str(tmp_path) if word == str(series[1]) else word for word in series[0]), "--one-program",
                                      "--run.tune_allocator", "false", "--optim.lr", "1e30"])
    with pytest.raises(runtime.UserError, match="^seed 100: .* is not finite in epoch 1.*: what has ended is kept; it would diverge again"):
        time_to_accuracy.main()


def test_a_seed_that_diverges_leaves_the_others_in_the_series(series, monkeypatch, capsys):
    """Its figures are told to be without it; called again, it is not another series."""
    arguments, out = series
    monkeypatch.setattr(sys, "argv", arguments)
    time_to_accuracy.main()    # where no test above has done so
    before, run_seed = json.loads((out / "colours.json").read_text()), time_to_accuracy.run_seed

    def diverges(trainings, settings, seed, folder):
        if seed == 101:
            raise time_to_accuracy.Diverged(folder, "the loss is not finite")
        return run_seed(trainings, settings, seed, folder)
    monkeypatch.setattr(time_to_accuracy, "run_seed", diverges)
    capsys.readouterr()
    with pytest.raises(runtime.UserError, match="^1 of 2 seeds diverged, 101: the figures are of the rest, and flattered"):
        time_to_accuracy.main()
    told, record = capsys.readouterr(), json.loads((out / "colours.json").read_text())
    assert "seed 101: the loss is not finite: what has ended is kept" in told.err and "n = 1" in told.out
    assert record["diverged"] == [101] and [run["seed"] for run in record["runs"]] == [100]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", arguments)
    time_to_accuracy.main()
    assert json.loads((out / "colours.json").read_text())["runs"] == before["runs"]


def test_what_is_kept_of_a_series_is_of_its_trainings(series, monkeypatch, tmp_path, capsys):
    """Read again elsewhere and later: machine, versions and commit are those that they were trained by, each piece of them."""
    arguments, out = series
    monkeypatch.setattr(sys, "argv", arguments)
    time_to_accuracy.main()    # where no test above has done so
    shutil.copytree(out, tmp_path / "moved")
    for seed, resumed in ((100, []), (101, [{"commit": "b" * 40 + "+changes", "machine": {"processor": "another", "cores": 99}, "versions": {"torch": "9"}}])):
        file = tmp_path / f"moved/colours/seed-{seed}/environment.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "commit": "b" * 40, "resumed": resumed}))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "moved") if word == str(out) else word for word in arguments])
    capsys.readouterr()
    time_to_accuracy.main()
    record, said = json.loads((tmp_path / "moved/colours.json").read_text()), capsys.readouterr().out
    assert record["machine"] == {"processor": "another", "cores": 99} and record["versions"] == {"torch": "9"}
    assert [run["commit"] for run in record["runs"]] == ["b" * 40, "b" * 40 + " then " + "b" * 40 + "+changes"]
    assert f"seed 100 of {'b' * 12}, seed 101 of {'b' * 12} then {'b' * 12}+changes\n" in said


def test_a_run_goes_on_with_the_data_where_they_are_now(tmp_path):
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3/last.pt").touch()
    settings = config.build({"beton.train": "there/train.beton", "beton.test": "there/test.beton"})
    assert time_to_accuracy.arguments_of(settings, 3, tmp_path / "seed-3") == [
        "--run.resume", str(tmp_path / "seed-3"), "--beton.train", "there/train.beton", "--beton.test", "there/test.beton"]


def test_a_series_in_one_program_that_is_stopped_says_how_it_goes_on(series, monkeypatch, tmp_path):
    def stopped(settings, command, program):
        raise runtime.Interrupted("stopped in epoch 1: go on with --run.resume x", signal.SIGTERM)
    monkeypatch.setattr("seresnet.loop.fit", stopped)
    monkeypatch.setattr(sys, "argv", [*(str(tmp_path) if word == str(series[1]) else word for word in series[0]), "--one-program",
                                      "--run.tune_allocator", "false"])
    with pytest.raises(runtime.Interrupted, match="seed-100: start this again, it goes on where it was") as caught:
        time_to_accuracy.main()
    assert caught.value.status == 128 + signal.SIGTERM


def test_runs_of_another_config_are_not_mixed_in(series, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*series[0], "--optim.lr", "0.2"])
    with pytest.raises(runtime.UserError, match="optim.lr: 0.1 there, 0.2 here"):
        time_to_accuracy.main()


def test_a_series_whose_recipe_leaves_classes_to_the_data_goes_on(series, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*series[0], "--model.classes", "0", "--model.image_size", "0"])
    time_to_accuracy.main()
    monkeypatch.setattr(sys, "argv", [*series[0], "--model.classes", "4"])
    with pytest.raises(runtime.UserError, match="model.classes: 3 there, 4 here"):
        time_to_accuracy.main()


def test_more_epochs_than_the_recipe_has_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["epochs", "--loop.epochs", "2"])
    with pytest.raises(runtime.UserError, match="--epochs: got 3, expected 1 to loop.epochs = 2"):
        epochs.main()


def test_the_arithmetic_of_second_passes_is_counted():
    def flop(**changes):
        settings = config.build({"model.classes": 10, "model.image_size": 32, "loop.epochs": 4, **changes})
        return frontier.flop_of_training({"config": settings.as_dict(), "runs": [{"images_per_second": 100.0, "train_seconds": 10.0}]})
    whole = flop()
    assert flop(**{"optim.sam_radius": 0.1}) == pytest.approx(2 * whole)
    assert flop(**{"optim.sam_radius": 0.1, "optim.sam_from": 0.75, "optim.sam_share": 0.5}) == pytest.approx(whole * (1 + 0.25 * 0.5))
    sides = {"augment.sides": [16, 32]}    # the second passes are of whole images alone
    assert flop(**sides, **{"optim.sam_radius": 0.1, "optim.sam_from": 0.5}) == pytest.approx(flop(**sides) + whole / 2)


@pytest.mark.parametrize("program, arguments, message", [
    (large, ("--gib", "-1"), "--gib: got -1.0, expected more than 0"), (large, ("--steps", "0"), "--steps: got 0, expected 1 and more"),
    (large, ("--batches", "3"), "--batches: got 3, expected 4 and more"),
    (scaling, ("--axis", "batch,side", "--most", "33"), "--most: got 33, which leaves no cell of batch")])
def test_nothing_to_measure_is_refused(monkeypatch, program, arguments, message):
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(runtime.UserError, match=f"^{message}"):
        program.main()


def test_scaling_without_ffcv_says_so_before_it_measures(monkeypatch):
    monkeypatch.setattr(runtime, "has_ffcv", lambda: False)
    monkeypatch.setattr(sys, "argv", ["scaling"])
    with pytest.raises(runtime.UserError, match="^--axis: images are streamed, by FFCV, which is not installed: .* --axis batch,side,cores$"):
        scaling.main()


def test_keys_that_a_benchmark_would_drop_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["large", "--loader.workers", "2", "--run.threads", "1"])
    with pytest.raises(runtime.UserError, match="^loader.workers: this benchmark has a net and a set of its own"):
        large.main()


def test_mistakes_are_named(series, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy", "--seeds", "0", "--target", "94", "--run.folder", "x", "--run.seed=1"])
    with pytest.raises(runtime.UserError) as caught:
        time_to_accuracy.main()
    assert len(caught.value.problems) == 4


def test_differences_are_of_pairs():
    def run(accuracy):
        return {"accuracy_tta": accuracy, "accuracy": accuracy - 0.01, "last_training_accuracy": 0.9, "train_seconds": 3.0, "seconds": alone}
    alone = 5.0
    base = {10: run(0.90), 11: run(0.92), 12: run(0.91)}
    found = compare.row({10: run(0.91), 11: run(0.93), 12: run(0.925), 13: run(0.503)}, base)    # seed 13 has nothing to be compared with
    # worked by hand: differences 1, 1, 1.5 points, mean 7/6, deviation sqrt(1/12), t = 7/6 / sqrt(1/36) = 7; t(0.975, 2) = 4.302653
    difference = found["difference"]
    assert found["with_tta"]["n"] == 4 and difference["n"] == 3 and difference["mean"] == pytest.approx(7 / 600)
    assert difference["interval_high"] - difference["mean"] == pytest.approx(4.302653 / 600, abs=1e-8)
    # Student's distribution of 2 degrees of freedom in closed form
    assert found["probability_of_no_gain"] == pytest.approx(0.5 - 7 / (2 * math.sqrt(2 + 49)), abs=1e-9)
    alone = None
    crowded = compare.row({10: run(0.89)}, base)
    assert crowded["difference"]["mean"] == pytest.approx(-0.01) and crowded["probability_of_no_gain"] is None
    assert compare.row(base, base)["difference"] is None
    assert compare.row(dict(base), base)["probability_of_no_gain"] == 1, "the same results are no gain"
    lines = compare.table({"as it is": compare.row(base, base), "more": found, "less": crowded}).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[2:9]] == ["4", "81.70%", "80.70%", "90.0%", "+1.17", "+0.45 to +1.88", "0.0099"]
    assert [cell.strip() for cell in lines[4].split("|")[6:10]] == ["-1.00", "-", "-", "-"] and "| 3.0 |" in re.sub(" +", " ", lines[3])


@pytest.fixture(scope="module")
def comparison(series):
    """Arguments of a comparison on the three colours; its folder."""
    return ["compare", "--config-file", series[0][2], "--evaluate.holdout_size", "6", "--out", str(series[1].parent / "compared"),
            "--variant", "--optim.lr 0.05"], series[1].parent / "compared"


def test_variants_are_trained_with_the_same_seeds_on_a_holdout(comparison, monkeypatch, capsys):
    arguments, out = comparison
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "1"])
    compare.main()
    first = (out / "colours/as_it_is/seed-10/report.json").stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "2", "--jobs", "2", "--variant", "--optim.name  adamw --optim.lr 0.01"])
    compare.main()
    assert (out / "colours/as_it_is/seed-10/report.json").stat().st_mtime_ns == first, "a finished run was run again"
    record = json.loads((out / "colours.json").read_text())
    assert {name: [run["seed"] for run in runs] for name, runs in record["runs"].items()} == {
        "as it is": [10, 11], "--optim.lr 0.05": [10, 11], "--optim.name adamw --optim.lr 0.01": [10, 11]}
    assert record["split"] == "holdout" and record["evaluated"] == 6
    stored = yaml.safe_load((out / "colours/optim.name_adamw_optim.lr_0.01/seed-11/config.yaml").read_text())
    assert stored["optim"]["name"] == "adamw" and stored["evaluate"]["split"] == "holdout" and stored["run"]["seed"] == 11
    output = capsys.readouterr().out
    assert len(re.findall(r"seed 1[01]: [0-9.]+%\n", output)) == 6 - 2, output    # two of six were there already
    assert "| as it is " in output and "the best of 3 is flattered by being chosen" in output
    of = {name: {run["seed"]: run["seconds"] for run in runs} for name, runs in record["runs"].items()}
    assert of["as it is"][10] > 0 and of["as it is"][11] is None, "seconds of a training beside another are kept as if it had been alone"


def test_a_variant_that_fails_leaves_the_others_alone(comparison, monkeypatch, capsys):
    arguments, out = comparison
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "1", "--variant", "--optim.lr 1e30"])
    with pytest.raises(runtime.UserError, match="optim.lr_1e30, seed 10: .*not finite.*it would diverge again"):
        compare.main()
    output = capsys.readouterr().out
    assert "| --optim.lr 0.05 " in output and "1 runs failed: their rows are of the rest" in output


def test_variants_may_be_trained_in_one_program(comparison, monkeypatch, capsys):
    """One of them fails; the others are what programs of their own make them."""
    arguments, out = comparison
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "1"])
    compare.main()    # where no test above has done so
    apart = {name: runs[0] for name, runs in json.loads((out / "colours.json").read_text())["runs"].items()}
    monkeypatch.setattr(time_to_accuracy.Trainings, "run", lambda *_: pytest.fail("a program of its own"))
    monkeypatch.setattr(sys, "argv", [*(f"{out}-together" if word == str(out) else word for word in arguments), "--seeds", "1", "--one-program",
                                      "--variant", "--optim.lr 1e30", "--run.tune_allocator", "false"])
    with pytest.raises(runtime.UserError, match="optim.lr_1e30, seed 10: .*epoch 1.*what has ended is kept"):
        compare.main()
    together = {name: runs[0] for name, runs in json.loads(Path(f"{out}-together/colours.json").read_text())["runs"].items() if runs}
    assert len(together) == 2 and {name: run["accuracy"] for name, run in together.items()} == {name: apart[name]["accuracy"] for name in together}
    assert all(run["seconds"] > 0 for run in together.values()) and "1 runs failed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--one-program", "--jobs", "2"])
    with pytest.raises(runtime.UserError, match="^--jobs: got 2 with --one-program"):
        compare.main()


@pytest.mark.parametrize("together", [False, True])
def test_a_recipe_that_is_refused_is_not_tried_again(comparison, monkeypatch, together):
    """Nor are its variants begun: a holdout that the set does not fill is none to any of them."""
    arguments, out = comparison
    begun, name = [], "OneProgram" if together else "Trainings"
    run = getattr(time_to_accuracy, name).run
    monkeypatch.setattr(getattr(time_to_accuracy, name), "run", lambda *args: (begun.append(args[2]), run(*args)))
    monkeypatch.setattr(sys, "argv", [*(f"{out}-refused" if word == str(out) else word for word in arguments), "--evaluate.holdout_size", "600",
                                      "--run.tune_allocator", "false", *["--one-program"] * together])
    with pytest.raises(runtime.UserError, match="^seed 10: evaluate.holdout_size: got 600, .*: mend that, and start this again") as caught:
        compare.main()
    assert [folder.parent.name for folder in begun][:1] == ["as_it_is"] and len(begun) == 1, caught.value
    variant = Path(out) / "optim.lr_1" / "seed-10"
    failed = []
    begun[0].mkdir(parents=True)    # it had begun, and another program took the memory, which the others may find
    compare.tell(begun[0], time_to_accuracy.Refused(begun[0], "error: no memory"), failed)
    compare.tell(variant, time_to_accuracy.Refused(variant, "error: optim.lr: no"), failed)
    way_on = "mend that, and start this again, it goes on where it was"
    assert failed == [f"as_it_is, seed 10: no memory: {way_on}", f"optim.lr_1, seed 10: optim.lr: no: {way_on}"]


def test_what_ends_one_training_in_a_program_and_what_ends_all(comparison, monkeypatch, capsys, tmp_path):
    """A defect is the first one's alone, whose time is not the second's; behind a device that has failed nothing is begun."""
    begun, settings = [], config.build({"run.tune_allocator": False})

    def fit(settings, command, program):
        begun.append((settings.run.seed, program))
        if settings.run.seed == 1:
            raise RuntimeError("one\nof ours")
        if settings.run.seed == 3:
            raise runtime.DeviceFailed("no device")
    monkeypatch.setattr("seresnet.loop.fit", fit)
    monkeypatch.setattr(compare, "read_report", lambda folder: {"seed": folder.name, "accuracy_tta": 0.5, "seconds": None})
    todo = [(["--run.seed", str(seed)], tmp_path / f"seed-{seed}") for seed in (1, 2, 3, 4)]
    for _, folder in todo:
        folder.mkdir()
    failed = compare.run_here(todo, time_to_accuracy.OneProgram(settings, 7))
    assert [seed for seed, _ in begun] == [1, 2, 3] and {program.trainings for _, program in begun} == {7}
    assert begun[0][1].begun == 0 < begun[1][1].begun < begun[2][1].begun
    assert json.loads((tmp_path / "seed-2/series.json").read_text())["before_in_program"] == 1 and not (tmp_path / "seed-1/series.json").exists()
    assert len(failed) == 2 and "not begun" in failed[1] and "seed 1: RuntimeError: one\nof ours: what has ended is kept" in failed[0] and "seed 3: no device" in failed[1]
    assert "RuntimeError: one" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*comparison[0], "--one-program", "--variant", "--run.threads 1"])
    with pytest.raises(runtime.UserError, match="--run.threads 1': changes what is settled once in a program"):
        compare.main()


def test_what_the_first_training_of_a_program_paid_for_is_in_no_time():
    runs = [{"before_in_program": count, "train_seconds": seconds} for count, seconds in ((0, 9.0), (1, 2.0), (None, 3.0))]
    assert [run["train_seconds"] for run in time_to_accuracy.timed(runs)] == [2.0, 3.0]
    assert time_to_accuracy.timed(runs[:1]) == runs[:1] and time_to_accuracy.timed([{"train_seconds": 1.0}]) == [{"train_seconds": 1.0}]


def test_what_is_no_variant_is_named(comparison, monkeypatch):
    told = {"--optim.lr 0.05": "is given twice", "--optim.lr 0.1": "is the recipe as it is", "--optim.lrr 1": "no such key",
            "--seeds 4": "how to compare", "--run.seed 4": "how to compare", "--config-file rn_configs/se94.yaml": "on top of another",
            "--evaluate.holdout_size 9": "how all are judged", "--evaluate.split test": "how all are judged", "--beton.train x": "may differ",
            "--report.curves false": "may differ", "--optim.lr '": "quotation"}
    monkeypatch.chdir(ROOT)
    wrong = ["--jobs", "0", "--run.folder", "x", "--run.seed", "3", "--evaluate.split", "holdout"]
    monkeypatch.setattr(sys, "argv", [*comparison[0], *wrong, *(word for variant in told for word in ("--variant", variant))])
    with pytest.raises(runtime.UserError) as caught:
        compare.main()
    assert len(caught.value.problems) == len(wrong) // 2 + len(told), caught.value.problems
    for variant, words in told.items():
        assert any(repr(variant) in line and words in line for line in caught.value.problems), (variant, caught.value.problems)
    monkeypatch.setattr(sys, "argv", comparison[0][:5])
    with pytest.raises(runtime.UserError, match="^--variant: there is nothing to compare with"):
        compare.main()


def test_the_folder_of_a_training_at_work_is_left_alone(tmp_path):
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3/kept").touch()
    at_work = report.open_run_folder(tmp_path / "seed-3")    # in its first epoch: no checkpoint yet
    with pytest.raises(runtime.UserError, match="another process is training"):
        time_to_accuracy.arguments_of(config.build({}), 3, tmp_path / "seed-3")
    assert (tmp_path / "seed-3/kept").exists()
    at_work.close()
    assert "--run.seed" in time_to_accuracy.arguments_of(config.build({}), 3, tmp_path / "seed-3") and not (tmp_path / "seed-3").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals from elsewhere kill there; Ctrl-C reaches all that are in a console")
@pytest.mark.parametrize("name, at_work, group", [("SIGINT", 1, True), ("SIGTERM", 1, False), ("SIGHUP", 1, True), ("SIGTERM", 2, True)])
def test_a_series_that_is_stopped_hands_it_on_and_waits_for_its_trainings_to_save(tmp_path, name, at_work, group):
    """Sent to the series alone, as by kill, or to its group, as by a terminal, from which a training gets it twice; it saves at the end of
    its step, which may take seconds. The third of the comparison, which had not begun, does not begin. Nobody need read what is said."""
    (tmp_path / "training.py").write_text(
        "import pathlib, sys, time\nfrom seresnet import runtime\nown = pathlib.Path(sys.argv[1])\n"
        "runtime.StopRequest.ONE_REQUEST = 30\n"
        "with runtime.StopRequest() as stop:\n    (own / 'begun').touch()\n    while not stop.signal:\n        time.sleep(0.05)\n"
        "    time.sleep(1)\n    (own / 'saved').touch()\nsys.exit(128 + stop.signal)\n")
    folders = [tmp_path / f"seed-{seed}" for seed in range(3)]
    for folder in folders:
        folder.mkdir()
    series = ("import sys\nfrom pathlib import Path\nfrom benchmarks import compare, time_to_accuracy\nfrom seresnet import runtime\n"
              "time_to_accuracy.PROGRAM = 'training.py'\ntodo = [([folder], Path(folder)) for folder in sys.argv[1:]]\n"
              f"runtime.run_program(lambda: compare.run_all(todo, {at_work}))")
    number = getattr(signal, name)
    with subprocess.Popen([sys.executable, "-c", series, *map(str, folders)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:    # a suite in the background ignores it
        deadline = time.monotonic() + 60
        while sum((folder / "begun").exists() for folder in folders) < at_work and time.monotonic() < deadline:
            time.sleep(0.05)
        told = ""
        if name == "SIGHUP":
            process.stderr.close()
        (os.killpg if group else os.kill)(process.pid, number)
        if name == "SIGHUP":
            process.wait(timeout=30)
        else:
            _, told = process.communicate(timeout=30)
            assert ": start this again, it goes on where it was" in told and "once more to leave at once" in told
    assert process.returncode == 128 + number, told
    begun, saved = ([(folder / what).exists() for folder in folders] for what in ("begun", "saved"))
    assert sum(begun) == at_work and saved == begun, "a training was killed while it saved, or begun after that"


@pytest.mark.skipif(sys.platform == "win32", reason="what ends by a signal has another status there")
@pytest.mark.parametrize("crash, saved, times, message", [
    ("sys.exit(5)", True, 1, None), ("os.kill(os.getpid(), signal.SIGSEGV)", True, 1, None), ("sys.exit(5)", True, 2, "ended with status 5: no device"),
    ("sys.exit(5)", False, 1, "ended with status 5: no device"), ("sys.exit(1)", True, 1, "ended with status 1: no device")])
def test_a_training_whose_device_fails_goes_on_once(tmp_path, monkeypatch, capfd, crash, saved, times, message):
    folder = tmp_path / "seed-3"
    folder.mkdir()
    (tmp_path / "training.py").write_text(
        "import os, pathlib, signal, sys\nlog = pathlib.Path('log')\ntold = log.read_text() if log.exists() else ''\n"
        "log.write_text(told + ' '.join(sys.argv[1:]) + '\\n')\n"
        f"if told.count('\\n') < {times}:\n    if {saved}: pathlib.Path('seed-3/last.pt').touch()\n"
        f"    print('no device', file=sys.stderr, flush=True)\n    {crash}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time_to_accuracy, "PROGRAM", "training.py")
    with time_to_accuracy.Trainings() as trainings:
        if message:
            with pytest.raises(runtime.UserError, match=f"^seed 3: the training {message}"):
                trainings.run(["--run.folder", "seed-3"], Path("seed-3"))
        else:
            trainings.run(["--run.folder", "seed-3"], Path("seed-3"))
    goes_on = saved and "exit(1)" not in crash
    assert (tmp_path / "log").read_text().splitlines() == ["--run.folder seed-3", "--run.resume seed-3"][:1 + goes_on]
    assert (folder / "series.json").exists() == (message is None)
    assert ("no device: goes on from the state that was saved last" in capfd.readouterr().err) == goes_on


@pytest.mark.skipif(sys.platform == "win32", reason="what ends by a signal has another status there")
def test_a_resumed_training_whose_device_fails_goes_on_with_the_same_data(tmp_path, monkeypatch):
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3/last.pt").touch()
    (tmp_path / "training.py").write_text("import pathlib, sys\nlog = pathlib.Path('log')\ntold = log.read_text() if log.exists() else ''\n"
                                          "log.write_text(told + ' '.join(sys.argv[1:]) + '\\n')\nsys.exit(0 if told else 5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time_to_accuracy, "PROGRAM", "training.py")
    with time_to_accuracy.Trainings() as trainings:
        trainings.run(["--run.resume", "seed-3", "--beton.train", "moved"], Path("seed-3"))
    assert (tmp_path / "log").read_text().splitlines() == ["--run.resume seed-3 --beton.train moved"] * 2


def test_what_makes_a_series_another_one(tmp_path, make_split):
    for name, seed in (("a", 0), ("b", 1)):
        for split in ("train", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            write_beton(tmp_path / name / f"{split}.beton", make_split(30 + seed, 8), classes=("x", "y", "z"), name=name, source=name,
                        fingerprint=name)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")

    def settings(name, **keys):
        return config.build({"beton.train": str(tmp_path / name / "train.beton"), "beton.test": str(tmp_path / name / "test.beton"), **keys})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings("a", **{"run.seed": 5}).as_dict()))
    hashes = {f"{split}_sha256": open_beton(tmp_path / f"a/{split}.beton").sha256 for split in ("train", "test")}
    (tmp_path / "run/environment.json").write_text(json.dumps({"data": hashes}))
    time_to_accuracy.refuse_another(settings("copy", **{"report.curves": False}), 5, tmp_path / "run")
    for other, message in ((settings("b"), "beton.train"), (settings("a", **{"run.cuda_graphs": False}), "run.cuda_graphs"),
                           (settings("a", **{"optim.lr": 0.3}), "optim.lr")):
        with pytest.raises(runtime.UserError, match=message):
            time_to_accuracy.refuse_another(other, 5, tmp_path / "run")
    write_beton(tmp_path / "a/test.beton", make_split(32, 8), classes=("x", "y", "z"), name="c", source="c", fingerprint="c")    # in its place
    with pytest.raises(runtime.UserError, match=f"beton.test: {tmp_path / 'a/test.beton'} holds other images than this run had"):
        time_to_accuracy.refuse_another(settings("a"), 5, tmp_path / "run")
    shutil.rmtree(tmp_path / "a")
    time_to_accuracy.refuse_another(settings("a"), 5, tmp_path / "run")    # a series that has ended does without
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings("copy", **{"run.seed": 5, "evaluate.split": "holdout"}).as_dict()))
    (tmp_path / "copy/test.beton").unlink()
    (tmp_path / "copy/test.beton.json").unlink()
    shutil.copy(tmp_path / "b/test.beton", tmp_path / "copy")
    shutil.copy(tmp_path / "b/test.beton.json", tmp_path / "copy")
    time_to_accuracy.refuse_another(settings("copy", **{"evaluate.split": "holdout"}), 5, tmp_path / "run")    # it has no test images


def test_seconds_of_unlike_programs_are_told_as_such():
    run = {"evaluated": 9, "commit": "c", "machine": "here", "before_in_program": None}
    own = SimpleNamespace(on_test=False, first_seed=1, seeds=2)

    def told(*changes):
        return compare.explained({"x": config.build({})}, own, [run, *({**run, **change} for change in changes)], 0)
    assert "seconds" not in told({})
    assert "not to be compared where runs were on several machines: here, there" in told({"machine": "there"})
    assert "in programs of their own, and in one that was warm" in told({"before_in_program": 2})
    assert "seconds" not in told({"before_in_program": 2}).replace(told({"before_in_program": 2}).splitlines()[2], "")


def test_a_place_to_keep_results_in_is_made_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["soak", "--out", str(tmp_path / "file")])
    with pytest.raises(runtime.UserError, match="--out: .*file: cannot be created .File exists."):
        soak.main()


def test_images_reach_worker_processes_that_are_not_forked():
    images = pickle.loads(pickle.dumps(loader.Images(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]), np.asarray)))
    assert len(images) == 2 and images[1][0].shape == (4, 4, 3) and images[1][1] == 1


def test_a_series_may_be_moved_and_called_from_elsewhere(series, tmp_path, monkeypatch, capsys):
    arguments, out = series
    shutil.copytree(out, tmp_path / "moved")
    environment = next((tmp_path / "moved").glob("*/seed-100/environment.json"))
    told = json.loads(environment.read_text())
    environment.write_text(json.dumps({**told, "machine": {**told["machine"], "gpu": "a GPU that was not used"}}))
    for path in (tmp_path / "moved").glob("*/seed-*/report.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "run_device": "cpu"}))
    monkeypatch.setattr(sys, "argv", [*(str(tmp_path / "moved") if word == str(out) else word for word in arguments),
                                      "--report.curves", "false"])
    monkeypatch.setattr(time_to_accuracy.Trainings, "run", lambda *_: pytest.fail("a run that has ended is trained again"))
    time_to_accuracy.main()
    assert "a GPU that was not used" not in capsys.readouterr().out


def test_growth_is_the_exponent_and_what_is_steep_is_marked():
    sides = [{"value": side, "images_per_second": 1e6 / side**2 / (1 if side < 96 else 2), "step_seconds": 1.0} for side in (32, 64, 96)]
    rows = scaling.with_growth("side", sides)
    assert rows[0]["growth"] is None and rows[1]["growth"] == pytest.approx(1)
    assert rows[2]["growth"] == pytest.approx(1 + math.log(2) / math.log(96**2 / 64**2))
    text = scaling.table("side", rows).splitlines()
    assert "seconds for 50,000 images" in text[0] and [line.split("|")[4].strip() for line in text[2:]] == ["51.2", "204.8", "921.6"]
    assert "1.00 |" in text[3] and "steep" in text[4] and "steep" not in text[3]
    sets = scaling.with_growth("images", [{"value": n, "images_per_second": 1, "epoch_seconds": 3.0 * n, "own_memory_mib": 1} for n in (1, 8)])
    assert sets[1]["growth"] == pytest.approx(1)
    cores = scaling.with_growth("cores", [{"value": n, "images_per_second": n**0.5, "step_seconds": 1.0} for n in (1, 2)])
    assert cores[1]["growth"] == pytest.approx(0.5)


def test_scaling_measures_every_axis(tmp_path, monkeypatch, capsys):
    """Cells are processes: one value an axis, and two of the cheapest."""
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["scaling", "--config-file", "rn_configs/digits.yaml", "--axis", "batch,images", "--set", "500",
                                      "--most", "2", "--seconds", "0.1", "--out", str(tmp_path)])
    monkeypatch.setitem(scaling.AXES, "batch", (2,))
    scaling.main()
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["value"] for row in record["axes"]["images"]] == [1, 2] and len(record["axes"]["batch"]) == 1
    for row in record["axes"]["images"]:
        assert row["own_memory_mib"] > 0 and row["epoch_seconds"] > 0
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "| times the images |" in capsys.readouterr().out


# -- several processes --------------------------------------------------------------------------------------------------

SENT = dict(flop_per_image=0.7e9, gradient_bytes=8e6, norm_bytes=1e4, norm_collectives=12, operations=0)


def test_what_more_gpus_bring_is_reckoned_from_bytes_and_flop():
    one, eight, slower, machines = ddp.estimate(1000, **SENT)
    assert one["step_ms"] == pytest.approx(0.7e9 * 1000 / ddp.A100_RATE * 1e3) and one["speed_up"] == one["efficiency"] == 1
    assert eight["gradients_ms"] == pytest.approx(2 * 7 / 8 * 8e6 / ddp.NVLINK * 1e3) and eight["norms_ms"] == pytest.approx(0.12)
    assert 1 > eight["efficiency"] > slower["efficiency"] > machines["efficiency"] > 0
    for row in (one, eight, slower, machines):
        assert row["gradients_exposed_ms"] <= row["gradients_ms"]
        assert row["step_ms"] == pytest.approx(row["compute_ms"] + row["gradients_exposed_ms"] + row["norms_ms"])
    # a larger batch hides what a small one waits for
    assert all(a["efficiency"] > b["efficiency"] for a, b in zip(ddp.estimate(16000, **SENT)[1:], (eight, slower, machines)))
    bound = ddp.estimate(1000, **{**SENT, "operations": 10**5})
    assert all(row["step_ms"] == row["host_ms"] for row in bound), "no number of GPUs launches kernels faster"


def test_the_share_of_communication_is_taken_within_a_round():
    rounds = [{"with": [2.0, 2.0, 2.0], "without": [1.8, 1.8, 1.8]}, {"with": [4.0, 4.0], "without": [3.6, 3.6]}]
    found = ddp.summarise("two", rounds, 100)
    assert found["gradient_share"] == pytest.approx(0.1) and found["step_seconds"] == 2.0 and found["images_per_second"] == 50
    assert (found["fastest_round"], found["slowest_round"]) == (2.0, 4.0)
    assert ddp.summarise("one", [{"with": [1.0], "without": []}], 10)["gradient_share"] is None


@pytest.mark.slow
@pytest.mark.parametrize("module, arguments, text", [
    ("ddp", ("--rounds", "1", "--steps", "2"), "| 2 processes, 1 thread(s) each, norms apart |"),
    ("large", ("--gib", "0.05", "--batches", "16", "--steps", "2"), "| stream, shares fixed |")])
def test_benchmarks_of_several_processes_run(run, tmp_path, module, arguments, text):
    own = ("--config-file", str(run[0] / "config.yaml"), "--run.folder", "") if module == "ddp" else ("--folder", str(tmp_path / "data"))
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *own, *arguments, "--out", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and text in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / f"{module}.json").read_text())["rows"]


def a_series(folder, **keys):
    """What a series of two trainings on 1,000 images leaves, in 20 and 30 seconds."""
    settings = config.build({"model.blocks": [1], "model.channels": [8], "loop.epochs": 2, **keys})
    runs = [{"accuracy_tta": accuracy, "train_seconds": seconds, "eval_seconds": 1.0, "images_per_second": 2000 / seconds}
            for accuracy, seconds in ((0.5, 20.0), (0.7, 30.0))]
    path = folder / "small.json"
    path.write_text(json.dumps({"recipe": "small", "split": settings.evaluate.split, "config": settings.as_dict(), "runs": runs}))
    return path


def test_the_frontier_puts_others_where_their_arithmetic_does(tmp_path):
    ours, = frontier.our_points([a_series(tmp_path)])
    # a stem of 3 to 8 channels, a block of two convolutions of 8 to 8, a head of 8 to 10; the stem hands no gradient to the images
    stem, block, head = 1024 * 8 * 3 * 9, 2 * 1024 * 8 * 8 * 9, 8 * 10
    assert ours["pflop"] * 1e15 == pytest.approx(2 * (2 * stem + 3 * block + 3 * head) * 2000)
    assert (ours["accuracy"], ours["seconds"], ours["rate"]) == pytest.approx((0.6, 26.0, ours["pflop"] * 1e15 / 25))
    anchors = [{"name": "a", "accuracy": 0.9, "pflop": 0.002, "time": "1 s", "source": "x"},
               {"name": "b", "accuracy": 0.8, "pflop": 0.002, "time": "1 s", "source": "x"},
               {"name": "c", "accuracy": 0.7, "time": "1 s", "source": "x"}]
    a, b, c = frontier.their_points(anchors, {"b": {"accuracy": 0.81, "seconds": 7.0}}, 1e9)
    assert (a["seconds"], a["measured"]) == (2000.0, False) and (b["seconds"], b["accuracy"], b["measured"]) == (7.0, 0.81, True)
    assert c["seconds"] is None
    assert frontier.rate_of_others(anchors, {}, ours) == (ours["rate"], "small's training")
    assert frontier.rate_of_others(anchors, {"b": {"seconds": 4.0}, "c": {"seconds": 1.0}}, ours)[0] == pytest.approx(0.002e15 / 4)
    with pytest.raises(runtime.UserError, match="d: not in anchors.yaml"):
        frontier.their_points(anchors, {"d": {"accuracy": 0.5, "seconds": 1.0}}, 1e9)


def test_a_crop_costs_less_arithmetic(tmp_path):
    whole, = frontier.our_points([a_series(tmp_path)])
    half, = frontier.our_points([a_series(tmp_path, **{"augment.sides": [16, 32]})])
    assert half["pflop"] == pytest.approx(whole["pflop"] * (0.25 + 1) / 2, rel=1e-3)


def test_the_frontier_is_printed_and_drawn(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "frontier.png"
    monkeypatch.setattr(sys, "argv", ["frontier", str(a_series(tmp_path)), "--picture", str(picture)])
    frontier.main()
    rows = capsys.readouterr().out.splitlines()
    assert "another set" not in rows[-1]
    order = [next(i for i, row in enumerate(rows) if name in row) for name in ("**small**", "airbench94_muon", "airbench96 ")]
    assert order == sorted(order) and "reckoned" in rows[order[1]] and "n = 2" in rows[order[0]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    series = tmp_path / "small.json"
    series.write_text(json.dumps({**json.loads(series.read_text()), "set": "digits"}))
    frontier.main()
    assert "on another set, digits: the others' accuracies, of CIFAR-10" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"runs": []}', '{"recipe": "x"}'])
def test_what_is_no_series_is_refused_by_name(tmp_path, monkeypatch, content):
    (tmp_path / "x.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["frontier", str(tmp_path / "x.json")])
    with pytest.raises(runtime.UserError, match="x.json: is no series"):
        frontier.main()


def test_the_arithmetic_of_a_share_of_the_images_is_weighed(tmp_path):
    """Crops of 16 for all images, then whole ones for a third of them: three parts of a quarter's cost, one of the whole."""
    whole, = frontier.our_points([a_series(tmp_path)])
    part, = frontier.our_points([a_series(tmp_path, **{"augment.sides": [16, 32], "loop.hardest": [1, 1 / 3]})])
    assert part["pflop"] == pytest.approx(whole["pflop"] * (3 * 0.25 + 1) / 4, rel=1e-3)


def test_a_series_on_the_holdout_and_peers_of_another_shape_are_refused(tmp_path, monkeypatch):
    with pytest.raises(runtime.UserError, match="was evaluated on holdout, others on the test set"):
        frontier.our_points([a_series(tmp_path, **{"evaluate.split": "holdout"})])
    for content in ("[]", '{"airbench95": {}}', '{"airbench95": 3}', "{"):
        (tmp_path / "peers.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["frontier", str(a_series(tmp_path)), "--peers", str(tmp_path / "peers.json")])
        with pytest.raises(runtime.UserError, match="expected {name: {accuracy, seconds}}"):
            frontier.main()


def test_a_series_from_before_a_key_came_goes_on(series, monkeypatch, capsys):
    arguments, out = series
    stored = out / "colours/seed-100/config.yaml"
    settings = yaml.safe_load(stored.read_text())
    del settings["loop"]["hardest"]
    stored.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", arguments[:-4] + ["--seeds", "1"])
    time_to_accuracy.main()
    assert "seed 100" in capsys.readouterr().out


def test_both_ways_to_a_convolutions_gradient_are_timed(tmp_path):
    def shell(*arguments):
        return subprocess.run([sys.executable, "-m", "benchmarks.convolutions", *arguments], cwd=ROOT, text=True, capture_output=True)
    done = shell("--sides", "3", "14", "--channels", "4", "--channels-in", "6", "--batch", "9", "--rounds", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"\| *6 to 4 *\|", line)]
    assert [("3 x 3" in row, "14 x 14" in row) for row in rows] == [(True, False), (False, True)]
    kept = json.loads((tmp_path / "convolutions.json").read_text())
    assert all(0 < seconds < 10 for result in kept["results"] for seconds in result["seconds"].values())
    done = shell("--sides", "32", "--channels", "2", "--batch", "2", "--rounds", "1", "--precision", "fp32")
    assert done.returncode == 0 and "32 x 32" in done.stdout, done.stderr
    wrong = shell("--sides", "32", "--rounds", "0", "--channels-in", "0")
    assert wrong.returncode == 2 and "--sides: got 32, expected 31 and fewer" in wrong.stderr and "--rounds: got 0" in wrong.stderr
    assert "--channels-in: got 0" in wrong.stderr


def test_what_the_host_costs_a_step_is_counted(series, tmp_path):
    def shell(*arguments):
        return subprocess.run([sys.executable, "-m", "benchmarks.launches", "--config-file", series[0][2], *arguments], cwd=ROOT, text=True,
                              capture_output=True)
    done = shell("--run.device", "cpu", "--steps", "2", "--rounds", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| on the processor |" in done.stdout and "with graphs" not in done.stdout
    found, = json.loads((tmp_path / "launches.json").read_text())["ways"].values()
    assert len(found["seconds"]) == 3 and all(0 < value < 10 for value in found["seconds"])
    assert found["launches"] > 50 and 0 < found["busy_seconds"] < 10
    wrong = shell("--steps", "0")
    assert wrong.returncode == 2 and "--steps: got 0, expected 1 and more" in wrong.stderr


def test_spans_around_kernels_are_no_kernels():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [SimpleNamespace(name=name, device_type=where, is_user_annotation=span) for name, where, span in (
        ("a kernel", cuda, False), ("Optimizer.step#Muon.step", cuda, True), ("aten::add", cpu, False), ("Memcpy DtoD", cuda, False))]
    assert [event.name for event in launches.on_the_device(events)] == ["a kernel", "Memcpy DtoD"]

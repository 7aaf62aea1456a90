"""report: folders that nobody shares, strict JSON, pictures with what they promise, a console fit for a pipe."""
import csv
import io
import json
import math
import subprocess
import sys
import threading
import time

import pytest
import yaml
from PIL import Image

from seresnet import pictures, report, runtime
from seresnet.runtime import NonFiniteLoss, UserError
from test_loop import betons, train    # noqa: F401 the first is a fixture

RECORDS = [{"epoch": i, "steps": 10 * i, "learning_rate": 0.1 / i, "train_loss": 2.0 / i, "train_accuracy": 1 - 0.5 / i,
            "test_loss": 2.1 / i if i % 2 else None, "test_accuracy": 1 - 0.6 / i if i % 2 else None,
            "images_per_second": 1234.5, "train_seconds": 40.51, "data_wait_seconds": 0.1, "eval_seconds": 2.0}
           for i in range(1, 8)]
OUTCOME = {"recipe": "se94", "seed": 3, "split": "test", "tta": "flip", "accuracy": 0.93, "accuracy_tta": 0.9412,
           "parameters": 1990310, "train_seconds": 300.2, "eval_seconds": 12.3, "total_seconds": 320.0,
           "correct_tta": 9412, "evaluated": 10000}


def test_two_runs_never_share_a_folder(tmp_path):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(report.create_run_folder(tmp_path, "r"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder.path for folder in folders}) == 20 == len(list(tmp_path.iterdir()))
    assert all(folder.path.name.startswith("r-") for folder in folders)


def test_an_explicit_folder_has_to_be_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    assert report.create_run_folder("unused", "r", tmp_path / "empty").path == tmp_path / "empty"
    with pytest.raises(UserError, match="run.folder: .*empty is not empty"):
        report.create_run_folder("unused", "r", tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.folder: .*cannot be created"):
        report.create_run_folder("unused", "r", tmp_path / "file" / "x")
    with pytest.raises(UserError, match="report.folder: .*cannot be created"):
        report.create_run_folder(tmp_path / "file", "r")


def test_the_folder_holds_what_it_was_given(tmp_path):
    folder = report.create_run_folder(tmp_path, "r")
    folder.write_start({"model": {"blocks": [1, 2]}}, {"command": ["a", "b"], "seed": 3})
    for record in RECORDS:
        folder.log(record)
    folder.write_report({**OUTCOME, "bad": math.nan, "worse": [math.inf]}, curves=True)
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {"model": {"blocks": [1, 2]}}
    assert json.loads((folder.path / "environment.json").read_text()) == {"command": ["a", "b"], "seed": 3}
    folder.write_resumption({"seed": 3, "recipe": "r", "data": {"set": "x"}, "epoch": 1})    # after an earlier version, which wrote less
    told = json.loads((folder.path / "environment.json").read_text())
    assert told == {"command": ["a", "b"], "seed": 3, "recipe": "r", "data": {"set": "x"},
                    "resumed": [{"seed": 3, "recipe": "r", "data": {"set": "x"}, "epoch": 1}]}
    assert [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()] == RECORDS == folder.records
    text = (folder.path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {**OUTCOME, "bad": None, "worse": [None]}
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "curves.png", "environment.json", "log.jsonl",
                                                             "report.json"]


def test_a_folder_that_may_not_be_entered_hides_no_other(tmp_path, monkeypatch):
    for name in ("a", "locked", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    whole = report.Path.stat

    def stat(path, **how):
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied")
        return whole(path, **how)
    monkeypatch.setattr(report.Path, "stat", stat)
    assert {path.name for path in report.unfinished_run_folders(tmp_path)} == {"a", "b"}


def test_what_is_drawn_on_a_screen_or_a_picture_may_be_missing(tmp_path, monkeypatch, capsys):
    installed = runtime.is_installed
    monkeypatch.setattr(runtime, "is_installed", lambda name: name not in ("matplotlib", "tqdm") and installed(name))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    folder = report.create_run_folder(tmp_path, "digits")
    for record in report.progress(RECORDS, len(RECORDS), "x"):
        folder.log(record)
    with report.CountBar(3, "x", "") as bar:
        bar(2)
    folder.write_report(OUTCOME, curves=True)
    assert (folder.path / "report.json").exists() and not (folder.path / "curves.png").exists()
    assert "curves.png is not drawn: matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [1, 7])
def test_curves_are_drawn_with_labels_and_units(tmp_path, monkeypatch, epochs):
    from matplotlib.figure import Figure
    seen = {}
    whole = Figure.savefig

    def save(figure, *arguments, **named):
        for axes in figure.axes:
            seen[axes.get_ylabel()] = (axes.get_xlabel(), {line.get_label(): line.get_xydata() for line in axes.get_lines()})
        return whole(figure, *arguments, **named)
    monkeypatch.setattr(Figure, "savefig", save)
    pictures.draw_curves(RECORDS[:epochs], OUTCOME, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] >= 1200
    assert len(seen) == 3 and all(x == "epoch" for x, _ in seen.values())
    lines = seen["accuracy"][1]
    assert lines["test"].tolist() == [[r["epoch"], r["test_accuracy"]] for r in RECORDS[:epochs] if r["test_accuracy"]]
    assert any("94.12%" in label for label in lines)


def test_lines_fit_a_pipe(capsys, tmp_path):
    report.print_summary({"optim": {"lr": 0.5, "nesterov": True, "betas": [0.9, 0.99], "name": ""}}, {"parameters": 12345}, tmp_path)
    for record in RECORDS:
        report.print_epoch(record, 7)
    report.print_outcome(OUTCOME, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "lr=0.5  nesterov=true  betas=[0.9,0.99]  name=-" in lines[0] and "parameters=12,345" in lines[1]
    assert "eval 2.1000" in lines[3] and "40.5 s" in lines[3] and "eval" not in lines[4]
    assert len({line.index("images/s") for line in lines[3:10]}) == 1    # columns
    assert "94.12%" in lines[-1] and "9412 of 10000" in lines[-1] and str(tmp_path) in lines[-1]
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_a_bar_only_on_a_terminal_and_leaving_reaches_the_source(monkeypatch):
    closed = []

    def numbers():
        try:
            yield from range(100)
        finally:
            closed.append(True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(report.progress(range(3), 3, "x")) == [0, 1, 2] and sys.stderr.getvalue() == ""
    with report.CountBar(10, "x", "images") as bar:
        bar(5)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    items = report.progress(numbers(), 100, "epoch 1/2")
    assert next(items) == 0
    items.close()
    assert closed == [True]
    with report.CountBar(10, "train", "images") as bar:
        bar(10)
    assert "epoch 1/2" in sys.stderr.getvalue() and "train" in sys.stderr.getvalue()


def test_the_process_clock_runs_from_its_start():
    code = "import time; time.sleep(0.5); from seresnet.report import seconds_since_process_start as s; print(s())"
    started = time.perf_counter()
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.45 < seconds <= time.perf_counter() - started + 0.1


# -- runs side by side --------------------------------------------------------------------------------------------------

def test_runs_side_by_side(run, tmp_path):
    from conftest import run_module
    folder, _, outcome = run
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(folder)
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/unfinished").mkdir()
    (tmp_path / "runs/unfinished/log.jsonl").write_text((folder / "log.jsonl").read_text().splitlines()[0] + "\n")
    (tmp_path / "runs/unfinished/environment.json").write_text('{"recipe": "se94", "seed": 12}')
    status, output, errors = run_module("report", tmp_path, "runs/first", "runs/notes", "runs/unfinished", "--csv", "t.csv", "--picture", "p.png")
    for name, content in (("older", None), ("damaged", "{")):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "log.jsonl").write_text("")
        if content:
            (tmp_path / "others" / name / "environment.json").write_text(content)
    assert status == 0, errors
    lines = output.splitlines()
    assert lines[0].startswith("| run ") and set(lines[1]) <= set("|-:") and len({len(line) for line in lines[:4]}) == 1
    assert f"{outcome['accuracy_tta']:.2%}" in lines[2] and lines[3].split()[6:10] == ["|", "1", "so", "far"]
    assert lines[3].split()[3:6:2] == ["se94", "12"]
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["first", "unfinished"] and rows[1]["accuracy"] == ""
    assert (rows[1]["recipe"], rows[1]["seed"], rows[1]["epochs"]) == ("se94", "12", "1")
    assert rows[0]["set"] == outcome["data"]["set"] and int(rows[0]["images"]) == outcome["evaluated"] and rows[1]["set"] == ""
    assert float(rows[0]["with TTA"]) == outcome["accuracy_tta"] and int(rows[0]["parameters"]) == outcome["parameters"]
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 1200
    status, output, errors = run_module("report", tmp_path, "others/older", "others/damaged")
    assert status == 0 and output.count(" 0 so far ") == 2, errors
    status, output, errors = run_module("report", tmp_path, "runs/[fn]*")    # as Windows' shell hands it on
    assert status == 0 and output.splitlines()[2].split() == lines[2].split(), errors
    (tmp_path / "series/a").mkdir(parents=True)
    (tmp_path / "series/a/first").symlink_to(folder)
    status, output, errors = run_module("report", tmp_path, "runs/first", "series/a/first", "runs/unfinished")
    assert [line.split()[1] for line in output.splitlines()[2:]] == ["runs/first", "a/first", "unfinished"], errors
    for name in ("p.bmp", "p"):
        status, _, errors = run_module("report", tmp_path, "runs/first", "--picture", name)
        assert status == 2 and f"{name}: expected a name that ends in .png" in errors
    status, _, errors = run_module("report", tmp_path, "runs/notes")
    assert status == 2 and "no run folder among runs/notes" in errors
    status, _, errors = run_module("report", tmp_path, "runs/first", "runs/frist")
    assert status == 2 and "runs/frist: does not exist" in errors
    (tmp_path / "runs/unfinished/log.jsonl").write_text("{")
    status, _, errors = run_module("report", tmp_path, "runs/unfinished")
    assert status == 2 and "is damaged" in errors and "Traceback" not in errors


def test_tensorboard_events_are_those_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = report.create_run_folder(tmp_path, "x")
    folder.open_tensorboard()
    for record in RECORDS[:3]:
        folder.log(record)
    folder.close()
    events = EventAccumulator(str(folder.path))
    events.Reload()
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx([r["train_loss"] for r in RECORDS[:3]])
    assert [e.step for e in events.Scalars("train_loss")] == [r["epoch"] for r in RECORDS[:3]]


def test_weights_and_biases_is_told_what_the_log_holds(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, ids = report.create_run_folder(tmp_path, "x"), []
    for first in (0, 2):    # a run, and the same one gone on with
        folder.open_wandb({"optim": {"lr": 0.1}})
        run = folder.writers[-1]._run
        for record in RECORDS[first:first + 2]:
            folder.log(record)
        assert run.config["optim"] == {"lr": 0.1} and run.name == folder.path.name
        assert run.summary["train_loss"] == pytest.approx(record["train_loss"]) and run.summary["_step"] == record["epoch"]
        ids.append(run.id)
        folder.close()
        if not first:
            folder = report.open_run_folder(folder.path)
    assert ids[0] == ids[1] and list((folder.path / "wandb").glob("offline-run-*"))
    assert wandb.run is None


@pytest.mark.parametrize("explicit", [True, False])
def test_what_weights_and_biases_refuses_is_said_and_leaves_nothing_behind(betons, tmp_path, monkeypatch, explicit):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("no API key configured")
    monkeypatch.setattr(wandb, "init", refuse)
    where = {"run__folder": str(tmp_path / "mine")} if explicit else {}
    with pytest.raises(UserError, match="report.wandb: no API key configured: `wandb login`"):
        train(betons, tmp_path, report__wandb=True, **where)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_weights_and_biases_learns_how_a_training_ended(betons, tmp_path, monkeypatch, fails):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs, ends, begin = [], [], wandb.init

    def init(**arguments):
        runs.append(begin(**arguments))
        finish = runs[-1].finish
        monkeypatch.setattr(runs[-1], "finish", lambda exit_code: (ends.append((exit_code, dict(runs[-1].summary))), finish(exit_code))[1])
        return runs[-1]
    monkeypatch.setattr(wandb, "init", init)
    if fails:
        with pytest.raises(NonFiniteLoss):
            train(betons, tmp_path, report__wandb=True, optim__lr=1e30)
        assert [code for code, _ in ends] == [1]
    else:
        outcome = train(betons, tmp_path, report__wandb=True)
        (code, summary), = ends
        assert code == 0 and summary["accuracy_tta"] == outcome["accuracy_tta"] and summary["_step"] == 3


def test_a_writer_that_fails_is_left_out_and_the_log_goes_on(tmp_path, capsys):
    class Broken:
        def add_scalar(self, *_):
            raise ConnectionError("network is unreachable")

    class Whole:
        seen, closed = [], False

        def add_scalar(self, name, value, epoch):
            self.seen.append((name, epoch))

        def flush(self):
            pass

        def close(self):
            Whole.closed = True
    folder = report.create_run_folder(tmp_path, "x")
    folder.writers.extend([Broken(), Whole()])
    for record in RECORDS[:2]:
        folder.log(record)
    folder.close()
    assert capsys.readouterr().out.count("is told nothing more: ConnectionError: network is unreachable") == 1
    assert ("train_loss", 2) in Whole.seen and Whole.closed and len((folder.path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"report.{package}: {package} is not installed: pip install {package}"):
        report.require(package)

"""Several processes, over gloo on this machine: the answer of one process, exact counts, one that writes, stopping together."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import processes
from seresnet import checkpoint, runtime
from seresnet.beton import write_beton
from seresnet.ranks import Ranks
from seresnet.runtime import Launch, UserError
from test_loop import CLASSES, SMALL, stripes

ROOT = Path(__file__).parents[1]
TRAIN_PROGRAM = ROOT / "tests/processes.py"
TRAIN, TEST = 145, 61    # the last batch of 12 has one image: all but one process have none


def start(folder, count, program, *arguments, launcher=()):
    """torchrun with `count` processes; its output and errors are in `folder`/output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *launcher, program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w") as output:
        return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=output, stderr=output)


@pytest.mark.parametrize("newer", [True, False])
def test_norm_buffers_are_not_broadcast_whichever_way_torch_says_it(newer, monkeypatch):
    class Of213:
        def __init__(self, module, device_ids=None, broadcast_buffers=True, gradient_as_bucket_view=False, forward_sync_buffers=True):
            self.told = broadcast_buffers, forward_sync_buffers

    class Of211:
        def __init__(self, module, device_ids=None, broadcast_buffers=True, gradient_as_bucket_view=False):
            self.told = (broadcast_buffers,)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Of213 if newer else Of211)
    wrapped = Ranks(Launch(0, 0, 2, 2)).wrap(torch.nn.Linear(1, 1), torch.device("cpu"))
    assert wrapped.told == ((True, False) if newer else (False,))


def end(process, folder, seconds=300):    # tens where the cores are free
    try:
        process.wait(seconds)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(40)
    return process.returncode, (folder / "output").read_text()


def until(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition(), "it did not come to that"


def ours(text):
    """What the program itself says on errors, without torchrun's report."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "stopping "))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        write_beton(folder / f"{name}.beton", stripes(count, seed), classes=CLASSES, name="stripes", source="t", fingerprint="x")
    return folder


@pytest.fixture(scope="module")
def settings(place):
    return {**SMALL, "beton.train": str(place / "train.beton"), "beton.test": str(place / "test.beton"), "run.precision": "fp32",
            "loader.batch_size": 12, "loader.drop_last": False, "loop.epochs": 2, "evaluate.batch_size": 8,
            "run.tune_allocator": False}


PLAN = {
    "sgd": {"optim.clip_norm": 1.0, "model.dropout": 0.2, "augment.flip": "random", "augment.cutout": 3},
    "muon": {"optim.name": "muon", "augment.flip": "alternating", "optim.clip_value": 0.5, "loader.drop_last": True,
             "optim.ema_decay": 0.9},
    "hardest": {"loop.hardest": [1, 0.6], "augment.flip": "random", "optim.sam_radius": 0.1, "optim.sam_from": 0.3},
    "unsynced": {"loop.sync_norm": False, "optim.name": "adamw", "optim.lr": 3e-3, "loader.shares": "fixed",
                 "optim.ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def trained(place, settings):
    """{name: {processes: [what each process saw]}} of PLAN."""
    (place / "plan.json").write_text(json.dumps({name: {**settings, **changes} for name, changes in PLAN.items()}))
    found = {name: {} for name in PLAN}
    for count in (2, 3):
        status, output = end(start(place, count, TRAIN_PROGRAM, place), place)
        assert status == 0, output[-3000:]
        for name in PLAN:
            found[name][count] = [json.loads((place / f"{name}-{count}-{rank}.json").read_text()) for rank in range(count)]
    for name, changes in PLAN.items():
        found[name][1] = [processes.train({**settings, **changes, "run.folder": str(place / f"{name}-1")})]
    return found


@pytest.mark.parametrize("count", [2, 3])
# Roundings grow, on one processor more than on another: 1e-7 for ten steps of sgd, up to 3e-4 when a unit has crossed its kink.
@pytest.mark.parametrize("name, first, later", [("sgd", 1e-5, 1e-3), ("hardest", 1e-5, 1e-3), ("muon", 1e-2, 1e-2)])    # muon's products: bf16
def test_several_processes_train_what_one_trains(trained, name, first, later, count):
    [one], several = trained[name][1], trained[name][count]
    steps = len(one["losses"])
    assert steps >= (17 if name == "hardest" else 20) and all(len(rank["losses"]) == steps for rank in several)
    assert name == "hardest" or min(n for rank in several for n in rank["counts"]) == (0 if name == "sgd" else 12 // count)
    for step in range(steps):
        total = sum(rank["counts"][step] for rank in several)
        assert total == one["counts"][step]
        mean = sum(rank["losses"][step] * rank["counts"][step] for rank in several) / total
        tolerance = first if step < 10 else later
        assert mean == pytest.approx(one["losses"][step], rel=tolerance, abs=tolerance / 10), step
    assert several[0]["correct"] == one["correct"]
    assert several[0]["loss"] == pytest.approx(one["loss"], rel=0.1 if name == "muon" else later)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", PLAN)
def test_all_processes_hold_one_net_and_count_every_sample_once(trained, name, count):
    several = trained[name][count]
    for what in ("parameters", "buffers", "accuracy", "accuracy_tta", "loss", "loss_tta", "correct", "best_epoch"):
        assert len({rank[what] for rank in several}) == 1, what
    assert several[0]["evaluated"] == TEST


def test_without_synchronised_norms_it_is_another_training_that_learns_too(trained):
    [one], several = trained["unsynced"][1], trained["unsynced"][3]
    assert several[0]["losses"][3] != pytest.approx(one["losses"][3], rel=1e-3)
    assert sum(several[0]["losses"][-6:]) < 0.9 * sum(several[0]["losses"][:6])


def test_only_the_first_process_writes_and_prints(trained, place):
    output = (place / "output").read_text()
    for name in PLAN:
        assert output.count(f"; {place / name}-3") == 1
        assert sorted(p.name for p in (place / f"{name}-3").iterdir()) == [
            "best.pt", "config.yaml", "environment.json", "last.pt", "log.jsonl", "report.json", "weights.pt"]
        assert len((place / f"{name}-3/log.jsonl").read_text().splitlines()) == 2
    assert json.loads((place / "sgd-3/report.json").read_text())["run_processes"] == 3
    assert "Warning" not in output, output


# -- the launcher's variables -------------------------------------------------------------------------------------------

def test_the_launchers_variables_are_read_in_one_place(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.launch() == Launch()
    for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 4), ("MASTER_ADDR", "x"),
                        ("MASTER_PORT", 1), ("TORCHELASTIC_RESTART_COUNT", 2), ("TORCHELASTIC_RUN_ID", "job")):
        monkeypatch.setenv(name, str(value))
    assert runtime.launch() == Launch(5, 1, 8, 4, 2, "job")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert str(os.getppid()) in runtime.launch().job
    for name, value in (("RANK", "8"), ("WORLD_SIZE", "many")):
        with monkeypatch.context() as changed, pytest.raises(UserError, match="start with torchrun"):
            changed.setenv(name, value)
            runtime.launch()
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="MASTER_PORT=,?"):
        runtime.launch()


@pytest.mark.parametrize("world, size, expected", [(1, 7, ""), (4, 1000, ""), (3, 1000, "choose 999 or 1002"), (4, 3, "choose 4$")])
def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest(world, size, expected):
    import re
    found = Launch(world=world).problem_with_batch(size)
    assert bool(found) == bool(expected) and re.search(expected, found)
    assert not found or f"loader.batch_size: got {size}, which {world} processes cannot share" in found


def test_each_process_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    of = Launch(rank=6, local_rank=2, world=8, local_world=4)
    assert runtime.pick_device("auto", of) == torch.device("cuda", 2) == chosen[-1]
    assert runtime.pick_device("cpu", of) == torch.device("cpu")
    with pytest.raises(UserError, match="got cuda:1 for each of 8 processes"):
        runtime.pick_device("cuda:1", of)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine with 2 CUDA devices: start fewer"):
        runtime.pick_device("auto", of)


def test_processes_share_the_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(runtime, "available_cores", lambda: 9)
    try:
        for of, wanted, variable, expected in ((Launch(world=2, local_world=2), 0, "1", 4), (Launch(world=2, local_world=2), 3, "1", 3),
                                               (Launch(world=2, local_world=2), 0, "6", before), (Launch(), 0, "1", before)):
            torch.set_num_threads(before)
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
            runtime.set_threads(wanted, of)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


# -- stopping, dying, going on ------------------------------------------------------------------------------------------

def flags(settings, **changes):
    values = {**settings, **{k.replace("__", "."): v for k, v in changes.items()}}
    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value).strip('"'))]


def last(path):
    return checkpoint.load(path / "last.pt")


def net_of(path):
    return processes.digest(checkpoint.load(path / "weights.pt")["model"].values())


LONG = dict(loop__epochs=20, loop__hardest=[1, 0.7], evaluate__every=0, augment__cutout=3, model__dropout=0.2, augment__flip="random")


@pytest.fixture(scope="module")
def whole(place, settings):
    """What one and two processes make of the long training without a break."""
    status, output = end(start(place, 2, TRAIN_PROGRAM, "train", *flags(settings, **LONG, run__folder="whole")), place)
    assert status == 0, output
    return place / "whole"


def test_sigterm_to_the_launcher_leaves_one_whole_checkpoint_to_go_on_from(place, settings, whole):
    process = start(place, 2, TRAIN_PROGRAM, "train", *flags(settings, **LONG, run__folder="stopped"))
    until(process, (place / "stopped/weights.pt").exists)
    process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    status, output = end(process, place, 40)
    assert status != 0 and time.monotonic() - signalled < 25
    said = ours(output)
    assert len(said) == 2 and said[0] == "stopping after this step" and said[1].endswith("go on with --run.resume stopped"), output
    state = last(place / "stopped")
    assert state["processes"] == 2 and not list((place / "stopped").glob("*.tmp*")) and not (place / "stopped/report.json").exists()
    # on three processes for a moment, then to the end on two
    process = start(place, 3, TRAIN_PROGRAM, "train", "--run.resume", "stopped")
    until(process, lambda: "error" in (place / "output").read_text() or "goes on" in (place / "output").read_text()
          or last(place / "stopped")["epoch"] > state["epoch"] + 1)
    process.send_signal(signal.SIGTERM)
    _, output = end(process, place, 40)
    assert "trained by 2 processes so far, by 3 from here on: the same batches" in output, output
    assert last(place / "stopped")["epoch"] > state["epoch"] and last(place / "stopped")["processes"] == 3
    # one process goes on with it, too, and comes where all come
    done = subprocess.run([sys.executable, TRAIN_PROGRAM, "train", "--run.resume", "stopped"], cwd=place, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "trained by 3 processes so far, by 1" in done.stdout, done.stderr
    first, second = (json.loads((path / "report.json").read_text()) for path in (whole, place / "stopped"))
    assert second["resumed"] == 2 and second["correct"] == first["correct"]
    assert second["loss"] == pytest.approx(first["loss"], abs=0.02)


def test_a_process_that_dies_ends_the_others_and_the_launcher_goes_on_to_the_same_bits(place, settings, whole):
    """kill -9 of one process: the launcher's second attempt finds the folder of its first."""
    process = start(place, 2, TRAIN_PROGRAM, "train", *flags(settings, **LONG, run__folder="", report__folder="again"),
                    launcher=("--max-restarts", 1))
    until(process, lambda: list((place / "again").glob("*/weights.pt")))
    victim = next(pid for pid in children(process.pid) if environment(pid).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    until(process, lambda: victim not in children(process.pid) and len(children(process.pid)) == 2)
    assert time.monotonic() - killed < 30
    status, output = end(process, place)
    assert status == 0, output
    said = ours(output)
    assert len([line for line in said if "another of the 2 processes ended without a word" in line]) <= 1
    [folder] = (place / "again").iterdir()
    assert json.loads((folder / "report.json").read_text())["resumed"] == 1
    assert net_of(folder) == net_of(whole)


def test_a_process_that_dies_is_told_of_once(place, settings):
    process = start(place, 3, TRAIN_PROGRAM, "train", *flags(settings, **LONG, run__folder="dying", run__tune_allocator=True))
    until(process, (place / "dying/weights.pt").exists)
    os.kill(next(pid for pid in children(process.pid) if environment(pid).get("RANK") == "0"), signal.SIGKILL)
    killed = time.monotonic()
    status, output = end(process, place, 40)
    assert status != 0 and time.monotonic() - killed < 30
    assert [line for line in ours(output) if line.startswith("error: another of the 3 processes ended")] == ours(output), output
    assert len(ours(output)) == 1 and last(place / "dying")["processes"] == 3
    note = json.loads((place / "dying/environment.json").read_text())
    assert note["processes"] == 3 and (note["machine"]["allocator"] == "tuned" or not sys.platform.startswith("linux"))


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid):
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.mark.parametrize("changes, message", [
    (dict(loader__batch_size=13), "loader.batch_size: got 13, which 2 processes cannot share evenly: choose 12 or 14"),
    (dict(optim__lr=1e30, optim__schedule="constant", run__folder="diverged"), "Try a smaller optim.lr"),
    (dict(report__folder="/proc/runs"), "report.folder: /proc/runs")])    # the first process alone sees this one
def test_mistakes_are_told_once(place, settings, changes, message):
    status, output = end(start(place, 2, TRAIN_PROGRAM, "train", *flags(settings, **changes)), place, 40)
    assert status != 0 and len(ours(output)) == 1 and message in ours(output)[0], output


# -- on a cluster -------------------------------------------------------------------------------------------------------

def body(place, tmp_path, name, settings, epochs=1, **variables):
    """examples/slurm/body.sh, started as srun would on a machine."""
    recipe = tmp_path / "stripes.yaml"
    recipe.write_text(json.dumps({key: value for key, value in settings.items() if not key.startswith("beton")}))
    variables = {"CONFIG": recipe, "TRAIN": place / "train.beton", "TEST": place / "test.beton", "PYTHON": sys.executable,
                 "TMPDIR": tmp_path, "OMP_NUM_THREADS": 1, **variables}
    with open(tmp_path / f"output-{name}", "w") as output:
        return subprocess.Popen(["bash", "examples/slurm/body.sh", "--loop.epochs", str(epochs), "--run.folder", tmp_path / "run"], cwd=ROOT,
                                env={**os.environ, **{k: str(v) for k, v in variables.items()}}, stdout=output, stderr=output)


def test_the_batch_scripts_are_shell():
    scripts = sorted((ROOT / "examples/slurm").iterdir())
    assert len(scripts) == 3
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert not script.suffix == ".sbatch" or "examples/slurm/body.sh" in script.read_text()


def test_the_jobs_body_trains_across_two_launchers(place, tmp_path, settings):
    """As on two machines with a process each: the data are copied, the launchers meet, one folder is left and no copy."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [body(place, tmp_path, node, settings, PROCESSES=1, SLURM_NNODES=2, SLURM_NODEID=node, SLURM_JOB_ID=77, MASTER="localhost",
                  PORT=port, GLOO_SOCKET_IFNAME="lo") for node in (0, 1)]
    statuses = [node.wait(300) for node in nodes]
    outputs = [(tmp_path / f"output-{node}").read_text() for node in (0, 1)]
    assert statuses == [0, 0], outputs
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["run_processes"] == 2 and report["evaluated"] == TEST and "seresnet-77" in report["data"]["train"]
    assert sum(f"; {tmp_path / 'run'}" in text for text in outputs) == 1 and not list(tmp_path.glob("seresnet-*"))


def test_the_jobs_body_hands_the_clusters_signal_on(place, tmp_path, settings):
    """Slurm's cgroup tracker signals the script alone: the training saves, nothing is left running, nor the copy of the data."""
    process = body(place, tmp_path, "alone", {**settings, **{name.replace("__", "."): value for name, value in LONG.items()}},
                   PROCESSES=1, epochs=20)
    until(process, (tmp_path / "run/weights.pt").exists)
    process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    output = (tmp_path / "output-alone").read_text()
    assert status != 0 and "go on with --run.resume" in output, (status, output)
    assert (tmp_path / "run/last.pt").exists() and not (tmp_path / "run/report.json").exists() and not list(tmp_path.glob("seresnet-*"))


def test_before_the_processes_have_met_the_first_of_a_machine_speaks():
    """Their command lines are the same, and so are the mistakes in them."""
    said = []
    for rank in (0, 1):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        done = subprocess.run([sys.executable, ROOT / "ffcv_train.py", "--optim.lr", "fast"], capture_output=True, text=True, timeout=60,
                              env={**os.environ, **{name: str(value) for name, value in places.items()}})
        assert done.returncode == 2
        said.append(done.stderr)
    assert said[0].startswith("error: optim.lr: got 'fast'") and said[1] == ""

"""Whole trainings that are killed or stopped at random moments, again and again: they end in the same bits as one without a break."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seresnet.beton import write_beton
from seresnet.imageset import Split

ROOT = Path(__file__).parents[1]

# One process imports everything and forks a training a life, so that a life costs a tenth of a second and not three. It never
# trains itself: torch's backward pass does not survive a fork.
LIVES = """
import json, os, random, signal, sys, time
from seresnet import checkpoint, config, loop, report, runtime
from seresnet.runtime import UserError
folder, kind, lives, settings = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
rng, counts = random.Random(5), {"injected": 0, "whole": 0, "statuses": {}, "slowest": 0.0}

def train(base):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.setpgid(0, 0)
        try:
            runtime.run_program(lambda: loop.fit(config.build({**settings, "report.folder": base, "run.resume": "auto"}, recipe="r"), ["x"]) and 0)
        except SystemExit as end:
            os._exit(end.code)    # taking the interpreter down in order takes a second
    return child

def run_of(base):
    found = [os.path.join(base, name) for name in os.listdir(base)] if os.path.isdir(base) else []
    return found

made = config.build(settings)
made, data, model = loop.prepare(made)
with loop.open_session(made, runtime.pick_device("cpu"), data, model) as session:    # compile and import what every life needs
    list(session.train_batches.epoch(0))
    session.evaluate("flip")
runtime.git_commit(), runtime.describe_machine()
def saved(base):
    return max((os.stat(run + "/last.pt").st_mtime_ns for run in run_of(base) if os.path.exists(run + "/last.pt")), default=0)

assert os.waitstatus_to_exitcode(os.waitpid(train(folder + "/whole"), 0)[1]) == 0
started = time.monotonic()
assert os.waitstatus_to_exitcode(os.waitpid(train(folder + "/again"), 0)[1]) == 0
span = (time.monotonic() - started) / 2
if kind == "signal":    # from its first checkpoint on, and not while it draws, reports and takes leave
    with open(run_of(folder + "/again")[0] + "/report.json") as file:
        ended = json.load(file)
    span = 0.9 * (ended["train_seconds"] + ended["eval_seconds"])
broken, part = 0, 0
while counts["injected"] < lives:
    base = f"{folder}/broken{part}"
    before = saved(base)
    child = train(base)
    while kind == "signal" and saved(base) == before and time.monotonic() - started < 500:    # the training has begun
        time.sleep(0.002)
    time.sleep(rng.uniform(0, span))
    number = signal.SIGKILL if kind == "kill" else rng.choice([signal.SIGTERM, signal.SIGINT])
    os.kill(child, number)
    signalled = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts["slowest"] = max(counts["slowest"], time.monotonic() - signalled)
    counts["statuses"][str(status)] = counts["statuses"].get(str(status), 0) + 1
    if status == 0:    # it ended before the signal: the next run
        part += 1
        continue
    counts["injected"] += 1
    for run in run_of(base):
        for name in os.listdir(run):
            if name.endswith(".pt") and not name.startswith("."):
                checkpoint.load(os.path.join(run, name))
                counts["whole"] += 1
for i in range(part + 1):
    assert os.waitstatus_to_exitcode(os.waitpid(train(f"{folder}/broken{i}"), 0)[1]) == 0
print(json.dumps(counts))
"""


def weights_hash(run):
    from seresnet import checkpoint
    state = checkpoint.load(run / "weights.pt")["model"]
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in state.values())).hexdigest()


@pytest.mark.parametrize("kind, lives", [
    ("kill", 6), ("signal", 3), pytest.param("kill", 50, marks=pytest.mark.slow), pytest.param("signal", 50, marks=pytest.mark.slow)])
def test_a_training_broken_off_at_random_moments_ends_in_the_same_bits(quick_disk, kind, lives, faults):
    rng = np.random.default_rng(0)
    for name, count in (("train", 150), ("test", 30)):
        split = Split(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 3)
        write_beton(quick_disk / f"{name}.beton", split, classes=("a", "b", "c"), name="n", source="s", fingerprint="f")
    settings = {"beton.train": str(quick_disk / "train.beton"), "beton.test": str(quick_disk / "test.beton"), "loader.batch_size": 10,
                "model.blocks": [1], "model.channels": [8], "model.classes": 0, "model.image_size": 0, "loop.epochs": 4,
                "run.device": "cpu", "run.precision": "fp32", "report.curves": False, "checkpoint.every_steps": 5, "model.dropout": 0.1}
    done = subprocess.run([sys.executable, "-c", LIVES, quick_disk, kind, str(lives), json.dumps(settings)], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    expected = weights_hash(next((quick_disk / "whole").iterdir()))
    for base in quick_disk.glob("broken*"):
        finished = [run for run in base.iterdir() if (run / "report.json").exists()]
        assert finished and {weights_hash(run) for run in finished} == {expected}    # killed behind its report, a run is followed by another
        assert not any(list(run.glob(".*")) for run in finished), "what the killed ones left is cleared"
    statuses = {"kill": {"-9", "0"}, "signal": {"143", "130", "-15", "-2", "0"}}[kind]    # -15: before the training has begun
    assert set(counts["statuses"]) <= statuses and counts["slowest"] < 10, counts
    assert kind == "kill" or counts["statuses"].get("143", 0) + counts["statuses"].get("130", 0) >= lives // 2, counts
    faults(counts["injected"])

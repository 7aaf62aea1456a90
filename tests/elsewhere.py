"""A program for test_portable: training and what follows it, on what is left of this system when all is taken away that macOS
and Windows lack, and under Windows' rule that a file which is open or mapped is neither replaced nor removed.

elsewhere.py FOLDER: FOLDER holds images, a folder a class; prints the accuracy of the trained net and of its resumed twin.
"""
import builtins
import json
import os
import pathlib
import signal
import sys
import warnings
from pathlib import Path

BEFORE = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove", "listdir", "readlink")}
OPEN = builtins.open


def refuse_what_is_held(name, count):
    """`os.<name>`, but PermissionError for a file that this process has open or mapped, as Windows has it."""
    def guarded(*paths, **how):
        for path in (os.path.realpath(path) for path in paths[:count]):
            opened = [link for link in BEFORE["listdir"]("/proc/self/fd") if _target(link) == path]
            with OPEN("/proc/self/maps") as maps:
                if opened or any(line.rstrip("\n").endswith(f" {path}") for line in maps):
                    raise PermissionError(13, "The process cannot access the file because it is being used", path)
        return BEFORE[name](*paths, **how)
    return guarded


def _target(link):
    try:
        return BEFORE["readlink"](f"/proc/self/fd/{link}")
    except OSError:
        return ""


def without_proc(file, *arguments, **how):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return OPEN(file, *arguments, **how)


for name, count in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1)):
    setattr(os, name, refuse_what_is_held(name, count))
for owner, names in ((os, ("sched_getaffinity", "sysconf", "sysconf_names", "getuid", "geteuid", "fork", "mkfifo")),
                     (signal, ("alarm", "SIGALRM", "SIGKILL", "SIGHUP"))):
    for name in names:
        delattr(owner, name)
for name in ("fcntl", "resource", "pwd", "ffcv", "numba"):
    sys.modules[name] = None
builtins.open = pathlib.io.open = without_proc

warnings.filterwarnings("error", category=EncodingWarning, module=r"seresnet|write_datasets")

import numpy as np    # noqa: E402

import seresnet    # noqa: E402
import write_datasets    # noqa: E402
from seresnet import config, evaluate, loop, predict, report    # noqa: E402


def call(program, *arguments):
    sys.argv = [program.__name__, *map(str, arguments)]
    program.main()


def main(folder):
    os.chdir(folder)
    keys = ["--sources.path", "images", "--sources.kind", "folder", "--beton.train", "train.beton", "--beton.test", "test.beton"]
    call(write_datasets, *keys)
    (folder / "images/cat/more.png").write_bytes((folder / "images/cat/0.png").read_bytes())
    call(write_datasets, *keys)    # over what is there
    settings = {"beton": {"train": "train.beton", "test": "test.beton"}, "loader": {"batch_size": 16, "drop_last": False},
                "model": {"blocks": [1, 1], "channels": [8], "classes": 0, "image_size": 0}, "loop": {"epochs": 3}}
    outcome = loop.fit(config.build({**settings, "run": {"folder": "run"}}), [])
    (folder / "run/report.json").unlink()    # as of a run that was killed while it told its end
    again = loop.fit(config.build({**settings, "run": {"resume": "run"}}), [])
    call(predict, "--checkpoint", "run", "--images", "images", "--out", "p.csv")
    call(evaluate, "--checkpoint", "run", "--data", "test.beton")
    call(evaluate, "--checkpoint", "run", "--data", "images")
    call(report, "run", "--picture", "runs.png", "--csv", "runs.csv")
    predicted = seresnet.load("run").predict(np.zeros((2, 16, 16, 3), np.uint8))
    print(json.dumps({"accuracy": outcome["accuracy"], "again": again["accuracy"], "predicted": len(predicted)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What is there to train with, and what is missing, with the command that mends it: python -m seresnet.doctor [DATA_DIR]

Exit status: 0 where a training can run, 2 where something that it needs is missing.
"""
from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from seresnet import runtime    # which needs no package: it is these that may be missing

OPTIONAL = {
    "ffcv": ("streaming of sets that do not fit into memory", "make setup, or: README, \"Install\""),
    "torchvision": ("downloads of CIFAR-10", "pip install torchvision"), "sklearn": ("the digits set", "pip install scikit-learn"),
    "numba": ("compiled parts of a step on a CPU: 1.17 times as fast in bf16 with AMX, 1.7 to 1.9 times in fp32", "pip install numba"),
    "matplotlib": ("pictures", "pip install matplotlib, or --report.curves false"),
    "tqdm": ("progress bars", "pip install tqdm"),
    "pyarrow": ("parquet files", "pip install pyarrow"), "tensorboard": ("report.tensorboard", "pip install tensorboard"),
    "wandb": ("report.wandb", "pip install wandb"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), ("export to ONNX", "pip install onnx onnxscript onnxruntime")),
    "scipy": ("benchmarks.time_to_accuracy and compare", "pip install scipy")}


NUMBA_AGAIN = "pip install --upgrade numba; apt install libgomp1, where OpenMP is missing"
# What is tried of a package, in a process of its own: FFCV as the programs import it, in half the time; numba's threads, which FFCV's reader
# and a training start side by side; others by their import.
TRIALS = {"ffcv": "from seresnet import runtime; runtime.import_ffcv()",
          "numba": "import numba; numba.config.DISABLE_JIT and sys.exit('NUMBA_DISABLE_JIT is set'); numba.set_num_threads(1); "
                   "numba.threading_layer() in ('omp', 'tbb') or sys.exit('without OpenMP or TBB')"}


class Finding(NamedTuple):
    """good: True, False where a training cannot do without it, None where it can."""

    what: str
    good: bool | None
    detail: str
    mend: str = ""


def examine(data: Path) -> Iterator[Finding]:
    """One finding after the other. data: folder in which betons, or sources of them, are looked for."""
    version = sys.version.split()[0]
    yield Finding("Python", sys.version_info >= (3, 11), version, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer")
    versions = runtime.describe_versions()
    wanting = [name for name in ("torch", "ffcv", "numba") if runtime.is_installed(name)]    # libraries of the system
    with ThreadPoolExecutor() as pool:    # side by side: seconds each
        broken = dict(zip(wanting, pool.map(why_not_imported, wanting)))
    activate = "" if all(map(runtime.is_installed, runtime.NEEDED)) else runtime.environment_to_activate()
    for name, command in runtime.NEEDED.items():
        there = runtime.is_installed(name)
        if broken.get(name):
            yield Finding(name, False, f"cannot be imported ({broken[name]})", "make setup, or install it again as README, \"Install\"")
        else:
            yield Finding(name, there, versions.get(name, "installed") if there else "not installed", "" if there else activate or command)
    for name, (use, command) in OPTIONAL.items():
        there = runtime.is_installed(name)
        if broken.get(name):
            yield Finding(name, None, f"cannot be {'imported' if name == 'ffcv' else 'used'} ({broken[name]}); for {use}",
                          "echo again >>.venv/ready && make setup" if name == "ffcv" else NUMBA_AGAIN)
        elif there:
            yield Finding(name, True, versions.get(name, "installed"))
        else:
            yield Finding(name, None, f"not installed; for {use}", activate or command)
    if runtime.is_installed("torch") and runtime.is_installed("numpy") and not broken.get("torch"):
        machine = runtime.describe_machine()
        yield Finding("GPU", True if "gpu" in machine else None, str(machine.get("gpu", "none: trainings run on the CPU")))
        if "gpu" in machine:
            there = runtime.is_installed("triton")
            yield Finding("triton", there or None, "installed" if there else "not installed; for the GPU's quicker passes in long trainings",
                          "" if there else "pip install triton")
        bf16 = machine["cpu_bf16"]
        yield Finding("bf16 on the CPU", True if bf16 != "none" else None, str(bf16) if bf16 != "none" else
                      f"none ({machine.get('cpu_vectors', 'unknown vectors')}): trainings run in fp32, several times slower than with AMX")
        yield Finding("cores", machine["cores"] > 1 or None, f"{machine['cores']}, torch uses {machine['torch_threads']}")
    free = runtime.free_memory_of_machine() / 2**30
    yield Finding("free memory", free >= 2 or None, f"{free:.1f} GiB", "" if free >= 2 else "smaller loader.batch_size, loader.mode stream")
    place = data if data.exists() else Path(".")
    room = shutil.disk_usage(place).free / 2**30
    yield Finding("free disk", room >= 1 or None, f"{room:.1f} GiB at {place.resolve()}", "" if room >= 1 else "free some")
    if runtime.is_installed("numpy"):
        yield from _data(data, sorted(file for file in data.glob("[!.]*") if file.suffix.lower() == ".beton"))


def why_not_imported(package: str) -> str:
    """The last line of what a process of its own says that imports `package`, or tries it; nothing where that works."""
    trial = TRIALS.get(package, f"import {package}")
    # at once: the interpreter takes a second to take down what torch has made
    code = f"import os, sys; sys.path.append({str(Path(__file__).parents[1])!r}); {trial}; os._exit(0)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]) if done.returncode else ""


def _data(data: Path, betons: list[Path]) -> Iterator[Finding]:
    from seresnet.beton import WRITE, open_beton
    from seresnet.sources import MissingError, find_source, hint
    for path in betons:
        try:
            found = open_beton(path)
            yield Finding(path.name, True, f"{found.samples:,} images of {found.width} x {found.height}, {len(found.classes)} classes")
        except runtime.UserError as error:
            yield Finding(path.name, False, str(error), f"{WRITE} --force")
    if not betons:
        try:
            found = find_source(data)
            recipe = {"cifar10": "se94.yaml", "": "se94.yaml" if found.kind == "archive" else "own_images.yaml",
                      "cifar100": "se95.yaml --beton.train data/cifar100_train.beton --beton.test data/cifar100_test.beton"}[found.official_name()]
            yield Finding("data", True, f"{found.describe()}, not converted yet",
                          f"python write_datasets.py --config-file rn_configs/{recipe} --sources.path {shlex.quote(str(data))}")
        except MissingError:
            yield Finding("data", None, f"none in {data.resolve()}{hint(data)}", "make train CIFAR10_DIR=..., or python write_datasets.py "
                          "--config-file rn_configs/se94.yaml --sources.path /path/to/cifar10 (or --sources.kind download)")
        except runtime.UserError as error:    # several sets, or one that may not be read: it says which
            yield Finding("data", None, str(error))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seresnet.doctor", description="What is there to train with, and what is missing.")
    parser.add_argument("data", nargs="?", default="data", type=Path, help="folder of the data [data]")
    findings = list(examine(parser.parse_args(sys.argv[1:]).data))
    marks = {True: "ok", None: "-", False: "MISSING"}
    rows = [(f.what, marks[f.good], f.detail, f.mend) for f in findings]
    if runtime.is_installed("numpy") and runtime.is_installed("yaml"):
        from seresnet import report
        report.say(report.table(("what", "", "found", "to mend it"), rows))
    else:
        sys.stdout.write("".join("  ".join(filter(None, row)) + "\n" for row in rows))
    return 0 if all(finding.good is not False for finding in findings) else 2


if __name__ == "__main__":
    runtime.run_program(main)

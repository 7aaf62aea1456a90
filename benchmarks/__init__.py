"""Benchmarks of the project; each prints one table and, where asked to, keeps what it measured as JSON."""
import argparse
import json
import re
import sys
from pathlib import Path

from seresnet import runtime

runtime.check_packages()    # each benchmark is a program that imports them next

from seresnet import report    # noqa: E402


def problems_with(own, **least: int) -> list[str]:
    """A line for each of a benchmark's own arguments that is below its least value."""
    return [f"--{name.replace('_', '-')}: got {getattr(own, name)}, expected {value} and more" for name, value in least.items()
            if getattr(own, name) < value]


def device_of(settings):
    """The device of `settings`, with the allocator and the threads that a training there has. Before torch is imported: it may start the
    program again."""
    if settings.run.tune_allocator:
        runtime.tune_allocator(settings.run.device)
    device = runtime.pick_device(settings.run.device)
    runtime.set_threads(settings.run.threads)
    return device


def out_folder(name: str) -> str:
    """An argument that names the folder to keep results in: it is made now, since what is measured may take an hour."""
    try:
        report.create_folder(Path(name))
    except runtime.UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def keep(folder: str | None, name: str, recipe: str, result: dict) -> None:
    """Write `<folder>/<name>.json`: the result with the command that gave it, and the machine, versions and commit, which are this
    process's where the result does not name them; nothing without a folder."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        record = {"recipe": recipe, "machine": runtime.describe_machine(), "versions": runtime.describe_versions(),
                  "commit": runtime.git_commit(), **result, "command": ["python", *sys.orig_argv[1:]]}
        (Path(folder) / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def short(commit: str) -> str:
    """A commit, or several in one text, for a line of words; `+changes` behind one stays."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


def own_memory() -> int:
    """Bytes of this process that are not pages of a file: what grows is kept, not cached. 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0

"""Run one of airbench's scripts on the CPU in float32, as published but for what names a GPU, and print what it prints.

python on_cpu.py SCRIPT --cifar10 CIFAR10_DIR [--runs 1] [--epochs E] [--test-images N]

SCRIPT: airbench94_muon.py, airbench95.py or airbench96_faster.py of KellerJordan/cifar10-airbench. Nothing of it is edited on disk. Replaced
while it is loaded: `.cuda()` and `.half()` (tensors and modules stay float32, on the CPU), `.bfloat16()` in Muon (a CPU without bfloat16
emulates it), torch.compile (left out: slower than eager on a CPU, records/2026-11-25_half_the_images), CUDA's events (a clock), the number
of runs; there is no run to warm up. With --epochs the script trains for so many epochs (0.2: a fifth of one). The seconds from each step of
an optimizer to its next are printed at the end, the first left out. glibc's allocator and the threads are set as for this project's trainings.
"""
import argparse
import re
import statistics
import sys
import time
from pathlib import Path

from seresnet.runtime import import_torchvision, set_threads, tune_allocator

if __name__ == "__main__":
    tune_allocator()

import torch    # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook    # noqa: E402

from seresnet.sources import find_source    # noqa: E402


class Event:
    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def write(source: Path, target: Path, tested: int) -> None:
    """CIFAR-10 as the tensors on disk that the scripts look for."""
    target.mkdir(parents=True, exist_ok=True)
    found = find_source(source).read()
    for name, split, images in (("train", found.train, None), ("test", found.test, tested)):
        torch.save({"images": torch.from_numpy(split.images[:images]), "labels": torch.from_numpy(split.labels[:images]),
                    "classes": list(found.classes)}, target / f"{name}.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("script", type=Path)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--test-images", type=int, default=10_000)
    wanted = parser.parse_args()
    set_threads(0)
    import_torchvision()    # beside a CPU build of torch

    code = wanted.script.read_text(encoding="utf-8")
    code, runs = re.subn(r"range\((200|25)\)", f"range({wanted.runs})", code)
    code = code.replace('main("warmup", model)', "").replace("main('warmup')", "").replace(".bfloat16()", ".float()")
    code = code.replace("torch.device(gpu)", '"cpu"')
    if runs != 1:
        raise SystemExit(f"{wanted.script}: expected one number of runs, found {runs}")
    if wanted.epochs is not None:
        code, _ = re.subn(r"'train_epochs': [0-9.]+", f"'train_epochs': {wanted.epochs}", code)
        code = code.replace("ceil(8 * len(train_loader))", f"ceil({wanted.epochs} * len(train_loader))")

    write(wanted.cifar10, Path("cifar10"), wanted.test_images)
    load = torch.load
    torch.load = lambda path, map_location=None: load(path, map_location="cpu")
    torch.Tensor.cuda = torch.nn.Module.cuda = torch.nn.Module.compile = lambda self, *_, **__: self
    torch.Tensor.half = torch.Tensor.float
    torch.nn.Module.half = torch.nn.Module.float
    torch.cuda.Event, torch.cuda.synchronize = Event, lambda: None

    def compile_(thing=None, **_):
        if isinstance(thing, torch.nn.Module):
            object.__setattr__(thing, "_orig_mod", thing)
        return thing if thing is not None else lambda function: function

    torch.compile = compile_
    steps: dict[int, list[float]] = {}
    register_optimizer_step_post_hook(lambda optimizer, *_: steps.setdefault(id(optimizer), []).append(time.perf_counter()))
    sys.argv = [str(wanted.script)]
    names = {"__name__": "__main__", "__file__": str(wanted.script)}
    exec(compile(code, str(wanted.script), "exec"), names)
    for times in steps.values():
        seconds = [after - before for before, after in zip(times[1:], times[2:])]    # the first one is the slowest: memory is new
        if seconds:
            print(f"{len(times)} steps: {statistics.median(seconds):.2f} s from one to the next (median of {len(seconds)}; {min(seconds):.2f} to "
                  f"{max(seconds):.2f})")


if __name__ == "__main__":
    main()

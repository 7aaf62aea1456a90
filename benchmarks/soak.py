"""Does it stay flat: python -m benchmarks.soak --config-file rn_configs/digits.yaml [--minutes 60] [--out DIR]

One process, on scikit-learn's digits, in a folder of its own. Half of the time short rounds, one after the other: convert,
train two epochs (streamed and resident in turn), predict from the run folder. The other half one training of many epochs,
which SIGTERM ends. All the while memory, threads, open files and shared-memory segments are counted every two seconds.
Flat means, in each half and past its first quarter: the last quarter's median of memory lies no more than 2% above that of
the quarter behind the first, and the medians of threads, files and segments are no higher. Linux alone, which has /proc.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import keep, out_folder
from seresnet import config, runtime

COUNTED = {"memory_mib": "memory, MiB", "threads": "threads", "files": "open files", "segments": "shared-memory segments"}
MORE_MEMORY = 1.02    # of the last quarter, as a multiple of the second one's, that still counts as flat
MOMENT = 2    # files, threads or segments that are there for a moment, and are counted in one quarter by chance


def count() -> dict[str, float]:
    """This process's own memory (without files that are mapped, which the kernel takes back), threads, open files, and the
    machine's shared-memory segments of this user."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    segments = [entry for entry in os.scandir("/dev/shm") if entry.stat(follow_symlinks=False).st_uid == os.getuid()]
    return {"memory_mib": own / 1024, "threads": int(lines["Threads"]), "files": len(os.listdir("/proc/self/fd")),
            "segments": len(segments)}


class Counting:
    """Counts in a thread of its own, every `interval` seconds while its block runs; `rows` also hold `second` and `done`."""

    def __init__(self, done: Callable[[], int], interval: float = 2.0):
        self.rows: list[dict[str, float]] = []
        self._done, self._interval, self._left = done, interval, threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Counting:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        self._thread.join()

    def _count(self) -> None:
        while not self._left.wait(self._interval):
            with contextlib.suppress(FileNotFoundError):    # somebody's segment that went while it was looked at
                self.rows.append({"second": time.monotonic() - self._started, "done": self._done(), **count()})


def quarters(rows: list[dict[str, float]]) -> list[dict[str, dict[str, float]]]:
    """Of each quarter of the rows: median and maximum of everything counted."""
    edges = [len(rows) * i // 4 for i in range(5)]
    return [{name: {"median": statistics.median(row[name] for row in part), "most": max(row[name] for row in part)}
             for name in COUNTED} for part in (rows[a:b] for a, b in zip(edges, edges[1:]))]


def rising(parts: list[dict[str, dict[str, float]]]) -> list[str]:
    """What is not flat from the second quarter to the last, by its name in COUNTED."""
    second, last = parts[1], parts[3]
    found = [name for name in ("threads", "files", "segments") if last[name]["median"] > second[name]["median"]
             or last[name]["most"] > second[name]["most"] + MOMENT]
    if last["memory_mib"]["median"] > MORE_MEMORY * second["memory_mib"]["median"]:
        found.insert(0, "memory_mib")
    return found


def rounds(settings: config.Config, folder: Path, seconds: float) -> tuple[list[dict[str, float]], int]:
    """Convert, train, predict, again and again for `seconds`. Returns what was counted, and the number of rounds."""
    from seresnet import beton, loop, sources, trained
    done = 0
    with Counting(lambda: done) as counting:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            images = sources.find_source(folder, "digits").read()
            for name in ("train", "test"):
                beton.write_beton(getattr(settings.beton, name), getattr(images, name), classes=images.classes, name=images.name,
                                  source=images.source, fingerprint=f"{done}")
            run = folder / f"round-{done}"
            mode = ("stream", "resident")[done % 2] if runtime.has_ffcv() else "resident"
            loop.fit(replace(settings, loader=replace(settings.loader, mode=mode), loop=config.Loop(epochs=2),
                             run=replace(settings.run, folder=str(run), seed=done),
                             optim=replace(settings.optim, warmup_epochs=1.0)), ["soak"])
            trained.load(run, "cpu").predict(images.test.images)
            shutil.rmtree(run)
            done += 1
    return counting.rows, done


def epochs(settings: config.Config, folder: Path, seconds: float) -> tuple[list[dict[str, float]], int]:
    """One streamed training for `seconds`, ended by SIGTERM. Returns what was counted, and the number of epochs."""
    from seresnet import loop
    run = folder / "epochs"

    def done() -> int:
        with contextlib.suppress(FileNotFoundError):
            return (run / "log.jsonl").read_bytes().count(b"\n")
        return 0
    alarm = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    with Counting(done) as counting:
        alarm.start()
        with contextlib.suppress(runtime.Interrupted):
            loop.fit(replace(settings, loader=replace(settings.loader, mode="stream" if runtime.has_ffcv() else "resident"),
                             loop=config.Loop(epochs=1_000_000), run=replace(settings.run, folder=str(run))), ["soak"])
    return counting.rows, done()


def table(name: str, parts: list[dict[str, dict[str, float]]]) -> str:
    """One Markdown table: median and maximum of each quarter."""
    lines = [f"| {name} | 1st quarter | 2nd | 3rd | 4th |", "|---|---|---|---|---|"]
    for key, title in COUNTED.items():
        cells = (f"{part[key]['median']:.0f} (at most {part[key]['most']:.0f})" for part in parts)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long, both halves together (default 60)")
    parser.add_argument("--out", type=out_folder, help="folder for soak.json; none is written without it")
    settings, own = config.parse(sys.argv[1:], parser)
    if not own.minutes > 0:
        raise runtime.UserError(f"--minutes: got {own.minutes}, expected more than 0")
    if not sys.platform.startswith("linux"):
        raise runtime.UserError("benchmarks.soak: counts from /proc, which only Linux has")
    if settings.run.tune_allocator:
        runtime.tune_allocator(settings.run.device)
    result, verdict = {"minutes": own.minutes}, []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        settings = replace(settings, beton=replace(settings.beton, train=str(folder / "train.beton"), test=str(folder / "test.beton")),
                           report=replace(settings.report, curves=False))
        for name, half in (("rounds", rounds), ("epochs", epochs)):
            with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
                rows, done = half(settings, folder, own.minutes * 30)
            if len(rows) < 8:
                raise runtime.UserError(f"--minutes: {own.minutes} are too few to tell: {len(rows)} counts of each half")
            parts = quarters(rows)
            print(f"{table(f'{done:,} {name}', parts)}\n", flush=True)
            verdict += [f"{COUNTED[key]} ({name})" for key in rising(parts)]
            result[name] = {"done": done, "quarters": parts, "rising": rising(parts), "rows": rows}
    print("flat" if not verdict else f"NOT flat: {', '.join(verdict)}")
    keep(own.out, "soak", settings.recipe, result)
    return 1 if verdict else 0


if __name__ == "__main__":
    runtime.run_program(main)

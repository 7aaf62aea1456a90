"""A trained net -> labels for images it never saw: python -m seresnet.predict --checkpoint runs/X --images FILE_OR_DIR --out FILE

Writes a CSV with a line an image, in the input's order: `ID,Labels`, with `--format proba` the probability of each class
behind them. Exit status: 0 done, 2 something to mend in the arguments, the images or the disk.
"""
from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Sequence

from seresnet import runtime

if __name__ == "__main__":
    runtime.check_packages()
    runtime.tune_allocator()    # before torch is imported: it starts this once more

import numpy as np    # noqa: E402

from seresnet import report, trained    # noqa: E402
from seresnet.files import FITS    # noqa: E402
from seresnet.inputs import read_unlabelled    # noqa: E402
from seresnet.tta import VIEWS    # noqa: E402


def as_csv(ids: Sequence[str], probabilities: np.ndarray, classes: Sequence[str], *, names: bool, proba: bool,
           header: Sequence[str] = ("ID", "Labels")) -> str:
    """The text of a CSV file: header, then id and label (number, or class name) an image, with `proba` a column a class."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*header, *(classes if proba else ())])
    for name, row in zip(ids, probabilities, strict=True):
        label = int(row.argmax())
        writer.writerow([name, classes[label] if names else label, *(f"{value:.6f}" for value in row if proba)])
    return file.getvalue()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seresnet.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or its weights.pt or best.pt")
    parser.add_argument("--images", required=True, metavar="FILE_OR_DIR",
                        help="image folder or picture, .npy, .npz, .beton, CIFAR's .bin, or a pickle of a dict with `data` and perhaps `ids`")
    parser.add_argument("--out", required=True, metavar="FILE", help="CSV file to write; - for standard output")
    parser.add_argument("--tta", choices=tuple(VIEWS), default="", help="test-time augmentation of all images [as the recipe ends]")
    parser.add_argument("--format", choices=("kaggle", "proba"), default="kaggle",
                        help="ID,Labels alone, or with every class's probability [kaggle]")
    parser.add_argument("--names", action="store_true", help="write class names instead of their numbers")
    parser.add_argument("--suffix", action="store_true", help="pictures' ids as their files are called, with .png or .jpg")
    parser.add_argument("--header", default="ID,Labels", help="what the two columns are called, such as id,label [ID,Labels]")
    parser.add_argument("--fit", choices=("auto", "none", *FITS), default="auto",
                        help="bring images of another size to the net's; auto: as its training images were [auto]")
    parser.add_argument("--batch-size", type=int, default=0, help="images a forward pass [the recipe's evaluate.batch_size]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    options = parser.parse_args(sys.argv[1:])
    if options.batch_size < 0:
        parser.error(f"--batch-size: got {options.batch_size}, expected 1 and more, or 0 for the recipe's")
    header = [name.strip() for name in options.header.split(",")]
    if len(header) != 2 or not all(header):
        parser.error(f"--header: got {options.header!r}, expected two names with a comma between them, such as id,label")
    to_stdout = options.out == "-"
    if not to_stdout:
        report.check_writable(options.out, options.checkpoint, options.images)
    net = trained.load(options.checkpoint, options.device)
    sources = net.config["sources"]
    fit = (sources["fit"] if sources["image_size"] else "none") if options.fit == "auto" else options.fit
    started = time.perf_counter()
    found = read_unlabelled(options.images, net.image_size, fit, report.watched("reading", " images"), options.suffix)
    read_seconds = time.perf_counter() - started
    probabilities = net.probabilities(found.images, options.tta, options.batch_size, watch=report.watched("images"))
    seconds = time.perf_counter() - started
    text = as_csv(found.ids, probabilities, net.classes, names=options.names, proba=options.format == "proba", header=header)
    if to_stdout:
        report.say(text.removesuffix("\n"))
    else:
        report.write_text(options.out, text)
    for line in filter(None, (found.left_out, found.fitted)):
        report.say(line, aside=to_stdout)
    report.say(f"{len(found.ids):,} images in {seconds:.1f} s ({len(found.ids) / seconds:,.0f} images/s; reading {read_seconds:.1f} s), "
               f"{net.path}{net.progress}, TTA {options.tta or net.tta}: {options.out}", aside=to_stdout)


if __name__ == "__main__":
    runtime.run_program(main)

"""Exact accuracy with test-time augmentation: views averaged before the decision, every sample counted once; and what a
trained net does well and badly on a labelled set: python -m seresnet.evaluate --checkpoint runs/X --data BETON_OR_DIR
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from seresnet import runtime

if __name__ == "__main__":
    runtime.check_packages()
    runtime.tune_allocator()    # before torch is imported: it starts this once more

import numpy as np    # noqa: E402
import torch    # noqa: E402
import torch.nn.functional as F    # noqa: E402
from torch import nn    # noqa: E402

from seresnet import beton, pictures, report, shift, sources, trained    # noqa: E402
from seresnet.augment import normalise    # noqa: E402
from seresnet.files import FEWER, FITS, check_room, fit_images    # noqa: E402
from seresnet.loss import Tally, Totals    # noqa: E402
from seresnet.tta import VIEWS, log_probabilities    # noqa: E402

RESIZED_BY = "--fit resize or --fit crop"


class Evaluation(NamedTuple):
    """Totals of the plain images, and of the views together."""

    plain: Totals
    tta: Totals


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable, *, samples: int, mean: Sequence[float], std: Sequence[float],
             tta: str, dtype: torch.dtype, device: torch.device, sure: float = 1.0,
             gather: Callable[[torch.Tensor], torch.Tensor] = lambda row: row[None]) -> Evaluation:
    """Accuracy and mean cross-entropy of `model` over `batches` (of loader.Batch), with and without the views.

    samples: how many there must be; RuntimeError where another number was seen. mean, std: a channel, in pixel values,
    those of the training split. tta, sure: as of tta.log_probabilities. gather: as of loss.Tally, where several processes have a
    share of the samples each. The model is in evaluation mode while it runs and as it was afterwards.
    """
    was_training, benchmark = model.training, torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = False    # `sure` leaves another number of images of each batch: trying algorithms costs seconds
    plain, together = Tally(device, gather), Tally(device, gather)
    try:
        for batch in batches:
            if not len(batch.labels):    # the last batch had none for this process
                continue
            first, mean_view = log_probabilities(model, normalise(batch.images, mean, std, dtype), tta, dtype, sure)
            for tally, scores in ((plain, first), (together, mean_view)):
                tally.add(scores, batch.labels, F.nll_loss(scores, batch.labels))
    finally:
        model.train(was_training)
        torch.backends.cudnn.benchmark = benchmark
    result = Evaluation(plain.read(), together.read())
    if result.plain.seen != samples:
        raise RuntimeError(f"evaluated {result.plain.seen} samples, the split has {samples}")
    return result


# -- a trained net on a labelled set ------------------------------------------------------------------------------------

def measure(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict:
    """Figures of a set from its predicted probabilities, float (N, K), and labels, int64 (N,) in [0, K).

    `accuracy`; `loss`, the mean negative log of the true class's probability, in nats; `calibration_error`, the expected
    calibration error over `bins` equal bins of confidence (Guo et al., arXiv 1706.04599, section 2); `confusion`, integers
    (K, K), a row a true class; `recall` and `precision` a class, NaN where it has no sample or is never predicted.
    """
    classes, predicted = probabilities.shape[1], probabilities.argmax(1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    confidence, correct = probabilities.max(1), predicted == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(correct[places == b].mean() - confidence[places == b].mean()) * (places == b).mean()
            for b in range(bins) if (places == b).any()]
    hits = np.diag(confusion).astype(float)
    with np.errstate(invalid="ignore"):
        recall, precision = hits / confusion.sum(1), hits / confusion.sum(0)
    true = np.maximum(probabilities[np.arange(len(labels)), labels].astype(np.float64), np.finfo(np.float32).tiny)
    return {"accuracy": float(correct.mean()), "loss": float(-np.log(true).mean()), "calibration_error": float(sum(gaps)),
            "confusion": confusion, "recall": recall, "precision": precision}


def read_labelled(path: Path | str, net: trained.TrainedNet, split: str = "test", fit: str = "auto") -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 (N, H, W, 3), labels int64 (N,), numbers into `net.classes`, and a description: a beton's, or a data set's test
    split; with the split `all` the whole set, training images and test images. The set may lack classes of the net. fit: as of
    inputs.read_unlabelled, or `auto`: a set as the net's own images were, a beton as it is.

    Raises UserError where they do not fit the net's classes and image size.
    """
    path = Path(path)
    if not path.exists():
        raise runtime.UserError(f"--data {path}: does not exist (looked in {Path.cwd()})")
    if path.suffix.lower() == ".beton":
        opened = beton.open_beton(path)
        check_room(opened.samples * opened.height * opened.width * 3, FEWER)
        images, labels, classes, text = beton.read_images(opened), opened.labels, opened.classes, str(opened.path)
        if fit in FITS:
            images = fit_images(images, net.image_size, fit, FEWER)
        if _trained_on(net).get("train_sha256") == opened.sha256:
            text += " (which the net was trained on: this tells nothing of other images)"
    else:
        images, labels, classes, text = _read_set(path, net, split, fit)
    problems = []
    if strangers := sorted(set(classes) - set(net.classes)):
        way_out = "give images of the classes that it was trained on"
        if all(name.isdecimal() for name in classes) and len(classes) <= len(net.classes):    # numbers, for want of names
            way_out += ", by their names: an array `classes` names them in an .npz file"
        problems.append(f"--data {path}: has classes that the net has not ({report.some(strangers, 5)}), whose {len(net.classes)} are "
                        f"{report.some(net.classes, 5)}: {way_out}")
    else:
        labels = np.array([net.classes.index(name) for name in classes], np.int64)[labels]
    if images.shape[1:3] != (net.image_size, net.image_size):
        problems.append(f"--data {path}: has images of {images.shape[2]} x {images.shape[1]} pixels, the net takes {net.image_size} x "
                        f"{net.image_size}: give {RESIZED_BY}")
    if problems:
        raise runtime.UserError(*problems)
    return images, labels, text


def _read_set(path: Path, net: trained.TrainedNet, split: str, fit: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """Images, labels, numbers into the classes that follow, and a description, of a data set read as `net`'s own was."""
    how = {name: net.config["sources"][name] for name in beton.HOW}
    fitted = {} if fit == "auto" else {"image_size": 0} if fit == "none" else {"image_size": net.image_size, "fit": fit}
    try:
        source = sources.find_source(path, **how | fitted, watch=report.watched("reading", " images"), for_training=False, resized_by=RESIZED_BY)
    except sources.MissingError as error:
        betons = sorted(file.name for file in path.glob("[!.]*.beton"))
        raise runtime.UserError(f"--data {path}: holds no data set that we read" + (
            f", but {', '.join(betons[:5])}: name one of them" if betons else ": name a beton, or images in one of the README's layouts")
        ) from error
    known = split == "all" and _holds_what_was_trained_on(replace(source, **how), net)    # before its images are in memory: it may read files whole
    found = source.read()
    images, labels = found.test.images, found.test.labels
    if split == "all":
        check_room(found.train.images.nbytes + images.nbytes, FEWER)
        images, labels = np.concatenate([found.train.images, images]), np.concatenate([found.train.labels, labels])
    part = "all of it" if split == "all" else "test split" if not found.held_back else (
        f"which has no test split: {source.test_share:.0%} of each class; --split all takes all")
    classes, text, passed_over = found.classes, f"{found.source}, {part}", source.left_out()
    if passed_over:
        text += f" ({passed_over})"
    if known:
        text += " (with the images that the net was trained on: this tells little of others)"
    return images, labels, classes, text


def measure_shift(net: trained.TrainedNet, images: np.ndarray, labels: np.ndarray, tta: str = "", batch_size: int = 0) -> dict[str, list[float]]:
    """Accuracy under each of shift.CORRUPTIONS, a list over the severities 1 to 5. Thirty times as long as clean images, and with a bar."""
    kinds = [(name, severity) for name in shift.CORRUPTIONS for severity in shift.SEVERITIES]
    found: dict[str, list[float]] = {name: [] for name in shift.CORRUPTIONS}
    for name, severity in report.progress(kinds, len(kinds), "corruptions"):
        found[name].append(float((net.predict(shift.corrupt(images, name, severity), tta, batch_size) == labels).mean()))
    return found


def _trained_on(net: trained.TrainedNet) -> dict:
    """What its run folder says of the images that `net` was trained on; nothing where it lies elsewhere. Runs of earlier versions say so in
    their report alone."""
    said = (report.read_json(net.path.parent / name).get("data") for name in ("environment.json", "report.json"))
    return next((data for data in said if isinstance(data, dict)), {})


def _holds_what_was_trained_on(source: sources.Source, net: trained.TrainedNet) -> bool:
    """Whether `net` was trained on a part of the set: CIFAR's in whatever layout, another as long as its files and its folder's name are the
    same (they are read once for that, if one of the kind was trained on)."""
    data, name = _trained_on(net), source.official_name()
    if name:
        return data.get("set") == name
    recorded = data.get("fingerprint")
    if not isinstance(recorded, str) or not recorded.startswith(f"{source.kind}-"):
        return False
    return recorded.rpartition("-")[2] == source.fingerprint().rpartition("-")[2]    # whatever version of the reading it was


def _own_folder(folder: Path, place: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... where no set of another place than `place` was evaluated."""
    numbered = chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in count(2)))
    return next(path for path in numbered if report.read_json(path / "evaluation.json").get("place", str(place)) == str(place))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seresnet.evaluate", description="What a trained net does well and badly.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or its weights.pt or best.pt")
    parser.add_argument("--data", required=True, metavar="BETON_OR_DIR", help="a beton, or a data set, whose test split is taken")
    parser.add_argument("--split", choices=("test", "all"), default="test", help="of a data set; `all` for one that was not trained on [test]")
    parser.add_argument("--fit", choices=("auto", "none", *FITS), default="auto",
                        help="bring images of another size to the net's; auto: a data set's as its training images were [auto]")
    parser.add_argument("--tta", choices=tuple(VIEWS), default="", help="test-time augmentation of all images [as the recipe ends]")
    parser.add_argument("--shift", action="store_true", help="also under six corruptions at five severities: 30 evaluations more")
    parser.add_argument("--batch-size", type=int, default=0, help="images a forward pass [the recipe's evaluate.batch_size]")
    parser.add_argument("--out", metavar="DIR", help="folder for figures and pictures [evaluation/<name of the data> beside the checkpoint, "
                        "-2 behind it for another set of that name]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    options = parser.parse_args(sys.argv[1:])
    if options.batch_size < 0:
        parser.error(f"--batch-size: got {options.batch_size}, expected 1 and more, or 0 for the recipe's")
    net = trained.load(options.checkpoint, options.device)
    images, labels, text = read_labelled(options.data, net, options.split, options.fit)
    place = Path(options.data).resolve()
    what = [place.stem if place.suffix.lower() == ".beton" else place.name, *(["all"] if options.split == "all" else []),
            *([net.path.stem] if net.path.name != "weights.pt" else [])]
    folder = Path(options.out) if options.out else _own_folder(net.path.parent / "evaluation" / "-".join(what), place)
    report.create_folder(folder)
    earlier = report.read_json(folder / "evaluation.json")
    started = time.perf_counter()
    probabilities = net.probabilities(images, options.tta, options.batch_size, watch=report.watched("images"))
    seconds = time.perf_counter() - started
    found = measure(probabilities, labels)
    report.say(f"{text}: {len(labels):,} images in {seconds:.1f} s, {net.path}{net.progress}, TTA {options.tta or net.tta}\n"
               f"accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}, calibration error {found['calibration_error']:.2%}")
    outcome = {"data": text, "place": str(place), "images": len(labels), "checkpoint": str(net.path), "epochs_done": net.epochs_done,
               "tta": options.tta or net.tta, "seconds": seconds, **{
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}, "classes": list(net.classes),
        "probabilities_sha256": hashlib.sha256(probabilities.tobytes() + labels.tobytes()).hexdigest()}
    same = earlier.get("probabilities_sha256") == outcome["probabilities_sha256"]    # net, images and views, to the bit
    if same and "shift" in earlier:
        outcome |= {name: earlier[name] for name in ("shift", "shift_accuracy")}
    written = ["evaluation.json"]
    try:    # the files first: whoever reads the tables may stop reading; but these come whatever becomes of the files
        _write(folder, outcome)
        for file, was_made in (("mistakes.png", earlier.get("accuracy") != 1), ("shift.png", "shift" in earlier)):
            if earlier and was_made and not same:    # what an earlier evaluation left; what is a user's own stays
                (folder / file).unlink(missing_ok=True)
        if options.shift:
            found = measure_shift(net, images, labels, options.tta, options.batch_size)
            outcome |= {"shift": found, "shift_accuracy": float(np.mean([np.mean(values) for values in found.values()]))}
            _write(folder, outcome)
        if draws := runtime.is_installed("matplotlib"):
            written += _draw(folder, net, outcome, images, labels, probabilities)
    finally:
        for table in _tables(outcome, with_shift=options.shift and "shift" in outcome):
            report.say("\n" + table)
    report.say(f"\n{folder}: {', '.join(written)}" + (
        "" if draws else "; pictures are drawn with matplotlib, which is not installed: pip install matplotlib"))


def _write(folder: Path, outcome: dict) -> None:
    report.write_text(folder / "evaluation.json", json.dumps(report.strict(outcome), indent=1, allow_nan=False) + "\n")


def _draw(folder: Path, net: trained.TrainedNet, outcome: dict, images: np.ndarray, labels: np.ndarray,
          probabilities: np.ndarray) -> list[str]:
    """The pictures of an evaluation, into `folder`, by the names of their files."""
    name = net.path.parent.name + ("" if net.path.name == "weights.pt" else f"/{net.path.name}") + net.progress
    pictures.draw_confusion(np.array(outcome["confusion"]), net.classes, f"{name}: {outcome['accuracy']:.2%} of {len(labels):,} images",
                            folder / "confusion.png")
    written, wrong = ["confusion.png"], np.flatnonzero(probabilities.argmax(1) != labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:40]
    if len(wrong):
        captions = [f"{net.classes[labels[i]][:14]}\n\u2192 {net.classes[probabilities[i].argmax()][:14]} {probabilities[i].max():.0%}"
                    for i in wrong]
        pictures.draw_sheet(images[wrong], captions, "the most confident mistakes: true class \u2192 prediction", folder / "mistakes.png",
                            columns=8)
        written.append("mistakes.png")
    if "shift" in outcome:
        pictures.draw_shift(outcome["shift"], outcome["accuracy"], f"{name}: accuracy under corruption", folder / "shift.png")
        written.append("shift.png")
    return written


def _tables(outcome: dict, with_shift: bool) -> Iterable[str]:
    """What the files hold, for people: the classes, what they are taken for where that is not too wide, and the corruptions."""
    classes, counts = outcome["classes"], outcome["confusion"]
    shares = [[f"{v:.1%}" if v == v else "-" for v in outcome[name]] for name in ("recall", "precision")]
    yield report.table(("class", "images", "recall", "precision"), zip(classes, (str(sum(row)) for row in counts), *shares))
    if len(classes) <= 25:
        short = [name[:6] for name in classes]
        yield report.table(("true \\ predicted", *(short if len(set(short)) == len(short) else classes)),
                           [(name, *map(str, row)) for name, row in zip(classes, counts)])
    if with_shift:
        rows = [(name, *(f"{v:.2%}" for v in (*values, np.mean(values)))) for name, values in outcome["shift"].items()]
        yield report.table(("corruption", *map(str, shift.SEVERITIES), "mean"), [
            *rows, ("all", *[""] * len(shift.SEVERITIES), f"{outcome['shift_accuracy']:.2%}")])


if __name__ == "__main__":
    runtime.run_program(main)

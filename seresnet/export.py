"""A trained net -> one file that needs nothing of ours: python -m seresnet.export --checkpoint runs/X --format onnx|torchscript|exported

In go uint8 RGB images (N, H, W, 3), as they lie in memory; out come float32 probabilities (N, classes): normalisation, and
with `--tta` the other views, are inside. The file is checked against the net on test images with the format's own
runtime before it takes its name. Exit status: 0 done, 2 something to mend, 1 where the file does not do what the net does.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from seresnet import runtime
from seresnet.runtime import UserError

if __name__ == "__main__":
    runtime.check_packages()

import numpy as np    # noqa: E402
import torch    # noqa: E402
import torch.nn.functional as F    # noqa: E402
from torch import nn    # noqa: E402

from seresnet import beton, report, trained    # noqa: E402
from seresnet.tta import VIEWS    # noqa: E402

SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript.pt", "exported": ".pt2"}
CHECKED = 1000           # test images
TOLERANCE = 1e-3         # of a probability, fp32
OPSET = 18


class WithNormalisation(nn.Module):
    """uint8 (N, H, W, 3) -> probabilities float32 (N, classes): a net with all that is around it."""

    def __init__(self, net: trained.TrainedNet, tta: str):
        super().__init__()
        self.model, self.tta = net.model.float(), tta
        self.register_buffer("mean", torch.tensor(net.mean).view(1, 3, 1, 1))
        self.register_buffer("scale", 1 / torch.tensor(net.std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.permute(0, 3, 1, 2).float() - self.mean) * self.scale
        return torch.stack([share * F.softmax(self.model(view(x)), dim=1) for share, view in VIEWS[self.tta]]).sum(0)


def export(net: trained.TrainedNet, kind: str, path: Path, tta: str = "none") -> None:
    """Write `net` to `path` in the format `kind`, a key of SUFFIXES, for any number of images at once.

    Raises UserError where the format's package is not installed.
    """
    module = WithNormalisation(net, tta).eval()
    example = torch.randint(0, 256, (2, net.image_size, net.image_size, 3), dtype=torch.uint8)
    batch = {0: torch.export.Dim("images", min=1, max=1 << 20)}
    with torch.no_grad():
        if kind == "torchscript":
            torch.jit.trace(module, example).save(str(path))
        elif kind == "exported":
            with warnings.catch_warnings(action="ignore", category=UserWarning):    # of views of a tensor, which it keeps: the file is checked
                torch.export.save(torch.export.export(module, (example,), dynamic_shapes=(batch,)), path)
        else:
            _require("onnx", "onnxscript", "onnxruntime")
            with warnings.catch_warnings(action="ignore", category=FutureWarning):    # of torch's own code to itself
                torch.onnx.export(module, (example,), path, dynamo=True, input_names=["images"], output_names=["probabilities"],
                                  dynamic_shapes=(batch,), opset_version=OPSET, external_data=False, verbose=False)


def open_exported(kind: str, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file at `path` in its own runtime, on the CPU: uint8 (N, H, W, 3) -> float32 (N, classes)."""
    if kind == "onnx":
        _require("onnxruntime")
        import onnxruntime
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]
    module = torch.jit.load(str(path)) if kind == "torchscript" else torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()
    return run


def _require(*packages: str) -> None:
    missing = [name for name in packages if not runtime.is_installed(name)]
    if missing:
        raise UserError(f"--format onnx: {', '.join(missing)} not installed: pip install {' '.join(missing)}, or choose exported or "
                        "torchscript")


def latency(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, rounds: int = 20) -> float:
    """Median seconds of a call on `images`, after two to warm up."""
    seconds = []
    for i in range(rounds + 2):
        started = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seresnet.export", description="Write a trained net as one self-contained file.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or its weights.pt or best.pt")
    parser.add_argument("--format", required=True, choices=tuple(SUFFIXES), help="exported: torch.export's")
    parser.add_argument("--out", metavar="FILE", help="file to write [model.<suffix> beside the checkpoint]")
    parser.add_argument("--data", metavar="BETON", help="beton whose first 1,000 images it is checked on [the run's beton.test]")
    parser.add_argument("--tta", choices=tuple(VIEWS), default="none", help="test-time augmentation inside the file [none]")
    options = parser.parse_args(sys.argv[1:])
    net = trained.load(options.checkpoint, "cpu", "fp32")
    try:
        data = beton.open_beton(options.data or net.config["beton"]["test"], image_size=net.image_size)
    except UserError as error:
        raise UserError(*error.problems, "--data BETON names another whose images the file is checked on") from error
    images = beton.read_images(data, np.arange(min(CHECKED, data.samples)))
    path = Path(options.out) if options.out else net.path.parent / f"model{SUFFIXES[options.format]}"
    report.check_writable(path, net.path, data.path, kinds=["." + SUFFIXES[options.format].rpartition(".")[2]])
    temporary = path.with_name(f"unfinished-{os.getpid()}{SUFFIXES[options.format]}")    # torch wants no leading dot
    try:
        export(net, options.format, temporary, options.tta)
        run = open_exported(options.format, temporary)
        parts = np.split(images, range(1, len(images), net.config["evaluate"]["batch_size"]))    # one image alone, and as many as fit
        found, wanted = np.concatenate([run(part) for part in parts]), net.probabilities(images, options.tta)
        worst, same = float(np.abs(found - wanted).max()), bool((found.argmax(1) == wanted.argmax(1)).all())
        if not same or worst > TOLERANCE:
            report.say(f"error: the {options.format} file does not do what the net does: probabilities differ by up to {worst:.2e}, "
                       f"{int((found.argmax(1) != wanted.argmax(1)).sum())} of {len(images)} labels; nothing was written")
            return 1
        one, hundred = latency(run, images[:1]), latency(run, images[:100])
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    report.say(f"{path}: {size / 1e6:.1f} MB; on {len(images):,} images of {data.path} the same labels as the net, probabilities within "
               f"{worst:.1e}; {1e3 * one:.2f} ms for one image, {1e3 * hundred:.1f} ms for {len(images[:100])}")
    return 0


if __name__ == "__main__":
    runtime.run_program(main)

"""A trained net from its run folder: uint8 images in, probabilities out."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from seresnet import checkpoint, runtime
from seresnet.augment import normalise
from seresnet.checkpoint import CheckpointError
from seresnet.config import SECTIONS, build
from seresnet.imageset import problems_of_names
from seresnet.model import shapes_alone
from seresnet.tta import VIEWS, log_probabilities


class TrainedNet:
    """A net with all that it needs to be fed images, in evaluation mode.

    Attributes: `model` (seresnet.model.SEResNet), `classes` (names), `mean` and `std` (a channel, of the training images, in
    pixel values), `image_size` (side in pixels), `config` (sections and keys of the run), `epochs_done`, `tta` (the
    recipe's own test-time augmentation), `device`, `dtype` (number format of the convolutions), `path`.
    """

    def __init__(self, state: dict, path: Path, device: torch.device, dtype: torch.dtype):
        # Keys that came after the checkpoint was written have their defaults, which are what there was before.
        self.config = {name: {**{f.name: f.default for f in fields(section)}, **state["config"].get(name, {})}
                       for name, section in SECTIONS.items()}
        arguments = {name: value for name, value in self.config["model"].items() if name != "max_parameters"}
        build(self.config)    # values in their ranges
        self.model = shapes_alone(arguments)    # what the file claims costs no memory, only what it holds
        self.model.load_state_dict(state["model"], assign=True)
        self.model.to(device, memory_format=torch.channels_last).eval()
        self.classes, self.mean, self.std = tuple(state["classes"]), tuple(state["mean"]), tuple(state["std"])
        for problem in problems_of_names(self.classes):
            raise ValueError(problem)
        if len(self.classes) != arguments["classes"] or not all(
                len(values) == 3 and all(isinstance(v, float) and 0 <= v <= 255 for v in values) for values in (self.mean, self.std)):
            raise ValueError(f"{len(self.classes)} classes, mean {self.mean}, std {self.std}")
        self.epochs_done, self.tta = state["epochs_done"], self.config["evaluate"]["tta"]
        self.image_size, self.path, self.device, self.dtype = arguments["image_size"], path, device, dtype

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray, tta: str = "", batch_size: int = 0, *,
                      watch: Callable[[Sequence[int]], Iterable[int]] = iter) -> np.ndarray:
        """float32 (N, classes), each row a distribution, for uint8 RGB images (N, image_size, image_size, 3).

        tta: test-time augmentation, a key of tta.VIEWS, of all images; '' for what the net's own recipe ends with (its evaluate.tta
        and evaluate.tta_sure), so that its reported accuracy holds. batch_size: images a forward pass, 0 for the recipe's
        evaluate.batch_size. watch: what the numbers of the batches' first images pass through, such as a progress bar. Raises
        ValueError for images of another shape or dtype, or a `tta` that there is not.
        """
        images, side = np.asarray(images), self.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 (N, {side}, {side}, 3)")
        batch_size = batch_size or self.config["evaluate"]["batch_size"]
        sure = 1.0 if tta else self.config["evaluate"]["tta_sure"]
        tta = tta or self.tta
        if tta not in VIEWS:
            raise ValueError(f"tta: got {tta!r}, expected one of {', '.join(VIEWS)}")
        found = [np.empty((0, len(self.classes)), np.float32)]
        with runtime.memory_explained(self.device, f"a batch of {batch_size} images of {side} x {side} pixels",
                                      f"give a batch size of {max(1, batch_size // 2)}"):
            for start in watch(range(0, len(images), batch_size)):
                batch = torch.from_numpy(np.require(images[start:start + batch_size], requirements="CW")).to(self.device).permute(0, 3, 1, 2)
                _, mean_view = log_probabilities(self.model, normalise(batch, self.mean, self.std, self.dtype), tta, self.dtype, sure)
                found.append(mean_view.exp().cpu().numpy())
        return np.concatenate(found)

    @property
    def progress(self) -> str:
        """How much of its training it has had, ' after 2 of 4 epochs'; '' where that is all."""
        epochs = self.config["loop"]["epochs"]
        return "" if self.epochs_done == epochs else f" after {self.epochs_done} of {epochs} epochs"

    def predict(self, images: np.ndarray, tta: str = "", batch_size: int = 0) -> np.ndarray:
        """The most probable class of each image, int64 (N,): numbers into `classes`. Arguments as of `probabilities`."""
        return self.probabilities(images, tta, batch_size).argmax(1).astype(np.int64)


def load(path: Path | str, device: str = "auto", precision: str = "auto") -> TrainedNet:
    """The net of a run folder (its weights.pt), or of the checkpoint file named: weights.pt or best.pt.

    device, precision: as run.device and run.precision. Raises UserError where there is none, or it is not one of ours.
    """
    path = Path(path)
    file = path / "weights.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise CheckpointError(f"{path}: the training was stopped before the end of its first epoch: go on with --run.resume {path}"
                              if (path / "last.pt").exists() else f"{path}: holds no weights.pt: name a run folder, or its weights.pt or best.pt")
    state = checkpoint.load(file)
    missing = {"model", "config", "classes", "mean", "std", "epochs_done"} - state.keys()
    if missing:
        raise CheckpointError(f"{file}: holds no trained net (no {', '.join(sorted(missing))}): name a run folder, or its "
                              "weights.pt or best.pt")
    try:
        where = runtime.pick_device(device)
    except runtime.UserError as error:    # there is no section `run` here
        raise runtime.UserError(*(problem.removeprefix("run.") for problem in error.problems)) from error
    dtype = runtime.pick_dtype(precision, where)
    try:
        return TrainedNet(state, file, where, dtype)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its net cannot be rebuilt ({' '.join(str(error).split())[:200]}): use the version that "
                              "wrote it") from error

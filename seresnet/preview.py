"""What the net sees: python -m seresnet.preview --config-file X [--out FILE] [--section.key value ...]

Draws the first images of an epoch as they are and as the recipe's augmentation makes them in its first epochs.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from seresnet import runtime

if __name__ == "__main__":
    runtime.check_packages()

import numpy as np    # noqa: E402
import torch    # noqa: E402

from seresnet import config, loop, pictures, report    # noqa: E402


def augmented(settings: config.Config, images: int, epochs: int) -> tuple[np.ndarray, list[str]]:
    """uint8 (images * (epochs + 1), H, W, 3) and captions: of each image the original, then what the net sees of it in each
    epoch, brought back to pixel values. The images are those of the first batch."""
    if settings.run.precision == "fp16":    # which wants a GPU; the pictures are made without one
        settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, precision="auto"))
    settings, data, model = loop.prepare(settings)
    shown, captions = [], []
    with loop.open_session(settings, torch.device("cpu"), data, model) as session:
        batch = next(session.train_batches.epoch(0))
        batch = type(batch)(*(part[:images].clone(memory_format=torch.preserve_format) for part in batch))
        columns = [batch.images]
        for epoch in range(epochs):
            seen = session.parts(epoch)["augment"](batch, 0).float()
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.train.mean, data.train.std))
            seen = (seen * std + mean).round().clamp(0, 255).to(torch.uint8)
            margin = data.train.height - seen.shape[2]    # of a crop: black
            columns.append(torch.nn.functional.pad(seen, (margin // 2, margin - margin // 2) * 2))
        for i in range(len(batch.images)):
            shown += [column[i].permute(1, 2, 0).numpy() for column in columns]
            captions += [data.train.classes[int(batch.labels[i])], *[""] * epochs]
    return np.stack(shown), captions


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m seresnet.preview", description="Draw augmented training images.")
    parser.add_argument("--out", default="preview.png", metavar="FILE", help="picture to draw [preview.png]")
    parser.add_argument("--images", type=int, default=6, help="how many [6]")
    parser.add_argument("--epochs", type=int, default=7, help="of how many epochs, of those that the recipe has [7]")
    settings, own = config.parse(sys.argv[1:], parser)
    if own.images < 1 or own.epochs < 1:
        raise config.ConfigError(f"--images, --epochs: got {own.images} and {own.epochs}, expected 1 and more")
    report.check_picture(own.out)
    own.epochs = min(own.epochs, settings.loop.epochs)
    settings = dataclasses.replace(settings, loader=dataclasses.replace(settings.loader, mode="auto", drop_last=False))
    shown, captions = augmented(settings, own.images, own.epochs)
    a = settings.augment
    title = f"{settings.recipe}: flip {a.flip}, translate {a.translate} ({a.padding}), cutout {a.cutout}"
    title += f", crops {list(a.sides)}" if a.sides else ""
    title += "".join(f", {name} {value:g}" for name in ("brightness", "contrast", "blur", "noise") if (value := getattr(a, name)))
    pictures.draw_sheet(shown, captions, title, Path(own.out), columns=own.epochs + 1,
                        column_titles=["original", *(f"epoch {i + 1}" for i in range(own.epochs))])
    report.say(f"{len(shown) // (own.epochs + 1)} images, {own.epochs} epochs of each: {own.out}")


if __name__ == "__main__":
    runtime.run_program(main)

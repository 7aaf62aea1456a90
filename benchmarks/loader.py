"""How fast batches arrive: python -m benchmarks.loader --config-file rn_configs/se94.yaml [--rounds 5] [--out DIR]

Side by side in one process, on the same images and batch size: our loader in both modes (uint8 to the device, and with
the recipe's augmentation to the compute dtype), torchvision's transforms in a torch DataLoader with two workers, and the
pipeline of FFCV's CIFAR-10 example. Every contender passes once over the set in each round, in turn, so that all of
them see the same moods of the machine; the medians over the rounds are reported.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable

from benchmarks import device_of, keep, out_folder
from seresnet import config, report, runtime

WORKERS = 2    # of the DataLoader and of FFCV's example, which leave the augmentation to the CPU


class Contender:
    """A way to get batches. open() returns a function that starts a pass, and is what `first_batch_seconds` starts at."""

    def __init__(self, name: str, open_passes: Callable[[], Callable[[int], Iterable]]):
        self.name, self._open = name, open_passes
        self.rates: list[float] = []
        self.first_batch_seconds = 0.0

    def start(self) -> None:
        """Build the loader and take one batch, compilation included, then pass once over the set as a warm-up."""
        started = time.perf_counter()
        self._pass = self._open()
        batches = iter(self._pass(0))
        next(batches)
        self.first_batch_seconds = time.perf_counter() - started
        for _ in batches:
            pass

    def run(self, epoch: int) -> None:
        started, seen = time.perf_counter(), 0
        for images in self._pass(epoch):
            seen += len(images)
        synchronise()
        self.rates.append(seen / (time.perf_counter() - started))


def synchronise() -> None:
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(beton, settings, mode: str, augmented: bool, device, dtype):
    """Our loader, with the recipe's augmentation where `augmented`."""
    def open_passes():
        from dataclasses import asdict

        import torch

        from seresnet.augment import train_batch
        from seresnet.optim import stepwise
        from seresnet.loader import BatchLoader
        batches = BatchLoader(beton, batch_size=settings.loader.batch_size, device=device, mode=mode, seed=settings.run.seed,
                              workers=settings.loader.workers, batches_ahead=settings.loader.batches_ahead)
        generator, keys = torch.Generator(device), asdict(settings.augment)
        keys["side"] = stepwise(keys.pop("sides"), 0, settings.loop.epochs, 0)

        def one_pass(epoch):
            for batch in batches.epoch(epoch):
                yield batch.images if not augmented else train_batch(
                    batch.images, batch.indices, epoch, **keys, mean=beton.mean, std=beton.std, dtype=dtype,
                    generator=generator, seed=0)
        return one_pass
    what = f"flip, shift, normalise to {str(dtype).removeprefix('torch.')}" if augmented else "uint8"
    return Contender(f"ours, {mode}: {what}", open_passes)


class Images:
    """A data set as torch's DataLoader takes one. Not inside a function: where worker processes are not forked, it is pickled."""

    def __init__(self, images, labels, steps):
        self._images, self._labels, self._steps = images, labels, steps

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        from PIL import Image
        return self._steps(Image.fromarray(self._images[i])), int(self._labels[i])


def torchvision_loader(beton, settings, device):
    """The usual script: PIL images, torchvision's transforms, a DataLoader with worker processes; float32."""
    def open_passes():
        import torch
        runtime.import_torchvision()
        from PIL import Image
        from torchvision import transforms

        from seresnet.beton import read_images
        images, shift = read_images(beton), max(1, settings.augment.translate)
        mode = "reflect" if settings.augment.padding == "reflect" else "constant"
        steps = transforms.Compose([
            transforms.RandomCrop(beton.height, padding=shift, padding_mode=mode), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize([v / 255 for v in beton.mean], [v / 255 for v in beton.std])])

        loader = torch.utils.data.DataLoader(Images(images, beton.labels, steps), settings.loader.batch_size, shuffle=True, num_workers=WORKERS,
                                             persistent_workers=True, pin_memory=device.type == "cuda")

        def one_pass(epoch):
            for batch, labels in loader:
                yield batch.to(device, non_blocking=True)
        return one_pass
    return Contender(f"torchvision DataLoader, {WORKERS} workers: crop, flip, normalise to float32", open_passes)


def ffcv_example(beton, settings, device):
    """The pipeline of FFCV's examples/cifar/train_cifar.py: flip, translate and cutout compiled by numba."""
    def open_passes():
        import torch
        runtime.import_torchvision()
        runtime.import_ffcv()
        with runtime.torch_threads_kept():
            from ffcv.fields.basics import IntDecoder
            from ffcv.fields.rgb_image import SimpleRGBImageDecoder
            from ffcv.loader import Loader, OrderOption
            from ffcv.transforms import Convert, Cutout, RandomHorizontalFlip, RandomTranslate, Squeeze, ToDevice, ToTensor
            from ffcv.transforms import ToTorchImage
            from torchvision.transforms import Normalize
            fill = tuple(map(int, beton.mean))
            half = torch.float16 if device.type == "cuda" else torch.bfloat16
            move = [ToDevice(device)] if device.type == "cuda" else []
            image = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=2, fill=fill),
                     Cutout(4, fill), ToTensor(), *move, ToTorchImage(), Convert(half),
                     Normalize(list(beton.mean), list(beton.std))]
            loader = Loader(str(beton.path), batch_size=settings.loader.batch_size, order=OrderOption.RANDOM,
                            num_workers=min(WORKERS, runtime.available_cores()), drop_last=False, os_cache=True,
                            pipelines={"image": image, "label": [IntDecoder(), ToTensor(), *move, Squeeze(1)]})

        def one_pass(epoch):
            with runtime.torch_threads_kept():
                for batch, labels in loader:
                    yield batch
        return one_pass
    return Contender("FFCV's example: flip, translate, cutout, normalise", open_passes)


def table(rows: list[dict]) -> str:
    """One Markdown table; the last column is against torchvision's DataLoader in the same run."""
    lines = ["| loader | images/s, median | from | to | times DataLoader | first batch, s |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['loader']} | {row['images_per_second']:,.0f} | {row['slowest']:,.0f} | {row['fastest']:,.0f} | "
                     f"{row['times_dataloader']:.1f} | {row['first_batch_seconds']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="passes of each contender (default 5)")
    parser.add_argument("--out", type=out_folder, help="folder for loader.json; none is written without it")
    settings, own = config.parse(sys.argv[1:], parser)
    if own.rounds < 1:
        raise runtime.UserError(f"--rounds: got {own.rounds}, expected at least 1")
    device = device_of(settings)    # it may start the program again: before torch is imported

    from seresnet.beton import open_beton
    dtype = runtime.pick_dtype(settings.run.precision, device)
    beton = open_beton(settings.beton.train)
    contenders = [*(ours(beton, settings, mode, augmented, device, dtype)
                    for mode in ("stream", "resident") for augmented in (False, True)),
                  torchvision_loader(beton, settings, device), ffcv_example(beton, settings, device)]
    for contender in contenders:    # the first one's first batch includes the import of FFCV
        contender.start()
    for round_ in report.progress(range(own.rounds), own.rounds, "measuring", unit=" rounds"):
        for contender in contenders:
            contender.run(round_ + 1)
    reference = statistics.median(contenders[-2].rates)
    rows = [{"loader": c.name, "images_per_second": statistics.median(c.rates), "slowest": min(c.rates),
             "fastest": max(c.rates), "times_dataloader": statistics.median(c.rates) / reference,
             "first_batch_seconds": c.first_batch_seconds} for c in contenders]
    print(f"{beton.samples:,} images of {beton.width} x {beton.height}, batches of {settings.loader.batch_size}, "
          f"device {device}, {own.rounds} rounds\n")
    print(table(rows))
    keep(own.out, "loader", settings.recipe, {"rounds": own.rounds, "batch_size": settings.loader.batch_size, "rows": rows})


if __name__ == "__main__":
    runtime.run_program(main)

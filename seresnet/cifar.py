"""The official layouts of CIFAR-10 and CIFAR-100: where their files are, how they read, what is published about them."""
from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from seresnet import runtime
from seresnet.files import SourceError, load_pickle
from seresnet.imageset import ImageSet, Split, channel_statistics

PART = 1 << 20           # of an archive, read at once
MOST_MEMBERS = 200
LARGEST_BATCH_FILE = 256 << 20    # the largest official file has 155 MB; more is no batch, and is not read into memory
WEBSITE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Published:
    """What is known of one of the sets. Files of the binary layout end in .bin. classes: by kind of label, in the order of
    the binary layout's label bytes. means, stds: a channel, in pixel values, of the splits for which they are known."""

    title: str
    folders: dict[str, str]
    archives: dict[str, str]
    train: tuple[str, ...]
    test: tuple[str, ...]
    images: dict[str, int]
    classes: dict[str, tuple[str, ...]]
    label_keys: dict[str, str]
    means: dict[str, tuple[float, ...]]
    stds: dict[str, tuple[float, ...]]

    def files(self, layout: str) -> list[str]:
        """The names of the files that hold images, training ones first."""
        suffix = ".bin" if layout == "binary" else ""
        return [f"{name}{suffix}" for name in (*self.train, *self.test)]

    def names_and_labels(self, kind: str) -> tuple[str, tuple[str, ...]]:
        """The kind of label that `kind` asks for (a set with one kind gives that), and its classes."""
        kind = kind if kind in self.classes else next(iter(self.classes))
        return kind, self.classes[kind]


# CIFAR-10's means and deviations are published for the training set divided by 255, as (0.4914, 0.4822, 0.4465) and
# (0.2470, 0.2435, 0.2616); those of its test set were computed from the same images. CIFAR-100's likewise, as
# (0.50708, 0.48655, 0.44092) and (0.26733, 0.25644, 0.27615).
SETS = {
    "cifar10": Published(
        "CIFAR-10", {"binary": "cifar-10-batches-bin", "pickle": "cifar-10-batches-py"},
        {"cifar-10-binary.tar.gz": "binary", "cifar-10-python.tar.gz": "pickle"},
        tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), {"train": 50000, "test": 10000},
        {"fine": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")},
        {"fine": "labels"},
        {"train": (125.307, 122.950, 113.865), "test": (126.025, 123.709, 114.854)},
        {"train": (62.993, 62.089, 66.705), "test": (62.896, 61.937, 66.706)}),
    "cifar100": Published(
        "CIFAR-100", {"binary": "cifar-100-binary", "pickle": "cifar-100-python"},
        {"cifar-100-binary.tar.gz": "binary", "cifar-100-python.tar.gz": "pickle"},
        ("train",), ("test",), {"train": 50000, "test": 10000},
        {"coarse": (
            "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
            "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
            "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
            "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2"),
         "fine": tuple(
            "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
            "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
            "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
            "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
            "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
            "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
            "trout tulip turtle wardrobe whale willow_tree wolf woman worm".split())},
        {"coarse": "coarse_labels", "fine": "fine_labels"},
        {"train": (129.304, 124.070, 112.434)}, {"train": (68.170, 65.392, 70.418)}),
}


def read_set(name: str, layout: str, source: str, labels: str, get: Callable[[str], bytes]) -> ImageSet:
    """The set `name`, from the files that get(file name) gives. labels: `fine` or `coarse`, where the set has both.

    Raises SourceError where the files are not that set: sizes, counts a class, channel statistics.
    """
    known, splits = SETS[name], {}
    kind, classes = known.names_and_labels(labels)
    for split, files in (("train", known.train), ("test", known.test)):
        rows, numbers = [], []
        for file in files:
            file = f"{file}.bin" if layout == "binary" else file
            read = _read_binary if layout == "binary" else _read_pickle
            pixels, label = read(known, get(file), f"{source}: {file}", known.images[split] // len(files), kind)
            rows.append(pixels)
            numbers.append(label)
        planes = np.concatenate(rows).reshape(-1, 3, 32, 32)
        splits[split] = Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(numbers).astype(np.int64))
    return ImageSet(name, source, classes, **splits)


def problems_of_published(images: ImageSet) -> list[str]:
    """Where `images` differ from what is published of the set with their name: counts a class, channel statistics."""
    known, problems = SETS[images.name], []
    for name, split in (("train", images.train), ("test", images.test)):
        counts, a_class = np.bincount(split.labels, minlength=len(images.classes)), known.images[name] // len(images.classes)
        if (counts != a_class).any():
            wrong = int(np.flatnonzero(counts != a_class)[0])
            problems.append(f"{name} has {counts[wrong]} images of class {images.classes[wrong]}, {known.title} has {a_class} "
                            "of each")
        if name not in known.means:
            continue
        mean, std = channel_statistics([split.images])
        for what, got, published in (("mean", mean, known.means[name]), ("standard deviation", std, known.stds[name])):
            if max(abs(a - b) for a, b in zip(got, published)) > 0.01:
                problems.append(f"the {name} images' channel {what} is {tuple(round(v, 2) for v in got)}, {known.title}'s is "
                                f"{published}: images are damaged, missing or in another channel order")
    return [f"{problem}; fetch it again" for problem in problems]


def _read_binary(known: Published, content: bytes, where: str, count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A byte a kind of label, then 1,024 red, green and blue bytes, `count` times over (the website, "Binary version")."""
    kinds = list(known.classes)
    row = len(kinds) + 3072
    if len(content) != count * row:
        raise SourceError(f"{where}: has {len(content)} bytes, expected {count} x {row}: it is cut off or no {known.title} "
                          "batch; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(count, row)
    return rows[:, len(kinds):], rows[:, kinds.index(kind)]


def _read_pickle(known: Published, content: bytes, where: str, count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    batch, key = load_pickle(io.BytesIO(content), where), known.label_keys[kind]
    data, labels = (batch.get("data"), batch.get(key)) if isinstance(batch, dict) else (None, None)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (count, 3072)):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise SourceError(f"{where}: `data` is {got}, expected uint8 ({count}, 3072): it is no {known.title} batch")
    try:
        labels = np.asarray(labels)
        whole = labels.shape == (count,) and labels.dtype.kind in "iu"
    except ValueError:
        whole = False
    if not whole:
        raise SourceError(f"{where}: `{key}` are not {count} integers: it is no {known.title} batch")
    return data, labels


class _Sparing(gzip.GzipFile):
    """tarfile reads some headers whole, however long they claim to be, and some kilobytes unpack to gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= PART:
            raise tarfile.ReadError(f"a part of {size} bytes")
        return super().read(size)


def read_archive(path: Path) -> tuple[str, str, dict[str, bytes]]:
    """The set, the layout and the batch files of an official .tar.gz, in memory: nothing is extracted to disk."""
    wanted = {f"{folder}/{file}": (name, layout, file) for name, known in SETS.items()
              for layout, folder in known.folders.items() for file in known.files(layout)}
    found: dict[tuple[str, str], dict[str, bytes]] = {}
    try:
        with _Sparing(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
            for count, member in enumerate(archive, 1):
                if count > MOST_MEMBERS:
                    raise SourceError(f"{path}: has more than {MOST_MEMBERS} members, official ones ten: it is no CIFAR archive")
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts or not (member.isreg() or member.isdir()):
                    raise SourceError(f"{path}: holds {member.name!r}, a link, a device or a path that leads outside: "
                                      "it is no official CIFAR archive; do not trust it")
                if str(place) in wanted and member.isreg():
                    if member.size > LARGEST_BATCH_FILE:
                        raise SourceError(f"{path}: {member.name} has {member.size} bytes, expected 155 MB at most: it is "
                                          "no CIFAR batch")
                    name, layout, file = wanted[str(place)]
                    found.setdefault((name, layout), {})[file] = b"".join(iter(partial(archive.extractfile(member).read, PART), b""))
            while unpacked.read(PART):    # to the end, where gzip's checksum is
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"is cut off or no .tar.gz ({type(error).__name__})"
        raise SourceError(f"{path}: {reason}: fetch it again") from error
    for (name, layout), contents in found.items():
        if set(SETS[name].files(layout)) <= set(contents):
            return name, layout, contents
    raise SourceError(f"{path}: does not hold the batches of CIFAR-10 or CIFAR-100: fetch it again from {WEBSITE}")


class DownloadError(SourceError):
    """CIFAR-10 could not be downloaded. Exit status 4: no data set is there."""

    status = 4


def torchvision_cifar10():
    """torchvision's class, which knows the archive's address and MD5."""
    runtime.import_torchvision()
    from torchvision.datasets import CIFAR10
    return CIFAR10


def download_cifar10(folder: Path, supply: str) -> Path:
    """The official Python archive in `folder`, fetched by torchvision unless it is there, its MD5 verified.

    supply: how to supply the data otherwise, for the message. Raises DownloadError.
    """
    dataset = torchvision_cifar10()
    from torchvision.datasets.utils import check_integrity, download_url
    target = folder / dataset.filename
    if check_integrity(str(target), dataset.tgz_md5):
        return target
    patience = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)    # of each wait, not of the whole: a slow server may take an hour
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as unfinished:
            download_url(dataset.url, unfinished, dataset.filename, dataset.tgz_md5)
            os.replace(Path(unfinished) / dataset.filename, target)
    except (OSError, RuntimeError, ValueError) as error:    # URLError is an OSError; a wrong MD5 is a RuntimeError
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DownloadError(f"{dataset.url}: could not be downloaded ({reason}). {supply}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return target

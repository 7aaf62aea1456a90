"""Bytes on disk or a download -> checked uint8 images, integer labels and class names.

Whatever is read is validated here, so that nothing unchecked reaches FFCV: its writer waits for ever on a bad sample.
"""
from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from seresnet import runtime
from seresnet.runtime import UserError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_TEST_BATCHES = ("test_batch",)
# Mean and standard deviation a channel, in pixel values: the figures that are published for the training set divided by
# 255 as (0.4914, 0.4822, 0.4465) and (0.2470, 0.2435, 0.2616); those of the test set were computed from the same images.
CIFAR10_MEANS = {"train": (125.307, 122.950, 113.865), "test": (126.025, 123.709, 114.854)}
CIFAR10_STDS = {"train": (62.993, 62.089, 66.705), "test": (62.896, 61.937, 66.706)}

FOLDERS = {"binary": "cifar-10-batches-bin", "pickle": "cifar-10-batches-py"}
ARCHIVES = {"cifar-10-binary.tar.gz": "binary", "cifar-10-python.tar.gz": "pickle"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST_BATCH_FILE = 64 << 20    # an official batch has 31 MB; more is no batch, and is not read into memory
SUPPLY = ("Put cifar-10-batches-bin/, cifar-10-batches-py/, cifar-10-binary.tar.gz or cifar-10-python.tar.gz "
          "(https://www.cs.toronto.edu/~kriz/cifar.html), or an image tree train/<class>/*.png + test/<class>/*.png, "
          "there, or name another place with --sources.path")


class SourceError(UserError):
    """A data set is missing, unreadable, or not what it claims to be."""


class MissingError(SourceError):
    """Nothing that we read is there. Exit status 4, so that a caller can tell it from every other mistake."""

    status = 4


class DownloadError(MissingError):
    """CIFAR-10 could not be downloaded."""


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, H, W, 3), RGB. labels: int64 (N,), in [0, classes)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageSet:
    """A whole data set: its short `name`, one line on where it comes `source` from, class names, both splits."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split


@dataclass(frozen=True)
class Source:
    """A recognised data set that has not been read yet. kind: binary, pickle, archive, folder, download or digits."""

    kind: str
    path: Path

    def describe(self) -> str:
        """What and where, in one line for people."""
        what = {"binary": "CIFAR-10 binary batches in", "pickle": "CIFAR-10 Python batches in",
                "archive": "CIFAR-10 archive", "folder": "image folder", "download": "CIFAR-10, downloaded into"}
        return "scikit-learn's load_digits" if self.kind == "digits" else f"{what[self.kind]} {self.path}"

    def fingerprint(self) -> str:
        """Identity of the content, whatever the files' dates: equal if and only if `read` would give the same images.

        Reads every byte once (a second or two for CIFAR-10), and downloads nothing. Raises SourceError.
        """
        digest = hashlib.sha256()
        if self.kind == "digits":
            import sklearn
            digest.update(sklearn.__version__.encode())
        elif self.kind == "download":
            digest.update(_torchvision_cifar10().tgz_md5.encode())
        for file in self._files():
            digest.update(f"\n{file.relative_to(self.path.parent).as_posix()}\n".encode())
            digest.update(_read_bytes(file))
        # The last number counts versions of the reading below: raise it where the same bytes give other images.
        return f"{self.kind}-1-{digest.hexdigest()}"

    def read(self) -> ImageSet:
        """The images, validated: dtype, shape, label range, count a class and in all; for CIFAR-10 also its published
        channel means. Raises SourceError naming the file; DownloadError where a download fails."""
        if self.kind == "folder":
            return _checked(_read_folder(self))
        if self.kind == "digits":
            return _checked(_read_digits(self))
        if self.kind in FOLDERS:
            def get(name):
                return _read_bytes(self.path / name)
            layout = self.kind
        elif self.kind == "archive":
            layout, contents = _read_archive(self.path)
            get = contents.__getitem__
        else:
            layout, contents = _read_archive(_download(self.path))
            get = contents.__getitem__
        return _checked_cifar10(_read_cifar10(self, layout, get))

    def _files(self) -> list[Path]:
        if self.kind in FOLDERS:
            return [self.path / name for name in _batch_files(self.kind)]
        if self.kind == "archive":
            return [self.path]
        if self.kind == "folder":
            return [file for split in ("train", "test") for _, files in _class_folders(self.path / split) for file in files]
        return []


def find_source(path: str | Path, kind: str = "auto") -> Source:
    """What lies at `path`: the thing itself, or a folder that holds it.

    kind: `auto` takes the first of binary, pickle, archive and folder that is there; a name demands that one. `download`
    (into `path`) and `digits` (no path) are only taken when named. Raises MissingError where nothing is there, SourceError
    where something else is.
    """
    path = Path(path)
    if kind in ("download", "digits"):
        return Source(kind, path)
    found = {source.kind: source for source in reversed(_candidates(path))}
    if kind == "auto":
        if found:
            return next(found[k] for k in ("binary", "pickle", "archive", "folder") if k in found)
    elif kind in found:
        return found[kind]
    there = "is there, but holds no data set that we read" if path.exists() else "does not exist"
    if found:
        there = f"holds {', '.join(found)}, not {kind}"
    raise (SourceError if found else MissingError)(f"sources.path: {path} {there} (looked in {Path.cwd()}). {SUPPLY}, or let --sources.kind download "
                      "fetch CIFAR-10")


def _candidates(path: Path) -> list[Source]:
    sources = []
    for kind in FOLDERS:
        for folder in (path, path / FOLDERS[kind]):
            if (folder / _batch_files(kind)[0]).is_file():
                sources.append(Source(kind, folder))
    for name in ARCHIVES:
        if (path / name).is_file():
            sources.append(Source("archive", path / name))
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        sources.append(Source("archive", path))
    if (path / "train").is_dir() and (path / "test").is_dir():
        sources.append(Source("folder", path))
    return sources


def _batch_files(layout: str) -> list[str]:
    suffix = ".bin" if layout == "binary" else ""
    return [f"{name}{suffix}" for name in (*CIFAR10_TRAIN_BATCHES, *CIFAR10_TEST_BATCHES)]


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}: the data set is not whole. {SUPPLY}") from error


# -- CIFAR-10 -----------------------------------------------------------------------------------------------------------

def _read_cifar10(source: Source, layout: str, get: Callable[[str], bytes]) -> ImageSet:
    """get(file name) -> bytes of one batch file."""
    read_batch = _read_binary_batch if layout == "binary" else _read_pickle_batch
    files, splits = _batch_files(layout), []
    for names in (files[:-1], files[-1:]):
        batches = [read_batch(get(name), f"{source.path}: {name}") for name in names]
        planes = np.concatenate([images for images, _ in batches]).reshape(-1, 3, 32, 32)
        splits.append(Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
                            np.concatenate([labels for _, labels in batches]).astype(np.int64)))
    return ImageSet("cifar10", source.describe(), CIFAR10_CLASSES, *splits)


def _read_binary_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A label byte, then 1,024 red, green and blue bytes, 10,000 times over (the data set's page, "Binary version")."""
    if len(content) != 10000 * 3073:
        raise SourceError(f"{where}: has {len(content)} bytes, expected 10000 x 3073: it is cut off or no CIFAR-10 batch; "
                          "fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(10000, 3073)
    return rows[:, 1:], rows[:, 0]


def _read_pickle_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_pickle(io.BytesIO(content), where)
    data, labels = (batch.get("data"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (10000, 3072)):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise SourceError(f"{where}: `data` is {got}, expected uint8 (10000, 3072): it is no CIFAR-10 batch")
    try:
        labels = np.asarray(labels)
        whole = labels.shape == (10000,) and labels.dtype.kind in "iu"
    except ValueError:
        whole = False
    if not whole:
        raise SourceError(f"{where}: `labels` are not 10000 integers: it is no CIFAR-10 batch")
    return data, labels


def load_pickle(file: BinaryIO, where: str) -> object:
    """Read a pickle of plain values and numpy arrays, written by Python 2 or 3; dict keys come back as text.

    A pickle may name any function to be called on reading. Here only the four that rebuild an array are found, behind
    checks of their own; every other name ends in SourceError before anything is called.
    """
    try:
        content = _ArrayUnpickler(file, encoding="latin1").load()
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from error
    except Exception as error:    # pickle raises whatever a damaged stream leads it to
        raise SourceError(f"{where}: is no readable pickle ({type(error).__name__}): fetch it again") from error
    if isinstance(content, dict):
        content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    return content


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        module = module.replace("numpy._core", "numpy.core")    # numpy 2 moved it
        allowed = {("numpy.core.multiarray", "_reconstruct"): _empty_array, ("numpy", "ndarray"): np.ndarray,
                   ("numpy.core.numeric", "_frombuffer"): _array_of_buffer, ("numpy", "dtype"): _plain_dtype,
                   ("_codecs", "encode"): _latin1_bytes}
        if (module, name) not in allowed:
            raise SourceError(f"asks for {module}.{name} on reading, which data never need: do not trust this file")
        return allowed[module, name]


def _empty_array(kind, shape, dtype) -> np.ndarray:
    """What numpy's `_reconstruct` gives for an array; its content follows as state."""
    if kind is not np.ndarray or shape != (0,):
        raise SourceError("rebuilds something other than a plain array: do not trust this file")
    return np.ndarray(shape, dtype)


def _array_of_buffer(buffer, dtype, shape, order) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _plain_dtype(code, align=False, copy=True) -> np.dtype:
    if not (isinstance(code, str) and re.fullmatch(r"[<>|=]?[biufS]\d{1,4}", code)):
        raise SourceError(f"holds an array of {code!r}, expected numbers: do not trust this file")
    return np.dtype(code)


def _latin1_bytes(text, encoding) -> bytes:
    """How Python 3 writes bytes into a protocol-2 pickle."""
    if encoding != "latin1":
        raise SourceError(f"encodes text as {encoding!r}: do not trust this file")
    return text.encode("latin1")


def _read_archive(path: Path) -> tuple[str, dict[str, bytes]]:
    """The layout and the batch files of an official .tar.gz, in memory: nothing is extracted to disk."""
    wanted = {f"{folder}/{name}": (layout, name) for layout, folder in FOLDERS.items() for name in _batch_files(layout)}
    layouts, contents = set(), {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
                    raise SourceError(f"{path}: holds {member.name!r}, a link, a device or a path that leads outside: "
                                      "it is no official CIFAR-10 archive; do not trust it")
                if str(name) in wanted and member.isreg():
                    if member.size > LARGEST_BATCH_FILE:
                        raise SourceError(f"{path}: {member.name} has {member.size} bytes, expected 31 MB at most: it is "
                                          "no CIFAR-10 batch")
                    layout, file = wanted[str(name)]
                    layouts.add(layout)
                    contents[file] = archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or f"is cut off or no .tar.gz ({type(error).__name__})"
        raise SourceError(f"{path}: {reason}: fetch it again") from error
    for layout in sorted(layouts):
        if set(_batch_files(layout)) <= set(contents):
            return layout, contents
    raise SourceError(f"{path}: does not hold the six batches of CIFAR-10: fetch it again from "
                      "https://www.cs.toronto.edu/~kriz/cifar.html")


def _torchvision_cifar10():
    runtime.import_torchvision()
    from torchvision.datasets import CIFAR10
    return CIFAR10


def _download(folder: Path) -> Path:
    """The official Python archive in `folder`, fetched by torchvision unless it is there, its MD5 verified."""
    dataset = _torchvision_cifar10()
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
        raise DownloadError(f"{dataset.url}: could not be downloaded ({reason}). {SUPPLY}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return target


# -- other images -------------------------------------------------------------------------------------------------------

def _class_folders(folder: Path) -> list[tuple[str, list[Path]]]:
    """(class name, its image files) in alphabetical order."""
    try:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return [(c.name, sorted(f for f in c.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)) for c in classes]
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}: expected folders named after the classes in it") from error


def _read_folder(source: Source) -> ImageSet:
    trees = {split: _class_folders(source.path / split) for split in ("train", "test")}
    names = {split: tuple(name for name, _ in tree) for split, tree in trees.items()}
    if names["train"] != names["test"]:
        alone = sorted(set(names["train"]) ^ set(names["test"]))
        raise SourceError(f"{source.path}: train/ has {len(names['train'])} class folders, test/ {len(names['test'])}; "
                          f"only in one of them: {', '.join(alone[:5])}. Both need the same ones")
    empty = [f"{split}/{name}" for split, tree in trees.items() for name, files in tree if not files]
    if empty or not names["train"]:
        raise SourceError(f"{source.path}: no {', '.join(IMAGE_SUFFIXES)} files in {', '.join(empty[:5]) or 'train/'}: "
                          "every class needs images in both splits")
    splits, shape = {}, None
    for split, tree in trees.items():
        files = [(file, label) for label, (_, files) in enumerate(tree) for file in files]
        images = None
        for i, (file, _) in enumerate(files):
            image = read_image(file)
            shape = shape or image.shape
            if image.shape != shape:
                raise SourceError(f"{file}: is {image.shape[1]} x {image.shape[0]} pixels, the images before it "
                                  f"{shape[1]} x {shape[0]}: bring all to one size first")
            if images is None:
                images = np.empty((len(files), *shape), np.uint8)
            images[i] = image
        splits[split] = Split(images, np.array([label for _, label in files], np.int64))
    return ImageSet(source.path.resolve().name, source.describe(), names["train"], **splits)


def read_image(file: Path) -> np.ndarray:
    """A PNG or JPEG file as uint8 (H, W, 3), RGB; grey values are repeated. Raises SourceError naming the file."""
    from PIL import Image
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if max(image.size) > 4096:    # decided from the header: a small file may claim gigabytes of pixels
                raise SourceError(f"{file}: is {image.size[0]} x {image.size[1]} pixels, expected at most 4096: this "
                                  "project is for small images")
            if image.mode not in ("RGB", "L", "1", "P", "RGBA", "LA"):
                raise SourceError(f"{file}: has the pixel format {image.mode}, expected 8-bit RGB or grey: convert it")
            if image.mode in ("RGBA", "LA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    raise SourceError(f"{file}: is partly transparent: put it on a background first")
            return np.asarray(image.convert("RGB"))
    except SourceError:
        raise
    except Exception as error:    # Pillow raises a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or "is no readable PNG or JPEG"
        raise SourceError(f"{file}: {reason}: replace or remove it") from error


def _read_digits(source: Source) -> ImageSet:
    """load_digits' 1,797 images of 8x8 pixels in 17 grey values, each pixel as 4x4 RGB pixels. Every fifth image of a
    class is a test image; scikit-learn brings no split."""
    from sklearn.datasets import load_digits
    content = load_digits()
    grey = np.round(content.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = content.target.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for c in range(10):
        test[np.flatnonzero(labels == c)[4::5]] = True
    return ImageSet("digits", source.describe(), tuple(str(name) for name in content.target_names),
                    Split(images[~test], labels[~test]), Split(images[test], labels[test]))


# -- validation ---------------------------------------------------------------------------------------------------------

def _checked(images: ImageSet) -> ImageSet:
    problems = list(_problems(images))
    if problems:
        raise SourceError(*(f"{images.source}: {problem}" for problem in problems))
    return images


def _problems(images: ImageSet) -> Iterable[str]:
    if len(images.classes) < 2:
        yield f"has {len(images.classes)} class, expected at least 2"
    for name, split in (("train", images.train), ("test", images.test)):
        if split.images.dtype != np.uint8 or split.images.ndim != 4 or split.images.shape[3] != 3:
            yield f"{name} images are {split.images.dtype} {split.images.shape}, expected uint8 (N, H, W, 3)"
        if split.labels.dtype != np.int64 or split.labels.shape != split.images.shape[:1]:
            yield (f"{name} labels are {split.labels.dtype} {split.labels.shape}, expected int64 "
                   f"({len(split.images)},), one an image")
        elif not len(split.labels):
            yield f"{name} has no images"
        elif split.labels.min() < 0 or split.labels.max() >= len(images.classes):
            yield (f"{name} labels lie in [{split.labels.min()}, {split.labels.max()}], expected "
                   f"[0, {len(images.classes) - 1}]")
        elif name == "train":
            missing = np.flatnonzero(np.bincount(split.labels, minlength=len(images.classes)) == 0)
            if len(missing):
                yield f"train has no image of class {images.classes[missing[0]]}"
    if images.train.images.shape[1:] != images.test.images.shape[1:]:
        yield (f"train images are {images.train.images.shape[1:3]} pixels, test images {images.test.images.shape[1:3]}: "
               "bring all to one size first")


def _checked_cifar10(images: ImageSet) -> ImageSet:
    """CIFAR-10 is known: 5,000 and 1,000 images a class, and its channel means and deviations to three decimals."""
    _checked(images)
    problems = []
    for name, split, a_class in (("train", images.train, 5000), ("test", images.test, 1000)):
        counts = np.bincount(split.labels, minlength=10)
        if (counts != a_class).any():
            problems.append(f"{name} has {counts.tolist()} images a class, CIFAR-10 has {a_class} of each")
        mean, std = channel_statistics(split.images)
        for what, got, published in (("mean", mean, CIFAR10_MEANS[name]), ("standard deviation", std, CIFAR10_STDS[name])):
            if max(abs(a - b) for a, b in zip(got, published)) > 0.01:
                problems.append(f"the {name} images' channel {what} is {tuple(round(v, 2) for v in got)}, CIFAR-10's is "
                                f"{published}: images are damaged, missing or in another channel order")
    if problems:
        raise SourceError(*(f"{images.source}: {problem}; fetch it again" for problem in problems))
    return images


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel of uint8 (N, H, W, 3), over all pixels of all images, in pixel values.

    Exact: both come from a histogram of the 256 values, whose sums are integers.
    """
    values = np.arange(256, dtype=np.int64)
    means, stds = [], []
    for channel in range(3):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 4096):    # bincount widens to 8 bytes a pixel: a part at a time
            counts += np.bincount(images[start:start + 4096, ..., channel].ravel(), minlength=256)
        total = int(counts.sum())
        mean = int((counts * values).sum()) / total
        means.append(mean)
        stds.append((int((counts * values**2).sum()) / total - mean**2) ** 0.5)
    return tuple(means), tuple(stds)

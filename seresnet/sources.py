"""Bytes on disk or a download -> checked uint8 images, integer labels and class names.

Whatever is read is validated here, so that nothing unchecked reaches FFCV: its writer waits for ever on a bad sample.
"""
from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from seresnet import runtime
from seresnet.cifar import SETS, WEBSITE, download_cifar10, problems_of_published, read_archive, read_set, torchvision_cifar10
from seresnet.files import (FEWER, IMAGE_SUFFIXES, SMALLER, TOLD, SourceError, as_text, check_room, files_below, fit_images, in_small_letters,
                            is_image, left_out, read_arrays, read_image, read_image_files)
from seresnet.imageset import ImageSet, Split, problems_of

T = TypeVar("T")

PART = 1 << 20    # bytes of a file, read at once
KINDS = ("binary", "pickle", "archive", "kaggle", "parquet", "folder", "arrays")    # recognised, the first that is there
TEST_NAMES = ("test", "val", "valid", "validation")
SPLIT_NAME = re.compile(rf"(train|training|testing|{'|'.join(TEST_NAMES)})([\W_\d].*)?", re.IGNORECASE)    # test1, train_images
LABEL_FILE = "trainLabels.csv"
ARRAY_NAMES = {    # in an .npz file, images and labels; `all` is a set without a test split
    **{split: ((f"x_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")) for split in ("train", "test", "val")},
    "all": (("x", "y"), ("images", "labels"))}
SUPPLY = (f"Put an official layout of CIFAR ({WEBSITE}: cifar-10-batches-bin/, cifar-10-batches-py/, cifar-10-python.tar.gz, "
          "...), a folder a class (train/<class>/*.png + test/<class>/*.png, or without the split), the Hub's "
          "train-*.parquet, or an .npz file there, or name another place with --sources.path")


class MissingError(SourceError):
    """Nothing that we read is there. Exit status 4, so that a caller can tell it from every other mistake."""

    status = 4


@dataclass(frozen=True)
class Source:
    """A recognised data set that has not been read yet, and how to read it.

    kind: one of KINDS, or download or digits. image_size: side to bring images to, 0 to leave them; fit: how (files.FITS).
    test_share: of each class, where the set has no test split. labels: `fine` or `coarse`, where it has both. watch(items, total) ->
    the same items: is shown the pictures that are read one by one. for_training: each class has to have images in both splits; else
    some may lack them, and .npz and parquet files training images. resized_by: the option that brings images to one size, for messages.
    """

    kind: str
    path: Path
    image_size: int = 0
    fit: str = "resize"
    test_share: float = 0.2
    labels: str = "fine"
    watch: Callable[[Iterable, int], Iterable] = field(default=lambda items, total: items, repr=False, compare=False)
    for_training: bool = True
    resized_by: str = "--sources.image_size"

    @property
    def way_out(self) -> str:
        """What to do where the memory does not hold the images."""
        return SMALLER if self.for_training else FEWER

    def describe(self) -> str:
        """What and where, in one line for people."""
        what = {"binary": "CIFAR binary batches in", "pickle": "CIFAR Python batches in", "archive": "CIFAR archive",
                "folder": "image folder", "download": "CIFAR-10, downloaded into", "parquet": "parquet files in" if self.path.is_dir() else "parquet file",
                "kaggle": f"images and {LABEL_FILE} in", "arrays": "arrays in"}
        return "scikit-learn's load_digits" if self.kind == "digits" else f"{what[self.kind]} {self.path}"

    def official_name(self) -> str:
        """The name in cifar.SETS of what is in one of CIFAR's layouts, of an archive by its file's name; '' for other kinds and names."""
        if self.kind in ("binary", "pickle"):
            return _set_at(self.kind, self.path)
        if self.kind in ("archive", "download"):
            return next((name for name, known in SETS.items() if self.path.name.lower() in known.archives),
                        "cifar10" if self.kind == "download" else "")
        return ""

    def how(self) -> dict[str, int | float | str]:
        """How it is read: the keys of the config's `sources` without place and kind."""
        return {"image_size": self.image_size, "fit": self.fit, "test_share": self.test_share, "labels": self.labels}

    def left_out(self) -> str:
        """A line on the pictures of an image folder that `read` takes no notice of; '' for none, and for other kinds."""
        return left_out(self.path, self._files()) if self.kind == "folder" else ""

    def fingerprint(self) -> str:
        """Identity of the content and of how it is read, whatever the files' dates: equal if and only if `read` would give
        the same images.

        Reads every byte once (a second or two for CIFAR-10), and downloads nothing. Raises SourceError.
        """
        digest = hashlib.sha256(repr(tuple(self.how().values())).encode())
        if self.kind == "digits":
            import sklearn
            digest.update(sklearn.__version__.encode())
        elif self.kind == "download":
            digest.update(torchvision_cifar10().tgz_md5.encode())
        problems, official = [], self.official_name()
        place = Path(Path(os.path.abspath(self.path)).name)    # the same for `.` as for the folder's name
        for file in self._files():
            digest.update(f"\n{(place / file.relative_to(self.path)).as_posix()}\n".encode("utf-8", "surrogateescape"))
            try:
                with open(file, "rb") as content:
                    while part := content.read(PART):
                        digest.update(part)
            except OSError as error:
                way_out = f"the data set is not whole. {SUPPLY}" if official else "replace or remove it"
                problems.append(f"{file}: {error.strerror}: {way_out}")
        if problems:
            raise SourceError(*problems[:TOLD], *([f"and {len(problems) - TOLD:,} more like these"] if len(problems) > TOLD else []))
        # The last number counts versions of the reading below: raise it where the same bytes give other images.
        return f"{self.kind}-4-{digest.hexdigest()}"

    def read(self) -> ImageSet:
        """The images, validated: dtype, shape, label range, count a class and in all; for CIFAR also the published channel
        means. Raises SourceError naming the file; cifar.DownloadError where a download fails."""
        readers = {"folder": _read_folder, "kaggle": _read_kaggle, "parquet": _read_parquet, "arrays": _read_arrays,
                   "digits": _read_digits}
        images = (readers.get(self.kind) or _read_official)(self)
        fitted = replace(images, **{name: Split(fit_images(split.images, self.image_size, self.fit, self.way_out), split.labels)
                                    for name, split in (("train", images.train), ("test", images.test))})
        problems = list(problems_of(fitted, self.for_training))
        if self.kind not in readers and not problems:
            problems = problems_of_published(images)
        if problems:
            raise SourceError(*(f"{images.source}: {problem}" for problem in problems))
        return fitted

    def _files(self) -> list[Path]:
        if self.kind in ("binary", "pickle"):
            return [self.path / file for file in SETS[_set_at(self.kind, self.path)].files(self.kind)]
        if self.kind in ("archive", "arrays"):
            return [self.path]
        if self.kind == "folder":
            return [file for tree in _trees(self.path).values() for _, files in tree for file in files]
        if self.kind == "kaggle":
            return [self.path / LABEL_FILE, *_image_files(self.path / "train")]
        if self.kind == "parquet":
            return [file for files in _parquet_files(self.path).values() for file in files]
        return []


def find_source(path: str | Path, kind: str = "auto", **how) -> Source:
    """What lies at `path`: the thing itself, or a folder that holds it.

    kind: `auto` takes the first of KINDS that is there, CIFAR-10 in any layout before CIFAR-100; a name demands that one.
    `download` (into `path`) and `digits` (no path) are only taken when named. how: fields of Source. Raises MissingError where
    nothing is there, SourceError where something else is, or several sets of which none was named.
    """
    path = Path(path)
    if kind in ("download", "digits"):
        return Source(kind, path, **how)
    candidates = _candidates(path, kind, how.get("for_training", True))
    found = {source_kind: place for source_kind, place in reversed(candidates)}
    if kind == "auto" and candidates:
        kind = candidates[0][0]
    if kind in found:
        if several := _several(kind, found[kind], path):
            raise SourceError(f"sources.path: {path} holds several data sets: {', '.join(several[:5])}: name one of them")
        return Source(kind, found[kind], **how)
    there = f"is there, but holds no data set that we read{hint(path)}" if path.exists() else "does not exist"
    if found:
        there = f"holds {', '.join(found)}, not {kind}"
    raise (SourceError if found else MissingError)(
        f"sources.path: {path} {there} (looked in {Path.cwd()}). {SUPPLY}, or let --sources.kind download fetch CIFAR-10")


def _candidates(path: Path, kind: str, for_training: bool) -> list[tuple[str, Path]]:
    """(kind, place) of what is there, the first choice first. Where `auto` has found CIFAR, the folders beside it are nobody's classes: they may
    be large, and not all readable."""
    found = []
    for known in SETS.values():    # a set in all its layouts before the next
        found += [(layout, folder) for layout, name in known.folders.items() for folder in (path, path / name)
                  if (folder / known.files(layout)[0]).is_file() and _set_at(layout, folder)]
        found += [("archive", path / name) for name in known.archives if (path / name).is_file()]
    if path.is_file() and path.name.lower().endswith((".tar.gz", ".tgz")):
        found.append(("archive", path))
    if kind == "auto" and found:
        return found
    if path.is_dir():
        if (path / LABEL_FILE).is_file() and (path / "train").is_dir():
            found.append(("kaggle", path))
        if _parquet_files(path).keys() & ({"train"} if for_training else {"train", "test"}):
            found.append(("parquet", path))
        if any(files for tree in _trees(path).values() for _, files in tree):
            found.append(("folder", path))
        found += [("arrays", file) for file in _labelled_arrays(path)[:1]]
    elif path.suffix.lower() == ".npz" and path.is_file():
        found.append(("arrays", path))
    elif path.suffix.lower() == ".parquet" and path.is_file():
        found.append(("parquet", path))
    return found


def _labelled_arrays(path: Path) -> list[Path]:
    """The .npz files in `path` that hold a set to train on: others are of something else, such as images to predict."""
    found = []
    for file in sorted(entry for entry in path.glob("[!.]*") if entry.suffix.lower() == ".npz"):
        try:
            with zipfile.ZipFile(file) as content:
                names = {name.removesuffix(".npy").lower() for name in content.namelist()}
        except (OSError, zipfile.BadZipFile):
            names = set(ARRAY_NAMES["train"][0])    # damaged: whoever reads it says so
        if any(names.issuperset(pair) for pairs in ARRAY_NAMES.values() for pair in pairs):
            found.append(file)
    return found


def hint(path: Path) -> str:
    """Where there are pictures below `path` nevertheless, in words; '' for nowhere."""
    if not path.is_dir():
        return ""
    first = next((file for file in files_below(path) if is_image(file.relative_to(path))), None)
    if first is None:
        return ""
    return f": {first} is a picture, and a folder is wanted that holds a folder a class, or train/ and test/ with one a class each"


def _several(kind: str, place: Path, path: Path) -> list[str]:
    """The names of the sets where more than one of that kind lies at `path`, and none of them was named."""
    if kind == "arrays" and place != path:
        names = [file.name for file in _labelled_arrays(path)]
    elif kind == "parquet" and path.is_dir():
        files = _parquet_files(path)
        names = sorted({str(file.parent.relative_to(path)) for file in files.get("train") or files["test"]})
    else:
        names = []
    return names if len(names) > 1 else []


def _set_at(layout: str, folder: Path) -> str:
    """Which of CIFAR's sets lies in `folder` in that layout: the one whose files are there, by CIFAR-100's own extra file
    or folder name where a stranger's `train` would do as well; '' for none."""
    for name, known in SETS.items():
        if (folder / known.files(layout)[0]).is_file():
            extra = "meta" if layout == "pickle" else "fine_label_names.txt"
            if name == "cifar10" or folder.name == known.folders[layout] or (folder / extra).is_file():
                return name
    return ""


def _read_bytes(file: Path, way_out: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}: {way_out}") from error


def _read_official(source: Source) -> ImageSet:
    """CIFAR in one of its official layouts, on disk, in an archive, or downloaded."""
    if source.kind in ("binary", "pickle"):
        name, layout = _set_at(source.kind, source.path), source.kind
        return read_set(name, layout, source.describe(), source.labels,
                        lambda file: _read_bytes(source.path / file, f"the data set is not whole. {SUPPLY}"))
    archive = source.path if source.kind == "archive" else download_cifar10(source.path, SUPPLY)
    name, layout, contents = read_archive(archive)
    return read_set(name, layout, source.describe(), source.labels, contents.__getitem__)


# -- sets without a test split ------------------------------------------------------------------------------------------

def choose_test(labels: np.ndarray, names: Sequence[str], share: float, for_training: bool = True, place: str = "") -> np.ndarray:
    """Which samples become the test split of a set that has none: bool (N,), `share` of each class, at least one and not all.

    Chosen by the hash of their names, so that it is the same choice on every machine, for any order of the files, and
    nearly the same when images are added. labels: int64 (N,). Raises SourceError, which begins with `place`, where a class has
    one image; of a set that is not to be trained on that one is chosen.
    """
    keys = np.array([int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
                     for name in names], np.uint64)
    chosen = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        if len(members) < 2 and for_training:
            raise SourceError(f"{place}{names[members[0]]}: is the only image of its class: a set without a test split needs two and "
                              "more, for training and for testing")
        count = min(max(1, round(share * len(members))), max(1, len(members) - 1))
        chosen[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return chosen


def _split_off_test(images: np.ndarray, labels: np.ndarray, names: Sequence[str], source: Source) -> tuple[Split, Split, bool]:
    test = choose_test(labels, names, source.test_share, source.for_training, f"{source.path}: ")
    check_room(images.nbytes, source.way_out)    # what follows copies them
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), True


# -- image files --------------------------------------------------------------------------------------------------------

def _image_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if is_image(Path(file.name)) and not file.is_dir())
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}: expected a folder of images") from error


def _class_folders(folder: Path) -> list[tuple[str, list[Path]]]:
    """(class name, its image files) in their order; nothing where `folder` is none."""
    try:
        classes = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}: expected folders named after the classes in it") from error
    return [(name, _image_files(folder / name)) for name in _in_order(entry.name for entry in classes)]


def _in_order(names: Iterable[str]) -> list[str]:
    """Class names by the alphabet, or by size where all are numbers, so that class 10 has the number 10 where there are 0 to 10."""
    names = sorted(names)
    if not all(name.isascii() and name.isdecimal() for name in names):
        return names
    return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))    # not by int, which takes 4,300 digits at most


def _trees(path: Path) -> dict[str, list[tuple[str, list[Path]]]]:
    """The class folders of `train` and `test` where the set is split so, else of the whole, under the name `all`."""
    train = _class_folders(_child(path, "train"))
    if not train:    # `train` may be a class, such as CIFAR-100's, but not where nothing but splits stands beside it
        whole = _class_folders(path)
        splits = [SPLIT_NAME.fullmatch(name) for name, _ in whole]    # test-positive and test-negative are classes, of one word
        words = {found[1].lower() for found in splits if found}
        return {"all": [] if all(splits) and (len(words) > 1 or len(whole) < 2) else whole}
    test = next((folder for name in TEST_NAMES if _class_folders(folder := _child(path, name))), None)
    return {"train": train, "test": _class_folders(test)} if test else {"all": train}


def _child(path: Path, name: str) -> Path:
    """The folder `name` in `path`, however it is capitalised there: Train, TEST."""
    try:    # not by asking for it: systems that know no capitals would find it by another name than they list it under
        found = sorted(entry for entry in path.iterdir() if entry.name.lower() == name and entry.is_dir())
    except OSError:    # not there, or not to be read: whoever reads its classes says so
        found = []
    return path / name if path / name in found or not found else found[0]


def _read_files(files: Sequence[Path], source: Source) -> np.ndarray:
    images = source.watch(read_image_files(files, source.image_size, source.fit), len(files))
    return _stack(len(files), zip(map(str, files), images), source)


def _stack(count: int, images: Iterable[tuple[str, np.ndarray]], source: Source) -> np.ndarray:
    """uint8 (count, H, W, 3) from `count` named images. Raises SourceError, naming the image, where one has another size."""
    stacked = np.empty((0, 0, 0, 3), np.uint8)
    for i, (name, image) in enumerate(images):
        if i == 0:
            check_room(count * image.nbytes, source.way_out)
            stacked = np.empty((count, *image.shape), np.uint8)
        if image.shape != stacked.shape[1:]:
            raise SourceError(f"{name}: is {image.shape[1]} x {image.shape[0]} pixels, the images before it "
                              f"{stacked.shape[2]} x {stacked.shape[1]}: bring all to one size with {source.resized_by}")
        stacked[i] = image
    return stacked


def _read_folder(source: Source) -> ImageSet:
    trees = _trees(source.path)
    if not source.for_training:    # one of the splits may lack classes
        every = _in_order({name for tree in trees.values() for name, _ in tree})
        trees = {split: [(name, dict(tree).get(name, [])) for name in every] for split, tree in trees.items()}
    names = {split: tuple(name for name, _ in tree) for split, tree in trees.items()}
    first = next(iter(names))
    if first == "train" and names["train"] != names["test"]:
        alone = sorted(set(names["train"]) ^ set(names["test"]))
        raise SourceError(f"{source.path}: train/ has {len(names['train'])} class folders, test/ {len(names['test'])}; "
                          f"only in one of them: {', '.join(alone[:5])}. Both need the same ones")
    empty = [name if split == "all" else f"{split}/{name}" for split, tree in trees.items() for name, files in tree if not files]
    judged = [file for _, members in trees.get("test", trees[first]) for file in members]
    if empty and (source.for_training or not judged) or not names[first]:
        raise SourceError(f"{source.path}: no {', '.join(IMAGE_SUFFIXES)} files in {', '.join(empty[:5]) or 'train/'}: "
                          f"every class needs images{'' if 'all' in trees else ' in both splits'}: add some, or remove the folder")
    read = {}
    for split, tree in trees.items():
        files = [(file, label) for label, (_, members) in enumerate(tree) for file in members]
        read[split] = _read_files([file for file, _ in files], source), np.array([label for _, label in files], np.int64)
    if "all" in read:
        members = [f"{name}/{file.name}" for name, files in trees["all"] for file in files]
        splits = _split_off_test(*read["all"], members, source)
    else:
        if not len(read["train"][1]):
            read["train"] = tuple(part[:0] for part in read["test"])
        if read["train"][0].shape[1:] != read["test"][0].shape[1:]:
            raise SourceError(f"{source.path}: train images are {read['train'][0].shape[2]} x {read['train'][0].shape[1]} pixels, "
                              f"test images {read['test'][0].shape[2]} x {read['test'][0].shape[1]}: bring all to one size "
                              f"with {source.resized_by}")
        splits = Split(*read["train"]), Split(*read["test"])
    return ImageSet(source.path.resolve().name, source.describe(), names[first], *splits)


def _read_kaggle(source: Source) -> ImageSet:
    """`train/<id>.png` with their classes in trainLabels.csv (id,label). Kaggle's test/ has no labels: predict.py reads it."""
    place = source.path / LABEL_FILE
    try:
        with open(place, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise SourceError(f"{place}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not rows or [cell.strip().lower() for cell in rows[0]] != ["id", "label"] or any(len(row) != 2 for row in rows):
        raise SourceError(f"{place}: expected the header id,label and two values a line")
    labels = {_without_suffix(key.strip()): label.strip() for key, label in rows[1:]}
    if len(labels) != len(rows) - 1:
        raise SourceError(f"{place}: names {len(rows) - 1 - len(labels)} ids twice")
    found = _image_files(source.path / "train")
    files = {file.stem: file for file in found}
    if len(files) < len(found):
        double = next(file for file in found if files[file.stem] != file)
        raise SourceError(f"{double}: is there a second time as {files[double.stem].name}: an id needs one image")
    for what, ids in (("no image of", labels.keys() - files.keys()), ("no label for", files.keys() - labels.keys())):
        if ids:
            raise SourceError(f"{source.path}: has {what} {len(ids)} ids, such as {min(ids)}: train/ and {LABEL_FILE} have to "
                              "name the same")
    classes = tuple(_in_order(set(labels.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    ids = sorted(labels, key=lambda key: (len(key), key))    # 2 before 10
    images = _read_files([files[key] for key in ids], source)
    targets = np.array([numbers[labels[key]] for key in ids], np.int64)
    return ImageSet(source.path.resolve().name, source.describe(), classes,
                    *_split_off_test(images, targets, ids, source))


def _without_suffix(name: str) -> str:
    """An id that is a file's name, as some sets have them, without .png or .jpg."""
    return name.rpartition(".")[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


# -- tables and arrays --------------------------------------------------------------------------------------------------

def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, as the Hub lays them out: <split>-00000-of-00001.parquet, there or one folder down. One file alone is
    `train` or `test` by its name, and `train` where that says neither."""
    if path.is_file():
        return {"test" if re.split(r"[-.]", path.name)[0] in TEST_NAMES else "train": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
        found.setdefault(re.split(r"[-.]", file.name)[0], []).append(file)
    test = next((name for name in TEST_NAMES if name in found), "test")
    return {"test" if split == test else split: files for split, files in found.items()}


def _read_parquet(source: Source) -> ImageSet:
    """Columns `img` or `image` (bytes, or a struct with them) and `label`, `labels`, `fine_label` or `coarse_label`: numbers, or words."""
    if not runtime.is_installed("pyarrow"):
        raise SourceError("parquet files are read with pyarrow, which is not installed: pip install pyarrow")
    read, classes = {}, ()
    for split, files in _parquet_files(source.path).items():
        if split not in ("train", "test"):
            continue
        columns, labels = [], []
        for file in files:
            image, of_file, named = _or_refused(lambda: _labels_of(file, source), file)
            columns.append((file, image))
            labels += of_file
            classes = classes or named
        for label in labels:
            if label in (None, "") or type(label) is int and label < 0:
                raise SourceError(f"{source.path}: {split} has samples without a label ({label!r}): a set to train on needs one each" + (
                    "; where another split, such as validation-*, has labels, move test-*.parquet away" if split == "test" else ""))
            if type(label) not in (str, int):
                raise SourceError(f"{source.path}: {split} has labels such as {label!r} ({type(label).__name__}), expected numbers or words")
        contents = source.watch(_cells_of(columns), len(labels))
        images = _stack(len(labels), (_cell(content, f"{source.path}: {split} image {i}", source) for i, content in enumerate(contents)), source)
        read[split] = images, labels
    if any(type(label) is str for _, labels in read.values() for label in labels):    # words, not numbers of classes
        classes = tuple(_in_order({str(label) for _, labels in read.values() for label in labels}))
        numbers = {name: number for number, name in enumerate(classes)}
        read = {split: (images, [numbers[str(label)] for label in labels]) for split, (images, labels) in read.items()}
    return _image_set(source, source.path.resolve().name, {
        split: (images, np.array(labels, np.int64)) for split, (images, labels) in read.items()}, classes)


def _labels_of(file: Path, source: Source) -> tuple[str, list[object], tuple[str, ...]]:
    """The name of the column of images in a parquet file, the labels, and the names of the classes where it holds them."""
    from pyarrow.parquet import ParquetFile
    with ParquetFile(file) as table:
        names = table.schema_arrow.names
        image = next((name for name in ("img", "image") if name in names), None)
        label = next((name for name in ("label", "labels", f"{source.labels}_label") if name in names), None)
        if image is None or label is None:
            raise SourceError(f"{file}: has the columns {', '.join(names)}; expected img or image, and label or {source.labels}_label")
        return image, table.read(columns=[label]).column(label).to_pylist(), _hub_classes(table.schema_arrow.metadata or {}, label)


def _cells_of(columns: Iterable[tuple[Path, str]]) -> Iterator[object]:
    """The cells of a column in each of some parquet files, a few at a time: files may be larger than the memory that their images take."""
    from pyarrow.parquet import ParquetFile
    for file, column in columns:
        with ParquetFile(file) as table:
            batches = table.iter_batches(batch_size=256, columns=[column])
            while (cells := _or_refused(lambda: next(batches, None), file)) is not None:
                yield from _or_refused(cells.column(0).to_pylist, file)


def _or_refused(reading: Callable[[], T], file: Path) -> T:
    try:
        return reading()
    except SourceError:
        raise
    except Exception as error:    # pyarrow raises a dozen kinds for damaged files
        raise SourceError(f"{file}: is no readable parquet file ({type(error).__name__}): fetch it again") from error


def _cell(content: object, where: str, source: Source) -> tuple[str, np.ndarray]:
    """The image in one cell of a table: its bytes, or a struct with them."""
    content = content.get("bytes") if isinstance(content, dict) else content
    if not isinstance(content, bytes):
        raise SourceError(f"{where}: is no bytes in the file: expected them in the table")
    return where, read_image(io.BytesIO(content), where, source.image_size, source.fit)


def _hub_classes(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """The class names that the Hub's `datasets` writes into a parquet file's schema, or none; `T - shirt / top`, which could be a path,
    as `T - shirt - top`."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return ()
    return tuple(re.sub(r"[/\\]", "-", str(name)) for name in names) if isinstance(names, list) else ()


def _read_arrays(source: Source) -> ImageSet:
    """An .npz file with x_train, y_train, x_test, y_test (or train_images, train_labels, ...), or with one split: x and y,
    or images and labels, in capitals or not. Class names in `classes`, else numbers. Images uint8 (N, H, W), (N, H, W, 3), or (N, 3, H, W)."""
    arrays, read = in_small_letters(read_arrays(source.path), str(source.path)), {}
    for split, pairs in ARRAY_NAMES.items():
        for x, y in pairs:
            if x in arrays and y in arrays:
                images, labels = as_images(arrays[x], f"{source.path}: {x}", source.way_out), arrays[y].reshape(-1)
                if labels.dtype.kind not in "iu":
                    raise SourceError(f"{source.path}: {y} is {labels.dtype} {arrays[y].shape}, expected whole numbers, one an "
                                      "image")
                read.setdefault("test" if split == "val" else split, (images, labels.astype(np.int64)))
    if not read:
        raise SourceError(f"{source.path}: holds {', '.join(sorted(arrays))}; expected x_train, y_train, x_test and y_test, or "
                          "images and labels")
    names = next((arrays[k] for k in ("classes", "class_names", "label_names") if k in arrays), np.array([], str))
    if names.size > 10_000:
        raise SourceError(f"{source.path}: has {names.size:,} class names, expected at most 10,000")
    return _image_set(source, source.path.stem, read, tuple(map(as_text, names.reshape(-1).tolist())))


def as_images(array: np.ndarray, where: str, way_out: str = SMALLER) -> np.ndarray:
    """uint8 (N, H, W, 3) from an array of images in another layout, grey values repeated.

    Taken are uint8 (N, H, W), (N, H, W, 1), (N, H, W, 3), (N, 1, H, W), (N, 3, H, W), and CIFAR's rows (N, 3072): 1,024
    red, green and blue values. Raises SourceError, naming `where`, for anything else, and with `way_out` where
    the memory does not hold them.
    """
    if array.dtype != np.uint8:
        raise SourceError(f"{where}: is {array.dtype} {array.shape}, expected uint8 in [0, 255]: scale and round it first")
    if array.ndim == 2 and array.shape[1] == 3072:
        _check_planes(array, where)
        array = array.reshape(-1, 3, 32, 32)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3) or not all(array.shape[1:]):
        raise SourceError(f"{where}: has the shape {array.shape}, expected (N, H, W, 3), (N, 3, H, W), (N, H, W) or (N, 3072)")
    if array.shape[3] == 1:
        check_room(3 * array.nbytes, way_out)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))


def _check_planes(rows: np.ndarray, where: str) -> None:
    """Refuse rows that hold a pixel's three values side by side. A picture is smooth: read in the wrong order, neighbours
    differ far more than in the right one."""
    if not len(rows):
        return
    sample = rows[:1000].astype(np.int16)
    as_planes, as_pixels = sample.reshape(-1, 3, 32, 32), sample.reshape(-1, 32, 32, 3)
    planes, pixels = np.abs(np.diff(as_planes, axis=3)).mean(), np.abs(np.diff(as_pixels, axis=2)).mean()
    grey = (as_pixels == as_pixels[..., :1]).all() and not (as_planes == as_planes[:, :1]).all()    # where each value stands three times
    if planes > 1.1 * pixels or grey:
        raise SourceError(f"{where}: its rows hold red, green and blue of each pixel side by side, expected all red values, then "
                          "green, then blue: reshape them to (N, 32, 32, 3)")


def _image_set(source: Source, name: str, read: dict, classes: tuple[str, ...]) -> ImageSet:
    """An ImageSet from {split: (images, labels)} of `train` and `test`, or of one of `train` and `all`."""
    labels = np.concatenate([labels for _, labels in read.values()])
    if not len(labels) or labels.min() < 0:
        raise SourceError(f"{source.path}: has {len(labels)} labels, the least {labels.min() if len(labels) else '-'}; expected "
                          "numbers from 0")
    if not classes:
        if labels.max() >= 10_000:
            raise SourceError(f"{source.path}: has a label {labels.max()}, expected class numbers below 10,000")
        classes = tuple(map(str, range(int(labels.max()) + 1)))
    if "train" in read and "test" in read:
        splits = Split(*read["train"]), Split(*read["test"])
    elif "test" in read and len(read) == 1 and not source.for_training:
        (images, labels), = read.values()
        splits = Split(images[:0], labels[:0]), Split(images, labels)
    elif len(read) == 1 and "test" not in read:
        (images, labels), = read.values()
        if len(images) != len(labels):
            raise SourceError(f"{source.path}: has {len(images)} images and {len(labels)} labels")
        splits = _split_off_test(images, labels, [str(i) for i in range(len(labels))], source)
    else:
        raise SourceError(f"{source.path}: holds {' and '.join(read)}, expected train and test, or train alone")
    return ImageSet(name, source.describe(), classes, *splits)


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

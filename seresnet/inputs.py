"""Images without labels, as people have them (files and folders) -> their ids and uint8 pixels, in the input's order."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seresnet.beton import open_beton, read_images
from seresnet.files import (IMAGE_SUFFIXES, OTHER_PICTURES, SourceError, as_text, check_room, files_below, fit_images, in_small_letters, is_image,
                            left_out, load_pickle, read_arrays, read_image, read_image_files)
from seresnet.sources import as_images

IMAGE_KEYS = ("images", "data", "x", "x_test", "test_images")
ID_KEYS = ("ids", "id")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".p", "")
IN_PARTS = "predict them in parts"
BINARY_ROWS = (3073, 3074, 3072)    # CIFAR-10's rows (a label byte and the pixels), CIFAR-100's (two), pixels alone


@dataclass(frozen=True)
class Unlabelled:
    """ids: one text an image, none twice. images: uint8 (N, H, W, 3), RGB. left_out: a line on pictures that were not read; fitted: one
    on those that were of another size."""

    ids: list[str]
    images: np.ndarray
    left_out: str = ""
    fitted: str = ""


def read_unlabelled(path: Path | str, image_size: int, fit: str = "none",
                    watch: Callable[[Iterable, int], Iterable] = lambda items, total: items, suffix: bool = False) -> Unlabelled:
    """The images at `path`, for a net that takes `image_size` pixels a side.

    Read are an image folder (ids: names, below subfolders with them, and with their `suffix` if wanted; 2 before 10) or a single image, a
    .beton, .npy, .npz (`images` and perhaps `ids`) and .bin (CIFAR's rows, labels passed over), and any other file as a
    pickle of Python 2 or 3 (a dict with `data` and perhaps `ids`, or an array), which is never executed. Where a file has
    no ids, they count from 0. fit: how images of another size are brought to it, `resize` or `crop` (files.read_image);
    with `none` they are refused. watch: as of sources.Source.

    Raises SourceError with path, finding and way out.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"--images {path}: does not exist (looked in {Path.cwd()})")
    size = 0 if fit == "none" else image_size
    sizes: set[tuple[int, int]] = set()
    if path.is_dir():
        found = _folder(path, image_size, size, fit, watch, suffix, sizes)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        found = Unlabelled([path.name if suffix else path.stem],
                           _expected(read_image(path, size=size, fit=fit, found=sizes)[None], image_size, str(path)))
    elif path.suffix.lower() in OTHER_PICTURES:
        raise SourceError(f"{path}: is a picture in a format that we do not read: convert it to PNG or JPEG")
    elif path.suffix.lower() == ".beton":
        beton = open_beton(path)
        check_room(beton.samples * beton.height * beton.width * 3, IN_PARTS)
        images = read_images(beton)
        found = Unlabelled([str(i) for i in range(len(images))], images)
    else:
        found = _table(path)
    images = fit_images(found.images, size, fit, IN_PARTS) if size else found.images
    sizes.add((found.images.shape[2], found.images.shape[1]))
    twice = [name for name, count in Counter(found.ids).items() if count > 1]
    if twice:
        way_out = ", which files of one name have with --suffix" if path.is_dir() and not suffix else ""
        raise SourceError(f"{path}: has {len(twice)} ids more than once, such as {twice[0]!r}: every image needs its own{way_out}")
    if not len(images):
        raise SourceError(f"{path}: holds no images")
    return Unlabelled(found.ids, _expected(images, image_size, str(path)), found.left_out, _fitted(sizes, image_size, fit))


def _fitted(sizes: set[tuple[int, int]], side: int, fit: str) -> str:
    """A line on what was done to images whose sizes (width, height) are not the net's; nothing where there were none."""
    others = sorted(sizes - {(side, side)}, key=lambda size: (size[0] * size[1], size))
    if not others:
        return ""
    texts = [f"{width} x {height}" for width, height in dict.fromkeys((others[0], others[-1]))]
    return f"images of {' to '.join(texts)} pixels were brought to {side} x {side} by {fit} (--fit none refuses them)"


def _expected(images: np.ndarray, side: int, where: str) -> np.ndarray:
    if images.shape[1:] != (side, side, 3):
        raise SourceError(f"{where}: has images of {images.shape[2]} x {images.shape[1]} pixels, the net takes {side} x {side}: "
                          "give --fit resize or --fit crop")
    return images


def _folder(path: Path, side: int, size: int, fit: str, watch: Callable, suffix: bool, sizes: set[tuple[int, int]]) -> Unlabelled:
    names = [name for name in (file.relative_to(path) for file in files_below(path, all_of_them=True)) if is_image(name)]
    if not names:
        passed_over = left_out(path, ())
        raise SourceError(f"{path}: holds no {', '.join(IMAGE_SUFFIXES)} files{f' ({passed_over})' if passed_over else ''}")
    names.sort(key=lambda name: (str(name.parent), int(name.stem) if name.stem.isdecimal() else -1, str(name)))
    check_room(len(names) * side * side * 3, IN_PARTS)
    images = np.empty((len(names), side, side, 3), np.uint8)
    for i, image in enumerate(watch(read_image_files([path / name for name in names], size, fit, sizes), len(names))):
        images[i] = _expected(image[None], side, str(path / names[i]))[0]
    ids = [(name if suffix else name.with_suffix("")).as_posix() for name in names]
    return Unlabelled(ids, images, left_out(path, (path / name for name in names)))


def _table(path: Path) -> Unlabelled:
    """Arrays in one file."""
    if path.suffix.lower() in (".npy", ".npz"):
        content = read_arrays(path)
        if len(content) == 1:    # whatever it is called: numpy's arr_0, unless told otherwise
            content = {"images": next(iter(content.values()))}
    elif path.suffix.lower() == ".bin":
        content = {"data": _binary_rows(path)}
    else:
        try:
            with open(path, "rb") as file:
                content = load_pickle(file, str(path))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
        except SourceError as error:
            if path.suffix.lower() in PICKLE_SUFFIXES:
                raise
            raise SourceError(f"{error}; read are folders, {', '.join(IMAGE_SUFFIXES)}, .npy, .npz, .beton, .bin, and pickles") from error
        content = {"data": content} if isinstance(content, np.ndarray) else content
    if not isinstance(content, dict):
        raise SourceError(f"{path}: holds a {type(content).__name__}, expected a dict with `data`, or an array of images")
    content = in_small_letters(content, str(path))    # X_test, ID
    key = next((key for key in IMAGE_KEYS if isinstance(content.get(key), np.ndarray)), None)
    if key is None and (lists := [key for key in IMAGE_KEYS if isinstance(content.get(key), (list, tuple))]):
        raise SourceError(f"{path}: {lists[0]} is a list, expected one array of images: numpy.stack makes it of them")
    if key is None:
        raise SourceError(f"{path}: holds {', '.join(map(repr, sorted(map(str, content))[:8])) or 'nothing'}, expected an array of "
                          f"images named {' or '.join(IMAGE_KEYS)}")
    array = content[key]
    if array.ndim == 3 and 3 in (array.shape[0], array.shape[2]):    # labels, in a set to train on, would tell which
        raise SourceError(f"{path}: {key} has the shape {array.shape}, which is one image or several grey ones: give colour images as "
                          "(N, H, W, 3), one as images[None], grey ones as (N, H, W, 1)")
    images = as_images(array, f"{path}: {key}", IN_PARTS)
    ids = next((content[name] for name in ID_KEYS if content.get(name) is not None), range(len(images)))
    try:
        ids = np.asarray(ids)
    except ValueError as error:
        raise SourceError(f"{path}: its ids are no list of numbers or words: leave them out, or mend them") from error
    if ids.size != len(images):    # before they become texts: a file of some bytes may claim any number
        raise SourceError(f"{path}: has {len(images)} images and {ids.size} ids: every image needs one")
    ids = ids.reshape(-1)
    if ids.dtype.kind == "f" and (ids == np.floor(ids)).all() and (np.abs(ids) < 2**53).all():    # a table's numbers, read as floats
        ids = ids.astype(np.int64)
    return Unlabelled([as_text(name) for name in ids.tolist()], images)


def _binary_rows(path: Path) -> np.ndarray:
    try:
        check_room(path.stat().st_size, IN_PARTS)
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    fitting = [row for row in BINARY_ROWS if len(content) and len(content) % row == 0]
    if len(fitting) != 1:
        raise SourceError(f"{path}: has {len(content)} bytes, which is {'both ' if fitting else 'no '}multiple of "
                          f"{' and '.join(map(str, fitting or BINARY_ROWS))}, the rows of CIFAR's binary layouts: it is cut off, "
                          "or give the images as .npy")
    return content.reshape(-1, fitting[0])[:, fitting[0] - 3072:]

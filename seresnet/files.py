"""Files that strangers wrote -> arrays and plain values: read within limits, and nothing in them is ever executed."""
from __future__ import annotations

import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np

from seresnet import runtime
from seresnet.runtime import UserError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST_IMAGE = 64 << 20    # pixels; a photograph has fewer, and a file of some kilobytes may claim any number
TOO_LARGE = f"expected {LARGEST_IMAGE:,} in all at most: make it smaller, or remove it"
PHOTOGRAPH = 16 << 10    # bytes of a file from which on its decoding is worth a thread
OTHER_PICTURES = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".heic", ".avif")    # which we do not read
FITS = ("resize", "crop")
TOLD = 20    # problems of image files
ORIENTATION = 0x0112    # in EXIF, how the camera was held
FEWER = "evaluate fewer of them at a time"
SMALLER = "make them smaller with --sources.image_size"


class SourceError(UserError):
    """A data set, or a file, is missing, unreadable, or not what it claims to be."""


def is_image(file: Path) -> bool:
    """Whether `file`, relative to what was named, is a picture that we read. Hidden ones are none, nor those in hidden folders:
    macOS puts `._cat.jpg` beside `cat.jpg`."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in file.parts)


def files_below(folder: Path, all_of_them: bool = False) -> Iterator[Path]:
    """Every file in `folder` at any depth, in a fixed order; not behind links to folders, which may lead anywhere, and in circles.
    Folders that may not be read are passed over, or, where `all_of_them` are wanted, raise SourceError."""
    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: {error.strerror}: make it readable, or move it away") from error
    for place, folders, names in os.walk(folder, onerror=refuse if all_of_them else None):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))


def left_out(folder: Path, taken: Iterable[Path]) -> str:
    """A line on the pictures in `folder`, at any depth and of any format, that are not among those `taken`, and on links to folders behind
    which none of those are; '' for none."""
    taken = set(taken)

    def shown(file: Path) -> bool:
        return not any(part.startswith(".") for part in file.relative_to(folder).parts)
    behind = {place for parent in {file.parent for file in taken} for place in (parent, *parent.parents)}
    rest, links = [], []
    for place, folders, names in os.walk(folder):
        rest += [file for name in names if (file := Path(place, name)).suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_PICTURES)
                 and file not in taken and shown(file)]
        links += [link for name in folders if (link := Path(place, name)).is_symlink() and link not in behind and shown(link)]
    told = [f"{len(rest):,} pictures in other places or formats, such as {min(rest)}"] if rest else []
    told += [f"what is behind {len(links):,} links to folders, such as {min(links)}"] if links else []
    return f"left out: {', and '.join(told)}" if told else ""


def as_text(name: object) -> str:
    """An id or a class name as text: Python 2 and HDF5 keep it as bytes, in UTF-8 or else in Latin 1. A text that can only be such
    bytes, read as Latin 1, is read again."""
    try:
        content = name if isinstance(name, bytes) else str(name).encode("latin1")
    except UnicodeEncodeError:
        return str(name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin1")


def read_image(file: Path | BinaryIO, where: str = "", size: int = 0, fit: str = "resize", upright: bool = True,
               found: set[tuple[int, int]] | None = None) -> np.ndarray:
    """A PNG or JPEG file as uint8 (H, W, 3), RGB; grey values are repeated, CMYK is converted, 16 bits become 8.

    size: side to bring it to, 0 for the file's own height and width. fit: `resize` brings both sides to `size`, `crop`
    the shorter one, of which the middle is then cut out; both interpolate bicubically over the pixels that fall together.
    upright: turn it as EXIF says that the camera was held. found: gets the file's own width and height, in pixels.

    Raises SourceError naming the file, or `where` it came from.
    """
    from PIL import Image
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):    # our own limit is lower than Pillow's
        return _decoded(file, where or str(file), size, fit, upright, found)


def _decoded(file: Path | BinaryIO, where: str, size: int, fit: str, upright: bool, found: set[tuple[int, int]] | None) -> np.ndarray:
    from PIL import Image, ImageOps
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > LARGEST_IMAGE:    # decided from the header, before anything is decoded
                raise SourceError(f"{where}: is {image.width} x {image.height} pixels, {TOO_LARGE}")
            if image.mode in ("I;16", "I"):    # 16 bits, by Pillow's version: convert would cut them off at 255
                image = _in_8_bits(image)
            if image.mode in ("RGBA", "LA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    raise SourceError(f"{where}: is partly transparent: put it on a background first")
            image = _turned(image.convert("RGB")) if upright else image.convert("RGB")
            if found is not None:
                found.add(image.size)
            if size:
                how = Image.Resampling.BICUBIC
                image = image.resize((size, size), how) if fit == "resize" else ImageOps.fit(image, (size, size), how)
            return np.asarray(image)
    except SourceError:
        raise
    except Image.DecompressionBombError as error:    # far beyond our limit: Pillow asked for the size before us
        raise SourceError(f"{where}: has more pixels than Pillow opens, {TOO_LARGE}") from error
    except Exception as error:    # Pillow raises a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or "is no readable PNG or JPEG"
        raise SourceError(f"{where}: {reason}: replace or remove it") from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits as an image of 8, which keeps how the camera was held."""
    from PIL import Image
    small = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    small.info.update(image.info)
    return small


def read_image_files(files: Sequence[Path], size: int = 0, fit: str = "resize",
                     found: set[tuple[int, int]] | None = None) -> Iterator[np.ndarray]:
    """read_image of each, in their order, photographs on all cores: Pillow lets go of Python while it decodes and resizes, which of
    small pictures are shorter than handing one to a thread.

    Raises SourceError where some cannot be read, with what is wrong with TOLD of them at most; images from that part of the files on
    are not given.
    """
    from PIL import Image
    cores = min(runtime.available_cores(), 16)
    held = 8 * cores if size else cores    # at most, decoded
    problems: list[str] = []

    def decoded(file: Path) -> np.ndarray | None:
        try:
            return _decoded(file, str(file), size, fit, True, found)
        except SourceError as error:
            problems.extend(error.problems)
            return None
    with ThreadPoolExecutor(cores) as pool:
        for start, end in pairwise([0, *range(1, len(files), held), len(files)]):    # one first: by it whoever asks sees what all will take
            part = files[start:end]
            read = pool.map if sum(map(_bytes_of, part)) > len(part) * PHOTOGRAPH else map
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):    # of all threads
                images = list(read(decoded, part))
            if not problems:
                yield from images
            if len(problems) > TOLD:
                problems[TOLD:] = [f"and {len(problems) - TOLD:,} more like these; {len(files) - end:,} images were not looked at"]
                break
    if problems:
        raise SourceError(*problems)


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:    # whoever reads it says so
        return 0


def _turned(image: Image.Image) -> Image.Image:
    """Turned as EXIF says that the camera was held; as it is where that cannot be read, which viewers do as well."""
    from PIL.Image import Transpose
    try:
        held = image.getexif().get(ORIENTATION)
    except Exception:    # Pillow raises a dozen kinds for damaged EXIF data
        return image
    how = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
           6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}.get(held)
    return image if how is None else image.transpose(how)    # not ImageOps.exif_transpose, which writes all EXIF data anew, and fails at some


def fit_images(images: np.ndarray, size: int, fit: str, way_out: str = SMALLER) -> np.ndarray:
    """uint8 (N, H, W, 3) -> (N, size, size, 3), each as read_image would bring it there; unchanged where it fits, or size is 0.

    Raises SourceError, with `way_out`, where the memory does not hold them.
    """
    if size in (0, images.shape[1]) and size in (0, images.shape[2]):
        return images
    from PIL import Image, ImageOps
    check_room(len(images) * size * size * 3, way_out)
    how, fitted = Image.Resampling.BICUBIC, np.empty((len(images), size, size, 3), np.uint8)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        fitted[i] = image.resize((size, size), how) if fit == "resize" else ImageOps.fit(image, (size, size), how)
    return fitted


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or the one of an .npy file under the name `images`.

    Raises SourceError where the file is missing or damaged, holds objects (which would be pickles), or more than fits into
    the free memory.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                check_room(sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()), "split it", path)
            else:
                check_room(os.fstat(file.fileno()).st_size, "split it", path)
            file.seek(0)
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"images": content}
            arrays = {name: content[name] for name in content.files}
        foreign = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if foreign:
            raise SourceError(f"{path}: {foreign[0]} in it is no array: write it with numpy.savez")
        return arrays
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:    # numpy and zipfile raise whatever a damaged file leads them to
        reason = ("holds objects rather than numbers: do not trust this file" if "Object arrays" in str(error) else
                  f"is no readable .npy or .npz file ({type(error).__name__})")
        raise SourceError(f"{path}: {reason}") from error


def check_room(needed: int, way_out: str, file: Path | None = None) -> None:
    """Raise SourceError where less than `needed` bytes of main memory are free, for images or for what is in `file`."""
    room = runtime.free_memory_of_machine()
    if needed > room:
        takes = f"{file}: unpacks to {needed >> 20} MiB" if file else f"the images take {needed >> 20} MiB of memory"
        raise SourceError(f"{takes}, {room >> 20} MiB are free: {way_out}")


def in_small_letters(content: Mapping[object, T], where: str) -> dict[str, T]:
    """`content` under its names in small letters: X_train is x_train. Raises SourceError where two names would become one."""
    small = {str(name).lower(): value for name, value in content.items()}
    if len(small) < len(content):
        twice = sorted(str(name) for name in content if sum(str(name).lower() == str(other).lower() for other in content) > 1)
        twice.sort(key=str.lower)    # each beside the other
        raise SourceError(f"{where}: holds {' and '.join(twice[:2])}, which differ in capitals alone: rename one of them")
    return small


def load_pickle(file: BinaryIO, where: str) -> object:
    """Read a pickle of plain values and numpy arrays, written by Python 2 or 3; dict keys come back as text.

    A pickle may name any function to be called on reading. Here only stand-ins for the few that rebuild an array or a number
    are found, with checks of their own; every other name ends in SourceError before anything is called.
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
    """Whatever a pickle may call, or give a state to, is one of the stand-ins below, never numpy's own constructor: handed a
    buffer and the type `object`, that one takes the file's bytes for pointers."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy._core", "numpy.core")    # numpy 2 moved it
        if (module, name) not in _STAND_INS:
            raise SourceError(f"asks for {module}.{name} on reading, which data never need: do not trust this file")
        return _STAND_INS[module, name]


class _Call:
    """A function that a pickle may call, but whose attributes it cannot set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise SourceError("changes what reads it: do not trust this file")

    def __setstate__(self, state: object) -> None:
        self.__setattr__("", state)


class _Dtype:
    """A type of numbers or texts as a pickle describes it: its code, then a state of which only the byte order matters."""

    __slots__ = ("dtype",)

    def __init__(self, code: object):
        if code == "O8":
            raise SourceError("holds an array of 'O8', expected numbers or texts: do not trust this file, or, where you wrote it, write it "
                              "again with .tolist() behind that array")
        if not (isinstance(code, str) and re.fullmatch(r"[<>|=]?[biufSU][1-9]\d{0,3}", code)):
            raise SourceError(f"holds an array of {code!r}, expected numbers: do not trust this file")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=") and state[2:5] == (None,) * 3):
            raise SourceError("describes its numbers in a way that none needs: do not trust this file")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose content follows as state, checked before numpy sees it."""

    filled = False

    def __setstate__(self, state: object) -> None:
        _version, shape, dtype, fortran_order, content = state
        content = content.encode("latin1") if isinstance(content, str) else content    # how Python 2 wrote bytes
        if not (isinstance(dtype, _Dtype) and isinstance(content, bytes)):
            raise SourceError("fills an array with something other than numbers: do not trust this file")
        if self.filled or math.prod(shape) * dtype.dtype.itemsize != len(content):    # numpy frees before it looks
            raise SourceError("fills an array twice, or with bytes that are not its own: do not trust this file")
        self.filled = True
        super().__setstate__((1, shape, dtype.dtype, fortran_order, content))


def _no_constructor(*arguments) -> None:
    raise SourceError("calls numpy.ndarray, which data only name: do not trust this file")


def _empty_array(kind, shape, dtype) -> np.ndarray:
    """What numpy's `_reconstruct` gives for an array."""
    if kind is not _STAND_INS["numpy", "ndarray"]:
        raise SourceError("rebuilds something other than a plain array: do not trust this file")
    return _Array((0,), np.uint8)


def _array_of_buffer(buffer, dtype, shape, order, axis_order=None) -> np.ndarray:
    """What numpy's `_frombuffer` gives. Order `K`: the axes lie in memory as `axis_order` says."""
    if not (isinstance(buffer, (bytes, bytearray)) and isinstance(dtype, _Dtype)):
        raise SourceError("makes an array of something other than bytes: do not trust this file")
    array = np.frombuffer(bytes(buffer), dtype.dtype)
    return array.reshape(shape, order=order) if order != "K" else array.reshape(shape).transpose(axis_order)


def _scalar(dtype, content) -> np.generic:
    content = content.encode("latin1") if isinstance(content, str) else content
    if not (isinstance(content, bytes) and isinstance(dtype, _Dtype)):
        raise SourceError("makes a number of something other than bytes: do not trust this file")
    return np.frombuffer(content, dtype.dtype, 1)[0]


def _plain_dtype(code, align=False, copy=True) -> _Dtype:
    return _Dtype(code)


def _latin1_bytes(text, encoding) -> bytes:
    """How Python 3 writes bytes into a protocol-2 pickle."""
    if encoding != "latin1":
        raise SourceError(f"encodes text as {encoding!r}: do not trust this file")
    return text.encode("latin1")


_STAND_INS = {("numpy.core.multiarray", "_reconstruct"): _Call(_empty_array), ("numpy", "ndarray"): _Call(_no_constructor),
              ("numpy.core.numeric", "_frombuffer"): _Call(_array_of_buffer), ("numpy", "dtype"): _Call(_plain_dtype),
              ("numpy.core.multiarray", "scalar"): _Call(_scalar), ("_codecs", "encode"): _Call(_latin1_bytes)}

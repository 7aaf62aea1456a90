"""Files that strangers wrote -> arrays and plain values: read within limits, and nothing in them is ever executed."""
from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from seresnet import runtime
from seresnet.runtime import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST_IMAGE = 64 << 20    # pixels; a photograph has fewer, and a file of some kilobytes may claim any number
FITS = ("resize", "crop")


class SourceError(UserError):
    """A data set, or a file, is missing, unreadable, or not what it claims to be."""


def read_image(file: Path | BinaryIO, where: str = "", size: int = 0, fit: str = "resize") -> np.ndarray:
    """A PNG or JPEG file as uint8 (H, W, 3), RGB; grey values are repeated.

    size: side to bring it to, 0 for the file's own height and width. fit: `resize` brings both sides to `size`, `crop`
    the shorter one, of which the middle is then cut out; both interpolate bicubically over the pixels that fall together.
    Raises SourceError naming the file, or `where` it came from.
    """
    from PIL import Image, ImageOps
    where = where or str(file)
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), \
                Image.open(file, formats=("PNG", "JPEG")) as image:    # our own limit is lower than Pillow's
            if image.width * image.height > LARGEST_IMAGE:    # decided from the header, before anything is decoded
                raise SourceError(f"{where}: is {image.width} x {image.height} pixels, expected {LARGEST_IMAGE:,} in all at "
                                  "most: make it smaller, or remove it")
            if image.mode not in ("RGB", "L", "1", "P", "RGBA", "LA"):
                raise SourceError(f"{where}: has the pixel format {image.mode}, expected 8-bit RGB or grey: convert it")
            if image.mode in ("RGBA", "LA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    raise SourceError(f"{where}: is partly transparent: put it on a background first")
            image = image.convert("RGB")
            if size:
                how = Image.Resampling.BICUBIC
                image = image.resize((size, size), how) if fit == "resize" else ImageOps.fit(image, (size, size), how)
            return np.asarray(image)
    except SourceError:
        raise
    except Exception as error:    # Pillow raises a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or "is no readable PNG or JPEG"
        raise SourceError(f"{where}: {reason}: replace or remove it") from error


def fit_images(images: np.ndarray, size: int, fit: str) -> np.ndarray:
    """uint8 (N, H, W, 3) -> (N, size, size, 3), each as read_image would bring it there; unchanged where it fits, or size is 0."""
    if size in (0, images.shape[1]) and size in (0, images.shape[2]):
        return images
    from PIL import Image, ImageOps
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
                room = runtime.free_memory_of_machine()
                needed = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
                if needed > room:
                    raise SourceError(f"{path}: unpacks to {needed >> 20} MiB, {room >> 20} MiB are free: split it")
            file.seek(0)
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"images": content}
            return {name: content[name] for name in content.files}
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:    # numpy and zipfile raise whatever a damaged file leads them to
        reason = ("holds objects rather than numbers: do not trust this file" if "Object arrays" in str(error) else
                  f"is no readable .npy or .npz file ({type(error).__name__})")
        raise SourceError(f"{path}: {reason}") from error


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

"""uint8 arrays -> .beton (temporary file, verified, renamed), and a beton's checks before use.

A beton is FFCV's file: header, field descriptors, one metadata row a sample, pages of pixels, allocation table. FFCV's
reader believes whatever these say: a file that was cut off, or whose writing was interrupted, opens without an error and
yields garbage. So everything is checked here first, with numpy alone. Beside each beton lies `<name>.beton.json`, the
sidecar: what FFCV has no room for (class names, statistics, origin) and the hashes to check the beton against.
"""
from __future__ import annotations

import datetime
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from seresnet import runtime
from seresnet.runtime import UserError
from seresnet.files import FITS, read_image
from seresnet.imageset import Split, channel_statistics, problems_of_names

FORMAT = 1    # of the sidecar; raised when a reader of today could not understand it
# The layout of FFCV 1.0.2 (ffcv/types.py, ffcv/fields/rgb_image.py), for a file with an RGB image and an integer label.
VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
                   ("alloc_table_ptr", "<u8")])
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype({"names": ["mode", "width", "height", "data_ptr", "label"], "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
                   "offsets": [0, 1, 3, 5, 16], "itemsize": 24})
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = [(2, b"image"), (1, b"label")]    # RGBImageField, IntField
MODES = {"jpeg": 0, "raw": 1}              # how pixels are stored
HOW = {    # keys of `sources` in a sidecar -> whether a value may be one's
    "image_size": lambda value: type(value) is int and 0 <= value <= 4096, "fit": FITS.__contains__,
    "test_share": lambda value: type(value) is float and 0 < value < 1, "labels": ("fine", "coarse").__contains__}
WRITE = "python write_datasets.py --config-file ..."    # in messages; who knows the config puts its own command there
AGAIN = f"write it again with `{WRITE} --force`"


class BetonError(UserError):
    """A beton or its sidecar is missing, damaged, foreign, or does not fit the recipe."""


@dataclass(frozen=True)
class Beton:
    """A beton that was checked. mean, std: a channel, over this split, in pixel values (0 to 255); std is 1 where a
    channel never varies, since images are divided by it. labels: int64 (N,)."""

    path: Path
    samples: int
    height: int
    width: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    labels: np.ndarray
    storage: str    # raw or jpeg
    name: str
    source: str
    identity: tuple[int, ...]    # of the file on disk, as file_identity gives it
    how: dict[str, int | float | str] = field(default_factory=dict)    # keys of `sources` with which it was written; of older files, none
    fingerprint: str = ""    # of the data set and how it was read (sources.Source.fingerprint), storage and split behind slashes

    def check_unchanged(self) -> None:
        """Raise BetonError where the file at `path` is no longer the one that was checked."""
        try:
            same = file_identity(self.path) == self.identity
        except OSError as error:
            raise BetonError(f"{self.path}: {error.strerror} (it was there when this program started)") from error
        if not same:
            raise BetonError(f"{self.path}: was changed while it was in use: start again")


def file_identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and time of the last change: another file, or another content, has another one."""
    s = os.stat(path)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def sidecar_path(path: Path | str) -> Path:
    return Path(f"{path}.json")


# -- writing ------------------------------------------------------------------------------------------------------------

def write_beton(path: Path | str, split: Split, *, classes: tuple[str, ...], name: str, source: str, fingerprint: str,
                how: dict | None = None, storage: str = "raw", jpeg_quality: int = 95,
                progress: Callable[[int], None] = lambda written: None) -> Beton:
    """Write one split, so that at any moment `path` is the old file or the new one, whole.

    split: uint8 (N, H, W, 3) and int64 (N,) in [0, len(classes)). name, source, fingerprint: of the data set, for the
    sidecar; how: with which keys of `sources` it was read (sources.Source.how), so that whoever evaluates the net later reads
    images alike. storage: `raw` pixels, or `jpeg` of that quality (1 to 100), which loses some and takes less room. progress(n)
    hears how many samples are written. The new file is read back and compared, raw pixels one for one, before it takes the
    old one's place. Raises BetonError where it cannot be written or does not read back; the old file is then untouched.
    """
    path = Path(path)
    images = np.ascontiguousarray(split.images)
    with _alone(path):    # before what others left is cleared away: of another machine's process it cannot be told whether it is at work
        _check_writable(path, 0)    # before anything is encoded
        contents = images.reshape(len(images), -1) if storage == "raw" else [_encode_jpeg(image, jpeg_quality) for image in images]
        _check_writable(path, images.nbytes if storage == "raw" else sum(map(len, contents)))
        _write(path, contents, storage, images, split.labels, progress, {
            "format": FORMAT, "name": name, "source": source, "fingerprint": fingerprint, "how": how or {}, "classes": list(classes)})
    return open_beton(path)


def _write(path: Path, contents: Sequence[np.ndarray], storage: str, images: np.ndarray, labels: np.ndarray, progress: Callable[[int], None],
           told: dict) -> None:
    """Write `contents`, which are `images` as they are stored, and a sidecar of what is `told` and what is found. As write_beton."""
    beside = sidecar_path(path).resolve()    # where it is a link, that stays
    before = (file_identity(path), beside.read_bytes()) if path.is_file() and beside.is_file() else None
    try:
        # Two files cannot be renamed at once; the beton is first. Without a sidecar a beton is not used, so at no moment do an
        # old and a new one stand side by side.
        with runtime.whole_file(beside) as note, runtime.whole_file(path) as temporary:
            _write_samples(temporary, contents, labels, images.shape[1:3], storage, progress)
            layout, size = _read_layout(temporary)
            sidecar = {
                **told, "samples": len(images), "height": images.shape[1], "width": images.shape[2],
                "class_counts": np.bincount(labels, minlength=len(told["classes"])).tolist(), "mean": [0.0] * 3, "std": [1.0] * 3,
                "bytes": size, "sha256": _sha256(temporary), "layout_sha256": layout.sha256,
                "versions": runtime.describe_versions(),
                "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
            written = _beton(temporary, layout, sidecar)
            same = _holds(written, images) if storage == "raw" else all(
                np.array_equal(_region(temporary, layout, i), content) for i, content in enumerate(contents))
            if not same or not np.array_equal(written.labels, labels):
                raise BetonError(f"{path}: does not read back as it was written (a full disk, or one that fails): the file "
                                 "that was there before is untouched")
            stored = [images] if storage == "raw" else read_in_parts(written)
            sidecar.update(zip(("mean", "std"), map(list, channel_statistics(stored))))
            note.write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
            for file in (temporary, note):    # before anything that was there is touched
                runtime.sync(file)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            beside.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):    # Windows keeps a file that is being read: the old one has its sidecar again
            if before is not None and not beside.exists() and file_identity(path) == before[0]:
                beside.write_bytes(before[1])
        raise BetonError(f"{path}: cannot be written ({error.strerror}): free space there, or choose another place with "
                         "--beton.train and --beton.test") from error


def _holds(written: Beton, images: np.ndarray) -> bool:
    """Whether the pixels of `written` are `images`, a part at a time: either may be larger than the memory (np.memmap)."""
    compared = 0
    for part in read_in_parts(written):
        if not np.array_equal(part, images[compared:compared + len(part)]):
            return False
        compared += len(part)
    return compared == len(images)


def _check_writable(path: Path, size: int) -> None:
    with _place_explained(path):
        runtime.remove_abandoned(path.parent, glob.escape(path.name))    # before the room is measured
        free = shutil.disk_usage(path.parent).free
    needed = int(size * 1.02) + (16 << 20)    # pages that are not quite full, table, the last page
    if free < needed:
        raise BetonError(f"{path}: needs {needed >> 20} MiB, {free >> 20} MiB are free: free space there, or choose "
                         "another place with --beton.train and --beton.test")


@contextmanager
def _place_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BetonError(f"{path}: cannot be written ({error.strerror}): choose another place with --beton.train and "
                         "--beton.test") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Make sure that there is a folder for `path`, and keep other converters from it while the block runs. Raises BetonError where
    there cannot be one, or another is at work on it."""
    place = path.with_name(f".{path.name}.lock")
    while True:
        with _place_explained(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            file = open(place, "ab")
        with file:
            if not runtime.lock(file):
                raise BetonError(f"{path}: another process is writing this file: wait for it, or choose another place with "
                                 "--beton.train and --beton.test")
            try:
                if os.stat(place).st_ino != os.fstat(file.fileno()).st_ino:
                    continue
            except FileNotFoundError:    # its owner ended, and took it away, between our opening and our locking it
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    place.unlink()
            return


def _encode_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image
    file = io.BytesIO()
    # Full resolution of the colours: halving it, JPEG's default, costs small images most of theirs.
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return np.frombuffer(file.getbuffer(), np.uint8)


def _write_samples(path: Path, contents: Sequence[np.ndarray], labels: np.ndarray, shape: tuple[int, int], storage: str,
                   progress: Callable[[int], None]) -> None:
    """Write uint8 `contents`, one a sample, in FFCV's format: byte for byte what its own writer makes of them (a test).

    Not through FFCV's `DatasetWriter`, which hands samples to worker processes and waits for ever when one of them dies
    (ffcv/writer.py, `_write_common`), and which needs FFCV to be installed. Copying bytes is not work that wants processes.
    """
    sizes = [len(content) for content in contents]
    page_size = max(8 << 20, 1 << (max(sizes) - 1).bit_length())
    header, table = np.zeros(1, HEADER), np.zeros(len(sizes), ALLOCATION)
    descriptors, rows = np.zeros(len(FIELDS), FIELD), np.zeros(len(sizes), SAMPLE)
    for descriptor, (kind, name) in zip(descriptors, FIELDS):
        descriptor["type_id"], descriptor["name"] = kind, name
    position = -(-(header.nbytes + descriptors.nbytes + rows.nbytes) // page_size) * page_size
    for i, size in enumerate(sizes):    # a sample lies within one page
        if position // page_size != (position + size - 1) // page_size:
            position = -(-position // page_size) * page_size
        table[i] = i, position, size
        position += size
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELDS), page_size
    header["num_samples"], header["alloc_table_ptr"] = len(sizes), -(-position // page_size) * page_size
    rows["mode"], rows["height"], rows["width"] = MODES[storage], *shape
    rows["data_ptr"], rows["label"] = table["ptr"], labels
    with open(path, "wb") as file:
        for part in (header, descriptors, rows):
            file.write(part.tobytes())
        for i, content in enumerate(contents):
            start = int(table["ptr"][i])
            if file.tell() != start:
                file.write(bytes(start - file.tell()))
            file.write(content)
            if i % 1000 == 999:
                progress(i + 1)
        file.write(bytes(int(header["alloc_table_ptr"][0]) - file.tell()))
        file.write(table.tobytes())
    progress(len(sizes))


# -- reading ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Layout:
    """What a beton's structure says, checked to be consistent: sample i's pixels are sizes[i] bytes from pointers[i] on."""

    height: int
    width: int
    storage: str
    labels: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    sha256: str    # of header, descriptors, metadata and table: all but the pixels


def open_beton(path: Path | str, *, classes: int | None = None, image_size: int | None = None,
               verify: str = "quick") -> Beton:
    """Check a beton and its sidecar before use.

    verify: `quick` (a few milliseconds) checks that every part of the structure fits the file's length, the other parts
    and the sidecar's hash of them, so that only flipped bits inside pixels go unnoticed; `full` hashes those too.
    classes, image_size: what the recipe wants. Raises BetonError with path, finding and way out.
    """
    path = Path(path)
    layout, size = _read_layout(path)
    sidecar = _read_sidecar(path)
    found = {"bytes": size, "samples": len(layout.labels), "height": layout.height, "width": layout.width}
    for what, value in found.items():
        if sidecar[what] != value:
            raise BetonError(f"{path}: {what}: is {value}, its sidecar {sidecar_path(path)} says {sidecar[what]}: "
                             f"they do not belong together; {AGAIN}")
    if sidecar["layout_sha256"] != layout.sha256:
        raise BetonError(f"{path}: was changed since it was written (the hash of its structure differs from the one in "
                         f"{sidecar_path(path)}): {AGAIN}")
    beton = _beton(path, layout, sidecar)
    if beton.labels.min() < 0 or beton.labels.max() >= len(beton.classes):
        raise BetonError(f"{path}: labels lie in [{beton.labels.min()}, {beton.labels.max()}], expected "
                         f"[0, {len(beton.classes) - 1}]: {AGAIN}")
    if verify == "full":
        whole = _sha256(path)
        if whole != beton.sha256:
            raise BetonError(f"{path}: its sha256 is {whole}, its sidecar says {beton.sha256}: it was damaged since it "
                             f"was written; {AGAIN}")
    problems = []
    if classes is not None and classes != len(beton.classes):
        problems.append(f"{path}: has {len(beton.classes)} classes ({', '.join(beton.classes[:4])}, ...), model.classes "
                        f"is {classes}: set --model.classes {len(beton.classes)}, or name another beton")
    if image_size is not None and (beton.height, beton.width) != (image_size, image_size):
        problems.append(f"{path}: has images of {beton.width} x {beton.height} pixels, model.image_size is {image_size}: "
                        "set model.image_size, or name another beton")
    if problems:
        raise BetonError(*problems)
    return beton


def at(path: Path | str, verify: str = "quick") -> Beton | None:
    """The beton at `path`; None where there is none, or none that is whole. verify: as of open_beton."""
    try:
        return open_beton(path, verify=verify)
    except BetonError:
        return None


def is_current(path: Path | str, fingerprint: str) -> bool:
    """Whether a whole beton lies at `path` that was written from the data set with this fingerprint."""
    found = at(path, "full")
    return found is not None and found.fingerprint == fingerprint


def read_images(beton: Beton, samples: np.ndarray | None = None) -> np.ndarray:
    """Pixels, uint8 (N, H, W, 3), of these `samples` (int64) or of all, read without FFCV: what FFCV should yield.

    Of JPEGs, FFCV's decoder is faster and coarser: it may differ by some steps in a pixel. Raises BetonError where one cannot be decoded.
    """
    layout, _ = _read_layout(beton.path)
    return _read_pixels(beton, layout, np.arange(beton.samples) if samples is None else np.asarray(samples))


def read_in_parts(beton: Beton, samples: np.ndarray | None = None, part: int = 16384) -> Iterator[np.ndarray]:
    """What read_images returns, `part` images at a time: for sets that are larger than the memory, or have to be put elsewhere."""
    layout, _ = _read_layout(beton.path)
    samples = np.arange(beton.samples) if samples is None else np.asarray(samples)
    for start in range(0, len(samples), part):
        yield _read_pixels(beton, layout, samples[start:start + part])


def _read_pixels(beton: Beton, layout: _Layout, samples: np.ndarray) -> np.ndarray:
    images = np.empty((len(samples), beton.height, beton.width, 3), np.uint8)
    if beton.storage == "jpeg":
        for i, sample in enumerate(samples):
            content = io.BytesIO(_region(beton.path, layout, sample).tobytes())
            image = read_image(content, f"{beton.path}: sample {sample}", upright=False)
            if image.shape != images.shape[1:]:
                raise BetonError(f"{beton.path}: sample {sample} is {image.shape[1]} x {image.shape[0]} pixels, its row says "
                                 f"{beton.width} x {beton.height}: {AGAIN}")
            images[i] = image
        return images
    a_sample, content = images[0].nbytes, np.memmap(beton.path, np.uint8, mode="r")
    order = np.argsort(layout.pointers[samples])
    gaps = np.flatnonzero(np.diff(layout.pointers[samples][order]) != a_sample) + 1    # between pages
    for run in np.split(order, gaps):
        start = layout.pointers[samples[run[0]]]
        images[run] = content[start:start + len(run) * a_sample].reshape(-1, *images.shape[1:])
    return images


def _region(path: Path, layout: _Layout, sample: int) -> np.ndarray:
    start, size = int(layout.pointers[sample]), int(layout.sizes[sample])
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=(size,))


def _beton(path: Path, layout: _Layout, sidecar: dict) -> Beton:
    return Beton(path, len(layout.labels), layout.height, layout.width, tuple(sidecar["classes"]), tuple(sidecar["mean"]),
                 tuple(s or 1.0 for s in sidecar["std"]), sidecar["sha256"], layout.labels, layout.storage, sidecar["name"], sidecar["source"],
                 file_identity(path), sidecar.get("how", {}), sidecar["fingerprint"])


def mismatch(train: Beton, test: Beton) -> list[str]:
    """Why these are no two splits of one set, a line, or nothing. Another test set of the same classes is allowed; one that was split
    off the same place at another time, or otherwise, is not: images that are trained on may be in it."""
    if train.classes != test.classes:
        differing = next(((a, b) for a, b in zip(train.classes, test.classes) if a != b), (len(train.classes), len(test.classes)))
        return [f"{train.path} and {test.path}: have other classes ({differing[0]!r} and {differing[1]!r}): name the two splits of one set "
                "with --beton.train and --beton.test"]
    if train.sha256 == test.sha256:
        return [f"{train.path} and {test.path}: hold the same images: name the two splits of a set with --beton.train and --beton.test"]
    content = [beton.fingerprint.partition("/")[0] for beton in (train, test)]
    if train.source == test.source and content[0] != content[1]:
        return [f"{train.path} and {test.path}: were both written from {train.source}, but what was there, or how it was read, has changed in "
                "between, so that images to train on may be among those to test on: write both again"]
    return []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_layout(path: Path) -> tuple[_Layout, int]:
    """The structure of the file at `path`, and its size. Raises BetonError unless all of it holds together."""
    def refuse(finding: str):
        raise BetonError(f"{path}: {finding}: it is cut off, damaged, or no beton of ours; {AGAIN}")

    try:
        kind = os.stat(path)
        if not stat.S_ISREG(kind.st_mode):    # opening a FIFO would wait for somebody to write into it
            raise BetonError(f"{path}: is no regular file: name a .beton file")
        file = open(path, "rb")
    except OSError as error:
        raise BetonError(f"{path}: cannot be read ({error.strerror}): write it with `{WRITE}`, or name another") from error
    with file:
        size = kind.st_size
        head = file.read(HEADER.itemsize)
        if len(head) < HEADER.itemsize:
            refuse(f"has {size} bytes, less than a header")
        header = np.frombuffer(head, HEADER)[0]
        samples, table_start, page_size = (int(header[k]) for k in ("num_samples", "alloc_table_ptr", "page_size"))
        if header["version"] != VERSION:
            refuse(f"its first bytes give the version {header['version']}, FFCV's is {VERSION}")
        if header["num_fields"] != len(FIELDS):
            refuse(f"has {header['num_fields']} fields, expected {len(FIELDS)}, image and label")
        if page_size < 1 << 21 or page_size & (page_size - 1):
            refuse(f"has a page size of {page_size}, expected a power of two from 2 MiB")
        if table_start == 0:
            refuse("has no allocation table: its writing was interrupted")
        metadata_start = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
        if not 1 <= samples <= (size - metadata_start) // SAMPLE.itemsize:
            refuse(f"claims {samples} samples, for which {size} bytes are not enough")
        if table_start > size or size - table_start != samples * ALLOCATION.itemsize:
            refuse(f"its allocation table starts at byte {table_start} of {size}, expected {samples} entries of "
                   f"{ALLOCATION.itemsize} bytes up to the end")
        descriptors = file.read(len(FIELDS) * FIELD.itemsize)
        fields = [(int(f["type_id"]), bytes(f["name"])) for f in np.frombuffer(descriptors, FIELD)]
        if fields != FIELDS:
            refuse(f"has the fields {fields}, expected {FIELDS} (FFCV type, name)")
        rows = file.read(samples * SAMPLE.itemsize)
        file.seek(table_start)
        entries = file.read(samples * ALLOCATION.itemsize)
    if len(rows) != samples * SAMPLE.itemsize or len(entries) != samples * ALLOCATION.itemsize:
        refuse("changed while it was read")
    metadata, table = np.frombuffer(rows, SAMPLE), np.frombuffer(entries, ALLOCATION)
    height, width = int(metadata["height"][0]), int(metadata["width"][0])
    if not height or not width or (metadata["height"] != height).any() or (metadata["width"] != width).any():
        refuse("holds images of different sizes, or of none")
    storage = {number: name for name, number in MODES.items()}.get(int(metadata["mode"][0]))
    if storage is None or (metadata["mode"] != metadata["mode"][0]).any():
        refuse("holds images that are stored neither all as raw pixels nor all as JPEG")
    a_sample = height * width * 3
    if storage == "raw" and (table["size"] != a_sample).any():
        refuse(f"its allocation table has regions that are not of {height} x {width} x 3 bytes")
    table = table[np.argsort(table["ptr"], kind="stable")]
    first_page, most = metadata_start + len(rows), table_start - metadata_start
    if (table["size"] < 1).any() or (table["size"] > most).any() or (table["ptr"] < first_page).any() or (
            table["ptr"] > table_start - table["size"]).any():
        refuse("its allocation table points outside its pages")
    if (np.diff(table["ptr"]) < table["size"][:-1]).any():
        refuse("its allocation table has regions that overlap")
    if not np.array_equal(table["ptr"], np.sort(metadata["data_ptr"])):
        refuse("its samples point elsewhere than its allocation table")
    sizes = table["size"][np.searchsorted(table["ptr"], metadata["data_ptr"])].astype(np.int64)
    digest = hashlib.sha256(head + descriptors)
    digest.update(rows)
    digest.update(entries)
    return _Layout(height, width, storage, metadata["label"].astype(np.int64), metadata["data_ptr"].astype(np.int64), sizes,
                   digest.hexdigest()), size


def _read_sidecar(path: Path) -> dict:
    """The content of the sidecar, each entry of the type that write_beton gives it."""
    place = sidecar_path(path)
    try:
        if not stat.S_ISREG(os.stat(place).st_mode):
            raise BetonError(f"{place}: is no regular file: {AGAIN}")
        content = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise BetonError(f"{place}: cannot be read ({error.strerror}); it belongs to {path.name} and holds its classes and "
                         f"hashes: {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise BetonError(f"{place}: is no JSON ({error}): {AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise BetonError(f"{place}: is of format {found!r}, this version reads {FORMAT}: {AGAIN}")
    kinds = {"name": str, "source": str, "fingerprint": str, "classes": [str], "samples": int, "height": int, "width": int,
             "mean": [float], "std": [float], "bytes": int, "sha256": str, "layout_sha256": str}
    for entry, kind in kinds.items():
        value = content.get(entry)
        if isinstance(kind, list):
            good = isinstance(value, list) and all(type(v) is kind[0] for v in value)
        else:
            good = type(value) is kind
        if not good:
            raise BetonError(f"{place}: {entry}: got {value!r}, expected {kind}: it is damaged; {AGAIN}")
    if len(content["classes"]) < 1 or len(content["mean"]) != 3 or len(content["std"]) != 3:
        raise BetonError(f"{place}: needs class names and a mean and deviation of three channels: {AGAIN}")
    if not all(0 <= value <= 255 for value in content["mean"] + content["std"]):    # NaN neither
        raise BetonError(f"{place}: mean, std: got {content['mean']}, {content['std']}, expected pixel values: {AGAIN}")
    how = content.get("how", {})
    if not isinstance(how, dict) or not all(name in HOW and HOW[name](value) for name, value in how.items()):
        raise BetonError(f"{place}: how: got {how!r}, expected keys of `sources`: it is damaged; {AGAIN}")
    for problem in problems_of_names(content["classes"]):
        raise BetonError(f"{place}: {problem}: {AGAIN}")
    return content

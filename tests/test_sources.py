"""sources: every layout gives the same images, whatever is not what it claims to be is refused, nothing is executed."""
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import in_child
from seresnet import cifar as official
from seresnet import files, imageset, sources
from seresnet.cifar import DownloadError
from seresnet.files import SourceError
from seresnet.imageset import ImageSet, Split
from seresnet.sources import MissingError, find_source

CIFAR10 = official.SETS["cifar10"]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A stand-in for CIFAR-10: its counts, other images; `images` uint8 (60000, 32, 32, 3), `labels`."""
    rng = np.random.default_rng(0)
    place = np.arange(32, dtype=np.uint8)    # rows, columns and channels all differ; a ramp packs quickly
    images = rng.integers(0, 256, (60000, 1, 1, 3), dtype=np.uint8) + 8 * place[:, None, None] + place[:, None]
    labels = np.concatenate([rng.permutation(np.arange(50000) % 10), rng.permutation(np.arange(10000) % 10)])
    return images, labels.astype(np.uint8)


@pytest.fixture
def counts_as_cifar(cifar, monkeypatch):
    """Let the stand-in's own channel statistics pass as CIFAR-10's."""
    figures = {name: imageset.channel_statistics([cifar[0][part]])
               for name, part in (("train", slice(0, 50000)), ("test", slice(50000, 60000)))}
    for name in official.SETS:
        monkeypatch.setitem(official.SETS, name, dataclasses.replace(
            official.SETS[name], means={name: mean for name, (mean, _) in figures.items()},
            stds={name: std for name, (_, std) in figures.items()}))


def batch_rows(cifar):
    images, labels = cifar
    for i, name in enumerate([*CIFAR10.train, *CIFAR10.test]):
        part = slice(10000 * i, 10000 * (i + 1))
        yield name, images[part].transpose(0, 3, 1, 2).reshape(10000, 3072), labels[part]


def write_binary(folder, cifar):
    folder.mkdir(parents=True)
    for name, rows, labels in batch_rows(cifar):
        (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], rows], axis=1).tobytes())


def write_pickles(folder, cifar, python2=True):
    folder.mkdir(parents=True)
    for name, rows, labels in batch_rows(cifar):
        content = {"data": rows, "labels": labels.tolist(), "batch_label": name, "filenames": ["x.png"] * 3}
        if python2:    # as Python 2 wrote them: keys are byte strings
            content = {k.encode(): v for k, v in content.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2 if python2 else 5))


@pytest.fixture(scope="module")
def layouts(cifar, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    write_binary(root / "bin" / "cifar-10-batches-bin", cifar)
    write_pickles(root / "py" / "cifar-10-batches-py", cifar)
    (root / "tar").mkdir()
    with tarfile.open(root / "tar" / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(root / "py" / "cifar-10-batches-py", "cifar-10-batches-py")
    with tarfile.open(root / "tar-binary.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(root / "bin" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    return root


@pytest.mark.parametrize("place, kind", [("bin", "binary"), ("bin/cifar-10-batches-bin", "binary"), ("py", "pickle"),
                                         ("py/cifar-10-batches-py", "pickle"), ("tar", "archive"),
                                         ("tar-binary.tar.gz", "archive")])
def test_every_official_layout_is_recognised_and_gives_the_same_images(layouts, cifar, counts_as_cifar, place, kind):
    source = find_source(layouts / place)
    assert source.kind == kind
    read = source.read()
    images, labels = cifar
    assert read.name == "cifar10" and read.classes == CIFAR10.classes["fine"]
    for split, part in ((read.train, slice(0, 50000)), (read.test, slice(50000, 60000))):
        assert np.array_equal(split.images, images[part]) and np.array_equal(split.labels, labels[part])
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64


def test_python_3_pickles_read_too(cifar, tmp_path, counts_as_cifar):
    write_pickles(tmp_path / "cifar-10-batches-py", cifar, python2=False)
    assert np.array_equal(find_source(tmp_path).read().test.images, cifar[0][50000:])


def test_real_cifar10_meets_its_published_figures(cifar10_dir):
    read = find_source(cifar10_dir).read()
    assert read.train.images.shape == (50000, 32, 32, 3) and read.test.images.shape == (10000, 32, 32, 3)
    mean, std = imageset.channel_statistics([read.train.images])
    assert np.allclose(mean, (125.31, 122.95, 113.87), atol=0.01) and np.allclose(std, (62.99, 62.09, 66.70), atol=0.01)


def test_statistics_are_those_of_numpy():
    images = np.random.default_rng(0).integers(0, 256, (5000, 4, 5, 3), dtype=np.uint8)
    mean, std = imageset.channel_statistics([images[:9], images[9:4500], images[4500:]])
    assert np.allclose(mean, images.astype(float).mean((0, 1, 2)), atol=1e-9)
    assert np.allclose(std, images.astype(float).std((0, 1, 2)), atol=1e-9)


# -- what is not CIFAR-10 -----------------------------------------------------------------------------------------------

def test_other_images_in_the_official_layout_are_refused(layouts):
    with pytest.raises(SourceError, match="channel mean is .*125.307.*damaged, missing or in another channel order"):
        find_source(layouts / "bin").read()


def test_other_counts_are_refused(cifar, tmp_path, counts_as_cifar):
    images, labels = cifar
    write_binary(tmp_path / "cifar-10-batches-bin", (images, np.where(np.arange(60000) == 7, (labels + 1) % 10, labels)))
    with pytest.raises(SourceError, match="train has .* images of class .*, CIFAR-10 has 5000"):
        find_source(tmp_path).read()


def test_a_label_out_of_range_is_refused(cifar, tmp_path):
    images, labels = cifar
    labels = labels.copy()
    labels[59999] = 10
    write_binary(tmp_path / "cifar-10-batches-bin", (images, labels))
    with pytest.raises(SourceError, match=r"test labels lie in \[0, 10\]"):
        find_source(tmp_path).read()


@pytest.mark.parametrize("damage, message", [
    (lambda f: f.write_bytes(f.read_bytes()[:-1]), "30729999 bytes, expected 10000 x 3073"),
    (lambda f: f.unlink(), "data_batch_3.bin: No such file"),
    (lambda f: f.write_bytes(b""), "has 0 bytes")])
def test_a_damaged_binary_batch_is_named(cifar, tmp_path, damage, message):
    write_binary(tmp_path / "cifar-10-batches-bin", cifar)
    damage(tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(SourceError, match=message):
        find_source(tmp_path).read()


@pytest.mark.parametrize("content, message", [
    (pickle.dumps([1, 2]), "`data` is NoneType"),
    (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [0] * 3}), r"uint8 \(3, 3072\), expected"),
    (pickle.dumps({"data": np.zeros((10000, 3072), np.float32), "labels": [0] * 10000}), "float32"),
    (pickle.dumps({"data": np.zeros((10000, 3072), np.uint8), "labels": ["cat"] * 10000}), "`labels` are not"),
    (pickle.dumps({"data": np.zeros((10000, 3072), np.uint8)}), "`labels` are not"),
    (b"no pickle at all", "no readable pickle"), (b"", "no readable pickle")])
def test_a_damaged_pickle_is_named(tmp_path, content, message):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(SourceError, match=f"(?s)data_batch_1.*{message}"):
        find_source(tmp_path).read()


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("payload", [
    lambda file: Payload(os.system, f"touch {file}"), lambda file: Payload(open, str(file), "w"),
    lambda file: Payload(eval, f"open({str(file)!r}, 'w')"),
    lambda file: Payload(np.save, str(file), [1]), lambda file: {"data": Payload(exec, f"open({str(file)!r}, 'w')")}])
def test_a_pickle_with_a_payload_is_refused_and_nothing_is_run(tmp_path, payload, protocol):
    created = tmp_path / "created"
    with pytest.raises(SourceError, match="do not trust this file"):
        files.load_pickle(io.BytesIO(pickle.dumps(payload(created), protocol)), "batch")
    assert not created.exists() and not created.with_suffix(".npy").exists()


def test_arrays_of_objects_are_refused():
    with pytest.raises(SourceError, match="do not trust"):
        files.load_pickle(io.BytesIO(pickle.dumps(np.array([{}, []], dtype=object))), "batch")


class State(Payload):
    """Unpickling it would give what its call makes a state of the file's choice."""

    def __init__(self, state, call, *arguments):
        super().__init__(call, *arguments)
        self.state = state

    def __reduce__(self):
        return self.call, self.arguments, self.state


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("content", [
    Payload(np.ndarray, (1,), "O", b"A" * 8),    # the file's bytes as a pointer
    State((3, "|", None, ("a",), {"a": (np.dtype("S8"), 0)}, 8, 1, 63), np.dtype, "S8", False, True),    # a type of its own making
    State((3, "|", ("S8", (3,)), None, None, 8, 1, 63), np.dtype, "S8", False, True), State({"x": 1}, np.dtype, "S8"),
    State((1, (1,), np.dtype("O"), False, [Payload(print)]), np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),
    State((1, (1,), np.dtype("i4"), False, [1]), np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),
    State((1, (2,), np.dtype("i4"), False, b"1234"), np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),    # half of its bytes
    State((1, (1 << 40,), np.dtype("S0"), False, b""), np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),    # many of none
    Payload(np._core.numeric._frombuffer, np.arange(4), np.dtype("i4"), (8,), "C"),    # another array's memory
    Payload(np._core.numeric._frombuffer, b"1234", "O", (1,), "C"),
    Payload(np._core.multiarray._reconstruct, np.recarray, (0,), b"b"), Payload(np._core.multiarray.scalar, np.dtype("O"), b"A" * 8)])
def test_a_pickle_cannot_make_pointers_of_its_bytes(content, protocol):
    with pytest.raises(SourceError, match="do not trust this file"):
        files.load_pickle(io.BytesIO(pickle.dumps({"data": content}, protocol)), "batch")


def test_an_array_is_filled_once():
    """A second time would free memory that views of the first may still have."""
    once = pickle.dumps(np.arange(3, dtype="i4"), 2)
    state = pickle.dumps((1, (1,), np.dtype("i4"), False, b"1234"), 2)[2:-1]
    with pytest.raises(SourceError, match="fills an array twice"):
        files.load_pickle(io.BytesIO(once[:-1] + state + b"b."), "batch")


@pytest.mark.parametrize("name", ["dtype", "ndarray"])
def test_a_pickle_cannot_change_what_reads_it(name):
    for state in (b"}S'__defaults__'\nI1\ns", b"N}S'_function'\nI1\ns\x86"):
        with pytest.raises(SourceError, match="do not trust this file"):
            files.load_pickle(io.BytesIO(b"cnumpy\n" + name.encode() + b"\n" + state + b"b."), "batch")
    assert files.load_pickle(io.BytesIO(pickle.dumps(np.arange(3))), "batch").tolist() == [0, 1, 2]


def archive_with(tmp_path, *members):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("bad", [
    member("../outside"), member("/etc/outside"), member("cifar-10-batches-py/../../outside"),
    member("cifar-10-batches-py/data_batch_1", tarfile.SYMTYPE, "/etc/passwd"),
    member("cifar-10-batches-py/data_batch_1", tarfile.LNKTYPE, "x"),
    member("cifar-10-batches-py/data_batch_1", tarfile.CHRTYPE), member("fifo", tarfile.FIFOTYPE)])
def test_an_archive_that_leads_outside_is_refused(tmp_path, bad):
    archive_with(tmp_path, (bad, b""))
    before = sorted(p.name for p in tmp_path.parent.iterdir())
    with pytest.raises(SourceError, match="do not trust it"):
        find_source(tmp_path).read()
    assert sorted(p.name for p in tmp_path.parent.iterdir()) == before


def test_archives_without_the_batches_or_cut_off_are_refused(layouts, tmp_path):
    archive_with(tmp_path, (member("cifar-10-batches-py/readme.html"), b"hello"))
    with pytest.raises(SourceError, match="does not hold the batches of"):
        find_source(tmp_path).read()
    whole = (layouts / "tar" / "cifar-10-python.tar.gz").read_bytes()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SourceError, match="cut off or no .tar.gz"):
        find_source(tmp_path).read()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<html>404</html>")
    with pytest.raises(SourceError, match="no .tar.gz"):
        find_source(tmp_path).read()


def test_an_archive_with_flipped_bits_is_no_traceback(layouts, tmp_path):
    whole = next((layouts / "tar").glob("*.tar.gz")).read_bytes()
    place, rng, refused = tmp_path / "cifar-10-python.tar.gz", np.random.default_rng(0), 0
    for _ in range(40):
        content = bytearray(whole)
        for at in rng.integers(10, len(whole), 3):
            content[at] ^= 1 << rng.integers(8)
        place.write_bytes(content)
        try:
            official.read_archive(place)
        except SourceError:
            refused += 1
    assert refused == 40


def test_a_header_that_unpacks_to_gigabytes_is_not_read(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * (3 << 20)}):
        pass
    with pytest.raises(SourceError, match="fetch it again"):
        official.read_archive(tmp_path / "cifar-10-python.tar.gz")
    path = archive_with(tmp_path, *((member(f"cifar-10-batches-py/{i}"), b"") for i in range(300)))
    with pytest.raises(SourceError, match="more than 200 members"):
        official.read_archive(path)
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:    # a name of a name of a name ...
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 512
        for _ in range(3000):
            archive.fileobj.write(long.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    with pytest.raises(SourceError, match="fetch it again"):
        official.read_archive(path)


def test_an_oversized_member_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "LARGEST_BATCH_FILE", 10)
    archive_with(tmp_path, (member("cifar-10-batches-py/data_batch_1"), b"x" * 11))
    with pytest.raises(SourceError, match="has 11 bytes"):
        find_source(tmp_path).read()


# -- image folders ------------------------------------------------------------------------------------------------------

def write_tree(root, split, classes, count, size=(6, 5), suffix=".png", mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    for c in classes:
        folder = root / split / c
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03}{suffix}")


@pytest.fixture
def tree(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        write_tree(tmp_path, split, ("cat", "dog", "emu"), count, seed=count)
    return tmp_path


def test_a_folder_tree_reads_as_its_files(tree):
    source = find_source(tree)
    read = source.read()
    assert source.kind == "folder" and read.classes == ("cat", "dog", "emu") and read.name == tree.name
    assert read.train.images.shape == (12, 5, 6, 3) and read.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, c in enumerate(read.classes):
        assert np.array_equal(read.test.images[2 * i + 1], np.asarray(Image.open(tree / "test" / c / "001.png")))


def test_splits_are_found_however_they_are_capitalised(tree):
    for split in ("train", "test"):
        (tree / split).rename(tree / split.title())
    (tree / "__MACOSX/Train/cat").mkdir(parents=True)
    assert [len(split.labels) for split in (find_source(tree).read().train, find_source(tree).read().test)] == [12, 6]
    (tree / "cat.png").mkdir()
    (tree / "Train/cat/9.png").mkdir()    # folders, whatever they are called
    assert len(find_source(tree).read().train.labels) == 12


def test_where_pictures_lie_deeper_it_is_said(tree):
    (tree / "wrapped/once/pets").mkdir(parents=True)
    (tree / "train").rename(tree / "wrapped/once/pets/train")
    with pytest.raises(MissingError, match=r"000.png is a picture, and a folder is wanted that holds a folder a class"):
        find_source(tree / "wrapped")


def test_all_that_cannot_be_read_is_told_at_once(tree, monkeypatch):
    for name in ("train/cat/001", "train/dog/000", "test/emu/001"):
        (tree / f"{name}.png").write_bytes(b"GIF89a")
    with pytest.raises(SourceError) as caught:
        find_source(tree).read()
    assert [problem.split(":")[0].removeprefix(str(tree)) for problem in caught.value.problems] == ["/train/cat/001.png", "/train/dog/000.png"]
    monkeypatch.setattr(files, "TOLD", 1)
    monkeypatch.setattr(files.runtime, "available_cores", lambda: 2)    # so many are decoded at a time
    with pytest.raises(SourceError) as caught:
        find_source(tree).read()
    assert len(caught.value.problems) == 2 and caught.value.problems[1] == "and 1 more like these; 7 images were not looked at"


def test_cmyk_and_16_bits_are_converted(tmp_path):
    colours = np.zeros((8, 8, 3), np.uint8) + np.array([200, 30, 90], np.uint8)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(files.read_image(tmp_path / "cmyk.jpg").astype(int) - colours).max() <= 3
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(grey).save(tmp_path / "16.png")
    assert np.array_equal(files.read_image(tmp_path / "16.png"), np.repeat((grey // 256).astype(np.uint8)[..., None], 3, axis=2))


def test_arrays_beside_a_set_are_not_taken_for_it(tmp_path):
    images, labels = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2
    np.savez(tmp_path / "hidden.npz", images=images)
    with pytest.raises(MissingError, match="holds no data set"):
        find_source(tmp_path)
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    assert find_source(tmp_path).path.name == "labelled.npz"
    (tmp_path / "damaged.npz").write_bytes(b"x")
    with pytest.raises(SourceError, match="several data sets: damaged.npz, labelled.npz"):
        find_source(tmp_path)


def test_a_damaged_neighbour_that_macos_leaves_is_no_set(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((12, 4, 4, 3), np.uint8), labels=np.arange(12) % 2)
    (tmp_path / "._x.npz").write_bytes(b"Mac OS X")
    assert find_source(tmp_path).read().name == "x"


def test_arrays_of_two_sizes_are_brought_to_one_where_that_is_asked_for(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 5, 5), np.uint8), y_train=[0, 1, 0, 1], x_test=np.zeros((2, 6, 6), np.uint8), y_test=[0, 1])
    with pytest.raises(SourceError, match="bring all to one size"):
        find_source(tmp_path).read()
    read = find_source(tmp_path, image_size=4).read()
    assert read.train.images.shape == (4, 4, 4, 3) and read.test.images.shape == (2, 4, 4, 3)


def test_a_test_split_that_is_held_back_is_known_as_such(tree):
    assert not find_source(tree).read().held_back
    assert find_source(tree / "train").read().held_back


def test_of_a_set_that_is_not_trained_on_one_split_may_lack_classes(tree):
    whole = find_source(tree, for_training=False).read()
    shutil.rmtree(tree / "test" / whole.classes[0])
    (tree / "train" / whole.classes[-1]).rename(tree / "train/0 new")
    with pytest.raises(SourceError, match="only in one of them"):
        find_source(tree).read()
    read = find_source(tree, for_training=False).read()
    assert read.classes == ("0 new", *whole.classes)
    kept = whole.test.labels > 0
    assert np.array_equal(read.test.images, whole.test.images[kept]) and np.array_equal(read.test.labels, whole.test.labels[kept] + 1)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become somebody else")
def test_a_folder_beside_cifar_need_not_be_readable(layouts, tmp_path):
    """As `lost+found` is not, where it lies on a disk of its own."""
    shutil.copytree(layouts / "bin/cifar-10-batches-bin", tmp_path / "set/cifar-10-batches-bin")
    (tmp_path / "set/lost+found").mkdir(mode=0)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith(("pytest", "popen", "test")):
            os.chmod(parent, 0o755)
    assert in_child(lambda: find_source(tmp_path / "set").kind, 65534) == "binary"
    assert "lost+found: Permission denied" in in_child(lambda: find_source(tmp_path / "set", "folder").kind, 65534)


def test_labels_that_count_from_one_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((12, 4, 4, 3), np.uint8), labels=np.arange(12) % 2 + 1)
    with pytest.raises(SourceError, match="no image of class 0: labels count from 0, so subtract 1"):
        find_source(tmp_path / "x.npz").read()


@pytest.mark.parametrize("name, text", [("é".encode(), "é"), (b"caf\xe9", "café"), ("Ã©", "é"), ("é", "é"), ("日本", "日本"), (7, "7"), ("cat", "cat")])
def test_names_are_read_in_the_encoding_that_they_have(name, text):
    assert files.as_text(name) == text


def test_grey_and_jpeg_files_become_rgb(tree):
    write_tree(tree, "train", ["cat"], 1, mode="L", seed=9)
    shown = []
    grey = find_source(tree, watch=lambda items, total: shown.append(total) or items).read().train.images[0]
    assert shown == [12, 6], "whoever waits for training and test images is shown how far it is"
    assert (grey == grey[..., :1]).all() and grey.std() > 1
    write_tree(tree, "train", ["dog"], 1, suffix=".JPG")
    assert len(find_source(tree).read().train.labels) == 13


@pytest.mark.parametrize("change, message", [
    (lambda t: Image.new("RGB", (7, 5)).save(t / "test/dog/000.png"), "000.png: is 7 x 5 pixels, the images before it 6 x 5"),
    (lambda t: (t / "train/dog/001.png").write_bytes(b"GIF89a"), "001.png: is no readable PNG or JPEG"),
    (lambda t: (t / "train/dog/001.png").write_bytes((t / "train/dog/000.png").read_bytes()[:60]), "no readable PNG"),
    (lambda t: Image.new("RGBA", (6, 5), (1, 2, 3, 4)).save(t / "test/cat/000.png"), "partly transparent"),
    (lambda t: Image.new("LAB", (6, 5)).save(t / "test/cat/000.png", "TIFF"), "no readable PNG"),
    (lambda t: Image.new("1", (20000, 5000)).save(t / "test/cat/000.png"), "20000 x 5000 pixels, expected 67,108,864 in all"),
    (lambda t: Image.new("1", (20000, 10000)).save(t / "test/cat/000.png"), "000.png: has more pixels than Pillow opens, expected 67,108,864"),
    (lambda t: (t / "train/fox").mkdir(), "only in one of them: fox"),
    (lambda t: [(t / s / "fox").mkdir() for s in ("train", "test")], "files in train/fox, test/fox")])
def test_a_bad_tree_is_refused_with_the_file_named(tree, change, message):
    change(tree)
    with pytest.raises(SourceError, match=message):
        find_source(tree).read()


def test_an_opaque_alpha_channel_is_dropped(tree):
    before = find_source(tree).read().test.images
    Image.open(tree / "test/cat/000.png").convert("RGBA").save(tree / "test/cat/000.png")
    assert np.array_equal(find_source(tree).read().test.images, before)


# -- finding, fingerprints, digits, download ----------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path, suffix):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 250    # the corner that comes to lie at the upper right
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", exif=exif)
    upright = files.read_image(tmp_path / f"a{suffix}")
    assert upright.shape == (24, 16, 3) and upright[:6, 10:].min() > 200 and upright[:6, :6].max() < 50
    assert files.read_image(tmp_path / f"a{suffix}", upright=False).shape == (16, 24, 3)
    Image.fromarray(pixels).save(tmp_path / f"b{suffix}", exif=b"Exif\x00\x00damaged")
    assert files.read_image(tmp_path / f"b{suffix}").shape == (16, 24, 3)


@pytest.mark.parametrize("held", range(10))
def test_every_way_to_hold_a_camera_is_undone(tmp_path, held):
    """0 and 9 are none. As Pillow does it, and where Pillow could not write the rest of the EXIF data again: a unit that is a word."""
    pixels = np.random.default_rng(held).integers(0, 256, (5, 7, 3), np.uint8)
    entries = struct.pack("<HHIHH", 274, 3, 1, held, 0) + struct.pack("<HHI4s", 296, 2, 2, b"2\0")
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))
    exif = Image.Exif()
    exif[274] = held
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
    with Image.open(tmp_path / "b.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (expected.shape == (7, 5, 3)) == (held in range(5, 9))
    for name in ("a.png", "b.png"):
        assert np.array_equal(files.read_image(tmp_path / name), expected), name


def test_what_a_folder_holds_beside_is_said_or_hidden(tree):
    source = find_source(tree)
    assert source.left_out() == ""
    before, folder = source.read(), next((tree / "train").iterdir())
    for name in ("._0.png", ".trashed.jpg"):
        (folder / name).write_bytes(b"x")
    assert source.left_out() == ""
    (folder / "deeper").mkdir()
    for name in ("a.webp", "deeper/b.png"):
        (folder / name).write_bytes(b"x")
    assert "left out: 2 pictures" in source.left_out() and "a.webp" in source.left_out()
    assert np.array_equal(source.read().train.images, before.train.images)


def test_a_class_may_be_called_train(tmp_path):
    for i, name in enumerate(("car", "plane", "train")):
        write_tree(tmp_path, ".", (name,), 4, seed=i)
    assert find_source(tmp_path).read().classes == ("car", "plane", "train")
    for name in ("car", "plane"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "test").mkdir()    # as Kaggle's, without the labels: no classes
    with pytest.raises(sources.MissingError):
        find_source(tmp_path)
    write_tree(tmp_path, ".", ("test1",), 4)    # as those of Dogs vs. Cats: two splits without classes, no two classes
    with pytest.raises(sources.MissingError):
        find_source(tmp_path)
    (tmp_path / "test").rmdir()
    write_tree(tmp_path, ".", ("valley",), 4)
    assert find_source(tmp_path).read().classes == ("test1", "train", "valley")
    write_tree(tmp_path / "covid", ".", ("test-negative", "test-positive"), 4)
    assert find_source(tmp_path / "covid").read().classes == ("test-negative", "test-positive")


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_a_file_name_that_is_no_text_does_not_matter(tmp_path):
    write_tree(tmp_path, ".", ("a", "b"), 5)
    os.rename(next((tmp_path / "a").glob("*.png")), os.path.join(os.fsencode(tmp_path), b"a", b"caf\xe9.png"))
    source = find_source(tmp_path)
    assert len(source.fingerprint()) > 20 and len(source.read().train.labels) == 8


def test_what_is_not_there_is_said_with_the_way_out(tmp_path):
    with pytest.raises(SourceError, match="no/where does not exist .*cifar-10-batches-bin.*--sources.kind download"):
        find_source("no/where")
    with pytest.raises(SourceError, match="is there, but holds no data set"):
        find_source(tmp_path)


def test_a_named_kind_is_demanded(tree):
    with pytest.raises(SourceError, match="holds folder, not binary"):
        find_source(tree, "binary")
    assert find_source(tree, "folder").kind == "folder"


def test_the_fingerprint_follows_content_and_nothing_else(tree):
    before = find_source(tree).fingerprint()
    os.utime(tree / "train/cat/000.png", (1, 1))
    assert find_source(tree).fingerprint() == before
    first, second = tree / "train/cat/000.png", tree / "train/cat/001.png"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    assert find_source(tree).fingerprint() != before
    first.write_bytes(a)
    (tree / "train/cat/000.png").rename(tree / "train/dog/zzz.png")
    assert find_source(tree).fingerprint() != before


def test_digits_are_sklearns_with_every_class_in_both_splits():
    from sklearn.datasets import load_digits
    source = find_source("ignored", "digits")
    read = source.read()
    assert read.train.images.shape[1:] == (32, 32, 3) and len(read.train.labels) + len(read.test.labels) == 1797
    assert np.bincount(read.test.labels).min() >= 34
    small = read.test.images[:, ::4, ::4, 0].astype(int)
    originals = {np.round(i * (255 / 16)).astype(int).tobytes() for i in load_digits().images}
    assert all(image.tobytes() in originals for image in small)
    assert source.fingerprint() == find_source("elsewhere", "digits").fingerprint()
    assert np.array_equal(source.read().test.images, read.test.images)


def test_a_failed_download_says_how_to_supply_the_data_and_leaves_nothing(tmp_path, monkeypatch):
    dataset = official.torchvision_cifar10()
    monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")    # nobody listens there
    with pytest.raises(DownloadError, match="could not be downloaded.*cifar-10-batches-bin") as caught:
        find_source(tmp_path / "data", "download").read()
    assert caught.value.status == 4 and list((tmp_path / "data").iterdir()) == []


def test_a_download_is_verified_and_read(layouts, cifar, tmp_path, monkeypatch, counts_as_cifar):
    archive = layouts / "tar" / "cifar-10-python.tar.gz"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    dataset = official.torchvision_cifar10()
    monkeypatch.setattr(dataset, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    with pytest.raises(DownloadError, match="could not be downloaded"):    # the MD5 is not the official one
        find_source(tmp_path, "download").read()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    read = find_source(tmp_path, "download").read()
    assert np.array_equal(read.test.images, cifar[0][50000:])
    archive_again = tmp_path / "cifar-10-python.tar.gz"
    modified = archive_again.stat().st_mtime_ns
    server.shutdown()
    server.server_close()
    find_source(tmp_path, "download").read()    # what is there and verified is not fetched again
    assert archive_again.stat().st_mtime_ns == modified


@pytest.mark.parametrize("change, message", [
    (dict(labels=np.array([0, 3])), r"labels lie in \[0, 3\]"), (dict(labels=np.array([0])), "labels are"),
    (dict(labels=np.array([0.0, 1.0])), "labels are float64"), (dict(images=np.zeros((2, 4, 4, 3))), "images are float64"),
    (dict(images=np.zeros((2, 4, 4), np.uint8)), "images are uint8"), (dict(labels=np.array([0, 0])), "no image of class b"),
    (dict(images=np.zeros((0, 4, 4, 3), np.uint8), labels=np.array([], np.int64)), "train has no images"),
    (dict(images=np.zeros((2, 4, 5, 3), np.uint8)), "bring all to one size")])
def test_every_sample_is_validated(change, message):
    good = dict(images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, 1]))
    whole = ImageSet("x", "here", ("a", "b"), Split(**{**good, **change}), Split(**good))
    assert re.search(message, "\n".join(imageset.problems_of(whole)))
    assert list(imageset.problems_of(ImageSet("x", "here", ("a", "b"), Split(**good), Split(**good)))) == []


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a\\b", "..", " ", "a\nb"])
def test_a_class_name_that_is_a_path_is_refused(tmp_path, name):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(4) % 2, classes=np.array([name, "cat"]))
    with pytest.raises(SourceError, match="class .*expected a name of 1 to 200 printable characters that is no path"):
        find_source(tmp_path / "set.npz").read()
    same = ImageSet("x", "here", ("a", "a"), Split(images, np.arange(4) % 2), Split(images, np.arange(4) % 2))
    assert "class 'a' is there twice" in imageset.problems_of(same)


# -- CIFAR-100 ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cifar100(cifar, tmp_path_factory):
    """A stand-in for CIFAR-100 in both layouts and an archive of each: (folder, images, {kind: labels})."""
    root, images = tmp_path_factory.mktemp("cifar100"), cifar[0]
    labels = {"coarse": np.concatenate([np.arange(50000) % 20, np.arange(10000) % 20]).astype(np.uint8),
              "fine": np.concatenate([np.arange(50000) % 100, np.arange(10000) % 100]).astype(np.uint8)}
    (root / "cifar-100-binary").mkdir()
    (root / "py" / "cifar-100-python").mkdir(parents=True)
    for name, part in (("train", slice(0, 50000)), ("test", slice(50000, 60000))):
        rows = images[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        columns = [labels[kind][part][:, None] for kind in ("coarse", "fine")]
        (root / "cifar-100-binary" / f"{name}.bin").write_bytes(np.concatenate([*columns, rows], axis=1).tobytes())
        content = {b"data": rows, b"fine_labels": labels["fine"][part].tolist(), b"coarse_labels": labels["coarse"][part].tolist()}
        (root / "py" / "cifar-100-python" / name).write_bytes(pickle.dumps(content, protocol=2))
    with tarfile.open(root / "c100.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(root / "cifar-100-binary", "cifar-100-binary")
    return root, images, labels


@pytest.mark.parametrize("place, kind", [(".", "binary"), ("cifar-100-binary", "binary"), ("py", "pickle"),
                                         ("py/cifar-100-python", "pickle"), ("c100.tar.gz", "archive")])
@pytest.mark.parametrize("labels, count", [("fine", 100), ("coarse", 20)])
def test_cifar100_reads_in_every_layout(cifar100, counts_as_cifar, place, kind, labels, count):
    root, images, numbers = cifar100
    source = find_source(root / place, labels=labels)
    read = source.read()
    assert source.kind == kind and read.name == "cifar100" and len(read.classes) == count
    assert np.array_equal(read.test.images, images[50000:]) and np.array_equal(read.train.labels, numbers[labels][:50000])


def test_cifar10_in_any_layout_comes_before_cifar100(layouts, cifar100, tmp_path):
    """As in a folder of torchvision's downloads, of which one is unpacked."""
    (tmp_path / "cifar-10-python.tar.gz").symlink_to(layouts / "tar/cifar-10-python.tar.gz")
    (tmp_path / "cifar-100-python").symlink_to(cifar100[0] / "py/cifar-100-python")
    assert find_source(tmp_path).kind == "archive" and find_source(tmp_path, "pickle").path.name == "cifar-100-python"


def test_cifar100s_names_are_in_the_official_order():
    fine, coarse = official.SETS["cifar100"].classes["fine"], official.SETS["cifar100"].classes["coarse"]
    assert len(set(fine)) == 100 and list(fine) == sorted(fine) and (fine[0], fine[30], fine[99]) == ("apple", "dolphin", "worm")
    assert len(set(coarse)) == 20 and list(coarse) == sorted(coarse)


def test_other_images_as_cifar100_are_refused(cifar100):
    with pytest.raises(SourceError, match="channel mean is .*CIFAR-100's is"):
        find_source(cifar100[0]).read()


# -- sets without a test split, other sizes, other layouts --------------------------------------------------------------

def test_a_folder_without_a_test_split_gets_the_same_one_each_time(tmp_path):
    write_tree(tmp_path / "a", "all", ("cat", "dog"), 20)
    (tmp_path / "a" / "all").rename(tmp_path / "pets")
    read = find_source(tmp_path / "pets").read()
    assert read.name == "pets" and np.bincount(read.test.labels).tolist() == [4, 4]
    assert np.bincount(read.train.labels).tolist() == [16, 16]
    everything = np.concatenate([read.train.images, read.test.images])
    assert len(np.unique(everything.reshape(40, -1), axis=0)) == 40, "no image is in both"
    (tmp_path / "copy").mkdir()
    (tmp_path / "pets").rename(tmp_path / "copy" / "train")    # the same images as train/ alone: the same choice
    again = find_source(tmp_path / "copy").read()
    assert np.array_equal(again.test.images, read.test.images)
    assert np.bincount(find_source(tmp_path / "copy", test_share=0.5).read().test.labels).tolist() == [10, 10]


@pytest.mark.parametrize("photograph", [-1, 1 << 30])
def test_files_come_in_their_order_one_by_one_or_from_several_threads(tmp_path, monkeypatch, photograph):
    monkeypatch.setattr(files, "PHOTOGRAPH", photograph)
    write_tree(tmp_path, "pets", ("cat",), 70, size=(9, 7))
    paths = sorted((tmp_path / "pets/cat").iterdir())
    found = list(files.read_image_files(paths, 5, "crop"))
    assert len(found) == 70 and all(np.array_equal(image, files.read_image(path, size=5, fit="crop")) for image, path in zip(found, paths))
    paths[50].write_bytes(b"no picture")
    paths[60].unlink()
    with pytest.raises(SourceError, match=f"{paths[50].name}: is no readable PNG or JPEG"):
        list(files.read_image_files(paths))


def test_the_choice_of_a_test_split_hardly_changes_when_images_are_added():
    names = [f"{i}.png" for i in range(1000)]
    before = sources.choose_test(np.zeros(1000, np.int64), names, 0.2)
    after = sources.choose_test(np.zeros(1010, np.int64), [*(f"new{i}.png" for i in range(10)), *names], 0.2)
    assert before.sum() == 200 and (before != after[10:]).sum() <= 4


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    write_tree(tmp_path, "pets", ("cat", "dog"), 1)
    with pytest.raises(SourceError, match=f"^{tmp_path / 'pets'}: cat/.*: is the only image of its class"):
        find_source(tmp_path / "pets").read()
    read = find_source(tmp_path / "pets", for_training=False).read()
    assert len(read.train.images) == 0 and read.test.labels.tolist() == [0, 1]


def test_a_set_that_is_looked_at_needs_fewer_images_than_one_to_train_on(tmp_path):
    write_tree(tmp_path, "pets", ("cat",), 5)
    (tmp_path / "pets/dog").mkdir()
    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 1, 1, 3, 3, 4])    # none of class 2
    np.savez(tmp_path / "test.npz", x_test=images, y_test=labels)
    np.savez(tmp_path / "whole.npz", x=images, y=labels)
    for name, message in (("pets", "every class needs images: add some, or remove the folder"), ("test.npz", "holds test, expected"), ("whole.npz", "only image of its class")):
        with pytest.raises(SourceError, match=message):
            find_source(tmp_path / name).read()
    read = {name: find_source(tmp_path / name, for_training=False).read() for name in ("pets", "test.npz", "whole.npz")}
    assert read["pets"].classes == ("cat", "dog") and [len(s.labels) for s in (read["pets"].train, read["pets"].test)] == [4, 1]
    assert len(read["test.npz"].train.labels) == 0 and read["test.npz"].test.labels.tolist() == labels.tolist()
    assert sorted([*read["whole.npz"].train.labels, *read["whole.npz"].test.labels]) == labels.tolist() and read["whole.npz"].classes == tuple("01234")
    (tmp_path / "split/train/cat").mkdir(parents=True)
    (tmp_path / "split/train/dog").mkdir()
    write_tree(tmp_path / "split", "test", ("cat", "dog"), 3)
    read = find_source(tmp_path / "split", for_training=False).read()    # training images are elsewhere
    assert len(read.train.labels) == 0 and read.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "split/train").rename(tmp_path / "split/other")
    (tmp_path / "split/test").rename(tmp_path / "split/train")
    (tmp_path / "split/other").rename(tmp_path / "split/test")
    with pytest.raises(SourceError, match="no .png, .jpg, .jpeg files in test/cat, test/dog"):
        find_source(tmp_path / "split", for_training=False).read()
    np.savez(tmp_path / "none.npz", x_test=images[:0], y_test=labels[:0])
    with pytest.raises(SourceError, match="has 0 labels"):
        find_source(tmp_path / "none.npz", for_training=False).read()


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    """What is handed in are the classes' numbers: of 43 traffic signs in folders 0 to 42, number 2 has to be folder 2."""
    write_tree(tmp_path, "signs", map(str, range(12)), 2)
    assert find_source(tmp_path / "signs").read().classes == tuple(map(str, range(12)))
    write_tree(tmp_path, "words", ("10a", "9", "b"), 2)
    assert find_source(tmp_path / "words").read().classes == ("10a", "9", "b")
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "signs/3").rename(tmp_path / "kaggle/train")
    for i in range(2, 24):
        shutil.copy(tmp_path / "kaggle/train/000.png", tmp_path / f"kaggle/train/{i:03}.png")
    (tmp_path / "kaggle/trainLabels.csv").write_text("id,label\n" + "".join(f"{i:03},{i % 12}\n" for i in range(24)))
    assert find_source(tmp_path / "kaggle", "kaggle").read().classes == tuple(map(str, range(12)))


@pytest.mark.skipif(os.name != "posix", reason="links want rights elsewhere")
def test_files_that_cannot_be_read_are_named_all_at_once_before_any_is_decoded(tmp_path):
    write_tree(tmp_path, "pets", ("cat", "dog"), 2)
    for i in range(25):
        (tmp_path / f"pets/cat/link{i:02}.png").symlink_to("nowhere")
    with pytest.raises(SourceError) as caught:
        find_source(tmp_path / "pets").fingerprint()
    assert len(caught.value.problems) == 21 and caught.value.problems[-1] == "and 5 more like these"
    assert caught.value.problems[0].endswith("link00.png: No such file or directory: replace or remove it")


@pytest.mark.parametrize("fit", files.FITS)
def test_images_of_any_size_are_brought_to_one(tmp_path, fit):
    for split in ("train", "val"):
        for c, size in (("cat", (40, 20)), ("dog", (16, 16))):
            write_tree(tmp_path, split, (c,), 2, size=size)
    with pytest.raises(SourceError, match="--sources.image_size"):
        find_source(tmp_path).read()
    read = find_source(tmp_path, image_size=16, fit=fit).read()
    assert read.train.images.shape == (4, 16, 16, 3) and read.test.images.shape == (4, 16, 16, 3)
    picture = Image.open(tmp_path / "train/cat/000.png")
    if fit == "crop":
        picture = picture.crop((10, 0, 30, 20))
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(read.train.images[0] - expected)[:, 2:14].max() <= 1    # at a cut's edge, what lies behind it counts a little
    assert np.array_equal(read.train.images[2], np.asarray(Image.open(tmp_path / "train/dog/000.png")))
    assert find_source(tmp_path, image_size=16).fingerprint() != find_source(tmp_path, image_size=8).fingerprint()


def test_dividing_a_set_is_refused_where_its_copy_does_not_fit(tmp_path, monkeypatch):
    write_tree(tmp_path, ".", ("a", "b"), 5)
    rooms = iter([1 << 20, 10])
    monkeypatch.setattr("seresnet.runtime.free_memory_of_machine", lambda: next(rooms))
    with pytest.raises(SourceError, match="images take 0 MiB of memory, 0 MiB are free"):
        find_source(tmp_path).read()


@pytest.fixture
def kaggle(tmp_path):
    write_tree(tmp_path, ".", ["train"], 12)
    for file in (tmp_path / "train").iterdir():
        file.rename(file.with_name(f"{int(file.stem) + 1}.png"))
    lines = [f"{i},{'cat' if i % 2 else 'dog'}" for i in range(1, 13)]
    (tmp_path / "trainLabels.csv").write_text("id,label\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_kaggles_folder_and_table(kaggle):
    read = find_source(kaggle).read()
    assert find_source(kaggle).kind == "kaggle" and read.classes == ("cat", "dog") and len(read.test.labels) == 2
    tenth = np.asarray(Image.open(kaggle / "train/10.png"))
    [place] = [(split, i) for split in (read.train, read.test) for i in range(len(split.labels)) if np.array_equal(split.images[i], tenth)]
    assert place[0].labels[place[1]] == 1


@pytest.mark.parametrize("change, message", [
    (lambda t: (t / "train/5.png").unlink(), "no image of 1 ids, such as 5"),
    (lambda t: (t / "train/5.png").rename(t / "train/99.png"), "no image of 1 ids, such as 5"),
    (lambda t: Image.open(t / "train/5.png").save(t / "train/5.jpg"), "5.jpg: is there a second time as 5.png"),
    (lambda t: (t / "trainLabels.csv").write_text("a,b\n1,cat\n"), "expected the header id,label"),
    (lambda t: (t / "trainLabels.csv").write_text("id,label\n1,cat\n1,dog\n"), "names 1 ids twice")])
def test_a_bad_kaggle_folder_is_refused(kaggle, change, message):
    change(kaggle)
    with pytest.raises(SourceError, match=message):
        find_source(kaggle).read()


def write_parquet(path, count, names=None, image="img", label="label", seed=0, struct=True, labels=None):
    import pyarrow
    import pyarrow.parquet
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
    contents = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        contents.append({"bytes": file.getvalue(), "path": None} if struct else file.getvalue())
    labels = [i % 3 for i in range(count)] if labels is None else labels
    table = pyarrow.table({image: contents, label: labels})
    if names:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return images


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("place, image, label", [("plain_text", "img", "label"), ("data", "image", "fine_label"), (".", "img", "label")])
def test_the_hubs_parquet_files(tmp_path, place, image, label, struct):
    first = write_parquet(tmp_path / place / "train-00000-of-00002.parquet", 6, ["cat", "dog", "emu"], image, label, struct=struct)
    second = write_parquet(tmp_path / place / "train-00001-of-00002.parquet", 3, ["cat", "dog", "emu"], image, label, 1, struct)
    test = write_parquet(tmp_path / place / "test-00000-of-00001.parquet", 3, ["cat", "dog", "emu"], image, label, 2, struct)
    read = find_source(tmp_path).read()
    assert find_source(tmp_path).kind == "parquet" and read.classes == ("cat", "dog", "emu")
    assert np.array_equal(read.train.images, np.concatenate([first, second])) and np.array_equal(read.test.images, test)
    assert read.train.labels.tolist() == [0, 1, 2] * 3


def test_a_validation_split_in_several_files_is_whole(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", 6)
    parts = [write_parquet(tmp_path / f"validation-0000{i}-of-00003.parquet", 3, seed=i + 1) for i in range(3)]
    assert np.array_equal(find_source(tmp_path).read().test.images, np.concatenate(parts))
    test = write_parquet(tmp_path / "test-00000-of-00001.parquet", 3, seed=9)
    assert np.array_equal(find_source(tmp_path).read().test.images, test)


def test_parquet_labels_may_be_words_and_names_may_look_like_paths(tmp_path):
    write_parquet(tmp_path / "words/train-0.parquet", 6, labels=["emu", "cat", "emu", "dog", "cat", "dog"])
    write_parquet(tmp_path / "words/test-0.parquet", 3, labels=["dog", "emu", "cat"])
    read = find_source(tmp_path / "words").read()
    assert read.classes == ("cat", "dog", "emu") and read.train.labels.tolist() == [2, 0, 2, 1, 0, 1] and read.test.labels.tolist() == [1, 2, 0]
    write_parquet(tmp_path / "fashion/train-0.parquet", 30, ["T - shirt / top", "Bag", "a\\b"])
    assert find_source(tmp_path / "fashion").read().classes == ("T - shirt - top", "Bag", "a-b")


def test_of_several_sets_in_a_folder_one_has_to_be_named(tmp_path):
    for name in ("mnist", "svhn"):
        write_parquet(tmp_path / "hub" / name / "train-0.parquet", 30)
        (tmp_path / "npz").mkdir(exist_ok=True)
        np.savez(tmp_path / f"npz/{name}.npz", x=np.zeros((9, 4, 4, 3), np.uint8), y=np.arange(9) % 3)
    for place, names in (("hub", "mnist, svhn"), ("npz", "mnist.npz, svhn.npz")):
        with pytest.raises(SourceError, match=f"holds several data sets: {names}: name one of them"):
            find_source(tmp_path / place)
    assert len(find_source(tmp_path / "hub/svhn").read().train.labels) == 24
    assert find_source(tmp_path / "npz/svhn.npz").read().name == "svhn"


def test_rows_of_whole_pixels_are_not_taken_for_planes(tmp_path):
    """Keras' or torchvision's images, flattened for scikit-learn."""
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None] * 7, (30, 32, 32))
    images = np.stack([smooth, 255 - smooth, smooth // 2], axis=3)
    np.savez(tmp_path / "flat.npz", x=images.reshape(30, -1), y=np.arange(30) % 3)
    with pytest.raises(SourceError, match="flat.npz: x: its rows hold red, green and blue of each pixel side by side"):
        find_source(tmp_path / "flat.npz").read()
    noise = np.random.default_rng(0).integers(0, 256, (1, 3072), dtype=np.uint8)    # which is no smoother either way
    assert sources.as_images(noise, "").shape == (1, 32, 32, 3)
    np.savez(tmp_path / "flat.npz", x=images.transpose(0, 3, 1, 2).reshape(30, -1), y=np.arange(30) % 3)
    assert np.array_equal(find_source(tmp_path / "flat.npz").read().train.images[0], images[0])


def test_images_that_are_made_larger_have_to_fit_into_memory(tmp_path, monkeypatch):
    np.savez(tmp_path / "small.npz", x=np.zeros((30, 8, 8, 3), np.uint8), y=np.arange(30) % 3)
    monkeypatch.setattr("seresnet.runtime.free_memory_of_machine", lambda: 1 << 20)
    assert find_source(tmp_path / "small.npz", image_size=16).read().train.images.shape == (24, 16, 16, 3)
    with pytest.raises(SourceError, match="take 13 MiB of memory, 1 MiB are free: make them smaller with --sources.image_size"):
        find_source(tmp_path / "small.npz", image_size=448).read()
    with pytest.raises(SourceError, match="1 MiB are free: evaluate fewer of them at a time"):
        find_source(tmp_path / "small.npz", image_size=448, for_training=False).read()


def test_parquet_files_without_names_or_test_split(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 30)
    read = find_source(tmp_path).read()
    assert read.classes == ("0", "1", "2") and len(read.test.labels) == 6 and len(read.train.labels) == 24


def test_a_parquet_file_alone_and_a_test_split_to_look_at(tmp_path):
    images = write_parquet(tmp_path / "hub/validation-00000-of-00001.parquet", 9, ["cat", "dog", "emu"])
    with pytest.raises(sources.MissingError):
        find_source(tmp_path / "hub")
    for path in (tmp_path, tmp_path / "hub", tmp_path / "hub/validation-00000-of-00001.parquet"):
        read = find_source(path, for_training=False).read()
        assert len(read.train.images) == 0 and np.array_equal(read.test.images, images) and read.classes == ("cat", "dog", "emu")
    with pytest.raises(SourceError, match="parquet: holds test, expected train and test, or train alone"):
        find_source(tmp_path / "hub/validation-00000-of-00001.parquet").read()
    write_parquet(tmp_path / "mine.parquet", 30)
    source = find_source(tmp_path / "mine.parquet")
    read, before = source.read(), source.fingerprint()
    assert len(read.train.labels) == 24 and len(read.test.labels) == 6 and source.describe().startswith("parquet file ")
    write_parquet(tmp_path / "mine.parquet", 30, seed=1)
    assert source.fingerprint() != before


def cut_in_a_cell(path):
    """A parquet file whose labels can be read and whose images cannot."""
    import pyarrow.parquet
    write_parquet(path, 3)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    content, start = path.read_bytes(), column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(content[:start] + b"\xff" * 40 + content[start + 40:])


@pytest.mark.parametrize("write, message", [
    (lambda p: write_parquet(p, 3, image="picture"), "has the columns picture, label"),
    (lambda p: write_parquet(p, 3, label="coarse_label"), "expected img or image, and label or fine_label"),
    (lambda p: write_parquet(p, 3, labels=[0, 1, -1]), "train has samples without a label .-1."),
    (lambda p: write_parquet(p, 3, labels=[0, 1, None]), "train has samples without a label .None."),
    (lambda p: write_parquet(p, 3, labels=[True, False, True]), "labels such as True .bool., expected numbers or words"),
    (lambda p: (write_parquet(p, 3), write_parquet(p.with_name("test-0.parquet"), 3, labels=[-1] * 3)), "move test-.*.parquet away"),
    (cut_in_a_cell, "no readable parquet file"),
    (lambda p: p.write_bytes(b"PAR1 no table"), "no readable parquet file")])
def test_bad_parquet_files_are_refused(tmp_path, write, message):
    write(tmp_path / "train-0.parquet")
    with pytest.raises(SourceError, match=message):
        find_source(tmp_path).read()


@pytest.mark.parametrize("names", [("x_train", "y_train", "x_test", "y_test"),
                                   ("train_images", "train_labels", "val_images", "val_labels"), ("X_train", "Y_train", "X_test", "Y_test")])
def test_arrays_with_both_splits(tmp_path, names):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (9, 8, 8), dtype=np.uint8), np.arange(9)[:, None] % 3
    np.savez(tmp_path / "set.npz", **dict(zip(names, (x, y, x[:3], y[:3]))), classes=np.array(["a", "b", "c"], "S" if "val" in names[2] else "U"))
    read = find_source(tmp_path / "set.npz").read()
    assert find_source(tmp_path).path == tmp_path / "set.npz"
    (tmp_path / "set.npz").rename(tmp_path / "SET.NPZ")
    assert find_source(tmp_path).path == tmp_path / "SET.NPZ" and find_source(tmp_path / "SET.NPZ").kind == "arrays"
    assert read.classes == ("a", "b", "c") and np.array_equal(read.train.images, np.repeat(x[..., None], 3, axis=3))
    assert read.test.labels.tolist() == [0, 1, 2]


def test_arrays_with_one_split_and_planes_first(tmp_path):
    planes = np.random.default_rng(0).integers(0, 256, (20, 3, 6, 5), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=planes, labels=np.arange(20) % 2)
    read = find_source(tmp_path / "set.npz", image_size=6).read()
    assert read.train.images.shape == (16, 6, 6, 3) and len(read.test.labels) == 4 and read.classes == ("0", "1")


@pytest.mark.parametrize("arrays, message", [
    (dict(images=np.zeros((4, 8, 8, 3), np.float32), labels=np.arange(4) % 2), "is float32"),
    (dict(images=np.zeros((4, 8, 8, 4), np.uint8), labels=np.arange(4) % 2), "has the shape"),
    (dict(images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(3) % 2), "4 images and 3 labels"),
    (dict(images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4)), "labels is float64"),
    (dict(images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.array([0, 1, 0, 99999])), "label 99999"),
    (dict(pictures=np.zeros((4, 8, 8, 3), np.uint8)), "holds pictures; expected"),
    (dict(X=np.zeros((4, 8, 8, 3), np.uint8), y=np.arange(4) % 2, x=np.zeros(4)), "holds X and x, which differ in capitals alone"),
    (dict(images=np.array([{}, {}], object), labels=np.arange(2)), "holds objects rather than numbers")])
def test_bad_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(SourceError, match=message):
        find_source(tmp_path / "set.npz").read()


def test_an_array_file_that_claims_too_much_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((1000, 32, 32, 3), np.uint8), labels=np.arange(1000) % 2)
    monkeypatch.setattr("seresnet.runtime.free_memory_of_machine", lambda: 1 << 20)
    with pytest.raises(SourceError, match="unpacks to 2 MiB, 1 MiB are free"):
        find_source(tmp_path / "set.npz").read()

"""beton: what is written reads back, whatever does not hold together is refused before FFCV sees it, nothing is lost."""
import dataclasses
import json
import os
import re
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import in_child, killed, start_child
from seresnet import beton, config, sources
from seresnet.beton import BetonError, is_current, open_beton, read_images, sidecar_path, write_beton
from seresnet.imageset import Split
from seresnet.sources import find_source

CLASSES = ("a", "b", "c")
PARTS = (0, 2, 4, 8, 16, 24, 24 + 1041, 24 + 2 * 1041)    # where header entries, descriptors and metadata start


def write(path, split, **changes):
    return write_beton(path, split, **{**dict(classes=CLASSES, name="noise", source="a test", fingerprint="f"), **changes})


@pytest.fixture
def good(tmp_path, make_split):
    write(tmp_path / "x.beton", make_split())
    return tmp_path / "x.beton"


@pytest.mark.parametrize("count, side", [(1, 4), (3, 32), (60, 8), (3000, 32)])    # 3000 take more than one page
def test_what_is_written_reads_back(tmp_path, make_split, count, side):
    split = make_split(count, side)
    written = write(tmp_path / "x.beton", split)
    assert np.array_equal(read_images(written), split.images) and np.array_equal(written.labels, split.labels)
    assert (written.samples, written.height, written.width) == (count, side, side)
    assert written.classes == CLASSES and (written.name, written.source) == ("noise", "a test")
    assert np.allclose(written.mean, split.images.mean((0, 1, 2))) and np.allclose(written.std, split.images.std((0, 1, 2)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def test_ffcvs_own_reader_finds_the_same(tmp_path, make_split):
    from ffcv.reader import Reader
    split = make_split(500, 16)
    written = write(tmp_path / "x.beton", split)
    reader = Reader(str(written.path))
    assert reader.num_samples == 500 and list(reader.handlers) == ["image", "label"]
    assert np.array_equal(reader.metadata["f1"], split.labels)
    content = np.fromfile(written.path, np.uint8)
    for i in (0, 250, 499):
        start = int(reader.metadata["f0"]["data_ptr"][i])
        assert np.array_equal(content[start:start + 16 * 16 * 3], split.images[i].ravel())


def ffcv_writes(path, images, labels, page_size=8 << 20):
    """The file that FFCV's own writer makes, in one worker process (several would write pages in a random order)."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    writer = DatasetWriter(str(path), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, page_size=page_size,
                           num_workers=1)
    writer.from_indexed_dataset(list(zip(images, labels.tolist())))


@pytest.mark.parametrize("count, side", [(7, 5), (3000, 32), (2731, 32), (30, 1000)])    # part of a page, two, a full one, many
def test_the_bytes_are_those_of_ffcvs_own_writer(tmp_path, make_split, count, side):
    split = make_split(count, side)
    written = write(tmp_path / "ours.beton", split)
    ffcv_writes(tmp_path / "ffcv.beton", split.images, split.labels)
    assert written.path.read_bytes() == (tmp_path / "ffcv.beton").read_bytes()


def smooth_split(count=40, side=24):
    """Images that JPEG does not hurt much."""
    place, rng = np.linspace(0, 1, side), np.random.default_rng(0)
    tilt = rng.uniform(-100, 100, (2, count, 1, 1, 3))
    images = 127 + tilt[0] * (place[:, None, None] - 0.5) + tilt[1] * (place[None, :, None] - 0.5)
    return Split(np.rint(images).astype(np.uint8), np.arange(count) % 3)


def test_jpeg_storage_takes_less_room_and_loses_little(tmp_path):
    split = smooth_split()
    raw, small = write(tmp_path / "raw.beton", split), write(tmp_path / "jpeg.beton", split, storage="jpeg", jpeg_quality=90)
    assert (raw.storage, small.storage) == ("raw", "jpeg")
    layout = [sum(beton._read_layout(b.path)[0].sizes) for b in (raw, small)]
    assert layout[1] < 0.7 * layout[0]
    read = read_images(small).astype(int)
    assert 0 < np.abs(read - split.images).max() < 20 and np.abs(read - split.images).mean() < 2
    assert np.allclose(small.mean, read.mean((0, 1, 2)))
    assert np.array_equal(read_images(small, np.array([7, 3])), read[[7, 3]]) and small.labels.tolist() == split.labels.tolist()
    open_beton(small.path, verify="full")


def test_ffcv_reads_a_jpeg_beton(tmp_path):
    import torch
    from seresnet.loader import BatchLoader
    written = write(tmp_path / "x.beton", smooth_split(), storage="jpeg")
    with BatchLoader(written, batch_size=16, device=torch.device("cpu"), mode="stream", shuffle=False) as loader:
        images = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy().copy() for batch in loader.epoch(0)])
    difference = np.abs(images.astype(int) - read_images(written))    # FFCV asks for the fast transform
    assert difference.max() <= 4 and difference.mean() < 1.5


def test_chosen_samples_are_read_in_the_order_asked_for(tmp_path, make_split):
    split = make_split(3000, 32)
    chosen = np.random.default_rng(0).permutation(3000)[:500]
    assert np.array_equal(read_images(write(tmp_path / "x.beton", split), chosen), split.images[chosen])


def test_images_that_are_not_square_and_not_contiguous(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 5, 7), dtype=np.uint8).transpose(0, 2, 3, 1)
    written = write(tmp_path / "x.beton", Split(images, np.arange(9) % 3))
    assert (written.height, written.width) == (5, 7) and np.array_equal(read_images(written), images)


def test_the_same_images_give_the_same_file(tmp_path, make_split):
    first, second = (write(tmp_path / f"{i}.beton", make_split(200, 16)) for i in range(2))
    assert first.sha256 == second.sha256


def test_real_cifar10_in_15_seconds(tmp_path, cifar10_dir):
    images = find_source(cifar10_dir).read()
    started = time.perf_counter()
    for name in ("train", "test"):
        split = getattr(images, name)
        written = write(tmp_path / f"{name}.beton", split, classes=images.classes)
        assert np.array_equal(read_images(written), split.images)
    assert time.perf_counter() - started < 15
    started = time.perf_counter()
    for _ in range(5):
        open_beton(tmp_path / "train.beton")
    assert (time.perf_counter() - started) / 5 < 0.05


def test_a_recipe_for_other_data_is_told_so(good):
    with pytest.raises(BetonError) as caught:
        open_beton(good, classes=10, image_size=32)
    assert len(caught.value.problems) == 2
    assert "has 3 classes (a, b, c, ...), model.classes is 10" in str(caught.value)
    assert "images of 8 x 8 pixels, model.image_size is 32" in str(caught.value)
    assert open_beton(good, classes=3, image_size=8).samples == 60


def test_is_current_follows_the_fingerprint_and_the_bytes(good):
    assert is_current(good, "f") and not is_current(good, "g") and not is_current(good.with_name("other"), "f")
    content = bytearray(good.read_bytes())
    content[-24 * 60 - 100] ^= 1    # inside the page
    good.write_bytes(content)
    assert not is_current(good, "f")


# -- damage -------------------------------------------------------------------------------------------------------------

def boundaries(path):
    """Bytes at which a part of the file starts or ends."""
    size, samples = path.stat().st_size, 60
    metadata = PARTS[-1]
    return {0, *PARTS, metadata + 24, metadata + 24 * samples, 8 << 20, (8 << 20) + 192, (8 << 20) + 192 * samples,
            size - 24 * samples, size - 24, size}


def test_a_file_cut_anywhere_is_refused(good, faults):
    whole = good.read_bytes()
    rng = np.random.default_rng(0)
    cuts = {b + d for b in boundaries(good) for d in (-1, 0, 1)} | set(rng.integers(0, len(whole), 200).tolist())
    cuts = sorted((c for c in cuts if 0 <= c < len(whole)), reverse=True)    # from the end on: one cut after the other
    for cut in cuts:
        os.truncate(good, cut)
        started = time.perf_counter()
        with pytest.raises(BetonError, match="x.beton: "):
            open_beton(good)
        assert time.perf_counter() - started < 1
    assert not is_current(good, "f")
    good.write_bytes(whole)
    open_beton(good)
    faults(len(cuts))


def test_a_bit_flipped_anywhere_in_the_structure_is_refused(good, faults):
    whole = good.read_bytes()
    table = len(whole) - 24 * 60
    structure = list(range(PARTS[-1] + 24 * 60)) + list(range(table, len(whole)))
    rng = np.random.default_rng(0)
    places = {*range(24), *rng.choice(structure, 200).tolist()}
    with open(good, "r+b") as file:
        for place in sorted(places):
            file.seek(place)
            file.write(bytes([whole[place] ^ (1 << int(rng.integers(8)))]))
            file.flush()
            started = time.perf_counter()
            with pytest.raises(BetonError, match="x.beton: "):
                open_beton(good)
            assert time.perf_counter() - started < 1
            file.seek(place)
            file.write(whole[place:place + 1])
    open_beton(good, verify="full")
    faults(len(places))


def test_a_bit_flipped_in_a_pixel_is_found_by_the_full_check(good):
    with open(good, "r+b") as file:
        file.seek((8 << 20) + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    open_beton(good)
    with pytest.raises(BetonError, match="its sha256 is"):
        open_beton(good, verify="full")


@pytest.mark.parametrize("content", [b"", b"x" * 23, b"some text\n" * 100, b"PK\x03\x04" + bytes(5000), b"\x89PNG\r\n" + bytes(99),
                                     b"\x80\x05]q\x00." * 20, b"\x02\x00" + bytes(3000), b"\x02\x00\x02\x00" + b"\xff" * 3000])
def test_foreign_files_are_refused(good, content):
    good.write_bytes(content)
    with pytest.raises(BetonError, match="x.beton: "):
        open_beton(good)


@pytest.mark.parametrize("make", [
    lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to(p), lambda p: p.symlink_to("nowhere"), lambda p: None])
def test_what_is_no_file_is_refused_without_waiting(good, make):
    good.unlink()
    make(good)
    started = time.perf_counter()
    with pytest.raises(BetonError, match="x.beton: "):
        open_beton(good)
    assert time.perf_counter() - started < 1


def test_an_unreadable_file_is_refused(good):
    good.chmod(0)
    nobody = 65534 if os.geteuid() == 0 else 0    # root reads what it has no right to
    assert re.match("BetonError: .*x.beton: cannot be read .Permission denied", in_child(lambda: open_beton(good), nobody))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update(format=2), "is of format 2, this version reads 1"), (lambda s: s.pop("mean"), "mean: got None"),
    (lambda s: s.update(classes="abc"), "classes: got 'abc'"), (lambda s: s.update(samples=True), "samples: got True"),
    (lambda s: s.update(samples=61), "samples: is 60, its sidecar .* says 61"), (lambda s: s.update(std=[1.0]), "three channels"),
    (lambda s: s.update(bytes=7), "bytes: is"), (lambda s: s.update(layout_sha256="0"), "was changed since"),
    (lambda s: s.update(mean=[0.0, float("nan"), 0.0]), "expected pixel values"), (lambda s: s.update(std=[-1.0] * 3), "expected pixel values"),
    (lambda s: s.update(how={"fit": "stretch"}), "how: got"), (lambda s: s.update(how=[1]), "how: got"),
    (lambda s: s.update(how={"test_share": 2.0}), "how: got"), (lambda s: s.update(how={"image_size": True}), "how: got"),
    (lambda s: s.update(classes=["a", "b"]), r"labels lie in \[0, 2\], expected \[0, 1\]")])
def test_a_wrong_sidecar_is_refused(good, change, message):
    content = json.loads(sidecar_path(good).read_text())
    change(content)
    sidecar_path(good).write_text(json.dumps(content))
    with pytest.raises(BetonError, match=message):
        open_beton(good)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100000])
def test_a_sidecar_that_is_no_json_is_refused(good, content):
    sidecar_path(good).write_text(content)
    with pytest.raises(BetonError, match="x.beton.json: is"):
        open_beton(good)


def test_a_beton_without_sidecar_is_refused(good):
    sidecar_path(good).unlink()
    with pytest.raises(BetonError, match="x.beton.json: cannot be read .*--force"):
        open_beton(good)


def test_another_beton_under_the_sidecar_is_refused(good, make_split):
    other = write(good.with_name("y.beton"), make_split(60, 8, seed=5))
    split = make_split(60, 8, seed=5)
    write(good.with_name("z.beton"), Split(split.images, split.labels[::-1].copy()))
    os.replace(good.with_name("z.beton"), good)
    with pytest.raises(BetonError, match="was changed since it was written"):
        open_beton(good)
    assert open_beton(other.path).samples == 60


# -- writing: nothing is lost -------------------------------------------------------------------------------------------

def test_a_failure_while_writing_leaves_the_old_file(good, make_split, monkeypatch):
    before = good.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(beton, "_write_samples", fails)
    with pytest.raises(BetonError, match="x.beton: cannot be written .No space left"):
        write(good, make_split(seed=9))
    assert good.read_bytes() == before and open_beton(good, verify="full")
    assert sorted(p.name for p in good.parent.iterdir()) == ["x.beton", "x.beton.json"]


def test_pixels_that_do_not_read_back_are_noticed(good, make_split, monkeypatch):
    before, whole = good.read_bytes(), beton._write_samples

    def damages(path, contents, *others):
        whole(path, contents ^ np.uint8(1), *others)
    monkeypatch.setattr(beton, "_write_samples", damages)
    with pytest.raises(BetonError, match="does not read back"):
        write(good, make_split(seed=9))
    assert good.read_bytes() == before


def test_too_little_space_is_said_before_writing(good, make_split, monkeypatch):
    usage = beton.shutil.disk_usage(good.parent)
    monkeypatch.setattr(beton.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(BetonError, match="needs 16 MiB, 1 MiB are free"):
        write(good, make_split())


def test_what_a_sidecar_may_say_of_the_sources_is_what_the_config_may():
    how = sources.Source("folder", Path("x")).how()
    assert list(beton.HOW) == list(how) == [field.name for field in dataclasses.fields(config.Sources)][2:]
    for name, values in {"image_size": (0, 64, 4096, 4097, -1, 2.5), "fit": ("resize", "crop", "stretch"),
                         "test_share": (0.2, 0.999, 0.0, 1.0, -0.5), "labels": ("fine", "coarse", "both")}.items():
        for value in values:
            try:
                config.build({f"sources.{name}": value})
                allowed = True
            except config.ConfigError:
                allowed = False
            assert bool(beton.HOW[name](value)) == allowed, (name, value)


def test_room_for_jpegs_is_that_of_jpegs(tmp_path, monkeypatch):
    even = Split(np.full((40, 512, 512, 3), 90, np.uint8), np.arange(40) % 2)    # 30 MiB raw
    usage = beton.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(beton.shutil, "disk_usage", lambda _: usage._replace(free=24 << 20))
    about = dict(classes=("a", "b"), name="x", source="x", fingerprint="x")
    with pytest.raises(BetonError, match="24 MiB are free"):
        write_beton(tmp_path / "x.beton", even, **about)
    assert write_beton(tmp_path / "x.beton", even, storage="jpeg", **about).samples == 40


def test_a_bad_sample_is_an_exception_and_not_a_hang(tmp_path, make_split):
    split = make_split()
    with pytest.raises((ValueError, IndexError, TypeError)):
        write(tmp_path / "x.beton", Split(split.images.astype(np.float32), split.labels))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_named(tmp_path, make_split):
    (tmp_path / "file").write_text("")
    with pytest.raises(BetonError, match="file/x.beton: cannot be written .(Not a directory|File exists)"):
        write(tmp_path / "file" / "x.beton", make_split())
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(BetonError, match="folder.beton: cannot be written .Is a directory"):
        write(tmp_path / "folder.beton", make_split())


def test_a_converter_killed_at_any_moment_leaves_a_whole_file_or_none(quick_disk, faults):
    path = quick_disk / "x.beton"
    rng = np.random.default_rng(0)
    splits = [Split(np.random.default_rng(seed).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), np.arange(300) % 3)
              for seed in (0, 1)]

    def convert():
        while True:
            for seed in (0, 1):
                write(path, splits[seed], fingerprint=str(seed))
    for seed in (0, 1):    # the second shows what one takes, however busy the machine is
        started = time.perf_counter()
        write(path, splits[seed], fingerprint=str(seed))
    one = min(time.perf_counter() - started, 0.2)
    segments = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    whole = 0
    for _ in range(50):
        assert killed(convert, rng.uniform(0, max(0.12, 3 * one)))
        try:
            found = open_beton(path, verify="full")
        except BetonError as error:    # between the two renames: no sidecar, so there is no file to use
            assert "x.beton.json: cannot be read" in str(error) or "x.beton: cannot be read" in str(error)
            continue
        whole += 1
        seed = int(json.loads(sidecar_path(path).read_text())["fingerprint"])
        assert np.array_equal(read_images(found), splits[seed].images)
    assert whole >= 25
    write(path, splits[0])    # the next start clears what the killed ones left
    assert sorted(p.name for p in quick_disk.iterdir()) == ["x.beton", "x.beton.json"]
    assert not segments or not set(os.listdir("/dev/shm")) - segments, "no shared memory is used, none is left"
    faults(50)


def test_a_small_disk_that_fills_up_leaves_the_old_file(small_disk, make_split, monkeypatch, faults):
    place = small_disk(17)    # one beton of 8 MiB and a page, and not a second one
    path = place / "x.beton"
    write(path, make_split())
    before = path.read_bytes()
    with pytest.raises(BetonError, match="needs 16 MiB, [0-9]+ MiB are free"):
        write(path, make_split(seed=9))
    usage = beton.shutil.disk_usage(place)
    monkeypatch.setattr(beton.shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))    # somebody else takes the room meanwhile
    with pytest.raises(BetonError, match="x.beton: cannot be written .No space left"):
        write(path, make_split(3000, 32, seed=9))
    assert path.read_bytes() == before and open_beton(path, verify="full")
    assert sorted(p.name for p in place.iterdir()) == ["x.beton", "x.beton.json"]
    faults(2)


def test_a_limit_on_the_size_of_files_leaves_the_old_file(quick_disk, make_split, faults):
    good = write(quick_disk / "x.beton", make_split()).path
    before = good.read_bytes()

    def limited(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return write(good, make_split(3000, 32, seed=9))
    for size in (0, 100, 5000, (8 << 20) + 1, 10 << 20, 16 << 20):
        assert re.match("BetonError: .*x.beton: cannot be written .File too large", in_child(lambda: limited(size)))
        assert good.read_bytes() == before and open_beton(good, verify="full")
        assert sorted(p.name for p in good.parent.iterdir()) == ["x.beton", "x.beton.json"]
    faults(6)


def test_a_read_only_place_is_named_and_untouched(small_disk, make_split):
    place = small_disk(40)
    write(place / "x.beton", make_split())
    before = (place / "x.beton").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    with pytest.raises(BetonError, match="x.beton: cannot be written .Read-only file system"):
        write(place / "x.beton", make_split(seed=9))
    assert (place / "x.beton").read_bytes() == before and open_beton(place / "x.beton", verify="full")


def test_of_two_converters_on_one_target_one_works_and_the_other_says_so(good, make_split):
    with beton._alone(good):
        text = in_child(lambda: write(good, make_split(seed=9)))
        assert re.match("BetonError: .*x.beton: another process is writing this file", text)
    write(good, make_split(seed=9))
    assert sorted(p.name for p in good.parent.iterdir()) == ["x.beton", "x.beton.json"]


def test_links_stay_links_and_what_they_name_is_written(good, make_split):
    place = good.parent / "elsewhere"
    place.mkdir()
    for name in ("x.beton", "x.beton.json"):
        (good.parent / name).rename(place / name)
        (good.parent / name).symlink_to(place / name)
    made = write(good, make_split(seed=9))
    assert np.array_equal(read_images(made), make_split(seed=9).images) and open_beton(place / "x.beton", verify="full").sha256 == made.sha256
    assert good.is_symlink() and sidecar_path(good).is_symlink()


def test_a_beton_that_may_not_be_replaced_keeps_its_sidecar(good, make_split, monkeypatch):
    """As on Windows, where a training reads it."""
    before, replace = (good.read_bytes(), sidecar_path(good).read_bytes()), os.replace

    def refused(source, target):
        if Path(target) == good:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        replace(source, target)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(BetonError, match="x.beton: cannot be written .The process cannot access"):
        write(good, make_split(seed=9))
    assert (good.read_bytes(), sidecar_path(good).read_bytes()) == before and open_beton(good, verify="full")
    assert sorted(p.name for p in good.parent.iterdir()) == ["x.beton", "x.beton.json"]


def test_what_another_converter_writes_is_not_taken_for_left_over(good, make_split):
    """Of a process of another machine, or container, on the same disk it cannot be told that it runs."""
    with beton._alone(good):
        theirs = good.with_name(f".{good.name}.tmp-999999999")
        theirs.touch()
        with pytest.raises(BetonError, match="another process is writing this file"):
            write(good, make_split(seed=9))
        assert theirs.exists()
    write(good, make_split(seed=9))
    assert not theirs.exists()


def test_converters_that_race_for_one_target_leave_one_whole_file(quick_disk, make_split, faults):
    path, splits = quick_disk / "x.beton", [make_split(seed=seed) for seed in range(4)]

    def race(seed):
        written, told = 0, 0
        while written < 5:
            try:
                write(path, splits[seed], fingerprint=str(seed))
                written += 1
            except BetonError as error:    # the other one wrote, or was at the file while this one read its own back
                assert "another process is writing" in str(error) or "json" in str(error) or "changed" in str(error), error
                told += 1
                time.sleep(0.002)
        return told
    racing = [start_child(lambda seed=seed: race(seed)) for seed in range(4)]
    told = [wait() for wait in racing]
    assert all(count.isdigit() for count in told), told
    found = open_beton(path, verify="full")
    assert np.array_equal(read_images(found), splits[int(json.loads(sidecar_path(path).read_text())["fingerprint"])].images)
    assert sorted(p.name for p in quick_disk.iterdir()) == ["x.beton", "x.beton.json"]
    faults(sum(map(int, told)))


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/etc/passwd", "..", "", "a\nb", "a\x1b[31m", "x" * 300, "b"])
def test_class_names_that_are_paths_or_no_names_are_refused(good, name):
    content = json.loads(sidecar_path(good).read_text())
    content["classes"][0] = name
    sidecar_path(good).write_text(json.dumps(content))
    with pytest.raises(BetonError, match="x.beton.json: class .*(no path|there twice)"):
        open_beton(good)


def test_a_channel_that_never_varies_is_not_divided_by_its_deviation(tmp_path, make_split):
    split = make_split()
    split.images[..., 1] = 7
    written = write(tmp_path / "x.beton", split)
    assert written.std[1] == 1.0 and written.std[0] > 1 and written.mean[1] == 7

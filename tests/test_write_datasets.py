"""write_datasets.py as a user runs it: writes, skips, forces, and says what is wrong with exit status 2 or 4."""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import write_datasets
from seresnet import config, sources
from seresnet.beton import open_beton, read_images

ROOT = Path(__file__).parents[1]


def convert(tmp_path, *arguments):
    """(exit status, output, errors) of the program, run in `tmp_path`."""
    done = subprocess.run([sys.executable, ROOT / "write_datasets.py", *map(str, arguments)], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in ("cat", "dog"):
            folder = tmp_path / "pets" / split / c
            folder.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_writes_skips_and_forces(tree):
    keys = ("--sources.path", "pets", "--beton.train", "a/train.beton", "--beton.test", "a/test.beton")
    status, output, errors = convert(tree, *keys)
    assert (status, errors) == (0, "") and "\x1b" not in output
    assert "image folder pets" in output and "10 images of 9 x 9, 2 classes" in output
    train = open_beton(tree / "a/train.beton")
    assert train.classes == ("cat", "dog") and train.name == "pets" and train.labels.tolist() == [0] * 5 + [1] * 5
    assert np.array_equal(read_images(train)[6], np.asarray(Image.open(tree / "pets/train/dog/1.png")))
    written = {name: os.stat(tree / f"a/{name}.beton").st_ino for name in ("train", "test")}

    status, output, _ = convert(tree, *keys)
    assert status == 0 and output.count("is up to date") == 2
    assert {name: os.stat(tree / f"a/{name}.beton").st_ino for name in written} == written

    (tree / "a/test.beton").write_bytes((tree / "a/test.beton").read_bytes()[:-1])
    status, output, _ = convert(tree, *keys)    # the damaged one alone is written again
    assert status == 0 and "train.beton is up to date" in output and "test: a/test.beton: 10 images" in output

    assert convert(tree, *keys, "--force")[1].count("written and read back") == 2
    Image.new("RGB", (9, 9)).save(tree / "pets/train/cat/0.png")
    assert convert(tree, *keys)[1].count("written and read back") == 2


def test_a_set_of_other_classes_does_not_take_the_place_of_one_that_fits(tree):
    keys = ("--sources.path", "pets", "--beton.train", "a/train.beton", "--beton.test", "a/test.beton")
    status, output, _ = convert(tree, *keys, "--model.classes", "2")
    assert status == 0 and "classes: cat, dog" in output
    before = (tree / "a/train.beton").read_bytes()
    for split in ("train", "test"):
        (tree / "pets" / split / "emu").mkdir()
        Image.new("RGB", (9, 9)).save(tree / "pets" / split / "emu/0.png")
    status, _, errors = convert(tree, *keys, "--model.classes", "2")
    assert status == 4 and "has 3 classes (cat, dog, emu) and would take the place of a/train.beton" in errors
    assert (tree / "a/train.beton").read_bytes() == before
    assert convert(tree, *keys, "--model.classes", "2", "--force")[0] == 0 and open_beton(tree / "a/train.beton").classes[-1] == "emu"
    assert convert(tree, *keys)[0] == 0, "up to date"


def test_a_set_that_nobody_named_takes_the_place_of_no_other(tree):
    """As of CIFAR-10 where its folder is exported for the tests, or lies in data/, and somebody trains on images of their own."""
    own = ("--beton.train", "a/train.beton", "--beton.test", "a/test.beton")
    cifar = ("--default-source", "data")
    assert convert(tree, *own, "--sources.path", "pets", *cifar)[0] == 0 and open_beton(tree / "a/train.beton").name == "pets"
    (tree / "pets").rename(tree / "data")
    before = (tree / "a/train.beton").read_bytes()
    for keys in ((), cifar):
        status, _, errors = convert(tree, *own, *keys)
        assert status == 2 and "data: is read because no place is named, and would take the place of a/train.beton, which holds pets" in errors
    assert (tree / "a/train.beton").read_bytes() == before
    (tree / "a/train.beton").write_bytes(before[:-1])    # which is no set any more: the other still is
    assert convert(tree, *own)[0] == 2
    assert convert(tree, *own, "--sources.path", "data")[0] == 0 and open_beton(tree / "a/train.beton").name == "data"
    (tree / "data").rename(tree / "elsewhere")
    assert convert(tree, *own, "--default-source", "elsewhere")[0] == 2
    assert convert(tree, *own, "--default-source", "elsewhere", "--force")[0] == 0 and open_beton(tree / "a/train.beton").name == "elsewhere"
    status, output, errors = convert(tree, "--default-source", "elsewhere")    # CIFAR-10's own files: of the same classes in another layout
    assert status == 0, errors
    (tree / "elsewhere").rename(tree / "again")
    assert convert(tree, "--default-source", "again")[0] == 0 and open_beton(tree / "data/cifar10_train.beton").name == "again"


@pytest.mark.parametrize("keys, named", [
    (("--sources.path", "data"), True), (("--sources.path=data",), True), (("--sources.kind", "folder"), True), (("--sources.fit", "crop"), False),
    (("--sources.kind", "download"), False), (("-C", "run.yaml"), False), (("-C", "flow.yaml"), True)])
def test_who_names_a_source(tmp_path, monkeypatch, keys, named):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.build({}).as_dict()))    # a run folder's: all keys are in it
    (tmp_path / "flow.yaml").write_text("sources: {path: pets}\n")
    monkeypatch.chdir(tmp_path)
    settings, _ = config.parse(list(keys), argparse.ArgumentParser())
    assert config.names_a_source(settings, keys) == named


def test_one_file_for_both_splits_is_refused(tree):
    status, output, errors = convert(tree, "--sources.path", "pets", "--beton.train", "a.beton", "--beton.test", "a.beton")
    assert status == 2 and "expected two files" in errors and not (tree / "a.beton").exists()
    (tree / "there").symlink_to(tree)
    status, output, errors = convert(tree, "--sources.path", "pets", "--beton.train", "there/a.beton", "--beton.test", tree / "a.beton")
    assert status == 2 and "expected two files" in errors and not (tree / "a.beton").exists()


def test_what_is_downloaded_is_not_put_where_the_default_source_is(tree, monkeypatch):
    found = []
    monkeypatch.setattr(sources, "find_source", lambda path, **keys: found.append(path) or 1 / 0)
    for keys in ((), ("--sources.kind", "download")):
        monkeypatch.setattr(sys, "argv", ["write_datasets.py", "--default-source", "elsewhere", *keys])
        with pytest.raises(ZeroDivisionError):
            write_datasets.main()
    assert found == ["elsewhere", "data"]


@pytest.mark.parametrize("keys, status, message", [
    (("--sources.path", "nowhere"), 4, "sources.path: nowhere does not exist"),
    (("--sources.path", "pets", "--sources.kind", "binary"), 2, "holds folder, not binary"),
    (("--sources.paht", "pets"), 2, "--sources.paht: there is no such key: did you mean --sources.path?"),
    (("--sources.kind", "zip"), 2, "sources.kind: got 'zip'"),
    (("--config-file", "no.yaml"), 2, "no.yaml: No such file"),
    (("--sources.path", "pets", "--beton.train", "pets/train/cat/0.png/x.beton"), 2, "cannot be written")])
def test_mistakes_end_in_one_message_and_nothing_written(tree, keys, status, message):
    before = sorted(tree.rglob("*"))
    got, _, errors = convert(tree, *keys)
    assert got == status and message in errors and "Traceback" not in errors
    assert sorted(tree.rglob("*")) == before


def test_help_lists_every_key(tmp_path):
    status, output, _ = convert(tmp_path, "--help")
    assert status == 0 and "--force" in output and "sources.path  [data]" in output and "evaluate.tta  [flip]" in output


def test_digits_from_the_shipped_recipe(tmp_path):
    status, output, errors = convert(tmp_path, "--config-file", ROOT / "rn_configs/digits.yaml")
    assert status == 0, errors
    assert open_beton(tmp_path / "data/digits_train.beton", classes=10, image_size=32).samples == 1442


def test_real_cifar10(cifar10_dir, tmp_path):
    status, output, errors = convert(tmp_path, "--config-file", ROOT / "rn_configs/se94.yaml", "--sources.path", cifar10_dir)
    assert status == 0, errors
    assert "mean 125.31/122.95/113.87, std 62.99/62.09/66.70" in output
    assert open_beton(tmp_path / "data/cifar10_test.beton", verify="full").samples == 10000


@pytest.mark.parametrize("target, source", [("a.npz", "pets"), ("a.npz", "a.npz"), ("photo.jpg", "pets"), ("link.beton", "a.npz")])
def test_no_file_of_the_users_own_is_written_over(tree, target, source):
    """Who takes beton.train for what is read, such as an .npz file."""
    np.savez(tree / "a.npz", x=np.arange(30 * 48, dtype=np.uint8).reshape(30, 4, 4, 3), y=np.arange(30) % 3)
    (tree / "photo.jpg").write_bytes(b"mine")
    (tree / "link.beton").symlink_to(tree / "a.npz")
    before = {name: (tree / name).read_bytes() for name in ("a.npz", "photo.jpg")}
    status, _, errors = convert(tree, "--sources.path", source, "--beton.train", target, "--beton.test", "test.beton")
    assert status == 2 and f"{target}: is there already, and not of the kind that is written here" in errors
    assert {name: (tree / name).read_bytes() for name in before} == before and not (tree / "test.beton").exists()

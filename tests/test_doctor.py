"""doctor, preview: what a user calls when something does not look right."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import COLOURS, run_module
from seresnet import config, doctor, preview, runtime
from seresnet.beton import open_beton, read_images


def test_what_is_there_is_said(run, tmp_path):
    status, output, errors = run_module("doctor", tmp_path, run[0].parent)
    assert status == 0, errors
    assert "| torch " in output and "train.beton" in output and "240 images of 16 x 16, 3 classes" in output


def test_a_set_is_converted_by_the_recipe_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "why_not_imported", lambda package: "")

    def said(folder):
        return {f.what: f for f in doctor.examine(folder)}["data"]
    pets = tmp_path / "my pets"
    for name in ("cat", "dog"):
        (pets / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(pets / name / "0.png")
    assert "rn_configs/own_images.yaml" in said(pets).mend and f"'{pets}'" in said(pets).mend and "image folder" in said(pets).detail
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose/0.png")
    assert said(tmp_path / "loose").good is None and "0.png is a picture, and a folder is wanted that holds" in said(tmp_path / "loose").detail
    for name, recipe in (("cifar-10-python.tar.gz", "se94.yaml"), ("cifar-100-python.tar.gz", "se95.yaml --beton.train data/cifar100_train.beton")):
        (tmp_path / recipe[:4]).mkdir()
        (tmp_path / recipe[:4] / name).touch()
        assert f"rn_configs/{recipe}" in said(tmp_path / recipe[:4]).mend
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed/c10.tar.gz").touch()
    assert "rn_configs/se94.yaml" in said(tmp_path / "renamed/c10.tar.gz").mend, "archives are CIFAR's, of whatever name"
    (tmp_path / "arrays").mkdir()
    for name in ("a", "b"):
        np.savez(tmp_path / f"arrays/{name}.npz", x=np.zeros(1), y=np.zeros(1))
    assert "holds several data sets: a.npz, b.npz" in said(tmp_path / "arrays").detail


def test_what_is_missing_is_said_with_the_command(run, tmp_path, monkeypatch):
    whole = runtime.is_installed
    monkeypatch.setattr(doctor, "why_not_imported", lambda package: "")
    monkeypatch.setattr(runtime, "is_installed", lambda name: name not in ("ffcv", "fastargs") and whole(name))
    (tmp_path / "x.beton").write_bytes(b"x")
    found = {f.what: f for f in doctor.examine(tmp_path)}
    assert found["fastargs"].good is False and "pip install fastargs" in found["fastargs"].mend
    assert found["ffcv"].good is None and "make setup" in found["ffcv"].mend
    assert found["x.beton"].good is False and "less than a header" in found["x.beton"].detail
    status, output, _ = run_module("doctor", tmp_path, tmp_path)
    assert status == 2 and "MISSING" in output
    empty = {f.what: f for f in doctor.examine(tmp_path / "nowhere")}
    assert empty["data"].good is None and "--sources.kind download" in empty["data"].mend


def test_a_package_that_cannot_be_imported_is_not_there(run, tmp_path, monkeypatch):
    """FFCV without the libraries that it was built with: installed, and of no use."""
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv/__init__.py").write_text("raise ImportError('libturbojpeg.so.0: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runtime, "is_installed", lambda name: name in ("ffcv", "numba"))
    found = {f.what: f for f in doctor.examine(tmp_path)}
    assert found["ffcv"].good is None and "libturbojpeg.so.0: cannot open" in found["ffcv"].detail
    assert "echo again >>.venv/ready && make setup" in found["ffcv"].mend
    assert found["numba"].good and doctor.why_not_imported("json") == ""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setattr(runtime, "is_installed", lambda name: name != "terminaltables")
    found = {f.what: f for f in doctor.examine(tmp_path)}
    assert found["torch"].good is False and "libcudart.so.13: cannot open" in found["torch"].detail and "GPU" not in found
    assert found["terminaltables"].good is False, "fastargs imports it"


@pytest.mark.parametrize("name, value, told", [("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT is set"),
                                               ("NUMBA_THREADING_LAYER", "workqueue", "without OpenMP or TBB")])
def test_a_numba_that_trainings_do_without_is_told(tmp_path, monkeypatch, name, value, told):
    monkeypatch.setattr(runtime, "is_installed", lambda package: package == "numba")
    monkeypatch.setenv(name, value)
    found = {f.what: f for f in doctor.examine(tmp_path)}
    assert found["numba"].good is None and f"cannot be used ({told}); for compiled parts" in found["numba"].detail and found["numba"].mend


@pytest.mark.parametrize("there", [True, False])
def test_triton_is_asked_for_where_there_is_a_gpu(there, tmp_path, monkeypatch):
    machine, installed = runtime.describe_machine(), runtime.is_installed
    monkeypatch.setattr(doctor, "why_not_imported", lambda package: "")    # seconds, and told of elsewhere
    monkeypatch.setattr(runtime, "describe_machine", lambda: {**machine, "gpu": "a GPU"})
    monkeypatch.setattr(runtime, "is_installed", lambda name: there if name == "triton" else installed(name))
    found = {f.what: f for f in doctor.examine(tmp_path)}
    assert found["triton"].good == (there or None) and ("pip install triton" in found["triton"].mend) != there
    monkeypatch.setattr(runtime, "describe_machine", lambda: {key: value for key, value in machine.items() if key != "gpu"})
    assert "triton" not in {f.what for f in doctor.examine(tmp_path)}


def test_what_the_programs_import_may_be_missing(tmp_path):
    """As in a fresh clone: none of the packages can be imported."""
    hide = "import sys; [sys.modules.__setitem__(name, None) for name in sys.argv[1].split(',')]; sys.argv = ['doctor']\n" \
           "from seresnet import doctor, runtime\nruntime.environment_to_activate = str    # none\nruntime.run_program(doctor.main)"
    for names in ("numpy", "yaml", "torch,numpy,fastargs,yaml,PIL,matplotlib"):
        done = subprocess.run([sys.executable, "-c", hide, f"{names},ffcv"], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        for name in names.split(",")[:5]:
            assert f"pip install {name.replace('yaml', 'PyYAML').replace('PIL', 'pillow')}" in done.stdout


def test_a_preview_shows_the_images_and_their_augmentation(run, tmp_path):
    folder = run[0].parent
    keys = ["--beton.train", str(folder / "train.beton"), "--beton.test", str(folder / "test.beton"), "--model.classes", "0",
            "--model.image_size", "0", "--loader.batch_size", "24", "--model.channels", "8"]
    settings, _ = config.parse([*keys, "--augment.flip", "none", "--augment.translate", "0", "--run.precision", "fp32"])
    shown, captions = preview.augmented(settings, 4, 3)
    assert shown.shape == (16, 16, 16, 3) and set(captions) <= {*COLOURS, ""}
    everything = {image.tobytes() for image in read_images(open_beton(folder / "train.beton"))}
    for i in range(0, 16, 4):
        assert shown[i].tobytes() in everything and all(np.array_equal(shown[i], shown[i + k]) for k in (1, 2, 3))
    settings, _ = config.parse([*keys, "--run.precision", "fp16"])    # which a CPU has not
    assert preview.augmented(settings, 1, 1)[0].shape == (2, 16, 16, 3)
    settings, _ = config.parse([*keys, "--augment.flip", "alternating", "--augment.translate", "0", "--run.precision", "fp32"])
    shown, _ = preview.augmented(settings, 4, 2)
    for i in range(0, 12, 3):
        assert {True} == {any(np.array_equal(shown[i + a], view) for a in (1, 2)) for view in (shown[i], shown[i][:, ::-1])}
    status, output, errors = run_module("preview", tmp_path, *keys, "--out", "p.png", "--images", "3", "--loop.epochs", "2",
                                        "--augment.sides", "8,12,16")
    assert status == 0 and "3 images, 2 epochs of each" in output, errors
    status, output, errors = run_module("preview", tmp_path, *keys, "--out", "p.png", "--images", "3")
    assert status == 0, errors
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 1000
    status, _, errors = run_module("preview", tmp_path, *keys, "--out", "p.bmp")
    assert status == 2 and "expected a name that ends in .png" in errors
    status, _, errors = run_module("preview", tmp_path, *keys, "--out", "no/p.png")
    assert status == 2 and "there is no folder no" in errors


@pytest.mark.parametrize("keys, message", [(("--images", "0"), "expected 1 and more"), (("--imges", "3"), "there is no such key")])
def test_a_preview_refuses_what_it_does_not_understand(tmp_path, keys, message):
    status, _, errors = run_module("preview", tmp_path, *keys)
    assert status == 2 and message in errors

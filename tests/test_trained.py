"""trained, predict, inputs: a net from its run folder says the same as in its training, for images in every form."""
import csv
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import seresnet
from conftest import COLOURS as CLASSES
from conftest import in_child, run_module
from seresnet import checkpoint, inputs, report, runtime
from seresnet.beton import write_beton
from seresnet.files import SourceError
from seresnet.imageset import Split
from seresnet.predict import as_csv
from seresnet.runtime import UserError



def predict(cwd, *arguments):
    return run_module("predict", cwd, *arguments)


def test_a_loaded_net_says_what_the_training_said(run):
    folder, test, report = run
    net = seresnet.load(folder, "cpu")
    assert net.classes == CLASSES and net.image_size == 16 and net.epochs_done == 3 and not net.model.training
    for tta, count in (("none", report["correct"]), ("flip", report["correct_tta"])):
        assert int((net.predict(test.images, tta) == test.labels).sum()) == count
    assert net.tta == "flip" and np.array_equal(net.probabilities(test.images), net.probabilities(test.images, "flip"))
    net.tta = "flip_shift"    # as of another recipe
    assert np.array_equal(net.probabilities(test.images), net.probabilities(test.images, "flip_shift"))
    assert not np.array_equal(net.probabilities(test.images), net.probabilities(test.images, "flip"))
    probabilities = net.probabilities(test.images, batch_size=7)
    assert probabilities.shape == (60, 3) and probabilities.dtype == np.float32 and np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert np.allclose(probabilities, net.probabilities(test.images, batch_size=60), atol=2e-2)
    net.config["evaluate"]["batch_size"], seen = 7, []
    hook = net.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert np.array_equal(probabilities, net.probabilities(test.images)) and max(seen) == 7, "the recipe's batches fit into its memory"
    hook.remove()
    assert net.predict(test.images[:0]).shape == (0,)
    best = seresnet.load(folder / "best.pt", "cpu", "fp32")
    assert best.dtype == torch.float32 and best.epochs_done == report["best_epoch"]


def test_a_checkpoint_from_before_a_key_existed_still_loads(run, tmp_path):
    state = checkpoint.load(run[0] / "weights.pt")
    del state["config"]["sources"]["image_size"], state["config"]["model"]["head_pool"], state["config"]["checkpoint"]
    checkpoint.save(tmp_path / "weights.pt", state)
    net = seresnet.load(tmp_path, "cpu")
    assert net.config["sources"]["image_size"] == 0 and np.array_equal(net.predict(run[1].images), seresnet.load(run[0], "cpu").predict(run[1].images))


@pytest.mark.parametrize("images, message", [
    (np.zeros((2, 16, 16, 3)), "float64"), (np.zeros((2, 3, 16, 16), np.uint8), r"\(2, 3, 16, 16\)"),
    (np.zeros((16, 16, 3), np.uint8), "expected uint8"), (np.zeros((2, 32, 32, 3), np.uint8), r"expected uint8 \(N, 16, 16, 3\)")])
def test_images_that_do_not_fit_are_refused(run, images, message):
    net = seresnet.load(run[0], "cpu")
    with pytest.raises(ValueError, match=message):
        net.predict(images)
    with pytest.raises(ValueError, match="tta: got 'twice'"):
        net.predict(run[1].images, "twice")


def test_what_is_no_net_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="holds no trained net .*weights.pt or best.pt"):
        seresnet.load(run[0] / "last.pt", "cpu")
    with pytest.raises(UserError, match="holds no weights.pt: name a run folder"):
        seresnet.load(tmp_path, "cpu")
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match="stopped before the end of its first epoch: go on with --run.resume"):
        seresnet.load(tmp_path, "cpu")
    state = checkpoint.load(run[0] / "weights.pt")
    state["config"]["model"]["channels"] = [16]
    checkpoint.save(tmp_path / "weights.pt", state)
    with pytest.raises(UserError, match="cannot be rebuilt"):
        seresnet.load(tmp_path, "cpu")


@pytest.mark.parametrize("change", [
    lambda s: s["config"]["model"].update(channels=[65536]), lambda s: s["config"]["model"].update(blocks=[10**9]),
    lambda s: s["config"]["model"].update(channels=["x"]), lambda s: s["config"].update(model=3), lambda s: s.update(mean=[float("nan")] * 3),
    lambda s: s.update(std="abc"), lambda s: s.update(classes=["../x", "a", "b"]), lambda s: s.update(classes=["a", "b"]),
    lambda s: s.update(classes=5), lambda s: s["model"].update({"head.bias": torch.zeros(3, 3)}), lambda s: s.update(model=[1])])
def test_a_checkpoint_that_claims_what_it_does_not_hold_is_refused(run, tmp_path, change):
    state = checkpoint.load(run[0] / "weights.pt")
    change(state)
    checkpoint.save(tmp_path / "weights.pt", state)
    started = time.perf_counter()
    with pytest.raises(UserError, match="weights.pt: its net cannot be rebuilt"):
        seresnet.load(tmp_path, "cpu")
    assert time.perf_counter() - started < 5


# -- inputs -------------------------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(5).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
SMOOTH = (np.indices((32, 32)).sum(0)[None, :, :, None] * 2 + np.random.default_rng(6).integers(0, 100, (12, 1, 1, 3))).astype(np.uint8)
ROWS = SMOOTH.transpose(0, 3, 1, 2).reshape(12, 3072)
IDS = [f"image {i}" for i in range(12)]


def as_pickle(content, protocol=2):
    return lambda path: path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("name, write, ids, images", [
    ("rows.pkl", as_pickle({b"data": ROWS}), None, SMOOTH),
    ("rows", as_pickle({"data": ROWS, "ids": IDS}, 5), IDS, SMOOTH),
    ("python2", as_pickle({b"data": ROWS, b"ids": [name.encode() for name in IDS]}, 0), IDS, SMOOTH),
    ("pixels.pickle", as_pickle({"data": IMAGES, "ids": np.arange(5, 17)}), [str(i) for i in range(5, 17)], IMAGES),
    ("array.pkl", as_pickle(IMAGES), None, IMAGES),
    ("words.pkl", as_pickle({"data": ROWS, "ids": np.array(IDS)}, 4), IDS, SMOOTH),
    ("bytes.pkl", as_pickle({"data": ROWS, "ids": np.array(IDS, "S")}, 0), IDS, SMOOTH),
    ("planes.pkl", as_pickle({"data": np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)}, 5), None, IMAGES),
    ("scalars.pkl", as_pickle({"data": ROWS, "ids": list(np.arange(5, 17, dtype=">i4"))}, 2), [str(i) for i in range(5, 17)], SMOOTH),
    ("columns.pkl", as_pickle({"data": np.asfortranarray(ROWS), "ids": np.arange(5, 17, dtype=">i4")}, 5), [str(i) for i in range(5, 17)], SMOOTH),
    ("planes.npy", lambda path: np.save(path, IMAGES.transpose(0, 3, 1, 2)), None, IMAGES),
    ("grey.npy", lambda path: np.save(path, IMAGES[..., 0]), None, np.repeat(IMAGES[..., :1], 3, axis=3)),
    ("set.npz", lambda path: np.savez(path, x=IMAGES, ids=np.array(IDS)), IDS, IMAGES),
    ("cifar10.bin", lambda path: np.concatenate([np.zeros((12, 1), np.uint8), ROWS], 1).tofile(path), None, SMOOTH),
    ("cifar100.bin", lambda path: np.concatenate([np.zeros((12, 2), np.uint8), ROWS], 1).tofile(path), None, SMOOTH),
    ("PLAIN.BIN", lambda path: ROWS.tofile(path), None, SMOOTH),
    ("alone.NPZ", lambda path: np.savez(open(path, "wb"), IMAGES), None, IMAGES),
    ("named.npz", lambda path: np.savez(path, X_test=IMAGES, ID=np.arange(5.0, 17)), [str(i) for i in range(5, 17)], IMAGES)])
def test_files_of_images(tmp_path, name, write, ids, images):
    write(tmp_path / name)
    found = inputs.read_unlabelled(tmp_path / name, 32)
    assert found.ids == (ids or [str(i) for i in range(12)]) and np.array_equal(found.images, images)


def test_a_beton_and_a_folder(tmp_path):
    write_beton(tmp_path / "x.beton", Split(IMAGES, np.arange(12) % 2), classes=("a", "b"), name="x", source="x", fingerprint="f")
    assert np.array_equal(inputs.read_unlabelled(tmp_path / "x.beton", 32).images, IMAGES)
    for i in range(12):
        Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    shown = []
    found = inputs.read_unlabelled(tmp_path, 32, watch=lambda items, total: shown.append(total) or items)
    assert found.ids == [str(i) for i in range(12)] and shown == [12], "2 before 10"
    assert np.array_equal(found.images, IMAGES)
    assert inputs.read_unlabelled(tmp_path / "7.png", 32).ids == ["7"] and not found.left_out
    (tmp_path / ".thumbnails").mkdir()
    for name in ("._7.png", ".thumbnails/9.png", "8.webp", ".8.webp"):    # what macOS leaves beside a file; a format that we do not read
        (tmp_path / name).write_bytes(b"x")
    again = inputs.read_unlabelled(tmp_path, 32)
    assert again.ids == found.ids and "left out: 1 pictures" in again.left_out and "8.webp" in again.left_out
    with pytest.raises(SourceError, match="0.png: has images of 32 x 32 pixels, the net takes 16 x 16: give --fit"):
        inputs.read_unlabelled(tmp_path, 16)
    assert inputs.read_unlabelled(tmp_path, 16, "crop").images.shape == (12, 16, 16, 3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "7.png").rename(tmp_path / "sub" / "7.png")
    assert inputs.read_unlabelled(tmp_path, 32).ids[-1] == "sub/7"
    (tmp_path / "2.png").rename(tmp_path / "007.png")    # by their number, not by their length
    assert inputs.read_unlabelled(tmp_path, 32).ids[5:8] == ["6", "007", "8"]
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    (tmp_path / "elsewhere/deeper/linked").symlink_to(tmp_path / "sub")
    assert "left out: 1 pictures" in (told := inputs.read_unlabelled(tmp_path, 32).left_out)
    assert f"and what is behind 1 links to folders, such as {tmp_path / 'elsewhere/deeper/linked'}" in told
    with pytest.raises(SourceError, match="elsewhere: holds no .* files .left out: what is behind 1 links"):
        inputs.read_unlabelled(tmp_path / "elsewhere", 32)
    (tmp_path / "else.png").mkdir()    # a folder, whatever it is called
    assert len(inputs.read_unlabelled(tmp_path, 32).ids) == 12
    Image.fromarray(IMAGES[0]).save(tmp_path / "3.jpg")
    with pytest.raises(SourceError, match="1 ids more than once, such as '3': .* with --suffix"):
        inputs.read_unlabelled(tmp_path, 32)


def test_what_was_done_to_images_of_another_size_is_told(tmp_path):
    for name, size in (("0.png", (20, 30)), ("1.png", (16, 16)), ("2.jpg", (50, 40)), ("3.png", (45, 20))):
        Image.new("RGB", size).save(tmp_path / name)
    assert inputs.read_unlabelled(tmp_path, 16, "crop").fitted == (
        "images of 20 x 30 to 50 x 40 pixels were brought to 16 x 16 by crop (--fit none refuses them)")
    assert "images of 45 x 20 pixels were brought to 16 x 16 by resize" in inputs.read_unlabelled(tmp_path / "3.png", 16, "resize").fitted
    assert inputs.read_unlabelled(tmp_path / "1.png", 16, "resize").fitted == ""
    np.save(tmp_path / "x.npy", IMAGES)
    assert "images of 32 x 32 pixels were" in inputs.read_unlabelled(tmp_path / "x.npy", 16, "resize").fitted
    assert inputs.read_unlabelled(tmp_path / "x.npy", 32, "resize").fitted == ""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become somebody else")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith(("pytest", "popen", "test")):
            os.chmod(parent, 0o755)
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    (tmp_path / "private").mkdir(mode=0)
    assert "private: Permission denied: make it readable" in in_child(lambda: inputs.read_unlabelled(tmp_path, 32).ids, 65534)
    (tmp_path / "private").rmdir()
    assert in_child(lambda: inputs.read_unlabelled(tmp_path, 32).ids, 65534) == "['0']"


def test_what_the_memory_does_not_hold_is_not_read(tmp_path, monkeypatch):
    write_beton(tmp_path / "x.beton", Split(IMAGES, np.arange(12) % 2), classes=("a", "b"), name="x", source="x", fingerprint="f")
    ROWS.tofile(tmp_path / "x.bin")
    monkeypatch.setattr(runtime, "free_memory_of_machine", lambda: ROWS.nbytes - 1)
    for name in ("x.beton", "x.bin"):
        with pytest.raises(SourceError, match="the images take 0 MiB of memory, 0 MiB are free: predict them in parts"):
            inputs.read_unlabelled(tmp_path / name, 32)
    np.save(tmp_path / "x.npy", IMAGES[:, :16, :16])
    with pytest.raises(SourceError, match="the images take 0 MiB of memory, 0 MiB are free: predict them in parts"):
        inputs.read_unlabelled(tmp_path / "x.npy", 32, "resize")


@pytest.mark.skipif(os.name != "posix", reason="links want rights elsewhere")
def test_links_to_folders_are_not_followed(tmp_path):
    """They may lead to all of a disk, in a circle, or to the same pictures twice."""
    for folder in ("images", "elsewhere"):
        (tmp_path / folder).mkdir()
        Image.fromarray(IMAGES[0]).save(tmp_path / folder / "1.png")
    (tmp_path / "images/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/back").symlink_to(tmp_path)
    assert inputs.read_unlabelled(tmp_path / "images", 32).ids == ["1"]


def foreign_member(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images", b"no array")


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name, write, message", [
    ("x.pkl", as_pickle({"data": ROWS[:, :3000]}), r"has the shape \(12, 3000\)"),
    ("x.pkl", as_pickle({"data": ROWS.astype(np.float32)}), "is float32"),
    ("x.pkl", as_pickle({"data": ROWS, "ids": IDS[:5]}), "12 images and 5 ids"),
    ("x.pkl", as_pickle({"data": ROWS, "ids": ["a"] * 12}), "11 ids|1 ids more than once"),
    ("x.pkl", as_pickle({"labels": [1]}), "holds 'labels', expected an array of images"),
    ("x.pkl", as_pickle([1, 2]), "holds a list"),
    ("x.pkl", as_pickle({"data": SMOOTH.reshape(12, 3072)}), "side by side, expected all red values"),
    ("x.pkl", as_pickle({"data": np.repeat(IMAGES[..., :1], 3, axis=3).reshape(12, 3072)}), "side by side, expected all red values"),
    ("x.pkl", as_pickle({"data": list(IMAGES)}), "data is a list, expected one array of images: numpy.stack"),
    ("x.pkl", as_pickle({"data": ROWS, "ids": np.array(IDS, object)}), "again with .tolist()"),
    ("x.webp", lambda path: path.write_bytes(b"x"), "convert it to PNG or JPEG"),
    ("x.csv", lambda path: path.write_bytes(b"x"), "read are folders, .png"),
    ("x.bin", lambda path: path.write_bytes(b"x" * 1000), "1000 bytes, which is no multiple"),
    ("x.npy", lambda path: path.write_bytes(b"x"), "no readable .npy"),
    ("x.npy", lambda path: np.save(path, IMAGES[0]), r"one image or several grey ones: .*one as images\[None\]"),
    ("x.npy", lambda path: np.save(path, IMAGES[0].transpose(2, 0, 1)), "one image or several grey ones"),
    ("x.npz", lambda path: foreign_member(path), "images in it is no array"),
    ("x.npz", lambda path: np.savez(path, images=IMAGES, Images=IMAGES, IDS=IDS, ids=IDS), "holds (Images and images|IDS and ids), which differ in capitals alone"),
    ("x.npy", lambda path: np.save(path, np.zeros((2, 40, 40, 3), np.uint8)), "40 x 40 pixels, the net takes 32 x 32"),
    ("x.npy", lambda path: np.save(path, IMAGES[:0]), "holds no images"),
    ("x.npy", lambda path: np.save(path, np.array([{}], object)), "do not trust this file"),
    ("x.beton", lambda path: path.write_bytes(b"x"), "less than a header"), ("nowhere", lambda path: None, "does not exist")])
def test_bad_inputs_are_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        inputs.read_unlabelled(tmp_path / name, 32)


def test_a_pickle_with_a_payload_is_refused_and_nothing_is_run(tmp_path):
    created = tmp_path / "created"
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"data": Payload(str(created))}))
    with pytest.raises(SourceError, match="do not trust this file"):
        inputs.read_unlabelled(tmp_path / "x.pkl", 32)
    assert not created.exists()


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_a_name_that_is_no_text_keeps_its_bytes(run, tmp_path):
    folder, test, _ = run
    (tmp_path / "images").mkdir()
    for i, name in enumerate((b"caf\xe9.png", b"plain.png")):
        with open(os.path.join(os.fsencode(tmp_path), b"images", name), "wb") as file:
            Image.fromarray(test.images[i]).save(file, "PNG")
    status, _, errors = predict(tmp_path, "--checkpoint", folder, "--images", "images", "--out", "p.csv")
    assert status == 0, errors
    assert sorted(line.partition(b",")[0] for line in (tmp_path / "p.csv").read_bytes().splitlines()[1:]) == [b"caf\xe9", b"plain"]


@pytest.mark.parametrize("device, precision, message", [("gpu", "auto", "device: got 'gpu', expected auto"), ("cpu", "half", "precision: got 'half'"),
                                                        ("cpu", "fp16", "fp16 needs a GPU")])
def test_a_device_or_format_that_there_is_not_is_named(run, device, precision, message):
    with pytest.raises(UserError, match=message):
        seresnet.load(run[0], device, precision)


# -- the program --------------------------------------------------------------------------------------------------------

def test_the_csv_has_every_id_once_in_order():
    text = as_csv(["b", "a,1"], np.array([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]), CLASSES, names=False, proba=False)
    assert text == 'ID,Labels\nb,1\n"a,1",0\n'
    rows = list(csv.reader(as_csv(["b", "a"], np.array([[0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]), CLASSES, names=True, proba=True).splitlines()))
    assert rows[0] == ["ID", "Labels", *CLASSES] and rows[2] == ["a", "emu, tall", "0.100000", "0.200000", "0.700000"]


def test_predictions_to_hand_in(run, tmp_path):
    folder, test, _ = run
    (tmp_path / "hidden").write_bytes(pickle.dumps({b"data": test.images, b"ids": list(range(100, 160))}, protocol=2))
    status, output, errors = predict(tmp_path, "--checkpoint", folder, "--images", "hidden", "--out", "p.csv")
    assert status == 0, errors
    assert "60 images in" in output and "images/s" in output
    rows = list(csv.reader((tmp_path / "p.csv").read_text().splitlines()))
    assert rows[0] == ["ID", "Labels"] and [row[0] for row in rows[1:]] == [str(i) for i in range(100, 160)]
    expected = seresnet.load(folder).predict(test.images)
    assert [int(row[1]) for row in rows[1:]] == expected.tolist()
    status, _, errors = predict(tmp_path, "--checkpoint", folder, "--images", "hidden", "--out", "named.csv", "--header", "id,label")
    assert status == 0 and (tmp_path / "named.csv").read_text() == (tmp_path / "p.csv").read_text().replace("ID,Labels", "id,label"), errors
    status, output, errors = predict(tmp_path, "--checkpoint", folder, "--images", "hidden", "--out", "-", "--header", "ID, Labels")
    assert status == 0 and output == (tmp_path / "p.csv").read_text() and "60 images in" in errors


def test_a_net_that_is_not_trained_to_its_end_is_told_as_such(run, tmp_path):
    state = checkpoint.load(run[0] / "weights.pt")
    checkpoint.save(tmp_path / "weights.pt", {**state, "epochs_done": 2})
    np.save(tmp_path / "x.npy", run[1].images)
    for folder, told in ((tmp_path, True), (run[0], False)):
        status, output, errors = predict(tmp_path, "--checkpoint", folder, "--images", "x.npy", "--out", "p.csv")
        assert status == 0 and ("weights.pt after 2 of 3 epochs" in output) == told and ("after" in output) == told, errors


def test_ids_keep_their_suffix_where_that_is_asked_for(run, tmp_path):
    """As some competitions have them; and two pictures that differ in it alone are two."""
    (tmp_path / "new/more").mkdir(parents=True)
    for i, name in enumerate(("10.png", "2.png", "2.jpg", "more/a.PNG")):
        Image.fromarray(run[1].images[i]).save(tmp_path / "new" / name)
    keys = ("--checkpoint", run[0], "--out", "p.csv", "--images")
    status, _, errors = predict(tmp_path, *keys, "new")
    assert status == 2 and "ids more than once, such as '2'" in errors
    status, _, errors = predict(tmp_path, *keys, "new", "--suffix")
    assert status == 0, errors
    assert [line.partition(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()] == ["ID", "2.jpg", "2.png", "10.png", "more/a.PNG"]
    status, _, errors = predict(tmp_path, *keys, "new/2.jpg", "--suffix")
    assert status == 0 and (tmp_path / "p.csv").read_text().splitlines()[1].startswith("2.jpg,"), errors


@pytest.mark.skipif(os.name != "posix", reason="links want rights elsewhere")
def test_a_link_to_a_file_stays_one(run, tmp_path):
    np.save(tmp_path / "x.npy", run[1].images)
    (tmp_path / "there").mkdir()
    (tmp_path / "p.csv").symlink_to("there/real.csv")
    status, _, errors = predict(tmp_path, "--checkpoint", run[0], "--images", "x.npy", "--out", "p.csv")
    assert status == 0 and (tmp_path / "p.csv").is_symlink() and (tmp_path / "there/real.csv").read_text().startswith("ID,"), errors


@pytest.mark.parametrize("name", ["hidden", "hidden.pkl", "weights.pt", "other.pt", "1.png", "2.jpeg", "x.beton", "x.beton.json", "README.md"])
def test_predictions_take_the_place_of_no_data_and_no_net(run, tmp_path, name):
    (tmp_path / "hidden").write_bytes(pickle.dumps({b"data": run[1].images}, protocol=2))
    if name != "hidden":
        (tmp_path / name).write_bytes(b"mine")
    before = (tmp_path / name).read_bytes()
    keys = ("--checkpoint", run[0], "--images", "hidden", "--out")
    status, _, errors = predict(tmp_path, *keys, name)
    assert status == 2 and f"{name}: is there already, and not of the kind" in errors and (tmp_path / name).read_bytes() == before


def test_what_is_written_again_takes_its_own_place(tmp_path):
    for name, kinds in (("p.csv", ()), ("runs.png", (".png",)), ("model.torchscript.pt", (".pt",)), ("p", ())):
        (tmp_path / name).touch()
        report.check_writable(tmp_path / name, tmp_path / "nowhere", tmp_path, kinds=kinds)
    (tmp_path / "best.pt").touch()
    with pytest.raises(UserError, match="best.pt: is there already"):
        report.check_writable(tmp_path / "best.pt", kinds=(".pt",))


@pytest.mark.parametrize("change, message", [
    (("--images", "nowhere"), "does not exist"), (("--out", os.devnull), "is no regular file"), (("--device", "gpu"), "expected auto"),
    (("--out", "/dev/stdout"), "is no regular file"), (("--device", "cuda:99"), "error: device: cuda:99 is not there"),
    (("--checkpoint", "nowhere"), "cannot be read"),
    (("--out", "no/where.csv"), "there is no folder no"), (("--out", "."), "is a folder"), (("--batch-size", "-1"), "got -1"),
    (("--header", "label"), "expected two names"), (("--header", "id,"), "expected two names")])
def test_mistakes_end_in_one_message_and_nothing_written(run, tmp_path, change, message):
    np.save(tmp_path / "x.npy", run[1].images)
    keys = {"--checkpoint": run[0], "--images": "x.npy", "--out": "p.csv", **dict([change])}
    status, _, errors = predict(tmp_path, *[word for pair in keys.items() for word in pair])
    assert status == 2 and message in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]

"""evaluate: views are averaged before the decision, every sample counts once, against one-by-one arithmetic."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import COLOURS, run_module
from seresnet import config
from seresnet.augment import normalise
from seresnet.beton import write_beton
from seresnet.evaluate import evaluate, main, measure
from seresnet.runtime import UserError
from seresnet.sources import find_source
from seresnet.tta import VIEWS

MEAN, STD = (120.0, 121.0, 122.0), (60.0, 61.0, 62.0)
CPU = torch.device("cpu")


class Net(nn.Module):
    """Small, not symmetric under flips, and different in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 6 * 6, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.dropout(x.flatten(1)))


def images_and_labels(count):
    generator = torch.Generator().manual_seed(1)
    storage = torch.randint(0, 256, (count, 6, 6, 3), dtype=torch.uint8, generator=generator)
    return storage.permute(0, 3, 1, 2), torch.randint(0, 4, (count,), generator=generator)


def in_batches(images, labels, size):
    for i in range(0, len(images), size):
        yield SimpleNamespace(images=images[i:i + size], labels=labels[i:i + size])


def run(net, images, labels, size, tta, samples=None):
    return evaluate(net, in_batches(images, labels, size), samples=samples or len(images), mean=MEAN, std=STD, tta=tta,
                    dtype=torch.float32, device=CPU)


def test_words_of_the_config_are_the_views():
    assert config.Evaluate.__dataclass_fields__["tta"].metadata["limits"]["one_of"] == tuple(VIEWS)


@pytest.mark.parametrize("count, size", [(1, 64), (7, 3), (100, 64), (513, 64)])
def test_flip_averages_probabilities_and_counts_each_sample_once(count, size):
    net = Net().train()
    images, labels = images_and_labels(count)
    result = run(net, images, labels, size, "flip")
    assert net.training, "the mode was not put back"
    net.eval()
    correct = {"plain": 0, "tta": 0}
    loss = {"plain": 0.0, "tta": 0.0}
    with torch.no_grad():
        for image, label in zip(images, labels):
            x = normalise(image[None], MEAN, STD, torch.float32)
            p = {"plain": net(x).softmax(1)[0]}
            p["tta"] = (p["plain"] + net(x.flip(3)).softmax(1)[0]) / 2
            for kind in p:
                correct[kind] += int(p[kind].argmax()) == int(label)
                loss[kind] -= float(p[kind][label].log())
    for kind, totals in (("plain", result.plain), ("tta", result.tta)):
        assert (totals.correct, totals.seen) == (correct[kind], count)
        assert totals.loss == pytest.approx(loss[kind] / count, rel=1e-4)


def test_without_views_both_results_are_the_same():
    images, labels = images_and_labels(50)
    result = run(Net(), images, labels, 16, "none")
    assert result.plain.correct == result.tta.correct and result.plain.loss == pytest.approx(result.tta.loss)


def test_a_missing_or_repeated_sample_is_an_error():
    images, labels = images_and_labels(20)
    for samples in (19, 21):
        with pytest.raises(RuntimeError, match=f"evaluated 20 samples, the split has {samples}"):
            run(Net(), images, labels, 8, "flip", samples=samples)


def test_the_mode_is_put_back_after_an_error():
    net = Net().train()
    with pytest.raises(RuntimeError):
        run(net, torch.zeros(2, 3, 5, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2, "none")
    assert net.training


# -- a trained net on a labelled set ------------------------------------------------------------------------------------

def test_measures_are_those_of_scikit_learn():
    from sklearn import metrics
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet([0.5] * 4, 500), rng.integers(0, 4, 500)
    found, predicted = measure(probabilities, labels), probabilities.argmax(1)
    assert found["accuracy"] == metrics.accuracy_score(labels, predicted)
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, probabilities))
    assert np.array_equal(found["confusion"], metrics.confusion_matrix(labels, predicted))
    assert np.allclose(found["recall"], metrics.recall_score(labels, predicted, average=None))
    assert np.allclose(found["precision"], metrics.precision_score(labels, predicted, average=None))


def test_calibration_error_against_arithmetic():
    # Ten predictions at 0.75 of which 6 are right, ten at 0.95 of which all are.
    probabilities = np.array([[0.75, 0.25]] * 10 + [[0.95, 0.05]] * 10)
    labels = np.array([0] * 6 + [1] * 4 + [0] * 10)
    assert measure(probabilities, labels)["calibration_error"] == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)


def test_a_class_without_samples_has_no_recall():
    found = measure(np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), np.array([0, 1]))
    assert np.isnan(found["recall"][2]) and np.isnan(found["precision"][2])


def test_the_program_tells_what_a_net_does(run, tmp_path):
    folder, test, outcome = run
    (tmp_path / "shift.png").write_text("a user's own")
    status, _, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", folder.parent / "test.beton", "--out", ".")
    assert status == 0 and (tmp_path / "shift.png").read_text() == "a user's own", errors
    status, _, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", folder.parent / "test.beton", "--out", ".")
    assert status == 0 and (tmp_path / "shift.png").read_text() == "a user's own", "the earlier evaluation had not made it"
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", folder.parent / "test.beton", "--shift",
                                        "--out", "told", "--batch-size", "7")
    assert status == 0, errors
    assert f"accuracy {outcome['accuracy_tta']:.2%}" in output and "emu, tall" in output and "| noise" in output
    told = json.loads((tmp_path / "told/evaluation.json").read_text())
    assert told["epochs_done"] == 3 and told["accuracy"] == outcome["accuracy_tta"] and np.array(told["confusion"]).sum() == 60
    assert set(told["shift"]) == {"noise", "blur", "brightness", "contrast", "jpeg", "pixelation"}
    assert {path.name for path in (tmp_path / "told").iterdir()} >= {"evaluation.json", "confusion.png", "shift.png"}
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", folder.parent / "test.beton", "--out", "told")
    assert status == 0 and json.loads((tmp_path / "told/evaluation.json").read_text())["shift"] == told["shift"], "of the same net and images it stays"
    assert (tmp_path / "told/shift.png").exists()
    (tmp_path / "told/notes.txt").write_text("a user's own")
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder / "best.pt", "--data", folder.parent / "test.beton",
                                        "--out", "told")
    assert status == 0, errors
    assert not (tmp_path / "told/shift.png").exists() and (tmp_path / "told/notes.txt").exists(), "what was of the other evaluation is gone"
    assert "shift.png" not in output.splitlines()[-1] and "notes.txt" not in output.splitlines()[-1]


def test_who_stops_reading_finds_the_files_nevertheless(run, tmp_path, monkeypatch):
    """As with `| head -2`: the first lines come at once, and what follows them behind the files."""
    lines = []

    def say(text):
        if lines:
            raise BrokenPipeError
        lines.append(text)
    monkeypatch.setattr("seresnet.report.say", say)
    monkeypatch.setattr("sys.argv", ["evaluate", "--checkpoint", str(run[0]), "--data", str(run[0].parent / "test.beton"), "--out", str(tmp_path)])
    with pytest.raises(BrokenPipeError):
        main()
    assert f"accuracy {run[2]['accuracy_tta']:.2%}" in lines[0]
    assert {path.name for path in tmp_path.iterdir()} >= {"evaluation.json", "confusion.png"}


@pytest.mark.parametrize("fails", [
    "seresnet.report.write_text", "seresnet.evaluate.measure_shift", "seresnet.pictures.draw_sheet", "seresnet.pictures.draw_confusion"])
def test_what_was_found_is_told_though_it_cannot_be_kept(run, tmp_path, monkeypatch, capsys, fails):
    def full(*_, **__):
        raise UserError("no space")
    monkeypatch.setattr(fails, full)
    if fails.endswith("sheet"):
        monkeypatch.setattr("numpy.flatnonzero", lambda found: np.arange(3))    # there are mistakes to be drawn
    monkeypatch.setattr("sys.argv", ["evaluate", "--checkpoint", str(run[0]), "--data", str(run[0].parent / "test.beton"), "--out", str(tmp_path),
                                     *(["--shift"] if fails.endswith("shift") else [])])
    with pytest.raises(UserError, match="no space"):
        main()
    assert "| true " in capsys.readouterr().out and (tmp_path / "evaluation.json").exists() == (not fails.endswith("text"))


@pytest.mark.parametrize("split, kept, told", [("train", "environment", 1), ("train", "report", 1), ("test", "environment", 0)])
def test_images_that_were_trained_on_are_told_as_such(split, kept, told, run, tmp_path):
    """By a run that was stopped, too, which has no report; and by one of an earlier version, whose report alone said it."""
    (tmp_path / "run").mkdir()
    for name in ("weights.pt", f"{kept}.json"):
        shutil.copy(run[0] / name, tmp_path / "run")
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", "run", "--data", run[0].parent / f"{split}.beton", "--out", "told")
    assert status == 0 and output.count("which the net was trained on") == told, errors


def test_a_folder_of_images_of_other_sizes_is_fitted(run, tmp_path):
    """With the option that this program has; what is trained on is known by it, and pictures that are passed over are told."""
    from PIL import Image
    folder, test, outcome = run
    for i, (label, name) in enumerate((*enumerate(COLOURS), *enumerate(COLOURS))):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.images[test.labels == label][0]).resize((32, 32 + i), 0).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set" / COLOURS[0] / "photo.webp").touch()
    keys = ("--checkpoint", folder, "--data", "set", "--split", "all")
    status, _, errors = run_module("evaluate", tmp_path, *keys)
    assert status == 2 and "bring all to one size with --fit resize or --fit crop" in errors
    status, output, errors = run_module("evaluate", tmp_path, *keys, "--fit", "resize")
    assert status == 0 and "all of it (left out: 1 pictures" in output and "6 images in" in output, errors
    for name in COLOURS:
        for i, file in enumerate(sorted((tmp_path / "set" / name).glob("*.png"))):
            Image.open(file).resize((32, 32), 0).save(file) if i == 0 else file.unlink()
    status, _, errors = run_module("evaluate", tmp_path, *keys, "--fit", "none")
    assert status == 2 and "has images of 32 x 32 pixels, the net takes 16 x 16: give --fit resize or --fit crop" in errors
    beton = find_source(tmp_path / "set", for_training=False).read()
    write_beton(tmp_path / "large.beton", beton.test, classes=beton.classes, name="large", source="a test", fingerprint="f")
    for fit, told in (("auto", "give --fit resize or --fit crop"), ("resize", "")):
        status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "large.beton", "--fit", fit)
        assert (status == 0) == (not told) and told in errors
    shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("evaluation"))
    (tmp_path / "moved/environment.json").write_text(json.dumps({"data": {"fingerprint": find_source(tmp_path / "set").fingerprint()}}))
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", "moved", *keys[2:], "--fit", "crop")
    assert status == 0 and "with the images that the net was trained on" in output, errors


def test_a_folder_of_images_will_do(run, tmp_path):
    from PIL import Image
    folder, test, outcome = run
    for split in ("train", "test"):
        for label, name in enumerate(COLOURS):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in np.flatnonzero(test.labels == label):
                Image.fromarray(test.images[i]).save(tmp_path / "set" / split / name / f"{i}.png")
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "set", "--out", "told")
    assert status == 0 and f"accuracy {outcome['accuracy_tta']:.2%}" in output, errors
    status, output, _ = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "set", "--split", "all", "--out", "told")
    assert status == 0 and "all of it: 120 images" in output and "was trained on" not in output
    shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("evaluation"))
    here = json.dumps({"data": {"fingerprint": find_source(tmp_path / "set").fingerprint()}})
    (tmp_path / "moved/environment.json").write_text(here)
    for split, told in (("all", 1), ("test", 0)):
        status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", "moved", "--data", "set", "--split", split, "--out", "told")
        assert status == 0 and output.count("with the images that the net was trained on") == told, errors
    (tmp_path / "set/train/cat").rename(tmp_path / "set/train/rat")
    (tmp_path / "set/test/cat").rename(tmp_path / "set/test/rat")
    status, _, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "set", "--out", "again")
    assert status == 2 and "has classes that the net has not (rat), whose 3 are cat, dog, emu, tall: give images" in errors and not (tmp_path / "again").exists()
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "set" / split / "rat")    # a set may lack classes
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "set")
    assert status == 0 and "| cat " in output and f": {(test.labels > 0).sum()} images" in output, errors
    told = json.loads((folder / "evaluation/set/evaluation.json").read_text())
    assert told["accuracy"] > 0.6 and np.array(told["confusion"]).sum(1).tolist() == np.bincount(test.labels[test.labels > 0], minlength=3).tolist()
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "set/test", "--out", "fifth")
    assert status == 0 and "set/test, which has no test split: 20% of each class; --split all takes all: " in output, errors
    shutil.copytree(tmp_path / "set", tmp_path / "other/set")
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "other/set")
    assert status == 0 and str(folder / "evaluation/set-2") in output, errors
    status, output, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "other/set")
    assert status == 0 and str(folder / "evaluation/set-2") in output, "its own folder again"
    assert json.loads((folder / "evaluation/set/evaluation.json").read_text()) == told, "another set's of that name stays"
    (tmp_path / "data").mkdir()
    for name in ("train.beton", "test.beton"):
        shutil.copy(folder.parent / name, tmp_path / "data")
    status, _, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "data")
    assert status == 2 and "holds no data set that we read, but test.beton, train.beton: name one of them" in errors
    status, _, errors = run_module("evaluate", tmp_path, "--checkpoint", folder, "--data", "nowhere")
    assert status == 2 and "error: --data nowhere: does not exist" in errors

"""loop: a small training end to end in this process: what it learns, repeats, refuses and leaves behind."""
import hashlib
import json

import numpy as np
import pytest
import torch

from seresnet import checkpoint, loop
from seresnet.beton import write_beton
from seresnet.config import build
from seresnet.runtime import NonFiniteLoss, UserError
from seresnet.sources import Split

CLASSES = ("dark", "top", "bottom")
SMALL = {"loader.batch_size": 16, "model.blocks": [1, 1], "model.channels": [8], "model.classes": 3,
         "model.image_size": 16, "model.se": "block", "model.se_reduction": 2, "augment.flip": "none",
         "augment.translate": 1, "optim.lr": 0.05, "loop.epochs": 3, "evaluate.batch_size": 32, "run.device": "cpu",
         "report.curves": False}


def stripes(count, seed):
    """Noisy 16x16 images, bright nowhere, above or below: a net learns them in a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 100, (count, 16, 16, 3))
    images[labels == 1, :8] += 100
    images[labels == 2, 8:] += 100
    return Split(images.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("betons")
    for name, count, seed in (("train", 150, 0), ("test", 61, 1)):
        write_beton(folder / f"{name}.beton", stripes(count, seed), classes=CLASSES, name="stripes", source="test",
                    fingerprint="x")
    return {"beton.train": str(folder / "train.beton"), "beton.test": str(folder / "test.beton")}


def train(betons, tmp_path, **changes):
    settings = {**SMALL, **betons, "report.folder": str(tmp_path), **{k.replace("__", "."): v for k, v in changes.items()}}
    config = build(settings, recipe="stripes")
    return loop.fit(config, ["test"])


def folder_of(tmp_path):
    [folder] = tmp_path.iterdir()
    return folder


def weights_hash(folder):
    state = checkpoint.load(folder / "weights.pt")["model"]
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in state.values())).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_and_testifies(betons, tmp_path, precision):
    outcome = train(betons, tmp_path, run__precision=precision)
    assert outcome["accuracy"] > 0.95 and outcome["accuracy_tta"] > 0.95
    folder = folder_of(tmp_path)
    assert folder.name.startswith("stripes-")
    report = json.loads((folder / "report.json").read_text())
    for name in ("accuracy", "accuracy_tta", "parameters", "epochs", "train_seconds", "eval_seconds", "startup_seconds",
                 "total_seconds", "images_per_second", "data_wait_fraction", "seed", "data"):
        assert name in report, name
    assert report["accuracy"] == outcome["accuracy"] == report["correct"] / 61
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines[-1]["steps"] == 3 * (150 // 16)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["test_accuracy"] == report["accuracy"]
    assert 0 <= report["data_wait_fraction"] <= 1
    assert report["train_seconds"] + report["eval_seconds"] + report["startup_seconds"] <= report["total_seconds"] + 0.1


@pytest.mark.parametrize("mode", ["stream", "resident"])
def test_two_runs_with_one_seed_have_equal_weights(betons, tmp_path, mode):
    hashes = []
    for i, seed in enumerate((3, 3, 4)):
        train(betons, tmp_path / str(i), run__seed=seed, loader__mode=mode, loop__epochs=2, augment__cutout=4,
              augment__flip="alternating", model__dropout=0.2)
        hashes.append(weights_hash(folder_of(tmp_path / str(i))))
    assert hashes[0] == hashes[1] != hashes[2]


def test_both_loader_modes_train_the_same_weights(betons, tmp_path):
    for mode in ("stream", "resident"):
        train(betons, tmp_path / mode, loader__mode=mode, loop__epochs=2)
    assert weights_hash(folder_of(tmp_path / "stream")) == weights_hash(folder_of(tmp_path / "resident"))


def test_the_saved_weights_are_the_evaluated_ones(betons, tmp_path):
    outcome = train(betons, tmp_path, evaluate__tta="flip")
    saved = checkpoint.load(folder_of(tmp_path) / "weights.pt")
    config = build(saved["config"])
    model = loop.build_model(config)
    model.load_state_dict(saved["model"])
    data, _ = loop.prepare(config)
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        again = session.evaluate("flip")
    assert again.plain.correct == outcome["correct"] and again.tta.correct == outcome["correct_tta"]
    assert saved["classes"] == list(CLASSES) and saved["epochs_done"] == 3


def test_whitening_is_set_from_training_images_and_never_trained(betons, tmp_path):
    config = build({**SMALL, **betons, "model.stem": "whiten"})
    data, model = loop.prepare(config)
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        before = session.model.stem[0].weight.clone()
        want = torch.from_numpy(stripes(150, 0).images).permute(0, 3, 1, 2)
        got = loop.first_images(data, 150, torch.device("cpu"))
        mean = torch.tensor(data.train.mean)[:, None, None]
        std = torch.tensor(data.train.std)[:, None, None]
        assert torch.allclose(got, (want - mean) / std, atol=1e-5)
        loop.train_epoch(session.model, session.train_batches.epoch(0), **session.parts(0))
        assert torch.equal(session.model.stem[0].weight, before) and before.abs().sum() > 0


def test_the_holdout_is_evaluated_and_not_trained_on(betons, tmp_path):
    outcome = train(betons, tmp_path, evaluate__split="holdout", evaluate__holdout_size=30, beton__test="does/not/exist")
    assert outcome["evaluated"] == 30 and outcome["split"] == "holdout"
    config = build({**SMALL, **betons, "evaluate.split": "holdout", "evaluate.holdout_size": 30})
    data, model = loop.prepare(config)
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        trained = {int(i) for batch in session.train_batches.epoch(0) for i in batch.indices}
        held = {int(i) for batch in session.test_batches.epoch(0) for i in batch.indices}
        assert len(held) == 30 and not trained & held and session.train_batches.samples == 120
        assert np.bincount(data.train.labels[sorted(held)]).tolist() == [10, 10, 10]


def test_evaluation_every_other_epoch_does_not_change_the_result(betons, tmp_path):
    train(betons, tmp_path / "a", evaluate__every=0)
    train(betons, tmp_path / "b", evaluate__every=1)
    lines = [json.loads(line) for line in (folder_of(tmp_path / "a") / "log.jsonl").read_text().splitlines()]
    assert [line["test_accuracy"] is None for line in lines] == [True, True, False]
    assert weights_hash(folder_of(tmp_path / "a")) == weights_hash(folder_of(tmp_path / "b"))


def test_divergence_stops_with_epoch_and_step_and_keeps_the_last_good_weights(betons, tmp_path, monkeypatch):
    whole = loop.train_batch

    def poisoned(images, indices, epoch, **settings):
        batch = whole(images, indices, epoch, **settings)
        if epoch == 1:
            poisoned.steps += 1
            if poisoned.steps == 4:
                batch = batch * float("nan")
        return batch
    poisoned.steps = 0
    monkeypatch.setattr(loop, "train_batch", poisoned)
    with pytest.raises(NonFiniteLoss, match="not finite in epoch 2, step 4 of 9, at learning rate 0.0"):
        train(betons, tmp_path)
    saved = checkpoint.load(folder_of(tmp_path) / "weights.pt")
    assert saved["epochs_done"] == 1
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert not (folder_of(tmp_path) / "report.json").exists()


def test_an_absurd_learning_rate_ends_in_the_same_error(betons, tmp_path):
    with pytest.raises(NonFiniteLoss, match="Try a smaller optim.lr"):
        train(betons, tmp_path, optim__lr=1e30, optim__schedule="constant")


def test_all_problems_are_reported_before_anything_is_written(betons, tmp_path):
    with pytest.raises(UserError) as caught:
        train(betons, tmp_path / "runs", beton__train="no/such.beton", model__max_parameters=100, model__classes=7)
    text = str(caught.value)
    assert "no/such.beton" in text and "model.max_parameters: this net has" in text and "the budget is 100" in text
    assert "7" in text and not (tmp_path / "runs").exists()


def test_an_explicit_run_folder_is_used_and_not_shared(betons, tmp_path):
    train(betons, tmp_path / "unused", run__folder=str(tmp_path / "mine"), loop__epochs=1)
    assert (tmp_path / "mine" / "report.json").exists()
    with pytest.raises(UserError, match="mine"):
        train(betons, tmp_path / "unused", run__folder=str(tmp_path / "mine"), loop__epochs=1)

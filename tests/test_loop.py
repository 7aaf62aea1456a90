"""loop: a small training end to end in this process: what it learns, repeats, refuses and leaves behind."""
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seresnet import checkpoint, config, loop, report, runtime, trained
from seresnet.augment import PADDINGS
from seresnet.beton import open_beton, read_images, write_beton
from seresnet.config import build
from seresnet.optim import average_weights
from seresnet.runtime import Interrupted, Launch, NonFiniteLoss, UserError
from seresnet.imageset import Split
from test_config import mappings, valid

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_optimizer_is_fused_where_no_scaler_may_skip_its_steps(betons, monkeypatch, dtype):
    monkeypatch.setattr("seresnet.runtime.pick_dtype", lambda *_: dtype)
    config, data, model = loop.prepare(build({**SMALL, **betons}))
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        assert session.optimizer.defaults["fused"] == (not session.scaler.is_enabled()) == (dtype != torch.float16)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_and_the_optimizers_buffers_lie_in_memory_as_their_parameters_do(betons, name, precision):
    """torch's fused kernels on a CPU go through memory without a look at strides."""
    config, data, model = loop.prepare(build({**SMALL, **betons, "optim.name": name, "run.precision": precision}))
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        def check():
            looked_at = 0
            for parameter in session.model.parameters():
                buffers = [value for value in session.optimizer.state[parameter].values() if value.shape == parameter.shape]
                for other in (parameter.grad, *buffers):
                    if other is not None:
                        assert other.stride() == parameter.stride(), parameter.shape
                        looked_at += parameter.dim() == 4
                assert buffers
            return looked_at

        parts = session.model, session.optimizer, session.scaler, session.generator
        for epoch in range(2):
            loop.train_epoch(session.model, session.batches(epoch), after_step=lambda *_: check(), **session.parts(epoch))
            saved = checkpoint.unpack(checkpoint.pack(checkpoint.training_state(*parts)))
            checkpoint.restore_training_state(saved, *parts)
            assert check() > 5


@pytest.mark.parametrize("changes", [
    {}, {"model__downsample": "pool", "model__stem": "whiten", "model__activation": "gelu", "optim__name": "muon", "loop__hardest": [1, 0.5]}])
def test_a_compiled_net_is_traced_whole_and_trains_as_the_plain_one(betons, tmp_path, monkeypatch, changes):
    """By torch's tracer, without the compiler behind it: that takes a minute, and is torch's own."""
    changes = {"augment__sides": [12, 16], "run__precision": "fp32", "loop__epochs": 2, **changes}
    plain = train(betons, tmp_path / "plain", **changes)
    traced, whole = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **how: traced.append(how) or whole(net, backend="aot_eager", fullgraph=True, **how))
    compiled = train(betons, tmp_path / "compiled", run__compile=True, **changes)
    assert traced == [{"dynamic": False}]
    losses = [[line["train_loss"] for line in logged(folder_of(tmp_path / name))] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-2)


@pytest.mark.parametrize("sides, shares, graphs", [
    ([8, 9, 10, 11, 12, 13], [], 12), ([8, 10], [1, 0.95, 0.9, 0.88, 0.86, 0.84, 0.82, 0.7, 0.66, 0.6], 20)])
def test_no_size_of_batch_is_left_uncompiled(betons, tmp_path, monkeypatch, sides, shares, graphs):
    """torch gives up compiling after eight sizes of a net's input: an error, of a whole graph."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **how: whole(net, backend="eager", fullgraph=True, **how))
    torch.compiler.reset()
    with torch.compiler.config.patch(recompile_limit=8):
        train(betons, tmp_path, run__compile=True, augment__sides=sides, loop__hardest=shares, loop__epochs=len(shares or sides),
              loader__drop_last=False)
        assert torch.compiler.config.recompile_limit == graphs


class Operations(TorchDispatchMode):
    """Notes in `seen` which operations would make a GPU's step wait: numbers read from tensors, sizes that depend on their content,
    tensors made of numbers. What goes from the CPU to the device as a tensor is not seen: on a CPU it goes nowhere."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "lift_fresh",
             "equal", "bincount")

    def __init__(self, seen):
        super().__init__()
        self.seen, self.kept_on_the_cpu = seen, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, _, overload = function.__name__.partition(".")
        by_mask = name.lstrip("_").startswith("index") and any(
            index.dtype in (torch.bool, torch.uint8) for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
            if index is not None)
        waits = by_mask or name in self.WAITS or (name, overload) == ("repeat_interleave", "Tensor")
        if waits and not any(args[0] is tensor for tensor in self.kept_on_the_cpu):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes in `seen` what brings a tensor to the CPU, and is nothing there. `torch.device("cpu")` is not seen: it is the tests' own device."""

    NAMES = ("cpu", "numpy", "tolist", "allclose")

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES or "cpu" in (*args[1:], *(kwargs or {}).values()):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: float(x[1]), lambda x: x[x > 0], lambda x: x.masked_select(x > 0),
    lambda x: x.nonzero(), lambda x: x.unique(), lambda x: torch.tensor([1.0, 2.0]), lambda x: x.new_tensor([1.0]), lambda x: x.cpu(),
    lambda x: x.to("cpu"), lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.repeat_interleave(x.long()),
    lambda x: x.long().bincount(), lambda x: torch.allclose(x, x), lambda x: x.unique_consecutive(), lambda x: x[None].unique(dim=0),
    lambda x: x.index_put_((x > 0,), x[0]), lambda x: torch.equal(x, x), lambda x: torch.where(x > 0)])
def test_what_would_wait_for_a_device_is_seen(wait):
    x, seen = torch.ones(3), []
    with Calls(seen), Operations(seen):
        x.mul(2).clamp(0, 1).index_select(0, x.long())
        assert not seen
        wait(x)
    assert seen


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_no_step_but_an_epochs_first_waits_for_the_device(betons, tmp_path, name, padding):
    """As far as a CPU can show it: most operations that wait are called there, too."""
    changes = {"optim.name": name, "optim.ema_decay": 0.9, "optim.sam_radius": 0.1,
               ("optim.clip_norm" if name == "sgd" else "optim.clip_value"): 1.0, "loop.hardest": [1, 0.5],
               "augment.flip": "alternating", "augment.padding": padding, "augment.cutout": 4, "augment.brightness": 0.1,
               "augment.contrast": 0.1, "augment.blur": 0.1, "augment.noise": 0.1, "augment.sides": [12], "model.dropout": 0.1,
               "model.activation": "gelu", "loss.label_smoothing": 0.1, "loader.mode": "resident", "loop.epochs": 2}
    config, data, model = loop.prepare(build({**SMALL, **betons, **changes}))
    seen = []
    with loop.open_session(config, torch.device("cpu"), data, model) as session, Calls(seen), Operations(seen) as operations:
        operations.kept_on_the_cpu = (session.average.n_averaged,)
        for epoch in range(2):
            steps = []

            def after_step(step, tally):
                steps.append(list(seen))
                seen.clear()
            loop.train_epoch(session.model, session.batches(epoch), after_step=after_step, **session.parts(epoch))
            assert len(steps) > 3 and not any(steps[1:]), steps
    assert average_weights(model.to("meta"), 0.9).n_averaged.device.type == "cpu"


def test_the_saved_weights_are_the_evaluated_ones(betons, tmp_path):
    outcome = train(betons, tmp_path, evaluate__tta="flip")
    saved = checkpoint.load(folder_of(tmp_path) / "weights.pt")
    config = build(saved["config"])
    model = loop.build_model(config)
    model.load_state_dict(saved["model"])
    _, data, _ = loop.prepare(config)
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        again = session.evaluate("flip")
    assert again.plain.correct == outcome["correct"] and again.tta.correct == outcome["correct_tta"]
    assert saved["classes"] == list(CLASSES) and saved["epochs_done"] == 3


def test_whitening_is_set_from_training_images_and_never_trained(betons, tmp_path):
    config = build({**SMALL, **betons, "model.stem": "whiten"})
    _, data, model = loop.prepare(config)
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        before = session.model.stem[0].weight.clone()
        want = torch.from_numpy(stripes(150, 0).images).permute(0, 3, 1, 2)
        got = loop.some_images(data, 150, torch.device("cpu"))
        mean = torch.tensor(data.train.mean)[:, None, None]
        std = torch.tensor(data.train.std)[:, None, None]
        assert torch.allclose(got, (want - mean) / std, atol=1e-5)
        few = loop.some_images(data, 4, torch.device("cpu"))    # a set may be sorted by class
        assert torch.equal(few, got[[0, 49, 99, 149]]) and len(loop.some_images(data, 999, torch.device("cpu"))) == 150
        loop.train_epoch(session.model, session.train_batches.epoch(0), **session.parts(0))
        assert torch.equal(session.model.stem[0].weight, before) and before.abs().sum() > 0


def test_the_holdout_is_evaluated_and_not_trained_on(betons, tmp_path):
    outcome = train(betons, tmp_path, evaluate__split="holdout", evaluate__holdout_size=30, beton__test="does/not/exist")
    assert outcome["evaluated"] == 30 and outcome["split"] == "holdout"
    config = build({**SMALL, **betons, "evaluate.split": "holdout", "evaluate.holdout_size": 30})
    _, data, model = loop.prepare(config)
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


@pytest.mark.parametrize("rate, settings", [(1e30, {}), (1e9, {"optim__weight_decay": 1.0, "loop__epochs": 40})])
def test_an_absurd_learning_rate_ends_in_the_same_error(betons, tmp_path, rate, settings):
    with pytest.raises(NonFiniteLoss, match="epoch [0-9]+, step [0-9]+ of 9, at learning rate 1e.*Try a smaller optim.lr"):
        train(betons, tmp_path, optim__lr=rate, optim__schedule="constant", **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "weights", "norm"])
def test_what_is_not_finite_never_replaces_a_checkpoint(betons, tmp_path, monkeypatch, faults, where, value):
    whole, files = loop.set_learning_rate, {}

    def poisoned(optimizer, share):
        whole(optimizer, share)
        poisoned.steps += 1
        if poisoned.steps == 13:    # the second epoch's fourth step; checkpoints are written behind each
            files.update({path.name: path.read_bytes() for path in folder_of(tmp_path).glob("*.pt")})
            with torch.no_grad():
                if where == "weights":
                    optimizer.param_groups[0]["params"][0][0] = value
                elif where == "norm":
                    next(m for m in poisoned.model.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean[0] = value
    poisoned.steps = 0
    monkeypatch.setattr(loop, "set_learning_rate", poisoned)
    if where == "input":
        clean = loop.train_batch
        monkeypatch.setattr(loop, "train_batch", lambda *a, **k: clean(*a, **k) * (value if poisoned.steps == 13 else 1.0))
    opened = loop.open_session

    def open_session(*arguments):
        session = opened(*arguments)
        poisoned.model = session.model
        return session
    monkeypatch.setattr(loop, "open_session", open_session)
    with pytest.raises(NonFiniteLoss, match=f"^{'a weight or' if where == 'norm' else 'the loss'} .*epoch 2, step 4 of 9, at learning rate 0.0"):
        train(betons, tmp_path, checkpoint__every_steps=1)
    folder = folder_of(tmp_path)
    assert set(files) == {"last.pt", "best.pt", "weights.pt"}
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == files
    faults(1)


def test_a_gradient_scale_that_has_fallen_to_nothing_stops_the_run(betons, tmp_path, monkeypatch):
    opened = loop.open_session

    def open_session(*arguments):    # as with fp16 on a GPU whose gradients have overflowed forty times in a row
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-30, growth_interval=10**6)
        scaler.scale(torch.zeros(()))
        return dataclasses.replace(opened(*arguments), scaler=scaler)
    monkeypatch.setattr(loop, "open_session", open_session)
    with pytest.raises(NonFiniteLoss, match="float16's gradients overflow in epoch 1, step 9"):
        train(betons, tmp_path, run__precision="fp32")


def test_an_overflow_on_the_way_up_the_slope_costs_the_step_and_not_the_run(betons, tmp_path, monkeypatch):
    """As in float16: the gradients that show the way are infinite, the scaler leaves the step out, the loss that is counted is a number."""
    opened, seen = loop.open_session, []

    def open_session(*arguments):
        session = opened(*arguments)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        weight = next(session.model.parameters())

        def overflow(gradient):
            seen.append(scaler.get_scale())
            return torch.full_like(gradient, torch.inf) if seen[-1] == 2.0**10 else gradient
        weight.register_hook(overflow)
        return dataclasses.replace(session, scaler=scaler)
    monkeypatch.setattr(loop, "open_session", open_session)
    outcome = train(betons, tmp_path, run__precision="fp32", optim__sam_radius=0.1, optim__sam_share=0.5, optim__momentum=0.0, optim__nesterov=False)
    assert seen[:3] == [2.0**10, 2.0**10, 2.0**9] and outcome["loss"] < 2


@pytest.mark.parametrize("changes, told", [
    ({"loader__batch_size": 149}, True), ({"loader__batch_size": 149, "loader__drop_last": True}, False), ({"loader__batch_size": 148}, False),
    ({"loader__batch_size": 1, "loader__drop_last": True}, True), ({"loader__batch_size": 149, "model__blocks": [1, 1, 1]}, False),
    ({"loader__batch_size": 4, "optim__sam_radius": 0.1, "optim__sam_share": 0.25, "loader__drop_last": True}, True),
    ({"loader__batch_size": 74, "loop__hardest": [1, 0.5]}, True), ({"loader__batch_size": 149, "loop__hardest": [0.5]}, False),
    ({"loader__batch_size": 50, "evaluate__split": "holdout", "evaluate__holdout_size": 99}, True)])
def test_a_batch_that_cannot_be_normalised_is_told_before_anything_is_trained(betons, tmp_path, changes, told):
    """150 images; five stages leave one pixel of 16."""
    changes = {"model__blocks": [1, 1, 1, 1, 1], "loader__drop_last": False, "loop__epochs": 2, **changes}
    if told:
        share = "optim.sam_share = 0.25 of " if "optim__sam_share" in changes else ""
        with pytest.raises(UserError, match=f"loader.batch_size: got .* which leaves one image to {share}a batch") as caught:
            train(betons, tmp_path / "runs", **changes)
        ways = str(caught.value).partition(": give ")[2]
        assert ("drop_last" in ways) != changes["loader__drop_last"] and ("sam_share" in ways) == bool(share) and " or fewer stages" in ways
        assert not (tmp_path / "runs").exists()
    else:
        assert train(betons, tmp_path, **changes)["evaluated"]


@pytest.mark.parametrize("size, processes, alone, told", [
    (2, 2, False, True), (2, 2, True, False), (4, 2, False, True), (6, 2, False, False), (148, 2, False, True), (148, 4, False, True), (146, 2, False, False)])
def test_a_share_of_a_batch_that_is_normalised_by_itself_may_not_be_one_image(betons, size, processes, alone, told):
    config = build({**SMALL, **betons, "model.blocks": [1] * 5, "loader.drop_last": False, "loader.batch_size": size, "loop.sync_norm": alone})
    if told:
        with pytest.raises(UserError, match=f"which leaves one image to one of {processes} processes .loop.sync_norm: false"):
            loop.prepare(config, Launch(world=processes))
    else:
        loop.prepare(config, Launch(world=processes))


def test_an_evaluation_that_fails_for_another_reason_than_memory_names_no_key(betons, tmp_path, monkeypatch, capsys):
    def broken(*arguments, **named):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(loop, "evaluate", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        train(betons, tmp_path)
    assert "evaluate.batch_size" not in capsys.readouterr().out.split("folder  ")[1]


@pytest.mark.parametrize("changes, long", [({}, False), ({"optim__sam_radius": 0.1, "optim__sam_from": 0.5}, True),
                                           ({"optim__sam_radius": 0.1, "optim__sam_from": 0.5, "optim__sam_share": 0.2}, False)])
def test_second_passes_make_a_run_long(betons, tmp_path, monkeypatch, changes, long):
    """27 steps, of which the last 14 have one."""
    sessions, opened = [], loop.open_session
    monkeypatch.setattr(loop, "MANY_STEPS", 35)
    monkeypatch.setattr(loop, "open_session", lambda *arguments: sessions.append(opened(*arguments)) or sessions[-1])
    train(betons, tmp_path, **changes)
    assert sessions[0].is_long == long


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mappings(valid))
def test_any_config_of_right_values_is_prepared_or_refused_with_reasons(betons, mapping):
    kept = ("beton.", "run.device", "model.max_parameters")    # the last could ask for all of the memory
    try:
        config = build({**SMALL, **{name: value for name, value in mapping.items() if not name.startswith(kept)}, **betons})
        config, data, model = loop.prepare(config)
    except UserError as error:
        assert error.status == 2 and error.problems and all(": " in problem for problem in error.problems)
    else:
        assert len(data.train.classes) == config.model.classes == model.head.out_features


# -- memory, disk, files under a training -------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), MemoryError(),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 1 GB, other allocations: 0, max allowed: 1 GB)"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
@pytest.mark.parametrize("where", ["smoothed_cross_entropy", "evaluate"])
def test_memory_that_does_not_suffice_is_explained_and_nothing_tried_again(betons, tmp_path, monkeypatch, where, error):
    calls = []

    def fails():
        calls.append(1)
        raise error
    fail_at(monkeypatch, where, 1, fails)
    with pytest.raises(UserError) as caught:
        train(betons, tmp_path)
    text = str(caught.value)
    assert re.match(r"out of memory on cpu with loader.batch_size = 16 \(evaluate.batch_size = 32\) and images of 16 x 16 pixels; [\d,]+ "
                    r"of [\d,]+ MiB are free: give --loader.batch_size 8, smaller --model.channels, --loader.mode stream", text), text
    assert caught.value.status == 2 and len(calls) == 1


@pytest.mark.parametrize("processes, goes_on, expected", [(1, False, "500, smaller"), (8, False, "496, smaller"), (600, False, "600, smaller"),
                                                          (1, True, "")])
def test_what_is_advised_for_want_of_memory_is_accepted(processes, goes_on, expected):
    """A batch that the processes can share; of a run that goes on, keys that may change."""
    for error, words in ((MemoryError(), "out of memory"), (loop.NotRecorded("x"), "cuda_graphs")):
        with pytest.raises(UserError, match=words) as caught:
            with loop.memory_explained(build({"loader.batch_size": 1000}), torch.device("cpu"), processes, goes_on):
                raise error
        text = str(caught.value).partition("give ")[2] or str(caught.value)
        assert "--loader.batch_size" not in text if goes_on else f"--loader.batch_size {expected.partition(',')[0]}" in text, text
        assert ("--model.channels" in text) == (not goes_on and words == "out of memory")


def test_any_other_error_is_not_taken_for_a_lack_of_memory(betons, tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("shapes do not fit")
    fail_at(monkeypatch, "smoothed_cross_entropy", 1, fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(betons, tmp_path)


def test_a_disk_that_fills_up_at_any_write_costs_nothing_that_was_saved(betons, tmp_path, monkeypatch, faults):
    train(betons, tmp_path / "whole", loop__epochs=2)
    expected, sync, failed = weights_hash(folder_of(tmp_path / "whole")), os.fsync, 0
    for number in range(1, 100):
        count = 0

        def full(descriptor):
            nonlocal count
            count += 1
            if count == number:
                raise OSError(28, "No space left on device")
            sync(descriptor)
        base = tmp_path / str(number)
        monkeypatch.setattr(os, "fsync", full)
        try:
            train(betons, base, loop__epochs=2)
            break    # there are no more writes than that
        except UserError as error:
            assert re.search(r"(config.yaml|environment.json|log.jsonl|\w+.pt|report.json): cannot be written .No space left", str(error))
            failed += 1
        finally:
            monkeypatch.setattr(os, "fsync", sync)
        folder = folder_of(base)
        if (folder / "last.pt").exists() and number % 3 == 0:
            if not (folder / "report.json").exists():
                train(betons, base, run__resume=str(folder), loop__epochs=2)
            assert weights_hash(folder) == expected
        assert not list(folder.glob(".*")), "no temporary file is left"
    assert failed >= 15
    faults(failed)


def put_in_its_place(path, content):
    """As programs do that write with care. Cutting off a mapped file where it lies ends the process that reads it (docs/threats.md)."""
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: put_in_its_place(p, p.read_bytes()[:-100]),
                                    lambda p: put_in_its_place(p, p.read_bytes())])
def test_a_file_changed_under_a_training_stops_it_with_what_it_had(betons, tmp_path, monkeypatch, change):
    own = {key: str(tmp_path / Path(path).name) for key, path in betons.items()}
    for key, path in betons.items():
        shutil.copy(path, own[key])
        shutil.copy(f"{path}.json", f"{own[key]}.json")
    settings = dict(loader__mode="stream")
    train(own, tmp_path / "whole", **settings)
    restore = fail_at(monkeypatch, "smoothed_cross_entropy", 14, lambda: change(Path(own["beton.train"])))
    with pytest.raises(UserError, match="train.beton: .*(No such file|was changed while it was in use)"):
        train(own, tmp_path / "stopped", **settings)
    restore()
    folder = folder_of(tmp_path / "stopped")
    assert checkpoint.load(folder / "last.pt")["epoch"] == 2 == checkpoint.load(folder / "weights.pt")["epochs_done"]
    shutil.copy(betons["beton.train"], own["beton.train"])
    train(own, tmp_path / "stopped", run__resume=str(folder), **settings)
    assert weights_hash(folder) == weights_hash(folder_of(tmp_path / "whole"))


def test_a_run_folder_that_vanishes_is_named(betons, tmp_path, monkeypatch):
    fail_at(monkeypatch, "smoothed_cross_entropy", 13, lambda: shutil.rmtree(folder_of(tmp_path)))
    with pytest.raises(UserError, match="stripes-.*/(best|weights|last).pt: cannot be written .No such file or directory"):
        train(betons, tmp_path)


def test_every_byte_is_checked_before_a_training_where_asked_for(betons, tmp_path):
    for name in ("train", "test"):
        for suffix in ("", ".json"):
            shutil.copy(betons[f"beton.{name}"] + suffix, tmp_path / f"{name}.beton{suffix}")
    own = {f"beton.{name}": str(tmp_path / f"{name}.beton") for name in ("train", "test")}
    loop.prepare(build({**SMALL, **own, "beton.verify": "full"}))
    content = bytearray((tmp_path / "train.beton").read_bytes())
    content[(8 << 20) + 1000] ^= 4    # in a pixel
    (tmp_path / "train.beton").write_bytes(content)
    loop.prepare(build({**SMALL, **own}))
    with pytest.raises(UserError, match="train.beton: its sha256 is"):
        loop.prepare(build({**SMALL, **own, "beton.verify": "full"}))


def test_a_net_beyond_the_memory_is_refused_before_it_is_built(betons, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="model.channels: this net's parameters take [0-9,]+ MiB"):
        loop.prepare(build({**SMALL, **betons, "model.channels": [65536], "model.max_parameters": 0}))


def test_all_problems_are_reported_before_anything_is_written(betons, tmp_path):
    with pytest.raises(UserError) as caught:
        train(betons, tmp_path / "runs", beton__train="no/such.beton", model__max_parameters=100, model__classes=7)
    text = str(caught.value)
    assert "no/such.beton" in text and "model.max_parameters: this net has" in text and "the budget is 100" in text
    assert "7" in text and not (tmp_path / "runs").exists()


def test_how_the_data_were_written_is_what_the_run_says(betons, tmp_path):
    how = {"image_size": 16, "fit": "crop", "test_share": 0.1, "labels": "fine"}
    write_beton(tmp_path / "train.beton", stripes(60, 0), classes=CLASSES, name="stripes", source="test", fingerprint="x", how=how)
    told = build({**SMALL, **betons, "beton.train": str(tmp_path / "train.beton"), "sources.fit": "resize", "sources.test_share": 0.3})
    assert {name: getattr(loop.prepare(told)[0].sources, name) for name in how} == how
    assert loop.prepare(build({**SMALL, **betons, "sources.fit": "crop"}))[0].sources.fit == "crop", "of an older file nothing is known"


def test_a_job_knows_its_trainings_apart(betons, tmp_path):
    """A launcher that starts a training again must not take another one's folder for it."""
    train(betons, tmp_path, loop__epochs=1, run__folder=str(tmp_path / "stripes-1"))
    config = build({**SMALL, **betons, "loop.epochs": 1, "model.classes": 0, "model.image_size": 0}, recipe="stripes")
    assert loop.is_of(tmp_path / "stripes-1", config) and not loop.is_of(tmp_path, config)
    assert not loop.is_of(tmp_path / "stripes-1", dataclasses.replace(config, run=dataclasses.replace(config.run, seed=5)))
    elsewhere = dataclasses.replace(config.beton, train=f"/copied/{Path(config.beton.train).name}")
    assert loop.is_of(tmp_path / "stripes-1", dataclasses.replace(config, beton=elsewhere)), "a job's copy of the set"
    other = dataclasses.replace(config.beton, train="other.beton")
    assert not loop.is_of(tmp_path / "stripes-1", dataclasses.replace(config, beton=other))
    for name in ("stripes-1", "stripes-2"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "environment.json").write_text('{"job": "17/0"}')
    found = report.begun_by("17/0", tmp_path, ())
    assert [path.name for path in found] == ["stripes-2", "stripes-1"] and not list(report.begun_by("18/0", tmp_path, ()))


def test_an_explicit_run_folder_is_used_and_not_shared(betons, tmp_path):
    train(betons, tmp_path / "unused", run__folder=str(tmp_path / "mine"), loop__epochs=1)
    assert (tmp_path / "mine" / "report.json").exists()
    with pytest.raises(UserError, match="mine"):
        train(betons, tmp_path / "unused", run__folder=str(tmp_path / "mine"), loop__epochs=1)


# -- stop and go on -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {"sgd": dict(optim__clip_norm=1.0, optim__sam_radius=0.1, optim__sam_from=0.3),
              "adamw": dict(optim__name="adamw", optim__lr=1e-3, optim__ema_decay=0.8),
              "muon": dict(optim__name="muon", loader__mode="stream"),
              "hardest": dict(loop__hardest=[1, 0.97, 0.5], optim__warmup_epochs=0.5, optim__schedule="onecycle")}


class Crash(Exception):
    """As if the power had failed: nothing gets a chance to save."""


def fail_at(monkeypatch, name, calls, action):
    """Let the `calls`-th call of loop.<name> perform `action` first."""
    whole, count = getattr(loop, name), [0]

    def counted(*arguments, **named):
        count[0] += 1
        if count[0] == calls:
            action()
        return whole(*arguments, **named)
    monkeypatch.setattr(loop, name, counted)
    return lambda: monkeypatch.setattr(loop, name, whole)


def crash():
    raise Crash


def terminate():
    signal.raise_signal(signal.SIGTERM)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where, calls, action, epoch, done", [
    ("set_learning_rate", 13, terminate, 1, 4), ("set_learning_rate", 18, terminate, 1, 9),
    ("evaluate", 2, terminate, 1, 9), ("set_learning_rate", 13, crash, 1, 0), ("set_learning_rate", 17, crash, 1, 6),
    ("evaluate", 3, crash, 2, 0), ("finish", 1, crash, 3, 0)])
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(betons, tmp_path, monkeypatch, name, where, calls, action,
                                                                   epoch, done):
    # 9 steps an epoch: call 13 is the 4th step of the second epoch, whose checkpoint is written behind that step
    settings = dict(OPTIMIZERS[name], model__dropout=0.2, augment__flip="alternating", augment__cutout=3)
    if calls == 17:
        settings["checkpoint__every_steps"] = 5    # the run's 15th step is the second epoch's 6th
    whole = train(betons, tmp_path / "whole", **settings)
    restore = fail_at(monkeypatch, where, calls, action)
    with pytest.raises(Interrupted if action is terminate else Crash) as caught:
        train(betons, tmp_path / "stopped", **settings)
    restore()
    folder = folder_of(tmp_path / "stopped")
    if action is terminate:
        assert caught.value.status == 143 and f"--run.resume {folder}" in str(caught.value)
    saved = checkpoint.load(folder / "last.pt")
    assert (saved["epoch"], saved["batches_done"]) == (epoch, done) and not (folder / "report.json").exists()
    resumed = train(betons, tmp_path / "unused", run__resume=str(folder), **settings)
    assert weights_hash(folder) == weights_hash(folder_of(tmp_path / "whole"))
    assert logged(folder) == logged(folder_of(tmp_path / "whole"))
    timeless = ("accuracy", "accuracy_tta", "loss", "loss_tta", "best_epoch", "best_accuracy", "epochs", "recipe")
    assert {k: resumed[k] for k in timeless} == {k: whole[k] for k in timeless}
    assert resumed["resumed"] == 1 and whole["resumed"] == 0
    assert resumed["total_seconds"] >= resumed["train_seconds"] + resumed["eval_seconds"] + resumed["startup_seconds"]
    [resumption] = json.loads((folder / "environment.json").read_text())["resumed"]
    assert resumption["epoch"] == epoch and resumption["versions"]
    assert not (tmp_path / "unused").exists()


def stopped_run(betons, tmp_path, monkeypatch, **settings):
    restore = fail_at(monkeypatch, "smoothed_cross_entropy", 13, crash)
    with pytest.raises(Crash):
        train(betons, tmp_path, **settings)
    restore()
    return max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)


def test_a_changed_config_is_refused_with_the_differences(betons, tmp_path, monkeypatch):
    folder = stopped_run(betons, tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as caught:
        train(betons, tmp_path, run__resume=str(folder), optim__lr=0.07, loader__batch_size=8)
    assert [line.split(": ", 2)[2] for line in caught.value.problems] == [
        "loader.batch_size: was 16, is 8: leave it as it was, or start a new run in another folder",
        "optim.lr: was 0.05, is 0.07: leave it as it was, or start a new run in another folder"]
    write_beton(tmp_path / "other.beton", stripes(61, 5), classes=CLASSES, name="stripes", source="elsewhere", fingerprint="y")
    other = {**betons, "beton.test": str(tmp_path / "other.beton")}
    with pytest.raises(UserError, match="other.beton holds other bytes than before"):
        train(other, tmp_path, run__resume=str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("about, message", [
    (dict(classes=(*CLASSES[:2], "other")), "have other classes .'bottom' and 'other'"),
    (dict(fingerprint="y/raw/test"), "images to train on may be among those to test on: write both again")])
def test_betons_that_are_no_two_splits_of_one_set_are_refused(betons, tmp_path, about, message):
    how = dict(classes=CLASSES, name="stripes", source="test", fingerprint="x/raw/test")
    write_beton(tmp_path / "other.beton", stripes(61, 5), **{**how, **about})
    with pytest.raises(UserError, match=message):
        train({**betons, "beton.test": str(tmp_path / "other.beton")}, tmp_path / "runs")
    shutil.copy(betons["beton.train"], tmp_path / "copy.beton")
    shutil.copy(betons["beton.train"] + ".json", tmp_path / "copy.beton.json")
    with pytest.raises(UserError, match="copy.beton: hold the same images"):
        train({**betons, "beton.test": str(tmp_path / "copy.beton")}, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    write_beton(tmp_path / "other.beton", stripes(61, 5), **{**how, "source": "elsewhere", "fingerprint": "y/raw/test"})
    train({**betons, "beton.test": str(tmp_path / "other.beton")}, tmp_path / "runs")    # another test set of the same classes


def test_a_run_goes_on_without_the_graphs_that_it_had_no_memory_for(betons, tmp_path, monkeypatch):
    folder = stopped_run(betons, tmp_path, monkeypatch)
    train(betons, tmp_path, run__resume=str(folder), run__cuda_graphs=False)
    assert (folder / "report.json").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_whose_set_up_fails_leaves_its_folder_to_the_next_training_of_the_program(betons, tmp_path, monkeypatch, resumed):
    """Though the error that it ended with is kept, as a notebook does, and all that it was in with it."""
    folder = tmp_path / "run"
    if resumed:
        fail_at(monkeypatch, "smoothed_cross_entropy", 25, crash)
        with pytest.raises(Crash):
            train(betons, tmp_path, run__folder=str(folder))
        monkeypatch.undo()

    def fails(*_, **__):
        raise RuntimeError("no room")
    monkeypatch.setattr(*(loop, "open_session") if resumed else (report.RunFolder, "write_start"), fails)
    with pytest.raises(RuntimeError, match="no room") as kept:
        train(betons, tmp_path, run__folder="" if resumed else str(folder), run__resume=str(folder) if resumed else "")
    monkeypatch.undo()
    assert train(betons, tmp_path, **({"run__resume": str(folder)} if resumed else {"run__folder": str(folder), "run__resume": "auto"}))["evaluated"]
    assert kept.value.__traceback__


def test_the_same_data_in_another_place_and_keys_that_came_later_are_no_change(betons, tmp_path, monkeypatch):
    folder = stopped_run(betons, tmp_path / "runs", monkeypatch)
    state = checkpoint.load(folder / "last.pt")
    del state["config"]["loop"]["sync_norm"], state["config"]["loader"]["shares"]    # as an earlier version wrote it
    checkpoint.save(folder / "last.pt", state)
    for name, path in betons.items():
        for end in ("", ".json"):
            shutil.copy(f"{path}{end}", tmp_path / f"{name}{end}")
    train({name: str(tmp_path / name) for name in betons}, tmp_path, run__resume=str(folder))
    assert (folder / "report.json").exists()


def test_what_cannot_be_resumed_says_why(betons, tmp_path, monkeypatch):
    folder = stopped_run(betons, tmp_path / "a", monkeypatch)
    elsewhere = report.open_run_folder(folder)
    with pytest.raises(UserError, match="another process is training into"):
        train(betons, tmp_path / "a", run__resume=str(folder))
    elsewhere.close()
    train(betons, tmp_path / "a", run__resume=str(folder))
    with pytest.raises(UserError, match="is finished"):
        train(betons, tmp_path / "a", run__resume=str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no last.pt"):
        train(betons, tmp_path / "a", run__resume=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="run.folder, run.resume"):
        train(betons, tmp_path / "a", run__resume=str(folder), run__folder=str(tmp_path / "b"))


def test_auto_goes_on_with_the_newest_unfinished_run_of_this_config(betons, tmp_path, monkeypatch):
    train(betons, tmp_path, run__resume="auto", run__seed=1)
    finished = folder_of(tmp_path)
    stopped = stopped_run(betons, tmp_path, monkeypatch, run__seed=1)
    other_seed = stopped_run(betons, tmp_path, monkeypatch, run__seed=2)
    train(betons, tmp_path, run__resume="auto", run__seed=1)
    assert (stopped / "report.json").exists() and weights_hash(stopped) == weights_hash(finished)
    assert len(list(tmp_path.iterdir())) == 3 and not (other_seed / "report.json").exists()
    train(betons, tmp_path, run__resume="auto", run__seed=1)    # nothing is left to go on with
    assert len(list(tmp_path.iterdir())) == 4
    with report.open_run_folder(other_seed).log_file:    # a process is at work there
        train(betons, tmp_path, run__resume="auto", run__seed=2)
    assert len(list(tmp_path.iterdir())) == 5


def test_auto_knows_a_run_by_its_config_not_by_its_name(betons, tmp_path, monkeypatch, capsys):
    """Of a folder of the user's, or of a recipe whose file is called otherwise since."""
    folder = stopped_run(betons, tmp_path, monkeypatch, run__folder=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="mine: run.seed: was 0, is 5: leave it"):    # not that the folder is not empty
        train(betons, tmp_path, run__folder=str(folder), run__resume="auto", run__seed=5)
    with report.open_run_folder(folder).log_file, pytest.raises(UserError, match="another process is training into"):
        train(betons, tmp_path, run__folder=str(folder), run__resume="auto")
    settings = {**SMALL, **betons, "report.folder": str(tmp_path), "run.resume": "auto"}
    loop.fit(build(settings, recipe="config"), ["test"])
    assert folder == tmp_path / "mine" and json.loads((folder / "report.json").read_text())["recipe"] == "stripes"
    assert "begins anew" not in capsys.readouterr().out
    loop.fit(build(settings, recipe="config"), ["test"])
    said = capsys.readouterr().out
    assert f"no unfinished run of this config in {tmp_path}: this one begins anew\n" in said and len(list(tmp_path.iterdir())) == 2


def test_auto_tells_how_the_run_that_is_most_like_it_differs(betons, tmp_path, monkeypatch, capsys):
    stopped_run(betons, tmp_path, monkeypatch, run__seed=1)
    near = stopped_run(betons, tmp_path, monkeypatch, run__seed=2)
    newest = stopped_run(betons, tmp_path, monkeypatch, run__seed=2, optim__lr=0.02)
    os.utime(near / "last.pt", (2e9, 2e9))
    os.utime(newest / "last.pt", (2.5e9, 2.5e9))
    (tmp_path / "broken").mkdir()
    for name in ("last.pt", "config.yaml"):
        (tmp_path / "broken" / name).write_text("[no config")
    os.utime(tmp_path / "broken/last.pt", (3e9, 3e9))
    capsys.readouterr()
    train(betons, tmp_path, run__resume="auto", run__seed=3, optim__momentum=0.5)
    said, before = capsys.readouterr().out, build(SMALL).optim.momentum
    assert f"begins anew (one that is like it, {near}, has run.seed 2, not 3, optim.momentum {before}, not 0.5)" in said, said
    train(betons, tmp_path, run__resume="auto", run__folder=str(tmp_path / "own"))
    assert f"no unfinished run of this config in {tmp_path / 'own'}: this one begins anew\n" in capsys.readouterr().out

    def told(**keys):
        config, data, _ = loop.prepare(build({**SMALL, **betons, "report.folder": str(tmp_path), "run.seed": 2, **keys}))
        return loop.nearest_unlike(config, data)
    assert told().startswith(f" (one that is like it, {newest},"), "the nearest is the one meant, and at work elsewhere"
    assert told(**{"optim.lr": 0.3, "optim.momentum": 0.1, "loss.label_smoothing": 0.3, "augment.translate": 3, "optim.weight_decay": 0.1}) == "", \
        "of another recipe"


def test_auto_tells_of_a_run_of_this_config_that_had_other_images(betons, tmp_path, monkeypatch, capsys, make_split):
    for split in ("train", "test"):
        for suffix in ("", ".json"):
            shutil.copy(betons[f"beton.{split}"] + suffix, tmp_path / f"{split}.beton{suffix}")
    own = {"beton.train": str(tmp_path / "train.beton"), "beton.test": str(tmp_path / "test.beton")}
    stopped = stopped_run(own, tmp_path / "runs", monkeypatch)
    pixels = read_images(open_beton(own["beton.test"]))
    write_beton(tmp_path / "test.beton", Split(pixels[::-1].copy(), open_beton(own["beton.test"]).labels[::-1].copy()), classes=CLASSES, name="stripes",
                source="made", fingerprint="other")
    capsys.readouterr()
    train(own, tmp_path / "runs", run__resume="auto")
    said = capsys.readouterr().out
    assert f"begins anew (that in {stopped} cannot go on: beton.test: {own['beton.test']} holds other bytes than before)" in said, said


@pytest.mark.parametrize("left", ["all", "log.jsonl"])
def test_auto_begins_in_the_folder_that_it_left_before_anything_was_saved(betons, tmp_path, monkeypatch, left):
    """As where a job is killed while its processes find one another, and begun again by its batch system."""
    folder = tmp_path / "mine"
    monkeypatch.setattr(loop, "run_epochs", lambda *_: crash())
    with pytest.raises(Crash):
        train(betons, tmp_path, run__folder=str(folder), run__resume="auto")
    monkeypatch.undo()
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "environment.json", "log.jsonl"}
    if left != "all":
        for name in ("config.yaml", "environment.json"):
            (folder / name).unlink()
        (folder / ".config.yaml.tmp-1").touch()    # it was being written
    else:
        with pytest.raises(UserError, match="is not empty"):    # of another config
            train(betons, tmp_path, run__folder=str(folder), run__resume="auto", run__seed=1)
    with pytest.raises(UserError, match="is not empty"):
        train(betons, tmp_path, run__folder=str(folder))
    train(betons, tmp_path, run__folder=str(folder), run__resume="auto")
    assert (folder / "report.json").exists() and len(logged(folder)) == 3
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "config.yaml", tmp_path / "other")    # a recipe of the user's: nothing has begun there
    with pytest.raises(UserError, match="is not empty"):
        train(betons, tmp_path, run__folder=str(tmp_path / "other"), run__resume="auto")
    (tmp_path / "other/log.jsonl").write_text("a user's own")
    with pytest.raises(UserError, match="is not empty"):
        train(betons, tmp_path, run__folder=str(tmp_path / "other"), run__resume="auto")


def test_a_run_goes_on_in_fp16_that_was_none(betons):
    """As from a GPU with bf16 on one without: its state has no scale of gradients."""
    config, data, model = loop.prepare(build({**SMALL, **betons}))
    with loop.open_session(config, torch.device("cpu"), data, model) as session:
        parts = session.model, session.optimizer, session.generator
        off, on = (torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled) for enabled in (False, True))
        on.scale(torch.zeros(()))
        saved = checkpoint.training_state(*parts[:2], off, parts[2])
        checkpoint.restore_training_state(saved, *parts[:2], on, parts[2])
        assert saved["scaler"] == {} and on.get_scale() == 8
        checkpoint.restore_training_state(checkpoint.training_state(*parts[:2], on, parts[2]), *parts[:2], off, parts[2])


@pytest.mark.parametrize("flip, tta, said", [("none", "flip", 1), ("none", "none", 0), ("random", "flip", 0)])
def test_mirrored_views_of_a_net_that_saw_none_are_told(betons, tmp_path, capsys, flip, tta, said):
    train(betons, tmp_path, augment__flip=flip, evaluate__tta=tta)
    assert capsys.readouterr().out.count("which this net is not trained on") == said


def test_a_training_without_a_recipe_says_that_it_has_none(betons, tmp_path, capsys):
    for recipe, said in (("default", 1), ("stripes", 0)):
        loop.fit(build({**SMALL, **betons, "report.folder": str(tmp_path)}, recipe=recipe), ["test"])
        assert capsys.readouterr().out.count("no --config-file: ") == said


def test_a_run_folders_config_is_that_of_a_new_run(betons, tmp_path):
    train(betons, tmp_path, run__folder=str(tmp_path / "a"), loop__epochs=1)
    again = config.read_file(str(tmp_path / "a/config.yaml"))
    assert again["run.folder"] == "" and again["run.resume"] == ""
    for name, message in (("report.json", "a trained net is in this one"), ("last.pt", "--run.resume"), ("weights.pt", "or remove it")):
        with pytest.raises(UserError, match=f"is not empty: choose another, .*{message}"):
            train(betons, tmp_path, run__folder=str(tmp_path / "a"))
        (tmp_path / "a" / name).unlink()


def test_a_run_without_memory_to_evaluate_goes_on_with_smaller_batches(betons, tmp_path, monkeypatch):
    settings, mode = dict(evaluate__every=0, run__precision="fp32"), "stream" if runtime.has_ffcv() else "resident"
    whole = train(betons, tmp_path / "whole", **settings)

    def exhausted():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    restore = fail_at(monkeypatch, "evaluate", 1, exhausted)
    with pytest.raises(UserError, match="evaluate.batch_size"):
        train(betons, tmp_path / "stopped", **settings)
    restore()
    folder = folder_of(tmp_path / "stopped")
    saved = checkpoint.load(folder / "last.pt")
    assert (saved["epoch"], saved["batches_done"]) == (2, 9), "the last epoch would be trained again"
    monkeypatch.setattr(loop, "smoothed_cross_entropy", lambda *_, **__: pytest.fail("it is trained again"))
    resumed = train(betons, tmp_path, run__resume=str(folder), evaluate__batch_size=7, loader__mode=mode, **settings)
    assert resumed["correct"] == whole["correct"] and weights_hash(folder) == weights_hash(folder_of(tmp_path / "whole"))
    assert resumed["run_loader"] == mode


def test_seconds_outlive_a_process_that_is_killed_as_soon_as_it_goes_on(betons, tmp_path, monkeypatch):
    restore = fail_at(monkeypatch, "smoothed_cross_entropy", 13, terminate)
    with pytest.raises(Interrupted):
        train(betons, tmp_path)
    restore()
    folder = folder_of(tmp_path)
    state = checkpoint.load(folder / "last.pt")
    state["seconds"]["train"] += 1000.0    # which no machine needs for this
    checkpoint.save(folder / "last.pt", state)
    restore = fail_at(monkeypatch, "smoothed_cross_entropy", 1, crash)
    with pytest.raises(Crash):
        train(betons, tmp_path, run__resume=str(folder))
    restore()
    assert train(betons, tmp_path, run__resume=str(folder))["train_seconds"] > 1000


def test_another_number_format_is_said(betons, tmp_path, monkeypatch, capsys):
    folder = stopped_run(betons, tmp_path, monkeypatch)
    state = checkpoint.load(folder / "last.pt")
    before = {"torch.float32": "torch.bfloat16"}.get(state["precision"], "torch.float32")
    checkpoint.save(folder / "last.pt", {**state, "precision": before})    # as from another machine
    train(betons, tmp_path, run__resume=str(folder))
    assert f"trained in {before} so far, in {state['precision']} from here on" in capsys.readouterr().out


def test_milestones_of_another_schedule_do_not_matter(betons, tmp_path):
    train(betons, tmp_path, optim__milestones=[100, 150], optim__schedule="onecycle", loop__hardest=[1, 0.5], loop__epochs=2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_checkpoint_stops_a_resumption_with_its_name(betons, tmp_path, monkeypatch, share):
    folder = stopped_run(betons, tmp_path, monkeypatch)
    os.truncate(folder / "last.pt", int(share * (folder / "last.pt").stat().st_size))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for resume in (str(folder), "auto"):
        with pytest.raises(UserError, match="last.pt: is damaged or no checkpoint of ours"):
            train(betons, tmp_path, run__resume=resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and folder_of(tmp_path) == folder


def test_a_resumption_clears_what_killed_processes_left(betons, tmp_path, monkeypatch):
    folder = stopped_run(betons, tmp_path, monkeypatch)
    for name in ("best.pt", "report.json", "config.yaml"):
        (folder / f".{name}.tmp-{2**22 + 1}").write_bytes(b"half")    # a number above every process's
    train(betons, tmp_path, run__resume="auto")
    assert not list(folder.glob(".*"))


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept(betons, tmp_path):
    train(betons, tmp_path / "plain", loop__epochs=1, run__precision="fp32")
    outcome = train(betons, tmp_path / "average", loop__epochs=1, run__precision="fp32", optim__ema_decay=0.7)
    last, kept = (checkpoint.load(folder_of(tmp_path / "average") / name) for name in ("last.pt", "weights.pt"))
    plain = checkpoint.load(folder_of(tmp_path / "plain") / "weights.pt")["model"]
    assert all(torch.equal(plain[name], value) for name, value in last["training"]["model"].items()), "training itself is as it was"
    assert int(last["training"]["average"]["n_averaged"]) == 9
    for name, value in kept["model"].items():
        assert torch.equal(value, last["training"]["average"][f"module.{name}"])
    assert any(not torch.equal(value, plain[name]) for name, value in kept["model"].items())
    net = trained.load(folder_of(tmp_path / "average"), "cpu", "fp32")
    test = open_beton(betons["beton.test"])
    assert int((net.predict(read_images(test)) == test.labels).sum()) == outcome["correct_tta"]


def test_best_is_the_epoch_with_the_best_evaluation(betons, tmp_path):
    outcome = train(betons, tmp_path, loop__epochs=5, optim__lr=0.3, evaluate__split="holdout", evaluate__holdout_size=30)
    folder = folder_of(tmp_path)
    accuracies = [line["test_accuracy"] for line in logged(folder)]
    best = checkpoint.load(folder / "best.pt")
    assert best["epochs_done"] == outcome["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert outcome["best_accuracy"] == max(accuracies)
    assert checkpoint.load(folder / "weights.pt")["epochs_done"] == 5


def test_an_epoch_trains_on_the_hardest_images(betons, tmp_path, monkeypatch):
    """The last loss of each image is written down beside the run's own book-keeping; the next epoch's images follow from it."""
    seen, losses, rates, note = [], {}, [], loop.Difficulty.note
    rate = loop.set_learning_rate
    monkeypatch.setattr(loop, "set_learning_rate", lambda optimizer, factor: (rates.append(factor), rate(optimizer, factor)))

    def spied(difficulty, logits, labels, indices):
        seen.append(indices.tolist())
        values = torch.nn.functional.cross_entropy(logits.detach().float(), labels, reduction="none")
        losses.setdefault(len(seen), {}).update(zip(indices.tolist(), values.tolist()))
        note(difficulty, logits, labels, indices)
    monkeypatch.setattr(loop.Difficulty, "note", spied)
    outcome = train(betons, tmp_path, loop__hardest=[1, 0.5, 0.25], optim__schedule="onecycle", evaluate__split="holdout",
                    evaluate__holdout_size=30, loader__drop_last=False)
    assert [len(batch) for batch in seen] == [16] * 7 + [8] + [16] * 3 + [12] + [16, 14]    # of 120 images: all, 60, 30
    epochs = [[i for batch in seen[first:last] for i in batch] for first, last in ((0, 8), (8, 12), (12, 14))]
    assert len(set(epochs[0])) == 120
    last = {}
    for epoch, (before, share) in enumerate(((8, 60), (12, 30)), 1):
        for step in range(1, before + 1):
            last.update(losses[step])
        assert set(epochs[epoch]) == set(sorted(last, key=last.get, reverse=True)[:share])
    assert rates == pytest.approx([1 - step / 14 for step in range(14)]), "the schedule counts the steps that there are"
    lines = [json.loads(line) for line in (folder_of(tmp_path) / "log.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [8, 12, 14] and outcome["accuracy"] > 0.5


def test_an_early_share_is_drawn_at_random_where_no_loss_is_known(betons, tmp_path, monkeypatch):
    seen, note = [], loop.Difficulty.note
    monkeypatch.setattr(loop.Difficulty, "note", lambda self, logits, labels, indices: (seen.extend(indices.tolist()),
                                                                                       note(self, logits, labels, indices)))
    train(betons, tmp_path, loop__hardest=[0.5, 1], loop__epochs=2, loader__drop_last=False)
    assert len(seen) == 75 + 150 and set(seen[:75]) == set(loop.epoch_order(150, 0, 0)[:75].tolist()) != set(range(75))
    steps = [json.loads(line) for line in (folder_of(tmp_path) / "log.jsonl").read_text().splitlines()]
    assert [line["train_images"] for line in steps] == [75, 150]


def test_a_share_without_a_batch_is_refused_and_fixed_shares_with_it(betons, tmp_path):
    with pytest.raises(UserError, match="loop.hardest: got 0.1, which leaves 15 images and no batch of loader.batch_size = 16: .* --loader.batch_size 15$"):
        train(betons, tmp_path / "runs", loop__hardest=[1, 0.1])
    with pytest.raises(UserError, match="loop.hardest, loader.shares: got a part of the images and fixed"):
        train(betons, tmp_path / "runs", loop__hardest=[1, 0.5], loader__shares="fixed")
    assert not (tmp_path / "runs").exists()


def test_a_beton_that_is_not_there_is_written_by_a_command_that_names_the_recipe(tmp_path, monkeypatch):
    places = {"beton.train": str(tmp_path / "a.beton"), "beton.test": str(tmp_path / "b.beton")}
    named = f"--beton.train {places['beton.train']} --beton.test {places['beton.test']}`, or"    # not over the recipe's own
    with pytest.raises(UserError, match=f"^beton.train: .*a.beton is not there: .* rn_configs/own_images.yaml --sources.path ... {named}.*\nbeton.test: "):
        loop.prepare(build(places, recipe="own_images"))
    with pytest.raises(UserError, match="write_datasets.py --config-file ... --sources.path ... --beton.train"):
        loop.prepare(build(places, recipe="mine"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rn_configs").mkdir()
    shutil.copy(Path(__file__).parents[1] / "rn_configs/digits.yaml", "rn_configs")
    with pytest.raises(UserError, match="write_datasets.py --config-file rn_configs/digits.yaml`, or") as caught:
        loop.prepare(build(config.read_file("rn_configs/digits.yaml"), recipe="digits"))
    assert "--sources.path" not in str(caught.value)
    (tmp_path / "a.beton").mkdir()
    with pytest.raises(UserError, match="a.beton: is no regular file"):
        loop.prepare(build(places))


def test_a_beton_whose_sidecar_was_left_behind_is_there(betons, tmp_path):
    shutil.copy(betons["beton.train"], tmp_path / "alone.beton")
    with pytest.raises(UserError, match="^.*alone.beton.json: cannot be read .* it belongs to .*alone.beton") as caught:
        loop.prepare(build({**SMALL, **betons, "beton.train": str(tmp_path / "alone.beton")}, recipe="se94"))
    assert f"`python write_datasets.py --config-file rn_configs/se94.yaml --sources.path ... --beton.train {tmp_path}" in str(caught.value)

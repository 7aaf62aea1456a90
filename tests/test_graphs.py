"""Recordings of a step do what the step itself does. Those of a GPU are tested where there is one; what goes into them and comes out
of them everywhere, by a recorder that computes again."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seresnet import compiled, loop
from seresnet.config import build
from seresnet.graphs import Replays, cuda_graphs
from seresnet.runtime import UserError
from test_loop import betons, folder_of, train, weights_hash    # noqa: F401 the first is a fixture

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"))]


def computing_again(log):
    """A recorder that, as a CUDA graph does, computes nothing when it records, and then puts results and gradients where they were."""
    def record(work):
        parameters, buffers = log["parameters"], log.get("buffers", [])
        before = [buffer.clone() for buffer in buffers]
        results = work()
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        gradients = [parameter.grad for parameter in parameters]

        def replay():
            log["replays"] += 1
            for parameter in parameters:
                parameter.grad = None
            for kept, value in zip(results, work()):
                kept.copy_(value)
            for kept, parameter in zip(gradients, parameters):
                if kept is not None:
                    kept.copy_(parameter.grad)
        return replay, results
    return record


def a_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.2), nn.GELU(), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(2, 3, 8, 8))
    net[0].weight.requires_grad_(False)    # as a whitening stem's
    return net


def trained(device, sizes, replayed, log=None):
    """Losses, logits and weights of a net after a step on a batch of each of `sizes`."""
    net = a_net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def gradients(images, labels, weight):
        logits = net(images)
        loss = F.cross_entropy(logits, labels) * weight
        loss.backward()
        return logits.detach(), loss.detach()

    if replayed:
        log.update(parameters=list(net.parameters()), buffers=list(net.buffers()))
        log["replays_of"] = Replays(net.parameters(), computing_again(log) if device == "cpu" else cuda_graphs())
        gradients = log["replays_of"].of(gradients)
    generator, seen = torch.Generator().manual_seed(1), []
    for size in sizes:
        images = torch.randn(size, 3, 8, 8, generator=generator).to(device).to(memory_format=torch.channels_last)
        labels = torch.randint(5, (size,), generator=generator).to(device)
        logits, loss = gradients(images, labels, 1.0)
        seen += [logits.clone(), loss.clone()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return seen + list(net.state_dict().values())


@pytest.mark.parametrize("device", DEVICES)
def test_replayed_steps_are_the_steps_themselves(device):
    sizes, log = [6, 4, 6, 6, 4, 6, 4, 4], {"replays": 0}
    plain, replayed = trained(device, sizes, False), trained(device, sizes, True, log)
    assert len(plain) == len(replayed)
    for one, other in zip(plain, replayed):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert log["replays_of"].recordings == 2 and (device != "cpu" or log["replays"] == len(sizes) - 2)


def test_another_layout_or_number_is_another_recording():
    log = {"replays": 0}
    net = nn.Conv2d(3, 4, 3)
    log["parameters"], seen = list(net.parameters()), []

    def compute(images, weight):
        seen.append((images.shape, images.stride(), weight))
        value = (net(images) * weight).sum()
        value.backward()
        return (value.detach(),)

    run = Replays(net.parameters(), computing_again(log)).of(compute)
    images = torch.randn(2, 3, 6, 6)
    for inputs in ((images, 1.0), (images.to(memory_format=torch.channels_last), 1.0), (images, 2.0), (images[:1], 1.0)):
        before = log["replays"]
        for _ in range(3):
            result, = run(*inputs)
            torch.testing.assert_close(result, (net(inputs[0]) * inputs[1]).sum().detach())
            net.zero_grad()
        assert log["replays"] == before + 2
    assert len(set(seen)) == 4


def test_an_argument_is_copied_not_kept():
    net = nn.Linear(3, 1, bias=False)
    log = {"replays": 0, "parameters": list(net.parameters())}

    def compute(x):
        value = net(x).sum()
        value.backward()
        return (value.detach(),)
    run = Replays(net.parameters(), computing_again(log)).of(compute)
    buffer = torch.ones(2, 3)
    for number in range(5):    # a loader's buffer, filled anew
        buffer.fill_(number)
        run(buffer)
        torch.testing.assert_close(net.weight.grad, torch.full((1, 3), 2.0 * number))
        net.zero_grad(set_to_none=True)


TWO_SHAPES = {"model__channels": [16, 32], "augment__sides": [12, 16], "optim__name": "muon", "loop__epochs": 4}    # of batches


@pytest.mark.parametrize("changes", [{}, {"optim__ema_decay": 0.9, "optim__clip_norm": 1.0}, {"loop__hardest": [1, 0.5]},
                                     {"optim__sam_radius": 0.1, "optim__sam_from": 0.4},
                                     {"optim__sam_radius": 0.1, "optim__sam_from": 0.4, "optim__sam_share": 0.5},
                                     {"loader__drop_last": False, "optim__name": "sgd"}], ids=lambda changes: ", ".join(changes) or "plain")
def test_a_training_with_recordings_has_the_same_weights(betons, tmp_path, monkeypatch, changes):
    log, whole = {"replays": 0}, loop.open_session

    def with_recordings(*arguments):
        session = whole(*arguments)
        log.update(parameters=list(session.model.parameters()), buffers=list(session.model.buffers()))
        return replace(session, replays=Replays(session.model.parameters(), computing_again(log)))
    outcomes = [train(betons, tmp_path / "plain", **{**TWO_SHAPES, **changes})]
    monkeypatch.setattr(loop, "open_session", with_recordings)
    outcomes.append(train(betons, tmp_path / "recorded", **{**TWO_SHAPES, **changes}))
    assert outcomes[0]["loss"] == outcomes[1]["loss"] and outcomes[0]["accuracy"] == outcomes[1]["accuracy"] > 0.6
    one, other = (weights_hash(folder_of(tmp_path / name)) for name in ("plain", "recorded"))
    assert one == other and log["replays"] > 20
    if "optim__sam_radius" in changes:
        monkeypatch.setattr(loop, "open_session", whole)
        for other in ({"optim__sam_radius": 0.0}, {"optim__sam_from": 0.8}, {"optim__sam_share": 0.9}):
            train(betons, tmp_path / str(other), **{**TWO_SHAPES, **changes, **other})
            assert weights_hash(folder_of(tmp_path / str(other))) != one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("changes", [
    {"run__precision": "fp32"}, {"run__precision": "bf16"}, {"run__precision": "fp16", "optim__name": "sgd"}, {"loader__mode": "stream"},
    {"model__dropout": 0.3}, {"optim__sam_radius": 0.1, "optim__sam_from": 0.5}, {"run__precision": "fp16", "optim__sam_radius": 0.1}],
    ids=lambda changes: ", ".join(map(str, changes.values())))
def test_a_training_on_a_gpu_is_the_same_with_graphs(betons, tmp_path, monkeypatch, changes):
    """In passes of its own, which small batches do not take otherwise."""
    sessions, whole = [], loop.open_session
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "use_triton", lambda wanted: None)
    monkeypatch.setattr(compiled, "_triton_is_wanted", True)
    monkeypatch.setattr(loop, "open_session", lambda *arguments: sessions.append(whole(*arguments)) or sessions[-1])
    outcomes = [train(betons, tmp_path / str(graphs), run__device="cuda", run__cuda_graphs=graphs, **{**TWO_SHAPES, **changes})
                for graphs in (True, False)]
    assert outcomes[0]["loss"] == pytest.approx(outcomes[1]["loss"], abs=0.03)
    assert outcomes[0]["accuracy"] > 0.8
    assert sessions[0].replays.recordings == 2 and sessions[1].replays is None    # one for crops, one for whole images


@pytest.mark.parametrize("device, processes, changes, wanted", [
    ("cuda", 1, {}, True), ("cuda:1", 1, {}, True), ("cpu", 1, {}, False), ("cuda", 2, {}, False), ("cuda", 1, {"run.compile": True}, False),
    ("cuda", 1, {"run.cuda_graphs": False}, False)])
def test_where_steps_are_recorded(device, processes, changes, wanted):
    assert loop.wants_graphs(build(changes), torch.device(device), processes) == wanted


def test_a_step_that_cannot_be_recorded_names_the_key(betons, tmp_path, monkeypatch):
    whole = loop.open_session

    def record(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    monkeypatch.setattr(loop, "open_session", lambda *arguments: replace(whole(*arguments), replays=Replays([], record)))
    with pytest.raises(UserError, match=r"run.cuda_graphs: .*\(RuntimeError: operation not permitted when stream is capturing\): "
                                        "--run.cuda_graphs false"):
        train(betons, tmp_path)

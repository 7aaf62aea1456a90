"""Recordings of a step do what the step itself does. Those of a GPU are tested where there is one; what goes into them and comes out
of them everywhere, by a recorder that computes again."""
import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seresnet import compiled, loop, runtime
from seresnet.config import build
from seresnet.graphs import NotRecorded, Repeats, Replays, cuda_graphs, few_ahead
from seresnet.optim import Muon
from seresnet.runtime import DeviceFailed, UserError
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


def doing_again(log):
    """A recorder of what changes tensors in place: as a CUDA graph, it changes nothing when it records."""
    def record(work):
        before = [(tensor, tensor.clone()) for tensor in log["tensors"]()]
        results = work()
        for tensor, value in before:
            tensor.copy_(value)
        log["recordings"] = log.get("recordings", 0) + 1

        def replay():
            log["replays"] = log.get("replays", 0) + 1
            work()
        return replay, results
    return record


def test_what_is_done_in_place_is_repeated_where_the_tensors_lie_as_before():
    x, other, log = torch.zeros(2, 3), torch.zeros(2, 3), {"tensors": lambda: [x, other]}
    repeats = Repeats(doing_again(log))
    for number, (tensor, constant) in enumerate([(x, 1), (x, 1), (other, 1), (x, 2), (x, 1), (x, 2), (x, 2), (x.t(), 1), (x.t(), 1)]):
        before = tensor.clone()
        repeats.run(lambda to=tensor, by=constant: to.add_(by), [tensor], constant)
        assert torch.equal(tensor, before + constant), number
    assert repeats.recordings == log["recordings"] == 3 and log["replays"] == 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_recorded_update_of_muon_is_the_update_itself(device, nesterov):
    """Two sets of gradients, at addresses of their own each, and a learning rate that falls."""
    outcomes, logs = [], []
    for recorded in (False, True):
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((8, 4, 3, 3), (8, 4, 3, 3), (5, 8), (5,))]
        places = [[torch.empty_like(p) for p in weights] for _ in range(2)]
        log = {"tensors": lambda: [*(p.data for p in weights), *(state["momentum_buffer"] for state in optimizer.state.values())]}
        record = (doing_again(log) if device == "cpu" else cuda_graphs()) if recorded else None
        optimizer = Muon([dict(params=weights[:2], orthogonal=True), dict(params=weights[2:], weight_decay=0.1)], nesterov=nesterov, record=record)
        for step in range(9):
            for p, gradient in zip(weights, places[step % 3 == 2]):
                p.grad = gradient.copy_(torch.randn(p.shape, generator=generator))
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / 9)
            optimizer.step()
        outcomes.append([tensor.detach().clone() for tensor in log["tensors"]()])
        logs.append(log)
    for one, other in zip(*outcomes):
        torch.testing.assert_close(one, other, rtol=1e-3 if device == "cuda" else 1e-5, atol=1e-3 if device == "cuda" else 1e-6)
    assert optimizer.repeats.recordings == 2 and (device != "cpu" or logs[1]["replays"] == 9 - 2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)    # momentum lies elsewhere now: recordings of the old places are not for it
    for _ in range(3):
        optimizer.step()
    assert optimizer.repeats.recordings == 3
    another = copy.deepcopy(optimizer)
    another.step()
    assert another.repeats is None


def test_a_parameter_without_a_gradient_is_left_alone_by_a_recorded_update():
    weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
    log = {"tensors": lambda: [p.data for p in weights]}
    optimizer = Muon([dict(params=weights, lr=0.5, momentum=0.0)], record=doing_again(log))
    optimizer.step()
    for step in range(1, 5):
        weights[0].grad = torch.ones(3) if step == 1 else weights[0].grad
        optimizer.step()
        assert torch.equal(weights[0].detach(), torch.ones(3) - 0.5 * step) and torch.equal(weights[1].detach(), torch.ones(3))
    assert optimizer.repeats.recordings == 1


def test_an_update_that_cannot_be_recorded_says_why():
    def record(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    repeats, x = Repeats(record), torch.zeros(2)
    repeats.run(lambda: None, [x], 0)
    with pytest.raises(NotRecorded, match="^RuntimeError: operation not permitted when stream is capturing$"):
        repeats.run(lambda: None, [x], 0)


TWO_SHAPES = {"model__channels": [16, 32], "augment__sides": [12, 16], "optim__name": "muon", "loop__epochs": 4}    # of batches


@pytest.mark.parametrize("changes", [{}, {"optim__ema_decay": 0.9, "optim__clip_norm": 1.0}, {"loop__hardest": [1, 0.5]},
                                     {"optim__sam_radius": 0.1, "optim__sam_from": 0.4},
                                     {"optim__sam_radius": 0.1, "optim__sam_from": 0.4, "optim__sam_share": 0.5},
                                     {"loader__drop_last": False, "optim__name": "sgd"}], ids=lambda changes: ", ".join(changes) or "plain")
def test_a_training_with_recordings_has_the_same_weights(betons, tmp_path, monkeypatch, changes):
    log, whole, updates = {"replays": 0}, loop.open_session, {}

    def with_updates(*arguments):
        """Muon's by the arithmetic of recordings, which rounds otherwise."""
        session = whole(*arguments)
        if isinstance(session.optimizer, Muon):
            updates["tensors"] = lambda: [*session.model.state_dict().values(),
                                          *(state["momentum_buffer"] for state in session.optimizer.state.values())]
            session.optimizer.repeats = Repeats(doing_again(updates))
        return session

    def with_recordings(*arguments):
        session = with_updates(*arguments)
        updates.update(replays=0)
        log.update(parameters=list(session.model.parameters()), buffers=list(session.model.buffers()))
        return replace(session, replays=Replays(session.model.parameters(), computing_again(log)))
    monkeypatch.setattr(loop, "open_session", with_updates)
    outcomes = [train(betons, tmp_path / "plain", **{**TWO_SHAPES, **changes})]
    monkeypatch.setattr(loop, "open_session", with_recordings)
    outcomes.append(train(betons, tmp_path / "recorded", **{**TWO_SHAPES, **changes}))
    assert outcomes[0]["loss"] == outcomes[1]["loss"] and outcomes[0]["accuracy"] == outcomes[1]["accuracy"] > 0.6
    one, other = (weights_hash(folder_of(tmp_path / name)) for name in ("plain", "recorded"))
    assert one == other and log["replays"] > 20 and ("optim__name" in changes or updates["replays"] > 20)
    if "optim__sam_radius" in changes:
        monkeypatch.setattr(loop, "open_session", with_updates)
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
    if "optim__name" not in changes:    # Muon
        assert sessions[0].optimizer.repeats.recordings == 2 and sessions[1].optimizer.repeats is None


def test_few_replays_wait_for_the_device():
    """Of a device that does nothing until it is waited for, and then all up to there."""
    done, asked, waits = [], [], []

    class Event:
        def record(self):
            self.behind = len(asked)

        def synchronize(self):
            waits.append(len(asked) - self.behind)
            done[:] = asked[:max(len(done), self.behind)]
    replay = few_ahead(lambda: asked.append(len(asked)), [Event(), Event()])
    for count in range(1, 8):
        replay()
        assert len(asked) == count and len(asked) - len(done) <= 2
    assert waits == [1] * 5, "it waits for the oldest alone: the other is at work meanwhile"


def test_a_device_that_fails_is_told_with_the_way_on(betons, tmp_path, monkeypatch):
    whole = loop.open_session

    def fails(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'")
    monkeypatch.setattr(loop, "open_session", lambda *arguments: replace(whole(*arguments), replays=SimpleNamespace(of=lambda _: fails)))
    with pytest.raises(DeviceFailed, match=f"^CUDA error: unspecified launch failure: the device has failed.* --run.resume {re.escape(str(tmp_path))}"):
        train(betons, tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_whether_the_device_answers_is_asked_where_no_other_process_may_keep_it_waiting(tmp_path, monkeypatch, processes):
    asked = []
    monkeypatch.setattr(runtime, "cuda_answers", lambda: asked.append(1))
    with pytest.raises(DeviceFailed if processes == 1 else RuntimeError, match="Connection closed by peer"):
        with loop.device_failure_explained(torch.device("cuda"), tmp_path, processes):
            raise RuntimeError("Connection closed by peer")
    assert len(asked) == (processes == 1)


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

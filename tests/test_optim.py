"""optim: every parameter in one group of its kind, schedules by table, clipping and steps against plain arithmetic."""
import copy
import math

import pytest
import torch
from torch import nn

from seresnet import config, optim
from seresnet.model import SEResNet, SqueezeExcitation


def net(**changes):
    torch.manual_seed(0)
    return SEResNet(**{**dict(blocks=[1, 1], channels=[8], classes=5, image_size=16, se="block"), **changes})


def test_words_of_the_config_are_those_of_the_module():
    fields = config.Optim.__dataclass_fields__
    assert {n: fields[n].metadata["limits"]["one_of"] for n in ("name", "schedule")} == {
        "name": optim.OPTIMIZERS, "schedule": optim.SCHEDULES}


@pytest.mark.parametrize("changes", [dict(), dict(stem="whiten", downsample="pool"), dict(se="stem")])
def test_every_trainable_parameter_is_in_exactly_one_kind(changes):
    model = net(**changes)
    kinds = optim.parameters_by_kind(model)
    ids = [id(p) for parameters in kinds.values() for p in parameters]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    kind_of = {id(p): kind for kind, parameters in kinds.items() for p in parameters}
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            assert {kind_of[id(p)] for p in module.parameters()} == {"se"}
        if isinstance(module, nn.BatchNorm2d):
            assert (kind_of[id(module.weight)], kind_of[id(module.bias)]) == ("norm_scale", "norm_bias")
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            assert kind_of[id(module.weight)] == "conv"
    assert (kind_of[id(model.head.weight)], kind_of[id(model.head.bias)]) == ("linear", "bias")


def test_a_parameter_of_no_known_kind_is_an_error():
    with pytest.raises(TypeError, match="LayerNorm.weight"):
        optim.parameters_by_kind(nn.Sequential(nn.LayerNorm(3)))


def test_groups_carry_their_own_rate_and_decay():
    optimizer = optim.build_optimizer(net(), name="sgd", lr=0.5, weight_decay=0.01, linear_lr_scale=2,
                                      norm_bias_lr_scale=8, se_lr_scale=0.1)
    rates = {g["kind"]: (g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert rates == {"conv": (0.5, 0.01), "linear": (1.0, 0.01), "norm_scale": (0.5, 0), "norm_bias": (4, 0), "bias": (0.5, 0), "se": (0.05, 0.01)}
    optim.set_learning_rate(optimizer, 0.5)
    assert {g["kind"]: g["lr"] for g in optimizer.param_groups} == {k: v[0] / 2 for k, v in rates.items()}
    everything = optim.build_optimizer(net(), name="adamw", lr=0.5, weight_decay=0.01, decay="all")
    assert {g["weight_decay"] for g in everything.param_groups} == {0.01}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_decay_per_schedule_shrinks_every_kind_alike(name):
    model = net()
    optimizer = optim.build_optimizer(model, name=name, lr=0.5, momentum=0.0, sgd_momentum=0.0, sgd_lr=2.0, weight_decay=0.01,
                                      decay="all", decay_per="schedule", norm_bias_lr_scale=8, se_lr_scale=0.1)
    optim.set_learning_rate(optimizer, 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    convolutions = {id(p) for p in optim.parameters_by_kind(model)["conv"]}
    for n, p in model.named_parameters():
        if name != "muon" or id(p) not in convolutions:
            assert torch.allclose(p, before[n] * (1 - 0.01 * 0.5), atol=1e-7), n


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_step_is_the_formula(nesterov):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = optim.build_optimizer(model, name="sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    weight, velocity = model[0].weight.detach().double().clone(), torch.zeros(2, 3, dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(2, 3)
        model[0].weight.grad = gradient.clone()
        optimizer.step()
        total = gradient.double() + 0.01 * weight
        velocity = 0.9 * velocity + total
        weight -= 0.1 * (total + 0.9 * velocity if nesterov else velocity)
    assert torch.allclose(model[0].weight.double(), weight, atol=1e-6)


COMMON = dict(total_steps=100, warmup_steps=20, start=0.2, final=0.1)


@pytest.mark.parametrize("schedule, table", [
    ("onecycle", {0: 0.2, 10: 0.6, 20: 1.0, 60: 0.55, 99: 0.1 + 0.9 / 80, 100: 0.1}),
    ("cosine", {0: 0.2, 20: 1.0, 60: 0.55, 40: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 100: 0.1}),
    ("constant", {0: 0.2, 19: 0.96, 20: 1.0, 99: 1.0}),
    ("step", {0: 0.2, 20: 1.0, 49: 1.0, 50: 0.5, 79: 0.5, 80: 0.25, 99: 0.25}),
])
def test_schedules_by_table(schedule, table):
    for step, factor in table.items():
        got = optim.learning_rate_factor(step, schedule=schedule, milestones=(50, 80), gamma=0.5, **COMMON)
        assert got == pytest.approx(factor), step


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_schedules_begin_at_the_peak_without_warm_up_and_stay_within_bounds(schedule):
    factors = [optim.learning_rate_factor(s, schedule=schedule, total_steps=50, milestones=(20,)) for s in range(50)]
    assert factors[0] == 1.0 and all(0 <= f <= 1 for f in factors)
    assert factors == sorted(factors, reverse=True)


def test_clipping_by_norm_and_by_value():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    gradients = [torch.tensor([3.0, -0.05, 0.0]), torch.tensor([4.0, 0.02])]

    def clipped(**limits):
        for p, g in zip(parameters, gradients):
            p.grad = g.clone()
        optim.clip_gradients(parameters, **limits)
        return torch.cat([p.grad for p in parameters])
    flat = torch.cat(gradients)
    assert torch.equal(clipped(), flat)
    assert torch.equal(clipped(value=0.1), flat.clamp(-0.1, 0.1))
    assert clipped(norm=1.0).norm().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(clipped(norm=1.0), flat / flat.norm(), atol=1e-5)
    assert torch.allclose(clipped(norm=100.0), flat)


def test_gradients_are_clipped_and_climbed_where_torch_has_no_kernels_for_lists():
    """As on Apple's GPUs; torch refuses there, if it is told to use them."""
    parameters = [nn.Parameter(torch.zeros(3, device="meta"))]
    parameters[0].grad = torch.ones(3, device="meta")
    optim.clip_gradients(parameters, norm=1.0, value=1.0)
    with optim.ascended(parameters, [], 0.1):
        assert parameters[0].grad is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="optimizer: 'lion' is not one of sgd, adamw"):
        optim.build_optimizer(net(), name="lion", lr=1.0)
    with pytest.raises(ValueError, match="schedule: 'saw'"):
        optim.learning_rate_factor(30, schedule="saw", **COMMON)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalising_keeps_the_singular_vectors_and_levels_the_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    got = optim.orthogonalise(matrices, steps=5, dtype=torch.float32).double()
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    # In the basis of the singular vectors the result has to be diagonal, with values around 1.
    inside = u.mT @ got @ vh.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-4
    assert 0.6 < values.min() and values.max() < 1.25
    assert torch.allclose(got @ vh.mT @ vh, got, atol=1e-4)    # nothing outside the matrix's own row space


def test_orthogonalising_in_bf16_is_near_the_exact_polar_factor():
    torch.manual_seed(1)
    matrices = torch.randn(2, 64, 576)
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    got, want = optim.orthogonalise(matrices, steps=5, dtype=torch.bfloat16).double(), u @ vh
    cosine = (got * want).sum((1, 2)) / got.norm(dim=(1, 2)) / want.norm(dim=(1, 2))
    assert cosine.min() > 0.98 and got.isfinite().all()
    assert optim.orthogonalise(torch.zeros(1, 4, 8)).abs().max() == 0


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_orthogonalising_counts_in_what_the_device_multiplies_in(native, dtype, monkeypatch):
    """Emulated, bfloat16 took fifty times as long as float32 on a CPU, and longer than the rest of a step."""
    asked = []
    monkeypatch.setattr(optim, "has_bf16", lambda device: asked.append(device) or native)
    matrices = torch.randn(2, 16, 40)
    assert torch.equal(optim.orthogonalise(matrices), optim.orthogonalise(matrices, dtype=dtype)) and asked == [matrices.device]


def test_orthogonalising_as_a_training_does_it_levels_what_is_not_tiny():
    """The default rounds and number format: values from 0.0125 of the Frobenius norm on end near 1, a tiny one grows 41 times at most."""
    torch.manual_seed(2)
    u, _ = torch.linalg.qr(torch.randn(64, 64))
    v, _ = torch.linalg.qr(torch.randn(576, 64))
    values = torch.linspace(0.0125, 0.2, 64)
    values[0] = 0.001
    values[-1] = (1 - values[:-1].square().sum()).sqrt()
    got = optim.orthogonalise((u @ torch.diag(values) @ v.T)[None])[0]
    found = (u.T @ got @ v).diagonal()
    assert 0.45 < found[1:].min() and found[1:].max() < 1.25 and 0.02 < found[0] < 0.001 * 42    # 3.4445 cubed is 40.9; bf16 rounds


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_step_is_the_formula_for_convolutions_and_sgd_elsewhere(nesterov):
    model = net().to(memory_format=torch.channels_last)
    optimizer = optim.build_optimizer(model, name="muon", lr=0.1, momentum=0.6, nesterov=nesterov, sgd_lr=0.2,
                                      sgd_momentum=0.85, weight_decay=0.01, norm_bias_lr_scale=2)
    rates = {g["kind"]: (g["peak_lr"], g["momentum"], g["orthogonal"]) for g in optimizer.param_groups}
    assert rates["conv"] == (0.1, 0.6, True) and rates["norm_bias"] == (0.4, 0.85, False)
    assert rates["linear"] == (0.2, 0.85, False)
    owner = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    want = {p: p.detach().double().clone() for p in model.parameters()}
    velocity = {p: torch.zeros_like(v) for p, v in want.items()}
    for step in range(3):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, weight in want.items():
            group, gradient = owner[id(p)], p.grad.double()
            if not group["orthogonal"]:
                gradient = gradient + group["weight_decay"] * weight
            velocity[p] = group["momentum"] * velocity[p] + gradient
            update = gradient + group["momentum"] * velocity[p] if nesterov else velocity[p]
            if group["orthogonal"]:
                matrix = update.reshape(1, len(p), -1)
                update = optim.orthogonalise(matrix).double().reshape(p.shape)
                weight = weight / weight.norm() * len(p) ** 0.5
            want[p] = weight - group["lr"] * update
    for p, weight in want.items():
        assert torch.allclose(p.double(), weight, atol=6e-3 if owner[id(p)]["orthogonal"] else 1e-5)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)


def test_muon_state_survives_saving():
    def steps(optimizer, model, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    first, second = net(), net()
    a, b = (optim.build_optimizer(m, name="muon", lr=0.1, momentum=0.6) for m in (first, second))
    steps(a, first, [0, 1])
    second.load_state_dict(first.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))    # torch would share the buffers
    steps(a, first, [2])
    steps(b, second, [2])
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_first_step_that_the_gradient_scaler_skips_leaves_nothing_behind(name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)    # memory that nobody has filled holds NaN
    try:
        model, scaler = net(), torch.amp.GradScaler("cpu")
        optimizer = optim.build_optimizer(model, name=name, lr=0.01, fused=False)
        average = optim.average_weights(model, 0.5)
        optim.follow(average, model, optimizer)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.full_like(p, math.inf if step == 0 else 1.0)
            scaler.scale(torch.zeros(()))
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert all(p.isfinite().all() for p in model.parameters()) and int(average.n_averaged) == 2
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_average_is_that_of_a_plain_loop_buffers_included(name):
    model, decay = net().to(memory_format=torch.channels_last), 0.75
    average = optim.average_weights(model, decay)
    optimizer = optim.build_optimizer(model, name=name, lr=0.01)
    optim.follow(average, model, optimizer)
    generator, wanted = torch.Generator().manual_seed(0), None
    for step in range(6):
        model(torch.randn(4, 3, 16, 16, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = {key: value.double() for key, value in model.state_dict().items()}
        wanted = now if wanted is None else {key: decay * wanted[key] + (1 - decay) * now[key] for key in now}
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), wanted[key], atol=1e-6), key
    assert not torch.equal(average.module.head.weight, model.head.weight)


def test_every_value_gets_its_share_of_the_epochs():
    assert [optim.stepwise([20, 28, 32], epoch, 9, 0) for epoch in range(9)] == [20] * 3 + [28] * 3 + [32] * 3
    assert [optim.stepwise([24, 32], epoch, 5, 0) for epoch in range(5)] == [24, 24, 24, 32, 32]
    assert optim.stepwise([], 3, 9, 0.5) == 0.5


def test_gradients_of_sharpness_aware_minimisation_are_those_up_the_slope():
    """Against the formula, in float64: the gradient at w + radius * g / |g|, over all parameters together; all else as it was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    net[0].bias.requires_grad_(False)
    x, labels, radius = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3, 0.3

    def backward():
        nn.functional.cross_entropy(net(x), labels).backward()
    backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    gradient = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    length = torch.sqrt(sum(g.square().sum() for g in gradient.values()))
    with optim.ascended(list(parameters.values()), list(net.buffers()), radius):
        for name, g in gradient.items():
            torch.testing.assert_close(parameters[name].detach(), before[name] + radius * g / length)
        assert all(p.grad is None for p in parameters.values())
        backward()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())    # statistics and their count, too
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert found.keys() == gradient.keys()

    def loss(values):
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, x), labels)
    values = {name: before[name] + radius * gradient[name] / length if name in gradient else before[name] for name in parameters}
    expected = torch.autograd.grad(loss({k: v.requires_grad_() for k, v in values.items()}), [values[name] for name in found])
    for name, value in zip(found, expected):
        torch.testing.assert_close(found[name], value)
        assert not torch.allclose(value, gradient[name], rtol=1e-2)


def test_where_gradients_have_overflowed_nothing_is_moved():
    """0 times infinity would make NaN of every weight, and of the losses that are counted there."""
    net = nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    net.weight.grad[0, 0] = torch.inf
    before = net.weight.detach().clone()
    with optim.ascended(list(net.parameters()), [], 1.0, overflows=True):
        assert torch.equal(net.weight, before) and net.weight.grad is None
    net(torch.ones(1, 3)).sum().backward()
    with optim.ascended(list(net.parameters()), [], 1.0, overflows=True):
        assert not torch.equal(net.weight, before)


def test_weights_come_back_from_the_slope_where_a_step_fails_there():
    net = nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.detach().clone()
    with pytest.raises(MemoryError), optim.ascended(list(net.parameters()), [], 1.0):
        assert not torch.equal(net.weight, before)
        raise MemoryError
    assert torch.equal(net.weight, before)

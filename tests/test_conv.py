"""conv: the same convolution and gradients whichever way they are computed, and chosen where it pays."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seresnet import conv


def tensors(count, c_in, c_out, height, width, dtype=torch.bfloat16):
    torch.manual_seed(0)
    x = torch.randn(count, c_in, height, width).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    return x, (torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5)).requires_grad_()


def gradients(output, x, weight):
    torch.manual_seed(1)
    return torch.autograd.grad(output, (x, weight), torch.randn(output.shape).to(output.dtype))


@pytest.fixture
def matrix_units(monkeypatch):
    monkeypatch.setattr(conv, "has_matrix_units", lambda: True)


@pytest.fixture
def taken(monkeypatch):
    """How often the gradient was taken side by side."""
    calls, side_by_side = [], conv.side_by_side
    monkeypatch.setattr(conv, "side_by_side", lambda *args: calls.append(args) or side_by_side(*args))
    return calls


@pytest.mark.parametrize("padding, height, width", [(1, 6, 6), (1, 3, 3), (1, 1, 1), (1, 5, 13), (1, 13, 5), (0, 8, 8), (0, 14, 14),
                                                    (0, 5, 3)])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 32])
@pytest.mark.parametrize("many_weights", [False, True])
def test_gradients_are_those_of_float64(many_weights, count, padding, height, width, matrix_units, taken, monkeypatch):
    """Of counts that fill rows, and of such that leave a rest; the same within bfloat16's rounding."""
    monkeypatch.setattr(conv, "MANY_WEIGHTS", 0 if many_weights else 1 << 20)
    throughout, apply = [], conv.SideBySideThroughout.apply
    monkeypatch.setattr(conv.SideBySideThroughout, "apply", lambda *args: throughout.append(args) or apply(*args))
    x, weight = tensors(count, 5, 7, height, width)
    output = conv.convolve(x, weight, stride=1, padding=padding)
    got = gradients(output, x, weight)
    assert len(taken) == 2 and len(throughout) == (padding == 1 and width <= (7 if many_weights else 4))
    assert count == 0 or all(t.is_contiguous(memory_format=torch.channels_last) for t in (output, got[0]))
    exact = [t.detach().to(torch.bfloat16).double().requires_grad_() for t in (x, weight)]
    expected = F.conv2d(*exact, padding=padding)
    assert torch.allclose(output.double(), expected, atol=0.03)
    for mine, theirs, dtype in zip(got, gradients(expected, *exact), (torch.bfloat16, torch.float32)):
        assert mine.dtype == dtype and mine.isfinite().all()
        assert torch.allclose(mine.double(), theirs, rtol=0, atol=0.01 * float(theirs.abs().amax() if theirs.numel() else 0))


def test_side_by_side_keeps_every_pixel_and_writes_zeros_elsewhere():
    images = torch.arange(1, 1 + 5 * 2 * 3 * 4).view(5, 2, 3, 4).to(memory_format=torch.channels_last)
    rows = conv.side_by_side(images, row=2, period=6, first=1)
    assert rows.shape == (3, 2, 3, 12) and rows.is_contiguous(memory_format=torch.channels_last)
    for i in range(6):
        place = rows[i // 2, :, :, i % 2 * 6:][..., :6]
        expected = F.pad(images[i] if i < 5 else torch.zeros_like(images[0]), (1, 1))
        assert torch.equal(place, expected)


@pytest.mark.parametrize("count, row", [(1, 4), (8, 4), (7, 3), (0, 2)])
def test_apart_undoes_side_by_side(count, row):
    images = torch.randn(count, 5, 3, 6).to(memory_format=torch.channels_last)
    again = conv.apart(conv.side_by_side(images, row, 7, 0), count, row, 7)
    assert torch.equal(again, images) and (count == 0 or again.is_contiguous(memory_format=torch.channels_last))


def test_a_second_derivative_is_refused_not_wrong(matrix_units):
    x, weight = tensors(4, 3, 3, 4, 4)
    of_weight, = torch.autograd.grad(conv.convolve(x, weight, 1, 1).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        of_weight.sum().backward()


def test_the_gradient_of_a_frozen_weight_or_input_is_not_computed(matrix_units, taken):
    x, weight = tensors(4, 3, 3, 6, 6)
    conv.convolve(x.detach(), weight, 1, 1).sum().backward()
    assert len(taken) == 2 and weight.grad is not None and x.grad is None
    conv.convolve(x, weight.detach().to(x.dtype), 1, 1).sum().backward()
    assert len(taken) == 2 and x.grad is not None


@pytest.mark.parametrize("why, settings", [
    ("no matrix units", dict(units=False)), ("float32", dict(dtype=torch.float32)), ("stride", dict(stride=2)),
    ("wide images", dict(width=14)), ("no gradients", dict(grad=False)), ("1x1", dict(kernel=1))])
def test_torch_does_it_where_nothing_is_gained(why, settings, monkeypatch, taken):
    monkeypatch.setattr(conv, "has_matrix_units", lambda: settings.get("units", True))
    x, weight = tensors(4, 3, 3, 6, settings.get("width", 6), settings.get("dtype", torch.bfloat16))
    if settings.get("kernel") == 1:
        weight = weight[:, :, :1, :1].detach().requires_grad_()
    padding = weight.shape[2] // 2
    with torch.set_grad_enabled(settings.get("grad", True)), torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float32):
        output = conv.convolve(x, weight, settings.get("stride", 1), padding)
    if output.requires_grad:
        output.float().sum().backward()
    assert not taken, why


@pytest.mark.parametrize("height, width", [(7, 7), (6, 7), (7, 6), (15, 15), (8, 8)])
def test_what_pooling_drops_is_not_computed_with_matrix_units_either(height, width, matrix_units):
    torch.manual_seed(0)
    layer = conv.ConvBeforePool(4, 6).to(memory_format=torch.channels_last)
    x, _ = tensors(9, 4, 6, height, width)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.max_pool2d(layer(x), 2)
    got = gradients(got, x, layer.weight)
    exact = [t.detach().to(torch.bfloat16).float().requires_grad_() for t in (x, layer.weight)]
    expected = gradients(F.max_pool2d(F.conv2d(*exact, padding=1), 2), *exact)
    for mine, theirs in zip(got, expected):    # a few maxima tie in bfloat16 and not in float32
        assert F.cosine_similarity(mine.float().flatten(), theirs.flatten(), dim=0) > 0.99


def test_this_machine_says_whether_it_has_matrix_units():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "flags" not in cpuinfo.read_text():
        pytest.skip("this system does not list the CPU's flags")
    assert conv.has_matrix_units() == ("amx_tile" in cpuinfo.read_text().split())

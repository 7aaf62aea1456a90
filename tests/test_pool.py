"""pool: the compiled max-pooling takes and gives back what torch's does."""
import pytest
import torch
import torch.nn.functional as F

from seresnet import compiled, pool


@pytest.fixture
def always(calls_of):
    return calls_of(pool._MaxPool2x2)


def batch(count, channels, height, width, dtype=torch.bfloat16, device="cpu"):
    torch.manual_seed(0)
    return torch.randn(count, channels, height, width).to(device, dtype).to(memory_format=torch.channels_last).requires_grad_()


def both_ways(x, layer):
    results = []
    for way in (layer, lambda t: F.max_pool2d(t, 2)):
        output = way(x)
        torch.manual_seed(1)
        results += [output.detach(), *torch.autograd.grad(output, x, torch.randn(output.shape).to(output))]
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count, channels, height, width", [(3, 64, 26, 26), (1, 5, 7, 9), (4, 33, 2, 3), (2, 1, 6, 5), (50, 8, 4, 4)])
def test_it_is_torchs_max_pooling_bit_for_bit_of_ordinary_numbers(count, channels, height, width, dtype, compiled_for, always):
    """Ties among them: 50 x 8 x 4 x 4 bfloat16 values of a normal distribution hold hundreds."""
    x = batch(count, channels, height, width, device=compiled_for.device).detach().to(dtype).requires_grad_()
    mine, of_mine, theirs, of_theirs = both_ways(x, pool.MaxPool2x2())
    assert len(always) == 1
    assert torch.equal(mine, theirs) and torch.equal(of_mine, of_theirs)
    for tensor in (mine, of_mine):
        assert tensor.dtype == dtype and tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf"), 3e38, -1e-40])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_ordinary_number_passes_as_in_torch(dtype, value, place, compiled_for, always):
    x = batch(2, 3, 4, 4, dtype, compiled_for.device).detach()
    x[0, 1, 2 + place // 2, place % 2] = value
    x[1] = value    # and everywhere
    mine, of_mine, theirs, of_theirs = both_ways(x.requires_grad_(), pool.MaxPool2x2())
    assert torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.nan_to_num(0), theirs.nan_to_num(0))
    without = theirs[1].isnan()    # of several NaN torch takes the last
    if x.is_cuda:
        without |= theirs[1].isneginf()    # and where there is but -inf, some pixel elsewhere
    where = ~without.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(of_mine[0], of_theirs[0]) and torch.equal(of_mine[1][where], of_theirs[1][where])


def test_a_gradient_that_is_expanded_or_laid_out_otherwise_is_taken(compiled_for, always):
    x = batch(2, 3, 4, 6, device=compiled_for.device)
    pool.MaxPool2x2()(x).sum().backward()    # its gradient is one number, expanded
    assert len(always) == 1 and x.grad.sum() == 2 * 3 * 2 * 3 and set(x.grad.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("why, change", [
    ("float64", dict(dtype=torch.float64)), ("its input is frozen", dict(grad=False)),
    ("channels first", dict(layout=torch.contiguous_format))])
def test_torch_does_it_elsewhere(why, change, always):
    x = batch(2, 3, 6, 6, change.get("dtype", torch.bfloat16)).detach()
    x = x.contiguous(memory_format=change.get("layout", torch.channels_last)).requires_grad_(change.get("grad", True))
    assert torch.equal(pool.MaxPool2x2()(x), F.max_pool2d(x, 2)) and not always, why


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_takes_it_too(dtype, without, compiled_for, always):
    x = batch(3, 33, 7, 9, dtype, compiled_for.device).detach()
    with without():
        output = pool.MaxPool2x2()(x)
    assert len(always) == 1 and torch.equal(output, F.max_pool2d(x, 2)) and output.is_contiguous(memory_format=torch.channels_last)


def test_torch_does_it_without_numba_and_for_little(monkeypatch, always):
    x = batch(2, 3, 6, 6)
    monkeypatch.setattr(compiled, "LEAST", x.numel() + 1)
    pool.MaxPool2x2()(x)
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "passes_for", lambda x: None)
    pool.MaxPool2x2()(x)
    assert not always


def test_no_images_have_no_maxima(compiled_for, always):
    x = batch(0, 3, 6, 6, device=compiled_for.device)
    output = pool.MaxPool2x2()(x)
    output.sum().backward()
    assert output.shape == (0, 3, 3, 3) and x.grad.shape == x.shape

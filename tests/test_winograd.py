"""winograd: the same convolution and gradients with fewer multiplications, chosen where it pays."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seresnet import compiled, conv, winograd
from seresnet.model import SEResNet


@pytest.fixture
def always(calls_of, monkeypatch):
    """Small convolutions take Winograd's way, too; the list of what it is called with."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_TRAINED", 1)
    monkeypatch.setattr(winograd, "LEAST_WITH_MANY", 1)
    monkeypatch.setattr(winograd, "LEAST_FORWARDS", 1)
    return calls_of(winograd.Winograd)


@pytest.fixture
def few_images(monkeypatch):
    """Few images are tiled as many would be: with tiles of several sizes, whatever that takes of matrices."""
    monkeypatch.setattr(winograd, "COST_OF_A_MATRIX", 0)
    for cached in (winograd.regions, winograd._along):
        monkeypatch.setattr(winograd, cached.__name__, cached.__wrapped__)


def tensors(count, c_in, c_out, height, width, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(count, c_in, height, width).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    return x, (torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5)).to(memory_format=torch.channels_last).requires_grad_()


def gradients(output, leaves):
    torch.manual_seed(1)
    return torch.autograd.grad(output, leaves, torch.randn(output.shape).to(output.dtype))


def assert_close(output, x, weight, function, within=1e-5):
    """Output and gradients are what float64 makes of the same, within so much of the largest: float32's own rounding of long sums."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = function(*leaves)
    for mine, theirs in zip([output.detach(), *gradients(output, (x, weight))], [exact.detach(), *gradients(exact, leaves)], strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        assert torch.allclose(mine.double(), theirs, rtol=0, atol=within * float(theirs.abs().max()))


@pytest.mark.parametrize("c_in, c_out", [(1, 1), (5, 7), (64, 3), (65, 130)])
@pytest.mark.parametrize("padding, height, width", [(1, 6, 6), (1, 7, 7), (1, 1, 1), (1, 2, 11), (1, 13, 4), (0, 3, 3), (0, 14, 8), (2, 4, 5)])
def test_it_is_what_float64_makes(padding, height, width, c_in, c_out, always):
    x, weight = tensors(5, c_in, c_out, height, width)
    output = conv.convolve(x, weight, stride=1, padding=padding)
    of_x, = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert len(always) == 1 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (output, of_x))
    assert_close(output, x, weight, lambda x, w: F.conv2d(x, w, padding=padding))


@pytest.mark.parametrize("c_in, c_out", [(5, 7), (64, 3), (65, 130)])
@pytest.mark.parametrize("padding, height, width", [(1, 6, 6), (1, 5, 7), (1, 13, 13), (0, 15, 9), (2, 8, 4), (1, 1, 26)])
def test_it_is_that_in_tiles_of_several_sizes(padding, height, width, c_in, c_out, always, few_images):
    x, weight = tensors(5, c_in, c_out, height, width)
    output = conv.convolve(x, weight, stride=1, padding=padding)
    assert len(always) == 1
    assert_close(output, x, weight, lambda x, w: F.conv2d(x, w, padding=padding), within=3e-5)    # in tiles of six it rounds more


@pytest.mark.parametrize("images", [1, 32, 1000])
def test_tiles_cover_each_pixel_once_and_cost_no_more_than_tiles_of_one_size(images):
    for height in range(1, 40):
        for width in {1, 7, 16, height}:
            covered, multiplications, matrices = torch.zeros(height + 6, width + 6), 0, 0
            for top, left, down, across, high, wide in winograd.regions(height, width, images):
                assert top + (down - 1) * high < height and left + (across - 1) * wide < width    # no tile lies outside
                covered[top:top + down * high, left:left + across * wide] += 1
                multiplications += (high + 2) * (wide + 2) * down * across
                matrices += (high + 2) * (wide + 2)
            assert covered[:height, :width].eq(1).all() and covered.max() == 1
            for tile in winograd.POINTS if height == width else ():
                alike = (tile + 2)**2
                assert (images * multiplications + winograd.COST_OF_A_MATRIX * matrices
                        <= images * alike * (-(-height // tile))**2 + winograd.COST_OF_A_MATRIX * alike)


@pytest.mark.parametrize("side, tiles", [
    (3, ((3, 1),)), (6, ((6, 1),)), (7, ((4, 1), (3, 1))), (13, ((6, 1), (4, 1), (3, 1))), (14, ((6, 1), (4, 2))), (30, ((6, 5),)),
    (32, ((6, 4), (4, 2)))])
def test_the_sides_of_our_nets_are_tiled_so(side, tiles):
    assert winograd._along(side, 1000) == tiles


@pytest.mark.parametrize("tile", winograd.POINTS)
def test_transformations_are_toom_and_cooks_and_their_adjoints(tile):
    """A row of outputs is the sum that it should be, of any row and filter; <transformed, other> = <it, other transformed back>."""
    kernels = pytest.importorskip("seresnet.kernels")
    names = [f"{name}{tile}{back}" for name in ("patch", "output") for back in ("", "_back")]
    patch, patch_back, output, output_back = (getattr(kernels, name).py_func for name in names)
    rng = np.random.default_rng(tile)
    row, other, made, back = rng.normal(size=tile + 2), rng.normal(size=tile + 2), rng.normal(size=tile + 2), rng.normal(size=tile)
    for place in range(3):
        of_filter = winograd.filter_matrix(tile)[:, place].numpy()
        assert np.allclose(output(*(of_filter * patch(*row))), row[place:place + tile], atol=2e-6)    # whose constants are float32
    assert np.dot(patch(*row), other) == pytest.approx(np.dot(row, patch_back(*other)), rel=1e-12)
    assert np.dot(output(*made), back) == pytest.approx(np.dot(made, output_back(*back)), rel=1e-12)


@pytest.mark.parametrize("tile, most", [(3, 1.5e-6), (4, 1.5e-6), (6, 6e-6)])
def test_it_rounds_as_little_as_is_said(tile, most, always, monkeypatch):
    """The error beside float64, by root mean square; that of the plain sum in float32 is 0.4e-6."""
    monkeypatch.setattr(winograd, "regions", lambda *_: [winograd.Region(0, 0, 12 // tile, 12 // tile, tile, tile)])
    x, weight = tensors(20, 64, 64, 12, 12)
    output = conv.convolve(x, weight, 1, 1)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.conv2d(*leaves, padding=1)
    assert len(always) == 1
    for mine, theirs in zip([output, *gradients(output, (x, weight))], [exact, *gradients(exact, leaves)], strict=True):
        assert 1e-8 < float((mine - theirs).detach().norm() / theirs.detach().norm()) < most


@pytest.mark.parametrize("together, images", [(1, 1), (3, 1), (4, 2), (9, 4), (1000, 7)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_images_is_taken_in_parts(count, together, images, always, few_images, monkeypatch):
    monkeypatch.setattr(winograd, "MOST_TOGETHER", together)    # tiles; an image has two of either size
    x, weight = tensors(count, 3, 4, 8, 7)
    tiled = winograd.regions(8, 7, count)
    assert [region.tiles for region in tiled] == [2, 2] and all(winograd._together(7, region, 4, 3) == images for region in tiled)
    output = conv.convolve(x, weight, 1, 1)
    assert len(always) == 1
    assert_close(output, x, weight, lambda x, w: F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("c_in, c_out, tiles", [(3, 600, 128), (85, 85, 128), (96, 256, 144), (256, 96, 144), (600, 600, 512)])
def test_more_tiles_are_taken_together_where_filters_are_large(c_in, c_out, tiles):
    assert winograd._together(1 << 20, winograd.Region(0, 0, 1, 1, 6, 6), c_out, c_in) == tiles


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_a_weights_gradient_lies_as_the_weight_does(form, always, few_images):
    x, weight = tensors(3, 4, 5, 7, 13)
    weight = weight.detach().contiguous(memory_format=form).requires_grad_()
    of_x, of_weight = gradients(conv.convolve(x, weight, 1, 1), (x, weight))
    assert len(always) == 1 and of_weight.stride() == weight.stride() and of_x.stride() == x.stride()
    assert_close(conv.convolve(x, weight, 1, 1), x, weight, lambda x, w: F.conv2d(x, w, padding=1))


def test_no_images_are_none(always):
    x, weight = tensors(0, 3, 4, 5, 6)
    output = winograd.Winograd.apply(x, weight, 1, 5, 6)
    of_x, of_weight = gradients(output, (x, weight))
    assert output.shape == (0, 4, 5, 6) and of_x.shape == x.shape and torch.equal(of_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("height, width", [(7, 7), (6, 7), (7, 6), (15, 2), (8, 8)])
def test_what_pooling_drops_is_not_computed(height, width, always):
    torch.manual_seed(0)
    layer = conv.ConvBeforePool(4, 6).to(memory_format=torch.channels_last)
    x, _ = tensors(9, 4, 6, height, width)
    output = F.max_pool2d(layer(x), 2)
    assert len(always) == 1 and always[0][3:] == (height // 2 * 2, width // 2 * 2)
    assert_close(output, x, layer.weight, lambda x, w: F.max_pool2d(F.conv2d(x, w, padding=1), 2))


def test_a_gradient_that_is_expanded_is_taken_and_a_graph_may_be_walked_twice(always):
    x, weight = tensors(3, 4, 5, 6, 6)
    output = conv.convolve(x, weight, 1, 1)
    output.sum().backward(retain_graph=True)    # its gradient is one number, expanded
    once = x.grad.clone(), weight.grad.clone()
    output.sum().backward()
    assert len(always) == 1 and all(torch.equal(t.grad, 2 * first) and first.abs().max() > 0 for t, first in zip((x, weight), once))


def test_a_second_derivative_is_refused_not_wrong(always):
    x, weight = tensors(4, 3, 3, 4, 4)
    of_weight, = torch.autograd.grad(conv.convolve(x, weight, 1, 1).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        of_weight.sum().backward()


@pytest.mark.parametrize("side, tiled", [(6, 1), (7, 4)])
@pytest.mark.parametrize("wanted", ["weight", "x", "neither"])
def test_only_what_is_wanted_is_computed(wanted, side, tiled, always, few_images, monkeypatch):
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args, **options: products.append(args) or bmm(*args, **options))
    x, weight = tensors(4, 3, 3, side, side)
    x, weight = (t.detach().requires_grad_(wanted == name) for t, name in ((x, "x"), (weight, "weight")))
    output = conv.convolve(x, weight, 1, 1)
    assert len(always) == 1 and len(products) == tiled and output.requires_grad == (wanted != "neither")
    if output.requires_grad:
        output.sum().backward()
    assert len(products) == tiled * (1 + (wanted == "x")) and (x.grad is None) == (wanted != "x") and (weight.grad is None) == (wanted != "weight")


def test_it_repeats_to_the_bit(always, few_images):
    """The gradient by the weight with the same number of threads, which torch's products of matrices may share out otherwise."""
    x, weight = tensors(20, 16, 24, 13, 9)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            output = conv.convolve(x, weight, 1, 1)
            found.append([output.detach(), *gradients(output, (x, weight))])
    finally:
        torch.set_num_threads(before)
    first, again, with_two = found
    assert len(always) == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], with_two[:2], strict=True)) and torch.allclose(first[2], with_two[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("why", ["bfloat16", "float64", "autocast", "stride", "1x1", "5x5", "little", "no numba", "channels first", "traced"])
def test_torch_does_it_elsewhere(why, always, monkeypatch):
    x, weight = tensors(4, 3, 3, 6, 6, {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(why, torch.float32))
    weight = weight.detach().to(x.dtype).requires_grad_(why != "traced")
    if why in ("1x1", "5x5"):
        weight = torch.randn(3, 3, int(why[0]), int(why[0])).requires_grad_()
    if why == "channels first":
        x = x.detach().contiguous()
    if why == "little":
        monkeypatch.setattr(compiled, "LEAST", x.numel() + 1)
    if why == "no numba":
        monkeypatch.setattr(compiled, "passes", lambda: None)
    stride, padding = 2 if why == "stride" else 1, weight.shape[2] // 2

    def convolve(x):
        return conv.convolve(x, weight, stride, padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        output = torch.jit.trace(convolve, x.detach(), check_trace=False)(x.detach()) if why == "traced" else convolve(x)
        expected = F.conv2d(x, weight, stride=stride, padding=padding)
    assert not always and output.dtype == expected.dtype and torch.equal(output, expected), why


def recorded(function, x):
    from torch.fx.experimental.proxy_tensor import make_fx
    return make_fx(function)(x)(x)


def counted(function, x):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        function(x)
    return torch.tensor(counter.get_total_flops())


@pytest.mark.parametrize("look", [recorded, counted, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd])
def test_it_is_torchs_where_torch_looks_on(look, always):
    x, weight = (t.detach() for t in tensors(2, 3, 4, 5, 5))

    def by(convolve):
        if look in (recorded, counted):
            return look(convolve, x)
        return look(lambda image: convolve(image[None])[0])(x if look is torch.func.vmap else x[0])
    got = by(lambda x: conv.convolve(x, weight, 1, 1))
    assert not always and got.abs().max() > 0 and torch.allclose(got, by(lambda x: F.conv2d(x, weight, padding=1)))


@pytest.mark.parametrize("channels", [3, 5])
def test_other_channels_than_the_weights_are_refused_as_torch_refuses_them(channels, always):
    x, _ = tensors(2, channels, 4, 6, 6)
    with pytest.raises(RuntimeError, match="channels"):
        conv.convolve(x, tensors(2, 4, 4, 6, 6)[1], 1, 1)
    assert not always


def test_autocast_that_is_on_for_the_backward_pass_alone_changes_nothing(always):
    x, weight = tensors(4, 16, 24, 6, 6)
    expected = gradients(conv.convolve(x, weight, 1, 1), (x, weight))
    output = conv.convolve(x, weight, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(output, (x, weight))
    assert len(always) == 2 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("c_in, c_out, side, both_ways, forwards", [
    (23, 512, 16, False, False), (512, 23, 16, False, False), (24, 63, 16, False, False), (24, 64, 15, False, False), (24, 64, 16, True, False),
    (32, 63, 4, False, False), (32, 64, 4, True, False), (63, 65, 4, True, False), (64, 64, 4, True, True), (288, 288, 4, True, True)])
def test_few_channels_are_left_to_torch(c_in, c_out, side, both_ways, forwards, calls_of):
    x, weight = tensors(1, c_in, c_out, side, side)
    assert winograd.pays(x, weight, stride=1) == both_ways
    with torch.no_grad():
        assert winograd.pays(x, weight, stride=1) == forwards


def test_a_net_trains_and_predicts_alike_either_way(always, monkeypatch):
    torch.manual_seed(0)
    net = SEResNet(blocks=[1, 1], channels=[8, 12], classes=10, image_size=16, block_depth=2, downsample="pool", se="block",
                   activation="gelu", se_reduction=2, shortcut_scale=0.3).to(memory_format=torch.channels_last)
    x, _ = tensors(32, 3, 3, 16, 16)
    start, results = {k: v.clone() for k, v in net.state_dict().items()}, []
    for least in (0, 1 << 60):
        monkeypatch.setattr(compiled, "LEAST", least)
        net.load_state_dict(start)
        net.zero_grad()
        logits = net.train()(x.detach())
        F.cross_entropy(logits, torch.arange(32) % 10).backward()
        with torch.no_grad():
            results.append([logits.detach(), net.eval()(x), *(p.grad.clone() for p in net.parameters())])
    assert len(always) == 2 * 7    # of either way; the stem's, two before pooling, four in blocks
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()) + 1e-7), (mine - theirs).abs().max()

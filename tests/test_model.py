"""model: parameter counts against the published nets, SE and residual blocks against plain arithmetic, whitening."""
import pytest
import torch
from torch import nn

from seresnet import model as m
from seresnet.config import Model

SMALL = dict(blocks=[1, 1], channels=[8], classes=5, image_size=16)


def net(**changes):
    torch.manual_seed(0)
    return m.SEResNet(**{**SMALL, **changes})


def words(name):
    """What the config allows as model.<name>."""
    return Model.__dataclass_fields__[name].metadata["limits"]["one_of"]


def test_every_word_of_the_config_makes_a_net_of_its_own():
    assert words("activation") == tuple(m.ACTIVATIONS)
    for name in ("se", "stem", "downsample", "head_pool", "initialisation"):
        nets = [net(**{name: word}) for word in words(name)]    # of one seed
        x = torch.randn(3, 3, 16, 16)
        assert len({each.eval()(x).sum().item() for each in nets}) == len(words(name)) >= 2, name


@pytest.mark.parametrize("settings, count", [
    (dict(blocks=[4, 4, 3], channels=[64], se="stem"), 4_697_742),    # the course project's net
    (dict(blocks=[2, 2, 2, 2], channels=[64]), 11_173_962),           # ResNet-18 for 32x32 images
    (dict(blocks=[9, 9, 9], channels=[16], shortcut_kernels=[1]), 855_770),    # He et al.'s ResNet-56, projection shortcuts
])
def test_parameter_counts(settings, count):
    assert m.count_parameters(m.SEResNet(**settings, classes=10, image_size=32)) == count


def test_course_net_has_the_counted_parts():
    """4,697,742 again, added up by hand from the definition."""
    def conv_norm(c_in, c_out, k):
        return c_in * c_out * k * k + 2 * c_out
    stem = conv_norm(3, 64, 3) + (64 * 4 + 4) + (4 * 64 + 64)
    stages, c_in = 0, 64
    for blocks, c in zip((4, 4, 3), (64, 128, 256)):
        stages += conv_norm(c_in, c, 3) + (2 * blocks - 1) * conv_norm(c, c, 3) + (conv_norm(c_in, c, 1) if c != c_in else 0)
        c_in = c
    assert stem + stages + 256 * 10 + 10 == 4_697_742


def test_se_is_the_papers_formula():
    torch.manual_seed(0)
    se, x = m.SqueezeExcitation(12, 4), torch.randn(3, 12, 5, 7)
    got = se(x)
    for b in range(3):
        z = torch.stack([x[b, c].mean() for c in range(12)])
        s = 1 / (1 + torch.exp(-(se.excite.weight @ (se.squeeze.weight @ z + se.squeeze.bias).clamp(min=0) + se.excite.bias)))
        assert se.squeeze.out_features == 3
        for c in range(12):
            assert torch.allclose(got[b, c], x[b, c] * s[c], atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ses_gradient_is_autograds(count):
    """Of the paper's formula written out, also of no images: the share of a process for which none are left."""
    torch.manual_seed(0)
    se, x = m.SqueezeExcitation(12, 4), torch.randn(count, 12, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    plain = x * torch.sigmoid(se.excite(torch.relu(se.squeeze(x.mean((2, 3))))))[:, :, None, None]
    wanted = torch.randn(plain.shape).to(memory_format=torch.channels_last)
    mine, theirs = (torch.autograd.grad(output, [x, *se.parameters()], wanted) for output in (se(x), plain))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs))
    assert mine[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("stride, c_out", [(1, 6), (2, 6), (1, 8), (2, 8)])
def test_residual_block_is_branch_plus_scaled_shortcut(stride, c_out, scale):
    torch.manual_seed(0)
    block = m.ResidualBlock(6, c_out, stride=stride, kernel=3, shortcut_kernel=1, depth=2, se_reduction=2,
                            activation=m.ACTIVATIONS["relu"], shortcut_scale=scale).eval()
    x = torch.randn(2, 6, 8, 8)
    conv1, norm1, _, conv2, norm2, se = block.branch
    branch = se(norm2(conv2(torch.relu(norm1(conv1(x))))))
    same = stride == 1 and c_out == 6
    assert isinstance(block.shortcut, nn.Identity) == same
    shortcut = x if same else block.shortcut[1](block.shortcut[0](x))
    assert torch.allclose(block(x), torch.relu(branch + scale * shortcut), atol=1e-6)
    assert block(x).shape == (2, c_out, 8 // stride, 8 // stride)


@pytest.mark.parametrize("se, count", [("none", 0), ("stem", 1), ("block", 2)])
def test_se_stands_where_it_is_asked_for(se, count):
    found = [name for name, module in net(se=se).named_modules() if isinstance(module, m.SqueezeExcitation)]
    assert len(found) == count
    assert all(name.startswith("stem" if se == "stem" else "stages") for name in found)


def test_zero_init_makes_every_block_start_as_the_identity():
    built = net(zero_init_norm=True, se="block").eval()
    block = built.stages[0][0]
    x = torch.rand(2, 8, 16, 16)
    assert torch.equal(block(x), x)
    assert not torch.equal(net().eval().stages[0][0](x), x)


@pytest.mark.parametrize("kind", words("initialisation"))
def test_initialisation_has_the_spread_of_its_definition(kind):
    weight = net(channels=[32], initialisation=kind).stages[1][0].branch[3].weight    # 64 -> 64, 3x3
    fan = 64 * 9
    if kind == "orthogonal":
        flat = weight.reshape(64, -1)
        assert torch.allclose(flat @ flat.T, torch.eye(64), atol=1e-4)
    else:
        want = {"default": (1 / (3 * fan)) ** 0.5, "kaiming": (2 / fan) ** 0.5, "xavier": (2 / (2 * fan)) ** 0.5}[kind]
        assert weight.std().item() == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("activation", m.ACTIVATIONS)
@pytest.mark.parametrize("downsample", words("downsample"))
@pytest.mark.parametrize("stem", words("stem"))
def test_every_variant_trains_a_step_in_channels_last(activation, downsample, stem):
    built = net(activation=activation, downsample=downsample, stem=stem, se="block", dropout=0.1, block_depth=1)
    built = built.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    if built.wants_whitening:
        built.whiten(x)
    assert built.stem(x).is_contiguous(memory_format=torch.channels_last)
    assert built.stages(built.stem(x)).is_contiguous(memory_format=torch.channels_last)
    logits = built(x)
    assert logits.shape == (4, 5)
    logits.square().mean().backward()
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("pool", words("head_pool"))
def test_head_is_a_linear_map_of_the_pooled_image(pool):
    built, x = net(head_pool=pool, head_bias=False).eval(), torch.randn(2, 3, 16, 16)
    features = built.stages(built.stem(x))
    pooled = torch.stack([torch.stack([getattr(plane, pool)() for plane in image]) for image in features])
    assert built.head.bias is None
    assert torch.allclose(built(x), pooled @ built.head.weight.T, atol=1e-6)


def test_head_starts_with_the_spread_asked_for():
    assert net(channels=[512], head_std=0.01).head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net(channels=[512]).head.weight.std().item() == pytest.approx(1 / (3 * 1024) ** 0.5, rel=0.05)


def test_norm_scales_can_be_left_at_one_and_statistics_take_their_momentum():
    built = net(learned_norm_scale=False, norm_momentum=0.4, se="block").train()
    norms = [module for module in built.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(not n.weight.requires_grad and n.bias.requires_grad and n.momentum == 0.4 for n in norms)
    x = torch.randn(4, 3, 16, 16)
    built(x)
    assert torch.allclose(norms[0].running_mean, 0.4 * built.stem[0](x).mean((0, 2, 3)), atol=1e-6)
    assert all(n.weight.requires_grad and n.momentum == 0.1 for n in net().modules() if isinstance(n, nn.BatchNorm2d))


def test_whitened_patches_are_white(monkeypatch):
    torch.manual_seed(0)
    mixing = torch.randn(3, 3)    # correlated colours, smoothed over neighbours: far from white
    images = torch.einsum("ij,njhw->nihw", mixing, torch.randn(64, 3, 16, 16))
    images = 20 * nn.functional.avg_pool2d(images, 3, 1, 1)
    built = net(stem="whiten")
    assert built.wants_whitening and not net().wants_whitening
    built.whiten(images)
    conv = nn.Conv2d(3, 24, 2, bias=False)
    conv.weight.data.copy_(built.stem[0].weight)
    out = conv(images).permute(1, 0, 2, 3).flatten(1).double()
    positive, negative = out[:12], out[12:]
    assert torch.allclose(positive, -negative)
    second_moments = positive @ positive.T / positive.shape[1]
    assert torch.allclose(second_moments, torch.eye(12, dtype=torch.float64), atol=0.02)
    assert not any(parameter.requires_grad for parameter in built.stem.parameters())
    monkeypatch.setattr("seresnet.model.PATCHES", 1000)    # a few images at once, as with large ones
    parts = net(stem="whiten")
    parts.whiten(images)
    assert torch.allclose(parts.stem[0].weight, built.stem[0].weight, atol=1e-6)


def test_budget_message_has_both_numbers():
    with pytest.raises(ValueError, match="4,697,742 parameters, the budget is 4,000,000"):
        m.check_budget(m.SEResNet(blocks=[4, 4, 3], channels=[64], se="stem", classes=10, image_size=32), 4_000_000)
    built = net()
    assert m.check_budget(built, m.count_parameters(built)) == m.check_budget(built, 0) == m.count_parameters(built)
    with pytest.raises(ValueError):
        m.check_budget(built, m.count_parameters(built) - 1)


@pytest.mark.parametrize("settings, message", [
    (dict(channels=[8, 8, 8]), "channels: .* has 3 entries, blocks has 2 stages"),
    (dict(kernels=[2]), "kernels: .* has an even number"),
    (dict(zero_init_norm=True, learned_norm_scale=False), "zero_init_norm: .* learned_norm_scale is off"),
    (dict(blocks=[1] * 5, downsample="pool"), "5 stages leave nothing of images of 16 pixels"),
])
def test_values_that_make_no_net_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        net(**settings)


@pytest.mark.parametrize("settings", [dict(stem="whiten", downsample="pool"), dict(downsample="pool"), dict()])
def test_takes_says_which_sides_the_net_can_be_given(settings):
    net = m.SEResNet(**{**SMALL, "blocks": [1, 1, 1]}, **settings).eval()
    for side in range(2, 20):
        try:
            works = net(torch.zeros(1, 3, side, side)).shape == (1, 5)
        except RuntimeError:
            works = False
        assert net.takes(side) == works, side
        if works:
            assert net.last_side(side) == net.stages(net.stem(torch.zeros(1, 3, side, side))).shape[-1], side


@pytest.mark.parametrize("height, width", [(7, 7), (8, 8), (7, 8), (6, 9), (3, 3), (2, 3)])
def test_what_pooling_drops_is_not_computed_and_the_rest_is_the_same(height, width):
    torch.manual_seed(0)
    layer, x = m.ConvBeforePool(5, 6), torch.randn(4, 5, height, width, requires_grad=True)
    got = layer(x)
    assert got.shape[2:] == (height // 2 * 2, width // 2 * 2)
    pooled, want = torch.max_pool2d(got, 2), torch.max_pool2d(torch.conv2d(x, layer.weight, padding=1), 2)
    assert torch.allclose(pooled, want, atol=1e-6)
    for a, b in zip(torch.autograd.grad(pooled.square().sum(), [x, layer.weight]),
                    torch.autograd.grad(want.square().sum(), [x, layer.weight])):
        assert torch.allclose(a, b, atol=1e-4)

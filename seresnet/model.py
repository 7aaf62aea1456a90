"""SEResNet: squeeze-and-excitation, residual blocks, a stem, a head, and the parameter budget.

Input of every net: `float` (B, 3, H, W), channels-last, zero mean and unit standard deviation a channel.
Output: logits (B, classes).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from seresnet.conv import Conv2d, ConvBeforePool
from seresnet.norm import FUSED, normalise
from seresnet.pool import MaxPool2x2

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU, "silu": lambda: nn.SiLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True), "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True)}
PATCHES = 1 << 20    # at once in whitening, 100 MB
WHITEN_CHANNELS = 24    # 12 principal directions of a 2x2 RGB patch, and their negatives


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al., arXiv 1709.01507, section 3): (B, C, H, W) -> same.

    The mean over the image, through two linear maps with C / reduction units between them, becomes one gate in (0, 1)
    a channel.
    """

    parameter_kind = "se"    # seresnet/optim.py gives these a learning rate of their own

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // reduction))
        self.excite = nn.Linear(max(1, channels // reduction), channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alone = not x.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling()
        x, mean = (x, x.mean((2, 3))) if alone else _WithMean.apply(x)
        return x * self.gate(mean)[:, :, None, None].to(x.dtype)

    def gate(self, mean: torch.Tensor) -> torch.Tensor:
        """The gates, in (0, 1), from the means over the image: (B, C) -> same."""
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(mean))))


class _WithMean(torch.autograd.Function):
    """x (B, C, H, W) and its mean over the image (B, C), whose gradients meet in one pass, in x's own layout: autograd's gradient of
    a mean is laid out channels first, and adding that to one that is channels-last took as long as a convolution."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view_as(x), x.mean((2, 3))

    @staticmethod
    def backward(ctx, of_x: torch.Tensor, of_mean: torch.Tensor) -> torch.Tensor:
        return torch.add(of_x, of_mean[:, :, None, None], alpha=1 / (of_x.shape[2] * of_x.shape[3]))


class Layers(nn.Sequential):
    """One layer after the other; a normalisation and the activation behind it in one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return through(self, x)


def through(layers: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """x, through one layer after the other; a normalisation and the activation behind it in one (seresnet/norm.py)."""
    layers = list(layers)
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.BatchNorm2d) and layers and isinstance(layers[0], FUSED):
            x = normalise(x, layer, layers.pop(0))
        else:
            x = layer(x)
    return x


class ResidualBlock(nn.Module):
    """Basic residual block (He et al., arXiv 1512.03385, section 3.3), with SE on the branch where asked for.

    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride). `depth` convolutions, each with batch normalisation; the
    first carries the stride. The shortcut is the identity, or a strided convolution with batch normalisation where
    the shape changes. SE stands behind the last normalisation (the paper's standard place, its figure 3). The output is
    activation(branch + shortcut_scale * shortcut).
    """

    def __init__(self, c_in: int, c_out: int, *, stride: int, kernel: int, shortcut_kernel: int, depth: int,
                 se_reduction: int | None, activation: Callable[[], nn.Module], shortcut_scale: float = 1.0):
        super().__init__()
        self.shortcut_scale = shortcut_scale
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [Conv2d(c_in if i == 0 else c_out, c_out, kernel, stride if i == 0 else 1), nn.BatchNorm2d(c_out)]
            if i < depth - 1:
                layers.append(activation())
        self.last_norm: nn.BatchNorm2d = layers[-1]
        if se_reduction:
            layers.append(SqueezeExcitation(c_out, se_reduction))
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if stride == 1 and c_in == c_out else nn.Sequential(
            Conv2d(c_in, c_out, shortcut_kernel, stride), nn.BatchNorm2d(c_out))
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = list(self.branch)
        gate = layers.pop() if isinstance(layers[-1], SqueezeExcitation) else None
        norm = layers.pop()
        return normalise(through(layers, x), norm, self.activation, gate, self.shortcut(x), self.shortcut_scale)


class SEResNet(nn.Module):
    """Stem, stages of residual blocks, pooling over the image, linear head.

    blocks: residual blocks a stage. channels: a stage, or one number that doubles from stage to stage. kernels and
    shortcut_kernels: a stage, or one for all. block_depth: convolutions in a block.
    stem: `conv` is a 3x3 convolution to `stem_channels` (0: the first stage's) with normalisation and activation;
    `whiten` is a fixed 2x2 convolution onto the principal directions of the training set's patches (see `whiten`),
    with activation; nothing in it is trained, so that the backward pass ends behind it.
    downsample: `stride` halves the side in the first block of every stage but the first, with a projection shortcut;
    `pool` puts a 3x3 convolution, 2x2 max-pooling, normalisation and activation ahead of every stage's blocks.
    se: `none`, `stem` (one SE behind the stem) or `block` (in every block), with its `se_reduction`.
    shortcut_scale: factor on every block's shortcut. In a net of one block a stage a shortcut at full strength doubles the
    signal and costs accuracy; at 0.3 it costs none (records/).
    norm_momentum: weight of the newest batch in the running statistics. learned_norm_scale: whether the scales of batch
    normalisation are trained, or stay at 1 (their shifts always are).
    head_pool: `mean` or `max` over the image. dropout: rate ahead of the head. head_bias: whether the head has one.
    head_std: standard deviation of the head's first weights, normal; 0 for torch's own initialisation.
    zero_init_norm: the last norm of each block starts at 0, each block as the identity (Goyal et al., arXiv
    1706.02677, section 5.1). initialisation of convolutions: `default` is torch's own, `kaiming` normal by fan-out
    (He et al., arXiv 1502.01852), `xavier` uniform (Glorot and Bengio, 2010), `orthogonal` (Saxe et al.,
    arXiv 1312.6120).

    forward: float (B, 3, image_size, image_size), channels-last -> logits (B, classes).
    Raises ValueError, with every problem found, for values that make no net.
    """

    def __init__(self, *, blocks: Sequence[int], channels: Sequence[int], classes: int, image_size: int,
                 kernels: Sequence[int] = (3,), shortcut_kernels: Sequence[int] = (1,), block_depth: int = 2,
                 stem: str = "conv", stem_channels: int = 0, downsample: str = "stride", se: str = "none",
                 se_reduction: int = 16, activation: str = "relu", shortcut_scale: float = 1.0, norm_momentum: float = 0.1,
                 learned_norm_scale: bool = True, head_pool: str = "mean", dropout: float = 0.0, head_bias: bool = True,
                 head_std: float = 0.0, zero_init_norm: bool = False, initialisation: str = "default"):
        super().__init__()
        channels, kernels, shortcut_kernels = _by_stage(len(blocks), channels, kernels, shortcut_kernels)
        if zero_init_norm and not learned_norm_scale:
            raise ValueError("zero_init_norm: a scale that starts at 0 has to be learned, and learned_norm_scale is off: "
                             "give one of them up")
        act = ACTIVATIONS[activation]
        self.head_pool = head_pool
        if stem == "whiten":
            width = WHITEN_CHANNELS
            self.stem = nn.Sequential(nn.Conv2d(3, width, 2, bias=False), act())
            self.stem[0].weight.requires_grad_(False)    # set once from the data by `whiten`
        else:
            width = stem_channels or channels[0]
            self.stem = Layers(Conv2d(3, width, 3), nn.BatchNorm2d(width), act())
        if se == "stem":
            self.stem.append(SqueezeExcitation(width, se_reduction))
        stages = []
        for i, (count, c_out, kernel, shortcut_kernel) in enumerate(zip(blocks, channels, kernels, shortcut_kernels)):
            stage: list[nn.Module] = []
            if downsample == "pool":
                stage += [ConvBeforePool(width, c_out), MaxPool2x2(), nn.BatchNorm2d(c_out), act()]
                width = c_out
            for j in range(count):
                stride = 2 if downsample == "stride" and i > 0 and j == 0 else 1
                stage.append(ResidualBlock(width, c_out, stride=stride, kernel=kernel, shortcut_kernel=shortcut_kernel,
                                           depth=block_depth, se_reduction=se_reduction if se == "block" else None,
                                           activation=act, shortcut_scale=shortcut_scale))
                width = c_out
            stages.append(Layers(*stage))
        self.stages = nn.Sequential(*stages)
        if not self.takes(image_size):
            raise ValueError(f"blocks: {len(blocks)} stages leave nothing of images of {image_size} pixels a side: fewer "
                             "stages, or larger images")
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes, bias=head_bias)
        if head_std:
            nn.init.normal_(self.head.weight, std=head_std)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = norm_momentum
                module.weight.requires_grad_(learned_norm_scale)
        self._initialise(initialisation, zero_init_norm)

    def _initialise(self, initialisation: str, zero_init_norm: bool) -> None:
        fill = {"default": None, "xavier": nn.init.xavier_uniform_, "orthogonal": nn.init.orthogonal_,
                "kaiming": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")}[initialisation]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and fill is not None and module.weight.requires_grad:
                fill(module.weight)
            if isinstance(module, ResidualBlock) and zero_init_norm:
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.stem(x))
        x = x.amax((2, 3)) if self.head_pool == "max" else x.mean((2, 3))
        return self.head(self.dropout(x))

    def takes(self, side: int) -> bool:
        """Whether images of `side` pixels are large enough for all stages: the net fits every size that is."""
        return self.last_side(side) >= 1

    def last_side(self, side: int) -> int:
        """The side of what the head sees of images of `side` pixels; 0 and less where the stages leave nothing of them."""
        side -= self.stem[0].padding == (0, 0)
        for stage in self.stages:
            for layer in stage:
                if isinstance(layer, nn.MaxPool2d):
                    side //= 2
                elif isinstance(layer, ResidualBlock):
                    side = -(-side // layer.branch[0].stride[0])
        return side

    @property
    def wants_whitening(self) -> bool:
        """Whether `whiten` has to be called once, with training images, before the net is trained."""
        return isinstance(self.stem[0], nn.Conv2d) and not self.stem[0].weight.requires_grad

    def whiten(self, images: torch.Tensor) -> None:
        """Set the whitening stem's filters from normalised training images, float32 (N, 3, H, W).

        The filters are the eigenvectors of the covariance of 2x2 patches, each scaled by the root of its eigenvalue so
        that it has unit variance on the data, and their negatives (so that both signs pass the activation). From
        Page, "How to Train Your ResNet 8" (myrtle.ai, 2019), and Jordan, arXiv 2404.00498, section 3.2.
        """
        weight = self.stem[0].weight
        images = images.float().cpu() if images.device.type == "mps" else images.float()    # mps has no float64
        covariance, seen = torch.zeros(12, 12, dtype=torch.float64, device=images.device), 0
        for part in images.split(max(1, PATCHES // images[0, 0].numel())):
            patches = part.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
            covariance, seen = covariance + patches.T @ patches, seen + len(patches)
        covariance = covariance.cpu() / seen
        values, vectors = torch.linalg.eigh(covariance)    # ascending; columns are the directions. A GPU would load a library for it
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        with torch.no_grad():
            weight.copy_(torch.cat([filters, -filters]))


def _by_stage(stages: int, channels: Sequence[int], kernels: Sequence[int], shortcut_kernels: Sequence[int]):
    if len(channels) == 1:
        channels = [channels[0] * 2**i for i in range(stages)]
    kernels, shortcut_kernels = (list(k) * stages if len(k) == 1 else list(k) for k in (kernels, shortcut_kernels))
    problems = [f"{name}: {list(values)} has {len(values)} entries, blocks has {stages} stages: give one, or {stages}"
                for name, values in [("channels", channels), ("kernels", kernels),
                                     ("shortcut_kernels", shortcut_kernels)] if len(values) != stages]
    problems += [f"{name}: {list(values)} has an even number: a kernel has to be odd to keep the image's side"
                 for name, values in [("kernels", kernels), ("shortcut_kernels", shortcut_kernels)]
                 if any(k % 2 == 0 for k in values)]
    if problems:
        raise ValueError("\n".join(problems))
    return channels, kernels, shortcut_kernels


def count_parameters(model: nn.Module) -> int:
    """All parameters, the frozen ones of a whitening stem included: what a parameter budget counts."""
    return sum(parameter.numel() for parameter in model.parameters())


def shapes_alone(arguments: Mapping) -> SEResNet:
    """SEResNet of these keyword arguments without memory for its parameters, on torch's meta device. Their first values, which are none
    there, are left out: normal ones would wake torch's compiler."""
    with torch.device("meta"):
        return SEResNet(**{**arguments, "head_std": 0.0, "initialisation": "default"})


def check_budget(model: nn.Module, most: int) -> int:
    """The parameter count. Raises ValueError with both numbers where it exceeds `most` (0: no budget)."""
    count = count_parameters(model)
    if most and count > most:
        raise ValueError(f"max_parameters: this net has {count:,} parameters, the budget is {most:,}: fewer blocks or "
                         "channels, or lift the budget with model.max_parameters: 0")
    return count

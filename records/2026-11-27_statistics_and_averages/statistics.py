"""What a net's norms remember, measured again from other images: python records/2026-11-27_statistics_and_averages/statistics.py RUN [SHARE ...]

RUN: a finished run with loop.hardest and a holdout. Prints the holdout's accuracy as the net is, and with the mean and variance of every norm
taken from each SHARE of the training images whose last loss was largest (1: of all), augmented as in the last epoch, in batches of 1,000.
"""
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from seresnet import runtime    # noqa: E402

runtime.tune_allocator()

import numpy as np    # noqa: E402
import torch    # noqa: E402

from seresnet import checkpoint, config, trained    # noqa: E402
from seresnet.augment import train_batch    # noqa: E402
from seresnet.beton import open_beton, read_images    # noqa: E402
from seresnet.loader import holdout_split    # noqa: E402


@torch.no_grad()
def refresh(net, images, numbers, settings, batches):
    """Mean and variance of every norm of `net`, as means over `batches` of the images, (N, 3, H, W) uint8."""
    norms, generator = [m for m in net.model.modules() if isinstance(m, torch.nn.BatchNorm2d)], torch.Generator().manual_seed(0)
    order, sums = torch.randperm(len(images), generator=generator), [[0.0, 0.0] for _ in norms]
    momenta = [m.momentum for m in norms]
    net.model.train()
    for m in norms:
        m.momentum = 1.0
    for i in range(batches):
        chosen = order[1000 * i:1000 * (i + 1)]
        net.model(train_batch(images[chosen], numbers[chosen], settings.loop.epochs - 1, **settings_of(settings), mean=net.mean, std=net.std,
                              dtype=net.dtype, generator=generator))
        sums = [[s + m.running_mean / batches, v + m.running_var / batches] for (s, v), m in zip(sums, norms)]
    for (s, v), m, momentum in zip(sums, norms, momenta):
        m.running_mean, m.running_var, m.momentum = s, v, momentum
    net.model.eval()


def settings_of(settings):
    return {name: value for name, value in asdict(settings.augment).items() if name != "sides"}


def main():
    run, shares = Path(sys.argv[1]), [float(share) for share in sys.argv[2:]]
    net = trained.load(run)
    settings = config.build(net.config)
    beton = open_beton(settings.beton.train)
    kept, held = holdout_split(beton.labels, settings.evaluate.holdout_size)
    images, labels = read_images(beton, held), beton.labels[held]
    training = torch.from_numpy(read_images(beton, kept)).permute(0, 3, 1, 2)
    losses = checkpoint.load(run / "last.pt")["difficulty"]["now"][torch.from_numpy(kept)]
    hardest = torch.sort(losses, descending=True).indices
    for share in (None, *shares):
        if share:
            some = hardest[:round(share * len(hardest))]
            refresh(net, training[some], torch.from_numpy(kept)[some], settings, min(10, len(some) // 1000) if share == 1 else len(some) // 1000)
        one, views = net.predict(images, "none"), net.probabilities(images)
        loss = -np.log(views[np.arange(len(labels)), labels]).mean()
        print(f"{share or 'as it is'}: one view {(one == labels).mean():.2%}, {net.tta} {(views.argmax(1) == labels).mean():.2%}, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()

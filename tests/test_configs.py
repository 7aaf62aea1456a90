"""Every shipped recipe builds its net within its budget, and takes its first steps."""
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from seresnet import config, loop
from seresnet.loss import smoothed_cross_entropy
from seresnet.model import count_parameters
from seresnet.optim import build_optimizer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "rn_configs").glob("*.yaml"), key=lambda path: path.stem)
PARAMETERS = {"digits": None, "own_images": None, "resnet18": 11_173_962, "se94": 1_990_276, "se95": 4_197_738, "se96": 3_891_748,
              "se_best": 3_891_748, "shift": 1_990_276,
              **dict.fromkeys(("seed_16", "seed_24", "seed_40", "seed_200"), 4_697_742)}


def test_every_recipe_is_listed_here():
    assert {path.stem for path in RECIPES} == set(PARAMETERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_net_and_takes_a_step(path):
    settings, _ = config.parse(["--config-file", str(path)])
    assert settings.recipe == path.stem
    model = dataclasses.replace(settings.model, classes=settings.model.classes or 10, image_size=settings.model.image_size or 32)
    settings = dataclasses.replace(settings, model=model)    # where a recipe leaves them to the data
    model = loop.build_model(settings)
    count = count_parameters(model)
    assert count == (PARAMETERS[path.stem] or count)
    assert settings.model.max_parameters == 0 or count <= settings.model.max_parameters <= 5_000_000
    optim = {k: v for k, v in vars(settings.optim).items() if k in build_optimizer.__kwdefaults__ or k in ("name", "lr")}
    optimizer = build_optimizer(model, **optim)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    if model.wants_whitening:
        model.whiten(images)
    losses = []
    for _ in range(3):
        loss = smoothed_cross_entropy(model(images), torch.arange(4), settings.loss.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Four images and the full learning rate: a few steps may overshoot. A wrong net, loss or group does not move at all.
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_claim(path):
    head = path.read_text().splitlines()
    comment = " ".join(line.lstrip("# ") for line in head[:next(i for i, line in enumerate(head) if not line.startswith("#"))])
    assert f"rn_configs/{path.name}" in comment    # the command
    assert len(comment) > 100

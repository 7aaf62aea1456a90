"""fit() and train_epoch(): the one place where loader, augmentation, net, loss and optimizer meet."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from seresnet import checkpoint, report, runtime
from seresnet.augment import normalise, train_batch
from seresnet.beton import Beton, open_beton
from seresnet.clock import Clock
from seresnet.config import Config
from seresnet.evaluate import Evaluation, evaluate
from seresnet.loader import BatchLoader, holdout_split
from seresnet.loss import Tally, Totals, smoothed_cross_entropy
from seresnet.model import SEResNet, check_budget
from seresnet.optim import build_optimizer, clip_gradients, learning_rate_factor, set_learning_rate

# Streams of random numbers: each is seeded from (run seed, stream, ...) and so shares nothing with the others.
INITIALISATION, AUGMENTATION = 1, 2
WHITENING_IMAGES = 5000    # as many as Jordan, arXiv 2404.00498, listing in section A, uses


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on: betons, and the samples of the training beton that either part takes."""

    train: Beton
    test: Beton
    train_indices: object = None    # int64 array, or None for all
    test_indices: object = None

    @property
    def train_samples(self) -> int:
        return self.train.samples if self.train_indices is None else len(self.train_indices)


def prepare(config: Config) -> tuple[Data, SEResNet]:
    """Check and open all that a training needs, before anything is written or trained.

    Raises UserError with the problems of betons, net and split together.
    """
    problems: list[str] = []
    betons = {}
    for name in ("train", "test") if config.evaluate.split == "test" else ("train",):
        try:
            betons[name] = open_beton(getattr(config.beton, name), classes=config.model.classes,
                                      image_size=config.model.image_size)
        except runtime.UserError as error:
            problems += error.problems
    try:
        model = build_model(config)
    except ValueError as error:
        problems += [f"model.{line}" for line in str(error).splitlines()]
    if "train" in betons and config.evaluate.split == "holdout" and config.evaluate.holdout_size >= betons["train"].samples:
        problems.append(f"evaluate.holdout_size: got {config.evaluate.holdout_size}, expected fewer than the "
                        f"{betons['train'].samples} images of {config.beton.train}")
    if problems:
        raise runtime.UserError(*problems)
    if config.evaluate.split == "test":
        return Data(betons["train"], betons["test"]), model
    kept, held = holdout_split(betons["train"].labels, config.evaluate.holdout_size)
    return Data(betons["train"], betons["train"], kept, held), model


def build_model(config: Config) -> SEResNet:
    """The net of `config.model`, within its parameter budget, initialised from the run's seed, channels-last, on the CPU.

    Raises ValueError where the values make no net or the budget is exceeded.
    """
    arguments = asdict(config.model)
    budget = arguments.pop("max_parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.stream_seed(config.run.seed, INITIALISATION))
        model = SEResNet(**arguments)
    check_budget(model, budget)
    return model.to(memory_format=torch.channels_last)


def train_epoch(model: nn.Module, batches: Iterable, *, augment: Callable, loss: Callable, clip: Callable,
                optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, learning_rate: Callable[[int], float],
                first_step: int, dtype: torch.dtype, device: torch.device) -> Totals:
    """One pass over `batches` (of loader.Batch). Nothing inside a step waits for the device; the totals are read once.

    augment(batch) -> normalised images; loss(logits, labels) -> scalar; clip() clips the gradients in place;
    learning_rate(step) -> share of the peak for the run's step, of which `first_step` is this epoch's first.
    """
    tally = Tally(device)
    for step, batch in enumerate(batches, first_step):
        set_learning_rate(optimizer, learning_rate(step))
        images = augment(batch)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        value = loss(logits, batch.labels)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        clip()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        tally.add(logits, batch.labels, value)
    return tally.read()

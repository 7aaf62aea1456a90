"""The one file that knows fastargs: YAML files and command line -> checked, frozen dataclasses.

A section carries a file's name (`model.blocks` belongs to seresnet/model.py). Precedence: defaults < files, in the
order given < command line; environment variables are never read. Whatever is not understood is refused, all problems
in one message.

fastargs collects and merges the values; it is given checkers of our own, because its own turn "False" into True and
2.9 into 2, it passes over unknown keys, and its command line lets environment variables win.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fastargs
import yaml
from fastargs.validation import Checker

from seresnet.runtime import DEVICES, UserError


MOST_CONVOLUTIONS = 2000    # a net of that many takes seconds to build; a slip of a finger asks for more
# Of numbers: products and quotients of any two keys then still are float32's, in which torch's optimizers take them.
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-15, 1e30
# What other programs call a key's last part: named where it is asked for, never taken silently.
ALSO_CALLED = {"learning_rate": "lr", "max_lr": "lr", "num_workers": "workers", "wd": "weight_decay", "num_epochs": "epochs"}
FROM_DATA = ("model.classes", "model.image_size")    # where they are 0
LARGEST_FILE = 1 << 20      # bytes of a YAML file; a recipe has a thousand


class ConfigError(UserError):
    """The configuration is not understood; `problems` names each key, the value got and what is allowed."""


def key(default, help: str, *, at_least=None, above=None, below=None, at_most=None, one_of: Sequence[str] = (),
        pattern: str = "", lengths: Sequence[int] = ()):
    """A dataclass field with its default, one line of help, and the range that its value (or each entry) must lie in."""
    limits = dict(at_least=at_least, above=above, below=below, at_most=at_most, one_of=tuple(one_of), pattern=pattern,
                  lengths=tuple(lengths))
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True)
class Run:
    seed: int = key(0, "fixes initialisation, order and augmentation; seeds share none of them", at_least=0)
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", pattern=DEVICES)
    precision: str = key("auto", "number format of the convolutions; auto is bf16 where the hardware has it",
                         one_of=("auto", "bf16", "fp16", "fp32"))
    compile: bool = key(False, "torch.compile the net (slower than eager on the CPUs we measured)")
    cuda_graphs: bool = key(True, "on one CUDA GPU, without run.compile, replay forward and backward pass as a CUDA graph")
    tune_allocator: bool = key(True, "on Linux CPUs, restart once with glibc's allocator set for large tensors")
    threads: int = key(0, "torch's threads on the CPU; 0 leaves torch's own choice", at_least=0, at_most=1024)
    folder: str = key("", "run folder to create; empty for <report.folder>/<recipe>-<time>")
    resume: str = key("", "run folder to go on with, in its own config; auto: the newest unfinished one of this config")


@dataclass(frozen=True)
class Sources:
    path: str = key("data", "folder, archive or file to convert")
    kind: str = key("auto", "what lies at sources.path; auto recognises it",
                    one_of=("auto", "binary", "pickle", "archive", "kaggle", "parquet", "folder", "arrays", "download", "digits"))
    image_size: int = key(0, "side in pixels to bring images to; 0 leaves them as they are", at_least=0, at_most=4096)
    fit: str = key("resize", "how: both sides to image_size, or the shorter one, and the middle cut out",
                   one_of=("resize", "crop"))
    test_share: float = key(0.2, "share of each class that becomes the test split where there is none", above=0, below=1)
    labels: str = key("fine", "which of its two kinds of labels, of CIFAR-100", one_of=("fine", "coarse"))


@dataclass(frozen=True)
class Beton:
    train: str = key("data/cifar10_train.beton", "training split as an FFCV file")
    test: str = key("data/cifar10_test.beton", "test split as an FFCV file")
    verify: str = key("quick", "check before a training: the structure, in milliseconds, or every byte against the sidecar's hash",
                      one_of=("quick", "full"))
    storage: str = key("raw", "how the converter stores pixels; jpeg takes less room and loses some", one_of=("raw", "jpeg"))
    jpeg_quality: int = key(95, "of beton.storage: jpeg", at_least=1, at_most=100)


@dataclass(frozen=True)
class Loader:
    batch_size: int = key(500, "images a training step, of all processes together", at_least=1)
    mode: str = key("auto", "stream reads through FFCV every epoch, resident keeps the set on the device",
                    one_of=("auto", "stream", "resident"))
    workers: int = key(0, "decoding threads of FFCV; 0 for one, which is enough for raw pixels", at_least=0)
    batches_ahead: int = key(3, "batches FFCV prepares in advance", at_least=1, at_most=1000)
    drop_last: bool = key(True, "leave out each epoch's last batch where it is not full (training only)")
    shares: str = key("drawn", "of several processes, in a batch: drawn anew each epoch, or of a fixed part, all that each keeps", one_of=("drawn", "fixed"))


@dataclass(frozen=True)
class Augment:
    flip: str = key("random", "mirror left and right; alternating shows each image both ways in turn",
                    one_of=("none", "random", "alternating"))
    translate: int = key(2, "largest shift in pixels, down and right, either way", at_least=0)
    padding: str = key("reflect", "what a shift uncovers: the mirrored image, the mean colour, or black",
                       one_of=("reflect", "constant", "zero"))
    cutout: int = key(0, "side in pixels of the square that is covered; 0 for none", at_least=0)
    sides: list[int] = key((), "sides in pixels of random crops, each for an equal share of the epochs; empty for whole images",
                           at_least=4, lengths=range(65))
    brightness: float = key(0.0, "largest shift of an image's brightness, in standard deviations of the set", at_least=0)
    contrast: float = key(0.0, "largest relative change of an image's contrast", at_least=0, below=1)
    blur: float = key(0.0, "largest weight of a pixel's neighbour, along both axes, in an image's blur", at_least=0, at_most=1 / 3)
    noise: float = key(0.0, "largest deviation of an image's Gaussian noise, in standard deviations of the set", at_least=0)


@dataclass(frozen=True)
class Model:
    blocks: list[int] = key((4, 4, 3), "residual blocks a stage", at_least=0, at_most=1000, lengths=range(1, 9))
    channels: list[int] = key((64,), "channels a stage, or one number that doubles", at_least=1, at_most=65536, lengths=range(1, 9))
    kernels: list[int] = key((3,), "odd kernel sides of the blocks' convolutions, a stage or one for all",
                             at_least=1, at_most=99, lengths=range(1, 9))
    shortcut_kernels: list[int] = key((1,), "odd kernel sides of the projection shortcuts, a stage or one for all",
                                      at_least=1, at_most=99, lengths=range(1, 9))
    block_depth: int = key(2, "convolutions in a block", at_least=1, at_most=100)
    stem: str = key("conv", "3x3 convolution, or a fixed 2x2 one that whitens the training set's patches",
                    one_of=("conv", "whiten"))
    stem_channels: int = key(0, "channels of a conv stem; 0 for the first stage's", at_least=0, at_most=65536)
    downsample: str = key("stride", "halve the side by a strided first block, or by convolution + pooling ahead",
                          one_of=("stride", "pool"))
    se: str = key("none", "squeeze-and-excitation: nowhere, behind the stem, or in every block",
                  one_of=("none", "stem", "block"))
    se_reduction: int = key(16, "channels a unit in the middle of squeeze-and-excitation", at_least=1, at_most=65536)
    activation: str = key("relu", "nonlinearity", one_of=("relu", "gelu", "silu", "elu", "leaky_relu"))
    shortcut_scale: float = key(1.0, "factor on every block's shortcut", at_least=0)
    norm_momentum: float = key(0.1, "weight of the newest batch in the running statistics of normalisation", above=0,
                               at_most=1)
    learned_norm_scale: bool = key(True, "train the scales of batch normalisation, or leave them at 1")
    head_pool: str = key("mean", "how the head pools over the image", one_of=("mean", "max"))
    dropout: float = key(0.0, "rate ahead of the head", at_least=0, below=1)
    head_bias: bool = key(True, "give the head a bias")
    head_std: float = key(0.0, "standard deviation of the head's first weights; 0 for torch's own", at_least=0)
    zero_init_norm: bool = key(False, "each block's last norm starts at 0: the block starts as the identity")
    initialisation: str = key("default", "of convolutions; default is torch's own",
                              one_of=("default", "kaiming", "xavier", "orthogonal"))
    classes: int = key(10, "classes; the data must have as many; 0 takes their number", at_least=0, at_most=65536)
    image_size: int = key(32, "side of the images in pixels; the data must have the same; 0 takes theirs", at_least=0, at_most=4096)
    max_parameters: int = key(5_000_000, "budget, checked before anything trains; 0 for none", at_least=0)


@dataclass(frozen=True)
class Loss:
    label_smoothing: float = key(0.0, "share of the target spread over all classes", at_least=0, below=1)


@dataclass(frozen=True)
class Optim:
    name: str = key("sgd", "optimizer; muon orthogonalises the updates of convolutions and leaves the rest to sgd",
                    one_of=("sgd", "adamw", "muon"))
    lr: float = key(0.1, "peak learning rate of the weights; with muon, of convolutions", above=0)
    momentum: float = key(0.9, "of sgd and muon", at_least=0, below=1)
    nesterov: bool = key(True, "Nesterov's form of the momentum")
    sgd_lr: float = key(0.1, "peak learning rate of what muon leaves to sgd", above=0)
    sgd_momentum: float = key(0.85, "momentum of what muon leaves to sgd", at_least=0, below=1)
    betas: list[float] = key((0.9, 0.999), "of adamw", at_least=0, below=1, lengths=(2,))
    weight_decay: float = key(5e-4, "L2 on the gradient with sgd, decoupled with adamw, not on muon's convolutions",
                              at_least=0, at_most=1e4)
    decay_per: str = key("rate", "a step decays by weight_decay times the learning rate, or times the schedule alone",
                         one_of=("rate", "schedule"))
    decay: str = key("weights", "what decays: weights of convolutions, linear maps and SE, or all parameters",
                     one_of=("weights", "all"))
    linear_lr_scale: float = key(1.0, "learning rate of the head's weights, as a multiple of lr (sgd_lr)", above=0, at_most=1e4)
    norm_bias_lr_scale: float = key(1.0, "learning rate of norm biases, as a multiple of lr (sgd_lr)", above=0,
                                    at_most=1e4)
    se_lr_scale: float = key(1.0, "learning rate of squeeze-and-excitation, as a multiple of lr (sgd_lr)", above=0, at_most=1e4)
    clip_norm: float = key(0.0, "largest norm over all gradients; 0 for no clipping", at_least=0)
    clip_value: float = key(0.0, "largest absolute entry of a gradient; 0 for no clipping", at_least=0)
    sam_radius: float = key(0.0, "how far up the slope gradients are taken (sharpness-aware minimisation, twice the time); 0: off", at_least=0)
    sam_from: float = key(0.0, "share of the steps after which sam_radius begins to count: 0.67 for the last third", at_least=0, below=1)
    sam_share: float = key(1.0, "share of a batch that shows the way up and that norms remember; 0.25: 1.25 times the time, not twice",
                           above=0, at_most=1)
    ema_decay: float = key(0.0, "evaluate and keep the moving average of the weights, of this decay a step; 0 for the last weights",
                           at_least=0, below=1)
    schedule: str = key("cosine", "course of the learning rate after the warm-up",
                        one_of=("onecycle", "cosine", "step", "constant"))
    warmup_epochs: float = key(0.0, "epochs of straight rise to the peak", at_least=0)
    start: float = key(0.0, "learning rate at the first step of a warm-up, as a share of the peak",
                       at_least=0, at_most=1)
    final: float = key(0.0, "learning rate at the end of onecycle and cosine, as a share of the peak",
                       at_least=0, at_most=1)
    milestones: list[float] = key((), "epochs at which `step` multiplies the rate by gamma", above=0)
    gamma: float = key(0.1, "factor of `step` at each milestone", above=0, at_most=1)

    def passes(self, begin: float = 0.0, end: float = 1.0) -> float:
        """Forward and backward passes a step on average, between two moments of a run in shares of its steps."""
        late = max(0.0, end - max(begin, self.sam_from)) / (end - begin)
        return 1 + (self.sam_share * late if self.sam_radius else 0.0)


@dataclass(frozen=True)
class Loop:
    epochs: int = key(200, "passes over the training images", at_least=1, at_most=1_000_000)
    hardest: list[float] = key((), "shares of the images, the hardest so far, each for an equal share of the epochs; empty: all",
                               above=0, at_most=1, lengths=range(1025))
    sync_norm: bool = key(True, "several processes normalise by the whole batch, as one does; false: each by its own share")


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = key(0, "steps between checkpoints within an epoch; 0 for the ends of epochs alone", at_least=0)


@dataclass(frozen=True)
class Evaluate:
    split: str = key("test", "images to evaluate on; holdout is a fixed part of the training images, not trained on",
                     one_of=("test", "holdout"))
    holdout_size: int = key(5000, "images in the holdout, balanced over the classes", at_least=1)
    tta: str = key("flip", "test-time augmentation of the final evaluation: views averaged before the decision",
                   one_of=("none", "flip", "flip_shift"))
    tta_sure: float = key(1.0, "images that the first view gives a class more than this probability are not looked at again",
                          above=0, at_most=1)
    batch_size: int = key(1000, "images a forward pass, in each process", at_least=1)
    every: int = key(1, "epochs between evaluations (the last epoch always is); 0 for the last alone", at_least=0)


@dataclass(frozen=True)
class Report:
    folder: str = key("runs", "where run folders are created")
    curves: bool = key(True, "draw curves.png at the end")
    tensorboard: bool = key(False, "write TensorBoard events into the run folder (pip install tensorboard)")
    wandb: bool = key(False, "tell Weights & Biases of every epoch (pip install wandb; wandb login)")


@dataclass(frozen=True)
class Config:
    """The resolved configuration. `recipe` is the last config file's stem, or `default`."""

    run: Run
    sources: Sources
    beton: Beton
    loader: Loader
    augment: Augment
    model: Model
    loss: Loss
    optim: Optim
    loop: Loop
    evaluate: Evaluate
    checkpoint: Checkpoint
    report: Report
    recipe: str = "default"

    def as_dict(self) -> dict[str, dict]:
        """{section: {key: value}} of plain values, as a YAML file would hold them."""
        return {name: {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(section).items()}
                for name, section in ((name, getattr(self, name)) for name in SECTIONS)}


SECTIONS: dict[str, type] = {"run": Run, "sources": Sources, "beton": Beton, "loader": Loader, "augment": Augment,
                             "model": Model, "loss": Loss, "optim": Optim, "loop": Loop, "evaluate": Evaluate,
                             "checkpoint": Checkpoint, "report": Report}


class Strict(Checker):
    """A fastargs checker for one key: nothing is rounded, cut or guessed."""

    WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

    def __init__(self, annotation, limits: Mapping):
        self.is_list = typing.get_origin(annotation) is list
        self.type = typing.get_args(annotation)[0] if self.is_list else annotation
        self.limits = limits

    def check(self, value):
        if not self.is_list:
            return self._one(value)
        entries = self._entries(value)
        if self.limits["lengths"] and len(entries) not in self.limits["lengths"]:
            raise ValueError(value)
        return tuple(self._one(entry) for entry in entries)

    def _entries(self, value) -> Sequence:
        """What `value`, one or a list, as YAML or the command line gives it, holds."""
        if self.is_list and isinstance(value, str):
            return [entry for entry in value.strip().removeprefix("[").removesuffix("]").split(",") if entry.strip()]
        return value if isinstance(value, (list, tuple)) else [value]

    def _one(self, value):
        if self.type is bool:
            value = value if isinstance(value, bool) else self.WORDS[str(value).strip().lower()]
        elif self.type is int:
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise ValueError(value)
            if isinstance(value, str) and not re.fullmatch(r"[+-]?\d(_?\d)*", value.strip()):
                raise ValueError(value)
            value = int(value)
            if not -2**63 <= value < 2**63:
                raise ValueError(value)
        elif self.type is float:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)) or not math.isfinite(float(value)):
                raise ValueError(value)
            value = float(value)
            if value and not SMALLEST_NUMBER <= abs(value) <= LARGEST_NUMBER:
                raise ValueError(value)
        elif not isinstance(value, str) or not value.isprintable():    # no file has a NUL in its name
            raise ValueError(value)
        low, above, below, high = (self.limits[k] for k in ("at_least", "above", "below", "at_most"))
        if ((low is not None and value < low) or (above is not None and value <= above)
                or (below is not None and value >= below) or (high is not None and value > high)
                or (self.limits["one_of"] and value not in self.limits["one_of"])
                or (self.limits["pattern"] and not re.fullmatch(self.limits["pattern"], value))):
            raise ValueError(value)
        return value

    def beyond(self, value) -> str:
        """What `help` leaves out, where a value lies outside of what any key of its type takes."""
        bounded = self.limits["at_most"] is not None or self.limits["below"] is not None
        for entry in self._entries(value):
            try:
                number = abs(float(entry))
            except (TypeError, ValueError, OverflowError):    # the last of an integer beyond the largest float
                number = math.inf if isinstance(entry, int) else 0
            if self.type is int and number >= 2**63 and not bounded:
                return f", {2**63 - 1} at most"
            if self.type is float and number > LARGEST_NUMBER and not bounded:
                return f", {LARGEST_NUMBER:g} at most"
            if self.type is float and 0 < number < SMALLEST_NUMBER:
                return f", {'0 or ' if self.limits['above'] is None else ''}{SMALLEST_NUMBER:g} at least in size"
        return ""

    def help(self) -> str:
        if self.limits["one_of"]:
            return "one of " + ", ".join(self.limits["one_of"])
        text = {bool: "true or false", int: "integer", float: "number", str: "printable text"}[self.type]
        signs = [("at_least", ">="), ("above", ">"), ("below", "<"), ("at_most", "<=")]
        limits = " and ".join(f"{sign} {self.limits[k]}" for k, sign in signs if self.limits[k] is not None)
        if limits:
            text += f" {limits}"
        if self.limits["pattern"]:
            text += f" like {self.limits['pattern']}"
        if not self.is_list:
            return text
        fewest, most = (choose(self.limits["lengths"], default=0) for choose in (min, max))
        return f"list of {text}" + (f", {fewest}{f' to {most}' if most > fewest else ''} of them" if most else "")


def declare() -> fastargs.Config:
    """A fresh fastargs configuration with every key of SECTIONS (its process-wide one would leak between uses)."""
    declared = fastargs.Config()
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        fastargs.Section(name, section.__name__, declared).params(**{
            f.name: fastargs.Param(Strict(hints[f.name], f.metadata["limits"]), f.metadata["help"], f.default)
            for f in dataclasses.fields(section)})
    return declared


def build(*layers: Mapping[str, object], recipe: str = "default", problems: Sequence[str] = ()) -> Config:
    """A Config from mappings of `section.key` (or nested sections) to values, later ones winning.

    Raises ConfigError with every problem: `problems` found earlier, unknown keys (with the nearest valid one), wrong
    types, values out of range, and values that contradict each other.
    """
    declared, problems, known = declare(), list(problems), _known_keys()
    for layer in layers:
        flat = dict(_flatten(layer))
        for name in list(flat):
            if name not in known:
                problems.append(f"{name if name.isprintable() else _shown(name)}: there is no such key" + _nearest(name, known))
                del flat[name]
            elif flat[name] is None:
                problems.append(f"{name}: has no value, expected {_checker(declared, name).help()}: "
                                "give one, or leave the key out for its default")
                del flat[name]
        declared.collect(flat)
    wrong = declared.validate(mode="errordict")
    for path in wrong:
        value, checker = declared.content[path], declared.entries[path].checker
        problems.append(f"{'.'.join(path)}: got {_shown(value)} ({type(value).__name__}), expected {checker.help()}"
                        + checker.beyond(value) + _nearest_word(value, checker))
    if wrong or problems:
        raise ConfigError(*problems)
    sections = {name: section(**{f.name: declared[f"{name}.{f.name}"] for f in dataclasses.fields(section)})
                for name, section in SECTIONS.items()}
    config = Config(**sections, recipe=recipe)
    problems = contradictions(config)
    if problems:
        raise ConfigError(*problems)
    return config


def contradictions(c: Config) -> list[str]:
    """Values that are each allowed, but not together."""
    found = []
    if c.optim.clip_norm and c.optim.clip_value:
        found.append(f"optim.clip_norm, optim.clip_value: got {c.optim.clip_norm} and {c.optim.clip_value}, expected "
                     "one kind of clipping: set the other to 0")
    if c.optim.warmup_epochs > c.loop.epochs:
        found.append(f"optim.warmup_epochs: got {c.optim.warmup_epochs}, expected at most loop.epochs = {c.loop.epochs}: give more epochs, "
                     "or a shorter rise (--optim.warmup_epochs 0 for none)")
    if c.optim.schedule == "step" and not c.optim.milestones:
        found.append("optim.milestones: got none, expected the epochs at which optim.schedule: step lowers the rate")
    late = [m for m in c.optim.milestones if m >= c.loop.epochs]
    if c.optim.schedule == "step" and late:
        found.append(f"optim.milestones: got {late}, expected epochs below loop.epochs = {c.loop.epochs}")
    if c.model.zero_init_norm and not c.model.learned_norm_scale:
        found.append("model.zero_init_norm, model.learned_norm_scale: got true and false, expected not both: a scale that "
                     "starts at 0 has to be learned")
    if c.run.folder and c.run.resume not in ("", "auto"):
        found.append(f"run.folder, run.resume: got {c.run.folder} and {c.run.resume}, expected one: a run goes on in its own "
                     "folder")
    for name, least in (("classes", 2), ("image_size", 4)):
        if 0 < getattr(c.model, name) < least:
            found.append(f"model.{name}: got {getattr(c.model, name)}, expected {least} and more, or 0 for the data's")
    for name in ("translate", "cutout"):
        if 0 < c.model.image_size <= getattr(c.augment, name):
            found.append(f"augment.{name}: got {getattr(c.augment, name)}, expected less than model.image_size = "
                         f"{c.model.image_size}")
    if c.augment.sides and min(c.augment.sides) <= c.augment.cutout:
        found.append(f"augment.cutout: got {c.augment.cutout}, expected less than the least of augment.sides = {min(c.augment.sides)}")
    for side in c.augment.sides:
        if 0 < c.model.image_size < side:
            found.append(f"augment.sides: got {side}, expected at most model.image_size = {c.model.image_size}")
    if any(share < 1 for share in c.loop.hardest) and c.loader.shares == "fixed":
        found.append("loop.hardest, loader.shares: got a part of the images and fixed, expected drawn: with fixed shares one process "
                     "would have more of the hardest than another")
    convolutions = sum(c.model.blocks) * c.model.block_depth
    if convolutions > MOST_CONVOLUTIONS:
        found.append(f"model.blocks, model.block_depth: got {convolutions:,} convolutions, expected {MOST_CONVOLUTIONS:,} at most")
    for name in ("channels", "kernels", "shortcut_kernels"):
        length, stages = len(getattr(c.model, name)), len(c.model.blocks)
        if length not in (1, stages):
            found.append(f"model.{name}: got {length} entries, expected 1 or, as model.blocks has, {stages}")
    even = [f"model.{name}" for name in ("kernels", "shortcut_kernels") if any(k % 2 == 0 for k in getattr(c.model, name))]
    found += [f"{name}: got an even number, expected odd ones, which keep the image's side" for name in even]
    if c.evaluate.split == "holdout" and c.model.classes and c.evaluate.holdout_size % c.model.classes:
        found.append(f"evaluate.holdout_size: got {c.evaluate.holdout_size}, expected a multiple of model.classes = "
                     f"{c.model.classes}, so that every class has as many, such as "
                     f"{max(1, c.evaluate.holdout_size // c.model.classes) * c.model.classes}")
    if c.sources.kind == "digits" and c.sources.path != Sources.path:
        found.append(f"sources.path, sources.kind: got {c.sources.path} and digits, which scikit-learn brings along: leave the path out, "
                     "or read what lies there with another recipe, or --sources.kind auto")
    if os.path.realpath(c.beton.train) == os.path.realpath(c.beton.test):
        found.append(f"beton.train, beton.test: both are {c.beton.train}, expected two files")
    return found


def names_a_source(settings: Config, argv: Sequence[str]) -> bool:
    """Whether recipe or command line say what to convert. CIFAR-10 from its server is what is taken for want of anything else."""
    return (settings.sources.path != Sources.path or settings.sources.kind not in (Sources.kind, "download")
            or any(word.partition("=")[0] == "--sources.path" for word in argv))


def read_file(path: str) -> dict[str, object]:
    """The `section.key` values of one YAML file (JSON is YAML). Raises ConfigError, naming the file, where it is none."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"--config-file {path}: has more than {LARGEST_FILE:,} bytes: it is no recipe")
        text = content.decode("utf-8")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ConfigError(f"--config-file {path}: {reason} (looked in {Path.cwd()}): give the path of a YAML file, such "
                          "as those in rn_configs/") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        # the last three: what PyYAML meets in a value with a tag, such as `!!bool maybe`
        place = ("nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split()) if
                 isinstance(error, (yaml.YAMLError, ValueError)) else f"a value that is not what its tag says ({error})")
        raise ConfigError(f"--config-file {path}: is no YAML that we read: {place}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config-file {path}: holds a {type(content).__name__}, expected sections such as "
                          "`model:` with keys below them")
    return dict(_flatten(content))


class _UniqueKeyLoader(yaml.SafeLoader):
    """Builds plain values only (SafeLoader), and refuses a key written twice, of which YAML would drop one, and aliases, by
    which a file of a few lines can stand for more values than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor}: write the values out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no plain word", key_node.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is written twice",
                                                        key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> tuple[Config, argparse.Namespace]:
    """Config and the program's own options from a command line.

    argv: `[--config-file FILE ...] [--section.key VALUE ...]` and the options that `parser`, the program's own, knows.
    Raises ConfigError with every problem at once; `--help` prints every key and exits.
    """
    parser = parser or argparse.ArgumentParser()
    parser.allow_abbrev = False
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = describe_keys()
    parser.error = _raise_config_error    # argparse would print its usage and exit
    parser.add_argument("-C", "--config-file", action="append", default=[], metavar="FILE",
                        help="YAML file with sections and keys; may be given again, later ones win")
    options, rest = parser.parse_known_args(list(argv))
    problems: list[str] = []
    layers: list[Mapping[str, object]] = []
    for path in options.config_file:
        try:
            layers.append(read_file(path))
        except ConfigError as error:
            problems += error.problems
    own = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    layers.append(_command_line(rest, own, problems))
    resume = next((layer["run.resume"] for layer in reversed(layers) if layer.get("run.resume")), "auto")
    if isinstance(resume, str) and resume != "auto":
        try:
            saved = read_file(str(Path(resume) / "config.yaml"))
            layers.insert(0, {name: value for name, value in saved.items() if name not in ("run.resume", "run.folder")})
        except ConfigError:
            problems.append(f"run.resume: {resume} is no run folder (looked in {Path.cwd()} for its config.yaml): name one, "
                            "or auto")
    recipe = Path(options.config_file[-1]).stem if options.config_file else "default"
    return build(*layers, recipe=recipe, problems=problems), options


def _raise_config_error(message: str):
    raise ConfigError(f"command line: {message}")


def _command_line(words: Sequence[str], own_options: Sequence[str], problems: list[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value` pairs; what is neither goes to `problems`."""
    found, known, i = {}, _known_keys(), 0
    while i < len(words):
        word, i = words[i], i + 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            problems.append(f"{word}: stands alone on the command line, expected --section.key value"
                            + _nearest(word, known))
            continue
        if not equals:
            if i < len(words) and not words[i].startswith("--"):
                value, i = words[i], i + 1
            elif name in known:
                problems.append(f"--{name}: has no value behind it, expected --{name} VALUE")
                continue
        if name not in known:
            options = [option.removeprefix("--") for option in own_options]
            problems.append(f"--{name}: there is no such key" + _nearest(name, [*known, *options], dashes="--"))
            continue
        found[name] = value
    return found


def describe_keys() -> str:
    """Every key with its type, default and one line, as --help shows it."""
    declared, lines = declare(), ["keys, for --section.key VALUE or a YAML file; in brackets the default, which a recipe may replace:"]
    for name in SECTIONS:
        lines.append(f"\n{name}:")
        for path in declared.sections_to_entries[(name,)]:
            param = declared.entries[path]
            default = list(param.default) if isinstance(param.default, tuple) else param.default
            default = str(default).lower() if isinstance(default, bool) else default
            lines.append(f"  {'.'.join(path)}  [{default if default != '' else 'empty'}]  ({param.checker.help()})"
                         f"\n      {param.desc}")
    return "\n".join(lines).replace("%", "%%")


def _known_keys() -> list[str]:
    return [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)]


def _checker(declared: fastargs.Config, name: str) -> Checker:
    return declared.entries[tuple(name.split("."))].checker


def changes(before: Mapping, now: Config) -> list[tuple[str, object, object]]:
    """(`section.key`, value before, value now) where a config that was written down differs from `now`.

    before: sections, or flat `section.key` values; a key that it lacks is newer, and was as its default. What `now` leaves to
    the data (FROM_DATA) is no change.
    """
    defaults, before = dict(_flatten(build({}).as_dict())), dict(_flatten(before))
    found = ((name, before.get(name, defaults[name]), value) for name, value in _flatten(now.as_dict()))
    return [(name, was, value) for name, was, value in found if was != value and (value or name not in FROM_DATA)]


def _flatten(mapping: Mapping, prefix: str = ""):
    """('a.b', value) for each leaf; an empty section yields nothing, a section set to a plain value yields itself."""
    for name, value in mapping.items():
        name = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif not (value is None and name in SECTIONS):
            yield name, value


def _nearest(name: str, known: Sequence[str], dashes: str = "") -> str:
    """': did you mean X?' where a known key is near in spelling, or has the same last part in another section."""
    word = ALSO_CALLED.get(name.rpartition(".")[2], name.rpartition(".")[2])
    same = [k for k in known if k.rpartition(".")[2] == word]
    near = same or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        last = {k.rpartition(".")[2]: k for k in known}
        near = [last[k] for k in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return f": did you mean {dashes}{near[0]}?" if near else ": --help lists them all"


def _shown(value: object) -> str:
    """`value` as a message shows it: one line, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:    # Python writes no integers of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:190]} ... ({len(text):,} characters)"


def _nearest_word(value: object, checker: Strict) -> str:
    near = difflib.get_close_matches(value if isinstance(value, str) else "", checker.limits["one_of"], n=1)
    return f": did you mean {near[0]}?" if near else ""

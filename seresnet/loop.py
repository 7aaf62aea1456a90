"""fit() and train_epoch(): the one place where loader, augmentation, net, loss and optimizer meet."""
from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from inspect import signature
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import nn

from seresnet import checkpoint, compiled, report, runtime
from seresnet.augment import normalise, train_batch
from seresnet.beton import WRITE, Beton, mismatch, open_beton, read_images
from seresnet.clock import Clock
from seresnet.config import Config, changes, contradictions, read_file
from seresnet.evaluate import Evaluation, evaluate
from seresnet.graphs import NotRecorded, Replays, cuda_graphs
from seresnet.loader import Batch, BatchLoader, epoch_order, holdout_split
from seresnet.loss import Difficulty, Tally, Totals, smoothed_cross_entropy
from seresnet.model import SEResNet, check_budget, count_parameters, shapes_alone
from seresnet.optim import (AveragedModel, ascended, average_weights, build_optimizer, clip_gradients, follow, learning_rate_factor,
                            set_learning_rate, stepwise)
from seresnet.ranks import Ranks, join
from seresnet.synced import expect, synchronise

# Streams of random numbers: each is seeded from (run seed, stream, epoch) and so shares nothing with the others.
INITIALISATION, AUGMENTATION, DROPOUT = 1, 2, 3
# On the weights: may change when a run goes on. Where a beton lies is nothing beside its bytes, which are compared; the second line is
# what a run may change that lacked the memory.
WITHOUT_EFFECT = {"run.resume", "run.folder", "run.cuda_graphs", "sources", "beton", "checkpoint", "report",
                  "evaluate.batch_size", "loader.mode", "loader.workers", "loader.batches_ahead", "run.tune_allocator"}
SMALLEST_SCALE = 2.0**-24    # of fp16's gradients: 40 steps in a row that gave none at all, from the scaler's 65,536 on
# In so many it may pay that cuDNN tries its algorithms first, which took 1.2 s; it picks others in the next run, whose sums differ. And
# that Triton is loaded, in 2.6 s, whose passes saved 0.5 to 2.9 ms a step, more in larger nets: paid back after 900 steps of se96, and
# 4,600 of se95 (records/2026-11-27_gpu).
MANY_STEPS = 2000
FEW_KEYS = 4             # that runs of one recipe differ in where one was mistyped, or left out
WHITENING_IMAGES = 5000    # as many as Jordan's listing (arXiv 2404.00498, appendix) takes


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on: betons, and the samples of the training beton that either part takes."""

    train: Beton
    test: Beton
    train_indices: np.ndarray | None = None    # int64, sorted; None for all
    test_indices: np.ndarray | None = None


def prepare(config: Config, of: runtime.Launch = runtime.Launch()) -> tuple[Config, Data, SEResNet]:
    """Check and open all that a training by the processes of a launch needs, before anything is written or trained.

    Returns the config with the data's own figures where `model.classes` or `model.image_size` are 0, the data, the net.
    Raises UserError with the problems of betons, net and split together.
    """
    problems = [problem] if (problem := of.problem_with_batch(config.loader.batch_size)) else []
    if of.world > 1 and config.optim.sam_radius and config.optim.sam_share < 1:
        problems.append(f"optim.sam_share: got {config.optim.sam_share}, expected 1 with {of.world} processes: each has a part of a batch already")
    betons: dict[str, Beton] = {}
    for name in ("train", "test") if config.evaluate.split == "test" else ("train",):
        wanted = config.model if "train" not in betons else _fitted(config, betons["train"]).model
        place = getattr(config.beton, name)
        try:
            betons[name] = open_beton(place, classes=wanted.classes or None, image_size=wanted.image_size or None, verify=config.beton.verify)
        except runtime.UserError as error:
            write = _how_to_write(config)
            if isinstance(error.__cause__, FileNotFoundError) and not Path(place).exists():    # it may be the sidecar that is not there
                problems.append(f"beton.{name}: {place} is not there: write it with `{write}`, or name another with --beton.{name}")
            else:
                problems += [problem.replace(WRITE, write) for problem in error.problems]
    if "train" in betons:
        config = _fitted(config, betons["train"])
        problems += contradictions(config)    # of the data's classes and image size
    if len(betons) == 2:
        problems += mismatch(betons["train"], betons["test"])
    model = None
    if config.model.classes and config.model.image_size:
        try:
            model = build_model(config)
        except ValueError as error:
            problems += [f"model.{line}" for line in str(error).splitlines()]
    if model is not None and config.augment.sides and not model.takes(min(config.augment.sides)):
        problems.append(f"augment.sides: got {min(config.augment.sides)}, and {len(config.model.blocks)} stages leave nothing of "
                        "images that small: give larger sides, or fewer stages")
    if "train" in betons and config.evaluate.split == "holdout" and config.evaluate.holdout_size >= betons["train"].samples:
        classes, samples = len(betons["train"].classes), betons["train"].samples
        problems.append(f"evaluate.holdout_size: got {config.evaluate.holdout_size}, expected fewer than the {samples} images of "
                        f"{config.beton.train}, such as --evaluate.holdout_size {max(1, samples // 5 // classes) * classes}")
    held = config.evaluate.holdout_size if config.evaluate.split == "holdout" else 0
    if "train" in betons and config.loop.hardest:
        fewest = round(min(config.loop.hardest) * (betons["train"].samples - held))
        if fewest < (config.loader.batch_size if config.loader.drop_last else 1):
            problems.append(f"loop.hardest: got {min(config.loop.hardest)}, which leaves {max(0, fewest)} images and no batch of "
                            f"loader.batch_size = {config.loader.batch_size}: give a larger share, or smaller batches"
                            + (f", such as --loader.batch_size {fewest}" if fewest > 0 else ""))
    if model is not None and not problems and (alone := _batch_of_one(config, model, betons["train"].samples - held, of.world)):
        problems.append(alone)
    if problems:
        raise runtime.UserError(*problems)
    if config.evaluate.split == "test":
        return config, Data(betons["train"], betons["test"]), model
    kept, held = holdout_split(betons["train"].labels, config.evaluate.holdout_size)
    return config, Data(betons["train"], betons["train"], kept, held), model


def _how_to_write(config: Config) -> str:
    """The command that writes the betons of this config, with `...` for what is not known of it."""
    recipe = Path("rn_configs", f"{config.recipe}.yaml")
    known = read_file(str(recipe)) if recipe.is_file() else {}
    text = f"python write_datasets.py --config-file {recipe.as_posix() if known else '...'}"
    if config.sources.kind not in ("digits", "download"):
        text += " --sources.path ..."
    for name in ("train", "test"):    # the recipe's own are those of another set
        if (place := getattr(config.beton, name)) != known.get(f"beton.{name}", getattr(type(config.beton), name)):
            text += f" --beton.{name} {shlex.quote(place)}"
    return text


def _batch_of_one(config: Config, model: SEResNet, images: int, processes: int) -> str:
    """What is wrong where a batch of the training `images`, the part of it that is ascended from, or a process's share of it that is
    normalised by itself, has one image and the last stage one pixel: there is no deviation of one number. '' where nothing is."""
    size, share = config.loader.batch_size, config.optim.sam_share if config.optim.sam_radius else 1
    parts = {stepwise(config.loop.hardest, epoch, config.loop.epochs, 1) for epoch in range(config.loop.epochs)}
    lasts = set() if config.loader.drop_last else {round(images * part) % size for part in parts}
    few = min(count for count in {size, *lasts} if count)
    if not config.loop.sync_norm:
        few = few // processes or 1    # fewer images than processes: one in some, none in the others
    if math.ceil(share * few) > 1 or model.last_side(min(config.augment.sides, default=config.model.image_size)) > 1:
        return ""
    alone = "a batch" if processes == 1 or config.loop.sync_norm else f"one of {processes} processes (loop.sync_norm: false)"
    ways = ["another size", "fewer stages"]
    if not config.loader.drop_last:    # perhaps it is the last batch alone
        ways.insert(0, "loader.drop_last true")
    if few > 1:
        alone = f"optim.sam_share = {share} of {alone}"
        ways.insert(0, "a larger optim.sam_share")
    return (f"loader.batch_size: got {size}, which leaves one image to {alone}, and the last stage one pixel of it, too little to normalise: "
            f"give {', '.join(ways[:-1])} or {ways[-1]}")


def _fitted(config: Config, train: Beton) -> Config:
    """`config` with the classes and the image size of `train` where it leaves them open, and with how `train` was written, which
    is what images have to be read like that the net sees later."""
    if train.height != train.width:
        raise runtime.UserError(f"{train.path}: has images of {train.width} x {train.height} pixels, expected squares: write it "
                                "again with --sources.image_size")
    return replace(config, model=replace(config.model, classes=config.model.classes or len(train.classes),
                                         image_size=config.model.image_size or train.height),
                   sources=replace(config.sources, **train.how))


def build_model(config: Config) -> SEResNet:
    """The net of `config.model`, within its parameter budget, initialised from the run's seed, channels-last, on the CPU.

    Raises ValueError where the values make no net or the budget is exceeded.
    """
    arguments = asdict(config.model)
    budget = arguments.pop("max_parameters")
    size = check_budget(shapes_alone(arguments), budget) * 4    # a net beyond the budget may be one beyond the memory
    if size > runtime.free_memory_of_machine():
        raise ValueError(f"channels: this net's parameters take {size >> 20:,} MiB, {runtime.free_memory_of_machine() >> 20:,} MiB are "
                         "free: fewer blocks or channels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.stream_seed(config.run.seed, INITIALISATION))
        model = SEResNet(**arguments)
    return model.to(memory_format=torch.channels_last)


def train_epoch(model: nn.Module, batches: Iterable, *, augment: Callable, loss: Callable, clip: Callable,
                optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, learning_rate: Callable[[int], float],
                first_step: int, dtype: torch.dtype, device: torch.device, tally: Tally | None = None,
                weight: Callable[[int, int], float] = lambda step, count: 1.0,
                replay: Callable[[Callable], Callable] = lambda gradients: gradients,
                ascend: Callable[[int], AbstractContextManager | None] = lambda step: None, ascend_share: float = 1.0,
                note: Callable[[torch.Tensor, Batch], None] = lambda logits, batch: None,
                after_step: Callable[[int, Tally], None] = lambda step, tally: None) -> Totals:
    """One pass over `batches` (of loader.Batch). No step waits until the device has nothing to do, but the first, which makes the constants, one
    that is recorded, and with float16 its scaler, which asks whether the gradients are finite; the totals are read once.

    augment(batch, step) -> normalised images; loss(logits, labels) -> scalar; clip() clips the gradients in place;
    learning_rate(step) -> share of the peak for the run's step, of which `first_step` is that of the first batch.
    note(logits, batch) may keep what the net said of each image.
    weight(step, samples): what several processes, of which gradients are the mean, have to multiply their loss by.
    replay(gradients) does as `gradients`, which a step's forward and backward pass is, from a recording perhaps.
    ascend(step) -> a block within which the step's gradients are taken, after those of the batch's first `ascend_share`, or None. Below
    1 norms take their running statistics from that share alone, and the tally its losses from where the block leads.
    tally: of the epoch's batches before these, counted on. after_step(steps done in the run, tally) may save, or raise.
    """
    def gradients(images: torch.Tensor, labels: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        value = loss(logits, labels)
        scaler.scale(value * weight).backward()
        return logits.detach(), value.detach()

    tally, gradients = tally or Tally(device), replay(gradients)
    for step, batch in enumerate(batches, first_step):
        set_learning_rate(optimizer, learning_rate(step))
        inputs, elsewhere = (augment(batch, step), batch.labels, weight(step, len(batch.labels))), ascend(step)
        if elsewhere is None:
            logits, value = gradients(*inputs)
        else:
            some = math.ceil(ascend_share * len(batch.labels))
            seen = gradients(inputs[0][:some], inputs[1][:some], inputs[2])
            seen = [result.clone() for result in seen] if some == len(batch.labels) else None    # a recording's are its own
            with elsewhere:
                logits, value = gradients(*inputs)
            logits, value = seen or (logits, value)    # of the weights as they are
        scaler.unscale_(optimizer)
        clip()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        tally.add(logits, batch.labels, value)
        note(logits, batch)
        after_step(step + 1, tally)
    return tally.read()


@dataclass(frozen=True)
class Program:
    """What trains: `trainings` one after the other, over all of which what a program pays for once has to pay off, and of which this
    one began `begun` seconds after its start."""

    trainings: int = 1
    begun: float = 0.0

    def seconds(self) -> float:
        """Since the training began; of the first, since the program did."""
        return report.seconds_since_process_start() - self.begun


@dataclass(frozen=True)
class Session:
    """All that a training needs, set up and ready for the first step; closes its loaders when it is left."""

    config: Config
    data: Data
    device: torch.device
    dtype: torch.dtype
    model: SEResNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator    # of the augmentation, on the device
    train_batches: BatchLoader
    test_batches: BatchLoader
    ranks: Ranks
    average: AveragedModel | None = None    # of the weights, with optim.ema_decay
    difficulty: Difficulty | None = None    # of the training images, with loop.hardest
    replays: Replays | None = None    # of the forward and backward pass, with run.cuda_graphs
    program: Program = Program()

    @property
    def result(self) -> nn.Module:
        """The net that is evaluated and kept: the one that is trained, or the average of its weights."""
        return self.average.module if self.average else self.model

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.train_batches.close()
        self.test_batches.close()

    def samples(self, epoch: int) -> int:
        """How many images `epoch` (from 0) trains on."""
        return round(self.train_batches.samples * stepwise(self.config.loop.hardest, epoch, self.config.loop.epochs, 1))

    def steps(self, epoch: int) -> int:
        """How many batches that is."""
        return self.train_batches.batches(self.samples(epoch))

    def first_step(self, epoch: float) -> int:
        """The run's step (from 0) with which `epoch` begins, or which it has reached at a fraction."""
        if not self.config.loop.hardest:
            return round(epoch * len(self.train_batches))
        whole = int(epoch)
        return round(self._first_steps[whole] + (epoch - whole) * self.steps(min(whole, self.config.loop.epochs - 1)))

    @cached_property
    def _first_steps(self) -> list[int]:
        return list(accumulate(map(self.steps, range(self.config.loop.epochs)), initial=0))

    @property
    def is_long(self) -> bool:
        """Whether the program has so many steps, second passes counted, that cuDNN may try its algorithms first, and Triton be loaded."""
        optim, steps = self.config.optim, self.first_step(self.config.loop.epochs) * self.program.trainings
        return steps * optim.passes() > MANY_STEPS

    def batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches that `epoch` trains on, from its `first_batch` on: of all images, or of the hardest."""
        only, count = None, self.samples(epoch)
        if count < self.train_batches.samples:
            order = epoch_order(self.train_batches.samples, self.config.run.seed, epoch)    # by which it goes among equals
            only = self.difficulty.hardest(count, torch.from_numpy(self.train_batches.indices[order])).numpy()
        return self.train_batches.epoch(epoch, first_batch, only)

    def learning_rate(self, step: int) -> float:
        """The share of the peak learning rate at `step`, counted from 0 over the whole run."""
        optim = self.config.optim
        return learning_rate_factor(
            step, schedule=optim.schedule, total_steps=self.first_step(self.config.loop.epochs),
            warmup_steps=self.first_step(optim.warmup_epochs), start=optim.start, final=optim.final,
            milestones=[self.first_step(epoch) for epoch in optim.milestones if optim.schedule == "step"], gamma=optim.gamma)

    def parts(self, epoch: int, batches_done: int = 0) -> dict:
        """The arguments of train_epoch for `epoch` (from 0), of which `batches_done` were trained on before.

        Begins the epoch: seeds the generators from (run seed, epoch), so that an epoch's random numbers do not depend on what ran
        before it; inside an epoch they are as the checkpoint left them. `batches` has to be asked for after it.
        """
        config, data = self.config, self.data.train
        if batches_done == 0:
            self.generator.manual_seed(runtime.stream_seed(config.run.seed, AUGMENTATION, epoch))
            torch.manual_seed(runtime.stream_seed(config.run.seed, DROPOUT, epoch))
            if self.difficulty:
                self.difficulty.begin_epoch()
        settings, of = asdict(config.augment), self.ranks.launch
        settings["side"] = stepwise(settings.pop("sides"), epoch, config.loop.epochs, 0)
        first_step = self.first_step(epoch)
        if of.world > 1:
            settings["share"] = of.share

        def augment(batch: Batch, step: int) -> torch.Tensor:
            if of.world > 1:
                settings["whole"] = whole(step)
                expect(self.model, settings["whole"])
            return train_batch(batch.images, batch.indices, epoch, **settings, mean=data.mean, std=data.std,
                               dtype=self.dtype, generator=self.generator, seed=config.run.seed)

        def weight(step: int, count: int) -> float:
            return count * of.world / whole(step) if of.world > 1 else 1.0

        def whole(step: int) -> int:
            return self.train_batches.whole((step - first_step) % self.steps(epoch), self.samples(epoch))    # benchmarks go round and round

        def note(logits: torch.Tensor, batch: Batch) -> None:
            if self.difficulty:
                self.difficulty.note(logits, batch.labels, batch.indices)

        parameters = list(self.model.parameters())
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]    # nothing depends on a norm's count of batches

        def ascend(step: int) -> AbstractContextManager | None:
            if not config.optim.sam_radius or step < self.first_step(config.loop.epochs) * config.optim.sam_from:
                return None
            return ascended(parameters, buffers, config.optim.sam_radius, overflows=self.scaler.is_enabled())

        return dict(
            augment=augment, weight=weight, ascend=ascend, ascend_share=config.optim.sam_share, optimizer=self.optimizer,
            scaler=self.scaler, dtype=self.dtype, device=self.device,
            loss=partial(smoothed_cross_entropy, smoothing=config.loss.label_smoothing),
            clip=partial(clip_gradients, parameters, norm=config.optim.clip_norm,
                         value=config.optim.clip_value),
            learning_rate=self.learning_rate, first_step=first_step + batches_done, note=note,
            **({"replay": self.replays.of} if self.replays else {}))

    def tally(self) -> Tally:
        """A new one, of all processes together."""
        return Tally(self.device, self.ranks.gather)

    def equalise(self) -> None:
        """Give all processes the same norm statistics, where each has its own."""
        if not self.config.loop.sync_norm:
            for net in [self.model] + ([self.average.module] if self.average else []):    # in one order in all processes
                self.ranks.equalise(net)

    def evaluate(self, tta: str, watch: Callable[[Iterable], Iterable] = iter) -> Evaluation:
        """Accuracy and loss on the evaluation split, whose batches pass through `watch`."""
        return evaluate(self.result, watch(self.test_batches.epoch(0)), samples=self.test_batches.samples, tta=tta,
                        sure=self.config.evaluate.tta_sure, mean=self.data.train.mean, std=self.data.train.std,
                        dtype=self.dtype, device=self.device, gather=self.ranks.gather)


def open_session(config: Config, device: torch.device, data: Data, model: SEResNet, ranks: Ranks = Ranks(),
                 program: Program = Program()) -> Session:
    """Move the net to the device, set its whitening stem from training images, open the loaders, build the optimizer."""
    dtype = runtime.pick_dtype(config.run.precision, device)
    model = model.to(device)
    if model.wants_whitening:
        model.whiten(some_images(data, WHITENING_IMAGES, device))
    optim = {name: value for name, value in asdict(config.optim).items() if name in signature(build_optimizer).parameters}
    open_loader = partial(BatchLoader, device=device, mode=config.loader.mode, seed=config.run.seed,
                          workers=config.loader.workers, batches_ahead=config.loader.batches_ahead, of=ranks.launch)
    average = average_weights(model, config.optim.ema_decay) if config.optim.ema_decay else None
    if ranks.world > 1:
        synchronise(model, ranks.gather, ranks.launch.share, norms=config.loop.sync_norm)
    train_batches = open_loader(data.train, batch_size=config.loader.batch_size, indices=data.train_indices,
                                drop_last=config.loader.drop_last, shares=config.loader.shares)
    test_batches = open_loader(data.test, batch_size=config.evaluate.batch_size * ranks.world, indices=data.test_indices,
                               shuffle=False, shares="fixed")
    record = cuda_graphs() if wants_graphs(config, device, ranks.world) else None
    optimizer = build_optimizer(model, **optim, fused=dtype != torch.float16, record=record)
    if average:
        follow(average, model, optimizer)
    session = Session(config, data, device, dtype, model, optimizer,
                      torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), torch.Generator(device),
                      train_batches, test_batches, ranks, average,
                      Difficulty(data.train.samples, device, ranks.gather) if config.loop.hardest else None,
                      Replays(model.parameters(), record) if record else None, program)
    torch.backends.cudnn.benchmark = session.is_long
    compiled.use_triton(session.is_long)
    return session


def wants_graphs(config: Config, device: torch.device, processes: int) -> bool:
    """Whether steps are replayed as CUDA graphs: exchanges between processes, and a compiler's work, are not recorded."""
    return config.run.cuda_graphs and device.type == "cuda" and processes == 1 and not config.run.compile


def some_images(data: Data, count: int, device: torch.device) -> torch.Tensor:
    """Up to `count` training images from all over the set, whose classes may follow one another, normalised: float32
    (count, 3, H, W) on the device."""
    chosen = np.arange(data.train.samples) if data.train_indices is None else data.train_indices
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(np.int64)]
    batch = torch.from_numpy(read_images(data.train, chosen)).to(device).permute(0, 3, 1, 2)
    return normalise(batch, data.train.mean, data.train.std, torch.float32)


def fit(config: Config, command: Sequence[str], program: Program = Program()) -> dict:
    """Train the net of `config`, evaluate it, leave a run folder behind. Returns what its report.json holds.

    command: the command line, for the run folder. program: what this training is one of. With `run.resume` an earlier run goes on, in its
    own folder, as if it had never stopped. Raises UserError before anything is written where config, data and machine do not fit together;
    NonFiniteLoss where training diverged (`weights.pt` then holds the last good epoch); Interrupted after a signal, when
    `last.pt` holds all that is needed to go on.
    """
    of = runtime.launch()
    device = runtime.pick_device(config.run.device, of)
    runtime.set_threads(config.run.threads, of)
    if not config.run.compile:
        runtime.leave_the_compiler_alone()
    for package in ("tensorboard", "wandb"):
        if getattr(config.report, package):
            report.require(package)
    with join(of, device) as ranks, ExitStack() as opened:
        begun, stage = begun_before(config, ranks)
        if stage == "report.json":
            report.say(f"{begun} was finished before the launcher started this again: nothing is left to do")
            return report.read_report(begun) if ranks.main else {}
        if config.run.resume == "auto" and config.run.folder and begun is None and was_left_at_once(Path(config.run.folder), config):
            begun = Path(config.run.folder)
        if stage == "last.pt":
            config = replace(config, run=replace(config.run, resume=str(begun), folder=""))
        with ranks.together():
            config, data, model = prepare(config, of)
            arithmetic = f"{device.type}, {runtime.pick_dtype(config.run.precision, device)}"
        ranks.check_same("config or data", fingerprint(config, data))
        ranks.check_same("kind of device or number format", number_of(arithmetic), "give --run.device and --run.precision that all have")
        with ranks.together():
            folder, state = open_resumed(config, data) if ranks.main else (None, None)
            if folder:
                opened.callback(folder.close)    # until the training itself does, and other trainings of this program find it locked
        state = checkpoint.unpack(ranks.broadcast(checkpoint.pack(state))) if ranks.world > 1 else state
        if state is not None:
            config = replace(config, recipe=state["recipe"])
        explained = partial(memory_explained, config, device, of.world, state is not None)
        with ranks.together(), explained():
            session = open_session(config, device, data, model, ranks, program)
        with session, explained():
            environment = {"command": list(command), "commit": runtime.git_commit(), "versions": runtime.describe_versions(),
                           "machine": runtime.describe_machine(), "recipe": config.recipe, "seed": config.run.seed, "data": described(data),
                           "processes": of.world, "job": of.job}
            with ranks.together():
                if state is None and ranks.main:
                    folder = report.open_run_folder(begun) if begun else report.create_run_folder(
                        config.report.folder, config.recipe, config.run.folder)
                    opened.callback(folder.close)
                    if config.run.resume == "auto" and not begun:
                        report.say(f"run.resume: auto: no unfinished run of this config in {config.run.folder or config.report.folder}: "
                                   "this one begins anew" + ("" if config.run.folder else nearest_unlike(config, data)))
                    if config.recipe == "default" and not begun:
                        report.say(f"no --config-file: {config.loop.epochs:,} epochs with the defaults and what the command line gives; "
                                   "rn_configs/ holds recipes (--config-file rn_configs/se94.yaml)")
                    if config.augment.flip == "none" and config.evaluate.tta != "none" and not begun:
                        report.say(f"evaluate.tta: {config.evaluate.tta} looks at mirrored images, too, which this net is not trained on "
                                   "(augment.flip: none): --evaluate.tta none goes with it")
                    itself = replace(config, run=replace(config.run, folder="", resume=""))    # given again, it is a new run
                    folder.write_start(itself.as_dict(), environment)
                elif state is not None:
                    checkpoint.restore_training_state(state["training"], model, session.optimizer, session.scaler,
                                                      session.generator, session.average)
                    if session.difficulty and ranks.main:
                        session.difficulty.go_on_from(state["difficulty"])
                    elif session.difficulty:
                        session.difficulty.go_on_from({**state["difficulty"], "now": state["difficulty"]["before"]})
                if state is not None and ranks.main:
                    folder.rewind(state["records"])
                    folder.write_resumption({**environment, "epoch": state["epoch"], "batches_done": state["batches_done"]})
                if config.report.tensorboard and ranks.main:
                    folder.open_tensorboard()
                if config.report.wandb and ranks.main:
                    try:
                        folder.open_wandb(config.as_dict())
                    except runtime.UserError:
                        if state is None:
                            folder.abandon()
                        raise
            path = Path(ranks.broadcast(str(folder.path if folder else "").encode()).decode())
            opened.pop_all()
            with closing(folder or report.NoFolder(path)) as folder:
                if not ranks.main:
                    folder.rewind(state["records"] if state else [])
                report.print_summary(config.as_dict(), facts(session), path)
                if state and state.get("processes", 1) != of.world:
                    report.say(changed_processes(session, state.get("processes", 1)))
                if state and state.get("precision", str(session.dtype)) != str(session.dtype):
                    report.say(f"trained in {state['precision']} so far, in {session.dtype} from here on: sums are rounded otherwise")
                with device_failure_explained(device, path, of.world):
                    return run_epochs(session, folder, state)


@contextmanager
def memory_explained(config: Config, device: torch.device, processes: int, goes_on: bool) -> Iterator[None]:
    """A block whose want of memory, or whose step that cannot be recorded, is explained by the keys that it hangs on: by those of them that
    may change, where a run `goes_on`."""
    side, size = config.model.image_size, config.loader.batch_size
    half = max(processes, size // 2 // processes * processes)
    less = "" if goes_on else f"--loader.batch_size {half}, smaller --model.channels, "
    less += "--run.cuda_graphs false, " if device.type == "cuda" else ""
    try:
        with runtime.memory_explained(
                device, f"loader.batch_size = {size} (evaluate.batch_size = {config.evaluate.batch_size}) and images of {side} x {side} "
                "pixels", f"give {less}--loader.mode stream, or a smaller --evaluate.batch_size where it evaluates"):
            yield
    except NotRecorded as error:
        raise runtime.UserError(f"run.cuda_graphs: a step could not be recorded ({error}): --run.cuda_graphs false does without" + (
                                "" if goes_on else f"; where memory was short, --loader.batch_size {half} may help")) from error


@contextmanager
def device_failure_explained(device: torch.device, folder: Path, processes: int = 1) -> Iterator[None]:
    """A block of a run in `folder`, of which an error that leaves the device useless for this process is told with the way on."""
    try:
        yield
    except RuntimeError as error:
        failed = isinstance(error, torch.AcceleratorError)
        if not failed and device.type == "cuda" and processes == 1:    # of a library's call, or of a recording, that came upon it first
            failed = not runtime.cuda_answers()    # among several it may wait for what another that has gone was to send
        if runtime.is_out_of_memory(error) or not failed:
            raise
        raise runtime.DeviceFailed(
            f"{str(error).partition(chr(10))[0]}: the device has failed, and this program can do no more with it: go on with --run.resume {folder} "
            "from the state that was saved last; should it come again, with --run.cuda_graphs false") from error


def was_left_at_once(path: Path, config: Config) -> bool:
    """Whether a training of this config began in the folder `path`, and ended before it had saved anything."""
    kept = {file.name for file in path.glob("[!.]*")}    # but files that were being written
    if "log.jsonl" not in kept or (path / "log.jsonl").stat().st_size:
        return False
    return kept == {"log.jsonl"} or not kept & {"report.json", *report.CHECKPOINTS} and is_of(path, config)


def begun_before(config: Config, ranks: Ranks) -> tuple[Path | None, str]:
    """The run folder that the launcher's earlier attempt began, where it has started this training again (--max-restarts), and
    how far it came: `report.json`, `last.pt`, or '' where it holds neither. The first process looks: only it has to see it."""
    found, stage = None, ""
    if ranks.launch.restarts and ranks.main:
        resumed = "" if config.run.resume == "auto" else config.run.resume
        found = next((path for path in report.begun_by(ranks.launch.job, config.report.folder,
                                                       (config.run.folder, resumed)) if is_of(path, config)), None)
        stage = next((name for name in ("report.json", "last.pt") if found and (found / name).exists()), "")
    if ranks.launch.restarts:
        path, stage = json.loads(ranks.broadcast(json.dumps([str(found or ""), stage]).encode()))
        found = Path(path) if path else None
    return found, stage


def is_of(path: Path, config: Config) -> bool:
    """Whether the run in the folder `path` has this config, as far as can be told before the data are opened: a job may train
    one recipe with several seeds."""
    try:
        return not changes_of(path, config)
    except runtime.UserError:
        return False


def changes_of(path: Path, config: Config) -> list[tuple[str, object, object]]:
    """(`section.key`, value there, value now) where the run in the folder `path` has another config. Raises UserError where its
    config.yaml cannot be read."""
    # of a set, a job's copy may lie in another place, under its name
    return [(name, before, value) for name, before, value in changes(read_file(str(path / "config.yaml")), config)
            if has_effect(name) or name in ("beton.train", "beton.test") and Path(str(before)).name != Path(value).name]


def nearest_unlike(config: Config, data: Data) -> str:
    """In words, the unfinished run of this config that was trained on other images, or the one that differs in the fewest keys, and in
    which, the newest of several; '' where all differ in more than FEW_KEYS, as other recipes do. For who mistypes a key of the run meant."""
    found = []
    for path in report.unfinished_run_folders(config.report.folder):
        with suppress(runtime.UserError):
            if changes := changes_of(path, config):
                found.append((changes, path))
            elif others := differences(checkpoint.load(path / "last.pt"), config, data):
                return f" (that in {path} cannot go on: {'; '.join(others)})"
    changes, path = min(found, key=lambda run: len(run[0]), default=([], None))
    if not 0 < len(changes) <= FEW_KEYS:
        return ""
    return f" (one that is like it, {path}, has {', '.join(f'{name} {before}, not {value}' for name, before, value in changes)})"


def fingerprint(config: Config, data: Data) -> int:
    """A number below 2**63 that processes share which train with the same config on the same bytes."""
    settings = {name: section for name, section in config.as_dict().items() if name != "beton"}    # paths may differ, bytes not
    return number_of(json.dumps([settings, data.train.sha256, data.test.sha256], sort_keys=True))


def number_of(text: str) -> int:
    """A number below 2**63 that other texts do not have."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def changed_processes(session: Session, before: int) -> str:
    """What it changes that a run goes on in another number of processes."""
    loop, now = session.config.loop, session.ranks.world
    text = f"trained by {before} processes so far, by {now} from here on: the same batches, in shares of another size; sums are "\
           "rounded in another order"
    if not loop.sync_norm:
        text += "; loop.sync_norm is false, so norms now see shares of another size, too"
    if session.config.loader.shares == "fixed":
        text += "; loader.shares is fixed, so batches are put together otherwise, and an epoch that was begun may show some images "\
                "twice and others not at all"
    return text


# -- stop and go on -----------------------------------------------------------------------------------------------------

def open_resumed(config: Config, data: Data) -> tuple[report.RunFolder | None, dict | None]:
    """The folder to go on in, locked, and its last state, as `run.resume` asks for; (None, None) to start a new run.

    Raises UserError where a named run is finished, has no checkpoint, is being trained, or is of another config or data; with `auto`,
    where the unfinished run in `run.folder` is being trained or is another one.
    """
    named = config.run.resume
    if not named:
        return None, None
    unfinished = report.unfinished_run_folders(config.report.folder, config.run.folder) if named == "auto" else []
    if config.run.folder and unfinished:    # the run of that folder is meant, and no other can begin in it
        named = str(config.run.folder)
    if named != "auto":
        path = Path(named)
        if (path / "report.json").exists():
            raise runtime.UserError(f"run.resume: {path} is finished, its report.json is there: nothing is left to do")
        if not (path / "last.pt").exists():
            raise runtime.UserError(f"run.resume: {path} holds no last.pt to go on from: start anew, without run.resume")
        folder = report.open_run_folder(path)
        try:
            return folder, load_state(path, config, data)
        except BaseException:
            folder.close()
            raise
    for path in unfinished:
        if not is_of(path, config):
            continue
        try:
            folder = report.open_run_folder(path)
        except runtime.UserError:    # another process is at work there: this is not the run to go on with
            continue
        try:
            state = None if (path / "report.json").exists() else checkpoint.load(path / "last.pt")    # it may have ended by now
            if state and not differences(state, config, data):
                return folder, state
        except BaseException:
            folder.close()
            raise
        folder.close()
    return None, None


def load_state(path: Path, config: Config, data: Data) -> dict:
    """What last.pt in the run folder `path` holds. Raises UserError, with every difference, where it is of another run."""
    state = checkpoint.load(path / "last.pt")
    found = differences(state, config, data)
    if found:
        raise runtime.UserError(*(f"run.resume: {path}: {line}: leave it as it was, or start a new run in another folder" for line in found))
    return state


def has_effect(key: str) -> bool:
    """Whether a run is another one where this `section.key` is."""
    return not {key, key.partition(".")[0]} & WITHOUT_EFFECT


def differences(state: dict, config: Config, data: Data) -> list[str]:
    """What of config and data is not as it was when `state` was saved, a line each; keys WITHOUT_EFFECT do not count."""
    found = [f"{name}: was {before}, is {value}" for name, before, value in changes(state["config"], config) if has_effect(name)]
    for split, beton in (("train", data.train), ("test", data.test)):
        if state["data"][split] != beton.sha256:
            found.append(f"beton.{split}: {beton.path} holds other bytes than before")
    return found


class Keeper:
    """Saves all of a run's state where it is due, and ends the run, saved, when a signal has asked for it.

    state: what an earlier process saved, or None at a run's start.
    """

    def __init__(self, session: Session, folder: report.RunFolder, clock: Clock, stop: runtime.StopRequest,
                 state: dict | None):
        self._session, self._folder, self._clock, self._stop = session, folder, clock, stop
        state = state or {"epoch": 0, "batches_done": 0, "tally": None, "best": {"epoch": 0, "accuracy": -1.0},
                          "seconds": {}, "startup_seconds": 0.0, "total_seconds": 0.0, "resumed": -1}
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        of, self.tally = session.ranks.launch, session.tally()
        if state["tally"]:
            self.tally.go_on_from(state["tally"], of.rank, of.world)
        self.best, self.resumed = state["best"], state["resumed"] + 1
        self._earlier_total_seconds = state["total_seconds"]
        self.startup_seconds = state["startup_seconds"] + session.program.seconds()
        self._asked = 0
        self._booked = {lane: -value for lane, value in state["seconds"].items()}    # when the epoch began

    def _asked_to_stop(self) -> int:
        """The signal that has asked for it, in all processes at the same step, or 0."""
        self._asked = self._asked or self._session.ranks.agree(self._stop.signal)
        return self._asked

    def after_step(self, step: int, tally: Tally) -> None:
        """Save inside an epoch where `checkpoint.every_steps` says so, or to stop."""
        every = self._session.config.checkpoint.every_steps
        if self._asked_to_stop() or (every and step % every == 0):
            self.batches_done = step - self._session.first_step(self.epoch)
            self.save()
            if self._asked:
                self._leave()

    def watch(self, batches: Iterable) -> Iterator:
        """`batches` of an evaluation, left when a signal asks for it."""
        for batch in batches:
            if self._asked_to_stop():
                self.save()
                self._leave()
            yield batch

    def leave_if_asked(self) -> None:
        """Raise Interrupted where a signal has come; the state has to be saved before."""
        if self._asked_to_stop():
            self._leave()

    def _leave(self) -> None:
        where = (f"epoch {self.epoch + 1}, {self.batches_done} of {self._session.steps(self.epoch)} steps done"
                 if self.epoch < self._session.config.loop.epochs else "the evaluation, all epochs done")
        raise runtime.Interrupted(f"stopped in {where}: go on with --run.resume {self._folder.path}", self._asked)

    def seconds(self) -> dict[str, float]:
        """Seconds of the present epoch so far, a lane, those before an interruption included."""
        split = self._clock.split()    # which lacks lanes that this process has not been in yet
        return {lane: split.get(lane, 0.0) - self._booked.get(lane, 0.0) for lane in {**self._booked, **split}}

    def total_seconds(self) -> float:
        """Seconds of this process and of those that trained this run before."""
        return self._earlier_total_seconds + self._session.program.seconds()

    def finish_epoch(self, result: Evaluation | None) -> None:
        """Save at the end of an epoch: the net, the net where it is the best so far, the whole state."""
        path, self.epoch, self.batches_done = self._folder.path, self.epoch + 1, 0
        self.tally, self._booked = self._session.tally(), self._clock.split()
        net = weights(self._session, self.epoch)
        if result and result.plain.accuracy > self.best["accuracy"]:
            self.best = {"epoch": self.epoch, "accuracy": result.plain.accuracy}
            self._write(path / "best.pt", net)
        self._write(path / "weights.pt", net)
        self.save()

    def _write(self, path: Path, state: dict) -> None:
        """Save as the first process does; where it cannot, all leave."""
        with self._session.ranks.together():
            if self._session.ranks.main:
                checkpoint.save(path, state)

    def save(self) -> None:
        """Write last.pt. Raises NonFiniteLoss, and leaves the file as it is, where the state is not worth keeping."""
        session = self._session
        with self._clock.lane("checkpoint"):
            session.equalise()
            if self.batches_done:
                stop_unless_finite(session, self.tally.read(), self.epoch, self._folder, self.batches_done)
            self._write(self._folder.path / "last.pt", {
                "training": checkpoint.training_state(session.model, session.optimizer, session.scaler, session.generator,
                                                      session.average),
                "epoch": self.epoch, "batches_done": self.batches_done,
                "tally": self.tally.state() if self.batches_done else None, "best": self.best,
                "difficulty": session.difficulty.state() if session.difficulty else None,
                "records": self._folder.records, "seconds": self.seconds(), "startup_seconds": self.startup_seconds,
                "total_seconds": self.total_seconds(), "resumed": self.resumed, "config": session.config.as_dict(),
                "recipe": session.config.recipe, "processes": session.ranks.world, "precision": str(session.dtype),
                "data": {"train": session.data.train.sha256, "test": session.data.test.sha256}})


def run_epochs(session: Session, folder: report.RunFolder, state: dict | None = None) -> dict:
    """Every epoch of the run, or those left of it after `state`: train, check, evaluate, save, log; then the report."""
    config, epochs = session.config, session.config.loop.epochs
    clock, ranks = Clock(session.device), session.ranks
    network = ranks.wrap(session.model, session.device)
    if config.run.compile:
        # A graph a size of batch, beyond so many nothing is compiled: epochs alike in side and images have one, and a smaller last one,
        # and what sharpness-aware minimisation takes of either.
        alike = {(stepwise(config.augment.sides, epoch, epochs, 0), session.samples(epoch)) for epoch in range(epochs)}
        sizes = 4 if config.optim.sam_radius and config.optim.sam_share < 1 else 2
        torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, sizes * len(alike))
        network = torch.compile(network, dynamic=False)
    result = None
    with runtime.StopRequest(ranks.launch) as stop, clock.lane("rest"):
        keeper = Keeper(session, folder, clock, stop, state)
        keeper.save()    # from here on a run that is killed can go on, and this folder can be written
        for epoch in range(keeper.epoch, epochs):
            last = epoch == epochs - 1
            with clock.lane("train"):
                parts = session.parts(epoch, keeper.batches_done)
                batches = session.batches(epoch, keeper.batches_done)
                if ranks.main:
                    batches = report.progress(batches, session.steps(epoch), f"epoch {epoch + 1}/{epochs}", keeper.batches_done)
                totals = train_epoch(network, clock.waiting(batches, "data_wait"), tally=keeper.tally,
                                     after_step=keeper.after_step, **parts)
            keeper.batches_done = session.steps(epoch)
            session.equalise()
            stop_unless_finite(session, totals, epoch, folder, keeper.batches_done)
            with clock.lane("eval"):
                due = last or (config.evaluate.every and (epoch + 1) % config.evaluate.every == 0)
                try:
                    result = session.evaluate(config.evaluate.tta if last else "none", keeper.watch) if due else None
                except (MemoryError, RuntimeError) as error:    # with smaller batches it may go on from here, all steps done
                    if ranks.world == 1 and runtime.is_out_of_memory(error):
                        keeper.save()
                        report.say(f"epoch {epoch + 1} is trained and kept: go on with --run.resume {folder.path} "
                                   f"--evaluate.batch_size {max(1, config.evaluate.batch_size // 2)}")
                    raise
            with ranks.together():
                folder.log(record(session, epoch, totals, result, keeper.seconds()))
            keeper.finish_epoch(result)
            report.print_epoch(folder.records[-1], epochs)
            keeper.leave_if_asked()
        if result is None:    # the earlier process ended between its last epoch and its report
            result = session.evaluate(config.evaluate.tta, keeper.watch)
    return finish(session, folder, result, keeper)


def stop_unless_finite(session: Session, totals: Totals, epoch: int, folder: report.RunFolder, done: int) -> None:
    """Raise NonFiniteLoss, naming epoch, step and learning rate, where the loss or a weight is NaN or infinite after `done` of the
    epoch's steps."""
    step, what = totals.first_bad_step, "the loss is not finite"
    if step < 0:
        finite = torch.stack([torch.isfinite(value).all() for value in session.model.state_dict().values()])
        scale = session.scaler.get_scale()    # 1 where nothing is scaled
        if finite.all() and scale >= SMALLEST_SCALE:
            return
        # the loss was finite throughout: an update broke the weights, or what norms remember, by now
        step, what = done - 1, "a weight or a norm's statistic is not finite" if scale >= SMALLEST_SCALE else "float16's gradients overflow"
    rate = session.config.optim.lr * session.learning_rate(session.first_step(epoch) + step)
    kept = f"the weights of epoch {epoch} are in {folder.path / 'weights.pt'}" if epoch else "no epoch was completed"
    raise runtime.NonFiniteLoss(
        f"{what} in epoch {epoch + 1}, step {step + 1} of {session.steps(epoch)}, at learning rate "
        f"{rate:.3g}: {kept}. Try a smaller optim.lr, a longer optim.warmup_epochs, or optim.clip_norm")


def weights(session: Session, epochs_done: int) -> dict:
    """What weights.pt holds: the net's state and all that is needed to rebuild it and to feed it images."""
    train = session.data.train
    return {"model": session.result.state_dict(), "config": session.config.as_dict(), "epochs_done": epochs_done,
            "classes": list(train.classes), "mean": list(train.mean), "std": list(train.std)}


def facts(session: Session) -> dict[str, str | int]:
    """What was decided by data and machine rather than by the config, for the console's summary and the report."""
    train, test = session.train_batches, session.test_batches
    return {"device": str(session.device), "precision": str(session.dtype).removeprefix("torch."),
            "parameters": count_parameters(session.model), "train_images": train.samples,
            "evaluation_images": test.samples, "loader": train.mode, "steps_per_epoch": len(train),
            "classes": len(session.data.train.classes), "cuda_graphs": session.replays is not None, "torch_threads": torch.get_num_threads(),
            "allocator": runtime.allocator_state(), "processes": session.ranks.world}


def record(session: Session, epoch: int, totals: Totals, result: Evaluation | None, seconds: dict[str, float]) -> dict:
    """One line of log.jsonl. Losses are means a sample, accuracies fractions, the learning rate the epoch's last; those of training
    are of `train_images` images, the hardest where they are not all."""
    step = session.first_step(epoch + 1)
    train_seconds = seconds.get("train", 0.0) + seconds.get("data_wait", 0.0)
    return {"epoch": epoch + 1, "steps": step,
            "learning_rate": session.config.optim.lr * session.learning_rate(step - 1),
            "train_images": totals.seen, "train_loss": totals.loss, "train_accuracy": totals.accuracy,
            "test_loss": result.plain.loss if result else None,
            "test_accuracy": result.plain.accuracy if result else None,
            "images_per_second": totals.seen / train_seconds, "train_seconds": train_seconds,
            "data_wait_seconds": seconds.get("data_wait", 0.0), "eval_seconds": seconds.get("eval", 0.0)}


def described(data: Data) -> dict:
    """What a run folder says of the images: which files, with which content, made from what."""
    train, test = data.train, data.test
    return {"train": str(train.path), "train_sha256": train.sha256, "test": str(test.path), "test_sha256": test.sha256, "set": train.name,
            "source": train.source, "fingerprint": train.fingerprint.partition("/")[0]}


def finish(session: Session, folder: report.RunFolder, result: Evaluation, keeper: Keeper) -> dict:
    """Write report.json and the curves, print the last line; returns the report."""
    config = session.config
    train_seconds, eval_seconds, data_wait_seconds = (
        sum(line[f"{lane}_seconds"] for line in folder.records) for lane in ("train", "eval", "data_wait"))
    outcome = {
        "recipe": config.recipe, "accuracy": result.plain.accuracy, "accuracy_tta": result.tta.accuracy,
        "loss": result.plain.loss, "loss_tta": result.tta.loss, "correct": result.plain.correct,
        "correct_tta": result.tta.correct, "evaluated": result.plain.seen, "split": config.evaluate.split,
        "tta": config.evaluate.tta, "parameters": count_parameters(session.model), "epochs": config.loop.epochs,
        "best_epoch": keeper.best["epoch"], "best_accuracy": keeper.best["accuracy"], "resumed": keeper.resumed,
        "train_seconds": train_seconds, "eval_seconds": eval_seconds, "startup_seconds": keeper.startup_seconds,
        "total_seconds": keeper.total_seconds(),
        "images_per_second": sum(line["images_per_second"] * line["train_seconds"] for line in folder.records)
        / train_seconds,
        "data_wait_fraction": data_wait_seconds / train_seconds, "seed": config.run.seed,
        "data": described(session.data),
        **{f"run_{name}": value for name, value in facts(session).items() if name != "parameters"}}
    with session.ranks.together():
        folder.write_report(outcome, curves=config.report.curves)
    report.print_outcome(outcome, folder.path)
    return outcome

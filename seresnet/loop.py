"""fit() and train_epoch(): the one place where loader, augmentation, net, loss and optimizer meet."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature

import numpy as np
import torch
from torch import nn

from seresnet import checkpoint, report, runtime
from seresnet.augment import normalise, train_batch
from seresnet.beton import Beton, open_beton, read_images
from seresnet.clock import Clock
from seresnet.config import Config
from seresnet.evaluate import Evaluation, evaluate
from seresnet.loader import Batch, BatchLoader, holdout_split
from seresnet.loss import Tally, Totals, smoothed_cross_entropy
from seresnet.model import SEResNet, check_budget, count_parameters
from seresnet.optim import build_optimizer, clip_gradients, learning_rate_factor, set_learning_rate

# Streams of random numbers: each is seeded from (run seed, stream, epoch) and so shares nothing with the others.
INITIALISATION, AUGMENTATION, DROPOUT = 1, 2, 3
WHITENING_IMAGES = 5000    # as many as Jordan's listing (arXiv 2404.00498, appendix) takes


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on: betons, and the samples of the training beton that either part takes."""

    train: Beton
    test: Beton
    train_indices: np.ndarray | None = None    # int64, sorted; None for all
    test_indices: np.ndarray | None = None


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
    train_batches: BatchLoader
    test_batches: BatchLoader

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.train_batches.close()
        self.test_batches.close()

    def learning_rate(self, step: int) -> float:
        """The share of the peak learning rate at `step`, counted from 0 over the whole run."""
        optim, an_epoch = self.config.optim, len(self.train_batches)
        return learning_rate_factor(
            step, schedule=optim.schedule, total_steps=self.config.loop.epochs * an_epoch,
            warmup_steps=round(optim.warmup_epochs * an_epoch), start=optim.start, final=optim.final,
            milestones=[round(epoch * an_epoch) for epoch in optim.milestones], gamma=optim.gamma)

    def parts(self, epoch: int) -> dict:
        """The arguments of train_epoch for `epoch` (from 0). Seeds torch's generators from (run seed, epoch), so that an
        epoch's random numbers do not depend on what ran before it."""
        config, data = self.config, self.data.train
        generator = torch.Generator(self.device)
        generator.manual_seed(runtime.stream_seed(config.run.seed, AUGMENTATION, epoch))
        torch.manual_seed(runtime.stream_seed(config.run.seed, DROPOUT, epoch))
        settings = asdict(config.augment)

        def augment(batch: Batch) -> torch.Tensor:
            return train_batch(batch.images, batch.indices, epoch, **settings, mean=data.mean, std=data.std,
                               dtype=self.dtype, generator=generator, seed=config.run.seed)

        return dict(
            augment=augment, optimizer=self.optimizer, scaler=self.scaler, dtype=self.dtype, device=self.device,
            loss=partial(smoothed_cross_entropy, smoothing=config.loss.label_smoothing),
            clip=partial(clip_gradients, list(self.model.parameters()), norm=config.optim.clip_norm,
                         value=config.optim.clip_value),
            learning_rate=self.learning_rate, first_step=epoch * len(self.train_batches))

    def evaluate(self, tta: str) -> Evaluation:
        """Accuracy and loss on the evaluation split."""
        return evaluate(self.model, self.test_batches.epoch(0), samples=self.test_batches.samples, tta=tta,
                        mean=self.data.train.mean, std=self.data.train.std, dtype=self.dtype, device=self.device)


def open_session(config: Config, device: torch.device, data: Data, model: SEResNet) -> Session:
    """Move the net to the device, set its whitening stem from training images, open the loaders, build the optimizer."""
    dtype = runtime.pick_dtype(config.run.precision, device)
    model = model.to(device)
    if model.wants_whitening:
        model.whiten(first_images(data, WHITENING_IMAGES, device))
    optim = {name: value for name, value in asdict(config.optim).items() if name in signature(build_optimizer).parameters}
    open_loader = partial(BatchLoader, device=device, mode=config.loader.mode, seed=config.run.seed,
                          workers=config.loader.workers, batches_ahead=config.loader.batches_ahead)
    train_batches = open_loader(data.train, batch_size=config.loader.batch_size, indices=data.train_indices,
                                drop_last=config.loader.drop_last)
    test_batches = open_loader(data.test, batch_size=config.evaluate.batch_size, indices=data.test_indices,
                               shuffle=False)
    return Session(config, data, device, dtype, model, build_optimizer(model, **optim),
                   torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), train_batches, test_batches)


def first_images(data: Data, count: int, device: torch.device) -> torch.Tensor:
    """The first `count` training images, normalised: float32 (count, 3, H, W) on the device."""
    images = read_images(data.train)
    chosen = images[:count] if data.train_indices is None else images[data.train_indices[:count]]
    batch = torch.from_numpy(np.ascontiguousarray(chosen)).to(device).permute(0, 3, 1, 2)
    return normalise(batch, data.train.mean, data.train.std, torch.float32)


def fit(config: Config, command: Sequence[str]) -> dict:
    """Train the net of `config`, evaluate it, leave a run folder behind. Returns what its report.json holds.

    command: the command line, for the run folder. Raises UserError before anything is written where config, data and
    machine do not fit together; NonFiniteLoss where training diverged: `weights.pt` then holds the last good epoch.
    """
    device = runtime.pick_device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.backends.cudnn.benchmark = True    # shapes are the same in every step
    data, model = prepare(config)
    with open_session(config, device, data, model) as session:
        folder = report.create_run_folder(config.report.folder, config.recipe, config.run.folder)
        folder.write_start(config.as_dict(), {
            "command": list(command), "commit": runtime.git_commit(), "versions": runtime.describe_versions(),
            "machine": runtime.describe_machine(), "seed": config.run.seed})
        report.print_summary(config.as_dict(), facts(session), folder.path)
        return run_epochs(session, folder)


def run_epochs(session: Session, folder: report.RunFolder) -> dict:
    """Every epoch of the run: train, check, evaluate, save, log; then the report."""
    config, epochs = session.config, session.config.loop.epochs
    clock = Clock(session.device)
    network = torch.compile(session.model) if config.run.compile else session.model
    startup_seconds = report.seconds_since_process_start()
    with clock.lane("rest"):
        for epoch in range(epochs):
            last = epoch == epochs - 1
            before = clock.split()
            with clock.lane("train"):
                batches = report.progress(session.train_batches.epoch(epoch), len(session.train_batches),
                                          f"epoch {epoch + 1}/{epochs}")
                totals = train_epoch(network, clock.waiting(batches, "data_wait"), **session.parts(epoch))
            stop_unless_finite(session, totals, epoch, folder)
            result = None
            with clock.lane("eval"):
                if last or (config.evaluate.every and (epoch + 1) % config.evaluate.every == 0):
                    result = session.evaluate(config.evaluate.tta if last else "none")
            checkpoint.save(folder.path / "weights.pt", weights(session, epoch + 1))
            seconds = {lane: value - before.get(lane, 0.0) for lane, value in clock.split().items()}
            folder.log(record(session, epoch, totals, result, seconds))
            report.print_epoch(folder.records[-1], epochs)
    return finish(session, folder, result, clock, startup_seconds)


def stop_unless_finite(session: Session, totals: Totals, epoch: int, folder: report.RunFolder) -> None:
    """Raise NonFiniteLoss, naming epoch, step and learning rate, where the loss or a weight is NaN or infinite."""
    step = totals.first_bad_step
    if step < 0:
        finite = torch.stack([torch.isfinite(value).all() for value in session.model.state_dict().values()])
        if finite.all():
            return
        step = len(session.train_batches) - 1    # the loss was finite throughout: the last update broke the weights
    rate = session.config.optim.lr * session.learning_rate(epoch * len(session.train_batches) + step)
    kept = f"the weights of epoch {epoch} are in {folder.path / 'weights.pt'}" if epoch else "no epoch was completed"
    raise runtime.NonFiniteLoss(
        f"the loss is not finite in epoch {epoch + 1}, step {step + 1} of {len(session.train_batches)}, at learning rate "
        f"{rate:.3g}: {kept}. Try a smaller optim.lr, a longer optim.warmup_epochs, or optim.clip_norm")


def weights(session: Session, epochs_done: int) -> dict:
    """What weights.pt holds: the net's state and all that is needed to rebuild it and to feed it images."""
    train = session.data.train
    return {"model": session.model.state_dict(), "config": session.config.as_dict(), "epochs_done": epochs_done,
            "classes": list(train.classes), "mean": list(train.mean), "std": list(train.std)}


def facts(session: Session) -> dict[str, str | int]:
    """What was decided by data and machine rather than by the config, for the console's summary and the report."""
    train, test = session.train_batches, session.test_batches
    return {"device": str(session.device), "precision": str(session.dtype).removeprefix("torch."),
            "parameters": count_parameters(session.model), "train_images": train.samples,
            "evaluation_images": test.samples, "loader": train.mode, "steps_per_epoch": len(train),
            "classes": len(session.data.train.classes), "torch_threads": torch.get_num_threads(),
            "allocator": runtime.allocator_state()}


def record(session: Session, epoch: int, totals: Totals, result: Evaluation | None, seconds: dict[str, float]) -> dict:
    """One line of log.jsonl. Losses are means a sample, accuracies fractions, the learning rate the epoch's last."""
    step = (epoch + 1) * len(session.train_batches)
    train_seconds = seconds["train"] + seconds["data_wait"]
    return {"epoch": epoch + 1, "steps": step,
            "learning_rate": session.config.optim.lr * session.learning_rate(step - 1),
            "train_loss": totals.loss, "train_accuracy": totals.accuracy,
            "test_loss": result.plain.loss if result else None,
            "test_accuracy": result.plain.accuracy if result else None,
            "images_per_second": totals.seen / train_seconds, "train_seconds": train_seconds,
            "data_wait_seconds": seconds["data_wait"], "eval_seconds": seconds["eval"]}


def finish(session: Session, folder: report.RunFolder, result: Evaluation, clock: Clock, startup_seconds: float) -> dict:
    """Write report.json and the curves, print the last line; returns the report."""
    config, train, test = session.config, session.data.train, session.data.test
    train_seconds = sum(line["train_seconds"] for line in folder.records)
    outcome = {
        "recipe": config.recipe, "accuracy": result.plain.accuracy, "accuracy_tta": result.tta.accuracy,
        "loss": result.plain.loss, "loss_tta": result.tta.loss, "correct": result.plain.correct,
        "correct_tta": result.tta.correct, "evaluated": result.plain.seen, "split": config.evaluate.split,
        "tta": config.evaluate.tta, "parameters": count_parameters(session.model), "epochs": config.loop.epochs,
        "train_seconds": train_seconds, "eval_seconds": clock.seconds("eval"), "startup_seconds": startup_seconds,
        "total_seconds": report.seconds_since_process_start(),
        "images_per_second": sum(line["images_per_second"] * line["train_seconds"] for line in folder.records)
        / train_seconds,
        "data_wait_fraction": clock.seconds("data_wait") / train_seconds, "seed": config.run.seed,
        "data": {"train": str(train.path), "train_sha256": train.sha256, "test": str(test.path),
                 "test_sha256": test.sha256, "set": train.name, "source": train.source},
        **{f"run_{name}": value for name, value in facts(session).items() if name != "parameters"}}
    folder.write_report(outcome, curves=config.report.curves)
    report.print_outcome(outcome, folder.path)
    return outcome

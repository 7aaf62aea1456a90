"""Parameter groups by kind, optimizers, gradient clipping, and what changes in the course of a run
as a pure function of step or epoch."""
from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from seresnet.compiled import has_bf16
from seresnet.graphs import Recorder, Repeats

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("onecycle", "cosine", "step", "constant")
KINDS = ("conv", "linear", "norm_scale", "norm_bias", "bias", "se")


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter of `model` in exactly one kind, chosen by the module that owns it.

    `conv`, `linear`: weights of convolutions and linear maps, `bias` the biases of both; `norm_scale`, `norm_bias`: of
    batch normalisation; a module with a `parameter_kind` (`se`: squeeze-and-excitation) names the kind of all that is
    inside it. Raises TypeError for an owner it does not know.
    """
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    taken: set[int] = set()
    for module in model.modules():    # parents come before their children: SE claims its linear maps first
        own_kind = getattr(module, "parameter_kind", None)
        for name, parameter in module.named_parameters(recurse=own_kind is not None):
            if id(parameter) in taken or not parameter.requires_grad:
                continue
            taken.add(id(parameter))
            if own_kind is not None:
                kind = own_kind
            elif isinstance(module, nn.BatchNorm2d):
                kind = "norm_scale" if name == "weight" else "norm_bias"
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                kind = "bias" if name == "bias" else "conv" if isinstance(module, nn.Conv2d) else "linear"
            else:
                raise TypeError(f"{type(module).__name__}.{name}: no kind is known for this parameter")
            kinds[kind].append(parameter)
    return kinds


def build_optimizer(model: nn.Module, *, name: str, lr: float, momentum: float = 0.9, nesterov: bool = True,
                    betas: Sequence[float] = (0.9, 0.999), weight_decay: float = 0.0, decay: str = "weights",
                    decay_per: str = "rate", linear_lr_scale: float = 1.0, norm_bias_lr_scale: float = 1.0,
                    se_lr_scale: float = 1.0, sgd_lr: float = 0.1, sgd_momentum: float = 0.85, fused: bool = True,
                    record: Recorder | None = None) -> torch.optim.Optimizer:
    """SGD (with momentum, Nesterov's form by choice), AdamW or Muon over groups by kind.

    lr: peak learning rate of the weights; the head's weights, norm biases and SE take it times their scale. decay: `weights` decays
    weights and SE's maps, and leaves scales and biases free, `all` decays every parameter (as torch does by default).
    Decay is torch's: added to the gradient in SGD, decoupled in AdamW (Loshchilov and Hutter, arXiv 1711.05101).
    decay_per: `rate` multiplies it by the group's learning rate, as torch does; `schedule` by the schedule's factor alone
    (the eta of that paper's algorithm 1), so that kinds with rates of their own decay alike.
    With `muon`, lr and momentum are those of convolutions; all else takes SGD with sgd_lr, sgd_momentum and the decay.
    Each group carries `kind` and `peak_lr`; `set_learning_rate` scales the latter by the schedule.
    fused: SGD and AdamW in one kernel for all parameters. Not for a GradScaler: where it skips the first step, torch's fused
    SGD keeps a momentum that nothing has filled, and hooks behind a step are called for those that are skipped. On a CPU
    these kernels take gradients and buffers to lie in memory as their parameter does: autograd and torch's checkpoints keep it so.
    record: Muon's update, of a hundred kernels and more, is replayed from recordings by it; SGD and AdamW have few, and do without.
    """
    scales = {"linear": linear_lr_scale, "norm_bias": norm_bias_lr_scale, "se": se_lr_scale}
    groups = []
    for kind, parameters in parameters_by_kind(model).items():
        if parameters:
            decayed = decay == "all" or kind in ("conv", "linear", "se")
            orthogonal = name == "muon" and kind == "conv"
            peak_lr = (sgd_lr if name == "muon" and not orthogonal else lr) * scales.get(kind, 1.0)
            group = dict(params=parameters, kind=kind, lr=peak_lr, peak_lr=peak_lr,
                         weight_decay=weight_decay / (peak_lr if decay_per == "schedule" else 1) if decayed else 0.0)
            if name == "muon":
                group.update(orthogonal=orthogonal, momentum=momentum if orthogonal else sgd_momentum)
            groups.append(group)
    if name == "sgd":
        return _quick_to_start(torch.optim.SGD)(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=fused, foreach=not fused)
    if name == "adamw":
        return _quick_to_start(torch.optim.AdamW)(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused, foreach=not fused)
    if name == "muon":
        return Muon(groups, nesterov=nesterov, record=record)
    raise ValueError(f"optimizer: {name!r} is not one of {', '.join(OPTIMIZERS)}")


def _quick_to_start(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """torch's optimizer `kind` without what torch puts around its step, which imports torch's compiler to tell it to leave the step
    out: two seconds of a start on two cores. Not for steps that are to be differentiated."""
    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` to follow it, step by step, as the exponential moving average of its parameters and buffers (Polyak and
    Juditsky, 1992, in the form of Tarvainen and Valpola, arXiv 1703.01780, section 2): over some 1 / (1 - decay) steps, the
    first of which it takes as it is. `follow` ties it to the optimizer."""
    return _Average(model, decay)


class _Average(AveragedModel):
    """torch's with buffers, in one operation for all, and with its count of steps on the CPU: torch brings that to the device at every
    step, which would wait for it. The moving average does not depend on it. Counts of batches are those of the model."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take `model` in."""
        own, new = ([*net.parameters(), *net.buffers()] for net in (self.module, model))
        pairs = [pair for pair in zip(own, new) if pair[0].is_floating_point()] if int(self.n_averaged) else []
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - self._decay)
        for mine, theirs in zip(own, new):
            if not (pairs and mine.is_floating_point()):
                mine.copy_(theirs)
        self.n_averaged += 1


def follow(average: AveragedModel, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let `average` take `model` in after every step of `optimizer`."""
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))


class Muon(torch.optim.Optimizer):
    """Momentum, its update orthogonalised (Jordan et al., "Muon: an optimizer for hidden layers", 2024), for convolutions;
    SGD with momentum for the groups that are not `orthogonal`.

    A filter bank (C_out, C_in, k, k) is taken as a matrix of C_out rows, as Jordan's CIFAR-10 speed run does, and kept at
    the norm sqrt(C_out): behind a batch normalisation only its direction counts, so the learning rate alone sets the
    angle that a step turns it by. Orthogonal groups therefore know no weight decay. torch.optim.Muon takes matrices alone
    and orthogonalises them one by one; here all of one shape are one batched product.

    record: replays the update from a recording where gradients lie where they have lain before, as those of a replayed step do.
    """

    repeats: Repeats | None = None    # of the class, too: a copy of an optimizer computes without recordings, which are of the tensors of the first
    _rates: torch.Tensor | None = None    # of the groups, where recordings read them

    def __init__(self, groups: Sequence[dict], nesterov: bool = True, record: Recorder | None = None):
        super().__init__(groups, dict(lr=0.1, peak_lr=0.1, momentum=0.6, weight_decay=0.0, orthogonal=False,
                                      nesterov=nesterov))
        self.repeats = Repeats(record) if record else None

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, weights) for group, weights in groups if weights]
        for _, weights in groups:
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if self.repeats is None or not groups:
            for group, weights in groups:
                self._update(group, weights, group["lr"])
        else:
            self._repeat(groups)
        return loss

    def _repeat(self, groups: Sequence[tuple[dict, list[torch.Tensor]]]) -> None:
        """`_update` of all groups, in which a learning rate may differ from step to step, and nothing else that is no tensor."""
        if self._rates is None:
            self._rates = torch.zeros(len(self.param_groups), device=groups[0][1][0].device)
        rates = self._rates.unbind()
        for (group, _), rate in zip(groups, rates):
            rate.fill_(group["lr"])

        def work() -> None:
            for (group, weights), rate in zip(groups, rates):
                self._update(group, weights, rate)
        tensors = [tensor for _, weights in groups for p in weights for tensor in (p, p.grad, self.state[p]["momentum_buffer"])]
        self.repeats.run(work, tensors, tuple(tuple(group[name] for name in ("momentum", "weight_decay", "nesterov", "orthogonal"))
                                              for group, _ in groups))

    def _update(self, group: dict, weights: Sequence[torch.Tensor], rate: float | torch.Tensor) -> None:
        """Weights and momentum of a group, all of which have gradients; `rate` may be a tensor of no dimension."""
        gradients = [p.grad for p in weights]
        if group["weight_decay"] and not group["orthogonal"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        updates = buffers
        if group["nesterov"]:
            updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
        if group["orthogonal"]:
            updates = _orthogonal_updates(updates)
            norms = torch._foreach_norm(weights)
            torch._foreach_div_(weights, torch._foreach_add(norms, 1e-12))
            torch._foreach_mul_(weights, [len(p) ** 0.5 for p in weights])
        if isinstance(rate, torch.Tensor):
            torch._foreach_sub_(weights, torch._foreach_mul(updates, rate))
        else:
            torch._foreach_add_(weights, updates, alpha=-rate)


def _orthogonal_updates(updates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each (C_out, ...) as the nearest semi-orthogonal matrix, in its own shape; those of one shape in one batch."""
    shapes: dict[torch.Size, list[int]] = {}
    for i, update in enumerate(updates):
        shapes.setdefault(update.shape, []).append(i)
    results: list[torch.Tensor] = [None] * len(updates)
    for shape, places in shapes.items():
        # channels-last memory read in its own order: a permutation of the columns, which orthogonalising commutes with
        matrices = torch.stack([updates[i].movedim(1, -1).reshape(len(updates[i]), -1) for i in places])
        matrices = orthogonalise(matrices).reshape(len(places), shape[0], *shape[2:], shape[1]).movedim(-1, 2)
        for i, matrix in zip(places, matrices):
            results[i] = matrix
    return results


def orthogonalise(matrices: torch.Tensor, steps: int = 3, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(B, R, C) -> float32 (B, R, C): U V^T of each matrix's singular value decomposition U S V^T, roughly.

    `steps` rounds of the quintic Newton-Schulz iteration with the coefficients of Jordan et al. (2024): singular values
    end between about 0.5 and 1.2 rather than at 1, which costs training nothing; those that were small beside the
    Frobenius norm, below a hundredth, stay small after three rounds, which raise them at most 41 times. Products are
    computed in `dtype`, without it in bfloat16 where the device has it, else in float32.
    """
    dtype = dtype or (torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.float()
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)    # no singular value above 1: it converges
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(parameters: Sequence[nn.Parameter], *, norm: float = 0.0, value: float = 0.0) -> None:
    """Clip by the norm over all gradients, or each entry to [-value, value]; 0 is off. Never waits for the device."""
    if norm > 0:
        nn.utils.clip_grad_norm_(parameters, norm)
    if value > 0:
        nn.utils.clip_grad_value_(parameters, value)


@contextmanager
def ascended(parameters: Sequence[nn.Parameter], buffers: Sequence[torch.Tensor], radius: float, overflows: bool = False) -> Iterator[None]:
    """A block within which the parameters that have a gradient stand `radius` (their common Euclidean distance) up along it, where the loss
    is about the greatest nearby: gradients taken there are those of sharpness-aware minimisation (Foret et al., arXiv 2010.01412,
    equation 2 and algorithm 1). Parameters, and the buffers, which a second pass would count the same images into again, are what they
    were when it is left; gradients are those of the block, whose dropout is drawn anew.

    overflows: the gradients may not be finite, as float16's, and then nothing is moved; that waits for the device, and nothing else does.
    """
    moved = [p for p in parameters if p.grad is not None]
    with torch.no_grad():
        before = [[tensor.detach().clone() for tensor in tensors] for tensors in (moved, buffers)]
        gradients = [p.grad for p in moved]
        norm = nn.utils.get_total_norm(gradients)
        if not overflows or bool(torch.isfinite(norm)):
            torch._foreach_add_(moved, torch._foreach_mul(gradients, radius / (norm + 1e-12)))
        for p in moved:
            p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensors, values in zip((moved, buffers), before):
                if tensors:
                    torch._foreach_copy_(tensors, values)


def learning_rate_factor(step: int, *, schedule: str, total_steps: int, warmup_steps: int = 0, start: float = 0.0,
                         final: float = 0.0, milestones: Sequence[int] = (), gamma: float = 0.1) -> float:
    """The learning rate of `step` (from 0) as a fraction of its peak: a pure function, the same after any restart.

    The factor rises in a straight line from `start` at step 0 to 1 at `warmup_steps`. After it:
    `onecycle` falls in a straight line to `final` at `total_steps` (the triangle of Smith and Topin, arXiv
    1708.07120); `cosine` falls along half a cosine to `final` (Loshchilov and Hutter, arXiv 1608.03983, without
    restarts); `step` is multiplied by `gamma` at each of `milestones` (steps); `constant` stays at 1.
    """
    if step < warmup_steps:
        return start + (1 - start) * step / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return gamma ** sum(step >= milestone for milestone in milestones)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "onecycle":
        return 1 + (final - 1) * done
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    raise ValueError(f"schedule: {schedule!r} is not one of {', '.join(SCHEDULES)}")


def stepwise(values: Sequence[float], epoch: int, epochs: int, otherwise: float) -> float:
    """The value of `epoch` (from 0) of `epochs`, of which each of `values` gets an equal share; `otherwise` without values."""
    return values[epoch * len(values) // epochs] if values else otherwise

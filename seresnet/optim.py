"""Parameter groups by kind, optimizers, gradient clipping, and the learning rate as a pure function of the step."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("onecycle", "cosine", "step", "constant")
DECAYS = ("weights", "all")
KINDS = ("weight", "norm_scale", "norm_bias", "bias", "se")


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter of `model` in exactly one kind, chosen by the module that owns it.

    `weight`, `bias`: of convolutions and linear maps; `norm_scale`, `norm_bias`: of batch normalisation; a module with
    a `parameter_kind` (`se`: squeeze-and-excitation) names the kind of all that is inside it. Raises TypeError for an owner it does not know.
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
                kind = "weight" if name == "weight" else "bias"
            else:
                raise TypeError(f"{type(module).__name__}.{name}: no kind is known for this parameter")
            kinds[kind].append(parameter)
    return kinds


def build_optimizer(model: nn.Module, *, name: str, lr: float, momentum: float = 0.9, nesterov: bool = True,
                    betas: Sequence[float] = (0.9, 0.999), weight_decay: float = 0.0, decay: str = "weights",
                    norm_bias_lr_scale: float = 1.0, se_lr_scale: float = 1.0) -> torch.optim.Optimizer:
    """SGD (with momentum, Nesterov's form by choice) or AdamW over groups by kind.

    lr: peak learning rate of the weights; norm biases and SE take it times their scale. decay: `weights` decays
    weights and SE's maps, and leaves scales and biases free, `all` decays every parameter (as torch does by default).
    Each group carries `kind` and `peak_lr`; `set_learning_rate` scales the latter by the schedule.
    Decay is torch's: added to the gradient in SGD, decoupled in AdamW (Loshchilov and Hutter, arXiv 1711.05101).
    """
    scales = {"norm_bias": norm_bias_lr_scale, "se": se_lr_scale}
    groups = []
    for kind, parameters in parameters_by_kind(model).items():
        if parameters:
            decayed = decay == "all" or kind in ("weight", "se")
            peak_lr = lr * scales.get(kind, 1.0)
            groups.append(dict(params=parameters, kind=kind, lr=peak_lr, peak_lr=peak_lr,
                               weight_decay=weight_decay if decayed else 0.0))
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, foreach=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), foreach=True)
    raise ValueError(f"optimizer: {name!r} is not one of {', '.join(OPTIMIZERS)}")


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(parameters: Sequence[nn.Parameter], *, norm: float = 0.0, value: float = 0.0) -> None:
    """Clip by the norm over all gradients, or each entry to [-value, value]; 0 is off. Never waits for the device."""
    if norm > 0:
        nn.utils.clip_grad_norm_(parameters, norm, foreach=True)
    if value > 0:
        nn.utils.clip_grad_value_(parameters, value, foreach=True)


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

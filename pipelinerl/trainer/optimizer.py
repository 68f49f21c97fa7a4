"""The optimizer and its learning rate schedule, as torch and transformers make them."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from pipelinerl.config.schema import TrainerConfig
from pipelinerl.trainer.sharding import full_shape


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.Optimizer:
    """adamw: decoupled weight decay (1711.05101); adam and sgd: weight decay as a part of the gradient."""
    groups = _decay_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0])
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    # Offloaded, the step runs on the host: there the fused kernel is several times as fast as the plain one.
    fused = True if config.offload_optimizer else None
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainerConfig, updates: int) -> LambdaLR:
    """Linear warm-up over `trainer.warmup_steps` updates from 0, then the schedule, which ends at 0 after `updates`.

    Counted in optimizer updates that were applied.
    """
    name = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
    scheduler: LambdaLR = get_scheduler(name, optimizer, config.warmup_steps, num_training_steps=updates)
    return scheduler


def resume_scheduler(scheduler: LambdaLR, updates: int) -> None:
    """As if `updates` updates had been made: only their number is state, all else is the configuration's."""
    scheduler.last_epoch = updates
    scheduler._step_count = updates + 1
    rates = [base * factor(updates) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(full_shape(p)) >= 2]
    vectors = [p for p in trained if len(full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

"""A short supervised run that stops half-way, so that RL has something to learn.

Cross-entropy on perfect completions until a sampled completion is right about as often as not. The problems are the
task's train split, so the held-out ones stay unseen.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelinerl.errors import PipelineRLError
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.sort import target
from pipelinerl.tiny.evaluate import accuracy, prompt_ids
from pipelinerl.types import Problem

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

WARMUP_STEPS = 20
SAMPLED_PROBLEMS = 768  # the standard error of an accuracy near 0.5 is then 0.018
GREEDY_PROBLEMS = 256
SLACK_TOKENS = 8  # a sampled completion may be so much longer than a perfect one before it is cut
COARSE, FINE = 20, 1  # optimizer steps between checks, far from the target and near it
Z_LOSS = 0.1  # weight of the z-loss: large enough to set the scale within the few steps there are


@dataclass(frozen=True, slots=True)
class WarmStart:
    """How to train. `target` is the sampled accuracy at `temperature` at which to stop.

    `log_z` sets the scale of the logits: a z-loss (2204.02311, there towards 0) draws their logsumexp to it. The
    softmax does not depend on it; where the model is certain, the top logit equals it. None leaves the scale free.
    """

    target: float = 0.45
    temperature: float = 0.8
    lr: float = 2e-3  # high on purpose: at 5e-4 the greedy answers are all right before the sampled ones are
    batch_size: int = 256
    max_steps: int = 1000
    log_z: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A check on the way. Accuracies are over problems of the train split; loss in nats per token."""

    step: int
    loss: float
    sampled: float
    greedy: float


def warm_start(
    model: "Qwen2ForCausalLM",
    tokenizer: "Qwen2Tokenizer",
    task: Task,
    settings: WarmStart,
    seed: int,
    report: Callable[[Progress], None],
) -> Progress:
    """Train `model` in place until its sampled accuracy reaches the target; returns the last check.

    `report` gets every check. Raises PipelineRLError when `max_steps` are not enough.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(seed)
    problems = task.problems("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(settings.max_steps):
        batch = [problems[rng.randrange(len(problems))] for _ in range(settings.batch_size)]
        logits, wanted = _forward(model, tokenizer, task, batch)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        solved = _chance_of_target(logits, wanted, settings.temperature)
        near = solved > 0.7 * settings.target
        if step % (FINE if near else COARSE) == 0:
            progress = _check(model, tokenizer, task, settings, rng, step, loss.item())
            report(progress)
            if progress.sampled >= settings.target:
                return progress
        if settings.log_z is not None:
            loss = loss + Z_LOSS * (logits.logsumexp(dim=-1) - settings.log_z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.step()
    raise PipelineRLError(
        f"the warm start did not reach a sampled accuracy of {settings.target} in {settings.max_steps} steps; "
        "lower --target or --digits, or try another --seed"
    )


def longest_target(task: Task) -> int:
    """Characters of the longest perfect completion (those of a sort task all have the same length)."""
    return len(target(task.problems("train")[0]))


def _forward(
    model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", task: Task, batch: list[Problem]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Logits [B, C, V] for the completion's tokens and the tokens themselves [B, C], end token included.

    Prompts of a sort task are equally long, and so are its targets: no padding.
    """
    import torch

    prompts = torch.tensor(prompt_ids(tokenizer, task, batch))
    answers = [tokenizer.encode(target(problem), add_special_tokens=False) for problem in batch]
    wanted = torch.tensor([[*answer, tokenizer.eos_token_id] for answer in answers])
    tokens = torch.cat([prompts, wanted], dim=1)
    completion = wanted.shape[1]
    logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=completion).logits
    return logits.float(), wanted


def _chance_of_target(logits: "torch.Tensor", wanted: "torch.Tensor", temperature: float) -> float:
    """Mean probability of sampling the whole perfect completion: free, and in expectation never above the accuracy."""
    import torch

    logprobs = torch.log_softmax(logits.detach() / temperature, dim=-1)
    chance = logprobs.gather(2, wanted[..., None])[..., 0].sum(dim=1).exp().mean().item()
    assert math.isfinite(chance)
    return chance


def _check(
    model: "Qwen2ForCausalLM",
    tokenizer: "Qwen2Tokenizer",
    task: Task,
    settings: WarmStart,
    rng: random.Random,
    step: int,
    loss: float,
) -> Progress:
    problems = task.problems("train")
    probe = [problems[rng.randrange(len(problems))] for _ in range(SAMPLED_PROBLEMS)]
    limit = longest_target(task) + SLACK_TOKENS
    sampled = accuracy(model, tokenizer, task, probe, limit, settings.temperature)
    greedy = accuracy(model, tokenizer, task, probe[:GREEDY_PROBLEMS], limit, temperature=0.0)
    return Progress(step, loss, sampled, greedy)

"""How often the tiny model solves a task: its own sampler, and the task's own environment as the judge."""

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipelinerl.tasks.base import Score, Task
from pipelinerl.types import Problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM


async def grade_here(scorer: str, kwargs: Mapping[str, Any]) -> Score:
    """`tasks.base.Grade` in this process: the synthetic tasks' scorers cannot hang."""
    module, function = scorer.split(":")
    result = getattr(importlib.import_module(module), function)(**kwargs)
    return Score(sum(result.values()) if isinstance(result, Mapping) else float(result))


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", task: Task, problem: Problem) -> list[int]:
    """The tokens in front of the completion, as a rollout of `task` renders them."""
    messages = asyncio.run(task.env(problem, grade_here).start())
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def accuracy(
    model: "Qwen2ForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    task: Task,
    problems: Sequence[Problem],
    max_tokens: int,
    temperature: float,
) -> float:
    """Mean reward over one completion per problem, in [0, 1]; temperature 0 is greedy."""
    prompts = [(prompt_ids(tokenizer, task, problem), problem) for problem in problems]
    prompts.sort(key=lambda pair: len(pair[0]))
    rewards = []
    for _, same_length in groupby(prompts, key=lambda pair: len(pair[0])):
        batch = list(same_length)
        for (_, problem), tokens in zip(
            batch, sample(model, [ids for ids, _ in batch], max_tokens, temperature), strict=True
        ):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            step = asyncio.run(task.env(problem, grade_here).step(text, truncated=len(tokens) == max_tokens))
            assert step.score is not None, "the synthetic tasks have one turn"
            rewards.append(step.score.reward)
    return sum(rewards) / len(rewards)


def sample(
    model: "Qwen2ForCausalLM", prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float
) -> list[list[int]]:
    """One completion per prompt, without its end token. All prompts have the same length, so no padding is needed."""
    import torch
    from transformers import DynamicCache

    end = model.config.eos_token_id
    cache = DynamicCache(config=model.config)
    context = torch.tensor(prompts)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    columns: list[torch.Tensor] = []
    with torch.no_grad():
        while len(columns) < max_tokens and not ended.all():
            logits = model(context, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            token = _choose(logits, temperature)
            ended |= token == end
            columns.append(token)
            context = token[:, None]
    rows = torch.stack(columns, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _choose(logits: "torch.Tensor", temperature: float) -> "torch.Tensor":
    """[B, V] -> [B]."""
    import torch

    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)[:, 0]

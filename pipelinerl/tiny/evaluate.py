"""How often the tiny model solves a task: its own sampler, and the task's own environment as the judge."""

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelinerl.tasks.base import Message, Score, Task
from pipelinerl.types import Problem

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


async def grade_here(scorer: str, kwargs: Mapping[str, Any]) -> Score:
    """`tasks.base.Grade` in this process: the synthetic tasks' scorers cannot hang."""
    module, function = scorer.split(":")
    result = getattr(importlib.import_module(module), function)(**kwargs)
    return Score(sum(result.values()) if isinstance(result, Mapping) else float(result))


def prompt_ids(tokenizer: "Qwen2Tokenizer", task: Task, problems: Sequence[Problem]) -> list[list[int]]:
    """Per problem, the tokens in front of the completion, as a rollout of `task` renders them."""

    async def conversations() -> list[tuple[Message, ...]]:
        return [await task.env(problem, grade_here).start() for problem in problems]

    return [_render(tokenizer, messages) for messages in asyncio.run(conversations())]


def accuracy(
    model: "Qwen2ForCausalLM",
    tokenizer: "Qwen2Tokenizer",
    task: Task,
    problems: Sequence[Problem],
    max_tokens: int,
    temperature: float,
) -> float:
    """Mean reward over one completion per problem, in [0, 1]; temperature 0 is greedy.

    The prompts must have the same length, as those of a sort task do.
    """
    completions = sample(model, prompt_ids(tokenizer, task, problems), max_tokens, temperature)
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in completions]
    truncated = [len(tokens) == max_tokens for tokens in completions]

    async def rewards() -> list[float]:
        envs = [task.env(problem, grade_here) for problem in problems]
        steps = [await env.step(text, cut) for env, text, cut in zip(envs, texts, truncated, strict=True)]
        return [step.score.reward for step in steps if step.score is not None]

    earned = asyncio.run(rewards())
    assert len(earned) == len(problems), "the synthetic tasks have one turn"
    return sum(earned) / len(earned)


def _render(tokenizer: "Qwen2Tokenizer", messages: Sequence[Message]) -> list[int]:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


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

"""Weights that change while an engine samples: nothing is lost, every token has its right version and logprob."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from pipelinerl.types import Completion
from tests.integration.models import load_reference

if TYPE_CHECKING:
    from tests.integration.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def generate_across_update(served: "Served", prompts: Sequence[list[int]]) -> list[list[Completion]]:
    """Send the policy's weights while every prompt is sampled from, again and again. Completions by prompt."""
    done = asyncio.Event()

    async def keep_asking(prompt: list[int]) -> list[Completion]:
        completions = []
        while not done.is_set():
            completions.append(await served.engine.generate(prompt, 1.0, 200))
        return completions

    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(keep_asking(prompt)) for prompt in prompts]
        await asyncio.sleep(0.3)
        await served.link.send()
        done.set()
    return [task.result() for task in asking]


def straddling(completion: Completion) -> bool:
    return len(completion.spans) > 1


def logprobs_across(old: torch.nn.Module, new: torch.nn.Module, prompt: list[int], completion: Completion) -> Tensor:
    """Logprobs [C] when the second span is sampled by `new`, on the keys and values that `old` computed before it.

    The first token of the second span is sampled by a forward pass of the token before it: with `new`, already.
    """
    ids = torch.tensor([*prompt, *completion.tokens.tolist()])[None]
    boundary = len(prompt) + completion.spans[0].end - 1
    with torch.no_grad():
        before = old(ids[:, :boundary], use_cache=True)
        after = new(ids[:, boundary:-1], past_key_values=before.past_key_values, use_cache=True)
    logits = torch.cat([before.logits, after.logits], dim=1)[0, len(prompt) - 1 :]
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


async def test_an_update_in_flight(fp32_engine: "Served", tied_model: Path) -> None:
    """64 sequences run on through it. Their tokens have the old weights' logprobs up to the boundary and, on the old
    KV cache, the new weights' from there on; requests that start later have the new ones from their first token."""
    from tests.integration.serving import PROMPTS, differences, disturb

    old, new = load_reference(tied_model), load_reference(tied_model)
    old.load_state_dict(fp32_engine.policy.hf.state_dict())
    disturb(fp32_engine.policy, 0.05, seed=1)
    new.load_state_dict(fp32_engine.policy.hf.state_dict())
    first = fp32_engine.link.version
    by_prompt = await generate_across_update(fp32_engine, PROMPTS)

    everything = [(prompt, c) for prompt, completions in zip(PROMPTS, by_prompt, strict=True) for c in completions]
    assert {c.finish_reason for _, c in everything} <= {"stop", "length"}  # none aborted
    labels = {tuple(span.version for span in c.spans) for _, c in everything}
    assert labels <= {(first,), (first, first + 1), (first + 1,)} and (first, first + 1) in labels
    crossing = [(prompt, c) for prompt, c in everything if straddling(c)]
    assert len(crossing) >= 8  # how many are in mid-sequence at that moment is up to the scheduler
    for prompt, completion in crossing[:24]:
        assert completion.spans[0].end > 0 and completion.spans[1].end == len(completion.tokens)
        expected = logprobs_across(old, new, prompt, completion)
        assert (torch.from_numpy(completion.logprobs) - expected).abs().max() < 1e-4

    fresh = await fp32_engine.generate(PROMPTS, 1.0, 60)
    assert {tuple(span.version for span in c.spans) for c in fresh} == {(first + 1,)}
    gap = differences(fp32_engine.policy, PROMPTS, fresh)
    assert gap.mean() < 1e-5 and gap.max() < 1e-4
    with torch.no_grad():
        fp32_engine.policy.hf.load_state_dict(old.state_dict())
        assert differences(fp32_engine.policy, PROMPTS, fresh).mean() > 1e-2  # the old weights would be noticed
        fp32_engine.policy.hf.load_state_dict(new.state_dict())


async def test_many_small_buckets_carry_the_same_weights(fp32_engine: "Served") -> None:
    from tests.integration.serving import PROMPTS, Link, differences, disturb

    disturb(fp32_engine.policy, 0.02, seed=2)
    version = fp32_engine.link.version
    fp32_engine.link = await Link.make(fp32_engine.policy, fp32_engine.engine, bucket_bytes=20_000, version=version)
    sizes = [len(bucket) for bucket in fp32_engine.link.manifest.buckets()]
    assert len(sizes) > 10 and max(sizes) > 1
    times = await fp32_engine.link.send()
    assert times["pause_s"] >= times["drain_s"] > 0 and times["resume_s"] > 0
    fresh = await fp32_engine.generate(PROMPTS, 1.0, 30)
    assert differences(fp32_engine.policy, PROMPTS, fresh).max() < 1e-4
    assert fp32_engine.engine.version == version + 1

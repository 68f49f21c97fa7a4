"""One vLLM engine: settings, what it returns, and that its logprobs are the trainer's."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipelinerl.errors import ParityError
from pipelinerl.types import Completion

if TYPE_CHECKING:
    from tests.integration.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_every_setting_is_resolved_as_asked(fp32_engine: "Served") -> None:
    assert fp32_engine.engine.settings == {
        "logprobs_mode": "processed_logprobs",
        "prefix_caching": False,
        "async_scheduling": False,
        "chunked_prefill": True,
        "generation_config": "vllm",
        "dtype": "float32",
        "head_dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "enforce_eager": True,
        "seed": 0,
        "v2_model_runner": False,  # the CPU platform has no other
    }


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("logprobs_mode", "raw_logprobs"),
        ("prefix_caching", True),
        ("async_scheduling", True),
        ("generation_config", "auto"),
        ("head_dtype", "bfloat16"),
        ("max_num_seqs", 32),
    ],
)
async def test_a_setting_that_vllm_replaced_is_an_error(fp32_engine: "Served", key: str, other: object) -> None:
    from pipelinerl.engine.vllm_engine import check_settings

    check_settings(fp32_engine.config, fp32_engine.engine.settings)
    with pytest.raises(ParityError, match=f"{key} is {other!r} in the engine"):
        check_settings(fp32_engine.config, fp32_engine.engine.settings | {key: other})


async def test_each_engine_gets_a_seed_of_its_own(fp32_engine: "Served") -> None:
    from pipelinerl.engine.vllm_engine import engine_args

    assert [engine_args(fp32_engine.config, "gloo", seed=0 + index).seed for index in range(2)] == [0, 1]


async def test_a_completion_ends_with_its_stop_token_or_at_the_limit(fp32_engine: "Served") -> None:
    from tests.integration.serving import PROMPTS

    end = AutoTokenizer.from_pretrained(fp32_engine.config.model.path).eos_token_id
    completions = await fp32_engine.generate(PROMPTS, 1.3, 100)
    assert {c.finish_reason for c in completions} == {"stop", "length"}  # both happen with 64 of them
    for completion in completions:
        tokens = completion.tokens.tolist()
        assert completion.logprobs.shape == completion.tokens.shape
        assert completion.logprobs.dtype == np.float32 and (completion.logprobs <= 0).all()
        assert [(s.version, s.start, s.end) for s in completion.spans] == [(fp32_engine.link.version, 0, len(tokens))]
        assert end not in tokens[:-1]
        if completion.finish_reason == "stop":
            assert tokens[-1] == end and len(tokens) <= 100
        else:
            assert tokens[-1] != end and len(tokens) == 100


async def test_the_context_limits_a_completion_too(fp32_engine: "Served") -> None:
    prompts = [[1, 2] * 125 + [3, 4, 5]] * 8  # 253 of 256 tokens
    completions = await fp32_engine.generate(prompts, 1.0, 40)
    assert max(len(c.tokens) for c in completions) == 3


async def test_samples_of_one_prompt_differ_and_greedy_ones_do_not(fp32_engine: "Served") -> None:
    sampled = await fp32_engine.generate([[1, 2, 3]] * 8, 1.0, 20)
    greedy = await fp32_engine.generate([[1, 2, 3]] * 8, 0.0, 20)
    assert len({tuple(c.tokens.tolist()) for c in sampled}) > 1
    assert len({tuple(c.tokens.tolist()) for c in greedy}) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
async def test_logprobs_are_the_trainers(fp32_engine: "Served", temperature: float) -> None:
    from tests.integration.serving import PROMPTS, differences

    completions = await fp32_engine.generate(PROMPTS, temperature, 60)
    gap = differences(fp32_engine.policy, PROMPTS, completions, temperature)
    assert len(gap) > 500
    assert gap.mean() < 1e-5 and gap.max() < 1e-4
    other = differences(fp32_engine.policy, PROMPTS, completions, temperature + 0.1)
    assert other.mean() > 1e-2  # the comparison would notice a temperature that is off by 0.1


async def test_requests_share_a_batch_without_seeing_each_other(fp32_engine: "Served") -> None:
    """Greedy completions of prompts of many lengths are the same alone and together."""
    prompts = [[3 + (7 * i + j) % 90 for j in range(1 + 11 * i)] for i in range(8)]
    together = await fp32_engine.generate(prompts, 0.0, 16)
    alone = [await fp32_engine.engine.generate(prompt, 0.0, 16) for prompt in prompts]
    for a, b in zip(together, alone, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


async def test_a_seeded_completion_depends_on_weights_and_seed_only(fp32_engine: "Served") -> None:
    """Not on what else is in flight, nor on prefills that take several engine steps, nor on pauses for an update."""
    prompts = [[3 + (7 * i + j) % 90 for j in range(100 + i)] for i in range(20)]  # more than one step of 1024 tokens

    async def sample(numbers: Sequence[int]) -> dict[int, Completion]:
        made = (fp32_engine.engine.generate(prompts[n], 1.0, 60, seed=2**40 + n) for n in numbers)
        return dict(zip(numbers, await asyncio.gather(*made), strict=True))

    async def update() -> None:
        await asyncio.sleep(0.02)
        await fp32_engine.link.send()  # the weights that it has already

    alone = {n: (await sample([n]))[n] for n in range(20)}
    together = await sample(range(20))
    across_update, _ = await asyncio.gather(sample(range(19, -1, -1)), update())
    assert any(len(completion.spans) > 1 for completion in across_update.values())
    for other in (together, across_update):
        for n, completion in alone.items():
            assert other[n].tokens.tolist() == completion.tokens.tolist()
            assert other[n].logprobs.tolist() == completion.logprobs.tolist()
    assert len({tuple(c.tokens.tolist()[:4]) for c in alone.values()}) > 15
    first, second = [await fp32_engine.engine.generate(prompts[0], 1.0, 60, seed=seed) for seed in (1, 2)]
    assert first.tokens.tolist() != second.tokens.tolist()


async def test_a_cancelled_request_leaves_the_engine_usable(fp32_engine: "Served") -> None:
    task = asyncio.create_task(fp32_engine.engine.generate([1, 2, 3], 1.0, 200))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await fp32_engine.engine.generate([1, 2, 3], 0.0, 4)).tokens) > 0
    await fp32_engine.engine.heartbeat()

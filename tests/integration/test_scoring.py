"""The trainer's scores are the engine's logprobs: before, after and across weight updates; and what tells when not.

The trainer's side alone is in test_replay.py.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipelinerl.errors import EnvironmentProblem, WeightSyncError
from pipelinerl.metrics.provenance import old_context
from pipelinerl.parity.bisect import LayerCurve, locate
from pipelinerl.trainer.hidden_states import hidden_states
from pipelinerl.trainer.nudge import Weights
from pipelinerl.trainer.scoring import score_completions
from pipelinerl.types import FloatArray, Outcome, Rollout, ScoredSequence, ScoreRequest, Turn, TurnMeta
from tests.integration.models import MAX_LENGTH, run_config, write_model

if TYPE_CHECKING:
    from tests.integration.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")

BLOCKS = 4


@dataclass
class Sampled:
    """What an engine sampled, by phase, and which of its versions were nudged."""

    fresh: list[Rollout]
    straddling: list[Rollout]
    after: list[Rollout]
    nudged: dict[int, bool]


async def ask(served: "Served", prompt: list[int], temperature: float, max_tokens: int) -> Rollout:
    completion = await served.engine.generate(prompt, temperature, max_tokens, with_argmax=True)
    return Rollout((Turn(np.array(prompt, np.int32), completion),), 0.0, Outcome.OK)


async def ask_all(served: "Served", prompts: Sequence[list[int]], temperature: float) -> list[Rollout]:
    return await asyncio.gather(*(ask(served, prompt, temperature, 60) for prompt in prompts))


async def sample(served: "Served", weights: Weights, prompts: Sequence[list[int]], temperature: float) -> Sampled:
    """Three updates fall into the second phase: nudged, back, nudged. At the end engine and trainer agree again."""
    nudged = {served.link.version: False}
    fresh = await ask_all(served, prompts, temperature)
    done = asyncio.Event()

    async def keep_asking(prompt: list[int]) -> list[Rollout]:
        rollouts = []
        while not done.is_set():
            rollouts.append(await ask(served, prompt, temperature, 200))
        return rollouts

    async def send(use_nudged: bool) -> None:
        weights.use(use_nudged)
        await served.link.send()
        nudged[served.link.version] = use_nudged

    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(keep_asking(prompt)) for prompt in prompts]
        for use_nudged in (True, False, True):
            await asyncio.sleep(0.15)
            await send(use_nudged)
        done.set()
    running = [rollout for task in asking for rollout in task.result()]
    straddling = [rollout for rollout in running if len(rollout.turns[0].completion.spans) > 1]
    after = await ask_all(served, prompts, temperature)
    await send(False)
    return Sampled(fresh, straddling, after, nudged)


def gaps(scored: Sequence[ScoredSequence], temperature: float) -> FloatArray:
    return np.abs(np.concatenate([s.trainer[temperature] - s.engine for s in scored]))


def after_the_update(rollouts: Sequence[Rollout]) -> np.ndarray:
    """[tokens] True where an update came before it in its sequence."""
    spans = [[(span.end - span.start, i > 0) for i, span in enumerate(r.turns[0].completion.spans)] for r in rollouts]
    return np.concatenate([np.repeat(later, count) for sequence in spans for count, later in sequence])


async def check(served: "Served", prompts: Sequence[list[int]], temperature: float) -> None:
    """The whole claim for one engine and one temperature."""
    weights = Weights(served.policy)
    sampled = await sample(served, weights, prompts, temperature)
    request = ScoreRequest((temperature, temperature + 0.1), sampled.nudged)

    def scores(rollouts: Sequence[Rollout], **changes: object) -> list[ScoredSequence]:
        asked = ScoreRequest(**{name: getattr(request, name) for name in request.__slots__} | changes)
        return score_completions(served.policy, rollouts, asked, weights)

    spans = [len(rollout.turns[0].completion.spans) for rollout in sampled.straddling]
    assert len(spans) >= 8 and max(spans) > 2  # how many are in mid-sequence at which moment is up to the scheduler
    for rollouts in (sampled.fresh, sampled.straddling, sampled.after):
        scored = scores(rollouts)
        gap = gaps(scored, temperature)
        assert len(gap) > 200
        assert gap.mean() < 1e-5 and gap.max() < 1e-4
        assert gaps(scored, temperature + 0.1).mean() > 1e-2
        flips = np.concatenate([s.flips for s in scored if s.flips is not None])
        assert len(flips) == len(gap) and flips.mean() < 1e-3

    # What straddling sequences look like when the replay is left out: the updates ignored, or their old KV.
    later = after_the_update(sampled.straddling)
    stale = scores(sampled.straddling, nudged=dict.fromkeys(sampled.nudged, False))
    assert gaps(stale, temperature)[later].mean() > 1e-2
    assert np.concatenate([s.flips for s in stale if s.flips is not None])[later].any()
    assert gaps(scores(sampled.straddling, kv="recompute"), temperature)[later].mean() > 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
async def test_scores_are_the_engines_logprobs(fp32_engine: "Served", temperature: float) -> None:
    from tests.integration.serving import PROMPTS

    await check(fp32_engine, PROMPTS, temperature)


@contextmanager
def kv_policy(served: "Served", policy: str, max_lag: int | None = None) -> Iterator[None]:
    from pipelinerl.engine.kv_policy import KVPolicy

    kept = served.engine._kv
    served.engine._kv = KVPolicy(policy, max_lag)
    yield
    served.engine._kv = kept


def kv_ages(rollouts: Sequence[Rollout]) -> set[int]:
    """How many versions old the oldest KV was that any token attended to."""
    return {old_context([TurnMeta.of(turn)]).age_max for rollout in rollouts for turn in rollout.turns}


@pytest.mark.parametrize(("policy", "max_lag", "ages"), [("recompute", None, {0}), ("recompute_at_lag", 2, {1})])
async def test_kv_that_an_update_had_made_anew_is_that_of_the_new_weights(
    fp32_engine: "Served", policy: str, max_lag: int | None, ages: set[int]
) -> None:
    """Three updates; with recompute_at_lag=2 the first leaves the KV of what is running then, the second does not."""
    from tests.integration.serving import PROMPTS

    weights = Weights(fp32_engine.policy)
    with kv_policy(fp32_engine, policy, max_lag):
        sampled = await sample(fp32_engine, weights, PROMPTS, 1.0)
    rollouts = sampled.straddling
    spans = [len(rollout.turns[0].completion.spans) for rollout in rollouts]
    assert len(rollouts) >= 8 and max(spans) > 2
    assert max(kv_ages(rollouts)) == max(ages)
    anew = [len(rollout.turns[0].completion.kv_from) for rollout in rollouts]
    assert max(anew) > 0 and (max_lag is not None or [n + 1 for n in anew] == spans)

    def gap(kv: str) -> FloatArray:
        request = ScoreRequest((1.0,), sampled.nudged, kv)
        return gaps(score_completions(fp32_engine.policy, rollouts, request, weights), 1.0)

    assert gap("recorded").mean() < 1e-5 and gap("recorded").max() < 1e-4
    assert gap("keep")[after_the_update(rollouts)].mean() > 1e-3
    if max_lag is None:
        assert np.array_equal(gap("recompute"), gap("recorded"))
    else:
        assert gap("recompute")[after_the_update(rollouts)].mean() > 1e-4


async def test_an_update_fails_when_not_all_kv_was_dropped(fp32_engine: "Served") -> None:
    async def drops_nothing(reset_running_requests: bool) -> bool:
        assert reset_running_requests
        return False

    engine, llm = fp32_engine.engine, fp32_engine.engine._llm
    with kv_policy(fp32_engine, "recompute"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "reset_prefix_cache", drops_nothing)
        with pytest.raises(WeightSyncError, match="did not drop all keys and values"):
            await fp32_engine.link.send()
    assert await llm.is_paused()
    await fp32_engine.link.send()
    assert engine.version == fp32_engine.link.version and not await llm.is_paused()


# --- an untied engine of four blocks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model(tmp_path_factory.mktemp("deep"), tied=False)
    config = AutoConfig.from_pretrained(path, num_hidden_layers=BLOCKS, layer_types=["full_attention"] * BLOCKS)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def deep_engine(deep_model: Path) -> "AsyncIterator[Served]":
    from tests.integration.serving import serve

    async with serve(run_config(deep_model, engine={"max_num_batched_tokens": 128})) as served:
        yield served


async def test_scores_are_the_engines_logprobs_with_a_head_of_its_own(deep_engine: "Served") -> None:
    from tests.integration.serving import PROMPTS

    await check(deep_engine, PROMPTS, 0.7)


async def compare(served: "Served", tokens: list[int]) -> LayerCurve:
    return locate(await served.engine.hidden_states(tokens), hidden_states(served.policy, tokens), "float32")


TOKENS = [6 + 7 * i % 90 for i in range(50)]


async def test_equal_models_have_equal_hidden_states(deep_engine: "Served") -> None:
    """Again and again, also for one token, and for as many as there may be: a prefill in two chunks."""
    assert deep_engine.config.engine.max_num_batched_tokens < MAX_LENGTH
    for tokens in (TOKENS, TOKENS[:1], [6 + 11 * i % 90 for i in range(MAX_LENGTH - 1)], TOKENS):
        engine, trainer = await deep_engine.engine.hidden_states(tokens), hidden_states(deep_engine.policy, tokens)
        assert (
            [part.shape for part in engine] == [part.shape for part in trainer] == [(len(tokens), 128)] * (BLOCKS + 2)
        )
        assert {part.dtype for part in [*engine, *trainer]} == {np.dtype(np.float32)}
        found = locate(engine, trainer, "float32")
        assert found.jump is None and max(found.differences) < 1e-5, found.describe()


@contextmanager
def changed(served: "Served") -> Iterator[torch.nn.ModuleList]:
    """The policy's blocks, to be spoilt in the trainer only."""
    before = {name: tensor.clone() for name, tensor in served.policy.hf.state_dict().items()}
    with torch.no_grad():
        yield served.policy.hf.base_model.layers
    served.policy.hf.load_state_dict(before)


@pytest.mark.parametrize("block", range(BLOCKS))
async def test_a_block_with_other_weights_is_named(deep_engine: "Served", block: int) -> None:
    with changed(deep_engine) as blocks:
        blocks[block].mlp.down_proj.weight.mul_(1.01)
        found = await compare(deep_engine, TOKENS)
    assert found.where == f"block {block}", found.describe()
    assert (await compare(deep_engine, TOKENS)).where is None


async def test_of_two_blocks_in_the_wrong_order_the_first_is_named(deep_engine: "Served") -> None:
    with changed(deep_engine) as blocks:
        one, other = (blocks[index].state_dict() for index in (1, 2))
        one = {name: tensor.clone() for name, tensor in one.items()}
        blocks[1].load_state_dict(other)
        blocks[2].load_state_dict(one)
        found = await compare(deep_engine, TOKENS)
    assert found.where == "block 1", found.describe()


async def test_other_embeddings_and_another_final_norm_are_named(deep_engine: "Served") -> None:
    with changed(deep_engine):
        deep_engine.policy.hf.base_model.embed_tokens.weight.mul_(1.01)
        assert (await compare(deep_engine, TOKENS)).where == "embedding"
    with changed(deep_engine):
        deep_engine.policy.hf.base_model.norm.weight.mul_(1.01)
        assert (await compare(deep_engine, TOKENS)).where == "final norm"


async def test_an_engine_that_compiles_its_model_is_refused(deep_engine: "Served") -> None:
    settings = deep_engine.engine._llm.vllm_config.model_config
    settings.enforce_eager = False
    try:
        with pytest.raises(EnvironmentProblem, match=r"set engine\.enforce_eager=true"):
            await deep_engine.engine.hidden_states(TOKENS)
    finally:
        settings.enforce_eager = True

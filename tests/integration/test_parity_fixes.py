"""What each of the four fixes is worth: left out, it moves its own metric, and the verdict names its layer.

A bfloat16 body whose logits reach 15 to 20, as those of real models do. Every statement holds for two seeds, each
with problems of its own.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from pipelinerl.errors import ParityError
from pipelinerl.parity.ablation import with_settings
from pipelinerl.parity.preflight import preflight
from pipelinerl.parity.probe import score_request, stale_request
from pipelinerl.parity.results import PHASES, Evidence
from pipelinerl.parity.statistics import Statistics, statistics
from pipelinerl.tasks.registry import build_task
from tests.integration.models import run_config, write_model

if TYPE_CHECKING:
    from tests.integration.bench import Bench

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEEDS = (0, 1)
SYSTEM_PROMPT = "Write the digits of the number in ascending order, and nothing else."
SECTIONS: dict[str, dict[str, Any]] = {
    "task": {"digits": 6, "system_prompt": SYSTEM_PROMPT},
    "sampling": {"temperature": 0.7, "max_tokens": 40},
    "batch": {"group_size": 4},
    "engine": {"max_num_seqs": 32, "block_size": 32},
}


def config_of(path: Path, dtype: str = "bfloat16", **changes: dict[str, Any]) -> Any:
    sections = {name: SECTIONS.get(name, {}) | changes.get(name, {}) for name in {*SECTIONS, *changes}}
    return run_config(path, dtype, **sections)


TIED = pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
BOTH = pytest.mark.parametrize("model", [True, False], indirect=True, ids=["tied", "untied"])


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaled")
    return write_model(path, tied=request.param, large_logits=True)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def reference(model: Path) -> "AsyncIterator[Bench]":
    from tests.integration.bench import bench

    async with bench(config_of(model)) as running:
        yield running


def of_phase(evidence: Evidence, phase: str, config: Any) -> Statistics:
    return statistics(evidence, config.algo, evidence.phase == PHASES.index(phase))


@BOTH
async def test_with_all_fixes_parity_holds_and_without_the_temperature_it_does_not(reference: "Bench") -> None:
    for seed in SEEDS:
        samples = await reference.sample(seed)
        evidence = await reference.score(samples)
        found = statistics(evidence, reference.config.algo)
        verdict = reference.verdict(evidence)
        assert verdict.passed, verdict.advice
        assert found.mean_abs < 0.02 and found.k3 < 1e-3
        assert all(of_phase(evidence, phase, reference.config).tokens > 0 for phase in PHASES)
        assert max(float(np.abs(evidence.engine).max()), 0) > 0.1  # the distributions are not degenerate

        untempered = replace(evidence, trainer={**evidence.trainer, 0.7: evidence.trainer[1.0]})
        assert statistics(untempered, reference.config.algo).mean_abs > 10 * found.mean_abs
        verdict = reference.verdict(untempered)
        assert verdict.layer == "semantic" and not verdict.passed

        request = stale_request(score_request(reference.config, samples))
        stale = await reference.score(samples, request)
        assert statistics(stale, reference.config.algo).mean_abs > 5 * found.mean_abs
        assert reference.verdict(stale).layer == "inference_path"


@TIED
async def test_raw_logprobs_are_a_semantic_failure(reference: "Bench", model: Path, tmp_path: Path) -> None:
    from tests.integration.bench import bench

    async with bench(config_of(model, engine={"logprobs_mode": "raw_logprobs"})) as raw:
        for seed in SEEDS:
            evidence, good = await raw.evidence(seed), await reference.evidence(seed)
            found, before = (statistics(e, raw.config.algo) for e in (evidence, good))
            assert found.mean_abs > 10 * before.mean_abs and found.clip_rate > before.clip_rate + 0.1
            assert found.mean_signed > 0.05  # the tempered distribution is the sharper one
            verdict = raw.verdict(evidence)
            assert verdict.layer == "semantic" and "engine.logprobs_mode=processed_logprobs" in verdict.advice
        await preflight_refuses_or_warns(raw, tmp_path)


async def preflight_refuses_or_warns(bench: "Bench", run_dir: Path) -> None:
    """A training run does not start on such an engine, unless it is told to; the report is there in either case."""
    said: list[str] = []

    async def begin(mode: str) -> Statistics | None:
        config = with_settings(bench.config, {"parity.preflight": mode})
        task = build_task(config.task, 0)
        try:
            return await preflight(
                config, task, bench.engine, bench.trainer, bench.publisher, {}, run_dir, said.append, said.append
            )
        finally:
            await bench.publisher.publish(0)

    with pytest.raises(ParityError, match=r"no parity, semantic: engine\.logprobs_mode=processed_logprobs: mean"):
        await begin("strict")
    assert json.loads((run_dir / "parity.json").read_text())["layer"] == "semantic"
    found = await begin("warn")
    assert found is not None and found.mean_abs > 0.1
    assert "no parity, semantic" in said[-1] and "training all the same" in said[-1]
    said.clear()
    assert await begin("off") is None and said == []


@TIED
async def test_a_bf16_head_in_the_engine_adds_rounding_noise(reference: "Bench", model: Path) -> None:
    """That is what a system does that leaves tied heads out of the fix."""
    from tests.integration.bench import bench

    config = config_of(model, model={"head_dtype": "bfloat16"})
    async with bench(config) as rounded:
        for seed in SEEDS:
            samples = await rounded.sample(seed)
            evidence = await rounded.score(samples, score_request(reference.config, samples))
            found = statistics(evidence, config.algo)
            before = statistics(await reference.evidence(seed), config.algo)
            assert found.mean_abs > 1.5 * before.mean_abs
            assert found.k3 > 2 * before.k3
            fresh, after = (of_phase(evidence, phase, config) for phase in ("fresh", "after"))
            assert after.mean_abs < 1.5 * fresh.mean_abs, "a head that kept its packed copy of the old weights"


@TIED
async def test_prefix_caching_reuses_old_kv_after_an_update(reference: "Bench", model: Path) -> None:
    from tests.integration.bench import bench

    async with bench(config_of(model, engine={"prefix_caching": True})) as cached:
        for seed in SEEDS:
            evidence = await cached.evidence(seed)
            fresh, after = (of_phase(evidence, phase, cached.config) for phase in ("fresh", "after"))
            good = of_phase(await reference.evidence(seed), "after", cached.config)
            assert after.mean_abs > 2 * fresh.mean_abs and after.mean_abs > 2 * good.mean_abs
            verdict = cached.verdict(evidence)
            assert verdict.layer == "inference_path" and "cache_salt=version" in verdict.advice
        with cached.engine_settings(
            config_of(model, engine={"prefix_caching": True, "cache_salt": "version"})
        ) as salted:
            for seed in SEEDS:
                evidence = await salted.evidence(seed)
                fresh, after = (of_phase(evidence, phase, salted.config) for phase in ("fresh", "after"))
                assert after.mean_abs < 1.5 * fresh.mean_abs, "a salted cache is never older than the weights"
                assert salted.verdict(evidence).passed


@TIED
async def test_an_update_that_aborts_throws_completions_away(reference: "Bench", model: Path) -> None:
    config = config_of(model, engine={"update_pause": "abort", "kv_policy": "recompute"})
    with reference.engine_settings(config) as aborting:
        for seed in SEEDS:
            evidence = await aborting.evidence(seed)
            assert evidence.aborted > 0
            assert not (evidence.phase == PHASES.index("straddling")).any()
            verdict = aborting.verdict(evidence)
            assert verdict.layer == "inference_path" and "engine.update_pause=keep" in verdict.advice

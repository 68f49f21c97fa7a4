"""Tokens per second through a rollout worker, over bare `LLM.generate` of vLLM.

    python scripts/bench/rollout.py                      # models/tiny on task=sort, as in the quickstart
    python scripts/bench/rollout.py --model 90m          # a random Qwen2 of 88M parameters in bf16

`worker` is `RolloutWorker.rollout`, all groups at a time: prompts rendered and tokenised, completions with logprobs,
weight versions and texts, rewards from grader processes, summaries for the driver. `bare` is one `LLM.generate` call
with the same prompt tokens, sampling parameters (seeds included) and engine flags, in the same processes (the engine
core in one of its own), that throws the outputs away; `bare, in process` has the core in the caller's process. They
start once, each in a process tree of its own, and then take turns; a round whose sampled tokens differ is an error.
CPU seconds are those of the whole process tree.

Exit code 1 when the median ratio of worker to bare is below --min-ratio.
"""

import argparse
import asyncio
import cProfile
import dataclasses
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from random_model import write_model

from pipelinerl.config.schema import RunConfig

CONTENDERS = {"worker": "worker", "bare": "bare", "bare_in_process": "bare, in process"}
Round = Callable[[int], Awaitable[list[list[int]]]]
"""From the number of a round to the sampled tokens of its completions, in order."""


def run_config(args: argparse.Namespace) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": args.path, "dtype": args.dtype},
            "task": {"kind": "sort"},
            "algo": {"kind": "ppo_clip"},
            "batch": {"groups_per_step": args.groups, "group_size": args.group_size},
            "sampling": {"max_tokens": args.max_tokens, "temperature": args.temperature},
            "engine": {
                "max_model_len": args.max_tokens + 32,
                "max_num_seqs": args.max_num_seqs,
                "max_num_batched_tokens": 4096,
                "kv_cache_mb": 1024,
                "enforce_eager": True,
            },
            "cluster": {"device": "cpu"},
        }
    )


async def worker_rounds(config: RunConfig) -> Round:
    from pipelinerl.engine.worker import RolloutWorker
    from pipelinerl.tasks.registry import build_task

    worker = RolloutWorker(config, 0, "gloo")
    await worker.start()
    problems, groups = build_task(config.task, config.seed).problems("train"), config.batch.groups_per_step

    async def one_round(number: int) -> list[list[int]]:
        tickets = range(number * groups, (number + 1) * groups)
        made = await asyncio.gather(*(worker.rollout(ticket, problems[ticket]) for ticket in tickets))
        assert all(meta.scored == config.batch.group_size for meta, _ in made)
        return [rollout.turns[0].completion.tokens.tolist() for _, group in made for rollout in group.rollouts]

    return one_round


async def bare_rounds(config: RunConfig, in_process: bool) -> Round:
    from transformers import AutoTokenizer
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.inputs import tokens_input

    from pipelinerl.engine.vllm_engine import engine_args
    from pipelinerl.rollout.seeds import completion_seed
    from pipelinerl.rollout.tokens import ChatRenderer
    from pipelinerl.tasks.base import Message
    from pipelinerl.tasks.registry import build_task

    asked = engine_args(config, "gloo", config.seed)
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    if not in_process:
        _core_in_a_process_without_workers(EngineArgs)
    llm = LLM(**{name: value for name, value in vars(asked).items() if name in names})
    llm.collective_rpc("discarded_tokens_draw_nothing")
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(config.model.path))
    problems, batch = build_task(config.task, config.seed).problems("train"), config.batch

    async def one_round(number: int) -> list[list[int]]:
        tickets = range(number * batch.groups_per_step, (number + 1) * batch.groups_per_step)
        prompts, params = [], []
        for ticket in tickets:
            prompt = renderer.prompt([Message("user", f"sort {problems[ticket].data['digits']}")])
            for rollout in range(batch.group_size):
                prompts.append(tokens_input(prompt))
                params.append(
                    SamplingParams(
                        seed=completion_seed(config.seed, "train", ticket, rollout, 0),
                        temperature=config.sampling.temperature,
                        max_tokens=config.sampling.max_tokens,
                        logprobs=0,
                        detokenize=False,
                    )
                )
        start = time.perf_counter(), tree_cpu_s()  # the prompts are given
        outputs = llm.generate(prompts, params, use_tqdm=False)
        one_round.started = start  # type: ignore[attr-defined]
        return [list(output.outputs[0].token_ids) for output in outputs]

    return one_round


def _core_in_a_process_without_workers(engine_args: Any) -> None:
    """`LLM` reads one variable for two things: whether the core has a process, and whether the core's worker has."""
    create, name = engine_args.create_engine_config, "VLLM_ENABLE_V1_MULTIPROCESSING"

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        os.environ[name] = "0"
        config = create(*args, **kwargs)
        os.environ[name] = "1"
        return config

    engine_args.create_engine_config = create_engine_config


def tree_cpu_s() -> float:
    """CPU seconds of this process and its children, so far."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


async def serve(args: argparse.Namespace, replies: TextIO) -> None:
    """One contender in this process: a round for each line on stdin that names its number."""
    config = run_config(args)
    if args.only == "worker":
        one_round = await worker_rounds(config)
    else:
        one_round = await bare_rounds(config, in_process=args.only == "bare_in_process")
    _send(replies, {})
    for line in iter(sys.stdin.readline, ""):
        if args.profile:
            profiler = cProfile.Profile()
            profiler.enable()
        start = time.perf_counter(), tree_cpu_s()
        sampled = await one_round(int(line))
        end = time.perf_counter(), tree_cpu_s()
        if args.profile:
            profiler.disable()
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(40)
        start = getattr(one_round, "started", start)
        _send(
            replies,
            {
                "tokens": sum(map(len, sampled)),
                "crc": zlib.crc32(json.dumps(sampled).encode()),
                "seconds": end[0] - start[0],
                "cpu": end[1] - start[1],
            },
        )


def _send(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


class Contender:
    """A process that does rounds."""

    def __init__(self, which: str, path: str, log: Path) -> None:
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # what the cluster gives a rollout worker on a CPU
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--path", path]
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
            )

    def reply(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"exit code {self._process.wait()}\n{self.log.read_text()[-4000:]}")
        reply: dict[str, float] = json.loads(line)
        return reply

    def round(self, number: int) -> dict[str, float]:
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        return self.reply()

    def stop(self) -> None:
        self._process.communicate(timeout=60)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny", help="a model directory, or 90m for the random one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32, or bfloat16 for 90m")
    parser.add_argument("--groups", type=int, help="of a round; 256, or 8 for 90m")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, help="12, or 64 for 90m")
    parser.add_argument("--max-num-seqs", type=int, help="512, or 64 for 90m")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=7, help="of each contender, after one that does not count")
    parser.add_argument("--in-process", action="store_true", help="measure `bare, in process` too")
    parser.add_argument("--min-ratio", type=float, help="0.90, or 0.97 for 90m")
    parser.add_argument(
        "--profile", action="store_true", help="print where a round of the callers' threads goes instead"
    )
    parser.add_argument("--only", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    large = args.model == "90m"
    for name, small_default, large_default in (
        ("dtype", "float32", "bfloat16"),
        ("groups", 256, 8),
        ("max_tokens", 12, 64),
        ("max_num_seqs", 512, 64),
        ("min_ratio", 0.90, 0.97),
    ):
        if getattr(args, name) is None:
            setattr(args, name, large_default if large else small_default)
    return args


def main() -> int:
    args = parse()
    if args.only:
        replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # vLLM prints
        import uvloop  # as in Ray's actors

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(args, replies))
        return 0
    names = [name for name in CONTENDERS if name != "bare_in_process" or args.in_process]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path == "90m":
            path = str(Path(folder) / "model")
            write_model(Path(path), hidden=768, layers=12, vocabulary=8192, longest=1024, dtype="bfloat16")
        running = {}
        for name in names:  # one start after the other
            running[name] = Contender(name, path, Path(folder) / f"{name}.log")
            running[name].reply()
        for number in range(2 if args.profile else args.rounds + 1):
            order = names if number % 2 else names[::-1]
            done = {name: running[name].round(number) for name in order}
            if len({result["crc"] for result in done.values()}) > 1:
                sys.exit(f"round {number}: the contenders sampled different tokens: {done}")
            if number:  # the first one warms up
                for name in names:
                    rounds[name].append(done[name])
        for contender in running.values():
            contender.stop()
        if args.profile:
            for contender in running.values():
                print(contender.log.read_text())
            return 0
    return report(args, rounds)


def report(args: argparse.Namespace, rounds: dict[str, list[dict[str, float]]]) -> int:
    tokens = median(one["tokens"] for one in rounds["bare"])
    print(
        f"{args.model}, {args.dtype}, {args.groups} groups of {args.group_size} a round, {tokens:.0f} sampled tokens "
        f"({tokens / args.groups / args.group_size:.1f} a completion), {args.max_num_seqs} at a time; median of "
        f"{args.rounds} rounds in turns (lowest to highest)\n"
    )
    print("| | tokens/s | CPU us per token | worker / this | by CPU |\n|---|---|---|---|---|")
    for name, own in rounds.items():
        rates = [one["tokens"] / one["seconds"] for one in own]
        cpu = [1e6 * one["cpu"] / one["tokens"] for one in own]
        ratios = [this["seconds"] / ours["seconds"] for this, ours in zip(own, rounds["worker"], strict=True)]
        by_cpu = [this["cpu"] / ours["cpu"] for this, ours in zip(own, rounds["worker"], strict=True)]
        columns = [_spread(rates, ".0f"), _spread(cpu, ".0f"), _spread(ratios, ".3f"), _spread(by_cpu, ".3f")]
        print(f"| {CONTENDERS[name]} | {' | '.join(columns)} |")
    ratios = [bare["seconds"] / ours["seconds"] for bare, ours in zip(rounds["bare"], rounds["worker"], strict=True)]
    print(f"\nworker / bare: {median(ratios):.3f}, at least {args.min_ratio} wanted")
    return int(median(ratios) < args.min_ratio)


def _spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())

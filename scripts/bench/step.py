"""Tokens per second of the trainer's step, over a bare transformers + DeepSpeed step on the same packed rows.

    python scripts/bench/step.py

`trainer` is `TrainerWorker.step`: packed rows made from rollouts, logprobs and entropies block by block, objective,
diagnostics, clipping, optimizer, metrics. `bare` is the least that trains the same model on the same rows: forward
pass, whole fp32 logits of the sampled tokens, weighted cross-entropy, backward pass, the same DeepSpeed configuration
and optimizer. It comes with the trainer's attention (`bare`) and with transformers' sdpa (`bare, sdpa`), which masks
the other sequences of a row. Every run is a process of its own, in turns; the fastest step of all runs counts. The
weights are random: speed does not depend on them. On a machine with other work, CPU seconds say more than seconds.

Exit code 1 when the ratio to `bare` is below --min-ratio.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelinerl.batch.packing import rank_batches
from pipelinerl.config.schema import RunConfig
from pipelinerl.types import Completion, Outcome, RankBatch, Rollout, RolloutGroup, SampleRef, Turn, VersionSpan

CONTENDERS = {"trainer": "trainer", "bare": "bare", "bare_sdpa": "bare, sdpa"}


def write_model(args: argparse.Namespace, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(target)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


def run_config(args: argparse.Namespace, model: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model), "dtype": args.dtype},
            "task": {"kind": "sort"},
            "algo": {"kind": args.algo},
            "sampling": {"max_tokens": args.longest},
            "engine": {"max_model_len": 2 * args.longest, "kv_cache_mb": 64},
            "trainer": {
                "micro_batch_tokens": max(args.micro_batch_tokens, 2 * args.longest),
                "lr": 1e-6,
                "zero_stage": args.zero_stage,
                **({} if args.chunk is None else {"logprob_chunk": args.chunk}),
            },
            "cluster": {"device": "cpu"},
        }
    )


def make_step(args: argparse.Namespace) -> tuple[list[RolloutGroup], list[SampleRef]]:
    """Groups of completions of log-normal length, and what the driver says of them."""
    rng = np.random.default_rng(args.seed)
    groups, refs, count = [], [], args.samples // 8
    for g in range(count):
        rollouts = []
        for k in range(8):
            prompt = rng.integers(args.vocabulary, size=16).astype(np.int32)
            length = int(np.clip(rng.lognormal(np.log(args.longest / 4), 0.6), 1, args.longest))
            tokens = rng.integers(args.vocabulary, size=length).astype(np.int32)
            logprobs = np.full(length, -np.log(args.vocabulary), np.float32)
            completion = Completion(tokens, logprobs, (VersionSpan(0, 0, length),), "stop", "")
            rollouts.append(Rollout((Turn(prompt, completion),), 1.0, Outcome.OK))
            refs.append(SampleRef(g, k, float(rng.normal()), rollouts[-1].total_len, 1 / (args.samples * length)))
        groups.append(RolloutGroup(g, f"bench/{g}", tuple(rollouts)))
    return groups, refs


def trainer_step(config: RunConfig, batch: RankBatch, groups: list[RolloutGroup], port: int) -> Callable[[], None]:
    from pipelinerl.trainer.worker import TrainerWorker

    worker = TrainerWorker(config, 0, "cpu")
    worker.setup("127.0.0.1", port)

    def step() -> None:
        assert worker.step([batch], *groups).applied

    return step


def bare_step(
    config: RunConfig, batch: RankBatch, groups: list[RolloutGroup], port: int, attention: str
) -> Callable[[], None]:
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from pipelinerl.trainer.backend import deepspeed_config, init_process_group
    from pipelinerl.trainer.optimizer import make_optimizer
    from pipelinerl.trainer.rows import forward_inputs, make_rows

    device = torch.device("cpu")
    init_process_group(device, 0, 1, "127.0.0.1", port, 600.0)
    dtype = getattr(torch, config.model.dtype)
    hf: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype, attn_implementation=attention)
    hf.train()
    engine, *_ = deepspeed.initialize(
        model=hf,
        optimizer=make_optimizer(hf, config.trainer),
        config=deepspeed_config(config.trainer, config.model.dtype == "bfloat16", device),
    )
    rows = [
        (*forward_inputs(row, device), torch.as_tensor(row.batch.advantages * row.batch.weights)[row.positions])
        for row in make_rows(batch, groups)
    ]

    def step() -> None:
        for index, (ids, places, segments, positions, targets, weights) in enumerate(rows):
            kwargs = {} if attention == "sdpa" else {"segments": segments}
            logits = engine(
                input_ids=ids[None], position_ids=places[None], use_cache=False, logits_to_keep=positions, **kwargs
            ).logits[0]
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            engine.set_gradient_accumulation_boundary(index == len(rows) - 1)
            engine.backward((losses * weights).sum(), scale_wrt_gas=False)
            engine.step()

    return step


def measure(args: argparse.Namespace) -> None:
    """One contender in this process. Prints the seconds of its steps as JSON."""
    import torch

    torch.set_num_threads(args.threads)
    config = run_config(args, Path(args.model))
    groups, refs = make_step(args)
    [batch] = rank_batches(refs, 1, config.trainer.micro_batch_tokens)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if args.only == "trainer":
        step = trainer_step(config, batch, groups, port)
    else:
        from pipelinerl.trainer.attention import ATTENTION

        step = bare_step(config, batch, groups, port, "sdpa" if args.only == "bare_sdpa" else ATTENTION)
    if args.profile:
        profile(step)
        return
    seconds, cpu = [], []
    for _ in range(args.steps + 1):
        start, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    print(json.dumps({"seconds": seconds[1:], "cpu": cpu[1:]}))  # the first one allocates


def profile(step: Callable[[], None]) -> None:
    import torch

    step()
    with torch.profiler.profile() as profiled:
        step()
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def run(args: argparse.Namespace, which: str, model: str) -> dict[str, list[float]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--model", model]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"{which}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    if args.profile:
        print(which, done.stdout, sep="\n")
        return {}
    measured: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return measured


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a completion; the median is a quarter")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, help="trainer.logprob_chunk")
    parser.add_argument("--algo", default="ppo_clip")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2], default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of each run, after one that does not count")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-ratio", type=float, default=0.95)
    parser.add_argument("--profile", action="store_true", help="print where a step of each spends its time instead")
    parser.add_argument("--only", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.only:
        measure(args)
        return 0
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(args, Path(folder))
        for _ in range(1 if args.profile else args.repeats):
            for which in CONTENDERS:
                measured = run(args, which, folder)
                if measured:
                    seconds, cpu = best.get(which, (float("inf"), float("inf")))
                    best[which] = min(seconds, *measured["seconds"]), min(cpu, *measured["cpu"])
    if args.profile:
        return 0
    tokens = sum(ref.length for ref in make_step(args)[1])
    print(
        f"V={args.vocabulary}, H={args.hidden}, {args.layers} layers, {args.dtype}, {args.samples} samples, {tokens} "
        f"tokens in rows of {args.micro_batch_tokens}, ZeRO {args.zero_stage}, {args.threads} thread(s), "
        f"fastest of {args.repeats} x {args.steps} steps\n"
    )
    print("| | tokens/s | s per step | CPU s per step | trainer / this | by CPU |\n|---|---|---|---|---|---|")
    ours, ours_cpu = best["trainer"]
    for which, (seconds, cpu) in best.items():
        rates = f"{tokens / seconds:.0f} | {seconds:.2f} | {cpu:.2f} | {seconds / ours:.2f} | {cpu / ours_cpu:.2f}"
        print(f"| {CONTENDERS[which]} | {rates} |")
    return int(best["bare"][0] / ours < args.min_ratio)


if __name__ == "__main__":
    sys.exit(main())

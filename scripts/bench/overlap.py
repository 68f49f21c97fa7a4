"""What asynchrony gains: whole runs of `pipelinerl train`, asynchronous and synchronous, in turns.

    python scripts/bench/overlap.py                     # all cases, five rounds: about an hour
    python scripts/bench/overlap.py --case balanced     # a quarter of it

Engine and trainer have a core each (`cluster.pin_cores`), the task is `lengths`, and a case sets lengths, slots and
forward passes so that generating the batch of a step takes about half as long as training on it (`trainer`), as long
(`balanced`), twice as long (`engine`); `lognormal` has lengths with a 99th percentile of ten times the median. T_gen
(seconds in which the engine has work) and T_train are means over the middle steps of the synchronous run, T_sync and
T_async what a step takes from end to end in the two modes, weight update, metrics and rollout files included. The best
there is is T_async = max(T_gen, T_train).

`overlap` is max(T_gen, T_train) / T_async, `gain` is T_sync / T_async. Exit code 1 when the median overlap of a case
of equal lengths is below --min-overlap, or the median gain of `lognormal` below --min-gain.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from random_model import write_model

from pipelinerl.metrics.log import read_metrics

LONGEST = 1024  # tokens, prompt and completion


@dataclass(frozen=True)
class Case:
    median: int  # tokens of a completion
    prompt: int  # tokens
    slots: int  # sequences that decode together: the fewer, the dearer a sampled token
    sigma: float = 0.0
    groups: int = 16
    max_lag: int = 2
    steps: int = 12
    settings: tuple[str, ...] = ()


REFERENCE = ("algo.kl.coef=0.01", "trainer.gradient_checkpointing=true")  # two more forward passes of the trainer
CASES = {
    "trainer": Case(median=64, prompt=64, slots=128, settings=REFERENCE),
    "balanced": Case(median=64, prompt=64, slots=32),
    "engine": Case(median=64, prompt=16, slots=16),
    "lognormal": Case(median=64, prompt=64, slots=64, sigma=0.99, max_lag=4, steps=20),
}


@dataclass(frozen=True)
class Times:
    """Seconds a step, means over the middle steps of a run."""

    step: float
    generate: float
    train: float
    metrics: dict[str, float]


def overrides(args: argparse.Namespace, case: Case, mode: str, model: str, run_dir: Path) -> list[str]:
    prompt = case.prompt + 4  # with the markers of the chat template
    values: dict[str, Any] = {
        "task": "lengths",
        "task.median": case.median,
        "task.sigma": case.sigma,
        "task.prompt_chars": case.prompt,
        "model.path": model,
        "model.dtype": "float32",
        "steps": case.steps,
        "batch.groups_per_step": case.groups,
        "batch.group_size": 8,
        "sampling.max_tokens": LONGEST - prompt if case.sigma else case.median,
        "sampling.temperature": 1.0,
        "engine.max_model_len": LONGEST,
        "engine.max_num_seqs": case.slots,
        "engine.kv_cache_mb": 512,
        "trainer.lr": 1e-6,
        "trainer.micro_batch_tokens": 4096,
        "async.mode": mode,
        "async.max_lag": case.max_lag if mode == "async" else "null",
        "cluster.pin_cores": "true",
        "eval.at_start": "false",
        "eval.at_end": "false",
        "checkpoint.every": 0,
        "parity.preflight": "off",
        "parity.alarm": "off",
        "metrics.plots": "false",
        "metrics.wandb.mode": "disabled",
        "metrics.console": "plain",
        "run_dir": run_dir,
    }
    return [f"{key}={value}" for key, value in values.items()] + [*case.settings, *args.set]


def run(args: argparse.Namespace, case: Case, mode: str, model: str, run_dir: Path) -> Times:
    """Train, and read back what the run says of its steps."""
    command = [sys.executable, "-m", "pipelinerl", "train", *overrides(args, case, mode, model, run_dir)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    steps = {line["step"]: line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"}
    first, last = 1 + case.max_lag, case.steps - 1 - case.max_lag  # the buffer is filled by then, and still filled
    middle = [steps[step] for step in range(first + 1, last + 1)]
    names = [name for name, value in middle[0].items() if isinstance(value, float)]
    return Times(
        step=(steps[last]["time/elapsed_s"] - steps[first]["time/elapsed_s"]) / (last - first),
        generate=fmean((1 - line["perf/rollout_idle_frac"]) * line["perf/step_s"] for line in middle),
        train=fmean(line["perf/train_s"] for line in middle),
        metrics={name: fmean(line.get(name, 0.0) for line in middle) for name in names},
    )


@dataclass(frozen=True)
class Pair:
    """A synchronous and an asynchronous run."""

    sync: Times
    both: Times

    @property
    def ratio(self) -> float:
        return self.sync.generate / self.sync.train

    @property
    def overlap(self) -> float:
        return max(self.sync.generate, self.sync.train) / self.both.step

    @property
    def gain(self) -> float:
        return self.sync.step / self.both.step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs of each case")
    parser.add_argument("--hidden", type=int, default=192, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--min-overlap", type=float, default=0.9)
    parser.add_argument("--min-gain", type=float, default=1.5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the runs")
    parser.add_argument("--keep", type=Path, help="folder for the runs' directories; without it they are removed")
    args = parser.parse_args()
    pairs: dict[str, list[Pair]] = {name: [] for name in args.case}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        model = str(Path(temporary) / "model")
        size = write_model(
            Path(model), hidden=args.hidden, layers=args.layers, vocabulary=512, longest=LONGEST, dtype="float32"
        )
        print(f"model of {size / 1e6:.1f}M parameters\n", flush=True)
        for number in range(args.rounds):
            for name in args.case:
                times = {}
                for mode in ("sync", "async") if number % 2 else ("async", "sync"):
                    run_dir = folder / f"{name}_{number}_{mode}"
                    times[mode] = run(args, CASES[name], mode, model, run_dir)
                    if not args.keep:
                        shutil.rmtree(run_dir)
                pairs[name].append(Pair(times["sync"], times["async"]))
                print(f"round {number + 1}: {_line(name, pairs[name][-1:])}", flush=True)
    return report(args, pairs)


def report(args: argparse.Namespace, pairs: dict[str, list[Pair]]) -> int:
    print(f"\nmedian of {args.rounds} rounds (lowest to highest), seconds a step\n")
    print("| case | T_gen | T_train | T_gen/T_train | T_sync | T_async | overlap | gain |")
    print("|---|---|---|---|---|---|---|---|")
    for name, own in pairs.items():
        print(_line(name, own))
    print("\n| async | trainer idle | engine idle | pause | drain | transfer | send | canary |")
    print("|---|---|---|---|---|---|---|---|")
    for name, own in pairs.items():
        keys = ["perf/trainer_idle_frac", "perf/rollout_idle_frac"]
        keys += [f"sync/{part}_s" for part in ("pause", "drain", "transfer", "send", "canary")]
        cells = [_spread([pair.both.metrics.get(key, float("nan")) for pair in own], ".3f") for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")
    missed = [
        name
        for name, own in pairs.items()
        if (CASES[name].sigma == 0 and median(pair.overlap for pair in own) < args.min_overlap)
        or (CASES[name].sigma > 0 and median(pair.gain for pair in own) < args.min_gain)
    ]
    print(f"\noverlap >= {args.min_overlap}, gain on log-normal lengths >= {args.min_gain}; missed: {missed or 'none'}")
    return int(bool(missed))


def _line(name: str, pairs: Sequence[Pair]) -> str:
    columns = [
        _spread([pair.sync.generate for pair in pairs], ".2f"),
        _spread([pair.sync.train for pair in pairs], ".2f"),
        _spread([pair.ratio for pair in pairs], ".2f"),
        _spread([pair.sync.step for pair in pairs], ".2f"),
        _spread([pair.both.step for pair in pairs], ".2f"),
        _spread([pair.overlap for pair in pairs], ".3f"),
        _spread([pair.gain for pair in pairs], ".2f"),
    ]
    return f"| {name} | {' | '.join(columns)} |"


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())

"""What asynchrony gains: the training loop in its asynchronous and its synchronous mode, in turns.

    python scripts/bench/overlap.py                     # all cases, five rounds: about an hour
    python scripts/bench/overlap.py --case balanced     # a quarter of it

For each case engine and trainer are started once, with a core each (`cluster.pin_cores`). Then either mode trains for
some steps where the other has left off, as a resumed run would, with a run directory, a journal and recorded batches of
its own. The task is `lengths`, and a case sets lengths, slots and forward passes so that generating the batch of a step
takes about half as long as training on it (`trainer`), as long (`balanced`), twice as long (`engine`); `lognormal` has
lengths with a 99th percentile of ten times the median. T_gen (seconds in which the engine has work) and T_train are
means over the middle steps of the synchronous part, T_sync and T_async what a step takes from end to end in the two
modes, weight update, metrics and rollout files included. The best there is is T_async = max(T_gen, T_train).

`overlap` is max(T_gen, T_train) / T_async, `gain` is T_sync / T_async. Exit code 1 when the median overlap of a case
of equal lengths is below --min-overlap, or the median gain of `lognormal` below --min-gain.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from random_model import write_model

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.concurrency import Ending
from pipelinerl.config.load import load_config
from pipelinerl.config.schema import RunConfig
from pipelinerl.hangs import HangReports
from pipelinerl.loop import train
from pipelinerl.metrics.console import Console
from pipelinerl.metrics.history import History
from pipelinerl.metrics.log import MetricsLog, read_metrics
from pipelinerl.metrics.wandb_sink import WandbSink
from pipelinerl.rollout.ledger import Ledger
from pipelinerl.run import Parts
from pipelinerl.session import Session, open_session
from pipelinerl.tasks.registry import build_task

LONGEST = 1024  # tokens, prompt and completion


@dataclass(frozen=True)
class Case:
    median: int  # tokens of a completion
    prompt: int  # tokens
    slots: int  # sequences that decode together: the fewer, the dearer a sampled token
    sigma: float = 0.0
    groups: int = 16
    max_lag: int = 2
    steps: int = 10
    settings: tuple[str, ...] = ()


REFERENCE = ("algo.kl.coef=0.01", "trainer.gradient_checkpointing=true")  # two more forward passes of the trainer
CASES = {
    "trainer": Case(median=64, prompt=64, slots=128, settings=REFERENCE),
    "balanced": Case(median=64, prompt=64, slots=36, groups=20),
    "engine": Case(median=64, prompt=16, slots=13),
    "lognormal": Case(median=64, prompt=64, slots=64, sigma=0.99, max_lag=4, steps=16),
}


@dataclass(frozen=True)
class Times:
    """Seconds a step, means over the middle steps of a part."""

    step: float
    generate: float
    train: float
    metrics: dict[str, float]


def overrides(args: argparse.Namespace, case: Case, model: str, run_dir: Path) -> list[str]:
    """Settings of everything that is started once for all parts of a case."""
    prompt = case.prompt + 4  # with the markers of the chat template
    values: dict[str, Any] = {
        "task": "lengths",
        "task.median": case.median,
        "task.sigma": case.sigma,
        "task.prompt_chars": case.prompt,
        "model.path": model,
        "model.dtype": "float32",
        "steps": 2 * args.rounds * case.steps,
        "batch.groups_per_step": case.groups,
        "batch.group_size": 8,
        "sampling.max_tokens": LONGEST - prompt if case.sigma else case.median,
        "sampling.temperature": 1.0,
        "engine.max_model_len": LONGEST,
        "engine.max_num_seqs": case.slots,
        "engine.kv_cache_mb": 512,
        "trainer.lr": 1e-6,
        "trainer.micro_batch_tokens": 1024,  # activations stay in the cache of a core, which the other does not share
        "async.max_lag": case.max_lag,
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


def part_of(config: RunConfig, mode: str, start: int, steps: int) -> RunConfig:
    """The configuration of a part: `steps` more steps in this mode."""
    changes = {"mode": mode, "max_lag": config.async_.max_lag if mode == "async" else None}
    modes = type(config.async_).model_validate(changes)
    return config.model_copy(update={"async_": modes, "steps": start + steps})


async def run_part(session: Session, config: RunConfig, state: DriverState, folder: Path) -> DriverState:
    """Train from `state` to the last step of `config`, as `pipelinerl train` does; returns the state at its end."""
    folder.mkdir(parents=True)
    with (folder / "out.txt").open("w") as output, ExitStack() as stack:
        console = Console(config.metrics, config.steps, output)
        stack.callback(console.close)
        wandb = WandbSink(config.metrics.wandb, folder, {}, config.name, None)
        log = MetricsLog(folder, [console, wandb])
        stack.callback(log.close)
        history = History.open(folder, config.journal)
        stack.callback(history.journal.close)
        history.journal.started(state.step, None, state.ledger, config.dump(), config.async_.lag_bound)
        task, hangs = build_task(config.task, config.seed), HangReports(folder, console.note)
        parts = Parts(config, task, session, folder, log, console, wandb, history, None, Ending(), hangs)
        run = parts.run_from(state)
        await train(run)
        return run.state(config.steps)


def times_of(folder: Path, case: Case, start: int, max_lag: int) -> Times:
    """What a part says of its steps."""
    steps = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"}
    # The buffer is filled by the first and still filled at the last.
    first, last = start + 1 + max_lag, start + case.steps - 1 - max_lag
    middle = [steps[step] for step in range(first + 1, last + 1)]
    names = [name for name, value in middle[0].items() if isinstance(value, float)]
    return Times(
        step=(steps[last]["time/elapsed_s"] - steps[first]["time/elapsed_s"]) / (last - first),
        generate=fmean((1 - line["perf/rollout_idle_frac"]) * line["perf/step_s"] for line in middle),
        train=fmean(line["perf/train_s"] for line in middle),
        metrics={name: fmean(line.get(name, 0.0) for line in middle) for name in names},
    )


async def run_case(args: argparse.Namespace, name: str, model: str, folder: Path) -> list["Pair"]:
    """All rounds of a case, in one session."""
    case, pairs = CASES[name], []
    config = load_config(overrides(args, case, model, folder))
    state = DriverState(0, Ledger().to_dict(), 0.0)
    async with open_session(config, folder, lambda text: print(f"{name}: {text}", flush=True)) as session:
        await session.trainer.record_batches(str(folder / "batches"))
        for number in range(args.rounds):
            times = {}
            for mode in ("sync", "async") if number % 2 else ("async", "sync"):
                part, start = folder / f"{number}_{mode}", state.step
                own = part_of(config, mode, start, case.steps)
                state = await run_part(session, own, state, part)
                times[mode] = times_of(part, case, start, own.async_.lag_bound)
            pairs.append(Pair(times["sync"], times["async"]))
            print(f"round {number + 1}: {_line(name, pairs[-1:])}", flush=True)
        await session.trainer.finish_recording()
    return pairs


@dataclass(frozen=True)
class Pair:
    """A synchronous and an asynchronous part."""

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
    parser.add_argument("--rounds", type=int, default=5, help="pairs of parts of each case")
    parser.add_argument("--hidden", type=int, default=192, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--min-overlap", type=float, default=0.9)
    parser.add_argument("--min-gain", type=float, default=1.5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--keep", type=Path, help="folder for run directories; without it they are removed")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs: dict[str, list[Pair]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        model = str(Path(temporary) / "model")
        size = write_model(
            Path(model), hidden=args.hidden, layers=args.layers, vocabulary=512, longest=LONGEST, dtype="float32"
        )
        print(f"model of {size / 1e6:.1f}M parameters\n", flush=True)
        for name in args.case:
            pairs[name] = asyncio.run(run_case(args, name, model, folder / name))
            if not args.keep:
                shutil.rmtree(folder / name)
    return report(args, pairs)


def report(args: argparse.Namespace, pairs: dict[str, list[Pair]]) -> int:
    print(f"\nmedian of {args.rounds} rounds (lowest to highest), seconds a step\n")
    print("| case | T_gen | T_train | T_gen/T_train | T_sync | T_async | overlap | gain |")
    print("|---|---|---|---|---|---|---|---|")
    for name, own in pairs.items():
        print(_line(name, own))
    print("\n| async | trainer idle | engine idle | pause | drain | transfer | load | stage | canary |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, own in pairs.items():
        keys = ["perf/trainer_idle_frac", "perf/rollout_idle_frac"]
        keys += [f"sync/{part}_s" for part in ("pause", "drain", "transfer", "load", "stage", "canary")]
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

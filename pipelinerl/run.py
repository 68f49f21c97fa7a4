"""From a config to a finished run: start the processes, train, export, and clean up whatever happens."""

import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import yaml

from pipelinerl.cluster.fleet import Fleet
from pipelinerl.cluster.ray_cluster import RayCluster
from pipelinerl.cluster.trainer_group import TrainerGroup
from pipelinerl.config.device import resolve_backend, resolve_device
from pipelinerl.config.preflight import with_absolute_paths
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_DONE, EXIT_SIGINT, EXIT_SIGTERM, ConfigError, EnvironmentProblem, PipelineRLError
from pipelinerl.loop import Run, train
from pipelinerl.metrics.console import Console
from pipelinerl.metrics.log import MetricsLog, read_metrics
from pipelinerl.metrics.plots import write_plots
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.metrics.summary import format_summary, summarize
from pipelinerl.metrics.wandb_sink import WandbSink
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.registry import build_task
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.weights.publisher import Publisher

SIGNAL_EXITS = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


def run(config: RunConfig) -> int:
    """Train as `config` says and return the exit code. Raises PipelineRLError when the run cannot go on.

    SIGINT and SIGTERM stop it cleanly, with exit codes 130 and 143; no process is left in any case.
    """
    return asyncio.run(_until_done_or_signal(config))


async def _until_done_or_signal(config: RunConfig) -> int:
    received: list[signal.Signals] = []
    session = asyncio.create_task(_session(config))

    def stop(which: signal.Signals) -> None:
        if not received:
            print(f"\n{which.name}: stopping the workers", file=sys.stderr, flush=True)
            received.append(which)
            session.cancel()

    for which in SIGNAL_EXITS:
        asyncio.get_running_loop().add_signal_handler(which, stop, which)
    try:
        await session
    except (asyncio.CancelledError, PipelineRLError) as error:
        if not received:
            raise
        if str(error):  # of a worker that the signal reached first, or of the end that it came into
            print(f"pipelinerl: {error}", file=sys.stderr, flush=True)
        return SIGNAL_EXITS[received[0]]
    return EXIT_DONE


async def _session(config: RunConfig) -> None:
    """One run. What is opened is closed in reverse order, on success, error and signal alike."""
    config = with_absolute_paths(config)  # workers on other nodes have other working directories
    task = build_task(config.task, config.seed)  # first: bad data should not cost the start of a cluster
    run_dir = _new_run_dir(config)
    device = resolve_device(config)
    backend = resolve_backend(config, device)
    async with AsyncExitStack() as stack:
        console = Console(config.metrics, config.steps)
        wandb = WandbSink(config.metrics.wandb, run_dir, config.dump(), config.name)
        log = MetricsLog(run_dir, [console, wandb])
        stack.callback(_conclude, config, run_dir, log, console, wandb)
        cluster = RayCluster(config, run_dir, device)
        stack.push_async_callback(_to_the_end, cluster.close)

        _tell_about_data(task, console, log)
        console.status(f"run directory {run_dir}; starting Ray")
        await cluster.start()
        console.status("starting engines and trainer")
        trainer_ranks, rollout_workers = await cluster.place_workers(backend)
        fleet, trainer = Fleet(rollout_workers, config), TrainerGroup(trainer_ranks, config.trainer)
        engine_settings, trainer_settings = await asyncio.gather(fleet.start(), trainer.setup())
        _write_settings(run_dir, device, backend, engine_settings, trainer_settings)
        publisher = Publisher(trainer, fleet.engines, config.weights, backend, config.engine.tensor_parallel)
        await publisher.connect()

        console.status("evaluating version 0" if config.eval.at_start else "training")
        await train(
            Run(
                config=config,
                task=task,
                stream=ProblemStream(task.problems("train"), config.seed),
                buffer=GroupBuffer(config.batch.groups_per_step, config.async_.lag_bound, config.steps),
                fleet=fleet,
                trainer=trainer,
                publisher=publisher,
                log=log,
                rollouts=RolloutWriter(run_dir, config.metrics.rollout_groups_per_step),
            )
        )
        console.status("exporting the model")
        await trainer.export(str((run_dir / "model").resolve()))
        console.status("stopping the workers")


def _tell_about_data(task: Task, console: Console, log: MetricsLog) -> None:
    """Say what was left out of the user's data, and what will therefore not happen."""
    if task.skipped_rows:
        console.status(f"{task.name}: {task.skipped_rows} bad rows were skipped")
        log.log("run", 0, {"data/skipped_rows": float(task.skipped_rows)})
    if not task.problems("eval"):
        console.status(f"{task.name} holds no problems out: there will be no evaluation")


async def _to_the_end(close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Close, whatever signal arrives meanwhile: a clean-up that is cut short would leave processes behind."""
    closing = asyncio.create_task(close())
    while not closing.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([closing])
    closing.result()


def _new_run_dir(config: RunConfig) -> Path:
    """Make the run directory and write the resolved config into it. Raises ConfigError when it holds a run."""
    run_dir = Path(config.run_dir or f"outputs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"run_dir={run_dir} holds a run already; choose another run_dir, or move that one away")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config.dump(), sort_keys=False))
    except OSError as error:
        raise EnvironmentProblem(f"run_dir={run_dir}: {error.strerror}; choose another run_dir") from error
    return run_dir


def _write_settings(run_dir: Path, device: str, backend: str, engines: list[Any], trainer: dict[str, Any]) -> None:
    """Write what is really in force to settings.json: every engine's resolved settings, and the trainer's."""
    settings = {"device": device, "weights_backend": backend, "engines": engines, "trainer": trainer}
    (run_dir / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def _conclude(config: RunConfig, run_dir: Path, log: MetricsLog, console: Console, wandb: WandbSink) -> None:
    """Close the metrics, draw the plots and print the summary, for whatever part of the run there was."""
    log.close()
    records = read_metrics(log.path) if log.path.exists() else []
    if not any(record["kind"] == "train" for record in records):
        return
    try:
        if config.metrics.plots:
            write_plots(run_dir, config.async_.lag_bound)
        print(format_summary(summarize(records), run_dir, wandb.sync_hint), flush=True)
    except Exception:  # a mirror of the metrics must not hide how the run ended
        logging.getLogger(__name__).warning("the summary could not be made", exc_info=True)

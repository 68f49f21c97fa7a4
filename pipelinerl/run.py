"""From a config to a finished run: start the processes, train, export, and clean up whatever happens."""

import logging
from contextlib import AsyncExitStack
from pathlib import Path

from pipelinerl.config.preflight import with_absolute_paths
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_DONE
from pipelinerl.loop import Run, train
from pipelinerl.metrics.console import Console
from pipelinerl.metrics.log import MetricsLog, read_metrics
from pipelinerl.metrics.plots import write_plots
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.metrics.summary import format_summary, summarize
from pipelinerl.metrics.wandb_sink import WandbSink
from pipelinerl.parity.preflight import make_alarm, preflight
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.run_dir import new_run_dir
from pipelinerl.session import open_session, until_done_or_signal
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.registry import build_task
from pipelinerl.tasks.stream import ProblemStream


def run(config: RunConfig) -> int:
    """Train as `config` says and return the exit code. Raises PipelineRLError when the run cannot go on.

    SIGINT and SIGTERM stop it cleanly, with exit codes 130 and 143; no process is left in any case.
    """
    return until_done_or_signal(_session(config))


async def _session(config: RunConfig) -> int:
    """One run. What is opened is closed in reverse order, on success, error and signal alike."""
    config = with_absolute_paths(config)  # workers on other nodes have other working directories
    task = build_task(config.task, config.seed)  # first: bad data should not cost the start of a cluster
    run_dir = new_run_dir(config, "", ("metrics.jsonl",))
    async with AsyncExitStack() as stack:
        console = Console(config.metrics, config.steps)
        wandb = WandbSink(config.metrics.wandb, run_dir, config.dump(), config.name)
        log = MetricsLog(run_dir, [console, wandb])
        stack.callback(_conclude, config, run_dir, log, console, wandb)
        _tell_about_data(task, console, log)
        session = await stack.enter_async_context(open_session(config, run_dir, console.status))
        session.write_settings(run_dir)
        calibrated = await preflight(
            config,
            task,
            session.fleet,
            session.trainer,
            session.publisher,
            session.settings,
            run_dir,
            status=console.status,
            tell=console.note,
        )

        console.status("evaluating version 0" if config.eval.at_start else "training")
        await train(
            Run(
                config=config,
                task=task,
                stream=ProblemStream(task.problems("train"), config.seed),
                buffer=GroupBuffer(config.batch.groups_per_step, config.async_.lag_bound, config.steps),
                fleet=session.fleet,
                trainer=session.trainer,
                publisher=session.publisher,
                log=log,
                rollouts=RolloutWriter(run_dir, config.metrics.rollout_groups_per_step),
                alarm=make_alarm(config, calibrated),
                tell=console.note,
            )
        )
        console.status("exporting the model")
        await session.trainer.export(str((run_dir / "model").resolve()))
    return EXIT_DONE


def _tell_about_data(task: Task, console: Console, log: MetricsLog) -> None:
    """Say what was left out of the user's data, and what will therefore not happen."""
    if task.skipped_rows:
        console.status(f"{task.name}: {task.skipped_rows} bad rows were skipped")
        log.log("run", 0, {"data/skipped_rows": float(task.skipped_rows)})
    if not task.problems("eval"):
        console.status(f"{task.name} holds no problems out: there will be no evaluation")


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

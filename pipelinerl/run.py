"""From a config to a finished run: start the processes, train, export, and clean up whatever happens."""

import asyncio
import gc
import json
import logging
import shutil
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelinerl.batch.record import FOLDER as BATCHES
from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.resume import Checkpoint, read_checkpoint
from pipelinerl.checkpoint.saver import Saver
from pipelinerl.checkpoint.store import FOLDER, CheckpointStore, newest_whole
from pipelinerl.concurrency import Ending
from pipelinerl.config.preflight import with_absolute_paths
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_BUG, EXIT_DONE, DataError, EnvironmentProblem, TrainerLost, first_line
from pipelinerl.hangs import HangReports
from pipelinerl.loop import train
from pipelinerl.metrics.console import Console
from pipelinerl.metrics.history import History
from pipelinerl.metrics.journal import Journal
from pipelinerl.metrics.journal_check import check_journal
from pipelinerl.metrics.log import MetricsLog, read_metrics
from pipelinerl.metrics.plots import write_plots
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.metrics.summary import format_summary, summarize
from pipelinerl.metrics.wandb_sink import WandbSink
from pipelinerl.parity.alarm import Alarm
from pipelinerl.parity.preflight import make_alarm, preflight
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.rollout.dedicated import DedicatedEvaluations
from pipelinerl.rollout.evaluate import Evaluator
from pipelinerl.rollout.ledger import Ledger
from pipelinerl.run_dir import train_run_dir
from pipelinerl.session import Session, open_session, until_done_or_signal
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.registry import build_task
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.training.checks import tell_about_fleet
from pipelinerl.training.state import Run


def run(config: RunConfig) -> int:
    """Train as `config` says and return the exit code. Raises PipelineRLError when the run cannot go on.

    SIGINT and SIGTERM stop it cleanly, with exit codes 130 and 143, SIGTERM after a last checkpoint if there is time
    for it; no process is left in any case.
    """
    ending = Ending()
    return until_done_or_signal(_session(config, ending), ending)


async def _session(config: RunConfig, ending: Ending) -> int:
    """One run. What is opened is closed in reverse order, on success, error and signal alike."""
    config = with_absolute_paths(config)  # workers on other nodes have other working directories
    task = build_task(config.task, config.seed)  # first: bad data should not cost the start of a cluster
    console = Console(config.metrics, config.steps)
    async with AsyncExitStack() as stack:
        stack.callback(console.close)
        run_dir, checkpoint = train_run_dir(config, console.note)
        if checkpoint is not None and checkpoint.step >= config.steps and (run_dir / "model").exists():
            console.note(f"all steps={config.steps} are done, and {run_dir / 'model'} is there; to go on, raise steps")
            return EXIT_DONE
        state = checkpoint.state if checkpoint else DriverState(0, Ledger().to_dict(), 0.0)
        hangs = HangReports(run_dir, console.note)
        stack.enter_context(hangs.on_signal())
        wandb = WandbSink(config.metrics.wandb, run_dir, config.dump(), config.name, state.wandb_id)
        log = MetricsLog(run_dir, [console, wandb])
        stack.callback(_conclude, config, run_dir, log, console, wandb)
        _tell_about_data(task, console, log)
        session = await stack.enter_async_context(open_session(config, run_dir, console.status))
        session.write_settings(run_dir, console.note)
        hangs.fleet = session.fleet
        await stack.enter_async_context(hangs.on_stall())
        if checkpoint is not None:
            await _restore(session, checkpoint)
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
        console.status("evaluating version 0" if config.eval.at_start and not checkpoint else "training")
        history = History.open(run_dir, config.journal)
        stack.push(partial(_end_journal, history.journal, ending))
        resumed_from = str(checkpoint.path.resolve()) if checkpoint else None
        history.journal.started(state.step, resumed_from, state.ledger, config.dump(), config.async_.lag_bound)
        alarm = make_alarm(config, calibrated)
        parts = Parts(config, task, session, run_dir, log, console, wandb, history, alarm, ending, hangs)
        stack.callback(parts.write_ledger)
        if config.journal.batches:
            await session.trainer.record_batches(str((run_dir / BATCHES).resolve()))
        ending.patience_s = config.checkpoint.sigterm_s if config.checkpoint.every else 0.0
        gc.collect()
        gc.freeze()  # full collections of the driver, some of them in every step, pass over what is there now
        await train_through_losses(parts, state, checkpoint)
        ending.patience_s = 0.0
        if ending.wished:
            return EXIT_DONE
        console.status("exporting the model")
        await _export(config, session, run_dir)
    return EXIT_DONE


async def _restore(session: Session, checkpoint: Checkpoint) -> None:
    """Bring the checkpoint into the trainer, and its weights to the engines, which have loaded those of model.path.

    They are version 0 for the preflight; training publishes them again as what they are.
    """
    version = await session.trainer.restore(str(checkpoint.path.resolve()))
    assert version == checkpoint.step, (version, checkpoint.step)
    await session.publisher.publish(0)


@dataclass
class Parts:
    """What a run is made of that outlives its trainer."""

    config: RunConfig
    task: Task
    session: Session
    run_dir: Path
    log: MetricsLog
    console: Console
    wandb: WandbSink
    history: History
    alarm: Alarm | None
    ending: Ending
    hangs: HangReports
    ledger: Ledger = field(default_factory=Ledger)  # of the newest run

    def run_from(self, state: DriverState) -> Run:
        """The run that goes on from `state`."""
        config, session = self.config, self.session
        self.ledger = Ledger.resumed(state.ledger)
        batch, lag = config.batch, config.async_.lag_bound
        store = CheckpointStore(self.run_dir / FOLDER, config.checkpoint.keep_last, config.checkpoint.keep_best)
        exports = self.run_dir / "exports"
        run = Run(
            config=config,
            task=self.task,
            stream=ProblemStream(self.task.problems("train"), config.seed),
            buffer=GroupBuffer(batch.groups_per_step, lag, config.steps, state.step, self.ledger),
            fleet=session.fleet,
            trainer=session.trainer,
            publisher=session.publisher,
            log=self.log,
            rollouts=RolloutWriter(self.run_dir, config.metrics.rollout_groups_per_step),
            saver=Saver(config, store, session.trainer, exports, self.console.note, self.wandb.run_id),
            history=self.history,
            alarm=self.alarm,
            dedicated=self._dedicated(),
            tell=self.console.note,
            ending=self.ending,
        )
        run.resume(state)
        self.hangs.run = run
        session.fleet.listener = lambda event: tell_about_fleet(run, event)
        return run

    def _dedicated(self) -> DedicatedEvaluations | None:
        fleet = self.session.fleet
        if fleet.evaluator is None:
            return None
        evaluator = Evaluator(self.config.eval, self.task, fleet.evaluate_apart, self.log)
        return DedicatedEvaluations(self.config, evaluator, fleet.evaluator, self.console.note)

    def write_ledger(self) -> None:
        """Say what became of every prompt, at whatever end of the run."""
        path = self.run_dir / "ledger.json"
        try:
            path.write_text(json.dumps(self.ledger.to_dict()) + "\n")
        except OSError as error:  # must not hide how the run ended, of which it may be the same cause
            self.console.note(f"{path} could not be written: {error}")


async def train_through_losses(parts: Parts, state: DriverState, start: Checkpoint | None) -> None:
    """Train from `state`. When the trainer is lost, start it again and go on from the newest checkpoint, or from where
    this began when there is none; what the engines sampled since then is void, for it has weights that are gone.

    Raises TrainerLost when `trainer.max_restarts` are spent.
    """
    parts.session.fleet.recovery = "refit"
    trainer, limit, now, lost = parts.session.trainer, parts.config.trainer.max_restarts, state, ""
    while True:
        try:
            if lost:
                now = await _revived(parts, start, state)
                parts.history.trainer_restarted(lost, now.step, now.ledger)
            await train(parts.run_from(now))
            await trainer.finish_recording()
            return
        except TrainerLost as error:
            if trainer.restarts >= limit:
                raise TrainerLost(f"{error}; trainer.max_restarts={limit} are spent") from error
            parts.console.note(f"the trainer is lost and starts again: {error}")
            parts.log.log("run", parts.ledger.last_step, {"trainer/restarts": float(trainer.restarts + 1)})
            lost = first_line(error)


async def _revived(parts: Parts, start: Checkpoint | None, state: DriverState) -> DriverState:
    """A new trainer with the state of the newest checkpoint, or with that in which this began; what the driver was."""
    session = parts.session
    newest = await asyncio.to_thread(newest_whole, parts.run_dir / FOLDER, parts.console.note)
    checkpoint = start if newest is None else read_checkpoint(newest)
    await session.replace_trainer()
    if checkpoint is None:
        parts.console.note("there is no checkpoint yet: training begins again at step 1")
        return state
    await session.trainer.restore(str(checkpoint.path.resolve()))
    parts.console.note(f"training goes on after step {checkpoint.step}")
    return checkpoint.state


async def _export(config: RunConfig, session: Session, run_dir: Path) -> None:
    """Write the model, and with LoRA the adapter, in the place of what a shorter run of the same directory left."""
    adapter = [("adapter", session.trainer.export_adapter)] if config.trainer.lora.rank else []
    for name, export in [("model", session.trainer.export), *adapter]:
        target = (run_dir / name).resolve()
        shutil.rmtree(target, ignore_errors=True)
        await export(str(target))


def _end_journal(journal: Journal, ending: Ending, kind: object, error: BaseException | None, trace: object) -> None:
    """The last line of the journal. A disk that is full must not hide how the run ended."""
    code = EXIT_DONE if error is None else getattr(error, "exit_code", EXIT_BUG)
    with suppress(EnvironmentProblem):
        journal.ended(code if ending.exit_code is None else ending.exit_code, first_line(error) if error else "")
    journal.close()


def _journal_line(run_dir: Path) -> str:
    try:
        return check_journal(run_dir).describe()
    except DataError as error:
        return str(error)


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
        print(format_summary(summarize(records), run_dir, wandb.sync_hint, _journal_line(run_dir)), flush=True)
    except Exception:  # a mirror of the metrics must not hide how the run ended
        logging.getLogger(__name__).warning("the summary could not be made", exc_info=True)

"""`pipelinerl replay RUN`: the recorded steps of a run once more, on a fresh trainer without engines.

The trainer starts where the run did, from `model.path` or from the checkpoint it was resumed from (or, when asked, from
one of the run's own), is given the recorded batches in their order, and every metric that it reports is compared with
what `metrics.jsonl` has. On a CPU all of them are the same to the last bit; on a GPU kernels may add up in another
order from run to run, and `tolerance` allows for that.

Which steps count the journal says: where a step was done twice, after a restart or a resume, the later one, whose batch
replaced the earlier one's.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelinerl.batch.record import FOLDER as BATCHES
from pipelinerl.checkpoint.manifest import verify
from pipelinerl.checkpoint.resume import flat
from pipelinerl.checkpoint.store import FOLDER as CHECKPOINTS
from pipelinerl.checkpoint.store import step_name
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_DONE, ConfigError, DataError
from pipelinerl.metrics.journal import FILE_NAME as JOURNAL
from pipelinerl.metrics.jsonl import read_lines
from pipelinerl.metrics.log import FILE_NAME as METRICS
from pipelinerl.metrics.log import read_metrics
from pipelinerl.session import open_session, until_done_or_signal

EXIT_DIFFERENT = 1
NOT_COMPARED = "perf/"  # times
TRAINS_BY = ("algo", "batch", "model", "sampling", "seed", "steps", "trainer")  # settings that a trainer depends on


def replay(run_dir: Path, until: int | None, from_checkpoint: int | None, tolerance: float = 0.0) -> int:
    """Replay and return the exit code: 0 when everything was reproduced, 1 at the first difference.

    Raises: DataError when the run is not recorded as far as that, ConfigError when no single trainer can replay it.
    """
    record = read_record(run_dir)
    steps = record.steps_to_replay(until, from_checkpoint)
    config = record.config_of(steps)
    start = run_dir / CHECKPOINTS / step_name(from_checkpoint) if from_checkpoint is not None else record.resumed_from
    return until_done_or_signal(_replay(run_dir, config, steps, start, tolerance))


@dataclass
class Record:
    """What the journal says of the steps that count."""

    run_dir: Path
    first: int = 0  # steps that were done before the run
    resumed_from: Path | None = None  # the checkpoint with them
    configs: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # step -> settings it was trained with

    def steps_to_replay(self, until: int | None, from_checkpoint: int | None) -> list[int]:
        """From the first after the start to `until`, or to the last. Raises DataError when one is not recorded."""
        begin = self.first if from_checkpoint is None else from_checkpoint
        end = max(self.configs, default=0) if until is None else until
        steps = list(range(begin + 1, end + 1))
        missing = [step for step in steps if step not in self.configs]
        if missing or not steps:
            what = f"step {missing[0]} is not among them" if missing else f"none is after {begin}"
            there = f"{min(self.configs)} to {max(self.configs)}" if self.configs else "none"
            raise DataError(f"{self.run_dir}: recorded steps are {there}, and {what}")
        return steps

    def config_of(self, steps: Iterable[int]) -> RunConfig:
        """The settings of the steps. Raises ConfigError when they changed in a way that a trainer depends on."""
        steps = list(steps)
        first = self.configs[steps[0]]
        for step in steps:
            if changed := _changed(first, self.configs[step]):
                raise ConfigError(
                    f"{self.run_dir}: {changed} changed when the run was resumed, before step {step}; replay up to it "
                    f"with --until={step - 1}, and from it with --from-checkpoint={step - 1}"
                )
        try:
            return RunConfig.model_validate(dict(first))
        except ValidationError as error:
            raise ConfigError(f"{self.run_dir}: its settings are those of another version: {error}") from error


def read_record(run_dir: Path) -> Record:
    """Raises DataError when there is no journal, or it was made without batches."""
    record, config = Record(run_dir), None
    for number, event in enumerate(read_lines(run_dir / JOURNAL)):
        kind = event["event"]
        if kind == "started":
            config = event["config"]
            if number == 0:
                record.first = event["step"]
                record.resumed_from = Path(event["resumed_from"]) if event["resumed_from"] else None
        if kind in ("started", "restarted") and "step" in event:
            record.configs = {step: used for step, used in record.configs.items() if step <= event["step"]}
        if kind == "trained" and config is not None:
            record.configs[event["step"]] = config
    if not (run_dir / BATCHES).is_dir():
        raise DataError(f"{run_dir} has no {BATCHES}/: it was trained with journal.batches=false")
    return record


def _changed(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    before, after = dict(flat(first)), dict(flat(other))
    keys = sorted(key for key in before.keys() | after.keys() if key.split(".")[0] in TRAINS_BY)
    return ", ".join(key for key in keys if before.get(key) != after.get(key))


async def _replay(run_dir: Path, config: RunConfig, steps: list[int], start: Path | None, tolerance: float) -> int:
    logged = {record["step"]: record for record in read_metrics(run_dir / METRICS) if record["kind"] == "train"}
    if start is not None:
        verify(start)
    async with open_session(config, run_dir / "replay", _say, engines=False) as session:
        trainer = session.trainer
        if start is not None:
            await trainer.restore(str(start.resolve()))
        _say(f"replaying steps {steps[0]} to {steps[-1]} from {start or config.model.path}")
        compared = 0
        for step in steps:
            if step not in logged:
                raise DataError(f"{run_dir / METRICS} has no step {step} to compare with")
            result = await trainer.replay(str((run_dir / BATCHES).resolve()), step)
            if message := difference(logged[step], result.metrics, tolerance):
                _say(f"step {step}: {message}")
                return EXIT_DIFFERENT
            compared += sum(not name.startswith(NOT_COMPARED) for name in result.metrics)
            _say(f"step {step}: loss {result.metrics['optim/loss']:.6g} reproduced")
    how = "to the last bit" if not tolerance else f"to within {tolerance:g} of their size"
    _say(f"all {compared:,} numbers of {len(steps)} steps are reproduced {how}")
    return EXIT_DONE


def difference(logged: Mapping[str, Any], replayed: Mapping[str, float], tolerance: float = 0.0) -> str:
    """The first metric that is not what was logged, in words; "" when all are."""
    names = [name for name in replayed if not name.startswith(NOT_COMPARED)]
    wrong = [name for name in names if not _same(logged.get(name), replayed[name], tolerance)]
    if not wrong:
        return ""
    was = "is not in metrics.jsonl" if wrong[0] not in logged else f"was {logged[wrong[0]]!r}"
    more = f"; {len(wrong) - 1} more of its {len(names)} metrics differ" if len(wrong) > 1 else ""
    return f"{wrong[0]} {was}, and is {replayed[wrong[0]]!r} in the replay{more}"


def _same(logged: float | None, replayed: float, tolerance: float) -> bool:
    if logged is None:
        return False
    if not math.isfinite(logged) or not math.isfinite(replayed):
        return repr(logged) == repr(replayed)
    return logged == replayed or abs(logged - replayed) <= tolerance * max(abs(logged), abs(replayed))


def _say(text: str) -> None:
    print(text, flush=True)

"""The directory of a run: with the resolved configuration in it, made once, and entered again only by a resumed run."""

import time
from collections.abc import Callable
from pathlib import Path

import yaml

from pipelinerl.checkpoint.resume import Checkpoint, find_checkpoint
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError, EnvironmentProblem

METRICS = "metrics.jsonl"


def new_run_dir(config: RunConfig, prefix: str, results: tuple[str, ...]) -> Path:
    """Make `config.run_dir`, or outputs/<prefix><name>-<time>, and write the resolved config into it.

    Raises ConfigError when it holds one of `results` already: nothing is overwritten.
    """
    run_dir = _path(config, prefix)
    if any((run_dir / result).exists() for result in results):
        raise ConfigError(f"run_dir={run_dir} holds a run already; choose another run_dir, or move that one away")
    return _with_config(run_dir, config)


def train_run_dir(config: RunConfig, tell: Callable[[str], None]) -> tuple[Path, Checkpoint | None]:
    """The directory of a training run, and the checkpoint to go on from, as `config.resume` says; None: from the start.

    `tell` is told what is resumed, what is damaged, and which settings changed. Raises ConfigError when the directory
    holds a run that is not the one to resume, DataError when no checkpoint of it is whole.
    """
    checkpoint = find_checkpoint(config, tell)
    run_dir = _path(config, "")
    if (run_dir / METRICS).exists() and (checkpoint is None or config.resume != "auto"):
        raise ConfigError(f"run_dir={run_dir} holds a run already; {_way_out(config.resume)}")
    if checkpoint is not None:
        tell(f"resuming from {checkpoint.path}: {checkpoint.step} steps are done")
        if changes := checkpoint.changes(config):
            tell(f"settings that changed since: {'; '.join(changes)}")
    return _with_config(run_dir, config), checkpoint


def _way_out(resume: str) -> str:
    if resume == "auto":
        return "it has no checkpoint to go on from; choose another run_dir, or move that one away"
    if resume == "never":
        return "choose another run_dir, or move that one away; resume=auto goes on with it"
    return f"resume=auto goes on with it; to begin one from {resume}, choose another run_dir"


def _path(config: RunConfig, prefix: str) -> Path:
    return Path(config.run_dir or f"outputs/{prefix}{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _with_config(run_dir: Path, config: RunConfig) -> Path:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config.dump(), sort_keys=False))
    except OSError as error:
        raise EnvironmentProblem(f"run_dir={run_dir}: {error.strerror}; choose another run_dir") from error
    return run_dir
